"""Compare classifiers over frozen vectors, in ten minutes:

    python benchmarks/studies/classifiers.py --data FOLDER --encoder ENCODER

FOLDER holds OHSUMED's ``train.csv`` and ``labels.csv``; the test file is not read. The encoder is frozen. So the study shows the
effect of pooling, of a hidden layer, and of initial weights from class names, before any fine-tuning. Scores are cross-validated
in `FOLDS` folds. Each classifier has the strength of regularisation with its lowest log loss. Weights that are initialised from
class names are regularised towards their initial values instead of zero (the mean of a Gaussian prior).

Supports docs/experiments.md, "2026-11-27: Class names as initial head weights".
"""

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import accuracy_score, f1_score, log_loss
from sklearn.model_selection import StratifiedKFold
from sklearn.neural_network import MLPClassifier
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
FOLDS = 3
STRENGTHS = (1e-5, 3e-5, 1e-4, 3e-4)  # weight of the squared distance of all weights, added to the mean loss
ALPHAS = (0.03, 0.1, 0.3, 1.0)
NAMES_NORM = (2.0, 4.0, 8.0)

Classifier = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "studies" / "results" / "classifiers.json")
    arguments = parser.parse_args()
    rows = pd.read_csv(arguments.data / "train.csv", dtype=str)
    classes = pd.read_csv(arguments.data / "labels.csv", dtype=str)
    labels = rows["label"].map({label: i for i, label in enumerate(classes["label"])}).to_numpy()
    vectors, names = (encode(arguments.encoder, list(texts)) for texts in (rows["text"], classes["name"]))
    results = []
    print("| vector | classifier | accuracy | macro-F1 | log loss |\n| --- | --- | ---: | ---: | ---: |")
    for pooling, classifier, tried in candidates(names):
        scores = [np.mean(cross_validated(one, vectors[pooling], labels), axis=0) for one in tried]
        accuracy, macro_f1, loss = min(scores, key=lambda score: score[2])
        results.append(
            {"pooling": pooling, "classifier": classifier, "accuracy": accuracy, "macro_f1": macro_f1, "log_loss": loss}
        )
        print(f"| {pooling} | {classifier} | {100 * accuracy:.1f} | {100 * macro_f1:.1f} | {loss:.3f} |", flush=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def candidates(names: dict[str, np.ndarray]) -> list[tuple[str, str, list[Classifier]]]:
    """Return each classifier as (pooling, its name, its models for every strength of regularisation)."""
    flat = [(pooling, "linear", [linear(0 * names[pooling], strength) for strength in STRENGTHS]) for pooling in names]
    around = directions_of(names["mean"])
    named = [linear(norm * around, strength) for norm in NAMES_NORM for strength in STRENGTHS]
    deep = [hidden_layer(alpha) for alpha in ALPHAS]
    return [*flat, ("mean", "linear, initialised from class names", named), ("mean", "one hidden layer", deep)]


def encode(encoder: str, texts: list[str], max_length: int = 512) -> dict[str, np.ndarray]:
    """Return vectors (len(texts), hidden_size) for each pooling."""
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts: dict[str, list[Tensor]] = {"mean": [], "first token": []}
    for start in range(0, len(texts), 16):
        some_texts = [texts[i] for i in order[start : start + 16]]
        batch = tokenizer(some_texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        parts["mean"].append((hidden * mask).sum(1) / mask.sum(1))
        parts["first token"].append(hidden[:, 0])
    return {pooling: torch.cat(vectors).numpy()[np.argsort(order)] for pooling, vectors in parts.items()}


def directions_of(vectors: np.ndarray) -> np.ndarray:
    """Return the unit vectors from the mean of all vectors to each vector."""
    offsets = vectors - vectors.mean(0)
    return offsets / np.linalg.norm(offsets, axis=1, keepdims=True)


def standardised(known: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Subtract the mean of the known vectors from both arrays, and divide by the RMS distance of known vectors to their mean."""
    mean = known.mean(0)
    scale = np.sqrt(((known - mean) ** 2).sum(1).mean())
    return (known - mean) / scale, (others - mean) / scale


def cross_validated(classifier: Classifier, vectors: np.ndarray, labels: np.ndarray) -> list[tuple[float, ...]]:
    """Return (accuracy, macro-F1, log loss) of each fold."""
    scores = []
    for known, unseen in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(vectors, labels):
        inputs, others = standardised(vectors[known], vectors[unseen])
        probs = classifier(inputs, labels[known], others)
        predictions = probs.argmax(1)
        macro_f1 = f1_score(labels[unseen], predictions, average="macro")
        loss = log_loss(labels[unseen], probs, labels=range(probs.shape[1]))
        scores.append((accuracy_score(labels[unseen], predictions), macro_f1, loss))
    return scores


def linear(initial: np.ndarray, strength: float) -> Classifier:
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


def hidden_layer(alpha: float) -> Classifier:
    """Return a classifier with one hidden layer as wide as the vectors."""

    def fit(known: np.ndarray, labels: np.ndarray, unseen: np.ndarray) -> np.ndarray:
        model = MLPClassifier(known.shape[1], alpha=alpha, max_iter=300, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the training loss is still falling at max_iter
            return model.fit(known, labels).predict_proba(unseen)

    return fit


if __name__ == "__main__":
    main()
