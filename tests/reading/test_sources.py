"""Test files, patterns, .gz, standard input and tables, and the package alone, as it is copied into the Space."""

import functools
import glob
import gzip
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT

from hierarchical_clinicalbert.data.tables import read_table
from hierarchical_clinicalbert.prediction.input import read_records
from hierarchical_clinicalbert.reading.rows import InputError
from hierarchical_clinicalbert.reading.sources import (
    Source,
    find_all_sources,
    find_sources,
    kind_of,
    open_rows,
)
from hierarchical_clinicalbert.reading.stores import matches

CSV = b"text,id\na,1\n\nb,2\n"


def test_a_pattern_means_its_files_in_sorted_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = [f"part-{i}.csv" for i in (5, 2, 10, 4, 9, 7, 6, 8)]
    for name in (*parts, "part-1.JSONL.GZ", "[odd].tsv"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "part-3.csv").mkdir()
    (tmp_path / "lost.csv").symlink_to(tmp_path / "none.csv")
    assert find_sources("part-*.csv") == [Source(name, "csv") for name in sorted(parts)]
    assert find_sources("part-1.*") == [Source("part-1.JSONL.GZ", "jsonl")]
    assert find_sources("[odd].tsv") == [Source("[odd].tsv", "tsv")]  # a name before it is a pattern
    assert find_sources("part-2.csv", "txt") == [Source("part-2.csv", "txt")]
    names = ("a.csv", "B.TSV", "c.x.json", "d.ndjson.gz", "e.parquet", "f.txt")
    assert list(map(kind_of, names)) == ["csv", "tsv", "json", "ndjson", "parquet", "txt"]
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    (tmp_path / "a.docx").write_bytes(b"")
    (tmp_path / "a.xlsx.gz").write_bytes(b"")
    assert find_sources("-", "jsonl")[0].name == "standard input"
    for pattern, kind, message in (
        ("none*.csv", None, "none*.csv: there is no such file"),
        ("part-3.csv", None, "part-3.csv: it contains no file of a known format"),
        ("s3://key:secret@bucket/a.csv", None, "s3://...: give credentials in the environment, not in the URL"),
        ("https://token@host/a.csv", None, "https://...: give credentials in the environment, not in the URL"),
        ("lost*.csv", None, "lost.csv: this link points to no file"),
        ("none://bucket/a.csv", None, "none://bucket/a.csv: "),
        ("-", None, "- has no file name: give --input_format, one of csv, tsv"),
        ("a.docx", None, "unknown format: the name must end in one of .csv"),
        ("a.parquet.gz", None, ".parquet is read from its end, so unpack the file first"),
        ("a.xlsx.gz", None, ".xlsx is read from its end, so unpack the file first"),
    ):
        with pytest.raises(InputError) as refused:
            find_sources(pattern, kind)
        assert message in str(refused.value)


def test_two_stars_mean_any_number_of_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "x" / "y").mkdir(parents=True)
    names = ["a/1.csv", "a/x/2.csv", "a/x/y/3.csv", "a/x/y/4.txt", "a/.5.csv", "a/x/.y/6.csv"]
    (tmp_path / "a" / "x" / ".y").mkdir()
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert [source.path for source in find_sources("a/**/*.csv")] == names[:3]
    several = ("a/**/*.csv", "**/*.txt", "a/x/**/3.csv", "a/**", "**/x/*", "a/**/y/**/*", "*/**/[34].*")
    for pattern in (*several, "a/*.csv", "a/.*.csv", "a/**/.y/*", "**/.*"):
        expected = [name for name in names if name in glob.glob(pattern, recursive=True)]  # and in an object store
        assert [name for name in names if matches(name.split("/"), pattern.split("/"))] == expected, pattern


class Streaming(http.server.SimpleHTTPRequestHandler):
    """Serve files: without a size if they are called ``chunk``, and with an error if they are called ``fail``."""

    def send_header(self, keyword: str, value: str) -> None:
        if not (keyword == "Content-Length" and "chunk" in self.path):
            super().send_header(keyword, value)

    def do_GET(self) -> None:
        self.send_error(503) if "fail" in self.path else super().do_GET()


def test_a_signed_url_is_read_and_shown_without_its_signature(tmp_path):
    pytest.importorskip("aiohttp")
    for name in ("a.csv", "chunk.csv", "fail.csv"):
        (tmp_path / name).write_bytes(CSV)
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(CSV))
    handler = functools.partial(Streaming, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}"
        (source,) = find_sources(f"{root}/a.csv?signature=secret")
        assert source.name == f"{root}/a.csv"
        assert read_table(source)["text"].tolist() == ["a", "b"]
        assert read_table(*find_sources(f"{root}/b.csv.gz?signature=secret"))["text"].tolist() == ["a", "b"]
        sources = find_all_sources([f"{root}/chunk.csv", f"{root}/a.csv"])
        assert [record.text for record in read_records(sources, None, None)] == ["a", "b", "a", "b"]
        for name in ("none", "fail"):
            with pytest.raises(InputError, match=f"{name}.csv: ") as refused:
                read_table(*find_sources(f"{root}/{name}.csv?signature=secret"))
            assert "secret" not in str(refused.value)
        server.shutdown()


def test_a_file_that_is_named_twice_is_read_once(tmp_path):
    (tmp_path / "a.csv").write_bytes(CSV)
    (tmp_path / "b.csv").symlink_to(tmp_path / "a.csv")
    (tmp_path / "c.csv").write_bytes(CSV)
    found = find_all_sources([f"{tmp_path}/a.csv", str(tmp_path), f"{tmp_path}/*.csv"])
    assert [os.path.basename(source.path) for source in found] == ["a.csv", "c.csv"]


def test_a_folder_means_its_files_of_known_kinds(tmp_path):
    (tmp_path / "nested").mkdir()
    for name in ("b.csv", "a.jsonl.gz", "_temporary.csv", ".hidden.csv", "_SUCCESS", "README", "nested/c.csv"):
        (tmp_path / name).write_bytes(b"")
    for name in (str(tmp_path), f"{tmp_path}/"):
        assert [(os.path.basename(source.path), source.kind) for source in find_sources(name)] == [
            ("a.jsonl.gz", "jsonl"), ("b.csv", "csv"),
        ]  # fmt: skip
    assert [os.path.basename(source.path) for source in find_sources(str(tmp_path), "txt")] == [
        "README", "a.jsonl.gz", "b.csv",
    ]  # fmt: skip


def test_a_folder_of_txt_files_has_a_text_in_each_file(tmp_path, caplog):
    notes = tmp_path / "notes [1]"
    for name, content in {
        "b.txt": b"\xef\xbb\xbftwo\r\nlines\n",
        "a.TXT": b"not matched",
        "flu/a.txt": b"Grippe in K\xc3\xb6ln",
        "flu/avian/c.txt": b"caf\xe9",
        "_temporary/x.txt": b"",
        "flu/.hidden.txt": b"",
        "z.txt": b" \n",
        "z.pdf": b"",
    }.items():
        (notes / name).parent.mkdir(parents=True, exist_ok=True)
        (notes / name).write_bytes(content)
    (notes / "a.TXT").unlink()
    problem = "not UTF-8 text: save it as UTF-8"  # no other encoding fits all files
    for given in (str(notes), f"{notes}/", f"file://{notes}"):
        (source,) = find_sources(given)
        caplog.clear()
        with open_rows(source) as rows:
            assert list(rows.columns) == ["id", "text", "label"]
            found = [(row.line, row.values, row.problem, rows.done()) for row in rows.read()]
        assert found == [
            (1, {"id": "b.txt", "text": "two\r\nlines\n"}, None, 0.25),
            (2, {"id": "flu/a.txt", "text": "Grippe in Köln", "label": "flu"}, None, 0.5),
            (3, {}, f"flu/avian/c.txt: {problem}", 0.75),
            (4, {}, "z.txt: the text is empty", 1),
        ]
        notice = "holds 4 texts, one a file; for one a line, give its files by a pattern"
        assert [record.getMessage() for record in caplog.records] == [f"{source.name} {notice}"]
    (source,) = find_sources(str(notes), encoding="cp1252")
    (notes / "z.txt").unlink()
    (notes / "b.txt").unlink()
    records = list(read_records([replace(source, files=source.files[1:3])], None, "id"))
    assert [(record.id, record.text, record.problem) for record in records] == [
        ("flu/a.txt", "Grippe in KÃ¶ln", None), ("flu/avian/c.txt", "café", None),
    ]  # fmt: skip
    # one text a line: by a pattern, with --input_format, or beside files of other kinds
    assert [source.kind for source in find_sources(f"{glob.escape(str(notes))}/flu/**/*.txt")] == ["txt", "txt"]
    (notes / "flat.txt").write_bytes(b"a\n")
    assert [source.kind for source in find_sources(str(notes), "txt")] == ["txt", "txt"]
    (notes / "rows.csv").write_bytes(CSV)
    assert [source.kind for source in find_sources(str(notes))] == ["txt", "csv"]


def test_a_folder_saved_by_datasets_is_refused(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "splits")
    for name in ("one", "splits", "splits/train"):
        with pytest.raises(InputError, match=f"{name} was saved by `datasets`: write it as Parquet"):
            find_sources(str(tmp_path / name))


def test_a_table_has_the_values_of_each_column_and_the_lines_of_the_rows(tmp_path):
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None], "id": [2**60 + 1, None]}), stream)
    for name, content, columns, lines in (
        ("a.csv", CSV, {"text": ["a", "b"], "id": ["1", "2"]}, ("line", [2, 4])),
        ("b.CSV.GZ", gzip.compress(CSV), {"text": ["a", "b"], "id": ["1", "2"]}, ("line", [2, 4])),
        ("a.jsonl", b'{"text": 7}\n{"id": "x"}\n', {"text": [7, None], "id": [None, "x"]}, ("line", [1, 2])),
        ("a.parquet", stream.getvalue(), {"text": ["a", None], "id": [2**60 + 1, None]}, ("row", [1, 2])),
    ):
        (tmp_path / name).write_bytes(content)
        (source,) = find_sources(str(tmp_path / name))
        table = read_table(source)
        assert table.to_dict("list") == columns
        assert (table.index.name, table.index.tolist()) == (f"{source.path}, {lines[0]}", lines[1])
        assert read_table(source, ["id", "text"]).to_dict("list") == columns


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,id\na,1\nb\nc\n", "a.csv, line 3: 1 fields, where the header has 2"),
        ("a.csv", b'text,id\n"a\nb",1\ncaf\xe9,2\n', "a.csv, line 4: not UTF-8"),
        ("a.json", b'[{"a": 1}, 2]', "a.json, row 2: not a JSON object"),
        ("a.csv", b"text\n", "a.csv has no rows"),
        ("a.jsonl", b"\n", "a.jsonl has no rows"),
        ("a.csv.gz", gzip.compress(os.urandom(3000))[:-500], "a.csv.gz is damaged or incomplete"),
        ("a.csv.gz", b"text\na\n", "a.csv.gz is damaged or incomplete"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as refused:
        read_table(find_sources(name)[0])
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=f"cannot read {name}: No such file or directory"):
        read_table(Source(name, "csv"))


def test_a_file_reports_progress(tmp_path):
    content = b"text\n" + b"".join(os.urandom(50).hex().encode() + b"\n" for _ in range(20_000))
    for name, written in (("a.csv", content), ("a.csv.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(written)
        with open_rows(find_sources(str(tmp_path / name))[0]) as rows:
            shares = [rows.done() for _ in rows.read()]
        assert shares == sorted(shares)
        assert shares[len(shares) // 2] == pytest.approx(0.5, abs=0.1)
        assert shares[-1] == 1


def run_alone(folder, code: str, given: bytes = b"") -> str:
    """Run code beside a copy of the package, in a process without access to the repository. Return its standard output."""
    for name in ("taxonomy_hierarchical.py", "hierarchical_clinicalbert/__init__.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    package = "hierarchical_clinicalbert/reading"
    shutil.copytree(ROOT / package, folder / package, dirs_exist_ok=True)
    (folder / "app.py").write_text(code)
    done = subprocess.run([sys.executable, "app.py"], input=given, capture_output=True, cwd=folder)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_standard_input_is_read_as_it_comes(tmp_path):
    code = "from hierarchical_clinicalbert.reading.sources import Source, open_rows\nwith open_rows(Source('-', 'csv')) as rows:\n"
    code += "    print([(row.line, row.values, rows.done()) for row in rows.read()])"
    assert (
        run_alone(tmp_path, code, CSV)
        == str([(2, {"text": "a", "id": "1"}, None), (4, {"text": "b", "id": "2"}, None)]) + "\n"
    )


def test_a_copy_beside_the_space_needs_nothing_else(tmp_path):
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), stream)
    (tmp_path / "a.parquet").write_bytes(stream.getvalue())
    (tmp_path / "a.csv").write_bytes(CSV)
    code = """
import json, sys
from hierarchical_clinicalbert.reading.columns import TEXT_COLUMNS, find_column
from hierarchical_clinicalbert.reading.sources import find_sources, open_rows
def read(name):
    with open_rows(*find_sources(name)) as rows:
        return find_column(rows.columns, None, TEXT_COLUMNS), [row.values["text"] for row in rows.read()]
column, texts = read("a.csv")
loaded = set(sys.modules)
print(json.dumps([column, texts + read("a.parquet")[1],
                  [name for name in ("pyarrow", "pandas", "numpy") if name in loaded],
                  [name for name in ("pandas", "torch", "transformers") if name in sys.modules]]))
"""
    assert json.loads(run_alone(tmp_path, code)) == ["text", ["a", "b", "a"], [], []]
