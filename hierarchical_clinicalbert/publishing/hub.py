"""Publish files on the Hub: check the token and its permissions, then make one commit.

Worth knowing:

1. `log_in` and `find_target` check token, permissions, names and the content of the repositories before the first commit.
2. A repository changes by one commit or not at all, and unchanged files make no commit. So a command whose response was
   lost can safely be repeated.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from configuration_hierarchical import HierarchicalConfig
from hierarchical_clinicalbert.checkpoint_files import encoder_on_hub
from hierarchical_clinicalbert.connection import find_hub_problem
from hierarchical_clinicalbert.errors import InputError, one_line

SPACE_FILES = (
    *("README.md", "requirements.txt", "app.py", "style.css"),
    *("attribution.py", "classification.py", "guard.py", "retention.py", "service.py", "tables.py", "views.py"),
    *("taxonomy_hierarchical.py", "hierarchical_clinicalbert/__init__.py"),
    *(
        f"hierarchical_clinicalbert/reading/{name}.py"
        for name in ("__init__", "columns", "delimited", "foreign_code", "rows")
    ),
)
SPACE_TAG = "hierarchical-text-classification"  # in the front matter of our Spaces
NEUTRAL_FILES = {".gitattributes", ".gitignore", "README.md", "LICENSE"}
HUB_ERRORS = (HTTPError, OSError)  # error responses and lost connections


@dataclass(frozen=True)
class Target:
    """The state of a repository before publishing. A repository that does not exist has no commit ``sha``."""

    repo_id: str
    repo_type: str
    revision: str
    private: bool
    sha: str | None = None
    files: tuple[str, ...] = ()


def refuse_local_encoder(config: HierarchicalConfig, remedy: str) -> None:
    """Raise InputError if an adapter's encoder is a folder on this machine."""
    if encoder_on_hub(config) is None:
        raise InputError(
            f"the adapter is for the encoder in {config.encoder_name_or_path}, which is on this machine only: {remedy}"
        )


def log_in(api: HfApi) -> tuple[str, ...]:
    """Return the namespaces that the token may write to, the user's own first.

    Raises:
        InputError: there is no token, the Hub does not know it, or it may only read.
    """
    if (api.token or get_token()) is None:
        raise InputError("no Hub token: set HF_TOKEN to one that may write, or run `hf auth login`")
    if problem := find_hub_problem():
        raise InputError(f"cannot check the token on the Hub: {problem}")
    try:
        who = api.whoami()
    except HUB_ERRORS as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
            raise InputError("the Hub does not know the token (of HF_TOKEN or of the login): make a new one") from error
        raise InputError(f"cannot check the token on the Hub: {describe_hub_error(error)}") from error
    except UnicodeEncodeError as error:
        raise InputError("the Hub token has characters that no token has, such as typographic quotes") from error
    token = who.get("auth", {}).get("accessToken", {})
    scopes = token.get("fineGrained", {}).get("scoped", [])
    permissions = {permission for scope in scopes for permission in scope.get("permissions", [])}
    fine_grained_read = token.get("role") == "fineGrained" and not permissions & {"repo.write", "repo.content.write"}
    if token.get("role") == "read" or fine_grained_read:
        raise InputError("the Hub token may only read: make one that may write")
    return who["name"], *(org["name"] for org in who.get("orgs", []) if org.get("roleInOrg") != "read")


def find_target(
    api: HfApi,
    namespaces: tuple[str, ...],
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
        repo_id = f"{namespaces[0]}/{repo_id}"
    namespace, branch = repo_id.split("/")[0], "main" if revision is None else revision
    if namespace not in namespaces and not create_pr:
        writable = ", ".join(namespaces)
        raise InputError(f"{flag} {repo_id}: the token may not write to {namespace!r}, only to {writable}")
    if re.fullmatch("[0-9a-f]{40}", branch):
        raise InputError(f"{branch} is a commit; name a branch")
    if not branch or re.search(r"[\s~^:?*\[\\\x00-\x1f\x7f]|\.\.|^[-/.]|[/.]$|\.lock$|//|@\{", branch):
        raise InputError(f"{branch!r} is not a valid name for a branch")

    # ── Look up the repository and the branch ────────────────────────────────────────────────────────────────────────
    try:
        info = current = api.repo_info(repo_id, repo_type=repo_type)
        current = api.repo_info(repo_id, repo_type=repo_type, revision=branch)
    except RepositoryNotFoundError as error:
        if create_pr:
            raise InputError(f"{flag} {repo_id}: there is no such {repo_type} to open a pull request on") from error
        return Target(repo_id, repo_type, branch, private)
    except RevisionNotFoundError as error:
        if create_pr:
            raise InputError(f"--revision {branch}: {repo_id} has no such branch to open a pull request on") from error
        # `publish` creates the branch from the default branch, so `current` stays the state of the default branch
    except HUB_ERRORS as error:
        raise InputError(f"cannot read the repository {repo_id}: {describe_hub_error(error)}") from error

    # ── Check what the repository holds ──────────────────────────────────────────────────────────────────────────────
    if private and not info.private:
        raise InputError(f"{flag} {repo_id} is public already, which --private does not change: use its settings page")
    files = tuple(sorted(sibling.rfilename for sibling in current.siblings or []))
    target = Target(repo_id, repo_type, branch, bool(info.private), current.sha, files)
    specific = [name for name in files if name not in NEUTRAL_FILES]
    if specific and not is_ours(api, target):
        raise InputError(f"{flag} {repo_id} already holds something else, such as {specific[0]}: choose another name")
    return target


def is_ours(api: HfApi, target: Target) -> bool:
    """Return whether a repository holds a model or a Space of this project. Raise InputError if it cannot be read."""
    is_model = target.repo_type == "model"
    name = "config.json" if is_model else "README.md"
    if name not in target.files:
        return False
    try:
        path = api.hf_hub_download(target.repo_id, name, repo_type=target.repo_type, revision=target.sha)
        text = Path(path).read_text(encoding="utf-8")
        if is_model:
            return json.loads(text).get("model_type") == HierarchicalConfig.model_type
        return SPACE_TAG in (RepoCard(text, ignore_metadata_errors=True).data.get("tags") or [])
    except (ValueError, AttributeError, TypeError):  # not JSON, not a mapping, or not a card
        return False
    except HUB_ERRORS as error:
        raise InputError(f"cannot read the repository {target.repo_id}: {describe_hub_error(error)}") from error


def publish(
    api: HfApi,
    target: Target,
    files: Mapping[str, Path | bytes],
    our_patterns: tuple[str, ...],
    message: str,
    create_pr: bool = False,
) -> CommitInfo:
    """Publish files in one commit, or none if nothing changed. Arguments are as for `commit_operations`.

    Raises:
        InputError: the commit was refused, or the connection was lost.
    """
    repo = {"repo_id": target.repo_id, "repo_type": target.repo_type}
    try:
        if target.sha is None:
            sdk = "gradio" if target.repo_type == "space" else None
            api.create_repo(**repo, private=target.private or None, space_sdk=sdk, exist_ok=True)
        if target.revision != "main" and not create_pr:
            api.create_branch(**repo, branch=target.revision, exist_ok=True)
        return api.create_commit(
            **repo,
            operations=commit_operations(files, target.files, our_patterns),
            commit_message=message,
            revision=target.revision,
            create_pr=create_pr,
            parent_commit=target.sha,
        )
    except (*HUB_ERRORS, ValueError, RuntimeError) as error:
        remedy = "run the same command again, which commits nothing twice"
        if create_pr:
            remedy = "run the same command again, unless the pull request is on the Hub"
        raise InputError(f"{target.repo_id}: {describe_hub_error(error)}; {remedy}") from error


def commit_operations(
    files: Mapping[str, Path | bytes], repo_files: Iterable[str], our_patterns: tuple[str, ...]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Return the operations that add files, and delete stale files of an earlier version.

    Args:
        files: paths or contents, by path in the repository.
        repo_files: the paths that the repository holds now.
        our_patterns: patterns of the paths that this project writes; no other file is deleted.
    """
    stale = [name for name in filter_repo_objects(repo_files, allow_patterns=list(our_patterns)) if name not in files]
    return [CommitOperationAdd(*file) for file in files.items()] + [CommitOperationDelete(name) for name in stale]


def describe_hub_error(error: Exception) -> str:
    """Describe in one line why a request to the Hub failed."""
    if isinstance(error, HfHubHTTPError):
        detail = f" ({one_line(error.server_message)})" if error.server_message else ""
        status = error.response.status_code
        if status in (401, 403):
            return f"the token may not do this{detail}"
        return "the repository has changed meanwhile" if status == 412 else f"the Hub answered {status}{detail}"
    if isinstance(error, ConnectionError) and "xet" in str(error):  # hf_xet does not fall back to LFS
        return "the Hub refused an upload by Xet: set HF_HUB_DISABLE_XET=1 to upload by LFS"
    if isinstance(error, HTTPError):
        return f"the connection to the Hub failed ({one_line(error)})"
    return one_line(error)
