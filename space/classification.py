"""Load a checkpoint and classify texts, for both the page and the API.

Worth knowing:

1. The model and its pipeline load in one call of transformers. On the Hub, code and weights are pinned to the same commit.
2. An invalid request raises `Refused`. Its message is shown to the user, and contains no text, at most names of columns.
3. The part of a text that was read is counted in characters, from the tokenizer's offsets.
4. A single-path model predicts one path per text, and guarantees a coverage. A multi-label model predicts any number of nodes,
   and guarantees a recall. In this file, `target` is either.
"""

from contextlib import suppress
from typing import Any, TypedDict

import torch
from tables import Refused
from transformers import Pipeline, pipeline

from hierarchical_clinicalbert.reading.columns import is_blank
from hierarchical_clinicalbert.reading.foreign_code import refuse_foreign_code
from hierarchical_clinicalbert.reading.rows import has_surrogate

MAX_CHARACTERS = 20_000
MIN_TARGET, MAX_TARGET = 0.5, 0.99


class Node(TypedDict):
    """A node of the taxonomy and its probability."""

    label: str
    score: float


class Classification(TypedDict):
    """The result for one text.

    Attributes:
        label, score: the most probable leaf and its probability.
        path: every node from the root to that leaf.
        answer: the nodes that contain the correct leaf for the requested coverage; None without a coverage.
        levels: for each level, from the roots down, the probability of every node.
        characters, characters_read: the length of the text, and of the part that the model has read.
    """

    label: str
    score: float
    path: list[Node]
    answer: list[Node] | None
    levels: list[dict[str, float]]
    characters: int
    characters_read: int


class Prediction(Node):
    """A predicted node, and every node from the root to it."""

    path: list[Node]


class MultiLabelClassification(TypedDict):
    """The result for one text, of a multi-label model.

    Attributes:
        labels: the deepest predicted nodes, most probable first; possibly none.
        answer: the nodes that hold the requested share of a text's nodes on average, most probable first; None without a recall.
        levels: for each level, from the roots down, the probability of every node. They do not add up to 1.
        characters, characters_read: the length of the text, and of the part that the model has read.
    """

    labels: list[Prediction]
    answer: list[Node] | None
    levels: list[dict[str, float]]
    characters: int
    characters_read: int


def load(model: str, revision: str | None) -> Pipeline:
    """Load the pipeline of a checkpoint, from a folder or from the Hub.

    Args:
        revision: the commit on the Hub, for code and weights.

    Raises:
        InputError: the checkpoint names code from outside it.
    """
    refuse_foreign_code(model, revision)
    pinned = {"revision": revision, "code_revision": revision}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return pipeline("hierarchical-text-classification", model=model, trust_remote_code=True, device=device, **pinned)


def check_text(text: Any) -> str:
    """Return the text, if it can be classified.

    Raises:
        Refused: it is not a text, or is blank, too long, or not valid Unicode.
    """
    if not isinstance(text, str):
        raise Refused("A text is needed, not a number, a list or another type.")
    if is_blank(text):
        raise Refused("There is no text to classify.")
    if len(text) > MAX_CHARACTERS:
        raise Refused(f"The text has {len(text):,} characters; at most {MAX_CHARACTERS:,} are accepted.")
    if has_surrogate(text):
        raise Refused("The text is not valid Unicode: it has half of a surrogate pair.")
    return text


def guarantee(classifier: Pipeline) -> str:
    """Return what the model guarantees: "coverage" or "recall", as the pipeline's argument is called."""
    return classifier.decisions.guarantee


def highest_target(classifier: Pipeline) -> float:
    """Return the highest target for which the checkpoint has a threshold; 0 if it has none."""
    name = guarantee(classifier)
    for percent in range(99, 0, -1):
        with suppress(ValueError):  # no validation texts, or too few
            classifier._sanitize_parameters(**{name: percent / 100})
            return percent / 100
    return 0.0


def is_calibrated(classifier: Pipeline) -> bool:
    return highest_target(classifier) >= MIN_TARGET


def check_target(classifier: Pipeline, target: Any) -> float | None:
    """Return the requested coverage or recall, or None.

    Raises:
        Refused: it is not a number between 0.5 and 0.99, or the checkpoint has no threshold for it.
    """
    if target is None:
        return None
    name = guarantee(classifier)
    if not isinstance(target, (int, float)):
        raise Refused(f"The {name} must be a number.")
    if not MIN_TARGET <= target <= MAX_TARGET:
        raise Refused(f"The {name} must lie between {MIN_TARGET} and {MAX_TARGET}.")
    try:
        classifier._sanitize_parameters(**{name: target})
    except ValueError as error:  # no validation texts, or too few
        raise Refused(f"{str(error).capitalize()}.") from None
    return target


def classify_all(
    classifier: Pipeline, texts: list[str], target: float | None
) -> list[Classification] | list[MultiLabelClassification]:
    """Return the results of texts, in order.

    Args:
        texts: as returned by `check_text`.
        target: as returned by `check_target`. With None, results have no answers.
    """
    options = {} if target is None else {guarantee(classifier): target}
    results = classifier(texts, **options)
    for text, result in zip(texts, results, strict=True):
        truncated = result.pop("truncated")
        result.setdefault("answer", None)
        result["characters"] = len(text)
        result["characters_read"] = characters_read(classifier, text) if truncated else len(text)
    return results


def characters_read(classifier: Pipeline, text: str) -> int:
    """Return the number of characters up to the end of the last token that the model reads."""
    encoded = classifier.tokenizer(text, truncation=True, return_offsets_mapping=True, verbose=False)
    return max(end for _, end in encoded["offset_mapping"])
