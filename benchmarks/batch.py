"""Measure batch scoring by predict.py on Ray, up to a million short rows:

    pip install -r tests/requirements.txt
    python benchmarks/batch.py --encoder ENCODER --data ohsumed

The encoder is tiny, so that the driver's share of the work is large. Measured are the rows a
second, and the peak memory and processor time of the driver. The processor time of one more row
bounds the rows a second of any cluster, because one driver reads and writes. Rates count the time
between the first finished block and the last one. "Seconds" is the whole command.
"""

import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil
import torch
from harness import ROOT, flag_parser, print_table, processor, write_results
from inference import make_checkpoint, read_column
from transformers import AutoConfig, BertConfig

from hierarchical_clinicalbert.prediction.output import ROWS

SIZE = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def main() -> None:
    parser = flag_parser(__doc__, "batch.json")
    parser.add_argument("--encoder", required=True)
    parser.add_argument(
        "--data", type=Path, required=True, help="a folder with train.csv and test.csv, column text"
    )
    parser.add_argument(
        "--growth_rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000]
    )
    arguments = parser.parse_args()
    texts = [
        text[:100]
        for name in ("train.csv", "test.csv")
        for text in read_column(arguments.data / name, "text")
    ]
    config = BertConfig(vocab_size=AutoConfig.from_pretrained(arguments.encoder).vocab_size, **SIZE)
    growth: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = make_checkpoint(arguments.encoder, scratch / "model", config)
        for rows in arguments.growth_rows:
            source = scratch / f"{rows}.csv"
            pd.DataFrame({"text": [f"{i} {texts[i % len(texts)]}" for i in range(rows)]}).to_csv(
                source, index=False
            )
            run = measure(model, source, scratch / f"out-{rows}", rows)
            run["driver, ms for one more row"] = None
            if growth:
                more = run["driver, processor seconds"] - growth[-1]["driver, processor seconds"]
                run["driver, ms for one more row"] = round(
                    1000 * more / (rows - growth[-1]["rows"]), 4
                )
            growth.append(run)
    machine = {"cpu": processor(), "cores": torch.get_num_threads()}
    write_results(arguments.output, {"growth": growth, "machine": machine})
    print_table(growth[0], (row.values() for row in growth))


def measure(model: str, source: Path, output: Path, rows: int) -> dict:
    """Run predict.py to its end, with a folder as its output.

    Return its rate, seconds and memory.
    """
    started = time.perf_counter()
    command = [
        sys.executable,
        ROOT / "predict.py",
        "--model",
        model,
        "--input",
        source,
        "--output",
        f"{output}/",
    ]
    process = subprocess.Popen([*map(str, command), "--ray"], stderr=subprocess.DEVNULL)
    driver = psutil.Process(process.pid)
    memory = 0
    seconds = 0.0
    seen = [(0, started)]
    while process.poll() is None:
        with suppress(psutil.Error):  # it has just ended
            memory = max(memory, driver.memory_info().rss)
            seconds = sum(driver.cpu_times()[:2])
        count = len([*Path(f"{output}/.parts").glob("0*.jsonl")])
        if count > seen[-1][0]:
            seen.append((count, time.perf_counter()))
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"predict.py ended with {process.returncode}")
    first, since = seen[1]
    last, until = seen[-1]
    return {
        "rows": rows,
        "rows/s": round((last - first) * ROWS / (until - since), 1) if last > first else None,
        "seconds": round(time.perf_counter() - started, 1),
        "driver, processor seconds": round(seconds, 1),
        "driver, peak MiB": round(memory / 2**20),
    }


if __name__ == "__main__":
    main()
