"""Measure the Space: ``python benchmarks/space.py load --model results/quickstart``, or ``speed``.

``load``    64 concurrent clients, in separate processes, send 2,000 texts: outcome and latency of
each request, and the memory
            of the server over time.
``speed``   seconds to classify a text of 300 words, and to explain its prediction.
"""

import json
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

from harness import ROOT, flag_parser, read_results, write_results

sys.path[:0] = [str(ROOT / "space"), str(ROOT / "tests")]

from attribution import Explainer
from classification import load
from conftest import CORPUS, read_csv
from gradio_client import Client
from space_server import SpaceServer

CLIENTS = 64
REQUESTS = 2_000
EVERY = 250


def texts(words: int | None = None) -> list[str]:
    """Return texts of the synthetic corpus; with ``words``, joined until they have that many
    words.
    """
    corpus = [row["text"] for row in read_csv(CORPUS / "test.csv")]
    if words is None:
        return corpus
    return [" ".join(" ".join(corpus[i : i + 6]).split()[:words]) for i in range(0, 12, 3)]


def send_requests(address: str, clients: int, requests: int) -> list[tuple[str, float]]:
    """Send ``requests`` texts from each of several clients in this process.

    Return outcomes and latencies in seconds.
    """
    corpus = texts()

    def run_client(number: int) -> list[tuple[str, float]]:
        outcomes = []
        client = Client(address, verbose=False)
        for i in range(requests):
            started = time.perf_counter()
            try:
                result = client.predict(
                    corpus[(7 * number + i) % len(corpus)], levels=True, api_name="/classify"
                )
                outcome = "answer" if abs(sum(result["levels"][0].values()) - 1) < 1e-3 else "wrong"
            except Exception as error:  # errors of any type are counted by their names
                message = str(error).lower()
                outcome = (
                    "busy"
                    if "busy" in message or "queue" in message
                    else f"{type(error).__name__}: {error}"
                )
            outcomes.append((outcome, time.perf_counter() - started))
        return outcomes

    with ThreadPoolExecutor(clients) as pool:
        return [entry for entries in pool.map(run_client, range(clients)) for entry in entries]


def measure_load(model: str) -> dict:
    with (
        tempfile.TemporaryDirectory() as folder,
        SpaceServer(model, Path(folder), fresh=True) as server,
    ):
        send_requests(server.address, 4, 5)  # warm up
        finished = []
        memory = [server.memory()]
        with ProcessPoolExecutor(2) as processes:
            for _ in range(REQUESTS // EVERY):
                each = max(EVERY // CLIENTS, 1) + 1
                jobs = [
                    processes.submit(send_requests, server.address, CLIENTS // 2, each)
                    for _ in range(2)
                ]
                finished += [entry for job in jobs for entry in job.result()]
                memory.append(server.memory())
        outcomes = [outcome for outcome, _ in finished]
        seconds = sorted(latency for outcome, latency in finished if outcome == "answer")
        print("lines logged:", len(server.log().splitlines()))
        return {
            "outcomes": {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))},
            "seconds": {"median": seconds[len(seconds) // 2], "longest": seconds[-1]},
            "megabytes": [bytes_ / 2**20 for bytes_ in memory],
            "files_left": len(server.files()),
        }


def measure_speed(model: str) -> list[dict[str, float]]:
    measured = []
    classifier = load(model, None)
    explainer = Explainer(classifier)
    classifier("A text.")
    for text in texts(300):
        started = time.perf_counter()
        result = classifier(text)
        classified = time.perf_counter()
        explained = explainer.explain(text, result["label"])
        seconds = {
            "classified": classified - started,
            "explained": time.perf_counter() - classified,
        }
        tokens = len(classifier.tokenizer(text, truncation=True)["input_ids"])
        measured.append(
            {"words": len(text.split()), "tokens": tokens, **seconds, "error": explained["error"]}
        )
    return measured


def main() -> None:
    parser = flag_parser(__doc__, "space.json")
    parser.add_argument("what", choices=["load", "speed"])
    parser.add_argument("--model", default="results/quickstart")
    arguments = parser.parse_args()
    measure = measure_load if arguments.what == "load" else measure_speed
    known = read_results(arguments.output, {})
    # the Space runs in another folder
    known[arguments.what] = measure(str(Path(arguments.model).resolve()))
    print(json.dumps(known[arguments.what], indent=1))
    write_results(arguments.output, known)


if __name__ == "__main__":
    main()
