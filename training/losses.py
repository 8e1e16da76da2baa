"""The training loss: a focal loss per decision on the path to a document's label.

Worth knowing:

1. A decision is a softmax over siblings. A document labelled with an inner node trains only the decisions down to that node.
2. With gamma 0, no class weights, level weights 1 and no smoothing, it is the model's own negative log-likelihood.
3. The sum is divided by the labelled documents of the whole accumulated batch, over all devices. The gradient does not depend
   on how the batch was split.
"""

import torch
from torch import Tensor, nn

from modeling_hierarchical import IGNORED_LABEL
from taxonomy_hierarchical import Taxonomy


def balanced_weights(counts: Tensor, group: Tensor) -> Tensor:
    """Weight each class among its siblings by n / (K · n_c), as scikit-learn's ``compute_class_weight("balanced")``.

    n_c of the n documents of K siblings have the class. A class without documents is not counted in K and has weight 1.

    Args:
        counts: (num_nodes,), documents per node.
        group: (num_nodes,), which nodes are siblings.

    Returns:
        (num_nodes,), float32.
    """
    seen = counts > 0

    def over_siblings(values: Tensor) -> Tensor:
        return torch.zeros(int(group.max()) + 1, dtype=values.dtype).index_add_(0, group, values)[group]

    return torch.where(seen, over_siblings(counts.double()) / (over_siblings(seen.double()) * counts), 1).float()


class HierarchicalFocalLoss(nn.Module):
    """Sum over the decisions on a label's path of  w_level · α_class · (1 - p)^γ · CE, over the number of labels.

    p is the probability of the correct child among its siblings, and CE its cross-entropy, with label smoothing ε:
    -(1 - ε) log p - ε / K · Σ log p_k. The focal factor is from Lin et al. (2017, arXiv 1708.02002).

    Args:
        tree: the taxonomy.
        counts: (num_nodes,), training documents a node, its descendants' included: see `Taxonomy.count_at_or_below`.
        gamma: γ ≥ 0.
        balanced: weight classes by `balanced_weights`; else α is 1.
        level_weights: w of levels 1, 2, …; the last one serves all deeper levels.
        label_smoothing: ε.
    """

    def __init__(
        self,
        tree: Taxonomy,
        counts: Tensor,
        gamma: float = 0.0,
        balanced: bool = False,
        level_weights: list[float] | tuple[float, ...] = (1.0,),
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        self.gamma, self.label_smoothing = gamma, label_smoothing
        group, ancestors = torch.tensor(tree.decision_of), torch.tensor(tree.ancestors)
        self.num_groups = int(group.max()) + 1
        size = torch.bincount(group)[group]
        levels = torch.tensor([level_weights[min(i, len(level_weights) - 1)] for i in range(tree.depth)])
        padding = torch.zeros(1)
        self.register_buffer("group", group)
        self.register_buffer("parents", torch.tensor([p if p >= 0 else tree.num_nodes for p in tree.parents]))
        self.register_buffer("ancestors", ancestors)
        self.register_buffer("size", size)
        # an only child is no decision: its p is 1 whatever the weights, and so are its loss and gradient 0
        weights = (balanced_weights(counts, group) if balanced else torch.ones(tree.num_nodes)) * (size > 1)
        self.register_buffer("weights", torch.cat([weights, padding])[ancestors] * levels)  # (num_nodes, depth)

    def forward(self, node_log_probs: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss, in nats.

        Args:
            node_log_probs: (B, num_nodes), as `HierarchicalForSequenceClassification` gives them.
            labels: (B,), node ids; -100 is ignored.
            num_items_in_batch: divisor of the sum. Default: the number of labels in this batch.
        """
        labelled = labels != IGNORED_LABEL
        labels = torch.where(labelled, labels, 0)
        parent_log_probs = nn.functional.pad(node_log_probs, (0, 1))[:, self.parents]
        conditional = node_log_probs - parent_log_probs  # (B, N): log P(node | parent)
        path = self.ancestors[labels]  # (B, depth), padded with N
        log_p = nn.functional.pad(conditional, (0, 1)).gather(1, path)
        loss = -log_p
        if self.label_smoothing:
            over_siblings = conditional.new_zeros(len(labels), self.num_groups).scatter_add(
                1, self.group.expand_as(conditional), conditional / self.size
            )
            mean = nn.functional.pad(over_siblings[:, self.group], (0, 1)).gather(1, path)
            loss = (1 - self.label_smoothing) * loss - self.label_smoothing * mean
        if self.gamma:
            # the floor keeps the slope of x^γ finite at x = 0 when γ < 1
            loss = loss * (-torch.expm1(log_p)).clamp(min=1e-7) ** self.gamma
        loss = (loss * self.weights[labels]).sum(1)
        items = labelled.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return torch.where(labelled, loss, 0).sum() / items
