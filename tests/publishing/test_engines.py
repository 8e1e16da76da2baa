"""Test published checkpoints in other engines: ONNX Runtime, text-embeddings-inference, OpenVINO
and Inference Endpoints.

text-embeddings-inference is not installed. Its reading of files and its computations are
reimplemented here, from its source.
"""

import functools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from conftest import CLEAR, ROOT, close, run, run_outside, untrained_model, write_labels_checkpoint
from safetensors.torch import load_file, save_file
from scipy.special import expit, softmax
from tokenizers import Tokenizer
from transformers import AutoTokenizer, pipeline

from hierarchical_clinicalbert.checkpoint_files import ONNX_FILE, QUANTIZED_ONNX_FILE
from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.publishing.export import Logits, export_onnx
from taxonomy_hierarchical import Taxonomy

TEXTS = [
    f"We treated {name} and compared it with {names[0]}."
    for names in CLEAR.values()
    for name in names
]
LONG = " ".join(TEXTS)  # beyond the 256 tokens of the multi-label model
FORMS = ("one_path", "several_labels")


@pytest.fixture(scope="module")
def published(hub, tiny_encoder, long_checkpoint, tmp_path_factory) -> dict[str, Path]:
    """Publish a single-path checkpoint for long texts, and a multi-label one with family attention
    over two windows.

    Return folders with the published files, by form.
    """
    folder = tmp_path_factory.mktemp("engines")
    # [CLS] and [SEP]
    settings = {"pooling": "family_attention", "tokens_before": [101], "tokens_after": [102]}
    labels = write_labels_checkpoint(tiny_encoder, folder / "labels", max_length=256, **settings)
    (folder / "labels" / "README.md").write_text("A checkpoint.")
    for form, checkpoint, flags in (
        ("one_path", long_checkpoint, ["--merge"]),
        ("several_labels", labels, []),
    ):
        words = ["--model", checkpoint, "--repo_id", f"alice/{form}", "--onnx", *flags]
        done = run(*words, command="push_to_hub.py", settings=hub.environment(token="hf_alice"))
        assert "axis name" not in done.stderr  # in warnings of the exporter
        hub.write(f"alice/{form}", folder / form)
    return {form: folder / form for form in FORMS}


def classify(folder: Path, texts: list[str], **parameters) -> list:
    return pipeline("hierarchical-text-classification", model=str(folder), trust_remote_code=True)(
        texts, **parameters
    )


def probabilities(folder: Path, texts: list[str]) -> np.ndarray:
    """Return the pipeline's class probabilities (num_texts, num_classes), in the order of
    label2id.
    """
    results = [result["labels"] for result in classify(folder, texts, top_k=99)]
    labels = json.loads((folder / "config.json").read_text())["label2id"]
    scores = np.zeros((len(texts), len(labels)))
    for row, result in zip(scores, results, strict=True):
        for one in result:
            row[labels[one["label"]]] = one["score"]
    return scores


LINK = {"one_path": functools.partial(softmax, axis=1), "several_labels": expit}


def run_onnx(file: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {one.name: inputs[one.name] for one in session.get_inputs()})[0]


# ONNX


@pytest.mark.parametrize("form", FORMS)
def test_the_onnx_files_give_the_probabilities_of_the_pipeline(published, long_texts, form):
    texts = [*TEXTS[::6], LONG, *long_texts.values()]
    tokenizer = AutoTokenizer.from_pretrained(published[form], trust_remote_code=True)
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="np")
    # of another shape
    first = {one: ids[:1, : inputs["attention_mask"][0].sum()] for one, ids in inputs.items()}
    expected = probabilities(published[form], texts)
    for name, tolerance in ((ONNX_FILE, 1e-3), (QUANTIZED_ONNX_FILE, 0.1)):
        found = LINK[form](run_onnx(published[form] / name, inputs))
        np.testing.assert_allclose(found, expected, atol=tolerance)
        alone = LINK[form](run_onnx(published[form] / name, first))
        np.testing.assert_allclose(alone, expected[:1], atol=tolerance)
    ids = json.loads((published[form] / "config.json").read_text())["label2id"]
    assert form != "one_path" or expected[-5:].argmax(1).tolist() == [
        ids[label] for label in long_texts
    ]


def test_an_export_whose_probabilities_differ_is_refused(published, monkeypatch, tmp_path):
    model = onnx_ir.load(published["several_labels"] / ONNX_FILE)
    monkeypatch.setattr(
        torch.onnx, "export", lambda *arguments, **options: SimpleNamespace(model=model)
    )
    folder = shutil.copytree(published["several_labels"], tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"heads.bias": tensors["heads.bias"] + 0.2},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        InputError, match=r"model\.onnx changes the probabilities by .*; publish without --onnx"
    ):
        export_onnx(folder, tmp_path)


def served_softmax(logits: np.ndarray) -> np.ndarray:
    """Compute the softmax as text-embeddings-inference does: in float32, minus the logit of the
    largest absolute value.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        powers = np.exp(logits - logits[np.abs(logits).argmax()], dtype=np.float32)
        return powers / powers.sum(dtype=np.float32)


def test_the_softmax_of_text_embeddings_inference_stays_finite_for_improbable_leaves(tiny_encoder):
    tree = Taxonomy({"a": {"b": ["c", "d"], "e": None}, "f": None})
    model = untrained_model(tiny_encoder, tree)
    with torch.no_grad():  # P(c) is about exp(-60), P(d) about exp(-180)
        model.heads.bias.copy_(
            torch.tensor([{"b": -60.0, "d": -120.0}.get(name, 0.0) for name in tree.names])
        )
    inputs = AutoTokenizer.from_pretrained(tiny_encoder)(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = model(**inputs).logits.double().exp().numpy()
        logits = Logits(model, [*inputs])(*inputs.values()).numpy()  # what is exported
    assert expected.min() < 1e-70
    for row, exact in zip(logits, expected, strict=True):
        np.testing.assert_allclose(served_softmax(row), exact, rtol=1e-3, atol=1e-30)


# text-embeddings-inference


def served_logits(folder: Path, texts: list[str]) -> tuple[list[str], np.ndarray]:
    """Return labels and raw scores as text-embeddings-inference computes them on a CPU, with
    truncation, from a repository.
    """
    config = json.loads((folder / "config.json").read_text())
    assert any(architecture.endswith("Classification") for architecture in config["architectures"])
    assert isinstance(config["model_type"], str)
    for name in ("max_position_embeddings", "hidden_size", "num_hidden_layers", "pad_token_id"):
        assert type(config[name]) is int
    labels = [config["id2label"][str(i)] for i in range(len(config["id2label"]))]
    assert config["label2id"] == {label: i for i, label in enumerate(labels)}
    length = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    assert length == config["max_position_embeddings"]
    assert json.loads((folder / "tokenizer_config.json").read_text())["padding_side"] == "right"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=config["pad_token_id"])
    tokenizer.enable_truncation(length)
    rows = tokenizer.encode_batch(texts)
    inputs = {
        "input_ids": [row.ids for row in rows],
        "attention_mask": [row.attention_mask for row in rows],
        "token_type_ids": [row.type_ids for row in rows],
    }
    return labels, run_onnx(
        folder / ONNX_FILE, {name: np.array(ids) for name, ids in inputs.items()}
    )


@pytest.mark.parametrize("form", FORMS)
def test_text_embeddings_inference_gives_the_probabilities_of_the_pipeline(
    published, long_texts, form
):
    texts = [*TEXTS[::5], LONG, *long_texts.values()]
    labels, logits = served_logits(published[form], texts)
    assert labels == list(
        json.loads((published[form] / "config.json").read_text())["id2label"].values()
    )
    # for multi-label models it has no sigmoid: clients request raw scores
    scores = expit(logits) if form == "several_labels" else [served_softmax(row) for row in logits]
    assert classify(published[form], texts)[-1]["truncated"] == (form != "one_path")
    assert form != "one_path" or [labels[row.argmax()] for row in scores[-5:]] == list(long_texts)
    np.testing.assert_allclose(scores, probabilities(published[form], texts), atol=1e-3)


# OpenVINO


def test_openvino_gives_the_labels_of_the_pipeline(openvino, published):
    folder = published["one_path"]
    texts = [*TEXTS, LONG]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="np")
    core = openvino.Core()
    model = core.compile_model(
        core.read_model(folder / ONNX_FILE), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    logits = model({one.any_name: inputs[one.any_name] for one in model.inputs})["logits"]
    np.testing.assert_allclose(LINK["one_path"](logits), probabilities(folder, texts), atol=1e-4)


# Inference Endpoints

TOOLKIT = """
import json, sys
sys.path.insert(0, {folder!r})
from handler import EndpointHandler
serve = EndpointHandler({folder!r})
answers = []
for request in json.loads({requests!r}):
    try:
        answers.append(serve(request))
    except Exception as error:
        answers.append({{"error": str(error)}})
print(json.dumps(answers))
"""


def serve(folder: Path, requests: list) -> list:
    """Return the responses of the toolkit of Inference Endpoints, in a separate process."""
    return run_outside(
        TOOLKIT.format(folder=str(folder), requests=json.dumps(requests)), folder.parent
    )


PARAMETERS = {
    "one_path": [{"coverage": 0.8}, {"top_k": 2}, {"levels": True}],
    "several_labels": [{"recall": 0.8}, {"top_k": 2}],
}


@pytest.mark.parametrize("form", FORMS)
def test_an_endpoint_answers_as_the_pipeline(published, long_texts, form):
    texts = [*TEXTS[::7], LONG, *([*long_texts.values()][:1] if form == "one_path" else ())]
    bodies = [{"inputs": texts, "parameters": parameters} for parameters in PARAMETERS[form]]
    bodies += [{"inputs": texts[0]}, {"inputs": texts[:1], "parameters": None}]
    *answers, text, texts_without = serve(published[form], bodies)
    for parameters, answer in zip(PARAMETERS[form], answers, strict=True):
        assert answer == close(classify(published[form], texts, **parameters)), parameters
    assert form != "one_path" or answers[0][-1]["label"] == next(iter(long_texts))
    assert text == close(classify(published[form], texts[:1])[0])
    assert texts_without == close([text])


def test_a_bad_request_is_refused_in_one_line_without_its_text(published):
    secret = "Mrs Smith has colitis"
    cases = [
        ({"parameters": {}}, 'a request is {"inputs": a text or a list of texts}'),
        ({"inputs": [secret, 5]}, "the item at position 1 (counted from 0) is not a text but int"),
        ({"inputs": " "}, "the text at position 0 (counted from 0) is empty"),
        ({"inputs": secret, "parameters": [1]}, '"parameters" must be an object with any of top_k'),
        (
            {"inputs": secret, "parameters": {"batch_size": 10**9}},
            "must be an object with any of top_k",
        ),
        (
            {"inputs": secret, "parameters": {"recall": 0.9}},
            "this checkpoint guarantees a coverage, no recall",
        ),
        ({"inputs": secret, "parameters": {"prior": "/etc/passwd"}}, "prior must be a list of"),
    ]
    answers = serve(published["one_path"], [request for request, _ in cases])
    for answer, (_, message) in zip(answers, cases, strict=True):
        assert message in answer["error"]
        assert "\n" not in answer["error"]
        assert secret not in answer["error"]


def test_an_endpoint_installs_what_the_checkpoint_needs(published):
    ours = dict(re.findall(r"(?m)^([\w-]+)(.*)$", (ROOT / "requirements.txt").read_text()))
    installed = (published["one_path"] / "requirements.txt").read_text().splitlines()
    assert installed == [f"{name}{ours[name]}" for name in ("torch", "transformers")]
