"""Train a hierarchical classifier from rows to a published checkpoint.

Worth knowing:

1. The model in training may be quantized or sharded. Scores are those of the saved checkpoint, as a
   user loads it, over a full-precision encoder.
2. The validation rows select the checkpoint. Then its calibration, its thresholds and the weight of
   its lexical head are fitted on them.
3. The Trainer of transformers would push every file of a folder, possibly in several commits, and
   rewrite README.md. Here a push is one commit with a checkpoint's files and this project's card.
   States to resume from are pickles, and are not pushed: the strategies ``checkpoint`` and
   ``all_checkpoints`` are ``every_save``. Training waits for each push.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import CommitInfo, HfApi
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import HubStrategy, TrainOutput

from checkpoint_hierarchical import project
from configuration_hierarchical import Calibration, HierarchicalConfig
from decisions_hierarchical import DEFAULT_THRESHOLD
from hierarchical_clinicalbert.checkpoint_files import (
    METRICS,
    is_checkpoint,
    published_files,
    read_config,
)
from hierarchical_clinicalbert.data.report import log_report
from hierarchical_clinicalbert.data.rows import read_rows
from hierarchical_clinicalbert.data.splits import LabelledSplits
from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.evaluation import plots
from hierarchical_clinicalbert.evaluation.calibration import compose
from hierarchical_clinicalbert.evaluation.forms import form_of
from hierarchical_clinicalbert.evaluation.metrics import PREFIXES, Predictions
from hierarchical_clinicalbert.evaluation.open_world import with_references
from hierarchical_clinicalbert.evaluation.report import (
    ScoredSplit,
    calibrate_splits,
    class_scores,
    log_metrics,
    log_removed,
    measure,
    measure_sets,
    measure_strange_texts,
    write_scores,
)
from hierarchical_clinicalbert.files import write_json
from hierarchical_clinicalbert.machine import keep_memory
from hierarchical_clinicalbert.publishing import card
from hierarchical_clinicalbert.publishing.fingerprint import write_fingerprint
from hierarchical_clinicalbert.publishing.hub import Target, publish
from hierarchical_clinicalbert.training import prototypes, resume
from hierarchical_clinicalbert.training.arguments import (
    HierarchicalTrainingArguments,
    fit_to_data,
    takes_steps,
)
from hierarchical_clinicalbert.training.cpu import KEPT_MEMORY
from hierarchical_clinicalbert.training.loop import TrainingLoop
from hierarchical_clinicalbert.training.model import load_tokenizer, size_report
from hierarchical_clinicalbert.training.publish import (
    check_hub,
    describe_page,
    quantization_of,
    run_facts,
    run_settings,
)
from hierarchical_clinicalbert.training.score import (
    fit_lexical_head,
    learn_known_texts,
    load_scored,
    replace_scores,
    score_rows,
)
from hierarchical_clinicalbert.training.tokens import tokenize_splits

logger = logging.getLogger(__name__)

SIZES = (  # of `size_report`
    "trained: {trainable_parameters:,} of {all_parameters:,} parameters; "
    "encoder: {encoder_bytes:,} bytes, {encoder_bytes_float32:,} in float32"
)


class HierarchicalTrainer(TrainingLoop):
    """A Trainer whose `train` makes a calibrated and described checkpoint.

    Rows are a `datasets.Dataset`, a pandas DataFrame or a list of dicts, with a text and its labels
    as people write them. They are checked and mapped to nodes of the model's taxonomy, see
    `read_rows`. Tokenized rows (`training.tokens`) are also taken: for these, `train` takes the
    steps alone, and no card is written.

    Args:
        model: of `build_model`, or a loaded checkpoint.
        args: the settings of the run.
        train_dataset, eval_dataset: rows.
        processing_class: the tokenizer. By default, that of the model's encoder or checkpoint.
        data: what `read_rows` returned, in place of the two sets of rows. Its test rows are scored
            at the end of training.
        column_mapping: see `read_rows`.
        max_length: of a text in tokens, where ``processing_class`` is not given. See
            `load_tokenizer`.
        loss_function: by default the `FocalLoss` that the arguments describe, with the class
            frequencies of the training rows.
        callbacks: of transformers. Early stopping is added, if the arguments ask for it.
        kwargs: further arguments of the Trainer of transformers.

    Attributes:
        scored: what the saved checkpoint said of the rows of each split.
        scores: their metrics, as in metrics.json.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: HierarchicalTrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        data: LabelledSplits | None = None,
        column_mapping: Mapping[str, str] | None = None,
        max_length: int | None = None,
        loss_function: nn.Module | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs: Any,
    ):
        config = model.config
        self.form = form_of(config.tree, config.problem_type)
        self.columns = column_mapping
        self.checkpoint: PreTrainedModel | None = None  # the saved model, loaded as users load it
        self.folder = model.name_or_path  # of the checkpoint that is scored; empty for an encoder
        self.scored: dict[str, ScoredSplit] = {}
        self.scores: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}  # of the run, for metrics.json
        self.heads_init: str | None = None
        self.untrained: list[str] = []  # labels of classes that no step trained
        if args.push_to_hub:
            check_hub(args, model)

        # what the model offered before, to say what training removes
        is_stored = bool(self.folder) and is_checkpoint(self.folder)
        self.earlier = read_config(self.folder) if is_stored else deepcopy(config)
        start = self.folder or config.encoder_name_or_path

        # ── Rows ──────────────────────────────────────────────────────────────────────────────────
        given = {"train": train_dataset, "validation": eval_dataset}
        splits = {name: rows for name, rows in given.items() if rows is not None}
        if data is None and any(has_texts(rows) for rows in splits.values()):
            data = read_rows(
                splits,
                config.tree,
                column_mapping=column_mapping,
                problem_type=config.problem_type,
                validation_size=0,
                trained=resume.read_earlier_texts(start or config.encoder_name_or_path, None, None),
            )
        self.report: dict[str, Any] = {}
        if processing_class is None and start:
            processing_class = load_tokenizer(model, max_length)
        if data is not None:
            tokenized, lengths = tokenize_splits(
                data.splits, processing_class, args.consistency > 0
            )
            log_report(data.report, lengths)
            self.report = data.report | {"lengths": lengths}
            splits = dict(tokenized)
        self.data = data
        self.splits = splits

        # ── Trainer ───────────────────────────────────────────────────────────────────────────────
        config.page = describe_page(args, config)
        super().__init__(
            model,
            fit_to_data(args, splits, self.form),
            splits.get("train"),
            splits.get("validation"),
            processing_class,
            loss_function=loss_function,
            callbacks=callbacks,
            **kwargs,
        )
        self.size = size_report(self.model)

    @property
    def takes_steps(self) -> bool:
        """Whether `train` takes steps; else it only sets the heads of new nodes."""
        return takes_steps(self.args, self.splits)

    @property
    def scored_model(self) -> PreTrainedModel:
        """The saved checkpoint, or without one the model itself."""
        return self.model if self.checkpoint is None else self.checkpoint

    # ── The phases ────────────────────────────────────────────────────────────────────────────────

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, **kwargs: Any
    ) -> TrainOutput:
        """Initialise new heads, take the steps, save, score, calibrate, and write the card.

        ``do_eval`` false leaves out the calibration, and ``do_predict`` false the scores of test
        rows. A trial of `hyperparameter_search` takes the steps alone.

        Args:
            resume_from_checkpoint: a folder ``checkpoint-N``; True or "auto" for the last one of
                the run, if there is one.
        """
        if self.data is None or trial is not None:
            return super().train(resume_from_checkpoint, trial=trial, **kwargs)
        checkpoint = None
        if resume_from_checkpoint:
            wanted = "auto" if resume_from_checkpoint is True else resume_from_checkpoint
            checkpoint = resume.find_checkpoint(wanted, self.args.output_dir)
        self.start(checkpoint)
        result = super().train(checkpoint, **kwargs)
        self.save_and_load()

        # ── Score and calibrate ───────────────────────────────────────────────────────────────────
        validation = self.splits.get("validation") if self.args.do_eval is not False else None
        if validation is not None and quantization_of(self.model) != "none":
            self.scores = self.predict(validation, metric_key_prefix="quantized_eval").metrics
        self.score_splits()
        is_calibrated = bool(self.scored_model.config.calibration.scales)
        if validation is not None and not is_calibrated:
            self.calibrate()
        else:
            self.save_with_self_test()
        if validation is None and not is_calibrated:
            logger.info(
                "no validation rows were scored: no lexical head, and the model's "
                "probabilities are not calibrated"
            )

        basis = "its earlier weights" if self.takes_steps else "its earlier taxonomy"
        log_removed(self.form, self.earlier, self.model.config, basis)

        # ── Card ──────────────────────────────────────────────────────────────────────────────────
        self.facts = result.metrics | {"best_epoch": self.best_epoch}
        self.facts |= self.size | run_facts(self, self.data.report)
        self.write_card()
        log_metrics(self.form, self.scores, self.scored)
        return result

    def initialise_heads(self) -> str | None:
        """Initialise the heads of new nodes as ``heads_init`` says, after contrastive steps.

        Return "prototypes" or "random"; None if trained heads are kept. Without training steps, see
        `prototypes.set_heads`.
        """
        new = {*self.model.new_nodes}
        known = {*range(self.form.tree.num_nodes)} - new
        if self.takes_steps:
            self.heads_init = prototypes.initialise_heads(self, self.train_dataset, known)
        else:
            logger.info(
                "no training steps: new heads are set from names, descriptions and rows, if "
                "there are any"
            )
            self.heads_init = "prototypes"
            unlabelled = [*self.data.unlabelled.values()] if self.data else []
            self.untrained = prototypes.set_heads(self, self.train_dataset, known, unlabelled)
            calibration = self.model.config.calibration
            if calibration.heads is not None:  # it holds beside the new heads
                calibration.heads = [*project(self.model.heads.weight)]
        self.model.new_nodes = ()
        return self.heads_init

    def score(self, rows: Any, split: str = "test") -> dict[str, Any]:
        """Score rows by the saved checkpoint as a user loads it, before training by the model.

        Texts that trained the model are left out. Prediction sets are measured on test rows.

        Args:
            split: "test" or "validation", which the names of the metrics begin with.

        Returns:
            The metrics. ``intervals`` has 95 % intervals of micro- and macro-F1.
        """
        metrics = self.score_tokenized(self.tokenize(rows, split), split)
        scored = self.scored[split]
        thresholds = self.scored_model.config.calibration.thresholds
        p = Predictions(self.form, scored.logits, scored.labels, thresholds)
        return metrics | {"intervals": class_scores(split, p, scored.texts).get("intervals", {})}

    def calibrate(self, rows: Any = None) -> Calibration:
        """Fit the calibration, and save the checkpoint with it to ``output_dir``.

        After training, these are the lexical head and its weight, the scales of the scores,
        thresholds, prediction sets, and what p-values need. A model that has a calibration keeps
        its lexical head, and its scales are corrected. Earlier scores no longer hold.

        Args:
            rows: by default, the validation rows.
        """
        # ── Scores ────────────────────────────────────────────────────────────────────────────────
        stored = self.scored_model.config.calibration
        if stored.scales or rows is not None:
            self.scored = {}
            self.scores = {}
        if "validation" not in self.scored:
            given = self.splits.get("validation") if rows is None else rows
            if given is None:
                raise InputError("calibrate needs validation rows: give rows, or eval_dataset")
            self.score_tokenized(self.tokenize(given, "validation"), "validation")
        if self.checkpoint is None and self.data is not None:
            resume.start_run(self, self.data, None)

        # ── Fit ───────────────────────────────────────────────────────────────────────────────────
        model = self.scored_model
        classifier = None
        if not stored.scales and self.takes_steps:
            vocab_size = model.config.text_config.vocab_size
            classifier = fit_lexical_head(
                self.form,
                self.train_dataset,
                self.processing_class,
                vocab_size,
                self.args.lexical_head,
            )
        calibration, scored, measured = calibrate_splits(self.form, self.scored, classifier)
        lexical = classifier.weights() if classifier and calibration.lexical_weight else None
        open_world = None
        if stored.scales:
            calibration = compose(calibration, stored)
            head = model.heads.lexical
            lexical = None if head is None else head.weights()
            vectors = scored["validation"].text_vectors()
            open_world = with_references(model.heads.open_world, vectors)
        elif self.takes_steps:
            open_world = learn_known_texts(self, model, self.train_dataset, scored["validation"])
        calibration = dataclasses.replace(
            calibration, max_length=self.processing_class.model_max_length
        )

        # ── Save ──────────────────────────────────────────────────────────────────────────────────
        model.set_calibration(calibration, lexical, open_world)
        if model is not self.model:  # whose heads may be sharded
            self.model.set_calibration(model.config.calibration, lexical, open_world)
        self.scored = scored
        self.scores = replace_scores(self.scores, measured)
        self.scores |= measure_sets(self.form, scored, calibration)
        self.scores |= measure_strange_texts(scored, open_world)
        self.save_with_self_test()
        return calibration

    def write_card(self, folder: Path | None = None) -> None:
        """Write README.md into the checkpoint's folder, with metrics.json, predictions and plots.

        ``folder``: a checkpoint of the run in progress, whose card has no scores.
        """
        if not self.report or not self.args.should_save:
            return
        output = Path(self.args.output_dir)
        metrics: dict[str, Any] = {}
        shown = None
        if folder is None:
            metrics = self.write_scores()
            shown = card.classify_example(self.scored_model, self.processing_class)
        target = folder or output
        config = HierarchicalConfig.from_pretrained(target)
        settings = run_settings(self, self.heads_init)
        card.write(target, config, settings, self.report, metrics, self.hub_model_id, shown)
        if folder is None:
            logger.info("checkpoint, metrics and plots are in %s", output)

    def push_to_hub(
        self,
        repo_id: str | None = None,
        commit_message: str = "End of training",
        **kwargs: Any,
    ) -> CommitInfo | None:
        """Save the model, and publish its files and card in one commit.

        Args:
            repo_id: by default ``hub_model_id``.
            kwargs: further arguments of the Trainer of transformers are ignored.

        Raises:
            InputError: the commit failed. The message has the command that repeats it.
        """
        if repo_id is not None or self.hub_model_id is None:
            self.hub_model_id = check_hub(self.args, self.model, repo_id).repo_id
            self.write_card()
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        branch = f" --revision {self.args.hub_revision}" if self.args.hub_revision else ""
        command = (
            f"push_to_hub.py --model {self.args.output_dir} --repo_id {self.hub_model_id}{branch}"
        )
        remedy = f"the run is complete, and only this push is missing: run {command}"
        commit = self.publish(Path(self.args.output_dir), commit_message, remedy)
        logger.info("published as %s", self.hub_model_id)
        return commit

    # ── Their parts ───────────────────────────────────────────────────────────────────────────────

    def start(self, checkpoint: str | None) -> None:
        """Clean up the output folder, and initialise new heads or check what is resumed."""
        assert self.data is not None
        config = self.model.config
        if checkpoint is not None:
            resume.check_resumed_data(checkpoint, self.data.report)
            resume.check_model(checkpoint, self.model)
        else:
            resume.check_output_folder(self.args, self.model.name_or_path)
        tuning = "lora" if self.model.has_adapter else "full"
        setup = (self.args.device, self.args.precision, quantization_of(self.model), tuning)
        logger.info("device %s, precision %s, encoder %s, tuning %s", *setup)
        logger.info(SIZES.format_map(self.size))
        if self.args.device.type == "cpu":
            keep_memory(*KEPT_MEMORY)
        resume.start_run(self, self.data, checkpoint)
        if self.takes_steps and config.calibration.scales:
            self.model.set_calibration(Calibration(max_length=config.calibration.max_length))
        if checkpoint is None:
            self.initialise_heads()
        else:
            self.heads_init = resume.read_data_report(checkpoint).get("heads_init")
        self.report |= {"heads_init": self.heads_init, "untrained_classes": self.untrained}
        if self.args.should_save:
            write_json(Path(self.args.output_dir) / "data_report.json", self.report)

    def save_and_load(self) -> None:
        """Save the trained model, and load it as a user does."""
        if self.args.should_save:
            card.delete_description(Path(self.args.output_dir))  # of a run that was resumed
        # with _internal_call, else it is pushed here, before it is measured
        self.save_model(_internal_call=True)
        self.accelerator.wait_for_everyone()  # all processes load it
        self.checkpoint, _ = load_scored(self.args.output_dir, self.args.device)

    def save_with_self_test(self) -> None:
        """Save the model, with what the scored checkpoint says of a text, see `check_self_test`."""
        self.scored_model.record_self_test(self.processing_class)
        self.model.config.self_test = self.scored_model.config.self_test
        self.save_model(_internal_call=True)
        self.folder = self.args.output_dir

    def tokenize(self, rows: Any, split: str) -> Dataset:
        """Tokenize rows with texts; tokenized rows are returned as they are."""
        if not has_texts(rows):
            return rows
        config = self.model.config
        data = read_rows(
            {split: rows},
            config.tree,
            column_mapping=self.columns,
            problem_type=config.problem_type,
            trained=resume.read_earlier_texts(self.folder, None, None),
        )
        if split not in data.splits:
            raise InputError(f"no {split} rows are left: the model was trained on all their texts")
        tokenized, lengths = tokenize_splits(data.splits, self.processing_class)
        if self.data is None:
            self.data = data  # `calibrate` records its texts
        else:
            sources = [one for one in self.report["sources"] if one["split"] != split]
            self.report |= {
                "splits": self.report["splits"] | data.report["splits"],
                "lengths": self.report["lengths"] | lengths,
                "sources": sources + data.report["sources"],
            }
        return tokenized[split]

    def score_splits(self) -> None:
        """Score the validation and test rows, unless ``do_eval`` or ``do_predict`` is false."""
        for name, is_requested in (
            ("validation", self.args.do_eval),
            ("test", self.args.do_predict),
        ):
            if name in self.splits and is_requested is not False:
                self.score_tokenized(self.splits[name], name)

    def score_tokenized(self, rows: Dataset, split: str) -> dict[str, Any]:
        """Score tokenized rows, see `score`."""
        model = self.scored_model
        calibration = model.config.calibration
        self.scored[split], loss = score_rows(self, model, rows)
        scored = {split: self.scored[split]}
        metrics: dict[str, Any] = {f"{PREFIXES[split]}_loss": loss}
        metrics |= measure(self.form, scored, calibration.thresholds or DEFAULT_THRESHOLD)
        metrics |= measure_strange_texts(scored, getattr(model.heads, "open_world", None))
        if self.processing_class.model_max_length == calibration.max_length:
            metrics |= measure_sets(self.form, scored, calibration)
        self.scores |= metrics
        return metrics

    def write_scores(self) -> dict[str, Any]:
        """Write metrics.json, predictions and plots to ``output_dir``, with the fingerprint of the
        scored weights. Return the metrics.
        """
        model = self.scored_model
        output = Path(self.args.output_dir)
        thresholds = model.config.calibration.thresholds
        metrics = self.facts | self.scores
        metrics |= write_scores(self.form, self.scored, thresholds, output)
        if self.facts:
            drawn = {
                name: metric.title
                for name, metric in self.form.metrics.items()
                if metric.is_key and metric.direction > 0
            }
            curves = plots.training_curves(self.state.log_history, drawn)
            plots.write(curves, output / "plots" / "training_curves.png")
        write_fingerprint(output, Path(self.folder), model)
        write_json(output / METRICS, metrics)
        return metrics

    def publish(self, folder: Path, message: str, remedy: str) -> CommitInfo:
        """Commit the files of a checkpoint to the branch ``--hub_revision``."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        branch = self.args.hub_revision or "main"
        private = bool(self.args.hub_private_repo)
        target = Target(self.hub_model_id, "model", branch, private, exists=False)
        api = HfApi(token=self.args.hub_token)
        return publish(api, target, published_files(folder), message, remedy)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        folder = Path(checkpoint_folder)
        message = f"Training in progress, step {self.state.global_step}"
        self.write_card(folder)
        try:
            self.publish(folder, message, "the next push has all files")
        except InputError as error:
            logger.warning("a push during training failed: %s", error)


def has_texts(rows: Any) -> bool:
    """Return whether rows are texts; else they are tokenized."""
    return "input_ids" not in (getattr(rows, "column_names", None) or ())
