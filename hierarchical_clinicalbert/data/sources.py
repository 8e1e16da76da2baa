"""Read the rows of the splits from files and data sets: find the sources, choose their columns,
read texts and labels.
"""

import hashlib
import logging
from collections.abc import Callable, Container, Mapping
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
from hierarchical_clinicalbert.connection import go_offline_without_hub
from hierarchical_clinicalbert.data.arguments import SHARE, DataArguments
from hierarchical_clinicalbert.data.label_forms import (
    WRITTEN_LIST,
    Label,
    ManyNodesRows,
    OnePathRows,
    RowForm,
    is_written_list,
    read_indicator,
)
from hierarchical_clinicalbert.data.report import SPLITS
from hierarchical_clinicalbert.data.tables import place, read_table, refuse_rows
from hierarchical_clinicalbert.errors import InputError, as_input_error
from hierarchical_clinicalbert.files import sha256
from hierarchical_clinicalbert.reading.columns import (
    LABEL_COLUMNS,
    TEXT_COLUMNS,
    choose_columns,
    text_problem,
)
from hierarchical_clinicalbert.reading.rows import FOLDER
from hierarchical_clinicalbert.reading.sources import (
    SAVED_BY_DATASETS,
    Source,
    find_sources,
    kind_of,
    open_rows,
)
from taxonomy_hierarchical import quote_name

logger = logging.getLogger(__name__)

ALL = "all"  # in place of a split: a source that is to be split into all splits
SPLIT_ALIASES = {"valid": "validation", "val": "validation", "dev": "validation"}


@dataclass(frozen=True)
class SplitSource:
    """A file or data set with the rows of one split or of all splits."""

    name: str  # in messages
    columns: list[str]
    read: Callable[[list[str]], pd.DataFrame]  # takes the names of columns, see `read_table`
    sha256: dict[str, str]
    dataset: str | None = None  # id on the Hub

    def describe(self, split: str) -> dict[str, Any]:
        """Return an entry of `SourceRows.sources`."""
        about = {"name": self.name, "dataset": self.dataset, "sha256": self.sha256}
        return {"split": split} | about


@dataclass(frozen=True)
class SourceRows:
    """The rows of all sources, with usable texts, and labels as written."""

    rows: pd.DataFrame  # columns split, row, text, and labels, tuples of names
    places: dict[Label, str]  # of each label's first occurrence, for messages
    form: RowForm
    columns: list[str]  # the text column, then the label columns
    sources: list[dict[str, Any]]  # section of data_report.json
    shares: dict[str, float]  # of the texts, to split off
    unlabelled: list[str]  # texts of --unlabelled_file


def read_sources(
    arguments: DataArguments,
    trains: bool = True,
    in_memory: Mapping[str, SplitSource] | None = None,
) -> SourceRows:
    """Read and check the rows that the arguments name, beside those ``in_memory``. Only a data set
    on the Hub needs the network.

    A run that only scores, without ``trains``, reads no training rows if there are others. A run
    with a taxonomy needs no rows.
    """
    # ── Sources and their columns ─────────────────────────────────────────────────────────────────
    needs_rows = not (in_memory or (trains and arguments.taxonomy))
    sources = find_split_sources(arguments, needs_rows) | dict(in_memory or {})
    unlabelled: list[str] = []
    described: list[dict[str, Any]] = []
    if arguments.unlabelled_file is not None:
        unlabelled, source = read_texts(arguments.unlabelled_file, arguments)
        described.append(source.describe("unlabelled"))
    if not sources:
        rows = pd.DataFrame({"split": [], "row": [], "text": [], "labels": []}, dtype=object)
        return SourceRows(rows, {}, choose_form([], [], arguments), [], described, {}, unlabelled)
    if not trains and len(sources) > 1:
        sources.pop("train", None)
    shares = find_shares(arguments, sources)
    columns = find_columns(list(sources.values()), arguments)
    first = next(iter(columns.values()))  # other sources may use another case
    logger.info(
        "columns: text %s, label %s", quote_name(first[0]), ", ".join(map(quote_name, first[1:]))
    )

    # ── Rows ──────────────────────────────────────────────────────────────────────────────────────
    tables = {split: source.read(columns[source.name]) for split, source in sources.items()}
    cells = chain.from_iterable(table[name] for table in tables.values() for name in [*table][1:])
    form = choose_form(list(cells), first[1:], arguments)
    parts: list[pd.DataFrame] = []
    places: dict[Label, str] = {}
    for split, table in tables.items():
        text_column, *label_columns = table
        refuse_rows(table, [text_column], map(text_problem, table[text_column]))
        for name in label_columns:
            refuse_rows(
                table,
                [name],
                (WRITTEN_LIST if is_written_list(cell) else None for cell in table[name]),
            )
        labels = form.read(table, label_columns, arguments.label_delimiter)
        for row, row_labels in enumerate(labels):
            for label in row_labels:
                if label not in places:
                    places[label] = place(table, row, label_columns)
        rows = pd.DataFrame({"row": np.arange(len(table)), "text": table[text_column].array})
        rows.insert(0, "split", "train" if split == ALL else split)
        rows["labels"] = pd.Series(labels, dtype=object)  # tuples
        parts.append(rows)
        described.append(sources[split].describe(split))
    return SourceRows(
        pd.concat(parts, ignore_index=True), places, form, first, described, shares, unlabelled
    )


def read_texts(
    path: str,
    arguments: DataArguments,
    flag: str = "--text_column",
) -> tuple[list[str], SplitSource]:
    """Read the texts of a file that is no split.

    ``flag`` is what messages advise to give if there is no column of texts.
    """
    source = _from_file(path, arguments.encoding)
    columns = choose_columns(
        {source.name: source.columns}, arguments.text_column, TEXT_COLUMNS, flag
    )
    table = source.read(columns)
    refuse_rows(table, columns, map(text_problem, table[columns[0]]))
    return [*table[columns[0]]], source


# ── Sources ───────────────────────────────────────────────────────────────────────────────────────


def find_split_sources(arguments: DataArguments, needs_rows: bool) -> dict[str, SplitSource]:
    """Return the source of each split, or the one of `ALL` splits."""
    # ── Which source is given ─────────────────────────────────────────────────────────────────────
    files = {
        split: path for split in SPLITS if (path := getattr(arguments, f"{split}_file")) is not None
    }
    others = [
        name for name in ("dataset_name", "data_path") if getattr(arguments, name) is not None
    ]
    if not others and not files:
        if not needs_rows:
            return {}
        advice = "or --taxonomy for a classifier without examples"
        raise InputError(
            "no data: give --dataset_name, --data_path, or --train_file, "
            f"--validation_file, --test_file, {advice}"
        )
    if len(others) + bool(files) > 1:
        flags = " and ".join(
            f"--{name}" for name in [*others, *(f"{split}_file" for split in files)]
        )
        raise InputError(f"{flags} contradict each other: give one source")
    for name in ("dataset_config_name", "dataset_revision"):
        if getattr(arguments, name) is not None and arguments.dataset_name is None:
            raise InputError(f"--{name} needs --dataset_name")

    # ── Files ─────────────────────────────────────────────────────────────────────────────────────
    if files:
        return {split: _from_file(path, arguments.encoding) for split, path in files.items()}
    name = arguments.dataset_name or arguments.data_path or ""
    if arguments.dataset_name is None and not any(
        Path(name, file).exists() for file in SAVED_BY_DATASETS
    ):
        return {ALL: _from_file(name, arguments.encoding)}

    # ── Data sets ─────────────────────────────────────────────────────────────────────────────────
    if arguments.dataset_name is None:
        with as_input_error(f"cannot load --data_path {name}"):
            loaded = datasets.load_from_disk(name)
    else:
        what = (
            f"cannot load --dataset_name {name} (revision {arguments.dataset_revision or 'main'})"
        )
        # `datasets` then looks in its cache
        if not Path(name).exists() and (problem := go_offline_without_hub()):
            what += (
                f": {problem}; give --train_file or --data_path, or a data set that is in the cache"
            )
        with as_input_error(what):
            loaded = _load_dataset(name, arguments.dataset_config_name, arguments.dataset_revision)
    if isinstance(loaded, datasets.Dataset):
        return {ALL: from_dataset(name, loaded)}
    hub_id = None if Path(name).exists() else name  # --dataset_name may be a folder, too
    sources: dict[str, SplitSource] = {}
    for key, dataset in loaded.items():
        split = SPLIT_ALIASES.get(key, key)
        if split in sources:
            raise InputError(f"{name} has several splits that mean {split}: {', '.join(loaded)}")
        if split not in SPLITS:
            logger.warning("%s: the split %r is not used", name, key)
        else:
            sources[split] = from_dataset(f"{Path(name)} [{key}]", dataset, hub_id)
    if not sources:
        raise InputError(
            f"{name} has no split called train, validation or test, only {', '.join(loaded)}"
        )
    return sources


def _load_dataset(name: str, config_name: str | None, revision: str | None) -> datasets.DatasetDict:
    """Load a data set.

    `datasets` infers the types of CSV files, 007 as 7 and NA as missing, unless they are declared.
    """
    given = {"name": config_name, "revision": revision}
    builder = datasets.load_dataset_builder(name, **given)
    loaded = datasets.load_dataset(name, **given)
    if isinstance(builder.config, CsvConfig) and builder.info.features is None:
        columns = next(iter(loaded.values())).column_names
        features = datasets.Features(dict.fromkeys(columns, datasets.Value("string")))
        return datasets.load_dataset(name, **given, features=features, keep_default_na=False)
    return loaded


def from_dataset(name: str, dataset: datasets.Dataset, hub_id: str | None = None) -> SplitSource:
    """Return the source of a data set. ``name`` is for messages."""
    if not len(dataset):
        raise InputError(f"{name} has no rows")

    def read(names: list[str]) -> pd.DataFrame:
        arrow = dataset.select_columns(names).with_format("arrow")[:]
        index = pd.RangeIndex(1, len(dataset) + 1, name=f"{name}, row")
        return _with_class_names(
            pd.DataFrame(arrow.to_pydict(), index, dtype=object), dataset.features
        )

    hashes = sha256(Path(file["filename"]) for file in dataset.cache_files)
    return SplitSource(name, dataset.column_names, read, hashes, hub_id)


def _with_class_names(table: pd.DataFrame, features: Mapping[str, Any]) -> pd.DataFrame:
    """Replace the numbers in columns of ClassLabel, or of lists of it, by its names."""
    for column in table:
        feature = getattr(features.get(column), "feature", features.get(column))
        if isinstance(feature, datasets.ClassLabel):
            name_of = dict(enumerate(feature.names)).get  # a missing label is None, or stored as -1
            cells = [
                [*map(name_of, cell)] if isinstance(cell, list) else name_of(cell)
                for cell in table[column]
            ]
            table[column] = pd.Series(cells, table.index, dtype=object)
    return table


def _from_file(path: str, encoding: str | None) -> SplitSource:
    if not Path(path).is_dir():
        source = Source(path, kind_of(path), encoding=encoding or "utf-8")
    else:
        source = find_sources(path, encoding=encoding)[0]
        if source.kind != FOLDER:
            raise InputError(
                f"{path} is not a folder saved by `datasets`, nor one of .txt files alone: "
                "give one file"
            )
    with open_rows(source) as rows:
        columns = rows.columns
    features: Mapping[str, Any] = {}
    if source.kind == "parquet" and b"huggingface" in (
        (schema := pyarrow.parquet.read_schema(path)).metadata or {}
    ):
        features = datasets.Features.from_arrow_schema(schema)  # as `datasets` stored them

    def read(names: list[str]) -> pd.DataFrame:
        return _with_class_names(read_table(source, names), features)

    if source.kind != FOLDER:
        return SplitSource(path, columns, read, sha256([Path(path)]))
    files = [(source.name_of(file), sha256([Path(file)])) for file in source.files]
    # one for all, because there may be thousands
    combined = hashlib.sha256(repr(files).encode()).hexdigest()
    return SplitSource(path, columns, read, {Path(path).name: combined})


def find_shares(arguments: DataArguments, sources: Container[str]) -> dict[str, float]:
    """Return the share of the texts to split off for each split without a source.

    ``sources`` are the splits with a source, or `ALL`. InputError: a share has no effect, or they
    are too large.
    """
    given = {"test": arguments.test_size, "validation": arguments.validation_size}
    is_whole = ALL in sources
    can_split = {
        "test": is_whole,
        "validation": is_whole or ("train" in sources and "validation" not in sources),
    }
    for split, size in given.items():
        if size and not can_split[split]:
            raise InputError(
                f"--{split}_size has no effect here, as the data are given by split: leave it out"
            )
    shares = {
        split: SHARE if size is None else size for split, size in given.items() if can_split[split]
    }
    if min(shares.values(), default=0) < 0 or sum(shares.values()) >= 1:
        shown = " and ".join(f"{share:g}" for share in shares.values())
        problem = f"must be shares of the rows with a sum below 1, not {shown}"
        raise InputError(f"--test_size and --validation_size {problem}")
    return {split: share for split, share in shares.items() if share}


# ── Columns ───────────────────────────────────────────────────────────────────────────────────────


def find_columns(sources: list[SplitSource], arguments: DataArguments) -> dict[str, list[str]]:
    """Choose the columns of each source: its text column, then its label columns, by the
    source's name.
    """
    requested: list[Any] = arguments.label_column or [None]
    columns = {source.name: source.columns for source in sources}
    texts = choose_columns(columns, arguments.text_column, TEXT_COLUMNS, "--text_column")
    labels = [choose_columns(columns, name, LABEL_COLUMNS, "--label_column") for name in requested]
    chosen = {source: list(names) for source, *names in zip(columns, texts, *labels, strict=True)}
    if both := next(
        (text for text, *label_columns in chosen.values() if text in label_columns), None
    ):
        raise InputError(
            f"the column {quote_name(both)} cannot be both --text_column and --label_column"
        )
    return chosen


# ── Form of the labels ────────────────────────────────────────────────────────────────────────────


def choose_form(cells: list[Any], columns: list[str], arguments: DataArguments) -> RowForm:
    """Return the form of the labels, given the cells of all label columns, or raise InputError
    if it is not clear.
    """
    delimiter = arguments.label_delimiter
    has_lists = any(isinstance(cell, list) for cell in cells)
    if arguments.problem_type == SINGLE_LABEL and (has_lists or delimiter is not None):
        contradiction = (
            "the label column holds lists" if has_lists else "--label_delimiter is given"
        )
        raise InputError(
            f"--problem_type {SINGLE_LABEL} means one label per text, but {contradiction}"
        )
    if has_lists and arguments.problem_type is None:
        logger.info(
            "the label column holds lists: any number of labels per text (--problem_type %s)",
            MULTI_LABEL,
        )
    # do 0 and 1 name classes, or do they say yes and no?
    if len(columns) > 1 and arguments.problem_type is None:
        values = {read_indicator(cell) for cell in cells if cell not in (None, "")}
        if values and None not in values:
            advice = (
                f"give --problem_type {MULTI_LABEL}, or {SINGLE_LABEL} if they name the levels "
                "of a path"
            )
            raise InputError(
                f"the label columns {', '.join(map(quote_name, columns))} hold 0 and 1 "
                f"alone: {advice}"
            )
    is_multi_label = has_lists or delimiter is not None or arguments.problem_type == MULTI_LABEL
    return ManyNodesRows() if is_multi_label else OnePathRows()
