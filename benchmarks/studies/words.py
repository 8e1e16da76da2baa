"""Compare token weights of the lexical head, and ways to add its scores to the encoder's:

    python benchmarks/studies/words.py --data FOLDER --encoder ENCODER [--runs RUNS]

FOLDER holds OHSUMED's ``train.csv`` and ``labels.csv``; only the tokenizer of the encoder is used. Two classifiers over the bag of
tokens, without an encoder, are scored by three-fold cross-validation on the training file:

- tf-idf: logistic regression over TF-IDF, by scikit-learn alone, at three strengths of its penalty;
- lexical head: `evaluation.lexical`, which also scales tokens by how differently the classes use them;
- lexical head, with pairs: the same, with pairs of neighbouring tokens, hashed into `PAIRS` columns.

The log loss is for probabilities with the best temperature of each fold.

With RUNS, the folder that ``ablation.py --task ohsumed --variant recipe --fold 0`` wrote, a second table adds the head to the
encoder of that run. The rows are the third of the training file on which the run was not trained. In each of 40 draws, weight and
temperatures are fitted on 336 rows, as many as the recipe has for validation. The other rows are scored:

- the encoder alone;
- added to the leaves: one weight and one temperature, as in a flat taxonomy;
- in each decision: as in the model.

Supports docs/experiments.md, "2026-11-26: Lexical head".
"""

import argparse
import json
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset
from scipy.sparse import csr_matrix, hstack
from scipy.special import log_softmax
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from transformers import AutoModel, AutoTokenizer, EvalPrediction

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from calibration import leaf_scores

from evaluation.calibration import fit_calibration, fit_decision
from evaluation.lexical import LexicalClassifier, token_counts
from evaluation.metrics import build_compute_metrics
from taxonomy_hierarchical import Taxonomy
from training.arguments import DataArguments
from training.splits import load_splits

DRAWS = 40
VALIDATION_ROWS = 336
PAIRS = 2**18


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "studies" / "results" / "words.json")
    arguments = parser.parse_args()
    rows = pd.read_csv(arguments.data / "train.csv", dtype=str)
    names, labels = np.unique(rows["label"], return_inverse=True)
    tokenizer = AutoTokenizer.from_pretrained(arguments.encoder)
    ids = tokenizer(list(rows["text"]), truncation=True, max_length=512)["input_ids"]
    counts = token_counts(Dataset.from_dict({"input_ids": ids}), len(tokenizer))
    pairs = [[(first * 1_000_003 + second * 7919) % PAIRS for first, second in pairwise(row)] for row in ids]
    with_pairs = hstack([counts, token_counts(Dataset.from_dict({"input_ids": pairs}), PAIRS)]).tocsr()
    flat = Taxonomy(names.tolist())

    def lexical_head(counts: csr_matrix, known: np.ndarray, unknown: np.ndarray) -> np.ndarray:
        return LexicalClassifier(flat, counts[known], labels[known]).scores(counts[unknown])

    def tf_idf(penalty: float, known: np.ndarray, unknown: np.ndarray) -> np.ndarray:
        common = np.asarray((counts[known] > 0).sum(axis=0)).ravel() >= 2
        weighed = TfidfTransformer(sublinear_tf=True)
        model = make_pipeline(weighed, LogisticRegression(C=penalty, max_iter=1000, tol=1e-3))
        return model.fit(counts[known][:, common], labels[known]).decision_function(counts[unknown][:, common])

    scorers = {f"tf-idf, C {penalty}": partial(tf_idf, penalty) for penalty in (20, 50, 100)}
    alone = {}
    print("| classifier | accuracy | macro-F1 | log loss |\n| --- | ---: | ---: | ---: |")
    scorers["lexical head"] = partial(lexical_head, counts)
    scorers["lexical head, with pairs"] = partial(lexical_head, with_pairs)
    for title, scorer in scorers.items():
        logits = np.empty((len(labels), len(names)))
        for known, unknown in StratifiedKFold(3, shuffle=True, random_state=0).split(labels, labels):
            scores = scorer(known, unknown)
            logits[unknown] = log_softmax(scores * fit_decision(scores, labels[unknown], np.inf, 0)[0], axis=1)
        predictions = logits.argmax(axis=1)
        accuracy, f1 = accuracy_score(labels, predictions), f1_score(labels, predictions, average="macro")
        loss = -logits[np.arange(len(labels)), labels].mean()
        alone[title] = {"accuracy": accuracy, "macro_f1": f1, "log_loss": float(loss)}
        print(f"| {title} | {100 * accuracy:.1f} | {100 * f1:.1f} | {loss:.3f} |")
    tables = {"alone": alone}
    if arguments.runs is not None:
        tables["beside_an_encoder"] = beside_an_encoder(arguments.data, arguments.runs)
    arguments.output.write_text(json.dumps(tables, indent=2) + "\n", encoding="utf-8")


def beside_an_encoder(data: Path, runs: Path) -> dict[str, dict[str, float]]:
    """Measure and print the second table."""
    files = DataArguments(
        train_file=str(runs / "fold-0" / "train.csv"),
        test_file=str(runs / "fold-0" / "test.csv"),
        class_names=str(data / "labels.csv"),
        taxonomy=str(data / "labels.csv"),
    )
    loaded = load_splits(files, seed=1)
    tree, unseen = loaded.taxonomy, loaded.splits["test"]
    flat = Taxonomy(tree.labels[: tree.num_leaves])
    model = AutoModel.from_pretrained(runs / "ohsumed-recipe-0", trust_remote_code=True).eval()
    logits, words = leaf_scores(model, runs / "ohsumed-recipe-0", list(unseen["text"]))
    labels, generator = np.array(unseen["label"]), np.random.default_rng(0)
    forms = {
        "the encoder alone": (tree, None),
        "added to the leaves": (flat, words),
        "in each decision": (tree, words),
    }
    scores: dict[str, list[list[float]]] = {title: [] for title in forms}
    shown = ("accuracy", "level_1_accuracy", "hierarchical_f1", "macro_f1", "log_loss")
    for _ in range(DRAWS):
        rows = generator.permutation(len(labels))
        known, rest = rows[:VALIDATION_ROWS], rows[VALIDATION_ROWS:]
        for title, (taxonomy, lexical) in forms.items():
            calibration = fit_calibration(
                taxonomy, logits[known], None if lexical is None else lexical[known], labels[known], bias_prior=0
            )
            calibrated = calibration.apply(taxonomy, logits[rest], None if lexical is None else lexical[rest])
            measured = build_compute_metrics(tree)(EvalPrediction(predictions=calibrated, label_ids=labels[rest]))
            scores[title].append([measured[name] for name in shown])
    print("\n| the head | " + " | ".join(shown).replace("_", " ") + " |\n| --- |" + " ---: |" * len(shown))
    means = {title: np.mean(values, axis=0) for title, values in scores.items()}
    for title, values in means.items():
        print(f"| {title} | " + " | ".join(f"{100 * value:.1f}" for value in values[:-1]) + f" | {values[-1]:.3f} |")
    return {title: dict(zip(shown, values.tolist(), strict=True)) for title, values in means.items()}


if __name__ == "__main__":
    main()
