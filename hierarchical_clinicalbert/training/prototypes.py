"""Initialise heads from prototypes: the mean embedding of each class's training texts and its name.

Prototypes are from Snell et al., 2017, "Prototypical Networks for Few-shot Learning". A class name
counts as several texts (dataless classification: Chang et al., 2008, "Importance of Semantic
Representation"). Prototypes help most with few rows per class. For multi-label models, biases start
at each node's log-odds in the training rows.

Without training steps, `set_heads` sets the heads of classes that may have no texts, over an
encoder or in a checkpoint.
"""

import logging
import math
from collections.abc import Container, Sized
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import normalize, pad

from decisions_hierarchical import build_decisions
from hierarchical_clinicalbert.errors import as_input_error
from hierarchical_clinicalbert.training.arguments import has_few_rows
from hierarchical_clinicalbert.training.contrastive import train_contrastively
from hierarchical_clinicalbert.training.loop import TrainingLoop
from modeling_hierarchical import HierarchicalHeads
from taxonomy_hierarchical import Taxonomy

logger = logging.getLogger(__name__)

# of a text at the typical distance from the mean, in the direction of its class
TYPICAL_SCORE = 4.0
NAME_WEIGHT = 4.0  # texts that a class name counts as
DESCRIPTION_WEIGHT = 16.0  # texts that a name with a description counts as
LENGTH_BESIDE_SIBLINGS = 2.5  # of the head of a class that is added to a checkpoint
# of a name for itself, where there are no texts; and of texts, while they are assigned to classes
NAME_SCORE = 24.0
CLUSTER_STEPS = 3  # of assigning unlabelled texts to classes
# like `TYPICAL_SCORE`, for classes of unlabelled texts: text and class are less alike
CLUSTER_SCORE = 12.0
MAX_TEXTS = 4096  # that are embedded


class Names(NamedTuple):
    """A phrase for each class, for its prototype.

    ``weights`` are the numbers of texts that the phrases count as.
    """

    source: str
    phrases: list[str]
    weights: list[float]


def initialise_heads(
    trainer: TrainingLoop, rows: Dataset, known: Container[int] = ()
) -> str | None:
    """Initialise new heads as ``--heads_init`` says, and biases at `Decisions.initial_biases`.

    First, the encoder is trained for ``--contrastive_steps``. Return "prototypes" or "random"; None
    for a continued checkpoint that has ``known`` nodes of the taxonomy: its heads are kept, and
    there are no contrastive steps.
    """
    args = trainer.args
    tree = trainer.model.config.tree
    heads = trainer.model.heads
    new = [node for node in range(tree.num_nodes) if node not in known]
    with torch.no_grad():
        heads.bias[new] = initial_biases(trainer, rows).to(heads.bias)[new]
    if known:
        if args.contrastive_steps or args.heads_init:
            logger.info(
                "trained heads are kept: --contrastive_steps and --heads_init have no effect"
            )
        return None
    chosen = args.heads_init or ("prototypes" if has_few_rows(len(rows), tree) else "random")
    some = rows.select(sample(rows))
    # after contrastive steps, prototypes without names would seem to fit these texts best
    if chosen == "prototypes":
        vectors = embed(trainer, some["input_ids"][:])
        names = choose_names(trainer, some, vectors)
    if args.contrastive_steps:
        steps = args.contrastive_steps
        _, members = read_labels(trainer, rows)
        train_contrastively(trainer, rows["input_ids"][:], members[:, : tree.num_leaves], steps)
    if chosen == "prototypes":
        if args.contrastive_steps:
            vectors = embed(trainer, some["input_ids"][:])
        set_prototypes(trainer, some, vectors, names)
    return chosen


@torch.no_grad()
def set_heads(
    trainer: TrainingLoop, rows: Dataset | None, known: Container[int], unlabelled: list[str]
) -> list[str]:
    """Set the heads of all classes, or of those that are not ``known`` to a checkpoint, without
    training. Return their labels.

    Over an encoder, they are those of `set_prototypes`, or without rows those of
    `write_name_heads`, with the ``unlabelled`` texts. In a checkpoint, they are those of
    `add_prototypes`.
    """
    tree = trainer.model.config.tree
    heads = trainer.model.heads
    classes = trainer.model.config.num_labels
    names = list_candidates(tree, classes)[-1]
    phrases = embed_phrases(trainer, names.phrases)
    texts = phrases[:0]
    members = phrases.new_zeros(0, classes)
    if rows is not None:
        rows = rows.select(sample(rows))
        texts = embed(trainer, rows["input_ids"][:])
        _, members = read_labels(trainer, rows)
    if known:
        with as_input_error("cannot add the classes without training"):
            add_prototypes(heads, known, names, phrases, texts, members)
    elif rows is not None:
        heads.bias[:] = initial_biases(trainer, rows)
        set_prototypes(trainer, rows, texts, names)
    else:
        if unlabelled:
            texts = embed_phrases(trainer, [unlabelled[row] for row in sample(unlabelled)])
        write_name_heads(heads, phrases, texts)
    described = " and their descriptions" if tree.descriptions else ""
    logger.info("heads are set from the class names%s, and %d texts", described, len(texts))
    return [label for node, label in enumerate(tree.labels[:classes]) if node not in known]


def add_prototypes(
    heads: HierarchicalHeads,
    known: Container[int],
    names: Names,
    phrases: Tensor,
    texts: Tensor,
    members: Tensor,
) -> None:
    """Set the heads of new classes of a checkpoint, beside the ``known`` nodes. Inner nodes keep 0.

    A new head is the mean of its known siblings' heads, plus a weight along the prototype p. This
    is that of `set_prototypes`, but m is the siblings' mean, and p is multiplied by the inverse of
    the scatter of known class means plus a ridge. For where known classes differ most, texts of a
    new class resemble one of them by chance.

    The length of the weight is `LENGTH_BESIDE_SIBLINGS` times the mean distance of known heads from
    their mean. A text at m gets the siblings' mean score. Without known siblings, m is the mean of
    all known classes, and new siblings have equal shares of their parent there.

    A checkpoint without class means has those of its phrases, which lie further apart than texts
    do: then the factor is 1.

    Args:
        phrases, texts: embeddings of the phrases in ``names``, (C, H), and of rows, (B, H).
        members: the classes of each row, (B, C).

    Raises:
        ValueError: no class is known, or the model has label attention.
    """
    decisions = heads.decisions
    tree = decisions.tree
    classes = range(decisions.num_classes)
    new = {node for node in classes if node not in known}
    if not new:
        return
    if heads.query is not None:
        raise ValueError("with label attention, new nodes need training")

    # ── Known classes ─────────────────────────────────────────────────────────────────────────────
    means = phrases
    fitted = [node for node in classes if node in known]
    factor = 1.0
    if heads.open_world is not None:
        means = heads.open_world.class_means()
        fitted = [node for node in fitted if heads.open_world.shares[node] > 0]
        factor = LENGTH_BESIDE_SIBLINGS
    if not fitted:
        raise ValueError(
            "no class of the taxonomy is known: new classes need known ones beside them"
        )
    differences = means[fitted] - means[fitted].mean(0)
    variance = differences.square().sum(1).mean().clamp(min=1e-12)
    scatter = differences.T @ differences + variance * torch.eye(means.shape[1]).to(means)
    known_heads = heads.weight[fitted]
    length = factor * (known_heads - known_heads.mean(0)).norm(dim=1).mean()

    # ── New classes, by their parent ──────────────────────────────────────────────────────────────
    heads.weight[[*new]] = 0
    heads.bias[[*new]] = 0
    weight = heads.weight.clone()
    bias = heads.bias.clone()
    name_weights = phrases.new_tensor(names.weights)[:, None]
    for parent in {tree.parents[node] for node in new}:
        children = tree.children(parent)
        added = [child for child in children if child in new]
        siblings = [child for child in children if child in known]
        near = [*{*siblings}.intersection(fitted)] or fitted
        center = means[near].mean(0)
        sums = members[:, added].T @ ((texts - center) / variance.sqrt())
        sums += name_weights[added] * normalize(phrases[added] - phrases[near].mean(0))
        prototypes = normalize(torch.linalg.solve(scatter, sums.T).T)
        heads.weight[added] = length * prototypes
        level = torch.tensor(-math.log(len(children)))
        if siblings:
            heads.weight[added] += weight[siblings].mean(0)
            level = decisions.inclusive((weight @ center + bias)[None])[0, siblings].mean()
        heads.bias[added] = level - heads.weight[added] @ center


def write_name_heads(heads: HierarchicalHeads, phrases: Tensor, texts: Tensor) -> None:
    """Set the heads of all classes from the embeddings of their names or descriptions (C, H), and
    of unlabelled texts (B, H).

    Without texts, a text's most probable class is the one whose phrase has the largest cosine with
    the text: weights have equal lengths, and a phrase scores `NAME_SCORE` for itself. The mean
    score of the phrases is subtracted. The mean of phrases is not: texts have another one.

    With texts, prototypes start as the directions u of `set_prototypes`. Each of `CLUSTER_STEPS`
    steps assigns each text to leaves by the softmax of its scores, and makes prototypes of these
    shares of texts. This is the EM algorithm on a sphere (Banerjee et al., 2005, "Clustering on the
    unit hypersphere using von Mises-Fisher distributions"). A name counts as half of the texts that
    a class has on average, and `NAME_WEIGHT` more: so a prototype stays close to its name. The last
    shares count as labels for the initial biases.
    """
    decisions = heads.decisions
    classes = len(phrases)
    if len(texts):
        offsets, mean, rms_distance = standardise(texts)
        prototypes = names = normalize(phrases - phrases.mean(0))
        name_texts = NAME_WEIGHT + len(texts) / (2 * classes)
        for _ in range(CLUSTER_STEPS):
            shares = (NAME_SCORE * offsets @ prototypes[: decisions.num_leaves].T).softmax(1)
            members = decisions.sum_at_or_below(
                pad(shares, (0, decisions.num_nodes - decisions.num_leaves))
            )
            prototypes = normalize(members[:, :classes].T @ offsets + name_texts * names)
        weights = CLUSTER_SCORE / rms_distance * prototypes
        level = weights @ mean
        present = members.sum(0)
        heads.bias[:] = decisions.initial_biases(torch.cat([present, len(texts) - present]))
    else:
        heads.bias.zero_()
        weights = NAME_SCORE / phrases.square().sum(1).mean().sqrt() * normalize(phrases)
        level = (phrases @ weights.T).mean()
    heads.weight.zero_()
    heads.weight[:classes] = weights
    heads.bias[:classes] -= level


@torch.no_grad()
def choose_names(trainer: TrainingLoop, rows: Dataset, vectors: Tensor) -> Names:
    """Choose what prototypes use in addition to the texts' vectors (B, H): nothing, class names, or
    names with descriptions.

    The choice maximises the likelihood of the training labels. Each text is left out of its own
    prototypes. A phrase counts as `NAME_WEIGHT` texts, or as 0.
    """
    tree = trainer.model.config.tree
    heads = trainer.model.heads
    classes = trainer.model.config.num_labels
    offsets, *_ = standardise(vectors)
    labels, members = read_labels(trainer, rows)
    text_sums = members.T @ offsets

    def likelihood(names: Names) -> float:
        name_sums = NAME_WEIGHT * name_directions(trainer, names) if any(names.weights) else 0
        own = left_out_scores(offsets, members, text_sums + name_sums)
        scores = pad(own, (0, tree.num_nodes - classes)) + heads.bias
        return float(
            heads.decisions.log_likelihood(heads.decisions.inclusive(scores), labels).sum()
        )

    return max(list_candidates(tree, classes), key=likelihood)


def list_candidates(tree: Taxonomy, classes: int) -> list[Names]:
    """Return what prototypes may use in addition to texts: nothing, class names, and names with
    descriptions if there are any.
    """
    phrases = [label.replace(tree.separator, " ") for label in tree.labels[:classes]]
    descriptions = [tree.descriptions.get(label) for label in tree.labels[:classes]]
    texts_only = (
        "the training texts alone: the class names do not fit them; --class_names gives better ones"
    )
    candidates = [
        Names(texts_only, phrases, [0.0] * classes),
        Names("the training texts and the class names", phrases, [NAME_WEIGHT] * classes),
    ]
    if tree.descriptions:
        described = [
            f"{name}: {text}" if text else name
            for name, text in zip(phrases, descriptions, strict=True)
        ]
        weights = [DESCRIPTION_WEIGHT if text else NAME_WEIGHT for text in descriptions]
        candidates.append(
            Names("the training texts, the class names and their descriptions", described, weights)
        )
    return candidates


@torch.no_grad()
def set_prototypes(trainer: TrainingLoop, rows: Dataset, vectors: Tensor, names: Names) -> None:
    """Initialise new heads from embeddings of the training texts, (B, H), and the class names.
    Inner nodes get 0.

    The score of a leaf for a text with embedding v is  TYPICAL_SCORE · p · (v - m) / s.

    m, s: mean of the texts' embeddings, and the root mean square of their distances from it.
    p: the prototype, a unit vector along  k · u + Σ (v - m) / s  over the leaf's texts.
    u: unit vector from the mean embedding of all names to the embedding of the leaf's name.
    k: number of texts that the name counts as, from ``names.weights``.

    In multi-label models each node has such a score, added to its initial bias.
    """
    heads = trainer.model.heads
    classes = trainer.model.config.num_labels
    offsets, mean, rms_distance = standardise(vectors)
    _, members = read_labels(trainer, rows)
    name_weights = offsets.new_tensor(names.weights)[:, None]
    prototypes = normalize(members.T @ offsets + name_weights * name_directions(trainer, names))
    heads.weight.zero_()
    heads.weight[:classes] = TYPICAL_SCORE / rms_distance * prototypes
    heads.bias[:classes] -= heads.weight[:classes] @ mean
    logger.info("heads are initialised from %s", names.source)


def standardise(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return offsets of vectors (B, H) from their mean, over their RMS distance; the mean (H,);
    and the RMS distance.
    """
    mean = vectors.mean(0)
    rms_distance = (vectors - mean).square().sum(1).mean().sqrt().clamp(min=1e-6)
    return (vectors - mean) / rms_distance, mean, rms_distance


@torch.no_grad()
def embed(trainer: TrainingLoop, inputs: list[list[int]]) -> Tensor:
    """Return the embeddings of texts given as token ids, (B, H)."""
    trainer.model.eval()  # no dropout; each training step switches back
    return trainer.embed(inputs)


def embed_phrases(trainer: TrainingLoop, phrases: list[str]) -> Tensor:
    """Return the phrases' embeddings, (C, H)."""
    return embed(trainer, trainer.processing_class(phrases, truncation=True)["input_ids"])


def name_directions(trainer: TrainingLoop, names: Names) -> Tensor:
    """Return the directions of the phrases' embeddings from their mean, (C, H)."""
    named = embed_phrases(trainer, names.phrases)
    return normalize(named - named.mean(0))


def sample(rows: Sized) -> np.ndarray:
    """Draw at most `MAX_TEXTS` rows, and return their numbers, ascending."""
    return np.sort(np.random.default_rng(0).permutation(len(rows))[:MAX_TEXTS])


def read_labels(trainer: TrainingLoop, rows: Dataset) -> tuple[Tensor, Tensor]:
    """Return the labels of rows as of `Decisions.targets`, and the classes of each text, (B, C), 1
    or 0 in float32.

    For one path, an inner node as the label is no class.
    """
    decisions = trainer.model.heads.decisions
    labels = decisions.targets(rows["labels"][:]).to(decisions.parents.device)
    return labels, decisions.outcome_targets(labels)[:, : decisions.num_classes].float()


def initial_biases(trainer: TrainingLoop, rows: Dataset) -> Tensor:
    """Return `Decisions.initial_biases` for the labels of rows, (N,), on the CPU."""
    config = trainer.model.config
    # its own decisions, on the CPU: labels are counted in float64, which Apple's GPUs lack
    decisions = build_decisions(config.tree, config.problem_type)
    counts = decisions.count_outcomes(decisions.targets(rows["labels"][:]))
    return decisions.initial_biases(counts).float()


def left_out_scores(offsets: Tensor, members: Tensor, sums: Tensor) -> Tensor:
    """Score texts by prototypes that leave out the text itself, (B, C).

    ``offsets`` (B, H) are the texts, ``members`` (B, C) their classes, ``sums`` (C, H) unnormalised
    prototypes of all texts.
    """
    products = offsets @ sums.T
    squares = offsets.square().sum(1, keepdim=True)
    lengths = sums.square().sum(1) - members * (2 * products - squares)  # |sum - text|²
    return TYPICAL_SCORE * (products - members * squares) / lengths.clamp(min=1e-6).sqrt()
