"""Test publishing and loading over HTTP, by the real client against a Hub in memory, in separate
processes.
"""

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    CORPUS,
    ROOT,
    first_rows,
    read_csv,
    run,
    run_outside,
    snippets,
    train_label_sets,
    write_csv,
)
from gradio_client import Client
from hub_server import HubServer
from huggingface_hub import ModelCard, RepoCard
from safetensors.torch import load, load_file, save, save_file
from space_server import SpaceServer
from transformers import AutoTokenizer

from checkpoint_hierarchical import SHIPPED_FILES
from configuration_hierarchical import HierarchicalConfig
from modeling_hierarchical import HierarchicalForSequenceClassification, Tokens

ADAPTER_REPOSITORY = {
    *(".gitattributes", "README.md", "config.json", "metrics.json", "fingerprint.json"),
    *("handler.py", "requirements.txt"),  # for Inference Endpoints
    *SHIPPED_FILES,
    *("heads.safetensors", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json"),
    *(f"plots/confusion_matrix_level_{level}.png" for level in (1, 2)),
    *("plots/reliability_diagram.png", "plots/training_curves.png"),
}
MERGED_REPOSITORY = {
    *(
        name
        for name in ADAPTER_REPOSITORY
        if not name.startswith("adapter/") and name != "heads.safetensors"
    ),
    "model.safetensors",
}
TEXTS = [
    "Chest pain after exercise, and narrowed coronary arteries.",
    "A tumour of the liver was removed.",
]


@pytest.fixture(scope="session")
def hub(hub, tiny_encoder) -> HubServer:
    """Serve a Hub that holds the encoder."""
    hub.add_repo("base/tiny", Path(tiny_encoder))
    return hub


def training_words(tiny: str, data: Path, output: Path) -> list[object]:
    flags: list[object] = [
        ROOT / "recipes" / "quickstart.yaml",
        "--model_name_or_path",
        tiny,
        "--output_dir",
        output,
    ]
    flags += first_rows("corpus", data, 48, 20, 20)
    return [*flags, "--num_train_epochs", 2, "--per_device_train_batch_size", 16]


@pytest.fixture(scope="session")
def checkpoint(hub, tmp_path_factory) -> Path:
    """Return a finished run over an encoder on the Hub, which pushed its checkpoints to
    alice/trained, in a folder with further files.
    """
    folder = tmp_path_factory.mktemp("run")
    output = folder / "results"
    push = ("--push_to_hub", "true", "--hub_model_id", "alice/trained", "--hub_token", "hf_alice")
    done = run(*training_words("base/tiny", folder, output), *push, settings=hub.environment())
    assert "published as alice/trained" in done.stderr
    assert "failed" not in done.stderr
    hub.add_repo("base/tiny", {"note.txt": b"a later commit of the encoder"})
    (output / ".env").write_text("HF_TOKEN=hf_secret")
    (output / "notes.ipynb").write_text("{}")
    (output / "optimizer.pt").write_bytes(b"pickle")
    (output / "plots" / "patients.csv").write_text("name\n")
    (output / "adapter" / "training_args.bin").write_bytes(b"pickle")
    return output


@pytest.fixture(scope="session")
def published(hub, checkpoint) -> dict[str, str]:
    """Publish both forms of the checkpoint. Return the repository ids by form."""
    for name, flags in (("adapter", []), ("merged", ["--merge"])):
        words = ["--model", checkpoint, "--repo_id", f"alice/{name}", *flags]
        done = run(*words, command="push_to_hub.py", settings=hub.environment(token="hf_alice"))
        sha = hub.commits(f"alice/{name}")[-1].sha
        assert done.stdout == f"alice/{name}: {hub.endpoint}/alice/{name}/commit/{sha}\n"
    return {"adapter": "alice/adapter", "merged": "alice/merged"}


@pytest.fixture(scope="module")
def expected(checkpoint, hub) -> torch.Tensor:
    """Return the node log-probabilities of TEXTS, (2, num_nodes)."""
    return by_hand(hub, checkpoint)


def by_hand(hub: HubServer, checkpoint: Path) -> torch.Tensor:
    """Compute log-probabilities of a checkpoint's nodes for TEXTS, (2, num_nodes), from the
    local files by PEFT alone.
    """
    from peft import PeftModel
    from transformers import AutoModel

    folder = hub.write("base/tiny", checkpoint.parent / "base")
    encoder = PeftModel.from_pretrained(
        AutoModel.from_pretrained(folder), checkpoint / "adapter"
    ).eval()
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


def test_only_the_files_of_the_checkpoint_are_published_and_nothing_of_this_machine(
    hub, published, checkpoint
):
    files = hub.files("alice/adapter")
    assert files.keys() == ADAPTER_REPOSITORY
    assert hub.files("alice/merged").keys() == MERGED_REPOSITORY
    for name in ADAPTER_REPOSITORY - {
        ".gitattributes",
        "README.md",
        "handler.py",
        "requirements.txt",
    }:
        assert files[name] == (checkpoint / name).read_bytes()
    known = json.loads((checkpoint / "trained_texts.json").read_text())["this_run"]
    secrets = [*known, str(checkpoint.parent), str(ROOT), "hf_alice"]
    for repo in published.values():
        for name, content in hub.files(repo).items():
            assert not any(secret.encode() in content for secret in secrets), (repo, name)


def test_publishing_again_makes_no_commit_and_a_change_makes_one(hub, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "results")
    words = ["--model", folder, "--repo_id", "again"]  # the namespace is the token's
    environment = hub.environment(token="hf_alice")
    outputs = [run(*words, command="push_to_hub.py", settings=environment).stdout for _ in range(2)]
    assert outputs[0] == outputs[1]
    assert [commit.title for commit in hub.commits("alice/again")] == [
        "initial commit",
        "Publish a checkpoint",
    ]
    (folder / "plots" / "training_curves.png").unlink()
    main = hub.files("alice/again")
    branch = ("--merge", "--revision", "merged-form")
    run(*words, *branch, command="push_to_hub.py", settings=environment)
    assert hub.files("alice/again", "merged-form").keys() == MERGED_REPOSITORY - {
        "plots/training_curves.png"
    }
    assert hub.files("alice/again") == main


# casts a checkpoint, or merges its adapter, as a user's own script does
SAVE_AGAIN = """
import shutil, torch
from transformers import AutoModel
source, target = {source!r}, {target!r}
model = AutoModel.from_pretrained(source, trust_remote_code=True, dtype=torch.{dtype})
model.save_pretrained(target)
tokenizer = ("tokenizer.json", "tokenizer_config.json")
for name in ("README.md", "metrics.json", "fingerprint.json", *tokenizer):
    shutil.copy(f"{{source}}/{{name}}", target)
print("{{}}")
"""


def test_scores_are_published_with_the_weights_that_were_scored_alone(hub, checkpoint, tmp_path):
    """Weights that are cast, merged or saved again are the same.

    Weights that training could have changed are not.
    """
    environment = hub.environment(token="hf_alice")

    def publish(folder: Path, *flags: str):
        words = ("--model", folder, "--repo_id", "alice/scored", "--dry_run", *flags)
        return run(*words, command="push_to_hub.py", settings=environment, check=False)

    # ── the same weights in other forms ───────────────────────────────────────────────────────────
    merged = tmp_path / "float32"
    for source, dtype in ((checkpoint, "float32"), (checkpoint, "bfloat16"), (merged, "float16")):
        code = SAVE_AGAIN.format(source=str(source), target=str(tmp_path / dtype), dtype=dtype)
        run_outside(code, tmp_path, environment)
        for flags in ([], ["--merge"]):
            done = publish(tmp_path / dtype, *flags)
            assert done.returncode == 0, (dtype, done.stderr)

    # ── other weights, calibration or scores ──────────────────────────────────────────────────────
    heads = "heads.safetensors"

    def negate(folder: Path, file: str, chosen: str) -> None:
        stored = load_file(folder / file)
        weights = {name: -weight if name == chosen else weight for name, weight in stored.items()}
        save_file(weights, folder / file, {"format": "pt"})

    def scale(folder: Path) -> None:
        stored = json.loads((folder / "config.json").read_text())
        stored["calibration"]["scales"][0] *= 1.01
        (folder / "config.json").write_text(json.dumps(stored))

    adapter = "adapter/adapter_model.safetensors"
    lora = next(name for name, weight in load_file(checkpoint / adapter).items() if weight.any())
    dense = "encoder.encoder.layer.0.output.dense.weight"
    changes = {
        "heads": (
            checkpoint,
            lambda folder: negate(folder, heads, "weight"),
            "heads.weight differs",
        ),
        "adapter": (checkpoint, lambda folder: negate(folder, adapter, lora), f"{lora} differs"),
        "calibration": (checkpoint, scale, "the taxonomy or the calibration differs"),
        "record": (
            checkpoint,
            lambda folder: (folder / "fingerprint.json").unlink(),
            "fingerprint.json is missing",
        ),
        "merged": (
            merged,
            lambda folder: negate(folder, "model.safetensors", dense),
            f"{dense} differs",
        ),
        "cast": (
            tmp_path / "bfloat16",
            lambda folder: negate(folder, "model.safetensors", "heads.weight"),
            "heads.weight differs",
        ),
    }
    for name, (source, change, problem) in changes.items():
        folder = shutil.copytree(source, tmp_path / name)
        change(folder)
        done = publish(folder)
        assert done.returncode == 2, name
        assert problem in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
    (folder / "metrics.json").unlink()  # the card still has the scores
    assert publish(folder).returncode == 2
    card = ModelCard.load(folder / "README.md")
    card.data.eval_results = None
    (folder / "README.md").write_text(str(card))
    assert publish(folder).returncode == 0


def test_a_dry_run_lists_the_files_and_sends_nothing(hub, checkpoint):
    before = len(hub.requests)
    words = ["--model", checkpoint, "--repo_id", "alice/dry", "--space_id", "alice/dry-space"]
    words += ["--private", "--dry_run"]
    done = run(*words, command="push_to_hub.py", settings=hub.environment(token="hf_alice"))
    assert "model alice/dry, branch main, would be created, private:" in done.stdout
    assert "heads.safetensors" in done.stdout
    assert "space alice/dry-space" in done.stdout
    assert "nothing was published" in done.stdout
    methods = {
        request.method for request in hub.requests[before:] if request.path != "/api/validate-yaml"
    }
    assert methods <= {"GET", "HEAD"}


def test_what_cannot_be_published_is_reported_in_one_line_before_anything_is_sent(
    hub, published, checkpoint, tiny_encoder, tmp_path
):
    whole = hub.write("alice/merged", tmp_path / "whole")

    def changed(
        name: str, file: str, content: bytes | None, source: Path = checkpoint
    ) -> dict[str, str]:
        folder = shutil.copytree(source, tmp_path / name)
        (folder / file).unlink(missing_ok=True)
        if content is not None:
            (folder / file).write_bytes(content)
        return {"--model": str(folder)}

    def linked(name: str, link: str, source: Path = checkpoint) -> dict[str, str]:
        """Return the flag for a copy of a checkpoint with a link to a file or folder elsewhere."""
        folder = shutil.copytree(source, tmp_path / name)
        elsewhere = tmp_path / f"elsewhere-{name}"
        if (folder / link).exists():
            (folder / link).rename(elsewhere)
        else:
            elsewhere.write_text("of a patient")
        (folder / link).parent.mkdir(exist_ok=True)
        (folder / link).symlink_to(elsewhere)
        return {"--model": str(folder)}

    config = json.loads((checkpoint / "config.json").read_text()) | {
        "encoder_name_or_path": tiny_encoder
    }
    index = {
        "metadata": {},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"},
    }
    heads = (checkpoint / "heads.safetensors").read_bytes()
    cases = [
        # the checkpoint and its card
        (
            {**changed("tags", "README.md", b"---\ntags: 5\n---\n"), "--dry_run": None},
            '"tags" must be',
        ),
        (
            changed("shards", "model.safetensors.index.json", json.dumps(index).encode(), whole),
            "model-00001-of-00002.safetensors is missing",
        ),
        (
            changed("local", "config.json", json.dumps(config).encode()),
            "on this machine only: give --merge",
        ),
        (changed("torn", "heads.safetensors", heads[:100]), "heads.safetensors is damaged"),
        (changed("killed", "README.md", None), "README.md is missing"),
        (
            {"--model": tiny_encoder},
            "is not a checkpoint of this project: its config.json is missing or of another",
        ),
        # links
        (
            linked("plot", "plots/z.png"),
            f"plots/z.png is linked to {tmp_path}/elsewhere-plot, outside the checkpoint's",
        ),
        (linked("plots", "plots"), f".png is linked to {tmp_path}/elsewhere-plots/"),
        (linked("onnx", "onnx/model.onnx", whole), "model.onnx is linked to "),
        ({**linked("merge", "onnx/model.onnx"), "--merge": None}, "model.onnx is linked to "),
        (linked("weights", "heads.safetensors"), "heads.safetensors is linked to "),
        # the examples
        ({"--examples": str(CORPUS / "test.csv")}, "test.csv has 150 texts; give 1 to 10"),
        (
            {"--examples": write_csv(tmp_path / "blank.csv", [{"text": " ", "id": 1}])},
            "blank.csv, line 2, column 'text': the text is empty",
        ),
        # the token
        ({"token": None}, "`hf auth login`"),
        (
            {"token": "hf_unknown"},
            "cannot check the token (of HF_TOKEN or the login) on the Hub: the token may not do",
        ),
        ({"token": "hf_reader"}, "the Hub token may only read"),
        # the repository
        ({"--repo_id": "nobody/new"}, "may not write to 'nobody', only to alice"),
        ({"--repo_id": "alice/a..b"}, "cannot read the repository alice/a..b: "),
        ({"--repo_id": "alice/adapter", "--private": None}, "alice/adapter is public already"),
    ]
    before = len(hub.requests)
    for change, message in cases:
        flags = {"--model": checkpoint, "--repo_id": "alice/new", "token": "hf_alice", **change}
        token = flags.pop("token")
        words = [word for pair in flags.items() for word in pair if word is not None]
        done = run(
            *words, command="push_to_hub.py", check=False, settings=hub.environment(token=token)
        )
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
        assert token is None or token not in done.stderr
    methods = {
        request.method for request in hub.requests[before:] if request.path != "/api/validate-yaml"
    }
    assert methods <= {"GET", "HEAD"}


def test_a_checkpoint_in_the_cache_of_the_hub_whose_files_are_links_is_published(hub, published):
    repo = published["adapter"]
    settings = hub.environment(token="hf_alice")
    download = f"huggingface_hub.snapshot_download({repo!r})"
    code = f"import json, huggingface_hub; print(json.dumps({download}))"
    snapshot = Path(run_outside(code, "/", settings))
    assert (snapshot / "heads.safetensors").is_symlink()
    run("--model", snapshot, "--repo_id", "alice/copy", command="push_to_hub.py", settings=settings)
    before = hub.files(repo)
    after = hub.files("alice/copy")
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"README.md"}  # which has the repository's id


def test_a_failed_push_leaves_the_repository_unchanged(hub, checkpoint):
    """Lose the connection at the creation, then at the commit, and repeat the command."""
    for request in ("POST /api/repos/create", "POST /api/models/alice/torn/commit"):
        hub.fail_at(1, request)
    words = ("--model", checkpoint, "--repo_id", "alice/torn")
    settings = hub.environment(token="hf_alice")
    *failed, whole = (
        run(*words, command="push_to_hub.py", check=False, settings=settings) for _ in range(3)
    )
    for done in failed:
        assert done.returncode == 2
        assert "error: alice/torn: the connection failed" in done.stderr
        assert done.stderr.endswith("; run the same command again, which commits nothing twice\n")
    assert [commit.title for commit in hub.commits("alice/torn")] == [
        "initial commit",
        "Publish a checkpoint",
    ]
    assert whole.returncode == 0


# loading

LOG_PROBS = """
import json, torch
from transformers import AutoModel, AutoTokenizer
model = AutoModel.from_pretrained({repo!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({repo!r}, trust_remote_code=True)
rows = []
with torch.no_grad():
    for text in {texts!r}:
        inputs = tokenizer(text, return_tensors="pt", truncation=True)
        rows.append(model(**inputs).node_log_probs[0].float().tolist())
print(json.dumps(rows))
"""


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_a_fresh_process_loads_the_model_in_one_call_and_runs_the_snippets_of_the_card(
    hub, published, expected, tmp_path, closed_port, form
):
    repo = published[form]
    num_requests = len(hub.requests)
    home = tmp_path / "home"
    load = LOG_PROBS.format(repo=repo, texts=TEXTS)
    code = snippets(hub.files(repo)["README.md"].decode())
    own, stock, _, log_probs = run_snippets([*code, load], tmp_path, hub.environment(home))
    result = ast.literal_eval(own)
    (leaf,) = ast.literal_eval(stock)
    assert ("prediction_set" in result) == ("coverage=0.9" in code[0])
    assert leaf == {"label": result["label"], "score": pytest.approx(result["score"], abs=1e-5)}
    torch.testing.assert_close(torch.tensor(json.loads(log_probs)), expected, atol=1e-4, rtol=0)
    requests = [
        request for request in hub.requests[num_requests:] if "base/tiny/resolve/" in request.path
    ]
    paths, downloads = (
        [r.path for r in some] for some in (requests, (r for r in requests if r.method == "GET"))
    )
    assert sum(path.endswith(".safetensors") for path in downloads) == (
        1 if form == "adapter" else 0
    )
    commit = hub.commits("base/tiny")[-2].sha  # the last one came after the training
    assert {path.split("/resolve/")[1].split("/")[0] for path in paths} == (
        {commit} if form == "adapter" else set()
    )
    if form == "adapter":  # after one load, without the Hub
        offline = {
            **hub.environment(home),
            "HF_ENDPOINT": f"http://127.0.0.1:{closed_port}",
            "HF_HUB_OFFLINE": "1",
        }
        found = torch.tensor(run_outside(load, tmp_path, offline))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_an_encoder_without_safetensors_is_loaded_in_4_bits_without_asking_for_a_conversion(
    hub, tiny_encoder, published, expected, tmp_path
):
    """The options of loading hold for the encoder's repository, too."""
    torch.save(load_file(f"{tiny_encoder}/model.safetensors"), tmp_path / "pytorch_model.bin")
    files = {
        name: data for name, data in hub.files("base/tiny").items() if name != "model.safetensors"
    }
    commit = hub.add_repo(
        "base/bin", {**files, "pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()}
    )
    files = hub.files("alice/adapter")
    config = json.loads(files["config.json"]) | {
        "encoder_name_or_path": "base/bin",
        "encoder_revision": commit,
    }
    hub.add_repo("alice/over-bin", {**files, "config.json": json.dumps(config).encode()})
    num_requests = len(hub.requests)
    code = f"""
import json, os
from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig
options = {{"cache_dir": "elsewhere", "token": "hf_alice", "trust_remote_code": True}}
bits = BitsAndBytesConfig(load_in_4bit=True)
quantized = options | dict(device_map="auto", quantization_config=bits)
model = AutoModel.from_pretrained("alice/over-bin", **quantized)
tokenizer = AutoTokenizer.from_pretrained("alice/over-bin", **options)
inputs = tokenizer({TEXTS[0]!r}, return_tensors="pt", truncation=True)
log_probs = model(**inputs).node_log_probs[0].tolist()
linear = type(model.encoder.encoder.layer[0].intermediate.dense).__name__
print(json.dumps([linear, log_probs, os.listdir("elsewhere")]))
"""
    linear, log_probs, cached = run_outside(code, tmp_path, hub.environment(tmp_path / "home"))
    torch.testing.assert_close(torch.tensor(log_probs), expected[0], atol=0.5, rtol=0)
    assert linear == "Linear4bit"
    assert {*cached} >= {"models--alice--over-bin", "models--base--bin"}
    assert not [
        request.path for request in hub.requests[num_requests:] if "discussions" in request.path
    ]


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


def test_a_fresh_process_predicts_with_a_multi_label_model(hub, tmp_path):
    """Predict by `AutoModel`, by both pipelines, and by the snippets of the card, over HTTP from an
    empty cache.

    The model has label attention, and the last push of its training has published it.
    """
    repo = "alice/sets"
    output = tmp_path / "results"
    flags = [
        "--push_to_hub",
        "true",
        "--hub_model_id",
        repo,
        "--hub_strategy",
        "end",
        "--save_strategy",
        "no",
    ]
    flags += ["--pooling", "label_attention", "--heads_learning_rate", "0.1"]
    train_label_sets("base/tiny", output, *flags, settings=hub.environment(token="hf_alice"))
    expected_probabilities = by_hand(hub, output).exp().numpy()
    assert [commit.title for commit in hub.commits(repo)] == ["initial commit", "End of training"]
    plots = ("f1_by_frequency", "reliability_diagram")
    shared = {name for name in ADAPTER_REPOSITORY if not name.startswith("plots/")}
    assert hub.files(repo).keys() == shared | {f"plots/{name}.png" for name in plots}
    code = f"""
import json
from transformers import AutoModel, AutoTokenizer, pipeline
model = AutoModel.from_pretrained({repo!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({repo!r}, trust_remote_code=True)
logits = model(**tokenizer({TEXTS!r}, padding=True, return_tensors="pt")).logits
own = pipeline("hierarchical-text-classification", model={repo!r}, trust_remote_code=True)
stock = pipeline("text-classification", model={repo!r}, trust_remote_code=True, top_k=None)
results = own({TEXTS!r}, levels=True)
print(json.dumps([logits.sigmoid().tolist(), results, stock({TEXTS!r}, truncation=True)]))
"""
    shown = snippets(hub.files(repo)["README.md"].decode())
    results, *printed = run_snippets([code, *shown], tmp_path, hub.environment(tmp_path / "home"))
    model, own, stock = json.loads(results)
    labels = HierarchicalConfig.from_pretrained(output).tree.labels
    np.testing.assert_allclose(model, expected_probabilities, atol=1e-4)
    for expected, result, flat in zip(expected_probabilities, own, stock, strict=True):
        nodes = {label: score for level in result["levels"] for label, score in level.items()}
        assert nodes == pytest.approx(dict(zip(labels, expected.tolist(), strict=True)), abs=1e-4)
        assert {one["label"]: one["score"] for one in flat} == pytest.approx(nodes, abs=1e-4)
    result = ast.literal_eval(printed[0])
    predicted, held = (
        {one["label"]: one["score"] for one in result[name]}
        for name in ("labels", "prediction_set")
    )
    flat = ast.literal_eval(printed[1])
    (flat,) = flat if isinstance(flat[0], list) else (flat,)
    scores = {one["label"]: one["score"] for one in flat}
    assert predicted == pytest.approx({label: scores[label] for label in predicted}, abs=1e-5)
    assert [*held] == [one["label"] for one in flat[: len(held)]]  # the most probable nodes


# continuing and scoring


def test_a_published_checkpoint_is_scored_as_the_folder_was(hub, published, checkpoint, tmp_path):
    """Score the requested commit, although the branch has changed."""
    repo = "alice/scored"
    commit = hub.add_repo(repo, hub.files(published["adapter"]))
    hub.add_repo(repo, {"config.json": b"{}"})
    num_requests = len(hub.requests)
    line = ["--model_name_or_path", repo, "--model_revision", commit, "--do_train", "false"]
    line += ["--test_file", checkpoint.parent / "test.csv", "--output_dir", tmp_path / "scores"]
    done = run(*line, settings=hub.environment())
    assert f"checkpoint: {repo} at {commit}" in done.stderr
    scored, before = (
        json.loads((folder / "metrics.json").read_text())
        for folder in (tmp_path / "scores", checkpoint)
    )
    for name in ("accuracy", "macro_f1", "log_loss", "ece", "set_coverage"):
        assert scored[f"test_{name}"] == pytest.approx(before[f"test_{name}"], abs=1e-5), name
    paths = [
        request.path
        for request in hub.requests[num_requests:]
        if f"{repo}/resolve/" in request.path
    ]
    assert {path.split("/resolve/")[1].split("/")[0] for path in paths} == {commit}
    assert not any(path.endswith((".png", "README.md")) for path in paths)
    report = json.loads((tmp_path / "scores" / "data_report.json").read_text())
    # the training texts are not published
    assert report["trained_before"]["scores"] == "unverified"


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
    words = ("--model", "alice/pinned", "--input", "in.csv", "--dtype", "fp32", "--probabilities")
    words += ("--output_format", "jsonl", "--revision")
    found = []
    for revision, commit in ((first, first), ("main", second)):
        line = (*words, revision, "--output", f"{revision}/")
        run(*line, command="predict.py", cwd=tmp_path, settings=hub.environment())
        manifest = json.loads((tmp_path / revision / "manifest.json").read_text())
        assert (manifest["model"], manifest["commit"]) == ("alice/pinned", commit)
        lines = (tmp_path / revision / "part-00000.jsonl").read_text().splitlines()
        found.append([[*json.loads(line)["probabilities"].values()] for line in lines])
    leaves = expected[:, :5].exp()
    torch.testing.assert_close(torch.tensor(found[0]), leaves, atol=1e-4, rtol=0)
    assert (torch.tensor(found[1]) - leaves).abs().max() > 0.01


def test_a_published_checkpoint_is_continued_over_its_own_encoder(
    hub, published, checkpoint, tmp_path
):
    num_requests = len(hub.requests)
    output = tmp_path / "results"
    rows = write_csv(tmp_path / "more.csv", read_csv(CORPUS / "train.csv")[48:80])
    line = [
        "--train_file",
        rows,
        "--max_steps",
        2,
        "--save_strategy",
        "no",
        "--load_best_model_at_end",
        "false",
    ]
    line += [
        "--validation_size",
        0,
        "--model_name_or_path",
        published["adapter"],
        "--output_dir",
        output,
    ]
    run(*line, settings=hub.environment())
    for name in ("heads.safetensors", "adapter/adapter_model.safetensors"):
        assert (output / name).read_bytes() != (checkpoint / name).read_bytes()
    config = json.loads((output / "config.json").read_text())
    commit = hub.commits("base/tiny")[-2].sha
    assert (config["encoder_name_or_path"], config["encoder_revision"]) == ("base/tiny", commit)
    paths = [request.path for request in hub.requests[num_requests:] if "base/tiny" in request.path]
    assert [path for path in paths if "main" in path] == []  # the encoder is read at its commit


def test_a_checkpoint_that_cannot_be_downloaded_is_one_line(hub, published, tmp_path):
    hub.add_repo("alice/half", hub.files(published["adapter"]))
    hub.fail_at(1, match="HEAD /alice/half/resolve/.*adapter_model", how="403")
    line = [
        "--model_name_or_path",
        "alice/half",
        "--train_file",
        CORPUS / "train.csv",
        "--output_dir",
        tmp_path / "no",
    ]
    done = run(*line, check=False, settings=hub.environment())
    assert done.returncode == 2
    assert "cannot download the checkpoint alice/half at " in done.stderr.splitlines()[-1]


# pushing while training


def test_training_pushes_whole_checkpoints(hub, checkpoint):
    steps = sorted(int(folder.name.split("-")[1]) for folder in checkpoint.glob("checkpoint-*"))
    commits = hub.commits("alice/trained")[1:]
    assert len(steps) == 2
    during = [f"Training in progress, step {step}" for step in steps]
    assert [commit.title for commit in commits] == [*during, "End of training"]
    for commit in commits[:-1]:  # without scores
        plots = {name for name in ADAPTER_REPOSITORY if name.startswith("plots/")}
        assert commit.files.keys() == ADAPTER_REPOSITORY - plots - {
            "metrics.json",
            "fingerprint.json",
        }
        assert "Training is not finished." in commit.files["README.md"].decode()
    files = hub.files("alice/trained")
    assert files.keys() == ADAPTER_REPOSITORY
    for name in (
        "README.md",
        "heads.safetensors",
        "adapter/adapter_model.safetensors",
        "config.json",
        "metrics.json",
    ):
        assert files[name] == (checkpoint / name).read_bytes()
    # the last commit is of the calibrated model
    assert json.loads(files["config.json"])["calibration"]["scales"]
    known = json.loads((checkpoint / "trained_texts.json").read_text())["this_run"]
    for commit in commits:
        for name, content in commit.files.items():
            assert not any(
                secret.encode() in content
                for secret in (known[0], "hf_alice", str(checkpoint.parent))
            ), name


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
    words = [
        *training_words(encoder, tmp_path, tmp_path / "results"),
        "--push_to_hub",
        "true",
        "--hub_model_id",
        repo,
    ]
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
    examples = ["A first example.", "Another one, of Sjögren's syndrome."]
    (tmp_path / "examples.txt").write_text("\n".join(examples), encoding="cp1252")
    words = ["--model", checkpoint, "--repo_id", "alice/served", "--space_id", "alice/served-space"]
    words += ["--examples", tmp_path / "examples.txt", "--encoding", "cp1252"]
    done = run(*words, command="push_to_hub.py", settings=environment)
    assert "alice/served-space: http" in done.stdout
    assert len(hub.commits("alice/served")) == 2
    files = hub.files("alice/served-space", repo_type="space")
    ours = {file.name for file in (ROOT / "space").iterdir() if file.is_file()}
    assert files.keys() >= {".gitattributes", "taxonomy_hierarchical.py", *ours}
    assert len(hub.commits("alice/served-space", repo_type="space")) == 2
    space = hub.repos["spaces", "alice/served-space"]
    variables = {name: variable["value"] for name, variable in space.variables.items()}
    assert variables == {
        "MODEL_ID": "alice/served",
        "MODEL_REVISION": hub.commits("alice/served")[-1].sha,
    }
    page = json.loads((checkpoint / "config.json").read_text())["page"]
    data = RepoCard(files["README.md"].decode()).data
    assert (data.models, data.sdk, data.title) == (["alice/served"], "gradio", page["title"])
    assert json.loads(hub.files("alice/served")["config.json"])["page"] == {
        **page,
        "examples": examples,
    }
    card = hub.files("alice/served")["README.md"].decode()
    assert all(f"- text: {text}\n" in card for text in examples)

    hub.fail_at(1, match="POST /api/spaces/alice/served-space/variables", how="500")
    done = run(*words, command="push_to_hub.py", check=False, settings=environment)
    assert done.returncode == 2
    assert (
        "alice/served-space is published, but not pointed at the model"
        in done.stderr.splitlines()[-1]
    )

    hosted = hub.write("alice/served-space", tmp_path / "space", repo_type="space")
    shown = hub.environment(tmp_path / "space-home") | variables
    with SpaceServer(None, tmp_path, hosted / "app.py", shown) as server:
        assert all(text in server.http.get("/config").text for text in examples)
        client = Client(server.address, verbose=False)
        found = client.predict(TEXTS[0], levels=True, api_name="/classify")
        first = client.predict(examples[0], api_name="/classify")
    assert f'classify("{examples[0]}"' in card
    assert f"labels: [{ {'label': first['label'], 'score': round(first['score'], 2)} }]\n" in card
    assert found["path"][0]["label"] in ("general pathological conditions", "specific disease")
    assert sum(found["levels"][0].values()) == pytest.approx(1, abs=1e-5)
