"""A text encoder with one softmax head per decision of a taxonomy.

Worth knowing:

1. The heads are one matrix over all nodes and one log-softmax over groups of siblings. A taxonomy of a thousand nodes
   therefore costs about as much as one of ten. P(node) = P(parent) · P(node | parent) holds by construction.
2. A parent's score includes its children's scores (a nested logit). `benchmarks/studies/decisions.py` compares other
   forms.
3. ``logits`` are leaf log-probabilities: their softmax is the leaf distribution, so flat tools work unchanged.
4. The heads are parameters of their own module, not an ``nn.Linear``, so no ``quantization_config`` reaches them.
5. The heads' buffers are not saved. ``_init_weights`` refills them from the configuration, because transformers builds
   models on the meta device.
6. `checkpoint_hierarchical` reads, merges and writes checkpoints.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

try:
    from .checkpoint_hierarchical import (
        build_encoder,
        load_checkpoint,
        load_heads_and_adapter,
        save_checkpoint,
    )
    from .configuration_hierarchical import HierarchicalConfig
    from .taxonomy_hierarchical import Taxonomy
except ImportError:  # as a top-level module of the repository, not as remote code of a checkpoint
    from checkpoint_hierarchical import (
        build_encoder,
        load_checkpoint,
        load_heads_and_adapter,
        save_checkpoint,
    )
    from configuration_hierarchical import HierarchicalConfig
    from taxonomy_hierarchical import Taxonomy

if TYPE_CHECKING:  # never runs, but makes transformers fetch the file, which `save_pretrained` copies
    from .pipeline_hierarchical import HierarchicalTextClassificationPipeline  # noqa: F401

IGNORED_LABEL = -100


@dataclass
class HierarchicalOutput(ModelOutput):
    """Output of `HierarchicalForSequenceClassification`.

    Attributes:
        loss: scalar, when labels were given.
        logits: (B, num_leaves), log-probabilities of the leaves.
        node_log_probs: (B, num_nodes), log-probabilities of all nodes, leaves first.
        hidden_states, attentions: the encoder's, when requested.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    node_log_probs: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def segment_logsumexp(scores: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Compute the logsumexp within groups of columns, (B, N) to (B, num_groups).

    Args:
        group: (N,), the group of each column, from 0 to num_groups - 1. Every group has a column.
    """
    index = group.expand_as(scores)
    peak = scores.new_full((scores.shape[0], num_groups), -torch.inf)
    peak = peak.scatter_reduce(1, index, scores.detach(), "amax")
    total = torch.zeros_like(peak).scatter_add(1, index, (scores - peak.gather(1, index)).exp())
    return peak + total.log()


def segment_log_softmax(scores: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Compute the log-softmax within groups of columns, (B, N) to (B, N). ``group`` is as for `segment_logsumexp`."""
    return scores - segment_logsumexp(scores, group, num_groups)[:, group]


class LexicalHead(nn.Module):
    """A linear classifier of the leaves over the bag of tokens, beside the encoder.

    Token weights are TF-IDF, (1 + log count) · idf, and a text's vector has length 1, as in scikit-learn's
    `TfidfTransformer` with ``sublinear_tf``. ``idf`` may hold other token weights than the inverse document frequency.
    `evaluation.lexical` fits the head after the encoder is trained, never by gradient.
    """

    def __init__(self, vocab_size: int, num_leaves: int):
        super().__init__()
        self.idf = nn.Parameter(torch.empty(vocab_size, dtype=torch.float32), requires_grad=False)
        self.weight = nn.Parameter(torch.empty(num_leaves, vocab_size, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(num_leaves, dtype=torch.float32), requires_grad=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return leaf scores (B, num_leaves) of token ids and a mask (B, T). Ids beyond the vocabulary are ignored."""
        input_ids = input_ids.to(self.idf.device)
        counted = input_ids < len(self.idf)
        if attention_mask is not None:
            counted = counted & attention_mask.to(counted.device).bool()
        # sorting brings equal ids together and ignored ones to the end; a (B, V) count matrix would be mostly zeros
        ids = input_ids.where(counted, len(self.idf)).sort(1).values
        is_first = nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
        group = is_first.long().cumsum(1) - 1
        ones = torch.ones_like(ids, dtype=torch.float32)
        counts = torch.zeros_like(ones).scatter_add(1, group, ones)
        known = is_first & (ids < len(self.idf))
        ids = ids.where(known, 0)
        tfidf = (1 + counts.gather(1, group).log()) * self.idf[ids].float() * known  # at the first of equal ids
        tfidf = nn.functional.normalize(tfidf)
        if torch.compiler.is_exporting():  # ONNX has no weighted embedding_bag
            scores = (self.weight[:, ids].float() * tfidf).sum(2).T
        else:
            weight = self.weight.T.float()  # (V, num_leaves)
            scores = nn.functional.embedding_bag(ids, weight, per_sample_weights=tfidf, mode="sum")
        return scores + self.bias.float()


class TreeSoftmax(nn.Module):
    """Normalise scores within each decision of a taxonomy, without parameters.

    `evaluation.calibration` uses this module in float64, on the logits of a whole split.
    """

    def __init__(self, tree: Taxonomy):
        super().__init__()
        self.tree, self.num_nodes, self.num_leaves = tree, tree.num_nodes, tree.num_leaves
        self.num_groups = len(tree.decisions)
        self.register_buffer("group", torch.empty(tree.num_nodes, dtype=torch.long), persistent=False)
        self.register_buffer("ancestors", torch.empty(tree.num_nodes, tree.depth, dtype=torch.long), persistent=False)
        self.register_buffer("below", torch.empty(tree.num_nodes, dtype=torch.long), persistent=False)
        self.fill_tree_buffers()

    def fill_tree_buffers(self) -> None:
        """Write the taxonomy into the buffers."""
        self.group.copy_(torch.tensor(self.tree.decision_of))
        self.ancestors.copy_(torch.tensor(self.tree.ancestors))
        nodes = torch.arange(self.num_nodes)
        # the group of a node's children; a leaf gets the index after the last group
        self.below.copy_(torch.where(nodes < self.num_leaves, self.num_groups, nodes - self.num_leaves + 1))

    def with_inclusive_values(self, own: Tensor) -> Tensor:
        """Add the logsumexp of the children's scores to the inner nodes' own scores, (B, N) to (B, N)."""
        scores = own
        for _ in range(self.tree.depth - 1):  # each pass carries the values one level up
            inclusive = segment_logsumexp(scores, self.group, self.num_groups)
            scores = own + nn.functional.pad(inclusive, (0, 1))[:, self.below]
        return scores

    def node_log_probs(self, scores: Tensor) -> Tensor:
        """Return log-probabilities (B, N) of the nodes. Each decision is the softmax of its scores (B, N)."""
        conditional = segment_log_softmax(scores, self.group, self.num_groups)  # log P(node | parent)
        padded = nn.functional.pad(conditional, (0, 1))  # padded entries of `ancestors` select this column of zeros
        total = padded[:, self.ancestors[:, 0]]
        for level in range(1, self.tree.depth):  # a sum over all levels at once would take (B, N, depth)
            total = total + padded[:, self.ancestors[:, level]]
        return total


class HierarchicalHeads(TreeSoftmax):
    """All decisions of a taxonomy at once: (B, hidden_size) to (B, num_nodes) log-probabilities.

    A node's score is linear in the text's vector. An inner node adds its inclusive value, the logsumexp of its
    children's scores (the nested logit: McFadden, 1978, "Modelling the choice of residential location"). Siblings share
    one softmax. Without the inner nodes' own weights this is a flat softmax over the leaves. With them, leaves share
    their ancestors' weights.

    A lexical head takes part in each decision: its weighted scores are added to the encoder's, and the sum is
    normalised (a product of experts: Hinton, 2002).
    """

    def __init__(self, config: HierarchicalConfig):
        super().__init__(config.tree)
        self.temperatures, self.lexical_weight = config.temperatures, config.lexical_weight
        self.dropout = nn.Dropout(config.head_dropout)
        # weights and temperatures are float32, whatever the default dtype is
        self.weight = nn.Parameter(torch.empty(self.num_nodes, config.hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(self.num_nodes, dtype=torch.float32))
        temperature = torch.empty(self.num_nodes, dtype=torch.float32)
        self.register_buffer("temperature", temperature, persistent=False)
        self.lexical = None
        if config.lexical_vocab_size is not None:
            self.lexical = LexicalHead(config.lexical_vocab_size, self.num_leaves)
        self.fill_buffers()

    def fill_buffers(self) -> None:
        """Write the taxonomy and the temperatures into the buffers."""
        self.fill_tree_buffers()
        temperatures = torch.tensor(self.temperatures or [1.0] * self.num_groups, dtype=torch.float32)
        self.temperature.copy_(temperatures[self.tree.decision_of])

    def forward(self, pooled: Tensor, input_ids: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """Return log-probabilities (B, num_nodes) of vectors (B, hidden_size). A lexical head reads the ids (B, T)."""
        with torch.autocast(pooled.device.type, enabled=False):
            own = nn.functional.linear(self.dropout(pooled.to(self.weight.dtype)), self.weight, self.bias)
            scores = self.with_inclusive_values(own.float())
            if self.lexical is not None:
                leaf_scores = self.lexical(input_ids, attention_mask)
                lexical = self.with_inclusive_values(
                    nn.functional.pad(leaf_scores, (0, self.num_nodes - self.num_leaves))
                )
                scores = scores + self.lexical_weight * lexical
            return self.node_log_probs(scores / self.temperature)


class HierarchicalForSequenceClassification(PreTrainedModel):
    """Any text encoder of transformers, pooled, with hierarchical heads.

    Args:
        encoder: a loaded encoder. By default one with fresh weights is built from ``config.text_config``.
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
            encoder = build_encoder(config.text_config)
        else:
            for module in encoder.modules():
                module._is_hf_initialized = True  # else post_init would draw fresh weights for an injected adapter
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
        """Return whether a PEFT adapter is injected into the encoder."""
        return hasattr(self.encoder, "peft_config")

    def pool(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Pool token vectors (B, T, H) under a mask (B, T) to (B, H), in float32.

        Raises:
            ValueError: mean pooling, and a mask of another shape.
        """
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
        """Return the log-probabilities of all nodes, and the loss if labels are given.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids: (B, T).
            inputs_embeds: (B, T, H), instead of ``input_ids``. A model with a lexical head needs ``input_ids``.
            labels: (B,), ids of leaves or inner nodes; -100 is ignored. The loss is their negative log-likelihood in
                nats.
            num_items_in_batch: divisor of the summed loss, by default the number of labels that are not -100.
            kwargs: for the encoder, such as ``output_hidden_states`` and ``output_attentions``.

        Raises:
            ValueError: the lexical head gets no ``input_ids``, or it or mean pooling a mask that is not (B, T).
        """
        # ── Encoder ──────────────────────────────────────────────────────────────────────────────────────────────────
        encoder_inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        for name in ("output_hidden_states", "output_attentions"):  # requested when the model was loaded
            if getattr(self.config, name, False):
                kwargs.setdefault(name, True)
        if self.heads.lexical is not None:
            if input_ids is None:
                raise ValueError("this model has a lexical head, which needs input_ids: give these, not inputs_embeds")
            if attention_mask is not None and attention_mask.dim() != 2:
                raise ValueError(f"the lexical head needs a mask of shape (B, T), not {tuple(attention_mask.shape)}")
        encoded = self.encoder(**{name: value for name, value in encoder_inputs.items() if value is not None}, **kwargs)

        # ── Heads ────────────────────────────────────────────────────────────────────────────────────────────────────
        pooled = self.pool(encoded.last_hidden_state, attention_mask)
        if not self.heads.weight.is_meta:  # offloaded heads move their inputs themselves
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
        """Load a whole checkpoint, or an adapter checkpoint and its encoder, which is fetched by name and revision.

        Other arguments are those of `PreTrainedModel.from_pretrained`. With an adapter checkpoint, ``dtype``,
        ``device_map``, ``quantization_config`` and ``attn_implementation`` go to the encoder. The heads stay in
        float32.

        Args:
            merge_adapter: add a LoRA adapter to the weights that it adapts, if they are floating-point and in memory.
                With False, or over quantized weights, PEFT keeps the adapter separate, and adapted weights cannot be
                offloaded.
        """
        return load_checkpoint(
            cls,
            super().from_pretrained,
            pretrained_model_name_or_path,
            *model_args,
            config=config,
            merge_adapter=merge_adapter,
            **kwargs,
        )

    def set_calibration(
        self,
        temperatures: list[float] | None,
        conformal_thresholds: list[float | None] | None,
        conformal_max_length: int | None = None,
    ) -> None:
        """Set a calibration, with arguments as in `HierarchicalConfig`, in the configuration and the heads."""
        self.config.temperatures = self.heads.temperatures = temperatures
        self.config.conformal_thresholds = conformal_thresholds
        self.config.conformal_max_length = conformal_max_length
        self.heads.fill_buffers()

    def set_lexical_head(self, weights: dict[str, Tensor] | None, lexical_weight: float = 1.0) -> None:
        """Set the lexical head, or remove it with None.

        Args:
            weights: ``idf`` (V,), ``weight`` (num_leaves, V) and ``bias`` (num_leaves,) of a `LexicalHead`.
            lexical_weight: as in `HierarchicalConfig`.
        """
        lexical = None if weights is None else LexicalHead(len(weights["idf"]), self.heads.num_leaves)
        if lexical is not None:
            lexical.load_state_dict(weights)
            lexical.to(self.heads.weight.device)
        self.heads.lexical = lexical
        self.heads.lexical_weight = self.config.lexical_weight = None if lexical is None else lexical_weight
        self.config.lexical_vocab_size = None if lexical is None else len(lexical.idf)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a checkpoint with the code that loads it: in adapter form if the encoder has an adapter, else whole."""
        save_checkpoint(self, super().save_pretrained, Path(save_directory), is_main_process, state_dict, **kwargs)

    load_heads_and_adapter = load_heads_and_adapter


def negative_log_likelihood(
    node_log_probs: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Average -log P(label) over the labels that are not -100, or divide their sum by ``num_items_in_batch``.

    Args:
        node_log_probs: (B, num_nodes).
        labels: (B,), node ids.
    """
    labels = labels.to(node_log_probs.device)
    labelled = labels != IGNORED_LABEL
    picked = node_log_probs.gather(1, torch.where(labelled, labels, 0).unsqueeze(1)).squeeze(1)
    items = labelled.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return -torch.where(labelled, picked, 0).sum() / items
