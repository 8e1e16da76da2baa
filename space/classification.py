"""One text in, its path through the taxonomy out: what the page and the API both answer with.

Worth knowing:

1. The model and its pipeline come with the checkpoint, by one call, as for any stranger. On the Hub the code is pinned to
   the same commit as the weights.
2. What cannot be answered is a `Refused`. Its message goes to the user, so it holds nothing of what the user sent.
3. How much of a text was read is counted in characters, from the tokenizer's offsets.
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
    """What became of a text.

    Attributes:
        label, score: the most probable leaf and its probability.
        path: every node from the root to that leaf.
        answer: the nodes that hold the right leaf for the coverage asked, leaves where the model is sure, their parents
            where it is not; None where no coverage was asked.
        levels: for each level, from the roots down, the probability of every node there.
        characters, characters_read: the length of the text, and how much of its beginning the model has read.
    """

    label: str
    score: float
    path: list[Node]
    answer: list[Node] | None
    levels: list[dict[str, float]]
    characters: int
    characters_read: int


def load(model: str, revision: str | None) -> Pipeline:
    """The pipeline of a checkpoint, from a folder or from the Hub.

    Args:
        revision: a commit of the repository on the Hub, of the code as well as of the weights.
    """
    pinned = {} if revision is None or os.path.isdir(model) else {"revision": revision, "code_revision": revision}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return pipeline("hierarchical-text-classification", model=model, trust_remote_code=True, device=device, **pinned)


def check_text(text: Any) -> str:
    """The text itself.

    Raises:
        Refused: it is no text, blank, too long, or not Unicode.
    """
    if not isinstance(text, str):
        raise Refused("A text is needed, not a number, a list or the like.")
    if not text.strip("\0 \t\r\n") or not text.strip():
        raise Refused("There is no text to classify.")
    if len(text) > MAX_CHARACTERS:
        raise Refused(f"The text has {len(text):,} characters; at most {MAX_CHARACTERS:,} are accepted.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused("The text holds half a character: it is not valid Unicode.") from None
    return text


def check_coverage(classifier: Pipeline, coverage: Any) -> float | None:
    """The coverage asked, or None.

    Raises:
        Refused: it is no number between 0.5 and 0.99, or the model was not calibrated.
    """
    if coverage is None:
        return None
    if isinstance(coverage, bool) or not isinstance(coverage, (int, float)):
        raise Refused("The coverage must be a number.")
    if not LEAST_COVERAGE <= coverage <= MOST_COVERAGE:
        raise Refused(f"The coverage must lie between {LEAST_COVERAGE} and {MOST_COVERAGE}.")
    if not is_calibrated(classifier):
        raise Refused("This model was trained without validation rows: it cannot answer with a coverage.")
    return float(coverage)


def is_calibrated(classifier: Pipeline) -> bool:
    """Whether the checkpoint can answer with a coverage."""
    return classifier.model.config.conformal_thresholds is not None


def classify(classifier: Pipeline, text: Any, coverage: Any = None) -> Classification:
    """Classifies a text.

    Raises:
        Refused: the text or the coverage.
    """
    coverage = check_coverage(classifier, coverage)
    return classify_all(classifier, [check_text(text)], coverage)[0]


def classify_all(classifier: Pipeline, texts: list[str], coverage: float | None) -> list[Classification]:
    """Classifies texts that were checked, in their order."""
    wanted = {} if coverage is None else {"coverage": coverage}
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
        for text, result in zip(texts, classifier(texts, **wanted), strict=True)
    ]


def characters_read(classifier: Pipeline, text: str) -> int:
    """Where the last token ends that the model reads of a text."""
    encoded = classifier.tokenizer(text, truncation=True, return_offsets_mapping=True, verbose=False)
    return max(end for _, end in encoded["offset_mapping"])
