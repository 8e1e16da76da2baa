"""Callbacks of the Trainer: log lines and check the losses, and resume with the settings of this
run.
"""

import logging
import math
from pathlib import Path
from typing import Any

from transformers import (
    EarlyStoppingCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.training.resume import find_best_checkpoint

logger = logging.getLogger(__name__)


class ProgressBar(ProgressCallback):
    """A bar of the steps. `LogLines` writes what the Trainer logs."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


class LogLines(TrainerCallback):
    """Log a line for each training loss that the Trainer logs, and for each evaluation, in place of
    its dicts.

    A loss that is not finite ends the run. No checkpoint holds weights that are not finite, see
    `TrainingLoop._save`.
    """

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        for loss in (logs[name] for name in ("loss", "train_loss") if name in logs):
            refuse_infinite(loss, "the loss", state.global_step)
        if "loss" in logs:
            shown = f"loss {logs['loss']:.4g}, learning rate {logs['learning_rate']:.3g}"
            logger.info("step %d of %d: %s", state.global_step, state.max_steps, shown)

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Log the epoch, the losses, the metric that selects the checkpoint, and its best value so
        far.
        """
        name = args.metric_for_best_model or "loss"
        key = name if name.startswith("eval_") else f"eval_{name}"
        history = [entry for entry in state.log_history if key in entry]
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry][-1:]
        shown = [f"loss {loss:.4g}" for loss in losses] + [
            f"validation loss {history[-1]['eval_loss']:.4g}"
        ]
        if key != "eval_loss":
            shown.append(f"{key.removeprefix('eval_')} {history[-1][key]:.4f}")
        best = (max if args.greater_is_better else min)(history, key=lambda entry: entry[key])
        so_far = (
            "best so far"
            if best is history[-1]
            else f"best: {best[key]:.4f}, epoch {best['epoch']:.4g}"
        )
        logger.info("epoch %.4g: %s (%s)", state.epoch, ", ".join(shown), so_far)


def refuse_infinite(value: float, what: str, step: int) -> None:
    """Raise InputError if training has diverged: a value is not finite."""
    if not math.isfinite(value):
        remedy = (
            "lower --learning_rate; --resume_from_checkpoint auto continues from the last "
            "checkpoint"
        )
        raise InputError(f"{what} is {value} at step {step} or before: {remedy}")


class ResumedRun(TrainerCallback):
    """Continue a run from a checkpoint, but with this run's patience and numbers of steps between
    evaluations, saves and logs.

    Attributes:
        state: the state of the Trainer that the checkpoint holds.
    """

    def __init__(self, trainer: Trainer, checkpoint: str):
        self.trainer = trainer
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        self.best_checkpoint = find_best_checkpoint(trainer.args, self.state, checkpoint)
        early_stopping = [
            one
            for one in trainer.callback_handler.callbacks
            if isinstance(one, EarlyStoppingCallback)
        ]
        self.patience = early_stopping[0].early_stopping_patience if early_stopping else math.inf

    def check_steps_per_epoch(self, now: int) -> None:
        """Raise InputError if an epoch had another number of steps: the Trainer would train more or
        fewer epochs.
        """
        step = self.state.global_step
        epoch = self.state.epoch
        if step and epoch and abs(epoch * now - step) >= 1:  # less is rounding of batches
            raise InputError(
                f"the run to resume had {step / epoch:.0f} steps per epoch, and now there "
                f"are {now}: give the same "
                "number of processes, --per_device_train_batch_size and "
                "--gradient_accumulation_steps"
            )

    def has_ended(self, max_steps: int) -> bool:
        """Return whether the run had taken all steps, or had stopped early."""
        stored = self.state.stateful_callbacks.get(EarlyStoppingCallback.__name__)
        waited = stored["attributes"]["early_stopping_patience_counter"] if stored else 0
        return self.state.global_step >= max_steps or waited >= self.patience

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)
        # the Trainer drops the path of a moved folder
        state.best_model_checkpoint = self.best_checkpoint
        for stateful in (*self.trainer.callback_handler.callbacks, control):
            if isinstance(stateful, EarlyStoppingCallback):
                stateful.early_stopping_patience = self.patience
            if isinstance(stateful, ExportableState):  # without a state, the Trainer fails to save
                state.stateful_callbacks.setdefault(type(stateful).__name__, stateful.state())

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Set the epoch of samplers.

        With several processes, the Trainer reaches none below the batches that it skips.
        """
        level = kwargs["train_dataloader"]
        while level is not None:
            if hasattr(level, "set_epoch"):
                level.set_epoch(int(state.epoch))
            level = getattr(level, "batch_sampler", None)
