"""Compare initial weights of the heads (``--heads_init``) by rows a class, in an hour and a half, less without "all":

    python benchmarks/studies/label_names.py --data FOLDER --encoder ENCODER

FOLDER holds OHSUMED's ``train.csv`` and ``labels.csv``; the test file is not read. As in ``ablation.py``, a run is
trained on two thirds of the training file, and scored on the last third. With few rows, it is trained on the first rows of each
class among these. "Codes" are the labels
in the file, C01 to C23, which mean nothing to the encoder. "Descriptions" are those of descriptions.csv, beside this file. One run
each; finished runs stay in the output file.

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
        for begin in arguments.init:
            key = {"rows_per_class": rows, "begin": begin}
            if not any(key.items() <= run.items() for run in read(arguments.output)):
                runs = [*read(arguments.output), {**key, **train(rows, begin, arguments)}]
                runs.sort(key=lambda run: (run["rows_per_class"] or 10**9, [*INITS].index(run["begin"])))
                arguments.output.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    print("| rows a class | heads begin | accuracy | macro-F1 | log loss | encoder alone | macro-F1 | log loss |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for run in read(arguments.output):
        cells = " | ".join(f"{scale * run[name]:.{1 if scale > 1 else 3}f}" for name, scale in (SHOWN | ALONE).items())
        print(f"| {run['rows_per_class'] or 'all'} | {run['begin']} | {cells} |")


def train(rows: int | None, begin: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Return the scores of a run on the held-out third."""
    files = arguments.runs / "files"
    ohsumed(arguments.data, files, fold=0)
    known = files / f"train-{rows or 'all'}.csv"
    found = pd.read_csv(files / "train.csv", dtype=str)
    (found if rows is None else found.groupby("label").head(rows)).to_csv(known, index=False)
    labels = arguments.data / "labels.csv"
    if begin == "codes":
        tree = pd.read_csv(labels, dtype=str)
        labels = files / "codes.csv"
        tree.assign(name=tree["label"]).to_csv(labels, index=False)
    if begin == "descriptions":
        described = pd.read_csv(labels, dtype=str).merge(pd.read_csv(DESCRIPTIONS, dtype=str), on="label")
        labels = files / "descriptions.csv"
        described.to_csv(labels, index=False)
    folder = arguments.runs / f"{begin}-{rows or 'all'}"
    words = [ROOT / "recipes" / "ohsumed.yaml", "--model_name_or_path", arguments.encoder, "--heads_init", INITS[begin]]
    words += ["--train_file", known, "--test_file", files / "test.csv", "--class_names", labels, "--taxonomy", labels]
    words += ["--output_dir", folder, "--seed", 1, "--contrastive_steps", 0, "--resume_from_checkpoint", "auto"]
    subprocess.run([sys.executable, str(ROOT / "train.py"), *map(str, words)], check=True)
    metrics = json.loads((folder / "metrics.json").read_text())
    return {name: metrics[name] for name in SHOWN | ALONE}


if __name__ == "__main__":
    main()
