"""Train, score, calibrate and publish in Python, by the names of the package alone."""

import json
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, clear_rows, same_weights, write_csv
from sklearn.metrics import accuracy_score, log_loss
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

import train
from hierarchical_clinicalbert import (
    HierarchicalTrainer,
    HierarchicalTrainingArguments,
    InputError,
    ModelArguments,
    build_model,
    read_rows,
)

TAXONOMY = ROOT / "examples" / "taxonomy.yaml"
SETTINGS = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 3}
SETTINGS |= {"save_strategy": "steps", "save_steps": 3}
LABELS = ROOT / "examples" / "multi_label"
MEASURED = ("runtime", "per_second")  # ends of the names of times


def splits_of(rows: list[dict]) -> dict[str, list[dict]]:
    """Return rows as three splits without a text in common."""
    return {"train": rows[::3], "validation": rows[1::3], "test": rows[2::3]}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return splits_of(clear_rows(1) + clear_rows(2))


def read_metrics(folder: Path) -> dict:
    metrics = json.loads((folder / "metrics.json").read_text())
    return {name: value for name, value in metrics.items() if not name.endswith(MEASURED)}


@pytest.mark.parametrize("form", ["one path", "many nodes"])
def test_python_and_the_command_make_the_same_checkpoint(tiny_encoder, rows, tmp_path, form):
    files = {split: write_csv(tmp_path / f"{split}.csv", part) for split, part in rows.items()}
    if form == "many nodes":
        files = {split: str(LABELS / f"{split}.jsonl") for split in ("train", "validation", "test")}
    words = [f"--{name}={value}" for name, value in SETTINGS.items()]
    words += [f"--{split}_file={file}" for split, file in files.items()]
    words += [f"--taxonomy={TAXONOMY}", f"--model_name_or_path={tiny_encoder}", "--max_length=64"]
    train.main([*words, "--quantization=none", f"--output_dir={tmp_path / 'command'}"])

    data = read_rows(files, TAXONOMY)
    arguments = ModelArguments(tiny_encoder, quantization="none")
    model = build_model(arguments, data.taxonomy, problem_type=data.problem_type)
    args = HierarchicalTrainingArguments(str(tmp_path / "python"), **SETTINGS)
    trainer = HierarchicalTrainer(model, args, data=data, max_length=64)
    trainer.train()

    one, other = tmp_path / "command", tmp_path / "python"
    assert same_weights(one, other)
    assert (one / "config.json").read_text() == (other / "config.json").read_text()
    assert read_metrics(one) == read_metrics(other)
    assert [line for line in (one / "README.md").open() if "Training time" not in line] == [
        line for line in (other / "README.md").open() if "Training time" not in line
    ]


@pytest.fixture(scope="module")
def trained(tiny_encoder, rows, tmp_path_factory) -> HierarchicalTrainer:
    """Return a Trainer that has trained on rows as people have them."""
    model = build_model(ModelArguments(tiny_encoder, quantization="none"), TAXONOMY)
    folder = tmp_path_factory.mktemp("python") / "results"
    args = HierarchicalTrainingArguments(str(folder), num_train_epochs=6, learning_rate=5e-3)
    validation = pd.DataFrame(rows["validation"]).rename(columns={"text": "letter"})
    training = datasets.Dataset.from_list(rows["train"]).rename_column("text", "letter")
    columns = {"letter": "text", "label": "label"}
    trainer = HierarchicalTrainer(model, args, training, validation, column_mapping=columns)
    trainer.train()
    return trainer


def probabilities(folder: str | Path, rows: list[dict]) -> tuple[np.ndarray, list[str]]:
    """Return what the stock pipeline says of rows, (num_rows, num_leaves), and the leaves."""
    classify = pipeline("text-classification", model=str(folder), trust_remote_code=True)
    leaves = sorted(classify.model.config.label2id)
    found = classify([row["text"] for row in rows], top_k=None)
    scores = [{one["label"]: one["score"] for one in result} for result in found]
    return np.array([[of_text[leaf] for leaf in leaves] for of_text in scores]), leaves


def test_scores_are_those_of_the_saved_checkpoint_and_leave_trained_texts_out(trained, rows):
    given = [{"letter": row["text"], "label": row["label"]} for row in rows["test"]]
    seen = [{"letter": row["text"], "label": row["label"]} for row in rows["train"]]
    metrics = trained.score(given + seen)
    p, leaves = probabilities(trained.args.output_dir, rows["test"])
    truth = [row["label"] for row in rows["test"]]
    predicted = np.array(leaves)[p.argmax(1)]
    assert metrics["test_accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert metrics["test_log_loss"] == pytest.approx(log_loss(truth, p, labels=leaves), abs=1e-5)
    low, high = metrics["intervals"]["test_accuracy"]
    assert low <= metrics["test_accuracy"] <= high
    with pytest.raises(InputError, match="no test rows are left: the model was trained on all"):
        trained.score(seen)


def test_a_checkpoint_is_calibrated_again_for_other_texts_without_training(trained, rows, tmp_path):
    """At another hospital, every third label is another one, so the model is too sure."""
    labels = [row["label"] for row in rows["test"]]
    others = [
        {"text": f"{row['text']} Seen at another hospital.", "label": labels[(i + i % 3 // 2) % 60]}
        for i, row in enumerate(rows["test"][:60])
    ]
    before = trained.args.output_dir
    model = AutoModel.from_pretrained(before, trust_remote_code=True)
    trainer = HierarchicalTrainer(model, HierarchicalTrainingArguments(str(tmp_path / "other")))
    calibration = trainer.calibrate(others)
    assert calibration.num_texts == 60

    truth = [row["label"] for row in others]
    losses = [
        log_loss(truth, p, labels=leaves)
        for p, leaves in (probabilities(folder, others) for folder in (before, tmp_path / "other"))
    ]
    assert losses[1] < losses[0]
    assert trainer.scores["uncalibrated_eval_log_loss"] == pytest.approx(losses[0], abs=1e-5)
    # what the rows calibrated is no test text of the new checkpoint
    with pytest.raises(InputError, match="no test rows are left"):
        trainer.score(others)


def test_a_model_that_is_trained_on_says_what_it_loses(trained, rows, tmp_path, caplog):
    model = AutoModel.from_pretrained(trained.args.output_dir, trust_remote_code=True)
    args = HierarchicalTrainingArguments(str(tmp_path / "more"), max_steps=1)
    trainer = HierarchicalTrainer(model, args, rows["train"])
    trainer.train()
    assert "prediction sets for 90 % coverage and p-values are removed" in caplog.text
    classify = pipeline(
        "hierarchical-text-classification", model=str(tmp_path / "more"), trust_remote_code=True
    )
    with pytest.raises(ValueError, match="coverage"):
        classify("A text.", coverage=0.9)


@pytest.mark.parametrize("convert", [pd.DataFrame, datasets.Dataset.from_list, list])
def test_rows_are_what_people_have(rows, tmp_path, convert):
    everything = rows["train"] + rows["test"]
    file = read_rows(write_csv(tmp_path / "rows.csv", everything), TAXONOMY)
    found = read_rows(convert(everything), TAXONOMY)
    assert {split: part[:] for split, part in found.splits.items()} == {
        split: part[:] for split, part in file.splits.items()
    }
    assert found.report["splits"] == file.report["splits"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "a", "label": "gout"}], {}, "the rows, row 1.*gout"),
        ([{"letter": "a", "label": "gout"}], {}, "the rows has no column called .*, text,"),
        ([{"text": "a"}], {"column_mapping": {"text": "texts"}}, "text or label, not 'texts'"),
        ({"dev": [{"text": "a"}]}, {}, "train, validation and test, not of 'dev'"),
        ({"test": [3]}, {}, "the test rows cannot be used: "),
        ("absent.csv", {}, "absent.csv"),
    ],
)
def test_unusable_rows_are_refused_in_one_line(rows, options, message):
    with pytest.raises(InputError, match=message) as refused:
        read_rows(rows, TAXONOMY, **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpoint", ["clear_checkpoint", "labels_checkpoint"])
def test_a_stock_trainer_removes_the_guarantee_and_a_cast_does_not(
    checkpoint, dtype, tmp_path, request, warned
):
    folder = request.getfixturevalue(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=dtype, trust_remote_code=True
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    text = "We treated carcinoma with colitis."
    name = "recall" if model.config.problem_type == "multi_label_classification" else "coverage"

    def classify_with_a_guarantee(saved: Path) -> dict:
        tokenizer.save_pretrained(saved)
        classify = pipeline(
            "hierarchical-text-classification", model=str(saved), trust_remote_code=True
        )
        return classify(text, **{name: 0.9})

    model.save_pretrained(tmp_path / "saved")
    assert classify_with_a_guarantee(tmp_path / "saved")["prediction_set"]
    assert "trained after" not in warned.text

    targets = model.heads.decisions.targets([[0]])
    row = dict(tokenizer(text)) | {"labels": targets[0]}
    output = str(tmp_path / "trained")
    args = TrainingArguments(
        output, max_steps=3, learning_rate=1e-2, save_strategy="no", report_to=[], use_cpu=True
    )
    Trainer(model, args, train_dataset=[row] * 8).train()
    model.save_pretrained(output)
    with pytest.raises(ValueError, match=name):
        classify_with_a_guarantee(Path(output))
    assert warned.text.count("the heads were trained after the calibration was fitted") == 1
