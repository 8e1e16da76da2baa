"""Write and load files of labelled texts, for the tests of labels, sources and splits."""

import datasets
import pandas as pd

from hierarchical_clinicalbert.data.arguments import DataArguments
from hierarchical_clinicalbert.data.splits import load_splits

SECRET = "patient Miller"  # stands for a text that must not be shown

datasets.disable_progress_bars()


def load(seed=0, known=None, **arguments):
    """Call `load_splits` with `DataArguments`. ``known`` is the taxonomy of a checkpoint."""
    return load_splits(DataArguments(**{key: _text(value) for key, value in arguments.items()}), seed, known)


def _text(value):
    return value if isinstance(value, (bool, int, float, list, type(None))) else str(value)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def csv_file(path, rows, header=("text", "label")):
    pd.DataFrame(rows, columns=list(header)).to_csv(path, index=False)
    return path


def nodes_of(data, split="train"):
    """Return the node of each row of a split with one path a text."""
    return [node for (node,) in data.splits[split]["nodes"]]


def labels_of(data, split):
    """Return the labels of a split with one path a text."""
    return [data.taxonomy.labels[node] for node in nodes_of(data, split)]
