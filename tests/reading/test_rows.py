"""Test reading of odd files against expected rows, and of random files against the csv and json modules."""

import csv
import gzip
import io
import itertools
import json
import logging
import os
import re
import tracemalloc
import warnings
import zipfile
from datetime import date, datetime
from decimal import Decimal

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import parquet, sheet, xlsx
from fuzzing import fuzz, refused_in_one_line
from hypothesis import given
from hypothesis import strategies as st

from hierarchical_clinicalbert.reading.rows import SEEKABLE, InputError, Limits, Row, RowReader

SECRET = "Mrs Miller of Nowhere Lane was admitted with chest pain."  # a text, which no message may show


class Plain:
    """A stream that has only read(), which may return fewer bytes than requested."""

    def __init__(self, content: bytes, most: int = 7):
        self._stream, self._most = io.BytesIO(content), most

    def read(self, size: int = -1) -> bytes:
        return self._stream.read(min(size, self._most))


class Seekable(Plain):
    """A stream like an object store's, which can seek and may return fewer bytes than requested."""

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)


class Counted(Seekable):
    """A stream that counts the bytes it returns."""

    given = 0

    def read(self, size: int = -1) -> bytes:
        content = super().read(size)
        self.given += len(content)
        return content


class Endless:
    """A stream that repeats a line endlessly, after a beginning."""

    def __init__(self, beginning: bytes, line: bytes):
        self._line, self.given, self._rest = line, 0, beginning

    def read(self, size: int = -1) -> bytes:
        while len(self._rest) < size:
            self._rest += self._line * (1 + size // len(self._line))
        content, self._rest = self._rest[:size], self._rest[size:]
        self.given += size
        return content


class Sparse:
    """A sheet of Excel's largest size, which has a header, one row, and a cell in its last row and column."""

    HEAD = '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><dimension ref="A1:XFD1048576"/><sheetData>'
    ROWS = '<row r="1"><c r="A1" t="str"><v>text</v></c></row><row r="3"><c r="A3" t="str"><v>a</v></c></row>'
    LAST = '<row r="1048576"><c r="XFD1048576"><v>1</v></c></row></sheetData></worksheet>'


def read(content: bytes, kind: str, **limits: int) -> list[Row]:
    return list(RowReader(io.BytesIO(content), kind, "a file", Limits(**limits)).read())


def refusal(content: bytes, kind: str, **limits: int) -> str:
    with pytest.raises(InputError) as refused:
        read(content, kind, **limits)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ── a corpus of odd files ────────────────────────────────────────────────────────────────────────────────────────────

# name: kind, content, and of each row the line where it begins with its values, or with a part of its problem
STRAY, SWALLOWS = "a quotation mark is stray or not doubled", "swallows the rows below it"
CORPUS: dict[str, tuple[str, bytes, list[tuple[int, dict | str]]]] = {
    "values are not guessed": ("csv", b'text,id\nNA,007\n1.0,\n" x ",true\n', [
        (2, {"text": "NA", "id": "007"}), (3, {"text": "1.0", "id": ""}), (4, {"text": " x ", "id": "true"})]),
    "a byte order mark": ("csv", b'\xef\xbb\xbf"text",id\na,1\n', [(2, {"text": "a", "id": "1"})]),
    "a row of several lines": ("csv", b'text,id\n"two\nlines",1\nb,2\n', [
        (2, {"text": "two\nlines", "id": "1"}), (4, {"text": "b", "id": "2"})]),
    "line ends of Windows": ("csv", b'text,id\r\n"two\r\nlines",1\r\nb,2\r\n', [
        (2, {"text": "two\r\nlines", "id": "1"}), (4, {"text": "b", "id": "2"})]),
    "line ends of old Macs": ("csv", b'text,id\r"two\rlines",1\rb,2', [
        (2, {"text": "two\rlines", "id": "1"}), (4, {"text": "b", "id": "2"})]),
    "characters that only Unicode calls line ends": ("csv", "text\na\u2028b\x0bc\x85d\n".encode(), [
        (2, {"text": "a\u2028b\x0bc\x85d"})]),
    "blank lines": ("csv", b'\n \ntext\n\n  \na\n""\n\t\n', [(6, {"text": "a"}), (7, {"text": ""})]),
    "blank cells in TSV": ("tsv", b"text\tid\n\t\n\n \t \n", [(2, {"text": "", "id": ""}), (4, {"text": " ", "id": " "})]),
    "ragged rows": ("csv", b"text,id\na\nb,2\nc,3,\nd,4\n", [
        (2, "1 fields, where the header has 2"), (3, {"text": "b", "id": "2"}),
        (4, "3 fields, where the header has 2"), (5, {"text": "d", "id": "4"})]),
    "a row that is not UTF-8": ("csv", b"text,id\na,1\ncaf\xe9,2\nc,3\n", [
        (2, {"text": "a", "id": "1"}), (3, "not UTF-8"), (4, {"text": "c", "id": "3"})]),
    "a surrogate encoded as if it were a character": ("txt", b"a\n\xed\xa0\x80\nb", [
        (1, {"text": "a"}), (2, "not UTF-8"), (3, {"text": "b"})]),
    "quotation marks inside": ("csv", b'text,id\n5" wide,1\n"a ""b""",2\n', [
        (2, {"text": '5" wide', "id": "1"}), (3, {"text": 'a "b"', "id": "2"})]),
    "a stray mark takes rows in": ("csv", b'text,id\nzero,1\n"one,2\ntwo,3\n"three,4\nfour,5\n', [
        (2, {"text": "zero", "id": "1"}), (3, f"{STRAY} (lines 3 to 5)"), (6, {"text": "four", "id": "5"})]),
    "a mark that is not closed": ("csv", b'text,id\na,1\n"b,2\nc,3\n', [
        (2, {"text": "a", "id": "1"}), (3, "a quotation mark is not closed (lines 3 to 4)")]),
    "a stray mark in TSV, text first": (
        "tsv", b'text\tyear\n"Stroke" was\t1\n"Heart was\t2\ntwo\t3\nend"\t4\nfour\t5\n"two\nlines"\t6\n', [
        (2, STRAY), (3, f"{SWALLOWS} (lines 3 to 5)"), (6, {"text": "four", "year": "5"}),
        (7, {"text": "two\nlines", "year": "6"})]),
    "a stray mark in TSV, text last": (
        "tsv", b'year\ttext\n2\t"Heart was\n3\ttwo\n4\tend"\n5\tfour\n6\t"two\nlines"\n', [
        (2, f"{SWALLOWS} (lines 2 to 4)"), (5, {"year": "5", "text": "four"}), (6, {"year": "6", "text": "two\nlines"})]),
    "a quoted header in TSV": ("tsv", b'"text"\t"id"\n"Hb\t12\nNa 140"\t1\n"a\t""b\nc"\t2\n', [
        (2, {"text": "Hb\t12\nNa 140", "id": "1"}), (4, {"text": 'a\t"b\nc', "id": "2"})]),
    "tabs and other line ends in a TSV cell": ("tsv", b'text\tid\r\n"Hb\t12\nNa 140"\t1\r\n', [
        (2, {"text": "Hb\t12\nNa 140", "id": "1"})]),
    "a TSV row that may as well be two": ("tsv", b'text\tid\n"a\tb\nc"\td\n"two\nlines"\t2\n', [
        (2, f"{SWALLOWS} (lines 2 to 3); if these lines are one row, quote the header too"),
        (4, {"text": "two\nlines", "id": "2"})]),
    "a stray mark that swallows a blank line and reaches the end": (
        "tsv", b'text\tyear\n"two\nlines"\t1\nthe "red" one\t2\n"Heart was\t3\n\nend"\t4', [
        (2, {"text": "two\nlines", "year": "1"}), (4, {"text": 'the "red" one', "year": "2"}), (5, f"{SWALLOWS} (lines 5 to 7)")]),
    "a zero byte is a character": ("csv", b"text,id\na\0b,1\n", [(2, {"text": "a\0b", "id": "1"})]),
    "semicolons": ("csv", b'id;text\n1;"a; b\nc"\n2;c, d\n3;x;y\n', [
        (2, {"id": "1", "text": "a; b\nc"}), (4, {"id": "2", "text": "c, d"}), (5, "3 fields, where the header has 2")]),
    "semicolons, and a comma in a name": ("csv", b'"text, or abstract";"text"\r\na;b,c\r\n', [
        (2, {"text, or abstract": "a", "text": "b,c"})]),
    "vertical bars in TSV": ("tsv", b"text|id\na\tb|1\n", [(2, {"text": "a\tb", "id": "1"})]),
    "a stray mark in CSV with tabs": ("csv", b'text\tyear\n"one\t1\ntwo\t2\nend"\t3\n', [(2, f"{SWALLOWS} (lines 2 to 4)")]),
    "one column of texts with semicolons": ("csv", b"text\na;b\nc\td\n", [(2, {"text": "a;b"}), (3, {"text": "c\td"})]),
    "a semicolon in a quoted name": ("csv", b'"a;b",text\n1,2\n', [(2, {"a;b": "1", "text": "2"})]),
    "a workbook": ("xlsx", xlsx([
        ["text", "id", None, "when"], ["007", 7, None, date(2024, 2, 3)], [], [None, 1.5, "no name", True, "off"], ["two\nlines"],
        ["", None, None, ""], ["_x000D_\n", 1]]), [
        (2, {"text": "007", "id": 7, "": None, "when": datetime(2024, 2, 3)}),
        (4, {"text": None, "id": 1.5, "": "no name", "when": True}),
        (5, {"text": "two\nlines", "id": None, "": None, "when": None}),
        (7, {"text": "\r\n", "id": 1, "": None, "when": None})]),
    "a workbook whose header is not in the first row": ("xlsx", xlsx([[], [None, None], ["text", 2024], ["a", "b"]]), [
        (4, {"text": "a", "2024": "b"})]),
    "a sheet of Excel's largest size": ("xlsx", sheet(Sparse.HEAD + Sparse.ROWS + Sparse.LAST), [
        (3, {"text": "a"}), (1048576, {"text": None})]),
    "a text a line": ("txt", b"\xef\xbb\xbfa,\"b\n\n  \n c \r\nd", [
        (1, {"text": 'a,"b'}), (4, {"text": " c "}), (5, {"text": "d"})]),
    "JSON Lines": ("jsonl", b'{"text": "a", "n": 1}\n\n{"n": null, "text": "b"}\r\n{"n": 1.5, "x": [{"y": NaN}]}', [
        (1, {"text": "a", "n": 1}), (3, {"n": None, "text": "b"}), (4, "checked below")]),
    "lines that are not objects": ("jsonl", b'{"a": 1}\n[1]\n{"a": \n"x"\nnull\n{"a": "\xe9"}\n{"a": 2} {}\n{"a": 3}\n', [
        (1, {"a": 1}), (2, "not a JSON object"), (3, "not JSON: Expecting value"), (4, "not a JSON object"),
        (5, "not a JSON object"), (6, "not UTF-8"), (7, "not JSON: Extra data"), (8, {"a": 3})]),
    "a name twice": ("jsonl", b'{"a": 1, "a": 2}\n{"a": 3, "b": {"c": 1, "c": 1}}\n{"a": 4}\n', [
        (1, "the name 'a' occurs twice"), (2, "the name 'c' occurs twice"), (3, {"a": 4})]),
    "half of a surrogate pair": (
        "jsonl", b'{"a": "\\ud800"}\n{"\\udc00": 1}\n{"a": [{"b": "\\ud83d"}]}\n{"a": "\\ud83d\\ude00"}\n', [
        (1, "half of a surrogate pair"), (2, "half of a surrogate pair"), (3, "half of a surrogate pair"),
        (4, {"a": "😀"})]),
    "a number of thousands of digits": ("jsonl", b'{"a": ' + b"1" * 5000 + b'}\n{"a": ' + b"1" * 4000 + b"}\n", [
        (1, "a number has too many digits"), (2, {"a": int("1" * 4000)})]),
    "nested too deeply": ("jsonl", b'{"a": ' + b"[" * 10**5 + b'\n{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b'}\n{"a": 1}\n', [
        (1, "nested too deeply"), (2, "nested too deeply"), (3, {"a": 1})]),
    "a list of objects": ("json", b'\xef\xbb\xbf[{"a": 1},\n\n {"b": null}, 7]', [
        (1, {"a": 1}), (2, {"b": None}), (3, "not a JSON object")]),
    "a list called data": ("json", b'{"version": {"n": 1}, "data": [{"a": "\\ud800"}, {"a": 2}]}', [
        (1, "half of a surrogate pair"), (2, {"a": 2})]),
    "integers beside nulls": ("parquet", parquet({"n": pa.array([2**53 + 1, None, -1], pa.int64())}), [
        (1, {"n": 2**53 + 1}), (2, {"n": None}), (3, {"n": -1})]),
    "dates, decimals, bytes, lists": ("parquet", parquet({
        "d": [date(2024, 2, 3)], "t": pa.array([datetime(2024, 2, 3, 4, 5)], pa.timestamp("us")), "m": [Decimal("1.50")],
        "b": [b"caf\xe9"], "l": [[1, None]], "s": [{"a": "x"}]}), [
        (1, {"d": date(2024, 2, 3), "t": datetime(2024, 2, 3, 4, 5), "m": Decimal("1.50"), "b": b"caf\xe9",
             "l": [1, None], "s": {"a": "x"}})]),
    "a time beyond the year 9999": ("parquet", parquet({
        "a": [1, 2, 3], "when": pa.array([0, 10**17, None], pa.timestamp("ms"))}), [
        (1, {"a": 1, "when": datetime(1970, 1, 1)}), (2, "the column 'when' holds a value that cannot be read"), (3, {"a": 3, "when": None})]),
    "bytes taken for text": ("parquet", parquet({"a": pa.array([b"x", b"caf\xe9", b"y"]).view(pa.string())}), [
        (1, {"a": "x"}), (2, "the column 'a' holds a value that cannot be read"), (3, {"a": "y"})]),
    **{
        f"a value that Python does not have, {column.type}": (
            "parquet", parquet({"text": ["a"], "when": column}), [(1, "the column 'when' holds ")])
        for column in (
            pa.array([2**31 - 1], pa.date32()),
            pa.array([10**15], pa.duration("s")),
            pa.array([0], pa.timestamp("ms", "No/Where")),
            pa.StructArray.from_arrays([pa.array([1])] * 2, ["a", "a"]),
        )
    },
    "names with dots": ("parquet", parquet({"a": [{"b": 1}], "a.b": ["x"], "a.c": ["y"]}), [
        (1, {"a": {"b": 1}, "a.b": "x", "a.c": "y"})]),
}  # fmt: skip


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
            elif content != "checked below":
                assert row.values == {}
                assert content in (row.problem or "")


def test_nan_and_infinity_in_json_are_floats():
    row = read(b'{"a": NaN, "b": -Infinity, "c": 1e400, "d": 12345678901234567890}\n', "jsonl")[0]
    assert row.problem is None
    assert row.values["a"] != row.values["a"]
    assert [row.values[name] for name in "bcd"] == [float("-inf"), float("inf"), 12345678901234567890]


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("csv", b"id;text,label\n1;a,b\n", "a file: its first line may be separated by ',' or ';': rename the columns"),
        ("csv", b"id;text|label\n1;a|b\n", "a file: its first line may be separated by ';' or '|': rename the columns"),
        ("csv", "text,id\na,1\n".encode("utf-16"), "a file is not UTF-8 text but fits utf-16: save it as UTF-8"),
        ("csv", "text,id\na,1\n".encode("utf-16-le"), "a file is not UTF-8 text but fits utf-16-le"),
        ("jsonl", '{"text": "a"}\n'.encode("utf-16-be"), "a file is not UTF-8 text but fits utf-16-be"),
        ("jsonl", '{"text": "a"}\n'.encode("utf-32"), "a file is not UTF-8 text but fits utf-32"),
        ("txt", "a text".encode("utf-16"), "a file is not UTF-8 text but fits utf-16"),
        ("csv", b"caf\xe9,id\na,1\n", "a file is not UTF-8 text but fits cp1252"),
        ("csv", b'id,"a\ncaf\xe9"\n1,2\n', "a file is not UTF-8 text but fits cp1252"),
        ("csv", b"\0\0\0\0", "a file is not UTF-8 text: save it as UTF-8"),
        ("csv", xlsx([["text"]]), "a file is not UTF-8 text: save it as UTF-8"),  # a wrong suffix
        ("xlsx", b"text,id\n", "a file is not an .xlsx workbook without a password, or is damaged"),
        ("xlsx", xlsx([["text"]])[:-100], "a file is not an .xlsx workbook without a password, or is damaged"),
        ("xlsx", parquet({"text": ["a"]}), "a file is not an .xlsx workbook"),
        ("xlsx", xlsx([["text", "id", "text"]]), "a file has two columns called 'text': rename or remove one"),
        (
            "csv",
            b'"text" x,id\na,1\n',
            "the first line, which names the columns, cannot be read: a quotation mark is stray",
        ),
        ("csv", b'"text,id\na,1\n', "cannot be read: a quotation mark is not closed (lines 1 to 2)"),
        ("csv", b"text,id,text\na,1,b\n", "a file has two columns called 'text': rename or remove one"),
        ("json", b'[{"a": "\xfc"}]', "a file is not UTF-8 text"),
        ("json", b'[{"a": 1},\n', "a file, line 2: not JSON: Expecting value"),
        (
            "json",
            b'{"a": 1}\n{"a": 2}\n',
            "a file, line 2: not JSON: Extra data; name it .jsonl if it has an object a line",
        ),
        ("json", b"", "a file, line 1: not JSON"),
        ("json", b'{"rows": []}', "must hold a list of objects"),
        ("json", b'[{"a": 1}, {"b": 1, "b": 2}]', "a file: the name 'b' occurs twice"),
        ("json", b"[" * 10**5, "a file: nested too deeply"),
        ("json", b'["x"]', "a file, row 1: not a JSON object"),
        ("jsonl", b'[]\n{"a": 1, "a": 2}\n', "a file, line 1: not a JSON object, and none of the first 2 rows"),
        ("parquet", b"", "a file is not a Parquet file, or is damaged"),
        ("parquet", b"PAR1 not really PAR1", "a file is not a Parquet file, or is damaged"),
        ("parquet", parquet(pa.table([["a"], ["b"]], names=["x", "x"])), "a file has two columns called 'x'"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_in_one_line(kind, content, message):
    assert message in refusal(content, kind)


def test_a_file_without_rows_has_columns_or_none():
    for kind, content, columns in (("csv", b"a,b\n", ["a", "b"]), ("jsonl", b"\n\n", []), ("json", b"[]", []),
                                   ("txt", b"", ["text"]), ("xlsx", xlsx([[]]), []), ("xlsx", xlsx([["a", "b"]]), ["a", "b"]), ("parquet", parquet({"a": pa.array([], pa.string())}), ["a"])):  # fmt: skip
        rows = RowReader(io.BytesIO(content), kind, "a file")
        assert list(rows.columns) == columns
        assert list(rows.read()) == []


def test_a_damaged_gz_stream_gives_its_rows_and_then_an_error():
    lines = b"".join(b'{"text": "%s"}\n' % os.urandom(40).hex().encode() for _ in range(3000))
    packed = gzip.compress(lines)
    middle = len(packed) // 2
    flipped = packed[:middle] + bytes([packed[middle] ^ 0xFF]) + packed[middle + 1 :]
    for content, begins in ((packed[:-500], True), (flipped, True), (b"not packed at all", False)):
        count = 0
        with pytest.raises(InputError, match="a file is damaged or incomplete: copy or download it again"):  # noqa: PT012
            for _ in RowReader(gzip.GzipFile(fileobj=io.BytesIO(content)), "jsonl", "a file").read():
                count += 1
        assert (count > 1000) == begins


# ── columns of JSON Lines ────────────────────────────────────────────────────────────────────────────────────────────


def test_columns_of_json_lines_are_those_of_its_first_1024_rows():
    def lines(*objects: dict) -> bytes:
        return "".join(json.dumps(one) + "\n" for one in objects).encode()

    rows = RowReader(
        io.BytesIO(lines({"id": 1}, {"text": "x", "id": 2}, {"note": 3, "text": "y", "id": 4})), "jsonl", "a file"
    )
    assert rows.columns == pytest.approx({"id": 1, "text": 2 / 3, "note": 1 / 3})
    assert next(row.values for row in rows.read()) == {"id": 1}

    rows = RowReader(io.BytesIO(lines(*[{"a": 1}] * 1024, {"a": 2, "late": 3})), "jsonl", "a file")
    assert rows.columns == {"a": 1.0}
    assert list(rows.read())[-1] == Row(1025, {"a": 2, "late": 3})
    # a JSON file is read whole, so all of it counts
    content = json.dumps([{"a": 1}] * 1024 + [{"late": 3}]).encode()
    assert list(RowReader(io.BytesIO(content), "json", "a file").columns) == ["a", "late"]


def test_the_first_rows_of_an_endless_stream_are_read_from_its_first_megabytes():
    for kind, head, line in (
        ("csv", b"text,id\n", b"a text,1\n"),
        ("jsonl", b"", b'{"text": "a text"}\n'),
        ("txt", b"", b"a\n"),
    ):
        stream = Endless(head, line)
        rows = RowReader(stream, kind, "a file")
        assert len(list(itertools.islice(rows.read(), 5000))) == 5000
        assert stream.given < 2**20


# ── limits ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_row_that_is_too_long_is_a_problem_and_the_next_is_read():
    too_long = "1,000 characters or more"
    content = b"text,id\na,1\n" + b"x" * 5000 + b",2\r\nc,3\n"
    rows = [(2, None), (3, too_long), (4, None)]
    assert [(row.line, row.problem) for row in read(content, "csv", characters=1000)] == rows
    quoted = b'text,id\n"yyy' + b"y\n" * 800 + b"d,5\n"  # 498 lines of 2 characters after 6 are two too many
    found = [(row.line, row.problem) for row in read(quoted, "csv", characters=1000)]
    assert (found[0], found[-1]) == ((2, f"{too_long} (lines 2 to 500)"), (802, None))
    for length, problem in ((997, None), (998, too_long)):
        for end in (b"\n", b"\r\n"):
            content = b"text,id\n" + b"x" * (length + 1 - len(end)) + b",1" + end + b"b,2\n"
            rows = [(2, problem), (3, None)]
            assert [(row.line, row.problem) for row in read(content, "csv", characters=1000)] == rows
    lines = b'{"a": 1}\n{"a": "' + b"x" * 5000 + b'"}\n{"a": 2}\n'
    rows = [(1, None), (2, too_long), (3, None)]
    assert [(row.line, row.problem) for row in read(lines, "jsonl", characters=1000)] == rows


def test_a_quotation_mark_that_is_not_closed_in_an_endless_file_ends_at_the_limit():
    rows = RowReader(Endless(b'text\na\n"b\n', b"c\n"), "csv", "a file", Limits(characters=10_000)).read()
    first, second, third = itertools.islice(rows, 3)
    assert first == Row(2, {"text": "a"})
    assert (second.line, second.values) == (3, {})
    assert "10,000 characters or more (lines 3 to " in (second.problem or "")
    assert third.values == {"text": "c"}


def test_more_than_a_limit_is_refused():
    content = b"text,id\n" + b"a,1\n" * 10
    assert len(read(content, "csv", bytes=len(content), rows=10, columns=2)) == 10
    assert "has more than 9 rows" in refusal(content, "csv", rows=9)
    assert "has more than 1 columns" in refusal(content, "csv", columns=1)
    assert "has more than 47 bytes" in refusal(content, "csv", bytes=47)
    many = json.dumps({f"k{i}": i for i in range(2000)}).encode()
    assert "has more than 1,000 columns" in refusal(many, "jsonl", columns=1000)
    assert "has more than 1,000 columns" in refusal(b"[" + many + b"]", "json", columns=1000)
    assert "has more than 9 rows" in refusal(b'{"a": 1}\n' * 10, "jsonl", rows=9)
    table = parquet({"a": list(range(10)), "b": ["x"] * 10})
    assert "has more than 9 rows" in refusal(table, "parquet", rows=9)
    assert "has more than 1 columns" in refusal(table, "parquet", columns=1)
    book = xlsx([["a", "b"], *[[i, "x"] for i in range(10)]])
    assert len(read(book, "xlsx", rows=10, columns=2, cells=22)) == 10
    assert "has more than 9 rows" in refusal(book, "xlsx", rows=9)
    assert "has more than 1 columns" in refusal(book, "xlsx", columns=1)
    assert "has more than 21 cells" in refusal(book, "xlsx", cells=21)
    assert "has more than 999 unpacked bytes" in refusal(book, "xlsx", unpacked_bytes=999)
    # packed again and again, a few bytes become many
    packed = gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(b"text\n" + b"a\n" * 10**6)))
    with pytest.raises(InputError, match="has more than 10,000 bytes"):
        list(RowReader(packed, "csv", "a file", Limits(bytes=10_000)).read())


POOL = pa.proxy_memory_pool(pa.default_memory_pool())  # of one test, kept here since buffers may outlive it


def test_a_parquet_file_that_unpacks_to_gigabytes_is_refused_before_it_does():
    values = pa.array(["x" * 2**20])
    content = parquet(
        {"text": pa.DictionaryArray.from_arrays(pa.array([0] * 10_000, pa.int32()), values), "n": range(10_000)}
    )
    assert len(content) < 2**20
    before = pa.default_memory_pool()
    pa.set_memory_pool(POOL)
    try:
        rows = RowReader(io.BytesIO(content), "parquet", "a file", Limits(bytes=100 * 2**20))
        with pytest.raises(InputError, match="has more than 104,857,600 bytes"):
            list(rows.read())
    finally:
        pa.set_memory_pool(before)
    assert 2**20 < POOL.max_memory() <= 100 * 2**20
    assert sum(
        row.values["n"] for row in RowReader(io.BytesIO(content), "parquet", "a file", Limits(bytes=2**20)).read(["n"])
    ) == (sum(range(10_000)))


def test_a_workbook_that_unpacks_to_gigabytes_is_refused_before_it_does():
    bomb = io.BytesIO()
    with (
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("xl/a", "w") as part,
    ):
        for _ in range(65):
            part.write(bytes(2**24))
    assert len(bomb.getvalue()) < 2**23
    tracemalloc.start()
    assert "a file has more than 1,073,741,824 unpacked bytes" in refusal(bomb.getvalue(), "xlsx")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    # gaps count as cells: each row ends in Excel's last column
    wide = "".join(f'<row r="{i}"><c r="XFD{i}"><v>1</v></c></row>' for i in range(2, 9000))
    content = sheet(Sparse.HEAD + Sparse.ROWS.partition("</row>")[0] + "</row>" + wide + "</sheetData></worksheet>")
    assert "a file has more than 100,000,000 cells" in refusal(content, "xlsx")
    beyond = Sparse.HEAD + Sparse.ROWS + '<row r="9999999999"><c><v>1</v></c></row></sheetData></worksheet>'
    assert "is not an .xlsx workbook" in refusal(sheet(beyond), "xlsx")


# ── Parquet ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_columns_of_parquet_that_are_not_requested_are_not_decoded():
    columns = {"text": ["a", "b"], "when": pa.array([10**17, 10**17], pa.timestamp("ms")), "zone": pa.array([0, 0], pa.timestamp("ms", "No/Where"))}  # fmt: skip
    rows = RowReader(io.BytesIO(parquet(columns)), "parquet", "a file")
    assert list(rows.columns) == ["text", "when", "zone"]
    assert list(rows.read(["text"])) == [Row(1, {"text": "a"}), Row(2, {"text": "b"})]
    assert all(row.problem for row in rows.read(["text", "zone"]))


def test_damage_affects_neither_earlier_rows_nor_other_columns():
    table = pa.table({"text": [f"text {i}" for i in range(100)], "n": list(range(100))})
    content = parquet(table, row_group_size=50, compression="none", use_dictionary=False)
    page = pq.read_metadata(io.BytesIO(content)).row_group(1).column(1).data_page_offset
    content = content[:page] + b"\xff" * 20 + content[page + 20 :]
    rows = RowReader(io.BytesIO(content), "parquet", "a file")
    assert [row.values["text"] for row in rows.read(["text"])] == table["text"].to_pylist()
    found = []
    with pytest.raises(InputError, match="a file is not a Parquet file, or is damaged: write or copy it again"):
        found.extend(rows.read())  # keeps what came before
    assert 0 < len(found) <= 50


def test_parquet_needs_a_stream_that_can_seek_and_leaves_it_open():
    content = parquet({"a": [1]})
    with pytest.raises(InputError, match="is read from its end, so save the file to a disk first"):
        RowReader(Plain(content), "parquet", "a file")
    with pytest.raises(InputError, match="is read from its end, so save the file to a disk first"):
        RowReader(Plain(xlsx([["a"]])), "xlsx", "a file")
    for kind, some in (("parquet", content), ("xlsx", xlsx([["a"], [1]])), ("csv", b"a\n1\n")):
        stream = io.BytesIO(some)
        rows = RowReader(stream, kind, "a file")
        assert len(list(rows.read())) == 1
        del rows
        assert not stream.closed


# ── what was written is what is read ─────────────────────────────────────────────────────────────────────────────────

TEXT = st.text(
    st.one_of(st.sampled_from("ab ,;\"'\t\n\r\\\0\ufeff\u2028"), st.characters(exclude_categories=["Cs"])), max_size=12
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXT)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)),
    max_leaves=12,
)


def count_lines(text: str) -> int:
    return len(text.encode().splitlines())  # of bytes: \n, \r\n and \r alone end a line


@fuzz
@given(
    st.lists(st.lists(TEXT, min_size=3, max_size=3), max_size=6),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.integers(1, 99),
)
def test_any_texts_come_back_from_csv_with_the_lines_they_begin_on(rows, end, chunk):
    stream, expected = io.StringIO(newline=""), []
    writer = csv.writer(stream, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerow(["a", "b", "text"])
    for row in rows:
        expected.append(Row(count_lines(stream.getvalue()) + 1, dict(zip(["a", "b", "text"], row, strict=True))))
        writer.writerow(row)
    assert list(RowReader(Plain(stream.getvalue().encode(), chunk), "csv", "a file").read()) == expected


def tsv(rows: list[list[str]], quoting: int) -> bytes:
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter="\t", quoting=quoting).writerows([["a", "text"], *rows])
    return stream.getvalue().encode()


@fuzz
@given(st.lists(st.lists(TEXT, min_size=2, max_size=2), max_size=6))
def test_any_texts_come_back_from_tsv(rows):
    quoted = [row.values for row in read(tsv(rows, csv.QUOTE_ALL), "tsv")]
    assert [list(values.values()) for values in quoted] == rows
    for row, expected in zip(
        read(tsv(rows, csv.QUOTE_MINIMAL), "tsv"), quoted, strict=True
    ):  # each is right, or says why not
        assert SWALLOWS in row.problem if row.problem else row.values == expected


CELL = st.lists(st.sampled_from(['"', "a", "b", " ", '"c"', '"d'])).map("".join)


@fuzz
@given(
    st.lists(st.one_of(st.just([]), st.lists(CELL, min_size=2, max_size=2)), max_size=12),
    st.sampled_from(["\n", "\r\n"]),
)
def test_no_row_of_tsv_without_quoting_swallows_others(rows, end):
    lines = ["a\ttext", *map("\t".join, rows)]
    for row in read(end.join(lines).encode(), "tsv"):
        if row.problem is None:  # each cell is as written, or without the marks around it
            cells = lines[row.line - 1].split("\t")
            assert all(
                value in (cell, cell[1:-1].replace('""', '"'))
                for value, cell in zip(row.values.values(), cells, strict=True)
            )


@fuzz
@given(st.lists(st.dictionaries(TEXT, VALUES, max_size=4), max_size=6), st.booleans())
def test_any_objects_come_back_from_json(objects, escaped):
    lines = "".join(json.dumps(one, ensure_ascii=escaped) + "\n" for one in objects).encode()
    whole = json.dumps({"data": objects}, ensure_ascii=escaped, indent=1).encode()
    for found in (read(lines, "jsonl"), read(whole, "json")):
        assert found == [Row(i, one) for i, one in enumerate(objects, start=1)]


# ── separators, sheets and encodings ─────────────────────────────────────────────────────────────────────────────────


def test_what_was_found_in_a_file_is_logged_once_it_is_read(caplog):
    two = xlsx([["text"], ["a"]], [["text"], ["b"]])
    for kind, content, notice in (
        ("csv", b"id;text\n1;a\n", "a file is separated by ';'"),
        ("tsv", b"id,text\n1,a\n", "a file is separated by ','"),
        ("csv", b"id\ttext\n1\ta\n", "a file is separated by '\\t'"),
        ("xlsx", two, "a file has 2 sheets: only the first is read, 'Sheet'"),
        ("csv", b"id,text\n1,a\n", None),
    ):
        caplog.clear()
        rows = RowReader(io.BytesIO(content), kind, "a file")
        assert not caplog.records
        assert len(list(rows.read())) == 1
        assert [record.getMessage() for record in caplog.records] == ([notice] if notice else [])
        assert {record.levelno for record in caplog.records} <= {logging.WARNING}


def test_hidden_sheets_and_stored_values_of_formulas(caplog):
    workbook, stream = openpyxl.Workbook(), io.BytesIO()
    hidden, shown = workbook.active, workbook.create_sheet("Notes")
    hidden.sheet_state = "hidden"
    hidden.append(["text"])
    for row in (["text", "sum"], ["a", "=1+1"]):
        shown.append(row)
    workbook.save(stream)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(stream.getvalue(), "xlsx") == [Row(2, {"text": "a", "sum": None})]  # nothing has computed it
    assert not caplog.records


def encoded(content: bytes, encoding: str | None, kind: str = "csv") -> list[Row]:
    return list(RowReader(io.BytesIO(content), kind, "a file", encoding=encoding).read())


def test_an_encoding_that_fits_is_offered_with_its_flag_and_never_guessed():
    utf8, offer = (
        "not UTF-8 text: save it as UTF-8",
        "not UTF-8 text but fits cp1252: save it as UTF-8, or give --encoding cp1252",
    )
    for lines, problems in (
        ("text\ncafé\na\n“é”\n".encode("cp1252"), [offer, None, offer]),
        ("text\nü\n".encode() + b"caf\xe9\n", [None, utf8]),  # a damaged row of UTF-8
        (b"text\n\xc3\xbc caf\xe9\n", [utf8]),
        (b"text\ncaf\xe9 \x8d\n", [utf8]),  # no character of cp1252
        (b"text\ncaf\xe9 \x01\n", [utf8]),  # binary
    ):
        assert [row.problem for row in encoded(lines, "utf-8")] == problems
    with pytest.raises(InputError, match=r"a file is not UTF-8 text but fits utf-16: .*, or give --encoding utf-16$"):
        encoded("text\na\n".encode("utf-16"), "utf-8")
    with pytest.raises(InputError, match=r"fits cp1252: save it as UTF-8$"):  # where there is no flag
        encoded(b"caf\xe9\n", None)
    for name in ("nix", "rot13", "a\0b"):
        with pytest.raises(InputError, match="Python has no such encoding of text"):
            encoded(b"text\n", name)
    assert encoded(b"text\n\x8d\n", "cp1252")[0].problem == "not CP1252 text: save it as UTF-8"
    for content in (b"text\na\n", "text\na\n".encode("utf-16")[:-1], "text\n".encode("utf-16") + b"\0\xd8\0\0"):
        with pytest.raises(InputError, match="a file is not UTF-16 text, or is damaged"):
            encoded(content, "utf-16")


@fuzz
@given(
    st.lists(TEXT, max_size=5),
    st.sampled_from(["utf-16", "utf-16-le", "utf-32", "utf-8", "UTF-8-SIG", "cp1252", "latin-1"]),
)
def test_any_texts_come_back_from_any_encoding(texts, encoding):
    texts = [text.encode(encoding, "ignore").decode(encoding) for text in texts]
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter=";", quoting=csv.QUOTE_ALL).writerows([["a", "text"], *(["", text] for text in texts)])
    rows = encoded(stream.getvalue().encode(encoding), encoding)
    assert [row.values["text"] for row in rows] == texts


# XML has no control characters, and openpyxl would write a formula
CELL_TEXT = TEXT.filter(lambda text: not re.search("^=|[\0-\x08\x0b-\x1f\ufffe\uffff]", text))
FLOATS = st.floats(-1e300, 1e300).map(lambda number: float(f"{number:.15g}"))  # as Excel stores them
NUMBERS = st.one_of(st.integers(-(10**15), 10**15), FLOATS)


@fuzz
@given(st.lists(st.lists(st.one_of(st.none(), st.booleans(), NUMBERS, CELL_TEXT), min_size=3, max_size=3), max_size=5))
def test_any_values_come_back_from_a_workbook(rows):
    found = [[*row.values.values()] for row in read(xlsx([["a", "b", "c"], *rows]), "xlsx")]
    expected = [[None if value == "" else value for value in row] for row in rows]
    assert found == [row for row in expected if row != [None] * 3]


@fuzz
@given(st.binary(max_size=60), st.integers(0, 6000))
def test_a_damaged_workbook_gives_rows_or_one_line(damage, at):
    content = xlsx([["text", "id"], ["one", 1], ["two", date(2024, 2, 3)]])
    with refused_in_one_line():
        read(content[:at] + damage + content[at + len(damage) :], "xlsx")


@fuzz
@given(st.binary(max_size=60), st.integers(0, 900))
def test_a_damaged_parquet_file_gives_rows_or_one_line(damage, at):
    content = parquet({"text": ["one", "two"], "id": [1, None], "c": pa.array(["x", "y"]).dictionary_encode()})
    with refused_in_one_line():
        read(content[:at] + damage + content[at + len(damage) :], "parquet")


def test_an_error_of_the_stream_is_named():
    class Lost(Plain):
        def read(self, size: int = -1) -> bytes:
            content = super().read(size)
            if not content:
                raise TimeoutError(110, "Connection timed out")
            return content

    rows = RowReader(Lost(b"text\n" + b"a\n" * 50_000), "csv", "s3://bucket/a.csv").read()
    with pytest.raises(InputError, match=r"cannot read s3://bucket/a\.csv: Connection timed out"):
        list(rows)


def test_a_large_row_group_is_not_read_at_once():
    texts = [os.urandom(5000).hex() for _ in range(4000)]  # 40 MB that do not compress, in one group
    stream = Counted(parquet({"text": texts}, compression="none", use_dictionary=False), most=2**30)
    rows = RowReader(stream, "parquet", "a file").read()
    assert next(rows).values == {"text": texts[0]}
    assert stream.given < 20e6
    assert [row.values["text"] for row in rows] == texts[1:]
