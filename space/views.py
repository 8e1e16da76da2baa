"""What the page shows of an answer, as HTML and as plotly figures.

Worth knowing:

1. Whatever comes from the user or the model goes through `plain` (HTML) or `label` (plotly, which reads some HTML in texts),
   and nothing else makes markup.
2. Colours are from Okabe and Ito's palette, which colour-blind readers tell apart; each also has a second sign: an
   underline, a plus or minus, a number.
3. Heights follow from the taxonomy, never from the answer, so that nothing moves when an answer arrives.
4. Of many nodes the most probable are shown, and the others as one.
"""

import math
import re
from html import escape
from typing import Any

import plotly.graph_objects as go
from attribution import Explanation
from classification import Classification

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#9AA5B1"
BARS = 6  # of a level
LEVELS = 4  # with bars; deeper ones are in the icicle
LEAST_SHARE = 0.01  # of an icicle: nodes below stand together as "others"
LONGEST_LABEL = 34
NOT_A_DEVICE = "Not a medical device. Not for diagnosis, treatment or any decision about a patient."
# braces would be read by gradio's HTML component, which fills templates in the browser
BRACES = str.maketrans({"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;"})
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
TURNS = re.compile("[\u202a-\u202e\u2066-\u2069\u200e\u200f]")  # characters that turn what follows around


def plain(value: Any) -> str:
    """A text as HTML that shows just that text."""
    return escape(CONTROLS.sub("\ufffd", str(value))).translate(BRACES)


def label(name: str, longest: int = LONGEST_LABEL) -> str:
    """A name as plotly shows just that name, shortened."""
    name = TURNS.sub("", CONTROLS.sub("\ufffd", name))
    return escape(name if len(name) <= longest else name[: longest - 1] + "…", quote=False).replace("$", "&#36;")


def percent(share: float) -> str:
    """A probability in words that never say 0 % or 100 % of what is neither."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{100 * share:.1f} %"


def points(weight: float) -> str:
    """A difference of probabilities."""
    return f"{'−' if weight < 0 else '+'}{abs(100 * weight):.1f}"


# ── one text ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def result(found: Classification, coverage: float | None) -> str:
    """The predicted class, its certainty, its path, the answer for the coverage asked, and what was not read."""
    path = "".join(f"<li>{name(node['label'])} <b>{percent(node['score'])}</b></li>" for node in found["path"])
    if coverage is None or found["answer"] is None:
        answer = "This model was trained without validation rows, so it gives no answer for a coverage."
    else:
        names = " or ".join(f"<b>{name(node['label'])}</b>" for node in found["answer"])
        answer = f"For {coverage:.0%} coverage: {names}"
    if found["characters_read"] < found["characters"]:
        unread = found["characters"] - found["characters_read"]
        cut = (
            f"<p class='note cut'>The end was cut: the model read the first {found['characters_read']:,} of "
            f"{found['characters']:,} characters; {unread:,} ({unread / found['characters']:.0%}) were not read.</p>"
        )
    else:
        cut = "<p class='note'>The whole text was read.</p>"
    return panel(
        f"<p class='kicker'>Most probable class</p><p class='class'>{name(found['label'])}</p>"
        f"<p class='certainty'><span class='meter' aria-hidden='true'><span style='width:{100 * found['score']:.1f}%'></span>"
        f"</span>{percent(found['score'])} certain</p><ol class='path' aria-label='Path through the taxonomy'>{path}</ol>"
        f"<p class='answer'>{answer}</p>{cut}"
    )


def waiting() -> str:
    """In place of a result, before there is one."""
    return panel(
        "<p class='kicker'>Most probable class</p><p class='class none'>–</p>"
        "<p class='note'>Paste an abstract, or choose an example.</p>"
    )


def refusal(message: str) -> str:
    """In place of a result: why there is none."""
    return panel(f"<p class='kicker'>Not classified</p><p class='refused'>{plain(message)}</p>", role="alert")


def panel(content: str, role: str = "status") -> str:
    return f"<section class='panel' role='{role}' aria-live='polite'>{content}</section>"


def name(text: str) -> str:
    return f"<bdi>{plain(text)}</bdi>"


def bars_height(depth: int, widths: list[int]) -> int:
    """Pixels for the bars of a taxonomy whose levels have so many nodes."""
    return sum(46 + 27 * min(width, BARS + 1) for width in widths[: min(depth, LEVELS)]) + 10


def bars(levels: list[dict[str, float]], path: list[str]) -> go.Figure:
    """Probability bars, level by level, those of the path in blue.

    Args:
        levels: as in a `Classification`; with probabilities of 0, bars to be filled.
        path: labels of the nodes to mark.
    """
    shown = levels[:LEVELS]
    widths = [len(level) for level in levels]
    height = bars_height(len(levels), widths)
    figure = go.Figure()
    top = 1.0
    empty = not path
    for depth, level in enumerate(shown, start=1):
        axis = "" if depth == 1 else str(depth)
        order = sorted(level, key=lambda node: -level[node])
        rows = [(label(node), level[node], node in path) for node in order[:BARS]]
        if len(order) > BARS:
            rest = sum(level[node] for node in order[BARS:])
            rows.append((f"{len(order) - BARS:,} others", rest, False))
        places = [f"{i}" for i in range(len(rows))]
        figure.add_bar(
            x=[score for _, score, _ in rows],
            y=places,
            orientation="h",
            xaxis="x",
            yaxis=f"y{axis}",
            marker={"color": [BLUE if marked else GREY for *_, marked in rows]},
            text=["" if empty else f"{'<b>' if marked else ''}{text}  {percent(score)}{'</b>' if marked else ''}" for text, score, marked in rows],
            textposition="none",
            hovertext=[f"{text}: {percent(score)}" for text, score, _ in rows],
            hoverinfo="text",
            cliponaxis=False,
        )
        share = (46 + 27 * len(rows)) / height
        low, high = top - share + 8 / height, top - 38 / height
        figure.update_layout(
            {
                f"yaxis{axis}": {
                    "domain": [max(low, 0), high],
                    "range": [len(rows) - 0.5, -0.5],
                    "showticklabels": False,
                    "fixedrange": True,
                    "zeroline": False,
                    "showgrid": False,
                }
            }
        )
        figure.add_annotation(
            text=f"<b>Level {depth}</b>", x=0, xanchor="left", xref="paper", y=top, yanchor="top", yref="paper", showarrow=False
        )
        for place, (text, score, marked) in enumerate(rows):
            written = text if empty else f"{text}  <b>{percent(score)}</b>"
            figure.add_annotation(
                text=written, x=0, xanchor="left", xref="x", xshift=3, y=place, yref=f"y{axis}", showarrow=False, align="left", yshift=0,
                font={"size": 12},
            )
        top -= share
    figure.update_traces(opacity=0.45, width=0.82)
    figure.update_xaxes(range=[0, 1], fixedrange=True, visible=False)
    return dress(figure, height)


def icicle(levels: list[dict[str, float]], parents: dict[str, str], path: list[str], height: int) -> go.Figure:
    """The taxonomy, each node as tall as it is probable, from the roots at the left to the leaves at the right.

    Args:
        levels: as in a `Classification`.
        parents: of each label; of a root, the empty text.
        path: labels of the nodes to mark.
    """
    scores = {node: score for level in levels for node, score in level.items()}
    shown: dict[str, tuple[str, str, float, float]] = {}  # id: label, parent's id, share, score
    children: dict[str, list[str]] = {}
    for node, parent in parents.items():
        children.setdefault(parent, []).append(node)
    queue = [("", "")]
    while queue:
        parent, place = queue.pop(0)
        below = sorted(children.get(parent, []), key=lambda node: -scores.get(node, 0))
        kept = [node for node in below if scores.get(node, 0) >= LEAST_SHARE or node in path]
        for node in kept:
            shown[f"n:{node}"] = (label(node), place, scores[node], scores[node])
            queue.append((node, f"n:{node}"))
        others = [node for node in below if node not in set(kept)]
        rest = sum(scores.get(node, 0) for node in others)
        if others and rest > 0 and kept:
            shown[f"o:{parent}"] = (f"{len(others):,} other{'s'[: len(others) > 1]}", place, rest, rest)
    ids = ["root", *shown]
    whole = sum(share for _, place, share, _ in shown.values() if place == "")
    figure = go.Figure(
        go.Icicle(
            ids=ids,
            labels=["all", *(entry[0] for entry in shown.values())],
            parents=["", *(entry[1] or "root" for entry in shown.values())],
            values=[whole, *(entry[2] for entry in shown.values())],
            branchvalues="remainder" if not shown else "total",
            text=["", *(percent(entry[3]) for entry in shown.values())],
            hovertext=["all texts", *(f"{entry[0]}: {percent(entry[3])}" for entry in shown.values())],
            hoverinfo="text",
            textinfo="label+text",
            tiling={"orientation": "h", "pad": 1},
            pathbar={"visible": False},
            sort=False,
            marker={
                "colors": ["#E8EDF2", *(shade(entry[3]) for entry in shown.values())],
                "line": {"width": [0, *(2.5 if i[2:] in path and i[0] == "n" else 0.5 for i in shown)], "color": "#1B2A3A"},
            },
            textfont={"color": ["#1B2A3A", *("#FFFFFF" if entry[3] > 0.45 else "#1B2A3A" for entry in shown.values())]},
        )
    )
    return dress(figure, height)


def icicle_height(leaves: int) -> int:
    """Pixels for the icicle of a taxonomy with so many leaves."""
    return round(min(170 + 22 * leaves, 420))


def shade(score: float) -> str:
    """From light to dark blue, by probability."""
    light, dark = (220, 232, 243), (0, 92, 150)
    return "#" + "".join(f"{round(a + (b - a) * min(max(score, 0), 1)):02X}" for a, b in zip(light, dark, strict=True))


def dress(figure: go.Figure, height: int) -> go.Figure:
    return figure.update_layout(
        height=height,
        autosize=True,
        margin={"l": 4, "r": 4, "t": 4, "b": 4},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        showlegend=False,
        font={"family": "system-ui, sans-serif", "size": 13},
        hoverlabel={"bgcolor": "#1B2A3A", "font": {"color": "#FFFFFF"}},
    )


# ── words ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def no_words() -> str:
    """In place of the words, before they were asked for."""
    return panel("<p class='note'>Classify a text, choose a node, and press “Show the words”.</p>")


def words(text: str, found: Explanation) -> str:
    """A text with its words coloured by their weights, and what these weights are."""
    most = max((abs(word["weight"]) for word in found["words"]), default=0.0)
    scale = max(most, 0.005)
    parts, at = [], 0
    for word in found["words"]:
        parts.append(plain(text[at : word["start"]]))
        strength = abs(word["weight"]) / scale
        written = plain(text[word["start"] : word["end"]])
        if strength >= 0.08:
            kind = "for" if word["weight"] > 0 else "against"
            title = f"{points(word['weight'])} points"
            parts.append(
                f"<span class='w {kind}' style='--s:{math.sqrt(strength):.2f}' title='{title}' "
                f"data-weight='{word['weight']:.6f}'>{written}</span>"
            )
        else:
            parts.append(written)
        at = word["end"]
    parts.append(plain(text[at : found["characters_read"]]))
    unread = text[found["characters_read"] :]
    if unread:
        parts.append(f"<span class='unread' title='not read by the model'>{plain(unread)}</span>")
    difference = found["score"] - found["blank_score"]
    share = f", {abs(found['error'] / difference):.0%} of the difference" if abs(difference) >= 0.005 else ""
    ranked = sorted(found["words"], key=lambda word: -word["weight"])
    best = [word for word in ranked if word["weight"] > 0][:8]
    worst = [word for word in ranked[::-1] if word["weight"] < 0][:8]
    return panel(
        f"<h3>Words for and against {name(found['label'])}</h3>"
        f"<p class='note'>Of a blank text of this length the model says {percent(found['blank_score'])}, of this text "
        f"<b>{percent(found['score'])}</b>. The words’ weights, in percentage points, add up to that difference, "
        f"{points(difference)}. The sum is off by {points(found['error'])} (convergence error{share}).</p>"
        f"<p class='legend'><span class='w for' style='--s:.8'>raises</span> <span class='w against' style='--s:.8'>lowers</span> "
        f"the probability{' · <span class=unread>grey: not read</span>' if unread else ''}</p>"
        f"<div class='text' dir='auto' tabindex='0' aria-label='The text with its words weighed'>{''.join(parts)}</div>"
        f"<div class='ranked'>{ranking('Raise it most', best)}{ranking('Lower it most', worst)}</div>"
        "<p class='note'>Integrated gradients over the encoder’s word embeddings and, where the model has one, its lexical head. "
        "A weight says what the model reacted to. It does not say that the word is a medical reason.</p>"
    )


def ranking(title: str, some: list[dict]) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{name(word['word'])}</th><td>{points(word['weight'])}</td></tr>" for word in some
    )
    rows = rows or "<tr><td colspan='2'>none</td></tr>"
    return f"<table><caption>{title}, in points</caption><tbody>{rows}</tbody></table>"


# ── a file ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def progress(done: int, total: int, problems: int, state: str) -> str:
    """How far a file is."""
    text = f"{state} {done:,} of {total:,} rows" if total else state
    if problems:
        text += f"; {problems:,} could not be read"
    return (
        f"<section class='panel run' role='status' aria-live='polite'><p>{plain(text)}</p>"
        f"<progress max='{max(total, 1)}' value='{done}' aria-label='rows done'></progress></section>"
    )


# ── the model ────────────────────────────────────────────────────────────────────────────────────────────────────────


def card_text(card: str) -> str:
    """A model card without its front matter, comments, pictures, and the sections on how to load it."""
    body = re.sub(r"\A---\r?\n.*?\r?\n---\r?\n", "", card, flags=re.DOTALL)
    body = re.sub(r"<!-- use: .*?<!-- /use -->", "", body, flags=re.DOTALL)
    body = re.sub(r"(?m)^#+ Use[ \t]*\r?\n(?=\s*(^#|\Z))", "", body)
    body = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", body)
    return re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL).strip()


def facts(known: dict[str, str]) -> str:
    """A table of what a model is."""
    rows = "".join(f"<tr><th scope='row'>{plain(key)}</th><td>{name(value)}</td></tr>" for key, value in known.items())
    return f"<table class='facts'><caption class='hidden'>The model</caption><tbody>{rows}</tbody></table>"


# ── around all of it ─────────────────────────────────────────────────────────────────────────────────────────────────


def masthead() -> str:
    return (
        "<header><h1>Medical text, sorted into a taxonomy</h1>"
        f"<p class='device' role='note'>{NOT_A_DEVICE} For research.</p></header>"
    )


def footer() -> str:
    return (
        f"<footer><p>{NOT_A_DEVICE} What you send is not logged, stored or shared: it is classified, and forgotten.</p></footer>"
    )


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
