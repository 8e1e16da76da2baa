"""Train the encoder with the supervised contrastive loss, before the heads are initialised.

The contrastive loss compares a text only with other texts (Khosla et al., 2020, "Supervised
Contrastive Learning"). This helps most with few rows: a prototype contains its own training texts,
so cross-entropy starts near 0 and teaches the encoder little.
"""

import logging

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from hierarchical_clinicalbert.training.loop import TrainingLoop

logger = logging.getLogger(__name__)

TEMPERATURE = 0.1
TEXTS_PER_CLASS = 4


def train_contrastively(
    trainer: TrainingLoop, inputs: list[list[int]], members: Tensor, steps: int
) -> None:
    """Train the encoder, or its adapter, at the trainer's learning rate.

    Each step compares up to `TEXTS_PER_CLASS` texts of each of ``per_device_train_batch_size`` //
    `TEXTS_PER_CLASS` random classes, at least two.

    Args:
        inputs: token ids of the texts.
        members: (num_texts, num_classes), 1 for the classes of a text. Classes with one text are
        left out.
    """
    classes = [texts for texts in map(np.flatnonzero, members.T.cpu().numpy()) if len(texts) > 1]
    if len(classes) < 2:
        logger.info("no contrastive steps: they need two classes with two training texts each")
        return
    # ── Optimizer ─────────────────────────────────────────────────────────────────────────────────
    model = trainer.model
    args = trainer.args
    if args.activation_checkpointing:
        model.activation_checkpointing_enable()
    weights = [weight for weight in model.encoder.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.learning_rate, weight_decay=0.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, args.get_warmup_steps(steps), steps)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.fp16)
    generator = np.random.default_rng(args.seed)
    losses = []
    num_classes = min(len(classes), max(2, args.per_device_train_batch_size // TEXTS_PER_CLASS))

    # ── Steps ─────────────────────────────────────────────────────────────────────────────────────
    model.train()
    logger.info("contrastive steps: %d", steps)
    for _ in tqdm(
        range(steps), desc="contrastive steps", disable=args.disable_tqdm or args.process_index > 0
    ):
        chosen = [classes[i] for i in generator.choice(len(classes), num_classes, replace=False)]
        drawn = [
            generator.choice(texts, min(TEXTS_PER_CLASS, len(texts)), replace=False)
            for texts in chosen
        ]
        rows = np.unique(np.concatenate(drawn))
        loss = contrastive_loss(trainer.embed([inputs[row] for row in rows]), members[rows])
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    logger.info("contrastive learning: %d steps, loss %.3f to %.3f", steps, losses[0], losses[-1])


def contrastive_loss(vectors: Tensor, members: Tensor) -> Tensor:
    """Compute the supervised contrastive loss of texts, L_out of Khosla et al. (2020), equation 2.

    Args:
        vectors: (B, H).
        members: (B, C), 1 for the classes of a text. Two texts with a class in common are a
        positive pair.

    Returns:
        The mean over all texts that are in a positive pair.
    """
    unit = normalize(vectors)
    is_self = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    log_probs = (unit @ unit.T / TEMPERATURE).masked_fill(is_self, -torch.inf).log_softmax(1)
    positive = ((members @ members.T) > 0) & ~is_self
    losses = -log_probs.masked_fill(~positive, 0).sum(1) / positive.sum(1).clamp(min=1)
    return losses[positive.any(1)].mean()
