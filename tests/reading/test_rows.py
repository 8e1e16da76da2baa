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


def reader(content: bytes, kind: str, encoding: str | None = None, **limits: int) -> RowReader:
    stream = io.BytesIO(content)
    return RowReader(stream, kind, "a file", Limits(**limits), encoding=encoding)


def read(content: bytes, kind: str, encoding: str | None = None, **limits: int) -> list[Row]:
    return list(reader(content, kind, encoding, **limits).read())


def refusal(content: bytes, kind: str, encoding: str | None = None, **limits: int) -> str:
    with pytest.raises(InputError) as refused:
        read(content, kind, encoding, **limits)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ── a corpus of odd files ─────────────────────────────────────────────────────────────────────────

STRAY = "a quotation mark is stray or not doubled"
SWALLOWS = "swallows the rows below it"
TWO = ["text", "id"]
# the beginning of a sheet of Excel's largest size: a header and one row
SPARSE = (
    '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main">'
    '<dimension ref="A1:XFD1048576"/><sheetData>'
    '<row r="1"><c r="A1" t="str"><v>text</v></c></row>'
    '<row r="3"><c r="A3" t="str"><v>a</v></c></row>'
)
SHEET = [
    ["text", "id", None, "when"],
    ["007", 7, None, date(2024, 2, 3)],
    [],
    [None, 1.5, "no name", True, "off"],
    ["two\nlines"],
    ["", None, None, ""],
    ["_x000D_\n", 1],
]
# name: kind, content, columns; the values of each row, or a part of its problem, by its line
CORPUS: dict[str, tuple[str, bytes, list[str], dict[int, list | dict | str]]] = {
    "values are not guessed": (
        "csv",
        b'text,id\nNA,007\n1.0,\n" x ",true\n',
        TWO,
        {2: ["NA", "007"], 3: ["1.0", ""], 4: [" x ", "true"]},
    ),
    "empty lines": (
        "csv",
        b'\n \ntext\n\na\n""\n\n"\n"\n',
        ["text"],
        {5: ["a"], 6: [""], 8: ["\n"]},
    ),
    "blank cells in TSV": (
        "tsv",
        b"text\tid\n\t\n\n \t \n",
        TWO,
        {2: ["", ""], 4: [" ", " "]},
    ),
    "ragged rows": (
        "csv",
        b"text,id\na\nb,2\nc,3,\nd,4\n",
        TWO,
        {
            2: "1 fields, where the header has 2",
            3: ["b", "2"],
            4: "3 fields, where the header has 2",
            5: ["d", "4"],
        },
    ),
    "a row that is not UTF-8": (
        "csv",
        b"text,id\na,1\ncaf\xe9,2\nc,3\n",
        TWO,
        {2: ["a", "1"], 3: "not UTF-8", 4: ["c", "3"]},
    ),
    "quotation marks inside": (
        "csv",
        b'text,id\n5" wide,1\n"a ""b""",2\n',
        TWO,
        {2: ['5" wide', "1"], 3: ['a "b"', "2"]},
    ),
    "a stray mark takes rows in": (
        "csv",
        b'text,id\nzero,1\n"one,2\ntwo,3\n"three,4\nfour,5\n',
        TWO,
        {2: ["zero", "1"], 3: f"{STRAY} (lines 3 to 5)", 6: ["four", "5"]},
    ),
    "a mark that is not closed": (
        "csv",
        b'text,id\na,1\n"b,2\nc,3\n',
        TWO,
        {2: ["a", "1"], 3: "a quotation mark is not closed (lines 3 to 4)"},
    ),
    "a stray mark in TSV, text first": (
        "tsv",
        b'text\tid\n"Stroke" was\t1\n"Heart was\t2\ntwo\t3\nend"\t4\nfour\t5\n"two\nlines"\t6\n',
        TWO,
        {2: STRAY, 3: f"{SWALLOWS} (lines 3 to 5)", 6: ["four", "5"], 7: ["two\nlines", "6"]},
    ),
    "a quoted header in TSV": (
        "tsv",
        b'"text"\t"id"\n"Hb\t12\nNa 140"\t1\n"a\t""b\nc"\t2\n',
        TWO,
        {2: ["Hb\t12\nNa 140", "1"], 4: ['a\t"b\nc', "2"]},
    ),
    "semicolons": (
        "csv",
        b'id;text\n1;"a; b\nc"\n2;c, d\n3;x;y\n',
        ["id", "text"],
        {2: ["1", "a; b\nc"], 4: ["2", "c, d"], 5: "3 fields, where the header has 2"},
    ),
    "one column of texts with semicolons": (
        "csv",
        b"text\na;b\nc\td\n",
        ["text"],
        {2: ["a;b"], 3: ["c\td"]},
    ),
    "a semicolon in a quoted name": ("csv", b'"a;b",text\n1,2\n', ["a;b", "text"], {2: ["1", "2"]}),
    "a workbook": (
        "xlsx",
        xlsx(SHEET),
        ["text", "id", "", "when"],
        {
            2: ["007", 7, None, datetime(2024, 2, 3)],
            4: [None, 1.5, "no name", True],
            5: ["two\nlines", None, None, None],
            7: ["\r\n", 1, None, None],
        },
    ),
    "a sheet of Excel's largest size": (
        "xlsx",
        sheet(
            f'{SPARSE}<row r="1048576"><c r="XFD1048576"><v>1</v></c></row></sheetData></worksheet>'
        ),
        ["text"],
        {3: ["a"], 1048576: [None]},
    ),
    "a text a line": (
        "txt",
        b'\xef\xbb\xbfa,"b\n\n  \n c \r\nd',
        ["text"],
        {1: ['a,"b'], 4: [" c "], 5: ["d"]},
    ),
    "lines that are not objects": (
        "jsonl",
        b'{"a": 1}\n[1]\n{"a": \n"x"\nnull\n{"a": "\xe9"}\n{"a": 2} {}\n{"a": 3, "a": 4}\n'
        b'{"a": 3}\n',
        ["a"],
        {
            1: [1],
            2: "not a JSON object",
            3: "not JSON: Expecting value",
            4: "not a JSON object",
            5: "not a JSON object",
            6: "not UTF-8",
            7: "not JSON: Extra data",
            8: "not JSON: a name occurs twice",
            9: [3],
        },
    ),
    "half of a surrogate pair": (
        "jsonl",
        b'{"a": "\\ud800"}\n{"\\udc00": 1}\n{"a": [{"b": "\\ud83d"}]}\n{"a": "\\ud83d\\ude00"}\n',
        ["a"],
        {**dict.fromkeys((1, 2, 3), "surrogates not allowed"), 4: ["😀"]},
    ),
    "nested too deeply": (
        "jsonl",
        b'{"a": ' + b"[" * 10**5 + b'\n{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b'}\n{"a": 1}\n',
        ["a"],
        {**dict.fromkeys((1, 2), "not JSON: maximum recursion depth"), 3: [1]},
    ),
    "a list of objects": (
        "json",
        b'\xef\xbb\xbf[{"a": 1},\n\n {"b": null}, 7]',
        ["a", "b"],
        {1: {"a": 1}, 2: {"b": None}, 3: "not a JSON object"},
    ),
    "integers beside nulls": (
        "parquet",
        parquet({"n": pa.array([2**53 + 1, None, -1], pa.int64())}),
        ["n"],
        {1: [2**53 + 1], 2: [None], 3: [-1]},
    ),
    "names with dots": (
        "parquet",
        parquet({"a": [{"b": 1}], "a.b": ["x"], "a.c": ["y"]}),
        ["a", "a.b", "a.c"],
        {1: [{"b": 1}, "x", "y"]},
    ),
    # without rows
    "a header alone": ("csv", b"a,b\n", ["a", "b"], {}),
    "empty JSON Lines": ("jsonl", b"\n\n", [], {}),
    "an empty list": ("json", b"[]", [], {}),
    "an empty text": ("txt", b"", ["text"], {}),
    "an empty sheet": ("xlsx", xlsx([[]]), [], {}),
    "a sheet with a header alone": ("xlsx", xlsx([["a", "b"]]), ["a", "b"], {}),
    "an empty table": ("parquet", parquet({"a": pa.array([], pa.string())}), ["a"], {}),
}


@pytest.mark.parametrize("name", CORPUS)
def test_odd_files_give_their_columns_and_every_row_or_its_problem(name):
    kind, content, columns, expected = CORPUS[name]
    for stream in (io.BytesIO(content), Seekable(content) if kind in SEEKABLE else Plain(content)):
        rows = RowReader(stream, kind, "a file")
        assert list(rows.columns) == columns
        found = list(rows.read())
        assert [row.line for row in found] == [*expected]
        for row, values in zip(found, expected.values(), strict=True):
            if isinstance(values, str):
                assert row.values == {}
                assert values in (row.problem or "")
                continue
            if isinstance(values, list):
                values = dict(zip(columns, values, strict=True))
            assert (row.values, row.problem) == (values, None)
            assert [*map(type, row.values.values())] == [*map(type, values.values())]


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


@pytest.mark.parametrize(("begin", "end", "least"), [(0, -500, 1000), (7, None, 0)])
def test_a_damaged_gz_stream_gives_its_rows_and_then_an_error(begin, end, least):
    lines = b"".join(b'{"text": "%s"}\n' % os.urandom(40).hex().encode() for _ in range(3000))
    stream = gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(lines)[begin:end]))
    found = []
    with pytest.raises(
        InputError, match="is not UTF-8 text, or is damaged: copy or write it again"
    ):
        found.extend(RowReader(stream, "jsonl", "a file").read())  # keeps what came before
    assert len(found) >= least


# ── columns of JSON Lines ─────────────────────────────────────────────────────────────────────────


def test_columns_of_json_lines_are_those_of_its_first_1024_rows():
    lines = b'{"id": 1}\n{"text": "x", "id": 2}\n' + b'{"id": 3}\n' * 1022 + b'{"late": 4}\n'
    rows = reader(lines, "jsonl")
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
        message = refusal(content, kind, **limits | {limit: most - 1})
        assert f"has more than {most - 1:,} {limit}" in message


def test_a_file_that_unpacks_to_more_than_a_limit_is_refused():
    assert "has more than 999 unpacked bytes" in refusal(xlsx(ROWS), "xlsx", unpacked_bytes=999)
    beyond = f'{SPARSE}<row r="9999999999"><c><v>1</v></c></row></sheetData></worksheet>'
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
    content = parquet({"text": texts}, compression="none", use_dictionary=False)
    stream = Seekable(content, most=2**30)
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
    names = ["a", "b", "text"]
    writer = csv.writer(stream, lineterminator=end, quoting=csv.QUOTE_ALL, delimiter=";")
    writer.writerow(names)
    for row in rows:
        texts = [text.encode(encoding, "ignore").decode(encoding) for text in row]
        lines = (
            stream.getvalue().encode().splitlines()
        )  # of bytes: \n, \r\n and \r alone end a line
        expected.append(Row(len(lines) + 1, dict(zip(names, texts, strict=True))))
        writer.writerow(texts)
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
    rows = reader(content, kind)
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
        assert [row.problem for row in read(lines, "csv", "utf-8")] == problems
    message = refusal("text\na\n".encode("utf-16"), "csv", "utf-8")
    assert "a file is not UTF-8 text but fits utf-16: " in message
    assert message.endswith(", or give --encoding utf-16")
    # where there is no flag
    assert refusal(b"caf\xe9\n", "csv").endswith("fits cp1252: save it as UTF-8")
    for name in ("nix", "rot13", "a\0b"):
        assert "Python has no such encoding of text" in refusal(b"text\n", "csv", name)
    assert read(b"text\n\x8d\n", "csv", "cp1252")[0].problem == "not CP1252 text: save it as UTF-8"
    message = refusal("text\na\n".encode("utf-16")[:-1], "csv", "utf-16")
    assert "a file is not UTF-16 text, or is damaged" in message


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
