import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from modeling_hierarchical import negative_log_likelihood
from taxonomy_hierarchical import Taxonomy
from training.losses import HierarchicalFocalLoss, balanced_weights

# leaves: c 0, d 1, e 2, g 3, h 4; inner: a 5, b 6, f 7; the roots are a, f, h and g is an only child
TREE = Taxonomy({"a": {"b": ["c", "d"], "e": None}, "f": ["g"], "h": None})
LABELS = torch.tensor([0] * 6 + [1] * 3 + [2] * 2 + [3] * 4 + [4] * 2 + [5] * 3 + [-100])


def node_counts(labels: torch.Tensor = LABELS) -> torch.Tensor:
    return torch.tensor(TREE.count_at_or_below(labels.tolist()))


def log_probs(rows: int = 6) -> torch.Tensor:
    """Draw consistent log-probabilities of all nodes, from one softmax per group of siblings."""
    scores, conditional = torch.randn(rows, TREE.num_nodes) * 2, torch.empty(rows, TREE.num_nodes)
    for parent in [-1, *range(TREE.num_leaves, TREE.num_nodes)]:
        conditional[:, TREE.children(parent)] = scores[:, TREE.children(parent)].log_softmax(-1)
    return torch.stack([conditional[:, TREE.path(i)].sum(-1) for i in range(TREE.num_nodes)], 1)


def by_hand(node_log_probs, labels, weights, gamma=0.0, level_weights=(1.0,), smoothing=0.0):
    """Compute the loss by its formula, one document and one decision at a time."""
    total, items = torch.zeros(()), 0
    for row, label in zip(node_log_probs, labels.tolist(), strict=True):
        if label == -100:
            continue
        items += 1
        for level, node in enumerate(TREE.path(label)):
            siblings = TREE.children(TREE.parents[node])
            if len(siblings) == 1:
                continue
            scores = row[siblings] - (row[TREE.parents[node]] if TREE.parents[node] >= 0 else 0)
            log_p = scores[siblings.index(node)]
            cross_entropy = -(1 - smoothing) * log_p - smoothing * scores.mean()
            weight = weights[node] * level_weights[min(level, len(level_weights) - 1)]
            total = total + weight * (1 - log_p.exp()) ** gamma * cross_entropy
    return total / items


def test_plain_settings_are_the_models_own_loss():
    counts, x, labels = node_counts(), log_probs(), torch.tensor([0, 3, -100, 5, 6, 4])
    plain = HierarchicalFocalLoss(TREE, counts)
    torch.testing.assert_close(plain(x, labels), negative_log_likelihood(x, labels))
    torch.testing.assert_close(plain(x, labels, 40), negative_log_likelihood(x, labels, 40))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_formula_worked_decision_by_decision(gamma, balanced, smoothing):
    counts, x, labels = node_counts(), log_probs(), torch.tensor([0, 3, -100, 5, 2, 1])
    group = torch.tensor(TREE.decision_of)
    loss = HierarchicalFocalLoss(TREE, counts, gamma, balanced, [0.3, 0.7], smoothing)
    weights = balanced_weights(counts, group) if balanced else torch.ones(TREE.num_nodes)
    torch.testing.assert_close(loss(x, labels), by_hand(x, labels, weights, gamma, (0.3, 0.7), smoothing))


def test_balanced_weights_are_scikit_learns_among_siblings():
    counts = node_counts()
    weights = balanced_weights(counts, torch.tensor(TREE.decision_of))
    for parent in (-1, TREE.id("a"), TREE.id("b")):
        children = TREE.children(parent)
        documents = np.repeat(children, counts[children].tolist())
        expected = compute_class_weight("balanced", classes=np.array(children), y=documents)
        np.testing.assert_allclose(weights[children].numpy(), expected, rtol=1e-6)


def test_classes_without_documents_break_nothing():
    counts = node_counts(torch.tensor([0, 0, 2]))
    for balanced in (False, True):
        loss = HierarchicalFocalLoss(TREE, counts, 2.0, balanced, [1.0], 0.1)
        assert loss(log_probs(2), torch.tensor([4, 1])).isfinite()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_gradients_are_finite_where_a_decision_is_certain(gamma):
    scores = torch.zeros(1, TREE.num_nodes, requires_grad=True)
    certain = scores + torch.tensor([0.0, -200, -200, 0, -200, 0, 0, -200])
    loss = HierarchicalFocalLoss(TREE, node_counts(), gamma)(certain, torch.tensor([0]))
    loss.backward()
    assert scores.grad.isfinite().all()


def test_no_labels_at_all_is_a_loss_of_zero_with_a_gradient():
    x = log_probs().requires_grad_()
    loss = HierarchicalFocalLoss(TREE, node_counts(), 2.0)(x, torch.full((6,), -100))
    loss.backward()
    assert loss == 0
    assert x.grad.abs().sum() == 0
