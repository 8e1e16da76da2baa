"""Compare the lexical head with scikit-learn, and its effect in the model with the definition."""

import math
import statistics

import datasets
import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import cosine_similarity

from decisions_hierarchical import ManyNodes, OnePath
from hierarchical_clinicalbert.evaluation import lexical
from hierarchical_clinicalbert.evaluation.forms import ManyNodesForm, OnePathForm
from hierarchical_clinicalbert.evaluation.metrics import one_hot
from hierarchical_clinicalbert.training.score import token_counts
from modeling_hierarchical import LexicalHead
from taxonomy_hierarchical import Taxonomy

TREE = Taxonomy(["a", {"b": ["c", "d", {"e": ["f", "g"]}]}])
VOCABULARY = 60


def rows(
    count: int, seed: int = 0, leaves: int = TREE.num_leaves, several: bool = False
) -> datasets.Dataset:
    """Draw texts of 3 to 30 tokens, with the tokens 2i and 2i + 1 more frequent in texts of leaf i.

    The ``labels`` are a leaf of each text, or with ``several`` which nodes it has.
    """
    generator = np.random.default_rng(seed)
    has = (
        generator.random((count, leaves)) < 0.4
        if several
        else one_hot(generator.integers(leaves, size=count), leaves)
    )
    ids = []
    for of_text in has:
        odds = 1 + 3 * np.repeat(np.pad(of_text, (0, VOCABULARY // 2 - leaves)), 2)
        ids.append(
            generator.choice(
                VOCABULARY, size=generator.integers(3, 31), p=odds / odds.sum()
            ).tolist()
        )
    below = [[leaf for leaf in of_node if leaf < leaves] for of_node in TREE.leaves_at_or_below]
    nodes = np.column_stack([has[:, of_node].any(axis=1) for of_node in below]).astype(np.int8)
    return datasets.Dataset.from_dict(
        {"input_ids": ids, "labels": nodes if several else has.argmax(axis=1)}
    )


def classifier_of(rows: datasets.Dataset, tree: Taxonomy = TREE) -> lexical.LeafClassifier:
    return lexical.LeafClassifier(
        OnePath(tree), token_counts(rows, VOCABULARY), np.array(rows["labels"])
    )


def features(train: np.ndarray, counts: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Return TF-IDF times the spread, of length 1, from counts of tokens (num_rows, V).

    The IDF is of the training rows.
    """
    weighed = (
        TfidfTransformer(sublinear_tf=True, norm=None).fit(train).transform(counts).toarray()
        * spread
    )
    return weighed / np.linalg.norm(weighed, axis=1, keepdims=True)


def counted(rows: datasets.Dataset) -> np.ndarray:
    return np.array([np.bincount(ids, minlength=VOCABULARY) for ids in rows["input_ids"]])


def padded(ids: list[list[int]]) -> dict[str, torch.Tensor]:
    """Pad token ids with tokens that the mask hides."""
    length = max(map(len, ids))
    return {
        "input_ids": torch.tensor([one + [7] * (length - len(one)) for one in ids]),
        "attention_mask": torch.tensor([[1] * len(one) + [0] * (length - len(one)) for one in ids]),
    }


@pytest.mark.parametrize("leaves", [2, TREE.num_leaves])
def test_the_head_is_scikit_learns_logistic_regression_over_weighted_tf_idf(leaves):
    train = rows(300, leaves=leaves)
    unseen = rows(40, seed=1)
    # the token 58 is in one row, so it is ignored, and 59 is in two
    ids = [
        [token for token in one if token < 58] + [58] * (i < 1) + [59] * (i < 2)
        for i, one in enumerate(train["input_ids"])
    ]
    train = datasets.Dataset.from_dict({"input_ids": ids, "labels": train["labels"][:]})
    counts = counted(train)
    others = counted(unseen)
    labels = np.array(train["labels"])
    common = (counts > 0).sum(0) >= 2
    spread = lexical.log_odds_variance(csr_matrix(counts[:, common] > 0), one_hot(labels, leaves))
    given, asked = (
        features(counts[:, common], of_rows[:, common], spread) for of_rows in (counts, others)
    )
    model = LogisticRegression(C=50, max_iter=1000, tol=1e-3).fit(given, labels)

    # rows labelled with an inner node do not affect the fit
    with_inner = datasets.concatenate_datasets(
        [train, rows(50, seed=2).map(lambda _: {"labels": TREE.id("b")}).cast(train.features)]
    )
    classifier = classifier_of(with_inner)
    ours = LexicalHead.of_weights(**classifier.weights())
    scores = ours(**padded(unseen["input_ids"]))
    np.testing.assert_allclose(
        scores[:, :leaves].softmax(1).numpy(), model.predict_proba(asked), atol=2e-3
    )
    np.testing.assert_allclose(
        classifier.scores(token_counts(unseen, VOCABULARY)), scores.numpy(), atol=1e-4
    )


def test_each_node_has_scikit_learns_logistic_regression_over_its_open_rows():
    train = rows(300, several=True)
    unseen = rows(30, seed=1)
    counts = counted(train)
    labels = np.array(train["labels"])
    labels[:, TREE.id("f")] = 0
    labels[labels[:, TREE.id("b")] == 1, TREE.id("c")] = 1
    classifier = lexical.NodeClassifier(ManyNodes(TREE), token_counts(train, VOCABULARY), labels)
    spread = lexical.log_odds_variance(csr_matrix(counts > 0), labels)
    given, asked = (features(counts, of_rows, spread) for of_rows in (counts, counted(unseen)))
    scores = classifier.scores(token_counts(unseen, VOCABULARY))
    for node, parent in enumerate(TREE.parents):
        is_open = np.ones(300, dtype=bool) if parent < 0 else labels[:, parent] == 1
        truth = labels[is_open, node]
        if len({*truth}) < 2:  # f is never true, and c always below b: they have no lexical scores
            assert node in map(TREE.id, "fc")
            assert not scores[:, node].any()
            continue
        model = LogisticRegression(C=50, max_iter=1000).fit(given[is_open], truth)
        prior = math.log((truth.sum() + 0.5) / ((1 - truth).sum() + 0.5))
        np.testing.assert_allclose(
            scores[:, node], model.decision_function(asked) - prior, atol=0.05
        )
    ours = LexicalHead.of_weights(**classifier.weights())
    np.testing.assert_allclose(ours(**padded(unseen["input_ids"])).numpy(), scores, atol=1e-4)


def test_leaves_without_rows_share_the_prior_of_one_row():
    tree = Taxonomy(["a", {"b": ["c", "d", *(f"never {i}" for i in range(300))]}])
    train = rows(300, leaves=3)
    odds = np.exp(classifier_of(train, tree).scores(token_counts(train, VOCABULARY)))
    assert (odds[:, 3:].sum(1) / odds[:, :3].sum(1)).mean() == pytest.approx(1 / 301)


@pytest.mark.parametrize("several", [False, True])
def test_a_phrase_is_a_document_of_its_class_and_a_direction_of_its_weights(several):
    form = (ManyNodesForm if several else OnePathForm)(TREE)
    train = rows(90, several=several)
    unseen = rows(20, seed=1)
    classes = form.decisions.num_classes
    phrases = np.array(
        [np.bincount([2 * node, 2 * node + 1], minlength=VOCABULARY) for node in range(classes)]
    )
    counts = counted(train)
    labels = np.array(train["labels"])
    found = form.fit_classifier(csr_matrix(counts), labels, phrases=csr_matrix(phrases))
    paths = [[node in TREE.path(phrase) for node in range(classes)] for phrase in range(classes)]
    with_phrases = np.concatenate(
        [labels, np.array(paths, dtype=int) if several else np.arange(classes)]
    )
    expected = form.classifier(
        form.decisions, csr_matrix(np.concatenate([counts, phrases])), with_phrases
    )
    texts = token_counts(unseen, VOCABULARY)
    before = found.scores(texts)
    np.testing.assert_allclose(before, expected.scores(texts))

    cosines = cosine_similarity(
        *(texts @ np.diag(expected.tfidf.idf_) for texts in logarithmic(counted(unseen), phrases))
    )
    found.add_phrases(0.5)
    np.testing.assert_allclose(found.scores(texts) - before, 50 * cosines)
    of_phrases = form.decisions.of_classes(torch.from_numpy(100 * cosines)).numpy()
    np.testing.assert_allclose(found.phrase_scores(texts), of_phrases)


def logarithmic(*counts: np.ndarray) -> list[np.ndarray]:
    return [np.where(of_rows > 0, 1 + np.log(np.maximum(of_rows, 1)), 0) for of_rows in counts]


def test_a_token_is_weighted_by_how_differently_the_classes_use_it():
    present = csr_matrix(
        np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 1], [1, 1, 1], [1, 0, 0]])
    )
    labels = np.array([0, 0, 2, 2, 4, 4])
    # of 2 and 4 documents the second token is in 1 and 2, with one more of each kind: odds of 1;
    # the third in 0, 2, 1 of 2
    odds = [
        math.log((0 + 1) / (2 + 2) * 6 / (3 + 1)),
        math.log(3 / 4 * 6 / 2),
        math.log(2 / 4 * 6 / 3),
    ]
    expected = [statistics.pvariance([math.log(3 / 4 * 6 / 5)] * 3), 0, statistics.pvariance(odds)]
    np.testing.assert_allclose(
        lexical.log_odds_variance(present, one_hot(labels, 5)), expected, atol=1e-12
    )
    one_class = lexical.log_odds_variance(present, one_hot(labels, 5)[:, [0]])
    np.testing.assert_allclose(
        one_class, np.square([math.log(3 / 4 * 6 / 5), 0, odds[0]]), atol=1e-12
    )


def test_a_text_alone_is_scored_as_in_a_batch_and_tokens_beyond_the_vocabulary_count_for_nothing():
    ours = LexicalHead.of_weights(**classifier_of(rows(300)).weights())
    ids = [[5, 9, 9], [3] * 12, [11]]
    together = ours(**padded(ids))
    for i, tokens in enumerate(ids):
        torch.testing.assert_close(
            ours(torch.tensor([[*tokens, VOCABULARY + 3]]), None)[0], together[i]
        )


@pytest.mark.parametrize("several", [False, True])
def test_beyond_a_number_of_weights_each_class_keeps_the_largest(several, monkeypatch):
    decisions = (ManyNodes if several else OnePath)(TREE)
    classifier = lexical.NodeClassifier if several else lexical.LeafClassifier
    train = rows(300, several=several)
    counts = token_counts(train, VOCABULARY)
    labels = np.array(train["labels"])
    full = classifier(decisions, counts, labels)
    monkeypatch.setattr(lexical, "MAX_WEIGHTS", 7 * len(full.classes) + 1)
    kept = classifier(decisions, counts, labels)
    least = -np.sort(-np.abs(full.weight.toarray()), axis=1)[:, [6]]
    expected = np.where(np.abs(full.weight.toarray()) >= least, full.weight.toarray(), 0)
    np.testing.assert_array_equal(kept.weight.toarray(), expected)
    np.testing.assert_array_equal(kept.bias, full.bias)
    head = LexicalHead.of_weights(**kept.weights())
    unseen = rows(5, seed=1)
    scores = kept.scores(token_counts(unseen, VOCABULARY))
    np.testing.assert_allclose(head(**padded(unseen["input_ids"])), scores, atol=1e-4)
    monkeypatch.setattr("modeling_hierarchical.ENTRIES_AT_ONCE", 1)
    np.testing.assert_allclose(head(**padded(unseen["input_ids"])), scores, atol=1e-4)


@pytest.mark.parametrize("several", [False, True])
def test_by_default_a_head_has_a_limited_number_of_fitted_weights(several, monkeypatch):
    form = (ManyNodesForm if several else OnePathForm)(TREE)
    train = rows(300, several=several)
    counts = token_counts(train, VOCABULARY)
    labels = np.array(train["labels"])
    fitted = form.fit_classifier(counts, labels)
    size = len(fitted.classes) * sum((counts.toarray() > 0).sum(axis=0) > 1)
    for limit, has_head in ((size, True), (size - 1, False)):
        monkeypatch.setattr(form.classifier, "default_size", limit)
        assert (form.fit_classifier(counts, labels) is not None) == has_head
    assert form.fit_classifier(counts, labels, wanted=True) is not None


@pytest.mark.parametrize("several", [False, True])
def test_there_is_no_lexical_head_if_the_rows_do_not_tell_two_classes_apart(caplog, several):
    caplog.set_level("INFO")
    form = (ManyNodesForm if several else OnePathForm)(TREE)
    train = rows(20, leaves=2, several=several)
    counts = token_counts(train, VOCABULARY)
    labels = np.array(train["labels"])
    assert form.fit_classifier(counts, labels) is not None
    assert form.fit_classifier(counts, labels, wanted=False) is None
    assert form.fit_classifier(counts, np.zeros_like(labels)) is None
    assert "do not tell any two classes apart" in caplog.text
