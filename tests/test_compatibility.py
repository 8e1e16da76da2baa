"""A published checkpoint loads for good: tests/checkpoint holds weights and a configuration of each form, and their predictions.

Today's code runs over them. The code that travels with a checkpoint is not stored: copies that change with every commit
would prove nothing about the past.
"""

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, stranger
from transformers import AutoTokenizer

from modeling_hierarchical import SHIPPED_FILES, HierarchicalForSequenceClassification
from push_to_hub import merge

FOLDER = Path(__file__).parent / "checkpoint"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
FORMS = ("adapter_form", "whole_form")


@pytest.mark.parametrize("form", FORMS)
def test_the_code_of_today_answers_as_the_code_that_made_it(form, monkeypatch):
    monkeypatch.chdir(FOLDER)  # the adapter's encoder is named by a relative path
    model = HierarchicalForSequenceClassification.from_pretrained(form)
    tokenizer = AutoTokenizer.from_pretrained("encoder")
    with torch.inference_mode():
        output = model(**tokenizer(EXPECTED["texts"], truncation=True, padding=True, return_tensors="pt"))
    assert model.config.tree.labels == EXPECTED["labels"]
    torch.testing.assert_close(output.node_log_probs.exp(), torch.tensor(EXPECTED["probabilities"]), atol=1e-5, rtol=0)


def test_a_checkpoint_that_reads_few_tokens_is_merged(monkeypatch, tmp_path):
    monkeypatch.chdir(FOLDER)
    merge(Path("adapter_form"), tmp_path)
    load, tokens = HierarchicalForSequenceClassification.from_pretrained, AutoTokenizer.from_pretrained("encoder")
    given = tokens(EXPECTED["texts"], truncation=True, padding=True, return_tensors="pt")
    with torch.inference_mode():
        output = load(tmp_path)(**given)
    torch.testing.assert_close(output.node_log_probs.exp(), torch.tensor(EXPECTED["probabilities"]), atol=1e-5, rtol=0)


def test_a_stranger_loads_it_and_saves_what_loads_again(tmp_path):
    published = tmp_path / "published"
    shutil.copytree(FOLDER, published)
    for form, name in itertools.product(FORMS, SHIPPED_FILES):
        shutil.copy(ROOT / name, published / form)
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
    for answers in stranger(code, published, home):
        assert [label for label, _, _ in answers] == [label for _, label in leaves]
        assert [score for _, score, _ in answers] == pytest.approx([score for score, _ in leaves], abs=1e-5)
        assert [truncated for _, _, truncated in answers] == [False, False, True]
    assert set(os.listdir(tmp_path / "whole_form")) >= {"pipeline_hierarchical.py", "model.safetensors"}
