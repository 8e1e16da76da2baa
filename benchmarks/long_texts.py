"""Measure what long texts cost: ``python benchmarks/long_texts.py``.

A model of MiniLM's size (6 layers, hidden size 384, random weights) reads texts in windows of 512
tokens. An encoder of ModernBERT's architecture, of the same width, depth and random weights, reads
8,192 tokens at once. Both are in bfloat16 where the processor multiplies in it, and are trained as
train.py trains on a CPU, with a rank-16 adapter. A batch has at least 4,096 tokens. Each
measurement is a process of its own, whose peak of memory is above that of the loaded model. The two
models alternate.
"""

import argparse
import json
import resource
import statistics
import time

import torch
from harness import flag_parser, print_table, processor, run_alone, write_results

from configuration_hierarchical import HierarchicalConfig
from hierarchical_clinicalbert.machine import has_bf16, keep_memory
from hierarchical_clinicalbert.training.arguments import ModelArguments
from hierarchical_clinicalbert.training.cpu import KEPT_MEMORY, use_training_kernels
from hierarchical_clinicalbert.training.model import add_adapter, turn_off_dropout
from modeling_hierarchical import HierarchicalForSequenceClassification
from pipeline_hierarchical import use_cpu_kernels

LENGTHS = (512, 600, 1024, 2048, 4096, 8192)
SIZE = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
ENCODERS = {
    "windows": {"model_type": "bert", **SIZE},
    "at once": {"model_type": "modernbert", **SIZE, "max_position_embeddings": 8192},
}
ROUNDS = 5


def measure(name: str, mode: str, length: int) -> dict[str, float]:
    """Return the tokens per second of a model, and its peak memory in MiB above that of the loaded
    model.
    """
    torch.manual_seed(0)
    dtype = torch.bfloat16 if has_bf16(cpu=True) else torch.float32
    config = HierarchicalConfig(text_config=ENCODERS[name], tokens_before=[101], tokens_after=[102])
    turn_off_dropout(config.text_config)
    model = HierarchicalForSequenceClassification(config).train(mode == "training")
    if mode == "training":
        add_adapter(model.encoder, ModelArguments(lora_r=16, lora_alpha=32))
        use_training_kernels(model.encoder, dtype)
        keep_memory(*KEPT_MEMORY)
    else:
        model.encoder.to(dtype)
        use_cpu_kernels(model.encoder)
    texts = max(1, 4096 // length)
    inputs = {
        "input_ids": torch.randint(1000, 30_000, (texts, length)),
        "attention_mask": torch.ones(texts, length),
    }
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        with (
            torch.set_grad_enabled(mode == "training"),
            torch.autocast("cpu", dtype, enabled=mode == "training"),
        ):
            output = model(**inputs, labels=torch.zeros(texts, dtype=torch.long))
        if mode == "training":
            model.zero_grad()
            output.loss.backward()
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "tokens_per_second": texts * length / statistics.median(seconds[1:]),
        "mib": (peak - loaded) / 1024,
    }


def main() -> None:
    parser = flag_parser(__doc__, "long_texts.json")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        name, mode, length = arguments.worker
        print(json.dumps(measure(name, mode, int(length))))
        return
    results = []
    for mode in ("inference", "training"):
        rows = []
        for length in LENGTHS:
            speeds = []
            memory = []
            for name in ENCODERS:
                measured = run_alone(__file__, "--worker", name, mode, length)
                results.append({"model": name, "mode": mode, "length": length, **measured})
                speeds.append(measured["tokens_per_second"])
                memory.append(f"{measured['mib']:,.0f}")
            rows.append(
                [f"{length:,}", f"{speeds[0]:,.0f}", f"{speeds[0] / speeds[1]:.1f}", *memory]
            )
        print(f"\n{mode}, {processor()}:")
        print_table(
            ["tokens", "tokens/s", "speed-up over at once", "MiB", "MiB at once"], rows, left=0
        )
    write_results(arguments.output, {"processor": processor(), "results": results})


if __name__ == "__main__":
    main()
