import pytest

from configuration_hierarchical import HierarchicalConfig
from taxonomy_hierarchical import Taxonomy, TaxonomyError


def test_a_name_is_one_node_however_its_letters_are_composed():
    composed = "caf\u00e9"
    decomposed = "cafe\u0301"
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
