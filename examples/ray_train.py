"""Train on a Ray cluster: ``python examples/ray_train.py --workers N [--address ADDRESS] -- RECIPE
[--flag value ...]``.

The arguments after ``--`` are passed to train.py. Each worker runs it as one process of a
distributed run. If a worker or its node fails, Ray restarts all workers, and they resume from the
last checkpoint. See docs/distributed_training.md.
"""

import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import hierarchical_clinicalbert  # noqa: F401 - before bitsandbytes, see there

# isort: split
from transformers import Trainer, TrainerCallback

from hierarchical_clinicalbert.errors import (
    ArgumentParser,
    InputError,
    as_input_error,
    exit_with_error,
    one_line,
    run_command,
    user_error_message,
)

try:
    import ray
    from ray.train import (
        ControllerError,
        FailureConfig,
        LoggingConfig,
        RunConfig,
        ScalingConfig,
        UserCallback,
        report,
    )
    from ray.train.torch import TorchTrainer
except ImportError as error:
    exit_with_error("ray_train.py", f"{error}: pip install 'ray[default,train]'")
from hierarchical_clinicalbert.prediction.ray_job import refuse_closed_port

ADVICE = {  # of `run_command`
    "disk": "make room, and run the same command again",
    "memory": "give --activation_checkpointing true, or a lower --per_device_train_batch_size",
    "resume": "the same command resumes",
}
MAX_FAILURES = 3  # restarts of one run; after more, the same command resumes it


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="ray_train.py", description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, required=True, help="Number of training processes.")
    parser.add_argument(
        "--address", default="local", help="Ray cluster, such as auto. Default: start Ray here."
    )
    parser.add_argument(
        "--cpus_per_worker", type=int, default=1, help="Cores, and threads, of a worker."
    )
    parser.add_argument("--gpu", action="store_true", help="Give each worker one GPU.")
    parser.add_argument(
        "words", nargs="+", metavar="RECIPE", help="After --, the command line of train.py."
    )
    given = parser.parse_args(argv)

    if min(given.workers, given.cpus_per_worker) < 1:
        raise InputError("--workers and --cpus_per_worker must be at least 1")
    # the nodes of a cluster have declared their cores; a local Ray declares what the workers need
    cores = {"num_cpus": given.workers * given.cpus_per_worker} if given.address == "local" else {}
    environment = {
        "env_vars": {"PYTHONPATH": str(ROOT)},
        "worker_process_setup_hook": name_own_cluster,
    }
    with as_input_error(f"cannot use the Ray cluster {given.address}"):
        refuse_closed_port(given.address)
        ray.init(given.address, runtime_env=environment, **cores)
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={
            "folder": os.getcwd(),
            "argv": [*given.words, "--resume_from_checkpoint", "auto"],
        },
        scaling_config=ScalingConfig(
            num_workers=given.workers,
            use_gpu=given.gpu,
            resources_per_worker={"CPU": given.cpus_per_worker},
        ),
        run_config=RunConfig(
            failure_config=FailureConfig(MAX_FAILURES),
            callbacks=[ReportFailures()],
            # else each failure is shown with several tracebacks
            logging_config=LoggingConfig("CRITICAL"),
        ),
    )
    try:
        trainer.fit()
    except ControllerError as error:
        message = user_error_message(error.controller_failure, ADVICE)
        if message is None:
            raise
        raise InputError(message) from error


def name_own_cluster() -> None:
    """Set RAY_ADDRESS to this cluster.

    Ray Train could look for the run in another cluster of the machine, and end it as lost.
    """
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


def run_worker(settings: dict[str, Any]) -> None:
    """Run train.py in a worker.

    Ray has already set up the process group, with gloo or, on GPUs, NCCL.
    """
    import train

    os.chdir(settings["folder"])  # Ray starts workers in a folder of its own
    train.main(settings["argv"], prepare)


def prepare(trainer: Trainer) -> Trainer:
    """Add the callback that reports scores to Ray.

    Ray's own `prepare_trainer` only replaces the data loaders of Ray data sets.
    """
    trainer.add_callback(ReportScores())
    return trainer


class ReportScores(TrainerCallback):
    """Report each evaluation to Ray.

    Checkpoints need no report: all workers find them in ``--output_dir``.
    """

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        report(metrics)


class ReportFailures(UserCallback):
    """Print why workers failed.

    An error that the user must correct ends the run, because restarted workers would fail again.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for rank, error in worker_exceptions.items():
            print(f"worker {rank} failed: {one_line(error)}", file=sys.stderr)
        if all(user_error_message(error, ADVICE) for error in worker_exceptions.values()):
            raise next(iter(worker_exceptions.values()))


if __name__ == "__main__":
    run_command("ray_train.py", main, ADVICE)
