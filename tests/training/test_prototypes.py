"""Test heads that are initialised from texts and class names: against encoder vectors, and from the
command line.
"""

import functools

import numpy as np
import pytest
import torch
from conftest import CLEAR
from datasets import Dataset
from scipy.special import log_expit, log_softmax
from test_trainer import arguments
from transformers import AutoModel, AutoTokenizer

from configuration_hierarchical import MULTI_LABEL, SINGLE_LABEL
from hierarchical_clinicalbert.training.arguments import ModelArguments
from hierarchical_clinicalbert.training.model import build_model
from hierarchical_clinicalbert.training.prototypes import (
    DESCRIPTION_WEIGHT,
    NAME_WEIGHT,
    TYPICAL_SCORE,
    initialise_heads,
)
from hierarchical_clinicalbert.training.trainer import HierarchicalTrainer
from taxonomy_hierarchical import DEFAULT_TAXONOMY, Taxonomy

TREE = Taxonomy(DEFAULT_TAXONOMY)
ROWS = [
    {"text": f"We studied {name} in adults, and report how {name} was treated.", "label": label}
    for label, names in CLEAR.items()
    for name in names
]
LEAVES = [[TREE.id(row["label"])] for row in ROWS]
DESCRIPTIONS = {
    "neoplasms": "carcinoma, lymphoma, sarcoma",
    "digestive system diseases": "gastritis, hepatitis, ulcer",
    "nervous system diseases": "epilepsy, dementia, seizures",
    "cardiovascular diseases": "angina, infarction, thrombosis",
}
FITS = (
    "the training texts and the class names",
    "the training texts alone",
    "the training texts, the class names and their descriptions",
)


@functools.cache
def vectors(minilm: str, texts: tuple[str, ...]) -> np.ndarray:
    """Return the mean token vectors of the pretrained encoder, loaded by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    encoder = AutoModel.from_pretrained(minilm).eval()
    with torch.no_grad():
        return np.stack(
            [
                encoder(**tokenizer(t, return_tensors="pt")).last_hidden_state[0].mean(0).numpy()
                for t in texts
            ]
        )


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector, axis=-1, keepdims=True)


def offsets_and_names(
    minilm: str, names: list[str], rows=ROWS
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the texts' offsets from their mean, over their RMS distance from it, and the
    directions of the names.
    """
    texts = vectors(minilm, tuple(row["text"] for row in rows))
    named = vectors(minilm, tuple(names))
    offsets = texts - texts.mean(0)
    return offsets / np.sqrt((offsets**2).sum(1).mean()), [
        unit(one - named.mean(0)) for one in named
    ]


def trainer_of(
    minilm: str, folder, tree: Taxonomy = TREE, heads_init: str | None = None, **settings
) -> HierarchicalTrainer:
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    model = build_model(ModelArguments(minilm, quantization="none"), tree, seed=1, **settings)
    return HierarchicalTrainer(
        model=model,
        args=arguments(folder, heads_init=heads_init),
        processing_class=tokenizer,
    )


def tokenized(trainer: HierarchicalTrainer, nodes: list[list[int]] = LEAVES) -> Dataset:
    inputs = trainer.processing_class([row["text"] for row in ROWS])["input_ids"]
    return Dataset.from_dict({"input_ids": inputs, "labels": nodes})


def predicted(trainer: HierarchicalTrainer, output: str) -> np.ndarray:
    model = trainer.model.eval()
    with torch.no_grad():
        inputs = [trainer.processing_class(row["text"], return_tensors="pt") for row in ROWS]
        return np.concatenate([model(**one)[output].numpy() for one in inputs])


def several_labels() -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    """Return two nodes for each row, which nodes each row has, and each node's log-odds given its
    parent.
    """
    nodes = [[*LEAVES[i], *LEAVES[i // 2]] for i in range(len(ROWS))]
    has = np.array(
        [
            [node in TREE.with_ancestors(of_row) for node in range(TREE.num_nodes)]
            for of_row in nodes
        ]
    )
    odds = []
    for node, parent in enumerate(TREE.parents):
        given = has if parent < 0 else has[has[:, parent]]
        odds.append(
            np.log((given[:, node].sum() + 0.5) / (len(given) - given[:, node].sum() + 0.5))
        )
    return nodes, has, np.array(odds)


@pytest.mark.parametrize(
    ("problem_type", "fits", "shift", "descriptions"),
    [
        (SINGLE_LABEL, FITS[0], 0, {}),
        (SINGLE_LABEL, FITS[1], 1, {}),
        (SINGLE_LABEL, FITS[2], 0, DESCRIPTIONS),
        (
            SINGLE_LABEL,
            FITS[0],
            0,
            dict(zip(DESCRIPTIONS, [*DESCRIPTIONS.values()][::-1], strict=True)),
        ),
        (MULTI_LABEL, FITS[0], 0, {}),
    ],
)
def test_scores_are_those_worked_by_hand(
    minilm, tmp_path, caplog, problem_type, fits, shift, descriptions
):
    """Test labels that fit the names, labels of the next class, and descriptions that fit or
    contradict the names.

    The best source is found by leave-one-out likelihood.
    """
    several = problem_type == MULTI_LABEL
    classes = TREE.labels if several else TREE.labels[: TREE.num_leaves]
    nodes, has, odds = several_labels()
    if not several:
        nodes = [[(leaf + shift) % len(classes)] for (leaf,) in LEAVES]
        odds = np.zeros(len(classes))
        has = np.array([[leaf == own for leaf in range(len(classes))] for (own,) in nodes])
    offsets, names = offsets_and_names(minilm, classes)
    _, described = offsets_and_names(
        minilm,
        [f"{name}: {descriptions[name]}" if name in descriptions else name for name in classes],
    )

    def scores(directions, weights, left_out: int | None = None) -> np.ndarray:
        known = np.arange(len(ROWS)) != left_out
        sums = [offsets[known & of_class].sum(0) for of_class in has.T]
        prototypes = [
            unit(k * u + one) for k, u, one in zip(weights, directions, sums, strict=True)
        ]
        found = odds + TYPICAL_SCORE * offsets @ np.transpose(prototypes)
        return found if several else log_softmax(found, axis=1)

    def likelihood(source: str) -> float:
        weights = [0 if "alone" in source else NAME_WEIGHT] * len(classes)
        own = np.array([scores(sources[source], weights, left_out=i)[i] for i in range(len(ROWS))])
        if not several:
            return own[has].sum()
        parents = np.array(TREE.parents)
        return log_expit(np.where(has, own, -own))[(parents < 0) | has[:, parents]].sum()

    sources = dict(zip(FITS, (names, names, described), strict=True))
    assert max(sources, key=likelihood) == fits
    weights = [0 if "alone" in fits else NAME_WEIGHT] * len(classes)
    if "descriptions" in fits:
        weights = [DESCRIPTION_WEIGHT if name in descriptions else NAME_WEIGHT for name in classes]
    tree = Taxonomy(DEFAULT_TAXONOMY, descriptions=descriptions)
    trainer = trainer_of(minilm, tmp_path, tree, "prototypes", problem_type=problem_type)
    with caplog.at_level("INFO"):
        assert initialise_heads(trainer, tokenized(trainer, nodes)) == "prototypes"
    assert f"heads are initialised from {fits}" in caplog.text
    found = predicted(trainer, "decision_logits" if several else "logits")
    np.testing.assert_allclose(found, scores(sources[fits], weights), atol=1e-3)


@pytest.mark.parametrize(
    ("rows", "requested", "expected"),
    [(159, None, "prototypes"), (160, None, "random"), (160, "prototypes", "prototypes")],
)
def test_with_32_rows_per_class_heads_are_random_unless_requested_otherwise(
    tiny_encoder, tmp_path, rows, requested, expected
):
    trainer = trainer_of(tiny_encoder, tmp_path, heads_init=requested)  # five classes
    before = trainer.model.heads.weight.clone()
    data = tokenized(trainer).select([i % len(ROWS) for i in range(rows)])
    assert initialise_heads(trainer, data) == expected
    assert torch.equal(trainer.model.heads.weight, before) == (expected == "random")
