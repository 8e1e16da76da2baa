"""Define the training losses, and the divergence of two predictions, for single-path and for multi-label data.

For one path, a decision is a softmax over siblings, and a text labelled with an inner node trains only the decisions down to
it. With the default settings, the losses are the model's own.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from modeling_hierarchical import (
    IGNORED_LABEL,
    ROOT_PARENT_LOGIT,
    TreeSigmoid,
    TreeSoftmax,
    average_over_labels,
    has_labels,
)
from taxonomy_hierarchical import Taxonomy
from training.label_arrays import prior_log_odds


def balanced_weights(counts: Tensor, group: Tensor) -> Tensor:
    """Weight each class among its siblings by n / (K · n_c), like scikit-learn's ``compute_class_weight("balanced")``.

    n_c of the n texts of K siblings have the class. A class without texts is not counted in K and has weight 1.
    """
    seen = counts > 0
    texts, classes = (torch.bincount(group, values.double())[group] for values in (counts, seen))
    return torch.where(seen, texts / (classes * counts), 1).float()


def weight_of_level(weights: Sequence[float], level: int) -> float:
    """Return the weight of a level of the taxonomy, counted from 1. The last weight applies to all deeper levels."""
    return weights[min(level, len(weights)) - 1]


class HierarchicalFocalLoss(nn.Module):
    """Sum over the decisions on a label's path of  w_level · α_class · (1 - p)^γ · CE, divided by the number of labels.

    p is the probability of the correct child among its siblings. CE is its cross-entropy with label smoothing ε:
    -(1 - ε) log p - ε / K · Σ log p_k. The focal factor is from Lin et al. (2017, arXiv 1708.02002). α is 1,
    or with ``balanced`` from `balanced_weights` of the counts (num_nodes,) of `Taxonomy.count_at_or_below`.
    """

    def __init__(
        self,
        tree: Taxonomy,
        counts: Tensor,
        gamma: float = 0.0,
        balanced: bool = False,
        level_weights: Sequence[float] = (1.0,),
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        self.gamma, self.label_smoothing = gamma, label_smoothing
        self.decisions = TreeSoftmax(tree)
        group, ancestors = self.decisions.decision_of, torch.tensor(tree.padded_paths)
        size = torch.bincount(group)[group]
        levels = torch.tensor([weight_of_level(level_weights, level) for level in range(1, tree.depth + 1)])
        # an only child is no decision: its p is 1 whatever the weights, and so are its loss and gradient 0
        weights = (balanced_weights(counts, group) if balanced else torch.ones(tree.num_nodes)) * (size > 1)
        self.register_buffer("ancestors", ancestors)
        self.register_buffer("size", size)
        self.register_buffer("weights", nn.functional.pad(weights, (0, 1))[ancestors] * levels)  # (num_nodes, depth)

    def forward(self, node_log_probs: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the loss in nats for log-probabilities (B, num_nodes) of the model and labels (B,); -100 is ignored."""
        nodes = labels.clamp(min=0)
        conditional = node_log_probs - self.decisions.of_parents(node_log_probs)  # log P(node | parent)
        path = self.ancestors[nodes]
        log_p = nn.functional.pad(conditional, (0, 1)).gather(1, path)  # (B, depth)
        loss = -log_p
        if self.label_smoothing:
            group = self.decisions.decision_of
            groups = group.expand_as(conditional)
            over_siblings = torch.zeros_like(conditional).scatter_add(1, groups, conditional / self.size)
            mean = nn.functional.pad(over_siblings[:, group], (0, 1)).gather(1, path)
            loss = (1 - self.label_smoothing) * loss - self.label_smoothing * mean
        if self.gamma:
            # the floor keeps the slope of x^γ finite at x = 0 when γ < 1
            loss = loss * (-torch.expm1(log_p)).clamp(min=1e-7) ** self.gamma
        return average_over_labels((loss * self.weights[nodes]).sum(1), labels, num_items_in_batch)


def expected_labels(decisions: TreeSigmoid, logits: Tensor, labels: Tensor) -> Tensor:
    """Replace unknown labels, -100, by P(node | the text's known nodes), from decision logits: all (B, num_nodes)."""
    given_known = decisions.marginal_logits(torch.where(labels == 1, ROOT_PARENT_LOGIT, logits))
    return torch.where(labels == IGNORED_LABEL, given_known.sigmoid(), labels.to(logits))


class MultiLabelFocalLoss(nn.Module):
    """Sum over a text's nodes of  w_level · α · (1 - p)^γ · BCE, divided by the number of texts.

    p is the probability of the correct outcome. BCE is the binary cross-entropy of P(node) with the target
    (1 - ε) · y + ε · r. Here r is the node's rate in the training rows. Smoothing towards ½ would make rare nodes too probable.
    If ``balanced``, α is n / (2 · n_y) for a node with outcome y in n_y of n training rows. See also
    `HierarchicalFocalLoss`. With the defaults it is the model's own loss, if all labels are known.

    An unknown node's loss is its expectation, by the model's own P(node | known nodes), as in expectation-maximisation
    (Dempster, Laird and Rubin, 1977). Left out, such nodes would get too low probabilities: they are unknown only in texts
    that have a node above, and known to be absent in all others. Counts of outcomes are expectations too, by the rates of the
    open decisions.

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
        labelled, prior = torch.from_numpy(labels), torch.from_numpy(prior_log_odds(tree, labels))
        labelled = labelled[has_labels(labelled)]
        chunks = labelled.split(1024)  # all rows at once would be large in float64
        positive = sum(expected_labels(self.decisions, prior.expand_as(rows), rows).sum(0) for rows in chunks).numpy()
        total = len(labelled)
        outcomes = np.stack([total - positive, positive])  # (2, N): rows with outcome 0 and 1
        alpha = np.ones_like(outcomes)
        if balanced:
            np.divide(total, 2 * outcomes, out=alpha, where=outcomes > 0)
        levels = np.array([weight_of_level(level_weights, level) for level in tree.levels])
        self.register_buffer("weights", torch.tensor(alpha * levels, dtype=torch.float32))
        self.register_buffer("rates", torch.tensor((positive + 0.5) / (total + 1), dtype=torch.float32))

    def forward(self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the loss in nats for decision logits (B, num_nodes) and labels (B, num_nodes): 1, 0 or -100."""
        marginal = self.decisions.marginal_logits(logits)
        expected = expected_labels(self.decisions, logits.detach(), labels)
        loss = (1 - expected) * self.of_outcome(0, marginal) + expected * self.of_outcome(1, marginal)
        return average_over_labels(loss.sum(1), labels, num_items_in_batch)

    def of_outcome(self, outcome: int, marginal: Tensor) -> Tensor:
        """Return the loss (B, num_nodes) of all nodes if all have this outcome."""
        target = (outcome + self.label_smoothing * (self.rates - outcome)).expand_as(marginal)
        loss = nn.functional.binary_cross_entropy_with_logits(marginal, target.to(marginal), reduction="none")
        if self.gamma:
            missed = torch.sigmoid((1 - 2 * outcome) * marginal)  # 1 - p
            loss = loss * missed.clamp(min=1e-7) ** self.gamma  # the floor keeps the slope finite when γ < 1
        return loss * self.weights[outcome]


def symmetric_kl(log_p: Tensor, log_q: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Compute the symmetric Kullback-Leibler divergence of two predictions (B, C) in nats: half the sum of both directions.

    The divergences of the texts are averaged as the loss is, see `average_over_labels`.
    """
    divergence = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(1) / 2
    return average_over_labels(divergence, labels, num_items)


def multi_label_symmetric_kl(
    decisions: TreeSigmoid, p: Tensor, q: Tensor, labels: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """Compute half the sum of both Kullback-Leibler divergences of two predictions for a text, in nats.

    By the chain rule, it is ½ Σ over nodes of P(parent) · KL(p ‖ q) + Q(parent) · KL(q ‖ p). It is averaged as the loss is.
    ``p`` and ``q`` are decision logits, (B, num_nodes).
    """
    divergence = torch.zeros_like(p[:, 0])
    for one, other in ((p, q), (q, p)):
        above = decisions.of_parents(decisions.marginal_logits(one).sigmoid(), 1.0)
        yes, no = nn.functional.logsigmoid(one), nn.functional.logsigmoid(-one)
        gap_yes, gap_no = yes - nn.functional.logsigmoid(other), no - nn.functional.logsigmoid(-other)
        divergence = divergence + (above * (yes.exp() * gap_yes + no.exp() * gap_no)).sum(1) / 2
    return average_over_labels(divergence, labels, num_items)
