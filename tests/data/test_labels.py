"""Test labels in one or several columns, codes and names, against taxonomies written by hand."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from labelled_files import csv_file, labels_of, load, nodes_of, write

from hierarchical_clinicalbert.data.labels import read_class_names
from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.training.arguments import parse
from taxonomy_hierarchical import DEFAULT_TAXONOMY, Taxonomy, quote_name


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
    names = [data.taxonomy.path_names(node) for node in nodes_of(data)]
    assert names == [("body", "heart", "valve"), ("body", "lung"), ("mind",), ("body",)]
    # a document counts at every level of its path
    assert data.report["splits"]["train"]["classes"] == {
        "1": {"mind": 1, "body": 3},
        "2": {"lung": 1, "heart": 1},
        "3": {"valve": 1},
    }
    gap = csv_file(tmp_path / "b.csv", [("one", "body", "", ""), ("two", "", "", "")], ("text", "l1", "l2", "l3"))
    with pytest.raises(InputError, match="line 3, column 'l1 l2 l3': the label is missing"):
        load(train_file=gap, label_column=["l1", "l2", "l3"])
    gap = csv_file(tmp_path / "b.csv", [("one", "body", "", "valve")], ("text", "l1", "l2", "l3"))
    with pytest.raises(
        InputError,
        match="line 2, column 'l1 l2 l3': a label column is empty, although the column of a deeper level is filled",
    ):
        load(train_file=gap, label_column=["l1", "l2", "l3"])
    # one column holds names, several hold paths: "heart" alone is not a path from a root
    wrong = csv_file(tmp_path / "c.csv", [("one", "heart", "", "")], ("text", "l1", "l2", "l3"))
    with pytest.raises(
        InputError,
        match=r"c\.csv, line 2, column 'l1 l2 l3': .*must name the path from the root, and \('heart'\) is none",
    ):
        load(known=data.taxonomy, test_file=wrong, label_column=["l1", "l2", "l3"])
    names_only = csv_file(tmp_path / "d.csv", [("one", "heart")])
    assert labels_of(load(known=data.taxonomy, test_file=names_only), "test") == ["heart"]


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
    data = load(**vars(arguments))
    assert data.taxonomy == Taxonomy(DEFAULT_TAXONOMY)
    assert labels_of(data, "train") == classes


def test_a_name_is_one_class_however_its_letters_are_composed(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert composed != decomposed
    rows = [("one", composed), ("two", decomposed), ("three", "tea")]
    data = load(train_file=csv_file(tmp_path / "a.csv", rows), validation_size=0)
    assert data.taxonomy == Taxonomy([composed, "tea"])
    assert nodes_of(data) == [0, 0, 1]
    tree = write(tmp_path / "tree.yaml", f"drinks: [{decomposed}, tea]\nfood:\n")
    rows = [("one", f"drinks/{composed}"), ("two", composed), ("three", "food")]
    data = load(train_file=csv_file(tmp_path / "b.csv", rows), taxonomy=tree, validation_size=0)
    assert nodes_of(data) == [0, 0, 2]
    levels = csv_file(tmp_path / "c.csv", [("one", "drinks", composed), ("two", "food", "")], ("text", "a", "b"))
    data = load(train_file=levels, taxonomy=tree, label_column=["a", "b"], validation_size=0)
    assert nodes_of(data) == [0, 2]
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


NAMES_IN_BRACKETS = [
    *(
        "{neuro}",
        "[unknown]",
        "[none]",
        "[[Sepsis]]",
        "[Sepsis](sepsis, shock)",
        "[a] and [b]",
        "{x}, {y}",
        "[0, 10)",
        "(1)",
    ),
    *("[18F]FDG, PET [brain]", "[Crohn's disease]", '["benign" tumours]', '("Stage" II)'),
]
SOURCE = ["it's", "b c"]
WRITTEN_LISTS = [  # by Python, JSON, NumPy, PostgreSQL and Spark
    *(str(SOURCE), str(["a"]), "[]", str(tuple(SOURCE)), str(("a",)), """{"it's", 'b c'}""", str([*range(3)])),
    *(json.dumps(SOURCE), json.dumps(SOURCE, indent=1), json.dumps([{"name": "a"}, {"name": "b"}])),
    *(str(np.array(SOURCE)), str(np.arange(3)), str(np.array([1.5, 2])), str([["a"], ["b"]]), str(["a", float("nan")])),
    *("{a,b}", '{"b c",a}', "{Crohn's,Graves' disease}", "{}", "[a, b c]"),
]


@pytest.mark.parametrize("name", NAMES_IN_BRACKETS)
def test_a_name_in_brackets_that_cannot_be_a_list_is_a_class(name, tmp_path):
    file = csv_file(tmp_path / "a.csv", [("one", name), ("two", "other")])
    assert labels_of(load(train_file=file, validation_size=0), "train") == [name, "other"]


@pytest.mark.parametrize("label", WRITTEN_LISTS)
def test_a_list_written_as_text_is_refused_unless_the_taxonomy_has_that_name(label, tmp_path):
    file = csv_file(tmp_path / "a.csv", [("one", "other"), ("two", label)])
    tree = write(tmp_path / "tree.json", json.dumps(["other", "third"]))
    for flags in ({}, {"taxonomy": tree}):
        with pytest.raises(
            InputError, match="line 3, column 'label': the label is a list written as text: save"
        ) as refused:
            load(train_file=file, validation_size=0, **flags)
        assert "\n" not in str(refused.value)
    if "\n" not in label:  # which no name may hold
        tree = write(tmp_path / "tree.json", json.dumps(["other", label]))
        assert labels_of(load(train_file=file, validation_size=0, taxonomy=tree), "train") == ["other", label]


@pytest.mark.parametrize(("separator", "label"), [("/", "a/"), ("/", "a//b"), (" > ", "a > ")])
def test_a_path_with_an_empty_name_is_refused(separator, label, tmp_path):
    rows = [("one", separator.join("ab")), ("two", label), ("three", "c")]
    with pytest.raises(InputError, match=r"line 3, .*has an empty name in its path"):
        load(train_file=csv_file(tmp_path / "a.csv", rows), label_separator=separator, validation_size=0)


@pytest.mark.parametrize(
    ("label", "advice"),
    [
        ("Mind", "did you mean 'mind'"),
        ("skin", "it has 'valve', 'mind', 'heart', …"),
    ],
)
def test_a_label_that_is_not_in_the_taxonomy_is_named_with_the_nearest_one(label, advice, tmp_path):
    tree = write(tmp_path / "tree.yaml", "heart: [valve]\nmind:\n")
    with pytest.raises(InputError, match=rf"a\.csv, line 2, column 'label': .* is not in the taxonomy; .*{advice}"):
        load(train_file=csv_file(tmp_path / "a.csv", [("one", label)]), taxonomy=tree, validation_size=0)


def test_a_checkpoint_keeps_its_classes_and_its_separator(tmp_path):
    known, rows = (
        Taxonomy({"heart": ["valve"], "mind": []}, " > "),
        csv_file(tmp_path / "a.csv", [("one", "heart > valve")]),
    )
    assert labels_of(load(known=known, test_file=rows), "test") == ["valve"]
    with pytest.raises(InputError, match="the label 'skin' is not in the taxonomy"):
        load(known=known, test_file=csv_file(tmp_path / "b.csv", [("one", "skin")]))


def test_labels_of_every_split_span_the_taxonomy(tmp_path):
    data = load(
        train_file=csv_file(tmp_path / "a.csv", [("one", "a"), ("two", "b")]),
        validation_file=csv_file(tmp_path / "b.csv", [("three", "a")]),
        test_file=csv_file(tmp_path / "c.csv", [("four", "c")]),
    )
    assert data.taxonomy.labels == ["a", "b", "c"]
    assert data.report["classes_without_training_rows"] == ["c"]


def test_labels_may_be_inner_nodes_and_a_given_taxonomy_replaces_that_of_a_checkpoint(tmp_path):
    tree = write(tmp_path / "tree.yaml", "body: [heart, lung]\nmind:\n")
    rows = csv_file(tmp_path / "a.csv", [("one", "body"), ("two", "body/lung"), ("three", "mind"), ("four", " heart ")])
    data = load(train_file=rows, taxonomy=tree, validation_size=0)
    assert labels_of(data, "train") == ["body", "lung", "mind", "heart"]
    assert nodes_of(data)[0] >= data.taxonomy.num_leaves
    # --taxonomy is stronger than the parameter, a checkpoint's taxonomy
    mine = Taxonomy({"body": ["lung", "heart"], "mind": None, "soul": None})
    assert load(known=mine, test_file=rows).taxonomy == mine
    assert load(known=mine, test_file=rows, taxonomy=tree).taxonomy == data.taxonomy


def test_names_that_are_not_unique_need_their_path(tmp_path):
    # "other" is a root and a child: alone it could be either, in training as in scoring
    rows = [("one", "other"), ("two", "body/other"), ("three", "body/heart")]
    with pytest.raises(InputError, match=r"line 2, .*'other' is ambiguous: it names .*'/other'.*write the path"):
        load(train_file=csv_file(tmp_path / "a.csv", rows))
    rows[0] = ("one", "/other")
    path = csv_file(tmp_path / "a.csv", rows)
    data = load(train_file=path, validation_size=0)
    assert [data.taxonomy.path_names(node) for node in nodes_of(data)] == [
        ("other",), ("body", "other"), ("body", "heart"),
    ]  # fmt: skip
    again = load(test_file=path, known=data.taxonomy)
    assert nodes_of(again, "test") == nodes_of(data)
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
    with pytest.raises(InputError, match=r"a\.csv, line 3, .*'C4' is not in the taxonomy"):
        load(**arguments)


def test_codes_may_be_named_by_paths(tmp_path):
    rows = csv_file(tmp_path / "a.csv", [("one", "1"), ("two", "2"), ("three", "flu")])
    data = load(train_file=rows, class_names='{"1": "body/heart", "2": "body", "3": "flu"}', validation_size=0)
    assert [data.taxonomy.path_names(node) for node in nodes_of(data)] == [
        ("body", "heart"),
        ("body",),
        ("flu",),
    ]
    with pytest.raises(InputError, match=r"a\.csv, line 4, .*'flu' is neither a code"):
        load(train_file=rows, class_names='{"1": "body/heart", "2": "body"}')


def test_codes_in_several_columns_are_named_level_by_level(tmp_path):
    rows = csv_file(tmp_path / "a.csv", [("one", "B", "1"), ("two", "M", ""), ("three", "B", "")], ("text", "l1", "l2"))
    data = load(
        train_file=rows, label_column=["l1", "l2"], validation_size=0,
        class_names='{"B": "body", "M": "mind", "1": "heart"}',
    )  # fmt: skip
    assert labels_of(data, "train") == ["heart", "mind", "body"]


def test_class_names_are_read_from_json_and_from_tables_of_any_column_order(tmp_path):
    expected = {"1": "one", "02": "two"}
    assert read_class_names('{"1": "one", "02": " two "}') == expected
    assert read_class_names(str(write(tmp_path / "a.csv", "note,Code,name\nx,1,one\ny,02,two\n"))) == expected
    assert read_class_names(str(write(tmp_path / "a.tsv", "name\tlabel\none\t1\ntwo\t02\n"))) == expected
    corpus = write(tmp_path / "b.csv", "condition_label,condition_name\n1,one\n02,two\n")
    assert read_class_names(str(corpus)) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ('{"1": ', "is not JSON"),
        ('{"1": 2}', "the code '1' needs a name"),
        ('{"1": "a", "1": "b"}', "the code '1' has two names: 'a' and 'b'"),
        ("names.csv", "cannot read names.csv: No such file or directory"),
    ],
)
def test_class_names_that_cannot_be_read_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        read_class_names(given)


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
