"""Draw labels for which decision scores are correct, in both forms of label."""

import numpy as np
import pytest
from scipy.special import expit, log_expit, log_softmax, logit

from hierarchical_clinicalbert.evaluation.forms import Form, ManyNodesForm, OnePathForm
from taxonomy_hierarchical import Taxonomy

# a at level 1; B > c at level 2; B > D > e, f at level 3; G > h, an only child
TREE = Taxonomy(["a", {"B": ["c", {"D": ["e", "f"]}]}, {"G": ["h"]}])
A, C, E, F, H, B, D, G = range(8)
ONE_PATH = OnePathForm(TREE)
MANY_NODES = ManyNodesForm(TREE)
FORMS = pytest.mark.parametrize("form", [ONE_PATH, MANY_NODES], ids=["one path", "many nodes"])


def node_log_probs(form: Form, scores: np.ndarray) -> np.ndarray:
    """Compute log-probabilities of all nodes, by one softmax for each group of siblings, or one
    sigmoid for each node.
    """
    conditional = log_expit(scores)
    if isinstance(form, OnePathForm):
        for nodes in form.tree.decisions:
            conditional[:, nodes] = log_softmax(scores[:, nodes], axis=1)
    paths = map(form.tree.path, range(form.tree.num_nodes))
    return np.column_stack([conditional[:, path].sum(axis=1) for path in paths])


def logits_of(form: Form, scores: np.ndarray) -> np.ndarray:
    """Return the leaves' log-probabilities, or the logits of the nodes' probabilities."""
    log_probs = node_log_probs(form, scores)
    if isinstance(form, OnePathForm):
        return log_probs[:, : form.tree.num_leaves]
    return logit(np.exp(log_probs))


def draw_labels(form: Form, scores: np.ndarray, seed: int = 0) -> np.ndarray:
    """Draw labels, as the arrays of `Decisions.targets`."""
    generator = np.random.default_rng(seed)
    if isinstance(form, OnePathForm):
        leaves = logits_of(form, scores)
        return (leaves + generator.gumbel(size=leaves.shape)).argmax(axis=1)
    has = generator.random(scores.shape) < expit(scores)
    paths = map(form.tree.path, range(form.tree.num_nodes))
    return np.column_stack([has[:, path].all(axis=1) for path in paths]).astype(np.int8)


def drawn(form: Form, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw logits, and labels for which they are correct."""
    scores = np.random.default_rng(0).normal(-0.5, 1.5, (rows, form.tree.num_nodes))
    return logits_of(form, scores), draw_labels(form, scores, seed=1)
