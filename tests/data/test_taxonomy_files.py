"""Test taxonomies from YAML, JSON and tables of parents and children."""

import json

import pytest

from configuration_hierarchical import HierarchicalConfig
from hierarchical_clinicalbert.data.taxonomy_files import read_taxonomy
from hierarchical_clinicalbert.errors import InputError
from taxonomy_hierarchical import DEFAULT_TAXONOMY, Taxonomy


def test_every_file_gives_the_same_taxonomy(tmp_path):
    leaf, *diseases = ("general pathological conditions", *DEFAULT_TAXONOMY["specific disease"])
    roots = [("", leaf), ("", "specific disease")]
    rows = [*roots, *(("specific disease", disease) for disease in diseases)]
    files = {
        "tree.yaml": f"{leaf}:\nspecific disease:\n"
        + "".join(f"  - {disease}\n" for disease in diseases),
        "tree.json": json.dumps({leaf: {}, "specific disease": dict.fromkeys(diseases)}),
        "tree.CSV": "child,parent\n" + "".join(f"{child},{parent}\n" for parent, child in rows),
        "tree.tsv": "parent\tname\n" + "".join(f"{parent}\t{child}\n" for parent, child in rows),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert read_taxonomy(tmp_path / name) == Taxonomy(DEFAULT_TAXONOMY), name


def test_descriptions_of_a_table_stay_with_their_nodes_in_the_configuration_and_in_the_drawing(
    tmp_path,
):
    rows = (
        'heart,"the heart,\n and its vessels"\nheart,angina,\nangina,stable,\nheart,caf\u00e9, '
        "of coffee \n,brain,\n"
    )
    (tmp_path / "tree.csv").write_text(f"Parent,child, Description\n,{rows}")
    tree = read_taxonomy(tmp_path / "tree.csv")
    assert tree.descriptions == {"heart": "the heart, and its vessels", "caf\u00e9": "of coffee"}
    HierarchicalConfig(taxonomy=tree).save_pretrained(tmp_path)
    stored = HierarchicalConfig.from_pretrained(tmp_path).tree
    assert (stored, stored.descriptions) == (tree, tree.descriptions)
    drawn = [
        "heart – the heart, and its vessels",
        "├── angina",
        "│   └── stable",
        "└── caf\u00e9 – of coffee",
        "brain",
    ]
    assert stored.draw().splitlines() == drawn


def test_names_stay_as_they_are_written(tmp_path):
    (tmp_path / "tree.yaml").write_text("no:\n  - 1\n  - 2.50\nnull: \n1.0: null\nyes: ~\n")
    assert read_taxonomy(tmp_path / "tree.yaml").names == ["1", "2.50", "null", "1.0", "yes", "no"]
    # one name
    (tmp_path / "tree.csv").write_text(
        "parent,child\ncaf\u00e9,hot\ncafe\u0301,cold\n,cafe\u0301\n"
    )
    assert read_taxonomy(tmp_path / "tree.csv") == Taxonomy({"caf\u00e9": ["hot", "cold"]})


def test_in_a_table_without_rows_of_roots_parents_that_are_no_child_are_the_roots(tmp_path):
    (tmp_path / "tree.csv").write_text("parent,child\na,b\nb,c\nb,d\ne,f\n")
    assert read_taxonomy(tmp_path / "tree.csv") == Taxonomy({"a": {"b": ["c", "d"]}, "e": ["f"]})


def test_a_parent_is_the_node_whose_name_is_equal_in_unicode(tmp_path):
    rows = ",lung\u00a0cancer\n,flu\nlung cancer,small cell\nｌｕｎｇ\u200b cancer,other\n"
    (tmp_path / "tree.csv").write_text(f"parent,child\n{rows}")
    tree = read_taxonomy(tmp_path / "tree.csv")  # with the name as it is in its own row
    assert tree == Taxonomy({"lung\u00a0cancer": ["small cell", "other"], "flu": None})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.yaml", "a: [", "t.yaml: .*, line 1"),
        ("t.yaml", "a:\nb:\na:\n", "t.yaml: the name 'a' occurs twice in one mapping, line 1"),
        ("t.json", '{"a": null, "b": null, "a": null}', "t.json: the name 'a' occurs twice"),
        ("t.json", "{", "t.json: "),
        (
            "t.csv",
            "x,y\n1,2\n",
            r"t.csv: expected columns 'parent' and 'child' \(or 'name'\), found 'x', 'y'",
        ),
        (
            "t.csv",
            "parent,child\na,b\nb,c\nc,a\n,d\n",
            "t.csv: .* cycle: '[abc]' > '[abc]' > '[abc]' > '[abc]'",
        ),
        ("t.csv", "parent,child\na,c\nb,c\n", "t.csv: 'c' has two parents: 'a' and 'b'"),
        ("t.csv", "parent,child\na,b\n,b\n", "t.csv: 'b' has two parents: 'a' and no parent"),
        (
            "t.csv",
            "parent,child\n,lung\n,liver\nlugn,benign\nliver,cyst\nlugn,malign\n",
            "line 4, column 'parent': the parent 'lugn' has no row .*; did you mean 'lung'",
        ),
        (
            "t.csv",
            "parent,child\n,lung\n,liver\nskin,skins\n",  # its own child is not what it means
            "the parent 'skin' has no row of its own; add one, as roots have theirs$",
        ),
        (
            "t.csv",
            "parent,child\n,a\u00a0b\n,a  b\n",
            r"t.csv: 'a\\xa0b' and 'a  b' are equal in Unicode \(NFKC\): keep",
        ),
        ("t.yaml", "a: [b, c]\n\uff41: [b]\n", r"t.yaml: 'a' and '\uff41' are equal in Unicode"),
        ("t.csv", "parent,child\na,b\na, \n", "t.csv, line 3, column 'child': the name is empty"),
        ("t.csv", "parent,child\na,b\n", "t.csv: .* at least two leaves"),
        (
            "t.csv",
            'parent,child,description\n,a,"of a\n,b,of b\n',
            "t.csv, line 2: a quotation mark is not closed",
        ),
        ("t.txt", "a", "t.txt: expected .yaml, .yml, .json, .csv or .tsv, not '.txt'"),
    ],
)
def test_a_file_that_is_no_taxonomy_is_named_in_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as refused:
        read_taxonomy(tmp_path / name)
    assert "\n" not in str(refused.value)
