"""Test labelling: selecting the rows to label next, tasks for Label Studio, and training rows from
its export.
"""

import csv
import io
import json
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest
from conftest import CLEAR, run
from datasets import concatenate_datasets
from labelled_files import load

from predict import main

NAMES = [name for names in CLEAR.values() for name in names]
TEXTS = [
    f'We treated "{i}" patients with {NAMES[i % 30]}\nand {NAMES[i * 7 % 30]}, é.'
    for i in range(60)
]


def predict(checkpoint: str, output, texts: list[str], *words: object) -> int:
    pd.DataFrame({"text": texts}).to_csv(output.parent / "in.csv", index=False)
    words = ("--model", checkpoint, "--input", output.parent / "in.csv", "--output", output, *words)
    return main([str(word) for word in words])


def tasks_of(checkpoint: str, folder: Path, *words: object) -> list[dict]:
    assert predict(checkpoint, folder / "out.tasks.json", TEXTS, *words) == 0
    return json.loads((folder / "out.tasks.json").read_text(encoding="utf-8"))


@pytest.fixture(params=["one path", "several labels"])
def checkpoint(request, clear_checkpoint, labels_checkpoint) -> str:
    return {"one path": clear_checkpoint, "several labels": labels_checkpoint}[request.param]


def test_a_task_holds_the_text_the_row_and_the_predicted_paths(checkpoint, tmp_path):
    tasks = tasks_of(checkpoint, tmp_path, "--uncertainty")
    predict(checkpoint, tmp_path / "out.jsonl", TEXTS, "--uncertainty")
    rows = [
        json.loads(line)
        for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    view = ElementTree.fromstring(
        run("config", checkpoint, command="examples/label_studio.py").stdout
    )
    text, taxonomy = view
    choices = {(choice.get("value"),): choice for choice in taxonomy}
    for path, choice in list(choices.items()):
        choices |= {(*path, below.get("value")): below for below in choice}
    assert (view.tag, text.tag, text.get("value"), taxonomy.tag) == (
        "View",
        "Text",
        "$text",
        "Taxonomy",
    )
    for i, (task, row) in enumerate(zip(tasks, rows, strict=True)):
        assert task["data"] == {"text": TEXTS[i], **row}
        (prediction,) = task["predictions"]
        if not row["scores"]:
            assert prediction["result"] == []
            continue
        (result,) = prediction["result"]
        assert prediction["score"] == min(row["scores"])
        assert (result["type"], result["from_name"]) == ("taxonomy", taxonomy.get("name"))
        assert result["to_name"] == taxonomy.get("toName") == text.get("name")
        paths = result["value"]["taxonomy"]
        assert {tuple(path) for path in paths} <= choices.keys()
        assert [path[-1] for path in paths] == row["labels"]
    assert taxonomy.get("maxUsages") == (
        None if any(len(row["labels"]) > 1 for row in rows) else "1"
    )


def test_tasks_of_several_blocks_are_one_list_in_a_file_and_in_a_folder(clear_checkpoint, tmp_path):
    texts = [f"{TEXTS[i % 60]} {i}" for i in range(1100)]
    predict(clear_checkpoint, tmp_path / "out.tasks.json", texts)
    words = (
        "--model",
        clear_checkpoint,
        "--input",
        tmp_path / "in.csv",
        "--output_format",
        "tasks.json",
    )
    main([*map(str, words), "--output", f"{tmp_path}/tasks/"])
    for file in (tmp_path / "out.tasks.json", tmp_path / "tasks" / "part-00000.tasks.json"):
        assert [
            task["data"]["text"] for task in json.loads(file.read_text(encoding="utf-8"))
        ] == texts


def annotated(task: dict, number: int, paths: list[list[str]], **more: object) -> dict:
    """Return a task as Label Studio exports it, with the paths that an annotator chose."""
    choice = {
        "id": "x",
        "type": "taxonomy",
        "from_name": "taxonomy",
        "to_name": "text",
        "origin": "manual",
    }
    result = [{**choice, "value": {"taxonomy": paths}}] if paths else []
    old = {
        "id": 1,
        "result": [],
        "updated_at": "2026-11-01T10:00:00.000000Z",
        "was_cancelled": False,
    }
    new = {
        "id": 2,
        "result": result,
        "updated_at": "2026-11-02T10:00:00.000000Z",
        "was_cancelled": False,
        **more,
    }
    return {"id": number, "annotations": [new, old], **task}


def test_the_export_is_training_data(checkpoint, tmp_path):
    tasks = tasks_of(checkpoint, tmp_path)
    several = any(len(task["data"]["labels"]) > 1 for task in tasks)
    chosen = [["specific disease", label] if "general" not in label else [label] for label in CLEAR]
    export = []
    expected = {}
    for i, task in enumerate(tasks[:50]):
        paths = [chosen[i % 5], *([chosen[(i + 1) % 5]] if several else [])]
        expected[task["data"]["text"]] = sorted(path[-1] for path in paths)
        # some annotators also choose the parents
        export.append(
            annotated(
                task,
                i,
                [*(path[:-1] for path in paths if i % 3 == 0 and len(path) > 1), *paths, paths[0]],
            )
        )
    export.append(annotated(tasks[50], 50, [chosen[0]], was_cancelled=True))
    export[-1]["annotations"].pop()
    export.append({"id": 51, "annotations": [], **tasks[51]})
    export += [annotated(tasks[52], 52, []), annotated(tasks[53], 53, [], result=None)]
    if several:
        # an annotator said that no label applies
        expected |= {task["data"]["text"]: [] for task in tasks[52:54]}
    (tmp_path / "export.json").write_text(json.dumps(export), encoding="utf-8-sig")
    lines = run(
        "rows", checkpoint, tmp_path / "export.json", command="examples/label_studio.py"
    ).stdout
    (tmp_path / "labelled.jsonl").write_text(lines, encoding="utf-8")
    data = load(data_path=tmp_path / "labelled.jsonl")
    tree = data.taxonomy
    rows = concatenate_datasets([*data.splits.values()])
    found = {}
    for text, nodes in zip(rows["text"], rows["nodes"], strict=True):
        found[text] = sorted(tree.labels[node] for node in tree.deepest(nodes))
    assert found == expected


@pytest.mark.parametrize("output", ["out.csv", "out/"])
def test_the_rows_to_label_next_are_the_least_certain(output, clear_checkpoint, tmp_path):
    pd.DataFrame({"text": TEXTS}).to_csv(tmp_path / "in.csv", index=False)
    words = (
        "--model",
        clear_checkpoint,
        "--input",
        tmp_path / "in.csv",
        "--output",
        f"{tmp_path}/{output}",
    )
    main([*map(str, words), "--uncertainty"])
    is_file = output == "out.csv"
    table = (
        pd.read_csv(tmp_path / output)
        if is_file
        else pd.read_parquet(tmp_path / "out" / "part-00000.parquet")
    )
    best = table.nlargest(7, "uncertainty")  # of equal ones the first
    command = (tmp_path / output, "--count", 7, "--input", tmp_path / "in.csv")
    printed = [
        *csv.DictReader(
            io.StringIO(run(*command, command="examples/label_next.py").stdout, newline="")
        )
    ]
    assert [int(row["row"]) for row in printed] == best["row"].tolist()
    assert [float(row["uncertainty"]) for row in printed] == pytest.approx(
        best["uncertainty"].tolist(), abs=1e-9
    )
    assert [row["text"] for row in printed] == [TEXTS[row] for row in best["row"]]


TWO_LABELS = [
    annotated(
        {"data": {"text": "a secret"}}, 7, [["neoplasms"], ["general pathological conditions"]]
    )
]


@pytest.mark.parametrize(
    ("command", "content", "message"),
    [
        (
            "label_studio.py rows CHECKPOINT in.json",
            '["a secret"]',
            "is not an export in the format JSON",
        ),
        (
            "label_studio.py rows CHECKPOINT in.json",
            json.dumps(TWO_LABELS),
            "the task 7 has 2 labels",
        ),
        (
            "label_studio.py config .",
            "",
            "cannot read the checkpoint .: it is not a checkpoint of this project",
        ),
        (
            "label_next.py in.json --count 2",
            '[{"row": 0}]',
            "has no column uncertainty: predict with --uncertainty",
        ),
        (
            "label_next.py in.json --count 2",
            '[{"row": 1, "uncertainty": "a secret"}]',
            "must be numbers",
        ),
        ("label_next.py in.json --count 0", "[]", "--count must be at least 1, not 0"),
        (
            "label_next.py in.json --count 1 --input in.txt",
            '[{"row": 0, "uncertainty": 0.5}]',
            (
                "--input has 2 rows with a text, and there are 1 predictions: give the input of "
                "these predictions"
            ),
        ),
    ],
)
def test_an_invalid_file_is_reported_in_one_line(
    command, content, message, clear_checkpoint, tmp_path
):
    (tmp_path / "in.json").write_text(content)
    (tmp_path / "in.txt").write_text("one text\nanother\n")
    name, *words = command.replace("CHECKPOINT", clear_checkpoint).split()
    done = run(*words, command=f"examples/{name}", check=False, cwd=tmp_path)
    (line,) = done.stderr.strip().splitlines()
    assert (done.returncode, line.startswith(f"{name}: error: ")) == (2, True)
    assert message in line
    assert "secret" not in line
    assert "KeyError" not in line
