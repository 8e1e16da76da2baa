"""Measure how many randomly exchanged labels ``--label_issues`` finds, and what dropping the listed rows gains:

    python benchmarks/label_issues.py --data FOLDER --encoder ENCODER [--task ohsumed ohsumed_multilabel]

FOLDER holds ``ohsumed/{train,test,labels}.csv`` and ``ohsumed_multilabel/{train,test}.jsonl``; only the tokenizer of the encoder is
used. A share of the training texts gets one label exchanged for another leaf, drawn evenly: among the siblings of the label, or
anywhere. The two methods have the same cross-validated probabilities of the lexical classifier:

- per decision: `evaluation.label_issues`;
- flat: cleanlab over the probabilities of the leaves, in multi-label data with one list of labels per text.

The corpus's own wrong labels count as false alarms, so precision is a lower bound. Average precision ranks all texts, with texts
that are not listed at the end. Then the lexical classifier alone is trained on the rows and scored on the test file.
"""

import json
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from cleanlab import filter, multilabel_classification, rank
from harness import flag_parser, print_table, read_results, write_results
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, precision_score, recall_score
from transformers import AutoTokenizer

from decisions_hierarchical import Decisions
from hierarchical_clinicalbert.data.arguments import DataArguments
from hierarchical_clinicalbert.data.labels import resolve_labels
from hierarchical_clinicalbert.data.sources import read_rows
from hierarchical_clinicalbert.data.splits import split_rows
from hierarchical_clinicalbert.evaluation.forms import Form, form_of
from hierarchical_clinicalbert.evaluation.label_issues import FILTER, find_issues, out_of_fold
from hierarchical_clinicalbert.evaluation.lexical import REGULARISATION, LexicalClassifier
from hierarchical_clinicalbert.evaluation.metrics import one_hot
from hierarchical_clinicalbert.training.score import token_counts
from hierarchical_clinicalbert.training.tokens import tokenize_splits
from taxonomy_hierarchical import Taxonomy

SHARES = (0.05, 0.1)
SCORE = "self_confidence"  # of cleanlab: the probability of the label


class WeightedClassifier(LexicalClassifier):
    """Fit with a weight for each training row. All rows must be labelled with leaves."""

    def __init__(self, decisions: Decisions, counts: csr_matrix, labels: np.ndarray, weights: np.ndarray):
        self.classes, given = np.unique(labels, return_inverse=True)
        super().__init__(decisions, counts, one_hot(given, len(self.classes)))
        model = LogisticRegression(C=REGULARISATION, max_iter=1000, tol=1e-3).fit(self.documents, labels, weights)
        self.weight, self.bias[self.classes] = model.coef_, model.intercept_


def load(task: str, data: Path, encoder: str) -> tuple[Form, dict[str, csr_matrix], dict[str, list], np.ndarray]:
    """Return the form of the labels, the token counts and labels of each split, and the ids of the training texts."""
    names = str(data / "ohsumed" / "labels.csv")
    files = {f"{split}_file": str(next((data / task).glob(f"{split}.*"))) for split in ("train", "test")}
    arguments = DataArguments(**files, class_names=names, taxonomy=names, validation_size=0)
    loaded = split_rows(resolve_labels(read_rows(arguments), arguments), seed=0)
    tokenizer = AutoTokenizer.from_pretrained(encoder, model_max_length=512)
    rows, _ = tokenize_splits(loaded.splits, tokenizer, tokenizer.model_max_length)
    counts = {split: token_counts(part, len(tokenizer)) for split, part in rows.items()}
    labels = {split: part["labels"][:] for split, part in rows.items()}
    return form_of(loaded.taxonomy, loaded.problem_type), counts, labels, np.array(rows["train"]["text_id"])


def exchange(tree: Taxonomy, labels: list, share: float, where: str, seed: int) -> tuple[list, np.ndarray]:
    """Exchange one label in a share of the rows for another leaf. Return all labels, and a mask of the exchanged rows."""
    generator, changed = np.random.default_rng(seed), list(labels)
    exchanged = np.zeros(len(labels), dtype=bool)
    for row in generator.permutation(len(labels)):
        if exchanged.sum() == round(share * len(labels)):
            break
        given = labels[row]
        old = int(generator.choice(given))
        others = set(tree.children(tree.parents[old]) if where == "siblings" else range(tree.num_leaves)) - {*given}
        if others:
            new = int(generator.choice(sorted(others)))
            changed[row] = sorted({*given, new} - {old})
            exchanged[row] = True
    return changed, exchanged


def per_decision(
    form: Form, scores: np.ndarray, labels: np.ndarray, texts: np.ndarray, ranked: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Return a mask of the listed rows, and the label quality of all rows, from 0 to 1. Rows that are not listed have 1.

    The quality is the probability of the label. Without ``ranked``, it is the probability of the label's worst decision.
    """
    found = pd.concat(find_issues(form, scores, labels, texts)).sort_values("probability_of_label", kind="stable")
    issues = form.rank_issues(found, scores, labels, texts) if ranked else found
    lowest = issues.groupby("index")["probability_of_label"].min()
    listed, quality = np.zeros(len(texts), dtype=bool), np.ones(len(texts))
    listed[lowest.index], quality[lowest.index] = True, lowest
    return listed, quality


def flat(
    form: Form, scores: np.ndarray, labels: np.ndarray, texts: np.ndarray, rule: str = FILTER, score: str = SCORE
) -> tuple[np.ndarray, np.ndarray]:
    """Return the same as `per_decision`, by cleanlab over the leaves alone, with cleanlab's names of a rule and a score."""
    probabilities = form.decisions(torch.from_numpy(scores))[0].exp().numpy()[:, : form.tree.num_leaves]
    if labels.ndim == 2:
        given = [np.flatnonzero(row == 1).tolist() for row in labels[:, : form.tree.num_leaves]]
        listed = multilabel_classification.filter.find_label_issues(given, probabilities, filter_by=rule, n_jobs=1)
        quality = multilabel_classification.get_label_quality_scores(given, probabilities, method=score)
    else:
        listed = filter.find_label_issues(labels, probabilities, filter_by=rule, n_jobs=1)
        quality = rank.get_label_quality_scores(labels, probabilities, method=score)
    return listed, np.where(listed, quality, 1)


OURS = "per decision"
METHODS = {
    OURS: per_decision,
    "per decision, by its worst choice": partial(per_decision, ranked=False),
    "flat": flat,
    "flat, by its margin": partial(flat, score="normalized_margin"),
    "flat, default rule": partial(flat, rule="prune_by_noise_rate"),
}


def fit(form: Form, counts: dict[str, csr_matrix], labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Train the lexical classifier. Return its scores of the test rows: leaf logits, or node probabilities if multi-label."""
    kept = weights > 0
    rows = form.decisions, counts["train"][kept], labels[kept]
    if labels.ndim == 1:
        return WeightedClassifier(*rows, weights[kept]).scores(counts["test"])
    classifier = form.classifier(*rows)
    scores = classifier.decision_scores(counts["test"]) + classifier.removed_prior
    return form.decisions(torch.from_numpy(scores))[0].exp().numpy()


def measure(true: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Return the metrics of the test rows, from the scores of `fit`."""
    if true.ndim == 1:
        predictions = scores.argmax(axis=1)
        macro_f1 = f1_score(true, predictions, average="macro")
        return {"accuracy": accuracy_score(true, predictions), "macro_f1": macro_f1}
    precision = average_precision_score(true, scores, average="macro")
    return {"mean_average_precision": precision, "micro_f1": f1_score(true, scores >= 0.5, average="micro")}


def study(
    form: Form, counts: dict[str, csr_matrix], labels: dict[str, list], texts: np.ndarray, seeds: int
) -> list[dict]:
    """Measure both kinds and all shares of exchanged labels."""
    test, results = form.decisions.targets(labels["test"]).numpy(), []
    for seed, where, share in product(range(seeds), ("siblings", "anywhere"), SHARES):
        changed, exchanged = exchange(form.tree, labels["train"], share, where, seed)
        given = form.decisions.targets(changed).numpy()
        scores = out_of_fold(form, counts["train"], given, texts)
        found, trained = {}, {}
        for name, method in METHODS.items():
            listed, quality = method(form, scores, given, texts)
            found[name] = {
                "listed": int(listed.sum()),
                "precision": precision_score(exchanged, listed),
                "recall": recall_score(exchanged, listed),
                "precision_of_first_100": exchanged[np.argsort(quality, kind="stable")[:100]].mean(),
                "average_precision": average_precision_score(exchanged, -quality),
            }
            if name == OURS:
                everything = np.ones(len(texts))
                weights = {"all rows": everything, "listed rows dropped": everything - listed}
                if given.ndim == 1:
                    weights["listed rows weighted by quality"] = quality
                weights["exchanged rows dropped"] = everything - exchanged
        for name, weight in weights.items():
            trained[name] = measure(test, fit(form, counts, given, weight))
        results.append({"where": where, "share": share, "seed": seed, "found": found, "trained": trained})
        print(json.dumps(results[-1]), flush=True)
    return results


def show(results: list[dict]) -> None:
    """Print the means and standard deviations over the seeds."""
    for part in ("found", "trained"):
        names, table = [*next(iter(results[0][part].values()))], []
        rows = [
            {"where": one["where"], "share": one["share"], "name": name, **scores}
            for one in results
            for name, scores in one[part].items()
        ]
        for (where, share, name), scores in pd.DataFrame(rows).groupby(["where", "share", "name"], sort=False):
            numbers = scores.drop(columns=["where", "share", "name"]).agg(["mean", "std"]).fillna(0)
            cells = (
                f"{mean:.0f} ± {std:.0f}" if mean > 1 else f"{100 * mean:.1f} ± {100 * std:.1f}"
                for mean, std in numbers.T.to_numpy()
            )
            table.append([where, f"{share:.0%}", name, *cells])
        print_table(["exchanged", "share", part, *names], table, left=3)


def main() -> None:
    parser = flag_parser(__doc__, "label_issues.json")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--task", nargs="+", default=["ohsumed", "ohsumed_multilabel"])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    results = read_results(arguments.output, {})
    for task in arguments.task:
        results[task] = study(*load(task, arguments.data, arguments.encoder), arguments.seeds)
        show(results[task])
        write_results(arguments.output, results)


if __name__ == "__main__":
    main()
