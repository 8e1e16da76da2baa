"""Which words weighed for a node: integrated gradients (Sundararajan et al., 2017, arXiv 1703.01365), by captum.

Worth knowing:

1. What is explained is the probability of a node: how it grows from what the model says of a blank text of the same length,
   made of padding, to what it says of the text. The words' weights add up to that difference, in probability. Padding as the
   blank was chosen by `benchmarks/space.py blank`: the words found against it matter most where they are masked.
2. The model reads words in two places: as vectors, at the encoder's embedding layer, and as counts, in the lexical head
   where it has one. The path of integration moves both at once, so that a word's weight is the sum of its shares in both,
   and nothing that a word does is left out.
3. Along that path the probability often jumps within a few hundredths. A scan without gradients finds where, the path is cut
   there, and each piece is integrated by itself; those that miss most are halved while steps and time last (adaptive quadrature:
   how much a piece misses is known, since its integral is a difference of probabilities). What is left is the error.
4. The gradients run on a copy of the model that shares its weights: hooks on one change nothing for the other, which
   classifies at the same time.
5. The lexical head's share of a token is asked of the head itself, by rows of the identity in place of its weights: what
   it computes stands in one place only, the checkpoint.
"""

import copy
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypedDict

import torch
from captum.attr import LayerIntegratedGradients
from torch import Tensor, nn
from transformers import Pipeline

# it asks to make sure that layers do not depend on each other, which ours do not
warnings.filterwarnings("ignore", message="Multiple layers provided", category=UserWarning)

SCAN = 16  # intervals of the scan
STEEP = 3  # of them at most are pieces by themselves
STEPS = {"steep": 6, "flat": 3}  # with gradients, for a piece
WORK = 16_000  # tokens times steps at most, for all of them
SECONDS = 7  # after which no piece is halved any more
TOLERANCE = 0.005  # what a piece may miss before it is halved
BATCH = 6  # points of the path that go through the model together
PROBED = 32  # tokens asked of the lexical head at a time


class Word(TypedDict):
    """A word as it stands in the text, and by how much it moved the probability.

    Attributes:
        start, end: its place in the text, in characters.
        weight: in probability, of all that the model does with the word.
        lexical: what part of the weight went through the lexical head; 0 where the model has none.
    """

    word: str
    start: int
    end: int
    weight: float
    lexical: float


class Explanation(TypedDict):
    """Why a node is as probable as it is.

    Attributes:
        label, score: the node and its probability.
        blank_score: its probability for a blank text.
        words: in their order. Their weights, ``rest`` and ``- error`` add up to ``score - blank_score``.
        rest: what is owed to no word, but to the marks that the tokenizer sets around a text.
        error: by how much the integral, in steps, misses that difference (what captum calls the convergence delta).
        characters_read: how much of the text's beginning the model reads.
    """

    label: str
    score: float
    blank_score: float
    words: list[Word]
    rest: float
    error: float
    characters_read: int


class Path(nn.Module):
    """The straight line from a blank text, at 0, to the text, at 1, and what the model says there of all nodes.

    Args:
        model: whose embedding layer and lexical head are answered for while it runs.
        inputs: of the text, as the tokenizer gives them, (1, T) each.
        blank_ids: (1, T).
        on_point: called with the number of points, as they are computed.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor], blank_ids: Tensor, on_point: Callable[[int], None]):
        super().__init__()
        self.model, self.inputs, self.on_point = [model], inputs, on_point  # in a list: it is no part of this module
        self.embeddings, self.lexical_head = [model.get_input_embeddings()], [model.heads.lexical]
        self.vectors, self.contributions = nn.Identity(), nn.Identity()  # the layers that captum looks at
        with torch.no_grad():
            self.first = self.embeddings[0](blank_ids).float()  # (1, T, H); in half precision the steps would be lost
            self.span = self.embeddings[0](inputs["input_ids"]).float() - self.first
            self.tokens = torch.unique(torch.cat([inputs["input_ids"], blank_ids]))  # (U,)
            if (head := model.heads.lexical) is not None:
                mask = inputs["attention_mask"]
                values = [tfidf(head, ids, mask, self.tokens) for ids in (inputs["input_ids"], blank_ids)]  # (U,)
                known = self.tokens.clamp(max=len(head.idf) - 1)
                self.first_scores = head(blank_ids, mask)  # (1, L)
                self.lexical_span = head.weight[:, known].float() * (values[0] - values[1])  # (L, U)

    def forward(self, place: Tensor) -> Tensor:
        """Probabilities (B, num_nodes) at places (B, 1) between 0 and 1."""
        self.on_point(len(place))
        vectors = self.vectors(self.first + place.unsqueeze(-1) * self.span)  # (B, T, H)
        hooks = [self.embeddings[0].register_forward_hook(lambda _module, _args, output: vectors.to(output.dtype))]
        if self.lexical_head[0] is not None:
            contributions = self.contributions(place.unsqueeze(-1) * self.lexical_span)  # (B, L, U)
            scores = self.first_scores + contributions.sum(-1)
            hooks.append(self.lexical_head[0].register_forward_hook(lambda *_: scores))
        try:
            inputs = {name: values.expand(len(place), -1) for name, values in self.inputs.items()}
            return self.model[0](**inputs)["node_log_probs"].exp()
        finally:
            for hook in hooks:
                hook.remove()


def tfidf(head: nn.Module, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """What a lexical head weighs tokens (U,) by in a text (1, T): the entries (U,) of the vector that its weights meet."""
    probe = copy.copy(head)
    found = []
    for some in tokens.split(PROBED):
        known = some < len(head.idf)
        rows = torch.zeros(len(some), len(head.idf), device=ids.device)
        rows[known, some[known]] = 1
        probe._parameters = {**head._parameters, "weight": rows, "bias": torch.zeros(len(some), device=ids.device)}
        found.append(probe(ids, mask)[0])
    return torch.cat(found)


class Explainer:
    """Explains what a pipeline's model says."""

    def __init__(self, classifier: Pipeline):
        model = classifier.model
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.model = copy.deepcopy(model, shared).eval().requires_grad_(False)
        self.tokenizer, self.tree = classifier.tokenizer, classifier.tree

    def explain(self, text: str, label: str, on_progress: Callable[[float], None] = lambda share: None) -> Explanation:
        """The words' weights for a node.

        Args:
            text: as `classification.check_text` returns it.
            label: of the node.
            on_progress: called with the share that is done.
        """
        node = self.tree.id(label)
        device = next(self.model.parameters()).device
        encoded = self.tokenizer(
            text,
            truncation=True,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_tensors="pt",
            verbose=False,
        )
        names = [name for name in self.tokenizer.model_input_names if name in encoded]
        inputs = {name: encoded[name].to(device) for name in names}
        ids, special = inputs["input_ids"], encoded["special_tokens_mask"].bool().to(device)
        blank_ids = torch.where(special, ids, self._blank_id())

        since = time.monotonic()
        done, most = 0, max(WORK // ids.shape[1], 2 * SCAN)

        def count(points: int) -> None:
            nonlocal done
            done += points
            on_progress(min(done / (SCAN + most), 1.0))

        path = Path(self.model, inputs, blank_ids, count)
        scan = torch.linspace(0, 1, SCAN + 1, device=device).unsqueeze(1)
        with torch.no_grad():
            values = torch.cat([path(some)[:, node] for some in scan.split(BATCH)]).tolist()
        known = {i / SCAN: value for i, value in enumerate(values)}
        pieces = [integrate(path, node, start, end, steps, known) for start, end, steps in cut(values)]
        spent = sum(piece.steps for piece in pieces)
        while True:
            worst = max(pieces, key=lambda piece: abs(piece.error))
            spent += 2 * STEPS["steep"]
            if abs(worst.error) <= TOLERANCE or spent > most or time.monotonic() - since > SECONDS:
                break
            middle = (worst.start + worst.end) / 2
            halves = ((worst.start, middle), (middle, worst.end))
            pieces.remove(worst)
            pieces += [integrate(path, node, start, end, STEPS["steep"], known) for start, end in halves]
        weights = sum(piece.vectors for piece in pieces)  # (T,)
        lexical = sum(piece.lexical for piece in pieces)  # (U,)
        shares = lexical / (path.tokens.unsqueeze(1) == ids).sum(1).clamp(min=1)  # a token's, for each time it occurs
        per_token = torch.where(special[0], 0, shares[torch.searchsorted(path.tokens, ids[0])])
        rest = (lexical.sum() - per_token.sum() + weights[special[0]].sum()).item()
        words = gather(
            text, encoded.word_ids(0), encoded["offset_mapping"][0].tolist(), weights.tolist(), per_token.tolist()
        )
        total = sum(word["weight"] for word in words) + rest
        return {
            "label": label,
            "score": values[-1],
            "blank_score": values[0],
            "words": words,
            "rest": rest,
            "error": total - (values[-1] - values[0]),
            "characters_read": max(end for _, end in encoded["offset_mapping"][0].tolist()),
        }

    def _blank_id(self) -> int:
        """The token that blank texts are made of."""
        found = (self.tokenizer.pad_token_id, self.tokenizer.mask_token_id, self.tokenizer.unk_token_id)
        return next(token for token in (*found, 0) if token is not None)


@dataclass(eq=False)
class Piece:
    """Integrated gradients over a piece of a path.

    Attributes:
        vectors: (T,), the shares of the tokens' vectors; lexical: (U,), of the tokens in the lexical head.
        error: by how much they miss the difference between the ends.
    """

    start: float
    end: float
    steps: int
    vectors: Tensor
    lexical: Tensor
    error: float


def integrate(path: Path, node: int, start: float, end: float, steps: int, known: dict[float, float]) -> Piece:
    """Integrates the probability of a node over a piece of a path, with as many steps.

    Args:
        known: probabilities by place, to which those of the ends are added.
    """
    layers = [path.vectors] if path.lexical_head[0] is None else [path.vectors, path.contributions]
    places = path.first.new_tensor([[start], [end]])
    found = LayerIntegratedGradients(path, layers).attribute(
        places[1:],
        places[:1],
        target=node,
        n_steps=steps,
        internal_batch_size=BATCH,
    )
    parts = [part[0] if isinstance(part, tuple) else part for part in found]
    vectors = parts[0][0].sum(-1)
    lexical = parts[1][0].sum(0) if len(parts) > 1 else vectors.new_zeros(len(path.tokens))
    for end_of_it in (start, end):
        if end_of_it not in known:
            with torch.no_grad():
                known[end_of_it] = path(places.new_tensor([[end_of_it]]))[0, node].item()
    error = (vectors.sum() + lexical.sum()).item() - (known[end] - known[start])
    return Piece(start, end, steps, vectors.detach(), lexical.detach(), error)


def cut(values: list[float]) -> list[tuple[float, float, int]]:
    """Pieces of a path, by their ends and the steps that each is worth, so that what changes most lies in short ones.

    Args:
        values: at evenly spaced places, the ends included.
    """
    count = len(values) - 1
    change = [abs(values[i + 1] - values[i]) for i in range(count)]
    steep = sorted(range(count), key=lambda i: -change[i])[:STEEP]
    steep = [i for i in steep if change[i] > TOLERANCE]
    ends = sorted({0, count, *steep, *(i + 1 for i in steep)})
    return [(a / count, b / count, STEPS["steep" if a in steep else "flat"]) for a, b in pairwise(ends)]


def gather(
    text: str, word_ids: list[int | None], offsets: list[list[int]], weights: Iterable[float], lexical: Iterable[float]
) -> list[Word]:
    """Words from the pieces that the tokenizer made of them."""
    words: dict[int, Word] = {}
    for word_id, (start, end), weight, share in zip(word_ids, offsets, weights, lexical, strict=True):
        if word_id is None:
            continue
        word = words.setdefault(word_id, {"word": "", "start": start, "end": end, "weight": 0.0, "lexical": 0.0})
        word["start"], word["end"] = min(word["start"], start), max(word["end"], end)
        word["weight"] += weight + share
        word["lexical"] += share
    for word in words.values():
        word["word"] = text[word["start"] : word["end"]]
    return list(words.values())
