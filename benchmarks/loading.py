"""Measure the cold start of a checkpoint beside a stock pipeline: ``python benchmarks/loading.py
--model CHECKPOINT``.

Measured are ``pipeline(...)`` and the class of one text, from a warm disk cache. The stock pipeline
has an encoder of the same architecture, with random weights. "Process" is from the start of a fresh
process, which is the time that a user waits. "Pipeline" is from after its imports. Both alternate,
so that load on the machine affects each. Ratios are between medians.
"""

import os
import statistics
import tempfile
from pathlib import Path

from harness import flag_parser, run_alone, write_results
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from configuration_hierarchical import HierarchicalConfig

ROUNDS = 5
TEXT = "Resection of colon cancer in 41 patients with ulcerative colitis."
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
    parser.add_argument("--model", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "HF_HOME": folder, "HF_HUB_OFFLINE": "1"}
        write_results(
            arguments.output,
            compare(write_stock(arguments.model, Path(folder) / "stock"), environment),
        )


def write_stock(model: Path, folder: Path) -> dict[str, list]:
    """Write a stock classifier over the architecture of a checkpoint's encoder.

    Return the command lines of both, by name.
    """
    config = HierarchicalConfig.from_pretrained(model)
    encoder = AutoConfig.for_model(**config.text_config.to_dict() | {"id2label": config.id2label})
    AutoModelForSequenceClassification.from_config(encoder).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model, trust_remote_code=True).save_pretrained(folder)
    return {
        "stock pipeline": ["-c", START, "text-classification", folder, TEXT],
        "this project": ["-c", START, "hierarchical-text-classification", model, TEXT],
    }


def compare(commands: dict[str, list], environment: dict[str, str]) -> dict[str, dict[str, float]]:
    """Return the median seconds of each command's times, and their ratios to those of the first
    command.
    """
    rounds = [
        {name: run_alone(*words, environment=environment) for name, words in commands.items()}
        for _ in range(ROUNDS)
    ]
    result: dict[str, dict[str, float]] = {}
    for name in commands:
        seconds = {
            time: statistics.median(one[name][time] for one in rounds) for time in rounds[0][name]
        }
        first = result[next(iter(commands))] if result else seconds
        result[name] = seconds | {
            f"{time}_ratio": value / first[time] for time, value in seconds.items()
        }
        print(
            name,
            ", ".join(
                f"{time} {value:.2f} s ({value / first[time]:.2f})"
                for time, value in seconds.items()
            ),
        )
    return result


if __name__ == "__main__":
    main()
