"""Sum up an output, so that one run shows whether its texts differ from those that the model was
trained on.
"""

import json
from collections import defaultdict
from typing import Any

from hierarchical_clinicalbert.reading.results import rounded
from open_world_hierarchical import STRANGE, OpenWorld


class Summary:
    """Counts over the rows of an output.

    Args:
        labels: of all nodes.
        open_world: the checkpoint's, or None.
    """

    def __init__(self, labels: list[str], open_world: OpenWorld | None):
        self.num_rows = 0
        self.num_truncated = 0
        self.num_strange = 0
        # in texts; None is for texts without a label
        self.classes: dict[str | None, float] = defaultdict(float)
        self.training: dict[str | None, float] = {}  # shares of the classes in the training texts
        if open_world is not None:
            self.training = dict(zip([*labels, None], open_world.shares.tolist(), strict=True))
        self.has_p_values = open_world is not None and open_world.has_references

    def add(self, lines: list[str]) -> None:
        """Count rows or tasks, given as lines of JSON. A text with several labels counts as an
        equal part of each.
        """
        for line in lines:
            row = json.loads(line)
            row = row.get("data", row)
            self.num_rows += 1
            self.num_truncated += row["truncated"]
            for label in row["labels"] or [None]:
                self.classes[label] += 1 / max(1, len(row["labels"]))
            if self.has_p_values:
                self.num_strange += row["p_value"] <= STRANGE

    def content(self) -> dict[str, Any]:
        """Return the summary.

        Shares of classes are in the order of their difference from training, the largest first.
        """
        total = max(1, self.num_rows)
        truncated = {"rows": self.num_truncated, "share": self.num_truncated / total}
        content: dict[str, Any] = {"rows": self.num_rows, "truncated": truncated}
        if self.has_p_values:
            strange = {"rows": self.num_strange, "share": self.num_strange / total}
            content["strange"] = {"max_p_value": STRANGE, **strange}
        classes: list[dict[str, Any]] = []
        for label in self.training or self.classes:
            share = self.classes.get(label, 0.0) / total
            training_share = self.training.get(label)
            if share or training_share:
                trained = {} if training_share is None else {"training_share": training_share}
                classes.append({"label": label, "share": share, **trained})
        content["classes"] = sorted(
            classes, key=lambda one: -abs(one["share"] - one.get("training_share", 0.0))
        )
        return rounded(content)
