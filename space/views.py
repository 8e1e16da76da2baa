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
from collections.abc import Iterable, Iterator
from html import escape
from typing import Any

import plotly.graph_objects as go
from attribution import Explanation
from classification import Classification

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#9AA5B1"
BARS = 6  # of a level
LEVELS = 4  # with bars; deeper ones are in the icicle
HEADING, ROW = 34, 27  # pixels
TEXT = {"xanchor": "left", "xshift": 3, "yanchor": "middle", "align": "left", "showarrow": False}
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


def bars_height(widths: list[int]) -> int:
    """Pixels for the bars of a taxonomy whose levels have so many nodes."""
    return sum(HEADING + ROW * min(width, BARS + 1) for width in widths[:LEVELS]) + 8


def bars(levels: list[dict[str, float]], path: list[str]) -> go.Figure:
    """Probability bars, level by level, those of the path in blue.

    Args:
        levels: as in a `Classification`; with probabilities of 0, bars to be filled.
        path: labels of the nodes to mark.
    """
    shown = levels[:LEVELS]
    height = bars_height([len(level) for level in levels])
    figure = go.Figure()
    top = 0.0
    for depth, level in enumerate(shown, start=1):
        order = sorted(level, key=lambda node: -level[node])
        rows = [(label(node), level[node], node in path) for node in order[:BARS]]
        if len(order) > BARS:
            rows.append((f"{len(order) - BARS:,} others", sum(level[node] for node in order[BARS:]), False))
        figure.add_annotation(text=f"<b>Level {depth}</b>", y=top + 20, x=0, **TEXT)
        figure.add_bar(
            x=[score for _, score, _ in rows],
            y=[top + HEADING + ROW * (i + 0.5) for i in range(len(rows))],
            width=ROW - 5,
            orientation="h",
            opacity=0.45,
            marker={"color": [BLUE if marked else GREY for *_, marked in rows]},
            hovertext=[f"{text}: {percent(score)}" for text, score, _ in rows],
            hoverinfo="text",
        )
        for i, (text, score, _) in enumerate(rows):
            written = f"{text}  <b>{percent(score)}</b>" if path else text
            figure.add_annotation(text=written, y=top + HEADING + ROW * (i + 0.5), x=0, **TEXT)
        top += HEADING + ROW * len(rows)
    figure.update_xaxes(range=[0, 1], fixedrange=True, visible=False)
    figure.update_yaxes(range=[height, 0], fixedrange=True, visible=False)
    return dress(figure, height).update_layout(bargap=0, barmode="overlay")


def icicle(levels: list[dict[str, float]], parents: dict[str, str], path: list[str], height: int) -> go.Figure:
    """The taxonomy, each node as tall as it is probable, from the roots at the left to the leaves at the right.

    Args:
        levels: as in a `Classification`.
        parents: of each label; of a root, the empty text.
        path: labels of the nodes to mark.
    """
    scores = {node: score for level in levels for node, score in level.items()}
    children: dict[str, list[str]] = {}
    for node, parent in parents.items():
        children.setdefault(parent, []).append(node)
    boxes = list(lay_out(children, scores, set(path), "", 0, 0.0))
    dark = [score > 0.45 for *_, score, _ in boxes]
    figure = go.Figure(
        go.Bar(
            # a leaf reaches to the right edge
            x=[(level + (len(levels) if ends else level + 1)) / 2 for level, _, _, _, ends in boxes],
            width=[(len(levels) if ends else level + 1) - level for level, _, _, _, ends in boxes],
            base=[low for _, low, _, _, _ in boxes],
            y=[score for _, _, _, score, _ in boxes],
            text=[f"{text} {percent(score)}" for _, _, text, score, _ in boxes],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            textfont={"color": ["#FFFFFF" if is_dark else "#1B2A3A" for is_dark in dark], "size": 13},
            hovertext=[f"{text}: {percent(score)}" for _, _, text, score, _ in boxes],
            hoverinfo="text",
            marker={"color": [shade(score) for *_, score, _ in boxes], "line": {"width": 1.5, "color": "#FFFFFF"}},
        )
    )
    figure.update_xaxes(range=[0, len(levels)], visible=False, fixedrange=True)
    figure.update_yaxes(range=[1, 0], visible=False, fixedrange=True)
    return dress(figure, height).update_layout(uniformtext={"minsize": 8, "mode": "hide"})


def lay_out(
    children: dict[str, list[str]], scores: dict[str, float], path: set[str], parent: str, level: int, low: float
) -> Iterator[tuple[int, float, str, float, bool]]:
    """Boxes of an icicle below a node: level from 0, lower end, text, probability, and whether nothing is below it.

    Args:
        low: where the first of them begins.
    """
    below = sorted(children.get(parent, []), key=lambda node: -scores[node])
    others = [node for node in below if scores[node] < LEAST_SHARE and node not in path]
    for node in below:
        if node not in others:
            yield level, low, label(node), scores[node], node not in children
            yield from lay_out(children, scores, path, node, level + 1, low)
            low += scores[node]
    if others:
        rest = sum(scores[node] for node in others)
        yield level, low, f"{len(others):,} other{'s' if len(others) > 1 else ''}", rest, True


def icicle_height(leaves: int) -> int:
    """Pixels for the icicle of a taxonomy with so many leaves."""
    return round(min(130 + 26 * leaves, 440))


def shade(score: float) -> str:
    """From light to dark blue, by probability."""
    light, dark = (220, 232, 243), (0, 92, 150)
    return "#" + "".join(f"{round(a + (b - a) * min(max(score, 0), 1)):02X}" for a, b in zip(light, dark, strict=True))


def dress(figure: go.Figure, height: int) -> go.Figure:
    return figure.update_layout(
        height=height,
        autosize=True,
        margin={"l": 0, "r": 0, "t": 0, "b": 0},
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
    nothing = "" if most >= 0.001 else "<p class='note'>No word moves this probability by as much as 0.1 points.</p>"
    if abs(found["error"]) > 0.1:
        nothing = (
            "<p class='note cut'>The error is large: the probability jumps between a blank text and this one. Take the weights "
            "as a hint at most.</p>"
        )
    difference = found["score"] - found["blank_score"]
    share = f", {abs(found['error'] / difference):.1%} of the difference" if abs(difference) >= 0.005 else ""
    ranked = sorted(found["words"], key=lambda word: -word["weight"])
    best = [word for word in ranked if word["weight"] > 0][:8]
    worst = [word for word in ranked[::-1] if word["weight"] < 0][:8]
    return panel(
        f"<h3>Words for and against {name(found['label'])}</h3>"
        f"<p class='note'>Of a blank text of this length the model says {percent(found['blank_score'])}, of this text "
        f"<b>{percent(found['score'])}</b>. The words’ weights, in percentage points, add up to that difference, "
        f"{points(difference)}. The sum is off by {points(found['error'])} (convergence error{share}).</p>{nothing}"
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


def note(text: str) -> str:
    """A line beside the progress, whose place is kept while there is none."""
    return f"<p class='note ended' role='status' aria-live='polite'>{plain(text)}</p>"


PROBLEMS = 200  # shown


def preview(records: list[dict[str, Any]]) -> str:
    """Rows that were classified, with the beginnings of their texts."""
    heads = ("line", "text", "most probable class", "probability", "answer for the coverage")
    rows = (
        (
            record["line"],
            name(record["text"] if len(record["text"]) <= 160 else record["text"][:159] + "…"),
            name(record["predicted"]),
            percent(record["probability"]),
            " or ".join(name(node) for node in record["answer"] or []) or "–",
        )
        for record in records
    )
    return grid(heads, rows, "The rows that are classified are shown here.")


def problems(found: list[dict[str, Any]]) -> str:
    """Rows that were not classified, by line."""
    rows = ((one["line"], plain(one["problem"])) for one in found[:PROBLEMS])
    more = f"<p class='note'>and {len(found) - PROBLEMS:,} more</p>" if len(found) > PROBLEMS else ""
    return grid(("line", "reason"), rows, "None.") + more


def grid(heads: tuple[str, ...], rows: Iterable[tuple[Any, ...]], empty: str) -> str:
    """A table; on a narrow page, its rows as blocks. The cells are HTML already."""
    body = "".join(
        "<tr>" + "".join(f"<td data-head='{head}'>{cell}</td>" for head, cell in zip(heads, row, strict=True)) + "</tr>"
        for row in rows
    )
    if not body:
        return f"<p class='note grid-empty'>{empty}</p>"
    top = "".join(f"<th scope='col'>{head}</th>" for head in heads)
    return f"<table class='grid'><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


# ── the model ────────────────────────────────────────────────────────────────────────────────────────────────────────


FIRST = ("results", "limits", "licence", "license")


def card_parts(card: str) -> tuple[str, str]:
    """A model card as Markdown: what a reader of this page wants first, and the rest.

    Left out are the front matter, comments, pictures (they are files of the checkpoint), and how to load the model.
    """
    body = re.sub(r"\A---\r?\n.*?\r?\n---\r?\n", "", card, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", body)
    introduction, *sections = re.split(r"(?m)^(?=## )", body)
    sections = [section for section in sections if not section.lower().startswith("## use")]
    first = [section for section in sections if section[3:].lower().startswith(FIRST)]
    introduction = re.sub(r"(?m)\A\s*# .*$", "", introduction)
    return "".join([introduction, *first]).strip(), "".join(s for s in sections if s not in first).strip()


def licence(card: str) -> str:
    """The licence that a model card's front matter names."""
    found = re.search(r"(?m)\A---\r?\n(?:.*\r?\n)*?license:[ \t]*(\S+)", card)
    return found[1] if found else "not given"


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
    return f"<footer><p>{NOT_A_DEVICE} What you send is not logged, stored or shared: it is classified, and forgotten.</p></footer>"


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
