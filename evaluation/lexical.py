"""The lexical head: a linear classifier over the bag of tokens, fitted beside the trained encoder.

Worth knowing:

1. The lexical head alone is less accurate than the encoder, but errs on other texts. `benchmarks/quality.py` measures its
   contribution. One number weighs it against the encoder, fitted with the calibration on the validation rows.
2. It is a multinomial logistic regression (scikit-learn), fitted after the encoder. Joint training was not tried.
3. A token's feature is its TF-IDF times its `spread_of_log_odds`. `benchmarks/studies/words.py` measures that factor.
4. The classifier is flat: an inner node's probability is the sum of its leaves' probabilities. One classifier per decision, as
   in HiClass, was tried on OHSUMED and was less accurate, for parents too.
5. With several labels a text, each node has a binary logistic regression over its open rows, see `MultiLabelLexicalClassifier`.
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
    """Logistic regression over TF-IDF, with the leaves as classes, fitted on the rows that are labelled with a leaf.

    Args:
        counts: (num_rows, V), from `token_counts`.
        labels: (num_rows,), node ids.

    Attributes:
        weight: (num_leaves, V); 0 for a leaf without training documents.
        bias: (num_leaves,). Leaves without training documents together have mean odds of 1 / (num_documents + 1) on the
            training documents, as if they had one document.
    """

    def __init__(self, taxonomy: Taxonomy, counts: csr_matrix, labels: np.ndarray):
        is_leaf = labels < taxonomy.num_leaves
        counts, labels = counts[is_leaf], labels[is_leaf]
        self.tfidf = TfidfTransformer(sublinear_tf=True).fit(counts)
        common = (counts > 0).sum(axis=0).A1 >= MIN_DOCUMENTS
        self.tfidf.idf_ = np.where(common, self.tfidf.idf_ * spread_of_log_odds(counts > 0, labels), 0.0)
        model = LogisticRegression(C=REGULARISATION, max_iter=1000, tol=1e-3)
        model.fit(self.tfidf.transform(counts), labels)
        coefficients, intercepts = model.coef_, model.intercept_
        if len(model.classes_) == 2:  # scikit-learn has one row: the difference between the classes
            halves = np.array([[-0.5], [0.5]])
            coefficients, intercepts = halves * coefficients, (halves * intercepts).ravel()
        self.weight, self.bias = np.zeros((taxonomy.num_leaves, counts.shape[1])), np.zeros(taxonomy.num_leaves)
        self.weight[model.classes_], self.bias[model.classes_] = coefficients, intercepts
        if len(unseen := np.setdiff1d(np.arange(taxonomy.num_leaves), model.classes_)):
            # a leaf of bias b has odds of exp(b - total) against the leaves with training documents
            total = logsumexp(self.scores(counts)[:, model.classes_], axis=1)
            share = 1 / ((len(labels) + 1) * len(unseen))
            self.bias[unseen] = np.log(share * len(labels)) - logsumexp(-total)

    def scores(self, counts: csr_matrix) -> np.ndarray:
        """Return leaf logits, (num_rows, num_leaves)."""
        return self.tfidf.transform(counts) @ self.weight.T + self.bias

    def weights(self) -> dict[str, Tensor]:
        """Return the weights of the equivalent `LexicalHead`."""
        weights = {"idf": self.tfidf.idf_, "weight": self.weight, "bias": self.bias}
        return {name: torch.tensor(values, dtype=torch.float32) for name, values in weights.items()}


def spread_of_log_odds(present: csr_matrix, labels: np.ndarray) -> np.ndarray:
    """Compute each token's variance over classes of log P(token | class) - log P(token | other classes), (V,).

    P is the share of documents that contain the token, by ``present`` (num_rows, V), smoothed by one document with it and one
    without (Laplace). The two-class NB-SVM (Wang and Manning, 2012, "Baselines and bigrams") weighs words by these log-odds,
    with their sign. Here one weight serves all classes, so that a document is one vector.
    """
    overall, log_odds = present.sum(axis=0).A1, []
    for leaf in np.unique(labels):
        rows = labels == leaf
        inside, size = present[rows].sum(axis=0).A1, np.count_nonzero(rows)
        others = len(labels) - size
        log_odds.append(np.log((inside + 1) / (size + 2)) - np.log((overall - inside + 1) / (others + 2)))
    return np.var(log_odds, axis=0)


class MultiLabelLexicalClassifier(LexicalClassifier):
    """One logistic regression per node over TF-IDF, for texts with several labels.

    A node's rows are the open ones: its label is known, and its parent's label is 1 or it is a root. The log-odds of the node
    in these rows are subtracted, because the encoder's head starts from them. Added to it, they would count twice.

    Attributes:
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
        self.tfidf = TfidfTransformer(sublinear_tf=True).fit(counts)
        common = (counts > 0).sum(axis=0).A1 >= MIN_DOCUMENTS
        self.tfidf.idf_ = np.where(common, self.tfidf.idf_ * spread_of_node_log_odds(counts > 0, labels), 0.0)
        self.weight, self.bias = np.zeros((taxonomy.num_nodes, counts.shape[1])), np.zeros(taxonomy.num_nodes)
        documents = self.tfidf.transform(counts)
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


def fit_classifier(
    taxonomy: Taxonomy, train: Dataset, vocab_size: int, wanted: bool | None = None
) -> LexicalClassifier | None:
    """Fit a classifier on the training rows; return None if it is not wanted, or there is nothing to tell apart.

    By default it is wanted if it has at most `MAX_WEIGHTS` weights.
    """
    if wanted is False:
        return None
    labels = np.array(train.with_format("numpy")["labels"][:])
    multi_label = labels.ndim == 2
    num_classes = taxonomy.num_nodes if multi_label else taxonomy.num_leaves
    if wanted is None and vocab_size * num_classes > MAX_WEIGHTS:
        size = f"{vocab_size:,} tokens times {num_classes:,} classes"
        logger.info("no lexical head: it would have %s weights; --lexical_head true", size)
        return None
    if multi_label:
        positive, total = open_counts(taxonomy, labels)
        can_learn = ((positive > 0) & (positive < total)).any()
    else:
        can_learn = len(np.unique(labels[labels < taxonomy.num_leaves])) >= 2
    if not can_learn:
        logger.info("no lexical head: the training rows do not tell any two classes apart")
        return None
    classifier = MultiLabelLexicalClassifier if multi_label else LexicalClassifier
    return classifier(taxonomy, token_counts(train, vocab_size), labels)
