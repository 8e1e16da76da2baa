"""Test when the commands ask the Hub, and what they say if it cannot be reached.

The Hub is a server of this machine. It records its requests, so the tests know what came before them.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, complete, run
from forked import LIBRARIES
from hub_server import SHARED_HOME, HubServer

ROWS = "text,label\n" + "".join(f"text number {i},{'ab'[i % 2]}\n" for i in range(40))
BRIEFLY = (
    *("--max_steps", 1, "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"),
    *("--quantization", "none"),
)


@pytest.fixture(scope="module")
def hub(tiny_encoder) -> Iterator[HubServer]:
    """Serve an encoder, and a checkpoint of another taxonomy than `ROWS`."""
    with HubServer() as hub:
        hub.add_user("alice", "hf_alice")
        hub.add_repo("base/tiny", Path(tiny_encoder))
        hub.add_repo("alice/checkpoint", ROOT / "tests" / "checkpoint" / "self_contained")
        yield hub


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Make a folder with a few files, and change to it."""
    (tmp_path / "rows.csv").write_text(ROWS)
    (tmp_path / "taxonomy.csv").write_text("parent,child\n,a\n,c\n")
    shutil.copytree(ROOT / "tests" / "checkpoint" / "self_contained", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(*words: object, command: str = "train.py", settings: dict[str, str] | None = None) -> str:
    """Run a command that must be refused, and return its message."""
    done = run(*words, command=command, check=False, cwd=Path.cwd(), settings=settings)
    assert done.returncode == 2, done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def unreachable(port: int, home: Path | str) -> dict[str, str]:
    """Return the variables of a process whose Hub is a closed port."""
    return {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}


# ── what is checked before any request ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--label_column", "absent"), "has no column 'absent' (--label_column)"),
        (("--taxonomy", "taxonomy.csv"), "the label 'b' is not in the taxonomy"),
        (("--model_name_or_path", "alice/checkpoint", "--output_dir", "run"), "--output_dir run already holds a run"),
    ],
)
def test_the_hub_is_not_asked_for_a_model_if_rows_are_unusable(hub, place, words, message):
    num_requests = len(hub.requests)
    assert message in refusal("--train_file", "rows.csv", *words, settings=hub.environment())
    assert hub.requests[num_requests:] == []


def test_the_hub_is_asked_for_the_configuration_alone_of_a_checkpoint_that_lacks_a_label(hub, place):
    num_requests = len(hub.requests)
    words = ("--train_file", "rows.csv", "--model_name_or_path", "alice/checkpoint")
    message = refusal(*words, "--tuning", "full", settings=hub.environment(place / "home"))
    assert "rows.csv, line 2, column 'label': the label 'a' is not in the taxonomy" in message
    paths = [request.path for request in hub.requests[num_requests:]]
    assert paths[0] == "/"
    assert {path.rpartition("/")[2] for path in paths[1:]} == {"config.json"}


# ── a Hub that cannot be reached ─────────────────────────────────────────────────────────────────────────────────────


def test_without_a_hub_each_command_says_what_to_do(place, closed_port, clear_checkpoint):
    settings = unreachable(closed_port, place / SHARED_HOME)
    failed = f"the connection to http://127.0.0.1:{closed_port} failed (ConnectError: [Errno 111] Connection refused)"
    words = ("--train_file", "rows.csv")
    message = refusal(*words, settings=settings)
    model = "emilyalsentzer/Bio_ClinicalBERT"
    assert (
        f"cannot load the model {model}: there is no such folder, {failed}, and the cache does not hold it" in message
    )
    assert re.search(rf"run `hf download {model} --revision [0-9a-f]{{40}} --cache-dir FOLDER` and copy", message)
    message = refusal("--dataset_name", "someone/rows", settings=settings)
    assert f"cannot load --dataset_name someone/rows (revision main): {failed}; give" in message
    words = ("--model", "alice/checkpoint", "--input", "rows.csv", "--output", "out.csv")
    message = refusal(*words, command="predict.py", settings=settings)
    assert f"cannot load the model alice/checkpoint: there is no such folder, {failed}, and" in message
    words = ("--model", clear_checkpoint, "--repo_id", "alice/new", "--merge")
    message = refusal(*words, command="push_to_hub.py", settings=settings | {"HF_TOKEN": "hf_alice"})
    assert message == f"push_to_hub.py: error: cannot check the token (of HF_TOKEN or the login) on the Hub: {failed}"
    message = refusal("--train_file", "rows.csv", settings=settings | {"HF_HUB_OFFLINE": "1"})
    assert "folder, HF_HUB_OFFLINE is set, and the cache does not hold it: " in message


def follow_advice(hub: HubServer, place: Path, message: str) -> None:
    """Run the command of a message on a machine that reaches the Hub, and copy what it downloads to this machine."""
    command, cache = re.search("run `hf (.+) FOLDER` and copy the content of FOLDER to (.+)$", message).groups()
    line = [Path(sys.executable).parent / "hf", *shlex.split(command), "brought"]
    subprocess.run(line, env=os.environ | hub.environment(place / "connected"), check=True, capture_output=True)
    shutil.copytree("brought", cache, symlinks=True, dirs_exist_ok=True)


def test_the_advice_brings_models_to_a_machine_without_a_hub(hub, place, closed_port):
    """Train an adapter with a Hub. Then follow the advice for its encoder, and for an encoder to train."""
    adapter = place / "adapter"
    trains = ("--train_file", "rows.csv", "--model_name_or_path", "base/tiny", *BRIEFLY)
    run(*trains, "--output_dir", adapter, settings=hub.environment(), cwd=place)
    settings = unreachable(closed_port, place / SHARED_HOME)
    predicts = ("--model", adapter, "--input", "rows.csv", "--output", "out.csv", "--dtype", "fp32")
    (place / "new.csv").write_text(ROWS.replace("text number", "another text"))
    scores = ("--test_file", "new.csv", "--model_name_or_path", adapter, "--do_train", "false")
    for command, words, what in (
        ("train.py", trains, "model"),
        ("train.py", scores, "encoder"),
        ("predict.py", predicts, "encoder"),
    ):
        message = refusal(*words, command=command, settings=settings)
        assert f"cannot load the {what} base/tiny: there is no such folder, the connection to " in message
    follow_advice(hub, place, message)
    done = run(*predicts, command="predict.py", settings=settings, cwd=place)
    assert "thrown while requesting" not in done.stderr  # as huggingface_hub says before it repeats a request
    assert len((place / "out.csv").read_text().splitlines()) == 41


def test_a_model_in_the_cache_needs_no_hub(hub, place, closed_port):
    home = place / SHARED_HOME
    words = ("--train_file", "rows.csv", "--model_name_or_path", "base/tiny", *BRIEFLY, "--output_dir")
    run(*words, "first", settings=hub.environment(home), cwd=place)
    settings = unreachable(closed_port, home)
    done = run(*words, "second", settings=settings, cwd=place)
    assert done.stderr.count("Connection refused): models are loaded from the cache") == 1
    assert "thrown while requesting" not in done.stderr
    # a download that was interrupted
    for weights in home.glob("hub/models--base--tiny/snapshots/*/*.safetensors"):
        weights.unlink()
    assert "and the cache does not hold it: on a connected machine run" in refusal(*words, "third", settings=settings)


def test_a_hub_that_never_answers_is_given_up(place):
    """Run train.py with a limit of one second."""
    command = str(ROOT / "train.py")
    code = f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); import hierarchical_clinicalbert.connection as connection; "
    code += f"connection.ANSWER_SECONDS = 1; sys.argv = {[command, '--train_file', 'rows.csv']!r}; "
    code += f"runpy.run_path({command!r}, run_name='__main__')"
    with socket.create_server(("127.0.0.1", 0)) as server:  # it accepts connections
        port = server.getsockname()[1]
        settings = unreachable(port, place / "home")
        log = complete("-c", code, environment=os.environ | settings, cwd=place, modules=LIBRARIES).stderr
    problem = "failed (no answer within 1 seconds), and the cache does not hold it"
    assert f"the connection to http://127.0.0.1:{port} {problem}" in log
    assert "thrown while requesting" not in log
