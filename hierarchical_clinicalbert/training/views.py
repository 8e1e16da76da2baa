"""Consistency regularisation: train on two halves of each text, whose predictions must agree.

Worth knowing:

1. The method is in docs/method.md, "Consistency training". The two views of a text differ by their
   sentences. The views of R-Drop (Liang et al., 2021, arXiv 2106.14448) differ by dropout, which is
   the largest cost of a training step on a CPU.
2. Halves of similar length, truncated at `MAX_HALF`, give a batch 1.1 times the tokens of its
   texts. If each sentence were assigned independently, the factor would be 1.8.
"""

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

FIRST_IN_BOTH = 0.7  # how often both halves have the first sentence, which is usually a title
MAX_HALF = 0.55  # largest share of a text's tokens in one half
NO_SENTENCE = -1  # in place of a special token's sentence number
PADDING = -2
BOUNDARY = re.compile(r"(?<=[.?!])\s+|(?<=[。！？])")


def sentence_numbers(text: str, ends: Sequence[int]) -> list[int]:
    """Return each token's sentence number, from 0.

    ``ends`` are end positions in the text; special tokens, at 0, get -1.
    """
    starts = [boundary.end() for boundary in BOUNDARY.finditer(text)]
    numbers = np.searchsorted(starts, np.asarray(ends) - 1, side="right")
    return np.where(np.asarray(ends) == 0, NO_SENTENCE, numbers).tolist()


def halves(
    inputs: dict[str, Tensor],
    sentences: np.ndarray,
    rows: Sequence[int],
    pad_token_id: int,
    seed: int,
    step: int,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Split a batch of texts, whose ``inputs`` and ``sentences`` are (B, T), into halves. Special
    tokens are in both.

    Returns:
        The inputs of the halves, (V, T'), truncated; and the indices of each text's two halves
        among them, (B,) each. A text of one sentence stays whole and occurs once, so V is between B
        and 2B.
    """
    # masks: the tokens that each half keeps
    masks = []
    text_of = []
    first = []
    second = []
    for i, (row, numbers) in enumerate(zip(rows, sentences, strict=True)):
        counts = np.bincount(numbers[numbers >= 0])  # tokens of each sentence
        if np.count_nonzero(counts) < 2:  # nothing to split: the text stays whole
            own = [numbers != PADDING]
        else:
            parts = split_sentences(counts, np.random.default_rng([seed, step, row]))[
                :, numbers
            ] & (numbers >= 0)
            within_limit = parts.cumsum(1) <= MAX_HALF * counts.sum()
            own = list((numbers == NO_SENTENCE) | (parts & within_limit))
        first.append(len(masks))
        masks += own
        second.append(len(masks) - 1)
        text_of += [i] * len(own)
    kept = np.array(masks)
    lengths = kept.sum(1)
    longest = min(kept.shape[1], -(-int(lengths.max()) // 8) * 8)
    # kept tokens first, in their order
    order = np.argsort(~kept, axis=1, kind="stable")[:, :longest]
    inside, places, source, *pair = (
        torch.from_numpy(array).to(inputs["input_ids"].device, non_blocking=True)
        for array in (
            np.arange(longest) < lengths[:, None],
            order,
            *map(np.array, (text_of, first, second)),
        )
    )
    halved = {
        name: torch.where(inside, values[source].gather(1, places), 0)
        for name, values in inputs.items()
    }
    halved["input_ids"].masked_fill_(~inside, pad_token_id)
    return halved, *pair


def split_sentences(counts: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Assign sentences of ``counts`` (S,) tokens to halves, (2, S).

    In random order, each goes to the one with fewer.
    """
    parts = np.zeros((2, len(counts)), dtype=bool)
    tokens = [0, 0]
    for sentence in generator.permutation(len(counts)):
        half = int(tokens[1] < tokens[0])
        parts[half, sentence] = True
        tokens[half] += counts[sentence]
    parts[:, 0] |= generator.random() < FIRST_IN_BOTH
    return parts
