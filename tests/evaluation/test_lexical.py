"""Compare the lexical head with scikit-learn, and its effect in the model with the definition."""

import math
import statistics

import numpy as np
import pytest
import torch
from drawn import FORMS, TREE, B, F, H
from scipy.sparse import csr_matrix, vstack
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.preprocessing import normalize

from decisions_hierarchical import OnePath
from hierarchical_clinicalbert.evaluation import lexical
from hierarchical_clinicalbert.evaluation.forms import Form, ManyNodesForm, OnePathForm
from hierarchical_clinicalbert.evaluation.metrics import one_hot
from modeling_hierarchical import LexicalHead
from taxonomy_hierarchical import Taxonomy

VOCABULARY = 60


def draw(form: Form, rows: int, seed: int = 0, leaves: int = 5) -> tuple[csr_matrix, np.ndarray]:
    """Draw counts of tokens, (rows, V), and labels, the arrays of `Decisions.targets`.

    Texts have 3 to 30 tokens. The tokens 2i and 2i + 1 are more frequent in texts of leaf i.
    """
    generator = np.random.default_rng(seed)
    has = one_hot(generator.integers(leaves, size=rows), TREE.num_leaves)
    if isinstance(form, ManyNodesForm):
        has = (generator.random(has.shape) < 0.4) & (np.arange(TREE.num_leaves) < leaves)
    counts = np.zeros((rows, VOCABULARY), dtype=int)
    for row, of_text in enumerate(has):
        odds = 1 + 3 * np.pad(np.repeat(of_text, 2), (0, VOCABULARY - 2 * TREE.num_leaves))
        counts[row] = generator.multinomial(generator.integers(3, 31), odds / odds.sum())
    if isinstance(form, OnePathForm):
        return csr_matrix(counts), has.argmax(axis=1)
    nodes = [has[:, below].any(axis=1) for below in TREE.leaves_at_or_below]
    return csr_matrix(counts), np.column_stack(nodes).astype(np.int8)


def features(train: csr_matrix, unseen: csr_matrix, outcomes: np.ndarray) -> list[csr_matrix]:
    """Return TF-IDF times the spread of the log-odds, of length 1, with the training rows' IDF."""
    spread = lexical.log_odds_variance(train > 0, outcomes)
    tfidf = TfidfTransformer(sublinear_tf=True, norm=None).fit(train)
    return [normalize(tfidf.transform(counts).multiply(spread)) for counts in (train, unseen)]


def head_scores(classifier: lexical.LexicalClassifier, counts: csr_matrix) -> np.ndarray:
    """Score texts by the head of a checkpoint, padded with tokens that the mask hides."""
    texts = [torch.from_numpy(np.repeat(np.arange(VOCABULARY), row)) for row in counts.toarray()]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=7)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(text)] for text in texts])
    return LexicalHead.of_weights(**classifier.weights())(ids, mask.long()).numpy()


@pytest.mark.parametrize("leaves", [2, TREE.num_leaves])
def test_the_head_is_scikit_learns_logistic_regression_over_weighted_tf_idf(leaves):
    form = OnePathForm(TREE)
    counts, labels = draw(form, 300, leaves=leaves)
    unseen, _ = draw(form, 40, seed=1)
    # the token 58 is in one row, so it is ignored, and 59 is in two
    counts = counts.tolil()
    counts[:, 58:] = 0
    counts[0, 58:] = 1
    counts[1, 59] = 1
    counts = counts.tocsr()
    common = np.arange(VOCABULARY) != 58
    given, asked = features(counts[:, common], unseen[:, common], one_hot(labels, leaves))
    model = LogisticRegression(C=50, max_iter=1000, tol=1e-3).fit(given, labels)

    # rows labelled with an inner node do not affect the fit
    others, _ = draw(form, 50, seed=2)
    with_inner = np.append(labels, np.full(50, B))
    classifier = lexical.LeafClassifier(form.decisions, vstack([counts, others]), with_inner)
    scores = head_scores(classifier, unseen)
    probabilities = torch.from_numpy(scores[:, :leaves]).softmax(1)
    np.testing.assert_allclose(probabilities, model.predict_proba(asked), atol=2e-3)
    np.testing.assert_allclose(classifier.scores(unseen), scores, atol=1e-4)


def test_each_node_has_scikit_learns_logistic_regression_over_its_open_rows():
    form = ManyNodesForm(TREE)
    counts, labels = draw(form, 300)
    unseen, _ = draw(form, 30, seed=1)
    labels[:, F] = 0
    classifier = lexical.NodeClassifier(form.decisions, counts, labels)
    given, asked = features(counts, unseen, labels)
    scores = classifier.scores(unseen)
    for node, parent in enumerate(TREE.parents):
        is_open = np.ones(300, dtype=bool) if parent < 0 else labels[:, parent] == 1
        truth = labels[is_open, node]
        if node in (F, H):  # never true, and always where its parent is: without lexical scores
            assert not scores[:, node].any()
            continue
        model = LogisticRegression(C=50, max_iter=1000).fit(given[is_open], truth)
        prior = math.log((truth.sum() + 0.5) / ((1 - truth).sum() + 0.5))
        expected = model.decision_function(asked) - prior
        np.testing.assert_allclose(scores[:, node], expected, atol=0.05)
    np.testing.assert_allclose(head_scores(classifier, unseen), scores, atol=1e-4)


def test_leaves_without_rows_share_the_prior_of_one_row():
    tree = Taxonomy(["a", {"b": ["c", "d", *(f"never {i}" for i in range(300))]}])
    counts, labels = draw(OnePathForm(TREE), 300, leaves=3)
    odds = np.exp(lexical.LeafClassifier(OnePath(tree), counts, labels).scores(counts))
    assert (odds[:, 3:].sum(1) / odds[:, :3].sum(1)).mean() == pytest.approx(1 / 301)


@FORMS
def test_a_phrase_is_a_document_of_its_class_and_a_direction_of_its_weights(form):
    counts, labels = draw(form, 90)
    unseen, _ = draw(form, 20, seed=1)
    classes = range(form.decisions.num_classes)
    phrases = csr_matrix(np.repeat(np.eye(len(classes), VOCABULARY // 2, dtype=int), 2, axis=1))
    found = form.fit_classifier(counts, labels, phrases=phrases)
    of_phrases = np.arange(len(classes))
    if isinstance(form, ManyNodesForm):
        of_phrases = np.array(
            [[node in TREE.path(phrase) for node in classes] for phrase in classes]
        )
    with_phrases = np.concatenate([labels, of_phrases])
    expected = form.classifier(form.decisions, vstack([counts, phrases]), with_phrases)
    before = found.scores(unseen)
    np.testing.assert_allclose(before, expected.scores(unseen))

    cosines = cosine_similarity(*map(expected.tfidf.transform, (unseen, phrases)))
    found.add_phrases(0.5)
    np.testing.assert_allclose(found.scores(unseen) - before, 50 * cosines)
    decision_scores = form.decisions.of_classes(torch.from_numpy(100 * cosines)).numpy()
    np.testing.assert_allclose(found.phrase_scores(unseen), decision_scores)


def test_a_token_is_weighted_by_how_differently_the_classes_use_it():
    rows = [[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 1], [1, 1, 1], [1, 0, 0]]
    present = csr_matrix(np.array(rows))
    outcomes = one_hot(np.array([0, 0, 2, 2, 4, 4]), 5)
    # of 2 and 4 documents the second token is in 1 and 2, with one more of each kind: odds of 1;
    # the third in 0, 2, 1 of 2
    first = math.log(3 / 4 * 6 / 5)
    third = [math.log(1 / 4 * 6 / 4), math.log(3 / 4 * 6 / 2), math.log(2 / 4 * 6 / 3)]
    expected = [0, 0, statistics.pvariance(third)]
    found = lexical.log_odds_variance(present, outcomes)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    one_class = lexical.log_odds_variance(present, outcomes[:, [0]])
    np.testing.assert_allclose(one_class, [first**2, 0, third[0] ** 2], atol=1e-12)


@FORMS
def test_a_text_alone_is_scored_as_in_a_batch_and_tokens_beyond_the_vocabulary_count_for_nothing(
    form,
):
    classifier = form.fit_classifier(*draw(form, 300))
    texts = [[5, 9, 9], [3] * 12, [11]]
    counts = [np.bincount(text, minlength=VOCABULARY) for text in texts]
    together = head_scores(classifier, csr_matrix(counts))
    head = LexicalHead.of_weights(**classifier.weights())
    for text, expected in zip(texts, together, strict=True):
        alone = head(torch.tensor([[*text, VOCABULARY + 3]]), None)[0]
        np.testing.assert_allclose(alone, expected, atol=1e-5)


@FORMS
def test_beyond_a_number_of_weights_each_class_keeps_the_largest(form, monkeypatch):
    counts, labels = draw(form, 300)
    unseen, _ = draw(form, 5, seed=1)
    full = form.fit_classifier(counts, labels)
    monkeypatch.setattr(lexical, "MAX_WEIGHTS", 7 * len(full.classes) + 1)
    kept = form.fit_classifier(counts, labels)
    weights = full.weight.toarray()
    least = -np.sort(-np.abs(weights), axis=1)[:, [6]]
    expected = np.where(np.abs(weights) >= least, weights, 0)
    np.testing.assert_array_equal(kept.weight.toarray(), expected)
    np.testing.assert_array_equal(kept.bias, full.bias)
    np.testing.assert_allclose(head_scores(kept, unseen), kept.scores(unseen), atol=1e-4)
    monkeypatch.setattr("modeling_hierarchical.ENTRIES_AT_ONCE", 1)
    np.testing.assert_allclose(head_scores(kept, unseen), kept.scores(unseen), atol=1e-4)


@FORMS
def test_a_head_needs_classes_to_tell_apart_and_by_default_has_few_weights(
    form, monkeypatch, caplog
):
    caplog.set_level("INFO")
    counts, labels = draw(form, 20, leaves=2)
    assert form.fit_classifier(counts, labels, wanted=False) is None
    assert form.fit_classifier(counts, np.zeros_like(labels)) is None
    assert "do not tell any two classes apart" in caplog.text
    num_classes = len(form.fit_classifier(counts, labels).classes)
    size = num_classes * sum((counts.toarray() > 0).sum(axis=0) > 1)
    for limit, has_head in ((size, True), (size - 1, False)):
        monkeypatch.setattr(form.classifier, "default_size", limit)
        assert (form.fit_classifier(counts, labels) is not None) == has_head
    assert form.fit_classifier(counts, labels, wanted=True) is not None
