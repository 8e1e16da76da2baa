"""Filter the requests that reach gradio.

Worth knowing:

1. Routes that gradio always has, and that the page does not use, are answered with 404. One writes a session to the disk
   (``deep_link``), others fetch for the client (``proxy=``, ``file=http…``) or accept recordings.
2. An upload of more than `MAX_UPLOAD` bytes, and any other request of more than `MAX_BODY`, is answered with 413. The rest
   of its body is not read.
3. The content of requests is never inspected. gradio downloads a URL that stands where a file is expected:
   `harden_gradio` refuses it.
"""

import os
import re
from contextlib import suppress
from typing import Any

import gradio as gr
from starlette.formparsers import MultiPartException
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from tables import MAX_BYTES

MAX_BODY = 4 * 2**20
MAX_UPLOAD = MAX_BYTES + 2**20
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
        upload = path == "/gradio_api/upload"
        read, started, too_large = 0, False, False

        async def counting_receive() -> Message:
            nonlocal read, too_large
            message = await receive()
            read += len(message.get("body", b""))
            if read > (MAX_UPLOAD if upload else MAX_BODY):
                too_large = True
                raise MultiPartException("too large")  # gradio then deletes the partial file of an upload
            if upload and message["type"] == "http.disconnect":
                raise MultiPartException("disconnected")
            return message

        async def filtering_send(message: Message) -> None:
            nonlocal started
            if too_large and not started:
                return  # discard the reply of gradio to the aborted request
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", []), *HEADERS]
                if path.startswith("/gradio_api/file="):  # a download, which is deleted in time
                    message["headers"].append((b"cache-control", b"no-store"))
            await send(message)

        with suppress(MultiPartException):
            await self.app(scope, counting_receive, filtering_send)
        if too_large and not started:
            reply = {"detail": "The request is too large."}  # the page shows the detail
            await JSONResponse(reply, 413)(scope, receive, send)


class OwnUpload(gr.route_utils.GradioUploadFile):
    """An upload in a folder of its own. gradio names the folder by content, and the first reader deletes the file."""

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.sha.update(os.urandom(32))


async def refuse_url(url: str) -> None:
    raise gr.Error("A URL is not fetched: upload the file.", print_exception=False)


def harden_gradio() -> None:
    """Keep equal uploads apart, and let no client make the server download."""
    gr.route_utils.GradioUploadFile = OwnUpload
    gr.processing_utils.async_ssrf_protected_get = refuse_url
