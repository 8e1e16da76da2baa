"""The Trainer of transformers, with what a hierarchical, possibly quantized model needs beyond it.

Worth knowing:

1. The loss is already divided by the labels of the whole accumulated batch, over all devices; DDP then averages
   gradients, so it is multiplied by the number of processes.
2. The Trainer resumes, and goes back to the best model, by root-level file names that our adapter form does not have.
3. bitsandbytes repacks 4-bit weights in place when a layer runs in eval mode on a CPU with AVX-512 BF16, and training
   after that is wrong. While a model trains, its layers are told not to.
4. Where training batches are grouped by length, the Trainer's own predictions would not come in the order of their rows,
   and a resumed run would meet its rows in another order. Here both hold.
5. No ``training_args.bin`` is written: it is a pickle, and can hold a token.
6. To look at a loss is to wait for the GPU. That happens where the Trainer waits too, before it logs, evaluates or saves.
"""

import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import EarlyStoppingCallback, TrainerState, trainer_pt_utils
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from errors import InputError, refusing
from modeling_hierarchical import (
    ADAPTER_SUBFOLDER,
    ADAPTER_WEIGHTS,
    HEADS_WEIGHTS,
    HierarchicalForSequenceClassification,
)
from publishing.trainer import PublishingTrainer
from training.cpu import speed_up
from training.losses import HierarchicalFocalLoss
from training.resume import damage
from training.views import disagreement, halves

logger = logging.getLogger(__name__)

BATCHES_SORTED = 50
MOST_UNCHECKED = 100  # losses of micro-batches that are not looked at yet


class HierarchicalTrainer(PublishingTrainer):
    """A Trainer whose loss is a `HierarchicalFocalLoss`.

    Args:
        loss_function: the loss to train with; the model's own negative log-likelihood without one.
        consistency: how much the disagreement of a text's halves counts, see `training.views`; 0 trains on whole texts.
            Otherwise it needs a loss_function, and training rows the columns ``sentences`` and ``row``, or it is a ValueError.
        heads_learning_rate: peak learning rate of the heads; the optimizer's own without one.
        args, kwargs: as for `publishing.trainer.PublishingTrainer`.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        loss_function: HierarchicalFocalLoss | None = None,
        consistency: float = 0.0,
        heads_learning_rate: float | None = None,
        **kwargs: Any,
    ):
        with refusing("cannot set up training"):
            super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            logger.warning("%d GPUs found, one is used: `accelerate launch train.py …` uses all", self.args.n_gpu)
            self.args._n_gpu = 1
            self._train_batch_size = self.args.train_batch_size
        self.loss_function = None if loss_function is None else loss_function.to(self.args.device)
        columns = getattr(self.train_dataset, "column_names", None) or ()
        if consistency and (loss_function is None or not {"sentences", "row"}.issubset(columns)):
            raise ValueError(
                "consistency needs a loss_function, and training rows with the columns 'sentences' and 'row'"
            )
        self.consistency = consistency
        self.heads_learning_rate = heads_learning_rate
        self.tried_batch_size: int | None = None
        self.best_checkpoint: str | None = None
        self.unchecked: list[tuple[int, Tensor, Any]] = []  # step, loss, rows
        keep_trainable(self.model)
        if self.args.bf16 and self.args.device.type == "cpu" and self.model.has_adapter and not self.is_fsdp_enabled:
            speed_up(self.model.encoder)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The focal loss over the labels of the whole accumulated batch; in evaluation, over those of this batch."""
        inputs = dict(inputs)
        labels, rows, sentences = inputs.pop("labels"), inputs.pop("row", None), inputs.pop("sentences", None)
        items = num_items_in_batch if model.training else None
        if self.loss_function is None:
            outputs = model(**inputs, labels=labels, num_items_in_batch=items)
            loss = outputs["loss"]
        elif self.consistency and model.training:
            padding, seed, step = self.processing_class.pad_token_id, self.args.seed, self.state.global_step
            inputs, first, second = halves(inputs, sentences, rows.tolist(), padding, seed, step)
            outputs = model(**inputs)
            one, other = outputs["node_log_probs"][first], outputs["node_log_probs"][second]
            leaves = outputs["logits"].shape[1]
            loss = (self.loss_function(one, labels, items) + self.loss_function(other, labels, items)) / 2
            loss = loss + self.consistency * disagreement(one[:, :leaves], other[:, :leaves], labels, items)
        else:
            outputs = model(**inputs)
            loss = self.loss_function(outputs["node_log_probs"], labels, items)
        if model.training:
            self.unchecked.append((self.state.global_step + 1, loss.detach(), rows))
            if len(self.unchecked) == MOST_UNCHECKED:
                self.check_losses()
        if items is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def check_losses(self) -> None:
        """Read the training losses since the last call from the device, which makes this process wait for it.

        Raises:
            InputError: one of them is not finite. It names the step and the rows.
        """
        steps, self.unchecked = self.unchecked, []
        losses = torch.stack([loss for _, loss, _ in steps]).tolist() if steps else []
        for (step, _, rows), loss in zip(steps, losses, strict=True):
            if not math.isfinite(loss):
                where = "" if rows is None else f", rows {', '.join(map(str, rows.tolist()))} of the training data"
                raise InputError(
                    f"the loss is {loss} at step {step}{where}: lower --learning_rate, or look at these texts; "
                    "--resume_from_checkpoint auto goes on from the last checkpoint"
                )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, after a check of the losses where it waits for the device anyway, and at the end."""
        control = self.control
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self.check_losses()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As the Trainer's, but a run that had reached ``max_steps`` or stopped early stays as it was.

        The Trainer would take a step more, or go on to the next evaluation.
        """
        if isinstance(resume_from_checkpoint, str):
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            self.best_checkpoint = self._find_best_checkpoint(state, resume_from_checkpoint)
            state.best_model_checkpoint = self.best_checkpoint
            if 0 < self.args.max_steps <= state.global_step or self._had_stopped_early(state):
                logger.info("nothing left to train: %s is at step %d", resume_from_checkpoint, state.global_step)
                self.state = state
                self._load_from_checkpoint(resume_from_checkpoint)
                if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
                    self._load_best_model()
                return TrainOutput(state.global_step, float("nan"), {"epoch": state.epoch})
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _early_stopping(self) -> EarlyStoppingCallback | None:
        found = (one for one in self.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback))
        return next(found, None)

    def _had_stopped_early(self, state: TrainerState) -> bool:
        """Whether a saved run had been without improvement for as long as this one has patience."""
        stopping, saved = self._early_stopping(), state.stateful_callbacks.get(EarlyStoppingCallback.__name__)
        if stopping is None or saved is None or not self.args.restore_callback_states_from_checkpoint:
            return False
        return saved["attributes"]["early_stopping_patience_counter"] >= stopping.early_stopping_patience

    def _find_best_checkpoint(self, state: TrainerState, checkpoint: str) -> str | None:
        """The best checkpoint of a resumed run, whose folder may have been moved or copied since its path was written.

        Raises:
            InputError: it is not there, and the run would end with another.
        """
        best = state.best_model_checkpoint
        if best is None:
            return None
        beside = Path(checkpoint).parent / Path(best).name
        found = next((str(folder) for folder in (beside, Path(best)) if folder.is_dir()), None)
        if found is None and self.args.load_best_model_at_end:
            raise InputError(
                f"cannot resume from {checkpoint}: the best checkpoint of its run, {Path(best).name}, is not beside it; "
                "--load_best_model_at_end false ends with the last"
            )
        return found

    def _load_callback_state(self) -> None:
        """As the Trainer's, but with the patience of this run, and for checkpoints that lack the state of a callback."""
        # the Trainer forgets it where its folder was moved
        self.state.best_model_checkpoint = self.best_checkpoint
        given = self._early_stopping()
        super()._load_callback_state()
        for one in (*self.callback_handler.callbacks, self.control):
            if isinstance(one, EarlyStoppingCallback) and given is not None:
                one.early_stopping_patience = given.early_stopping_patience
            if isinstance(one, ExportableState):  # the Trainer fails to save where there was none
                self.state.stateful_callbacks.setdefault(type(one).__name__, one.state())

    def _inner_training_loop(self, batch_size: int | None = None, args: Any = None, **kwargs: Any) -> TrainOutput:
        """As the Trainer's; what ``auto_find_batch_size`` takes off a batch, accumulation makes up for, exactly."""
        self.unchecked = []
        if not args.auto_find_batch_size:
            return super()._inner_training_loop(batch_size, args, **kwargs)
        effective = args.per_device_train_batch_size * args.gradient_accumulation_steps
        limit = (batch_size or effective) if self.tried_batch_size is None else self.tried_batch_size - 1
        size = max((n for n in range(1, limit + 1) if effective % n == 0), default=None)
        if size is None:
            raise InputError("not even one text fits in memory: lower --max_length, or --gradient_checkpointing true")
        if self.tried_batch_size is not None:
            logger.info("out of memory: %d texts a step now, accumulated over %d steps", size, effective // size)
        self.tried_batch_size = args.per_device_train_batch_size = size
        args.gradient_accumulation_steps = effective // size
        try:
            return super()._inner_training_loop(size, args, **kwargs)
        except RuntimeError as error:
            if should_reduce_batch_size(error) and self.state.global_step > self._initial_global_step:
                raise InputError(
                    f"out of memory at step {self.state.global_step + 1}, after others had fit: "
                    f"--per_device_train_batch_size {max(size // 2, 1)} --gradient_accumulation_steps "
                    f"{effective // max(size // 2, 1)}; --resume_from_checkpoint auto goes on from the last checkpoint"
                ) from error
            raise

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with groups of their own for the heads where they have a learning rate of their own."""
        fresh = self.optimizer is None
        with refusing("cannot set up the optimizer"):
            optimizer = super().create_optimizer(model)
        if fresh and self.heads_learning_rate is not None:
            heads = {id(p) for p in self.accelerator.unwrap_model(self.model).heads.parameters()}
            for group in list(optimizer.param_groups):
                ours = [p for p in group["params"] if id(p) in heads]
                group["params"] = [p for p in group["params"] if id(p) not in heads]
                if ours:
                    optimizer.add_param_group({**group, "params": ours, "lr": self.heads_learning_rate})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        with refusing(f"cannot set up --lr_scheduler_type {self.args.lr_scheduler_type.value} (--lr_scheduler_kwargs)"):
            return super().create_scheduler(num_training_steps, optimizer)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, trainer_pt_utils.LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler = LengthGroupedSampler(sampler.batch_size * self.args.world_size, sampler.lengths, seed)
        return sampler

    def _remove_unused_columns(self, dataset: Dataset, description: str | None = None) -> Dataset:
        """As the Trainer's, but training rows keep what the loss of halves needs, and their number for its errors."""
        self._set_signature_columns_if_needed()
        columns = self._signature_columns
        kept = ["row", "sentences"] if self.consistency else ["row"]
        self._signature_columns = [*columns, *kept] if description == "Training" else columns
        try:
            return super()._remove_unused_columns(dataset, description)
        finally:
            self._signature_columns = columns

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_losses()  # also where a signal has it saved
        try:
            super()._save_checkpoint(model, trial)
        except Exception:
            folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            if self.args.should_save and damage(folder) is not None:  # of no use, and takes the room that is missing
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _get_eval_sampler(self, eval_dataset: Dataset) -> torch.utils.data.Sampler | None:
        """Rows in their own order: with ``group_by_length`` the Trainer would shuffle these too, and predictions with them."""
        return torch.utils.data.SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with refusing(f"cannot resume from {resume_from_checkpoint}"):
            if not self._load_adapter_form(resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        said = f"cannot resume from {checkpoint}, whose optimizer had other settings"
        settings = set(self.optimizer.param_groups[0])
        asked = [(group.get("initial_lr"), group.get("weight_decay")) for group in self.optimizer.param_groups]
        with refusing(said):
            super()._load_optimizer_and_scheduler(checkpoint)
        if not settings <= set(self.optimizer.param_groups[0]):
            raise InputError(f"{said}: it was another --optim")
        self._take_rates(asked)

    def _take_rates(self, asked: list[tuple[float | None, float | None]]) -> None:
        """Gives the optimizer of a resumed run the learning rates and weight decays of this one, at the schedule's place."""
        bases = getattr(self.lr_scheduler, "base_lrs", [])
        for i, (group, (rate, decay)) in enumerate(zip(self.optimizer.param_groups, asked, strict=True)):
            before = group.get("initial_lr")
            if rate and before and rate != before:
                logger.info("the learning rate goes on at %g of its schedule, not %g", rate, before)
                group["lr"], group["initial_lr"] = group["lr"] * rate / before, rate
                if i < len(bases):
                    bases[i] = rate
            if decay is not None:
                group["weight_decay"] = decay

    def _load_best_model(self) -> None:
        if not self._load_adapter_form(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_adapter_form(self, folder: str) -> bool:
        """Loads the adapter and heads of a checkpoint, where that is its form."""
        model: HierarchicalForSequenceClassification = self.accelerator.unwrap_model(self.model)
        if not model.has_adapter or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        logger.info("loading adapter and heads from %s", folder)
        adapter = load_file(Path(folder) / ADAPTER_SUBFOLDER / ADAPTER_WEIGHTS)
        model.load_heads_and_adapter(load_file(Path(folder) / HEADS_WEIGHTS), adapter)
        return True

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        output_dir = self.args.output_dir if output_dir is None else output_dir
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model.save_pretrained(output_dir, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)


class LengthGroupedSampler(Sampler[int]):
    """Rows in an order whose batches hold texts of like length; it depends on the seed and the epoch alone.

    Rows are shuffled, sorted by length within each 50 batches, and cut into batches, which are shuffled; the one with the
    longest row comes first, so that memory which does not suffice is missed at once. Of a data set of at most 50 batches
    lengths are first blurred by 5 %, or each epoch would have the same batches. transformers' sampler of this name draws
    from the global generator (a resumed run gets another order), goes from long to short over and over, and of a small
    data set sorts only a few batches at a time: with 400 rows an eighth of its tokens are padding, here a twentieth.

    Args:
        batch_size: rows of an optimizer step over all processes.
        lengths: in tokens, of each row.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        self.batch_size, self.lengths, self.seed, self.epoch = batch_size, torch.tensor(lengths), seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        rows = torch.randperm(len(self.lengths), generator=generator)
        blur = 0.05 if len(rows) <= BATCHES_SORTED * self.batch_size else 0.0
        keys = self.lengths[rows] * (1 + blur * (2 * torch.rand(len(rows), generator=generator) - 1))
        batches = []
        for start in range(0, len(rows), BATCHES_SORTED * self.batch_size):
            chunk = slice(start, start + BATCHES_SORTED * self.batch_size)
            batches += rows[chunk][keys[chunk].argsort(descending=True, stable=True)].split(self.batch_size)
        rest = [batches.pop()] if len(batches[-1]) < self.batch_size else []  # stays the last one
        order = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        longest = max(range(len(order)), key=lambda i: int(self.lengths[order[i]].max()), default=0)
        return iter(torch.cat([*order[longest : longest + 1], *order[:longest], *order[longest + 1 :], *rest]).tolist())


def keep_trainable(model: nn.Module) -> None:
    """Keeps 4-bit layers from being repacked for inference when they are evaluated on a CPU.

    Raises:
        ValueError: a layer has been repacked already; its gradients would be wrong.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                raise ValueError(f"{name} was repacked for inference by an earlier evaluation; load the model again")
