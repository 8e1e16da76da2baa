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
    load_labels,
    load_rows,
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
ONE = "single_label_classification"
CODES = {"class_names": '{"1": "a/b", "2": "a", "3": "flu"}'}


@pytest.fixture
def taxonomy(tmp_path):
    return write(tmp_path / "taxonomy.json", json.dumps(TREE))


def expected(sets):
    return {f"text {i}": set(labels) for i, labels in enumerate(sets)}


# ── One path a text ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("labels", "flags", "paths"),
    [
        ([3.0, 10, 3], {}, ["3", "10", "3"]),  # whole numbers, as JSON writers store them
        (["/other", "body/other", "body"], {}, ["other", "body/other", "body"]),  # from the root
        (["a/A", "a", "flu"], {}, ["a/A", "a", "flu"]),  # case tells names apart
        (["caf\u00e9", "cafe\u0301", "tea"], {}, ["caf\u00e9", "caf\u00e9", "tea"]),
        (["10\u2075", "105", "\u00b5g", "\u03bcg"], {}, ["10\u2075"] * 2 + ["\u00b5g"] * 2),
        # other white space around a separator
        (["a\u00a0>\u00a0b", "a  > c"], {"label_separator": " > "}, ["a/b", "a/c"]),
        (["a > b", "c"], {"label_separator": ">"}, ["a/b", "c"]),
        # codes named by paths
        (
            ["1", "2", "flu"],
            CODES,
            ["a/b", "a", "flu"],
        ),
    ],
)
def test_labels_are_paths_of_names(tmp_path, labels, flags, paths):
    data = load_labels(tmp_path, labels, **flags)
    assert ["/".join(path) for path in paths_of(data)] == paths
    again = load_labels(tmp_path, labels, known=data.taxonomy, **flags)
    assert nodes_of(again) == nodes_of(data)


def test_several_label_columns_name_the_path_from_the_root(tmp_path):
    header = ("text", "l1", "l2", "l3")
    columns = {"label_column": ["l1", "l2", "l3"]}
    rows = [
        ("one", "body", "heart", "valve"),
        ("two", "body", "lung", ""),
        ("three", "mind", "", ""),
        ("four", "body", "", ""),
    ]
    data = load_rows(tmp_path, rows, header, **columns)
    paths = [("body", "heart", "valve"), ("body", "lung"), ("mind",), ("body",)]
    assert paths_of(data) == paths
    classes = {"1": {"mind": 1, "body": 3}, "2": {"lung": 1, "heart": 1}, "3": {"valve": 1}}
    assert data.report["splits"]["train"]["classes"] == classes
    for row, message in (
        (("one", "", "", ""), "line 2, column 'l1 l2 l3': the label is missing"),
        (("one", "body", "", "valve"), "l3': a label column is empty, although the column of a"),
        (("one", "heart", "", ""), r"must name the path from the root, and \('heart'\) is none"),
    ):
        with pytest.raises(InputError, match=message):
            load_rows(tmp_path, [row], header, known=data.taxonomy, **columns)
    codes = '{"B": "body", "M": "mind", "1": "heart", "2": "lung", "3": "valve"}'
    coded = [("one", "B", "1", "3"), ("two", "B", "2", ""), ("three", "M", "", "")]
    assert paths_of(load_rows(tmp_path, coded, header, class_names=codes, **columns)) == paths[:3]
    # one column holds names, several hold paths
    assert labels_of(load_labels(tmp_path, ["heart"], known=data.taxonomy)) == ["heart"]


# ── Any number of nodes a text ────────────────────────────────────────────────────────────────────


def as_lists(folder, rows):
    return {"train_file": json_lines(folder / "a.jsonl", [row["label"] for row in rows])}


def as_class_labels(folder, rows):
    names = datasets.ClassLabel(names=["x", "y", "z", "c", "u", "v", "a"])
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.List(names)})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(folder / "saved")
    return {"data_path": folder / "saved", "test_size": 0.0}


def as_parquet_of_class_labels(folder, rows):
    saved = as_class_labels(folder, rows)["data_path"]
    datasets.load_from_disk(saved).to_parquet(folder / "a.parquet")
    return {"train_file": folder / "a.parquet"}


def as_delimited(folder, rows):
    lines = [(row["text"], " ; ".join(row["label"])) for row in rows]
    return {"train_file": csv_file(folder / "a.csv", lines), "label_delimiter": ";"}


def as_columns(folder, rows):
    names = ["x", "y", "z", "c", "u", "v", "a"]
    lines = []
    for row in rows:
        has = [name in row["label"] for name in names]
        lines.append((row["text"], *has[:3], *map(int, has[3:])))
    file = csv_file(folder / "a.csv", lines, ("text", *names))
    return {"train_file": file, "problem_type": MANY, "label_column": names}


@pytest.mark.parametrize(
    "form", [as_lists, as_class_labels, as_parquet_of_class_labels, as_delimited, as_columns]
)
def test_every_form_of_labels_gives_the_same_sets(tmp_path, taxonomy, form):
    rows = [{"text": f"text {i}", "label": labels} for i, labels in enumerate(SETS)]
    data = load(**form(tmp_path, rows), taxonomy=taxonomy, validation_size=0.0)
    assert label_sets(data) == expected(SETS)
    assert data.problem_type == MANY
    assert data.splits["train"]["row"][:] == [*range(len(SETS))]
    assert all(ids == sorted(set(ids)) for ids in data.splits["train"]["nodes"])


def test_a_missing_list_a_null_and_an_empty_cell_mean_no_labels(tmp_path, taxonomy, caplog):
    labels = [None, ["x", None, " "], []]
    with caplog.at_level(logging.INFO):
        data = load_labels(tmp_path, labels, taxonomy=taxonomy)
    assert label_sets(data) == expected(["", "x", ""])
    assert "the label column holds lists: any number of labels per text" in caplog.text
    rows = [("text 0", ""), ("text 1", "x;;"), ("text 2", ";")]
    data = load_rows(tmp_path, rows, label_delimiter=";", taxonomy=taxonomy)
    assert label_sets(data) == expected(["", "x", ""])


def test_a_long_table_with_one_label_a_row_is_merged_within_each_split(tmp_path, taxonomy):
    test = csv_file(tmp_path / "b.csv", [("r", "y"), ("r", "b")])
    rows = [("P", "x"), ("q", "z"), ("p", "u"), ("p ", "x"), ("q", "")]
    data = load_rows(tmp_path, rows, test_file=test, problem_type=MANY, taxonomy=taxonomy)
    assert label_sets(data) == {"P": {"x", "u"}, "q": {"z"}}
    assert label_sets(data, "test") == {"r": {"y", "b"}}
    assert data.splits["train"]["row"][:] == [0, 1]
    assert data.report["merged_rows"] == {"train": 3, "test": 1}


def test_columns_of_0_and_1_are_refused_unless_their_meaning_is_clear(tmp_path):
    rows = [("p", 1, 0), ("q", 0, 1), ("r", 1, 1)]
    header = ("text", "x", "y")
    columns = {"label_column": ["x", "y"]}
    with pytest.raises(InputError, match="'x', 'y' hold 0 and 1 alone: give --problem_type multi"):
        load_rows(tmp_path, rows, header, **columns)
    sets = label_sets(load_rows(tmp_path, rows, header, **columns, problem_type=MANY))
    assert sets == {"p": {"x"}, "q": {"y"}, "r": {"x", "y"}}
    one = load_rows(tmp_path, rows, header, **columns, problem_type=ONE)
    assert paths_of(one) == [("1", "0"), ("0", "1"), ("1", "1")]
    message = "line 5, column 'x': the cell is neither 0 nor 1.*join columns of names to one"
    with pytest.raises(InputError, match=message):
        load_rows(tmp_path, [*rows, ("s", "", 2)], header, **columns, problem_type=MANY)
    assert labels_of(load_rows(tmp_path, [("p", 1), ("q", 0)])) == ["1", "0"]


# ── Paths and names ───────────────────────────────────────────────────────────────────────────────


def test_names_with_slashes_and_names_under_two_parents_are_read_by_another_separator(tmp_path):
    sets = [
        ["g > cell cycle", "h > cell cycle"],
        ["Glycolysis/Warburg effect"],
        ["g > s/t"],
        ["h"],
        ["> g > s/t", "g"],
    ]
    data = load_labels(tmp_path, sets, label_separator=" > ")
    names = {"g", "h", "s/t", "Glycolysis/Warburg effect", "g > cell cycle", "h > cell cycle"}
    assert set(data.taxonomy.labels) == names
    assert label_sets(data) == expected([*sets[:2], ["s/t"], ["h"], ["s/t", "g"]])


# the same name with other spaces, an invisible character, a wide letter, and a ligature
PLAIN = "flu of fish"
SPACED = "flu\u00a0of fish"
EQUAL = [SPACED, "flu \u2009 of fish", "flu of\u200b fish", "flu of \uff46ish", "flu of \ufb01sh"]


@pytest.mark.parametrize("prefix", ["", "fever/"])
def test_forms_of_a_name_that_are_equal_in_unicode_are_one_class(tmp_path, caplog, prefix):
    labels = [prefix + form for form in [*EQUAL, PLAIN, "cold"]]
    with caplog.at_level(logging.INFO):
        data = load_labels(tmp_path, labels)
    assert labels_of(data) == [PLAIN] * 6 + ["cold"]
    assert f"equal in Unicode (NFKC), one class each: {PLAIN!r}" in caplog.text


def test_a_label_is_the_node_of_a_given_taxonomy_whose_name_is_equal_in_unicode(tmp_path):
    known = Taxonomy({"sea": [SPACED], "land": ["cold"]})
    forms = [*EQUAL, PLAIN]
    tree = write(tmp_path / "tree.json", json.dumps(known.to_nested()))
    for given in ({"known": known}, {"taxonomy": tree}):
        for label in ("{}", "sea/{}", "sea / {}", "\uff53ea/{}"):
            data = load_labels(tmp_path, [label.format(form) for form in forms], **given)
            assert labels_of(data) == [SPACED] * 6
    rows = [(f"text {i}", "sea\u200b", form) for i, form in enumerate(forms)]
    levels = ["l1", "l2"]
    data = load_rows(tmp_path, rows, ("text", *levels), known=known, label_column=levels)
    assert labels_of(data) == [SPACED] * 6
    sets = load_labels(tmp_path, [forms, ["cold"]], known=known)
    assert label_sets(sets) == expected([[SPACED], ["cold"]])
    names = json.dumps({"C\u00a01": PLAIN})
    data = load_labels(tmp_path, ["\uff23 1", "C 1"], known=known, class_names=names)
    assert labels_of(data) == [SPACED] * 2


def test_a_checkpoint_whose_names_are_equal_in_unicode_keeps_them_apart(tmp_path):
    names = [PLAIN, SPACED, "cold"]
    HierarchicalConfig(taxonomy=names).save_pretrained(tmp_path)
    known = HierarchicalConfig.from_pretrained(tmp_path).tree
    assert labels_of(load_labels(tmp_path, names, known=known)) == names
    with pytest.raises(InputError, match=rf"ambiguous: it names '{PLAIN}' and 'flu\\xa0of fish'"):
        load_labels(tmp_path, EQUAL[2:3], known=known)
    known = Taxonomy({"sea": [PLAIN], "land": [PLAIN], "air": [SPACED]})
    with pytest.raises(InputError, match=f"it names 'sea/{PLAIN}' and 'land/{PLAIN}' and 'flu"):
        load_labels(tmp_path, [PLAIN], known=known)


def test_classes_that_differ_in_case_alone_are_named_with_their_rows(tmp_path, caplog):
    labels = ["Lung/Cyst", "lung", "LUNG", "lung", "heart", "neoplasms/Neoplasms"]
    labels += ["Stra\u00dfe", "STRASSE"]
    data = load_labels(tmp_path, labels)
    assert len(set(nodes_of(data))) == 7
    found = [dict(group) for group in data.report["look_alikes"]]
    assert found == [{"LUNG": 1, "lung": 2, "Lung": 1}, {"STRASSE": 1, "Stra\u00dfe": 1}]
    (line,) = [line for line in caplog.messages if "in case alone" in line]
    assert "with their rows: 'LUNG' (1) and 'lung' (2) and 'Lung' (1); 'STRASSE' (1) and" in line
    assert line.endswith("; if they mean the same, write their labels alike")
    caplog.clear()  # a given taxonomy means what it says
    assert load_labels(tmp_path, labels, known=data.taxonomy).report["look_alikes"] == []
    assert "in case alone" not in caplog.text


# ── The taxonomy ──────────────────────────────────────────────────────────────────────────────────


def test_names_of_the_default_taxonomy_choose_it(tmp_path):
    labels = ["neoplasms", "specific disease", "specific disease/nervous system diseases"]
    data = load_labels(tmp_path, labels)
    assert data.taxonomy == Taxonomy(DEFAULT_TAXONOMY)
    assert labels_of(data) == ["neoplasms", "specific disease", "nervous system diseases"]
    with_rows = {"neoplasms", "nervous system diseases"}
    rest = [name for name in data.taxonomy.labels[:5] if name not in with_rows]
    assert data.report["classes_without_training_rows"] == rest
    # one other label, and the taxonomy is built from the labels
    data = load_labels(tmp_path, [*labels[:2], "flu"])
    assert data.taxonomy.labels == ["flu", "neoplasms", "specific disease"]


def test_the_taxonomy_of_the_labels_depends_on_neither_row_order_nor_split(tmp_path):
    rows = [("one", "b / y"), ("two", "a"), ("three", "b/x")]
    one = load_rows(tmp_path, rows)
    other = load_rows(tmp_path, rows[::-1])
    split = load_rows(tmp_path, rows[:2], test_file=csv_file(tmp_path / "b.csv", rows[2:]))
    assert one.taxonomy == other.taxonomy == split.taxonomy == Taxonomy(["a", {"b": ["x", "y"]}])
    assert labels_of(one) == ["y", "a", "x"]
    assert split.report["classes_without_training_rows"] == ["x"]


def test_labels_may_be_inner_nodes_and_a_given_taxonomy_replaces_that_of_a_checkpoint(tmp_path):
    tree = write(tmp_path / "tree.yaml", "body: [heart, lung]\nmind:\n")
    labels = ["body", "body/lung", "mind", " heart "]
    data = load_labels(tmp_path, labels, taxonomy=tree)
    assert labels_of(data) == ["body", "lung", "mind", "heart"]
    assert nodes_of(data)[0] >= data.taxonomy.num_leaves
    mine = Taxonomy({"body": ["lung", "heart"], "mind": None, "soul": None})
    assert load_labels(tmp_path, labels, known=mine).taxonomy == mine
    assert load_labels(tmp_path, labels, known=mine, taxonomy=tree).taxonomy == data.taxonomy


def test_a_checkpoint_keeps_its_separator(tmp_path):
    known = Taxonomy({"heart": ["valve"], "mind": []}, " > ")
    labels = ["heart > valve"]
    assert labels_of(load_labels(tmp_path, labels, known=known)) == ["valve"]
    for separator in ({"label_separator": " > "}, {"known": known}):
        with pytest.raises(InputError, match="must differ from --label_separator, which is ' > '"):
            load_labels(tmp_path, labels, **separator, label_delimiter=">")


# ── Codes ─────────────────────────────────────────────────────────────────────────────────────────


def test_codes_are_names_only_where_the_user_says_so(tmp_path):
    rows = [(str(i), f"text {i}") for i in range(1, 6)]
    path = csv_file(tmp_path / "a.csv", rows, ("condition_label", "medical_abstract"))
    data = load(train_file=path, validation_size=0)
    assert data.taxonomy == Taxonomy(["1", "2", "3", "4", "5"])
    with pytest.raises(InputError, match=r"line 2, .*'1' is not in the taxonomy"):
        load(test_file=path, known=Taxonomy(DEFAULT_TAXONOMY))
    # the corpus's own names, from its data card
    classes = [*DEFAULT_TAXONOMY["specific disease"], "general pathological conditions"]
    recipe = str(ROOT / "recipes" / "medical_abstracts.yaml")
    words = [recipe, "--train_file", str(path), "--validation_size", "0"]
    data = load(**vars(parse(words)[1]))
    assert data.taxonomy == Taxonomy(DEFAULT_TAXONOMY)
    assert labels_of(data) == classes


def test_one_file_as_taxonomy_and_as_class_names(tmp_path):
    table = "label,name,parent\nC1,Heart,body\nC2,Lung,body\nC3,Sleep,mind\n"
    names = write(tmp_path / "labels.csv", table)
    labels = ["C2", "C3", "body", "Heart"]
    data = load_labels(tmp_path, labels, taxonomy=names, class_names=names)
    assert labels_of(data) == ["Lung", "Sleep", "body", "Heart"]


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
        ('{"1": "a"}', "line 2, .*'02' is neither a code nor a name of --class_names"),
        ("id,what\n1,one\n", r"expected columns code \(or label\) and name, found 'id', 'what'"),
    ],
)
def test_class_names_are_read_from_json_or_a_table(tmp_path, given, message):
    names = given if given.startswith("{") else write(tmp_path / "names.csv", given)
    labels = ["1", "02"]
    if message is None:
        assert labels_of(load_labels(tmp_path, labels, class_names=names)) == ["one", "two"]
    else:
        with pytest.raises(InputError, match=message):
            load_labels(tmp_path, labels, class_names=names)


# ── Errors ────────────────────────────────────────────────────────────────────────────────────────

NO_LABEL = "line 1, column 'label': the label is neither text nor a whole number"
MISSING = "column 'label': the label is missing"
NO_TREE = {"taxonomy": None}
WRITTEN_LISTS = [
    str(["it's", "b c"]),
    json.dumps(["a"]),
    "[]",
    str(("a",)),
    str([0, 1]),
    str(np.array(["a", "b"])),
]


@pytest.mark.parametrize(
    ("labels", "flags", "message"),
    [
        ([None, "x"], {}, f"line 1, {MISSING}"),
        (["x", "\u200b\ufeff"], {}, f"line 2, {MISSING}"),  # invisible
        ([float("nan"), "x", ""], {}, f"line 1, {MISSING} .*; 2 rows cannot be used"),
        ([1.5, 2.0], {}, NO_LABEL),
        ([["x", 1.5], ["x"]], {}, NO_LABEL),
        ([SECRET * 50, "y"], {}, r"the label \(a value of 700 characters\) is not in the taxonomy"),
        ([SECRET * 50, "y"], NO_TREE, "has 700 characters, at most 500 are supported"),
        (["x", "Y"], {}, "line 2, .* the label 'Y' is not in the taxonomy; did you mean 'y'"),
        ([["x"], ["nope"]], {}, "line 2, .* 'nope' is not in the taxonomy; it has 'x', 'y', "),
        ([[], []], NO_TREE, "column 'label': no row has a label"),
        (["a/b", "a/"], NO_TREE, "the labels do not make a taxonomy: an empty name at 'a'"),
        (["a", "a"], NO_TREE, "do not make a taxonomy: .* at least two leaves; this one has 1"),
        (["other", "a/other"], NO_TREE, "'other' is ambiguous: .*'/other'.*write the path"),
        # contradictions
        ([["x"]], {"problem_type": ONE}, "means one label per text, but the label column holds"),
        (["x"], {"problem_type": ONE, "label_delimiter": ";"}, "but --label_delimiter is given"),
        # lists written as text
        *(
            (["other", label], flags, "line 2, .* the label is a list written as text: save")
            for label in WRITTEN_LISTS
            for flags in ({}, {"label_delimiter": ";"}, NO_TREE)
        ),
    ],
)
def test_a_bad_label_is_one_clear_line(tmp_path, taxonomy, labels, flags, message):
    with pytest.raises(InputError, match=message) as refused:
        load_labels(tmp_path, labels, **{"taxonomy": taxonomy} | flags)
    assert "\n" not in str(refused.value)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("flags", [{}, {"label_delimiter": ";"}])
def test_a_name_in_brackets_is_no_list(tmp_path, flags):
    names = [
        "[unknown]",
        "[[Sepsis]]",
        "[Sepsis](sepsis, shock)",
        "[0, 10)",
        "[18F]FDG, PET [brain]",
        "[Crohn's disease]",
    ]
    data = load_labels(tmp_path, names, **flags)
    assert label_sets(data) == expected([name] for name in names)
