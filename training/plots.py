"""Figures of a run: training curves, confusion matrices, reliability diagram; each as interactive HTML and as PNG.

Worth knowing:

1. PNGs are drawn by matplotlib, since plotly's own export needs a browser. `matplotlib.figure.Figure` is used without
   pyplot: no global state, no display.
2. The HTML files share one ``plotly.min.js`` beside them, and open without a network.
3. Class names are user input. Plotly renders some HTML in text, so they are escaped there; matplotlib reads ``$`` as
   mathematics, so it is told not to. File names hold level numbers, never class names.
4. Colours are those of Okabe and Ito (2008), which people with colour-blindness can tell apart, and shades of one blue.
"""

import html
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from plotly.subplots import make_subplots
from sklearn.metrics import confusion_matrix

from configuration_hierarchical import Taxonomy
from training.metrics import calibration_bins, expected_calibration_error, labelled_documents

BLUE, SKY, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#6B6B6B"
CURVES = {  # panel: {key of the log: (name, colour)}
    "Loss": {"loss": ("training", BLUE), "eval_loss": ("evaluation", ORANGE)},
    "Evaluation score": {
        "eval_accuracy": ("accuracy", BLUE),
        "eval_macro_f1": ("macro F1", ORANGE),
        "eval_weighted_f1": ("weighted F1", PURPLE),
        "eval_hierarchical_f1": ("hierarchical F1", GREEN),
    },
    "Learning rate": {"learning_rate": ("learning rate", GREY)},
}
MAX_CLASSES = 40
MAX_NAME = 40  # characters
MAX_MARKERS = 50  # a longer curve is a line without them
PNG_DPI = 150
ACCURACY, GAP, PERFECT = "accuracy", "gap to the mean confidence", "perfect calibration"
CONFIDENCE = "Confidence (probability of the predicted class)"


def training_curves(log_history: list[dict], folder: str | Path) -> list[Path]:
    """Losses, evaluation scores and the learning rate over optimizer steps: ``training_curves.html`` and ``.png``.

    Args:
        log_history: as in `transformers.TrainerState`: one dict a log line, each with its ``step``.
        folder: created where it does not exist.

    Returns:
        The files written, ``plotly.min.js`` among them; none where the log holds no curve.
    """
    panels = {}
    for panel, curves in CURVES.items():
        points = {key: [(line["step"], line[key]) for line in log_history if key in line] for key in curves}
        found = {key: list(zip(*pairs, strict=True)) for key, pairs in points.items() if pairs}
        if found:
            panels[panel] = found
    if not panels:
        return []
    return _write(_interactive_curves(panels), _static_curves(panels), Path(folder), "training_curves")


def confusion_matrices(taxonomy: Taxonomy, logits: np.ndarray, labels: np.ndarray, folder: str | Path) -> list[Path]:
    """What was taken for what, one matrix a level: ``confusion_matrix_level_k.html`` and ``.png``.

    A cell's colour is its share of the row, its text the number of documents. True and predicted paths are cut at the
    level, so that a leaf above it stands for itself; a document whose label is an inner node above it is left out, since
    its class is not known there. Of more than 40 classes, those with the most documents are drawn.

    Args:
        logits: (num_documents, num_leaves).
        labels: (num_documents,), node ids or -100.
        folder: created where it does not exist.

    Returns:
        The files written, ``plotly.min.js`` among them; none for a level without documents.

    Raises:
        InputError: arrays of other shapes, unknown label ids, logits that are not finite.
    """
    logits, labels = labelled_documents(taxonomy, logits, labels)
    answers = logits.argmax(axis=1)
    paths = [taxonomy.path(node) for node in range(taxonomy.num_nodes)]
    written: dict[Path, None] = {}  # a dict, because each level returns plotly.min.js
    for level in range(1, taxonomy.depth + 1):
        cut = np.array([path[:level][-1] for path in paths])
        known = (labels < taxonomy.num_leaves) | (np.array(taxonomy.levels)[labels] >= level)
        if known.any():
            figures = _confusion_matrix(taxonomy, level, cut[labels[known]], cut[answers[known]])
            written |= dict.fromkeys(_write(*figures, Path(folder), f"confusion_matrix_level_{level}"))
    return list(written)


def reliability_diagram(
    logits: np.ndarray, labels: np.ndarray, folder: str | Path, name: str = "reliability_diagram"
) -> list[Path]:
    """Accuracy against confidence, and how often each confidence occurs: ``<name>.html`` and ``<name>.png``.

    Args:
        logits: (num_documents, num_leaves).
        labels: (num_documents,), node ids or -100.
        folder: created where it does not exist.

    Returns:
        The files written, ``plotly.min.js`` among them; none where no document is labelled, or one with an inner node: the
        others would be a choice by label, among which right probabilities look wrong.

    Raises:
        InputError: arrays of other shapes, logits that are not finite.
    """
    bins = calibration_bins(logits, labels)
    total = int(bins["count"].sum())
    if not total or (labels >= logits.shape[1]).any():
        return []
    title = f"Reliability diagram: expected calibration error {expected_calibration_error(bins):.3f}"
    subtitle = f"{total:,} documents, {len(bins['count'])} bins of equal width"
    # from the accuracy to the mean confidence, whichever is lower
    bins["low"] = np.minimum(bins["accuracy"], bins["confidence"])
    bins["gap"] = np.abs(bins["accuracy"] - bins["confidence"])
    bins["centre"] = (np.arange(len(bins["count"])) + 0.5) / len(bins["count"])
    return _write(
        _interactive_reliability(bins, title, subtitle),
        _static_reliability(bins, title, subtitle),
        Path(folder),
        name,
    )


def _static_curves(panels: dict[str, dict[str, list]]) -> Figure:
    figure = Figure(figsize=(9, 0.6 + 2.6 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (panel, curves) in zip(rows, panels.items(), strict=True):
        for key, (steps, values) in curves.items():
            name, colour = CURVES[panel][key]
            axes.plot(
                steps, values, color=colour, label=name, marker="o" if len(steps) <= MAX_MARKERS else "", markersize=4
            )
        axes.set_ylabel(panel)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        _plain(axes)
    rows[-1].set_xlabel("Optimizer step")
    rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.suptitle("Training curves")
    return figure


def _interactive_curves(panels: dict[str, dict[str, list]]) -> go.Figure:
    figure = make_subplots(rows=len(panels), cols=1, shared_xaxes=True, vertical_spacing=0.06)
    for row, (panel, curves) in enumerate(panels.items(), start=1):
        for key, (steps, values) in curves.items():
            name, colour = CURVES[panel][key]
            mode = "lines+markers" if len(steps) <= MAX_MARKERS else "lines"
            line = go.Scatter(x=steps, y=values, name=name, mode=mode, line_color=colour, legend=f"legend{row}")
            figure.add_trace(line, row=row, col=1)
        figure.update_yaxes(title_text=panel, exponentformat="e", row=row, col=1)
        top = figure.layout[f"yaxis{row}"].domain[1]
        figure.update_layout({f"legend{row}": {"x": 1.02, "y": top, "yanchor": "top"}})
    figure.update_xaxes(title_text="Optimizer step", row=len(panels), col=1)
    figure.update_layout(title="Training curves", height=120 + 260 * len(panels), hovermode="x unified")
    return figure


def _static_reliability(bins: dict[str, np.ndarray], title: str, subtitle: str) -> Figure:
    figure = Figure(figsize=(7, 8), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bar = {"x": bins["centre"], "width": 1 / len(bins["centre"])}
    upper.bar(**bar, height=bins["accuracy"], color=SKY, edgecolor="white", label=ACCURACY)
    upper.bar(**bar, height=bins["gap"], bottom=bins["low"], color="none", edgecolor=ORANGE, hatch="//", label=GAP)
    upper.plot([0, 1], [0, 1], "--", color="black", label=PERFECT)
    upper.set(ylabel="Accuracy", xlim=(0, 1), ylim=(0, 1.02))
    lower.bar(**bar, height=bins["count"], color=GREY, edgecolor="white")
    lower.set(xlabel=CONFIDENCE, ylabel="Documents")
    lower.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4, min_n_ticks=1))
    _plain(upper)
    _plain(lower)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{title}\n{subtitle}")
    return figure


def _interactive_reliability(bins: dict[str, np.ndarray], title: str, subtitle: str) -> go.Figure:
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.75, 0.25], vertical_spacing=0.06)
    bar = {"x": bins["centre"], "width": 1 / len(bins["centre"])}
    hatched = {
        "color": "rgba(0,0,0,0)",
        "line": {"color": ORANGE, "width": 1.5},
        "pattern": {"shape": "/", "fgcolor": ORANGE, "bgcolor": "rgba(0,0,0,0)"},
    }
    shown = {"customdata": bins["confidence"], "hovertemplate": "mean confidence: %{customdata:.3f}<extra></extra>"}
    diagonal = go.Scatter(x=[0, 1], y=[0, 1], mode="lines", name=PERFECT, line={"color": "black", "dash": "dash"})
    figure.add_trace(go.Bar(**bar, y=bins["accuracy"], name=ACCURACY, marker_color=SKY), row=1, col=1)
    figure.add_trace(go.Bar(**bar, **shown, y=bins["gap"], base=bins["low"], name=GAP, marker=hatched), row=1, col=1)
    figure.add_trace(diagonal, row=1, col=1)
    figure.add_trace(
        go.Bar(**bar, y=bins["count"], name="documents", marker_color=GREY, showlegend=False), row=2, col=1
    )
    figure.update_xaxes(range=[0, 1])
    figure.update_xaxes(title_text=CONFIDENCE, row=2, col=1)
    figure.update_yaxes(title_text="Accuracy", range=[0, 1.02], row=1, col=1)
    figure.update_yaxes(title_text="Documents", row=2, col=1)
    figure.update_layout(title={"text": title, "subtitle": {"text": subtitle}}, height=720, barmode="overlay")
    return figure


def _confusion_matrix(
    taxonomy: Taxonomy, level: int, true: np.ndarray, answers: np.ndarray
) -> tuple[go.Figure, Figure]:
    """The matrix of one level, from the true and predicted nodes there: (num_documents,) each."""
    support = np.bincount(true, minlength=taxonomy.num_nodes)
    occurring = np.union1d(true, answers)
    largest = set(occurring[np.argsort(-support[occurring], kind="stable")][:MAX_CLASSES].tolist())
    shown = [node for node in taxonomy.reading_order if node in largest]
    counts = confusion_matrix(true, answers, labels=shown)  # (rows: true, columns: predicted)
    # over the whole row, hidden columns included, so that the diagonal is always the recall
    shares = counts / np.maximum(support[shown], 1)[:, None]
    names = [taxonomy.labels[node] for node in shown]
    title = f"Confusion matrix, level {level} of {taxonomy.depth}"
    subtitle = f"{len(true):,} documents; colour: share of the true class"
    if len(shown) < len(occurring):
        subtitle = f"the {len(shown)} of {len(occurring)} classes with the most documents; {subtitle}"
    drawn = (counts, shares, names, title, subtitle)
    return _interactive_matrix(*drawn), _static_matrix(*drawn)


def _static_matrix(counts: np.ndarray, shares: np.ndarray, names: list[str], title: str, subtitle: str) -> Figure:
    large = len(names) > 10
    # inches; four digits of 7 points fit into 0.36
    side = max(3.6, len(names) * max(0.36, 0.12 + 0.06 * len(str(counts.max()))))
    figure = Figure(figsize=(side + 4.6, side + 3.2), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(counts):
        axes.text(
            column,
            row,
            f"{counts[row, column]}",
            ha="center",
            va="center",
            fontsize=7 if large else 10,
            color="white" if shares[row, column] > 0.55 else "black",
        )
    ticks = np.arange(len(names))
    short = [_short(name) for name in names]
    size = 9 if large else 10
    axes.set_xticks(ticks, short, rotation=45, ha="right", rotation_mode="anchor", fontsize=size, parse_math=False)
    axes.set_yticks(ticks, short, fontsize=size, parse_math=False)
    axes.set(xlabel="Predicted class", ylabel="True class")
    axes.set_xticks(ticks[:-1] + 0.5, minor=True)
    axes.set_yticks(ticks[:-1] + 0.5, minor=True)
    axes.grid(which="minor", color="lightgrey", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    figure.colorbar(image, ax=axes, shrink=0.7, format=PercentFormatter(xmax=1, decimals=0))
    figure.suptitle(f"{title}\n{subtitle}", fontsize=16 if large else 12)
    return figure


def _interactive_matrix(
    counts: np.ndarray, shares: np.ndarray, names: list[str], title: str, subtitle: str
) -> go.Figure:
    full = [html.escape(name) for name in names]
    short = [html.escape(_short(name)) for name in names]
    ticks = list(range(len(names)))  # numbers, because two categories of one shortened name would become one
    figure = go.Figure(
        go.Heatmap(
            z=shares,
            zmin=0,
            zmax=1,
            colorscale="Blues",
            text=np.where(counts > 0, counts.astype(str), ""),
            texttemplate="%{text}",
            customdata=[[(true, predicted) for predicted in full] for true in full],
            hovertemplate="true: %{customdata[0]}<br>predicted: %{customdata[1]}<br>documents: %{text}<br>"
            "share of the true class: %{z:.1%}<extra></extra>",
            colorbar={"tickformat": ".0%"},
            xgap=1,
            ygap=1,
        )
    )
    size = 28 * len(names)  # pixels
    figure.update_xaxes(title_text="Predicted class", tickvals=ticks, ticktext=short, tickangle=-45, automargin=True)
    figure.update_yaxes(title_text="True class", tickvals=ticks, ticktext=short, autorange="reversed", automargin=True)
    figure.update_layout(
        title={"text": title, "subtitle": {"text": subtitle}},
        width=max(800, size + 450),
        height=max(650, size + 400),
        plot_bgcolor="white",
    )
    return figure


def _short(name: str) -> str:
    """At most 40 characters of a name, cut in the middle, at words: long names often differ in the last words only."""
    if len(name) <= MAX_NAME:
        return name
    tail = MAX_NAME // 3
    head = MAX_NAME - tail - 1
    # one character more tells whether a word ends at the cut
    start = name[: head + 1].rsplit(" ", 1)[0][:head].rstrip(" ,")
    return f"{start}…{name[-tail - 1 :].split(' ', 1)[-1][-tail:]}"


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def _write(interactive: go.Figure, static: Figure, folder: Path, stem: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    interactive.update_layout(template="plotly_white")
    interactive.write_html(
        folder / f"{stem}.html",
        include_plotlyjs="directory",
        div_id=stem,  # else a random one, and the same run would not write the same file
        config={"showSendToCloud": False, "displaylogo": False},  # the former, by default, uploads the data on a click
    )
    static.savefig(folder / f"{stem}.png", dpi=PNG_DPI)
    return [folder / f"{stem}.html", folder / f"{stem}.png", folder / "plotly.min.js"]
