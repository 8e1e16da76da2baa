"""Measure batch scoring by predict.py, in one process and on Ray:

    pip install -r tests/requirements.txt
    python benchmarks/batch.py --encoder ENCODER --data ohsumed

- overhead: ``--ray local`` with one core an actor and with all cores an actor, beside one process. Same rows and model.
- growth: rows a second, and peak memory and processor time of the driver, up to a million short rows, with a tiny encoder. The
  processor time of one more row bounds the rows a second of any cluster, because one driver reads and writes.
- chaos: 100,000 rows in 40 files on a cluster of three nodes, while actors, nodes and the driver are killed at ten random
  moments. The rows are counted, and compared with the output of one process.

Rates count the time between the first finished block and the last one. "Seconds" is the whole command.
"""

import argparse
import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness import ROOT, flag_parser, print_table, processor, read_results, write_results
from inference import make_checkpoint, peak_memory, read_column
from transformers import AutoConfig, BertConfig

from hierarchical_clinicalbert.prediction.output import ROWS

TICK = os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = flag_parser(__doc__, "batch.json")
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--data", type=Path, required=True, help="a folder with train.csv and test.csv, column text")
    parser.add_argument("--rows", type=int, default=20 * ROWS, help="of the part overhead")
    parser.add_argument("--growth_rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--chaos_rows", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    arguments = parser.parse_args()
    texts = [text for name in ("train.csv", "test.csv") for text in read_column(arguments.data / name, "text")]
    results = read_results(arguments.output, {})
    for part in arguments.parts:
        with tempfile.TemporaryDirectory() as scratch:
            results[part] = PARTS[part](texts, arguments, Path(scratch))
        results["machine"] = {"cpu": processor(), "cores": torch.get_num_threads()}
        write_results(arguments.output, results)
        print(f"\n{part}")
        print_table(results[part][0], (row.values() for row in results[part]))


def tiny_checkpoint(arguments: argparse.Namespace, folder: Path) -> str:
    """Write a checkpoint whose encoder has one narrow layer, so that the driver's share of the work is large."""
    size = AutoConfig.from_pretrained(arguments.encoder).vocab_size
    config = BertConfig(
        vocab_size=size, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    return make_checkpoint(arguments.encoder, folder, config)


def write(folder: Path, texts: list[str], rows: int, files: int = 1) -> Path:
    """Write texts, repeated to a number of rows, to CSV files. Each text begins with the number of its row."""
    folder.mkdir()
    for number in range(files):
        with (folder / f"{number:03}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text"])
            writer.writerows([f"{i} {texts[i % len(texts)]}"] for i in range(number, rows, files))
    return folder


def start(model: str, source: Path, output: object, *flags: object) -> subprocess.Popen:
    """Start predict.py in the background."""
    command = [sys.executable, ROOT / "predict.py", "--model", model, "--input", source, "--output", output, *flags]
    return subprocess.Popen([*map(str, command)], stderr=subprocess.DEVNULL)


def num_parts(output: object) -> int:
    return len([*Path(f"{output}.parts").glob("0*.jsonl")])


def measure(model: str, source: Path, output: Path, rows: int, *flags: object) -> dict:
    """Run predict.py to its end, with a folder as its output. Return its rate, seconds and memory (Linux only)."""
    started = time.perf_counter()
    process = start(model, source, f"{output}/", *flags)
    memory, seconds, seen = 0, 0.0, [(0, started)]
    while process.poll() is None:
        memory = max(memory, peak_memory(process.pid))
        seconds = max(seconds, processor_time(process.pid))
        if (count := num_parts(f"{output}/")) > seen[-1][0]:
            seen.append((count, time.perf_counter()))
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"predict.py ended with {process.returncode}")
    (first, since), (last, until) = seen[1], seen[-1]
    return {
        "rows": rows,
        "rows/s": round((last - first) * ROWS / (until - since), 1) if last > first else None,
        "seconds": round(time.perf_counter() - started, 1),
        "driver, processor seconds": round(seconds, 1),
        "driver, peak MiB": round(memory / 1024),
    }


def processor_time(process: int) -> float:
    """Return the processor time of a Linux process without its children; 0 after its end."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def overhead(texts: list[str], arguments: argparse.Namespace, scratch: Path) -> list[dict]:
    model = make_checkpoint(arguments.encoder, scratch / "model")
    source = write(scratch / "in", texts, arguments.rows)
    rows = []
    for name, options in (
        ("one process", ()),
        ("Ray, one core an actor", ("--ray", "--ray_cpus_per_actor", 1)),
        ("Ray, all cores an actor", ("--ray", "--ray_cpus_per_actor", torch.get_num_threads())),
    ):
        run = measure(model, source, scratch / f"out-{len(rows)}", arguments.rows, *options)
        share = round(run["rows/s"] / (rows[0] if rows else run)["rows/s"], 3)
        rows.append({"run": name, "times one process": share, **run})
    return rows


def growth(texts: list[str], arguments: argparse.Namespace, scratch: Path) -> list[dict]:
    model = tiny_checkpoint(arguments, scratch / "model")
    short = [text[:100] for text in texts]
    results: list[dict] = []
    for rows in arguments.growth_rows:
        run = measure(model, write(scratch / f"in-{rows}", short, rows), scratch / f"out-{rows}", rows, "--ray")
        run["driver, ms for one more row"] = None
        if results:
            more = run["driver, processor seconds"] - results[-1]["driver, processor seconds"]
            run["driver, ms for one more row"] = round(1000 * more / (rows - results[-1]["rows"]), 4)
        results.append(run)
    return results


def chaos(texts: list[str], arguments: argparse.Namespace, scratch: Path) -> list[dict]:
    from ray.cluster_utils import Cluster

    rows, draw = arguments.chaos_rows, random.Random(arguments.seed)
    model, source = tiny_checkpoint(arguments, scratch / "model"), write(scratch / "in", texts, rows, files=40)
    expected, output = scratch / "expected.jsonl", scratch / "out.jsonl"
    if start(model, source, expected).wait():
        raise RuntimeError("the run in one process failed")
    blocks = -(-rows // ROWS)
    victims = [*draw.choices(("node", "actor", "driver"), k=7), "node", "actor", "driver"]
    moments = sorted(draw.sample(range(1, blocks - 10), len(victims)))  # in finished blocks
    draw.shuffle(victims)

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
    command = (model, source, output, "--ray", cluster.address)
    driver, started, killed = start(*command), time.perf_counter(), []
    try:
        for victim, moment in zip(victims, moments, strict=True):
            working: list[tuple[int, int]] = []  # actors, and the numbers of their nodes
            while num_parts(output) < moment or not working:
                if driver.poll() is not None:
                    raise RuntimeError(f"the driver ended with {driver.returncode}")
                working = [(pid, i) for i, node in enumerate(nodes) for pid in actor_pids(node)]
                time.sleep(0.1)
            pid, number = draw.choice(working)
            if victim == "driver":
                driver.kill()
                driver.wait()
                driver = start(*command)
            elif victim == "actor":
                os.kill(pid, signal.SIGKILL)
            else:
                cluster.remove_node(nodes[number], allow_graceful=False)
                nodes[number] = cluster.add_node(num_cpus=1)
            killed.append(f"{victim} after {moment * ROWS} rows")
        code = driver.wait()
    finally:
        driver.kill()
        cluster.shutdown()
    numbers = [json.loads(line)["row"] for line in output.open(encoding="utf-8")]
    result = {
        "killed": "; ".join(killed),
        "exit code": code,
        "rows": len(numbers),
        "missing": rows - len(set(numbers)),
        "twice": len(numbers) - len(set(numbers)),
        "same bytes as one process": output.read_bytes() == expected.read_bytes(),
        "seconds": round(time.perf_counter() - started),
    }
    return [result]


def actor_pids(node) -> list[int]:
    """Return the process ids of the actors on a node."""
    raylet = node.all_processes["raylet"][0].process.pid
    lines = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(raylet)], capture_output=True, text=True).stdout
    return [int(match[1]) for match in re.finditer(r"^ *(\d+) ray::Classifier", lines, re.MULTILINE)]


PARTS = {"overhead": overhead, "growth": growth, "chaos": chaos}

if __name__ == "__main__":
    main()
