"""Score rows by a checkpoint, and fit what the scored model needs beside its calibration."""

import numpy as np
import torch
from datasets import Dataset
from scipy.sparse import csr_matrix
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from checkpoint_hierarchical import check_self_test, check_tokenizer
from decisions_hierarchical import build_decisions
from hierarchical_clinicalbert.errors import as_input_error
from hierarchical_clinicalbert.evaluation.forms import Form
from hierarchical_clinicalbert.evaluation.lexical import LexicalClassifier
from hierarchical_clinicalbert.evaluation.open_world import fit_open_world, merge_texts
from hierarchical_clinicalbert.evaluation.report import ScoredSplit
from hierarchical_clinicalbert.training.arguments import has_few_rows
from hierarchical_clinicalbert.training.loop import TrainingLoop
from hierarchical_clinicalbert.training.tokens import TOKEN_COLUMNS
from open_world_hierarchical import OpenWorld
from pipeline_hierarchical import use_cpu_kernels

BEFORE_CALIBRATION = ("_loss", "_ece")  # suffixes of metrics that may exist before calibration only
MAX_TEXTS = 8192  # of the training rows, that describe what the model knows


def load_scored(
    folder: str, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a checkpoint as a user loads it: by `AutoModel`, checked, with its kernels."""
    with as_input_error(f"cannot load the checkpoint {folder}"):
        model: PreTrainedModel = AutoModel.from_pretrained(folder, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        check_tokenizer(tokenizer, model)
        check_self_test(model, tokenizer)
    if device.type == "cpu":
        use_cpu_kernels(model.encoder)
    return model.to(device), tokenizer


@torch.no_grad()
def score_rows(
    trainer: TrainingLoop, model: PreTrainedModel, rows: Dataset
) -> tuple[ScoredSplit, float]:
    """Score tokenized rows without autocast, shared among the processes. Return their loss, too."""
    # ── Outputs of the model ──────────────────────────────────────────────────────────────────────
    model.eval()
    batches = []
    loader = trainer.get_test_dataloader(rows)
    for batch in tqdm(loader, desc="scoring", disable=trainer.args.disable_tqdm):
        tokens = {name: batch[name].to(model.device) for name in TOKEN_COLUMNS if name in batch}
        outputs = model(**tokens, output_vectors=True)
        found = [outputs[name] for name in ("decision_logits", "logits", "vectors")]
        batches.append([part.cpu() for part in trainer.accelerator.gather_for_metrics(found)])
    scores, logits, vectors = map(torch.cat, zip(*batches, strict=True))

    # ── Labels ────────────────────────────────────────────────────────────────────────────────────
    nodes = rows["labels"][:]
    labels = build_decisions(model.config.tree, model.config.problem_type).targets(nodes)
    device = trainer.args.device
    loss = trainer.loss_function(scores.to(device), labels.to(device))
    split = ScoredSplit(
        scores.numpy(),
        logits.numpy(),
        labels.numpy(),
        np.array(rows["text_id"]),
        np.array(rows["row"]),
        token_counts(rows, model.config.text_config.vocab_size),
        nodes,
        vectors.numpy(),
    )
    return split, float(loss)


@torch.no_grad()
def learn_known_texts(
    trainer: TrainingLoop, model: PreTrainedModel, rows: Dataset, validation: ScoredSplit
) -> OpenWorld | None:
    """Return the `OpenWorld` of a scored model, from at most `MAX_TEXTS` tokenized training rows
    and the validation rows.

    None: see `fit_open_world`. A text counts once, with the labels of all its rows.
    """
    first, nodes = merge_texts(np.array(rows["text_id"][:]), rows["labels"][:])
    some = np.random.default_rng(0).permutation(len(first))[:MAX_TEXTS]
    inputs = rows.select(first[some])["input_ids"][:]
    vectors = trainer.embed_with(model, inputs, model.mean).cpu().numpy()
    known = [nodes[text] for text in some]
    return fit_open_world(model.config.tree, vectors, known, validation.text_vectors())


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


def replace_scores(
    uncalibrated: dict[str, float], calibrated: dict[str, float]
) -> dict[str, float]:
    """Return the scores after calibration, and those that it replaces as ``uncalibrated_…``."""
    kept = dict(uncalibrated)
    replaced = [name for name in kept if name in calibrated or name.endswith(BEFORE_CALIBRATION)]
    before = {
        f"uncalibrated_{name}": kept.pop(name)
        for name in replaced
        if not name.startswith("quantized_")
    }
    return kept | before | calibrated


def token_counts(rows: Dataset, vocab_size: int) -> csr_matrix:
    """Count each token id in each row, special tokens included: (num_rows, vocab_size)."""
    chunks = rows.with_format("arrow")["input_ids"].chunks
    lengths = np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks])
    ids = np.concatenate([chunk.flatten().to_numpy() for chunk in chunks])
    pointers = np.concatenate([[0], np.cumsum(lengths)])
    counts = csr_matrix((np.ones(len(ids)), ids, pointers), shape=(len(rows), vocab_size))
    counts.sum_duplicates()
    return counts
