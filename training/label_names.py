"""Heads that begin as what the labels' names mean to the encoder, so that they are right about some texts before training.

A leaf's weights are the encoder's vector of its name, less the mean of all names. This is dataless classification (Chang et
al., 2008, "Importance of Semantic Representation") as the start of training. The fewer rows a class has, the more it is worth.
Names that say nothing, such as codes, do harm: `benchmarks/studies/label_names.py`.
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from modeling_hierarchical import HierarchicalForSequenceClassification
from training.trainer import HierarchicalTrainer

logger = logging.getLogger(__name__)

LARGEST = 4.0  # score of a text that lies as far from the mean as others do, in its class's direction
TEXTS = 64  # to know where texts lie
BATCH = 16


def begin_with_label_names(trainer: HierarchicalTrainer, rows: Dataset, only_if_better: bool = False) -> bool:
    """Sets the heads of a trainer's model: inner nodes add nothing, leaves score a text's vector v as

        LARGEST · u · (v - m) / s

    u being the direction of the name's vector from the mean of all names, m the mean of some texts' vectors, and s
    the root of their mean squared distance from it.

    Args:
        rows: with the columns ``input_ids`` and ``labels``.
        only_if_better: leave the heads as they are where these make the labels of the texts more likely.

    Returns:
        Whether the heads were set.
    """
    model, tokenizer = trainer.model, trainer.processing_class
    tree, heads = model.config.tree, model.heads
    some = [rows[int(row)] for row in sorted(np.random.default_rng(0).permutation(len(rows))[:TEXTS])]
    texts = vectors(trainer, [row["input_ids"] for row in some])
    names = [label.replace(tree.separator, " ") for label in tree.labels[: tree.num_leaves]]
    named = vectors(trainer, tokenizer(names, truncation=True)["input_ids"])
    mean = texts.mean(0)
    spread = (texts - mean).square().sum(1).mean().sqrt()
    directions = torch.nn.functional.normalize(named - named.mean(0))
    own = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
    labels = torch.tensor([row["labels"] for row in some], device=texts.device)
    with torch.no_grad():
        before = log_likelihood(model, texts, labels)
        heads.weight.zero_()
        heads.bias.zero_()
        heads.weight[: tree.num_leaves] = LARGEST / spread.clamp(min=1e-6) * directions
        heads.bias[: tree.num_leaves] = -heads.weight[: tree.num_leaves] @ mean
        if only_if_better and log_likelihood(model, texts, labels) <= before:
            heads.load_state_dict(own)
            logger.info("the heads begin by chance: the labels' names say nothing to the encoder; names: --class_names")
            return False
    logger.info("the heads begin as the labels' names")
    return True


def log_likelihood(model: HierarchicalForSequenceClassification, texts: Tensor, labels: Tensor) -> float:
    """Of labels (N,) given vectors (N, hidden_size), on average."""
    training = model.heads.training
    found = model.heads.eval()(texts).gather(1, labels[:, None]).mean()
    model.heads.train(training)
    return float(found)


def vectors(trainer: HierarchicalTrainer, inputs: Sequence[list[int]]) -> Tensor:
    """The pooled vectors (len(inputs), hidden_size) of texts as token ids."""
    model = trainer.model
    training = model.training
    model.eval()
    found = []
    for start in range(0, len(inputs), BATCH):
        batch = trainer.data_collator([{"input_ids": ids} for ids in inputs[start : start + BATCH]])
        batch = {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}
        with torch.no_grad(), trainer.compute_loss_context_manager():
            hidden = model.encoder(**batch).last_hidden_state
        found.append(model.pool(hidden, batch["attention_mask"]).to(model.heads.weight.device))
    model.train(training)
    return torch.cat(found)
