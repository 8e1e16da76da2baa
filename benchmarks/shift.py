"""Measure prediction sets by group, and corrected class frequencies, on other mixes of the classes:

    python benchmarks/shift.py --task ohsumed --model CHECKPOINT --data FOLDER

CHECKPOINT was trained by the recipe of the task, see `quality.Task`, and FOLDER holds its data. The
encoder runs once, for `scored.read_scores`.

- **Bands**: sets by one threshold for all texts, and by the bands that
  `evaluation.sets.choose_bands` chooses. They are measured on the test texts, and on `SPLITS`
  random splits of validation and test texts together, with as many texts for the fit.
- **Mixes**: the texts to measure of the same splits, drawn with replacement. A text has a weight
  exp(z), where z is drawn for each class from a normal distribution of standard deviation `TILT`;
  for several labels it is the mean over the text's nodes. Mix 0 is all texts once. "Estimated"
  corrects the probabilities by `estimate_prior` on the drawn texts, "known" by their labels. Sets
  without a correction have the plain threshold, and others the weighted one. "Outside" are texts
  whose predicted leaf is not in their set, "corrected" splits with a significant shift.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from harness import flag_parser, print_rows, read_results, write_results
from quality import TASKS
from scipy.special import logit
from scored import Scores, read_scores

from configuration_hierarchical import Calibration
from decisions_hierarchical import SetThreshold, guaranteed_threshold
from hierarchical_clinicalbert.evaluation.forms import Form
from hierarchical_clinicalbert.evaluation.sets import MEASURED_TARGET, PredictedSets
from open_world_hierarchical import estimate_prior, fitted_prior

SPLITS = 20  # into texts for the fit and texts to measure
MIXES = 5
TILT = 1.0
LOGITS = {"coverage": np.log, "recall": logit}  # of class probabilities, by what is guaranteed
SHOWN = ("accuracy", "micro_f1", "macro_f1", "log_loss")


def main() -> None:
    parser = flag_parser(__doc__, "shift.json")
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument(
        "--model", type=Path, help="folder of a checkpoint that the task's recipe trained"
    )
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    results = read_results(arguments.output, {"bands": [], "mixes": []})
    if arguments.task:
        scores, num_fitted = read_scores(arguments.model, arguments.task, arguments.data)
        measured = {
            "bands": measure_bands(scores, num_fitted),
            "mixes": measure_mixes(scores, num_fitted),
        }
        for part, rows in measured.items():
            kept = [row for row in results[part] if row["task"] != arguments.task]
            results[part] = kept + [{"task": arguments.task, **row} for row in rows]
        write_results(arguments.output, results)
    print_results(results)


# ── Bands ─────────────────────────────────────────────────────────────────────────────────────────


def measure_bands(scores: Scores, num_fitted: int) -> list[dict[str, Any]]:
    """Return what sets hold and name, with one threshold and by bands: on the test texts, then as
    the mean over splits.
    """
    unchanged = scores.split(np.arange(len(scores.labels)), num_fitted)
    rows = [{"texts": "test", **row} for row in compare_thresholds(*unchanged)]
    by_split = [compare_thresholds(*split) for split in random_splits(scores, num_fitted)]
    for same in zip(*by_split, strict=True):
        means = {name: float(np.mean([row[name] for row in same])) for name in ("held", "nodes")}
        bands = pd.DataFrame([band for row in same for band in row["by_confidence"]])
        by_group = {
            group: {
                name: float(np.average(of_group[name], weights=of_group["texts"]))
                for name in ("held", "nodes")
            }
            for group, of_group in bands.groupby("group", sort=False)
        }
        texts_of = bands.groupby("group", sort=False)["texts"].mean()
        of_bands = [
            {"group": group, "texts": float(texts_of[group]), **row}
            for group, row in by_group.items()
        ]
        chosen = [str(row["bands"]) for row in same]
        rows.append(
            {
                "texts": f"{SPLITS} splits",
                "thresholds": same[0]["thresholds"],
                **means,
                "by_confidence": of_bands,
            }
        )
        rows[-1]["bands"] = {bands: chosen.count(bands) for bands in sorted({*chosen})}
    return rows


def compare_thresholds(fitted: Scores, measured: Scores) -> list[dict[str, Any]]:
    """Fit calibration and both kinds of thresholds on some texts, and measure their sets on
    others.
    """
    logits, others = fitted.calibrated(measured)
    texts = np.arange(len(fitted.labels))
    guarantee = fitted.form.decisions.guarantee
    by_band = Calibration(**fitted.form.fit_sets(logits, fitted.labels, texts))
    common = Calibration(
        set_thresholds=fitted.form.thresholds_of(
            fitted.form.set_scores(logits, fitted.labels, texts)
        )
    )
    rows = []
    for name, calibration in (("one", common), ("by band", by_band)):
        threshold = guaranteed_threshold(guarantee, MEASURED_TARGET, calibration)
        sets = predict(fitted.form, others, measured.labels, threshold)
        overall = sets.scores()
        row = {"thresholds": name, "bands": calibration.set_bands or []}
        row |= {"held": float(overall[guarantee]), "nodes": float(overall["nodes"])}
        of_bands = [group for group in sets.groups() if group["by"] == "confidence"]
        names = {"group": "group", "texts": "texts", guarantee: "held", "nodes": "nodes"}
        row["by_confidence"] = [
            {new: group[old] for old, new in names.items()} for group in of_bands
        ]
        rows.append(row)
    return rows


def predict(
    form: Form, logits: np.ndarray, labels: np.ndarray, threshold: SetThreshold
) -> PredictedSets:
    return form.predict_sets(logits, labels, np.arange(len(labels)), threshold)


def random_splits(scores: Scores, num_fitted: int) -> Iterator[tuple[Scores, Scores]]:
    """Split all texts at random into texts for the fit and texts to measure."""
    for seed in range(SPLITS):
        yield scores.split(np.random.default_rng(seed).permutation(len(scores.labels)), num_fitted)


# ── Mixes ─────────────────────────────────────────────────────────────────────────────────────────


def measure_mixes(scores: Scores, num_fitted: int) -> list[dict[str, Any]]:
    """Return the means over the splits for each mix and prior, and the range of the changes by the
    correction.
    """
    splits = enumerate(random_splits(scores, num_fitted))
    rows = [row | {"split": number} for number, split in splits for row in measure_split(*split)]
    table = pd.DataFrame(rows).set_index(["mix", "prior", "split"]).sort_index()
    means = table.groupby(["mix", "prior"]).mean()
    results = []
    for (mix, prior), values in means.iterrows():
        changes = table.loc[mix, prior] - table.loc[mix, "none"]
        ranges = {
            name: [float(changes[name].min()), float(changes[name].max())]
            for name in SHOWN
            if name in changes
        }
        results.append({"mix": mix, "prior": prior, **values.dropna().to_dict(), "changes": ranges})
    return results


def measure_split(fitted: Scores, measured: Scores) -> Iterator[dict[str, Any]]:
    """Yield, for each mix and prior, the scores of the corrected probabilities, and what the sets
    hold.
    """
    # ── Fit, as train.py does ─────────────────────────────────────────────────────────────────────
    form = fitted.form
    decisions = fitted.form.decisions
    texts = np.arange(len(fitted.labels))
    logits, of_measured = fitted.calibrated(measured)
    set_scores = form.set_scores(logits, fitted.labels, texts)
    thresholds = form.fit_thresholds(logits, fitted.labels)
    calibration = Calibration(
        set_thresholds=form.thresholds_of(set_scores),
        prior=form.class_probabilities(logits).mean(axis=0).tolist(),
        num_texts=len(texts),
        **form.scores_to_store(set_scores, fitted.labels, texts),
    )
    has_class = decisions.outcome_targets(torch.tensor(measured.labels)).numpy()[
        :, : decisions.num_classes
    ]

    # ── Mixes ─────────────────────────────────────────────────────────────────────────────────────
    for mix in range(MIXES + 1):
        generator = np.random.default_rng(mix)
        drawn = np.arange(len(has_class))
        if mix:
            weights = np.exp(
                has_class @ generator.normal(0, TILT, has_class.shape[1]) / has_class.sum(1).clip(1)
            )
            drawn = generator.choice(drawn, len(drawn), p=weights / weights.sum())
        mixed = of_measured[drawn]
        labels = measured.labels[drawn]
        probabilities = torch.tensor(form.class_probabilities(mixed))
        before = fitted_prior(calibration)
        known = decisions.check_prior(torch.tensor(has_class[drawn].mean(0), dtype=torch.float64))
        priors = {
            "none": before,
            "estimated": estimate_prior(decisions, calibration, probabilities),
            "known": known,
        }
        for name, prior in priors.items():
            adapted = (
                decisions.adapt_classes(probabilities, before, prior).numpy().clip(1e-12, 1 - 1e-12)
            )
            corrected = LOGITS[decisions.guarantee](adapted)
            scores = form.measure(corrected, labels, thresholds)
            row = {
                "mix": mix,
                "prior": name,
                **{metric: scores[metric] for metric in SHOWN if metric in scores},
            }
            row["distance"] = (prior - known).abs().sum().item() / 2
            row["corrected"] = float((prior != before).any())
            if calibration.set_scores is not None:
                threshold = decisions.set_threshold(
                    calibration, prior, **{decisions.guarantee: MEASURED_TARGET}
                )
                row |= predict(form, mixed, labels, threshold).scores()
                row["outside"] = share_outside(form, mixed, corrected, threshold)
            yield row


def share_outside(
    form: Form, logits: np.ndarray, corrected: np.ndarray, threshold: SetThreshold
) -> float:
    """Return the share of texts whose most probable leaf after the correction is not in the set."""
    decisions = form.decisions
    nodes = decisions.from_classes(torch.tensor(form.class_probabilities(logits)))
    held = decisions.held(decisions.prediction_sets(nodes, threshold)).numpy()
    return 1 - np.take_along_axis(held, corrected.argmax(axis=1)[:, None], axis=1).mean()


def print_results(results: dict[str, list[dict[str, Any]]]) -> None:
    """Print both tables."""
    columns = [
        ("task", "{task}"),
        ("measured on", "{texts}"),
        ("thresholds", "{thresholds}"),
        ("held", "{held:.1%}"),
    ]
    columns += [("nodes", "{nodes:.2f}"), ("held, and number of texts, by confidence", "{bands}")]
    shown = [
        row
        | {
            "bands": "; ".join(
                f"{band['group']}: {band['held']:.1%} of {band['texts']:.0f}"
                for band in row["by_confidence"]
            )
        }
        for row in results["bands"]
    ]
    print_rows(shown, columns, left=3)
    columns = [("task", "{task}"), ("mix", "{mix}"), ("prior", "{prior}")]
    columns += [
        (name, "{" + name + ":.3f}")
        for name in (*SHOWN, "coverage", "nodes", "outside", "corrected")
    ]
    for task in dict.fromkeys(row["task"] for row in results["mixes"]):
        rows = [row for row in results["mixes"] if row["task"] == task]
        print_rows(rows, [column for column in columns if column[0] in rows[0]], left=3)


if __name__ == "__main__":
    main()
