"""Score the validation and test rows of a checkpoint once, without its calibration, and keep the arrays.

Calibrations, thresholds and priors can then be fitted again and again, on any split of these rows, without the encoder.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality import Task

from configuration_hierarchical import Calibration
from hierarchical_clinicalbert.evaluation.calibration import calibrate_out_of_fold, calibrated_logits, fit_calibration
from hierarchical_clinicalbert.evaluation.forms import Form, form_of
from modeling_hierarchical import HierarchicalForSequenceClassification

SCORED = ("validation", "test")
ROWS_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class Scores:
    """Uncalibrated decision scores of texts, none of them twice.

    Attributes:
        own, lexical: of the encoder's heads and of the lexical head, the latter None without one, (num_texts, num_nodes).
        labels: the arrays of `Decisions.targets`.
        log_prior: that of `LexicalClassifier`.
    """

    form: Form
    own: np.ndarray
    lexical: np.ndarray | None
    labels: np.ndarray
    log_prior: np.ndarray | float

    def rows(self, chosen: np.ndarray) -> "Scores":
        """Return some texts."""
        lexical = None if self.lexical is None else self.lexical[chosen]
        return dataclasses.replace(self, own=self.own[chosen], lexical=lexical, labels=self.labels[chosen])

    def calibrated(self, other: "Scores") -> tuple[np.ndarray, np.ndarray]:
        """Return logits as `evaluation.report` has them: of these rows, calibrated out of fold, and of ``other``, by all of these."""
        fitted, decisions = (self.own, self.lexical, self.labels), self.form.decisions
        calibration = fit_calibration(self.form, *fitted, self.log_prior)
        own = calibrate_out_of_fold(self.form, *fitted, np.arange(len(self.labels)), self.log_prior)
        return own, calibrated_logits(decisions, calibration, other.own, other.lexical)


def read_scores(folder: Path, name: str, data: Path) -> dict[str, Scores]:
    """Return the scores of a checkpoint's validation and test rows, from ``scores.npz`` in its folder if that exists.

    ``name`` and ``data`` are those of a `Task`. The checkpoint must have been trained and calibrated on its rows.
    """
    # ── Rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────
    report = json.loads((folder / "data_report.json").read_text(encoding="utf-8"))
    task = Task(name, data, report["split"]["seed"])
    labelled = task.load()
    if labelled.report["split"]["rows_sha256"] != report["split"]["rows_sha256"]:
        sys.exit(f"{folder} was trained and calibrated on other rows than those in {data}")
    form = form_of(labelled.taxonomy, labelled.problem_type)

    # ── Scores ───────────────────────────────────────────────────────────────────────────────────────────────────────
    file = folder / "scores.npz"
    if not file.exists():
        model = HierarchicalForSequenceClassification.from_pretrained(folder).eval()
        arrays = {}
        for split in SCORED:
            of_split = score(model, folder, [*labelled.splits[split]["text"]])
            arrays |= {f"{split}_{part}": values for part, values in of_split.items()}
        np.savez_compressed(file, **arrays)
    stored, log_prior = np.load(file), 0.0
    if not task.is_multi_label:  # the lexical head of one path has learnt the frequencies
        training = form.decisions.targets(labelled.splits["train"]["nodes"][:])
        log_prior = np.log(form.decisions.count_outcomes(training).numpy() + 0.5)
    return {
        split: Scores(
            form,
            stored[f"{split}_own"],
            stored.get(f"{split}_lexical"),
            form.decisions.targets(labelled.splits[split]["nodes"][:]).numpy(),
            log_prior,
        )
        for split in SCORED
    }


def score(model: HierarchicalForSequenceClassification, folder: Path, texts: list[str]) -> dict[str, np.ndarray]:
    """Return the ``own`` and, if there is a lexical head, the ``lexical`` scores of texts, see `Scores`."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    heads, lexical = model.heads, model.heads.lexical
    heads.lexical = None
    model.config.calibration, weight = Calibration(), model.config.calibration.lexical_weight
    heads.fill_buffers()
    parts: dict[str, list[np.ndarray]] = {"own": [], "lexical": []}
    order = np.argsort([len(text) for text in texts])
    for start in range(0, len(texts), ROWS_AT_ONCE):
        some = [texts[i] for i in order[start : start + ROWS_AT_ONCE]]
        inputs = tokenizer(some, truncation=True, padding=True, return_tensors="pt")
        with torch.inference_mode():
            parts["own"].append(model(**inputs).decision_logits.numpy())
            if lexical is not None:
                of_classes = lexical(inputs["input_ids"], inputs["attention_mask"])
                parts["lexical"].append(heads.decisions.of_classes(of_classes).numpy())
    heads.lexical, model.config.calibration = lexical, Calibration(lexical_weight=weight)
    return {part: np.concatenate(rows)[np.argsort(order)] for part, rows in parts.items() if rows}
