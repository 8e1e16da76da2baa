"""The lexical head: a linear classifier over the bag of tokens, fitted beside the trained encoder.

Worth knowing:

1. On its own it is correct less often than the encoder, but on other texts. `benchmarks/quality.py` shows what it adds.
2. It is multinomial logistic regression (scikit-learn) on the training rows, and is fitted once, after the encoder. Training
   the two together was not tried.
3. A token counts by its TF-IDF times how unlike the classes use it, `spread_of_log_odds`. `benchmarks/studies/words.py` shows what
   that is worth.
4. Its weight against the encoder is one number, fitted with the calibration on the validation rows and kept in config.json.
5. It is one flat classifier; an inner node has the sum of its leaves' probabilities. One classifier for each decision, as in
   HiClass, was tried on OHSUMED and was correct less often, for parents too.
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

from taxonomy_hierarchical import Taxonomy

logger = logging.getLogger(__name__)

FEWEST_DOCUMENTS = 2  # of a token that is counted
REGULARISATION = 50.0  # C of scikit-learn: weak, since the documents are vectors of length 1
MOST_WEIGHTS = 2**24  # 64 MiB


def token_counts(rows: Dataset, vocab_size: int) -> csr_matrix:
    """Count how often each token id occurs in each row: (num_rows, vocab_size), special tokens included."""
    columns = rows.with_format("arrow")["input_ids"]
    chunks = getattr(columns, "chunks", [columns])
    lengths = np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks])
    ids = np.concatenate([chunk.flatten().to_numpy() for chunk in chunks])
    pointers = np.concatenate([[0], np.cumsum(lengths)])
    counts = csr_matrix((np.ones(len(ids)), ids, pointers), shape=(len(rows), vocab_size))
    counts.sum_duplicates()
    return counts


class LexicalClassifier:
    """Logistic regression of the leaves over TF-IDF.

    Attributes:
        idf: (V,), the inverse document frequency times the spread of log odds; 0 for tokens of fewer than two training documents.
        weight: (num_leaves, V).
        bias: (num_leaves,). Leaves without training documents have weights of 0, and all of them together the share that one
            document more would have, on average over the training documents.
    """

    def __init__(self, taxonomy: Taxonomy, counts: csr_matrix, labels: np.ndarray):
        """Fit the classifier.

        Args:
            counts: of `token_counts`, of the training rows.
            labels: (num_rows,), node ids or -100. Only rows labelled with a leaf take part.
        """
        is_leaf = (labels >= 0) & (labels < taxonomy.num_leaves)
        counts, labels = counts[is_leaf], labels[is_leaf]
        tfidf = TfidfTransformer(sublinear_tf=True).fit(counts)
        common = np.asarray((counts > 0).sum(axis=0)).ravel() >= FEWEST_DOCUMENTS
        self.idf = np.where(common, tfidf.idf_ * spread_of_log_odds(counts > 0, labels), 0.0)
        model = LogisticRegression(C=REGULARISATION, max_iter=1000, tol=1e-3).fit(self.documents(counts), labels)
        self.weight = np.zeros((taxonomy.num_leaves, counts.shape[1]))
        two = len(model.classes_) == 2  # one row of coefficients then, the difference between the classes
        coefficients = np.vstack([-model.coef_, model.coef_]) / 2 if two else model.coef_
        intercepts = np.concatenate([-model.intercept_, model.intercept_]) / 2 if two else model.intercept_
        self.weight[model.classes_] = coefficients
        self.bias = np.zeros(taxonomy.num_leaves)
        self.bias[model.classes_] = intercepts
        if len(unseen := np.setdiff1d(np.arange(taxonomy.num_leaves), model.classes_)):
            # beside the others a leaf of bias b has the share exp(b - total) of a document
            total = logsumexp(self.scores(counts)[:, model.classes_], axis=1)
            share = 1 / ((len(labels) + 1) * len(unseen))
            self.bias[unseen] = np.log(share * len(labels)) - logsumexp(-total)

    def documents(self, counts: csr_matrix) -> csr_matrix:
        """Return TF-IDF vectors of length 1: (num_rows, V)."""
        weighed = counts.copy()
        weighed.data = (1 + np.log(weighed.data)) * self.idf[weighed.indices]
        lengths = np.sqrt(weighed.multiply(weighed).sum(axis=1)).A1
        return csr_matrix(weighed.multiply(1 / np.maximum(lengths, 1e-12)[:, None]))

    def scores(self, counts: csr_matrix) -> np.ndarray:
        """Return scores (num_rows, num_leaves), whose softmax are this classifier's own probabilities."""
        return self.documents(counts) @ self.weight.T + self.bias

    def weights(self) -> dict[str, Tensor]:
        """Return the weights of a `LexicalHead` with these scores."""
        weights = {"idf": self.idf, "weight": self.weight, "bias": self.bias}
        return {name: torch.tensor(values, dtype=torch.float32) for name, values in weights.items()}


def spread_of_log_odds(present: csr_matrix, labels: np.ndarray) -> np.ndarray:
    """Measure how unlike the classes use each token: the variance over classes of log P(token | class) - log P(token | others).

    P is the share of documents that have the token, with one document more that has it and one that has not (Laplace). These
    log-odds, with their sign, weigh the words of the two-class NB-SVM (Wang and Manning, 2012, "Baselines and bigrams"); one
    weight for all classes keeps a document one vector.

    Args:
        present: (num_rows, V), which tokens a document has.
        labels: (num_rows,), of at least two classes.

    Returns:
        (V,); 0 for a token that all classes use alike.
    """
    everywhere = np.asarray(present.sum(axis=0)).ravel()
    log_odds = []
    for leaf in np.unique(labels):
        rows = labels == leaf
        inside, size = np.asarray(present[rows].sum(axis=0)).ravel(), np.count_nonzero(rows)
        others = len(labels) - size
        log_odds.append(np.log((inside + 1) / (size + 2)) - np.log((everywhere - inside + 1) / (others + 2)))
    return np.var(log_odds, axis=0)


def fit_classifier(taxonomy: Taxonomy, train: Dataset, vocab_size: int) -> LexicalClassifier | None:
    """Fit a lexical classifier on the training rows.

    Args:
        train: rows with ``input_ids`` and ``labels``.

    Returns:
        None, and a line in the log, where fewer than two leaves have training rows.
    """
    labels = np.array(train["labels"])
    if len(np.unique(labels[(labels >= 0) & (labels < taxonomy.num_leaves)])) < 2:
        logger.info("no lexical head: fewer than two leaves have training rows")
        return None
    return LexicalClassifier(taxonomy, token_counts(train, vocab_size), labels)
