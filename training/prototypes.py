"""Initialise heads from embeddings of the training texts and the class names, biases of several labels a text from frequencies.

The training begins as a classifier by prototypes (Snell et al., 2017, "Prototypical Networks for Few-shot Learning"), in which
a class name counts as several texts (dataless classification: Chang et al., 2008, "Importance of Semantic
Representation"). It helps most with few rows a class.
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import normalize, one_hot, pad

from checkpoint_files import is_checkpoint, read_config
from modeling_hierarchical import binary_cross_entropy
from training.arguments import FEW_ROWS, ModelArguments
from training.multi_label import label_arrays, prior_log_odds
from training.trainer import HierarchicalTrainer

logger = logging.getLogger(__name__)

TYPICAL_SCORE = 4.0  # of a text at the typical distance from the mean, in the direction of its class
NAME_WEIGHT = 4.0  # texts that a class name counts as
DESCRIPTION_WEIGHT = 16.0  # texts that a name with a description counts as
MOST_TEXTS = 4096  # that are embedded
TEXTS_PER_BATCH = 16


def initialise_heads(trainer: HierarchicalTrainer, rows: Dataset, arguments: ModelArguments) -> str | None:
    """Initialise fresh heads as ``--heads_init`` says, and biases of several labels a text at `prior_log_odds`.

    Return "prototypes" or "random"; None for a continued checkpoint, which keeps its heads.
    """
    continued = is_checkpoint(arguments.model_name_or_path)
    if trainer.is_multi_label:
        tree = trainer.model.config.tree
        old = read_config(arguments.model_name_or_path).tree if continued else None
        known = {old.path_names(node) for node in range(old.num_nodes)} if old else set()
        new = [node for node in range(tree.num_nodes) if tree.path_names(node) not in known]
        bias = trainer.model.heads.bias
        with torch.no_grad():
            bias[new] = torch.from_numpy(prior_log_odds(tree, label_arrays(rows))).to(bias)[new]
    if continued:
        return None
    few_rows = len(rows) < FEW_ROWS * trainer.model.config.tree.num_leaves
    chosen = arguments.heads_init or ("prototypes" if few_rows else "random")
    if chosen == "prototypes":
        set_prototypes(trainer, rows)
    return chosen


@torch.no_grad()
def set_prototypes(trainer: HierarchicalTrainer, rows: Dataset) -> None:
    """Initialise fresh heads of a trainer's model from embeddings of the training texts and the class names.

    Inner nodes get 0. For a text's embedding v, the score of a leaf is

        TYPICAL_SCORE · p · (v - m) / s

    m is the mean of the texts' embeddings, and s the root of their mean squared distance from m. The prototype p is the direction
    of k · u + Σ (v - m) / s over the leaf's texts. u is the direction of the name's embedding from the mean of all names, and k
    is NAME_WEIGHT, or DESCRIPTION_WEIGHT for a name with a description. With several labels a text, each node has this score,
    added to its initial bias.

    Names with descriptions, names alone, and u = 0 are compared, with k = NAME_WEIGHT. The one is kept that makes the texts'
    labels most likely, each text left out of its own prototypes.
    """
    model = trainer.model
    tree, heads, was_training, classes = model.config.tree, model.heads, model.training, model.config.num_labels
    model.eval()

    # ── Texts ────────────────────────────────────────────────────────────────────────────────────────────────────────
    order = np.random.default_rng(0).permutation(len(rows))
    some = rows.select(np.sort(order[:MOST_TEXTS]))
    texts = embed(trainer, some["input_ids"][:])
    mean = texts.mean(0)
    spread = (texts - mean).square().sum(1).mean().sqrt().clamp(min=1e-6)
    offsets = (texts - mean) / spread
    found = label_arrays(some) if trainer.is_multi_label else np.array(some["labels"][:])
    labels = torch.from_numpy(found).to(offsets.device)
    nodes = labels == 1 if trainer.is_multi_label else one_hot(labels, tree.num_nodes)
    members = nodes[:, :classes].to(offsets.dtype)  # (B, C): a text of inner nodes alone is in no class

    # ── Names ────────────────────────────────────────────────────────────────────────────────────────────────────────
    names = [label.replace(tree.separator, " ") for label in tree.labels[:classes]]
    known = [tree.descriptions.get(label) for label in tree.labels[:classes]]
    described = [f"{name}: {text}" if text else name for name, text in zip(names, known, strict=True)]
    sources = {"the training texts and the class names": names}
    if tree.descriptions:
        sources["the training texts, the class names and their descriptions"] = described
    alone = "the training texts alone: the class names do not fit them; --class_names gives better ones"
    directions = {alone: torch.zeros_like(heads.weight[:classes])}
    for source, phrases in sources.items():
        named = embed(trainer, trainer.processing_class(phrases, truncation=True)["input_ids"])
        directions[source] = normalize(named - named.mean(0))

    # ── The likeliest ────────────────────────────────────────────────────────────────────────────────────────────────
    of_texts = members.T @ offsets

    def likelihood(source: str) -> float:
        own = left_out_scores(offsets, members, of_texts + NAME_WEIGHT * directions[source])
        scores = pad(own, (0, tree.num_nodes - classes)) + heads.bias
        if trainer.is_multi_label:
            return -float(binary_cross_entropy(scores, labels, heads.decisions))
        log_probs = heads.decisions.node_log_probs(heads.decisions.with_inclusive_values(scores))
        return float(log_probs.gather(1, labels[:, None]).mean())

    best = max(directions, key=likelihood)
    logger.info("heads are initialised from %s", best)
    weights = [[DESCRIPTION_WEIGHT if text and sources.get(best) is described else NAME_WEIGHT] for text in known]
    heads.weight.zero_()
    heads.weight[:classes] = (
        TYPICAL_SCORE / spread * normalize(of_texts + offsets.new_tensor(weights) * directions[best])
    )
    heads.bias[:classes] -= heads.weight[:classes] @ mean
    model.train(was_training)


def left_out_scores(offsets: Tensor, members: Tensor, sums: Tensor) -> Tensor:
    """Score texts (B, H), each left out of the sums (C, H) of the classes that it is a member of, (B, C): (B, C)."""
    products, squares = offsets @ sums.T, offsets.square().sum(1, keepdim=True)
    lengths = sums.square().sum(1) - members * (2 * products - squares)  # |sum - text|²
    return TYPICAL_SCORE * (products - members * squares) / lengths.clamp(min=1e-6).sqrt()


def embed(trainer: HierarchicalTrainer, inputs: Sequence[list[int]]) -> Tensor:
    """Embed texts given as token ids: pooled vectors, (len(inputs), hidden_size)."""
    model, pooled = trainer.model, []
    for start in range(0, len(inputs), TEXTS_PER_BATCH):
        batch = trainer.data_collator([{"input_ids": ids} for ids in inputs[start : start + TEXTS_PER_BATCH]])
        batch = batch.to(trainer.args.device)
        with trainer.accelerator.autocast():
            hidden = model.encoder(**batch).last_hidden_state
        pooled.append(model.pool(hidden, batch["attention_mask"]).to(model.heads.weight.device))
    return torch.cat(pooled)
