"""Test what the page shows: tree, tables and names, escaped, short and readable; and how the Space is published."""

import ast
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_outside
from packaging.requirements import Requirement

sys.path.insert(0, str(ROOT / "space"))

import views

from taxonomy_hierarchical import Taxonomy

HOSTILE = "<img src=x onerror=alert(1)> ${alert(2)} {{this}} `x` & ' \" \u202eevil"
SPACE = ROOT / "space"


PLAIN = Taxonomy([{"a": ["b", "c"]}, "d"])


def nodes(scores: dict[str, float], predicted=(), in_set=(), thresholds=None, tree=PLAIN) -> views.NodeResults:
    ids = [{*map(tree.id, labels)} for labels in (predicted, in_set)]
    return views.NodeResults([scores[label] for label in tree.labels], tree.with_ancestors(ids[0]), ids[1], thresholds)


def rows_of(page: str) -> list[str]:
    """Return the visible text of each row of a tree, in order, folded rows and the titles of folds included."""
    rows = re.findall(
        r"(?s)<(button|div|summary|li class='note')[^>]*>(.*?)</\1", page.replace("</li>", "</li class='note'>")
    )
    return [" ".join(re.sub("<[^>]+>", " ", text).split()) for _, text in rows]


def test_nothing_hostile_becomes_markup():
    tree = Taxonomy([HOSTILE, "b"], descriptions={HOSTILE: HOSTILE})
    node = {"label": HOSTILE, "score": 0.7}
    result = {"labels": [{**node, "path": [node], "description": HOSTILE}], "truncated": False}
    word = {"word": HOSTILE[:20], "start": 0, "end": 20, "weight": 0.4}
    explained = node | {"blank_score": 0.1, "rest": 0.0, "error": 0.0, "characters_read": 20, "words": [word]}
    record = {"line": 1, "text": HOSTILE + "\x07", "labels": [HOSTILE], "scores": [1.0], "score": 1.0}
    record |= {"prediction_set": [HOSTILE], "truncated": False}
    pages = [
        views.result(tree, result, views.prediction_set(tree, "recall", 0.9, [node])),
        views.tree(tree),
        views.tree(tree, nodes({HOSTILE: 0.7, "b": 0.3}, [HOSTILE], [HOSTILE], None, tree)),
        views.words(HOSTILE, explained, views.PROBABILITY),
        views.refusal(HOSTILE),
        views.facts({HOSTILE: HOSTILE}),
        views.summary(tree, [record]),
        views.table(tree, [record]),
        views.problems([{"line": 1, "problem": HOSTILE}]),
        views.masthead(HOSTILE, True),
        views.card_plots(f"![{HOSTILE}](plots/a.png)", lambda name: b"PNG"),
    ]
    for page in pages:
        assert "<img src=x" not in page
        assert "alert(1)&gt;" in page
        assert not re.search(r"[${}`\x07]", page)
    assert views.escape_html("a\r\nb\x07") == "a\r\nb\ufffd"  # line breaks of Windows are kept


def test_a_description_stands_beside_the_name():
    for described in (Taxonomy(["fits", "b"], descriptions={"fits": "a seizure disorder"}), Taxonomy(["fits", "b"])):
        node = {"label": "fits", "score": 0.5, "path": [{"label": "fits", "score": 0.5}]}
        node |= {"description": described.descriptions["fits"]} if described.descriptions else {}
        for shown in (
            views.result(described, {"labels": [node], "truncated": False}, ""),
            views.tree(described),
            views.tree(described, nodes({"fits": 0.5, "b": 0.5}, tree=described)),
        ):
            assert ("a seizure disorder" in shown) == bool(described.descriptions)


# ── The tree ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_before_a_text_the_tree_has_names_and_no_numbers():
    shown = views.tree(PLAIN)
    assert rows_of(shown) == ["a", "b", "c", "d"]
    assert "%" not in shown
    assert "<button" not in shown


def test_siblings_stand_by_probability_and_path_and_set_are_marked():
    results = nodes({"a": 0.6, "b": 0.1, "c": 0.5, "d": 0.4}, ["c"], ["c", "d"])
    shown = views.tree(PLAIN, results)
    assert rows_of(shown) == ["✓ a 60.0 %", "✓ ◆ c 50.0 %", "b 10.0 %", "◆ d 40.0 %"]
    assert re.findall("data-value='(.)'", shown) == ["a", "c", "b", "d"]
    assert "<i style" not in shown  # leaves compete: no node has a threshold
    ticks = re.findall(
        r"<i style='left:(.*?)%'", views.tree(PLAIN, results._replace(thresholds=[0.1, 0.2, 0.3, 0.456]))
    )
    assert sorted(ticks) == ["10.0", "20.0", "30.0", "45.6"]


def test_a_name_does_not_repeat_its_path():
    tree = Taxonomy([{"a": ["same"]}, {"b": ["same"]}], separator=" > ")
    results = nodes({"a": 0.6, "b": 0.4, "a > same": 0.6, "b > same": 0.4}, ["a > same"], tree=tree)
    assert rows_of(views.tree(tree, results)) == ["✓ a 60.0 %", "✓ same 60.0 %", "b 40.0 %", "same 40.0 %"]
    path = [{"label": "a", "score": 0.6}, {"label": "a > same", "score": 0.6}]
    shown = views.result(tree, {"labels": [path[-1] | {"path": path}], "truncated": False}, "")
    assert "<p class='path'><bdi>a</bdi> › </p><p class='class'><bdi>same</bdi></p>" in shown


def test_unlikely_siblings_are_folded_with_their_sum_or_the_largest_of_them():
    """Where nodes have thresholds, probabilities do not add up. A single unlikely sibling is not folded."""
    tree = Taxonomy(["a", "b", "c", "d"])
    results = nodes({"a": 0.97, "b": 0.015, "c": 0.01, "d": 0.005}, ["a"], tree=tree)
    assert rows_of(views.tree(tree, results)) == [
        "✓ a 97.0 %",
        "3 others, together 3.0 %",
        "b 1.5 %",
        "c 1.0 %",
        "d 0.5 %",
    ]
    assert "3 others, each at most 1.5 %" in views.tree(tree, results._replace(thresholds=[0.5] * 4))
    results = nodes({"a": 0.9, "b": 0.05, "c": 0.045, "d": 0.005}, ["a"], tree=tree)
    assert "<details" not in views.tree(tree, results)
    results = nodes({"a": 0.97, "b": 0.015, "c": 0.01, "d": 0.005}, ["a"], ["d"], tree=tree)
    assert rows_of(views.tree(tree, results))[:3] == ["✓ a 97.0 %", "◆ d 0.5 %", "2 others, together 2.5 %"]


def test_of_thousands_of_nodes_the_predicted_and_most_probable_are_rendered():
    tree = Taxonomy([{f"root {i}": [f"leaf {i}.{j}" for j in range(100)]} for i in range(22)])
    scores = {label: 1.0 if label.startswith("root") else 1 / (10 + node) for node, label in enumerate(tree.labels)}
    shown = views.tree(tree, nodes(scores, ["leaf 21.99"], ["leaf 20.99"], tree=tree))
    assert shown.count("<button") == views.ROWS
    assert "✓ leaf 21.99" in " ".join(rows_of(shown))
    assert "◆ leaf 20.99" in " ".join(rows_of(shown))
    assert "more</li>" in shown
    assert len(shown) < 150_000
    plain = views.tree(tree)
    assert all(f"<bdi>root {i}</bdi>" in plain for i in range(22))
    assert plain.count("<details") == 22
    assert len(plain) < 100_000


# ── Results and files ────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_label_a_truncation_and_a_long_set_are_shown():
    tree = Taxonomy([f"n{i}" for i in range(100)])
    shown = views.result(tree, {"labels": [], "truncated": True, "tokens": 2000, "tokens_read": 500}, "")
    assert "No label" in shown
    assert "of its 2,000 tokens, the last 1,500 (75.0 %) were not read" in shown
    assert views.prediction_set(tree, "recall", 0.5, []) == "For 50% recall: no node"
    long = views.prediction_set(tree, "recall", 0.9, [{"label": label, "score": 0.5} for label in tree.labels])
    assert "n19" in long
    assert "n20" not in long
    assert long.endswith(" and 80 more")
    record = {"line": 1, "text": "a", "labels": [], "scores": [], "prediction_set": tree.labels}
    assert "100 nodes</summary>" in views.table(tree, [record])
    assert " and 80 more<" in views.table(tree, [record])


def test_a_file_is_summarised_and_its_rows_are_turned_by_pages():
    labels = ["b"] * 30 + ["c"] * 14
    records = [
        {
            "line": i,
            "text": "t",
            "labels": [label],
            "scores": [0.4],
            "score": 0.4 if i < 11 else 0.9,
            "truncated": i < 22,
        }
        for i, label in enumerate(labels)
    ]
    records[-1] |= {"labels": [], "scores": [], "score": None}
    shown = " ".join(re.sub("<[^>]+>", " ", views.summary(PLAIN, records)).split())
    assert shown.startswith("b 30 c 13 no label 1 ")
    assert shown.endswith("less than 50% probable: 27.3 % · unlike the training texts: 0.0 % · truncated: 50.0 %")
    for page, lines, turned in ((1, range(20), ["2"]), (2, range(20, 40), ["1", "3"]), (3, range(40, 44), ["2"])):
        shown = views.table(PLAIN, records, page)
        assert re.findall(r"<td data-head='line'>(\d+)</td>", shown) == [*map(str, lines)]
        assert f"Page {page} of 3" in shown
        assert re.findall(r"data-value='(\d+)'>", shown) == turned
    assert "Page" not in views.table(PLAIN, records[:20])
    strange = records[0] | {"p_value": 0.01, "known_labels": [None]}
    assert "unlike the training texts: <span class='chip'" in views.table(PLAIN, [strange])
    assert "unlike the training texts: <b>100.0 %</b>" in views.summary(PLAIN, [strange])


def test_a_text_unlike_the_training_texts_has_no_bold_class():
    node = {
        "label": "b",
        "score": 0.9,
        "path": [{"label": "a", "score": 1.0}, {"label": "b", "score": 0.9}],
        "known": None,
    }
    result = {"labels": [node], "p_value": 0.004, "truncated": False}
    assert "no coverage" in views.result(PLAIN, result, "no coverage")
    shown = views.result(PLAIN, result | {"prediction_set": [node]}, "For 90 % coverage: <b class=x>b</b>")
    assert "Unlike the texts this model was trained on" in shown
    assert "0.4 % of the validation texts look as strange to the model. Its prediction would be <span" in shown
    assert "it looks like a text of none of these classes." in shown
    assert "<b class=x>" not in shown
    known_above = {"labels": [node | {"known": "a"}], "p_value": 0.004, "truncated": False}
    assert "it looks like a text of <bdi>a</bdi>." in views.result(PLAIN, known_above, "")
    # a text without a predicted label, but like the training texts
    assert "No label" in views.result(PLAIN, {"labels": [], "p_value": 0.3, "truncated": False}, "")
    for known, sentence in (
        ("a", "Unlike the known texts of <bdi>b</bdi>, but like those of <bdi>a</bdi>."),
        (None, "Unlike the known texts of <bdi>b</bdi>."),
    ):
        shown = views.result(
            PLAIN, {"labels": [node | {"known": "b"}, node | {"known": known}], "p_value": 0.06, "truncated": False}, ""
        )
        assert shown.count("Unlike") == 1
        assert sentence in shown


def test_only_exact_probabilities_are_shown_as_0_or_100_percent():
    shown = [views.percent(share) for share in (0, 0.0004, 0.5, 0.99951, 1)]
    assert shown == ["0.0 %", "< 0.1 %", "50.0 %", "> 99.9 %", "100.0 %"]


def test_of_the_card_the_opening_the_licence_and_the_plots_are_shown(clear_checkpoint):
    card = (Path(clear_checkpoint) / "README.md").read_text()
    opening = views.card_opening(card)
    assert opening.endswith("and a person should check important results.")
    assert re.search(r"(?m)^\*\*.* of .* texts", opening)  # the headline
    assert not re.search(r"(?m)^#|^---|<!--|\|", opening)
    assert views.licence(card) == "apache-2.0"
    asked: list[str] = []
    shown = views.card_plots(card, lambda name: asked.append(name) or b"PNG")
    assert asked == re.findall(r"\((plots/.*?)\)", card)
    assert shown.count("<img src='data:image/png;base64,UE5H' alt='") == len(asked) > 0


@pytest.mark.parametrize("medical", [True, False])
def test_the_page_is_that_of_the_model(medical, clear_checkpoint, tmp_path):
    """Title, placeholder, warning and examples come from config.json; by default, a medical model has examples of its own."""
    folder = shutil.copytree(clear_checkpoint, tmp_path / "model")
    (folder / "README.md").unlink()  # which warns, too
    config = json.loads((folder / "config.json").read_text())
    shown = {}
    for examples in ([], ["My own first example of all."]):
        config["page"] = {"title": "News <b>", "medical": medical} | ({"examples": examples} if examples else {})
        (folder / "config.json").write_text(json.dumps(config))
        code = f"""
import json, sys
sys.path.insert(0, {str(SPACE)!r})
import app
page = app.build(app.load({str(folder)!r}, None), {str(folder)!r})
print(json.dumps([page.title, json.dumps([block.get_config() for block in page.blocks.values()], default=str)]))
"""
        title, shown[len(examples)] = run_outside(code, tmp_path, {"HF_HUB_OFFLINE": "1"})
        assert title == "News <b>"
    for config in shown.values():
        assert "News &lt;b&gt;" in config
        assert config.count("Not a medical device") == (2 if medical else 0)
        assert ("Paste a medical abstract" in config) == medical
    assert ("mesalamine" in shown[0]) == medical
    assert "My own first example \\u2026" in shown[1]
    assert "mesalamine" not in shown[1]


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
node = service.classify("angina was studied in adults with hypertension.")["label"]
pages = [service.show_result("", 0.9)[1], service.show_result("angina was studied in adults with hypertension.", 2)[1]]
pages += [service.show_words("angina was studied in adults with hypertension.", node), service.explain("angina was studied in adults with hypertension.", node)["label"]]
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
