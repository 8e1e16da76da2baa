"""Tokenize texts, and collate batches."""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict
from torch import Tensor
from transformers import BatchEncoding, DataCollatorWithPadding, PreTrainedTokenizerBase

from hierarchical_clinicalbert.data.report import length_report
from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.training.views import PADDING, sentence_numbers

logger = logging.getLogger(__name__)

TOKEN_COLUMNS = ("input_ids", "attention_mask", "token_type_ids")


def tokenize_splits(
    splits: DatasetDict, tokenizer: PreTrainedTokenizerBase, sentences: bool = False
) -> tuple[DatasetDict, dict[str, dict]]:
    """Tokenize texts up to the tokenizer's limit, and measure them by `length_report`.

    The columns are those of `TOKEN_COLUMNS` that the tokenizer has, ``length`` (of ``input_ids``),
    ``labels`` (lists of node ids), ``row`` and ``text_id``. If asked for, training rows have
    ``sentences``, see `training.views.sentence_numbers`. The other splits are sorted by length, to
    reduce padding. Nothing is padded.
    """
    if not tokenizer.is_fast:  # it has no token offsets
        problem = (
            "is not a fast tokenizer (of the tokenizers library), which serving the checkpoint "
            "requires"
        )
        raise InputError(f"{type(tokenizer).__name__} {problem}: use another encoder")
    # every overflowing piece has its own special tokens
    special = tokenizer.num_special_tokens_to_add()

    def tokens(batch: dict[str, list], with_sentences: bool) -> dict[str, list]:
        encoded: Any = tokenizer(
            list(batch["text"]), truncation=True, return_attention_mask=True, stride=0
        )
        pieces = encoded.encodings
        columns = {column: encoded[column] for column in TOKEN_COLUMNS if column in encoded}
        if with_sentences:
            ends = [[end for _, end in piece.offsets] for piece in pieces]
            columns["sentences"] = [
                sentence_numbers(*pair) for pair in zip(batch["text"], ends, strict=True)
            ]
        columns["length"] = [len(piece) for piece in pieces]
        overflow = [sum(len(rest) - special for rest in piece.overflowing) for piece in pieces]
        columns["full_length"] = [
            len(piece) + more for piece, more in zip(pieces, overflow, strict=True)
        ]
        columns["labels"] = batch["nodes"]
        return columns

    tokenized = DatasetDict()
    reports = {}
    for split, rows in splits.items():
        training = split == "train"
        encode = partial(tokens, with_sentences=sentences and training)
        rows = rows.map(
            encode,
            batched=True,
            batch_size=100,
            remove_columns=["text", "nodes"],
            keep_in_memory=True,
            load_from_cache_file=False,
            # without a cache it needs no hash, for which the tokenizer would be pickled
            new_fingerprint=split,
            desc=f"tokenizing {split}",
        )
        reports[split] = length_report(
            rows.with_format("numpy")["full_length"][:], tokenizer.model_max_length
        )
        rows = rows.remove_columns("full_length")
        tokenized[split] = (
            rows if training else rows.select(np.argsort(rows["length"], kind="stable"))
        )
    return tokenized, reports


class Collator(DataCollatorWithPadding):
    """Pad the `TOKEN_COLUMNS` of a batch to a multiple of 8 tokens, never beyond the tokenizer's
    limit.

    ``row`` and ``sentences`` become NumPy arrays, so halves do not wait for a GPU. ``targets``,
    such as `Decisions.targets`, turns the lists of node ids in ``labels`` into an array.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, targets: Callable[[list], Tensor]):
        super().__init__(tokenizer, pad_to_multiple_of=math.gcd(8, tokenizer.model_max_length))
        self.targets = targets

    def __call__(self, features: list[dict]) -> BatchEncoding:
        own = {
            name: [row[name] for row in features]
            for name in ("row", "sentences", "labels", "teacher")
            if name in features[0]
        }
        batch = super().__call__(
            [{name: row[name] for name in TOKEN_COLUMNS if name in row} for row in features]
        )
        if "labels" in own:
            batch["labels"] = self.targets(own["labels"])
        if "teacher" in own:
            batch["teacher"] = torch.tensor(own["teacher"])
        if "row" in own:
            batch["row"] = np.array(own["row"])
        if "sentences" in own:
            tokens = batch["attention_mask"].bool().numpy()
            batch["sentences"] = np.full(tokens.shape, PADDING)
            batch["sentences"][tokens] = np.concatenate(own["sentences"])
        return batch
