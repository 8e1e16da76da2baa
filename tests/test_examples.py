"""Check the scripts that classify texts, list labels that may be wrong, and halve an encoder."""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import clear_rows, read_csv, run, untrained_model, write_csv
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


def test_every_row_is_predicted_by_a_model_that_was_not_trained_on_its_text(tiny_encoder, tmp_path):
    rows = clear_rows(1)[:60] + clear_rows(1)[:2]  # two texts occur twice
    file = write_csv(tmp_path / "rows.csv", rows)
    flags = ["--data_path", file, "--model_name_or_path", tiny_encoder, "--max_steps", 2]
    flags += ["--quantization", "none", "--eval_strategy", "no", "--load_best_model_at_end=false"]
    words = ["--folds", 2, "--", *flags, "--output_dir", tmp_path / "folds"]
    printed = run(*words, command="examples/cross_validate.py").stdout
    table = read_csv(tmp_path / "folds" / "out_of_fold.csv")
    assert [int(row["row"]) for row in table] == [*range(len(rows))]
    assert [row["label"] for row in table] == [row["label"] for row in rows]
    folds = [read_csv(tmp_path / "folds" / f"fold-{i}" / "test_predictions.csv") for i in (1, 2)]
    texts = [{rows[int(row["row"])]["text"] for row in fold} for fold in folds]
    assert texts[0].isdisjoint(texts[1])
    accuracies = [sum(row["correct"] == "True" for row in fold) / len(fold) for fold in folds]
    assert f"accuracy        {sum(accuracies) / 2:.4f}" in printed


def test_two_models_are_compared_on_the_same_rows(tmp_path):
    """The second model corrects 8 rows of 40, and has one wrong that was right."""
    labels = [f"class {i % 4}" for i in range(40)]
    predicted = {"one": labels.copy(), "other": labels.copy()}
    for i in range(8):
        predicted["one"][i] = "class 3" if labels[i] != "class 3" else "class 0"
    predicted["other"][20] = "class 1"
    for name, values in predicted.items():
        rows = [
            {"row": i, "text_id": i, "label": label, "prediction": value, "correct": label == value}
            for i, (label, value) in enumerate(zip(labels, values, strict=True))
        ]
        (tmp_path / name).mkdir()
        write_csv(tmp_path / name / "test_predictions.csv", rows)
    printed = run(tmp_path / "one", tmp_path / "other", command="examples/compare.py").stdout
    assert "micro-F1 80.0%, 97.5%: +17.5%, between +" in printed
    alone = "right by the first model alone 1 rows, by the second alone 8"
    # two-sided binomial test: 2 · (C(9, 0) + C(9, 1)) / 2⁹
    assert f"{alone}: p {20 / 512:.3g}" in printed
    shutil.copy(tmp_path / "one" / "test_predictions.csv", tmp_path)
    (tmp_path / "one" / "test_predictions.csv").write_text("row,text_id,label,prediction,correct\n")
    done = run(tmp_path / "one", tmp_path / "other", command="examples/compare.py", check=False)
    assert done.returncode == 2
    assert "have scores of other rows or labels" in done.stderr
