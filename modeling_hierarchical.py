"""A text encoder with one softmax head per decision of a taxonomy.

Worth knowing:

1. The heads are one matrix over all nodes and one log-softmax over groups of siblings, so a taxonomy of a thousand
   nodes costs about what one of ten does. P(node) = P(parent) · P(node | parent) holds by construction. What a parent
   scores includes what its children score (a nested logit): `benchmarks/studies/decisions.py` compares that with other forms.
2. ``logits`` are leaf log-probabilities: their softmax is the leaf distribution, so flat tools work unchanged.
3. The heads are parameters of their own module, not an ``nn.Linear``, so no ``quantization_config`` reaches them.
4. The heads' buffers are not saved. They are refilled from the configuration in ``_init_weights``, since models are
   built on the meta device.
5. How a checkpoint is read, merged and written is in `checkpoint_hierarchical`.
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
        merge_injected_adapter,
        save_checkpoint,
    )
    from .configuration_hierarchical import HierarchicalConfig
    from .taxonomy_hierarchical import Taxonomy
except ImportError:  # as a top-level module of the repository, not as remote code of a checkpoint
    from checkpoint_hierarchical import (
        build_encoder,
        load_checkpoint,
        load_heads_and_adapter,
        merge_injected_adapter,
        save_checkpoint,
    )
    from configuration_hierarchical import HierarchicalConfig
    from taxonomy_hierarchical import Taxonomy

if TYPE_CHECKING:  # never run, but transformers fetches every relative import, where `save_pretrained` finds the file
    from .pipeline_hierarchical import HierarchicalTextClassificationPipeline  # noqa: F401

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
    """Compute the logsumexp within groups of columns.

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
    """Compute the log-softmax within groups of columns.

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
    head is fitted after the encoder, never by gradient: see `evaluation.lexical`.
    """

    def __init__(self, vocab_size: int, num_leaves: int):
        super().__init__()
        self.idf = nn.Parameter(torch.empty(vocab_size, dtype=torch.float32), requires_grad=False)
        self.weight = nn.Parameter(torch.empty(num_leaves, vocab_size, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(num_leaves, dtype=torch.float32), requires_grad=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Score token ids and their mask, (B, T) each, to (B, num_leaves). Ids beyond the vocabulary count for nothing."""
        input_ids = input_ids.to(self.idf.device)
        counted = input_ids < len(self.idf)
        if attention_mask is not None:
            counted = counted & attention_mask.to(counted.device).bool()
        # (B, T): equal ids side by side, and those that do not count at the end; a vector over the vocabulary would be mostly zeros
        ids = input_ids.where(counted, len(self.idf)).sort(1).values
        is_first = nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
        group = is_first.long().cumsum(1) - 1
        ones = torch.ones_like(ids, dtype=torch.float32)
        counts = torch.zeros_like(ones).scatter_add(1, group, ones)
        known = is_first & (ids < len(self.idf))
        ids = ids.where(known, 0)
        tfidf = (1 + counts.gather(1, group).log()) * self.idf[ids].float() * known  # once for each token of a text
        tfidf = nn.functional.normalize(tfidf)
        if torch.compiler.is_exporting():  # ONNX has no weighted embedding_bag
            scores = (self.weight[:, ids].float() * tfidf).sum(2).T
        else:
            weight = self.weight.T.float()  # (V, num_leaves)
            scores = nn.functional.embedding_bag(ids, weight, per_sample_weights=tfidf, mode="sum")
        return scores + self.bias.float()


class TreeSoftmax(nn.Module):
    """Normalise scores within each decision of a taxonomy. It has no parameters.

    `evaluation.calibration` uses it in float64, on the logits of a whole split.
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
        nodes = torch.arange(self.num_nodes)  # the group of a node's children; of a leaf, one beyond the last
        self.below.copy_(torch.where(nodes < self.num_leaves, self.num_groups, nodes - self.num_leaves + 1))

    def with_inclusive_values(self, own: Tensor) -> Tensor:
        """Add to the scores (B, N) of inner nodes the logsumexp of their children's scores."""
        scores = own
        for _ in range(self.tree.depth - 1):  # they rise a level each time
            inclusive = segment_logsumexp(scores, self.group, self.num_groups)
            scores = own + nn.functional.pad(inclusive, (0, 1))[:, self.below]
        return scores

    def node_log_probs(self, scores: Tensor) -> Tensor:
        """Return log-probabilities (B, N) of the nodes, where each decision is the softmax of its scores (B, N)."""
        conditional = segment_log_softmax(scores, self.group, self.num_groups)  # (B, N): log P(node | parent)
        padded = nn.functional.pad(conditional, (0, 1))  # the padding's ancestor is the last column, a zero
        total = padded[:, self.ancestors[:, 0]]
        for level in range(1, self.tree.depth):  # at once they would take (B, N, depth)
            total = total + padded[:, self.ancestors[:, level]]
        return total


class HierarchicalHeads(TreeSoftmax):
    """All decisions of a taxonomy at once: (B, hidden_size) to (B, num_nodes) log-probabilities.

    A node's score is linear in the text's vector. An inner node adds the logsumexp of its children's scores, its
    inclusive value (the nested logit: McFadden, 1978, "Modelling the choice of residential location"). Siblings share one
    softmax. Without the inner nodes' own weights this is a flat softmax over the leaves; with them, leaves share what
    their ancestors learn.

    A lexical head takes part in each decision. Its log-probabilities of the siblings, times its weight, are added to those
    of the encoder (a product of experts, which is then normalised: Hinton, 2002).
    """

    def __init__(self, config: HierarchicalConfig):
        super().__init__(config.tree)
        self.temperatures, self.lexical_weight = config.temperatures, config.lexical_weight
        self.dropout = nn.Dropout(config.head_dropout)
        # in float32, whatever the model is made in; so are the temperatures
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
        """Return log-probabilities (B, num_nodes) of vectors (B, hidden_size). The lexical head takes tokens and mask (B, T)."""
        with torch.autocast(pooled.device.type, enabled=False):
            own = nn.functional.linear(self.dropout(pooled.to(self.weight.dtype)), self.weight, self.bias)
            scores = self.with_inclusive_values(own.float())
            if self.lexical is not None:
                leaves = self.lexical(input_ids, attention_mask)
                words = self.with_inclusive_values(nn.functional.pad(leaves, (0, self.num_nodes - self.num_leaves)))
                scores = scores + self.lexical_weight * words
            return self.node_log_probs(scores / self.temperature)


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
            encoder = build_encoder(config.text_config)
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
        """Return whether a PEFT adapter is injected into the encoder."""
        return hasattr(self.encoder, "peft_config")

    def pool(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Pool token vectors (B, T, H) under a mask (B, T) to (B, H), in float32."""
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
        """Return the log-probabilities of every node, and the loss where labels are given.

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
        """Load a whole model, or the encoder by its name and revision and then the adapter and heads of the checkpoint.

        Takes what `PreTrainedModel.from_pretrained` takes. With an adapter checkpoint, ``dtype``, ``device_map``,
        ``quantization_config`` and ``attn_implementation`` go to the encoder; the heads stay in float32 beside it.

        Args:
            merge_adapter: add a LoRA adapter to the weights that it adapts, where they are floating-point numbers in
                memory. With False, or over quantized weights, PEFT keeps it beside them; weights that an adapter belongs to
                cannot be offloaded.
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
        """Put a calibration into the configuration, and its temperatures into the heads.

        Args:
            temperatures, conformal_thresholds, conformal_max_length: as in `HierarchicalConfig`.
        """
        self.config.temperatures = self.heads.temperatures = temperatures
        self.config.conformal_thresholds = conformal_thresholds
        self.config.conformal_max_length = conformal_max_length
        self.heads.fill_buffers()

    def set_lexical_head(self, weights: dict[str, Tensor] | None, lexical_weight: float = 1.0) -> None:
        """Give the model a lexical head, or with None remove it.

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

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a checkpoint that `from_pretrained` and the Auto classes load, with the code that loads it.

        It has the adapter form when the encoder carries an adapter, else it is the whole model.
        """
        save_checkpoint(self, super().save_pretrained, Path(save_directory), is_main_process, state_dict, **kwargs)

    merge_adapter = merge_injected_adapter
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
