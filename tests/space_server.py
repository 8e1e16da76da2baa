"""Run the Space in its own process, for the tests of its page and its API."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT, free_port, server
from forked import COMMANDS, LIBRARIES, Process


class SpaceServer:
    """Run ``python space/app.py`` on a free port until the end of a ``with`` block.

    Args:
        model: the checkpoint; None if ``settings`` name it, as on the Hub.
        folder: the folder for the log and the temporary files.
        app: the script; by default that of this repository.
        settings: environment variables, added to the current ones.
        fresh: whether to start a fresh process, as a shell does, to measure its memory.

    Attributes:
        address: the URL of the page.
        scratch: the process's folder for temporary files.
        pid: the id of the process.
    """

    def __init__(
        self,
        model: str | None,
        folder: Path,
        app: Path = ROOT / "space" / "app.py",
        settings: dict[str, str] | None = None,
        fresh: bool = False,
    ):
        self._process: Process | subprocess.Popen
        port = free_port()
        self.address, self.scratch, self._log = f"http://127.0.0.1:{port}", folder / "tmp", folder / "log"
        self.scratch.mkdir()
        ours = {
            "GRADIO_SERVER_NAME": "127.0.0.1",
            "GRADIO_SERVER_PORT": str(port),
            "TMPDIR": str(self.scratch),
            "HF_HUB_OFFLINE": "1",
        }
        words = [str(app), *(() if model is None else ("--model", model))]
        environment = os.environ | ours | (settings or {})
        with open(os.devnull) as nothing, self._log.open("wb") as log:
            # cwd is not the repository, because on the Hub there is none
            if fresh:
                line = [sys.executable, *words]
                self._process = subprocess.Popen(
                    line, cwd=folder, env=environment, stdin=nothing, stdout=log, stderr=log
                )
            else:
                modules = LIBRARIES if settings else COMMANDS  # libraries may read the settings at import
                self._process = Process(server(modules), words, folder, environment, [nothing, log, log])
        self.pid = self._process.pid
        try:
            self._wait_for(port)
        except BaseException:  # such as a time limit: nothing else would stop the process
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            raise

    def _wait_for(self, port: int) -> None:
        for _ in range(480):
            assert self._process.poll() is None, self.log()
            with socket.socket() as there:
                if there.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.25)
        raise AssertionError(self.log())

    def log(self) -> str:
        """Return the output so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def files(self) -> dict[Path, bytes]:
        """Return the contents of the files in `scratch`, by path."""
        return {path: path.read_bytes() for path in self.scratch.rglob("*") if path.is_file()}

    def memory(self) -> int:
        """Return the resident memory of the process, in bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])

    def stop(self, number: int = signal.SIGTERM) -> None:
        self._process.send_signal(number)
        assert self._process.wait(timeout=120) is not None, self.log()

    def __enter__(self) -> "SpaceServer":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.stop()
        finally:
            self._process.send_signal(signal.SIGKILL)  # if it has not stopped
