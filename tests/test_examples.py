"""Check the claims of examples/README.md: the splits of the synthetic corpus are disjoint, and a bag of words fails."""

from pathlib import Path

import pandas as pd
import pytest
from conftest import run
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from transformers import pipeline

from hierarchical_clinicalbert.data.taxonomy_files import read_taxonomy
from taxonomy_hierarchical import DEFAULT_TAXONOMY, Taxonomy

EXAMPLES = Path(__file__).parent.parent / "examples"
SPLITS = ["train", "validation", "test"]


@pytest.fixture(scope="module")
def corpus() -> dict[str, pd.DataFrame]:
    return {split: pd.read_csv(EXAMPLES / "corpus" / f"{split}.csv") for split in SPLITS}


def test_no_text_occurs_twice_within_or_across_files(corpus):
    unseen = pd.read_csv(EXAMPLES / "unseen.csv")
    assert list(unseen.columns) == ["text"]
    assert len(unseen) == 3
    texts = pd.concat([unseen["text"], *(split["text"] for split in corpus.values())])
    assert texts.is_unique


def test_every_label_is_a_node_and_every_leaf_is_in_every_split(corpus):
    taxonomy = read_taxonomy(EXAMPLES / "taxonomy.yaml")
    assert taxonomy == Taxonomy(DEFAULT_TAXONOMY)
    for split, rows in corpus.items():
        ids = rows["label"].map(taxonomy.id)  # raises on a label that is not in the taxonomy
        leaves = ids[ids < taxonomy.num_leaves]
        assert set(leaves) == set(range(taxonomy.num_leaves))
        counts = leaves.value_counts(normalize=True)
        assert 0.1 < counts.min() < counts.max() < 0.3
        # labels that stop at an inner node are for training only: there is no leaf to score them by
        assert (ids >= taxonomy.num_leaves).mean() == (pytest.approx(0.03) if split == "train" else 0)


def test_texts_with_several_labels_join_texts_of_the_same_split(corpus):
    for split, count in (("train", 480), ("validation", 120), ("test", 120)):
        rows = pd.read_json(EXAMPLES / "multi_label" / f"{split}.jsonl", lines=True)
        label_of = corpus[split].set_index("text")["label"]
        assert len(rows) == count
        for text, labels in zip(rows["text"], rows["labels"], strict=True):
            joined = [label_of[part] for part in text.split("\n")] if labels else []
            assert sorted(joined) == sorted(set(labels))
            assert len(labels) <= 3


def test_the_script_prints_a_path_for_each_predicted_label(labels_checkpoint, tmp_path):
    (tmp_path / "texts.csv").write_text("text\nColitis with epilepsy\n", encoding="utf-8-sig")  # as Excel saves it
    printed = run(labels_checkpoint, tmp_path / "texts.csv", command="examples/classify.py").stdout.split("\n")
    classify = pipeline("hierarchical-text-classification", model=labels_checkpoint, trust_remote_code=True)
    paths = [one["path"] for one in classify("Colitis with epilepsy")["labels"]]
    assert len(paths) == 2
    expected = ["→ " + " → ".join(f"{node['label']} ({node['score']:.0%})" for node in path) for path in paths]
    assert printed == ["", "  Colitis with epilepsy", *expected, ""]


def test_a_bag_of_words_does_not_solve_it(corpus):
    train, test = corpus["train"], corpus["test"]
    train = train[train["label"].isin(test["label"])]  # rows labelled with a leaf
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LinearSVC())
    model.fit(train["text"], train["label"])
    assert model.score(train["text"], train["label"]) > 0.95  # it fits the training rows
    assert model.score(test["text"], test["label"]) < 0.5
