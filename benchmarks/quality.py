"""Measure the accuracy of the recipes beside peers, all trained here:

    pip install setfit hiclass napkinxc
    python benchmarks/quality.py --data FOLDER --encoder ENCODER [--task ohsumed --model flat-lora --seed 1 …]

FOLDER holds ``ohsumed/{train,test,labels}.csv``, ``medical_abstracts/{train,validation,test}.csv``,
``hallmarks_of_cancer/{train,validation,test}.jsonl`` with ``taxonomy.json``, and ``ohsumed_multilabel/{train,test}.jsonl``.

Single-path models (ohsumed, medical_abstracts):

- tfidf-svm: a linear SVM over TF-IDF of words and word pairs, by scikit-learn. The regularisation, the class weights and the
  removal of stop words have the best accuracy on the validation rows;
- hiclass-tfidf: the same for each parent of the taxonomy, by HiClass;
- hiclass-embeddings: logistic regression over the frozen encoder's mean vectors for each parent, by HiClass;
- setfit: the encoder fine-tuned on pairs of texts, then logistic regression, by SetFit: `SETFIT_STEPS` steps of 16 pairs,
  texts truncated at the 256 tokens with which this encoder was published, bfloat16 where train.py would use it;
- flat-full, flat-lora: every weight, or a rank-16 adapter over a full-precision encoder, under one softmax over the leaves, with
  cross-entropy over whole texts;
- lora, qlora: the recipe over a full-precision encoder, and the recipe itself, over a 4-bit encoder;
- lora-no-contrast, qlora-no-contrast: the same without contrastive steps;
- qlora-rank-16: qlora-no-contrast with a rank-16 adapter;
- qlora-gamma-0, qlora-gamma-0.5, …: the recipe with another γ of the focal loss;
- lora-whole, qlora-whole, qlora-halves: lora or qlora trained on whole texts without contrastive steps, or on halves with
  consistency, if the recipe does the opposite.

The flat peers are trained by ``train.py`` with cross-entropy, the recipe's epochs, text length, label smoothing and early
stopping, and are calibrated on the validation rows. The learning rate of flat-full is `FULL_LEARNING_RATE`. All models get
the same training rows, and the same validation rows if they need any.

Multi-label models (hallmarks, ohsumed_multilabel), over all nodes, closed upwards:

- tfidf-logistic, tfidf-svm: one-vs-rest logistic regression or linear SVM over TF-IDF, by scikit-learn;
- napkinxc: a probabilistic label tree over TF-IDF, by napkinXC;
- flat-lora: a rank-16 adapter over the encoder and one linear layer over the mean token vector, with binary cross-entropy,
  by transformers' Trainer and PEFT. Texts have 512 tokens and batches 8 texts; learning rates are `ADAPTER_RATE` and
  `HEAD_RATE`; there is no dropout, as in ``train.py``;
- flat-lora-max: the same with each node's maximum over itself and its descendants, and the max constraint loss (C-HMCNN,
  Giunchiglia and Lukasiewicz, 2020);
- lora, qlora: as above.

The TF-IDF models have the settings of best micro-F1 on the validation rows, such as regularisation and the removal of stop words.
These rows also select the epoch of the fine-tuned models, which have at most the recipe's epochs and stop early as in
``train.py``. Each peer has the one threshold of best micro-F1 on the validation rows. The recipe has one threshold per node. The
difference to the best peer has a paired bootstrap interval.

Finished runs stay in the output file, and are repeated only with ``--fresh``. So an interrupted benchmark continues, also on
another machine. The runs of hallmarks in ``results/quality*.json`` are for an earlier split (docs/results.md): repeat all of them
before new ones are compared. All scores are for the test file, by one function. For single-path models, this function reads the
predicted leaf, and log loss and calibration errors come from the checkpoint's own metrics. Intervals are bootstrap intervals over
the test rows.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from harness import ROOT, flag_parser, print_table, read_results, write_results
from multi_label_peers import PEERS, SVM_STRENGTHS, paired_intervals, score_checkpoint, score_peer, unpack, vectors
from scipy.sparse import csr_matrix
from sklearn.base import ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from decisions_hierarchical import build_decisions
from hierarchical_clinicalbert.data.arguments import DataArguments
from hierarchical_clinicalbert.data.labels import resolve_labels
from hierarchical_clinicalbert.data.sources import read_rows
from hierarchical_clinicalbert.data.splits import LabelledSplits, split_rows
from hierarchical_clinicalbert.data.taxonomy_files import read_taxonomy
from hierarchical_clinicalbert.evaluation.metrics import bootstrap_intervals, one_hot
from hierarchical_clinicalbert.evaluation.one_path import OnePathForm
from hierarchical_clinicalbert.evaluation.report import MEASURED_TARGET
from hierarchical_clinicalbert.machine import has_bf16
from taxonomy_hierarchical import DEFAULT_TAXONOMY, Taxonomy

Predict = Callable[[Any], np.ndarray]

SINGLE_LABEL_TASKS = ("ohsumed", "medical_abstracts")
MULTI_LABEL_TASKS = ("hallmarks", "ohsumed_multilabel")
TASKS = (*SINGLE_LABEL_TASKS, *MULTI_LABEL_TASKS)
FOLDERS = {"hallmarks": "hallmarks_of_cancer"}  # where the name differs from the task's
SETFIT_STEPS = 500
FULL_LEARNING_RATE = 1e-4
NO_CONTRAST = ("--contrastive_steps", "0")
WHOLE = ("--consistency", "0", *NO_CONTRAST)
PLAIN = ("--lexical_head", "false", "--focal_gamma", "0", *WHOLE)
TRAINED = {  # trained by train.py, with these flags after the recipe
    "flat-full": ("--tuning", "full", "--learning_rate", str(FULL_LEARNING_RATE), *PLAIN),
    "flat-lora": ("--quantization", "none", "--lora_r", "16", "--lora_alpha", "32", *PLAIN),
    "lora-whole": ("--quantization", "none", *WHOLE),
    "qlora-whole": WHOLE,
    "qlora-halves": ("--consistency", "1"),
    "qlora-rank-16": ("--lora_r", "16", "--lora_alpha", "32", *NO_CONTRAST),
    **{f"qlora-gamma-{gamma}": ("--focal_gamma", gamma) for gamma in ("0", "0.5", "1", "2")},
    "lora-no-contrast": ("--quantization", "none", *NO_CONTRAST),
    "qlora-no-contrast": NO_CONTRAST,
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
MULTI_LABEL_SHOWN = {
    "micro_f1": "micro-F1",
    "macro_f1": "macro-F1",
    "example_f1": "example-based F1",
    "mean_average_precision": "mean average precision",
    "log_loss": "log loss",
    "ece": "ECE",
    "ece_by_chance": "ECE by chance",
}
PARTS = ("accuracy", "macro_f1", "level_1_accuracy", "log_loss", "ece")
MULTI_LABEL_PARTS = ("micro_f1", "macro_f1", "mean_average_precision", "log_loss", "ece")
OWN = (  # from the metrics of a checkpoint
    *("test_log_loss", "test_ece", "test_level_1_ece", "test_ece_by_chance", "test_level_1_ece_by_chance"),
    *("test_any_label_accuracy", "test_set_coverage", "test_set_leaves", "lexical_weight"),
    *("test_set_recall", "test_set_nodes", "epoch", "train_samples_per_second"),
    *(
        f"{step}_test_{name}"
        for step in ("uncalibrated", "without_lexical_head")
        for name in dict.fromkeys((*PARTS, *MULTI_LABEL_PARTS))
    ),
    *(
        f"{step}_{name}"
        for step in ("quantized_eval", "eval", "uncalibrated_eval")
        for name in ("accuracy", "micro_f1", "macro_f1", "log_loss")
    ),
)


def models_of(task: str) -> list[str]:
    """Return the names of all models of a task's kind, in the order of the tables."""
    return [*PEERS, "lora", "qlora"] if task in MULTI_LABEL_TASKS else [*MODELS, *TRAINED]


class Task:
    """The rows, the taxonomy and the recipe of a task.

    Attributes:
        files: the file of each split that has one.
        labels: the file that names the labels, or None.
    """

    def __init__(self, name: str, data: Path, seed: int):
        self.name, self.seed, self.is_multi_label = name, seed, name in MULTI_LABEL_TASKS
        self.recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
        folder, suffix = data / FOLDERS.get(name, name), "jsonl" if self.is_multi_label else "csv"
        self.files = {split: folder / f"{split}.{suffix}" for split in ("train", "validation", "test")}
        self.files = {split: file for split, file in self.files.items() if file.exists()}
        self.separator = self.recipe.get("label_separator", "/")
        self.labels = data / "ohsumed" / "labels.csv" if name.startswith("ohsumed") else None
        if name == "medical_abstracts":
            self.tree = Taxonomy(DEFAULT_TAXONOMY)
        else:
            self.tree = read_taxonomy(self.labels or folder / "taxonomy.json", self.separator)

    def has(self, model: str) -> bool:
        """Return whether a model is compared on this task. Variants that equal the task's recipe are not."""
        gamma = f"-gamma-{self.recipe.get('focal_gamma', 0):g}"
        halves = "-halves" if self.recipe.get("consistency") else "-whole"
        contrast = () if self.recipe.get("contrastive_steps") else ("-no-contrast",)
        return model in models_of(self.name) and not model.endswith((gamma, halves, *contrast))

    def flags(self, runs: Path, flat: bool) -> list[str]:
        """Return the flags of ``train.py`` for the data."""
        taxonomy = runs / f"{self.name}-{'flat' if flat else 'tree'}.json"
        leaves = self.tree.labels[: self.tree.num_leaves]
        taxonomy.write_text(json.dumps(leaves if flat else self.tree.to_nested()), encoding="utf-8")
        words = [word for split, file in self.files.items() for word in (f"--{split}_file", str(file))]
        return [*words, "--taxonomy", str(taxonomy), *(["--class_names", str(self.labels)] if self.labels else [])]

    def load(self) -> LabelledSplits:
        """Return the rows as ``train.py`` splits them: without a validation file, off the training file by the seed."""
        classes = self.recipe.get("class_names", {})
        names = str(self.labels) if self.labels else json.dumps({str(k): v for k, v in classes.items()})
        files = {f"{name}_file": str(file) for name, file in self.files.items()}
        arguments = DataArguments(**files, class_names=names, label_separator=self.separator)
        return split_rows(resolve_labels(read_rows(arguments), arguments, self.tree), self.seed)

    def rows(self, split: str) -> tuple[list[str], np.ndarray]:
        """Return texts and labels of a split, the latter as the array of `Decisions.targets`."""
        data = self.load()
        rows = data.splits[split]
        return list(rows["text"]), build_decisions(data.taxonomy, data.problem_type).targets(rows["nodes"][:]).numpy()


def main() -> None:
    parser = flag_parser(__doc__, "quality.json")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--encoder_name", help="name of the encoder in the results, if it is a folder")
    parser.add_argument("--task", choices=TASKS, nargs="+", default=TASKS)
    models = [*dict.fromkeys(model for task in TASKS for model in models_of(task))]
    parser.add_argument("--model", choices=models, nargs="+", default=models)
    parser.add_argument("--seed", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--fresh", action="store_true", help="repeat finished runs")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quality")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    for name in arguments.task:
        for seed in arguments.seed:
            task = Task(name, arguments.data, seed)
            for model in filter(task.has, arguments.model):
                key = {"task": name, "model": model, "seed": seed}
                if arguments.fresh or not any(key.items() <= run.items() for run in read_runs(arguments.output)):
                    started = time.time()
                    scores = (multi_label if task.is_multi_label else single_label)(task, model, arguments)
                    save_run(arguments, {**key, **scores, "minutes": (time.time() - started) / 60})
                    metric = "micro_f1" if task.is_multi_label else "accuracy"
                    print(f"{name}, {model}, seed {seed}: {metric} {scores[metric]:.4f}", flush=True)
    # ── Tables ───────────────────────────────────────────────────────────────────────────────────────────────────────
    results = read_runs(arguments.output)
    for shown, parts, tasks in (
        (SHOWN, PARTS, SINGLE_LABEL_TASKS),
        (MULTI_LABEL_SHOWN, MULTI_LABEL_PARTS, MULTI_LABEL_TASKS),
    ):
        if runs := [run for run in results if run["task"] in tasks]:
            print_scores(runs, shown)
            print_ablation(runs, parts)
    print_sets([run for run in results if "splits_set_recall" in run])
    for name in filter(MULTI_LABEL_TASKS.__contains__, arguments.task):
        labels = Task(name, arguments.data, arguments.seed[0]).rows("test")[1]
        print_differences(name, [run for run in results if run["task"] == name], labels)


def single_label(task: Task, model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and score a single-path model."""
    if model not in TRAINED:
        return measure(*MODELS[model](task, arguments.encoder), task.tree)
    folder, own = train(task, model, arguments)
    rows = pd.read_csv(folder / "test_predictions.csv", dtype=str, keep_default_na=False)
    labels, predictions = (np.array([*map(task.tree.id, rows[name])]) for name in ("label", "prediction"))
    if model.startswith("flat"):  # its level 1 consists of leaves
        own = {name: value for name, value in own.items() if "level_1" not in name}
    return measure(labels, predictions, task.tree) | own


def multi_label(task: Task, model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and score a multi-label model."""
    rows = {split: task.rows(split) for split in ("train", "validation", "test")}
    if model not in PEERS:
        folder, own = train(task, model, arguments)
        return own | score_checkpoint(folder, task.tree, rows)
    return score_peer(
        model,
        task.tree,
        rows,
        seed=task.seed,
        encoder=arguments.encoder,
        epochs=task.recipe["num_train_epochs"],
        folder=arguments.runs / f"{task.name}-{model}-{task.seed}",
        fresh=arguments.fresh,
    )


def read_runs(output: Path) -> list[dict]:
    return read_results(output, {"results": []})["results"]


def save_run(arguments: argparse.Namespace, run: dict) -> None:
    """Add a run to the output file, replacing an earlier run of the same task, model and seed."""

    def key(run: dict) -> tuple[int, int, int]:
        return TASKS.index(run["task"]), models_of(run["task"]).index(run["model"]), run["seed"]

    results = sorted([*(other for other in read_runs(arguments.output) if key(other) != key(run)), run], key=key)
    encoder = arguments.encoder_name or Path(arguments.encoder).name
    write_results(arguments.output, {"encoder": encoder, "results": results})


# ── Peers: each returns labels and predictions of the test rows, as leaf ids ─────────────────────────────────────────


def tfidf_svm(task: Task, encoder: str) -> tuple[np.ndarray, np.ndarray]:
    return best_on_validation(task, lambda svm, known, labels: svm.fit(known, labels).predict)


def hiclass_tfidf(task: Task, encoder: str) -> tuple[np.ndarray, np.ndarray]:
    return best_on_validation(task, partial(hiclass, task.tree))


def best_on_validation(
    task: Task, fit: Callable[[LinearSVC, csr_matrix, np.ndarray], Predict]
) -> tuple[np.ndarray, np.ndarray]:
    """Fit linear SVMs over TF-IDF. Return labels and predictions of the test rows, by the SVM of best validation accuracy."""
    rows = {split: task.rows(split) for split in ("train", "validation", "test")}
    best_accuracy, predictions = -1.0, np.array([])
    for features in vectors(rows).values():
        for strength, weight in product(SVM_STRENGTHS, (None, "balanced")):
            svm = LinearSVC(C=strength, class_weight=weight, random_state=task.seed)
            predict = fit(svm, features["train"], rows["train"][1])
            accuracy = float((predict(features["validation"]) == rows["validation"][1]).mean())
            if accuracy > best_accuracy:
                best_accuracy, predictions = accuracy, predict(features["test"])
    return rows["test"][1], predictions


def hiclass_embeddings(task: Task, encoder: str) -> tuple[np.ndarray, np.ndarray]:
    from sentence_transformers import SentenceTransformer

    body = SentenceTransformer(encoder, device="cpu")
    body.max_seq_length = 512
    (texts, labels), (test_texts, test_labels) = task.rows("train"), task.rows("test")
    known, unseen = (body.encode(part, batch_size=16) for part in (texts, test_texts))
    return test_labels, hiclass(task.tree, LogisticRegression(C=10, max_iter=2000), known, labels)(unseen)


def hiclass(tree: Taxonomy, classifier: ClassifierMixin, known: np.ndarray, labels: np.ndarray) -> Predict:
    """Fit a local classifier for each parent. Return a function that predicts leaf ids, from the root down."""
    from hiclass import LocalClassifierPerParentNode

    def padded(leaf: int) -> list[str]:
        path = [str(node) for node in tree.path(leaf)]
        return path + [""] * (tree.depth - len(path))

    model = LocalClassifierPerParentNode(local_classifier=classifier)
    model.fit(known, np.array([padded(leaf) for leaf in labels], dtype=object))
    return lambda others: np.array([int([node for node in path if node != ""][-1]) for path in model.predict(others)])


def setfit(task: Task, encoder: str, steps: int = SETFIT_STEPS) -> tuple[np.ndarray, np.ndarray]:
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    (texts, labels), (test_texts, test_labels) = task.rows("train"), task.rows("test")
    if has_bf16(cpu=not torch.cuda.is_available()):
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # SetFit's own flag supports only float16
    model = SetFitModel.from_pretrained(encoder)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(ROOT / "runs" / "setfit"),
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
    "hiclass-embeddings": hiclass_embeddings,
    "setfit": setfit,
}


# ── train.py, scores, the table ──────────────────────────────────────────────────────────────────────────────────────


def train(task: Task, model: str, arguments: argparse.Namespace) -> tuple[Path, dict[str, float]]:
    """Train with ``train.py``. Return the folder of the run, and the scores in its metrics.json."""
    folder = arguments.runs / f"{task.name}-{model}-{task.seed}"
    if arguments.fresh:  # train.py would resume a finished run
        shutil.rmtree(folder, ignore_errors=True)
    words = [str(ROOT / "recipes" / f"{task.name}.yaml"), "--model_name_or_path", arguments.encoder]
    words += [*task.flags(arguments.runs, flat=model.startswith("flat")), *TRAINED[model]]
    words += ["--seed", str(task.seed), "--output_dir", str(folder), "--resume_from_checkpoint", "auto"]
    subprocess.run([sys.executable, str(ROOT / "train.py"), *words], check=True)
    metrics = json.loads((folder / "metrics.json").read_text())
    own = {name.removeprefix("test_"): metrics[name] for name in OWN if name in metrics}
    return folder, {**own, "commit": metrics["environment"]["commit"]}


def measure(labels: np.ndarray, predictions: np.ndarray, tree: Taxonomy) -> dict[str, float | list[float]]:
    """Compute the scores that depend only on the predicted leaf, from leaf ids (num_texts,)."""
    certain = np.full((len(labels), tree.num_leaves), -100.0)
    certain[np.arange(len(labels)), predictions] = 0
    scores = OnePathForm(tree).measure(certain, labels)
    ends = bootstrap_intervals(one_hot(labels, tree.num_leaves), one_hot(predictions, tree.num_leaves))
    intervals = {"accuracy_interval": ends["micro_f1"].tolist(), "macro_f1_interval": ends["macro_f1"].tolist()}
    return {
        name: value for name, value in scores.items() if not name.endswith(("log_loss", "ece", "ece_by_chance"))
    } | intervals


def print_scores(results: list[dict], shown: dict[str, str]) -> None:
    """Print means over seeds of the scores in ``shown``, with the standard deviation if there are several seeds."""
    first, interval = next(iter(shown.values())), f"{next(iter(shown))}_interval"
    frame, rows = pd.DataFrame(results).reindex(columns=["task", "model", "seed", *shown, interval]), []
    for (task, model), runs in frame.groupby(["task", "model"], sort=False):
        low, high = (100 * np.mean([ends[i] for ends in runs[interval]]) for i in (0, 1))
        cells = (spread(runs[name], name) for name in shown)
        rows.append([task, model, len(runs), f"{low:.1f} – {high:.1f}", *cells])
    print_table(["task", "model", "seeds", f"95 % of {first}", *shown.values()], rows, left=2)


def print_ablation(results: list[dict], names: tuple[str, ...]) -> None:
    """Print scores of the encoder alone, with calibration, and with the lexical head."""
    parts = {
        "encoder alone": "uncalibrated_test_",
        "calibrated": "without_lexical_head_test_",
        "with lexical head, calibrated": "",
    }
    frame = pd.DataFrame(results)
    # older runs lack newer scores
    shown = [prefix + name for prefix in parts.values() for name in names]
    frame = frame.reindex(columns=frame.columns.union(shown, sort=False))
    rows = []
    for task in frame["task"].unique():
        for model in ("qlora-whole", "qlora-halves", "qlora-rank-16", "qlora-gamma-0", "qlora-no-contrast", "qlora"):
            runs = frame[(frame["task"] == task) & (frame["model"] == model)]
            for title, prefix in parts.items():
                if len(runs) and runs[prefix + names[0]].notna().any():
                    rows.append([task, model, title, len(runs), *(spread(runs[prefix + name], name) for name in names)])
    titles = ((SHOWN | MULTI_LABEL_SHOWN)[name] for name in names)
    print_table(["task", "model", "", "seeds", *titles], rows, left=3)


def print_sets(results: list[dict]) -> None:
    """Print the recall of prediction sets over random splits, beside its bounds (Angelopoulos et al., 2022)."""
    rows = []
    for run in results:
        recall, nodes, texts = (run[f"splits_set_{name}"] for name in ("recall", "nodes", "texts"))
        shares = (f"{100 * share:.2f}" for share in (MEASURED_TARGET, recall, MEASURED_TARGET + 2 / (texts + 1)))
        rows.append([run["task"], run["model"], run["seed"], *shares, f"{nodes:.2f}"])
    print_table(("task", "model", "seed", "requested", "measured recall", "at most", "nodes"), rows, left=2)


def print_differences(task: str, results: list[dict], labels: np.ndarray) -> None:
    """Print by how much the recipes are better than the best peer of each metric, with paired intervals."""
    runs = dict([*pd.DataFrame(results).groupby("model", sort=False)])
    peers, rows = runs.keys() & PEERS.keys(), []
    for model in runs.keys() - PEERS.keys() if peers else ():
        for metric in ("micro_f1", "macro_f1"):
            best = max(peers, key=lambda peer: runs[peer][metric].mean())
            own, other = ([unpack(run, labels.shape) for run in runs[name]["choices"]] for name in (model, best))
            difference, low, high = (100 * value for value in paired_intervals(own, other, labels)[metric])
            shown = MULTI_LABEL_SHOWN[metric], best, f"{difference:.1f}", f"{low:.1f} – {high:.1f}"
            rows.append([task, model, *shown])
    print_table(("task", "model", "metric", "best peer", "points more", "95 %"), rows, left=4)


def spread(values: pd.Series, name: str) -> str:
    """Format the mean of a score and, if there are several values, its standard deviation."""
    if values.isna().all():
        return ""
    factor, digits = (1, 3) if name.endswith(("log_loss", "ece", "ece_by_chance")) else (100, 1)
    deviation = f" ± {factor * values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{factor * values.mean():.{digits}f}{deviation}"


if __name__ == "__main__":
    main()
