"""Draw a run's training curves, confusion matrices and reliability diagrams as PNG files.

`matplotlib.figure.Figure` without pyplot needs neither global state nor a display. Class names are
user input, so ``$`` is escaped, which matplotlib reads as mathematics. They may be in any script:
`show_names` numbers those that cannot be drawn.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from sklearn.calibration import CalibrationDisplay
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

from hierarchical_clinicalbert.evaluation.metrics import (
    BINS,
    Predictions,
    calibration_bins,
    expected_calibration_error,
)
from taxonomy_hierarchical import Taxonomy

MAX_CLASSES = 40
MAX_NAME = 40  # characters
NAMED = 5  # classes of each kind that `f1_by_frequency` names
FONT = "DejaVu Sans"  # comes with matplotlib


def write(figure: Figure | None, path: Path) -> None:
    """Write a figure as PNG, with its label as the description, and create its folder; do nothing
    for None.
    """
    if figure is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Description": str(figure.get_label())})


def read_description(path: Path) -> str:
    """Return the description that `write` stored: the names that the figure shows as numbers, or
    nothing.
    """
    with Image.open(path) as image:
        return image.info.get("Description", "")


def training_curves(log_history: list[dict], scores: dict[str, str]) -> Figure | None:
    """Draw losses, evaluation scores and the learning rate of a `TrainerState.log_history`; return
    None without any.

    ``scores`` are the titles of the metrics to draw, by name.
    """
    log = pd.DataFrame(log_history)
    curves = {  # panel: {key of the log: title}
        "Loss": {"loss": "training", "eval_loss": "evaluation"},
        "Evaluation score": {f"eval_{name}": title for name, title in scores.items()},
        "Learning rate": {"learning_rate": "learning rate"},
    }
    panels = {
        panel: keys
        for panel, titles in curves.items()
        if len(keys := log.columns.intersection([*titles]))
    }
    if not panels:
        return None
    figure = Figure(figsize=(9, 0.6 + 2.6 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (panel, keys) in zip(rows, panels.items(), strict=True):
        for key in keys:
            curve = log.dropna(subset=key)
            axes.plot(curve["step"], curve[key], label=curves[panel][key], marker=".")
        axes.set_ylabel(panel)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        _grid(axes)
    rows[-1].set_xlabel("Optimizer step")
    rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.suptitle("Training curves")
    return figure


def confusion_matrices(
    taxonomy: Taxonomy, logits: np.ndarray, labels: np.ndarray
) -> dict[str, Figure | None]:
    """Draw one confusion matrix per level with documents, by file name. Rows are normalised, so the
    diagonal is the recall.

    True and predicted paths are truncated at the level, so a leaf above the level stands for
    itself. A document labelled with an inner node above the level is left out, because its class
    there is unknown. If a level has more than 40 classes, the 40 with the most documents are drawn.
    ``logits`` are of leaves, and ``labels`` node ids.
    """
    predictions = logits.argmax(axis=1)
    figures = dict[str, Figure | None]()
    for level in range(1, taxonomy.depth + 1):
        truncated = np.array(
            [taxonomy.path(node)[:level][-1] for node in range(taxonomy.num_nodes)]
        )
        known = (labels < taxonomy.num_leaves) | (np.array(taxonomy.levels)[labels] >= level)
        if known.any():
            figure = _confusion_matrix(
                taxonomy, level, truncated[labels[known]], truncated[predictions[known]]
            )
            figures[f"confusion_matrix_level_{level}"] = figure
    return figures


def _confusion_matrix(
    taxonomy: Taxonomy, level: int, true: np.ndarray, predicted: np.ndarray
) -> Figure:
    support = np.bincount(true, minlength=taxonomy.num_nodes)
    occurring = np.union1d(true, predicted)
    largest = set(occurring[np.argsort(-support[occurring], kind="stable")][:MAX_CLASSES].tolist())
    nodes = [node for node in taxonomy.reading_order if node in largest]
    # divided by the sum of the whole row, hidden columns included, so that the diagonal is the
    # recall
    shares = (
        confusion_matrix(true, predicted, labels=nodes) / np.maximum(support[nodes], 1)[:, None]
    )
    side = max(3.6, 0.4 * len(nodes))  # inches
    figure = Figure(figsize=(side + 4.6, side + 3.2), layout="constrained")
    names, legend = show_names([taxonomy.labels[node] for node in nodes])
    figure.set_label(legend)
    display = ConfusionMatrixDisplay(shares, display_labels=names)
    small = {"fontsize": 7 if len(nodes) > 10 else 10}
    style = {"cmap": "Blues", "im_kw": {"vmin": 0, "vmax": 1}, "colorbar": False, "text_kw": small}
    display.plot(ax=figure.subplots(), values_format=".0%", xticks_rotation="vertical", **style)
    for text in display.text_.flat:
        if text.get_text() == "0%":
            text.set_text("")
    is_whole = len(nodes) == len(occurring)
    shown = (
        ""
        if is_whole
        else f"the {len(nodes)} of {len(occurring)} classes with the most documents; "
    )
    title = f"Confusion matrix, level {level} of {taxonomy.depth}"
    figure.suptitle(
        f"{title}\n{shown}{len(true):,} documents; shares of the true class", fontsize=12
    )
    return figure


def f1_by_frequency(per_class: list[dict]) -> Figure | None:
    """Draw each class's F1 over its number of documents, from ``per_class`` of
    `report.class_scores`; return None without any.

    The classes with the lowest F1 and those with the most documents are named.
    """
    rows = pd.DataFrame([row for row in per_class if row["support"]])
    if rows.empty:
        return None
    pairs = zip(rows["f1_interval"], rows["f1"], strict=True)
    ends = np.array([interval or (f1, f1) for interval, f1 in pairs]).T
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(
        rows["support"],
        rows["f1"],
        np.abs(ends - rows["f1"].array),
        fmt=".",
        ecolor="lightgray",
        markersize=9,
    )
    named = rows.loc[rows.nsmallest(NAMED, "f1").index.union(rows.nlargest(NAMED, "support").index)]
    names, legend = show_names([*named["label"]])
    figure.set_label(legend)
    for name, place in zip(names, named[["support", "f1"]].to_numpy(), strict=True):
        axes.annotate(name, place, xytext=(5, 3), textcoords="offset points", fontsize=7)
    axes.set(
        xscale="log",
        xlabel="Documents of the class",
        ylabel="F1, with 95 % intervals",
        ylim=(-0.02, 1.02),
    )
    _grid(axes)
    figure.suptitle(f"F1 by frequency: {len(rows)} classes")
    return figure


def reliability_diagram(p: Predictions) -> Figure | None:
    """Draw the share of correct predictions over their probability, and the number of predictions;
    return None without any.
    """
    counted, share = p.form.scored
    bins = calibration_bins(*p.form.scored_pairs(p))
    if bins.empty:
        return None
    means = bins.div(bins["count"], axis=0)
    figure = Figure(figsize=(7, 8), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    CalibrationDisplay(means["correct"], means["confidence"], None).plot(
        ax=upper, name="this model"
    )
    upper.set(xlabel=None, ylabel=share, xlim=(0, 1), ylim=(0, 1.02))
    lower.bar((bins.index + 0.5) / BINS, bins["count"], width=1 / BINS, edgecolor="white")
    lower.set(xlabel="Confidence (probability of the predicted class)", ylabel=counted)
    lower.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4, min_n_ticks=1))
    _grid(upper)
    _grid(lower)
    title = f"Reliability diagram: expected calibration error {expected_calibration_error(p):.3f}"
    figure.suptitle(
        f"{title}\n{int(bins['count'].sum()):,} {counted.lower()}, {BINS} bins of equal width"
    )
    return figure


def shorten(name: str) -> str:
    """Shorten a name to 40 characters, without its middle: long names often differ in their last
    words. Escape ``$``.
    """
    if len(name) > MAX_NAME:
        tail = MAX_NAME // 3
        name = f"{name[: MAX_NAME - tail - 1].rstrip(' ,')}…{name[-tail:].lstrip()}"
    return name.replace("$", r"\$")


def show_names(names: Sequence[str]) -> tuple[list[str], str]:
    """Return names for a figure, and a legend.

    A name with characters that `FONT` lacks is replaced by its number, and the legend gives the
    name.
    """
    short = list(map(shorten, names))
    drawn = font_manager.get_font(font_manager.findfont(FONT)).get_charmap()
    numbered = [i for i, name in enumerate(short) if not {*map(ord, name)} <= drawn.keys()]
    for i in numbered:
        short[i] = str(i + 1)
    return short, "; ".join(f"{i + 1}: {names[i]}" for i in numbered)


def _grid(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
