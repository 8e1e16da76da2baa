"""Check that train.py, predict.py and the Space read the same rows of the odd files of test_rows.py."""

import io
import sys

import pytest
from conftest import ROOT
from test_rows import CORPUS

from hierarchical_clinicalbert.data.tables import read_table
from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.prediction.input import read_records
from hierarchical_clinicalbert.reading.columns import text_problem
from hierarchical_clinicalbert.reading.rows import RowReader
from hierarchical_clinicalbert.reading.sources import find_sources

sys.path.insert(0, str(ROOT / "space"))

import tables

FILES = {name: (kind, content) for name, (kind, content, _) in CORPUS.items() if b"text" in content or kind == "xlsx"}
FILES["texts that are missing or empty"] = ("csv", b"text,label\none,a\n  ,a\nNA,b\n")
FILES["values that are no texts"] = ("jsonl", b'{"text": "one"}\n{"text": null}\n{"text": 5}\n{"text": "two"}\n')


@pytest.mark.parametrize("name", FILES)
def test_all_commands_read_the_same_rows(tmp_path, name):
    kind, content = FILES[name]
    rows = list(RowReader(io.BytesIO(content), kind, "a file", encoding="utf-8").read(["text"]))
    problems = [row.problem or text_problem(row.values.get("text")) for row in rows]
    expected = [
        (row.line, None if problem else row.values["text"], problem)
        for row, problem in zip(rows, problems, strict=True)
    ]
    (tmp_path / f"rows.{kind}").write_bytes(content)
    (source,) = find_sources(str(tmp_path / f"rows.{kind}"))
    assert [(record.line, record.text, record.problem) for record in read_records([source], "text", None)] == expected
    no_flag = [
        (line, text, problem and problem.partition(", or give --encoding")[0]) for line, text, problem in expected
    ]
    assert [tuple(row) for row in tables.read(content, kind, "text", tables.MAX_CHARACTERS)][1:] == no_flag
    # train.py stops at the first row that cannot be read
    bad = next((row for row in rows if row.problem), None)
    if bad is None:
        assert read_table(source, ["text"])["text"].tolist() == [row.values.get("text") for row in rows]
    else:
        with pytest.raises(InputError) as refused:
            read_table(source, ["text"])
        assert str(refused.value) == f"{source.path}, line {bad.line}: {bad.problem}"
