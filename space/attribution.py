"""Attribute the value of a node to words: integrated gradients (Sundararajan et al., 2017, arXiv
1703.01365).

Worth knowing:

1. The value is the node's probability. For a multi-label model, the value is the log-odds of the
   probability, because words still change the log-odds where the probability is close to 0 or 1.
2. The baseline is a blank text of the same length, made of padding. The weights of the words and
   special tokens add up to the difference between the values of the text and of the blank text.
   `benchmarks/LOG.md` compares baselines.
3. The encoder reads a word as a vector of its embedding layer. A lexical head, if there is one,
   reads the word as a count. The integration path changes both together, and the weight of a word
   is the sum of both contributions.
4. Along the path, the value often jumps within a few hundredths. So the path is halved where the
   value changes most, without gradients, which cost three times a value. Then the piece with the
   largest error is halved until all errors are small, or the steps or the time are used up
   (adaptive quadrature).
   The error of a piece is known, because its integral is a difference of two values (the
   convergence delta).
5. The gradients run on a copy of the model that shares its weights. So hooks on the copy do not
   affect the model, which classifies at the same time.
6. A text of one token has a vector of length 1, so the lexical head's score of such a text tells
   the token's weight. So the weights need not be stored as a table.
"""

import copy
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import TypedDict

import torch
from captum.attr import IntegratedGradients
from torch import Tensor, nn
from transformers import BatchEncoding, Pipeline

PIECES = 4  # of the path, before it is halved where the value changes most
MAX_CHANGE = 0.15  # of the value along a piece, in probability, until there are `MAX_PIECES`
MAX_PIECES = 12
STEPS = 2  # with gradients for one piece
WORK = 16_000  # budget of tokens × steps for all pieces; a long text gets at least `MIN_STEPS`
MIN_STEPS = 32
SECONDS = 7  # after this time, no piece is halved
TOLERANCE = 0.005  # a piece with a larger error, in probability, is halved
# slope of the log-odds at a probability of 0.5; converts tolerances from probability to log-odds
LOG_ODDS_SLOPE = 4


class Word(TypedDict):
    """A word of the text, and its contribution to the value of a node.

    Attributes:
        start, end: position in the text, in characters.
        weight: contribution through encoder and lexical head, in units of probability, or of
        log-odds if the model
            is multi-label.
    """

    word: str
    start: int
    end: int
    weight: float


class Explanation(TypedDict):
    """The explanation of the probability of a node.

    Attributes:
        label, score: the node and its probability.
        blank_score: its probability for a blank text.
        words: in the order of the text. Their weights, ``rest`` and ``- error`` add up to ``score -
        blank_score``, or to the
            difference of the log-odds.
        rest: contribution of the special tokens.
        error: sum of all contributions minus that difference (the convergence delta of captum).
        characters_read: length of the part of the text that the model reads.
    """

    label: str
    score: float
    blank_score: float
    words: list[Word]
    rest: float
    error: float
    characters_read: int


class IntegrationPath:
    """The straight line from a blank text, at 0, to the text, at 1, with the values of all nodes
    along it.

    Args:
        model: the model; a hook replaces the output of its lexical head.
        inputs: outputs of the tokenizer, (1, T) each.
        blank_ids: token ids of the blank text, (1, T).
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor], blank_ids: Tensor):
        self.model = model
        self.inputs = inputs
        self.embeddings = model.get_input_embeddings()
        self.lexical_head = model.heads.lexical
        self.log_odds = model.config.is_multi_label
        with torch.no_grad():
            # (1, T, H); in half precision the steps would be lost
            self.first = self.embeddings(blank_ids).float()
            self.span = self.embeddings(inputs["input_ids"]).float() - self.first
            self.tokens = torch.unique(torch.cat([inputs["input_ids"], blank_ids]))  # (U,)
            if (head := self.lexical_head) is not None:
                mask = inputs["attention_mask"]
                # (U,)
                values = [
                    tfidf(head, ids, mask, self.tokens) for ids in (inputs["input_ids"], blank_ids)
                ]
                known = self.tokens.clamp(max=len(head.idf) - 1)
                self.first_scores = head(blank_ids, mask)  # (1, L), for L leaves or nodes
                weights = head(known[:, None], None) - head.bias.float()  # (U, L)
                self.lexical_span = weights.T * (values[0] - values[1])  # (L, U)

    def at(self, position: float) -> tuple[Tensor, ...]:
        """Return what the model reads at a position: vectors (1, T, H), and the lexical head's
        contributions (1, L, U).
        """
        vectors = (self.first + position * self.span,)
        return (
            vectors if self.lexical_head is None else (*vectors, position * self.lexical_span[None])
        )

    def __call__(self, vectors: Tensor, contributions: Tensor | None = None) -> Tensor:
        """Compute values (B, num_nodes) from what `at` returns for B positions."""
        with ExitStack() as hooks:
            if contributions is not None:
                scores = self.first_scores + contributions.sum(-1)
                hooks.enter_context(self.lexical_head.register_forward_hook(lambda *_: scores))
            inputs = {name: values.expand(len(vectors), -1) for name, values in self.inputs.items()}
            outputs = self.model(**inputs, inputs_embeds=vectors.to(self.embeddings.weight.dtype))
            return outputs["logits"] if self.log_odds else outputs["node_log_probs"].exp()


def tfidf(head: nn.Module, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """Return the values that a lexical head reads of distinct tokens (U,), which include all of a
    text (1, T): (U,).
    """
    counts = ((tokens[:, None] == ids) & mask.bool()).sum(1)
    # 0 beyond the vocabulary
    idf = torch.nn.functional.pad(head.idf.float(), (0, 1))[tokens.clamp(max=len(head.idf))]
    values = torch.where(counts > 0, 1 + counts.clamp(min=1).log(), 0) * idf
    return torch.nn.functional.normalize(values, dim=0)


class Explainer:
    """Explain the predictions of a pipeline's model."""

    def __init__(self, classifier: Pipeline):
        model = classifier.model
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.model = copy.deepcopy(model, shared).eval().requires_grad_(False)
        self.tokenizer = classifier.tokenizer
        self.tree = classifier.tree

    def explain(self, text: str, label: str) -> Explanation:
        """Compute the weights of the words of a text for a node.

        Args:
            text: as returned by `classification.check_text`.
            label: label of the node.
        """
        # ── Tokens of the text and of the blank text ──────────────────────────────────────────────
        node = self.tree.id(label)
        device = next(self.model.parameters()).device
        asked = dict.fromkeys(
            ("truncation", "return_offsets_mapping", "return_special_tokens_mask"), True
        )
        encoded = self.tokenizer(text, return_tensors="pt", verbose=False, **asked)
        inputs = {
            name: encoded[name].to(device)
            for name in self.tokenizer.model_input_names
            if name in encoded
        }
        ids = inputs["input_ids"]
        special = encoded["special_tokens_mask"].bool().to(device)
        blank_ids = torch.where(special, ids, self.tokenizer.pad_token_id)

        # ── Halve the path where the value changes most, without gradients ────────────────────────
        deadline = time.monotonic() + SECONDS
        path = IntegrationPath(self.model, inputs, blank_ids)
        slope = LOG_ODDS_SLOPE if path.log_odds else 1

        def value(position: float) -> float:
            with torch.no_grad():
                return path(*path.at(position))[0, node].item()

        values = {i / PIECES: value(i / PIECES) for i in range(PIECES + 1)}  # by position
        while len(values) <= MAX_PIECES:
            start, end = max(
                pairwise(sorted(values)), key=lambda ends: abs(values[ends[1]] - values[ends[0]])
            )
            if abs(values[end] - values[start]) <= MAX_CHANGE * slope:
                break
            values[(start + end) / 2] = value((start + end) / 2)

        # ── Integrate each piece, and halve the worst until the error, the steps or the time is────
        # reached
        pieces = [
            integrate(path, node, start, end, values) for start, end in pairwise(sorted(values))
        ]
        max_pieces = max(WORK // ids.shape[1], MIN_STEPS) // STEPS
        worst = max(pieces, key=lambda piece: abs(piece.error))
        while (
            abs(worst.error) > TOLERANCE * slope
            and len(values) <= max_pieces
            and time.monotonic() < deadline
        ):
            pieces.remove(worst)
            middle = (worst.start + worst.end) / 2
            values[middle] = value(middle)
            pieces += [
                integrate(path, node, *ends, values)
                for ends in pairwise((worst.start, middle, worst.end))
            ]
            worst = max(pieces, key=lambda piece: abs(piece.error))

        # ── Contributions of words and special tokens ─────────────────────────────────────────────
        weights = sum(piece.vectors for piece in pieces)  # (T,)
        lexical = sum(piece.lexical for piece in pieces)  # (U,)
        # of each occurrence of a token
        shares = lexical / (path.tokens.unsqueeze(1) == ids).sum(1).clamp(min=1)
        per_token = torch.where(special[0], 0, shares[torch.searchsorted(path.tokens, ids[0])])
        rest = (lexical.sum() - per_token.sum() + weights[special[0]].sum()).item()
        words = join_tokens(text, encoded, (weights + per_token).tolist())
        total = sum(word["weight"] for word in words) + rest
        return {
            "label": label,
            "score": probability(values[1], path.log_odds),
            "blank_score": probability(values[0], path.log_odds),
            "words": words,
            "rest": rest,
            "error": total - (values[1] - values[0]),
            # white space at the end has no token, but counts as read
            "characters_read": int(encoded["offset_mapping"].max())
            if encoded.encodings[0].overflowing
            else len(text),
        }


@dataclass(eq=False)  # compared by identity: tensors have no single truth value
class Piece:
    """Integrated gradients over a piece of a path.

    Attributes:
        vectors: contributions of the token vectors, (T,).
        lexical: contributions of the distinct tokens in the lexical head, (U,).
        error: sum of the contributions minus the difference of the values at both ends.
    """

    start: float
    end: float
    vectors: Tensor
    lexical: Tensor
    error: float


def probability(value: float, log_odds: bool) -> float:
    return torch.tensor(value, dtype=torch.float64).sigmoid().item() if log_odds else value


def integrate(
    path: IntegrationPath, node: int, start: float, end: float, values: dict[float, float]
) -> Piece:
    """Integrate the gradients of a node's value over a piece of a path.

    ``values`` has those at both ends.
    """
    attributions = IntegratedGradients(path).attribute(
        path.at(end), path.at(start), target=node, n_steps=STEPS
    )
    vectors = attributions[0][0].sum(-1)
    lexical = (
        attributions[1][0].sum(0) if len(attributions) > 1 else vectors.new_zeros(len(path.tokens))
    )
    error = (vectors.sum() + lexical.sum()).item() - (values[end] - values[start])
    return Piece(start, end, vectors.detach(), lexical.detach(), error)


def join_tokens(text: str, encoded: BatchEncoding, weights: list[float]) -> list[Word]:
    """Sum the contributions of the tokens of each word."""
    by_word: dict[int, float] = {}
    for word, weight in zip(encoded.word_ids(0), weights, strict=True):
        if word is not None:
            by_word[word] = by_word.get(word, 0.0) + weight
    spans = [encoded.word_to_chars(0, word) for word in by_word]
    return [
        {"word": text[start:end], "start": start, "end": end, "weight": weight}
        for (start, end), weight in zip(spans, by_word.values(), strict=True)
    ]
