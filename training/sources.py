"""The files and data sets that hold the splits: found, their columns chosen, their rows read.

Worth knowing:

1. Files are read by `reading`, which guesses nothing from a value. A CSV cell "NA" or "007" is that text.
2. A row that cannot be read, an empty text or a missing label is an error. Its message names the line where the row begins.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow
from huggingface_hub.errors import HfHubHTTPError

from errors import InputError
from reading.columns import LABEL_COLUMNS, TEXT_COLUMNS, choose_columns, text_problem
from reading.sources import Source, Table, kind_of, open_rows, read_table
from taxonomy_hierarchical import quote_name
from training.arguments import DataArguments
from training.data_report import SPLITS
from training.files import sha256
from training.labels import Label, read_labels, refuse_rows

logger = logging.getLogger(__name__)

SPLIT_ALIASES = {"valid": "validation", "val": "validation", "dev": "validation"}


@dataclass(frozen=True)
class SplitSource:
    """The file or data set that holds a split, or all of them.

    Attributes:
        name: what messages call it.
        columns: as `reading.rows.Rows.columns`.
        read: returns the columns that are wanted.
        sha256: the fingerprints of its files, by name.
    """

    name: str
    columns: dict[str, float]
    read: Callable[[list[str]], Table]
    sha256: dict[str, str]


def find_split_sources(arguments: DataArguments) -> tuple[dict[str, SplitSource], bool]:
    """Return the source of each split, and whether it is a single one, here under ``train``, that is to be split.

    Raises:
        InputError: there is none, they contradict each other, or one cannot be read.
    """
    files = {f"{split}_file": split for split in SPLITS if getattr(arguments, f"{split}_file") is not None}
    given = [name for name in ("dataset_name", "data_path") if getattr(arguments, name) is not None]
    if not given and not files:
        raise InputError("no data: give --dataset_name, --data_path, or --train_file, --validation_file, --test_file")
    if len(given) > 1 or (given and files):
        flags = " and ".join(f"--{name}" for name in [*given, *files])
        raise InputError(f"{flags} contradict each other: give one source")
    if arguments.dataset_revision is not None and arguments.dataset_name is None:
        raise InputError("--dataset_revision needs --dataset_name")

    if arguments.dataset_name is not None:
        return _named_splits(arguments.dataset_name, _load_from_hub(arguments)), False
    if arguments.data_path is None:
        return {split: _from_file(getattr(arguments, flag)) for flag, split in files.items()}, False
    if not Path(arguments.data_path).is_dir():
        return {"train": _from_file(arguments.data_path)}, True
    try:
        loaded = datasets.load_from_disk(arguments.data_path)
    except (OSError, ValueError, pyarrow.ArrowInvalid) as error:
        raise InputError(f"--data_path {arguments.data_path} is not a folder saved by `datasets`") from error
    if isinstance(loaded, datasets.DatasetDict):
        return _named_splits(arguments.data_path, loaded), False
    return {"train": _from_dataset(arguments.data_path, loaded)}, True


def _load_from_hub(arguments: DataArguments) -> datasets.DatasetDict:
    name, revision = arguments.dataset_name, arguments.dataset_revision
    try:
        return datasets.load_dataset(name, revision=revision)
    except (OSError, ValueError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot load --dataset_name {name} (revision {revision or 'main'}): {reason}") from error


def _named_splits(name: str, loaded: datasets.DatasetDict) -> dict[str, SplitSource]:
    sources: dict[str, SplitSource] = {}
    for key, dataset in loaded.items():
        split = SPLIT_ALIASES.get(key, key)
        if split in sources:
            raise InputError(f"{name} has several splits that mean {split}: {', '.join(loaded)}")
        if split in SPLITS:
            sources[split] = _from_dataset(f"{name} [{key}]", dataset)
        else:
            logger.warning("%s: the split %r is not used", name, key)
    if not sources:
        raise InputError(f"{name} has no split called train, validation or test, only {', '.join(loaded)}")
    return sources


def _from_dataset(name: str, dataset: datasets.Dataset) -> SplitSource:
    if not len(dataset):
        raise InputError(f"{name} has no rows")

    def read(wanted: list[str]) -> Table:
        arrow = dataset.select_columns(wanted).with_format("arrow")[:]
        columns = {column: arrow.column(column).to_pylist() for column in wanted}
        for column, values in columns.items():
            if isinstance(feature := dataset.features[column], datasets.ClassLabel):
                names = [*feature.names, None]  # None for -1, how `datasets` writes "no label"
                columns[column] = [None if value is None else names[value] for value in values]
        return Table(name, columns, [*range(1, len(dataset) + 1)], "row")

    fingerprints = sha256(Path(file["filename"]) for file in dataset.cache_files)
    return SplitSource(name, dict.fromkeys(dataset.column_names, 1.0), read, fingerprints)


def _from_file(path: str) -> SplitSource:
    source = Source(path, kind_of(path))
    with open_rows(source) as rows:
        columns = rows.columns
    return SplitSource(path, columns, partial(read_table, source), sha256([Path(path)]))


def find_columns(sources: Iterable[SplitSource], arguments: DataArguments) -> dict[str, list[str]]:
    """Return the column of texts and those of labels, by the name of the source.

    Raises:
        InputError: one is missing or named twice.
    """
    asked = arguments.label_column
    if asked is not None and len(set(asked)) < len(asked):
        raise InputError(f"--label_column names a column twice: {' '.join(asked)}")
    columns = {source.name: source.columns for source in sources}
    texts = choose_columns(columns, arguments.text_column, TEXT_COLUMNS, "--text_column")
    flags: list[str | None] = [None] if asked is None else [*asked]
    labels = [choose_columns(columns, name, LABEL_COLUMNS, "--label_column") for name in flags]
    chosen = {name: list(some) for name, *some in zip(columns, texts, *labels, strict=True)}
    for text, *others in chosen.values():
        if text in others:
            raise InputError(f"the column {quote_name(text)} cannot be both --text_column and --label_column")
    return chosen


def read_rows(sources: dict[str, SplitSource], columns: dict[str, list[str]]) -> tuple[pd.DataFrame, dict[Label, str]]:
    """Read all sources.

    Args:
        columns: as `find_columns` returns them.

    Returns:
        The rows: split, row, text, label. And each distinct label with the place where it stands first.
    """
    tables, places = [], dict[Label, str]()
    for split, source in sources.items():
        text_column, *label_columns = columns[source.name]
        table = source.read([text_column, *label_columns])
        texts = table.columns[text_column]
        refuse_rows(table, text_column, map(text_problem, texts))
        labels = read_labels(table, label_columns)
        for i, label in enumerate(labels):
            if label not in places:
                places[label] = f"{table.place(i)}, column {quote_name(' '.join(label_columns))}"
        rows = pd.DataFrame({"split": split, "row": np.arange(len(texts))})
        # as objects: the labels may be tuples, and the texts are wanted as they are, once
        rows["text"], rows["label"] = pd.Series(texts, dtype=object), pd.Series(labels, dtype=object)
        tables.append(rows)
    return pd.concat(tables, ignore_index=True), places
