"""Classify texts into a taxonomy: `pipeline("hierarchical-text-classification", …)`.

Worth knowing:

1. Texts are read some batches ahead and sorted by length, so batches hold little padding. Batches
   have few shapes, because oneDNN compiles a product for each shape. The next texts are tokenized
   while a batch is computed.
2. On a CPU each core computes its own batches: in a shared batch, each would wait for the others
   after every operation.
3. Nothing here is about windows of long texts: the model's `forward` cuts and pools them.
4. ``coverage`` rests on split conformal prediction, ``recall`` on conformal risk control. Both
   guarantees hold for texts drawn like the validation rows, and truncated at the same length. They
   ignore that the checkpoint was selected on the same rows; the model card has the measured shares.
5. A text that cannot be classified raises a ValueError with its position, never its content. A list
   is checked before anything is computed. A stream first yields the results of the texts before it.
   Only a text without tokens is detected later, when it is tokenized, and its error has no
   position.
"""

import copy
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import chain, islice
from numbers import Integral
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import Pipeline, PreTrainedModel
from transformers.utils import logging

try:
    from .checkpoint_hierarchical import (
        check_self_test,
        check_tokenizer,
        position_limit,
        special_tokens,
    )
    from .decisions_hierarchical import build_decisions
    from .open_world_hierarchical import estimate_prior, fitted_prior, read_prior
    from .taxonomy_hierarchical import quote_name
except ImportError:  # as a top-level module of the repository, not as remote code of a checkpoint
    from checkpoint_hierarchical import (
        check_self_test,
        check_tokenizer,
        position_limit,
        special_tokens,
    )
    from decisions_hierarchical import build_decisions
    from open_world_hierarchical import estimate_prior, fitted_prior, read_prior
    from taxonomy_hierarchical import quote_name

logger = logging.get_logger(__name__)

RESULT_VERSION = 3  # of the fields of a result: any change of these raises it
# in a batch, padding included
TOKENS_ON_CPU = 2048
TOKENS_ELSEWHERE = 32_768
TEXTS_AHEAD = 512
CHARACTERS = 2**20  # that are tokenized at once
BATCHES_AHEAD = 32


class PendingTexts(NamedTuple):
    """Texts whose batches are being computed."""

    order: list[int]  # the index of each text, in the order of the batches
    tokens: list[tuple[int, int]]  # for each text, how many it has, and how many are read
    outputs: list[Future]  # for each batch, what `_forward` returns


class HierarchicalTextClassificationPipeline(Pipeline):
    """Classify texts into a taxonomy.

    A text gives a result, a list or tuple gives a list, and any other iterable (a generator, a
    dataset, a `KeyDataset`) an iterator. An item may also be a mapping that holds the text under
    ``"text"``. A result is a dictionary:

    - ``labels``: the deepest predicted nodes, most probable first: one in single-path checkpoints,
      and any number in multi-label ones. Each has ``label``, ``score`` (its probability), ``path``
      (``{"label", "score"}`` of every node from the root to it) and, where the taxonomy has one,
      ``description``;
    - ``label``, ``score``, ``path``: those of the first of ``labels``; None, None and [] without
      one;
    - ``p_value``: the share of validation texts that look at least as strange to the encoder, the
      text itself included. It is absent if training had too few validation texts;
    - ``prediction_set``, with ``coverage`` or ``recall``: ``{"label", "score"}`` of its nodes;
    - ``tokens``: the length of the text in tokens, special ones included, and ``tokens_read``, how
      many of them the model read;
    - ``truncated``: whether these numbers differ;
    - ``levels``, with ``levels=True``: for each level, from the roots down, the probability of
      every node.

    Args:
        batch_size: number of texts in a batch; by default a power of two, for about 2,048 tokens on
            a CPU and 32,768 elsewhere. A stream is read up to 64 batches ahead, by default 1,024
            texts. 1 reads nothing ahead.
        top_k: ``labels`` are this number of leaves, or for multi-label models of nodes, the most
            probable ones.
        max_length: in tokens, special ones included; by default, and at most, the tokenizer's
            limit.
        coverage: share of texts whose prediction set holds the correct leaf, rounded up to a
            hundredth: see `OnePath.prediction_sets`. Excludes any ``max_length`` other than the
            validation rows had.
        recall: for multi-label models, the share of a text's correct nodes that the prediction set
            holds on average. Otherwise like ``coverage``.
        prior: how frequent the classes are in these texts, if they are not like the validation
            rows: a list in the order of the classes, as `estimate_prior` returns it, or a mapping
            from their labels. It corrects all probabilities, and ``coverage`` is then for texts
            with these frequencies. Excludes ``recall``.
        levels: whether results have ``levels``.

    Attributes:
        has_p_values: whether results have a ``p_value``.
        result_version: `RESULT_VERSION` of the checkpoint's own code.

    Raises:
        ValueError: an item or argument cannot be used, or the checkpoint has no thresholds for the
            guarantee.
    """

    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True
    result_version = RESULT_VERSION

    def __init__(self, model: PreTrainedModel, *args: Any, **kwargs: Any):
        self.tree = model.config.tree
        # on the CPU, where the results are
        self.decisions = build_decisions(self.tree, model.config.problem_type)
        open_world = model.heads.open_world
        # offloaded weights cannot be read here
        self.has_p_values = open_world is not None and open_world.has_references
        super().__init__(model, *args, **kwargs)
        check_tokenizer(self.tokenizer, self.model)
        reads_windows = model.config.tokens_before is not None
        limit = None if reads_windows else position_limit(self.model.encoder)
        if limit is not None and self.tokenizer.model_max_length > limit:
            problem = (
                f"{self.tokenizer.model_max_length:,} is beyond the encoder's {limit:,} positions"
            )
            raise ValueError(
                f"the tokenizer's model_max_length {problem}: set it in tokenizer_config.json"
            )
        # each core of a CPU computes its own batches, unless weights are offloaded
        self._uses_cpu_threads = self.device.type == "cpu" and not hasattr(
            self.model, "hf_device_map"
        )
        # read once: later, a new thread may get the 1 that the workers of a call have set
        self._num_threads = torch.get_num_threads()
        if self.device.type == "cpu":
            weights = [*self.model.parameters()]
            if any(
                getattr(weight, name, None) is not None
                for weight in weights
                for name in ("quant_state", "CB")
            ):
                # bitsandbytes repacks 4-bit and 8-bit weights in their first forward, which two
                # threads must not do at once
                with torch.inference_mode():
                    self.model(**self.tokenizer("a", return_tensors="pt"))
            use_cpu_kernels(self.model.encoder)
        check_self_test(self.model, self.tokenizer)
        # a tokenizer keeps its truncation as state, which threads share: this copy never truncates
        self._tokenizer = copy.deepcopy(self.tokenizer)
        self._tokens_before, self._tokens_after = map(len, special_tokens(self._tokenizer))

    def _sanitize_parameters(
        self,
        top_k: int | None = None,
        max_length: int | None = None,
        coverage: float | None = None,
        recall: float | None = None,
        prior: list[float] | Mapping[str, float] | None = None,
        levels: bool | None = None,
        **unknown: Any,
    ) -> tuple[dict, dict, dict]:
        if unknown:
            known = "batch_size, top_k, max_length, coverage, recall, prior and levels"
            raise ValueError(
                f"{min(unknown)!r} is not an argument of this pipeline; it has {known}"
            )
        for name, value in (("top_k", top_k), ("max_length", max_length)):
            check_number(name, value, 1)
        calibration = self.model.config.calibration
        guarantee = without_none({"coverage": coverage, "recall": recall})
        self.decisions.set_threshold(calibration, **guarantee)
        frequencies = None if prior is None else read_prior(self.decisions, calibration, prior)
        output = {
            "guarantee": guarantee or None,
            "prior": frequencies,
            "top_k": top_k,
            "levels": levels,
        }
        # arguments that are not given leave those of the pipeline as they are
        return without_none({"max_length": max_length}), {}, without_none(output)

    def __call__(
        self, inputs: str | Iterable, batch_size: int | None = None, **parameters: Any
    ) -> Any:
        """Classify a text, a list or a stream of texts.

        The class describes arguments and results.
        """
        truncation, _, output = self._sanitize_parameters(**parameters)
        truncation = {**self._preprocess_params, **truncation}
        output = {**self._postprocess_params, **output}
        self._check_together(truncation, output)
        batch_size = self._batch_size if batch_size is None else batch_size
        check_number("batch_size", batch_size, 1)
        if hasattr(inputs, "columns") and hasattr(inputs, "iloc"):
            raise ValueError(
                "a table is not a list of texts: give the column that holds them, such as "
                "table['text']"
            )
        if isinstance(inputs, (list, tuple)):
            texts = [read_text(item, position) for position, item in enumerate(inputs)]
            return list(self._classify(texts, batch_size, truncation, output))
        is_stream = isinstance(inputs, Iterable) or (
            hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__")
        )
        if isinstance(inputs, (str, bytes, Mapping)) or not is_stream:
            pending = self._submit([read_text(inputs, 0)], batch_size, truncation, None)
            return next(self._collect(pending, **output))
        return self._classify(inputs, batch_size, truncation, output)

    def estimate_prior(self, texts: Iterable) -> list[float]:
        """Estimate how frequent the classes are in unlabelled texts, for the argument ``prior``.

        Raises:
            ValueError: the checkpoint does not store the frequencies of its validation rows, or
                there are no texts.
        """
        calibration = self.model.config.calibration
        classes = self.tree.labels[: self.decisions.num_classes]
        fitted_prior(calibration)  # raises before texts are read
        rows = []
        for result in self._classify(
            texts, self._batch_size, self._preprocess_params, {"levels": True}
        ):
            scores = {label: score for level in result["levels"] for label, score in level.items()}
            rows.append(torch.tensor([scores[label] for label in classes]))
        if not rows:
            raise ValueError("no class frequencies can be estimated without texts")
        return estimate_prior(self.decisions, calibration, torch.stack(rows)).tolist()

    def _check_together(self, truncation: dict, output: dict) -> None:
        """Raise ValueError for arguments that exclude each other, and warn if a guarantee does
        not hold.
        """
        length = self._length(**truncation)
        self.decisions.set_threshold(
            self.model.config.calibration, output.get("prior"), **output.get("guarantee", {})
        )
        if "guarantee" in output:
            fitted = self.model.config.calibration.max_length or self.tokenizer.model_max_length
            if length != fitted:
                raise ValueError(
                    f"{self.decisions.guarantee} needs texts truncated at {fitted} tokens, "
                    "like the validation rows: give "
                    f"max_length={fitted} or the tokenizer that was saved with the checkpoint"
                )

    def _classify(
        self, items: Iterable, batch_size: int | None, truncation: dict, output: dict
    ) -> Iterator:
        """Yield the results of the items, in their order. Some batches are read ahead."""
        numbered = enumerate(
            items if isinstance(items, Iterable) else (items[i] for i in range(len(items)))
        )
        ahead = (
            TEXTS_AHEAD
            if batch_size is None
            else 1
            if batch_size == 1
            else BATCHES_AHEAD * batch_size
        )
        # one thread for each core that torch uses, else one in all
        uses_cores = self._uses_cpu_threads
        count, start = (self._num_threads, use_one_core) if uses_cores else (1, None)
        workers = ThreadPoolExecutor(count, initializer=start)
        try:
            # computed while the next texts are read and tokenized
            waiting: deque[PendingTexts] = deque()
            while True:
                texts = []
                read_error = None
                try:
                    for position, item in islice(numbered, ahead):
                        texts.append(read_text(item, position))
                except Exception as error:  # raised below, after the results of the texts before it
                    read_error = error
                if texts:
                    alone = not waiting and uses_cores
                    waiting.append(self._submit(texts, batch_size, truncation, workers, alone))
                is_last = not texts or read_error is not None
                while len(waiting) > (0 if is_last or ahead == 1 else 1):
                    yield from self._collect(waiting.popleft(), **output)
                if read_error is not None:
                    raise read_error
                if not texts:
                    return
        finally:
            workers.shutdown(cancel_futures=True)
            # new threads start with the last number that is set
            torch.set_num_threads(self._num_threads)

    def _submit(
        self,
        texts: list[str],
        batch_size: int | None,
        truncation: dict,
        workers: Executor | None,
        alone: bool = True,
    ) -> PendingTexts:
        """Tokenize texts and submit their batches to ``workers``; with None compute the batches
        at once.
        """
        rows, tokens = self.preprocess(texts, **truncation)
        lengths = [len(row["input_ids"]) for row in rows]
        batches = batches_by_length(
            lengths, batch_size, TOKENS_ON_CPU if self.device.type == "cpu" else TOKENS_ELSEWHERE
        )
        outputs: list[Future] = []
        for batch in batches:
            length = padded_length(lengths[batch[0]], len(batch), self.tokenizer.model_max_length)
            # on the right: positions count from the first token, and "cls" pools it
            padding = {"padding": "max_length", "max_length": length, "padding_side": "right"}
            some = [rows[i] for i in batch]
            inputs = dict(
                self.tokenizer.pad(some, **padding, return_attention_mask=True, return_tensors="pt")
            )
            # a single batch, with no other being computed, gets all cores of a CPU
            if workers is not None and not (alone and len(batches) == 1):
                outputs.append(workers.submit(self.forward, inputs))
            else:
                outputs.append(Future())
                outputs[-1].set_result(self.forward(inputs))
        counts = [*zip(tokens, lengths, strict=True)]
        return PendingTexts([*chain(*batches)], counts, outputs)

    def _collect(
        self,
        pending: PendingTexts,
        prior: Tensor | None = None,
        guarantee: dict[str, float] | None = None,
        **output: Any,
    ) -> Iterator:
        """Yield the results of pending texts in order.

        ``prior`` is that of `read_prior`, and ``output`` are arguments of `postprocess`.
        """
        calibration = self.model.config.calibration
        of_batches = [batch.result() for batch in pending.outputs]
        order = torch.tensor(pending.order).argsort()
        joined = {
            name: torch.cat([batch[name] for batch in of_batches])[order] for name in of_batches[0]
        }
        uncorrected = joined["node_log_probs"].double().exp()
        p_values: list[float] | None = None
        if self.has_p_values:
            p_values = self.model.heads.open_world.p_values(joined["strangeness"]).tolist()
        probabilities = uncorrected
        if prior is not None:
            probabilities = self.decisions.adapt(uncorrected, fitted_prior(calibration), prior)
        threshold = self.decisions.set_threshold(calibration, prior, **(guarantee or {}))
        sets = None if threshold is None else self.decisions.prediction_sets(uncorrected, threshold)
        predicted = self.decisions.predict(probabilities, calibration.thresholds)
        for i, tokens in enumerate(pending.tokens):
            # one text at a time: a list of floats takes four times the memory of a tensor
            nodes = predicted[i].nonzero().flatten().tolist()
            if sets is not None:
                output["prediction_set"] = sets[i].nonzero().flatten().tolist()
            p_value = None if p_values is None else p_values[i]
            yield self.postprocess(probabilities[i].tolist(), nodes, *tokens, p_value, **output)

    def _length(self, max_length: int | None = None) -> int:
        """Return the length in tokens at which texts are truncated, or raise ValueError if the
        tokenizer does not allow it.
        """
        limit = self.tokenizer.model_max_length
        special = self.tokenizer.num_special_tokens_to_add()
        if max_length is not None and max_length > limit:
            raise ValueError(
                f"max_length {max_length} is beyond the model's limit of {limit} tokens"
            )
        length = max_length or limit
        if length <= special:
            raise ValueError(
                f"a text of {length} tokens leaves no room for {special} special tokens"
            )
        return length

    def preprocess(
        self, texts: list[str], max_length: int | None = None
    ) -> tuple[list[dict[str, list[int]]], list[int]]:
        """Return the tokens of each text, truncated at its end, and how many tokens the whole
        text has.
        """
        length = self._length(max_length)
        rows = []
        counts = []
        for some in group_by_characters(texts):
            encoded = self._tokenizer(
                some, truncation=False, return_attention_mask=True, verbose=False
            )
            # padding adds a missing mask
            names = [name for name in self._tokenizer.model_input_names if name in encoded]
            for i, ids in enumerate(encoded["input_ids"]):
                rows.append(
                    {name: truncate(encoded[name][i], length, self._tokens_after) for name in names}
                )
                counts.append(len(ids))
        if min(counts) <= self._tokens_before + self._tokens_after:
            raise ValueError("a text has no tokens: the model's tokenizer drops all its characters")
        return rows, counts

    def _forward(self, model_inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = self.model(**model_inputs, output_vectors=self.has_p_values)
        kept = {"node_log_probs": outputs["node_log_probs"]}
        if self.has_p_values:
            kept["strangeness"] = self.model.heads.open_world(outputs["vectors"])
        return kept

    def postprocess(
        self,
        probabilities: list[float],
        predicted: list[int],
        tokens: int,
        tokens_read: int,
        p_value: float | None,
        top_k: int | None = None,
        prediction_set: list[int] | None = None,
        levels: bool = False,
    ) -> dict[str, Any]:
        """Build a result from the probabilities of all nodes, the predicted nodes, the numbers
        of tokens, and the p-value.
        """
        tree = self.tree
        if math.isnan(sum(probabilities)):
            raise ValueError("the model's probabilities are not numbers: its weights are damaged")

        def with_scores(nodes: Iterable[int]) -> list[dict[str, Any]]:
            return [{"label": tree.labels[node], "score": probabilities[node]} for node in nodes]

        labels = []
        nodes = tree.deepest(predicted) if top_k is None else range(self.decisions.num_classes)
        for node in sorted(nodes, key=lambda node: -probabilities[node])[:top_k]:
            path = with_scores(tree.path(node))
            labels.append({**path[-1], "path": path})
            if description := tree.descriptions.get(tree.labels[node]):
                labels[-1]["description"] = description
        first = labels[0] if labels else {"label": None, "score": None, "path": []}
        result = {"labels": labels, **{name: first[name] for name in ("label", "score", "path")}}
        if p_value is not None:
            result["p_value"] = p_value
        if prediction_set is not None:
            by_score = sorted(prediction_set, key=lambda node: -probabilities[node])
            result["prediction_set"] = with_scores(by_score)
        result |= {"tokens": tokens, "tokens_read": tokens_read, "truncated": tokens_read < tokens}
        if levels:
            result["levels"] = [{} for _ in range(tree.depth)]
            for node in tree.reading_order:
                result["levels"][tree.levels[node] - 1][tree.labels[node]] = probabilities[node]
        return result


def use_cpu_kernels(encoder: PreTrainedModel) -> None:
    """Speed up an encoder on a CPU, in place, or warn where private names of the libraries have
    changed.
    """
    try:
        if __package__:  # as remote code of a checkpoint
            from .cpu_hierarchical import attend_by_document, pack_linear_layers
        else:
            from cpu_hierarchical import attend_by_document, pack_linear_layers
        if encoder.dtype == torch.bfloat16:
            attend_by_document(encoder)
        pack_linear_layers(encoder)
    # a renamed function or argument: ImportError, AttributeError, TypeError, RuntimeError
    except Exception as error:
        logger.warning_once(
            "the faster CPU kernels are off, because they do not fit torch "
            f"{torch.__version__} and transformers "
            f"{transformers.__version__} ({type(error).__name__}: {error}); results are the same"
        )


def use_one_core() -> None:
    """Let torch use one core in this thread."""
    torch.get_num_threads()  # without this call, the first operation would undo the next line
    torch.set_num_threads(1)


# ── Batches ───────────────────────────────────────────────────────────────────────────────────────


def batches_by_length(lengths: list[int], batch_size: int | None, tokens: int) -> list[list[int]]:
    """Return batches of text indices: texts of similar lengths, the longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    # by default a batch has the power of two of texts that comes closest to ``tokens``
    while order:
        count = batch_size or 2 ** max(0, round(math.log2(tokens / lengths[order[0]])))
        batches.append(order[:count])
        order = order[count:]
    return batches


def group_by_characters(texts: list[str]) -> Iterator[list[str]]:
    """Yield the texts in groups of at most `CHARACTERS` in all, or of one text: tokenizing takes
    60 times the memory of a text.
    """
    group = list[str]()
    size = 0
    for text in texts:
        size += len(text)
        if group and size > CHARACTERS:
            yield group
            group = []
            size = len(text)
        group.append(text)
    yield group


def truncate(tokens: list[int], length: int, num_after: int) -> list[int]:
    """Return a text's tokens without those beyond ``length``, except the ``num_after`` special
    ones at its end.
    """
    return (
        tokens
        if len(tokens) <= length
        else tokens[: length - num_after] + tokens[len(tokens) - num_after :]
    )


def padded_length(longest: int, rows: int, limit: int) -> int:
    """Return the length to pad a batch to, at most 15 above ``longest``, so that batches have few
    shapes.

    With a multiple of four rows, the batch has a multiple of 64 tokens, unless the length reaches
    ``limit``.
    """
    step = min(16, 64 // math.gcd(rows, 64))
    return min(longest + -longest % step, limit)


# ── Checks ────────────────────────────────────────────────────────────────────────────────────────


def without_none(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}


def check_number(name: str, value: Any, minimum: int) -> None:
    """Raise ValueError unless an argument is None, or a whole number of at least ``minimum``."""
    if value is not None and (
        not isinstance(value, Integral) or isinstance(value, bool) or value < minimum
    ):
        raise ValueError(f"{name} must be a whole number of at least {minimum}, not {value!r}")


def read_text(item: Any, position: int) -> str:
    """Return the text of an item, or raise ValueError if it holds none, or one that is empty or
    not valid Unicode.
    """
    text = item.get("text") if isinstance(item, Mapping) else item
    where = f"at position {position} (counted from 0)"
    if not isinstance(text, str):
        kind = type(text).__name__
        if isinstance(item, Mapping) and "text" not in item:
            kind = f"a mapping with {', '.join(map(quote_name, item)) or 'nothing'}"
        raise ValueError(f"the item {where} is not a text but {kind}")
    if not text.strip():
        raise ValueError(f"the text {where} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text {where} holds half of a surrogate pair, which is not a character"
        ) from error
    return text
