"""Read labelled rows from Python: files, data sets, data frames or lists of dicts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pandas as pd

from hierarchical_clinicalbert.data.arguments import DataArguments
from hierarchical_clinicalbert.data.report import SPLITS
from hierarchical_clinicalbert.data.sources import ALL, SplitSource, from_dataset, read_sources
from hierarchical_clinicalbert.data.splits import LabelledSplits, split_rows
from hierarchical_clinicalbert.data.trained_texts import NO_TRAINED_TEXTS, TrainedTexts
from hierarchical_clinicalbert.errors import InputError, as_input_error
from taxonomy_hierarchical import Taxonomy

ROLES = ("text", "label")  # what `column_mapping` names


def read_rows(
    rows: Any,
    taxonomy: Taxonomy | str | Path | None = None,
    *,
    column_mapping: Mapping[str, str] | None = None,
    seed: int = 42,
    trained: TrainedTexts = NO_TRAINED_TEXTS,
    **options: Any,
) -> LabelledSplits:
    """Read, check, label and split rows, as ``train.py`` does.

    Args:
        rows: the path of a file or folder, a `datasets.Dataset`, a pandas DataFrame, or a list of
            dicts. It is split into training, validation and test rows. Or a mapping of "train",
            "validation" and "test" to such rows, for instance a `datasets.DatasetDict`.
        taxonomy: a taxonomy, or its file. By default, see ``--taxonomy`` of ``train.py``.
        column_mapping: names of columns to their roles, "text" or "label". Several columns may be
            labels. By default, columns are chosen by their names.
        seed: of the split.
        trained: texts that a model was trained on, which are left out of validation and test rows.
        options: further flags of ``train.py`` that name the data, see `DataArguments`, such as
            ``label_delimiter`` or ``validation_size``.

    Raises:
        InputError: the rows cannot be read, or a label is not in the taxonomy.
    """
    tree = taxonomy if isinstance(taxonomy, Taxonomy) else None
    file = str(taxonomy) if isinstance(taxonomy, (str, Path)) else None
    columns = dict(column_mapping or {})
    if unknown := {*columns.values()}.difference(ROLES):
        raise InputError(f"column_mapping: a column is text or label, not {min(unknown)!r}")
    text_columns, label_columns = (
        [column for column, role in columns.items() if role == wanted] for wanted in ROLES
    )
    if len(text_columns) > 1:
        raise InputError(f"column_mapping: {' and '.join(text_columns)} cannot both be the text")
    arguments = DataArguments(
        taxonomy=file,
        text_column=next(iter(text_columns), None),
        label_column=label_columns or None,
        **options,
    )
    given = rows if isinstance(rows, Mapping) else {ALL: rows}
    if unknown := given.keys() - {ALL, *SPLITS}:
        raise InputError(f"rows are of train, validation and test, not of {min(unknown)!r}")
    in_memory: dict[str, SplitSource] = {}
    for split, part in given.items():
        if isinstance(part, (str, Path)):
            name = "data_path" if split == ALL else f"{split}_file"
            setattr(arguments, name, str(part))
        else:
            name = "the rows" if split == ALL else f"the {split} rows"
            in_memory[split] = from_dataset(name, as_dataset(name, part))
    source = read_sources(arguments, in_memory=in_memory)
    return split_rows(source, arguments, tree, seed, trained)


def as_dataset(name: str, rows: Any) -> datasets.Dataset:
    """Return rows as a `datasets.Dataset`. ``name`` is for messages."""
    if isinstance(rows, datasets.Dataset):
        return rows
    with as_input_error(f"{name} cannot be used"):
        if isinstance(rows, pd.DataFrame):
            return datasets.Dataset.from_pandas(rows, preserve_index=False)
        return datasets.Dataset.from_list(list(rows))
