"""Test multi-label data: reading labels, uniting rows, splitting and reporting."""

import json
import logging
from collections import Counter
from itertools import combinations

import datasets
import numpy as np
import pandas as pd
import pytest
from iterstrat.ml_stratifiers import MultilabelStratifiedShuffleSplit
from labelled_files import SECRET, csv_file, load, write
from sklearn.preprocessing import MultiLabelBinarizer

from decisions_hierarchical import ManyNodes
from hierarchical_clinicalbert.data.label_forms import _sample_by_labels
from hierarchical_clinicalbert.data.taxonomy_files import read_taxonomy
from hierarchical_clinicalbert.data.trained_texts import TrainedTexts, normalise_text, text_hash
from hierarchical_clinicalbert.errors import InputError
from taxonomy_hierarchical import Taxonomy

TREE = {"a": ["x", "y"], "b": ["z", {"c": ["u", "v"]}]}
SETS = [["x"], ["x", "z"], [], ["y", "u"], ["c", "a"], ["v"]]


@pytest.fixture
def taxonomy(tmp_path):
    return write(tmp_path / "taxonomy.json", json.dumps(TREE))


def labels_of(data, split="train"):
    """Return the set of labels of each text of a split."""
    rows = data.splits[split]
    return {text: {data.taxonomy.labels[i] for i in ids} for text, ids in zip(rows["text"], rows["nodes"], strict=True)}


def rows_of(sets):
    return [{"text": f"text {i}", "label": labels} for i, labels in enumerate(sets)]


def expected(sets):
    return {f"text {i}": set(labels) for i, labels in enumerate(sets)}


# ── Read ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def as_jsonl(folder, rows):
    return {"train_file": write(folder / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))}


def as_parquet(folder, rows):
    pd.DataFrame(rows).to_parquet(folder / "a.parquet")
    return {"train_file": folder / "a.parquet"}


def as_sequence(folder, rows):
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return {"data_path": folder / "saved", "test_size": 0.0}


def as_sequence_of_class_label(folder, rows):
    names = datasets.ClassLabel(names=["x", "y", "z", "c", "u", "v", "a"])
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.List(names)})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(folder / "saved")
    return {"data_path": folder / "saved", "test_size": 0.0}


def as_parquet_of_class_label(folder, rows):
    datasets.load_from_disk(as_sequence_of_class_label(folder, rows)["data_path"]).to_parquet(folder / "a.parquet")
    return {"train_file": folder / "a.parquet"}


def as_delimited(folder, rows):
    lines = [(row["text"], " ; ".join(row["label"])) for row in rows]
    return {"train_file": csv_file(folder / "a.csv", lines), "label_delimiter": ";"}


def as_columns(folder, rows):
    binarizer = MultiLabelBinarizer()
    marks = binarizer.fit_transform([row["label"] for row in rows])
    table = pd.DataFrame(marks, columns=binarizer.classes_).assign(text=[row["text"] for row in rows])
    table.to_csv(folder / "a.csv", index=False)
    several = {"problem_type": "multi_label_classification", "label_column": list(binarizer.classes_)}
    return {"train_file": folder / "a.csv", **several}


def as_booleans(folder, rows):
    given = as_columns(folder, rows)
    table = pd.read_csv(given["train_file"])
    table[given["label_column"]] = table[given["label_column"]].astype(bool)
    table.to_csv(given["train_file"], index=False)
    return given


FORMS = [
    *(as_jsonl, as_parquet, as_parquet_of_class_label, as_sequence, as_sequence_of_class_label),
    *(as_delimited, as_columns, as_booleans),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_of_labels_gives_the_same_sets(tmp_path, taxonomy, form):
    data = load(**form(tmp_path, rows_of(SETS)), taxonomy=taxonomy, validation_size=0.0)
    assert labels_of(data) == expected(SETS)
    assert data.problem_type == "multi_label_classification"
    assert data.splits["train"]["row"][:] == [*range(len(SETS))]
    assert all(ids == sorted(set(ids)) for ids in data.splits["train"]["nodes"])


def test_a_list_column_says_what_it_means_and_other_columns_are_as_before(tmp_path, taxonomy, caplog):
    with caplog.at_level(logging.INFO):
        load(**as_jsonl(tmp_path, rows_of(SETS)), taxonomy=taxonomy, validation_size=0.0)
    assert "the label column holds lists: any number of labels per text" in caplog.text
    single = load(train_file=csv_file(tmp_path / "b.csv", [("p", "x"), ("q", "z")]), validation_size=0.0)
    assert single.problem_type == "single_label_classification"


def test_a_missing_list_a_null_and_an_empty_cell_mean_no_labels(tmp_path, taxonomy):
    rows = [
        {"text": "p", "label": None},
        {"text": "q", "label": ["x", None, " "]},
        {"text": "r"},
        {"text": "s", "label": []},
    ]
    data = load(**as_jsonl(tmp_path, rows), taxonomy=taxonomy, validation_size=0.0)
    assert labels_of(data) == {"p": set(), "q": {"x"}, "r": set(), "s": set()}
    file = csv_file(tmp_path / "a.csv", [("p", ""), ("q", "x;;"), ("r", ";")])
    data = load(train_file=file, label_delimiter=";", taxonomy=taxonomy, validation_size=0.0)
    assert labels_of(data) == {"p": set(), "q": {"x"}, "r": set()}


def test_a_long_table_with_one_label_a_row_is_united_within_each_split(tmp_path, taxonomy):
    train = csv_file(tmp_path / "a.csv", [("P", "x"), ("q", "z"), ("p", "u"), ("p ", "x"), ("q", "")])
    test = csv_file(tmp_path / "b.csv", [("r", "y"), ("r", "b")])
    flags = {"problem_type": "multi_label_classification", "taxonomy": taxonomy, "validation_size": 0.0}
    data = load(train_file=train, test_file=test, **flags)
    assert labels_of(data) == {"P": {"x", "u"}, "q": {"z"}}
    assert labels_of(data, "test") == {"r": {"y", "b"}}
    assert data.splits["train"]["row"][:] == [0, 1]
    assert data.report["united_rows"] == {"train": 3, "test": 1}


def test_names_with_slashes_and_names_under_two_parents_are_read_by_another_separator(tmp_path):
    sets = [["g > cell cycle", "h > cell cycle"], ["Glycolysis/Warburg effect"], ["g > s/t"], ["h"], ["> g > s/t", "g"]]
    data = load(**as_jsonl(tmp_path, rows_of(sets)), label_separator=" > ", validation_size=0.0)
    assert set(data.taxonomy.labels) == {
        "g",
        "h",
        "s/t",
        "Glycolysis/Warburg effect",
        "g > cell cycle",
        "h > cell cycle",
    }
    found = labels_of(data)
    assert found["text 0"] == {"g > cell cycle", "h > cell cycle"}
    assert found["text 2"] == {"s/t"}
    assert found["text 4"] == {"s/t", "g"}


def test_a_label_of_the_taxonomy_is_read_back_as_it_is_written(tmp_path):
    """Read a label with a leading separator, which a root has if its name is not unique."""
    tree = write(tmp_path / "t.json", json.dumps({"cell cycle": ["p", "q"], "h": ["cell cycle", "r"]}))
    sets = [[" > cell cycle"], ["h > cell cycle"], ["p"]]
    data = load(**as_jsonl(tmp_path, rows_of(sets)), taxonomy=tree, label_separator=" > ", validation_size=0.0)
    assert labels_of(data) == expected(sets)


def test_a_column_that_no_text_has_is_a_class(tmp_path):
    lines = [("p", 1, 0, 0), ("q", 0, 1, 0)]
    file = csv_file(tmp_path / "a.csv", lines, header=("text", "x", "y", "never"))
    data = load(
        train_file=file,
        label_column=["x", "y", "never"],
        problem_type="multi_label_classification",
        validation_size=0.0,
    )
    assert data.taxonomy.labels == ["never", "x", "y"]
    assert data.report["classes_without_training_rows"] == ["never"]


def test_labels_in_brackets_are_names_between_delimiters(tmp_path):
    rows = [
        ("p", "{neuro};[unknown]"),
        ("q", "[unknown]"),
        ("r", "[Sepsis](sepsis, shock);{neuro}"),
        ("s", "['x', 'y']"),
    ]
    tree = write(
        tmp_path / "tree.json", json.dumps(["{neuro}", "[unknown]", "[Sepsis](sepsis, shock)", "['x', 'y']", "x"])
    )
    for taxonomy, lines in ((None, rows[:3]), (tree, rows)):
        file = csv_file(tmp_path / "a.csv", lines)
        data = load(train_file=file, label_delimiter=";", taxonomy=taxonomy, validation_size=0.0)
        assert labels_of(data) == {text: {*label.split(";")} for text, label in lines}
    commas = csv_file(tmp_path / "b.csv", [("p", "['x', 'y']"), ("q", "x,{neuro}")])  # a name that holds the delimiter
    data = load(train_file=commas, label_delimiter=",", taxonomy=tree, validation_size=0.0)
    assert labels_of(data) == {"p": {"['x', 'y']"}, "q": {"x", "{neuro}"}}


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([["x"], ["x", "nope"]], {}, r"a.jsonl, line 2, column 'label': the label 'nope' is not in the taxonomy"),
        ([["x"], ["x", 1.5]], {}, r"a.jsonl, line 2, column 'label': the label is neither text nor a whole number"),
        ([["x"], {"x": 1}], {}, r"a.jsonl, line 2, column 'label': the label is neither text nor a whole number"),
        ([["x"], [SECRET * 50]], {}, r"a.jsonl, line 2, column 'label': the label has more than 500 characters"),
        ([[], []], {}, r"column 'label': no row has a label"),
        ([[1.0, 0.0], [], [0, 1]], {"taxonomy": None}, r"the label columns 'label' hold 0 and 1 alone: give the names"),
        (["1;0", "", "0;1"], {"label_delimiter": ";", "taxonomy": None}, r"'label' hold 0 and 1 alone: give the names"),
        ([["x"]], {"problem_type": "single_label_classification"}, r"means one label per text, but the label column holds"),
        ([1, 0], {"problem_type": "multi_label_classification", "taxonomy": None}, r"the label columns 'label' hold 0 and 1 alone: give the names"),
        (['["a; b", "c"]'], {"label_delimiter": ";"}, r"line 1, column 'label': the label is a list written as text"),
        (["x", "{'x', 'y'}"], {"label_delimiter": ","}, r"line 2, column 'label': the label is a list written as text"),
        (["x", "('x', 'y')"], {"label_delimiter": ","}, r"line 2, column 'label': the label is a list written as text"),
        (["x", "[x;y]"], {"label_delimiter": ";"}, r"line 2, column 'label': the label is a list written as text"),
        (["x", " {x,y} "], {"problem_type": "multi_label_classification", "taxonomy": None}, r"line 2, .*list written as text"),
        (["x"], {"problem_type": "single_label_classification", "label_delimiter": ";"}, r"but --label_delimiter is given"),
    ],
)  # fmt: skip
def test_one_bad_row_or_label_is_one_clear_line(tmp_path, taxonomy, rows, flags, message):
    with pytest.raises(InputError, match=message) as refused:
        load(**as_jsonl(tmp_path, rows_of(rows)), **{"taxonomy": taxonomy, "validation_size": 0.0} | flags)
    assert "\n" not in str(refused.value)
    assert SECRET not in str(refused.value)


def test_lists_in_one_file_and_text_between_delimiters_in_another_are_the_same_labels(tmp_path, taxonomy):
    train = as_jsonl(tmp_path, rows_of([["x", "c"], ["y"], []]))["train_file"]
    test = csv_file(tmp_path / "b.csv", [("p", "x; c"), ("q", "y"), ("r", "")])
    data = load(train_file=train, test_file=test, taxonomy=taxonomy, validation_size=0.0, label_delimiter=";")
    assert labels_of(data) == {"text 0": {"x", "c"}, "text 1": {"y"}, "text 2": set()}
    assert labels_of(data, "test") == {"p": {"x", "c"}, "q": {"y"}, "r": set()}


def test_a_checkpoint_can_be_scored_on_texts_without_labels_alone(tmp_path):
    file = as_jsonl(tmp_path, rows_of([[], []]))["train_file"]
    data = load(test_file=file, known=Taxonomy({"a": ["b", "c"]}))
    assert data.splits["test"]["nodes"][:] == [[], []]


def test_a_cell_that_is_neither_0_nor_1_is_named(tmp_path):
    file = csv_file(tmp_path / "a.csv", [("p", 1, 0), ("q", 0, 2), ("r", "", 1)], header=("text", "x", "y"))
    flags = {"label_column": ["x", "y"], "problem_type": "multi_label_classification"}
    with pytest.raises(
        InputError, match=r"line 4, column 'x': the cell is neither 0 nor 1.*join columns of names to one"
    ):
        load(train_file=file, **flags)


def test_validation_texts_without_any_label_are_refused(tmp_path):
    files = {"train_file": csv_file(tmp_path / "a.csv", [("p", "x"), ("q", "y")])}
    files["validation_file"] = csv_file(tmp_path / "b.csv", [("r", ""), ("s", "")])
    with pytest.raises(InputError, match="no validation text has a label"):
        load(**files, label_delimiter=";")
    scored = load(**files, label_delimiter=";", known=Taxonomy(["x", "y"]), trains=False)  # calibrated before
    assert scored.splits.keys() == {"validation"}


def test_split_off_texts_without_any_label_are_refused(tmp_path):
    rows = [(f"text {i}", "x" if i else "y") if i < 2 else (f"text {i}", "") for i in range(60)]
    with pytest.raises(InputError, match=r"no validation text has a label.* or label more texts"):
        load(data_path=csv_file(tmp_path / "a.csv", rows), label_delimiter=";")


def test_a_delimiter_that_separates_the_names_of_a_path_is_refused(tmp_path):
    files = {"train_file": csv_file(tmp_path / "a.csv", [("p", "a > x"), ("q", "b > z")]), "validation_size": 0.0}
    known = Taxonomy([{"a": ["x", "y"]}, {"b": ["z"]}], " > ")  # of a checkpoint
    for separator in ({"label_separator": " > "}, {"known": known}):
        with pytest.raises(InputError, match="--label_delimiter must differ from --label_separator, which is ' > '"):
            load(**files, **separator, label_delimiter=">")
    assert labels_of(load(**files, known=known, label_delimiter="/")) == {"p": {"x"}, "q": {"z"}}


# ── Split ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def corpus(count=400, seed=0):
    """Draw texts with dependent labels of different frequencies. Some texts have no label, and every fifth text occurs twice."""
    generator = np.random.default_rng(seed)
    names, rates = np.array(["x", "y", "z", "u", "v"]), [0.4, 0.2, 0.3, 0.1, 0.05]
    rows = [{"text": f"text {i}", "label": names[generator.random(5) < rates].tolist()} for i in range(count)]
    return rows + [{"text": f"TEXT {i}", "label": ["x"]} for i in range(0, count, 5)]


def write_corpus(folder, rows):
    return write(folder / "all.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def test_split_off_splits_have_the_rates_of_all_texts_and_share_none(tmp_path, taxonomy):
    file = write_corpus(tmp_path, corpus())
    data = load(data_path=file, taxonomy=taxonomy, validation_size=0.2, test_size=0.2)
    sizes = {split: len(part) for split, part in data.splits.items()}
    assert sum(sizes.values()) == 400
    assert sizes["test"] == pytest.approx(80, abs=4)
    assert sizes["validation"] == pytest.approx(80, abs=4)
    texts = {split: {normalise_text(text) for text in part["text"]} for split, part in data.splits.items()}
    assert all(not texts[one] & texts[other] for one, other in combinations(texts, 2))
    binarizer = MultiLabelBinarizer(classes=["x", "y", "z", "u", "v"])
    counts = {split: binarizer.fit_transform(labels_of(data, split).values()).sum(0) for split in data.splits}
    total = sum(counts.values())
    for split in ("test", "validation"):
        np.testing.assert_allclose(counts[split], total * sizes[split] / 400, atol=2.5)
    assert data.report["split"]["method"] == "by class, identical texts kept together"
    again = load(data_path=file, taxonomy=taxonomy, validation_size=0.2, test_size=0.2)
    assert labels_of(again, "test") == labels_of(data, "test")
    other = load(1, data_path=file, taxonomy=taxonomy, validation_size=0.2, test_size=0.2)
    assert labels_of(other, "test") != labels_of(data, "test")


def test_splitting_is_that_of_the_package_on_closed_labels(tmp_path, taxonomy):
    rows = corpus()[:200]
    above = {"x": "a", "y": "a", "z": "b", "u": "c b", "v": "c b"}
    closed = [{*row["label"], *" ".join(above[label] for label in row["label"]).split()} for row in rows]
    data = load(train_file=write_corpus(tmp_path, rows), taxonomy=taxonomy, validation_size=0.3)
    marks = MultiLabelBinarizer(classes=data.taxonomy.labels).fit_transform(closed)
    splitter = MultilabelStratifiedShuffleSplit(n_splits=1, test_size=60, random_state=0)
    _, expected = next(splitter.split(np.zeros(200), marks))
    assert sorted(data.splits["validation"]["row"]) == sorted(expected.tolist())


def test_one_of_few_texts_is_split_off(tmp_path, taxonomy):
    for seed in (5, 21):
        has = np.random.default_rng(seed).random((12, 5)) < 0.3
        sets = [[name for name, has_it in zip("xyzuv", row, strict=True) if has_it] for row in has]
        tree = read_taxonomy(taxonomy)
        marks = ManyNodes(tree).targets([[tree.id(label) for label in labels] for labels in sets]).numpy()
        drawn = MultilabelStratifiedShuffleSplit(n_splits=1, test_size=1, random_state=0)
        assert not len(next(drawn.split(marks, marks))[1])  # the package would split off none
        file = write_corpus(tmp_path, [{"text": f"text {i}", "label": labels} for i, labels in enumerate(sets)])
        assert len(load(train_file=file, taxonomy=taxonomy, validation_size=0.1).splits["validation"]) >= 1


def test_rare_classes_give_their_share_too(tmp_path):
    """Split 20 classes of four texts, of which a tenth rounds to zero."""
    rows = [{"text": f"text {i}", "label": ["common"] if i % 2 else []} for i in range(320)]
    rows += [
        {"text": f"text {i}", "label": [f"rare {i % 20}", *(["common"] if i % 2 else [])]} for i in range(320, 400)
    ]
    for seed in range(3):
        data = load(seed, data_path=write_corpus(tmp_path, rows))
        for split in ("validation", "test"):
            found = [labels for labels in labels_of(data, split).values() if any("rare" in name for name in labels)]
            assert len(data.splits[split]) == pytest.approx(40, abs=2)
            assert len(found) == pytest.approx(8, abs=1)
        assert data.report["classes_without_training_rows"] == []


def test_a_class_of_one_text_stays_in_the_training_rows(tmp_path, taxonomy):
    rows = [{"text": f"text {i}", "label": ["x"]} for i in range(50)] + [{"text": "rare", "label": ["v", "x"]}]
    for seed in range(5):
        data = load(seed, train_file=write_corpus(tmp_path, rows), taxonomy=taxonomy, validation_size=0.2)
        assert "rare" in labels_of(data)


@pytest.mark.parametrize("left", [5, 60])
def test_texts_of_an_earlier_run_are_never_split_off(tmp_path, taxonomy, left):
    rows = corpus(100)[:100]
    known = frozenset(text_hash(normalise_text(row["text"])) for row in rows[left:])
    file = write_corpus(tmp_path, rows)
    data = load(train_file=file, taxonomy=taxonomy, validation_size=0.2, trained=TrainedTexts(earlier=known))
    split_off = set(data.splits["validation"]["row"])
    assert split_off <= set(range(left))
    assert len(split_off) == pytest.approx(min(20, left), abs=2)


def test_too_few_texts_to_split_are_refused(tmp_path, taxonomy):
    file = write_corpus(tmp_path, rows_of(SETS))
    with pytest.raises(InputError, match="cannot split off validation rows: 0 of 6 distinct training texts"):
        load(train_file=file, taxonomy=taxonomy, validation_size=0.01)


# ── Report ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_report_counts_labels_texts_and_pairs(tmp_path, taxonomy):
    rows = corpus(200)[:200]
    data = load(train_file=write_corpus(tmp_path, rows), taxonomy=taxonomy, validation_size=0.0)
    report = data.report["splits"]["train"]
    sets = [row["label"] for row in rows]
    assert report["rows"] == 200
    assert report["labels_per_text"] == pytest.approx(np.mean([len(labels) for labels in sets]))
    assert report["texts_without_labels"] == sum(not labels for labels in sets)
    pairs = Counter(frozenset(pair) for labels in sets for pair in combinations(labels, 2))
    assert {frozenset(pair["labels"]): pair["texts"] for pair in report["pairs"]} == dict(pairs)
    assert [pair["texts"] for pair in report["pairs"]] == sorted(pairs.values(), reverse=True)
    counts = {name: sum(name in labels for labels in sets) for name in "xyzuv"}
    inner = {
        "a": sum(bool({"x", "y"} & {*labels}) for labels in sets),
        "b": sum(bool({"z", "u", "v"} & {*labels}) for labels in sets),
        "c": sum(bool({"u", "v"} & {*labels}) for labels in sets),
    }
    assert {name: n for level in report["classes"].values() for name, n in level.items()} == counts | inner
    assert "accuracy_ceiling" not in report


def test_a_label_and_its_ancestor_are_one_deepest_label(taxonomy, tmp_path):
    data = load(**as_jsonl(tmp_path, rows_of([["a", "x"], ["c"]])), taxonomy=taxonomy, validation_size=0.0)
    assert data.report["splits"]["train"]["labels_per_text"] == 1


def test_a_class_of_several_labels_without_training_rows_may_be_an_inner_node(tmp_path, taxonomy):
    data = load(**as_jsonl(tmp_path, rows_of([["x"], ["y"], ["z"]])), taxonomy=taxonomy, validation_size=0.0)
    assert sorted(data.report["classes_without_training_rows"]) == ["c", "u", "v"]


def test_classes_without_texts_do_not_change_the_split():
    generator = np.random.default_rng(0)
    labels = (generator.random((1500, 40)) < np.geomspace(0.02, 0.3, 40)).astype(np.int8)  # none is rare
    wide = np.zeros((1500, 120), dtype=np.int8)
    wide[:, np.sort(generator.permutation(120)[:40])] = labels
    narrow, with_empty = (
        _sample_by_labels(each, 150, "test", 0, np.zeros(1500, dtype=bool)) for each in (labels, wide)
    )
    np.testing.assert_array_equal(narrow, with_empty)
