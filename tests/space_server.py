"""Run the Space in its own process, for the tests of its page and its API."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import httpx
import pytest
from conftest import ROOT, free_port, server
from forked import COMMANDS, LIBRARIES, Process
from gradio_client import Client


class SpaceServer:
    """Run ``python space/app.py`` on a free port until the end of a ``with`` block.

    Args:
        model: the checkpoint; None if ``settings`` name it, as on the Hub.
        folder: the folder for the log and the temporary files.
        app: the script; by default that of this repository.
        settings: environment variables, added to the current ones.

    Attributes:
        address: the URL of the page.
        http: a client that sends requests to it.
        scratch: the process's folder for temporary files.
    """

    def __init__(
        self,
        model: str | None,
        folder: Path,
        app: Path = ROOT / "space" / "app.py",
        settings: dict[str, str] | None = None,
    ):
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.scratch = folder / "tmp"
        self._log = folder / "log"
        # the server may close a connection at any time
        no_reuse = httpx.Limits(max_keepalive_connections=0)
        self.http = httpx.Client(base_url=self.address, timeout=120, limits=no_reuse)
        self.scratch.mkdir()
        ours = {
            "GRADIO_SERVER_NAME": "127.0.0.1",
            "GRADIO_SERVER_PORT": str(self.port),
            "TMPDIR": str(self.scratch),
        }
        words = [str(app), *(() if model is None else ("--model", model))]
        environment = os.environ | ours | {"HF_HUB_OFFLINE": "1"} | (settings or {})
        with open(os.devnull) as nothing, self._log.open("wb") as log:
            # cwd is not the repository, because on the Hub there is none
            # libraries may read the settings at import
            modules = LIBRARIES if settings else COMMANDS
            self._process = Process(
                server(modules), words, folder, environment, [nothing, log, log]
            )
        try:
            wait_until(self._is_listening, seconds=120)
        except BaseException:  # such as a time limit: nothing else would stop the process
            self.__exit__()
            raise

    def _is_listening(self) -> bool:
        assert self._process.poll() is None, self.log()
        with socket.socket() as there:
            return there.connect_ex(("127.0.0.1", self.port)) == 0

    def log(self) -> str:
        """Return the output so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def files(self) -> dict[Path, bytes]:
        """Return the contents of the files in `scratch`, by path."""
        return {path: path.read_bytes() for path in self.scratch.rglob("*") if path.is_file()}

    @cached_property
    def client(self) -> Client:
        """Return a client of the API."""
        return Client(self.address, verbose=False)

    # ── Requests ──────────────────────────────────────────────────────────────────────────────────

    def upload(self, content: bytes, name: str = "texts.txt") -> httpx.Response:
        return self.http.post("/gradio_api/upload", files={"files": (name, content)})

    def call(self, name: str, *data: object) -> str:
        """Call the API without a client library.

        Return the id of the event, with which `result` reads the result.
        """
        called = self.http.post(f"/gradio_api/call/{name}", json={"data": data})
        assert called.status_code == 200, called.text
        return called.json()["event_id"]

    def result(self, name: str, event: str) -> httpx.Response:
        return self.http.get(f"/gradio_api/call/{name}/{event}")

    def join(self, function: str, data: list, session: str) -> httpx.Response:
        """Call a function of the page as the browser does.

        `press` also reads the messages of the server.
        """
        functions = self.http.get("/config").json()["dependencies"]
        number = next(one["id"] for one in functions if function in (one["api_name"], one["id"]))
        # JSON in ASCII, because UTF-8 has no half of a surrogate pair
        body = json.dumps({"data": data, "fn_index": number, "session_hash": session}).encode(
            "ascii"
        )
        headers = {"content-type": "application/json"}
        return self.http.post("/gradio_api/queue/join", content=body, headers=headers)

    def press(self, function: str, data: list, session: str) -> str:
        assert self.join(function, data, session).status_code == 200
        return self.http.get("/gradio_api/queue/data", params={"session_hash": session}).text

    def open_file(self, content: bytes, session: str, name: str = "texts.txt") -> None:
        self.press("open_file", [[stored(self.upload(content, name))], None, None], session)

    def run_file(self, session: str, target: float = 0.9) -> str:
        return self.press("run_file", [None, "text", target, None], session)

    # ── The end ───────────────────────────────────────────────────────────────────────────────────

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(timeout=120) is not None, self.log()

    def __enter__(self) -> "SpaceServer":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.stop()
        finally:
            self._process.send_signal(signal.SIGKILL)  # if it has not stopped
            self.http.close()


def stored(upload: httpx.Response) -> dict:
    """Return how functions and endpoints are given an uploaded file."""
    return {"path": upload.json()[0], "meta": {"_type": "gradio.FileData"}}


def wait_until(condition: Callable[[], bool], seconds: int = 60) -> None:
    for _ in range(5 * seconds):
        if condition():
            return
        time.sleep(0.2)
    pytest.fail(f"waited for {seconds} seconds")
