"""What the benchmarks share: the import path, flags, files of results, tables, processes,
batches and intervals.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import Pipeline, PreTrainedTokenizerBase, pipeline

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

from decisions_hierarchical import build_decisions
from hierarchical_clinicalbert.data.arguments import DataArguments
from hierarchical_clinicalbert.data.sources import read_sources
from hierarchical_clinicalbert.data.splits import LabelledSplits, split_rows
from hierarchical_clinicalbert.evaluation.metrics import node_f1
from taxonomy_hierarchical import Taxonomy

TRAIN = ROOT / "train.py"
Rows = tuple[list[str], np.ndarray]  # texts, and the array of `Decisions.targets`
RESAMPLES = 1000  # of a bootstrap
PROBABILITIES = ("log_loss", "ece")  # ends of the names of scores that are no percentages


# ── Flags, results and tables ─────────────────────────────────────────────────────────────────────


def flag_parser(
    description: str | None, results: str | None = None, *shared: str
) -> argparse.ArgumentParser:
    """Return a parser with the description.

    Args:
        results: if given, ``--output`` is a flag, by default this file of `RESULTS`.
        shared: further flags: ``data`` and ``encoder``, which are required, and ``runs``, the
            folder of trained models.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if results is not None:
        parser.add_argument("--output", type=Path, default=RESULTS / results)
        runs = ROOT / "runs" / Path(results).stem
        flags: dict[str, dict[str, Any]] = {
            "data": {"type": Path, "required": True},
            "encoder": {"required": True},
            "runs": {
                "type": Path,
                "default": runs,
                "help": "folder of trained models; finished runs are not repeated",
            },
        }
        for name in shared:
            parser.add_argument(f"--{name}", **flags[name])
    return parser


def read_results(output: Path, empty: Any) -> Any:
    """Return the results of earlier runs, or ``empty`` if there is no file."""
    return json.loads(output.read_text(encoding="utf-8")) if output.exists() else empty


def write_results(output: Path, results: Any) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def print_table(columns: Iterable[str], rows: Iterable[Iterable[Any]], left: int = 1) -> None:
    """Print a Markdown table, unless it is empty.

    All columns but the first ``left`` are aligned to the right.
    """
    columns = list(columns)
    rows = list(rows)
    if rows:
        print(f"\n| {' | '.join(columns)} |")
        print(f"|{' --- |' * left}{' ---: |' * (len(columns) - left)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def print_rows(rows: list[dict], columns: list[tuple[str, str]], left: int = 1) -> None:
    """Print results as a table.

    Each column has a name and a format with the names of fields, such as ``{accuracy:.1%}``.
    """
    cells = ([form.format_map(row) for _, form in columns] for row in rows)
    print_table((name for name, _ in columns), cells, left)


def spread(values: pd.Series, name: str) -> str:
    """Format the mean of the score ``name`` and, if there are several values, its standard
    deviation.
    """
    if values.isna().all():
        return ""
    factor, digits = (1, 3) if name.endswith(PROBABILITIES) else (100, 1)
    deviation = f" ± {factor * values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{factor * values.mean():.{digits}f}{deviation}"


# ── Data ──────────────────────────────────────────────────────────────────────────────────────────


def load_splits(
    files: dict[str, Path], tree: Taxonomy | None, seed: int, **options: Any
) -> LabelledSplits:
    """Return the rows of each split's file as ``train.py`` splits them.

    ``options`` are further `DataArguments`.
    """
    arguments = DataArguments(
        **{f"{split}_file": str(file) for split, file in files.items()}, **options
    )
    return split_rows(read_sources(arguments), arguments, tree, seed)


def rows_of(data: LabelledSplits) -> dict[str, Rows]:
    """Return texts and labels of each split."""
    targets = build_decisions(data.taxonomy, data.problem_type).targets
    return {
        split: (list(rows["text"]), targets(rows["nodes"][:]).numpy())
        for split, rows in data.splits.items()
    }


# ── Processes, models and batches ─────────────────────────────────────────────────────────────────


def train(
    folder: Path, *words: Any, script: Iterable[Any] = (TRAIN,), **flags: Any
) -> dict[str, Any]:
    """Train in a process of its own unless the run is finished, and return its metrics. An
    unfinished run continues.

    Args:
        words: arguments of ``train.py``.
        script: another script that calls ``train.main``, and its own arguments.
        flags: further flags of ``train.py``, which come last.
    """
    metrics = folder / "metrics.json"
    if not metrics.exists():
        resumes = flags.get("num_train_epochs") != 0  # without steps, there is nothing to resume
        flags |= {"output_dir": folder} | ({"resume_from_checkpoint": "auto"} if resumes else {})
        words += tuple(word for name, value in flags.items() for word in (f"--{name}", value))
        subprocess.run([sys.executable, *map(str, (*script, *words))], check=True)
    return json.loads(metrics.read_text(encoding="utf-8"))


def read_predictions(folder: Path) -> pd.DataFrame:
    """Return the predictions of a run's test rows."""
    return pd.read_csv(folder / "test_predictions.csv", dtype=str, keep_default_na=False)


def run_alone(*words: Any, environment: dict[str, str] | None = None) -> Any:
    """Run Python in a process of its own, and return the JSON in the last line that it prints."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def load_classifier(model: str | Path, **options: Any) -> Pipeline:
    """Load this project's pipeline of a checkpoint."""
    return pipeline(
        "hierarchical-text-classification", model=str(model), trust_remote_code=True, **options
    )


def node_probabilities(classify: Pipeline, texts: list[str]) -> np.ndarray:
    """Return the probabilities of all nodes, (num_texts, num_nodes), by this project's pipeline."""
    tree = classify.tree
    nodes = np.zeros((len(texts), tree.num_nodes))
    for i, result in enumerate(classify(texts, levels=True)):
        for level in result["levels"]:
            for label, probability in level.items():
                nodes[i, tree.id(label)] = probability
    return nodes


def run_batches(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    size: int,
    run: Callable[[list[int], Any], Iterable[Tensor]],
    **options: Any,
) -> list[Tensor]:
    """Run a function over batches of texts of similar length. Return its outputs, in the order of
    the texts.

    Args:
        size: texts in a batch.
        run: takes the numbers of the texts and their padded inputs, and returns several outputs, a
            row for each text.
        options: further options of the tokenizer.
    """
    encoded = tokenizer(texts, truncation=True, **options)
    parts = []
    order = sorted(range(len(texts)), key=lambda i: len(encoded["input_ids"][i]))
    with torch.inference_mode():
        for start in range(0, len(order), size):
            numbers = order[start : start + size]
            rows = {name: [values[i] for i in numbers] for name, values in encoded.items()}
            parts.append([*run(numbers, tokenizer.pad(rows, return_tensors="pt"))])
    places = torch.tensor(order).argsort()
    return [torch.cat(outputs)[places] for outputs in zip(*parts, strict=True)]


# ── Intervals ─────────────────────────────────────────────────────────────────────────────────────


def mean_interval(values: np.ndarray) -> list[float]:
    """Return the mean over texts, and its 95 % bootstrap interval.

    NaN stands for a text that does not count.
    """
    values = values[~np.isnan(values)]
    means = values[
        np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    ].mean(1)
    return [float(values.mean()), *map(float, np.percentile(means, (2.5, 97.5)))]


def paired_intervals(
    own: list[np.ndarray], other: list[np.ndarray], labels: np.ndarray
) -> dict[str, tuple[float, float, float]]:
    """Return the differences of micro- and macro-F1 of two models, with 95 % bootstrap intervals
    over the same test texts.

    The resamples are shifted to have the difference as mean, as in
    `evaluation.metrics.bootstrap_intervals`.

    Args:
        own, other: the predicted nodes of each seed, (num_texts, num_nodes) bool. Scores are means
            over the seeds.

    Returns:
        The difference, and the lower and upper end.
    """
    generator = np.random.default_rng(0)
    texts = len(labels)
    draws = (generator.integers(texts, size=texts) for _ in range(RESAMPLES))
    # first, all texts once
    weights = np.stack([np.ones(texts), *(np.bincount(rows, minlength=texts) for rows in draws)])

    def f1(chosen: np.ndarray) -> np.ndarray:
        true = labels == 1
        counts = np.stack(
            [weights @ pairs.astype(float) for pairs in (true & chosen, chosen, true)]
        )
        return np.stack(
            [2 * counts[0].sum(1) / counts[1:].sum((0, 2)), np.nanmean(node_f1(counts), axis=1)]
        )

    differences = np.mean([f1(chosen) for chosen in own], axis=0) - np.mean(
        [f1(chosen) for chosen in other], axis=0
    )
    intervals = {}
    for name, (difference, *resampled) in zip(("micro_f1", "macro_f1"), differences, strict=True):
        shifted = np.array(resampled) + difference - np.mean(resampled)
        intervals[name] = (difference, *np.percentile(shifted, (2.5, 97.5)))
    return intervals


def processor() -> str:
    return torch.cpu.get_capabilities()["cpu_name"]
