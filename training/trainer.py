"""The Trainer of transformers, with what a hierarchical, possibly quantized model needs beyond it.

Worth knowing:

1. The loss is already divided by the labels of the whole accumulated batch, over all devices; DDP then averages
   gradients, so it is multiplied by the number of processes.
2. The Trainer resumes, and goes back to the best model, by root-level file names that our adapter form does not have.
3. bitsandbytes repacks 4-bit weights in place when a layer runs in eval mode on a CPU with AVX-512 BF16, and training
   after that is wrong. While a model trains, its layers are told not to.
4. Predictions come in the order of their rows. The Trainer's own would not, where training batches are grouped by length.
5. No ``training_args.bin`` is written: it is a pickle, and can hold a token.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer

from modeling_hierarchical import (
    ADAPTER_SUBFOLDER,
    ADAPTER_WEIGHTS,
    HEADS_WEIGHTS,
    HierarchicalForSequenceClassification,
)
from training.losses import HierarchicalFocalLoss

logger = logging.getLogger(__name__)


class HierarchicalTrainer(Trainer):
    """A Trainer whose loss is a `HierarchicalFocalLoss`.

    Args:
        loss_function: the loss to train with; the model's own negative log-likelihood without one.
        heads_learning_rate: peak learning rate of the heads; the optimizer's own without one.
        args, kwargs: as for `transformers.Trainer`.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        loss_function: HierarchicalFocalLoss | None = None,
        heads_learning_rate: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            logger.warning("%d GPUs found, one is used: `accelerate launch train.py …` uses all", self.args.n_gpu)
            self.args._n_gpu = 1
            self._train_batch_size = self.args.train_batch_size
        self.loss_function = None if loss_function is None else loss_function.to(self.args.device)
        self.heads_learning_rate = heads_learning_rate
        keep_trainable(self.model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The focal loss over the labels of the whole accumulated batch; in evaluation, over those of this batch."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        items = num_items_in_batch if model.training else None
        if self.loss_function is None:
            outputs = model(**inputs, labels=labels, num_items_in_batch=items)
            loss = outputs["loss"]
        else:
            outputs = model(**inputs)
            loss = self.loss_function(outputs["node_log_probs"], labels, items)
        if items is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with groups of their own for the heads where they have a learning rate of their own."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.heads_learning_rate is not None:
            heads = {id(p) for p in self.accelerator.unwrap_model(self.model).heads.parameters()}
            for group in list(optimizer.param_groups):
                ours = [p for p in group["params"] if id(p) in heads]
                group["params"] = [p for p in group["params"] if id(p) not in heads]
                if ours:
                    optimizer.add_param_group({**group, "params": ours, "lr": self.heads_learning_rate})
        return optimizer

    def _get_eval_sampler(self, eval_dataset: Dataset) -> torch.utils.data.Sampler | None:
        """Rows in their own order: with ``group_by_length`` the Trainer would shuffle these too, and predictions with them."""
        return torch.utils.data.SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_adapter_form(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

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
