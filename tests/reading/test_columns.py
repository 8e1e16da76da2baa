"""Test how the columns of texts and labels are found, and named in messages."""

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


@pytest.mark.parametrize(
    ("columns", "requested", "found"),
    [
        (("text", "abstract"), None, "abstract"),  # the order of the candidates decides
        (("context", " Text ", "BODY"), None, " Text "),
        (("TEXT", "text", " Text"), None, "text"),
        (("TEXT", "Text"), None, "TEXT"),
        (("context", "text2"), None, None),
        (("Abstract", "text"), "Abstract", "Abstract"),
        (("Abstract", "text"), "abstract", None),  # a requested name is exact
        (("re\u0301sume\u0301",), "r\u00e9sum\u00e9", "re\u0301sume\u0301"),
    ],
)
def test_a_column_is_found_by_its_name_or_by_the_first_usual_one(columns, requested, found):
    assert find_column(columns, requested, TEXT_COLUMNS) == found


def test_several_sources_share_a_candidate():
    sources = {"train.csv": ["text", "abstract"], "test.csv": ["id", "Text"]}
    assert choose_columns(sources, None, TEXT_COLUMNS, "--text_column") == ["text", "Text"]
    assert choose_columns({"a.csv": ["label", "class"]}, None, LABEL_COLUMNS, "--label_column") == ["label"]
    for given, requested, message in (
        ({"a.csv": ["x", "y"]}, None, "a.csv has no column called medical_abstract, .*; give --text_column: there are 'x', 'y'"),
        ({"a.csv": ["text"], "b.csv": ["x"]}, "text", r"b.csv has no column 'text' \(--text_column\): there are 'x'"),
        ({"a.csv": ["text"], "b.csv": ["body"]}, None, "a.csv, b.csv have no column in common for --text_column"),
        ({"a.csv": []}, None, "a.csv is empty: it has no columns"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            choose_columns(given, requested, TEXT_COLUMNS, "--text_column")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        *((text, None) for text in ("a text", "\0a", "\U0001f600")),
        *((text, "the text is empty") for text in ("", "\0", " \n\u2003", "\u200b\ufeff", "\ufffd \ufffd", "\u0301")),
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
    reason = "as one is called (a value of 18 characters): is the header missing?"
    assert listed(["Mrs Miller", "Seen by Dr. Miller"]) == f"2 columns that are not shown, {reason}"
