"""Train and score multi-label baselines. `quality.py` calls this file, and describes the models in
its docstring.

Each peer returns marginal logits u of the validation and test texts, (num_texts, num_nodes), whose
sigmoids are P(node).
"""

import base64
import tempfile
import zlib
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from harness import PROBABILITIES, Rows, run_batches
from scipy.special import logit
from sklearn.base import ClassifierMixin
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import LinearSVC
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from configuration_hierarchical import Calibration
from hierarchical_clinicalbert.evaluation.forms import ManyNodesForm
from hierarchical_clinicalbert.evaluation.metrics import Predictions, bootstrap_intervals
from hierarchical_clinicalbert.training.arguments import HierarchicalTrainingArguments
from hierarchical_clinicalbert.training.model import turn_off_dropout
from taxonomy_hierarchical import Taxonomy

Logits = dict[str, np.ndarray]  # of each split in SCORED

SCORED = ("validation", "test")
TFIDF: dict[str, Any] = {"ngram_range": (1, 2), "sublinear_tf": True, "min_df": 2}
STOP_WORDS = (None, "english")
# C
SVM_STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0)
LOGISTIC_STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)
TREE_STRENGTHS = (10.0, 100.0, 1e3, 1e4)
# below one node of napkinXC's tree: a binary tree, or one node above all labels
MAX_LEAVES = (2, 100)
ADAPTER_RATE = 1e-3
HEAD_RATE = 3e-2
NEVER = float(logit(1e-9))  # the logit of a node without training texts


def maximum_below(tree: Taxonomy, scores: np.ndarray) -> np.ndarray:
    """Return the maximum of scores (num_texts, num_nodes) over each node and all nodes below it."""
    closed = scores.copy()
    for node in reversed(tree.reading_order):  # each node after those below it
        parent = tree.parents[node]
        if parent >= 0:
            closed[:, parent] = np.maximum(closed[:, parent], closed[:, node])
    return closed


# ── Linear peers ──────────────────────────────────────────────────────────────────────────────────


def vectors(rows: dict[str, Rows]) -> dict[str | None, dict[str, Any]]:
    """Return TF-IDF vectors of each split, for each choice of `STOP_WORDS`."""
    tfidf = {
        words: TfidfVectorizer(**TFIDF, stop_words=words).fit(rows["train"][0])
        for words in STOP_WORDS
    }
    return {
        words: {split: fitted.transform(texts) for split, (texts, _) in rows.items()}
        for words, fitted in tfidf.items()
    }


def choose_settings(
    tree: Taxonomy, labels: np.ndarray, grid: Iterable[dict], fit: Callable[..., Logits]
) -> tuple[Logits, dict]:
    """Fit each setting of a grid. Return the logits and the settings of best micro-F1 on the
    validation rows.

    Args:
        labels: the labels of the validation rows.
    """

    def micro_f1(fitted: tuple[Logits, dict]) -> float:
        closed = maximum_below(tree, fitted[0]["validation"])
        return ManyNodesForm(tree).measure(closed, labels)["micro_f1"]

    return max(((fit(**settings), settings) for settings in grid), key=micro_f1)


def one_vs_rest(
    classifier: type[ClassifierMixin], strengths: tuple[float, ...], **fixed: Any
) -> Callable:
    """Return a peer, see `PEERS`: one classifier per node over TF-IDF."""

    def peer(tree: Taxonomy, rows: dict[str, Rows], seed: int, **_: Any) -> tuple[Logits, dict]:
        all_features = vectors(rows)

        def fit(stop_words: str | None, **settings: Any) -> Logits:
            # int8 overflows beyond 127 nodes
            features = all_features[stop_words]
            labels = rows["train"][1].astype(int)
            model = OneVsRestClassifier(classifier(random_state=seed, **fixed, **settings)).fit(
                features["train"], labels
            )
            # scikit-learn gives other nodes a score of 0, above most of those with texts
            has_texts = labels.any(0)
            return {
                split: np.where(has_texts, model.decision_function(features[split]), NEVER)
                for split in SCORED
            }

        grid = (
            {"stop_words": words, "C": strength, "class_weight": weight}
            for words, strength, weight in product(STOP_WORDS, strengths, (None, "balanced"))
        )
        return choose_settings(tree, rows["validation"][1], grid, fit)

    return peer


def napkinxc(tree: Taxonomy, rows: dict[str, Rows], seed: int, **_: Any) -> tuple[Logits, dict]:
    from napkinxc.models import PLT

    all_features = vectors(rows)
    labels = [np.flatnonzero(row).tolist() for row in rows["train"][1]]

    def fit(stop_words: str | None, **settings: Any) -> Logits:
        features = all_features[stop_words]
        with tempfile.TemporaryDirectory() as folder:
            model = PLT(folder, **settings, seed=seed, threads=1)
            model.fit(features["train"], labels)
            predicted = {
                split: model.predict_proba(features[split], top_k=tree.num_nodes)
                for split in SCORED
            }
        probabilities = {split: np.zeros(rows[split][1].shape) for split in SCORED}
        for split, pairs in predicted.items():
            for of_text, pairs_of_text in zip(probabilities[split], pairs, strict=True):
                for node, probability in pairs_of_text:
                    of_text[node] = probability
        return {split: logit(array.clip(1e-9, 1 - 1e-9)) for split, array in probabilities.items()}

    grid = (
        {"stop_words": words, "liblinear_c": strength, "max_leaves": most}
        for words, strength, most in product(STOP_WORDS, TREE_STRENGTHS, MAX_LEAVES)
    )
    return choose_settings(tree, rows["validation"][1], grid, fit)


# ── Flat fine-tuning ──────────────────────────────────────────────────────────────────────────────


class FlatModel(nn.Module):
    """An encoder with a LoRA adapter, and one linear layer over the mean token vector, with binary
    cross-entropy.

    Args:
        labels: labels of the training rows, (num_rows, num_nodes). The biases start at the nodes'
        log-odds in these rows.
    """

    accepts_loss_kwargs = False  # else the Trainer passes further arguments to forward

    def __init__(self, encoder: str, labels: np.ndarray):
        from peft import LoraConfig, get_peft_model

        super().__init__()
        settings = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        config = AutoConfig.from_pretrained(encoder)
        turn_off_dropout(config)
        self.encoder = get_peft_model(AutoModel.from_pretrained(encoder, config=config), settings)
        self.head = nn.Linear(self.encoder.config.hidden_size, labels.shape[1])
        rates = (labels.sum(0) + 0.5) / (len(labels) + 1)
        self.head.bias.data = torch.tensor(logit(rates), dtype=torch.float32)

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> dict[str, Tensor]:
        mask = inputs["attention_mask"].unsqueeze(-1)
        states = self.encoder(**inputs).last_hidden_state.float() * mask
        logits = self.head(states.sum(1) / mask.sum(1)).float()
        if labels is None:
            return {"logits": logits}
        return {
            "loss": nn.functional.binary_cross_entropy_with_logits(logits, labels.float()),
            "logits": logits,
        }


def flat_lora(
    tree: Taxonomy, rows: dict[str, Rows], seed: int, encoder: str, epochs: float, folder: Path
) -> tuple[Logits, dict]:
    """Train a `FlatModel`, see `PEERS`."""
    # ── Model and data ────────────────────────────────────────────────────────────────────────────
    set_seed(seed)
    model = FlatModel(encoder, rows["train"][1])
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    tokenizer.model_max_length = 512
    tokenized = {
        split: Dataset.from_dict({**tokenizer(texts, truncation=True), "labels": labels})
        for split, (texts, labels) in rows.items()
    }

    # ── Fit ───────────────────────────────────────────────────────────────────────────────────────
    training = HierarchicalTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        learning_rate=ADAPTER_RATE,
        metric_for_best_model="micro_f1",
        remove_unused_columns=False,
        seed=seed,
    )
    rates = [
        {
            "params": [weight for weight in model.encoder.parameters() if weight.requires_grad],
            "lr": ADAPTER_RATE,
        },
        {"params": model.head.parameters(), "lr": HEAD_RATE},
    ]
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=tokenized["train"],
        eval_dataset=tokenized["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=ManyNodesForm(tree).compute_metrics,
        callbacks=[EarlyStoppingCallback(training.early_stopping_patience)],
        optimizers=(torch.optim.AdamW(rates, weight_decay=0.0), None),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.exists() else None)
    logits = {split: predict(model, tokenizer, rows[split][0]) for split in SCORED}
    steps = trainer.state.best_global_step or trainer.state.global_step
    return logits, {"epoch": steps * epochs / trainer.state.max_steps}


def predict(model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> np.ndarray:
    """Return a model's logits for each text, (num_texts, num_nodes) float64, without autocast."""
    model.eval()
    device = next(model.parameters()).device
    [logits] = run_batches(
        tokenizer, texts, 32, lambda _, batch: [model(**batch.to(device))["logits"].double().cpu()]
    )
    return logits.numpy()


# each takes (tree, rows, seed, encoder, epochs, folder), and returns logits and the chosen settings
PEERS: dict[str, Callable[..., tuple[Logits, dict]]] = {
    "tfidf-logistic": one_vs_rest(LogisticRegression, LOGISTIC_STRENGTHS, solver="liblinear"),
    "tfidf-svm": one_vs_rest(LinearSVC, SVM_STRENGTHS),
    "napkinxc": napkinxc,
    "flat-lora": flat_lora,
}


# ── Scores ────────────────────────────────────────────────────────────────────────────────────────


def score_peer(
    name: str, tree: Taxonomy, rows: dict[str, Rows], **arguments: Any
) -> dict[str, Any]:
    """Train a peer, and return its scores on the test rows."""
    logits, settings = PEERS[name](tree, rows, **arguments)
    # closed upwards, as the predicted nodes are
    threshold = ManyNodesForm(tree).common_threshold(
        maximum_below(tree, logits["validation"]), rows["validation"][1]
    )
    scores = score(tree, logits["test"], rows["test"][1], threshold)
    if name == "tfidf-svm":  # its logits are margins
        scores = {metric: value for metric, value in scores.items() if metric not in PROBABILITIES}
    return {**scores, "threshold": threshold, "settings": settings}


def score_checkpoint(
    folder: Path, tree: Taxonomy, rows: dict[str, Rows]
) -> tuple[dict[str, Any], np.ndarray, Calibration]:
    """Load a checkpoint as a user does.

    Return its scores on the test rows, their logits, and its calibration.
    """
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    u = predict(model, tokenizer, rows["test"][0])
    calibration = model.config.calibration
    return score(tree, u, rows["test"][1], np.array(calibration.thresholds)), u, calibration


def score(
    tree: Taxonomy, u: np.ndarray, labels: np.ndarray, thresholds: np.ndarray | float
) -> dict[str, Any]:
    """Return the scores of the predicted nodes, their bootstrap intervals over texts, and the
    predicted nodes, packed.
    """
    form = ManyNodesForm(tree)
    scores = form.measure(u, labels, thresholds)
    chosen = Predictions(form, u, labels, thresholds).chosen
    ends = bootstrap_intervals(labels, chosen)
    intervals = {f"{name}_interval": ends[name].tolist() for name in ("micro_f1", "macro_f1")}
    packed = base64.b64encode(zlib.compress(np.packbits(chosen).tobytes(), 9)).decode()
    return {**scores, **intervals, "choices": packed}


def unpack(choices: str, shape: tuple[int, int]) -> np.ndarray:
    """Return the predicted nodes that `score` packed, as bool of this shape."""
    bits = np.frombuffer(zlib.decompress(base64.b64decode(choices)), np.uint8)
    return np.unpackbits(bits, count=shape[0] * shape[1]).reshape(shape).astype(bool)
