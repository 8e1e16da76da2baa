"""Test that a model learns what a teacher says of the texts, and that no text of the teacher's
training is scored.
"""

import json
from pathlib import Path

import pytest
from conftest import CLEAR, clear_rows, read_csv, write_csv
from safetensors.torch import load_file

import predict
import train
from decisions_hierarchical import build_decisions
from hierarchical_clinicalbert.errors import InputError
from taxonomy_hierarchical import Taxonomy

WRONG = dict(zip(CLEAR, [*CLEAR][1:] + [*CLEAR][:1], strict=True))  # a wrong label for each class
GENERAL = "general pathological conditions"
TREE = {"specific disease": [label for label in CLEAR if label != GENERAL], GENERAL: None}
UNKNOWN = "not all training texts of the checkpoint or teacher are known: no rows are split off"
FORMS = pytest.mark.parametrize(
    "teacher", ["clear_checkpoint", "labels_checkpoint"], ids=["one path", "many nodes"]
)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a folder with training rows, all of a wrong class, test rows, and the taxonomy."""
    wrong = [row | {"label": WRONG[row["label"]]} for row in clear_rows(1, wrong=False)]
    for name, rows in {"train": wrong, "test": clear_rows(3, wrong=False)}.items():
        write_csv(tmp_path / f"{name}.csv", rows)
    (tmp_path / "tree.json").write_text(json.dumps(TREE))
    return tmp_path


def ask(checkpoint: str, output: object, *inputs: object, problems: int = 0) -> None:
    """Write the probabilities that a checkpoint gives to the texts of files.

    Flags may follow the inputs.
    """
    words = ["--model", checkpoint, "--output", output, "--probabilities", "--input", *inputs]
    assert predict.main(list(map(str, words))) == problems


def teach(encoder: str, teacher: object, folder: Path, *flags: object) -> list[dict[str, str]]:
    """Train a student, and return its predictions of the test rows."""
    words = [
        "--quantization",
        "none",
        "--learning_rate",
        "3e-3",
        "--max_steps",
        120,
        "--validation_size",
        0,
    ]
    words += [
        "--teacher_temperature",
        1,
        "--taxonomy",
        folder / "tree.json",
        "--test_file",
        folder / "test.csv",
    ]
    words += ["--output_dir", folder / "results"]
    train.main(
        list(map(str, [*words, "--model_name_or_path", encoder, "--teacher", teacher, *flags]))
    )
    return read_csv(folder / "results" / "test_predictions.csv")


def form_flags(checkpoint: str) -> list[str]:
    """Return the flags that give the data the form of label of a checkpoint."""
    return ["--label_delimiter", ";"] if "labels" in Path(checkpoint).name else []


def learnt(rows: list[dict[str, str]]) -> bool:
    """Return whether most predictions name the correct class, and at most half as many its wrong
    label.
    """
    named = [(row.get("prediction") or row["predictions"]).split("; ") for row in rows]
    correct = [row.get("label") or row["labels"] for row in rows]
    right, wrong = (
        sum(map(list.__contains__, named, labels)) for labels in (correct, map(WRONG.get, correct))
    )
    return right > len(rows) / 2 and right > 2 * wrong


@FORMS
def test_a_student_learns_from_an_output_and_not_from_the_labels(
    tiny_encoder, teacher, folder, request
):
    output = folder / "said.jsonl"
    checkpoint = request.getfixturevalue(teacher)
    ask(checkpoint, output, folder / "train.csv")
    flags = ["--train_file", folder / "train.csv", "--teacher_weight", 1, *form_flags(checkpoint)]
    assert learnt(teach(tiny_encoder, output, folder, *flags))


def test_all_formats_of_an_output_teach_the_same(tiny_encoder, clear_checkpoint, folder):
    """A row without a text is in no output, a repeated text twice, and ids replace the numbers."""
    rows = read_csv(folder / "train.csv")
    given = [
        {"id": f"n{i}", "text": row["text"]} for i, row in enumerate([*rows, rows[3], {"text": ""}])
    ]
    write_csv(folder / "given.csv", given[::-1])
    weights = []
    for name in ("said.jsonl", "said.csv", "said.parquet", "said.tasks.json", "said/"):
        ask(
            clear_checkpoint,
            f"{folder}/{name}",
            folder / "given.csv",
            "--id_column",
            "id",
            problems=1,
        )
        flags = ["--train_file", folder / "train.csv", "--overwrite_output_dir", "--max_steps", 2]
        teach(tiny_encoder, f"{folder}/{name}", folder, *flags)
        weights.append(load_file(folder / "results" / "heads.safetensors"))
        assert weights[-1].keys() == weights[0].keys()
        assert all(value.equal(weights[0][key]) for key, value in weights[-1].items())


@FORMS
def test_a_student_learns_from_probabilities_in_a_file(tiny_encoder, teacher, folder, request):
    """Give the correct class, and one vote of four for the wrong label, as JSON in a column of the
    training file.
    """
    rows = [
        row | {"probabilities": {WRONG[row["label"]]: 0.25, row["label"]: 0.75}}
        for row in clear_rows(1, wrong=False)
    ]
    rows = [
        row | {"label": WRONG[row["label"]], "probabilities": json.dumps(row["probabilities"])}
        for row in rows
    ]
    file = write_csv(folder / "votes.csv", rows)
    name = request.getfixturevalue(teacher)  # its form of label
    assert learnt(
        teach(
            tiny_encoder,
            file,
            folder,
            "--train_file",
            file,
            "--teacher_weight",
            1,
            *form_flags(name),
        )
    )


@pytest.mark.parametrize(
    ("form", "given", "expected"),
    [
        # two votes of four are for one leaf below a parent, one is for the parent, one for another
        # root
        (
            "single_label_classification",
            {"b": 2, "a": 1, "d": 1},
            {"a": 3 / 4, "b": 3 / 4, "c": 0, "d": 1 / 4},
        ),
        (
            "multi_label_classification",
            {"b": 0.4, "a": 0.2, "d": 1},
            {"a": 0.4, "b": 0.4, "c": 0, "d": 1},
        ),
    ],
)
def test_probabilities_of_labels_become_those_of_all_nodes(form, given, expected):
    decisions = build_decisions(Taxonomy({"a": ["b", "c"], "d": None}), form)
    probabilities = decisions.from_labels(
        {decisions.tree.id(label): number for label, number in given.items()}
    )
    found = decisions(decisions.scores_of(probabilities[None]))[0].exp()[0]
    assert dict(zip(decisions.tree.labels, found.tolist(), strict=True)) == pytest.approx(
        expected, abs=1e-6
    )


@FORMS
def test_a_teacher_labels_texts_that_have_none(tiny_encoder, teacher, folder, request):
    """Train on a file of texts alone, with no weight on the teacher's scores.

    Those of the test rows are left out.
    """
    write_csv(
        folder / "texts.csv", [{"text": row["text"]} for row in clear_rows(1) + clear_rows(3)]
    )
    checkpoint = request.getfixturevalue(teacher)
    output = folder / "said.parquet"
    ask(checkpoint, output, folder / "texts.csv")
    flags = ["--unlabelled_file", folder / "texts.csv", "--teacher_weight", 0, "--max_steps", 60]
    assert learnt(teach(tiny_encoder, output, folder, *flags, *form_flags(checkpoint)))
    report = json.loads((folder / "results" / "data_report.json").read_text())
    assert report["unlabelled_texts"] == 90


@pytest.mark.parametrize("name", ["said.jsonl", "said/"])
def test_texts_of_the_teachers_training_are_never_scored(
    name, tiny_encoder, clear_checkpoint, folder, capsys
):
    """Split a file off which the teacher was trained on the first half.

    Then remove the hashes of these texts.
    """
    rows = clear_rows(1) + clear_rows(4)
    output = f"{folder}/{name}"
    write_csv(folder / "all.csv", rows)
    ask(clear_checkpoint, output, folder / "all.csv")
    words = [
        "--data_path",
        folder / "all.csv",
        "--model_name_or_path",
        tiny_encoder,
        "--teacher",
        output,
    ]
    words += ["--max_steps", 1, "--quantization", "none", "--output_dir", folder / "results"]
    train.main(list(map(str, words)))
    scored = [
        row
        for split in ("validation", "test")
        for row in read_csv(folder / "results" / f"{split}_predictions.csv")
    ]
    assert len(scored) == 36
    assert {rows[int(row["row"])]["text"] for row in scored}.isdisjoint(
        row["text"] for row in clear_rows(1)
    )
    known = json.loads((folder / "results" / "trained_texts.json").read_text())
    assert {*json.loads(Path(clear_checkpoint, "trained_texts.json").read_text())["this_run"]} <= {
        *known["earlier"]
    }

    Path(
        f"{output}trained_texts.json" if name.endswith("/") else f"{output}.trained_texts.json"
    ).unlink()
    train.main(list(map(str, [*words, "--overwrite_output_dir"])))
    report = json.loads((folder / "results" / "data_report.json").read_text())
    assert report["splits"].keys() == {"train"}
    assert report["trained_before"]["scores"] == "unverified"
    assert UNKNOWN in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--teacher", "{clear}"],
            "there is no such file; give an output of predict.py --probabilities, or a file",
        ),
        (
            ["--teacher", "user/name"],
            "--teacher user/name: there is no such file; give an output of predict.py",
        ),
        (["--teacher", "{folder}/said.csv"], "has no probabilities of 89 of 90 training texts"),
        (
            ["--teacher", "{folder}/few.csv"],
            "line 2, column 'probabilities': it lacks classes of the data",
        ),
        (
            ["--teacher", "{folder}/said.csv", "--label_delimiter", ";"],
            "it lacks classes of the data: the teacher has another taxonomy",
        ),
        (
            ["--teacher", "{folder}/said.csv", "--taxonomy", "{folder}/other.json"],
            "the label 'neoplasms' is not in the taxonomy",
        ),
        (
            ["--teacher", "{folder}/said.csv", "--num_train_epochs", "0"],
            "--teacher teaches in training steps",
        ),
        (
            ["--teacher", "{folder}/train.csv"],
            "train.csv has no probabilities: give an output of predict.py",
        ),
        (
            ["--teacher", "{folder}/votes.csv"],
            "votes.csv, line 2, column 'probabilities': the label 'colitis' is not in the",
        ),
        (
            ["--teacher", "{folder}/inner.csv"],
            "share the number of 'specific disease' among the labels below it",
        ),
        (
            ["--teacher", "{folder}/twice.csv"],
            "line 3, column 'probabilities': its text has an earlier row",
        ),
        (
            ["--teacher", "{folder}/same.csv"],
            "line 2, column 'probabilities': two of its labels are the same node",
        ),
        (
            ["--teacher", "{folder}/said.csv", "--taxonomy", "{folder}/tree.json"],
            "--teacher needs texts to teach",
        ),
        (
            ["--unlabelled_file", "texts.csv"],
            "--unlabelled_file needs --teacher, or classes without training rows",
        ),
        (
            ["--teacher", "{folder}/said.csv", "--teacher_weight", "2"],
            "--teacher_weight must be at least 0 and at most 1, not 2",
        ),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused(
    flags, message, tiny_encoder, clear_checkpoint, folder
):
    (folder / "other.json").write_text(
        json.dumps([label for label in CLEAR if label != "neoplasms"] + ["other"])
    )
    write_csv(folder / "one.csv", [clear_rows(1)[0]])
    ask(clear_checkpoint, folder / "said.csv", folder / "one.csv")
    (said,) = read_csv(folder / "said.csv")
    write_csv(
        folder / "few.csv",
        [{name: cell for name, cell in said.items() if not name.endswith("of neoplasms")}],
    )
    for name, label in (("votes", "colitis"), ("inner", "specific disease")):
        write_csv(
            folder / f"{name}.csv", [{"text": "pain", "probabilities": json.dumps({label: 1})}]
        )
    write_csv(
        folder / "twice.csv",
        [{"text": text, "probabilities": '{"neoplasms": 1}'} for text in ("pain", "Pain ")],
    )
    both = json.dumps({"neoplasms": 1, "specific disease/neoplasms": 1})
    write_csv(folder / "same.csv", [{"text": "pain", "probabilities": both}])
    names = {"encoder": tiny_encoder, "clear": clear_checkpoint, "folder": folder}
    words = ["--model_name_or_path", tiny_encoder, "--output_dir", folder / "out"]
    if "{folder}/tree.json" not in flags:
        words += ["--train_file", folder / "train.csv", "--validation_size", 0]
    with pytest.raises(InputError) as raised:
        train.main([*map(str, words), *(flag.format(**names) for flag in flags)])
    assert message.format(**names) in str(raised.value)
