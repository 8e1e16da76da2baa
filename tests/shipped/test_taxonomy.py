import json

import pandas as pd
import pytest

from configuration_hierarchical import HierarchicalConfig
from hierarchical_clinicalbert.data.taxonomy_files import build_from_table, read_taxonomy
from hierarchical_clinicalbert.errors import InputError
from taxonomy_hierarchical import DEFAULT_TAXONOMY, Taxonomy, TaxonomyError

DUPLICATES = {"lung": ["benign", "malignant"], "skin": {"benign": None, "rash": ["dry", "wet"]}, "pain": None}


def from_rows(rows):
    return build_from_table(pd.DataFrame(rows, range(2, len(rows) + 2), ["parent", "child"]), "/")


def test_nodes_are_numbered_leaves_first_in_reading_order():
    tree = Taxonomy(DUPLICATES)
    assert tree.names == ["benign", "malignant", "benign", "dry", "wet", "pain", "lung", "skin", "rash"]
    assert (tree.num_leaves, tree.num_nodes, tree.depth) == (6, 9, 3)
    assert [tree.path_names(i) for i in (3, 5, 8)] == [("skin", "rash", "dry"), ("pain",), ("skin", "rash")]
    assert [tree.names[i] for i in tree.path(4)] == ["skin", "rash", "wet"]


def test_a_name_under_two_parents_is_known_by_its_path_alone():
    tree = Taxonomy(DUPLICATES)
    assert tree.labels[0] == "lung/benign"
    assert tree.labels[2] == "skin/benign"
    assert tree.id("skin/benign") == 2
    assert tree.id("skin/rash/wet") == tree.id("wet") == 4
    with pytest.raises(TaxonomyError, match=r"'benign' is ambiguous.*'lung/benign' and 'skin/benign'"):
        tree.id("benign")


def test_a_root_that_shares_its_name_with_a_child_needs_a_leading_separator():
    tree = Taxonomy({"heart": ["heart", "valve"], "lung": None})
    with pytest.raises(TaxonomyError, match="ambiguous"):
        tree.id("heart")
    assert tree.names[tree.id("/heart")] == "heart"
    assert tree.levels[tree.id("/heart")] == 1
    assert tree.levels[tree.id("heart/heart")] == 2
    spaced = Taxonomy({"heart": ["heart", "valve"], "lung": None}, " > ")
    assert [spaced.id(label) for label in spaced.labels] == list(range(spaced.num_nodes))


def test_every_form_and_every_file_gives_the_same_taxonomy(tmp_path):
    expected = Taxonomy(DEFAULT_TAXONOMY)
    rows = [
        ("", "general pathological conditions"),
        ("specific disease", "neoplasms"),
        ("specific disease", "digestive system diseases"),
        ("specific disease", "nervous system diseases"),
        ("specific disease", "cardiovascular diseases"),
    ]
    files = {
        "tree.yaml": "general pathological conditions:\nspecific disease:\n"
        + "".join(f"  - {child}\n" for _, child in rows[1:]),
        "tree.json": json.dumps({rows[0][1]: {}, "specific disease": {child: None for _, child in rows[1:]}}),
        "tree.csv": "child,parent\n" + "".join(f"{child},{parent}\n" for parent, child in rows),
        "tree.CSV": "child,parent\n" + "".join(f"{child},{parent}\n" for parent, child in rows),
        "tree.tsv": "parent\tname\n" + "".join(f"{parent}\t{child}\n" for parent, child in rows),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert read_taxonomy(tmp_path / name) == expected, name
    assert from_rows(rows) == expected
    assert Taxonomy(expected.to_nested()) == expected


def test_descriptions_of_a_table_stay_with_their_nodes_in_the_configuration_and_in_the_drawing(tmp_path):
    (tmp_path / "tree.csv").write_text(
        'Parent,child, Description\n,heart,"the heart,\n and its vessels"\nheart,angina,\nheart,caf\u00e9, of coffee \n,other,\n'
    )
    tree = read_taxonomy(tmp_path / "tree.csv")
    assert tree.descriptions == {"heart": "the heart, and its vessels", "caf\u00e9": "of coffee"}
    HierarchicalConfig(taxonomy=tree).save_pretrained(tmp_path)
    stored = HierarchicalConfig.from_pretrained(tmp_path).tree
    assert stored == tree
    assert stored.descriptions == tree.descriptions
    assert stored.draw() == ("heart – the heart, and its vessels\n├── angina\n└── caf\u00e9 – of coffee\nother")


def test_yaml_names_stay_as_they_are_written(tmp_path):
    (tmp_path / "tree.yaml").write_text("no:\n  - 1\n  - 2.50\nnull: \n1.0: null\nyes: ~\n")
    assert read_taxonomy(tmp_path / "tree.yaml").names == ["1", "2.50", "null", "1.0", "yes", "no"]


def test_a_name_is_one_node_however_its_letters_are_composed(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    expected = Taxonomy({composed: ["hot", "cold"]})
    (tmp_path / "tree.json").write_text(json.dumps({decomposed: ["hot", "cold"]}))
    assert read_taxonomy(tmp_path / "tree.json") == expected
    assert from_rows([(composed, "hot"), (decomposed, "cold"), ("", decomposed)]) == expected
    assert expected.id(decomposed) == expected.id(composed) == 2
    assert expected.id(f"{decomposed}/hot") == 0
    with pytest.raises(TaxonomyError, match="occurs twice among the roots"):
        Taxonomy([composed, decomposed])
    # a checkpoint whose configuration was written before names were composed
    config = HierarchicalConfig(taxonomy=[decomposed, "tea"], id2label={0: decomposed, 1: "tea"})
    assert config.id2label == {0: composed, 1: "tea"}


def test_a_misspelt_parent_is_warned_of_with_the_nearest_name(warned):
    rows = [("", "heart disease"), ("heart disease", "angina"), ("heart diseasse", "arrhythmia"), ("lung", "asthma")]
    tree = from_rows(rows)
    assert len(tree.children(-1)) == 3
    (warning,) = [record.getMessage() for record in warned.records]
    assert "'heart diseasse'" in warning
    assert "'heart disease'" in warning
    assert "'lung'" not in warning


def test_parents_that_are_no_misspelling_are_not_warned_of(warned):
    rows = [("", "general pathological conditions"), ("specific disease", "neoplasms"), ("specific disease", "disease")]
    from_rows(rows)
    from_rows([("diabetes", "diabetes 1"), ("diabetes", "diabetes 2"), ("nervous system", "pain")])
    from_rows([("", "lung"), ("", "lungs"), ("lung", "a"), ("lungs", "b")])  # both are listed
    assert not warned.records


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [("a", "b"), ("b", "c"), ("c", "a"), ("", "d")],
            "cycle: .*'a' > 'b' > 'c'|cycle: .*'b' > 'c' > 'a'|cycle: .*'c' > 'a' > 'b'",
        ),
        ([("a", "a")], "cycle: 'a' > 'a'"),
        ([("a", "c"), ("b", "c")], "'c' has two parents: 'a' and 'b'"),
        ([("a", "b"), ("", "b")], "'b' has two parents: 'a' and no parent"),
        ([("a", "b"), ("a", " ")], "line 3 .*empty name"),
        ([("a", "b")], "at least two leaves"),
    ],
)
def test_rows_that_are_no_taxonomy_are_refused_by_name(rows, message):
    with pytest.raises(TaxonomyError, match=message):
        from_rows(rows)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (["a", "a"], "'a' occurs twice among the roots"),
        ({"a": ["b", "b"]}, "'b' occurs twice under 'a'"),
        (["a", ""], "empty name at the top level"),
        (["a", 3], "the top level holds 3"),
        (["a", "b\n"], "white space"),
        ({"a": "b", "c": None}, "children of 'a'"),
        (["a/b", {"a": ["b", "c"]}], "'a/b' is both the name of a node and the path to another"),
    ],
)
def test_nested_forms_that_are_no_taxonomy_are_refused_by_name(tree, message):
    with pytest.raises(TaxonomyError, match=message):
        Taxonomy(tree)


def chain(levels):
    tree = ["left", "right"]
    for i in range(levels - 1):
        tree = [{f"n{i}": tree}]
    return tree


def test_sixteen_levels_are_supported_and_seventeen_are_refused():
    assert Taxonomy(chain(16)).depth == 16
    with pytest.raises(TaxonomyError, match="level 17"):
        Taxonomy(chain(17))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.yaml", "a: [", "t.yaml: "),
        ("t.yaml", "a:\nb:\na:\n", "'a' occurs twice"),
        ("t.json", '{"a": null, "b": null, "a": null}', "'a' occurs twice"),
        ("t.json", "{", "t.json: "),
        ("t.csv", "x,y\n1,2\n", "expected columns 'parent' and 'child'"),
        ("t.csv", 'parent,child,description\n,a,"of a\n,b,of b\n', "t.csv, line 2: a quotation mark is not closed"),
        ("t.txt", "a", "'.txt'"),
        ("t.yaml", "just a name", "a taxonomy is a list or a mapping"),
    ],
)
def test_broken_files_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_taxonomy(tmp_path / name)


def test_the_configuration_round_trips_through_json_with_the_order_of_its_classes(tmp_path):
    tree = Taxonomy({"z": ["b", "a"], "y": {"m": ["k", "j"], "c": None}})
    config = HierarchicalConfig(
        text_config={"model_type": "distilbert", "dim": 24, "n_heads": 2},
        taxonomy=tree,
        encoder_name_or_path="someone/encoder",
        encoder_revision="0" * 40,
        pooling="cls",
        head_dropout=0.25,
    )
    config.save_pretrained(tmp_path)
    loaded = HierarchicalConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.tree == tree
    assert loaded.id2label == {0: "b", 1: "a", 2: "k", 3: "j", 4: "c"}
    assert loaded.label2id == {"b": 0, "a": 1, "k": 2, "j": 3, "c": 4}
    assert loaded.text_config.dim == 24
    assert loaded.get_text_config() is loaded.text_config


def test_labels_that_are_not_the_leaves_are_refused():
    with pytest.raises(TaxonomyError, match="id2label"):
        HierarchicalConfig(id2label={0: "x", 1: "y"})
    with pytest.raises(TaxonomyError, match="num_labels"):
        HierarchicalConfig(num_labels=3)


def test_the_taxonomy_is_drawn_as_a_tree():
    assert Taxonomy({"a": ["b", {"c": ["d"]}], "e": None}).draw() == "a\n├── b\n└── c\n    └── d\ne"


def test_paths_leaves_and_decisions_are_those_worked_by_hand():
    # leaves: c 0, d 1, e 2, g 3, h 4; inner: a 5, b 6, f 7; the roots are a, f and h
    tree = Taxonomy({"a": {"b": ["c", "d"], "e": None}, "f": ["g"], "h": None})
    assert tree.padded_paths == [
        *([5, 6, 0], [5, 6, 1], [5, 2, 8], [7, 3, 8], [4, 8, 8]),
        *([5, 8, 8], [5, 6, 8], [7, 8, 8]),
    ]
    assert tree.leaves_at_or_below == [[0], [1], [2], [3], [4], [0, 1, 2], [0, 1], [3]]
    assert tree.decisions == [[4, 5, 7], [2, 6], [0, 1], [3]]
    assert tree.decision_of == [2, 2, 1, 3, 0, 0, 1, 0]
