"""Train a multi-label model on Medical Abstracts, where a text has one row per label, and predict one label per text:

    python benchmarks/studies/united_rows.py --data FOLDER --encoder ENCODER [--seed 1 2 3]

FOLDER holds ``medical_abstracts/{train,validation,test}.csv``. Rows of one text become one row with several labels.
``recipes/medical_abstracts.yaml`` trains on them. The prediction for a test row is the most probable leaf, scored as in
``benchmarks/quality.py``. Finished runs are not repeated.

Supports docs/experiments.md, "2026-11-28: Several labels in training, one in prediction".
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from transformers import pipeline

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

from quality import Task, measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--seed", type=int, nargs="+", default=[1])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "united_rows")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    print("| seed | accuracy | macro-F1 |\n| ---: | ---: | ---: |")
    for seed in arguments.seed:
        task, folder = Task("medical_abstracts", arguments.data, seed), arguments.runs / str(seed)
        if not (folder / "metrics.json").exists():
            words = flags(task, arguments)
            words += ["--seed", seed, "--output_dir", folder, "--resume_from_checkpoint", "auto"]
            subprocess.run([sys.executable, ROOT / "train.py", *map(str, words)], check=True, stdout=sys.stderr)
        scores = score(task, folder)
        print(f"| {seed} | {100 * scores['accuracy']:.1f} | {100 * scores['macro_f1']:.1f} |", flush=True)


def flags(task: Task, arguments: argparse.Namespace) -> list[str | Path]:
    """Write the united rows of training and validation. Return the flags for ``train.py``."""
    words = [ROOT / "recipes" / "medical_abstracts.yaml", "--model_name_or_path", arguments.encoder]
    words += ["--label_column", "labels", "--text_column", "text", "--taxonomy", arguments.runs / "taxonomy.json"]
    (arguments.runs / "taxonomy.json").write_text(json.dumps(task.tree.to_nested()), encoding="utf-8")
    for split in ("train", "validation"):
        rows = pd.read_csv(task.files[split], dtype=str)
        united = rows.groupby("medical_abstract", sort=False)["condition_label"].agg(lambda labels: sorted({*labels}))
        print(f"{split}: {len(rows)} rows, {len(united)} texts, {(united.str.len() > 1).sum()} with several labels")
        file = arguments.runs / f"{split}.jsonl"
        named = united.rename("labels").rename_axis("text").reset_index()
        named.to_json(file, orient="records", lines=True)
        words += [f"--{split}_file", file]
    return words


def score(task: Task, folder: Path) -> dict:
    """Return accuracy and macro-F1 of the most probable leaves of the test rows."""
    texts, labels = task.rows("test")
    classify = pipeline("hierarchical-text-classification", model=str(folder), trust_remote_code=True)
    leaves = task.tree.labels[: task.tree.num_leaves]
    ranked = classify(texts, top_k=task.tree.num_nodes, batch_size=16)
    predictions = [next(node["label"] for node in nodes if node["label"] in leaves) for nodes in ranked]
    return measure(labels, np.array([task.tree.id(label) for label in predictions]), task.tree)


if __name__ == "__main__":
    main()
