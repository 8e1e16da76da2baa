"""Publish checkpoints during and after training, with a subclass of the Trainer.

The Trainer of transformers copies only the files that it knows, and rewrites README.md. It uploads every file of the folder,
possibly in several commits. `PublishingTrainer` makes one commit, with the files of a checkpoint and this project's card. A
checkpoint to resume from is published without its pickles.
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.utils import filter_repo_objects
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from hierarchical_clinicalbert.checkpoint_files import CHECKPOINT_FILES, list_files, published_files
from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.publishing.description import delete_earlier_description
from hierarchical_clinicalbert.publishing.hub import HUB_ERRORS, commit_operations, describe_hub_error

logger = logging.getLogger(__name__)

PICKLES = ["*.pt", "*.pth", "*.bin", "*.pkl"]


class PublishingTrainer(Trainer):
    """Push the files of a checkpoint to the Hub, with the card that ``write_card`` writes into a folder."""

    write_card: Callable[[Path], None]

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        self.hub = HfApi(token=token or self.args.hub_token)  # one client, which queues all uploads
        try:
            super().init_hf_repo(token, private)
            if self.args.hub_revision is not None and self.is_world_process_zero():
                self.hub.create_branch(self.hub_model_id, branch=self.args.hub_revision, exist_ok=True)
        except HUB_ERRORS as error:
            raise InputError(f"cannot create the repository of --push_to_hub: {describe_hub_error(error)}") from error

    def push_to_hub(self, commit_message: str = "End of training", **kwargs: Any) -> CommitInfo | None:
        """Save the model, and publish its files and card in one commit. Further arguments of the Trainer are ignored."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.write_card(Path(self.args.output_dir))
        self._finish_current_push()
        return self._commit(commit_message, {})

    def _commit(self, message: str, folders: dict[str, Path]) -> CommitInfo:
        """Commit the output folder's checkpoint, and ``folders`` by path in the repository, to the branch ``--hub_revision``."""
        output = Path(self.args.output_dir)
        files = published_files(output)
        for place, folder in folders.items():
            names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            files |= {f"{place}/{name}": folder / name for name in filter_repo_objects(names, ignore_patterns=PICKLES)}
            if (state := f"{place}/{TRAINER_STATE_NAME}") in files:
                files[state] = published_state(folder, place)
        target = {"repo_id": self.hub_model_id, "revision": self.args.hub_revision}
        operations = commit_operations(files, self.hub.list_repo_files(**target), CHECKPOINT_FILES)
        return self.hub.create_commit(operations=operations, commit_message=message, **target)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        running = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if running and not self.args.hub_always_push:
            return
        self._warn_of_failed_pushes()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder, output = Path(checkpoint_folder), Path(self.args.output_dir)
        delete_earlier_description(output)
        for name in list_files(folder):  # a copy, because the checkpoint may be deleted during the upload
            (output / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, output / name)
        self.write_card(output)
        places = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: folder.name}
        folders = {place: folder for strategy, place in places.items() if strategy == self.args.hub_strategy}
        message = f"Training in progress, step {self.state.global_step}"
        job = self.hub.run_as_future(self._commit, message, folders)
        self.push_in_progress = PushInProgress([*(self.push_in_progress.jobs if running else []), job])

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._warn_of_failed_pushes()

    def _warn_of_failed_pushes(self) -> None:
        """Warn once of each failed push. Training continues, and the last push uploads everything."""
        jobs = self.push_in_progress.jobs if getattr(self, "push_in_progress", None) is not None else []
        for job in [job for job in jobs if job.done()]:
            jobs.remove(job)
            if job.exception() is not None:
                logger.warning("a push during training failed: %s", describe_hub_error(job.exception()))


def published_state(checkpoint: Path, place: str) -> bytes:
    """Return trainer_state.json of a checkpoint that is published in the folder ``place``.

    The path of the run's best checkpoint becomes its name in the repository. It was a path of this machine.
    """
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    if state["best_model_checkpoint"] is not None:
        best = Path(state["best_model_checkpoint"]).name
        state["best_model_checkpoint"] = place if best == checkpoint.name else best
    return f"{json.dumps(state, indent=2, sort_keys=True)}\n".encode()
