"""What each setting of the recipe is worth, on OHSUMED's training file alone:

    python benchmarks/ablation.py --data FOLDER --encoder ENCODER [--variant "focal, gamma 1" … --fold 0 …]

FOLDER holds ``ohsumed/{train,labels}.csv``. The training file is cut in thirds; ``train.py`` is given two of them, carves its
validation rows from these as always, and is scored on the third, so that neither early stopping nor the calibration has
seen a row that counts. No test file is read. `VARIANTS` names what each run changes in ``recipes/ohsumed.yaml``.

A third has 1,119 rows, so accuracies have standard errors of 1.3 points; the table therefore shows how far each variant is from
the recipe on the same rows, with a bootstrap interval of that difference. "Encoder alone" is before the lexical head and the
temperatures. Finished runs stay in the output file, as in ``quality.py``.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedKFold

ROOT = Path(__file__).resolve().parent.parent
FOLDS = 3
VARIANTS = {
    "recipe": (),
    "whole texts": ("--consistency", "0"),
    "halves that need not agree": ("--consistency", "1e-9"),
    "consistency 2": ("--consistency", "2"),
    "full precision": ("--quantization", "none"),
    "8 bits": ("--quantization", "8bit"),
    "focal, gamma 1": ("--focal_gamma", "1"),
    "focal, gamma 2": ("--focal_gamma", "2"),
    "classes by effective number": ("--class_weighting", "effective_number"),
    "logit adjustment 0.5": ("--logit_adjustment", "0.5"),
    "level 1 counts half": ("--level_weights", "0.5", "1"),
    "no label smoothing": ("--label_smoothing_factor", "0"),
    "label smoothing 0.15": ("--label_smoothing_factor", "0.15"),
    "first token": ("--pooling", "cls"),
    "rank 4": ("--lora_r", "4", "--lora_alpha", "8"),
    "rank 64": ("--lora_r", "64", "--lora_alpha", "128"),
    "query and value": ("--lora_target_modules", "query", "value"),
    "learning rate 3e-4": ("--learning_rate", "3e-4"),
    "learning rate 1.2e-3": ("--learning_rate", "1.2e-3"),
    "3 epochs": ("--num_train_epochs", "3"),
    "8 epochs": ("--num_train_epochs", "8"),
    "256 tokens": ("--max_length", "256"),
    "adapter dropout 0.1": ("--lora_dropout", "0.1"),
    "encoder dropout 0.1": ("--encoder_dropout", "0.1"),
    "head dropout 0.3": ("--head_dropout", "0.3"),
    "batches of 32": ("--per_device_train_batch_size", "32"),
}
KEPT = ("test_log_loss", "test_ece", "test_macro_f1", "test_hierarchical_f1", "test_level_1_accuracy", "lexical_weight",
        "uncalibrated_test_accuracy", "uncalibrated_test_macro_f1", "uncalibrated_test_log_loss", "epoch")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--variant", choices=VARIANTS, nargs="+", default=[*VARIANTS])
    parser.add_argument("--fold", type=int, choices=range(FOLDS), nargs="+", default=[*range(FOLDS)])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "ablation")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "ablation.json")
    arguments = parser.parse_args()
    for fold in arguments.fold:
        for variant in arguments.variant:
            key = {"variant": variant, "fold": fold}
            if not any(key.items() <= run.items() for run in read(arguments.output)):
                run = {**key, **train(variant, fold, arguments)}
                place = [*VARIANTS].index
                runs = sorted([*read(arguments.output), run], key=lambda run: (place(run["variant"]), run["fold"]))
                arguments.output.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    print_table(read(arguments.output))


def read(output: Path) -> list[dict]:
    return json.loads(output.read_text(encoding="utf-8")) if output.exists() else []


def train(variant: str, fold: int, arguments: argparse.Namespace) -> dict:
    """The scores of a run, and for each row that was held out whether it was right, as a text of 0 and 1."""
    source = arguments.data / "ohsumed"
    files = arguments.runs / f"fold-{fold}"
    files.mkdir(parents=True, exist_ok=True)
    rows = pd.read_csv(source / "train.csv", dtype=str)
    known, held_out = [*StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(rows, rows["label"])][fold]
    rows.iloc[known].to_csv(files / "train.csv", index=False)
    rows.iloc[held_out].to_csv(files / "test.csv", index=False)
    folder = arguments.runs / f"{variant.replace(' ', '-').replace(',', '')}-{fold}"
    words = [ROOT / "recipes" / "ohsumed.yaml", "--model_name_or_path", arguments.encoder]
    words += ["--train_file", files / "train.csv", "--test_file", files / "test.csv", "--output_dir", folder]
    words += ["--class_names", source / "labels.csv", "--taxonomy", source / "labels.csv", "--seed", 1 + fold]
    words += ["--resume_from_checkpoint", "auto", *VARIANTS[variant]]
    subprocess.run([sys.executable, str(ROOT / "train.py"), *map(str, words)], check=True)
    metrics = json.loads((folder / "metrics.json").read_text())
    with (folder / "test_predictions.csv").open(encoding="utf-8", newline="") as file:
        right = "".join(str(int(row["label"] == row["prediction"])) for row in csv.DictReader(file))
    return {
        "accuracy": right.count("1") / len(right),
        **{name.removeprefix("test_"): metrics[name] for name in KEPT if name in metrics},
        "right": right,
    }


def print_table(runs: list[dict]) -> None:
    """Means over the folds that a variant has, and its differences from the recipe on the same folds, in points."""
    recipe = {run["fold"]: run for run in runs if run["variant"] == "recipe"}
    print("\n| variant | thirds | accuracy | from the recipe | macro-F1 | log loss | encoder alone | its log loss |")
    print("| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    for variant in VARIANTS:
        own = [run for run in runs if run["variant"] == variant and run["fold"] in recipe]
        if not own:
            continue
        peers = [recipe[run["fold"]] for run in own]
        gaps = np.concatenate([bits(run) - bits(peer) for run, peer in zip(own, peers, strict=True)])
        generator = np.random.default_rng(0)
        drawn = [100 * generator.choice(gaps, len(gaps)).mean() for _ in range(2000)]
        low, high = np.percentile(drawn, [2.5, 97.5])
        apart = f"{100 * gaps.mean():+.1f} ({low:+.1f} – {high:+.1f})" if variant != "recipe" else ""
        f1 = mean(own, "macro_f1", 100) - mean(peers, "macro_f1", 100)
        loss = mean(own, "log_loss") - mean(peers, "log_loss")
        alone, alone_loss = mean(own, "uncalibrated_test_accuracy", 100), mean(own, "uncalibrated_test_log_loss")
        changes = (f"{f1:+.1f}", f"{loss:+.3f}") if variant != "recipe" else ("", "")
        print(
            f"| {variant} | {len(own)} | {mean(own, 'accuracy', 100):.1f} | {apart} | {mean(own, 'macro_f1', 100):.1f} "
            f"{changes[0]} | {mean(own, 'log_loss'):.3f} {changes[1]} | {alone:.1f} | {alone_loss:.3f} |"
        )


def bits(run: dict) -> np.ndarray:
    return np.array([int(digit) for digit in run["right"]])


def mean(runs: list[dict], name: str, factor: float = 1) -> float:
    return factor * float(np.mean([run[name] for run in runs]))


if __name__ == "__main__":
    main()
