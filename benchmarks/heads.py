"""Measure the cost of a taxonomy of 26,187 nodes: ``python benchmarks/heads.py``.

The forward pass of the whole model, encoder included, reads 16 texts of 256 tokens, with 6 and
26,187 nodes. The encoder has MiniLM's size (6 layers, hidden size 384) and random weights. Lexical
heads have as many weights as training keeps, at random tokens. The models alternate. Times are of
the processor, on one thread. The least of three counts.
"""

import time

import torch
from harness import RESULTS, write_results

from configuration_hierarchical import Calibration, HierarchicalConfig
from hierarchical_clinicalbert.evaluation.lexical import MAX_WEIGHTS
from modeling_hierarchical import HierarchicalForSequenceClassification
from taxonomy_hierarchical import DEFAULT_TAXONOMY, Taxonomy

SIZE = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
SETTINGS: dict[str, dict[str, str]] = {
    "one label": {},
    "several labels": {"problem_type": "multi_label_classification"},
    "several labels, lexical head": {"problem_type": "multi_label_classification"},
    "several labels, label attention": {
        "problem_type": "multi_label_classification",
        "pooling": "label_attention",
    },
    "several labels, family attention": {
        "problem_type": "multi_label_classification",
        "pooling": "family_attention",
    },
}


def codes() -> list[dict]:
    """Return a taxonomy of the size of ICD-10-CM's tables, with four levels."""

    def block(name: str) -> dict:
        return {name: [{f"{name}.{k}": [f"{name}.{k}.{m}" for m in range(10)]} for k in range(8)]}

    return [{f"chapter {i}": [block(f"{i}.{j}") for j in range(14)]} for i in range(21)]


def add_lexical_head(model: HierarchicalForSequenceClassification) -> None:
    """Add a lexical head with random weights, as many as training keeps."""
    classes = model.config.num_labels
    tokens = model.config.text_config.vocab_size
    kept = min(tokens, MAX_WEIGHTS // classes)
    places = torch.stack(
        [torch.arange(classes).repeat_interleave(kept), torch.randint(tokens, (classes * kept,))]
    )
    weight = torch.sparse_coo_tensor(
        places, torch.randn(classes * kept), (classes, tokens), check_invariants=True
    )
    lexical = {"idf": torch.rand(tokens), "weight": weight, "bias": torch.zeros(classes)}
    model.set_calibration(Calibration(lexical_weight=1.0), lexical)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    models = {}
    for name, settings in SETTINGS.items():
        for tree in (DEFAULT_TAXONOMY, codes()):
            config = HierarchicalConfig(
                text_config={"model_type": "bert", **SIZE}, taxonomy=Taxonomy(tree), **settings
            )
            models[name, config.tree.num_nodes] = HierarchicalForSequenceClassification(
                config
            ).eval()
            if "lexical" in name:
                add_lexical_head(models[name, config.tree.num_nodes])
    inputs = {
        "input_ids": torch.randint(5, 30000, (16, 256)),
        "attention_mask": torch.ones(16, 256, dtype=torch.long),
    }
    seconds = dict.fromkeys(models, float("inf"))
    with torch.inference_mode():
        for key, model in [*models.items()] * 3:
            started = time.process_time()
            model(**inputs)
            seconds[key] = min(seconds[key], time.process_time() - started)
    result = {}
    for name in SETTINGS:
        small, large = (value for key, value in seconds.items() if key[0] == name)
        print(f"{name}: {1000 * small:.0f} and {1000 * large:.0f} ms, {large / small:.2f} times")
        result[name] = {"seconds": [small, large], "ratio": large / small}
    write_results(RESULTS / "heads.json", result)


if __name__ == "__main__":
    main()
