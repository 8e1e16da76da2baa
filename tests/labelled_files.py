"""Write and load files of labelled texts, for the tests of labels, sources and splits."""

import json

import datasets
import pandas as pd

from hierarchical_clinicalbert.data.arguments import DataArguments
from hierarchical_clinicalbert.data.sources import read_sources
from hierarchical_clinicalbert.data.splits import split_rows
from hierarchical_clinicalbert.data.trained_texts import NO_TRAINED_TEXTS

SECRET = "patient Miller"  # stands for a text that must not be shown
MANY = "multi_label_classification"

datasets.disable_progress_bars()


def load(seed=0, known=None, trained=NO_TRAINED_TEXTS, trains=True, **flags):
    """Read and split the rows that the flags of `DataArguments` name.

    ``known`` is the taxonomy of a checkpoint.
    """
    arguments = DataArguments(**{flag: _text(value) for flag, value in flags.items()})
    return split_rows(read_sources(arguments, trains), arguments, known, seed, trained)


def load_rows(folder, rows, header=("text", "label"), **flags):
    """Load rows of a CSV file as training rows. None of them are split off."""
    return load(train_file=csv_file(folder / "rows.csv", rows, header), validation_size=0, **flags)


def load_labels(folder, labels, **flags):
    """Load texts with these labels, see `json_lines`, as training rows. None are split off."""
    return load(train_file=json_lines(folder / "rows.jsonl", labels), validation_size=0, **flags)


def _text(value):
    return value if isinstance(value, (bool, int, float, list, type(None))) else str(value)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def csv_file(path, rows, header=("text", "label")):
    pd.DataFrame(rows, columns=list(header)).to_csv(path, index=False)
    return path


def files_of(folder, **rows):
    """Write the rows of each split to a CSV file. Return the flags that name the files."""
    return {f"{split}_file": csv_file(folder / f"{split}.csv", rows[split]) for split in rows}


def json_lines(path, labels):
    """Write texts with these labels, called "text 0" and so on."""
    rows = ({"text": f"text {i}", "label": label} for i, label in enumerate(labels))
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def nodes_of(data, split="train"):
    """Return the node of each row of a split with one path a text."""
    return [node for (node,) in data.splits[split]["nodes"]]


def paths_of(data):
    """Return the names on the path to each label of the training rows, with one path a text."""
    tree = data.taxonomy
    return [tuple(tree.names[step] for step in tree.path(node)) for node in nodes_of(data)]


def labels_of(data, split="train"):
    """Return the labels of a split with one path a text."""
    return [data.taxonomy.labels[node] for node in nodes_of(data, split)]


def label_sets(data, split="train"):
    """Return the set of labels of each text of a split."""
    rows = data.splits[split]
    return {
        text: {data.taxonomy.labels[i] for i in ids}
        for text, ids in zip(rows["text"], rows["nodes"], strict=True)
    }
