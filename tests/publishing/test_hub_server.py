"""Test the tests' Hub against the real client: uploads can be downloaded, and requests fail as on the real Hub."""

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
CARD = (
    b"---\nlicense: mit\nlanguage: en\npipeline_tag: text-classification\n"
    b"base_model: u/base\nbase_model_relation: finetune\n---\n# A model\n"
)

BEFORE = """
import json
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
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
    """Return a function that runs code with the client, by default as the user u. It returns the code's dict `found`."""

    def run(code: str, **environ: str) -> dict[str, Any]:
        settings = hub.environment(tmp_path / "home", "hf_u") | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", **environ}
        command = [sys.executable, "-c", BEFORE + code + AFTER]
        done = subprocess.run(command, env=os.environ | settings, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def request_lines(hub: HubServer, start: int = 0) -> list[str]:
    """Return status, method and path of each request, without requests that the client sends only now and then."""
    lines = [f"{request.status} {request.method} {request.path}" for request in hub.requests[start:]]
    return [line for line in lines if "agent-harnesses" not in line]


def get(url: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """Send a request without the client. Return the status and the body."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as answer:
        return answer.code, answer.read()


def test_committed_files_can_be_downloaded(hub, client, tmp_path):
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
    assert request_lines(hub)[:8] == [
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


def test_branches_and_pull_requests(hub, client):
    sha = hub.add_repo("u/m", {"f.txt": b"1"})
    hub.add_user("guest", "hf_guest")
    found = client(
        f"""
owner = HfApi(token="hf_u")
owner.create_branch("u/m", branch="next/one")
owner.create_commit("u/m", add(f__txt=b"2"), commit_message="Two", revision="next/one")
made = api.create_commit("u/m", add(f__txt=b"3"), commit_message="Three", create_pr=True)
found["pull request"] = [made.pr_url, made.pr_revision]
revisions = ["main", {sha!r}, "next/one", "refs/pr/1"]
found["texts"] = [open(hf_hub_download("u/m", "f.txt", revision=revision)).read() for revision in revisions]
found["infos"] = [api.model_info("u/m", revision=revision).sha for revision in revisions]
found["taken"] = error(owner.create_branch, "u/m", branch="main")[1]
found["forbidden"] = error(api.create_commit, "u/m", add(f__txt=b"4"), commit_message="Four")[:2]
""",
        HF_TOKEN="hf_guest",
    )
    assert found["pull request"] == [f"{hub.endpoint}/u/m/discussions/1", "refs/pr/1"]
    assert found["texts"] == ["1", "1", "2", "3"]
    heads = [hub.commits("u/m", revision)[-1].sha for revision in ("next/one", "refs/pr/1")]
    assert found["infos"] == [sha, sha, *heads]
    assert found["taken"] == 409
    assert found["forbidden"] == ["HfHubHTTPError", 403]
    assert hub.files("u/m") == {"f.txt": b"1"}
    assert [commit.title for commit in hub.commits("u/m", "next/one")] == ["Add files", "Two"]
    assert hub.commits("u/m", "refs/pr/1")[-1].author == "guest"


def test_permissions_of_users(hub, client):
    hub.add_user("u", "hf_read", "read")
    hub.add_user("u", "hf_fine", "fineGrained")
    hub.add_user("other", "hf_other")
    hub.add_repo("u/m", {"f.txt": b"1"}, private=True)
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


def test_requests_for_missing_things(hub, client):
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
found["delete"] = error(api.create_commit, "u/m", [CommitOperationDelete("g.txt")], commit_message="d")[:2]
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


@pytest.mark.parametrize("xet", ["off", "refuse"])
def test_xet(hub, client, xet):
    """Version 2 of the client with hf_xet uploads by Xet or fails: it never falls back to LFS."""
    pytest.importorskip("hf_xet")
    hub.xet = xet
    hub.add_repo("u/m", {"w.bin": WEIGHTS, "f.txt": b"1"})
    code = """
found["download"] = error(hf_hub_download, "u/m", "w.bin")
found["text"] = error(hf_hub_download, "u/m", "f.txt")
found["commit"] = error(api.create_commit, "u/m", add(v__bin=b"weights"), commit_message="v")
"""
    found = client(code, HF_HUB_DISABLE_XET="0")
    assert found["commit"][0] == "ConnectionError"
    assert "xet-write-token" in found["commit"][2]
    assert found["download"][:2] == ["HfHubHTTPError", 403] if xet == "refuse" else isinstance(found["download"], str)
    assert isinstance(found["text"], str)
    assert len(hub.commits("u/m")) == 1

    found = client(code)
    assert Path(found["download"]).read_bytes() == WEIGHTS
    assert hub.files("u/m") == {"w.bin": WEIGHTS, "f.txt": b"1", "v.bin": b"weights"}


def test_information_about_a_model(hub, client, tmp_path):
    (tmp_path / "model" / "deep").mkdir(parents=True)
    for name, data in {"README.md": CARD, "f.txt": b"1", "deep/w.safetensors": WEIGHTS}.items():
        (tmp_path / "model" / name).write_bytes(data)
    sha = hub.add_repo("u/m", tmp_path / "model")
    found = client("""
info = api.model_info("u/m")
found["info"] = [info.sha, info.private, info.pipeline_tag, info.library_name]
found["names"] = [file.rfilename for file in info.siblings]
found["root"] = [entry.path for entry in api.list_repo_tree("u/m")]
found["deep"] = [(entry.path, entry.size, entry.lfs.sha256) for entry in api.list_repo_tree("u/m", "deep")]
found["files"] = api.list_repo_files("u/m")
""")
    assert found["info"] == [sha, False, "text-classification", None]
    assert found["names"] == found["files"] == ["README.md", "deep/w.safetensors", "f.txt"]
    assert found["root"] == ["README.md", "deep", "f.txt"]
    assert found["deep"] == [["deep/w.safetensors", len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest()]]


def test_a_space(hub, client):
    found = client("""
api.create_repo("u/s", repo_type="space", space_sdk="gradio", private=True)
api.add_space_variable("u/s", "a", "1")
api.add_space_variable("u/s", "b", "2")
api.add_space_variable("u/s", "a", "3")
found["variables"] = {key: v.value for key, v in api.get_space_variables("u/s").items()}
found["others"] = error(HfApi(token=False).get_space_variables, "u/s")[1]
api.create_commit("u/s", add(app__py=b"app", w__bin=b"weights"), commit_message="app", repo_type="space")
found["info"] = [api.space_info("u/s").private, api.list_repo_files("u/s", repo_type="space")]
found["weights"] = open(hf_hub_download("u/s", "w.bin", repo_type="space")).read()
""")
    assert found["variables"] == {"a": "3", "b": "2"}
    assert found["others"] == 401
    assert found["info"] == [True, [".gitattributes", "app.py", "w.bin"]]
    assert found["weights"] == "weights"
    body = json.dumps({"name": "t", "type": "space", "sdk": "none"}).encode()
    assert get(f"{hub.endpoint}/api/repos/create", body, Authorization="Bearer hf_u")[0] == 400


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


def test_the_hub_stops():
    with HubServer() as hub:
        assert get(f"{hub.endpoint}/api/whoami-v2")[0] == 401
    with pytest.raises(urllib.error.URLError):
        get(f"{hub.endpoint}/api/whoami-v2")
