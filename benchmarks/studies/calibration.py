"""Measure the strength of the calibration's priors:

    python benchmarks/studies/calibration.py --checkpoint FOLDER --file FILE [--class_names NAMES]

FOLDER is a checkpoint of ``train.py`` with a lexical head. FILE holds labelled rows on which the checkpoint was not trained, and
NAMES is as for ``train.py``. A few of these rows are drawn as validation rows, on which `evaluation.calibration` fits the weight
of the lexical head, the temperatures and the biases. Scores are measured on the other rows, as the mean of 40 draws.

The first table is the log loss without biases. Its columns are standard deviations of the prior: "0" fits nothing (the encoder
alone), and "inf" is maximum likelihood. The second table is for standard deviations of the biases' prior, 0 for no biases, with
0.25 for the other parameters ("2026-11-29: Biases in the calibration"). In both, the lexical scores contain the prior of the
classes, as in checkpoints until 2026-11-30. The third table removes it ("2026-11-30: The prior of the classes counts once").

The numbers for OHSUMED come from ``ablation.py --task ohsumed --variant recipe --fold 0``: its ``ohsumed-recipe-0`` is the
checkpoint, and its ``fold-0/test.csv``, a third of the training file, is FILE.

Supports docs/experiments.md, "2026-11-26: Calibration with a prior".
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoModel, AutoTokenizer, EvalPrediction, PreTrainedModel

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from evaluation.calibration import PRIOR_STD, Calibration, fit_calibration
from evaluation.metrics import build_compute_metrics
from taxonomy_hierarchical import Taxonomy
from training.arguments import DataArguments
from training.splits import load_splits

DRAWS = 40
ROWS = (10, 20, 50, 100, 200, 336)
PRIORS = (0.0, 0.1, 0.25, 0.5, 1.0, np.inf)
BIAS_PRIORS = (0.0, 0.1, 0.25, 0.5, 1.0)
SHOWN = ("log_loss", "accuracy", "macro_f1", "hierarchical_f1", "level_1_accuracy", "ece", "level_1_ece")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--file", required=True)
    parser.add_argument("--class_names")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "studies" / "results" / "calibration.json")
    arguments = parser.parse_args()
    model = AutoModel.from_pretrained(arguments.checkpoint, trust_remote_code=True).eval()
    tree = Taxonomy(model.config.tree.to_nested(), model.config.tree.separator)  # in the current code
    files = DataArguments(validation_file=arguments.file, class_names=arguments.class_names)
    rows = load_splits(files, seed=0, taxonomy=tree).splits["validation"]
    labels = np.array(rows["label"])
    logits, words = leaf_scores(model, arguments.checkpoint, list(rows["text"]))
    score = partial(scores, tree, logits, words, labels)
    by_level = json.loads((arguments.checkpoint / "data_report.json").read_text())["splits"]["train"]["classes"]
    counts = {label: count for level in by_level.values() for label, count in level.items()}
    log_prior = np.log([counts[label] + 0.5 for label in tree.labels])
    table = {"prior": draws(score, [(prior, 0.0, None) for prior in PRIORS], ROWS)}
    few_and_many = (100, min(336, 2 * len(labels) // 3))
    table["bias_prior"] = draws(score, [(PRIOR_STD, bias_prior, None) for bias_prior in BIAS_PRIORS], few_and_many)
    of_classes = [(PRIOR_STD, PRIOR_STD, removed) for removed in (None, log_prior)]
    table["class_prior"] = draws(score, of_classes, few_and_many)
    # ── Tables ───────────────────────────────────────────────────────────────────────────────────────────────────────
    print("| validation rows | " + " | ".join(f"{prior:g}" for prior in PRIORS) + " |")
    print("| ---: |" + " ---: |" * len(PRIORS))
    for number, of_priors in table["prior"].items():
        print(f"| {number} | " + " | ".join(f"{scored['log_loss']:.3f}" for scored in of_priors) + " |")
    print("\n| validation rows | prior of the biases | " + " | ".join(SHOWN) + " |")
    print("| ---: | ---: |" + " ---: |" * len(SHOWN))
    for number, of_priors in table["bias_prior"].items():
        for prior, scored in zip(BIAS_PRIORS, of_priors, strict=True):
            print(f"| {number} | {prior:g} | " + " | ".join(f"{scored[name]:.4f}" for name in SHOWN) + " |")
    print("\n| validation rows | prior of the classes | " + " | ".join(SHOWN) + " |")
    print("| ---: | --- |" + " ---: |" * len(SHOWN))
    for number, of_priors in table["class_prior"].items():
        for times, scored in zip(("twice", "once"), of_priors, strict=True):
            print(f"| {number} | {times} | " + " | ".join(f"{scored[name]:.4f}" for name in SHOWN) + " |")
    arguments.output.write_text(json.dumps({"rows": len(labels), **table}, indent=2) + "\n", encoding="utf-8")


def draws(
    score: Callable[..., dict[str, float]], priors: list[tuple], numbers: tuple[int, ...]
) -> dict[int, list[dict[str, float]]]:
    """Return the mean scores of `DRAWS` draws for each number of validation rows, and each tuple of priors."""
    return {
        number: [dict(pd.DataFrame([score(*pair, number, seed) for seed in range(DRAWS)]).mean()) for pair in priors]
        for number in numbers
    }


def leaf_scores(model: PreTrainedModel, checkpoint: Path, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return uncalibrated leaf scores of the encoder alone and of the lexical head alone, (num_texts, num_leaves) each.

    The lexical head and the calibration are removed from the model.
    """
    lexical = model.heads.lexical
    model.set_lexical_head(None)
    model.set_calibration(temperatures=None, node_biases=None, conformal_thresholds=None)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    ids = tokenizer(texts, truncation=True)["input_ids"]
    logits, words = (np.empty((len(texts), model.config.tree.num_leaves)) for _ in range(2))
    order = np.argsort([len(one) for one in ids])
    with torch.inference_mode():
        for rows in np.array_split(order, -(-len(order) // 16)):
            batch = tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt")
            logits[rows] = model(**batch).logits.float().numpy()
            words[rows] = lexical(batch["input_ids"], batch["attention_mask"]).numpy()
    return logits, words


def scores(
    tree: Taxonomy,
    logits: np.ndarray,
    words: np.ndarray,
    labels: np.ndarray,
    prior: float,
    bias_prior: float,
    log_prior: np.ndarray | None,
    number: int,
    seed: int,
) -> dict[str, float]:
    """Draw ``number`` rows, calibrate on them, and return the scores of the other rows."""
    known, rest = np.split(np.random.default_rng(seed).permutation(len(labels)), [number])
    calibration = Calibration(0.0, [1.0] * len(tree.decisions), [0.0] * tree.num_nodes)
    if prior:
        calibration = fit_calibration(tree, logits[known], words[known], labels[known], prior, bias_prior, log_prior)
    calibrated = calibration.apply(tree, logits[rest], words[rest])
    measured = build_compute_metrics(tree)(EvalPrediction(calibrated, labels[rest]))
    return {name: measured[name] for name in SHOWN}


if __name__ == "__main__":
    main()
