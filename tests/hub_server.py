"""Serve a Hugging Face Hub in memory, for tests. It implements the part of the HTTP protocol that
this project uses.

- `with HubServer() as hub:` serves. A process with the variables of `hub.environment(...)` connects
  to this Hub.
- Models and Spaces can be published, inspected, listed and downloaded. Any other request gets a
  404.
- Files of any size are sent within the commit, and downloaded from the repository: there is no LFS
  and no Xet storage.
- A commit is made completely or not at all. `fail_at` makes requests fail, and `requests` lists the
  requests so far.
"""

import base64
import hashlib
import json
import re
import tempfile
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

SHARED_HOME = "shared-home"  # name of HF_HOME for processes that need no separate home
KINDS = {"model": "models", "space": "spaces"}


class HubError(Exception):
    """Is answered with a status, a message, and a code of the Hub such as ``RepoNotFound``."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass
class Request:
    method: str
    path: str  # with its query
    headers: dict[str, str]  # names in lower case
    body: bytes = b""
    status: int = 0  # 0: the connection was closed without an answer

    @property
    def payload(self) -> dict:
        return json.loads(self.body)


@dataclass
class User:
    name: str
    role: str  # "read" or "write"


@dataclass
class Commit:
    sha: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repo:
    kind: str  # "models" or "spaces"
    id: str
    private: bool = False
    # oldest commit first
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": []})
    variables: dict[str, dict] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """The path of the repository's page on the server."""
        return f"/{self.id}" if self.kind == "models" else f"/{self.kind}/{self.id}"

    def at(self, revision: str) -> Commit:
        commits = self.branches.get(revision) or [
            commit
            for branch in self.branches.values()
            for commit in branch
            if commit.sha == revision
        ]
        if not commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commits[-1]

    def commit(self, branch: str, files: dict[str, bytes], title: str) -> Commit:
        names = sorted((name, git_oid(data)) for name, data in files.items())
        identity = repr((self.id, branch, title, names, len(self.branches[branch])))
        commit = Commit(hashlib.sha1(identity.encode()).hexdigest(), title, files)
        self.branches[branch].append(commit)
        return commit


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def card_errors(content: str) -> list[str]:
    """Return what is wrong with the front matter of a README.md, in the Hub's words.

    Few of the Hub's checks are made.
    """
    found = re.match(r"\s*---\n(.*?)^---$", content, re.DOTALL | re.MULTILINE)
    try:
        data = (yaml.safe_load(found[1]) if found else None) or {}
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {' '.join(str(error).split())}"]
    return [] if isinstance(data.get("tags", []), list) else ['"tags" must be an array']


class HubServer:
    """Serve the Hub within a ``with`` block.

    Attributes:
        endpoint: the URL of the Hub.
        requests: all requests so far.
    """

    def __init__(self) -> None:
        self.users: dict[str, User] = {}  # by token
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self.lock = threading.RLock()
        self._faults: list[list] = []  # requests to go, regular expression, how to fail
        self._server = Listener(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> "HubServer":
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._folder.cleanup()

    # ── For tests ─────────────────────────────────────────────────────────────────────────────────

    def environment(
        self, home: Path | str | None = None, token: str | None = None
    ) -> dict[str, str]:
        """Return the variables of a process that uses this Hub, and a cache and login in ``home``.

        By default all processes of the hub share one home, which saves them the imports, see
        `conftest.run`.
        """
        home = Path(self._folder.name) / SHARED_HOME if home is None else home
        variables = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        return (
            variables
            | {"HF_HUB_DISABLE_TELEMETRY": "1"}
            | ({} if token is None else {"HF_TOKEN": token})
        )

    def add_user(self, name: str, token: str, role: str = "write") -> None:
        self.users[token] = User(name, role)

    def add_repo(self, repo_id: str, files: dict[str, bytes] | Path, private: bool = False) -> str:
        """Commit files to main of a model, in addition to the files there.

        Return the sha of the commit.
        """
        if isinstance(files, Path):
            paths = [path for path in files.rglob("*") if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        key = ("models", repo_id)
        with self.lock:
            repo = self.repos.setdefault(key, Repo(*key, private))
            before = repo.branches["main"][-1].files if repo.branches["main"] else {}
            return repo.commit("main", before | files, "Add files").sha

    def commits(
        self, repo_id: str, revision: str = "main", repo_type: str = "model"
    ) -> list[Commit]:
        """Return the commits of a branch, oldest first."""
        return list(self.repos[KINDS[repo_type], repo_id].branches[revision])

    def files(
        self, repo_id: str, revision: str = "main", repo_type: str = "model"
    ) -> dict[str, bytes]:
        return dict(self.repos[KINDS[repo_type], repo_id].at(revision).files)

    def write(self, repo_id: str, folder: Path, repo_type: str = "model") -> Path:
        """Write the files of a repository to a folder, and return the folder."""
        for name, content in self.files(repo_id, repo_type=repo_type).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder

    def fail_at(self, number: int, match: str = "", how: str = "drop") -> None:
        """Make a later request fail: the one with this number, from 1, among those whose "METHOD
        path" matches.

        Args:
            match: a regular expression.
            how: "drop" closes the connection without handling the request. A status such as "503"
            is sent as the reply.
        """
        with self.lock:
            self._faults.append([number, match, how])

    # ── Requests ──────────────────────────────────────────────────────────────────────────────────

    def answer(self, request: Request) -> tuple[Any, dict[str, str]] | None:
        """Handle a request.

        Return body and headers, or None if the connection is to be closed without an answer.
        """
        self.requests.append(request)
        for fault in self._faults:
            fault[0] -= bool(re.search(fault[1], f"{request.method} {request.path}"))
        due = [how for remaining, _, how in self._faults if remaining == 0]
        self._faults = [fault for fault in self._faults if fault[0] > 0]
        if due == ["drop"]:
            return None
        request.status = 200
        headers = {}
        try:
            if due:
                raise HubError(int(due[0]), "Failing on request of the test")
            body = self.route(request, headers)
        except HubError as error:
            request.status = error.status
            body = {"error": str(error)}
            headers |= {"X-Error-Message": str(error)} | (
                {"X-Error-Code": error.code} if error.code else {}
            )
        return body, headers

    def route(self, request: Request, headers: dict[str, str]) -> Any:
        """Return the body, bytes as they are and anything else as JSON. Status and ``headers`` are
        set.
        """
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        user = self.users.get(token)
        if scheme and user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        method = "GET" if request.method == "HEAD" else request.method
        match [method, *unquote(urlsplit(request.path).path).strip("/").split("/")]:
            case ["GET", "api", "whoami-v2"]:
                if user is None:
                    raise HubError(401, "Invalid username or password.")
                token = {"displayName": "test", "role": user.role}
                return {
                    "type": "user",
                    "name": user.name,
                    "orgs": [],
                    "auth": {"accessToken": token},
                }
            case ["POST", "api", "validate-yaml"]:
                errors = card_errors(request.payload["content"])
                request.status = 400 if errors else 200
                if request.headers.get("accept") == "text/plain":
                    return "\n".join(f"- Error: {line}" for line in errors).encode()
                return {"errors": [{"message": line} for line in errors], "warnings": []}
            case ["POST", "api", "repos", "create"]:
                return self.create_repo(request, user)
            case [_, "api", ("models" | "spaces") as kind, owner, name, *what]:
                repo = self.visible_repo(kind, f"{owner}/{name}", user, writes=method == "POST")
                return self.of_repo(request, repo, method, what)
            case ["GET", "spaces", owner, name, "resolve", revision, *path]:
                repo = self.visible_repo("spaces", f"{owner}/{name}", user)
                return resolve(request, headers, repo, revision, "/".join(path))
            case ["GET", owner, name, "resolve", revision, *path]:
                repo = self.visible_repo("models", f"{owner}/{name}", user)
                return resolve(request, headers, repo, revision, "/".join(path))
        raise HubError(404, "Sorry, we can't find the page you are looking for.")

    def visible_repo(
        self, kind: str, repo_id: str, user: User | None, writes: bool = False
    ) -> Repo:
        repo = self.repos.get((kind, repo_id))
        mine = user is not None and repo_id.split("/")[0] == user.name
        if repo is None or (repo.private and not mine):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if writes and not (mine and user.role != "read"):
            raise HubError(403, "Forbidden: you may not write to this repository")
        return repo

    def create_repo(self, request: Request, user: User | None) -> Any:
        payload = request.payload
        kind = KINDS[payload.get("type") or "model"]
        if user is None or user.role == "read":
            raise HubError(403, "Forbidden: this token has no write permission")
        repo = Repo(kind, f"{payload.get('organization') or user.name}/{payload['name']}")
        repo.private = payload.get("visibility") == "private"
        if (kind, repo.id) in self.repos:
            request.status = 409
        else:
            repo.commit("main", {".gitattributes": b""}, "initial commit")
            self.repos[kind, repo.id] = repo
        return {"url": f"{self.endpoint}{repo.place}"}

    def of_repo(self, request: Request, repo: Repo, method: str, what: list[str]) -> Any:
        """Handle a request to the API of a repository."""
        match [method, *what]:
            case ["POST", "branch", branch]:
                if branch in repo.branches:
                    raise HubError(409, f"Reference already exists: {branch}")
                repo.branches[branch] = list(repo.branches["main"])
                return {}
            case ["POST", "variables"]:
                repo.variables[request.payload["key"]] = request.payload
                return repo.variables
            case ["POST", "preupload", branch]:
                there = repo.at(branch).files
                files = []
                for file in request.payload["files"]:
                    known = {"oid": git_oid(there[file["path"]])} if file["path"] in there else {}
                    files.append(
                        {
                            "path": file["path"],
                            "uploadMode": "regular",
                            "shouldIgnore": False,
                            **known,
                        }
                    )
                return {"files": files, "commitOid": repo.at(branch).sha}
            case ["POST", "commit", branch]:
                header, *changes = [
                    json.loads(line)["value"] for line in request.body.splitlines() if line.strip()
                ]
                files = dict(repo.at(branch).files)
                for change in changes:
                    if "content" in change:
                        files[change["path"]] = base64.b64decode(change["content"])
                    else:
                        del files[change["path"]]
                sha = repo.commit(branch, files, header["summary"]).sha
                url = f"{self.endpoint}{repo.place}/commit/{sha}"
                return {"success": True, "commitOid": sha, "commitUrl": url}
            case ["GET", "tree", revision, *path]:  # recursively, without folders
                folder = "".join(f"{part}/" for part in path)
                files = {
                    name: data
                    for name, data in repo.at(revision).files.items()
                    if name.startswith(folder)
                }
                if folder and not files:
                    raise HubError(404, f"{folder} does not exist", "EntryNotFound")
                return [
                    {"type": "file", "path": name, "oid": git_oid(data), "size": len(data)}
                    for name, data in files.items()
                ]
            case ["GET"] | ["GET", "revision", _]:
                commit = repo.at(what[1] if what else "main")
                siblings = [{"rfilename": path} for path in sorted(commit.files)]
                return {
                    "id": repo.id,
                    "sha": commit.sha,
                    "private": repo.private,
                    "siblings": siblings,
                }
        raise HubError(404, "Sorry, we can't find the page you are looking for.")


def resolve(request: Request, headers: dict[str, str], repo: Repo, revision: str, path: str) -> Any:
    """Return the content of a file."""
    commit = repo.at(revision)
    headers["X-Repo-Commit"] = commit.sha
    if path not in commit.files:
        raise HubError(404, "Entry not found", "EntryNotFound")
    headers["ETag"] = f'"{git_oid(commit.files[path])}"'
    return commit.files[path]


# ── The server ────────────────────────────────────────────────────────────────────────────────────


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # send head and body in one packet: a second packet would wait for an acknowledgement
    wbufsize = -1
    hub: HubServer

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, body)
        with self.hub.lock:
            answer = self.hub.answer(request)
        if answer is None:
            self.close_connection = True
            return
        body, named = answer
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(request.status)
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            **named,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = handle_request

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Listener(ThreadingHTTPServer):
    request_queue_size = 128  # clients download with several threads
