"""Compare weights of the class name in a prototype (`training.prototypes`), counted in texts, in ten minutes:

    python benchmarks/studies/prototypes.py --data FOLDER --encoder ENCODER

FOLDER holds OHSUMED's ``train.csv`` and ``labels.csv``; the test file is not read. The encoder is frozen, and nothing is trained.
Each of `DRAWS` draws has the given number of rows of each class, and is scored on `SCORED` other rows.

Supports docs/experiments.md, "2026-11-28: Prototypes as initial head weights".
"""

import argparse

import numpy as np
import pandas as pd
from classifiers import directions_of, encode, standardised
from label_names import DESCRIPTIONS
from sklearn.metrics import accuracy_score, f1_score

ROWS, WEIGHTS = (1, 4, 16), (0, 1, 2, 4, 8, 16)
DRAWS, SCORED = 8, 1500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--encoder", required=True)
    arguments = parser.parse_args()
    rows = pd.read_csv(f"{arguments.data}/train.csv", dtype=str)
    classes = pd.read_csv(f"{arguments.data}/labels.csv", dtype=str).merge(pd.read_csv(DESCRIPTIONS, dtype=str))
    labels = rows["label"].map({label: i for i, label in enumerate(classes["label"])}).to_numpy()
    names = {"names": classes["name"], "names and descriptions": classes["name"] + ": " + classes["description"]}
    vectors = encode(arguments.encoder, list(rows["text"]))["mean"]
    print(
        "| rows per class | weight of the name | " + " | ".join(f"{kind}: accuracy | macro-F1" for kind in names) + " |"
    )
    print("| ---: | ---: |" + " ---: | ---: |" * len(names))
    directions = [directions_of(encode(arguments.encoder, list(texts))["mean"]) for texts in names.values()]
    for count in ROWS:
        draws = [draw(count, labels, seed) for seed in range(DRAWS)]
        for weight in WEIGHTS:
            means = [np.mean([score(vectors, labels, *rows, weight * u) for rows in draws], 0) for u in directions]
            cells = " | ".join(f"{100 * value:.1f}" for scores in means for value in scores)
            print(f"| {count} | {weight} | {cells} |", flush=True)


def draw(count: int, labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ``count`` rows of each class, or all rows of a class that has fewer, and rows to score."""
    shuffled = pd.Series(labels).sample(frac=1, random_state=seed)
    known = shuffled.groupby(shuffled).head(count).index.to_numpy()
    return known, shuffled.index.difference(known, sort=False).to_numpy()[:SCORED]


def score(
    vectors: np.ndarray, labels: np.ndarray, known: np.ndarray, unseen: np.ndarray, named: np.ndarray
) -> tuple[float, float]:
    """Return accuracy and macro-F1 on the unseen rows, by prototypes.

    Args:
        named: weighted directions of the class names, (num_classes, hidden_size), which are added to the known rows' vectors.
    """
    _, offsets = standardised(vectors[known], vectors)
    sums = named + [offsets[known[labels[known] == label]].sum(0) for label in range(len(named))]
    predictions = (offsets[unseen] @ (sums / np.linalg.norm(sums, axis=1, keepdims=True)).T).argmax(1)
    return accuracy_score(labels[unseen], predictions), f1_score(labels[unseen], predictions, average="macro")


if __name__ == "__main__":
    main()
