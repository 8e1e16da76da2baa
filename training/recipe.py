"""A recipe: a YAML file of flags, turned into command-line words.

Worth knowing:

1. The parser of the command line reads these words first, so that recipe and flags are checked alike and a flag overrides its
   key. ``set_defaults`` would not do: argparse neither checks the choices of a default nor converts the items of a list.
2. Values stay as they are written: codes such as ``007``, ``1.10`` and ``no`` are texts.
3. A data source on the command line replaces the recipe's.
"""

import difflib
import json
from collections.abc import Collection, Mapping
from pathlib import Path

import yaml

from errors import InputError
from taxonomy_hierarchical import WithoutAliases, quote_name, yaml_problem

SOURCES = (  # where data come from
    ("dataset_name", "dataset_revision"),
    ("data_path",),
    ("train_file", "validation_file", "test_file"),
)


class RecipeLoader(WithoutAliases, yaml.SafeLoader):
    """Load YAML without aliases or repeated keys. Every scalar but null stays text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag.endswith(":null")]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := {name for name in names if names.count(name) > 1}:  # the second would win unseen
            raise yaml.YAMLError(f"{quote_name(min(twice))} occurs twice")
        return super().construct_mapping(node, deep)


def replaced_sources(words: list[str]) -> set[str]:
    """The data flags of a recipe that flags of another source on the command line replace."""
    given = {word.split("=")[0].lstrip("-").replace("-", "_") for word in words if word.startswith("--")}
    used = [source for source in SOURCES if given & set(source)]
    return {name for source in SOURCES if used and source not in used for name in source}


def recipe_words(path: str | Path, flags: Mapping[str, bool], left_out: Collection[str] = ()) -> list[str]:
    """Turn a recipe into command-line words.

    Args:
        flags: each flag by its name in a recipe, and whether it takes several values.
        left_out: keys of the recipe that the command line has replaced.

    Raises:
        InputError: the recipe cannot be read or is no mapping; a key is unknown; a value is not a scalar, a list of
            scalars or a mapping.
    """
    recipe, values_of = read_recipe(path)
    words: list[str] = []
    known: set[str] = set()
    for key, value in recipe.items():
        name = str(key).replace("-", "_")
        if name in known:
            raise InputError(f"the recipe {path} has {quote_name(key)} twice, once with another spelling")
        known.add(name)
        if key not in flags:
            near = difflib.get_close_matches(str(key), flags, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; its keys are flags of train.py, see --help"
            raise InputError(f"the recipe {path} has an unknown key {quote_name(key)}{hint}")
        if value is None or key in left_out:
            continue
        if isinstance(value, dict):
            value = json.dumps(value if name == "class_names" else values_of[key], default=str)
        values = value if isinstance(value, list) else [value]
        if isinstance(value, list) and not flags[key]:
            raise InputError(f"the recipe {path}: {key} takes one value, not a list of {len(value)}")
        if any(isinstance(one, list | dict) for one in values):
            raise InputError(f"the recipe {path}: {key} takes a plain list, without lists or mappings in it")
        words += [f"--{key}", *map(str, values)] if flags[key] else [f"--{key}={value}"]
    return words


def read_recipe(path: str | Path) -> tuple[dict, dict]:
    """Read a recipe twice: with values as written, and with YAML's numbers and booleans, which mappings of settings keep."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        recipe, values_of = yaml.load(text, RecipeLoader), yaml.load(text, yaml.SafeLoader)
    except OSError as error:
        raise InputError(f"cannot read the recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the recipe {path} is not UTF-8 text: save it as UTF-8") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"the recipe {path} is not YAML: {yaml_problem(error)}") from error
    except RecursionError as error:
        raise InputError(f"the recipe {path} is nested too deeply: it is a mapping of flags to values") from error
    if not isinstance(recipe, dict):
        raise InputError(f"the recipe {path} must be a mapping of flags to values")
    return recipe, values_of
