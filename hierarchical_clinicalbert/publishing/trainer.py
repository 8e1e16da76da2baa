"""Publish checkpoints during and after training, with a subclass of the Trainer.

The Trainer of transformers copies only the files that it knows, and rewrites README.md. It uploads every file of the folder,
possibly in several commits. `PublishingTrainer` makes one commit, with the files of a checkpoint and this project's card. States
to resume from are pickles, and are not published: the strategies ``checkpoint`` and ``all_checkpoints`` are ``every_save``.
Training waits for each push.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from hierarchical_clinicalbert.checkpoint_files import published_files
from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.publishing.hub import Target, publish

logger = logging.getLogger(__name__)


class PublishingTrainer(Trainer):
    """Push the files of a checkpoint to the Hub, with the card that ``write_card`` writes into a folder."""

    def __init__(self, *args: Any, write_card: Callable[[Path], None] = lambda folder: None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.write_card = write_card

    def push_to_hub(self, commit_message: str = "End of training", **kwargs: Any) -> CommitInfo | None:
        """Save the model, and publish its files and card in one commit. Further arguments of the Trainer are ignored.

        InputError: the commit failed. The message has the command that repeats it.
        """
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        branch = f" --revision {self.args.hub_revision}" if self.args.hub_revision else ""
        command = f"push_to_hub.py --model {self.args.output_dir} --repo_id {self.hub_model_id}{branch}"
        remedy = f"the run is complete, and only this push is missing: run {command}"
        commit = self.publish(Path(self.args.output_dir), commit_message, remedy)
        logger.info("published as %s", self.hub_model_id)
        return commit

    def publish(self, folder: Path, message: str, remedy: str) -> CommitInfo:
        """Write the card of a checkpoint, and commit its files to the branch ``--hub_revision``."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.write_card(folder)
        branch, private = self.args.hub_revision or "main", bool(self.args.hub_private_repo)
        target = Target(self.hub_model_id, "model", branch, private, exists=False)
        return publish(HfApi(token=self.args.hub_token), target, published_files(folder), message, remedy)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        message = f"Training in progress, step {self.state.global_step}"
        try:
            self.publish(Path(checkpoint_folder), message, "the next push has all files")
        except InputError as error:
            logger.warning("a push during training failed: %s", error)
