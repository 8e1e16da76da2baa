"""Simulate active learning: label the least certain texts next, or random ones:

    python benchmarks/active.py --data FOLDER --encoder ENCODER

FOLDER holds OHSUMED's ``train.csv`` and ``test.csv``. The training file is a pool whose labels are
hidden. A run starts with 250 random rows. Each round fits a classifier on the labelled rows, scores
it on the test file, and labels 250 more rows of the pool:

- random: random rows;
- entropy: the rows with the greatest entropy of the leaf, which is the ``uncertainty`` of
  ``predict.py``.

The classifier is a softmax regression over mean vectors of the frozen encoder, always with the same
regularisation. Texts are truncated at 128 tokens. Three seeds draw the first rows; the table has
the mean and the standard deviation of macro-F1.
"""

import numpy as np
import pandas as pd
from harness import flag_parser, print_table, run_batches, spread, write_results
from scipy.stats import entropy
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModel, AutoTokenizer

FIRST = 250
BATCH = 250
LAST = 2000
STRENGTH = 1e-4  # of the regularisation, beside the mean loss of a text
TOKENS = 128  # of each text, so that the study takes minutes
SEEDS = (1, 2, 3)
METHODS = ("random", "entropy")


def main() -> None:
    arguments = flag_parser(__doc__, "active.json", "data", "encoder").parse_args()
    files = {
        split: pd.read_csv(arguments.data / f"{split}.csv", dtype=str)
        for split in ("train", "test")
    }
    vectors = {split: encode(arguments.encoder, [*rows["text"]]) for split, rows in files.items()}
    labels = {split: rows["label"].to_numpy() for split, rows in files.items()}
    runs = [
        {"method": method, "seed": seed, **scores}
        for method in METHODS
        for seed in SEEDS
        for scores in simulate(method, seed, vectors, labels)
    ]
    write_results(arguments.output, runs)
    rows = []
    for number, of_number in pd.DataFrame(runs).groupby("labels"):
        by_method = of_number.groupby("method")["macro_f1"]
        rows.append(
            [
                f"{number:,}",
                *(spread(by_method.get_group(method), "macro_f1") for method in METHODS),
            ]
        )
    print_table(["labels", *METHODS], rows, left=0)


def encode(encoder: str, texts: list[str]) -> np.ndarray:
    """Return the mean vectors of texts, (len(texts), hidden_size)."""
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = AutoModel.from_pretrained(encoder).eval()

    def mean_vectors(_, batch):
        mask = batch["attention_mask"].unsqueeze(-1)
        return [(model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)]

    return run_batches(tokenizer, texts, 16, mean_vectors, max_length=TOKENS)[0].numpy()


def simulate(
    method: str, seed: int, vectors: dict[str, np.ndarray], labels: dict[str, np.ndarray]
) -> list[dict[str, float]]:
    """Run one simulation, and return the scores after each round."""
    generator = np.random.default_rng(seed)
    pool = len(labels["train"])
    labelled = generator.permutation(pool)[:FIRST]
    scores = []
    while True:
        others = np.setdiff1d(np.arange(pool), labelled)
        known = vectors["train"][labelled]
        mean = known.mean(0)
        scale = np.sqrt(((known - mean) ** 2).sum(1).mean())  # the RMS distance from the mean
        model = LogisticRegression(C=1 / (2 * STRENGTH * len(labelled)), max_iter=1000)
        model.fit((known - mean) / scale, labels["train"][labelled])
        predicted = model.predict((vectors["test"] - mean) / scale)
        macro_f1 = f1_score(labels["test"], predicted, average="macro", zero_division=0)
        accuracy = accuracy_score(labels["test"], predicted)
        scores.append({"labels": len(labelled), "macro_f1": macro_f1, "accuracy": accuracy})
        print(method, seed, scores[-1], flush=True)
        if len(labelled) == LAST:
            return scores
        if method == "random":
            order = generator.random(len(others))
        else:
            order = -entropy(model.predict_proba((vectors["train"][others] - mean) / scale), axis=1)
        labelled = np.concatenate([labelled, others[order.argsort()[:BATCH]]])


if __name__ == "__main__":
    main()
