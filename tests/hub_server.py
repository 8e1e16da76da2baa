"""A Hugging Face Hub in memory, for tests: enough of its HTTP protocol for the real huggingface_hub client.

- `with HubServer() as hub:` serves; a client comes by HF_ENDPOINT=hub.endpoint or by HfApi(endpoint=hub.endpoint).
- Xet storage is not spoken. huggingface_hub 2 with hf_xet uploads large files by Xet whatever a server answers, so it
  needs HF_HUB_DISABLE_XET=1 to upload here. To download it does not, unless `hub.xet` is "refuse".
- Large files are at localhost, another host to a client, as the Hub's are at a CDN: no token is to be sent there.
- A commit is made whole or not at all. `fail_at` breaks requests, `requests` tells what was asked.
- Messages are the Hub's where they are known; what it checks in a README.md is checked here only in part.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

KINDS = {"model": "models", "dataset": "datasets", "space": "spaces"}
LFS_SIZE = 10 * 2**20  # larger files are LFS whatever they hold
LFS_NAMES = re.compile(
    r".*\.(7z|arrow|bin|bz2|ckpt|gz|h5|joblib|model|msgpack|npy|npz|onnx|parquet|pickle|pkl|pth?|safetensors|tar|zip)",
    re.IGNORECASE,
)
ATTRIBUTES = b"*.bin filter=lfs diff=lfs merge=lfs -text\n*.safetensors filter=lfs diff=lfs merge=lfs -text\n"

# What the front matter of a README.md may hold. str: any string; "a|b": one of those; (pattern, advice): what matches;
# [form]: a list; {form}: one or a list; object: anything. What a name ends in `!` for must be there.
SDKS, COLORS = "gradio|docker|static|streamlit", "red|yellow|green|blue|indigo|purple|pink|gray"
LICENSES = (  # the more usual of the Hub's list
    r"apache-2\.0|mit|isc|wtfpl|unlicense|zlib|bsd(-[23]-clause)?|[al]?gpl(-[23]\.[01])?|mpl-2\.0|epl-2\.0|eupl-1\.2"
    r"|cc0-1\.0|cc-by(-nc)?(-sa|-nd)?-[234]\.0|odbl|odc-by|pddl|cdla-permissive-2\.0|gemma|llama[234]|llama3\.[123]"
    r"|(bigscience-|bigcode-|creativeml-)?openrail(-m)?|unknown|other"
)
REPO_ID = r"(\w[\w.-]*/)?\w[\w.-]*"
LANGUAGE = "It must be an ISO 639-1, 639-2 or 639-3 code (two/three letters), or a special value"
RESULT = {
    "task!": {"type!": str, "name": str},
    "dataset!": {"name!": str, "type!": str, "config": str, "split": str, "revision": str},
    "metrics!": [{"type!": str, "value!": object, "name": str, "config": str}],
    "source": {"url!": str, "name": str},
}
CARD = {
    **dict.fromkeys(["pipeline_tag", "library_name", "license_name", "license_link", "thumbnail"], str),
    "tags": {str},
    "metrics": {str},
    "license": {LICENSES},
    "language": {("[a-z]{2,3}|code|multilingual", LANGUAGE)},
    "base_model": {(REPO_ID, "Use a model id from https://hf.co/models.")},
    "base_model_relation": "adapter|merge|quantized|finetune",
    "datasets": {(REPO_ID, "If possible, use a dataset id from https://hf.co/datasets.")},
    "model-index": [{"name!": str, "results!": [RESULT]}],
}
SPACE_CARD = {"sdk!": SDKS, "title": str, "app_file": str, "colorFrom": COLORS, "colorTo": COLORS}


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
        """What git calls it: for LFS, the pointer."""
        stored = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def xet_hash(self) -> str:
        return hashlib.sha256(self.sha256.encode()).hexdigest()  # made up: a real one needs Xet's chunks

    def about(self) -> dict:
        size = len(self.data)
        lfs = {"oid": self.sha256, "sha256": self.sha256, "size": size, "pointerSize": len(self.pointer)}
        return {"size": size, **({"lfs": lfs} if self.lfs else {})}


@dataclass
class Commit:
    sha: str
    title: str
    message: str
    author: str
    parent: str | None
    files: dict[str, Blob]
    date: str

    def under(self, path: str) -> list[tuple[str, str]]:
        """Names and ids of the file at a path, or of the files in that folder."""
        return sorted((name, blob.oid) for name, blob in self.files.items() if f"{name}/".startswith(f"{path}/"))


@dataclass
class Repo:
    kind: str  # "models", "datasets" or "spaces"
    id: str
    private: bool = False
    gated: str | bool = False
    sdk: str | None = None
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # uploaded large files, by sha256
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    discussions: list[dict] = field(default_factory=list)
    variables: dict[str, dict] = field(default_factory=dict)
    secrets: dict[str, dict] = field(default_factory=dict)
    runtime: dict = field(default_factory=lambda: {"stage": "NO_APP_FILE", "hardware": {"requested": "cpu-basic"}})

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    @property
    def url(self) -> str:
        """Its path on the server."""
        return f"/{self.id}" if self.kind == "models" else f"/{self.kind}/{self.id}"

    def at(self, revision: str) -> Commit:
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        if revision in self.commits:
            return self.commits[revision]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, commit: Commit | None) -> Iterator[Commit]:
        """Newest first."""
        while commit:
            yield commit
            commit = self.commits.get(commit.parent)

    def commit(self, ref: str, files: dict[str, Blob], title: str, author: str, message: str = "") -> Commit:
        parent = self.refs.get(ref)
        made = Commit("", title, message, author, parent, files, now())
        identity = json.dumps([self.kind, self.id, ref, parent, made.under(""), title, message, len(self.commits)])
        made.sha = self.refs[ref] = hashlib.sha1(identity.encode()).hexdigest()
        self.commits[made.sha] = made
        return made


@dataclass
class Call:
    """One request being answered."""

    hub: "HubServer"
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    user: User | None = None

    @cached_property
    def asked(self) -> dict:
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
        """A repository to "see", to "read" the files of, to "propose" changes to or to "write"; "" asks no rights."""
        repo = self.hub.repos.get((kind, repo_id))
        mine = repo is not None and self.belongs(repo.namespace)
        if repo is None or (repo.private and access and not mine):
            if self.user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if repo.gated and access == "read" and not mine:
            raise HubError(403 if self.user else 401, f"Access to {repo_id} is restricted.", "GatedRepo")
        if access in ("propose", "write"):
            self.need_write_token()
        if access == "write" and not mine:
            raise HubError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def arguments(self, found: dict[str, str | None], access: str) -> dict[str, Any]:
        """For the function of a route: a repository for its name, a commit for a revision, other text as it is."""
        given: dict[str, Any] = {name: value and unquote(value) for name, value in found.items()}
        if "repo" in given:
            given["repo"] = self.repo(given.pop("kind") or "models", given["repo"], access)
        if "rev" in given:
            given["commit"] = given["repo"].at(given.pop("rev") or "main")
        return given


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


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
    return json.loads(json.dumps(data, default=str)) if isinstance(data, dict) else {}


def card_problems(content: str, kind: str) -> tuple[list[str], list[str]]:
    """Errors and warnings."""
    try:
        data = front_matter(content)
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {' '.join(str(error).split())}"], []
    if not data:
        return [], ["empty or missing yaml metadata in repo card"]
    return list(misfits(data, CARD | (SPACE_CARD if kind == "spaces" else {}), "")), []


def misfits(value: Any, form: Any, where: str) -> Iterator[str]:
    """How a value is not of a form, in the Hub's words."""
    if isinstance(form, set):
        (form,) = form
        form = [form] if isinstance(value, list) else form
    if isinstance(form, dict) and isinstance(value, dict):
        for key, inner in form.items():
            name = f"{where}.{key}".strip(".!")
            if value.get(key.rstrip("!")) is not None:
                yield from misfits(value[key.rstrip("!")], inner, name)
            elif key.endswith("!"):
                yield f'"{name}" is required'
    elif isinstance(form, list) and isinstance(value, list):
        for number, item in enumerate(value):
            yield from misfits(item, form[0], f"{where}[{number}]")
    elif isinstance(form, dict | list):
        yield f'"{where}" must be {"of type object" if isinstance(form, dict) else "an array"}'
    elif form is not object and not isinstance(value, str):
        yield f'"{where}" must be a string'
    elif isinstance(form, str) and not re.fullmatch(form, value):
        yield f'"{where}" must be one of [{form}]'
    elif isinstance(form, tuple) and not re.fullmatch(form[0], value):
        yield f'"{where}" with value "{value}" is not valid. {form[1]}'


# --- what is answered ---

ROUTES: list[tuple[re.Pattern, re.Pattern, str, Callable[..., Answer]]] = []
PIECES = {
    "{kind}": "(?P<kind>models|datasets|spaces)",
    "{prefix}": "(?:(?P<kind>datasets|spaces)/)?",
    "{spaces}": "(?P<kind>spaces)",
    "{repo}": "(?P<repo>[^/]+(?:/[^/]+)??)",
    "{rev}": "(?P<rev>refs/(?:pr|convert)/[^/]+|[^/]+)",
    "{ref}": "(?P<ref>refs/(?:pr|convert)/[^/]+|[^/]+)",
    "{oid}": "(?P<oid>[0-9a-f]{64})",
    "{path}": "(?P<path>.*)",
}


def route(methods: str, template: str, access: str = "") -> Callable:
    """Of several routes that fit a request, the first in this file answers. For `access` see Call.repo."""
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
    token: dict[str, Any] = {"displayName": "test", "role": user.role, "createdAt": now()}
    if user.role == "fineGrained":
        owners = {user.name: "user"} | dict.fromkeys(user.orgs, "org")
        may = {"permissions": ["repo.content.read", "repo.write"]}
        scoped = [{"entity": {"_id": name, "type": kind, "name": name}, **may} for name, kind in owners.items()]
        token["fineGrained"] = {"canReadGatedRepos": True, "global": [], "scoped": scoped}
    orgs = [{"type": "org", "id": org, "name": org, "fullname": org, "roleInOrg": "admin"} for org in user.orgs]
    about = {"type": "user", "id": user.name, "name": user.name, "fullname": user.name, "isPro": False}
    return Answer({**about, "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}})


@route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Answer:
    errors, warnings = card_problems(call.asked["content"], KINDS[call.asked.get("repoType", "model")])
    status = 400 if errors else 200
    if call.headers.get("accept") == "text/plain":
        lines = [f"- Error: {line}" for line in errors] + [f"- Warning: {line}" for line in warnings]
        return Answer("\n".join(lines).encode(), status)
    return Answer({"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}, status)


def named(call: Call) -> tuple[str, str]:
    """Kind and id of the repository that the body tells of."""
    call.need_write_token()
    namespace = call.asked.get("organization") or call.user.name
    return KINDS[call.asked.get("type") or "model"], f"{namespace}/{call.asked['name'].split('/')[-1]}"


@route("POST", "/api/repos/create")
def create_repo(call: Call) -> Answer:
    (kind, repo_id), asked = named(call), call.asked
    private = bool(asked.get("private")) or asked.get("visibility") == "private"
    repo = Repo(kind, repo_id, private, sdk=asked.get("sdk"))
    what, url = kind.removesuffix("s"), call.hub.endpoint + repo.url
    if not re.fullmatch(r"(?!.*(--|\.\.)|.*\.git$)\w([\w.-]{0,94}\w)?", repo_id.split("/")[1], re.ASCII):
        raise HubError(400, f'Invalid repo name: "{repo_id}"')
    if not call.belongs(repo.namespace):
        raise HubError(403, f'You don\'t have the rights to create a {what} under the namespace "{repo.namespace}"')
    if kind == "spaces" and not re.fullmatch(SDKS, repo.sdk or ""):
        raise HubError(400, f'"sdk" must be one of [{SDKS}]')
    if (kind, repo_id) in call.hub.repos:
        raise HubError(409, f"You already created this {what} repo: {repo_id}", url=url)
    for table in ("variables", "secrets"):
        getattr(repo, table).update({item["key"]: item for item in asked.get(table) or []})
    repo.commit("refs/heads/main", {".gitattributes": Blob(ATTRIBUTES, False)}, "initial commit", call.user.name)
    call.hub.repos[kind, repo_id] = repo
    return Answer({"url": url, "name": repo_id, "id": repo_id, "private": private})


@route("DELETE", "/api/repos/delete")
def delete_repo(call: Call) -> Answer:
    repo = call.repo(*named(call), "write")
    del call.hub.repos[repo.kind, repo.id]
    return Answer(b"OK")


@route("PUT", "/api/{kind}/{repo}/settings", "write")
def settings(call: Call, repo: Repo) -> Answer:
    repo.private = call.asked.get("private", repo.private)
    if "visibility" in call.asked:
        repo.private = call.asked["visibility"] == "private"
    repo.gated = call.asked.get("gated", repo.gated)
    return Answer({"private": repo.private, "gated": repo.gated})


# --- commits ---


@route("POST", "/api/{kind}/{repo}/preupload/{rev}", "propose")
def preupload(call: Call, repo: Repo, commit: Commit) -> Answer:
    if "create_pr" not in call.query:
        call.repo(repo.kind, repo.id, "write")
    files = []
    for file in call.asked["files"]:
        lfs = is_lfs(file["path"], file["size"], base64.b64decode(file.get("sample", "")))
        files.append({"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
        known = commit.files.get(file["path"])
        if known:
            files[-1]["oid"] = known.sha256 if known.lfs else known.oid
    return Answer({"files": files, "commitOid": commit.sha})


@route("POST", "/api/{kind}/{repo}/commit/{ref}", "propose")
def make_commit(call: Call, repo: Repo, ref: str) -> Answer:
    proposed = "create_pr" in call.query
    if not proposed and not ref.startswith("refs/pr/"):
        call.repo(repo.kind, repo.id, "write")
    ref = ref if ref.startswith("refs/") else f"refs/heads/{ref}"
    head = repo.at(ref)
    header, *changes = [json.loads(line) for line in call.body.splitlines() if line.strip()]
    if header["key"] != "header" or not header["value"]["summary"]:
        raise HubError(400, "A commit must begin with a header that has a summary")
    title, message = header["value"]["summary"], header["value"].get("description", "")
    if header["value"].get("parentCommit") not in (None, head.sha):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for line in changes:
        change(repo, head, files, line["key"], line["value"])
    if files.get("README.md") not in (None, head.files.get("README.md")):
        errors, _ = card_problems(files["README.md"].data.decode(), repo.kind)
        if errors:
            raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
    answer = {"success": True, "hookOutput": ""}
    if proposed:
        number = open_discussion(repo, call.user.name, title, message, head)["num"]
        ref = f"refs/pr/{number}"
        answer["pullRequestUrl"] = f"{call.hub.endpoint}{repo.url}/discussions/{number}"
    sha = repo.commit(ref, files, title, call.user.name, message).sha
    return Answer({**answer, "commitOid": sha, "commitUrl": f"{call.hub.endpoint}{repo.url}/commit/{sha}"})


def change(repo: Repo, head: Commit, files: dict[str, Blob], key: str, value: dict) -> None:
    """One line of a commit, made to `files`."""
    path = value["path"].removesuffix("/")
    if {"", ".", "..", ".git"} & set(path.split("/")):
        raise HubError(400, f"Invalid path: {path}")
    if key == "file":
        data = value["content"].encode()
        files[path] = Blob(base64.b64decode(data, validate=True) if value.get("encoding") == "base64" else data, False)
    elif key == "lfsFile":
        data = repo.objects.get(value["oid"])
        if data is None or value.get("size", len(data)) != len(data):
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
        files[path] = Blob(data, True)
    elif key == "copyFile":
        source = (repo.at(value["srcRevision"]) if value.get("srcRevision") else head).files
        if value["srcPath"] not in source:
            raise HubError(404, f'"{value["srcPath"]}" does not exist', "EntryNotFound")
        files[path] = source[value["srcPath"]]
    elif key in ("deletedFile", "deletedFolder"):
        gone = [name for name in files if (name == path if key == "deletedFile" else name.startswith(f"{path}/"))]
        if not gone:
            what = key.removeprefix("deleted").lower()
            raise HubError(404, f"A {what} with this name doesn't exist: {path}", "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise HubError(400, f"Unknown key in a commit: {key}")


# --- large files ---


@route("POST", r"/{prefix}{repo}\.git/info/lfs/objects/batch", "write")
def lfs_batch(call: Call, repo: Repo) -> Answer:
    transfers = call.asked.get("transfers", [])
    if call.hub.xet != "off" and "xet" in transfers:
        return Answer({"transfer": "xet", "objects": call.asked["objects"]})
    storage, part_size = f"{call.hub.cdn}/storage/{repo.kind}/{repo.id}", call.hub.part_size
    objects = []
    for entry in call.asked["objects"]:
        oid, size = entry["oid"], entry["size"]
        upload: dict[str, Any] = {"href": f"{storage}/{oid}"}
        if size > part_size and "multipart" in transfers:
            parts = {f"{n:05}": f"{storage}/{oid}?part={n}" for n in range(1, -(-size // part_size) + 1)}
            complete = f"{call.hub.endpoint}{repo.url}.git/info/lfs/complete/{oid}"
            upload = {"href": complete, "header": {"chunk_size": str(part_size), **parts}}
        verify = {"href": f"{call.hub.endpoint}{repo.url}.git/info/lfs/objects/verify"}
        to_do = {} if oid in repo.objects else {"actions": {"upload": upload, "verify": verify}}
        objects.append({"oid": oid, "size": size, "authenticated": True, **to_do})
    return Answer({"transfer": "basic", "objects": objects})


@route("PUT", "/storage/{kind}/{repo}/{oid}")  # no token, here and below: the Hub signs such addresses
def lfs_put(call: Call, repo: Repo, oid: str) -> Answer:
    if "part" in call.query:
        repo.parts[oid, int(call.query["part"][0])] = call.body
    else:
        store(repo, oid, call.body)
    return Answer(headers={"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})


@route("POST", r"/{prefix}{repo}\.git/info/lfs/complete/{oid}")
def lfs_complete(call: Call, repo: Repo, oid: str) -> Answer:
    parts = [(repo.parts[oid, part["partNumber"]], part["etag"].strip('"')) for part in call.asked["parts"]]
    if any(hashlib.md5(data).hexdigest() != etag for data, etag in parts):
        raise HubError(400, "A part is not the one uploaded")
    store(repo, oid, b"".join(data for data, _ in parts))
    return Answer({})


def store(repo: Repo, oid: str, data: bytes) -> None:
    if hashlib.sha256(data).hexdigest() != oid:
        raise HubError(400, "The content does not have the sha256 announced")
    repo.objects[oid] = data


@route("POST", r"/{prefix}{repo}\.git/info/lfs/objects/verify", "write")
def lfs_verify(call: Call, repo: Repo) -> Answer:
    if len(repo.objects.get(call.asked["oid"], b"")) != call.asked["size"]:
        raise HubError(404, "The object was not uploaded")
    return Answer({})


@route("GET", "/api/{kind}/{repo}/xet-(?:read|write)-token/{ref}", "read")
def xet_token(call: Call, repo: Repo, ref: str) -> Answer:
    if call.hub.xet == "off":
        raise HubError(404, "Sorry, we can't find the page you are looking for.")
    raise HubError(403, "Forbidden: no Xet token is given here")


@route("GET", "/{prefix}{repo}/resolve/{rev}/{path}", "read")
def resolve(call: Call, repo: Repo, commit: Commit, path: str) -> Answer:
    headers = {"X-Repo-Commit": commit.sha}
    blob = commit.files.get(path)
    if blob is None:
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    headers |= {"ETag": f'"{blob.oid}"', "Content-Disposition": f'inline; filename="{quote(path.split("/")[-1])}"'}
    if not blob.lfs:
        return content(call, blob.data, headers)
    headers |= {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data)), "Accept-Ranges": "bytes"}
    if call.hub.xet != "off":
        tokens = f"{call.hub.endpoint}/api/{repo.kind}/{repo.id}/xet-read-token/{commit.sha}"
        headers |= {"X-Xet-Hash": blob.xet_hash, "Link": f'<{tokens}>; rel="xet-auth"'}
    headers["Location"] = f"{call.hub.cdn}/cdn/{repo.kind}/{repo.id}/{blob.sha256}"
    return Answer(b"Found", 302, headers)


@route("GET", "/cdn/{kind}/{repo}/{oid}")
def cdn(call: Call, repo: Repo, oid: str) -> Answer:
    return content(call, repo.objects[oid], {"ETag": f'"{oid}"'})


def content(call: Call, data: bytes, headers: dict[str, str]) -> Answer:
    """All of it, or the range asked for."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    match = re.fullmatch(r"bytes=(\d+)-(\d*)|bytes=-(\d+)", call.headers.get("range", ""))
    if not match:
        return Answer(data, headers=headers)
    size = len(data)
    start = int(match[1]) if match[1] else max(size - int(match[3]), 0)
    end = min(int(match[2]) + 1, size) if match[2] else size
    if start >= end:
        raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return Answer(data[start:end], 206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{size}"})


# --- what a repository holds ---


def is_true(values: list[str]) -> bool:
    return values[-1:] != [] and values[-1].lower() in ("true", "1")


@route("GET", "/api/{kind}/{repo}/tree/{rev}(?:/{path})?", "read")
def tree(call: Call, repo: Repo, commit: Commit, path: str | None) -> Answer:
    folder = f"{path.strip('/')}/" if path else ""
    rests = [name.removeprefix(folder).split("/") for name in commit.files if name.startswith(folder)]
    if folder and not rests:
        raise HubError(404, f"{path} does not exist", "EntryNotFound", {"X-Repo-Commit": commit.sha})
    depth = max(map(len, rests), default=0) if is_true(call.query.get("recursive", [])) else 1
    names = sorted({folder + "/".join(rest[: i + 1]) for rest in rests for i in range(min(depth, len(rest)))})
    return Answer([entry(call, repo, commit, name, is_true(call.query.get("expand", []))) for name in names])


@route("POST", "/api/{kind}/{repo}/paths-info/{rev}", "read")
def paths_info(call: Call, repo: Repo, commit: Commit) -> Answer:
    asked = parse_qs(call.body.decode())
    paths = [path.strip("/") for path in asked["paths"] if commit.under(path.strip("/"))]
    return Answer([entry(call, repo, commit, path, is_true(asked.get("expand", []))) for path in paths])


def entry(call: Call, repo: Repo, commit: Commit, path: str, expand: bool) -> dict:
    blob = commit.files.get(path)
    if blob:
        found = {"type": "file", "oid": blob.oid, "path": path, **blob.about()}
        found |= {"xetHash": blob.xet_hash} if blob.lfs and call.hub.xet != "off" else {}
    else:
        oid = hashlib.sha1(json.dumps(commit.under(path)).encode()).hexdigest()
        found = {"type": "directory", "oid": oid, "path": path, "size": 0}
    if expand:
        states = [(c, c.under(path)) for c in repo.history(commit)]
        olds = [state for _, state in states[1:]] + [[]]
        last = next(c for (c, state), old in zip(states, olds, strict=True) if state != old)
        found["lastCommit"] = {"id": last.sha, "title": last.title, "date": last.date}
    return found


@route("GET", "/api/{kind}/{repo}/commits/{rev}", "read")
def list_commits(call: Call, repo: Repo, commit: Commit) -> Answer:
    def about(c: Commit) -> dict:
        return {"id": c.sha, "title": c.title, "message": c.message, "authors": [{"user": c.author}], "date": c.date}

    return Answer([about(c) for c in repo.history(commit)])


@route("GET", "/api/{kind}/{repo}/refs", "see")
def list_refs(call: Call, repo: Repo) -> Answer:
    groups: dict[str, str] = {"branches": "refs/heads/", "tags": "refs/tags/", "converts": "refs/convert/"}
    groups |= {"pullRequests": "refs/pr/"} if "include_prs" in call.query else {}

    def among(start: str) -> list[dict]:
        refs = [(ref, sha) for ref, sha in repo.refs.items() if ref.startswith(start)]
        return [{"name": ref.removeprefix(start), "ref": ref, "targetCommit": sha} for ref, sha in refs]

    return Answer({group: among(start) for group, start in groups.items()})


@route("POST|DELETE", "/api/{kind}/{repo}/(?P<group>branch|tag)/{ref}", "write")
def change_ref(call: Call, repo: Repo, group: str, ref: str) -> Answer:
    name = f"refs/tags/{call.asked.get('tag', ref)}" if group == "tag" else f"refs/heads/{ref}"
    if call.method == "DELETE":
        if name == "refs/heads/main":
            raise HubError(403, "The default branch cannot be deleted")
        if repo.refs.pop(name, None) is None:
            raise HubError(404, f"Reference does not exist: {name}", "RevisionNotFound")
        return Answer(status=204)
    if name in repo.refs:
        raise HubError(409, f"Reference already exists: {name}")
    repo.refs[name] = repo.at(ref if group == "tag" else call.asked.get("startingPoint") or "main").sha
    return Answer({"ref": name, "targetCommit": repo.refs[name]}, 201)


def open_discussion(repo: Repo, author: str, title: str, text: str, base: Commit | None) -> dict:
    """A pull request if it has a base."""
    number = len(repo.discussions) + 1
    by = {"author": {"name": author}, "createdAt": now()}
    latest = {"edited": False, "hidden": False, "latest": {"raw": text, "html": text, "updatedAt": now()}}
    about = {"num": number, "title": title, "status": "open", "isPullRequest": base is not None, **by}
    about["repo"] = {"name": repo.id, "type": repo.kind.removesuffix("s")}
    about["events"] = [{"id": str(number), "type": "comment", "data": latest, **by}]
    if base:
        about |= {"status": "draft", "changes": {"base": "refs/heads/main"}, "filesWithConflicts": [], "diff": ""}
        repo.refs[f"refs/pr/{number}"] = base.sha
    repo.discussions.append(about)
    return about


@route("POST", "/api/{kind}/{repo}/discussions", "propose")
def create_discussion(call: Call, repo: Repo) -> Answer:
    base = repo.at("main") if call.asked.get("pullRequest") else None
    text = call.asked.get("description", "")
    return Answer(open_discussion(repo, call.user.name, call.asked["title"], text, base))


@route("GET", r"/api/{kind}/{repo}/discussions(?:/(?P<number>\d+))?", "see")
def discussions(call: Call, repo: Repo, number: str | None) -> Answer:
    if number is None:
        return Answer({"discussions": repo.discussions, "count": len(repo.discussions), "start": 0})
    if int(number) > len(repo.discussions):
        raise HubError(404, "Discussion not found")
    return Answer(repo.discussions[int(number) - 1])


@route("GET|POST|DELETE", "/api/{spaces}/{repo}/(?P<table>variables|secrets)", "write")
def space_settings(call: Call, repo: Repo, table: str) -> Answer:
    settings: dict[str, dict] = getattr(repo, table)
    if call.method == "POST":
        settings[call.asked["key"]] = {**call.asked, "updatedAt": now()}
    elif call.method == "DELETE":
        settings.pop(call.asked["key"], None)
    hidden = ("value",) if table == "secrets" else ()
    return Answer({key: {k: v for k, v in about.items() if k not in hidden} for key, about in settings.items()})


@route("GET", "/api/{spaces}/{repo}/runtime", "see")
def runtime(call: Call, repo: Repo) -> Answer:
    return Answer(repo.runtime)


@route("POST", "/api/{spaces}/{repo}/hardware", "write")
def hardware(call: Call, repo: Repo) -> Answer:
    repo.runtime["hardware"]["requested"] = call.asked["flavor"]
    repo.runtime["gcTimeout"] = call.asked.get("sleepTimeSeconds")
    return Answer(repo.runtime)


# last, for "/api/models/a/b" fits much
@route("GET", "/api/{kind}/{repo}(?:/revision/{rev})?", "see")
def info(call: Call, repo: Repo, commit: Commit) -> Answer:
    return Answer(about(call, repo, commit))


@route("GET", "/api/{kind}")
def list_repos(call: Call, kind: str) -> Answer:
    author, search = (call.query.get(key, [""])[0] for key in ("author", "search"))
    repos = [repo for repo in call.hub.repos.values() if repo.kind == kind and search.lower() in repo.id.lower()]
    repos = [repo for repo in repos if author in ("", repo.namespace)]
    return Answer([about(call, r, r.at("main")) for r in repos if not r.private or call.belongs(r.namespace)])


def about(call: Call, repo: Repo, commit: Commit) -> dict:
    card = card_data(commit)
    known: dict[str, Any] = {"_id": hashlib.sha1(repo.id.encode()).hexdigest()[:24], "id": repo.id}
    known |= {"author": repo.namespace, "sha": commit.sha, "lastModified": commit.date, "private": repo.private}
    known |= {"createdAt": next(iter(repo.commits.values())).date, "gated": repo.gated, "disabled": False}
    known |= {"downloads": 0, "likes": 0, "cardData": card, "usedStorage": sum(map(len, repo.objects.values()))}
    more = "blobs" in call.query
    known["siblings"] = [
        {"rfilename": path, **({"blobId": blob.oid, **blob.about()} if more else {})}
        for path, blob in sorted(commit.files.items())
    ]
    config: dict[str, Any] = {}
    if repo.kind == "models":
        with contextlib.suppress(KeyError, ValueError):
            config = json.loads(commit.files["config.json"].data)
        known |= {"modelId": repo.id, "pipeline_tag": card.get("pipeline_tag"), "model-index": card.get("model-index")}
        known["library_name"] = card.get("library_name") or ("transformers" if "model_type" in config else None)
        known["config"] = {key: config[key] for key in ("architectures", "auto_map", "model_type") if key in config}
    if repo.kind == "spaces":
        known |= {"sdk": repo.sdk or card.get("sdk"), "runtime": repo.runtime}
    known["tags"] = tags({**card, "library_name": known.get("library_name")}, config)
    wanted = call.query.get("expand", []) + call.query.get("expand[]", [])
    return {k: v for k, v in known.items() if v is not None and (not wanted or k in ("_id", "id", *wanted))}


def tags(card: dict, config: dict) -> list[str]:
    def values(key: str) -> list[str]:
        value = card.get(key) or []
        return [str(item) for item in (value if isinstance(value, list) else [value])]

    found = [value for key in ("library_name", "pipeline_tag", "tags", "language") for value in values(key)]
    found += [str(config["model_type"])] if "model_type" in config else []
    found += ["custom_code"] if "auto_map" in config else []
    found += [f"{key.rstrip('s')}:{value}" for key in ("datasets", "license", "base_model") for value in values(key)]
    found += [f"base_model:{how}:{value}" for how in values("base_model_relation") for value in values("base_model")]
    return list(dict.fromkeys([*found, "region:us"]))


# --- the server ---


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: two would wait for an acknowledgement
    hub: "HubServer"

    def answer(self) -> None:
        url, body = urlsplit(self.path), self.read_body()
        headers = {name.lower(): value for name, value in self.headers.items()}
        call = Call(self.hub, self.command, url.path, parse_qs(url.query), headers, body)
        request = Request(self.command, self.path, headers)
        with self.hub.lock:
            self.hub.requests.append(request)
            how = self.hub.fault(request)
            if how.isdigit():
                reply = failure(HubError(int(how), "Failing as told to"))
            elif how != "drop":
                reply = dispatch(call)
            request.status = 0 if how.startswith("drop") else reply.status
        if request.status:
            self.send(reply)
        else:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, reply: Answer) -> None:
        raw = isinstance(reply.body, bytes)
        body = reply.body if raw else json.dumps(reply.body).encode()
        kind = "text/plain; charset=utf-8" if raw else "application/json; charset=utf-8"
        size = {} if reply.status == 204 else {"Content-Length": str(len(body))}
        self.send_response(reply.status)
        for name, value in {"Content-Type": kind, **reply.headers, **size}.items():
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
    left: int
    match: str
    how: str


class HubServer:
    """A context manager: it serves from its entry to its exit."""

    xet = "off"  # "refuse": Xet is announced as the Hub does, and no token is given for it
    part_size = 64 * 2**20  # larger LFS files are uploaded in parts of so many bytes

    def __init__(self, port: int = 0) -> None:
        self.users: dict[str, User] = {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self.lock = threading.RLock()
        self._faults: list[Fault] = []
        self._closed = False
        self._server = Listener(("127.0.0.1", port), type("HubHandler", (Handler,), {"hub": self}))
        port = self._server.server_address[1]
        self.endpoint, self.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._closed = True

    def add_user(self, name: str, token: str, role: str = "write", orgs: tuple[str, ...] = ()) -> None:
        """Of the role "read", "write" or "fineGrained", in `whoami-v2` terms."""
        self.users[token] = User(name, role, tuple(orgs))

    def add_repo(
        self, repo_id: str, files: dict[str, bytes] | Path, repo_type: str = "model", private: bool = False
    ) -> str:
        """Commits files on main, to those already there; the sha of that."""
        if isinstance(files, Path):
            found = {path.relative_to(files): path for path in sorted(files.rglob("*")) if path.is_file()}
            files = {name.as_posix(): path.read_bytes() for name, path in found.items() if ".git" not in name.parts}
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

    def commits(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[Commit]:
        """Oldest first."""
        with self.lock:
            repo = self.repos[KINDS[repo_type], repo_id]
            return [*repo.history(repo.at(revision))][::-1]

    def fail_at(self, number: int, match: str = "", how: str = "drop") -> None:
        """Of the coming requests whose "METHOD path" has a match, one fails.

        "drop" closes the connection and does nothing, "drop-answer" does all and then closes it; "503" answers that.
        """
        with self.lock:
            self._faults.append(Fault(number, match, how))

    def mend(self) -> None:
        """Nothing fails any more."""
        with self.lock:
            self._faults.clear()

    def fault(self, request: Request) -> str:
        """What is to go wrong with a request, "" for nothing."""
        if self._closed:  # and the client kept its connection
            return "drop"
        for fault in self._faults:
            fault.left -= bool(re.search(fault.match, f"{request.method} {request.path}"))
        due = [fault for fault in self._faults if fault.left == 0]
        self._faults = [fault for fault in self._faults if fault.left > 0]
        return due[0].how if due else ""


def main() -> None:
    with HubServer() as hub, contextlib.suppress(KeyboardInterrupt):
        hub.add_user("user", "hf_test", orgs=("org",))
        print(f"HF_ENDPOINT={hub.endpoint} HF_TOKEN=hf_test HF_HUB_DISABLE_XET=1", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
