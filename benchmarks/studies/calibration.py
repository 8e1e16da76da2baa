"""Measure the strength of the calibration's prior:

    python benchmarks/studies/calibration.py --checkpoint FOLDER --file FILE [--class_names NAMES]

FOLDER is a checkpoint of ``train.py`` with a lexical head. FILE holds labelled rows on which the checkpoint was not trained, and
NAMES is as for ``train.py``. A few of these rows are drawn as validation rows, on which `evaluation.calibration` fits the weight
of the lexical head and the temperatures. The log loss is measured on the other rows, as the mean of 40 draws. The columns are
standard deviations of the prior: "0" fits nothing (the encoder alone), and "inf" is maximum likelihood.

The numbers for OHSUMED come from ``ablation.py --task ohsumed --variant recipe --fold 0``: its ``ohsumed-recipe-0`` is the
checkpoint, and its ``fold-0/test.csv``, a third of the training file, is FILE.

Supports docs/experiments.md, "2026-11-26: Calibration with a prior".
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from evaluation.calibration import Calibration, fit_calibration
from taxonomy_hierarchical import Taxonomy
from training.arguments import DataArguments
from training.splits import load_splits

DRAWS = 40
ROWS = (10, 20, 50, 100, 200, 336)
PRIORS = (0.0, 0.1, 0.25, 0.5, 1.0, np.inf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--file", required=True)
    parser.add_argument("--class_names")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "studies" / "results" / "calibration.json")
    arguments = parser.parse_args()
    model = AutoModel.from_pretrained(arguments.checkpoint, trust_remote_code=True).eval()
    tree, files = model.config.tree, DataArguments(validation_file=arguments.file, class_names=arguments.class_names)
    rows = load_splits(files, seed=0, taxonomy=tree).splits["validation"]
    labels = np.array(rows["label"])
    logits, words = leaf_scores(model, arguments.checkpoint, list(rows["text"]))
    table = []
    print("| validation rows | " + " | ".join(f"{prior:g}" for prior in PRIORS) + " |")
    print("| ---: |" + " ---: |" * len(PRIORS))
    for number in (number for number in ROWS if number < 0.7 * len(labels)):
        found, generator = np.zeros(len(PRIORS)), np.random.default_rng(0)
        for _ in range(DRAWS):
            drawn = generator.permutation(len(labels))
            found += losses(tree, logits, words, labels, drawn[:number], drawn[number:])
        means = dict(zip(map(str, PRIORS), (found / DRAWS).tolist(), strict=True))
        table.append({"validation_rows": number, "log_loss_by_prior": means})
        print(f"| {number} | " + " | ".join(f"{value:.3f}" for value in means.values()) + " |")
    arguments.output.write_text(json.dumps({"rows": len(labels), "table": table}, indent=2) + "\n", encoding="utf-8")


def leaf_scores(model: PreTrainedModel, checkpoint: Path, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return uncalibrated leaf logits of the encoder alone, and those of the lexical head, (num_texts, num_leaves) each.

    The lexical head is removed from the model.
    """
    lexical = model.heads.lexical
    model.set_lexical_head(None)
    model.set_calibration(temperatures=None, conformal_thresholds=None)
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


def losses(
    tree: Taxonomy, logits: np.ndarray, words: np.ndarray, labels: np.ndarray, known: np.ndarray, rest: np.ndarray
) -> np.ndarray:
    """Return the log loss of the rows ``rest`` for each of `PRIORS`, calibrated on the rows ``known``."""
    found = []
    for prior in PRIORS:
        calibration = Calibration(0.0, [1.0] * len(tree.decisions))
        if prior:
            calibration = fit_calibration(tree, logits[known], words[known], labels[known], prior)
        log_probs = calibration.apply(tree, logits[rest], words[rest])
        found.append(-log_probs[np.arange(len(rest)), labels[rest]].mean())
    return np.array(found)


if __name__ == "__main__":
    main()
