"""What reaches gradio, and what does not.

Worth knowing:

1. Gradio has routes that this page has no use for: one writes a session to the disk (``deep_link``), others fetch for the
   client (``proxy=``, ``file=http…``) or take recordings. They answer 404.
2. Requests other than uploads are text: beyond `MAX_BODY`, and uploads of one or several files beyond `MAX_UPLOAD`, they answer
   413, and no more of them is read.
3. Nothing here looks into what a request holds.
"""

import re
from contextlib import suppress

from starlette.formparsers import MultiPartException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from tables import MAX_BYTES

MAX_BODY = 4 * 2**20
MAX_UPLOAD = MAX_BYTES + 2**20
CLOSED = re.compile(
    r"^/(gradio_api/)?(deep_link|proxy=|file=\w+:|process_recording|vibe-|undo-vibe|run-history|runs|monitoring|dev/|"
    r"profiling|component_server|openapi\.json|docs|redoc)"
)
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


class TooLarge(Exception):
    """A request is longer than it may be."""


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
        upload = path in ("/gradio_api/upload", "/upload")
        read, started, too_large = 0, False, False

        async def counted() -> Message:
            nonlocal read, too_large
            message = await receive()
            read += len(message.get("body", b""))
            if read > (MAX_UPLOAD if upload else MAX_BODY):
                too_large = True
                # on the one, gradio deletes what it has written
                raise MultiPartException("too large") if upload else TooLarge
            return message

        async def answered(message: Message) -> None:
            nonlocal started
            if too_large and not started:
                return  # what gradio makes of a request that was broken off
            if message["type"] == "http.response.start":
                started = True
                ours = HEADERS if path.startswith("/gradio_api/file=") else HEADERS[:2]
                message["headers"] = [*message.get("headers", []), *ours]
            await send(message)

        with suppress(TooLarge):
            await self.app(scope, counted, answered)
        if too_large and not started:
            await PlainTextResponse("The request is too large.", 413)(scope, receive, send)
