"""Test the splits and the data report, with one path and with any number of nodes a text, against
cases worked by hand.
"""

import hashlib
import json
import logging
import random
from collections import Counter
from itertools import chain, combinations

import numpy as np
import pytest
from labelled_files import (
    MANY,
    SECRET,
    csv_file,
    files_of,
    label_sets,
    load,
    load_labels,
    load_rows,
)

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


def hashes(texts):
    return frozenset(map(text_hash, texts))


# ── Split off ─────────────────────────────────────────────────────────────────────────────────────


@FORMS
def test_one_file_is_split_by_class_with_identical_texts_together(tmp_path, flags):
    rows = skewed(1500, 0)
    given = {"data_path": csv_file(tmp_path / "a.csv", rows), "validation_size": 0.15, **flags}
    data = load(**given, test_size=0.1)
    texts = {split: hashes(part["text"]) for split, part in data.splits.items()}
    assert list(texts) == ["train", "validation", "test"]
    assert frozenset.union(*texts.values()) == hashes(text for text, _ in rows)
    assert all(not texts[one] & texts[other] for one, other in combinations(texts, 2))
    # exact shares of the distinct texts: 0.15 and 0.1 of 1500
    assert (len(texts["validation"]), len(texts["test"])) == (225, 150)
    # each class to within a few rows of its share (repeated texts have more than one)
    counts = {split: Counter(chain(*part["nodes"])) for split, part in data.splits.items()}
    everywhere = sum(counts.values(), Counter())
    for split, share in (("validation", 0.15), ("test", 0.1)):
        for node, count in everywhere.items():
            assert abs(counts[split][node] - share * count) <= 3 + 0.15 * share * count
    again = load(0, **given, test_size=0.1).splits["test"]["row"][:]
    other = load(1, **given, test_size=0.1).splits["test"]["row"][:]
    assert again == data.splits["test"]["row"][:] != other


def test_hashes_of_the_report_are_those_by_which_runs_resume(tmp_path):
    path = csv_file(tmp_path / "a.csv", skewed(300, 0))
    data = load(data_path=path, validation_size=0.15, test_size=0.1)
    everything = [(row["row"], row["nodes"]) for split in data.splits.values() for row in split]
    labels = json.dumps([nodes for _, nodes in sorted(everything)]).encode()
    rows_sha256 = {}
    for split in ("train", "validation"):
        numbers = np.array(sorted(data.splits[split]["row"]), dtype=np.int64)
        rows_sha256[split] = hashlib.sha256(numbers.tobytes()).hexdigest()
    assert data.report["split"] == {
        "method": "by class, identical texts kept together",
        "split_off": {"test": 0.1, "validation": 0.15},
        "seed": 0,
        "labels_sha256": hashlib.sha256(labels).hexdigest(),
        "rows_sha256": rows_sha256,
    }


@FORMS
def test_rare_classes_give_their_share_too(tmp_path, flags):
    rows = [(f"text {i}", "common") for i in range(1000)]
    rows += [(f"text {i}", f"rare {i % 200}") for i in range(1000, 1600)]  # of three texts each
    path = csv_file(tmp_path / "a.csv", rows)
    data = load(data_path=path, **flags)
    for split in ("validation", "test"):
        found = Counter(label.split()[0] for (label,) in label_sets(data, split).values())
        assert found["common"] == pytest.approx(100, abs=1)
        assert found["rare"] == pytest.approx(60, abs=1)
    assert data.report["classes_without_training_rows"] == []


@FORMS
def test_a_class_keeps_a_text_to_train_on(tmp_path, flags):
    rows = [(f"text {i}", f"common {i % 5}") for i in range(50)]
    rows += [(f"single {i}", f"rare {i}") for i in range(10)]
    path = csv_file(tmp_path / "a.csv", rows)
    for seed in range(5):
        data = load(seed=seed, data_path=path, validation_size=0.3, test_size=0.3, **flags)
        assert data.report["classes_without_training_rows"] == []
    rows = [(f"text {i}", f"class {i % 60}") for i in range(150)]  # two or three each
    path = csv_file(tmp_path / "b.csv", rows)
    for share in (0.3, 0.5, 0.6):
        data = load(train_file=path, validation_size=share, **flags)
        assert data.report["classes_without_training_rows"] == []
        assert len(data.splits["validation"]) == round(share * 150)


@FORMS
@pytest.mark.parametrize(
    ("use", "split", "left"),
    [
        ("earlier", "validation", 5),
        ("earlier", "validation", 60),
        ("earlier_validation", "test", 30),
    ],
)
def test_texts_of_an_earlier_run_are_not_split_off(tmp_path, flags, use, split, left):
    """Texts that trained it are not scored, and texts that calibrated it are no test texts."""
    rows = [(f"text {i}", "xyz"[i % 3]) for i in range(100)]
    path = csv_file(tmp_path / "a.csv", rows)
    trained = TrainedTexts(**{use: hashes(text for text, _ in rows[left:])})
    sizes = {"validation_size": 0, "test_size": 0} | {f"{split}_size": 0.2}
    data = load(data_path=path, trained=trained, **sizes, **flags)
    split_off = data.splits[split]["row"][:]
    assert set(split_off) <= set(range(left))
    assert len(split_off) == pytest.approx(min(20, left), abs=3)


@FORMS
def test_texts_of_an_earlier_run_are_left_out_of_given_rows(tmp_path, caplog, flags):
    trained = TrainedTexts(hashes("ab"), hashes("c"), hashes("d"))
    files = files_of(
        tmp_path,
        train=[("a", "x"), ("e", "y")],
        validation=[("B", "x"), ("d", "y"), ("f", "x")],
        test=[("a", "x"), ("c", "y"), (" d", "x"), ("g", "x")],
    )
    data = load(**files, trained=trained, **flags)
    texts = {split: part["text"][:] for split, part in data.splits.items()}
    # a text that calibrated the checkpoint may calibrate again, and is no test text
    assert texts == {"train": ["a", "e"], "validation": ["d", "f"], "test": ["g"]}
    left_out = {"validation": 1, "test": 3}
    assert data.report["trained_before"] == {"scores": "verified", "left_out": left_out}
    assert "calibrated on the texts: 1 validation rows and 3 test rows" in caplog.text


@FORMS
def test_too_few_texts_to_split_are_refused(tmp_path, flags):
    path = csv_file(tmp_path / "a.csv", [("one", "a"), ("two", "b"), ("three", "a")])
    message = r"cannot split off test rows: too few of 3 .*--test_size, or 0 for no test rows"
    with pytest.raises(InputError, match=message):
        load(data_path=path, **flags)
    trained = TrainedTexts(hashes(["one", "two", "three"]))
    with pytest.raises(InputError, match="all texts that trained the checkpoint stay"):
        load(train_file=path, validation_size=0.5, trained=trained, **flags)


def test_nothing_is_split_off_for_a_size_of_zero_or_where_a_file_is_given(tmp_path):
    path = csv_file(tmp_path / "a.csv", [(f"text {i}", "ab"[i % 2]) for i in range(40)])
    test = csv_file(tmp_path / "b.csv", [("test", "a")])
    assert list(load(data_path=path, validation_size=0).splits) == ["train", "test"]
    assert list(load(data_path=path, test_size=0).splits) == ["train", "validation"]
    assert list(load(train_file=path).splits) == ["train", "validation"]
    assert list(load(train_file=path, test_file=test).splits) == ["train", "validation", "test"]
    for split in ("validation", "test"):
        data = load(known=Taxonomy(["a", "b"]), **{f"{split}_file": test})
        assert list(data.splits) == [split]
        assert data.report["classes_without_training_rows"] == []
        assert data.report["split"]["split_off"] == {}
        with pytest.raises(InputError, match=f"--{split}_size has no effect here, as the data are"):
            load(train_file=path, validation_file=test, **{f"{split}_size": 0.2})


def test_validation_texts_without_any_label_are_refused(tmp_path):
    files = files_of(tmp_path, train=[("p", "x"), ("q", "y")], validation=[("r", ""), ("s", "")])
    with pytest.raises(InputError, match=r"no validation text has a label.* or label more texts"):
        load(**files, label_delimiter=";")
    # calibrated before
    scored = load(**files, label_delimiter=";", known=Taxonomy(["x", "y"]), trains=False)
    assert scored.splits.keys() == {"validation"}


# ── A text in several splits ──────────────────────────────────────────────────────────────────────


@FORMS
def test_a_text_belongs_to_one_split_of_those_given(tmp_path, caplog, flags):
    files = files_of(
        tmp_path,
        train=[("One", "a"), ("two", "b"), ("three", "a"), ("ONE", "a"), ("four", "b")],
        validation=[(" one", "a"), ("five", "b"), ("six", "a")],
        test=[("two ", "a"), ("five", "b")],
    )
    with caplog.at_level(logging.INFO):
        data = load(**files, **flags)
    texts = {split: part["text"][:] for split, part in data.splits.items()}
    # nothing is fitted on a text of the test file
    assert texts == {
        "train": ["three", "four"],
        "validation": [" one", "six"],
        "test": ["two ", "five"],
    }
    assert data.splits["train"]["row"][:] == [2, 4]
    num_rows = 2 if flags else 3  # with any number of nodes, both rows of "one" were merged before
    dropped = {split: counts["dropped_rows"] for split, counts in data.report["splits"].items()}
    assert dropped == {"train": num_rows, "validation": 1, "test": 0}
    message = f"since a later split has the texts: {num_rows} train rows and 1 validation rows"
    assert message in caplog.text
    for split, others in (("train", "validation or test"), ("validation", "test")):
        message = f"no {split} rows are left: every {split} text is also in {others}"
        with pytest.raises(InputError, match=message):
            load(**files | {f"{split}_file": files["test_file"]}, **flags)


@pytest.mark.parametrize(
    "variant",
    [
        "cafe\u0301 au lait, 5\u00b5g",
        "\ufeffCAF\u00c9  AU\tLAIT, 5\u00b5G",
        "ca\u200bf\u00e9 au\u00a0lait,\u2060 \uff15\u03bcg",
    ],
)
def test_unicode_variants_of_a_text_are_that_text(tmp_path, variant):
    other = "cafe au lait, 5\u03bcg"  # a different word that looks the same
    test = [("caf\u00e9 au lait, 5\u03bcg", "a"), ("more", "b")]
    data = load(
        **files_of(tmp_path, train=[(variant, "a"), (other, "b")], test=test), validation_size=0
    )
    assert data.splits["train"]["text"][:] == [other]


# ── Report ────────────────────────────────────────────────────────────────────────────────────────


def test_duplicates_conflicts_and_the_ceiling_by_hand(tmp_path):
    # p: a, a, b   q: a, a   r: b, c   s: c      8 rows, 4 distinct texts
    data = load_rows(tmp_path, [*zip(["P", "p", "p ", *"qqrrs"], "aabaabcc", strict=True)])
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
    found = load_rows(tmp_path, rows).report["splits"]["train"]
    assert (found["conflicting_texts"], found["conflicting_rows"]) == (1, 3)
    assert found["accuracy_ceiling"] == 3 / 4  # of p's x, q's x and y, r's b


def test_labels_of_sets_by_hand(tmp_path):
    # of a text with an ancestor, only the deepest label counts
    sets = [["x", "z"], ["z", "x", "a"], ["u"], [], ["c", "x"]]
    data = load_labels(tmp_path, sets, known=TREE)
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
    rows = [(SECRET, "a/x"), (SECRET, "b"), ("two", "a")]
    rows += [(f"text {i}", f"c/{i}") for i in range(20)]
    with caplog.at_level(logging.INFO):
        files = files_of(tmp_path, train=rows, test=[("another", text)])
        data = load(**files, validation_size=0)
        log_report(data.report, {split: length_report([5, 5, 9], 8) for split in data.splits})
    assert "train: rows 23, normalised duplicates 1, conflicting texts 1" in caplog.text
    # 21 of 22 rows that have a leaf can be correct
    assert "accuracy ceiling 0.954545" in caplog.text
    assert "5 tokens per text in the median, 9 at most; 1 texts truncated at 8" in caplog.text
    assert f"1 classes without training rows: (a value of {len(text)} characters)" in caplog.text
    assert SECRET not in caplog.text
    assert "Example" not in caplog.text
