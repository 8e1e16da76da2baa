"""Check that published checkpoints stay loadable. tests/checkpoint holds each form of a checkpoint, and its predictions.

The current code loads them. The code that is published with a checkpoint is not stored: copies that change with every commit
would prove nothing about the past.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, copy_checkpoint, run_outside
from transformers import AutoTokenizer

from modeling_hierarchical import HierarchicalForSequenceClassification
from pipeline_hierarchical import HierarchicalTextClassificationPipeline, conformal_answer, guaranteed_threshold
from publishing.export import export_merged

FOLDER = ROOT / "tests" / "checkpoint"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
FORMS = ("adapter_form", "self_contained")


@pytest.mark.parametrize("form", FORMS)
def test_the_current_code_gives_the_stored_predictions(form, monkeypatch):
    monkeypatch.chdir(FOLDER)  # the adapter's encoder is named by a relative path
    model = HierarchicalForSequenceClassification.from_pretrained(form)
    tokenizer = AutoTokenizer.from_pretrained("encoder")
    with torch.inference_mode():
        output = model(**tokenizer(EXPECTED["texts"], truncation=True, padding=True, return_tensors="pt"))
    assert model.config.tree.labels == EXPECTED["labels"]
    torch.testing.assert_close(output.node_log_probs.exp(), torch.tensor(EXPECTED["probabilities"]), atol=1e-5, rtol=0)


def test_a_folder_does_not_take_the_place_of_a_pinned_encoder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FOLDER / "encoder", "base/tiny")
    shutil.copytree(FOLDER / "adapter_form", "model")
    config = json.loads(Path("model/config.json").read_text())
    pinned = {"encoder_name_or_path": "base/tiny", "encoder_revision": "0" * 40}
    Path("model/config.json").write_text(json.dumps(config | pinned))
    with pytest.raises(ValueError, match="the folder base/tiny of the working directory hides the encoder base/tiny"):
        HierarchicalForSequenceClassification.from_pretrained("model")


@pytest.mark.parametrize("form", FORMS)
def test_the_next_stored_threshold_serves_a_coverage(form, monkeypatch):
    monkeypatch.chdir(FOLDER)
    stored = json.loads(Path(form, "config.json").read_text())["conformal_thresholds"]
    model = HierarchicalForSequenceClassification.from_pretrained(form)
    for place in range(1, 991):
        threshold = guaranteed_threshold("coverage", place / 1000, model.config.conformal_thresholds)
        assert threshold == next(one for one in stored if one >= place / 1000)
    classify = HierarchicalTextClassificationPipeline(
        model=model, tokenizer=AutoTokenizer.from_pretrained("encoder"), coverage=0.851
    )
    for result, nodes in zip(classify(EXPECTED["texts"]), EXPECTED["probabilities"], strict=True):
        answer = conformal_answer(classify.tree, nodes, 0.86)
        assert [node["label"] for node in result["answer"]] == [EXPECTED["labels"][node] for node in answer]
    with pytest.raises(
        ValueError, match="coverage needs texts truncated at 32 tokens"
    ):  # the tokenizer's limit: none is stored
        classify("A headache", max_length=16)


def test_a_checkpoint_that_reads_few_tokens_is_merged(monkeypatch, tmp_path):
    monkeypatch.chdir(FOLDER)
    export_merged(Path("adapter_form"), tmp_path)
    load, tokens = HierarchicalForSequenceClassification.from_pretrained, AutoTokenizer.from_pretrained("encoder")
    given = tokens(EXPECTED["texts"], truncation=True, padding=True, return_tensors="pt")
    with torch.inference_mode():
        output = load(tmp_path)(**given)
    torch.testing.assert_close(output.node_log_probs.exp(), torch.tensor(EXPECTED["probabilities"]), atol=1e-5, rtol=0)


def test_a_fresh_process_loads_it_and_saves_what_loads_again(tmp_path):
    published = tmp_path / "published"
    shutil.copytree(FOLDER / "encoder", published / "encoder")
    for form in FORMS:
        copy_checkpoint(form, published / form)
    code = f"""
import json, os
from transformers import AutoModel, AutoTokenizer, pipeline
answers = []
for form in {FORMS!r}:
    model = AutoModel.from_pretrained(form, trust_remote_code=True)
    model.save_pretrained(os.path.join({str(tmp_path)!r}, form))
    AutoTokenizer.from_pretrained(form, trust_remote_code=True).save_pretrained(os.path.join({str(tmp_path)!r}, form))
    for folder in (form, os.path.join({str(tmp_path)!r}, form)):
        classify = pipeline("hierarchical-text-classification", model=folder, trust_remote_code=True)
        answers.append([[result["label"], result["score"], result["truncated"]] for result in classify({EXPECTED["texts"]!r})])
print(json.dumps(answers))
"""
    home = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    leaves = [
        max(zip(row[: EXPECTED["num_leaves"]], EXPECTED["labels"], strict=False)) for row in EXPECTED["probabilities"]
    ]
    for answers in run_outside(code, published, home):
        assert [label for label, _, _ in answers] == [label for _, label in leaves]
        assert [score for _, score, _ in answers] == pytest.approx([score for score, _ in leaves], abs=1e-5)
        assert [truncated for _, _, truncated in answers] == [False, False, True]
    assert set(os.listdir(tmp_path / "self_contained")) >= {"pipeline_hierarchical.py", "model.safetensors"}
