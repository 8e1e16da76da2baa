"""A checkpoint's test of itself: what a release of transformers might break is one line wherever
texts are classified.
"""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import copy_checkpoint, run, run_outside, write_csv
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, pipeline

TEXT = "Colonoscopy of the bowel"


COMPUTE = """
import json, torch
from transformers import AutoModel
model = AutoModel.from_pretrained({!r}, trust_remote_code=True)
stored = model.config.self_test
with torch.inference_mode():
    log_probs = model(input_ids=torch.tensor([stored["input_ids"]])).node_log_probs[0]
print(json.dumps(dict(stored=stored["log_probs"], log_probs=log_probs.tolist())))
"""


# ── Damage that loads without an error ────────────────────────────────────────────────────────────


def change_json(file: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def change_weights(file: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    weights = {name: change(name, weight) for name, weight in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})


def draw_heads(folder: Path) -> None:
    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        return torch.randn_like(weight) if name == "weight" else weight

    change_weights(folder / "heads.safetensors", change)


def lose_adapter(folder: Path) -> None:
    change_weights(
        folder / "adapter" / "adapter_model.safetensors", lambda name, weight: 0 * weight
    )


def swap_tokens(folder: Path) -> None:
    def change(content: dict) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["colonoscopy"], vocabulary["headache"] = (
            vocabulary["headache"],
            vocabulary["colonoscopy"],
        )

    change_json(folder / "tokenizer.json", change)


def change_activation(folder: Path) -> None:
    change_json(
        folder / "config.json", lambda content: content["text_config"].update(hidden_act="relu")
    )


DAMAGE = {
    "random heads": (draw_heads, "a log-probability of its self-test differs by"),
    "a missing adapter": (lose_adapter, "a log-probability of its self-test differs by"),
    "another tokenizer": (
        swap_tokens,
        "its tokenizer splits the text of the self-test into other tokens",
    ),
    "another activation": (change_activation, "a log-probability of its self-test differs by"),
}


@pytest.fixture(scope="module")
def tested(tmp_path_factory) -> Path:
    """Write a checkpoint in the adapter form that tests itself, as if another release of
    transformers had saved it.
    """
    folder = tmp_path_factory.mktemp("tested")
    shutil.copytree(Path(__file__).parent / "checkpoint" / "encoder", folder / "encoder")
    source = copy_checkpoint("adapter_form", folder / "source")
    change_json(
        source / "config.json",
        lambda content: content.update(encoder_name_or_path=str(folder / "encoder")),
    )
    model = AutoModel.from_pretrained(source, trust_remote_code=True, merge_adapter=False)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model.record_self_test(tokenizer)
    model.config.self_test["transformers"] = "5.0.0"
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def classify(folder: Path):
    return pipeline("hierarchical-text-classification", model=str(folder), trust_remote_code=True)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_that_loads_is_an_error_of_the_pipeline_and_of_predict(damage, tested, tmp_path):
    change, problem = DAMAGE[damage]
    folder = shutil.copytree(tested, tmp_path / "model")
    assert classify(folder)(TEXT)["labels"]
    change(folder)
    AutoModel.from_pretrained(folder, trust_remote_code=True)  # does not test itself
    with pytest.raises(ValueError, match=problem):
        classify(folder)

    texts = write_csv(tmp_path / "texts.csv", [{"text": TEXT}])
    words = ("--input", texts, "--output", tmp_path / "out.csv", "--dtype", "fp32")
    done = run("--model", folder, *words, command="predict.py", check=False)
    assert done.returncode == 2
    assert problem in done.stderr.splitlines()[-1]
    assert "transformers 5.0.0" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.csv").exists()


def test_damage_is_an_error_of_the_page_of_scoring_and_of_merging(tested, hub, tmp_path):
    folder = shutil.copytree(tested, tmp_path / "model")
    (folder / "README.md").write_text("A card")
    draw_heads(folder)
    rows = write_csv(tmp_path / "test.csv", [{"text": TEXT, "label": "digestive"}])
    score = ("--model_name_or_path", folder, "--test_file", rows, "--do_train", "false")
    merge = ("--model", folder, "--repo_id", "alice/damaged", "--merge", "--dry_run")
    for done in (
        run("--model", folder, command="space/app.py", check=False),
        run(*score, "--output_dir", tmp_path / "scores", check=False),
        run(
            *merge,
            command="push_to_hub.py",
            check=False,
            settings=hub.environment(token="hf_alice"),
        ),
    ):
        assert done.returncode == 2, done.stderr
        assert "self-test differs by" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_it_is_computed_again_at_each_calibration_change_of_taxonomy_and_merge(
    tested, hub, tmp_path
):
    """Compare what is stored with the log-probabilities of the saved model."""

    def check(model) -> None:
        model.save_pretrained(tmp_path / "changed")
        loaded = AutoModel.from_pretrained(tmp_path / "changed", trust_remote_code=True).eval()
        stored = loaded.config.self_test
        with torch.inference_mode():
            log_probs = loaded(input_ids=torch.tensor([stored["input_ids"]])).node_log_probs[0]
        assert stored["log_probs"] == pytest.approx(log_probs.tolist(), abs=1e-4)
        assert stored["transformers"] == transformers.__version__

    model = AutoModel.from_pretrained(tested, trust_remote_code=True)
    earlier = model.config.self_test["log_probs"]
    calibration = copy.deepcopy(model.config.calibration)
    calibration.scales = [2 * scale for scale in calibration.scales]
    calibration.lexical_weight = None
    model.set_calibration(calibration)
    assert model.config.self_test["log_probs"] != earlier
    check(model)
    model.add_nodes(
        [
            "general",
            {"specific": [{"neoplasms": ["carcinoma", "lymphoma", "sarcoma"]}, "digestive"]},
        ]
    )
    assert len(model.config.self_test["log_probs"]) == model.config.tree.num_nodes
    check(model)

    folder = shutil.copytree(tested, tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA card")
    words = ("--model", folder, "--repo_id", "alice/tested", "--merge")
    run(*words, command="push_to_hub.py", settings=hub.environment(token="hf_alice"))
    merged = AutoModel.from_pretrained(
        hub.write("alice/tested", tmp_path / "merged"), trust_remote_code=True
    )
    assert merged.config.self_test["transformers"] == transformers.__version__
    assert merged.config.self_test["log_probs"] == pytest.approx(earlier, abs=1e-4)


def test_train_stores_the_test_of_the_checkpoint_that_it_saves(
    clear_checkpoint, uncalibrated_run, tmp_path
):
    for folder in (clear_checkpoint, uncalibrated_run[0]):
        found = run_outside(COMPUTE.format(str(folder)), tmp_path)
        assert found["stored"] == pytest.approx(found["log_probs"], abs=1e-4)


def test_versions_that_saved_a_checkpoint_load_it_without_the_test(tested, tmp_path):
    folder = shutil.copytree(tested, tmp_path / "model")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model.record_self_test()
    change_json(
        folder / "config.json", lambda content: content.update(self_test=model.config.self_test)
    )
    draw_heads(folder)
    assert classify(folder)(TEXT)["labels"]
