"""Read a taxonomy from a file: nested YAML or JSON, or a table of parents and children."""

import json
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pandas as pd

from hierarchical_clinicalbert.data.tables import read_table, refuse_rows
from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.files import read_text, read_yaml, unique_names
from hierarchical_clinicalbert.reading.columns import find_column, listed
from hierarchical_clinicalbert.reading.sources import Source
from taxonomy_hierarchical import (
    MAX_DEPTH,
    Taxonomy,
    TaxonomyError,
    nearest_name,
    normalise,
    quote_name,
    to_nfc,
)


def read_taxonomy(path: str | Path, separator: str = "/") -> Taxonomy:
    """Read nested ``.yaml``, ``.yml`` or ``.json``, or a table ``.csv`` or ``.tsv``, see
    `build_from_table`.

    Raises:
        InputError: the file cannot be read, or is not a taxonomy, or see `refuse_equal_nodes`.
    """
    suffix = Path(path).suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            table = read_table(Source(str(path), suffix.removeprefix(".")))
            tree = build_from_table(table, separator)
        elif suffix == ".json":
            tree = Taxonomy(json.loads(read_text(path), object_pairs_hook=unique_names), separator)
        elif suffix in (".yaml", ".yml"):
            tree = Taxonomy(read_yaml(path), separator)
        else:
            raise TaxonomyError(f"expected .yaml, .yml, .json, .csv or .tsv, not {suffix!r}")
        refuse_equal_nodes(tree)
        return tree
    except RecursionError as error:
        raise InputError(
            f"{path} is nested too deeply; at most {MAX_DEPTH} levels are supported"
        ) from error
    except InputError:
        raise
    except ValueError as error:  # TaxonomyError, or JSONDecodeError
        raise InputError(f"{path}: {error}") from error


def refuse_equal_nodes(tree: Taxonomy) -> None:
    """Raise TaxonomyError if two paths are equal by `normalise`."""
    first: dict[tuple[str, ...], tuple[str, ...]] = {}
    for path in sorted(tree.node_of_path, key=len):  # ancestors first, which are what differs
        other = first.setdefault(tuple(map(normalise, path)), path)
        if other != path:
            both = " and ".join(quote_name(names[-1]) for names in (other, path))
            raise TaxonomyError(f"{both} are equal in Unicode (NFKC): keep one, or rename one")


def build_from_table(table: pd.DataFrame, separator: str) -> Taxonomy:
    """Build a taxonomy from the columns ``parent``, ``child`` or ``name``, and possibly
    ``description``.

    A child without a parent is a root. In a table without any, parents without a row are roots.

    Raises:
        TaxonomyError, InputError: a column is missing, a name is empty, a child has two parents, a
            parent has no row although a root has one, or there is a cycle.
    """
    candidates = (("child", "name"), ("parent",), ("description",))
    child_column, parent_column, text_column = (
        find_column([*table], None, names) for names in candidates
    )
    if child_column is None or parent_column is None:
        raise TaxonomyError(
            f"expected columns 'parent' and 'child' (or 'name'), found {listed(table)}"
        )
    names, parents = (
        [to_nfc(name.strip()) for name in table[column]] for column in (child_column, parent_column)
    )
    refuse_rows(table, [child_column], (None if name else "the name is empty" for name in names))
    own = {normalise(name): name for name in reversed(names)} | {name: name for name in names}
    parents = [own.get(name, own.get(normalise(name), name)) for name in parents]

    # ── The parent of each child ──────────────────────────────────────────────────────────────────
    parent_of: dict[str, str] = {}  # "" for no parent
    for child, parent in zip(names, parents, strict=True):
        if parent_of.setdefault(child, parent) != parent:
            first, second = (
                quote_name(name) if name else "no parent" for name in (parent_of[child], parent)
            )
            raise TaxonomyError(f"{quote_name(child)} has two parents: {first} and {second}")
    unknown = [parent for parent in parents if parent and parent not in parent_of]
    if unknown and "" in parents:
        first = unknown[0]
        near = nearest_name(first, (child for child in names if parent_of[child] != first))
        advice = f"did you mean {quote_name(near)}?" if near else "add one, as roots have theirs"
        problem = f"the parent {quote_name(first)} has no row of its own; {advice}"
        problems = (problem if parent == first else None for parent in parents)
        refuse_rows(table, [parent_column], problems)
    try:
        TopologicalSorter({child: [parent] for child, parent in parent_of.items()}).prepare()
    except CycleError as error:
        raise TaxonomyError(
            f"the taxonomy has a cycle: {' > '.join(map(quote_name, error.args[1]))}"
        ) from error

    # ── The tree: roots in the order in which they are first named ────────────────────────────────
    children: dict[str, dict] = defaultdict(dict)
    for child, parent in parent_of.items():
        children[parent][child] = children[child]
    first_named = dict.fromkeys(parent or child for child, parent in parent_of.items())
    roots = [name for name in first_named if not parent_of.get(name)]
    texts = [] if text_column is None else zip(names, table[text_column], strict=True)
    descriptions = {name: " ".join(text.split()) for name, text in texts if text.strip()}
    return Taxonomy({name: children[name] for name in roots}, separator, descriptions)
