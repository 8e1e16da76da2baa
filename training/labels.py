"""Labels: read from their columns, named, and found in a taxonomy.

Worth knowing:

1. A label becomes the id of a node of the taxonomy, a leaf or an inner node. Codes become names first.
2. Several label columns name a path from the root down. Its lower levels may be empty.
3. Without a taxonomy, the default one is used if it holds all labels. Otherwise the labels' paths make one.
4. What does not look like a name may be a text about a patient. Messages give its length alone.
"""

import json
import logging
from collections.abc import Iterable
from typing import Any

from errors import InputError
from reading.columns import find_column
from reading.sources import Source, Table, kind_of, read_table
from taxonomy_hierarchical import (
    DEFAULT_TAXONOMY,
    SHOWN_CHARACTERS,
    SHOWN_WORDS,
    Taxonomy,
    TaxonomyError,
    compose,
    quote_name,
)
from training.arguments import DataArguments

logger = logging.getLogger(__name__)

LONGEST_LABEL = 500  # characters; anything longer is a column of texts taken for labels

Label = str | tuple[str, ...]  # a name or path as written, or the names of several columns from the root down


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_labels(table: Table, columns: list[str]) -> list[Label]:
    """Return the labels of the rows: of one column as they are written, of several the path that they name."""
    levels = []
    for column in columns:
        labels = [_label_text(value) for value in table.columns[column]]
        refuse_rows(table, column, map(_label_problem, labels))
        levels.append([label or "" for label in labels])
    name = " ".join(columns)
    paths = list(zip(*levels, strict=True))
    ends = [next((i for i in range(len(path), 0, -1) if path[i - 1]), 0) for path in paths]
    refuse_rows(table, name, (None if end else "the label is missing" for end in ends))
    if len(columns) == 1:
        return [*levels[0]]
    paths = [path[:end] for path, end in zip(paths, ends, strict=True)]
    refuse_rows(table, name, (None if all(path) else "the label has a gap above a filled level" for path in paths))
    return list(paths)


def _label_text(value: Any) -> str | None:
    """Return a label as text, empty if there is none; None for a value that is no label."""
    if isinstance(value, float) and value.is_integer():  # integers beside missing values, as JSON writers store them
        value = int(value)
    if value is None or value != value:  # NaN
        return ""
    if not isinstance(value, str | int) or isinstance(value, bool):
        return None
    return compose(str(value).strip())


def _label_problem(label: str | None) -> str | None:
    if label is None:
        return "the label is neither text nor a whole number"
    return f"the label has more than {LONGEST_LABEL} characters" if len(label) > LONGEST_LABEL else None


def refuse_rows(table: Table, column: str, problems: Iterable[str | None]) -> None:
    """Raise InputError if a row has a problem, naming the first one and the number of all."""
    found = [(i, problem) for i, problem in enumerate(problems) if problem is not None]
    if found:
        row, problem = found[0]
        others = f"; {len(found):,} rows cannot be used" if len(found) > 1 else ""
        raise InputError(f"{table.place(row)}, column {quote_name(column)}: {problem}{others}")


# ── nodes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def resolve_labels(
    places: dict[Label, str], num_rows: int, columns: list[str], arguments: DataArguments, taxonomy: Taxonomy | None
) -> tuple[Taxonomy, str, dict[Label, int]]:
    """Find the node of each distinct label.

    Args:
        places: where each label stands first, for messages.
        taxonomy: by default that of the arguments, the default one, or what the labels span.

    Returns:
        The taxonomy, where it comes from, and the nodes.
    """
    names = {} if arguments.class_names is None else read_class_names(arguments.class_names)
    origin = "the checkpoint's"
    if taxonomy is None and arguments.taxonomy is not None:
        origin = f"from {arguments.taxonomy}"
        try:
            taxonomy = Taxonomy.from_file(arguments.taxonomy, arguments.label_separator)
        except TaxonomyError as error:
            raise InputError(f"--taxonomy: {error}") from error

    named = {label: _name(label, names) for label in places}
    if taxonomy is None:
        default = Taxonomy(DEFAULT_TAXONOMY, arguments.label_separator)
        if _holds(default, named.values()):
            taxonomy, origin = default, "the default, of the Medical Abstracts corpus"
        else:
            taxonomy, origin = _from_labels(named, names, places, num_rows, columns, arguments), "from the labels"
    logger.info(
        "taxonomy: %s: %d roots, %d leaves, %d levels",
        origin, len(taxonomy.children(-1)), taxonomy.num_leaves, taxonomy.depth,
    )  # fmt: skip

    nodes = {}
    lookup = _lookup(taxonomy)
    for label, name in named.items():
        try:
            nodes[label] = _node(taxonomy, lookup, name)
        except TaxonomyError as error:
            if names and name == label:
                raise _unknown_code(label, places[label], arguments) from error
            raise InputError(f"{places[label]}: {error}") from error
    return taxonomy, origin, nodes


def _unknown_code(label: Label, place: str, arguments: DataArguments) -> InputError:
    given = "" if (arguments.class_names or "").lstrip().startswith("{") else f" {arguments.class_names}"
    return InputError(
        f"{place}: the label {quote_name(label)} is neither a code of --class_names{given} nor in the taxonomy"
    )


def read_class_names(given: str) -> dict[str, str]:
    """Read codes and their names, from a ``.csv`` or ``.tsv`` file or from a JSON object.

    A file's codes are in its column ``code`` or ``label`` and the names in ``name`` or ``condition_name``, or else in
    the first two columns.

    Raises:
        InputError: neither of these, an empty code or name, or a code with two names.
    """
    if given.lstrip().startswith("{"):
        try:
            pairs = json.loads(given, object_pairs_hook=list)
        except json.JSONDecodeError as error:
            raise InputError(f"--class_names is not JSON: {error}") from error
        where = "--class_names"
    else:
        where = f"--class_names {given}"
        source = Source(given, kind_of(given))
        if source.kind not in ("csv", "tsv"):
            raise InputError(f"{where}: expected a .csv or .tsv file (code, name), or a JSON object")
        table = read_table(source).columns
        shares = dict.fromkeys(table, 1.0)
        code, name = (find_column(shares, None, names) for names in (("code", "label"), ("name", "condition_name")))
        if code is None or name is None:
            if len(table) < 2:
                raise InputError(f"{where}: expected two columns, code and name")
            code, name, *_ = table
        pairs = list(zip(table[code], table[name], strict=True))
    names: dict[str, str] = {}
    for code, name in pairs:
        if not isinstance(name, str) or not name.strip() or not code.strip():
            raise InputError(f"{where}: the code {quote_name(code)} needs a name, a text")
        code, name = compose(code.strip()), compose(name.strip())
        if names.setdefault(code, name) != name:
            both = " and ".join(map(quote_name, (names[code], name)))
            raise InputError(f"{where}: the code {quote_name(code)} has two names: {both}")
    return names


def _name(label: Label, names: dict[str, str]) -> Label:
    if isinstance(label, str):
        return names.get(label, label)
    return tuple(names.get(level, level) for level in label)


def _from_labels(
    named: dict[Label, Label],
    names: dict[str, str],
    places: dict[Label, str],
    num_rows: int,
    columns: list[str],
    arguments: DataArguments,
) -> Taxonomy:
    """Return the taxonomy that the labels of all splits span, in sorted order."""
    where, paths = f"column {quote_name(' '.join(columns))}", set()
    for label, name in named.items():
        levels = (label,) if isinstance(label, str) else label
        if names and not all(level in names or level in names.values() for level in levels):
            raise _unknown_code(label, places[label], arguments)
        path = _path(name, arguments.label_separator)
        if not all(path):
            raise InputError(f"{places[label]}: the label {quote_name(label)} has an empty name in its path")
        paths.add(path)
    if len(paths) == 1:
        only = arguments.label_separator.join(*paths)
        raise InputError(f"{where}: every row has the label {quote_name(only)}; at least two are needed")
    texts = sum(any(len(name) > SHOWN_CHARACTERS or len(name.split()) > SHOWN_WORDS for name in path) for path in paths)
    if 2 * texts > len(paths) > num_rows / 2:  # nothing to learn, and all of it would be published with the model
        raise InputError(
            f"{where}: {texts} of {len(paths)} labels are texts, not names of classes; give another --label_column, or the "
            "classes by --taxonomy"
        )
    try:
        return Taxonomy.from_paths(sorted(paths), arguments.label_separator)
    except TaxonomyError as error:
        raise InputError(f"{where}: the labels do not make a taxonomy: {error}") from error


def _path(label: Label, separator: str) -> tuple[str, ...]:
    """Return the names of a label from the root down. A root whose name is not unique is written ``/root``."""
    if isinstance(label, tuple):
        return label
    return tuple(part.strip() for part in label.removeprefix(separator).split(separator))


def _lookup(taxonomy: Taxonomy) -> dict[Label, int]:
    paths: dict[Label, int] = {taxonomy.path_names(node): node for node in range(taxonomy.num_nodes)}
    return {**paths, **{label: node for node, label in enumerate(taxonomy.labels)}}


def _node(taxonomy: Taxonomy, lookup: dict[Label, int], label: Label) -> int:
    if label in lookup:
        return lookup[label]
    if isinstance(label, tuple):
        node = taxonomy.id(taxonomy.separator.join(label))
        raise TaxonomyError(
            f"the label columns must name the path from the root, which is {quote_name(taxonomy.path_names(node))}, not "
            f"{quote_name(label)}"
        )
    if taxonomy.separator in label and _path(label, taxonomy.separator) in lookup:
        return lookup[_path(label, taxonomy.separator)]
    return taxonomy.id(label)


def _holds(taxonomy: Taxonomy, labels: Iterable[Label]) -> bool:
    lookup = _lookup(taxonomy)
    try:
        for label in labels:
            _node(taxonomy, lookup, label)
    except TaxonomyError:
        return False
    return True
