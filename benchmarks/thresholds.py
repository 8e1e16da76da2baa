"""Compare numbers of repeated cross-validations for choosing the shrinkage of thresholds (`evaluation.many_nodes`):

    python benchmarks/thresholds.py --data FOLDER --runs RUNS

RUNS holds finished runs of ``benchmarks/quality.py`` for multi-label models, with their stored validation and test scores. The
thresholds are fitted to the validation texts in 20 random orders, because the order determines the folds. Each line has the mean
and standard deviation of F1 on the test file over the orders, and the chosen shrinkages. The last line of a run has the one
threshold of best micro-F1 on the test file itself, which is an upper bound for common thresholds.
"""

from collections import Counter
from pathlib import Path

import numpy as np
from harness import flag_parser
from quality import MULTI_LABEL_TASKS, Task
from transformers import AutoConfig

from configuration_hierarchical import MULTI_LABEL
from hierarchical_clinicalbert.evaluation import many_nodes
from hierarchical_clinicalbert.evaluation.calibration import calibrate_out_of_fold, calibrated_logits, fit_calibration
from hierarchical_clinicalbert.evaluation.forms import form_of
from hierarchical_clinicalbert.evaluation.metrics import confusion_counts, macro_f1, micro_f1

REPEATS, ORDERS = (1, 2, 6, 12), 20


def main() -> None:
    parser = flag_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    arguments = parser.parse_args()
    print("| run | repeats | micro-F1 | macro-F1 | shrinkage m: times chosen |\n| --- | ---: | ---: | ---: | --- |")
    for file in sorted(arguments.runs.glob("*/decision_logits.npz")):
        name, _, seed = file.parent.name.rsplit("-", 2)
        if name in MULTI_LABEL_TASKS:
            study(Task(name, arguments.data, int(seed)), file)


def study(task: Task, file: Path) -> None:
    """Print the table of one run."""
    tree, labels = task.tree, {split: task.rows(split)[1] for split in ("validation", "test")}
    config = AutoConfig.from_pretrained(file.parent, trust_remote_code=True)
    scores = {
        split: (z - np.array(config.calibration.biases)) / np.array(config.calibration.scales)
        for split, z in np.load(file).items()
    }
    form, texts = form_of(tree, MULTI_LABEL), np.arange(len(scores["validation"]))
    validation = scores["validation"], None, labels["validation"]
    u = calibrate_out_of_fold(form, *validation, texts)
    test = calibrated_logits(form.decisions, fit_calibration(form, *validation), scores["test"], None)
    for repeats in REPEATS:
        scores_by_order, chosen = [], Counter[float]()
        for order in range(ORDERS):
            rows = np.random.default_rng(order).permutation(texts)
            given = u[rows], labels["validation"][rows]
            strength = many_nodes.choose_strength(form.decisions, *given, repeats)
            thresholds = many_nodes.shrunk_thresholds(tree, *given, (strength,))[strength]
            chosen[strength] += 1
            counts = confusion_counts(labels["test"], many_nodes.predict_nodes(form.decisions, test, thresholds))
            scores_by_order.append((100 * micro_f1(counts), 100 * macro_f1(counts)))
        means, deviations = np.mean(scores_by_order, 0), np.std(scores_by_order, 0)
        cells = (f"{mean:.2f} ± {deviation:.2f}" for mean, deviation in zip(means, deviations, strict=True))
        times = ", ".join(f"{strength:g}: {count}" for strength, count in sorted(chosen.items()))
        print(f"| {file.parent.name} | {repeats} | {' | '.join(cells)} | {times} |", flush=True)
    best = many_nodes.common_threshold(test, labels["test"])
    counts = confusion_counts(labels["test"], many_nodes.predict_nodes(form.decisions, test, best))
    print(f"| {file.parent.name} | best of test | {100 * micro_f1(counts):.2f} | {100 * macro_f1(counts):.2f} | |")


if __name__ == "__main__":
    main()
