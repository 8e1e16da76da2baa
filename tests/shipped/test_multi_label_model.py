import pytest
import torch
from conftest import untrained_model
from torch import nn
from transformers import AutoTokenizer, pipeline

from configuration_hierarchical import Calibration
from modeling_hierarchical import HierarchicalForSequenceClassification
from taxonomy_hierarchical import Taxonomy

TREE = Taxonomy({"a": {"b": ["c", "d"], "e": None}, "f": ["g", "c"], "h": None})
THRESHOLDS = [0.3, 0.45, 0.2, 0.5, 0.35, 0.6, 0.4, 0.25, 0.5][: TREE.num_nodes]
TEXTS = [
    "Liver cirrhosis.",
    "A randomized trial of aspirin after myocardial infarction.",
    "Stroke and epilepsy",
    "x",
]
RECALL = [round(0.99 - 0.01 * level, 6) for level in range(95)] + [None] * 4


def uncalibrated(minilm: str) -> HierarchicalForSequenceClassification:
    return untrained_model(minilm, TREE, problem_type="multi_label_classification")


@pytest.fixture(scope="module")
def checkpoint(minilm, tmp_path_factory) -> str:
    torch.manual_seed(1)
    model = uncalibrated(minilm)
    nn.init.normal_(model.heads.weight, std=0.5)
    model.set_calibration(
        Calibration(thresholds=THRESHOLDS, set_thresholds=RECALL, max_length=512, num_texts=20)
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def classify(checkpoint):
    return pipeline("hierarchical-text-classification", model=checkpoint, trust_remote_code=True)


def deepest_reached(result: dict, thresholds: list[float]) -> dict[str, float]:
    """Return the nodes that reach their threshold, none of whose descendants does, with their
    probabilities.
    """
    p = {label: score for level in result["levels"] for label, score in level.items()}
    ids = {i for i, least in enumerate(thresholds) if p[TREE.labels[i]] >= least}
    return {
        TREE.labels[i]: p[TREE.labels[i]]
        for i in ids
        if not any(i in TREE.path(j)[:-1] for j in ids)
    }


def test_the_deepest_nodes_that_reach_their_threshold_are_predicted(classify):
    for result in classify(TEXTS, levels=True):
        deepest = deepest_reached(result, THRESHOLDS)
        assert {node["label"] for node in result["labels"]} == deepest.keys()
        assert [node["score"] for node in result["labels"]] == sorted(
            deepest.values(), reverse=True
        )
        for node in result["labels"]:
            assert [step["label"] for step in node["path"]] == [
                TREE.labels[i] for i in TREE.path(TREE.id(node["label"]))
            ]
            scores = [step["score"] for step in node["path"]]
            assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"recall": 0.97},
            (
                "recall 0.97 needs 33 labelled validation texts, and the checkpoint was "
                "calibrated on fewer"
            ),
        ),
        ({"recall": 1.0}, "recall must be a number above 0 and at most 0.99"),
        ({"coverage": 0.9}, "this checkpoint guarantees a recall, no coverage: give recall"),
        ({"recall": 0.5, "max_length": 64}, "recall needs texts truncated at 512 tokens"),
    ],
)
def test_arguments_that_the_checkpoint_cannot_serve_are_refused(classify, given, message):
    with pytest.raises(ValueError, match=message):
        classify(TEXTS[0], **given)


def test_an_uncalibrated_checkpoint_has_thresholds_of_one_half_and_no_guarantee(minilm, tmp_path):
    model = uncalibrated(minilm)
    nn.init.normal_(model.heads.weight, std=0.5)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(minilm).save_pretrained(tmp_path)
    classify = pipeline(
        "hierarchical-text-classification", model=str(tmp_path), trust_remote_code=True
    )
    results = classify(TEXTS, levels=True)
    expected = [deepest_reached(result, [0.5] * TREE.num_nodes) for result in results]
    assert any(expected)
    assert [
        {node["label"]: node["score"] for node in result["labels"]} for result in results
    ] == expected
    with pytest.raises(ValueError, match="this checkpoint was not calibrated: recall needs"):
        classify(TEXTS[0], recall=0.9)
    classify.model.config.calibration.thresholds = [1.1] * TREE.num_nodes
    result = classify(TEXTS[0])  # no label is a prediction, too
    assert (result["labels"], result["label"], result["score"], result["path"]) == (
        [],
        None,
        None,
        [],
    )
