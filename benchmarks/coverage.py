"""Compare prediction sets: ``python benchmarks/coverage.py --model CHECKPOINT --task ohsumed --data
FOLDER``.

TASK and ``--data`` are those of ``quality.py``. Without ``--model``, the tables of earlier
measurements are printed.

The first table, ``--part prices``, walks the trade of leaves for nodes. The test file is split into
halves 100 times at random. One half calibrates, and the other half is predicted. Rows are prices of
a node, see `OnePath.prediction_sets`: at 0, sets are LAC's (Sadinle et al., 2019), of the fewest
leaves. "One node" is the deepest ancestor of the most probable leaf whose probability reaches a
threshold (Mortier et al., 2025, arXiv 2501.19038, with one node a set). Coverage is the share of
sets that contain the correct leaf. "leaves" is the mean number of leaves below a set, and "nodes"
the mean number of its nodes. "Worst band" is the coverage among the texts of one band of
confidence, with one threshold for all texts.

The second table, ``--part precisions``, compares the precisions of ``predict.py --dtype`` on one
processor, on test texts: coverage or for multi-label models recall, accuracy (micro-F1), macro-F1
and log loss. Thresholds are those of the checkpoint, which were fitted in float32. "Changed" counts
sets that differ from those in float32. Intervals are 95 % bootstrap intervals over the texts, of
changes for the same texts.
"""

import argparse
import itertools
import math
from itertools import zip_longest
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pandas as pd
import torch
from harness import mean_interval, paired_intervals
from quality import Task
from scored import read_scores

from configuration_hierarchical import Calibration, HierarchicalConfig
from decisions_hierarchical import SetThreshold, guaranteed_threshold
from hierarchical_clinicalbert.evaluation.forms import Form, form_of
from hierarchical_clinicalbert.evaluation.metrics import (
    confusion_counts,
    macro_f1,
    micro_f1,
    one_hot,
)
from hierarchical_clinicalbert.evaluation.report import measured_threshold
from hierarchical_clinicalbert.prediction.openvino import OpenVinoEncoder, convert

SPLITS = 100
COVERAGES = (0.8, 0.9, 0.95)
PRICES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0)  # of a node, in leaves
# the dtype of operations, and whether OpenVINO multiplies in 8 bits; processors without bfloat16
# have the last one
PRECISIONS = {
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, False),
    "int8 and bf16": (torch.bfloat16, True),
    "int8 and fp32": (torch.float32, True),
}


def main() -> None:
    parser = harness.flag_parser(__doc__, "coverage.json")
    parser.add_argument("--model", type=Path)
    parser.add_argument(
        "--task", choices=("ohsumed", "hallmarks", "ohsumed_multilabel"), default="ohsumed"
    )
    parser.add_argument("--data", type=Path)
    parser.add_argument(
        "--part", nargs="+", choices=("prices", "precisions"), default=("prices", "precisions")
    )
    arguments = parser.parse_args()
    results = harness.read_results(arguments.output, {})
    if arguments.model and "prices" in arguments.part:
        results |= compare(arguments)
    if arguments.model and "precisions" in arguments.part:
        measured = compare_precisions(arguments)
        key = {name: measured[0][name] for name in ("processor", "task")}
        results["precisions"] = [
            row for row in results.get("precisions", []) if not key.items() <= row.items()
        ]
        results["precisions"] += measured
    if arguments.model:
        harness.write_results(arguments.output, results)
    print_comparison(results.get("rows", []))
    print_precisions(results.get("precisions", []))


def compare(arguments: argparse.Namespace) -> dict:
    """Measure all prices of a node, and return their section of the output file."""
    everything, count = read_scores(arguments.model, arguments.task, arguments.data)
    fitted, test = everything.split(np.arange(len(everything.labels)), count)
    form = everything.form
    labels = test.labels
    _, logits = fitted.calibrated(test)
    texts = np.arange(len(labels))
    rows = []
    scores: dict[Any, np.ndarray] = {}
    for price in PRICES:
        form.decisions.node_price = price
        scores[price] = form.set_scores(logits, labels, texts).to_numpy()
    scores["one node"], on_path, path_sizes = single_nodes(form, logits, labels)
    for coverage, (price, of_texts) in itertools.product(COVERAGES, scores.items()):
        generator = np.random.default_rng(0)
        measured = []
        for _ in range(SPLITS):
            known, unseen = np.split(generator.permutation(texts), [len(texts) // 2])
            thresholds = form.thresholds_of(pd.Series(of_texts[known]))
            threshold = guaranteed_threshold(
                "coverage", coverage, Calibration(set_thresholds=thresholds)
            )
            if price == "one node":
                level = (on_path[unseen] > threshold).sum(1)
                held = of_texts[unseen] <= threshold
                sizes = path_sizes[unseen, level]
                measured.append((held.mean(), *sizes.mean(axis=0), math.nan))
            else:
                form.decisions.node_price = price
                sets = form.predict_sets(logits[unseen], labels[unseen], unseen, threshold)
                worst = (sets.worst_band() or {}).get("coverage", math.nan)
                measured.append(
                    (*(sets.scores()[name] for name in ("coverage", "leaves", "nodes")), worst)
                )
        columns = pd.DataFrame(measured, columns=["held", "leaves", "nodes", "worst"])
        row = {"coverage": coverage, "price": price, "held_std": columns["held"].std(ddof=0)}
        rows.append(row | columns.mean().to_dict())  # without NaN
    return {"documents": len(labels), "splits": SPLITS, "rows": rows}


def single_nodes(
    form: Form, logits: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what sets of one node need.

    Returns:
        The scores, (num_texts,): the greatest probability on the path of the most probable leaf, of
        a node not above the label. The probabilities on this path, (num_texts, depth).
        The numbers of leaves and nodes of a set of all roots, and of each node on the path,
        (num_texts, depth + 1, 2).
    """
    tree = form.tree
    rows = np.arange(len(labels))
    nodes = np.pad(form.decisions.log_probs(torch.tensor(logits)).exp().numpy(), ((0, 0), (0, 1)))
    paths = np.array(
        [*zip_longest(*map(tree.path, range(tree.num_nodes)), fillvalue=tree.num_nodes)]
    ).T
    path = paths[logits.argmax(1)]
    of_label = paths[labels]
    shared = (
        ((path[:, :, None] == of_label[:, None]) & (path < tree.num_nodes)[:, :, None])
        .any(2)
        .sum(1)
    )
    on_path = nodes[rows[:, None], path]
    num_leaves = np.array([*map(len, tree.leaves_at_or_below), 0])[path]
    sizes = np.stack([num_leaves, np.ones_like(num_leaves)], axis=2)
    of_roots = np.broadcast_to((tree.num_leaves, len(tree.children(-1))), (len(rows), 1, 2))
    return (
        np.pad(on_path, ((0, 0), (0, 1)))[rows, shared],
        on_path,
        np.concatenate([of_roots, sizes], axis=1),
    )


def print_comparison(rows: list[dict]) -> None:
    columns = [("coverage", "{coverage:.0%}"), ("price of a node", "{price}")]
    columns += [("measured coverage", "{held:.1%} ± {held_std:.1%}"), ("worst band", "{worst:.1%}")]
    harness.print_rows(rows, [*columns, ("leaves", "{leaves:.2f}"), ("nodes", "{nodes:.2f}")])


# ── Precisions ────────────────────────────────────────────────────────────────────────────────────


def compare_precisions(arguments: argparse.Namespace) -> list[dict]:
    """Measure all precisions on test rows, with the thresholds of the checkpoint.

    Return one row of results for each.
    """
    texts, labels = Task(arguments.task, arguments.data, seed=0).rows()["test"]
    config = HierarchicalConfig.from_pretrained(arguments.model)
    form = form_of(config.tree, config.problem_type)
    calibration = config.calibration
    nodes = {}
    for name, (dtype, in_8_bits) in PRECISIONS.items():
        loaded_dtype = torch.float32 if in_8_bits else dtype
        classify = harness.load_classifier(arguments.model, dtype=loaded_dtype, device="cpu")
        if in_8_bits:
            converted = convert(
                classify.model.encoder, classify.tokenizer.model_input_names, int8=True
            )
            classify.model.encoder = OpenVinoEncoder(converted, dtype)
        nodes[name] = harness.node_probabilities(classify, texts)
    threshold = measured_threshold(form.decisions, calibration)
    key = {
        "processor": harness.processor(),
        "task": arguments.task,
        "split": "test",
        "texts": len(texts),
    }
    by_precision = precision_scores(form, nodes, labels, threshold, calibration.thresholds)
    return [{**key, "precision": name, **scores} for name, scores in by_precision.items()]


def precision_scores(
    form: Form,
    nodes: dict[str, np.ndarray],
    labels: np.ndarray,
    set_threshold: SetThreshold,
    node_thresholds: list[float] | None,
) -> dict[str, dict]:
    """Score each precision, and its difference from float32.

    Args:
        nodes: for each precision, the probabilities (num_texts, num_nodes).
        labels: leaf ids, or for multi-label models (num_texts, num_nodes).

    Returns:
        For each precision, ``held``: coverage or recall of the sets; ``micro_f1``: accuracy or
        micro-F1; ``macro_f1``; ``log_loss`` in nats, of a text or a node; and the differences from
        float32: ``…_change`` of each, the share of sets, and the largest change of a probability. A
        value with an interval is (value, low, high).
    """
    decisions = form.decisions
    is_label = labels == 1 if labels.ndim == 2 else one_hot(labels, decisions.num_classes)
    sets = {}
    predicted = {}
    held = {}
    losses = {}
    scores = {}
    for name, probabilities in nodes.items():
        sets[name] = decisions.prediction_sets(
            torch.from_numpy(probabilities), set_threshold
        ).numpy()
        chosen = decisions.predict(torch.from_numpy(probabilities), node_thresholds)
        predicted[name] = chosen[:, : decisions.num_classes].numpy()
        held[name] = held_shares(form, sets[name], labels)
        losses[name] = log_losses(probabilities[:, : decisions.num_classes], labels, is_label)
        counts = confusion_counts(is_label, predicted[name])
        changes = paired_intervals([predicted[name]], [predicted["fp32"]], is_label)
        scores[name] = {
            "held": mean_interval(held[name]),
            "held_change": mean_interval(held[name] - held["fp32"]),
            "log_loss": losses[name].mean(),
            "log_loss_change": mean_interval(losses[name] - losses["fp32"]),
            "changed_sets": (sets[name] != sets["fp32"]).any(1).mean(),
            "micro_f1": micro_f1(counts),
            "macro_f1": macro_f1(counts),
            "largest_change": np.abs(probabilities - nodes["fp32"]).max(),
            **{
                f"{metric}_change": list(map(float, interval))
                for metric, interval in changes.items()
            },
        }
    return scores


def held_shares(form: Form, sets: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the share of each text's labels that its set (num_texts, num_nodes) holds,
    (num_texts,); NaN without a label.
    """
    if labels.ndim == 2:
        true = labels == 1
        return (sets & true).sum(1) / np.where(true.any(1), true.sum(1), np.nan)
    held = form.decisions.held(torch.from_numpy(sets)).numpy()
    return np.take_along_axis(held, labels[:, None], axis=1)[:, 0].astype(float)


def log_losses(classes: np.ndarray, labels: np.ndarray, is_label: np.ndarray) -> np.ndarray:
    """Return each text's log loss, (num_texts,): of its leaf, or for multi-label models the mean
    over nodes.
    """
    if labels.ndim == 2:
        return -np.log(np.where(is_label, classes, 1 - classes).clip(1e-12)).mean(1)
    return -np.log(classes[is_label].clip(1e-12))


def print_precisions(rows: list[dict]) -> None:
    def change(name: str, form: str) -> str:
        return "{name[0]:form} ({name[1]:form} to {name[2]:form})".replace("name", name).replace(
            "form", form
        )

    columns = [
        ("processor", "{processor}"),
        ("task", "{task}"),
        ("texts", "{texts}"),
        ("precision", "{precision}"),
    ]
    columns += [("coverage, recall", "{held[0]:.1%} ({held[1]:.1%} – {held[2]:.1%})")]
    columns += [("change", change("held_change", "+.2%")), ("changed sets", "{changed_sets:.1%}")]
    columns += [
        ("accuracy, micro-F1", "{micro_f1:.1%}"),
        ("change", change("micro_f1_change", "+.2%")),
    ]
    columns += [("macro-F1", "{macro_f1:.1%}"), ("change", change("macro_f1_change", "+.2%"))]
    columns += [("change of log loss", change("log_loss_change", "+.4f"))]
    columns += [("largest change of a probability", "{largest_change:.2f}")]
    harness.print_rows(rows, columns, left=3)


if __name__ == "__main__":
    main()
