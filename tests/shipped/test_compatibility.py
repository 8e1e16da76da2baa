"""Check that published checkpoints stay loadable: tests/checkpoint holds each form of one, and the predictions.

Its folder ``format_1`` holds those of the format before `Calibration`, written by the code of that time.

The current code loads them. The code that is published with a checkpoint is not stored: copies that change with every commit
would prove nothing about the past.
"""

import json
import os
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import ROOT, copy_checkpoint, run_outside
from transformers import AutoTokenizer

from checkpoint_hierarchical import SHIPPED_FILES
from configuration_hierarchical import HierarchicalConfig
from modeling_hierarchical import HierarchicalForSequenceClassification
from pipeline_hierarchical import HierarchicalTextClassificationPipeline

FOLDER = ROOT / "tests" / "checkpoint"
FORMS = ("adapter_form", "self_contained", "several_labels")
GUARANTEES = dict(zip(FORMS, ("coverage", "coverage", "recall"), strict=True))
EVERY = pytest.mark.parametrize(("folder", "form"), list(product([FOLDER, FOLDER / "format_1"], FORMS)))


def read_expected(folder: Path, form: str) -> dict:
    return json.loads((folder / f"expected{'_several_labels' * (form == 'several_labels')}.json").read_text())


def check_probabilities(model: HierarchicalForSequenceClassification, expected: dict) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "encoder")
    with torch.inference_mode():
        output = model(**tokenizer(expected["texts"], truncation=True, padding=True, return_tensors="pt"))
    torch.testing.assert_close(output.node_log_probs.exp(), torch.tensor(expected["probabilities"]), atol=1e-5, rtol=0)


@EVERY
def test_the_current_code_gives_the_stored_predictions(folder, form, monkeypatch):
    monkeypatch.chdir(folder)  # the adapter's encoder is named by a relative path
    expected = read_expected(folder, form)
    model = HierarchicalForSequenceClassification.from_pretrained(form)
    assert model.config.tree.labels == expected["labels"]
    check_probabilities(model, expected)
    classify = HierarchicalTextClassificationPipeline(model=model, tokenizer=AutoTokenizer.from_pretrained("encoder"))
    guarantee = GUARANTEES[form]
    results = classify(expected["texts"], **{guarantee: 0.841})  # rounded up to 0.85
    assert [[node["label"] for node in result["labels"]] for result in results] == expected["predicted"]
    assert [[node["label"] for node in result["prediction_set"]] for result in results] == expected["prediction_sets"]
    thresholds = model.config.calibration.set_thresholds  # of the shares 0.01, 0.02 …: the next one serves
    for place in range(1, 991):
        found = classify.decisions.set_threshold(model.config.calibration, **{guarantee: place / 1000})
        assert found == thresholds[-(-place // 10) - 1]
    # the stored length, or if none is stored the tokenizer's limit
    with pytest.raises(ValueError, match=f"{guarantee} needs texts truncated at 32 tokens"):
        classify("A headache", max_length=16, **{guarantee: 0.9})


@EVERY
def test_a_saved_checkpoint_has_the_current_format(folder, form, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    HierarchicalForSequenceClassification.from_pretrained(form, merge_adapter=False).save_pretrained(tmp_path)
    current = json.loads((FOLDER / form / "config.json").read_text())
    assert json.loads((tmp_path / "config.json").read_text()).keys() == current.keys()
    check_probabilities(HierarchicalForSequenceClassification.from_pretrained(tmp_path), read_expected(folder, form))


def test_the_thresholds_of_a_model_that_was_trained_on_the_validation_rows_are_not_read():
    stored = json.loads((FOLDER / "format_1" / "self_contained" / "config.json").read_text())
    assert HierarchicalConfig.from_dict(stored).calibration.set_thresholds == stored["conformal_thresholds"]
    assert HierarchicalConfig.from_dict(stored | {"refitted": True}).calibration.set_thresholds is None


def test_a_folder_does_not_take_the_place_of_a_pinned_encoder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FOLDER / "encoder", "base/tiny")
    shutil.copytree(FOLDER / "adapter_form", "model")
    config = json.loads(Path("model/config.json").read_text())
    pinned = {"encoder_name_or_path": "base/tiny", "encoder_revision": "0" * 40}
    Path("model/config.json").write_text(json.dumps(config | pinned))
    with pytest.raises(ValueError, match="the folder base/tiny of the working directory hides the encoder base/tiny"):
        HierarchicalForSequenceClassification.from_pretrained("model")


@pytest.mark.parametrize("folder", [FOLDER, FOLDER / "format_1"])
def test_a_fresh_process_loads_it_and_saves_what_loads_again(folder, tmp_path):
    published = tmp_path / "published"
    shutil.copytree(folder / "encoder", published / "encoder")
    for form in FORMS:
        copy_checkpoint((folder / form).relative_to(FOLDER), published / form)
    texts = read_expected(folder, "self_contained")["texts"]
    code = f"""
import json, os
from transformers import AutoModel, AutoTokenizer, pipeline
found = []
for form in {FORMS!r}:
    model = AutoModel.from_pretrained(form, trust_remote_code=True)
    model.save_pretrained(os.path.join({str(tmp_path)!r}, form))
    AutoTokenizer.from_pretrained(form, trust_remote_code=True).save_pretrained(os.path.join({str(tmp_path)!r}, form))
    for folder in (form, os.path.join({str(tmp_path)!r}, form)):
        classify = pipeline("hierarchical-text-classification", model=folder, trust_remote_code=True)
        found.append((form, classify({texts!r}, levels=True)))
print(json.dumps(found))
"""
    for form, results in run_outside(code, published, {"HF_MODULES_CACHE": str(tmp_path / "modules")}):
        expected = read_expected(folder, form)
        predicted = [[node["label"] for node in result["labels"]] for result in results]
        assert predicted == expected["predicted"]
        assert [result["truncated"] for result in results] == [False, False, True]
        for result, probabilities in zip(results, expected["probabilities"], strict=True):
            found = {label: score for level in result["levels"] for label, score in level.items()}
            assert [found[label] for label in expected["labels"]] == pytest.approx(probabilities, abs=1e-5)
    assert set(os.listdir(tmp_path / "self_contained")) >= {*SHIPPED_FILES, "model.safetensors"}
