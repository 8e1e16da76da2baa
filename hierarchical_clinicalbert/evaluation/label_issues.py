"""Find training rows whose labels may be wrong, by confident learning.

Worth knowing:

1. Each row is scored by a lexical classifier that was fitted on other texts. The encoder is not used.
2. Confident learning (Northcutt, Jiang and Chuang, 2021, "Confident Learning: Estimating Uncertainty in Dataset Labels") then
   is applied to each decision of the taxonomy, over the rows whose path takes it. In multi-label data, each node is a decision,
   over the texts with its parent. So labels may be inner nodes.
3. A node with fewer than `FOLDS` texts has too few examples. Its rows are left out in that decision.
4. Rows are ranked by the probability of the label. Many listed labels are correct: `benchmarks/label_issues.py`.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix
from scipy.special import softmax

from hierarchical_clinicalbert.evaluation.forms import Form
from hierarchical_clinicalbert.evaluation.metrics import FOLDS
from hierarchical_clinicalbert.reading.columns import join_labels

FILTER = "both"  # of cleanlab: the rows that two of its rules find
COLUMNS = ("row", "label", "better_label", "why", "decision", "probability_of_label", "probability_of_better_label")


def list_label_issues(
    form: Form, counts: csr_matrix, labels: np.ndarray, texts: np.ndarray, rows: np.ndarray
) -> pd.DataFrame:
    """List the rows whose labels may be wrong, the least probable label first, in `COLUMNS`; see docs/training.md.

    Args:
        counts: how often each token occurs, (num_rows, V).
        labels, texts: see `Form`.
        rows: numbers in the source, (num_rows,).
    """
    scores, tree = out_of_fold(form, counts, labels, texts), form.tree
    found = [] if scores is None else [*find_issues(form, scores, labels, texts)]
    if not found:
        return pd.DataFrame(columns=COLUMNS)
    by_probability = pd.concat(found).sort_values("probability_of_label", kind="stable")
    issues = form.rank_issues(by_probability, scores, labels, texts)
    index = issues["index"].to_numpy()
    targets = form.decisions.outcome_targets(torch.from_numpy(labels[index]))[:, : tree.num_nodes].numpy()

    def join_deepest(nodes: Iterable[int]) -> str:
        return join_labels(tree.labels[node] for node in tree.deepest(nodes))

    columns = {
        "row": rows[index],
        "label": [join_deepest(np.flatnonzero(row).tolist()) for row in targets],
        "better_label": [*map(join_deepest, issues["better"])],
        "decision": [tree.labels[node] if node >= 0 else "" for node in issues["decision"]],
    }
    return issues.assign(**columns)[[*COLUMNS]]


def out_of_fold(form: Form, counts: csr_matrix, labels: np.ndarray, texts: np.ndarray) -> np.ndarray | None:
    """Return decision scores (num_rows, num_nodes) by classifiers that were fitted on other texts.

    Arguments are those of the form's classifier, and ids of the texts. Return None if rows are too few to tell classes apart.
    """
    fold = assign_folds(labels, texts)
    scores = np.empty((len(labels), form.decisions.num_nodes))
    for held_out in np.unique(fold):
        fitted, scored = fold != held_out, fold == held_out
        if not form.classifier.learnable(form.decisions, labels[fitted]).size:
            return None
        classifier = form.classifier(form.decisions, counts[fitted], labels[fitted])
        scores[scored] = classifier.decision_scores(counts[scored]) + classifier.removed_prior
    return scores


def assign_folds(labels: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Assign each row a fold, (num_rows,). Texts are sorted by label and assigned in turn, to spread each class evenly."""
    _, first, text_of = np.unique(texts, return_index=True, return_inverse=True)
    _, classes = np.unique(labels[first], axis=0, return_inverse=True)
    shuffled = np.random.default_rng(0).permutation(len(first))
    order = shuffled[np.argsort(classes[shuffled], kind="stable")]
    return (np.argsort(order) % FOLDS)[text_of]


def find_issues(form: Form, scores: np.ndarray, labels: np.ndarray, texts: np.ndarray) -> Iterator[pd.DataFrame]:
    """Yield each decision's rows that confident learning considers mislabelled.

    Their columns are ``index`` (of the row), ``decision`` (the parent, -1 for the roots, or a node that a text has or lacks),
    ``better`` (the decision's best other choice, -1 to lack the node), and both choices' probabilities given the parent.
    """
    from cleanlab.filter import find_label_issues  # imported here: it takes a second

    for decision, choices, rows, given, logits in form.decisions_of(scores, labels):
        # ── Choices with enough texts, and the rows that were given one of them ──
        num_texts = np.bincount(np.unique(np.stack([given, texts[rows]]), axis=1)[0], minlength=len(choices))
        kept = np.flatnonzero(num_texts >= FOLDS)
        if len(kept) < 2:
            continue
        is_kept = np.isin(given, kept)
        label, probabilities = np.searchsorted(kept, given[is_kept]), softmax(logits[is_kept][:, kept], axis=1)

        # ── The mislabelled rows. None of them has the most probable choice as its label ──
        issues = np.flatnonzero(find_label_issues(label, probabilities, filter_by=FILTER, n_jobs=1))
        places, label, probabilities = np.arange(len(issues)), label[issues], probabilities[issues]
        better = probabilities.argmax(axis=1)
        yield pd.DataFrame(
            {
                "index": rows[is_kept][issues],
                "decision": decision,
                "better": choices[kept][better],
                "probability_of_label": probabilities[places, label],
                "probability_of_better_label": probabilities[places, better],
            }
        )
