"""Refuse a checkpoint whose JSON files make transformers run code from outside the checkpoint.

With ``trust_remote_code=True`` a checkpoint's own Python files run, at the commit that is loaded.
But its JSON files can also name a class of any other repository, as ``other/repo--module.Class``.
transformers runs the newest code of that repository.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.utils import cached_file

from hierarchical_clinicalbert.reading.rows import InputError

OWN_CLASS = r"\w+\.\w+"  # module.Class, of a file in the checkpoint
# other classes of transformers read more files, which can name code too
MODEL_CLASS = r"(AutoModel|Hierarchical)\w*"


def refuse_foreign_code(model: str | Path, revision: str | None = None) -> None:
    """Raise InputError if the JSON files of a checkpoint make transformers run code from outside
    the checkpoint.

    Call this before a load with ``trust_remote_code=True``.

    Args:
        model: a folder, or an id on the Hub.
        revision: the commit on the Hub that will be loaded.

    Raises:
        InputError: see above. The message names file and entry.
        OSError, ValueError: a file cannot be read.
    """
    # not `read_json`, because "configuration_files" can name another file, which transformers reads
    # in its place
    config, _ = PretrainedConfig.get_config_dict(model, revision=revision)
    tokenizer, adapter = (
        read_json(model, name, revision)
        for name in ("tokenizer_config.json", "adapter_config.json")
    )
    pipelines = config.get("custom_pipelines")
    architectures = config.get("architectures")
    for file, entry, names, allowed in (
        ("config.json", "auto_map", strings(config.get("auto_map")), OWN_CLASS),
        ("config.json", "custom_pipelines", strings(pipelines, under="impl"), OWN_CLASS),
        ("config.json", "custom_pipelines", strings(pipelines, under="pt"), MODEL_CLASS),
        # where "pt" fails to load
        ("config.json", "architectures", strings(pipelines and architectures), MODEL_CLASS),
        ("tokenizer_config.json", "auto_map", strings(tokenizer.get("auto_map")), OWN_CLASS),
        # transformers loads this model in place of the checkpoint, whose own adapter is in a
        # subfolder
        (
            "adapter_config.json",
            "base_model_name_or_path",
            strings(adapter.get("base_model_name_or_path")),
            "",
        ),
    ):
        for name in names:
            if not re.fullmatch(allowed, name):
                problem = (
                    f"{file} of {model} names {name!r} in {entry}, which could run code from "
                    "outside it"
                )
                raise InputError(
                    f"{problem}, at no pinned commit: use a checkpoint that contains all its code"
                )


def read_json(model: str | Path, file: str, revision: str | None) -> dict[str, Any]:
    """Read a JSON file of a checkpoint. Return an empty object if there is no such file."""
    path = cached_file(model, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    content = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object")
    return content


def strings(value: Any, under: str | None = None, key: str | None = None) -> Iterator[str]:
    """Yield the strings in nested lists and objects: all, or those ``under`` a key.

    ``key`` is the key of ``value``.
    """
    if isinstance(value, str) and under in (None, key):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from strings(item, under, key)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from strings(item, under, name)
