"""Test thresholds by band of confidence, and measured groups, against their definitions; in both
forms of label.
"""

import numpy as np
import pytest
from drawn import draw_labels, logits_of
from scipy.special import softmax

from configuration_hierarchical import Calibration
from decisions_hierarchical import guaranteed_threshold
from hierarchical_clinicalbert.evaluation.forms import ManyNodesForm, OnePathForm
from hierarchical_clinicalbert.evaluation.report import ScoredSplit, measure_sets
from taxonomy_hierarchical import Taxonomy

DEEP = Taxonomy({f"root {i}": [f"{i} {j}" for j in range(3)] for i in range(4)})
FORMS = pytest.mark.parametrize(
    "form", [OnePathForm(DEEP), ManyNodesForm(DEEP)], ids=["one path", "many nodes"]
)


def sure_and_unsure(form, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw logits and labels.

    Half of the texts are unsure, and their most probable leaf is too often wrong.
    """
    generator = np.random.default_rng(0)
    scales = np.where(np.arange(rows)[:, None] % 2, 0.7, 4.0)
    scores = scales * generator.normal(size=(rows, form.tree.num_nodes))
    scores -= isinstance(form, ManyNodesForm)  # most nodes are improbable
    labels = draw_labels(form, scores * np.where(scales < 1, 0.2, 1.0), seed=1)
    return logits_of(form, scores), labels


@FORMS
def test_thresholds_by_band_hold_in_each_band_of_new_texts(form):
    logits, labels = sure_and_unsure(form, 3000)
    texts = np.arange(1000)
    guarantee = form.decisions.guarantee
    calibration = Calibration(**form.fit_sets(logits[:1000], labels[:1000], texts))
    by_band = guaranteed_threshold(guarantee, 0.9, calibration)
    common = form.thresholds_of(form.set_scores(logits[:1000], labels[:1000], texts))[89]
    worst = {}
    for name, threshold in (("by band", by_band), ("common", common)):
        sets = form.predict_sets(logits[1000:], labels[1000:], np.arange(2000), threshold)
        assert sets.scores()[guarantee] == pytest.approx(0.9, abs=0.03)
        worst[name] = sets.worst_band()
    assert worst["by band"][guarantee] > worst["common"][guarantee] + 0.03
    assert worst["common"]["group"] in ("at most 40%", "40% to 60%")


def test_few_texts_and_texts_of_equal_confidence_get_one_threshold():
    form = OnePathForm(Taxonomy([f"leaf {i}" for i in range(12)]))
    logits, labels = sure_and_unsure(form, 600)

    def fit(rows: np.ndarray) -> dict:
        return form.fit_sets(logits[rows], labels[rows], rows)

    assert fit(np.arange(30))["set_bands"] is None
    sure = softmax(logits, axis=1).max(axis=1) > 0.8
    assert fit(np.flatnonzero(sure))["set_bands"] is None
    # where a band has too few texts for a coverage, all texts have one threshold
    thresholds = fit(np.arange(300))["set_thresholds"]
    assert isinstance(thresholds[89], list)
    assert isinstance(thresholds[98], float)


def test_groups_are_counted_by_hand():
    tree = Taxonomy({"r": ["a", "b"], "s": ["c"]})
    # texts 0 and 1 are sure, text 2 is not; text 0 is repeated with another label
    leaves = np.array([[0.9, 0.06, 0.04], [0.9, 0.06, 0.04], [0.05, 0.05, 0.9], [0.35, 0.33, 0.32]])
    labels = np.array([0, 1, 2, 0])
    texts = np.array([0, 0, 1, 2])
    rows = ScoredSplit(leaves, np.log(leaves), labels, texts, np.arange(4), None)
    calibration = Calibration(set_thresholds=[0.2] * 99)
    measured = measure_sets(OnePathForm(tree), {"test": rows}, calibration)
    groups = {}
    for row in measured["set_groups"]:
        groups[row["by"], row["group"]] = (row["texts"], row["coverage"], row["nodes"])
    assert groups == {
        ("confidence", "at most 40%"): (1, 1.0, 1.0),
        ("confidence", "above 80%"): (2, 0.5, 1.0),
        ("frequency", "above 5%"): (3, 2 / 3, 1.0),
        ("root", "r"): (2, 0.5, 1.0),
        ("root", "s"): (1, 1.0, 1.0),
    }
    assert "worst_band" not in measured  # of too few texts
    names = ("coverage", "leaves", "nodes", "single_leaf")
    # the unsure text's set is r: 0.68 − 0.8 · (2 + 1.5) / 2.5 is more than 0.35 − 0.8
    scores = [measured[f"test_set_{name}"] for name in names]
    assert scores == pytest.approx([2 / 3, 4 / 3, 1, 2 / 3])
