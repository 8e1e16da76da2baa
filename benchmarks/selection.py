"""Simulate the bias of scores on the validation rows that selected a checkpoint: ``python
benchmarks/selection.py``.

All evaluations of a run have the same accuracy on new rows, so the excess of the best evaluation is
chance. Two evaluations agree on whether a row is predicted correctly for 95 % of the rows. Each row
has a probability of being correct, drawn from the beta distribution with this mean and this
agreement. With less agreement, the excess is larger.
"""

import numpy as np
from harness import RESULTS, print_table, write_results

ACCURACY = 0.7
AGREEMENT = 0.95
ROWS = (30, 100, 350)
EVALUATIONS = (2, 5, 20)
RUNS = 4000


def main() -> None:
    generator = np.random.default_rng(0)
    correlation = 1 - (1 - AGREEMENT) / (2 * ACCURACY * (1 - ACCURACY))
    total = 1 / correlation - 1  # of the two parameters of the beta distribution
    results = []
    table = []
    for rows in ROWS:
        gaps = []
        for evaluations in EVALUATIONS:
            chances = generator.beta(ACCURACY * total, (1 - ACCURACY) * total, size=(RUNS, rows, 1))
            correct = generator.random((RUNS, rows, evaluations), dtype=np.float32) < chances
            gaps.append(100 * (correct.mean(axis=1).max(axis=1).mean() - ACCURACY))
            results.append({"rows": rows, "evaluations": evaluations, "points": gaps[-1]})
        table.append([rows, *(f"+{gap:.1f}" for gap in gaps)])
    print_table(
        ["validation rows", *(f"{count} evaluations" for count in EVALUATIONS)], table, left=0
    )
    settings = {"accuracy": ACCURACY, "agreement": AGREEMENT, "runs": RUNS}
    write_results(RESULTS / "selection.json", {**settings, "results": results})


if __name__ == "__main__":
    main()
