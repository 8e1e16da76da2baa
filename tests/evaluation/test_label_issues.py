"""Compare the list of labels that may be wrong with labels that were exchanged."""

import json

import datasets
import numpy as np
import pandas as pd
import pytest
from conftest import CLEAR, clear_rows, read_csv, run, write_csv

from hierarchical_clinicalbert.evaluation import label_issues
from hierarchical_clinicalbert.evaluation.forms import Form, ManyNodesForm, OnePathForm
from hierarchical_clinicalbert.evaluation.label_issues import COLUMNS, assign_folds
from hierarchical_clinicalbert.training.score import token_counts
from taxonomy_hierarchical import Taxonomy

TREE = Taxonomy(["a", {"b": ["c", "d", {"e": ["f", "g"]}]}])
VOCABULARY = 40
ONE_PATH, MANY_NODES = OnePathForm(TREE), ManyNodesForm(TREE)


def texts_of(leaves, seed: int = 0, factor: float = 8) -> list[list[int]]:
    """Draw token ids of texts, in which the tokens 4i to 4i + 3 are more frequent if leaf i is its leaf, or among them."""
    generator, ids = np.random.default_rng(seed), []
    for few in leaves:
        odds = np.ones(VOCABULARY)
        for leaf in np.atleast_1d(list(few) if isinstance(few, set) else few):
            odds[4 * leaf : 4 * leaf + 4] = factor
        ids.append(generator.choice(VOCABULARY, size=25, p=odds / odds.sum()).tolist())
    return ids


def listed_issues(form: Form, ids: list[list[int]], labels, texts=None) -> pd.DataFrame:
    """List the issues of rows by number. ``labels`` are a node of each row, or several."""
    numbers, nodes = np.arange(len(ids)), [[label] if np.isscalar(label) else sorted(label) for label in labels]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": nodes})
    counts, labels = token_counts(rows, VOCABULARY), form.decisions.targets(nodes).numpy()
    texts = numbers if texts is None else texts
    found = label_issues.list_label_issues(form, counts, labels, texts, 100 + numbers)
    assert found["row"].is_unique
    return found.assign(row=found["row"] - 100).set_index("row")


def ids_of(labels) -> list[int]:
    return [TREE.id(label) for label in labels]


@pytest.fixture
def leaves() -> np.ndarray:
    return np.random.default_rng(1).integers(TREE.num_leaves, size=300)


def test_exchanged_labels_are_first_and_the_better_label_is_the_true_one(leaves):
    given = leaves.copy()
    wrong = [3, 50, 120, 121, 200, 299]
    given[wrong] = (given[wrong] + 2) % TREE.num_leaves
    listed = listed_issues(ONE_PATH, texts_of(leaves), given)
    first = listed.head(len(wrong))
    assert ["row", *listed.columns] == list(COLUMNS)
    assert sorted(first.index) == wrong
    assert ids_of(first["label"]) == given[first.index].tolist()
    assert ids_of(first["better_label"]) == leaves[first.index].tolist()
    assert listed["probability_of_label"].is_monotonic_increasing
    for decision, label, better in zip(first["decision"], first["label"], first["better_label"], strict=True):
        path, other = ([TREE.labels[node] for node in TREE.path(TREE.id(one))] for one in (label, better))
        part = path.index(decision) + 1 if decision else 0  # the paths differ below the decision
        assert path[:part] == other[:part]
        assert path[part] != other[part]


def test_identical_texts_are_in_one_fold_and_classes_are_spread_evenly():
    label_of, texts = np.repeat([0, 1, 2, 3], [100, 40, 5, 1]), np.random.default_rng(0).permutation(146)
    fold = assign_folds(label_of[[*texts, *texts]], np.array([*texts, *texts]))
    assert (fold[:146] == fold[146:]).all()
    for label in range(4):
        sizes = np.bincount(fold[:146][label_of[texts] == label], minlength=5)
        assert sizes.max() - sizes.min() <= 1


def test_conflicting_duplicates_are_marked(leaves):
    ids, texts, given = texts_of(leaves), np.arange(len(leaves)), leaves.copy()
    texts[1], ids[1], given[1] = texts[0], ids[0], (leaves[0] + 1) % TREE.num_leaves
    texts[3], ids[3], given[3] = texts[2], ids[2], leaves[2]  # the same label: no conflict
    given[4] = (leaves[4] + 1) % TREE.num_leaves
    listed = listed_issues(ONE_PATH, ids, given, texts)
    assert listed.loc[[1, 4], "why"].tolist() == ["conflicting duplicate", "unlikely label"]
    assert TREE.id(listed.loc[1, "better_label"]) == leaves[0]
    assert not {0, 2, 3} & set(listed.index)


def test_inner_nodes_are_compared_at_the_decisions_on_their_path_alone(leaves):
    roots = np.array([TREE.path(leaf)[0] for leaf in leaves])
    given, wrong = np.where(np.arange(300) % 3 == 0, roots, leaves), [3, 6, 18, 30]
    given[wrong] = np.where(roots[wrong] == TREE.id("a"), TREE.id("b"), TREE.id("a"))
    found = listed_issues(ONE_PATH, texts_of(leaves, factor=20), given).loc[wrong]
    assert (found["decision"] == "").all()
    is_leaf = given[wrong] < TREE.num_leaves
    assert 0 < is_leaf.sum() < len(wrong)
    assert ids_of(found["better_label"]) == np.where(is_leaf, leaves[wrong], roots[wrong]).tolist()


def test_issues_of_multi_label_texts(leaves):
    others = np.random.default_rng(2).integers(TREE.num_leaves, size=300)
    true = [{int(leaf), int(other)} for leaf, other in zip(leaves, others, strict=True)]  # one or two
    given, exchanged, added, missing = list(true), [5, 80], [20, 21], [40, 41]
    for row in exchanged + added:
        kept = sorted(true[row])[1:] if row in exchanged else true[row]
        given[row] = {*kept, next(leaf for leaf in range(TREE.num_leaves) if leaf not in true[row])}
    for row in missing:
        given[row] = set()
    listed = listed_issues(MANY_NODES, texts_of(true, factor=30), given)
    assert {*listed.index[:6]} == {*exchanged, *added, *missing}
    assert set(listed.loc[missing, "why"]) == {"missing label"}
    assert set(listed.loc[added, "why"]) == {"unlikely label"}
    for row in added:
        columns = {"label": given[row], "better_label": true[row], "decision": given[row] - true[row]}
        for column, nodes in columns.items():
            assert {TREE.id(name) for name in listed.loc[row, column].split("; ")} == nodes


def test_classes_of_too_few_texts_are_left_out(leaves):
    for form in (ONE_PATH, MANY_NODES):
        assert listed_issues(form, [[1], [2], [3]], [0, 1, 2]).empty
        assert listed_issues(form, [[1]] * 8, [0] * 8).empty
    given = np.where(leaves == TREE.id("g"), TREE.id("a"), leaves)
    given[:8], texts, ids = TREE.id("g"), np.arange(300), texts_of(leaves)
    texts[:8], ids[:8] = np.arange(8) % 4, ids[:4] * 2  # eight rows are four texts
    listed = listed_issues(ONE_PATH, ids, given, texts)
    assert "e" not in set(listed["decision"])
    assert "g" not in set(listed["better_label"])


def test_the_flag_writes_the_list_before_training(tiny_encoder, tmp_path):
    rows = clear_rows(1, wrong=False)
    for number in (7, 40, 75):
        rows[number]["label"] = rows[(number + 20) % len(rows)]["label"]
    data = ["--train_file", write_csv(tmp_path / "train.csv", rows), "--validation_size", 0, "--quantization", "none"]
    words = [*data, "--model_name_or_path", tiny_encoder, "--max_steps", 1, "--logging_steps", 1]
    output = tmp_path / "results"
    log = run(*words, "--label_issues", "--lexical_head", "false", "--output_dir", output).stderr
    listed = read_csv(output / "label_issues.csv")
    assert list(listed[0]) == list(COLUMNS)
    assert {row["row"] for row in listed[:3]} == {"7", "40", "75"}
    assert all(rows[int(row["row"])]["label"] == row["label"] for row in listed)
    assert json.loads((output / "data_report.json").read_text())["label_issues"] == len(listed)
    assert f"{len(listed)} of 90 training rows have a label that may be wrong" in log
    content = (output / "label_issues.csv").read_text()
    assert not any(word in content for names in CLEAR.values() for word in names)
