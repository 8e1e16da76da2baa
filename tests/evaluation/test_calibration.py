"""Test calibration in both forms of label against its definition, drawn labels and the model
itself; then sets of one path.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import CLEAR
from drawn import draw_labels, drawn, node_log_probs
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.special import log_expit, log_softmax
from test_long_texts import small_model
from transformers import pipeline

from configuration_hierarchical import MULTI_LABEL, SINGLE_LABEL, Calibration, HierarchicalConfig
from decisions_hierarchical import OnePath, guaranteed_threshold
from hierarchical_clinicalbert.evaluation.calibration import (
    PRIOR_STD,
    calibrated_logits,
    fit_calibration,
    fit_phrases,
)
from hierarchical_clinicalbert.evaluation.forms import Form, ManyNodesForm, OnePathForm, form_of
from hierarchical_clinicalbert.evaluation.report import ScoredSplit, calibrate_splits
from taxonomy_hierarchical import Taxonomy

TREE = Taxonomy(["a", {"b": ["c", "d", {"e": ["f", "g"]}]}, {"h": ["i", "j"]}])
LEVELS = np.array(TREE.levels) - 1
FORMS = pytest.mark.parametrize(
    "form", [OnePathForm(TREE), ManyNodesForm(TREE)], ids=["one path", "many nodes"]
)


def log_likelihood(form: Form, scores: np.ndarray, labels: np.ndarray) -> float:
    log_probs = node_log_probs(form, scores)
    if isinstance(form, OnePathForm):
        return np.take_along_axis(log_probs, labels[:, None], axis=1).sum()
    return np.where(labels == 1, log_probs, np.log(-np.expm1(log_probs))).sum()


def open_log_likelihood(form: Form, scores: np.ndarray, labels: np.ndarray) -> float:
    """Return that of the labels given their parents, which with one path is the same."""
    if isinstance(form, OnePathForm):
        return log_likelihood(form, scores, labels)
    has_parent = np.column_stack([labels, np.ones(len(labels))])[:, TREE.parents] == 1
    return log_expit(np.where(labels == 1, scores, -scores))[has_parent].sum()


def neg_log_prior(*deviations: np.ndarray) -> float:
    return (np.concatenate(deviations) ** 2).sum() / (2 * PRIOR_STD**2)


# The fit


@FORMS
def test_scales_and_biases_have_the_greatest_posterior(form):
    """Minimise the negative log-posterior numerically. No text has the nodes a and h."""
    has_one_path = isinstance(form, OnePathForm)
    scores = np.random.default_rng(1).normal(0, 3, (90, TREE.num_nodes))
    labels = draw_labels(form, scores / 2 - 0.5)
    without = [TREE.id(name) for name in "ahij"]
    if has_one_path:
        kept = ~np.isin(labels, without)
        scores = scores[kept]
        labels = labels[kept]
    else:
        labels[:, without] = 0

    # ── What all decisions share: a scale, and a bias of each level ───────────────────────────────
    def common_posterior(parameters: np.ndarray) -> float:
        scale, biases = np.split(parameters, [1])
        prior = neg_log_prior(scale - 1, biases)
        return prior - open_log_likelihood(form, scale * scores + biases[LEVELS], labels)

    start = [1.0] + [0.0] * TREE.depth
    common, *biases = minimize(common_posterior, start, method="BFGS").x
    level_biases = np.array(biases)[LEVELS]

    # ── The scale of each decision, and the bias of each node ─────────────────────────────────────
    decisions = np.array(TREE.decision_of if has_one_path else range(TREE.num_nodes))
    count = decisions.max() + 1

    def posterior(parameters: np.ndarray) -> float:
        scales, biases = np.split(parameters, [count])
        prior = neg_log_prior((scales - common) / common, biases - level_biases)
        return prior - log_likelihood(form, scales[decisions] * scores + biases, labels)

    start = [*[common] * count, *level_biases]
    bounds = [(0.05, 20)] * count + [(None, None)] * TREE.num_nodes
    found = minimize(posterior, start, bounds=bounds, options={"ftol": 1e-14}).x
    fitted = fit_calibration(form, scores, None, labels)
    np.testing.assert_allclose(fitted.scales, found[:count][decisions], atol=2e-3)
    np.testing.assert_allclose(fitted.biases, found[count:], atol=2e-3)


@FORMS
def test_phrases_have_the_weight_of_greatest_posterior(form):
    parts = np.random.default_rng(2).normal(size=(3, 40, TREE.num_nodes))
    labels = draw_labels(form, parts[0] + parts[1] + 2 * parts[2])

    def posterior(parameters: np.ndarray) -> float:
        factors, biases = np.split(parameters, [3])
        scores = np.tensordot(factors, parts, 1) + biases[LEVELS]
        return neg_log_prior(factors - [1, 0, 0], biases) - open_log_likelihood(
            form, scores, labels
        )

    start = [1, 0.1, 0.1] + [0] * TREE.depth
    found = minimize(posterior, start, method="BFGS", options={"gtol": 1e-3})
    assert fit_phrases(form, *parts, labels) == pytest.approx(found.x[2] / found.x[1], rel=1e-3)
    # without words, no phrases either
    assert fit_phrases(form, parts[0], -parts[1], parts[2], labels) == 0


def test_the_prior_of_the_classes_counts_once():
    """Give encoder and lexical head independent evidence, and the same class prior in both.

    The posterior is known.
    """
    generator = np.random.default_rng(0)
    prior = np.array([0.9, 0.07, 0.03])
    labels = generator.choice(3, size=20_000, p=prior)
    evidence = generator.normal(labels[:, None], 1, (2, 20_000, 1)) - np.arange(3)
    logits, words = np.log(prior) - evidence**2 / 2
    posterior = log_softmax(logits + words - np.log(prior), axis=1)
    form = OnePathForm(Taxonomy(["a", "b", "c"]))
    log_prior = np.log(1000 * prior)

    def gap(number: int, **given: object) -> float:
        """Return the mean divergence from the posterior, after calibration on the first rows."""
        fitted = fit_calibration(form, logits[:number], words[:number], labels[:number], **given)
        calibrated = calibrated_logits(form.decisions, fitted, logits, words)
        return float((np.exp(posterior) * (posterior - calibrated)).sum(1).mean())

    assert gap(20_000, log_prior=log_prior) < 0.001
    assert gap(100, log_prior=log_prior) < 0.6 * gap(100)
    # lexical scores that contradict the labels get no weight
    assert fit_calibration(form, logits, -words, labels).lexical_weight == 0


@FORMS
def test_validation_rows_are_scored_by_a_calibration_that_has_not_seen_their_text(form):
    scores = np.random.default_rng(1).normal(scale=2, size=(60, TREE.num_nodes))
    labels = draw_labels(form, scores)
    texts = np.arange(60) // 2  # each text twice
    counts = csr_matrix((60, 1))

    def logits_of_splits(labels: np.ndarray, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        ids = texts[rows]
        split = ScoredSplit(scores[rows], scores[rows], labels[rows], ids, ids, counts)
        _, calibrated, _ = calibrate_splits(form, {"validation": split, "test": split}, None)
        return {name: split.logits for name, split in calibrated.items()}

    logits = logits_of_splits(labels)
    other_labels = labels.copy()
    other_labels[:2] = labels[[10, 12]]  # the first text is labelled otherwise
    assert (other_labels != labels).any()
    again = logits_of_splits(other_labels)["validation"]
    np.testing.assert_array_equal(logits["validation"][:2], again[:2])
    # four fifths: the first text took part in their fits
    assert (logits["validation"] != again).any(axis=1).sum() == 48
    # test rows, and a single validation text, are scored by the calibration of all validation rows
    fitted = fit_calibration(form, scores, None, labels)
    expected = calibrated_logits(form.decisions, fitted, scores, None)
    np.testing.assert_array_equal(logits["test"], expected)
    np.testing.assert_allclose(logits["validation"], logits["test"], atol=2.0)
    of_one = logits_of_splits(labels, slice(1))
    np.testing.assert_array_equal(of_one["validation"], of_one["test"])


@pytest.mark.parametrize("problem_type", [SINGLE_LABEL, MULTI_LABEL])
@torch.inference_mode()
def test_the_model_itself_gives_the_calibrated_probabilities(problem_type):
    model = small_model(problem_type=problem_type)
    tree = model.config.tree
    form = form_of(tree, problem_type)
    ids = torch.randint(10, 64, (7, 9))
    classes = form.decisions.num_classes
    weights = {"weight": torch.randn(classes, 64), "bias": torch.randn(classes)}
    lexical = {"idf": torch.rand(64), **weights}
    scales = np.random.default_rng(4).uniform(0.3, 3, tree.num_nodes)
    biases = np.random.default_rng(5).normal(size=tree.num_nodes)
    own = model(input_ids=ids).decision_logits.double().numpy()
    fitted = Calibration(lexical_weight=0.7, scales=scales.tolist(), biases=biases.tolist())
    model.set_calibration(fitted, lexical)
    after = model(input_ids=ids)
    words = model.heads.lexical(ids, None).double().numpy()
    if problem_type == SINGLE_LABEL:  # an inner node's lexical score is that of all leaves below
        words = np.log([np.exp(words[:, below]).sum(1) for below in tree.leaves_at_or_below]).T
    expected = node_log_probs(form, scales * (own + 0.7 * words) + biases)
    np.testing.assert_allclose(after.node_log_probs.numpy(), expected, atol=1e-4)
    logits = calibrated_logits(form.decisions, fitted, own, words)
    np.testing.assert_allclose(after.logits.numpy(), logits, atol=1e-4)
    log_probs = form.decisions.log_probs(torch.from_numpy(logits)).numpy()
    np.testing.assert_allclose(log_probs, expected, atol=1e-9)


# Prediction sets of one path


ONLY_CHILDREN = Taxonomy(
    ["a", {"b": ["c"]}, {"d": {"e": {"f": ["g", "h"]}}}, {"i": [{"j": ["k", "l"]}, {"m": ["n"]}]}]
)


def antichains(tree: Taxonomy, node: int = -1) -> Iterator[list[int]]:
    """Yield all sets of nodes below a node, none of them below another.

    A set names no parent of an only child.
    """
    parts = [[*antichains(tree, child), [child]] for child in tree.children(node)]
    for part in itertools.product(*parts):
        named = [*itertools.chain(*part)]
        if not any(len(tree.children(one)) == 1 for one in named):
            yield named


@pytest.mark.parametrize("tree", [TREE, ONLY_CHILDREN])
@pytest.mark.parametrize("price", [0.0, 1.5, 8.0])
def test_sets_are_the_best_of_all_and_grow_and_nonconformity_is_the_smallest_threshold(tree, price):
    decisions = OnePath(tree)
    decisions.node_price = price
    generator = np.random.default_rng(0)
    under = tree.leaves_at_or_below
    candidates = [*antichains(tree)]
    every = torch.arange(tree.num_nodes)

    def leaves_of(named: list[int]) -> list[int]:
        return [leaf for node in named for leaf in under[node]]

    def worth(named: list[int], leaves: np.ndarray, threshold: float) -> float:
        inside = leaves_of(named)
        size = (len(inside) + price * len(named)) / (1 + price)
        return leaves[inside].sum() - (1 - threshold) * size

    for _ in range(10):
        leaves = generator.dirichlet(np.full(tree.num_leaves, 0.3))
        nodes = torch.tensor([[leaves[held].sum() for held in under]])
        scores = decisions.nonconformity(nodes.expand(tree.num_nodes, -1), every).tolist()
        assert min(scores) == scores[leaves.argmax()] == 0
        allowed = [named for named in candidates if leaves.argmax() in leaves_of(named)]
        before: set[int] = set()
        for threshold in sorted({0.0, *scores, *generator.random(20)}):
            predicted = decisions.prediction_sets(nodes, threshold)[0].nonzero().flatten().tolist()
            assert predicted in map(sorted, allowed)
            best = max(worth(named, leaves, threshold) for named in allowed)
            assert worth(predicted, leaves, threshold) == pytest.approx(best, abs=1e-12)
            held = {*leaves_of(predicted)}
            if price == 0:  # least ambiguous sets
                assert held == {leaves.argmax(), *np.flatnonzero(leaves >= 1 - threshold)}
            assert before <= held
            before = held
            smallest = [score <= threshold for score in scores]
            assert [{*under[node]} <= held for node in every] == smallest


def test_thresholds_are_the_ranks_of_split_conformal_prediction():
    form = OnePathForm(TREE)
    logits, labels = drawn(form, 9)
    nodes = form.decisions.log_probs(torch.from_numpy(logits)).exp()
    scores = sorted(form.decisions.nonconformity(nodes, torch.from_numpy(labels)).tolist())
    # each text twice: the greater score counts
    twice = np.tile(logits, (2, 1))
    other = np.append(labels, logits.argmax(axis=1))
    thresholds = form.fit_sets(twice, other, np.tile(np.arange(9), 2))["set_thresholds"]
    assert len(thresholds) == 99
    stored = HierarchicalConfig(taxonomy=TREE, calibration=Calibration(set_thresholds=thresholds))

    def threshold(coverage: float) -> float:
        return guaranteed_threshold("coverage", coverage, stored.calibration)

    # ranks of (9 + 1) · coverage, both rounded up
    for coverage, rank in ((0.9, 9), (0.5, 5), (1e-9, 1), (0.501, 6), (0.895, 9)):
        assert threshold(coverage) == scores[rank - 1]
        assert threshold(coverage) == round(threshold(coverage), 6)
    assert thresholds[90:] == [None] * 9
    with pytest.raises(ValueError, match=r"coverage 0\.901 needs 11 labelled validation texts"):
        threshold(0.901)
    for wrong in (0, 1, 1.5, "0.9"):
        with pytest.raises(ValueError, match=r"must be a number above 0 and at most 0\.99"):
            threshold(wrong)


def test_sets_have_the_requested_coverage_if_labels_are_inner_nodes():
    form = OnePathForm(TREE)
    logits, labels = drawn(form, 4000)
    texts = np.arange(2000)
    inner = TREE.id("b")
    inside = np.isin(labels, TREE.leaves_at_or_below[inner])
    is_known = np.random.default_rng(2).random(4000) < 0.2
    known = np.where(is_known | ~inside, labels, inner)
    threshold = form.thresholds_of(form.set_scores(logits[:2000], known[:2000], texts))[79]

    def coverage(truth: np.ndarray) -> float:
        sets = form.predict_sets(logits[2000:], truth[2000:], texts, threshold)
        return sets.scores()["coverage"]

    assert coverage(known) == pytest.approx(0.8, abs=0.025)
    assert coverage(labels) >= coverage(known)


def test_a_coverage_is_refused_with_a_tokenizer_of_another_limit(clear_checkpoint):
    task = "hierarchical-text-classification"
    classify = pipeline(task, model=clear_checkpoint, trust_remote_code=True)
    text = f"We treated {CLEAR['neoplasms'][0]}."
    assert "prediction_set" not in classify(text, max_length=32)
    with pytest.raises(ValueError, match="coverage needs texts truncated at 128 tokens"):
        classify(text, coverage=0.9, max_length=32)
    # trained at 64, under a tokenizer that takes 96
    classify.tokenizer.model_max_length = 96
    classify.model.config.calibration.max_length = 64
    with pytest.raises(ValueError, match="coverage needs texts truncated at 64 tokens"):
        classify(text, coverage=0.9)
    assert "prediction_set" in classify(text, coverage=0.9, max_length=64)
