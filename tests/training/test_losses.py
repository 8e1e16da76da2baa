"""Compare losses and divergences of both forms of label with their formulas, one text and one
decision at a time.
"""

import itertools

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor

from decisions_hierarchical import Decisions, ManyNodes, OnePath
from hierarchical_clinicalbert.training.losses import FocalLoss
from taxonomy_hierarchical import Taxonomy

# leaves: c 0, d 1, e 2, g 3, h 4; inner: a 5, b 6, f 7; the roots are a, f, h and g is an only
# child
TREE = Taxonomy({"a": {"b": ["c", "d"], "e": None}, "f": ["g"], "h": None})
# training texts, none of them with h
SINGLE = [[0]] * 6 + [[1]] * 3 + [[2]] * 2 + [[3]] * 4 + [[5]] * 3
SEVERAL = [[0, 1]] * 3 + [[2], [3, 5], [0, 3], [6], [1, 2], [3], []]
FORMS = pytest.mark.parametrize(
    ("decisions", "trained"),
    [(OnePath(TREE), SINGLE), (ManyNodes(TREE), SEVERAL)],
    ids=["one path", "many nodes"],
)


def decisions_by_hand(
    decisions: Decisions, scores: Tensor, label: list[int]
) -> list[tuple[Tensor, list[bool]]]:
    """Return each decision's probabilities of its outcomes, and which outcome the label has."""
    tree = decisions.tree
    has = decisions.tree.with_ancestors(label)
    if isinstance(decisions, OnePath):
        return [
            (scores[siblings].softmax(0), [node in has for node in siblings])
            for siblings in tree.decisions
        ]
    p = [scores[tree.path(node)].sigmoid().prod() for node in range(tree.num_nodes)]
    return [
        (torch.stack([p[node], 1 - p[node]]), [node in has, node not in has])
        for node in range(tree.num_nodes)
    ]


def by_hand(
    decisions: Decisions,
    scores: Tensor,
    labels: list[list[int]],
    trained: list[list[int]],
    gamma: float = 0.0,
    balanced: bool = False,
    smoothing: float = 0.0,
) -> Tensor:
    """Compute the mean of  Σ α · (1 - p)^γ · (-(1 - ε) log p - ε Σ q log p)  over texts with these
    scores and labels.
    """
    per_text = [
        [outcome for _, outcome in decisions_by_hand(decisions, scores[0], label)]
        for label in trained
    ]
    # of each decision's outcomes
    counts = [np.sum(weights, axis=0) for weights in zip(*per_text, strict=True)]
    total = torch.zeros((), dtype=scores.dtype)
    for row, label in zip(scores, labels, strict=True):
        for (p, has), n in zip(decisions_by_hand(decisions, row, label), counts, strict=True):
            alpha = np.ones(len(n))
            texts = np.repeat(np.arange(len(n)), n.astype(int))
            if balanced and len(texts):
                alpha[n > 0] = compute_class_weight("balanced", classes=np.flatnonzero(n), y=texts)
            # smoothing is towards equal shares of siblings, or the node's rate in the training
            # texts
            q = (
                np.full(len(n), 1 / len(n))
                if isinstance(decisions, OnePath)
                else (n + 0.5) / (n.sum() + 1)
            )
            for outcome in np.flatnonzero(has):
                entropy = (
                    -(1 - smoothing) * p[outcome].log()
                    - smoothing * (torch.tensor(q) * p.log()).sum()
                )
                total = total + alpha[outcome] * (1 - p[outcome]) ** gamma * entropy
    return total / len(labels)


def drawn_scores(rows: int) -> Tensor:
    return 2 * torch.randn(rows, TREE.num_nodes, dtype=torch.float64)


@FORMS
@pytest.mark.parametrize(
    ("gamma", "balanced", "smoothing"), [(0.0, False, 0.1), (0.5, True, 0.0), (2.0, True, 0.1)]
)
def test_the_loss_is_the_formula_worked_decision_by_decision(
    decisions, trained, gamma, balanced, smoothing
):
    loss = FocalLoss(decisions, decisions.targets(trained), gamma, balanced, smoothing)
    nodes = [[0], [3], [5], [4], [1]]
    scores = drawn_scores(5)
    if isinstance(decisions, ManyNodes):
        nodes = [[0], [3, 5], [0, 2], [], [4]]
    expected = by_hand(decisions, scores, nodes, trained, gamma, balanced, smoothing)
    torch.testing.assert_close(loss(scores, decisions.targets(nodes)), expected, rtol=1e-6, atol=0)


@FORMS
def test_plain_settings_are_the_models_own_loss(decisions, trained):
    """Compare the losses, also with another divisor of the sum."""
    scores = drawn_scores(2)
    labels = decisions.targets([[0], [5]])
    expected = by_hand(decisions, scores, [[0], [5]], trained)
    for loss in (FocalLoss(decisions, decisions.targets(trained)), decisions.loss):
        torch.testing.assert_close(loss(scores, labels), expected)
        torch.testing.assert_close(loss(scores, labels, 40), expected * 2 / 40)


@FORMS
def test_the_loss_moves_without_the_decisions_that_it_was_given(decisions, trained):
    given = type(decisions)(TREE)  # as evaluation keeps them, on the CPU
    FocalLoss(given, given.targets(trained)).to("meta")
    assert {buffer.device.type for buffer in given.buffers()} == {"cpu"}


@FORMS
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradients_are_finite_where_a_decision_is_certain(decisions, trained, gamma):
    loss = FocalLoss(decisions, decisions.targets(trained), gamma)
    scores = torch.zeros(1, TREE.num_nodes, requires_grad=True)
    certain = scores + torch.tensor([200.0, -200, -200, 200, -200, 200, 200, -200])
    loss(certain, decisions.targets([[0]])).backward()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("score", [60.0, -60.0, 15.0])
def test_marginal_logits_of_extreme_scores_are_finite_and_exact(score):
    scores = torch.full((1, TREE.num_nodes), score, requires_grad=True)
    logits = ManyNodes(TREE)(scores)[1]
    # a node at depth k has 1 / P = (1 + exp(-s))^k, so exp(-u) is this less one
    depth = torch.tensor(TREE.levels, dtype=torch.float64)
    expected = -torch.log(
        torch.expm1(depth * torch.log1p(torch.exp(torch.tensor(-score, dtype=torch.float64))))
    )
    torch.testing.assert_close(logits[0].double(), expected, rtol=1e-5, atol=1e-5)
    logits.sum().backward()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("form", [OnePath, ManyNodes])
def test_divergence_is_that_of_the_distributions_over_labels(form):
    """Compare with the distributions over leaves, or sets of nodes, by enumeration."""
    tree = Taxonomy(["x", {"a": ["b", "c"]}])
    decisions = form(tree)

    def distribution(scores: Tensor) -> Tensor:
        chances = []
        if form is OnePath:
            p = torch.zeros_like(scores)
            for siblings in tree.decisions:
                p[siblings] = scores[siblings].softmax(0)
            return torch.stack([p[tree.path(leaf)].prod() for leaf in range(tree.num_leaves)])
        for has in itertools.product((False, True), repeat=tree.num_nodes):
            chance = torch.ones(())
            for node, parent in enumerate(tree.parents):
                p = scores[node].sigmoid() * (parent == -1 or has[parent])
                chance = chance * (p if has[node] else 1 - p)
            if chance > 0:
                chances.append(chance)
        return torch.stack(chances)

    p, q = torch.randn(2, 3, tree.num_nodes, dtype=torch.float64)
    expected = []
    for pair in zip(p, q, strict=True):
        one, other = map(distribution, pair)
        expected.append(((one - other) * (one.log() - other.log())).sum() / 2)
    torch.testing.assert_close(decisions.divergence(p, q), torch.stack(expected))
    assert not decisions.divergence(p, p).any()


@FORMS
def test_a_teacher_is_learnt_at_its_temperature(decisions, trained):
    """Compare with (1 - w) · CE of the label + w · T² · CE of the teacher's leaves or nodes, with
    all scores divided by T.
    """

    def outcomes(scores: Tensor) -> Tensor:
        if isinstance(decisions, ManyNodes):
            return torch.stack([p for p, _ in decisions_by_hand(decisions, scores, [])])
        of_siblings = {tuple(siblings): scores[siblings].softmax(0) for siblings in TREE.decisions}
        p = {
            node: value
            for siblings, values in of_siblings.items()
            for node, value in zip(siblings, values, strict=True)
        }
        return torch.stack(
            [
                torch.stack([p[node] for node in TREE.path(leaf)]).prod()
                for leaf in range(TREE.num_leaves)
            ]
        )

    weight = 0.3
    temperature = 2.5
    loss = FocalLoss(
        decisions, decisions.targets(trained), teacher_weight=weight, temperature=temperature
    )
    scores = drawn_scores(3)
    teacher = drawn_scores(3)
    nodes = [[0], [3], [5]]
    pairs = zip(scores / temperature, teacher / temperature, strict=True)
    taught = (
        sum(
            -(outcomes(of_teacher) * outcomes(of_student).log()).sum()
            for of_student, of_teacher in pairs
        )
        / 3
    )
    expected = (1 - weight) * by_hand(
        decisions, scores, nodes, trained
    ) + weight * temperature**2 * taught
    torch.testing.assert_close(
        loss(scores, decisions.targets(nodes), teacher_scores=teacher), expected
    )
