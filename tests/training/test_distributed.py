"""Compare training in two processes, by accelerate and by Ray, with one process of the same
effective batch size.
"""

import json
import os
import re
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import ROOT, first_rows, free_port, read_csv, run, same_weights, started
from transformers import AutoTokenizer

from hierarchical_clinicalbert.data.taxonomy_files import read_taxonomy
from hierarchical_clinicalbert.training.arguments import ModelArguments
from hierarchical_clinicalbert.training.model import build_model

STEPS = 8
RECIPES = ROOT / "recipes" / "accelerate"
ACCELERATE = Path(sys.executable).with_name("accelerate")


def launch_two_processes(*words: object, folder: Path) -> tuple[list[int | None], list[str]]:
    """Run train.py by two `accelerate launch` commands, as on two machines.

    Return their exit codes and logs.
    """
    machines = [
        "launch",
        "--config_file",
        RECIPES / "ddp.yaml",
        "--num_processes",
        2,
        "--num_machines",
        2,
    ]
    machines += [
        "--main_process_ip",
        "127.0.0.1",
        "--main_process_port",
        free_port(),
        "--machine_rank",
    ]
    logs = [folder / f"{rank}.log" for rank in range(2)]
    processes = []
    with ExitStack() as stack:
        for rank, log in enumerate(logs):
            line = (*machines, rank, ROOT / "train.py", *words)
            processes.append(stack.enter_context(started(*line, log=log, command=ACCELERATE)))
        codes = [process.wait() for process in processes]
    return codes, [log.read_text() for log in logs]


@pytest.fixture(scope="module")
def words(tiny_encoder, tmp_path_factory) -> list[object]:
    """Return the flags of a run that continues a checkpoint, up to the texts of a step.

    It has no dropout, because dropout masks depend on the number of processes. The 37 scored rows
    cannot be divided evenly.
    """
    folder = tmp_path_factory.mktemp("model")
    tree = read_taxonomy(ROOT / "examples" / "taxonomy.yaml")
    arguments = ModelArguments(tiny_encoder, quantization="none")
    model = build_model(arguments, tree, seed=0, problem_type="multi_label_classification")
    model.config.head_dropout = 0.0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(folder)
    given: list = [
        ROOT / "recipes" / "multi_label.yaml",
        "--model_name_or_path",
        folder,
        "--max_length",
        64,
    ]
    given += first_rows("multi_label", tmp_path_factory.mktemp("rows"), 160, 37, 37)
    given += [
        "--max_steps",
        STEPS,
        "--logging_steps",
        1,
        "--consistency",
        1,
        "--per_device_eval_batch_size",
        8,
    ]
    for name in ("save", "eval"):
        given += [f"--{name}_strategy", "steps", f"--{name}_steps", 4]
    return [*given, "--use_cpu", "true", "--per_device_train_batch_size"]


@pytest.fixture(scope="module")
def runs(words, tmp_path_factory) -> tuple[Path, Path]:
    """Train the same run in one process and in two. Return the folders."""
    folder = tmp_path_factory.mktemp("distributed")
    run(*words, 16, "--output_dir", folder / "one")
    codes, logs = launch_two_processes(*words, 8, "--output_dir", folder / "two", folder=folder)
    assert codes == [0, 0], "\n".join(log[-4000:] for log in logs)
    # only the first process logs
    assert "".join(logs).count("checkpoint, metrics and plots are in") == 1
    return folder / "one", folder / "two"


def test_after_a_killed_worker_of_ray_the_weights_are_those_of_an_unbroken_run(
    cluster, words, runs, tmp_path
):
    broken = tmp_path / "broken"
    log = tmp_path / "log"
    line = ["--workers", 2, "--address", cluster.address, "--", *words, 8, "--output_dir", broken]
    saved = broken / "checkpoint-4" / "trainer_state.json"
    with started(*line, log=log, until=saved, command="examples/ray_train.py") as process:
        os.kill(int(re.findall(r"RayTrainWorker pid=(\d+)", log.read_text())[0]), signal.SIGKILL)
        assert process.wait() == 0, log.read_text()[-4000:]
    assert re.search(r"worker \d failed", log.read_text())
    assert json.loads((broken / "metrics.json").read_text())["resumed_from_step"] >= 4
    assert same_weights(runs[1], broken)


def test_the_file_that_marks_a_complete_checkpoint_is_written_after_those_of_all_processes(runs):
    for folder in runs[1].glob("checkpoint-*"):
        written = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.*")}
        assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= written.keys()
        assert written["trainer_state.json"] == max(written.values())


def test_losses_and_evaluations_are_those_of_one_process_with_the_same_effective_batch(runs):
    states = [
        json.loads((run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text()) for run in runs
    ]
    one, two = (state["log_history"] for state in states)
    assert len(one) == len(two) > STEPS
    for alone, shared in zip(one, two, strict=True):
        assert shared.keys() == alone.keys()
        names = [
            name
            for name in alone
            if name in ("loss", "grad_norm", "learning_rate") or name.startswith("eval_")
        ]
        for name in names:
            if not name.endswith(("runtime", "per_second", "eval_loss")):
                assert shared[name] == pytest.approx(
                    alone[name], abs=1e-4 if name == "loss" else 2e-3
                ), name


def test_every_row_is_scored_once(runs):
    one, two = (read_csv(run / "test_predictions.csv") for run in runs)
    assert len(one) == len(two) == 37
    for alone, shared in zip(one, two, strict=True):
        for name in alone.keys() & {"row", "labels", "predictions"}:
            assert shared[name] == alone[name]
    metrics = [json.loads((run / "metrics.json").read_text()) for run in runs]
    for name, value in metrics[0].items():
        if name.startswith(("eval_", "test_")) and not name.endswith(
            ("_time", "_second", "runtime", "_loss")
        ):
            assert metrics[1][name] == pytest.approx(value, abs=1e-3), name
