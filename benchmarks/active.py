"""Simulate active learning: label the least certain texts next, or random ones:

    python benchmarks/active.py --data FOLDER --encoder ENCODER [--vectors FILE.npz]

FOLDER holds OHSUMED's ``train.csv`` and ``test.csv``. The training file is a pool whose labels are hidden. A run starts with 250
random rows. Each round fits a classifier on the labelled rows, scores it on the test file, and labels 250 more rows of the pool:

- random: random rows;
- entropy: the rows with the greatest entropy of the leaf, which is the ``uncertainty`` of ``predict.py``;
- margin: the rows whose two most probable leaves are closest (Scheffer et al., 2001, "Active hidden Markov models").

The classifier is a softmax regression over mean vectors of the frozen encoder (`linear`), always with the same
regularisation. Texts are truncated at 128 tokens. ``--vectors`` is a file that caches the vectors. Three seeds draw the first
rows; the table has the mean and the standard deviation of macro-F1.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from harness import flag_parser, print_table, write_results
from scipy.stats import entropy
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

FIRST, BATCH, LAST = 250, 250, 2000
STRENGTH = 1e-4
TOKENS = 128  # of each text, so that the study takes minutes
SEEDS = (1, 2, 3)
METHODS = ("random", "entropy", "margin")


def main() -> None:
    parser = flag_parser(__doc__, "active.json")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--vectors", type=Path)
    parser.add_argument("--method", nargs="+", choices=METHODS, default=[*METHODS])
    arguments = parser.parse_args()
    splits = {split: pd.read_csv(arguments.data / f"{split}.csv", dtype=str) for split in ("train", "test")}
    classes = sorted(splits["train"]["label"].unique())
    labels = {split: part["label"].map(classes.index).to_numpy() for split, part in splits.items()}
    vectors = read_vectors(arguments, splits)
    runs = [
        {"method": method, "seed": seed, **scores}
        for method in arguments.method
        for seed in SEEDS
        for scores in simulate(method, seed, vectors, labels, len(classes))
    ]
    write_results(arguments.output, runs)
    table = pd.DataFrame(runs).pivot_table(index="labels", columns=["method", "seed"], values="macro_f1")
    rows = []
    for number, scores in (100 * table).iterrows():
        cells = (f"{scores[method].mean():.1f} ± {scores[method].std():.1f}" for method in arguments.method)
        rows.append([f"{number:,}", *cells])
    print_table(["labels", *arguments.method], rows, left=0)


def read_vectors(arguments: argparse.Namespace, rows: dict[str, pd.DataFrame]) -> dict[str, np.ndarray]:
    """Read or compute the mean vectors of both files, each (num_rows, hidden_size)."""
    if arguments.vectors and arguments.vectors.exists():
        return dict(np.load(arguments.vectors))
    vectors = {split: encode(arguments.encoder, list(part["text"]), TOKENS) for split, part in rows.items()}
    if arguments.vectors:
        np.savez(arguments.vectors, **vectors)
    return vectors


def encode(encoder: str, texts: list[str], max_length: int) -> np.ndarray:
    """Return the mean vectors of texts, (len(texts), hidden_size)."""
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts: list[Tensor] = []
    for start in range(0, len(texts), 16):
        some_texts = [texts[i] for i in order[start : start + 16]]
        batch = tokenizer(some_texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        parts.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(parts).numpy()[np.argsort(order)]


def standardised(known: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Subtract the mean of the known vectors from both arrays, and divide by the RMS distance of known vectors to their mean."""
    mean = known.mean(0)
    scale = np.sqrt(((known - mean) ** 2).sum(1).mean())
    return (known - mean) / scale, (others - mean) / scale


def linear(initial: np.ndarray, strength: float) -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Return a softmax regression with weights regularised towards ``initial``, (num_classes, hidden_size)."""

    def fit(known: np.ndarray, labels: np.ndarray, unseen: np.ndarray) -> np.ndarray:
        start, inputs, targets = torch.tensor(initial), torch.tensor(known), torch.tensor(labels)
        weight, bias = start.clone().requires_grad_(), torch.zeros(len(initial), requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = torch.nn.functional.cross_entropy(inputs @ weight.T + bias, targets)
            value = value + strength * ((weight - start) ** 2).sum()
            value.backward()
            return value

        optimizer.step(loss)
        with torch.inference_mode():
            return (torch.tensor(unseen) @ weight.T + bias).double().softmax(-1).numpy()

    return fit


def simulate(
    method: str, seed: int, vectors: dict[str, np.ndarray], labels: dict[str, np.ndarray], num_classes: int
) -> list[dict[str, float]]:
    """Run one simulation, and return the scores after each round."""
    generator, pool = np.random.default_rng(seed), len(labels["train"])
    labelled, scores = generator.permutation(pool)[:FIRST], []
    while True:
        others = np.setdiff1d(np.arange(pool), labelled)
        unseen = np.concatenate([vectors["test"], vectors["train"][others]])
        known, unseen = standardised(vectors["train"][labelled], unseen)
        start = np.zeros((num_classes, known.shape[1]), dtype=np.float32)
        fit = linear(start, STRENGTH)
        probabilities = fit(known, labels["train"][labelled], unseen)
        test, rest = np.split(probabilities, [len(vectors["test"])])
        macro_f1 = f1_score(labels["test"], test.argmax(1), average="macro", zero_division=0)
        accuracy = accuracy_score(labels["test"], test.argmax(1))
        scores.append({"labels": len(labelled), "macro_f1": macro_f1, "accuracy": accuracy})
        print(method, seed, scores[-1], flush=True)
        if len(labelled) == LAST:
            return scores
        best_two = np.sort(rest, axis=1)[:, -2:]
        order = {
            "random": generator.random(len(others)),
            "entropy": -entropy(rest, axis=1),
            "margin": best_two[:, 1] - best_two[:, 0],
        }[method]
        labelled = np.concatenate([labelled, others[order.argsort()[:BATCH]]])


if __name__ == "__main__":
    main()
