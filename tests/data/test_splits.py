"""Test the splits and the data report, with one path and with any number of nodes a text, against
cases worked by hand.
"""

import hashlib
import json
import logging
import random
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from labelled_files import MANY, SECRET, csv_file, json_lines, label_sets, load

from hierarchical_clinicalbert.data.report import length_report, log_report
from hierarchical_clinicalbert.data.trained_texts import TrainedTexts
from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.reading.columns import text_hash
from taxonomy_hierarchical import Taxonomy

TREE = Taxonomy({"a": ["x", "y"], "b": ["z", {"c": ["u", "v"]}]})
FORMS = pytest.mark.parametrize(
    "flags", [{}, {"problem_type": MANY}], ids=["one path", "many nodes"]
)


def skewed(rows, seed):
    """Draw rows of skewed classes.

    A fifth of the texts repeat with other spelling, some with another label.
    """
    draw = random.Random(seed)
    made = [
        (f"Case {i} of the disease", draw.choices("abcde", (50, 25, 15, 8, 2))[0])
        for i in range(rows)
    ]
    for text, label in draw.sample(made, rows // 5):
        spelt = draw.choice((text.upper(), f" {text}\n", text.replace(" ", "  "), text))
        made.append((spelt, draw.choice((label, "a"))))
    draw.shuffle(made)
    return made


def texts_of(data):
    return {
        split: {text_hash(text) for text in part["text"]} for split, part in data.splits.items()
    }


# ── Split off ─────────────────────────────────────────────────────────────────────────────────────


@FORMS
def test_one_file_is_split_by_class_with_identical_texts_together(tmp_path, flags):
    rows = skewed(1500, 0)
    path = csv_file(tmp_path / "a.csv", rows)
    data = load(data_path=path, validation_size=0.15, test_size=0.1, **flags)
    texts = texts_of(data)
    assert list(texts) == ["train", "validation", "test"]
    assert set.union(*texts.values()) == {text_hash(text) for text, _ in rows}
    assert all(not texts[one] & texts[other] for one, other in combinations(texts, 2))
    # exact shares of the distinct texts: 0.15 and 0.1 of 1500
    assert (len(texts["validation"]), len(texts["test"])) == (225, 150)
    # each class to within a few rows of its share (repeated texts have more than one)
    counts = {
        s: Counter(data.taxonomy.labels[n] for ids in part["nodes"] for n in ids)
        for s, part in data.splits.items()
    }
    everywhere = sum(counts.values(), Counter())
    for split, share in (("validation", 0.15), ("test", 0.1)):
        for label, count in everywhere.items():
            assert abs(counts[split][label] - share * count) <= 3 + 0.15 * share * count, (
                split,
                label,
            )
    again, other = (
        load(seed, data_path=path, validation_size=0.15, test_size=0.1, **flags) for seed in (0, 1)
    )
    assert (
        again.splits["test"]["row"][:]
        == data.splits["test"]["row"][:]
        != other.splits["test"]["row"][:]
    )


def test_hashes_of_the_report_are_those_by_which_runs_resume(tmp_path):
    data = load(
        data_path=csv_file(tmp_path / "a.csv", skewed(300, 0)), validation_size=0.15, test_size=0.1
    )
    everything = sorted(
        (row["row"], row["nodes"]) for split in data.splits.values() for row in split
    )
    labels = json.dumps([nodes for _, nodes in everything])
    rows = {
        split: np.sort(np.array(data.splits[split]["row"], dtype=np.int64))
        for split in ("train", "validation")
    }
    assert data.report["split"] == {
        "method": "by class, identical texts kept together",
        "split_off": {"test": 0.1, "validation": 0.15},
        "seed": 0,
        "labels_sha256": hashlib.sha256(labels.encode()).hexdigest(),
        "rows_sha256": {
            split: hashlib.sha256(numbers.tobytes()).hexdigest() for split, numbers in rows.items()
        },
    }


@FORMS
def test_rare_classes_give_their_share_too(tmp_path, flags):
    rows = [(f"text {i}", "common") for i in range(1000)]
    rows += [(f"text {i}", f"rare {i % 200}") for i in range(1000, 1600)]  # of three texts each
    data = load(
        data_path=csv_file(tmp_path / "a.csv", rows), validation_size=0.1, test_size=0.1, **flags
    )
    for split in ("validation", "test"):
        found = Counter(label.split()[0] for (label,) in label_sets(data, split).values())
        assert found["common"] == pytest.approx(100, abs=1)
        assert found["rare"] == pytest.approx(60, abs=1)
    assert data.report["classes_without_training_rows"] == []


@FORMS
def test_a_class_keeps_a_text_to_train_on(tmp_path, flags):
    rows = [(f"text {i}", f"common {i % 5}") for i in range(50)] + [
        (f"single {i}", f"rare {i}") for i in range(10)
    ]
    path = csv_file(tmp_path / "a.csv", rows)
    for seed in range(5):
        data = load(seed=seed, data_path=path, validation_size=0.3, test_size=0.3, **flags)
        assert data.report["classes_without_training_rows"] == []
    path = csv_file(
        tmp_path / "b.csv", [(f"text {i}", f"class {i % 60}") for i in range(60 + 60 + 30)]
    )  # two or three each
    for share in (0.3, 0.5, 0.6):
        data = load(train_file=path, validation_size=share, **flags)
        assert data.report["classes_without_training_rows"] == []
        assert len(data.splits["validation"]) == round(share * 150)


@FORMS
@pytest.mark.parametrize("left", [5, 60])
def test_texts_of_an_earlier_run_are_never_split_off(tmp_path, left, flags):
    rows = [(f"text {i}", "xyz"[i % 3]) for i in range(100)]
    earlier = TrainedTexts(earlier=frozenset(text_hash(text) for text, _ in rows[left:]))
    file = csv_file(tmp_path / "a.csv", rows)
    split_off = load(train_file=file, validation_size=0.2, trained=earlier, **flags).splits[
        "validation"
    ]["row"][:]
    assert set(split_off) <= set(range(left))
    assert len(split_off) == pytest.approx(min(20, left), abs=3)


@FORMS
def test_texts_that_calibrated_an_earlier_run_are_not_split_off_for_the_test(tmp_path, flags):
    rows = [(f"text {i}", "xyz"[i % 3]) for i in range(100)]
    calibrated = TrainedTexts(
        earlier_validation=frozenset(text_hash(text) for text, _ in rows[:70])
    )
    data = load(
        data_path=csv_file(tmp_path / "a.csv", rows), test_size=0.2, trained=calibrated, **flags
    )
    test = data.splits["test"]["row"][:]
    assert set(test) <= set(range(70, 100))
    assert len(test) == pytest.approx(20, abs=3)


@FORMS
def test_texts_of_an_earlier_run_are_left_out_of_given_rows(tmp_path, caplog, flags):
    trained = TrainedTexts(
        *(frozenset(map(text_hash, texts)) for texts in (["a", "b"], ["c"], ["d"]))
    )
    files = {
        "train_file": csv_file(tmp_path / "a.csv", [("a", "x"), ("e", "y")]),
        "validation_file": csv_file(tmp_path / "b.csv", [("B", "x"), ("d", "y"), ("f", "x")]),
        "test_file": csv_file(
            tmp_path / "c.csv", [("a", "x"), ("c", "y"), (" d", "x"), ("g", "x")]
        ),
    }
    data = load(**files, trained=trained, **flags)
    texts = {split: part["text"][:] for split, part in data.splits.items()}
    # a text that calibrated the checkpoint may calibrate again, and is no test text
    assert texts == {"train": ["a", "e"], "validation": ["d", "f"], "test": ["g"]}
    assert data.report["trained_before"] == {
        "scores": "verified",
        "left_out": {"validation": 1, "test": 3},
    }
    assert "calibrated on the texts: 1 validation rows and 3 test rows" in caplog.text


@FORMS
def test_too_few_texts_to_split_are_refused(tmp_path, flags):
    path = csv_file(tmp_path / "a.csv", [("one", "a"), ("two", "b"), ("three", "a")])
    with pytest.raises(
        InputError,
        match=r"cannot split off test rows: too few of 3 .*--test_size, or 0 for no test rows",
    ):
        load(data_path=path, **flags)
    trained = TrainedTexts(frozenset(map(text_hash, ["one", "two", "three"])))
    with pytest.raises(InputError, match="all texts that trained the checkpoint stay"):
        load(train_file=path, validation_size=0.5, trained=trained, **flags)


def test_nothing_is_split_off_for_a_size_of_zero_or_where_a_file_is_given(tmp_path):
    path = csv_file(tmp_path / "a.csv", [(f"text {i}", "ab"[i % 2]) for i in range(40)])
    test = csv_file(tmp_path / "b.csv", [("test", "a")])
    assert list(load(data_path=path, validation_size=0).splits) == ["train", "test"]
    assert list(load(data_path=path, test_size=0).splits) == ["train", "validation"]
    assert list(load(train_file=path).splits) == ["train", "validation"]
    assert list(load(train_file=path, test_file=test).splits) == ["train", "validation", "test"]
    for flag in ("validation_file", "test_file"):
        data = load(known=Taxonomy(["a", "b"]), **{flag: test})
        assert list(data.splits) == [flag.removesuffix("_file")]
        assert data.report["classes_without_training_rows"] == []
        assert data.report["split"]["split_off"] == {}
    for files, flag in (
        ({"train_file": path, "validation_file": test}, "validation"),
        ({"train_file": path}, "test"),
    ):
        with pytest.raises(
            InputError, match=f"--{flag}_size has no effect here, as the data are given by split"
        ):
            load(**files, **{f"{flag}_size": 0.2})


def test_validation_texts_without_any_label_are_refused(tmp_path):
    files = {"train_file": csv_file(tmp_path / "a.csv", [("p", "x"), ("q", "y")])}
    files["validation_file"] = csv_file(tmp_path / "b.csv", [("r", ""), ("s", "")])
    with pytest.raises(InputError, match=r"no validation text has a label.* or label more texts"):
        load(**files, label_delimiter=";")
    # calibrated before
    scored = load(**files, label_delimiter=";", known=Taxonomy(["x", "y"]), trains=False)
    assert scored.splits.keys() == {"validation"}


# ── A text in several splits ──────────────────────────────────────────────────────────────────────


@FORMS
def test_a_text_belongs_to_one_split_of_those_given(tmp_path, caplog, flags):
    files = {
        "train_file": csv_file(
            tmp_path / "a.csv",
            [("One", "a"), ("two", "b"), ("three", "a"), ("ONE", "a"), ("four", "b")],
        ),
        "validation_file": csv_file(
            tmp_path / "b.csv", [(" one", "a"), ("five", "b"), ("six", "a")]
        ),
        "test_file": csv_file(tmp_path / "c.csv", [("two ", "a"), ("five", "b")]),
    }
    with caplog.at_level(logging.INFO):
        data = load(**files, **flags)
    assert data.splits["train"]["text"][:] == ["three", "four"]
    assert data.splits["train"]["row"][:] == [2, 4]
    # nothing is fitted on a text of the test file
    assert data.splits["validation"]["text"][:] == [" one", "six"]
    assert data.splits["test"]["text"][:] == ["two ", "five"]
    num_rows = 2 if flags else 3  # with any number of nodes, both rows of "one" were merged before
    dropped = {split: counts["dropped_rows"] for split, counts in data.report["splits"].items()}
    assert dropped == {"train": num_rows, "validation": 1, "test": 0}
    assert (
        f"since a later split has the texts: {num_rows} train rows and 1 validation rows"
        in caplog.text
    )
    with pytest.raises(
        InputError, match="no train rows are left: every train text is also in validation or test"
    ):
        load(train_file=files["train_file"], test_file=files["train_file"], **flags)
    with pytest.raises(
        InputError, match="no validation rows are left: every validation text is also in test"
    ):
        load(**{**files, "validation_file": files["test_file"]}, **flags)


@pytest.mark.parametrize(
    "variant",
    [
        "cafe\u0301 au lait, 5\u00b5g",
        "\ufeffCAF\u00c9  AU\tLAIT, 5\u00b5G",
        "ca\u200bf\u00e9 au\u00a0lait,\u2060 \uff15\u03bcg",
    ],
)
def test_unicode_variants_of_a_text_are_that_text(tmp_path, variant):
    plain = "caf\u00e9 au lait, 5\u03bcg"
    other = "cafe au lait, 5\u03bcg"
    train = csv_file(tmp_path / "a.csv", [(variant, "a"), (other, "b")])
    test = csv_file(tmp_path / "b.csv", [(plain, "a"), ("more", "b")])
    data = load(train_file=train, test_file=test, validation_size=0)
    assert data.splits["train"]["text"][:] == [other]  # a different word that looks the same


# ── Report ────────────────────────────────────────────────────────────────────────────────────────


def test_duplicates_conflicts_and_the_ceiling_by_hand(tmp_path):
    # p: a, a, b   q: a, a   r: b, c   s: c      8 rows, 4 distinct texts
    rows = [
        ("P", "a"),
        ("p", "a"),
        ("p ", "b"),
        ("q", "a"),
        ("q", "a"),
        ("r", "b"),
        ("r", "c"),
        ("s", "c"),
    ]
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
    # a parent and its child are no conflict
    rows = [("p", "a"), ("p", "a/x"), ("q", "a"), ("q", "a/x"), ("q", "a/y"), ("r", "b")]
    found = load(train_file=csv_file(tmp_path / "a.csv", rows), validation_size=0).report["splits"][
        "train"
    ]
    assert (found["conflicting_texts"], found["conflicting_rows"]) == (1, 3)
    assert found["accuracy_ceiling"] == 3 / 4  # of p's x, q's x and y, r's b


def test_labels_of_sets_by_hand(tmp_path):
    # of a text with an ancestor, only the deepest label counts
    sets = [["x", "z"], ["z", "x", "a"], ["u"], [], ["c", "x"]]
    data = load(train_file=json_lines(tmp_path / "a.jsonl", sets), known=TREE, validation_size=0.0)
    assert data.report["splits"]["train"] == {
        "rows": 5,
        "dropped_rows": 0,
        "labels_per_text": 7 / 5,
        "texts_without_labels": 1,
        "classes": {"1": {"a": 3, "b": 4}, "2": {"x": 3, "z": 2, "c": 2}, "3": {"u": 1}},
    }
    assert data.report["classes_without_training_rows"] == ["y", "v"]


def test_the_log_shows_the_numbers_and_no_text(tmp_path, caplog):
    text = "Mrs Example of Nowhere Lane 7 was admitted with chest pain"
    rows = [(SECRET, "a/x"), (SECRET, "b"), ("two", "a")] + [
        (f"text {i}", f"c/{i}") for i in range(20)
    ]
    test = csv_file(tmp_path / "test.csv", [("another", text)])
    with caplog.at_level(logging.INFO):
        data = load(
            train_file=csv_file(tmp_path / "a.csv", rows), test_file=test, validation_size=0
        )
        log_report(data.report, {split: length_report([5, 5, 9], 8) for split in data.splits})
    assert "train: rows 23, normalised duplicates 1, conflicting texts 1" in caplog.text
    # 21 of 22 rows that have a leaf can be correct
    assert "accuracy ceiling 0.954545" in caplog.text
    assert "5 tokens per text in the median, 9 at most; 1 texts truncated at 8" in caplog.text
    assert f"1 classes without training rows: (a value of {len(text)} characters)" in caplog.text
    assert SECRET not in caplog.text
    assert "Example" not in caplog.text
