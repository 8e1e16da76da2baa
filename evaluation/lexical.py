"""The lexical head: a linear classifier over the bag of tokens, fitted beside the trained encoder.

Worth knowing:

1. The lexical head alone is less accurate than the encoder, but errs on other texts. `benchmarks/quality.py` measures its
   contribution.
2. It is a multinomial logistic regression (scikit-learn), fitted once on the training rows, after the encoder. Joint
   training was not tried.
3. A token's feature is its TF-IDF times its `spread_of_log_odds`. `benchmarks/studies/words.py` measures that factor.
4. One number weighs the lexical head against the encoder. It is fitted with the calibration on the validation rows, and
   stored in config.json.
5. The classifier is flat: an inner node's probability is the sum of its leaves' probabilities. One classifier per decision, as
   in HiClass, was tried on OHSUMED and was less accurate, for parents too.
6. With several labels a text, each node has a binary logistic regression over its open rows, see `MultiLabelLexicalClassifier`.
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

from evaluation.multi_label import open_decisions
from modeling_hierarchical import IGNORED_LABEL
from taxonomy_hierarchical import Taxonomy
from training.multi_label import open_counts, prior_log_odds

logger = logging.getLogger(__name__)

MIN_DOCUMENTS = 2  # a token in fewer training documents is ignored
REGULARISATION = 50.0  # C of scikit-learn: weak, since the documents are vectors of length 1
MAX_WEIGHTS = 2**24  # 64 MiB


def token_counts(rows: Dataset, vocab_size: int) -> csr_matrix:
    """Count each token id in each row, special tokens included: (num_rows, vocab_size)."""
    columns = rows.with_format("arrow")["input_ids"]
    chunks = getattr(columns, "chunks", [columns])
    lengths = np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks])
    ids = np.concatenate([chunk.flatten().to_numpy() for chunk in chunks])
    pointers = np.concatenate([[0], np.cumsum(lengths)])
    counts = csr_matrix((np.ones(len(ids)), ids, pointers), shape=(len(rows), vocab_size))
    counts.sum_duplicates()
    return counts


class LexicalClassifier:
    """Logistic regression over TF-IDF, with the leaves as classes.

    Attributes:
        idf: (V,), inverse document frequency times spread of log-odds; 0 for tokens in fewer than two training documents.
        weight: (num_leaves, V); 0 for a leaf without training documents.
        bias: (num_leaves,). Leaves without training documents together have mean odds of 1 / (num_documents + 1) on the
            training documents, as if they had one document.
    """

    def __init__(self, taxonomy: Taxonomy, counts: csr_matrix, labels: np.ndarray):
        """Fit the classifier.

        Args:
            counts: (num_rows, V), from `token_counts`, of the training rows.
            labels: (num_rows,), node ids or -100. Only rows labelled with a leaf count.
        """
        is_leaf = (labels >= 0) & (labels < taxonomy.num_leaves)
        counts, labels = counts[is_leaf], labels[is_leaf]
        tfidf = TfidfTransformer(sublinear_tf=True).fit(counts)
        common = np.asarray((counts > 0).sum(axis=0)).ravel() >= MIN_DOCUMENTS
        self.idf = np.where(common, tfidf.idf_ * spread_of_log_odds(counts > 0, labels), 0.0)
        model = LogisticRegression(C=REGULARISATION, max_iter=1000, tol=1e-3).fit(self.documents(counts), labels)
        self.weight = np.zeros((taxonomy.num_leaves, counts.shape[1]))
        # for two classes scikit-learn has one row of coefficients: the difference between the classes
        is_binary = len(model.classes_) == 2
        coefficients = np.vstack([-model.coef_, model.coef_]) / 2 if is_binary else model.coef_
        intercepts = np.concatenate([-model.intercept_, model.intercept_]) / 2 if is_binary else model.intercept_
        self.weight[model.classes_] = coefficients
        self.bias = np.zeros(taxonomy.num_leaves)
        self.bias[model.classes_] = intercepts
        if len(unseen := np.setdiff1d(np.arange(taxonomy.num_leaves), model.classes_)):
            # a leaf of bias b has odds of exp(b - total) against the leaves with training documents
            total = logsumexp(self.scores(counts)[:, model.classes_], axis=1)
            share = 1 / ((len(labels) + 1) * len(unseen))
            self.bias[unseen] = np.log(share * len(labels)) - logsumexp(-total)

    def documents(self, counts: csr_matrix) -> csr_matrix:
        """Return TF-IDF vectors of length 1: (num_rows, V)."""
        tfidf = counts.copy()
        tfidf.data = (1 + np.log(tfidf.data)) * self.idf[tfidf.indices]
        lengths = np.sqrt(tfidf.multiply(tfidf).sum(axis=1)).A1
        return csr_matrix(tfidf.multiply(1 / np.maximum(lengths, 1e-12)[:, None]))

    def scores(self, counts: csr_matrix) -> np.ndarray:
        """Return leaf logits, (num_rows, num_leaves)."""
        return self.documents(counts) @ self.weight.T + self.bias

    def weights(self) -> dict[str, Tensor]:
        """Return the weights of the equivalent `LexicalHead`."""
        weights = {"idf": self.idf, "weight": self.weight, "bias": self.bias}
        return {name: torch.tensor(values, dtype=torch.float32) for name, values in weights.items()}


def spread_of_log_odds(present: csr_matrix, labels: np.ndarray) -> np.ndarray:
    """Compute each token's variance over classes of log P(token | class) - log P(token | other classes).

    P is the share of documents that contain the token, smoothed by one document with it and one without (Laplace). The
    two-class NB-SVM (Wang and Manning, 2012, "Baselines and bigrams") weighs words by these log-odds, with their sign. Here
    one weight serves all classes, so that a document is one vector.

    Args:
        present: (num_rows, V), whether a document contains a token.
        labels: (num_rows,), at least two classes.

    Returns:
        (V,); 0 for a token that is equally frequent in all classes.
    """
    overall = np.asarray(present.sum(axis=0)).ravel()
    log_odds = []
    for leaf in np.unique(labels):
        rows = labels == leaf
        inside, size = np.asarray(present[rows].sum(axis=0)).ravel(), np.count_nonzero(rows)
        others = len(labels) - size
        log_odds.append(np.log((inside + 1) / (size + 2)) - np.log((overall - inside + 1) / (others + 2)))
    return np.var(log_odds, axis=0)


def fit_classifier(taxonomy: Taxonomy, train: Dataset, vocab_size: int) -> LexicalClassifier | None:
    """Fit a lexical classifier on the training rows.

    Args:
        train: rows with ``input_ids`` and ``labels``.

    Returns:
        None, with a log line, if fewer than two leaves have training rows.
    """
    labels = np.array(train["labels"])
    if len(np.unique(labels[(labels >= 0) & (labels < taxonomy.num_leaves)])) < 2:
        logger.info("no lexical head: fewer than two leaves have training rows")
        return None
    return LexicalClassifier(taxonomy, token_counts(train, vocab_size), labels)


class MultiLabelLexicalClassifier(LexicalClassifier):
    """One logistic regression per node over TF-IDF, for texts with several labels.

    A node's rows are the open ones: its label is known, and its parent's label is 1 or it is a root. The log-odds of the node
    in these rows are subtracted, because the encoder's head starts from them. Added to it, they would count twice.

    Attributes:
        idf: (V,), as for `LexicalClassifier`.
        weight, bias: (num_nodes, V) and (num_nodes,); 0 for a node whose open rows do not hold both labels.
    """

    def __init__(self, taxonomy: Taxonomy, counts: csr_matrix, labels: np.ndarray):
        """Fit the classifier.

        Args:
            counts: (num_rows, V), from `token_counts`, of the training rows.
            labels: (num_rows, num_nodes): 1, 0 or -100. Rows without a known label do not count.
        """
        is_known = (labels != IGNORED_LABEL).any(axis=1)
        counts, labels = counts[is_known], labels[is_known]
        tfidf = TfidfTransformer(sublinear_tf=True).fit(counts)
        common = np.asarray((counts > 0).sum(axis=0)).ravel() >= MIN_DOCUMENTS
        self.idf = np.where(common, tfidf.idf_ * spread_of_node_log_odds(counts > 0, labels), 0.0)
        self.weight, self.bias = np.zeros((taxonomy.num_nodes, counts.shape[1])), np.zeros(taxonomy.num_nodes)
        documents = self.documents(counts)
        is_open, priors = open_decisions(taxonomy, labels), prior_log_odds(taxonomy, labels)
        for node in range(taxonomy.num_nodes):
            rows = is_open[:, node]
            true = labels[rows, node] == 1
            if true.any() and not true.all():
                model = LogisticRegression(C=REGULARISATION, max_iter=1000).fit(documents[rows], true)
                self.weight[node], self.bias[node] = model.coef_[0], model.intercept_[0] - priors[node]


def spread_of_node_log_odds(present: csr_matrix, labels: np.ndarray) -> np.ndarray:
    """Compute each token's variance over nodes of log P(token | node) - log P(token | not the node).

    P is smoothed as in `spread_of_log_odds`, which this is for labels that exclude each other.

    Args:
        present: (num_rows, V), whether a document contains a token.
        labels: (num_rows, num_nodes): 1, 0 or -100. Nodes without both labels do not count.

    Returns:
        (V,); 0 for a token that is equally frequent with and without each node.
    """
    inside, outside = labels == 1, labels == 0
    both = inside.any(axis=0) & outside.any(axis=0)
    log_shares = []
    for rows in (inside[:, both], outside[:, both]):
        documents = (csr_matrix(rows.T, dtype=np.float64) @ present).toarray()
        log_shares.append(np.log((documents + 1) / (rows.sum(axis=0)[:, None] + 2)))
    return np.var(log_shares[0] - log_shares[1], axis=0)


def fit_multi_label_classifier(
    taxonomy: Taxonomy, train: Dataset, vocab_size: int
) -> MultiLabelLexicalClassifier | None:
    """Fit a lexical classifier on the training rows.

    Args:
        train: rows with ``input_ids`` and ``labels``, num_nodes numbers each.

    Returns:
        None, with a log line, if no node has both labels in its open rows.
    """
    labels = np.array(train.with_format("numpy")["labels"][:])
    positive, total = open_counts(taxonomy, labels)
    if not ((positive > 0) & (positive < total)).any():
        logger.info("no lexical head: no node has training rows with and without it")
        return None
    return MultiLabelLexicalClassifier(taxonomy, token_counts(train, vocab_size), labels)
