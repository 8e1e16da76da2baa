"""A text encoder with a head for each decision of a taxonomy: one path per text, or any number of
nodes.

Worth knowing:

1. The heads are one matrix over all nodes, normalised for all decisions at once. A taxonomy of a
   thousand nodes therefore costs about as much as one of ten. P(node) = P(parent) · P(node |
   parent) holds by construction.
2. What the scores of the heads mean is in `decisions_hierarchical`: siblings share a softmax, or
   each node is a binary decision.
3. ``logits`` serve flat tools unchanged: their softmax is the leaf distribution. For multi-label
   models, their sigmoids are the probabilities of all nodes.
4. The heads are parameters of their own module, not an ``nn.Linear``, so no ``quantization_config``
   reaches them.
5. The heads' buffers are not saved. ``_init_weights`` refills them from the configuration, because
   transformers builds models on the meta device.
6. A text longer than the encoder's window is encoded as several windows, and pooled over the tokens
   of all of them, as in PLM-ICD (Huang, Tsai and Chen, 2022, "PLM-ICD: Automatic ICD coding with
   pretrained language models"). Its windows follow from its own tokens, never from the batch.
"""

import math
import os
from collections.abc import Collection
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import can_return_tuple

try:
    from .checkpoint_hierarchical import (
        build_encoder,
        load_checkpoint,
        position_limit,
        project,
        record_self_test,
        save_checkpoint,
        share_encoder,
    )
    from .configuration_hierarchical import Calibration, HierarchicalConfig, read_tree
    from .decisions_hierarchical import Decisions, build_decisions, calibrate
    from .open_world_hierarchical import OpenWorld
    from .taxonomy_hierarchical import Taxonomy
except ImportError:  # as a top-level module of the repository, not as remote code of a checkpoint
    from checkpoint_hierarchical import (
        build_encoder,
        load_checkpoint,
        position_limit,
        project,
        record_self_test,
        save_checkpoint,
        share_encoder,
    )
    from configuration_hierarchical import Calibration, HierarchicalConfig, read_tree
    from decisions_hierarchical import Decisions, build_decisions, calibrate
    from open_world_hierarchical import OpenWorld
    from taxonomy_hierarchical import Taxonomy

# never runs, but makes transformers fetch the file, which `save_pretrained` copies
if TYPE_CHECKING:
    from .pipeline_hierarchical import HierarchicalTextClassificationPipeline  # noqa: F401


# of several windows in one call of the encoder, twice as many in training: they bound its memory
TOKENS_AT_ONCE = 4096
SCORES_AT_ONCE = 2**22  # numbers of label attention: more are computed in chunks of nodes
ENTRIES_AT_ONCE = 2**26  # of the lexical head, times texts: texts beyond them are scored in parts
FAMILY_WIDTH = 16  # nodes that are scored together from one vector of a text


@dataclass
class HierarchicalOutput(SequenceClassifierOutput):
    """Output of `HierarchicalForSequenceClassification`.

    ``logits`` are the log-probabilities of the leaves (B, num_leaves). For multi-label models they
    are the logits of the nodes' marginal probabilities (B, num_nodes). ``decision_logits`` are the
    scores of the decisions: the softmax among siblings, or for multi-label models the sigmoid, is
    P(node | parent). ``vectors`` are the means of the texts' tokens and, in the last column, the
    energies of the encoder's own scores, if ``output_vectors`` was given.
    """

    node_log_probs: Tensor | None = None  # (B, num_nodes), leaves first
    decision_logits: Tensor | None = None  # (B, num_nodes)
    vectors: Tensor | None = None  # (B, hidden_size + 1)


class LexicalHead(nn.Module):
    """Linear classifier over the bag of tokens, beside the encoder. Classes are the leaves, or for
    multi-label models all nodes.

    Token weights are TF-IDF, (1 + log count) · idf, and a text's vector has length 1, as in
    scikit-learn's `TfidfTransformer` with ``sublinear_tf``. `evaluation.lexical` multiplies ``idf``
    by the variance of the token's log-odds over the classes. It fits the head after training,
    without backpropagation.

    Attributes:
        idf, bias: (V,) and (num_classes,).
        weight: the weights that are not 0, for one token after the other, (num_entries,).
        classes: the class of each weight, (num_entries,).
        counts: the number of weights of each token, (V,).
    """

    classes: Tensor
    counts: Tensor

    def __init__(self, vocab_size: int, num_classes: int, num_entries: int):
        super().__init__()
        for name, size in {"idf": vocab_size, "weight": num_entries, "bias": num_classes}.items():
            value = torch.empty(size, dtype=torch.float32)
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        # whole numbers are buffers, which keep their dtype: weights are loaded and moved in others
        for name, size in {"classes": num_entries, "counts": vocab_size}.items():
            self.register_buffer(name, torch.empty(size, dtype=torch.int32))

    @classmethod
    def of_weights(cls, idf: Tensor, weight: Tensor, bias: Tensor) -> "LexicalHead":
        """Build a head from weights of all classes and tokens, (num_classes, V), dense or
        sparse.
        """
        entries = weight.T.to_sparse().coalesce()
        tokens, classes = entries.indices()
        head = cls(len(idf), len(bias), len(classes))
        counts = torch.bincount(tokens, minlength=len(idf))
        head.load_state_dict(
            {
                "idf": idf,
                "weight": entries.values(),
                "bias": bias,
                "classes": classes,
                "counts": counts,
            }
        )
        return head

    def weights(self) -> dict[str, Tensor]:
        """Return the arguments of `of_weights`, where ``weight`` is sparse."""
        tokens = torch.arange(len(self.idf), device=self.weight.device)
        tokens = tokens.repeat_interleave(self.counts.long())
        places = torch.stack([self.classes.long(), tokens])
        size = (len(self.bias), len(self.idf))
        weight = torch.sparse_coo_tensor(places, self.weight, size, check_invariants=True)
        return {"idf": self.idf, "weight": weight, "bias": self.bias}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return scores (B, num_classes) of token ids and a mask (B, T).

        Ids beyond the vocabulary are ignored.
        """
        input_ids = input_ids.to(self.idf.device)
        vocab_size = len(self.idf)
        counted = input_ids < vocab_size
        if attention_mask is not None:
            counted = counted & attention_mask.to(counted.device).bool()

        # ── TF-IDF of each text's distinct tokens, at the first of equal ids; 0 elsewhere ─────────
        ids = input_ids.where(counted, vocab_size).sort(1).values
        is_first = nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
        group = is_first.long().cumsum(1) - 1
        ones = torch.ones_like(ids, dtype=torch.float32)
        counts = torch.zeros_like(ones).scatter_add(1, group, ones).gather(1, group)
        is_token = is_first & (ids < vocab_size)
        ids = ids.where(is_token, 0)
        tfidf = nn.functional.normalize((1 + counts.log()) * self.idf[ids].float() * is_token)

        # ── Product with the weights ──────────────────────────────────────────────────────────────
        if torch.compiler.is_exporting():
            return self.add_up(ids, tfidf)
        step = max(1, ENTRIES_AT_ONCE // max(1, len(self.weight)))
        return torch.cat(
            [self.add_up(*part) for part in zip(ids.split(step), tfidf.split(step), strict=True)]
        )

    def add_up(self, ids: Tensor, tfidf: Tensor) -> Tensor:
        """Return scores (B, num_classes) from token ids and their TF-IDF (B, T), by the weights
        of these tokens alone.
        """
        num_texts, length = ids.shape
        ids = ids.flatten()
        values = tfidf.flatten()
        of_tokens = self.counts.long()
        counts = of_tokens[ids] * (values != 0)
        source = torch.repeat_interleave(
            torch.arange(num_texts * length, device=ids.device), counts
        )
        number = (
            torch.arange(source.shape[0], device=ids.device) - (counts.cumsum(0) - counts)[source]
        )
        entry = (of_tokens.cumsum(0) - of_tokens)[ids[source]] + number
        target = source // length * len(self.bias) + self.classes[entry].long()
        scores = self.bias.float().repeat(num_texts)
        return scores.scatter_add(0, target, values[source] * self.weight[entry].float()).view(
            num_texts, -1
        )


# ── Windows ───────────────────────────────────────────────────────────────────────────────────────


class Tokens(NamedTuple):
    """The encoded tokens of texts, in rows of one text or of one window of a text.

    Attributes:
        vectors: (K, W, H).
        mask: which are no padding, (K, W), or None if all are.
        num_texts: B.
        text_of: the text of each row, (K,), or None if each text is one row.
    """

    vectors: Tensor
    mask: Tensor | None
    num_texts: int
    text_of: Tensor | None = None

    def to(self, device: torch.device) -> "Tokens":
        moved = {
            name: value.to(device)
            for name, value in self._asdict().items()
            if isinstance(value, Tensor)
        }
        return self._replace(**moved)

    def sum_over_texts(self, values: Tensor) -> Tensor:
        """Sum values (K, D) over the rows of each text, (B, D)."""
        if self.text_of is None:
            return values
        sums = values.new_zeros(self.num_texts, values.shape[1])
        return sums.scatter_add(0, self.text_of[:, None].expand_as(values), values)


def cut_into_windows(
    mask: Tensor, window: int, num_before: int, num_after: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut texts, given by their attention mask (B, T), into windows of nearly equal length, at most
    ``window`` tokens.

    A text that fits into one window stays as it is. Others have ``num_before`` special tokens at
    their start and ``num_after`` at their end, which each of their windows gets. Sizes are computed
    from the mask, so that the graph can be exported.

    Returns:
        The text of each window, (K,). Which tokens are no padding, (K, W), padded on the right. The
        column of each token in the texts, (K, W); in a text of several windows, -1, -2, … stand for
        the special tokens, those at the start first.
    """
    tokens = mask.bool()
    num_texts, length = tokens.shape
    columns = torch.arange(length, device=mask.device).expand(num_texts, -1)
    # the columns of each text's tokens, in their order; padding goes to a further column
    places = (tokens.long().cumsum(1) - 1).where(tokens, length)
    in_order = torch.zeros(num_texts, length + 1, dtype=torch.long, device=mask.device).scatter(
        1, places, columns
    )

    # ── How many windows, and which part of the text each has ─────────────────────────────────────
    count = tokens.sum(1)
    room = window - num_before - num_after
    is_cut = count > window
    before = num_before * is_cut.long()
    after = num_after * is_cut.long()
    content = count - before - after
    windows = torch.where(is_cut, (content + room - 1) // room, 1)
    text_of = torch.repeat_interleave(torch.arange(num_texts, device=mask.device), windows)
    number = (
        torch.arange(text_of.shape[0], device=mask.device) - (windows.cumsum(0) - windows)[text_of]
    )
    before, content, windows, after = (
        values[text_of] for values in (before, content, windows, after)
    )
    start = number * content // windows
    end = (number + 1) * content // windows
    lengths = before + end - start + after

    # ── The column of each token ──────────────────────────────────────────────────────────────────
    place = torch.arange(lengths.max().item(), device=mask.device).expand(text_of.shape[0], -1)
    of_text = in_order[text_of].gather(1, (start[:, None] + place).clamp(max=length))
    from_end = place - (lengths - after)[:, None]  # 0 for the first special token at the end
    column = torch.where(place < before[:, None], -1 - place, of_text)
    column = torch.where(
        (from_end >= 0) & (from_end < after[:, None]), -1 - num_before - from_end, column
    )
    return text_of, place < lengths[:, None], column


class HierarchicalHeads(nn.Module):
    """All decisions of a taxonomy at once: (B, hidden_size), or with label attention
    (B, T, hidden_size), to (B, num_nodes).

    A node's score is linear in the text's vector. With label attention, each node has its own
    vector of the text: a weighted mean of the token vectors h. The weights are softmax(h · q /
    √hidden_size) over the tokens, for the node's query q (Mullenbach et al., 2018, "Explainable
    prediction of medical codes from clinical text"). Queries start at 0, which is mean pooling.
    With family attention, the leaves below a parent share its query, so there are fewer weighted
    means to compute.

    With one path a text, an inner node adds its inclusive value, the logsumexp of its children's
    scores (the nested logit: McFadden, 1978, "Modelling the choice of residential location").
    Without the inner nodes' own weights this is a flat softmax over the leaves. With them, leaves
    share their ancestors' weights. For multi-label models, the score stays as it is.

    A lexical head takes part in each decision: its weighted scores are added to the encoder's (a
    product of experts: Hinton, 2002). The calibration applies to the sum.
    """

    def __init__(self, config: HierarchicalConfig):
        super().__init__()
        self.config = config
        self.decisions = build_decisions(config.tree, config.problem_type)
        self.num_nodes = self.decisions.num_nodes
        self.dropout = nn.Dropout(config.head_dropout)
        # weights and calibration are float32, whatever the default dtype is
        self.weight = nn.Parameter(
            torch.empty(self.num_nodes, config.hidden_size, dtype=torch.float32)
        )
        self.bias = nn.Parameter(torch.empty(self.num_nodes, dtype=torch.float32))
        self.query = None
        if config.pooling in ("label_attention", "family_attention"):
            self.blocks = self.query_blocks(config.pooling == "family_attention")
            num_queries = 1 + max(self.blocks["query_of"])
            self.query = nn.Parameter(
                torch.empty(num_queries, config.hidden_size, dtype=torch.float32)
            )
            for name, values in self.blocks.items():
                self.register_buffer(name, torch.tensor(values), persistent=False)
        for name in ("scale", "shift"):
            self.register_buffer(
                name, torch.empty(self.num_nodes, dtype=torch.float32), persistent=False
            )
        self.lexical = None
        if config.lexical_vocab_size is not None:
            sizes = (config.lexical_vocab_size, self.decisions.num_classes, config.lexical_entries)
            self.lexical = LexicalHead(*sizes)
        self.open_world = None
        if config.open_world is not None:
            self.open_world = OpenWorld(config.tree, config.hidden_size, config.open_world)
        self.fill_buffers()

    def fill_buffers(self) -> None:
        calibration = self.config.calibration
        self.decisions.fill_tree_buffers()
        self.scale.copy_(torch.tensor(calibration.scales or [1.0] * self.num_nodes))
        self.shift.copy_(torch.tensor(calibration.biases or [0.0] * self.num_nodes))
        if self.query is not None:
            for name, values in self.blocks.items():
                self.get_buffer(name).copy_(torch.tensor(values))

    # ── Label attention ───────────────────────────────────────────────────────────────────────────

    def query_blocks(self, shared: bool) -> dict[str, list]:
        """Divide the nodes into K blocks of at most `FAMILY_WIDTH` nodes with the same query.

        Args:
            shared: whether a leaf has the query of its parent.

        Returns:
            ``query_of``, the number of each node's query, (N,). ``block_query``, that of each
            block, (K,). ``block_nodes``, the nodes of each block, padded with the first,
            (K, width). ``block_place``, where each node is among these, (N,).
        """
        tree = self.decisions.tree
        families: dict[int, list[int]] = {}  # by the node that has the query
        for node, parent in enumerate(tree.parents):
            owner = parent if shared and node < tree.num_leaves and parent >= 0 else node
            families.setdefault(owner, []).append(node)
        blocks = [
            (query, nodes[start : start + FAMILY_WIDTH])
            for query, nodes in enumerate(families.values())
            for start in range(0, len(nodes), FAMILY_WIDTH)
        ]
        width = max(len(nodes) for _, nodes in blocks)
        padded = [nodes + nodes[:1] * (width - len(nodes)) for _, nodes in blocks]
        query_of = {node: query for query, nodes in blocks for node in nodes}
        place = {node: i for i, node in enumerate(chain.from_iterable(padded))}
        return {
            "query_of": [query_of[node] for node in range(self.num_nodes)],
            "block_query": [query for query, _ in blocks],
            "block_nodes": padded,
            "block_place": [place[node] for node in range(self.num_nodes)],
        }

    def attend(self, tokens: Tokens, blocks: slice) -> Tensor:
        """Score the tokens of texts by label attention, without biases, for some blocks of
        nodes: (B, blocks · width).
        """
        query: Any = self.query
        vectors = tokens.vectors
        query = query[self.block_query[blocks]]
        # (K, W, blocks)
        attention = nn.functional.linear(vectors, query) / vectors.shape[-1] ** 0.5
        if tokens.mask is not None:
            padding = tokens.mask.to(vectors.device).unsqueeze(-1) == 0
            attention = attention.masked_fill(padding, torch.finfo(attention.dtype).min)
        if tokens.text_of is None:
            means = attention.softmax(1).transpose(1, 2) @ vectors  # (B, blocks, H)
        else:  # a softmax over the tokens of all windows of a text
            index = tokens.text_of[:, None].expand(-1, attention.shape[2])
            peak = attention.new_full((tokens.num_texts, attention.shape[2]), -torch.inf)
            peak = peak.scatter_reduce(0, index, attention.detach().amax(1), "amax")
            weights = (attention - peak[tokens.text_of][:, None]).exp()
            sums = tokens.sum_over_texts((weights.transpose(1, 2) @ vectors).flatten(1))
            means = (
                sums.unflatten(1, (-1, vectors.shape[2]))
                / tokens.sum_over_texts(weights.sum(1))[..., None]
            )
        # (blocks, B, width)
        scores = means.transpose(0, 1) @ self.weight[self.block_nodes[blocks]].transpose(1, 2)
        return scores.transpose(0, 1).flatten(1)

    def own_scores(self, vectors: Tensor | Tokens) -> Tensor:
        """Score vectors of texts (B, H), or with label attention their tokens, without the
        lexical head: (B, num_nodes).
        """
        if isinstance(vectors, Tensor):
            return nn.functional.linear(
                self.dropout(vectors.to(self.weight.dtype)), self.weight, self.bias
            ).float()
        tokens = vectors._replace(vectors=self.dropout(vectors.vectors.to(self.weight.dtype)))
        if torch.compiler.is_exporting():
            scores = self.attend(tokens, slice(None))
        else:
            num_rows, *sizes = tokens.vectors.shape
            step = max(1, SCORES_AT_ONCE // (num_rows * max(sizes)))
            starts = range(0, len(self.block_query), step)
            scores = torch.cat(
                [self.attend(tokens, slice(start, start + step)) for start in starts], 1
            )
        return scores[:, self.block_place].float() + self.bias

    # ── Nodes without training ────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def take_over(self, old: "HierarchicalHeads", known: dict[int, int], trains: bool) -> None:
        """Copy the heads of known nodes from those of another taxonomy, where ``known`` gives their
        ids.

        A node below other ancestors keeps the log-odds of its leaves: its own score makes up for
        what the ancestors pass down. With label attention this is impossible, because nodes have
        their own vectors of a text. Then these nodes keep their own scores if the model ``trains``
        afterwards, and else are a ValueError.
        """
        tree = self.decisions.tree
        new_ids = [*known]
        old_ids = [*known.values()]
        own = torch.cat([old.weight, old.bias[:, None]], 1)
        # -1 selects the padding
        passed = nn.functional.pad(old.decisions.passed_down(own.T), (0, 1)).T
        above = [
            next((known[a] for a in reversed(tree.path(node)[:-1]) if a in known), -1)
            for node in known
        ]
        # exactly 0 if nothing moved
        heads = own[old_ids] + (passed[old.decisions.parents[old_ids]] - passed[above])
        for i, (node, old_id) in enumerate(known.items()):
            # its leaves are merged
            if node < self.decisions.num_classes and old_id >= old.decisions.num_classes:
                leaves = old.decisions.tree.leaves_at_or_below[old_id]
                heads[i] = passed[leaves].mean(0) - passed[above[i]]
                heads[i, -1] += math.log(len(leaves))
        if self.query is not None and old.query is not None:
            if not (trains or torch.equal(heads, own[old_ids])):
                raise ValueError("with label attention, moved or merged nodes need training")
            query_of = self.blocks["query_of"]
            old_query_of = old.blocks["query_of"]
            taken = {query_of[node]: old_query_of[old_id] for node, old_id in sorted(known.items())}
            self.query[[*taken]] = old.query[[*taken.values()]]
            heads = own[old_ids]
        # a new inner node leaves the odds of the leaves below it as they are
        self.weight[self.decisions.num_classes :] = 0
        self.weight[new_ids] = heads[:, :-1]
        self.bias[new_ids] = heads[:, -1]

    def shares(self, old: Decisions, known: dict[int, int]) -> Tensor:
        """Return the share of each class of another taxonomy in each class, sparse,
        (num_classes, its num_classes).

        A known class has itself, or equal shares of the leaves that were below it. New classes have
        none.
        """
        places: list[tuple[int, int]] = []
        values: list[float] = []
        for node, old_id in known.items():
            if node < self.decisions.num_classes:
                is_class = old_id < old.num_classes
                sources = [old_id] if is_class else old.tree.leaves_at_or_below[old_id]
                places += [(node, source) for source in sources]
                values += [1 / len(sources)] * len(sources)
        indices = torch.tensor(places, dtype=torch.long).view(-1, 2).T
        size = (self.decisions.num_classes, old.num_classes)
        return torch.sparse_coo_tensor(indices, torch.tensor(values), size, check_invariants=True)

    def forward(
        self,
        vectors: Tensor | Tokens,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the scores of the decisions (B, num_nodes), and the encoder's own, without
        calibration and lexical head.

        ``input_ids`` and their mask are for the lexical head.
        """
        device = vectors.device if isinstance(vectors, Tensor) else vectors.vectors.device
        with torch.autocast(device.type, enabled=False):
            own = self.decisions.inclusive(self.own_scores(vectors))
            lexical = None
            if self.lexical is not None:
                lexical = self.decisions.of_classes(self.lexical(input_ids, attention_mask))
            return calibrate(
                own, lexical, self.config.calibration.lexical_weight, self.scale, self.shift
            ), own


class HierarchicalForSequenceClassification(PreTrainedModel):
    """Any text encoder of transformers, pooled, with hierarchical heads.

    By default the encoder is newly initialised.

    Attributes:
        new_nodes: nodes whose heads a Trainer of this project initialises before training.
    """

    new_nodes: Collection[int] = ()

    config_class = HierarchicalConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: HierarchicalConfig, encoder: PreTrainedModel | None = None):
        super().__init__(config)
        if encoder is None:
            encoder = build_encoder(config.text_config)
        else:
            for module in encoder.modules():
                # else post_init would reinitialise an injected adapter
                module._is_hf_initialized = True
        self.encoder = encoder
        # one object, so that resized embeddings and attention choices are saved
        config.text_config = encoder.config
        self.heads = HierarchicalHeads(config)
        self.window = config.window or position_limit(encoder)  # None: of any length
        # FSDP needs equally many calls of the encoder in all processes
        self.encodes_at_once = False
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, HierarchicalHeads):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
            if module.query is not None:
                init.zeros_(module.query)
            module.fill_buffers()
        elif isinstance(module, (LexicalHead, OpenWorld)):
            for tensor in chain(module.parameters(), module.buffers()):
                init.zeros_(tensor)
        else:
            super()._init_weights(module)

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.encoder, "peft_config")

    def encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tokens, Any]:
        """Encode the tokens of texts, by windows if a text is longer than one. Arguments are those
        of `forward`.

        Returns:
            The encoded tokens, and the encoder's outputs, None if there are several windows.
        """
        given: Any = input_ids if inputs_embeds is None else inputs_embeds
        name = "input_ids" if inputs_embeds is None else "inputs_embeds"
        num_texts, length = given.shape[:2]
        if torch.compiler.is_exporting():  # the graph must not depend on the length of its example
            is_one_window = self.window is None or self.config.tokens_before is None
        else:
            is_one_window = self.window is None or length <= self.window
        if is_one_window:
            outputs = self.encoder(**{name: given}, attention_mask=attention_mask, **kwargs)
            return Tokens(outputs.last_hidden_state, attention_mask, num_texts), outputs
        token_type_ids = kwargs.pop("token_type_ids", None)
        kwargs.pop("position_ids", None)  # each window counts its positions anew
        self.check_windows(token_type_ids, kwargs)
        if attention_mask is None:
            attention_mask = torch.ones(num_texts, length, dtype=torch.long, device=given.device)
        before = self.config.tokens_before or []
        after = self.config.tokens_after or []
        text_of, mask, column = cut_into_windows(
            attention_mask, self.window, len(before), len(after)
        )

        # ── Inputs of each window ─────────────────────────────────────────────────────────────────
        is_special = column < 0
        source = column.clamp(min=0)
        # (K, W)
        special = torch.tensor([*before, *after, 0], device=given.device)[
            (-1 - column).clamp(min=0)
        ]
        if inputs_embeds is not None:
            special = self.get_input_embeddings()(special).to(given.dtype)
            is_special = is_special[..., None]
            source = source[..., None].expand(-1, -1, given.shape[2])
        inputs = {name: special.where(is_special, given[text_of].gather(1, source))}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids.expand(num_texts, -1)[text_of].gather(
                1, column.clamp(min=0)
            )
        inputs["attention_mask"] = mask.to(attention_mask.dtype)
        return Tokens(self.encode_windows(inputs, kwargs), mask, num_texts, text_of), None

    def encode_windows(self, inputs: dict[str, Tensor], kwargs: dict[str, Any]) -> Tensor:
        """Encode windows (K, W), a limited number of tokens at once: (K, W, H)."""

        def encode(*values: Tensor) -> Tensor:
            return self.encoder(
                **dict(zip(inputs, values, strict=True)), **kwargs
            ).last_hidden_state

        if torch.compiler.is_exporting() or self.encodes_at_once:
            return encode(*inputs.values())
        trains = torch.is_grad_enabled()
        step = max(1, (2 if trains else 1) * TOKENS_AT_ONCE // inputs["attention_mask"].shape[1])
        chunks = [*zip(*(values.split(step) for values in inputs.values()), strict=True)]
        if len(chunks) > 1 and trains:  # the activations of one chunk at a time
            return torch.cat([checkpoint(encode, *chunk, use_reentrant=False) for chunk in chunks])
        return torch.cat([encode(*chunk) for chunk in chunks])

    def check_windows(self, token_type_ids: Tensor | None, kwargs: dict[str, Any]) -> None:
        """Raise ValueError for texts beyond one window that cannot be cut."""
        where = f"beyond {self.window} tokens, the encoder's window,"
        if self.config.tokens_before is None:
            raise ValueError(
                f"{where} the special tokens of a window are needed, and this checkpoint "
                "does not name them"
            )
        if any(kwargs.get(name) for name in ("output_hidden_states", "output_attentions")):
            raise ValueError(
                f"{where} there are no hidden states or attentions of a text as a whole: "
                "truncate the text"
            )
        if (
            token_type_ids is not None
            and not torch.compiler.is_exporting()
            and token_type_ids.any()
        ):
            raise ValueError(f"{where} pairs of texts cannot be read: truncate them")

    def pool(self, tokens: Tokens) -> Tensor:
        """Pool the tokens of texts to (B, H), in float32. With label attention, return the mean."""
        if self.config.pooling != "cls":
            return self.mean(tokens)
        first = tokens.vectors[:, 0].float()
        return tokens.sum_over_texts(first) / tokens.sum_over_texts(torch.ones_like(first[:, :1]))

    @staticmethod
    def mean(tokens: Tokens) -> Tensor:
        """Return the means of the texts' tokens, (B, H), in float32."""
        hidden = tokens.vectors
        if tokens.mask is None:
            return hidden.float().mean(1)
        mask = tokens.mask.to(hidden.device, torch.float32).unsqueeze(-1)  # (K, W, 1)
        sums = (hidden.float() * mask).sum(1)
        counts = mask.sum(1)
        return tokens.sum_over_texts(sums) / tokens.sum_over_texts(counts).clamp(min=1)

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
        output_vectors: bool = False,
        **kwargs: Any,
    ) -> HierarchicalOutput:
        """Return the log-probabilities of all nodes, and the loss if labels are given.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids: (B, T).
            inputs_embeds: (B, T, H), instead of ``input_ids``, which only a lexical head then
                reads.
            labels: (B,), ids of leaves or inner nodes. The loss is their negative log-likelihood in
                nats. For multi-label models (B, num_nodes): 1 for the text's nodes and their
                ancestors, else 0. The loss is the binary cross-entropy of the probabilities, summed
                over a text's nodes. Labels of -100 add nothing.
            num_items_in_batch: divisor of the summed loss, by default the number of texts.
            output_vectors: whether to return ``vectors``, which `OpenWorld` reads.
            kwargs: for the encoder, such as ``output_hidden_states`` and ``output_attentions``.
        """
        # ── Encoder ───────────────────────────────────────────────────────────────────────────────
        optional = {"token_type_ids": token_type_ids, "position_ids": position_ids}
        kwargs |= {name: value for name, value in optional.items() if value is not None}
        # requested when the model was loaded
        for name in ("output_hidden_states", "output_attentions"):
            if getattr(self.config, name, False):
                kwargs.setdefault(name, True)
        if self.heads.lexical is not None and input_ids is None:
            raise ValueError(
                "this model has a lexical head, which needs input_ids: give these, too"
            )
        tokens, encoded = self.encode(input_ids, attention_mask, inputs_embeds, **kwargs)

        # ── Heads ─────────────────────────────────────────────────────────────────────────────────
        vectors = self.pool(tokens) if self.heads.query is None else tokens
        if not self.heads.weight.is_meta:  # offloaded heads move their inputs themselves
            vectors = vectors.to(self.heads.weight.device)
        scores, own = self.heads(vectors, input_ids, attention_mask)
        described = None
        if output_vectors:
            mean = vectors if self.config.pooling == "mean" else self.mean(tokens).to(own.device)
            described = torch.cat([mean, self.heads.decisions.energy(own)[:, None]], 1)
        node_log_probs, logits = self.heads.decisions(scores)
        return HierarchicalOutput(
            loss=None
            if labels is None
            else self.heads.decisions.loss(scores, labels, num_items_in_batch),
            logits=logits,
            node_log_probs=node_log_probs,
            decision_logits=scores,
            vectors=described,
            hidden_states=None if encoded is None else encoded.hidden_states,
            attentions=None if encoded is None else encoded.attentions,
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        config: Any = None,
        merge_adapter: bool = True,
        **kwargs: Any,
    ) -> "HierarchicalForSequenceClassification":
        """Load a checkpoint. In the adapter form, its encoder is fetched by name and revision.

        With ``merge_adapter``, a LoRA adapter is added to the weights that it adapts, if they are
        floating-point. Else PEFT keeps it separate. Other arguments are those of
        `PreTrainedModel.from_pretrained`. In the adapter form, ``dtype``, ``device_map``,
        ``quantization_config`` and ``attn_implementation`` go to the encoder.
        """
        load_self_contained = super().from_pretrained
        return load_checkpoint(
            cls, load_self_contained, pretrained_model_name_or_path, config, merge_adapter, **kwargs
        )

    def set_calibration(
        self,
        calibration: Calibration,
        lexical: dict[str, Tensor] | None = None,
        open_world: OpenWorld | None = None,
    ) -> None:
        """Set the calibration, the lexical head that it weights or None, and what measures how
        strange texts are or None.

        The lexical head is given by the arguments of `LexicalHead.of_weights`.
        """
        fitted = (calibration.stored() or {}).keys() - {"max_length"}
        if fitted and calibration.heads is None:
            calibration = replace(calibration, heads=[*project(self.heads.weight)])
        self.config.calibration = calibration
        self.heads.lexical = None
        self.config.lexical_vocab_size = self.config.lexical_entries = None
        # a copy: a module that two models share moves with either
        own = deepcopy(open_world)
        self.heads.open_world = None if own is None else own.to(self.heads.weight.device)
        self.config.open_world = None if open_world is None else len(open_world.references)
        if lexical is not None:
            head = LexicalHead.of_weights(**lexical)
            self.heads.lexical = head.to(self.heads.weight.device)
            self.config.lexical_vocab_size = len(head.idf)
            self.config.lexical_entries = len(head.weight)
        self.heads.fill_buffers()
        if self.config.self_test is not None:
            self.record_self_test()

    def add_nodes(
        self,
        taxonomy: Taxonomy | list | dict,
        renamed: dict[str, str] | None = None,
        trains: bool = False,
    ) -> tuple[list[str], list[str]]:
        """Replace the taxonomy without training: nodes may be added, moved, renamed and removed.

        Known nodes (`Taxonomy.known_nodes`) keep their heads, and their parts of the lexical head
        and the calibration. Heads of new classes are random, so train them, or have ``train.py``
        set them. Prediction sets, the stored prior and p-values are removed, unless nodes are only
        renamed, and keep their order.

        Args:
            renamed: new names of nodes, by their present labels.
            trains: whether the model is trained afterwards. With label attention, moved and merged
                nodes need this.

        Returns:
            The labels of the new nodes, and of the removed nodes.

        Raises:
            ValueError: see `HierarchicalHeads.take_over`.
        """
        # ── Build: the model changes last, so that an error leaves it as it is ────────────────────
        tree = read_tree(taxonomy, self.config.label_separator)
        old = self.config.tree
        old_heads = self.heads
        calibration = self.config.calibration
        known = tree.known_nodes(old, renamed)
        lexical = None if old_heads.lexical is None else old_heads.lexical.weights()
        config = copy(self.config)
        open_world = old_heads.open_world
        config.calibration = Calibration()
        config.lexical_vocab_size = None
        config.open_world = None
        config.set_taxonomy(tree)
        heads = HierarchicalHeads(config).to(old_heads.weight.device).train(old_heads.training)
        self._init_weights(heads)  # initialize_weights() would draw a new adapter as well
        heads.take_over(old_heads, known, trains)
        if lexical is not None:
            shares = heads.shares(old_heads.decisions, known).to(lexical["bias"])
            lexical["weight"] = torch.sparse.mm(shares, lexical["weight"])
            lexical["bias"] = torch.mv(shares, lexical["bias"])
        only_renamed = (
            known == dict(enumerate(range(old.num_nodes))) and tree.parents == old.parents
        )
        if not only_renamed:
            open_world = None if open_world is None else open_world.of_nodes(tree, known)
            calibration = calibration.of_nodes(tree, old, known)

        # ── Change the model ──────────────────────────────────────────────────────────────────────
        if open_world is not None:
            open_world.tree = tree
        self.config = config
        self.heads = heads
        self.set_calibration(calibration, lexical, open_world)
        removed = {*range(old.num_nodes)} - {*known.values()}
        new = [label for node, label in enumerate(tree.labels) if node not in known]
        return new, [old.labels[node] for node in sorted(removed)]

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a checkpoint and the code that loads it: in adapter form if there is an adapter,
        else self-contained.
        """
        save_checkpoint(
            self,
            super().save_pretrained,
            Path(save_directory),
            is_main_process,
            state_dict,
            **kwargs,
        )

    def push_to_hub(self, *arguments: Any, **named: Any) -> Any:
        """Push to the Hub as transformers does.

        ValueError: the adapter's encoder is a local folder.
        """
        if self.has_adapter and os.path.isabs(self.config.encoder_name_or_path):
            raise ValueError(
                "the adapter's encoder is a folder of this machine: save the model, then "
                "run push_to_hub.py --merge"
            )
        return super().push_to_hub(*arguments, **named)

    share_encoder = share_encoder
    record_self_test = record_self_test
