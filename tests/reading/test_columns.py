"""Test how the columns of texts and labels are found, and named in messages."""

import itertools

import pytest

from hierarchical_clinicalbert.reading.columns import (
    LABEL_COLUMNS,
    TEXT_COLUMNS,
    choose_columns,
    find_column,
    listed,
    text_problem,
)
from hierarchical_clinicalbert.reading.rows import InputError


def columns(*names: str, **shares: float) -> dict[str, float]:
    return {name: shares.get(name, 1.0) for name in names}


@pytest.mark.parametrize("candidates", [TEXT_COLUMNS, LABEL_COLUMNS])
def test_the_first_candidate_decides_whatever_the_order_of_the_columns(candidates):
    for first, second in itertools.combinations(candidates, 2):
        for names in ((first, second), (second, first), (second.upper(), f" {first.title()} ")):
            found = find_column(columns("other", *names), None, candidates)
            assert found is not None
            assert found.strip().lower() == first


def test_a_requested_name_is_exact_and_a_candidate_need_not_be():
    assert find_column(columns("Abstract", "id"), None, TEXT_COLUMNS) == "Abstract"
    assert find_column(columns("Abstract", "id"), "Abstract", TEXT_COLUMNS) == "Abstract"
    assert find_column(columns("Abstract", "id"), "abstract", TEXT_COLUMNS) is None
    for names in (("TEXT", "text", " Text"), (" Text", "text", "TEXT")):
        assert find_column(columns(*names), None, TEXT_COLUMNS) == "text"
    assert find_column(columns("TEXT", "Text"), None, TEXT_COLUMNS) == "TEXT"
    assert find_column(columns("context", "text2"), None, TEXT_COLUMNS) is None


def test_a_column_that_few_rows_have_is_found_only_by_its_exact_name():
    known = columns("abstract", "text", abstract=0.1)
    assert find_column(known, None, TEXT_COLUMNS) == "text"
    assert find_column(known, "abstract", TEXT_COLUMNS) == "abstract"
    assert find_column(columns("abstract", "text", abstract=0.5), None, TEXT_COLUMNS) == "abstract"


def test_several_sources_share_a_candidate():
    sources = {"train.csv": columns("text", "abstract"), "test.csv": columns("id", "Text")}
    assert choose_columns(sources, None, TEXT_COLUMNS, "--text_column") == ["text", "Text"]
    assert choose_columns({"a.csv": columns("body")}, "body", (), "--text_column") == ["body"]
    for given, requested, message in (
        ({"a.csv": columns("x", "y")}, None, "a.csv: no column is called medical_abstract, .*; give --text_column: there are 'x', 'y'"),
        ({"a.jsonl": columns("id", "text", text=0.4)}, None, "a.jsonl: fewer than half of the first rows have 'text'; give --text_column text"),
        ({"a.csv": columns("text"), "b.csv": columns("x")}, "text", r"b.csv has no column 'text' \(--text_column\); it has 'x'"),
        ({"a.csv": columns("text"), "b.csv": columns("body")}, None, "a.csv, b.csv have no column in common for --text_column"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            choose_columns(given, requested, TEXT_COLUMNS, "--text_column")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        *((text, None) for text in ("a text", "\0a", "\U0001f600")),
        *((text, "the text is empty") for text in ("", "\0", " \n\u2003", "\u200b\ufeff", "\ufffd \ufffd")),
        ("\u0301 \u0308", "the text is empty"),  # accents without a letter
        *((value, "the text is missing") for value in (None, float("nan"))),
        (1.5, "the value is not text but float"),
        (["a"], "the value is not text but list"),
    ],
)
def test_the_problem_of_a_value_that_is_not_a_text_is_named(value, problem):
    assert text_problem(value) == problem


def test_names_are_shown_unless_one_of_them_is_a_text():
    names = ["text", "Unnamed: 0", "ICD-10 code", "probability of nervous system diseases", "2024", "", "Größe_in_cm"]
    assert listed(names) == ", ".join(map(repr, names))
    assert listed([f"column{i}" for i in range(3000)]).endswith("'column7' and 2,992 more")
    for text in ("x" * 61, "admitted with chest pain last week", "Seen by Dr. Miller", "20190731", "4711-0815-99"):
        reason = f"as one is called (a value of {len(text)} characters): is the header missing?"
        assert listed(["Mrs Miller", "a", text]) == f"3 columns that are not shown, {reason}"
