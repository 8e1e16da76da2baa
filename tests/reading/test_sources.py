"""Test files, patterns, .gz, and standard input."""

import glob
import os

import datasets
import pytest

from hierarchical_clinicalbert.prediction.input import read_records
from hierarchical_clinicalbert.reading.rows import InputError
from hierarchical_clinicalbert.reading.sources import (
    Source,
    find_all_sources,
    find_sources,
    kind_of,
    open_rows,
)

CSV = b"text,id\na,1\n\nb,2\n"


def test_a_pattern_means_its_files_in_sorted_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [
        "part-10.csv",
        "part-2.csv",
        "part-4.csv",
        "part-1.JSONL.GZ",
        "[odd].tsv",
        "deep/x/5.csv",
        "deep/.6.csv",
    ]
    (tmp_path / "deep" / "x").mkdir(parents=True)
    (tmp_path / "part-3.csv").mkdir()
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert find_sources("part-*.csv") == [Source(name, "csv") for name in names[:3]]
    assert find_sources("part-1.*") == [Source("part-1.JSONL.GZ", "jsonl")]
    # a name before it is a pattern
    assert find_sources("[odd].tsv") == [Source("[odd].tsv", "tsv")]
    assert find_sources("part-2.csv", "txt") == [Source("part-2.csv", "txt")]
    assert find_sources("deep/**/*.csv") == [Source("deep/x/5.csv", "csv")]
    assert find_sources("-", "jsonl")[0].name == "standard input"
    kinds = {
        "a.csv": "csv",
        "B.TSV": "tsv",
        "c.x.json": "json",
        "d.ndjson.gz": "ndjson",
        "f.txt": "txt",
    }
    assert {name: kind_of(name) for name in kinds} == kinds


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("none*.csv", "none*.csv: there is no such file"),
        ("folder", "folder: it contains no file of a known format"),
        ("lost*.csv", "lost.csv: this link points to no file"),
        ("-", "- has no file name: give --input_format, one of csv, tsv"),
        ("a.docx", "unknown format: the name must end in one of .csv"),
        ("a.parquet.gz", ".parquet is read from its end, so unpack the file first"),
        (
            "s3://key:secret@bucket/a.csv",
            "s3://...: give credentials in the environment, not in the URL",
        ),
        ("https://host/a.csv?secret", "https://...: give a store, or download the file"),
        ("none://bucket/a.csv", "none://bucket/a.csv: "),
    ],
)
def test_a_pattern_that_cannot_be_read_is_refused_in_one_line(
    tmp_path, monkeypatch, pattern, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "lost.csv").symlink_to(tmp_path / "none.csv")
    for name in ("a.docx", "a.parquet.gz"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError) as refused:
        find_sources(pattern)
    assert message in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_file_that_is_named_twice_is_read_once(tmp_path):
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_bytes(CSV)
    found = find_all_sources([f"{tmp_path}/b.csv", str(tmp_path), f"{tmp_path}/*.csv"])
    assert [os.path.basename(source.path) for source in found] == ["b.csv", "a.csv"]


def test_a_folder_means_its_files_of_known_kinds(tmp_path):
    (tmp_path / "nested").mkdir()
    for name in (
        "b.csv",
        "a.jsonl.gz",
        "_temporary.csv",
        ".hidden.csv",
        "_SUCCESS",
        "README",
        "nested/c.csv",
    ):
        (tmp_path / name).write_bytes(b"")
    for name in (str(tmp_path), f"{tmp_path}/"):
        assert [(os.path.basename(source.path), source.kind) for source in find_sources(name)] == [
            ("a.jsonl.gz", "jsonl"),
            ("b.csv", "csv"),
        ]
    assert [os.path.basename(source.path) for source in find_sources(str(tmp_path), "txt")] == [
        "README",
        "a.jsonl.gz",
        "b.csv",
    ]


def test_a_folder_of_txt_files_has_a_text_in_each_file(tmp_path, caplog):
    notes = tmp_path / "notes [1]"
    for name, content in {
        "b.txt": b"\xef\xbb\xbftwo\r\nlines\n",
        "flu/a.txt": b"Grippe in K\xc3\xb6ln",
        "flu/avian/c.txt": b"caf\xe9",
        "_temporary/x.txt": b"",
        "flu/.hidden.txt": b"",
        "z.txt": b" \n",
        "z.pdf": b"",
    }.items():
        (notes / name).parent.mkdir(parents=True, exist_ok=True)
        (notes / name).write_bytes(content)
    problem = "not UTF-8 text: save it as UTF-8"  # no other encoding fits all files
    for given in (str(notes), f"{notes}/"):
        (source,) = find_sources(given)
        caplog.clear()
        with open_rows(source) as rows:
            assert rows.columns == ["id", "text", "label"]
            found = [(row.line, row.values, row.problem, rows.done()) for row in rows.read()]
        assert found == [
            (1, {"id": "b.txt", "text": "two\r\nlines\n", "label": ""}, None, 0.25),
            (2, {"id": "flu/a.txt", "text": "Grippe in Köln", "label": "flu"}, None, 0.5),
            (3, {}, f"flu/avian/c.txt: {problem}", 0.75),
            (4, {}, "z.txt: the text is empty", 1),
        ]
        notice = "holds 4 texts, one a file; for one a line, give its files by a pattern"
        assert caplog.messages == [f"{source.name} {notice}"]
    records = read_records(find_sources(f"{notes}/flu", encoding="cp1252"), None, "id")
    assert [(record.id, record.text) for record in records] == [
        ("a.txt", "Grippe in KÃ¶ln"),
        ("avian/c.txt", "café"),
    ]
    # one text a line: by a pattern, with --input_format, or beside files of other kinds
    assert [source.kind for source in find_sources(f"{glob.escape(str(notes))}/flu/**/*.txt")] == [
        "txt",
        "txt",
    ]
    assert {source.kind for source in find_sources(str(notes), "txt")} == {"txt"}
    (notes / "rows.csv").write_bytes(CSV)
    assert [source.kind for source in find_sources(str(notes))] == ["txt", "csv", "txt"]


def test_a_folder_saved_by_datasets_is_refused(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(
        tmp_path / "splits"
    )
    for name in ("one", "splits", "splits/train"):
        with pytest.raises(
            InputError, match=f"{name} was saved by `datasets`: write it as Parquet"
        ):
            find_sources(str(tmp_path / name))
