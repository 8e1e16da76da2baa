"""Train with two workers of Ray, one of which is killed, against two processes that run to the end."""

import importlib.util
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from conftest import CORPUS, ROOT, read_csv, start, write_csv
from safetensors.torch import load_file
from test_distributed import free_port

SCRIPT = ROOT / "examples" / "ray_train.py"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray[default,train]")


@pytest.fixture
def settings(tmp_path) -> dict[str, str]:
    """Environment of Ray, which writes to the home folder, and takes long to start on a busy machine."""
    names = {"RAY_USAGE_STATS_ENABLED": 0, "RAY_raylet_start_wait_time_s": 300, "OMP_NUM_THREADS": 1}
    return {"HOME": str(tmp_path)} | {name: str(value) for name, value in names.items()}


def wait(process, log: Path) -> None:
    assert process.wait() == 0, log.read_text()[-4000:]


def test_after_a_killed_worker_the_weights_are_those_of_an_unbroken_run(tiny_encoder, settings, tmp_path):
    words = [ROOT / "recipes" / "quickstart.yaml", "--model_name_or_path", tiny_encoder, "--use_cpu", "true"]
    for split, count in (("train", 64), ("validation", 16), ("test", 16)):
        words += [f"--{split}_file", write_csv(tmp_path / f"{split}.csv", read_csv(CORPUS / f"{split}.csv")[:count])]
    words += ["--max_steps", 16, "--per_device_train_batch_size", 4, "--lora_dropout", 0.1, "--consistency", 1]
    for name in ("save", "eval"):
        words += [f"--{name}_strategy", "steps", f"--{name}_steps", 2]
    words += ["--load_best_model_at_end", "false"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    # ── Two processes, as a launcher starts them ─────────────────────────────────────────────────────────────────────
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes, logs = [], [tmp_path / f"log-{rank}" for rank in range(2)]
    for rank, log in enumerate(logs):
        environment = settings | launched | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as output:
            line = [ROOT / "train.py", *words, "--output_dir", whole]
            processes.append(start(*line, output=output, settings=environment))
    for process, log in zip(processes, logs, strict=True):
        wait(process, log)

    # ── Two workers of Ray ───────────────────────────────────────────────────────────────────────────────────────────
    log = tmp_path / "log-ray"
    with log.open("w") as output:
        line = [SCRIPT, "--workers", 2, "--", *words, "--output_dir", broken]
        process = start(*line, output=output, settings=settings)
    while process.poll() is None and not (broken / "checkpoint-4" / "trainer_state.json").exists():
        time.sleep(0.01)
    os.kill(int(re.findall(r"RayTrainWorker pid=(\d+)", log.read_text())[0]), signal.SIGKILL)
    wait(process, log)
    assert "worker 0 failed" in log.read_text()
    resumed = json.loads((broken / "metrics.json").read_text())["resumed_from_step"]
    assert 2 <= resumed < 16
    for name in ("heads.safetensors", "adapter/adapter_model.safetensors"):
        expected, weights = load_file(whole / name), load_file(broken / name)
        assert expected.keys() == weights.keys()
        assert all(weights[key].equal(expected[key]) for key in expected), name


def test_an_error_of_the_user_is_one_line_and_restarts_no_worker(tiny_encoder, settings, tmp_path):
    log = tmp_path / "log"
    with log.open("w") as output:
        line = [SCRIPT, "--workers", 1, "--", "--model_name_or_path", tiny_encoder, "--train_file", "missing.csv"]
        process = start(*line, "--output_dir", tmp_path / "results", output=output, settings=settings)
    assert process.wait() == 2
    said = log.read_text()
    assert "ray_train.py: error: cannot read missing.csv: No such file or directory" in said.splitlines()
    assert "Traceback" not in said
    assert len(set(re.findall(r"RayTrainWorker pid=(\d+)", said))) == 1
