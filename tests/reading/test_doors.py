"""Check that train.py, predict.py and the Space read the same rows from a corpus of odd files."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, parquet
from labelled_files import labels_of, load

from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.prediction.input import read_records
from hierarchical_clinicalbert.reading.sources import find_sources

sys.path.insert(0, str(ROOT / "space"))

import tables

QUOTES = (
    'id,text,label\n0,zero,a\n1,"Heart" was,b\n2,two,b\n3,"He said ""no""",a\n4,"two\nlines",b\n5,"five,b\n6,six,a\n'
)
TABS = 'text\tlabel\n"Heart was\tb\ntwo\tb\nend"\ta\nfour\tb\n"two\nlines"\ta\n'
NOTES = '"text"\tlabel\n"Hb\t12\nNa 140"\ta\n"two\nlines"\tb\n"one\ttab"\tb\n'

# by the name of the file: its content, the column of texts, the texts that can be read with the lines where they begin,
# the lines of the rows that cannot, and the labels that train.py reads once those rows are gone
CORPUS: dict[str, tuple[bytes, str, list[tuple[int, str]], list[int], list[str]]] = {
    "header.csv": (b"ID, Abstract ,Condition_Label\n1,one,a\n2,two,b\n", " Abstract ", [(2, "one"), (3, "two")], [], ["a", "b"]),
    "body.tsv": (b"Body\tlabel\none\ta\ntwo\tb\n", "Body", [(2, "one"), (3, "two")], [], ["a", "b"]),
    "mark.csv": (b"\xef\xbb\xbftext,label\r\none,a\r\n\r\ntwo,b\r\n", "text", [(2, "one"), (4, "two")], [], ["a", "b"]),
    "ragged.csv": (b"text,label\n\"one\n1\",a\ntwo\nthree,b,c\nfour,b\n", "text", [(2, "one\n1"), (6, "four")], [4, 5], ["a", "b"]),
    "quotes.csv": (QUOTES.encode(), "text", [(2, "zero"), (4, "two"), (5, 'He said "no"'), (6, "two\nlines")], [3, 8], ["a", "b", "a", "b"]),
    "quotes.tsv": (TABS.encode(), "text", [(5, "four"), (6, "two\nlines")], [2], ["b", "a"]),
    "notes.tsv": (NOTES.encode(), "text", [(2, "Hb\t12\nNa 140"), (4, "two\nlines"), (6, "one\ttab")], [], ["a", "b", "b"]),
    "latin.csv": ("text,label\none,a\ncafé,a\n".encode("latin-1") + b"three,b\n", "text", [(2, "one"), (4, "three")], [3], ["a", "b"]),
    "empty.csv": (b"text,label\none,a\n  ,a\nNA,b\n", "text", [(2, "one"), (4, "NA")], [3], ["a", "b"]),
    "twice.jsonl": (
        b'{"text": "one", "label": "a"}\n{"text": "x", "text": "y", "label": "a"}\n\n{"text": "two", "label": "b"}\n',
        "text", [(1, "one"), (4, "two")], [2], ["a", "b"],
    ),
    "odd.jsonl": (
        b'{"label": 1, "text": "one"}\n[1]\n{"label": 2}\n{"text": 5, "label": 2}\n{"text": "\\ud800", "label": 2}\n'
        b'{"text": "two", "label": 2.0, "n": NaN}\n',
        "text", [(1, "one"), (6, "two")], [2, 3, 4, 5], ["1", "2"],
    ),
    "rows.json": (
        b'{"data": [{"abstract": "one", "label": "a"}, 7, {"abstract": "two", "label": "b"}]}',
        "abstract", [(1, "one"), (3, "two")], [2], ["a", "b"],
    ),
    "categories.parquet": (
        parquet({"Text": pa.array(["one", "two", None, "one"]).dictionary_encode(), "label": [2**60 + 1, 7, None, 7]}),
        "Text", [(1, "one"), (2, "two"), (4, "one")], [3], [str(2**60 + 1), "7", "7"],
    ),
}  # fmt: skip


def train(path: Path):
    return load(train_file=path, validation_size=0.0)


@pytest.mark.parametrize("name", CORPUS)
def test_all_commands_read_the_same_rows(tmp_path, name):
    content, column, texts, bad, labels = CORPUS[name]
    path = tmp_path / name
    path.write_bytes(content)

    table = tables.read_table(content, tables.kind_of(name))
    records = list(read_records(find_sources(str(path)), None, None))
    assert table.column == column
    for rows in (table.rows, records):
        assert [(row.line, row.text) for row in rows if row.problem is None] == texts
        assert [row.line for row in rows if row.problem is not None] == bad
    assert [row.problem for row in table.rows] == [record.problem for record in records]

    # train.py stops at the first bad row, with the same problem
    if bad:
        with pytest.raises(InputError) as refused:
            train(path)
        problem = next(row.problem for row in table.rows if row.problem)
        unit = "row" if name.endswith((".json", ".parquet")) else "line"
        assert str(refused.value).startswith(f"{path}, {unit} {bad[0]}")
        assert problem in str(refused.value)
        path = without_bad_rows(path, bad, content)
    data = train(path)
    assert data.report["columns"]["text"] == column
    assert data.splits["train"]["text"][:] == [text for _, text in texts]
    assert labels_of(data, "train") == labels


def without_bad_rows(path: Path, bad: list[int], content: bytes) -> Path:
    """Write a copy of a file without its bad rows, given by line, and return its path."""
    copy = path.with_name(f"good-{path.name}")
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        pq.write_table(table.take([i for i in range(len(table)) if i + 1 not in bad]), copy)
    elif path.suffix == ".json":
        rows = json.loads(content)["data"]
        copy.write_text(json.dumps([row for i, row in enumerate(rows, 1) if i not in bad]))
    else:
        last = {"quotes.tsv": {2: 4}, "quotes.csv": {8: 9}}.get(path.name, {})  # ends of long rows
        gone = {line for begin in bad for line in range(begin, last.get(begin, begin) + 1)}
        lines = content.splitlines(keepends=True)
        copy.write_bytes(b"".join(line for i, line in enumerate(lines, 1) if i not in gone))
    return copy
