"""Classify on a Ray cluster: the driver reads and writes, and actors turn blocks of records into
output rows.

Worth knowing:

1. All state is in the driver's output (`prediction.output`). If an actor or a node is lost, only
   its unfinished blocks are repeated. A killed driver is resumed like any other run. No shared disk
   is needed.
2. While blocks wait, the driver requests twice as many actors as the cluster has room for. An
   autoscaling cluster adds nodes for the pending actors.
3. An actor has at most two blocks: one is computed while the other is in transit. The driver holds
   one more, so its memory does not grow with the input. Ray could retry the calls of a lost actor
   by itself, but only once it has room for a new actor, and others would finish without its blocks.
4. All actors must report the same model description. Otherwise the output could mix, for example,
   bfloat16 and float32.
"""

import math
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

from hierarchical_clinicalbert.errors import (
    ROOT,
    InputError,
    as_input_error,
    describe_error,
    one_line,
)
from hierarchical_clinicalbert.machine import give_back_memory
from hierarchical_clinicalbert.prediction.model import Model
from hierarchical_clinicalbert.prediction.output import Block, OutputRows
from hierarchical_clinicalbert.prediction.rows import RowFormat

POLL_SECONDS = 3  # between two checks of the cluster
WARN_SECONDS = 60  # without an actor
# of workers on one block, or of workers that load the model, in a row; then the run ends
MAX_DEATHS = 5
SHIPPED = ("*_hierarchical.py", "hierarchical_clinicalbert")


class Classifier(Model):
    """An actor.

    It loads the model in a method, because Ray hides the cause of an error in a constructor.
    """

    def __init__(self) -> None:
        pass

    def load(
        self, arguments: Namespace, cpus: int, gpus: float
    ) -> tuple[str, dict[str, Any], RowFormat]:
        """Load the model, and return the node's address, the model's description and the format of
        its rows.
        """
        os.environ["RAYON_NUM_THREADS"] = str(cpus)  # of the tokenizer
        torch.set_num_threads(cpus)
        node = ray.util.get_node_ip_address()
        if arguments.model_folder and not os.path.isdir(arguments.model):
            remedy = "give an id on the Hub, or a folder that all nodes share"
            raise InputError(f"node {node} has no folder {arguments.model}: {remedy}")
        # the first load on a node writes the checkpoint's code into this folder; without a lock,
        # others read partial files
        os.makedirs(HF_MODULES_CACHE, exist_ok=True)
        with FileLock(Path(HF_MODULES_CACHE) / "predict.lock"):
            try:
                super().__init__(arguments, gpu=gpus > 0)
            except InputError as error:
                raise InputError(f"node {node}: {error}") from error
        return node, self.description, self.row_format


class RayJob:
    """Classify on the actors of a cluster, with the attributes and methods of
    `prediction.model.Model`.

    The constructor connects to the cluster, and waits until one actor has loaded the model.

    Args:
        arguments: the flags of predict.py; ``revision`` is a commit, or None for a folder.
    """

    def __init__(self, arguments: Namespace):
        is_folder = Path(arguments.model).is_dir()
        model = os.path.abspath(arguments.model) if is_folder else arguments.model
        self._arguments = Namespace(
            **{**vars(arguments), "model": model, "model_folder": is_folder}
        )
        # actors that have loaded the model, once for each block that they may still take
        self._idle: list[Any] = []
        # actors by the reference of their call; no block to load
        self._tasks: dict[Any, tuple[Any, Block | None]] = {}
        self._waiting: deque[Block] = deque()
        # by the index of a block; None for actors that were starting
        self._deaths: Counter[int | None] = Counter()
        self._next_check = 0.0
        self.description: dict[str, Any] = {}
        with as_input_error(f"--ray {self._arguments.ray}"):
            connect(self._arguments.ray)
        gpus = self._arguments.ray_gpus_per_actor
        gpus = float(ray.cluster_resources().get("GPU", 0) > 0) if gpus is None else gpus
        self._needs = {"CPU": self._arguments.ray_cpus_per_actor or 1, "GPU": gpus}
        warn_at = time.monotonic() + WARN_SECONDS
        while not self._idle:
            if not self._tasks:
                self._start()
            self._receive()
            if time.monotonic() > warn_at:
                needed = " and ".join(
                    f"{number:g} {kind}" for kind, number in self._needs.items() if number
                )
                print(
                    f"no actor is ready yet: each needs a node with {needed} free", file=sys.stderr
                )
                warn_at = math.inf

    def close(self) -> None:
        ray.shutdown()

    def estimate_prior(self, texts: list[str]) -> list[float]:
        """Estimate the class frequencies of texts on one actor.

        InputError: it died, or there are no texts.
        """
        try:
            return ray.get(self._idle[0].estimate_prior.remote(texts))
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:
            raise InputError(
                f"the worker that estimated the class frequencies died: {one_line(error)}"
            ) from error

    def predict_blocks(
        self, blocks: Iterator[Block], prior: list[float] | None = None
    ) -> Iterator[tuple[Block, OutputRows]]:
        """Yield each block with its output rows as soon as it is finished.

        The blocks of lost actors go to other actors.
        """
        finished = None
        while True:
            while self._has_waiting_block(blocks) and self._idle:
                actor = self._idle.pop(0)
                block = self._waiting.popleft()
                self._tasks[actor.predict.remote(block, prior)] = actor, block
            if finished:  # it is written while the actors compute
                yield finished
                give_back_memory()
            if self._waiting:
                self._grow()
            elif not self._is_computing():
                return
            finished = self._receive()

    def _has_waiting_block(self, blocks: Iterator[Block]) -> bool:
        """Return whether a block waits for an actor, after reading one if none did."""
        if not self._waiting:
            self._waiting.extend(islice(blocks, 1))
        return bool(self._waiting)

    def _is_computing(self) -> bool:
        return any(block for _, block in self._tasks.values())

    def _receive(self) -> tuple[Block, OutputRows] | None:
        """Wait for one call, and return its block and rows.

        If an actor has started or died instead, note it and return None.
        """
        for call in ray.wait([*self._tasks], timeout=POLL_SECONDS)[0]:  # at most one
            actor, block = self._tasks.pop(call)
            try:
                result = ray.get(call)
            except RayTaskError as error:  # raised by the code of the call, or a package is missing
                if block is None and not isinstance(error.cause, InputError):
                    raise InputError(
                        f"an actor cannot load the model: {describe_error(error.cause)}"
                    ) from error
                raise error.cause from error
            except RayError as error:
                self._lose(actor, block, error)
                continue
            self._idle.append(actor)
            if block is not None:
                return block, result
            self._idle.insert(0, actor)  # first one block for every actor, then a second one
            self._check(*result)
            del self._deaths[None]
        return None

    def _lose(self, actor: Any, block: Block | None, error: RayError) -> None:
        """Remove a lost actor, and queue its blocks again.

        Raise InputError after `MAX_DEATHS` deaths.
        """
        self._next_check = 0.0
        ray.kill(actor)  # it may be alive, but unreachable
        self._idle = [other for other in self._idle if other is not actor]
        calls = [call for call, (other, _) in self._tasks.items() if other is actor]
        lost = [
            one for one in (block, *(self._tasks.pop(call)[1] for call in calls)) if one is not None
        ]
        lost.sort(key=lambda one: one.index)
        self._waiting.extendleft(reversed(lost))
        computed = lost[0] if lost else None  # None: it was starting
        index = None if computed is None else computed.index
        self._deaths[index] += 1
        if self._deaths[index] < MAX_DEATHS:
            return
        if computed is not None:
            ends = (computed.records[0], computed.records[-1])
            first, last = (f"{record.source}, line {record.line}" for record in ends)
            problem = (
                f"{MAX_DEATHS} workers died while they classified the rows from {first}, to {last}"
            )
            raise InputError(f"{problem}: {one_line(error)}")
        if not self._idle and not self._is_computing():
            raise InputError(
                f"workers die while they load the model, {MAX_DEATHS} in a row: {one_line(error)}"
            )

    def _check(self, node: str, description: dict[str, Any], rows: RowFormat) -> None:
        """Store the first actor's description.

        Raise InputError if the description of another actor differs.
        """
        if not self.description:
            self.description = description
            self.row_format = rows
        for name, value in self.description.items():
            if description[name] != value:
                remedy = "give --dtype" if name == "dtype" else "use nodes that are alike"
                raise InputError(
                    f"node {node} has another {name}, {description[name]}, not {value}: {remedy}"
                )

    def _grow(self) -> None:
        """Request more actors, at most once every `POLL_SECONDS`."""
        if time.monotonic() > self._next_check:
            self._next_check = time.monotonic() + POLL_SECONDS
            resources = ray.cluster_resources()
            room = min(
                int(resources.get(kind, 0) / number)
                for kind, number in self._needs.items()
                if number
            )
            actors = {*self._idle, *(actor for actor, _ in self._tasks.values())}
            for _ in range(2 * max(room, 1) - len(actors)):
                self._start()

    def _start(self) -> None:
        cpus, gpus = self._needs.values()
        actor = ray.remote(Classifier).options(num_cpus=cpus, num_gpus=gpus).remote()
        self._tasks[actor.load.remote(self._arguments, cpus, gpus)] = actor, None


def refuse_closed_port(address: str) -> None:
    """Raise OSError if an address has a port and nothing listens there.

    Ray itself would retry for minutes.
    """
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def connect(address: str) -> None:
    """Connect to a cluster, or start one on this machine if the address is ``local``."""
    quiet = {"log_to_driver": False, "logging_level": "error"}
    if address == "local":
        # otherwise Ray reports usage to its developers
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", num_cpus=torch.get_num_threads(), **quiet)
        return
    refuse_closed_port(address)
    modules = [str(path) for pattern in SHIPPED for path in sorted(ROOT.glob(pattern))]
    ray.init(address, runtime_env={"py_modules": modules, "excludes": ["__pycache__"]}, **quiet)
