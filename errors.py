"""Errors that a user can mend: one line, exit code 2. Every room and command imports `InputError` from here.

`reading` imports nothing of this repository, so the class itself is there.
"""

import errno
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from reading.rows import InputError

TRACEBACK = "HIERARCHICAL_TRACEBACK"
ROOT = Path(__file__).parent


def one_line(error: object) -> str:
    """A message without its line breaks, or the name of an error that has none."""
    return " ".join(str(error).split()) or type(error).__name__


def is_fault(error: Exception) -> bool:
    """Whether an error is a bug of this project: a wrong name, type or attribute in a frame of its own, not of a library."""
    if not isinstance(error, (AttributeError, NameError, TypeError)):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if frames[-1].f_code.co_name == "__getattr__":  # torch's, for what a module of ours was asked for
        frames.pop()
    file = Path(frames[-1].f_code.co_filename)
    return file.stem.endswith("_hierarchical") or ROOT in (file.parent, file.parent.parent)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn whatever a library raises over something that a user gave it into an InputError.

    For calls of libraries on foreign files and settings: they name no errors for these, and raise, say, KeyError or
    ZeroDivisionError. A bug of this project stays what it is, see `is_fault`.

    Args:
        what: the message up to its colon.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        if is_fault(error):
            raise
        plain = isinstance(error, (OSError, ValueError, ImportError)) and bool(str(error))
        said = one_line(error) if plain else f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{what}: {said}") from error


def is_full_disk(error: Exception) -> bool:
    """Whether a write failed for want of room. safetensors, tokenizers and torch have errors of their own for it."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(words in str(error) for words in ("No space left", "os error 28", "PytorchStreamWriter failed"))


def asked_traceback() -> str:
    """The traceback of the error that is being handled, where HIERARCHICAL_TRACEBACK is set, and else nothing."""
    return traceback.format_exc() if os.environ.get(TRACEBACK) else ""


def exit_with_error(command: str, said: str, code: int = 2, trace: str = "") -> NoReturn:
    """Ends a command with one line on standard error.

    Args:
        trace: as from `asked_traceback`, to stand before it.
    """
    print(f"{trace}{command}: error: {said}", file=sys.stderr)
    sys.exit(code)
