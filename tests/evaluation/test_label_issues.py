"""Compare the list of labels that may be wrong with labels that were exchanged, and with cleanlab called by hand."""

import json

import datasets
import numpy as np
import pandas as pd
import pytest
from cleanlab.filter import find_label_issues
from conftest import CLEAR, clear_rows, read_csv, run, write_csv
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer

from hierarchical_clinicalbert.evaluation import label_issues
from hierarchical_clinicalbert.evaluation.forms import Form
from hierarchical_clinicalbert.evaluation.label_issues import COLUMNS, assign_folds
from hierarchical_clinicalbert.evaluation.lexical import log_odds_variance
from hierarchical_clinicalbert.evaluation.many_nodes import ManyNodesForm
from hierarchical_clinicalbert.evaluation.metrics import one_hot
from hierarchical_clinicalbert.evaluation.one_path import OnePathForm
from hierarchical_clinicalbert.training.score import label_arrays, token_counts
from taxonomy_hierarchical import Taxonomy

TREE = Taxonomy(["a", {"b": ["c", "d", {"e": ["f", "g"]}]}])
VOCABULARY = 40
ONE_PATH, MANY_NODES = OnePathForm(TREE), ManyNodesForm(TREE)


def texts_of(leaves: list[list[int]], seed: int = 0, factor: float = 8) -> list[list[int]]:
    """Draw token ids of texts, in which the tokens 4i to 4i + 3 are more frequent if leaf i is among its leaves."""
    generator, ids = np.random.default_rng(seed), []
    for few in leaves:
        odds = np.ones(VOCABULARY)
        for leaf in few:
            odds[4 * leaf : 4 * leaf + 4] = factor
        ids.append(generator.choice(VOCABULARY, size=25, p=odds / odds.sum()).tolist())
    return ids


def dataset(ids: list[list[int]], labels, texts: list[int] | None = None) -> datasets.Dataset:
    """Tokenized training rows, whose numbers in the source are 100, 101, … ``labels`` are a node of each, or several."""
    numbers, nodes = np.arange(len(ids)), [[label] if np.isscalar(label) else sorted(label) for label in labels]
    columns = {"input_ids": ids, "labels": nodes, "row": 100 + numbers, "text_id": numbers if texts is None else texts}
    return datasets.Dataset.from_dict({**columns, "moved": [False] * len(ids)})


def list_label_issues(form: Form, rows: datasets.Dataset, vocab_size: int) -> pd.DataFrame:
    columns = (np.array(rows[column]) for column in ("text_id", "row", "moved"))
    return label_issues.list_label_issues(
        form, token_counts(rows, vocab_size), label_arrays(form.decisions, rows), *columns
    )


@pytest.fixture
def leaves() -> np.ndarray:
    return np.random.default_rng(1).integers(TREE.num_leaves, size=300)


def test_exchanged_labels_are_first_and_the_better_label_is_the_true_one(leaves):
    given = leaves.copy()
    wrong = [3, 50, 120, 121, 200, 299]
    given[wrong] = (given[wrong] + 2) % TREE.num_leaves
    listed = list_label_issues(ONE_PATH, dataset(texts_of([[leaf] for leaf in leaves]), given), VOCABULARY)
    first = listed.head(len(wrong))
    assert list(listed.columns) == list(COLUMNS)
    assert sorted(first["row"] - 100) == wrong
    assert [TREE.id(label) for label in first["label"]] == given[first["row"] - 100].tolist()
    assert [TREE.id(label) for label in first["better_label"]] == leaves[first["row"] - 100].tolist()
    assert listed["row"].is_unique
    assert listed["probability_of_label"].is_monotonic_increasing
    paths = [[*map(TREE.labels.__getitem__, TREE.path(TREE.id(one)))] for one in first["label"]]
    others = [[*map(TREE.labels.__getitem__, TREE.path(TREE.id(one)))] for one in first["better_label"]]
    for decision, path, other in zip(first["decision"], paths, others, strict=True):
        part = path.index(decision) + 1 if decision else 0  # the paths differ below the decision
        assert path[:part] == other[:part]
        assert path[part] != other[part]


def test_a_decision_is_cleanlab_over_scikit_learns_probabilities(leaves):
    given = leaves.copy()
    given[:40] = (given[:40] + 1) % TREE.num_leaves
    ids, texts = texts_of([[leaf] for leaf in leaves], factor=3), np.arange(len(leaves))
    listed = list_label_issues(ONE_PATH, dataset(ids, given), VOCABULARY)

    counts = np.array([np.bincount(one, minlength=VOCABULARY) for one in ids])
    probabilities, fold = np.empty((len(leaves), TREE.num_leaves)), assign_folds(given, texts)
    for held_out in range(5):
        rest = fold != held_out
        spread = log_odds_variance(csr_matrix(counts[rest] > 0), one_hot(given[rest], TREE.num_leaves))
        model = make_pipeline(
            TfidfTransformer(sublinear_tf=True, norm=None),
            FunctionTransformer(lambda weighed, spread=spread: csr_matrix(weighed).multiply(spread).tocsr()),
            Normalizer(),
            LogisticRegression(C=50, max_iter=1000, tol=1e-3),
        )
        probabilities[~rest] = model.fit(counts[rest], given[rest]).predict_proba(counts[~rest])
    below = [TREE.leaves_at_or_below[TREE.id(name)] for name in "cde"]
    rows = np.flatnonzero(np.isin(given, np.concatenate(below)))
    chosen = np.array([next(i for i, part in enumerate(below) if label in part) for label in given[rows]])
    conditional = np.stack([probabilities[rows][:, part].sum(1) for part in below], axis=1)
    conditional /= conditional.sum(1, keepdims=True)
    issues = find_label_issues(chosen, conditional, filter_by="both", n_jobs=1)

    ours = listed[listed["decision"] == "b"]
    elsewhere = listed.loc[listed["decision"] != "b", "row"]  # rows that another decision finds less probable
    assert len(ours) >= 5
    assert {*ours["row"]} == {*(100 + rows[issues])} - {*elsewhere}
    expected = probabilities[ours["row"] - 100, given[ours["row"] - 100]]
    np.testing.assert_allclose(ours["probability_of_label"], expected, atol=2e-3)


def test_identical_texts_are_in_one_fold_and_classes_are_spread_evenly():
    generator = np.random.default_rng(0)
    text_labels = np.repeat([0, 1, 2, 3], [100, 40, 5, 1])
    texts = generator.permutation(np.repeat(np.arange(146), 2))
    fold = assign_folds(text_labels[texts], texts)
    of_text = {text: set(fold[texts == text]) for text in range(146)}
    assert all(len(folds) == 1 for folds in of_text.values())
    single = np.array([folds.pop() for folds in of_text.values()])
    for label, count in enumerate([100, 40, 5, 1]):
        sizes = np.bincount(single[text_labels == label], minlength=5)
        assert sizes.sum() == count
        assert sizes.max() - sizes.min() <= 1


def test_a_duplicate_with_another_label_is_distinguished_from_an_unlikely_label(leaves):
    ids, texts, given = texts_of([[leaf] for leaf in leaves]), np.arange(len(leaves)), leaves.copy()
    texts[1], ids[1], given[1] = texts[0], ids[0], (leaves[0] + 1) % TREE.num_leaves
    texts[3], ids[3], given[3] = texts[2], ids[2], leaves[2]  # the same label: no conflict
    given[4] = (leaves[4] + 1) % TREE.num_leaves
    listed = list_label_issues(ONE_PATH, dataset(ids, given, texts), VOCABULARY).set_index("row")
    assert listed.loc[101, "why"] == "conflicting duplicate"
    assert listed.loc[104, "why"] == "unlikely label"
    assert TREE.id(listed.loc[101, "better_label"]) == leaves[0]
    assert not {100, 102, 103} & set(listed.index)


def test_a_class_of_too_few_texts_is_not_judged(leaves):
    given = np.where(leaves == TREE.id("g"), TREE.id("a"), leaves)
    given[:4] = TREE.id("g")
    listed = list_label_issues(ONE_PATH, dataset(texts_of([[leaf] for leaf in leaves]), given), VOCABULARY)
    assert not set(listed.loc[listed["decision"] == "e", "row"])
    assert "g" not in set(listed["better_label"])


def test_an_inner_node_is_judged_only_at_the_decisions_on_its_path(leaves):
    roots = np.array([TREE.path(leaf)[0] for leaf in leaves])
    given, wrong = np.where(np.arange(300) % 3 == 0, roots, leaves), [3, 6, 18, 30]
    given[wrong] = np.where(roots[wrong] == TREE.id("a"), TREE.id("b"), TREE.id("a"))
    listed = list_label_issues(ONE_PATH, dataset(texts_of([[leaf] for leaf in leaves], factor=20), given), VOCABULARY)
    found = listed.set_index("row").loc[[100 + row for row in wrong]]
    assert (found["decision"] == "").all()
    is_leaf = given[wrong] < TREE.num_leaves
    assert 0 < is_leaf.sum() < len(wrong)
    assert [TREE.id(better) for better in found["better_label"]] == np.where(
        is_leaf, leaves[wrong], roots[wrong]
    ).tolist()


def test_the_better_label_is_the_more_probable_one():
    """Draw the same tokens for all leaves below b, so that each such leaf may be less probable than the label."""
    draw = np.random.default_rng(5)
    leaves = draw.integers(5, size=600)
    given, exchanged = leaves.copy(), draw.choice(600, 60, replace=False)
    given[exchanged] = np.where(leaves[exchanged] == TREE.id("a"), TREE.id("c"), TREE.id("a"))
    alike = [[int(leaf != TREE.id("a"))] for leaf in leaves]
    issues = list_label_issues(ONE_PATH, dataset(texts_of(alike), given.tolist()), VOCABULARY)
    assert (issues["probability_of_better_label"] > issues["probability_of_label"]).all()
    assert not {"b", "e"}.isdisjoint(issues["better_label"])


def test_issues_of_multi_label_texts(leaves):
    others = np.random.default_rng(2).integers(TREE.num_leaves, size=300)
    true = [{int(leaf), int(other)} for leaf, other in zip(leaves, others, strict=True)]  # one or two
    given, exchanged, added, missing = list(true), [5, 80], [20, 21], [40, 41]
    for row in exchanged + added:
        kept = sorted(true[row])[1:] if row in exchanged else true[row]
        given[row] = {*kept, next(leaf for leaf in range(TREE.num_leaves) if leaf not in true[row])}
    for row in missing:
        given[row] = set()
    rows = dataset(texts_of(list(map(list, true)), factor=30), given)
    listed = list_label_issues(MANY_NODES, rows, VOCABULARY)
    assert {*listed["row"].head(6) - 100} == {*exchanged, *added, *missing}
    by_row = listed.set_index("row")
    assert set(by_row.loc[[100 + row for row in missing], "why"]) == {"missing label"}
    assert set(by_row.loc[[100 + row for row in added], "why"]) == {"unlikely label"}
    for row in added:
        columns = {"label": given[row], "better_label": true[row], "decision": given[row] - true[row]}
        for column, nodes in columns.items():
            assert {TREE.id(name) for name in by_row.loc[100 + row, column].split("; ")} == nodes


@pytest.mark.parametrize("form", [ONE_PATH, MANY_NODES])
def test_few_rows_give_an_empty_list(form):
    assert list_label_issues(form, dataset([[1], [2], [3]], [0, 1, 2]), VOCABULARY).empty
    assert list_label_issues(form, dataset([[1]] * 8, [0] * 8), VOCABULARY).empty


def test_rows_that_moved_from_another_file_are_not_listed(leaves):
    given = leaves.copy()
    given[[3, 50]] = given[[60, 10]]
    rows = dataset(texts_of([[leaf] for leaf in leaves]), given.tolist())
    assert {103, 150} <= {*list_label_issues(ONE_PATH, rows, VOCABULARY)["row"]}
    rows = rows.remove_columns("moved").add_column("moved", [row == 103 for row in rows["row"]])
    listed = {*list_label_issues(ONE_PATH, rows, VOCABULARY)["row"]}
    assert 103 not in listed
    assert 150 in listed


def test_the_flag_writes_the_list_before_training(tiny_encoder, tmp_path):
    rows = clear_rows(1, wrong=False)
    for number in (7, 40, 75):
        rows[number]["label"] = rows[(number + 20) % len(rows)]["label"]
    data = ["--train_file", write_csv(tmp_path / "train.csv", rows), "--validation_size", 0, "--quantization", "none"]
    words = [*data, "--model_name_or_path", tiny_encoder, "--max_steps", 1, "--logging_steps", 1]
    output = tmp_path / "results"
    done = run(*words, "--label_issues", "--lexical_head", "false", "--output_dir", output)
    listed = read_csv(output / "label_issues.csv")
    report = json.loads((output / "data_report.json").read_text())
    assert list(listed[0]) == list(COLUMNS)
    assert {row["row"] for row in listed[:3]} == {"7", "40", "75"}
    assert all(rows[int(row["row"])]["label"] == row["label"] for row in listed)
    assert report["label_issues"] == len(listed)
    log = done.stdout + done.stderr
    assert f"{len(listed)} of 90 training rows have a label that may be wrong" in log
    content = (output / "label_issues.csv").read_text()
    assert not any(word in content for names in CLEAR.values() for word in names)
