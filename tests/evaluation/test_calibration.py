"""Test calibration: temperatures and biases against drawn labels and the model itself, thresholds against their definition."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch
from conftest import CLEAR
from datasets import Dataset, DatasetDict
from scipy.optimize import brentq
from scipy.special import log_softmax, softmax
from transformers import AutoTokenizer, BertConfig, pipeline

from configuration_hierarchical import HierarchicalConfig
from evaluation.calibration import (
    PRIOR_STD,
    Calibration,
    calibrate_out_of_fold,
    coverage_scores,
    fit_calibration,
    fit_conformal_thresholds,
    node_log_probs,
    nonconformity_scores,
    rows_by_decision,
)
from evaluation.report import calibrate_model
from modeling_hierarchical import HierarchicalForSequenceClassification
from pipeline_hierarchical import (
    MAX_ANSWER_NODES,
    conformal_answer,
    guaranteed_threshold,
    nonconformity,
    threshold_index,
)
from taxonomy_hierarchical import Taxonomy

TREE = Taxonomy(["a", {"b": ["c", "d", {"e": ["f", "g"]}]}, {"h": ["i", "j"]}])
ONLY = Taxonomy(
    ["a", {"b": ["c"]}, {"d": {"e": {"f": ["g", "h"]}}}, {"i": [{"j": ["k", "l"]}, {"m": ["n"]}]}]
)  # only children
MANY = Taxonomy({f"parent {i}": {f"{i} {j}": [f"{i} {j} {k}" for k in range(3)] for j in range(3)} for i in range(4)})
TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}


def drawn(
    tree: Taxonomy, temperatures: list[float], rows: int, seed: int = 0, biases: np.ndarray | float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw leaf logits of a model, and labels for which these temperatures and biases (num_nodes,) are correct."""
    generator, biases = np.random.default_rng(seed), np.broadcast_to(biases, tree.num_nodes)
    scores = generator.normal(scale=2, size=(rows, tree.num_nodes))
    conditional, correct = np.zeros_like(scores), np.zeros_like(scores)
    for nodes, temperature in zip(tree.decisions, temperatures, strict=True):
        conditional[:, nodes] = log_softmax(scores[:, nodes], axis=1)
        correct[:, nodes] = log_softmax(scores[:, nodes] / temperature + biases[nodes], axis=1)
    leaves = [tree.path(leaf) for leaf in range(tree.num_leaves)]
    logits = np.column_stack([conditional[:, path].sum(1) for path in leaves])
    chances = np.exp(np.column_stack([correct[:, path].sum(1) for path in leaves]))
    return logits, np.array([generator.choice(tree.num_leaves, p=row / row.sum()) for row in chances])


@pytest.mark.parametrize("tree", [TREE, ONLY, MANY], ids=["tree", "only", "many"])
def test_a_decision_has_the_rows_whose_path_takes_it(tree):
    labels = np.random.default_rng(0).integers(tree.num_nodes, size=100)
    found = [*rows_by_decision(tree, labels)]
    assert [nodes for nodes, _, _ in found] == tree.decisions
    for nodes, rows, correct in found:
        taken = [(row, node) for row, label in enumerate(labels) for node in tree.path(label) if node in nodes]
        assert [(row, nodes[child]) for row, child in zip(rows, correct, strict=True)] == taken * (len(nodes) > 1)


def fitted(tree: Taxonomy, logits: np.ndarray, labels: np.ndarray) -> list[float]:
    return fit_calibration(tree, logits, None, labels).temperatures


def test_the_fit_recovers_the_true_temperatures_and_biases():
    temperatures, biases = [2.0, 0.5, 3.0, 1.0], np.random.default_rng(1).normal(scale=0.5, size=TREE.num_nodes)
    for nodes in TREE.decisions:
        biases[nodes] -= biases[nodes].mean()  # a constant changes no softmax
    logits, labels = drawn(TREE, temperatures, 20_000, biases=biases)
    calibration = fit_calibration(TREE, logits, None, labels)
    assert calibration.temperatures == pytest.approx(temperatures, rel=0.1)
    assert calibration.node_biases == pytest.approx(biases.tolist(), abs=0.1)
    assert fit_calibration(TREE, logits, None, labels, bias_prior=0).node_biases == [0.0] * TREE.num_nodes


def test_the_fit_does_not_depend_on_the_order_of_the_nodes():
    """Compare taxonomies in two orders. A leaf after an inner node has a lower id, but a later place in reading order."""
    other = Taxonomy([{"b": [{"e": ["f", "g"]}, "c", "d"]}, {"h": ["i", "j"]}, "a"])
    logits, labels = drawn(TREE, [2.0, 0.5, 3.0, 1.0], 2000)
    leaves = [TREE.id(label) for label in other.labels[: other.num_leaves]]
    renamed = np.array([other.id(label) for label in TREE.labels])[labels]
    temperatures = fitted(other, logits[:, leaves], renamed)
    expected = fitted(TREE, logits, labels)
    by_parent = {TREE.labels[TREE.num_leaves + i]: t for i, t in enumerate(expected[1:])}
    assert temperatures[0] == pytest.approx(expected[0], rel=1e-3)
    for i, temperature in enumerate(temperatures[1:]):
        assert temperature == pytest.approx(by_parent[other.labels[other.num_leaves + i]], rel=1e-3)


def test_the_fit_recovers_the_true_lexical_weight():
    generator = np.random.default_rng(0)
    logits, words = (generator.normal(scale=2, size=(20_000, TREE.num_leaves)) for _ in range(2))
    chances = np.exp(Calibration(0.7, [1.5] * 4, [0.0] * TREE.num_nodes).apply(TREE, logits, words))
    labels = np.array([generator.choice(len(row), p=row / row.sum()) for row in chances])
    calibration = fit_calibration(TREE, logits, words, labels)
    assert calibration.lexical_weight == pytest.approx(0.7, rel=0.1)
    assert calibration.temperatures == pytest.approx([1.5] * 4, rel=0.1)
    # lexical scores that contradict the labels get no weight
    assert fit_calibration(TREE, logits, -words, labels).lexical_weight == 0
    assert fit_calibration(TREE, logits, None, labels).lexical_weight == 0
    logits, labels = drawn(TREE, [1.5] * 4, 20_000)
    assert fit_calibration(TREE, logits, words, labels).lexical_weight < 0.05


def test_the_prior_of_the_classes_counts_once():
    """Give encoder and lexical head independent evidence, and the same class prior in both. The posterior is known."""
    generator, prior = np.random.default_rng(0), np.array([0.9, 0.07, 0.03])
    labels = generator.choice(3, size=20_000, p=prior)
    one, other = (-((generator.normal(labels, 1)[:, None] - np.arange(3)) ** 2) / 2 for _ in range(2))
    logits, words = np.log(prior) + one, np.log(prior) + other
    posterior = log_softmax(np.log(prior) + one + other, axis=1)
    tree, log_prior = Taxonomy(["a", "b", "c"]), np.log(1000 * prior)

    def gap(number: int, **given: object) -> float:
        """Return the mean divergence from the true posterior, after calibration on the first rows."""
        calibration = fit_calibration(tree, logits[:number], words[:number], labels[:number], **given)
        calibrated = calibration.apply(tree, logits, words)
        return float((np.exp(posterior) * (posterior - calibrated)).sum(1).mean())

    assert gap(20_000, log_prior=log_prior) < 0.001
    assert gap(100, log_prior=log_prior) < gap(100) / 2


def test_rows_are_scored_by_a_calibration_that_has_not_seen_their_text():
    logits, labels = drawn(TREE, [2.0] * 4, 300)
    scores, texts = np.random.default_rng(1).normal(size=logits.shape), np.arange(300) // 2  # each text twice
    calibrated_logits = calibrate_out_of_fold(fit_calibration, TREE, logits, scores, labels, texts)
    other_labels = labels.copy()
    other_labels[:2] = (labels[:2] + 1) % TREE.num_leaves  # the first text is labelled otherwise
    again = calibrate_out_of_fold(fit_calibration, TREE, logits, scores, other_labels, texts)
    np.testing.assert_array_equal(calibrated_logits[:2], again[:2])
    changed = np.flatnonzero((calibrated_logits != again).any(axis=1))
    assert len(changed) == 240  # four fifths: the first text took part in their fits
    everything = fit_calibration(TREE, logits, scores, labels).apply(TREE, logits, scores)
    np.testing.assert_allclose(calibrated_logits, everything, atol=1.0)


def test_scores_of_validation_rows_are_not_optimistic():
    """Compare the log loss of 60 validation rows with fresh rows, as the change by calibration; mean of 30 draws."""
    config = HierarchicalConfig(taxonomy=TREE, text_config=BertConfig(**TINY).to_dict())
    model = HierarchicalForSequenceClassification(config)
    logits, labels = drawn(TREE, [1.0] * 4, 3000)

    def log_loss(rows: np.ndarray) -> float:
        return float(-log_softmax(logits[rows], axis=1)[np.arange(len(rows)), labels[rows]].mean())

    gaps = []
    for seed in range(30):
        order = np.random.default_rng(seed).permutation(len(labels))
        rows = {"validation": order[:60], "test": order[60:1060]}
        splits = DatasetDict(
            {split: Dataset.from_dict({"labels": labels[some], "text_id": some}) for split, some in rows.items()}
        )
        known = {split: logits[some] for split, some in rows.items()}
        metrics, _ = calibrate_model(model, None, known, splits, 512)
        before = log_loss(rows["validation"]) - log_loss(rows["test"])
        gaps.append(metrics["eval_log_loss"] - metrics["test_log_loss"] - before)
    assert np.mean(gaps) == pytest.approx(0, abs=0.015)  # by the fit to these very rows, -0.035


def test_the_fit_solves_the_map_equations():
    """Check the MAP equations for n binary decisions, each correct by a margin m, with β ~ N(1, s²), biases ±b and b ~ N(0, t²).

    Without biases: n · m / (1 + exp(β · m)) = (β - 1) / s². Then with biases: n / (1 + exp(β · m + 2 b)) = b / t² = (β - β₁) / (m s²).
    """
    tree, n, m, s, t = Taxonomy(["a", "b"]), 40, 1.5, 0.25, 0.2
    found = fit_calibration(tree, np.tile([m, 0.0], (n, 1)), None, np.zeros(n, dtype=int), prior=s, bias_prior=t)
    common = brentq(lambda factor: n * m / (1 + np.exp(factor * m)) - (factor - 1) / s**2, 1, 20)
    bias = brentq(lambda b: n / (1 + np.exp((common + b * m * s**2 / t**2) * m + 2 * b)) - b / t**2, 0, 20)
    assert found.node_biases == pytest.approx([bias, -bias], rel=1e-3)
    assert 1 / found.temperatures[0] == pytest.approx(common + bias * m * s**2 / t**2, rel=1e-3)


def test_a_decision_without_rows_takes_the_temperature_of_all():
    logits, labels = drawn(TREE, [2.0] * 4, 1200)
    taken = ~np.isin(labels, TREE.leaves_at_or_below[TREE.id("h")])
    temperatures = fitted(TREE, logits[taken], labels[taken])
    assert len(set(temperatures)) == 4
    assert temperatures[-1] == pytest.approx(2.0, rel=0.2)


def test_few_rows_or_only_correct_rows_do_little_harm():
    """Measure a calibrated model on fresh rows: maximum likelihood on few rows makes it overconfident."""
    logits, labels = drawn(TREE, [1.0] * 4, 6000)
    words = np.random.default_rng(1).normal(size=logits.shape)

    order = np.random.default_rng(2).permutation(len(labels))
    known, rest = order[:1000], order[1000:]

    def log_loss(calibration: Calibration) -> float:
        log_probs = calibration.apply(TREE, logits[rest], words[rest])
        return float(-log_probs[np.arange(len(rest)), labels[rest]].mean())

    def harm(rows: np.ndarray, prior: float) -> float:
        return log_loss(fit_calibration(TREE, logits[rows], words[rows], labels[rows], prior=prior)) - untouched

    untouched = log_loss(Calibration(0.0, [1.0] * 4, [0.0] * TREE.num_nodes))
    correct = known[logits[known].argmax(1) == labels[known]]
    for rows in (known[:10], known[:30], known[:100]):
        assert harm(rows, PRIOR_STD) < min(0.05, harm(rows, np.inf))
    for rows in (correct[:10], correct[:30], correct[:100]):
        assert harm(rows, PRIOR_STD) < harm(rows, np.inf) / 5
    assert fit_calibration(TREE, logits[:0], words[:0], labels[:0]).temperatures == pytest.approx([1.0] * 4, abs=1e-4)


def test_the_model_itself_gives_the_calibrated_probabilities():
    torch.manual_seed(0)
    config = HierarchicalConfig(text_config={"model_type": "bert", **TINY}, taxonomy=TREE)
    model = HierarchicalForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.heads.weight, std=1.0)
    ids = torch.randint(5, 60, (7, 9))
    with torch.inference_mode():
        before = model(input_ids=ids).logits.double().numpy()
        calibration = Calibration(0.0, [0.5, 2.0, 3.0, 0.7], torch.randn(TREE.num_nodes).tolist())
        model.set_calibration(temperatures=calibration.temperatures, node_biases=calibration.node_biases)
        after = model(input_ids=ids)
    expected = calibration.apply(TREE, before, None)
    np.testing.assert_allclose(after.logits.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(after.node_log_probs.numpy(), node_log_probs(TREE, expected), atol=1e-5)
    untouched = Calibration(0.0, [1.0] * 4, [0.0] * TREE.num_nodes)
    np.testing.assert_allclose(untouched.apply(TREE, before, None), before, atol=1e-6)


@pytest.mark.parametrize("tree", [TREE, ONLY, MANY])
def test_calibrated_probabilities_are_products_of_each_decision_by_itself(tree):
    """Compare with one softmax per decision, over sums of leaf probabilities."""
    generator = np.random.default_rng(4)
    logits, words = (generator.normal(scale=5, size=(6, tree.num_leaves)) for _ in range(2))
    temperatures, biases = generator.uniform(0.3, 3, len(tree.decisions)), generator.normal(size=tree.num_nodes)
    below = np.array([[leaf in leaves for leaf in range(tree.num_leaves)] for leaves in tree.leaves_at_or_below])
    encoder, lexical = (np.log(softmax(scores, axis=1) @ below.T) for scores in (logits, words))
    conditional = np.zeros_like(encoder)
    for nodes, temperature in zip(tree.decisions, temperatures, strict=True):
        scores = (encoder + 0.7 * lexical)[:, nodes] / temperature + biases[nodes]
        conditional[:, nodes] = log_softmax(scores, axis=1)
    expected = np.column_stack([conditional[:, tree.path(leaf)].sum(axis=1) for leaf in range(tree.num_leaves)])
    np.testing.assert_allclose(node_log_probs(tree, logits), encoder, atol=1e-12)
    calibration = Calibration(0.7, temperatures.tolist(), biases.tolist())
    np.testing.assert_allclose(calibration.apply(tree, logits, words), expected, atol=1e-12)


@pytest.mark.parametrize("tree", [TREE, MANY, ONLY])
def test_nonconformity_is_the_smallest_threshold_whose_answer_holds_the_leaf(tree):
    generator, under = np.random.default_rng(0), tree.leaves_at_or_below
    for _ in range(40):
        leaves = generator.dirichlet(np.full(tree.num_leaves, 0.3))
        nodes = [float(sum(leaves[leaf] for leaf in held)) for held in under]
        scores = [nonconformity(tree, nodes, leaf) for leaf in range(tree.num_leaves)]
        assert min(scores) == 0
        assert scores[int(leaves.argmax())] == 0
        before: set[int] = set()
        for threshold in sorted({0.0, *scores, *generator.random(20), 1.0}):
            answer = conformal_answer(tree, nodes, threshold)
            held = [leaf for node in answer for leaf in under[node]]
            assert len(held) == len(set(held))  # no node beside its ancestor
            assert len(answer) <= MAX_ANSWER_NODES or {tree.path(node)[0] for node in answer} == set(tree.children(-1))
            assert all(len(tree.children(node)) != 1 for node in answer)
            for inner in under[tree.num_leaves :]:  # a completely covered subtree is one node
                assert not set(inner) <= set(held) or sum(set(under[node]) <= set(inner) for node in answer) <= 1
            assert set(held) == {leaf for leaf in range(tree.num_leaves) if scores[leaf] <= threshold}
            assert before <= set(held)
            before = set(held)
        assert len(before) == tree.num_leaves
        for node in range(tree.num_leaves, tree.num_nodes):
            assert nonconformity(tree, nodes, node) == max(scores[leaf] for leaf in under[node])


def labels_of_answer(tree: Taxonomy, threshold: float, **leaves: float) -> list[str]:
    nodes = [sum(leaves.get(tree.labels[leaf], 0) for leaf in held) for held in tree.leaves_at_or_below]
    return [tree.labels[node] for node in conformal_answer(tree, nodes, threshold)]


def test_answers_are_as_deep_as_the_model_is_sure():
    answer = partial(labels_of_answer, TREE)
    assert answer(0.5, c=0.9, d=0.1) == ["c"]
    assert answer(0.9, c=0.7, d=0.3) == ["c", "d"]
    assert answer(0.9, f=0.4, g=0.5, c=0.1) == ["e", "c"]  # f and g are all of e
    assert answer(0.9, c=0.4, d=0.3, f=0.2, g=0.1) == ["b"]  # four leaves are three nodes, which are all of b
    assert answer(0.9, a=0.31, c=0.29, i=0.2, j=0.2) == ["h", "a", "b"]  # four leaves on three levels: their roots


def test_an_only_child_is_not_answered_by_its_parent():
    answer = partial(labels_of_answer, ONLY)
    assert answer(0.5, c=0.98, g=0.02) == ["c"]
    assert answer(0.9, c=0.6, n=0.4) == ["c", "n"]
    assert answer(0.9, g=0.6, h=0.4) == ["f"]  # e and d are answered by their only child
    assert answer(0.9, k=0.4, l=0.3, n=0.3) == ["i"]  # all that is below j and m


def test_thresholds_are_the_ranks_of_split_conformal_prediction():
    logits, labels = drawn(TREE, [1.0] * 4, 9)
    scores = nonconformity_scores(TREE, logits, labels, np.arange(9))
    assert len(scores) == 9
    thresholds = fit_conformal_thresholds(TREE, logits, labels, np.arange(9))
    assert len(thresholds) == 99

    def threshold(coverage: float) -> float:
        return guaranteed_threshold("coverage", coverage, thresholds)

    # ranks of (9 + 1) · coverage, both rounded up
    for coverage, rank in ((0.9, 9), (0.5, 5), (1e-9, 1), (0.501, 6), (0.895, 9)):
        assert scores[rank - 1] <= threshold(coverage) < scores[rank - 1] + 1e-6
        assert threshold(coverage) == round(threshold(coverage), 6)
    assert thresholds[90:] == [None] * 9
    with pytest.raises(ValueError, match=r"coverage 0\.901 needs 11 labelled validation texts"):
        threshold(0.901)
    for wrong in (0, 1, 1.5, "0.9"):
        with pytest.raises(ValueError, match=r"coverage must be a number above 0 and at most 0\.99"):
            threshold(wrong)
    HierarchicalConfig(taxonomy=TREE, conformal_thresholds=thresholds)


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
def test_answers_have_the_requested_coverage(coverage):
    logits, labels = drawn(MANY, [1.0] * 17, 1200)
    held, generator = [], np.random.default_rng(1)
    for _ in range(30):
        order = generator.permutation(len(labels))
        validation, test = order[:600], order[600:]
        thresholds = fit_conformal_thresholds(MANY, logits[validation], labels[validation], validation)
        held.append(
            coverage_scores(MANY, logits[test], labels[test], test, thresholds[threshold_index(coverage)])["coverage"]
        )
    assert np.mean(held) == pytest.approx(coverage, abs=0.02)


def test_answers_have_the_requested_coverage_if_some_labels_are_inner_nodes():
    logits, labels = drawn(TREE, [1.0] * 4, 4000)
    known, generator = labels.copy(), np.random.default_rng(2)
    inside = np.isin(labels, TREE.leaves_at_or_below[TREE.id("b")])
    known[inside & (generator.random(len(labels)) < 0.8)] = TREE.id("b")
    thresholds = fit_conformal_thresholds(TREE, logits[:2000], known[:2000], np.arange(2000))
    for truth in (labels, known):
        measured = coverage_scores(TREE, logits[2000:], truth[2000:], np.arange(2000), thresholds[79])
        assert measured["coverage"] > 0.78


@pytest.mark.parametrize("others", [0, 30])
@pytest.mark.parametrize("one_label", [True, False])
def test_texts_that_are_repeated_do_not_break_the_coverage(others, one_label):
    """Repeat three validation texts twenty times each, among other texts. New texts have any of the repeated texts' labels."""
    logits, labels = drawn(MANY, [1.0] * 17, 2000)
    chances, generator = np.exp(log_softmax(logits, axis=1)), np.random.default_rng(3)
    under = MANY.leaves_at_or_below
    nodes = [[float(sum(row[leaf] for leaf in held)) for held in under] for row in chances]
    scores = np.array([nonconformity(MANY, row, label) for row, label in zip(nodes, labels.tolist(), strict=True)])
    held = []
    for _ in range(150):
        order = generator.permutation(len(labels))
        known, new = order[: 3 + others], order[3 + others :]
        texts = np.concatenate([np.repeat(known[:3], 20), known[3:]])
        row_labels = labels[texts]
        if not one_label:
            row_labels = np.array([generator.choice(MANY.num_leaves, p=chances[text]) for text in texts])
        threshold = fit_conformal_thresholds(MANY, logits[texts], row_labels, texts)[89]
        held.append(np.mean(scores[new] <= (1 if threshold is None else threshold)))
    assert np.mean(held) > 0.89


def test_a_repeated_text_counts_once_in_the_measured_coverage():
    """Score three texts: one twenty times and not covered, one covered, one covered for one of two labels."""
    leaves = np.full((23, TREE.num_leaves), 1e-9)
    leaves[:, TREE.id("c")] = 1
    labels = np.array([TREE.id("a")] * 20 + [TREE.id("c"), TREE.id("c"), TREE.id("d")])
    texts = np.array([5] * 20 + [6, 7, 7])
    measured = coverage_scores(TREE, np.log(leaves), labels, texts, 0.0)
    assert measured == {"coverage": pytest.approx(1 / 3), "leaves": 1, "nodes": 1, "single_leaf": 1}


def calibrated(checkpoint: str, **arguments):
    return pipeline("hierarchical-text-classification", model=checkpoint, trust_remote_code=True, **arguments)


def never() -> Iterator[str]:
    raise AssertionError("a text was read")
    yield ""


def test_a_coverage_is_refused_at_another_truncation_than_its_thresholds(clear_checkpoint):
    text, message = f"We treated {CLEAR['neoplasms'][0]}.", "coverage needs texts truncated at 128 tokens"
    classify, guaranteed = calibrated(clear_checkpoint), calibrated(clear_checkpoint, coverage=0.9)
    expected = classify(text, coverage=0.9)
    assert classify(text, coverage=0.9, max_length=128) == expected
    for cutting in {"stride": 0}, {"stride": 16}, {"max_length": 32}, {"max_length": 64, "stride": 16}:
        assert "answer" not in classify(text, **cutting)
        with pytest.raises(ValueError, match=message):
            classify(never(), coverage=0.9, **cutting)
        with pytest.raises(ValueError, match=message):
            guaranteed(never(), **cutting)
        with pytest.raises(ValueError, match=message):
            calibrated(clear_checkpoint, **cutting)(never(), coverage=0.9)
    assert calibrated(clear_checkpoint, coverage=0.9, max_length=32)(text, max_length=128) == expected


def test_a_coverage_is_refused_with_a_tokenizer_of_another_limit(clear_checkpoint):
    text = f"We treated {CLEAR['neoplasms'][0]}."
    classify = calibrated(clear_checkpoint)
    expected = classify(text, coverage=0.9)
    tokenizer = AutoTokenizer.from_pretrained(clear_checkpoint, trust_remote_code=True, model_max_length=64)
    shorter = calibrated(clear_checkpoint, tokenizer=tokenizer)
    assert shorter(text)["label"] == expected["label"]
    with pytest.raises(ValueError, match=r"coverage needs texts truncated at 128 tokens"):
        shorter(never(), coverage=0.9)
    classify.tokenizer.model_max_length = 96
    with pytest.raises(ValueError, match=r"truncated at 128 tokens"):
        classify(never(), coverage=0.9)
    classify.model.config.conformal_max_length = 64  # trained at 64, under a tokenizer that takes 96
    with pytest.raises(ValueError, match=r"truncated at 64 tokens"):
        classify(never(), coverage=0.9)
    assert classify(text, coverage=0.9, max_length=64)["answer"] == expected["answer"]
