"""How the lexical head should weigh tokens: ``python benchmarks/words.py --data FOLDER --encoder ENCODER``.

FOLDER holds OHSUMED's ``train.csv``; of the encoder only the tokenizer is used. Two classifiers over the bag of tokens, without
an encoder beside them, are scored by three-fold cross-validation on the training file:

- tf-idf: logistic regression over TF-IDF, by scikit-learn alone;
- lexical head: `training.lexical`, whose tokens also count by how unlike the classes use them.

The log loss is that of probabilities with the temperature that is best for each fold.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset
from scipy.special import log_softmax
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configuration_hierarchical import Taxonomy
from training.calibration import best_temperature
from training.lexical import LexicalClassifier, token_counts

PENALTIES = (20, 50, 100)  # C of scikit-learn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", required=True)
    arguments = parser.parse_args()
    rows = pd.read_csv(arguments.data / "train.csv", dtype=str)
    names, labels = np.unique(rows["label"], return_inverse=True)
    tokenizer = AutoTokenizer.from_pretrained(arguments.encoder)
    ids = tokenizer(list(rows["text"]), truncation=True, max_length=512)["input_ids"]
    counts = token_counts(Dataset.from_dict({"input_ids": ids}), len(tokenizer))
    tree = Taxonomy(names.tolist())

    def lexical_head(penalty: float, known: np.ndarray, unknown: np.ndarray) -> np.ndarray:
        return LexicalClassifier(tree, counts[known], labels[known], penalty).scores(counts[unknown])

    def tf_idf(penalty: float, known: np.ndarray, unknown: np.ndarray) -> np.ndarray:
        common = np.asarray((counts[known] > 0).sum(axis=0)).ravel() >= 2
        weighed = TfidfTransformer(sublinear_tf=True)
        model = make_pipeline(weighed, LogisticRegression(C=penalty, max_iter=1000, tol=1e-3))
        return model.fit(counts[known][:, common], labels[known]).decision_function(counts[unknown][:, common])

    print("| classifier | C | accuracy | macro-F1 | log loss |\n| --- | ---: | ---: | ---: | ---: |")
    for title, scorer in (("tf-idf", tf_idf), ("lexical head", lexical_head)):
        for penalty in PENALTIES:
            found = np.empty((len(labels), len(names)))
            for known, unknown in StratifiedKFold(3, shuffle=True, random_state=0).split(labels, labels):
                scores = scorer(penalty, known, unknown)
                found[unknown] = log_softmax(scores / best_temperature([(scores, labels[unknown])]), axis=1)
            answers = found.argmax(axis=1)
            accuracy, f1 = accuracy_score(labels, answers), f1_score(labels, answers, average="macro")
            loss = -found[np.arange(len(labels)), labels].mean()
            print(f"| {title} | {penalty} | {100 * accuracy:.1f} | {100 * f1:.1f} | {loss:.3f} |")


if __name__ == "__main__":
    main()
