"""Train with two workers of Ray, one of which is killed, against two processes that run to the end."""

import importlib.util
import json
import os
import re
import signal

import pytest
from conftest import ROOT, first_rows, same_weights, started
from test_distributed import run_two_processes

SCRIPT = "examples/ray_train.py"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray[default,train]")


@pytest.fixture
def settings(tmp_path) -> dict[str, str]:
    """Return environment variables for Ray, which writes to the home folder, and starts slowly on a busy machine."""
    names = {"RAY_USAGE_STATS_ENABLED": 0, "RAY_raylet_start_wait_time_s": 300, "OMP_NUM_THREADS": 1}
    names |= {"RAY_worker_niceness": 0}  # Ray's workers would give way to all other tests
    # no processes that nobody uses, and no waiting between checks
    names |= {"RAY_prestart_worker_first_driver": 0, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": 0}
    names |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": 0.5}
    return {"HOME": str(tmp_path)} | {name: str(value) for name, value in names.items()}


def test_after_a_killed_worker_the_weights_are_those_of_an_unbroken_run(tiny_encoder, settings, tmp_path):
    words = [ROOT / "recipes" / "quickstart.yaml", "--model_name_or_path", tiny_encoder, "--use_cpu", "true"]
    words += first_rows("corpus", tmp_path, 32, 16, 16)  # 4 steps an epoch
    words += ["--max_steps", 10, "--per_device_train_batch_size", 4, "--lora_dropout", 0.1, "--consistency", 1]
    for name in ("save", "eval"):
        words += [f"--{name}_strategy", "steps", f"--{name}_steps", 2]
    words += ["--load_best_model_at_end", "false"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    codes, logs = run_two_processes(*words, "--output_dir", whole, folder=tmp_path, settings=settings)
    assert codes == [0, 0], logs[0][-4000:]
    log, saved = tmp_path / "log-ray", broken / "checkpoint-6" / "trainer_state.json"
    line = ["--workers", 2, "--", *words, "--output_dir", broken]
    with started(*line, log=log, until=saved, command=SCRIPT, settings=settings) as process:
        os.kill(int(re.findall(r"RayTrainWorker pid=(\d+)", log.read_text())[0]), signal.SIGKILL)
        assert process.wait() == 0, log.read_text()[-4000:]
    assert re.search(r"worker \d failed", log.read_text())
    resumed = json.loads((broken / "metrics.json").read_text())["resumed_from_step"]
    assert 4 <= resumed < 10
    assert same_weights(whole, broken)
