"""The files that are written, what they hold, and that class names cannot do harm in them."""

import base64
import html
import json
import struct
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import sklearn.metrics

from configuration_hierarchical import Taxonomy
from training.metrics import calibration_bins, expected_calibration_error
from training.plots import confusion_matrices, reliability_diagram, training_curves

# a at level 1; B > c at level 2; B > D > e, f at level 3; G > h at level 2
TREE = Taxonomy(["a", {"B": ["c", {"D": ["e", "f"]}]}, {"G": ["h"]}])
A, C, E, F, H, B, D, G = range(8)
LOG = [
    {"loss": 1.5, "learning_rate": 1e-4, "grad_norm": 2.0, "epoch": 0.5, "step": 10},
    {"loss": 1.25, "learning_rate": 5e-5, "grad_norm": 2.0, "epoch": 1.0, "step": 20},
    {"eval_loss": 1.125, "eval_macro_f1": 0.625, "eval_runtime": 3.0, "epoch": 1.0, "step": 20},
    {"train_runtime": 9.0, "train_loss": 1.4, "epoch": 1.0, "step": 20},
]


def random_case(taxonomy: Taxonomy, num_documents: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(num_documents, taxonomy.num_leaves))
    return logits, rng.integers(0, taxonomy.num_leaves, num_documents)


def parts(page: Path) -> tuple[list[dict], dict, dict]:
    """Traces, layout and configuration in a page."""
    text = page.read_text(encoding="utf-8")
    at = text.index("Plotly.newPlot(") + len("Plotly.newPlot(")
    found = []
    for _ in range(4):  # the element's id comes first
        at += len(text[at:]) - len(text[at:].lstrip(" \n,"))
        value, at = json.JSONDecoder().raw_decode(text, at)
        found.append(value)
    return tuple(found[1:])


def numbers(value: dict | list) -> np.ndarray:
    """An array of a page, which plotly may have written as base64."""
    if isinstance(value, list):
        return np.array(value, dtype=float)  # null becomes NaN
    array = np.frombuffer(base64.b64decode(value["bdata"]), dtype=value["dtype"])
    return array.reshape([int(size) for size in value["shape"].split(",")]) if "shape" in value else array


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG, from its header."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def names_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_training_curves_hold_the_log(tmp_path):
    written = training_curves(LOG, tmp_path / "new" / "plots")
    assert {path.name for path in written} == names_of(tmp_path / "new" / "plots")
    assert names_of(tmp_path / "new" / "plots") == {"training_curves.html", "training_curves.png", "plotly.min.js"}
    assert min(picture_size(tmp_path / "new" / "plots" / "training_curves.png")) > 600
    traces, layout, _ = parts(tmp_path / "new" / "plots" / "training_curves.html")
    assert {trace["name"]: (trace["x"], trace["y"]) for trace in traces} == {
        "training": ([10, 20], [1.5, 1.25]),
        "evaluation": ([20], [1.125]),
        "macro F1": ([20], [0.625]),
        "learning rate": ([10, 20], [1e-4, 5e-5]),
    }
    axes = [layout[axis]["title"]["text"] for axis in ("yaxis", "yaxis2", "yaxis3")]
    assert axes == ["Loss", "Evaluation score", "Learning rate"]


def test_an_evaluation_without_training_is_drawn(tmp_path):
    training_curves([{"eval_loss": 0.5, "step": 0}], tmp_path)
    traces, _, _ = parts(tmp_path / "training_curves.html")
    assert [(trace["name"], trace["x"], trace["y"]) for trace in traces] == [("evaluation", [0], [0.5])]


@pytest.mark.parametrize("log", [[], [{"train_runtime": 1.0, "train_loss": 0.5, "step": 3}]])
def test_no_curve_no_file(tmp_path, log):
    assert training_curves(log, tmp_path / "plots") == []
    assert not (tmp_path / "plots").exists()


def test_nothing_to_draw_no_file(tmp_path):
    logits, labels = random_case(TREE, 4)
    assert confusion_matrices(TREE, logits, np.full_like(labels, -100), tmp_path / "plots") == []
    assert reliability_diagram(logits, np.full_like(labels, -100), tmp_path / "plots") == []
    assert reliability_diagram(logits, np.array([A, A, A, B]), tmp_path / "plots") == []
    assert not (tmp_path / "plots").exists()


def test_confusion_matrices_by_hand(tmp_path):
    labels = np.array([A, E, D, C, F, B, -100])
    logits = np.eye(5)[[A, F, E, H, F, C, C]]
    written = confusion_matrices(TREE, logits, labels, tmp_path)
    stems = [f"confusion_matrix_level_{level}" for level in (1, 2, 3)]
    assert {path.name for path in written} == {f"{s}{end}" for s in stems for end in (".html", ".png")} | {
        "plotly.min.js"
    }
    assert {path.name for path in written} == names_of(tmp_path)
    assert len(written) == len(set(written))
    expected = {
        # true a B B B B B, predicted a B B G B B
        1: (["a", "B", "G"], [[1, 0, 0], [0, 4, 1], [0, 0, 0]]),
        # true a D D c D (B is above the level), predicted a D D h D; in reading order a, c, D, h
        2: (["a", "c", "D", "h"], [[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 3, 0], [0, 0, 0, 0]]),
        # true a e c f (D and B are above the level), predicted a f h f
        3: (["a", "c", "e", "f", "h"], [[1, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 1, 0], [0, 0, 0, 1, 0], [0] * 5]),
    }
    for level, (names, counts) in expected.items():
        (matrix,), layout, _ = parts(tmp_path / f"confusion_matrix_level_{level}.html")
        assert layout["xaxis"]["ticktext"] == layout["yaxis"]["ticktext"] == names
        assert [[int(text or 0) for text in row] for row in matrix["text"]] == counts
        totals = np.maximum(np.sum(counts, axis=1, keepdims=True), 1)
        assert numbers(matrix["z"]) == pytest.approx(counts / totals)
        assert f"level {level} of 3" in layout["title"]["text"]
        assert min(picture_size(tmp_path / f"confusion_matrix_level_{level}.png")) > 600


def test_the_largest_of_many_classes_are_drawn(tmp_path):
    taxonomy = Taxonomy([f"class {i}" for i in range(60)])
    logits, _ = random_case(taxonomy, 60 * 61 // 2)
    labels = np.repeat(np.arange(60), np.arange(1, 61))  # class i has i + 1 documents
    confusion_matrices(taxonomy, logits, labels, tmp_path)
    (matrix,), layout, _ = parts(tmp_path / "confusion_matrix_level_1.html")
    assert layout["xaxis"]["ticktext"] == [f"class {i}" for i in range(20, 60)]
    assert "the 40 of 60 classes with the most documents" in layout["title"]["subtitle"]["text"]
    counts = sklearn.metrics.confusion_matrix(labels, logits.argmax(axis=1))[20:, 20:]
    assert [[int(text or 0) for text in row] for row in matrix["text"]] == counts.tolist()
    recall = sklearn.metrics.recall_score(labels, logits.argmax(axis=1), average=None)
    assert np.diag(numbers(matrix["z"])) == pytest.approx(recall[20:])  # the answers not drawn count in the row


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "a < b & c &lt; d",
    "\"quoted\" 'name'",
]


def test_class_names_are_text_not_markup(tmp_path):
    taxonomy = Taxonomy([{"<b>../../parent</b>": HOSTILE[:2]}, *HOSTILE[2:]])
    confusion_matrices(taxonomy, *random_case(taxonomy, 50), tmp_path)
    assert names_of(tmp_path) == {
        "plotly.min.js",
        *(f"confusion_matrix_level_{level}{end}" for level in (1, 2) for end in (".html", ".png")),
    }
    for level in (1, 2):
        page = tmp_path / f"confusion_matrix_level_{level}.html"
        assert "<img" not in page.read_text(encoding="utf-8")
        assert "alert(1)</script" not in page.read_text(encoding="utf-8")
    # plotly renders tags in text, and turns entities into characters once
    (matrix,), layout, _ = parts(tmp_path / "confusion_matrix_level_2.html")
    shown = [*layout["xaxis"]["ticktext"], *layout["yaxis"]["ticktext"], *np.ravel(matrix["customdata"])]
    assert not any("<" in text or ">" in text for text in shown)
    assert {html.unescape(text) for text in shown} == set(HOSTILE)


def test_dollars_in_class_names_are_not_mathematics(tmp_path):
    taxonomy = Taxonomy([r"$\nosuchcommand{$", "costs of $5 and $6"])  # the former does not parse as mathematics
    confusion_matrices(taxonomy, *random_case(taxonomy, 20), tmp_path)
    assert min(picture_size(tmp_path / "confusion_matrix_level_1.png")) > 600


def test_long_class_names_are_shortened_and_whole_under_the_pointer(tmp_path):
    long = [
        "Female Genital Diseases and Pregnancy Complications",
        "Pathological Conditions, Signs and Symptoms",
        "x" * 80,
    ]
    taxonomy = Taxonomy(long)
    confusion_matrices(taxonomy, *random_case(taxonomy, 50), tmp_path)
    (matrix,), layout, _ = parts(tmp_path / "confusion_matrix_level_1.html")
    assert layout["xaxis"]["ticktext"][:2] == [
        "Female Genital Diseases…Complications",
        "Pathological Conditions…and Symptoms",
    ]
    assert len(layout["xaxis"]["ticktext"][2]) == 40
    assert matrix["customdata"][0][1] == [long[0], long[1]]


def test_reliability_diagram_holds_the_bins_and_the_error(tmp_path):
    logits, labels = random_case(TREE, 300)
    labels[:50] = -100
    written = reliability_diagram(logits, labels, tmp_path)
    assert {path.name for path in written} == names_of(tmp_path)
    assert min(picture_size(tmp_path / "reliability_diagram.png")) > 600
    traces, layout, _ = parts(tmp_path / "reliability_diagram.html")
    by_name = {trace["name"]: trace for trace in traces}
    bins = calibration_bins(logits, labels)
    filled = bins["count"] > 0
    assert numbers(by_name["documents"]["y"]).sum() == 250
    assert numbers(by_name["accuracy"]["y"])[filled] == pytest.approx(bins["accuracy"][filled])
    gap = by_name["gap to the mean confidence"]
    ends = np.array([numbers(gap["base"]), numbers(gap["base"]) + numbers(gap["y"])])[:, filled]
    assert ends == pytest.approx(np.sort([bins["accuracy"][filled], bins["confidence"][filled]], axis=0))
    assert f"{expected_calibration_error(bins):.3f}" in layout["title"]["text"]


def test_pages_need_no_network_and_offer_no_upload(tmp_path):
    logits, labels = random_case(TREE, 50)
    training_curves(LOG, tmp_path)
    confusion_matrices(TREE, logits, labels, tmp_path)
    reliability_diagram(logits, labels, tmp_path)
    pages = sorted(tmp_path.glob("*.html"))
    assert len(pages) == 5
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert 'src="plotly.min.js"' in text
        assert "http://" not in text
        assert "https://" not in text
        assert len(text) < 100_000  # the 4 MB of plotly.js are not in each
        assert parts(page)[2]["showSendToCloud"] is False
    assert (tmp_path / "plotly.min.js").stat().st_size > 1_000_000


def test_the_same_run_writes_the_same_files(tmp_path):
    logits, labels = random_case(TREE, 50)
    for folder in (tmp_path / "one", tmp_path / "two"):
        training_curves(LOG, folder)
        confusion_matrices(TREE, logits, labels, folder)
        reliability_diagram(logits, labels, folder)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_matplotlib_is_left_as_it_was(tmp_path):
    before = dict(matplotlib.rcParams)
    training_curves(LOG, tmp_path)
    reliability_diagram(*random_case(TREE, 50), tmp_path)
    assert dict(matplotlib.rcParams) == before
