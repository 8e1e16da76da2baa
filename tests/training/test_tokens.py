"""Test tokenization against the tokenizer's own truncation."""

import datasets
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hierarchical_clinicalbert.data.report import length_report
from hierarchical_clinicalbert.training.tokens import tokenize_splits


def word_tokenizer(**arguments):
    """Return a tokenizer with one token per word, between [CLS] and [SEP]."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(30))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=8, **arguments,
    )  # fmt: skip


def texts_of_lengths(lengths):
    texts, numbers = [" ".join(f"w{i}" for i in range(n)) for n in lengths], list(range(len(lengths)))
    columns = {"text": texts, "nodes": [[i] for i in numbers], "row": [10 + i for i in numbers], "text_id": numbers}
    return datasets.DatasetDict({"test": datasets.Dataset.from_dict(columns)})


def test_tokens_are_those_of_the_tokenizers_own_truncation(warned):
    words = [1, 5, 6, 7, 13, 30, 29]  # with two special tokens: 3, 7, 8, 9, 15, 32, 31
    splits, tokenizer = texts_of_lengths(words), word_tokenizer(model_input_names=["input_ids", "attention_mask"])
    tokenized, lengths = tokenize_splits(splits, tokenizer, 8)
    assert "longer than" not in warned.text
    rows = tokenized["test"]
    assert set(rows.column_names) == {"input_ids", "attention_mask", "length", "labels", "row", "text_id"}
    assert rows["input_ids"][:] == tokenizer(splits["test"]["text"][:], truncation=True, max_length=8)["input_ids"]
    assert rows["length"][:] == [3, 7, 8, 8, 8, 8, 8]
    assert rows["attention_mask"][:] == [[1] * n for n in rows["length"]]
    assert rows["labels"][:] == [[0], [1], [2], [3], [4], [5], [6]]
    assert rows["row"][:] == [10, 11, 12, 13, 14, 15, 16]
    assert lengths == {"test": length_report([n + 2 for n in words], 8)}
    assert (lengths["test"]["truncated"], lengths["test"]["max"]) == (4, 32)
    tokenizer(splits["test"]["text"][:])
    assert "longer than" in warned.text  # so it would have been seen


def test_tokens_of_training_texts_know_their_sentences():
    rows = texts_of_lengths([1, 1]).pop("test")
    rows = rows.remove_columns("text").add_column("text", ["a b. c d e? f g", "a"])
    splits = datasets.DatasetDict({"train": rows, "test": rows})
    tokenized, _ = tokenize_splits(splits, word_tokenizer(), 6, sentences=True)
    assert tokenized["train"]["sentences"][:] == [[-1, 0, 0, 1, 1, -1], [-1, 0, -1]]
    assert "sentences" not in tokenized["test"].column_names
