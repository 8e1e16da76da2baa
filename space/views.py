"""Render results as HTML.

Worth knowing:

1. All strings of the user or the model go through `escape_html`.
2. Colours are from the palette of Okabe and Ito, which colour-blind readers can distinguish. Each
   colour has a second sign: an underline, a mark, a name or a number.
3. A button with ``data-sets`` puts its ``data-value`` into the hidden box of that id, see `HEAD`.
   So a press on a node or a page is an event of gradio.
4. The tree is the same for both forms of label. Where nodes have thresholds, probabilities of
   siblings do not add up.
"""

import math
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import Any, NamedTuple

from attribution import LOG_ODDS_SLOPE, Explanation
from classification import Classification, Node, Prediction

# nodes of a tree that are rendered, the folded ones included; more only if they are marked
ROWS = 300
OPEN = 40  # most nodes of a tree that are not folded
UNLIKELY = 0.02  # nodes below this probability are folded, unless they are marked
MAX_FULL = 6  # most predicted nodes that are shown with path, description and bar
MAX_SHOWN = 20  # most nodes shown of a set, or of a prediction in short
RANKED = 10  # words in the table of the largest weights
MAX_CLASSES = 12  # most bars in the summary of a file
PAGE = 20  # rows of a file that are shown at once
SHOWN_CHARACTERS = 200  # of a row's text
STRANGE = 0.05  # the p-value up to which a text is shown as strange
UNCERTAIN = 0.5  # the prediction of a row is uncertain below this probability
PROBLEMS = 200  # most that are shown
SORT_BUTTON = "<button type='button' data-sets='page' data-value='1 {0}'>{0}</button>"
# what the rows of a file are sorted by, under a heading
SORTED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "line": lambda record: record["line"],
    "text": lambda record: record["text"].casefold(),
    "prediction": lambda record: (record["labels"], -(record["score"] or 0)),
    "set": lambda record: len(record.get("prediction_set", [])),
}
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#9AA5B1")
KICKER = "<p class='kicker'>Prediction</p>"
NOT_A_DEVICE = "Not a medical device. Not for diagnosis, treatment or any decision about a patient."
# the HTML component of gradio would fill braces as templates in the browser
BRACES = str.maketrans({"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;"})
CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def escape_html(value: Any) -> str:
    """Escape a text for HTML."""
    return escape(CONTROLS.sub("\ufffd", str(value))).translate(BRACES)


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

    def format(self, weight: float) -> str:
        return f"{'−' if weight < 0 else '+'}{abs(self.shown * weight):.{self.digits}f}"


PROBABILITY = Unit(1, 100, 1, "percentage points")
LOG_ODDS = Unit(LOG_ODDS_SLOPE, 1, 2, "log-odds")


# ── One text ──────────────────────────────────────────────────────────────────────────────────────


def result(tree: Any, classified: Classification, held: str) -> str:
    """Render the predicted nodes, each with its probability and the nodes above it, the prediction
    set, and the truncation.

    ``held`` is the HTML of `prediction_set`, or of the reason why there is none. The set of a
    strange text is not shown, because its guarantee is for other texts.
    """
    if is_strange(classified):
        reason = "" if "prediction_set" in classified else f"<p class='held'>{held}</p>"
        chips = join_first(
            [chip(tree, node["label"], node["score"]) for node in classified["labels"]]
        )
        return panel(
            f"{KICKER}<p class='class none'>Unlike the texts this model was trained on</p>"
            f"<p class='note'>{percent(classified['p_value'])} of the validation texts look "
            "as strange to the model. "
            f"Its prediction would be: {chips or 'no label'}</p>{reason}{truncation(classified)}"
        )
    nodes = classified["labels"][:MAX_FULL]
    others = classified["labels"][MAX_FULL:]
    shown = "".join(predicted(tree, node) for node in nodes)
    less = join_first([chip(tree, node["label"], node["score"]) for node in others])
    none = (
        "<p class='class none'>No label</p><p class='note'>No node of the taxonomy is probable "
        "enough.</p>"
    )
    shown = f"<div class='nodes'>{shown or none}</div>{less and f'<p>Also: {less}</p>'}"
    return panel(f"{KICKER}{shown}<p class='held'>{held}</p>{truncation(classified)}")


def is_strange(result: Mapping[str, Any]) -> bool:
    return result.get("p_value", 1) <= STRANGE


def predicted(tree: Any, node: Prediction) -> str:
    """Render a predicted node below the nodes above it, with its description and its
    probability.
    """
    *above, name = (tree.names[tree.id(step["label"])] for step in node["path"])
    path = (
        f"<p class='path'>{''.join(f'{name_html(one)} › ' for one in above)}</p>" if above else ""
    )
    described = (
        f"<p class='note'>{escape_html(node['description'])}</p>" if "description" in node else ""
    )
    return (
        f"<div>{path}<p class='class'>{name_html(name)}</p>{described}"
        f"<p class='certainty'>{bar(node['score'])}{percent(node['score'])} probability</p></div>"
    )


def bar(share: float, more: str = "") -> str:
    return (
        "<span class='bar' aria-hidden='true'><span "
        f"style='width:{100 * share:.1f}%'></span>{more}</span>"
    )


def prediction_set(tree: Any, guarantee: str, target: float, nodes: list[Node]) -> str:
    chips = join_first([chip(tree, node["label"], node["score"]) for node in nodes])
    return f"For {target:.0%} {guarantee}: {chips or 'no node'}"


def chip(tree: Any, label: str, score: float | None = None) -> str:
    """Render a node's label in the colour of the node. Its tooltip is the description."""
    number = "" if score is None else f" <b>{percent(score)}</b>"
    title = escape_html(tree.descriptions.get(label, ""))
    colour = COLOURS[tree.id(label) % len(COLOURS)]
    return (
        f"<span class='chip' title='{title}' style='--c:{colour}'>{name_html(label)}{number}</span>"
    )


def join_first(nodes: list[str]) -> str:
    """Join the HTML of nodes. Of more than `MAX_SHOWN`, the others are counted."""
    more = f" and {len(nodes) - MAX_SHOWN:,} more" if len(nodes) > MAX_SHOWN else ""
    return " ".join(nodes[:MAX_SHOWN]) + more


def truncation(classified: Classification) -> str:
    """Render how much of the text was read."""
    if not classified["truncated"]:
        return "<p class='note'>The whole text was read.</p>"
    tokens = classified["tokens"]
    unread = classified["tokens"] - classified["tokens_read"]
    return (
        f"<p class='note warning'>The text was truncated: of its {tokens:,} tokens, the "
        f"last {unread:,} "
        f"({percent(unread / tokens)}) were not read.</p>"
    )


def waiting() -> str:
    """Render the placeholder of a result."""
    return panel(
        f"{KICKER}<p class='class none'>–</p><p class='note'>Paste a text, and press "
        "“Classify”.</p>"
    )


def refusal(message: str, kicker: str = "Not classified") -> str:
    """Render a refusal in place of a result."""
    return panel(
        f"<p class='kicker'>{kicker}</p><p class='refused'>{escape_html(message)}</p>", role="alert"
    )


def panel(content: str, role: str = "status") -> str:
    return f"<section class='panel' role='{role}' aria-live='polite'>{content}</section>"


def name_html(text: str) -> str:
    return f"<bdi>{escape_html(text)}</bdi>"


# ── The tree ──────────────────────────────────────────────────────────────────────────────────────


class NodeResults(NamedTuple):
    """What the result of a text says about the nodes, by node id."""

    scores: list[float]
    predicted: set[int]  # with their ancestors
    in_set: set[int]
    # the least probability of a predicted node, or None where siblings compete
    thresholds: list[float] | None


def tree(taxonomy: Any, results: NodeResults | None = None) -> str:
    """Render the taxonomy as an indented list: with results siblings by probability, and each node
    as a button with its bar.

    Predicted nodes and those of the set are marked, and all rendered. At most `OPEN` nodes are not
    folded.
    """
    # ── Order: what is predicted, what is in the set, then by probability; without results, from
    # the roots down
    predicted = set[int]() if results is None else taxonomy.with_ancestors(results.predicted)
    marked = (
        predicted
        if results is None
        else taxonomy.with_ancestors(results.predicted | results.in_set)
    )
    place = {node: i for i, node in enumerate(taxonomy.reading_order)}

    def rank(node: int) -> tuple:
        return (0 if results is None else -results.scores[node], taxonomy.levels[node], place[node])

    order = sorted(place, key=lambda node: (node not in predicted, node not in marked, rank(node)))
    rendered = {*order[: max(ROWS, len(marked))]}
    if results is None:  # a small taxonomy as a whole
        opened = {
            node for node in rendered if taxonomy.num_nodes <= OPEN or taxonomy.levels[node] == 1
        }
    else:
        opened = {
            node for node in order[:OPEN] if node in marked or results.scores[node] >= UNLIKELY
        }

    # ── Branches: the likely children of a node, and a fold with the others ───────────────────────
    def branch(parent: int) -> str:
        def items(nodes: list[int]) -> str:
            return "".join(
                f"<li>{row(taxonomy, results, node)}{branch(node)}</li>" for node in nodes
            )

        children = sorted(taxonomy.children(parent), key=rank)
        others = [node for node in children if node not in opened]
        if len(others) == 1 and others[0] in rendered:
            others = []
        html = items([node for node in children if node not in others])
        if others:
            folded = [node for node in others if node in rendered]
            inner = items(folded)
            left_out = len(others) - len(folded)
            inner += f"<li class='note'>and {left_out:,} more</li>" if left_out else ""
            title = fold_title(results, others, beside_others=html != "")
            html += f"<li><details><summary>{title}</summary><ul>{inner}</ul></details></li>"
        return f"<ul>{html}</ul>" if html else ""

    return (
        f"<section class='panel tree'><h2>The taxonomy</h2>{legend(results)}{branch(-1)}</section>"
    )


def row(taxonomy: Any, results: NodeResults | None, node: int) -> str:
    """Render a node: its name and description, with results also its marks, its bar with the
    threshold, and its probability.
    """
    label = taxonomy.labels[node]
    description = taxonomy.descriptions.get(label)
    name = name_html(taxonomy.names[node]) + (
        f" <small>{escape_html(description)}</small>" if description else ""
    )
    if results is None:
        return f"<div class='node'><span class='name'>{name}</span></div>"
    is_predicted = node in results.predicted
    score = results.scores[node]
    marks = "<b role='img' aria-label='predicted:'>✓</b> " if is_predicted else ""
    marks += "<b role='img' aria-label='in the set:'>◆</b> " if node in results.in_set else ""
    tick = (
        f"<i style='left:{100 * results.thresholds[node]:.1f}%'></i>" if results.thresholds else ""
    )
    return (
        f"<button type='button' class='node{' predicted' * is_predicted}' data-sets='node' "
        f"data-value='{escape_html(label)}'>"
        f"<span class='name'>{marks}{name}</span>{bar(score, tick)}<span "
        f"class='share'>{percent(score)}</span></button>"
    )


def fold_title(results: NodeResults | None, nodes: list[int], beside_others: bool) -> str:
    """Return the title of folded siblings: their number, and the sum or the largest of their
    probabilities.
    """
    count = f"{len(nodes):,} {'other' if beside_others else 'node'}{'s' * (len(nodes) > 1)}"
    if results is None:
        return count
    scores = [results.scores[node] for node in nodes]
    if results.thresholds is None:
        return f"{count}, together {percent(sum(scores))}"
    return f"{count}, up to {percent(max(scores))}"


def legend(results: NodeResults | None) -> str:
    if results is None:
        return ""
    bar = "<span class='bar'><i></i></span>"
    signs = {
        "✓ predicted": results.predicted,
        "◆ in the prediction set": results.in_set,
        f"{bar} least probability of a predicted node": results.thresholds,
    }
    occurring = " · ".join(sign for sign, nodes in signs.items() if nodes)
    return (
        f"<p class='note'>{occurring}{'. ' * bool(occurring)}Press a node for the words that "
        "counted.</p>"
    )


# ── Words ─────────────────────────────────────────────────────────────────────────────────────────


def no_words() -> str:
    """Render the placeholder of an explanation."""
    return panel("<p class='note'>After a prediction, the words that counted stand here.</p>")


def words(text: str, explanation: Explanation, unit: Unit) -> str:
    """Render a text with its words coloured by their weights, and the largest weights."""
    # ── The text: coloured words, and the end that was not read ───────────────────────────────────
    largest = max((abs(word["weight"]) for word in explanation["words"]), default=0.0)
    scale = max(largest, 0.005 * unit.slope)
    parts = []
    position = 0
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
        parts.append(
            f"<span class='unread' title='not read by the model'>{escape_html(unread)}</span>"
        )

    # ── The warning, the error and the ranking ────────────────────────────────────────────────────
    warning = (
        ""
        if largest >= 0.001 * unit.slope
        else "<p class='note'>No word changes the probability notably.</p>"
    )
    if abs(explanation["error"]) > 0.1 * unit.slope:
        warning = "<p class='note warning'>The error is large, so the weights are unreliable.</p>"
    score = explanation["score"]
    blank_score = explanation["blank_score"]
    error = explanation["error"]
    difference = sum(word["weight"] for word in explanation["words"]) + explanation["rest"] - error
    ranked = sorted(explanation["words"], key=lambda word: -abs(word["weight"]))[:RANKED]
    pairs = [(name_html(word["word"]), unit.format(word["weight"])) for word in ranked]
    rows = "".join(
        f"<tr><th scope='row'>{word}</th><td>{weight}</td></tr>" for word, weight in pairs
    )
    return panel(
        f"<h3>Words for and against {name_html(explanation['label'])}</h3>"
        f"<p class='note'>The probability is {percent(blank_score)} for a blank text of "
        f"this length, and <b>{percent(score)}</b> "
        f"for this text. The weights of words and special tokens, in {unit.name}, add up to "
        f"the difference, {unit.format(difference)}, with a "
        f"convergence error of {unit.format(error)}.</p>{warning}"
        "<p class='note'><span class='w for' style='--s:.8'>raises</span> <span class='w "
        "against' style='--s:.8'>lowers</span> "
        f"the probability{' · <span class=unread>grey: not read</span>' if unread else ''}</p>"
        "<div class='text' dir='auto' tabindex='0' aria-label='The text with the weights "
        f"of its words'>{''.join(parts)}</div>"
        "<table class='ranked'><caption>Largest weights, in "
        f"{unit.name}</caption><tbody>{rows}</tbody></table>"
        "<p class='note'>Integrated gradients over the encoder’s word embeddings and, where "
        "the model has one, its lexical head. "
        "A weight shows the effect of a word on the model. It is not evidence.</p>"
    )


# ── A file ────────────────────────────────────────────────────────────────────────────────────────


def progress(done: int, total: int, problems: int, state: str) -> str:
    """Render the progress of a file."""
    text = f"{state} {done:,} of {total:,} rows" if total else state
    if problems:
        text += f"; {problems:,} could not be classified"
    return (
        f"<section class='panel run' role='status' aria-live='polite'><p>{escape_html(text)}</p>"
        f"<progress max='{max(total, 1)}' value='{done}' aria-label='rows "
        "done'></progress></section>"
    )


def summary(tree: Any, records: list[dict[str, Any]]) -> str:
    """Render what was predicted: the rows of each class as bars, and the shares of rows that are
    uncertain or truncated.
    """
    if not records:
        return ""
    counts = Counter(label for record in records for label in record["labels"])
    rows = [(chip(tree, label), count) for label, count in counts.most_common(MAX_CLASSES)]
    others = len(counts) - len(rows)
    rows += (
        [(f"{others:,} other classes", counts.total() - sum(count for _, count in rows))]
        if others
        else []
    )
    if empty := sum(not record["labels"] for record in records):
        rows.append(("no label", empty))
    bars = "".join(
        (
            "<li class='node'><span "
            f"class='name'>{name}</span>{bar(min(count / len(records), 1))}<span "
            f"class='share'>{count:,}</span></li>"
        )
        for name, count in rows
    )
    shares = {
        f"less than {UNCERTAIN:.0%} probable": sum(
            (record["score"] or 0) < UNCERTAIN for record in records
        ),
        "unlike the training texts": sum(map(is_strange, records)),
        "truncated": sum(record["truncated"] for record in records),
    }
    notes = " · ".join(
        f"{name}: <b>{percent(count / len(records))}</b>" for name, count in shares.items()
    )
    return (
        "<section class='panel'><ul class='counts' aria-label='Rows of each "
        f"class'>{bars}</ul><p class='note'>{notes}</p></section>"
    )


def table(tree: Any, records: list[dict[str, Any]], view: str = "1 line") -> str:
    """Render a page of the rows that were classified, and buttons to turn it and to sort.

    ``view`` is its number and a column.
    """
    number, _, column = view.partition(" ")
    if not number.isdecimal() or column not in SORTED:
        number = "1"
        column = "line"
    pages = max(1, math.ceil(len(records) / PAGE))
    page = min(max(int(number), 1), pages)
    shown = sorted(records, key=SORTED[column])[PAGE * (page - 1) : PAGE * page]
    rows = (table_row(tree, record) for record in shown)
    return grid(rows, heading=SORT_BUTTON) + pager(page, pages, column)


def table_row(tree: Any, record: dict[str, Any]) -> dict[str, Any]:
    """Return cells of HTML: where the text begins, its beginning, its predicted nodes, and its
    prediction set, folded.
    """
    pairs = zip(record["labels"], record["scores"], strict=True)
    held = record.get("prediction_set", [])
    chips = join_first([chip(tree, label) for label in held])
    strange = "unlike the training texts: " if is_strange(record) else ""
    text = (
        record["text"]
        if len(record["text"]) <= SHOWN_CHARACTERS
        else f"{record['text'][:SHOWN_CHARACTERS]}…"
    )
    return {
        "line": record["line"],
        "text": f"<span class='start'>{name_html(text)}</span>",
        "prediction": strange + (join_first([chip(tree, *pair) for pair in pairs]) or "no label"),
        "set": (
            f"<details><summary>{len(held):,} "
            f"node{'s' * (len(held) > 1)}</summary>{chips}</details>"
        )
        if held
        else "–",
    }


def pager(page: int, pages: int, column: str) -> str:
    if pages == 1:
        return ""

    def turn(name: str, number: int) -> str:
        disabled = "" if 1 <= number <= pages else " disabled"
        return (
            f"<button type='button' data-sets='page' data-value='{number} "
            f"{column}'{disabled}>{name}</button>"
        )

    where = f"<span role='status'>Page {page:,} of {pages:,}, by {column}</span>"
    return (
        "<nav class='pager' "
        f"aria-label='Pages'>{turn('‹ Previous', page - 1)}{where}{turn('Next ›', page + 1)}</nav>"
    )


def problems(records: list[dict[str, Any]]) -> str:
    """Render rows that were not classified, by line."""
    rows = (
        {"line": record["line"], "reason": escape_html(record["problem"])}
        for record in records[:PROBLEMS]
    )
    more = (
        f"<p class='note'>and {len(records) - PROBLEMS:,} more</p>"
        if len(records) > PROBLEMS
        else ""
    )
    return grid(rows, "None.") + more


def grid(
    rows: Iterable[dict[str, Any]],
    empty: str = "The rows that are classified are shown here.",
    heading: str = "{0}",
) -> str:
    """Render a table from cells of HTML by heading, or a note if it is empty.

    On a narrow page its rows are blocks.
    """
    rows = list(rows)
    if not rows:
        return f"<p class='note grid-empty'>{empty}</p>"
    top = "".join(f"<th scope='col'>{heading.format(name)}</th>" for name in rows[0])
    cells = (
        "".join(f"<td data-head='{head}'>{cell}</td>" for head, cell in row.items()) for row in rows
    )
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<table class='grid'><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


# ── The model ─────────────────────────────────────────────────────────────────────────────────────


def card_opening(card: str) -> str:
    """Return what a model card says before its first section, as Markdown: what the model does, and
    how often it is correct.
    """
    body = re.sub(r"\A---\r?\n.*?\r?\n---\r?\n|<!--.*?-->", "", card, flags=re.DOTALL)
    opening = re.split(r"(?m)^## ", body)[0]
    return re.sub(r"(?m)\A\s*# .*$", "", opening).strip()


def card_plots(card: str, read: Callable[[str], bytes | None]) -> str:
    """Render the plots of a model card, each with its caption.

    ``read`` returns the content of a file of the checkpoint.
    """
    shown = ""
    for caption, name in re.findall(r"!\[([^\]]*)\]\((plots/\w+\.png)\)", card):
        if content := read(name):
            source = f"data:image/png;base64,{b64encode(content).decode()}"
            shown += (
                f"<figure><img src='{source}' "
                f"alt='{escape_html(caption)}'><figcaption>{escape_html(caption)}</figcaption></figure>"
            )
    return shown


# ── Head and foot ─────────────────────────────────────────────────────────────────────────────────


def masthead(title: str, medical: bool) -> str:
    note = f"<p class='device' role='note'>{NOT_A_DEVICE} For research.</p>" if medical else ""
    return f"<header><h1>{name_html(title)}</h1>{note}</header>"


def footer(medical: bool) -> str:
    kept = (
        "What you send is not logged or shared. Files and results are deleted within ten minutes."
    )
    return f"<footer><p>{f'{NOT_A_DEVICE} ' if medical else ''}{kept}</p></footer>"


# marks an old result after an edit; the arguments are the text, and the one that was classified
# last
MARK_OLD = """(text, classified) => {
  const isOld = classified !== "" && text !== classified;
  document.querySelector("#one-text").classList.toggle("old", isOld);
  return [];
}"""
HEAD = """
<script>
document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-sets]");
  const box = button && document.querySelector(`#${button.dataset.sets} :is(textarea, input)`);
  if (!box) return;
  box.value = button.dataset.value;
  // the first event sets the value, and gradio takes the second one for input by a user
  box.dispatchEvent(new Event("input", { bubbles: true }));
  box.dispatchEvent(new Event("keypress", { bubbles: true }));
});
</script>
"""
