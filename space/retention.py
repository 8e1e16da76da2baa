"""Limit what the Space keeps of its users: for how long, and how much of it.

Worth knowing:

1. Uploads and downloads are files in gradio's folder. They are deleted before they are
   `KEPT_SECONDS` old, and uploads are refused while all files together have `MAX_STORED` bytes.
   What a page keeps of a file is a `gr.State` with a time to live.
2. gradio holds messages, results among them, in memory until their client reads them, if need be
   forever. `Mailbox` deletes them after the same time, and limits their size.
3. gradio copies inputs and outputs into the state of each session, to make links to sessions. The
   Space has no such links, so `guard.py` has gradio keep no copies.
"""

import asyncio
import os
import shutil
import sys
import time
import traceback
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import error_payload

KEPT_SECONDS = 600  # until a file or an unread result is deleted
SWEEP_SECONDS = 60  # between two searches for what to delete
# bytes of memory of all unread results; that of one file has at most about 220 MB
MAX_UNREAD = 256 * 2**20
MAX_STORED = 2**30  # bytes of all uploads and downloads on the disk
UNREAD_LIMIT = (
    "The result is not kept: the unread results of all users have reached "
    f"{MAX_UNREAD // 2**20:,} MB. Try again in "
    f"{KEPT_SECONDS} seconds, and read each result."
)


def is_old(seconds: float) -> bool:
    """Whether what is as old must be deleted now, because it would be `KEPT_SECONDS` old at the
    next sweep.
    """
    return seconds > KEPT_SECONDS - SWEEP_SECONDS


# ── Files ─────────────────────────────────────────────────────────────────────────────────────────


def delete_old_files() -> None:
    """Delete old files. gradio would keep the parts of broken uploads."""
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    for path in sorted(folder.rglob("*"), reverse=True):  # files before their folder
        with suppress(OSError):  # a folder that is not empty, or a file that is deleted by now
            if is_old(time.time() - path.stat().st_mtime):
                path.rmdir() if path.is_dir() else path.unlink()


def has_room(size: int) -> bool:
    """Whether uploads of some bytes fit on the disk, in half of what is free there, so it never
    fills up.
    """
    used = 0
    for folder, _, names in os.walk(os.environ["GRADIO_TEMP_DIR"]):
        for name in names:
            with suppress(OSError):  # deleted by now
                used += os.stat(os.path.join(folder, name)).st_size
    return size <= min(
        MAX_STORED - used, shutil.disk_usage(os.environ["GRADIO_TEMP_DIR"]).free // 2
    )


# ── Results ───────────────────────────────────────────────────────────────────────────────────────


def memory_of(value: Any) -> int:
    """Return the bytes of memory of a JSON value."""
    inner = (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, (list, tuple))
        else ()
    )
    return sys.getsizeof(value) + sum(map(memory_of, inner))


class Mailbox(asyncio.Queue):
    """The messages for one session of gradio that its client has not read, oldest first.

    A result counts until it is sent.
    """

    unread = 0  # bytes of the results of all sessions

    def put_nowait(self, message: Any) -> None:
        if (output := getattr(message, "output", None)) is not None:
            size = memory_of(output)
            if Mailbox.unread + size > MAX_UNREAD:
                message.success = False
                message.output = error_payload(gr.Error(UNREAD_LIMIT), show_error=True)
            else:
                Mailbox.unread += size
                weakref.finalize(message, self._forget, size)
        super().put_nowait(message)

    def _put(self, message: Any) -> None:
        self._queue.append((time.monotonic(), message))

    def _get(self) -> Any:
        return self._queue.popleft()[1]

    def delete_old(self) -> None:
        while self._queue and is_old(time.monotonic() - self._queue[0][0]):
            self.get_nowait()

    @staticmethod
    def _forget(size: int) -> None:
        Mailbox.unread -= size


def has_result(app: gr.routes.App, event_id: str) -> bool:
    """Whether the result of an API call is computed, or waits to be read."""
    queue = app.get_blocks()._queue
    waiting = queue.pending_event_ids_session.values()
    return event_id in queue.event_ids_to_events or any(event_id in ids for ids in waiting)


def delete_old_results(app: gr.routes.App) -> None:
    """Delete old messages, and what gradio knows of their sessions."""
    queue = app.get_blocks()._queue
    mailboxes = queue.pending_messages_per_session
    ids = queue.pending_event_ids_session
    for session, mailbox in mailboxes.items():
        mailbox.delete_old()
        if mailbox.empty() and session in ids:  # what is not computed any more can never be read
            ids[session].intersection_update(queue.event_ids_to_events)
    # gradio has as many mailboxes as it limits, but any number of these
    for session in ids.keys() - mailboxes.keys():
        del ids[session]


@asynccontextmanager
async def sweeping(app: gr.routes.App) -> AsyncIterator[None]:
    """Delete old files and results every `SWEEP_SECONDS`, for as long as the app is served."""

    async def sweep() -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                await asyncio.to_thread(delete_old_files)
                delete_old_results(app)
            except Exception:  # reported, and not the end of the sweeps
                traceback.print_exc()

    task = asyncio.create_task(sweep())
    yield
    task.cancel()
