"""Fork Python processes from a server that has already imported the libraries.

Importing torch and transformers takes longer than most tests. A forked process has its own
arguments, folder, environment, streams, signals and exit code. It differs from a fresh process in
two ways: `sys.modules` holds more from the start, and libraries have read their environment
variables in the server. Tests of imports or of these variables use `subprocess`.
"""

import atexit
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
# these read no variable that a test sets, unlike transformers, datasets and huggingface_hub
LIBRARIES = (
    "fastapi",
    "matplotlib.figure",
    "pandas",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "scipy.optimize",
    "scipy.stats",
    "sklearn.linear_model",
    "sklearn.metrics",
    "torch._dynamo",
    "torch.distributed.tensor",
    "uvicorn",
)
COMMANDS = (*LIBRARIES, "train", "predict", "push_to_hub")


class Server:
    """Start a process with own environment variables that imports modules, possibly of this
    repository, and forks on request.

    Args:
        parent: the server from which this one is forked. It has imported some of the modules, so
        variables that these read at
            import, such as those of OpenMP, have no effect.
    """

    def __init__(
        self,
        modules: tuple[str, ...],
        variables: tuple[tuple[str, str], ...] = (),
        parent: "Server | None" = None,
    ) -> None:
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {
            name: value for name, value in os.environ.items() if name != "PYTHONPATH"
        } | dict(variables)
        self._process = None
        if parent is None:
            line = [sys.executable, __file__, str(theirs.fileno()), *modules]
            self._process = subprocess.Popen(
                line, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment
            )
        else:
            request = {"modules": modules, "environment": environment}
            socket.send_fds(parent.connection, [json.dumps(request).encode()], [theirs.fileno()])
        theirs.close()

    def close(self) -> None:
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.recv(1)  # returns once the process has ended
        if self._process is not None:
            self._process.wait()


class Process:
    """Fork a process. The object has the methods of `subprocess.Popen` that tests need.

    Args:
        words: the arguments of python: a script, or -c and code, followed by their arguments.
        streams: files for standard input, output and error.
    """

    def __init__(
        self,
        server: Server,
        words: list[str],
        cwd: object,
        environment: dict[str, str],
        streams: list,
    ) -> None:
        self._status, theirs = os.pipe()
        request = {"words": words, "cwd": str(cwd), "environment": environment}
        handles = [*(stream.fileno() for stream in streams), theirs]
        socket.send_fds(server.connection, [json.dumps(request).encode()], handles)
        os.close(theirs)
        self.pid = int(os.read(self._status, 16))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self.wait(timeout=0)

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the end of the process, at most ``timeout`` seconds.

        Return its exit code, or None if it still runs.
        """
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = int(os.read(self._status, 16))
            os.close(self._status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def serve(connection: socket.socket, modules: list[str]) -> NoReturn:
    """Import modules, then fork a process for each request, until the connection is closed or
    Ctrl+C is pressed.
    """
    if "train" in modules:
        sys.path.insert(0, str(ROOT))
    for name in modules:
        importlib.import_module(name)
    if "train" in modules:
        del sys.path[0]
    gc.freeze()  # so that forked processes share this memory
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for supervisors and servers
    while True:
        try:
            content, handles, _, _ = socket.recv_fds(connection, 2**20, 4)
        except KeyboardInterrupt:
            content = b""
        if not content:
            os._exit(0)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            connection.close()
            request = json.loads(content)
            if "modules" in request:
                set_environment(request)
                serve(socket.socket(fileno=handles[0]), request["modules"])
            supervise(handles.pop(), request, handles)
        for handle in handles:
            os.close(handle)


def set_environment(request: dict) -> None:
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None  # it was cached from the server's environment


def supervise(status: int, request: dict, streams: list[int]) -> NoReturn:
    """Fork the process of a request, and write its process id and then its exit code to
    ``status``.
    """
    pid = os.fork()
    if pid:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for handle in (0, 1, 2, *streams):
            os.close(handle)
        os.write(status, b"%16d" % pid)
        os.write(status, b"%16d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)
    os.close(status)
    for target, handle in enumerate(streams):
        os.dup2(handle, target)
        os.close(handle)
    os.chdir(request["cwd"])
    set_environment(request)
    first, *sys.argv = request["words"] if request["words"][0] == "-c" else ["", *request["words"]]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if first == "-c":
        code = sys.argv[0]
        name = "<string>"
        sys.argv[0] = "-c"
        sys.path.insert(0, "")
    else:
        name = main.__file__ = sys.argv[0]
        code = Path(name).read_text(encoding="utf-8")
        sys.path.insert(0, str(Path(name).parent))
    run_and_exit(lambda: exec(compile(code, name, "exec"), main.__dict__))


def run_and_exit(script: Callable[[], None]) -> NoReturn:
    """Run a script and exit as the interpreter does, but without the teardown of all modules, which
    takes seconds.
    """
    code = 0
    try:
        script()
    except SystemExit as error:
        code = error.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.modules["__main__"].__dict__.clear()
    gc.collect()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    del sys.path[0]  # the folder of this file
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
