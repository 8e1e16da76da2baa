"""Hierarchical precision, recall and F1, as a module of the `evaluate` library; README.md has the
formulas.

Worth knowing:

1. A prediction and a reference are node ids. Both are extended with their ancestors before they are
   compared, so a sibling of the true node costs less than a node of another branch.
2. `evaluate` imports a copy of this file, so this file imports nothing of this repository.
3. `evaluate` takes the first `Metric` subclass in the module, hence ``import evaluate``, not ``from
   evaluate import Metric``.
"""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `int`): the predicted node of each document.
    references (`list` of `int`): the true node of each document, in the same order.
    parents (`list` of `int`): `parents[i]` is the parent of node `i`, or -1 if node `i` is a root.

Returns:
    hierarchical_precision (`float`), hierarchical_recall (`float`) and hierarchical_f1 (`float`):
        between 0 and 1.

Raises:
    ValueError: no documents, an id that is not a node, or parents that form a cycle.
"""


class HierarchicalF1(evaluate.Metric):
    """Hierarchical precision, recall and F1 (Kiritchenko, Matwin and Famili 2005; Silla and Freitas
    2011).
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation=(
                "S. Kiritchenko, S. Matwin, A. F. Famili: Functional annotation of genes using "
                "hierarchical text categorization, 2005"
            ),
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
            format="numpy",
            reference_urls=["https://doi.org/10.1007/s10618-010-0175-9"],
        )

    def _compute(
        self, predictions: np.ndarray, references: np.ndarray, parents: Sequence[int]
    ) -> dict[str, float]:
        if len(references) == 0:
            raise ValueError("there are no predictions and references to compare")
        for name, ids in {
            "parents": parents,
            "predictions": predictions,
            "references": references,
        }.items():
            for place, node in enumerate(ids):
                if not (-1 if name == "parents" else 0) <= node < len(parents):
                    where = f"{name}[{place}] is {node}"
                    raise ValueError(
                        f"{where}: nodes are numbered 0 to {len(parents) - 1}, and only a "
                        "parent can be -1"
                    )
        paths = [_path(node, parents) for node in range(len(parents))]
        pairs = [
            (paths[predicted], paths[true])
            for predicted, true in zip(predictions, references, strict=True)
        ]
        shared = sum(len(predicted & true) for predicted, true in pairs)
        precision = shared / sum(len(predicted) for predicted, _ in pairs)
        recall = shared / sum(len(true) for _, true in pairs)
        f1 = 2 * precision * recall / (precision + recall) if shared else 0.0
        return {
            "hierarchical_precision": precision,
            "hierarchical_recall": recall,
            "hierarchical_f1": f1,
        }


def _path(node: int, parents: Sequence[int]) -> set[int]:
    """Return a node and all its ancestors. Raise ValueError if there is a cycle."""
    path = set()
    above = node
    while above >= 0:
        if above in path:
            raise ValueError(f"parents has a cycle: node {node} never reaches a root")
        path.add(above)
        above = parents[above]
    return path
