"""Score the validation and test rows of a checkpoint once, without its calibration, and keep the
arrays.

Calibrations, thresholds and priors can then be fitted again and again, on any split of these rows,
without the encoder.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import rows_of, run_batches
from quality import Task
from transformers import AutoTokenizer

from configuration_hierarchical import Calibration
from hierarchical_clinicalbert.evaluation.calibration import (
    calibrate_out_of_fold,
    calibrated_logits,
    fit_calibration,
)
from hierarchical_clinicalbert.evaluation.forms import Form, form_of
from modeling_hierarchical import HierarchicalForSequenceClassification

SCORED = ("validation", "test")
ROWS_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class Scores:
    """Uncalibrated decision scores of texts, none of them twice.

    Attributes:
        own, lexical: of the encoder's heads and of the lexical head, the latter None without one,
            (num_texts, num_nodes).
        labels: the arrays of `Decisions.targets`.
        log_prior: that of `LexicalClassifier`.
    """

    form: Form
    own: np.ndarray
    lexical: np.ndarray | None
    labels: np.ndarray
    log_prior: np.ndarray | float

    def split(self, order: np.ndarray, count: int) -> tuple["Scores", "Scores"]:
        """Return the first ``count`` texts in an order, and the others."""

        def some(chosen: np.ndarray) -> Scores:
            lexical = None if self.lexical is None else self.lexical[chosen]
            return dataclasses.replace(
                self, own=self.own[chosen], lexical=lexical, labels=self.labels[chosen]
            )

        return some(order[:count]), some(order[count:])

    def calibrated(self, other: "Scores") -> tuple[np.ndarray, np.ndarray]:
        """Return logits as `evaluation.report` has them: of these rows, calibrated out of fold,
        and of ``other``, by all of these.
        """
        fitted = (self.own, self.lexical, self.labels)
        decisions = self.form.decisions
        calibration = fit_calibration(self.form, *fitted, self.log_prior)
        own = calibrate_out_of_fold(self.form, *fitted, np.arange(len(self.labels)), self.log_prior)
        return own, calibrated_logits(decisions, calibration, other.own, other.lexical)


def read_scores(folder: Path, name: str, data: Path) -> tuple[Scores, int]:
    """Return the scores of a checkpoint's validation and then test rows, and the number of the
    former.

    They are read from ``scores.npz`` in the checkpoint's folder if that exists.

    ``name`` and ``data`` are those of a `Task`. The checkpoint must have been trained and
    calibrated on its rows.
    """
    # ── Rows ──────────────────────────────────────────────────────────────────────────────────────
    report = json.loads((folder / "data_report.json").read_text(encoding="utf-8"))
    task = Task(name, data, report["split"]["seed"])
    labelled = task.load()
    if labelled.report["split"]["rows_sha256"] != report["split"]["rows_sha256"]:
        sys.exit(f"{folder} was trained and calibrated on other rows than those in {data}")
    form = form_of(labelled.taxonomy, labelled.problem_type)

    # ── Scores ────────────────────────────────────────────────────────────────────────────────────
    file = folder / "scores.npz"
    rows = rows_of(labelled)
    log_prior = 0.0
    if not file.exists():
        model = HierarchicalForSequenceClassification.from_pretrained(folder).eval()
        arrays = {}
        for split in SCORED:
            of_split = score(model, folder, rows[split][0])
            arrays |= {f"{split}_{part}": values for part, values in of_split.items()}
        np.savez_compressed(file, **arrays)
    if not task.is_multi_label:  # the lexical head of one path has learnt the frequencies
        log_prior = np.log(
            form.decisions.count_outcomes(torch.from_numpy(rows["train"][1])).numpy() + 0.5
        )
    stored = np.load(file)
    parts = {}
    for part in ("own", "lexical") if "test_lexical" in stored else ("own",):
        parts[part] = np.concatenate([stored[f"{split}_{part}"] for split in SCORED])
    labels = np.concatenate([rows[split][1] for split in SCORED])
    return Scores(form, parts["own"], parts.get("lexical"), labels, log_prior), len(
        rows["validation"][1]
    )


def score(
    model: HierarchicalForSequenceClassification, folder: Path, texts: list[str]
) -> dict[str, np.ndarray]:
    """Return the ``own`` and, if there is a lexical head, the ``lexical`` scores of texts, see
    `Scores`.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    heads = model.heads
    lexical = model.heads.lexical
    heads.lexical = None
    model.config.calibration, weight = Calibration(), model.config.calibration.lexical_weight
    heads.fill_buffers()

    def outputs(_: list[int], inputs: Any) -> Iterator[torch.Tensor]:
        yield model(**inputs).decision_logits
        if lexical is not None:
            yield heads.decisions.of_classes(lexical(inputs["input_ids"], inputs["attention_mask"]))

    arrays = [values.numpy() for values in run_batches(tokenizer, texts, ROWS_AT_ONCE, outputs)]
    heads.lexical = lexical
    model.config.calibration = Calibration(lexical_weight=weight)
    return dict(zip(("own", "lexical"), arrays, strict=False))
