"""Compare training in two processes, by accelerate and gloo, with one process of the same effective batch size."""

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import ROOT, complete, first_rows, free_port, read_csv, server, started
from forked import COMMANDS, Process
from transformers import AutoTokenizer

from hierarchical_clinicalbert.data.taxonomy_files import read_taxonomy
from hierarchical_clinicalbert.training.arguments import ModelArguments
from hierarchical_clinicalbert.training.model import build_model
from hierarchical_clinicalbert.training.resume import find_checkpoint

STEPS = 20
RECIPES = ROOT / "recipes" / "accelerate"
LAUNCH = ("-c", "from accelerate.commands.launch import main; main()", "--config_file")


def train(words: list, output: Path, processes: int, batch: int, launchers: int = 0) -> dict:
    """Run train.py in several processes. Return the log by step, the metrics, the predictions and the output.

    Args:
        batch: rows per process and step.
        launchers: the number of `accelerate launch` commands, one per simulated machine. With 0, the processes are started
            directly, with the environment variables that `accelerate launch` would set.
    """
    line = [ROOT / "train.py", *words, "--use_cpu", "true"]
    line += ["--output_dir", output, "--per_device_train_batch_size", batch]
    port, environment = free_port(), os.environ | {"OMP_NUM_THREADS": "1"}
    if launchers:
        launch = [*LAUNCH, RECIPES / "ddp.yaml", "--num_processes", processes, "--num_machines", launchers]
        launch += ["--main_process_ip", "127.0.0.1", "--main_process_port", port, "--machine_rank"]
        starts = [([*launch, rank, *line], {}) for rank in range(launchers)]
    else:
        group = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if processes > 1 else {}
        starts = [(line, group and {**group, "RANK": rank, "LOCAL_RANK": rank}) for rank in range(processes)]
    running: list[Process] = []
    logs = [output.with_name(f"{output.name}-{rank}.log") for rank in range(len(starts))]
    try:
        for (given, settings), log in zip(starts, logs, strict=True):
            own = environment | {name: str(value) for name, value in settings.items()}
            with log.open("w") as errors, open(os.devnull, "r+") as nothing:
                streams = [nothing, nothing, errors]
                running.append(Process(server(COMMANDS), list(map(str, given)), ROOT, own, streams))
        while None in (codes := [one.poll() for one in running]) and not any(codes):
            time.sleep(0.05)  # until all have ended, or one has failed
    finally:
        for one in running:
            one.send_signal(signal.SIGTERM)
    outputs = [log.read_text() for log in logs]
    assert codes == [0] * len(starts), "\n".join(text[-4000:] for text in outputs)
    state = json.loads((output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    file = output / "test_predictions.csv"
    predictions = read_csv(file) if file.exists() else []
    metrics = json.loads((output / "metrics.json").read_text())
    return {"log": state["log_history"], "metrics": metrics, "predictions": predictions, "output": "".join(outputs)}


def save_model(encoder: str, folder: Path, problem_type: str | None = None) -> Path:
    """Save a checkpoint to continue. It has no dropout, because dropout masks depend on the number of processes."""
    tree = read_taxonomy(ROOT / "examples" / "taxonomy.yaml")
    model = build_model(ModelArguments(encoder), tree, seed=0, problem_type=problem_type)
    model.config.head_dropout = 0.0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["quickstart", "multi_label"])
def runs(request, tiny_encoder, tmp_path_factory) -> tuple[dict, dict]:
    """Train the same run in one process and in two, as on two machines. The 37 scored rows cannot be divided evenly."""
    folder, several = tmp_path_factory.mktemp("distributed"), request.param == "multi_label"
    model = save_model(tiny_encoder, folder / "model", "multi_label_classification" if several else None)
    words: list = [ROOT / "recipes" / f"{request.param}.yaml", "--model_name_or_path", model, "--max_length", 64]
    words += first_rows("multi_label" if several else "corpus", folder, 160, 37, 37)
    words += ["--max_steps", STEPS, "--logging_steps", 1, "--consistency", 1, "--per_device_eval_batch_size", 8]
    for name in ("save", "eval"):
        words += [f"--{name}_strategy", "steps", f"--{name}_steps", 10]
    return train(words, folder / "one", 1, 16), train(words, folder / "two", 2, 8, launchers=0 if several else 2)


def test_losses_and_evaluations_are_those_of_one_process_with_the_same_effective_batch(runs):
    one, two = (run["log"] for run in runs)
    assert len(one) == len(two) > STEPS
    for alone, shared in zip(one, two, strict=True):
        assert shared.keys() == alone.keys()
        names = [name for name in alone if name in ("loss", "grad_norm", "learning_rate") or name.startswith("eval_")]
        for name in names:
            if not name.endswith(("runtime", "per_second", "eval_loss")):
                assert shared[name] == pytest.approx(alone[name], abs=1e-4 if name == "loss" else 2e-3), name


def test_every_row_is_scored_once(runs):
    one, two = runs
    assert len(one["predictions"]) == len(two["predictions"]) == 37
    for alone, shared in zip(one["predictions"], two["predictions"], strict=True):
        assert [shared[name] for name in ("row", "label", "prediction") if name in alone] == [
            alone[name] for name in ("row", "label", "prediction") if name in alone
        ]
    for name, value in one["metrics"].items():
        if name.startswith(("eval_", "test_")) and not name.endswith(("_time", "_second", "runtime", "_loss")):
            assert two["metrics"][name] == pytest.approx(value, abs=1e-3), name


def test_only_the_first_process_logs(runs):
    assert runs[1]["output"].count("checkpoint, metrics and plots are in") == 1


def test_fsdp_on_cpus_is_refused_and_not_replaced(tiny_encoder, tmp_path):
    """Otherwise accelerate would continue without sharding. FSDP itself can be tested only on GPUs."""
    line = [*LAUNCH, RECIPES / "fsdp.yaml", "--num_processes", 1, "--main_process_port", free_port()]
    line += [ROOT / "train.py", ROOT / "recipes" / "quickstart.yaml", "--model_name_or_path", tiny_encoder]
    done = complete(*line, "--use_cpu", "true", "--output_dir", tmp_path / "results")
    assert done.returncode != 0
    assert "train.py: error: FSDP needs GPUs; on CPUs use recipes/accelerate/ddp.yaml" in done.stderr
    assert not (tmp_path / "results").exists()


@pytest.fixture
def pair(tiny_encoder, tmp_path) -> Iterator[Callable]:
    """Yield a function that starts two processes of a run with further flags, and returns them and their logs."""
    with ExitStack() as stack:

        def start(*flags: object) -> tuple[list[Process], list[Path]]:
            group = {
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port()),
                "OMP_NUM_THREADS": "1",
            }
            logs = [tmp_path / f"{rank}.log" for rank in range(2)]
            processes = []
            for rank, log in enumerate(logs):
                own = group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(stack.enter_context(started(*flags, log=log, settings=own)))
            return processes, logs

        yield start


def run_words(encoder: str, folder: Path) -> list[object]:
    words: list = ["--model_name_or_path", encoder, "--use_cpu", "true", "--output_dir", folder / "results"]
    return words + first_rows("corpus", folder, 64, 16, 16)


def test_all_processes_end_if_another_run_writes_the_folder(tiny_encoder, pair, tmp_path):
    words = run_words(tiny_encoder, tmp_path)
    with started(*words, log=tmp_path / "alone", until=tmp_path / "results" / "data_report.json") as alone:
        alone.send_signal(signal.SIGSTOP)
        processes, logs = pair(*words)
        assert [process.wait() for process in processes] == [2, 2], logs[1].read_text()[-4000:]
    for log in logs:
        assert "results: another process is writing it" in log.read_text().splitlines()[-1]
        assert "Traceback" not in log.read_text()


def test_sigterm_to_one_process_makes_all_save_at_the_same_step_and_end(tiny_encoder, pair, tmp_path):
    words = run_words(tiny_encoder, tmp_path)
    words += ["--max_steps", 5000, "--per_device_train_batch_size", 4, "--enable_jit_checkpoint", "true"]
    words += ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
    processes, logs = pair(*words)
    while "step 10 of 5000" not in logs[0].read_text():
        assert [process.poll() for process in processes] == [None, None], logs[0].read_text()[-4000:]
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    assert [process.wait() for process in processes] == [2, 2], logs[0].read_text()[-4000:]
    steps = [re.findall(r"stopped by SIGTERM after (\d+) of 5000 steps", log.read_text()) for log in logs]
    assert len(steps[0]) == 1
    assert steps[0] == steps[1]
    assert find_checkpoint("auto", str(tmp_path / "results")) == str(tmp_path / "results" / f"checkpoint-{steps[0][0]}")
