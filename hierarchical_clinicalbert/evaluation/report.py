"""Calibrate a scored model, measure it, and write the files that show the result.

Worth knowing:

1. The calibration and the thresholds are fitted on the validation rows, from decision scores that
   are computed once.
2. Validation scores are cross-validated: a calibration on four fifths of the rows scores the other
   fifth. With ``--load_best_model_at_end`` these rows also select the checkpoint, so their scores
   are optimistic (`benchmarks/selection.py`). In multi-label data, the thresholds are fitted on the
   scored rows, so F1 is optimistic too.
3. Rows are in the order in which they were scored, sorted by length. `ScoredSplit.rows` gives their
   place in the source.

In this file ``splits`` are `ScoredSplit`s by name, ``validation`` and ``test``, of which one may be
missing.
"""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from configuration_hierarchical import Calibration, HierarchicalConfig
from decisions_hierarchical import (
    MIN_FREQUENCY,
    Decisions,
    SetThreshold,
    guaranteed_threshold,
    threshold_index,
)
from hierarchical_clinicalbert.evaluation import plots
from hierarchical_clinicalbert.evaluation.calibration import (
    calibrate_out_of_fold,
    calibrated_logits,
    fit_calibration,
    fit_phrases,
)
from hierarchical_clinicalbert.evaluation.forms import Form
from hierarchical_clinicalbert.evaluation.lexical import LexicalClassifier
from hierarchical_clinicalbert.evaluation.metrics import (
    PREFIXES,
    Predictions,
    bootstrap_intervals,
    confusion_counts,
    node_f1,
    scores_by_split,
)
from hierarchical_clinicalbert.evaluation.open_world import MIN_REFERENCES, share_of_strange
from hierarchical_clinicalbert.evaluation.sets import MEASURED_TARGET
from open_world_hierarchical import OpenWorld

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoredSplit:
    """A split as a model scored it.

    Attributes:
        scores: decision scores of the model, (num_rows, num_nodes).
        logits: (num_rows, num_classes).
        labels: the arrays of `Decisions.targets`.
        texts: the same number for the same text, (num_rows,).
        rows: numbers in the source, (num_rows,).
        token_counts: how often each token occurs, (num_rows, V).
        nodes: labelled nodes of each row.
        vectors: as in the model's outputs, (num_rows, H + 1).
    """

    scores: np.ndarray
    logits: np.ndarray
    labels: np.ndarray
    texts: np.ndarray
    rows: np.ndarray
    token_counts: csr_matrix
    nodes: list[list[int]] = dataclasses.field(default_factory=list)
    vectors: Any = None

    def text_vectors(self) -> np.ndarray:
        """Return the vector of each text once, (num_texts, H + 1)."""
        _, first = np.unique(self.texts, return_index=True)
        return self.vectors[first]


# ── Calibrate ─────────────────────────────────────────────────────────────────────────────────────


def calibrate_splits(
    form: Form, splits: dict[str, ScoredSplit], classifier: LexicalClassifier | None
) -> tuple[Calibration, dict[str, ScoredSplit], dict[str, float]]:
    """Fit the lexical head's weight, the calibration and the thresholds on the validation rows.

    The model that scored the splits has no calibration.

    Returns:
        The calibration. The splits with calibrated logits, of the validation rows out of fold.
        Metrics after calibration.
    """
    # ── Calibrated logits: decision scores of the encoder, plus those of the lexical head ─────────
    validation = splits["validation"]
    log_prior = classifier.log_prior if classifier else 0.0
    if classifier and classifier.phrases is not None:
        words = classifier.decision_scores(validation.token_counts)
        phrases = classifier.phrase_scores(validation.token_counts)
        classifier.add_phrases(
            fit_phrases(form, validation.scores, words - log_prior, phrases, validation.labels)
        )
    lexical = {
        name: classifier and classifier.decision_scores(split.token_counts)
        for name, split in splits.items()
    }
    rows = validation.scores, lexical["validation"], validation.labels
    calibration = fit_calibration(form, *rows, log_prior)
    logits = {
        name: calibrated_logits(form.decisions, calibration, split.scores, lexical[name])
        for name, split in splits.items()
    }
    logits["validation"] = calibrate_out_of_fold(form, *rows, validation.texts, log_prior)
    calibrated = {
        name: dataclasses.replace(split, logits=logits[name]) for name, split in splits.items()
    }
    weight = calibration.lexical_weight or None
    scales = calibration.scales or [1.0]
    shown = f"scales of the scores from {min(scales):.2f} to {max(scales):.2f}"
    logger.info(
        "calibrated on the validation rows: %s; weight of the lexical head %.2f", shown, weight or 0
    )

    # ── Thresholds and class frequencies ──────────────────────────────────────────────────────────
    validation = calibrated["validation"]
    probabilities = form.class_probabilities(validation.logits)
    calibration = dataclasses.replace(
        calibration,
        lexical_weight=weight,
        thresholds=form.fit_thresholds(validation.logits, validation.labels),
        prior=probabilities.mean(axis=0).clip(MIN_FREQUENCY, 1 - MIN_FREQUENCY).tolist(),
        **form.fit_sets(validation.logits, validation.labels, validation.texts),
    )
    metrics = {"lexical_weight": weight or 0.0, **measure(form, calibrated, calibration.thresholds)}
    return calibration, calibrated, metrics


# ── Measure ───────────────────────────────────────────────────────────────────────────────────────


def measure(form: Form, splits: dict[str, ScoredSplit], thresholds: Any) -> dict[str, float]:
    """Compute each split's metrics, ``eval_…`` and ``test_…``."""
    metrics = {}
    for name, split in splits.items():
        measured = form.measure(split.logits, split.labels, thresholds, split.texts)
        metrics |= {f"{PREFIXES[name]}_{metric}": value for metric, value in measured.items()}
    return metrics


def measured_threshold(decisions: Decisions, calibration: Calibration) -> SetThreshold | None:
    """Return the threshold of prediction sets for `MEASURED_TARGET`; None if validation rows were
    too few.
    """
    if (calibration.set_thresholds or [None] * 99)[threshold_index(MEASURED_TARGET)] is None:
        return None
    return guaranteed_threshold(decisions.guarantee, MEASURED_TARGET, calibration)


def list_guarantees(form: Form, config: HierarchicalConfig) -> list[str]:
    """Name what a checkpoint guarantees: prediction sets for `MEASURED_TARGET`, and p-values."""
    has_sets = measured_threshold(form.decisions, config.calibration) is not None
    sets = f"prediction sets for {share_format(0)(MEASURED_TARGET)} {form.decisions.guarantee}"
    return [sets] * has_sets + ["p-values"] * bool(config.open_world)


def log_removed(form: Form, old: HierarchicalConfig, new: HierarchicalConfig, basis: str) -> None:
    """Warn of the `list_guarantees` that the old checkpoint has and the new one has not."""
    kept = list_guarantees(form, new)
    removed = [name for name in list_guarantees(form, old) if name not in kept]
    if removed:
        problem = f"{' and '.join(removed)} are removed: they were fitted to {basis}"
        advice = f"to fit new ones, train with at least {MIN_REFERENCES} validation texts"
        logger.warning("the checkpoint's %s; %s", problem, advice)


def measure_sets(
    form: Form, splits: dict[str, ScoredSplit], calibration: Calibration
) -> dict[str, Any]:
    """Measure the prediction sets for `MEASURED_TARGET` on the test rows, from calibrated logits.

    Returns:
        ``test_set_…``, the scores over all texts and what the worst band of confidence holds. Then
        ``set_groups``, see `PredictedSets.groups`, and ``worst_band``, the group of that band, if a
        band has enough texts.
    """
    threshold = measured_threshold(form.decisions, calibration)
    if "test" not in splits or threshold is None:
        return {}
    test = splits["test"]
    sets = form.predict_sets(test.logits, test.labels, test.texts, threshold)
    measured: dict[str, Any] = {f"test_set_{name}": value for name, value in sets.scores().items()}
    measured["set_groups"] = sets.groups()
    if worst := sets.worst_band():
        measured |= {"test_set_worst_band": worst[form.decisions.guarantee], "worst_band": worst}
    return measured


def measure_strange_texts(
    splits: dict[str, ScoredSplit], open_world: OpenWorld | None
) -> dict[str, float]:
    """Measure ``test_strange``, the share of test texts unlike the training texts.

    Return nothing without p-values.
    """
    test = splits.get("test")
    if test is None or open_world is None or not open_world.has_references:
        return {}
    return {"test_strange": share_of_strange(open_world, test.vectors, test.texts)}


def reported_split(splits: dict[str, Any]) -> str:
    """Return the name of the split that plots and class scores show: test before validation."""
    return "test" if "test" in splits else "validation"


def class_scores(split: str, p: Predictions, texts: np.ndarray) -> dict[str, Any]:
    """Compute scores and 95 % intervals for metrics.json. Rows with unknown classes below the label
    do not count.

    Returns:
        ``per_class``, of each class in labels or predictions; ``support`` is its number of labels,
        and ``f1_interval`` is None if it is in no resample. A ratio with denominator 0 is 0. Then
        ``intervals``, of micro- and macro-F1 by their names in metrics.json. Nothing, without
        labels and predictions.
    """
    form = p.form
    classes = p.form.decisions.num_classes
    rows = p.known[:, :classes].all(axis=1)
    true = p.true[rows, :classes]
    chosen = p.chosen[rows, :classes]
    if not (true | chosen).any():
        return {}
    counts = confusion_counts(true, chosen)
    intervals = bootstrap_intervals(true, chosen, texts[rows])
    precision, recall = counts[0] / np.maximum(counts[1:], 1)
    columns = {
        "label": form.tree.labels[:classes],
        "support": counts[2],
        "precision": precision,
        "recall": recall,
        "f1": np.nan_to_num(node_f1(counts)),
        "f1_interval": [
            ends.tolist() if np.isfinite(ends).all() else None for ends in intervals.pop("f1").T
        ],
    }
    per_class = pd.DataFrame(columns)[counts[1:].any(axis=0)].to_dict("records")
    names = {"micro_f1": form.micro_f1, "macro_f1": "macro_f1"}
    ends = {f"{PREFIXES[split]}_{names[name]}": pair.tolist() for name, pair in intervals.items()}
    return {"per_class": per_class, "intervals": ends}


# ── Show ──────────────────────────────────────────────────────────────────────────────────────────


def write_scores(
    form: Form, splits: dict[str, ScoredSplit], thresholds: Any, folder: Path
) -> dict[str, Any]:
    """Write ``<split>_predictions.csv`` of all splits, and the plots of the `reported_split`.
    Return its `class_scores`.

    The table has each row's number in its source, the same ``text_id`` for the same text, and the
    form's columns.
    """
    classes: dict[str, Any] = {}
    for name, split in splits.items():
        p = Predictions(form, split.logits, split.labels, thresholds)
        rows = pd.DataFrame({"row": split.rows, "text_id": split.texts})
        table = rows.join(form.prediction_table(p)).sort_values("row", kind="stable")
        table.to_csv(folder / f"{name}_predictions.csv", index=False, float_format="%.6f")
        if name == reported_split(splits):
            classes = class_scores(name, p, split.texts)
            figures = form.plots(p, classes.get("per_class", []))
            for plot, figure in (
                figures | {"reliability_diagram": plots.reliability_diagram(p)}
            ).items():
                plots.write(figure, folder / "plots" / f"{plot}.png")
    return classes


def headline(form: Form, metrics: dict[str, float], num_rows: dict[str, int]) -> str:
    """Return the scores that matter most in one sentence, of the `reported_split` among
    ``num_rows``; empty without scores.
    """
    by_split = scores_by_split(metrics)
    if not by_split:
        return ""
    split = reported_split(by_split)
    scores = by_split[split]
    share = share_format(num_rows[split])
    sentence = form.headline(scores, f"{num_rows[split]:,} {split} texts", share)
    if "set_nodes" in scores:
        guarantee = form.decisions.guarantee
        target = share_format(0)(MEASURED_TARGET)
        reached = share(scores[f"set_{guarantee}"])
        sentence += (
            f"; sets for a {guarantee} of {target} hold {scores['set_nodes']:.1f} nodes, and "
            f"reach {reached}"
        )
        if "set_worst_band" in scores:
            sentence += f", {share(scores['set_worst_band'])} in the worst band of confidence"
    return sentence


def share_format(num_rows: int) -> Callable[[float], str]:
    """Return the function that formats a share of so many rows, with no more decimals than they
    allow.
    """
    digits = 1 if num_rows >= 1000 else 0
    return lambda share: f"{100 * share:.{digits}f} %"


def log_metrics(form: Form, metrics: dict[str, float], splits: dict[str, ScoredSplit]) -> None:
    """Log the headline, and a table of the metrics that matter most, with one column per scored
    split.
    """
    if splits:
        compared = [name for name, metric in form.metrics.items() if metric.is_key]
        table = pd.DataFrame(scores_by_split(metrics)).filter(compared, axis="index")
        logger.info("scores\n%s", table.to_string(float_format="%.4f", na_rep=""))
        logger.info(
            "%s", headline(form, metrics, {name: len(split.rows) for name, split in splits.items()})
        )
