"""Test calibration in both forms of label against its definition, drawn labels and the model
itself; then sets of one path.
"""

import functools
import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import CLEAR
from drawn import draw_labels, drawn, node_log_probs
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.special import log_expit, log_softmax, logsumexp
from transformers import pipeline

from configuration_hierarchical import MULTI_LABEL, SINGLE_LABEL, Calibration, HierarchicalConfig
from decisions_hierarchical import OnePath, guaranteed_threshold
from hierarchical_clinicalbert.evaluation import calibration
from hierarchical_clinicalbert.evaluation.calibration import (
    calibrated_logits,
    fit_calibration,
    fit_phrases,
)
from hierarchical_clinicalbert.evaluation.forms import ManyNodesForm, OnePathForm, form_of
from hierarchical_clinicalbert.evaluation.report import ScoredSplit, calibrate_splits
from modeling_hierarchical import HierarchicalForSequenceClassification
from taxonomy_hierarchical import Taxonomy

TREE = Taxonomy(["a", {"b": ["c", "d", {"e": ["f", "g"]}]}, {"h": ["i", "j"]}])
ONLY = Taxonomy(
    ["a", {"b": ["c"]}, {"d": {"e": {"f": ["g", "h"]}}}, {"i": [{"j": ["k", "l"]}, {"m": ["n"]}]}]
)  # only children
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
FORMS = pytest.mark.parametrize(
    "form", [OnePathForm(TREE), ManyNodesForm(TREE)], ids=["one path", "many nodes"]
)


# The fit


def test_each_decision_has_the_map_estimate_on_the_rows_that_take_it():
    """Minimise the posterior numerically.

    The decision below h has no rows, and no label is the root a.
    """
    scores = np.random.default_rng(1).normal(-0.5, 1.5, (90, TREE.num_nodes))
    labels = draw_labels(OnePathForm(TREE), scores)
    kept = ~np.isin(labels, [TREE.id(name) for name in "ahij"])
    scores = scores[kept]
    labels = labels[kept]

    def log_likelihood(nodes: list[int], scale: float, biases: np.ndarray) -> float:
        rows = zip(scale * (2 * scores[:, nodes] + 1) + biases, labels, strict=True)
        return sum(
            log_softmax(row)[nodes.index(n)]
            for row, label in rows
            for n in TREE.path(label)
            if n in nodes
        )

    def posterior(parameters: np.ndarray, chosen: list[list[int]], mean: float) -> float:
        deviations = np.append((parameters[0] - mean) / mean, parameters[1:])
        prior = (deviations**2).sum() / (2 * calibration.PRIOR_STD**2)
        return prior - sum(log_likelihood(nodes, parameters[0], parameters[1:]) for nodes in chosen)

    fitted = fit_calibration(OnePathForm(TREE), 2 * scores + 1, None, labels)
    common = minimize(
        lambda a: posterior(np.array([a[0], 0.0]), TREE.decisions, 1), [1.0], method="BFGS"
    ).x[0]
    for nodes in TREE.decisions:
        start = np.array([common, *[0.0] * len(nodes)])
        bounds = [(0.05, 20), *[(None, None)] * len(nodes)]
        scale, *biases = minimize(
            posterior, start, ([nodes], common), bounds=bounds, options={"ftol": 1e-14}
        ).x
        assert [fitted.scales[node] for node in nodes] == pytest.approx(
            [scale] * len(nodes), abs=2e-3
        )
        assert [fitted.biases[node] for node in nodes] == pytest.approx(biases, abs=2e-3)


def test_the_nodes_have_the_map_estimate_of_their_probabilities():
    """Minimise the cross-entropy of P(node), a product over its path, numerically.

    No text has the nodes a and h.
    """
    given = np.random.default_rng(1).normal(0, 3, (60, TREE.num_nodes))
    labels = draw_labels(ManyNodesForm(TREE), given / 2 - 0.5)
    labels[:, [TREE.id(name) for name in "ahij"]] = 0
    levels = np.array(TREE.levels) - 1

    def prior(
        scales: np.ndarray, biases: np.ndarray, mean: float, level_biases: np.ndarray | float
    ) -> float:
        deviations = np.concatenate([(scales - mean) / mean, biases - level_biases])
        return (deviations**2).sum() / (2 * calibration.PRIOR_STD**2)

    def common_posterior(parameters: np.ndarray) -> float:
        parents = np.array([[1 if p < 0 else row[p] for p in TREE.parents] for row in labels])
        scale = parameters[:1]
        biases = parameters[1:]
        likelihood = log_expit(np.where(labels == 1, 1, -1) * (scale * given + biases[levels]))
        return prior(scale, biases, 1, 0) - likelihood[parents == 1].sum()

    def posterior(parameters: np.ndarray) -> float:
        scales, biases = np.split(parameters, 2)
        log_p = log_expit(scales * given + biases)
        log_p = np.stack(
            [log_p[:, TREE.path(node)].sum(1) for node in range(TREE.num_nodes)], axis=1
        )
        log_likelihood = np.where(labels == 1, log_p, np.log(-np.expm1(log_p))).sum()
        return prior(scales, biases, common, level_biases) - log_likelihood

    common, *biases = minimize(common_posterior, [1.0] + [0.0] * TREE.depth, method="BFGS").x
    level_biases = np.array(biases)[levels]
    start = [*[common] * TREE.num_nodes, *level_biases]
    expected = minimize(
        posterior, start, bounds=[(0.05, 20)] * 10 + [(None, None)] * 10, options={"ftol": 1e-14}
    ).x
    fitted = fit_calibration(ManyNodesForm(TREE), given, None, labels)
    np.testing.assert_allclose([*fitted.scales, *fitted.biases], expected, atol=2e-3)


@FORMS
def test_phrases_have_the_weight_of_greatest_posterior(form):
    parts = np.random.default_rng(2).normal(size=(3, 40, TREE.num_nodes))
    labels = torch.from_numpy(draw_labels(form, parts[0] + parts[1] + 2 * parts[2]))

    def neg_log_posterior(parameters: np.ndarray) -> float:
        biases = parameters[3:][np.array(TREE.levels) - 1]
        scores = torch.from_numpy(np.tensordot(parameters[:3], parts, 1) + biases)
        prior = ((parameters[:3] - [1, 0, 0]) ** 2).sum() + (parameters[3:] ** 2).sum()
        return -form.decisions.log_likelihood(scores, labels).sum().item() + 8 * prior

    start = [1, 0.1, 0.1] + [0] * TREE.depth
    found = minimize(neg_log_posterior, start, method="BFGS", options={"gtol": 1e-3})
    assert fit_phrases(form, *parts, labels.numpy()) == pytest.approx(
        found.x[2] / found.x[1], rel=1e-3
    )
    # without words, no phrases either
    assert fit_phrases(form, parts[0], -parts[1], parts[2], labels.numpy()) == 0


def test_the_prior_of_the_classes_counts_once():
    """Give encoder and lexical head independent evidence, and the same class prior in both.

    The posterior is known.
    """
    generator = np.random.default_rng(0)
    prior = np.array([0.9, 0.07, 0.03])
    labels = generator.choice(3, size=20_000, p=prior)
    one, other = (
        -((generator.normal(labels, 1)[:, None] - np.arange(3)) ** 2) / 2 for _ in range(2)
    )
    logits = np.log(prior) + one
    words = np.log(prior) + other
    posterior = log_softmax(np.log(prior) + one + other, axis=1)
    form = OnePathForm(Taxonomy(["a", "b", "c"]))
    log_prior = np.log(1000 * prior)

    def gap(number: int, **given: object) -> float:
        """Return the mean divergence from the true posterior, after calibration on the first
        rows.
        """
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
    # each text twice
    labels = draw_labels(form, scores)
    texts = np.arange(60) // 2

    def logits_of_splits(labels: np.ndarray, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        split = ScoredSplit(
            scores[rows], scores[rows], labels[rows], texts[rows], texts[rows], csr_matrix((60, 1))
        )
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
    np.testing.assert_array_equal(
        logits["test"], calibrated_logits(form.decisions, fitted, scores, None)
    )
    np.testing.assert_allclose(logits["validation"], logits["test"], atol=2.0)
    of_one = logits_of_splits(labels, slice(1))
    np.testing.assert_array_equal(of_one["validation"], of_one["test"])


@pytest.mark.parametrize("problem_type", [SINGLE_LABEL, MULTI_LABEL])
def test_the_model_itself_gives_the_calibrated_probabilities(problem_type):
    tree = ONLY
    config = HierarchicalConfig(
        text_config={"model_type": "bert", **TINY}, taxonomy=tree, problem_type=problem_type
    )
    model = HierarchicalForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.heads.weight, std=1.0)
    form = form_of(tree, problem_type)
    ids = torch.randint(5, 60, (7, 9))
    generator = np.random.default_rng(4)
    classes = form.decisions.num_classes
    lexical = {
        "idf": torch.rand(64),
        "weight": torch.randn(classes, 64),
        "bias": torch.randn(classes),
    }
    scales = generator.uniform(0.3, 3, tree.num_nodes)
    biases = generator.normal(size=tree.num_nodes)
    with torch.inference_mode():
        own = model(input_ids=ids).decision_logits.double().numpy()
        model.set_calibration(
            Calibration(lexical_weight=1.0, scales=[0.0] * tree.num_nodes), lexical
        )
        words = model.heads.lexical(ids, None).double().numpy()
        fitted = Calibration(lexical_weight=0.7, scales=scales.tolist(), biases=biases.tolist())
        model.set_calibration(fitted, lexical)
        after = model(input_ids=ids)
    if problem_type == SINGLE_LABEL:  # an inner node's lexical score is that of all leaves below
        words = np.column_stack(
            [logsumexp(words[:, below], axis=1) for below in tree.leaves_at_or_below]
        )
    expected = node_log_probs(form, scales * (own + 0.7 * words) + biases)
    np.testing.assert_allclose(after.node_log_probs.numpy(), expected, atol=1e-4)
    logits = calibrated_logits(form.decisions, fitted, own, words)
    np.testing.assert_allclose(after.logits.numpy(), logits, atol=1e-4)
    np.testing.assert_allclose(
        form.decisions.log_probs(torch.from_numpy(logits)).numpy(), expected, atol=1e-9
    )


# Prediction sets of one path


def antichains(tree: Taxonomy, node: int = -1) -> Iterator[list[int]]:
    """Yield all sets of nodes below a node, none of them below another, with no parent of an only
    child.
    """
    for parts in itertools.product(
        *([*antichains(tree, child), [child]] for child in tree.children(node))
    ):
        named = [one for part in parts for one in part]
        if not any(len(tree.children(one)) == 1 for one in named):
            yield named


def worth_of(
    under: list[list[int]], leaves: np.ndarray, cost: float, price: float, named: list[int]
) -> float:
    inside = [leaf for node in named for leaf in under[node]]
    if leaves.argmax() not in inside:
        return -math.inf
    return leaves[inside].sum() - cost * (len(inside) + price * len(named)) / (1 + price)


@pytest.mark.parametrize("tree", [TREE, ONLY])
@pytest.mark.parametrize("price", [0.0, 1.5, 8.0])
def test_sets_are_the_best_of_all_and_grow_and_nonconformity_is_the_smallest_threshold(tree, price):
    decisions = OnePath(tree)
    generator = np.random.default_rng(0)
    under = tree.leaves_at_or_below
    decisions.node_price = price
    candidates = [*antichains(tree)]
    for _ in range(10):
        leaves = generator.dirichlet(np.full(tree.num_leaves, 0.3))
        nodes = torch.tensor([[leaves[held].sum() for held in under]])
        every = torch.arange(tree.num_nodes)
        scores = decisions.nonconformity(nodes.expand(tree.num_nodes, -1), every).tolist()
        assert min(scores) == scores[leaves.argmax()] == 0
        before: set[int] = set()
        for threshold in sorted({0.0, *scores, *generator.random(20)}):
            predicted = decisions.prediction_sets(nodes, threshold)[0].nonzero().flatten().tolist()
            held = [leaf for node in predicted for leaf in under[node]]
            assert len(held) == len(set(held))

            worth = functools.partial(worth_of, under, leaves, 1 - threshold, price)
            assert worth(predicted) == pytest.approx(max(map(worth, candidates)), abs=1e-12)
            if price == 0:  # least ambiguous sets
                assert set(held) == {leaves.argmax(), *np.flatnonzero(leaves >= 1 - threshold)}
            assert before <= set(held)
            before = set(held)
            assert [set(under[node]) <= before for node in every] == [
                score <= threshold for score in scores
            ]


def test_thresholds_are_the_ranks_of_split_conformal_prediction():
    logits, labels = drawn(OnePathForm(TREE), 9)
    nodes = OnePath(TREE).log_probs(torch.from_numpy(logits)).exp()
    scores = sorted(OnePath(TREE).nonconformity(nodes, torch.from_numpy(labels)).tolist())
    # each text twice: the greater score counts
    twice = np.tile(logits, (2, 1))
    other = np.append(labels, logits.argmax(axis=1))
    thresholds = OnePathForm(TREE).fit_sets(twice, other, np.tile(np.arange(9), 2))[
        "set_thresholds"
    ]
    assert len(thresholds) == 99

    def threshold(coverage: float) -> float:
        return guaranteed_threshold("coverage", coverage, Calibration(set_thresholds=thresholds))

    # ranks of (9 + 1) · coverage, both rounded up
    for coverage, rank in ((0.9, 9), (0.5, 5), (1e-9, 1), (0.501, 6), (0.895, 9)):
        assert threshold(coverage) == scores[rank - 1]
        assert threshold(coverage) == round(threshold(coverage), 6)
    assert thresholds[90:] == [None] * 9
    with pytest.raises(ValueError, match=r"coverage 0\.901 needs 11 labelled validation texts"):
        threshold(0.901)
    for wrong in (0, 1, 1.5, "0.9"):
        with pytest.raises(
            ValueError, match=r"coverage must be a number above 0 and at most 0\.99"
        ):
            threshold(wrong)
    HierarchicalConfig(taxonomy=TREE, calibration=Calibration(set_thresholds=thresholds))


def test_sets_have_the_requested_coverage_if_labels_are_inner_nodes():
    logits, labels = drawn(OnePathForm(TREE), 4000)
    form = OnePathForm(TREE)
    texts = np.arange(2000)
    known = labels.copy()
    generator = np.random.default_rng(2)
    inside = np.isin(labels, TREE.leaves_at_or_below[TREE.id("b")])
    known[inside & (generator.random(len(labels)) < 0.8)] = TREE.id("b")
    threshold = form.thresholds_of(form.set_scores(logits[:2000], known[:2000], texts))[79]
    of_known, of_leaves = (
        form.predict_sets(logits[2000:], truth[2000:], texts, threshold).scores()["coverage"]
        for truth in (known, labels)
    )
    assert of_known == pytest.approx(0.8, abs=0.025)
    assert of_leaves >= of_known


def test_a_coverage_is_refused_with_a_tokenizer_of_another_limit(clear_checkpoint):
    classify = pipeline(
        "hierarchical-text-classification", model=clear_checkpoint, trust_remote_code=True
    )
    text = f"We treated {CLEAR['neoplasms'][0]}."
    assert "prediction_set" not in classify(text, max_length=32)
    with pytest.raises(ValueError, match="coverage needs texts truncated at 128 tokens"):
        classify(text, coverage=0.9, max_length=32)
    classify.tokenizer.model_max_length = 96
    with pytest.raises(ValueError, match="coverage needs texts truncated at 128 tokens"):
        classify(text, coverage=0.9)
    # trained at 64, under a tokenizer that takes 96
    classify.model.config.calibration.max_length = 64
    with pytest.raises(ValueError, match="truncated at 64 tokens"):
        classify(text, coverage=0.9)
    assert "prediction_set" in classify(text, coverage=0.9, max_length=64)
