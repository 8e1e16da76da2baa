"""Take the steps: the Trainer of transformers, with this project's loss, files and restarts.

Worth knowing:

1. The loss is divided by the number of texts in the accumulated batch, over all devices. So the
   gradient does not depend on how the batch is split. DDP averages gradients, so the loss is
   multiplied by the number of processes.
2. The Trainer resumes and restores the best model by root-level file names. The adapter form has
   its own loader here.
3. No ``training_args.bin`` is written, because it is a pickle and can contain a token.
4. Checks of the losses and the state of a resumed run are callbacks, see `training.callbacks`.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    trainer_pt_utils,
)
from transformers.trainer_utils import TrainOutput

from checkpoint_hierarchical import ADAPTER_FILES, load_heads_and_adapter
from decisions_hierarchical import sum_per_item
from hierarchical_clinicalbert.errors import InputError, as_input_error
from hierarchical_clinicalbert.evaluation.forms import form_of
from hierarchical_clinicalbert.training.arguments import HierarchicalTrainingArguments
from hierarchical_clinicalbert.training.callbacks import (
    LogLines,
    ProgressBar,
    ResumedRun,
    refuse_infinite,
)
from hierarchical_clinicalbert.training.cpu import use_training_kernels
from hierarchical_clinicalbert.training.losses import FocalLoss
from hierarchical_clinicalbert.training.sampler import LengthGroupedSampler
from hierarchical_clinicalbert.training.tokens import Collator
from hierarchical_clinicalbert.training.views import halves

logger = logging.getLogger(__name__)

EMBEDDED_AT_ONCE = 8  # texts


class TrainingLoop(Trainer):
    """A Trainer with the loss, the collator and the metrics of a hierarchical model.

    Rows have the columns of `training.tokens.tokenize_splits`.

    Args:
        loss_function: by default the `FocalLoss` that the arguments describe, with the class
            frequencies of the training rows.
        callbacks: of transformers. Early stopping is added, if the arguments ask for it.
        kwargs: further arguments of the Trainer of transformers.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel,
        args: HierarchicalTrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        loss_function: nn.Module | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs: Any,
    ):
        if args.fp16 and args.device.type == "cpu":  # accelerate would train in float32
            raise InputError("--fp16 needs a GPU: leave it out")
        # evaluation's decisions, which stay on the CPU; the loss and the heads have their own
        form = form_of(model.config.tree, model.config.problem_type)
        targets = form.decisions.targets
        if loss_function is None:
            # without rows, no step needs the loss
            nodes = train_dataset["labels"][:] if train_dataset is not None else []
            loss_function = FocalLoss.from_arguments(args, form.decisions, targets(nodes))
        stopping = []
        if args.load_best_model_at_end and args.early_stopping_patience:
            stopping.append(EarlyStoppingCallback(args.early_stopping_patience))
        defaults: dict[str, Any] = {"compute_metrics": form.compute_metrics}
        if processing_class is not None:
            defaults["data_collator"] = Collator(processing_class, targets)
        with as_input_error("cannot set up training"), warnings.catch_warnings():
            # the loss smooths labels itself, and the Trainer warns that it cannot for multi-label
            # models
            warnings.filterwarnings("ignore", "Label smoothing is not compatible")
            super().__init__(
                model,
                args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=[*callbacks, *stopping],
                **defaults | kwargs,
            )
        encoder = self.model.encoder
        if self.args.activation_checkpointing and not encoder.supports_gradient_checkpointing:
            raise InputError(
                f"--activation_checkpointing: {type(encoder).__name__} of transformers does "
                "not support it"
            )
        # transformers' DeBERTa masks the half-precision scores of autocast with the least float32,
        # which torch refuses
        if encoder.config.model_type == "deberta" and (self.args.bf16 or self.args.fp16):
            raise InputError(
                "DeBERTa (version 1) of transformers fails in bf16 and fp16: give --bf16 false"
            )
        if self.args.n_gpu > 1:
            logger.warning(
                "using one of %d GPUs; `accelerate launch train.py …` uses all of them",
                self.args.n_gpu,
            )
            self.args._n_gpu = 1
            self._train_batch_size = self.args.train_batch_size
        self.decisions = self.model.heads.decisions
        self.loss_function: Any = loss_function.to(self.args.device)
        self.consistency = args.consistency
        self.resumed: ResumedRun | None = None  # in a run that resumes
        self.pop_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ProgressBar)
        self.add_callback(LogLines)
        for module in self.model.modules():
            # bitsandbytes would repack 4-bit weights in eval mode
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        self.model.encodes_at_once = self.is_fsdp_enabled
        if self.args.device.type == "cpu" and self.model.has_adapter and not self.is_fsdp_enabled:
            use_training_kernels(
                self.model.encoder, torch.bfloat16 if self.args.bf16 else torch.float32
            )

    @property
    def best_epoch(self) -> float:
        """The epoch, possibly a fraction, at which the kept weights were saved."""
        step = self.state.best_global_step if self.args.load_best_model_at_end else None
        return next(
            (entry["epoch"] for entry in self.state.log_history if entry["step"] == step),
            self.state.epoch,
        )

    # ── Loss ──────────────────────────────────────────────────────────────────────────────────────

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Compute the loss per text of the accumulated batch, or in evaluation of this batch."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        rows = inputs.pop("row", None)
        sentences = inputs.pop("sentences", None)
        taught = {"teacher_scores": inputs.pop("teacher")} if "teacher" in inputs else {}
        items = None
        # the Trainer counts the elements of labels
        if model.training and num_items_in_batch is not None:
            items = num_items_in_batch / labels.shape[1:].numel()
        if self.consistency and model.training:
            padding = self.processing_class.pad_token_id
            seed = self.args.seed
            step = self.state.global_step
            inputs, *pair = halves(inputs, sentences, rows.tolist(), padding, seed, step)
            outputs = model(**inputs)
            first, second = (outputs["decision_logits"][half] for half in pair)
            losses = [
                self.loss_function(half, labels, num_items_in_batch=items, **taught)
                for half in (first, second)
            ]
            divergence = sum_per_item(self.decisions.divergence(first, second), items)
            loss = sum(losses) / 2 + self.consistency * divergence
        else:
            # in evaluation, vectors are gathered where they are not ignored
            outputs = model(**inputs, output_vectors=not model.training)
            loss = self.loss_function(
                outputs["decision_logits"], labels, num_items_in_batch=items, **taught
            )
        if items is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def embed(self, inputs: Sequence[list[int]]) -> Tensor:
        """Embed texts given as token ids by the model in training: vectors (len(inputs), H)."""
        with self.accelerator.autocast():
            return self.embed_with(self.model, inputs, self.model.pool)

    def embed_with(
        self, model: PreTrainedModel, inputs: Sequence[list[int]], pool: Callable[[Any], Tensor]
    ) -> Tensor:
        """Embed texts given as token ids by a model, and pool them: vectors (len(inputs), H)."""
        # by length: less padding
        pooled = []
        order = sorted(range(len(inputs)), key=lambda row: len(inputs[row]))
        for start in range(0, len(inputs), EMBEDDED_AT_ONCE):
            rows = order[start : start + EMBEDDED_AT_ONCE]
            batch = self.data_collator([{"input_ids": inputs[row]} for row in rows])
            tokens, _ = model.encode(**batch.to(model.device))
            pooled.append(pool(tokens).to(model.heads.weight.device))
        return torch.cat(pooled)[torch.tensor(order).argsort()]

    # ── Resume ────────────────────────────────────────────────────────────────────────────────────

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train or resume. A run that has reached ``max_steps`` or stopped early takes no further
        step.

        With ``num_train_epochs`` 0, no step is taken.
        """
        if not self.args.num_train_epochs:
            self.state.epoch = 0.0
            return TrainOutput(0, 0.0, {"epoch": 0.0})
        if isinstance(resume_from_checkpoint, str):
            self.resumed = ResumedRun(self, resume_from_checkpoint)
            self.add_callback(self.resumed)
            self.args.eval_on_start = False  # early stopping would count this evaluation
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.resumed is None:
            return output
        metrics = output.metrics
        before = self.resumed.state
        if output.global_step == before.global_step:
            logger.info(
                "nothing left to train: %s is at step %d",
                resume_from_checkpoint,
                before.global_step,
            )
            metrics = {"epoch": before.epoch}  # without steps, there is no loss or speed
        return output._replace(metrics=metrics | {"resumed_from_step": before.global_step})

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> tuple:
        """Return the numbers of epochs, steps and rows.

        There are no epochs for a resumed run that had ended.
        """
        epochs, steps_per_epoch, *others, max_steps = super().set_initial_training_values(
            args, dataloader
        )
        if self.resumed is not None:
            self.resumed.check_steps_per_epoch(steps_per_epoch)
            epochs = 0 if self.resumed.has_ended(max_steps) else epochs
        return epochs, steps_per_epoch, *others, max_steps

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        with as_input_error(f"cannot resume from {resume_from_checkpoint}"):
            if not self._load_adapter_form(resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the stored states, but keep the peak learning rates and weight decays of this
        run.
        """
        problem = (
            f"cannot resume from {checkpoint}: its optimizer does not match the settings of "
            "this run"
        )
        wanted = [dict(group) for group in self.optimizer.param_groups]
        with as_input_error(problem):
            super()._load_optimizer_and_scheduler(checkpoint)
        groups = self.optimizer.param_groups
        if wanted[0].keys() != groups[0].keys():
            raise InputError(f"{problem}: --optim differs")
        for group, ours in zip(groups, wanted, strict=True):
            group["lr"] *= ours["initial_lr"] / group["initial_lr"]
            group |= {name: ours[name] for name in ("initial_lr", "weight_decay")}
        self.lr_scheduler.base_lrs = [group["initial_lr"] for group in groups]

    def _load_best_model(self) -> None:
        if not self._load_adapter_form(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_adapter_form(self, folder: str) -> bool:
        """Load the adapter and heads of a checkpoint.

        Return False if the Trainer has to load it.
        """
        model = self.accelerator.unwrap_model(self.model)
        if not model.has_adapter or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        logger.info("loading adapter and heads from %s", folder)
        heads, _, adapter = (Path(folder) / name for name in ADAPTER_FILES)
        load_heads_and_adapter(model, load_file(heads), load_file(adapter))
        return True

    # ── Optimizer, samplers and files ─────────────────────────────────────────────────────────────

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer, with separate parameter groups for the heads if they have their own
        learning rate.
        """
        is_new = self.optimizer is None
        with as_input_error("cannot set up the optimizer"):
            optimizer = super().create_optimizer(model)
        rate = self.args.heads_learning_rate
        if is_new and rate is not None:
            heads = {id(p) for p in self.accelerator.unwrap_model(self.model).heads.parameters()}
            for group in list(optimizer.param_groups):
                in_heads = [p for p in group["params"] if id(p) in heads]
                group["params"] = [p for p in group["params"] if id(p) not in heads]
                if in_heads:
                    optimizer.add_param_group({**group, "params": in_heads, "lr": rate})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        with as_input_error(
            f"cannot set up --lr_scheduler_type {self.args.lr_scheduler_type.value}"
        ):
            return super().create_scheduler(num_training_steps, optimizer)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, trainer_pt_utils.LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler = LengthGroupedSampler(
                sampler.batch_size * self.args.world_size, sampler.lengths, seed
            )
        return sampler

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler:
        """Keep evaluation rows in order.

        With ``group_by_length`` the Trainer would shuffle them.
        """
        return SequentialSampler(eval_dataset)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # trainer_state.json, which marks a complete checkpoint, is next
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            refuse_infinite(
                float(model.heads.weight.detach().sum()),
                "the sum of the heads' weights",
                self.state.global_step,
            )
            model.save_pretrained(output_dir, state_dict=state_dict)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)
