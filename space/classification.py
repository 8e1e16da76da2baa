"""Load a checkpoint and classify texts, for both the page and the API.

Worth knowing:

1. The model and its pipeline load in one call of transformers. On the Hub, code and weights are pinned to the same commit.
2. An invalid request raises `Refused`. Its message is shown to the user, and contains nothing that the user sent.
3. The part of a text that was read is counted in characters, from the tokenizer's offsets.
"""

import os
from typing import Any, TypedDict

import torch
from tables import Refused
from transformers import Pipeline, pipeline

MAX_CHARACTERS = 20_000
LEAST_COVERAGE, MOST_COVERAGE = 0.5, 0.99


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


def load(model: str, revision: str | None) -> Pipeline:
    """Load the pipeline of a checkpoint, from a folder or from the Hub.

    Args:
        revision: the commit on the Hub, for code and weights.
    """
    pinned = {} if revision is None or os.path.isdir(model) else {"revision": revision, "code_revision": revision}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return pipeline("hierarchical-text-classification", model=model, trust_remote_code=True, device=device, **pinned)


def check_text(text: Any) -> str:
    """Return the text, if it can be classified.

    Raises:
        Refused: it is no text, blank, too long, or not valid Unicode.
    """
    if not isinstance(text, str):
        raise Refused("A text is needed, not a number, a list or another type.")
    if not text.strip("\0 \t\r\n") or not text.strip():
        raise Refused("There is no text to classify.")
    if len(text) > MAX_CHARACTERS:
        raise Refused(f"The text has {len(text):,} characters; at most {MAX_CHARACTERS:,} are accepted.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused("The text is not valid Unicode: it has half of a surrogate pair.") from None
    return text


def check_coverage(classifier: Pipeline, coverage: Any) -> float | None:
    """Return the requested coverage, or None.

    Raises:
        Refused: it is no number between 0.5 and 0.99, or the model is not calibrated.
    """
    if coverage is None:
        return None
    if isinstance(coverage, bool) or not isinstance(coverage, (int, float)):
        raise Refused("The coverage must be a number.")
    if not LEAST_COVERAGE <= coverage <= MOST_COVERAGE:
        raise Refused(f"The coverage must lie between {LEAST_COVERAGE} and {MOST_COVERAGE}.")
    if not is_calibrated(classifier):
        raise Refused("This model was trained without validation rows, so it has no coverage guarantee.")
    return float(coverage)


def is_calibrated(classifier: Pipeline) -> bool:
    """Return whether the checkpoint has thresholds for a coverage."""
    return classifier.model.config.conformal_thresholds is not None


def classify(classifier: Pipeline, text: Any, coverage: Any = None) -> Classification:
    """Classify one text.

    Raises:
        Refused: the text or the coverage is invalid.
    """
    coverage = check_coverage(classifier, coverage)
    return classify_all(classifier, [check_text(text)], coverage)[0]


def classify_all(classifier: Pipeline, texts: list[str], coverage: float | None) -> list[Classification]:
    """Classify texts that `check_text` has returned, in their order."""
    options = {} if coverage is None else {"coverage": coverage}
    return [
        {
            "label": result["label"],
            "score": result["score"],
            "path": result["path"],
            "answer": result.get("answer"),
            "levels": result["levels"],
            "characters": len(text),
            "characters_read": characters_read(classifier, text) if result["truncated"] else len(text),
        }
        for text, result in zip(texts, classifier(texts, **options), strict=True)
    ]


def characters_read(classifier: Pipeline, text: str) -> int:
    """Return the number of characters up to the end of the last token that the model reads."""
    encoded = classifier.tokenizer(text, truncation=True, return_offsets_mapping=True, verbose=False)
    return max(end for _, end in encoded["offset_mapping"])
