"""Compare scores with scikit-learn, with plain Python, and with cases worked by hand."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from conftest import complete
from forked import LIBRARIES
from scipy.sparse import csr_matrix
from transformers import EvalPrediction

from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.evaluation.metrics import (
    bootstrap_intervals,
    calibration_bins,
    expected_calibration_error,
    one_hot,
)
from hierarchical_clinicalbert.evaluation.one_path import OnePathForm
from hierarchical_clinicalbert.evaluation.report import ScoredSplit, class_scores
from taxonomy_hierarchical import Taxonomy

MODULE = Path(__file__).resolve().parents[2] / "metrics" / "hierarchical_f1"

# a at level 1; B > c at level 2; B > D > e, f at level 3; G > h at level 2
TREE = Taxonomy(["a", {"B": ["c", {"D": ["e", "f"]}]}, {"G": ["h"]}])
A, C, E, F, H, B, D, G = range(8)


def logits_for(predictions: list[int]) -> np.ndarray:
    """Return logits whose maximum is at the prediction."""
    return np.random.default_rng(0).uniform(0, 1, (len(predictions), TREE.num_leaves)) + 2 * np.eye(5)[predictions]


def random_case(taxonomy: Taxonomy, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, taxonomy.num_nodes, num_rows)
    labels[rng.random(num_rows) < 0.1] = -100
    return 3 * rng.normal(size=(num_rows, taxonomy.num_leaves)).astype(np.float32), labels


def softmax(row: np.ndarray) -> list[float]:
    powers = [math.exp(float(x) - float(max(row))) for x in row]
    return [power / sum(powers) for power in powers]


def ancestors(parents: list[int], node: int) -> set[int]:
    return set() if node < 0 else {node} | ancestors(parents, parents[node])


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(str(MODULE), keep_in_memory=True)


def test_hierarchical_f1_by_hand(metric):
    # predicted {B,D,e} true {B,D,f}: 2 shared of 3 and 3
    # predicted {a}     true {a}:     1 shared of 1 and 1
    # predicted {B,c}   true {B,D,e}: 1 shared of 2 and 3
    # predicted {G,h}   true {B,D}:   0 shared of 2 and 2
    # hP = 4/8, hR = 4/9, hF = 2 (4/8)(4/9) / (4/8 + 4/9) = 8/17
    scores = metric.compute(predictions=[E, A, C, H], references=[F, A, E, D], parents=TREE.parents)
    assert scores == pytest.approx(
        {"hierarchical_precision": 1 / 2, "hierarchical_recall": 4 / 9, "hierarchical_f1": 8 / 17}
    )


def test_hierarchical_f1_against_sets_on_a_random_forest(metric):
    rng = np.random.default_rng(1)
    parents = [int(rng.integers(-1, node)) if node else -1 for node in range(200)]
    # permute the ids, because parents need not come before children
    order = rng.permutation(200)
    shuffled = [0] * 200
    for node, parent in enumerate(parents):
        shuffled[order[node]] = int(order[parent]) if parent >= 0 else -1
    predictions, references = rng.integers(0, 200, (2, 500)).tolist()
    pairs = [(ancestors(shuffled, p), ancestors(shuffled, t)) for p, t in zip(predictions, references, strict=True)]
    shared = sum(len(p & t) for p, t in pairs)
    scores = metric.compute(predictions=predictions, references=references, parents=shuffled)
    assert scores["hierarchical_precision"] == pytest.approx(shared / sum(len(p) for p, _ in pairs))
    assert scores["hierarchical_recall"] == pytest.approx(shared / sum(len(t) for _, t in pairs))


def test_hierarchical_f1_is_zero_when_nothing_is_shared(metric):
    scores = metric.compute(predictions=[A], references=[E], parents=TREE.parents)
    assert scores == {"hierarchical_precision": 0, "hierarchical_recall": 0, "hierarchical_f1": 0}


@pytest.mark.parametrize(
    ("predictions", "references", "parents", "message"),
    [
        ([0, 5], [0, 0], [-1, -1], r"predictions\[1\] is 5"),
        ([0], [-100], [-1, -1], r"references\[0\] is -100"),
        ([0], [0], [-1, 2, 3, 1], "node 1 never reaches a root"),
        ([0], [0], [0], "node 0 never reaches a root"),
        ([0], [0], [-1, 2], r"parents\[1\] is 2"),
        ([0], [0], [-1, -2], r"parents\[1\] is -2"),
        ([0], [0], [-1.0], "integers"),
        ([0], [0], [], "non-empty"),
        ([], [], [-1], "no predictions"),
    ],
)
def test_hierarchical_f1_names_invalid_input(metric, predictions, references, parents, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references, parents=parents)


def test_evaluate_module_loads_offline_elsewhere_twice_at_once_without_a_home(tmp_path):
    script = f"""
import socket
def refuse(*args, **kwargs):
    raise AssertionError("the network was used")
socket.socket.connect = socket.getaddrinfo = refuse
import evaluate
metric = evaluate.load({str(MODULE)!r}, keep_in_memory=True, cache_dir="scratch")
print(metric.compute(predictions=[0, 2], references=[1, 2], parents=[3, 3, -1, -1])["hierarchical_f1"])
"""
    (tmp_path / "file").touch()
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "file" / "home"),  # below a file: not even root can write there
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    where: Any = {"cwd": tmp_path, "environment": environment, "modules": LIBRARIES}
    with ThreadPoolExecutor(2) as pool:
        ended = [*pool.map(lambda _: complete("-c", script, **where), range(2))]
    for done in ended:
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) == pytest.approx(2 / 3)  # {3,0} against {3,1}, {2} against {2}: 2 shared of 3 and 3


def test_scores_by_hand():
    # label:  a  e  D  c  f  e  (none)
    # answer: a  f  e  h  f  c  c
    labels = np.array([A, E, D, C, F, E, -100])
    scores = OnePathForm(TREE).measure(logits_for([A, F, E, H, F, C, C]), labels)
    # leaf labels: a-a, e-f, c-h, f-f, e-c, so 2 of 5. F1: a 1, c 0, e 0, f 2/3 (1 of 2 found, 1 of 1 right), h 0
    assert scores["accuracy"] == pytest.approx(2 / 5)
    assert scores["macro_f1"] == pytest.approx((1 + 2 / 3) / 5)
    assert scores["weighted_f1"] == pytest.approx((1 * 1 + 1 * 2 / 3) / 5)  # weights: a 1, c 1, e 2, f 1, h 0
    # shared 1 2 2 0 3 1 = 9, predicted paths 1 3 2 2 3 2 = 13, the third cut where D is; true paths 1 3 2 2 3 3 = 14
    assert scores["hierarchical_precision"] == pytest.approx(9 / 13)
    assert scores["hierarchical_recall"] == pytest.approx(9 / 14)
    assert scores["hierarchical_f1"] == pytest.approx(18 / 27)
    # level 1, true a B B B B B, predicted a B B G B B. F1: a 1, B 8/9 (4 of 4, 4 of 5), G 0
    assert scores["level_1_accuracy"] == pytest.approx(5 / 6)
    assert scores["level_1_macro_f1"] == pytest.approx((1 + 8 / 9 + 0) / 3)
    # level 2, true - D D c D D, predicted - D D h D c. F1: D 6/7 (3 of 3, 3 of 4), c 0, h 0
    assert scores["level_2_accuracy"] == pytest.approx(3 / 5)
    assert scores["level_2_macro_f1"] == pytest.approx((6 / 7 + 0 + 0) / 3)
    # level 3, true - e - - f e, predicted - f e - f -. F1: e 0, f 2/3. The shorter path of the last one is wrong
    assert scores["level_3_accuracy"] == pytest.approx(1 / 3)
    assert scores["level_3_macro_f1"] == pytest.approx((0 + 2 / 3) / 2)


def test_flat_scores_against_scikit_learn():
    logits, labels = random_case(TREE, 400)
    scores = OnePathForm(TREE).measure(logits, labels)
    leaf = (labels >= 0) & (labels < TREE.num_leaves)
    true, predictions = labels[leaf], logits[leaf].argmax(axis=1)
    assert scores["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(true, predictions))
    assert scores["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(true, predictions, average="macro"))
    assert scores["weighted_f1"] == pytest.approx(sklearn.metrics.f1_score(true, predictions, average="weighted"))
    assert all(type(score) is float for score in scores.values())
    of_module = evaluate.load(str(MODULE), keep_in_memory=True).compute(
        predictions=predictions, references=true, parents=TREE.parents
    )
    only_leaves = OnePathForm(TREE).compute_metrics(EvalPrediction((logits[leaf], labels[leaf]), labels[leaf]))
    assert {name: only_leaves[name] for name in of_module} == pytest.approx(of_module)


def test_log_loss_of_leaves_against_scikit_learn():
    logits, labels = random_case(TREE, 300)
    labels = np.where(labels >= TREE.num_leaves, -100, labels)
    expected = sklearn.metrics.log_loss(
        labels[labels >= 0], [softmax(row) for row in logits[labels >= 0]], labels=range(TREE.num_leaves)
    )
    assert OnePathForm(TREE).measure(logits, labels)["log_loss"] == pytest.approx(expected)


def test_log_loss_of_inner_nodes_adds_up_their_leaves():
    probabilities = np.array([[0.1, 0.2, 0.3, 0.15, 0.25]] * 4)  # a c e f h
    # P(B) = c + e + f = 0.65, P(D) = e + f = 0.45, P(G) = h = 0.25, P(e) = 0.3
    scores = OnePathForm(TREE).measure(np.log(probabilities), np.array([B, D, G, E]))
    assert scores["log_loss"] == pytest.approx(-sum(map(math.log, [0.65, 0.45, 0.25, 0.3])) / 4)


def test_log_loss_does_not_underflow():
    logits = np.array([[0, -800, 0, 0, 0]], dtype=np.float32)  # exp(-800) is 0 even in float64
    scores = OnePathForm(TREE).measure(logits, np.array([C]))
    assert scores["log_loss"] == pytest.approx(800 + math.log(4))


def any_label_accuracy(logits: np.ndarray, labels: np.ndarray, texts: np.ndarray) -> float | None:
    return OnePathForm(TREE).measure(logits, labels, texts).get("any_label_accuracy")


def test_any_label_of_a_repeated_text_counts():
    logits, labels = logits_for([A, C, A, A, E]), np.array([A, A, C, E, E])
    texts = np.array([7, 1, 1, 2, 2])  # text 1 has the labels a and c, text 2 twice e
    assert any_label_accuracy(logits, labels, texts) == 4 / 5
    assert any_label_accuracy(logits, np.array([A, A, A, E, E]), texts) == 3 / 5  # no row labels text 1 with c
    assert any_label_accuracy(logits, np.array([A, A, B, E, E]), texts) == 2 / 4  # an inner node is no leaf
    assert any_label_accuracy(logits, np.full(5, B), texts) is None


def plain_ece(documents: list[tuple[float, bool]]) -> float:
    """Compute the calibration error of (confidence, correctness) pairs in plain Python."""
    error = 0.0
    for m in range(15):
        inside = [(p, correct) for p, correct in documents if m / 15 < p <= (m + 1) / 15]
        if inside:
            confidence = sum(p for p, _ in inside) / len(inside)
            accuracy = sum(correct for _, correct in inside) / len(inside)
            error += len(inside) / len(documents) * abs(accuracy - confidence)
    return error


def truncated_documents(logits: np.ndarray, labels: list[int], level: int) -> list[tuple[float, float]]:
    """Compute confidence and correctness of the labelled documents in the tree truncated below a level."""
    documents = []
    for row, label in zip(logits, labels, strict=True):
        if label >= 0:
            leaves = softmax(row)
            probability = {
                node: sum(leaves[leaf] for leaf in range(TREE.num_leaves) if node in TREE.path(leaf))
                for node in range(TREE.num_nodes)
            }
            predicted, path = TREE.path(leaves.index(max(leaves)))[:level], TREE.path(label)
            if label >= TREE.num_leaves and len(path) < len(predicted):  # the true leaf is unknown
                correct = probability[predicted[-1]] / probability[label] if label in predicted else 0
            else:
                correct = predicted[-1] == path[:level][-1]
            documents.append((probability[predicted[-1]], correct))
    return documents


@pytest.mark.parametrize("inner", [set(), {D}, {B, D, G}])
def test_ece_of_a_level_is_the_ece_of_the_tree_truncated_below_it(inner):
    logits, labels = random_case(TREE, 500)
    labels[(labels >= TREE.num_leaves) & ~np.isin(labels, [*inner])] = -100
    scores = OnePathForm(TREE).measure(logits, labels)
    for level in range(1, TREE.depth + 1):
        expected = plain_ece(truncated_documents(logits, labels.tolist(), level))
        assert scores[f"level_{level}_ece"] == pytest.approx(expected), level
    assert scores["ece"] == pytest.approx(expected)


def test_correct_probabilities_look_calibrated_if_some_labels_are_inner_nodes():
    generator = np.random.default_rng(5)
    logits = generator.normal([1, -1, 0, 0, 2], 2, size=(20_000, TREE.num_leaves))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (probabilities.cumsum(axis=1) < generator.random((20_000, 1))).sum(axis=1)
    labels[np.isin(labels, [C, E, F]) & (generator.random(20_000) < 0.8)] = B
    scores = OnePathForm(TREE).measure(logits, labels)
    for name in ("ece", "level_1_ece", "level_2_ece", "level_3_ece"):
        assert scores[name] < 2 * scores[f"{name}_by_chance"], name


def test_a_row_that_is_labelled_with_the_root_hides_no_calibration_error():
    tree = Taxonomy({"root": ["a", "b", "c"]})
    logits, labels = np.tile([5.0, 0.0, 0.0], (1000, 1)), np.random.default_rng(0).integers(3, size=1000)
    before = OnePathForm(tree).measure(logits, labels)
    labels[0] = tree.id("root")
    after = OnePathForm(tree).measure(logits, labels)
    for name in ("ece", "level_2_ece"):
        assert before[name] > 0.6
        assert after[name] == pytest.approx(before[name], abs=0.001)


def test_the_calibration_error_by_chance_is_that_of_labels_drawn_from_the_probabilities():
    generator = np.random.default_rng(5)
    logits = generator.normal([1, -1, 0, 0, 2], 2, size=(700, TREE.num_leaves))  # leaves at three levels, unalike
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    score = OnePathForm(TREE).measure
    drawn = []
    for _ in range(60):
        labels = (probabilities.cumsum(axis=1) < generator.random((700, 1))).sum(axis=1)
        drawn.append(score(logits, labels))
    for name in ("ece", *(f"level_{k}_ece" for k in range(1, TREE.depth + 1))):
        simulated = np.mean([scores[name] for scores in drawn])
        assert drawn[0][f"{name}_by_chance"] == pytest.approx(simulated, rel=0.1), name


def test_calibration_bins_by_hand():
    # 0.2 is the border of the bins 2 and 3, and belongs to the bin below; 0.84 and 0.86 are in bin 12
    bins = calibration_bins(np.array([0.2, 0.84, 0.86]), np.array([False, True, True]))
    assert bins.index.tolist() == [2, 12]
    assert bins["count"].tolist() == [1, 2]
    assert bins["correct"].tolist() == [0, 2]
    assert bins["confidence"].tolist() == pytest.approx([0.2, 1.7])
    assert expected_calibration_error(bins) == pytest.approx((1 * 0.2 + 2 * 0.15) / 3)


def test_scores_without_documents_are_left_out():
    scores = OnePathForm(TREE).measure(logits_for([E, A]), np.array([B, -100]))
    # {B}, the answer {B, D, e} where the label ends, against {B}
    assert scores["log_loss"] > 0
    right = np.exp(-scores.pop("log_loss"))  # of one document
    assert scores.pop("level_1_ece") == pytest.approx(1 - right, abs=0.02)
    assert scores.pop("level_1_ece_by_chance") == pytest.approx(np.sqrt(2 * right * (1 - right) / np.pi))
    assert scores == pytest.approx(
        {
            "hierarchical_precision": 1,
            "hierarchical_recall": 1,
            "hierarchical_f1": 1,
            "level_1_accuracy": 1,
            "level_1_macro_f1": 1,
        }
    )


def test_scores_do_not_depend_on_the_scale_of_unnormalised_logits():
    logits, labels = random_case(TREE, 100)
    compute_metrics = OnePathForm(TREE).measure
    shifted = logits.astype(np.float64) + np.linspace(-1000, 1000, 100)[:, None]
    scores = compute_metrics(logits, labels)
    assert compute_metrics(shifted, labels) == pytest.approx(scores)


def test_scores_of_a_training_that_diverged_are_refused():
    with pytest.raises(InputError, match="not finite for 2 of 3 documents: training diverged"):
        OnePathForm(TREE).measure(np.diag([0, np.nan, np.inf, 0, 0])[:3], np.array([A, C, E]))


def report_of(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    nothing, rows = np.empty((len(labels), TREE.num_nodes)), np.arange(len(labels))
    split = ScoredSplit(nothing, logits, labels, rows, rows, csr_matrix(nothing))
    return class_scores(OnePathForm(TREE), {"test": split}, None)


def intervals_of(labels: np.ndarray, predictions: np.ndarray, num_classes: int, **settings) -> dict[str, np.ndarray]:
    intervals = bootstrap_intervals(one_hot(labels, num_classes), one_hot(predictions, num_classes), **settings)
    return {"accuracy": intervals.pop("micro_f1"), **intervals}


def test_per_class_report_against_scikit_learn():
    logits, labels = random_case(TREE, 200)
    logits, labels = logits[labels >= 0], labels[labels >= 0]
    leaf = labels < TREE.num_leaves
    expected = sklearn.metrics.classification_report(
        labels[leaf], logits[leaf].argmax(axis=1), target_names=["a", "c", "e", "f", "h"], output_dict=True
    )
    report = report_of(logits, labels)["per_class"]
    assert [row["label"] for row in report] == ["a", "c", "e", "f", "h"]
    for row in report:
        of_class = expected[row["label"]]
        assert row["support"] == of_class["support"]
        assert row["precision"] == pytest.approx(of_class["precision"])
        assert row["recall"] == pytest.approx(of_class["recall"])
        assert row["f1"] == pytest.approx(of_class["f1-score"])


def test_per_class_report_of_classes_that_do_not_occur():
    report = report_of(logits_for([A, A]), np.array([A, B]))["per_class"]
    absent = {"label": "h", "support": 0, "precision": 0, "recall": 0, "f1": 0, "f1_interval": None}
    assert {name: report[0][name] for name in ("support", "precision", "recall", "f1")} == dict.fromkeys(
        ("support", "precision", "recall", "f1"), 1
    )
    assert report[4] == absent
    assert report_of(logits_for([A]), np.array([B])) == {}


def test_the_intervals_of_a_report_are_those_of_the_bootstrap():
    logits, labels = random_case(TREE, 200)
    logits, labels = logits[labels >= 0], labels[labels >= 0]
    scores = report_of(logits, labels)
    leaf = labels < TREE.num_leaves
    expected = intervals_of(labels[leaf], logits[leaf].argmax(axis=1), TREE.num_leaves)
    assert scores["intervals"] == {f"test_{name}": expected[name].tolist() for name in ("accuracy", "macro_f1")}
    assert [row["f1_interval"] for row in scores["per_class"]] == expected["f1"].T.tolist()
    assert report_of(logits, np.full(len(labels), B)) == {}


def test_the_rows_of_a_text_are_drawn_together():
    generator = np.random.default_rng(0)
    labels, chosen = (one_hot(generator.integers(4, size=60), 4) for _ in range(2))
    twice = [np.repeat(array, 2, axis=0) for array in (labels, chosen)]
    expected, found = bootstrap_intervals(labels, chosen), bootstrap_intervals(*twice, np.repeat(np.arange(60), 2))
    for name, ends in expected.items():
        np.testing.assert_allclose(found[name], ends)
    assert np.ptp(bootstrap_intervals(*twice)["micro_f1"]) < 0.8 * np.ptp(expected["micro_f1"])


def test_bootstrap_intervals_against_scipy():
    generator = np.random.default_rng(0)
    labels = generator.integers(3, size=400)
    predictions = np.where(generator.random(400) < 0.7, labels, generator.integers(3, size=400))
    intervals = intervals_of(labels, predictions, 4)

    def macro_f1(true, predicted):
        return sklearn.metrics.f1_score(true, predicted, average="macro")

    for name, statistic in (("accuracy", sklearn.metrics.accuracy_score), ("macro_f1", macro_f1)):
        options = {"paired": True, "vectorized": False, "n_resamples": 1000, "method": "percentile", "rng": 1}
        expected = scipy.stats.bootstrap((labels, predictions), statistic, **options).confidence_interval
        np.testing.assert_allclose(intervals[name], expected, atol=0.01)
    assert intervals["f1"].shape == (2, 4)
    assert np.isnan(intervals["f1"][:, 3]).all()  # a leaf that does not occur
    rare = np.append(labels, 3)
    # the rare leaf is correct in every resample that contains it
    assert intervals_of(rare, np.append(predictions, 3), 4)["f1"][:, 3].tolist() == [1, 1]
    of_each = sklearn.metrics.f1_score(labels, predictions, average=None)
    assert (intervals["f1"][0, :3] < of_each).all()
    assert (of_each < intervals["f1"][1, :3]).all()


def test_the_interval_of_macro_f1_holds_where_classes_are_many_and_rare():
    """With 200 classes of three documents, the mean score lies in the expected share of intervals."""
    generator, labels = np.random.default_rng(0), np.repeat(np.arange(200), 3)

    def draw_predictions() -> np.ndarray:
        return np.where(generator.random(len(labels)) < 0.6, labels, generator.integers(200, size=len(labels)))

    def macro_f1(predictions: np.ndarray) -> float:
        return sklearn.metrics.f1_score(labels, predictions, average="macro", zero_division=0)

    expected = np.mean([macro_f1(draw_predictions()) for _ in range(200)])
    held = []
    for _ in range(40):
        predictions = draw_predictions()
        low, high = intervals_of(labels, predictions, 200, resamples=300)["macro_f1"]
        assert low < macro_f1(predictions) < high
        held.append(low <= expected <= high)
    assert np.mean(held) > 0.8
