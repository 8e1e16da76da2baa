import pytest

from configuration_hierarchical import HierarchicalConfig
from taxonomy_hierarchical import Taxonomy, TaxonomyError

DUPLICATES = {"lung": ["benign", "malignant"], "skin": {"benign": None, "rash": ["dry", "wet"]}, "pain": None}


def test_nodes_are_numbered_leaves_first_in_reading_order():
    tree = Taxonomy(DUPLICATES)
    assert tree.names == ["benign", "malignant", "benign", "dry", "wet", "pain", "lung", "skin", "rash"]
    assert (tree.num_leaves, tree.num_nodes, tree.depth) == (6, 9, 3)
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


def test_a_name_is_one_node_however_its_letters_are_composed():
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    expected = Taxonomy({composed: ["hot", "cold"]})
    assert Taxonomy({decomposed: ["hot", "cold"]}) == expected
    assert expected.id(decomposed) == expected.id(composed) == 2
    assert expected.id(f"{decomposed}/hot") == 0
    with pytest.raises(TaxonomyError, match="occurs twice among the roots"):
        Taxonomy([composed, decomposed])
    # a checkpoint whose configuration was written before names were composed
    config = HierarchicalConfig(taxonomy=[decomposed, "tea"], id2label={0: decomposed, 1: "tea"})
    assert config.id2label == {0: composed, 1: "tea"}


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


def test_the_taxonomy_is_drawn_and_written_as_a_tree():
    tree = Taxonomy({"a": ["b", {"c": ["d"]}], "e": None})
    assert tree.draw() == "a\n├── b\n└── c\n    └── d\ne"
    assert tree.to_nested() == [{"a": ["b", {"c": ["d"]}]}, "e"]
    assert Taxonomy(tree.to_nested()) == tree
