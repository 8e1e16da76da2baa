"""Publish files on the Hub: check the token and its permissions, then make one commit.

Worth knowing:

1. All reasons for which the Hub would refuse are checked first, so a refusal leaves nothing behind.
2. A repository changes by one commit or not at all. If the Hub's response to the commit is lost, the repository is read to
   find out whether the commit was accepted.
"""

import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from configuration_hierarchical import HierarchicalConfig
from errors import InputError, one_line

SPACE_FILES = (
    *("README.md", "requirements.txt", "app.py", "style.css"),
    *("attribution.py", "classification.py", "guard.py", "tables.py", "views.py"),
    *(f"reading/{name}.py" for name in ("__init__", "columns", "parquet", "rows", "sources")),
)
SPACE_TAG = "hierarchical-text-classification"  # in the front matter of our Spaces
NEUTRAL_FILES = {".gitattributes", ".gitignore", "README.md", "LICENSE"}
HUB_ERRORS = (HTTPError, OSError)  # error responses and lost connections


@dataclass(frozen=True)
class Account:
    """The user of a token, and the namespaces that the token may write to."""

    name: str
    namespaces: tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """The state of a repository before publishing."""

    repo_id: str
    repo_type: str
    revision: str
    exists: bool
    branch_exists: bool
    private: bool
    sha: str | None
    files: tuple[str, ...]


@dataclass(frozen=True)
class Published:
    """A commit that the Hub has accepted, with its URL or its pull request's URL."""

    sha: str
    url: str


def refuse_local_encoder(config: HierarchicalConfig, remedy: str) -> None:
    """Raise InputError if an adapter's encoder is a folder on this machine."""
    if Path(config.encoder_name_or_path).is_absolute():
        raise InputError(
            f"the adapter is for the encoder in {config.encoder_name_or_path}, which is on this machine only: {remedy}"
        )


def log_in(api: HfApi) -> Account:
    """Look up the account of the token, from ``HF_TOKEN`` or the login.

    Raises:
        InputError: there is no token, the Hub does not know it, or it may only read.
    """
    if (api.token or get_token()) is None:
        raise InputError("no Hub token: set HF_TOKEN to one that may write, or run `hf auth login`")
    try:
        who = api.whoami()
    except HUB_ERRORS as error:
        if status(error) == 401:
            raise InputError("the Hub does not know the token in HF_TOKEN, or of the login: make a new one") from error
        raise InputError(f"cannot ask the Hub whose token this is: {reason(error)}") from error
    token = who.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read" or (token.get("role") == "fineGrained" and not can_write(token)):
        raise InputError("the Hub token may only read: make one that may write")
    organizations = [org["name"] for org in who.get("orgs", []) if org.get("roleInOrg") != "read"]
    return Account(who["name"], (who["name"], *organizations))


def can_write(token: dict) -> bool:
    """Return whether any scope of a fine-grained token allows writing to a repository."""
    scopes = token.get("fineGrained", {}).get("scoped", [])
    return any({"repo.write", "repo.content.write"} & set(scope.get("permissions", [])) for scope in scopes)


def find_target(
    api: HfApi,
    account: Account,
    flag: str,
    repo_id: str,
    repo_type: str = "model",
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
) -> Target:
    """Look up the repository that a flag names, and check that it can be published to.

    Raises:
        InputError: the Hub would refuse the commit, or the repository holds something else or is public despite ``private``.
    """
    # ── Check the names ──────────────────────────────────────────────────────────────────────────────────────────────
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{flag} {repo_id}: {one_line(error)}") from error
    if "/" not in repo_id:
        repo_id = f"{account.name}/{repo_id}"
    namespace = repo_id.split("/")[0]
    if namespace not in account.namespaces and not create_pr:
        writable = ", ".join(account.namespaces)
        raise InputError(f"{flag} {repo_id}: the token may not write to {namespace!r}, only to {writable}")
    check_branch(revision)

    # ── Look up the repository and the branch ────────────────────────────────────────────────────────────────────────
    branch = revision or "main"
    info: Any = None
    branch_info: Any = None
    try:
        info = api.repo_info(repo_id, repo_type=repo_type)
        branch_info = api.repo_info(repo_id, repo_type=repo_type, revision=branch)
    except RepositoryNotFoundError as error:
        if create_pr:
            raise InputError(f"{flag} {repo_id}: there is no such {repo_type} to open a pull request on") from error
        return Target(repo_id, repo_type, branch, False, branch == "main", private, None, ())
    except RevisionNotFoundError as error:
        if create_pr:
            raise InputError(f"--revision {branch}: {repo_id} has no such branch to open a pull request on") from error
    except HUB_ERRORS as error:
        raise InputError(f"cannot look at {repo_id}: {reason(error)}") from error

    # ── Check what the repository holds ──────────────────────────────────────────────────────────────────────────────
    if private and not info.private:
        raise InputError(f"{flag} {repo_id} is public already, which --private does not change: use its settings page")
    current = branch_info or info
    files = tuple(sorted(sibling.rfilename for sibling in current.siblings or []))
    target = Target(repo_id, repo_type, branch, True, branch_info is not None, info.private, current.sha, files)
    specific = [name for name in files if name not in NEUTRAL_FILES]
    if specific and not is_ours(api, target):
        raise InputError(f"{flag} {repo_id} already holds something else, such as {specific[0]}: choose another name")
    return target


def check_branch(revision: str | None) -> None:
    """Raise InputError if the name is not valid for a branch."""
    if revision is None:
        return
    if re.fullmatch("[0-9a-f]{40}", revision):
        raise InputError(f"--revision {revision} is a commit; name a branch")
    if not revision or re.search(r"[\s~^:?*\[\\\x00-\x1f\x7f]|\.\.|^[-/.]|[/.]$|\.lock$|//|@\{", revision):
        raise InputError(f"--revision {revision!r} is no name for a branch")


def is_ours(api: HfApi, target: Target) -> bool:
    """Return whether a repository holds a model or a Space of this project."""
    name = "config.json" if target.repo_type == "model" else "README.md"
    if name not in target.files:
        return False
    try:
        path = api.hf_hub_download(target.repo_id, name, repo_type=target.repo_type, revision=target.sha)
        text = Path(path).read_text(encoding="utf-8")
        if target.repo_type == "model":
            return json.loads(text).get("model_type") == HierarchicalConfig.model_type
        return SPACE_TAG in (RepoCard(text, ignore_metadata_errors=True).data.get("tags") or [])
    except (ValueError, AttributeError, TypeError):  # not JSON, not a mapping, or not a card
        return False
    except HUB_ERRORS as error:
        raise InputError(f"cannot look at {target.repo_id}: {reason(error)}") from error


def publish(
    api: HfApi,
    target: Target,
    files: Mapping[str, Path | bytes],
    our_patterns: tuple[str, ...],
    message: str,
    create_pr: bool = False,
) -> Published:
    """Publish files in one commit, which also deletes our files of an earlier version.

    Publishing the same files again makes no new commit, and no second pull request.

    Args:
        files: by their path in the repository.
        our_patterns: patterns of all files that we may have published.

    Raises:
        InputError: the commit was refused, or its outcome is unknown.
    """
    kind = {"repo_id": target.repo_id, "repo_type": target.repo_type}
    operations = commit_operations(files, target.files, our_patterns)
    try:
        if create_pr and (pull_request := open_pull_request(api, target, files, message)) is not None:
            return pull_request
        if not target.exists:
            sdk = "gradio" if target.repo_type == "space" else None
            api.create_repo(**kind, private=target.private or None, space_sdk=sdk, exist_ok=True)
        if not target.branch_exists:
            api.create_branch(**kind, branch=target.revision, exist_ok=True)
        parent = target.sha if target.branch_exists else None
        commit = api.create_commit(
            **kind,
            operations=operations,
            commit_message=message,
            revision=target.revision,
            create_pr=create_pr,
            parent_commit=parent,
        )
    except (*HUB_ERRORS, ValueError, RuntimeError) as error:
        return find_lost_commit(api, target, files, message, create_pr, error)
    return Published(commit.oid, commit.pr_url or commit.commit_url)


def commit_operations(
    files: Mapping[str, Path | bytes], repo_files: Iterable[str], our_patterns: tuple[str, ...]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Return the operations that add files, and delete our files of an earlier version.

    Args:
        files: by their path in the repository.
        repo_files: paths of the repository's current files.
        our_patterns: patterns of all files that we may have published.
    """
    stale = [name for name in filter_repo_objects(repo_files, allow_patterns=list(our_patterns)) if name not in files]
    return [CommitOperationAdd(*file) for file in files.items()] + [CommitOperationDelete(name) for name in stale]


def find_lost_commit(
    api: HfApi,
    target: Target,
    files: Mapping[str, Path | bytes],
    message: str,
    create_pr: bool,
    error: Exception,
) -> Published:
    """Return the commit if the Hub accepted it, and only the response was lost.

    Args:
        error: the error of the commit.

    Raises:
        InputError: the commit was refused, or the Hub cannot be asked.
    """
    published = None
    try:
        if create_pr:
            published = open_pull_request(api, target, files, message)
        elif holds_files(api, target, files, target.revision):
            sha = api.repo_info(target.repo_id, repo_type=target.repo_type, revision=target.revision).sha
            published = Published(sha, f"{api.endpoint}/{target.repo_id}/commit/{sha}")
    except (RepositoryNotFoundError, RevisionNotFoundError):
        pass  # nothing was created
    except HUB_ERRORS:
        raise InputError(
            f"{target.repo_id}: {reason(error)}; the Hub cannot be asked whether it accepted the commit: run the same "
            "command again, which is safe either way"
        ) from error
    if published is not None:
        return published
    state = "is unchanged" if target.exists else "holds no file of the checkpoint"
    raise InputError(
        f"{target.repo_id}: {reason(error)}; nothing was committed and the repository {state}: run the same command again"
    ) from error


def open_pull_request(api: HfApi, target: Target, files: Mapping[str, Path | bytes], title: str) -> Published | None:
    """Find an open pull request with this title and exactly these files."""
    for pull in api.get_repo_discussions(
        target.repo_id, repo_type=target.repo_type, discussion_type="pull_request", discussion_status="open"
    ):
        if pull.title == title and holds_files(api, target, files, pull.git_reference):
            sha = api.repo_info(target.repo_id, repo_type=target.repo_type, revision=pull.git_reference).sha
            return Published(sha, pull.url)
    return None


def holds_files(api: HfApi, target: Target, files: Mapping[str, Path | bytes], revision: str) -> bool:
    """Return whether a revision holds all these files with the same content."""
    tree = api.list_repo_tree(target.repo_id, recursive=True, revision=revision, repo_type=target.repo_type)
    entries = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    return all(name in entries and is_same_file(source, entries[name]) for name, source in files.items())


def is_same_file(source: Path | bytes, entry: RepoFile) -> bool:
    """Compare a file with a file on the Hub, by the hash that the Hub stores."""
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        if entry.lfs is not None:  # weights are hashed in chunks, since they may not fit into memory
            return sha_fileobj(file).hex() == entry.lfs.sha256
        return git_hash(file.read()) == entry.blob_id


def status(error: Exception) -> int | None:
    """Return the HTTP status of the Hub's response, or None without a response."""
    return getattr(getattr(error, "response", None), "status_code", None)


def reason(error: Exception) -> str:
    """Describe in one line why a request to the Hub failed."""
    if isinstance(error, HfHubHTTPError):
        detail = f" ({one_line(error.server_message)})" if error.server_message else ""
        if status(error) in (401, 403):
            return f"the token may not do this{detail}"
        if status(error) == 412:
            return "the repository has changed meanwhile"
        return f"the Hub answered {status(error)}{detail}"
    if isinstance(error, ConnectionError) and "xet" in str(error):  # hf_xet does not fall back to LFS
        return "the Hub refused an upload by Xet: set HF_HUB_DISABLE_XET=1 to upload by LFS"
    if isinstance(error, HTTPError):
        return f"the connection to the Hub failed ({one_line(error) or type(error).__name__})"
    return one_line(error) or type(error).__name__
