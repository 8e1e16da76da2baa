"""Test reading files and data sets, choosing their columns, and the messages for bad ones."""

import hashlib
import logging

import datasets
import pandas as pd
import pytest
from labelled_files import SECRET, csv_file, labels_of, load, load_rows, nodes_of

from hierarchical_clinicalbert.errors import InputError

ROWS = [("NA", "a/x"), ('007, a "quoted"\ntext', "a/y"), ("Ünïcode  text", "b"), ("None", "a")]


WRITERS = {
    "csv.gz": lambda table, path: table.to_csv(path, index=False),
    "tsv": lambda table, path: table.to_csv(path, index=False, sep="\t"),
    "json": lambda table, path: table.to_json(path, orient="records"),
    "ndjson": lambda table, path: table.to_json(path, orient="records", lines=True),
    "parquet": lambda table, path: table.to_parquet(path),
    "xlsx": lambda table, path: table.to_excel(path, index=False),
}


def sha256(path):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}


def sizes_of(data):
    return {split: len(rows) for split, rows in data.splits.items()}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](pd.DataFrame(ROWS, columns=["text", "label"]), path)
    data = load(train_file=path, validation_size=0)
    assert list(data.splits) == ["train"]
    assert data.splits["train"].column_names == ["text", "nodes", "row", "text_id"]
    assert data.splits["train"]["text"][:] == [text for text, _ in ROWS]
    assert data.splits["train"]["row"][:] == [0, 1, 2, 3]
    # leaves first, in sorted order of their paths (a/x, a/y, b), then the inner node a
    assert data.taxonomy.labels == ["x", "y", "b", "a"]
    assert nodes_of(data) == [0, 1, 2, 3]
    source = {"split": "train", "name": str(path), "dataset": None, "sha256": sha256(path)}
    assert data.report["sources"] == [source]


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
        load(train_file=folder)
    (folder / "more.csv").write_text("text,label\n")
    with pytest.raises(InputError, match=r"is not a folder saved by `datasets`, nor one of .txt"):
        load(data_path=folder)


def test_an_encoding_is_that_of_the_data_files(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("Text;Label\nKöln;Städte\nUlm;a\n".encode("cp1252"))
    message = r"rows.csv, line 2: not UTF-8 text but fits cp1252: .* give --encoding cp1252"
    with pytest.raises(InputError, match=message):
        load(train_file=path)
    data = load(train_file=path, validation_size=0, encoding="cp1252")
    assert labels_of(data) == ["Städte", "a"]


# ── columns ───────────────────────────────────────────────────────────────────────────────────────


def test_columns_are_found_in_order_of_preference_and_logged(tmp_path, caplog):
    rows = [("title", "first", "x", "n"), ("title", "second", "y", "n")]
    header = ("text", "abstract", "label", "category")
    with caplog.at_level(logging.INFO):
        data = load_rows(tmp_path, rows, header)
    assert data.splits["train"]["text"][:] == ["first", "second"]
    assert data.report["columns"] == {"text": "abstract", "label": ["label"]}
    assert "text 'abstract', label 'label'" in caplog.text
    requested = load_rows(tmp_path, rows, header, text_column="text", label_column=["label"])
    assert requested.splits["train"]["text"][:] == ["title", "title"]
    with pytest.raises(InputError, match=r"no column called .*--label_column: there are 'a', 'b'"):
        load_rows(tmp_path, [("one", "x")], ("a", "b"), text_column="a")


def test_files_may_spell_the_same_column_differently(tmp_path):
    other = csv_file(tmp_path / "2.csv", [("c", "d", "x")], ("abstract", "text", "Label"))
    rows = [("a", "x"), ("b", "y")]
    data = load_rows(tmp_path, rows, ("Text", "label"), test_file=other)
    assert data.splits["test"]["text"][:] == ["d"]
    assert data.report["columns"] == {"text": "Text", "label": ["label"]}
    with pytest.raises(InputError, match=r"s\.csv, \S+2\.csv have no column in common for --text_"):
        load_rows(tmp_path, rows, ("body", "label"), test_file=other)


def test_missing_values_are_named_by_line_and_the_text_is_not_shown(tmp_path):
    rows = [(SECRET, "x"), ("one", ""), ("  ", "y"), ("two", ""), (SECRET, "y")]
    with pytest.raises(InputError, match=r"s\.csv, line 4, column 'text': the text is empty$"):
        load_rows(tmp_path, rows)
    message = r"s\.csv, line 3, column 'label': the label is missing .*; 2 rows"
    with pytest.raises(InputError, match=message) as caught:
        load_rows(tmp_path, [row for row in rows if row[0].strip()])
    assert SECRET not in str(caught.value)


# ── data sets of the `datasets` library ───────────────────────────────────────────────────────────


def dataset(texts, labels):
    classes = datasets.ClassLabel(names=["flu", "cold"])
    features = datasets.Features({"text": datasets.Value("string"), "label": classes})
    return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)


def save(folder, **splits):
    """Save splits of texts with these labels, as `datasets` does."""
    parts = {}
    for split, labels in splits.items():
        parts[split] = dataset([f"{split} {i}" for i in range(len(labels))], labels)
    datasets.DatasetDict(parts).save_to_disk(folder)
    return folder


def test_class_labels_of_a_saved_folder_are_read_as_their_names(tmp_path):
    folder = save(tmp_path / "set", train=[1, 0], valid=[0], extra=[0])
    data = load(data_path=folder)
    assert list(data.splits) == ["train", "validation"]
    assert labels_of(data, "train") == ["cold", "flu"]
    assert labels_of(data, "validation") == ["flu"]
    file = next((folder / "valid").glob("*.arrow"))
    assert data.report["sources"][1]["sha256"] == sha256(file)
    # validation rows are split off, unless there are any, and test rows if there are no splits
    data = load(data_path=save(tmp_path / "two", train=[0, 1] * 20, test=[0]))
    assert sizes_of(data) == {"train": 36, "validation": 4, "test": 1}
    dataset([f"text {i}" for i in range(100)], [0, 1] * 50).save_to_disk(tmp_path / "one")
    data = load(data_path=tmp_path / "one", validation_size=0.2)
    assert sizes_of(data) == {"train": 70, "validation": 20, "test": 10}


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": [1, -1]}, r"set \[train\], row 2, column 'label': the label is missing"),
        (
            {"train": [1], "dev": [1], "validation": [1]},
            "several splits that mean validation: train, dev, validation",
        ),
        ({"all": [1]}, "no split called train, validation or test, only all"),
    ],
)
def test_saved_folders_that_cannot_be_used_are_refused(tmp_path, splits, message):
    with pytest.raises(InputError, match=message):
        load(data_path=save(tmp_path / "set", **splits))


def test_a_data_set_by_name_has_its_cells_as_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "corpus"  # `datasets` takes a folder of files for a name, too
    folder.mkdir()
    pd.DataFrame({"text": ["a", "b"], "label": ["x", "y"]}).to_parquet(folder / "train.parquet")
    pd.DataFrame({"text": ["c"], "label": ["y"]}).to_parquet(folder / "test.parquet")
    data = load(dataset_name=folder, validation_size=0)
    assert data.splits["train"]["text"][:] == ["a", "b"]
    assert labels_of(data, "test") == ["y"]
    texts = {"one": "null", "other": "a"}
    header = "---\nconfigs:\n"
    for name, text in texts.items():  # cells are texts, as in a --train_file
        (folder / f"{name}.csv").write_text(f"text,label,more\n{text},007\nb,7\nc,NA\nd,1.0\n")
        header += f"- config_name: {name}\n  data_files: {name}.csv\n"
    (folder / "README.md").write_text(f"{header}---\n")
    for name, text in texts.items():
        data = load(dataset_name=folder, dataset_config_name=name, validation_size=0)
        assert data.splits["train"]["text"][:] == [text, "b", "c", "d"]
        assert labels_of(data, "train") == ["007", "7", "NA", "1.0"]
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot load --dataset_name nobody/nothing") as caught:
        load(dataset_name="nobody/nothing")
    assert "\n" not in str(caught.value)
