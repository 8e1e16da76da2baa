"""Publish a checkpoint, and a Space that serves it: ``python push_to_hub.py --model results
--repo_id user/name``.

Token, rights, names and card are checked first. Model and Space are one commit each.
"""

import argparse
import json
import tempfile
from pathlib import Path

import hierarchical_clinicalbert  # noqa: F401 - before bitsandbytes, see there

# isort: split
import transformers
from huggingface_hub import CommitInfo, HfApi, RepoCard
from huggingface_hub.utils import disable_progress_bars
from transformers import AutoTokenizer

from configuration_hierarchical import HierarchicalConfig
from hierarchical_clinicalbert.checkpoint_files import (
    CARD,
    published_files,
    read_checkpoint,
    read_json_object,
)
from hierarchical_clinicalbert.data.arguments import DataArguments
from hierarchical_clinicalbert.data.sources import read_texts
from hierarchical_clinicalbert.errors import (
    ROOT,
    ArgumentParser,
    InputError,
    as_input_error,
    run_command,
)
from hierarchical_clinicalbert.publishing import card
from hierarchical_clinicalbert.publishing.export import export_merged, export_onnx, load_merged
from hierarchical_clinicalbert.publishing.fingerprint import check_scores
from hierarchical_clinicalbert.publishing.hub import (
    SPACE_FILES,
    Target,
    find_target,
    log_in,
    publish,
    refuse_local_encoder,
)

MAX_EXAMPLES = 10  # buttons of the page
SPACE_FOLDER = ROOT / "space"
Files = dict[str, Path | bytes]


def main(argv: list[str]) -> None:
    arguments = parse(argv)

    # ── Check the checkpoint, the token, the repositories, the card ───────────────────────────────
    folder = Path(arguments.model)
    config = read_checkpoint(folder)
    if config.adapter_subfolder is not None and not arguments.merge:
        refuse_local_encoder(
            config, "give --merge to publish a model that needs no encoder beside it"
        )
    examples = read_examples(arguments.examples, arguments.encoding) if arguments.examples else []
    api = HfApi()
    namespaces = log_in(api)
    branch = arguments.revision
    private = arguments.private
    target = find_target(
        api, namespaces, "--repo_id", arguments.repo_id, revision=branch, private=private
    )
    space = None
    if arguments.space_id is not None:
        space = find_target(
            api, namespaces, "--space_id", arguments.space_id, "space", private=private
        )
    with as_input_error(f"cannot publish the card {folder / CARD}"):
        readme = (folder / CARD).read_text(encoding="utf-8-sig")
        model_card = RepoCard(readme)
        model_card.validate()  # on the Hub
        check_scores(folder, config, model_card)
        result = None
        if examples:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
            result = card.classify_example(load_merged(folder), tokenizer, examples[0])
        readme = card.update_for_publishing(
            readme, config, target.repo_id, arguments.merge, examples, result
        )

    with tempfile.TemporaryDirectory() as scratch:
        # ── Collect the files, in the requested form ──────────────────────────────────────────────
        if arguments.merge:
            export_merged(folder, Path(scratch))
            folder = Path(scratch)
        files: Files = published_files(folder)
        if arguments.onnx:
            files |= export_onnx(folder, Path(scratch))
        files[CARD] = readme.encode()
        if examples:
            files["config.json"] = config_with_examples(folder / "config.json", examples)

        # ── Publish the model in one commit, unless this is a dry run ─────────────────────────────
        if arguments.dry_run:
            list_changes(target, files)
            if space is not None:
                list_changes(space, space_files(target.repo_id, config))
            print("nothing was published")
            return
        model = publish(api, target, files, "Publish a checkpoint")
    print(f"{target.repo_id}: {model.commit_url}")

    # ── Publish the Space, which serves that commit ───────────────────────────────────────────────
    if space is not None:
        publish_space(api, space, target, model, config)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="push_to_hub.py", description="Publish a checkpoint on the Hub.")
    parser.add_argument("--model", required=True, help="the folder that train.py wrote")
    parser.add_argument("--repo_id", required=True, help="user/name of the model on the Hub")
    parser.add_argument(
        "--private", action="store_true", help="create missing repositories as private"
    )
    parser.add_argument(
        "--merge", action="store_true", help="merge the adapter: one self-contained model"
    )
    parser.add_argument(
        "--onnx", action="store_true", help="add onnx/, for other engines such as ONNX Runtime"
    )
    parser.add_argument(
        "--examples", metavar="FILE", help="texts for page and card: one a line, or a column text"
    )
    parser.add_argument("--encoding", help="of that file, such as cp1252 or utf-16; default: UTF-8")
    parser.add_argument("--space_id", help="user/name of a Space that serves the model")
    parser.add_argument(
        "--revision", help="the branch to commit to, created if missing; default: main"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="check everything, list the files, publish nothing"
    )
    return parser.parse_args(argv)


def read_examples(path: str, encoding: str | None) -> list[str]:
    """Return the texts of a file.

    InputError: it has no column of texts, a text is missing, or there are too many.
    """
    flag = "another file as --examples"
    texts, _ = read_texts(path, DataArguments(encoding=encoding), flag)
    if len(texts) > MAX_EXAMPLES:
        raise InputError(f"--examples: {path} has {len(texts):,} texts; give 1 to {MAX_EXAMPLES}")
    return texts


def config_with_examples(file: Path, examples: list[str]) -> bytes:
    """Return a config.json with the texts among what page and card show, see
    `HierarchicalConfig`.
    """
    config = read_json_object(file)
    config["page"] = {**config.get("page", {}), "examples": examples}
    return f"{json.dumps(config, indent=2, sort_keys=True)}\n".encode()


def space_files(model_id: str, config: HierarchicalConfig) -> Files:
    files: Files = {
        name: (SPACE_FOLDER if (SPACE_FOLDER / name).exists() else ROOT) / name
        for name in SPACE_FILES
    }
    readme = RepoCard((SPACE_FOLDER / "README.md").read_text(encoding="utf-8"))
    readme.data.models = [model_id]
    readme.data.title = config.page.get("title", readme.data.title)
    files["README.md"] = str(readme).encode()
    return files


def publish_space(
    api: HfApi, space: Target, model_target: Target, model: CommitInfo, config: HierarchicalConfig
) -> None:
    """Publish the Space, and set its variables to the commit of the model."""
    published = publish(api, space, space_files(model_target.repo_id, config), "Publish the Space")
    problem = f"{space.repo_id} is published, but not pointed at the model"
    with as_input_error(problem, "run the same command again"):
        for key, value in (("MODEL_ID", model_target.repo_id), ("MODEL_REVISION", model.oid)):
            api.add_space_variable(space.repo_id, key, value)
    print(f"{space.repo_id}: {published.commit_url}")
    if model_target.private:
        print(
            f"{model_target.repo_id} is private: give the Space a secret HF_TOKEN that may read it"
        )


def list_changes(target: Target, files: Files) -> None:
    state = (
        "changed" if target.exists else "created, private" if target.private else "created, public"
    )
    print(f"{target.repo_type} {target.repo_id}, branch {target.revision}, would be {state}:")
    for name, source in sorted(files.items()):
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        print(f"  {size:>12,} bytes  {name}")


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    advice = {
        "disk": "set TMPDIR to a folder with more room",
        "memory": "run it on a larger machine",
    }
    run_command("push_to_hub.py", main, advice | {"resume": "run the same command again"})
