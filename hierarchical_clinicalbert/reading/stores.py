"""Find and open files by URL: ``s3://``, ``gs://``, ``hf://datasets/...``, and other protocols of fsspec.

pyarrow opens the stores that it supports, and honours, for example, ``AWS_ENDPOINT_URL``. fsspec opens the others. Credentials
come from the environment or from the files of the store's own tools, never from the URL, which is shown in messages.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import quote

from hierarchical_clinicalbert.reading.rows import InputError, reason_of

READ_AHEAD = 2**23  # bytes of a request


def is_url(name: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*://", name) is not None


def connect(url: str) -> tuple[Any, str]:
    """Return the pyarrow file system of a URL, and the URL for messages: without a query, and not quoted.

    Raises:
        InputError: the URL holds credentials, or the store cannot be used.
    """
    from pyarrow.fs import FileSystem  # lazily, because pyarrow is slow to import

    scheme, _, rest = url.partition("://")
    user = rest.partition("/")[0].rpartition("@")[0]
    if ":" in user or (user and scheme.startswith("http")):  # gs://anonymous@bucket is no secret
        raise InputError(f"{scheme}://...: give credentials in the environment, not in the URL")
    with store_errors(url):
        try:  # "[" and blanks are not allowed in a URI; fsspec, which serves hf://, takes names as they are
            location, mark, query = url.partition("?")
            quoted = quote(location, safe="/:@=&*,+~") + mark + quote(query, safe="/:@?=&%*,+~")
            filesystem, path = FileSystem.from_uri(url if scheme == "hf" else quoted)
        except ValueError as error:
            if "Unrecognized filesystem type" not in str(error):
                raise
            filesystem, path = FileSystem.from_uri(f"fsspec+{url}")
    return filesystem, url_of(scheme, path)


def url_of(scheme: str, path: str) -> str:
    """Return the URL of a file system's path. The paths of fsspec over HTTP are URLs themselves."""
    return path if is_url(path) else f"{scheme}://{path}"


def path_of(url: str) -> str:
    """Return the path that a URL has in its file system."""
    return url if url.startswith("http") else url.partition("://")[2]


def without_query(url: str) -> str:
    """Return a URL over HTTP without its query, which may hold a signature, and other URLs and paths unchanged."""
    return url.partition("?")[0] if url.startswith("http") else url


def find_files(url: str) -> tuple[Any, list[tuple[str, int]], bool]:
    """Return the file system of a URL, the URLs and sizes of its files in sorted order, and whether it is a folder.

    The URL names a file, a folder, or files by a pattern such as ``s3://bucket/2*/part-*.csv``.
    """
    from pyarrow.fs import FileSelector, FileType

    filesystem, shown = connect(url)
    scheme, path = shown.partition("://")[0], path_of(shown)
    with store_errors(url):
        info = filesystem.get_file_info(path)
        if info.type == FileType.Directory:
            infos = filesystem.get_file_info(FileSelector(path))
        elif info.type == FileType.NotFound and re.search("[*[]", path):
            parts = path.split("/")
            fixed = next(i for i, part in enumerate(parts) if re.search("[*[]", part))
            recursive = fixed < len(parts) - 1 or parts[-1] == "**"
            selector = FileSelector("/".join(parts[:fixed]), recursive=recursive, allow_not_found=True)
            infos = [found for found in filesystem.get_file_info(selector) if matches(found.path.split("/"), parts)]
        else:
            infos = [info]
    infos = [found for found in infos if found.type == FileType.File]
    # servers may not report a size; a file of 0 bytes would be skipped as empty
    files = sorted((url_of(scheme, found.path), 1 if found.size is None else found.size) for found in infos)
    return filesystem, files, info.type == FileType.Directory


def matches(names: list[str], pattern: list[str]) -> bool:
    """Return whether the names of a path match a pattern, in which ``**`` stands for any number of folders.

    As on a disk, only a dot matches the dot of a hidden name.
    """
    if not pattern or not names:
        return not names and set(pattern) <= {"**"}
    if pattern[0] == "**" and matches(names, pattern[1:]):
        return True
    if names[0].startswith(".") and not pattern[0].startswith("."):
        return False
    if pattern[0] == "**":
        return matches(names[1:], pattern)
    return fnmatchcase(names[0], pattern[0]) and matches(names[1:], pattern[1:])


def open_stream(filesystem: Any, url: str, seekable: bool) -> Any:
    """Open a file of pyarrow for reading, by large sequential requests unless it must be seekable."""
    with store_errors(url):
        if seekable:
            return filesystem.open_input_file(path_of(url))
        return filesystem.open_input_stream(path_of(url), compression=None, buffer_size=READ_AHEAD)


@contextmanager
def store_errors(url: str) -> Iterator[None]:
    """Convert an exception of a store into an InputError. The messages are long, but name bucket, cause and request."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{url.partition('?')[0]}: {reason_of(error)}") from error
