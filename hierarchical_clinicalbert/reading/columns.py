"""Find the column of texts or labels, and check and hash texts."""

import hashlib
import json
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hierarchical_clinicalbert.reading.rows import InputError
from taxonomy_hierarchical import list_names, looks_like_name, normalise, quote_name, to_nfc

TEXT_COLUMNS = ("medical_abstract", "abstract", "text", "sentence", "content", "document", "body")
LABEL_COLUMNS = ("condition_label", "label", "labels", "category", "class", "condition_name")


def find_column(
    columns: Sequence[str], requested: str | None, candidates: Sequence[str]
) -> str | None:
    """Return the name of the requested column, or None if it is missing.

    Args:
        requested: a name that must match exactly, up to Unicode normalization. None to search for
            the candidates.
        candidates: names in order of preference, without regard to case and surrounding white
            space.
    """
    if requested is not None:  # an accent may be a character of its own, as in files from macOS
        return {to_nfc(column): column for column in columns}.get(to_nfc(requested))
    names = {column.strip().casefold(): column for column in reversed(columns)} | {
        column: column for column in columns
    }
    return next((names[name] for name in candidates if name in names), None)


def choose_columns(
    sources: Mapping[str, Sequence[str]],
    requested: str | None,
    candidates: Sequence[str],
    flag: str,
) -> list[str]:
    """Return one column for each source: the requested one, or the first candidate that all sources
    have.

    Args:
        sources: the columns of each source, by name.
        flag: the flag that requests a column, for messages.

    Raises:
        InputError: a source lacks the column.
    """
    for candidate in candidates if requested is None else [requested]:
        matches = [find_column(columns, requested, [candidate]) for columns in sources.values()]
        chosen = [column for column in matches if column is not None]
        if len(chosen) == len(sources):
            return chosen
    for name, columns in sources.items():
        if not columns:
            raise InputError(f"{name} is empty: it has no columns")
        if find_column(columns, requested, candidates) is None:
            missing = (
                f"called {', '.join(candidates)}; give {flag}"
                if requested is None
                else f"{quote_name(requested)} ({flag})"
            )
            raise InputError(f"{name} has no column {missing}: there are {listed(columns)}")
    raise InputError(
        f"{', '.join(sources)} have no column in common for {flag}: rename it in one of them"
    )


def join_labels(labels: Iterable[str], separator: str = "; ") -> str:
    """Join labels, as ``train.py --label_delimiter ";"`` reads a cell.

    If a label contains the separator, make a JSON list.
    """
    labels = list(labels)
    is_ambiguous = any(separator.strip() in label for label in labels)
    return json.dumps(labels, ensure_ascii=False) if is_ambiguous else separator.join(labels)


def text_problem(value: Any) -> str | None:
    """Return why a value cannot be classified as a text, or None."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "the text is missing"
    if not isinstance(value, str):
        return f"the value is not text but {type(value).__name__}"
    return "the text is empty" if is_blank(value) else None


def is_blank(text: str) -> bool:
    """Return whether a text has no readable character.

    Unreadable are spaces, control and format characters, combining accents, and U+FFFD, which
    replaces lost characters.
    """
    return all(
        character == "\ufffd" or unicodedata.category(character)[0] in "CMZ" for character in text
    )


def text_hash(text: str) -> str:
    """Return a hash of a text as `normalise` gives it, case-folded."""
    folded = normalise(text).casefold()
    # case-folding decomposes some letters
    normalised = unicodedata.normalize("NFKC", folded)
    return hashlib.blake2b(normalised.encode(), digest_size=16).hexdigest()


def listed(names: Iterable[str]) -> str:
    """Format column names for a message: the first ones, or none if one of them looks like a
    text.
    """
    names = list(names)
    text = next((name for name in names if not looks_like_name(name)), None)
    if text is not None:
        return (
            f"{len(names):,} columns that are not shown, as one is called {quote_name(text)}: "
            "is the header missing?"
        )
    return list_names(names)
