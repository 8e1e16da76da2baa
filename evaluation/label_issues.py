"""Find training rows whose labels may be wrong, by confident learning.

Worth knowing:

1. Each row is scored by a lexical classifier that was fitted on other texts. The encoder is not used.
2. Confident learning (Northcutt, Jiang and Chuang, 2021, "Confident Learning: Estimating Uncertainty in Dataset Labels") then
   judges each decision of the taxonomy, over the rows whose path takes it. In multi-label data, each node is a decision,
   over the texts with its parent. So labels may be inner nodes.
3. A node with fewer than `FOLDS` texts has too few examples. Its rows are not judged in that decision.
4. Rows are ranked by the probability of the label. Many listed labels are correct: `benchmarks/studies/label_issues.py`.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset
from scipy.sparse import csr_matrix
from scipy.special import softmax

from evaluation.calibration import FOLDS, node_log_probs, rows_by_decision
from evaluation.lexical import LexicalClassifier, can_learn, token_counts
from reading.columns import join_labels
from taxonomy_hierarchical import Taxonomy
from training.data_report import conflicts, count_labels
from training.label_arrays import label_arrays, open_decisions, prior_log_odds

logger = logging.getLogger(__name__)

FILTER = "both"  # of cleanlab: the rows that two of its rules find
COLUMNS = ("row", "label", "better_label", "why", "decision", "probability_of_label", "probability_of_better_label")


def write_label_issues(taxonomy: Taxonomy, rows: Dataset, vocab_size: int, folder: Path) -> int:
    """Write ``label_issues.csv`` for tokenized training rows; return the number of rows in it."""
    file, issues = folder / "label_issues.csv", list_label_issues(taxonomy, rows, vocab_size)
    issues.to_csv(file, index=False, float_format="%.6f")
    logger.info("%d of %d training rows have a label that may be wrong: %s", len(issues), len(rows), file)
    return len(issues)


def list_label_issues(taxonomy: Taxonomy, rows: Dataset, vocab_size: int) -> pd.DataFrame:
    """List the rows whose labels may be wrong, the least probable label first, in `COLUMNS`; see docs/training.md."""
    labels, texts, names = label_arrays(rows), np.array(rows["text_id"]), taxonomy.labels
    logits = out_of_fold(taxonomy, token_counts(rows, vocab_size), labels, texts)
    judged = [] if logits is None else [*judge(taxonomy, logits, labels, texts)]
    if not judged:
        return pd.DataFrame(columns=COLUMNS)
    issues = rank_issues(taxonomy, judged, logits, labels)
    issues = issues[~np.array(rows["moved"])[issues["index"]]]  # the numbers of moved rows are of another file
    index = issues["index"].to_numpy()
    if labels.ndim == 2:
        given = [{*np.flatnonzero(labels[row] == 1).tolist()} for row in index]
        better = [corrected(taxonomy, *pair) for pair in zip(given, issues["questioned"], strict=True)]
        why = np.where(issues["better"] < 0, "unlikely label", "missing label")
    else:
        given, better = [{label} for label in labels[index]], [{label} for label in issues["better"]]
        contradicted = conflicts(count_labels(pd.DataFrame({"text_id": texts, "label": labels})), taxonomy).index
        why = np.where(np.isin(texts[index], contradicted), "conflicting duplicate", "unlikely label")
    columns = {
        "row": np.array(rows["row"])[index],
        "label": [join_labels(names[node] for node in taxonomy.deepest(nodes)) for nodes in given],
        "better_label": [join_labels(names[node] for node in taxonomy.deepest(nodes)) for nodes in better],
        "why": why,
        "decision": [names[node] if node >= 0 else "" for node in issues["decision"]],
    }
    return issues.assign(**columns)[[*COLUMNS]]


def out_of_fold(taxonomy: Taxonomy, counts: csr_matrix, labels: np.ndarray, texts: np.ndarray) -> np.ndarray | None:
    """Return logits (num_rows, num_classes) of leaves, or of the nodes given their parents, by classifiers fitted on other texts.

    Arguments are those of `LexicalClassifier`, and ids of the texts. Return None if rows are too few to tell classes apart.
    """
    fold = assign_folds(labels, texts)
    logits = np.empty((len(labels), labels.shape[1] if labels.ndim == 2 else taxonomy.num_leaves))
    for held_out in np.unique(fold):
        fitted, scored = fold != held_out, fold == held_out
        if not can_learn(taxonomy, labels[fitted]):
            return None
        logits[scored] = LexicalClassifier(taxonomy, counts[fitted], labels[fitted]).scores(counts[scored])
        if labels.ndim == 2:
            logits[scored] += prior_log_odds(taxonomy, labels[fitted])
    return logits


def assign_folds(labels: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Assign each row a fold, (num_rows,). Texts are sorted by label and assigned in turn, to spread each class evenly."""
    _, first, text_of = np.unique(texts, return_index=True, return_inverse=True)
    _, classes = np.unique(labels[first], axis=0, return_inverse=True)
    shuffled = np.random.default_rng(0).permutation(len(first))
    order = shuffled[np.argsort(classes[shuffled], kind="stable")]
    return (np.argsort(order) % FOLDS)[text_of]


def judge(taxonomy: Taxonomy, logits: np.ndarray, labels: np.ndarray, texts: np.ndarray) -> Iterator[pd.DataFrame]:
    """Yield each decision's rows that confident learning considers mislabelled.

    Their columns are those of `rank_issues`, with the decision's best other choice, and probabilities given the parent.
    """
    from cleanlab.filter import find_label_issues  # imported here: it takes a second

    for decision, choices, rows, given, scores in each_decision(taxonomy, logits, labels):
        # ── Choices with enough texts, and the rows that were given one of them ──
        num_texts = np.bincount(np.unique(np.stack([given, texts[rows]]), axis=1)[0], minlength=len(choices))
        kept = np.flatnonzero(num_texts >= FOLDS)
        if len(kept) < 2:
            continue
        judged = np.isin(given, kept)
        label, probabilities = np.searchsorted(kept, given[judged]), softmax(scores[judged][:, kept], axis=1)

        # ── The mislabelled rows, and their best other choice ──
        issues = np.flatnonzero(find_label_issues(label, probabilities, filter_by=FILTER, n_jobs=1))
        places, label, probabilities = np.arange(len(issues)), label[issues], probabilities[issues]
        others = probabilities.copy()
        others[places, label] = -1
        better = others.argmax(axis=1)
        yield pd.DataFrame(
            {
                "index": rows[judged][issues],
                "decision": decision,
                "better": choices[kept][better],
                "probability_of_label": probabilities[places, label],
                "probability_of_better_label": probabilities[places, better],
            }
        )


def each_decision(taxonomy: Taxonomy, logits: np.ndarray, labels: np.ndarray) -> Iterator[tuple]:
    """Yield each decision: its node, its choices, its rows, and the rows' given choices and scores.

    For single-path labels, the node is the parent (-1 for the roots), and the choices are its children. In multi-label data, each
    node is a decision; its choices are -1, if the text lacks the node, and the node's id. Given choices are indices into the
    choices. The softmax of the scores (num_rows, num_choices) is P(choice | parent).
    """
    if labels.ndim == 1:
        log_probs = node_log_probs(taxonomy, logits)
        for nodes, rows, given in rows_by_decision(taxonomy, labels):
            yield taxonomy.parents[nodes[0]], np.array(nodes), rows, given, log_probs[np.ix_(rows, nodes)]
        return
    for node, is_open in enumerate(open_decisions(taxonomy, labels).T):
        rows = np.flatnonzero(is_open)
        scores = logits[rows, node]
        yield node, np.array([-1, node]), rows, labels[rows, node], np.stack([np.zeros(len(rows)), scores], axis=1)


def rank_issues(taxonomy: Taxonomy, judged: list[pd.DataFrame], logits: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """Return one line per listed row, from the tables of `judge`, sorted by ``probability_of_label``.

    Columns:
        index: of the row.
        decision: the decision in which the row's label is least probable.
        better: the suggested label. It is the decision's best other choice. If the row's label is a leaf, and a leaf below this
            choice is more probable, it is the most probable such leaf.

    In multi-label data, ``better`` is the node if the text should have it, else -1. Probabilities are given the parent. The column
    ``questioned`` has all listed nodes of the text.
    """
    issues = pd.concat(judged).sort_values("probability_of_label", kind="stable")
    listed = issues.drop_duplicates("index").reset_index(drop=True)
    if labels.ndim == 2:
        questioned = issues.groupby("index")["decision"].agg(set)
        return listed.assign(questioned=questioned[listed["index"]].to_numpy())
    index = listed["index"].to_numpy()
    is_leaf, probabilities = labels[index] < taxonomy.num_leaves, np.exp(node_log_probs(taxonomy, logits[index]))
    for place in np.flatnonzero(is_leaf):
        leaves = taxonomy.leaves_at_or_below[listed.at[place, "better"]]
        best = leaves[probabilities[place, leaves].argmax()]
        if probabilities[place, best] > probabilities[place, labels[index[place]]]:
            listed.at[place, "better"] = best
    listed["probability_of_label"] = np.take_along_axis(probabilities, labels[index, None], axis=1)
    listed["probability_of_better_label"] = np.take_along_axis(probabilities, listed[["better"]].to_numpy(), axis=1)
    return listed.sort_values("probability_of_label", kind="stable")


def corrected(taxonomy: Taxonomy, nodes: set[int], questioned: set[int]) -> set[int]:
    """Add the questioned nodes that a text lacks, and remove those that it has, with the nodes below them."""
    changed = nodes ^ questioned
    return {node for node in changed if changed.issuperset(taxonomy.path(node))}
