"""Store the files of an output on this machine's disk or in an object store.

In both, a file is complete or absent.
"""

import os
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from pyarrow.fs import FileSelector, FileType, LocalFileSystem, copy_files

from hierarchical_clinicalbert.errors import as_input_error
from hierarchical_clinicalbert.files import lock
from hierarchical_clinicalbert.reading.stores import path_of


class Storage:
    """Files of an output. On a disk, names are paths; in an object store, they are URLs without a
    query.

    Files on a disk are flushed before they are renamed, and a lock keeps other processes out. In an
    object store, objects appear when their upload is complete. There is no lock: if two processes
    write one output with different options, `prediction.output` refuses the other's blocks.

    Args:
        filesystem: pyarrow's, of an object store; None for a disk.
    """

    def __init__(self, filesystem: Any | None):
        self._is_disk = filesystem is None
        self._filesystem = filesystem or LocalFileSystem()
        self._new = tempfile.TemporaryDirectory()  # for files that will be uploaded

    def lock(self, name: str) -> AbstractContextManager[None]:
        """Lock an output on a disk for this process.

        Raise InputError if it may not be written, or another process has the lock.
        """
        # hidden, because a killed run leaves it, and --input 'folder/*' would match it; in an
        # output folder the last part is empty
        folder, last = os.path.split(name)
        file = Path(folder, f".{last}.predict.lock" if last else ".predict.lock")
        return lock("--output", name, file) if self._is_disk else nullcontext()

    def exists(self, name: str) -> bool:
        with as_input_error(f"--output {name}"):
            return self._filesystem.get_file_info(path_of(name)).type != FileType.NotFound

    def names(self, folder: str) -> set[str]:
        """Return the names of the files in a folder, which need not exist."""
        with as_input_error(f"--output {folder}"):
            infos = self._filesystem.get_file_info(
                FileSelector(path_of(folder), allow_not_found=True)
            )
        return {info.base_name for info in infos if info.is_file}

    def new_folder(self, parts: str) -> Path:
        """Return the folder for files that are being written, on the disk of the folder of blocks
        or of this machine.
        """
        if not self._is_disk:
            return Path(self._new.name)
        os.makedirs(parts, exist_ok=True)
        return Path(parts)

    def read(self, name: str) -> bytes:
        with (
            as_input_error(f"cannot read {name}"),
            self._filesystem.open_input_stream(path_of(name)) as stream,
        ):
            return stream.read()

    def put(self, new: Path, name: str) -> None:
        """Move a complete file to its final name, stored when this returns."""
        if self._is_disk:
            os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
            flush_to_disk(new)
            flush_to_disk(new.replace(name).parent)  # the name, too
            return
        # one call, which Ctrl+C does not interrupt: closing a stream early would store a partial
        # object
        with as_input_error(f"--output {name}"):
            copy_files(
                str(new), path_of(name), LocalFileSystem(), self._filesystem, chunk_size=2**23
            )
        new.unlink()

    def delete(self, name: str) -> None:
        if self.exists(name):
            with as_input_error(f"--output {name}"):
                self._filesystem.delete_file(path_of(name))

    def delete_folder(self, folder: str) -> None:
        if self.exists(folder):
            with as_input_error(f"--output {folder}"):
                self._filesystem.delete_dir(path_of(folder))


def flush_to_disk(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
