"""Tokenize texts."""

import logging
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from errors import InputError
from taxonomy_hierarchical import Taxonomy
from training.data_report import length_report, log_report
from training.multi_label import multi_hot
from training.splits import LabelledSplits
from training.views import sentence_numbers

logger = logging.getLogger(__name__)

TOKEN_COLUMNS = ("input_ids", "attention_mask", "token_type_ids")


def tokenize_splits(
    data: LabelledSplits,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    sentences: bool = False,
    incomplete_labels: bool = False,
) -> datasets.DatasetDict:
    """Lower the tokenizer's limit to ``max_length``, tokenize the splits and log the data report."""
    limit = tokenizer.model_max_length
    if max_length > limit:
        logger.info("--max_length %d exceeds the model's limit: texts are truncated at %d tokens", max_length, limit)
    tokenizer.model_max_length = min(max_length, limit)
    splits, data.report["lengths"] = tokenize(
        data.splits, tokenizer, sentences, data.taxonomy if data.is_multi_label else None, incomplete_labels
    )
    log_report(data.report)
    return splits


def tokenize(
    splits: datasets.DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    sentences: bool = False,
    taxonomy: Taxonomy | None = None,
    incomplete_labels: bool = False,
) -> tuple[datasets.DatasetDict, dict[str, dict]]:
    """Tokenize texts, truncated at ``tokenizer.model_max_length`` and not padded.

    Args:
        taxonomy: with several labels a text. Then ``labels`` are the arrays of `multi_hot`, of int8.
        incomplete_labels: see `multi_hot`.

    Returns:
        The splits, with the columns of `TOKEN_COLUMNS` that the tokenizer has, ``length`` (of ``input_ids``), ``labels``,
        ``row`` and ``text_id``. If asked for, training rows have ``sentences``, see `training.views.sentence_numbers`.
        Other rows are sorted by length, to reduce padding. And the `length_report` of each split, before truncation.
    """
    if not tokenizer.is_fast:  # it has no token offsets
        raise InputError(
            f"{type(tokenizer).__name__} is not a fast tokenizer (of the tokenizers library), which serving the "
            "checkpoint requires: use another encoder"
        )
    special = tokenizer.num_special_tokens_to_add()  # every overflowing piece has its own

    def tokens(batch: dict[str, list], sentences: bool) -> dict[str, list]:
        labels = batch["label"] if taxonomy is None else [*multi_hot(taxonomy, batch["label"], incomplete_labels)]
        encoded: Any = tokenizer(list(batch["text"]), truncation=True, return_attention_mask=True, stride=0)
        pieces = encoded.encodings
        columns = {column: encoded[column] for column in TOKEN_COLUMNS if column in encoded}
        if sentences:
            ends = [[end for _, end in piece.offsets] for piece in pieces]
            columns["sentences"] = [sentence_numbers(*pair) for pair in zip(batch["text"], ends, strict=True)]
        return {
            **columns,
            "length": [len(piece) for piece in pieces],
            "full_length": [len(piece) + sum(len(rest) - special for rest in piece.overflowing) for piece in pieces],
            "labels": labels,
            "row": batch["row"],
            "text_id": batch["text_id"],
        }

    tokenized, reports = datasets.DatasetDict(), {}
    for split, rows in splits.items():
        training = split == "train"
        rows = rows.map(
            tokens,
            batched=True,
            remove_columns=rows.column_names,
            desc=f"tokenizing {split}",
            fn_kwargs={"sentences": sentences and training},
        )
        reports[split] = length_report(rows.with_format("numpy")["full_length"][:], tokenizer.model_max_length)
        rows = rows.remove_columns("full_length")
        tokenized[split] = rows if training else rows.select(np.argsort(rows["length"], kind="stable"))
    return tokenized, reports
