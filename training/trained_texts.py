"""Remember which texts a checkpoint was trained on, so that no score is of one of them.

Worth knowing:

1. A run's folder keeps hashes of its training texts and those of all runs that it continues. They are written before the
   first step, so a killed run has them too.
2. They are never published: they tell who was in the training data.
3. A resumed run splits its rows by the texts of earlier runs only, since its own training texts are all known.
"""

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from errors import refusing

TRAINED_TEXTS = "trained_texts.json"


@dataclass(frozen=True)
class TrainedTexts:
    """Hashes of the texts that a checkpoint has been trained on.

    Attributes:
        earlier: those of the runs that this run continues.
        this_run: those of this run.
        complete: whether these are all. They are not if a run continues a checkpoint without such a file.
    """

    earlier: frozenset[str] = frozenset()
    this_run: frozenset[str] = frozenset()
    complete: bool = True

    @property
    def all(self) -> frozenset[str]:
        return self.earlier | self.this_run


UNTRAINED, UNKNOWN = TrainedTexts(), TrainedTexts(complete=False)


def normalise_text(text: str) -> str:
    """Normalise a text: NFKC, without format characters, case-folded, white space collapsed."""
    if not text.isascii():
        for character in set(text):
            if unicodedata.category(character) == "Cf":  # byte order marks, zero-width characters, soft hyphens
                text = text.replace(character, "")
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def text_hash(normalised: str) -> str:
    """Hash a normalised text to 128 bits, in hexadecimal."""
    return hashlib.blake2b(normalised.encode(), digest_size=16).hexdigest()


def read_trained_texts(checkpoint: str | Path) -> TrainedTexts:
    """Read the file of a checkpoint's folder, or for a ``checkpoint-N`` of its run's folder.

    Returns:
        `UNKNOWN` if there is no such file.

    Raises:
        InputError: the file cannot be read.
    """
    folder = Path(os.path.abspath(checkpoint))  # a checkpoint by a link is of the run that it stands in
    folders = [folder, folder.parent] if re.fullmatch(r"checkpoint-\d+", folder.name) else [folder]
    file = next((place / TRAINED_TEXTS for place in folders if (place / TRAINED_TEXTS).is_file()), None)
    if file is None:
        return UNKNOWN
    with refusing(f"{file}, which tells what {checkpoint} was trained on, cannot be read"):
        known = json.loads(file.read_text(encoding="utf-8"))
        return TrainedTexts(frozenset(known["earlier"]), frozenset(known["this_run"]), bool(known["complete"]))


def write_trained_texts(folder: Path, before: TrainedTexts, texts: Iterable[str]) -> None:
    """Write the file of a run that is about to train.

    Args:
        folder: of the run.
        before: known when it started. For a resumed run, ``this_run`` holds its own texts.
        texts: its training texts.
    """
    this_run = before.this_run | {text_hash(normalise_text(text)) for text in texts}
    content = {"complete": before.complete, "earlier": sorted(before.earlier), "this_run": sorted(this_run)}
    new = folder / f"{TRAINED_TEXTS}.new"
    new.write_text(json.dumps(content, indent=0) + "\n", encoding="utf-8")
    new.replace(folder / TRAINED_TEXTS)  # at once: another run never reads half of it
