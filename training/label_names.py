"""Initialise heads from the encoder's embeddings of the class names, biases of several labels a text from frequencies.

This is dataless classification (Chang et al., 2008, "Importance of Semantic Representation") as the start of training.
It helps most with few rows a class. Names without meaning, such as codes, do harm: `benchmarks/studies/label_names.py`.
"""

import copy
import logging
from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from checkpoint_files import is_checkpoint, read_config
from modeling_hierarchical import HierarchicalHeads, binary_cross_entropy
from training.arguments import FEW_ROWS, ModelArguments
from training.multi_label import label_arrays, prior_log_odds
from training.trainer import HierarchicalTrainer

logger = logging.getLogger(__name__)

TYPICAL_SCORE = 4.0  # of a text at the typical distance from the mean, in the direction of its class
TEXTS = 64  # that estimate the mean and the distance
TEXTS_PER_BATCH = 16


def initialise_heads(trainer: HierarchicalTrainer, rows: Dataset, arguments: ModelArguments) -> str | None:
    """Initialise fresh heads as ``--heads_init`` says, and biases of several labels a text at `prior_log_odds`.

    Return "label_names" or "random"; None for a continued checkpoint, which keeps its heads.
    """
    continued = is_checkpoint(arguments.model_name_or_path)
    if trainer.is_multi_label:
        tree = trainer.model.config.tree
        old = read_config(arguments.model_name_or_path).tree if continued else None
        known = {old.path_names(node) for node in range(old.num_nodes)} if old else set()
        new = [node for node in range(tree.num_nodes) if tree.path_names(node) not in known]
        with torch.no_grad():
            trainer.model.heads.bias[new] = prior(trainer, rows)[new]
    if continued:
        return None
    given = arguments.heads_init
    few_rows = len(rows) < FEW_ROWS * trainer.model.config.tree.num_leaves
    if given == "random" or (given is None and not few_rows):
        return "random"
    return "label_names" if set_heads_from_names(trainer, rows, only_if_better=given is None) else "random"


def set_heads_from_names(trainer: HierarchicalTrainer, rows: Dataset, only_if_better: bool = False) -> bool:
    """Initialise the heads of a trainer's model from embeddings of the class names. Return whether heads were set.

    Inner nodes get 0. For a text's embedding v, the score of a leaf is

        TYPICAL_SCORE · u · (v - m) / s

    u is the direction of the name's embedding from the mean of all names. m is the mean of some texts' embeddings, and s the
    root of their mean squared distance from m. With several labels a text, each node has this score, added to its
    `prior_log_odds`. With ``only_if_better``, the former heads stay unless these make the texts' labels more likely.
    If nodes have descriptions, names with and without them are tried, and the likelier ones are kept.
    """
    model = trainer.model
    tree, heads, was_training = model.config.tree, model.heads, model.training
    model.eval()
    some = rows.select(np.sort(np.random.default_rng(0).permutation(len(rows))[:TEXTS]))
    labels = torch.tensor(some["labels"][:], device=trainer.args.device)
    classes = model.config.num_labels
    names = [label.replace(tree.separator, " ") for label in tree.labels[:classes]]
    sources = {"the class names": names}
    if tree.descriptions:
        known = [tree.descriptions.get(label) for label in tree.labels[:classes]]
        described = [f"{name}: {text}" if text else name for name, text in zip(names, known, strict=True)]
        sources["the class names and descriptions"] = described
    with torch.no_grad():
        texts = embed(trainer, some["input_ids"][:])
        mean = texts.mean(0)
        spread = (texts - mean).square().sum(1).mean().sqrt()
        tried: dict[str | None, tuple[Tensor, dict[str, Tensor]]] = {}
        if only_if_better:
            tried[None] = likelihood_of(heads, texts, labels), copy.deepcopy(heads.state_dict())
        for source, written in sources.items():
            named = embed(trainer, trainer.processing_class(written, truncation=True)["input_ids"])
            directions = torch.nn.functional.normalize(named - named.mean(0))
            heads.weight.zero_()
            heads.bias.copy_(prior(trainer, rows) if trainer.is_multi_label else torch.zeros_like(heads.bias))
            heads.weight[:classes] = TYPICAL_SCORE / spread.clamp(min=1e-6) * directions
            heads.bias[:classes] -= heads.weight[:classes] @ mean
            tried[source] = likelihood_of(heads, texts, labels), copy.deepcopy(heads.state_dict())
    best = max(tried, key=lambda source: tried[source][0])
    heads.load_state_dict(tried[best][1])
    if best is None:
        logger.info("heads are initialised at random: the names do not fit the texts; --class_names gives better ones")
    else:
        logger.info("heads are initialised from %s", best)
    model.train(was_training)
    return best is not None


def prior(trainer: HierarchicalTrainer, rows: Dataset) -> Tensor:
    log_odds = prior_log_odds(trainer.model.config.tree, label_arrays(rows))
    return torch.from_numpy(log_odds).to(trainer.model.heads.bias)


def likelihood_of(heads: HierarchicalHeads, texts: Tensor, labels: Tensor) -> Tensor:
    """Return the mean log-probability of the labels, (B,) or (B, num_nodes), of embedded texts (B, hidden_size)."""
    scores = heads(texts)
    if labels.dim() == 2:
        return -binary_cross_entropy(scores, labels, heads.decisions)
    return scores.gather(1, labels[:, None]).mean()


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
