"""Measure the time to load a checkpoint, and to the first prediction: ``python benchmarks/loading.py [--model CHECKPOINT]``.

`AutoModel.from_pretrained` loads the adapter form, and for comparison its bare encoder, from a warm disk cache. The encoder has
the size of BERT base: 110 M random weights. "First" is in a fresh process that has imported only torch and transformers. It
is the time that a user waits. "Again" is the second load in that process.

With ``--model`` only the cold start is measured: ``pipeline(...)`` and the class of one text, beside the stock pipeline of an
encoder of the same architecture. "Process" is from the start of a fresh process, "pipeline" from after its imports.

All variants alternate, so that load on the machine affects each. Ratios are between medians.
"""

import json
import os
import statistics
import tempfile
from pathlib import Path

import torch
from harness import flag_parser, read_results, run_alone, write_results
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

from checkpoint_hierarchical import load_encoder
from configuration_hierarchical import HierarchicalConfig
from modeling_hierarchical import HierarchicalForSequenceClassification

ROUNDS = 5
TEXT = "Resection of colon cancer in 41 patients with ulcerative colitis."
LOAD = """
import json, sys, time
import torch, transformers
from transformers import AutoModel
transformers.utils.logging.disable_progress_bar()
seconds = {}
for name in ("first", "again"):
    started = time.perf_counter()
    AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, **json.loads(sys.argv[2]))
    seconds[name] = time.perf_counter() - started
print(json.dumps(seconds))
"""
START = """
import json, sys, time
started = time.perf_counter()
from transformers import pipeline
imported = time.perf_counter()
pipeline(sys.argv[1], model=sys.argv[2], trust_remote_code=True)(sys.argv[3])
ended = time.perf_counter()
print(json.dumps({"process": ended - started, "pipeline": ended - imported}))
"""


def main() -> None:
    parser = flag_parser(__doc__, "loading.json")
    parser.add_argument("--model", type=Path, help="measure the cold start of this checkpoint")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results = read_results(arguments.output, {})
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "HF_HOME": folder, "HF_HUB_OFFLINE": "1"}
        if arguments.model:
            results["cold start"] = compare(write_stock(arguments.model, Path(folder) / "stock"), environment)
        else:
            results |= compare(write_checkpoint(Path(folder)), environment)
    write_results(arguments.output, results)


def write_checkpoint(folder: Path) -> dict[str, list]:
    """Write an encoder and a checkpoint over it. Return the command line of each load, by name."""
    encoder, checkpoint = folder / "encoder", folder / "checkpoint"
    BertModel(BertConfig(), add_pooling_layer=False).save_pretrained(encoder)
    config = HierarchicalConfig(text_config=BertConfig(), encoder_name_or_path=str(encoder))
    model = HierarchicalForSequenceClassification(config, encoder=load_encoder(config))
    inject_adapter_in_model(LoraConfig(r=16, target_modules=["query", "key", "value", "dense"]), model.encoder)
    model.save_pretrained(checkpoint)
    return {
        "bare encoder": ["-c", LOAD, encoder, "{}"],
        "adapter, merged": ["-c", LOAD, checkpoint, "{}"],
        "adapter, by PEFT": ["-c", LOAD, checkpoint, json.dumps({"merge_adapter": False})],
    }


def write_stock(model: Path, folder: Path) -> dict[str, list]:
    """Write a stock classifier over the architecture of a checkpoint's encoder. Return the command lines of both, by name."""
    config = HierarchicalConfig.from_pretrained(model)
    encoder = AutoConfig.for_model(**config.text_config.to_dict() | {"id2label": config.id2label})
    AutoModelForSequenceClassification.from_config(encoder).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model, trust_remote_code=True).save_pretrained(folder)
    return {
        "stock pipeline": ["-c", START, "text-classification", folder, TEXT],
        "this project": ["-c", START, "hierarchical-text-classification", model, TEXT],
    }


def compare(commands: dict[str, list], environment: dict[str, str]) -> dict[str, dict[str, float]]:
    """Return the median seconds of each command's times, and their ratios to those of the first command."""
    rounds = [
        {name: run_alone(*words, environment=environment) for name, words in commands.items()} for _ in range(ROUNDS)
    ]
    result: dict[str, dict[str, float]] = {}
    for name in commands:
        seconds = {time: statistics.median(one[name][time] for one in rounds) for time in rounds[0][name]}
        first = result[next(iter(commands))] if result else seconds
        result[name] = seconds | {f"{time}_ratio": value / first[time] for time, value in seconds.items()}
        print(name, ", ".join(f"{time} {value:.2f} s ({value / first[time]:.2f})" for time, value in seconds.items()))
    return result


if __name__ == "__main__":
    main()
