"""Compare initial weights of the heads (``--heads_init``) by rows per class, in 90 minutes (less without ``--rows all``):

    python benchmarks/studies/label_names.py --data FOLDER --encoder ENCODER

FOLDER holds OHSUMED's ``train.csv`` and ``labels.csv``; the test file is not read. As in ``ablation.py``, a run is trained on two
thirds of the training file, or on the first rows of each class in these two thirds. It is scored on the last third. "codes" are the
labels in the file, C01 to C23, which mean nothing to the encoder. "descriptions" are from descriptions.csv, beside this file. There
is one run of each; finished runs stay in the output file.

Supports docs/experiments.md, "2026-11-27: Class names as initial head weights".
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
from ablation import ROOT, ohsumed, read

DESCRIPTIONS = Path(__file__).with_name("descriptions.csv")
ROWS = (4, 16, None)  # a class; None means all rows
INITS = {"random": "random", "label_names": "prototypes", "codes": "prototypes", "descriptions": "prototypes"}
SHOWN = {"test_accuracy": 100, "test_macro_f1": 100, "test_log_loss": 1}
ALONE = {f"uncalibrated_{name}": scale for name, scale in SHOWN.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--rows", nargs="+", type=lambda word: None if word == "all" else int(word), default=ROWS)
    parser.add_argument("--init", nargs="+", choices=INITS, default=[*INITS])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "label-names")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "studies" / "results" / "label_names.json")
    arguments = parser.parse_args()
    for rows in arguments.rows:
        for init in arguments.init:
            key = {"rows_per_class": rows, "init": init}
            if not any(key.items() <= run.items() for run in read(arguments.output)):
                runs = [*read(arguments.output), {**key, **train(rows, init, arguments)}]
                runs.sort(key=lambda run: (run["rows_per_class"] or 10**9, [*INITS].index(run["init"])))
                arguments.output.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    print("| rows per class | initial weights | accuracy | macro-F1 | log loss | encoder alone | macro-F1 | log loss |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for run in read(arguments.output):
        cells = " | ".join(f"{scale * run[name]:.{1 if scale > 1 else 3}f}" for name, scale in (SHOWN | ALONE).items())
        print(f"| {run['rows_per_class'] or 'all'} | {run['init']} | {cells} |")


def train(rows: int | None, init: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Train one run, and return its scores on the held-out third."""
    files = arguments.runs / "files"
    ohsumed(arguments.data, files, fold=0)
    known = files / f"train-{rows or 'all'}.csv"
    training = pd.read_csv(files / "train.csv", dtype=str)
    (training if rows is None else training.groupby("label").head(rows)).to_csv(known, index=False)
    labels = arguments.data / "labels.csv"
    if init == "codes":
        tree = pd.read_csv(labels, dtype=str)
        labels = files / "codes.csv"
        tree.assign(name=tree["label"]).to_csv(labels, index=False)
    if init == "descriptions":
        described = pd.read_csv(labels, dtype=str).merge(pd.read_csv(DESCRIPTIONS, dtype=str), on="label")
        labels = files / "descriptions.csv"
        described.to_csv(labels, index=False)
    folder = arguments.runs / f"{init}-{rows or 'all'}"
    words = [ROOT / "recipes" / "ohsumed.yaml", "--model_name_or_path", arguments.encoder, "--heads_init", INITS[init]]
    words += ["--train_file", known, "--test_file", files / "test.csv", "--class_names", labels, "--taxonomy", labels]
    words += ["--output_dir", folder, "--seed", 1, "--contrastive_steps", 0, "--resume_from_checkpoint", "auto"]
    subprocess.run([sys.executable, str(ROOT / "train.py"), *map(str, words)], check=True)
    metrics = json.loads((folder / "metrics.json").read_text())
    return {name: metrics[name] for name in SHOWN | ALONE}


if __name__ == "__main__":
    main()
