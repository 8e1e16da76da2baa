"""Train a hierarchical and possibly quantized model with the Trainer of transformers.

Worth knowing:

1. The loss is divided by the number of labelled texts in the accumulated batch, over all devices. So the gradient does not
   depend on how the batch is split. DDP averages gradients, so the loss is multiplied by the number of processes.
2. The Trainer resumes and restores the best model by root-level file names. The adapter form has its own loader here.
3. No ``training_args.bin`` is written, because it is a pickle and can contain a token.
4. Reading a loss waits for the GPU. Losses are read when the Trainer waits anyway: before it logs, evaluates or saves.
"""

import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import EarlyStoppingCallback, TrainerState, trainer_pt_utils
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_jit_checkpoint import CheckpointManager, JITCheckpointCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from checkpoint_hierarchical import ADAPTER_FILES, load_heads_and_adapter
from decisions_hierarchical import IGNORED_LABEL, average_over_labels, has_labels
from hierarchical_clinicalbert.errors import InputError, as_input_error
from hierarchical_clinicalbert.publishing.trainer import PublishingTrainer
from hierarchical_clinicalbert.training.arguments import METRIC_SCHEDULERS
from hierarchical_clinicalbert.training.cpu import use_training_kernels
from hierarchical_clinicalbert.training.resume import START_ANEW
from hierarchical_clinicalbert.training.sampler import LengthGroupedSampler
from hierarchical_clinicalbert.training.views import halves

logger = logging.getLogger(__name__)

EMBEDDED_AT_ONCE = 8  # texts
MAX_UNCHECKED = 100  # losses of micro-batches that stay on the device before they are read
RESUME_HINT = "--resume_from_checkpoint auto continues from the last checkpoint"


class HierarchicalTrainer(PublishingTrainer):
    """A Trainer whose loss is a `training.losses.FocalLoss`.

    Without ``loss_function``, it is the model's own. ``consistency`` weights the divergence of a text's halves,
    see `training.views`; 0 trains on whole texts.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, loss_function: nn.Module | None = None, consistency: float = 0.0, **kwargs: Any):
        with as_input_error("cannot set up training"), warnings.catch_warnings():
            # the loss smooths labels itself, and the Trainer warns that it cannot for multi-label models
            warnings.filterwarnings("ignore", "Label smoothing is not compatible")
            super().__init__(*args, **kwargs)
        encoder = self.model.encoder
        if self.args.activation_checkpointing and not encoder.supports_gradient_checkpointing:
            raise InputError(
                f"--activation_checkpointing: {type(encoder).__name__} of transformers does not support it"
            )
        # transformers' DeBERTa masks the half-precision scores of autocast with the least float32, which torch refuses
        if encoder.config.model_type == "deberta" and (self.args.bf16 or self.args.fp16):
            raise InputError("DeBERTa (version 1) of transformers fails in bf16 and fp16: give --bf16 false")
        if self.args.n_gpu > 1:
            logger.warning("using one of %d GPUs; `accelerate launch train.py …` uses all of them", self.args.n_gpu)
            self.args._n_gpu = 1
            self._train_batch_size = self.args.train_batch_size
        self.decisions = self.model.heads.decisions
        self.loss_function: Any = loss_function.to(self.args.device) if loss_function else self.decisions.loss
        self.consistency = consistency
        self.patience: int | None = None
        self.sigterm: CheckpointManager | None = None
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                self.patience = callback.early_stopping_patience
            if isinstance(callback, JITCheckpointCallback):
                self.sigterm = callback.jit_manager
                for event in ("step_begin", "pre_optimizer_step", "step_end", "epoch_end"):  # see `_stop_if_terminated`
                    setattr(callback, f"on_{event}", lambda *args, **kwargs: None)
        self.tried_batch_size: int | None = None
        self.best_checkpoint: str | None = None
        self.had_stopped = False  # whether early stopping ended the run to resume
        self.unchecked: list[tuple[int, Tensor, Any]] = []  # step, loss, rows
        for module in self.model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes would repack 4-bit weights in eval mode
                module.support_avx512bf16_for_cpu = False
        if self.args.device.type == "cpu" and self.model.has_adapter and not self.is_fsdp_enabled:
            use_training_kernels(self.model.encoder, torch.bfloat16 if self.args.bf16 else torch.float32)

    @property
    def best_epoch(self) -> float:
        """The epoch, possibly a fraction, at which the kept weights were saved."""
        step = self.state.best_global_step if self.args.load_best_model_at_end else None
        return next((entry["epoch"] for entry in self.state.log_history if entry["step"] == step), self.state.epoch)

    # ── Loss ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        """Compute the loss per labelled text of the accumulated batch, or in evaluation of this batch."""
        inputs = dict(inputs)
        labels, rows, sentences = inputs.pop("labels"), inputs.pop("row", None), inputs.pop("sentences", None)
        items = num_items_in_batch if model.training else None
        if self.consistency and model.training:
            if rows is None or sentences is None or self.processing_class is None:
                needs = "a processing_class, and the columns of training.tokens.tokenize with its build_collator"
                raise InputError(f"consistency needs {needs}")
            padding, seed, step = self.processing_class.pad_token_id, self.args.seed, self.state.global_step
            inputs, *pair = halves(inputs, sentences, rows.tolist(), padding, seed, step)
            outputs = model(**inputs)
            first, second = (outputs["decision_logits"][half] for half in pair)
            losses = [self.loss_function(half, labels, num_items_in_batch=items) for half in (first, second)]
            divergence = average_over_labels(self.decisions.divergence(first, second), labels, items)
            loss = sum(losses) / 2 + self.consistency * divergence
        else:
            outputs = model(**inputs)
            loss = self.loss_function(outputs["decision_logits"], labels, num_items_in_batch=items)
        if model.training:
            self.unchecked.append((self.state.global_step + 1, loss.detach(), rows))
            if len(self.unchecked) == MAX_UNCHECKED:
                self.check_losses()
        if items is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Count the texts with a known label, not the elements of label arrays."""
        one_each = [{"labels": torch.where(has_labels(batch["labels"]), 0, IGNORED_LABEL)} for batch in batch_samples]
        return super()._get_num_items_in_batch(one_each, device)

    def check_losses(self) -> None:
        """Read the training losses since the last call. Raise InputError if one is not finite."""
        unchecked, self.unchecked = self.unchecked, []
        losses = torch.stack([loss for _, loss, _ in unchecked]).tolist() if unchecked else []
        for (step, _, rows), loss in zip(unchecked, losses, strict=True):
            if not math.isfinite(loss):
                where = "" if rows is None else f", rows {', '.join(map(str, rows.tolist()))} of the training data"
                raise InputError(f"the loss is {loss} at step {step}{where}: lower --learning_rate; {RESUME_HINT}")

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Check the losses whenever the Trainer waits for the device anyway."""
        if self.control.should_log or self.control.should_evaluate or self.control.should_training_stop:
            self.check_losses()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if not self.control.should_training_stop and self.state.epoch % 1 != 0:  # else another evaluation may follow
            self._stop_if_terminated()

    def embed(self, inputs: Sequence[list[int]]) -> Tensor:
        """Embed texts given as token ids: pooled vectors, (len(inputs), hidden_size)."""
        pooled, order = [], sorted(range(len(inputs)), key=lambda row: len(inputs[row]))  # by length: less padding
        for start in range(0, len(inputs), EMBEDDED_AT_ONCE):
            rows = order[start : start + EMBEDDED_AT_ONCE]
            batch = self.data_collator([{"input_ids": inputs[row]} for row in rows]).to(self.model.device)
            with self.accelerator.autocast():
                hidden = self.model.encoder(**batch).last_hidden_state
            pooled.append(self.model.pool(hidden, batch["attention_mask"]).to(self.model.heads.weight.device))
        return torch.cat(pooled)[torch.tensor(order).argsort()]

    # ── Stop at SIGTERM ──────────────────────────────────────────────────────────────────────────────────────────────

    def _stop_if_terminated(self) -> None:
        """After SIGTERM (``--enable_jit_checkpoint``), save a checkpoint and raise InputError.

        The callback of transformers saves before the evaluation of a step or epoch. It also causes an evaluation in mid-epoch,
        which an uninterrupted run does not have. Here the checkpoint is saved after any evaluation, so the resumed run ends with
        the same weights.
        """
        if self.sigterm is None:
            return
        # the signal may reach processes at different steps, and all must save at the same one
        requested = torch.tensor(int(self.sigterm.is_checkpoint_requested), device=self.args.device)
        if self.accelerator.reduce(requested).item():
            self._save_checkpoint(self.model, trial=None)
            steps = f"{self.state.global_step} of {self.state.max_steps} steps"
            raise InputError(f"stopped by SIGTERM after {steps}, and saved: {RESUME_HINT}")

    # ── Resume ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train or resume. A run that has reached ``max_steps`` or stopped early takes no further step."""
        if not isinstance(resume_from_checkpoint, str):
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
        self.best_checkpoint = self._find_best_checkpoint(state, resume_from_checkpoint)
        self.args.eval_on_start = False  # early stopping would count this evaluation
        stopping = state.stateful_callbacks.get(EarlyStoppingCallback.__name__)
        if stopping and self.patience is not None and self.args.restore_callback_states_from_checkpoint:
            self.had_stopped = stopping["attributes"]["early_stopping_patience_counter"] >= self.patience
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        metrics, step = output.metrics, state.global_step
        if output.global_step == step:
            logger.info("nothing left to train: %s is at step %d", resume_from_checkpoint, step)
            metrics = {"epoch": state.epoch}  # without steps, there is no loss or speed
        return output._replace(metrics=metrics | {"resumed_from_step": step})

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, *args: Any, **kwargs: Any
    ) -> tuple[int, int]:
        """Restore the state of a resumed run, but with this run's numbers of steps between evaluations, saves and logs.

        Raises InputError if an epoch has another number of steps now: the Trainer would train more or fewer epochs.
        """
        trained = super()._init_training_state(max_steps, num_update_steps_per_epoch, *args, **kwargs)
        step, epoch = self.state.global_step, self.state.epoch
        if step and epoch and abs(epoch * num_update_steps_per_epoch - step) >= 1:  # less is rounding of batches
            raise InputError(
                f"the run to resume had {step / epoch:.0f} steps per epoch, and now there are {num_update_steps_per_epoch}: "
                "give the same number of processes, --per_device_train_batch_size and --gradient_accumulation_steps"
            )
        self.state.compute_steps(self.args, max_steps)
        return trained

    def _run_epoch(self, *, epoch: int, train_dataloader: Any, **kwargs: Any) -> None:
        """Train for an epoch, or its remainder. Do nothing if a resumed run had taken all steps or had stopped early."""
        if self.had_stopped or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        # with several processes, the Trainer does not reach the sampler below the batches that a resumed run skips
        level = train_dataloader
        while level is not None:
            if hasattr(level, "set_epoch"):
                level.set_epoch(epoch)
            level = getattr(level, "batch_sampler", None)
        super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **kwargs)
        self._stop_if_terminated()

    def _find_best_checkpoint(self, state: TrainerState, checkpoint: str) -> str | None:
        """Return the best checkpoint of a resumed run. Its folder may have moved since its path was stored."""
        if state.best_model_checkpoint is None:
            return None
        if self.args.load_best_model_at_end:
            name = self.args.metric_for_best_model
            entries = [entry for entry in state.log_history if entry["step"] == state.best_global_step]
            if state.best_metric not in [entry.get(f"eval_{name.removeprefix('eval_')}") for entry in entries]:
                problem = f"its best checkpoint was not selected by --metric_for_best_model {name}; give the same"
                raise InputError(f"cannot resume from {checkpoint}: {problem}, {START_ANEW}")
        stored = Path(state.best_model_checkpoint)
        best = next((str(path) for path in (Path(checkpoint).parent / stored.name, stored) if path.is_dir()), None)
        if best is None and self.args.load_best_model_at_end:
            problem = f"the best checkpoint of its run, {stored.name}, is not in the same folder"
            remedy = "move it there, or give --load_best_model_at_end false"
            raise InputError(f"cannot resume from {checkpoint}: {problem}; {remedy}")
        return best

    def _load_callback_state(self) -> None:
        """Restore the callbacks' states, but keep this run's patience. The checkpoint may lack some states."""
        self.state.best_model_checkpoint = self.best_checkpoint  # the Trainer drops the path of a moved folder
        super()._load_callback_state()
        for stateful in (*self.callback_handler.callbacks, self.control):
            if isinstance(stateful, EarlyStoppingCallback):
                stateful.early_stopping_patience = self.patience
            if isinstance(stateful, ExportableState):  # without a state, the Trainer fails to save
                self.state.stateful_callbacks.setdefault(type(stateful).__name__, stateful.state())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with as_input_error(f"cannot resume from {resume_from_checkpoint}"):
            if not self._load_adapter_form(resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the stored states, but keep the peak learning rates and weight decays of this run."""
        problem = f"cannot resume from {checkpoint}: its optimizer does not match the settings of this run"
        wanted = [dict(group) for group in self.optimizer.param_groups]
        with as_input_error(problem):
            super()._load_optimizer_and_scheduler(checkpoint)
        groups = self.optimizer.param_groups
        if wanted[0].keys() | {"initial_lr"} != groups[0].keys() | {"initial_lr"}:
            raise InputError(f"{problem}: --optim differs")
        for group, ours in zip(groups, wanted, strict=True):
            before, rate = group.get("initial_lr"), ours.get("initial_lr")
            if rate and before and rate != before:
                logger.info("the peak learning rate changes to %g from %g", rate, before)
                group["lr"] = group["lr"] * rate / before
            group |= {name: ours[name] for name in ("initial_lr", "weight_decay") if name in ours}
        if hasattr(self.lr_scheduler, "base_lrs"):
            self.lr_scheduler.base_lrs = [group["initial_lr"] for group in groups]

    def _load_best_model(self) -> None:
        if not self._load_adapter_form(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_adapter_form(self, folder: str) -> bool:
        """Load the adapter and heads of a checkpoint. Return False if the Trainer has to load it."""
        model = self.accelerator.unwrap_model(self.model)
        if not model.has_adapter or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        logger.info("loading adapter and heads from %s", folder)
        heads, _, adapter = (Path(folder) / name for name in ADAPTER_FILES)
        load_heads_and_adapter(model, load_file(heads), load_file(adapter))
        return True

    # ── Memory ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _inner_training_loop(self, batch_size: int, args: Any, **kwargs: Any) -> TrainOutput:
        """Train, and keep the effective batch size when ``auto_find_batch_size`` lowers the batch size of a step."""
        self.unchecked = []
        if not args.auto_find_batch_size:
            return super()._inner_training_loop(batch_size, args, **kwargs)
        effective = args.per_device_train_batch_size * args.gradient_accumulation_steps
        limit = batch_size if self.tried_batch_size is None else self.tried_batch_size - 1
        size = max(n for n in range(1, limit + 1) if effective % n == 0)
        if self.tried_batch_size is not None:
            logger.info("out of memory: continuing with %d texts a step, over %d steps", size, effective // size)
        self.tried_batch_size = args.per_device_train_batch_size = size
        args.gradient_accumulation_steps = effective // size
        try:
            return super()._inner_training_loop(size, args, **kwargs)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if size == 1:
                problem = "a batch of one text does not fit in memory"
                raise InputError(f"{problem}: lower --max_length, or --activation_checkpointing true") from error
            if self.state.global_step == self._initial_global_step:
                raise
            smaller = size // 2
            problem = f"out of memory at step {self.state.global_step + 1}, after earlier steps had fit"
            fit = f"--per_device_train_batch_size {smaller} --gradient_accumulation_steps {effective // smaller}"
            raise InputError(f"{problem}: {fit}; {RESUME_HINT}") from error

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate. If memory runs out, raise InputError with the flag to lower."""
        try:
            return super().evaluation_loop(*args, **kwargs)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            problem = "out of memory in evaluation: lower --per_device_eval_batch_size"
            raise InputError(f"{problem}, now {self.args.per_device_eval_batch_size}; {RESUME_HINT}") from error

    # ── Optimizer, samplers and files ────────────────────────────────────────────────────────────────────────────────

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer, with separate parameter groups for the heads if they have their own learning rate."""
        is_new = self.optimizer is None
        with as_input_error("cannot set up the optimizer"):
            optimizer = super().create_optimizer(model)
        rate = getattr(self.args, "heads_learning_rate", None)  # which TrainingArguments of transformers lack
        if is_new and rate is not None:
            heads = {id(p) for p in self.accelerator.unwrap_model(self.model).heads.parameters()}
            for group in list(optimizer.param_groups):
                in_heads = [p for p in group["params"] if id(p) in heads]
                group["params"] = [p for p in group["params"] if id(p) not in heads]
                if in_heads:
                    optimizer.add_param_group({**group, "params": in_heads, "lr": rate})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        kind, given = self.args.lr_scheduler_type, self.args.lr_scheduler_kwargs or {}
        if kind in METRIC_SCHEDULERS:  # torch takes a lower metric for the better one
            self.args.lr_scheduler_kwargs = {"mode": "max" if self.args.greater_is_better else "min"} | given
        with as_input_error(f"cannot set up --lr_scheduler_type {kind.value} (--lr_scheduler_kwargs)"):
            return super().create_scheduler(num_training_steps, optimizer)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, trainer_pt_utils.LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler = LengthGroupedSampler(sampler.batch_size * self.args.world_size, sampler.lengths, seed)
        return sampler

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler:
        """Keep evaluation rows in order. With ``group_by_length`` the Trainer would shuffle them."""
        return SequentialSampler(eval_dataset)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the column ``row`` for error messages, ``weights`` of labels, and ``sentences`` for training on halves."""
        is_new = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if is_new:
            self._signature_columns += ["row", "weights", *(["sentences"] if self.consistency else [])]

    def _save(self, output_dir: str, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            model.save_pretrained(output_dir, state_dict=state_dict)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_losses()
        super()._save_checkpoint(model, trial)
