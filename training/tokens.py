"""Tokenize texts."""

from collections.abc import Collection
from typing import Any

import datasets
import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizerBase

from errors import InputError
from training.data_report import length_report, log_report
from training.splits import LabelledSplits
from training.views import sentence_numbers

TOKEN_COLUMNS = ("input_ids", "attention_mask", "token_type_ids")


def tokenize(
    splits: datasets.DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    with_sentences: Collection[str] = (),
) -> tuple[datasets.DatasetDict, dict[str, dict]]:
    """Tokenize texts, truncated at ``max_length`` and not padded.

    Args:
        splits: from `training.splits.load_splits`.
        max_length: most tokens of a text, special tokens included.
        with_sentences: splits that also get a column ``sentences``, see `training.views.sentence_numbers`.

    Returns:
        The splits, with the columns ``input_ids``, ``attention_mask``, ``token_type_ids`` (if the tokenizer has them),
        ``length`` (of ``input_ids``), ``labels``, ``row`` and ``text_id``. And the `length_report` of each split, from
        the token counts before truncation.

    Raises:
        InputError: the tokenizer is a slow one, without token offsets.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} is not a fast tokenizer (of the tokenizers library), which serving the "
            "checkpoint requires: use another encoder"
        )

    def tokens(batch: dict[str, list], with_sentences: bool) -> dict[str, list]:
        encoded: Any
        encoded, lengths = _encode(batch["text"], tokenizer, max_length)
        kept = {column: encoded[column] for column in TOKEN_COLUMNS if column in encoded}
        if with_sentences:
            ends = [[end for _, end in piece.offsets] for piece in encoded.encodings]
            kept["sentences"] = [sentence_numbers(*pair) for pair in zip(batch["text"], ends, strict=True)]
        return {
            **kept,
            "length": [len(ids) for ids in encoded["input_ids"]],
            "full_length": lengths,
            "labels": batch["label"],
            "row": batch["row"],
            "text_id": batch["text_id"],
        }

    tokenized, reports = datasets.DatasetDict(), {}
    for split, rows in splits.items():
        rows = rows.map(
            tokens,
            batched=True,
            remove_columns=rows.column_names,
            desc=f"tokenizing {split}",
            fn_kwargs={"with_sentences": split in with_sentences},
        )
        reports[split] = length_report(rows.with_format("numpy")["full_length"][:], max_length)
        tokenized[split] = rows.remove_columns("full_length")
    return tokenized, reports


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[BatchEncoding, list[int]]:
    """Return the encoded batch, and the token count of each text before truncation."""
    encoded = tokenizer(
        list(texts), truncation=True, max_length=max_length, padding=False, return_attention_mask=True, stride=0
    )
    special = tokenizer.num_special_tokens_to_add()  # every overflowing piece has its own
    lengths = [len(piece) + sum(len(rest) - special for rest in piece.overflowing) for piece in encoded.encodings]
    return encoded, lengths


def tokenize_splits(
    data: LabelledSplits, tokenizer: PreTrainedTokenizerBase, max_length: int, sentences: bool = False
) -> datasets.DatasetDict:
    """Tokenize the splits and log the data report. Validation and test rows are sorted by length to reduce padding.

    Args:
        sentences: whether training rows get the column ``sentences``, see `training.views`.
    """
    with_sentences = ("train",) if sentences else ()
    splits, data.report["lengths"] = tokenize(data.splits, tokenizer, max_length, with_sentences)
    for name in splits.keys() - {"train"}:
        splits[name] = splits[name].select(np.argsort(splits[name]["length"], kind="stable"))
    log_report(data.report)
    return splits
