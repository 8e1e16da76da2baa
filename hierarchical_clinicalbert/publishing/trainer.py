"""Publish checkpoints during and after training, with a subclass of the Trainer.

The Trainer of transformers copies only the files that it knows, and rewrites README.md. It uploads every file of the folder,
possibly in several commits. `PublishingTrainer` makes one commit, with the files of a checkpoint and this project's card. States
to resume from are pickles, and are not published: the strategies ``checkpoint`` and ``all_checkpoints`` are ``every_save``.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from hierarchical_clinicalbert.checkpoint_files import published_files
from hierarchical_clinicalbert.publishing.hub import Target, publish

logger = logging.getLogger(__name__)


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
        files = published_files(Path(self.args.output_dir))
        commit = self.publish(
            commit_message, files, f"the run is complete, and only this push is missing: run {command}"
        )
        logger.info("published as %s", self.hub_model_id)
        return commit

    def publish(self, message: str, files: dict[str, Path | bytes], remedy: str) -> CommitInfo:
        """Commit the files of a checkpoint to the branch ``--hub_revision``."""
        target = Target(self.hub_model_id, "model", self.args.hub_revision or "main", self.args.hub_private_repo)
        return publish(self.hub, target, files, message, remedy)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        running = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if running and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder = Path(checkpoint_folder)
        self.write_card(folder)
        files: dict[str, Path | bytes] = {}  # read now, because the checkpoint may be deleted during the upload
        for name, file in published_files(folder).items():
            files[name] = file if isinstance(file, bytes) else file.read_bytes()
        message = f"Training in progress, step {self.state.global_step}"
        job = self.hub.run_as_future(self.publish, message, files, "the next push has all files")
        job.add_done_callback(warn_of_failed_push)
        self.push_in_progress = PushInProgress([*(self.push_in_progress.jobs if running else []), job])


def warn_of_failed_push(job: Future) -> None:
    """Warn of a failed push during training, which continues."""
    if error := job.exception():
        logger.warning("a push during training failed: %s", error)
