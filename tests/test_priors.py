"""Test other class frequencies against Bayes' theorem and drawn texts: estimated, corrected, with
coverage, in every door.
"""

import itertools
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, STRIKE, complete, predict_here, unclear_texts
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, logit, softmax
from transformers import pipeline

from configuration_hierarchical import Calibration
from decisions_hierarchical import ManyNodes, OnePath
from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.prediction.input import SAMPLED_TEXTS, InputRow, sample_texts
from open_world_hierarchical import estimate_prior, read_prior
from taxonomy_hierarchical import Taxonomy

TREE = Taxonomy({"r": ["a", "b"], "s": ["c", "d"]})
FITTED = np.array([0.4, 0.3, 0.2, 0.1])
OTHER = np.array([0.1, 0.2, 0.1, 0.6])


def draw(prior: np.ndarray, texts: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw leaves by their frequencies, and normal evidence of each.

    Return P(leaf) under FITTED, (texts, 4), and the leaves.
    """
    generator = np.random.default_rng(seed)
    labels = generator.choice(4, texts, p=prior)
    evidence = generator.normal(np.eye(4)[labels], 0.7)
    log_likelihood = -((evidence[:, None] - np.eye(4)) ** 2).sum(2) / (2 * 0.7**2)
    return softmax(log_likelihood + np.log(FITTED), axis=1), labels


def of_nodes(leaves: np.ndarray) -> np.ndarray:
    return np.column_stack([leaves, leaves[:, :2].sum(1), leaves[:, 2:].sum(1)])


def test_one_path_is_corrected_by_bayes_theorem_at_all_nodes():
    leaves, _ = draw(FITTED, 50, 0)
    adapted = OnePath(TREE).adapt(*map(torch.tensor, (of_nodes(leaves), FITTED, OTHER))).numpy()
    expected = leaves / FITTED * OTHER
    np.testing.assert_allclose(adapted, of_nodes(expected / expected.sum(1, keepdims=True)))


def test_many_nodes_are_corrected_by_their_odds_and_stay_below_their_parents():
    p = np.random.default_rng(0).uniform(size=(50, 6))
    fitted = np.full(6, 0.3)
    p[:, 4], p[:, 5] = np.maximum(p[:, 4], p[:, :2].max(1)), np.maximum(p[:, 5], p[:, 2:4].max(1))
    other = np.array([0.6, 0.1, 0.3, 0.3, 0.2, 0.5])
    adapted = ManyNodes(TREE).adapt(*map(torch.tensor, (p, fitted, other))).numpy()
    moved = logit(p) + logit(other) - logit(fitted)
    np.testing.assert_allclose(logit(adapted[:, 4:]), moved[:, 4:])
    np.testing.assert_allclose(
        logit(adapted[:, :4]), np.minimum(moved[:, :4], moved[:, [4, 4, 5, 5]])
    )


def estimate(
    decisions, leaves: np.ndarray, num_texts: int, prior: np.ndarray = FITTED
) -> np.ndarray:
    calibration = Calibration(prior=prior.tolist(), num_texts=num_texts)
    return estimate_prior(decisions, calibration, torch.tensor(leaves).float()).numpy()


def test_the_frequencies_of_nodes_are_estimated_one_by_one():
    generator = np.random.default_rng(0)
    fitted = np.array([0.3, 0.4])
    other = np.array([0.6, 0.2])
    labels = generator.random((10_000, 2)) < other
    evidence = generator.normal(labels, 0.7)
    # of two normal distributions around 0 and 1
    p = expit((evidence - 0.5) / 0.7**2 + logit(fitted))
    found = estimate(ManyNodes(Taxonomy(["a", "b"])), p, 10_000, fitted)
    np.testing.assert_allclose(found, labels.mean(0), atol=0.02)


@pytest.mark.parametrize("num_texts", [28, 280])
def test_with_few_validation_texts_the_estimate_is_the_most_probable_one(num_texts):
    """Maximise the likelihood of the texts times the prior distribution, which counts as 28 /
    num_texts of the texts.
    """
    leaves, _ = draw(OTHER, 300, 0)

    def neg_log_posterior(z: np.ndarray) -> float:
        log_prior = log_softmax(z)
        likelihood = np.log(leaves @ np.exp(log_prior - np.log(FITTED))).mean()
        return -likelihood - 28 / num_texts * (FITTED * log_prior).sum()

    expected = softmax(minimize(neg_log_posterior, np.zeros(4), tol=1e-12).x)
    np.testing.assert_allclose(estimate(OnePath(TREE), leaves, num_texts), expected, atol=2e-4)


def test_texts_of_the_same_frequencies_change_nothing():
    """Of 50 samples that are drawn like the fit, few seem to differ.

    With two texts, chance explains any difference.
    """
    changed = sum(
        (estimate(OnePath(TREE), draw(FITTED, 300, seed)[0], 300) != FITTED).any()
        for seed in range(50)
    )
    assert changed <= 2
    np.testing.assert_array_equal(estimate(OnePath(TREE), draw(OTHER, 2, 0)[0], 300), FITTED)


def test_the_weighted_threshold_worked_by_hand():
    calibration = Calibration(
        prior=[0.25] * 4,
        set_scores=[0.4, 0.1, 0.2, 0.3, 0.5],
        set_labels=[[0], [1], [0, 1], [4], [3]],  # 4 is the parent of 0 and 1
        set_thresholds=[0.1] * 99,
    )
    # weights of the leaves 2, 1, ½, ½; of the texts in the order of their scores 1, 1½, 1½, 2, ½;
    # in all 6½ + 2
    threshold = OnePath(TREE).set_threshold
    prior = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    expected = {
        0.11: 0.1,
        0.12: 0.2,
        0.29: 0.2,
        0.3: 0.3,
        0.47: 0.3,
        0.48: 0.4,
        0.7: 0.4,
        0.71: 0.5,
        0.76: 0.5,
    }
    assert {share: threshold(calibration, prior, coverage=share) for share in expected} == expected
    assert threshold(calibration, torch.full((4,), 0.25), coverage=0.3) == 0.1  # not shifted
    with pytest.raises(
        ValueError, match=r"coverage 0\.77 with this prior needs more validation texts"
    ):
        threshold(calibration, prior, coverage=0.77)
    with pytest.raises(ValueError, match="stores no scores for coverage with prior"):
        threshold(Calibration(prior=[0.25] * 4, set_thresholds=[0.1] * 99), prior, coverage=0.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0.5, 0.5], "prior must be a list of 4 frequencies"),
        ("texts", "prior must be a list of 4 frequencies"),
        (
            {"a": 1, "b": 1, "c": 1},
            "prior needs the frequency of each class, and of nothing else: see 'd'",
        ),
        ({"a": 1, "b": 1, "c": 1, "d": 1, "r": 2}, "and of nothing else: see 'r'"),
        ([1, 1, 1, -1], "must be a number of at least 0"),
        ([1, 1, 1, float("nan")], "must be a number of at least 0"),
        ([0, 0, 0, 0], "at least one class must be above 0"),
    ],
)
def test_frequencies_that_do_not_fit_the_classes_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        read_prior(OnePath(TREE), Calibration(prior=FITTED.tolist()), given)


def test_frequencies_are_scaled_and_mappings_are_by_label():
    decisions = OnePath(TREE)
    calibration = Calibration(prior=FITTED.tolist())
    expected = torch.tensor(OTHER)
    torch.testing.assert_close(read_prior(decisions, calibration, (20 * OTHER).tolist()), expected)
    mapping = dict(zip("dcba", OTHER[::-1].tolist(), strict=True))
    torch.testing.assert_close(read_prior(decisions, calibration, mapping), expected)
    with pytest.raises(ValueError, match="frequency of a node must be at most 1"):
        read_prior(ManyNodes(TREE), Calibration(prior=[0.5] * 6), [1.5] + [0.5] * 5)


# In the pipeline


@pytest.fixture(scope="module")
def classify(clear_checkpoint):
    return pipeline(
        "hierarchical-text-classification", model=clear_checkpoint, trust_remote_code=True
    )


def leaves_of(classify, results) -> np.ndarray:
    labels = classify.tree.labels[: classify.tree.num_leaves]
    return np.array(
        [
            [next(level[label] for level in one["levels"] if label in level) for label in labels]
            for one in results
        ]
    )


def test_the_pipeline_corrects_probabilities_and_sets(classify):
    texts = unclear_texts(40)
    fitted = np.array(classify.model.config.calibration.prior)
    assert fitted.sum() == pytest.approx(1)
    plain = leaves_of(classify, classify(texts, levels=True))
    other = np.arange(1, len(fitted) + 1) / np.arange(1, len(fitted) + 1).sum()
    results = classify(texts, prior=other.tolist(), coverage=0.6, levels=True)
    expected = softmax(np.log(plain) + np.log(other / fitted), axis=1)
    np.testing.assert_allclose(leaves_of(classify, results), expected, rtol=1e-9)
    labels = classify.tree.labels
    assert [one["label"] for one in results] == [labels[leaf] for leaf in expected.argmax(1)]
    # sets of the uncorrected probabilities, with the threshold for these frequencies
    threshold = classify.decisions.set_threshold(
        classify.model.config.calibration, torch.tensor(other), coverage=0.6
    )
    nodes = np.column_stack([plain[:, held].sum(1) for held in classify.tree.leaves_at_or_below])
    sets = classify.decisions.prediction_sets(torch.from_numpy(nodes), threshold).tolist()
    for row, one in zip(sets, results, strict=True):
        assert {node["label"] for node in one["prediction_set"]} == {
            *itertools.compress(labels, row)
        }
        scores = [node["score"] for node in one["prediction_set"]]
        assert scores == sorted(scores, reverse=True)


def test_without_stored_frequencies_or_with_recall_a_prior_is_refused(labels_checkpoint, tmp_path):
    message = "does not store the class frequencies of its validation rows"
    with pytest.raises(ValueError, match=message):
        pipeline(
            "hierarchical-text-classification", model=labels_checkpoint, trust_remote_code=True
        )("a", prior=[0.5])
    file = tmp_path / "texts.csv"
    file.write_text("text\nA text.\n")
    with pytest.raises(InputError, match=message):
        predict_here(
            "--model",
            labels_checkpoint,
            "--input",
            file,
            "--output",
            tmp_path / "out.csv",
            "--adapt_prior",
        )
    copied = Path(shutil.copytree(labels_checkpoint, tmp_path / "copy"))
    stored = json.loads((copied / "config.json").read_text())
    stored["calibration"]["prior"] = [0.2] * len(stored["id2label"])
    (copied / "config.json").write_text(json.dumps(stored))
    with_recall = pipeline(
        "hierarchical-text-classification", model=str(copied), trust_remote_code=True, recall=0.9
    )
    assert with_recall("A text.")["prediction_set"] is not None
    with pytest.raises(ValueError, match="leave out recall or prior"):
        with_recall("A text.", prior=[0.2] * len(stored["id2label"]))


# In predict.py


def test_the_sample_is_the_same_each_time_and_from_the_whole_input():
    rows = [
        InputRow("a.csv", i, None, None if i % 100 == 3 else str(i), None, None)
        for i in range(SAMPLED_TEXTS * 3)
    ]
    sample = sample_texts(rows)
    assert sample == sample_texts(rows)
    numbers = np.array(sample, dtype=int)
    assert len({*numbers}) == SAMPLED_TEXTS
    assert numbers.mean() == pytest.approx(SAMPLED_TEXTS * 1.5, rel=0.02)


def test_a_file_is_corrected_by_its_own_frequencies_also_after_a_kill(
    classify, clear_checkpoint, tmp_path
):
    texts = unclear_texts(1100)
    file = tmp_path / "in.csv"
    output = tmp_path / "out.jsonl"
    pd.DataFrame({"text": texts}).to_csv(file, index=False)
    words = (
        "--model",
        clear_checkpoint,
        "--input",
        file,
        "--output",
        output,
        "--adapt_prior",
        "--dtype",
        "fp32",
    )
    done = complete(
        "-c",
        STRIKE,
        ROOT / "predict.py",
        "os.rename",
        "/000000001.jsonl",
        int(signal.SIGKILL),
        *words,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    header = json.loads(
        (tmp_path / "out.jsonl.parts" / "000000000.jsonl").read_text().splitlines()[1]
    )
    prior = classify.estimate_prior(texts)
    assert header["options"]["prior"] == pytest.approx(prior, abs=1e-5)
    assert predict_here(*words) == 0
    summary = json.loads((tmp_path / "out.jsonl.summary.json").read_text())
    assert summary["options"]["prior"] == header["options"]["prior"]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    results = classify(texts, prior=header["options"]["prior"])
    assert [row["label"] for row in rows] == [one["label"] for one in results]
    assert [row["score"] for row in rows] == pytest.approx(
        [one["score"] for one in results], abs=2e-6
    )
    assert [row["score"] for row in rows] != pytest.approx(
        [one["score"] for one in classify(texts)], abs=1e-3
    )
    with pytest.raises(InputError, match="standard input can be read once"):
        predict_here(
            "--model",
            clear_checkpoint,
            "--input",
            "-",
            "--output",
            tmp_path / "b.csv",
            "--adapt_prior",
        )
    with pytest.raises(ValueError, match="without texts"):
        classify.estimate_prior([])
