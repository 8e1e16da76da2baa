"""Test halves of texts against the sentences of the texts."""

import copy
import itertools

import datasets

from decisions_hierarchical import OnePath
from hierarchical_clinicalbert.training.tokens import Collator, tokenize_splits
from hierarchical_clinicalbert.training.views import NO_SENTENCE, halves, sentence_numbers
from taxonomy_hierarchical import Taxonomy

TEXTS = [
    (
        "A trial of stents. Forty patients were treated? All recovered (p < 0.05)! None died; "
        "follow-up was 2.5 years."
    ),
    "Only one sentence, without an end",
    "Title of the second. Its only other sentence.",
    "Asthma. Cough. Wheezing. Fever. Chills. Nausea. Rash.",
]
SENTENCES = [
    text.replace("? ", "?|").replace("! ", "!|").replace(". ", ".|").split("|") for text in TEXTS
]


def batch_of(tokenizer, texts, rows):
    features = []
    for text, row in zip(texts, rows, strict=True):
        encoded = tokenizer(text, return_offsets_mapping=True)
        numbers = sentence_numbers(text, [end for _, end in encoded.pop("offset_mapping")])
        features.append({**encoded, "sentences": numbers, "row": row})
    batch = dict(Collator(tokenizer, OnePath(Taxonomy(["a", "b"])).targets)(features))
    return batch, batch.pop("sentences"), batch.pop("row").tolist()


def halved(tokenizer, step, texts=TEXTS, rows=(10, 11, 12, 13), seed=3):
    batch, sentences, numbers = batch_of(tokenizer, texts, rows)
    return halves(batch, sentences, numbers, tokenizer.pad_token_id, seed, step)


def tokens(inputs, view):
    return inputs["input_ids"][view][inputs["attention_mask"][view].bool()].tolist()


def test_each_token_knows_its_sentence(tokenizer):
    for text, sentences in zip(TEXTS, SENTENCES, strict=True):
        encoded = tokenizer(text, return_offsets_mapping=True)
        numbers = sentence_numbers(text, [end for _, end in encoded["offset_mapping"]])
        by_hand = [
            i
            for i, one in enumerate(sentences)
            for _ in tokenizer(one, add_special_tokens=False)["input_ids"]
        ]
        assert numbers == [NO_SENTENCE, *by_hand, NO_SENTENCE]


def test_tokens_of_training_texts_know_their_sentences_also_where_texts_are_truncated(tokenizer):
    rows = {"text": ["a b. c d e? f g", "a"], "nodes": [[0], [1]], "row": [0, 1], "text_id": [0, 1]}
    splits = {split: datasets.Dataset.from_dict(rows) for split in ("train", "test")}
    limited = copy.deepcopy(tokenizer)
    limited.model_max_length = 6
    tokenized, _ = tokenize_splits(datasets.DatasetDict(splits), limited, sentences=True)
    assert tokenized["train"]["sentences"][:] == [[-1, 0, 0, 0, 1, -1], [-1, 0, -1]]
    assert "sentences" not in tokenized["test"].column_names


def find_halves(ids, parts):
    """Return the sentences of each half, given the tokens of both, each truncated at 55 % of the
    text's tokens; else None.
    """
    numbers = range(len(ids))
    limit = int(0.55 * sum(map(len, ids)))
    for size in range(1, len(ids)):
        for one in itertools.combinations(numbers, size):
            other = tuple(i for i in numbers if i not in one)
            for pair in ((one, other), (tuple(sorted({0, *one})), tuple(sorted({0, *other})))):
                if [[token for i in half for token in ids[i]][:limit] for half in pair] == parts:
                    return pair
    return None


def test_halves_share_out_the_sentences_in_their_order(tokenizer):
    deals = [[] for _ in TEXTS]
    for step in range(60):
        inputs, first, second = halved(tokenizer, step)
        for i, sentences in enumerate(SENTENCES):
            ids = [tokenizer(one, add_special_tokens=False)["input_ids"] for one in sentences]
            parts = [tokens(inputs, view[i]) for view in (first, second)]
            assert all(
                (part[0], part[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
                for part in parts
            )
            if len(sentences) == 1:
                assert first[i] == second[i]
                assert parts[0][1:-1] == ids[0]
            else:
                deals[i].append(find_halves(ids, [part[1:-1] for part in parts]))
                assert deals[i][-1] is not None, (step, i)
        padding = inputs["attention_mask"] == 0
        assert (inputs["input_ids"][padding] == tokenizer.pad_token_id).all()
    assert len(set(deals[3])) > 20  # of seven sentences, another deal in most steps
    both = [0 in one and 0 in other for one, other in deals[3]]
    assert 0.5 < sum(both) / len(both) < 0.9
