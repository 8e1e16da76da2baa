"""Test publishing and loading over HTTP, by the real client against a Hub in memory, in separate processes."""

import ast
import json
import os
import shutil
import signal
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    CORPUS,
    ROOT,
    STRIKE,
    complete,
    copy_checkpoint,
    read_csv,
    run,
    run_outside,
    snippets,
    train_label_sets,
    write_csv,
)
from forked import LIBRARIES
from gradio_client import Client
from hub_server import HubServer
from huggingface_hub import RepoCard
from safetensors.torch import load, load_file, save, save_file
from space_server import SpaceServer
from transformers import AutoTokenizer

from checkpoint_hierarchical import SHIPPED_FILES
from configuration_hierarchical import HierarchicalConfig
from decisions_hierarchical import guaranteed_threshold, threshold_at
from modeling_hierarchical import HierarchicalForSequenceClassification, Tokens

ADAPTER_REPOSITORY = {
    *(".gitattributes", "README.md", "config.json", "metrics.json"),
    *("handler.py", "requirements.txt"),  # for Inference Endpoints
    *SHIPPED_FILES,
    *("heads.safetensors", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json"),
    *(f"plots/confusion_matrix_level_{level}.png" for level in (1, 2)),
    *("plots/reliability_diagram.png", "plots/reliability_diagram_uncalibrated.png", "plots/training_curves.png"),
}
MERGED_REPOSITORY = {
    *(name for name in ADAPTER_REPOSITORY if not name.startswith("adapter/") and name != "heads.safetensors"),
    "model.safetensors",
}
ENGINE_FILES = {"onnx/model.onnx", "onnx/model_quantized.onnx", "sentence_bert_config.json"}  # by --onnx
TEXTS = ["Chest pain after exercise, and narrowed coronary arteries.", "A tumour of the liver was removed."]


@pytest.fixture(scope="module")
def hub(tiny_encoder):
    """Serve a Hub that holds the encoder, with users who may and may not write."""
    with HubServer() as hub:
        hub.add_user("alice", "hf_alice", orgs=("clinic",))
        hub.add_user("reader", "hf_reader", role="read")
        hub.add_repo("base/tiny", Path(tiny_encoder))
        yield hub


def training_words(tiny: str, data: Path, output: Path) -> list[object]:
    flags: list[object] = [ROOT / "recipes" / "quickstart.yaml", "--model_name_or_path", tiny, "--output_dir", output]
    for split, count in (("train", 48), ("validation", 20), ("test", 20)):
        flags += [f"--{split}_file", write_csv(data / f"{split}.csv", read_csv(CORPUS / f"{split}.csv")[:count])]
    return [*flags, "--num_train_epochs", 2, "--per_device_train_batch_size", 8]


@pytest.fixture(scope="module")
def checkpoint(hub, tmp_path_factory) -> Path:
    """Return a finished run over an encoder on the Hub, in a folder with further files."""
    folder = tmp_path_factory.mktemp("run")
    output = folder / "results"
    run(*training_words("base/tiny", folder, output), settings=hub.environment())
    (output / ".env").write_text("HF_TOKEN=hf_secret")
    (output / "notes.ipynb").write_text("{}")
    (output / "optimizer.pt").write_bytes(b"pickle")
    (output / "plots" / "patients.csv").write_text("name\n")
    (output / "adapter" / "training_args.bin").write_bytes(b"pickle")
    return output


@pytest.fixture(scope="module")
def published(hub, checkpoint) -> dict[str, str]:
    """Publish both forms of the checkpoint. Return the repository ids by form."""
    for name, flags in (("adapter", []), ("merged", ["--merge"])):
        words = ["--model", checkpoint, "--repo_id", f"alice/{name}", *flags]
        done = run(*words, command="push_to_hub.py", settings=hub.environment(token="hf_alice"), fresh=not flags)
        sha = hub.commits(f"alice/{name}")[-1].sha
        assert done.stdout == f"alice/{name}: {hub.endpoint}/alice/{name}/commit/{sha}\n"
    return {"adapter": "alice/adapter", "merged": "alice/merged"}


@pytest.fixture(scope="module")
def expected(checkpoint, hub) -> torch.Tensor:
    """Return the node log-probabilities of TEXTS, (2, num_nodes)."""
    return by_hand(hub, checkpoint)


def by_hand(hub: HubServer, checkpoint: Path) -> torch.Tensor:
    """Compute log-probabilities of a checkpoint's nodes for TEXTS, (2, num_nodes), from the local files by PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModel

    folder = hub.write("base/tiny", checkpoint.parent / "base")
    encoder = PeftModel.from_pretrained(AutoModel.from_pretrained(folder), checkpoint / "adapter").eval()
    config = HierarchicalForSequenceClassification.config_class.from_pretrained(checkpoint)
    heads = HierarchicalForSequenceClassification(config).heads.eval()
    heads.load_state_dict(load_file(checkpoint / "heads.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        rows = []
        for text in TEXTS:
            inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=128)
            tokens = encoder(**inputs).last_hidden_state
            vectors = tokens.mean(1) if config.pooling == "mean" else Tokens(tokens, None, 1)
            rows.append(heads(vectors, inputs["input_ids"])[0])
        return heads.decisions(torch.cat(rows))[0]


# publishing


def test_only_the_files_of_the_checkpoint_are_published_and_nothing_of_this_machine(hub, published, checkpoint):
    files = hub.files("alice/adapter")
    assert files.keys() == ADAPTER_REPOSITORY
    assert hub.files("alice/merged").keys() == MERGED_REPOSITORY
    for name in ADAPTER_REPOSITORY - {".gitattributes", "README.md", "handler.py", "requirements.txt"}:
        assert files[name] == (checkpoint / name).read_bytes()
    known = json.loads((checkpoint / "trained_texts.json").read_text())["this_run"]
    secrets = [*known, str(checkpoint.parent), str(ROOT), "hf_alice"]
    for repo in published.values():
        for name, content in hub.files(repo).items():
            assert not any(secret.encode() in content for secret in secrets), (repo, name)


SCORING = ("open", "plots/reliability_diagram_uncalibrated.png")  # the model is saved, and not yet calibrated


def test_scores_of_another_model_are_not_published(hub, checkpoint, tmp_path):
    """Kill runs that overwrite or resume a finished one after they have saved the model, and try to publish it."""
    output = shutil.copytree(checkpoint, tmp_path / "results")
    environment = hub.environment(token="hf_alice")
    line = [*training_words("base/tiny", tmp_path, output), "--num_train_epochs"]
    publish = ["--model", output, "--repo_id", "alice/killed", "--merge", "--dry_run"]

    def kill(*flags: object) -> str:
        strike = ["-c", STRIKE, ROOT / "train.py", *SCORING, int(signal.SIGKILL), *line, *flags]
        done = complete(*strike, environment=os.environ | environment, modules=LIBRARIES)
        assert done.returncode == -signal.SIGKILL, done.stderr[-4000:]
        refused = run(*publish, command="push_to_hub.py", check=False, settings=environment)
        assert (refused.returncode, refused.stdout) == (2, "")
        return refused.stderr

    # ── Nothing is left to train: scores and card stay, but the calibration is gone ──────────────────────────────────
    described = {name: (output / name).read_bytes() for name in ("README.md", "metrics.json", "test_predictions.csv")}
    message = kill(2, "--resume_from_checkpoint", "auto")
    assert all((output / name).read_bytes() == content for name, content in described.items())
    assert message.startswith(f"push_to_hub.py: error: {output}/metrics.json has the scores of another model: ")
    assert message.count("\n") == 1

    # ── Steps are taken: scores and card are deleted first ───────────────────────────────────────────────────────────
    assert f"{output} is not a complete checkpoint: README.md is missing" in kill(3, "--resume_from_checkpoint", "auto")
    assert not any((output / name).exists() for name in described)
    for name in ("README.md", "metrics.json"):  # as a person may restore them
        (output / name).write_bytes(described[name])
    refused = run(*publish, command="push_to_hub.py", check=False, settings=environment)
    assert (refused.returncode, "has the scores of another model" in refused.stderr) == (2, True)
    run(*line, 3, "--resume_from_checkpoint", "auto", settings=environment)
    assert run(*publish, command="push_to_hub.py", settings=environment).stderr == ""


def test_both_forms_are_published_again_from_the_hub_and_changed_ones_are_not(hub, published, tiny_encoder, tmp_path):
    adapter, merged = (hub.write(published[form], tmp_path / form) for form in ("adapter", "merged"))

    def changed(source: Path, name: str, file: str, **changes: object) -> Path:
        folder = shutil.copytree(source, tmp_path / name)
        change_json(folder / file, **changes)
        return folder

    moved = {"encoder_name_or_path": tiny_encoder, "encoder_revision": None, "transformers_version": "9.0"}
    local = changed(adapter, "local", "config.json", **moved)  # the encoder is now in a folder
    pooling = changed(adapter, "pooling", "config.json", pooling="cls")
    weight = shutil.copytree(merged, tmp_path / "weight")
    tensors = load_file(weight / "model.safetensors")
    save_file(tensors | {"heads.bias": tensors["heads.bias"] + 1e-6}, weight / "model.safetensors", {"format": "pt"})
    old = changed(adapter, "old", "metrics.json", scored_model={"tensors": "of an earlier format"})
    bare = shutil.copytree(adapter, tmp_path / "bare")
    (bare / "metrics.json").unlink()
    another, warning = "metrics.json has the scores of another model: ", "check that the card describes this model"
    cases = [
        *((folder, "nothing was published") for folder in (adapter, merged, local)),
        *(
            (folder, f"{folder}/metrics.json with a hash of the scored model is missing: {warning}")
            for folder in (old, bare)
        ),
        *((folder, f"{folder}/{another}") for folder in (weight, pooling)),
    ]
    code = driver(
        """
        answers = []
        for folder in folders:
            words = ["--model", folder, "--repo_id", "alice/other", "--dry_run", "--merge"]
            with contextlib.redirect_stderr(io.StringIO()) as errors:
                answers.append([push(*words), errors.getvalue()])
        print(json.dumps(answers))
        """,
        folders=[str(folder) for folder, _ in cases],
    )
    answers = run_outside(code, tmp_path, hub.environment(tmp_path / "home"))
    for (answer, errors), (_, message) in zip(answers, cases, strict=True):
        assert message in f"{errors}{answer}"
        assert ("nothing was published" in answer) == (message.endswith((warning, "nothing was published")))
        assert ("push_to_hub.py: warning: " in errors) == message.endswith(warning)


def change_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_publishing_again_makes_no_commit_and_a_change_makes_one(hub, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "results")
    words = ["--model", folder, "--repo_id", "again"]  # the namespace is the token's
    environment = hub.environment(token="hf_alice")
    outputs = [run(*words, command="push_to_hub.py", settings=environment).stdout for _ in range(2)]
    assert outputs[0] == outputs[1]
    assert [commit.title for commit in hub.commits("alice/again")] == ["initial commit", "Publish a checkpoint"]
    (folder / "plots" / "training_curves.png").unlink()
    run(*words, command="push_to_hub.py", settings=environment)
    assert len(hub.commits("alice/again")) == 3
    main, branch = hub.files("alice/again"), ("--merge", "--revision", "merged-form")
    assert main.keys() == ADAPTER_REPOSITORY - {"plots/training_curves.png"}
    run(*words, *branch, command="push_to_hub.py", settings=environment)
    assert hub.files("alice/again", "merged-form").keys() == MERGED_REPOSITORY - {"plots/training_curves.png"}
    assert hub.files("alice/again") == main


def test_a_dry_run_lists_the_files_and_sends_nothing(hub, checkpoint, tmp_path):
    before = len(hub.requests)
    words = ["--model", checkpoint, "--repo_id", "clinic/dry", "--space_id", "alice/dry-space"]
    words += ["--private", "--dry_run"]
    (tmp_path / "token").write_text("hf_alice")  # as `hf auth login` leaves it
    done = run(*words, command="push_to_hub.py", settings=hub.environment(tmp_path))
    assert "model clinic/dry, branch main, would be created, private:" in done.stdout
    assert "heads.safetensors" in done.stdout
    assert "space alice/dry-space" in done.stdout
    assert "nothing was published" in done.stdout
    methods = {request.method for request in hub.requests[before:] if request.path != "/api/validate-yaml"}
    assert methods <= {"GET", "HEAD"}


DRIVER = """
import contextlib, io, json, os, sys
sys.path.insert(0, {root!r})
import push_to_hub, time
from hierarchical_clinicalbert.errors import InputError
time.sleep = lambda seconds: None  # between the retries of huggingface_hub

def push(*words, token="hf_alice"):
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            push_to_hub.main([str(word) for word in words])
    except InputError as error:
        return str(error)
    return out.getvalue()
"""


def driver(code: str, **values: object) -> str:
    """Return code for a process that imports push_to_hub.py once, and calls its main many times by ``push``.

    ``values`` are constants of the code.
    """
    before = DRIVER.format(root=str(ROOT))
    constants = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    return "\n".join([before, constants, textwrap.dedent(code)])


def test_what_cannot_be_published_is_reported_in_one_line_before_anything_is_sent(
    hub, published, checkpoint, tiny_encoder, tmp_path
):
    hub.add_repo("alice/cats", {"cats.csv": b"name\n", "README.md": b"cats"})
    hub.add_repo("alice/bert", {"config.json": b'{"model_type": "bert"}'})
    hub.add_repo("alice/chat", {"app.py": b"", "README.md": b"---\nsdk: gradio\n---\n"}, repo_type="space")
    whole = hub.write("alice/merged", tmp_path / "whole")

    def changed(name: str, file: str, content: bytes | None, source: Path = checkpoint) -> dict[str, str]:
        folder = shutil.copytree(source, tmp_path / name)
        (folder / file).unlink(missing_ok=True)
        if content is not None:
            (folder / file).write_bytes(content)
        return {"--model": str(folder)}

    config = json.loads((checkpoint / "config.json").read_text()) | {"encoder_name_or_path": tiny_encoder}
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    heads = (checkpoint / "heads.safetensors").read_bytes()
    cases = [
        # the checkpoint and its card
        (changed("metadata", "README.md", b"---\nlicense: [1\n---\n"), "cannot publish the card "),
        ({**changed("tags", "README.md", b"---\ntags: 5\n---\n"), "--dry_run": None}, '"tags" must be'),
        (
            changed("shards", "model.safetensors.index.json", json.dumps(index).encode(), whole),
            "model-00001-of-00002.safetensors is missing",
        ),
        (changed("local", "config.json", json.dumps(config).encode()), "on this machine only: give --merge"),
        (changed("torn", "heads.safetensors", heads[:100]), "heads.safetensors is damaged"),
        (changed("lacking", "adapter/adapter_model.safetensors", None), "adapter_model.safetensors is missing"),
        (changed("wordless", "tokenizer.json", None), "tokenizer.json is missing"),
        ({"--model": tiny_encoder}, "is not a checkpoint of this project: its config.json is missing or of another"),
        ({"--model": str(tmp_path)}, "is not a checkpoint of this project: its config.json is missing or of another"),
        # the examples
        ({"--examples": str(CORPUS / "test.csv")}, "test.csv has 150 texts; give 1 to 10"),
        (
            {"--examples": write_csv(tmp_path / "blank.csv", [{"text": " ", "id": 1}])},
            "blank.csv, line 2: the text is empty",
        ),
        ({"--examples": write_csv(tmp_path / "wrong.csv", [{"words": "a"}])}, "wrong.csv has no column called text"),
        # the token
        ({"token": None}, "`hf auth login`"),
        ({"token": "hf_unknown"}, "cannot check the token (of HF_TOKEN or the login) on the Hub: the token may not do"),
        ({"token": "hf_reader"}, "the Hub token may only read"),
        # the repository
        ({"--repo_id": "nobody/new"}, "may not write to 'nobody', only to alice, clinic"),
        ({"--repo_id": "alice/a..b"}, "cannot read the repository alice/a..b: "),
        ({"--repo_id": "alice/cats"}, "alice/cats already holds something else, such as cats.csv"),
        ({"--repo_id": "alice/bert"}, "alice/bert already holds something else, such as config.json"),
        ({"--space_id": "alice/chat"}, "alice/chat already holds something else, such as app.py"),
        ({"--repo_id": "alice/adapter", "--private": None}, "alice/adapter is public already"),
        ({"--revision": "a" * 40}, "is a commit; name a branch"),
    ]
    lines = []
    for change, _ in cases:
        flags = {"--model": str(checkpoint), "--repo_id": "alice/new", "token": "hf_alice", **change}
        token = flags.pop("token")
        lines.append([token, [word for pair in flags.items() for word in pair if word is not None]])
    before = len(hub.requests)
    code = driver("print(json.dumps([push(*line, token=token) for token, line in lines]))", lines=lines)
    answers = run_outside(code, tmp_path, hub.environment(tmp_path / "home"))
    for answer, (token, _), (_, message) in zip(answers, lines, cases, strict=True):
        assert message in answer
        assert "\n" not in answer
        assert token is None or token not in answer
    methods = {request.method for request in hub.requests[before:] if request.path != "/api/validate-yaml"}
    assert methods <= {"GET", "HEAD"}


def test_a_failed_push_leaves_the_repository_unchanged(hub, checkpoint, tmp_path):
    """Lose the connection at the creation, then at the commit, and repeat the command."""
    for request in ("POST /api/repos/create", "POST /api/models/alice/torn/commit"):
        hub.fail_at(1, request)
    words = ["--model", str(checkpoint), "--repo_id", "alice/torn"]
    code = driver("print(json.dumps([push(*words) for _ in range(4)]))", words=words)
    *failed, whole, again = run_outside(code, tmp_path, hub.environment(tmp_path / "home"))
    for answer in failed:
        assert answer.startswith("alice/torn: the connection failed")
        assert answer.endswith("; run the same command again, which commits nothing twice")
    assert [commit.title for commit in hub.commits("alice/torn")] == ["initial commit", "Publish a checkpoint"]
    assert whole == again == f"alice/torn: {hub.endpoint}/alice/torn/commit/{hub.commits('alice/torn')[-1].sha}\n"


def test_an_upload_that_xet_refuses_says_what_to_do(hub, checkpoint):
    hub.upload_mode = "lfs"  # the client then uploads by Xet
    words = ["--model", checkpoint, "--repo_id", "clinic/xet", "--private"]
    environment = hub.environment(token="hf_alice")
    done = run(*words, command="push_to_hub.py", check=False, settings=environment)
    hub.upload_mode = "regular"
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("push_to_hub.py: error: clinic/xet: ")
    assert "set HF_HUB_DISABLE_XET=1 to upload by LFS" in done.stderr.splitlines()[-1]
    assert hub.files("clinic/xet").keys() == {".gitattributes"}
    assert hub.repos["models", "clinic/xet"].private


# loading

PRINT_LOG_PROBS = """
import torch
tokenizer = AutoTokenizer.from_pretrained({repo!r}, trust_remote_code=True)
rows = []
with torch.no_grad():
    for text in {texts!r}:
        inputs = tokenizer(text, return_tensors="pt", truncation=True)
        rows.append(model(**inputs).node_log_probs[0].float().tolist())
print(json.dumps(rows))
"""


def log_probs_code(repo: str, load: str) -> str:
    head = "import json\nfrom transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer\n"
    return head + f"model = {load}\n" + PRINT_LOG_PROBS.format(repo=repo, texts=TEXTS)


def base_requests(hub: HubServer, since: int) -> list[str]:
    """Return the paths of the successful GET requests to the encoder's repository."""
    return [r.path for r in hub.requests[since:] if "base/tiny" in r.path and r.status < 400 and r.method == "GET"]


@pytest.mark.parametrize(("form", "auto"), [("adapter", "AutoModel"), ("merged", "AutoModelForSequenceClassification")])
def test_a_fresh_process_loads_the_model_in_one_call(hub, published, expected, tmp_path, form, auto):
    repo, num_requests = published[form], len(hub.requests)
    code = log_probs_code(repo, f"{auto}.from_pretrained({repo!r}, trust_remote_code=True)")
    found = torch.tensor(run_outside(code, tmp_path, hub.environment(tmp_path / "home")))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    weights = [path for path in base_requests(hub, num_requests) if path.endswith(".safetensors")]
    assert len(weights) == (1 if form == "adapter" else 0)
    commit = hub.commits("base/tiny")[-1].sha
    revisions = {
        r.path.split("/resolve/")[1].split("/")[0]
        for r in hub.requests[num_requests:]
        if "base/tiny/resolve/" in r.path
    }
    assert revisions == ({commit} if form == "adapter" else set())


def test_options_of_loading_work_as_for_any_model(hub, published, expected, tmp_path):
    code = f"""
import json, os, torch
from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig
tokenizer = AutoTokenizer.from_pretrained("alice/adapter", trust_remote_code=True)
inputs = tokenizer({TEXTS[0]!r}, return_tensors="pt", truncation=True)
found = {{}}
options = {{
    "cache_dir": {{"cache_dir": "elsewhere", "token": "hf_alice"}},
    "auto": {{"device_map": "auto"}},
    "bfloat16": {{"dtype": torch.bfloat16}},
    "4bit": {{"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}},
}}
for form, repo in {sorted(published.items())!r}:
    for name, option in options.items():
        model = AutoModel.from_pretrained(repo, trust_remote_code=True, **option)
        with torch.no_grad():
            log_probs = model(**inputs).node_log_probs[0]
        linear = model.encoder.encoder.layer[0].intermediate.dense
        found[f"{{form}} {{name}}"] = [log_probs.float().tolist(), type(linear).__name__, str(model.heads.weight.dtype)]
found["cached"] = sorted(os.listdir("elsewhere"))
print(json.dumps(found))
"""
    found = run_outside(code, tmp_path, hub.environment(tmp_path / "home"))
    assert {name for name in found.pop("cached") if name.startswith("models--")} == {
        *("models--alice--adapter", "models--alice--merged", "models--base--tiny")
    }
    for name, (log_probs, linear, heads) in found.items():
        option = name.split()[1]
        tolerance = {"bfloat16": 0.05, "4bit": 0.5}.get(option, 1e-4)
        torch.testing.assert_close(torch.tensor(log_probs), expected[0], atol=tolerance, rtol=0)
        assert (heads, linear) == ("torch.float32", {"4bit": "Linear4bit"}.get(option, "Linear")), name


def test_after_one_load_it_loads_without_the_hub(hub, published, expected, tmp_path, closed_port):
    repo, home = published["adapter"], tmp_path / "home"
    code = log_probs_code(repo, f"AutoModel.from_pretrained({repo!r}, trust_remote_code=True)")
    run_outside(code, tmp_path, hub.environment(home))
    offline = {**hub.environment(home), "HF_ENDPOINT": f"http://127.0.0.1:{closed_port}", "HF_HUB_OFFLINE": "1"}
    found = torch.tensor(run_outside(code, tmp_path, offline))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_model_of_a_private_repository_is_saved_without_the_hub(hub, tmp_path):
    """Saving gets neither the token nor the cache."""
    hub.add_repo("alice/private", copy_checkpoint("self_contained", tmp_path / "folder"), private=True)
    code = """
import json, os
from transformers import AutoModel
model = AutoModel.from_pretrained("alice/private", token="hf_alice", cache_dir="cache", trust_remote_code=True)
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:1"
print(json.dumps(model.save_pretrained("saved")))
"""
    run_outside(code, tmp_path, hub.environment(tmp_path / "home"))
    for name in SHIPPED_FILES:
        assert (tmp_path / "saved" / name).read_bytes() == (ROOT / name).read_bytes()
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("folder", "saved"))
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)


def other_taxonomy(files: dict[str, bytes]) -> dict[str, bytes]:
    config = json.loads(files["config.json"])
    config.pop("id2label")
    calibration = {"lexical_weight": config["calibration"]["lexical_weight"]}
    changed = {**config, "taxonomy": ["a", "b", "c"], "calibration": calibration}
    return {**files, "config.json": json.dumps(changed).encode()}


def other_settings(file: str, **changes: object):
    def change(files: dict[str, bytes]) -> dict[str, bytes]:
        return {**files, file: json.dumps({**json.loads(files[file]), **changes}).encode()}

    return change


def test_a_broken_repository_is_an_error_and_never_another_model(hub, published, tmp_path):
    adapter, unpinned = "adapter/adapter_config.json", "encoder_revision must be the commit of base/tiny that"
    breaks = {
        "no-heads": (lambda files: {k: v for k, v in files.items() if k != "heads.safetensors"}, "heads.safetensors"),
        "taxonomy": (other_taxonomy, "the heads weight 'bias' has shape (6,), expected (3,)"),
        "rank": (other_settings(adapter, r=8), "has shape"),
        "targets": (other_settings(adapter, target_modules=["query"]), "does not fit this model"),
        "gone": (other_settings("config.json", encoder_revision="0" * 40), "0" * 40),
        "none": (other_settings("config.json", encoder_revision=None), unpinned),
    }
    for name, (change, _) in breaks.items():
        hub.add_repo(f"alice/broken-{name}", change(hub.files("alice/adapter")))
    code = f"""
import json
from transformers import AutoModel
answers = []
for name in {list(breaks)!r}:
    for merge in (True, False):
        try:
            AutoModel.from_pretrained(f"alice/broken-{{name}}", trust_remote_code=True, merge_adapter=merge)
            answers.append("loaded")
        except Exception as error:
            answers.append(f"{{type(error).__name__}}: {{error}}")
print(json.dumps(answers))
"""
    answers = run_outside(code, tmp_path, hub.environment(tmp_path / "home"))
    messages = [message for _, message in breaks.values() for _ in range(2)]
    for answer, message in zip(answers, messages, strict=True):
        assert message in answer


def test_an_encoder_without_safetensors_is_loaded_without_asking_for_a_conversion(
    hub, tiny_encoder, published, tmp_path
):
    torch.save(load_file(f"{tiny_encoder}/model.safetensors"), tmp_path / "pytorch_model.bin")
    files = {name: data for name, data in hub.files("base/tiny").items() if name != "model.safetensors"}
    commit = hub.add_repo("base/bin", {**files, "pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()})
    moved = other_settings("config.json", encoder_name_or_path="base/bin", encoder_revision=commit)
    hub.add_repo("alice/over-bin", moved(hub.files("alice/adapter")))
    num_requests = len(hub.requests)
    code = log_probs_code("alice/over-bin", "AutoModel.from_pretrained('alice/over-bin', trust_remote_code=True)")
    run_outside(code, tmp_path, hub.environment(tmp_path / "home", "hf_alice"))
    assert not [request.path for request in hub.requests[num_requests:] if "discussions" in request.path]


# the card


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_the_snippets_of_the_card_run_in_a_fresh_process(hub, published, tmp_path, form):
    text = hub.files(published[form])["README.md"].decode()
    order = 1 if form == "adapter" else -1  # each pipeline is the first from an empty cache once
    own, stock, model = run_snippets(snippets(text)[::order], tmp_path, hub.environment(tmp_path / "home"))[::order]
    ((label, score),), *sets = map(ast.literal_eval, own.splitlines())
    assert len(sets) == ("coverage=0.9" in text)
    (leaf,) = ast.literal_eval(stock)
    assert leaf["label"] == label
    assert leaf["score"] == pytest.approx(score, abs=1e-5)
    assert model == ""  # logits alone


def run_snippets(code: list[str], folder: Path, environment: dict[str, str]) -> list[str]:
    """Return what each snippet prints, in one process."""
    runs = f"""
import contextlib, io, json
printed = []
for snippet in {code!r}:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(snippet, "snippet", "exec"), {{"__name__": "snippet"}})
    printed.append(out.getvalue())
print(json.dumps(printed))
"""
    return run_outside(runs, folder, environment)


# multi-label


@pytest.fixture(scope="module")
def label_sets(hub, tmp_path_factory) -> Path:
    """Train a multi-label run that pushes its checkpoints, and publish both forms, the merged form with ONNX."""
    folder = tmp_path_factory.mktemp("label_sets")
    environment = hub.environment(token="hf_alice")
    flags = ["--push_to_hub", "true", "--hub_model_id", "alice/sets-adapter", "--hub_strategy", "every_save"]
    flags += ["--hub_always_push", "true", "--save_strategy", "steps", "--save_steps", 2]
    flags += ["--pooling", "label_attention", "--heads_learning_rate", "0.1"]
    train_label_sets("base/tiny", folder / "results", *flags, settings=environment)
    words = ["--model", folder / "results", "--repo_id", "alice/sets-merged", "--merge", "--onnx"]
    run(*words, command="push_to_hub.py", settings=environment)
    return folder / "results"


@pytest.fixture(scope="module")
def expected_probabilities(hub, label_sets) -> np.ndarray:
    return by_hand(hub, label_sets).exp().numpy()


def test_training_with_several_labels_pushes_whole_checkpoints(hub, label_sets):
    plots = ("f1_by_frequency", "reliability_diagram", "reliability_diagram_uncalibrated")
    shared = {name for name in ADAPTER_REPOSITORY if not name.startswith("plots/")}
    shared |= {f"plots/{name}.png" for name in plots}
    assert hub.files("alice/sets-adapter").keys() == shared
    adapter = {name for name in shared if name.startswith("adapter/") or name == "heads.safetensors"}
    assert hub.files("alice/sets-merged").keys() == shared - adapter | {"model.safetensors"} | ENGINE_FILES
    assert hub.commits("alice/sets-adapter")[-1].title == "End of training"
    for commit in hub.commits("alice/sets-adapter")[1:]:
        there = hub.files("alice/sets-adapter", commit.sha)
        assert {"README.md", "heads.safetensors", "adapter/adapter_model.safetensors", "config.json"} <= there.keys()
        offered = "set_thresholds" in (json.loads(there["config.json"])["calibration"] or {})
        assert ("recall=0.9" in there["README.md"].decode()) == offered
    assert offered
    assert hub.files("alice/sets-adapter")["README.md"] == (label_sets / "README.md").read_bytes()


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_a_fresh_process_predicts_with_a_multi_label_model(hub, label_sets, expected_probabilities, tmp_path, form):
    """Predict by `AutoModel`, by both pipelines, and by the snippets of the card, over HTTP from an empty cache."""
    repo = f"alice/sets-{form}"
    code = f"""
import json
from transformers import AutoModel, AutoTokenizer, pipeline
model = AutoModel.from_pretrained({repo!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({repo!r}, trust_remote_code=True)
logits = model(**tokenizer({TEXTS!r}, padding=True, return_tensors="pt")).logits
own = pipeline("hierarchical-text-classification", model={repo!r}, trust_remote_code=True)
stock = pipeline("text-classification", model={repo!r}, trust_remote_code=True, top_k=None)
print(json.dumps([logits.sigmoid().tolist(), own({TEXTS!r}, recall=0.9, levels=True), stock({TEXTS!r}, truncation=True)]))
"""
    model, own, stock = run_outside(code, tmp_path, hub.environment(tmp_path / "home"))
    config = HierarchicalConfig.from_pretrained(label_sets)
    labels, threshold = config.tree.labels, guaranteed_threshold("recall", 0.9, config.calibration)
    np.testing.assert_allclose(model, expected_probabilities, atol=1e-4)
    for expected, result, flat in zip(expected_probabilities, own, stock, strict=True):
        nodes = {label: score for level in result["levels"] for label, score in level.items()}
        assert nodes == pytest.approx(dict(zip(labels, expected.tolist(), strict=True)), abs=1e-4)
        assert {one["label"]: one["score"] for one in flat} == pytest.approx(nodes, abs=1e-4)
        least = threshold_at(threshold, max(nodes[label] for label in labels[: config.tree.num_leaves]))
        assert {one["label"] for one in result["prediction_set"]} == {label for label in nodes if nodes[label] >= least}
    code = snippets(hub.files(repo)["README.md"].decode())
    printed = run_snippets(code, tmp_path, hub.environment(tmp_path / "home"))
    predicted, held = map(ast.literal_eval, printed[0].splitlines())
    flat = ast.literal_eval(printed[1])
    (flat,) = flat if isinstance(flat[0], list) else (flat,)
    scores = {one["label"]: one["score"] for one in flat}
    assert dict(predicted) == pytest.approx({label: scores[label] for label, _ in predicted}, abs=1e-5)
    assert held == [one["label"] for one in flat[: len(held)]]  # the most probable nodes


def test_a_full_temporary_folder_is_one_line(hub, checkpoint, small_disk, tmp_path):
    words = ("--model", checkpoint, "--repo_id", "alice/new", "--merge")
    environment = hub.environment(tmp_path / "home", "hf_alice") | {"TMPDIR": str(small_disk("100k"))}
    done = run(*words, command="push_to_hub.py", check=False, settings=environment, fresh=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("set TMPDIR to a folder with more room")
    assert "Traceback" not in done.stderr


# continuing and scoring


def test_a_published_checkpoint_is_scored_as_the_folder_was(hub, published, checkpoint, tmp_path):
    """Score the requested commit, although the branch has changed."""
    repo = "alice/scored"
    commit = hub.add_repo(repo, hub.files(published["adapter"]))
    hub.add_repo(repo, other_taxonomy(hub.files(repo)))
    num_requests = len(hub.requests)
    line = ["--model_name_or_path", repo, "--model_revision", commit, "--do_train", "false"]
    line += ["--test_file", checkpoint.parent / "test.csv", "--output_dir", tmp_path / "scores"]
    done = run(*line, settings=hub.environment())
    assert f"checkpoint: {repo} at {commit}" in done.stderr
    scored, before = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "scores", checkpoint))
    for name in ("accuracy", "macro_f1", "log_loss", "ece", "set_coverage"):
        assert scored[f"test_{name}"] == pytest.approx(before[f"test_{name}"], abs=1e-5), name
    paths = [request.path for request in hub.requests[num_requests:] if f"{repo}/resolve/" in request.path]
    assert {path.split("/resolve/")[1].split("/")[0] for path in paths} == {commit}
    assert not any(path.endswith((".png", "README.md")) for path in paths)
    report = json.loads((tmp_path / "scores" / "data_report.json").read_text())
    assert report["trained_before"]["scores"] == "unverified"  # the training texts are not published


def test_files_are_classified_at_the_revision_that_is_given_and_the_manifest_names_its_commit(
    hub, published, expected, tmp_path
):
    """Predict at a commit, and at the branch, which has other weights now."""
    files = hub.files(published["merged"])
    first = hub.add_repo("alice/pinned", files)
    weights = load(files["model.safetensors"])
    weights["heads.bias"] = weights["heads.bias"].flip(0) + 1
    second = hub.add_repo("alice/pinned", {"model.safetensors": save(weights, {"format": "pt"})})
    (tmp_path / "in.csv").write_text("\n".join(["text", *(f'"{text}"' for text in TEXTS)]) + "\n")
    code = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
from predict import main
words = ["--model", "alice/pinned", "--input", "in.csv", "--dtype", "fp32", "--probabilities", "--output_format", "jsonl"]
print(json.dumps([main([*words, "--revision", one, "--output", one + "/"]) for one in ({first!r}, "main")]))
"""
    assert run_outside(code, tmp_path, hub.environment(tmp_path / "home")) == [0, 0]
    found = []
    for revision, commit in ((first, first), ("main", second)):
        manifest = json.loads((tmp_path / revision / "manifest.json").read_text())
        assert (manifest["model"], manifest["commit"]) == ("alice/pinned", commit)
        lines = (tmp_path / revision / "part-00000.jsonl").read_text().splitlines()
        found.append([[*json.loads(line)["probabilities"].values()] for line in lines])
    leaves = expected[:, :5].exp()
    torch.testing.assert_close(torch.tensor(found[0]), leaves, atol=1e-4, rtol=0)
    assert (torch.tensor(found[1]) - leaves).abs().max() > 0.01


def test_a_published_checkpoint_is_continued_as_the_folder_is(hub, published, checkpoint, tmp_path):
    num_requests = len(hub.requests)
    rows = write_csv(tmp_path / "more.csv", read_csv(CORPUS / "train.csv")[48:80])
    line = ["--train_file", rows, "--max_steps", 2, "--save_strategy", "no", "--load_best_model_at_end", "false"]
    for name, model in (("folder", checkpoint), ("id", published["adapter"])):
        output = tmp_path / name
        line += ["--validation_size", 0, "--model_name_or_path", model, "--output_dir", output]
        run(*line, settings=hub.environment())
    for name in ("heads.safetensors", "adapter/adapter_model.safetensors", "tokenizer.json"):
        assert (tmp_path / "id" / name).read_bytes() == (tmp_path / "folder" / name).read_bytes()
        assert name == "tokenizer.json" or (output / name).read_bytes() != (checkpoint / name).read_bytes()
    config, commit = json.loads((output / "config.json").read_text()), hub.commits("base/tiny")[-1].sha
    assert (config["encoder_name_or_path"], config["encoder_revision"]) == ("base/tiny", commit)
    paths = [request.path for request in hub.requests[num_requests:] if "base/tiny" in request.path]
    assert [path for path in paths if "main" in path] == []  # the encoder is read at its commit


def test_a_checkpoint_that_cannot_be_downloaded_is_one_line(hub, published, tmp_path):
    hub.add_repo("alice/half", hub.files(published["adapter"]))
    hub.fail_at(1, match="HEAD /alice/half/resolve/.*adapter_model", how="403")
    line = ["--model_name_or_path", "alice/half", "--train_file", CORPUS / "train.csv", "--output_dir", tmp_path / "no"]
    done = run(*line, check=False, settings=hub.environment())
    assert done.returncode == 2
    assert "cannot download the checkpoint alice/half at " in done.stderr.splitlines()[-1]


# pushing while training


@pytest.mark.parametrize("strategy", ["end", "all_checkpoints"])
def test_training_pushes_loadable_checkpoints(hub, tmp_path, strategy):
    output, repo = tmp_path / "results", f"alice/trained-{strategy}"
    done = run(
        *training_words("base/tiny", tmp_path, output),
        *("--push_to_hub", "true", "--hub_model_id", repo, "--hub_strategy", strategy, "--hub_token", "hf_alice"),
        *("--hub_always_push", "true"),
        settings=hub.environment(),
    )
    assert f"published as {repo}" in done.stderr
    assert "failed" not in done.stderr
    steps = sorted(int(folder.name.split("-")[1]) for folder in output.glob("checkpoint-*"))
    during = [] if strategy == "end" else [f"Training in progress, step {step}" for step in steps]
    commits = hub.commits(repo)[1:]
    assert len(steps) == 2
    assert [commit.title for commit in commits] == [*during, "End of training"]
    for commit in commits[:-1]:  # whole checkpoints, without scores
        plots = {name for name in ADAPTER_REPOSITORY if name.startswith("plots/")}
        assert commit.files.keys() == ADAPTER_REPOSITORY - plots - {"metrics.json"}
        assert "Training is not finished." in commit.files["README.md"].decode()
    files = hub.files(repo)
    assert files.keys() == ADAPTER_REPOSITORY
    for name in ("README.md", "heads.safetensors", "adapter/adapter_model.safetensors", "config.json", "metrics.json"):
        assert files[name] == (output / name).read_bytes()
    assert json.loads(files["config.json"])["calibration"]["scales"]  # the last commit is of the calibrated model
    known = json.loads((output / "trained_texts.json").read_text())["this_run"]
    secrets = [known[0], "hf_alice", str(tmp_path)]
    for commit in commits:
        for name, content in commit.files.items():
            assert not any(secret.encode() in content for secret in secrets), name
    code = log_probs_code(repo, f"AutoModel.from_pretrained({repo!r}, trust_remote_code=True)")
    found = torch.tensor(run_outside(code, tmp_path, hub.environment(tmp_path / "other")))
    torch.testing.assert_close(found, by_hand(hub, output), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        ("hf_reader", "alice/new", "the Hub token may only read"),
        ("hf_alice", "alice/new", "train without --push_to_hub, then run push_to_hub.py --merge"),
    ],
)
def test_a_run_that_could_not_be_published_is_refused_before_it_starts(
    hub, tiny_encoder, tmp_path, token, repo, message
):
    encoder = tiny_encoder if token == "hf_alice" else "base/tiny"
    words = [*training_words(encoder, tmp_path, tmp_path / "results"), "--push_to_hub", "true", "--hub_model_id", repo]
    done = run(*words, check=False, settings=hub.environment(token=token))
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "results" / "config.json").exists()


def test_a_run_whose_last_push_fails_is_kept_and_says_how_to_publish_it(hub, tmp_path):
    hub.fail_at(1, match="POST /api/models/alice/late/commit/", how="drop")
    done = run(
        *training_words("base/tiny", tmp_path, tmp_path / "results"),
        *("--push_to_hub", "true", "--hub_model_id", "alice/late", "--hub_strategy", "end"),
        check=False,
        settings=hub.environment(token="hf_alice"),
    )
    assert done.returncode == 2
    remedy = f"push_to_hub.py --model {tmp_path / 'results'} --repo_id alice/late"
    assert done.stderr.splitlines()[-1].endswith(remedy)
    run(*remedy.split()[1:], command="push_to_hub.py", settings=hub.environment(token="hf_alice"))
    assert hub.files("alice/late").keys() == ADAPTER_REPOSITORY


# the Space


def test_a_space_is_published_pointing_at_the_commit_and_serves_it(hub, checkpoint, tmp_path):
    environment = hub.environment(token="hf_alice")
    examples = ["A first example.", "Another one, of a publisher."]
    write_csv(tmp_path / "examples.csv", [{"text": text} for text in examples])
    words = ["--model", checkpoint, "--repo_id", "alice/served", "--space_id", "alice/served-space"]
    words += ["--examples", tmp_path / "examples.csv"]
    for _ in range(2):  # and again, to the same Space
        done = run(*words, command="push_to_hub.py", settings=environment)
    assert "alice/served-space: http" in done.stdout
    assert len(hub.commits("alice/served")) == 2
    files = hub.files("alice/served-space", repo_type="space")
    ours = {file.name for file in (ROOT / "space").iterdir() if file.is_file()}
    assert files.keys() >= {".gitattributes", "taxonomy_hierarchical.py", *ours}
    assert len(hub.commits("alice/served-space", repo_type="space")) == 2
    space = hub.repos["spaces", "alice/served-space"]
    variables = {name: variable["value"] for name, variable in space.variables.items()}
    assert variables == {"MODEL_ID": "alice/served", "MODEL_REVISION": hub.commits("alice/served")[-1].sha}
    page = json.loads((checkpoint / "config.json").read_text())["page"]
    data = RepoCard(files["README.md"].decode()).data
    assert (data.models, data.sdk, data.title) == (["alice/served"], "gradio", page["title"])
    assert json.loads(hub.files("alice/served")["config.json"])["page"] == {**page, "examples": examples}
    card = hub.files("alice/served")["README.md"].decode()
    assert all(f"- text: {text}\n" in card for text in examples)
    again = ["--model", hub.write("alice/served", tmp_path / "again"), "--repo_id", "alice/again", "--dry_run"]
    assert run(*again, command="push_to_hub.py", settings=environment).stderr == ""  # its scores are still the model's

    hub.fail_at(1, match="POST /api/spaces/alice/served-space/variables", how="500")
    done = run(*words, command="push_to_hub.py", check=False, settings=environment)
    assert done.returncode == 2
    assert "alice/served-space is published, but not pointed at the model" in done.stderr.splitlines()[-1]

    hosted = hub.write("alice/served-space", tmp_path / "space", repo_type="space")
    shown = hub.environment(tmp_path / "space-home") | variables
    with SpaceServer(None, tmp_path, hosted / "app.py", shown) as server:
        assert all(text in server.http.get("/config").text for text in examples)
        client = Client(server.address, verbose=False)
        found = client.predict(TEXTS[0], levels=True, api_name="/classify")
    assert found["path"][0]["label"] in ("general pathological conditions", "specific disease")
    assert sum(found["levels"][0].values()) == pytest.approx(1, abs=1e-5)
