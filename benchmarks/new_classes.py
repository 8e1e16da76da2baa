"""Measure classes without examples on OHSUMED:

    python benchmarks/new_classes.py --data FOLDER --encoder ENCODER [--part zero added]

FOLDER is as for ``quality.py``. All models are made by ``train.py``, from texts truncated at 192
tokens, and scored on the test file. Names are MeSH's, descriptions those of ``descriptions.csv``.
The parts:

- zero: a classifier from the names, names and unlabelled training texts, or names with
  descriptions, without rows;
- added: a model is trained on the rows of all leaves but three, drawn at random among the leaves
  with siblings and 32 training rows or more. The three leaves are added without training, from a
  description and 0, 1, 4 or 16 rows. Compared are the macro-F1 of the new leaves on all test rows,
  also after training anew on all rows, and the macro-F1 of the other leaves on their own test rows,
  before and after. "Before", only the latter rows are scored. Three seeds draw the rows that are
  added.

Finished runs stay in ``--runs``, so an interrupted benchmark continues.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from harness import (
    ROOT,
    flag_parser,
    print_rows,
    read_predictions,
    read_results,
    train,
    write_results,
)
from sklearn.metrics import accuracy_score, f1_score

SEEDS = (1, 2, 3)
ROWS = (0, 1, 4, 16)
NEW = 3
SETTINGS: dict[str, Any] = {"quantization": "none", "max_length": 192}
FLAGS: dict[str, Any] = {"num_train_epochs": 2, "seed": 1, "label_smoothing_factor": 0.05}
FLAGS |= {"lora_r": 64, "lora_alpha": 128, "text_column": "text", "label_column": "label"}


def main() -> None:
    parser = flag_parser(__doc__, "new_classes.json", "data", "encoder", "runs")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=[*PARTS])
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    results = read_results(arguments.output, {})
    for part in arguments.part:
        results[part] = PARTS[part](arguments.data / "ohsumed", arguments)
        write_results(arguments.output, results)


def describe(data: Path, runs: Path) -> tuple[pd.DataFrame, Path]:
    """Return OHSUMED's classes with descriptions, and their file."""
    classes = pd.read_csv(data / "labels.csv", dtype=str)
    file = runs / "described.csv"
    described = classes.merge(pd.read_csv(ROOT / "benchmarks" / "descriptions.csv", dtype=str))
    described.to_csv(file, index=False)
    return described, file


def zero(data: Path, arguments: argparse.Namespace) -> list[dict]:
    """Make classifiers without rows."""
    results = []
    names = data / "labels.csv"
    described = describe(data, arguments.runs)[1]
    texts = {"unlabelled_file": data / "train.csv", "text_column": "text"}
    for kind, file, flags in (
        ("names", names, {}),
        ("unlabelled", names, texts),
        ("descriptions", described, {}),
    ):
        flags = {"taxonomy": file, "class_names": file, "test_file": data / "test.csv", **flags}
        metrics = train(
            arguments.runs / kind, model_name_or_path=arguments.encoder, **flags, **SETTINGS
        )
        scores = {name: metrics[f"test_{name}"] for name in ("accuracy", "macro_f1", "log_loss")}
        results.append({"classes": kind, **scores})
    columns = [
        ("classes", "{classes}"),
        ("accuracy", "{accuracy:.1%}"),
        ("macro-F1", "{macro_f1:.1%}"),
    ]
    print_rows(results, [*columns, ("log loss", "{log_loss:.2f}")])
    return results


def added(data: Path, arguments: argparse.Namespace) -> list[dict]:
    """Add leaves to a trained model, and compare with training anew."""
    # ── Files: all rows, and those of known leaves ────────────────────────────────────────────────
    runs = arguments.runs
    classes, described = describe(data, arguments.runs)
    rows = {split: pd.read_csv(data / f"{split}.csv", dtype=str) for split in ("train", "test")}
    counts = rows["train"]["label"].value_counts()
    siblings = classes["parent"].value_counts()
    eligible = classes[
        (classes["label"].map(counts) >= 32) & (classes["parent"].map(siblings) > 1)
    ]["label"]
    new = sorted(np.random.default_rng(0).permutation([*eligible])[:NEW])
    for name, table in {**rows, "classes": classes}.items():
        table[~table["label"].isin(new)].to_csv(runs / f"known-{name}.csv", index=False)
    name_of = dict(zip(classes["label"], classes["name"], strict=True))
    new_names, known_names = (
        [name for label, name in name_of.items() if (label in new) == is_new]
        for is_new in (True, False)
    )

    def measure(folder: Path) -> dict[str, float]:
        found = read_predictions(folder)
        of_known = found[found["label"].isin(known_names)]
        f1 = {"average": "macro", "zero_division": 0}
        return {
            "new_f1": f1_score(found["label"], found["prediction"], labels=new_names, **f1),
            "old_f1": f1_score(of_known["label"], of_known["prediction"], labels=known_names, **f1),
            "accuracy": accuracy_score(found["label"], found["prediction"]),
        }

    # ── Before, and trained anew ──────────────────────────────────────────────────────────────────
    results: list[dict] = []
    scored = {
        "taxonomy": described,
        "class_names": described,
        "test_file": data / "test.csv",
        **SETTINGS,
    }
    of_known = {"taxonomy": runs / "known-classes.csv", "class_names": runs / "known-classes.csv"}
    of_known |= {"train_file": runs / "known-train.csv", "test_file": runs / "known-test.csv"}
    for name, folder, files in (
        ("before", runs / "known", of_known),
        ("all, trained anew", runs / "all", {"train_file": data / "train.csv"}),
    ):
        train(folder, model_name_or_path=arguments.encoder, **scored | files, **FLAGS)
        results.append({"rows": name, **measure(folder)})

    # ── Added ─────────────────────────────────────────────────────────────────────────────────────
    of_new = rows["train"][rows["train"]["label"].isin(new)]
    for count in ROWS:
        measured = []
        for seed in SEEDS if count else SEEDS[:1]:
            folder = runs / f"added-{count}-{seed}"
            flags = {}
            if count:
                flags = {"train_file": runs / f"added-{count}-{seed}.csv", "num_train_epochs": 0}
                drawn = of_new.sample(frac=1, random_state=seed).groupby("label").head(count)
                drawn.to_csv(flags["train_file"], index=False)
            train(folder, model_name_or_path=runs / "known", **scored, **flags)
            measured.append(measure(folder))
        results.append({"rows": count, **pd.DataFrame(measured).mean().to_dict()})
    columns = [("rows", "{rows}"), ("new leaves' F1", "{new_f1:.1%}")]
    columns += [("other leaves' F1", "{old_f1:.1%}"), ("accuracy", "{accuracy:.1%}")]
    print_rows(results, columns)
    return results


PARTS = {"zero": zero, "added": added}


if __name__ == "__main__":
    main()
