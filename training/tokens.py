"""Tokenize texts."""

import logging
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from errors import InputError
from taxonomy_hierarchical import Taxonomy
from training.arguments import Arguments
from training.data_report import length_report, log_report
from training.multi_label import multi_hot
from training.splits import LabelledSplits
from training.views import sentence_numbers

logger = logging.getLogger(__name__)

TOKEN_COLUMNS = ("input_ids", "attention_mask", "token_type_ids")


def tokenize_splits(
    arguments: Arguments, data: LabelledSplits, tokenizer: PreTrainedTokenizerBase
) -> datasets.DatasetDict:
    """Lower the tokenizer's limit to ``--max_length``, tokenize the splits and log the data report."""
    max_length, limit = arguments.data.max_length, tokenizer.model_max_length
    if max_length > limit:
        logger.info("--max_length %d exceeds the model's limit: texts are truncated at %d tokens", max_length, limit)
    tokenizer.model_max_length = min(max_length, limit)
    taxonomy = data.taxonomy if data.is_multi_label else None
    sentences, incomplete = arguments.loss.consistency > 0, arguments.data.incomplete_labels
    splits, data.report["lengths"] = tokenize(data.splits, tokenizer, sentences, taxonomy, incomplete)
    log_report(data.report)
    return splits


def tokenize(
    splits: datasets.DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    sentences: bool = False,
    taxonomy: Taxonomy | None = None,
    incomplete_labels: bool = False,
) -> tuple[datasets.DatasetDict, dict[str, dict]]:
    """Tokenize texts, truncated at ``tokenizer.model_max_length`` and not padded. Also return each split's `length_report`.

    The columns are those of `TOKEN_COLUMNS` that the tokenizer has, ``length`` (of ``input_ids``), ``labels``, ``row`` and
    ``text_id``. Given a taxonomy, labels are arrays of `multi_hot`. If asked for, training rows have ``sentences``, see
    `training.views.sentence_numbers`. Other rows are sorted by length, to reduce padding.
    """
    if not tokenizer.is_fast:  # it has no token offsets
        problem = "is not a fast tokenizer (of the tokenizers library), which serving the checkpoint requires"
        raise InputError(f"{type(tokenizer).__name__} {problem}: use another encoder")
    special = tokenizer.num_special_tokens_to_add()  # every overflowing piece has its own

    def tokens(batch: dict[str, list], sentences: bool) -> dict[str, list]:
        encoded: Any = tokenizer(list(batch["text"]), truncation=True, return_attention_mask=True, stride=0)
        pieces = encoded.encodings
        columns = {column: encoded[column] for column in TOKEN_COLUMNS if column in encoded}
        labels = batch["label"] if taxonomy is None else [*multi_hot(taxonomy, batch["label"], incomplete_labels)]
        if sentences:
            ends = [[end for _, end in piece.offsets] for piece in pieces]
            columns["sentences"] = [sentence_numbers(*pair) for pair in zip(batch["text"], ends, strict=True)]
        return {
            **columns,
            "length": [len(piece) for piece in pieces],
            "full_length": [len(piece) + sum(len(rest) - special for rest in piece.overflowing) for piece in pieces],
            "labels": labels,
        }

    tokenized, reports = datasets.DatasetDict(), {}
    for split, rows in splits.items():
        training = split == "train"
        rows = rows.map(
            tokens,
            batched=True,
            remove_columns=["text", "label"],
            desc=f"tokenizing {split}",
            fn_kwargs={"sentences": sentences and training},
        )
        reports[split] = length_report(rows.with_format("numpy")["full_length"][:], tokenizer.model_max_length)
        rows = rows.remove_columns("full_length")
        tokenized[split] = rows if training else rows.select(np.argsort(rows["length"], kind="stable"))
    return tokenized, reports
