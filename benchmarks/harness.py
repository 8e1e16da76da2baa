"""What the benchmarks share: the import path, their flags, their files of results, and their tables."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import Pipeline, pipeline

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))


def flag_parser(description: str | None, results: str | None = None) -> argparse.ArgumentParser:
    """Return a parser with the description, and with ``--output`` if there is a file of results."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if results is not None:
        parser.add_argument("--output", type=Path, default=RESULTS / results)
    return parser


def read_results(output: Path, empty: Any) -> Any:
    """Return the results of earlier runs, or ``empty`` if there is no file."""
    return json.loads(output.read_text(encoding="utf-8")) if output.exists() else empty


def write_results(output: Path, results: Any) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def print_table(columns: Iterable[str], rows: Iterable[Iterable[Any]], left: int = 1) -> None:
    """Print a Markdown table, unless it is empty. All columns but the first ``left`` are aligned to the right."""
    columns, rows = list(columns), list(rows)
    if rows:
        print(f"\n| {' | '.join(columns)} |")
        print(f"|{' --- |' * left}{' ---: |' * (len(columns) - left)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def print_rows(rows: list[dict], columns: list[tuple[str, str]], left: int = 1) -> None:
    """Print results as a table. Each column has a name and a format with the names of fields, such as ``{accuracy:.1%}``."""
    cells = ([form.format_map(row) for _, form in columns] for row in rows)
    print_table((name for name, _ in columns), cells, left)


def load_classifier(model: str, **options: Any) -> Pipeline:
    """Load this project's pipeline of a checkpoint."""
    return pipeline("hierarchical-text-classification", model=model, trust_remote_code=True, **options)


def best_rate(multiply: Callable[[], Any], size: int, repeats: int) -> float:
    """Measure the FLOP/s of a product of two square matrices, as the best of several."""
    best = 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        multiply()
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def layer_flops(config: Any, tokens: int) -> tuple[int, int]:
    """Count the FLOPs, two for each multiply-add, of a BERT-like layer over a text: of its linear layers, and of attention."""
    h, f = config.hidden_size, config.intermediate_size
    return 2 * tokens * (4 * h * h + 2 * h * f), 4 * tokens * tokens * h


def processor() -> str:
    return torch.cpu.get_capabilities()["cpu_name"]
