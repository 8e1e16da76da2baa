"""The focal loss of training. With the default settings, it is the model's own loss."""

import copy

import torch
from torch import Tensor, nn

from decisions_hierarchical import Decisions, sum_per_item
from hierarchical_clinicalbert.training.arguments import HierarchicalTrainingArguments


def balanced_weights(counts: Tensor, group: Tensor) -> Tensor:
    """Weight each outcome of a decision by n / (K · n_c), like scikit-learn's
    ``compute_class_weight("balanced")``.

    n_c of the n texts of a decision with K outcomes have the outcome. An outcome without texts is
    not counted in K and has weight 1.
    """
    seen = counts > 0
    texts, outcomes = (torch.bincount(group, values.double())[group] for values in (counts, seen))
    return torch.where(seen, texts / (outcomes * counts), 1)


class FocalLoss(nn.Module):
    """Sum over the decisions of a text of  α · (1 - p)^γ · CE, divided by the number of texts.

    p is the probability of the correct outcome. CE is its cross-entropy with label smoothing ε: -(1
    - ε) log p - ε · Σ q_k log p_k, with q of `Decisions.smoothing`. The focal factor is from Lin et
    al. (2017, arXiv 1708.02002). α is 1, or with ``balanced`` from `balanced_weights`.

    Args:
        decisions: those of the taxonomy. The loss keeps a copy, which moves to its device.
        labels: of the training rows, as of `Decisions.targets`. Smoothing and weights use their
            frequencies.
        teacher_weight: w of `forward`.
        temperature: T of `forward`.
    """

    def __init__(
        self,
        decisions: Decisions,
        labels: Tensor,
        gamma: float = 0.0,
        balanced: bool = False,
        label_smoothing: float = 0.0,
        teacher_weight: float = 0.0,
        temperature: float = 1.0,
    ):
        super().__init__()
        self.decisions = copy.deepcopy(decisions)
        self.gamma = gamma
        self.label_smoothing = label_smoothing
        self.teacher_weight = teacher_weight
        self.temperature = temperature
        counts = decisions.count_outcomes(labels)
        group = decisions.outcome_decision
        # an only child is no decision: its p is 1 whatever the weights, and so are its loss and
        # gradient 0
        weights = (balanced_weights(counts, group) if balanced else 1) * (
            torch.bincount(group)[group] > 1
        )
        self.register_buffer("group", group.clone())
        self.register_buffer("weights", weights.float())
        self.register_buffer("smoothing", decisions.smoothing(counts).float())

    @classmethod
    def from_arguments(
        cls, args: HierarchicalTrainingArguments, decisions: Decisions, labels: Tensor
    ) -> "FocalLoss":
        """Return the loss that the arguments of a run describe, for the ``labels`` of its rows."""
        return cls(
            decisions,
            labels,
            gamma=args.focal_gamma,
            balanced=args.class_weighting == "balanced",
            label_smoothing=args.label_smoothing_factor,
            teacher_weight=args.teacher_weight,
            temperature=args.teacher_temperature,
        )

    def forward(
        self,
        scores: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        teacher_scores: Tensor | None = None,
    ) -> Tensor:
        """Return the loss in nats for decision scores (B, num_nodes) and labels as of
        `Decisions.targets`.

        With decision scores of a teacher, (B, num_nodes), it is  (1 - w) · L(scores, labels) + w ·
        T² · L(scores / T, q). q are the probabilities of the teacher's scores / T. T² keeps the
        gradient's size (Hinton et al., 2015, arXiv 1503.02531).
        """
        losses = self.of_texts(scores, self.decisions.outcome_targets(labels))
        if teacher_scores is not None:
            expected = self.decisions.expected_targets(teacher_scores / self.temperature)
            taught = self.temperature**2 * self.of_texts(scores / self.temperature, expected)
            losses = (1 - self.teacher_weight) * losses + self.teacher_weight * taught
        return sum_per_item(losses, num_items_in_batch)

    def of_texts(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return each text's loss, (B,), for the shares of the outcomes, (B, K)."""
        log_p = self.decisions.outcome_log_probs(scores)
        loss = -log_p
        if self.label_smoothing:
            index = self.group.expand_as(log_p)
            expected = (
                torch.zeros_like(log_p)
                .scatter_add(1, index, self.smoothing * log_p)
                .gather(1, index)
            )
            loss = (1 - self.label_smoothing) * loss - self.label_smoothing * expected
        if self.gamma:
            # the floor keeps the slope of x^γ finite at x = 0 when γ < 1
            loss = loss * (-torch.expm1(log_p)).clamp(min=1e-7) ** self.gamma
        return (targets * self.weights * loss).sum(1)
