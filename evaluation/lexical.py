"""Fit the lexical head, a linear classifier over the bag of tokens, to add to the trained encoder.

Worth knowing:

1. The lexical head alone is less accurate than the encoder, but errs on other texts. `benchmarks/quality.py` measures its
   contribution. Calibration fits one weight for its scores, relative to the encoder's.
2. The lexical head is fitted after the encoder. Joint training was not tried.
3. A token's feature is its TF-IDF times its `log_odds_variance`. `benchmarks/studies/words.py` measures that factor.
4. With one label per text, the lexical head is flat: an inner node's probability is the sum of its leaves' probabilities. One
   classifier per decision, as in HiClass, was tried on OHSUMED and was less accurate, for parents too.
"""

import logging

import numpy as np
import torch
from datasets import Dataset
from scipy.sparse import csr_matrix
from scipy.special import logsumexp
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from evaluation.metrics import one_hot
from taxonomy_hierarchical import Taxonomy
from training.label_arrays import label_arrays, open_counts, open_decisions, prior_log_odds

logger = logging.getLogger(__name__)

MIN_ROWS = 2  # a token in fewer training rows is ignored
REGULARISATION = 50.0  # C of scikit-learn: weak, since the documents are vectors of length 1
MAX_WEIGHTS = 2**24  # 64 MiB


def token_counts(rows: Dataset, vocab_size: int) -> csr_matrix:
    """Count each token id in each row, special tokens included: (num_rows, vocab_size)."""
    chunks = rows.with_format("arrow")["input_ids"].chunks
    lengths = np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks])
    ids = np.concatenate([chunk.flatten().to_numpy() for chunk in chunks])
    pointers = np.concatenate([[0], np.cumsum(lengths)])
    counts = csr_matrix((np.ones(len(ids)), ids, pointers), shape=(len(rows), vocab_size))
    counts.sum_duplicates()
    return counts


class LexicalClassifier:
    """Logistic regression over TF-IDF: multinomial over the leaves, or for multi-label models binary for each node.

    ``counts`` are (num_rows, V), and ``labels`` node ids (num_rows,), where only leaves count, or arrays (num_rows, num_nodes):
    1, 0, or -100 for unknown.

    Attributes:
        weight: the weights of the classes and tokens that are fitted, (C, T). All others are 0.
        classes, tokens: the ids of these classes (C,) and tokens (T,). L-BFGS keeps some 25 arrays like ``weight``, so with
            thousands of classes an array (num_classes, V) would take too much memory.
        bias: (num_classes,).
        log_prior: with one label per text, the logarithm of the number of documents at or below each node, plus ½, (num_nodes,).
            Else None.
    """

    def __init__(self, taxonomy: Taxonomy, counts: csr_matrix, labels: np.ndarray):
        multi_label = labels.ndim == 2
        if not multi_label:
            is_leaf = labels < taxonomy.num_leaves
            counts, labels = counts[is_leaf], labels[is_leaf]
            self.classes, given = np.unique(labels, return_inverse=True)
        outcomes = labels if multi_label else one_hot(given, len(self.classes))
        self.tfidf = TfidfTransformer(sublinear_tf=True).fit(counts)
        common = np.flatnonzero((counts > 0).sum(axis=0).A1 >= MIN_ROWS)
        idf = np.zeros_like(self.tfidf.idf_)
        idf[common] = self.tfidf.idf_[common] * log_odds_variance(counts[:, common] > 0, outcomes)
        self.tfidf.idf_ = idf
        self.tokens = np.flatnonzero(idf) if idf.any() else np.array([0])  # scikit-learn needs a feature
        self.bias = np.zeros(taxonomy.num_nodes if multi_label else taxonomy.num_leaves)
        documents, self.log_prior = self.tfidf.transform(counts)[:, self.tokens], None
        if multi_label:
            self._fit_nodes(taxonomy, documents, labels)
        else:
            self._fit_leaves(documents, labels)
            self.log_prior = np.log(np.array(taxonomy.count_at_or_below(labels.tolist())) + 0.5)

    def _fit_leaves(self, documents: csr_matrix, labels: np.ndarray) -> None:
        """Fit a multinomial regression.

        Leaves without training documents get weights of 0. Together they have mean odds of 1 / (num_rows + 1) on the
        training documents, as if they had one document.
        """
        model = LogisticRegression(C=REGULARISATION, max_iter=1000, tol=1e-3).fit(documents, labels)
        coefficients, intercepts = model.coef_, model.intercept_
        if len(model.classes_) == 2:  # scikit-learn has one row: the difference between the classes
            halves = np.array([[-0.5], [0.5]])
            coefficients, intercepts = halves * coefficients, (halves * intercepts).ravel()
        self.weight, self.bias[self.classes] = coefficients, intercepts
        if len(unseen := np.setdiff1d(np.arange(len(self.bias)), self.classes)):
            # a leaf of bias b has odds of exp(b - total) against the leaves with training documents
            total = logsumexp(documents @ coefficients.T + intercepts, axis=1)
            share = 1 / ((len(labels) + 1) * len(unseen))
            self.bias[unseen] = np.log(share * len(labels)) - logsumexp(-total)

    def _fit_nodes(self, taxonomy: Taxonomy, documents: csr_matrix, labels: np.ndarray) -> None:
        """Fit one regression per node over its open rows; weights of 0 for a node whose open rows do not hold both labels.

        The node's log-odds in these rows are subtracted: the encoder's head starts from them, and they would count twice.
        """
        is_open, priors = open_decisions(taxonomy, labels), prior_log_odds(taxonomy, labels)
        positive, total = open_counts(taxonomy, labels)
        self.classes = np.flatnonzero((positive > 0) & (positive < total))
        self.weight = np.empty((len(self.classes), len(self.tokens)))
        for weight, node in zip(self.weight, self.classes, strict=True):
            rows = is_open[:, node]
            model = LogisticRegression(C=REGULARISATION, max_iter=1000).fit(documents[rows], labels[rows, node] == 1)
            weight[:], self.bias[node] = model.coef_[0], model.intercept_[0] - priors[node]

    def scores(self, counts: csr_matrix) -> np.ndarray:
        """Return logits of leaves or nodes, (num_rows, num_classes)."""
        scores = np.tile(self.bias, (counts.shape[0], 1))
        scores[:, self.classes] += self.tfidf.transform(counts)[:, self.tokens] @ self.weight.T
        return scores

    def weights(self) -> dict[str, Tensor]:
        """Return the weights of the equivalent `LexicalHead`."""
        weight = torch.zeros(len(self.bias), len(self.tfidf.idf_))
        weight[self.classes[:, None], self.tokens] = torch.from_numpy(self.weight).float()
        return {"idf": torch.tensor(self.tfidf.idf_).float(), "weight": weight, "bias": torch.tensor(self.bias).float()}


def log_odds_variance(present: csr_matrix, labels: np.ndarray) -> np.ndarray:
    """Compute each token's variance over classes of log P(token | class) - log P(token | not the class), (V,).

    P is the share of documents that contain the token, smoothed by one document with it and one without (Laplace). The
    two-class NB-SVM (Wang and Manning, 2012, "Baselines and bigrams") weighs words by these log-odds, with their sign. Here
    one weight serves all classes, so that a document is one vector. Labels are (num_rows, num_classes): 1, 0 or -100. Classes
    without both labels do not count. With one class, it is the square of the log-odds.
    """
    labels = labels[:, (labels == 1).any(axis=0) & (labels == 0).any(axis=0)]
    inside, unknown = ((csr_matrix(rows.T, dtype=float) @ present).toarray() for rows in (labels == 1, labels < 0))
    outside = present.sum(axis=0).A1 - inside - unknown
    sizes = [(labels == label).sum(axis=0)[:, None] for label in (1, 0)]
    log_odds = np.log((inside + 1) / (sizes[0] + 2)) - np.log((outside + 1) / (sizes[1] + 2))
    return np.var(log_odds, axis=0) if len(log_odds) > 1 else log_odds[0] ** 2


def fit_classifier(
    taxonomy: Taxonomy, train: Dataset, vocab_size: int, wanted: bool | None = None
) -> LexicalClassifier | None:
    """Fit a classifier on the training rows; return None if it is not wanted, or there is nothing to tell apart.

    By default it is wanted if it has at most `MAX_WEIGHTS` weights.
    """
    if wanted is False:
        return None
    labels = label_arrays(train)
    num_classes = taxonomy.num_nodes if labels.ndim == 2 else taxonomy.num_leaves
    if wanted is None and vocab_size * num_classes > MAX_WEIGHTS:
        size = f"{vocab_size:,} tokens times {num_classes:,} classes"
        logger.info("no lexical head: it would have %s weights; --lexical_head true adds it", size)
        return None
    if not can_learn(taxonomy, labels):
        logger.info("no lexical head: the training rows do not tell any two classes apart")
        return None
    return LexicalClassifier(taxonomy, token_counts(train, vocab_size), labels)


def can_learn(taxonomy: Taxonomy, labels: np.ndarray) -> bool:
    """Return whether labels of training rows, as in `LexicalClassifier`, tell any two classes apart."""
    if labels.ndim == 2:
        positive, total = open_counts(taxonomy, labels)
        return bool(((positive > 0) & (positive < total)).any())
    return len(np.unique(labels[labels < taxonomy.num_leaves])) >= 2
