"""Render results as HTML and as plotly figures.

Worth knowing:

1. All strings of the user or the model go through `escape_html` or `plotly_text` (plotly interprets some HTML).
2. Colours are from the palette of Okabe and Ito, which colour-blind readers can distinguish. Each colour has a second sign:
   an underline, a plus or minus, or a number.
3. Heights depend on the taxonomy only, so that nothing moves when a result arrives. Only a list of labels can grow.
4. Of many nodes, only the most probable are shown, and the rest is summarised as "others".
5. Multi-label models: probabilities of siblings do not add up. So `node_rows` adds none, and has a bar for each node.
"""

import math
import re
import unicodedata
from collections.abc import Iterable, Iterator
from html import escape
from typing import Any, NamedTuple

import plotly.graph_objects as go
from attribution import LOG_ODDS_SLOPE, Explanation
from classification import Classification, Node, Prediction

BLUE, GREY = "#0072B2", "#9AA5B1"
BARS = 6  # per level
LEVELS = 4  # with bars; only the icicle shows deeper levels
TREE_ROWS, INDENT = 30, 18  # of the tree, and of a level in pixels
MAX_SET = 20  # most nodes shown of a prediction set
HEADING, ROW = 34, 27  # pixels
TEXT = {"xanchor": "left", "xshift": 3, "yanchor": "middle", "align": "left", "showarrow": False}
MIN_SHARE = 0.01  # of the icicle; smaller nodes are merged as "others"
MAX_LABEL_LENGTH = 34
NOVELTY = 0.05  # the p-value up to which a text is shown as strange
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


class Unit(NamedTuple):
    """The unit of the weights of words."""

    slope: float  # by which tolerances in probability are multiplied
    shown: float  # the number that is shown for a weight of 1
    digits: int
    name: str
    long_name: str
    least: str  # a change by a word that is worth a remark

    def format(self, weight: float) -> str:
        return f"{'−' if weight < 0 else '+'}{abs(self.shown * weight):.{self.digits}f}"


PROBABILITY = Unit(1, 100, 1, "points", "percentage points", "this probability by 0.1 points")
LOG_ODDS = Unit(LOG_ODDS_SLOPE, 1, 2, "log-odds", "log-odds", "the log-odds by 0.004")


# ── One text ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def result(kicker: str, classified: Classification, held: str) -> str:
    """Render the predicted nodes, each with its probability and its path, the prediction set, and the truncation.

    ``held`` is the HTML of `prediction_set`, or of the reason why there is none. The set of a strange text is not shown, because
    its guarantee is for other texts.
    """
    if is_strange(classified):
        reason = "" if "prediction_set" in classified else f"<p class='held'>{held}</p>"
        nodes = [f"{name_html(node['label'])} {percent(node['score'])}" for node in classified["labels"]]
        return panel(
            f"<p class='kicker'>{kicker}</p><p class='class none'>Unlike the texts this model was trained on</p>"
            f"<p class='note'>{percent(classified['p_value'])} of the validation texts look as strange to the model. "
            f"Its prediction would be {join_names(nodes, ', ') or 'no label'}.</p>{reason}{truncation(classified)}"
        )
    nodes = "".join(map(predicted, classified["labels"]))
    none = "<p class='class none'>No label</p><p class='note'>No node of the taxonomy is probable enough.</p>"
    return panel(f"<p class='kicker'>{kicker}</p>{nodes or none}<p class='held'>{held}</p>{truncation(classified)}")


def is_strange(classified: Classification) -> bool:
    """Return whether no predicted node is known, and the text looks strange."""
    return classified.get("p_value", 1) <= NOVELTY and not any(node["known"] for node in classified["labels"])


def predicted(node: Prediction) -> str:
    """Render a predicted node, its description, its probability, its path, and what of the path is known."""
    described = f"<p class='note'>{escape_html(node['description'])}</p>" if "description" in node else ""
    unknown, known = "", node.get("known", node["label"])
    if known != node["label"]:
        like = f", but like those of {name_html(known)}" if known else ""
        unknown = f"<p class='note warning'>Unlike the known texts of {name_html(node['label'])}{like}.</p>"
    path = "".join(f"<li>{name_html(step['label'])} <b>{percent(step['score'])}</b></li>" for step in node["path"])
    return (
        f"<p class='class'>{name_html(node['label'])}</p>{described}"
        f"<p class='certainty'><span class='meter' aria-hidden='true'><span style='width:{100 * node['score']:.1f}%'></span>"
        f"</span>{percent(node['score'])} probability</p><ol class='path' aria-label='Path through the taxonomy'>{path}</ol>{unknown}"
    )


def prediction_set(guarantee: str, target: float, nodes: list[Node], separator: str) -> str:
    names = join_names([f"<b>{name_html(node['label'])}</b>" for node in nodes], separator)
    return f"For {target:.0%} {guarantee}: {names or 'no node'}"


def join_names(names: list[str], separator: str) -> str:
    """Join names. Of more than `MAX_SET` names, the others are counted."""
    more = f" and {len(names) - MAX_SET:,} more" if len(names) > MAX_SET else ""
    return separator.join(names[:MAX_SET]) + more


def truncation(classified: Classification) -> str:
    """Render how much of the text was read."""
    if not classified["truncated"]:
        return "<p class='note'>The whole text was read.</p>"
    tokens, unread = classified["tokens"], classified["tokens"] - classified["tokens_read"]
    return (
        f"<p class='note warning'>The text was truncated: of its {tokens:,} tokens, the last {unread:,} "
        f"({percent(unread / tokens)}) were not read.</p>"
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


# ── Figures: each from the taxonomy, the probabilities of its nodes, and the predicted nodes with their ancestors ─────


def bars(tree: Any, scores: list[float] | None, chosen: set[int]) -> go.Figure:
    """Draw probability bars, level by level, with the chosen nodes in blue. Without scores, they are empty."""
    known = scores or [0.0] * tree.num_nodes
    figure = go.Figure()
    top = 0
    for depth in range(1, min(tree.depth, LEVELS) + 1):
        level = [node for node in tree.reading_order if tree.levels[node] == depth]
        order = sorted(level, key=lambda node: -known[node])
        count = BARS if len(order) > BARS + 1 else len(order)  # the last row is a node, or all others
        rows = [Bar(plotly_text(tree.labels[node]), known[node], node in chosen) for node in order[:count]]
        if others := order[count:]:
            rows.append(Bar(f"{len(others):,} others", sum(known[node] for node in others), False))
        figure.add_annotation(text=f"<b>Level {depth}</b>", y=top + 20, x=0, **TEXT)
        draw_rows(figure, rows, top + HEADING, scores is not None)
        top += HEADING + ROW * len(rows)
    return set_layout(figure, top + 8, 1, top + 8)


class Bar(NamedTuple):
    """A bar: its text, its probability, whether it is marked, and the indentation of the text in levels."""

    text: str
    score: float
    is_marked: bool
    indent: int = 0


def draw_rows(figure: go.Figure, rows: list[Bar], top: int, with_numbers: bool) -> None:
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


def node_rows(tree: Any, scores: list[float] | None, chosen: set[int]) -> go.Figure:
    """Draw one node per row, with a bar for its probability. Of many nodes, only the most probable are shown.

    No node is more probable than its parent, so the parents of the shown nodes are shown too. The chosen nodes are marked.
    """
    known = scores or [0.0] * tree.num_nodes
    order = sorted(tree.reading_order, key=lambda node: (node not in chosen, -known[node], tree.levels[node]))
    count = TREE_ROWS if len(order) > TREE_ROWS + 1 else len(order)  # the last row is a node, or all others
    shown, others = set(order[:count]), order[count:]
    rows = [
        Bar(
            ("✓ " if node in chosen else "") + plotly_text(tree.labels[node]),
            known[node],
            node in chosen,
            tree.levels[node] - 1,
        )
        for node in tree.reading_order
        if node in shown
    ]
    figure = go.Figure()
    draw_rows(figure, rows, 0, scores is not None)
    if others:
        most = f", each at most {percent(max(known[node] for node in others))}" if scores else ""
        figure.add_annotation(text=f"{len(others):,} others{most}", y=ROW * (TREE_ROWS + 0.5), x=0, **TEXT)
    height = ROW * min(tree.num_nodes, TREE_ROWS + 1) + 8
    return set_layout(figure, height, 1, height)


def icicle(tree: Any, scores: list[float] | None, chosen: set[int]) -> go.Figure:
    """Draw the taxonomy from the roots at the left to the leaves at the right. The height of a node is its probability.

    Without scores, all leaves have the same height. The chosen nodes are always shown.
    """
    scores = scores or [len(tree.leaves_at_or_below[node]) / tree.num_leaves for node in range(tree.num_nodes)]
    boxes = list(lay_out(tree, scores, chosen, -1, 0, 0.0))
    rights = [tree.depth if box.is_leaf else box.level + 1 for box in boxes]  # a leaf reaches to the right edge
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
    figure = set_layout(figure, min(130 + 26 * tree.num_leaves, 440), tree.depth, 1)
    return figure.update_layout(uniformtext={"minsize": 8, "mode": "hide"})


class Box(NamedTuple):
    """A box of an icicle: level from 0, lower end, text, probability, and whether nothing is drawn below the node."""

    level: int
    low: float
    text: str
    score: float
    is_leaf: bool


def lay_out(tree: Any, scores: list[float], chosen: set[int], parent: int, level: int, low: float) -> Iterator[Box]:
    """Yield the boxes of an icicle below a node, the first from ``low`` up."""
    below = sorted(tree.children(parent), key=lambda node: -scores[node])
    others = {node for node in below if scores[node] < MIN_SHARE and node not in chosen}
    for node in below:
        if node not in others:
            yield Box(level, low, plotly_text(tree.labels[node]), scores[node], node < tree.num_leaves)
            yield from lay_out(tree, scores, chosen, node, level + 1, low)
            low += scores[node]
    if others:
        rest = sum(scores[node] for node in below if node in others)
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


def words(text: str, explanation: Explanation, unit: Unit) -> str:
    """Render a text with its words coloured by their weights, and the largest weights."""
    # ── The text: coloured words, and the end that was not read ──
    largest = max((abs(word["weight"]) for word in explanation["words"]), default=0.0)
    scale = max(largest, 0.005 * unit.slope)
    parts, position = [], 0
    for word in explanation["words"]:
        parts.append(escape_html(text[position : word["start"]]))
        strength = abs(word["weight"]) / scale
        escaped = escape_html(text[word["start"] : word["end"]])
        if strength >= 0.08:
            kind = "for" if word["weight"] > 0 else "against"
            title = f"{unit.format(word['weight'])} {unit.name}"
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
    warning = "" if largest >= 0.001 * unit.slope else f"<p class='note'>No word changes {unit.least} or more.</p>"
    if abs(explanation["error"]) > 0.1 * unit.slope:
        warning = "<p class='note warning'>The error is large, so the weights are unreliable.</p>"
    score, blank_score, error = explanation["score"], explanation["blank_score"], explanation["error"]
    difference = sum(word["weight"] for word in explanation["words"]) + explanation["rest"] - error
    share = f", {abs(error / difference):.1%} of the difference" if abs(difference) >= 0.005 * unit.slope else ""
    ranked = sorted(explanation["words"], key=lambda word: -word["weight"])
    best = [word for word in ranked if word["weight"] > 0][:8]
    worst = [word for word in ranked[::-1] if word["weight"] < 0][:8]
    return panel(
        f"<h3>Words for and against {name_html(explanation['label'])}</h3>"
        f"<p class='note'>The probability is {percent(blank_score)} for a blank text of this length, and <b>{percent(score)}</b> "
        f"for this text. The weights of words and special tokens, in {unit.long_name}, add up to the difference, {unit.format(difference)}, with a "
        f"convergence error of {unit.format(error)}{share}.</p>{warning}"
        f"<p class='legend'><span class='w for' style='--s:.8'>raises</span> <span class='w against' style='--s:.8'>lowers</span> "
        f"the probability{' · <span class=unread>grey: not read</span>' if unread else ''}</p>"
        f"<div class='text' dir='auto' tabindex='0' aria-label='The text with the weights of its words'>{''.join(parts)}</div>"
        f"<div class='ranked'>{ranking(f'Raise the probability most, in {unit.name}', best, unit)}"
        f"{ranking(f'Lower the probability most, in {unit.name}', worst, unit)}</div>"
        "<p class='note'>Integrated gradients over the encoder’s word embeddings and, where the model has one, its lexical head. "
        "A weight shows the effect of a word on the model. It is not medical evidence.</p>"
    )


def ranking(title: str, ranked: list[dict], unit: Unit) -> str:
    """Render a table of words and their weights."""
    rows = heading_rows((word["word"], unit.format(word["weight"])) for word in ranked)
    return f"<table><caption>{title}</caption><tbody>{rows or '<tr><td colspan=2>none</td></tr>'}</tbody></table>"


def heading_rows(pairs: Iterable[tuple[str, str]]) -> str:
    """Render the rows of a table, each with a heading and a cell."""
    return "".join(f"<tr><th scope='row'>{name_html(key)}</th><td>{name_html(value)}</td></tr>" for key, value in pairs)


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
    """Render rows that were classified: the beginnings of their texts, their predicted nodes and their prediction sets."""

    def labels(record: dict[str, Any]) -> str:
        pairs = zip(record["labels"], record["scores"], strict=True)
        return "; ".join(f"{name_html(label)} {percent(score)}" for label, score in pairs) or "no label"

    return grid(
        {
            "line": record["line"],
            "text": shorten(record["text"]),
            "labels": labels(record),
            **({"p-value": percent(record["p_value"])} if "p_value" in record else {}),
            "prediction set": join_names([*map(name_html, record.get("prediction_set", ()))], "; ") or "–",
        }
        for record in records
    )


def shorten(text: str) -> str:
    return name_html(text if len(text) <= 160 else text[:159] + "…")


def problems(records: list[dict[str, Any]]) -> str:
    """Render rows that were not classified, by line."""
    rows = ({"line": record["line"], "reason": escape_html(record["problem"])} for record in records[:PROBLEMS])
    more = f"<p class='note'>and {len(records) - PROBLEMS:,} more</p>" if len(records) > PROBLEMS else ""
    return grid(rows, "None.") + more


def grid(rows: Iterable[dict[str, Any]], empty: str = "The rows that are classified are shown here.") -> str:
    """Render a table from cells of HTML by heading, or a note if it is empty. On a narrow page its rows are blocks."""
    rows = list(rows)
    if not rows:
        return f"<p class='note grid-empty'>{empty}</p>"
    top = "".join(f"<th scope='col'>{head}</th>" for head in rows[0])
    cells = ("".join(f"<td data-head='{head}'>{cell}</td>" for head, cell in row.items()) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<table class='grid'><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


# ── The model ────────────────────────────────────────────────────────────────────────────────────────────────────────


def card_parts(card: str) -> tuple[str, str]:
    """Split a model card into its most important sections and the rest, as Markdown.

    The front matter, comments, pictures and the section on loading the model are dropped.
    """
    body = re.sub(r"\A---\r?\n.*?\r?\n---\r?\n|<!--.*?-->|!\[[^\]]*\]\([^)]*\)", "", card, flags=re.DOTALL)
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
    return f"<table class='facts'><caption class='hidden'>The model</caption><tbody>{heading_rows(known.items())}</tbody></table>"


# ── Head and foot ─────────────────────────────────────────────────────────────────────────────────────────────────


MASTHEAD = (
    "<header><h1>Medical text, sorted into a taxonomy</h1>"
    f"<p class='device' role='note'>{NOT_A_DEVICE} For research.</p></header>"
)
FOOTER = f"<footer><p>{NOT_A_DEVICE} What you send is not logged or shared. Files and results are deleted within ten minutes.</p></footer>"
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
