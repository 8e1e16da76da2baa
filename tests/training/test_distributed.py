"""Two processes, by accelerate and gloo, against one with the same effective batch."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, first_rows, free_port, read_csv
from transformers import AutoTokenizer

from taxonomy_hierarchical import Taxonomy
from training.arguments import ModelArguments
from training.model import build_model

STEPS = 20


def train(words: list, output: Path, processes: int, batch: int, machines: int = 1) -> dict:
    """What a run leaves: its log by step, its metrics and its predictions.

    Several machines are several launchers on this one.
    """
    launch = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "recipes" / "accelerate" / "ddp.yaml"]
    launch += ["--num_processes", processes, "--main_process_port", free_port()]
    if machines > 1:
        launch += ["--num_machines", machines, "--main_process_ip", "127.0.0.1"]
    line = [ROOT / "train.py", *words, "--use_cpu", "true"]
    line += ["--output_dir", output, "--per_device_train_batch_size", batch]
    environment, launched = {**os.environ, "OMP_NUM_THREADS": "1"}, []
    logs = [output.with_name(f"{output.name}-{rank}.log") for rank in range(machines)]
    try:
        for rank, log in enumerate(logs):
            start = [*launch, "--machine_rank", rank] if processes > 1 else []
            command = [str(word) for word in (sys.executable, *start, *line)]
            with log.open("w") as errors:
                streams = {"stdout": subprocess.DEVNULL, "stderr": errors}
                launched.append(subprocess.Popen(command, **streams, env=environment, cwd=ROOT))
        while None in (codes := [machine.poll() for machine in launched]) and not any(codes):
            time.sleep(0.05)  # until all have ended, or one has failed
    finally:
        for machine in launched:
            machine.terminate()
    said = [log.read_text() for log in logs]
    assert codes == [0] * machines, "\n".join(text[-4000:] for text in said)
    state = json.loads((output / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    file = output / "test_predictions.csv"
    predictions = read_csv(file) if file.exists() else []
    metrics = json.loads((output / "metrics.json").read_text())
    return {"log": state["log_history"], "metrics": metrics, "predictions": predictions, "said": "".join(said)}


def save_model(encoder: str, folder: Path, problem_type: str | None = None) -> Path:
    """Save a checkpoint to continue, without dropout, whose masks depend on the number of processes."""
    tree = Taxonomy.from_file(ROOT / "examples" / "taxonomy.yaml")
    model = build_model(ModelArguments(encoder), tree, seed=0, problem_type=problem_type)
    model.config.head_dropout = 0.0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tiny_encoder, tmp_path_factory) -> tuple[dict, dict]:
    """The same run in one process and in two, as on two machines; 37 rows to score cannot be shared evenly."""
    folder = tmp_path_factory.mktemp("distributed")
    model = save_model(tiny_encoder, folder / "model")
    words: list = [ROOT / "recipes" / "quickstart.yaml", "--model_name_or_path", model]
    words += first_rows("corpus", folder, 160, 37, 37)
    words += ["--max_steps", STEPS, "--logging_steps", 1, "--consistency", 1, "--per_device_eval_batch_size", 8]
    for name in ("save", "eval"):
        words += [f"--{name}_strategy", "steps", f"--{name}_steps", 10]
    return train(words, folder / "one", 1, 16), train(words, folder / "two", 2, 8, machines=2)


def test_the_loss_curve_is_that_of_one_process_with_the_same_effective_batch(runs):
    one, two = ({entry["step"]: entry for entry in run["log"] if "loss" in entry} for run in runs)
    assert one.keys() == two.keys() == set(range(1, STEPS + 1))
    for step in one:
        assert two[step]["loss"] == pytest.approx(one[step]["loss"], abs=1e-4)
        assert two[step]["grad_norm"] == pytest.approx(one[step]["grad_norm"], abs=1e-3)
        assert two[step]["learning_rate"] == one[step]["learning_rate"]


def test_with_several_labels_two_processes_train_and_evaluate_as_one(tiny_encoder, tmp_path):
    model = save_model(tiny_encoder, tmp_path / "model", "multi_label_classification")
    words: list = [ROOT / "recipes" / "multi_label.yaml", "--model_name_or_path", model, "--max_length", 64]
    words += first_rows("multi_label", tmp_path, 160, 37, 37)
    words += ["--max_steps", STEPS, "--logging_steps", 1, "--consistency", 1, "--per_device_eval_batch_size", 8]
    for name in ("save", "eval"):
        words += [f"--{name}_strategy", "steps", f"--{name}_steps", 10]
    one, two = train(words, tmp_path / "one", 1, 16), train(words, tmp_path / "two", 2, 8)
    assert len(one["log"]) == len(two["log"]) > STEPS
    for alone, shared in zip(one["log"], two["log"], strict=True):
        names = [name for name in alone if name in ("loss", "grad_norm") or name.startswith("eval_")]
        for name in names:
            if not name.endswith(("runtime", "per_second", "eval_loss")):
                assert shared[name] == pytest.approx(alone[name], abs=2e-3), name


def test_every_row_is_scored_once(runs):
    one, two = runs
    assert len(two["predictions"]) == 37
    for alone, shared in zip(one["predictions"], two["predictions"], strict=True):
        assert (alone["row"], alone["label"], alone["prediction"]) == (
            shared["row"],
            shared["label"],
            shared["prediction"],
        )
        assert float(alone["probability"]) == pytest.approx(float(shared["probability"]), abs=1e-4)
    for name, value in one["metrics"].items():
        if name.startswith(("eval_", "test_")) and not name.endswith(("_time", "_second", "runtime", "_loss")):
            assert two["metrics"][name] == pytest.approx(value, abs=1e-4), name
        if name.endswith("log_loss"):
            assert two["metrics"][name] == pytest.approx(value, abs=1e-4), name


def test_only_the_first_process_speaks(runs):
    assert runs[1]["said"].count("checkpoint, metrics and plots are in") == 1


def test_fsdp_on_cpus_is_refused_and_not_replaced(tiny_encoder, tmp_path):
    """accelerate would go on without sharding; that FSDP itself works takes GPUs to show."""
    line = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    line += ["--config_file", ROOT / "recipes" / "accelerate" / "fsdp.yaml", "--main_process_port", free_port()]
    line += [ROOT / "train.py", ROOT / "recipes" / "quickstart.yaml", "--model_name_or_path", tiny_encoder]
    line += ["--use_cpu", "true", "--output_dir", tmp_path / "results"]
    done = subprocess.run([str(word) for word in line], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert "train.py: error: FSDP needs GPUs; on CPUs use recipes/accelerate/ddp.yaml" in done.stderr
    assert not (tmp_path / "results").exists()
