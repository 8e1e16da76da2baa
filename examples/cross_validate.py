"""Cross-validate: ``python examples/cross_validate.py [--folds N] -- RECIPE [--flag value ...]``.

The arguments after ``--`` are those of train.py, with one source of rows. Each fold is scored by a
model that is trained on the others, in a folder of ``--output_dir``. Rows of a text stay together.
A tenth of the other rows selects and calibrates. At the end, the means and standard deviations of
the scores are printed, and ``out_of_fold.csv`` has a prediction for every row.
"""

import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import hierarchical_clinicalbert  # noqa: F401 - before bitsandbytes, see there

# isort: split
import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

import train
from hierarchical_clinicalbert.data.arguments import SHARE
from hierarchical_clinicalbert.data.sources import read_sources
from hierarchical_clinicalbert.data.splits import split_rows
from hierarchical_clinicalbert.errors import ArgumentParser, InputError, as_input_error, run_command
from hierarchical_clinicalbert.reading.columns import text_hash
from hierarchical_clinicalbert.training.arguments import parse
from hierarchical_clinicalbert.training.model import build_model
from hierarchical_clinicalbert.training.trainer import HierarchicalTrainer

SHOWN = ("accuracy", "micro_f1", "macro_f1", "hierarchical_f1", "log_loss", "ece")


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="cross_validate.py", description=__doc__.splitlines()[0])
    parser.add_argument("--folds", type=int, default=5, help="Number of models.")
    parser.add_argument(
        "words", nargs="+", metavar="RECIPE", help="After --, the command line of train.py."
    )
    given = parser.parse_args(argv)
    model, data, args = parse(given.words)
    train.set_up_logging(True)
    source = read_sources(data)
    if {*source.rows["split"]} != {"train"}:
        raise InputError("give one source of rows: --data_path, or --train_file alone")
    groups = np.array([text_hash(text) for text in source.rows["text"]])
    strata = np.array([str(labels[:1]) for labels in source.rows["labels"]])

    # ── One model a fold ──────────────────────────────────────────────────────────────────────────
    scores = []
    tables = []
    folds = StratifiedGroupKFold(given.folds, shuffle=True, random_state=args.seed)
    with as_input_error("cannot split the rows"):
        parts = [*folds.split(groups, strata, groups)]
    for number, (_, held_out) in enumerate(parts):
        split = np.full(len(groups), "train", dtype=object)
        split[held_out] = "test"
        rows = source.rows.assign(split=split)
        rows = dataclasses.replace(source, rows=rows, shares={"validation": SHARE})
        labelled = split_rows(rows, data, None, args.seed)
        output = Path(args.output_dir) / f"fold-{number + 1}"
        settings = dataclasses.replace(args, output_dir=str(output))
        built = build_model(model, labelled.taxonomy, args.seed, labelled.problem_type)
        trainer = HierarchicalTrainer(built, settings, data=labelled, max_length=data.max_length)
        trainer.train()
        scores.append({name: trainer.scores.get(f"test_{name}") for name in SHOWN})
        tables.append(pd.read_csv(output / "test_predictions.csv", keep_default_na=False))

    # ── Results ───────────────────────────────────────────────────────────────────────────────────
    table = pd.DataFrame(scores).dropna(axis="columns", how="all").agg(["mean", "std"]).T
    print(table.to_string(float_format="%.4f"))
    file = Path(args.output_dir) / "out_of_fold.csv"
    pd.concat(tables).sort_values("row").to_csv(file, index=False)
    print(f"a prediction for every row is in {file}")


if __name__ == "__main__":
    run_command("cross_validate.py", main, train.ADVICE)
