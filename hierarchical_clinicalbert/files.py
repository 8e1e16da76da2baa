"""Read, check, lock, write and hash files."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from hierarchical_clinicalbert.errors import InputError, one_line
from taxonomy_hierarchical import quote_name

NO_VALUE = ("", "null", "~")  # YAML's spellings of null


def read_text(path: str | Path) -> str:
    """Read a file of text, or raise InputError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: save it as UTF-8") from error


def read_yaml(path: str | Path) -> Any:
    """Read YAML in which every scalar is text, or raise InputError: a class called ``no`` or ``1``
    keeps its name.

    A key without a value has None.
    """
    try:
        return yaml.load(read_text(path), TextLoader)
    except yaml.YAMLError as error:  # its message quotes lines of the file
        mark = getattr(error, "problem_mark", None)
        problem = (
            getattr(error, "problem", None) or getattr(error, "context", None) or one_line(error)
        )
        raise InputError(
            f"{path}: {problem}{'' if mark is None else f', line {mark.line + 1}'}"
        ) from error
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply") from error


class TextLoader(yaml.BaseLoader):
    def construct_mapping(self, node, deep=False):
        pairs = [
            (self.construct_object(key, True), self.construct_object(value, True))
            for key, value in node.value
        ]
        try:
            return unique_names(
                [(key, None if value in NO_VALUE else value) for key, value in pairs]
            )
        except ValueError as error:
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from error


def unique_names(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    """Return the mapping of the pairs, or raise ValueError if a name is not text, or occurs
    twice.
    """
    mapping: dict[str, Any] = {}
    for name, value in pairs:
        if not isinstance(name, str):  # YAML has lists and mappings as names
            raise ValueError(f"a name must be text, not {quote_name(name)}")
        if name in mapping:
            raise ValueError(f"the name {quote_name(name)} occurs twice in one mapping")
        mapping[name] = value
    return mapping


@contextmanager
def lock(flag: str, name: str | Path, file: Path) -> Iterator[None]:
    """Lock the output ``name`` of a ``flag`` for this process, by a lock on ``file``. A killed
    process holds no lock.

    InputError: the folder of ``file`` cannot be written to, or another process has the lock.
    """
    folder = file.parent
    existed = file.parent.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(file).acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"{flag} {name}: another process is writing it; give another name"
        ) from error
    except OSError as error:
        raise InputError(
            f"{flag} {name}: cannot write to the folder {folder} ({error.strerror})"
        ) from error
    with held:
        try:
            yield
        finally:
            # before the release: later it may belong to another process
            file.unlink(missing_ok=True)
            if not existed and not any(folder.iterdir()):
                folder.rmdir()


def sha256(files: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file, by file name."""
    hashes = {}
    for file in files:
        with file.open("rb") as stream:
            hashes[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file atomically, so that nobody reads a partial one."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    new.replace(path)
