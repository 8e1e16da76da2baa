"""Measure the accuracy of the recipes beside peers, all trained here:

    pip install setfit hiclass
    python benchmarks/quality.py --data FOLDER --encoder ENCODER [--task ohsumed --model flat-lora --seed 1 …]

FOLDER holds ``ohsumed/{train,test,labels}.csv`` and ``medical_abstracts/{train,validation,test}.csv``. Models:

- tfidf-svm: a linear SVM over TF-IDF of words and word pairs, by scikit-learn;
- hiclass-tfidf: the same for each parent of the taxonomy, by HiClass;
- hiclass-embeddings: logistic regression over the frozen encoder's mean vectors for each parent, by HiClass;
- setfit: the encoder fine-tuned on pairs of texts, then logistic regression, by SetFit: `SETFIT_STEPS` steps of 16 pairs,
  texts truncated at the 256 tokens with which this encoder was published, bfloat16 where train.py would use it;
- flat-full, flat-lora: every weight, or a rank-16 adapter over a full-precision encoder, under one softmax over the leaves, with
  cross-entropy over whole texts;
- lora, qlora: the recipe over a full-precision encoder, and the recipe itself, over a 4-bit encoder;
- qlora-rank-16: the recipe with a rank-16 adapter;
- lora-whole, qlora-whole, qlora-halves: lora or qlora trained on whole texts, or on halves with consistency, if the recipe
  does the opposite.

The flat peers are trained by ``train.py`` with the recipe's epochs, text length, label smoothing and early stopping, and with
temperatures from the validation rows. The learning rate of flat-full is `FULL_LEARNING_RATE`. All models get the same training
rows, and the same validation rows if they need any.

Finished runs stay in the output file, and are repeated only with ``--fresh``. So an interrupted benchmark continues, also on
another machine. All scores are for the test file, by one function, from each model's predicted leaf; log loss and calibration
errors are those that the checkpoint's run measured. Intervals are bootstrap intervals over the test rows.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from sklearn.base import ClassifierMixin
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from transformers import EvalPrediction

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluation.metrics import bootstrap_intervals, build_compute_metrics, one_hot
from taxonomy_hierarchical import DEFAULT_TAXONOMY, Taxonomy
from training.arguments import DataArguments
from training.precision import has_bf16
from training.splits import load_splits

TASKS = ("ohsumed", "medical_abstracts")
SETFIT_STEPS = 500
FULL_LEARNING_RATE = 1e-4
TFIDF: dict[str, Any] = {"ngram_range": (1, 2), "sublinear_tf": True, "min_df": 2}
WHOLE = ("--consistency", "0")
PLAIN = ("--lexical_head", "false", *WHOLE)
TRAINED = {  # trained by train.py, with these flags after the recipe
    "flat-full": ("--tuning", "full", "--learning_rate", str(FULL_LEARNING_RATE), *PLAIN),
    "flat-lora": ("--quantization", "none", "--lora_r", "16", "--lora_alpha", "32", *PLAIN),
    "lora-whole": ("--quantization", "none", *WHOLE),
    "qlora-whole": WHOLE,
    "qlora-halves": ("--consistency", "1"),
    "qlora-rank-16": ("--lora_r", "16", "--lora_alpha", "32"),
    "lora": ("--quantization", "none"),
    "qlora": (),
}
SHOWN = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "level_1_accuracy": "level-1 accuracy",
    "hierarchical_f1": "hierarchical F1",
    "log_loss": "log loss",
    "ece": "ECE",
    "level_1_ece": "level-1 ECE",
}
PARTS = ("accuracy", "macro_f1", "level_1_accuracy", "log_loss", "ece")
OWN = (  # from the metrics of a checkpoint
    *("test_log_loss", "test_ece", "test_level_1_ece", "test_ece_by_chance", "test_level_1_ece_by_chance"),
    *("test_any_label_accuracy", "test_answer_coverage", "test_answer_leaves", "lexical_weight"),
    *(f"{step}_test_{name}" for step in ("uncalibrated", "without_lexical_head") for name in PARTS),
    *("quantized_test_accuracy", "quantized_test_macro_f1", "eval_accuracy", "eval_macro_f1"),
    *("uncalibrated_eval_accuracy", "uncalibrated_eval_macro_f1", "epoch", "train_samples_per_second"),
)


class Task:
    """The rows, the taxonomy and the names of a task.

    Attributes:
        files: of the splits, and of the labels if they are in a file.
        rows: (texts, leaves) of each split; without a validation file, validation rows are split off the training file.
    """

    def __init__(self, name: str, folder: Path, seed: int):
        self.name, self.seed = name, seed
        self.recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
        self.files = {split: folder / f"{split}.csv" for split in ("train", "validation", "test")}
        self.files = {split: file for split, file in self.files.items() if file.exists()}
        if name == "ohsumed":
            self.labels, self.tree = folder / "labels.csv", Taxonomy.from_file(folder / "labels.csv")
        else:
            self.labels, self.tree = None, Taxonomy(DEFAULT_TAXONOMY)

    def repeats(self, model: str) -> bool:
        """Return whether a model is trained on what the recipe is trained on anyway."""
        return model.endswith("-halves" if self.recipe.get("consistency") else "-whole")

    def flags(self, runs: Path, flat: bool) -> list[str]:
        """Return the flags of ``train.py`` for the data."""
        taxonomy = runs / f"{self.name}-{'flat' if flat else 'tree'}.json"
        leaves = self.tree.labels[: self.tree.num_leaves]
        taxonomy.write_text(json.dumps(leaves if flat else self.tree.to_nested()), encoding="utf-8")
        words = [word for split, file in self.files.items() for word in (f"--{split}_file", str(file))]
        return [*words, "--taxonomy", str(taxonomy), *(["--class_names", str(self.labels)] if self.labels else [])]

    def rows(self, split: str) -> tuple[list[str], np.ndarray]:
        """Return texts and leaf ids of a split, the same rows as in ``train.py``."""
        classes = self.recipe.get("class_names", {})
        names = str(self.labels) if self.labels else json.dumps({str(k): v for k, v in classes.items()})
        files = {f"{name}_file": str(file) for name, file in self.files.items()}
        found = load_splits(DataArguments(**files, class_names=names), self.seed, self.tree).splits[split]
        return list(found["text"]), np.array(found["label"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--encoder_name", help="name of the encoder in the results, if it is a folder")
    parser.add_argument("--task", choices=TASKS, nargs="+", default=TASKS)
    parser.add_argument("--model", choices=(*MODELS, *TRAINED), nargs="+", default=(*MODELS, *TRAINED))
    parser.add_argument("--seed", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--fresh", action="store_true", help="repeat finished runs")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quality")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "quality.json")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    for name in arguments.task:
        for seed in arguments.seed:
            task = Task(name, arguments.data / name, seed)
            for model in (model for model in arguments.model if not task.repeats(model)):
                key = {"task": name, "model": model, "seed": seed}
                if arguments.fresh or not any(key.items() <= run.items() for run in read(arguments.output)):
                    started = time.time()
                    if model in TRAINED:
                        pairs, own = train(task, model, arguments)
                    else:
                        labels, answers = MODELS[model](task, arguments.encoder)
                        pairs, own = (labels, answers), {}
                    scores = measure(*pairs, task.tree) | own | {"minutes": (time.time() - started) / 60}
                    keep(arguments, {**key, **scores})
                    print(f"{name}, {model}, seed {seed}: accuracy {scores['accuracy']:.4f}", flush=True)
    print_table(read(arguments.output))
    print_ablation(read(arguments.output))


def read(output: Path) -> list[dict]:
    return json.loads(output.read_text(encoding="utf-8"))["results"] if output.exists() else []


def keep(arguments: argparse.Namespace, run: dict) -> None:
    """Add a run to the output file, replacing an earlier run of the same task, model and seed."""
    order = [*MODELS, *TRAINED]

    def place(other: dict) -> tuple[int, int, int]:
        return TASKS.index(other["task"]), order.index(other["model"]), other["seed"]

    results = sorted([*(other for other in read(arguments.output) if place(other) != place(run)), run], key=place)
    encoder = arguments.encoder_name or Path(arguments.encoder).name
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"encoder": encoder, "results": results}, indent=2) + "\n", encoding="utf-8")


# ── Peers: each returns leaf ids and answers of the test rows ───────────────────────────────────────────────────────


def vectors(task: Task) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return TF-IDF of the training rows, their labels, and TF-IDF of the test rows."""
    texts, labels = task.rows("train")
    tfidf = TfidfVectorizer(**TFIDF)
    known = tfidf.fit_transform(texts)
    texts, unseen = task.rows("test")
    return known, labels, tfidf.transform(texts), unseen


def tfidf_svm(task: Task, encoder: str) -> tuple[np.ndarray, np.ndarray]:
    known, labels, others, unseen = vectors(task)
    return unseen, LinearSVC(random_state=task.seed).fit(known, labels).predict(others)


def hiclass_tfidf(task: Task, encoder: str) -> tuple[np.ndarray, np.ndarray]:
    known, labels, others, unseen = vectors(task)
    return unseen, hiclass(task.tree, LinearSVC(random_state=task.seed), known, labels, others)


def hiclass_embeddings(task: Task, encoder: str) -> tuple[np.ndarray, np.ndarray]:
    from sentence_transformers import SentenceTransformer

    body = SentenceTransformer(encoder, device="cpu")
    body.max_seq_length = 512
    (texts, labels), (others, unseen) = task.rows("train"), task.rows("test")
    known, others = (body.encode(some, batch_size=16) for some in (texts, others))
    return unseen, hiclass(task.tree, LogisticRegression(C=10, max_iter=2000), known, labels, others)


def hiclass(
    tree: Taxonomy, classifier: ClassifierMixin, known: np.ndarray, labels: np.ndarray, others: np.ndarray
) -> np.ndarray:
    """Return leaf ids from a local classifier for each parent, from the root down."""
    from hiclass import LocalClassifierPerParentNode

    def padded(leaf: int) -> list[str]:
        path = [str(node) for node in tree.path(leaf)]
        return path + [""] * (tree.depth - len(path))

    model = LocalClassifierPerParentNode(local_classifier=classifier)
    model.fit(known, np.array([padded(leaf) for leaf in labels], dtype=object))
    return np.array([int([node for node in path if node != ""][-1]) for path in model.predict(others)])


def setfit(task: Task, encoder: str) -> tuple[np.ndarray, np.ndarray]:
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    (texts, labels), (others, unseen) = task.rows("train"), task.rows("test")
    if has_bf16(cpu=not torch.cuda.is_available()):
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # SetFit's own flag supports only float16
    model = SetFitModel.from_pretrained(encoder)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(ROOT / "runs" / "setfit"),
            batch_size=16,
            max_steps=SETFIT_STEPS,
            seed=task.seed,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({"text": texts, "label": labels}),
    )
    trainer.train()
    return unseen, np.array(model.predict(others, batch_size=32))


MODELS: dict[str, Callable[[Task, str], tuple[np.ndarray, np.ndarray]]] = {
    "tfidf-svm": tfidf_svm,
    "hiclass-tfidf": hiclass_tfidf,
    "hiclass-embeddings": hiclass_embeddings,
    "setfit": setfit,
}


# ── train.py, scores, the table ──────────────────────────────────────────────────────────────────────────────────────


def train(
    task: Task, model: str, arguments: argparse.Namespace
) -> tuple[tuple[np.ndarray, np.ndarray], dict[str, float]]:
    """Train by ``train.py``. Return leaf ids and answers of the test rows, and the scores that the run measured."""
    folder = arguments.runs / f"{task.name}-{model}-{task.seed}"
    if arguments.fresh:  # train.py would resume a finished run
        shutil.rmtree(folder, ignore_errors=True)
    words = [str(ROOT / "recipes" / f"{task.name}.yaml"), "--model_name_or_path", arguments.encoder]
    words += [*task.flags(arguments.runs, flat=model.startswith("flat")), *TRAINED[model]]
    words += ["--seed", str(task.seed), "--output_dir", str(folder), "--resume_from_checkpoint", "auto"]
    subprocess.run([sys.executable, str(ROOT / "train.py"), *words], check=True)
    metrics = json.loads((folder / "metrics.json").read_text())
    with (folder / "test_predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    labels, answers = (np.array([task.tree.id(row[name]) for row in rows]) for name in ("label", "prediction"))
    commit = metrics["environment"]["commit"]
    own = {name.removeprefix("test_"): metrics[name] for name in OWN if name in metrics}
    if model.startswith("flat"):  # its level 1 consists of leaves
        own = {name: value for name, value in own.items() if "level_1" not in name}
    return (labels, answers), {**own, "commit": commit}


def measure(labels: np.ndarray, answers: np.ndarray, tree: Taxonomy) -> dict[str, float | list[float]]:
    """Compute the scores that depend only on the predicted leaf."""
    certain = np.full((len(labels), tree.num_leaves), -100.0)
    certain[np.arange(len(labels)), answers] = 0
    scores = build_compute_metrics(tree)(EvalPrediction(predictions=certain, label_ids=labels))
    ends = bootstrap_intervals(one_hot(labels, tree.num_leaves), one_hot(answers, tree.num_leaves))
    intervals = {"accuracy_interval": ends["micro_f1"].tolist(), "macro_f1_interval": ends["macro_f1"].tolist()}
    return {
        name: value for name, value in scores.items() if not name.endswith(("log_loss", "ece", "ece_by_chance"))
    } | intervals


def print_table(results: list[dict]) -> None:
    """Print means over seeds, with the standard deviation if there are several."""
    frame = pd.DataFrame(results).reindex(columns=["task", "model", "seed", *SHOWN, "accuracy_interval"])
    print("\n| task | model | seeds | 95 % of accuracy | " + " | ".join(SHOWN.values()) + " |")
    print("| --- | --- | ---: | --- |" + " ---: |" * len(SHOWN))
    for (task, model), runs in frame.groupby(["task", "model"], sort=False):
        low, high = (100 * np.mean([ends[i] for ends in runs["accuracy_interval"]]) for i in (0, 1))
        cells = [spread(runs[name], name) for name in SHOWN]
        print(f"| {task} | {model} | {len(runs)} | {low:.1f} – {high:.1f} | " + " | ".join(cells) + " |")


def print_ablation(results: list[dict]) -> None:
    """Print the scores of the encoder alone, with calibration, and with the lexical head."""
    parts = {
        "encoder alone": "uncalibrated_test_",
        "with temperatures": "without_lexical_head_test_",
        "with lexical head and temperatures": "",
    }
    frame = pd.DataFrame(results)
    # older runs lack newer scores
    shown = [prefix + name for prefix in parts.values() for name in PARTS]
    frame = frame.reindex(columns=frame.columns.union(shown, sort=False))
    print("\n| task | model | seeds | | " + " | ".join(SHOWN[name] for name in PARTS) + " |")
    print("| --- | --- | ---: | --- |" + " ---: |" * len(PARTS))
    for task in frame["task"].unique():
        for model in ("qlora-whole", "qlora-halves", "qlora-rank-16", "qlora"):
            runs = frame[(frame["task"] == task) & (frame["model"] == model)]
            for title, prefix in parts.items():
                if len(runs) and runs[f"{prefix}accuracy"].notna().any():
                    cells = " | ".join(spread(runs[prefix + name], name) for name in PARTS)
                    print(f"| {task} | {model} | {len(runs)} | {title} | {cells} |")


def spread(values: pd.Series, name: str) -> str:
    if values.isna().all():
        return ""
    factor, digits = (1, 3) if name.endswith(("log_loss", "ece")) else (100, 1)
    deviation = f" ± {factor * values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{factor * values.mean():.{digits}f}{deviation}"


if __name__ == "__main__":
    main()
