"""Compare prediction sets: ``python benchmarks/coverage.py --model FOLDER --file LABELLED.csv``.

Add ``--class_names labels.csv`` if labels are codes, as in OHSUMED. Without ``--model``, the tables of earlier measurements are
printed.

The first table compares methods. The file, on which the model must not have been trained, is split into halves 100 times at
random. One half calibrates, and the other half is predicted. Methods:

- this project's answers (`pipeline_hierarchical.conformal_answer`);
- flat conformal sets of leaves, LAC and APS, by MAPIE (``pip install mapie``), over the same leaf probabilities;
- thresholding, without calibration: the deepest node on the path of the most probable leaf whose probability is at least the
  requested coverage, or all roots.

Coverage is the share of answers that contain the correct leaf. "leaves" is the mean number of leaves below an answer, and
"nodes" the mean number of its nodes.

The second table is for the recipes' runs of ``quality.py``, as a checkpoint is published. Thresholds for 90 % are fitted on the
run's own validation rows, which are fewer and also selected the checkpoint. Coverage is measured on the whole test file.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import betabinom
from sklearn.base import BaseEstimator, ClassifierMixin
from transformers import pipeline

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluation.calibration import fit_conformal_thresholds
from pipeline_hierarchical import conformal_answer, guaranteed_threshold
from publishing.card import MEASURED_TARGET
from taxonomy_hierarchical import Taxonomy

QUALITY = ROOT / "benchmarks" / "results" / "quality.json"
SPLITS = 100
COVERAGES = (0.8, 0.9, 0.95)
# distinct validation and test texts of the recipes' runs
TEXTS = {"ohsumed": (336, 4043), "medical_abstracts": (346, 693)}


class PassThrough(ClassifierMixin, BaseEstimator):
    """Return the input as the class probabilities, because MAPIE needs a classifier."""

    def fit(self, probabilities: np.ndarray, labels: np.ndarray) -> "PassThrough":
        self.classes_ = np.arange(probabilities.shape[1])
        return self

    def predict_proba(self, probabilities: np.ndarray) -> np.ndarray:
        return probabilities

    def predict(self, probabilities: np.ndarray) -> np.ndarray:
        return probabilities.argmax(axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="with --file")
    parser.add_argument("--file", type=Path, help="CSV with columns text and label, without repeated texts")
    parser.add_argument("--class_names", type=Path, help="CSV whose label and name columns translate the labels")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "coverage.json")
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.file is None):
        parser.error("--model and --file go together")
    if arguments.model is not None:
        compare(arguments)
    print_comparison(json.loads(arguments.output.read_text(encoding="utf-8"))["rows"])
    print_runs(json.loads(QUALITY.read_text(encoding="utf-8"))["results"])


def compare(arguments: argparse.Namespace) -> None:
    """Measure all methods, and write the output file."""
    classify = pipeline("hierarchical-text-classification", model=arguments.model, trust_remote_code=True)
    tree: Taxonomy = classify.tree
    nodes, labels = probabilities(classify, arguments.file, arguments.class_names)
    leaves = nodes[:, : tree.num_leaves] / nodes[:, : tree.num_leaves].sum(axis=1, keepdims=True)
    below = tree.leaves_at_or_below
    rows = []
    for coverage in COVERAGES:
        scores_of: dict[str, list[tuple[float, float, float]]] = {}
        generator = np.random.default_rng(0)
        for _ in range(SPLITS):
            order = generator.permutation(len(labels))
            known, unseen = order[: len(order) // 2], order[len(order) // 2 :]
            log_probs = np.log(leaves[known].clip(1e-30))
            thresholds = fit_conformal_thresholds(tree, log_probs, labels[known], known)  # each row is a text
            threshold = guaranteed_threshold("coverage", coverage, thresholds)
            answers = [conformal_answer(tree, row, threshold) for row in nodes[unseen].tolist()]
            scores_of.setdefault("this project", []).append(score(answers, labels[unseen], below))
            for name in ("lac", "aps"):
                answers = flat_answers(leaves[known], labels[known], leaves[unseen], coverage, name)
                scores_of.setdefault(f"flat {name.upper()}", []).append(score(answers, labels[unseen], below))
            answers = [thresholded(tree, row, coverage) for row in nodes[unseen].tolist()]
            scores_of.setdefault("thresholding", []).append(score(answers, labels[unseen], below))
        for name, scores in scores_of.items():
            means, spread = np.mean(scores, axis=0), np.std(scores, axis=0)
            rows.append(
                {
                    "coverage": coverage, "answers": name, "held": means[0], "held_std": spread[0],
                    "leaves": means[1], "nodes": means[2],
                }
            )  # fmt: skip
    arguments.output.write_text(json.dumps({"documents": len(labels), "splits": SPLITS, "rows": rows}, indent=2) + "\n")


def print_comparison(rows: list[dict]) -> None:
    print("| coverage | method | measured coverage | leaves | nodes |\n| ---: | --- | ---: | ---: | ---: |")
    for row in rows:
        print(
            f"| {row['coverage']:.0%} | {row['answers']} | {row['held']:.1%} ± {row['held_std']:.1%} "
            f"| {row['leaves']:.2f} | {row['nodes']:.2f} |"
        )


def print_runs(runs: list[dict]) -> None:
    """Print the coverage of each seed of the recipes, the mean, and the interval that holds 95 % of runs.

    Over draws of n calibration texts, the coverage has the distribution Beta(k, n + 1 - k) with k = ⌈(n + 1) · coverage⌉
    (Vovk, 2012, "Conditional validity of inductive conformal predictors"). So the number of covered test texts is beta-binomial.
    """
    frame = pd.DataFrame(runs)
    recipes = frame[(frame["model"] == "qlora") & frame["task"].isin(TEXTS)]
    columns = ("recipe", "coverage", "measured coverage, by seed", "mean", "95 % interval", "leaves")
    print(f"\n| {' | '.join(columns)} |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for task, by_task in recipes.groupby("task", sort=False):
        coverages, (n, num_test) = by_task["answer_coverage"], TEXTS[task]
        by_seed = ", ".join(f"{value:.1%}" for value in coverages)
        k = math.ceil((n + 1) * MEASURED_TARGET)
        low, high = np.array(betabinom(num_test, k, n + 1 - k).interval(0.95)) / num_test
        cells = f"{by_seed} | {coverages.mean():.1%} | {low:.1%} – {high:.1%} | {by_task['answer_leaves'].mean():.2f}"
        print(f"| {task} | {MEASURED_TARGET:.0%} | {cells} |")


def probabilities(classify: Callable, file: Path, class_names: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the predicted probabilities (documents, nodes) and the labels (documents,), as leaf ids, of a labelled file."""
    tree = classify.tree
    texts, labels = read_rows(tree, file, class_names)
    nodes = np.zeros((len(texts), tree.num_nodes))
    for i, result in enumerate(classify(texts)):
        for level in result["levels"]:
            for label, probability in level.items():
                nodes[i, tree.id(label)] = probability
    return nodes, labels


def read_rows(tree: Taxonomy, file: Path, class_names: Path | None) -> tuple[list[str], np.ndarray]:
    """Read the texts and leaf ids (documents,) of a labelled file."""
    rows, names = pd.read_csv(file, dtype=str, keep_default_na=False), {}
    if class_names is not None:
        names = pd.read_csv(class_names, dtype=str).set_index("label")["name"].to_dict()
    return list(rows["text"]), np.array([tree.id(names.get(label, label)) for label in rows["label"]])


def flat_answers(
    known: np.ndarray, labels: np.ndarray, unknown: np.ndarray, coverage: float, score: str
) -> list[list[int]]:
    """Return the sets of leaves of MAPIE's split conformal classifier."""
    from mapie.classification import SplitConformalClassifier

    classifier = SplitConformalClassifier(
        PassThrough().fit(known, labels), confidence_level=coverage, conformity_score=score, prefit=True, random_state=0
    )
    _, sets = classifier.conformalize(known, labels).predict_set(unknown)
    return [np.flatnonzero(row).tolist() for row in sets[:, :, 0]]


def thresholded(tree: Taxonomy, nodes: list[float], coverage: float) -> list[int]:
    """Return the answer by thresholding, from the probability of every node."""
    path = tree.path(int(np.argmax(nodes[: tree.num_leaves])))
    return [node for node in path if nodes[node] >= coverage][-1:] or tree.children(-1)


def score(answers: list[list[int]], labels: np.ndarray, below: list[list[int]]) -> tuple[float, float, float]:
    """Return the coverage, and the mean numbers of leaves and of nodes, from the leaves ``below`` each node."""
    leaves = [{leaf for node in answer for leaf in below[node]} for answer in answers]
    covered = [label in answer for label, answer in zip(labels.tolist(), leaves, strict=True)]
    return float(np.mean(covered)), float(np.mean(list(map(len, leaves)))), float(np.mean(list(map(len, answers))))


if __name__ == "__main__":
    main()
