"""Record which texts a checkpoint was trained, selected and calibrated on, so that none of them is
a test text.

The hashes are never published: they reveal who is in the training data. A resumed run splits its
rows by the texts of earlier runs only, and so repeats its first split.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hierarchical_clinicalbert.checkpoint_files import TRAINED_TEXTS, find_trained_texts
from hierarchical_clinicalbert.errors import as_input_error
from hierarchical_clinicalbert.files import write_json
from hierarchical_clinicalbert.reading.columns import text_hash


@dataclass(frozen=True)
class TrainedTexts:
    """Hashes of the texts that the weights of a checkpoint were trained on.

    Attributes:
        earlier: texts of the runs that this run continues.
        this_run: texts of this run.
        validation: texts that selected and calibrated the checkpoint.
        earlier_validation: those of them that did so in the runs that this run continues.
        complete: False if the texts of an earlier run are unknown.
    """

    earlier: frozenset[str] = frozenset()
    this_run: frozenset[str] = frozenset()
    validation: frozenset[str] = frozenset()
    earlier_validation: frozenset[str] = frozenset()
    complete: bool = True

    @property
    def all(self) -> frozenset[str]:
        return self.earlier | self.this_run


NO_TRAINED_TEXTS = TrainedTexts()


def read_trained_texts(checkpoint: str | Path) -> TrainedTexts:
    """Read which texts a checkpoint was trained on."""
    file = find_trained_texts(checkpoint)
    return TrainedTexts(complete=False) if file is None else read_hashes(file)


def read_hashes(file: Path) -> TrainedTexts:
    """Read the file of `write_trained_texts`, or a copy of it."""
    with as_input_error(f"{file}, hashes of the texts that a model was trained on, cannot be read"):
        content = json.loads(file.read_text(encoding="utf-8"))
        names = ("earlier", "this_run", "validation", "earlier_validation")
        sets = {name: frozenset(content[name]) for name in names}
        return TrainedTexts(**sets, complete=bool(content["complete"]))


def write_trained_texts(
    folder: Path, before: TrainedTexts, texts: Iterable[str], validation_texts: Iterable[str]
) -> None:
    """Write hashes of the texts of this run, and of earlier runs (``before``).

    Call this before the first step.
    """
    content = {
        "complete": before.complete,
        "earlier": sorted(before.earlier),
        "this_run": sorted(before.this_run.union(map(text_hash, texts))),
        "validation": sorted(before.validation.union(map(text_hash, validation_texts))),
        "earlier_validation": sorted(before.earlier_validation),
    }
    write_json(folder / TRAINED_TEXTS, content)
