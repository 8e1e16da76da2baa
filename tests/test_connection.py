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
from contextlib import ExitStack, contextmanager
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
    (tmp_path / "unlabelled.csv").write_text(ROWS + "one more text,\n")
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

UNUSABLE = {
    "no data": ((), "no data: give --dataset_name, --data_path, or --train_file"),
    "no file": (("--train_file", "absent.csv"), "cannot read absent.csv"),
    "no column": (("--train_file", "rows.csv", "--label_column", "absent"), "has no column 'absent' (--label_column)"),
    "no label": (("--train_file", "unlabelled.csv"), "unlabelled.csv, line 42, column 'label': the label is missing"),
    "no taxonomy": (("--train_file", "rows.csv", "--taxonomy", "absent.yaml"), "cannot read absent.yaml"),
    "other taxonomy": (
        ("--train_file", "rows.csv", "--taxonomy", "taxonomy.csv"),
        "the label 'b' is not in the taxonomy",
    ),
    "a run": (("--train_file", "rows.csv", "--output_dir", "run"), "--output_dir run already holds a run"),
}


@pytest.mark.parametrize(
    ("case", "model"),
    [(case, None) for case in UNUSABLE]
    + [(case, "alice/checkpoint") for case in ("no file", "no column", "no label", "a run")],
)
def test_the_hub_is_not_asked_for_an_encoder_or_a_taxonomy_if_rows_are_unusable(hub, place, case, model):
    words, message = UNUSABLE[case]
    num_requests = len(hub.requests)
    flags = ("--model_name_or_path", model) if model else ()
    assert message in refusal(*words, *flags, settings=hub.environment())
    assert hub.requests[num_requests:] == []


@pytest.mark.parametrize("flags", [(), ("--do_train", "false")], ids=["train", "score"])
def test_the_hub_is_asked_for_the_configuration_alone_of_a_checkpoint_that_lacks_a_label(hub, place, flags):
    num_requests = len(hub.requests)
    words = ("--test_file" if flags else "--train_file", "rows.csv", "--model_name_or_path", "alice/checkpoint", *flags)
    message = refusal(*words, "--tuning", "full", settings=hub.environment(place / "home"))
    assert "rows.csv, line 2, column 'label': the label 'a' is not in the taxonomy" in message
    paths = [request.path for request in hub.requests[num_requests:]]
    assert paths[0] == "/"
    assert {path.rpartition("/")[2] for path in paths[1:]} == {"config.json"}


def download(hub: HubServer, place: Path, command: str) -> None:
    """Run the command of a message on a machine that reaches the Hub, for the folder ``brought``."""
    line = [Path(sys.executable).parent / "hf", *shlex.split(command), "brought"]
    subprocess.run(line, env=os.environ | hub.environment(place / "connected"), check=True, capture_output=True)


# ── a Hub that cannot be reached ─────────────────────────────────────────────────────────────────────────────────────


def test_without_a_hub_each_command_says_what_to_do(place, closed_port, clear_checkpoint):
    settings = unreachable(closed_port, place / SHARED_HOME)
    failed = f"the connection to http://127.0.0.1:{closed_port} failed (ConnectError: [Errno 111] Connection refused)"
    words = ("--train_file", "rows.csv")
    message = refusal(*words, settings=settings)
    assert message.startswith(
        f"train.py: error: cannot load the model emilyalsentzer/Bio_ClinicalBERT: there is no such folder, {failed}, and"
    )
    assert re.search(
        r"run `hf download emilyalsentzer/Bio_ClinicalBERT --revision [0-9a-f]{40} --local-dir FOLDER`", message
    )
    assert message.endswith("and give --model_name_or_path FOLDER")
    message = refusal(*words, "--model_name_or_path", "base/tiny", "--model_revision", "v1", settings=settings)
    assert message.endswith(
        "run `hf download base/tiny --revision v1 --local-dir FOLDER` and give --model_name_or_path FOLDER"
    )
    message = refusal("--dataset_name", "someone/rows", settings=settings)
    assert message.startswith(
        f"train.py: error: cannot load --dataset_name someone/rows (revision main): {failed}; give"
    )
    words = ("--model", "alice/checkpoint", "--input", "rows.csv", "--output", "out.csv")
    message = refusal(*words, command="predict.py", settings=settings)
    assert message.startswith(
        f"predict.py: error: cannot load the model alice/checkpoint: there is no such folder, {failed}, and"
    )
    assert message.endswith("run `hf download alice/checkpoint --local-dir FOLDER` and give --model FOLDER")
    words = ("--model", clear_checkpoint, "--repo_id", "alice/new", "--merge")
    message = refusal(*words, command="push_to_hub.py", settings=settings | {"HF_TOKEN": "hf_alice"})
    assert message == f"push_to_hub.py: error: cannot check the token (of HF_TOKEN or the login) on the Hub: {failed}"
    offline = settings | {"HF_HUB_OFFLINE": "1"}
    assert "folder, HF_HUB_OFFLINE is set, and the cache does not hold it: " in refusal(
        "--train_file", "rows.csv", settings=offline
    )


def test_the_advice_brings_an_encoder_to_a_machine_without_a_hub(hub, place, closed_port):
    settings = unreachable(closed_port, place / SHARED_HOME)
    words = ("--train_file", "rows.csv", *BRIEFLY)
    message = refusal(*words, "--model_name_or_path", "base/tiny", settings=settings)
    command, flags = re.search("run `hf (.+) FOLDER` and give (.+) FOLDER$", message).groups()
    download(hub, place, command)
    done = run(*words, *shlex.split(flags), "brought", settings=settings, cwd=place)
    assert (place / "results" / "metrics.json").is_file()
    assert "thrown while requesting" not in done.stderr


def test_the_advice_brings_the_encoder_of_an_adapter(hub, place, closed_port):
    adapter = place / "adapter"
    words = ("--train_file", "rows.csv", "--model_name_or_path", "base/tiny", *BRIEFLY, "--output_dir", adapter)
    run(*words, settings=hub.environment(), cwd=place)
    settings = unreachable(closed_port, place / SHARED_HOME)
    (place / "new.csv").write_text(ROWS.replace("text number", "another text"))
    predicts = ("--model", adapter, "--input", "rows.csv", "--output", "out.csv", "--dtype", "fp32")
    scores = ("--test_file", "new.csv", "--model_name_or_path", adapter, "--do_train", "false")
    reason = f"there is no such folder, the connection to http://127.0.0.1:{closed_port} failed"
    for command, words in (("predict.py", predicts), ("train.py", scores)):
        message = refusal(*words, command=command, settings=settings)
        assert message.startswith(f"{command}: error: cannot load the encoder base/tiny: {reason}")
    command, cache = re.search("run `hf (.+) FOLDER` and copy the content of FOLDER to (.+)$", message).groups()
    download(hub, place, command)
    shutil.copytree("brought", cache, symlinks=True, dirs_exist_ok=True)
    done = run(*predicts, command="predict.py", settings=settings, cwd=place)
    assert "thrown while requesting" not in done.stderr
    assert len((place / "out.csv").read_text().splitlines()) == 41


@pytest.mark.parametrize("pinned", [True, False])
def test_a_model_in_the_cache_needs_no_hub(hub, place, closed_port, pinned):
    home = place / SHARED_HOME
    revision = ("--model_revision", hub.commits("base/tiny")[-1].sha) if pinned else ()
    words = ("--train_file", "rows.csv", "--model_name_or_path", "base/tiny", *revision, *BRIEFLY, "--output_dir")
    run(*words, "first", settings=hub.environment(home), cwd=place)
    settings = unreachable(closed_port, home)
    done = run(*words, "second", settings=settings, cwd=place)
    assert done.stderr.count("Connection refused): models are loaded from the cache") == 1
    assert "thrown while requesting" not in done.stderr  # as huggingface_hub says before it repeats a request
    done = run(*words, "third", settings=settings | {"HF_HUB_OFFLINE": "1"}, cwd=place)
    assert "thrown while requesting" not in done.stderr
    assert "from the cache" not in done.stderr
    # a download that was interrupted
    for weights in home.glob("hub/models--base--tiny/snapshots/*/*.safetensors"):
        weights.unlink()
    assert "and the cache does not hold it: on a connected machine run" in refusal(*words, "fourth", settings=settings)


@contextmanager
def silent_port(accepts: bool) -> Iterator[int]:
    """Yield a port that accepts connections and never answers, or one that answers no attempt to connect, as behind a firewall."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(10 if accepts else 0)
        for _ in range(0 if accepts else 4):  # Linux drops attempts to connect while the queue of a socket is full
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield server.getsockname()[1]


@pytest.mark.parametrize("accepts", [False, True])
def test_a_hub_that_never_answers_is_given_up(place, accepts):
    """Run train.py with a limit of one second."""
    command = str(ROOT / "train.py")
    code = f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); import hierarchical_clinicalbert.connection as connection; "
    code += f"connection.ANSWER_SECONDS = 1; sys.argv = {[command, '--train_file', 'rows.csv']!r}; "
    code += f"runpy.run_path({command!r}, run_name='__main__')"
    with silent_port(accepts) as port:
        settings = unreachable(port, place / "home")
        log = complete("-c", code, environment=os.environ | settings, cwd=place, modules=LIBRARIES).stderr
    problem = "failed (no answer within 1 seconds), and the cache does not hold it"
    assert f"the connection to http://127.0.0.1:{port} {problem}" in log
    assert "thrown while requesting" not in log
