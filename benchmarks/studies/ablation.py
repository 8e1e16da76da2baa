"""Measure each setting of the recipes without a test file:

    python benchmarks/studies/ablation.py --data FOLDER --encoder ENCODER [--task ohsumed --variant "focal, gamma 1" … --fold 0 …]

FOLDER holds ``ohsumed/{train,labels}.csv`` and ``medical_abstracts/{train,validation}.csv``. Each run changes one setting of the
task's recipe with the flags of `BASE`. `VARIANTS` and `OF_TASK` list the changes.

- ohsumed: the training file is divided into thirds. ``train.py`` trains on two thirds, from which it splits off its validation
  rows, and is scored on the last third. So early stopping and calibration use no scored row.
- medical_abstracts: the training file has another distribution of classes than the rest of the corpus, so the scored rows are
  the validation file. Calibration is cross-validated, as in ``train.py``. The rows also selected the epoch, so their scores
  are too high (``selection.py``). A "fold" of this task is a repetition with another seed.

Standard errors of accuracy are 1.3 points on the 1,119 rows of a third, and 2.4 points on the 366 validation rows. So the tables
show the difference between each variant and the recipe on the same rows, with a bootstrap interval over the rows. "Encoder alone"
is without lexical head and temperatures. Finished runs stay in the output file, as in ``quality.py``.

Supports docs/experiments.md, "2026-11-26: One setting at a time".
"""

import argparse
import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedKFold

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from taxonomy_hierarchical import Taxonomy

FOLDS = 3
TASKS = ("ohsumed", "medical_abstracts")
VARIANTS = {
    "recipe": (),
    "full precision": ("--quantization", "none"),
    "8 bits": ("--quantization", "8bit"),
    "focal, gamma 1": ("--focal_gamma", "1"),
    "focal, gamma 2": ("--focal_gamma", "2"),
    "balanced class weights": ("--class_weighting", "balanced"),
    "level 1 counts half": ("--level_weights", "0.5", "1"),
    "no label smoothing": ("--label_smoothing_factor", "0"),
    "label smoothing 0.15": ("--label_smoothing_factor", "0.15"),
    "first token": ("--pooling", "cls"),
    "heads begin as prototypes": ("--heads_init", "prototypes"),
    "rank 4": ("--lora_r", "4", "--lora_alpha", "8"),
    "rank 64": ("--lora_r", "64", "--lora_alpha", "128"),
    "query and value": ("--lora_target_modules", "query", "value"),
    "learning rate 3e-4": ("--learning_rate", "3e-4"),
    "learning rate 1.2e-3": ("--learning_rate", "1.2e-3"),
    "rank 64, learning rate 1.2e-3": ("--lora_r", "64", "--lora_alpha", "128", "--learning_rate", "1.2e-3"),
    "3 epochs": ("--num_train_epochs", "3"),
    "256 tokens": ("--max_length", "256"),
    "adapter dropout 0.1": ("--lora_dropout", "0.1"),
    "batches of 32": ("--per_device_train_batch_size", "32"),
}
FLAT = ("--quantization", "none", "--lexical_head", "false", "--consistency", "0")
EVERY_WEIGHT = (*FLAT, "--tuning", "full")
PEERS = {  # one softmax over the leaves, as flat-lora and flat-full of quality.py
    "flat, LoRA": FLAT,
    "flat, LoRA, learning rate 3e-4": (*FLAT, "--learning_rate", "3e-4"),
    "flat, LoRA, learning rate 1.2e-3": (*FLAT, "--learning_rate", "1.2e-3"),
    "flat, LoRA, rank 64": (*FLAT, "--lora_r", "64", "--lora_alpha", "128"),
    "flat, LoRA, 8 epochs": (*FLAT, "--num_train_epochs", "8"),
    "flat, every weight, learning rate 5e-5": (*EVERY_WEIGHT, "--learning_rate", "5e-5"),
    "flat, every weight, learning rate 1e-4": (*EVERY_WEIGHT, "--learning_rate", "1e-4"),
    "flat, every weight, learning rate 2e-4": (*EVERY_WEIGHT, "--learning_rate", "2e-4"),
}
OF_TASK = {
    "ohsumed": {
        "whole texts": ("--consistency", "0"),
        "halves that need not agree": ("--consistency", "1e-9"),
        "consistency 2": ("--consistency", "2"),
        "8 epochs": ("--num_train_epochs", "8"),
        "5 % for validation": ("--validation_size", "0.05"),
        **PEERS,
    },
    "medical_abstracts": {
        "halves that must agree": ("--consistency", "1"),
        "1 epoch": ("--num_train_epochs", "1"),
        "every weight": ("--tuning", "full", "--learning_rate", "1e-4"),
    },
}
# changes to the recipe in all runs: the recipes' settings before this comparison
BASE = ("--lora_r", "16", "--lora_alpha", "32", "--focal_gamma", "0", "--contrastive_steps", "0")
KEPT = ("{}_log_loss", "{}_ece", "{}_macro_f1", "{}_hierarchical_f1", "{}_level_1_accuracy", "lexical_weight",
        "uncalibrated_{}_accuracy", "uncalibrated_{}_macro_f1", "uncalibrated_{}_log_loss", "epoch")  # fmt: skip

# columns of the tables after accuracy: factor and number of digits
SHOWN = (
    ("macro_f1", 100, 1),
    ("log_loss", 1, 3),
    ("ece", 1, 3),
    ("uncalibrated_accuracy", 100, 1),
    ("uncalibrated_log_loss", 1, 3),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--task", choices=TASKS, nargs="+", default=TASKS)
    parser.add_argument("--variant", nargs="+", help="by default all variants of the task")
    parser.add_argument("--fold", type=int, choices=range(FOLDS), nargs="+", default=[*range(FOLDS)])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "ablation")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "studies" / "results" / "ablation.json")
    arguments = parser.parse_args()
    for task in arguments.task:
        if unknown := [name for name in arguments.variant or () if name not in VARIANTS | OF_TASK[task]]:
            known = ", ".join(VARIANTS | OF_TASK[task])
            parser.error(f"{task} has no variant {unknown[0]!r}: it has {known}; --task chooses the task")
    for task in arguments.task:
        variants = VARIANTS | OF_TASK[task]
        for fold in arguments.fold:
            for variant in arguments.variant or variants:
                key = {"task": task, "variant": variant, "fold": fold}
                if not any(key.items() <= run.items() for run in read(arguments.output)):
                    save_run(arguments.output, {**key, **train(task, fold, variants[variant], arguments, variant)})
    for task in TASKS:
        print_table(task, [run for run in read(arguments.output) if run["task"] == task])


def read(output: Path) -> list[dict]:
    return json.loads(output.read_text(encoding="utf-8")) if output.exists() else []


def save_run(output: Path, run: dict) -> None:
    def key(run: dict) -> tuple[int, int, int]:
        task = run["task"]
        return TASKS.index(task), [*(VARIANTS | OF_TASK[task])].index(run["variant"]), run["fold"]

    output.write_text(json.dumps(sorted([*read(output), run], key=key), indent=1) + "\n", encoding="utf-8")


def train(task: str, fold: int, changes: tuple[str, ...], arguments: argparse.Namespace, name: str) -> dict:
    """Train one run. Return its scores, and ``right``: for each scored row whether its prediction is correct, as 0 or 1."""
    split, files = FILES[task](arguments.data / task, arguments.runs / f"fold-{fold}", fold)
    prefix = {"validation": "eval", "test": "test"}[split]
    folder = arguments.runs / f"{task}-{re.sub('[^a-z0-9.]+', '-', name)}-{fold}"
    words = [ROOT / "recipes" / f"{task}.yaml", "--model_name_or_path", arguments.encoder, *files]
    words += ["--output_dir", folder, "--seed", 1 + fold, "--resume_from_checkpoint", "auto", *BASE, *changes]
    if name in PEERS:
        words += ["--taxonomy", leaves(arguments.data / task / "labels.csv", arguments.runs / "leaves.json")]
    subprocess.run([sys.executable, str(ROOT / "train.py"), *map(str, words)], check=True)
    metrics = json.loads((folder / "metrics.json").read_text())
    with (folder / f"{split}_predictions.csv").open(encoding="utf-8", newline="") as file:
        correct = "".join(str(int(row["label"] == row["prediction"])) for row in csv.DictReader(file))
    scores = {name.format("").replace("__", "_").removeprefix("_"): metrics.get(name.format(prefix)) for name in KEPT}
    scores = {name: value for name, value in scores.items() if value is not None}
    return {"accuracy": correct.count("1") / len(correct), **scores, "right": correct}


def ohsumed(source: Path, folder: Path, fold: int) -> tuple[str, list]:
    """Write the files of a fold. Return the name of the scored split, and the files as flags of ``train.py``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = pd.read_csv(source / "train.csv", dtype=str)
    known, held_out = [*StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(rows, rows["label"])][fold]
    rows.iloc[known].to_csv(folder / "train.csv", index=False)
    rows.iloc[held_out].to_csv(folder / "test.csv", index=False)
    names = source / "labels.csv"
    files = ["--train_file", folder / "train.csv", "--test_file", folder / "test.csv"]
    return "test", [*files, "--class_names", names, "--taxonomy", names]


def leaves(labels: Path, file: Path) -> Path:
    """Write the names of the leaves as a taxonomy of one level."""
    tree = Taxonomy.from_file(labels)
    file.write_text(json.dumps(tree.labels[: tree.num_leaves]), encoding="utf-8")
    return file


def medical_abstracts(source: Path, folder: Path, fold: int) -> tuple[str, list]:
    return "validation", ["--train_file", source / "train.csv", "--validation_file", source / "validation.csv"]


FILES = {"ohsumed": ohsumed, "medical_abstracts": medical_abstracts}


def print_table(task: str, runs: list[dict]) -> None:
    """Print the recipe's scores on each fold, and the mean difference of each variant over its folds."""
    recipe = {run["fold"]: run for run in runs if run["variant"] == "recipe"}
    print(
        f"\n| {task} | folds | accuracy (95 %) | macro-F1 | log loss | ECE | accuracy, encoder alone | its log loss |"
    )
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for fold, run in recipe.items():
        cells = " | ".join(f"{scale * run[name]:.{digits}f}" for name, scale, digits in SHOWN)
        print(f"| recipe | {fold} | {100 * run['accuracy']:.1f} | {cells} |")
    for variant in VARIANTS | OF_TASK[task]:
        own = [run for run in runs if run["variant"] == variant != "recipe" and run["fold"] in recipe]
        if not own:
            continue
        pairs = [(run, recipe[run["fold"]]) for run in own]
        by_fold = [correct_rows(run) - correct_rows(peer) for run, peer in pairs]
        # the folds of ohsumed have different rows, and the folds of medical_abstracts the same rows
        gaps = np.concatenate(by_fold) if task == "ohsumed" else np.mean(by_fold, axis=0)
        generator = np.random.default_rng(0)
        drawn = [100 * generator.choice(gaps, len(gaps)).mean() for _ in range(2000)]
        low, high = np.percentile(drawn, [2.5, 97.5])
        differences = [scale * np.mean([run[name] - peer[name] for run, peer in pairs]) for name, scale, _ in SHOWN]
        cells = " | ".join(f"{value:+.{digits}f}" for value, (_, _, digits) in zip(differences, SHOWN, strict=True))
        folds = ", ".join(str(run["fold"]) for run in own)
        cells = f"{100 * gaps.mean():+.1f} ({low:+.1f} – {high:+.1f}) | {cells}".replace("-", "−")
        print(f"| {variant} | {folds} | {cells} |")


def correct_rows(run: dict) -> np.ndarray:
    """Return 1 for each scored row with a correct prediction, and 0 for the others."""
    return np.array([int(digit) for digit in run["right"]])


if __name__ == "__main__":
    main()
