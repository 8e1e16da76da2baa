"""Convert a recipe, a YAML file of flags, to command-line arguments.

The recipe's arguments precede the others, so a flag of the command line overrides the recipe's. A
data source on the command line replaces the recipe's. Values stay as they are written: codes such
as ``007``, ``1.10`` and ``no`` are texts.
"""

import argparse
import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.files import read_yaml
from taxonomy_hierarchical import quote_name

# groups of flags; a run uses one group
SOURCES = (
    ("dataset_name", "dataset_config_name", "dataset_revision"),
    ("data_path",),
    ("train_file", "validation_file", "test_file"),
)


def insert_recipe(argv: list[str], flags: Mapping[str, argparse.Action]) -> list[str]:
    """Replace a recipe, the first argument of a command line, by the arguments that it stands
    for.
    """
    path, *rest = argv
    given = {
        word.split("=")[0].lstrip("-").replace("-", "_") for word in rest if word.startswith("--")
    }
    used = [group for group in SOURCES if given & {*group}]
    replaced = {name for group in SOURCES if used and group not in used for name in group}
    words: list[str] = []
    recipe = read_yaml(path)
    if not isinstance(recipe, dict):
        raise InputError(f"the recipe {path} must be a mapping of flags to values")
    for key, value in recipe.items():
        if key not in flags:
            raise InputError(
                f"the recipe {path} has an unknown key {quote_name(key)}; "
                f"{nearest(str(key), flags)}"
            )
        if key in replaced:
            continue
        if value is None and flags[key].default is None:
            continue
        if value is None:
            raise InputError(
                f"the recipe {path}: {key} has no value; leave the key out for its default"
            )
        if isinstance(value, dict):
            value = json.dumps(value if key == "class_names" else typed(value))
        if flags[key].nargs in ("+", "*"):
            words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
        else:
            words.append(f"--{key}={value}")
    return words + rest


def typed(value: Any) -> Any:
    """Parse each string in a nested mapping as JSON. A string that is not JSON is unchanged."""
    if isinstance(value, dict):
        return {name: typed(item) for name, item in value.items()}
    try:
        return json.loads(value)
    except (TypeError, ValueError):
        return value


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint with the most similar flag."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else "train.py --help lists all flags"
