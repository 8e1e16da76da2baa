"""Multi-label calibration, thresholds, guarantee and metrics against scikit-learn, exhaustive search and simulation."""

import math
import statistics
from fractions import Fraction

import datasets
import numpy as np
import pytest
import sklearn.metrics
import torch
from mapie.risk_control import MultiLabelClassificationController
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.special import expit, logit
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import RepeatedKFold
from transformers import EvalPrediction

from errors import InputError
from evaluation import lexical
from evaluation.calibration import FOLDS, PRIOR_STD, calibrate_out_of_fold
from evaluation.metrics import bin_index, one_hot, per_class_report
from evaluation.multi_label import (
    REPEATS,
    STRENGTHS,
    MultiLabelCalibration,
    best_threshold,
    build_multi_label_metrics,
    choose_strength,
    common_threshold,
    fit_multi_label_calibration,
    fit_node_thresholds,
    fit_recall_thresholds,
    likely_pairs,
    marginal_logits,
    open_decisions,
    pair_variance,
    predict_nodes,
    recall_scores,
    shrunk_thresholds,
)
from modeling_hierarchical import LexicalHead
from taxonomy_hierarchical import Taxonomy

# a at level 1; B > c at level 2; B > D > e, f at level 3; G > h, an only child
TREE = Taxonomy(["a", {"B": ["c", {"D": ["e", "f"]}]}, {"G": ["h"]}])
A, C, E, F, H, B, D, G = range(8)
FLAT = Taxonomy(["a", "b", "c"])
TREES = pytest.mark.parametrize("tree", [TREE, FLAT], ids=["unequal depth", "flat"])


def drawn(tree: Taxonomy, z: np.ndarray, seed: int = 1) -> np.ndarray:
    """Draw labels from the conditional scores z."""
    has = np.random.default_rng(seed).random(z.shape) < expit(z)
    labels = np.zeros(z.shape, dtype=np.int8)
    for node in range(tree.num_nodes):
        labels[:, node] = has[:, tree.path(node)].all(axis=1)
    return labels


def case(tree: Taxonomy, rows: int, seed: int = 0, unknown: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Draw conditional scores and labels; whole subtrees of some texts are unknown."""
    generator = np.random.default_rng(seed)
    z = generator.normal(-0.5, 1.5, (rows, tree.num_nodes))
    labels = drawn(tree, z, seed + 1)
    for row, top in zip(*np.nonzero(generator.random(labels.shape) < unknown), strict=True):
        labels[row, [node for node in range(tree.num_nodes) if top in tree.path(node)]] = -100
    return z, labels


def f1(chosen: np.ndarray, true: np.ndarray) -> float:
    return float(sklearn.metrics.f1_score(true.ravel(), chosen.ravel(), zero_division=0))


# Marginal logits and open decisions


def test_a_decision_is_open_where_the_parent_is_true_and_the_label_known():
    labels = np.full((3, 8), -100)
    labels[0] = 0
    labels[1] = 0
    labels[1, [B, D]], labels[1, [E, F]] = 1, -100
    np.testing.assert_array_equal(np.flatnonzero(open_decisions(TREE, labels)[0]), [A, B, G])
    np.testing.assert_array_equal(np.flatnonzero(open_decisions(TREE, labels)[1]), [A, C, B, D, G])
    assert not open_decisions(TREE, labels)[2].any()


# Calibration


def test_calibration_recovers_the_true_parameters():
    generator = np.random.default_rng(0)
    encoder, words = generator.normal(0, 2, (2, 60_000, TREE.num_nodes))
    scales, biases = generator.uniform(0.5, 1.2, TREE.num_nodes), generator.uniform(-0.4, 0.4, TREE.num_nodes)
    labels = drawn(TREE, scales * (encoder + 0.6 * words) + biases)
    fitted = fit_multi_label_calibration(TREE, encoder, words, labels)
    assert fitted.lexical_weight == pytest.approx(0.6, rel=0.05)
    assert fitted.node_scales == pytest.approx(scales, rel=0.08)
    assert fitted.node_biases == pytest.approx(biases, abs=0.06)
    # lexical scores that contradict the labels get no weight
    assert fit_multi_label_calibration(TREE, encoder, -words, labels).lexical_weight == 0
    assert fit_multi_label_calibration(TREE, encoder, None, labels).lexical_weight == 0


def test_each_node_has_the_map_estimate_on_its_open_rows():
    z, labels = case(TREE, 60, unknown=0.05)
    fitted = fit_multi_label_calibration(TREE, 2 * z + 1, None, labels)

    def posterior(parameters: np.ndarray, node: int | None, mean: float) -> float:
        value = ((parameters[0] - mean) ** 2 + parameters[1] ** 2) / (2 * PRIOR_STD**2)
        for row in range(60):
            for n in range(TREE.num_nodes) if node is None else [node]:
                parent = TREE.parents[n]
                if labels[row, n] >= 0 and (parent < 0 or labels[row, parent] == 1):
                    p = 1 / (1 + math.exp(-parameters[0] * (2 * z[row, n] + 1) - parameters[1]))
                    value -= math.log(p if labels[row, n] else 1 - p)
        return value

    common = minimize(lambda a: posterior(np.array([a[0], 0]), None, 1), [1.0], method="BFGS")
    for node in range(TREE.num_nodes):
        expected = minimize(posterior, [1.0, 0.0], (node, common.x[0]), method="BFGS").x
        assert [fitted.node_scales[node], fitted.node_biases[node]] == pytest.approx(expected, abs=2e-3)


def test_nodes_without_open_rows_keep_the_prior_and_nodes_with_one_class_stay_moderate():
    z, labels = case(TREE, 200)
    labels[:, [G, H]] = 0  # G is never true, so H is never open
    labels[:, C] = np.where(labels[:, B] == 1, 1, 0)
    fitted = fit_multi_label_calibration(TREE, z, None, labels)
    assert fitted.node_biases[H] == 0
    others = fit_multi_label_calibration(TREE, z, None, np.where(np.arange(8) == H, -100, labels))
    assert fitted.node_scales == others.node_scales
    assert -3 < fitted.node_biases[G] < -0.3
    assert 0.3 < fitted.node_biases[C] < 3


def test_unknown_labels_and_closed_decisions_do_not_affect_the_fit():
    z, labels = case(TREE, 200, unknown=0.1)
    words = np.random.default_rng(5).normal(size=z.shape)
    closed = ~open_decisions(TREE, labels)
    assert (labels == -100).any()
    assert closed.any()
    expected = fit_multi_label_calibration(TREE, z, words, labels)
    other = np.where(closed, 1000.0, z)
    assert fit_multi_label_calibration(TREE, other, words, labels) == expected
    assert fit_multi_label_calibration(TREE, z.astype(np.float64), words, labels.astype(np.float32)) == expected
    nothing = fit_multi_label_calibration(TREE, z, words, np.full_like(labels, -100))
    assert nothing == MultiLabelCalibration(0.0, [1.0] * 8, [0.0] * 8)


def test_calibration_is_applied_node_by_node():
    z, words = np.random.default_rng(0).normal(size=(2, 5, 8))
    scales, biases = np.arange(1.0, 9.0), np.arange(-4.0, 4.0)
    u = MultiLabelCalibration(0.5, scales.tolist(), biases.tolist()).apply(TREE, z.astype(np.float32), words)
    conditional = expit(scales * (z.astype(np.float32) + 0.5 * words) + biases)
    np.testing.assert_allclose(expit(u[:, E]), conditional[:, B] * conditional[:, D] * conditional[:, E])
    np.testing.assert_allclose(expit(u[:, A]), conditional[:, A])


def test_a_single_text_is_scored_by_its_own_calibration():
    z, labels = case(TREE, 300)
    texts = np.arange(300)
    single = calibrate_out_of_fold(fit_multi_label_calibration, TREE, z[:1], None, labels[:1], texts[:1])
    np.testing.assert_array_equal(
        single, fit_multi_label_calibration(TREE, z[:1], None, labels[:1]).apply(TREE, z[:1], None)
    )


# Thresholds


def test_the_ancestors_of_a_predicted_node_are_predicted():
    probabilities = np.array([[0.1, 0.2, 0.6, 0.1, 0.2, 0.7, 0.65, 0.3], [0.9, 0.1, 0.1, 0.1, 0.1, 0.2, 0.1, 0.1]])
    thresholds = np.array([0.95, 0.9, 0.5, 0.9, 0.9, 0.9, 0.9, 0.3])
    chosen = predict_nodes(TREE, probabilities, thresholds)
    np.testing.assert_array_equal(np.flatnonzero(chosen[0]), [E, B, D, G])
    assert not chosen[1].any()
    np.testing.assert_array_equal(np.flatnonzero(predict_nodes(TREE, probabilities, 0.6)[0]), [E, B, D])


def random_forest(generator) -> Taxonomy:
    """Return a forest with leaves at all levels and only children."""
    paths = [(f"root {i}",) for i in range(3)]
    for i in range(60):
        paths.append((*paths[generator.integers(len(paths))][:5], f"node {i}"))
    return Taxonomy.from_paths(paths)


@pytest.mark.parametrize("seed", range(5))
def test_whole_levels_give_the_predictions_and_thresholds_of_single_nodes(seed):
    generator = np.random.default_rng(seed)
    tree = random_forest(generator)
    deepest = [generator.integers(tree.num_nodes, size=generator.integers(4)) for _ in range(40)]
    labels = np.zeros((40, tree.num_nodes), dtype=np.int8)
    for row, nodes in zip(labels, deepest, strict=True):
        row[list(tree.with_ancestors(nodes.tolist()))] = 1
    labels[generator.random(labels.shape) < 0.05] = -100
    u = generator.normal(size=labels.shape) + (labels == 1)

    def close(chosen):
        for node in reversed(tree.reading_order):
            if tree.parents[node] >= 0:
                chosen[:, tree.parents[node]] |= chosen[:, node]
        return chosen

    np.testing.assert_array_equal(predict_nodes(tree, u, 1.0), close(u >= 1.0))
    for strength, fitted in shrunk_thresholds(tree, u, labels, STRENGTHS).items():
        common, expected = best_threshold(u[labels >= 0], labels[labels >= 0] == 1), np.empty(tree.num_nodes)
        chosen = np.zeros(u.shape, dtype=bool)
        for node in reversed(tree.reading_order):
            forced = chosen[:, tree.children(node)].any(axis=1)
            known, positives = labels[:, node] >= 0, (labels[:, node] == 1).sum()
            free, counts = known & ~forced, [(known & forced).sum(), (labels[forced, node] == 1).sum()]
            own = best_threshold(u[free, node], labels[free, node] == 1, *counts)
            expected[node] = common
            if own is not None and math.isfinite(strength):
                expected[node] = (positives * own + strength * common) / (positives + strength)
            chosen[:, node] = forced | (u[:, node] >= expected[node])
        np.testing.assert_array_equal(fitted, expit(expected))


@pytest.mark.parametrize("seed", range(20))
def test_best_threshold_against_exhaustive_search(seed):
    generator = np.random.default_rng(seed)
    scores = generator.integers(-5, 5, 30) / 2  # with ties
    true = generator.random(30) < 0.4
    forced, forced_true = (0, 0) if seed % 2 else (7, int(generator.integers(8)))

    def score(threshold: float) -> float:
        chosen = scores >= threshold
        positives = true.sum() + forced_true
        return 2 * ((chosen & true).sum() + forced_true) / (chosen.sum() + forced + positives)

    best = best_threshold(scores, true, forced, forced_true)
    assert score(best) == pytest.approx(max(score(t) for t in [*np.unique(scores), 99]))
    assert abs(scores - best).min() >= 0.25  # halfway between scores half a unit apart


def test_there_is_no_threshold_where_nothing_is_true():
    assert best_threshold(np.array([1.0, 2.0]), np.array([False, False])) is None
    assert best_threshold(np.array([]), np.array([], dtype=bool)) is None
    z, labels = case(TREE, 20)
    np.testing.assert_array_equal(fit_node_thresholds(TREE, z, np.zeros_like(labels)), [0.5] * 8)
    np.testing.assert_array_equal(fit_node_thresholds(TREE, z, np.full_like(labels, -100)), [0.5] * 8)
    assert common_threshold(z, np.zeros_like(labels)) == 0.5
    assert fit_node_thresholds(TREE, z[:1], np.ones_like(labels[:1])).shape == (8,)


@TREES
def test_the_common_threshold_has_the_best_micro_f1(tree):
    z, labels = case(tree, 80, unknown=0.05)
    u, known = marginal_logits(tree, z), labels >= 0
    probabilities = expit(u)

    def score(threshold: float) -> float:
        return f1(predict_nodes(tree, probabilities, threshold)[known], labels[known])

    best = max(map(score, np.unique(probabilities)))
    assert score(common_threshold(u, labels)) == pytest.approx(best)
    shared = shrunk_thresholds(tree, u, labels, (math.inf,))[math.inf]
    np.testing.assert_allclose(shared, common_threshold(u, labels))


def test_each_nodes_own_threshold_has_its_best_f1_after_closure():
    z, labels = case(TREE, 60, unknown=0.05)
    u = marginal_logits(TREE, z) + np.random.default_rng(9).normal(size=z.shape)  # children above their parents, too
    thresholds = shrunk_thresholds(TREE, u, labels, (0,))[0]
    for node in range(TREE.num_nodes):
        known = labels[:, node] >= 0

        def score(threshold: float, node=node, known=known) -> float:
            changed = np.where(np.arange(TREE.num_nodes) == node, threshold, thresholds)
            return f1(predict_nodes(TREE, expit(u), changed)[known, node], labels[known, node])

        candidates = [*expit(u[:, node]), 1.0]
        assert score(thresholds[node]) == pytest.approx(max(map(score, candidates)))


def test_a_threshold_is_averaged_with_the_common_one_by_the_number_of_positives():
    z, labels = case(FLAT, 60)
    labels[:, 2] = 0
    by_strength = shrunk_thresholds(FLAT, z, labels, (math.inf, 10, 0))
    common, shrunk, own = (logit(by_strength[strength]) for strength in (math.inf, 10, 0))
    positives = labels.sum(axis=0)
    np.testing.assert_allclose(shrunk, (positives * own + 10 * common) / (positives + 10))
    assert own[2] == common[2]  # no positives, no own threshold


def test_the_strength_of_the_shrinkage_is_that_of_the_best_f1_on_other_folds():
    u, labels = marginal_logits(TREE, (found := case(TREE, 60))[0]), found[1]
    totals: dict[float, float] = {}
    for strength in STRENGTHS:
        true, chosen = [], []
        for fitted, scored in RepeatedKFold(n_splits=FOLDS, n_repeats=REPEATS, random_state=0).split(u):
            thresholds = shrunk_thresholds(TREE, u[fitted], labels[fitted], (strength,))[strength]
            chosen.append(predict_nodes(TREE, expit(u[scored]), thresholds))
            true.append(labels[scored])
        pair = np.concatenate(true), np.concatenate(chosen)
        totals[strength] = sum(sklearn.metrics.f1_score(*pair, average=average) for average in ("micro", "macro"))
    assert len({round(total, 3) for total in totals.values()}) > 4
    best = max(STRENGTHS, key=totals.__getitem__)
    assert choose_strength(TREE, u, labels) == best
    np.testing.assert_allclose(fit_node_thresholds(TREE, u, labels), shrunk_thresholds(TREE, u, labels, (best,))[best])


def test_unknown_labels_do_not_move_thresholds():
    z, labels = case(TREE, 100, unknown=0.1)
    expected = fit_node_thresholds(TREE, marginal_logits(TREE, z), labels)
    # H and G are known or unknown together, and have no other node below them
    unknown = labels[:, [H, G]] == -100
    assert unknown.any()
    u = marginal_logits(TREE, z)
    u[:, [H, G]] = np.where(unknown, -30.0, u[:, [H, G]])
    np.testing.assert_allclose(fit_node_thresholds(TREE, u, labels), expected)


# Guarantee


def risks(p: np.ndarray, labels: np.ndarray) -> dict[Fraction, Fraction]:
    """Compute (Σ loss + 1) / (n + 1) at each probability of a true node, in exact arithmetic."""
    texts = [[float(x) for x in row[true == 1]] for row, true in zip(p, labels, strict=True)]
    texts = [text for text in texts if text]
    return {
        Fraction(t): (sum(Fraction(sum(x < t for x in text), len(text)) for text in texts) + 1) / (len(texts) + 1)
        for t in {x for text in texts for x in text}
    }


def rounded_down(t: Fraction) -> float:
    """Round a probability down to 6 significant digits."""
    factor = 10 ** (5 - math.floor(math.log10(t)))
    return math.floor(t * factor) / factor


@pytest.mark.parametrize("rows", [1, 9, 19, 40])
def test_recall_thresholds_against_their_definition(rows):
    z, labels = case(TREE, 4 * rows, seed=rows, unknown=0.03)
    z = z.round()  # ties
    labels = labels[:rows]
    u = marginal_logits(TREE, z[:rows])
    thresholds, num_texts = fit_recall_thresholds(u, labels)
    assert num_texts == (labels == 1).any(axis=1).sum()
    assert len(thresholds) == 99
    risk_at = risks(expit(u), labels)
    for percent in range(1, 100):
        expected = max((t for t, risk in risk_at.items() if risk <= 1 - Fraction(percent, 100)), default=None)
        if (100 - percent) * (num_texts + 1) < 100:
            assert expected is None
            assert thresholds[percent - 1] is None
        else:
            assert thresholds[percent - 1] == pytest.approx(rounded_down(expected), rel=1e-12)
            assert Fraction(thresholds[percent - 1]) <= expected


def test_recall_thresholds_are_exact_for_texts_of_very_different_sizes():
    labels = (np.arange(60) <= np.arange(60)[:, None]).astype(np.int8)  # 1 to 60 nodes
    u = np.random.default_rng(0).normal(size=labels.shape)
    thresholds, _ = fit_recall_thresholds(u, labels)
    risk_at = risks(expit(u), labels)
    for percent in range(1, 99):
        expected = max(t for t, risk in risk_at.items() if risk <= 1 - Fraction(percent, 100))
        assert thresholds[percent - 1] == pytest.approx(rounded_down(expected), rel=1e-12)


def test_small_probabilities_of_correct_nodes_do_not_bring_all_nodes_into_the_answer():
    u = np.linspace(-20, -10, 150 * 300).reshape(300, 150).T  # rare nodes of a large taxonomy
    labels = np.tile(np.arange(300) == 150, (150, 1)).astype(np.int8)
    threshold = fit_recall_thresholds(u, labels)[0][98]  # which may miss no node
    assert threshold == pytest.approx(expit(u[:, 150].min()), rel=1e-5)
    scores = recall_scores(u, labels, threshold)
    assert scores == {"recall": 1, "nodes": (u >= u[:, 150].min()).sum() / 150}


def test_recall_thresholds_worked_by_hand():
    # four texts: the losses of t just above 0.2, 0.4, 0.6, 0.8 are 1/2, 1/2 + 1, 2 + 1/2, …
    probabilities = np.array([[0.2, 0.9, 0.1], [0.4, 0.3, 0.1], [0.6, 0.5, 0.1], [0.8, 0.5, 0.2], [0.01, 0.02, 0.03]])
    labels = np.array([[1, 1, 0], [1, 0, 0], [1, -100, 0], [1, -100, -100], [0, 0, 0]])
    thresholds, num_texts = fit_recall_thresholds(logit(probabilities), labels)
    assert num_texts == 4
    # (loss + 1) / 5 <= 1 - recall: a loss of 0 up to recall 0.8, 1/2 up to 0.7, 3/2 up to 0.5, 5/2 up to 0.3, 7/2 up to 0.1
    expected = {0.8: 0.2, 0.71: 0.2, 0.7: 0.4, 0.51: 0.4, 0.5: 0.6, 0.31: 0.6, 0.3: 0.8, 0.11: 0.8, 0.1: 0.9, 0.01: 0.9}
    for recall, threshold in expected.items():
        assert thresholds[round(100 * recall) - 1] == pytest.approx(threshold, abs=1.1e-6)
    assert thresholds[80] is None
    assert thresholds[98] is None
    present = [t for t in thresholds if t is not None]
    assert present == sorted(present, reverse=True)
    assert recall_scores(logit(probabilities), labels, 0.5) == {"recall": pytest.approx(2.5 / 4), "nodes": 5 / 4}
    assert recall_scores(logit(probabilities), np.zeros_like(labels), 0.5) == {}
    assert fit_recall_thresholds(logit(probabilities), np.zeros_like(labels)) == ([None] * 99, 0)


def test_recall_thresholds_are_those_of_mapie_on_its_grid():
    z, labels = case(TREE, 300)
    has_label = labels.any(axis=1)  # MAPIE takes no others
    u, labels, recalls = marginal_logits(TREE, z[has_label]), labels[has_label], [0.5, 0.7, 0.8, 0.9, 0.95]
    settings = {"risk": "recall", "method": "crc", "target_level": recalls, "predict_params": np.arange(0, 1, 0.001)}
    mapie = MultiLabelClassificationController(lambda p: p, **settings).calibrate(expit(u), labels)
    thresholds, _ = fit_recall_thresholds(u, labels)
    ours = [thresholds[round(100 * recall) - 1] for recall in recalls]
    np.testing.assert_allclose(mapie.best_predict_param, np.floor(np.multiply(ours, 1000)) / 1000)


@pytest.mark.parametrize(("recall", "num_texts"), [(90, 60), (70, 30), (95, 200)])
def test_the_mean_recall_over_splits_is_the_requested_recall_and_hardly_more(recall, num_texts):
    z, _ = case(TREE, 1500)
    noise = np.random.default_rng(3).normal(0, 1.5, z.shape)
    labels, u = drawn(TREE, z), marginal_logits(TREE, 2 * z + noise)  # a miscalibrated model
    has_label = labels.any(axis=1)
    labels, u = labels[has_label], u[has_label]
    recalls = []
    for seed in range(200):
        order = np.random.default_rng(seed).permutation(len(u))
        fitted, scored = order[:num_texts], order[num_texts:]
        thresholds, _ = fit_recall_thresholds(u[fitted], labels[fitted])
        recalls.append(recall_scores(u[scored], labels[scored], thresholds[recall - 1])["recall"])
    mean, error = statistics.mean(recalls), statistics.stdev(recalls) / math.sqrt(200)
    assert recall / 100 - 2 * error <= mean <= recall / 100 + 2 / (num_texts + 1) + 0.01


# Metrics


def measured(tree: Taxonomy, u: np.ndarray, labels: np.ndarray, thresholds: np.ndarray | None = None) -> dict:
    return build_multi_label_metrics(tree, thresholds)(EvalPrediction(predictions=u, label_ids=labels))


@TREES
def test_metrics_against_scikit_learn(tree):
    z, labels = case(tree, 300)
    u = marginal_logits(tree, z)
    thresholds = np.random.default_rng(1).uniform(0.1, 0.6, tree.num_nodes)
    metrics = measured(tree, u.astype(np.float32), labels.astype(np.float32), thresholds)
    probabilities = expit(u.astype(np.float32).astype(np.float64))
    chosen = predict_nodes(tree, probabilities, thresholds)
    leaves, levels = slice(tree.num_leaves), np.array(tree.levels)

    def score(nodes, average: str) -> float:
        return sklearn.metrics.f1_score(labels[:, nodes], chosen[:, nodes], average=average, zero_division=0)

    expected = {
        "micro_f1": score(slice(None), "micro"),
        "macro_f1": score(slice(None), "macro"),
        "leaf_micro_f1": score(leaves, "micro"),
        "leaf_macro_f1": score(leaves, "macro"),
        "example_f1": sklearn.metrics.f1_score(labels, chosen, average="samples", zero_division=1),
        "mean_average_precision": sklearn.metrics.average_precision_score(labels, probabilities, average="macro"),
        "log_loss": statistics.mean(
            sklearn.metrics.log_loss(labels[:, n], probabilities[:, n], labels=[0, 1]) for n in range(tree.num_nodes)
        ),
        **{f"level_{k}_micro_f1": score(levels == k, "micro") for k in range(1, tree.depth + 1)},
    }
    for name, value in expected.items():
        assert metrics.pop(name) == pytest.approx(value), name
    assert set(metrics) == {"ece", "ece_by_chance"}


def test_metrics_by_hand():
    # truth {B, D, e}, {}, {}, {a}; predicted {B, D, f}, {}, {a}, {}; the last text's B and below are unknown
    labels = np.zeros((4, 8), dtype=int)
    labels[0, [B, D, E]], labels[3, A] = 1, 1
    labels[3, [B, C, D, E, F]] = -100
    probabilities = np.full((4, 8), 0.05)
    probabilities[0, [B, D, F]], probabilities[2, A] = [0.9, 0.8, 0.72], 0.9
    probabilities[3, [B, D, F]] = 0.99  # unknown: counts nowhere
    metrics = measured(TREE, logit(probabilities), labels, np.full(8, 0.5))
    assert metrics["micro_f1"] == pytest.approx(2 * 2 / (4 + 4))
    assert metrics["macro_f1"] == pytest.approx((1 + 1 + 0 + 0 + 0) / 5)  # B, D, e, f and a occur
    assert metrics["leaf_micro_f1"] == 0
    assert metrics["leaf_macro_f1"] == 0
    assert metrics["example_f1"] == pytest.approx((2 / 3 + 1 + 0 + 0) / 4)
    assert metrics["level_1_micro_f1"] == pytest.approx(2 * 1 / (2 + 2))
    assert metrics["level_2_micro_f1"] == 1
    assert metrics["level_3_micro_f1"] == 0
    # e: 3 texts are known, all as probable; a: the labelled text shares its rank with two others below another one
    assert metrics["mean_average_precision"] == pytest.approx((1 + 1 + 1 / 3 + 1 / 4) / 4)
    # some labels are unknown, so probabilities are judged by open decisions: of A to H in text 0, and of roots in the others
    of_outcomes = (
        [0.95, 0.9, 1 - 0.05 / 0.9, 0.8 / 0.9, 0.05 / 0.8, 1 - 0.72 / 0.8, 0.95] + [0.95] * 3 + [0.1, 0.95, 0.95]
    )
    of_outcomes += [0.05, 0.95]
    assert metrics["log_loss"] == pytest.approx(-sum(map(math.log, of_outcomes)) / 15)
    # four decisions have at least 0.1, all in one bin: B, D and F of text 0, of which F is wrong, and A of text 2, wrong too
    assert metrics["ece"] == pytest.approx((3 * 0.9 + 0.8 / 0.9 - 2) / 4)
    variance = 3 * 0.9 * 0.1 + 0.8 * 0.1 / 0.9**2
    assert metrics["ece_by_chance"] == pytest.approx(math.sqrt(2 * variance / math.pi) / 4)


@pytest.mark.parametrize(
    ("below", "unspecified"),
    [(0.0, 0.0), (4.0, 0.0), (0.0, 0.5)],  # 4: a text with a node nearly always has the nodes below it too
)
def test_the_calibration_error_of_correct_probabilities_is_the_one_by_chance(below, unspecified):
    z, _ = case(TREE, 2000)
    z = z + below * (np.array(TREE.levels) > 1)
    u = marginal_logits(TREE, z)
    samples = [measured(TREE, u, less_specific(drawn(TREE, z, seed), unspecified)) for seed in range(40)]
    mean = statistics.mean(sample["ece"] for sample in samples)
    assert mean == pytest.approx(samples[0]["ece_by_chance"], rel=0.1)
    confidence, correct, _ = likely_pairs(TREE, u, drawn(TREE, z, 0))
    gap = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        gap += abs(correct[inside].sum() - confidence[inside].sum())
    assert measured(TREE, u, drawn(TREE, z, 0))["ece"] == pytest.approx(gap / len(confidence))


def less_specific(labels: np.ndarray, share: float) -> np.ndarray:
    """Return labels in which all nodes below B are unknown, for this share of the texts with B."""
    chosen = (labels[:, B] == 1) & (np.random.default_rng(0).random(len(labels)) < share)
    labels[np.ix_(chosen, [C, D, E, F])] = -100
    return labels


def test_probabilities_that_fit_only_the_known_pairs_score_worse_than_correct_ones():
    """Leaving unknown nodes out makes the nodes below B too rare among the known pairs."""
    z, _ = case(TREE, 4000)
    labels = less_specific(drawn(TREE, z, 0), 0.5)
    correct, too_low = (
        measured(TREE, marginal_logits(TREE, z - low), labels) for low in (0.0, np.isin(range(8), [C, D]))
    )
    assert correct["log_loss"] < too_low["log_loss"]
    assert correct["ece"] < too_low["ece"]


def test_the_variance_of_many_pairs_of_one_text():
    tree = Taxonomy([{f"root {i}": [f"leaf {i}"]} for i in range(300)])
    probabilities = np.random.default_rng(0).uniform(0.4, 0.66, size=300)
    u = logit(np.concatenate([probabilities, probabilities])[None])  # leaves, then roots; an only child is certain
    bins = bin_index(probabilities)
    found = pair_variance(tree, u, np.ones(u.shape, dtype=bool))
    np.testing.assert_allclose(found, np.tile(2 * probabilities * (1 - probabilities), 2))
    assert len({*bins}) > 1


def test_without_thresholds_the_common_one_is_taken():
    z, labels = case(TREE, 100)
    u = marginal_logits(TREE, z)
    expected = measured(TREE, u, labels, np.full(TREE.num_nodes, common_threshold(u, labels)))
    assert measured(TREE, u, labels) == expected
    together = build_multi_label_metrics(TREE)(EvalPrediction(predictions=(u, np.zeros(3)), label_ids=labels))
    assert together == expected


def test_unknown_pairs_are_left_out_of_every_score():
    z, labels = case(TREE, 200, unknown=0.1)
    u, unknown = marginal_logits(TREE, z), labels == -100
    metrics = measured(TREE, u, labels, np.full(8, 0.4))
    known_rows = ~unknown.all(axis=1)
    assert measured(TREE, u[known_rows], labels[known_rows], np.full(8, 0.4)) == pytest.approx(metrics)
    lower = np.where(unknown, -30.0, u)
    for name, value in measured(TREE, lower, labels, np.full(8, 0.4)).items():
        assert value == pytest.approx(metrics[name]), name


def test_scores_without_a_label_are_defined():
    labels = np.zeros((5, 8), dtype=int)
    metrics = measured(TREE, np.full((5, 8), -9.0), labels)
    assert metrics["micro_f1"] == metrics["macro_f1"] == metrics["leaf_macro_f1"] == 0
    assert metrics["example_f1"] == 1
    assert not {"mean_average_precision", "ece", "level_1_micro_f1"} & set(metrics)
    diverged = np.zeros((5, 8))
    diverged[3, 2] = np.nan
    with pytest.raises(InputError, match="not finite for 1 of 5 documents: training diverged"):
        measured(TREE, diverged, labels)


def test_the_report_of_nodes_against_scikit_learn():
    z, labels = case(TREE, 200)
    labels[:, [G, H]] = 0
    u, thresholds = marginal_logits(TREE, z), np.full(8, 0.4)
    u[:, [G, H]] = -9
    chosen = predict_nodes(TREE, expit(u), thresholds)
    rows, intervals = per_class_report(TREE.labels, labels, chosen)
    expected = sklearn.metrics.precision_recall_fscore_support(labels, chosen, zero_division=0)
    assert [row["label"] for row in rows] == TREE.labels
    for name, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert [row[name] for row in rows] == pytest.approx(values)
    for row in rows:
        if row["label"] in ("G", "h"):
            assert row["f1_interval"] is None
        else:
            assert row["f1_interval"][0] <= row["f1"] <= row["f1_interval"][1]
    metrics = measured(TREE, u, labels, thresholds)
    for name in ("micro_f1", "macro_f1"):
        assert intervals[name][0] < metrics[name] < intervals[name][1]
    assert per_class_report(TREE.labels, np.full_like(labels, -100), chosen) == ([], {})


# Lexical head

VOCABULARY = 40


def rows(count: int, seed: int = 0) -> tuple[list[list[int]], np.ndarray]:
    """Draw texts of 10 to 40 tokens with several labels; token n is more frequent in texts of node n."""
    generator = np.random.default_rng(seed)
    _, labels = case(TREE, count, seed)
    odds = np.ones((count, VOCABULARY))
    odds[:, :8] += 6 * (labels == 1)
    sizes = generator.integers(10, 41, count)
    return [
        generator.choice(VOCABULARY, size=n, p=row / row.sum()).tolist() for n, row in zip(sizes, odds, strict=True)
    ], labels


def counted(ids: list[list[int]]) -> csr_matrix:
    return csr_matrix([np.bincount(row, minlength=VOCABULARY) for row in ids]).astype(np.float64)


def test_each_node_has_scikit_learns_logistic_regression_over_its_open_rows():
    (ids, labels), (unseen, _) = rows(300), rows(30, seed=1)
    classifier = lexical.LexicalClassifier(TREE, counted(ids), labels)
    spread = lexical.log_odds_variance(counted(ids) > 0, labels)

    def features(ids: list[list[int]]) -> np.ndarray:
        weighed = TfidfTransformer(sublinear_tf=True, norm=None).fit(counted(rows(300)[0])).transform(counted(ids))
        weighed = weighed.toarray() * spread
        return weighed / np.linalg.norm(weighed, axis=1, keepdims=True)

    scores = classifier.scores(counted(unseen))
    assert scores.shape == (30, TREE.num_nodes)
    for node in range(TREE.num_nodes):
        is_open = TREE.parents[node] < 0 or labels[:, TREE.parents[node]] == 1
        chosen = np.broadcast_to(is_open, 300)
        truth = labels[chosen, node]
        model = LogisticRegression(C=50, max_iter=1000).fit(features(ids)[chosen], truth)
        prior = math.log((truth.sum() + 0.5) / ((1 - truth).sum() + 0.5))
        np.testing.assert_allclose(scores[:, node], model.decision_function(features(unseen)) - prior, atol=0.05)
    ours = LexicalHead(VOCABULARY, TREE.num_nodes)
    ours.load_state_dict(classifier.weights())
    for row, tokens in enumerate(unseen):
        np.testing.assert_allclose(ours(torch.tensor([tokens]), None)[0].numpy(), scores[row], atol=1e-4)


def test_a_node_that_is_never_or_always_true_has_no_lexical_weights():
    ids, labels = rows(200)
    labels[:, [G, H]] = 0
    labels[labels[:, B] == 1, C] = 1
    classifier = lexical.LexicalClassifier(TREE, counted(ids), labels)
    weight = classifier.weights()["weight"]
    for node in (G, H, C):
        assert not weight[node].any()
        assert classifier.bias[node] == 0
    assert weight[[A, B, D, E, F]].any(axis=1).all()


def test_classes_without_both_labels_and_rows_without_labels_do_not_count_in_the_spread():
    present = csr_matrix(np.random.default_rng(0).random((50, 12)) < 0.3)
    classes = np.random.default_rng(1).integers(0, 3, 50)
    expected = lexical.log_odds_variance(present, one_hot(classes, 3))
    labels = np.eye(4, dtype=int)[classes]  # the last node has one label only
    np.testing.assert_allclose(lexical.log_odds_variance(present, labels), expected)
    more = np.vstack([labels, np.full((7, 4), -100)])
    others = csr_matrix(np.vstack([present.toarray(), np.ones((7, 12), dtype=bool)]))
    np.testing.assert_allclose(lexical.log_odds_variance(others, more), expected)


def test_a_lexical_classifier_is_fitted_if_any_node_has_both_labels(caplog):
    caplog.set_level("INFO")
    ids, labels = rows(60)
    train = datasets.Dataset.from_dict({"input_ids": ids, "labels": labels.tolist()})
    fitted = lexical.fit_classifier(TREE, train, VOCABULARY)
    np.testing.assert_array_equal(fitted.weight, lexical.LexicalClassifier(TREE, counted(ids), labels).weight)
    same = datasets.Dataset.from_dict({"input_ids": ids, "labels": np.zeros_like(labels).tolist()})
    assert lexical.fit_classifier(TREE, same, VOCABULARY) is None
    assert "the training rows do not tell any two classes apart" in caplog.text
