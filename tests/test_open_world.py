"""Test what tells strange texts from others: against scikit-learn and SciPy, against counts by
hand, and through all doors.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import predict_here, read_csv, untrained_model, write_csv
from safetensors.torch import load_file
from scipy.spatial.distance import mahalanobis
from scipy.special import logsumexp
from scipy.stats import binom
from sklearn.covariance import LedoitWolf
from test_long_texts import padded, small_model, texts_of
from transformers import AutoTokenizer, pipeline

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
A, B, C, D, F, G = map(TREE.id, "abcdfg")
SIZE = 6
TASK = "hierarchical-text-classification"


def draw(nodes: list[int], seed: int) -> np.ndarray:
    """Draw vectors of texts with these nodes, and energies.

    Siblings are closer to each other than to the other classes.
    """
    sizes = 6 / np.array(TREE.levels)[:, None]
    places = np.random.default_rng(0).normal(size=(TREE.num_nodes, SIZE)) * sizes
    offsets = np.random.default_rng(seed).normal(size=(len(nodes), SIZE))
    offsets *= np.linspace(0.5, 2, SIZE)
    vectors = np.array([places[TREE.path(node)].sum(0) for node in nodes]) + offsets
    return np.c_[vectors, 3 + np.abs(offsets[:, 0])].astype(np.float32)


def new_texts(count: int, seed: int) -> np.ndarray:
    nodes = np.random.default_rng(seed).choice([B, C, D, F, G], count)
    return draw(nodes.tolist(), seed + 1)


def fit(validation: np.ndarray) -> OpenWorld | None:
    """Fit to 400 training texts."""
    nodes = np.random.default_rng(1).choice([B, C, D, F, G], 400)
    return fit_open_world(TREE, draw(nodes, 2)[:, :-1], [[node] for node in nodes], validation)


def p_values(open_world: OpenWorld, vectors: np.ndarray) -> torch.Tensor:
    return open_world.p_values(open_world(torch.from_numpy(vectors)))


@pytest.fixture(scope="module")
def fitted() -> OpenWorld:
    return fit(new_texts(150, 3))


def test_a_text_has_the_rank_of_its_strangeness_among_the_validation_texts(fitted):
    references = fitted(torch.from_numpy(new_texts(150, 3))).numpy()
    new = new_texts(2000, 11)
    strangeness = fitted(torch.from_numpy(new)).numpy()
    expected = [(1 + (references >= value).sum()) / 151 for value in strangeness]
    assert p_values(fitted, new).tolist() == expected
    far = np.full((1, SIZE + 1), 100.0, dtype=np.float32)
    assert p_values(fitted, far).tolist() == [1 / 151]
    with_more_energy = draw([B] * 200, 0).mean(0)
    with_more_energy[-1] = 6  # than any text
    assert p_values(fitted, with_more_energy[None]).item() <= 0.05


def test_without_enough_validation_texts_or_differences_there_are_no_p_values():
    assert fit(new_texts(MIN_REFERENCES, 3)) is not None
    assert fit(new_texts(MIN_REFERENCES - 1, 3)) is None
    equal = draw([B, C], 1)[:, :-1].repeat(8, 0)
    assert fit_open_world(TREE, equal, [[B]] * 8 + [[C]] * 8, new_texts(150, 3)) is None


def test_a_text_with_several_labels_is_a_part_of_each_class_and_no_mean_is_of_one_text():
    vectors = draw([B, D, G, G], 0)[:, :-1]
    nodes = [[B, A, G], [D, A], [G], []]
    open_world = fit_open_world(TREE, vectors, nodes, new_texts(30, 3))
    whitened = (torch.from_numpy(vectors) - open_world.center) @ open_world.whitening
    # the classes b, d and "no label" have one text each, whose vector is not to be stored: the
    # first two count as their parent
    for node, other in ((A, 1), (G, 2)):
        expected = (0.5 * whitened[0] + whitened[other]) / 1.5
        torch.testing.assert_close(open_world.means[node], expected, atol=1e-3, rtol=0)
    assert set(np.flatnonzero(open_world.shares)) == {A, G}
    distances = torch.cdist(open_world.means, whitened)
    assert distances.min() > 1e-2
    first, merged = merge_texts(np.array([7, 5, 7]), [[B], [G], [D]])
    assert (first.tolist(), merged) == ([1, 0], [[G], [B, D]])


def test_at_base_size_at_most_4_mb_are_stored_for_1500_nodes():
    most = len(fit(draw([B] * (MAX_REFERENCES + 1), 9)).references)
    assert most == MAX_REFERENCES
    for num_nodes, precision in ((530, torch.float32), (531, torch.float16), (1500, torch.float16)):
        tree = Taxonomy([f"leaf {i}" for i in range(num_nodes)])
        stored = OpenWorld(tree, 768, most).state_dict()
        assert stored["whitening"].dtype == precision
        assert sum(tensor.nbytes for tensor in stored.values()) <= 4_000_000


def test_few_texts_like_the_validation_texts_are_strange(fitted):
    new = new_texts(2000, 11)
    texts = np.arange(2000)
    share = share_of_strange(fitted, new, texts)
    assert share == (p_values(fitted, new) <= 0.05).double().mean()
    assert share <= binom.ppf(0.9999, 150, 0.05) / 150
    # a text with several rows counts once
    again = share_of_strange(fitted, np.r_[new, new[:500]], np.r_[texts, texts[:500]])
    assert again == share


# ── The model, and its checkpoints ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pooling", ["mean", "cls", "label_attention"])
@pytest.mark.parametrize("problem_type", [SINGLE_LABEL, MULTI_LABEL])
@torch.no_grad()
def test_vectors_are_means_of_the_tokens_of_all_windows_and_energies_of_the_roots(
    pooling, problem_type
):
    model = small_model(pooling=pooling, problem_type=problem_type)
    texts = texts_of([7, 16, 40])
    found = model(**padded(texts, 48), output_vectors=True)
    windows, _ = model.encode(**padded(texts[2:]))
    assert len(windows.vectors) == 3
    tokens = [model.encoder(torch.tensor([text])).last_hidden_state[0] for text in texts[:2]]
    tokens.append(windows.vectors[windows.mask])
    expected = torch.stack([of_text.mean(0) for of_text in tokens])
    torch.testing.assert_close(found.vectors[:, :-1], expected, atol=1e-5, rtol=0)
    odds = found.decision_logits[
        :, model.config.tree.children(-1)
    ].exp()  # of which one is a parent
    total = odds.sum(1) if problem_type == SINGLE_LABEL else (1 + odds).prod(1)
    torch.testing.assert_close(found.vectors[:, -1], -total.log(), atol=1e-5, rtol=0)
    assert model(**padded(texts)).vectors is None


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

    classify = pipeline(TASK, model=str(tmp_path), trust_remote_code=True)
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
    classify = pipeline(TASK, model=clear_checkpoint, trust_remote_code=True)
    model = classify.model
    tree = model.config.tree

    def vector(text: str) -> np.ndarray:
        inputs = classify.tokenizer(text, truncation=True, return_tensors="pt")
        return model.encoder(**inputs).last_hidden_state[0].mean(0).numpy()

    folder = Path(clear_checkpoint).parent
    rows = {split: read_csv(folder / f"{split}.csv") for split in ("train", "validation")}
    held_out = {row["text"] for row in rows["validation"]}
    kept = [row for row in rows["train"] if row["text"] not in held_out]
    vectors = np.stack([vector(row["text"]) for row in kept])
    labels = np.array([row["label"] for row in kept])
    means = {label: vectors[labels == label].mean(0) for label in {*labels}}
    residuals = vectors - np.stack([means[label] for label in labels])
    precision = LedoitWolf(assume_centered=True).fit(residuals.astype(np.float64)).precision_

    def energy(text: str) -> float:
        scores = model.heads.weight @ torch.from_numpy(vector(text)) + model.heads.bias
        scores = scores.double().tolist()
        of_leaves = [
            sum(scores[node] for node in tree.path(leaf)) for leaf in range(tree.num_leaves)
        ]
        return -logsumexp(of_leaves)

    def distance(text: str) -> float:
        return min(mahalanobis(vector(text), mean, precision) for mean in means.values())

    parts = np.array([[distance(text), energy(text)] for text in held_out])
    weight = parts[:, 0].std(ddof=1) / parts[:, 1].std()

    def strangeness(text: str) -> float:
        return distance(text) + weight * energy(text)

    references = np.array([strangeness(text) for text in held_out])
    texts = ["We treated sepsis and compared it with burns.", "Migraine.", STRANGE]
    results = classify(texts)
    for text, result in zip(texts, results, strict=True):
        value = strangeness(text)
        counts = [(references >= value * factor).sum() for factor in (0.999, 1.001)]
        close = [(1 + count) / (1 + len(references)) for count in counts]
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
    share = round(strange / 44, 6)
    assert summary["strange"] == {"max_p_value": 0.05, "rows": strange, "share": share}
    counts = Counter(row["label"] for row in rows)
    shares = {one["label"]: one["share"] for one in summary["classes"] if one["share"]}
    assert shares == pytest.approx({label: counts[label] / 44 for label in counts}, abs=1e-6)
    assert sum(one["training_share"] for one in summary["classes"]) == pytest.approx(1, abs=1e-5)

    # a folder has its summary in the manifest
    assert predict_here(*words, "--output", f"{tmp_path}/folder/") == 0
    manifest = json.loads((tmp_path / "folder" / "manifest.json").read_text())
    assert manifest["summary"].items() <= summary.items()
