"""Text in, path through the taxonomy out: `pipeline("hierarchical-text-classification", …)`.

Worth knowing:

1. Texts are read some batches ahead and sorted by length, so that batches hold little padding, and each holds about as
   many tokens. Results come in the order of the texts. The next texts are tokenized while a batch is computed.
   Batches come in few shapes: oneDNN compiles products for each, which takes longer than the products themselves.
2. On a CPU each core computes batches of its own: that a core waits for the others at the end of every operation costs
   more than it gains. With bfloat16, attention and the linear layers are faster ones, where the installed libraries have
   what these need (`cpu_hierarchical`).
3. A text beyond the limit is truncated, and its result says so; with ``stride`` it is read in overlapping windows instead.
4. The probabilities of windows are averaged. Sums survive an average, so children still add up to their parent.
5. With ``coverage`` the answer is a set of nodes that holds the correct leaf for that share of texts like the validation
   rows: split conformal prediction, with sets that a person can read. The guarantee of that method holds up to the choice
   of the checkpoint, which was made on the same rows; the model card has the coverage that was measured. It holds for texts
   truncated where the thresholds were fitted, so a coverage goes with no ``stride`` and no other ``max_length``.
6. A text that cannot be classified is a ValueError that names its position, never its content. In a list it is found
   before anything is computed; from a stream, the results before it come first.
"""

import copy
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Pipeline, PreTrainedModel
from transformers.utils import logging

try:
    from .checkpoint_hierarchical import check_tokenizer, position_limit
    from .taxonomy_hierarchical import Taxonomy
except ImportError:  # as a top-level module of the repository, not as remote code of a checkpoint
    from checkpoint_hierarchical import check_tokenizer, position_limit
    from taxonomy_hierarchical import Taxonomy

logger = logging.get_logger(__name__)

TOKENS = {"cpu": 2048}  # of a batch, padding included
TOKENS_ELSEWHERE = 32_768
TEXTS_AHEAD = 512
BATCHES_AHEAD = 32
MOST_TOKENIZERS = 8
MOST_NODES = 3  # in an answer: what a reader takes in at a glance
# the numbers of cores of calls that are starting workers; no lock, which Ctrl+C could leave locked
STARTING: list[int] = []


class HierarchicalTextClassificationPipeline(Pipeline):
    """Classify texts into a taxonomy.

    Called with a text it returns a result; with a list or tuple, a list; with any other iterable (a generator, a dataset,
    a `KeyDataset`) an iterator. An item may also be a mapping that holds the text under ``"text"``. A result is

    - ``label``, ``score``: the most probable leaf and its probability;
    - ``path``: ``{"label", "score"}`` of every node from the root to that leaf;
    - ``levels``: for each level, from the roots down, the probability of every node there;
    - ``truncated``: whether the text was truncated;
    - with ``coverage``, ``answer``: ``{"label", "score"}`` of at most three nodes, or of all roots, that hold the correct leaf
      for this share of texts: leaves where the model is sure, their parents and ancestors where it is not. See
      `conformal_answer`, and 5. at the head of this file for the guarantee.

    Args:
        batch_size: windows of text that go through the model together; by default a power of two, of about 2,048 tokens on a CPU
            and 32,768 elsewhere. A stream is read up to 64 batches ahead, by default 1,024 texts, and not at all with 1.
        top_k: the number of leaves wanted; each text then gets a list of results, best first.
        max_length: in tokens, special ones included; by default, and at most, the tokenizer's limit.
        stride: read long texts in windows of ``max_length`` tokens that share this many, instead of cutting them.
        coverage: the share of texts, between 0 and 1, whose answer shall hold the correct leaf; it is rounded up to a
            hundredth. Not together with ``stride``, nor with a ``max_length`` other than that of the validation rows.

    Raises:
        ValueError: an item is empty or not a text, an argument is out of its range, or ``coverage`` is asked of a
            checkpoint that was not calibrated, or for texts truncated otherwise than its thresholds were fitted.
    """

    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not self.tokenizer.is_fast:
            raise ValueError(
                "this pipeline needs a tokenizer of the `tokenizers` library, to follow texts into windows"
            )
        check_tokenizer(self.tokenizer, self.model)
        limit = position_limit(self.model.encoder)
        if limit is not None and self.tokenizer.model_max_length > limit:
            raise ValueError(
                f"the tokenizer's model_max_length {self.tokenizer.model_max_length:,} is beyond the encoder's {limit:,} "
                "positions: set it in tokenizer_config.json"
            )
        self.tree = self.model.config.tree  # built anew each time it is asked for
        self._tokenizers: dict[tuple[int, int], Any] = {}
        in_4_bits = any(getattr(weight, "quant_state", None) is not None for weight in self.model.parameters())
        if self.device.type == "cpu" and in_4_bits:
            # bitsandbytes repacks the weights in their first forward, which no two threads may do at once
            with torch.inference_mode():
                self.model(**self.tokenizer("a", return_tensors="pt"))
        if self.device.type == "cpu" and self.model.encoder.dtype == torch.bfloat16:
            use_cpu_kernels(self.model.encoder)
        self.preprocess(["a"])  # the tokenizer cuts as it will in every call, of whatever thread

    def _sanitize_parameters(
        self,
        top_k: int | None = None,
        max_length: int | None = None,
        stride: int | None = None,
        coverage: float | None = None,
        **unknown: Any,
    ) -> tuple[dict, dict, dict]:
        if unknown:
            known = "batch_size, top_k, max_length, stride and coverage"
            raise ValueError(f"{min(unknown)!r} is no argument of this pipeline; it has {known}")
        for name, value, least in (("top_k", top_k, 1), ("max_length", max_length, 1), ("stride", stride, 0)):
            if value is not None:
                check_number(name, value, least)
        given = {"max_length": max_length, "stride": stride}
        cutting = {name: value for name, value in given.items() if value is not None}
        if coverage is not None:
            conformal_threshold(self.model.config.conformal_thresholds, coverage)
        wanted = {"top_k": top_k, "coverage": coverage}
        return cutting, {}, {name: value for name, value in wanted.items() if value is not None}

    def __call__(self, inputs: str | Iterable, batch_size: int | None = None, **parameters: Any) -> Any:
        """See the class."""
        cutting, _, wanted = self._sanitize_parameters(**parameters)
        cutting, wanted = {**self._preprocess_params, **cutting}, {**self._postprocess_params, **wanted}
        window = self._window(**cutting)
        if wanted.get("coverage") is not None:
            self._check_guarantee(window, cutting.get("stride"))
        batch_size = self._batch_size if batch_size is None else batch_size
        if batch_size is not None:
            check_number("batch_size", batch_size, 1)
        if hasattr(inputs, "columns") and hasattr(inputs, "iloc"):
            raise ValueError("a table is no list of texts: give the column that holds them, such as table['text']")
        if isinstance(inputs, (list, tuple)):
            texts = [read_text(item, position) for position, item in enumerate(inputs)]
            return list(self._results(texts, batch_size, cutting, wanted))
        if isinstance(inputs, (str, bytes, Mapping)) or not (isinstance(inputs, Iterable) or is_sequence(inputs)):
            started = self._start([read_text(inputs, 0)], batch_size, cutting, None)
            return next(self._finish(started, wanted))
        return self._results(inputs, batch_size, cutting, wanted)

    def _results(self, items: Iterable, batch_size: int | None, cutting: dict, wanted: dict) -> Iterator:
        """Yield results in the order of the items. Some batches are read ahead."""
        numbered = enumerate(items if isinstance(items, Iterable) else (items[i] for i in range(len(items))))
        ahead = TEXTS_AHEAD if batch_size is None else 1 if batch_size == 1 else BATCHES_AHEAD * batch_size
        workers = self._workers()
        try:
            before = None  # is computed while the next texts are read and tokenized
            while True:
                texts, problem = [], None
                try:
                    for position, item in islice(numbered, ahead):
                        texts.append(read_text(item, position))
                except Exception as error:  # raised again below, after the results of the texts before it
                    problem = error
                alone = before is None and self._on_cores()
                started = self._start(texts, batch_size, cutting, workers, alone) if texts else None
                for one in (before, started if ahead == 1 or problem is not None else None):
                    if one is not None:
                        yield from self._finish(one, wanted)
                before = None if ahead == 1 else started
                if problem is not None:
                    raise problem
                if not texts:
                    return
        finally:
            workers.shutdown(cancel_futures=True)

    def _on_cores(self) -> bool:
        """Return whether the cores of a CPU compute, over weights that stay in memory."""
        return self.device.type == "cpu" and not hasattr(self.model, "hf_device_map")

    def _workers(self) -> ThreadPoolExecutor:
        """Start the threads that compute batches: on a CPU as many as it has cores for torch, each with one core; elsewhere one."""
        if not self._on_cores():
            return ThreadPoolExecutor(1)
        others = [*STARTING]  # in a new thread torch may answer with the 1 that another call's workers have just stored
        count = torch.get_num_threads()
        count = max([count, *others, *STARTING])
        ready = threading.Barrier(count + 1)

        def start() -> None:
            torch.get_num_threads()  # without it, the first operation would undo the next line
            torch.set_num_threads(1)
            ready.wait()

        workers = ThreadPoolExecutor(count)
        STARTING.append(count)
        try:
            for _ in range(count):
                workers.submit(start)
            ready.wait()
        except BaseException:  # Ctrl+C: a thread that waits would keep the process from ending
            ready.abort()
            raise
        finally:
            torch.set_num_threads(
                count
            )  # the number is each thread's own, but also what threads yet to come begin with
            STARTING.remove(count)
        return workers

    def _start(
        self,
        texts: list[str],
        batch_size: int | None,
        cutting: dict,
        workers: ThreadPoolExecutor | None,
        alone: bool = True,
    ) -> "Started":
        """Tokenize texts, and have their batches computed by ``workers``, or at once where there are none.

        Args:
            alone: no other batch is being computed, so that all cores of a CPU may share one: a single batch is computed at once.
        """
        windows, owners, truncated = self.preprocess(texts, **cutting)
        lengths = [len(window["input_ids"]) for window in windows]
        batches = batches_by_length(lengths, batch_size, TOKENS.get(self.device.type, TOKENS_ELSEWHERE))
        outputs: list[Future] = []
        for batch in batches:
            length = padded_length(lengths[batch[0]], len(batch), self.tokenizer.model_max_length)
            inputs = dict(
                self.tokenizer.pad(
                    [windows[i] for i in batch],
                    padding="max_length",
                    max_length=length,
                    padding_side="right",  # positions count from the first token, which is also what "cls" pools
                    return_attention_mask=True,
                    return_tensors="pt",
                )
            )
            if workers is not None and not (alone and len(batches) == 1):
                outputs.append(workers.submit(self.forward, inputs))
            else:
                outputs.append(Future())
                outputs[-1].set_result(self.forward(inputs))
        return Started(len(texts), [[owners[i] for i in batch] for batch in batches], truncated, outputs)

    def _finish(self, started: "Started", wanted: dict) -> Iterator:
        """Yield the results of texts, once their batches are computed. Average the probabilities of windows, in float64."""
        total = torch.zeros(started.num_texts, self.tree.num_nodes, dtype=torch.float64)
        windows = torch.zeros(started.num_texts, 1)
        for owners, output in zip(started.owners, started.outputs, strict=True):
            index = torch.tensor(owners)
            total.index_add_(0, index, output.result()["node_log_probs"].double().exp())
            windows.index_add_(0, index, torch.ones(len(owners), 1))
        for nodes, cut in zip((total / windows).tolist(), started.truncated, strict=True):
            yield self.postprocess({"nodes": nodes, "truncated": cut}, **wanted)

    def _window(self, max_length: int | None = None, stride: int | None = None) -> int:
        """Return the length of a window in tokens, checked against the encoder and the stride."""
        limit = self.tokenizer.model_max_length
        if max_length is not None and max_length > limit:
            raise ValueError(f"max_length {max_length} is beyond the model's limit of {limit} tokens")
        window, special = max_length or limit, self.tokenizer.num_special_tokens_to_add()
        if window <= special + (stride or 0):
            raise ValueError(
                f"a window of {window} tokens leaves no room for {special} special tokens and a stride of {stride or 0}"
            )
        return window

    def _check_guarantee(self, window: int, stride: int | None) -> None:
        """Raise ValueError where texts are truncated otherwise than the rows that the conformal thresholds were fitted to."""
        fitted = self.model.config.conformal_max_length or self.tokenizer.model_max_length
        if stride is not None or window != fitted:
            asked = f"at {window}" if stride is None else f"read in windows by stride={stride}"
            raise ValueError(
                f"coverage needs texts truncated at {fitted} tokens, where its thresholds were fitted, not {asked}: give "
                f"no stride, and max_length={fitted} or the tokenizer that was saved with the checkpoint"
            )

    def preprocess(
        self, texts: list[str], max_length: int | None = None, stride: int | None = None
    ) -> tuple[list[dict[str, list[int]]], list[int], list[bool]]:
        """Return the tokens of each window, the index of its text, and for each text whether it was truncated."""
        encoded = self._tokenize(texts, self._window(max_length, stride), stride or 0)
        wanted = dict.fromkeys([*self.tokenizer.model_input_names, "attention_mask"])
        names = [name for name in wanted if name in encoded]
        owners = encoded["overflow_to_sample_mapping"]
        windows, kept, counts = [], [], [0] * len(texts)
        for i, owner in enumerate(owners):
            counts[owner] += 1
            if stride is not None or counts[owner] == 1:
                if not encoded["input_ids"][i]:
                    raise ValueError("a text has no tokens: its characters mean nothing to the model's tokenizer")
                windows.append({name: encoded[name][i] for name in names})
                kept.append(owner)
        return windows, kept, [stride is None and count > 1 for count in counts]

    def _tokenize(self, texts: list[str], window: int, stride: int) -> Any:
        """Tokenize texts, split into windows.

        A fast tokenizer keeps as its state how it cuts. Calls in other threads may cut otherwise, so each way but the default
        has a tokenizer of its own.
        """
        wanted = {"truncation": True, "max_length": window, "stride": stride, "return_overflowing_tokens": True}
        wanted |= {"return_attention_mask": True, "verbose": False}
        default = (window, stride) == (self.tokenizer.model_max_length, 0)
        tokenizer = self.tokenizer if default else self._tokenizers.get((window, stride))
        if tokenizer is None:
            tokenizer = copy.deepcopy(self.tokenizer)
            tokenizer(["a"], **wanted)  # from here on, its state does not change
            while len(self._tokenizers) >= MOST_TOKENIZERS:
                self._tokenizers.pop(next(iter(self._tokenizers)), None)
            self._tokenizers[window, stride] = tokenizer
        return tokenizer(texts, **wanted)

    def _forward(self, model_inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"node_log_probs": self.model(**model_inputs)["node_log_probs"]}

    def get_inference_context(self) -> type:
        return torch.inference_mode

    def postprocess(
        self, classified: dict, top_k: int | None = None, coverage: float | None = None
    ) -> dict | list[dict]:
        """Build a result, or with ``top_k`` a list of them, from the probabilities of the nodes. The class describes it."""
        tree, nodes = self.tree, classified["nodes"]
        if math.isnan(sum(nodes)):
            raise ValueError("the model's probabilities are no numbers: its weights are damaged")
        levels: list[dict[str, float]] = [{} for _ in range(tree.depth)]
        for node in tree.reading_order:
            levels[tree.levels[node] - 1][tree.labels[node]] = nodes[node]
        best = sorted(range(tree.num_leaves), key=lambda leaf: -nodes[leaf])[: top_k or 1]
        results = [
            {
                "label": tree.labels[leaf],
                "score": nodes[leaf],
                "path": [{"label": tree.labels[node], "score": nodes[node]} for node in tree.path(leaf)],
                "levels": levels,
                "truncated": classified["truncated"],
            }
            for leaf in best
        ]
        if coverage is not None:
            answer = conformal_answer(
                tree, nodes, conformal_threshold(self.model.config.conformal_thresholds, coverage)
            )
            for result in results:
                result["answer"] = [{"label": tree.labels[node], "score": nodes[node]} for node in answer]
        return results[0] if top_k is None else results


def use_cpu_kernels(encoder: PreTrainedModel) -> None:
    """Make a bfloat16 encoder faster on a CPU, in place; with other versions of the libraries, leave it as it is and warn.

    `cpu_hierarchical` uses private names of torch and transformers. A checkpoint must load where these are renamed.
    """
    try:
        if __package__:  # as remote code of a checkpoint
            from .cpu_hierarchical import attend_by_document, pack_linear_layers
        else:
            from cpu_hierarchical import attend_by_document, pack_linear_layers
        attend_by_document(encoder)
        pack_linear_layers(encoder)
    except Exception as error:  # a renamed function or argument: ImportError, AttributeError, TypeError, RuntimeError
        logger.warning_once(
            f"without the faster CPU kernels, which do not fit torch {torch.__version__} and transformers "
            f"{transformers.__version__} ({type(error).__name__}: {error}); results are the same"
        )


@dataclass
class Started:
    """Texts whose batches are being computed.

    Attributes:
        owners: for each batch, the index of the text that each of its windows belongs to.
        truncated: for each text, whether it was truncated.
        outputs: of each batch, node log-probabilities (B, num_nodes).
    """

    num_texts: int
    owners: list[list[int]]
    truncated: list[bool]
    outputs: list[Future]


def batches_by_length(lengths: list[int], batch_size: int | None, tokens: int) -> list[list[int]]:
    """Group windows into batches of similar lengths, the longest first, and return their indices.

    Args:
        lengths: of the windows, in tokens.
        batch_size: windows of a batch; None for the power of two that comes closest to ``tokens`` with their padding.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    while order:
        count = batch_size or 2 ** max(0, round(math.log2(tokens / lengths[order[0]])))
        batches.append(order[:count])
        order = order[count:]
    return batches


def padded_length(longest: int, rows: int, limit: int) -> int:
    """Return the length to pad a batch to: its tokens are a multiple of 64, where at most 15 more tokens a row do that.

    Args:
        longest: of its windows, in tokens.
        limit: of the model, in tokens.
    """
    step = min(16, 64 // math.gcd(rows, 64))
    return min(longest + -longest % step, limit)


def conformal_threshold(thresholds: list[float | None] | None, coverage: float) -> float | None:
    """Return the threshold for a coverage, which is rounded up to a hundredth. None means every root.

    Args:
        thresholds: 99, as `HierarchicalConfig` keeps them.

    Raises:
        ValueError: the coverage is not between 0 and 1, or there are no thresholds.
    """
    if not isinstance(coverage, (int, float)) or not 0 < coverage < 1:
        raise ValueError(f"coverage must be a number between 0 and 1, not {coverage!r}")
    if thresholds is None:
        raise ValueError("this checkpoint was not calibrated: coverage needs one that was trained with validation rows")
    place = max(1, math.ceil(round(100 * coverage, 6)))
    return thresholds[place - 1] if place < 100 else None


def conformal_answer(tree: Taxonomy, probabilities: list[float], threshold: float | None) -> list[int]:
    """Return nodes that hold every leaf whose probability is at least 1 - threshold, and always the most probable leaf.

    These leaves themselves where they are at most three; else the deepest level at which they lie under at most three
    nodes; else all their roots. Children that are complete become their parent, unless it has but one child: that child
    holds the same leaves, and says more. The sets grow with the threshold, so that split conformal prediction applies:
    `nonconformity` is the smallest threshold whose answer holds a leaf. Sets of few nodes of a taxonomy: Mortier et al.,
    2025, arXiv 2501.19038.

    Args:
        probabilities: of all nodes, by id.
        threshold: between 0 and 1; None for every root.

    Returns:
        Node ids, the most probable first.
    """
    if threshold is None:
        held = set(tree.children(-1))
    else:
        order = sorted(range(tree.num_leaves), key=lambda leaf: -probabilities[leaf])
        count = sum(1 - probabilities[leaf] <= threshold for leaf in order)
        *_, (_, held) = growing_answers(tree, order[: max(count, 1)])
    while complete := {
        parent for node in held if (parent := tree.parents[node]) >= 0 and held.issuperset(tree.children(parent))
    }:
        held = complete | {node for node in held if tree.parents[node] not in complete}
    while only := {node for node in held if len(tree.children(node)) == 1}:
        held = (held - only) | {tree.children(node)[0] for node in only}
    return sorted(held, key=lambda node: -probabilities[node])


def nonconformity(tree: Taxonomy, probabilities: list[float], node: int) -> float:
    """Return the smallest threshold at which `conformal_answer` holds a leaf, or every leaf below an inner node.

    Args:
        probabilities: of all nodes, by id.
    """
    leaves = [node] if node < tree.num_leaves else range(tree.num_leaves)
    paths = [path for path in map(tree.path, leaves) if node in path]
    cuts = {frozenset(path[min(i, len(path) - 1)] for path in paths) for i in range(tree.depth)}  # what holds them all
    order = sorted(range(tree.num_leaves), key=lambda leaf: -probabilities[leaf])
    added, _ = next((added, held) for added, held in growing_answers(tree, order) if any(cut <= held for cut in cuts))
    return 0.0 if added == order[0] else 1 - probabilities[added]


def growing_answers(tree: Taxonomy, leaves: list[int]) -> Iterator[tuple[int, set[int]]]:
    """Yield each leaf in order, with the nodes that hold it and those before it: at most three, or roots."""
    at_level: list[set[int]] = [set() for _ in range(tree.depth)]
    level = tree.depth
    for leaf in leaves:
        path = tree.path(leaf)
        for i, nodes in enumerate(at_level):
            nodes.add(path[min(i, len(path) - 1)])
        while level > 1 and len(at_level[level - 1]) > MOST_NODES:
            level -= 1
        yield leaf, at_level[level - 1]


def check_number(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")


def is_sequence(value: Any) -> bool:
    """Return whether a value can be read by index, as a torch data set can."""
    return hasattr(value, "__getitem__") and hasattr(value, "__len__")


def read_text(item: Any, position: int) -> str:
    """Return the text of an item, checked."""
    text = item.get("text") if isinstance(item, Mapping) else item
    if not isinstance(text, str):
        held = (
            f"a mapping with {', '.join(map(repr, item)) or 'nothing'}"
            if isinstance(item, Mapping)
            else type(item).__name__
        )
        raise ValueError(f"the item at position {position} (counted from 0) is no text but {held}")
    if not text.strip():
        raise ValueError(f"the text at position {position} (counted from 0) is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text at position {position} (counted from 0) holds half of a surrogate pair, which is no character"
        ) from error
    return text
