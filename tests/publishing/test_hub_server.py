"""The hub of the tests, against the real client: what is uploaded comes back, and what fails fails as on the Hub."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from huggingface_hub import ModelCard, constants

WEIGHTS = bytes(range(256)) * 20
CARD = b"---\nlicense: mit\nlanguage: en\nbase_model: u/base\nbase_model_relation: finetune\n---\n# A model\n"
CONFIG = b'{"model_type": "bert", "auto_map": {"AutoConfig": "c.C"}}'

BEFORE = """
import json, os
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download
api, found = HfApi(), {}

def add(**files):
    return [CommitOperationAdd(path.replace("__", "."), data) for path, data in files.items()]

def error(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return [type(error).__name__, getattr(getattr(error, "response", None), "status_code", None), str(error)]

"""
AFTER = "\nprint(json.dumps(found))\n"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as hub:
        hub.add_user("u", "hf_u", orgs=("o",))
        yield hub


@pytest.fixture
def client(hub: HubServer, tmp_path: Path):
    """Runs code with the client, as the user u unless told otherwise, and gives what it leaves in `found`."""

    def run(code: str, **environ: str) -> dict[str, Any]:
        settings = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
        settings |= {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_u", "HF_HUB_DISABLE_XET": "1"}
        settings |= {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environ}
        command = [sys.executable, "-c", BEFORE + code + AFTER]
        done = subprocess.run(command, env=os.environ | settings, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def asked(hub: HubServer, start: int = 0) -> list[str]:
    """What was asked of the hub, leaving out what the client only asks now and then."""
    lines = [f"{request.status} {request.method} {request.path}" for request in hub.requests[start:]]
    return [line for line in lines if "agent-harnesses" not in line]


def get(url: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    """Without the client: the status, the body and the headers."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as answer:
        return answer.code, answer.read(), dict(answer.headers)


def commit_lines(*changes: tuple[str, dict]) -> bytes:
    lines = [("header", {"summary": "by hand"}), *changes]
    return b"\n".join(json.dumps({"key": key, "value": value}).encode() for key, value in lines)


def in_line(path: str, data: bytes) -> tuple[str, dict]:
    return "file", {"path": path, "content": base64.b64encode(data).decode(), "encoding": "base64"}


def test_what_is_committed_is_downloaded(hub, client, tmp_path):
    (tmp_path / "w").write_bytes(WEIGHTS)
    found = client("""
found["repo"] = api.create_repo("u/m", private=True)
files = add(README__md=b"# A model", model__safetensors="w")
found["sha"] = api.create_commit("u/m", files, commit_message="One", commit_description="of many").oid
found["path"] = hf_hub_download("u/m", "model.safetensors")
found["folder"] = snapshot_download("u/m")
found["again"] = api.create_commit("u/m", add(model__safetensors="w"), commit_message="Same").oid
""")
    assert found["repo"] == f"{hub.endpoint}/u/m"
    assert hub.files("u/m")["model.safetensors"] == Path(found["path"]).read_bytes() == WEIGHTS
    assert (Path(found["folder"]) / "README.md").read_bytes() == b"# A model"
    first, last = hub.commits("u/m")
    assert (first.title, last.title, last.message, last.parent) == ("initial commit", "One", "of many", first.sha)
    assert found["sha"] == found["again"] == last.sha == Path(found["folder"]).name
    assert Path(found["path"]).resolve().name == hashlib.sha256(WEIGHTS).hexdigest()
    assert asked(hub)[:8] == [
        "200 POST /api/repos/create",
        "200 POST /api/validate-yaml",
        "200 POST /api/models/u/m/preupload/main",
        "200 POST /u/m.git/info/lfs/objects/batch",
        f"200 PUT /storage/models/u/m/{hashlib.sha256(WEIGHTS).hexdigest()}",
        "200 POST /u/m.git/info/lfs/objects/verify",
        "200 POST /api/models/u/m/commit/main",
        "302 HEAD /u/m/resolve/main/model.safetensors",
    ]
    with_token = {
        request.headers["host"].split(":")[0] for request in hub.requests if "authorization" in request.headers
    }
    assert with_token == {"127.0.0.1"}
    assert {request.headers["host"].split(":")[0] for request in hub.requests} == {"127.0.0.1", "localhost"}


def test_a_folder_in_parts_to_a_dataset(hub, client, tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "d.parquet").write_bytes(WEIGHTS)
    (tmp_path / "folder" / "read me.txt").write_text("text", encoding="utf-8")
    hub.part_size = 1000
    hub.add_repo("o/d", {"old.txt": b"old", "keep.bin": b"\0"}, "dataset")
    found = client("""
api.upload_folder(folder_path="folder", repo_id="o/d", repo_type="dataset", delete_patterns="*.txt")
found["files"] = api.list_repo_files("o/d", repo_type="dataset")
found["folders"] = [entry.path for entry in api.list_repo_tree("o/d", repo_type="dataset")]
found["changed"] = {
    entry.path: entry.last_commit.title
    for entry in api.list_repo_tree("o/d", repo_type="dataset", recursive=True, expand=True)
}
found["text"] = open(hf_hub_download("o/d", "read me.txt", repo_type="dataset")).read()
api.create_commit("o/d", repo_type="dataset", commit_message="Move", operations=[
    CommitOperationCopy("deep/d.parquet", "d.parquet"),
    CommitOperationDelete("deep/"),
    CommitOperationDelete("read me.txt"),
])
""")
    assert found["files"] == ["deep/d.parquet", "keep.bin", "read me.txt"]
    assert found["folders"] == ["deep", "keep.bin", "read me.txt"]
    assert found["changed"] == {
        "deep": "Upload folder using huggingface_hub",
        "deep/d.parquet": "Upload folder using huggingface_hub",
        "keep.bin": "Add files",
        "read me.txt": "Upload folder using huggingface_hub",
    }
    assert found["text"] == "text"
    assert hub.files("o/d", repo_type="dataset") == {"keep.bin": b"\0", "d.parquet": WEIGHTS}
    assert sum("?part=" in line for line in asked(hub)) == 6


def test_branches_tags_and_pull_requests(hub, client):
    sha = hub.add_repo("u/m", {"f.txt": b"1"})
    hub.add_user("guest", "hf_guest")
    found = client(
        """
owner = HfApi(token="hf_u")
owner.create_branch("u/m", branch="next/one")
owner.create_commit("u/m", add(f__txt=b"2"), commit_message="Two", revision="next/one")
owner.create_tag("u/m", tag="v1", revision="next/one")
made = api.create_commit("u/m", add(f__txt=b"3"), commit_message="Three", create_pr=True)
found["pull request"] = [made.pr_url, made.pr_revision]
SHA = owner.list_repo_commits("u/m")[0].commit_id
revisions = ["main", SHA, "next/one", "v1", "refs/pr/1"]
found["texts"] = [open(hf_hub_download("u/m", "f.txt", revision=revision)).read() for revision in revisions]
found["infos"] = [api.model_info("u/m", revision=revision).sha for revision in revisions]
found["titles"] = [commit.title for commit in api.list_repo_commits("u/m", revision="v1")]
refs = api.list_repo_refs("u/m", include_pull_requests=True)
found["refs"] = [ref.ref for ref in refs.branches + refs.tags + refs.pull_requests]
found["discussions"] = [(d.num, d.title, d.is_pull_request) for d in api.get_repo_discussions("u/m")]
found["taken"] = [error(owner.create_tag, "u/m", tag="v1")[1], error(owner.create_branch, "u/m", branch="main")[1]]
owner.delete_branch("u/m", branch="next/one")
owner.delete_tag("u/m", tag="v1")
found["gone"] = error(api.model_info, "u/m", revision="v1")[0]
found["forbidden"] = error(api.create_commit, "u/m", add(f__txt=b"4"), commit_message="Four")[:2]
""",
        HF_TOKEN="hf_guest",
    )
    assert found["pull request"] == [f"{hub.endpoint}/u/m/discussions/1", "refs/pr/1"]
    assert found["texts"] == ["1", "1", "2", "2", "3"]
    assert found["infos"][:2] == [sha, sha]
    assert found["titles"] == ["Two", "Add files"]
    assert found["refs"] == ["refs/heads/main", "refs/heads/next/one", "refs/tags/v1", "refs/pr/1"]
    assert found["discussions"] == [[1, "Three", True]]
    assert found["taken"] == [409, 409]
    assert found["gone"] == "RevisionNotFoundError"
    assert found["forbidden"] == ["HfHubHTTPError", 403]
    assert hub.files("u/m") == {"f.txt": b"1"}
    assert hub.commits("u/m", "refs/pr/1")[-1].author == "guest"


def test_who_may_do_what(hub, client):
    hub.add_user("u", "hf_read", "read")
    hub.add_user("u", "hf_fine", "fineGrained")
    hub.add_user("other", "hf_other")
    hub.add_repo("u/m", {"f.txt": b"1"}, private=True)
    hub.add_repo("u/gated", {"f.txt": b"1"})
    found = client("""
tokens = {"none": False, "read": "hf_read", "fine": "hf_fine", "other": "hf_other", "wrong": "hf_wrong"}
for name, token in tokens.items():
    api = HfApi(token=token)
    found[name] = [
        error(api.model_info, "u/m"),
        error(get_hf_file_metadata, hf_hub_url("u/m", "f.txt"), token=token),
        error(api.create_commit, "u/m", add(g__txt=b"2"), commit_message="g"),
        error(api.create_repo, "u/new"),
    ]
    found[name] = [result[:2] if type(result) is list else "fine" for result in found[name]]
api = HfApi()
me = api.whoami()
found["me"] = [me["name"], me["orgs"][0]["name"], me["auth"]["accessToken"]["role"]]
found["roles"] = [HfApi(token=t).whoami()["auth"]["accessToken"]["role"] for t in ("hf_read", "hf_fine")]
found["stranger"] = error(HfApi(token="hf_wrong").whoami)[1]
found["twice"] = [error(api.create_repo, "u/m")[1], api.create_repo("u/m", exist_ok=True)]
found["elsewhere"] = [error(api.create_repo, "other/m")[1], api.create_repo("o/m")]
api.update_repo_settings("u/gated", gated="auto")
found["gated"] = error(HfApi(token=False).hf_hub_download, "u/gated", "f.txt")[:2]
api.update_repo_settings("u/m", private=False)
anyone = HfApi(token=False)
found["public"] = [anyone.model_info("u/m").private, [model.id for model in anyone.list_models(author="u")]]
api.delete_repo("u/m")
found["deleted"] = [error(api.delete_repo, "u/m")[0], error(api.model_info, "u/m")[:2]]
""")
    unseen, unseen_by_all = ["RepositoryNotFoundError", 404], ["RepositoryNotFoundError", 401]
    forbidden, unknown = ["HfHubHTTPError", 403], ["HfHubHTTPError", 401]
    assert found["none"] == [unseen_by_all, unseen_by_all, unseen_by_all, unknown]
    assert found["read"] == ["fine", "fine", forbidden, forbidden]
    assert found["fine"] == ["fine", "fine", "fine", "fine"]
    assert found["other"] == [unseen, unseen, unseen, forbidden]
    assert found["wrong"] == [unknown] * 4
    assert found["me"] == ["u", "o", "write"]
    assert found["roles"] == ["read", "fineGrained"]
    assert found["stranger"] == 401
    assert found["twice"] == [409, f"{hub.endpoint}/u/m"]
    assert found["elsewhere"] == [403, f"{hub.endpoint}/o/m"]
    for name in ("a..b", "a--b", ".git", "a b", "-a", "a" * 97):
        body = json.dumps({"name": name, "type": "model"}).encode()
        assert get(f"{hub.endpoint}/api/repos/create", body, Authorization="Bearer hf_u")[0] == 400, name
    assert found["gated"] == ["GatedRepoError", 401]
    assert found["public"] == [False, ["u/m", "u/gated", "u/new"]]
    assert found["deleted"] == ["RepositoryNotFoundError", unseen]


def test_what_is_not_there(hub, client):
    sha = hub.add_repo("u/m", {"f.txt": b"1"})
    head = hub.add_repo("u/m", {"f.txt": b"2"})
    found = client(f"""
found["repo"] = error(hf_hub_download, "u/none", "f.txt")[:2]
found["entry"] = error(hf_hub_download, "u/m", "g.txt")[:2]
found["folder"] = error(lambda: list(api.list_repo_tree("u/m", "additional_chat_templates")))[:2]
found["revision"] = error(hf_hub_download, "u/m", "f.txt", revision="v2")[:2]
found["branch"] = error(api.create_commit, "u/m", add(f__txt=b"3"), commit_message="3", revision="v2")[:2]
found["known"] = [api.file_exists("u/m", "f.txt"), api.file_exists("u/m", "g.txt"), api.repo_exists("u/none")]
found["parent"] = error(api.create_commit, "u/m", add(f__txt=b"3"), commit_message="3", parent_commit="{sha}")
found["delete"] = error(api.delete_file, "g.txt", "u/m")[:2]
found["sha"] = api.create_commit("u/m", add(f__txt=b"3"), commit_message="3", parent_commit="{head}").oid
""")
    assert found["repo"] == ["RepositoryNotFoundError", 404]
    assert found["entry"] == found["folder"] == ["RemoteEntryNotFoundError", 404]
    assert found["revision"] == found["branch"] == ["RevisionNotFoundError", 404]
    assert found["known"] == [True, False, False]
    assert found["parent"][:2] == ["HfHubHTTPError", 412]
    assert "A commit has happened since" in found["parent"][2]
    assert found["delete"] == ["RemoteEntryNotFoundError", 404]
    assert [commit.sha for commit in hub.commits("u/m")] == [sha, head, found["sha"]]
    assert get(f"{hub.endpoint}/api/nothing")[0] == 404
    assert json.loads(get(f"{hub.endpoint}/api/nothing")[1])["error"]


def test_a_commit_is_whole_or_not_at_all(hub):
    hub.add_repo("u/m", {"f.txt": b"1", "w.bin": WEIGHTS})
    url, token = f"{hub.endpoint}/api/models/u/m/commit/main", {"Authorization": "Bearer hf_u"}
    known, unknown = hashlib.sha256(WEIGHTS).hexdigest(), hashlib.sha256(b"never uploaded").hexdigest()
    for bad in [
        ("lfsFile", {"path": "x.bin", "algo": "sha256", "oid": unknown, "size": 14}),
        ("lfsFile", {"path": "x.bin", "algo": "sha256", "oid": known, "size": 14}),
        ("file", {"path": "x.txt", "content": "?", "encoding": "base64"}),
        ("deletedFile", {"path": "g.txt"}),
        ("deletedFolder", {"path": "g"}),
        ("copyFile", {"path": "x.txt", "srcPath": "g.txt"}),
        ("unheard", {"path": "x.txt"}),
        ("file", {"content": "no path"}),
        in_line("../x.txt", b"x"),
        in_line("README.md", b"---\nlicense: my own\n---\n"),
    ]:
        status, body, _ = get(url, commit_lines(in_line("new.txt", b"new"), bad), **token)
        assert status in (400, 404), bad
        assert json.loads(body)["error"]
    assert get(url, commit_lines(in_line("new.txt", b"new"))[:-1], **token)[0] == 400
    assert hub.files("u/m") == {"f.txt": b"1", "w.bin": WEIGHTS}
    assert len(hub.commits("u/m")) == 1
    good = [
        in_line("new.txt", b"new"),
        ("copyFile", {"path": "v.bin", "srcPath": "w.bin"}),
        ("deletedFile", {"path": "f.txt"}),
    ]
    assert get(url, commit_lines(*good), **token)[0] == 200
    assert hub.files("u/m") == {"w.bin": WEIGHTS, "new.txt": b"new", "v.bin": WEIGHTS}


def test_broken_commits(hub, client):
    hub.add_repo("u/m", {"f.txt": b"1"})
    hub.fail_at(1, "POST .*/commit/", "drop")
    hub.fail_at(2, "POST .*/commit/", "503")
    hub.fail_at(3, "POST .*/commit/", "drop-answer")
    found = client("""
for title in ("one", "two", "three"):
    found[title] = error(api.create_commit, "u/m", add(f__txt=b"2", w__bin=b"weights"), commit_message=title)[:2]
    found[f"after {title}"] = [commit.title for commit in api.list_repo_commits("u/m")]
""")
    assert found == {
        "one": ["RemoteProtocolError", None],
        "after one": ["Add files"],
        "two": ["HfHubHTTPError", 503],
        "after two": ["Add files"],
        "three": ["RemoteProtocolError", None],
        "after three": ["three", "Add files"],
    }
    assert hub.files("u/m") == {"f.txt": b"2", "w.bin": b"weights"}


def test_which_request_fails(hub):
    url = f"{hub.endpoint}/api/models"
    hub.fail_at(2, "GET /api", "500")
    hub.fail_at(3, how="429")
    assert [get(url)[0] for _ in range(4)] == [200, 500, 429, 200]
    hub.fail_at(1)
    with pytest.raises(ConnectionError):
        get(url)
    assert [request.status for request in hub.requests] == [200, 500, 429, 200, 0]


@pytest.mark.parametrize("xet", ["off", "refuse"])
def test_xet(hub, client, tmp_path, xet):
    """Version 2 of the client with hf_xet uploads by Xet or fails: it never turns to LFS by itself."""
    pytest.importorskip("hf_xet")
    hub.xet = xet
    hub.add_repo("u/m", {"w.bin": WEIGHTS, "f.txt": b"1"})
    code = """
os.makedirs("folder", exist_ok=True)
for name in ("v.bin", "g.txt"):
    open(f"folder/{name}", "wb").write(name.encode())
found["download"] = error(hf_hub_download, "u/m", "w.bin")
found["text"] = error(hf_hub_download, "u/m", "f.txt")
found["commit"] = error(api.create_commit, "u/m", add(v__bin=b"weights"), commit_message="v")
found["folder"] = error(api.upload_folder, folder_path="folder", repo_id="u/m")
"""
    found = client(code, HF_HUB_DISABLE_XET="0")
    for upload in found["commit"], found["folder"]:
        assert upload[0] == "ConnectionError"
        assert "xet-write-token" in upload[2]
    assert found["download"][:2] == ["HfHubHTTPError", 403] if xet == "refuse" else isinstance(found["download"], str)
    assert isinstance(found["text"], str)
    assert len(hub.commits("u/m")) == 1

    found = client(code)
    assert Path(found["download"]).read_bytes() == WEIGHTS
    assert hub.files("u/m") == {"w.bin": WEIGHTS, "f.txt": b"1", "v.bin": b"v.bin", "g.txt": b"g.txt"}


def test_a_folder_is_committed_again_when_the_answer_is_lost(hub, client, tmp_path):
    """So does the client with hf_xet, unless told the parent of the commit."""
    pytest.importorskip("hf_xet")
    sha = hub.add_repo("u/m", {"f.txt": b"1"})
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "f.txt").write_bytes(b"2")
    code = 'found["error"] = error(api.upload_folder, folder_path="folder", repo_id="u/m", parent_commit=PARENT)[:2]'
    hub.fail_at(1, "/commit/", "drop-answer")
    assert client(f"PARENT = {sha!r}\n{code}", HF_HUB_DISABLE_XET="0") == {"error": ["HfHubHTTPError", 412]}
    assert len(hub.commits("u/m")) == 2
    (tmp_path / "folder" / "f.txt").write_bytes(b"3")
    hub.fail_at(1, "/commit/", "drop-answer")
    client(f"PARENT = None\n{code}", HF_HUB_DISABLE_XET="0")
    assert len(hub.commits("u/m")) == 4


def test_parts_of_files(hub, client):
    hub.add_repo("u/m", {"w.bin": WEIGHTS, "f.txt": b"0123456789"})
    for name, data in hub.files("u/m").items():
        url, size = f"{hub.endpoint}/u/m/resolve/main/{name}", len(data)
        for asked_for, part in {"2-5": data[2:6], "7-": data[7:], "-3": data[-3:], f"0-{size}": data}.items():
            status, body, headers = get(url, Range=f"bytes={asked_for}")
            assert (status, body) == (206, part)
            assert headers["Content-Range"].endswith(f"/{size}")
        assert get(url, Range=f"bytes={size}-")[0] == 416
        assert get(url)[:2] == (200, data)
    found = client("""
import io
from huggingface_hub.file_download import http_get
file = io.BytesIO(b"01234")
file.seek(5)
http_get(hf_hub_url("u/m", "f.txt"), file, resume_size=5, expected_size=10)
found["text"] = file.getvalue().decode()
""")
    assert found["text"] == "0123456789"


def test_what_is_known_of_a_model(hub, client, tmp_path):
    folder = tmp_path / "model"
    (folder / ".git").mkdir(parents=True)
    for name, data in {"README.md": CARD, "config.json": CONFIG, "w.safetensors": WEIGHTS, ".git/HEAD": b"x"}.items():
        (folder / name).write_bytes(data)
    sha = hub.add_repo("u/m", folder)
    found = client("""
info = api.model_info("u/m", files_metadata=True)
found["info"] = [info.sha, info.author, info.private, info.library_name, info.card_data.license]
found["config"] = info.config
found["tags"] = info.tags
found["files"] = [[file.rfilename, file.size, file.lfs and file.lfs.sha256] for file in info.siblings]
found["few"] = api.model_info("u/m", expand=["sha"]).siblings
found["paths"] = [path.path for path in api.get_paths_info("u/m", ["w.safetensors", "none"])]
found["card"] = ModelCard.load("u/m").data.base_model
""")
    assert found["info"] == [sha, "u", False, "transformers", "mit"]
    assert found["config"] == json.loads(CONFIG)
    assert {"bert", "custom_code", "license:mit", "base_model:finetune:u/base", "en"} <= set(found["tags"])
    sizes = [["README.md", len(CARD), None], ["config.json", len(CONFIG), None]]
    assert found["files"] == [*sizes, ["w.safetensors", len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest()]]
    assert found["few"] is None
    assert found["paths"] == ["w.safetensors"]
    assert found["card"] == "u/base"


def test_a_space(hub, client):
    found = client("""
found["sdk"] = error(HfApi().create_repo, "u/s", repo_type="space")[0]
api.create_repo("u/s", repo_type="space", space_sdk="gradio", space_variables=[{"key": "a", "value": "1"}])
api.add_space_variable("u/s", "b", "2", description="two")
api.add_space_secret("u/s", "c", "3")
found["variables"] = {key: v.value for key, v in api.get_space_variables("u/s").items()}
api.delete_space_variable("u/s", "a")
found["left"] = list(api.get_space_variables("u/s"))
found["secrets"] = [secret.key for secret in api.get_space_secrets("u/s").values()]
found["hardware"] = api.request_space_hardware("u/s", "t4-small").requested_hardware
found["stage"] = api.get_space_runtime("u/s").stage
api.upload_file(path_or_fileobj=b"app", path_in_repo="app.py", repo_id="u/s", repo_type="space")
found["info"] = [api.space_info("u/s").sdk, api.list_repo_files("u/s", repo_type="space")]
""")
    assert found["sdk"] == "ValueError"
    assert found["variables"] == {"a": "1", "b": "2"}
    assert found["left"] == ["b"]
    assert found["secrets"] == ["c"]
    assert (found["hardware"], found["stage"]) == ("t4-small", "NO_APP_FILE")
    assert found["info"] == ["gradio", [".gitattributes", "app.py"]]


MODEL_CARDS = {  # the front matter and what is wrong with it
    "license: mit\nlanguage: [en, de]\nbase_model: sentence-transformers/all-MiniLM-L6-v2": "",
    "license: mine": '"license" must be one of',
    "license: [mit": "YAML Metadata Error",
    "- license": '"" must be of type object',
    "language: english": '"language" with value "english" is not valid',
    "pipeline_tag: [text-classification]": '"pipeline_tag" must be a string',
    "tags: {a: b}": '"tags" must be a string',
    "tags: [a, 1]": '"tags[1]" must be a string',
    "base_model: /home/me/encoder": '"base_model" with value "/home/me/encoder" is not valid',
    "base_model: [a/b, ./c]": '"base_model[1]" with value "./c" is not valid',
    "base_model_relation: child": '"base_model_relation" must be one of',
    "model-index: {name: m}": '"model-index" must be an array',
    "model-index: [{results: []}]": '"model-index[0].name" is required',
}
RESULTS = {  # the same of one result in a model index
    "{task: {type: t}, dataset: {type: d, name: n}, metrics: [{type: f1, value: 0.5}]}": "",
    "{task: {type: t}, metrics: []}": '"model-index[0].results[0].dataset" is required',
    "{task: {type: t}, dataset: {type: d, name: 3}, metrics: []}": '[0].dataset.name" must be a string',
    "{task: {type: t}, dataset: {type: d, name: n}, metrics: [{type: f1}]}": '.metrics[0].value" is required',
}


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        *MODEL_CARDS.items(),
        *((f"model-index: [{{name: m, results: [{r}]}}]", problem) for r, problem in RESULTS.items()),
    ],
)
def test_metadata_of_a_card(hub, metadata, problem):
    content = {"content": f"---\n{metadata}\n---\n# A model\n", "repoType": "model"}
    status, body, _ = get(f"{hub.endpoint}/api/validate-yaml", json.dumps(content).encode())
    assert status == (400 if problem else 200)
    assert problem in "".join(error["message"] for error in json.loads(body)["errors"])


def test_the_client_validates_cards(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    ModelCard(CARD.decode()).validate()
    ModelCard("# No metadata").validate()
    with pytest.raises(ValueError, match='Error: "license" must be one of'):
        ModelCard("---\nlicense: mine\n---\n").validate()
    with pytest.raises(ValueError, match='"sdk" is required'):
        ModelCard("---\nlicense: mit\n---\n").validate(repo_type="space")
    assert [request.path for request in hub.requests] == ["/api/validate-yaml"] * 4


def test_it_stops():
    with HubServer() as hub:
        assert get(f"{hub.endpoint}/api/models")[0] == 200
    with pytest.raises(urllib.error.URLError):
        get(f"{hub.endpoint}/api/models")
