"""Read labels from their columns and map them to nodes of a taxonomy.

A string that does not look like a name may be a text about a patient. Error messages report only its length.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Container, Iterable
from itertools import chain, compress
from typing import Any

from hierarchical_clinicalbert.data.arguments import DataArguments
from hierarchical_clinicalbert.data.trained_texts import normalise_text
from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.reading.columns import find_column
from hierarchical_clinicalbert.reading.sources import Source, Table, kind_of, read_table
from taxonomy_hierarchical import (
    DEFAULT_TAXONOMY,
    SHOWN_CHARACTERS,
    SHOWN_WORDS,
    Taxonomy,
    TaxonomyError,
    quote_name,
    to_nfc,
)

logger = logging.getLogger(__name__)

MAX_LABEL_LENGTH = 500  # characters; a longer label means that the column holds texts
PATH_DELIMITERS = "->", ">"  # what often stands between the names of a path, or between labels
DELIMITERS = *PATH_DELIMITERS, ";", "|", ","
ZERO_OR_ONE = {**dict.fromkeys(("0", "0.0", "false"), 0), **dict.fromkeys(("1", "1.0", "true"), 1)}
WRITTEN_LIST = "the label is a list written as text: save the data as .jsonl or .parquet, or join the labels and give --label_delimiter"
# a value as Python, JSON or numpy writes it; the apostrophe of "Crohn's disease" is no quotation mark
VALUE = re.compile(
    r"""(?<!\w)'(?:\\.|[^'\\])*'(?!\w)|"(?:\\.|[^"\\])*"|[-+]?(?<![\w.])\d[\d.]*(?:e[-+]?\d+)?(?!\w)"""
    r"|\b(?:None|NULL|null|[Tt]rue|[Ff]alse|nan|NaN)\b",
    re.DOTALL,
)
# a list, set, tuple or array, after each value in it was replaced by 0
COLLECTION = re.compile(
    r"""[\[{][\s,:0]*[\]}]                # values, also {"a": 1}, and numpy's array without commas
      | [\[{](?=[^][{}]*,)[^][{}]*[\]}]   # several names without quotation marks, as PostgreSQL and Spark write them
      | \(\) | \((?=[\s0]*,)[\s,0]*\)     # a tuple
      | (?:(?:frozen)?set|np\.\w+)\([\s0]*\)""",
    re.VERBOSE,
)
MAX_NESTING = 3  # of collections
FROM_LABELS = "from the labels"  # origin of a taxonomy

Label = str | tuple[str, ...]  # a name or path as written, or one name per label column, from the root down


# ── Read labels ──────────────────────────────────────────────────────────────────────────────────────────────────────


def read_labels(table: Table, columns: list[str]) -> list[Label]:
    """Return one label per row: the text of a single column, or the path from the root that several columns name."""
    paths: list[Any] = list(zip(*(map(_label_text, table.columns[column]) for column in columns), strict=True))
    refuse_rows(table, " ".join(columns), map(_label_problem, paths))
    return [tuple(filter(None, path)) if len(columns) > 1 else path[0] for path in paths]


def read_label_sets(table: Table, columns: list[str], delimiter: str | None) -> list[tuple[str, ...]]:
    """Return the labels of each row: items of a list, parts of a delimited text, or names of the columns that hold 1.

    A missing list, or an empty cell, means no labels. A delimited text that is a written list stays one label, for
    `resolve_labels`, because it may be the name of a node.
    """
    if len(columns) > 1:
        indicators = [[read_indicator(cell) for cell in table.columns[name]] for name in columns]
        problem = (
            "the cell is neither 0 nor 1, as each of several label columns must be; columns of names must be joined to one, "
            "with --label_delimiter"
        )
        for name, cells in zip(columns, indicators, strict=True):
            refuse_rows(table, name, (problem if cell is None else None for cell in cells))
        names = [to_nfc(name.strip()) for name in columns]
        return [tuple(compress(names, row)) for row in zip(*indicators, strict=True)]
    (column,) = columns
    rows: list[Any] = []
    for cell in table.columns[column]:
        if isinstance(cell, str) and delimiter is not None and not _is_written_list(cell, delimiter):
            cell = cell.split(delimiter)
        labels = map(_label_text, cell if isinstance(cell, list) else [cell])
        rows.append([label for label in labels if label != ""])
    problems = (next(filter(None, (_label_problem((label,)) for label in labels)), None) for labels in rows)
    refuse_rows(table, column, problems)
    return list(map(tuple, rows))


def read_indicator(cell: Any) -> int | None:
    """Return 0 or 1, or None for anything else."""
    return ZERO_OR_ONE.get(str(cell).strip().casefold())


def _label_text(value: Any) -> str | None:
    """Return a label as text, "" if it is missing, or None if it is neither text nor a whole number."""
    # JSON writers store integers as floats if the column has missing values
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or value != value:  # NaN
        return ""
    if not isinstance(value, str | int) or isinstance(value, bool):
        return None
    return to_nfc(str(value).strip())


def _is_written_list(label: Label, delimiter: str | None) -> bool:
    """Return whether a label is a list, set, tuple or array written as text. ``[other]``, one bare name in brackets, is a name."""
    if not isinstance(label, str) or not label.strip().endswith(("]", "}", ")")):
        return False
    rest = VALUE.sub("0", label.strip().replace(delimiter or ",", ","))
    for _ in range(MAX_NESTING):
        rest = COLLECTION.sub("0", rest)
    return rest == "0"


def _label_problem(path: tuple[Any, ...]) -> str | None:
    """Return what is wrong with a row's labels, one per column, or None."""
    if None in path:
        return (
            "the label is neither text nor a whole number (a path is one text, its names joined by --label_separator)"
        )
    if not any(path):
        return "the label is missing (texts without labels need --problem_type multi_label_classification)"
    if any(len(name) > MAX_LABEL_LENGTH for name in path):
        is_list = any(_is_written_list(name, None) for name in path)
        return WRITTEN_LIST if is_list else f"the label has more than {MAX_LABEL_LENGTH} characters"
    if "" in path and any(path[path.index("") :]):
        return "a label column is empty, although the column of a deeper level is filled"
    return None


def refuse_rows(table: Table, column: str, problems: Iterable[str | None]) -> None:
    """Raise InputError if any row has a problem. The message names the first row and counts them all."""
    bad_rows = [(i, problem) for i, problem in enumerate(problems) if problem is not None]
    if bad_rows:
        row, problem = bad_rows[0]
        others = f"; {len(bad_rows):,} rows cannot be used" if len(bad_rows) > 1 else ""
        raise InputError(f"{table.place(row)}, column {quote_name(column)}: {problem}{others}")


# ── Map labels to nodes ──────────────────────────────────────────────────────────────────────────────────────────────


def resolve_labels(
    places: dict[Label, str], num_rows: int, columns: list[str], arguments: DataArguments, taxonomy: Taxonomy | None
) -> tuple[Taxonomy, str, dict[Label, int]]:
    """Choose the taxonomy and map labels to it. Return the taxonomy, a phrase for its origin, and the labels' node ids.

    ``places`` are the first occurrences of the labels, for messages. ``taxonomy`` is the checkpoint's; --taxonomy replaces it.
    """
    where = f"column {quote_name(' '.join(columns))}"
    if not places and taxonomy is None:
        raise InputError(f"{where}: no row has a label")
    codes = {} if arguments.class_names is None else read_class_names(arguments.class_names)
    names = {
        label: codes.get(label, label) if isinstance(label, str) else tuple(codes.get(name, name) for name in label)
        for label in places
    }
    remedy = ""
    separator = arguments.label_separator
    if separator is None:
        separator = taxonomy.separator if taxonomy else "/"
    if arguments.label_delimiter is not None and arguments.label_delimiter.strip() == separator.strip():
        raise InputError(f"--label_delimiter must differ from --label_separator, which is {separator!r}")

    # ── Choose the taxonomy ──────────────────────────────────────────────────────────────────────────────────────────
    if arguments.taxonomy is not None:
        origin = f"from {arguments.taxonomy}"
        try:
            taxonomy = Taxonomy.from_file(arguments.taxonomy, separator)
        except TaxonomyError as error:
            raise InputError(f"--taxonomy: {error}") from error
    elif taxonomy is not None:
        if separator != taxonomy.separator:
            raise InputError(
                f"--label_separator {separator!r} is not the checkpoint's, {taxonomy.separator!r}: leave it out"
            )
        origin, remedy = "the checkpoint's", "; for new classes give a whole new --taxonomy"
    elif _has_all_labels(default := Taxonomy(DEFAULT_TAXONOMY, separator), names.values()):
        taxonomy, origin = default, "the default, of the Medical Abstracts corpus"
    else:
        _refuse_unknown_codes(codes, places)
        for label, place in places.items():
            _refuse_written_list(label, place, arguments.label_delimiter)
        taxonomy, origin = _from_labels(names, places, num_rows, where, separator), FROM_LABELS
    counts = len(taxonomy.children(-1)), taxonomy.num_leaves, taxonomy.depth
    logger.info("taxonomy: %s: %d roots, %d leaves, %d levels", origin, *counts)

    # ── Look up the labels ───────────────────────────────────────────────────────────────────────────────────────────
    nodes, lookup = {}, _lookup(taxonomy)
    for label, name in names.items():
        try:
            nodes[label] = _node(taxonomy, lookup, name)
        except TaxonomyError as error:
            if name == label:
                _refuse_unknown_codes(codes, {label: places[label]})
            _refuse_written_list(label, places[label], arguments.label_delimiter)
            advice = _advice_on_names(label, lookup, taxonomy.separator) if isinstance(label, str) else ""
            raise InputError(f"{places[label]}: {error}{advice or remedy}") from error
    return taxonomy, origin, nodes


def _refuse_written_list(label: Label, place: str, delimiter: str | None) -> None:
    if _is_written_list(label, delimiter):
        raise InputError(f"{place}: {WRITTEN_LIST}")


def _advice_on_names(label: str, lookup: Container[Label], separator: str) -> str:
    """Return advice on an unknown label that is a number, or several known names; otherwise an empty text."""
    if label.isdecimal():
        return "; if it is a code, give --class_names"
    for delimiter in DELIMITERS:
        parts = [part.strip() for part in label.split(delimiter)]
        if (
            len(parts) > 1
            and delimiter != separator.strip()
            and (tuple(parts) in lookup or all(part in lookup for part in parts))
        ):
            return f"; it holds several names: {_advice_on_delimiter(label, delimiter)}"
    return ""


def _advice_on_delimiter(label: str, delimiter: str) -> str:
    """Return advice on the flags that split a label with several names at its delimiter."""
    separator = f" {delimiter} " if f" {delimiter} " in label else delimiter
    return (
        f"for a path give --label_separator {separator!r}, for several labels of a text --label_delimiter {delimiter!r}"
    )


def warn_of_odd_names(columns: list[str], taxonomy: Taxonomy, are_levels: bool) -> None:
    """Warn if names or paths of a taxonomy from the labels suggest that labels were misread or misspelt.

    ``are_levels`` says whether the columns are the levels of a path.
    """
    where = f"column {quote_name(' '.join(columns))}"
    # ── Names of several classes ─────────────────────────────────────────────────────────────────────────────────────
    names, warning = sorted({*taxonomy.names}), f"{where}: %s and %d more labels hold several names: %s"
    for delimiter in DELIMITERS:
        parts_of = {name: [part.strip() for part in name.split(delimiter)] for name in names}
        counts = Counter(chain.from_iterable(map(set, parts_of.values())))
        several = {name: parts for name, parts in parts_of.items() if len(parts) > 1 and all(parts)}
        if delimiter in PATH_DELIMITERS:
            shared = [name for name, parts in several.items() if counts[parts[0]] > 1]  # paths share their roots
        elif delimiter == ",":  # which many names hold, such as "Leukemia, B-Cell"
            shared = [name for name, parts in several.items() if parts_of.keys() >= {*parts}]
        else:
            shared = [name for name, parts in several.items() if all(counts[part] > 1 for part in parts)]
        if len(shared) > 1 and 2 * len(shared) >= len(several):
            advice = _advice_on_delimiter(shared[0], delimiter)
            logger.warning(warning, quote_name(shared[0]), len(shared) - 1, advice)
            break

    # ── Names that hold the separator, and names in two spellings ────────────────────────────────────────────────────
    inner = range(taxonomy.num_leaves, taxonomy.num_nodes)
    if not are_levels and inner and all(len(taxonomy.children(node)) == 1 for node in inner):
        path = quote_name(taxonomy.separator.join(taxonomy.path_names(taxonomy.children(inner[0])[0])))
        logger.warning("%s: %s is read as a path: if it is one name, give another --label_separator", where, path)
    spellings: dict[tuple[str, ...], tuple[str, ...]] = {}
    for path_names in taxonomy.node_of_path:
        other = spellings.setdefault(tuple(map(normalise_text, path_names)), path_names)
        if other != path_names:
            both = " and ".join(quote_name(taxonomy.separator.join(names)) for names in (other, path_names))
            differ = "differ in case, spaces or invisible characters only, and are separate classes"
            logger.warning("%s: the labels %s %s", where, both, differ)
            break

    # ── Columns of several labels, read as paths ─────────────────────────────────────────────────────────────────────
    reversible = [path for path in taxonomy.node_of_path if len({*path}) > 1 and path[::-1] in taxonomy.node_of_path]
    if are_levels and reversible:
        path_names = reversible[0]
        both = " and ".join(quote_name(taxonomy.separator.join(names)) for names in (path_names, path_names[::-1]))
        advice = "if a text has several labels, join the columns to one, and give --label_delimiter"
        logger.warning("%s: read as the levels of a path, with both %s: %s", where, both, advice)


def _refuse_unknown_codes(codes: dict[str, str], places: dict[Label, str]) -> None:
    """Raise InputError if there are codes, and a label has a level that is neither a code nor the name of one."""
    known = {*codes, *codes.values()}
    for label, place in places.items():
        if codes and not known.issuperset([label] if isinstance(label, str) else label):
            problem = "is neither a code nor a name of --class_names"
            raise InputError(f"{place}: the label {quote_name(label)} {problem}")


def read_class_names(path_or_json: str) -> dict[str, str]:
    """Read the names of coded labels from a JSON object, or from a ``.csv`` or ``.tsv`` file.

    The code column is ``code`` or ``label``, the name column ``name`` or ``condition_name``. If one has none of these names,
    the first remaining column is used.
    """
    where = "--class_names"
    if path_or_json.lstrip().startswith("{"):
        try:
            pairs = json.loads(path_or_json, object_pairs_hook=list)
        except json.JSONDecodeError as error:
            raise InputError(f"{where} is not JSON: {error}") from error
    else:
        where += f" {path_or_json}"
        source = Source(path_or_json, kind_of(path_or_json))
        if source.kind not in ("csv", "tsv"):
            raise InputError(f"{where}: expected a .csv or .tsv file (code, name), or a JSON object")
        table = read_table(source).columns
        if len(table) < 2:
            raise InputError(f"{where}: expected two columns, code and name")
        shares = dict.fromkeys(table, 1.0)
        by_name = [find_column(shares, None, known) for known in (("code", "label"), ("name", "condition_name"))]
        others = [column for column in table if column not in by_name]
        code, name = (others.pop(0) if column is None else column for column in by_name)
        pairs = list(zip(table[code], table[name], strict=True))
    names: dict[str, str] = {}
    for code, name in pairs:
        if not isinstance(name, str) or not name.strip() or not code.strip():
            raise InputError(f"{where}: the code {quote_name(code)} needs a name, a text")
        code, name = to_nfc(code.strip()), to_nfc(name.strip())
        if names.setdefault(code, name) != name:
            both = " and ".join(map(quote_name, (names[code], name)))
            raise InputError(f"{where}: the code {quote_name(code)} has two names: {both}")
    return names


def _from_labels(
    names: dict[Label, Label], places: dict[Label, str], num_rows: int, where: str, separator: str
) -> Taxonomy:
    """Build the taxonomy from the labels' paths, in sorted order."""
    path_of = {label: _path(name, separator) for label, name in names.items()}
    for label, path in path_of.items():
        if not all(path):
            raise InputError(f"{places[label]}: the label {quote_name(label)} has an empty name in its path")
    paths = sorted({*path_of.values()})
    if len(paths) == 1:
        only = quote_name(separator.join(paths[0]))
        raise InputError(f"{where}: the only label is {only}; at least two are needed")
    is_text = [any(len(x) > SHOWN_CHARACTERS or len(x.split()) > SHOWN_WORDS for x in path) for path in paths]
    if 2 * sum(is_text) > len(paths) > num_rows / 2:  # nothing to learn, and the model would publish the texts
        problem = f"{sum(is_text)} of {len(paths)} labels are texts, not names of classes"
        raise InputError(f"{where}: {problem}; give another --label_column, or --taxonomy")
    try:
        return Taxonomy.from_paths(paths, separator)
    except TaxonomyError as error:
        raise InputError(f"{where}: the labels do not make a taxonomy: {error}") from error


def _path(label: Label, separator: str) -> tuple[str, ...]:
    """Return the names in a label from the root down. A leading separator marks a root whose name is not unique."""
    if isinstance(label, tuple):
        return label
    # white space around a label was removed, also at the beginning or the end of a separator " > "
    label = label.removeprefix(separator.lstrip()) + separator[len(separator.rstrip()) :]
    return tuple(part.strip() for part in label.split(separator))


def _lookup(taxonomy: Taxonomy) -> dict[Label, int]:
    """Map full paths and unique labels to node ids."""
    lookup: dict[Label, int] = {label.strip(): node for node, label in enumerate(taxonomy.labels)}
    return lookup | taxonomy.node_of_path


def _node(taxonomy: Taxonomy, lookup: dict[Label, int], label: Label) -> int:
    """Return the node id of a label, or raise TaxonomyError if there is none or several nodes have it."""
    if label in lookup:
        return lookup[label]
    if isinstance(label, str):
        path = _path(label, taxonomy.separator)
        return lookup[path] if taxonomy.separator in label and path in lookup else taxonomy.id(label)
    path = taxonomy.path_names(taxonomy.id(taxonomy.separator.join(label)))
    problem = f"the label columns must name the path from the root, which is {quote_name(path)}"
    raise TaxonomyError(f"{problem}, not {quote_name(label)}")


def _has_all_labels(taxonomy: Taxonomy, labels: Iterable[Label]) -> bool:
    """Return whether each label names exactly one node of a taxonomy."""
    lookup = _lookup(taxonomy)
    try:
        for label in labels:
            _node(taxonomy, lookup, label)
    except TaxonomyError:
        return False
    return True
