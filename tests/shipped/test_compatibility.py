"""Check that published checkpoints stay loadable: tests/checkpoint holds each form of one, and the
predictions.

The current code loads them. The code that is published with a checkpoint is not stored: copies that
change with every commit would prove nothing about the past.
"""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, copy_checkpoint, run_outside

from checkpoint_hierarchical import SHIPPED_FILES
from modeling_hierarchical import HierarchicalForSequenceClassification

FOLDER = ROOT / "tests" / "checkpoint"
GUARANTEES = {
    "adapter_form": {"coverage": 0.841},
    "self_contained": {"coverage": 0.841},
    "several_labels": {"recall": 0.841},
}


def test_a_fresh_process_predicts_as_stored_and_saves_what_predicts_so_again(tmp_path):
    published = tmp_path / "published"
    expected = {}
    shutil.copytree(FOLDER / "encoder", published / "encoder")
    for form in GUARANTEES:
        copy_checkpoint(form, published / form)
        name = "expected_several_labels.json" if form == "several_labels" else "expected.json"
        expected[form] = json.loads((FOLDER / name).read_text())
    code = f"""
import json
from transformers import AutoModel, AutoTokenizer, pipeline
found = []
for form, guarantee in {GUARANTEES!r}.items():
    saved = {str(tmp_path)!r} + "/" + form
    AutoModel.from_pretrained(form, trust_remote_code=True).save_pretrained(saved)
    AutoTokenizer.from_pretrained(form, trust_remote_code=True).save_pretrained(saved)
    for folder in (form, saved):
        task = "hierarchical-text-classification"
        classify = pipeline(task, model=folder, trust_remote_code=True)
        found.append((form, classify({expected[form]["texts"]!r}, levels=True, **guarantee)))
print(json.dumps(found))
"""
    for form, results in run_outside(
        code, published, {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    ):
        stored = expected[form]
        assert [[node["label"] for node in one["labels"]] for one in results] == stored["predicted"]
        sets = [[node["label"] for node in one["prediction_set"]] for one in results]
        assert sets == stored["prediction_sets"]  # for a share of 0.85: 0.841 is rounded up
        assert [one["truncated"] for one in results] == [False, False, True]
        nodes = [node for one in results for node in (one, *one["labels"])]
        # of which these checkpoints store nothing
        assert not any("p_value" in node for node in nodes)
        for one, probabilities in zip(results, stored["probabilities"], strict=True):
            found = {label: score for level in one["levels"] for label, score in level.items()}
            assert [found[label] for label in stored["labels"]] == pytest.approx(
                probabilities, abs=1e-5
            )
    assert {path.name for path in (tmp_path / "self_contained").iterdir()} >= {
        *SHIPPED_FILES,
        "model.safetensors",
    }


def test_a_folder_does_not_take_the_place_of_a_pinned_encoder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FOLDER / "encoder", "base/tiny")
    shutil.copytree(FOLDER / "adapter_form", "model")
    config = json.loads(Path("model/config.json").read_text())
    pinned = {"encoder_name_or_path": "base/tiny", "encoder_revision": "0" * 40}
    Path("model/config.json").write_text(json.dumps(config | pinned))
    with pytest.raises(
        ValueError,
        match="the folder base/tiny of the working directory hides the encoder base/tiny",
    ):
        HierarchicalForSequenceClassification.from_pretrained("model")
