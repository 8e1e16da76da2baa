"""Count the rows that Ray Data's own checkpointing (beta) loses or writes twice when workers and the driver are killed:

    python benchmarks/studies/ray_checkpoint.py

20,000 rows in 40 files are read, passed through a function that sleeps, and written to Parquet files. Ten times, at random numbers
of written files, all workers of Ray or the driver are killed as soon as a file appears. This moment is critical, because a file is
written before its checkpoint. A driver that is killed, or fails, is started again.

Supports docs/experiments.md, "2026-11-27: Ray Data's own checkpointing".
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

ROWS, FILES, KILLS = 20_000, 40, 10


def run(folder: Path) -> None:
    """Process the rows that have no checkpoint, in this process."""
    import ray
    from ray.data import DataContext
    from ray.data.checkpoint import CheckpointConfig

    def slow(batch: dict) -> dict:
        time.sleep(0.5)
        return batch

    ray.init("local", num_cpus=2, log_to_driver=False, logging_level="error")
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.checkpoint_config = CheckpointConfig("id", str(folder / "checkpoint"), delete_checkpoint_on_success=False)
    rows = ray.data.read_parquet(str(folder / "in")).repartition(target_num_rows_per_block=ROWS // FILES)
    rows.map_batches(slow, batch_size=None).write_parquet(str(folder / "out"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, nargs="+", default=[1])
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of `run`
    arguments = parser.parse_args()
    if arguments.folder:
        run(arguments.folder)
        return
    print("| seed | killed: workers | killed: driver | started again | rows | missing | twice |")
    print("| ---: " * 7 + "|")
    for seed in arguments.seed:
        with tempfile.TemporaryDirectory() as scratch:
            counts = disturb(Path(scratch), random.Random(seed))
            ids = Counter(pq.read_table(Path(scratch) / "out", columns=["id"])["id"].to_pylist())
        rows, twice = ids.total(), sum(count - 1 for count in ids.values())
        cells = (seed, counts["workers"], counts["driver"], counts["starts"], rows, ROWS - len(ids), twice)
        print("|", " | ".join(map(str, cells)), "|", flush=True)


def disturb(folder: Path, draw: random.Random) -> Counter[str]:
    """Run to the end, with `KILLS` kills. Return how often workers and the driver were killed, and the driver was restarted."""
    (folder / "in").mkdir()
    for number in range(FILES):
        ids = pa.array(range(number, ROWS, FILES))
        pq.write_table(pa.table({"id": ids}), folder / "in" / f"{number:03}.parquet")
    line = [sys.executable, __file__, "--folder", str(folder)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    moments, counts = sorted(draw.sample(range(1, FILES - 4), KILLS)), Counter[str]()
    driver = subprocess.Popen(line, **quiet)
    try:
        while driver.poll() != 0:
            if driver.poll() is not None:  # killed, or failed because its workers were
                driver = subprocess.Popen(line, **quiet)
                counts["starts"] += 1
            elif moments and len([*(folder / "out").glob("*.parquet")]) >= moments[0]:
                del moments[0]
                victim = draw.choice(("workers", "driver"))
                counts[victim] += 1
                if victim == "driver":
                    driver.kill()
                    driver.wait()
                else:
                    for process in psutil.Process(driver.pid).children(recursive=True):
                        if process.cmdline() and process.cmdline()[0].startswith("ray::"):
                            process.kill()
            time.sleep(0.001)
    finally:
        driver.kill()
    return counts


if __name__ == "__main__":
    main()
