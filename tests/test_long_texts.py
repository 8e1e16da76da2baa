"""Texts longer than the encoder's window, through all doors: cut, encoded and pooled by hand."""

import json

import pytest
import torch
from conftest import predict_here, write_csv
from small_encoders import small_encoder
from torch.nn.utils.rnn import pad_sequence
from transformers import pipeline

from configuration_hierarchical import HierarchicalConfig
from modeling_hierarchical import TOKENS_AT_ONCE, HierarchicalForSequenceClassification

# tokens in a window, and its special tokens
WINDOW = 16
START = 5
END = 6
POSITIONS = {"bert": WINDOW, "roberta": WINDOW + 2, "mpnet": WINDOW + 2}
KINDS = (*POSITIONS, "deberta-v2", "modernbert")
POOLINGS = ["mean", "cls", "label_attention", "family_attention"]
LENGTHS = [7, 16, 17, 30, 63]  # of texts, special tokens included; 30 are two full windows
TREE = {"a": None, "b": ["c", "d"]}


def small_model(kind: str = "bert", **settings) -> HierarchicalForSequenceClassification:
    own = {"window": WINDOW, "tokens_before": [START], "tokens_after": [END]} | settings
    torch.manual_seed(0)
    encoder = small_encoder(kind, max_position_embeddings=POSITIONS.get(kind, 512))
    config = HierarchicalConfig(text_config=encoder, taxonomy=TREE, **own)
    model = HierarchicalForSequenceClassification(config).eval()
    for weight in (model.heads.weight, model.heads.query):
        if weight is not None:
            torch.nn.init.normal_(weight)
    return model


def texts_of(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [
        [START, *torch.randint(10, 63, (length - 2,), generator=generator).tolist(), END]
        for length in lengths
    ]


def padded(
    texts: list[list[int]], width: int = 0, left: bool = False, pad: int = 0
) -> dict[str, torch.Tensor]:
    rows = [torch.tensor(text) for text in texts]
    widest = torch.zeros(width, dtype=torch.long)
    masks = [torch.ones_like(row) for row in rows]
    side = "left" if left else "right"
    return {
        "input_ids": pad_sequence([*rows, widest], True, pad, side)[:-1],
        "attention_mask": pad_sequence([*masks, widest], True, 0, side)[:-1],
    }


def by_hand(model: HierarchicalForSequenceClassification, text: list[int]) -> torch.Tensor:
    """Cut a text into windows of nearly equal length, encode each alone, and pool the tokens of
    all.
    """
    windows = [text]
    content = text[1:-1]
    if len(text) > WINDOW:
        count = -(-len(content) // (WINDOW - 2))
        parts = [
            content[len(content) * i // count : len(content) * (i + 1) // count]
            for i in range(count)
        ]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        windows = [[START, *part, END] for part in parts]
    hidden = [model.encoder(torch.tensor([window])).last_hidden_state[0] for window in windows]
    tokens = torch.cat(hidden)
    heads = model.heads
    if heads.query is not None:
        weights = (tokens @ heads.query[heads.query_of].T / tokens.shape[1] ** 0.5).softmax(0)
        scores = (weights * (tokens @ heads.weight.T)).sum(0) + heads.bias
    else:
        first = torch.stack([one[0] for one in hidden])
        scores = (
            heads.weight @ (first if model.config.pooling == "cls" else tokens).mean(0) + heads.bias
        )
    return heads.decisions(heads.decisions.inclusive(scores[None]))[1][0]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_text_is_read_by_its_own_windows_alone_and_beside_others(kind, pooling):
    model = small_model(kind, pooling=pooling)
    texts = texts_of(LENGTHS)
    expected = torch.stack([by_hand(model, text) for text in texts])
    pad = model.encoder.config.pad_token_id
    alone = torch.cat([model(**padded([text])).logits for text in texts])
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=0)
    # beside each other, they are read without windows
    short = [text for text in texts if len(text) <= WINDOW]
    for batch in (
        padded(short, pad=pad),
        padded(texts, 80, pad=pad),
        padded(texts, 80, left=True, pad=pad),
    ):
        logits = model(**batch).logits
        torch.testing.assert_close(logits, alone[: len(logits)], atol=1e-5, rtol=0)


@torch.no_grad()
def test_embeddings_token_types_and_positions_are_cut_with_the_ids():
    model = small_model()
    batch = padded(texts_of(LENGTHS))
    expected = model(**batch).logits
    vectors = model.get_input_embeddings()(batch["input_ids"])
    by_vectors = model(inputs_embeds=vectors, attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(by_vectors, expected, atol=1e-5, rtol=0)
    more = {
        "token_type_ids": torch.zeros_like(batch["input_ids"]),
        "position_ids": torch.arange(63)[None],
    }
    torch.testing.assert_close(model(**batch, **more).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"tokens_before": None}, {}, "the special tokens of a window are needed"),
        ({}, {"output_attentions": True}, "no hidden states or attentions"),
        (
            {},
            {"token_type_ids": torch.ones(1, 40, dtype=torch.long)},
            "pairs of texts cannot be read",
        ),
    ],
)
def test_what_has_no_meaning_beyond_a_window_is_refused(settings, arguments, message):
    model = small_model(**settings)
    batch = padded(texts_of([40]))
    with pytest.raises(ValueError, match=f"beyond 16 tokens, the encoder's window, .*{message}"):
        model(**batch, **arguments)
    model(**padded(texts_of([16])), **{k: v for k, v in arguments.items() if k != "token_type_ids"})


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradients_are_those_of_one_call_of_the_encoder(pooling, monkeypatch):
    model = small_model(pooling=pooling)
    batch = padded(texts_of(LENGTHS))

    def gradients(at_once: int) -> list[torch.Tensor]:
        monkeypatch.setattr("modeling_hierarchical.TOKENS_AT_ONCE", at_once)
        model.zero_grad()
        model(**batch, labels=torch.arange(5) % 3).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for one, several in zip(gradients(TOKENS_AT_ONCE), gradients(40), strict=True):
        torch.testing.assert_close(one, several, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_label_attention_over_many_nodes_is_computed_in_parts(monkeypatch):
    batch = padded(texts_of(LENGTHS))
    expected = small_model(pooling="family_attention")(**batch).logits
    monkeypatch.setattr("modeling_hierarchical.FAMILY_WIDTH", 2)
    monkeypatch.setattr("modeling_hierarchical.SCORES_AT_ONCE", 1)
    torch.testing.assert_close(
        small_model(pooling="family_attention")(**batch).logits, expected, atol=1e-5, rtol=0
    )


def test_all_doors_read_the_last_words_of_a_long_text(long_checkpoint, long_texts, tmp_path):
    """Other doors are in tests/prediction, tests/publishing/test_engines.py and tests/space."""
    labels = list(long_texts)
    texts = list(long_texts.values())
    ours = pipeline(
        "hierarchical-text-classification", model=long_checkpoint, trust_remote_code=True
    )
    flat = pipeline("text-classification", model=long_checkpoint, trust_remote_code=True)
    num_tokens = [len(ids) for ids in ours.tokenizer(texts, truncation=True)["input_ids"]]
    assert 3000 <= min(num_tokens) <= max(num_tokens) < ours.tokenizer.model_max_length == 3072
    config = ours.model.config
    special = [[ours.tokenizer.cls_token_id], [ours.tokenizer.sep_token_id]]
    assert [config.tokens_before, config.tokens_after] == special

    results = ours(texts)
    assert [(one["tokens"], one["tokens_read"]) for one in results] == [(n, n) for n in num_tokens]
    joined = ours(" ".join(texts))
    assert (joined["tokens"], joined["tokens_read"]) == (sum(num_tokens) - 2 * len(texts) + 2, 3072)

    source = write_csv(tmp_path / "in.csv", [{"text": text} for text in texts])
    output = tmp_path / "out.jsonl"
    predict_here(
        "--model", long_checkpoint, "--input", source, "--output", output, "--dtype", "fp32"
    )
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["tokens_read"] for row in rows] == num_tokens
    scores = [one["score"] for one in flat(texts)]
    for found in (results, flat(texts), rows):
        assert [one["label"] for one in found] == labels
        assert [one["score"] for one in found] == pytest.approx(scores, abs=1e-5)
