"""Find and open files by URL: ``s3://``, ``gs://``, ``hf://datasets/...``, and other protocols of
fsspec.

pyarrow opens the stores that it supports, and honours, for example, ``AWS_ENDPOINT_URL``. fsspec
opens the others. Credentials come from the environment or from the files of the store's own tools,
never from the URL, which is shown in messages.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hierarchical_clinicalbert.reading.rows import InputError, reason_of

READ_AHEAD = 2**23  # bytes of a request


def is_url(name: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*://", name) is not None


def connect(url: str) -> tuple[Any, str]:
    """Return the pyarrow file system of a URL, and the URL for messages: without a query, and not
    quoted.

    Raises:
        InputError: the URL holds credentials, or the store cannot be used.
    """
    from pyarrow.fs import FileSystem  # lazily, because pyarrow is slow to import

    scheme, _, rest = url.partition("://")
    location, mark, query = rest.partition("?")
    bucket, _, key = location.partition("/")
    if scheme in ("http", "https"):
        remedy = "give a store, or download the file and pipe it to standard input (-)"
        raise InputError(f"{scheme}://...: {remedy}")
    if ":" in bucket.rpartition("@")[0]:  # gs://anonymous@bucket is no secret
        raise InputError(f"{scheme}://...: give credentials in the environment, not in the URL")
    # without the key, which may have characters that a URI may not, such as "[" and blanks
    root = f"{scheme}://{bucket}/{mark}{query}"
    with store_errors(url):
        try:
            filesystem, path = FileSystem.from_uri(root)
        except ValueError as error:
            if "Unrecognized filesystem type" not in str(error):
                raise
            filesystem, path = FileSystem.from_uri(f"fsspec+{root}")
    return filesystem, f"{scheme}://{path.rstrip('/')}/{key}".rstrip("/")


def path_of(url: str) -> str:
    """Return the path that a URL has in its file system, or a path as it is."""
    return url.partition("://")[2] if is_url(url) else url


def find_files(url: str) -> tuple[Any, list[tuple[str, int]], bool]:
    """Return the file system of a URL, the URLs and sizes of its files in sorted order, and whether
    it is a folder.

    The URL names a file, a folder, or files by a pattern such as ``s3://bucket/2*/part-*.csv``.
    """
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import FileSelector, FileType

    filesystem, shown = connect(url)
    scheme = shown.partition("://")[0]
    path = path_of(shown)
    with store_errors(url):
        info = filesystem.get_file_info(path)
        infos = [info]
        if info.type == FileType.Directory:
            infos = filesystem.get_file_info(FileSelector(path))
        elif info.type == FileType.NotFound and re.search("[*[]", path):
            infos = filesystem.get_file_info(ArrowFSWrapper(filesystem).glob(path))
            if "/." not in path:  # as on a disk, only a dot matches the dot of a hidden name
                infos = [one for one in infos if "/." not in one.path]
    files = sorted(
        (f"{scheme}://{one.path}", one.size) for one in infos if one.type == FileType.File
    )
    return filesystem, files, info.type == FileType.Directory


def open_stream(filesystem: Any, url: str, seekable: bool) -> Any:
    """Open a file of pyarrow for reading, by large sequential requests unless it must be
    seekable.
    """
    with store_errors(url):
        if seekable:
            return filesystem.open_input_file(path_of(url))
        return filesystem.open_input_stream(path_of(url), compression=None, buffer_size=READ_AHEAD)


@contextmanager
def store_errors(url: str) -> Iterator[None]:
    """Convert an exception of a store into an InputError.

    The messages are long, but name bucket, cause and request.
    """
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{url.partition('?')[0]}: {reason_of(error)}") from error
