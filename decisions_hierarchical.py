"""What the two forms of label mean: one path a text (`OnePath`), or any number of nodes
(`ManyNodes`).

Worth knowing:

1. Both classes have the same methods, and `build_decisions` chooses between them. No other code
   asks which form it has.
2. Decision scores (B, num_nodes) are the output of the heads. `OnePath` normalises them among
   siblings by a softmax. For `ManyNodes`, each is the logit of a binary decision: the node is
   present, given that its parent is.
3. A label is a list of node ids. `targets` makes the arrays that losses and metrics read.
4. This file has no parameters and fits nothing. Fits, metrics and the focal loss are not published
   with a checkpoint.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, one_hot, pad
from torch.special import entr

try:
    from .configuration_hierarchical import MULTI_LABEL, SINGLE_LABEL, Calibration
    from .taxonomy_hierarchical import Taxonomy, quote_name
except ImportError:  # as a top-level module of the repository, not as remote code of a checkpoint
    from configuration_hierarchical import MULTI_LABEL, SINGLE_LABEL, Calibration
    from taxonomy_hierarchical import Taxonomy, quote_name

IGNORED_LABEL = -100
ROOT_PARENT_LOGIT = 1e4  # the logit above the roots: its sigmoid is 1
DEFAULT_THRESHOLD = 0.5  # least probability of a predicted node, before calibration
# of naming a node in a prediction set of one path, in leaves. The least product of both sizes, on
# average over coverages of 80, 90 and 95 % on validation rows of OHSUMED: see
# benchmarks/coverage.py
NODE_PRICE = 1.5
THRESHOLD_STEPS = 10**6  # thresholds of one path are multiples of 1e-6
MIN_FREQUENCY = 1e-9  # of a node: with 0 or 1, the odds of a certain node would be undefined
# of prediction sets: one for all texts; or for each band of confidence, its greatest probability
# and its threshold
SetThreshold = float | list[tuple[float, float]]


def segment_logsumexp(scores: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Compute the logsumexp within groups of columns, (B, N) to (B, num_groups), for group ids
    (N,). No group may be empty.
    """
    index = group.expand_as(scores)
    peak = scores.new_full((scores.shape[0], num_groups), -torch.inf)
    peak = peak.scatter_reduce(1, index, scores.detach(), "amax")
    total = torch.zeros_like(peak).scatter_add(1, index, (scores - peak.gather(1, index)).exp())
    return peak + total.log()


def sum_per_item(values: Tensor, num_items: Tensor | int | None) -> Tensor:
    """Sum the values (B,) of texts, and divide by ``num_items``, by default their number."""
    return values.sum() / (len(values) if num_items is None else num_items)


def calibrate(
    scores: Any, lexical_scores: Any, lexical_weight: float | None, scales: Any, biases: Any
) -> Any:
    """Return  scales · (scores + lexical_weight · lexical_scores) + biases  for tensors or arrays
    (B, N); see `Calibration`.

    Without a lexical head, ``lexical_scores`` are None.
    """
    if lexical_scores is not None:
        scores = scores + lexical_weight * lexical_scores
    return scales * scores + biases


# ── What both forms share ─────────────────────────────────────────────────────────────────────────


class Decisions(nn.Module):
    """The decisions of a taxonomy: base class of `OnePath` and `ManyNodes`.

    A decision chooses one of its outcomes. These are numbered 0 to K - 1 over all decisions.

    Attributes:
        num_classes: the columns of ``logits``. The classes are the first nodes.
        guarantee: the argument of the pipeline that asks for a prediction set. scores_are_relative:
        whether the scores of siblings can all grow by the same number, and no probability changes.
        outcome_decision: for each outcome, a number that it shares with the other outcomes of its
        decision, (K,).
    """

    guarantee: str
    scores_are_relative: bool

    def __init__(self, tree: Taxonomy, num_classes: int):
        super().__init__()
        self.tree = tree
        self.num_classes = num_classes
        self.num_nodes = tree.num_nodes
        self.num_leaves = tree.num_leaves
        self.num_decisions = len(tree.decisions)
        for name in ("decision_of", "parents"):
            self.register_buffer(
                name, torch.empty(tree.num_nodes, dtype=torch.long), persistent=False
            )
        self.fill_tree_buffers()

    def fill_tree_buffers(self) -> None:
        self.decision_of.copy_(torch.tensor(self.tree.decision_of))
        self.parents.copy_(torch.tensor(self.tree.parents))

    # ── Up and down the tree ──────────────────────────────────────────────────────────────────────

    def of_parents(self, values: Tensor, above_roots: float = 0.0) -> Tensor:
        """Return the value of each node's parent, (B, N) to (B, N). Roots get ``above_roots``."""
        # a root's -1 selects the padding
        return pad(values, (0, 1), value=above_roots)[:, self.parents]

    def sum_to_root(self, values: Tensor) -> Tensor:
        """Add to each node's value those of all its ancestors, (B, N) to (B, N)."""
        total = values
        for _ in range(self.tree.depth - 1):  # each pass reaches one level more
            total = values + self.of_parents(total)
        return total

    def from_children(self, values: Tensor, combine: Callable[[Tensor], Tensor]) -> Tensor:
        """Add to each inner node's value what ``combine``, (B, N) to (B, num_decisions), makes of
        its children's totals.
        """
        total = values
        for _ in range(self.tree.depth - 1):  # each pass carries the values one level up
            # the first decision is at the roots; the others are in the order of the inner nodes,
            # which follow the leaves
            total = values + pad(combine(total)[:, 1:], (self.num_leaves, 0))
        return total

    def sum_by_decision(self, values: Tensor) -> Tensor:
        """Add up the values of each decision's nodes, (B, N) to (B, num_decisions)."""
        empty = values.new_zeros(len(values), self.num_decisions)
        return empty.scatter_add(1, self.decision_of.expand_as(values), values)

    def sum_at_or_below(self, values: Tensor) -> Tensor:
        """Add to each node's value those of all nodes below it, (B, N) to (B, N)."""
        return self.from_children(values, self.sum_by_decision)

    def sum_of_children(self, values: Tensor) -> Tensor:
        """Return the sum of the values of each node's children, (B, N) to (B, N)."""
        return pad(self.sum_by_decision(values)[:, 1:], (self.num_leaves, 0))  # see `from_children`

    def of_classes(self, values: Tensor) -> Tensor:
        """Turn scores of the classes (B, num_classes) into decision scores (B, N)."""
        return self.inclusive(pad(values, (0, self.num_nodes - self.num_classes)))

    # ── Labels ────────────────────────────────────────────────────────────────────────────────────

    def loss(
        self, scores: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Return the negative log-likelihood in nats of labels as of `targets`, see
        `sum_per_item`.
        """
        return sum_per_item(
            -(self.outcome_targets(labels) * self.outcome_log_probs(scores)).sum(1),
            num_items_in_batch,
        )

    def count_outcomes(self, labels: Tensor) -> Tensor:
        """Sum up `outcome_targets` over the texts: (K,) in float64."""
        # all rows at once would take several times the memory of the labels
        return sum(self.outcome_targets(rows).double().sum(0) for rows in labels.split(1024))

    # ── Other class frequencies ───────────────────────────────────────────────────────────────────

    def adapt(self, probabilities: Tensor, fitted: Tensor, prior: Tensor) -> Tensor:
        """Correct node probabilities (B, N) for other frequencies of the classes than the fit had,
        see `adapt_classes`.
        """
        return self.from_classes(
            self.adapt_classes(probabilities[:, : self.num_classes], fitted, prior)
        )

    # ── Predictions ───────────────────────────────────────────────────────────────────────────────

    def entropies(self, probabilities: Tensor) -> Tensor:
        """Return what each level's decisions add to the entropy of a prediction in nats,
        (B, depth), from P(node), (B, N).

        The sum is the entropy of the leaf, or with many nodes of the set of nodes, by the chain
        rule (Cover and Thomas, 2006, "Elements of Information Theory", theorem 2.5.1).
        """
        above = self.of_parents(probabilities, 1.0)
        terms = above * self.entropy_terms(self.given_parent(probabilities))
        return terms @ one_hot(torch.tensor(self.tree.levels) - 1).to(above)

    def given_parent(self, probabilities: Tensor) -> Tensor:
        """Return P(node | parent), (B, N), from P(node), (B, N).

        Below a parent of probability 0, it is 0.
        """
        return (probabilities / self.of_parents(probabilities, 1.0)).nan_to_num().clamp(0, 1)

    def set_threshold(
        self, calibration: Calibration, prior: Tensor | None = None, **shares: float | None
    ) -> SetThreshold | None:
        """Return the threshold of prediction sets for the given one of ``coverage`` and ``recall``;
        None if none is given.

        With the ``prior`` of `adapt`, it is for texts with these class frequencies, and uncorrected
        probabilities.

        Raises:
            ValueError: it is the guarantee of the other form of label, or has no threshold in this
            checkpoint.
        """
        given = {name: share for name, share in shares.items() if share is not None}
        for name in given.keys() - {self.guarantee}:
            raise ValueError(
                f"this checkpoint guarantees a {self.guarantee}, no {name}: give {self.guarantee}"
            )
        if not given:
            return None
        threshold = guaranteed_threshold(self.guarantee, given[self.guarantee], calibration)
        return (
            threshold
            if prior is None
            else self.shifted_threshold(given[self.guarantee], calibration, prior)
        )


def build_decisions(tree: Taxonomy, problem_type: str) -> "OnePath | ManyNodes":
    """Return the decisions of a taxonomy for a form of label, ``problem_type`` of the
    configuration.
    """
    return {SINGLE_LABEL: OnePath, MULTI_LABEL: ManyNodes}[problem_type](tree)


# ── One path a text ───────────────────────────────────────────────────────────────────────────────


class OnePath(Decisions):
    """A text has one path from a root to a leaf. The siblings of a decision share a softmax, and
    are its outcomes.

    P(node) = P(parent) · P(node | parent). The classes are the leaves. A label that is an inner
    node says nothing about the decisions below it.
    """

    guarantee = "coverage"
    scores_are_relative = True
    node_price = NODE_PRICE

    def __init__(self, tree: Taxonomy):
        super().__init__(tree, tree.num_leaves)

    # ── Probabilities ─────────────────────────────────────────────────────────────────────────────

    def inclusive(self, scores: Tensor) -> Tensor:
        """Add the logsumexp of the children's scores to the inner nodes' own scores, (B, N) to
        (B, N).
        """
        return self.from_children(
            scores, lambda total: segment_logsumexp(total, self.decision_of, self.num_decisions)
        )

    def energy(self, scores: Tensor) -> Tensor:
        """Return minus the logsumexp of the roots' inclusive scores (B, N): high for a text that no
        class claims, (B,).

        From Liu et al., 2020, "Energy-based out-of-distribution detection".
        """
        return -scores[:, self.tree.children(-1)].logsumexp(1)

    def forward(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of all nodes (B, N), and the logits: those of the leaves
        (B, num_leaves).
        """
        total = self.sum_to_root(self.outcome_log_probs(scores))
        return total, total[:, : self.num_leaves]

    def log_probs(self, logits: Tensor) -> Tensor:
        """Return log-probabilities of all nodes (B, N) from logits."""
        return self.of_classes(logits.log_softmax(1))

    # ── Nodes without training ────────────────────────────────────────────────────────────────────

    def passed_down(self, own: Tensor) -> Tensor:
        """Return what the own scores of a node and its ancestors add to the log-odds of the leaves
        below it, (B, N): their sum.

        Before the calibration, P(leaf) is the softmax over all leaves of the sum of own scores
        along the path.
        """
        return self.sum_to_root(own)

    # ── Labels ────────────────────────────────────────────────────────────────────────────────────

    def targets(self, nodes: Sequence[Sequence[int]]) -> Tensor:
        """Return the ids of the texts' nodes, (B,). ValueError: a text has not exactly one."""
        return torch.tensor([node for (node,) in nodes], dtype=torch.long)

    @property
    def outcome_decision(self) -> Tensor:
        return self.decision_of

    def outcome_log_probs(self, scores: Tensor) -> Tensor:
        """Return log P(node | parent), (B, N)."""
        return (
            scores
            - segment_logsumexp(scores, self.decision_of, self.num_decisions)[:, self.decision_of]
        )

    def outcome_targets(self, labels: Tensor) -> Tensor:
        """Return 1 for each node on the path to the label, and 0 elsewhere, (B, N).

        For a label of -100, all are 0.
        """
        labels = labels.to(self.parents.device)
        is_known = labels != IGNORED_LABEL
        return self.sum_at_or_below(
            one_hot(labels.where(is_known, 0), self.num_nodes) * is_known[:, None].float()
        )

    def expected_targets(self, scores: Tensor) -> Tensor:
        """Return the expectation of `outcome_targets`, from decision scores (B, N): P(node),
        (B, N).
        """
        return self(scores)[0].exp()

    def from_labels(self, given: Mapping[int, float]) -> Tensor:
        """Return P(node), (N,), in proportion to the sum of the numbers given at or below each
        node.

        Raises:
            ValueError: all are 0, or those below a node with a number are.
        """
        numbers = torch.zeros(self.num_nodes)
        for node, number in given.items():
            numbers[self.tree.path(node)] += number
        if not numbers.any():
            raise ValueError("at least one number must be above 0")
        for node, number in given.items():
            below = self.tree.children(node)
            if number and below and not numbers[below].any():
                raise ValueError(
                    f"share the number of {quote_name(self.tree.labels[node])} among the "
                    "labels below it"
                )
        return numbers / numbers[self.tree.children(-1)].sum()

    def scores_of(self, probabilities: Tensor) -> Tensor:
        """Return decision scores (B, N) with these P(node), (B, N)."""
        return self.given_parent(probabilities).clamp(min=MIN_FREQUENCY).log()

    def log_likelihood(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return log P(label), (B,)."""
        return (self.outcome_targets(labels) * self.outcome_log_probs(scores)).sum(1)

    def smoothing(self, counts: Tensor) -> Tensor:
        """Return the distribution that label smoothing mixes with the labels: uniform over
        siblings, (K,).
        """
        return 1 / torch.bincount(self.decision_of)[self.decision_of]

    def initial_biases(self, counts: Tensor) -> Tensor:
        """Return biases of untrained heads, (N,), from `count_outcomes`: 0."""
        return torch.zeros(self.num_nodes)

    def divergence(self, one: Tensor, other: Tensor) -> Tensor:
        """Compute the symmetric Kullback-Leibler divergence of two predictions in nats, half the
        sum of both: (B,).

        Arguments are decision scores, (B, N).
        """
        log_p, log_q = (self(scores)[1] for scores in (one, other))
        return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(1) / 2

    # ── Other class frequencies ───────────────────────────────────────────────────────────────────

    def from_classes(self, probabilities: Tensor) -> Tensor:
        """Return the probabilities of all nodes (B, N) from those of the leaves."""
        return self.sum_at_or_below(pad(probabilities, (0, self.num_nodes - self.num_leaves)))

    def adapt_classes(self, probabilities: Tensor, fitted: Tensor, prior: Tensor) -> Tensor:
        """Return P(leaf) · prior / fitted, scaled to a sum of 1, (B, num_leaves), from frequencies
        (num_leaves,).

        By Bayes' theorem these are the probabilities under the ``prior``, if texts of a leaf look
        the same under both.
        """
        weighted = probabilities * (prior / fitted)
        return weighted / weighted.sum(1, keepdim=True)

    def check_prior(self, prior: Tensor) -> Tensor:
        """Scale class frequencies to a sum of 1, (num_leaves,). ValueError: all are 0."""
        if not prior.sum() > 0:
            raise ValueError("prior: the frequency of at least one class must be above 0")
        return prior / prior.sum()

    def shifted_threshold(
        self, coverage: float, calibration: Calibration, prior: Tensor
    ) -> SetThreshold:
        """Return the threshold of prediction sets for a coverage among texts whose leaves have the
        frequencies ``prior``.

        Frequencies that are not shifted have the usual thresholds by confidence. All others have
        one for all texts.

        This is weighted conformal prediction (Podkopaev and Ramdas, 2021, "Distribution-free
        uncertainty quantification for classification under label shift"). A validation text has the
        weight prior / fitted of its label, or the mean over several labels. The weight of the new
        text depends on its unknown label, so the largest one counts.

        Raises:
            ValueError: the checkpoint stores no scores, or the validation texts are too few for
            these weights.
        """
        if calibration.set_scores is None or calibration.set_labels is None:
            raise ValueError(
                "this checkpoint stores no scores for coverage with prior: leave out "
                "coverage or prior"
            )
        fitted = torch.tensor(calibration.prior, dtype=prior.dtype)
        if torch.allclose(prior, fitted):
            return guaranteed_threshold(self.guarantee, coverage, calibration)
        # a label may be an inner node
        of_prior, of_fit = self.from_classes(torch.stack([prior, fitted]))
        weights = of_prior / of_fit
        of_texts = torch.stack([weights[labels].mean() for labels in calibration.set_labels])
        scores, order = torch.tensor(calibration.set_scores, dtype=prior.dtype).sort()
        reached = of_texts[order].cumsum(0)
        needed = (
            (threshold_index(coverage) + 1)
            / 100
            * (of_texts.sum() + weights[: self.num_leaves].max())
        )
        if needed > reached[-1]:
            raise ValueError(
                f"coverage {coverage} with this prior needs more validation texts: give a "
                "lower coverage"
            )
        return scores[(reached < needed).sum()].item()

    # ── Predictions ───────────────────────────────────────────────────────────────────────────────

    def entropy_terms(self, given_parent: Tensor) -> Tensor:
        """Return what each node adds to the entropy of the choice among siblings, from P(node |
        parent).
        """
        return entr(given_parent)

    def predict(
        self, probabilities: Tensor, thresholds: list[float] | float | None = None
    ) -> Tensor:
        """Predict the most probable leaf: with its ancestors, (B, N) of bool.

        ``thresholds`` have no effect.
        """
        return self.outcome_targets(probabilities[:, : self.num_leaves].argmax(1)) > 0

    def node_thresholds(self, thresholds: list[float] | None) -> list[float] | None:
        """Return None: leaves compete, and no node has a threshold of its own."""
        return None

    def prediction_sets(self, probabilities: Tensor, threshold: SetThreshold | Tensor) -> Tensor:
        """Return which nodes are in each text's prediction set, (B, num_nodes) bool, from P(node),
        (B, num_nodes).

        Among the sets S with the most probable leaf and no node below another, it is the one with
        the greatest

            P(S) − (1 − threshold) · (leaves(S) + node_price · nodes(S)) / (1 + node_price)

        A leaf alone has a price of 1 − threshold. With a node_price of 0, these are the smallest
        sets of leaves (LAC: Sadinle, Lei and Wasserman, 2019, "Least ambiguous set-valued
        classifiers with bounded error levels"). A larger one has fewer nodes with more leaves. An
        only child is named in place of its parent, because it is more specific.

        The price of a set of leaves, written as its fewest nodes, is submodular. So sets grow with
        the threshold (Topkis, 1978, "Minimizing a submodular function on a lattice"), and split
        conformal prediction applies: see `nonconformity`.
        """
        nodes = probabilities.double()
        confidence, most_probable = nodes[:, : self.num_leaves].max(1)
        price = 1 - threshold_at(threshold, confidence)
        bonus = one_hot(most_probable, self.num_nodes).to(nodes)  # above any price of a leaf
        num_leaves, num_children = self.sizes()
        gain = (
            nodes
            + self.sum_at_or_below(bonus)
            - price * (num_leaves + self.node_price) / (1 + self.node_price)
        )
        gain = gain.masked_fill(num_children == 1, -torch.inf)  # the only child is named

        best = of_children = torch.zeros_like(gain)
        for _ in range(self.tree.depth):  # each pass reaches one level more
            of_children = self.sum_of_children(best)
            best = torch.maximum(gain, of_children)
        named = gain >= of_children
        return named & (self.of_parents(self.sum_to_root(named.double())) == 0)

    def sizes(self) -> tuple[Tensor, Tensor]:
        """Return the numbers of leaves at or below each node, and of its children, (1, num_nodes)
        each.
        """
        ones = torch.ones(1, self.num_nodes, dtype=torch.float64)
        is_leaf = pad(ones[:, : self.num_leaves], (0, self.num_nodes - self.num_leaves))
        return self.sum_at_or_below(is_leaf), self.sum_of_children(ones)

    def held(self, sets: Tensor) -> Tensor:
        """Return the nodes all of whose leaves are at or below the nodes of a set, (B, num_nodes)
        bool to the same.
        """
        leaves = self.sum_to_root(sets.double())[:, : self.num_leaves]
        return (
            self.sum_at_or_below(pad(leaves, (0, self.num_nodes - self.num_leaves)))
            == self.sizes()[0]
        )

    def nonconformity(self, probabilities: Tensor, labels: Tensor) -> Tensor:
        """Return the smallest threshold whose prediction set holds each text's label, all leaves
        below it included, (B,).

        It is rounded up to a multiple of 1 / `THRESHOLD_STEPS`.

        Args:
            probabilities: of all nodes, (B, num_nodes).
            labels: node ids, (B,).
        """
        # not held, and held
        low = torch.full_like(labels, -1)
        high = torch.full_like(labels, THRESHOLD_STEPS)
        while (high - low > 1).any():
            middle = (low + high + 1) // 2  # of a finished text, its high
            sets = self.prediction_sets(probabilities, middle.double() / THRESHOLD_STEPS)
            is_held = self.held(sets).gather(1, labels[:, None])[:, 0]
            low = torch.where(is_held, low, middle)
            high = torch.where(is_held, middle, high)
        return high.double() / THRESHOLD_STEPS


# ── Any number of nodes a text ────────────────────────────────────────────────────────────────────


class ManyNodes(Decisions):
    """A text has any number of nodes, and the ancestors of each. A node is a binary decision, given
    its parent.

    P(node) = P(parent) · σ(score), at most that of its parent. The classes are all nodes. The
    outcomes are the presence of each node, and then its absence. A node without a label below it is
    absent.
    """

    guarantee = "recall"
    scores_are_relative = False

    def __init__(self, tree: Taxonomy):
        super().__init__(tree, tree.num_nodes)

    # ── Probabilities ─────────────────────────────────────────────────────────────────────────────

    def inclusive(self, scores: Tensor) -> Tensor:
        """Return the scores (B, N) as they are: a node's score does not depend on its
        children's.
        """
        return scores

    def energy(self, scores: Tensor) -> Tensor:
        """Return minus the sum of log(1 + exp(score)) over the roots, from scores (B, N): high for
        a text that has no root, (B,).

        From Wang et al., 2021, "Can multi-label classification networks know what they don't
        know?".
        """
        return logsigmoid(-scores[:, self.tree.children(-1)]).sum(1)

    def forward(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of all nodes (B, N), and the logits of these probabilities
        (B, N).
        """
        logits = self.marginal_logits(scores)
        return self.log_probs(logits), logits

    def log_probs(self, logits: Tensor) -> Tensor:
        """Return log-probabilities of all nodes (B, N) from logits."""
        return logsigmoid(logits)

    def marginal_logits(self, scores: Tensor) -> Tensor:
        """Return the logits u of the nodes' probabilities, (B, N) to (B, N), from scores z: u = z
        at roots.

        Below, 1 / P = (1 + exp(-u_parent)) · (1 + exp(-z)), so u = -log(exp(-u_parent) + exp(-z) +
        exp(-u_parent - z)). Sums of log-probabilities would lose u where P is close to 1.
        """
        marginal = scores
        for _ in range(self.tree.depth - 1):  # each pass reaches one level more
            above = self.of_parents(marginal, ROOT_PARENT_LOGIT)
            marginal = -torch.logsumexp(torch.stack([-above, -scores, -above - scores]), 0)
        return marginal

    # ── Nodes without training ────────────────────────────────────────────────────────────────────

    def passed_down(self, own: Tensor) -> Tensor:
        """Return what the scores of a node and its ancestors add to the scores below it, (B, N):
        nothing.
        """
        return torch.zeros_like(own)

    # ── Labels ────────────────────────────────────────────────────────────────────────────────────

    def targets(self, nodes: Sequence[Sequence[int]]) -> Tensor:
        """Return 1 for the texts' nodes and their ancestors, and 0 for others, (B, N) of int8."""
        array = np.zeros((len(nodes), self.num_nodes), dtype=np.int8)
        for row, ids in zip(array, nodes, strict=True):
            row[[*self.tree.with_ancestors(ids)]] = 1
        return torch.from_numpy(array)

    @property
    def outcome_decision(self) -> Tensor:
        return torch.arange(self.num_nodes, device=self.parents.device).repeat(2)

    def outcome_log_probs(self, scores: Tensor) -> Tensor:
        """Return log P(node) and log (1 - P(node)), (B, 2 · N)."""
        logits = self.marginal_logits(scores)
        return torch.cat([logsigmoid(logits), logsigmoid(-logits)], 1)

    def outcome_targets(self, labels: Tensor) -> Tensor:
        """Return 1 for presence, and 1 for absence, (B, 2 · N).

        Both are 0 where the label is -100.
        """
        labels = labels.to(self.parents.device)
        return torch.cat([labels == 1, labels == 0], 1).float()

    def expected_targets(self, scores: Tensor) -> Tensor:
        """Return the expectation of `outcome_targets`, from decision scores (B, N): P(node) and 1 -
        P(node), (B, 2 · N).
        """
        return self.outcome_log_probs(scores).exp()

    def from_labels(self, given: Mapping[int, float]) -> Tensor:
        """Return P(node), (N,), from probabilities of some nodes.

        An ancestor is at least as probable. ValueError: one is above 1.
        """
        probabilities = torch.zeros(self.num_nodes)
        for node, probability in given.items():
            if probability > 1:
                raise ValueError(f"a probability must be at most 1, not {probability:g}")
            path = self.tree.path(node)
            probabilities[path] = probabilities[path].clamp(min=probability)
        return probabilities

    def scores_of(self, probabilities: Tensor) -> Tensor:
        """Return decision scores (B, N) with these P(node), (B, N)."""
        return self.given_parent(probabilities).logit(MIN_FREQUENCY)

    def open_decisions(self, labels: Tensor) -> Tensor:
        """Return which decisions are open, (B, N): roots, and children of nodes that the text
        has.
        """
        return self.of_parents(labels, 1) == 1

    def log_likelihood(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return log P(all nodes of the text), (B,): the sum over its open decisions. Labels are 1
        or 0.

        It teaches a node nothing about texts without its parent. Models trained with it rank texts
        worse: so `loss` is of P(node).
        """
        is_open = self.open_decisions(labels)
        present = labels.to(scores)
        log_probs = present * logsigmoid(scores) + (1 - present) * logsigmoid(-scores)
        return torch.where(is_open, log_probs, 0).sum(1)

    def smoothing(self, counts: Tensor) -> Tensor:
        """Return the distribution that label smoothing mixes with the labels: the nodes' rates in
        training, (K,).

        Smoothing towards ½ would make rare nodes too probable.
        """
        present, absent = counts.view(2, -1) + 0.5
        return torch.cat([present, absent]) / (present + absent).repeat(2)

    def initial_biases(self, counts: Tensor) -> Tensor:
        """Return biases of untrained heads, (N,), from `count_outcomes`: log-odds given the parent,
        smoothed by half a text.

        From zero, training would first have to learn these frequencies.
        """
        present, absent = counts.view(2, -1)
        texts = float(present[0] + absent[0])
        # texts with the parent, and without the node
        without = self.of_parents(present[None], texts)[0] - present
        return ((present + 0.5) / (without + 0.5)).log()

    def divergence(self, one: Tensor, other: Tensor) -> Tensor:
        """Compute half the sum of both Kullback-Leibler divergences of two predictions in nats,
        (B,).

        By the chain rule, it is ½ Σ over nodes of P(parent) · KL(p ‖ q) + Q(parent) · KL(q ‖ p),
        where p and q are the probabilities of the decision. Arguments are decision scores, (B, N).
        """
        divergence = torch.zeros_like(one[:, 0])
        for p, q in ((one, other), (other, one)):
            above = self.of_parents(self.marginal_logits(p).sigmoid(), 1.0)
            yes = logsigmoid(p)
            no = logsigmoid(-p)
            gap_yes = yes - logsigmoid(q)
            gap_no = no - logsigmoid(-q)
            divergence = divergence + (above * (yes.exp() * gap_yes + no.exp() * gap_no)).sum(1) / 2
        return divergence

    # ── Other class frequencies ───────────────────────────────────────────────────────────────────

    def from_classes(self, probabilities: Tensor) -> Tensor:
        """Return the probabilities of all nodes, which are the classes."""
        return probabilities

    def adapt_classes(self, probabilities: Tensor, fitted: Tensor, prior: Tensor) -> Tensor:
        """Multiply each node's odds by those of ``prior`` over those of ``fitted``, (B, N), from
        frequencies (N,).

        A node is no more probable than its parent.
        """
        present = probabilities * (prior / fitted)
        absent = (1 - probabilities) * ((1 - prior) / (1 - fitted))
        adapted = present / (present + absent)
        for _ in range(self.tree.depth - 1):  # each pass reaches one level more
            adapted = torch.minimum(adapted, self.of_parents(adapted, 1.0))
        return adapted

    def check_prior(self, prior: Tensor) -> Tensor:
        """Return node frequencies (N,), a little above 0 and below 1.

        ValueError: one is above 1.
        """
        if (prior > 1).any():
            raise ValueError("prior: the frequency of a node must be at most 1")
        return prior.clamp(MIN_FREQUENCY, 1 - MIN_FREQUENCY)

    def shifted_threshold(self, recall: float, calibration: Calibration, prior: Tensor) -> float:
        """Raise ValueError: frequencies of nodes do not tell how often nodes occur together, so no
        recall follows.
        """
        raise ValueError(
            "recall holds for texts with the node frequencies of the validation rows: leave "
            "out recall or prior"
        )

    # ── Predictions ───────────────────────────────────────────────────────────────────────────────

    def entropy_terms(self, given_parent: Tensor) -> Tensor:
        """Return the entropy of each node's decision, from P(node | parent).

        Siblings are independent given their parent.
        """
        return entr(given_parent) + entr(1 - given_parent)

    def predict(
        self, probabilities: Tensor, thresholds: list[float] | float | None = None
    ) -> Tensor:
        """Predict the nodes that reach their thresholds: with their ancestors, (B, N) of bool."""
        least = DEFAULT_THRESHOLD if thresholds is None else thresholds
        reached = probabilities >= torch.as_tensor(least, dtype=probabilities.dtype)
        return self.sum_at_or_below(reached.float()) > 0

    def node_thresholds(self, thresholds: list[float] | None) -> list[float]:
        """Return the least probability at which each node is predicted, from those of the
        calibration, if there are some.
        """
        return thresholds or [DEFAULT_THRESHOLD] * self.num_nodes

    def prediction_sets(self, probabilities: Tensor, threshold: SetThreshold | Tensor) -> Tensor:
        """Return the nodes that reach the threshold, (B, num_nodes) bool, from P(node),
        (B, num_nodes).
        """
        confidence = probabilities[:, : self.num_leaves].max(1).values
        return probabilities >= threshold_at(threshold, confidence.double())


# ── Prediction sets with a guarantee ──────────────────────────────────────────────────────────────


def threshold_index(share: float) -> int:
    """Return the index of a coverage or recall, rounded up to a hundredth, among the thresholds for
    1 % to 99 %.
    """
    return max(1, math.ceil(round(100 * share, 6))) - 1


def threshold_at(threshold: SetThreshold | Tensor, confidence: Tensor) -> Tensor:
    """Return each text's threshold, (B, 1), from the probability of its most probable leaf, (B,).

    A tensor has one for each.
    """
    if isinstance(threshold, list):
        edges, thresholds = (
            torch.tensor(values, dtype=torch.float64) for values in zip(*threshold, strict=True)
        )
        threshold = thresholds[torch.bucketize(confidence, edges).clamp(max=len(edges) - 1)]
    return torch.as_tensor(threshold, dtype=torch.float64).expand(len(confidence))[:, None]


def guaranteed_threshold(name: str, share: float, calibration: Calibration) -> SetThreshold:
    """Return the threshold for a coverage or recall, rounded up to a hundredth, or raise ValueError
    if there is none.
    """
    thresholds = calibration.set_thresholds
    if not isinstance(share, Real) or not (share > 0 and round(share, 6) <= 0.99):
        raise ValueError(f"{name} must be a number above 0 and at most 0.99, not {share!r}")
    if thresholds is None:
        raise ValueError(
            f"this checkpoint was not calibrated: {name} needs one that was trained with "
            "validation rows"
        )
    index = threshold_index(share)
    threshold = thresholds[index]
    if threshold is None:
        needed = -(-100 // (99 - index)) - 1
        problem = (
            f"needs {needed} labelled validation texts, and the checkpoint was calibrated on fewer"
        )
        raise ValueError(
            f"{name} {share} {problem}: give a lower {name}, or calibrate on more texts"
        )
    if isinstance(threshold, list):
        return [*zip([*(calibration.set_bands or []), 1.0], threshold, strict=True)]
    return threshold
