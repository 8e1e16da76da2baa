"""Fit what an `OpenWorld` stores: class means and a common covariance from training texts,
references from validation texts.

In this file ``vectors`` are those of the model's outputs, (num_texts, H + 1), the training texts'
without the last column. ``nodes`` are the labelled nodes of each text, with or without their
ancestors.
"""

from copy import deepcopy
from itertools import chain

import numpy as np
import torch
from scipy.sparse import csr_matrix
from sklearn.covariance import ledoit_wolf
from torch import nn

from open_world_hierarchical import MAX_REFERENCES, STRANGE, OpenWorld
from taxonomy_hierarchical import Taxonomy

MIN_REFERENCES = 19  # with fewer, no p-value could be 0.05
# of the least direction, as a share of the largest: below, the inverse covariance is noise
MIN_VARIANCE = 1e-10


@torch.no_grad()
def fit_open_world(
    tree: Taxonomy,
    vectors: np.ndarray,
    nodes: list[list[int]],
    validation_vectors: np.ndarray,
    seed: int = 0,
) -> OpenWorld | None:
    """Fit an `OpenWorld`; return None if validation texts are fewer than `MIN_REFERENCES`, or the
    texts of a class do not differ.

    No text may occur twice.

    The covariance within the classes is shrunk towards a multiple of the identity (Ledoit and Wolf,
    2004, "A well-conditioned estimator for large-dimensional covariance matrices"). A text with
    several labels counts as an equal part of each class.
    """
    if len(validation_vectors) < MIN_REFERENCES:
        return None
    # ── Classes and their common covariance ───────────────────────────────────────────────────────
    center = vectors.mean(0)
    offsets = (vectors - center).astype(np.float64)
    # the share of each text in each class
    classes = texts_by_class(tree, nodes)
    columns = np.repeat(range(len(classes)), [*map(len, classes)])
    rows = np.array([*chain(*classes)], dtype=int)
    shares = 1 / np.bincount(rows)[rows]
    members = csr_matrix((shares, (rows, columns)), shape=(len(nodes), tree.num_nodes + 1))
    sizes = members.sum(axis=0).A1
    means = (members.T @ offsets) / np.maximum(sizes, 1e-12)[:, None]
    covariance, _ = ledoit_wolf(offsets - members @ means, assume_centered=True)
    variances, directions = np.linalg.eigh(covariance)
    if variances[0] <= MIN_VARIANCE * variances[-1]:
        return None
    whitening = directions / np.sqrt(variances)

    # ── As it is stored ───────────────────────────────────────────────────────────────────────────
    fitted = OpenWorld(tree, vectors.shape[1], 0)
    stored = {
        "center": center,
        "whitening": whitening,
        "means": means @ whitening,
        "shares": sizes / sizes.sum(),
    }
    for name, values in stored.items():
        getattr(fitted, name).copy_(torch.as_tensor(values))
    fitted.energy_weight.zero_()
    spread_of_energies = validation_vectors[:, -1].std()
    if spread_of_energies:
        spread = fitted(torch.from_numpy(validation_vectors)).std()
        fitted.energy_weight.copy_(spread / spread_of_energies)
    return with_references(fitted, validation_vectors, seed)


@torch.no_grad()
def with_references(
    open_world: OpenWorld | None, validation_vectors: np.ndarray, seed: int = 0
) -> OpenWorld | None:
    """Return a copy with references that are computed from what is stored and validation texts.

    Return None for None, and where the texts are fewer than `MIN_REFERENCES`.
    """
    if open_world is None or len(validation_vectors) < MIN_REFERENCES:
        return None
    generator = np.random.default_rng(seed)
    some = generator.permutation(len(validation_vectors))[:MAX_REFERENCES]
    copied = deepcopy(open_world).cpu()
    strangeness = copied(torch.from_numpy(validation_vectors))[torch.from_numpy(some)]
    copied.references = nn.Parameter(strangeness.sort().values, requires_grad=False)
    return copied


def texts_by_class(tree: Taxonomy, nodes: list[list[int]]) -> list[list[int]]:
    """Return the numbers of each class's texts: N + 1 lists, the last of texts without a label.

    A text has the classes of its deepest labels. A label that a single text has counts as its
    parent: else the mean of the class, which is stored, would be the vector of this text.
    """
    texts: list[set[int]] = [set() for _ in range(tree.num_nodes + 1)]
    for text, labelled in enumerate(nodes):
        for node in tree.deepest(labelled) or [tree.num_nodes]:
            texts[node].add(text)
    for node in reversed(tree.reading_order):  # each node after those below it
        if len(texts[node]) == 1:
            texts[tree.parents[node]] |= texts[node]  # a root's -1 is the last class
            texts[node] = set()
    if len(texts[-1]) == 1:
        texts[-1] = set()
    return [*map(sorted, texts)]


def merge_texts(texts: np.ndarray, nodes: list[list[int]]) -> tuple[np.ndarray, list[list[int]]]:
    """Return the first row of each text, given by its number in each row, and the labelled nodes of
    all its rows.
    """
    _, first, text_of = np.unique(texts, return_index=True, return_inverse=True)
    merged: list[set[int]] = [set() for _ in first]
    for text, labelled in zip(text_of, nodes, strict=True):
        merged[text].update(labelled)
    return first, [*map(sorted, merged)]


@torch.no_grad()
def share_of_strange(open_world: OpenWorld, vectors: np.ndarray, texts: np.ndarray) -> float:
    """Return the share of texts whose p-value is at most `STRANGE`, from rows with the number of
    each one's text.
    """
    _, first = np.unique(texts, return_index=True)
    p_values = open_world.p_values(open_world(torch.from_numpy(vectors[first])))
    return (p_values <= STRANGE).double().mean().item()
