"""Fit the lexical head, a linear classifier over the bag of tokens, to add to the trained encoder.

Worth knowing:

1. The lexical head alone is less accurate than the encoder, but errs on other texts.
   `benchmarks/quality.py` measures its contribution. Calibration fits one weight for its scores,
   relative to the encoder's.
2. The lexical head is fitted after the encoder. Joint training was not tried.
3. A token's feature is its TF-IDF times its `log_odds_variance`.
4. Where classes have few rows, each class's name or description, its phrase, is one more document.
   The phrase's TF-IDF is also added to the class's weights, times one weight for all classes, which
   `evaluation.calibration` fits.
5. With one label per text, the lexical head is flat: an inner node's probability is the sum of its
   leaves' probabilities. One classifier per decision, as in HiClass, was tried on OHSUMED and was
   less accurate, for parents too.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from scipy.sparse import csc_matrix, csr_matrix
from scipy.special import logsumexp
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from decisions_hierarchical import Decisions, ManyNodes, OnePath
from hierarchical_clinicalbert.evaluation.metrics import one_hot

MIN_ROWS = 2  # a token in fewer training rows is ignored
REGULARISATION = 50.0  # C of scikit-learn: weak, since the documents are vectors of length 1
PHRASE_SCORE = 100.0  # of a text that equals the phrase, at a weight of 1
MAX_WEIGHTS = 2**23  # 64 MiB with their places: of more, each class keeps equally many, the largest


class LexicalClassifier:
    """Logistic regression over TF-IDF: base class of `LeafClassifier` and `NodeClassifier`.

    Attributes:
        default_size: fitted weights, up to which there is a head by default. Beyond it, the fit
            takes several minutes, and of leaves more than 5 GB of memory.
        classes, tokens: the ids of the classes and tokens that are fitted, (C,) and (T,). Other
            weights are 0. L-BFGS keeps some 25 arrays (C, T), so with thousands of classes
            (num_classes, V) would take too much memory.
        weight: the weights, sparse, (num_classes, V).
        bias: (num_classes,).
        log_prior: what the decision scores of the classifier hold of the classes' frequencies,
            (num_nodes,) or 0.
        phrases: how often each token occurs in each class's phrase, (num_classes, V), or None.
    """

    default_size: int
    weight: csc_matrix
    classes: np.ndarray
    log_prior: np.ndarray | float = 0.0

    def __init__(
        self,
        decisions: Decisions,
        counts: csr_matrix,
        outcomes: np.ndarray,
        phrases: csr_matrix | None = None,
    ):
        self.decisions = decisions
        self.phrases = phrases
        self.tfidf = TfidfTransformer(sublinear_tf=True).fit(counts)
        common = common_tokens(counts)
        idf = np.zeros_like(self.tfidf.idf_)
        idf[common] = self.tfidf.idf_[common] * log_odds_variance(counts[:, common] > 0, outcomes)
        self.tfidf.idf_ = idf
        # scikit-learn needs a feature
        self.tokens = np.flatnonzero(idf) if idf.any() else np.array([0])
        self.bias = np.zeros(decisions.num_classes)
        self.documents = self.tfidf.transform(counts)[:, self.tokens]

    def set_weights(self, fitted: Iterable[np.ndarray]) -> None:
        """Set the weights of the fitted classes, (T,) each. Beyond `MAX_WEIGHTS` of all classes,
        the smallest become 0.

        DiSMEC (Babbar and Schölkopf, 2017, "DiSMEC: distributed sparse machines for extreme
        multi-label classification") also leaves out weights close to 0.
        """
        limit = max(1, MAX_WEIGHTS // len(self.classes))
        entries: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for node, weights in zip(self.classes, fitted, strict=True):
            largest = np.argsort(-np.abs(weights))[:limit]
            largest = largest[weights[largest] != 0]
            entries.append((weights[largest], np.full(len(largest), node), self.tokens[largest]))
        values, classes, tokens = map(np.concatenate, zip(*entries, strict=True))
        self.weight = csc_matrix(
            (values, (classes, tokens)), shape=(len(self.bias), len(self.tfidf.idf_))
        )

    def scores(self, counts: csr_matrix) -> np.ndarray:
        """Return scores of the classes, (num_rows, num_classes)."""
        return (self.tfidf.transform(counts) @ self.weight.T).toarray() + self.bias

    def decision_scores(self, counts: csr_matrix) -> np.ndarray:
        """Return decision scores, (num_rows, num_nodes)."""
        return self.decisions.of_classes(torch.from_numpy(self.scores(counts))).numpy()

    def phrase_scores(self, counts: csr_matrix) -> np.ndarray:
        """Return decision scores of texts by their cosine with the phrases,
        (num_rows, num_nodes).
        """
        scores = (self.tfidf.transform(counts) @ self._phrase_weights().T).toarray()
        return self.decisions.of_classes(torch.from_numpy(scores)).numpy()

    def add_phrases(self, factor: float) -> None:
        """Add ``factor`` times the phrases' weights to those of the classes."""
        self.weight = csc_matrix(self.weight + factor * self._phrase_weights())

    def _phrase_weights(self) -> csr_matrix:
        return PHRASE_SCORE * self.tfidf.transform(self.phrases)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights of the equivalent `LexicalHead`, for its `of_weights`."""
        entries = self.weight.tocoo()
        weight = torch.sparse_coo_tensor(
            np.stack(entries.coords), entries.data, entries.shape, check_invariants=True
        )
        idf = torch.tensor(self.tfidf.idf_)
        bias = torch.tensor(self.bias)
        return {"idf": idf.float(), "weight": weight.float(), "bias": bias.float()}


class LeafClassifier(LexicalClassifier):
    """A multinomial regression over the leaves. Only rows labelled with a leaf count.

    ``counts`` are (num_rows, V), and ``labels`` node ids (num_rows,). Leaves without training
    documents get weights of 0. Together they have mean odds of 1 / (num_rows + 1) on the training
    documents, as if they had one document.

    ``log_prior`` is the logarithm of the number of documents at or below each node, plus ½.
    """

    default_size = 2**24

    def __init__(
        self,
        decisions: OnePath,
        counts: csr_matrix,
        labels: np.ndarray,
        phrases: csr_matrix | None = None,
    ):
        is_leaf = labels < decisions.num_leaves
        counts = counts[is_leaf]
        labels = labels[is_leaf]
        self.classes, given = np.unique(labels, return_inverse=True)
        super().__init__(decisions, counts, one_hot(given, len(self.classes)), phrases)
        self.log_prior = np.log(decisions.count_outcomes(torch.from_numpy(labels)).numpy() + 0.5)

        model = LogisticRegression(C=REGULARISATION, max_iter=1000, tol=1e-3).fit(
            self.documents, labels
        )
        coefficients = model.coef_
        intercepts = model.intercept_
        if len(model.classes_) == 2:  # scikit-learn has one row: the difference between the classes
            factors = np.array([[-0.5], [0.5]])
            coefficients = factors * coefficients
            intercepts = (factors * intercepts).ravel()
        self.bias[self.classes] = intercepts
        self.set_weights(coefficients)
        if len(unseen := np.setdiff1d(np.arange(len(self.bias)), self.classes)):
            # a leaf of bias b has odds of exp(b - total) against the leaves with training documents
            total = logsumexp(self.documents @ coefficients.T + intercepts, axis=1)
            share = 1 / ((len(labels) + 1) * len(unseen))
            self.bias[unseen] = np.log(share * len(labels)) - logsumexp(-total)

    @staticmethod
    def learnable(decisions: OnePath, labels: np.ndarray) -> np.ndarray:
        """Return the labelled leaves if there are several, else none: the classes that the
        labels tell apart.
        """
        leaves = np.unique(labels[labels < decisions.num_leaves])
        return leaves if len(leaves) > 1 else leaves[:0]


class NodeClassifier(LexicalClassifier):
    """A binary regression for each node, over the rows in which its decision is open.

    ``counts`` are (num_rows, V), and ``labels`` 1 or 0, (num_rows, num_nodes). A node whose open
    rows do not hold both labels has weights of 0. The node's log-odds in these rows
    (`ManyNodes.initial_biases`) are subtracted: the encoder's head starts from them, and they would
    count twice.
    """

    default_size = 2**27  # deep nodes have few open rows, so their fits are short

    def __init__(
        self,
        decisions: ManyNodes,
        counts: csr_matrix,
        labels: np.ndarray,
        phrases: csr_matrix | None = None,
    ):
        super().__init__(decisions, counts, labels, phrases)
        is_open = decisions.open_decisions(torch.from_numpy(labels)).numpy()
        prior = decisions.initial_biases(decisions.count_outcomes(torch.from_numpy(labels))).numpy()
        self.classes = self.learnable(decisions, labels)

        def fit() -> Iterator[np.ndarray]:
            for node in self.classes:
                rows = is_open[:, node]
                model = LogisticRegression(C=REGULARISATION, max_iter=1000)
                model.fit(self.documents[rows], labels[rows, node] == 1)
                self.bias[node] = model.intercept_[0] - prior[node]
                yield model.coef_[0]

        self.set_weights(fit())

    @staticmethod
    def learnable(decisions: ManyNodes, labels: np.ndarray) -> np.ndarray:
        """Return the nodes that some of their open rows have, and others lack."""
        present = decisions.count_outcomes(torch.from_numpy(labels))[: decisions.num_nodes]
        with_parent = decisions.of_parents(present[None], len(labels))[0]
        return np.flatnonzero((present > 0) & (present < with_parent))


def common_tokens(counts: csr_matrix) -> np.ndarray:
    """Return the ids of the tokens in at least `MIN_ROWS` rows, from counts (num_rows, V)."""
    return np.flatnonzero((counts > 0).sum(axis=0).A1 >= MIN_ROWS)


def log_odds_variance(present: csr_matrix, labels: np.ndarray) -> np.ndarray:
    """Compute each token's variance over classes of log P(token | class) - log P(token | not the
    class), (V,).

    P is the share of documents that contain the token, smoothed by one document with it and one
    without (Laplace). The two-class NB-SVM (Wang and Manning, 2012, "Baselines and bigrams") weighs
    words by these log-odds, with their sign. Here one weight serves all classes, so that a document
    is one vector. Labels are (num_rows, num_classes): 1 or 0. Classes without both labels do not
    count. With one class, it is the square of the log-odds.
    """
    labels = labels[:, (labels == 1).any(axis=0) & (labels == 0).any(axis=0)]
    inside = (csr_matrix((labels == 1).T, dtype=float) @ present).toarray()
    outside = present.sum(axis=0).A1 - inside
    sizes = [(labels == label).sum(axis=0)[:, None] for label in (1, 0)]
    log_odds = np.log((inside + 1) / (sizes[0] + 2)) - np.log((outside + 1) / (sizes[1] + 2))
    return np.var(log_odds, axis=0) if len(log_odds) > 1 else log_odds[0] ** 2
