"""Measure long texts with many codes: CodiEsp's case reports under ICD-10-CM, by five folds:

    python benchmarks/codiesp.py --data FOLDER --encoder ENCODER

FOLDER holds ``codiesp/{train,dev}.jsonl`` and ``codiesp/icd10cm.csv``. The 750 texts of both files are five folds. Each is scored
once; of the other texts, `VALIDATION` select the epoch, calibrate, and fit thresholds.

- recipe: `recipes/codiesp.yaml`, which reads all tokens in windows of 512;
- recipe-512: the same, with texts truncated at 512 tokens;
- flat-lora, tfidf-logistic: the peers of `multi_label_peers`; the first truncates at 512 tokens, the second reads all words.

F1 is over all nodes, closed upwards. Macro-F1 is the mean over the nodes with training texts. Intervals are paired bootstrap
intervals over the texts. Finished runs stay in the output file.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from harness import ROOT, flag_parser, print_table, processor, read_results, write_results
from multi_label_peers import Rows, predict, score, score_peer, unpack
from scipy.special import expit
from sklearn.model_selection import KFold
from transformers import AutoModel, AutoTokenizer

from decisions_hierarchical import ManyNodes, threshold_index
from hierarchical_clinicalbert.data.arguments import DataArguments
from hierarchical_clinicalbert.data.labels import resolve_labels
from hierarchical_clinicalbert.data.sources import read_rows
from hierarchical_clinicalbert.data.splits import split_rows
from hierarchical_clinicalbert.data.taxonomy_files import read_taxonomy
from hierarchical_clinicalbert.evaluation.metrics import confusion_counts, micro_f1, node_f1
from hierarchical_clinicalbert.evaluation.report import MEASURED_TARGET
from taxonomy_hierarchical import Taxonomy

FOLDS, VALIDATION, WINDOW = 5, 90, 512
RECIPES: dict[str, tuple[str, ...]] = {"recipe": (), "recipe-512": ("--max_length", str(WINDOW))}
MODELS = ("tfidf-logistic", "flat-lora", *RECIPES)


def main() -> None:
    parser = flag_parser(__doc__, "codiesp.json")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=MODELS)
    parser.add_argument("--fold", type=int, nargs="+", default=[*range(1, FOLDS + 1)])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "codiesp")
    arguments = parser.parse_args()
    tree = read_taxonomy(arguments.data / "codiesp" / "icd10cm.csv", "/")
    results = read_results(arguments.output, {"processor": processor(), "results": []})
    runs, folds = results["results"], {}
    for fold in arguments.fold:
        files = write_fold(fold, arguments.data / "codiesp", arguments.runs)
        folds[fold] = load(files, tree)
        for model in arguments.model:
            if not any((run["model"], run["fold"]) == (model, fold) for run in runs):
                scores = run_model(model, fold, files, folds[fold], tree, arguments)
                # another process may have finished a run meanwhile
                results = read_results(arguments.output, results)
                runs = results["results"]
                runs.append({"model": model, "fold": fold, **scores})
                write_results(arguments.output, results)
                print(f"fold {fold}, {model}: micro-F1 {scores['micro_f1']:.4f}", flush=True)
    print_tables(runs, folds, tree, arguments.encoder)


def write_fold(fold: int, data: Path, runs: Path) -> dict[str, Path]:
    """Write the rows of each split of a fold to a file."""
    lines = [line for name in ("train", "dev") for line in (data / f"{name}.jsonl").read_text("utf-8").splitlines()]
    others, scored = [*KFold(FOLDS, shuffle=True, random_state=0).split(lines)][fold - 1]
    others = np.random.default_rng(fold).permutation(others)
    parts = {"validation": others[:VALIDATION], "train": others[VALIDATION:], "test": scored}
    files = {split: runs / f"fold-{fold}-{split}.jsonl" for split in parts}
    runs.mkdir(parents=True, exist_ok=True)
    for split, numbers in parts.items():
        files[split].write_text("".join(f"{lines[number]}\n" for number in numbers), encoding="utf-8")
    return files


def load(files: dict[str, Path], tree: Taxonomy) -> dict[str, Rows]:
    """Return texts and labels of each split, as train.py reads them."""
    arguments = DataArguments(**{f"{split}_file": str(file) for split, file in files.items()})
    splits = split_rows(resolve_labels(read_rows(arguments), arguments, tree), seed=1).splits
    targets = ManyNodes(tree).targets
    return {split: ([*rows["text"]], targets(rows["nodes"][:]).numpy()) for split, rows in splits.items()}


def run_model(
    model: str, fold: int, files: dict[str, Path], rows: dict[str, Rows], tree: Taxonomy, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Train a model on a fold, and return its scores on the fold's test rows."""
    recipe, folder = ROOT / "recipes" / "codiesp.yaml", arguments.runs / f"{model}-{fold}"
    if model not in RECIPES:
        epochs = yaml.safe_load(recipe.read_text())["num_train_epochs"]
        fitted = {"seed": fold, "encoder": arguments.encoder, "epochs": epochs, "folder": folder, "fresh": False}
        return score_peer(model, tree, rows, **fitted)
    words = [str(recipe), "--model_name_or_path", arguments.encoder, "--output_dir", str(folder), *RECIPES[model]]
    words += ["--taxonomy", str(arguments.data / "codiesp" / "icd10cm.csv"), "--seed", str(fold)]
    words += [word for split, file in files.items() for word in (f"--{split}_file", str(file))]
    words += ["--resume_from_checkpoint", "auto"]
    subprocess.run([sys.executable, str(ROOT / "train.py"), *words], check=True)
    return score_checkpoint(folder, tree, rows)


def score_checkpoint(folder: Path, tree: Taxonomy, rows: dict[str, Rows]) -> dict[str, Any]:
    """Load a checkpoint as a user does, and return its scores, with the recall and the size of each text's prediction set."""
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    (texts, labels), calibration = rows["test"], model.config.calibration
    u = predict(model, tokenizer, texts, "logits")
    sets = expit(u) >= calibration.set_thresholds[threshold_index(MEASURED_TARGET)]
    true = labels == 1
    recalls = (true & sets).sum(1) / true.sum(1)
    return score(tree, u, labels, np.array(calibration.thresholds)) | {
        "set_recalls": recalls.tolist(),
        "set_nodes": sets.sum(1).tolist(),
    }


# ── Tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def print_tables(runs: list[dict], folds: dict[int, dict[str, Rows]], tree: Taxonomy, encoder: str) -> None:
    """Print the scores of all texts and of those beyond one window, and the differences to the recipe."""
    tokenizer = AutoTokenizer.from_pretrained(encoder, model_max_length=10**6)
    test = {fold: rows["test"] for fold, rows in folds.items()}
    is_long = {fold: np.array([*map(len, tokenizer(texts)["input_ids"])]) > WINDOW for fold, (texts, _) in test.items()}
    is_trained = {fold: (rows["train"][1] == 1).any(0) for fold, rows in folds.items()}
    chosen = {
        model: {
            run["fold"]: unpack(run["choices"], test[run["fold"]][1].shape) for run in runs if run["model"] == model
        }
        for model in MODELS
    }
    complete = [model for model in MODELS if chosen[model].keys() >= folds.keys()]

    def counts_of(model: str, weights: dict[int, np.ndarray]) -> np.ndarray:
        """Return counts of the folds' texts, each as often as its weight: of all nodes, and of those with training texts."""
        parts = []
        for fold, (_, labels) in test.items():
            counted = np.repeat(np.arange(len(labels)), weights[fold])
            counts = confusion_counts(labels[counted], chosen[model][fold][counted])
            parts.append([counts, counts * is_trained[fold]])
        return np.sum(parts, axis=0)

    def f1(model: str, weights: dict[int, np.ndarray]) -> list[float]:
        counts, trained = counts_of(model, weights)
        of_levels = (counts[:, np.array(tree.levels) == level] for level in range(1, tree.depth + 1))
        return [micro_f1(counts), np.nanmean(node_f1(trained)), *map(micro_f1, of_levels)]

    # ── Scores ───────────────────────────────────────────────────────────────────────────────────────────────────────
    once = {fold: np.ones(len(labels), int) for fold, (_, labels) in test.items()}
    long = {fold: of_fold.astype(int) for fold, of_fold in is_long.items()}
    for title, weights in (("all texts", once), (f"beyond {WINDOW} tokens", long)):
        rows = []
        for model in complete:
            of_model = [run for run in runs if run["model"] == model and run["fold"] in folds]
            cells = [f"{100 * value:.1f}" for value in f1(model, weights)]
            average = np.mean([run["mean_average_precision"] for run in of_model]) if weights is once else np.nan
            recalls = [np.repeat(run["set_recalls"], weights[run["fold"]]) for run in of_model if model in RECIPES]
            nodes = [np.repeat(run["set_nodes"], weights[run["fold"]]) for run in of_model if model in RECIPES]
            sets = (
                [f"{100 * np.concatenate(recalls).mean():.1f}", f"{np.concatenate(nodes).mean():.0f}"]
                if recalls
                else ["", ""]
            )
            rows.append([model, *cells, f"{100 * average:.1f}" if weights is once else "", *sets])
        levels = (f"level {level}" for level in range(1, tree.depth + 1))
        columns = [title, "micro-F1", "macro-F1", *levels, "mean average precision", "recall of sets", "nodes of sets"]
        print_table(columns, rows)

    # ── Differences: folds' texts are drawn anew 1,000 times ─────────────────────────────────────────────────────────
    generator, draws = np.random.default_rng(0), []
    for _ in range(1000):
        draws.append(
            {fold: np.bincount(generator.integers(len(n), size=len(n)), minlength=len(n)) for fold, n in once.items()}
        )
    rows = []
    for model in complete if "recipe" in complete else ():
        if model != "recipe":
            drawn = np.array([np.subtract(f1("recipe", draw)[:2], f1(model, draw)[:2]) for draw in draws])
            all_texts = np.subtract(f1("recipe", once)[:2], f1(model, once)[:2])
            low, high = np.percentile(drawn + all_texts - drawn.mean(0), (2.5, 97.5), axis=0)
            rows.append(
                [
                    model,
                    *(
                        f"{100 * d:.1f} ({100 * a:.1f} – {100 * b:.1f})"
                        for d, a, b in zip(all_texts, low, high, strict=True)
                    ),
                ]
            )
    print_table(["the recipe leads", "micro-F1", "macro-F1"], rows)


if __name__ == "__main__":
    main()
