"""Check the documents against the code: snippets run, commands and flags exist, link targets exist,
the manual stays short.

The tests parse README.md, docs/ and the other pages, so they need no change when a page changes.
"""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, complete, predict_here, write_csv
from forked import LIBRARIES
from labelled_files import load

import predict
import push_to_hub
from hierarchical_clinicalbert.training.arguments import parse

MANUAL = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*sorted(ROOT.glob("*.md")), *MANUAL[1:]]
READMES = [
    ROOT / folder / "README.md" for folder in ("examples", "metrics/hierarchical_f1", "space")
]
TABLES = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
# of these pages, as ``wc -w`` counts them
MAX_WORDS = {"README.md": 1_200, "results.md": 1_500, "speed.md": 1_000}
MAX_WORDS_OF_MANUAL = 12_000
SOURCES = ("benchmarks", "docs", "examples", "hierarchical_clinicalbert", "metrics", "space")
ROOMS = "|".join([*SOURCES, "recipes", "tests"])


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def commands(page: Path) -> list[list[str]]:
    """Return each command line of a page, from ```bash blocks and inline code, as words without
    comments.
    """
    text = "".join(blocks(page, "bash")).replace("\\\n", " ")
    inline = re.findall(r"`((?:python|make) [^`]+)`", page.read_text(encoding="utf-8"))
    return [
        words
        for line in (*text.splitlines(), *inline)
        if (words := shlex.split(line, comments=True))
    ]


def calls(page: Path) -> list[tuple[str, list[str]]]:
    """Return (script, arguments) of each Python command of a page. "...", for omitted arguments, is
    removed.
    """
    found = []
    for words in commands(page):
        start = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if start is not None and "pytest" not in words:
            found.append((words[start], [word for word in words[start + 1 :] if word != "..."]))
    return found


def flags_of(script: str) -> set[str]:
    """Return a script's flags from its source, because its imports may need other packages."""
    source = (ROOT / script).read_text(encoding="utf-8")
    flags = {*re.findall(r'add_argument\(\s*"(--\w+)"', source)}
    if script.startswith("benchmarks/"):
        # "results.json", "data", … are flags of benchmarks/harness.py: --output, --data, …
        shared = re.findall(r'"([\w.]+)"', re.search(r"flag_parser\(__doc__(.*?)\)", source)[1])
        flags |= {"--output" if name.endswith(".json") else f"--{name}" for name in shared}
    return flags


def test_the_manual_is_short():
    words = {page.name: len(page.read_text(encoding="utf-8").split()) for page in MANUAL}
    assert sum(words.values()) <= MAX_WORDS_OF_MANUAL, words
    assert not {name: words[name] for name, most in MAX_WORDS.items() if words[name] > most}
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


# docs/python.md trains with the installed package, in tests/test_package.py
SNIPPETS = [page for page in PAGES if blocks(page, "python") and page.name != "python.md"]


@pytest.mark.parametrize("page", SNIPPETS, ids=name_of)
def test_snippets_run_in_a_process_that_does_not_see_the_repository(
    page, clear_checkpoint, labels_checkpoint, tmp_path
):
    checkpoints = {"results/quickstart": clear_checkpoint, "user/name": clear_checkpoint}
    for name, checkpoint in {**checkpoints, "results/multi_label": labels_checkpoint}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(checkpoint)
    code = "\n".join(blocks(page, "python"))
    if "predictions.jsonl" in code:
        predict_probabilities(clear_checkpoint, tmp_path)
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = complete("-c", code, cwd=tmp_path, environment=settings, modules=LIBRARIES)
    assert done.returncode == 0, done.stderr[-4000:]


def predict_probabilities(checkpoint: str, folder: Path) -> list[dict]:
    """Write predictions.jsonl to a folder, and return its rows.

    In some texts, two classes are nearly as probable.
    """
    words = ("sepsis", "carcinoma", "colitis", "migraine", "stroke")
    rows = [{"text": f"We treated {one} and {other}."} for one in words for other in words]
    output = folder / "predictions.jsonl"
    source = write_csv(folder / "texts.csv", rows)
    assert (
        predict_here(
            "--model", checkpoint, "--input", source, "--output", output, "--probabilities"
        )
        == 0
    )
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_the_snippet_for_costs_of_errors_predicts_the_leaf_of_least_expected_cost(
    clear_checkpoint, tmp_path
):
    rows = predict_probabilities(clear_checkpoint, tmp_path)
    (code,) = (
        block
        for block in blocks(ROOT / "docs" / "inference.md", "python")
        if "expected_costs" in block
    )
    done = complete("-c", f"{code}\nprint(json.dumps(labels))", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    labels = json.loads(done.stdout)
    for row, label in zip(rows, labels, strict=True):
        expected_cost = {
            leaf: sum(
                probability * (10 if correct == "neoplasms" else 1)
                for correct, probability in row["probabilities"].items()
                if correct != leaf
            )
            for leaf in row["probabilities"]
        }
        assert expected_cost[label] == pytest.approx(min(expected_cost.values()), abs=1e-9)
    assert labels != [row["label"] for row in rows]


@pytest.mark.parametrize("page", [page for page in [*PAGES, *TABLES] if calls(page)], ids=name_of)
def test_commands_have_the_flags_that_pages_give_them(page, monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes are named from here
    parsers = {"train.py": parse, "predict.py": predict.parse, "push_to_hub.py": push_to_hub.parse}
    for script, words in calls(page):
        assert (ROOT / script).is_file(), script
        if "--" in words:  # of examples/ray_train.py
            words, theirs = words[: words.index("--")], words[words.index("--") + 1 :]
            parse(theirs)
        if script in parsers and words != ["--help"]:
            parsers[script](words)
        elif given := {word.split("=")[0] for word in words if word.startswith("--")} - {"--help"}:
            assert given <= flags_of(script), f"{script} {' '.join(words)}"


def test_make_has_the_targets_that_pages_name():
    targets = set(
        re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    named = {words[1] for page in PAGES for words in commands(page) if words[0] == "make"}
    assert named
    assert named <= targets


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *READMES, *TABLES], ids=name_of)
def test_links_images_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if "://" not in link and not (
            target.exists() and (not anchor or anchor in anchors(target))
        ):
            missing.append(link)
    named = re.findall(rf"(?<![\w/.*-])(?:{ROOMS})/[\w/-]+\.(?:py|yaml|csv|json|md)\b", text)
    assert not missing + [name for name in named if not (ROOT / name).is_file()]


def test_docstrings_name_benchmarks_and_pages_that_exist():
    files = [
        *ROOT.glob("*.py"),
        *(path for room in SOURCES for path in (ROOT / room).rglob("*.py")),
    ]
    pattern = re.compile(r"\b(?:benchmarks/[\w/]+\.py|docs/\w+\.md)")
    named = {
        (name_of(path), name)
        for path in files
        for name in pattern.findall(path.read_text(encoding="utf-8"))
    }
    assert named
    assert not [pair for pair in named if not (ROOT / pair[1]).is_file()]


def test_the_three_rows_of_the_readme_are_training_data(tmp_path):
    header, *rows = blocks(ROOT / "README.md", "csv")[0].splitlines()
    assert len(rows) == 3
    more = [row.replace("...", f"in {number} patients") for number in range(20) for row in rows]
    (tmp_path / "your.csv").write_text("\n".join([header, *more]), encoding="utf-8")
    data = load(data_path=tmp_path / "your.csv")
    assert set(data.splits) == {"train", "validation", "test"}
    assert {path for row in rows for path in row.rsplit(",", 1)[1].split("/")} == set(
        data.taxonomy.names
    )
