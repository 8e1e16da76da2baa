"""Filter the requests that reach gradio.

Worth knowing:

1. Routes that gradio always has, and that the page does not use, are answered with 404. One writes a session to the disk
   (``deep_link``), others fetch for the client (``proxy=``, ``file=http…``) or accept recordings.
2. An upload of more than `MAX_UPLOAD` bytes, and any other request of more than `MAX_BODY`, is answered with 413. An upload
   for which the disk has no room is answered with 429 (see `retention.py`). The rest of its body is not read.
3. A response is sent in parts, and the next part waits until the client has taken the one before. Of a response that the client
   has not taken after `KEPT_SECONDS`, nothing more is sent.
4. The content of requests is never inspected. gradio downloads a URL that stands where a file is expected:
   `harden_gradio` refuses it.
"""

import asyncio
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from operator import attrgetter
from typing import Any

import gradio as gr
from retention import (
    FOLDER_BYTES,
    KEPT_SECONDS,
    MAX_STORED,
    STORAGE,
    SWEEP_SECONDS,
    Mailbox,
    has_result,
)
from starlette.formparsers import MultiPartException
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from tables import MAX_BYTES

MAX_BODY = 4 * 2**20
MAX_UPLOAD = MAX_BYTES + 2**20
PART = 64 * 2**10  # bytes of a response that are sent at once
NO_ROOM = f"The files of all users have reached {MAX_STORED // 2**20:,} MB: try again in {SWEEP_SECONDS} seconds."
NO_RESULT = f"There is no such result. A result is deleted once it is read, or after {KEPT_SECONDS} seconds."
CLOSED = re.compile(
    r"^/(gradio_api/)?(deep_link|proxy=|file=\w+:|process_recording|vibe-|undo-vibe|monitoring|dev/|component_server|"
    r"openapi\.json)"
)
HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


class Guard:
    """ASGI middleware around gradio's application."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if CLOSED.match(path):
            return await PlainTextResponse("Not found", 404)(scope, receive, send)
        reads_result = scope["method"] == "GET" and path.startswith("/gradio_api/call/")
        if reads_result and not has_result(scope["app"], path.rpartition("/")[2]):  # gradio would wait for it forever
            return await JSONResponse({"detail": NO_RESULT}, 404)(scope, receive, send)
        upload = path == "/gradio_api/upload"
        read, started, stalled = 0, False, False
        refusal: JSONResponse | None = None

        async def counting_receive() -> Message:
            nonlocal read, refusal
            if stalled:
                return {"type": "http.disconnect"}
            message = await receive()
            size = len(message.get("body", b""))
            read += size
            if read > (MAX_UPLOAD if upload else MAX_BODY):
                refusal = JSONResponse({"detail": "The request is too large."}, 413)  # the page shows the detail
            elif upload and not await STORAGE.take(size):
                refusal = JSONResponse({"detail": NO_ROOM}, 429, {"retry-after": str(SWEEP_SECONDS)})
            if refusal is not None:
                raise MultiPartException("refused")  # gradio then deletes the partial file of an upload
            if upload and message["type"] == "http.disconnect":
                raise MultiPartException("disconnected")
            return message

        async def filtering_send(message: Message) -> None:
            nonlocal started, stalled
            if stalled or (refusal is not None and not started):
                return  # discard the rest, or the reply of gradio to the aborted request
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", []), *HEADERS]
                if path.startswith("/gradio_api/file="):  # a download, which is deleted in time
                    message["headers"].append((b"cache-control", b"no-store"))
            try:
                async with asyncio.timeout(KEPT_SECONDS):
                    for part in split(message):
                        await send(part)
            except TimeoutError:
                stalled = True

        with suppress(MultiPartException):
            await self.app(scope, counting_receive, filtering_send)
        if refusal is not None and not started:
            await refusal(scope, receive, send)


def split(message: Message) -> Iterator[Message]:
    """Yield a message in parts. uvicorn would take a whole message at once, and keep what the client does not take."""
    body = message.get("body", b"")
    last = max(len(body) - 1, 0) // PART * PART
    for start in range(0, last, PART):
        yield message | {"body": body[start : start + PART], "more_body": True}
    yield message | {"body": body[last:]} if last else message


class OwnUpload(gr.route_utils.GradioUploadFile):
    """An upload in a folder of its own. gradio names the folder by content, and the first reader deletes the file."""

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.sha.update(os.urandom(32))
        if self.filename:  # gradio stores the file under this name
            encoding = sys.getfilesystemencoding()
            self.filename = self.filename.encode(encoding, "replace").decode(encoding)
        STORAGE.room -= FOLDER_BYTES


async def refuse_url(url: str) -> None:
    raise gr.Error("A URL is not fetched: upload the file.", print_exception=False)


# parts of gradio that the Space replaces or reads; not all of them are documented
REPLACED = {
    "route_utils.GradioUploadFile": OwnUpload,
    "processing_utils.async_ssrf_protected_get": refuse_url,
    "queueing.AsyncQueue": Mailbox,
    "state_holder.SessionState._update_value_in_config": lambda *_: None,
}
READ_OF_PAGES = tuple(
    f"_queue.{name}" for name in ("pending_messages_per_session", "pending_event_ids_session", "event_ids_to_events")
)
READ_OF_STATES = ("session_data", "time_last_used")


def harden_gradio(page: gr.Blocks) -> None:
    """Keep equal uploads apart, let no client make the server download, and limit what is kept (see `retention.py`).

    Raises:
        ImportError: this version of gradio has not the parts that this replaces.
    """
    states = gr.state_holder.StateHolder()
    try:
        for owner, names in ((page, READ_OF_PAGES), (states, READ_OF_STATES), (gr, REPLACED)):
            attrgetter(*names)(owner)
    except AttributeError as error:
        raise ImportError(f"the Space needs gradio 6.31, and this is gradio {gr.__version__}: {error}") from error
    for name, ours in REPLACED.items():
        owner, _, attribute = name.rpartition(".")
        setattr(attrgetter(owner)(gr), attribute, ours)
