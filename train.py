"""Trains a hierarchical classifier: ``python train.py [recipe.yaml] [--flag value …]``.

Arguments → data → model → `HierarchicalTrainer` → the checkpoint, loaded back as a user loads it → lexical head and
calibration on the validation rows → metrics and plots.
"""

import dataclasses
import gc
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path

# before it is imported: it asks for kernels from the Hub, whose code is not pinned, and warns of each 8-bit layer's cast
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import numpy as np
import torch
import transformers
from accelerate.utils import parse_flag_from_env
from accelerate.utils.memory import should_reduce_batch_size
from datasets import DatasetDict
from huggingface_hub import HfApi
from transformers import (
    AutoTokenizer,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedTokenizerBase,
    TrainerState,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from configuration_hierarchical import HierarchicalConfig
from errors import InputError, asked_traceback, exit_with_error, is_full_disk, one_line, refusing
from evaluation import plots
from evaluation.metrics import build_compute_metrics
from evaluation.report import (
    calibrate,
    collator,
    draw,
    draw_reliability,
    evaluate,
    lexical_classifier,
    log_metrics,
    per_class,
    say_gap,
    served_trainer,
    write_predictions,
)
from modeling_hierarchical import HierarchicalForSequenceClassification
from publishing import card
from publishing.environment import describe_environment
from publishing.hub import HUB_ERRORS, find_target, log_in, reason, refuse_local_encoder
from taxonomy_hierarchical import Taxonomy, TaxonomyError
from training.arguments import (
    FEW_ROWS,
    DataArguments,
    HierarchicalTrainingArguments,
    LossArguments,
    ModelArguments,
    parse,
)
from training.data import LabelledSplits, load_splits, tokenize
from training.data_report import log_report
from training.files import check_writable
from training.label_names import begin_with_label_names
from training.losses import HierarchicalFocalLoss
from training.memory import keep_memory
from training.model import build_model, fetch_checkpoint, is_checkpoint, load_tokenizer, read_config, size_report
from training.resume import (
    check_data,
    check_model,
    check_taxonomy,
    checkpoints,
    damage,
    delete_measured,
    delete_run,
    find_checkpoint,
    is_of_run,
)
from training.trained_texts import UNTRAINED, TrainedTexts, read_trained_texts, write_trained_texts
from training.trainer import HierarchicalTrainer

logger = logging.getLogger("train")

KEPT_MEMORY = (2**30, 2**31 - 1)  # of `keep_memory`; an adapter's steps are as fast without


def main(argv: list[str]) -> None:
    model_arguments, data_arguments, loss_arguments, training = parse(argv)
    set_up_logging(training)
    set_seed(training.seed)
    if (training.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")) and training.device.type == "cpu":
        raise InputError("FSDP needs GPUs; for processes on CPUs use recipes/accelerate/ddp.yaml")
    fetch_checkpoint(model_arguments)
    checkpoint = is_checkpoint(model_arguments.model_name_or_path)
    known = read_config(model_arguments.model_name_or_path).tree if checkpoint else None
    if training.do_train is None:
        training.do_train = not (training.do_eval or training.do_predict)
    if not training.do_train:
        data_arguments.validation_size = data_arguments.test_size = 0  # rows of a training file are not to be scored
    check_output_folder(training, model_arguments.model_name_or_path)
    resume_from = None
    if training.do_train:
        resume_from = find_checkpoint(training.resume_from_checkpoint, training.output_dir)
    trained_texts = trained_before(model_arguments.model_name_or_path, resume_from)
    with training.main_process_first(desc="reading the data"):
        taxonomy = known if data_arguments.taxonomy is None else None
        data = load_splits(data_arguments, training.seed, taxonomy, trained_texts)
    if training.do_train:
        run_training(model_arguments, data_arguments, loss_arguments, training, data, trained_texts, resume_from)
    else:
        if not checkpoint:
            raise InputError(
                f"--do_train false needs a trained checkpoint, which {model_arguments.model_name_or_path} is not"
            )
        if data.taxonomy != known:
            raise InputError("--taxonomy is another one than the checkpoint's; leave it out to score a checkpoint")
        score_checkpoint(model_arguments, data_arguments, training, data)


def trained_before(model: str, resume_from: str | None) -> TrainedTexts:
    """The texts that the weights were trained on with which a run, or a scoring, begins."""
    if resume_from is not None:
        return read_trained_texts(resume_from)
    if not is_checkpoint(model):
        return UNTRAINED
    found = read_trained_texts(model)
    return TrainedTexts(earlier=found.all, complete=found.complete)


def run_training(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    loss_arguments: LossArguments,
    training: HierarchicalTrainingArguments,
    data: LabelledSplits,
    trained_texts: TrainedTexts,
    resume_from: str | None,
) -> None:
    if "train" not in data.splits:
        raise InputError("no training rows: give --train_file, --data_path or --dataset_name, or --do_train false")
    if "validation" not in data.splits:
        logger.info("no validation rows: no early stopping, and the last weights are kept")
        training.eval_strategy, training.load_best_model_at_end, training.eval_on_start = "no", False, False
    elif training.load_best_model_at_end and training.eval_strategy == "no":
        raise InputError("--eval_strategy no finds no best checkpoint: give --load_best_model_at_end false too")
    compute_metrics = build_compute_metrics(data.taxonomy)
    labels = data.splits["validation"]["label"][:] if "validation" in data.splits else []
    check_best_metric(training, data.taxonomy, np.unique(labels), compute_metrics)
    if not any(loss_arguments.level_weights[: data.taxonomy.depth]):
        raise InputError(
            f"--level_weights {' '.join(map(str, loss_arguments.level_weights))}: nothing is left to train, since the "
            f"taxonomy has {data.taxonomy.depth} level{'s'[: data.taxonomy.depth > 1]}"
        )
    output, resumed_from_step = Path(training.output_dir), None
    if resume_from is not None:
        check_taxonomy(resume_from, data.taxonomy)
        check_data(resume_from, data.report)
        earlier = Path(resume_from).parent / "data_report.json"
        known = json.loads(earlier.read_text(encoding="utf-8")) if earlier.is_file() else {}
        data.report["heads_init"] = known.get("heads_init")
        resumed_from_step = TrainerState.load_from_json(str(Path(resume_from) / TRAINER_STATE_NAME)).global_step
    model = build_model(model_arguments, data.taxonomy, training.seed)
    if resume_from is not None:
        check_model(resume_from, model)
    if training.push_to_hub:
        check_hub(training, model)
    tokenizer = load_tokenizer(model_arguments, model)
    max_length = length_limit(data_arguments.max_length, tokenizer)
    tokenizer.model_max_length = max_length  # whoever loads it cuts texts where they were cut here
    with_sentences = ("train",) if loss_arguments.consistency else ()
    splits, data.report["lengths"] = tokenized(data, tokenizer, max_length, with_sentences)
    if training.should_save:
        make_folder(output)
        write_json(output / "data_report.json", data.report)
    log_report(data.report)

    counts = torch.tensor(data.taxonomy.count_at_or_below(splits["train"]["labels"][:]))
    loss_function = HierarchicalFocalLoss(
        data.taxonomy,
        counts,
        gamma=loss_arguments.focal_gamma,
        balanced=loss_arguments.class_weighting == "balanced",
        level_weights=loss_arguments.level_weights,
        label_smoothing=training.label_smoothing_factor,
    )
    settings = {
        **dataclasses.asdict(model_arguments),
        **dataclasses.asdict(loss_arguments),
        **{name: getattr(training, name) for name in card.TRAINING_SETTINGS},
        "max_length": max_length,
        "train_precision": precision(training),
    }
    continued = is_checkpoint(model_arguments.model_name_or_path)
    few_rows = len(splits["train"]) < FEW_ROWS * data.taxonomy.num_leaves
    heads_init = None if continued else model_arguments.heads_init or ("label_names" if few_rows else "random")
    settings["heads_init"] = heads_init if resume_from is None else data.report["heads_init"]
    if not model.has_adapter:
        settings |= dict.fromkeys(("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"))
    elif continued:  # which goes on with an adapter of its own
        own = model.encoder.peft_config["default"]
        settings |= {"lora_r": own.r, "lora_alpha": own.lora_alpha, "lora_dropout": own.lora_dropout}
        settings["lora_target_modules"] = sorted(own.target_modules)
    metrics: dict = {}  # until the end of the run, when the card is written again

    def write_card(folder: Path) -> None:
        card.write(
            folder,
            HierarchicalConfig.from_pretrained(folder),
            settings,
            data.report,
            metrics,
            model_id=trainer.hub_model_id,
            environment=describe_environment(training.device),
        )

    patience = training.early_stopping_patience if training.load_best_model_at_end else None
    trainer = HierarchicalTrainer(
        model=model,
        args=training,
        train_dataset=splits["train"],
        eval_dataset=splits.get("validation"),
        processing_class=tokenizer,
        data_collator=collator(tokenizer),
        compute_metrics=compute_metrics,
        callbacks=[EarlyStoppingCallback(patience)] if patience else None,
        loss_function=loss_function,
        consistency=loss_arguments.consistency,
        heads_learning_rate=training.heads_learning_rate,
        write_card=write_card,
    )
    size = size_report(model)
    log_setup(model_arguments, training, size)
    trainer.accelerator.wait_for_everyone()  # all processes have read what the former run was trained on
    if training.should_save:
        resumed = resume_from is not None and is_of_run(training.resume_from_checkpoint, output)
        if training.overwrite_output_dir and not resumed:
            delete_run(output)
            if output.resolve() != Path(model_arguments.model_name_or_path).resolve():
                # the former weights would be taken for those of this run, were it to break
                (output / "config.json").unlink(missing_ok=True)
        write_trained_texts(output, trained_texts, data.splits["train"]["text"])
    trainer.accelerator.wait_for_everyone()
    if heads_init == "label_names" and resume_from is None:
        asked = model_arguments.heads_init is not None
        if not begin_with_label_names(trainer, splits["train"], only_if_better=not asked):
            settings["heads_init"] = "random"
    data.report["heads_init"] = settings["heads_init"]  # what happened, for a run that resumes this one
    if training.should_save:
        write_json(output / "data_report.json", data.report)
    if training.device.type == "cpu" and model_arguments.tuning == "full":
        keep_memory(*KEPT_MEMORY)
    trained = trainer.train(resume_from_checkpoint=resume_from)
    trainer.save_model(_internal_call=True)  # else it is pushed here, before it is measured
    trainer.accelerator.wait_for_everyone()  # all processes load it
    metrics |= {
        **trained.metrics,
        **({"resumed_from_step": resumed_from_step} if resumed_from_step else {}),
        "train_precision": precision(training),
        "train_quantization": model_arguments.quantization,
        **size,
        "environment": {
            **describe_environment(training.device),
            "commit": source_commit(),
            "data": {
                source["split"]: source["sha256"] for source in data.report["sources"]
            },  # no paths: it is published
        },
    }
    if model_arguments.quantization != "none":
        as_trained, _ = evaluate(trainer, splits, training)
        metrics |= {f"quantized_{name}": value for name, value in as_trained.items()}
    served = served_trainer(training, data.taxonomy, tokenizer, loss_function)
    measured, logits = evaluate(served, splits, training)
    say_gap(metrics | measured)
    uncalibrated = logits
    if "validation" in logits:
        vocab_size = model.config.text_config.vocab_size
        classifier = lexical_classifier(model_arguments, data.taxonomy, splits["train"], vocab_size)
        calibrated, logits = calibrate(model, classifier, data.taxonomy, logits, splits, max_length)
        trainer.save_model(_internal_call=True)
        before = {name: measured.pop(name) for name in [*measured] if name in calibrated or name.endswith("_loss")}
        measured |= {f"uncalibrated_{name}": value for name, value in before.items()} | calibrated
    else:
        logger.info("no validation rows were scored: no lexical head, and the model's probabilities are not calibrated")
    metrics |= {**measured, **per_class(data.taxonomy, logits, splits)}
    if training.should_save:
        write_json(output / "metrics.json", metrics)
        plots.write(plots.training_curves(trainer.state.log_history), output / "plots" / "training_curves.png")
        draw(data.taxonomy, logits, splits, output / "plots")
        if logits is not uncalibrated:
            draw_reliability(uncalibrated, splits, output / "plots" / "reliability_diagram_uncalibrated.png")
        write_predictions(data, logits, splits, output)
        write_card(output)
        logger.info("checkpoint, metrics and plots are in %s", output)
    log_metrics(measured)
    if training.push_to_hub:
        push(trainer)


def check_best_metric(
    training: HierarchicalTrainingArguments,
    taxonomy: Taxonomy,
    labels: np.ndarray,
    compute_metrics: Callable[[EvalPrediction], dict[str, float]],
) -> None:
    """Raises InputError where evaluation will not measure ``--metric_for_best_model``, or it tells no model's worth.

    Args:
        labels: those that occur among the validation rows.
    """
    if not training.load_best_model_at_end:
        return
    # what is measured depends on how deep labels go, and whether some are leaves
    kinds = {(label < taxonomy.num_leaves, taxonomy.levels[label]): label for label in labels.tolist() if label >= 0}
    some = np.array([*kinds.values()], dtype=int)
    measured = compute_metrics(EvalPrediction(np.zeros((len(some), taxonomy.num_leaves)), some))
    known = ["loss", *(name for name in measured if not name.endswith("_by_chance"))]
    asked = training.metric_for_best_model
    if asked.removeprefix("eval_") not in known:
        raise InputError(
            f"--metric_for_best_model {asked} is not measured on these validation rows; it is one of {', '.join(known)}"
        )


def check_hub(training: HierarchicalTrainingArguments, model: HierarchicalForSequenceClassification) -> None:
    """Refuses, before training, what could not be published after it."""
    if model.has_adapter:
        refuse_local_encoder(model.config, "train without --push_to_hub, then run push_to_hub.py --merge")
    api = HfApi(token=training.hub_token)
    find_target(
        api,
        log_in(api),
        "--hub_model_id",
        training.hub_model_id or Path(training.output_dir).resolve().name,
        revision=training.hub_revision,
        private=bool(training.hub_private_repo),
    )


def push(trainer: HierarchicalTrainer) -> None:
    """The finished run to the Hub, as ``--push_to_hub`` asks."""
    try:
        trainer.push_to_hub()
    except HUB_ERRORS as error:
        output, target = trainer.args.output_dir, trainer.hub_model_id
        raise InputError(
            f"{output} is complete, but not on the Hub: {reason(error)}; run "
            f"push_to_hub.py --model {output} --repo_id {target}"
        ) from error
    if trainer.is_world_process_zero():
        logger.info("published as %s", trainer.hub_model_id)


def score_checkpoint(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    training: HierarchicalTrainingArguments,
    data: LabelledSplits,
) -> None:
    """Measures a finished checkpoint, as a user loads it, on labelled files."""
    if not set(data.splits) & {"validation", "test"}:
        left_out = sum(count for split, count in data.report["trained_before"]["rows"].items() if split != "train")
        if left_out:
            raise InputError(
                f"nothing to score: the checkpoint was trained on the texts of all {left_out:,} rows; give other rows"
            )
        raise InputError(
            "nothing to score: give --validation_file or --test_file; of one file, give the whole file as --test_file"
        )
    with refusing(f"cannot load the tokenizer of {model_arguments.model_name_or_path}"):
        tokenizer = AutoTokenizer.from_pretrained(model_arguments.model_name_or_path, trust_remote_code=True)
    max_length = length_limit(data_arguments.max_length, tokenizer)
    splits, data.report["lengths"] = tokenized(data, tokenizer, max_length)
    log_report(data.report)
    trainer = served_trainer(training, data.taxonomy, tokenizer, None, model_arguments.model_name_or_path)
    metrics, logits = evaluate(trainer, splits, training)
    if training.should_save:
        output = Path(training.output_dir)
        make_folder(output)
        delete_measured(output)
        write_json(output / "metrics.json", {**metrics, **per_class(data.taxonomy, logits, splits)})
        write_json(output / "data_report.json", data.report)
        draw(data.taxonomy, logits, splits, output / "plots")
        write_predictions(data, logits, splits, output)
        logger.info("metrics and plots are in %s", output)
    log_metrics(metrics)


def tokenized(
    data: LabelledSplits, tokenizer: PreTrainedTokenizerBase, max_length: int, with_sentences: Collection[str] = ()
) -> tuple[DatasetDict, dict]:
    """The splits as tokens, those to be scored sorted by length, so that batches need little padding."""
    splits, lengths = tokenize(data.splits, tokenizer, max_length, with_sentences)
    for name in splits.keys() - {"train"}:
        splits[name] = splits[name].select(np.argsort(splits[name]["length"], kind="stable"))
    return splits, lengths


def length_limit(asked: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """``--max_length``, or the encoder's limit where that is less."""
    limit = tokenizer.model_max_length
    if asked > limit:
        logger.info("--max_length %d is beyond the model's limit: texts are cut at %d tokens", asked, limit)
    return min(asked, limit)


def precision(training: HierarchicalTrainingArguments) -> str:
    return "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32"


def check_output_folder(training: HierarchicalTrainingArguments, model: str) -> None:
    """Refuse to write over a finished or started run, and to delete the model that a run starts from.

    "auto" goes on from a whole checkpoint. It begins a run where the folder holds no model yet: one that was killed early.
    """
    output = Path(training.output_dir)
    check_writable("--output_dir", output)
    if not output.is_dir():
        return
    resumable = any(damage(folder) is None for folder in checkpoints(output))
    resumes = training.do_train and is_of_run(training.resume_from_checkpoint, output)
    if resumes and (resumable or training.resume_from_checkpoint != "auto"):
        return
    if training.overwrite_output_dir:
        source = Path(model).resolve()
        if training.do_train and any(one.resolve() in (source, *source.parents) for one in checkpoints(output)):
            raise InputError(
                f"--overwrite_output_dir true would delete --model_name_or_path {model}: give another --output_dir"
            )
        return
    has_model = (output / "config.json").exists()
    if has_model and resumes:
        raise InputError(
            f"--output_dir {output} holds a model and no whole checkpoint to resume from: give another --output_dir, or "
            "--overwrite_output_dir true to train anew"
        )
    if has_model or (checkpoints(output) and not resumes):
        remedy = "another --output_dir"
        if training.do_train:
            remedy += " or --overwrite_output_dir true" + ", or --resume_from_checkpoint auto" * resumable
        raise InputError(f"--output_dir {output} already holds a run: give {remedy}")


def source_commit() -> str | None:
    """The commit of this code, with a + where files differ from it; None where it is no git checkout."""
    root = Path(__file__).parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    describe = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    done = subprocess.run(describe, capture_output=True, text=True)
    return done.stdout.strip() or None


def set_up_logging(training: HierarchicalTrainingArguments) -> None:
    first = training.process_index == 0
    logging.basicConfig(format="%(asctime)s  %(message)s", datefmt="%H:%M:%S", level=logging.WARNING, force=True)
    for name in ("train", "training", "evaluation", "publishing"):
        logging.getLogger(name).setLevel(logging.INFO if first else logging.ERROR)
    if not first:
        transformers.logging.set_verbosity_error()


def log_setup(arguments: ModelArguments, training: HierarchicalTrainingArguments, size: dict) -> None:
    logger.info(
        "device %s, precision %s, encoder %s, tuning %s", training.device, precision(training),
        arguments.quantization if arguments.quantization != "none" else "not quantized", arguments.tuning,
    )  # fmt: skip
    logger.info(
        "trained: %s of %s parameters (%.2f %%); encoder: %.1f MB, %.1f MB in float32",
        f"{size['trainable_parameters']:,}", f"{size['all_parameters']:,}", 100 * size["trainable_share"],
        size["encoder_bytes"] / 1e6, size["encoder_bytes_float32"] / 1e6,
    )  # fmt: skip


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path}: {error.strerror}") from error


def write_json(path: Path, value: dict) -> None:
    new = path.with_name(f"{path.name}.new")  # another process, or a resumed run, never reads half of it
    new.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    new.replace(path)


def failure(error: Exception) -> str | None:
    """The one line for what a user can do something about; None for what is a fault of ours."""
    if isinstance(error, (InputError, TaxonomyError)):
        return str(error)
    if is_full_disk(error):
        return f"{one_line(error)}: make room, then --resume_from_checkpoint auto goes on"
    if should_reduce_batch_size(error):
        return (
            f"{one_line(error)}; --auto_find_batch_size true finds a batch that fits and accumulates to the same size, "
            "--gradient_checkpointing true needs less memory"
        )
    # what a flag needs and requirements.txt does not have
    if isinstance(error, ImportError) and "install" in str(error):
        return one_line(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return None


if __name__ == "__main__":
    said, trace = None, ""
    try:
        main(sys.argv[1:])
    except Exception as error:
        said, trace = failure(error), asked_traceback()
        if said is None:
            raise
    if said is not None:
        gc.collect()  # the run, and its progress bars with it, which write once more
        exit_with_error("train.py", said, trace=trace)
