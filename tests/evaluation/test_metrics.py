"""Compare scores with scikit-learn, with plain Python, and with cases worked by hand."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import sklearn.metrics
from drawn import FORMS, ONE_PATH, TREE, A, B, C, D, E, F, G, H, draw_labels, logits_of
from scipy.special import expit

from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.evaluation.forms import Form
from hierarchical_clinicalbert.evaluation.metrics import Predictions, bootstrap_intervals, one_hot
from hierarchical_clinicalbert.evaluation.report import class_scores

MODULE = Path(__file__).resolve().parents[2] / "metrics" / "hierarchical_f1"


def logits_for(predictions: list[int]) -> np.ndarray:
    """Return logits whose maximum is at the prediction."""
    return (
        np.random.default_rng(0).uniform(0, 1, (len(predictions), 5)) + 2 * np.eye(5)[predictions]
    )


def ancestors(parents: list[int], node: int) -> set[int]:
    return set() if node < 0 else {node} | ancestors(parents, parents[node])


# The metric of `evaluate`


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(str(MODULE), keep_in_memory=True)


def test_hierarchical_f1_against_sets_on_a_random_forest(metric):
    rng = np.random.default_rng(1)
    parents = [-1, *(int(rng.integers(-1, node)) for node in range(1, 200))]
    # parents need not come first
    parents = [199 - parent if parent >= 0 else -1 for parent in reversed(parents)]
    predictions, references = rng.integers(0, 200, (2, 500)).tolist()
    predicted, true = (
        [ancestors(parents, node) for node in ids] for ids in (predictions, references)
    )
    shared = sum(len(p & t) for p, t in zip(predicted, true, strict=True))
    scores = metric.compute(predictions=predictions, references=references, parents=parents)
    assert scores["hierarchical_precision"] == pytest.approx(shared / sum(map(len, predicted)))
    assert scores["hierarchical_recall"] == pytest.approx(shared / sum(map(len, true)))
    scores = metric.compute(predictions=[A], references=[E], parents=TREE.parents)
    assert scores["hierarchical_f1"] == 0


@pytest.mark.parametrize(
    ("predictions", "references", "parents", "message"),
    [
        ([0, 5], [0, 0], [-1, -1], r"predictions\[1\] is 5"),
        ([0], [-100], [-1, -1], r"references\[0\] is -100"),
        ([0], [0], [-1, 2, 3, 1], "node 1 never reaches a root"),
        ([0], [0], [-1, 2], r"parents\[1\] is 2"),
        ([0], [0], [], r"predictions\[0\] is 0"),
        ([], [], [-1], "no predictions"),
    ],
)
def test_hierarchical_f1_names_invalid_input(metric, predictions, references, parents, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references, parents=parents)


# Scores of one path


def test_scores_by_hand():
    # label:      a  e  D  c  f  e
    # prediction: a  f  e  h  f  c
    labels = np.array([A, E, D, C, F, E])
    scores = ONE_PATH.measure(logits_for([A, F, E, H, F, C]), labels)
    # leaf labels: a-a, e-f, c-h, f-f, e-c, so 2 of 5. F1: a 1, c 0, e 0, f 2/3 (1 of 2 found, 1 of
    # 1 right), h 0
    assert scores["accuracy"] == pytest.approx(2 / 5)
    assert scores["macro_f1"] == pytest.approx((1 + 2 / 3) / 5)
    # weights: a 1, c 1, e 2, f 1, h 0
    assert scores["weighted_f1"] == pytest.approx((1 * 1 + 1 * 2 / 3) / 5)
    # shared 1 2 2 0 3 1 = 9, predicted paths 1 3 2 2 3 2 = 13, the third truncated where D is; true
    # paths 1 3 2 2 3 3 = 14
    assert scores["hierarchical_precision"] == pytest.approx(9 / 13)
    assert scores["hierarchical_recall"] == pytest.approx(9 / 14)
    assert scores["hierarchical_f1"] == pytest.approx(18 / 27)
    # level 1, true a B B B B B, predicted a B B G B B. F1: a 1, B 8/9 (4 of 4, 4 of 5), G 0
    assert scores["level_1_accuracy"] == pytest.approx(5 / 6)
    assert scores["level_1_macro_f1"] == pytest.approx((1 + 8 / 9 + 0) / 3)
    # level 2, true - D D c D D, predicted - D D h D c. F1: D 6/7 (3 of 3, 3 of 4), c 0, h 0
    assert scores["level_2_accuracy"] == pytest.approx(3 / 5)
    assert scores["level_2_macro_f1"] == pytest.approx((6 / 7 + 0 + 0) / 3)
    # level 3, true - e - - f e, predicted - f e - f -. F1: e 0, f 2/3. The shorter path of the last
    # one is wrong
    assert scores["level_3_accuracy"] == pytest.approx(1 / 3)
    assert scores["level_3_macro_f1"] == pytest.approx((0 + 2 / 3) / 2)
    # a leaf above the level, true - c, predicted D c: the row counts as a false positive of D
    scores = ONE_PATH.measure(logits_for([E, C]), np.array([A, C]))
    assert (scores["level_2_accuracy"], scores["level_2_macro_f1"]) == (1, (0 + 1) / 2)


def test_the_log_loss_adds_up_the_leaves_of_an_inner_node_and_does_not_underflow():
    probabilities = np.array([[0.1, 0.2, 0.3, 0.15, 0.25]] * 4)  # a c e f h
    # P(B) = c + e + f = 0.65, P(D) = e + f = 0.45, P(G) = h = 0.25, P(e) = 0.3
    scores = ONE_PATH.measure(np.log(probabilities), np.array([B, D, G, E]))
    assert scores["log_loss"] == pytest.approx(-sum(map(math.log, [0.65, 0.45, 0.25, 0.3])) / 4)
    logits = np.array([[0, -800, 0, 0, 0]], dtype=np.float32)  # exp(-800) is 0 even in float64
    scores = ONE_PATH.measure(logits, np.array([C]))
    assert scores["log_loss"] == pytest.approx(800 + math.log(4))


def test_any_label_of_a_repeated_text_counts():
    logits = logits_for([A, C, A, A, E])
    texts = np.array([7, 1, 1, 2, 2])
    for labels, expected, leaves in (
        ([A, A, C, E, E], 4 / 5, None),  # text 1 has the labels a and c, text 2 twice e
        ([A, A, A, E, E], 3 / 5, None),  # no row labels text 1 with c
        ([A, A, B, E, E], 2 / 4, 4 / 5),  # an inner node is no leaf
        ([B] * 5, None, 0),
    ):
        scores = ONE_PATH.measure(logits, np.array(labels), texts=texts)
        assert (scores.get("any_label_accuracy"), scores.get("leaf_labels")) == (expected, leaves)


def test_scores_without_documents_are_left_out():
    scores = ONE_PATH.measure(logits_for([E]), np.array([B]))
    # nodes below the label do not count
    ones = ["hierarchical_precision", "hierarchical_recall", "hierarchical_f1"]
    ones += ["level_1_accuracy", "level_1_macro_f1"]
    assert scores.keys() == {*ones, "leaf_labels", "ece", "log_loss"}
    assert [scores[name] for name in ones] == [1] * 5
    assert scores["leaf_labels"] == 0


@FORMS
def test_scores_of_a_training_that_diverged_are_refused(form):
    logits = np.zeros((3, form.decisions.num_classes))
    logits[[1, 2], [1, 4]] = np.nan, np.inf
    with pytest.raises(InputError, match="not finite for 2 of 3 documents: training diverged"):
        form.measure(logits, form.decisions.targets([[A], [C], [E]]).numpy())


# Calibration error


def test_the_calibration_error_by_hand():
    probabilities = np.array(
        [[0.2, 0.2, 0.2, 0.2, 0.2], [0.84, 0.04, 0.04, 0.04, 0.04], [0.86, 0.05, 0.03, 0.03, 0.03]]
    )
    # the second alone is correct; it is in one bin with the third, from 12/15 to 13/15
    scores = ONE_PATH.measure(np.log(probabilities), np.array([C, A, C]))
    assert scores["ece"] == pytest.approx((0.2 + abs(1 - 1.7)) / 3)
    # where the label is an inner node, a prediction below it is correct with its probability given
    # the label
    scores = ONE_PATH.measure(np.log([[0.1, 0.2, 0.4, 0.2, 0.1]]), np.array([B]))
    assert scores["ece"] == pytest.approx(0.4 / 0.8 - 0.4)


# Scores of the classes, and intervals


def report_of(form: Form, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    thresholds = np.full(TREE.num_nodes, 0.4)
    predictions = Predictions(form, logits, labels, thresholds)
    return class_scores("test", predictions, np.arange(len(labels)))


@FORMS
def test_the_report_of_classes_against_scikit_learn(form):
    scores = np.random.default_rng(0).normal(-0.5, 1.5, (200, TREE.num_nodes))
    scores[:, G] = -30  # neither G nor h occurs
    logits = logits_of(form, scores)
    labels = draw_labels(form, scores)
    true = labels
    chosen = expit(logits) >= 0.4
    if form is ONE_PATH:
        true = one_hot(labels, 5)
        chosen = one_hot(logits.argmax(axis=1), 5)
        # a row that is not of a leaf
        labels = np.append(labels, B)
        logits = np.append(logits, logits[:1], axis=0)
        assert report_of(form, logits, np.full(len(labels), B)) == {}
    report = report_of(form, logits, labels)
    table = pd.DataFrame(report["per_class"])
    occurring = [node for node in range(form.decisions.num_classes) if node not in (G, H)]
    assert table.pop("label").tolist() == [TREE.labels[node] for node in occurring]
    ends = bootstrap_intervals(true, chosen)
    intervals = ends["f1"].T[occurring].tolist()
    assert table.pop("f1_interval").tolist() == intervals
    assert report["intervals"] == {
        f"test_{form.micro_f1}": ends["micro_f1"].tolist(),
        "test_macro_f1": ends["macro_f1"].tolist(),
    }
    expected = sklearn.metrics.precision_recall_fscore_support(true, chosen, zero_division=0)
    table = table[["precision", "recall", "f1", "support"]]
    np.testing.assert_allclose(table.T, np.array(expected)[:, occurring])


def intervals_of(
    labels: np.ndarray, predictions: np.ndarray, num_classes: int
) -> dict[str, np.ndarray]:
    return bootstrap_intervals(one_hot(labels, num_classes), one_hot(predictions, num_classes))


def test_the_rows_of_a_text_are_drawn_together():
    labels, chosen = np.random.default_rng(0).integers(4, size=(2, 60))
    twice = (np.repeat(labels, 2), np.repeat(chosen, 2))
    expected = intervals_of(labels, chosen, 4)
    outcomes = [one_hot(ids, 4) for ids in twice]
    found = bootstrap_intervals(*outcomes, np.repeat(np.arange(60), 2))
    for name, ends in expected.items():
        np.testing.assert_allclose(found[name], ends)
    assert np.ptp(intervals_of(*twice, 4)["micro_f1"]) < 0.8 * np.ptp(expected["micro_f1"])


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_bootstrap_intervals_against_scipy(average):
    generator = np.random.default_rng(0)
    labels = generator.integers(3, size=400)
    predictions = np.where(generator.random(400) < 0.7, labels, generator.integers(3, size=400))
    intervals = intervals_of(labels, predictions, 4)
    expected = scipy.stats.bootstrap(
        (labels, predictions),
        partial(sklearn.metrics.f1_score, average=average),
        paired=True,
        vectorized=False,
        n_resamples=300,
        method="percentile",
        rng=1,
    ).confidence_interval
    np.testing.assert_allclose(intervals[f"{average}_f1"], expected, atol=0.015)
    assert np.isnan(intervals["f1"][:, 3]).all()  # a leaf that does not occur
    # the rare leaf is correct in every resample that contains it
    intervals = intervals_of(np.append(labels, 3), np.append(predictions, 3), 4)
    assert intervals["f1"][:, 3].tolist() == [1, 1]


def test_the_interval_of_macro_f1_holds_the_score_where_classes_are_many_and_rare():
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(200), 3)
    predictions = np.where(generator.random(600) < 0.6, labels, generator.integers(200, size=600))
    low, high = intervals_of(labels, predictions, 200)["macro_f1"]
    score = sklearn.metrics.f1_score(labels, predictions, average="macro", zero_division=0)
    assert low < score < high
