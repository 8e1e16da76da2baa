"""Test ``--refit``: a second model is trained on all rows but the test rows, with the epochs and calibration of the first."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    CORPUS,
    ROOT,
    clear_rows,
    complete,
    interrupt,
    read_csv,
    run,
    same_weights,
    train_label_sets,
    write_csv,
)
from labelled_files import csv_file, load
from safetensors.torch import load_file
from transformers import AutoTokenizer, pipeline

import train
from errors import InputError
from training import resume
from training.splits import train_on_validation_rows
from training.trained_texts import normalise_text, text_hash

FITTED = ("temperatures", "conformal_thresholds", "conformal_max_length", "lexical_weight")


@pytest.fixture(scope="module")
def words(tiny_encoder, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    given = ["--model_name_or_path", tiny_encoder]
    for offset, split in enumerate(("train", "validation", "test"), start=1):
        given += [f"--{split}_file", write_csv(folder / f"{split}.csv", clear_rows(offset))]
    given += ["--num_train_epochs", 3, "--early_stopping_patience", 0, "--refit"]
    return list(map(str, given))


@pytest.fixture(scope="module")
def refitted(words, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("refitted") / "results"
    run(*words, "--label_issues", "--output_dir", output)
    return output


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def hashes(words: list[str], *splits: str) -> set[str]:
    files = [words[words.index(f"--{split}_file") + 1] for split in splits]
    return {text_hash(normalise_text(row["text"])) for file in files for row in read_csv(file)}


def test_the_second_model_is_trained_on_the_validation_rows_too_for_the_best_epochs(words, refitted):
    chosen, final = read(refitted / "selection" / "metrics.json"), read(refitted / "metrics.json")
    states = [*(refitted / "selection").glob("checkpoint-*/trainer_state.json")]
    last = read(max(states, key=lambda file: int(file.parent.name.removeprefix("checkpoint-"))))
    best = max((entry for entry in last["log_history"] if "eval_macro_f1" in entry), key=lambda e: e["eval_macro_f1"])
    assert chosen["best_epoch"] == best["epoch"] == final["epoch"]
    assert set(read(refitted / "selection" / "trained_texts.json")["this_run"]) == hashes(words, "train")
    assert set(read(refitted / "trained_texts.json")["this_run"]) == hashes(words, "train", "validation")
    weights = [load_file(folder / "heads.safetensors")["weight"] for folder in (refitted / "selection", refitted)]
    assert not weights[0].equal(weights[1])


def test_it_has_the_calibration_of_the_first_one_and_a_lexical_head_of_all_rows(words, refitted):
    chosen, final = (read(folder / "config.json") for folder in (refitted / "selection", refitted))
    assert {name: final[name] for name in FITTED} == {name: chosen[name] for name in FITTED}
    assert final["lexical_weight"] > 0
    tokenizer = AutoTokenizer.from_pretrained(refitted)
    for folder, splits in ((refitted / "selection", ("train",)), (refitted, ("train", "validation"))):
        texts = [row["text"] for split in splits for row in read_csv(words[words.index(f"--{split}_file") + 1])]
        documents = np.zeros(len(tokenizer))
        for ids in tokenizer(texts, truncation=True)["input_ids"]:
            documents[[*set(ids)]] += 1
        stored = load_file(folder / "heads.safetensors")["lexical.idf"].numpy()
        assert ((stored != 0) == (documents >= 2)).all()  # a token in one document is ignored


def test_its_scores_are_those_of_what_it_predicts(words, refitted):
    classify = pipeline("hierarchical-text-classification", model=str(refitted), trust_remote_code=True, device="cpu")
    rows = read_csv(words[words.index("--test_file") + 1])
    results = classify([row["text"] for row in rows], coverage=0.9)
    metrics, tree = read(refitted / "metrics.json"), classify.model.config.tree
    labels = [tree.id(row["label"]) for row in rows]
    correct = [tree.id(result["label"]) == label for result, label in zip(results, labels, strict=True)]
    covered = [
        any(label in tree.leaves_at_or_below[tree.id(node["label"])] for node in result["answer"])
        for result, label in zip(results, labels, strict=True)
    ]
    assert metrics["test_accuracy"] == pytest.approx(np.mean(correct))
    assert metrics["test_answer_coverage"] == pytest.approx(np.mean(covered))
    assert not any(name.startswith("eval_") for name in metrics)  # it was trained on these rows
    assert "the guarantee does not hold for it" in (refitted / "README.md").read_text()
    assert "the guarantee does not hold" not in (refitted / "selection" / "README.md").read_text()


def test_predict_and_the_space_report_that_nothing_is_guaranteed(refitted, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("Hepatitis in 41 patients.\n")
    stderr = {}
    for folder in (refitted / "selection", refitted):
        words = ["--model", folder, "--input", file, "--output", tmp_path / f"{folder.name}.jsonl", "--coverage", 0.9]
        stderr[folder] = run(*words, command="predict.py").stderr
    assert "the coverage is not guaranteed" in stderr[refitted]
    assert "not guaranteed" not in stderr[refitted / "selection"]
    guaranteed = [read(folder / "config.json").get("refitted") for folder in stderr]
    assert guaranteed == [None, True]
    code = f"import app; print(app.about(app.load({str(refitted)!r}, None), {str(refitted)!r}, None)[0])"
    assert "no: trained on the validation rows too" in complete("-c", code, cwd=ROOT / "space").stdout


def test_killed_in_either_run_it_ends_with_the_same_weights(words, refitted, tmp_path):
    output = tmp_path / "results"
    line = [*words, "--output_dir", output, "--resume_from_checkpoint", "auto"]
    for folder in (output / "selection", output):
        saved = folder / "checkpoint-*" / "trainer_state.json"
        interrupt(signal.SIGKILL, *line, log=tmp_path / "log", until=saved)
        assert not (folder / "metrics.json").exists()
    run(*line)
    assert same_weights(output, refitted)


def test_checkpoints_of_a_former_run_are_never_taken_for_its_own(words, tmp_path):
    output, plain = tmp_path / "results", [word for word in words if word != "--refit"]
    run(*plain, "--output_dir", output)
    former = {folder.name for folder in output.glob("checkpoint-*")}
    assert former
    with pytest.raises(InputError, match="holds the checkpoints of a run without --refit"):
        train.main([*words, "--output_dir", str(output), "--resume_from_checkpoint", "auto"])
    assert {folder.name for folder in output.glob("checkpoint-*")} == former
    line = [*words, "--output_dir", output, "--overwrite_output_dir", "true"]
    saved = output / "selection" / "checkpoint-*" / "trainer_state.json"
    interrupt(signal.SIGKILL, *line, log=tmp_path / "log", until=saved)
    assert not [*output.glob("checkpoint-*"), *output.glob("metrics.json")]


def test_a_command_that_is_refused_deletes_nothing_of_the_former_run(words, refitted, tmp_path):
    output = shutil.copytree(refitted, tmp_path / "results")
    former = sorted(output.rglob("*"))
    line = [*words, "--output_dir", str(output), "--overwrite_output_dir", "true"]
    for wrong, message in (
        (["--metric_for_best_model", "f"], "is not measured"),
        (["--lora_target_modules", "q"], "'q'"),
    ):
        with pytest.raises(InputError, match=message):
            train.main([*line, *wrong])
        assert sorted(output.rglob("*")) == former


def test_a_resumed_run_gets_no_calibration_of_another_model(words, refitted, tmp_path):
    shutil.copytree(refitted / "selection", tmp_path / "results" / "selection")
    line = [*words, "--output_dir", str(tmp_path / "results"), "--resume_from_checkpoint", "auto"]
    with pytest.raises(InputError, match="it was trained with another --pooling, mean, not cls"):
        train.main([*line, "--pooling", "cls"])
    assert not [*(tmp_path / "results").glob("*.safetensors")]


def test_its_checkpoint_does_not_continue_without_it(tmp_path):
    """Without --refit, rows that the second model was trained on would become validation rows."""
    path = csv_file(tmp_path / "a.csv", [(f"text {i}", "ab"[i % 2]) for i in range(60)])
    data = load(data_path=path)
    (tmp_path / "data_report.json").write_text(json.dumps(train_on_validation_rows(data).report))
    with pytest.raises(InputError, match="it was trained on other rows or labels"):
        resume.check_resumed_data(str(tmp_path / "checkpoint-2"), data.taxonomy, data.report)


def test_label_issues_name_rows_of_the_training_file(words, refitted):
    (file,) = refitted.rglob("label_issues.csv")
    assert file.parent.name == "selection"
    rows, listed = read_csv(words[words.index("--train_file") + 1]), read_csv(file)
    assert listed
    assert all(rows[int(one["row"])]["label"] == one["label"] for one in listed)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--validation_size", "0"], "--refit needs training and validation rows"),
        (["--do_eval", "false"], "leave out --do_eval false"),
        (["--resume_from_checkpoint", "results/checkpoint-4"], "--resume_from_checkpoint auto"),
    ],
)
def test_incompatible_flags_are_refused_at_the_start(flags, problem, tiny_encoder, tmp_path):
    given = ["--train_file", str(CORPUS / "train.csv"), "--model_name_or_path", tiny_encoder, "--refit"]
    with pytest.raises(InputError, match=problem):
        train.main([*given, "--output_dir", str(tmp_path / "results"), *flags])
    assert not (tmp_path / "results").exists()


def test_it_does_not_start_from_the_folder_that_its_first_run_overwrites(tmp_path):
    (tmp_path / "selection").mkdir()
    words = ["--train_file", str(CORPUS / "train.csv"), "--output_dir", str(tmp_path), "--refit"]
    with pytest.raises(InputError, match=r"--refit would overwrite .*/selection, from which it starts"):
        train.main([*words, "--model_name_or_path", str(tmp_path / "selection")])


def test_with_several_labels_it_has_the_thresholds_of_the_first_model(tiny_encoder, tmp_path):
    flags = ("--refit", "--max_length", 64, "--label_smoothing_factor", 0.1)
    log = train_label_sets(tiny_encoder, tmp_path / "results", *flags)
    assert "Disabling label smoothing" not in log  # the Trainer's own
    chosen, final = (read(tmp_path / "results" / name) for name in ("selection/config.json", "config.json"))
    for name in ("node_scales", "node_biases", "node_thresholds", "recall_thresholds"):
        assert final[name] == chosen[name]
    folder = ROOT / "examples" / "multi_label"
    lines = [line for name in ("train", "validation") for line in (folder / f"{name}.jsonl").open(encoding="utf-8")]
    report = read(tmp_path / "results" / "data_report.json")
    assert report["splits"]["train"]["rows"] == len(lines)
    assert "validation" not in report["splits"]

    classify = pipeline("hierarchical-text-classification", model=str(tmp_path / "results"), trust_remote_code=True)
    rows = [json.loads(line) for line in (folder / "test.jsonl").open(encoding="utf-8")]
    answers = classify([row["text"] for row in rows], recall=0.9)
    listed = read_csv(tmp_path / "results" / "test_predictions.csv")
    for row, one, result in zip(rows, listed, answers, strict=True):
        assert set(filter(None, one["labels"].split("; "))) == set(row["labels"])
        assert set(filter(None, one["predictions"].split("; "))) == {node["label"] for node in result["labels"]}
    shares = []
    for row, result in zip(rows, answers, strict=True):
        if true := {node for label in row["labels"] for node in classify.tree.path(classify.tree.id(label))}:
            shares.append(len(true & {classify.tree.id(node["label"]) for node in result["answer"]}) / len(true))
    assert read(tmp_path / "results" / "metrics.json")["test_answer_recall"] == pytest.approx(np.mean(shares))
