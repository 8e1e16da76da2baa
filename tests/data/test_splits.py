"""Test the splits and the data report against cases worked by hand."""

import hashlib
import json
import logging
import random
import re
from collections import Counter

import numpy as np
import pytest
from labelled_files import SECRET, csv_file, labels_of, load

from hierarchical_clinicalbert.data.report import length_report, log_report
from hierarchical_clinicalbert.errors import InputError
from taxonomy_hierarchical import Taxonomy


def normalised(text):
    return re.sub(r"\s+", " ", text).strip().casefold()


def corpus(rows, seed):
    """Draw rows of skewed classes. A fifth of the texts repeat with other spelling, some with another label."""
    draw = random.Random(seed)
    made = [(f"Case {i} of the disease", draw.choices("abcde", (50, 25, 15, 8, 2))[0]) for i in range(rows)]
    for text, label in draw.sample(made, rows // 5):
        made.append(
            (draw.choice((text.upper(), f" {text}\n", text.replace(" ", "  "), text)), draw.choice((label, "a")))
        )
    draw.shuffle(made)
    return made


@pytest.mark.parametrize("seed", range(5))
def test_one_file_is_split_by_class_with_identical_texts_together(tmp_path, seed):
    rows = corpus(1500, seed)
    path = csv_file(tmp_path / "a.csv", rows)
    data = load(seed=seed, data_path=path, validation_size=0.15, test_size=0.1)
    assert list(data.splits) == ["train", "validation", "test"]
    # every row is in exactly one split, and says which it was
    placed = sorted(
        (row, text) for part in data.splits.values() for row, text in zip(part["row"], part["text"], strict=True)
    )
    assert placed == list(enumerate(text for text, _ in rows))
    texts = {split: {normalised(text) for text in part["text"]} for split, part in data.splits.items()}
    assert not texts["train"] & texts["validation"]
    assert not texts["train"] & texts["test"]
    assert not texts["validation"] & texts["test"]
    # exact shares of the distinct texts: 0.15 and 0.1 of 1500
    assert (len(texts["validation"]), len(texts["test"])) == (225, 150)
    # each class to within a few rows of its share (duplicated texts have more than one)
    everywhere = Counter(label for _, label in rows)
    for split, share in (("validation", 0.15), ("test", 0.1)):
        found = Counter(labels_of(data, split))
        for label, count in everywhere.items():
            assert abs(found[label] - share * count) <= 3 + 0.15 * share * count, (split, label)
    everything = sorted((row["row"], row["nodes"]) for split in data.splits.values() for row in split)
    labels = json.dumps([False, [nodes for _, nodes in everything]])
    assert data.report["split"] == {
        "method": "by class, identical texts kept together", "split_off": {"test": 0.1, "validation": 0.15}, "seed": seed,
        "labels_sha256": hashlib.sha256(labels.encode()).hexdigest(),
        "rows_sha256": {
            split: hashlib.sha256(np.sort(np.array(data.splits[split]["row"], dtype=np.int64)).tobytes()).hexdigest()
            for split in ("train", "validation")
        },
    }  # fmt: skip


def test_splits_are_decided_by_the_seed(tmp_path):
    path = csv_file(tmp_path / "a.csv", corpus(300, 0))
    one, same, other = (load(seed=seed, data_path=path).splits["test"]["row"][:] for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_rare_classes_give_their_share_too(tmp_path):
    rows = [(f"text {i}", "common") for i in range(1000)]
    rows += [(f"text {i}", f"rare {i % 200}") for i in range(1000, 1600)]  # of three texts each
    data = load(data_path=csv_file(tmp_path / "a.csv", rows), validation_size=0.1, test_size=0.1)
    for split in ("validation", "test"):
        found = Counter(label.split()[0] for label in labels_of(data, split))
        assert found["common"] == pytest.approx(100, abs=1)
        assert found["rare"] == pytest.approx(60, abs=1)
    assert data.report["classes_without_training_rows"] == []


@pytest.mark.parametrize("share", [0.3, 0.5, 0.6])
def test_a_class_keeps_a_text_to_train_on(tmp_path, share):
    rows = [(f"text {i}", f"class {i % 60}") for i in range(60 + 60 + 30)]  # two or three a class
    path = csv_file(tmp_path / "a.csv", rows)
    for seed in range(5):
        data = load(seed=seed, train_file=path, validation_size=share)
        assert data.report["classes_without_training_rows"] == []
        assert len(data.splits["validation"]) == round(share * 150)


def test_a_class_of_one_text_stays_in_training(tmp_path):
    rows = [(f"text {i}", "common") for i in range(50)] + [("single", "rare")]
    for seed in range(5):
        data = load(seed=seed, data_path=csv_file(tmp_path / "a.csv", rows), validation_size=0.3, test_size=0.3)
        assert "rare" in labels_of(data, "train")


def test_nothing_is_split_off_for_a_size_of_zero_or_where_a_file_is_given(tmp_path):
    path = csv_file(tmp_path / "a.csv", [(f"text {i}", "ab"[i % 2]) for i in range(40)])
    test = csv_file(tmp_path / "b.csv", [("test", "a")])
    assert list(load(data_path=path, validation_size=0).splits) == ["train", "test"]
    assert list(load(data_path=path, test_size=0).splits) == ["train", "validation"]
    assert list(load(train_file=path).splits) == ["train", "validation"]
    assert list(load(train_file=path, test_file=test).splits) == ["train", "validation", "test"]
    assert load(train_file=path, test_file=test).splits["test"]["text"][:] == ["test"]
    for flag in ("validation_file", "test_file"):
        data = load(known=Taxonomy(["a", "b"]), **{flag: test})
        assert list(data.splits) == [flag.removesuffix("_file")]
        assert data.report["classes_without_training_rows"] == []
        assert data.report["split"]["split_off"] == {}


def test_too_few_rows_to_split_are_refused(tmp_path):
    path = csv_file(tmp_path / "a.csv", [("one", "a"), ("two", "b"), ("three", "a")])
    with pytest.raises(InputError, match=r"cannot split off test rows: 0 of 3 .*--test_size, or 0 for no test rows"):
        load(data_path=path)
    with pytest.raises(InputError, match="cannot split off validation rows: 2 of 3"):
        load(train_file=path, validation_size=0.7)


def test_texts_among_the_labels_are_not_logged(tmp_path, caplog):
    text = "Mrs Example of Nowhere Lane 7 was admitted with chest pain"
    rows = [(f"text {i}", ("a", "b", text)[i % 3]) for i in range(30)]
    csv_file(tmp_path / "train.csv", rows)
    csv_file(tmp_path / "test.csv", [("another", "Mrs Example was here. Twice")])
    with caplog.at_level(logging.INFO):
        files = {"train_file": tmp_path / "train.csv", "test_file": tmp_path / "test.csv"}
        load(**files, validation_size=0)
    assert "1 classes without training rows, such as (a value of 27 characters)" in caplog.text
    assert "Example" not in caplog.text


def test_a_text_belongs_to_one_split_of_those_given(tmp_path, caplog):
    train = [("One", "a"), ("two", "b"), ("three", "a"), ("ONE", "b"), ("four", "b")]
    arguments = {
        "train_file": csv_file(tmp_path / "a.csv", train),
        "validation_file": csv_file(tmp_path / "b.csv", [(" one", "a"), ("five", "b"), ("six", "a")]),
        "test_file": csv_file(tmp_path / "c.csv", [("two ", "a"), ("five", "b")]),
    }
    with caplog.at_level(logging.INFO):
        data = load(**arguments)
    assert data.splits["train"]["text"][:] == ["three", "four"]
    assert data.splits["train"]["row"][:] == [2, 4]
    assert data.splits["validation"]["text"][:] == [" one", "six"]  # nothing is fitted on a text of the test file
    assert data.splits["test"]["text"][:] == ["two ", "five"]
    dropped = {split: found["dropped_rows"] for split, found in data.report["splits"].items()}
    assert dropped == {"train": 3, "validation": 1, "test": 0}
    assert "since a later split has the texts: 3 train rows and 1 validation rows" in caplog.text
    with pytest.raises(InputError, match="no train rows are left: every train text is also in validation or test"):
        load(train_file=arguments["train_file"], test_file=arguments["train_file"])
    with pytest.raises(InputError, match="no validation rows are left: every validation text is also in test"):
        load(**{**arguments, "validation_file": arguments["test_file"]})


@pytest.mark.parametrize(
    "variant",
    ["caf\u00e9 au lait, 5\u00b5g", "cafe\u0301 au lait, 5\u03bcg", "\ufeffCaf\u00e9 au lait, 5\u03bcg",
     "ca\u200bf\u00e9 au\u00a0lait,\u2060 5\u00b5g", "ca\u00adfe\u200d\u0301 au lait, \uff15\u03bcg", "CAF\u00c9  AU\tLAIT, 5\u00b5G"],
)  # fmt: skip
def test_unicode_variants_of_a_text_are_that_text(tmp_path, variant):
    plain = "caf\u00e9 au lait, 5\u03bcg"
    train = csv_file(tmp_path / "a.csv", [(variant, "a"), ("cafe au lait, 5\u03bcg", "b")])
    data = load(
        train_file=train, test_file=csv_file(tmp_path / "b.csv", [(plain, "a"), ("more", "b")]), validation_size=0
    )
    assert data.splits["train"]["text"][:] == ["cafe au lait, 5\u03bcg"]  # a different word that looks the same
    assert data.report["splits"]["train"]["dropped_rows"] == 1


def test_split_off_validation_has_no_text_of_the_test_file(tmp_path):
    rows = [(f"text {i}", "ab"[i % 2]) for i in range(60)]
    train = csv_file(tmp_path / "a.csv", rows)
    test = csv_file(tmp_path / "b.csv", [(text.upper(), label) for text, label in rows[:20]])
    data = load(train_file=train, test_file=test, validation_size=0.5)
    assert {split: len(part) for split, part in data.splits.items()} == {"train": 20, "validation": 20, "test": 20}
    assert not {t.lower() for t in data.splits["test"]["text"]} & set(data.splits["validation"]["text"])


# ── report ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_duplicates_conflicts_and_the_ceiling_by_hand(tmp_path):
    # p: a, a, b   q: a, a   r: b, c   s: c      8 rows, 4 distinct texts
    rows = [("P", "a"), ("p", "a"), ("p ", "b"), ("q", "a"), ("q", "a"), ("r", "b"), ("r", "c"), ("s", "c")]
    data = load(train_file=csv_file(tmp_path / "a.csv", rows), validation_size=0)
    assert data.report["splits"]["train"] == {
        "rows": 8,
        "dropped_rows": 0,
        "normalised_duplicates": 4,  # two of p, the second q, the second r
        "conflicting_texts": 2,  # p and r
        "conflicting_rows": 5,
        "accuracy_ceiling": 6 / 8,  # p 2, q 2, r 1, s 1
        "classes": {"1": {"a": 4, "b": 2, "c": 2}},
    }
    assert json.loads(json.dumps(data.report)) == data.report


def test_a_parent_and_its_child_are_no_conflict(tmp_path):
    rows = [("p", "a"), ("p", "a/x"), ("q", "a"), ("q", "a/x"), ("q", "a/y"), ("r", "b")]
    found = load(train_file=csv_file(tmp_path / "a.csv", rows), validation_size=0).report["splits"]["train"]
    assert (found["conflicting_texts"], found["conflicting_rows"]) == (1, 3)
    assert found["accuracy_ceiling"] == 3 / 4  # of p's x, q's x and y, r's b


def test_log_report_shows_the_numbers_and_no_text(tmp_path, caplog):
    rows = [(SECRET, "a/x"), (SECRET, "b"), ("two", "a")] + [(f"text {i}", f"c/{i}") for i in range(20)]
    data = load(train_file=csv_file(tmp_path / "a.csv", rows), validation_size=0)
    with caplog.at_level(logging.INFO):
        log_report(data.report, {"train": length_report([5, 5, 9], 8)})
    assert "train: rows 23, dropped rows 0, normalised duplicates 1, conflicting texts 1" in caplog.text
    assert "accuracy ceiling 0.954545" in caplog.text  # 21 of 22 rows that have a leaf can be correct
    assert "5 tokens per text in the median, 9 at most; 1 texts truncated at 8" in caplog.text
    assert SECRET not in caplog.text


def test_length_report_by_hand():
    # 1 … 100: the smallest count that q % of the texts do not exceed is q
    assert length_report(list(range(1, 101)), 90) == {
        "p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100, "max_length": 90, "truncated": 10, "truncated_share": 0.1,
    }  # fmt: skip
    assert length_report([4], 4)["truncated"] == 0
    assert length_report([1, 10], 8)["p50"] == 1  # a count that occurs, not the middle of two
