"""Measure long texts with many codes: CodiEsp's case reports under ICD-10-CM, by five folds:

    python benchmarks/codiesp.py --data FOLDER --encoder ENCODER

FOLDER holds ``codiesp/{train,dev}.jsonl`` and ``codiesp/icd10cm.csv``. The 750 texts of both files
are five folds. Each is scored once; of the other texts, `VALIDATION` select the epoch, calibrate,
and fit thresholds.

- recipe: `recipes/codiesp.yaml`, which reads all tokens in windows of 512;
- recipe-512: as the recipe, with texts truncated at 512 tokens;
- flat-lora, tfidf-logistic: the peers of `multi_label_peers`; the first truncates at 512 tokens,
  the second reads all words.

F1 is over all nodes, closed upwards. Macro-F1 is the mean over the nodes with training texts.
Intervals are paired bootstrap intervals over the texts. Finished runs stay in the output file.
"""

import argparse
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
import yaml
from multi_label_peers import score_checkpoint, score_peer, unpack
from scipy.special import expit
from sklearn.model_selection import KFold
from transformers import AutoTokenizer

from decisions_hierarchical import ManyNodes, guaranteed_threshold
from hierarchical_clinicalbert.data.taxonomy_files import read_taxonomy
from hierarchical_clinicalbert.evaluation.metrics import confusion_counts, macro_f1, micro_f1
from hierarchical_clinicalbert.evaluation.report import MEASURED_TARGET
from taxonomy_hierarchical import Taxonomy

FOLDS = 5
VALIDATION = 90
WINDOW = 512
RECIPES: dict[str, dict[str, Any]] = {"recipe": {}, "recipe-512": {"max_length": WINDOW}}
MODELS = ("tfidf-logistic", "flat-lora", *RECIPES)


def main() -> None:
    parser = harness.flag_parser(__doc__, "codiesp.json", "data", "encoder", "runs")
    parser.add_argument("--model", choices=MODELS, nargs="+", default=MODELS)
    parser.add_argument("--fold", type=int, nargs="+", default=[*range(1, FOLDS + 1)])
    arguments = parser.parse_args()
    tree = read_taxonomy(arguments.data / "codiesp" / "icd10cm.csv", "/")
    results = harness.read_results(
        arguments.output, {"processor": harness.processor(), "results": []}
    )
    runs = results["results"]
    folds = {}
    for fold in arguments.fold:
        files = write_fold(fold, arguments.data / "codiesp", arguments.runs)
        folds[fold] = harness.rows_of(harness.load_splits(files, tree, seed=1))
        for model in arguments.model:
            if not any((run["model"], run["fold"]) == (model, fold) for run in runs):
                scores = run_model(model, fold, files, folds[fold], tree, arguments)
                # another process may have finished a run meanwhile
                results = harness.read_results(arguments.output, results)
                runs = results["results"]
                runs.append({"model": model, "fold": fold, **scores})
                harness.write_results(arguments.output, results)
                print(f"fold {fold}, {model}: micro-F1 {scores['micro_f1']:.4f}", flush=True)
    print_tables(runs, folds, tree, arguments.encoder)


def write_fold(fold: int, data: Path, runs: Path) -> dict[str, Path]:
    """Write the rows of each split of a fold to a file."""
    lines = [
        line
        for name in ("train", "dev")
        for line in (data / f"{name}.jsonl").read_text("utf-8").splitlines()
    ]
    others, scored = [*KFold(FOLDS, shuffle=True, random_state=0).split(lines)][fold - 1]
    others = np.random.default_rng(fold).permutation(others)
    parts = {"validation": others[:VALIDATION], "train": others[VALIDATION:], "test": scored}
    files = {split: runs / f"fold-{fold}-{split}.jsonl" for split in parts}
    runs.mkdir(parents=True, exist_ok=True)
    for split, numbers in parts.items():
        files[split].write_text(
            "".join(f"{lines[number]}\n" for number in numbers), encoding="utf-8"
        )
    return files


def run_model(
    model: str,
    fold: int,
    files: dict[str, Path],
    rows: dict[str, harness.Rows],
    tree: Taxonomy,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Train a model on a fold, and return its scores on the fold's test rows."""
    recipe = harness.ROOT / "recipes" / "codiesp.yaml"
    folder = arguments.runs / f"{model}-{fold}"
    if model not in RECIPES:
        epochs = yaml.safe_load(recipe.read_text())["num_train_epochs"]
        fitted = {"seed": fold, "encoder": arguments.encoder, "epochs": epochs, "folder": folder}
        return score_peer(model, tree, rows, **fitted)
    flags = {
        "model_name_or_path": arguments.encoder,
        "taxonomy": arguments.data / "codiesp" / "icd10cm.csv",
    }
    flags |= {"seed": fold, **RECIPES[model]}
    harness.train(
        folder, recipe, **flags, **{f"{split}_file": file for split, file in files.items()}
    )
    scores, u, calibration = score_checkpoint(folder, tree, rows)
    threshold = guaranteed_threshold("recall", MEASURED_TARGET, calibration)
    sets = ManyNodes(tree).prediction_sets(torch.from_numpy(expit(u)), threshold).numpy()
    true = rows["test"][1] == 1
    recalls = (true & sets).sum(1) / true.sum(1)
    return scores | {"set_recalls": recalls.tolist(), "set_nodes": sets.sum(1).tolist()}


# ── Tables ────────────────────────────────────────────────────────────────────────────────────────


def print_tables(
    runs: list[dict], folds: dict[int, dict[str, harness.Rows]], tree: Taxonomy, encoder: str
) -> None:
    """Print the scores of all texts and of those beyond one window, and the differences to the
    recipe.
    """
    # ── All folds' texts, one after the other ─────────────────────────────────────────────────────
    tokenizer = AutoTokenizer.from_pretrained(encoder, model_max_length=10**6)
    texts = [text for rows in folds.values() for text in rows["test"][0]]
    is_long = np.array([*map(len, tokenizer(texts)["input_ids"])]) > WINDOW
    labels = np.concatenate([rows["test"][1] for rows in folds.values()])
    trained = np.concatenate(
        [
            np.tile((rows["train"][1] == 1).any(0), (len(rows["test"][1]), 1))
            for rows in folds.values()
        ]
    )
    finished = {(run["model"], run["fold"]): run for run in runs}
    complete = [model for model in MODELS if all((model, fold) in finished for fold in folds)]
    of_model = {model: [finished[model, fold] for fold in folds] for model in complete}
    chosen = {
        model: np.concatenate(
            [
                unpack(run["choices"], rows["test"][1].shape)
                for run, rows in zip(of_folds, folds.values(), strict=True)
            ]
        )
        for model, of_folds in of_model.items()
    }

    # ── Scores ────────────────────────────────────────────────────────────────────────────────────
    levels = [np.array(tree.levels) == level for level in range(1, tree.depth + 1)]
    columns = ["micro-F1", "macro-F1", *(f"level {level}" for level in range(1, tree.depth + 1))]
    columns += ["mean average precision", "recall of sets", "nodes of sets"]
    for title, counted in (
        ("all texts", np.full(len(texts), True)),
        (f"beyond {WINDOW} tokens", is_long),
    ):
        table = []
        for model, of_folds in of_model.items():
            counts = confusion_counts(labels[counted], chosen[model][counted])
            of_trained = confusion_counts(
                (labels * trained)[counted], (chosen[model] & trained)[counted]
            )
            f1 = [micro_f1(counts), macro_f1(of_trained)]
            f1 += [micro_f1(counts[:, is_level]) for is_level in levels]
            average = np.mean([run["mean_average_precision"] for run in of_folds])
            cells = [
                *(f"{100 * value:.1f}" for value in f1),
                f"{100 * average:.1f}" if counted.all() else "",
                "",
                "",
            ]
            if model in RECIPES:
                recalls, nodes = (
                    np.concatenate([run[name] for run in of_folds])[counted]
                    for name in ("set_recalls", "set_nodes")
                )
                cells[-2:] = f"{100 * recalls.mean():.1f}", f"{nodes.mean():.0f}"
            table.append([model, *cells])
        harness.print_table([title, *columns], table)

    # ── Differences ───────────────────────────────────────────────────────────────────────────────
    table = []
    for model in [model for model in chosen if model != "recipe"] if "recipe" in chosen else ():
        micro = harness.paired_intervals([chosen["recipe"]], [chosen[model]], labels)["micro_f1"]
        own = chosen["recipe"] & trained
        other = chosen[model] & trained
        macro = harness.paired_intervals([own], [other], labels * trained)["macro_f1"]
        table.append(
            [
                model,
                *(
                    "{:.1f} ({:.1f} – {:.1f})".format(*(100 * x for x in ends))
                    for ends in (micro, macro)
                ),
            ]
        )
    harness.print_table(["the recipe leads", "micro-F1", "macro-F1"], table)


if __name__ == "__main__":
    main()
