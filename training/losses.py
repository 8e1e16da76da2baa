"""The training loss: a focal loss per decision on the path to a document's label.

A decision is a softmax over siblings. A document labelled with an inner node trains only the decisions down to it. With
the defaults, the loss is the model's own negative log-likelihood.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modeling_hierarchical import TreeSoftmax, average_over_labels
from taxonomy_hierarchical import Taxonomy


def balanced_weights(counts: Tensor, group: Tensor) -> Tensor:
    """Weight each class among its siblings by n / (K · n_c), as scikit-learn's ``compute_class_weight("balanced")``.

    n_c of the n documents of K siblings have the class. A class without documents is not counted in K and has weight 1.
    """
    seen = counts > 0
    documents, classes = (torch.bincount(group, values.double())[group] for values in (counts, seen))
    return torch.where(seen, documents / (classes * counts), 1).float()


def weight_of_level(weights: Sequence[float], level: int) -> float:
    """Return the weight of a level of the taxonomy, counted from 1. The last weight serves all deeper levels."""
    return weights[min(level, len(weights)) - 1]


class HierarchicalFocalLoss(nn.Module):
    """Sum over the decisions on a label's path of  w_level · α_class · (1 - p)^γ · CE, divided by the number of labels.

    p is the probability of the correct child among its siblings, and CE its cross-entropy, with label smoothing ε:
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
        group, ancestors = self.decisions.group, self.decisions.ancestors
        size = torch.bincount(group)[group]
        levels = torch.tensor([weight_of_level(level_weights, level) for level in range(1, tree.depth + 1)])
        # an only child is no decision: its p is 1 whatever the weights, and so are its loss and gradient 0
        weights = (balanced_weights(counts, group) if balanced else torch.ones(tree.num_nodes)) * (size > 1)
        self.register_buffer("parents", torch.tensor([p if p >= 0 else tree.num_nodes for p in tree.parents]))
        self.register_buffer("size", size)
        self.register_buffer("weights", nn.functional.pad(weights, (0, 1))[ancestors] * levels)  # (num_nodes, depth)

    def forward(self, node_log_probs: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the loss in nats for log-probabilities (B, num_nodes) of the model and labels (B,); -100 is ignored."""
        nodes = labels.clamp(min=0)
        # (B, num_nodes): log P(node | parent)
        conditional = node_log_probs - nn.functional.pad(node_log_probs, (0, 1))[:, self.parents]
        path = self.decisions.ancestors[nodes]
        log_p = nn.functional.pad(conditional, (0, 1)).gather(1, path)  # (B, depth)
        loss = -log_p
        if self.label_smoothing:
            group = self.decisions.group
            groups = group.expand_as(conditional)
            over_siblings = torch.zeros_like(conditional).scatter_add(1, groups, conditional / self.size)
            mean = nn.functional.pad(over_siblings[:, group], (0, 1)).gather(1, path)
            loss = (1 - self.label_smoothing) * loss - self.label_smoothing * mean
        if self.gamma:
            # the floor keeps the slope of x^γ finite at x = 0 when γ < 1
            loss = loss * (-torch.expm1(log_p)).clamp(min=1e-7) ** self.gamma
        return average_over_labels((loss * self.weights[nodes]).sum(1), labels, num_items_in_batch)
