"""Thresholds, guarantee and metrics for any number of nodes a text, against scikit-learn, exhaustive search and simulation."""

import functools
import math
import statistics
from fractions import Fraction

import numpy as np
import pytest
import sklearn.metrics
from mapie.risk_control import MultiLabelClassificationController
from scipy.special import expit, logit
from sklearn.model_selection import RepeatedKFold
from transformers import EvalPrediction

from decisions_hierarchical import ManyNodes
from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.evaluation.many_nodes import (
    REPEATS,
    STRENGTHS,
    ManyNodesForm,
    best_threshold,
    choose_strength,
    common_threshold,
    fit_node_thresholds,
    pair_variance,
    predict_nodes,
    probable_pairs,
    shrunk_thresholds,
)
from hierarchical_clinicalbert.evaluation.metrics import FOLDS, bin_index, per_class_report
from taxonomy_hierarchical import Taxonomy

# a at level 1; B > c at level 2; B > D > e, f at level 3; G > h, an only child
TREE = Taxonomy(["a", {"B": ["c", {"D": ["e", "f"]}]}, {"G": ["h"]}])
A, C, E, F, H, B, D, G = range(8)
FLAT = Taxonomy(["a", "b", "c"])
TREES = pytest.mark.parametrize("tree", [TREE, FLAT], ids=["unequal depth", "flat"])


def drawn(tree: Taxonomy, z: np.ndarray, seed: int = 1) -> np.ndarray:
    """Draw labels from the conditional scores z."""
    has = np.random.default_rng(seed).random(z.shape) < expit(z)
    return np.column_stack([has[:, tree.path(node)].all(axis=1) for node in range(tree.num_nodes)]).astype(np.int8)


def case(tree: Taxonomy, rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw conditional scores and labels."""
    z = np.random.default_rng(seed).normal(-0.5, 1.5, (rows, tree.num_nodes))
    return z, drawn(tree, z, seed + 1)


def marginal_logits(tree: Taxonomy, z: np.ndarray) -> np.ndarray:
    """Return the logits of the products of the conditional probabilities on each node's path."""
    return logit(np.column_stack([expit(z[:, tree.path(node)]).prod(axis=1) for node in range(tree.num_nodes)]))


def closed(tree: Taxonomy, probabilities: np.ndarray, thresholds: np.ndarray | float) -> np.ndarray:
    """Choose the nodes that reach their thresholds, and their ancestors."""
    reached, nodes = probabilities >= thresholds, range(tree.num_nodes)
    return np.column_stack([reached[:, [n for n in nodes if node in tree.path(n)]].any(axis=1) for node in nodes])


def f1(chosen: np.ndarray, true: np.ndarray) -> float:
    return float(sklearn.metrics.f1_score(true.ravel(), chosen.ravel(), zero_division=0))


# Thresholds


def test_the_ancestors_of_a_predicted_node_are_predicted():
    u = logit(np.array([[0.1, 0.2, 0.6, 0.1, 0.2, 0.7, 0.65, 0.31], [0.9, 0.1, 0.1, 0.1, 0.1, 0.2, 0.1, 0.1]]))
    chosen = predict_nodes(ManyNodes(TREE), u, np.array([0.95, 0.9, 0.5, 0.9, 0.9, 0.9, 0.9, 0.3]))
    np.testing.assert_array_equal(np.flatnonzero(chosen[0]), [E, B, D, G])
    assert not chosen[1].any()
    np.testing.assert_array_equal(np.flatnonzero(predict_nodes(ManyNodes(TREE), u, 0.55)[0]), [E, B, D])


def random_forest(generator) -> Taxonomy:
    """Return a forest with leaves at all levels and only children."""
    paths = [(f"root {i}",) for i in range(3)]
    for i in range(60):
        paths.append((*paths[generator.integers(len(paths))][:5], f"node {i}"))
    tree: dict = {}
    for path in paths:
        functools.reduce(lambda siblings, name: siblings.setdefault(name, {}), path, tree)
    return Taxonomy(tree)


@pytest.mark.parametrize("seed", range(5))
def test_whole_levels_give_the_predictions_and_thresholds_of_single_nodes(seed):
    generator = np.random.default_rng(seed)
    tree = random_forest(generator)
    deepest = [generator.integers(tree.num_nodes, size=generator.integers(4)) for _ in range(40)]
    labels = np.zeros((40, tree.num_nodes), dtype=np.int8)
    for row, nodes in zip(labels, deepest, strict=True):
        row[list(tree.with_ancestors(nodes.tolist()))] = 1
    u = generator.normal(size=labels.shape) + labels
    np.testing.assert_array_equal(predict_nodes(ManyNodes(tree), u, 0.7), closed(tree, expit(u), 0.7))
    for strength, fitted in shrunk_thresholds(tree, u, labels, STRENGTHS).items():
        common, expected = best_threshold(u.ravel(), labels.ravel() == 1), np.empty(tree.num_nodes)
        chosen = np.zeros(u.shape, dtype=bool)
        for node in reversed(tree.reading_order):
            forced = chosen[:, tree.children(node)].any(axis=1)
            positives, counts = labels[:, node].sum(), [forced.sum(), labels[forced, node].sum()]
            own = best_threshold(u[~forced, node], labels[~forced, node] == 1, *counts)
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
    np.testing.assert_array_equal(fit_node_thresholds(ManyNodes(TREE), z, np.zeros_like(labels)), [0.5] * 8)
    assert common_threshold(z, np.zeros_like(labels)) == 0.5
    assert fit_node_thresholds(ManyNodes(TREE), z[:1], np.ones_like(labels[:1])).shape == (8,)


@TREES
def test_the_common_threshold_has_the_best_micro_f1(tree):
    z, labels = case(tree, 80)
    u = marginal_logits(tree, z)
    probabilities = expit(u)

    def score(threshold: float) -> float:
        return f1(closed(tree, probabilities, threshold), labels)

    best = max(map(score, np.unique(probabilities)))
    assert score(common_threshold(u, labels)) == pytest.approx(best)
    shared = shrunk_thresholds(tree, u, labels, (math.inf,))[math.inf]
    np.testing.assert_allclose(shared, common_threshold(u, labels))


def test_each_nodes_own_threshold_has_its_best_f1_after_closure():
    z, labels = case(TREE, 60)
    u = marginal_logits(TREE, z) + np.random.default_rng(9).normal(size=z.shape)  # children above their parents, too
    thresholds = shrunk_thresholds(TREE, u, labels, (0,))[0]
    for node in range(TREE.num_nodes):

        def score(threshold: float, node=node) -> float:
            changed = np.where(np.arange(TREE.num_nodes) == node, threshold, thresholds)
            return f1(closed(TREE, expit(u), changed)[:, node], labels[:, node])

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
            chosen.append(closed(TREE, expit(u[scored]), thresholds))
            true.append(labels[scored])
        pair = np.concatenate(true), np.concatenate(chosen)
        totals[strength] = sum(sklearn.metrics.f1_score(*pair, average=average) for average in ("micro", "macro"))
    assert len({round(total, 3) for total in totals.values()}) > 4
    best = max(STRENGTHS, key=totals.__getitem__)
    assert choose_strength(ManyNodes(TREE), u, labels) == best
    np.testing.assert_allclose(
        fit_node_thresholds(ManyNodes(TREE), u, labels), shrunk_thresholds(TREE, u, labels, (best,))[best]
    )


# Guarantee


def fit_recall_thresholds(u: np.ndarray, labels: np.ndarray) -> tuple[list[float | None], int]:
    sets = ManyNodesForm(Taxonomy([f"node {i}" for i in range(u.shape[1])])).fit_sets(u, labels, np.arange(len(u)))
    return sets["set_thresholds"], sets["num_texts"]


def recall_scores(u: np.ndarray, labels: np.ndarray, threshold: float) -> dict[str, float]:
    flat = ManyNodesForm(Taxonomy([f"node {i}" for i in range(u.shape[1])]))
    return flat.set_scores(u, labels, np.arange(len(u)), threshold)


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
    z, labels = case(TREE, 4 * rows, seed=rows)
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
    labels = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]])
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
    return ManyNodesForm(tree).measure(u, labels, thresholds=thresholds)


@TREES
def test_metrics_against_scikit_learn(tree):
    z, labels = case(tree, 300)
    u = marginal_logits(tree, z)
    thresholds = np.random.default_rng(1).uniform(0.1, 0.6, tree.num_nodes)
    metrics = measured(tree, u.astype(np.float32), labels.astype(np.float32), thresholds)
    probabilities = expit(u.astype(np.float32).astype(np.float64))
    chosen = closed(tree, probabilities, thresholds)
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
    # truth {B, D, e}, {}, {}, {a}; predicted {B, D, f}, {}, {a}, {}
    labels = np.zeros((4, 8), dtype=int)
    labels[0, [B, D, E]], labels[3, A] = 1, 1
    probabilities = np.full((4, 8), 0.05)
    probabilities[0, [B, D, F]], probabilities[2, A] = [0.9, 0.8, 0.72], 0.9
    metrics = measured(TREE, logit(probabilities), labels, np.full(8, 0.5))
    assert metrics["micro_f1"] == pytest.approx(2 * 2 / (4 + 4))
    assert metrics["macro_f1"] == pytest.approx((1 + 1 + 0 + 0 + 0) / 5)  # B, D, e, f and a occur
    assert metrics["leaf_micro_f1"] == 0
    assert metrics["leaf_macro_f1"] == 0
    assert metrics["example_f1"] == pytest.approx((2 / 3 + 1 + 0 + 0) / 4)
    assert metrics["level_1_micro_f1"] == pytest.approx(2 * 1 / (2 + 2))
    assert metrics["level_2_micro_f1"] == 1
    assert metrics["level_3_micro_f1"] == 0
    # e: all texts are as probable; a: the labelled text shares its rank with two others below another one
    assert metrics["mean_average_precision"] == pytest.approx((1 + 1 + 1 / 4 + 1 / 4) / 4)
    of_outcomes = [0.9, 0.8, 1 - 0.72, 0.05, 0.1, 0.05] + [0.95] * 26
    assert metrics["log_loss"] == pytest.approx(-sum(map(math.log, of_outcomes)) / 32)
    # four pairs have at least 0.1: of text 0, D is in bin 11, f in 10 and B in 13; a of text 2 is in 13, and wrong
    assert metrics["ece"] == pytest.approx((abs(1 - 0.8) + 0.72 + abs(1 - 1.8)) / 4)
    variances = [0.8 * 0.2, 0.72 * 0.28, 2 * 0.9 * 0.1]
    assert metrics["ece_by_chance"] == pytest.approx(sum(math.sqrt(2 * v / math.pi) for v in variances) / 4)


@pytest.mark.parametrize("below", [0.0, 4.0])  # 4: a text with a node nearly always has the nodes below it too
def test_the_calibration_error_of_correct_probabilities_is_the_one_by_chance(below):
    z, _ = case(TREE, 2000)
    z = z + below * (np.array(TREE.levels) > 1)
    u = marginal_logits(TREE, z)
    samples = [measured(TREE, u, drawn(TREE, z, seed)) for seed in range(40)]
    mean = statistics.mean(sample["ece"] for sample in samples)
    assert mean == pytest.approx(samples[0]["ece_by_chance"], rel=0.1)
    confidence, correct, _ = probable_pairs(TREE, u, drawn(TREE, z, 0))
    gap = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        gap += abs(correct[inside].sum() - confidence[inside].sum())
    assert samples[0]["ece"] == pytest.approx(gap / len(confidence))


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
    together = ManyNodesForm(TREE).compute_metrics(EvalPrediction(predictions=(u, np.zeros(3)), label_ids=labels))
    assert together == expected


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
    chosen = closed(TREE, expit(u), thresholds)
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
    assert per_class_report(TREE.labels, labels[:0], chosen[:0]) == ([], {})
