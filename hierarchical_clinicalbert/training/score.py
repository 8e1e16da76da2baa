"""Score splits with a Trainer.

Scores are measured on the checkpoint as a user loads it, over a full-precision encoder, not on the
quantized model in training.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from scipy.sparse import csr_matrix
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from checkpoint_hierarchical import check_self_test, check_tokenizer
from decisions_hierarchical import DEFAULT_THRESHOLD
from hierarchical_clinicalbert.errors import as_input_error
from hierarchical_clinicalbert.evaluation.forms import Form, form_of
from hierarchical_clinicalbert.evaluation.lexical import LexicalClassifier
from hierarchical_clinicalbert.evaluation.metrics import PREFIXES
from hierarchical_clinicalbert.evaluation.open_world import fit_open_world, merge_texts
from hierarchical_clinicalbert.evaluation.report import ScoredSplit, measure
from hierarchical_clinicalbert.training.arguments import HierarchicalTrainingArguments, has_few_rows
from hierarchical_clinicalbert.training.trainer import HierarchicalTrainer
from open_world_hierarchical import OpenWorld
from pipeline_hierarchical import use_cpu_kernels

SCORING_ARGUMENTS: dict[str, Any] = {  # arguments of a Trainer that only scores
    **dict.fromkeys(("bf16", "fp16", "load_best_model_at_end", "push_to_hub"), False),
    "report_to": [],
    "eval_strategy": "no",
}
MAX_TEXTS = 8192  # of the training rows, that describe what the model knows


def scoring_trainer(
    folder: str, args: HierarchicalTrainingArguments, loss_function: nn.Module | None = None
) -> HierarchicalTrainer:
    """Build a Trainer that scores a checkpoint as the pipeline does: loaded by `AutoModel`, without
    autocast.
    """
    with as_input_error(f"cannot load the checkpoint {folder}"):
        model: PreTrainedModel = AutoModel.from_pretrained(folder, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        check_tokenizer(tokenizer, model)
        check_self_test(model, tokenizer)
    if args.device.type == "cpu":
        use_cpu_kernels(model.encoder)
    return HierarchicalTrainer(
        model=model,
        args=dataclasses.replace(args, **SCORING_ARGUMENTS),
        processing_class=tokenizer,
        loss_function=loss_function,
    )


def score_splits(
    trainer: HierarchicalTrainer, splits: DatasetDict
) -> tuple[dict[str, ScoredSplit], dict[str, float]]:
    """Score the tokenized validation and test rows that are requested.

    The metrics are those of the predictions that the pipeline makes: with the stored thresholds, or
    0.5.
    """
    config = trainer.model.config
    scored = dict[str, ScoredSplit]()
    metrics = dict[str, float]()
    form = form_of(config.tree, config.problem_type)
    ignored = [
        key
        for key in config.keys_to_ignore_at_inference
        if key not in ("decision_logits", "vectors")
    ]
    for name, is_requested in (
        ("validation", trainer.args.do_eval),
        ("test", trainer.args.do_predict),
    ):
        if name in splits and is_requested is not False:
            rows = splits[name]
            output = trainer.predict(rows, ignored, metric_key_prefix=PREFIXES[name])
            logits, scores, vectors = output.predictions
            texts, numbers = (np.array(rows[column]) for column in ("text_id", "row"))
            counts = token_counts(rows, config.text_config.vocab_size)
            nodes = rows["labels"][:]
            labels = form.decisions.targets(nodes).numpy()
            of_texts = (labels, texts, numbers, counts, nodes, vectors)
            scored[name] = ScoredSplit(scores, logits, *of_texts)
            metrics |= output.metrics
    return scored, metrics | measure(
        form, scored, config.calibration.thresholds or DEFAULT_THRESHOLD
    )


@torch.no_grad()
def learn_known_texts(
    scorer: HierarchicalTrainer, rows: Dataset, validation: ScoredSplit
) -> OpenWorld | None:
    """Return the `OpenWorld` of a scored model, from at most `MAX_TEXTS` tokenized training rows
    and the validation rows.

    None: see `fit_open_world`. A text counts once, with the labels of all its rows.
    """
    first, nodes = merge_texts(np.array(rows["text_id"][:]), rows["labels"][:])
    some = np.random.default_rng(0).permutation(len(first))[:MAX_TEXTS]
    vectors = (
        scorer.embed(rows.select(first[some])["input_ids"][:], scorer.model.mean).cpu().numpy()
    )
    _, first_of_validation = np.unique(validation.texts, return_index=True)
    known = [nodes[text] for text in some]
    return fit_open_world(
        scorer.model.config.tree, vectors, known, validation.vectors[first_of_validation]
    )


def fit_lexical_head(
    form: Form,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    wanted: bool | None,
) -> LexicalClassifier | None:
    """Fit the lexical classifier on tokenized training rows, see `FormBase.fit_classifier`.

    Where rows are few, the description of each class is its phrase, or its name if it has none.
    """
    phrases = None
    tree = form.tree
    if has_few_rows(len(rows), tree):
        pairs = zip(tree.labels[: form.decisions.num_classes], tree.names, strict=False)
        encoded = tokenizer(
            [tree.descriptions.get(label, name) for label, name in pairs], truncation=True
        )
        phrases = token_counts(Dataset.from_dict({"input_ids": encoded["input_ids"]}), vocab_size)
    labels = form.decisions.targets(rows["labels"][:]).numpy()
    return form.fit_classifier(token_counts(rows, vocab_size), labels, wanted, phrases)


def token_counts(rows: Dataset, vocab_size: int) -> csr_matrix:
    """Count each token id in each row, special tokens included: (num_rows, vocab_size)."""
    chunks = rows.with_format("arrow")["input_ids"].chunks
    lengths = np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks])
    ids = np.concatenate([chunk.flatten().to_numpy() for chunk in chunks])
    pointers = np.concatenate([[0], np.cumsum(lengths)])
    counts = csr_matrix((np.ones(len(ids)), ids, pointers), shape=(len(rows), vocab_size))
    counts.sum_duplicates()
    return counts
