"""What users do on one device: ``python stories.py DEVICE DATA STORY [ARGUMENT …]``.

Outputs go to the current folder. DATA is the folder that `test_stories.data` writes. The last line
printed is a JSON object: all numbers and labels that commands, models and pipelines returned.
"""

import csv
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import AutoModel, AutoTokenizer, Trainer, TrainerCallback, pipeline

import predict
import train as train_command
from hierarchical_clinicalbert.training import model as training_model

DEVICE, DATA, STORY, *ARGUMENTS = sys.argv[1:]
TEXTS = f"{DATA}/texts.csv"
COMPARABLE = [  # flags of a run that computes the same on all devices
    *("--quantization", "none", "--bf16", "false", "--dataloader_pin_memory", "false"),
    *("--logging_steps", 1, "--use_cpu", "true" if DEVICE == "cpu" else "false"),
]
STEPS = [  # flags of a run that is evaluated and saved every second step
    *("--learning_rate", 3e-4, "--eval_strategy", "steps", "--eval_steps", 2),
    *("--save_strategy", "steps", "--save_steps", 2),
]
NEW = ["--model_name_or_path", f"{DATA}/encoder"]  # a new classifier
VARYING = ("_runtime", "_per_second", "_time", "environment")  # endings of metrics of the machine
COMPARED = ("loss", "grad_norm", "learning_rate")  # endings of what the Trainer logs

if DEVICE == "pretend":
    import pretend

    os.environ["ACCELERATE_TORCH_DEVICE"] = pretend.DEVICE
    os.environ["USE_HUB_KERNELS"] = "0"  # transformers uses these by default; none is for it
training_model.HEAD_DROPOUT = 0.0  # a GPU draws other numbers than a CPU


# ── Doors ─────────────────────────────────────────────────────────────────────────────────────────


def train(output: str, *flags: object, callback: TrainerCallback | None = None) -> dict[str, Any]:
    """Run train.py. Return its losses, its metrics, and its predictions of test rows if it has any.

    Args:
        output: the output folder.
        callback: of the Trainer.
    """
    trainers: list[Trainer] = []  # none, where a checkpoint is scored

    def keep(trainer: Trainer) -> Trainer:
        trainers.append(trainer)
        if callback is not None:
            trainer.add_callback(callback)
        return trainer

    train_command.main([*map(str, ["--output_dir", output, *COMPARABLE, *flags])], keep)
    for trainer in trainers:
        assert {weight.device.type for weight in trainer.model.state_dict().values()} == {DEVICE}
    logged = [entry for trainer in trainers for entry in trainer.state.log_history]
    metrics = json.loads(Path(output, "metrics.json").read_text())
    predictions = Path(output, "test_predictions.csv")
    return {
        "losses": [[entry[name] for name in entry if name.endswith(COMPARED)] for entry in logged],
        "metrics": {name: metrics[name] for name in metrics if not name.endswith(VARYING)},
        "predictions": read_csv(predictions) if predictions.exists() else [],
    }


def classify(checkpoint: str, is_calibrated: bool = True) -> dict[str, Any]:
    """Classify the texts of ``texts.csv`` by `AutoModel`, both pipelines and predict.py."""
    texts = [row["text"][0] for row in read_csv(TEXTS)]
    trusted = {"trust_remote_code": True}

    # ── AutoModel ─────────────────────────────────────────────────────────────────────────────────
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, **trusted)
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(DEVICE)
    moved = AutoModel.from_pretrained(checkpoint, **trusted).to(DEVICE)
    mapped = AutoModel.from_pretrained(checkpoint, **trusted, device_map=DEVICE)
    with torch.inference_mode():
        outputs = [model(**inputs) for model in (moved, mapped)]

    # ── Pipelines ─────────────────────────────────────────────────────────────────────────────────
    own, stock = (
        pipeline(task, checkpoint, **trusted, device=DEVICE)
        for task in ("hierarchical-text-classification", "text-classification")
    )
    assert own.model.device.type == stock.model.device.type == DEVICE
    sets = {own.decisions.guarantee: 0.9} if is_calibrated else {}

    # ── predict.py ────────────────────────────────────────────────────────────────────────────────
    predictions = f"{checkpoint}.jsonl"
    words = ["--model", checkpoint, "--input", TEXTS, "--output", predictions, "--dtype", "fp32"]
    words += ["--probabilities", "--uncertainty"]
    words += [str(word) for name, share in sets.items() for word in (f"--{name}", share)]
    assert predict.main(words) == 0
    summary = json.loads(Path(f"{predictions}.summary.json").read_text())
    assert (summary["options"]["device"] == "cpu") == (DEVICE == "cpu")
    return {
        "models": [output.node_log_probs.exp().tolist() for output in outputs],
        "own": own(texts, levels=True, **sets),
        "prior": own.estimate_prior(texts) if is_calibrated else [],
        "stock": stock(texts, top_k=None, truncation=True),
        "predict.py": [*map(json.loads, Path(predictions).read_text().splitlines())],
    }


def read_csv(path: str | Path) -> list[dict[str, list[float | str]]]:
    """Read rows. A value is the list of numbers or texts between its semicolons."""

    def read(value: str) -> float | str:
        try:
            return float(value)
        except ValueError:
            return value

    with open(path, encoding="utf-8", newline="") as file:
        rows = [*csv.DictReader(file)]
    return [{name: [*map(read, row[name].split("; "))] for name in row} for row in rows]


def files(form: str, *splits: str) -> list[str]:
    """Return the flags for the taxonomy, and for the files of these splits."""
    flags = ["--taxonomy", f"{DATA}/tree.json"]
    if "many_nodes" in form:
        flags += ["--label_delimiter", ";"]
    for split in splits:
        flags += [f"--{split}_file", f"{DATA}/{form}_{split}.csv"]
    return flags


# ── Stories ───────────────────────────────────────────────────────────────────────────────────────


def trained(form: str, pooling: str) -> dict[str, Any]:
    """Train with evaluations, keep the best checkpoint, calibrate, score and classify."""
    loss = ["--focal_gamma", 1, "--class_weighting", "balanced", "--label_smoothing_factor", 0.1]
    flags = ["--pooling", pooling, "--max_steps", 4, *files(form, "train", "validation", "test")]
    return train("results", *NEW, *STEPS, *loss, *flags) | classify("results")


def few_rows(form: str) -> dict[str, Any]:
    """Train the encoder contrastively, set prototypes, then train on the halves of texts."""
    flags = ["--contrastive_steps", 2, "--heads_init", "prototypes", "--consistency", 1]
    flags += ["--max_steps", 2, *files(form, "train", "validation", "test")]
    return train("results", *NEW, *STEPS, *flags)


def no_rows() -> dict[str, Any]:
    """Set heads from the names of classes, or also from unlabelled texts. Then remove nodes."""
    texts = ["--unlabelled_file", TEXTS]
    several = [*texts, "--problem_type", "multi_label_classification"]
    found = {
        "names": train("names", *NEW, *files("one_path", "test")),
        "several": train("several", *NEW, *files("many_nodes", "test"), *several),
        "texts": train("texts", *NEW, *files("one_path", "test"), *texts),
        "classified": classify("texts", is_calibrated=False),
    }
    model = AutoModel.from_pretrained("texts", trust_remote_code=True).to(DEVICE)
    model.add_nodes(model.config.tree.labels[2:5])
    outputs = model(torch.arange(100, 120, device=DEVICE)[None])
    return found | {"fewer nodes": outputs.node_log_probs.exp().tolist()}


def taught(form: str) -> dict[str, Any]:
    """Learn from a teacher's probabilities in a file, also for texts without labels."""
    teacher = f"{DATA}/{form}_teacher.csv"
    flags = ["--teacher", teacher, "--unlabelled_file", teacher, "--max_steps", 2]
    return train("results", *NEW, *STEPS, *flags, *files(form, "train", "validation", "test"))


def long_texts(form: str, pooling: str) -> dict[str, Any]:
    """Train and classify texts of ten windows. The encoder reads a training batch in two parts."""
    flags = ["--max_length", 2048, "--per_device_train_batch_size", 8, "--pooling", pooling]
    flags += ["--max_steps", 2, *files(f"long_{form}", "train", "validation", "test")]
    return train("results", *NEW, *STEPS, *flags) | classify("results")


def continued() -> dict[str, Any]:
    """Score a checkpoint on other rows, and continue it with a new class, at first untrained."""
    start = ["--model_name_or_path", "first", "--test_file", f"{DATA}/one_path_test.csv"]
    grown = [*start, "--taxonomy", f"{DATA}/grown.json"]
    untrained = ["--num_train_epochs", 0, "--train_file", f"{DATA}/new_train.csv"]
    steps = ["--max_steps", 2, "--train_file", f"{DATA}/grown_train.csv"]
    steps += ["--validation_file", f"{DATA}/one_path_other.csv"]
    first = ["--max_steps", 2, *files("one_path", "train", "validation")]
    return {
        "first": train("first", *NEW, *STEPS, *first),
        "scored": train("scored", *start, "--do_train", "false"),
        "untrained": train("untrained", *grown, *untrained),
        "trained": train("trained", *grown, *STEPS, *steps),
        "classified": classify("trained"),
    }


def resumed() -> dict[str, Any]:
    """Train all weights, break off after the third step, and resume."""

    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    flags = [*NEW, *STEPS, "--tuning", "full", "--max_steps", 6]
    flags += files("one_path", "train", "validation", "test")
    with suppress(KeyboardInterrupt):
        train("results", *flags, callback=Break())
    found = train("results", *flags, "--resume_from_checkpoint", "auto")
    assert found["metrics"]["resumed_from_step"] == 2
    return found | classify("results")


if __name__ == "__main__":
    print(json.dumps(globals()[STORY](*ARGUMENTS)))
