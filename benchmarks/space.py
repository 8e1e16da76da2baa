"""Measure the Space: ``python benchmarks/space.py load --model results/quickstart``, or ``speed`` or ``blank``.

``load``    64 concurrent clients, in separate processes, send 2,000 texts: outcome and latency of each request, and the memory
            of the server over time.
``speed``   seconds to classify a text of 300 words, and to explain its prediction.
``blank``   compare baselines of the explanations: the probability that is lost if the six words with the largest weights are
            masked, and the convergence error.
"""

import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

from harness import ROOT, flag_parser, print_table, read_results, write_results

sys.path[:0] = [str(ROOT / "space"), str(ROOT / "tests")]

import torch
from attribution import Explainer, IntegrationPath
from classification import load
from conftest import CORPUS, read_csv
from gradio_client import Client
from space_server import SpaceServer

CLIENTS, REQUESTS, EVERY = 64, 2_000, 250


def texts(words: int | None = None) -> list[str]:
    """Return texts of the synthetic corpus; with ``words``, joined until they have that many words."""
    corpus = [row["text"] for row in read_csv(CORPUS / "test.csv")]
    if words is None:
        return corpus
    return [" ".join(" ".join(corpus[i : i + 6]).split()[:words]) for i in range(0, 12, 3)]


def send_requests(address: str, clients: int, requests: int) -> list[tuple[str, float]]:
    """Send ``requests`` texts from each of several clients in this process. Return outcomes and latencies in seconds."""
    corpus = texts()

    def run_client(number: int) -> list[tuple[str, float]]:
        outcomes = []
        client = Client(address, verbose=False)
        for i in range(requests):
            started = time.perf_counter()
            try:
                result = client.predict(corpus[(7 * number + i) % len(corpus)], levels=True, api_name="/classify")
                outcome = "answer" if abs(sum(result["levels"][0].values()) - 1) < 1e-3 else "wrong"
            except Exception as error:  # errors of any type are counted by their names
                message = str(error).lower()
                outcome = "busy" if "busy" in message or "queue" in message else f"{type(error).__name__}: {error}"
            outcomes.append((outcome, time.perf_counter() - started))
        return outcomes

    with ThreadPoolExecutor(clients) as pool:
        return [entry for entries in pool.map(run_client, range(clients)) for entry in entries]


def measure_load(model: str) -> dict:
    print(f"{CLIENTS} clients in two processes; memory after each round of {EVERY} requests")
    with tempfile.TemporaryDirectory() as folder, SpaceServer(model, Path(folder), fresh=True) as server:
        send_requests(server.address, 4, 5)  # warm up
        finished, memory = [], [server.memory()]
        with ProcessPoolExecutor(2) as processes:
            for _ in range(REQUESTS // EVERY):
                each = max(EVERY // CLIENTS, 1) + 1
                jobs = [processes.submit(send_requests, server.address, CLIENTS // 2, each) for _ in range(2)]
                finished += [entry for job in jobs for entry in job.result()]
                memory.append(server.memory())
        outcomes = [outcome for outcome, _ in finished]
        seconds = sorted(latency for outcome, latency in finished if outcome == "answer")
        for outcome in sorted(set(outcomes)):
            print(f"{outcomes.count(outcome):>6,} {outcome}")
        print(f"seconds to an answer: median {seconds[len(seconds) // 2]:.1f}, longest {seconds[-1]:.1f}")
        print("memory, MiB:", ", ".join(f"{bytes_ / 2**20:.0f}" for bytes_ in memory))
        print("files left:", len(server.files()), "| lines logged:", len(server.log().splitlines()))
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
        since, cpu = time.perf_counter(), time.process_time()
        result = classifier(text)
        between, cpu_between = time.perf_counter(), time.process_time()
        explained = explainer.explain(text, result["label"])
        after, cpu_after = time.perf_counter(), time.process_time()
        tokens = len(classifier.tokenizer(text, truncation=True)["input_ids"])
        seconds = {"classified": between - since, "explained": after - between}
        measured.append({"words": len(text.split()), "tokens": tokens, **seconds, "error": explained["error"]})
        print(
            f"{len(text.split())} words, {tokens} tokens: classified in {between - since:.2f} s ({cpu_between - cpu:.2f} s of CPU), "
            f"explained in {after - between:.1f} s ({cpu_after - cpu_between:.1f} s of CPU), error {explained['error']:+.4f}"
        )
    return measured


def measure_blank(model: str) -> dict[str, dict[str, float]]:
    measured = {}
    classifier = load(model, None)
    explainer = Explainer(classifier)
    tokenizer, embeddings = classifier.tokenizer, classifier.model.get_input_embeddings()
    original_init = IntegrationPath.__init__
    vectors = {
        "padding": None,
        "mask": embeddings.weight[tokenizer.mask_token_id],
        "mean word": embeddings.weight.mean(0),
        "zeros": torch.zeros_like(embeddings.weight[0]),
    }
    for name, vector in vectors.items():

        def patched(self, model, inputs, blank_ids, vector=vector):
            original_init(self, model, inputs, blank_ids)
            if vector is not None:
                text = self.first + self.span
                special = (blank_ids == inputs["input_ids"]).unsqueeze(-1)
                self.first = torch.where(special, text, vector).detach()
                self.span = text - self.first

        IntegrationPath.__init__ = patched
        lost, errors = [], []
        for text in texts()[:20]:
            result = classifier(text)
            explained = explainer.explain(text, result["label"])
            heaviest = sorted(explained["words"], key=lambda word: -word["weight"])[:6]
            masked = text
            for word in sorted(heaviest, key=lambda word: -word["start"]):
                masked = masked[: word["start"]] + tokenizer.mask_token + masked[word["end"] :]
            after = {
                label: score for level in classifier(masked, levels=True)["levels"] for label, score in level.items()
            }
            lost.append(result["score"] - after[result["label"]])
            errors.append(abs(explained["error"]))
        median = statistics.median(errors)
        measured[name] = {"probability_lost": statistics.mean(lost), "error": median, "largest_error": max(errors)}
    IntegrationPath.__init__ = original_init
    rows = ([name, *(f"{value:.4f}" for value in scores.values())] for name, scores in measured.items())
    print_table(("blank", "probability lost", "error, median", "error, largest"), rows)
    return measured


def main() -> None:
    parser = flag_parser(__doc__, "space.json")
    parser.add_argument("what", choices=["load", "speed", "blank"])
    parser.add_argument("--model", default="results/quickstart")
    arguments = parser.parse_args()
    measure = {"load": measure_load, "speed": measure_speed, "blank": measure_blank}[arguments.what]
    known = read_results(arguments.output, {})
    known[arguments.what] = measure(str(Path(arguments.model).resolve()))  # the Space runs in another folder
    write_results(arguments.output, known)


if __name__ == "__main__":
    main()
