"""Test when the commands ask the Hub, and what they say if it cannot be reached.

The Hub is a server of this machine. It records its requests, so the tests know what came before
them.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, complete, copy_checkpoint, run
from hub_server import HubServer
from huggingface_hub import constants

from hierarchical_clinicalbert import connection

ROWS = "text,label\n" + "".join(f"text number {i},{'ab'[i % 2]}\n" for i in range(40))
PREDICT = ("--input", "rows.csv", "--output", "out.csv", "--dtype", "fp32", "--model")


@pytest.fixture(scope="module")
def hub(hub, tmp_path_factory) -> HubServer:
    """Serve an encoder, and a checkpoint of another taxonomy than `ROWS`."""
    hub.add_repo("base/small", ROOT / "tests" / "checkpoint" / "encoder")
    hub.add_repo(
        "alice/checkpoint",
        copy_checkpoint("self_contained", tmp_path_factory.mktemp("hub") / "model"),
    )
    return hub


@pytest.fixture
def unreachable(hub, closed_port) -> dict[str, str]:
    """Return the variables of a process with the cache of the hub's processes, whose Hub is a
    closed port.
    """
    return hub.environment() | {"HF_ENDPOINT": f"http://127.0.0.1:{closed_port}"}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Make a folder with rows and a checkpoint, and change to it."""
    (tmp_path / "rows.csv").write_text(ROWS)
    copy_checkpoint("self_contained", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(*words: object, settings: dict[str, str], command: str = "train.py") -> str:
    """Run a command that must be refused, and return its message."""
    done = run(*words, command=command, check=False, cwd=Path.cwd(), settings=settings)
    assert done.returncode == 2, done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--label_column", "absent"), "has no column 'absent' (--label_column)"),
        (
            ("--model_name_or_path", "alice/checkpoint", "--output_dir", "run"),
            "--output_dir run already holds a run",
        ),
    ],
)
def test_the_hub_is_not_asked_for_a_model_if_rows_are_unusable(hub, place, words, message):
    num_requests = len(hub.requests)
    assert message in refusal("--train_file", "rows.csv", *words, settings=hub.environment())
    assert hub.requests[num_requests:] == []


def test_without_a_hub_each_command_says_what_to_do(place, unreachable):
    failed = (
        f"the connection to {unreachable['HF_ENDPOINT']} failed (ConnectError: [Errno 111] "
        "Connection refused)"
    )
    message = refusal("--train_file", "rows.csv", settings=unreachable)
    model = "emilyalsentzer/Bio_ClinicalBERT"
    assert (
        f"cannot load the model {model}: there is no such folder, {failed}, and the cache "
        "does not hold it"
    ) in message
    assert re.search(
        rf"run `hf download {model} --revision [0-9a-f]{{40}} --cache-dir FOLDER` and copy", message
    )
    message = refusal("--dataset_name", "someone/rows", settings=unreachable)
    assert f"cannot load --dataset_name someone/rows (revision main): {failed}; give" in message
    message = refusal(*PREDICT, "alice/unknown", command="predict.py", settings=unreachable)
    assert f"cannot load the model alice/unknown: there is no such folder, {failed}, and" in message
    (place / "run" / "README.md").write_text("---\nlicense: mit\n---\n")
    words = ("--model", "run", "--repo_id", "alice/new")
    message = refusal(
        *words, command="push_to_hub.py", settings=unreachable | {"HF_TOKEN": "hf_alice"}
    )
    assert message == (
        "push_to_hub.py: error: cannot check the token (of HF_TOKEN or the login) on the "
        f"Hub: {failed}"
    )


def test_the_advice_brings_an_encoder_to_a_machine_without_a_hub(hub, place, unreachable):
    folder = copy_checkpoint("adapter_form", place / "adapter")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "encoder_name_or_path": "base/small",
        "encoder_revision": hub.commits("base/small")[-1].sha,
    }
    (folder / "config.json").write_text(json.dumps(config))
    message = refusal(*PREDICT, "adapter", command="predict.py", settings=unreachable)
    assert (
        "cannot load the encoder base/small: there is no such folder, the connection to " in message
    )
    command, cache = re.search(
        "run `hf (.+) FOLDER` and copy the content of FOLDER to (.+)$", message
    ).groups()
    line = [Path(sys.executable).parent / "hf", *shlex.split(command), "brought"]
    subprocess.run(
        line, env=os.environ | hub.environment(place / "connected"), check=True, capture_output=True
    )
    shutil.copytree("brought", cache, symlinks=True, dirs_exist_ok=True)
    done = run(*PREDICT, "adapter", command="predict.py", settings=unreachable, cwd=place)
    # as huggingface_hub says before it repeats a request
    assert "thrown while requesting" not in done.stderr
    assert len((place / "out.csv").read_text().splitlines()) == 41


def test_a_model_in_the_cache_needs_no_hub(hub, place, unreachable):
    words = (*PREDICT, "alice/checkpoint")
    run(*words, command="predict.py", settings=hub.environment(), cwd=place)
    done = run(*words, "--overwrite", command="predict.py", settings=unreachable, cwd=place)
    assert done.stderr.count("Connection refused): models are loaded from the cache") == 1
    assert "thrown while requesting" not in done.stderr
    # a download that was interrupted
    home = Path(unreachable["HF_HOME"])
    for weights in home.glob("hub/models--alice--checkpoint/snapshots/*/*.safetensors"):
        weights.unlink()
    message = refusal(*words, "--overwrite", command="predict.py", settings=unreachable)
    assert "and the cache does not hold it: on a connected machine run" in message


def test_a_hub_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:  # it accepts connections
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        for name, value in (("ENDPOINT", endpoint), ("HF_HUB_OFFLINE", False)):
            monkeypatch.setattr(constants, name, value)
        problem = connection.go_offline_without_hub.__wrapped__()
        assert problem == f"the connection to {endpoint} failed (ReadTimeout: timed out)"
        assert constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("command", ["train", "predict", "push_to_hub"])
def test_no_command_asks_the_hub_for_kernels_as_its_libraries_are_imported(hub, command):
    """bitsandbytes asks for one on CPUs with bfloat16 products."""
    num_requests = len(hub.requests)
    done = complete(
        "-c",
        f"import {command}, peft",
        environment=os.environ | hub.environment() | {"HF_HUB_OFFLINE": "0"},
        modules=None,
    )
    assert done.returncode == 0, done.stderr
    assert hub.requests[num_requests:] == []
