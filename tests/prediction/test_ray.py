"""Compare ``--ray`` with one process while drivers, workers and nodes are killed.

Skipped without Ray.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from conftest import RAY, predict_here, started, unclear_texts
from forked import Process
from safetensors.torch import load_file, save_file

from hierarchical_clinicalbert.errors import InputError

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Write a folder with three files, 4,500 rows in all, two of them unreadable."""
    folder = tmp_path_factory.mktemp("texts")
    texts = unclear_texts(4_500)
    texts[7] = texts[3_000] = ""
    for i in range(3):
        pd.DataFrame({"text": texts[i::3]}).to_csv(folder / f"{i}.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def expected(clear_checkpoint, texts, tmp_path_factory) -> Path:
    """Classify the texts in one process."""
    output = tmp_path_factory.mktemp("expected") / "out.jsonl"
    assert predict_here("--model", clear_checkpoint, "--input", texts, "--output", output) == 1
    assert sum(1 for _ in output.open()) == 4_498
    return output


def wait_for(condition: Callable[[], object], driver: Process | None = None) -> None:
    """Wait until a condition holds. Fail if the driver ends before, or minutes pass."""
    until = time.monotonic() + 300
    while not condition():
        assert driver is None or driver.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)


def num_parts(output: object) -> int:
    return len([*Path(f"{output}.parts").glob("0*.jsonl")])


def children(pid: int) -> list[tuple[int, str]]:
    """Return the process ids and command lines of a process's children."""
    lines = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True
    ).stdout
    return [(int(line.split()[0]), line) for line in lines.splitlines()]


def scorers(cluster) -> dict[int, object]:
    """Return the process ids of the actors on a cluster, with their nodes."""
    raylets = {
        node.all_processes["raylet"][0].process.pid: node for node in cluster.list_all_nodes()
    }
    return {
        pid: node
        for raylet, node in raylets.items()
        for pid, line in children(raylet)
        if "ray::Classifier" in line
    }


def test_a_node_is_killed_and_no_row_is_lost_or_doubled(
    cluster, clear_checkpoint, texts, expected, tmp_path
):
    output = tmp_path / "out.jsonl"
    words = (
        "--model",
        clear_checkpoint,
        "--input",
        texts,
        "--output",
        output,
        "--ray",
        cluster.address,
    )
    with started(*words, log=Path(os.devnull), command="predict.py") as driver:
        wait_for(lambda: num_parts(output) >= 2 and scorers(cluster), driver)
        cluster.remove_node(next(iter(scorers(cluster).values())), allow_graceful=False)
        cluster.add_node(num_cpus=1)
        assert driver.wait() == 1
    assert output.read_bytes() == expected.read_bytes()
    errors = Path(f"{output}.errors.jsonl")
    assert errors.read_bytes() == Path(f"{expected}.errors.jsonl").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {
        output.name,
        errors.name,
        f"{output.name}.summary.json",
    }


def test_a_driver_is_killed_and_its_cluster_ends_with_it(
    clear_checkpoint, texts, expected, tmp_path
):
    """Start a run with its own local Ray, with a folder as output, and resume it without Ray.

    Check rows, problems and manifest.
    """
    output = tmp_path / "out"
    words = (
        "--model",
        clear_checkpoint,
        "--input",
        texts,
        "--output",
        f"{output}/",
        "--output_format",
        "jsonl",
    )
    with started(
        *words, "--ray", "local", log=Path(os.devnull), command="predict.py", settings=RAY
    ) as driver:
        wait_for(lambda: num_parts(f"{output}/") >= 2, driver)
        ray_processes = [pid for pid, _ in children(driver.pid)]
        assert ray_processes
    assert driver.returncode == -signal.SIGKILL
    assert not (output / "manifest.json").exists()
    with pytest.raises(InputError, match="started with another batch_size"):
        predict_here(*words, "--batch_size", 3)
    assert predict_here(*words) == 1
    wait_for(lambda: not [pid for pid in ray_processes if Path(f"/proc/{pid}").exists()])
    assert (output / "part-00000.jsonl").read_bytes() == expected.read_bytes()
    problems = (output / "errors.jsonl").read_text().splitlines()
    assert problems == Path(f"{expected}.errors.jsonl").read_text().splitlines()
    manifest = json.loads((output / "manifest.json").read_text())
    assert [Path(file["name"]).name for file in manifest["input"]] == ["0.csv", "1.csv", "2.csv"]
    assert [file["bytes"] for file in manifest["input"]] == [
        file.stat().st_size for file in sorted(texts.iterdir())
    ]
    assert (manifest["rows"], manifest["problems"]) == (4_498, 2)
    assert manifest["parts"] == [{"name": "part-00000.jsonl", "rows": 4_498}]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_rows_that_kill_every_worker_are_named(cluster, clear_checkpoint, tmp_path, monkeypatch):
    """Use a checkpoint whose code ends the process at one of the texts."""
    model = shutil.copytree(clear_checkpoint, tmp_path / "model")
    code = (model / "pipeline_hierarchical.py").read_text()
    poisoned = (
        'texts.append(read_text(item, position)); item == "poison" and __import__("os")._exit(1)'
    )
    assert "texts.append(read_text(item, position))" in code
    (model / "pipeline_hierarchical.py").write_text(
        code.replace("texts.append(read_text(item, position))", poisoned)
    )
    rows = ["a fever"] * 3000
    rows[1500] = "poison"
    pd.DataFrame({"text": rows}).to_csv(tmp_path / "in.csv", index=False)
    monkeypatch.setattr("hierarchical_clinicalbert.prediction.ray_job.MAX_DEATHS", 1)
    words = ("--model", model, "--input", tmp_path / "in.csv", "--output", tmp_path / "out.jsonl")
    with pytest.raises(InputError) as error:
        predict_here(*words, "--ray", cluster.address)
    first, last = (f"{tmp_path / 'in.csv'}, line {line}" for line in (1026, 2049))
    assert str(error.value).startswith(
        f"1 workers died while they classified the rows from {first}, to {last}: "
    )
    assert "poison" not in str(error.value)
    assert "\n" not in str(error.value)


def test_actors_with_another_model_do_not_take_part(cluster, clear_checkpoint, texts, tmp_path):
    """Change the model's folder during the run, so that a new actor loads other weights."""
    model = tmp_path / "model"
    output = tmp_path / "out.jsonl"
    shutil.copytree(clear_checkpoint, model)

    def change() -> None:
        wait_for(lambda: num_parts(output) >= 1 and scorers(cluster))
        heads = model / "heads.safetensors"
        save_file(
            {name: weight.flip(0) for name, weight in load_file(heads).items()},
            heads,
            {"format": "pt"},
        )
        os.kill(next(iter(scorers(cluster))), signal.SIGKILL)

    changer = threading.Thread(target=change, daemon=True)
    changer.start()
    with pytest.raises(
        InputError,
        match=r"^node [\d.]+ has another fingerprint, \w+, not \w+: use nodes that are alike$",
    ):
        predict_here(
            "--model", model, "--input", texts, "--output", output, "--ray", cluster.address
        )
    changer.join()
    assert not output.exists()


def test_errors_are_reported_in_one_line(cluster, clear_checkpoint, texts, tmp_path, monkeypatch):
    model = shutil.copytree(clear_checkpoint, tmp_path / "model")
    heads = model / "heads.safetensors"
    heads.write_bytes(heads.read_bytes()[:-100])
    words = ("--input", texts, "--output", tmp_path / "out.jsonl", "--ray")
    for flags, message in (
        (
            (cluster.address, "--model", model),
            rf"^node [0-9.]+\b.*cannot use the model {re.escape(str(model))}: ",
        ),
        (("127.0.0.1:1",), "^--ray 127.0.0.1:1: "),
        ((cluster.address, "--model", "none"), "^cannot load the model none: "),
    ):
        with pytest.raises(InputError, match=message) as error:
            predict_here("--model", clear_checkpoint, *words, *flags)
        assert "\n" not in str(error.value)
        ray.shutdown()  # which the end of a process does
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r'--ray needs Ray: pip install "ray\[default\]"'):
        predict_here("--model", clear_checkpoint, *words)
