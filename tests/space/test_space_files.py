"""Test the files of the Space: what is read of an upload, what is refused, and that no download
holds a formula.
"""

import csv
import io
import json
import re
import sys

import pyarrow as pa
import pytest
from conftest import ROOT, parquet, run_outside, sheet

sys.path.insert(0, str(ROOT / "space"))

from tables import FORMULA, MAX_BYTES, Refused, read_table, to_csv


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"text\n", "csv", "no rows"),
        (
            b"We followed 212 patients with fibrillation.\nBlood was drawn.\n",
            "csv",
            "is the header missing",
        ),
        (
            "text\nKoliken\n".encode("utf-16"),
            "csv",
            "fits utf-16: save it as UTF-8, or choose the encoding utf-16",
        ),
        (b"text\n" * 10_002, "csv", "more than 10,000 rows"),
        (b"text\n", "docx", "must be CSV, TSV, Excel"),
    ],
)
def test_a_file_beyond_the_limits_or_without_rows_is_refused_in_words(content, kind, message):
    with pytest.raises(Refused, match=message):
        read_table([(kind, content)])


def test_the_column_of_texts_is_the_requested_one_or_the_one_with_the_most_characters():
    content = parquet({"a.b": ["dotted"], "a": ["the longest of them"], "s": [{"b": "inner"}]})
    table = read_table([("parquet", content)])
    assert (table.columns, table.column) == (["a.b", "a", "s"], "a")
    dotted, struct = (read_table([("parquet", content)], name).rows[0] for name in ("a.b", "s"))
    assert (dotted.text, struct.problem) == ("dotted", "the value is not text but dict")
    with pytest.raises(Refused, match="no such column"):
        read_table([("csv", b"a,b\n1,2\n")], "c")


# ── Hostile files ─────────────────────────────────────────────────────────────────────────────────


def hostile_files() -> dict[str, bytes]:
    """Return contents, by name, of files of at most 10 MB that unpack to much more."""
    head = (
        '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>'
    )
    entities = '<!DOCTYPE x [<!ENTITY a0 "text">' + "".join(
        f'<!ENTITY a{i + 1} "{f"&a{i};" * 10}">' for i in range(9)
    )
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 10_000, pa.int32()), ["x" * 2**20])
    return {
        "repeated.parquet": parquet({"text": repeated}),
        "names.jsonl": b"{" + b",".join(b'"%x":0' % i for i in range(200_000)) + b"}\n",
        "cells.csv": b",".join(b"%x" % i for i in range(1000))
        + b"\n"
        + (b"," * 999 + b"\n") * 10_000,
        "cells.xlsx": sheet(f"{head}<row>{'<c/>' * 2 * 2**20}</row></sheetData></worksheet>"),
        "entities.xlsx": sheet(
            f'{entities}]>{head}<row><c t="str"><v>&a9;</v></c></row></sheetData></worksheet>'
        ),
        "wide.txt": ("\U0001f600" + "a" * 1030 + "\n").encode() * 10_000,
    }


def test_no_file_of_10_mb_takes_a_gigabyte(tmp_path):
    """Measure the peak memory of a fresh process and its subprocesses, minus the memory at the
    start.
    """
    for name, content in hostile_files().items():
        assert len(content) <= MAX_BYTES, name
        (tmp_path / name).write_bytes(content)
    code = f"""
import json, resource, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "space")!r})
import tables
from tables import Refused, read_table
tables.MAX_SECONDS = 10

def most(who):
    return resource.getrusage(who).ru_maxrss * 1024

rest, results = most(resource.RUSAGE_SELF), {{}}
for file in sorted(Path({str(tmp_path)!r}).glob("*.*")):
    try:
        results[file.name] = len(read_table([(file.name, file.read_bytes())]).rows)
    except Refused as error:
        results[file.name] = str(error)
print(json.dumps([results, most(resource.RUSAGE_SELF) - rest + most(resource.RUSAGE_CHILDREN)]))
"""
    results, memory = run_outside(code, tmp_path, fresh=True)
    assert memory < 10**9, results
    assert "more than 41,943,040 bytes" in results["repeated.parquet"]
    assert "memory" in results["cells.xlsx"] or "seconds" in results["cells.xlsx"]
    assert "damaged" in results["entities.xlsx"]
    assert results["wide.txt"] == results["cells.csv"] == 10_000
    assert (
        results["names.jsonl"] == "The file has more than 1,000 columns, the most that is accepted."
    )


# ── Downloads ─────────────────────────────────────────────────────────────────────────────────────

# what OWASP lists, in front of what a spreadsheet may drop and behind what may end a cell
FORMULAS = [
    f"a{end}{dropped}{start}HYPERLINK(1)"
    for end in ("", ",", ";", "\t", "|", "\r\n", "x")
    for dropped in ("", " ", '"', "'", ' "', "\u00a0", "\t", "'\n", "\0")
    for start in (
        "=",
        "+",
        "-",
        "@",
        "\uff1d",
        "\uff0b",
        "\uff0d",
        "\uff20",
        "\t",
        "\r",
        "\n",
        "\\=",
        "\\\\-",
        "\\\t=",
    )
]


def test_no_cell_of_a_download_is_a_formula_wherever_a_spreadsheet_splits_it(space):
    texts = [
        *FORMULAS,
        *(text[1:] + " x" for text in FORMULAS if len(text) > 13),
        "p = 0.5 (-1)",
        'a "b", one\nmore',
    ]
    space.open_file(
        "".join(json.dumps({"text": text}) + "\n" for text in texts).encode(), "formulas", "a.jsonl"
    )
    space.run_file("formulas")
    downloads = [
        content for path, content in space.files().items() if path.name == "predictions.csv"
    ]
    (download,) = (content.decode("utf-8-sig") for content in downloads if b"HYPERLINK" in content)
    csv.field_size_limit(len(download))
    for delimiter in ",;\t|":
        for quotes in ({"quotechar": '"'}, {"quotechar": "'"}, {"quoting": csv.QUOTE_NONE}):
            rows = csv.reader(io.StringIO(download, newline=""), delimiter=delimiter, **quotes)
            cells = [cell for row in rows for cell in row]
            assert sum("HYPERLINK" in cell for cell in cells) > 1
            for cell in cells:
                assert not cell.startswith(("\t", "\r", "\n")), (delimiter, quotes, cell)
                assert not re.match(r"[\s\0\"']*[=+@\uff1d\uff0b\uff0d\uff20-]", cell), (
                    delimiter,
                    quotes,
                    cell,
                )

    # read back as docs/space.md says
    marked = re.compile(FORMULA.pattern.replace("(?=", r"(\\) (?="), re.VERBOSE)
    rows = csv.DictReader(io.StringIO(download, newline=""))
    assert [marked.sub(lambda match: match[0][:-1], row["text"]) for row in rows] == texts
    assert "\\=x" in to_csv([{"labels": ["a", "=x"]}])
