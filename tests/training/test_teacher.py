"""Test that a model learns what a teacher says of the texts, and that no text of the teacher's training is scored."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import CLEAR, clear_rows, read_csv, write_csv
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

import train
from decisions_hierarchical import build_decisions
from hierarchical_clinicalbert.errors import InputError
from taxonomy_hierarchical import Taxonomy

WRONG = dict(zip(CLEAR, [*CLEAR][1:] + [*CLEAR][:1], strict=True))  # a wrong label for each class
GENERAL = "general pathological conditions"
TREE = {"specific disease": [label for label in CLEAR if label != GENERAL], GENERAL: None}
FORMS = pytest.mark.parametrize("teacher", ["clear_checkpoint", "labels_checkpoint"], ids=["one path", "many nodes"])


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a folder with training rows, all of a wrong class, test rows, and the taxonomy."""
    wrong = [row | {"label": WRONG[row["label"]]} for row in clear_rows(1, wrong=False)]
    for name, rows in {"train": wrong, "test": clear_rows(3, wrong=False)}.items():
        write_csv(tmp_path / f"{name}.csv", rows)
    (tmp_path / "tree.json").write_text(json.dumps(TREE))
    return tmp_path


def teach(encoder: str, teacher: str, folder: Path, *flags: object) -> list[dict[str, str]]:
    """Train a student, and return its predictions of the test rows."""
    words = ["--quantization", "none", "--learning_rate", "3e-3", "--max_steps", 120, "--validation_size", 0]
    words += ["--teacher_temperature", 1, "--taxonomy", folder / "tree.json", "--test_file", folder / "test.csv"]
    words += ["--output_dir", folder / "results", *form_flags(teacher)]
    train.main(list(map(str, [*words, "--model_name_or_path", encoder, "--teacher", teacher, *flags])))
    return read_csv(folder / "results" / "test_predictions.csv")


def form_flags(checkpoint: str) -> list[str]:
    """Return the flags that give the data the form of label of a checkpoint."""
    return ["--label_delimiter", ";"] if "labels" in Path(checkpoint).name else []


def learnt(rows: list[dict[str, str]]) -> bool:
    """Return whether most predictions name the correct class, and at most half as many its wrong label."""
    named = [(row.get("prediction") or row["predictions"]).split("; ") for row in rows]
    correct = [row.get("label") or row["labels"] for row in rows]
    right, wrong = (sum(map(list.__contains__, named, labels)) for labels in (correct, map(WRONG.get, correct)))
    return right > len(rows) / 2 and right > 2 * wrong


@FORMS
def test_a_student_learns_from_its_teacher_and_not_from_the_labels(tiny_encoder, teacher, folder, request):
    checkpoint, scores = request.getfixturevalue(teacher), folder / "scores.safetensors"
    flags = ["--train_file", folder / "train.csv", "--teacher_weight", 1, "--teacher_scores", scores]
    assert learnt(teach(tiny_encoder, checkpoint, folder, *flags))

    # the stored scores are the probabilities of the teacher as a user loads it
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    texts = [row["text"] for row in read_csv(folder / "train.csv")]
    with torch.inference_mode():
        expected = model(**tokenizer(texts, padding=True, return_tensors="pt")).node_log_probs
        found = model.heads.decisions(load_file(scores)["scores"])[0]
    # it is scored as the pipeline does, on some processors in bfloat16
    torch.testing.assert_close(found.sort(0).values, expected.sort(0).values, rtol=0, atol=0.1)


@FORMS
def test_a_student_learns_from_probabilities_in_a_file(tiny_encoder, teacher, folder, request):
    """Give the correct class, and one vote of four for the wrong label, as JSON in a column of the training file."""
    rows = [
        row | {"probabilities": {WRONG[row["label"]]: 0.25, row["label"]: 0.75}} for row in clear_rows(1, wrong=False)
    ]
    rows = [row | {"label": WRONG[row["label"]], "probabilities": json.dumps(row["probabilities"])} for row in rows]
    file = write_csv(folder / "votes.csv", rows)
    name = request.getfixturevalue(teacher)  # its form of label
    assert learnt(teach(tiny_encoder, file, folder, "--train_file", file, "--teacher_weight", 1, *form_flags(name)))


@pytest.mark.parametrize(
    ("form", "given", "expected"),
    [
        # two votes of four are for one leaf below a parent, one is for the parent, one for another root
        ("single_label_classification", {"b": 2, "a": 1, "d": 1}, {"a": 3 / 4, "b": 3 / 4, "c": 0, "d": 1 / 4}),
        ("multi_label_classification", {"b": 0.4, "a": 0.2, "d": 1}, {"a": 0.4, "b": 0.4, "c": 0, "d": 1}),
    ],
)
def test_probabilities_of_labels_become_those_of_all_nodes(form, given, expected):
    decisions = build_decisions(Taxonomy({"a": ["b", "c"], "d": None}), form)
    probabilities = decisions.from_labels({decisions.tree.id(label): number for label, number in given.items()})
    found = decisions(decisions.scores_of(probabilities[None]))[0].exp()[0]
    assert dict(zip(decisions.tree.labels, found.tolist(), strict=True)) == pytest.approx(expected, abs=1e-6)


@FORMS
def test_a_teacher_labels_texts_that_have_none(tiny_encoder, teacher, folder, request):
    """Train on a file of texts alone, with no weight on the teacher's scores. Those of the test rows are left out."""
    write_csv(folder / "texts.csv", [{"text": row["text"]} for row in clear_rows(1) + clear_rows(3)])
    flags = ["--unlabelled_file", folder / "texts.csv", "--teacher_weight", 0, "--max_steps", 60]
    assert learnt(teach(tiny_encoder, request.getfixturevalue(teacher), folder, *flags))
    report = json.loads((folder / "results" / "data_report.json").read_text())
    assert report["unlabelled_texts"] == 90


def test_other_runs_read_the_scores_of_texts_and_their_halves(
    tiny_encoder, clear_checkpoint, labels_checkpoint, folder, capsys
):
    rows = [{"text": row["text"], "label": row["label"]} for row in clear_rows(1, wrong=False)]
    joined = [rows[i] | {"text": " ".join(row["text"] for row in rows[i : i + 3])} for i in range(0, 90, 3)]
    flags = ["--train_file", write_csv(folder / "joined.csv", joined), "--teacher_scores", folder / "scores"]
    flags += ["--overwrite_output_dir", "true", "--max_steps", 1]
    for seed, scored in enumerate((True, False)):
        teach(tiny_encoder, clear_checkpoint, folder, *flags, "--seed", seed)
        log = capsys.readouterr().err
        assert ("the teacher scores" in log) == scored
        num_halves = int(re.search(r"halves of training texts, which the teacher labels: (\d+)", log)[1])
        assert 50 < num_halves <= 60  # two of each text, but those that are the whole text
    assert len(load_file(folder / "scores")["scores"]) == len(joined) + num_halves
    with pytest.raises(InputError, match="scores of another teacher: give another file"):
        teach(tiny_encoder, labels_checkpoint, folder, *flags)


def test_texts_of_the_teachers_training_are_never_scored(tiny_encoder, clear_checkpoint, folder):
    """Split a file off which the teacher was trained on the first half."""
    rows = clear_rows(1) + clear_rows(4)
    write_csv(folder / "all.csv", rows)
    words = ["--data_path", folder / "all.csv", "--model_name_or_path", tiny_encoder, "--teacher", clear_checkpoint]
    words += ["--max_steps", 1, "--quantization", "none", "--output_dir", folder / "results"]
    train.main(list(map(str, words)))
    scored = [
        row for split in ("validation", "test") for row in read_csv(folder / "results" / f"{split}_predictions.csv")
    ]
    assert len(scored) == 36
    assert {rows[int(row["row"])]["text"] for row in scored}.isdisjoint(row["text"] for row in clear_rows(1))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--teacher", "{encoder}"], "--teacher {encoder} is neither a file nor a checkpoint"),
        (
            ["--teacher", "{clear}", "--label_delimiter", ";"],
            "is for single_label_classification, the data are for multi",
        ),
        (["--teacher", "{clear}", "--taxonomy", "{folder}/other.json"], "has another taxonomy than the data"),
        (["--teacher", "{clear}", "--num_train_epochs", "0"], "--teacher teaches in training steps"),
        (["--teacher", "{folder}/train.csv"], "train.csv has no column 'probabilities' (of --teacher)"),
        (
            ["--teacher", "{folder}/votes.csv"],
            "votes.csv, line 2, column 'probabilities': the label 'colitis' is not in the",
        ),
        (["--teacher", "{folder}/inner.csv"], "share the number of 'specific disease' among the labels below it"),
        (["--teacher", "{folder}/twice.csv"], "line 3, column 'probabilities': its text has an earlier row"),
        (["--teacher", "{folder}/same.csv"], "line 2, column 'probabilities': two of its labels are the same node"),
        (
            ["--teacher", "{folder}/train.csv", "--teacher_scores", "s"],
            "--teacher_scores keeps the scores of a checkpoint",
        ),
        (["--unlabelled_file", "texts.csv"], "--unlabelled_file needs --teacher, or classes without training rows"),
        (["--teacher", "{clear}", "--teacher_weight", "2"], "--teacher_weight must be at least 0 and at most 1, not 2"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused(flags, message, tiny_encoder, clear_checkpoint, folder):
    (folder / "other.json").write_text(json.dumps([*CLEAR]))
    for name, label in (("votes", "colitis"), ("inner", "specific disease")):
        write_csv(folder / f"{name}.csv", [{"text": "pain", "probabilities": json.dumps({label: 1})}])
    write_csv(folder / "twice.csv", [{"text": text, "probabilities": '{"neoplasms": 1}'} for text in ("pain", "Pain ")])
    both = json.dumps({"neoplasms": 1, "specific disease/neoplasms": 1})
    write_csv(folder / "same.csv", [{"text": "pain", "probabilities": both}])
    names = {"encoder": tiny_encoder, "clear": clear_checkpoint, "folder": folder}
    words = ["--train_file", folder / "train.csv", "--model_name_or_path", tiny_encoder, "--output_dir", folder / "out"]
    words += ["--validation_size", 0]
    with pytest.raises(InputError) as raised:
        train.main([*map(str, words), *(flag.format(**names) for flag in flags)])
    assert message.format(**names) in str(raised.value)
