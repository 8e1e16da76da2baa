"""Thresholds, guarantee and metrics for any number of nodes a text, against scikit-learn,
exhaustive search and simulation.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import sklearn.metrics
from drawn import MANY_NODES, TREE, A, B, D, E, F, drawn
from scipy.special import expit, logit
from transformers import EvalPrediction

from hierarchical_clinicalbert.evaluation.forms import STRENGTH, ManyNodesForm
from taxonomy_hierarchical import Taxonomy

FLAT = ManyNodesForm(Taxonomy(["a", "b", "c"]))


def closed(probabilities: np.ndarray, thresholds: np.ndarray | float) -> np.ndarray:
    """Choose the nodes that reach their thresholds, and their ancestors."""
    chosen = probabilities >= thresholds
    for node in range(TREE.num_nodes):
        chosen[:, TREE.path(node)] |= chosen[:, [node]]
    return chosen


def f1(chosen: np.ndarray, true: np.ndarray) -> float:
    return float(sklearn.metrics.f1_score(true.ravel(), chosen.ravel(), zero_division=0))


# Thresholds


def test_without_true_nodes_thresholds_are_one_half():
    u, labels = drawn(MANY_NODES, 20)
    assert MANY_NODES.fit_thresholds(u, np.zeros_like(labels)) == [0.5] * 8
    assert MANY_NODES.common_threshold(u, np.zeros_like(labels)) == 0.5
    assert len(MANY_NODES.fit_thresholds(u[:1], np.ones_like(labels[:1]))) == 8


def test_the_common_threshold_has_the_best_micro_f1():
    u, labels = drawn(MANY_NODES, 20)

    def score(threshold: float) -> float:
        return f1(closed(expit(u), threshold), labels)

    best = max(map(score, np.unique(expit(u))))
    threshold = MANY_NODES.common_threshold(u, labels)
    assert score(threshold) == pytest.approx(best)
    assert threshold not in expit(u)  # but between two of them


def test_a_nodes_threshold_of_best_f1_is_averaged_with_the_common_one_by_its_number_of_positives():
    u, labels = drawn(FLAT, 80)
    u = u.round()  # with ties
    labels[:, 2] = 0
    common = FLAT.common_threshold(u, labels)
    thresholds = FLAT.fit_thresholds(u, labels)
    positives = labels.sum(axis=0)
    assert thresholds[2] == pytest.approx(common)  # no positives, no own threshold
    for node in (0, 1):
        share = positives[node] / (positives[node] + STRENGTH)
        own = expit((logit(thresholds[node]) - (1 - share) * logit(common)) / share)
        best = max(f1(u[:, node] >= least, labels[:, node]) for least in [*u[:, node], 9.0])
        assert f1(expit(u[:, node]) >= own, labels[:, node]) == pytest.approx(best)


# Guarantee


@pytest.mark.parametrize("rows", [1, 9, 40])
def test_recall_thresholds_against_their_definition(rows):
    """Compare with the greatest t of (Σ loss + 1) / (n + 1) <= 1 - recall in exact arithmetic,
    rounded down to 6 digits.
    """
    u, labels = drawn(MANY_NODES, 100)
    u = u[:rows].round()  # with ties
    labels = labels[:rows]
    thresholds = MANY_NODES.thresholds_of(MANY_NODES.set_scores(u, labels, np.arange(rows)))
    assert len(thresholds) == 99
    pairs = zip(expit(u), labels, strict=True)
    texts = [row[true == 1].tolist() for row, true in pairs if true.any()]
    risk_at = {}
    for least in {x for text in texts for x in text}:
        losses = [Fraction(sum(x < least for x in text), len(text)) for text in texts]
        risk_at[Fraction(least)] = (sum(losses) + 1) / (len(texts) + 1)
    for percent, threshold in enumerate(thresholds, start=1):
        allowed = [t for t, risk in risk_at.items() if risk <= 1 - Fraction(percent, 100)]
        if (100 - percent) * (len(texts) + 1) < 100:
            assert not allowed
            assert threshold is None
        else:
            factor = 10 ** (5 - math.floor(math.log10(max(allowed))))
            expected = math.floor(max(allowed) * factor) / factor
            assert threshold == pytest.approx(expected, rel=1e-12)
            assert Fraction(threshold) <= max(allowed)


def test_the_recall_of_sets_is_the_mean_share_of_each_texts_nodes():
    rows = [[0.2, 0.9, 0.1], [0.4, 0.3, 0.1], [0.6, 0.5, 0.1], [0.8, 0.5, 0.2], [0.01, 0.02, 0.03]]
    u = logit(np.array(rows))
    labels = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]])
    texts = np.arange(5)
    scores = FLAT.predict_sets(u, labels, texts, 0.5).scores()
    assert scores == {"recall": pytest.approx(2.5 / 4), "nodes": 5 / 4}
    without = np.zeros_like(labels)
    assert FLAT.predict_sets(u, without, texts, 0.5).scores() == {}
    assert FLAT.thresholds_of(FLAT.set_scores(u, without, texts)) == [None] * 99


# Metrics


def test_metrics_against_scikit_learn():
    u, labels = drawn(MANY_NODES, 300)
    u = u.astype(np.float32)
    thresholds = np.random.default_rng(1).uniform(0.1, 0.6, TREE.num_nodes)
    metrics = MANY_NODES.measure(u, labels.astype(np.float32), thresholds=thresholds)
    probabilities = expit(u.astype(np.float64))
    chosen = closed(probabilities, thresholds)
    average_precision = sklearn.metrics.average_precision_score(labels, probabilities)
    pairs = sklearn.metrics.log_loss(labels.ravel(), probabilities.ravel())

    def score(nodes, average: str, zero_division: int = 0) -> float:
        of_nodes = (labels[:, nodes], chosen[:, nodes])
        return sklearn.metrics.f1_score(*of_nodes, average=average, zero_division=zero_division)

    leaves = slice(TREE.num_leaves)
    expected = {
        "micro_f1": score(slice(None), "micro"),
        "macro_f1": score(slice(None), "macro"),
        "leaf_micro_f1": score(leaves, "micro"),
        "leaf_macro_f1": score(leaves, "macro"),
        "example_f1": score(slice(None), "samples", zero_division=1),
        "mean_average_precision": average_precision,
        "log_loss": pairs,
    }
    for level in range(1, TREE.depth + 1):
        expected[f"level_{level}_micro_f1"] = score(np.array(TREE.levels) == level, "micro")
    assert metrics.pop("ece") >= 0
    assert metrics == pytest.approx(expected)


def test_the_calibration_error_by_hand():
    # four pairs have at least 0.1: of text 0, D is in bin 11, f in 10 and B in 13; a of text 2 is
    # in 13, and wrong
    labels = np.zeros((3, 8), dtype=int)
    probabilities = np.full((3, 8), 0.05)
    labels[0, [B, D, E]] = 1
    probabilities[0, [B, D, F]] = [0.9, 0.8, 0.72]
    probabilities[2, A] = 0.9
    metrics = MANY_NODES.measure(logit(probabilities), labels)
    assert metrics["ece"] == pytest.approx((abs(1 - 0.8) + 0.72 + abs(1 - 1.8)) / 4)


def test_without_thresholds_the_common_one_is_taken():
    u, labels = drawn(MANY_NODES, 100)
    expected = MANY_NODES.measure(u, labels, MANY_NODES.common_threshold(u, labels))
    prediction = EvalPrediction(predictions=(u, np.zeros(3)), label_ids=labels)
    assert MANY_NODES.compute_metrics(prediction) == expected


def test_scores_without_a_label_are_defined():
    metrics = MANY_NODES.measure(np.full((5, 8), -9.0), np.zeros((5, 8), dtype=int))
    assert metrics["micro_f1"] == metrics["macro_f1"] == 0
    assert metrics["example_f1"] == 1
    assert not {"mean_average_precision", "ece", "level_1_micro_f1", "leaf_macro_f1"} & set(metrics)
