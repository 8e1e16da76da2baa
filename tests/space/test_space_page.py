"""Test what the page shows: figures, tables and names, escaped, short and readable; and how the Space is published."""

import ast
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, run_outside
from packaging.requirements import Requirement

sys.path.insert(0, str(ROOT / "space"))

import views
from service import MENU, MultiLabelService, Service

from taxonomy_hierarchical import Taxonomy

HOSTILE = "<img src=x onerror=alert(1)> ${alert(2)} {{this}} `x` & ' \" \u202eevil \x07"
SPACE = ROOT / "space"


def notes(figure) -> list[str]:
    return [note.text for note in figure.layout.annotations]


def test_nothing_hostile_becomes_markup():
    node = {"label": HOSTILE, "score": 0.7}
    result = {"labels": [{**node, "path": [node], "description": HOSTILE}], "truncated": False}
    word = {"word": HOSTILE[:20], "start": 0, "end": 20, "weight": 0.4}
    explained = node | {"blank_score": 0.1, "rest": 0.0, "error": 0.0, "characters_read": 20, "words": [word]}
    record = {"line": 1, "text": HOSTILE, "labels": [HOSTILE], "scores": [1.0], "prediction_set": [HOSTILE]}
    pages = [
        views.result("", result, views.prediction_set("recall", 0.9, [node], ", ")),
        views.words(HOSTILE, explained, views.PROBABILITY),
        views.refusal(HOSTILE),
        views.facts({HOSTILE: HOSTILE}),
        views.preview([record]),
        views.problems([{"line": 1, "problem": HOSTILE}]),
    ]
    for page in pages:
        assert "<img" not in page
        assert "alert(1)&gt;" in page
        assert not re.search(r"[${}`\x07]", page)
    assert views.escape_html("a\r\nb\x07") == "a\r\nb\ufffd"  # line breaks of Windows are kept
    rtl = "\u0646\u0648\u0639 2"  # a name from right to left does not split the number beside it
    assert views.plotly_text(rtl) == f"\u2068{rtl}\u2069"
    tree = SimpleNamespace(
        labels=[HOSTILE, "b"], levels=[1, 1], reading_order=[0, 1], num_nodes=2, num_leaves=2, depth=1,
        children=lambda node: [0, 1] if node < 0 else [],
    )  # fmt: skip
    for draw in (views.bars, views.icicle, views.node_rows):
        drawn = draw(tree, [0.7, 0.3], {0}).to_json()
        assert not re.search(r"<img|\\u003cimg", drawn)


def test_a_description_stands_beside_the_label():
    node = {"label": "fits", "score": 0.5, "path": []}
    for more in ({"description": "a seizure disorder"}, {}):
        shown = views.result("", {"labels": [node | more], "truncated": False}, "")
        assert ("a seizure disorder" in shown) == bool(more)


def test_a_deep_taxonomy_of_thousands_is_drawn_with_few_boxes():
    """Draw a ten-level chain beside 3,000 siblings: there are few boxes and bars, and boxes of parents contain their children."""
    below: list = ["level 10"]
    for level in range(9, 1, -1):
        below = [{f"level {level}": below}]
    tree = Taxonomy([{"level 1": [*below, *(f"sibling {i}" for i in range(3000))]}])
    scores = [0.4 / 3000 if label.startswith("sibling") else 0.6 for label in tree.labels]
    scores[tree.id("level 1")], chosen = 1.0, set(tree.path(tree.id("level 10")))
    bar = views.icicle(tree, scores, chosen).data[0]
    assert len(bar.y) == 11
    others = bar.text.index("3,000 others 40.0 %")
    assert (bar.base[others], bar.y[others]) == pytest.approx((0.6, 0.4))
    assert len(views.icicle(tree, scores, {tree.id("sibling 7")}).data[0].y) == 12  # what is predicted is shown
    figure = views.bars(tree, scores, chosen)
    assert sum(len(trace.y) for trace in figure.data) == 1 + 7 + 1 + 1
    assert figure.layout.height == views.bars(tree, None, set()).layout.height  # nothing moves


def test_a_node_of_a_multi_label_taxonomy_has_a_bar_of_its_own():
    tree = Taxonomy([{"a": ["b", "c"]}, "d"])
    scores = [{"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6}[label] for label in tree.labels]
    figure = views.node_rows(tree, scores, {tree.id("a"), tree.id("c")})
    assert list(figure.data[0].x) == [0.9, 0.8, 0.7, 0.6]
    assert notes(figure) == ["✓ a  <b>90.0 %</b>", "b  <b>80.0 %</b>", "✓ c  <b>70.0 %</b>", "d  <b>60.0 %</b>"]
    shift = [note.xshift for note in figure.layout.annotations]
    assert shift[1] == shift[2] > shift[0] == shift[3]
    assert views.node_rows(tree, None, set()).layout.height == figure.layout.height


def test_of_thousands_of_nodes_the_predicted_and_most_probable_are_shown_with_the_nodes_above():
    tree = Taxonomy([{"root": [f"leaf {i}" for i in range(3000)]}])
    scores = [1 - i / 3001 for i in range(1, 3001)] + [1.0]
    shown = notes(views.node_rows(tree, scores, {tree.id("root"), tree.id("leaf 2999")}))
    assert len(shown) == views.TREE_ROWS + 1
    assert shown[0].startswith("✓ root")
    assert shown[-2].startswith("✓ leaf 2999")
    assert shown[-1] == f"2,971 others, each at most {views.percent(scores[28])}"


@pytest.mark.parametrize("service", [Service, MultiLabelService])
def test_the_menu_of_a_large_taxonomy_has_the_most_probable_nodes_in_reading_order(service):
    own = object.__new__(service)
    own.tree = Taxonomy([{"root": [f"leaf {i}" for i in range(3000)]}])
    assert len(own.choices()) == MENU
    scores = {f"leaf {i}": i / 3000 for i in range(3000)}
    expected = [("root", "root"), *((f"root › leaf {i}", f"leaf {i}") for i in range(3001 - MENU, 3000))]
    assert own.choices({"levels": [{"root": 1.0}, scores]}) == expected


def test_a_single_remaining_node_is_drawn_instead_of_others():
    for draw, count in ((views.bars, views.BARS + 1), (views.node_rows, views.TREE_ROWS + 1)):
        shown = notes(draw(Taxonomy([f"leaf {i}" for i in range(count)]), None, set()))
        assert shown[-1] == f"leaf {count - 1}"
        assert "2 others" in notes(draw(Taxonomy([f"leaf {i}" for i in range(count + 1)]), None, set()))[-1]


def test_no_label_a_truncation_and_a_long_set_are_shown():
    shown = views.result("", {"labels": [], "truncated": True, "tokens": 2000, "tokens_read": 500}, "")
    assert "No label" in shown
    assert "of its 2,000 tokens, the last 1,500 (75.0 %) were not read" in shown
    assert views.prediction_set("recall", 0.5, [], ", ") == "For 50% recall: no node"
    long = views.prediction_set("recall", 0.9, [{"label": f"n{i}", "score": 0.5} for i in range(100)], ", ")
    assert long.endswith("<bdi>n19</bdi></b> and 80 more")
    record = {"line": 1, "text": "a", "labels": [], "scores": [], "prediction_set": [f"n{i}" for i in range(100)]}
    assert "<bdi>n19</bdi> and 80 more<" in views.preview([record])


def test_a_text_unlike_the_training_texts_has_no_bold_class():
    node = {
        "label": "b",
        "score": 0.9,
        "path": [{"label": "a", "score": 1.0}, {"label": "b", "score": 0.9}],
        "known": None,
    }
    result = {"labels": [node], "p_value": 0.004, "truncated": False}
    assert "no coverage" in views.result("", result, "no coverage")
    shown = views.result("", result | {"prediction_set": [node]}, "For 90 % coverage: <b>b</b>")
    assert "Unlike the texts this model was trained on" in shown
    assert (
        "0.4 % of the validation texts look as strange to the model. Its prediction would be <bdi>b</bdi> 90.0 %."
        in shown
    )
    assert "<b>" not in shown
    # a text without a predicted label, but like the training texts
    assert "No label" in views.result("", {"labels": [], "p_value": 0.3, "truncated": False}, "")
    for known, sentence in (
        ("a", "Unlike the known texts of <bdi>b</bdi>, but like those of <bdi>a</bdi>."),
        (None, "Unlike the known texts of <bdi>b</bdi>."),
    ):
        shown = views.result(
            "", {"labels": [node | {"known": "b"}, node | {"known": known}], "p_value": 0.01, "truncated": False}, ""
        )
        assert shown.count("Unlike") == 1
        assert sentence in shown


def test_only_exact_probabilities_are_shown_as_0_or_100_percent():
    shown = [views.percent(share) for share in (0, 0.0004, 0.5, 0.99951, 1)]
    assert shown == ["0.0 %", "< 0.1 %", "50.0 %", "> 99.9 %", "100.0 %"]


def test_the_most_important_sections_of_the_card_are_shown_first(clear_checkpoint):
    card = (Path(clear_checkpoint) / "README.md").read_text()
    first, more = views.card_parts(card)
    assert re.findall(r"(?m)^## (.*)", first) == ["Results", "Limits and intended use", "Licence"]
    assert "Training" in re.findall(r"(?m)^## (.*)", more)
    assert "general pathological conditions" in first
    assert not re.search(r"trust_remote_code|!\[|^---|<!--", first + more)
    assert views.licence(card) == "apache-2.0"


# ── Publishing and starting ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_requirements_name_what_is_imported_and_the_version_of_gradio_that_the_hub_starts():
    front = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert (front["sdk"], front["license"]) == ("gradio", "apache-2.0")
    assert (SPACE / front["app_file"]).is_file()
    required = {one.name: one for one in map(Requirement, (SPACE / "requirements.txt").read_text().split())}
    assert front["sdk_version"] in required["gradio"].specifier
    imported = set()
    for node in (node for file in SPACE.glob("*.py") for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    ours = {"hierarchical_clinicalbert", "taxonomy_hierarchical", *(file.stem for file in SPACE.glob("*.py"))}
    assert imported - ours - sys.stdlib_module_names - {"spaces", "starlette"} <= {*required}  # gradio brings starlette


# As in the package of this name: arguments and results are pickled, and an error comes back as its type's name.
ZERO_GPU = """
import pickle
lent = 0
def GPU(function):
    global lent
    lent += 1
    def run(*arguments):
        try:
            return pickle.loads(pickle.dumps(function(*pickle.loads(pickle.dumps(arguments)))))
        except Exception as error:
            raise RuntimeError(type(error).__name__) from None
    return run
"""


def test_where_zerogpu_is_its_decorator_is_used(clear_checkpoint, tmp_path):
    (tmp_path / "spaces.py").write_text(ZERO_GPU)
    code = f"""
import json, sys
sys.path[:0] = [{str(SPACE)!r}, {str(tmp_path)!r}]
import spaces, app
service = app.Service(app.load({clear_checkpoint!r}, None))
node = service.classify("A study of angina.")["label"]
pages = [service.show_result("", 0.9)[0], service.show_result("A study of angina.", 2)[0]]
pages += [service.show_words("A study of angina.", node), service.explain("A study of angina.", node)["label"]]
print(json.dumps([spaces.lent, node, *pages]))
"""
    count, node, empty, high, words, explained = run_outside(code, tmp_path, {"HF_HUB_OFFLINE": "1"})
    assert count == 2
    assert "The text is empty." in empty
    assert node in high
    assert "The coverage must be a number between 0.5 and 0.99." in high
    assert "angina" in words
    assert explained == node


START = """
import io, json, sys
sys.path.insert(0, SPACE)
import app
sys.argv, sys.stderr = ["app.py", "--model", MODEL], io.StringIO()
FAULT
try:
    app.main()
except SystemExit as error:
    print(json.dumps([error.code, sys.stderr.getvalue()]))
"""


@pytest.mark.parametrize(
    ("model", "fault", "message"),
    [
        ("tiny_encoder", "", "cannot load the model MODEL: it is not a checkpoint of this project"),
        ("torn", "", "cannot load the model MODEL: .*config.json"),
        (
            "clear_checkpoint",
            "app.load.__globals__['check_version'].__globals__['RESULT_VERSION'] = 3",
            "returns results of version 2",
        ),
        ("clear_checkpoint", "import gradio; del gradio.queueing.AsyncQueue", "needs gradio 6.31, .*'AsyncQueue'"),
    ],
)
def test_a_space_that_cannot_start_says_why_in_one_line(model, fault, message, request, tmp_path):
    """Start with what is no checkpoint, with a damaged one, and with a gradio whose memory cannot be limited."""
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text('{"model_type": ')
    path = str(tmp_path / "torn") if model == "torn" else request.getfixturevalue(model)
    code = START.replace("SPACE", repr(str(SPACE))).replace("MODEL", repr(path)).replace("FAULT", fault)
    exit_code, stderr = run_outside(code, tmp_path, {"HF_HUB_OFFLINE": "1"})
    assert exit_code == 2
    assert "Traceback" not in stderr
    assert re.match(f"app.py: error: .*{message.replace('MODEL', path)}", stderr.strip().splitlines()[-1])


def test_the_space_starts_where_gradios_own_folder_cannot_be_made(clear_checkpoint, tmp_path):
    """Block gradio's default folder by a file, as if another user owned it. The Space's own folder is private, and deleted at the end."""
    (tmp_path / "gradio").write_text("")
    code = f"""
import json, os, stat, sys
sys.path.insert(0, {str(SPACE)!r})
import app
page = app.build(app.load({clear_checkpoint!r}, None), {clear_checkpoint!r})
print(json.dumps([page.GRADIO_CACHE, stat.S_IMODE(os.stat(page.GRADIO_CACHE).st_mode)]))
"""
    folder, mode = run_outside(code, tmp_path, {"HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)})
    assert (Path(folder).parent, mode) == (tmp_path, 0o700)
    assert not Path(folder).exists()
