"""Load a checkpoint and classify texts, for both the page and the API.

Worth knowing:

1. The model and its pipeline load in one call of transformers. On the Hub, code and weights are pinned to the same commit.
2. An invalid request raises `Refused`. Its message is shown to the user, and contains no text, at most names of columns.
3. The part of a text that was read is counted in characters, from the tokenizer's offsets.
4. A single-path model predicts one path per text, and guarantees a coverage. A multi-label model predicts any number of nodes,
   and guarantees a recall. In this file, `target` is either.
"""

from typing import Any, TypedDict

import torch
from tables import Refused, problem_of
from transformers import Pipeline, pipeline

from hierarchical_clinicalbert.reading.foreign_code import refuse_foreign_code

MIN_TARGET, MAX_TARGET = 0.5, 0.99


class Node(TypedDict):
    """A node of the taxonomy and its probability."""

    label: str
    score: float


class Prediction(Node):
    """A predicted node, and every node from the root to it."""

    path: list[Node]


class ReadText(TypedDict):
    """What the results for one text have in common. `Classification` describes it."""

    answer: list[Node] | None
    levels: list[dict[str, float]]
    characters: int
    characters_read: int


class Classification(Prediction, ReadText):
    """The result for one text.

    Attributes:
        label, score: the most probable leaf and its probability.
        path: every node from the root to that leaf.
        answer: the nodes that contain the correct leaf for the requested coverage; None without a coverage.
        levels: for each level, from the roots down, the probability of every node.
        characters, characters_read: the length of the text, and of the part that the model has read.
    """


class MultiLabelClassification(ReadText):
    """The result for one text, of a multi-label model.

    Attributes:
        labels: the deepest predicted nodes, most probable first; possibly none.
        answer: the nodes that hold the requested share of a text's nodes on average, most probable first; None without a recall.
        levels: for each level, from the roots down, the probability of every node. They do not add up to 1.
        characters, characters_read: the length of the text, and of the part that the model has read.
    """

    labels: list[Prediction]


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
    if problem := problem_of(text):
        raise Refused(f"{problem[:1].upper()}{problem[1:]}.")
    return text


def highest_target(classifier: Pipeline) -> float:
    """Return the highest target for which the checkpoint has a threshold; 0 if it has none."""
    thresholds = classifier.model.config.calibration.set_thresholds or []  # for 1 % to 99 %
    return max((share for share, threshold in enumerate(thresholds, 1) if threshold is not None), default=0) / 100


def is_calibrated(classifier: Pipeline) -> bool:
    return highest_target(classifier) >= MIN_TARGET


def check_target(classifier: Pipeline, target: Any) -> None:
    """Check a requested coverage or recall.

    Raises:
        Refused: it is not a number between 0.5 and 0.99, or the checkpoint has no threshold for it.
    """
    name = classifier.decisions.guarantee
    if not isinstance(target, (int, float)) or not MIN_TARGET <= target <= MAX_TARGET:
        raise Refused(f"The {name} must be a number between {MIN_TARGET} and {MAX_TARGET}.")
    try:
        classifier.decisions.set_threshold(classifier.model.config.calibration.set_thresholds, **{name: target})
    except ValueError as error:  # no validation texts, or too few
        raise Refused(f"{str(error).capitalize()}.") from None


def classify_all(classifier: Pipeline, texts: list[str], target: float | None) -> list[dict[str, Any]]:
    """Return the results of texts, in order, see `Classification` and `MultiLabelClassification`.

    Args:
        texts: as returned by `check_text`.
        target: as checked by `check_target`. With None, results have no answers.
    """
    options = {} if target is None else {classifier.decisions.guarantee: target}
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


def predictions(result: dict[str, Any]) -> list[Prediction]:
    """Return the predicted nodes of a result with their paths: that of a `Classification` is the result itself."""
    return result.get("labels", [result])
