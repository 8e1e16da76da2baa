"""Measure the time to load a checkpoint: ``python benchmarks/loading.py``.

`AutoModel.from_pretrained` loads the adapter form, and for comparison its bare encoder, from a warm disk cache. The encoder has
the size of BERT base: 110 M random weights. "First load" is in a fresh process that has imported only torch and transformers. It
is the time that a user waits. "Load again" is the second load in that process. All variants alternate, so that load on the machine
affects each. Ratios are between medians.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from harness import RESULTS, write_results
from peft import LoraConfig, inject_adapter_in_model
from transformers import BertConfig, BertModel

from checkpoint_hierarchical import load_encoder
from configuration_hierarchical import HierarchicalConfig
from modeling_hierarchical import HierarchicalForSequenceClassification

ROUNDS = 9
TIMED = """
import json, sys, time
import torch, transformers
from transformers import AutoModel
transformers.utils.logging.disable_progress_bar()
seconds = []
for _ in range(2):
    started = time.perf_counter()
    AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, **json.loads(sys.argv[2]))
    seconds.append(time.perf_counter() - started)
print(json.dumps(seconds))
"""


def make(folder: Path) -> dict[str, tuple[Path, dict]]:
    """Write an encoder and a checkpoint over it. Return the path and the arguments of each load, by name."""
    encoder, checkpoint = folder / "encoder", folder / "checkpoint"
    BertModel(BertConfig(), add_pooling_layer=False).save_pretrained(encoder)
    config = HierarchicalConfig(text_config=BertConfig(), encoder_name_or_path=str(encoder))
    model = HierarchicalForSequenceClassification(config, encoder=load_encoder(config))
    inject_adapter_in_model(LoraConfig(r=16, target_modules=["query", "key", "value", "dense"]), model.encoder)
    model.save_pretrained(checkpoint)
    return {
        "bare encoder": (encoder, {}),
        "adapter, merged": (checkpoint, {}),
        "adapter, by PEFT": (checkpoint, {"merge_adapter": False}),
    }


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        loads = make(Path(folder))
        seconds: dict[str, list[list[float]]] = {}
        for _ in range(ROUNDS):
            for name, (path, arguments) in loads.items():
                command = [sys.executable, "-c", TIMED, str(path), json.dumps(arguments)]
                environment = {**os.environ, "HF_HOME": folder, "HF_HUB_OFFLINE": "1"}
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
                seconds.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
    result = {}
    for name, rounds in seconds.items():
        first, again = (statistics.median(times) for times in zip(*rounds, strict=True))
        bare = result.get("bare encoder", {"first": first, "again": again})
        result[name] = {"first": first, "again": again}
        result[name] |= {"first_ratio": first / bare["first"], "again_ratio": again / bare["again"]}
        print(
            f"{name:18} first {first:6.2f} s ({first / bare['first']:.2f}) again {1000 * again:6.0f} ms "
            f"({again / bare['again']:.2f})"
        )
    write_results(RESULTS / "loading.json", result)


if __name__ == "__main__":
    main()
