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
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer
from transformers import AutoModel

from configuration_hierarchical import HierarchicalConfig
from evaluation import lexical
from evaluation.metrics import one_hot
from modeling_hierarchical import HierarchicalForSequenceClassification, LexicalHead
from taxonomy_hierarchical import Taxonomy

TREE = Taxonomy(["a", {"b": ["c", "d", {"e": ["f", "g"]}]}])
VOCABULARY = 60
TINY = {
    "model_type": "bert", "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 48,
}  # fmt: skip


def rows(count: int, seed: int = 0, leaves: int = TREE.num_leaves) -> datasets.Dataset:
    """Draw texts of 3 to 30 tokens, with the tokens 2i and 2i + 1 more frequent in texts of leaf i."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(leaves, size=count)
    ids = []
    for label in labels:
        odds = np.ones(VOCABULARY)
        odds[2 * label : 2 * label + 2] = 4
        ids.append(generator.choice(VOCABULARY, size=generator.integers(3, 31), p=odds / odds.sum()).tolist())
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})


def padded(ids: list[list[int]]) -> dict[str, torch.Tensor]:
    """Pad token ids with tokens that the mask hides."""
    length = max(map(len, ids))
    return {
        "input_ids": torch.tensor([one + [7] * (length - len(one)) for one in ids]),
        "attention_mask": torch.tensor([[1] * len(one) + [0] * (length - len(one)) for one in ids]),
    }


@pytest.mark.parametrize("leaves", [2, 3, TREE.num_leaves])
def test_the_head_is_scikit_learns_logistic_regression_over_weighted_tf_idf(leaves):
    train, unseen = rows(300, leaves=leaves), rows(40, seed=1)
    counts = np.array([np.bincount(ids, minlength=VOCABULARY) for ids in train["input_ids"]])
    common = (counts > 0).sum(0) >= 2
    spread = lexical.log_odds_variance(csr_matrix(counts[:, common] > 0), one_hot(np.array(train["labels"]), leaves))
    model = make_pipeline(
        TfidfTransformer(sublinear_tf=True, norm=None),
        FunctionTransformer(lambda weighed: csr_matrix(weighed).multiply(spread).tocsr()),
        Normalizer(),
        LogisticRegression(C=50, max_iter=1000, tol=1e-3),
    )
    model.fit(counts[:, common], train["labels"])
    others = np.array([np.bincount(ids, minlength=VOCABULARY) for ids in unseen["input_ids"]])[:, common]
    expected = model.predict_proba(others)

    labels = np.array(train["labels"])
    classifier = lexical.LexicalClassifier(TREE, lexical.token_counts(train, VOCABULARY), labels)
    ours = LexicalHead(VOCABULARY, TREE.num_leaves)
    ours.load_state_dict(classifier.weights())
    scores = ours(**padded(unseen["input_ids"]))
    np.testing.assert_allclose(scores[:, :leaves].softmax(1).numpy(), expected, atol=2e-3)
    np.testing.assert_allclose(classifier.scores(lexical.token_counts(unseen, VOCABULARY)), scores.numpy(), atol=1e-4)


@pytest.mark.parametrize("unseen", [1, 300])
def test_leaves_without_rows_share_the_prior_of_one_row(unseen):
    tree = Taxonomy(["a", {"b": ["c", "d", *(f"never {i}" for i in range(unseen))]}])
    train = rows(300, leaves=3)
    counts = lexical.token_counts(train, VOCABULARY)
    classifier = lexical.LexicalClassifier(tree, counts, np.array(train["labels"]))
    odds = np.exp(classifier.scores(counts))
    assert (odds[:, 3:].sum(1) / odds[:, :3].sum(1)).mean() == pytest.approx(1 / 301)


def test_a_token_is_weighted_by_how_differently_the_classes_use_it():
    present = csr_matrix(np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 1], [1, 1, 1], [1, 0, 0]]))
    labels = np.array([0, 0, 2, 2, 4, 4])
    # of 2 and 4 documents the second token is in 1 and 2, with one more of each kind: odds of 1; the third in 0, 2, 1 of 2
    odds = [math.log((0 + 1) / (2 + 2) * 6 / (3 + 1)), math.log(3 / 4 * 6 / 2), math.log(2 / 4 * 6 / 3)]
    expected = [statistics.pvariance([math.log(3 / 4 * 6 / 5)] * 3), 0, statistics.pvariance(odds)]
    np.testing.assert_allclose(lexical.log_odds_variance(present, one_hot(labels, 5)), expected, atol=1e-12)
    one_class = lexical.log_odds_variance(present, one_hot(labels, 5)[:, [0]])
    np.testing.assert_allclose(one_class, np.square([math.log(3 / 4 * 6 / 5), 0, odds[0]]), atol=1e-12)


@pytest.mark.parametrize("unseen", [0, 500])
def test_only_classes_and_tokens_of_the_rows_are_fitted(unseen):
    """Compare a fit without rare tokens with one that has a column of zeros for each token, and a row for each class."""
    tree = Taxonomy([*"abcdefg", *(f"never {i}" for i in range(unseen))])
    train = rows(60, leaves=7)
    counts = lexical.token_counts(train, 10 * VOCABULARY)
    classifier = lexical.LexicalClassifier(tree, counts, np.array(train["labels"]))
    documents = classifier.tfidf.transform(counts)
    expected = LogisticRegression(C=50, max_iter=1000, tol=1e-3).fit(documents, train["labels"])
    weights = classifier.weights()
    assert weights["weight"].shape == (7 + unseen, 10 * VOCABULARY)
    assert not weights["weight"][7:].any()
    np.testing.assert_allclose(weights["weight"][:7].numpy(), expected.coef_, atol=1e-3)
    np.testing.assert_allclose(weights["bias"][:7].numpy(), expected.intercept_, atol=1e-3)


def test_rows_labelled_with_an_inner_node_do_not_affect_the_fit():
    train = rows(200)
    labels = np.array(train["labels"])
    labels[:100] = TREE.id("b")
    counts = lexical.token_counts(train, VOCABULARY)
    classifier = lexical.LexicalClassifier(TREE, counts, labels)
    expected = lexical.LexicalClassifier(TREE, counts[100:], labels[100:])
    np.testing.assert_array_equal(classifier.weight, expected.weight)


@pytest.fixture
def model() -> HierarchicalForSequenceClassification:
    torch.manual_seed(0)
    initialised = HierarchicalForSequenceClassification(HierarchicalConfig(text_config=TINY, taxonomy=TREE)).eval()
    torch.nn.init.normal_(initialised.heads.weight)
    return initialised


def test_the_model_adds_its_scores_in_each_decision_and_comes_back_the_same(model, tmp_path):
    train, inputs = rows(300), padded(rows(9, seed=1)["input_ids"])
    classifier = lexical.LexicalClassifier(TREE, lexical.token_counts(train, VOCABULARY), np.array(train["labels"]))
    encoder = model(**inputs).node_log_probs.double()
    before = model(**inputs).logits
    model.set_lexical_head(classifier.weights(), 0.5)
    after = model(**inputs)
    words = torch.tensor(classifier.scores(lexical.token_counts(rows(9, seed=1), VOCABULARY))).softmax(1)
    expected = torch.zeros(9, TREE.num_nodes, dtype=torch.float64)
    for parent in (-1, *range(TREE.num_leaves, TREE.num_nodes)):
        children = TREE.children(parent)
        under = [[leaf for leaf in range(TREE.num_leaves) if child in TREE.path(leaf)] for child in children]
        by_words = torch.stack([words[:, leaves].sum(1).log() for leaves in under], dim=1)
        expected[:, children] = (encoder[:, children] + 0.5 * by_words).log_softmax(1)
    logits = torch.stack([expected[:, TREE.path(leaf)].sum(1) for leaf in range(TREE.num_leaves)], dim=1)
    torch.testing.assert_close(after.logits, logits.float())
    assert (after.logits - before).abs().max() > 0.1
    probabilities = after.node_log_probs.exp()
    torch.testing.assert_close(probabilities[:, TREE.children(TREE.id("b"))].sum(1), probabilities[:, TREE.id("b")])
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True, dtype=dtype)
        assert loaded.heads.lexical.weight.dtype == torch.float32
        torch.testing.assert_close(
            loaded(**inputs).logits, after.logits, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0
        )
    model.set_lexical_head(None)
    torch.testing.assert_close(model(**inputs).logits, before)


def test_a_text_alone_is_scored_as_in_a_batch_and_tokens_beyond_the_vocabulary_count_for_nothing():
    train = rows(300)
    classifier = lexical.LexicalClassifier(TREE, lexical.token_counts(train, VOCABULARY), np.array(train["labels"]))
    ours = LexicalHead(VOCABULARY, TREE.num_leaves)
    ours.load_state_dict(classifier.weights())
    ids = [[5, 9, 9], [3] * 12, [11]]
    together = ours(**padded(ids))
    for i, tokens in enumerate(ids):
        torch.testing.assert_close(ours(torch.tensor([[*tokens, VOCABULARY + 3]]), None)[0], together[i])


def test_embeddings_in_place_of_token_ids_are_refused(model):
    model.set_lexical_head({"idf": torch.ones(60), "weight": torch.ones(5, 60), "bias": torch.zeros(5)})
    with pytest.raises(ValueError, match="needs input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 32))
    with pytest.raises(ValueError, match=r"mask of shape \(B, T\)"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 1, 4, 4))


def test_there_is_no_lexical_head_if_all_rows_have_one_leaf(caplog):
    caplog.set_level("INFO")
    assert lexical.fit_classifier(TREE, rows(20, leaves=1), VOCABULARY) is None
    assert "do not tell any two classes apart" in caplog.text
    assert lexical.fit_classifier(TREE, rows(20, leaves=2), VOCABULARY) is not None
