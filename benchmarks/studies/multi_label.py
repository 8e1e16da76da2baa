"""Compare losses and settings for multi-label models on Hallmarks of Cancer, without its test file:

    python benchmarks/studies/multi_label.py --data FOLDER --encoder ENCODER [--variant recipe "every decision" … --seed 1 2 …]

FOLDER holds ``hallmarks_of_cancer/{train,validation}.jsonl`` with ``taxonomy.json``. A fifth of the training texts is scored.
``train.py`` trains on the others, over a full-precision encoder. Epoch, calibration and thresholds are fitted to the validation
file. So the scored rows are used for nothing else. With about 200 rows, a difference of 2 points of F1 can be chance; mean average
precision and log loss vary less. Finished runs are not repeated.

Supports docs/experiments.md, "2026-11-27: Losses and settings for multi-label models".
The variant "nested scores" has an entry of its own: "2026-11-28: Nested scores in multi-label models".
"""

import argparse
import json
import random
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, pad

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train
from modeling_hierarchical import HierarchicalHeads, TreeSoftmax, average_over_labels, segment_logsumexp
from taxonomy_hierarchical import Taxonomy
from training.label_arrays import open_counts, prior_log_odds
from training.losses import MultiLabelFocalLoss

SCORED = 0.2  # of the training texts
MEAN = ("--pooling", "mean")
FLAGS: dict[str, tuple[str, ...]] = {
    "recipe": (),
    "mean pooling": MEAN,
    "focal, gamma 1": ("--focal_gamma", "1"),
    "no label smoothing": ("--label_smoothing_factor", "0"),
    "open decisions": (),
    "open decisions, mean pooling": MEAN,
    "open decisions, mean pooling, rank 64": (*MEAN, "--lora_r", "64", "--lora_alpha", "128"),
    "every decision": (),
    "asymmetric loss": (),
    "nested scores": (),
}
SHOWN = {"micro_f1": 100, "macro_f1": 100, "mean_average_precision": 100, "log_loss": 1, "ece": 1, "ece_by_chance": 1}


class OpenDecisions(MultiLabelFocalLoss):
    """Train the decisions whose parent's label is 1: the likelihood of the labels."""

    def __init__(self, tree: Taxonomy, labels: np.ndarray, *arguments: Any, **settings: Any):
        super().__init__(tree, labels, *arguments, **settings)
        positive, total = open_counts(tree, labels)
        self.rates = torch.tensor((positive + 0.5) / (total + 1), dtype=torch.float32)

    def forward(self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        loss = binary_cross_entropy_with_logits(logits, self.target(labels), reduction="none")
        return average_over_labels(torch.where(self.is_trained(labels), loss, 0).sum(1), labels, num_items_in_batch)

    def target(self, labels: Tensor) -> Tensor:
        outcome = labels.clamp(min=0).float()
        return outcome + self.label_smoothing * (self.rates.to(outcome.device) - outcome)

    def is_trained(self, labels: Tensor) -> Tensor:
        return self.decisions.open_decisions(labels)


class EveryDecision(OpenDecisions):
    """Train all decisions with a known label, even if their parent's label is 0."""

    def is_trained(self, labels: Tensor) -> Tensor:
        return labels >= 0


class Asymmetric(MultiLabelFocalLoss):
    """Asymmetric loss of the nodes (Ridnik et al., 2021): γ+ = 0, γ- = 2, probabilities shifted by 0.05."""

    def forward(self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        marginal = self.decisions.marginal_logits(logits)
        shifted = (torch.sigmoid(marginal) - 0.05).clamp(min=0)
        loss = torch.where(labels == 1, -logsigmoid(marginal), -(shifted**2) * torch.log1p(-shifted))
        return average_over_labels(torch.where(labels >= 0, loss, 0).sum(1), labels, num_items_in_batch)


class NestedScores(MultiLabelFocalLoss):
    """Apply the recipe's loss to scores that include the logsumexp of the children's scores, as in single-path models.

    Each node's initial logsumexp is subtracted, so that its score starts at its log-odds.
    """

    def __init__(self, tree: Taxonomy, labels: np.ndarray, *arguments: Any, **settings: Any):
        super().__init__(tree, labels, *arguments, **settings)
        nested, plain = TreeSoftmax(tree), HierarchicalHeads.own_scores
        prior = torch.from_numpy(prior_log_odds(tree, labels)).float()[None]
        inclusive = segment_logsumexp(prior, nested.decision_of, nested.num_decisions)
        initial = pad(inclusive[:, 1:], (tree.num_leaves, 0))

        def own_scores(heads: HierarchicalHeads, *inputs: Any) -> Tensor:
            return nested.with_inclusive_values(plain(heads, *inputs) - initial)

        HierarchicalHeads.own_scores = own_scores


def loss_of(variant: str) -> type[MultiLabelFocalLoss]:
    others = {
        "open decisions": OpenDecisions,
        "every decision": EveryDecision,
        "asymmetric loss": Asymmetric,
        "nested scores": NestedScores,
    }
    return others.get(variant.split(", mean")[0], MultiLabelFocalLoss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--variant", choices=FLAGS, nargs="+", default=[*FLAGS])
    parser.add_argument("--seed", type=int, nargs="+", default=[42])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "multi_label")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # train in this process
    arguments = parser.parse_args()
    print(f"| variant | seed | epoch | {' | '.join(SHOWN)} | mean average precision, encoder alone | its log loss |")
    for variant, seed in product(arguments.variant, arguments.seed):
        folder = arguments.runs / f"{variant.replace(' ', '-').replace(',', '')}-{seed}"
        if not (folder / "metrics.json").exists():
            words = [*flags(variant, folder, arguments), "--seed", str(seed)]
            if arguments.here:
                train.MultiLabelFocalLoss = loss_of(variant)
                sys.exit(train.main(words))
            command = [sys.executable, __file__, "--here", "--variant", variant, "--seed", seed]
            command += ["--data", arguments.data, "--encoder", arguments.encoder, "--runs", arguments.runs]
            subprocess.run([*map(str, command)], check=True, stdout=sys.stderr)
        metrics = json.loads((folder / "metrics.json").read_text())
        alone = (metrics[f"without_lexical_head_test_{name}"] for name in ("mean_average_precision", "log_loss"))
        cells = [f"{factor * metrics[f'test_{name}']:.{1 if factor > 1 else 3}f}" for name, factor in SHOWN.items()]
        cells += [f"{value * factor:.{digits}f}" for value, factor, digits in zip(alone, (100, 1), (1, 3), strict=True)]
        print(f"| {variant} | {seed} | {metrics['epoch']:.0f} | {' | '.join(cells)} |", flush=True)


def flags(variant: str, folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Write the rows of a run, and return its flags for ``train.py``."""
    data = arguments.data / "hallmarks_of_cancer"
    rows = [*(data / "train.jsonl").open(encoding="utf-8")]
    texts = sorted({json.loads(row)["text"] for row in rows})
    random.Random(0).shuffle(texts)
    scored = set(texts[: round(SCORED * len(texts))])
    arguments.runs.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        kept = [row for row in rows if (json.loads(row)["text"] in scored) == (split == "test")]
        (arguments.runs / f"{split}.jsonl").write_text("".join(kept), encoding="utf-8")
    words = [ROOT / "recipes" / "hallmarks.yaml", "--model_name_or_path", arguments.encoder, "--quantization", "none"]
    words += ["--train_file", arguments.runs / "train.jsonl", "--test_file", arguments.runs / "test.jsonl"]
    words += ["--validation_file", data / "validation.jsonl", "--taxonomy", data / "taxonomy.json"]
    return [*map(str, words), "--output_dir", str(folder), *FLAGS[variant]]


if __name__ == "__main__":
    main()
