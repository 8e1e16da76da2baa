"""Test what tells strange texts from others: against scikit-learn and SciPy, against counts by
hand, and through all doors.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import predict_here, read_csv, untrained_model, write_csv
from safetensors.torch import load_file
from scipy.spatial.distance import mahalanobis
from scipy.stats import binom
from sklearn.covariance import LedoitWolf
from test_long_texts import padded, small_model, texts_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from configuration_hierarchical import MULTI_LABEL, SINGLE_LABEL, Calibration
from hierarchical_clinicalbert.evaluation.open_world import (
    MIN_REFERENCES,
    fit_open_world,
    merge_texts,
    share_of_strange,
)
from open_world_hierarchical import MAX_REFERENCES, OpenWorld
from taxonomy_hierarchical import Taxonomy

TREE = Taxonomy({"a": ["b", "c", "d"], "e": ["f"], "g": None})
SIZE = 6


def draw(nodes: list[int], seed: int, tree: Taxonomy = TREE) -> np.ndarray:
    """Draw vectors of texts with these nodes, and energies: siblings are closer to each other than
    to the other classes.
    """
    places = np.random.default_rng(0).normal(size=(tree.num_nodes, SIZE)) * [
        [6 / level] for level in tree.levels
    ]
    offsets = np.random.default_rng(seed).normal(size=(len(nodes), SIZE)) * np.linspace(
        0.5, 2, SIZE
    )
    vectors = np.array([places[tree.path(node)].sum(0) for node in nodes]) + offsets
    return np.c_[vectors, 3 + np.abs(offsets[:, 0])].astype(np.float32)


def drawn(count: int, seed: int) -> tuple[np.ndarray, list[list[int]]]:
    nodes = np.random.default_rng(seed).choice([TREE.id(name) for name in "bcdfg"], count).tolist()
    return draw(nodes, seed + 1), [[node] for node in nodes]


def training(count: int, seed: int) -> tuple[np.ndarray, list[list[int]]]:
    vectors, nodes = drawn(count, seed)
    return vectors[:, :-1], nodes


@pytest.fixture(scope="module")
def fitted() -> OpenWorld:
    return fit_open_world(TREE, *training(400, 1), drawn(150, 3)[0])


def test_a_text_has_the_rank_of_its_strangeness_among_the_validation_texts(fitted):
    validation, _ = drawn(150, 3)
    references = fitted(torch.from_numpy(validation)).numpy()
    new, _ = drawn(2000, 11)
    strangeness = fitted(torch.from_numpy(new))
    expected = [(1 + (references >= value).sum()) / 151 for value in strangeness.numpy()]
    assert fitted.p_values(strangeness).tolist() == expected
    far = fitted(torch.full((1, SIZE + 1), 100.0))
    assert fitted.p_values(far).tolist() == [1 / 151]
    with_more_energy = draw([TREE.id("b")] * 200, 0).mean(0)
    with_more_energy[-1] = 6  # than any text
    assert fitted.p_values(fitted(torch.from_numpy(with_more_energy[None]))).item() <= 0.05


def test_without_enough_validation_texts_or_differences_there_are_no_p_values():
    assert fit_open_world(TREE, *training(200, 1), drawn(MIN_REFERENCES, 3)[0]) is not None
    assert fit_open_world(TREE, *training(200, 1), drawn(MIN_REFERENCES - 1, 3)[0]) is None
    vectors, nodes = training(2, 1)
    assert (
        fit_open_world(
            TREE, vectors.repeat(8, 0), [nodes[0]] * 8 + [nodes[1]] * 8, drawn(150, 3)[0]
        )
        is None
    )


def test_a_text_with_several_labels_is_a_part_of_each_class_and_no_mean_is_of_one_text():
    b, d, g = map(TREE.id, "bdg")
    vectors = draw([b, d, g, g], 0)[:, :-1]
    nodes = [[b, TREE.id("a"), g], [d, TREE.id("a")], [g], []]
    validation, _ = drawn(30, 3)
    open_world = fit_open_world(TREE, vectors, nodes, validation)
    whitened = (torch.from_numpy(vectors) - open_world.center) @ open_world.whitening
    assert open_world.means[g].tolist() == pytest.approx(
        ((0.5 * whitened[0] + whitened[2]) / 1.5).tolist(), abs=1e-3
    )
    # the classes b, d and "no label" have one text each, whose vector is not to be stored: the
    # first two count as their parent
    assert open_world.means[TREE.id("a")].tolist() == pytest.approx(
        ((0.5 * whitened[0] + whitened[1]) / 1.5).tolist(), abs=1e-3
    )
    assert np.flatnonzero(open_world.shares).tolist() == sorted([TREE.id("a"), g])
    assert not any(
        torch.allclose(mean, text, atol=1e-2) for mean in open_world.means for text in whitened
    )
    first, merged = merge_texts(np.array([7, 5, 7]), [[b], [g], [d]])
    assert (first.tolist(), merged) == ([1, 0], [[g], [b, d]])


def test_at_base_size_at_most_4_mb_are_stored_for_1500_nodes():
    vectors = draw([TREE.id("b")] * (MAX_REFERENCES + 1), 9)
    most = len(fit_open_world(TREE, *training(200, 1), vectors).references)
    assert most == MAX_REFERENCES
    for num_nodes, precision in ((530, torch.float32), (531, torch.float16), (1500, torch.float16)):
        stored = OpenWorld(
            Taxonomy([f"leaf {i}" for i in range(num_nodes)]), 768, most
        ).state_dict()
        assert stored["whitening"].dtype == precision
        assert sum(tensor.nbytes for tensor in stored.values()) <= 4_000_000


def test_few_texts_like_the_validation_texts_are_strange(fitted):
    new, _ = drawn(2000, 11)
    share = share_of_strange(fitted, new, np.arange(len(new)))
    assert share == (fitted.p_values(fitted(torch.from_numpy(new))) <= 0.05).double().mean()
    assert share <= binom.ppf(0.9999, 150, 0.05) / 150
    # a text with several rows counts once
    again = np.r_[new, new[:500]]
    assert share_of_strange(fitted, again, np.r_[np.arange(len(new)), np.arange(500)]) == share


# ── The model, and its checkpoints ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pooling", ["mean", "cls", "label_attention"])
@torch.no_grad()
def test_vectors_are_the_means_of_the_tokens_of_all_windows(pooling):
    model = small_model(pooling=pooling)
    texts = texts_of([7, 16, 40])
    vectors = model(**padded(texts, 48), output_vectors=True).vectors
    for text, vector in zip(texts[:2], vectors, strict=False):
        hidden = model.encoder(torch.tensor([text])).last_hidden_state[0]
        torch.testing.assert_close(vector[:-1], hidden.mean(0), atol=1e-5, rtol=0)
    tokens, _ = model.encode(**padded(texts[2:]))
    assert len(tokens.vectors) == 3  # windows
    torch.testing.assert_close(
        vectors[2, :-1], tokens.vectors[tokens.mask].mean(0), atol=1e-5, rtol=0
    )
    # the energy: the scores of the roots, of which one is a parent
    roots = model.config.tree.children(-1)
    scores = model(**padded(texts, 48)).decision_logits[:, roots]
    torch.testing.assert_close(vectors[:, -1], -scores.exp().sum(1).log(), atol=1e-5, rtol=0)
    assert model(**padded(texts)).vectors is None


@torch.no_grad()
def test_with_several_labels_the_energy_adds_up_the_roots():
    model = small_model(problem_type=MULTI_LABEL)
    texts = padded(texts_of([7, 16]))
    scores = model(**texts).decision_logits[:, model.config.tree.children(-1)]
    found = model(**texts, output_vectors=True).vectors[:, -1]
    torch.testing.assert_close(found, -(1 + scores.exp()).log().sum(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("problem_type", "size"), [(SINGLE_LABEL, 3), (MULTI_LABEL, 16_000)])
@torch.no_grad()
def test_a_whole_model_has_the_p_values_of_the_saved_one(
    problem_type, size, tiny_encoder, tmp_path
):
    """The test below is of the adapter form."""
    tree = Taxonomy({"a": [f"b{i}" for i in range(size)], "c": None})
    model = untrained_model(tiny_encoder, tree, problem_type=problem_type)
    generator = torch.Generator().manual_seed(0)
    open_world = OpenWorld(model.config.tree, 64, 50)
    for weight in open_world.parameters():
        weight.copy_(torch.rand(weight.shape, generator=generator))
    open_world.references.copy_((300 * open_world.references).sort().values)
    model.set_calibration(Calibration(), None, open_world)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_encoder, model_max_length=128).save_pretrained(tmp_path)
    whitening = load_file(tmp_path / "model.safetensors")["heads.open_world.whitening"]
    assert whitening.dtype == (torch.float16 if size > 3 else torch.float32)

    classify = pipeline(
        "hierarchical-text-classification", model=str(tmp_path), trust_remote_code=True
    )
    loaded = classify.model
    vectors = torch.rand(5, 65, generator=generator)
    assert torch.equal(loaded.heads.open_world(vectors), open_world(vectors))
    inputs = classify.tokenizer("A study of ulcers.", return_tensors="pt")
    strangeness = open_world(loaded(**inputs, output_vectors=True).vectors)
    count = (open_world.references >= strangeness - 1e-3).sum().item()
    assert classify("A study of ulcers.")["p_value"] == pytest.approx((1 + count) / 51)


# ── train.py, the pipeline and predict.py ─────────────────────────────────────────────────────────

STRANGE = "zzz qqq xxx " * 10


@torch.no_grad()
def test_p_values_of_the_pipeline_are_counts_over_the_validation_file(clear_checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(clear_checkpoint, trust_remote_code=True)
    model = AutoModelForSequenceClassification.from_pretrained(
        clear_checkpoint, trust_remote_code=True
    )

    def vector(text: str) -> np.ndarray:
        return (
            model.encoder(**tokenizer(text, truncation=True, return_tensors="pt"))
            .last_hidden_state[0]
            .mean(0)
            .numpy()
        )

    rows = {
        split: read_csv(Path(clear_checkpoint).parent / f"{split}.csv")
        for split in ("train", "validation")
    }
    held_out = {row["text"] for row in rows["validation"]}
    kept = [row for row in rows["train"] if row["text"] not in held_out]
    vectors = np.stack([vector(row["text"]) for row in kept])
    labels = np.array([row["label"] for row in kept])
    means = {label: vectors[labels == label].mean(0) for label in {*labels}}
    residuals = vectors - np.stack([means[label] for label in labels])
    precision = LedoitWolf(assume_centered=True).fit(residuals.astype(np.float64)).precision_

    def energy(text: str) -> float:
        scores = (
            (model.heads.weight @ torch.from_numpy(vector(text)) + model.heads.bias).double().exp()
        )
        tree = model.config.tree
        total = 0.0
        for root in tree.children(-1):
            total += scores[root] * (sum(scores[child] for child in tree.children(root)) or 1.0)
        return -np.log(float(total))

    def distance(text: str) -> float:
        return min(mahalanobis(vector(text), mean, precision) for mean in means.values())

    parts = np.array([[distance(text), energy(text)] for text in held_out])
    weight = parts[:, 0].std(ddof=1) / parts[:, 1].std()

    def strangeness(text: str) -> float:
        return distance(text) + weight * energy(text)

    references = np.array([strangeness(text) for text in held_out])
    classify = pipeline(
        "hierarchical-text-classification", model=clear_checkpoint, trust_remote_code=True
    )
    texts = ["We treated sepsis and compared it with burns.", "Migraine.", STRANGE]
    results = classify(texts)
    for text, result in zip(texts, results, strict=True):
        close = [
            (1 + (references >= strangeness(text) * factor).sum()) / (1 + len(references))
            for factor in (0.999, 1.001)
        ]
        assert min(close) - 1e-9 <= result["p_value"] <= max(close) + 1e-9
    assert results[2]["p_value"] == pytest.approx(1 / (1 + len(references)))


def test_predict_writes_a_summary_of_the_run(clear_checkpoint, tmp_path):
    validation = read_csv(Path(clear_checkpoint).parent / "validation.csv")
    texts = [row["text"] for row in validation[:40]] + [STRANGE] * 3 + ["migraine " * 600]
    source = write_csv(tmp_path / "in.csv", [{"text": text} for text in texts])
    output = tmp_path / "out.jsonl"
    words = ("--model", clear_checkpoint, "--input", source, "--dtype", "fp32")
    assert predict_here(*words, "--output", output) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    summary = json.loads((tmp_path / "out.jsonl.summary.json").read_text())
    assert summary["rows"] == 44
    assert summary["truncated"] == {"rows": 1, "share": round(1 / 44, 6)}
    strange = sum(row["p_value"] <= 0.05 for row in rows)
    assert strange >= 3
    assert summary["strange"] == {
        "max_p_value": 0.05,
        "rows": strange,
        "share": round(strange / 44, 6),
    }
    shares = {one["label"]: one["share"] for one in summary["classes"]}
    assert {label: share for label, share in shares.items() if share} == {
        label: pytest.approx(sum(row["label"] == label for row in rows) / 44, abs=1e-6)
        for label in {row["label"] for row in rows}
    }
    assert sum(one["training_share"] for one in summary["classes"]) == pytest.approx(1, abs=1e-5)

    # a folder has its summary in the manifest
    assert predict_here(*words, "--output", f"{tmp_path}/folder/") == 0
    manifest = json.loads((tmp_path / "folder" / "manifest.json").read_text())
    assert manifest["summary"].items() <= summary.items()
