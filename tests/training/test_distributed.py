"""Compare training in two processes, by accelerate and gloo, with one process of the same effective batch size."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import ROOT, first_rows, free_port, read_csv, run, started
from transformers import AutoTokenizer

from hierarchical_clinicalbert.data.taxonomy_files import read_taxonomy
from hierarchical_clinicalbert.training.arguments import ModelArguments
from hierarchical_clinicalbert.training.model import build_model

STEPS = 8
RECIPES = ROOT / "recipes" / "accelerate"
ACCELERATE = Path(sys.executable).with_name("accelerate")


def run_two_processes(
    *words: object, folder: Path, launches: bool = False, settings: dict[str, str] | None = None
) -> tuple[list[int | None], list[str]]:
    """Run train.py in two processes. Return their exit codes and logs.

    The processes have the environment variables that a launcher sets. If it ``launches``, two `accelerate launch` commands
    start one process each, as on two machines.
    """
    address, port = "127.0.0.1", str(free_port())
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": port, "OMP_NUM_THREADS": "1"} | (settings or {})
    machines = ["launch", "--config_file", RECIPES / "ddp.yaml", "--num_processes", 2, "--num_machines", 2]
    machines += ["--main_process_ip", address, "--main_process_port", port, "--machine_rank"]
    logs, processes = [folder / f"{rank}.log" for rank in range(2)], []
    with ExitStack() as stack:
        for rank, log in enumerate(logs):
            if launches:
                one = started(*machines, rank, ROOT / "train.py", *words, log=log, command=ACCELERATE)
            else:
                one = started(*words, log=log, settings=group | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            processes.append(stack.enter_context(one))
        codes = [process.wait() for process in processes]
    return codes, [log.read_text() for log in logs]


@pytest.fixture(scope="module")
def runs(tiny_encoder, tmp_path_factory) -> tuple[Path, Path]:
    """Train the same run in one process and in two. The 37 scored rows cannot be divided evenly. Return the folders.

    They continue a checkpoint without dropout, because dropout masks depend on the number of processes.
    """
    folder = tmp_path_factory.mktemp("distributed")
    tree = read_taxonomy(ROOT / "examples" / "taxonomy.yaml")
    model = build_model(ModelArguments(tiny_encoder), tree, seed=0, problem_type="multi_label_classification")
    model.config.head_dropout = 0.0
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(folder / "model")
    words: list = [ROOT / "recipes" / "multi_label.yaml", "--model_name_or_path", folder / "model", "--max_length", 64]
    words += first_rows("multi_label", folder, 160, 37, 37)
    words += ["--max_steps", STEPS, "--logging_steps", 1, "--consistency", 1, "--per_device_eval_batch_size", 8]
    for name in ("save", "eval"):
        words += [f"--{name}_strategy", "steps", f"--{name}_steps", 4]
    words += ["--use_cpu", "true", "--per_device_train_batch_size"]
    run(*words, 16, "--output_dir", folder / "one")
    codes, logs = run_two_processes(*words, 8, "--output_dir", folder / "two", folder=folder, launches=True)
    assert codes == [0, 0], "\n".join(log[-4000:] for log in logs)
    assert "".join(logs).count("checkpoint, metrics and plots are in") == 1  # only the first process logs
    return folder / "one", folder / "two"


def test_losses_and_evaluations_are_those_of_one_process_with_the_same_effective_batch(runs):
    states = [json.loads((run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text()) for run in runs]
    one, two = (state["log_history"] for state in states)
    assert len(one) == len(two) > STEPS
    for alone, shared in zip(one, two, strict=True):
        assert shared.keys() == alone.keys()
        names = [name for name in alone if name in ("loss", "grad_norm", "learning_rate") or name.startswith("eval_")]
        for name in names:
            if not name.endswith(("runtime", "per_second", "eval_loss")):
                assert shared[name] == pytest.approx(alone[name], abs=1e-4 if name == "loss" else 2e-3), name


def test_every_row_is_scored_once(runs):
    one, two = (read_csv(run / "test_predictions.csv") for run in runs)
    assert len(one) == len(two) == 37
    for alone, shared in zip(one, two, strict=True):
        for name in alone.keys() & {"row", "labels", "predictions"}:
            assert shared[name] == alone[name]
    metrics = [json.loads((run / "metrics.json").read_text()) for run in runs]
    for name, value in metrics[0].items():
        if name.startswith(("eval_", "test_")) and not name.endswith(("_time", "_second", "runtime", "_loss")):
            assert metrics[1][name] == pytest.approx(value, abs=1e-3), name
