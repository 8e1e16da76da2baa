"""Compare what users do on a device with the same on the CPU: the losses, labels and probabilities.

Each story of `stories` runs in a process of its own, on the device and on the CPU.
"""

import json
import math
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from conftest import CLEAR, clear_rows, unclear_texts, write_csv
from forked import COMMANDS
from test_pretend import DEVICES, HERE, run_on

# of losses, gradients and probabilities in float32: devices add numbers in another order
TOLERANCE = {"abs_tol": 1e-4, "rel_tol": 1e-3}
OF_METRICS = {"abs_tol": 0.02, "rel_tol": 0.0}  # one of 90 texts may change its rank or bin
FORMS = ("one_path", "many_nodes")
POOLINGS = ("mean", "cls", "label_attention", "family_attention")
GENERAL = "general pathological conditions"
TREE = {"specific disease": [label for label in CLEAR if label != GENERAL], GENERAL: None}
NEW = "poisoning"
METALS = ("arsenic", "cadmium", "lead", "mercury", "nickel", "thallium")
FILLER = "The weather stayed mild that day. " * 170  # ten windows of the small encoder


@pytest.fixture(scope="module")
def data(tiny_encoder, tmp_path_factory) -> Path:
    """Write the files of all stories."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "encoder").symlink_to(tiny_encoder)
    (folder / "tree.json").write_text(json.dumps(TREE))
    (folder / "grown.json").write_text(json.dumps({**TREE, NEW: None}))
    write_csv(folder / "texts.csv", [{"text": text} for text in unclear_texts(12)])
    for form in FORMS:
        for offset, split in enumerate(("train", "validation", "test", "other")):
            rows = two_sentences(form, offset)
            long_rows = [row | {"text": FILLER + row["text"]} for row in rows[::4]]
            write_csv(folder / f"{form}_{split}.csv", rows)
            write_csv(folder / f"long_{form}_{split}.csv", long_rows)
        taught = two_sentences(form, 0) + two_sentences(form, 3)
        for row in taught:
            row["probabilities"] = json.dumps(dict.fromkeys(row.pop("label").split(";"), 0.4))
        write_csv(folder / f"{form}_teacher.csv", taught)
    new = [{"text": f"A case of poisoning by {metal}.", "label": NEW} for metal in METALS]
    write_csv(folder / "new_train.csv", new)
    write_csv(folder / "grown_train.csv", two_sentences("one_path", 0) + new)
    return folder


def two_sentences(form: str, offset: int) -> list[dict[str, str]]:
    """Return texts of two sentences, with the label of the first, or for many nodes of both."""
    firsts = clear_rows(offset)
    rows = []
    for one, other in zip(firsts, firsts[7:] + firsts[:7], strict=True):
        labels = {one["label"]: None}
        if form == "many_nodes":
            labels[other["label"]] = None
        rows.append({"text": f"{one['text']} {other['text']}", "label": ";".join(labels)})
    return rows


def tell(story: str, device: str, data: Path, folder: Path) -> dict[str, Any]:
    """Run a story on a device, with its outputs in a new folder. Return its numbers and labels."""
    folder.mkdir()
    words = (HERE / "stories.py", device, data, *story.split())
    return run_on(device, *words, cwd=folder, modules=COMMANDS)


def differences(found: Any, expected: Any, tolerance=TOLERANCE, place: str = "") -> list[str]:
    """Describe each place where two JSON values differ, numbers by more than a tolerance."""
    if isinstance(found, dict) and isinstance(expected, dict) and found.keys() == expected.keys():
        pairs = [(name, found[name], expected[name]) for name in found]
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        pairs = [*zip(range(len(found)), found, expected, strict=True)]
    elif isinstance(found, float) and isinstance(expected, float):
        is_close = math.isclose(found, expected, **tolerance)
        return [] if is_close else [f"{place}: {found}, not {expected}"]
    else:
        return [] if found == expected else [f"{place}: {found!r}, not {expected!r}"]
    inner = OF_METRICS if place.endswith("/metrics") else tolerance
    of_pairs = [differences(*both, inner, f"{place}/{name}") for name, *both in pairs]
    return [*chain.from_iterable(of_pairs)]


@DEVICES
@pytest.mark.parametrize(
    "story",
    [
        *(f"trained {form} {pooling}" for form in FORMS for pooling in POOLINGS),
        *(f"few_rows {form}" for form in FORMS),
        *(f"taught {form}" for form in FORMS),
        *("long_texts one_path mean", "long_texts many_nodes label_attention"),
        *("no_rows", "continued", "resumed"),
    ],
)
def test_a_device_has_the_numbers_and_labels_of_the_cpu(story, device, data, tmp_path):
    found, expected = (tell(story, one, data, tmp_path / one) for one in (device, "cpu"))
    assert differences(found, expected) == []
