"""Define the flags of train.py that name the data."""

from dataclasses import dataclass, field
from typing import Any, Literal

SHARE = 0.1  # of the rows, for validation and for the test


# ruff: noqa: RUF009 - `flag` returns a dataclass field
def flag(
    default: Any,
    help: str,
    group: str = "data",
    interval: str | None = None,
    fixed: bool = False,
    **metadata: Any,
) -> Any:
    """Return a dataclass field with all that describes a flag, see `training.arguments.Parser`.

    Args:
        group: the section of ``--help`` that shows it.
        interval: its values. A bracket includes the bound, a parenthesis excludes it.
        fixed: whether any other value than the default is refused.
        metadata: further arguments of `argparse.ArgumentParser.add_argument`.
    """
    metadata |= {"help": help, "group": group, "interval": interval, "fixed": fixed}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataArguments:
    dataset_name: str | None = flag(None, "Data set on the Hub.")
    dataset_config_name: str | None = flag(
        None, "Configuration of the data set, if it has several."
    )
    dataset_revision: str | None = flag(None, "Commit, tag or branch of the data set.")
    data_path: str | None = flag(
        None, "File to split, folder of .txt files, or folder saved by `datasets`."
    )
    train_file: str | None = flag(None, "File with the training rows.")
    validation_file: str | None = flag(
        None, "File with the rows that select the checkpoint and calibrate it."
    )
    test_file: str | None = flag(None, "File with the rows for the final scores.")
    unlabelled_file: str | None = flag(
        None, "File with texts that --teacher labels, or of classes without rows."
    )
    encoding: str | None = flag(
        None, "Encoding of text files, such as cp1252 or utf-16. Default: UTF-8."
    )
    text_column: str | None = flag(None, "Column with the texts. Default: chosen by its name.")
    label_column: list[str] | None = flag(
        None, "Column of the labels, or one per level, or one of 0 and 1 per label."
    )
    problem_type: Literal["single_label_classification", "multi_label_classification"] | None = (
        flag(None, "Labels of a text. Default: any number if the column holds lists.")
    )
    label_delimiter: str | None = flag(
        None, "Delimiter between the labels of one text, such as ';'."
    )
    taxonomy: str | None = flag(
        None,
        "Nested .yaml or .json, or .csv with columns parent and child. Default: the "
        "checkpoint's; for an encoder the "
        "Medical Abstracts taxonomy if it has all labels, else built from the labels' paths.",
    )
    renamed_nodes: str | None = flag(
        None, "New names of the checkpoint's nodes: like --class_names."
    )
    label_separator: str | None = flag(
        None, "Separator of the names in a label's path. Default: the checkpoint's, else '/'."
    )
    class_names: str | None = flag(
        None, "Names of coded labels: table with columns code and name, or JSON object."
    )
    max_length: int | None = flag(
        None,
        "Texts are truncated to this many tokens, and read in windows of the encoder's "
        "size. Default: 512 or the window, "
        "or the checkpoint's own limit.",
        interval="[8, inf)",
    )
    validation_size: float | None = flag(
        None, f"Share of texts for validation, if no rows are given. Default: {SHARE}."
    )
    test_size: float | None = flag(
        None, f"Share of the texts to use as test rows, if one source is split. Default: {SHARE}."
    )
