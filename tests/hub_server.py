"""Serve a Hugging Face Hub in memory, for tests. It implements the part of the HTTP protocol that this project uses.

- `with HubServer() as hub:` serves. A process with the variables of `hub.environment(...)` connects to this Hub.
- Models and Spaces can be published, inspected, listed and downloaded. Any other request gets a 404.
- There is no Xet storage. huggingface_hub 2 with hf_xet uploads large files by Xet whatever a server replies, so uploads need
  HF_HUB_DISABLE_XET=1.
- Large files are at localhost, which is another host to a client, like the Hub's CDN: no token may be sent there.
- A commit is made completely or not at all. `fail_at` makes requests fail, and `requests` lists the requests so far.
- Messages are the Hub's where they are known. The checks of a README.md are only some of the Hub's.
"""

import base64
import hashlib
import json
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

SHARED_HOME = "shared-home"  # name of HF_HOME for processes that need no separate home

KINDS = {"model": "models", "space": "spaces"}
LFS_SIZE = 10 * 2**20  # larger files are LFS whatever their content
LFS_NAMES = re.compile(
    r".*\.(7z|arrow|bin|bz2|ckpt|gz|h5|joblib|model|msgpack|npy|npz|onnx|parquet|pickle|pkl|pth?|safetensors|tar|zip)",
    re.IGNORECASE,
)
ATTRIBUTES = b"*.bin filter=lfs diff=lfs merge=lfs -text\n*.safetensors filter=lfs diff=lfs merge=lfs -text\n"

# The schema of the front matter of a README.md. str: any string; "a|b": a or b; [form]: a list; {form}: one value or a list;
# object: anything. A name that ends in `!` is required.
SDKS = "gradio|docker|static|streamlit"
RESULT = {
    "task!": {"type!": str, "name": str},
    "dataset!": {"name!": str, "type!": str, "split": str},
    "metrics!": [{"type!": str, "value!": object, "name": str}],
}
CARD = {
    **dict.fromkeys(["pipeline_tag", "library_name", "license"], str),
    "tags": {str},
    "base_model": {str},
    "base_model_relation": "adapter|merge|quantized|finetune",
    "model-index": [{"name!": str, "results!": [RESULT]}],
}
SPACE_CARD = {"sdk!": SDKS, "title": str, "app_file": str}


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None, **more: Any):
        super().__init__(message)
        self.status, self.message, self.code, self.headers, self.more = status, message, code, headers or {}, more


@dataclass
class Request:
    method: str
    path: str  # with its query
    headers: dict[str, str]  # names in lower case
    status: int = 0  # 0: the connection was closed without an answer


@dataclass
class Answer:
    body: Any = b""  # bytes as they are, anything else as JSON
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class User:
    name: str
    role: str
    orgs: tuple[str, ...]


@dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @cached_property
    def oid(self) -> str:
        """The git object id of the content, or for LFS of the pointer."""
        stored = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()


@dataclass
class Commit:
    sha: str
    title: str
    author: str
    parent: str | None
    files: dict[str, Blob]


@dataclass
class Repo:
    kind: str  # "models" or "spaces"
    id: str
    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # uploaded large files, by sha256
    variables: dict[str, dict] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    @property
    def url(self) -> str:
        """The path of the repository on the server."""
        return f"/{self.id}" if self.kind == "models" else f"/{self.kind}/{self.id}"

    def at(self, revision: str) -> Commit:
        for ref in (revision, f"refs/heads/{revision}"):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        if revision in self.commits:
            return self.commits[revision]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, commit: Commit | None) -> Iterator[Commit]:
        """Yield a commit and its ancestors, newest first."""
        while commit:
            yield commit
            commit = self.commits.get(commit.parent)

    def commit(self, ref: str, files: dict[str, Blob], title: str, author: str) -> Commit:
        parent = self.refs.get(ref)
        made = Commit("", title, author, parent, files)
        names = sorted((path, blob.oid) for path, blob in files.items())
        identity = json.dumps([self.kind, self.id, ref, parent, names, title, len(self.commits)])
        made.sha = self.refs[ref] = hashlib.sha1(identity.encode()).hexdigest()
        self.commits[made.sha] = made
        return made


@dataclass
class Call:
    """A request that is being handled."""

    hub: "HubServer"
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    user: User | None = None

    @cached_property
    def payload(self) -> dict:
        try:
            return json.loads(self.body or b"{}")
        except ValueError as error:
            raise HubError(400, f"Invalid JSON: {error}") from error

    def sign_in(self) -> None:
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        if scheme:
            self.user = self.hub.users.get(token)
            if self.user is None:
                raise HubError(401, "Invalid credentials in Authorization header")

    def belongs(self, namespace: str) -> bool:
        return self.user is not None and namespace in (self.user.name, *self.user.orgs)

    def need_write_token(self) -> None:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        if self.user.role == "read":
            raise HubError(403, "Forbidden: this token has no write permission")

    def repo(self, kind: str, repo_id: str, access: str) -> Repo:
        """Return a repository, or raise HubError if the user lacks the access "read" or "write". "" needs no rights."""
        repo = self.hub.repos.get((kind, repo_id))
        mine = repo is not None and self.belongs(repo.namespace)
        if repo is None or (repo.private and access and not mine):
            if self.user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if access == "write":
            self.need_write_token()
            if not mine:
                raise HubError(403, "Forbidden: you may not write to this repository")
        return repo

    def arguments(self, matched: dict[str, str | None], access: str) -> dict[str, Any]:
        """Return the arguments of a route's function: the repository and the commit are looked up, other text is unquoted."""
        arguments: dict[str, Any] = {name: value and unquote(value) for name, value in matched.items()}
        if "repo" in arguments:
            arguments["repo"] = self.repo(arguments.pop("kind") or "models", arguments["repo"], access)
        if "rev" in arguments:
            arguments["commit"] = arguments["repo"].at(arguments.pop("rev") or "main")
        return arguments


def is_lfs(path: str, size: int, sample: bytes) -> bool:
    return size > 0 and (size > LFS_SIZE or b"\0" in sample[:512] or LFS_NAMES.fullmatch(path) is not None)


# --- model cards ---


def front_matter(text: str) -> Any:
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", text, re.DOTALL | re.MULTILINE)
    return yaml.safe_load(match[1]) if match else None


def card_data(commit: Commit) -> dict:
    try:
        data = front_matter(commit.files["README.md"].data.decode())
    except (KeyError, ValueError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}


def card_errors(content: str, kind: str) -> list[str]:
    """Return the errors of a README.md."""
    try:
        data = front_matter(content) or {}
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {' '.join(str(error).split())}"]
    return list(schema_errors(data, CARD | (SPACE_CARD if kind == "spaces" else {}), ""))


def schema_errors(value: Any, form: Any, where: str) -> Iterator[str]:
    """Yield the deviations of a value from its form, see `CARD`, in the Hub's words."""
    if isinstance(form, set):
        (form,) = form
        form = [form] if isinstance(value, list) else form
    if isinstance(form, dict) and isinstance(value, dict):
        for key, inner in form.items():
            name = f"{where}.{key}".strip(".!")
            if value.get(key.rstrip("!")) is not None:
                yield from schema_errors(value[key.rstrip("!")], inner, name)
            elif key.endswith("!"):
                yield f'"{name}" is required'
    elif isinstance(form, list) and isinstance(value, list):
        for number, item in enumerate(value):
            yield from schema_errors(item, form[0], f"{where}[{number}]")
    elif isinstance(form, dict | list):
        yield f'"{where}" must be {"of type object" if isinstance(form, dict) else "an array"}'
    elif form is not object and not isinstance(value, str):
        yield f'"{where}" must be a string'
    elif isinstance(form, str) and not re.fullmatch(form, value):
        yield f'"{where}" must be one of [{form}]'


# --- routes ---

ROUTES: list[tuple[re.Pattern, re.Pattern, str, Callable[..., Answer]]] = []
PIECES = {
    "{kind}": "(?P<kind>models|spaces)",
    "{prefix}": "(?:(?P<kind>spaces)/)?",
    "{repo}": "(?P<repo>[^/]+(?:/[^/]+)??)",
    "{rev}": "(?P<rev>[^/]+)",
    "{ref}": "(?P<ref>[^/]+)",
    "{oid}": "(?P<oid>[0-9a-f]{64})",
    "{path}": "(?P<path>.*)",
}


def route(methods: str, template: str, access: str = "") -> Callable:
    """Register a function for requests. If several routes match a request, the first in this file handles it.

    Args:
        access: see `Call.repo`.
    """
    pattern = re.compile(re.sub(r"\{\w+\}", lambda match: PIECES.get(match[0], match[0]), template))

    def register(function: Callable[..., Answer]) -> Callable[..., Answer]:
        ROUTES.append((re.compile(methods), pattern, access, function))
        return function

    return register


def dispatch(call: Call) -> Answer:
    method = "GET" if call.method == "HEAD" else call.method
    try:
        call.sign_in()
        for methods, pattern, access, function in ROUTES:
            match = pattern.fullmatch(call.path) if methods.fullmatch(method) else None
            if match:
                return function(call, **call.arguments(match.groupdict(), access))
        raise HubError(404, "Sorry, we can't find the page you are looking for.")
    except HubError as error:
        return failure(error)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return failure(HubError(400, f"Not understood: {error!r}"))


def failure(error: HubError) -> Answer:
    line = " ".join(error.message.split()).encode("ascii", "replace").decode()
    headers = {**error.headers, "X-Error-Message": line} | ({"X-Error-Code": error.code} if error.code else {})
    return Answer({"error": error.message, **error.more}, error.status, headers)


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Answer:
    user = call.user
    if user is None:
        raise HubError(401, "Invalid username or password.")
    token: dict[str, Any] = {"displayName": "test", "role": user.role}
    if user.role == "fineGrained":
        owners = {user.name: "user"} | dict.fromkeys(user.orgs, "org")
        may = {"permissions": ["repo.content.read", "repo.write"]}
        scoped = [{"entity": {"_id": name, "type": kind, "name": name}, **may} for name, kind in owners.items()]
        token["fineGrained"] = {"global": [], "scoped": scoped}
    orgs = [{"type": "org", "id": org, "name": org, "fullname": org, "roleInOrg": "admin"} for org in user.orgs]
    about = {"type": "user", "id": user.name, "name": user.name, "fullname": user.name, "isPro": False}
    return Answer({**about, "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}})


@route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Answer:
    errors = card_errors(call.payload["content"], KINDS[call.payload.get("repoType", "model")])
    if call.headers.get("accept") == "text/plain":
        return Answer("\n".join(f"- Error: {line}" for line in errors).encode(), 400 if errors else 200)
    return Answer({"errors": [{"message": line} for line in errors], "warnings": []}, 400 if errors else 200)


@route("POST", "/api/repos/create")
def create_repo(call: Call) -> Answer:
    call.need_write_token()
    payload, kind = call.payload, KINDS[call.payload.get("type") or "model"]
    repo_id = f"{payload.get('organization') or call.user.name}/{payload['name']}"
    repo = Repo(kind, repo_id, private=payload.get("visibility") == "private")
    what, url = kind.removesuffix("s"), call.hub.endpoint + repo.url
    if not re.fullmatch(r"(?!.*(--|\.\.)|.*\.git$)\w([\w.-]{0,94}\w)?", payload["name"], re.ASCII):
        raise HubError(400, f'Invalid repo name: "{repo_id}"')
    if not call.belongs(repo.namespace):
        raise HubError(403, f'You don\'t have the rights to create a {what} under the namespace "{repo.namespace}"')
    if kind == "spaces" and not re.fullmatch(SDKS, payload.get("sdk") or ""):
        raise HubError(400, f'"sdk" must be one of [{SDKS}]')
    if (kind, repo_id) in call.hub.repos:
        raise HubError(409, f"You already created this {what} repo: {repo_id}", url=url)
    repo.commit("refs/heads/main", {".gitattributes": Blob(ATTRIBUTES, False)}, "initial commit", call.user.name)
    call.hub.repos[kind, repo_id] = repo
    return Answer({"url": url, "name": repo_id, "id": repo_id, "private": repo.private})


@route("POST", "/api/{kind}/{repo}/branch/{ref}", "write")
def create_branch(call: Call, repo: Repo, ref: str) -> Answer:
    name = f"refs/heads/{ref}"
    if name in repo.refs:
        raise HubError(409, f"Reference already exists: {name}")
    repo.refs[name] = repo.at("main").sha
    return Answer({"ref": name, "targetCommit": repo.refs[name]}, 201)


@route("GET|POST", "/api/(?P<kind>spaces)/{repo}/variables", "write")
def variables(call: Call, repo: Repo) -> Answer:
    if call.method == "POST":
        repo.variables[call.payload["key"]] = call.payload
    return Answer(repo.variables)


# --- commits ---


@route("POST", "/api/{kind}/{repo}/preupload/{rev}", "write")
def preupload(call: Call, repo: Repo, commit: Commit) -> Answer:
    files = []
    for file in call.payload["files"]:
        lfs = is_lfs(file["path"], file["size"], base64.b64decode(file.get("sample", "")))
        files.append({"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
        known = commit.files.get(file["path"])
        if known:
            files[-1]["oid"] = known.sha256 if known.lfs else known.oid
    return Answer({"files": files, "commitOid": commit.sha})


@route("POST", "/api/{kind}/{repo}/commit/{ref}", "write")
def make_commit(call: Call, repo: Repo, ref: str) -> Answer:
    ref = f"refs/heads/{ref}"
    head = repo.at(ref)
    header, *changes = [json.loads(line) for line in call.body.splitlines() if line.strip()]
    if header["value"].get("parentCommit") not in (None, head.sha):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for line in changes:
        change(repo, files, line["key"], line["value"])
    if files.get("README.md") not in (None, head.files.get("README.md")):
        errors = card_errors(files["README.md"].data.decode(), repo.kind)
        if errors:
            raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
    sha = repo.commit(ref, files, header["value"]["summary"], call.user.name).sha
    return Answer({"success": True, "commitOid": sha, "commitUrl": f"{call.hub.endpoint}{repo.url}/commit/{sha}"})


def change(repo: Repo, files: dict[str, Blob], key: str, value: dict) -> None:
    """Apply one line of a commit to `files`."""
    path = value["path"]
    if key == "file":
        data = value["content"].encode()
        files[path] = Blob(base64.b64decode(data, validate=True) if value.get("encoding") == "base64" else data, False)
    elif key == "lfsFile":
        data = repo.objects.get(value["oid"])
        if data is None or value.get("size", len(data)) != len(data):
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
        files[path] = Blob(data, True)
    elif files.pop(path, None) is None:  # the key is deletedFile
        raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")


# --- large files ---


@route("POST", r"/{prefix}{repo}\.git/info/lfs/objects/batch", "write")
def lfs_batch(call: Call, repo: Repo) -> Answer:
    verify = {"href": f"{call.hub.endpoint}{repo.url}.git/info/lfs/objects/verify"}
    objects = []
    for entry in call.payload["objects"]:
        upload = {"href": f"{call.hub.cdn}/storage/{repo.kind}/{repo.id}/{entry['oid']}"}
        to_do = {} if entry["oid"] in repo.objects else {"actions": {"upload": upload, "verify": verify}}
        objects.append({"oid": entry["oid"], "size": entry["size"], "authenticated": True, **to_do})
    return Answer({"transfer": "basic", "objects": objects})


@route("PUT", "/storage/{kind}/{repo}/{oid}")  # no token, here and below: the Hub signs such addresses
def lfs_put(call: Call, repo: Repo, oid: str) -> Answer:
    if hashlib.sha256(call.body).hexdigest() != oid:
        raise HubError(400, "The content does not have the sha256 announced")
    repo.objects[oid] = call.body
    return Answer()


@route("POST", r"/{prefix}{repo}\.git/info/lfs/objects/verify", "write")
def lfs_verify(call: Call, repo: Repo) -> Answer:
    if len(repo.objects.get(call.payload["oid"], b"")) != call.payload["size"]:
        raise HubError(404, "The object was not uploaded")
    return Answer({})


@route("GET", "/api/{kind}/{repo}/xet-(?:read|write)-token/{ref}", "read")
def xet_token(call: Call, repo: Repo, ref: str) -> Answer:
    raise HubError(403, "Forbidden: no Xet token is given here")


@route("GET", "/{prefix}{repo}/resolve/{rev}/{path}", "read")
def resolve(call: Call, repo: Repo, commit: Commit, path: str) -> Answer:
    headers = {"X-Repo-Commit": commit.sha}
    blob = commit.files.get(path)
    if blob is None:
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    headers |= {"ETag": f'"{blob.oid}"', "Content-Disposition": f'inline; filename="{quote(path.split("/")[-1])}"'}
    if not blob.lfs:
        return content(blob.data, headers)
    headers |= {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
    headers["Location"] = f"{call.hub.cdn}/cdn/{repo.kind}/{repo.id}/{blob.sha256}"
    return Answer(b"Found", 302, headers)


@route("GET", "/cdn/{kind}/{repo}/{oid}")
def cdn(call: Call, repo: Repo, oid: str) -> Answer:
    return content(repo.objects[oid], {"ETag": f'"{oid}"'})


def content(data: bytes, headers: dict[str, str]) -> Answer:
    return Answer(data, headers={"Content-Type": "application/octet-stream", **headers})


# --- contents of a repository ---


@route("GET", "/api/{kind}/{repo}/tree/{rev}(?:/{path})?", "read")
def tree(call: Call, repo: Repo, commit: Commit, path: str | None) -> Answer:
    """List files recursively, without folders."""
    folder = f"{path.strip('/')}/" if path else ""
    blobs = {name: blob for name, blob in commit.files.items() if name.startswith(folder)}
    if folder and not blobs:
        raise HubError(404, f"{path} does not exist", "EntryNotFound", {"X-Repo-Commit": commit.sha})
    kind = {"type": "file"}
    return Answer([{**kind, "path": name, "oid": blob.oid, "size": len(blob.data)} for name, blob in blobs.items()])


# last, because "/api/models/a/b" matches many paths
@route("GET", "/api/{kind}/{repo}(?:/revision/{rev})?", "read")
def info(call: Call, repo: Repo, commit: Commit) -> Answer:
    card = card_data(commit)
    known = {"id": repo.id, "author": repo.namespace, "sha": commit.sha, "private": repo.private}
    known |= {key: card[key] for key in ("pipeline_tag", "library_name") if key in card}
    return Answer({**known, "siblings": [{"rfilename": path} for path in sorted(commit.files)]})


# --- the server ---


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # send head and body in one packet: a second packet would wait for an acknowledgement
    hub: "HubServer"

    def answer(self) -> None:
        url, body = urlsplit(self.path), self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        call = Call(self.hub, self.command, url.path, parse_qs(url.query), headers, body)
        request = Request(self.command, self.path, headers)
        with self.hub.lock:
            self.hub.requests.append(request)
            how = self.hub.fault(request)
            if how.isdigit():
                reply = failure(HubError(int(how), "Failing on request of the test"))
            elif how != "drop":
                reply = dispatch(call)
            request.status = 0 if how.startswith("drop") else reply.status
        if request.status:
            self.send(reply)
        else:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, reply: Answer) -> None:
        raw = isinstance(reply.body, bytes)
        body = reply.body if raw else json.dumps(reply.body).encode()
        kind = "text/plain; charset=utf-8" if raw else "application/json; charset=utf-8"
        self.send_response(reply.status)
        for name, value in {"Content-Type": kind, **reply.headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Listener(ThreadingHTTPServer):
    request_queue_size = 128  # clients download with several threads


@dataclass
class Fault:
    remaining: int
    match: str
    how: str


class HubServer:
    """Serve the Hub within a ``with`` block.

    Attributes:
        requests: all requests so far.
        endpoint, cdn: the URLs of the Hub, and of its large files.
    """

    def __init__(self) -> None:
        self.users: dict[str, User] = {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self.lock = threading.RLock()
        self._faults: list[Fault] = []
        self._closed = False
        self._server = Listener(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": self}))
        port = self._server.server_address[1]
        self.endpoint, self.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        self._folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._closed = True
        self._folder.cleanup()

    def environment(self, home: Path | str | None = None, token: str | None = None) -> dict[str, str]:
        """Return the variables of a process that uses this Hub, and a cache and login in ``home``.

        By default all processes of the hub share one home, which saves them the imports, see `conftest.run`.
        """
        home = Path(self._folder.name) / SHARED_HOME if home is None else home
        variables = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        variables |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return variables if token is None else {**variables, "HF_TOKEN": token}

    def add_user(self, name: str, token: str, role: str = "write", orgs: tuple[str, ...] = ()) -> None:
        """Add a user with a token of the role "read", "write" or "fineGrained", as `whoami-v2` calls it."""
        self.users[token] = User(name, role, tuple(orgs))

    def add_repo(
        self, repo_id: str, files: dict[str, bytes] | Path, repo_type: str = "model", private: bool = False
    ) -> str:
        """Commit files to main, in addition to the files there. Return the sha of the commit."""
        if isinstance(files, Path):
            paths = [path for path in sorted(files.rglob("*")) if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        key = (KINDS[repo_type], repo_id)
        blobs = {path: Blob(data, is_lfs(path, len(data), data)) for path, data in files.items()}
        with self.lock:
            repo = self.repos.setdefault(key, Repo(*key, private))
            repo.objects |= {blob.sha256: blob.data for blob in blobs.values() if blob.lfs}
            before = repo.at("main").files if repo.refs else {}
            return repo.commit("refs/heads/main", {**before, **blobs}, "Add files", repo.namespace).sha

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        with self.lock:
            commit = self.repos[KINDS[repo_type], repo_id].at(revision)
        return {path: blob.data for path, blob in commit.files.items()}

    def write(self, repo_id: str, folder: Path, repo_type: str = "model") -> Path:
        """Write the files of a repository to a folder, and return the folder."""
        for name, content in self.files(repo_id, repo_type=repo_type).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder

    def commits(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[Commit]:
        """Return the commits of a branch, oldest first."""
        with self.lock:
            repo = self.repos[KINDS[repo_type], repo_id]
            return [*repo.history(repo.at(revision))][::-1]

    def fail_at(self, number: int, match: str = "", how: str = "drop") -> None:
        """Make a later request fail: the one with this number, from 1, among those whose "METHOD path" matches.

        Args:
            match: a regular expression.
            how: "drop" closes the connection without handling the request, "drop-answer" handles the request and sends no
                reply, and a status such as "503" is sent as the reply.
        """
        with self.lock:
            self._faults.append(Fault(number, match, how))

    def fault(self, request: Request) -> str:
        """Return how a request must fail, or "" if it must not."""
        if self._closed:  # but the client kept its connection
            return "drop"
        for fault in self._faults:
            fault.remaining -= bool(re.search(fault.match, f"{request.method} {request.path}"))
        due = [fault for fault in self._faults if fault.remaining == 0]
        self._faults = [fault for fault in self._faults if fault.remaining > 0]
        return due[0].how if due else ""
