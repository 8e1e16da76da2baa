"""Render results as HTML and as plotly figures.

Worth knowing:

1. All strings of the user or the model go through `escape_html` or `plotly_text` (plotly interprets some HTML).
2. Colours are from the palette of Okabe and Ito, which colour-blind readers can distinguish. Each colour has a second sign:
   an underline, a plus or minus, or a number.
3. Heights depend on the taxonomy only, so that nothing moves when a result arrives. Only a list of labels can grow.
4. Of many nodes, only the most probable are shown, and the rest is summarised as "others".
5. Multi-label models: probabilities of siblings do not add up. So no figure adds them, and `tree` has a bar for each node.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from html import escape
from typing import Any, NamedTuple

import plotly.graph_objects as go
from attribution import LOG_ODDS_SLOPE, Explanation
from classification import Node

BLUE, GREY = "#0072B2", "#9AA5B1"
BARS = 6  # per level
LEVELS = 4  # with bars; only the icicle shows deeper levels
TREE_ROWS, INDENT = 30, 18  # of the tree, and of a level in pixels
ANSWER = 20  # most nodes shown of an answer for a recall
HEADING, ROW = 34, 27  # pixels
TEXT = {"xanchor": "left", "xshift": 3, "yanchor": "middle", "align": "left", "showarrow": False}
MIN_SHARE = 0.01  # of the icicle; smaller nodes are merged as "others"
MAX_LABEL_LENGTH = 34
PROBLEMS = 200  # most that are shown
FIRST_SECTIONS = ("results", "limits", "licence", "license")  # of the model card
NOT_A_DEVICE = "Not a medical device. Not for diagnosis, treatment or any decision about a patient."
# the HTML component of gradio would fill braces as templates in the browser
BRACES = str.maketrans({"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;"})
CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
BIDI_CONTROLS = re.compile("[\u202a-\u202e\u2066-\u2069\u200e\u200f]")  # change the writing direction


def escape_html(value: Any) -> str:
    """Escape a text for HTML."""
    return escape(CONTROLS.sub("\ufffd", str(value))).translate(BRACES)


def plotly_text(name: str) -> str:
    """Shorten a name, and escape it for plotly. A name in a script from right to left is isolated from the number beside it."""
    name = BIDI_CONTROLS.sub("", CONTROLS.sub("\ufffd", name))
    short = name if len(name) <= MAX_LABEL_LENGTH else name[: MAX_LABEL_LENGTH - 1] + "…"
    escaped = escape(short, quote=False).replace("$", "&#36;")
    is_rtl = any(unicodedata.bidirectional(character) in ("R", "AL") for character in short)
    return f"\u2068{escaped}\u2069" if is_rtl else escaped


def percent(share: float) -> str:
    """Format a probability. Only exact values are shown as 0 % or 100 %."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{100 * share:.1f} %"


def points(weight: float) -> str:
    """Format a difference of probabilities, in percentage points."""
    return f"{'−' if weight < 0 else '+'}{abs(100 * weight):.1f}"


def log_odds(weight: float) -> str:
    """Format a difference of log-odds."""
    return f"{'−' if weight < 0 else '+'}{abs(weight):.2f}"


# ── One text ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def result(kicker: str, classified: dict[str, Any], answer: str, descriptions: dict[str, str]) -> str:
    """Render the predicted nodes, each with its probability and its path, the answer, and the truncation.

    Args:
        classified: a `Classification`, which has one predicted node, or a `MultiLabelClassification`.
        answer: HTML of `coverage_answer` or `recall_answer`, or of the reason why there is no answer.
        descriptions: a phrase for each node that has one, by label.
    """
    nodes = "".join(predicted(node, descriptions) for node in classified.get("labels", [classified]))
    none = "<p class='class none'>No label</p><p class='note'>No node of the taxonomy is probable enough.</p>"
    return panel(f"<p class='kicker'>{kicker}</p>{nodes or none}<p class='answer'>{answer}</p>{truncation(classified)}")


def predicted(node: dict[str, Any], descriptions: dict[str, str]) -> str:
    """Render a predicted node, its description, its probability and its path."""
    description = descriptions.get(node["label"])
    described = f"<p class='note'>{escape_html(description)}</p>" if description else ""
    path = "".join(f"<li>{name_html(step['label'])} <b>{percent(step['score'])}</b></li>" for step in node["path"])
    return (
        f"<p class='class'>{name_html(node['label'])}</p>{described}"
        f"<p class='certainty'><span class='meter' aria-hidden='true'><span style='width:{100 * node['score']:.1f}%'></span>"
        f"</span>{percent(node['score'])} probability</p><ol class='path' aria-label='Path through the taxonomy'>{path}</ol>"
    )


def coverage_answer(coverage: float, nodes: list[Node]) -> str:
    names = " or ".join(f"<b>{name_html(node['label'])}</b>" for node in nodes)
    return f"For {coverage:.0%} coverage: {names}"


def recall_answer(recall: float, nodes: list[Node]) -> str:
    names = join_names([f"<b>{name_html(node['label'])}</b>" for node in nodes], ", ")
    return f"For {recall:.0%} recall: {names or 'no node'}"


def join_names(names: list[str], separator: str) -> str:
    """Join names. Of more than `ANSWER` names, the others are counted."""
    more = f" and {len(names) - ANSWER:,} more" if len(names) > ANSWER else ""
    return separator.join(names[:ANSWER]) + more


def truncation(classified: dict[str, Any]) -> str:
    """Render how much of the text was read."""
    length, length_read = classified["characters"], classified["characters_read"]
    if length_read == length:
        return "<p class='note'>The whole text was read.</p>"
    unread = length - length_read
    return (
        f"<p class='note warning'>The text was truncated: the model read the first {length_read:,} of {length:,} characters; "
        f"{unread:,} ({percent(unread / length)}) were not read.</p>"
    )


def waiting(kicker: str) -> str:
    """Render the placeholder of a result."""
    return panel(
        f"<p class='kicker'>{kicker}</p><p class='class none'>–</p>"
        "<p class='note'>Paste an abstract, or choose an example.</p>"
    )


def refusal(message: str, kicker: str = "Not classified") -> str:
    """Render a refusal in place of a result."""
    return panel(f"<p class='kicker'>{kicker}</p><p class='refused'>{escape_html(message)}</p>", role="alert")


def panel(content: str, role: str = "status") -> str:
    return f"<section class='panel' role='{role}' aria-live='polite'>{content}</section>"


def name_html(text: str) -> str:
    return f"<bdi>{escape_html(text)}</bdi>"


def bars(levels: list[dict[str, float]], path: list[str]) -> go.Figure:
    """Draw probability bars, level by level, with the path in blue.

    Args:
        levels: see `Classification`; all probabilities are 0 before there is a result.
        path: labels of the highlighted nodes.
    """
    shown = levels[:LEVELS]
    height = sum(HEADING + ROW * min(len(level), BARS + 1) for level in shown) + 8
    figure = go.Figure()
    top = 0.0
    for depth, level in enumerate(shown, start=1):
        order = sorted(level, key=lambda node: -level[node])
        count = BARS if len(order) > BARS + 1 else len(order)  # the last row is a node, or all others
        rows = [Bar(plotly_text(node), level[node], node in path) for node in order[:count]]
        if order[count:]:
            rows.append(Bar(f"{len(order) - count:,} others", sum(level[node] for node in order[count:]), False))
        figure.add_annotation(text=f"<b>Level {depth}</b>", y=top + 20, x=0, **TEXT)
        draw_rows(figure, rows, top + HEADING, bool(path))
        top += HEADING + ROW * len(rows)
    return set_layout(figure, height, 1, height)


class Bar(NamedTuple):
    """A bar: its text, its probability, whether it is marked, and the indentation of the text in levels."""

    text: str
    score: float
    is_marked: bool
    indent: int = 0


def draw_rows(figure: go.Figure, rows: list[Bar], top: float, with_numbers: bool) -> None:
    """Draw bars, one below the other from ``top`` in pixels, each with its text on it."""
    places = [top + ROW * (i + 0.5) for i in range(len(rows))]
    figure.add_bar(
        x=[bar.score for bar in rows],
        y=places,
        width=ROW - 5,
        orientation="h",
        opacity=0.45,
        marker={"color": [BLUE if bar.is_marked else GREY for bar in rows]},
        hovertext=[f"{bar.text}: {percent(bar.score)}" for bar in rows],
        hoverinfo="text",
    )
    for place, bar in zip(places, rows, strict=True):
        written = f"{bar.text}  <b>{percent(bar.score)}</b>" if with_numbers else bar.text
        figure.add_annotation(text=written, y=place, x=0, **TEXT | {"xshift": 3 + INDENT * bar.indent})


def tree(nodes: list[tuple[str, int]], scores: dict[str, float] | None, chosen: set[str]) -> go.Figure:
    """Draw the taxonomy, one node per row, with a bar for its probability. Of many nodes, only the most probable are shown.

    No node is more probable than its parent, so the parents of the shown nodes are shown too.

    Args:
        nodes: label and level, in reading order.
        scores: the probability of each label; None before there is a result.
        chosen: labels of the predicted nodes and their ancestors, which are marked and come first.
    """
    known = scores or {}
    order = sorted(nodes, key=lambda node: (node[0] not in chosen, -known.get(node[0], 0.0), node[1]))
    count = TREE_ROWS if len(order) > TREE_ROWS + 1 else len(order)  # the last row is a node, or all others
    shown, others = set(order[:count]), order[count:]
    height = ROW * min(len(nodes), TREE_ROWS + 1) + 8
    rows = [
        Bar(
            f"✓ {plotly_text(node)}" if node in chosen else plotly_text(node),
            known.get(node, 0.0),
            node in chosen,
            level - 1,
        )
        for node, level in nodes
        if (node, level) in shown
    ]
    figure = go.Figure()
    draw_rows(figure, rows, 0, scores is not None)
    if others:
        most = f", each at most {percent(max(scores[node] for node, _ in others))}" if scores else ""
        figure.add_annotation(text=f"{len(others):,} others{most}", y=ROW * (TREE_ROWS + 0.5), x=0, **TEXT)
    return set_layout(figure, height, 1, height)


def icicle(levels: list[dict[str, float]], parents: dict[str, str], path: list[str]) -> go.Figure:
    """Draw the taxonomy from the roots at the left to the leaves at the right. The height of a node is its probability.

    Args:
        levels: see `Classification`.
        parents: the parent of each label; for a root, the empty string.
        path: labels of nodes that are always shown.
    """
    scores = {node: score for level in levels for node, score in level.items()}
    children: dict[str, list[str]] = {}
    for node, parent in parents.items():
        children.setdefault(parent, []).append(node)
    boxes = list(lay_out(children, scores, set(path), "", 0, 0.0))
    rights = [len(levels) if box.is_leaf else box.level + 1 for box in boxes]  # a leaf reaches to the right edge
    figure = go.Figure(
        go.Bar(
            x=[(box.level + right) / 2 for box, right in zip(boxes, rights, strict=True)],
            width=[right - box.level for box, right in zip(boxes, rights, strict=True)],
            base=[box.low for box in boxes],
            y=[box.score for box in boxes],
            text=[f"{box.text} {percent(box.score)}" for box in boxes],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            # each contrast is at least 4.5
            textfont={"color": ["#FFFFFF" if box.score > 0.775 else "#000000" for box in boxes], "size": 13},
            hovertext=[f"{box.text}: {percent(box.score)}" for box in boxes],
            hoverinfo="text",
            marker={"color": [colour_of(box.score) for box in boxes], "line": {"width": 1.5, "color": "#FFFFFF"}},
        )
    )
    height = min(130 + 26 * len(parents.keys() - children.keys()), 440)
    return set_layout(figure, height, len(levels), 1).update_layout(uniformtext={"minsize": 8, "mode": "hide"})


class Box(NamedTuple):
    """A box of an icicle: level from 0, lower end, text, probability, and whether nothing is drawn below the node."""

    level: int
    low: float
    text: str
    score: float
    is_leaf: bool


def lay_out(
    children: dict[str, list[str]], scores: dict[str, float], path: set[str], parent: str, level: int, low: float
) -> Iterator[Box]:
    """Yield the boxes of an icicle below a node.

    Args:
        low: lower end of the first box.
    """
    below = sorted(children.get(parent, []), key=lambda node: -scores[node])
    others = dict.fromkeys(node for node in below if scores[node] < MIN_SHARE and node not in path)
    for node in below:
        if node not in others:
            yield Box(level, low, plotly_text(node), scores[node], node not in children)
            yield from lay_out(children, scores, path, node, level + 1, low)
            low += scores[node]
    if others:
        rest = sum(scores[node] for node in others)
        yield Box(level, low, f"{len(others):,} other{'s' if len(others) > 1 else ''}", rest, True)


def colour_of(score: float) -> str:
    """Return a colour from light to dark blue, by probability."""
    light, dark = (220, 232, 243), (0, 92, 150)
    return "#" + "".join(f"{round(a + (b - a) * score):02X}" for a, b in zip(light, dark, strict=True))


def set_layout(figure: go.Figure, height: int, right: float, bottom: float) -> go.Figure:
    """Set the layout that all figures share. The axes are hidden, and start at 0 in the upper left corner."""
    figure.update_xaxes(range=[0, right], fixedrange=True, visible=False)
    figure.update_yaxes(range=[bottom, 0], fixedrange=True, visible=False)
    return figure.update_layout(
        barmode="overlay",
        height=height,
        autosize=True,
        margin={"l": 0, "r": 0, "t": 0, "b": 0},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        showlegend=False,
        font={"family": "system-ui, sans-serif", "size": 13},
        hoverlabel={"bgcolor": "#1B2A3A", "font": {"color": "#FFFFFF"}},
    )


# ── Words ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def no_words() -> str:
    """Render the placeholder of an explanation."""
    return panel("<p class='note'>Classify a text, choose a node, and press “Show the words”.</p>")


def words(text: str, explanation: Explanation, in_log_odds: bool) -> str:
    """Render a text with its words coloured by their weights, and the largest weights.

    Args:
        in_log_odds: the unit of the weights, else probability.
    """
    factor, format_weight, unit = (LOG_ODDS_SLOPE, log_odds, "log-odds") if in_log_odds else (1, points, "points")
    # ── The text: coloured words, and the end that was not read ──
    largest = max((abs(word["weight"]) for word in explanation["words"]), default=0.0)
    scale = max(largest, 0.005 * factor)
    parts, position = [], 0
    for word in explanation["words"]:
        parts.append(escape_html(text[position : word["start"]]))
        strength = abs(word["weight"]) / scale
        escaped = escape_html(text[word["start"] : word["end"]])
        if strength >= 0.08:
            kind = "for" if word["weight"] > 0 else "against"
            title = f"{format_weight(word['weight'])} {unit}"
            parts.append(
                f"<span class='w {kind}' style='--s:{math.sqrt(strength):.2f}' title='{title}' "
                f"data-weight='{word['weight']:.6f}'>{escaped}</span>"
            )
        else:
            parts.append(escaped)
        position = word["end"]
    parts.append(escape_html(text[position : explanation["characters_read"]]))
    unread = text[explanation["characters_read"] :]
    if unread:
        parts.append(f"<span class='unread' title='not read by the model'>{escape_html(unread)}</span>")

    # ── The warning, the error and the ranking ──
    least = "the log-odds by 0.004" if in_log_odds else "this probability by 0.1 points"
    warning = "" if largest >= 0.001 * factor else f"<p class='note'>No word changes {least} or more.</p>"
    if abs(explanation["error"]) > 0.1 * factor:
        warning = "<p class='note warning'>The error is large, so the weights are unreliable.</p>"
    score, blank_score, error = explanation["score"], explanation["blank_score"], explanation["error"]
    difference = sum(word["weight"] for word in explanation["words"]) + explanation["rest"] - error
    share = f", {abs(error / difference):.1%} of the difference" if abs(difference) >= 0.005 * factor else ""
    of_words = "log-odds" if in_log_odds else "percentage points"
    ranked = sorted(explanation["words"], key=lambda word: -word["weight"])
    best = [word for word in ranked if word["weight"] > 0][:8]
    worst = [word for word in ranked[::-1] if word["weight"] < 0][:8]
    return panel(
        f"<h3>Words for and against {name_html(explanation['label'])}</h3>"
        f"<p class='note'>The probability is {percent(blank_score)} for a blank text of this length, and <b>{percent(score)}</b> "
        f"for this text. The weights of words and special tokens, in {of_words}, add up to the difference, {format_weight(difference)}, with a "
        f"convergence error of {format_weight(error)}{share}.</p>{warning}"
        f"<p class='legend'><span class='w for' style='--s:.8'>raises</span> <span class='w against' style='--s:.8'>lowers</span> "
        f"the probability{' · <span class=unread>grey: not read</span>' if unread else ''}</p>"
        f"<div class='text' dir='auto' tabindex='0' aria-label='The text with the weights of its words'>{''.join(parts)}</div>"
        f"<div class='ranked'>{ranking(f'Raise the probability most, in {unit}', best, format_weight)}"
        f"{ranking(f'Lower the probability most, in {unit}', worst, format_weight)}</div>"
        "<p class='note'>Integrated gradients over the encoder’s word embeddings and, where the model has one, its lexical head. "
        "A weight shows the effect of a word on the model. It is not medical evidence.</p>"
    )


def ranking(title: str, ranked: list[dict], format_weight: Callable[[float], str]) -> str:
    """Render a table of words and their weights."""
    rows = "".join(
        f"<tr><th scope='row'>{name_html(word['word'])}</th><td>{format_weight(word['weight'])}</td></tr>"
        for word in ranked
    )
    rows = rows or "<tr><td colspan='2'>none</td></tr>"
    return f"<table><caption>{title}</caption><tbody>{rows}</tbody></table>"


# ── A file ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def progress(done: int, total: int, problems: int, state: str) -> str:
    """Render the progress of a file."""
    text = f"{state} {done:,} of {total:,} rows" if total else state
    if problems:
        text += f"; {problems:,} could not be classified"
    return (
        f"<section class='panel run' role='status' aria-live='polite'><p>{escape_html(text)}</p>"
        f"<progress max='{max(total, 1)}' value='{done}' aria-label='rows done'></progress></section>"
    )


def note(text: str) -> str:
    """Render a note beside the progress. An empty note keeps its space."""
    return f"<p class='note ended' role='status' aria-live='polite'>{escape_html(text)}</p>"


def preview(records: list[dict[str, Any]]) -> str:
    """Render rows that were classified, with the beginnings of their texts."""
    heads = ("line", "text", "most probable class", "probability", "answer for the coverage")
    rows = (
        (
            record["line"],
            shorten(record["text"]),
            name_html(record["predicted"]),
            percent(record["probability"]),
            " or ".join(name_html(node) for node in record["answer"] or []) or "–",
        )
        for record in records
    )
    return grid(heads, rows)


def labels_preview(records: list[dict[str, Any]]) -> str:
    """Render rows with their predicted nodes and probabilities."""
    rows = (
        (
            record["line"],
            shorten(record["text"]),
            "; ".join(
                f"{name_html(label)} {percent(score)}"
                for label, score in zip(record["labels"], record["scores"], strict=True)
            )
            or "no label",
            join_names([name_html(node) for node in record["answer"] or []], "; ") or "–",
        )
        for record in records
    )
    return grid(("line", "text", "labels", "answer for the recall"), rows)


def shorten(text: str) -> str:
    return name_html(text if len(text) <= 160 else text[:159] + "…")


def problems(records: list[dict[str, Any]]) -> str:
    """Render rows that were not classified, by line."""
    rows = ((record["line"], escape_html(record["problem"])) for record in records[:PROBLEMS])
    more = f"<p class='note'>and {len(records) - PROBLEMS:,} more</p>" if len(records) > PROBLEMS else ""
    return grid(("line", "reason"), rows, "None.") + more


def grid(
    heads: tuple[str, ...],
    rows: Iterable[tuple[Any, ...]],
    empty: str = "The rows that are classified are shown here.",
) -> str:
    """Render a table from cells of HTML, or a note if it is empty. On a narrow page its rows are blocks."""
    body = "".join(
        "<tr>" + "".join(f"<td data-head='{head}'>{cell}</td>" for head, cell in zip(heads, row, strict=True)) + "</tr>"
        for row in rows
    )
    if not body:
        return f"<p class='note grid-empty'>{empty}</p>"
    top = "".join(f"<th scope='col'>{head}</th>" for head in heads)
    return f"<table class='grid'><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


# ── The model ────────────────────────────────────────────────────────────────────────────────────────────────────────


def card_parts(card: str) -> tuple[str, str]:
    """Split a model card into its most important sections and the rest, as Markdown.

    The front matter, comments, pictures and the section on loading the model are dropped.
    """
    body = re.sub(r"\A---\r?\n.*?\r?\n---\r?\n", "", card, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", body)
    introduction, *sections = re.split(r"(?m)^(?=## )", body)
    sections = [section for section in sections if not section.lower().startswith("## use")]
    first = [section for section in sections if section[3:].lower().startswith(FIRST_SECTIONS)]
    introduction = re.sub(r"(?m)\A\s*# .*$", "", introduction)
    return "".join([introduction, *first]).strip(), "".join(s for s in sections if s not in first).strip()


def licence(card: str) -> str:
    """Return the licence in the front matter of a model card."""
    match = re.search(r"(?m)\A---\r?\n(?:.*\r?\n)*?license:[ \t]*(\S+)", card)
    return match[1] if match else "not given"


def facts(known: dict[str, str]) -> str:
    """Render the facts of a model as a table."""
    rows = "".join(
        f"<tr><th scope='row'>{escape_html(key)}</th><td>{name_html(value)}</td></tr>" for key, value in known.items()
    )
    return f"<table class='facts'><caption class='hidden'>The model</caption><tbody>{rows}</tbody></table>"


# ── Head and foot ─────────────────────────────────────────────────────────────────────────────────────────────────


def masthead() -> str:
    return (
        "<header><h1>Medical text, sorted into a taxonomy</h1>"
        f"<p class='device' role='note'>{NOT_A_DEVICE} For research.</p></header>"
    )


def footer() -> str:
    return f"<footer><p>{NOT_A_DEVICE} What you send is not logged or shared. Files and results are deleted within ten minutes.</p></footer>"


HEAD = """
<script>
document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "Enter" && event.target.closest("#abstract")) {
    event.preventDefault();
    document.querySelector("#classify").click();
  }
});
</script>
"""
