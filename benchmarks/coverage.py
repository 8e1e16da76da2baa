"""Compare prediction sets: ``python benchmarks/coverage.py --model FOLDER --file LABELLED.csv``.

Add ``--class_names labels.csv`` if labels are codes, as in OHSUMED. ``--model FOLDER --task TASK --data FOLDER`` measures the third
table. Without ``--model``, the tables of earlier measurements are printed.

The first table compares methods. The file, on which the model must not have been trained, is split into halves 100 times at
random. One half calibrates, and the other half is predicted. Methods:

- this project's prediction sets (`OnePath.prediction_set`);
- flat conformal sets of leaves, LAC and APS, by MAPIE (``pip install mapie``), over the same leaf probabilities;
- thresholding, without calibration: the deepest node on the path of the most probable leaf whose probability is at least the
  requested coverage, or all roots.

Coverage is the share of sets that contain the correct leaf. "leaves" is the mean number of leaves below a set, and "nodes" the
mean number of its nodes.

The second table is for the recipes' runs of ``quality.py``, as a checkpoint is published. Thresholds for 90 % are fitted on the
run's own validation rows, which are fewer and also selected the checkpoint. Coverage is measured on the whole test file.

The third table compares the precisions of ``predict.py --dtype`` on one processor, in coverage or for multi-label models
recall, in accuracy (micro-F1), macro-F1 and log loss. TASK and ``--data`` are those of ``quality.py``. All thresholds are
fitted in float32:

- validation rows: in `SPLITS` random halves, each half has thresholds fitted on the other half. The stored calibration was fitted
  on both halves alike, so it does not favour the rows that fit the thresholds. These rows choose the default of ``--dtype``;
- test rows: the thresholds that are stored in the checkpoint, as a user gets them.

"Changed" counts sets that differ from those in float32. Intervals are 95 % bootstrap intervals over the texts, of changes for
the same texts.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import harness
import numpy as np
import pandas as pd
import torch
from multi_label_peers import paired_intervals
from quality import Task
from scipy.special import logit
from scipy.stats import betabinom
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import RepeatedKFold

from configuration_hierarchical import Calibration, HierarchicalConfig
from decisions_hierarchical import OnePath, guaranteed_threshold
from hierarchical_clinicalbert.evaluation.forms import Form, form_of
from hierarchical_clinicalbert.evaluation.metrics import confusion_counts, macro_f1, micro_f1, one_hot
from hierarchical_clinicalbert.evaluation.one_path import OnePathForm
from hierarchical_clinicalbert.evaluation.report import MEASURED_TARGET, measured_threshold
from hierarchical_clinicalbert.prediction.int8 import quantize
from taxonomy_hierarchical import Taxonomy

SPLITS = 100
COVERAGES = (0.8, 0.9, 0.95)
# distinct validation and test texts of the recipes' runs
TEXTS = {"ohsumed": (336, 4043), "medical_abstracts": (346, 693)}
PRECISIONS = {  # the dtype of operations, and whether products are in 8 bits; processors without bfloat16 have the last one
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, False),
    "int8 and bf16": (torch.bfloat16, True),
    "int8 and fp32": (torch.float32, True),
}
RESAMPLES = 1000


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
    parser = harness.flag_parser(__doc__, "coverage.json")
    parser.add_argument("--model", help="with --file, or with --task and --data")
    parser.add_argument("--file", type=Path, help="CSV with columns text and label, without repeated texts")
    parser.add_argument("--task", choices=("ohsumed", "hallmarks", "ohsumed_multilabel"), help="without repeated texts")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--class_names", type=Path, help="CSV whose label and name columns translate the labels")
    arguments = parser.parse_args()
    given = [bool(one) for one in (arguments.model, arguments.file, arguments.task, arguments.data)]
    if given not in ([False] * 4, [True, True, False, False], [True, False, True, True]):
        parser.error("give --model with --file, or with --task and --data, or none of them")
    results = harness.read_results(arguments.output, {})
    if arguments.file:
        results |= compare(arguments)
    elif arguments.task:
        measured = compare_precisions(arguments)
        key = {name: measured[0][name] for name in ("processor", "task")}
        results["precisions"] = [row for row in results.get("precisions", []) if not key.items() <= row.items()]
        results["precisions"] += measured
    if arguments.model:
        harness.write_results(arguments.output, results)
    print_comparison(results.get("rows", []))
    print_runs(harness.read_results(harness.RESULTS / "quality.json", {})["results"])
    print_precisions(results.get("precisions", []))


def compare(arguments: argparse.Namespace) -> dict:
    """Measure all methods, and return their section of the output file."""
    classify = harness.load_classifier(arguments.model)
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
            threshold = coverage_threshold(tree, nodes[known], labels[known], coverage)
            sets = [OnePath(tree).prediction_set(row, threshold) for row in nodes[unseen].tolist()]
            scores_of.setdefault("this project", []).append(score(sets, labels[unseen], below))
            for name in ("lac", "aps"):
                sets = flat_sets(leaves[known], labels[known], leaves[unseen], coverage, name)
                scores_of.setdefault(f"flat {name.upper()}", []).append(score(sets, labels[unseen], below))
            sets = [thresholded(tree, row, coverage) for row in nodes[unseen].tolist()]
            scores_of.setdefault("thresholding", []).append(score(sets, labels[unseen], below))
        for name, scores in scores_of.items():
            means, spread = np.mean(scores, axis=0), np.std(scores, axis=0)
            rows.append(
                {
                    "coverage": coverage, "method": name, "held": means[0], "held_std": spread[0],
                    "leaves": means[1], "nodes": means[2],
                }
            )  # fmt: skip
    return {"documents": len(labels), "splits": SPLITS, "rows": rows}


def print_comparison(rows: list[dict]) -> None:
    columns = [("coverage", "{coverage:.0%}"), ("method", "{method}")]
    columns.append(("measured coverage", "{held:.1%} ± {held_std:.1%}"))
    harness.print_rows(rows, [*columns, ("leaves", "{leaves:.2f}"), ("nodes", "{nodes:.2f}")])


def print_runs(runs: list[dict]) -> None:
    """Print the coverage of each seed of the recipes, the mean, and the interval that holds 95 % of runs.

    Over draws of n calibration texts, the coverage has the distribution Beta(k, n + 1 - k) with k = ⌈(n + 1) · coverage⌉
    (Vovk, 2012, "Conditional validity of inductive conformal predictors"). So the number of covered test texts is beta-binomial.
    """
    frame = pd.DataFrame(runs)
    recipes = frame[(frame["model"] == "qlora") & frame["task"].isin(TEXTS)]
    rows = []
    for task, by_task in recipes.groupby("task", sort=False):
        coverages, (n, num_test) = by_task["set_coverage"], TEXTS[task]
        by_seed = ", ".join(f"{value:.1%}" for value in coverages)
        k = math.ceil((n + 1) * MEASURED_TARGET)
        low, high = np.array(betabinom(num_test, k, n + 1 - k).interval(0.95)) / num_test
        cells = [f"{coverages.mean():.1%}", f"{low:.1%} – {high:.1%}", f"{by_task['set_leaves'].mean():.2f}"]
        rows.append([task, f"{MEASURED_TARGET:.0%}", by_seed, *cells])
    harness.print_table(("recipe", "coverage", "measured coverage, by seed", "mean", "95 % interval", "leaves"), rows)


def probabilities(classify: Callable, file: Path, class_names: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the predicted probabilities (documents, nodes) and the labels (documents,), as leaf ids, of a labelled file."""
    texts, labels = read_rows(classify.tree, file, class_names)
    return node_probabilities(classify, texts), labels


def node_probabilities(classify: Callable, texts: list[str]) -> np.ndarray:
    """Return the predicted probabilities (documents, nodes) of texts."""
    tree = classify.tree
    nodes = np.zeros((len(texts), tree.num_nodes))
    for i, result in enumerate(classify(texts, levels=True)):
        for level in result["levels"]:
            for label, probability in level.items():
                nodes[i, tree.id(label)] = probability
    return nodes


def coverage_threshold(tree: Taxonomy, nodes: np.ndarray, labels: np.ndarray, coverage: float) -> float:
    """Fit one threshold for all of this project's sets to node probabilities and leaf ids. Each row is a text."""
    leaves = nodes[:, : tree.num_leaves] / nodes[:, : tree.num_leaves].sum(axis=1, keepdims=True)
    form = OnePathForm(tree)
    thresholds = form.thresholds_of(form.set_scores(np.log(leaves.clip(1e-30)), labels, np.arange(len(labels))))
    return guaranteed_threshold("coverage", coverage, Calibration(set_thresholds=thresholds))


def read_rows(tree: Taxonomy, file: Path, class_names: Path | None) -> tuple[list[str], np.ndarray]:
    """Read the texts and leaf ids (documents,) of a labelled file."""
    rows, names = pd.read_csv(file, dtype=str, keep_default_na=False), {}
    if class_names is not None:
        names = pd.read_csv(class_names, dtype=str).set_index("label")["name"].to_dict()
    return list(rows["text"]), np.array([tree.id(names.get(label, label)) for label in rows["label"]])


def flat_sets(
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
    """Return the prediction set by thresholding, from the probability of every node."""
    path = tree.path(int(np.argmax(nodes[: tree.num_leaves])))
    return [node for node in path if nodes[node] >= coverage][-1:] or tree.children(-1)


def score(sets: list[list[int]], labels: np.ndarray, below: list[list[int]]) -> tuple[float, float, float]:
    """Return the coverage, and the mean numbers of leaves and of nodes, from the leaves ``below`` each node."""
    leaves = [{leaf for node in nodes for leaf in below[node]} for nodes in sets]
    covered = [label in held for label, held in zip(labels.tolist(), leaves, strict=True)]
    return float(np.mean(covered)), float(np.mean(list(map(len, leaves)))), float(np.mean(list(map(len, sets))))


# ── Precisions ───────────────────────────────────────────────────────────────────────────────────────────────────────


def compare_precisions(arguments: argparse.Namespace) -> list[dict]:
    """Measure all precisions on validation and test rows. Return one row of results for each split and precision."""
    # ── Rows: those that the checkpoint was calibrated on, and test rows ─────────────────────────────────────────────
    report = json.loads((Path(arguments.model) / "data_report.json").read_text(encoding="utf-8"))
    task = Task(arguments.task, arguments.data, report["split"]["seed"])
    if task.load().report["split"] != report["split"]:
        sys.exit(f"{arguments.model} was trained and calibrated on other rows than those in {arguments.data}")
    rows = {split: task.rows(split) for split in ("validation", "test")}

    # ── Probabilities: {split: {precision: (num_texts, num_nodes)}} ──────────────────────────────────────────────────
    nodes: dict[str, dict[str, np.ndarray]] = {split: {} for split in rows}
    for name, (dtype, in_8_bits) in PRECISIONS.items():
        classify = harness.load_classifier(arguments.model, dtype=dtype, device="cpu")
        if in_8_bits:
            quantize(classify.model.encoder)
        for split, (texts, _) in rows.items():
            nodes[split][name] = node_probabilities(classify, texts)
    config = HierarchicalConfig.from_pretrained(arguments.model)
    form, calibration = form_of(config.tree, config.problem_type), config.calibration

    # ── Thresholds, always from float32 ──────────────────────────────────────────────────────────────────────────────
    set_threshold = measured_threshold(form.decisions, calibration)
    num_texts = len(rows["test"][0])
    folds = {"test": [(np.arange(num_texts), set_threshold, calibration.thresholds)], "validation": []}
    exact, labels = nodes["validation"]["fp32"], rows["validation"][1]
    for fitted, scored in RepeatedKFold(n_splits=2, n_repeats=SPLITS // 2, random_state=0).split(exact):
        folds["validation"].append((scored, *fit_thresholds(form, exact[fitted], labels[fitted])))

    # ── Scores ───────────────────────────────────────────────────────────────────────────────────────────────────────
    key = {"processor": harness.processor(), "task": arguments.task}
    return [
        {**key, "split": split, "texts": len(rows[split][0]), "precision": name, **scores}
        for split in ("validation", "test")
        for name, scores in precision_scores(form, nodes[split], rows[split][1], folds[split]).items()
    ]


Fold = tuple[np.ndarray, float, list[float] | None]  # the rows to score, and the thresholds of sets and of nodes


def fit_thresholds(form: Form, nodes: np.ndarray, labels: np.ndarray) -> tuple[float, list[float] | None]:
    """Fit the thresholds of sets and, for multi-label models, of nodes, to node probabilities (num_texts, num_nodes)."""
    logits = np.log(nodes.clip(1e-30))
    if labels.ndim == 2:
        logits = logit(nodes.clip(1e-30, 1 - 1e-12))
    logits = logits[:, : form.decisions.num_classes]
    sets = Calibration(**form.fit_sets(logits, labels, np.arange(len(labels))))
    threshold = guaranteed_threshold(form.decisions.guarantee, MEASURED_TARGET, sets)
    return threshold, form.fit_thresholds(logits, labels)


def precision_scores(
    form: Form, nodes: dict[str, np.ndarray], labels: np.ndarray, folds: list[Fold]
) -> dict[str, dict]:
    """Score each precision, and its difference from float32, over the folds, which score each text equally often.

    Args:
        nodes: for each precision, the probabilities (num_texts, num_nodes).
        labels: leaf ids, or for multi-label models (num_texts, num_nodes).

    Returns:
        For each precision, ``held``: coverage or recall of the sets; ``micro_f1``: accuracy or micro-F1; ``macro_f1``;
        ``log_loss`` in nats, of a text or a node; and the differences from float32: ``…_change`` of each, the share of sets, and
        the largest change of a probability. A value with an interval is (value, low, high).
    """
    decisions, passes = form.decisions, sum(len(scored) for scored, *_ in folds) // len(labels)
    is_label = labels == 1 if labels.ndim == 2 else one_hot(labels, decisions.num_classes)
    sets, predictions = {}, {}
    for name, probabilities in nodes.items():
        sets[name] = np.zeros((passes, *probabilities.shape), dtype=bool)
        predictions[name] = np.zeros((passes, *is_label.shape), dtype=bool)
        for i, (scored, threshold, node_thresholds) in enumerate(folds):
            place = i * passes // len(folds), scored
            for text, row in zip(scored, probabilities[scored].tolist(), strict=True):
                sets[name][place[0], text, decisions.prediction_set(row, threshold)] = True
            predicted, _ = decisions.predict(torch.from_numpy(probabilities[scored]), node_thresholds)
            predictions[name][place] = predicted[:, : decisions.num_classes].numpy()
    held = {name: held_shares(form, sets[name], labels) for name in nodes}
    losses = {
        name: log_losses(probabilities[:, : decisions.num_classes], labels, is_label)
        for name, probabilities in nodes.items()
    }
    scores = {}
    for name in nodes:
        counts = [confusion_counts(is_label, chosen) for chosen in predictions[name]]
        changes = paired_intervals([*predictions[name]], [*predictions["fp32"]], is_label)
        scores[name] = {
            "held": mean_interval(held[name]),
            "held_change": mean_interval(held[name] - held["fp32"]),
            "log_loss": losses[name].mean(),
            "log_loss_change": mean_interval(losses[name] - losses["fp32"]),
            "changed_sets": (sets[name] != sets["fp32"]).any(2).mean(),
            "micro_f1": np.mean([*map(micro_f1, counts)]),
            "macro_f1": np.mean([*map(macro_f1, counts)]),
            "largest_change": np.abs(nodes[name] - nodes["fp32"]).max(),
            **{f"{metric}_change": list(map(float, interval)) for metric, interval in changes.items()},
        }
    return scores


def held_shares(form: Form, sets: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the share of each text's labels that its sets hold, (num_texts,), the mean over passes; NaN without a label.

    ``sets`` are (num_passes, num_texts, num_nodes).
    """
    if labels.ndim == 2:
        true = labels == 1
        return (sets & true).sum(2).mean(0) / np.where(true.any(1), true.sum(1), np.nan)
    paths = np.array(form.tree.padded_paths)[labels]  # (num_texts, depth), padded with the id after the last node
    padded = np.pad(sets, ((0, 0), (0, 0), (0, 1)))
    return np.take_along_axis(padded, paths[None], axis=2).any(2).mean(0)


def log_losses(classes: np.ndarray, labels: np.ndarray, is_label: np.ndarray) -> np.ndarray:
    """Return each text's log loss, (num_texts,): of its leaf, or for multi-label models the mean over nodes."""
    if labels.ndim == 2:
        return -np.log(np.where(is_label, classes, 1 - classes).clip(1e-12)).mean(1)
    return -np.log(classes[is_label].clip(1e-12))


def mean_interval(values: np.ndarray) -> list[float]:
    """Return the mean over texts, and its 95 % bootstrap interval. NaN stands for a text that does not count."""
    values = values[~np.isnan(values)]
    means = values[np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
    return [float(values.mean()), *map(float, np.percentile(means, (2.5, 97.5)))]


def print_precisions(rows: list[dict]) -> None:
    def change(name: str, form: str) -> str:
        return "{name[0]:form} ({name[1]:form} to {name[2]:form})".replace("name", name).replace("form", form)

    columns = [("processor", "{processor}"), ("task", "{task}"), ("rows", "{split}"), ("texts", "{texts}")]
    columns += [("precision", "{precision}"), ("coverage, recall", "{held[0]:.1%} ({held[1]:.1%} – {held[2]:.1%})")]
    columns += [("change", change("held_change", "+.2%")), ("changed sets", "{changed_sets:.1%}")]
    columns += [("accuracy, micro-F1", "{micro_f1:.1%}"), ("change", change("micro_f1_change", "+.2%"))]
    columns += [("macro-F1", "{macro_f1:.1%}"), ("change", change("macro_f1_change", "+.2%"))]
    columns += [("change of log loss", change("log_loss_change", "+.4f"))]
    columns += [("largest change of a probability", "{largest_change:.2f}")]
    harness.print_rows(rows, columns, left=3)


if __name__ == "__main__":
    main()
