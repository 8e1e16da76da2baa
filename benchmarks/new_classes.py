"""Measure classes without examples on OHSUMED:

    python benchmarks/new_classes.py --data FOLDER --encoder ENCODER [--part zero added]

FOLDER is as for ``quality.py``. Texts are truncated at `LENGTH` tokens. Names are MeSH's, descriptions those of ``descriptions.csv``.
The parts:

- zero: a classifier from the names, or names with descriptions, without rows (``train.py --taxonomy``). The baseline is the
  cosine of the encoder's vectors of text and phrase. "Less the means" subtracts the mean of the phrases from the phrases, and
  that of the training texts, without their labels, from the texts;
- added: ``train.py`` trains on the rows of all leaves but three, drawn at random among the leaves with siblings and 32 training
  rows or more. The three leaves are added without training (`add_nodes`), from a description and 0, 1, 4 or 16 rows. Compared are the macro-F1 of the new leaves on
  all test rows, also after training anew on all rows, and the macro-F1 of the other leaves on their own test rows, before and after.

``--split train`` scores training rows instead, for choices: in "zero" all of them, in "added" the validation rows of the trained
model, and the rows of the new leaves that are not drawn, which weigh less, so that the mix is that of the training file. Finished runs and vectors stay in ``--runs``, so an interrupted benchmark
continues.
"""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from harness import ROOT, flag_parser, print_rows, write_results
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoTokenizer

from hierarchical_clinicalbert.data.taxonomy_files import read_taxonomy
from hierarchical_clinicalbert.machine import has_bf16
from hierarchical_clinicalbert.training.arguments import ModelArguments
from hierarchical_clinicalbert.training.model import build_model
from hierarchical_clinicalbert.training.prototypes import (
    list_candidates,
    new_class_vectors,
    write_name_heads,
)
from modeling_hierarchical import HierarchicalForSequenceClassification
from pipeline_hierarchical import use_cpu_kernels

LENGTH, BATCH, SEEDS = 192, 16, (1, 2, 3)
ROWS = (0, 1, 4, 16)
FLAGS = ("--quantization", "none", "--max_length", str(LENGTH), "--num_train_epochs", "2", "--seed", "1")
FLAGS += ("--lora_r", "64", "--lora_alpha", "128", "--label_smoothing_factor", "0.05")


def main() -> None:
    parser = flag_parser(__doc__, "new_classes.json")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=[*PARTS])
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "new-classes")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    task = Task(arguments.data, arguments.runs)
    results = {part: PARTS[part](task, arguments) for part in arguments.part}
    if arguments.split == "test":
        write_results(arguments.output, results)


class Task:
    """OHSUMED's rows, its taxonomy with and without descriptions, and the leaves that are left out."""

    def __init__(self, data: Path, runs: Path):
        self.runs, self.labels = runs, data / "ohsumed" / "labels.csv"
        self.rows = {split: pd.read_csv(data / "ohsumed" / f"{split}.csv", dtype=str) for split in ("train", "test")}
        classes = pd.read_csv(self.labels, dtype=str)
        described = classes.merge(pd.read_csv(ROOT / "benchmarks" / "descriptions.csv", dtype=str))
        counts, siblings = self.rows["train"]["label"].value_counts(), classes["parent"].value_counts()
        eligible = classes[(classes["label"].map(counts) >= 32) & (classes["parent"].map(siblings) > 1)]["label"]
        self.new = sorted(np.random.default_rng(0).permutation([*eligible])[:3])
        self.names = dict(zip(classes["label"], classes["name"], strict=True))
        self.files = {"all": runs / "all.csv", "known": runs / "known.csv"}
        described.to_csv(self.files["all"], index=False)
        described[~described["label"].isin(self.new)].to_csv(self.files["known"], index=False)
        self.test_file = data / "ohsumed" / "test.csv"
        self.train_files = {"all": data / "ohsumed" / "train.csv", "known": runs / "known-train.csv"}
        self.rows["train"][~self.rows["train"]["label"].isin(self.new)].to_csv(self.train_files["known"], index=False)
        self.trees = {"names": read_taxonomy(self.labels), "descriptions": read_taxonomy(self.files["all"])}

    def nodes(self, rows: pd.DataFrame) -> np.ndarray:
        return np.array([self.trees["names"].id(self.names[label]) for label in rows["label"]])

    def train(self, leaves: str, encoder: str) -> Path:
        """Train on the rows of "all" leaves, or of the "known" ones, unless this was done."""
        folder = self.runs / leaves
        if not (folder / "metrics.json").exists():
            words = ["--train_file", self.train_files[leaves], "--taxonomy", self.files[leaves], "--output_dir", folder]
            words += ["--class_names", self.files[leaves], "--model_name_or_path", encoder, *FLAGS]
            words += ["--text_column", "text", "--label_column", "label", "--resume_from_checkpoint", "auto"]
            words += ["--test_file", self.test_file] if leaves == "all" else []
            subprocess.run([sys.executable, ROOT / "train.py", *map(str, words)], check=True)
        return folder


class Encoder:
    """Encodes texts by a model, and keeps the vectors of files."""

    def __init__(self, model: HierarchicalForSequenceClassification, tokenizer: str, cache: Path):
        self.model, self.cache = model.eval(), cache
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        if has_bf16(cpu=True):
            model.encoder.to(torch.bfloat16)
        use_cpu_kernels(model.encoder)

    def tokens(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"]

    def run(self, texts: list[str], result: Any) -> Tensor:
        """Apply a function to padded batches of texts, and return its rows in the order of the texts."""
        inputs, parts = self.tokens(texts), []
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            batch = self.tokenizer.pad({"input_ids": [inputs[i] for i in chosen]}, return_tensors="pt")
            parts.append(result(chosen, batch))
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def vectors(self, texts: list[str], name: str | None = None) -> Tensor:
        """Return pooled vectors, (B, H). With a name, they are kept in a file."""
        file = self.cache / f"{name}.npy"
        if name is not None and file.exists():
            return torch.from_numpy(np.load(file))
        found = self.run(texts, lambda _, batch: self.model.pool(self.model.encode(**batch)[0]).float())
        if name is not None:
            np.save(file, found.numpy())
        return found

    def predict(self, model: HierarchicalForSequenceClassification, texts: list[str], vectors: Tensor) -> np.ndarray:
        """Return the most probable leaves of texts whose vectors are known, (B,)."""

        def leaves(chosen: list[int], batch: Any) -> Tensor:
            return model.heads.decisions(model.heads(vectors[chosen], **batch)[0])[1].argmax(1)

        return self.run(texts, leaves).numpy()


# ── A classifier without rows ────────────────────────────────────────────────────────────────────────────────────────


def zero(task: Task, arguments: Any) -> list[dict]:
    rows, results = task.rows[arguments.split], []
    model = build_model(ModelArguments(arguments.encoder, tuning="full", quantization="none"), task.trees["names"], 0)
    encoder = Encoder(model, arguments.encoder, arguments.runs)
    texts, unlabelled = (encoder.vectors([*task.rows[s]["text"]], f"plain-{s}") for s in (arguments.split, "train"))
    labels = task.nodes(rows)
    for kind, tree in task.trees.items():
        names = list_candidates(tree, tree.num_leaves)[-1]
        phrases = encoder.vectors(names.phrases, f"plain-{kind}")
        facts = {"classes": kind, "log_loss": ""}
        cosines = normalize(texts) @ normalize(phrases).T
        results.append({**facts, "method": "cosine", **scores(labels, cosines.argmax(1))})
        write_name_heads(model.heads, phrases)
        log_probs = model.heads.decisions(model.heads(texts)[0])[1]
        log_loss = f"{-log_probs[np.arange(len(labels)), labels].mean():.2f}"
        results.append({**facts, "method": "heads", **scores(labels, log_probs.argmax(1)), "log_loss": log_loss})
        centred = (texts - unlabelled.mean(0)) @ normalize(phrases - phrases.mean(0)).T
        results.append({**facts, "method": "less the means", **scores(labels, centred.argmax(1))})
    columns = [
        ("classes", "{classes}"),
        ("method", "{method}"),
        ("accuracy", "{accuracy:.1%}"),
        ("macro-F1", "{macro_f1:.1%}"),
        ("log loss", "{log_loss}"),
    ]
    print_rows(results, columns, left=2)
    return results


def scores(labels: np.ndarray, predicted: Any) -> dict[str, float]:
    found = np.asarray(predicted)
    return {"accuracy": accuracy_score(labels, found), "macro_f1": f1_score(labels, found, average="macro")}


# ── Leaves that are added ────────────────────────────────────────────────────────────────────────────────────────────


def added(task: Task, arguments: Any) -> list[dict]:
    """Add leaves to a trained model, and compare with training anew."""
    folder = task.train("known", arguments.encoder)
    known = HierarchicalForSequenceClassification.from_pretrained(folder)
    encoder = Encoder(known, arguments.encoder, arguments.runs)
    tree, train = task.trees["descriptions"], task.rows["train"]
    names = list_candidates(tree, tree.num_leaves)[-1]
    phrases = encoder.vectors(names.phrases, "known-descriptions")
    train_vectors = encoder.vectors([*train["text"]], "known-train")
    is_new = train["label"].isin(task.new).to_numpy()
    new = [tree.id(task.names[label]) for label in task.new]
    share = 1.0  # of the rows of the other leaves that are scored
    if arguments.split == "test":
        scored, vectors = task.rows["test"], encoder.vectors([*task.rows["test"]["text"]], "known-test")
    else:
        held_out = pd.read_csv(folder / "validation_predictions.csv")["row"]  # rows of the known leaves' file
        chosen = np.concatenate([np.flatnonzero(~is_new)[held_out], np.flatnonzero(is_new)])
        scored, vectors = train.iloc[chosen], train_vectors[chosen]
        share = len(held_out) / (~is_new).sum()
    texts, labels = [*scored["text"]], task.nodes(scored)
    others = sorted({*range(tree.num_leaves)} - {*new})

    # ── Before, and trained anew ─────────────────────────────────────────────────────────────────────────────────────
    predicted = encoder.predict(known, texts, vectors)
    before = np.array([tree.id(known.config.id2label[i]) for i in predicted])

    def measure(found: np.ndarray, drawn: pd.Index = train.index[:0]) -> dict[str, float]:
        kept = ~scored.index.isin(drawn) if arguments.split == "train" else np.full(len(scored), True)
        old, weights = kept & ~np.isin(labels, new), np.where(np.isin(labels, new), share, 1.0)[kept]
        pair = labels[kept], found[kept]
        return {
            "new_f1": f1_score(*pair, labels=new, average="macro", sample_weight=weights),
            "old_f1": f1_score(labels[old], found[old], labels=others, average="macro", zero_division=0),
            "accuracy": accuracy_score(*pair, sample_weight=weights),
        }

    results: list[dict] = [{"rows": "before", **measure(before)}]
    if arguments.split == "test":
        anew = pd.read_csv(task.train("all", arguments.encoder) / "test_predictions.csv").sort_values("row")
        found = np.array([tree.id(label) for label in anew["prediction"]])
        results.append({"rows": "all, trained anew", **measure(found)})

    # ── Added ────────────────────────────────────────────────────────────────────────────────────────────────────────
    for count in ROWS:
        runs = []
        for seed in SEEDS if count else SEEDS[:1]:
            drawn = train[is_new].sample(frac=1, random_state=seed).groupby("label").head(count).index
            members = torch.zeros(len(drawn), tree.num_leaves)
            members[np.arange(len(drawn)), task.nodes(train.loc[drawn])] = 1
            vectors_of = new_class_vectors(known.heads.open_world, new, phrases, train_vectors[drawn], members)
            grown = copy.deepcopy(known)
            grown.add_nodes(tree, {tree.labels[node]: values for node, values in vectors_of.items()})
            runs.append(measure(encoder.predict(grown, texts, vectors), drawn))
        results.append({"rows": count, **pd.DataFrame(runs).mean().to_dict()})
    columns = [("rows", "{rows}"), ("new leaves' F1", "{new_f1:.1%}")]
    columns += [("other leaves' F1", "{old_f1:.1%}"), ("accuracy", "{accuracy:.1%}")]
    print_rows(results, columns)
    return results


PARTS = {"zero": zero, "added": added}


if __name__ == "__main__":
    main()
