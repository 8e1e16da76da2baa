import itertools
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional

from modeling_hierarchical import TreeSigmoid, binary_cross_entropy
from taxonomy_hierarchical import Taxonomy
from training.label_arrays import multi_hot
from training.losses import MultiLabelFocalLoss, multi_label_symmetric_kl

TREE = Taxonomy(["x", {"a": ["b", {"c": ["d", "e"]}]}])  # leaves x b d e are 0 to 3, a is 4, c is 5
ID = {name: i for i, name in enumerate(TREE.labels)}
UNKNOWN = [-100] * TREE.num_nodes  # the row of a text whose labels are not known


def ids(*names):
    return [ID[name] for name in names]


def row(**values):
    return [values.get(name, 0) for name in TREE.labels]


def test_labels_bring_their_ancestors_and_nothing_else():
    array = multi_hot(TREE, [ids("d"), ids("x", "a"), []])
    assert array.tolist() == [row(a=1, c=1, d=1), row(x=1, a=1), row()]


def test_what_is_below_a_deepest_label_is_unknown_where_labels_are_incomplete():
    array = multi_hot(TREE, [ids("a"), ids("c", "a"), ids("b"), ids("d")], incomplete=True)
    assert array.tolist() == [
        row(a=1, b=-100, c=-100, d=-100, e=-100),
        row(a=1, c=1, d=-100, e=-100),
        row(a=1, b=1),  # that b was chosen says that a was looked into
        row(a=1, c=1, d=1),
    ]


def marginals(z):
    """The product of the probabilities on each node's path."""
    return torch.stack([torch.sigmoid(z[:, TREE.path(node)]).prod(1) for node in range(TREE.num_nodes)], 1)


def test_marginal_logits_are_the_products_of_the_probabilities_on_the_path():
    z = torch.randn(50, 6, dtype=torch.float64) * 3
    torch.testing.assert_close(torch.sigmoid(TreeSigmoid(TREE).marginal_logits(z)), marginals(z))


@pytest.mark.parametrize("score", [60.0, -60.0, 15.0])
def test_marginal_logits_of_extreme_scores_are_finite_and_exact(score):
    z = torch.full((1, 6), score, requires_grad=True)
    u = TreeSigmoid(TREE).marginal_logits(z)
    # a node at depth k has 1 / P = (1 + exp(-s))^k, so exp(-u) is this less one
    depth = torch.tensor(TREE.levels, dtype=torch.float64)
    expected = -torch.log(torch.expm1(depth * torch.log1p(torch.exp(torch.tensor(-score, dtype=torch.float64)))))
    torch.testing.assert_close(u[0].double(), expected, rtol=1e-5, atol=1e-5)
    u.sum().backward()
    assert z.grad.isfinite().all()


def test_the_models_loss_and_that_of_training_are_the_cross_entropy_of_the_known_nodes():
    z = torch.randn(4, 6, dtype=torch.float64)
    rows = np.array([*multi_hot(TREE, [ids("d"), ids("b", "x"), []], incomplete=True), UNKNOWN])
    labels = torch.tensor(rows, dtype=torch.float64)
    known = labels >= 0
    expected = (
        functional.binary_cross_entropy(marginals(z)[known], labels[known], reduction="sum") / 3
    )  # texts with labels
    for loss in (MultiLabelFocalLoss(TREE, rows), partial(binary_cross_entropy, TreeSigmoid(TREE))):
        torch.testing.assert_close(loss(z, labels), expected)
        torch.testing.assert_close(loss(z, labels, num_items_in_batch=6), expected / 2)


def test_focal_factor_weights_and_smoothing_are_those_of_the_formula():
    rows = multi_hot(TREE, [ids("d"), ids("b"), ids("x"), []])
    z, labels = torch.randn(4, 6, dtype=torch.float64), torch.tensor(rows, dtype=torch.float64)
    loss = MultiLabelFocalLoss(TREE, rows, 2.0, True, [1.0, 0.5], 0.1).double()
    probabilities, total = marginals(z), 0.0
    for i, node in itertools.product(range(4), range(6)):
        positive, y = int((rows[:, node] == 1).sum()), int(rows[i, node])
        of_outcome = positive if y else 4 - positive
        target = 0.9 * y + 0.1 * (positive + 0.5) / (4 + 1)
        p = probabilities[i, node]
        entropy = -(target * p.log() + (1 - target) * (1 - p).log())
        wrong = 1 - p if y else p
        total += wrong**2 * entropy * 4 / (2 * of_outcome) * (1.0 if TREE.levels[node] == 1 else 0.5)
    torch.testing.assert_close(loss(z, labels), total / 4, rtol=1e-6, atol=0)


def test_disagreement_is_the_divergence_of_the_distributions_over_sets_of_nodes():
    tree = Taxonomy(["x", {"a": ["b", "c"]}])
    p, q = torch.randn(2, 1, tree.num_nodes, dtype=torch.float64)

    def distribution(z):
        """Probabilities of all sets of nodes, by enumeration."""
        probabilities = {}
        for outcome in itertools.product((0, 1), repeat=tree.num_nodes):
            value = 1.0
            for node, chosen in enumerate(outcome):
                above = tree.parents[node]
                yes = torch.sigmoid(z[0, node]) if above < 0 or outcome[above] else torch.tensor(0.0)
                value = value * (yes if chosen else 1 - yes)
            if value > 0:
                probabilities[outcome] = value
        return probabilities

    one, other = distribution(p), distribution(q)
    expected = sum((one[s] - other[s]) * (one[s].log() - other[s].log()) for s in one) / 2
    labels = torch.zeros(1, tree.num_nodes)
    torch.testing.assert_close(multi_label_symmetric_kl(TreeSigmoid(tree), p, q, labels), expected)
    assert multi_label_symmetric_kl(TreeSigmoid(tree), p, q, labels - 100) == 0
