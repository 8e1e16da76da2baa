"""Measure prediction sets: over all texts, and by group of texts or labels.

A guarantee holds on average over all texts. Groups show where it is not kept: among uncertain
texts, rare classes, or below one root.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, combinations, pairwise
from typing import Any

import numpy as np
import pandas as pd

from decisions_hierarchical import Decisions, threshold_index
from hierarchical_clinicalbert.evaluation.metrics import FOLDS

MEASURED_TARGET = 0.9  # coverage or recall of the prediction sets in metrics.json
BANDS = (0.4, 0.6, 0.8)  # between the bands of the most probable leaf's probability
SHARES = (0.01, 0.05)  # between rare, less common and common classes: shares of the scored texts
MIN_TEXTS = 20  # of the worst band: the share of fewer texts is mostly chance
MAX_MORE_NODES = 1.15  # times as many nodes in a set, for thresholds by band
# of the cross-validation that chooses the bands
MAX_TEXTS = 2000
REPEATS = 4


@dataclass(frozen=True)
class PredictedSets:
    """The prediction sets of texts with labels. A text counts once, however many rows it has.

    Attributes:
        labels: a row for each label of a text: ``text``, ``node`` and ``held``, 1 if the set holds
            the label, else 0.
        sizes: means over each text's rows, by text; ``nodes`` is the number of nodes in a set.
        confidence: the probability of the most probable leaf, by text.
        combine: what a text counts for: "min" if its set must hold all its labels, "mean" for the
            share of them.
    """

    decisions: Decisions
    labels: pd.DataFrame
    sizes: pd.DataFrame
    confidence: pd.Series
    combine: str

    def scores(self) -> dict[str, float]:
        """Return the mean over texts of what is guaranteed, and of the sizes; empty without
        labels.
        """
        held = self.labels.groupby("text")["held"].agg(self.combine)
        return {self.decisions.guarantee: held.mean(), **self.sizes.mean()} if len(held) else {}

    def groups(self) -> list[dict[str, Any]]:
        """Measure the sets by ``confidence``, by ``frequency`` of the label and by its ``root``.

        Returns:
            For each group, ``by``, its name ``group``, its number of ``texts``, what is guaranteed
            (``coverage`` or ``recall``) and the mean number of ``nodes`` in a set. If groups are of
            labels, only a text's labels in the group count.
        """
        tree = self.decisions.tree
        nodes = self.labels["node"]
        shares = self.labels.groupby("node")["text"].nunique() / len(self.sizes)
        groups_of = {
            "confidence": name_ranges(self.labels["text"].map(self.confidence), BANDS),
            "frequency": name_ranges(nodes.map(shares), SHARES),
            "root": nodes.map(lambda node: tree.labels[tree.path(node)[0]]),
        }
        rows = []
        for by, groups in groups_of.items():
            for group, labels in self.labels.groupby(groups, observed=True):
                held = labels.groupby("text")["held"].agg(self.combine)
                row = {
                    "by": by,
                    "group": group,
                    "texts": len(held),
                    self.decisions.guarantee: held.mean(),
                }
                rows.append(row | {"nodes": self.sizes["nodes"][held.index].mean()})
        return rows

    def worst_band(self, min_texts: int = MIN_TEXTS) -> dict[str, Any] | None:
        """Return the row of `groups` of the band of confidence that holds least; None if all
        bands have few texts.
        """
        bands = [
            row for row in self.groups() if row["by"] == "confidence" and row["texts"] >= min_texts
        ]
        return min(bands, key=lambda row: row[self.decisions.guarantee], default=None)


def name_ranges(values: pd.Series, edges: tuple[float, ...]) -> pd.Series:
    """Return the name of the range that each value is in. A range holds its upper edge."""
    names = [
        f"at most {edges[0]:.0%}",
        *(f"{low:.0%} to {high:.0%}" for low, high in pairwise(edges)),
    ]
    return pd.cut(values, [-np.inf, *edges, np.inf], labels=[*names, f"above {edges[-1]:.0%}"])


# ── Thresholds by band ────────────────────────────────────────────────────────────────────────────


def split_by_band(
    scores: pd.Series, confidence: pd.Series, bands: Sequence[float]
) -> list[pd.Series]:
    """Return the scores of the texts in each band.

    Both series are by text, and a band holds its upper edge.
    """
    index = np.searchsorted(bands, confidence[scores.index])
    return [scores[index == band] for band in range(len(bands) + 1)]


def choose_bands(
    form: Any, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray
) -> list[float]:
    """Choose the edges among `BANDS` between which texts get thresholds of their own; none if one
    for all is as good.

    The choice has the best worst band in cross-validation, see `PredictedSets.worst_band`, with at
    most `MAX_MORE_NODES` times as many nodes as one threshold for all. With more than `MAX_TEXTS`
    texts, a sample is used.

    Args:
        form: an `evaluation.forms.Form`. The other arguments are those of its ``fit_sets``.
    """
    texts = np.unique(texts, return_inverse=True)[1]
    generator = np.random.default_rng(0)
    scores = form.set_scores(logits, labels, texts)
    confidence = form.confidence(logits, texts)
    different = generator.permutation(scores.index.unique())[:MAX_TEXTS]
    folds = [
        fold
        for _ in range(REPEATS)
        for fold in np.array_split(generator.permutation(different), FOLDS)
    ]

    def predict(bands: tuple[float, ...]) -> PredictedSets | None:
        """Predict sets for each fold, by thresholds of the other texts.

        None: some of these were too few.
        """
        parts = []
        for number, fold in enumerate(folds):
            fitted = scores[np.isin(scores.index, np.setdiff1d(different, fold))]
            rows = np.isin(texts, fold)
            of_bands = [
                form.thresholds_of(some)[threshold_index(MEASURED_TARGET)]
                for some in split_by_band(fitted, confidence, bands)
            ]
            if None in of_bands:
                return None
            threshold = [*zip((*bands, 1.0), of_bands, strict=True)]
            repeated = texts[rows] + number // FOLDS * len(confidence)  # each repeat counts anew
            parts.append(form.predict_sets(logits[rows], labels[rows], repeated, threshold))
        labels_of, sizes, of_texts = (
            pd.concat([getattr(part, name) for part in parts])
            for name in ("labels", "sizes", "confidence")
        )
        return PredictedSets(form.decisions, labels_of, sizes, of_texts, parts[0].combine)

    # what the worst band holds, and the number of nodes
    measured: dict[tuple[float, ...], tuple[float, float]] = {}
    for bands in chain.from_iterable(combinations(BANDS, count) for count in range(len(BANDS) + 1)):
        sets = predict(bands)
        worst = sets and sets.worst_band(MIN_TEXTS * REPEATS)
        if sets and worst:
            measured[bands] = worst[form.decisions.guarantee], sets.sizes["nodes"].mean()
        if () not in measured:  # the first, with one threshold for all
            return []
    most = MAX_MORE_NODES * measured[()][1]
    allowed = [bands for bands, (_, nodes) in measured.items() if nodes <= most]
    # in a tie, the first, of fewer bands
    return [*max(allowed, key=lambda bands: measured[bands][0])]
