"""Classify on a Ray cluster: the driver reads and writes, and actors turn blocks of records into output rows.

Worth knowing:

1. All state is in the driver's output (`prediction.output`). If an actor or a node is lost, only its unfinished blocks are
   repeated. A killed driver is resumed like any other run. No shared disk is needed.
2. While blocks wait, the driver requests twice as many actors as the cluster has room for. An autoscaling cluster adds nodes for
   the pending actors.
3. An actor has at most two blocks: one is computed while the other is in transit. The driver holds no others, so its memory does
   not grow with the input.
4. All actors must report the same model description. Otherwise the output could mix, for example, bfloat16 and float32.
"""

import os
import socket
import sys
import time
from argparse import Namespace
from collections import Counter, deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import ray
import torch
from filelock import FileLock
from ray.exceptions import RayError, RayTaskError
from transformers.utils.hub import HF_MODULES_CACHE

from hierarchical_clinicalbert.errors import ROOT, InputError, as_input_error, describe_error, one_line
from hierarchical_clinicalbert.machine import give_back_memory
from hierarchical_clinicalbert.prediction.model import Model
from hierarchical_clinicalbert.prediction.output import Block, OutputRows
from hierarchical_clinicalbert.prediction.rows import RowFormat

BLOCKS_PER_ACTOR = 2
POLL_SECONDS = 3  # between two checks of the cluster
MAX_DEATHS = 5  # of workers on one block, or of workers that load the model, in a row; then the run ends
SHIPPED = ("*_hierarchical.py", "hierarchical_clinicalbert")


class Classifier:
    """An actor. It loads the model in a method, because Ray hides the cause of an error in a constructor."""

    def load(self, arguments: Namespace, cpus: int, gpus: float) -> tuple[str, dict[str, Any], RowFormat]:
        """Load the model, and return the node's address, the model's description and the format of its rows."""
        os.environ["RAYON_NUM_THREADS"] = str(cpus)  # of the tokenizer
        torch.set_num_threads(cpus)
        node = ray.util.get_node_ip_address()
        if arguments.model_folder and not os.path.isdir(arguments.model):
            remedy = "give an id on the Hub, or a folder that all nodes share"
            raise InputError(f"node {node} has no folder {arguments.model}: {remedy}")
        if gpus and not torch.cuda.is_available():
            raise InputError(f"node {node}: its torch {torch.__version__} cannot use a GPU")
        # the first load on a node writes the checkpoint's code into this folder; without a lock, others read partial files
        os.makedirs(HF_MODULES_CACHE, exist_ok=True)
        try:
            with FileLock(Path(HF_MODULES_CACHE) / "predict.lock"):
                self.model = Model(arguments, gpu=gpus > 0)
        except InputError as error:
            raise InputError(f"node {node}: {error}") from error
        return node, self.model.description, self.model.row_format

    def estimate_prior(self, texts: list[str]) -> list[float]:
        return self.model.estimate_prior(texts)

    def predict(self, block: Block, prior: list[float] | None) -> OutputRows:
        return self.model.predict(block, prior)


class RayJob:
    """Classify on the actors of a cluster: a context manager with the attributes and methods of `prediction.model.Model`.

    Args:
        arguments: the flags of predict.py; ``revision`` is a commit, or None for a folder.
    """

    def __init__(self, arguments: Namespace):
        is_folder = Path(arguments.model).is_dir()
        model = os.path.abspath(arguments.model) if is_folder else arguments.model
        self._arguments = Namespace(**{**vars(arguments), "model": model, "model_folder": is_folder})
        self._actors: dict[Any, deque[tuple[Any, Block]]] = {}  # the references and blocks of their tasks
        self._starting: dict[Any, tuple[Any, int]] = {}  # by the reference of `load`: the actor, and earlier failures
        self._tasks: dict[Any, Any] = {}  # actors by the reference of a task
        self._waiting: deque[Block] = deque()
        self._deaths: Counter[int] = Counter()  # by the index of a block
        self._failed_starts, self._next_check = 0, 0.0
        self.description: dict[str, Any] = {}

    def __enter__(self) -> "RayJob":
        """Connect to the cluster, and wait until one actor has loaded the model."""
        address = self._arguments.ray
        with as_input_error(f"--ray {address}"):
            dashboard = connect(address)
        if dashboard:
            print(f"Ray's dashboard: http://{dashboard}", file=sys.stderr)
        resources, gpus = ray.cluster_resources(), self._arguments.ray_gpus_per_actor
        gpus = float(resources.get("GPU", 0) > 0) if gpus is None else gpus
        self._needs = {"CPU": self._arguments.ray_cpus_per_actor or 1, "GPU": gpus}
        for kind, number in self._needs.items():
            if address == "local" and number > (room := resources.get(kind, 0)):
                raise InputError(f"--ray local: an actor needs {number:g} {kind}, and this machine has {room:g}")
        since = time.monotonic()
        while not self._actors:
            if not self._starting:
                self._start()
            list(self._receive())
            if since and time.monotonic() - since > 60:
                needed = " and ".join(f"{number:g} {kind}" for kind, number in self._needs.items() if number)
                print(f"no actor is ready yet: each needs a node with {needed} free", file=sys.stderr)
                since = 0.0
        return self

    def __exit__(self, *error: Any) -> None:
        ray.shutdown()

    def estimate_prior(self, texts: list[str]) -> list[float]:
        """Estimate the class frequencies of texts on one actor. InputError: it died, or there are no texts."""
        try:
            return ray.get(next(iter(self._actors)).estimate_prior.remote(texts))
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:
            raise InputError(f"the worker that estimated the class frequencies died: {one_line(error)}") from error

    def predict_blocks(
        self, blocks: Iterator[Block], prior: list[float] | None = None
    ) -> Iterator[tuple[Block, OutputRows]]:
        """Yield each block with its output rows as soon as it is finished. The blocks of lost actors go to other actors."""
        self._prior = prior  # the same for all actors
        while True:
            for depth in range(BLOCKS_PER_ACTOR):  # first one block for every actor, then a second one
                for actor, tasks in self._actors.items():
                    if len(tasks) == depth and self._has_waiting_block(blocks):
                        self._submit(actor, self._waiting.popleft())
            if self._has_waiting_block(blocks):
                self._grow()
            else:
                self._shrink()
                if not self._tasks:
                    return
            yield from self._receive()

    def _has_waiting_block(self, blocks: Iterator[Block]) -> bool:
        """Return whether a block waits for an actor, after reading one if none did."""
        if not self._waiting:
            self._waiting.extend(islice(blocks, 1))
        return bool(self._waiting)

    def _submit(self, actor: Any, block: Block) -> None:
        name = f"Classifier: rows {block.first} to {block.first + len(block.records) - 1}"
        task = actor.predict.options(name=name).remote(block, self._prior)
        self._actors[actor].append((task, block))
        self._tasks[task] = actor

    def _receive(self) -> Iterator[tuple[Block, OutputRows]]:
        """Wait for tasks. Yield the blocks and rows of finished tasks, and record the actors that started or died."""
        finished, _ = ray.wait([*self._tasks, *self._starting], timeout=POLL_SECONDS)
        for task in finished:
            try:
                result = ray.get(task)
            except RayTaskError as error:  # raised by the code of the task, or a package is missing
                if task in self._starting and not isinstance(error.cause, InputError):
                    raise InputError(f"an actor cannot load the model: {describe_error(error.cause)}") from error
                raise error.cause from error
            except RayError as error:
                self._lose(task, error)
                continue
            if task in self._starting:
                self._check(*result)
                self._actors[self._starting.pop(task)[0]] = deque()
                self._failed_starts = 0
            elif task in self._tasks:  # else its actor was lost in this loop, and the block waits again
                tasks = self._actors[self._tasks.pop(task)]
                block = next(block for other, block in tasks if other == task)
                tasks.remove((task, block))
                yield block, result
                give_back_memory()

    def _lose(self, task: Any, error: RayError) -> None:
        """Remove the lost actor of a task, and queue its blocks again. Raise InputError after `MAX_DEATHS` deaths."""
        self._next_check = 0.0
        if task in self._starting:
            actor, failures = self._starting.pop(task)
            ray.kill(actor)
            # actors that started together may have died with their node: they count as one failure
            self._failed_starts += failures == self._failed_starts
            if self._failed_starts == MAX_DEATHS:
                raise InputError(f"workers die while they load the model, {MAX_DEATHS} in a row: {one_line(error)}")
        elif task in self._tasks:
            actor = self._tasks[task]
            ray.kill(actor)  # it may be alive, but unreachable
            tasks = self._actors.pop(actor)
            for other, block in reversed(tasks):
                del self._tasks[other]
                self._waiting.appendleft(block)
            block = tasks[0][1]  # computed when the worker died
            self._deaths[block.index] += 1
            if self._deaths[block.index] == MAX_DEATHS:
                first, last = (
                    f"{record.source}, line {record.line}" for record in (block.records[0], block.records[-1])
                )
                raise InputError(
                    f"{MAX_DEATHS} workers died while they classified the rows from {first}, to {last}: {one_line(error)}"
                )

    def _check(self, node: str, description: dict[str, Any], rows: RowFormat) -> None:
        """Store the first actor's description. Raise InputError if the description of another actor differs."""
        if not self.description:
            self.description, self.row_format = description, rows
        for name, value in self.description.items():
            if description[name] != value:
                remedy = "give --dtype" if name == "dtype" else "use nodes that are alike"
                raise InputError(f"node {node} has another {name}, {description[name]}, not {value}: {remedy}")

    def _grow(self) -> None:
        """Request more actors, at most once every `POLL_SECONDS`."""
        if time.monotonic() > self._next_check:
            self._next_check = time.monotonic() + POLL_SECONDS
            resources = ray.cluster_resources()
            room = min(int(resources.get(kind, 0) / number) for kind, number in self._needs.items() if number)
            for _ in range(2 * max(room, 1) - len(self._actors) - len(self._starting)):
                self._start()

    def _start(self) -> None:
        cpus, gpus = self._needs.values()
        actor = ray.remote(Classifier).options(num_cpus=cpus, num_gpus=gpus).remote()
        self._starting[actor.load.remote(self._arguments, cpus, gpus)] = actor, self._failed_starts

    def _shrink(self) -> None:
        """Stop the actors that are starting or idle, once no block waits."""
        for task in [*self._starting]:
            ray.kill(self._starting.pop(task)[0])
        for actor in [actor for actor, tasks in self._actors.items() if not tasks]:
            del self._actors[actor]
            ray.kill(actor)


def refuse_closed_port(address: str) -> None:
    """Raise OSError if an address has a port and nothing listens there. Ray itself would retry for minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def connect(address: str) -> str | None:
    """Connect to a cluster, or start one on this machine if the address is ``local``, and return its dashboard's address."""
    quiet = {"log_to_driver": False, "logging_level": "error"}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # otherwise Ray reports usage to its developers
        return ray.init("local", num_cpus=torch.get_num_threads(), **quiet).dashboard_url
    refuse_closed_port(address)
    modules = [str(path) for pattern in SHIPPED for path in sorted(ROOT.glob(pattern))]
    return ray.init(address, runtime_env={"py_modules": modules, "excludes": ["__pycache__"]}, **quiet).dashboard_url
