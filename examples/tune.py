"""Search for hyperparameters: ``python examples/tune.py [--trials N] -- RECIPE [--flag value
...]``.

The arguments after ``--`` are passed to train.py. Each trial trains from the same initial heads,
and is scored on the validation rows by the metric that selects the checkpoint. At the end, the
flags of the best trial are printed. Change `space` to search for other arguments of the Trainer.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train
from hierarchical_clinicalbert.errors import ArgumentParser, InputError, run_command
from hierarchical_clinicalbert.training.arguments import parse
from hierarchical_clinicalbert.training.trainer import HierarchicalTrainer


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="tune.py", description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10, help="Number of training runs.")
    parser.add_argument(
        "words", nargs="+", metavar="RECIPE", help="After --, the command line of train.py."
    )
    given = parser.parse_args(argv)
    if importlib.util.find_spec("optuna") is None:
        raise InputError("the search needs Optuna: pip install optuna")

    train.set_up_logging(True)
    trainer = train.build_trainer(*parse(given.words))
    trainer.initialise_heads()
    search(trainer, given.trials)


def space(trial: Any) -> dict[str, Any]:
    """Return the arguments of a trial."""
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 2e-3, log=True),
        "heads_learning_rate": trial.suggest_float("heads_learning_rate", 5e-4, 2e-2, log=True),
        "num_train_epochs": trial.suggest_int("num_train_epochs", 2, 8),
    }


def search(trainer: HierarchicalTrainer, trials: int) -> None:
    """Run the trials, and print the flags of the best one."""
    model = trainer.model
    metric = trainer.args.metric_for_best_model
    start = {
        name: value.detach().clone()
        for name, value in model.named_parameters()
        if value.requires_grad
    }

    def initial_model() -> Any:
        model.load_state_dict(start, strict=False)
        return model

    trainer.model_init = initial_model
    direction = "maximize" if trainer.args.greater_is_better else "minimize"
    options = {"backend": "optuna", "n_trials": trials, "direction": direction}
    best = trainer.hyperparameter_search(space, lambda scores: scores[f"eval_{metric}"], **options)
    flags = " ".join(f"--{name} {value:.3g}" for name, value in best.hyperparameters.items())
    print(f"best of {trials} trials, {metric} {best.objective:.4f}: {flags}")


if __name__ == "__main__":
    run_command("tune.py", main, train.ADVICE)
