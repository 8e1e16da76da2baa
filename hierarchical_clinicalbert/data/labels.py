"""Choose the taxonomy, and map labels to its nodes.

Names are one class if `normalise` makes them equal. Where both are known, the exact name decides.

A string that does not look like a name may be a text about a patient. Error messages report only
its length.
"""

import json
import logging
import re
from collections import Counter
from itertools import chain

import pandas as pd

from hierarchical_clinicalbert.data.arguments import DataArguments
from hierarchical_clinicalbert.data.label_forms import Label
from hierarchical_clinicalbert.data.sources import SourceRows
from hierarchical_clinicalbert.data.tables import read_table
from hierarchical_clinicalbert.data.taxonomy_files import read_taxonomy
from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.reading.columns import find_column, listed
from hierarchical_clinicalbert.reading.sources import Source, kind_of
from taxonomy_hierarchical import (
    DEFAULT_TAXONOMY,
    SHOWN_CHARACTERS,
    SHOWN_WORDS,
    Taxonomy,
    TaxonomyError,
    list_names,
    normalise,
    quote_name,
    to_nfc,
)

logger = logging.getLogger(__name__)

CODES_AND_NAMES = ("code", "label"), ("name",)  # columns of --class_names
FROM_LABELS = "from the labels"  # the origin of a taxonomy that is built from them


def resolve_labels(
    source: SourceRows, arguments: DataArguments, taxonomy: Taxonomy | None
) -> tuple[pd.DataFrame, Taxonomy, str]:
    """Choose the taxonomy, and map the labels to its nodes. ``taxonomy`` is a checkpoint's;
    --taxonomy replaces it.

    Returns:
        The rows, with the columns split, row, text, and nodes: ascending tuples of node ids. The
        taxonomy, and where it is from.
    """
    places = source.places
    where = f"column {quote_name(' '.join(source.columns[1:]))}"
    if not places and taxonomy is None and arguments.taxonomy is None:
        raise InputError(f"{where}: no row has a label")
    separator = arguments.label_separator
    if separator is None:
        separator = taxonomy.separator if taxonomy else "/"
    if (
        arguments.label_delimiter is not None
        and arguments.label_delimiter.strip() == separator.strip()
    ):
        raise InputError(
            f"--label_delimiter must differ from --label_separator, which is {separator!r}"
        )
    codes = read_class_names(arguments.class_names)
    codes = {normalise(code): name for code, name in codes.items()} | codes

    def name_of(code: str) -> str:
        return codes.get(code, codes.get(normalise(code), code))

    names: dict[Label, Label] = {}
    for label in places:
        names[label] = name_of(label) if isinstance(label, str) else tuple(map(name_of, label))

    def find_nodes(taxonomy: Taxonomy) -> dict[Label, int]:
        nodes = {}
        for label, name in names.items():
            try:
                nodes[label] = find_node(taxonomy, name)
            except TaxonomyError as error:
                raise InputError(f"{places[label]}: {error}") from error
        return nodes

    # ── Choose the taxonomy ───────────────────────────────────────────────────────────────────────
    if arguments.taxonomy is not None:
        taxonomy = read_taxonomy(arguments.taxonomy, separator)
        origin = f"from {arguments.taxonomy}"
    elif taxonomy is not None:
        origin = "the model's"
    else:
        try:
            taxonomy = Taxonomy(DEFAULT_TAXONOMY, separator)
            origin = "the default, of the Medical Abstracts corpus"
            find_nodes(taxonomy)
        except InputError:
            known = {*codes, *map(normalise, codes.values())}
            for label, place in places.items():
                parts = [label] if isinstance(label, str) else label
                if codes and not known.issuperset(map(normalise, parts)):
                    problem = "is neither a code nor a name of --class_names"
                    raise InputError(f"{place}: the label {quote_name(label)} {problem}") from None
            taxonomy = build_from_labels(names, source, where, separator)
            origin = FROM_LABELS
    counts = len(taxonomy.children(-1)), taxonomy.num_leaves, taxonomy.depth
    logger.info("taxonomy: %s: %d roots, %d leaves, %d levels", origin, *counts)

    # ── Look up the labels ────────────────────────────────────────────────────────────────────────
    nodes = find_nodes(taxonomy)
    node_ids = [
        tuple(sorted({nodes[label] for label in labels})) for labels in source.rows["labels"]
    ]
    rows = source.rows.drop(columns="labels").assign(nodes=pd.Series(node_ids, dtype=object))
    return rows, taxonomy, origin


def find_node(taxonomy: Taxonomy, label: Label) -> int:
    """Return the node id of a label, or raise TaxonomyError if there is none or several nodes have
    it.
    """
    path = split_path(label, taxonomy.separator)
    is_path = isinstance(label, tuple) or taxonomy.separator in label or len(path) > 1
    node = taxonomy.find_path(path) if is_path else None
    if node is not None:
        return node
    if isinstance(label, tuple):
        problem = "the label columns must name the path from the root"
        raise TaxonomyError(f"{problem}, and {quote_name(label)} is none")
    return taxonomy.id(label)


def split_path(label: Label, separator: str) -> tuple[str, ...]:
    """Return the names in a label from the root down.

    A leading separator marks a root whose name is not unique.
    """
    if isinstance(label, tuple):
        return label
    # white space around a label was removed, also at the beginning or the end of a separator " > "
    label = label.removeprefix(separator.lstrip()) + separator[len(separator.rstrip()) :]
    any_space = r"\s+".join(map(re.escape, separator.split(" ")))  # such as a no-break space
    return tuple(part.strip() for part in re.split(any_space, label))


def build_from_labels(
    names: dict[Label, Label], source: SourceRows, where: str, separator: str
) -> Taxonomy:
    """Build the taxonomy from the paths in the labels, in sorted order.

    A name has its first form, in NFC, without format characters and with single spaces.
    """
    written = [split_path(name, separator) for name in names.values()]
    forms = dict.fromkeys(chain.from_iterable(written))
    shown = {normalise(form): normalise(form, "NFC") for form in reversed(forms)}
    paths = sorted({tuple(shown[normalise(name)] for name in path) for path in written})
    repeated = [shown[key] for key, count in Counter(map(normalise, forms)).items() if count > 1]
    if repeated:
        what = "labels in several forms that are equal in Unicode (NFKC), one class each"
        logger.info("%s: %s", what, list_names(repeated))
    is_text = [
        any(len(x) > SHOWN_CHARACTERS or len(x.split()) > SHOWN_WORDS for x in path)
        for path in paths
    ]
    # nothing to learn, and the model would publish the texts
    if 2 * sum(is_text) > len(paths) > len(source.rows) / 2:
        problem = f"{sum(is_text)} of {len(paths)} labels are texts, not names of classes"
        raise InputError(f"{where}: {problem}; give another --label_column, or --taxonomy")
    tree: dict[str, dict] = {}
    for path in paths:
        siblings = tree
        for name in path:
            siblings = siblings.setdefault(name, {})
    try:
        return Taxonomy(tree, separator)
    except TaxonomyError as error:
        raise InputError(f"{where}: the labels do not make a taxonomy: {error}") from error


def read_class_names(path_or_json: str | None, where: str = "--class_names") -> dict[str, str]:
    """Read the names of coded labels from a JSON object, or from a table with the columns of
    `CODES_AND_NAMES`. None: no names.
    """
    if path_or_json is None:
        return {}
    if path_or_json.lstrip().startswith("{"):
        try:
            pairs = json.loads(path_or_json, object_pairs_hook=list)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not JSON: {error}") from error
    else:
        where += f" {path_or_json}"
        table = read_table(Source(path_or_json, kind_of(path_or_json)))
        columns = [find_column([*table], None, candidates) for candidates in CODES_AND_NAMES]
        if None in columns:
            raise InputError(
                f"{where}: expected columns code (or label) and name, found {listed(table)}"
            )
        pairs = [*table[columns].itertuples(index=False)]
    names: dict[str, str] = {}
    for code, name in pairs:
        code = to_nfc(str(code).strip())
        name = to_nfc(name.strip()) if isinstance(name, str) else ""
        if not (code and name):
            missing = (
                f"the code {quote_name(code)} needs a name, a text"
                if code
                else f"{quote_name(name)} has no code"
            )
            raise InputError(f"{where}: {missing}")
        if names.setdefault(code, name) != name:
            both = " and ".join(map(quote_name, (names[code], name)))
            raise InputError(f"{where}: the code {quote_name(code)} has two names: {both}")
    return names
