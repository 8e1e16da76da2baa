"""The synthetic corpus is what examples/README.md says: reproducible, disjoint, and not solved by a bag of words."""

import runpy
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from configuration_hierarchical import DEFAULT_TAXONOMY, Taxonomy

EXAMPLES = Path(__file__).parent.parent / "examples"
SPLITS = ["train", "validation", "test"]
FILES = [*(f"corpus/{split}.csv" for split in SPLITS), "unseen.csv"]


@pytest.fixture(scope="module")
def corpus() -> dict[str, pd.DataFrame]:
    return {split: pd.read_csv(EXAMPLES / "corpus" / f"{split}.csv") for split in SPLITS}


@pytest.fixture(scope="module")
def conditions() -> pd.DataFrame:
    """One row a name of a condition: its name, class, and whether training rows do without it."""
    pools = runpy.run_path(str(EXAMPLES / "make_corpus.py"))["CONDITION_POOLS"]
    return pd.DataFrame(
        [
            (name, label, held_out)
            for label, pool in pools.items()
            for held_out, entries in enumerate(pool)
            for condition in entries
            for name in condition.names
        ],
        columns=["name", "label", "held_out"],
    )


def named_in(text: str, names: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``names`` found in the text."""
    return names[[name.lower() in text.lower() for name in names["name"]]]


def test_the_script_writes_the_committed_files_byte_for_byte(tmp_path):
    subprocess.run([sys.executable, EXAMPLES / "make_corpus.py", "--output_dir", tmp_path], check=True)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.csv")} == set(FILES)
    for file in FILES:
        assert (tmp_path / file).read_bytes() == (EXAMPLES / file).read_bytes(), file


def test_no_text_occurs_twice_within_or_across_files(corpus):
    unseen = pd.read_csv(EXAMPLES / "unseen.csv")
    assert list(unseen.columns) == ["text"]
    assert len(unseen) == 3
    texts = pd.concat([unseen["text"], *(split["text"] for split in corpus.values())])
    assert texts.is_unique


def test_every_label_is_a_node_and_every_leaf_is_in_every_split(corpus):
    taxonomy = Taxonomy.from_file(EXAMPLES / "taxonomy.yaml")
    assert taxonomy == Taxonomy(DEFAULT_TAXONOMY)
    for split, rows in corpus.items():
        ids = rows["label"].map(taxonomy.id)  # raises on a label that is not in the taxonomy
        leaves = ids[ids < taxonomy.num_leaves]
        assert set(leaves) == set(range(taxonomy.num_leaves))
        counts = leaves.value_counts(normalize=True)
        assert 0.1 < counts.min() < counts.max() < 0.3
        # labels that stop at an inner node are for training only: there is no leaf to score them by
        assert (ids >= taxonomy.num_leaves).mean() == (pytest.approx(0.03) if split == "train" else 0)


def test_every_abstract_names_conditions_of_its_own_and_of_two_other_classes(corpus, conditions):
    for rows in corpus.values():
        for text, label in rows[["text", "label"]].itertuples(index=False):
            assert 50 <= len(text.split()) <= 110
            found = set(named_in(text, conditions)["label"])
            assert label in found
            assert len(found) >= 3


def test_held_out_conditions_are_absent_from_training_and_most_of_those_in_the_other_splits(corpus, conditions):
    held_out = conditions[conditions["held_out"] == 1]
    assert named_in(" ".join(corpus["train"]["text"]), held_out).empty
    for split in ("validation", "test"):
        found = pd.concat([named_in(text, conditions) for text in corpus[split]["text"]])
        assert found["held_out"].mean() > 0.6


def test_a_bag_of_words_does_not_solve_it(corpus):
    train, test = corpus["train"], corpus["test"]
    train = train[train["label"].isin(test["label"])]  # rows labelled with a leaf
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LinearSVC())
    model.fit(train["text"], train["label"])
    assert model.score(train["text"], train["label"]) > 0.95  # it does learn what it is shown
    assert model.score(test["text"], test["label"]) < 0.5
