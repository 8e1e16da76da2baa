"""Test that no run scores a text that this run, or an earlier run of the checkpoint, was trained
on.

The tests derive the training texts from the input file and the predicted rows, not from
trained_texts.json.
"""

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
from conftest import DIVERGES, ROOT, STRIKE, clear_rows, complete, read_csv, same_weights, write_csv
from transformers import AutoTokenizer, pipeline

import push_to_hub
import train
from hierarchical_clinicalbert.checkpoint_files import published_files
from hierarchical_clinicalbert.errors import InputError

KEPT = "trained_texts.json"


def labelled(count: int) -> list[dict[str, str]]:
    """Return texts with random labels, so that a model can only memorise them."""
    draw = random.Random(0)
    words = ("fever", "cough", "rash", "pain", "fatigue", "nausea")
    return [
        {
            "text": f"Case {i}: {draw.choice(words)} and {draw.choice(words)}.",
            "label": draw.choice("ab"),
        }
        for i in range(count)
    ]


ROWS = labelled(800)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("continue")
    write_csv(folder / "700.csv", ROWS[:700])
    write_csv(folder / "800.csv", ROWS)
    return folder


@pytest.fixture(scope="module")
def words(tiny_encoder) -> list[object]:
    return [
        *(
            "--quantization",
            "none",
            "--max_steps",
            4,
            "--save_strategy",
            "steps",
            "--save_steps",
            2,
        ),
        *(
            "--eval_strategy",
            "no",
            "--load_best_model_at_end",
            "false",
            "--heads_init",
            "random",
            "--seed",
            3,
        ),
    ]


@pytest.fixture(scope="module")
def first(place, words, tiny_encoder) -> Path:
    output = place / "first"
    run(
        *words,
        "--model_name_or_path",
        tiny_encoder,
        "--data_path",
        place / "700.csv",
        "--output_dir",
        output,
    )
    return output


@pytest.fixture(scope="module")
def second(place, words, first) -> Path:
    """Continue the first run on a larger file."""
    output = place / "second"
    run(
        *words,
        "--model_name_or_path",
        first,
        "--data_path",
        place / "800.csv",
        "--output_dir",
        output,
    )
    return output


def run(*words: object) -> None:
    train.main(list(map(str, words)))


def scored(output: Path, rows: list[dict[str, str]] = ROWS) -> dict[str, set[str]]:
    """Return the texts of the rows that a run has scored, by split."""
    files = {split: output / f"{split}_predictions.csv" for split in ("validation", "test")}
    return {
        split: {rows[int(row["row"])]["text"] for row in read_csv(file)}
        for split, file in files.items()
        if file.exists()
    }


def trained_on(output: Path, count: int) -> set[str]:
    """Return the training texts of a run that split its rows off the first rows."""
    return {row["text"] for row in ROWS[:count]} - set().union(*scored(output).values())


def report(output: Path) -> dict:
    return json.loads((output / "data_report.json").read_text())


def test_a_checkpoint_continued_on_a_grown_file_is_not_scored_on_what_it_was_trained_on(
    first, second
):
    known = trained_on(first, 700)
    held_out = scored(second)
    found = report(second)
    assert len(known) == 560
    assert {split: len(texts) for split, texts in held_out.items()} == {
        "validation": 80,
        "test": 80,
    }
    assert len(known | held_out["validation"] | held_out["test"]) == 560 + 80 + 80
    assert found["trained_before"] == {"scores": "verified", "left_out": {}}
    assert found["splits"]["train"]["rows"] == 640


def test_a_killed_run_has_recorded_its_training_texts(
    place, words, first, second, tiny_encoder, tmp_path
):
    output = tmp_path / "killed"
    line = [
        *words,
        "--model_name_or_path",
        tiny_encoder,
        "--data_path",
        place / "700.csv",
        "--output_dir",
        output,
    ]
    moment = ("open", "checkpoint-4/trainer_state.json", int(signal.SIGKILL))
    assert complete("-c", STRIKE, ROOT / "train.py", *moment, *line).returncode == -signal.SIGKILL
    known = trained_on(first, 700)
    checkpoint, *_ = sorted(output.glob("checkpoint-*"))
    words = [*words, "--model_name_or_path", checkpoint, "--data_path", place / "800.csv"]
    run(*words, "--output_dir", tmp_path / "next")
    held_out = scored(tmp_path / "next")
    assert not known & set().union(*held_out.values())
    assert held_out == scored(second)  # which knew as much


def test_a_continued_run_that_is_resumed_keeps_its_split(place, words, first, second, tmp_path):
    broken = tmp_path / "second"
    for name in ("data_report.json", KEPT):
        (broken / name).parent.mkdir(exist_ok=True)
        shutil.copy(second / name, broken / name)
    shutil.copytree(second / "checkpoint-2", broken / "checkpoint-2")
    line = [*words, "--model_name_or_path", first, "--data_path", place / "800.csv"]
    line += ["--output_dir", broken, "--resume_from_checkpoint", "auto"]
    for change in (["--seed", 9], ["--test_size", 0.2]):
        with pytest.raises(
            InputError, match="it was trained on other rows or labels; give the same data"
        ):
            run(*line, *change)
    run(*line)
    assert same_weights(broken, second)
    assert scored(broken) == scored(second)
    assert report(broken) == report(second)
    assert (broken / KEPT).read_bytes() == (second / KEPT).read_bytes()


def test_rows_that_an_interrupted_run_was_trained_on_do_not_become_its_test_rows(
    place, words, first, tmp_path
):
    """Resume a run with another test file."""
    output = tmp_path / "results"
    write_csv(tmp_path / "train.csv", ROWS[700:750])
    line = [
        *words,
        "--model_name_or_path",
        first,
        "--train_file",
        tmp_path / "train.csv",
        "--validation_size",
        0,
    ]
    line += ["--output_dir", output, "--resume_from_checkpoint", "auto"]
    run(*line, "--test_file", write_csv(tmp_path / "a.csv", ROWS[770:]), "--max_steps", 2)
    run(*line, "--test_file", write_csv(tmp_path / "b.csv", ROWS[690:740] + ROWS[780:]))
    assert not scored(output, ROWS[690:740] + ROWS[780:])["test"] & {
        row["text"] for row in ROWS[700:750]
    }
    assert report(output)["trained_before"]["left_out"]["test"] >= 40
    assert report(output)["splits"]["train"]["rows"] == 50


def test_with_unknown_training_texts_nothing_is_split_off_and_scores_are_unverified(
    place, words, first, tmp_path, capsys
):
    unknown = shutil.copytree(first, tmp_path / "unknown")
    (unknown / KEPT).unlink()
    line = [*words, "--model_name_or_path", unknown, "--train_file", place / "700.csv"]
    run(
        *line,
        "--test_file",
        write_csv(tmp_path / "test.csv", ROWS[700:]),
        "--output_dir",
        tmp_path / "next",
    )
    assert (
        "training texts of the checkpoint or teacher are known: no rows are split off"
        in capsys.readouterr().err
    )
    assert report(tmp_path / "next")["splits"].keys() == {"train", "test"}
    assert report(tmp_path / "next")["trained_before"]["scores"] == "unverified"
    # a run that follows knows no more
    assert json.loads((tmp_path / "next" / KEPT).read_text())["complete"] is False
    card = (tmp_path / "next" / "README.md").read_text()
    assert "**These scores are unverified**" in card
    assert "name: accuracy (unverified)" in card
    assert "unverified" not in (first / "README.md").read_text()


def test_scoring_leaves_out_what_was_trained_on(first, tmp_path, capsys):
    known = sorted(trained_on(first, 700))
    held_out = {split: sorted(texts) for split, texts in scored(first).items()}
    texts = [*known[:5], *held_out["validation"][:2], *held_out["test"][:30], known[8]]
    rows = [{"text": text, "label": "a"} for text in texts]
    line = [
        "--do_train",
        "false",
        "--model_name_or_path",
        first,
        "--output_dir",
        tmp_path / "scores",
    ]
    line += ["--test_file", write_csv(tmp_path / "a.csv", rows)]
    # not read, as a recipe may name it
    line += ["--train_file", write_csv(tmp_path / "train.csv", rows[-9:])]
    run(*line)
    message = "left out, since the checkpoint was trained or calibrated on the texts: 8 test rows"
    assert message in capsys.readouterr().err
    assert scored(tmp_path / "scores", rows)["test"] == set(held_out["test"][:30])
    assert report(tmp_path / "scores")["trained_before"]["left_out"] == {"test": 8}
    write_csv(tmp_path / "a.csv", rows[:7])
    with pytest.raises(InputError, match="trained or calibrated on the texts of all 7 rows"):
        run(
            *line, "--model_name_or_path", first / "checkpoint-4", "--output_dir", tmp_path / "none"
        )


def test_overwriting_a_run_forgets_what_it_was_trained_on_and_its_weights_with_it(
    words, first, tiny_encoder, tmp_path
):
    output = shutil.copytree(first, tmp_path / "results")
    exported = {"onnx/model.onnx", "sentence_bert_config.json"}  # as downloaded from the Hub
    for name in exported:
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_bytes(b"of the former weights")
    line = [
        *words,
        "--model_name_or_path",
        tiny_encoder,
        "--overwrite_output_dir",
        "true",
        "--output_dir",
        output,
    ]
    line += ["--data_path", write_csv(tmp_path / "other.csv", ROWS[700:])]
    with pytest.raises(InputError, match="the loss is"):
        run(*line, *DIVERGES)
    # otherwise the weights of the former run would be taken as the result of this run
    with pytest.raises(InputError, match="is not a checkpoint"):
        push_to_hub.main(["--model", str(output), "--repo_id", "a/b"])
    run(*line)
    assert len(scored(output, ROWS[700:])["test"]) == 10
    assert not exported & published_files(output).keys()
    known = json.loads((output / KEPT).read_text())
    assert (len(known["earlier"]), len(known["this_run"])) == (0, 80)


def test_a_run_that_continues_in_its_own_folder_forgets_nothing(place, words, first, tmp_path):
    output = shutil.copytree(first, tmp_path / "results")
    line = [
        *words,
        "--model_name_or_path",
        output,
        "--data_path",
        place / "800.csv",
        "--output_dir",
        output,
    ]
    line += ["--overwrite_output_dir", "true"]
    with pytest.raises(InputError, match="the loss is"):
        run(*line, *DIVERGES)
    assert same_weights(output, first)  # which it can be continued from again
    run(*line)
    assert not trained_on(first, 700) & set().union(*scored(output).values())


def test_a_continued_checkpoint_keeps_its_limit_of_tokens_unless_a_flag_changes_it(
    words, tiny_encoder, tmp_path, capsys
):
    base = tmp_path / "base"
    line = [*words, "--data_path", write_csv(tmp_path / "a.csv", ROWS[:200])]
    run(*line, "--model_name_or_path", tiny_encoder, "--max_length", 24, "--output_dir", base)
    change = "--max_length changes where texts are truncated from 24 to 48 tokens; leave it out"
    for flags, limit in ([], 24), (["--max_length", 48], 48), (["--max_length", 24], 24):
        output = tmp_path / " ".join(map(str, ["next", *flags]))
        capsys.readouterr()
        run(*line, *flags, "--model_name_or_path", base, "--output_dir", output)
        assert (change in capsys.readouterr().err) == (limit == 48)
        tokenizer = AutoTokenizer.from_pretrained(output, trust_remote_code=True)
        assert tokenizer.model_max_length == limit
        assert report(output)["lengths"]["train"]["max_length"] == limit


@pytest.mark.parametrize("several", [False, True], ids=["one path", "many nodes"])
def test_what_a_continued_checkpoint_no_longer_guarantees_is_named_in_one_line(
    words, clear_checkpoint, labels_checkpoint, tmp_path, capsys, several
):
    line = [*words, "--train_file", write_csv(tmp_path / "train.csv", clear_rows(4))]
    if several:  # a checkpoint without p-values
        line += ["--model_name_or_path", labels_checkpoint]  # in full form
        line += ["--label_delimiter", ";"]
        guarantee = "recall"
        lost = "prediction sets for 90 % recall"
    else:
        line += ["--model_name_or_path", clear_checkpoint]
        guarantee = "coverage"
        lost = "prediction sets for 90 % coverage and p-values"
    reason = "they were fitted to its earlier weights; to fit new ones, train with at least 19"
    message = f"the checkpoint's {lost} are removed: {reason} validation texts"
    unseen = [{**row, "text": f"Case {i}: {row['text']}"} for i, row in enumerate(clear_rows(5))]
    for count in (0, 5, 40):
        validation: list[object] = ["--validation_size", 0]
        if count:
            rows = unseen[:: len(unseen) // count][:count]
            validation = ["--validation_file", write_csv(tmp_path / f"{count}.csv", rows)]
        output = tmp_path / f"{count} rows"
        capsys.readouterr()
        run(*line, *validation, "--output_dir", output)
        assert capsys.readouterr().err.count(message) == (count < 40)
        task = "hierarchical-text-classification"
        classify = pipeline(task, model=str(output), trust_remote_code=True)
        assert classify.has_p_values == (count == 40)
        if count == 40:
            assert "prediction_set" in classify("a case of colitis", **{guarantee: 0.9})
        else:
            with pytest.raises(ValueError, match=f"{guarantee}.* needs"):
                classify("a case of colitis", **{guarantee: 0.9})


def test_a_checkpoint_of_another_problem_type_is_refused(words, first, tmp_path):
    (tmp_path / "sets.jsonl").write_text(
        '{"text": "x", "label": ["a", "b"]}\n{"text": "y", "label": []}\n'
    )
    flags = [
        "--model_name_or_path",
        first,
        "--output_dir",
        tmp_path / "out",
        "--validation_size",
        0,
    ]
    for data in (["--train_file"], ["--do_train", "false", "--test_file"]):
        with pytest.raises(
            InputError, match=r"is a checkpoint for single_label.*, the data are for multi_label"
        ):
            run(*words, *flags, *data, tmp_path / "sets.jsonl")
