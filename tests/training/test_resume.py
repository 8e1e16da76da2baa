"""Test that an interrupted run resumes, and ends with the result of an uninterrupted one."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from conftest import (
    CORPUS,
    DIVERGES,
    ROOT,
    STRIKE,
    complete,
    first_rows,
    read_csv,
    run,
    same_weights,
    started,
    write_csv,
)

import push_to_hub
import train
from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.training.resume import (
    find_checkpoint,
    find_resume_problem,
    list_checkpoints,
)


@pytest.fixture(scope="module")
def words(tiny_encoder, tmp_path_factory) -> list[str]:
    """Return the flags of a run of 10 steps that saves every second step."""
    given = [ROOT / "recipes" / "quickstart.yaml", "--model_name_or_path", tiny_encoder]
    given += first_rows("corpus", tmp_path_factory.mktemp("data"), 64, 16, 16)
    given += ["--max_steps", 10, "--per_device_train_batch_size", 4, "--consistency", 1]
    for name in ("save", "eval"):
        given += [f"--{name}_strategy", "steps", f"--{name}_steps", 2]
    given += ["--load_best_model_at_end", "false"]  # all steps count
    return list(map(str, given))


@pytest.fixture(scope="module")
def unbroken(words, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("unbroken") / "results"
    run(*words, "--output_dir", output)
    return output


@pytest.fixture
def run_folder(unbroken, tmp_path) -> Path:
    """Copy the finished run, for tests that change it."""
    return shutil.copytree(unbroken, tmp_path / "results")


def refused(message: str, *words: object) -> str:
    """Return the message with which train.py refuses flags, after checking that ``message`` occurs
    in it.
    """
    with pytest.raises(InputError) as error:
        train.main(list(map(str, words)))
    assert message in str(error.value)
    return str(error.value)


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_in_the_same_folder_is_refused_and_writes_nothing(words, unbroken, tmp_path):
    """Start the second run while the first one is stopped.

    A third one continues what the first, which is killed, has left.
    """
    output = tmp_path / "results"
    line = [*words, "--output_dir", output]
    with started(
        *line, log=tmp_path / "log", until=output / "checkpoint-2" / "trainer_state.json"
    ) as first:
        first.send_signal(signal.SIGSTOP)
        before = content(output)
        for more in (
            ["--overwrite_output_dir", "true", "--seed", 7],
            ["--resume_from_checkpoint", "auto"],
        ):
            message = f"--output_dir {output}: another process is writing it; give another name"
            assert refused(message, *line, *more) == message
        assert content(output) == before
    run(*line, "--resume_from_checkpoint", "auto")
    assert same_weights(unbroken, output)
    assert not [*output.glob("*.lock"), *output.glob(".*")]


def test_a_run_killed_several_times_ends_with_the_weights_of_an_uninterrupted_run(
    words, unbroken, tmp_path
):
    output = tmp_path / "results"
    line = [*words, "--output_dir", output, "--resume_from_checkpoint", "auto"]
    for moment in (
        ("os.mkdir", "checkpoint-2/adapter"),  # two steps are taken, and nothing of them is saved
        ("open", "checkpoint-4/trainer_state.json"),  # all but this is
        ("shutil.rmtree", "checkpoint-4"),  # three checkpoints are complete
        ("os.rename", "results/metrics.json"),  # the model is saved and calibrated
    ):
        done = complete("-c", STRIKE, ROOT / "train.py", *moment, int(signal.SIGKILL), *line)
        assert done.returncode == -signal.SIGKILL, done.stderr[-4000:]
    run(*line)
    assert same_weights(unbroken, output)


def test_a_run_that_was_killed_after_its_last_step_takes_none_more(words, unbroken, tmp_path):
    output = tmp_path / "results"
    last = list_checkpoints(unbroken)[-1]
    shutil.copytree(last, output / last.name)
    done = run(*words, "--output_dir", output, "--resume_from_checkpoint", "auto")
    assert "nothing left to train" in done.stderr
    assert same_weights(unbroken, output)
    before, after = (
        json.loads((folder / "metrics.json").read_text()) for folder in (unbroken, output)
    )
    assert (after["test_log_loss"], after["epoch"]) == (before["test_log_loss"], before["epoch"])
    assert after["resumed_from_step"] == 10


def test_overwriting_deletes_the_checkpoints_and_results_of_the_former_run_and_keeps_its_card(
    words, run_folder
):
    own = (
        "notes.txt",
        "checkpoint-best/heads.safetensors",
        "mine.csv",
        "plots/mine.png",
        "plots/mine.svg",
    )
    kept = {run_folder / name for name in own}
    old_plot = "plots/confusion_matrix_level_9.png"  # of a deeper taxonomy
    gone = {run_folder / name for name in (old_plot, "test_predictions.csv", "metrics.json")}
    for path in kept | gone:
        path.parent.mkdir(exist_ok=True)
        path.write_text("of the former run")
    before = list_checkpoints(run_folder)
    line = [*words, "--output_dir", run_folder, "--overwrite_output_dir", "true"]
    run(*line, "--resume_from_checkpoint", "auto", "--do_train", "true", "--do_eval", "false")
    assert list_checkpoints(run_folder) == before
    assert all(
        path.exists() for path in (kept | gone) - {run_folder / old_plot}
    )  # it goes on, and writes its scores again
    card = run_folder / "README.md"
    card.write_text(edited := card.read_text() + "\nOur data\n")
    refused("lower --learning_rate", *line, *DIVERGES)
    assert not card.exists()
    assert edited in [former.read_text() for former in run_folder.glob("README.previous-*.md")]
    assert list_checkpoints(run_folder) == []
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in gone)
    assert not (run_folder / "test_predictions.csv").exists()


RESUME = ("--resume_from_checkpoint", "auto")
OVERWRITE = ("--overwrite_output_dir", "true")
SCORE = ("--do_train", "false", "--do_predict", "--model_name_or_path", "{output}", *OVERWRITE)
HOLDS_A_RUN = "--output_dir {output} already holds a run: give another --output_dir"
STATES = {  # of a run, by what is in its folder
    "finished": ("*",),
    "without checkpoints": ("config.json", "metrics.json"),
    "killed": ("checkpoint-10",),
}


@pytest.mark.parametrize(
    ("state", "flags", "message"),
    [
        (
            "finished",
            (),
            f"{HOLDS_A_RUN}, or --overwrite_output_dir true, or --resume_from_checkpoint auto",
        ),
        ("finished", SCORE, HOLDS_A_RUN),
        (
            "finished",
            (*OVERWRITE, "--model_name_or_path", "{last}"),
            "--overwrite_output_dir true would delete {last}",
        ),
        (
            "finished",
            (*OVERWRITE, "--report_to", "nothing_of_the_kind"),
            "nothing_of_the_kind is not supported",
        ),
        ("without checkpoints", RESUME, f"{HOLDS_A_RUN}, or --overwrite_output_dir true"),
        (
            "killed",
            (),
            f"{HOLDS_A_RUN}, or --overwrite_output_dir true, or --resume_from_checkpoint auto",
        ),
    ],
)
def test_a_refused_command_changes_no_file_of_the_former_run(
    words, unbroken, tmp_path, state, flags, message
):
    output = tmp_path / "results"
    output.mkdir()
    for path in (path for pattern in STATES[state] for path in unbroken.glob(pattern)):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, output / path.name)
    before = content(output)
    names = {"output": str(output), "last": str(output / "checkpoint-10")}
    line = [*words, "--output_dir", output, *(flag.format_map(names) for flag in flags)]
    assert message.format_map(names) in refused("", *line)
    assert content(output) == before


def test_a_run_interrupted_before_its_first_checkpoint_starts_again(words, unbroken, tmp_path):
    """Resume a run that has left a data report and an incomplete checkpoint."""
    output = tmp_path / "results"
    (output / "checkpoint-2").mkdir(parents=True)
    shutil.copy(unbroken / "data_report.json", output)
    refused(HOLDS_A_RUN.format(output=output), *words, "--output_dir", output)
    run(*words, "--output_dir", output, "--max_steps", 2, *RESUME)
    assert find_checkpoint("auto", str(output)) == str(output / "checkpoint-2")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--pooling", "cls"],
            "it was trained with another --pooling, mean, not cls; give the same, or --overwrite",
        ),
        (["--tuning", "full"], "it was trained with another --tuning, lora, not full"),
        (["--lora_r", "4"], "it was trained with another --lora_r, 16, not 4"),
        (
            ["--model_name_or_path", "{other}"],
            "it was trained with another --model_name_or_path, encoder",
        ),
        (
            ["--problem_type", "multi_label_classification"],
            "it was trained with another --problem_type, single_label",
        ),
        # otherwise more or fewer epochs would be trained, and metrics.json would not show it
        (
            ["--per_device_train_batch_size", "2"],
            "16 steps per epoch, and now there are 32: give the same number",
        ),
        (
            ["--heads_learning_rate", "1e-3"],
            "its optimizer does not match the settings of this run: ",
        ),
        (
            ["--optim", "adafactor"],
            "its optimizer does not match the settings of this run: --optim differs",
        ),
        (["--train_file", "{rows}"], "it was trained on other rows or labels; give the same data"),
        (
            ["--class_names", "{swapped}"],
            "it was trained on other rows or labels; give the same data, columns, names",
        ),
        (
            ["--taxonomy", "{tree}"],
            "it has another taxonomy, or another order of classes; give the same --taxonomy",
        ),
    ],
)
def test_a_run_is_not_resumed_with_other_settings_or_data(
    words, run_folder, tiny_encoder, tmp_path, flags, message
):
    shutil.copytree(tiny_encoder, tmp_path / "other")
    line = [
        *words,
        "--output_dir",
        run_folder,
        "--resume_from_checkpoint",
        "auto",
        "--max_steps",
        14,
    ]
    file = write_csv(tmp_path / "rows.csv", read_csv(CORPUS / "validation.csv")[16:32])
    names = sorted({row["label"] for row in read_csv(CORPUS / "train.csv")})
    swapped = json.dumps(dict(zip(names, names[1:] + names[:1], strict=True)))
    tree = tmp_path / "taxonomy.json"
    tree.write_text(
        json.dumps(yaml.safe_load((ROOT / "examples" / "taxonomy.yaml").read_text())[::-1])
    )
    line += [
        flag.format(other=tmp_path / "other", rows=file, swapped=swapped, tree=tree)
        for flag in flags
    ]
    if "another taxonomy" in message:
        (run_folder / "data_report.json").unlink()  # as of a run that was downloaded
    before = {path: path.read_bytes() for path in run_folder.glob("*") if path.is_file()}
    refused(message, *line)
    kept = {"config.json", "heads.safetensors", "metrics.json", "README.md", "data_report.json"}
    assert all(
        path.read_bytes() == content for path, content in before.items() if path.name in kept
    )


def test_a_resumed_run_takes_the_learning_rate_weight_decay_and_steps_that_it_is_given(
    words, run_folder
):
    """Kill the run first when its model is saved and not yet described: it cannot be published
    then.
    """
    line = [
        *words,
        "--output_dir",
        run_folder,
        "--resume_from_checkpoint",
        "auto",
        "--max_steps",
        14,
    ]
    # its rows are given, and stay the same
    line += ["--learning_rate", 3e-5, "--weight_decay", 0.5, "--seed", 5, "--save_steps", 3]
    moment = ("open", "validation_predictions.csv", int(signal.SIGKILL))
    done = complete("-c", STRIKE, ROOT / "train.py", *moment, *line)
    assert done.returncode == -signal.SIGKILL, done.stderr[-4000:]
    with pytest.raises(InputError, match=r"is not a complete checkpoint: README\.md is missing"):
        push_to_hub.main(["--model", str(run_folder), "--repo_id", "alice/killed", "--dry_run"])
    run(*line)
    before, last = list_checkpoints(run_folder)
    assert (before.name, last.name) == ("checkpoint-12", "checkpoint-14")
    scheduler = torch.load(last / "scheduler.pt", weights_only=True)
    groups = torch.load(last / "optimizer.pt", weights_only=True)["param_groups"]
    assert scheduler["last_epoch"] == 14
    assert {group["initial_lr"] for group in groups} == set(scheduler["base_lrs"]) == {3e-5}
    assert max(group["lr"] for group in groups) < 3e-5
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}


def test_the_best_checkpoint_is_found_where_the_run_was_moved(words, tmp_path):
    line = [*words, "--load_best_model_at_end", "true", "--max_steps", 4]
    # the first is the best, since none is better
    line += ["--learning_rate", "1e-30", "--early_stopping_patience", 0]
    run(*line, "--output_dir", tmp_path / "there")
    (tmp_path / "there").rename(tmp_path / "here")
    line += ["--output_dir", tmp_path / "here", "--resume_from_checkpoint", "auto"]
    best = list_checkpoints(tmp_path / "here")[0]
    assert best.name == "checkpoint-2"
    assert f"loading adapter and heads from {best}" in run(*line).stderr
    message = "--metric_for_best_model log_loss did not select its best checkpoint; give the same"
    refused(message, *line, "--metric_for_best_model", "log_loss")
    shutil.rmtree(best)
    refused(f"the best checkpoint of its run, {best.name}, is not in the same folder", *line)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "trainer_state.json").unlink(),
            "it is incomplete: trainer_state.json is missing",
        ),
        (lambda folder: cut(folder / "trainer_state.json"), "trainer_state.json cannot be read"),
        (
            lambda folder: cut(folder / "adapter/adapter_model.safetensors"),
            "adapter/adapter_model.safetensors is damaged",
        ),
        (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer* is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_skipped(run_folder, caplog, damage, message):
    earlier, last = list_checkpoints(run_folder)
    assert find_checkpoint("auto", str(run_folder)) == str(last)
    damage(last)
    with caplog.at_level("INFO"):
        assert find_checkpoint("auto", str(run_folder)) == str(earlier)
    assert f"skipped {last}: {message}" in caplog.text


def test_a_full_disk_keeps_the_last_checkpoint_and_says_what_to_do(words, unbroken, small_disk):
    disk = small_disk("4m")
    output = disk / "results"
    line = [*words, "--output_dir", output, "--save_total_limit", 20]
    done = run(*line, check=False)
    assert done.returncode == 2, done.stderr[-3000:]
    message = done.stderr.splitlines()[-1]
    assert message.startswith("train.py: error: ")
    assert message.endswith("make room, then --resume_from_checkpoint auto resumes")
    found = [folder for folder in list_checkpoints(output) if find_resume_problem(folder) is None]
    assert found
    assert find_checkpoint("auto", str(output)) == str(found[-1])
    for folder in found[:-1]:
        shutil.rmtree(folder)
    subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True, capture_output=True)
    run(*line, "--resume_from_checkpoint", "auto")
    assert same_weights(unbroken, output)
