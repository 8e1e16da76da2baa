import random
import shutil
import threading
from collections.abc import Iterator
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, BitsAndBytesConfig, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from configuration_hierarchical import HierarchicalConfig
from modeling_hierarchical import HierarchicalForSequenceClassification
from pipeline_hierarchical import HierarchicalTextClassificationPipeline
from taxonomy_hierarchical import Taxonomy

UNEVEN = Taxonomy({"a": {"b": ["c", "d"], "e": None}, "f": ["g", "c"], "h": None})
TEXTS = [
    "Liver cirrhosis.",
    (
        "A randomized trial of aspirin after myocardial infarction in two hundred men and "
        "women, followed for five years."
    ),
    "Stroke and epilepsy",
    "Colonoscopy found a carcinoma of the sigmoid colon; resection was followed by chemotherapy. "
    * 3,
    "x",
]
LONG = "headache migraine seizure tumour liver heart valve artery colon biopsy " * 30


@pytest.fixture(scope="module", autouse=True)
def _two_cores() -> Iterator[None]:
    """Set torch to two threads, because the pipeline classifies texts in one thread per core."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(minilm, tmp_path_factory) -> str:
    """Return a checkpoint with random weights and MiniLM's tokenizer."""
    torch.manual_seed(1)
    shape = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
    }
    config = HierarchicalConfig(
        text_config=AutoConfig.from_pretrained(minilm, **shape), taxonomy=UNEVEN
    )
    model = HierarchicalForSequenceClassification(config).eval()
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    nn.init.normal_(model.heads.weight)
    with torch.no_grad():  # without the part that all texts share
        vectors = model.pool(model.encode(**tokenizer(TEXTS, padding=True, return_tensors="pt"))[0])
        model.heads.bias.copy_(-model.heads.weight @ vectors.mean(0))
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def classify(checkpoint):
    return pipeline("hierarchical-text-classification", model=checkpoint, trust_remote_code=True)


def one_by_one(checkpoint: str, texts: list[str]) -> np.ndarray:
    """Compute node probabilities (num_texts, num_nodes) by the model alone, with one text per
    batch.
    """
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    with torch.inference_mode():
        outputs = [model(**tokenizer(text, return_tensors="pt", truncation=True)) for text in texts]
    return np.array([output.node_log_probs[0].exp().numpy() for output in outputs])


def test_a_result_is_the_path_to_the_most_probable_leaf_and_every_node_by_level(
    checkpoint, classify
):
    expected = one_by_one(checkpoint, TEXTS)
    for text, nodes in zip(TEXTS, expected, strict=True):
        result = classify(text, levels=True)
        leaf = int(nodes[: UNEVEN.num_leaves].argmax())
        first = {name: result[name] for name in ("label", "score", "path")}
        counts = {name: result[name] for name in ("tokens", "tokens_read", "truncated")}
        assert result == {"labels": [first], **first, **counts, "levels": result["levels"]}
        assert result["label"] == UNEVEN.labels[leaf]
        assert (
            result["score"] == result["path"][-1]["score"] == pytest.approx(nodes[leaf], abs=1e-5)
        )
        assert [step["label"] for step in result["path"]] == [
            UNEVEN.labels[node] for node in UNEVEN.path(leaf)
        ]
        assert [list(level) for level in result["levels"]] == [
            ["a", "f", "h"],
            ["b", "e", "g", "f/c"],
            ["a/b/c", "d"],
        ]
        found = {label: score for level in result["levels"] for label, score in level.items()}
        for node, label in enumerate(UNEVEN.labels):
            assert found[label] == pytest.approx(nodes[node], abs=1e-5)
        assert "levels" not in classify(text)
        best_first = [UNEVEN.labels[leaf] for leaf in np.argsort(-nodes[: UNEVEN.num_leaves])]
        assert [node["label"] for node in classify(text, top_k=100)["labels"]] == best_first
        num_tokens = len(classify.tokenizer(text)["input_ids"])
        assert counts == {"tokens": num_tokens, "tokens_read": num_tokens, "truncated": False}


def test_results_come_in_order_whatever_the_batches(checkpoint, classify):
    texts = [f"{text} {number}" for number in range(8) for text in TEXTS]
    expected = one_by_one(checkpoint, texts)[:, : UNEVEN.num_leaves].max(1)
    for batch_size in (1, 3, 16):
        scores = [result["score"] for result in classify(texts, batch_size=batch_size)]
        np.testing.assert_allclose(scores, expected, atol=1e-5, err_msg=f"batches of {batch_size}")


def test_lists_streams_and_data_sets_are_read(classify):
    rows = Dataset.from_dict({"text": TEXTS})
    expected = [result["label"] for result in classify(TEXTS)]
    lazy = (text for text in TEXTS)
    series = pd.Series(TEXTS)
    for data in (
        tuple(TEXTS),
        iter(TEXTS),
        np.array(TEXTS),
        lazy,
        rows,
        rows["text"],
        KeyDataset(rows, "text"),
        series,
    ):
        assert [result["label"] for result in classify(data, batch_size=2)] == expected
    with pytest.raises(
        ValueError, match=r"give the column that holds them, such as table\['text'\]"
    ):
        classify(pd.DataFrame({"text": ["one", "two"]}))


def test_a_stream_is_read_no_further_than_needed(classify):
    read = []

    def stream():
        for number in range(1000):
            read.append(number)
            yield f"text {number}"

    results = classify(stream(), batch_size=1)
    next(results)
    assert len(read) == 1
    read.clear()
    next(classify(stream(), batch_size=2))
    assert len(read) <= 128
    assert classify([]) == []
    assert list(classify(iter([]))) == []


def test_arguments_of_a_call_override_arguments_of_the_pipeline(checkpoint, classify):
    load = partial(
        pipeline, "hierarchical-text-classification", model=checkpoint, trust_remote_code=True
    )
    two = load(top_k=2, max_length=16)
    assert [len(result["labels"]) for result in (two("text"), two("text", top_k=3))] == [2, 3]
    assert two(LONG)["truncated"]
    assert not two(TEXTS[1], max_length=100)["truncated"]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("", "the text at position 2 .* is empty"),
        (" \n", "the text at position 2 .* is empty"),
        (None, "the item at position 2 .* is not a text but NoneType"),
        (3.5, "the item at position 2 .* is not a text but float"),
        (b"bytes", "the item at position 2 .* is not a text but bytes"),
        (["nested"], "the item at position 2 .* is not a text but list"),
        ({"title": "x"}, "the item at position 2 .* is not a text but a mapping with 'title'"),
        ({"Anna has " + "a cough. " * 20: "x"}, r"a mapping with \(a value of 189 characters\)$"),
        ({"text": None}, "the item at position 2 .* is not a text but NoneType"),
    ],
)
def test_an_invalid_text_is_named_by_its_position(classify, item, message):
    with pytest.raises(ValueError, match=message):
        classify(["one", "two", item, "four"])
    with pytest.raises(ValueError, match=message.replace("2", "0")):
        classify(item) if not isinstance(item, list) else classify([item])
    results = classify(iter(["one", "two", item, "four"]))
    assert [next(results)["label"], next(results)["label"]] == [
        r["label"] for r in classify(["one", "two"])
    ]
    with pytest.raises(ValueError, match=message):
        next(results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, "top_k must be a whole number of at least 1"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"max_length": 10_000}, "beyond the model's limit of 512 tokens"),
        ({"max_length": 2}, "leaves no room"),
        ({"stride": 16}, "'stride' is not an argument of this pipeline"),
        ({"truncation": True}, "'truncation' is not an argument of this pipeline"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(classify, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        classify("text", **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("has_special_tokens", [True, False])
def test_a_text_without_tokens_is_refused(checkpoint, has_special_tokens):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    if not has_special_tokens:
        # which puts [CLS] and [SEP] around a text
        tokenizer.backend_tokenizer.post_processor = None
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
    classify = HierarchicalTextClassificationPipeline(model=model, tokenizer=tokenizer)
    for texts in ("\u200b", ["liver", "\u200b"]):
        with pytest.raises(ValueError, match="a text has no tokens"):
            classify(texts)


@pytest.mark.parametrize("batch_size", [None, 1, 6])
def test_a_model_sees_few_shapes_of_little_padding_and_each_core_computes_alone(
    checkpoint, batch_size
):
    """Count the shapes: for each new number of tokens, oneDNN compiles every bfloat16 product,
    which costs time and memory.
    """
    words = LONG.split()
    texts = [" ".join(random.Random(i).choices(words, k=1 + i * 7 % 480)) for i in range(120)]
    classify = pipeline(
        "hierarchical-text-classification", model=checkpoint, trust_remote_code=True, device="cpu"
    )
    seen = []  # what each forward pass gets, in whichever thread

    def look(model, args, kwargs):
        longest = kwargs["attention_mask"].sum(1).max().item()
        seen.append((tuple(kwargs["input_ids"].shape), longest, torch.get_num_threads()))

    classify.model.register_forward_pre_hook(look, with_kwargs=True)
    assert len(list(classify((text for text in texts), batch_size=batch_size))) == 120
    shapes = [shape for shape, _, _ in seen]
    threads = {count for _, _, count in seen}
    assert len({rows * length for rows, length in shapes}) <= 40
    assert all(length - longest < 16 for (_, length), longest, _ in seen)
    assert max(length for _, length in shapes) <= classify.tokenizer.model_max_length
    assert (
        batch_size is not None
        or max(rows * longest for (rows, _), longest, _ in seen) <= 2048 * 2**0.5
    )
    # a text that comes alone has all cores
    assert threads == {torch.get_num_threads() if batch_size == 1 else 1}


@pytest.mark.parametrize("renamed", ["", "bidirectional_mask_function", "_reorder_linear_weight"])
def test_bfloat16_on_a_cpu_predicts_as_float32_with_or_without_fast_kernels(
    checkpoint, classify, renamed, tmp_path, warned
):
    """Where torch or transformers rename a private name that the kernels use, a warning says so."""
    folder = shutil.copytree(checkpoint, tmp_path / "half")
    if renamed:
        file = folder / "cpu_hierarchical.py"
        file.write_text(file.read_text().replace(renamed, f"{renamed}_of_old"))
    half = pipeline(
        "hierarchical-text-classification",
        model=str(folder),
        trust_remote_code=True,
        dtype=torch.bfloat16,
    )
    texts = [*TEXTS, LONG]
    for a, b in zip(classify(texts, levels=True), half(texts, levels=True), strict=True):
        for one, other in zip(a["levels"], b["levels"], strict=True):
            assert list(other.values()) == pytest.approx(list(one.values()), abs=0.03)
    if renamed != "_reorder_linear_weight":
        attention = "sdpa" if renamed else "per_document"
        assert half.model.encoder.config._attn_implementation == attention
    packs = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    is_off = "the faster CPU kernels are off" in warned.text and f"{renamed}_of_old" in warned.text
    assert is_off == (bool(renamed) and (packs or renamed != "_reorder_linear_weight"))


def test_an_error_in_a_batch_is_raised_and_no_thread_remains(checkpoint):
    broken = pipeline("hierarchical-text-classification", model=checkpoint, trust_remote_code=True)
    broken.model.heads.weight = nn.Parameter(torch.zeros(1, 1))
    before = threading.active_count()
    with pytest.raises(RuntimeError, match=r"shapes|size"):
        broken(TEXTS)
    assert threading.active_count() <= before  # threads of earlier tests may end meanwhile


def test_4_bit_weights_predict_equally_in_threads_and_alone(checkpoint):
    """bitsandbytes repacks them in the first forward on a CPU, in place."""
    # all begin at once
    texts = [f"study {i} of colitis in adults and of what became of the ulcers" for i in range(8)]
    quantization = BitsAndBytesConfig(load_in_4bit=True)
    alone = AutoModel.from_pretrained(
        checkpoint, trust_remote_code=True, quantization_config=quantization
    )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    with torch.inference_mode():
        expected = [
            alone(**tokenizer(text, return_tensors="pt", truncation=True)).node_log_probs[0].exp()
            for text in texts
        ]
    for _ in range(3):
        classify = pipeline(
            "hierarchical-text-classification",
            model=checkpoint,
            trust_remote_code=True,
            model_kwargs={"quantization_config": quantization},
        )
        for result, nodes in zip(classify(texts, batch_size=2), expected, strict=True):
            assert result["score"] == pytest.approx(
                nodes[: UNEVEN.num_leaves].max().item(), abs=0.05
            )


def test_texts_are_padded_at_their_ends_and_masked_whatever_the_tokenizer_says(
    checkpoint, classify
):
    tokenizer = AutoTokenizer.from_pretrained(
        checkpoint, trust_remote_code=True, padding_side="left"
    )
    tokenizer.model_input_names = ["input_ids"]
    other = pipeline(
        "hierarchical-text-classification",
        model=checkpoint,
        tokenizer=tokenizer,
        trust_remote_code=True,
    )
    for found, expected in zip(
        other(TEXTS, batch_size=5), classify(TEXTS, batch_size=1), strict=True
    ):
        assert (found["label"], found["score"]) == (
            expected["label"],
            pytest.approx(expected["score"], abs=1e-5),
        )
