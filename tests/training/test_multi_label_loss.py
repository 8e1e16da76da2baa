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
        row(a=1, b=1),  # a text with b is known below a
        row(a=1, c=1, d=1),
    ]


def marginals(z):
    """Return for each node the product of the probabilities on its path."""
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


def partly_specific_texts() -> tuple[np.ndarray, np.ndarray]:
    """Return labels, and each node's rate given its parent in the texts where the node is known.

    Of 600 texts with a, 300 have no deeper label. Of the other texts, 200 have c. Of these, 120 have no deeper label, and 60 have d.
    """
    sets = [ids("a")] * 300 + [ids("b")] * 100 + [ids("c")] * 120 + [ids("d")] * 60 + [ids("e")] * 20
    rates = {"x": 200 / 1000, "a": 600 / 1000, "b": 100 / 300, "c": 200 / 300, "d": 60 / 80, "e": 20 / 80}
    labels = multi_hot(TREE, sets + [ids("x")] * 200 + [[]] * 200, incomplete=True)
    return labels, np.array([rates[name] for name in TREE.labels])


def test_an_unknown_node_is_as_probable_as_in_the_texts_in_which_it_is_known():
    labels, rates = partly_specific_texts()
    loss, z = MultiLabelFocalLoss(TREE, labels), torch.zeros(1, 6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([z], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(z.expand(len(labels), 6), torch.tensor(labels))
        value.backward()
        return value

    for _ in range(50):  # the targets of unknown nodes follow the model
        optimizer.step(closure)
    np.testing.assert_allclose(z[0].sigmoid().detach(), rates, rtol=1e-4)


def test_balanced_weights_of_a_node_that_is_often_unknown_are_by_its_expected_number_of_texts():
    labels, rates = partly_specific_texts()
    loss = MultiLabelFocalLoss(TREE, labels, balanced=True)
    marginal = np.array([rates[TREE.path(node)].prod() for node in range(6)])
    np.testing.assert_allclose(loss.weights[1], 1 / (2 * marginal), rtol=0.02)  # rates are smoothed by half a text
    np.testing.assert_allclose(loss.weights[0], 1 / (2 * (1 - marginal)), rtol=0.02)
    np.testing.assert_allclose(loss.rates, marginal, rtol=0.02)


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
        """Return the probabilities of all sets of nodes, by enumeration."""
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
