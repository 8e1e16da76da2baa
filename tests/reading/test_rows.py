"""Test reading of odd files against expected rows, and of random files against the csv and json
modules.
"""

import csv
import gzip
import io
import os
from datetime import date, datetime

import openpyxl
import pyarrow as pa
import pytest
from conftest import parquet, sheet, xlsx
from fuzzing import fuzz, refused_in_one_line
from hypothesis import given
from hypothesis import strategies as st

from hierarchical_clinicalbert.reading.delimited import MAX_FIELD
from hierarchical_clinicalbert.reading.rows import SEEKABLE, InputError, Limits, Row, RowReader


class Plain:
    """A stream that has only read(), which may return fewer bytes than requested.

    It counts them.
    """

    def __init__(self, content: bytes, most: int = 7):
        self._stream = io.BytesIO(content)
        self._most = most
        self.given = 0

    def read(self, size: int = -1) -> bytes:
        content = self._stream.read(min(size, self._most))
        self.given += len(content)
        return content


class Seekable(Plain):
    """A stream like an object store's, which can seek and may return fewer bytes than requested."""

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)


class Sparse:
    """A sheet of Excel's largest size, which has a header, one row, and a cell in its last row and
    column.
    """

    HEAD = (
        "<worksheet "
        'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><dimension '
        'ref="A1:XFD1048576"/><sheetData>'
    )
    ROWS = (
        '<row r="1"><c r="A1" t="str"><v>text</v></c></row><row r="3"><c r="A3" '
        't="str"><v>a</v></c></row>'
    )
    LAST = '<row r="1048576"><c r="XFD1048576"><v>1</v></c></row></sheetData></worksheet>'


def read(content: bytes, kind: str, **limits: int) -> list[Row]:
    return list(RowReader(io.BytesIO(content), kind, "a file", Limits(**limits)).read())


def refusal(content: bytes, kind: str, **limits: int) -> str:
    with pytest.raises(InputError) as refused:
        read(content, kind, **limits)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ── a corpus of odd files ─────────────────────────────────────────────────────────────────────────

# name: kind, content, and of each row the line where it begins with its values, or with a part of
# its problem
STRAY = "a quotation mark is stray or not doubled"
SWALLOWS = "swallows the rows below it"
CORPUS: dict[str, tuple[str, bytes, list[tuple[int, dict | str]]]] = {
    "values are not guessed": (
        "csv",
        b'text,id\nNA,007\n1.0,\n" x ",true\n',
        [
            (2, {"text": "NA", "id": "007"}),
            (3, {"text": "1.0", "id": ""}),
            (4, {"text": " x ", "id": "true"}),
        ],
    ),
    "empty lines": (
        "csv",
        b'\n \ntext\n\na\n""\n\n"\n"\n',
        [(5, {"text": "a"}), (6, {"text": ""}), (8, {"text": "\n"})],
    ),
    "blank cells in TSV": (
        "tsv",
        b"text\tid\n\t\n\n \t \n",
        [(2, {"text": "", "id": ""}), (4, {"text": " ", "id": " "})],
    ),
    "ragged rows": (
        "csv",
        b"text,id\na\nb,2\nc,3,\nd,4\n",
        [
            (2, "1 fields, where the header has 2"),
            (3, {"text": "b", "id": "2"}),
            (4, "3 fields, where the header has 2"),
            (5, {"text": "d", "id": "4"}),
        ],
    ),
    "a row that is not UTF-8": (
        "csv",
        b"text,id\na,1\ncaf\xe9,2\nc,3\n",
        [(2, {"text": "a", "id": "1"}), (3, "not UTF-8"), (4, {"text": "c", "id": "3"})],
    ),
    "quotation marks inside": (
        "csv",
        b'text,id\n5" wide,1\n"a ""b""",2\n',
        [(2, {"text": '5" wide', "id": "1"}), (3, {"text": 'a "b"', "id": "2"})],
    ),
    "a stray mark takes rows in": (
        "csv",
        b'text,id\nzero,1\n"one,2\ntwo,3\n"three,4\nfour,5\n',
        [
            (2, {"text": "zero", "id": "1"}),
            (3, f"{STRAY} (lines 3 to 5)"),
            (6, {"text": "four", "id": "5"}),
        ],
    ),
    "a mark that is not closed": (
        "csv",
        b'text,id\na,1\n"b,2\nc,3\n',
        [(2, {"text": "a", "id": "1"}), (3, "a quotation mark is not closed (lines 3 to 4)")],
    ),
    "a stray mark in TSV, text first": (
        "tsv",
        b'text\tyear\n"Stroke" was\t1\n"Heart was\t2\ntwo\t3\nend"\t4\nfour\t5\n"two\nlines"\t6\n',
        [
            (2, STRAY),
            (3, f"{SWALLOWS} (lines 3 to 5)"),
            (6, {"text": "four", "year": "5"}),
            (7, {"text": "two\nlines", "year": "6"}),
        ],
    ),
    "a quoted header in TSV": (
        "tsv",
        b'"text"\t"id"\n"Hb\t12\nNa 140"\t1\n"a\t""b\nc"\t2\n',
        [(2, {"text": "Hb\t12\nNa 140", "id": "1"}), (4, {"text": 'a\t"b\nc', "id": "2"})],
    ),
    "semicolons": (
        "csv",
        b'id;text\n1;"a; b\nc"\n2;c, d\n3;x;y\n',
        [
            (2, {"id": "1", "text": "a; b\nc"}),
            (4, {"id": "2", "text": "c, d"}),
            (5, "3 fields, where the header has 2"),
        ],
    ),
    "one column of texts with semicolons": (
        "csv",
        b"text\na;b\nc\td\n",
        [(2, {"text": "a;b"}), (3, {"text": "c\td"})],
    ),
    "a semicolon in a quoted name": ("csv", b'"a;b",text\n1,2\n', [(2, {"a;b": "1", "text": "2"})]),
    "a workbook": (
        "xlsx",
        xlsx(
            [
                ["text", "id", None, "when"],
                ["007", 7, None, date(2024, 2, 3)],
                [],
                [None, 1.5, "no name", True, "off"],
                ["two\nlines"],
                ["", None, None, ""],
                ["_x000D_\n", 1],
            ]
        ),
        [
            (2, {"text": "007", "id": 7, "": None, "when": datetime(2024, 2, 3)}),
            (4, {"text": None, "id": 1.5, "": "no name", "when": True}),
            (5, {"text": "two\nlines", "id": None, "": None, "when": None}),
            (7, {"text": "\r\n", "id": 1, "": None, "when": None}),
        ],
    ),
    "a sheet of Excel's largest size": (
        "xlsx",
        sheet(Sparse.HEAD + Sparse.ROWS + Sparse.LAST),
        [(3, {"text": "a"}), (1048576, {"text": None})],
    ),
    "a text a line": (
        "txt",
        b'\xef\xbb\xbfa,"b\n\n  \n c \r\nd',
        [(1, {"text": 'a,"b'}), (4, {"text": " c "}), (5, {"text": "d"})],
    ),
    "lines that are not objects": (
        "jsonl",
        (
            b'{"a": 1}\n[1]\n{"a": \n"x"\nnull\n{"a": "\xe9"}\n{"a": 2} {}\n{"a": 3, "a": '
            b'4}\n{"a": 3}\n'
        ),
        [
            (1, {"a": 1}),
            (2, "not a JSON object"),
            (3, "not JSON: Expecting value"),
            (4, "not a JSON object"),
            (5, "not a JSON object"),
            (6, "not UTF-8"),
            (7, "not JSON: Extra data"),
            (8, "not JSON: a name occurs twice"),
            (9, {"a": 3}),
        ],
    ),
    "half of a surrogate pair": (
        "jsonl",
        b'{"a": "\\ud800"}\n{"\\udc00": 1}\n{"a": [{"b": "\\ud83d"}]}\n{"a": "\\ud83d\\ude00"}\n',
        [
            (1, "surrogates not allowed"),
            (2, "surrogates not allowed"),
            (3, "surrogates not allowed"),
            (4, {"a": "😀"}),
        ],
    ),
    "nested too deeply": (
        "jsonl",
        b'{"a": ' + b"[" * 10**5 + b'\n{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b'}\n{"a": 1}\n',
        [
            (1, "not JSON: maximum recursion depth"),
            (2, "not JSON: maximum recursion depth"),
            (3, {"a": 1}),
        ],
    ),
    "a list of objects": (
        "json",
        b'\xef\xbb\xbf[{"a": 1},\n\n {"b": null}, 7]',
        [(1, {"a": 1}), (2, {"b": None}), (3, "not a JSON object")],
    ),
    "integers beside nulls": (
        "parquet",
        parquet({"n": pa.array([2**53 + 1, None, -1], pa.int64())}),
        [(1, {"n": 2**53 + 1}), (2, {"n": None}), (3, {"n": -1})],
    ),
    "names with dots": (
        "parquet",
        parquet({"a": [{"b": 1}], "a.b": ["x"], "a.c": ["y"]}),
        [(1, {"a": {"b": 1}, "a.b": "x", "a.c": "y"})],
    ),
}


@pytest.mark.parametrize("name", CORPUS)
def test_odd_files_give_every_row_or_its_problem(name):
    kind, content, expected = CORPUS[name]
    for stream in (io.BytesIO(content), Seekable(content) if kind in SEEKABLE else Plain(content)):
        found = list(RowReader(stream, kind, "a file").read())
        assert [row.line for row in found] == [line for line, _ in expected]
        for row, (_, content) in zip(found, expected, strict=True):
            if isinstance(content, dict):
                assert (row.values, row.problem) == (content, None)
                assert list(map(type, row.values.values())) == list(map(type, content.values()))
            else:
                assert row.values == {}
                assert content in (row.problem or "")


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        (
            "csv",
            "text,id\na,1\n".encode("utf-16"),
            "a file is not UTF-8 text but fits utf-16: save it as UTF-8",
        ),
        (
            "csv",
            b'id,"a\ncaf\xe9"\n1,2\n',
            "names the columns, cannot be read: not UTF-8 text but fits cp1252",
        ),
        ("csv", b"\0\0\0\0", "a file is not UTF-8 text: save it as UTF-8"),
        # a wrong suffix
        ("csv", xlsx([["text"]]), "cannot be read: not UTF-8 text: save it as UTF-8"),
        ("xlsx", b"text,id\n", "a file is not an .xlsx workbook without a password, or is damaged"),
        (
            "xlsx",
            xlsx([["text"]])[:-100],
            "a file is not an .xlsx workbook without a password, or is damaged",
        ),
        (
            "csv",
            b'"text,id\na,1\n',
            "cannot be read: a quotation mark is not closed (lines 1 to 2)",
        ),
        (
            "csv",
            b"text,id,text\na,1,b\n",
            "a file has two columns called 'text': rename or remove one",
        ),
        ("json", b'[{"a": "\xfc"}]', "a file is not UTF-8 text"),
        ("json", b'[{"a": 1},\n', "a file: not JSON: Expecting value: line 2 column 1"),
        (
            "json",
            b'{"a": 1}\n{"a": 2}\n',
            (
                "a file: not JSON: Extra data: line 2 column 1 (char 9); name it .jsonl if it "
                "has an object a line"
            ),
        ),
        ("json", b'{"rows": []}', "must hold a list of objects"),
        ("json", b'["x"]', "a file, row 1: not a JSON object"),
        ("jsonl", b"[]\n7\n", "a file, line 1: not a JSON object"),
        ("parquet", b"PAR1 not really PAR1", "a file is not a Parquet file, or is damaged"),
        (
            "parquet",
            parquet(pa.table([["a"], ["b"]], names=["x", "x"])),
            "a file has two columns called 'x'",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_named_in_one_line(kind, content, message):
    assert message in refusal(content, kind)


def test_a_file_without_rows_has_columns_or_none():
    for kind, content, columns in (
        ("csv", b"a,b\n", ["a", "b"]),
        ("jsonl", b"\n\n", []),
        ("json", b"[]", []),
        ("txt", b"", ["text"]),
        ("xlsx", xlsx([[]]), []),
        ("xlsx", xlsx([["a", "b"]]), ["a", "b"]),
        ("parquet", parquet({"a": pa.array([], pa.string())}), ["a"]),
    ):
        rows = RowReader(io.BytesIO(content), kind, "a file")
        assert list(rows.columns) == columns
        assert list(rows.read()) == []


@pytest.mark.parametrize(("begin", "end", "least"), [(0, -500, 1000), (7, None, 0)])
def test_a_damaged_gz_stream_gives_its_rows_and_then_an_error(begin, end, least):
    lines = b"".join(b'{"text": "%s"}\n' % os.urandom(40).hex().encode() for _ in range(3000))
    stream = gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(lines)[begin:end]))
    found = []
    with pytest.raises(
        InputError, match="a file is not UTF-8 text, or is damaged: copy or write it again"
    ):
        found.extend(RowReader(stream, "jsonl", "a file").read())  # keeps what came before
    assert len(found) >= least


# ── columns of JSON Lines ─────────────────────────────────────────────────────────────────────────


def test_columns_of_json_lines_are_those_of_its_first_1024_rows():
    lines = b'{"id": 1}\n{"text": "x", "id": 2}\n' + b'{"id": 3}\n' * 1022 + b'{"late": 4}\n'
    rows = RowReader(io.BytesIO(lines), "jsonl", "a file")
    assert rows.columns == ["id", "text"]
    found = list(rows.read())
    assert (found[0], found[-1]) == (Row(1, {"id": 1}), Row(1025, {"late": 4}))


# ── limits ────────────────────────────────────────────────────────────────────────────────────────


def test_a_quotation_mark_that_is_not_closed_swallows_a_limited_number_of_rows():
    line = b"x" * 1023 + b"\n"
    first, second, *others = read(b'text\na\n"' + line * (MAX_FIELD // 1024 + 9), "csv")
    assert first == Row(2, {"text": "a"})
    assert (second.line, second.values) == (3, {})
    assert "field larger than field limit" in (second.problem or "")
    assert 0 < len(others) <= 9
    assert all(row.values == {"text": "x" * 1023} for row in others)


ROWS = [["a", "b"], *[[i, "x"] for i in range(10)]]


@pytest.mark.parametrize(
    ("kind", "content", "limits"),
    [
        ("csv", b"text,id\n" + b"a,1\n" * 10, {"rows": 10, "columns": 2, "bytes": 48}),
        ("jsonl", b'{"a": 1, "b": 2}\n' * 10, {"rows": 10, "columns": 2}),
        ("json", b'[{"a": 1, "b": 2}]', {"columns": 2}),
        ("parquet", parquet({"a": list(range(10)), "b": ["x"] * 10}), {"rows": 10, "columns": 2}),
        ("xlsx", xlsx(ROWS), {"rows": 10, "columns": 2, "cells": 22}),
    ],
)
def test_more_than_a_limit_is_refused(kind, content, limits):
    assert read(content, kind, **limits)
    for limit, most in limits.items():
        assert f"has more than {most - 1:,} {limit}" in refusal(
            content, kind, **limits | {limit: most - 1}
        )


def test_a_file_that_unpacks_to_more_than_a_limit_is_refused():
    assert "has more than 999 unpacked bytes" in refusal(xlsx(ROWS), "xlsx", unpacked_bytes=999)
    beyond = (
        Sparse.HEAD
        + Sparse.ROWS
        + '<row r="9999999999"><c><v>1</v></c></row></sheetData></worksheet>'
    )
    assert "is not an .xlsx workbook" in refusal(sheet(beyond), "xlsx")
    packed = gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(b"text\n" + b"a\n" * 10**6)))
    with pytest.raises(InputError, match="has more than 10,000 bytes"):
        list(RowReader(packed, "csv", "a file", Limits(bytes=10_000)).read())


# ── Parquet ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "content"), [("parquet", parquet({"a": [1]})), ("xlsx", xlsx([["a"], [1]]))]
)
def test_a_file_that_is_read_from_its_end_needs_a_stream_that_can_seek(kind, content):
    with pytest.raises(InputError, match="is read from its end, so save the file to a disk first"):
        RowReader(Plain(content), kind, "a file")


def test_a_large_row_group_is_not_read_at_once():
    # 40 MB that do not compress, in one group
    texts = [os.urandom(5000).hex() for _ in range(4000)]
    stream = Seekable(
        parquet({"text": texts}, compression="none", use_dictionary=False), most=2**30
    )
    rows = RowReader(stream, "parquet", "a file").read()
    assert next(rows).values == {"text": texts[0]}
    assert stream.given < 20e6
    assert [row.values["text"] for row in rows] == texts[1:]


# ── what was written is what is read ──────────────────────────────────────────────────────────────

TEXT = st.text(
    st.one_of(
        st.sampled_from("ab ,;\"'\t\n\r\\\0\ufeff\u2028"), st.characters(exclude_categories=["Cs"])
    ),
    max_size=12,
)


def count_lines(text: str) -> int:
    return len(text.encode().splitlines())  # of bytes: \n, \r\n and \r alone end a line


@fuzz
@given(
    st.lists(st.lists(TEXT, min_size=3, max_size=3), max_size=6),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.integers(1, 99),
    st.sampled_from(
        ["utf-8", "utf-8", "UTF-8-SIG", "utf-16", "utf-16-le", "utf-32", "cp1252", "latin-1"]
    ),
)
def test_any_texts_come_back_from_csv_in_any_encoding_with_the_lines_they_begin_on(
    rows, end, chunk, encoding
):
    stream = io.StringIO(newline="")
    expected = []
    writer = csv.writer(stream, lineterminator=end, quoting=csv.QUOTE_ALL, delimiter=";")
    writer.writerow(["a", "b", "text"])
    for row in rows:
        row = [text.encode(encoding, "ignore").decode(encoding) for text in row]
        expected.append(
            Row(count_lines(stream.getvalue()) + 1, dict(zip(["a", "b", "text"], row, strict=True)))
        )
        writer.writerow(row)
    content = Plain(stream.getvalue().encode(encoding), chunk)
    assert list(RowReader(content, "csv", "a file", encoding=encoding).read()) == expected


# ── separators, sheets and encodings ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "content", "notice"),
    [
        ("csv", b"id;text\n1;a\n", "a file is separated by ';'"),
        ("tsv", b"id|text\n1|a\n", "a file is separated by '|'"),
        ("csv", b"id\ttext\n1\ta\n", "a file is separated by '\\t'"),
        ("csv", b"a;b,text\n1;,a\n", None),  # the usual separator makes as many columns
        (
            "xlsx",
            xlsx([["text"], ["a"]], [["text"], ["b"]]),
            "a file has 2 sheets: only the first is read, 'Sheet'",
        ),
    ],
)
def test_what_was_found_in_a_file_is_logged_once_it_is_read(caplog, kind, content, notice):
    rows = RowReader(io.BytesIO(content), kind, "a file")
    assert not caplog.records
    assert [row.values["text"] for row in rows.read()] == ["a"]
    assert caplog.messages == ([notice] if notice else [])


def test_hidden_sheets_are_not_read():
    workbook = openpyxl.Workbook()
    stream = io.BytesIO()
    workbook.active.sheet_state = "hidden"
    workbook.active.append(["hidden"])
    shown = workbook.create_sheet("Notes")
    shown.append(["text"])
    shown.append(["a"])
    workbook.save(stream)
    assert read(stream.getvalue(), "xlsx") == [Row(2, {"text": "a"})]


def encoded(content: bytes, encoding: str | None, kind: str = "csv") -> list[Row]:
    return list(RowReader(io.BytesIO(content), kind, "a file", encoding=encoding).read())


def test_an_encoding_that_fits_is_offered_with_its_flag_and_never_guessed():
    utf8 = "not UTF-8 text: save it as UTF-8"
    offer = "not UTF-8 text but fits cp1252: save it as UTF-8, or give --encoding cp1252"
    for lines, problems in (
        ("text\ncafé\na\n“é”\n".encode("cp1252"), [offer, None, offer]),
        ("text\nü\n".encode() + b"caf\xe9\n", [None, utf8]),  # a damaged row of UTF-8
        (b"text\n\xc3\xbc caf\xe9\n", [utf8]),
        (b"text\ncaf\xe9 \x8d\n", [utf8]),  # no character of cp1252
        (b"text\ncaf\xe9 \x01\n", [utf8]),  # binary
    ):
        assert [row.problem for row in encoded(lines, "utf-8")] == problems
    with pytest.raises(
        InputError,
        match=r"a file is not UTF-8 text but fits utf-16: .*, or give --encoding utf-16$",
    ):
        encoded("text\na\n".encode("utf-16"), "utf-8")
    # where there is no flag
    with pytest.raises(InputError, match=r"fits cp1252: save it as UTF-8$"):
        encoded(b"caf\xe9\n", None)
    for name in ("nix", "rot13", "a\0b"):
        with pytest.raises(InputError, match="Python has no such encoding of text"):
            encoded(b"text\n", name)
    assert encoded(b"text\n\x8d\n", "cp1252")[0].problem == "not CP1252 text: save it as UTF-8"
    with pytest.raises(InputError, match="a file is not UTF-16 text, or is damaged"):
        encoded("text\na\n".encode("utf-16")[:-1], "utf-16")


WHOLE = {
    "xlsx": xlsx([["text", "id"], ["one", 1], ["two", date(2024, 2, 3)]]),
    "parquet": parquet(
        {"text": ["one", "two"], "id": [1, None], "c": pa.array(["x", "y"]).dictionary_encode()}
    ),
}


@fuzz
@given(st.sampled_from([*WHOLE]), st.binary(max_size=60), st.integers(0, 6000))
def test_a_damaged_file_gives_rows_or_one_line(kind, damage, at):
    content = WHOLE[kind]
    at %= len(content)
    with refused_in_one_line():
        read(content[:at] + damage + content[at + len(damage) :], kind)
