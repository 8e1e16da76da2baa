"""A text encoder with one softmax head per decision of a taxonomy, and its loading from a checkpoint in one call.

Worth knowing:

1. The heads are one matrix over all nodes and one log-softmax over groups of siblings, so a taxonomy of a thousand
   nodes costs about what one of ten does. P(node) = P(parent) · P(node | parent) holds by construction. What a parent
   scores includes what its children score (a nested logit): `benchmarks/studies/decisions.py` compares that with other forms.
2. ``logits`` are leaf log-probabilities: their softmax is the leaf distribution, so flat tools work unchanged.
3. A checkpoint is either whole (``model.safetensors``) or an adapter: ``heads.safetensors`` beside a plain PEFT adapter
   in ``adapter/``, over an encoder that is fetched by name. The adapter is in a subfolder because a root-level
   ``adapter_config.json`` on the Hub makes ``AutoModel`` load the bare encoder instead.
4. Loading merges the adapter into the encoder's weights, which needs no PEFT, whose import takes longer than all the rest, and
   makes every forward faster. Over quantized weights, or on demand, PEFT injects it beside them.
5. The heads are parameters of their own module, not an ``nn.Linear``, so no ``quantization_config`` reaches them.
6. The heads' buffers are not saved. They are refilled from the configuration in ``_init_weights``, since models are
   built on the meta device.
"""

import copy
import inspect
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, cached_file, can_return_tuple, is_peft_available, logging

try:
    from .configuration_hierarchical import HierarchicalConfig, Taxonomy
except ImportError:  # as a top-level module of the repository, not as remote code of a checkpoint
    from configuration_hierarchical import HierarchicalConfig, Taxonomy

if (
    TYPE_CHECKING
):  # never run, but transformers puts every relative import beside this file, where `save_pretrained` finds it
    from .cpu_hierarchical import attend_by_document  # noqa: F401
    from .pipeline_hierarchical import HierarchicalTextClassificationPipeline  # noqa: F401

AUTO_MAP = {
    "AutoConfig": "configuration_hierarchical.HierarchicalConfig",
    "AutoModel": "modeling_hierarchical.HierarchicalForSequenceClassification",
    "AutoModelForSequenceClassification": "modeling_hierarchical.HierarchicalForSequenceClassification",
}
CUSTOM_PIPELINES = {
    "hierarchical-text-classification": {
        "impl": "pipeline_hierarchical.HierarchicalTextClassificationPipeline",
        "pt": ["AutoModelForSequenceClassification"],
        "type": "text",
    }
}
SHIPPED_FILES = (
    "configuration_hierarchical.py",
    "modeling_hierarchical.py",
    "cpu_hierarchical.py",
    "pipeline_hierarchical.py",
)
ADAPTER_SUBFOLDER = "adapter"
ADAPTER_PREFIX = "base_model.model."  # how PeftModel names the module that it wraps
ADAPTER_WEIGHTS = "adapter_model.safetensors"
HEADS_WEIGHTS = "heads.safetensors"
PADDING_COUNTS = ("convbert", "yoso")  # their convolutions and hashes take padding in
IGNORED_LABEL = -100


@dataclass
class HierarchicalOutput(ModelOutput):
    """Output of `HierarchicalForSequenceClassification`.

    Attributes:
        loss: scalar, when labels were given.
        logits: (B, num_leaves), log-probabilities of the leaves.
        node_log_probs: (B, num_nodes), log-probabilities of all nodes, leaves first.
        hidden_states, attentions: the encoder's own, when asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    node_log_probs: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def segment_logsumexp(scores: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Logsumexp within groups of columns.

    Args:
        scores: (B, N).
        group: (N,), the group of each column, in 0 … num_groups - 1; each has a column.

    Returns:
        (B, num_groups).
    """
    index = group.expand_as(scores)
    peak = scores.new_full((scores.shape[0], num_groups), -torch.inf)
    peak = peak.scatter_reduce(1, index, scores.detach(), "amax")
    total = torch.zeros_like(peak).scatter_add(1, index, (scores - peak.gather(1, index)).exp())
    return peak + total.log()


def segment_log_softmax(scores: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Log-softmax within groups of columns.

    Args:
        scores: (B, N).
        group: (N,), the group of each column, in 0 … num_groups - 1; each has a column.

    Returns:
        (B, N); the exponentials of each group add up to one.
    """
    return scores - segment_logsumexp(scores, group, num_groups)[:, group]


class LexicalHead(nn.Module):
    """A linear classifier of the leaves over the bag of tokens, beside the encoder.

    A text is weighed by TF-IDF, (1 + log count) · idf for each token, and scaled to length 1 (as scikit-learn's
    `TfidfTransformer` with ``sublinear_tf``). ``idf`` may hold any weight of a token beside its inverse document frequency. The
    head is fitted after the encoder, never by gradient: see `training.lexical`.
    """

    def __init__(self, vocab_size: int, num_leaves: int):
        super().__init__()
        self.idf = nn.Parameter(torch.empty(vocab_size, dtype=torch.float32), requires_grad=False)
        self.weight = nn.Parameter(torch.empty(num_leaves, vocab_size, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(num_leaves, dtype=torch.float32), requires_grad=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Scores (B, num_leaves) of token ids and their mask, (B, T) each. Ids beyond the vocabulary count for nothing."""
        input_ids = input_ids.to(self.idf.device)
        counted = input_ids < len(self.idf)
        if attention_mask is not None:
            counted = counted & attention_mask.to(counted.device).bool()
        # by the tokens of the texts: vectors over the vocabulary, which can be a quarter of a million, would be nearly all zeros
        # (B, T): equal ones side by side, and those that do not count at the end
        ids = input_ids.where(counted, len(self.idf)).sort(1).values
        is_first = nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
        group = is_first.long().cumsum(1) - 1
        ones = torch.ones_like(ids, dtype=torch.float32)
        counts = torch.zeros_like(ones).scatter_add(1, group, ones)
        known = is_first & (ids < len(self.idf))
        ids = ids.where(known, 0)
        weighed = (1 + counts.gather(1, group).log()) * self.idf[ids].float() * known  # once for each token of a text
        of_tokens = self.weight[:, ids].float()  # (num_leaves, B, T)
        return (of_tokens * nn.functional.normalize(weighed)).sum(2).T + self.bias.float()


class HierarchicalHeads(nn.Module):
    """All decisions of a taxonomy at once: (B, hidden_size) to (B, num_nodes) log-probabilities.

    A node's score is linear in the text's vector, plus, for an inner node, the logsumexp of its children's scores, its
    inclusive value (the nested logit: McFadden, 1978, "Modelling the choice of residential location"). Siblings share one
    softmax. Without the inner nodes' own weights this is a flat softmax over the leaves; with them, leaves share what
    their ancestors learn.

    A lexical head, where there is one, has its say in each decision by itself: its log-probabilities of the siblings, times its
    weight, are added to those of the encoder (a product of experts, which is then normalised: Hinton, 2002).
    """

    def __init__(self, config: HierarchicalConfig):
        super().__init__()
        tree = config.tree
        self.num_nodes, self.num_leaves = tree.num_nodes, tree.num_leaves
        self.num_groups = tree.num_nodes - tree.num_leaves + 1  # the roots, and the children of each inner node
        self.tree, self.temperatures, self.lexical_weight = tree, config.temperatures, config.lexical_weight
        self.dropout = nn.Dropout(config.head_dropout)
        # in float32, whatever the model is made in; so are the temperatures
        self.weight = nn.Parameter(torch.empty(tree.num_nodes, config.hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(tree.num_nodes, dtype=torch.float32))
        self.register_buffer("group", torch.empty(tree.num_nodes, dtype=torch.long), persistent=False)
        self.register_buffer("ancestors", torch.empty(tree.num_nodes, tree.depth, dtype=torch.long), persistent=False)
        self.register_buffer("below", torch.empty(tree.num_nodes, dtype=torch.long), persistent=False)
        temperature = torch.empty(tree.num_nodes, dtype=torch.float32)
        self.register_buffer("temperature", temperature, persistent=False)
        self.lexical = None
        if config.lexical_vocab_size is not None:
            self.lexical = LexicalHead(config.lexical_vocab_size, tree.num_leaves)
        self.fill_buffers()

    def fill_buffers(self) -> None:
        """Writes the taxonomy and the temperatures into the buffers."""
        group, ancestors = taxonomy_indices(self.tree)
        self.group.copy_(group)
        self.ancestors.copy_(ancestors)
        nodes = torch.arange(self.num_nodes)  # the group of a node's children; of a leaf, one beyond the last
        self.below.copy_(torch.where(nodes < self.num_leaves, self.num_groups, nodes - self.num_leaves + 1))
        temperatures = torch.tensor(self.temperatures or [1.0] * self.num_groups, dtype=torch.float32)
        self.temperature.copy_(temperatures[group])

    def forward(self, pooled: Tensor, input_ids: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """Log-probabilities (B, num_nodes) of vectors (B, hidden_size), and for the lexical head tokens and mask (B, T)."""
        with torch.autocast(pooled.device.type, enabled=False):
            own = nn.functional.linear(self.dropout(pooled.to(self.weight.dtype)), self.weight, self.bias)
            scores = self.with_inclusive_values(own.float())
            if self.lexical is not None:
                leaves = self.lexical(input_ids, attention_mask)
                words = self.with_inclusive_values(nn.functional.pad(leaves, (0, self.num_nodes - self.num_leaves)))
                scores = scores + self.lexical_weight * words
            scores = scores / self.temperature
            conditional = segment_log_softmax(scores, self.group, self.num_groups)  # (B, N): log P(node | parent)
            padded = nn.functional.pad(conditional, (0, 1))  # the padding's ancestor is the last column, a zero
            return padded[:, self.ancestors].sum(-1)  # (B, N, depth) to (B, N)

    def with_inclusive_values(self, own: Tensor) -> Tensor:
        """Scores (B, N) of nodes that have these by themselves."""
        scores = own
        for _ in range(self.tree.depth - 1):  # they rise a level each time
            inclusive = segment_logsumexp(scores, self.group, self.num_groups)
            scores = own + nn.functional.pad(inclusive, (0, 1))[:, self.below]
        return scores


def taxonomy_indices(tree: Taxonomy) -> tuple[Tensor, Tensor]:
    """A taxonomy as tensors.

    Returns:
        group: (num_nodes,), 0 for roots, and one number for the children of each inner node.
        ancestors: (num_nodes, depth), ids from the root to the node itself, padded with num_nodes.
    """
    group = torch.tensor([0 if parent < 0 else parent - tree.num_leaves + 1 for parent in tree.parents])
    ancestors = torch.full((tree.num_nodes, tree.depth), tree.num_nodes)
    for node in range(tree.num_nodes):
        path = tree.path(node)
        ancestors[node, : len(path)] = torch.tensor(path)
    return group, ancestors


class HierarchicalForSequenceClassification(PreTrainedModel):
    """Any text encoder of transformers, pooled, with hierarchical heads.

    Args:
        config: with the taxonomy and the encoder's configuration.
        encoder: a loaded encoder; by default one with fresh weights is built from ``config.text_config``.
    """

    config_class = HierarchicalConfig
    base_model_prefix = "encoder"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["heads"]

    def __init__(self, config: HierarchicalConfig, encoder: PreTrainedModel | None = None):
        super().__init__(config)
        if encoder is None:
            encoder = AutoModel.from_config(config.text_config, **without_pooler(config.text_config))
            refuse_maskless(encoder)
        else:
            for module in encoder.modules():  # else post_init would draw fresh weights for an injected adapter
                module._is_hf_initialized = True
        self.encoder = encoder
        config.text_config = encoder.config  # one object, so that resized embeddings and attention choices are saved
        self.heads = HierarchicalHeads(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, HierarchicalHeads):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
            module.fill_buffers()
        elif isinstance(module, LexicalHead):
            for parameter in module.parameters():
                init.zeros_(parameter)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.set_input_embeddings(value)

    @property
    def has_adapter(self) -> bool:
        """Whether a PEFT adapter is injected into the encoder."""
        return hasattr(self.encoder, "peft_config")

    def pool(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(B, T, H) token vectors and a (B, T) mask to (B, H), in float32."""
        if self.config.pooling == "cls":
            return hidden[:, 0].float()
        if attention_mask is None:
            return hidden.float().mean(1)
        if attention_mask.dim() != 2:
            raise ValueError(f"mean pooling needs an attention mask of shape (B, T), not {tuple(attention_mask.shape)}")
        mask = attention_mask.to(hidden.device, torch.float32).unsqueeze(-1)  # (B, T, 1)
        return (hidden.float() * mask).sum(1) / mask.sum(1).clamp(min=1)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> HierarchicalOutput:
        """Log-probabilities of every node.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids: (B, T).
            inputs_embeds: (B, T, H), instead of ``input_ids``; not with a lexical head, which reads these.
            labels: (B,), node ids, of leaves or inner nodes; -100 is ignored. The loss is the negative log-likelihood
                of the labelled nodes, in nats.
            num_items_in_batch: what the summed loss is divided by; the number of labels that are not -100 by default.
            kwargs: passed to the encoder, such as ``output_hidden_states`` and ``output_attentions``.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        for name in ("output_hidden_states", "output_attentions"):  # asked for at loading
            if getattr(self.config, name, False):
                kwargs.setdefault(name, True)
        if self.heads.lexical is not None:
            if input_ids is None:
                raise ValueError(
                    "this model has a lexical head, which reads input_ids: it cannot do with inputs_embeds"
                )
            if attention_mask is not None and attention_mask.dim() != 2:
                raise ValueError(f"the lexical head needs a mask of shape (B, T), not {tuple(attention_mask.shape)}")
        encoded = self.encoder(**{name: value for name, value in given.items() if value is not None}, **kwargs)
        pooled = self.pool(encoded.last_hidden_state, attention_mask)
        if not self.heads.weight.is_meta:  # offloaded heads fetch what they are given
            pooled = pooled.to(self.heads.weight.device)
        node_log_probs = self.heads(pooled, input_ids, attention_mask)
        return HierarchicalOutput(
            loss=None if labels is None else negative_log_likelihood(node_log_probs, labels, num_items_in_batch),
            logits=node_log_probs[:, : self.heads.num_leaves],
            node_log_probs=node_log_probs,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args: Any,
        config: Any = None,
        merge_adapter: bool = True,
        **kwargs: Any,
    ) -> "HierarchicalForSequenceClassification":
        """Loads a whole model, or the encoder by its name and revision and then the adapter and heads of the checkpoint.

        Takes what `PreTrainedModel.from_pretrained` takes. With an adapter checkpoint, ``dtype``, ``device_map``,
        ``quantization_config`` and ``attn_implementation`` go to the encoder; the heads stay in float32 beside it.

        Args:
            merge_adapter: add a LoRA adapter to the weights that it adapts, where they are floating-point numbers in
                memory. With False, or over quantized weights, PEFT keeps it beside them; weights that an adapter belongs to
                cannot be offloaded.
        """
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        dtype: dict[str, Any] = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
        if not isinstance(config, PretrainedConfig):
            config, kwargs = HierarchicalConfig.from_pretrained(
                pretrained_model_name_or_path if config is None else config, return_unused_kwargs=True, **kwargs
            )
        kwargs |= dtype  # the configuration would have kept it for itself
        if config.adapter_subfolder is None:
            info_wanted = kwargs.pop("output_loading_info", False)
            with plain_errors(pretrained_model_name_or_path):
                model, info = super().from_pretrained(
                    pretrained_model_name_or_path,
                    *model_args,
                    config=config,
                    output_loading_info=True,
                    **{**kwargs, **hub},
                )
            refuse_missing(pretrained_model_name_or_path, model, info)
            if left_over := [name for name in info["unexpected_keys"] if name.startswith("heads.")]:
                raise ValueError(
                    f"the weight {min(left_over)!r} of {pretrained_model_name_or_path} does not fit its config.json"
                )
            return (model, info) if info_wanted else model  # type: ignore[return-value]

        def fetch(filename: str) -> str:
            return cached_file(pretrained_model_name_or_path, filename, **hub)

        heads = load_file(fetch(HEADS_WEIGHTS))
        adapter_config = Path(fetch(f"{config.adapter_subfolder}/adapter_config.json"))
        lora = read_adapter_config(adapter_config)
        adapter = load_file(fetch(f"{config.adapter_subfolder}/{ADAPTER_WEIGHTS}"))
        info_wanted = kwargs.pop("output_loading_info", False)
        kwargs = {name: value for name, value in {**kwargs, **hub}.items() if name not in NOT_FOR_THE_ENCODER}
        encoder = load_encoder(config, **kwargs)
        with init.no_init_weights():  # everything is loaded
            model = cls(copy.deepcopy(config), encoder=encoder)
        refuse_offloaded(encoder, lora)
        if merge_adapter and is_mergeable(encoder, lora):
            merge_lora(encoder, adapter, lora)
            model.load_heads(heads)
        else:
            model.load_heads_and_adapter(
                heads, adapter, import_peft().PeftConfig.from_pretrained(adapter_config.parent)
            )
        in_memory = (parameter.device for parameter in encoder.parameters() if not parameter.is_meta)
        model.heads.to(next(in_memory, torch.device("cpu")))
        if hasattr(encoder, "hf_device_map"):  # how pipelines and Trainers see that a model is already placed
            placed = {".".join(filter(None, ("encoder", name))): at for name, at in encoder.hf_device_map.items()}
            model.hf_device_map = {**placed, "heads": next(iter(placed.values()))}
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        # anything else was an error
        info = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return (model.eval(), info) if info_wanted else model.eval()  # type: ignore[return-value]

    def calibrate(
        self,
        temperatures: list[float] | None,
        conformal_thresholds: list[float | None] | None,
        conformal_max_length: int | None = None,
    ) -> None:
        """Takes the outcome of a calibration into the configuration, and the temperatures into the heads.

        Args:
            temperatures, conformal_thresholds, conformal_max_length: as in `HierarchicalConfig`.
        """
        self.config.temperatures = self.heads.temperatures = temperatures
        self.config.conformal_thresholds = conformal_thresholds
        self.config.conformal_max_length = conformal_max_length
        self.heads.fill_buffers()

    def set_lexical_head(self, weights: dict[str, Tensor] | None, lexical_weight: float = 1.0) -> None:
        """Gives the model a lexical head, or with None takes it away.

        Args:
            weights: ``idf`` (V,), ``weight`` (num_leaves, V) and ``bias`` (num_leaves,) of a `LexicalHead`.
            lexical_weight: as in `HierarchicalConfig`.
        """
        self.heads.lexical = self.heads.lexical_weight = self.config.lexical_vocab_size = self.config.lexical_weight = (
            None
        )
        if weights is not None:
            lexical = LexicalHead(len(weights["idf"]), self.heads.num_leaves)
            lexical.load_state_dict(weights)
            self.heads.lexical = lexical.to(self.heads.weight.device)
            self.heads.lexical_weight = self.config.lexical_weight = lexical_weight
            self.config.lexical_vocab_size = len(weights["idf"])

    def load_heads(self, heads: dict[str, Tensor]) -> None:
        """Takes heads as they are stored in a checkpoint.

        Raises:
            ValueError: weights are missing, left over, or of another shape.
        """
        check_weights("heads", heads, self.heads.state_dict())
        self.heads.load_state_dict(heads)

    def merge_adapter(self) -> None:
        """Adds an injected adapter to the weights that it adapts, and takes PEFT's layers out."""
        peft = import_peft()
        for name, module in list(self.encoder.named_modules()):
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                module.merge(safe_merge=True)  # with an error where a weight is not finite
                parent, _, child = name.rpartition(".")
                setattr(self.encoder.get_submodule(parent), child, module.get_base_layer())
        del self.encoder.peft_config

    def load_heads_and_adapter(
        self, heads: dict[str, Tensor], adapter: dict[str, Tensor], adapter_config: Any = None
    ) -> None:
        """Takes heads and adapter weights as they are stored in a checkpoint.

        Args:
            adapter_config: a `peft.PeftConfig`, injected first; None when an adapter is already there.

        Raises:
            ValueError: weights are missing, left over, or of another shape.
        """
        peft = import_peft()
        if adapter_config is not None:
            peft.inject_adapter_in_model(adapter_config, self.encoder)
            self.encoder.requires_grad_(False)
            # PEFT injects in the type of the encoder, or of the products of 4-bit weights, to which the adapter would be rounded
            for name, parameter in self.encoder.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.float()
        expected = peft.get_peft_model_state_dict(self.encoder)
        adapter = {name.removeprefix(ADAPTER_PREFIX): tensor for name, tensor in adapter.items()}
        check_weights("adapter", adapter, expected)
        self.load_heads(heads)
        peft.set_peft_model_state_dict(self.encoder, adapter)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes a checkpoint that `from_pretrained` and the Auto classes load: the adapter form when the encoder carries
        an adapter, else the whole model. The code that loads it is written beside it.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"{save_directory} is a file; a checkpoint needs a folder")
        if kwargs.get("push_to_hub"):  # which would publish before the code is written
            raise ValueError("save_pretrained writes a folder; to publish it, run push_to_hub.py on that folder")
        code = read_shipped_files() if is_main_process else {}
        if not self.has_adapter:
            for name, weight in self.named_parameters():
                if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
                    raise ValueError(
                        f"{name} was repacked by bitsandbytes when the model first ran on this CPU, and would be saved "
                        "so: save the model before, or load it again"
                    )
            self.config.adapter_subfolder = None
            self.config.auto_map, self.config.custom_pipelines = AUTO_MAP, CUSTOM_PIPELINES
            self.config.text_config.name_or_path = ""  # where it lay on this machine
            if os.path.isabs(self.config.encoder_name_or_path):  # where it lay, too, and nobody loads it again
                self.config.encoder_name_or_path = os.path.basename(self.config.encoder_name_or_path)
            super().save_pretrained(save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)
        elif is_main_process:
            self._save_adapter_form(Path(save_directory), state_dict)
        if is_main_process:
            follow_umask(Path(save_directory))
            remove_other_form(Path(save_directory), self.has_adapter)
            for name, content in code.items():
                (Path(save_directory) / name).write_bytes(content)

    def _save_adapter_form(self, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
        if self.config.text_config.vocab_size != getattr(
            self.encoder, "vocab_size_at_load", self.config.text_config.vocab_size
        ):
            raise ValueError(
                "an adapter checkpoint holds no embeddings, and these were resized: train with --tuning full"
            )
        state_dict = self.state_dict() if state_dict is None else state_dict
        part = {
            prefix: {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
            for prefix in ("heads.", "encoder.")
        }
        (folder / ADAPTER_SUBFOLDER).mkdir(parents=True, exist_ok=True)
        save_file(contiguous(part["heads."]), folder / HEADS_WEIGHTS, {"format": "pt"})

        adapter = import_peft().get_peft_model_state_dict(self.encoder, state_dict=part["encoder."])
        adapter = {ADAPTER_PREFIX + name: tensor for name, tensor in adapter.items()}
        save_file(contiguous(adapter), folder / ADAPTER_SUBFOLDER / ADAPTER_WEIGHTS, {"format": "pt"})
        adapter_config = copy.deepcopy(self.encoder.peft_config["default"])
        adapter_config.inference_mode = True
        adapter_config.base_model_name_or_path = self.config.encoder_name_or_path
        adapter_config.revision = self.config.encoder_revision
        adapter_config.save_pretrained(folder / ADAPTER_SUBFOLDER)

        config = copy.deepcopy(self.config)
        config.auto_map, config.custom_pipelines = AUTO_MAP, CUSTOM_PIPELINES
        config.text_config.name_or_path = ""  # where it lay on this machine
        config.architectures = [type(self).__name__]
        config.adapter_subfolder = ADAPTER_SUBFOLDER
        # how the encoder was held in memory is no property of the checkpoint: it loads as its own repository has it
        config.dtype = config.text_config.dtype = None
        for part_config in (config, config.text_config):
            if hasattr(part_config, "quantization_config"):
                del part_config.quantization_config
        config.save_pretrained(folder)


HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
# the encoder is in a repository of its own, with another revision, and its code is transformers' own
NOT_FOR_THE_ENCODER = (
    *("revision", "subfolder", "trust_remote_code", "code_revision", "adapter_kwargs"),
    *("_from_auto", "_from_pipeline", "_commit_hash"),
)


def read_shipped_files() -> dict[str, bytes]:
    """Read the code that travels with a checkpoint: this file, and those beside it.

    Raises:
        ValueError: a file is gone, such as when the cache of transformers was emptied since the model was loaded.
    """
    try:
        return {name: (Path(__file__).parent / name).read_bytes() for name in SHIPPED_FILES}
    except OSError as error:
        raise ValueError(
            f"cannot save the model: its code {error.filename} cannot be read ({error.strerror}); load the model again"
        ) from error


def follow_umask(folder: Path) -> None:
    """Let the umask say who may read the weights of a checkpoint: safetensors makes files that their owner alone may read."""
    os.umask(umask := os.umask(0o077))  # it can only be read by setting it
    for file in [*folder.glob("*.safetensors"), *(folder / ADAPTER_SUBFOLDER).glob("*.safetensors")]:
        file.chmod(0o666 & ~umask)


def remove_other_form(folder: Path, adapter_form: bool) -> None:
    """Deletes the weights of an earlier checkpoint of the other form, which would be published along."""
    whole = [*folder.glob("model.safetensors*"), *folder.glob("model-*-of-*.safetensors")]
    adapter = [folder / ADAPTER_SUBFOLDER / name for name in (ADAPTER_WEIGHTS, "adapter_config.json")]
    for file in whole if adapter_form else [folder / HEADS_WEIGHTS, *adapter]:
        file.unlink(missing_ok=True)


def import_peft() -> Any:
    """PEFT, imported where an adapter is at hand: it takes longer to import than all the rest."""
    if is_peft_available():
        import peft

        return peft
    raise ImportError("the checkpoint holds a PEFT adapter: pip install peft")


def without_pooler(text_config: PretrainedConfig) -> dict[str, bool]:
    """The argument that leaves out an encoder's pooler, where it has one: pooling happens here, and a layer without a
    gradient is an error under DDP."""
    parameters = inspect.signature(MODEL_MAPPING[type(text_config)].__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in parameters else {}


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without warnings of poolers and pretraining heads, which are left out on purpose, and without the conversion of
    .bin files, for which transformers would send the user's token to a Space.
    """
    verbosity, before = logging.get_verbosity(), os.environ.get("DISABLE_SAFETENSORS_CONVERSION")
    logging.set_verbosity_error()
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if before is None:
            del os.environ["DISABLE_SAFETENSORS_CONVERSION"]
        else:
            os.environ["DISABLE_SAFETENSORS_CONVERSION"] = before


def load_encoder(config: HierarchicalConfig, **kwargs: Any) -> PreTrainedModel:
    """The encoder that ``config`` names, at its pinned revision, by `AutoModel.from_pretrained`.

    Raises:
        ValueError: the repository lacks some of the encoder's weights, or its commit is not pinned.
        OSError: the repository, or that commit of it, is not there.
    """
    name, revision = config.encoder_name_or_path, config.encoder_revision
    if os.path.isdir(name):
        revision = "main"
    elif os.path.isabs(name):
        raise ValueError(
            f"the encoder is the folder {name}, which is not on this machine: publish such a checkpoint by "
            "push_to_hub.py --merge, or set encoder_name_or_path and encoder_revision in its config.json"
        )
    elif re.fullmatch("[0-9a-f]{40}", revision or "") is None:
        raise ValueError(
            f"encoder_revision must be the commit of {name} that this was trained on, 40 hexadecimal digits, not "
            f"{revision!r}: a branch can move, and the encoder with it"
        )
    with quiet_loading(), plain_errors(name):
        encoder, info = AutoModel.from_pretrained(
            name,
            config=config.text_config,
            revision=revision,
            output_loading_info=True,
            trust_remote_code=False,  # else transformers asks at a terminal
            **without_pooler(config.text_config),
            **kwargs,
        )
    encoder.vocab_size_at_load = config.text_config.vocab_size
    refuse_missing(name, encoder, info)
    refuse_maskless(encoder)
    return encoder


@contextmanager
def plain_errors(name: str | os.PathLike) -> Iterator[None]:
    """Says in words of ours what transformers says by pointing at a log, or at how to run what is in a .bin file.

    Raises:
        ValueError: weights of other shapes than the configuration's, or a file with more than tensors.
    """
    try:
        yield
    except Exception as error:
        if "ignore_mismatched_sizes" in str(error):
            said = f"the weights of {name} have other shapes than its configuration says"
        elif type(error).__name__ == "UnpicklingError":
            said = f"{name} holds a .bin file with more than tensors, which could run code: it is not loaded"
        else:
            raise
        raise ValueError(said) from error


def refuse_missing(name: str | os.PathLike, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raises ValueError where weights are missing: transformers draws them at random, with a warning."""
    if missing := info["missing_keys"]:
        raise ValueError(f"{name} lacks {len(missing)} weights of a {type(model).__name__}, such as {min(missing)!r}")


def refuse_maskless(encoder: PreTrainedModel) -> None:
    """Raises ValueError where what a text is padded with would change its answer, as without an attention mask, and for models
    that are more than an encoder."""
    name = type(encoder).__name__
    if encoder.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder with a decoder: use an encoder alone")
    if encoder.config.model_type in PADDING_COUNTS:
        raise ValueError(
            f"{name} lets padding change its answers, whatever the attention mask says: use another encoder"
        )
    if getattr(encoder.config, "default_language", "") is None:  # XMOD, which has layers for each language
        raise ValueError(f"{name} has to know the language of the texts: set default_language in its config.json")
    if "attention_mask" not in inspect.signature(encoder.forward).parameters:
        raise ValueError(f"{name} takes no attention mask, so that padding changes its answers: use another encoder")


def read_adapter_config(path: Path) -> dict[str, Any]:
    """Read an adapter_config.json.

    Raises:
        ValueError: the file is not JSON, or names no kind of adapter.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict) or "peft_type" not in found:
        raise ValueError(f"{path} is not the configuration of a PEFT adapter: it names no peft_type")
    return found


# settings of a LoRA adapter that do not change what is added to a weight, whatever their value
HARMLESS_LORA_SETTINGS = (
    *(
        "peft_type",
        "task_type",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "auto_mapping",
    ),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "megatron_core", "qalora_group_size"),
)


def is_target(name: str, targets: list[str] | str) -> bool:
    """Whether PEFT adapts the module of this name: by the end of its name, or by a pattern for all of it."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def refuse_offloaded(encoder: nn.Module, adapter_config: dict[str, Any]) -> None:
    """Raises ValueError where an adapter belongs to weights that are not in memory, from which PEFT would silently leave it out."""
    targets = adapter_config.get("target_modules")
    for name, parameter in encoder.named_parameters():
        if parameter.is_meta and (not targets or is_target(name.rpartition(".")[0], targets)):
            raise ValueError(
                f"the encoder's {name} is offloaded, and the adapter cannot be added to it: give the model more memory, or "
                "load a checkpoint that was published by push_to_hub.py --merge"
            )


def is_mergeable(encoder: nn.Module, adapter_config: dict[str, Any]) -> bool:
    """Whether an adapter is LoRA as published, over linear layers that hold floating-point numbers."""
    others = {name: value for name, value in adapter_config.items() if name not in HARMLESS_LORA_SETTINGS and value}
    if adapter_config["peft_type"] != "LORA" or others.pop("bias", "none") != "none":
        return False
    if others.pop("init_lora_weights", True) not in (True, "gaussian") or others:
        return False
    targets = [m for name, m in encoder.named_modules() if is_target(name, adapter_config["target_modules"])]
    # the weights of torchao are tensors of its own in plain layers
    plain = all(type(m) is nn.Linear and type(m.weight) is nn.Parameter for m in targets)
    return plain and all(m.weight.is_floating_point() and not m.weight.is_meta for m in targets)


@torch.no_grad()
def merge_lora(encoder: nn.Module, adapter: dict[str, Tensor], adapter_config: dict[str, Any]) -> None:
    """Adds a LoRA adapter to the weights that it adapts: W + (alpha / r) · B · A (Hu et al., 2021, section 4.1).

    Args:
        adapter: the adapter's weights, as they are stored.
        adapter_config: the content of its adapter_config.json.

    Raises:
        ValueError: weights are missing, left over, or of another shape.
    """
    targets, r = adapter_config["target_modules"], adapter_config["r"]
    adapter = {name.removeprefix(ADAPTER_PREFIX): tensor for name, tensor in adapter.items()}
    modules = {name: module for name, module in encoder.named_modules() if is_target(name, targets)}
    expected = {}
    for name, module in modules.items():
        expected[f"{name}.lora_A.weight"] = torch.empty(r, module.in_features, device="meta")
        expected[f"{name}.lora_B.weight"] = torch.empty(module.out_features, r, device="meta")
    check_weights("adapter", adapter, expected)
    for name, module in modules.items():
        weight = module.weight
        a, b = (adapter[f"{name}.lora_{part}.weight"].to(weight.device, torch.float32) for part in "AB")
        merged = torch.addmm(weight.float(), b, a, alpha=adapter_config["lora_alpha"] / r)
        weight.data = merged.to(weight.dtype)  # a new tensor: the old one can be the file itself, mapped into memory


def negative_log_likelihood(
    node_log_probs: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Mean of -log P(label) over the labels that are not -100, or their sum divided by ``num_items_in_batch``.

    Args:
        node_log_probs: (B, num_nodes).
        labels: (B,), node ids.
    """
    labels = labels.to(node_log_probs.device)
    labelled = labels != IGNORED_LABEL
    picked = node_log_probs.gather(1, torch.where(labelled, labels, 0).unsqueeze(1)).squeeze(1)
    items = labelled.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return -torch.where(labelled, picked, 0).sum() / items


def check_weights(what: str, stored: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raises ValueError, naming the first, where stored tensors are missing, left over or of another shape."""
    for name in sorted(stored.keys() ^ expected.keys()):
        problem = "does not fit this model" if name in stored else "is missing from the checkpoint"
        raise ValueError(f"the {what} weight {name!r} {problem}")
    for name, tensor in stored.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"the {what} weight {name!r} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
            )


def contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors wants them."""
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
