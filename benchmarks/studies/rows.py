"""Measure the cost of held-out rows, in a minute: ``python benchmarks/studies/rows.py --data FOLDER``.

FOLDER holds OHSUMED's ``train.csv`` and ``test.csv``. A linear SVM with C = 1 is trained on a share of the training rows,
drawn `DRAWS` times, and scored on the test rows. ``train.py`` holds out 10 % for early stopping, calibration and the guarantee,
which need rows that the model was not trained on. So its scores should be compared with scores of models trained on 90 %. This
study selects no setting.

Supports docs/experiments.md, "2026-11-26: What held-out rows cost".
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from multi_label_peers import TFIDF
from quality import spread

SHARES = (0.5, 0.8, 0.9, 0.95, 1.0)
DRAWS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "studies" / "results" / "rows.json")
    arguments = parser.parse_args()
    known, unseen = (pd.read_csv(arguments.data / f"{split}.csv", dtype=str) for split in ("train", "test"))
    results = []
    print("| share of the training rows | rows | accuracy | macro-F1 |\n| ---: | ---: | ---: | ---: |")
    for share in SHARES:
        scores = np.array([score(known.iloc[drawn], unseen) for drawn in draws(known["label"], share)])
        rows = round(share * len(known))
        results.append({"share": share, "rows": rows, "accuracy": [*scores[:, 0]], "macro_f1": [*scores[:, 1]]})
        cells = (spread(pd.Series(column), "accuracy") for column in scores.T)
        print(f"| {share:.0%} | {rows:,} | {' | '.join(cells)} |", flush=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def draws(labels: pd.Series, share: float) -> list[np.ndarray]:
    """Return the rows of each draw, stratified by class."""
    if share == 1:
        return [np.arange(len(labels))]
    splitter = StratifiedShuffleSplit(DRAWS, train_size=share, random_state=0)
    return [drawn for drawn, _ in splitter.split(labels, labels)]


def score(known: pd.DataFrame, unseen: pd.DataFrame) -> tuple[float, float]:
    model = make_pipeline(TfidfVectorizer(**TFIDF), LinearSVC(random_state=0))
    predictions = model.fit(known["text"], known["label"]).predict(unseen["text"])
    return accuracy_score(unseen["label"], predictions), f1_score(unseen["label"], predictions, average="macro")


if __name__ == "__main__":
    main()
