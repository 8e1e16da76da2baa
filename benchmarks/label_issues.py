"""Measure how many randomly exchanged labels ``--label_issues`` finds:

    python benchmarks/label_issues.py --data FOLDER --encoder ENCODER [--task ohsumed ohsumed_multilabel]

FOLDER holds ``ohsumed/{train,test,labels}.csv`` and ``ohsumed_multilabel/{train,test}.jsonl``; only the tokenizer of the encoder is
used. A share of the training texts gets one label exchanged for another leaf, drawn evenly: among the siblings of the label, or
anywhere. The corpus's own wrong labels count as false alarms, so precision is a lower bound. Average precision ranks all texts, with texts
that are not listed at the end.
"""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from harness import flag_parser, load_splits, print_table, read_results, spread, write_results
from scipy.sparse import csr_matrix
from sklearn.metrics import average_precision_score, precision_score, recall_score
from transformers import AutoTokenizer

from hierarchical_clinicalbert.evaluation.forms import Form, form_of
from hierarchical_clinicalbert.evaluation.label_issues import find_issues, out_of_fold
from hierarchical_clinicalbert.training.score import token_counts
from hierarchical_clinicalbert.training.tokens import tokenize_splits
from taxonomy_hierarchical import Taxonomy

SHARES = (0.05, 0.1)
METHOD = "per decision"  # see `evaluation.label_issues`


def load(task: str, data: Path, encoder: str) -> tuple[Form, csr_matrix, list[list[int]], np.ndarray]:
    """Return the form of the labels, and the token counts, labels and ids of the training texts."""
    names = str(data / "ohsumed" / "labels.csv")
    files = {split: next((data / task).glob(f"{split}.*")) for split in ("train", "test")}
    loaded = load_splits(files, None, seed=0, class_names=names, taxonomy=names, validation_size=0)
    tokenizer = AutoTokenizer.from_pretrained(encoder, model_max_length=512)
    rows = tokenize_splits(loaded.splits, tokenizer, tokenizer.model_max_length)[0]["train"]
    counts, form = token_counts(rows, len(tokenizer)), form_of(loaded.taxonomy, loaded.problem_type)
    return form, counts, rows["labels"][:], np.array(rows["text_id"])


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


def list_rows(form: Form, scores: np.ndarray, labels: np.ndarray, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a mask of the listed rows, and the label quality of all rows, from 0 to 1. Rows that are not listed have 1."""
    found = pd.concat(find_issues(form, scores, labels, texts)).sort_values("probability_of_label", kind="stable")
    issues = form.rank_issues(found, scores, labels, texts)
    lowest = issues.groupby("index")["probability_of_label"].min()
    listed, quality = np.zeros(len(texts), dtype=bool), np.ones(len(texts))
    listed[lowest.index], quality[lowest.index] = True, lowest
    return listed, quality


def study(form: Form, counts: csr_matrix, labels: list[list[int]], texts: np.ndarray, seeds: int) -> list[dict]:
    """Measure both kinds and all shares of exchanged labels."""
    results = []
    for seed, where, share in product(range(seeds), ("siblings", "anywhere"), SHARES):
        changed, exchanged = exchange(form.tree, labels, share, where, seed)
        given = form.decisions.targets(changed).numpy()
        scores = out_of_fold(form, counts, given, texts)
        listed, quality = list_rows(form, scores, given, texts)
        found = {
            "listed": int(listed.sum()),
            "precision": precision_score(exchanged, listed),
            "recall": recall_score(exchanged, listed),
            "precision_of_first_100": exchanged[np.argsort(quality, kind="stable")[:100]].mean(),
            "average_precision": average_precision_score(exchanged, -quality),
        }
        results.append({"where": where, "share": share, "seed": seed, "found": {METHOD: found}})
        print(json.dumps(results[-1]), flush=True)
    return results


def show(results: list[dict]) -> None:
    """Print the means and standard deviations over the seeds."""
    rows = [{"where": one["where"], "share": one["share"], **one["found"][METHOD]} for one in results]
    table = []
    for (where, share), scores in pd.DataFrame(rows).groupby(["where", "share"], sort=False):
        numbers = scores.drop(columns=["where", "share"])
        counts = numbers.pop("listed")
        cells = (spread(numbers[name], name) for name in numbers)
        table.append([where, f"{share:.0%}", f"{counts.mean():.0f}", *cells])
    columns = ["listed", "precision", "recall", "exchanged among the first 100", "average precision"]
    print_table(["exchanged", "share", *columns], table, left=2)


def main() -> None:
    parser = flag_parser(__doc__, "label_issues.json", "data", "encoder")
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
