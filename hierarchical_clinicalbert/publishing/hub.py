"""Publish files on the Hub: check the token and the names, then make one commit.

Worth knowing:

1. `log_in` and `find_target` check token, permissions and names before the first commit.
2. A repository changes by one commit or not at all, and unchanged files make no commit. So a
   command whose response was lost can safely be repeated.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from configuration_hierarchical import HierarchicalConfig
from hierarchical_clinicalbert.checkpoint_files import CHECKPOINT_FILES, encoder_on_hub
from hierarchical_clinicalbert.connection import go_offline_without_hub
from hierarchical_clinicalbert.errors import InputError, as_input_error

SPACE_FILES = (
    *("README.md", "requirements.txt", "app.py", "style.css"),
    *(
        "attribution.py",
        "classification.py",
        "guard.py",
        "retention.py",
        "service.py",
        "tables.py",
        "views.py",
    ),
    *("taxonomy_hierarchical.py", "hierarchical_clinicalbert/__init__.py"),
    *(
        f"hierarchical_clinicalbert/reading/{name}.py"
        for name in (
            "__init__",
            "columns",
            "delimited",
            "encodings",
            "foreign_code",
            "results",
            "rows",
            "workbook",
        )
    ),
)


@dataclass(frozen=True)
class Target:
    """A branch of a repository to publish to. A missing repository is created."""

    repo_id: str
    repo_type: str
    revision: str
    private: bool
    exists: bool


def refuse_local_encoder(config: HierarchicalConfig, remedy: str) -> None:
    """Raise InputError if an adapter's encoder is a folder on this machine."""
    if encoder_on_hub(config) is None:
        raise InputError(
            f"the adapter is for the encoder in {config.encoder_name_or_path}, which is on "
            f"this machine only: {remedy}"
        )


def log_in(api: HfApi) -> tuple[str, ...]:
    """Return the namespaces that the token may write to, the user's own first.

    InputError: there is no token, the Hub does not know it, or it may only read.
    """
    what = "cannot check the token (of HF_TOKEN or the login) on the Hub"
    if problem := go_offline_without_hub():
        raise InputError(f"{what}: {problem}")
    with as_input_error(what):
        who = api.whoami()
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise InputError("the Hub token may only read: make one that may write")
    return who["name"], *(
        org["name"] for org in who.get("orgs", []) if org.get("roleInOrg") != "read"
    )


def find_target(
    api: HfApi,
    namespaces: tuple[str, ...],
    flag: str,
    repo_id: str,
    repo_type: str = "model",
    revision: str | None = None,
    private: bool = False,
) -> Target:
    """Look up the repository that a flag names.

    InputError: the token may not write to it, or it is public despite ``private``.
    """
    if "/" not in repo_id:
        repo_id = f"{namespaces[0]}/{repo_id}"
    namespace = repo_id.split("/")[0]
    exists = True
    if namespace not in namespaces:
        writable = ", ".join(namespaces)
        raise InputError(
            f"{flag} {repo_id}: the token may not write to {namespace!r}, only to {writable}"
        )
    with as_input_error(f"cannot read the repository {repo_id}"):
        try:
            is_private = bool(api.repo_info(repo_id, repo_type=repo_type).private)
        except RepositoryNotFoundError:
            is_private = private
            exists = False
    if private and not is_private:
        problem = "is public already, which --private does not change: use its settings page"
        raise InputError(f"{flag} {repo_id} {problem}")
    return Target(repo_id, repo_type, revision or "main", is_private, exists)


def publish(
    api: HfApi,
    target: Target,
    files: Mapping[str, Path | bytes],
    message: str,
    remedy: str = "run the same command again, which commits nothing twice",
) -> CommitInfo:
    """Publish files in one commit, or none if nothing changed. Stale files of an earlier version
    are deleted, and no others.

    Args:
        files: paths or contents, by path in the repository.
        remedy: what to do if the commit was refused or the connection was lost, for the InputError.
    """
    repo = {"repo_id": target.repo_id, "repo_type": target.repo_type}
    ours = CHECKPOINT_FILES if target.repo_type == "model" else SPACE_FILES
    with as_input_error(target.repo_id, remedy):
        if not target.exists:
            sdk = "gradio" if target.repo_type == "space" else None
            api.create_repo(**repo, private=target.private or None, space_sdk=sdk, exist_ok=True)
        if target.revision != "main":
            api.create_branch(**repo, branch=target.revision, exist_ok=True)
        present = api.list_repo_files(**repo, revision=target.revision)
        stale = {*filter_repo_objects(present, allow_patterns=list(ours))} - files.keys()
        operations = [
            *(CommitOperationAdd(*file) for file in files.items()),
            *map(CommitOperationDelete, sorted(stale)),
        ]
        return api.create_commit(
            **repo, operations=operations, commit_message=message, revision=target.revision
        )
