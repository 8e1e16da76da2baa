"""Test reading files and data sets, choosing their columns, and the messages for bad ones."""

import hashlib
import json
import logging

import datasets
import pandas as pd
import pytest
from labelled_files import SECRET, csv_file, labels_of, load, nodes_of

from hierarchical_clinicalbert.errors import InputError

ROWS = [("NA", "a/x"), ('007, a "quoted"\ntext', "a/y"), ("Ünïcode  text", "b"), ("None", "a")]


def write_as(kind, path):
    frame = pd.DataFrame(ROWS, columns=["text", "label"])
    records = frame.to_dict("records")
    if kind in ("csv.gz", "tsv"):
        frame.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    elif kind == "parquet":
        frame.to_parquet(path)
    elif kind == "xlsx":
        frame.to_excel(path, index=False)
    elif kind == "json":
        path.write_text(json.dumps(records))
    else:
        path.write_text("\n".join(map(json.dumps, records)) + "\n\n")


@pytest.mark.parametrize("kind", ["csv.gz", "tsv", "json", "ndjson", "parquet", "xlsx"])
def test_every_format_gives_the_same_rows(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    write_as(kind, path)
    data = load(train_file=path, validation_size=0)
    assert list(data.splits) == ["train"]
    assert data.splits["train"].column_names == ["text", "nodes", "row", "text_id"]
    assert data.splits["train"]["text"][:] == [text for text, _ in ROWS]
    assert data.splits["train"]["row"][:] == [0, 1, 2, 3]
    # leaves first, in sorted order of their paths (a/x, a/y, b), then the inner node a
    assert data.taxonomy.labels == ["x", "y", "b", "a"]
    assert nodes_of(data) == [0, 1, 2, 3]
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    assert data.report["sources"] == [
        {"split": "train", "name": str(path), "dataset": None, "sha256": hashes}
    ]


def test_a_folder_of_texts_has_the_labels_of_its_subfolders(tmp_path):
    folder = tmp_path / "notes"
    for number, (text, label) in enumerate(ROWS):
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{number}.txt").write_bytes(text.encode())
    data = load(train_file=folder, validation_size=0)
    texts = dict(zip(data.splits["train"]["text"], nodes_of(data), strict=True))
    assert [texts[text] for text, _ in ROWS] == [0, 1, 2, 3]
    hashes = data.report["sources"][0]["sha256"]
    (folder / "b" / "2.txt").write_text("another text")
    changed = load(data_path=folder, validation_size=0, test_size=0).report["sources"][0]["sha256"]
    assert hashes.keys() == changed.keys() == {"notes"}
    assert hashes != changed
    (folder / "empty.txt").write_text("")
    with pytest.raises(InputError, match=r"notes, file 5: empty.txt: the text is empty"):
        load(train_file=folder, validation_size=0)
    (folder / "more.csv").write_text("text,label\n")
    with pytest.raises(
        InputError, match=r"is not a folder saved by `datasets`, nor one of .txt files alone"
    ):
        load(data_path=folder)


def test_an_encoding_is_that_of_the_data_files(tmp_path):
    (tmp_path / "rows.csv").write_bytes("Text;Label\nKöln;Städte\nUlm;a\n".encode("cp1252"))
    with pytest.raises(
        InputError,
        match=r"rows.csv, line 2: not UTF-8 text but fits cp1252: .* give --encoding cp1252",
    ):
        load(train_file=tmp_path / "rows.csv", validation_size=0)
    data = load(train_file=tmp_path / "rows.csv", validation_size=0, encoding="cp1252")
    assert sorted(data.taxonomy.labels) == ["Städte", "a"]


# ── columns ───────────────────────────────────────────────────────────────────────────────────────


def test_columns_are_found_in_order_of_preference_and_logged(tmp_path, caplog):
    rows = [("title", "first", "x", "n"), ("title", "second", "y", "n")]
    path = csv_file(tmp_path / "a.csv", rows, ("text", "abstract", "label", "category"))
    with caplog.at_level(logging.INFO):
        data = load(train_file=path, validation_size=0)
    assert data.splits["train"]["text"][:] == ["first", "second"]
    assert data.report["columns"] == {"text": "abstract", "label": ["label"]}
    assert "text 'abstract', label 'label'" in caplog.text
    requested = load(train_file=path, validation_size=0, text_column="text", label_column=["label"])
    assert requested.splits["train"]["text"][:] == ["title", "title"]


def test_a_label_column_that_is_not_there_is_refused(tmp_path):
    path = csv_file(tmp_path / "a.csv", [("one", "x"), ("two", "y")], ("notes", "diagnosis"))
    with pytest.raises(
        InputError, match=r"no column called .*--label_column: there are 'notes', 'diagnosis'"
    ):
        load(train_file=path, text_column="notes")


def test_files_may_spell_the_same_column_differently(tmp_path):
    one = csv_file(tmp_path / "1.csv", [("a", "x"), ("b", "y")], ("Text", "label"))
    other = csv_file(tmp_path / "2.csv", [("c", "d", "x")], ("abstract", "text", "Label"))
    data = load(train_file=one, test_file=other, validation_size=0)
    assert data.splits["test"]["text"][:] == ["d"]
    assert data.report["columns"] == {"text": "Text", "label": ["label"]}
    another = csv_file(tmp_path / "3.csv", [("c", "x")], ("body", "label"))
    with pytest.raises(
        InputError, match=r"1\.csv, \S+3\.csv have no column in common for --text_column: rename"
    ):
        load(train_file=one, test_file=another)


def test_missing_values_are_named_by_line_and_the_text_is_not_shown(tmp_path):
    rows = [(SECRET, "x"), ("one", ""), ("  ", "y"), ("two", ""), (SECRET, "y")]
    path = csv_file(tmp_path / "a.csv", rows)
    with pytest.raises(InputError, match=r"a\.csv, line 4, column 'text': the text is empty$"):
        load(train_file=path)
    path = csv_file(tmp_path / "a.csv", [row for row in rows if row[0].strip()])
    with pytest.raises(
        InputError, match=r"a\.csv, line 3, column 'label': the label is missing .*; 2 rows"
    ) as caught:
        load(train_file=path)
    assert SECRET not in str(caught.value)


# ── data sets of the `datasets` library ───────────────────────────────────────────────────────────

CLASSES = datasets.ClassLabel(names=["flu", "cold"])


def dataset(texts, labels):
    features = datasets.Features({"text": datasets.Value("string"), "label": CLASSES})
    return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)


def test_class_labels_of_a_saved_folder_are_read_as_their_names(tmp_path):
    splits = {
        "train": dataset(["a", "b"], [1, 0]),
        "valid": dataset(["c"], [0]),
        "extra": dataset(["d"], [0]),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    data = load(data_path=tmp_path / "set")
    assert list(data.splits) == ["train", "validation"]
    assert labels_of(data, "train") == ["cold", "flu"]
    assert labels_of(data, "validation") == ["flu"]
    file = next((tmp_path / "set" / "valid").glob("*.arrow"))
    assert data.report["sources"][1]["sha256"] == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
    }
    # validation rows are split off, unless there are any, and test rows if there are no splits
    texts = [f"text {i}" for i in range(100)]
    labels = [i % 2 for i in range(100)]
    datasets.DatasetDict(
        {"train": dataset(texts, labels), "test": dataset(["z"], [0])}
    ).save_to_disk(tmp_path / "two")
    sizes = {split: len(rows) for split, rows in load(data_path=tmp_path / "two").splits.items()}
    assert sizes == {"train": 90, "validation": 10, "test": 1}
    dataset(texts, labels).save_to_disk(tmp_path / "one")
    data = load(data_path=tmp_path / "one", validation_size=0.2, test_size=0.1)
    assert {split: len(rows) for split, rows in data.splits.items()} == {
        "train": 70,
        "validation": 20,
        "test": 10,
    }


def test_saved_folders_that_cannot_be_used_are_refused(tmp_path):
    datasets.DatasetDict({"train": dataset(["a", "b"], [1, -1])}).save_to_disk(
        tmp_path / "unlabelled"
    )
    with pytest.raises(
        InputError, match=r"unlabelled \[train\], row 2, column 'label': the label is missing"
    ):
        load(data_path=tmp_path / "unlabelled")
    both = {
        "train": dataset(["a"], [1]),
        "dev": dataset(["b"], [1]),
        "validation": dataset(["c"], [1]),
    }
    datasets.DatasetDict(both).save_to_disk(tmp_path / "both")
    with pytest.raises(
        InputError, match="several splits that mean validation: train, dev, validation"
    ):
        load(data_path=tmp_path / "both")
    datasets.DatasetDict({"all": dataset(["a"], [1])}).save_to_disk(tmp_path / "all")
    with pytest.raises(InputError, match="no split called train, validation or test, only all"):
        load(data_path=tmp_path / "all")


def test_a_data_set_by_name_has_its_cells_as_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "corpus"  # `datasets` takes a folder of files for a name, too
    folder.mkdir()
    pd.DataFrame({"text": ["a", "b"], "label": ["x", "y"]}).to_parquet(folder / "train.parquet")
    pd.DataFrame({"text": ["c"], "label": ["y"]}).to_parquet(folder / "test.parquet")
    data = load(dataset_name=folder, validation_size=0)
    assert data.splits["train"]["text"][:] == ["a", "b"]
    assert labels_of(data, "test") == ["y"]
    for name, text in (("one", "null"), ("other", "a")):  # cells are texts, as in a --train_file
        (folder / f"{name}.csv").write_text(f"text,label,more\n{text},007\nb,7\nc,NA\nd,1.0\n")
    configurations = [
        f"- config_name: {name}\n  data_files: {name}.csv\n" for name in ("one", "other")
    ]
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(configurations) + "---\n")
    for name, text in (("one", "null"), ("other", "a")):
        data = load(dataset_name=folder, dataset_config_name=name, validation_size=0)
        assert data.splits["train"]["text"][:] == [text, "b", "c", "d"]
        assert labels_of(data, "train") == ["007", "7", "NA", "1.0"]
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot load --dataset_name nobody/nothing") as caught:
        load(dataset_name="nobody/nothing")
    assert "\n" not in str(caught.value)
