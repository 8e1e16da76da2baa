"""Train and predict in a locale whose encoding is not UTF-8: all files are UTF-8. Lint checks that each file is opened so."""

import json
from pathlib import Path

import yaml
from conftest import ROOT, complete, write_csv

NAMES = {
    "Tumörerkrankung": ("carcinoma", "lymphoma"),
    "心臓病": ("angina", "stenosis"),
    "{neuro}": ("epilepsy", "ictus"),
}
TEXTS = ["Épilepsie: epilepsy", "Angina 心", "Lymphoma"]
IN_C = """
import locale, runpy, sys
locale.setlocale(locale.LC_CTYPE, "C")
assert locale.getencoding() != "utf-8"
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_in_c(command: str, *words: object) -> tuple[int, str]:
    """Run a command whose locale is C, and return its exit code and log."""
    done = complete("-c", IN_C, ROOT / command, *words)
    return done.returncode, done.stderr


def test_training_and_prediction_write_utf_8(tiny_encoder, tmp_path):
    recipe = {"label_column": "Étiquette", "model_name_or_path": tiny_encoder, "output_dir": str(tmp_path / "results")}
    recipe |= {"max_steps": 1, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    for split in ("train", "validation"):
        rows = [
            {"text": f"é {disease} {split} {i}", "Étiquette": name}
            for name, diseases in NAMES.items()
            for disease in diseases
            for i in range(4)
        ]
        recipe[f"{split}_file"] = write_csv(tmp_path / f"{split}.csv", rows)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    code, log = run_in_c("train.py", tmp_path / "recipe.yaml", "--quantization", "none")
    assert code == 0, log[-4000:]
    card = (tmp_path / "results" / "README.md").read_text(encoding="utf-8")
    assert all(name in card for name in NAMES)
    report = json.loads((tmp_path / "results" / "data_report.json").read_text(encoding="utf-8"))
    assert report["columns"]["label"] == ["Étiquette"]

    texts, output = (
        write_csv(tmp_path / "texte-ü.csv", [{"text": text} for text in [*TEXTS, ""]]),
        tmp_path / "out.jsonl",
    )
    code, log = run_in_c("predict.py", "--model", tmp_path / "results", "--input", texts, "--output", output)
    assert code == 1, log[-4000:]
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len(TEXTS)
    assert {row["label"] for row in rows} <= {*NAMES}
    (problem,) = Path(f"{output}.errors.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(problem)["source"].endswith("texte-ü.csv")
