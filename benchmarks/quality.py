"""Accuracy of the recipes beside peers, all trained here in one go:

    python benchmarks/quality.py --data FOLDER --encoder ENCODER [--task ohsumed --seed 1 …]

FOLDER holds ``ohsumed/{train,test,labels}.csv`` and ``medical_abstracts/{train,validation,test}.csv``. Peers:

- TF-IDF (words and pairs of words) with a linear SVM, from scikit-learn;
- a flat model: the same encoder, adapter, epochs, learning rate and text length, one softmax over the leaves,
  cross-entropy with the recipe's label smoothing;
- the recipe: hierarchical heads and the recipe's loss.

Every run is kept under ``--runs`` and not repeated, so a broken-off benchmark continues. All scores are of the test file,
by one function, from each model's predicted leaf; log loss and calibration error are the checkpoint's own.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from transformers import EvalPrediction

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configuration_hierarchical import DEFAULT_TAXONOMY, Taxonomy
from training.metrics import build_compute_metrics

TASKS = ("ohsumed", "medical_abstracts")
MODELS = ("TF-IDF + linear SVM", "flat", "hierarchical")
SHOWN = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "level_1_accuracy": "level-1 accuracy",
    "hierarchical_f1": "hierarchical F1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--encoder_name", help="what the results call the encoder, where it is a folder")
    parser.add_argument("--task", choices=TASKS, nargs="+", default=TASKS)
    parser.add_argument("--seed", type=int, nargs="+", default=[42])
    parser.add_argument(
        "--epochs", type=float, help="passes over the training rows, instead of the recipe's, for both models"
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quality")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "quality.json")
    arguments = parser.parse_args()
    results = []
    for task in arguments.task:
        files, tree, names = read_task(arguments.data / task, task)
        for model in MODELS:
            for seed in arguments.seed if model != MODELS[0] else arguments.seed[:1]:
                folder = arguments.runs / task / model.split()[0].lower() / str(seed)
                if not (folder / "scores.json").exists():
                    folder.mkdir(parents=True, exist_ok=True)
                    started = time.time()
                    if model == MODELS[0]:
                        predictions, own = linear_svm(files, names), {}
                    else:
                        predictions, own = train(task, model, seed, files, tree, arguments, folder)
                    scores = measure(predictions, tree) | own | {"minutes": (time.time() - started) / 60}
                    (folder / "scores.json").write_text(json.dumps(scores, indent=2))
                scores = json.loads((folder / "scores.json").read_text())
                results.append({"task": task, "model": model, "seed": seed, **scores})
                print(f"{task}, {model}, seed {seed}: accuracy {scores['accuracy']:.4f}", flush=True)
    kept = json.loads(arguments.output.read_text())["results"] if arguments.output.exists() else []
    results = [run for run in kept if run["task"] not in arguments.task] + results
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(
        json.dumps({"encoder": arguments.encoder_name or Path(arguments.encoder).name, "results": results}, indent=2)
        + "\n"
    )
    print_table(results)


def read_task(folder: Path, task: str) -> tuple[dict[str, Path], Taxonomy, dict[str, str]]:
    """The files of a task, its taxonomy, and the names of its label codes."""
    files = {split: folder / f"{split}.csv" for split in ("train", "validation", "test")}
    files = {split: file for split, file in files.items() if file.exists()}
    if task == "ohsumed":
        files["labels"] = folder / "labels.csv"
        rows = pd.read_csv(files["labels"], dtype=str)
        return files, Taxonomy.from_file(files["labels"]), dict(zip(rows["label"], rows["name"], strict=True))
    recipe = yaml.safe_load((ROOT / "recipes" / f"{task}.yaml").read_text())
    return files, Taxonomy(DEFAULT_TAXONOMY), {str(code): name for code, name in recipe["class_names"].items()}


def read_rows(file: Path, names: dict[str, str]) -> tuple[list[str], list[str]]:
    """Texts and class names of a data file."""
    rows = pd.read_csv(file, dtype=str)
    label = "label" if "label" in rows else "condition_label"
    text = "text" if "text" in rows else "medical_abstract"
    return rows[text].tolist(), [names[code] for code in rows[label]]


def linear_svm(files: dict[str, Path], names: dict[str, str]) -> list[tuple[str, str]]:
    """(label, prediction) of each test row, by a linear SVM over TF-IDF."""
    texts, labels = read_rows(files["train"], names)
    svm = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2), LinearSVC())
    svm.fit(texts, labels)
    texts, labels = read_rows(files["test"], names)
    return list(zip(labels, svm.predict(texts), strict=True))


def train(
    task: str,
    model: str,
    seed: int,
    files: dict[str, Path],
    tree: Taxonomy,
    arguments: argparse.Namespace,
    folder: Path,
) -> tuple[list[tuple[str, str]], dict[str, float]]:
    """(label, prediction) of each test row by ``train.py``, and what it measured itself."""
    words = [str(ROOT / "recipes" / f"{task}.yaml"), "--model_name_or_path", arguments.encoder, "--seed", str(seed)]
    words += ["--output_dir", str(folder), "--overwrite_output_dir", "true"]
    words += [
        word
        for split in ("train", "validation", "test")
        if split in files
        for word in (f"--{split}_file", str(files[split]))
    ]
    if arguments.epochs is not None:
        words += ["--num_train_epochs", str(arguments.epochs)]
    if "labels" in files:
        words += ["--class_names", str(files["labels"])]
    taxonomy = folder / "taxonomy.json"
    if model == "flat":
        taxonomy.write_text(json.dumps(tree.labels[: tree.num_leaves]))
        words += ["--focal_gamma", "0", "--level_weights", "1"]
    else:
        taxonomy.write_text(json.dumps(tree.to_nested()))
    subprocess.run([sys.executable, str(ROOT / "train.py"), *words, "--taxonomy", str(taxonomy)], check=True)
    metrics = json.loads((folder / "metrics.json").read_text())
    own = {name: metrics[f"test_{name}"] for name in ("log_loss", "ece")}
    own |= {name: metrics[name] for name in ("quantized_test_accuracy", "quantized_test_macro_f1") if name in metrics}
    own["epochs"] = metrics["epoch"]
    own["train_documents_per_second"] = metrics["train_samples_per_second"]
    with (folder / "test_predictions.csv").open(encoding="utf-8", newline="") as file:
        return [(row["label"], row["prediction"]) for row in csv.DictReader(file)], own


def measure(predictions: list[tuple[str, str]], tree: Taxonomy) -> dict[str, float]:
    """The scores that depend on the predicted leaf alone."""
    labels = np.array([tree.id(label) for label, _ in predictions])
    certain = np.full((len(labels), tree.num_leaves), -100.0)
    certain[np.arange(len(labels)), [tree.id(answer) for _, answer in predictions]] = 0
    scores = build_compute_metrics(tree)(EvalPrediction(predictions=certain, label_ids=labels))
    return {name: value for name, value in scores.items() if name not in ("log_loss", "ece")}


def print_table(results: list[dict]) -> None:
    frame = pd.DataFrame(results)
    print(
        "\n| task | model | "
        + " | ".join(SHOWN.values())
        + " | log loss | ECE |\n| --- | --- |"
        + " ---: |" * (len(SHOWN) + 2)
    )
    for (task, model), runs in frame.groupby(["task", "model"], sort=False):
        cells = [spread(100 * runs[name]) for name in SHOWN]
        cells += ["" if runs[name].isna().all() else f"{runs[name].mean():.3f}" for name in ("log_loss", "ece")]
        print(f"| {task} | {model} | " + " | ".join(cells) + " |")


def spread(values: pd.Series) -> str:
    return f"{values.mean():.1f}" + (f" ± {values.std():.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
