"""Compare heads whose parents' and children's scores depend on each other or not, after ``pip install sentence-transformers``:

    python benchmarks/studies/decisions.py --data FOLDER --encoder ENCODER

FOLDER holds OHSUMED's ``train.csv`` and ``labels.csv``. Linear heads are fitted on mean vectors of the frozen encoder, and scored
by five-fold cross-validation on the training file alone:

- flat: one softmax over the leaves;
- independent: a softmax over the children of each parent; the score of a parent ignores its children;
- nested: the same, but a parent's score includes its children's, as in `modeling_hierarchical.HierarchicalHeads`.

Supports docs/experiments.md, "2026-11-25: Nested logit".
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sentence_transformers import SentenceTransformer
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from configuration_hierarchical import HierarchicalConfig
from modeling_hierarchical import HierarchicalHeads, negative_log_likelihood
from taxonomy_hierarchical import Taxonomy

PENALTIES = (1e-4, 3e-4, 1e-3)


class Flat(HierarchicalHeads):
    def forward(self, pooled: Tensor) -> Tensor:
        scores = torch.nn.functional.linear(pooled, self.weight, self.bias)[:, : self.num_leaves]
        return torch.nn.functional.pad(scores.log_softmax(1), (0, self.num_nodes - self.num_leaves))


class Independent(HierarchicalHeads):
    def forward(self, pooled: Tensor) -> Tensor:
        scores = torch.nn.functional.linear(pooled, self.weight, self.bias)
        return self.decisions.node_log_probs(scores)


HEADS = {"flat": Flat, "independent": Independent, "nested": HierarchicalHeads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "studies" / "results" / "decisions.json")
    arguments = parser.parse_args()
    rows = pd.read_csv(arguments.data / "train.csv", dtype=str)
    codes = pd.read_csv(arguments.data / "labels.csv", dtype=str)
    tree = Taxonomy.from_file(arguments.data / "labels.csv")
    names = dict(zip(codes["label"], codes["name"], strict=True))
    labels = np.array([tree.id(names[code]) for code in rows["label"]])
    body = SentenceTransformer(arguments.encoder)
    body.max_seq_length = 512
    encoded = body.encode(rows["text"].tolist(), batch_size=16, normalize_embeddings=True, show_progress_bar=True)
    vectors = 5 * torch.tensor(encoded)
    results = []
    for penalty in PENALTIES:
        for name, heads in HEADS.items():
            log_probs = np.zeros((len(labels), tree.num_leaves))
            for known, others in StratifiedKFold(5, shuffle=True, random_state=0).split(vectors, labels):
                fitted = fit(heads, tree, vectors[known], torch.tensor(labels[known]), penalty)
                with torch.inference_mode():
                    log_probs[others] = fitted(vectors[others])[:, : tree.num_leaves].numpy()
            predictions = log_probs.argmax(1)
            results.append(
                {
                    "heads": name,
                    "penalty": penalty,
                    "accuracy": accuracy_score(labels, predictions),
                    "macro_f1": f1_score(labels, predictions, average="macro"),
                    "log_loss": -log_probs[np.arange(len(labels)), labels].mean(),
                }
            )
            print(results[-1], flush=True)
    arguments.output.write_text(json.dumps({"documents": len(labels), "results": results}, indent=2) + "\n")
    print("\n| heads | penalty | accuracy | macro-F1 | log loss |\n| --- | ---: | ---: | ---: | ---: |")
    for run in results:
        print(
            f"| {run['heads']} | {run['penalty']:g} | {run['accuracy']:.1%} | {run['macro_f1']:.1%} | {run['log_loss']:.3f} |"
        )


def fit(
    kind: type[HierarchicalHeads], tree: Taxonomy, vectors: Tensor, labels: Tensor, penalty: float
) -> HierarchicalHeads:
    """Fit heads: minimise the mean negative log-likelihood plus ``penalty`` times the squared norm of the weights."""
    heads = kind(HierarchicalConfig(text_config={"model_type": "bert", "hidden_size": vectors.shape[1]}, taxonomy=tree))
    heads.fill_buffers()
    torch.nn.init.zeros_(heads.weight)
    torch.nn.init.zeros_(heads.bias)
    optimizer = torch.optim.LBFGS(heads.parameters(), max_iter=150, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = negative_log_likelihood(heads(vectors), labels) + penalty * heads.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return heads


if __name__ == "__main__":
    main()
