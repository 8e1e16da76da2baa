"""Texts and labels, from files to token ids.

Worth knowing:

1. Two texts are the same when `normalise_text` makes the same of them. A text is in one split alone: training rows whose text
   is also in a validation or test file are dropped, and so are validation rows whose text is in the test file.
2. A text that an earlier run of a checkpoint was trained on is never scored: it goes to the training rows, or is left out.
3. A label becomes the id of a node of the taxonomy, a leaf or an inner node. Codes become names first.
4. Files are read by `reading`, which guesses nothing from a value. A row that cannot be read, an empty text or a missing
   label is an error. Its message names the line where the row begins, and shows no text.
5. The report counts what limits any classifier: duplicates, texts with several labels, and the accuracy these allow.
6. The column ``row`` counts the rows of a source from 0, without the header.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow
from huggingface_hub.errors import HfHubHTTPError
from transformers import BatchEncoding, PreTrainedTokenizerBase

from errors import InputError
from reading.columns import LABEL_COLUMNS, TEXT_COLUMNS, choose_columns, find_column, text_problem
from reading.sources import Source, Table, kind_of, open_rows, read_table
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
from training.data_report import (
    SPLITS,
    describe,
    length_report,
    log_what_was_done,
    parts,
    shared_texts,
    untrained_classes,
)
from training.files import sha256
from training.trained_texts import UNTRAINED, TrainedTexts, normalise_text, text_hash
from training.views import sentence_numbers

logger = logging.getLogger(__name__)

SPLIT_ALIASES = {"valid": "validation", "val": "validation", "dev": "validation"}
MISSING_LABEL = "the label is missing"
LONGEST_LABEL = 500  # characters; anything longer is a column of texts taken for labels
TOKEN_COLUMNS = ("input_ids", "attention_mask", "token_type_ids")

Label = str | tuple[str, ...]  # a name or path as written, or the names of several columns from the root down


@dataclass(frozen=True)
class LabelledSplits:
    """Data ready to be tokenized.

    Attributes:
        splits: ``train``, ``validation`` and ``test``, those there are, each with the columns ``text`` (str), ``label``
            (int, a node of the taxonomy) and ``row`` (int, its row in the source, from 0).
        taxonomy: the one that the labels are ids of.
        report: ready for JSON: ``sources`` with their SHA-256, ``columns``, where the ``taxonomy`` comes from, how the
            ``split`` was made, the counts of each of the ``splits`` (see `training.data_report.describe`), ``shared_texts`` of each two
            splits before any row was dropped, ``classes_without_training_rows``, and what was ``trained_before``: whether the
            ``scores`` are verified, the number of ``texts``, the ``rows`` of each split as given that have such a text, and
            where those of validation and test were ``moved``.
    """

    splits: datasets.DatasetDict
    taxonomy: Taxonomy
    report: dict


@dataclass(frozen=True)
class _Source:
    """A file or a data set.

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


def load_splits(
    arguments: DataArguments,
    seed: int,
    taxonomy: Taxonomy | None = None,
    trained: TrainedTexts = UNTRAINED,
) -> LabelledSplits:
    """Reads, checks and splits the data that the arguments name.

    Args:
        arguments: where the data are and what their labels mean.
        seed: makes the splits that have to be carved reproducible.
        taxonomy: that of a finished checkpoint. It takes precedence over ``arguments.taxonomy``.
        trained: the texts that the checkpoint has been trained on. Where they are not all known, no rows are carved.

    Raises:
        InputError: no source or contradictory ones, a file that cannot be read, missing texts or labels, a label that
            the taxonomy does not hold, too few rows to split.
    """
    _check_sizes(arguments)
    sources, single = _read_sources(arguments)
    columns = _choose_columns(sources.values(), arguments)
    text_column, *label_columns = next(iter(columns.values()))  # other sources may spell them in another case
    logger.info("columns: text %s, label %s", quote_name(text_column), ", ".join(map(quote_name, label_columns)))

    rows, places = _gather(sources, columns)
    taxonomy, origin, nodes = _resolve_labels(places, len(rows), label_columns, arguments, taxonomy)
    rows["label"] = [nodes[label] for label in rows["label"]]
    rows["text_id"], texts = pd.factorize(pd.Series(map(normalise_text, rows["text"]), dtype=object))
    rows["trained"] = _is_trained(rows, texts, trained)
    trained_before = _report_trained(rows, trained)
    rows = _move_trained(rows)
    rows, dropped = _drop_shared(rows)
    shares = _shares_to_carve(arguments, sources, single) if trained.complete else {}
    rows = _carve(rows, shares, seed)

    report = {
        "sources": [
            {"split": "all" if single else split, "name": source.name, "sha256": source.sha256}
            for split, source in sources.items()
        ],
        "columns": {"text": text_column, "label": label_columns},
        "taxonomy": origin,
        "split": {
            "method": "by class, identical texts kept together" if shares else "as given",
            "carved": shares,
            "seed": seed,
            # by which a resumed run knows the rows that it was trained on
            **({"train_rows_sha256": hash_of_rows(rows.loc[rows["split"] == "train", "row"])} if shares else {}),
        },
        "splits": {
            split: describe(part, taxonomy, int((dropped["split"] == split).sum()))
            for split, part in parts(rows).items()
        },
        "trained_before": trained_before,
        "shared_texts": shared_texts(pd.concat([rows, dropped])),
        "classes_without_training_rows": untrained_classes(rows, taxonomy),
    }
    log_what_was_done(report)
    return LabelledSplits(_to_datasets(rows), taxonomy, report)


def _gather(sources: dict[str, _Source], columns: dict[str, list[str]]) -> tuple[pd.DataFrame, dict[Label, str]]:
    """Read all sources.

    Args:
        columns: as `_choose_columns` returns them.

    Returns:
        The rows: split, row, text, label. And each distinct label with the place where it stands first.
    """
    tables, places = [], dict[Label, str]()
    for split, source in sources.items():
        text_column, *label_columns = columns[source.name]
        table = source.read([text_column, *label_columns])
        texts = table.columns[text_column]
        _refuse_rows(table, text_column, map(text_problem, texts))
        labels = _read_labels(table, label_columns)
        for i, label in enumerate(labels):
            if label not in places:
                places[label] = f"{table.place(i)}, column {quote_name(' '.join(label_columns))}"
        rows = pd.DataFrame({"split": split, "row": np.arange(len(texts))})
        # as objects: the labels may be tuples, and the texts are wanted as they are, once
        rows["text"], rows["label"] = pd.Series(texts, dtype=object), pd.Series(labels, dtype=object)
        tables.append(rows)
    return pd.concat(tables, ignore_index=True), places


def _refuse_rows(table: Table, column: str, problems: Iterable[str | None]) -> None:
    """Raise InputError if a row has a problem, naming the first one and the number of all."""
    found = [(i, problem) for i, problem in enumerate(problems) if problem is not None]
    if found:
        row, problem = found[0]
        others = f"; {len(found):,} rows cannot be used" if len(found) > 1 else ""
        raise InputError(f"{table.place(row)}, column {quote_name(column)}: {problem}{others}")


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _check_sizes(arguments: DataArguments) -> None:
    for flag in ("validation_size", "test_size"):
        if not 0 <= getattr(arguments, flag) < 1:
            raise InputError(f"--{flag} is a share of the rows, from 0 to below 1, not {getattr(arguments, flag)}")
    if arguments.validation_size + arguments.test_size >= 1:
        raise InputError(
            f"--validation_size {arguments.validation_size} and --test_size {arguments.test_size} "
            "leave nothing to train on"
        )


def _read_sources(arguments: DataArguments) -> tuple[dict[str, _Source], bool]:
    """What was given for each split, and whether it is one source, here under ``train``, that is to be split."""
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


def _named_splits(name: str, loaded: datasets.DatasetDict) -> dict[str, _Source]:
    sources: dict[str, _Source] = {}
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


def _from_dataset(name: str, dataset: datasets.Dataset) -> _Source:
    if not len(dataset):
        raise InputError(f"{name} has no rows")

    def read(wanted: list[str]) -> Table:
        arrow = dataset.with_format("arrow")[:]
        columns = {column: arrow.column(column).to_pylist() for column in wanted}
        for column, values in columns.items():
            if isinstance(feature := dataset.features[column], datasets.ClassLabel):
                names = [*feature.names, None]  # None for -1, how `datasets` writes "no label"
                columns[column] = [None if value is None else names[value] for value in values]
        return Table(name, columns, [*range(1, len(dataset) + 1)], "row")

    fingerprints = sha256(Path(file["filename"]) for file in dataset.cache_files)
    return _Source(name, dict.fromkeys(dataset.column_names, 1.0), read, fingerprints)


def _from_file(path: str) -> _Source:
    source = Source(path, kind_of(path))
    with open_rows(source) as rows:
        columns = rows.columns
    return _Source(path, columns, partial(read_table, source), sha256([Path(path)]))


# ── columns ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _choose_columns(sources: Iterable[_Source], arguments: DataArguments) -> dict[str, list[str]]:
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


def _read_labels(table: Table, columns: list[str]) -> list[Label]:
    """Return the labels of the rows: of one column as they are written, of several the path that they name."""
    levels = []
    for column in columns:
        labels = [_label_text(value) for value in table.columns[column]]
        _refuse_rows(table, column, map(_label_problem, labels))
        levels.append([label or "" for label in labels])
    name = " ".join(columns)
    if len(levels) == 1:
        _refuse_rows(table, name, (None if label else MISSING_LABEL for label in levels[0]))
        return list(levels[0])
    paths = list(zip(*levels, strict=True))
    ends = [next((i for i in range(len(path), 0, -1) if path[i - 1]), 0) for path in paths]
    _refuse_rows(table, name, (None if end else MISSING_LABEL for end in ends))
    paths = [path[:end] for path, end in zip(paths, ends, strict=True)]
    _refuse_rows(table, name, (None if all(path) else "the label has a gap above a filled level" for path in paths))
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


# ── labels ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _resolve_labels(
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
    """Codes and their names, from a ``.csv`` or ``.tsv`` file or from a JSON object.

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
    """The taxonomy that the labels of all splits span, in sorted order."""
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
    """The names of a label from the root down. A root whose name is not unique is written ``/root``."""
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


# ── splits ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _is_trained(rows: pd.DataFrame, texts: pd.Index, trained: TrainedTexts) -> np.ndarray:
    """Mask (N,) of the rows whose text an earlier run was trained on.

    Of rows that may be carved the runs before a resumed one count; of rows that were given its own part up to now counts too.
    """
    if not trained.all:
        return np.zeros(len(rows), dtype=bool)
    hashes = [text_hash(text) for text in texts]
    earlier, ever = (np.array([one in known for one in hashes]) for known in (trained.earlier, trained.all))
    ids = rows["text_id"].to_numpy()
    return np.where(rows["split"] == "train", earlier[ids], ever[ids])


def _report_trained(rows: pd.DataFrame, trained: TrainedTexts) -> dict[str, Any]:
    return {
        "scores": "verified" if trained.complete else "unverified",
        "texts": len(trained.earlier),
        "rows": {split: int(part["trained"].sum()) for split, part in parts(rows).items()},
        "moved": "to train" if (rows["split"] == "train").any() else "left out",
    }


def _move_trained(rows: pd.DataFrame) -> pd.DataFrame:
    """Has no row to be scored whose text was trained on: it becomes a training row or, where nothing is trained, goes."""
    held_out = rows["trained"] & (rows["split"] != "train")
    if not (rows["split"] == "train").any():
        return rows[~held_out].reset_index(drop=True)
    return rows.assign(split=rows["split"].where(~held_out, "train"))


def _drop_shared(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows that stay, and those whose text is also in a split that comes later: train, validation, test."""
    dropped = pd.Series(False, index=rows.index)
    for place, split in enumerate(SPLITS[:-1]):
        own, later = rows["split"] == split, rows["split"].isin(SPLITS[place + 1 :])
        shared = own & rows["text_id"].isin(rows.loc[later, "text_id"].unique())
        if own.any() and shared.sum() == own.sum():
            others = " or ".join(SPLITS[place + 1 :])
            raise InputError(f"every {split} text is also in {others}: nothing is left of the {split} rows")
        dropped |= shared
    return rows[~dropped].reset_index(drop=True), rows[dropped]


def hash_of_rows(numbers: pd.Series) -> str:
    return hashlib.sha256(np.sort(numbers.to_numpy(np.int64)).tobytes()).hexdigest()


def _shares_to_carve(arguments: DataArguments, sources: dict[str, _Source], single: bool) -> dict[str, float]:
    shares = {}
    if single and arguments.test_size:
        shares["test"] = arguments.test_size
    if "train" in sources and "validation" not in sources and arguments.validation_size:
        shares["validation"] = arguments.validation_size
    return shares


def _carve(rows: pd.DataFrame, shares: dict[str, float], seed: int) -> pd.DataFrame:
    """Moves shares of the training texts, each with all its rows, to other splits.

    Texts that an earlier run was trained on stay. Where too few others are left, the splits get their shares of these.
    """
    # scikit-learn's StratifiedGroupKFold loops over the groups, and knows only equal folds; its train_test_split
    # refuses a class with a single text, and fewer held-out texts than classes
    generator = np.random.default_rng(seed)
    rows = rows.copy()
    trained = rows.loc[rows["split"] == "train"].groupby("text_id")["trained"].any()
    counts = {split: round(share * len(trained)) for split, share in shares.items()}
    if trained.any() and (~trained).sum() < sum(counts.values()):
        counts = {split: count * int((~trained).sum()) // sum(counts.values()) for split, count in counts.items()}
    for split, count in counts.items():
        train = rows["split"] == "train"
        label_of = _most_common_labels(rows[train])
        may_not = trained[label_of.index].to_numpy()
        held_out = label_of.index[_sample(label_of.to_numpy(), count, split, generator, may_not)]
        rows.loc[train & rows["text_id"].isin(held_out), "split"] = split
    return rows


def _most_common_labels(rows: pd.DataFrame) -> pd.Series:
    """For each text id the label of most of its rows, the smallest where several are as common."""
    counts = rows.groupby(["text_id", "label"]).size().reset_index(name="rows")
    counts = counts.sort_values(["text_id", "rows", "label"], ascending=[True, False, True])
    return counts.drop_duplicates("text_id").set_index("text_id")["label"]


def _sample(
    strata: np.ndarray, count: int, split: str, generator: np.random.Generator, trained: np.ndarray
) -> np.ndarray:
    """Mask (N,) of ``count`` texts, drawn so that every stratum gives its share, rounded up or down, but never all it has.

    Texts that were trained on before (N,) stay. Where they are in the way of ``count``, as many as there can be are drawn.

    This is systematic sampling along the texts in order of their stratum (Cochran, Sampling Techniques, 1977,
    chapter 8). Strata of one text give none. A share of at most a half, rounded up, leaves a text of any other; of a larger
    share one text of each stratum is set aside beforehand.
    """
    order = generator.permutation(len(strata))
    rank = generator.permutation(strata.max() + 1)
    order = order[np.argsort(rank[strata[order]], kind="stable")]
    keeps = (np.bincount(strata, trained) > 0)[strata[order]]  # has a text that stays anyway
    several = ((np.bincount(strata)[strata[order]] > 1) | keeps) & ~trained[order]
    not_first = ((np.diff(strata[order], prepend=-1) == 0) | keeps) & ~trained[order]
    eligible = several if 2 * count <= several.sum() else not_first
    if trained.any():
        count = min(count, int(eligible.sum()))
        if not count:
            raise InputError(
                f"cannot carve {split} rows: the checkpoint was trained on {trained.sum():,} of {len(strata):,} distinct "
                f"training texts, and none of the others can be spared; give --{split}_file, or --{split}_size 0"
            )
    if not 0 < count <= eligible.sum():
        raise InputError(
            f"cannot carve {split} rows: {count} of {len(strata)} distinct training texts, of which one a class must "
            f"stay; change --{split}_size, or 0 for no {split} rows"
        )
    ticks = np.floor(np.cumsum(eligible) * (count / eligible.sum()) + 0.5)
    mask = np.zeros(len(strata), dtype=bool)
    mask[order] = np.diff(ticks, prepend=0) > 0
    return mask


def _to_datasets(rows: pd.DataFrame) -> datasets.DatasetDict:
    # large_string: a string column of Arrow ends at 2 GB
    features = datasets.Features(
        {
            "text": datasets.Value("large_string"),
            "label": datasets.Value("int64"),
            "row": datasets.Value("int64"),
            "text_id": datasets.Value("int64"),
        }
    )
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_pandas(part[list(features)], features=features, preserve_index=False)
            for split, part in parts(rows).items()
        }
    )


# ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def tokenize(
    splits: datasets.DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    with_sentences: Collection[str] = (),
) -> tuple[datasets.DatasetDict, dict[str, dict]]:
    """Texts to token ids, cut at ``max_length`` and not padded.

    Args:
        splits: those of `load_splits`.
        max_length: tokens kept of a text, special tokens included.
        with_sentences: splits that get a column ``sentences`` as well, the `training.views.sentence_numbers` of tokens.

    Returns:
        The splits with ``input_ids``, ``attention_mask`` (and ``token_type_ids`` where the tokenizer has them),
        ``length`` (of ``input_ids``), ``labels``, ``row`` and ``text_id``; and for each the `length_report` of the token counts
        before cutting.

    Raises:
        InputError: the tokenizer is a slow one, which does not say where in a text its tokens are.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} is not of the tokenizers library, so the checkpoint could not be served: "
            "use another encoder"
        )

    def tokens(batch: dict[str, list], with_sentences: bool) -> dict[str, list]:
        encoded: Any
        encoded, lengths = _encode(batch["text"], tokenizer, max_length)
        kept = {column: encoded[column] for column in TOKEN_COLUMNS if column in encoded}
        if with_sentences:
            ends = [[end for _, end in piece.offsets] for piece in encoded.encodings]
            kept["sentences"] = [sentence_numbers(*pair) for pair in zip(batch["text"], ends, strict=True)]
        return {
            **kept,
            "length": [len(ids) for ids in encoded["input_ids"]],
            "uncut": lengths,
            "labels": batch["label"],
            "row": batch["row"],
            "text_id": batch["text_id"],
        }

    tokenized, reports = datasets.DatasetDict(), {}
    for split, rows in splits.items():
        rows = rows.map(
            tokens,
            batched=True,
            remove_columns=rows.column_names,
            desc=f"tokenizing {split}",
            fn_kwargs={"with_sentences": split in with_sentences},
        )
        reports[split] = length_report(rows.with_format("numpy")["uncut"][:], max_length)
        tokenized[split] = rows.remove_columns("uncut")
    return tokenized, reports


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[BatchEncoding, list[int]]:
    encoded = tokenizer(
        list(texts), truncation=True, max_length=max_length, padding=False, return_attention_mask=True, stride=0
    )
    special = tokenizer.num_special_tokens_to_add()  # each piece of what was cut off carries its own
    lengths = [
        len(piece) + sum(len(rest) - special for rest in piece.overflowing) for piece in encoded.encodings
    ]  # fmt: skip
    return encoded, lengths
