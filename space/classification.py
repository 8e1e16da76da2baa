"""Load a checkpoint and classify texts, for both the page and the API.

Worth knowing:

1. On the Hub, code and weights are pinned to the same commit.
2. An invalid request raises `Refused`. Its message is shown to the user, and contains no text, at
   most names of columns.
3. A single-path model predicts one path per text, and guarantees a coverage. A multi-label model
   predicts any number of nodes, and guarantees a recall. In this file, `target` is either.
"""

from typing import Any, TypedDict

import torch
from tables import Refused, problem_of
from transformers import Pipeline, pipeline

from hierarchical_clinicalbert.reading.foreign_code import refuse_foreign_code
from hierarchical_clinicalbert.reading.results import check_version

MIN_TARGET = 0.5
MAX_TARGET = 0.99


class Node(TypedDict):
    """A node of the taxonomy and its probability."""

    label: str
    score: float


class Prediction(Node, total=False):
    """A predicted node, every node from the root to it, and its description if the taxonomy has
    one.
    """

    path: list[Node]
    description: str


class Classification(TypedDict, total=False):
    """The result for one text.

    Attributes:
        labels: the deepest predicted nodes, most probable first: one, or for a multi-label model
            any number.
        label, score, path: those of the first of them; null and an empty path without one.
        p_value: the share of validation texts that look at least as strange to the encoder.
        prediction_set: nodes with the requested coverage, most probable first. It is missing
            without a coverage.
        tokens, tokens_read, truncated: the length of the text in tokens, how many the model has
            read, and whether these differ.
        levels: if asked for: for each level, from the roots down, the probability of every node.
    """

    labels: list[Prediction]
    label: str | None
    score: float | None
    path: list[Node]
    p_value: float
    prediction_set: list[Node]
    tokens: int
    tokens_read: int
    truncated: bool
    levels: list[dict[str, float]]


def load(model: str, revision: str | None) -> Pipeline:
    """Load the pipeline of a checkpoint, from a folder or from the Hub.

    Args:
        revision: the commit on the Hub, for code and weights.

    Raises:
        InputError: the checkpoint names code from outside it.
        ValueError: its code returns the results of another release.
    """
    refuse_foreign_code(model, revision)
    pinned = {"revision": revision, "code_revision": revision}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    task = "hierarchical-text-classification"
    classifier = pipeline(task, model=model, trust_remote_code=True, device=device, **pinned)
    check_version(classifier)
    return classifier


def check_text(text: Any, length: int) -> str:
    """Return the text, if it can be classified.

    Raises:
        Refused: it is not a text, or is blank, longer than ``length`` characters, or not valid
            Unicode.
    """
    if problem := problem_of(text, length):
        raise Refused(f"{problem[:1].upper()}{problem[1:]}.")
    return text


def highest_target(classifier: Pipeline) -> float:
    """Return the highest target for which the checkpoint has a threshold; 0 if it has none."""
    thresholds = classifier.model.config.calibration.set_thresholds or []  # for 1 % to 99 %
    return (
        max(
            (share for share, threshold in enumerate(thresholds, 1) if threshold is not None),
            default=0,
        )
        / 100
    )


def check_target(classifier: Pipeline, target: Any) -> None:
    """Check a requested coverage or recall.

    Raises:
        Refused: it is not a number between 0.5 and 0.99, or the checkpoint has no threshold for it.
    """
    name = classifier.decisions.guarantee
    if not isinstance(target, (int, float)) or not MIN_TARGET <= target <= MAX_TARGET:
        raise Refused(f"The {name} must be a number between {MIN_TARGET} and {MAX_TARGET}.")
    try:
        classifier.decisions.set_threshold(classifier.model.config.calibration, **{name: target})
    except ValueError as error:  # no validation texts, or too few
        raise Refused(f"{str(error).capitalize()}.") from None
