"""Multi-label data: label arrays, the training loss, and the divergence of two halves.

A text with a node has all its ancestors. Each node is a decision given its parent, open where the text has the parent.
"""

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from pyarrow.types import is_nested
from torch import Tensor, nn

from modeling_hierarchical import IGNORED_LABEL, TreeSigmoid, average_over_labels
from taxonomy_hierarchical import Taxonomy
from training.losses import weight_of_level


def multi_hot(taxonomy: Taxonomy, labels: Sequence[Sequence[int]], incomplete: bool = False) -> np.ndarray:
    """Return the labels of texts as an array (num_texts, num_nodes) of int8: 1 for a text's nodes and their ancestors.

    If ``incomplete``, all nodes below the deepest ones are -100.
    """
    array = np.zeros((len(labels), taxonomy.num_nodes), dtype=np.int8)
    for row, nodes in zip(array, labels, strict=True):
        row[list(taxonomy.with_ancestors(nodes))] = 1
        if incomplete:
            for node in taxonomy.deepest(nodes):
                row[taxonomy.nodes_below[node]] = IGNORED_LABEL
    return array


def label_arrays(rows: Dataset) -> np.ndarray:
    """Return the column ``labels`` of tokenized rows: node ids (num_rows,), or arrays (num_rows, num_nodes) of int8."""
    column = rows.with_format("arrow")[:].column("labels").combine_chunks()
    if not is_nested(column.type):
        return np.array(column)
    return np.array(column.flatten()).reshape(len(rows), -1)


def open_decisions(taxonomy: Taxonomy, labels: np.ndarray) -> np.ndarray:
    """Return whether a node's label is known, and its parent's is 1 or it is a root: (num_rows, num_nodes)."""
    return TreeSigmoid(taxonomy).open_decisions(torch.from_numpy(labels)).numpy()


def open_counts(taxonomy: Taxonomy, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count each node's positive rows of `multi_hot`, and the rows in which its decision is open: (num_nodes,) each."""
    is_open = open_decisions(taxonomy, labels)
    return ((labels == 1) & is_open).sum(0), is_open.sum(0)


def prior_log_odds(taxonomy: Taxonomy, labels: np.ndarray) -> np.ndarray:
    """Return each node's log-odds given its parent, smoothed by half a row of each outcome: (num_nodes,).

    Biases start there. From zero, training would first have to learn these frequencies.
    """
    positive, total = open_counts(taxonomy, labels)
    return np.log((positive + 0.5) / (total - positive + 0.5))


class MultiLabelFocalLoss(nn.Module):
    """Sum over a text's known nodes of  w_level · α · (1 - p)^γ · BCE, divided by the number of texts.

    p is the probability of the correct outcome. BCE is the binary cross-entropy of P(node) with the target
    (1 - ε) · y + ε · r. Here r is the node's rate in the training rows. Smoothing towards ½ would make rare nodes too probable.
    If ``balanced``, α is n / (2 · n_y) for outcome y of a node that is known in n training rows. See also
    `HierarchicalFocalLoss`. With the defaults it is the model's own loss.

    The likelihood of the open decisions teaches a node nothing about texts without its parent. Models trained with it rank
    texts worse: docs/experiments.md, "Losses and settings for multi-label models".
    """

    def __init__(
        self,
        tree: Taxonomy,
        labels: np.ndarray,
        gamma: float = 0.0,
        balanced: bool = False,
        level_weights: Sequence[float] = (1.0,),
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        self.gamma, self.label_smoothing = gamma, label_smoothing
        self.decisions = TreeSigmoid(tree)
        positive, total = (labels == 1).sum(0), (labels != IGNORED_LABEL).sum(0)
        outcomes = np.stack([total - positive, positive])  # (2, N): rows with outcome 0 and 1
        alpha = np.where(outcomes > 0, total / np.maximum(2 * outcomes, 1), 1) if balanced else np.ones(outcomes.shape)
        levels = np.array([weight_of_level(level_weights, level) for level in tree.levels])
        self.register_buffer("weights", torch.tensor(alpha * levels, dtype=torch.float32))
        self.register_buffer("rates", torch.tensor((positive + 0.5) / (total + 1), dtype=torch.float32))

    def forward(self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the loss in nats for decision logits (B, num_nodes) and labels (B, num_nodes): 1, 0 or -100."""
        marginal, outcome = self.decisions.marginal_logits(logits), labels.clamp(min=0)
        target = outcome + self.label_smoothing * (self.rates - outcome)
        loss = nn.functional.binary_cross_entropy_with_logits(marginal, target, reduction="none")
        if self.gamma:
            missed = torch.sigmoid((1 - 2 * outcome) * marginal)  # 1 - p
            loss = loss * missed.clamp(min=1e-7) ** self.gamma  # the floor keeps the slope finite when γ < 1
        loss = loss * torch.where(outcome == 1, self.weights[1], self.weights[0])
        return average_over_labels(torch.where(labels != IGNORED_LABEL, loss, 0).sum(1), labels, num_items_in_batch)


def multi_label_symmetric_kl(
    decisions: TreeSigmoid, p: Tensor, q: Tensor, labels: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """Compute half the sum of both Kullback-Leibler divergences of two predictions for a text, in nats.

    By the chain rule, it is ½ Σ over nodes of P(parent) · KL(p ‖ q) + Q(parent) · KL(q ‖ p). It is averaged as the loss is.
    ``p`` and ``q`` are decision logits, (B, num_nodes).
    """
    divergence = torch.zeros_like(p[:, 0])
    for one, other in ((p, q), (q, p)):
        above = nn.functional.pad(decisions.marginal_logits(one).sigmoid(), (0, 1), value=1.0)[:, decisions.parents]
        yes, no = nn.functional.logsigmoid(one), nn.functional.logsigmoid(-one)
        gap_yes, gap_no = yes - nn.functional.logsigmoid(other), no - nn.functional.logsigmoid(-other)
        divergence = divergence + (above * (yes.exp() * gap_yes + no.exp() * gap_no)).sum(1) / 2
    return average_over_labels(divergence, labels, num_items)
