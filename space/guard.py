"""Filter the requests that reach gradio.

Worth knowing:

1. Routes that gradio always has, and that the page does not use, are answered with 404. One writes
   a session to the disk (``deep_link``), others fetch for the client (``proxy=``, ``file=http…``)
   or accept recordings.
2. An upload of more than `MAX_UPLOAD` bytes, and any other request of more than `MAX_BODY`, is
   answered with 413. The rest of its body is not read. Where the disk may have no room for all
   uploads that arrive, one more is answered with 429.
3. A response is sent in parts, and the next part waits until the client has taken the one before.
   Of a response that the client has not taken after `KEPT_SECONDS`, nothing more is sent.
4. The content of requests is never inspected. gradio downloads a URL that stands where a file is
   expected: `harden_gradio` refuses it.
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
from retention import KEPT_SECONDS, MAX_STORED, SWEEP_SECONDS, Mailbox, has_result, has_room
from starlette.formparsers import MultiPartException
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from tables import MAX_BYTES

MAX_BODY = 4 * 2**20
MAX_UPLOAD = MAX_BYTES + 2**20
PART = 64 * 2**10  # bytes of a response that are sent at once
NO_ROOM = (
    f"The files of all users have reached {MAX_STORED // 2**20:,} MB: try again in "
    f"{SWEEP_SECONDS} seconds."
)
NO_RESULT = (
    f"There is no such result. A result is deleted once it is read, or after {KEPT_SECONDS} "
    "seconds."
)
CLOSED = re.compile(
    r"^/(gradio_api/)?(deep_link|proxy=|file=\w+:|process_recording|vibe-|undo-vibe|monitoring|dev/|component_server|"
    r"openapi\.json)"
)
HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


class Guard:
    """ASGI middleware around gradio's application."""

    def __init__(self, app: ASGIApp):
        self.app = app
        self.uploads = 0  # that arrive now

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if CLOSED.match(path):
            return await PlainTextResponse("Not found", 404)(scope, receive, send)
        reads_result = scope["method"] == "GET" and path.startswith("/gradio_api/call/")
        # gradio would wait for it forever
        if reads_result and not has_result(scope["app"], path.rpartition("/")[2]):
            return await JSONResponse({"detail": NO_RESULT}, 404)(scope, receive, send)
        if path != "/gradio_api/upload":
            return await self.forward(scope, receive, send, MAX_BODY)
        self.uploads += 1
        try:
            if await asyncio.to_thread(has_room, self.uploads * MAX_UPLOAD):
                return await self.forward(scope, receive, send, MAX_UPLOAD)
            await JSONResponse({"detail": NO_ROOM}, 429, {"retry-after": str(SWEEP_SECONDS)})(
                scope, receive, send
            )
        finally:
            self.uploads -= 1

    async def forward(self, scope: Scope, receive: Receive, send: Send, max_bytes: int) -> None:
        """Forward a request of at most some bytes to gradio, and its response to the client."""
        read = 0
        refused = False
        started = False
        stalled = False

        async def counting_receive() -> Message:
            nonlocal read, refused
            message = {"type": "http.disconnect"} if stalled else await receive()
            read += len(message.get("body", b""))
            refused = read > max_bytes
            if refused or (max_bytes == MAX_UPLOAD and message["type"] == "http.disconnect"):
                # gradio then deletes the partial file of an upload
                raise MultiPartException("refused")
            return message

        async def filtering_send(message: Message) -> None:
            nonlocal started, stalled
            if stalled or (refused and not started):
                return  # discard the rest, or the reply of gradio to the aborted request
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", []), *HEADERS]
                if "/gradio_api/file=" in scope["path"]:  # a download, which is deleted in time
                    message["headers"].append((b"cache-control", b"no-store"))
            try:
                async with asyncio.timeout(KEPT_SECONDS):
                    for part in split(message):
                        await send(part)
            except TimeoutError:
                stalled = True

        with suppress(MultiPartException):
            await self.app(scope, counting_receive, filtering_send)
        if refused and not started:  # the page shows the detail
            await JSONResponse({"detail": "The request is too large."}, 413)(scope, receive, send)


def split(message: Message) -> Iterator[Message]:
    """Yield a message in parts. uvicorn would take a whole message at once, and keep what the
    client does not take.
    """
    body = message.get("body", b"")
    last = max(len(body) - 1, 0) // PART * PART
    for start in range(0, last, PART):
        yield message | {"body": body[start : start + PART], "more_body": True}
    yield message | {"body": body[last:]} if last else message


class OwnUpload(gr.route_utils.GradioUploadFile):
    """An upload in a folder of its own. gradio names the folder by content, and the first reader
    deletes the file.
    """

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.sha.update(os.urandom(32))
        if self.filename:  # gradio stores the file under this name
            encoding = sys.getfilesystemencoding()
            self.filename = self.filename.encode(encoding, "replace").decode(encoding)


async def refuse_url(url: str) -> None:
    raise gr.Error("A URL is not fetched: upload the file.", print_exception=False)


# parts of gradio that the Space replaces or reads; not all of them are documented
REPLACED = {
    "route_utils.GradioUploadFile": OwnUpload,
    "processing_utils.async_ssrf_protected_get": refuse_url,
    "queueing.AsyncQueue": Mailbox,
    "state_holder.SessionState._update_value_in_config": lambda *_: None,
}
# of the page's queue
READ = ("pending_messages_per_session", "pending_event_ids_session", "event_ids_to_events")


def harden_gradio(page: gr.Blocks) -> None:
    """Keep equal uploads apart, let no client make the server download, and limit what is kept (see
    `retention.py`).

    Raises:
        ImportError: this version of gradio has not the parts that this replaces.
    """
    try:
        attrgetter(*READ)(page._queue), attrgetter(*REPLACED)(gr)
    except AttributeError as error:
        raise ImportError(
            f"the Space needs gradio 6.31, and this is gradio {gr.__version__}: {error}"
        ) from error
    for name, ours in REPLACED.items():
        owner, _, attribute = name.rpartition(".")
        setattr(attrgetter(owner)(gr), attribute, ours)
