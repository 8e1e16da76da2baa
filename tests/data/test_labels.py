"""Test how labels are read and mapped to nodes, with one path and with any number of nodes a text,
against cases worked by hand.
"""

import json
import logging

import datasets
import numpy as np
import pytest
from conftest import ROOT
from labelled_files import (
    MANY,
    SECRET,
    csv_file,
    json_lines,
    label_sets,
    labels_of,
    load,
    nodes_of,
    paths_of,
    write,
)

from configuration_hierarchical import HierarchicalConfig
from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.training.arguments import parse
from taxonomy_hierarchical import DEFAULT_TAXONOMY, Taxonomy

TREE = {"a": ["x", "y"], "b": ["z", {"c": ["u", "v"]}]}
SETS = [["x"], ["x", "z"], [], ["y", "u"], ["c", "a"], ["v"]]


@pytest.fixture
def taxonomy(tmp_path):
    return write(tmp_path / "taxonomy.json", json.dumps(TREE))


def expected(sets):
    return {f"text {i}": set(labels) for i, labels in enumerate(sets)}


# ── One path a text ───────────────────────────────────────────────────────────────────────────────


def test_whole_numbers_are_labels(tmp_path):
    path = json_lines(tmp_path / "a.jsonl", [3.0, 10, 3])
    assert labels_of(load(train_file=path, validation_size=0)) == ["3", "10", "3"]


def test_several_label_columns_name_the_path_from_the_root(tmp_path):
    header = ("text", "l1", "l2", "l3")
    columns = {"label_column": ["l1", "l2", "l3"]}
    rows = [
        ("one", "body", "heart", "valve"),
        ("two", "body", "lung", ""),
        ("three", "mind", "", ""),
        ("four", "body", "", ""),
    ]
    data = load(train_file=csv_file(tmp_path / "a.csv", rows, header), validation_size=0, **columns)
    assert paths_of(data) == [("body", "heart", "valve"), ("body", "lung"), ("mind",), ("body",)]
    classes = {"1": {"mind": 1, "body": 3}, "2": {"lung": 1, "heart": 1}, "3": {"valve": 1}}
    assert data.report["splits"]["train"]["classes"] == classes
    for row, message in (
        (("one", "", "", ""), "line 2, column 'l1 l2 l3': the label is missing"),
        (
            ("one", "body", "", "valve"),
            "line 2, column 'l1 l2 l3': a label column is empty, although the column of a deeper",
        ),
        (("one", "heart", "", ""), r"must name the path from the root, and \('heart'\) is none"),
    ):
        with pytest.raises(InputError, match=message):
            load(
                known=data.taxonomy,
                test_file=csv_file(tmp_path / "b.csv", [row], header),
                **columns,
            )
    # one column holds names, several hold paths
    names_only = csv_file(tmp_path / "d.csv", [("one", "heart")])
    assert labels_of(load(known=data.taxonomy, test_file=names_only), "test") == ["heart"]


# ── Any number of nodes a text ────────────────────────────────────────────────────────────────────


def as_jsonl(folder, rows):
    return {
        "train_file": write(folder / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    }


def as_class_labels(folder, rows):
    names = datasets.ClassLabel(names=["x", "y", "z", "c", "u", "v", "a"])
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.List(names)})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(folder / "saved")
    return {"data_path": folder / "saved", "test_size": 0.0}


def as_parquet_of_class_labels(folder, rows):
    datasets.load_from_disk(as_class_labels(folder, rows)["data_path"]).to_parquet(
        folder / "a.parquet"
    )
    return {"train_file": folder / "a.parquet"}


def as_delimited(folder, rows):
    lines = [(row["text"], " ; ".join(row["label"])) for row in rows]
    return {"train_file": csv_file(folder / "a.csv", lines), "label_delimiter": ";"}


def as_columns(folder, rows):
    names = ["x", "y", "z", "c", "u", "v", "a"]
    lines = [
        (
            row["text"],
            *(name in row["label"] for name in names[:3]),
            *(int(name in row["label"]) for name in names[3:]),
        )
        for row in rows
    ]
    file = csv_file(folder / "a.csv", lines, ("text", *names))
    return {"train_file": file, "problem_type": MANY, "label_column": names}


@pytest.mark.parametrize(
    "form", [as_jsonl, as_class_labels, as_parquet_of_class_labels, as_delimited, as_columns]
)
def test_every_form_of_labels_gives_the_same_sets(tmp_path, taxonomy, form):
    rows = [{"text": f"text {i}", "label": labels} for i, labels in enumerate(SETS)]
    data = load(**form(tmp_path, rows), taxonomy=taxonomy, validation_size=0.0)
    assert label_sets(data) == expected(SETS)
    assert data.problem_type == MANY
    assert data.splits["train"]["row"][:] == [*range(len(SETS))]
    assert all(ids == sorted(set(ids)) for ids in data.splits["train"]["nodes"])


def test_a_missing_list_a_null_and_an_empty_cell_mean_no_labels(tmp_path, taxonomy, caplog):
    rows = [
        {"text": "p", "label": None},
        {"text": "q", "label": ["x", None, " "]},
        {"text": "r"},
        {"text": "s", "label": []},
    ]
    with caplog.at_level(logging.INFO):
        data = load(**as_jsonl(tmp_path, rows), taxonomy=taxonomy, validation_size=0.0)
    assert label_sets(data) == {"p": set(), "q": {"x"}, "r": set(), "s": set()}
    assert "the label column holds lists: any number of labels per text" in caplog.text
    file = csv_file(tmp_path / "a.csv", [("p", ""), ("q", "x;;"), ("r", ";")])
    data = load(train_file=file, label_delimiter=";", taxonomy=taxonomy, validation_size=0.0)
    assert label_sets(data) == {"p": set(), "q": {"x"}, "r": set()}


def test_a_long_table_with_one_label_a_row_is_merged_within_each_split(tmp_path, taxonomy):
    train = csv_file(
        tmp_path / "a.csv", [("P", "x"), ("q", "z"), ("p", "u"), ("p ", "x"), ("q", "")]
    )
    test = csv_file(tmp_path / "b.csv", [("r", "y"), ("r", "b")])
    data = load(
        train_file=train, test_file=test, problem_type=MANY, taxonomy=taxonomy, validation_size=0.0
    )
    assert label_sets(data) == {"P": {"x", "u"}, "q": {"z"}}
    assert label_sets(data, "test") == {"r": {"y", "b"}}
    assert data.splits["train"]["row"][:] == [0, 1]
    assert data.report["merged_rows"] == {"train": 3, "test": 1}


# ── Paths and names ───────────────────────────────────────────────────────────────────────────────


def test_names_with_slashes_and_names_under_two_parents_are_read_by_another_separator(tmp_path):
    sets = [
        ["g > cell cycle", "h > cell cycle"],
        ["Glycolysis/Warburg effect"],
        ["g > s/t"],
        ["h"],
        ["> g > s/t", "g"],
    ]
    data = load(
        train_file=json_lines(tmp_path / "a.jsonl", sets),
        label_separator=" > ",
        validation_size=0.0,
    )
    names = {"g", "h", "s/t", "Glycolysis/Warburg effect", "g > cell cycle", "h > cell cycle"}
    assert set(data.taxonomy.labels) == names
    assert label_sets(data) == expected([*sets[:2], ["s/t"], ["h"], ["s/t", "g"]])


def test_names_that_are_not_unique_need_their_path(tmp_path):
    rows = [("one", "other"), ("two", "body/other"), ("three", "body/heart")]
    with pytest.raises(
        InputError, match=r"line 2, .*'other' is ambiguous: it names .*'/other'.*write the path"
    ):
        load(train_file=csv_file(tmp_path / "a.csv", rows))
    rows[0] = ("one", "/other")  # a leading separator marks the root
    path = csv_file(tmp_path / "a.csv", rows)
    data = load(train_file=path, validation_size=0)
    assert paths_of(data) == [("other",), ("body", "other"), ("body", "heart")]
    assert nodes_of(load(test_file=path, known=data.taxonomy), "test") == nodes_of(data)
    # case tells names apart
    cased = csv_file(
        tmp_path / "b.csv", [("one", "neoplasms/Neoplasms"), ("two", "neoplasms"), ("three", "flu")]
    )
    assert labels_of(load(train_file=cased, validation_size=0)) == ["Neoplasms", "neoplasms", "flu"]


def test_a_name_is_one_class_however_its_letters_are_composed(tmp_path):
    rows = [("one", "caf\u00e9"), ("two", "cafe\u0301"), ("three", "tea")]
    assert nodes_of(load(train_file=csv_file(tmp_path / "a.csv", rows), validation_size=0)) == [
        0,
        0,
        1,
    ]


# the same name with other spaces, an invisible character, a wide letter, and a ligature
PLAIN = "flu of fish"
SPACED = "flu\u00a0of fish"
EQUAL = [SPACED, "flu \u2009 of fish", "flu of\u200b fish", "flu of \uff46ish", "flu of \ufb01sh"]


@pytest.mark.parametrize("prefix", ["", "fever/"])
def test_forms_of_a_name_that_are_equal_in_unicode_are_one_class(tmp_path, caplog, prefix):
    rows = [(f"text {i}", prefix + form) for i, form in enumerate([*EQUAL, PLAIN, "cold"])]
    with caplog.at_level(logging.INFO):
        data = load(train_file=csv_file(tmp_path / "a.csv", rows), validation_size=0)
    assert labels_of(data) == [PLAIN] * 6 + ["cold"]
    assert f"equal in Unicode (NFKC), one class each: {PLAIN!r}" in caplog.text
    forms = ["10\u2075 cells", "105 cells", "\u00b5g", "\u03bcg"]
    rows = [(f"text {i}", form) for i, form in enumerate(forms)]
    shown = labels_of(load(train_file=csv_file(tmp_path / "b.csv", rows), validation_size=0))
    assert shown == ["10\u2075 cells", "10\u2075 cells", "\u00b5g", "\u00b5g"]  # the first form


def test_a_label_is_the_node_of_a_given_taxonomy_whose_name_is_equal_in_unicode(tmp_path):
    known = Taxonomy({"sea": [SPACED], "land": ["cold"]})
    forms = [*EQUAL, PLAIN]
    expected = [SPACED] * len(forms)
    tree = write(tmp_path / "tree.json", json.dumps(known.to_nested()))
    for given in ({"known": known}, {"taxonomy": tree}):
        for label in ("{}", "sea/{}", "sea / {}", "\uff53ea/{}"):
            rows = [(f"text {i}", label.format(form)) for i, form in enumerate(forms)]
            file = csv_file(tmp_path / "a.csv", rows)
            assert labels_of(load(**given, train_file=file, validation_size=0)) == expected
    columns = [(f"text {i}", "sea\u200b", form) for i, form in enumerate(forms)]
    file = csv_file(tmp_path / "b.csv", columns, ("text", "l1", "l2"))
    data = load(known=known, train_file=file, label_column=["l1", "l2"], validation_size=0)
    assert labels_of(data) == expected
    file = json_lines(tmp_path / "c.jsonl", [forms, ["cold"]])
    sets = load(known=known, train_file=file, validation_size=0)
    assert label_sets(sets) == {"text 0": {SPACED}, "text 1": {"cold"}}
    file = csv_file(tmp_path / "d.csv", [("one", "\uff23 1"), ("two", "C\u00a01")])
    names = json.dumps({"C 1": PLAIN})
    data = load(known=known, train_file=file, class_names=names, validation_size=0)
    assert labels_of(data) == expected[:2]


def test_a_checkpoint_whose_names_are_equal_in_unicode_keeps_them_apart(tmp_path):
    names = [PLAIN, SPACED, "cold"]
    HierarchicalConfig(taxonomy=names).save_pretrained(tmp_path)
    known = HierarchicalConfig.from_pretrained(tmp_path).tree
    rows = [(f"text {i}", name) for i, name in enumerate(known.labels)]
    file = csv_file(tmp_path / "a.csv", rows)
    assert labels_of(load(known=known, train_file=file, validation_size=0)) == names
    file = csv_file(tmp_path / "b.csv", [("one", EQUAL[2])])
    with pytest.raises(InputError, match=rf"ambiguous: it names '{PLAIN}' and 'flu\\xa0of fish'"):
        load(known=known, train_file=file, validation_size=0)
    known = Taxonomy({"sea": [PLAIN], "land": [PLAIN], "air": [SPACED]})
    file = csv_file(tmp_path / "c.csv", [("one", PLAIN)])
    with pytest.raises(InputError, match=f"it names 'sea/{PLAIN}' and 'land/{PLAIN}' and 'flu"):
        load(known=known, train_file=file, validation_size=0)


def test_a_separator_may_have_other_white_space_in_labels(tmp_path):
    rows = [("one", "a\u00a0>\u00a0b"), ("two", "a  > c"), ("three", "a > b")]
    file = csv_file(tmp_path / "a.csv", rows)
    data = load(train_file=file, label_separator=" > ", validation_size=0)
    assert paths_of(data) == [("a", "b"), ("a", "c"), ("a", "b")]


def test_an_invisible_label_is_missing(tmp_path):
    rows = csv_file(tmp_path / "a.csv", [("one", "a"), ("two", "b"), ("three", "\u200b\ufeff")])
    with pytest.raises(InputError, match="line 4, column 'label': the label is missing"):
        load(train_file=rows, validation_size=0)


def test_classes_that_differ_in_case_alone_are_named_with_their_rows(tmp_path, caplog):
    labels = ["Lung/Cyst", "lung", "LUNG", "lung", "heart", "neoplasms/Neoplasms"]
    labels += ["Stra\u00dfe", "STRASSE"]
    file = csv_file(tmp_path / "a.csv", [(f"text {i}", label) for i, label in enumerate(labels)])
    data = load(train_file=file, validation_size=0)
    assert len(set(nodes_of(data))) == 7
    found = [dict(group) for group in data.report["look_alikes"]]
    assert found == [{"LUNG": 1, "lung": 2, "Lung": 1}, {"STRASSE": 1, "Stra\u00dfe": 1}]
    (line,) = [line for line in caplog.messages if "in case alone" in line]
    assert "with their rows: 'LUNG' (1) and 'lung' (2) and 'Lung' (1); 'STRASSE' (1) and" in line
    assert line.endswith("; if they mean the same, write their labels alike")
    caplog.clear()  # a given taxonomy means what it says
    assert load(train_file=file, known=data.taxonomy, validation_size=0).report["look_alikes"] == []
    assert "in case alone" not in caplog.text


# ── The taxonomy ──────────────────────────────────────────────────────────────────────────────────


def test_names_of_the_default_taxonomy_choose_it(tmp_path):
    rows = [
        ("one", "neoplasms"),
        ("two", "specific disease"),
        ("three", "specific disease/nervous system diseases"),
    ]
    data = load(train_file=csv_file(tmp_path / "a.csv", rows), validation_size=0)
    assert data.taxonomy == Taxonomy(DEFAULT_TAXONOMY)
    assert labels_of(data) == ["neoplasms", "specific disease", "nervous system diseases"]
    rest = [
        "general pathological conditions",
        "digestive system diseases",
        "cardiovascular diseases",
    ]
    assert data.report["classes_without_training_rows"] == rest
    rows[2] = ("three", "flu")  # one other label, and the taxonomy is built from the labels
    data = load(train_file=csv_file(tmp_path / "a.csv", rows), validation_size=0)
    assert data.taxonomy.labels == ["flu", "neoplasms", "specific disease"]


def test_the_taxonomy_of_the_labels_depends_on_neither_row_order_nor_split(tmp_path):
    rows = [("one", "b / y"), ("two", "a"), ("three", "b/x")]
    files = [
        csv_file(tmp_path / f"{i}.csv", part)
        for i, part in enumerate((rows, rows[::-1], rows[:2], rows[2:]))
    ]
    one, other = (load(train_file=file, validation_size=0) for file in files[:2])
    split = load(train_file=files[2], test_file=files[3], validation_size=0)
    assert one.taxonomy == other.taxonomy == split.taxonomy == Taxonomy(["a", {"b": ["x", "y"]}])
    assert labels_of(one) == ["y", "a", "x"]
    assert split.report["classes_without_training_rows"] == ["x"]
    custom = csv_file(tmp_path / "c.csv", [("one", "a > b"), ("two", "a > c/d")])
    assert load(train_file=custom, validation_size=0, label_separator=">").taxonomy.labels == [
        "b",
        "c/d",
        "a",
    ]


def test_labels_may_be_inner_nodes_and_a_given_taxonomy_replaces_that_of_a_checkpoint(tmp_path):
    tree = write(tmp_path / "tree.yaml", "body: [heart, lung]\nmind:\n")
    rows = csv_file(
        tmp_path / "a.csv",
        [("one", "body"), ("two", "body/lung"), ("three", "mind"), ("four", " heart ")],
    )
    data = load(train_file=rows, taxonomy=tree, validation_size=0)
    assert labels_of(data) == ["body", "lung", "mind", "heart"]
    assert nodes_of(data)[0] >= data.taxonomy.num_leaves
    mine = Taxonomy({"body": ["lung", "heart"], "mind": None, "soul": None})
    assert load(known=mine, test_file=rows).taxonomy == mine
    assert load(known=mine, test_file=rows, taxonomy=tree).taxonomy == data.taxonomy


def test_a_checkpoint_keeps_its_separator(tmp_path):
    known = Taxonomy({"heart": ["valve"], "mind": []}, " > ")
    rows = csv_file(tmp_path / "a.csv", [("one", "heart > valve")])
    assert labels_of(load(known=known, test_file=rows), "test") == ["valve"]
    for separator in ({"label_separator": " > "}, {"known": known}):
        with pytest.raises(
            InputError, match="--label_delimiter must differ from --label_separator, which is ' > '"
        ):
            load(train_file=rows, **separator, label_delimiter=">")


# ── Codes ─────────────────────────────────────────────────────────────────────────────────────────


def test_codes_are_names_only_where_the_user_says_so(tmp_path):
    rows = [(str(i), f"text {i}") for i in range(1, 6)]
    path = csv_file(tmp_path / "a.csv", rows, ("condition_label", "medical_abstract"))
    assert load(train_file=path, validation_size=0).taxonomy == Taxonomy(["1", "2", "3", "4", "5"])
    with pytest.raises(InputError, match=r"line 2, .*'1' is not in the taxonomy"):
        load(test_file=path, known=Taxonomy(DEFAULT_TAXONOMY))
    # the corpus's own names, from its data card
    classes = [
        "neoplasms",
        "digestive system diseases",
        "nervous system diseases",
        "cardiovascular diseases",
        "general pathological conditions",
    ]
    words = [
        str(ROOT / "recipes" / "medical_abstracts.yaml"),
        "--train_file",
        str(path),
        "--validation_size",
        "0",
    ]
    data = load(**vars(parse(words)[1]))
    assert data.taxonomy == Taxonomy(DEFAULT_TAXONOMY)
    assert labels_of(data) == classes


def test_one_file_as_taxonomy_and_as_class_names(tmp_path):
    names = write(
        tmp_path / "labels.csv", "label,name,parent\nC1,Heart,body\nC2,Lung,body\nC3,Sleep,mind\n"
    )
    rows = csv_file(
        tmp_path / "a.csv", [("one", "C2"), ("two", "C3"), ("three", "body"), ("four", "Heart")]
    )
    data = load(train_file=rows, taxonomy=names, class_names=names, validation_size=0)
    assert labels_of(data) == ["Lung", "Sleep", "body", "Heart"]


def test_codes_may_be_named_by_paths_or_level_by_level(tmp_path):
    rows = csv_file(tmp_path / "a.csv", [("one", "1"), ("two", "2"), ("three", "flu")])
    data = load(
        train_file=rows,
        class_names='{"1": "body/heart", "2": "body", "3": "flu"}',
        validation_size=0,
    )
    assert paths_of(data) == [("body", "heart"), ("body",), ("flu",)]
    with pytest.raises(
        InputError, match=r"a\.csv, line 4, .*'flu' is neither a code nor a name of --class_names"
    ):
        load(train_file=rows, class_names='{"1": "body/heart", "2": "body"}')
    rows = csv_file(
        tmp_path / "a.csv",
        [("one", "B", "1"), ("two", "M", ""), ("three", "B", "")],
        ("text", "l1", "l2"),
    )
    names = '{"B": "body", "M": "mind", "1": "heart"}'
    data = load(train_file=rows, label_column=["l1", "l2"], validation_size=0, class_names=names)
    assert labels_of(data) == ["heart", "mind", "body"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ('{"1": "one", "02": " two "}', None),
        ("note,Code,name\nx,1,one\ny,02,two\n", None),
        ("name,label\none,1\ntwo,02\n", None),
        ('{"1": ', "is not JSON"),
        ('{"1": 2}', "the code '1' needs a name"),
        ("code,name\n1,one\n,two\n", "'two' has no code"),
        ('{"1": "a", "1": "b"}', "the code '1' has two names: 'a' and 'b'"),
        ("id,what\n1,one\n", r"expected columns code \(or label\) and name, found 'id', 'what'"),
    ],
)
def test_class_names_are_read_from_json_or_a_table(tmp_path, given, message):
    names = given if given.startswith("{") else str(write(tmp_path / "names.csv", given))
    rows = csv_file(tmp_path / "a.csv", [("p", "1"), ("q", "02")])
    if message is None:
        assert labels_of(load(train_file=rows, class_names=names, validation_size=0)) == [
            "one",
            "two",
        ]
    else:
        with pytest.raises(InputError, match=message):
            load(train_file=rows, class_names=names, validation_size=0)


# ── Errors ────────────────────────────────────────────────────────────────────────────────────────

NO_LABEL = "line 1, column 'label': the label is neither text nor a whole number"
NO_TREE = {"taxonomy": None}


@pytest.mark.parametrize(
    ("labels", "flags", "message"),
    [
        ([None, "x"], {}, "line 1, column 'label': the label is missing"),
        (
            [float("nan"), "x", ""],
            {},
            "line 1, column 'label': the label is missing .*; 2 rows cannot be used",
        ),
        ([1.5, 2.0], {}, NO_LABEL),
        ([["x", 1.5], ["x"]], {}, NO_LABEL),
        (
            [SECRET * 50, "y"],
            {},
            (
                r"line 1, column 'label': the label \(a value of 700 characters\) is not in the "
                r"taxonomy"
            ),
        ),
        ([SECRET * 50, "y"], NO_TREE, "has 700 characters, at most 500 are supported"),
        (
            ["x", "Y"],
            {},
            "line 2, column 'label': the label 'Y' is not in the taxonomy; did you mean 'y'",
        ),
        (
            [["x"], ["x", "nope"]],
            {},
            "line 2, column 'label': the label 'nope' is not in the taxonomy; it has 'x', 'y', ",
        ),
        ([[], []], NO_TREE, "column 'label': no row has a label"),
        (
            ["a/b", "a/"],
            NO_TREE,
            "column 'label': the labels do not make a taxonomy: an empty name at 'a'",
        ),
        (
            ["a", "a"],
            NO_TREE,
            (
                "column 'label': the labels do not make a taxonomy: .* at least two leaves; "
                "this one has 1"
            ),
        ),
        # contradictions
        (
            [["x"]],
            {"problem_type": "single_label_classification"},
            "means one label per text, but the label column holds",
        ),
        (
            ["x"],
            {"problem_type": "single_label_classification", "label_delimiter": ";"},
            "but --label_delimiter is given",
        ),
    ],
)
def test_a_bad_label_is_one_clear_line(tmp_path, taxonomy, labels, flags, message):
    file = json_lines(tmp_path / "a.jsonl", labels)
    with pytest.raises(InputError, match=message) as refused:
        load(train_file=file, **{"taxonomy": taxonomy, "validation_size": 0.0} | flags)
    assert "\n" not in str(refused.value)
    assert SECRET not in str(refused.value)


def test_columns_of_0_and_1_are_refused_unless_their_meaning_is_clear(tmp_path):
    rows = [("p", 1, 0), ("q", 0, 1), ("r", 1, 1)]
    header = ("text", "x", "y")
    given = {
        "train_file": csv_file(tmp_path / "a.csv", rows, header),
        "label_column": ["x", "y"],
        "validation_size": 0,
    }
    with pytest.raises(
        InputError, match="the label columns 'x', 'y' hold 0 and 1 alone: give --problem_type multi"
    ):
        load(**given)
    assert label_sets(load(**given, problem_type=MANY)) == {"p": {"x"}, "q": {"y"}, "r": {"x", "y"}}
    one = load(**given, problem_type="single_label_classification")
    assert paths_of(one) == [("1", "0"), ("0", "1"), ("1", "1")]
    given["train_file"] = csv_file(tmp_path / "b.csv", [*rows, ("s", "", 2)], header)
    with pytest.raises(
        InputError,
        match=r"line 5, column 'x': the cell is neither 0 nor 1.*join columns of names to one",
    ):
        load(**given, problem_type=MANY)
    classes = csv_file(tmp_path / "c.csv", [("p", 1), ("q", 0)])
    assert labels_of(load(train_file=classes, validation_size=0)) == ["1", "0"]


NAMES_IN_BRACKETS = [
    "[unknown]",
    "[[Sepsis]]",
    "[Sepsis](sepsis, shock)",
    "[0, 10)",
    "[18F]FDG, PET [brain]",
    "[Crohn's disease]",
]
WRITTEN_LISTS = [
    str(["it's", "b c"]),
    json.dumps(["a"]),
    "[]",
    str(("a",)),
    str([0, 1]),
    str(np.array(["a", "b"])),
]


@pytest.mark.parametrize("flags", [{}, {"label_delimiter": ";"}])
def test_a_list_written_as_text_is_refused_and_a_name_in_brackets_is_not(tmp_path, flags):
    rows = [(name, name) for name in NAMES_IN_BRACKETS]
    data = load(train_file=csv_file(tmp_path / "a.csv", rows), validation_size=0, **flags)
    assert label_sets(data) == {name: {name} for name in NAMES_IN_BRACKETS}
    for label in WRITTEN_LISTS:
        file = csv_file(tmp_path / "a.csv", [("one", "other"), ("two", label)])
        tree = write(tmp_path / "tree.json", json.dumps(["other", "third"]))
        for taxonomy in ({}, {"taxonomy": tree}):
            with pytest.raises(
                InputError,
                match="line 3, column 'label': the label is a list written as text: save",
            ):
                load(train_file=file, validation_size=0, **flags, **taxonomy)
