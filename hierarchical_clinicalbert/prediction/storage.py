"""Store the files of an output on this machine's disk or in an object store. In both, a file is complete or absent."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from pyarrow.fs import FileSelector, LocalFileSystem, copy_files

from hierarchical_clinicalbert.errors import as_input_error
from hierarchical_clinicalbert.files import lock
from hierarchical_clinicalbert.reading.stores import path_of


class Disk:
    """Store files on this machine's disk. Files are flushed before they are renamed, and a lock keeps other processes out."""

    def lock(self, name: str) -> AbstractContextManager[None]:
        """Lock an output for this process. Raise InputError if it may not be written, or another process has the lock."""
        # hidden, because a killed run leaves it, and --input 'folder/*' would match it; in an output folder the last part is empty
        folder, last = os.path.split(name)
        return lock("--output", name, Path(folder, f".{last}.predict.lock" if last else ".predict.lock"))

    def exists(self, name: str) -> bool:
        return os.path.exists(name)

    def names(self, folder: str) -> set[str]:
        """Return the names of the files in a folder, which need not exist."""
        return set(os.listdir(folder)) if os.path.isdir(folder) else set()

    def new_folder(self, parts: str) -> Path:
        """Return the folder for files that are being written."""
        os.makedirs(parts, exist_ok=True)
        return Path(parts)

    def read(self, name: str) -> bytes:
        return Path(name).read_bytes()

    def put(self, new: Path, name: str) -> None:
        """Move a complete file to its final name, on disk when this returns."""
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        flush_to_disk(new)
        flush_to_disk(new.replace(name).parent)  # the name, too

    def delete(self, name: str) -> None:
        Path(name).unlink(missing_ok=True)

    def delete_folder(self, folder: str) -> None:
        shutil.rmtree(folder, ignore_errors=True)


def flush_to_disk(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Bucket:
    """Store files in an object store, whose objects appear when their upload is complete. Names are URLs without a query.

    There is no lock. If two processes write one output with different options, `prediction.output` refuses the other's blocks.
    """

    def __init__(self, filesystem: Any):
        self._filesystem = filesystem
        self._new = tempfile.TemporaryDirectory()

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Check that objects can be written and deleted, or raise InputError."""
        probe = Path(self._new.name) / "probe"
        probe.write_bytes(b"")
        self.put(probe, f"{name}.probe")
        self.delete(f"{name}.probe")
        yield

    def exists(self, name: str) -> bool:
        with as_input_error(f"--output {name}"):
            return self._filesystem.get_file_info(path_of(name)).is_file

    def names(self, folder: str) -> set[str]:
        with as_input_error(f"--output {folder}"):
            infos = self._filesystem.get_file_info(FileSelector(path_of(folder), allow_not_found=True))
        return {info.base_name for info in infos if info.is_file}

    def new_folder(self, parts: str) -> Path:
        return Path(self._new.name)

    def read(self, name: str) -> bytes:
        with as_input_error(f"cannot read {name}"), self._filesystem.open_input_stream(path_of(name)) as stream:
            return stream.read()

    def put(self, new: Path, name: str) -> None:
        # one call, which Ctrl+C does not interrupt: closing a stream early would store a partial object
        with as_input_error(f"--output {name}"):
            copy_files(str(new), path_of(name), LocalFileSystem(), self._filesystem, chunk_size=2**23)
        new.unlink()

    def delete(self, name: str) -> None:
        if self.exists(name):
            with as_input_error(f"--output {name}"):
                self._filesystem.delete_file(path_of(name))

    def delete_folder(self, folder: str) -> None:
        if self.names(folder):
            with as_input_error(f"--output {folder}"):
                self._filesystem.delete_dir(path_of(folder))
