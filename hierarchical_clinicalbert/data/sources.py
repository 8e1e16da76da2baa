"""Find the files and data sets of the splits, choose their columns and read their rows."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet
from datasets.packaged_modules.csv.csv import CsvConfig

from configuration_hierarchical import MULTI_LABEL, SINGLE_LABEL
from hierarchical_clinicalbert.connection import find_hub_problem
from hierarchical_clinicalbert.data.arguments import DataArguments
from hierarchical_clinicalbert.data.label_forms import ManyNodesRows, OnePathRows, RowForm
from hierarchical_clinicalbert.data.labels import Label, read_indicator, refuse_rows
from hierarchical_clinicalbert.data.report import SPLITS
from hierarchical_clinicalbert.errors import InputError, as_input_error
from hierarchical_clinicalbert.files import sha256
from hierarchical_clinicalbert.reading.columns import LABEL_COLUMNS, TEXT_COLUMNS, choose_columns, text_problem
from hierarchical_clinicalbert.reading.sources import Source, Table, kind_of, open_rows, read_table
from taxonomy_hierarchical import quote_name

logger = logging.getLogger(__name__)

SPLIT_ALIASES = {"valid": "validation", "val": "validation", "dev": "validation"}


@dataclass(frozen=True)
class SplitSource:
    """A file or data set with the rows of one split or of all splits."""

    name: str  # in messages
    columns: dict[str, float]  # see `reading.rows.Rows.columns`
    read: Callable[[list[str]], Table]  # takes the names of columns
    sha256: dict[str, str]
    dataset: str | None = None  # id on the Hub


def find_split_sources(arguments: DataArguments) -> tuple[dict[str, SplitSource], bool]:
    """Return the source of each split, and whether the only source, under ``train``, is to be split into all splits."""
    # ── Which source is given ────────────────────────────────────────────────────────────────────────────────────────
    files = {split: path for split in SPLITS if (path := getattr(arguments, f"{split}_file")) is not None}
    others = [name for name in ("dataset_name", "data_path") if getattr(arguments, name) is not None]
    if not others and not files:
        raise InputError("no data: give --dataset_name, --data_path, or --train_file, --validation_file, --test_file")
    if len(others) + bool(files) > 1:
        flags = " and ".join(f"--{name}" for name in [*others, *(f"{split}_file" for split in files)])
        raise InputError(f"{flags} contradict each other: give one source")
    for name in ("dataset_config_name", "dataset_revision"):
        if getattr(arguments, name) is not None and arguments.dataset_name is None:
            raise InputError(f"--{name} needs --dataset_name")

    # ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────
    if files:
        return {split: _from_file(path) for split, path in files.items()}, False
    name = arguments.dataset_name or arguments.data_path or ""
    if arguments.dataset_name is None and not Path(name).is_dir():
        return {"train": _from_file(name)}, True

    # ── Data sets ────────────────────────────────────────────────────────────────────────────────────────────────────
    if arguments.dataset_name is None:
        with as_input_error(f"--data_path {name} is not a folder saved by `datasets`"):
            loaded = datasets.load_from_disk(name)
    else:
        what = f"cannot load --dataset_name {name} (revision {arguments.dataset_revision or 'main'})"
        if not Path(name).exists() and (problem := find_hub_problem()):  # `datasets` then looks in its cache
            what += f": {problem}; give --train_file or --data_path, or a data set that is in the cache"
        with as_input_error(what):
            loaded = _load_dataset(name, arguments.dataset_config_name, arguments.dataset_revision)
    if isinstance(loaded, datasets.Dataset):
        return {"train": _from_dataset(name, loaded)}, True
    hub_id = None if Path(name).exists() else name  # --dataset_name may be a folder, too
    sources: dict[str, SplitSource] = {}
    for key, dataset in loaded.items():
        split = SPLIT_ALIASES.get(key, key)
        if split in sources:
            raise InputError(f"{name} has several splits that mean {split}: {', '.join(loaded)}")
        if split not in SPLITS:
            logger.warning("%s: the split %r is not used", name, key)
        else:
            sources[split] = _from_dataset(f"{Path(name)} [{key}]", dataset, hub_id)
    if not sources:
        raise InputError(f"{name} has no split called train, validation or test, only {', '.join(loaded)}")
    return sources, False


def _load_dataset(name: str, config_name: str | None, revision: str | None) -> datasets.DatasetDict:
    """Load a data set. `datasets` infers the types of CSV files, 007 as 7 and NA as missing, unless they are declared."""
    given = {"name": config_name, "revision": revision}
    builder, loaded = datasets.load_dataset_builder(name, **given), datasets.load_dataset(name, **given)
    if isinstance(builder.config, CsvConfig) and builder.info.features is None:
        columns = next(iter(loaded.values())).column_names
        features = datasets.Features(dict.fromkeys(columns, datasets.Value("string")))
        return datasets.load_dataset(name, **given, features=features, keep_default_na=False)
    if not isinstance(builder.config, CsvConfig) and builder.info.builder_name == "csv":
        logger.warning("%s is offline, and its cached types may be inferred ones: a label 007 would be 7", name)
    return loaded


def _from_dataset(name: str, dataset: datasets.Dataset, hub_id: str | None = None) -> SplitSource:
    if not len(dataset):
        raise InputError(f"{name} has no rows")

    def read(names: list[str]) -> Table:
        arrow = dataset.select_columns(names).with_format("arrow")[:]
        columns = {name: arrow.column(name).to_pylist() for name in names}
        table = Table(name, columns, [*range(1, len(dataset) + 1)], "row")
        return _with_class_names(table, dataset.features)

    hashes = sha256(Path(file["filename"]) for file in dataset.cache_files)
    return SplitSource(name, dict.fromkeys(dataset.column_names, 1.0), read, hashes, hub_id)


def _with_class_names(table: Table, features: Mapping[str, Any]) -> Table:
    """Replace the numbers in columns of ClassLabel by its names."""
    for column, values in table.columns.items():
        feature = features.get(column)
        feature = getattr(feature, "feature", feature)  # of the items, if the column holds lists
        if isinstance(feature, datasets.ClassLabel):
            table.columns[column] = _class_names(values, [*feature.names, None])  # a missing label is stored as -1
    return table


def _class_names(value: Any, classes: list[str | None]) -> Any:
    if isinstance(value, list):
        return [_class_names(item, classes) for item in value]
    return None if value is None else classes[value]


def _from_file(path: str) -> SplitSource:
    source = Source(path, kind_of(path))
    with open_rows(source) as rows:
        columns = rows.columns
    features: Mapping[str, Any] = {}
    if source.kind == "parquet" and b"huggingface" in ((schema := pyarrow.parquet.read_schema(path)).metadata or {}):
        features = datasets.Features.from_arrow_schema(schema)  # as `datasets` stored them

    def read(names: list[str]) -> Table:
        return _with_class_names(read_table(source, names), features)

    return SplitSource(path, columns, read, sha256([Path(path)]))


def find_columns(sources: Iterable[SplitSource], arguments: DataArguments) -> dict[str, list[str]]:
    """Choose the columns of each source: its text column, then its label columns, by the source's name."""
    requested: list[Any] = arguments.label_column or [None]
    if len(set(requested)) < len(requested):
        raise InputError(f"--label_column names a column twice: {' '.join(requested)}")
    columns = {source.name: source.columns for source in sources}
    texts = choose_columns(columns, arguments.text_column, TEXT_COLUMNS, "--text_column")
    labels = [choose_columns(columns, name, LABEL_COLUMNS, "--label_column") for name in requested]
    chosen = {source: list(names) for source, *names in zip(columns, texts, *labels, strict=True)}
    for text, *label_columns in chosen.values():
        if text in label_columns:
            raise InputError(f"the column {quote_name(text)} cannot be both --text_column and --label_column")
    return chosen


def read_rows(
    sources: dict[str, SplitSource], columns: dict[str, list[str]], arguments: DataArguments
) -> tuple[pd.DataFrame, dict[Label, str], RowForm]:
    """Read the columns of `find_columns` from all sources.

    Returns:
        The rows, with columns split, row, text and labels, tuples of names. The place of each distinct label's first
        occurrence. The form of the labels.
    """
    tables = [source.read(columns[source.name]) for source in sources.values()]
    # the cells of each label column, over all sources
    cells = [[*chain(*part)] for part in zip(*([*table.columns.values()][1:] for table in tables), strict=True)]
    form = choose_form({*map(type, chain(*cells))}, arguments)
    refuse_indicators(cells, next(iter(columns.values()))[1:], arguments)
    parts, places = [], dict[Label, str]()
    for (split, source), table in zip(sources.items(), tables, strict=True):
        text_column, *label_columns = columns[source.name]
        texts = table.columns[text_column]
        refuse_rows(table, text_column, map(text_problem, texts))
        labels = form.read(table, label_columns, arguments.label_delimiter)
        for i, of_row in enumerate(labels):
            for label in of_row:
                if label not in places:
                    places[label] = f"{table.place(i)}, column {quote_name(' '.join(label_columns))}"
        for name in form.classes_of_columns(label_columns):
            places.setdefault(name, f"{table.name}, column {quote_name(name)}")
        rows = pd.DataFrame({"split": split, "row": np.arange(len(texts))})
        # dtype object: labels are tuples, and texts are neither converted nor copied
        rows["text"], rows["labels"] = pd.Series(texts, dtype=object), pd.Series(labels, dtype=object)
        parts.append(rows)
    return pd.concat(parts, ignore_index=True), places, form


def refuse_indicators(cells: list[list[Any]], names: list[str], arguments: DataArguments) -> None:
    """Raise InputError if the label columns hold two values alone, such as 0 and 1, and their meaning is not clear."""
    shown = ", ".join(map(quote_name, names))
    delimiter = arguments.label_delimiter
    split = (
        cell.split(delimiter) if delimiter and isinstance(cell, str) and cell.strip() else cell
        for cell in chain(*cells)
    )
    lists = [cell for cell in split if isinstance(cell, list) and cell]
    if len({*map(len, lists)}) == 1 and len(lists[0]) > 1 and None not in map(read_indicator, chain(*lists)):
        advice = "give lists of the names of a text's labels, or one column per label"
        raise InputError(f"the lists of the column {shown} hold 0 and 1 alone: {advice}")
    if None in map(read_indicator, chain(*cells)):
        return
    if len(names) > 1 and arguments.problem_type is None:
        advice = f"give --problem_type {MULTI_LABEL}, or {SINGLE_LABEL} if they name the levels of a path"
        raise InputError(f"the columns {shown} hold 0 and 1 alone: {advice}")
    if len(names) == 1 and arguments.problem_type == MULTI_LABEL and not (arguments.class_names or arguments.taxonomy):
        advice = "give the names of a text's labels, or two or more columns, one per label"
        raise InputError(f"the column {shown} holds 0 and 1 alone: {advice}")


def choose_form(types: set[type], arguments: DataArguments) -> RowForm:
    """Return the form of the labels, given the types of the cells in the label columns."""
    has_lists, delimited = list in types, arguments.label_delimiter is not None
    if arguments.problem_type == SINGLE_LABEL and (has_lists or delimited):
        contradiction = "the label column holds lists" if has_lists else "--label_delimiter is given"
        raise InputError(f"--problem_type {arguments.problem_type} means one label per text, but {contradiction}")
    if has_lists and delimited and str not in types:
        raise InputError("the label column holds lists: leave out --label_delimiter")
    if has_lists and arguments.problem_type is None:
        logger.info("the label column holds lists: any number of labels per text (--problem_type %s)", MULTI_LABEL)
    return ManyNodesRows() if has_lists or delimited or arguments.problem_type == MULTI_LABEL else OnePathRows()
