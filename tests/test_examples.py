"""Check the scripts that classify texts, list labels that may be wrong, and halve an encoder."""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import clear_rows, run, untrained_model, write_csv
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertModel, pipeline


def test_the_script_prints_a_path_for_each_predicted_label(labels_checkpoint, tmp_path):
    # as Excel saves it
    (tmp_path / "texts.csv").write_text("text\nColitis with epilepsy\n", encoding="utf-8-sig")
    printed = run(
        labels_checkpoint, tmp_path / "texts.csv", command="examples/classify.py"
    ).stdout.split("\n")
    classify = pipeline(
        "hierarchical-text-classification", model=labels_checkpoint, trust_remote_code=True
    )
    paths = [one["path"] for one in classify("Colitis with epilepsy")["labels"]]
    assert len(paths) == 2
    expected = [
        "→ " + " → ".join(f"{node['label']} ({node['score']:.0%})" for node in path)
        for path in paths
    ]
    assert printed == ["", "  Colitis with epilepsy", *expected, ""]


def test_exchanged_labels_are_listed_first_with_the_true_one(tmp_path):
    pytest.importorskip("cleanlab")
    rows = clear_rows(1, wrong=False)
    true = [row["label"] for row in rows]
    wrong = [7, 40, 75]
    for number in wrong:
        rows[number]["label"] = true[number - 20]
    # a text with both labels
    file = write_csv(tmp_path / "train.csv", [*rows, rows[7] | {"label": true[7]}])
    printed = run(file, command="examples/label_issues.py").stdout
    listed = [*csv.DictReader(io.StringIO(printed))]
    assert list(listed[0]) == ["row", "label", "likely_label", "score"]
    assert sorted(int(row["row"]) for row in listed[:3]) == wrong
    assert all(row["label"] == rows[int(row["row"])]["label"] for row in listed)
    assert [row["likely_label"] for row in listed[:3]] == [
        true[int(row["row"])] for row in listed[:3]
    ]
    scores = [float(row["score"]) for row in listed]
    assert scores == sorted(scores)
    assert "We treated" not in printed


def test_too_few_texts_of_a_label_are_reported_in_one_line(tmp_path):
    pytest.importorskip("cleanlab")
    file = write_csv(tmp_path / "train.csv", clear_rows(1)[:1] * 9)
    done = run(file, command="examples/label_issues.py", check=False)
    message = "two labels need at least 5 different texts each: give more rows"
    assert (done.returncode, done.stderr) == (2, f"label_issues.py: error: {message}\n")


def test_half_of_an_encoder_has_every_second_layer_and_the_last(tiny_encoder, tmp_path):
    BertModel(AutoConfig.from_pretrained(tiny_encoder, num_hidden_layers=4)).save_pretrained(
        tmp_path / "four"
    )
    model = untrained_model(str(tmp_path / "four"), ["a", "b"])
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "checkpoint")
    run(tmp_path / "checkpoint", tmp_path / "half", command="examples/half_encoder.py")
    inputs = tokenizer("Colitis with epilepsy", return_tensors="pt")
    with torch.inference_mode():
        expected = model.encoder.embeddings(inputs["input_ids"])
        for layer in (1, 3):
            expected = model.encoder.encoder.layer[layer](expected)
        found = AutoModel.from_pretrained(tmp_path / "half").eval()(**inputs).last_hidden_state
    torch.testing.assert_close(found, expected)


def test_a_student_of_half_an_encoder_is_not_scored_on_the_texts_that_trained_it(
    clear_checkpoint, tiny_encoder, tmp_path
):
    trained = clear_rows(1)[:3]
    unseen = [
        {"text": f"A new text {i} about {row['text']}", "label": row["label"]}
        for i, row in enumerate(trained)
    ]
    train = write_csv(tmp_path / "train.csv", clear_rows(1))
    test = write_csv(tmp_path / "test.csv", unseen + trained)

    def report(checkpoint: Path, name: str) -> dict:
        run(checkpoint, tmp_path / name, command="examples/half_encoder.py")
        output = tmp_path / f"student of {name}"
        words = (
            "--model_name_or_path",
            tmp_path / name,
            "--train_file",
            train,
            "--test_file",
            test,
        )
        run(
            *words,
            "--validation_size",
            0,
            "--max_steps",
            1,
            "--tuning",
            "full",
            "--output_dir",
            output,
        )
        return json.loads((output / "data_report.json").read_text())

    found = report(Path(clear_checkpoint), "half")
    assert found["trained_before"] == {"scores": "verified", "left_out": {"test": 3}}
    assert found["splits"]["test"]["rows"] == 3
    unknown = Path(shutil.copytree(clear_checkpoint, tmp_path / "copied"))
    (unknown / "trained_texts.json").unlink()
    assert report(unknown, "other half")["trained_before"]["scores"] == "unverified"
