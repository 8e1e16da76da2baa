"""Thresholds, guarantee and metrics for any number of nodes a text, against scikit-learn,
exhaustive search and simulation.
"""

import math
import statistics
from fractions import Fraction

import numpy as np
import pytest
import sklearn.metrics
from drawn import TREE, A, B, D, E, F, drawn
from scipy.special import expit, logit
from transformers import EvalPrediction

from hierarchical_clinicalbert.evaluation.forms import STRENGTH, ManyNodesForm
from taxonomy_hierarchical import Taxonomy

FLAT = Taxonomy(["a", "b", "c"])


def closed(tree: Taxonomy, probabilities: np.ndarray, thresholds: np.ndarray | float) -> np.ndarray:
    """Choose the nodes that reach their thresholds, and their ancestors."""
    reached = probabilities >= thresholds
    nodes = range(tree.num_nodes)
    return np.column_stack(
        [reached[:, [n for n in nodes if node in tree.path(n)]].any(axis=1) for node in nodes]
    )


def f1(chosen: np.ndarray, true: np.ndarray) -> float:
    return float(sklearn.metrics.f1_score(true.ravel(), chosen.ravel(), zero_division=0))


# Thresholds


def test_without_true_nodes_thresholds_are_one_half():
    u, labels = drawn(ManyNodesForm(TREE), 20)
    assert ManyNodesForm(TREE).fit_thresholds(u, np.zeros_like(labels)) == [0.5] * 8
    assert ManyNodesForm(TREE).common_threshold(u, np.zeros_like(labels)) == 0.5
    assert len(ManyNodesForm(TREE).fit_thresholds(u[:1], np.ones_like(labels[:1]))) == 8


def test_the_common_threshold_has_the_best_micro_f1():
    u, labels = drawn(ManyNodesForm(TREE), 20)

    def score(threshold: float) -> float:
        return f1(closed(TREE, expit(u), threshold), labels)

    best = max(map(score, np.unique(expit(u))))
    assert score(ManyNodesForm(TREE).common_threshold(u, labels)) == pytest.approx(best)


def test_a_nodes_threshold_of_best_f1_is_averaged_with_the_common_one_by_its_number_of_positives():
    u, labels = drawn(ManyNodesForm(FLAT), 80)
    u = u.round(1)  # with ties
    labels[:, 2] = 0
    common = ManyNodesForm(FLAT).common_threshold(u, labels)
    thresholds = np.array(ManyNodesForm(FLAT).fit_thresholds(u, labels))
    positives = labels.sum(axis=0)
    assert thresholds[2] == pytest.approx(common)  # no positives, no own threshold
    for node in (0, 1):
        share = positives[node] / (positives[node] + STRENGTH)
        own = expit((logit(thresholds[node]) - (1 - share) * logit(common)) / share)
        best = max(f1(u[:, node] >= least, labels[:, node]) for least in [*u[:, node], 9.0])
        assert f1(expit(u[:, node]) >= own, labels[:, node]) == pytest.approx(best)


# Guarantee


def recall_thresholds(u: np.ndarray, labels: np.ndarray) -> list[float | None]:
    form = ManyNodesForm(Taxonomy([f"node {i}" for i in range(u.shape[1])]))
    return form.thresholds_of(form.set_scores(u, labels, np.arange(len(u))))


def recall_scores(u: np.ndarray, labels: np.ndarray, threshold: float) -> dict[str, float]:
    form = ManyNodesForm(Taxonomy([f"node {i}" for i in range(u.shape[1])]))
    return form.predict_sets(u, labels, np.arange(len(u)), threshold).scores()


@pytest.mark.parametrize("rows", [1, 9, 40])
def test_recall_thresholds_against_their_definition(rows):
    """Compare with the greatest t of (Σ loss + 1) / (n + 1) <= 1 - recall in exact arithmetic,
    rounded down to 6 digits.
    """
    u, labels = drawn(ManyNodesForm(TREE), 100)
    # with ties
    u = u[:rows].round()
    labels = labels[:rows]
    thresholds = recall_thresholds(u, labels)
    texts = [
        [float(x) for x in row[true == 1]]
        for row, true in zip(expit(u), labels, strict=True)
        if true.any()
    ]
    assert len(thresholds) == 99
    risk_at = {
        Fraction(t): (sum(Fraction(sum(x < t for x in text), len(text)) for text in texts) + 1)
        / (len(texts) + 1)
        for t in {x for text in texts for x in text}
    }
    for percent in range(1, 100):
        expected = max(
            (t for t, risk in risk_at.items() if risk <= 1 - Fraction(percent, 100)), default=None
        )
        if (100 - percent) * (len(texts) + 1) < 100:
            assert expected is None
            assert thresholds[percent - 1] is None
        else:
            factor = 10 ** (5 - math.floor(math.log10(expected)))
            assert thresholds[percent - 1] == pytest.approx(
                math.floor(expected * factor) / factor, rel=1e-12
            )
            assert Fraction(thresholds[percent - 1]) <= expected


def test_the_recall_of_sets_is_the_mean_share_of_each_texts_nodes():
    probabilities = np.array(
        [[0.2, 0.9, 0.1], [0.4, 0.3, 0.1], [0.6, 0.5, 0.1], [0.8, 0.5, 0.2], [0.01, 0.02, 0.03]]
    )
    labels = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]])
    assert recall_scores(logit(probabilities), labels, 0.5) == {
        "recall": pytest.approx(2.5 / 4),
        "nodes": 5 / 4,
    }
    assert recall_scores(logit(probabilities), np.zeros_like(labels), 0.5) == {}
    assert recall_thresholds(logit(probabilities), np.zeros_like(labels)) == [None] * 99


# Metrics


def test_metrics_against_scikit_learn():
    tree = TREE
    u, labels = drawn(ManyNodesForm(tree), 300)
    thresholds = np.random.default_rng(1).uniform(0.1, 0.6, tree.num_nodes)
    form = ManyNodesForm(tree)
    u = u.astype(np.float32)
    metrics = form.measure(u, labels.astype(np.float32), thresholds=thresholds)
    probabilities = expit(u.astype(np.float64))
    chosen = closed(tree, probabilities, thresholds)
    leaves = slice(tree.num_leaves)
    levels = np.array(tree.levels)

    def score(nodes, average: str) -> float:
        return sklearn.metrics.f1_score(
            labels[:, nodes], chosen[:, nodes], average=average, zero_division=0
        )

    expected = {
        "micro_f1": score(slice(None), "micro"),
        "macro_f1": score(slice(None), "macro"),
        "leaf_micro_f1": score(leaves, "micro"),
        "leaf_macro_f1": score(leaves, "macro"),
        "example_f1": sklearn.metrics.f1_score(labels, chosen, average="samples", zero_division=1),
        "mean_average_precision": sklearn.metrics.average_precision_score(
            labels, probabilities, average="macro"
        ),
        "log_loss": statistics.mean(
            sklearn.metrics.log_loss(labels[:, n], probabilities[:, n], labels=[0, 1])
            for n in range(tree.num_nodes)
        ),
        **{f"level_{k}_micro_f1": score(levels == k, "micro") for k in range(1, tree.depth + 1)},
    }
    for name, value in expected.items():
        assert metrics.pop(name) == pytest.approx(value), name
    assert set(metrics) == {"ece"}


def test_the_calibration_error_by_hand():
    # four pairs have at least 0.1: of text 0, D is in bin 11, f in 10 and B in 13; a of text 2 is
    # in 13, and wrong
    labels = np.zeros((3, 8), dtype=int)
    probabilities = np.full((3, 8), 0.05)
    labels[0, [B, D, E]] = 1
    probabilities[0, [B, D, F]] = [0.9, 0.8, 0.72]
    probabilities[2, A] = 0.9
    metrics = ManyNodesForm(TREE).measure(logit(probabilities), labels)
    assert metrics["ece"] == pytest.approx((abs(1 - 0.8) + 0.72 + abs(1 - 1.8)) / 4)


def test_without_thresholds_the_common_one_is_taken():
    u, labels = drawn(ManyNodesForm(TREE), 100)
    form = ManyNodesForm(TREE)
    expected = form.measure(u, labels, thresholds=form.common_threshold(u, labels))
    assert (
        form.compute_metrics(EvalPrediction(predictions=(u, np.zeros(3)), label_ids=labels))
        == expected
    )


def test_scores_without_a_label_are_defined():
    metrics = ManyNodesForm(TREE).measure(np.full((5, 8), -9.0), np.zeros((5, 8), dtype=int))
    assert metrics["micro_f1"] == metrics["macro_f1"] == 0
    assert metrics["example_f1"] == 1
    assert not {"mean_average_precision", "ece", "level_1_micro_f1", "leaf_macro_f1"} & set(metrics)
