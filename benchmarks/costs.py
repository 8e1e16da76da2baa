"""Compare the most probable leaf with the leaf of least expected cost:

    python benchmarks/costs.py --model CHECKPOINT --data FOLDER

CHECKPOINT is a run of OHSUMED, and FOLDER as for ``quality.py``. Test rows are predicted. Two kinds of costs are used:

- distance: the number of edges between the correct and the predicted leaf (`costs="distance"`);
- rarity: an error on a leaf with n of the training rows costs (largest n / n) ^ `RARITY` (a table). Thus rare leaves are predicted
  more often, as in the logit adjustment of Menon et al. (2021, "Long-tail Learning via Logit Adjustment").

"Saved" is the cost of the most probable leaf minus the cost of the prediction. "Gained" is the macro-F1 of the prediction minus
the macro-F1 of the most probable leaf. Both are 95 % bootstrap intervals over the rows.
"""

import json
from pathlib import Path

import numpy as np
import torch
from harness import flag_parser, mean_interval, paired_intervals, print_rows, write_results
from quality import Task
from scored import read_scores
from sklearn.metrics import f1_score

from hierarchical_clinicalbert.evaluation.metrics import one_hot
from taxonomy_hierarchical import Taxonomy

RARITY = 0.4  # the exponent of best macro-F1 on validation rows, of those that kept the accuracy


def main() -> None:
    parser = flag_parser(__doc__, "costs.json")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    everything, count = read_scores(arguments.model, "ohsumed", arguments.data)
    fitted, test = everything.split(np.arange(len(everything.labels)), count)
    decisions, tree, labels = everything.form.decisions, everything.form.tree, test.labels
    nodes = decisions.log_probs(torch.from_numpy(fitted.calibrated(test)[1])).exp()
    edges = distances(tree)
    report = json.loads((arguments.model / "data_report.json").read_text(encoding="utf-8"))
    trained = Task("ohsumed", arguments.data, report["split"]["seed"]).rows()["train"][1]
    rarity = rarity_costs(np.bincount(trained, minlength=tree.num_leaves))
    predictions = {
        "most probable": nodes[:, : tree.num_leaves].argmax(1).numpy(),
        "least distance": decisions.expected_costs(nodes, "distance").argmin(1).numpy(),
        "least rarity cost": decisions.expected_costs(nodes, torch.tensor(rarity)).argmin(1).numpy(),
    }
    rows = [score(name, leaves, predictions["most probable"], labels, edges) for name, leaves in predictions.items()]
    write_results(arguments.output, {"documents": len(labels), "rows": rows})
    columns = [("predicted leaf", "{predicted}"), ("changed", "{changed:.1%}"), ("accuracy", "{accuracy:.1%}")]
    columns += [("macro-F1", "{macro_f1:.1%}")]
    columns += [("gained (95 %)", "{macro_f1_gained[0]:+.1%} to {macro_f1_gained[1]:+.1%}")]
    columns += [("distance", "{distance:.3f}"), ("saved (95 %)", "{distance_saved[0]:.3f} to {distance_saved[1]:.3f}")]
    print_rows(rows, columns)


def distances(tree: Taxonomy) -> np.ndarray:
    """Count the edges between any two leaves, as the nodes on one of their paths only: (num_leaves, num_leaves)."""
    paths = [{*tree.path(leaf)} for leaf in range(tree.num_leaves)]
    return np.array([[len(path ^ other) for other in paths] for path in paths], dtype=float)


def rarity_costs(counts: np.ndarray) -> np.ndarray:
    """Return the costs of the kind "rarity", (num_leaves, num_leaves), from the number of rows of each leaf."""
    leaf_costs = (counts.max() / np.maximum(counts, 1)) ** RARITY
    return np.where(np.eye(len(counts), dtype=bool), 0, leaf_costs[:, None])


def score(name: str, leaves: np.ndarray, most_probable: np.ndarray, labels: np.ndarray, edges: np.ndarray) -> dict:
    """Return the scores and mean distance of predicted leaves (documents,), and what they save and gain (see above)."""
    row = {"predicted": name, "changed": (leaves != most_probable).mean(), "accuracy": (leaves == labels).mean()}
    chosen, before, correct = (one_hot(ids, len(edges)) for ids in (leaves, most_probable, labels))
    saved = mean_interval(edges[labels, most_probable] - edges[labels, leaves])
    return row | {
        "macro_f1": f1_score(labels, leaves, average="macro"),
        "macro_f1_gained": paired_intervals([chosen], [before], correct)["macro_f1"][1:],
        "distance": edges[labels, leaves].mean(),
        "distance_saved": saved[1:],
    }


if __name__ == "__main__":
    main()
