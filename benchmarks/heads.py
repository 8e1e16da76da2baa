"""Measure the cost of taxonomies of a thousand and of 26,000 nodes: ``python benchmarks/heads.py``.

The forward pass of the whole model, encoder included, reads 16 texts of 256 tokens, with 6, 1,186 and 26,187 nodes. The encoder has
MiniLM's size (6 layers, hidden size 384) and random weights. Lexical heads have as many weights as training keeps, at random
tokens. The models alternate. Times are of the processor, on one thread, and ratios are between medians.
"""

import statistics
import time

import torch
from harness import RESULTS, write_results

from configuration_hierarchical import Calibration, HierarchicalConfig
from hierarchical_clinicalbert.evaluation.lexical import MAX_WEIGHTS
from modeling_hierarchical import HierarchicalForSequenceClassification
from taxonomy_hierarchical import DEFAULT_TAXONOMY, Taxonomy

SIZE = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
LARGE = [*({f"group {i}": [f"class {i}.{j}" for j in range(12)]} for i in range(91)), "one", "two", "three"]
ROUNDS = 3
SETTINGS: dict[str, dict[str, str]] = {
    "one label": {},
    "several labels": {"problem_type": "multi_label_classification"},
    "several labels, lexical head": {"problem_type": "multi_label_classification"},
    "several labels, label attention": {"problem_type": "multi_label_classification", "pooling": "label_attention"},
    "several labels, family attention": {"problem_type": "multi_label_classification", "pooling": "family_attention"},
}


def codes() -> list[dict]:
    """Return a taxonomy of the size of ICD-10-CM's tables, with four levels."""

    def block(name: str) -> dict:
        return {name: [{f"{name}.{k}": [f"{name}.{k}.{m}" for m in range(10)]} for k in range(8)]}

    return [{f"chapter {i}": [block(f"{i}.{j}") for j in range(14)]} for i in range(21)]


def add_lexical_head(model: HierarchicalForSequenceClassification) -> None:
    classes, tokens = model.config.num_labels, model.config.text_config.vocab_size
    kept = min(tokens, MAX_WEIGHTS // classes)
    places = torch.stack([torch.arange(classes).repeat_interleave(kept), torch.randint(tokens, (classes * kept,))])
    weight = torch.sparse_coo_tensor(places, torch.randn(classes * kept), (classes, tokens))
    lexical = {"idf": torch.rand(tokens), "weight": weight, "bias": torch.zeros(classes)}
    model.set_calibration(Calibration(lexical_weight=1.0), lexical)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    trees = [Taxonomy(tree) for tree in (DEFAULT_TAXONOMY, LARGE, codes())]
    models = {}
    for name, settings in SETTINGS.items():
        for tree in trees:
            config = HierarchicalConfig(text_config={"model_type": "bert", **SIZE}, taxonomy=tree, **settings)
            models[name, tree.num_nodes] = HierarchicalForSequenceClassification(config).eval()
            if "lexical" in name:
                add_lexical_head(models[name, tree.num_nodes])
    inputs = {"input_ids": torch.randint(5, 30000, (16, 256)), "attention_mask": torch.ones(16, 256, dtype=torch.long)}
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in models}
    with torch.inference_mode():
        for round_number in range(ROUNDS + 1):
            for key, model in models.items():
                started = time.process_time()
                model(**inputs)
                if round_number:  # the first warms up
                    seconds[key].append(time.process_time() - started)
    result: dict = {"nodes": [tree.num_nodes for tree in trees]}
    for name in SETTINGS:
        times = [statistics.median(seconds[name, tree.num_nodes]) for tree in trees]
        print(f"{name}: {', '.join(f'{1000 * time:.1f} ms ({time / times[0]:.2f})' for time in times)}")
        result[name] = {"milliseconds": [1000 * time for time in times], "ratios": [time / times[0] for time in times]}
    write_results(RESULTS / "heads.json", result)


if __name__ == "__main__":
    main()
