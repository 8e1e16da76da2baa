"""Compare models that are trained on few rows of OHSUMED or CLINC150:

    pip install setfit
    python benchmarks/few_rows.py --data FOLDER --encoder ENCODER [--task ohsumed --rows 4 --model
    setfit --seed 1 …]

FOLDER is as for ``quality.py``, with ``clinc150/{train,test}.csv``. Each seed draws ``--rows``
training rows of each class, or all rows of a class that has fewer, and for OHSUMED `TEST` test
rows. All models get the same rows, and no validation rows.

- names: ``recipes/few_rows.yaml`` over a full-precision encoder. From `MANY` rows on, it has 5
  epochs and a learning rate of 6e-4, with 1 row per class 5 epochs, and on CLINC150 no contrastive
  steps;
- descriptions: the same with the class descriptions of ``descriptions.csv``;
- flat-lora: a rank-16 adapter under one softmax over the leaves, initialised at random, with a
  learning rate of 6e-4, for 120 steps, or 5 epochs from 16 rows a class on;
- setfit: SetFit as in ``quality.py``, with 100 steps of 16 pairs, or with 10 rows per class 500.

Settings were chosen with one draw of OHSUMED, scored on 800 other training rows, and three of
CLINC150, scored on its validation queries. Finished runs stay in the output file, so an interrupted
benchmark continues.
"""

import argparse
import time
from itertools import product
from pathlib import Path

import harness
import pandas as pd
from quality import Task, setfit
from sklearn.metrics import accuracy_score, f1_score

ROWS = {"ohsumed": (1, 4, 16, 64), "clinc150": (5, 10)}  # by task, of each class
# test rows of OHSUMED; training rows
TEST = 1000
MANY = 300
DESCRIPTIONS = harness.ROOT / "benchmarks" / "descriptions.csv"
FLAT = {
    "lora_r": 16,
    "lora_alpha": 32,
    "heads_init": "random",
    "contrastive_steps": 0,
    "learning_rate": "6e-4",
}
MODELS = ("setfit", "flat-lora", "names", "descriptions")
SHOWN = ("accuracy", "macro_f1", "log_loss")


class FewRows(Task):
    """A draw of a task's rows."""

    def __init__(self, name: str, rows: int, data: Path, seed: int, runs: Path):
        super().__init__(name, data, seed, "few_rows")
        self.rows_per_class = rows
        train, test = (pd.read_csv(self.files[split], dtype=str) for split in ("train", "test"))
        train = train.sample(frac=1, random_state=seed).groupby("label").head(rows)
        self.files = {
            split: runs / f"{name}-{split}-{rows}-{seed}.csv" for split in ("train", "test")
        }
        train.to_csv(self.files["train"], index=False)
        (test.sample(TEST, random_state=seed) if name == "ohsumed" else test).to_csv(
            self.files["test"], index=False
        )


def main() -> None:
    parser = harness.flag_parser(__doc__, "few_rows.json", "data", "encoder", "runs")
    parser.add_argument("--task", choices=ROWS, nargs="+", default=[*ROWS])
    parser.add_argument(
        "--rows", type=int, nargs="+", help="rows of each class, by default those of `ROWS`"
    )
    parser.add_argument("--model", choices=MODELS, nargs="+", default=MODELS)
    parser.add_argument("--seed", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    draws = [(task, rows) for task in arguments.task for rows in arguments.rows or ROWS[task]]
    for seed, (name, rows), model in product(arguments.seed, draws, arguments.model):
        key = {"task": name, "rows": rows, "model": model, "seed": seed}
        is_done = any(
            key.items() <= one.items() for one in harness.read_results(arguments.output, [])
        )
        if is_done or (name, model) == ("clinc150", "descriptions"):  # its intents have names alone
            continue
        task = FewRows(name, rows, arguments.data, seed, arguments.runs)
        started = time.time()
        scores = (setfit_scores if model == "setfit" else checkpoint_scores)(task, model, arguments)
        run = {**key, **scores, "minutes": (time.time() - started) / 60}
        results = [*harness.read_results(arguments.output, []), run]
        results.sort(
            key=lambda run: (
                [*ROWS].index(run["task"]),
                run["rows"],
                MODELS.index(run["model"]),
                run["seed"],
            )
        )
        harness.write_results(arguments.output, results)
    runs = pd.DataFrame(harness.read_results(arguments.output, [])).groupby(
        ["task", "rows", "model"], sort=False
    )
    table = (
        [*key, len(some), *(harness.spread(some[name], name) for name in SHOWN)]
        for key, some in runs
    )
    harness.print_table(
        ("task", "rows per class", "model", "seeds", "accuracy", "macro-F1", "log loss"),
        table,
        left=3,
    )


def setfit_scores(task: FewRows, model: str, arguments: argparse.Namespace) -> dict[str, float]:
    labels, predictions = setfit(task, arguments.encoder, 500 if task.rows_per_class == 10 else 100)
    return {
        "accuracy": accuracy_score(labels, predictions),
        "macro_f1": f1_score(labels, predictions, average="macro"),
    }


def checkpoint_scores(task: FewRows, model: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Train with ``train.py``, and return its scores on the test rows."""
    few = task.rows_per_class * task.tree.num_leaves < MANY
    flat = model == "flat-lora"
    flags = {"model_name_or_path": arguments.encoder, "quantization": "none", "seed": task.seed}
    flags |= task.flags(arguments.runs, flat) | ({} if few else {"learning_rate": "6e-4"})
    flags |= {} if task.rows_per_class == 4 else {"num_train_epochs": 5}
    flags |= {"contrastive_steps": 0} if task.name == "clinc150" else {}
    if flat:
        flags |= FLAT | ({"max_steps": 120} if few else {})
    if model == "descriptions":
        flags["taxonomy"] = arguments.runs / "descriptions.csv"
        described = pd.read_csv(task.labels, dtype=str).merge(pd.read_csv(DESCRIPTIONS, dtype=str))
        described.to_csv(flags["taxonomy"], index=False)
    folder = arguments.runs / f"{task.name}-{model}-{task.rows_per_class}-{task.seed}"
    metrics = harness.train(folder, harness.ROOT / "recipes" / "few_rows.yaml", **flags)
    return {name: metrics[f"test_{name}"] for name in SHOWN}


if __name__ == "__main__":
    main()
