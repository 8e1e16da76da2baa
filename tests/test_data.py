"""Reading, checking, splitting and tokenizing data, against cases worked by hand and the libraries themselves."""

import hashlib
import json
import logging
import random
import re
from collections import Counter

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import transformers
from conftest import ROOT
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import reading.rows
from errors import InputError
from taxonomy_hierarchical import DEFAULT_TAXONOMY, Taxonomy, quote_name
from training.arguments import DataArguments, parse
from training.data_report import length_report, log_report
from training.labels import read_class_names
from training.splits import load_splits
from training.tokens import tokenize

SECRET = "patient Miller"  # stands for a text that must not be shown
ROWS = [("NA", "a/x"), ('007, a "quoted"\ntext', "a/y"), ("Ünïcode  text", "b"), ("None", "a")]


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()


def load(seed=0, known=None, **arguments):
    """`load_splits`, with ``known`` for the taxonomy of a checkpoint."""
    return load_splits(DataArguments(**{key: _text(value) for key, value in arguments.items()}), seed, known)


def _text(value):
    return value if isinstance(value, (bool, int, float, list, type(None))) else str(value)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def csv_file(path, rows, header=("text", "label")):
    pd.DataFrame(rows, columns=list(header)).to_csv(path, index=False)
    return path


def labels_of(data, split):
    return [data.taxonomy.labels[label] for label in data.splits[split]["label"]]


def normalised(text):
    return re.sub(r"\s+", " ", text).strip().casefold()


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_as(kind, path):
    frame = pd.DataFrame(ROWS, columns=["text", "label"])
    records = frame.to_dict("records")
    if kind in ("csv", "tsv"):
        frame.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    elif kind == "parquet":
        frame.to_parquet(path)
    elif kind == "json":
        path.write_text(json.dumps(records))
    elif kind == "data.json":
        path.write_text(json.dumps({"version": 1, "data": records}))
    else:
        path.write_text("\n".join(map(json.dumps, records)) + "\n\n")


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "data.json", "jsonl", "ndjson", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    write_as(kind, path)
    data = load(train_file=path, validation_size=0)
    assert list(data.splits) == ["train"]
    assert data.splits["train"].column_names == ["text", "label", "row", "text_id"]
    assert data.splits["train"]["text"][:] == [text for text, _ in ROWS]
    assert data.splits["train"]["row"][:] == [0, 1, 2, 3]
    # leaves first, in sorted order of their paths (a/x, a/y, b), then the inner node a
    assert data.taxonomy.labels == ["x", "y", "b", "a"]
    assert data.splits["train"]["label"][:] == [0, 1, 2, 3]
    source = {"split": "train", "name": str(path), "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}}
    assert data.report["sources"] == [source]


def test_csv_cells_are_text_as_written(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbftext,label\nnan,007\n1.0,NA\ntrue,3.0\n\n")
    data = load(train_file=path, validation_size=0)
    assert data.splits["train"]["text"][:] == ["nan", "1.0", "true"]
    assert labels_of(data, "train") == ["007", "NA", "3.0"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "a.csv is empty"),
        ("a.csv", b"text,label\n", "a.csv has no rows"),
        ("a.csv", b"text,label\none,x\ntwo\nthree,y\n", "a.csv, line 3: 1 fields, where the header has 2"),
        ("a.csv", b"text,label\none,x\ntwo,y,z\n", "a.csv, line 3: 3 fields, where the header has 2"),
        ("a.csv", b'text,label\n"one,x\n', "a.csv, line 2: a quotation mark is not closed"),
        ("a.csv", "text,label\nM\xfcller,x\n".encode("latin-1"), "a.csv, line 2: not UTF-8"),
        ("a.csv", b"text,label,text\none,x,two\n", "a.csv has two columns called 'text'"),
        ("a.json", b'[{"text": "one", ', "a.json, line 1, is not JSON"),
        ("a.json", b'{"rows": []}', "a.json: a JSON file must hold a list of objects"),
        ("a.json", b'["one"]', "a.json, row 1: not a JSON object"),
        ("a.json", b"[]", "a.json has no columns"),
        ("a.json", b'[{"text": "\xfc"}]', "a.json is not UTF-8"),
        ("a.jsonl", b'{"text": "one", "label": "x"}\n{"text"\n', "a.jsonl, line 2: not JSON"),
        ("a.parquet", b"PAR0 nonsense", "a.parquet is not a Parquet file"),
        ("a.xlsx", b"PK", "a.xlsx: its name does not tell its kind, one of .csv, .tsv"),
    ],
)  # fmt: skip
def test_unreadable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load(train_file=tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_codes_of_many_digits_beside_missing_ones_stay_as_they_are(tmp_path, kind):
    codes = [900_000_000_000_207_008 + i for i in range(6)]  # as long as those of SNOMED CT
    rows = {
        "text": [f"text {i}" for i in range(8)],
        "l1": ["a"] * 4 + ["b"] * 4,
        "l2": [*codes[:3], None, *codes[3:], None],
    }
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "rows.parquet")
        source = {"train_file": tmp_path / "rows.parquet"}
    else:
        datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "rows")
        source = {"data_path": tmp_path / "rows"}
    data = load(**source, label_column=["l1", "l2"], validation_size=0.0, test_size=0.0)
    assert set(data.taxonomy.names) == {"a", "b", *map(str, codes)}


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*gone\.csv: No such file or directory"):
        load(train_file=tmp_path / "gone.csv")
    with pytest.raises(InputError, match="not a folder saved by `datasets`"):
        load(data_path=tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no data"),
        ({"data_path": "a.csv", "train_file": "b.csv"}, "--data_path and --train_file contradict"),
        ({"data_path": "a.csv", "dataset_name": "b"}, "--dataset_name and --data_path contradict"),
        ({"train_file": "a.csv", "dataset_revision": "v1"}, "--dataset_revision needs"),
        ({"data_path": "a.csv", "test_size": -0.1}, "--test_size is a share"),
        ({"data_path": "a.csv", "validation_size": 1.0}, "--validation_size is a share"),
        ({"data_path": "a.csv", "validation_size": float("nan")}, "--validation_size is a share"),
        ({"data_path": "a.csv", "validation_size": 0.5, "test_size": 0.5}, "leave nothing"),
    ],
)
def test_contradictory_arguments(given, message):
    with pytest.raises(InputError, match=message):
        load(**given)


# ── columns ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_columns_are_found_in_order_of_preference_and_logged(tmp_path, caplog):
    rows = [("title", "first", "x", "n"), ("title", "second", "y", "n")]
    path = csv_file(tmp_path / "a.csv", rows, ("text", "abstract", "label", "category"))
    with caplog.at_level(logging.INFO, logger="training"):
        data = load(train_file=path, validation_size=0)
    assert data.splits["train"]["text"][:] == ["first", "second"]
    assert data.report["columns"] == {"text": "abstract", "label": ["label"]}
    assert "text 'abstract', label 'label'" in caplog.text
    asked = load(train_file=path, validation_size=0, text_column="text", label_column=["label"])
    assert asked.splits["train"]["text"][:] == ["title", "title"]


def test_columns_that_are_not_there(tmp_path):
    path = csv_file(tmp_path / "a.csv", [("one", "x"), ("two", "y")], ("notes", "diagnosis"))
    with pytest.raises(InputError, match=r"a\.csv: no column is called .*--text_column, one of 'notes', 'diagnosis'"):
        load(train_file=path)
    with pytest.raises(InputError, match=r"no column is called .*--label_column, one of 'notes', 'diagnosis'"):
        load(train_file=path, text_column="notes")
    with pytest.raises(
        InputError, match=r"a\.csv has no column 'notse' \(--text_column\); it has 'notes', 'diagnosis'"
    ):
        load(train_file=path, text_column="notse")
    with pytest.raises(InputError, match="cannot be both"):
        load(train_file=path, text_column="notes", label_column=["notes"])
    with pytest.raises(InputError, match="names a column twice"):
        load(train_file=path, text_column="notes", label_column=["diagnosis", "diagnosis"])


def test_files_must_share_a_column_and_may_spell_it_differently(tmp_path):
    one = csv_file(tmp_path / "1.csv", [("a", "x"), ("b", "y")], ("Text", "label"))
    other = csv_file(tmp_path / "2.csv", [("c", "d", "x")], ("abstract", "text", "Label"))
    data = load(train_file=one, test_file=other, validation_size=0)
    assert data.splits["test"]["text"][:] == ["d"]
    assert data.report["columns"] == {"text": "Text", "label": ["label"]}
    other = csv_file(tmp_path / "2.csv", [("c", "x")], ("abstract", "label"))
    with pytest.raises(InputError, match=r"1\.csv, .*2\.csv have no column in common for --text_column"):
        load(train_file=one, test_file=other)


def test_missing_values_are_named_by_line_and_the_text_is_not_shown(tmp_path):
    rows = [(SECRET, "x"), ("one", ""), ("  ", "y"), ("two", ""), (SECRET, "y")]
    path = csv_file(tmp_path / "a.csv", rows)
    with pytest.raises(InputError, match=r"a\.csv, line 4, column 'text': the text is empty$"):
        load(train_file=path)
    path = csv_file(tmp_path / "a.csv", [row for row in rows if row[0].strip()])
    with pytest.raises(InputError, match=r"a\.csv, line 3, column 'label': the label is missing; 2 rows") as caught:
        load(train_file=path)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"text": "a", "label": "x"}, {"label": "x"}], "row 2, column 'text': the text is missing"),
        ([{"text": "a", "label": "x"}, {"text": 5, "label": "x"}], "row 2, column 'text': the text is not a text but int"),
        ([{"text": "a", "label": None}, {"text": "b", "label": "x"}], "row 1, column 'label': the label is missing"),
        ([{"text": "a", "label": float("nan")}, {"text": "b", "label": "x"}], "row 1, column 'label': the label is missing"),
        ([{"text": "a", "label": 1.5}, {"text": "b", "label": 2.0}], "row 1, column 'label': the label is neither text nor"),
        ([{"text": "a", "label": True}, {"text": "b", "label": 2}], "row 1, column 'label': the label is neither text nor"),
        ([{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": "x"}], "row 1, column 'label': the label is neither text nor"),
        ([{"text": "a\ud800", "label": "x"}, {"text": "b", "label": "y"}], "row 1: half of a surrogate pair"),
        ([{"text": "a", "label": SECRET * 50}, {"text": "b", "label": "y"}], "row 1, column 'label': the label has more than 500 characters"),
    ],
)  # fmt: skip
def test_values_of_the_wrong_kind(tmp_path, records, message):
    path = write(tmp_path / "a.json", json.dumps(records))
    with pytest.raises(InputError, match=message) as caught:
        load(train_file=path)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_whole_numbers_are_labels(tmp_path, kind):
    frame = pd.DataFrame({"text": ["a", "b", "c"], "label": [3.0, 10.0, 3.0]})
    path = tmp_path / f"a.{kind}"
    frame.to_parquet(path) if kind == "parquet" else frame.to_json(path, orient="records")
    data = load(train_file=path, validation_size=0)
    assert labels_of(data, "train") == ["3", "10", "3"]


def test_several_label_columns_name_the_path_from_the_root(tmp_path):
    rows = [("one", "body", "heart", "valve"), ("two", "body", "lung", ""), ("three", "mind", "", "")]
    rows += [("four", "body", "", "")]
    path = csv_file(tmp_path / "a.csv", rows, ("text", "l1", "l2", "l3"))
    data = load(train_file=path, label_column=["l1", "l2", "l3"], validation_size=0)
    names = [data.taxonomy.path_names(label) for label in data.splits["train"]["label"]]
    assert names == [("body", "heart", "valve"), ("body", "lung"), ("mind",), ("body",)]
    # a document counts at every level of its path
    assert data.report["splits"]["train"]["classes"] == {
        "1": {"mind": 1, "body": 3},
        "2": {"lung": 1, "heart": 1},
        "3": {"valve": 1},
    }
    gap = csv_file(tmp_path / "b.csv", [("one", "body", "", "valve"), ("two", "", "", "")], ("text", "l1", "l2", "l3"))
    with pytest.raises(InputError, match="line 3, column 'l1 l2 l3': the label is missing"):
        load(train_file=gap, label_column=["l1", "l2", "l3"])
    gap = csv_file(tmp_path / "b.csv", [("one", "body", "", "valve")], ("text", "l1", "l2", "l3"))
    with pytest.raises(InputError, match="line 2, column 'l1 l2 l3': the label has a gap above a filled level"):
        load(train_file=gap, label_column=["l1", "l2", "l3"])
    # one column holds names, several hold paths: "heart" alone is not a path from a root
    wrong = csv_file(tmp_path / "c.csv", [("one", "heart", "", "")], ("text", "l1", "l2", "l3"))
    with pytest.raises(
        InputError, match=r"c\.csv, line 2, column 'l1 l2 l3': .*must name the path from the root.*'body', 'heart'"
    ):
        load(known=data.taxonomy, test_file=wrong, label_column=["l1", "l2", "l3"])
    names_only = csv_file(tmp_path / "d.csv", [("one", "heart")])
    assert labels_of(load(known=data.taxonomy, test_file=names_only), "test") == ["heart"]


# ── labels and the taxonomy ──────────────────────────────────────────────────────────────────────────────────────────


def test_codes_are_names_only_where_the_user_says_so(tmp_path):
    rows = [(str(i), f"text {i}") for i in range(1, 4)]
    path = csv_file(tmp_path / "a.csv", rows, ("condition_label", "medical_abstract"))
    assert load(train_file=path, validation_size=0).taxonomy == Taxonomy(["1", "2", "3"])
    with pytest.raises(InputError, match=r"line 2, .*'1' is not in the taxonomy"):
        load(test_file=path, known=Taxonomy(DEFAULT_TAXONOMY))


def test_the_recipe_of_the_medical_abstracts_corpus_names_its_codes(tmp_path):
    # the corpus's own names, from its data card
    classes = ["neoplasms", "digestive system diseases", "nervous system diseases", "cardiovascular diseases",
               "general pathological conditions"]  # fmt: skip
    rows = [(str(i), f"text {i}") for i in range(1, 6)]
    path = csv_file(tmp_path / "a.csv", rows, ("condition_label", "medical_abstract"))
    words = [str(ROOT / "recipes" / "medical_abstracts.yaml"), "--train_file", str(path), "--validation_size", "0"]
    _, arguments, _, _ = parse(words)
    data = load_splits(arguments, 0)
    assert data.taxonomy == Taxonomy(DEFAULT_TAXONOMY)
    assert labels_of(data, "train") == classes


def test_a_name_is_one_class_however_its_letters_are_composed(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert composed != decomposed
    rows = [("one", composed), ("two", decomposed), ("three", "tea")]
    data = load(train_file=csv_file(tmp_path / "a.csv", rows), validation_size=0)
    assert data.taxonomy == Taxonomy([composed, "tea"])
    assert data.splits["train"]["label"][:] == [0, 0, 1]
    tree = write(tmp_path / "tree.yaml", f"drinks: [{decomposed}, tea]\nfood:\n")
    rows = [("one", f"drinks/{composed}"), ("two", composed), ("three", "food")]
    data = load(train_file=csv_file(tmp_path / "b.csv", rows), taxonomy=tree, validation_size=0)
    assert data.splits["train"]["label"][:] == [0, 0, 2]
    levels = csv_file(tmp_path / "c.csv", [("one", "drinks", composed), ("two", "food", "")], ("text", "a", "b"))
    data = load(train_file=levels, taxonomy=tree, label_column=["a", "b"], validation_size=0)
    assert data.splits["train"]["label"][:] == [0, 2]
    names = json.dumps({composed: composed, "2": "tea"})
    coded = csv_file(tmp_path / "d.csv", [("one", decomposed), ("two", "2")])
    assert load(train_file=coded, class_names=names, validation_size=0).taxonomy == Taxonomy([composed, "tea"])


def test_names_of_the_default_taxonomy_choose_it(tmp_path):
    rows = [("one", "neoplasms"), ("two", "specific disease"), ("three", "specific disease/nervous system diseases")]
    data = load(train_file=csv_file(tmp_path / "a.csv", rows), validation_size=0)
    assert data.taxonomy == Taxonomy(DEFAULT_TAXONOMY)
    assert labels_of(data, "train") == ["neoplasms", "specific disease", "nervous system diseases"]
    assert data.report["classes_without_training_rows"] == [
        "general pathological conditions",
        "digestive system diseases",
        "cardiovascular diseases",
    ]
    # one other label, and the labels span their own taxonomy
    rows[2] = ("three", "flu")
    assert load(train_file=csv_file(tmp_path / "a.csv", rows), validation_size=0).taxonomy.labels == [
        "flu", "neoplasms", "specific disease",
    ]  # fmt: skip


def test_taxonomy_of_the_labels_does_not_depend_on_row_order(tmp_path):
    rows = [("one", "b / y"), ("two", "a"), ("three", "b/x")]
    one = load(train_file=csv_file(tmp_path / "a.csv", rows), validation_size=0)
    other = load(train_file=csv_file(tmp_path / "b.csv", rows[::-1]), validation_size=0)
    assert one.taxonomy == other.taxonomy == Taxonomy(["a", {"b": ["x", "y"]}])
    assert labels_of(one, "train") == ["y", "a", "x"]
    custom = csv_file(tmp_path / "c.csv", [("one", "a > b"), ("two", "a > c/d")])
    assert load(train_file=custom, validation_size=0, label_separator=">").taxonomy.labels == ["b", "c/d", "a"]


def test_labels_of_every_split_span_the_taxonomy(tmp_path):
    data = load(
        train_file=csv_file(tmp_path / "a.csv", [("one", "a"), ("two", "b")]),
        validation_file=csv_file(tmp_path / "b.csv", [("three", "a")]),
        test_file=csv_file(tmp_path / "c.csv", [("four", "c")]),
    )
    assert data.taxonomy.labels == ["a", "b", "c"]
    assert data.report["classes_without_training_rows"] == ["c"]


def test_taxonomy_file_and_inner_nodes(tmp_path):
    tree = write(tmp_path / "tree.yaml", "body: [heart, lung]\nmind:\n")
    rows = csv_file(tmp_path / "a.csv", [("one", "body"), ("two", "body/lung"), ("three", "mind"), ("four", " heart ")])
    data = load(train_file=rows, taxonomy=tree, validation_size=0)
    assert labels_of(data, "train") == ["body", "lung", "mind", "heart"]
    assert data.splits["train"]["label"][0] >= data.taxonomy.num_leaves
    # the parameter, a checkpoint's taxonomy, is stronger than the file
    mine = Taxonomy({"body": ["lung", "heart"], "mind": None, "soul": None})
    given = load(known=mine, test_file=rows, taxonomy=tree)
    assert given.taxonomy == mine


def test_label_that_the_taxonomy_does_not_hold(tmp_path):
    path = csv_file(tmp_path / "a.csv", [(SECRET, "heart"), (SECRET, "heartt")])
    with pytest.raises(
        InputError, match=r"a\.csv, line 3, column 'label': the label 'heartt' is not .*'heart'"
    ) as caught:
        load(test_file=path, known=Taxonomy({"body": ["heart", "lung"]}))
    assert SECRET not in str(caught.value)
    broken = write(tmp_path / "tree.yaml", "- a\n")
    with pytest.raises(InputError, match=r"--taxonomy: .*at least two leaves"):
        load(train_file=path, taxonomy=broken)
    alone = csv_file(tmp_path / "b.csv", [("one", "x"), ("two", "x")])
    with pytest.raises(InputError, match="every row has the label 'x'; at least two are needed"):
        load(train_file=alone)
    hole = csv_file(tmp_path / "c.csv", [("one", "x"), ("two", "x//y")])
    with pytest.raises(InputError, match=r"c\.csv, line 3, .*'x//y' has an empty name"):
        load(train_file=hole)


def test_names_that_are_not_unique_need_their_path(tmp_path):
    # "other" is a root and a child: alone it could be either, in training as in scoring
    rows = [("one", "other"), ("two", "body/other"), ("three", "body/heart")]
    with pytest.raises(InputError, match=r"line 2, .*'other' is ambiguous: it names .*'/other'.*write the path"):
        load(train_file=csv_file(tmp_path / "a.csv", rows))
    rows[0] = ("one", "/other")
    path = csv_file(tmp_path / "a.csv", rows)
    data = load(train_file=path, validation_size=0)
    assert [data.taxonomy.path_names(i) for i in data.splits["train"]["label"]] == [
        ("other",), ("body", "other"), ("body", "heart"),
    ]  # fmt: skip
    again = load(test_file=path, known=data.taxonomy)
    assert again.splits["test"]["label"][:] == data.splits["train"]["label"][:]
    # case tells names apart
    cased = csv_file(tmp_path / "b.csv", [("one", "neoplasms/Neoplasms"), ("two", "neoplasms"), ("three", "flu")])
    assert labels_of(load(train_file=cased, validation_size=0), "train") == ["Neoplasms", "neoplasms", "flu"]


NAMES_AND_PARENTS = "label,name,parent\nC1,Heart,body\nC2,Lung,body\nC3,Sleep,mind\n"


def test_one_file_as_taxonomy_and_as_class_names(tmp_path):
    names = write(tmp_path / "labels.csv", NAMES_AND_PARENTS)
    rows = csv_file(tmp_path / "a.csv", [("one", "C2"), ("two", "C3"), ("three", "body"), ("four", "Heart")])
    arguments = {"train_file": rows, "taxonomy": names, "class_names": names, "validation_size": 0}
    data = load(**arguments)
    assert labels_of(data, "train") == ["Lung", "Sleep", "body", "Heart"]
    rows = csv_file(tmp_path / "a.csv", [("one", "C2"), ("two", "C4")])
    with pytest.raises(
        InputError, match=r"a\.csv, line 3, .*'C4' is neither a code of --class_names .*nor in the taxonomy"
    ):
        load(**arguments)


def test_codes_may_be_named_by_paths(tmp_path):
    rows = csv_file(tmp_path / "a.csv", [("one", "1"), ("two", "2"), ("three", "flu")])
    data = load(train_file=rows, class_names='{"1": "body/heart", "2": "body", "3": "flu"}', validation_size=0)
    assert [data.taxonomy.path_names(i) for i in data.splits["train"]["label"]] == [
        ("body", "heart"),
        ("body",),
        ("flu",),
    ]
    with pytest.raises(InputError, match=r"a\.csv, line 4, .*'flu' is neither a code"):
        load(train_file=rows, class_names='{"1": "body/heart", "2": "body"}')


def test_codes_in_several_columns(tmp_path):
    rows = csv_file(tmp_path / "a.csv", [("one", "B", "1"), ("two", "M", ""), ("three", "B", "")], ("text", "l1", "l2"))
    data = load(
        train_file=rows, label_column=["l1", "l2"], validation_size=0,
        class_names='{"B": "body", "M": "mind", "1": "heart"}',
    )  # fmt: skip
    assert labels_of(data, "train") == ["heart", "mind", "body"]


def test_class_names_in_their_forms(tmp_path):
    expected = {"1": "one", "02": "two"}
    assert read_class_names('{"1": "one", "02": " two "}') == expected
    assert read_class_names(str(write(tmp_path / "a.csv", "id,what\n1,one\n02,two\n"))) == expected
    assert read_class_names(str(write(tmp_path / "a.tsv", "name\tcode\none\t1\ntwo\t02\n"))) == expected
    corpus = write(tmp_path / "b.csv", "condition_label,condition_name\n1,one\n02,two\n")
    assert read_class_names(str(corpus)) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ('{"1": ', "is not JSON"),
        ('{"1": 2}', "the code '1' needs a name"),
        ('{"1": "a", "1": "b"}', "the code '1' has two names: 'a' and 'b'"),
        ("names.txt", r"expected a \.csv or \.tsv file"),
        ("names.csv", "cannot read names.csv: No such file or directory"),
    ],
)
def test_bad_class_names(given, message):
    with pytest.raises(InputError, match=message):
        read_class_names(given)


# ── data sets of the `datasets` library ──────────────────────────────────────────────────────────────────────────────

CLASSES = datasets.ClassLabel(names=["flu", "cold"])


def dataset(texts, labels):
    features = datasets.Features({"text": datasets.Value("string"), "label": CLASSES})
    return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)


def test_saved_folder_with_class_labels(tmp_path):
    splits = {"train": dataset(["a", "b"], [1, 0]), "valid": dataset(["c"], [0]), "extra": dataset(["d"], [0])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    data = load(data_path=tmp_path / "set")
    assert list(data.splits) == ["train", "validation"]
    assert labels_of(data, "train") == ["cold", "flu"]
    assert labels_of(data, "validation") == ["flu"]
    file = next((tmp_path / "set" / "valid").glob("*.arrow"))
    assert data.report["sources"][1]["sha256"] == {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}


def test_saved_folder_of_one_dataset_is_split_in_three(tmp_path):
    dataset([f"text {i}" for i in range(100)], [i % 2 for i in range(100)]).save_to_disk(tmp_path / "set")
    data = load(data_path=tmp_path / "set", validation_size=0.2, test_size=0.1)
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 70, "validation": 20, "test": 10}


def test_saved_folder_without_validation_keeps_its_test(tmp_path):
    train = dataset([f"text {i}" for i in range(100)], [i % 2 for i in range(100)])
    datasets.DatasetDict({"train": train, "test": dataset(["z"], [0])}).save_to_disk(tmp_path / "set")
    data = load(data_path=tmp_path / "set")
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 90, "validation": 10, "test": 1}
    assert data.splits["test"]["text"][:] == ["z"]


def test_saved_folders_that_cannot_be_used(tmp_path):
    datasets.DatasetDict({"train": dataset(["a", "b"], [1, -1])}).save_to_disk(tmp_path / "unlabelled")
    with pytest.raises(InputError, match=r"unlabelled \[train\], row 2, column 'label': the label is missing"):
        load(data_path=tmp_path / "unlabelled")
    both = {"train": dataset(["a"], [1]), "dev": dataset(["b"], [1]), "validation": dataset(["c"], [1])}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "both")
    with pytest.raises(InputError, match="several splits that mean validation: train, dev, validation"):
        load(data_path=tmp_path / "both")
    datasets.DatasetDict({"all": dataset(["a"], [1])}).save_to_disk(tmp_path / "all")
    with pytest.raises(InputError, match="no split called train, validation or test, only all"):
        load(data_path=tmp_path / "all")


def test_dataset_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "corpus"  # `datasets` takes a folder of files for a name, too
    folder.mkdir()
    pd.DataFrame({"text": ["a", "b"], "label": ["x", "y"]}).to_parquet(folder / "train.parquet")
    pd.DataFrame({"text": ["c"], "label": ["y"]}).to_parquet(folder / "test.parquet")
    data = load(dataset_name=folder, validation_size=0)
    assert data.splits["train"]["text"][:] == ["a", "b"]
    assert labels_of(data, "test") == ["y"]
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot load --dataset_name nobody/nothing") as caught:
        load(dataset_name="nobody/nothing")
    assert "\n" not in str(caught.value)


# ── splits ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def corpus(rows, seed):
    """Skewed classes; about a fifth of the texts again, written otherwise, some of them with another label."""
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
    trained_on = np.sort(np.array(data.splits["train"]["row"], dtype=np.int64)).tobytes()
    assert data.report["split"] == {
        "method": "by class, identical texts kept together", "carved": {"test": 0.1, "validation": 0.15}, "seed": seed,
        "train_rows_sha256": hashlib.sha256(trained_on).hexdigest(),
    }  # fmt: skip


def test_splits_are_decided_by_the_seed(tmp_path):
    path = csv_file(tmp_path / "a.csv", corpus(300, 0))
    one, same, other = (load(seed=seed, data_path=path).splits["test"]["row"][:] for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_many_small_classes_still_give_the_whole_share(tmp_path):
    # 40 classes of 5 texts: a tenth of each rounds to nothing, a tenth of all is 20
    path = csv_file(tmp_path / "a.csv", [(f"text {i}", f"class {i % 40}") for i in range(200)])
    data = load(data_path=path)
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 160, "validation": 20, "test": 20}
    assert data.report["classes_without_training_rows"] == []
    assert max(Counter(labels_of(data, "test")).values()) == 1


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


def test_sizes_of_zero_and_files_that_were_given(tmp_path):
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
        assert data.report["split"]["carved"] == {}


def test_too_few_rows_to_split(tmp_path):
    path = csv_file(tmp_path / "a.csv", [("one", "a"), ("two", "b"), ("three", "a")])
    with pytest.raises(InputError, match=r"cannot carve test rows: 0 of 3 .*--test_size, or 0 for no test rows"):
        load(data_path=path)
    with pytest.raises(InputError, match="cannot carve validation rows: 2 of 3"):
        load(train_file=path, validation_size=0.7)


def test_texts_among_the_labels_are_not_logged(tmp_path, caplog):
    text = "Mrs Example of Nowhere Lane 7 was admitted with chest pain"
    rows = [(f"text {i}", ("a", "b", text)[i % 3]) for i in range(30)]
    csv_file(tmp_path / "train.csv", rows)
    csv_file(tmp_path / "test.csv", [("another", "Mrs Example was here. Twice")])
    with caplog.at_level(logging.INFO, logger="training"):
        files = {"train_file": tmp_path / "train.csv", "test_file": tmp_path / "test.csv"}
        log_report(load(**files, validation_size=0).report)
    assert "1 classes without training rows: (a value of 27 characters)" in caplog.text
    assert "  (a value of 58 characters) " in caplog.text
    assert "Example" not in caplog.text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("neoplasms", True),
        ("general pathological conditions", True),
        ("specific disease/digestive system diseases", True),
        ("C34.1", True),
        ("D012345", False),
        ("1.10", True),
        ("icd_10_2019_code", True),
        ("2019-07-31", False),
        ("555 0123 456", False),
        ("He was sent home.", False),
        ("胸痛。入院", False),
        ("pain in the chest for three days", False),
        ("x" * 61, False),
    ],
)
def test_what_looks_like_a_name_is_shown(name, shown):
    assert quote_name(name) == (repr(name) if shown else f"(a value of {len(name)} characters)")
    # shipped files cannot import the reader, which has the same rule
    assert reading.rows.quote_name(name) == quote_name(name)


def test_a_text_belongs_to_one_split_of_those_given(tmp_path, caplog):
    train = [("One", "a"), ("two", "b"), ("three", "a"), ("ONE", "b"), ("four", "b")]
    arguments = {
        "train_file": csv_file(tmp_path / "a.csv", train),
        "validation_file": csv_file(tmp_path / "b.csv", [(" one", "a"), ("five", "b"), ("six", "a")]),
        "test_file": csv_file(tmp_path / "c.csv", [("two ", "a"), ("five", "b")]),
    }
    with caplog.at_level(logging.INFO, logger="training"):
        data = load(**arguments)
    assert data.splits["train"]["text"][:] == ["three", "four"]
    assert data.splits["train"]["row"][:] == [2, 4]
    assert data.splits["validation"]["text"][:] == [" one", "six"]  # nothing is fitted on a text of the test file
    assert data.splits["test"]["text"][:] == ["two ", "five"]
    dropped = {split: found["dropped_rows"] for split, found in data.report["splits"].items()}
    assert dropped == {"train": 3, "validation": 1, "test": 0}
    assert data.report["shared_texts"] == {
        "train, validation": {"texts": 1, "train_rows": 2, "validation_rows": 1},
        "train, test": {"texts": 1, "train_rows": 1, "test_rows": 1},
        "validation, test": {"texts": 1, "validation_rows": 1, "test_rows": 1},
    }
    said = "1 in train and validation, 1 in train and test, 1 in validation and test; dropped: 3 train rows, 1 validation rows"
    assert said in caplog.text
    with pytest.raises(InputError, match="every train text is also in validation or test: nothing is left"):
        load(train_file=arguments["train_file"], test_file=arguments["train_file"])
    with pytest.raises(InputError, match="every validation text is also in test: nothing is left"):
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
    assert data.splits["train"]["text"][:] == ["cafe au lait, 5\u03bcg"]  # another word, for all that looks like it
    assert data.report["splits"]["train"]["dropped_rows"] == 1


def test_carved_validation_has_no_text_of_the_test_file(tmp_path):
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
        "exact_duplicates": 2,  # the second q, the second r
        "normalised_duplicates": 4,  # and two of p
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
    data.report["lengths"] = {"train": length_report([5, 5, 9], 8)}
    with caplog.at_level(logging.INFO, logger="training"):
        log_report(data.report)
    lines = [record.getMessage().split() for record in caplog.records]
    # rows, dropped, duplicates, conflicting texts, their rows; 21 of 22 rows that have a leaf can be right
    assert ["train", "23", "0", "1", "1", "2", "95.5%"] in lines
    assert "1 texts (33.3%) are cut at 8" in caplog.text
    assert ["c", "20"] in lines
    assert "and 13 smaller ones" in caplog.text  # 21 classes at level 2, 8 of them shown
    assert SECRET not in caplog.text


def test_length_report_by_hand():
    # 1 … 100: the smallest count that q % of the texts do not exceed is q
    assert length_report(list(range(1, 101)), 90) == {
        "p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100, "max_length": 90, "cut": 10, "cut_share": 0.1,
    }  # fmt: skip
    assert length_report([4], 4)["cut"] == 0
    assert length_report([1, 10], 8)["p50"] == 1  # a count that occurs, not the middle of two
    with pytest.raises(ValueError, match="no lengths"):
        length_report([], 4)


# ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def word_tokenizer(side="right", **arguments):
    """One token a word, between [CLS] and [SEP]."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(30))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        truncation_side=side, model_max_length=8, **arguments,
    )  # fmt: skip


def texts_of_lengths(lengths):
    rows = {"text": [" ".join(f"w{i}" for i in range(n)) for n in lengths], "label": list(range(len(lengths)))}
    return datasets.DatasetDict(
        {"test": datasets.Dataset.from_dict({**rows, "row": [10 + i for i in rows["label"]], "text_id": rows["label"]})}
    )


@pytest.fixture
def warnings_of_transformers(caplog):
    transformers.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield caplog
    transformers.logging.disable_propagation()


@pytest.mark.parametrize("side", ["right", "left"])
def test_tokens_are_those_of_the_tokenizers_own_truncation(side, warnings_of_transformers):
    words = [1, 5, 6, 7, 13, 30, 29]  # with two special tokens: 3, 7, 8, 9, 15, 32, 31
    splits, tokenizer = texts_of_lengths(words), word_tokenizer(side, model_input_names=["input_ids", "attention_mask"])
    tokenized, lengths = tokenize(splits, tokenizer, 8)
    assert "longer than" not in warnings_of_transformers.text
    rows = tokenized["test"]
    assert set(rows.column_names) == {"input_ids", "attention_mask", "length", "labels", "row", "text_id"}
    assert rows["input_ids"][:] == tokenizer(splits["test"]["text"][:], truncation=True, max_length=8)["input_ids"]
    assert rows["length"][:] == [3, 7, 8, 8, 8, 8, 8]
    assert rows["attention_mask"][:] == [[1] * n for n in rows["length"]]
    assert rows["labels"][:] == [0, 1, 2, 3, 4, 5, 6]
    assert rows["row"][:] == [10, 11, 12, 13, 14, 15, 16]
    assert lengths == {"test": length_report([n + 2 for n in words], 8)}
    assert (lengths["test"]["cut"], lengths["test"]["max"]) == (4, 32)
    tokenizer(splits["test"]["text"][:])
    assert "longer than" in warnings_of_transformers.text  # so it would have been seen


def test_token_types_only_where_the_tokenizer_has_them():
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenized, _ = tokenize(texts_of_lengths([3]), word_tokenizer(model_input_names=names), 8)
    assert tokenized["test"]["token_type_ids"][:] == [[0] * 5]
    tokenized, _ = tokenize(texts_of_lengths([3]), word_tokenizer(model_input_names=["input_ids"]), 8)
    assert set(tokenized["test"].column_names) == {"input_ids", "attention_mask", "length", "labels", "row", "text_id"}


@pytest.mark.parametrize("side", ["right", "left"])
def test_tokens_of_training_texts_know_their_sentences(side):
    splits = datasets.DatasetDict()
    for split in ("train", "test"):
        splits[split] = texts_of_lengths([1, 1]).pop("test")
        splits[split] = splits[split].remove_columns("text").add_column("text", ["a b. c d e? f g", "a"])
    tokenized, _ = tokenize(splits, word_tokenizer(side), 6, {"train"})
    cut = [0, 0, 1, 1] if side == "right" else [1, 1, 2, 2]
    assert tokenized["train"]["sentences"][:] == [[-1, *cut, -1], [-1, 0, -1]]
    assert "sentences" not in tokenized["test"].column_names
