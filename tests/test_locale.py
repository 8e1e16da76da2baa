"""Run the commands in the C locale without Python's UTF-8 mode, as in a locale of another encoding: all output is UTF-8."""

import csv
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from conftest import ROOT, run, write_csv
from gradio_client import Client, handle_file
from space_server import SpaceServer

C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
NAMES = {
    "Tumörerkrankung": ("carcinoma", "lymphoma"),
    "心臓病": ("angina", "stenosis"),
    "{neuro}": ("epilepsy", "migraine"),
}
TEXTS = ["Épilepsie: epilepsy", "Angina 心", "Lymphoma"]


def run_in_c(*words: object, command: str, check: bool = True) -> subprocess.CompletedProcess:
    """Run a command in a fresh process, because Python reads the locale as it starts. Its output must be UTF-8."""
    return run(*words, command=command, check=check, settings=C_LOCALE, fresh=True)


@pytest.fixture(scope="module")
def checkpoint(tiny_encoder, tmp_path_factory) -> Path:
    """Train in the C locale. The column of labels and the classes are not ASCII."""
    folder = tmp_path_factory.mktemp("locale")
    recipe = {}
    for split in ("train", "validation"):
        rows = [
            (f"é {disease} {split} {i}", name)
            for name, diseases in NAMES.items()
            for disease in diseases
            for i in range(4)
        ]
        file = write_csv(folder / f"{split}.csv", [{"text": text, "Étiquette": name} for text, name in rows])
        recipe[f"{split}_file"] = file
    recipe |= {"label_column": "Étiquette", "model_name_or_path": tiny_encoder, "output_dir": str(folder / "results")}
    recipe |= {"max_steps": 1, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    run_in_c(folder / "recipe.yaml", "--quantization", "none", command="train.py")
    return folder / "results"


@pytest.fixture(scope="module")
def predictions(checkpoint, tmp_path_factory) -> Path:
    """Classify `TEXTS` in the C locale."""
    folder = tmp_path_factory.mktemp("predicted")
    texts = write_csv(folder / "texte-ü.csv", [{"text": text} for text in [*TEXTS, ""]])
    words = ("--model", checkpoint, "--input", texts, "--output", folder / "out.jsonl", "--uncertainty")
    assert run_in_c(*words, command="predict.py", check=False).returncode == 1
    return folder / "out.jsonl"


def test_training_and_prediction_write_utf_8(checkpoint, predictions):
    card = (checkpoint / "README.md").read_text(encoding="utf-8")
    assert all(name in card for name in NAMES)
    report = json.loads((checkpoint / "data_report.json").read_text(encoding="utf-8"))
    assert report["columns"]["label"] == ["Étiquette"]
    rows = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len(TEXTS)
    assert {row["label"] for row in rows} <= {*NAMES}
    (problem,) = Path(f"{predictions}.errors.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(problem)["source"].endswith("texte-ü.csv")


def test_the_examples_print_utf_8(checkpoint, predictions, tmp_path):
    words = (predictions, "--count", 3, "--input", predictions.with_name("texte-ü.csv"))
    printed = run_in_c(*words, command="examples/label_next.py").stdout
    assert sorted(row["text"] for row in csv.DictReader(io.StringIO(printed))) == sorted(TEXTS)
    view = ElementTree.fromstring(run_in_c("config", checkpoint, command="examples/label_studio.py").stdout)
    assert {choice.get("value") for choice in view.iter("Choice")} == {*NAMES}
    write_csv(tmp_path / "texts.csv", [{"text": text} for text in TEXTS])
    printed = run_in_c(checkpoint, tmp_path / "texts.csv", command="examples/classify.py").stdout
    assert [line.strip() for line in printed.splitlines()[1::3]] == TEXTS
    assert all(any(name in line for name in NAMES) for line in printed.splitlines()[2::3])


def test_the_page_takes_a_file_whose_name_is_not_ascii(checkpoint, predictions, tmp_path):
    model = checkpoint.rename(checkpoint.with_name("modèle"))
    try:
        with SpaceServer(str(model), tmp_path, settings=C_LOCALE, fresh=True) as space:
            client = Client(space.address, verbose=False)
            found = client.predict(handle_file(str(predictions.with_name("texte-ü.csv"))), api_name="/classify_file")
    finally:
        model.rename(checkpoint)
    assert [row["text"] for row in found["rows"]] == TEXTS
    assert {row["label"] for row in found["rows"]} <= {*NAMES}


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("train.py", ["--train_file", "a.csv", "--label_column", "Étiquette"], "--label_column '"),
        ("train.py", ["--train_file", "a.csv", "--output_dir", "résultats"], "--output_dir 'r"),
        ("predict.py", ["--model", "modèle", "--input", "a.csv", "--output", "a.jsonl"], "--model 'mod"),
    ],
)
def test_a_flag_that_the_locale_cannot_decode_is_one_line(command, words, message):
    done = run_in_c(*words, command=command, check=False)
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"{command}: error: {message}")
    assert error.endswith("the name is not ascii, the locale's encoding: set PYTHONUTF8=1")


@pytest.mark.parametrize("command", ["train.py", "examples/ray_train.py"])
def test_help_is_printed(command):
    if command.endswith("ray_train.py") and importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    assert "usage: " in run_in_c("--help", command=command).stdout


def test_output_that_cannot_be_written_is_one_line(predictions):
    line = [sys.executable, ROOT / "examples" / "label_next.py", predictions, "--count", "1"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(list(map(str, line)), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "label_next.py: error: cannot write to standard output: [Errno 28] No space left on device\n"
