"""Compare predict.py with the stock pipeline, over every kind of file, after kills, and with
unreadable rows.
"""

import csv
import gzip
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
from conftest import (
    ROOT,
    STRIKE,
    complete,
    copy_checkpoint,
    predict_here,
    read_csv,
    run,
    run_outside,
    started,
)
from labelled_files import load
from scipy.stats import entropy
from transformers import pipeline

from configuration_hierarchical import HierarchicalConfig
from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.prediction.output import RestartableOutput
from modeling_hierarchical import HierarchicalForSequenceClassification
from taxonomy_hierarchical import Taxonomy

BESIDE = ["out.jsonl.errors.jsonl", "out.jsonl.summary.json"]  # written beside an output


@pytest.fixture(scope="module")
def checkpoint(clear_checkpoint) -> str:
    return clear_checkpoint


def read_json_lines(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_texts(folder: Path, texts: list[str]) -> Path:
    pd.DataFrame({"text": texts}).to_csv(folder / "in.csv", index=False)
    return folder / "in.csv"


def predict(model: object, file: object, output: object, *flags: object) -> int:
    return predict_here("--model", model, "--input", file, "--output", output, *flags)


def test_an_encoder_that_computes_in_float32_only_names_the_flag_that_helps(
    tokenizer, texts, tmp_path
):
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    config = HierarchicalConfig(text_config={"model_type": "mra", "vocab_size": 30522, **sizes})
    HierarchicalForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    given = (tmp_path / "model", write_texts(tmp_path, texts), tmp_path / "out.jsonl")
    with pytest.raises(InputError, match="its encoder computes in float32 only: give --dtype fp32"):
        predict(*given, "--dtype", "bf16")
    assert predict(*given, "--dtype", "fp32") == 0


def test_predictions_equal_the_stock_pipeline_and_bad_rows_are_listed_separately(
    checkpoint, texts, tmp_path
):
    rows = [["id", "text"], *([f"n{i}", text] for i, text in enumerate(texts))]
    rows[3:3] = [["short"], ["empty", "  "], ["long", "a", "b"]]
    with (tmp_path / "in.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    with (tmp_path / "in.csv").open("ab") as file:
        file.write(b'latin,"caf\xe9 au lait"\nopen,"never closed\n')
    words = (
        "--model",
        checkpoint,
        "--input",
        tmp_path / "in.csv",
        "--id_column",
        "id",
        "--dtype",
        "fp32",
    )
    words += ("--output", tmp_path / "out.jsonl", "--probabilities", "--coverage", 0.9)
    done = run(*words, command="predict.py", check=False)
    assert done.returncode == 1
    assert f"done: {tmp_path / 'out.jsonl'}; 5 rows could not be read" in done.stderr
    assert "never closed" not in done.stderr

    predictions = read_json_lines(tmp_path / "out.jsonl")
    stock = pipeline("text-classification", model=checkpoint, trust_remote_code=True)
    for row, expected, i in zip(
        predictions, stock(texts, truncation=True, top_k=None), range(20), strict=True
    ):
        assert row["id"] == f"n{i}"
        assert row["label"] == expected[0]["label"] == row["path"][-1]
        assert row["score"] == pytest.approx(expected[0]["score"], abs=2e-5)
        assert row["probabilities"] == pytest.approx(
            {entry["label"]: entry["score"] for entry in expected}, abs=2e-5
        )
        assert row["prediction_set"]
    problems = read_json_lines(tmp_path / "out.jsonl.errors.jsonl")
    assert [(entry["row"], entry["line"]) for entry in problems] == [
        (2, 4),
        (3, 5),
        (4, 6),
        (23, 25),
        (24, 26),
    ]
    messages = [entry["problem"] for entry in problems]
    assert messages[:3] == [
        "1 fields, where the header has 2",
        "the text is empty",
        "3 fields, where the header has 2",
    ]
    assert messages[3].startswith("not UTF-8 text")
    assert messages[4] == "a quotation mark is not closed"
    beside = [*BESIDE, "out.jsonl.trained_texts.json"]
    assert {path.name for path in tmp_path.iterdir()} == {"in.csv", "out.jsonl", *beside}


def test_all_input_formats_give_the_same_predictions(checkpoint, texts, tmp_path):
    table = pd.DataFrame({"abstract": texts, "number": range(len(texts))})
    lines = table.to_json(orient="records", lines=True)
    table.to_parquet(tmp_path / "one.parquet")
    table.to_csv(tmp_path / "tabs.csv", index=False, sep="\t", encoding="utf-16")
    (tmp_path / "one.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    table[:8].to_csv(tmp_path / "part-0.csv", index=False)
    table[8:].to_csv(tmp_path / "part-1.csv", index=False)
    (tmp_path / "folder").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "folder" / f"{number:02}.txt").write_text(text, encoding="utf-16")
    words = (
        "--model",
        checkpoint,
        "--input",
        "-",
        "--input_format",
        "jsonl",
        "--output",
        tmp_path / "stdin.jsonl",
    )
    run(*words, command="predict.py", given=lines)
    expected = read_json_lines(tmp_path / "stdin.jsonl")
    assert [row["row"] for row in expected] == list(range(20))
    for number, name in enumerate(("one.parquet", "one.jsonl.gz", "part-*.csv", "tabs.csv")):
        more = ("--encoding", "utf-16") if name == "tabs.csv" else ()
        assert predict(checkpoint, tmp_path / name, tmp_path / f"{number}.jsonl", *more) == 0
        assert read_json_lines(tmp_path / f"{number}.jsonl") == expected
    assert (
        predict(checkpoint, tmp_path / "folder", tmp_path / "folder.jsonl", "--encoding", "utf-16")
        == 0
    )
    ids = [{"id": f"{row.pop('row'):02}.txt", **row} for row in expected]  # the names of the files
    assert read_json_lines(tmp_path / "folder.jsonl") == ids


def test_all_output_formats_hold_the_same_rows(checkpoint, texts, tmp_path):
    ids = ["a\rb", "plain", "c\r\nd", 7, 'q"\r,', "e\nf", "\r"]
    lines = [
        json.dumps({"text": text, "id": key}) + "\n" for key, text in zip(ids, texts, strict=False)
    ]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    flags = ("--id_column", "id", "--probabilities", "--uncertainty", "--coverage", 0.5)
    for kind in ("jsonl", "csv", "parquet"):
        assert predict(checkpoint, tmp_path / "in.jsonl", tmp_path / f"out.{kind}", *flags) == 0
    rows = read_json_lines(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == ids
    records = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    table = pd.read_csv(tmp_path / "out.csv", dtype={"id": str}, keep_default_na=False)
    assert table["id"].tolist() == [str(key) for key in ids]
    for row, cells, record in zip(rows, read_csv(tmp_path / "out.csv"), records, strict=True):
        assert record == row | {"id": str(row["id"])}
        for name, value in row.pop("probabilities").items():
            assert float(cells.pop(f"probability of {name}")) == value
        joined = {
            "path": " > ".join(row["path"]),
            "paths": "; ".join(" > ".join(path) for path in row["paths"]),
        }
        for name in ("labels", "scores", "prediction_set"):
            joined[name] = "; ".join("" if one is None else str(one) for one in row[name])
        expected = {
            name: "" if value is None else str(value) for name, value in (row | joined).items()
        }
        assert cells == expected


@contextmanager
def kill_before_the_blocks_are_joined() -> Iterator[None]:
    """Interrupt predict.py in this process once all blocks are written."""

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(RestartableOutput, "join_blocks", killed)
        yield


@pytest.fixture(scope="module")
def long_input(texts, tmp_path_factory) -> Path:
    """Write an input of three parts, with unreadable rows in the first and in the last."""
    rows = pd.DataFrame({"text": [f"{i} {texts[i % 20][:60]}" for i in range(2100)]})
    rows.loc[[7, 2090], "text"] = ""
    file = tmp_path_factory.mktemp("long") / "in.csv"
    rows.to_csv(file, index=False)
    return file


@pytest.fixture(scope="module")
def unbroken(checkpoint, long_input, tmp_path_factory) -> Path:
    """Return the output of a run that was not killed."""
    output = tmp_path_factory.mktemp("unbroken") / "out.jsonl"
    assert predict(checkpoint, long_input, output) == 1
    return output


def test_a_long_folder_has_several_files_that_are_one_table(
    checkpoint, long_input, unbroken, tmp_path, monkeypatch
):
    monkeypatch.setattr("hierarchical_clinicalbert.prediction.output.BLOCKS_PER_FILE", 1)
    words = ("--model", checkpoint, "--input", long_input, "--output", f"{tmp_path / 'out'}/")
    assert predict_here(*words, "--output_format", "jsonl") == 1
    parts = sorted((tmp_path / "out").glob("part-*"))
    assert [part.name for part in parts] == [f"part-0000{i}.jsonl" for i in range(3)]
    assert b"".join(part.read_bytes() for part in parts) == unbroken.read_bytes()


def test_a_killed_run_is_resumed_and_writes_the_same_bytes(
    checkpoint, long_input, unbroken, tmp_path, capsys
):
    output = tmp_path / "out.jsonl"
    words = ("--model", checkpoint, "--input", long_input, "--output", output)
    for *moment, kill in (
        ("os.rename", "/000000001.jsonl", signal.SIGINT),
        ("os.rename", "/out.jsonl", signal.SIGKILL),
    ):
        more = ("--overwrite",) if kill == signal.SIGINT else ()
        done = complete("-c", STRIKE, ROOT / "predict.py", *moment, int(kill), *words, *more)
        assert done.returncode == (130 if kill == signal.SIGINT else -kill), done.stderr
        assert not output.exists()
        if kill == signal.SIGINT:
            assert done.stderr.endswith(
                "stopped; the same command without --overwrite continues from here\n"
            )
    assert predict_here(*words) == 1
    assert "continuing at row " in capsys.readouterr().err
    assert_same_files(output, unbroken)
    assert [row["row"] for row in read_json_lines(f"{output}.errors.jsonl")] == [7, 2090]
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", *BESIDE}
    with pytest.raises(InputError, match="already exists"):
        predict_here(*words)


def test_two_processes_or_sets_of_options_are_never_mixed_in_one_output(
    checkpoint, long_input, unbroken, tmp_path
):
    """Stop another process after one part, while it works on the next one."""
    given = (checkpoint, long_input, tmp_path / "out.jsonl")
    words = ("--model", checkpoint, "--input", long_input, "--output", given[-1])
    part = tmp_path / "out.jsonl.parts" / "000000000.jsonl"
    with started(*words, log=Path(os.devnull), until=part, command="predict.py") as process:
        process.send_signal(signal.SIGSTOP)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        for more in ((), ("--overwrite",)):
            with pytest.raises(
                InputError, match=r"^--output \S+/out.jsonl: another process is writing it"
            ):
                predict(*given, *more)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    # killed, it holds nothing
    with pytest.raises(
        InputError, match="started with another probabilities: give the same, or --overwrite"
    ):
        predict(*given, "--probabilities")
    assert predict(*given) == 1
    assert_same_files(tmp_path / "out.jsonl", unbroken)
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", *BESIDE}


def test_a_killed_run_refuses_another_input_and_a_damaged_part(
    checkpoint, long_input, unbroken, texts, tmp_path
):
    given = (checkpoint, long_input, tmp_path / "out.jsonl")
    with kill_before_the_blocks_are_joined():
        predict(*given)
    with pytest.raises(InputError, match="the input changed since"):
        predict(checkpoint, write_texts(tmp_path, texts[:2]), tmp_path / "out.jsonl")
    part = tmp_path / "out.jsonl.parts" / "000000001.jsonl"
    whole = part.read_bytes()
    for damaged in (whole[:-20], whole.replace(b'"label": "', b'"label": "x', 1), b""):
        part.write_bytes(damaged)
        with pytest.raises(InputError) as error:
            predict(*given)
        assert str(error.value) == f"{part} is damaged: delete it, and run the same command again"
    part.unlink()
    assert predict(*given) == 1
    assert_same_files(tmp_path / "out.jsonl", unbroken)


def test_unneeded_modules_are_not_imported(tmp_path):
    """Run predict.py for a merged checkpoint in the documented small installation, also into an
    error.
    """
    words = ["--model", str(copy_checkpoint("self_contained", tmp_path / "model"))]
    words += ["--input", str(tmp_path / "in.csv"), "--output", str(tmp_path / "out.csv")]
    (tmp_path / "in.csv").write_text("text\nA study of ulcers.\n")
    code = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
absent = {["accelerate", "peft", "bitsandbytes", "datasets", "pandas", "sklearn", "ray"]!r}
sys.modules.update(dict.fromkeys(absent))
import predict
from hierarchical_clinicalbert.errors import InputError, user_error_message
assert predict.main({words!r}) == 0
print(json.dumps(user_error_message(InputError("No file."), {{}})))
"""
    assert run_outside(code, tmp_path) == "No file."


def assert_same_files(one: Path, other: Path) -> None:
    """Compare two outputs and their error files."""
    assert one.read_bytes() == other.read_bytes()
    assert Path(f"{one}.errors.jsonl").read_bytes() == Path(f"{other}.errors.jsonl").read_bytes()


@pytest.mark.parametrize("output", ["out.tasks.json", "out/"])
def test_without_a_readable_row_the_output_is_empty_and_all_rows_are_listed(
    output, checkpoint, texts, tmp_path
):
    # more than one block
    (tmp_path / "in.csv").write_text("text,id\n" + "caf\xe9 au lait,1\n" * 1100, encoding="cp1252")
    given = (checkpoint, tmp_path / "in.csv", f"{tmp_path}/{output}")
    assert predict(*given) == 1
    errors = tmp_path / ("out/errors.jsonl" if output == "out/" else f"{output}.errors.jsonl")
    expected = "not UTF-8 text but fits cp1252: save it as UTF-8, or give --encoding cp1252"
    assert [problem["problem"] for problem in read_json_lines(errors)] == [expected] * 1100
    if output == "out/":
        assert pd.read_parquet(tmp_path / "out" / "part-00000.parquet").empty
    else:
        assert json.loads((tmp_path / output).read_text()) == []
    write_texts(tmp_path, texts[:2])
    assert predict(*given, "--overwrite") == 0
    assert not errors.exists()  # an error of an earlier run is not taken for one of this run


@pytest.mark.parametrize(
    ("given", "output"),
    [("a.csv", "a.csv"), ("link.csv", "a.csv"), ("b.csv.errors.jsonl", "b.csv")],
)
@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_an_input_is_not_taken_for_an_output(given, output, more, tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("text\nA study of ulcers.\n")
    (tmp_path / "link.csv").symlink_to(tmp_path / "a.csv")
    (tmp_path / "b.csv.errors.jsonl").write_text('{"text": "A study of ulcers."}\n')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=f"^--output {output}: {given} is also an input: give another name$"
    ):
        predict("nothing", given, output, *more)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_output_is_overwritten_only_once_the_new_run_can_start(checkpoint, texts, tmp_path):
    given = (checkpoint, write_texts(tmp_path, texts[:2]), tmp_path / "out.jsonl")
    assert predict(*given) == 0
    before = given[-1].read_bytes()
    with pytest.raises(InputError, match="already exists"):
        predict(*given)
    for wrong in (("--batch_size", 0), ("--coverage", 2), ("--model", tmp_path)):
        with pytest.raises(InputError):
            predict(*given, "--overwrite", *wrong)
        assert given[-1].read_bytes() == before
    assert predict(*given, "--overwrite", "--probabilities") == 0
    assert given[-1].read_bytes() != before
    hashes = tmp_path / "out.jsonl.trained_texts.json"
    assert hashes.read_bytes() == Path(checkpoint, "trained_texts.json").read_bytes()
    assert predict(*given, "--overwrite") == 0
    assert not hashes.exists()


@pytest.mark.parametrize(
    ("theirs", "output"),
    [("spark/part-00000-2f1a.c000.snappy.parquet", "spark/"), ("mine.csv.parts/a.txt", "mine.csv")],
)
def test_files_of_another_program_are_not_overwritten(theirs, output, checkpoint, texts, tmp_path):
    file = write_texts(tmp_path, texts[:2])
    (tmp_path / theirs).parent.mkdir()
    (tmp_path / theirs).write_bytes(b"theirs")
    for more in ((), ("--overwrite",)):
        with pytest.raises(
            InputError, match=f": another program wrote {tmp_path / theirs}: give another name$"
        ):
            predict(checkpoint, file, f"{tmp_path}/{output}", *more)
    assert (tmp_path / theirs).read_bytes() == b"theirs"


def test_empty_texts_and_files_do_not_affect_other_rows(checkpoint, texts, tmp_path):
    (tmp_path / "in").mkdir()
    header = "Re\u0301sume\u0301,,\n"  # as macOS writes accents, and spreadsheets empty columns
    lines = [header, *(f'"{text}",,\n' for text in [texts[0], "\u200b", "\xad \x01", texts[1]])]
    (tmp_path / "in" / "a.csv").write_text("".join(lines), encoding="utf-8")
    for name, content in (
        ("b.csv", b""),
        ("c.csv", b"\xef\xbb\xbf\n"),
        ("d.csv.gz", gzip.compress(b"")),
    ):
        (tmp_path / "in" / name).write_bytes(content)
    assert (
        predict(
            checkpoint, tmp_path / "in", tmp_path / "out.jsonl", "--text_column", "R\xe9sum\xe9"
        )
        == 1
    )
    assert [row["row"] for row in read_json_lines(tmp_path / "out.jsonl")] == [0, 3]
    problems = read_json_lines(tmp_path / "out.jsonl.errors.jsonl")
    assert [(row["row"], row["problem"]) for row in problems] == [
        (n, "the text is empty") for n in (1, 2)
    ]


@pytest.mark.parametrize("name", ["neoplasms > 9", "neoplasms; 9"])
def test_labels_that_hold_a_separator_are_lists_of_json_in_csv(name, checkpoint, texts, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    config = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(
        config.replace('"neoplasms"', json.dumps(name)), encoding="utf-8"
    )
    file = write_texts(tmp_path, [*texts, "A sarcoma."])
    for kind in ("csv", "jsonl"):
        predict(folder, file, tmp_path / f"out.{kind}")
    pairs = list(
        zip(read_csv(tmp_path / "out.csv"), read_json_lines(tmp_path / "out.jsonl"), strict=True)
    )
    assert name in {row["label"] for _, row in pairs}
    for cells, row in pairs:
        for field, separator in (("path", " > "), ("labels", "; ")):
            found = (
                json.loads(cells[field])
                if cells[field].startswith("[")
                else cells[field].split(separator)
            )
            assert found == row[field]


@pytest.mark.parametrize(
    ("form", "sets"), [("checkpoint", {}), ("labels_checkpoint", {"recall": 0.8})]
)
def test_rows_of_both_forms_have_the_fields_of_a_result(form, sets, request, texts, tmp_path):
    model = request.getfixturevalue(form)
    texts = [f"{text} She had colitis and angina." for text in texts[:3]]
    texts += ["Nothing.", "Sepsis and fever. " * 200]
    flags = [word for name, target in sets.items() for word in (f"--{name}", target)]
    predict(model, write_texts(tmp_path, texts), tmp_path / "out.jsonl", "--dtype", "fp32", *flags)
    classify = pipeline("hierarchical-text-classification", model=model, trust_remote_code=True)
    rows = read_json_lines(tmp_path / "out.jsonl")
    for number, (row, result) in enumerate(zip(rows, classify(texts, **sets), strict=True)):
        labels = result["labels"]
        expected = {
            "row": number,
            **{name: result[name] for name in ("label", "tokens", "tokens_read", "truncated")},
            "score": pytest.approx(result["score"], abs=1e-5),
            "path": [node["label"] for node in result["path"]],
            "labels": [node["label"] for node in labels],
            "scores": pytest.approx([node["score"] for node in labels], abs=1e-5),
            "paths": [[step["label"] for step in node["path"]] for node in labels],
        }
        if sets:
            expected["prediction_set"] = [node["label"] for node in result["prediction_set"]]
        else:
            expected["p_value"] = pytest.approx(result["p_value"], abs=1e-6)
        assert row == expected
    assert row["truncated"]
    assert any(len(row["labels"]) > 1 for row in rows) == bool(sets)


def test_a_checkpoint_with_the_code_of_another_release_is_refused_in_one_line(
    checkpoint, texts, tmp_path
):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    code = (folder / "pipeline_hierarchical.py").read_text()
    (folder / "pipeline_hierarchical.py").write_text(
        code.replace("    result_version = RESULT_VERSION\n", "")
    )
    with pytest.raises(
        InputError, match=r"its code returns results of version 1, .* version 3: copy the files"
    ):
        predict(folder, write_texts(tmp_path, texts), tmp_path / "out.jsonl")


def test_a_csv_of_predicted_labels_is_training_data(labels_checkpoint, texts, tmp_path):
    texts = [f"{text} She had colitis and angina." for text in texts[:9]] + ["Nothing of the kind."]
    assert predict(labels_checkpoint, write_texts(tmp_path, texts), tmp_path / "out.csv") == 0
    predicted = pd.read_csv(tmp_path / "out.csv", keep_default_na=False).assign(text=texts)
    predicted.to_csv(tmp_path / "train.csv", index=False)
    settings = {"label_column": ["labels"], "label_delimiter": ";", "validation_size": 0.0}
    tree = HierarchicalConfig.from_pretrained(labels_checkpoint).tree
    data = load(train_file=tmp_path / "train.csv", known=tree, **settings)
    read = [{tree.labels[node] for node in nodes} for nodes in data.splits["train"]["nodes"]]
    assert read == [{*labels.split("; ")} - {""} for labels in predicted["labels"]]
    assert {len(labels) for labels in read} >= {0, 2}


def entropy_by_level(nodes: dict[str, float], tree: Taxonomy, several: bool) -> np.ndarray:
    """Return what each level adds to the entropy of a prediction, from the probability of every
    node.
    """
    p = np.array([nodes[label] for label in tree.labels])
    if not several:  # of the node at a level; a leaf above the level counts as this node
        cells = [
            {tree.path(leaf)[:level][-1] for leaf in range(tree.num_leaves)}
            for level in range(1, tree.depth + 1)
        ]
        return np.diff([0.0, *(entropy(p[[*nodes]]) for nodes in cells)])
    added = np.zeros(tree.depth)
    levels = np.array(tree.levels) - 1
    given_parent = p / np.array([1.0 if parent < 0 else p[parent] for parent in tree.parents])
    for present in product([False, True], repeat=tree.num_nodes):  # every set of nodes
        is_open = [parent < 0 or present[parent] for parent in tree.parents]
        if not any(one and not possible for one, possible in zip(present, is_open, strict=True)):
            shares = np.where(present, given_parent, 1 - given_parent)[is_open]
            np.add.at(added, levels[is_open], -shares.prod() * np.log(shares))
    return added


@pytest.mark.parametrize("several", [False, True])
def test_the_uncertainty_is_the_entropy_and_names_the_level_that_adds_most(
    several, checkpoint, labels_checkpoint, texts, tmp_path
):
    model = labels_checkpoint if several else checkpoint
    predict(
        model,
        write_texts(tmp_path, texts),
        tmp_path / "out.jsonl",
        "--dtype",
        "fp32",
        "--uncertainty",
    )
    rows = read_json_lines(tmp_path / "out.jsonl")
    classify = pipeline("hierarchical-text-classification", model=model, trust_remote_code=True)
    for row, result in zip(rows, classify(texts, levels=True), strict=True):
        nodes = {
            label: probability for level in result["levels"] for label, probability in level.items()
        }
        expected = entropy_by_level(nodes, classify.tree, several)
        assert row["uncertainty"] == pytest.approx(expected.sum(), abs=1e-4)
        assert row["unsure_level"] == 1 + expected.argmax()


def test_without_native_bfloat16_the_default_is_float32(checkpoint, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("hierarchical_clinicalbert.prediction.model.has_bf16", lambda cpu: False)
    file = write_texts(tmp_path, texts)
    predict(checkpoint, file, tmp_path / "a.jsonl", "--probabilities")
    predict(checkpoint, file, tmp_path / "b.jsonl", "--probabilities", "--dtype", "fp32")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_rows_have_the_descriptions_of_their_nodes(labels_checkpoint, tmp_path):
    shutil.copytree(labels_checkpoint, tmp_path / "described")
    config = json.loads((tmp_path / "described" / "config.json").read_text())
    # of one node, as in a taxonomy of codes and titles
    config["descriptions"] = {"neoplasms": "C00-D49: Neoplasms"}
    (tmp_path / "described" / "config.json").write_text(json.dumps(config))
    file = write_texts(tmp_path, ["carcinoma and colitis", "The weather stayed mild."])
    for kind in ("jsonl", "parquet"):
        assert predict(tmp_path / "described", file, tmp_path / f"out.{kind}") == 0
    rows = read_json_lines(tmp_path / "out.jsonl")
    assert [dict(zip(row["labels"], row["descriptions"], strict=True)) for row in rows] == [
        {"neoplasms": "C00-D49: Neoplasms", "digestive system diseases": None},
        {},
    ]
    assert pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist() == rows
