"""Publish checkpoints during and after training, with a subclass of the Trainer.

The Trainer of transformers copies only the files that it knows, and rewrites README.md. It uploads every file of the folder,
possibly in several commits. `PublishingTrainer` makes one commit, with the files of a checkpoint and this project's card. A
checkpoint to resume from is published without its pickles.
"""

import json
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.utils import filter_repo_objects
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from hierarchical_clinicalbert.checkpoint_files import list_files, published_files
from hierarchical_clinicalbert.publishing.description import delete_earlier_description
from hierarchical_clinicalbert.publishing.hub import Target, publish

logger = logging.getLogger(__name__)

PICKLES = ["*.pt", "*.pth", "*.bin", "*.pkl"]


class PublishingTrainer(Trainer):
    """Push the files of a checkpoint to the Hub, with the card that ``write_card`` writes into a folder."""

    def __init__(self, *args: Any, write_card: Callable[[Path], None] = lambda folder: None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.write_card = write_card
        self.hub = HfApi(token=self.args.hub_token)  # one client, which queues all uploads

    def push_to_hub(self, commit_message: str = "End of training", **kwargs: Any) -> CommitInfo | None:
        """Save the model, and publish its files and card in one commit. Further arguments of the Trainer are ignored.

        InputError: the commit failed. The message has the command that repeats it.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.write_card(Path(self.args.output_dir))
        self._finish_current_push()
        branch = f" --revision {self.args.hub_revision}" if self.args.hub_revision else ""
        command = f"push_to_hub.py --model {self.args.output_dir} --repo_id {self.hub_model_id}{branch}"
        commit = self.publish(commit_message, {}, f"the run is complete, and only this push is missing: run {command}")
        logger.info("published as %s", self.hub_model_id)
        return commit

    def publish(self, message: str, folders: dict[str, Path], remedy: str) -> CommitInfo:
        """Commit the output folder's checkpoint, and ``folders`` by path in the repository, to the branch ``--hub_revision``."""
        files = published_files(Path(self.args.output_dir))
        for place, folder in folders.items():
            names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            files |= {f"{place}/{name}": folder / name for name in filter_repo_objects(names, ignore_patterns=PICKLES)}
            if (state := f"{place}/{TRAINER_STATE_NAME}") in files:
                files[state] = published_state(folder, place)
        target = Target(self.hub_model_id, "model", self.args.hub_revision or "main", self.args.hub_private_repo)
        return publish(self.hub, target, files, message, remedy)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        running = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if running and not self.args.hub_always_push:
            return
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
        job = self.hub.run_as_future(self.publish, message, folders, "the next push has all files")
        job.add_done_callback(warn_of_failed_push)
        self.push_in_progress = PushInProgress([*(self.push_in_progress.jobs if running else []), job])


def warn_of_failed_push(job: Future) -> None:
    """Warn of a failed push during training, which continues."""
    if error := job.exception():
        logger.warning("a push during training failed: %s", error)


def published_state(checkpoint: Path, place: str) -> bytes:
    """Return trainer_state.json of a checkpoint that is published in the folder ``place``.

    The path of the run's best checkpoint becomes its name in the repository. It was a path of this machine.
    """
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    if state["best_model_checkpoint"] is not None:
        best = Path(state["best_model_checkpoint"]).name
        state["best_model_checkpoint"] = place if best == checkpoint.name else best
    return f"{json.dumps(state, indent=2, sort_keys=True)}\n".encode()
