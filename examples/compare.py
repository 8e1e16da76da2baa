"""Compare two models on the same rows: ``python examples/compare.py results/old results/new``.

Each folder is the ``--output_dir`` of a run that scored the rows: of training, or of
``train.py --do_train false``. Printed are the scores, the difference with a 95 % interval by a
paired bootstrap over texts, and for the share of correct rows the exact test of McNemar (1947).
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pandas as pd
from scipy.stats import binomtest
from sklearn.metrics import f1_score
from sklearn.preprocessing import MultiLabelBinarizer

from hierarchical_clinicalbert.errors import ArgumentParser, InputError, run_command

RESAMPLES = 1000


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="compare.py", description=__doc__.splitlines()[0])
    parser.add_argument("first", type=Path, help="Folder with the scores of a model.")
    parser.add_argument("second", type=Path, help="Folder with those of another one.")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    given = parser.parse_args(argv)
    tables = [
        read_table(folder / f"{given.split}_predictions.csv")
        for folder in (given.first, given.second)
    ]
    first, second = tables
    if not first[["text_id", "label"]].equals(second[["text_id", "label"]]):
        raise InputError(f"{given.first} and {given.second} have scores of other rows or labels")

    # ── Scores of each model, and of resampled texts ──────────────────────────────────────────────
    names = MultiLabelBinarizer().fit(
        [*first["label"], *first["prediction"], *second["prediction"]]
    )
    true = names.transform(first["label"])
    predicted = [names.transform(table["prediction"]) for table in tables]
    rows_of = [*first.groupby("text_id").indices.values()]
    draw = np.random.default_rng(0)
    samples = [
        np.concatenate([rows_of[text] for text in draw.integers(len(rows_of), size=len(rows_of))])
        for _ in range(RESAMPLES)
    ]

    def scores_of(average: str, rows: np.ndarray) -> list[float]:
        known = true[rows].any(axis=0)
        return [
            f1_score(true[rows][:, known], p[rows][:, known], average=average, zero_division=0)
            for p in predicted
        ]

    for average in ("micro", "macro"):
        one, other = scores_of(average, np.arange(len(first)))
        gains = [np.diff(scores_of(average, rows)).item() for rows in samples]
        low, high = np.quantile(gains, [0.025, 0.975])
        shown = f"{one:.1%}, {other:.1%}: {other - one:+.1%}, between {low:+.1%} and {high:+.1%}"
        print(f"{average}-F1 {shown}")

    # ── McNemar's test: of the rows that one model alone has right ────────────────────────────────
    only_first = int((first["correct"] & ~second["correct"]).sum())
    only_second = int((second["correct"] & ~first["correct"]).sum())
    p_value = 1.0
    if only_first + only_second:
        p_value = binomtest(only_first, only_first + only_second).pvalue
    alone = f"by the first model alone {only_first} rows, by the second alone {only_second}"
    print(f"right {alone}: p {p_value:.3g}")


def read_table(file: Path) -> pd.DataFrame:
    """Read predictions, with lists of labels, in the order of the rows."""
    if not file.is_file():
        raise InputError(f"there is no {file}: score the rows with train.py --do_train false")
    table = pd.read_csv(file, dtype=str, keep_default_na=False).set_index("row").sort_index()
    for column in ("label", "prediction"):
        table[column] = [
            json.loads(cell) if cell.startswith("[") else [*filter(None, cell.split("; "))]
            for cell in table[column]
        ]
    table["correct"] = table["correct"].isin(["1", "True", "true"])
    return table


if __name__ == "__main__":
    run_command("compare.py", main, {})
