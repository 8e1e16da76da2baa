"""Test the weights of words: against brute force, by their sum, and beside classification."""

import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, write_labels_checkpoint
from transformers import pipeline

sys.path.insert(0, str(ROOT / "space"))

from attribution import Explainer


def load(checkpoint: str, **options):
    return pipeline(
        "hierarchical-text-classification", model=checkpoint, trust_remote_code=True, **options
    )


@pytest.fixture(scope="module")
def classifier(clear_checkpoint):
    return load(clear_checkpoint)


@pytest.fixture
def attention_classifier(tiny_encoder, tmp_path):
    """Return a multi-label classifier with label attention."""
    return load(write_labels_checkpoint(tiny_encoder, tmp_path, pooling="label_attention"))


def total_weight(explanation: dict) -> float:
    return (
        sum(word["weight"] for word in explanation["words"])
        + explanation["rest"]
        - explanation["error"]
    )


@pytest.mark.parametrize("kind", ["classifier", "attention_classifier"])
def test_weights_are_the_integral_of_the_gradient_word_by_word(kind, request, texts, monkeypatch):
    """Compare with 2,000 steps of the trapezoidal rule, by autograd, over embeddings and the
    lexical head's counts.
    """
    classifier = request.getfixturevalue(kind)
    text = "Allodynia and epilepsy, nervous complaints. " + texts[0]
    explanation = Explainer(classifier).explain(text, "nervous system diseases")
    model = classifier.model
    tokenizer = classifier.tokenizer
    node = classifier.tree.id("nervous system diseases")
    encoded = tokenizer(text, truncation=True, return_tensors="pt")
    ids = encoded["input_ids"]
    mask = encoded["attention_mask"]
    blank = torch.full_like(ids, tokenizer.pad_token_id)
    blank[0, 0] = ids[0, 0]
    blank[0, -1] = ids[0, -1]
    embed = model.get_input_embeddings()
    head = model.heads.lexical
    weight = head.weights()["weight"].to_dense()

    def weighed(tokens):  # TF-IDF as its docstring has it
        counts = torch.bincount(tokens[0], minlength=len(head.idf)).float()
        vector = torch.where(counts > 0, 1 + counts.clamp(min=1).log(), 0.0) * head.idf
        return vector / vector.norm()

    vectors, tfidf = (
        [read(tokens).detach() for tokens in (blank, ids)] for read in (embed, weighed)
    )
    steps = 2000
    by_place = torch.zeros(ids.shape[1])
    by_token = torch.zeros(len(head.idf))
    for part in torch.linspace(0, 1, steps + 1).split(67):
        x = (vectors[0] + part[:, None, None] * (vectors[1] - vectors[0])).requires_grad_()
        s = (tfidf[0] + part[:, None] * (tfidf[1] - tfidf[0])).requires_grad_()
        masks = mask.expand(len(part), -1)
        states, _ = model.encode(None, masks, x)
        with monkeypatch.context() as patched:
            patched.setattr(head, "forward", lambda ids, mask, s=s: s @ weight.T + head.bias)
            scores, _ = model.heads(
                states if model.heads.query is not None else model.pool(states), ids, mask
            )
            log_probs, logits = model.heads.decisions(scores)
            values = logits if model.config.is_multi_label else log_probs.exp()
        step = torch.where((part == 0) | (part == 1), 0.5, 1.0) / steps
        g, h = torch.autograd.grad((values[:, node] * step).sum(), (x, s))
        by_place += (g * (vectors[1] - vectors[0])).sum((0, 2))
        by_token += h.sum(0) * (tfidf[1] - tfidf[0])
    expected: dict[int, float] = {}
    for place, word in enumerate(encoded.word_ids(0)):
        if word is not None:
            token = ids[0, place]
            share = by_token[token] / (ids[0] == token).sum()
            expected[word] = expected.get(word, 0.0) + (by_place[place] + share).item()
    tolerance = 8e-3 if model.config.is_multi_label else 2e-3
    assert [word["weight"] for word in explanation["words"]] == pytest.approx(
        list(expected.values()), abs=tolerance
    )
    assert max(map(abs, expected.values())) > 0.01
    with torch.no_grad():  # the blank text keeps the special tokens
        blank_score = (
            model(input_ids=blank, attention_mask=mask)["node_log_probs"][0, node].exp().item()
        )
    assert explanation["blank_score"] == pytest.approx(blank_score, abs=1e-6)
    assert all(text[word["start"] : word["end"]] == word["word"] for word in explanation["words"])


def test_a_model_in_half_precision_and_without_a_lexical_head_is_explained_as_in_full(
    clear_checkpoint, texts
):
    half, full = (
        load(clear_checkpoint, dtype=dtype, device="cpu")
        for dtype in (torch.bfloat16, torch.float32)
    )
    for classifier in (half, full):
        classifier.model.set_calibration(
            replace(classifier.model.config.calibration, lexical_weight=None)
        )
    explanation, expected = (
        Explainer(some).explain(texts[0], "neoplasms") for some in (half, full)
    )
    difference = explanation["score"] - explanation["blank_score"]
    assert total_weight(explanation) == pytest.approx(difference, abs=1e-6)
    weights, others = (
        [word["weight"] for word in some["words"]] for some in (explanation, expected)
    )
    assert weights == pytest.approx(others, abs=0.05 * max(map(abs, others)))
