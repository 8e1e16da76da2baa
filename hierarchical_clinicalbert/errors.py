"""Report errors that the user can fix, in one line and with exit code 2."""

import argparse
import errno
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

# defined there, since `reading` imports no other package
from hierarchical_clinicalbert.reading.rows import InputError
from taxonomy_hierarchical import TaxonomyError

PACKAGE = Path(__file__).parent
ROOT = PACKAGE.parent
# messages of torch
OUT_OF_MEMORY = (" out of memory", "DefaultCPUAllocator: can't allocate memory")


class ArgumentParser(argparse.ArgumentParser):
    """A parser that takes no abbreviated flags, and raises InputError."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def one_line(error: object) -> str:
    """Return an error's message on one line, or the name of its type if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__


def describe_error(error: BaseException) -> str:
    """Return an error's message on one line, after its type if the message may not be readable
    without it.
    """
    from huggingface_hub import errors  # here, because few commands end in an error

    explained = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)  # by their messages
    if isinstance(error, errors.HfHubHTTPError) and not isinstance(error, explained):
        detail = f" ({one_line(error.server_message)})" if error.server_message else ""
        status = error.response.status_code
        if status in (401, 403):
            return f"the token may not do this{detail}"
        return (
            "the repository has changed meanwhile"
            if status == 412
            else f"the Hub answered {status}{detail}"
        )
    if isinstance(error, errors.HTTPError):
        return f"the connection failed ({one_line(error)})"
    # hf_xet does not fall back to LFS
    if isinstance(error, ConnectionError) and "xet" in str(error):
        return "the Hub refused an upload by Xet: set HF_HUB_DISABLE_XET=1 to upload by LFS"
    is_plain = isinstance(error, (OSError, ValueError, ImportError)) or not str(error)
    return one_line(error) if is_plain else f"{type(error).__name__}: {one_line(error)}"


@contextmanager
def as_input_error(what: str, remedy: str = "") -> Iterator[None]:
    """Convert any exception in the block into an InputError with the message "what: reason", and ";
    remedy" if given.

    The block calls a library on files or settings of the user. Libraries document no errors for
    these, and raise, say, KeyError.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise InputError(
            f"{what}: {describe_error(error)}" + (f"; {remedy}" if remedy else "")
        ) from error


def is_full_disk(error: Exception) -> bool:
    """Return whether a write failed because the disk or quota is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors, tokenizers and torch raise error types of their own
    messages = (
        "No space left",
        "os error 28",
        "PytorchStreamWriter failed",
        "iostream error",
        "unexpected pos",
    )
    return any(message in str(error) for message in messages)


def user_error_message(error: Exception, advice: Mapping[str, str]) -> str | None:
    """Return one line for an error that a user can correct, or None for a bug of this project.

    `run_command` has ``advice``.
    """
    if isinstance(error, (InputError, TaxonomyError)):
        return str(error)
    if is_full_disk(error):
        return f"the disk is full ({one_line(error)}): {advice['disk']}"
    if isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY):
        return f"{one_line(error)}; {advice['memory']}"
    # a flag needs a package beyond requirements.txt
    if isinstance(error, ImportError) and "install" in str(error):
        return one_line(error)
    # only failures to open a file name it
    if (
        isinstance(error, OSError)
        and error.errno is not None
        and not isinstance(error, ConnectionError)
    ):
        return (
            f"{error.filename or 'cannot read or write a file'}: {error.strerror}; "
            f"{advice['resume']}"
        )
    return None


def exit_with_error(command: str, message: str, code: int = 2) -> NoReturn:
    """Print one line to standard error, and exit."""
    print(f"{command}: error: {message}", file=sys.stderr)
    sys.exit(code)


def run_command(
    name: str,
    main: Callable[[list[str]], int | None],
    advice: Mapping[str, str],
    code_of_bugs: int = 1,
) -> NoReturn:
    """Run a command on its command line, and exit with the code that ``main`` returns.

    An error that the user can correct is one line, and exit code 2, after a traceback if
    HIERARCHICAL_TRACEBACK is set. Ctrl+C is one line, and exit code 130. A bug of this project is a
    traceback.

    Args:
        advice: what the user can do if the "disk" is full or the "memory" too small, and how to
        "resume" a run.
    """
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        message = f"stopped; {advice['resume']}"
        code = 130
    except Exception as error:
        known = user_error_message(error, advice)
        if known is None or os.environ.get("HIERARCHICAL_TRACEBACK"):
            traceback.print_exc()
        if known is None:
            sys.exit(code_of_bugs)
        message = known
        code = 2
    gc.collect()  # destroy the run and its progress bars now, because they write once more
    exit_with_error(name, message, code)


def print_result(name: str, main: Callable[[], str]) -> NoReturn:
    """Run a command that returns a text, see `run_command`, and print the text as UTF-8 in any
    locale.
    """

    def show(_: list[str]) -> None:
        sys.stdout.buffer.write(main().encode())

    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the reader, such as head, may end early
    again = "run the command again"
    run_command(name, show, {"resume": again, "disk": f"make room, and {again}", "memory": again})
