"""Measure the accuracy of the recipes beside peers, all trained here:

    pip install setfit hiclass napkinxc
    python benchmarks/quality.py --data FOLDER --encoder ENCODER [--task ohsumed --model flat-lora
    --seed 1 …]

FOLDER holds ``ohsumed/{train,test,labels}.csv``, ``medical_abstracts/{train,validation,test}.csv``,
``hallmarks_of_cancer/{train,validation,test}.jsonl`` with ``taxonomy.json``, and
``ohsumed_multilabel/{train,test}.jsonl``.

Single-path models (ohsumed, medical_abstracts):

- tfidf-svm: a linear SVM over TF-IDF of words and word pairs, by scikit-learn. The regularisation,
  the class weights and the removal of stop words have the best accuracy on the validation rows;
- hiclass-tfidf: the same for each parent of the taxonomy, by HiClass;
- setfit: the encoder fine-tuned on pairs of texts, then logistic regression, by SetFit:
  `SETFIT_STEPS` steps of 16 pairs, texts truncated at the 256 tokens with which this encoder was
  published, bfloat16 where train.py would use it;
- flat-full, flat-lora: every weight, or a rank-16 adapter over a full-precision encoder, under one
  softmax over the leaves, with cross-entropy over whole texts;
- lora, qlora: the recipe over a full-precision encoder, and the recipe itself, over a 4-bit
  encoder;
- lora-no-contrast, qlora-no-contrast: the same without contrastive steps.

The flat peers are trained by ``train.py`` with cross-entropy, the recipe's epochs, text length,
label smoothing and early stopping, and are calibrated on the validation rows. The learning rate of
flat-full is `FULL_LEARNING_RATE`. All models get the same training rows, and the same validation
rows if they need any.

Multi-label models (hallmarks, ohsumed_multilabel), over all nodes, closed upwards:

- tfidf-logistic, tfidf-svm: one-vs-rest logistic regression or linear SVM over TF-IDF, by
  scikit-learn;
- napkinxc: a probabilistic label tree over TF-IDF, by napkinXC;
- flat-lora: a rank-16 adapter over the encoder and one linear layer over the mean token vector,
  with binary cross-entropy, by transformers' Trainer and PEFT. Texts have 512 tokens and batches 8
  texts; learning rates are `ADAPTER_RATE` and `HEAD_RATE`; there is no dropout, as in ``train.py``;
- lora, qlora: as above.

The TF-IDF models have the settings of best micro-F1 on the validation rows, such as regularisation
and the removal of stop words. These rows also select the epoch of the fine-tuned models, which have
at most the recipe's epochs and stop early as in ``train.py``. Each peer has the one threshold of
best micro-F1 on the validation rows. The recipe has one threshold per node. The difference to the
best peer has a paired bootstrap interval.

Finished runs stay in the output file, so an interrupted benchmark continues, also on another
machine. All scores are for the test file, by one function. For single-path models, this function
reads the predicted leaf, and log loss and calibration errors come from the checkpoint's own
metrics. Intervals are bootstrap intervals over the test rows.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pandas as pd
import torch
import yaml
from multi_label_peers import PEERS, SVM_STRENGTHS, score_checkpoint, score_peer, unpack, vectors
from scipy.sparse import csr_matrix
from sklearn.base import ClassifierMixin
from sklearn.svm import LinearSVC

from hierarchical_clinicalbert.data.splits import LabelledSplits
from hierarchical_clinicalbert.data.taxonomy_files import read_taxonomy
from hierarchical_clinicalbert.evaluation.forms import OnePathForm
from hierarchical_clinicalbert.evaluation.metrics import bootstrap_intervals, one_hot
from hierarchical_clinicalbert.machine import has_bf16
from taxonomy_hierarchical import DEFAULT_TAXONOMY, Taxonomy

Predict = Callable[[Any], np.ndarray]

SINGLE_LABEL_TASKS = ("ohsumed", "medical_abstracts")
MULTI_LABEL_TASKS = ("hallmarks", "ohsumed_multilabel")
TASKS = (*SINGLE_LABEL_TASKS, *MULTI_LABEL_TASKS)
FOLDERS = {"hallmarks": "hallmarks_of_cancer"}  # where the name differs from the task's
SETFIT_STEPS = 500
FULL_LEARNING_RATE = 1e-4
NO_CONTRAST = {"contrastive_steps": 0}
PLAIN = {"lexical_head": "false", "focal_gamma": 0, "consistency": 0, **NO_CONTRAST}
TRAINED: dict[str, dict[str, Any]] = {  # trained by train.py, with these flags after the recipe
    "flat-full": {"tuning": "full", "learning_rate": FULL_LEARNING_RATE, **PLAIN},
    "flat-lora": {"quantization": "none", "lora_r": 16, "lora_alpha": 32, **PLAIN},
    "lora-no-contrast": {"quantization": "none", **NO_CONTRAST},
    "qlora-no-contrast": NO_CONTRAST,
    "lora": {"quantization": "none"},
    "qlora": {},
}
SHOWN = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "level_1_accuracy": "level-1 accuracy",
    "hierarchical_f1": "hierarchical F1",
    "log_loss": "log loss",
    "ece": "ECE",
}
MULTI_LABEL_SHOWN = {
    "micro_f1": "micro-F1",
    "macro_f1": "macro-F1",
    "example_f1": "example-based F1",
    "mean_average_precision": "mean average precision",
    "log_loss": "log loss",
    "ece": "ECE",
}


def models_of(task: str) -> list[str]:
    """Return the names of all models of a task's kind, in the order of the tables."""
    return [*PEERS, "lora", "qlora"] if task in MULTI_LABEL_TASKS else [*MODELS, *TRAINED]


class Task:
    """The rows, the taxonomy and the recipe of a task.

    Attributes:
        files: the file of each split that has one.
        labels: the file that names the labels, or None.
    """

    def __init__(self, name: str, data: Path, seed: int, recipe: str | None = None):
        self.name = name
        self.seed = seed
        self.is_multi_label = name in MULTI_LABEL_TASKS
        self.recipe = yaml.safe_load(
            (harness.ROOT / "recipes" / f"{recipe or name}.yaml").read_text()
        )
        self.has_contrast = bool(self.recipe.get("contrastive_steps"))
        folder = data / FOLDERS.get(name, name)
        suffix = "jsonl" if self.is_multi_label else "csv"
        self.files = {
            split: folder / f"{split}.{suffix}" for split in ("train", "validation", "test")
        }
        self.files = {split: file for split, file in self.files.items() if file.exists()}
        self.separator = self.recipe.get("label_separator", "/")
        self.labels = data / "ohsumed" / "labels.csv" if name.startswith("ohsumed") else None
        if name == "medical_abstracts":
            self.tree = Taxonomy(DEFAULT_TAXONOMY)
        elif name == "clinc150":
            self.tree = harness.load_splits(
                {"train": self.files["train"]}, None, seed, validation_size=0
            ).taxonomy
        else:
            self.tree = read_taxonomy(self.labels or folder / "taxonomy.json", self.separator)

    def has(self, model: str) -> bool:
        """Return whether a model is compared on this task.

        Variants that equal the task's recipe are not.
        """
        return model in models_of(self.name) and not (
            model.endswith("-no-contrast") and not self.has_contrast
        )

    def flags(self, runs: Path, flat: bool) -> dict[str, Any]:
        """Return the flags of ``train.py`` for the data."""
        taxonomy = runs / f"{self.name}-{'flat' if flat else 'tree'}.json"
        leaves = self.tree.labels[: self.tree.num_leaves]
        taxonomy.write_text(json.dumps(leaves if flat else self.tree.to_nested()), encoding="utf-8")
        files = {f"{split}_file": file for split, file in self.files.items()}
        return {
            **files,
            "taxonomy": taxonomy,
            **({"class_names": self.labels} if self.labels else {}),
        }

    def load(self) -> LabelledSplits:
        """Return the rows as ``train.py`` splits them: without a validation file, off the training
        file by the seed.
        """
        classes = self.recipe.get("class_names", {})
        names = (
            str(self.labels) if self.labels else json.dumps({str(k): v for k, v in classes.items()})
        )
        options = {"class_names": names, "label_separator": self.separator}
        options["validation_size"] = self.recipe.get("validation_size")
        return harness.load_splits(self.files, self.tree, self.seed, **options)

    def rows(self) -> dict[str, harness.Rows]:
        """Return texts and labels of each split."""
        return harness.rows_of(self.load())


def main() -> None:
    parser = harness.flag_parser(__doc__, "quality.json", "data", "encoder", "runs")
    parser.add_argument(
        "--encoder_name", help="name of the encoder in the results, if it is a folder"
    )
    parser.add_argument("--task", choices=TASKS, nargs="+", default=TASKS)
    models = [*dict.fromkeys(model for task in TASKS for model in models_of(task))]
    parser.add_argument("--model", choices=models, nargs="+", default=models)
    parser.add_argument("--seed", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    for name in arguments.task:
        for seed in arguments.seed:
            task = Task(name, arguments.data, seed)
            for model in filter(task.has, arguments.model):
                key = {"task": name, "model": model, "seed": seed}
                if not any(key.items() <= run.items() for run in read_runs(arguments.output)):
                    started = time.time()
                    scores = (multi_label if task.is_multi_label else single_label)(
                        task, model, arguments
                    )
                    save_run(arguments, {**key, **scores, "minutes": (time.time() - started) / 60})
                    metric = "micro_f1" if task.is_multi_label else "accuracy"
                    print(
                        f"{name}, {model}, seed {seed}: {metric} {scores[metric]:.4f}", flush=True
                    )
    # ── Tables ────────────────────────────────────────────────────────────────────────────────────
    results = read_runs(arguments.output)
    for shown, tasks in ((SHOWN, SINGLE_LABEL_TASKS), (MULTI_LABEL_SHOWN, MULTI_LABEL_TASKS)):
        if runs := [run for run in results if run["task"] in tasks]:
            print_scores(runs, shown)
    for name in filter(MULTI_LABEL_TASKS.__contains__, arguments.task):
        labels = Task(name, arguments.data, arguments.seed[0]).rows()["test"][1]
        print_differences(name, [run for run in results if run["task"] == name], labels)


def single_label(task: Task, model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and score a single-path model."""
    if model not in TRAINED:
        return measure(*MODELS[model](task, arguments.encoder), task.tree)
    folder, own = fine_tune(task, model, arguments)
    rows = harness.read_predictions(folder)
    labels, predictions = (
        np.array([*map(task.tree.id, rows[name])]) for name in ("label", "prediction")
    )
    if model.startswith("flat"):  # its level 1 consists of leaves
        own = {name: value for name, value in own.items() if "level_1" not in name}
    return own | measure(labels, predictions, task.tree)


def multi_label(task: Task, model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and score a multi-label model."""
    rows = task.rows()
    if model not in PEERS:
        folder, own = fine_tune(task, model, arguments)
        return own | score_checkpoint(folder, task.tree, rows)[0]
    return score_peer(
        model,
        task.tree,
        rows,
        seed=task.seed,
        encoder=arguments.encoder,
        epochs=task.recipe["num_train_epochs"],
        folder=arguments.runs / f"{task.name}-{model}-{task.seed}",
    )


def read_runs(output: Path) -> list[dict]:
    return harness.read_results(output, {"results": []})["results"]


def save_run(arguments: argparse.Namespace, run: dict) -> None:
    """Add a run to the output file."""

    def key(run: dict) -> tuple[int, int, int]:
        return TASKS.index(run["task"]), models_of(run["task"]).index(run["model"]), run["seed"]

    results = sorted([*read_runs(arguments.output), run], key=key)
    encoder = arguments.encoder_name or Path(arguments.encoder).name
    harness.write_results(arguments.output, {"encoder": encoder, "results": results})


# ── Peers: each returns labels and predictions of the test rows, as leaf ids ──────────────────────


def tfidf_svm(task: Task, encoder: str) -> tuple[np.ndarray, np.ndarray]:
    return best_on_validation(task, lambda svm, known, labels: svm.fit(known, labels).predict)


def hiclass_tfidf(task: Task, encoder: str) -> tuple[np.ndarray, np.ndarray]:
    return best_on_validation(task, partial(hiclass, task.tree))


def best_on_validation(
    task: Task, fit: Callable[[LinearSVC, csr_matrix, np.ndarray], Predict]
) -> tuple[np.ndarray, np.ndarray]:
    """Fit linear SVMs over TF-IDF. Return labels and predictions of the test rows, by the SVM of
    best validation accuracy.
    """
    rows = task.rows()
    best_accuracy = -1.0
    predictions = np.array([])
    for features in vectors(rows).values():
        for strength, weight in product(SVM_STRENGTHS, (None, "balanced")):
            svm = LinearSVC(C=strength, class_weight=weight, random_state=task.seed)
            predict = fit(svm, features["train"], rows["train"][1])
            accuracy = float((predict(features["validation"]) == rows["validation"][1]).mean())
            if accuracy > best_accuracy:
                best_accuracy = accuracy
                predictions = predict(features["test"])
    return rows["test"][1], predictions


def hiclass(
    tree: Taxonomy, classifier: ClassifierMixin, known: np.ndarray, labels: np.ndarray
) -> Predict:
    """Fit a local classifier for each parent.

    Return a function that predicts leaf ids, from the root down.
    """
    from hiclass import LocalClassifierPerParentNode

    def padded(leaf: int) -> list[str]:
        path = [str(node) for node in tree.path(leaf)]
        return path + [""] * (tree.depth - len(path))

    model = LocalClassifierPerParentNode(local_classifier=classifier)
    model.fit(known, np.array([padded(leaf) for leaf in labels], dtype=object))
    return lambda others: np.array(
        [int([node for node in path if node != ""][-1]) for path in model.predict(others)]
    )


def setfit(task: Task, encoder: str, steps: int = SETFIT_STEPS) -> tuple[np.ndarray, np.ndarray]:
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    rows = task.rows()
    texts, labels = rows["train"]
    test_texts, test_labels = rows["test"]
    if has_bf16(cpu=not torch.cuda.is_available()):
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # SetFit's own flag supports only float16
    model = SetFitModel.from_pretrained(encoder)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(harness.ROOT / "runs" / "setfit"),
            batch_size=16,
            max_steps=steps,
            seed=task.seed,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({"text": texts, "label": labels}),
    )
    trainer.train()
    return test_labels, np.array(model.predict(test_texts, batch_size=32))


MODELS: dict[str, Callable[[Task, str], tuple[np.ndarray, np.ndarray]]] = {
    "tfidf-svm": tfidf_svm,
    "hiclass-tfidf": hiclass_tfidf,
    "setfit": setfit,
}


# ── train.py, scores, the table ───────────────────────────────────────────────────────────────────


def fine_tune(
    task: Task, model: str, arguments: argparse.Namespace
) -> tuple[Path, dict[str, float]]:
    """Train with ``train.py``.

    Return the folder of the run, and the numbers in its metrics.json.
    """
    folder = arguments.runs / f"{task.name}-{model}-{task.seed}"
    flags = {"model_name_or_path": arguments.encoder, "seed": task.seed}
    flags |= task.flags(arguments.runs, flat=model.startswith("flat")) | TRAINED[model]
    metrics = harness.train(folder, harness.ROOT / "recipes" / f"{task.name}.yaml", **flags)
    own = {
        name.removeprefix("test_"): value
        for name, value in metrics.items()
        if isinstance(value, int | float)
    }
    return folder, own


def measure(
    labels: np.ndarray, predictions: np.ndarray, tree: Taxonomy
) -> dict[str, float | list[float]]:
    """Compute the scores that depend only on the predicted leaf, from leaf ids (num_texts,)."""
    certain = np.full((len(labels), tree.num_leaves), -100.0)
    certain[np.arange(len(labels)), predictions] = 0
    scores = OnePathForm(tree).measure(certain, labels)
    ends = bootstrap_intervals(
        one_hot(labels, tree.num_leaves), one_hot(predictions, tree.num_leaves)
    )
    intervals = {
        "accuracy_interval": ends["micro_f1"].tolist(),
        "macro_f1_interval": ends["macro_f1"].tolist(),
    }
    return {
        name: value for name, value in scores.items() if not name.endswith(harness.PROBABILITIES)
    } | intervals


def print_scores(results: list[dict], shown: dict[str, str]) -> None:
    """Print means over seeds of the scores in ``shown``, with the standard deviation if there are
    several seeds.
    """
    first = next(iter(shown.values()))
    interval = f"{next(iter(shown))}_interval"
    frame = pd.DataFrame(results).reindex(columns=["task", "model", "seed", *shown, interval])
    rows = []
    for (task, model), runs in frame.groupby(["task", "model"], sort=False):
        low, high = (100 * np.mean([ends[i] for ends in runs[interval]]) for i in (0, 1))
        cells = (harness.spread(runs[name], name) for name in shown)
        rows.append([task, model, len(runs), f"{low:.1f} – {high:.1f}", *cells])
    harness.print_table(
        ["task", "model", "seeds", f"95 % of {first}", *shown.values()], rows, left=2
    )


def print_differences(task: str, results: list[dict], labels: np.ndarray) -> None:
    """Print by how much the recipes are better than the best peer of each metric, with paired
    intervals.
    """
    runs = dict([*pd.DataFrame(results).groupby("model", sort=False)])
    peers = runs.keys() & PEERS.keys()
    rows = []
    for model in runs.keys() - PEERS.keys() if peers else ():
        for metric in ("micro_f1", "macro_f1"):
            best = max(peers, key=lambda peer: runs[peer][metric].mean())
            own, other = (
                [unpack(run, labels.shape) for run in runs[name]["choices"]]
                for name in (model, best)
            )
            difference, low, high = (
                100 * value for value in harness.paired_intervals(own, other, labels)[metric]
            )
            shown = MULTI_LABEL_SHOWN[metric], best, f"{difference:.1f}", f"{low:.1f} – {high:.1f}"
            rows.append([task, model, *shown])
    harness.print_table(
        ("task", "model", "metric", "best peer", "points more", "95 %"), rows, left=4
    )


if __name__ == "__main__":
    main()
