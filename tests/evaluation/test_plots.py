"""Check figures through matplotlib's objects, and that they are written as PNG."""

import warnings

import numpy as np
import pytest
import sklearn.metrics
from drawn import FORMS, MANY_NODES, ONE_PATH, TREE, A, B, C, D, E, F, H, drawn
from scipy.special import expit, softmax

from hierarchical_clinicalbert.evaluation.forms import OnePathForm
from hierarchical_clinicalbert.evaluation.metrics import Predictions, calibration_bins
from hierarchical_clinicalbert.evaluation.plots import (
    confusion_matrices,
    f1_by_frequency,
    read_description,
    reliability_diagram,
    training_curves,
    write,
)
from taxonomy_hierarchical import Taxonomy


def matrix_of(figure) -> tuple[list[str], np.ndarray]:
    """Return the names along a confusion matrix, checked to be equal on both axes, and its
    shares.
    """
    axes = figure.axes[0]
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert [text.get_text() for text in axes.get_xticklabels()] == names
    return names, np.asarray(axes.images[0].get_array())


def test_training_curves_hold_the_log():
    log = [
        {"loss": 1.5, "learning_rate": 1e-4, "grad_norm": 2.0, "step": 10},
        {"loss": 1.25, "learning_rate": 5e-5, "grad_norm": 2.0, "step": 20},
        {"eval_loss": 1.125, "eval_macro_f1": 0.625, "eval_runtime": 3.0, "step": 20},
        {"train_runtime": 9.0, "train_loss": 1.4, "step": 20},
    ]
    titles = {"macro_f1": "macro F1", "micro_f1": "micro F1"}
    lines = {}
    for axes in training_curves(log, titles).axes:
        for line in axes.lines:
            points = (line.get_xdata().tolist(), line.get_ydata().tolist())
            lines[axes.get_ylabel(), line.get_label()] = points
    assert lines == {
        ("Loss", "training"): ([10, 20], [1.5, 1.25]),
        ("Loss", "evaluation"): ([20], [1.125]),
        ("Evaluation score", "macro F1"): ([20], [0.625]),
        ("Learning rate", "learning rate"): ([10, 20], [1e-4, 5e-5]),
    }
    assert training_curves(log[-1:], titles) is None


def test_nothing_to_draw_no_figure(tmp_path):
    # no document has a class further down
    figures = confusion_matrices(TREE, np.eye(5), np.full(5, B))
    assert figures.keys() == {"confusion_matrix_level_1"}
    empty = np.zeros((4, TREE.num_nodes))
    assert reliability_diagram(Predictions(MANY_NODES, empty - 9, empty)) is None
    write(None, tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


def test_confusion_matrices_by_hand():
    labels = np.array([A, E, D, C, F, B])
    logits = np.eye(5)[[A, F, E, H, F, C]]
    expected = {
        # true a B B B B B, predicted a B B G B B
        1: (["a", "B", "G"], [[1, 0, 0], [0, 4, 1], [0, 0, 0]]),
        # true a D D c D (B is above the level), predicted a D D h D; in reading order a, c, D, h
        2: (["a", "c", "D", "h"], [[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 3, 0], [0, 0, 0, 0]]),
        # true a e c f (D and B are above the level), predicted a f h f
        3: (
            ["a", "c", "e", "f", "h"],
            [[1, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 1, 0], [0, 0, 0, 1, 0], [0] * 5],
        ),
    }
    figures = confusion_matrices(TREE, logits, labels)
    for (level, (names, counts)), figure in zip(expected.items(), figures.values(), strict=True):
        shown, shares = matrix_of(figure)
        assert shown == names
        totals = np.maximum(np.sum(counts, axis=1, keepdims=True), 1)
        np.testing.assert_allclose(shares, counts / totals)
        assert f"level {level} of 3" in figure.get_suptitle()
    texts = [text.get_text() for text in figures["confusion_matrix_level_1"].axes[0].texts]
    assert texts == ["100%", "", "", "", "80%", "20%", "", "", ""]


def test_the_largest_of_many_classes_are_drawn():
    taxonomy = Taxonomy([f"class {i}" for i in range(60)])
    labels = np.repeat(np.arange(60), np.arange(1, 61))  # class i has i + 1 documents
    logits = np.random.default_rng(0).normal(size=(len(labels), 60))
    (figure,) = confusion_matrices(taxonomy, logits, labels).values()
    names, shares = matrix_of(figure)
    assert names == [f"class {i}" for i in range(20, 60)]
    assert "the 40 of 60 classes with the most documents" in figure.get_suptitle()
    recall = sklearn.metrics.recall_score(labels, logits.argmax(axis=1), average=None)
    # predictions of classes not drawn count in the row
    assert np.diag(shares) == pytest.approx(recall[20:])


def test_class_names_are_shortened_in_the_middle_and_dollars_are_not_mathematics():
    names = ["Female Genital Diseases and Pregnancy Complications", r"$\nosuchcommand{$" * 9]
    taxonomy = Taxonomy(names)
    (figure,) = confusion_matrices(taxonomy, *drawn(OnePathForm(taxonomy), 50)).values()
    for name, whole in zip(matrix_of(figure)[0], names, strict=True):
        start, end = name.replace(r"\$", "$").split("…")
        assert len(start) + len(end) < 40
        assert whole.startswith(start)
        assert whole.endswith(end)


@FORMS
def test_the_reliability_diagram_holds_the_bins_and_the_error(form):
    """With one path a text, it is of the predicted leaves.

    With many nodes, it is of all pairs that are not improbable.
    """
    logits, labels = drawn(form, 200)
    pairs = expit(logits) >= 0.1
    probabilities = expit(logits[pairs])
    if form is ONE_PATH:
        probabilities = softmax(logits, axis=1).max(axis=1)
        correct = logits.argmax(axis=1) == labels
    else:
        correct = labels[pairs] == 1
    figure = reliability_diagram(Predictions(form, logits, labels))
    upper, lower = figure.axes
    bins = calibration_bins(probabilities, correct)
    (curve,) = [line for line in upper.lines if line.get_label() == "this model"]
    np.testing.assert_allclose(curve.get_xdata(), bins["confidence"] / bins["count"])
    np.testing.assert_allclose(curve.get_ydata(), bins["correct"] / bins["count"])
    assert sum(bar.get_height() for bar in lower.patches) == len(correct)
    error = form.measure(logits, labels)["ece"]
    assert f"expected calibration error {error:.3f}" in figure.get_suptitle()


def test_f1_by_frequency_shows_intervals_and_names_the_worst_and_the_largest():
    points = [(100 + i, i / 20) for i in range(20)]
    rows = [{"label": "absent", "support": 0, "f1": 0.0, "f1_interval": None}]
    assert f1_by_frequency(rows) is None
    for support, f1 in points:
        row = {"label": f"of {support}", "support": support, "f1": f1, "f1_interval": None}
        rows.append(row)
    rows[4]["f1_interval"] = [0.1, 0.25]
    axes = f1_by_frequency(rows).axes[0]
    dots, _, (bars,) = axes.containers[0]
    np.testing.assert_allclose(dots.get_xydata(), points)
    ends = bars.get_segments()[3:5]
    np.testing.assert_allclose(ends, [[[103, 0.1], [103, 0.25]], [[104, 0.2], [104, 0.2]]])
    named = {text.get_text(): tuple(text.xy) for text in axes.texts}
    worst_and_largest = points[:5] + points[15:]
    assert named == {f"of {support}": (support, f1) for support, f1 in worst_and_largest}


def test_names_in_a_script_that_cannot_be_drawn_are_numbered(tmp_path):
    taxonomy = Taxonomy(["Größe", "сердце", "神経", "脳卒中 $5"])
    (figure,) = confusion_matrices(taxonomy, *drawn(OnePathForm(taxonomy), 40)).values()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of each character without a glyph
        write(figure, tmp_path / "matrix.png")
    assert matrix_of(figure)[0] == ["Größe", "сердце", "3", "4"]
    assert read_description(tmp_path / "matrix.png") == "3: 神経; 4: 脳卒中 $5"
