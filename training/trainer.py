"""Train a hierarchical and possibly quantized model with the Trainer of transformers.

Worth knowing:

1. The loss is divided by the number of labels in the whole accumulated batch, over all devices. DDP averages the
   gradients afterwards, so the loss is multiplied by the number of processes.
2. The Trainer resumes and restores the best model by root-level file names. The adapter form has its own loader here.
3. bitsandbytes repacks 4-bit weights in place when a layer runs in eval mode on a CPU with AVX-512 BF16. Repacked
   weights cannot be trained, so repacking is turned off.
4. If batches are grouped by length, the Trainer shuffles evaluation rows and reorders the rows of a resumed run. The
   samplers here do neither.
5. No ``training_args.bin`` is written, because it is a pickle and can contain a token.
6. Reading a loss waits for the GPU. Losses are read when the Trainer waits anyway: before it logs, evaluates or saves.
"""

import logging
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, TrainerState, trainer_pt_utils
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from checkpoint_hierarchical import ADAPTER_SUBFOLDER, ADAPTER_WEIGHTS, HEADS_WEIGHTS
from errors import InputError, refusing
from modeling_hierarchical import HierarchicalForSequenceClassification
from publishing.trainer import PublishingTrainer
from training.cpu import speed_up
from training.losses import HierarchicalFocalLoss
from training.resume import find_resume_problem
from training.sampler import LengthGroupedSampler
from training.views import disagreement, halves

logger = logging.getLogger(__name__)

MAX_UNCHECKED = 100  # losses of micro-batches that stay on the device before they are read


class HierarchicalTrainer(PublishingTrainer):
    """A Trainer whose loss is a `HierarchicalFocalLoss`.

    Args:
        loss_function: training loss. Default: the model's own negative log-likelihood.
        consistency: weight of the disagreement between a text's halves, see `training.views`. 0 trains on whole texts.
            Other values need a ``loss_function``, and training rows with the columns ``sentences`` and ``row``.
        heads_learning_rate: peak learning rate of the heads. Default: the optimizer's.
        args, kwargs: as for `transformers.Trainer`.
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
            logger.warning("using one of %d GPUs; `accelerate launch train.py …` uses all of them", self.args.n_gpu)
            self.args._n_gpu = 1
            self._train_batch_size = self.args.train_batch_size
        self.loss_function = None if loss_function is None else loss_function.to(self.args.device)
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
        """Compute the loss per label of the accumulated batch, or in evaluation of this batch."""
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
            first, second = outputs["node_log_probs"][first], outputs["node_log_probs"][second]
            leaves = outputs["logits"].shape[1]
            loss = (self.loss_function(first, labels, items) + self.loss_function(second, labels, items)) / 2
            loss = loss + self.consistency * disagreement(first[:, :leaves], second[:, :leaves], labels, items)
        else:
            outputs = model(**inputs)
            loss = self.loss_function(outputs["node_log_probs"], labels, items)
        if model.training:
            self.unchecked.append((self.state.global_step + 1, loss.detach(), rows))
            if len(self.unchecked) == MAX_UNCHECKED:
                self.check_losses()
        if items is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def check_losses(self) -> None:
        """Read the training losses since the last call from the device.

        Raises:
            InputError: a loss is not finite. The message names the step and the rows.
        """
        steps, self.unchecked = self.unchecked, []
        losses = torch.stack([loss for _, loss, _ in steps]).tolist() if steps else []
        for (step, _, rows), loss in zip(steps, losses, strict=True):
            if not math.isfinite(loss):
                where = "" if rows is None else f", rows {', '.join(map(str, rows.tolist()))} of the training data"
                raise InputError(
                    f"the loss is {loss} at step {step}{where}: lower --learning_rate, or look at these texts; "
                    "--resume_from_checkpoint auto continues from the last checkpoint"
                )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Check the losses whenever the Trainer waits for the device anyway."""
        control = self.control
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self.check_losses()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train or resume. A run that has reached ``max_steps`` or stopped early takes no further step.

        The metrics of a resumed run have ``resumed_from_step``.
        """
        if not isinstance(resume_from_checkpoint, str):
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
        self.best_checkpoint = self._find_best_checkpoint(state, resume_from_checkpoint)
        state.best_model_checkpoint = self.best_checkpoint
        step = state.global_step
        if 0 < self.args.max_steps <= step or self._had_stopped_early(state):
            logger.info("nothing left to train: %s is at step %d", resume_from_checkpoint, step)
            self.state = state
            self._load_from_checkpoint(resume_from_checkpoint)
            if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
                self._load_best_model()
            output = TrainOutput(step, float("nan"), {"epoch": state.epoch})
        else:
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        return output._replace(metrics=output.metrics | {"resumed_from_step": step})

    def _early_stopping(self) -> EarlyStoppingCallback | None:
        callbacks = self.callback_handler.callbacks
        return next((callback for callback in callbacks if isinstance(callback, EarlyStoppingCallback)), None)

    def _had_stopped_early(self, state: TrainerState) -> bool:
        """Return whether a saved run has exhausted the early-stopping patience of this run."""
        stopping, saved = self._early_stopping(), state.stateful_callbacks.get(EarlyStoppingCallback.__name__)
        if stopping is None or saved is None or not self.args.restore_callback_states_from_checkpoint:
            return False
        return saved["attributes"]["early_stopping_patience_counter"] >= stopping.early_stopping_patience

    def _find_best_checkpoint(self, state: TrainerState, checkpoint: str) -> str | None:
        """Return the best checkpoint of a resumed run. Its folder may have moved since its path was stored.

        Raises:
            InputError: the folder is missing, and ``load_best_model_at_end`` needs it.
        """
        best = state.best_model_checkpoint
        if best is None:
            return None
        candidates = (Path(checkpoint).parent / Path(best).name, Path(best))
        folder = next((str(path) for path in candidates if path.is_dir()), None)
        if folder is None and self.args.load_best_model_at_end:
            raise InputError(
                f"cannot resume from {checkpoint}: the best checkpoint of its run, {Path(best).name}, is not in "
                "the same folder; --load_best_model_at_end false keeps the last weights instead"
            )
        return folder

    def _load_callback_state(self) -> None:
        """Restore the callbacks' states, but keep this run's patience. The checkpoint may lack some states."""
        self.state.best_model_checkpoint = self.best_checkpoint  # the Trainer drops the path of a moved folder
        stopping = self._early_stopping()
        super()._load_callback_state()
        for stateful in (*self.callback_handler.callbacks, self.control):
            if isinstance(stateful, EarlyStoppingCallback) and stopping is not None:
                stateful.early_stopping_patience = stopping.early_stopping_patience
            if isinstance(stateful, ExportableState):  # without a state, the Trainer fails to save
                self.state.stateful_callbacks.setdefault(type(stateful).__name__, stateful.state())

    def _inner_training_loop(self, batch_size: int | None = None, args: Any = None, **kwargs: Any) -> TrainOutput:
        """Train, and keep the effective batch size when ``auto_find_batch_size`` lowers the batch size of a step.

        Raises:
            InputError: a single text does not fit in memory, or a later step runs out of memory.
        """
        self.unchecked = []
        if not args.auto_find_batch_size:
            return super()._inner_training_loop(batch_size, args, **kwargs)
        effective = args.per_device_train_batch_size * args.gradient_accumulation_steps
        limit = (batch_size or effective) if self.tried_batch_size is None else self.tried_batch_size - 1
        size = max((n for n in range(1, limit + 1) if effective % n == 0), default=None)
        if size is None:
            raise InputError(
                "a batch of one text does not fit in memory: lower --max_length, or --gradient_checkpointing true"
            )
        if self.tried_batch_size is not None:
            logger.info(
                "out of memory: continuing with %d texts a step, accumulated over %d steps", size, effective // size
            )
        self.tried_batch_size = args.per_device_train_batch_size = size
        args.gradient_accumulation_steps = effective // size
        try:
            return super()._inner_training_loop(size, args, **kwargs)
        except RuntimeError as error:
            if should_reduce_batch_size(error) and self.state.global_step > self._initial_global_step:
                raise InputError(
                    f"out of memory at step {self.state.global_step + 1}, after earlier steps had fit: "
                    f"--per_device_train_batch_size {max(size // 2, 1)} --gradient_accumulation_steps "
                    f"{effective // max(size // 2, 1)}; --resume_from_checkpoint auto continues from the last checkpoint"
                ) from error
            raise

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer, with separate parameter groups for the heads if they have their own learning rate."""
        is_new = self.optimizer is None
        with refusing("cannot set up the optimizer"):
            optimizer = super().create_optimizer(model)
        if is_new and self.heads_learning_rate is not None:
            heads = {id(p) for p in self.accelerator.unwrap_model(self.model).heads.parameters()}
            for group in list(optimizer.param_groups):
                in_heads = [p for p in group["params"] if id(p) in heads]
                group["params"] = [p for p in group["params"] if id(p) not in heads]
                if in_heads:
                    optimizer.add_param_group({**group, "params": in_heads, "lr": self.heads_learning_rate})
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
        """Remove unused columns, but keep ``row`` for error messages, and ``sentences`` for training on halves."""
        self._set_signature_columns_if_needed()
        columns = self._signature_columns
        kept = ["row", "sentences"] if self.consistency else ["row"]
        self._signature_columns = [*columns, *kept] if description == "Training" else columns
        try:
            return super()._remove_unused_columns(dataset, description)
        finally:
            self._signature_columns = columns

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_losses()  # a signal can trigger a save too
        try:
            super()._save_checkpoint(model, trial)
        except Exception:
            folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            # an incomplete checkpoint only takes up disk space
            if self.args.should_save and find_resume_problem(folder) is not None:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _get_eval_sampler(self, eval_dataset: Dataset) -> torch.utils.data.Sampler | None:
        """Keep evaluation rows in order. With ``group_by_length`` the Trainer would shuffle them."""
        return torch.utils.data.SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with refusing(f"cannot resume from {resume_from_checkpoint}"):
            if not self._load_adapter_form(resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        problem = f"cannot resume from {checkpoint}: its optimizer does not match the settings of this run"
        settings = set(self.optimizer.param_groups[0])
        rates = [(group.get("initial_lr"), group.get("weight_decay")) for group in self.optimizer.param_groups]
        with refusing(problem):
            super()._load_optimizer_and_scheduler(checkpoint)
        if not settings <= set(self.optimizer.param_groups[0]):
            raise InputError(f"{problem}: --optim differs")
        self._set_rates(rates)

    def _set_rates(self, rates: list[tuple[float | None, float | None]]) -> None:
        """Set a resumed optimizer's weight decays and peak learning rates, and rescale its current learning rates.

        Args:
            rates: peak learning rate and weight decay of each parameter group.
        """
        bases = getattr(self.lr_scheduler, "base_lrs", [])
        for i, (group, (rate, decay)) in enumerate(zip(self.optimizer.param_groups, rates, strict=True)):
            before = group.get("initial_lr")
            if rate and before and rate != before:
                logger.info("the peak learning rate changes to %g from %g", rate, before)
                group["lr"], group["initial_lr"] = group["lr"] * rate / before, rate
                if i < len(bases):
                    bases[i] = rate
            if decay is not None:
                group["weight_decay"] = decay

    def _load_best_model(self) -> None:
        if not self._load_adapter_form(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_adapter_form(self, folder: str) -> bool:
        """Load the adapter and heads of a checkpoint. Return False if the Trainer has to load it."""
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


def keep_trainable(model: nn.Module) -> None:
    """Turn off the repacking of 4-bit layers for inference on a CPU."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
