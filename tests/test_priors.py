"""Test other class frequencies against Bayes' theorem and drawn texts: estimated, corrected, with
coverage, in every door.
"""

import itertools
import json
import signal
from collections import ChainMap

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
ONE_PATH = OnePath(TREE)
TASK = "hierarchical-text-classification"
FITTED = np.array([0.4, 0.3, 0.2, 0.1])
OTHER = np.array([0.1, 0.2, 0.1, 0.6])


def draw(prior: np.ndarray, texts: int, seed: int) -> np.ndarray:
    """Draw leaves by their frequencies, and normal evidence of each.

    Return P(leaf) under FITTED, (texts, 4).
    """
    generator = np.random.default_rng(seed)
    labels = generator.choice(4, texts, p=prior)
    evidence = generator.normal(np.eye(4)[labels], 0.7)
    log_likelihood = -((evidence[:, None] - np.eye(4)) ** 2).sum(2) / (2 * 0.7**2)
    return softmax(log_likelihood + np.log(FITTED), axis=1)


def estimate(
    leaves: np.ndarray, num_texts: int, decisions=ONE_PATH, prior: np.ndarray = FITTED
) -> np.ndarray:
    calibration = Calibration(prior=prior.tolist(), num_texts=num_texts)
    return estimate_prior(decisions, calibration, torch.tensor(leaves).float()).numpy()


def test_many_nodes_are_corrected_by_their_odds_and_stay_below_their_parents():
    p = np.random.default_rng(0).uniform(size=(50, 6))
    parents = [4, 4, 5, 5]
    p[:, :4] *= p[:, parents]
    fitted = np.full(6, 0.3)
    other = np.array([0.6, 0.1, 0.3, 0.3, 0.2, 0.5])
    adapted = ManyNodes(TREE).adapt(*map(torch.tensor, (p, fitted, other))).numpy()
    expected = logit(p) + logit(other) - logit(fitted)
    expected[:, :4] = np.minimum(expected[:, :4], expected[:, parents])
    np.testing.assert_allclose(logit(adapted), expected)


def test_the_frequencies_of_nodes_are_estimated_one_by_one():
    generator = np.random.default_rng(0)
    fitted = np.array([0.3, 0.4])
    labels = generator.random((10_000, 2)) < [0.6, 0.2]
    evidence = generator.normal(labels, 0.7)
    # of two normal distributions around 0 and 1
    p = expit((evidence - 0.5) / 0.7**2 + logit(fitted))
    found = estimate(p, 10_000, ManyNodes(Taxonomy(["a", "b"])), fitted)
    np.testing.assert_allclose(found, labels.mean(0), atol=0.02)


@pytest.mark.parametrize("num_texts", [28, 280])
def test_with_few_validation_texts_the_estimate_is_the_most_probable_one(num_texts):
    """Maximise the likelihood of the texts times the prior distribution, which counts as 28 /
    num_texts of the texts.
    """
    leaves = draw(OTHER, 300, 0)

    def neg_log_posterior(z: np.ndarray) -> float:
        log_prior = log_softmax(z)
        likelihood = np.log(leaves @ np.exp(log_prior - np.log(FITTED))).mean()
        return -likelihood - 28 / num_texts * (FITTED * log_prior).sum()

    expected = softmax(minimize(neg_log_posterior, np.zeros(4), tol=1e-12).x)
    np.testing.assert_allclose(estimate(leaves, num_texts), expected, atol=2e-4)


def test_texts_of_the_same_frequencies_change_nothing():
    """Of 50 samples that are drawn like the fit, few seem to differ.

    With two texts, chance explains any difference.
    """
    samples = [draw(FITTED, 300, seed) for seed in range(50)]
    changed = [(estimate(leaves, 300) != FITTED).any() for leaves in samples]
    assert sum(changed) <= 2
    np.testing.assert_array_equal(estimate(draw(OTHER, 2, 0), 300), FITTED)


def test_the_weighted_threshold_worked_by_hand():
    calibration = Calibration(
        prior=[0.25] * 4,
        set_scores=[0.4, 0.1, 0.2, 0.3, 0.5],
        set_labels=[[0], [1], [0, 1], [4], [3]],  # 4 is the parent of 0 and 1
        set_thresholds=[0.1] * 99,
    )
    # weights of the leaves 2, 1, ½, ½; of the texts in the order of their scores 1, 1½, 1½, 2, ½;
    # in all 6½ + 2
    threshold = ONE_PATH.set_threshold
    prior = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    ranges = {(0.01, 0.11): 0.1, (0.12, 0.29): 0.2, (0.3, 0.47): 0.3, (0.48, 0.7): 0.4}
    ranges |= {(0.71, 0.76): 0.5}
    for shares, expected in ranges.items():
        for share in shares:
            assert threshold(calibration, prior, coverage=share) == expected
    assert threshold(calibration, torch.full((4,), 0.25), coverage=0.3) == 0.1  # not shifted
    with pytest.raises(ValueError, match=r"coverage 0\.77 with this prior needs more validation"):
        threshold(calibration, prior, coverage=0.77)
    calibration.set_scores = None
    with pytest.raises(ValueError, match="stores no scores for coverage with prior"):
        threshold(calibration, prior, coverage=0.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0.5, 0.5], "prior must be a list of 4 frequencies"),
        ("texts", "prior must be a list of 4 frequencies"),
        ({"a": 1, "b": 1, "c": 1}, "of each class, and of nothing else: see 'd'"),
        ({"a": 1, "b": 1, "c": 1, "d": 1, "r": 2}, "and of nothing else: see 'r'"),
        ([1, 1, 1, -1], "must be a number of at least 0"),
        ([1, 1, 1, float("nan")], "must be a number of at least 0"),
        ([0, 0, 0, 0], "at least one class must be above 0"),
    ],
)
def test_frequencies_that_do_not_fit_the_classes_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        read_prior(ONE_PATH, Calibration(prior=FITTED.tolist()), given)


def test_frequencies_are_scaled_and_mappings_are_by_label():
    calibration = Calibration(prior=FITTED.tolist())
    mapping = dict(zip("dcba", OTHER[::-1].tolist(), strict=True))
    for given in ((20 * OTHER).tolist(), mapping):
        found = read_prior(ONE_PATH, calibration, given)
        torch.testing.assert_close(found, torch.tensor(OTHER))
    with pytest.raises(ValueError, match="frequency of a node must be at most 1"):
        read_prior(ManyNodes(TREE), Calibration(prior=[0.5] * 6), [1.5] + [0.5] * 5)


# In the pipeline


@pytest.fixture(scope="module")
def classify(clear_checkpoint):
    return pipeline(TASK, model=clear_checkpoint, trust_remote_code=True)


def test_the_pipeline_corrects_probabilities_by_bayes_theorem_and_sets(classify):
    texts = unclear_texts(40)
    calibration = classify.model.config.calibration
    tree = classify.tree
    fitted = np.array(calibration.prior)
    assert fitted.sum() == pytest.approx(1)
    other = np.arange(1, len(fitted) + 1) / np.arange(1, len(fitted) + 1).sum()

    def nodes_of(results: list[dict]) -> np.ndarray:
        levels = [ChainMap(*one["levels"]) for one in results]
        return np.array([[of_text[label] for label in tree.labels] for of_text in levels])

    plain = nodes_of(classify(texts, levels=True))
    results = classify(texts, prior=other.tolist(), coverage=0.6, levels=True)
    leaves = plain[:, : tree.num_leaves] / fitted * other
    leaves /= leaves.sum(axis=1, keepdims=True)
    expected = np.column_stack([leaves[:, held].sum(1) for held in tree.leaves_at_or_below])
    np.testing.assert_allclose(nodes_of(results), expected, rtol=1e-9)
    assert [one["label"] for one in results] == [tree.labels[leaf] for leaf in leaves.argmax(1)]
    # sets of the uncorrected probabilities, with the threshold for these frequencies
    threshold = classify.decisions.set_threshold(calibration, torch.tensor(other), coverage=0.6)
    sets = classify.decisions.prediction_sets(torch.from_numpy(plain), threshold).tolist()
    for row, one in zip(sets, results, strict=True):
        named = {node["label"]: node["score"] for node in one["prediction_set"]}
        assert named.keys() == {*itertools.compress(tree.labels, row)}
        assert [*named.values()] == sorted(named.values(), reverse=True)


def test_without_stored_frequencies_or_with_recall_a_prior_is_refused(labels_checkpoint, tmp_path):
    message = "does not store the class frequencies of its validation rows"
    file = tmp_path / "texts.csv"
    file.write_text("text\nA text.\n")
    words = ("--input", file, "--output", tmp_path / "out.csv", "--adapt_prior")
    with pytest.raises(InputError, match=message):
        predict_here("--model", labels_checkpoint, *words)
    classify = pipeline(TASK, model=labels_checkpoint, trust_remote_code=True, recall=0.9)
    assert classify("A text.")["prediction_set"] is not None
    with pytest.raises(ValueError, match=message):
        classify("A text.", recall=None, prior=[0.5])
    calibration = classify.model.config.calibration
    calibration.prior = [0.2] * classify.tree.num_nodes
    with pytest.raises(ValueError, match="leave out recall or prior"):
        classify("A text.", prior=calibration.prior)


# In predict.py


def test_the_sample_is_the_same_each_time_and_from_the_whole_input():
    rows = []
    for number in range(SAMPLED_TEXTS * 3):
        text = None if number % 100 == 3 else str(number)
        rows.append(InputRow("a.csv", number, None, text, None, None))
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
    words = ("--model", clear_checkpoint, "--adapt_prior", "--dtype", "fp32")
    into = (*words, "--input", file, "--output", output)
    strike = ("os.rename", "/000000001.jsonl", int(signal.SIGKILL))
    done = complete("-c", STRIKE, ROOT / "predict.py", *strike, *into)
    assert done.returncode == -signal.SIGKILL, done.stderr
    part = (tmp_path / "out.jsonl.parts" / "000000000.jsonl").read_text().splitlines()
    prior = json.loads(part[1])["options"]["prior"]  # of the header
    assert prior == pytest.approx(classify.estimate_prior(texts), abs=1e-5)
    assert predict_here(*into) == 0
    summary = json.loads((tmp_path / "out.jsonl.summary.json").read_text())
    assert summary["options"]["prior"] == prior
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    results = classify(texts, prior=prior)
    assert [row["label"] for row in rows] == [one["label"] for one in results]
    scores = [row["score"] for row in rows]
    assert scores == pytest.approx([one["score"] for one in results], abs=2e-6)
    assert scores != pytest.approx([one["score"] for one in classify(texts)], abs=1e-3)
    with pytest.raises(InputError, match="standard input can be read once"):
        predict_here(*words, "--input", "-", "--output", tmp_path / "b.csv")
    with pytest.raises(ValueError, match="without texts"):
        classify.estimate_prior([])
