"""List the rows of a file of texts and labels whose labels may be wrong, as CSV, the least probable
label first:

    pip install cleanlab
    python examples/label_issues.py train.csv > label_issues.csv

Worth knowing:

1. A logistic regression over TF-IDF, fitted on other texts, gives the probability of each label. No
   encoder is used.
2. Of these probabilities, cleanlab lists the rows, by confident learning (Northcutt, Jiang and
   Chuang, 2021, arXiv 1911.00068). Many of the listed labels are correct.
3. Rows of a class with fewer than `FOLDS` texts are neither listed nor used.
4. The list holds no texts.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configuration_hierarchical import SINGLE_LABEL
from hierarchical_clinicalbert.data.arguments import DataArguments
from hierarchical_clinicalbert.data.sources import read_sources
from hierarchical_clinicalbert.errors import ArgumentParser, InputError, print_result
from hierarchical_clinicalbert.reading.columns import text_hash

FOLDS = 5  # of cross-validation


def main() -> str:
    """Return the list as CSV."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help="like --train_file of train.py, with one label a row")
    parser.add_argument("--encoding", help="as for train.py")
    parser.add_argument("--text_column", help="as for train.py")
    parser.add_argument("--label_column", nargs="+", help="as for train.py")
    arguments = parser.parse_args()
    if importlib.util.find_spec("cleanlab") is None:
        raise InputError("this list needs cleanlab: pip install cleanlab")
    flags = {name: value for name, value in vars(arguments).items() if name != "file"}
    rows = read_sources(
        DataArguments(train_file=arguments.file, problem_type=SINGLE_LABEL, **flags)
    ).rows
    labels = ["/".join([label] if isinstance(label, str) else label) for (label,) in rows["labels"]]
    issues = list_issues(rows.assign(label=labels, text_id=rows["text"].map(text_hash)))
    return issues.to_csv(index=False, float_format="%.6f")


def list_issues(rows: pd.DataFrame) -> pd.DataFrame:
    """List the rows, given with columns row, text, text_id and label.

    Their score is the probability of the label.
    """
    from cleanlab.filter import find_label_issues  # imported here: it takes a second

    num_texts = rows.groupby("label")["text_id"].transform("nunique")
    rows = rows[num_texts >= FOLDS]
    classes, labels = np.unique(rows["label"], return_inverse=True)
    if len(classes) < 2:
        raise InputError(f"two labels need at least {FOLDS} different texts each: give more rows")
    # identical texts are in one fold, so that none is scored by its own label
    classifier = make_pipeline(
        TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=50, max_iter=1000)
    )
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    probabilities = cross_val_predict(
        classifier, rows["text"], labels, groups=rows["text_id"], cv=folds, method="predict_proba"
    )
    issues = np.flatnonzero(find_label_issues(labels, probabilities, filter_by="both", n_jobs=1))
    likely = probabilities[issues].argmax(axis=1)
    scores = probabilities[issues, labels[issues]]
    listed = rows.iloc[issues][["row", "label"]].assign(likely_label=classes[likely], score=scores)
    return listed.sort_values("score", kind="stable")


if __name__ == "__main__":
    print_result("label_issues.py", main)
