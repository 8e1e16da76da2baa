"""Test what the page shows: tree, tables and names, escaped, short and readable; and how the Space
starts.
"""

import ast
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, clear_rows, run, run_outside
from packaging.requirements import Requirement

sys.path.insert(0, str(ROOT / "space"))

import views

from taxonomy_hierarchical import Taxonomy

HOSTILE = "<img src=x onerror=alert(1)> ${alert(2)} {{this}} `x` & ' \" \u202eevil"
SPACE = ROOT / "space"
PLAIN = Taxonomy([{"a": ["b", "c"]}, "d"])


def nodes(
    scores: dict[str, float], predicted=(), in_set=(), thresholds=None, tree=PLAIN
) -> views.NodeResults:
    ids = [{*map(tree.id, labels)} for labels in (predicted, in_set)]
    return views.NodeResults(
        [scores[label] for label in tree.labels], tree.with_ancestors(ids[0]), ids[1], thresholds
    )


def rows_of(page: str) -> list[str]:
    """Return the visible text of each row of a tree, in order, folded rows and the titles of folds
    included.
    """
    rows = re.findall(r"(?s)<(button|div|summary)[^>]*>(.*?)</\1", page)
    return [" ".join(re.sub("<[^>]+>", " ", text).split()) for _, text in rows]


def test_nothing_hostile_becomes_markup_and_a_description_is_shown():
    tree = Taxonomy([HOSTILE, "b"], descriptions={HOSTILE: HOSTILE})
    node = {"label": HOSTILE, "score": 0.7}
    result = {"labels": [{**node, "path": [node], "description": HOSTILE}], "truncated": False}
    word = {"word": HOSTILE[:20], "start": 0, "end": 20, "weight": 0.4}
    explained = node | {
        "blank_score": 0.1,
        "rest": 0.0,
        "error": 0.0,
        "characters_read": 20,
        "words": [word],
    }
    record = {
        "line": 1,
        "text": HOSTILE + "\x07",
        "labels": [HOSTILE],
        "scores": [1.0],
        "score": 1.0,
    }
    record |= {"prediction_set": [HOSTILE], "truncated": False}
    described = [
        views.result(tree, result, views.prediction_set(tree, "recall", 0.9, [])),
        views.tree(tree),
        views.tree(tree, nodes({HOSTILE: 0.7, "b": 0.3}, [HOSTILE], [HOSTILE], None, tree)),
    ]
    assert all(page.count("alert(1)&gt;") >= 2 for page in described)
    for page in (
        *described,
        views.prediction_set(tree, "recall", 0.9, [node]),
        views.words(HOSTILE, explained, views.PROBABILITY),
        views.refusal(HOSTILE),
        views.summary(tree, [record]),
        views.table(tree, [record]),
        views.problems([{"line": 1, "problem": HOSTILE}]),
        views.masthead(HOSTILE, True),
        views.card_plots(f"![{HOSTILE}](plots/a.png)", lambda name: b"PNG"),
    ):
        assert "<img src=x" not in page
        assert "alert(1)&gt;" in page
        assert not re.search(r"[${}`\x07]", page)


# ── The tree ──────────────────────────────────────────────────────────────────────────────────────


def test_siblings_stand_by_probability_and_path_and_set_are_marked():
    # before a text: no numbers, and nothing to press
    assert rows_of(views.tree(PLAIN)) == ["a", "b", "c", "d"]
    assert "<button" not in views.tree(PLAIN)
    results = nodes({"a": 0.6, "b": 0.1, "c": 0.5, "d": 0.4}, ["c"], ["c", "d"])
    shown = views.tree(PLAIN, results)
    assert rows_of(shown) == ["✓ a 60.0 %", "✓ ◆ c 50.0 %", "b 10.0 %", "◆ d 40.0 %"]
    assert re.findall("data-value='(.)'", shown) == ["a", "c", "b", "d"]
    assert "<i style" not in shown  # leaves compete: no node has a threshold
    shown = views.tree(PLAIN, results._replace(thresholds=[0.1, 0.2, 0.3, 0.456]))
    assert sorted(re.findall(r"<i style='left:(.*?)%'", shown)) == ["10.0", "20.0", "30.0", "45.6"]
    # only exact ones are 0 % or 100 %
    numbers = [views.percent(share) for share in (0, 0.0004, 0.99951, 1)]
    assert numbers == ["0.0 %", "< 0.1 %", "> 99.9 %", "100.0 %"]


def test_a_name_does_not_repeat_its_path():
    tree = Taxonomy([{"a": ["same"]}, {"b": ["same"]}], separator=" > ")
    results = nodes({"a": 0.6, "b": 0.4, "a > same": 0.6, "b > same": 0.4}, ["a > same"], tree=tree)
    assert rows_of(views.tree(tree, results)) == [
        "✓ a 60.0 %",
        "✓ same 60.0 %",
        "b 40.0 %",
        "same 40.0 %",
    ]
    path = [{"label": "a", "score": 0.6}, {"label": "a > same", "score": 0.6}]
    shown = views.result(tree, {"labels": [path[-1] | {"path": path}], "truncated": False}, "")
    assert "<p class='path'><bdi>a</bdi> › </p><p class='class'><bdi>same</bdi></p>" in shown


def test_unlikely_siblings_are_folded_with_their_sum_or_the_largest_of_them():
    """Where nodes have thresholds, probabilities do not add up.

    A single unlikely sibling is not folded.
    """
    tree = Taxonomy(["a", "b", "c", "d"])
    results = nodes({"a": 0.97, "b": 0.015, "c": 0.01, "d": 0.005}, ["a"], tree=tree)
    folded = ["✓ a 97.0 %", "3 others, together 3.0 %", "b 1.5 %", "c 1.0 %", "d 0.5 %"]
    assert rows_of(views.tree(tree, results)) == folded
    assert "3 others, up to 1.5 %" in views.tree(tree, results._replace(thresholds=[0.5] * 4))
    marked = views.tree(tree, results._replace(in_set={tree.id("d")}))
    assert rows_of(marked)[:3] == ["✓ a 97.0 %", "◆ d 0.5 %", "2 others, together 2.5 %"]
    results = nodes({"a": 0.9, "b": 0.05, "c": 0.045, "d": 0.005}, ["a"], tree=tree)
    assert "<details" not in views.tree(tree, results)
    wide = Taxonomy([f"{i}" for i in range(100)])
    of_set = nodes(
        {f"{i}": 0.03 for i in range(100)}, ["99"], [f"{i}" for i in range(90)], tree=wide
    )
    # 40 of the marked nodes, the predicted one among them
    shown = rows_of(views.tree(wide, of_set))
    assert shown[38:41] == ["◆ 38 3.0 %", "✓ 99 3.0 %", "60 others, together 180.0 %"]


def test_of_thousands_of_nodes_those_of_the_set_and_the_most_probable_can_be_pressed():
    tree = Taxonomy([{f"root {i}": [f"leaf {i}.{j}" for j in range(100)]} for i in range(22)])
    scores = {
        label: 1.0 if label.startswith("root") else 1 / (10 + node)
        for node, label in enumerate(tree.labels)
    }
    shown = views.tree(tree, nodes(scores, ["leaf 21.99"], ["leaf 20.99"], tree=tree))
    assert shown.count("<button") == views.ROWS
    assert {"✓ leaf 21.99", "◆ leaf 20.99"} <= {*rows_of(shown)}
    large = views.tree(tree, nodes(scores, ["leaf 21.99"], tree.labels[:400], tree=tree))
    assert all(f"data-value='{label}'" in large for label in ("leaf 21.99", *tree.labels[:400]))
    assert "more</li>" in shown
    plain = views.tree(tree)
    assert all(f"<bdi>root {i}</bdi>" in plain for i in range(22))
    assert plain.count("<details") == 22
    assert len(shown) + len(plain) < 250_000


# ── Results and files ─────────────────────────────────────────────────────────────────────────────


def test_no_label_a_truncation_and_a_long_set_are_shown():
    tree = Taxonomy([f"n{i}" for i in range(100)])
    shown = views.result(
        tree, {"labels": [], "truncated": True, "tokens": 2000, "tokens_read": 500}, ""
    )
    assert "No label" in shown
    assert "of its 2,000 tokens, the last 1,500 (75.0 %) were not read" in shown
    assert views.prediction_set(tree, "recall", 0.5, []) == "For 50% recall: no node"
    labels = [
        {"label": label, "score": 0.5, "path": [{"label": label}]} for label in tree.labels[:8]
    ]
    shown = views.result(tree, {"labels": labels, "truncated": False}, "")
    assert re.findall(r"(?:class'>|<p>Also: <.*?>|chip.*?)<bdi>(\w+)", shown) == [
        f"n{i}" for i in range(8)
    ]
    assert shown.count("class='certainty'") == 6
    record = {
        "line": 1,
        "text": "a" * 201,
        "labels": [],
        "scores": [],
        "prediction_set": tree.labels,
    }
    shown = views.table(tree, [record])
    assert f"<bdi>{'a' * 200}…</bdi>" in shown
    assert "100 nodes</summary>" in shown
    assert "n19</bdi>" in shown
    assert "n20</bdi>" not in shown
    assert " and 80 more<" in shown


def test_a_file_is_summarised():
    record = {
        "line": 1,
        "text": "t",
        "labels": ["b"],
        "scores": [0.4],
        "score": 0.4,
        "truncated": True,
    }
    strange = record | {"p_value": 0.01}
    records = [record, strange, record | {"score": 0.9, "truncated": False}]
    records.append(records[-1] | {"labels": [], "scores": [], "score": None})
    shown = " ".join(re.sub("<[^>]+>", " ", views.summary(PLAIN, records)).split())
    shares = (
        "less than 50% probable: 75.0 % · unlike the training texts: 25.0 % · truncated: 50.0 %"
    )
    assert shown == f"b 3 no label 1 {shares}"
    assert "unlike the training texts: <span class='chip'" in views.table(PLAIN, [strange])


def test_a_text_unlike_the_training_texts_has_no_bold_class():
    path = [{"label": "a", "score": 1.0}, {"label": "b", "score": 0.9}]
    node = path[1] | {"path": path}
    result = {"labels": [node], "p_value": 0.004, "truncated": False}
    assert "no coverage" in views.result(PLAIN, result, "no coverage")
    shown = views.result(
        PLAIN, result | {"prediction_set": [node]}, "For 90 % coverage: <b class=x>b</b>"
    )
    assert "Unlike the texts this model was trained on" in shown
    assert (
        "0.4 % of the validation texts look as strange to the model. Its prediction would be: <span"
        in shown
    )
    assert "<b class=x>" not in shown
    # a text like the training texts, without a predicted label
    assert "No label" in views.result(PLAIN, {"labels": [], "p_value": 0.3, "truncated": False}, "")


# ── Starting ──────────────────────────────────────────────────────────────────────────────────────


def test_the_requirements_name_what_is_imported_and_the_version_of_gradio_that_the_hub_starts():
    """predict.py needs no more, as its container has only these, but for modules of its own
    flags.
    """
    front = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    required = {
        one.name: one for one in map(Requirement, (SPACE / "requirements.txt").read_text().split())
    }
    assert front["sdk_version"] in required["gradio"].specifier
    predicting = [ROOT / "predict.py", *ROOT.glob("*_hierarchical.py")]
    predicting += [
        file
        for file in ROOT.glob("hierarchical_clinicalbert/prediction/*.py")
        if file.stem not in ("openvino", "ray_job")
    ]
    statements = [
        node for file in SPACE.glob("*.py") for node in ast.walk(ast.parse(file.read_text()))
    ]
    statements += [node for file in predicting for node in ast.parse(file.read_text()).body]
    imported = {
        alias.name.split(".")[0]
        for node in statements
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    imported |= {
        node.module.split(".")[0] for node in statements if isinstance(node, ast.ImportFrom)
    }
    ours = {
        "hierarchical_clinicalbert",
        "predict",
        *(file.stem for file in (*SPACE.glob("*.py"), *predicting)),
    }
    # by gradio and transformers
    brought = {"spaces", "starlette", "numpy", "filelock", "huggingface_hub", "tqdm"}
    assert imported - ours - sys.stdlib_module_names - brought <= {*required}


# As in the package of this name: arguments and results are pickled, and an error comes back as its
# type's name.
ZERO_GPU = """
import pickle
lent = 0
def GPU(function):
    def run(*arguments):
        global lent
        lent += 1
        try:
            return pickle.loads(pickle.dumps(function(*pickle.loads(pickle.dumps(arguments)))))
        except Exception as error:
            raise RuntimeError(type(error).__name__) from None
    return run
"""


PAGES = [
    {"medical": True},
    {"medical": True, "examples": ["My own first example of all."]},
    {"medical": False},
]


@pytest.fixture(scope="module")
def shown(clear_checkpoint, uncalibrated_run, tmp_path_factory) -> dict[str, Any]:
    """Return parts of pages, the number of calls of a GPU that `ZERO_GPU` lends, and the folder, of
    one process.

    Block gradio's default folder by a file, as if another user owned it.
    """
    folder = tmp_path_factory.mktemp("zerogpu")
    (folder / "spaces.py").write_text(ZERO_GPU)
    (folder / "gradio").write_text("")
    model = shutil.copytree(clear_checkpoint, folder / "model")
    (model / "README.md").unlink()  # which warns, too
    code = f"""
import json, os, stat, sys
sys.path[:0] = [{str(SPACE)!r}, {str(folder)!r}]
import spaces, app
classifier = app.load({str(model)!r}, None)
service, other, pages = app.Service(classifier), app.load({str(uncalibrated_run[0])!r}, None), []
empty, high = service.show_result("", 0.9)[1], service.show_result("Angina.", 2)[1]
words, calls = service.show_words("Angina.", "neoplasms"), spaces.lent
page = app.build(other, {str(uncalibrated_run[0])!r})
blocks = [block.get_config() for block in page.blocks.values()]
without = blocks, app.Service(other).show_result("Angina.", 0.9)[1]
texts = "Zebras walk by the lake 4711 4712 4713.", {clear_rows(2)[0]["text"]!r}
strange, usual = (service.show_result(text, 0.9)[1:3] for text in texts)
for given in {PAGES!r}:
    classifier.model.config.page = {{"title": "News <b>", **given}}
    page = app.build(classifier, {str(model)!r})
    config = json.dumps([block.get_config() for block in page.blocks.values()], default=str)
    mode = stat.S_IMODE(os.stat(page.GRADIO_CACHE).st_mode)
    pages.append([page.title, config, page.GRADIO_CACHE, mode])
names = ("empty", "high", "words", "calls", "without", "strange", "usual", "pages")
print(json.dumps({{name: globals()[name] for name in names}}, default=str))
"""
    return run_outside(code, folder, {"HF_HUB_OFFLINE": "1", "TMPDIR": str(folder)}) | {
        "folder": folder
    }


def test_the_page_is_that_of_the_model_and_its_folder_is_private(shown):
    """Title, placeholder, warning and examples come from config.json; by default, a medical model
    has examples of its own.
    """
    for given, (title, config, cache, mode) in zip(PAGES, shown["pages"], strict=True):
        assert (title, Path(cache).parent, mode) == ("News <b>", shown["folder"], 0o700)
        assert not Path(cache).exists()
        assert "News &lt;b&gt;" in config
        assert config.count("Not a medical device") == (2 if given["medical"] else 0)
        assert ("Paste a medical abstract" in config) == given["medical"]
        assert ("My own first example \\u2026" in config) == ("examples" in given)
        assert ("mesalamine" in config) == (given == {"medical": True})


def test_where_zerogpu_is_its_decorator_is_used(shown):
    assert shown["calls"] == 2
    assert "The text is empty." in shown["empty"]
    assert "The coverage must be a number between 0.5 and 0.99." in shown["high"]
    assert "Angina" in shown["words"]


def test_without_calibration_there_are_predictions_and_no_sets(shown):
    blocks, result = shown["without"]
    sliders = [block for block in blocks if "coverage" in str(block.get("elem_id"))]
    assert len(sliders) == 2
    for slider in sliders:
        assert slider["interactive"] is False
        assert "Not available: this model was trained without validation rows" in slider["info"]
    assert "class='class'" in result
    assert "coverage needs one that was trained with validation rows" in result


def test_in_the_tree_of_a_strange_text_no_node_is_marked(shown):
    strange, tree = shown["strange"]
    usual, usual_tree = shown["usual"]
    assert "Unlike the texts this model was trained on" in strange
    assert not re.search("predicted|[✓◆]", tree)
    assert "%" in tree
    assert "Unlike" not in usual
    assert re.search("✓.*◆", usual_tree)


def test_a_space_that_cannot_start_says_why_in_one_line(tiny_encoder):
    done = run("--model", tiny_encoder, command="space/app.py", check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    message = (
        f"app.py: error: cannot load the model {re.escape(tiny_encoder)}: .*it is not a "
        "checkpoint of this project"
    )
    assert re.match(message, done.stderr.splitlines()[-1])
