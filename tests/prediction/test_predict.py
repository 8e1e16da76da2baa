"""Compare predict.py with the stock pipeline, over every kind of file, after kills, and with unreadable rows."""

import csv
import glob
import gzip
import hashlib
import json
import os
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date, datetime
from decimal import Decimal
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, STRIKE, complete, copy_checkpoint, predict_here, read_csv, run, run_outside, server
from forked import COMMANDS, Process
from labelled_files import load
from safetensors.torch import load_file, save_file
from scipy.stats import entropy
from transformers import pipeline

from configuration_hierarchical import HierarchicalConfig
from hierarchical_clinicalbert.errors import InputError, user_error_message
from hierarchical_clinicalbert.prediction.input import read_records
from hierarchical_clinicalbert.prediction.int8 import has_int8_products
from hierarchical_clinicalbert.prediction.rows import output_kind
from hierarchical_clinicalbert.reading.sources import find_sources
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


def test_an_encoder_that_computes_in_float32_only_names_the_flag_that_helps(tokenizer, texts, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": -1}
    config = HierarchicalConfig(text_config={"model_type": "deberta", "vocab_size": 30522, **sizes, **relative})
    HierarchicalForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = ("--model", tmp_path / "model", "--input", write_texts(tmp_path, texts), "--output", tmp_path / "out.jsonl")
    with pytest.raises(InputError, match="its encoder computes in float32 only: give --dtype fp32"):
        predict_here(*words, "--dtype", "bf16")
    assert predict_here(*words, "--dtype", "fp32") == 0


def test_predictions_equal_the_stock_pipeline_and_bad_rows_are_listed_separately(checkpoint, texts, tmp_path):
    rows = [["id", "text"], *([f"n{i}", text] for i, text in enumerate(texts))]
    rows[3:3] = [["short"], ["empty", "  "], ["long", "a", "b"]]
    with (tmp_path / "in.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    with (tmp_path / "in.csv").open("ab") as file:
        file.write(b'latin,"caf\xe9 au lait"\nopen,"never closed\n')
    words = ("--model", checkpoint, "--input", tmp_path / "in.csv", "--id_column", "id", "--dtype", "fp32")
    words += ("--output", tmp_path / "out.jsonl", "--probabilities", "--coverage", 0.9)
    done = run(*words, command="predict.py", check=False)
    assert done.returncode == 1
    assert f"done: {tmp_path / 'out.jsonl'}; 5 rows could not be read" in done.stderr
    assert "never closed" not in done.stderr

    predictions = read_json_lines(tmp_path / "out.jsonl")
    stock = pipeline("text-classification", model=checkpoint, trust_remote_code=True)
    for row, expected, i in zip(predictions, stock(texts, truncation=True, top_k=None), range(20), strict=True):
        assert row["id"] == f"n{i}"
        assert row["label"] == expected[0]["label"] == row["path"][-1]
        assert row["score"] == pytest.approx(expected[0]["score"], abs=2e-5)
        assert row["probabilities"] == pytest.approx({entry["label"]: entry["score"] for entry in expected}, abs=2e-5)
        assert 1 <= len(row["prediction_set"]) <= 3
    problems = read_json_lines(tmp_path / "out.jsonl.errors.jsonl")
    assert [(entry["row"], entry["line"]) for entry in problems] == [(2, 4), (3, 5), (4, 6), (23, 25), (24, 26)]
    messages = [entry["problem"] for entry in problems]
    assert messages[:3] == ["1 fields, where the header has 2", "the text is empty", "3 fields, where the header has 2"]
    assert messages[3].startswith("not UTF-8 text")
    assert messages[4] == "a quotation mark is not closed"
    assert {path.name for path in tmp_path.iterdir()} == {"in.csv", "out.jsonl", *BESIDE}


def test_all_input_and_output_formats_give_the_same_predictions(checkpoint, texts, tmp_path):
    table = pd.DataFrame({"abstract": texts, "number": range(len(texts))})
    table.to_csv(tmp_path / "one.csv", index=False)
    table.to_csv(tmp_path / "one.tsv", index=False, sep="\t")
    table.to_parquet(tmp_path / "one.parquet")
    table.to_excel(tmp_path / "one.xlsx", index=False)
    table.to_csv(tmp_path / "tabs.csv", index=False, sep="\t", encoding="utf-16")
    (tmp_path / "folder").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "folder" / f"{number:02}.txt").write_text(text, encoding="utf-16")
    lines = table.to_json(orient="records", lines=True)
    (tmp_path / "one.jsonl").write_text(lines)
    (tmp_path / "one.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    table[:8].to_csv(tmp_path / "part-0.csv", index=False)
    table[8:].to_csv(tmp_path / "part-1.csv", index=False)
    outputs = {}
    for name in (
        "one.csv",
        "one.tsv",
        "one.parquet",
        "one.jsonl",
        "one.jsonl.gz",
        "one.xlsx",
        "part-*.csv",
        "tabs.csv",
        "-",
    ):
        output = tmp_path / f"{name.replace('*', 'x')}.out.jsonl"
        form = {"-": ("--input_format", "jsonl"), "tabs.csv": ("--encoding", "utf-16")}.get(name, ())
        words = ("--model", checkpoint, "--input", name if name == "-" else tmp_path / name, "--output", output, *form)
        if name == "-":
            run(*words, command="predict.py", given=lines)
        else:
            assert predict_here(*words) == 0
        outputs[name] = output.read_text()
    assert len(set(outputs.values())) == 1
    expected = read_json_lines(tmp_path / "one.csv.out.jsonl")
    assert [row["row"] for row in expected] == list(range(20))
    words = ("--model", checkpoint, "--input", tmp_path / "folder", "--encoding", "utf-16")
    assert predict_here(*words, "--output", tmp_path / "folder.jsonl") == 0
    ids = [{"id": f"{row.pop('row'):02}.txt", **row} for row in expected]  # the names of the files
    assert read_json_lines(tmp_path / "folder.jsonl") == ids

    words = ("--model", checkpoint, "--input", tmp_path / "one.csv", "--id_column", "number", "--probabilities")
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        predict_here(*words, "--output", tmp_path / name)
    rows = read_json_lines(tmp_path / "a.jsonl")
    assert [row["id"] for row in rows] == [str(i) for i in range(20)]
    records = pyarrow.parquet.read_table(tmp_path / "a.parquet").to_pylist()
    for row, cells, record in zip(rows, read_csv(tmp_path / "a.csv"), records, strict=True):
        assert (cells["id"], cells["label"], float(cells["score"])) == (row["id"], row["label"], row["score"])
        assert cells["path"] == " > ".join(row["path"])
        assert {k: float(cells[f"probability of {k}"]) for k in row["probabilities"]} == row["probabilities"]
        assert record == row


@contextmanager
def kill_during_cleanup() -> Iterator[None]:
    """Interrupt predict.py in this process after the output is renamed, and before its parts are deleted."""

    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
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
def other_checkpoint(checkpoint, tmp_path_factory) -> str:
    """Copy the checkpoint, with other heads."""
    folder = tmp_path_factory.mktemp("other") / "results"
    shutil.copytree(checkpoint, folder)
    heads = load_file(folder / "heads.safetensors")
    save_file({name: weight.flip(0) for name, weight in heads.items()}, folder / "heads.safetensors", {"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def unbroken(checkpoint, other_checkpoint, long_input, tmp_path_factory) -> list[Path]:
    """Return the outputs of both checkpoints, of runs that were not killed."""
    outputs = []
    for model in (checkpoint, other_checkpoint):
        outputs.append(tmp_path_factory.mktemp("unbroken") / "out.jsonl")
        assert predict_here("--model", model, "--input", long_input, "--output", outputs[-1]) == 1
    assert outputs[0].read_bytes() != outputs[1].read_bytes()
    return outputs


def test_a_long_folder_has_several_files_that_are_one_table(checkpoint, long_input, unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr("hierarchical_clinicalbert.prediction.output.BLOCKS_PER_FILE", 1)
    words = ("--model", checkpoint, "--input", long_input, "--output", f"{tmp_path / 'out'}/")
    assert predict_here(*words, "--output_format", "jsonl") == 1
    parts = sorted((tmp_path / "out").glob("part-*"))
    assert [part.name for part in parts] == [f"part-0000{i}.jsonl" for i in range(3)]
    assert b"".join(part.read_bytes() for part in parts) == unbroken[0].read_bytes()


def test_a_killed_run_is_resumed_and_writes_the_same_bytes(checkpoint, long_input, unbroken, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    words = ("--model", checkpoint, "--input", long_input, "--output", output)
    for *moment, kill, whole in (
        ("os.rename", "/000000001.jsonl", signal.SIGINT, False),
        ("open", "/000000002.jsonl", signal.SIGKILL, False),  # to be put together with the others
        ("os.rename", "/out.jsonl", signal.SIGKILL, False),
        ("shutil.rmtree", ".parts", signal.SIGKILL, True),
    ):
        more = ("--overwrite",) if kill == signal.SIGINT else ()
        done = complete("-c", STRIKE, ROOT / "predict.py", *moment, int(kill), *words, *more)
        assert done.returncode == (130 if kill == signal.SIGINT else -kill), done.stderr
        assert output.exists() == whole
        if kill == signal.SIGINT:
            assert done.stderr.endswith("stopped; the same command without --overwrite continues from here\n")
        if not whole:
            with pytest.raises(InputError, match="started with another probabilities"):
                predict_here(*words, "--probabilities")
    assert predict_here(*words) == 1
    assert "continuing at row 2,100" in capsys.readouterr().err
    assert_same_files(output, unbroken[0])
    assert [row["row"] for row in read_json_lines(f"{output}.errors.jsonl")] == [7, 2090]
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", *BESIDE}
    with pytest.raises(InputError, match="already exists"):
        predict_here(*words)


@pytest.mark.parametrize("cleared", [False, True])
def test_a_run_killed_during_cleanup_is_not_finished_for_another_input(cleared, checkpoint, texts, tmp_path):
    output = tmp_path / "out.jsonl"
    for name, some in (("one", texts[:2]), ("two", texts[2:4])):
        pd.DataFrame({"text": some}).to_csv(tmp_path / f"{name}.csv", index=False)
    words = ("--model", checkpoint, "--output", output, "--input")
    with kill_during_cleanup(), pytest.raises(KeyboardInterrupt):
        predict_here(*words, tmp_path / "one.csv")
    if cleared:  # all is gone but the folder
        for file in Path(f"{output}.parts").iterdir():
            file.unlink()
    predictions = output.read_bytes()
    with pytest.raises(InputError, match="already exists" if cleared else "the input changed"):
        predict_here(*words, tmp_path / "two.csv")
    assert output.read_bytes() == predictions
    if not cleared:
        assert predict_here(*words, tmp_path / "one.csv") == 0
        assert output.read_bytes() == predictions
        assert not Path(f"{output}.parts").exists()


def test_two_models_on_one_output_are_never_mixed(checkpoint, other_checkpoint, long_input, unbroken, tmp_path):
    output = tmp_path / "out.jsonl"
    first, second = (
        ("--model", model, "--input", long_input, "--output", output) for model in (checkpoint, other_checkpoint)
    )
    # the first process is stopped after one part, while it works on the next one
    moment = ("os.rename", "/000000001.jsonl", str(int(signal.SIGSTOP)))
    line = ["-c", STRIKE, str(ROOT / "predict.py"), *moment, *map(str, first)]
    with open(os.devnull, "r+") as nothing:
        process = Process(server(COMMANDS), line, ROOT, dict(os.environ), [nothing] * 3)
    try:
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert process.poll() is None
            time.sleep(0.01)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        for more in ((), ("--overwrite",)):
            with pytest.raises(InputError) as error:
                predict_here(*second, *more)
            assert str(error.value).startswith(f"--output {output}: another process is writing it")
            assert "\n" not in str(error.value)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    # killed, it holds nothing
    with pytest.raises(InputError, match="started with another model, fingerprint"):
        predict_here(*second)
    assert predict_here(*first) == 1
    assert_same_files(output, unbroken[0])
    assert predict_here(*second, "--overwrite") == 1
    assert_same_files(output, unbroken[1])
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", *BESIDE}


@pytest.fixture(scope="module")
def finished_parts(checkpoint, long_input, tmp_path_factory) -> Path:
    """Return the parts of a run that was killed while it cleaned up."""
    output = tmp_path_factory.mktemp("finished") / "out.jsonl"
    with kill_during_cleanup(), pytest.raises(KeyboardInterrupt):
        predict_here("--model", checkpoint, "--input", long_input, "--output", output)
    return Path(f"{output}.parts")


def test_blocks_of_a_killed_run_are_not_read_as_its_input(checkpoint, long_input, unbroken, tmp_path):
    shutil.copy(long_input, tmp_path / "in.csv")
    pattern, output = f"{tmp_path}/**/*[0-9n].[cj]s*", tmp_path / "out.jsonl"  # also the blocks in out.jsonl.parts
    words = ("--model", checkpoint, "--input", pattern, "--output", output)
    with kill_during_cleanup(), pytest.raises(KeyboardInterrupt):
        predict_here(*words)
    output.unlink()
    (Path(f"{output}.parts") / "000000001.jsonl").unlink()
    assert predict_here(*words) == 1
    assert output.read_bytes() == unbroken[0].read_bytes()


@pytest.mark.parametrize(
    ("moment", "left", "output", "more"),
    [
        (("os.rename", "/out.jsonl"), ["in.csv", *BESIDE], "out.jsonl", ()),
        (("shutil.rmtree", ".parts"), ["in.csv", "out.jsonl", *BESIDE], "out.jsonl", ()),
        (
            ("os.rename", "/manifest.json"),
            ["in.csv", "out/errors.jsonl", "out/part-00000.jsonl"],
            "out/part-00000.jsonl",
            ("--output_format", "jsonl"),
        ),
    ],
)
def test_a_killed_run_does_not_read_the_files_that_it_left(moment, left, output, more, checkpoint, texts, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    file = write_texts(folder, [*texts[:3], ""])
    assert predict_here("--model", checkpoint, "--input", file, "--output", tmp_path / "unbroken.jsonl") == 1
    given = f"{folder}/{output}" if not more else f"{folder}/{Path(output).parent}/"
    pattern = f"{folder}/**/*.*[snk]*"  # also the error file, the blocks and the lock
    words = ("--model", checkpoint, "--input", pattern, "--output", given, *more)
    done = complete("-c", STRIKE, ROOT / "predict.py", *moment, int(signal.SIGKILL), *words)
    assert done.returncode == -signal.SIGKILL, done.stderr
    files = (os.path.relpath(path, folder) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    assert left == sorted(path for path in files if ".parts" not in path)
    assert predict_here(*words) == 1
    assert (folder / output).read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()


def test_a_file_that_may_not_grow_is_one_line_and_the_run_continues(checkpoint, long_input, unbroken, tmp_path):
    words = ("--model", checkpoint, "--input", long_input, "--output", tmp_path / "out.jsonl")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            predict_here(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = user_error_message(error.value, {"resume": "the same command continues from here"})
    assert message == "cannot read or write a file: File too large; the same command continues from here"
    assert predict_here(*words) == 1
    assert (tmp_path / "out.jsonl").read_bytes() == unbroken[0].read_bytes()


@pytest.mark.parametrize(("group_bytes", "sizes"), [(2**26, [2098]), (1, [1023, 1024, 51])])
def test_a_parquet_file_has_few_row_groups(checkpoint, long_input, unbroken, tmp_path, monkeypatch, group_bytes, sizes):
    monkeypatch.setattr("hierarchical_clinicalbert.prediction.rows.ROW_GROUP_BYTES", group_bytes)
    predict_here("--model", checkpoint, "--input", long_input, "--output", tmp_path / "out.parquet")
    file = pyarrow.parquet.ParquetFile(tmp_path / "out.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == sizes
    assert file.read(["label"]).to_pylist() == [{"label": row["label"]} for row in read_json_lines(unbroken[0])]


DAMAGES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "a row is missing": lambda lines: lines[:-1],
    "a row is truncated": lambda lines: [*lines[:-1], lines[-1][:-20]],
    "a label is edited": lambda lines: [line.replace(b'"label": "', b'"label": "x', 1) for line in lines],
    "empty": lambda lines: [],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_named_and_the_run_continues_once_it_is_deleted(
    damage, checkpoint, long_input, finished_parts, unbroken, tmp_path
):
    output = tmp_path / "out.jsonl"
    words = ("--model", checkpoint, "--input", long_input, "--output", output)
    shutil.copytree(finished_parts, f"{output}.parts")
    part = Path(f"{output}.parts") / "000000001.jsonl"
    part.write_bytes(b"".join(DAMAGES[damage](part.read_bytes().splitlines(keepends=True))))
    with pytest.raises(InputError) as error:
        predict_here(*words)
    assert str(error.value) == f"{part} is damaged: delete it, and run the same command again"
    assert not output.exists()
    part.unlink()
    assert predict_here(*words) == 1
    assert_same_files(output, unbroken[0])


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_an_output_is_on_the_disk_before_its_parts_are_deleted(kind, checkpoint, texts, tmp_path, monkeypatch):
    write_texts(tmp_path, [*texts[:2], ""])
    output, parts = tmp_path / f"out.{kind}", tmp_path / f"out.{kind}.parts"
    events: list[tuple] = []  # identified by inode, which a rename keeps

    def fsync(handle: int, whole=os.fsync) -> None:
        whole(handle)
        events.append(("on the disk", os.fstat(handle).st_ino, os.fstat(handle).st_size))

    def replace(source: Path, target: Path, whole=os.replace) -> None:
        whole(source, target)
        events.append(("renamed", os.stat(target).st_ino))

    def rmtree(folder: Path, *arguments: object, whole=shutil.rmtree, **options: object) -> None:
        events.append(("deleted", Path(folder)))
        whole(folder, *arguments, **options)

    with monkeypatch.context() as patch:
        for owner, function in ((os, fsync), (os, replace), (shutil, rmtree)):
            patch.setattr(owner, function.__name__, function)
        assert predict_here("--model", checkpoint, "--input", tmp_path / "in.csv", "--output", output) == 1
    deleted = events.index(("deleted", parts))
    for file in (output, Path(f"{output}.errors.jsonl")):
        written = events.index(("on the disk", file.stat().st_ino, file.stat().st_size))
        renamed = events.index(("renamed", file.stat().st_ino))
        assert written < renamed
        assert any(event[:2] == ("on the disk", tmp_path.stat().st_ino) for event in events[renamed:deleted])


def test_unneeded_modules_are_not_imported(tmp_path):
    """Run predict.py for a merged checkpoint, and check which modules it imports. pyarrow imports pandas to write Parquet."""
    model = copy_checkpoint("self_contained", tmp_path / "model")
    (tmp_path / "in.csv").write_text("text\nA study of ulcers.\n")
    code = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import predict

def loaded():
    return [name for name in ("peft", "bitsandbytes", "pandas", "ray") if name in sys.modules]

after_import = loaded()
for kind in ("jsonl", "csv"):
    words = ["--model", {str(model)!r}, "--input", {str(tmp_path / "in.csv")!r}, "--output", {str(tmp_path / "out.")!r} + kind]
    assert predict.main(words) == 0
print(json.dumps([after_import, loaded()]))
"""
    assert run_outside(code, tmp_path, fresh=True) == [[], []]


def test_json_lines_have_the_columns_of_their_first_objects_together(tmp_path):
    def read(*rows: dict, text: str | None = None, key: str | None = None) -> list[tuple]:
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        records = read_records(find_sources(str(path)), text, key)
        return [(record.id, record.text, record.problem) for record in records]

    missing = "the text is missing"
    assert read({"id": 1}, {"id": 2, "text": "x"}) == [(None, None, missing), (None, "x", None)]
    assert read({}, {"text": "x"}) == [(None, None, missing), (None, "x", None)]
    named = [{"document": "doc-1.pdf"}, {"document": "doc-2.pdf", "text": "x"}]  # which alone would be taken for a text
    assert read(*named) == [(None, None, missing), (None, "x", None)]
    assert read({"text": "x"}, {"text": "y", "key": 7}, key="key") == [(None, "x", None), (7, "y", None)]
    with pytest.raises(InputError, match="has no column 'key'"):
        read({"text": "x"}, key="key")
    with pytest.raises(InputError, match="has no column called"):
        read({"notes": "x"}, {"id": 1})


def assert_same_files(one: Path, other: Path) -> None:
    """Compare two outputs and their error files."""
    assert one.read_bytes() == other.read_bytes()
    assert Path(f"{one}.errors.jsonl").read_bytes() == Path(f"{other}.errors.jsonl").read_bytes()


def test_carriage_returns_in_ids_do_not_shift_the_rows_of_a_csv_file(checkpoint, texts, tmp_path):
    ids = ["a\rb", "plain", "c\r\nd", 7, 'q"\r,', "e\nf", "\r"]
    lines = [json.dumps({"text": text, "id": key}) + "\n" for key, text in zip(ids, texts, strict=False)]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    words = ("--model", checkpoint, "--input", tmp_path / "in.jsonl", "--id_column", "id", "--probabilities")
    assert predict_here(*words, "--output", tmp_path / "out.csv") == 0
    assert predict_here(*words, "--output", tmp_path / "out.jsonl") == 0
    expected = [(str(row["id"]), row["label"], row["score"]) for row in read_json_lines(tmp_path / "out.jsonl")]
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["label"], float(row["score"])) for row in rows] == expected
    table = pd.read_csv(tmp_path / "out.csv", dtype={"id": str}, keep_default_na=False)
    assert list(zip(table["id"], table["label"], table["score"], strict=True)) == expected
    assert [key for key, _, _ in expected] == list(map(str, ids))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            "caf\xe9 au lait",
            "not UTF-8 text but fits cp1252: save it as UTF-8, or give --encoding cp1252; all: {errors}): correct the encoding; then --overwrite",
        ),
        (" ", "the text is empty; all: {errors}): correct it, or give another --text_column; then --overwrite"),
    ],
)
@pytest.mark.parametrize(("output", "errors"), [("out.jsonl", "out.jsonl.errors.jsonl"), ("out/", "out/errors.jsonl")])
def test_an_input_without_a_readable_row_is_an_error(output, errors, row, reason, checkpoint, texts, tmp_path):
    # more than one block
    (tmp_path / "in.csv").write_text("text,id\n" + f"{row},1\n" * 1100, encoding="cp1252")
    words = ("--model", checkpoint, "--input", tmp_path / "in.csv", "--output", f"{tmp_path}/{output}")
    with pytest.raises(InputError) as error:
        predict_here(*words)
    begin = "none of the 1,100 rows of --input can be read (the first: "
    assert str(error.value) == begin + reason.format(errors=tmp_path / errors)
    assert len(read_json_lines(tmp_path / errors)) == 1100
    assert {file for file in tmp_path.rglob("*") if file.is_file()} == {tmp_path / "in.csv", tmp_path / errors}
    # errors of an earlier run are not taken for those of this one
    write_texts(tmp_path, texts[:2])
    if not output.endswith("/"):
        with pytest.raises(InputError, match=r"errors\.jsonl already exists: give another --output, or --overwrite"):
            predict_here(*words)
    assert predict_here(*words, "--overwrite") == 0
    assert not (tmp_path / errors).exists()


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([datetime(2024, 2, 3, 4, 5), None], ["2024-02-03 04:05:00", None]),
        ([date(2024, 2, 3)], ["2024-02-03"]),
        ([Decimal("1.50")], ["1.50"]),
        ([b"caf\xc3\xa9", b"caf\xe9"], ["café", "the id is not UTF-8"]),
        ([1.5, float("nan"), float("-inf")], [1.5, None, "-inf"]),
        ([True, False], [True, False]),
        ([[1], None], ["the id is neither text nor a number", None]),
        ([{"a": 1}], ["the id is neither text nor a number"]),
    ],
)
def test_ids_become_json_values(ids, expected, tmp_path):
    table = pyarrow.table({"id": pyarrow.array(ids, from_pandas=False), "text": ["A study of ulcers."] * len(ids)})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    records = list(read_records(find_sources(str(tmp_path / "in.parquet")), None, "id"))
    assert [record.problem or record.id for record in records] == expected
    json.dumps([record.id for record in records], allow_nan=False)


def test_two_versions_of_an_encoder_are_not_mixed(checkpoint, texts, tmp_path):
    model, encoder = tmp_path / "model", tmp_path / "encoder"
    shutil.copytree(checkpoint, model)
    config = json.loads((model / "config.json").read_text())
    shutil.copytree(config["encoder_name_or_path"], encoder)
    (model / "config.json").write_text(json.dumps(config | {"encoder_name_or_path": str(encoder)}))
    words = ("--model", model, "--input", write_texts(tmp_path, texts[:2]), "--output", tmp_path / "out.jsonl")
    with kill_during_cleanup(), pytest.raises(KeyboardInterrupt):
        predict_here(*words)
    weights = load_file(encoder / "model.safetensors")
    save_file(
        {name: weight * 1.01 for name, weight in weights.items()}, encoder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InputError, match="started with another fingerprint"):
        predict_here(*words)


@pytest.mark.parametrize(
    ("given", "output", "message"),
    [
        ("a.csv", "a.csv", "--output a.csv is also an input: give another name"),
        ("linked.csv", "a.csv", "--output a.csv is also an input: give another name"),
        ("b.csv.errors.jsonl", "b.csv", "--output b.csv: b.csv.errors.jsonl is also an input: give another name"),
    ],
)
@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_an_input_is_not_taken_for_an_output(given, output, message, more, tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("text\nA study of ulcers.\n")
    (tmp_path / "linked.csv").symlink_to(tmp_path / "a.csv")
    (tmp_path / "b.csv.errors.jsonl").write_text('{"text": "A study of ulcers."}\n')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        predict_here("--model", "nothing", "--input", given, "--output", output, *more)
    assert str(error.value) == message
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_output_is_overwritten_only_once_the_new_run_can_start(checkpoint, texts, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    write_texts(tmp_path, texts[:2])
    output = tmp_path / "out.jsonl"
    words = ("--model", tmp_path / "model", "--input", tmp_path / "in.csv", tmp_path / "." / "in.csv")
    words += ("--output", output)
    assert predict_here(*words) == 0
    before = output.read_bytes()
    assert len(before.splitlines()) == 2  # an input that is given twice is read once
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["calibration"]["max_length"] -= 1
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    for wrong in (("--batch_size", 0), ("--coverage", 0.5)):
        with pytest.raises(InputError):
            predict_here(*words, "--overwrite", *wrong)
        assert output.read_bytes() == before
    assert predict_here(*words, "--overwrite", "--probabilities") == 0
    assert output.read_bytes() != before


def test_files_of_another_program_are_not_overwritten(checkpoint, texts, tmp_path):
    write_texts(tmp_path, texts[:2])
    (tmp_path / "spark").mkdir()
    theirs = tmp_path / "spark" / "part-00000-2f1a.c000.snappy.parquet"
    theirs.write_bytes(b"rows")
    for more in ((), ("--overwrite",)):
        with pytest.raises(InputError, match=r"spark/ holds \S+/part-00000-2f1a\S+, which another program wrote"):
            predict_here("--model", checkpoint, "--input", tmp_path / "in.csv", "--output", f"{tmp_path}/spark/", *more)
    assert theirs.read_bytes() == b"rows"
    theirs = tmp_path / "mine.csv.parts" / "a.txt"
    theirs.parent.mkdir()
    theirs.write_text("theirs")
    words = ("--model", checkpoint, "--input", tmp_path / "in.csv", "--output", tmp_path / "mine.csv", "--overwrite")
    with pytest.raises(InputError, match=r"mine.csv.parts/a.txt was written by another program"):
        predict_here(*words)
    assert theirs.read_text() == "theirs"
    (tmp_path / "uv.csv.lock").write_text("theirs")
    assert predict_here("--model", checkpoint, "--input", tmp_path / "in.csv", "--output", f"{tmp_path}/uv.csv") == 0
    assert (tmp_path / "uv.csv.lock").read_text() == "theirs"


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no second file system")
def test_an_output_folder_may_be_a_disk_of_its_own(checkpoint, texts, tmp_path):
    write_texts(tmp_path, texts[:2])
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        assert os.stat(other).st_dev != os.stat(tmp_path).st_dev
        (tmp_path / "out").symlink_to(other)
        assert predict_here("--model", checkpoint, "--input", tmp_path / "in.csv", "--output", f"{tmp_path}/out/") == 0
        assert {path.name for path in Path(other).iterdir()} == {"part-00000.parquet", "manifest.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"in.csv", "out"}


def test_names_of_files_may_be_urls_or_no_utf_8(checkpoint, texts, tmp_path):
    name, output = tmp_path / os.fsdecode(b"caf\xe9.csv"), tmp_path / "out"
    pd.DataFrame({"text": [texts[0], ""]}).to_csv(name, index=False)
    assert predict_here("--model", checkpoint, "--input", f"file://{name}", "--output", f"file://{output}/") == 1
    assert json.loads((output / "manifest.json").read_text())["input"][0]["name"] == f"{tmp_path}/caf\\xe9.csv"
    assert read_json_lines(output / "errors.jsonl")[0]["source"] == f"{tmp_path}/caf\\xe9.csv"
    assert len(pd.read_parquet(output / "part-00000.parquet")) == 1


def test_invisible_texts_and_empty_files_do_not_affect_other_rows(checkpoint, texts, tmp_path):
    (tmp_path / "in").mkdir()
    unseen = ["\u200b", "\ufeff\u2060", "\xad \x01", "\u0301 \u0308"]
    header = "Re\u0301sume\u0301,,\n"  # as macOS writes accents, and spreadsheets empty columns
    lines = [header, *(f'"{text}",,\n' for text in [texts[0], *unseen, texts[1]])]
    (tmp_path / "in" / "a.csv").write_text("".join(lines), encoding="utf-8")
    for name, content in (("b.csv", b""), ("c.csv", b"\xef\xbb\xbf\n"), ("d.csv.gz", gzip.compress(b""))):
        (tmp_path / "in" / name).write_bytes(content)
    words = ("--model", checkpoint, "--input", tmp_path / "in", "--text_column", "R\xe9sum\xe9")
    assert predict_here(*words, "--output", tmp_path / "out.jsonl") == 1
    assert [row["row"] for row in read_json_lines(tmp_path / "out.jsonl")] == [0, 5]
    problems = read_json_lines(tmp_path / "out.jsonl.errors.jsonl")
    assert [(row["row"], row["problem"]) for row in problems] == [(n, "the text is empty") for n in (1, 2, 3, 4)]


def test_costs_choose_the_leaf_and_their_content_is_an_option(checkpoint, texts, tmp_path):
    classify = pipeline("hierarchical-text-classification", model=checkpoint, trust_remote_code=True)
    leaves = classify.tree.labels[: classify.tree.num_leaves]
    costs = {one: {other: 0 if one == other else 9 - i for i, other in enumerate(leaves)} for one in leaves}
    table = pd.DataFrame(costs).T  # rows are the correct leaves
    table.to_csv(tmp_path / "costs.csv")
    words = ("--model", checkpoint, "--input", write_texts(tmp_path, texts), "--dtype", "fp32")
    words += ("--costs", tmp_path / "costs.csv")
    with kill_during_cleanup(), pytest.raises(KeyboardInterrupt):
        predict_here(*words, "--output", tmp_path / "out.jsonl")
    rows = read_json_lines(tmp_path / "out.jsonl")
    expected = classify(texts, costs=costs)
    assert [row["label"] for row in rows] == [one["label"] for one in expected]
    assert [row["label"] for row in rows] != [one["label"] for one in classify(texts)]
    assert [row["expected_cost"] for row in rows] == pytest.approx([one["expected_cost"] for one in expected], abs=2e-5)

    table.iloc[0, 1] += 1
    table.to_csv(tmp_path / "costs.csv")
    with pytest.raises(InputError, match="started with another costs:"):
        predict_here(*words, "--output", tmp_path / "out.jsonl")
    for kind in ("csv", "parquet"):
        predict_here(*words[:-1], "distance", "--output", tmp_path / f"out.{kind}")
    expected = [one["expected_cost"] for one in classify(texts, costs="distance")]
    assert pd.read_csv(tmp_path / "out.csv")["expected_cost"].tolist() == pytest.approx(expected, abs=2e-5)
    assert pd.read_parquet(tmp_path / "out.parquet")["expected_cost"].tolist() == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        ("what?.jsonl", ".jsonl"),
        ("is/?x.csv", ".csv"),
        ("s3://b/x.csv?region=y", ".csv"),
        ("s3://b/x/?a=b", ".parquet"),
    ],
)
def test_a_question_mark_begins_the_query_of_a_url_and_belongs_to_the_name_of_a_file(output, kind):
    assert output_kind(output, None) == kind


@pytest.mark.parametrize("added", [" > 9", "; 9"])
def test_labels_that_hold_a_separator_are_lists_of_json_in_csv(added, checkpoint, texts, tmp_path):
    folder, name = shutil.copytree(checkpoint, tmp_path / "checkpoint"), f"neoplasms{added}"
    config = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(config.replace('"neoplasms"', json.dumps(name)), encoding="utf-8")
    words = ("--model", folder, "--input", write_texts(tmp_path, [*texts, "A sarcoma."]), "--output")
    for kind in ("csv", "jsonl"):
        predict_here(*words, tmp_path / f"out.{kind}")
    pairs = list(zip(read_csv(tmp_path / "out.csv"), read_json_lines(tmp_path / "out.jsonl"), strict=True))
    assert name in {row["label"] for _, row in pairs}
    for cells, row in pairs:
        for field, separator in (("path", " > "), ("labels", "; ")):
            found = json.loads(cells[field]) if cells[field].startswith("[") else cells[field].split(separator)
            assert found == row[field]


def novelty(result: dict) -> dict:
    """Return the fields of a row about a strange text."""
    known = {"known": result["known"], "known_labels": [node["known"] for node in result["labels"]]}
    return {"p_value": pytest.approx(result["p_value"], abs=1e-6), **known}


@pytest.mark.parametrize("form", ["checkpoint", "labels_checkpoint"])
def test_rows_of_both_forms_have_the_fields_of_a_result(form, request, texts, tmp_path):
    model, texts = request.getfixturevalue(form), [*texts[:3], "Nothing.", "Sepsis and fever. " * 200]
    words = ("--model", model, "--input", write_texts(tmp_path, texts), "--dtype", "fp32", "--output")
    predict_here(*words, tmp_path / "out.jsonl")
    results = pipeline("hierarchical-text-classification", model=model, trust_remote_code=True)(texts)
    for number, (row, result) in enumerate(zip(read_json_lines(tmp_path / "out.jsonl"), results, strict=True)):
        labels = result["labels"]
        assert row == {
            "row": number,
            **{name: result[name] for name in ("label", "tokens", "tokens_read", "truncated")},
            "score": pytest.approx(result["score"], abs=1e-5),
            "path": [node["label"] for node in result["path"]],
            "labels": [node["label"] for node in labels],
            "scores": pytest.approx([node["score"] for node in labels], abs=1e-5),
            "paths": [[step["label"] for step in node["path"]] for node in labels],
            **({} if form == "labels_checkpoint" else novelty(result)),
        }
    assert row["truncated"]


def test_a_checkpoint_with_the_code_of_another_release_is_refused_in_one_line(checkpoint, texts, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    code = (folder / "pipeline_hierarchical.py").read_text()
    (folder / "pipeline_hierarchical.py").write_text(code.replace("    result_version = RESULT_VERSION\n", ""))
    words = ("--input", write_texts(tmp_path, texts), "--output", tmp_path / "out.jsonl")
    with pytest.raises(
        InputError, match=r"its code returns results of version 1, .* version 2: copy the files"
    ) as error:
        predict_here("--model", folder, *words)
    assert "\n" not in str(error.value)


def test_an_output_that_older_code_began_is_refused(checkpoint, finished_parts, long_input, tmp_path):
    output = tmp_path / "out.jsonl"
    shutil.copytree(finished_parts, f"{output}.parts")
    for part in Path(f"{output}.parts").glob("0*.jsonl"):
        header, _, rows = part.read_bytes().partition(b"\n")[2].partition(b"\n")
        old = json.loads(header)
        del old["options"]["result_version"]
        content = json.dumps(old).encode() + b"\n" + rows
        part.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    with pytest.raises(InputError, match="was started with another result_version: give the same, or --overwrite"):
        predict_here("--model", checkpoint, "--input", long_input, "--output", output)


def test_sets_for_a_recall_are_the_pipelines_in_every_format_and_the_csv_is_training_data(
    labels_checkpoint, texts, tmp_path
):
    texts = [f"{text} She had colitis and angina." for text in texts[:9]] + ["Nothing of the kind."]
    words = ("--model", labels_checkpoint, "--input", write_texts(tmp_path, texts), "--dtype", "fp32", "--recall", 0.8)
    for name in ("out.jsonl", "out.csv", "out.parquet"):
        assert predict_here(*words, "--output", tmp_path / name) == 0
    classify = pipeline("hierarchical-text-classification", model=labels_checkpoint, trust_remote_code=True)
    expected = classify(texts, recall=0.8)
    assert any(one["labels"] for one in expected)
    rows = read_json_lines(tmp_path / "out.jsonl")
    for row, one in zip(rows, expected, strict=True):
        assert row["labels"] == [node["label"] for node in one["labels"]]
        assert row["prediction_set"] == [node["label"] for node in one["prediction_set"]]
    for cells, row in zip(read_csv(tmp_path / "out.csv"), rows, strict=True):
        assert (cells["labels"], cells["prediction_set"]) == (
            "; ".join(row["labels"]),
            "; ".join(row["prediction_set"]),
        )
    for record, row in zip(pd.read_parquet(tmp_path / "out.parquet").to_dict("records"), rows, strict=True):
        assert [list(record[name]) for name in ("labels", "prediction_set")] == [row["labels"], row["prediction_set"]]

    pd.read_csv(tmp_path / "out.csv").assign(text=texts).to_csv(tmp_path / "train.csv", index=False)
    settings = {"label_column": ["labels"], "label_delimiter": ";", "validation_size": 0.0}
    data = load(train_file=tmp_path / "train.csv", known=classify.tree, **settings)
    read = [{classify.tree.labels[node] for node in nodes} for nodes in data.splits["train"]["nodes"]]
    assert read == [{*row["labels"]} for row in rows]


def test_with_several_labels_costs_replace_the_thresholds(labels_checkpoint, texts, tmp_path):
    words = ("--model", labels_checkpoint, "--input", write_texts(tmp_path, texts), "--dtype", "fp32")
    words += ("--probabilities", "--costs", "missing=9,inventing=1")
    predict_here(*words, "--output", tmp_path / "out.jsonl")
    for row in read_json_lines(tmp_path / "out.jsonl"):
        assert all(score >= 0.1 for score in row["scores"])
        reached = {label for label, probability in row["probabilities"].items() if probability >= 0.1}
        inner = {"specific disease"} if reached - {"specific disease", "general pathological conditions"} else set()
        assert {*row["labels"]} == reached - inner


def entropy_by_level(nodes: dict[str, float], tree: Taxonomy, several: bool) -> np.ndarray:
    """Return what each level adds to the entropy of a prediction, from the probability of every node."""
    p = np.array([nodes[label] for label in tree.labels])
    if not several:  # of the node at a level; a leaf above the level counts as this node
        cells = [{tree.path(leaf)[:level][-1] for leaf in range(tree.num_leaves)} for level in range(1, tree.depth + 1)]
        return np.diff([0.0, *(entropy(p[[*nodes]]) for nodes in cells)])
    added, levels = np.zeros(tree.depth), np.array(tree.levels) - 1
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
    words = ("--model", model, "--input", write_texts(tmp_path, texts), "--dtype", "fp32", "--uncertainty")
    predict_here(*words, "--output", tmp_path / "out.jsonl")
    rows = read_json_lines(tmp_path / "out.jsonl")
    classify = pipeline("hierarchical-text-classification", model=model, trust_remote_code=True)
    for row, result in zip(rows, classify(texts, levels=True), strict=True):
        nodes = {label: probability for level in result["levels"] for label, probability in level.items()}
        expected = entropy_by_level(nodes, classify.tree, several)
        assert row["uncertainty"] == pytest.approx(expected.sum(), abs=1e-4)
        assert row["unsure_level"] == 1 + expected.argmax()
    for kind, read in (("csv", pd.read_csv), ("parquet", pd.read_parquet)):
        predict_here(*words, "--output", tmp_path / f"out.{kind}")
        table = read(tmp_path / f"out.{kind}")
        assert table["uncertainty"].tolist() == [row["uncertainty"] for row in rows]
        assert table["unsure_level"].tolist() == [row["unsure_level"] for row in rows]


@pytest.mark.skipif(not has_int8_products(), reason="this processor has no 8-bit products")
@pytest.mark.parametrize("form", ["checkpoint", "long_checkpoint"])
def test_int8_predicts_nearly_as_float32(form, request, texts, long_texts, tmp_path):
    texts = write_texts(tmp_path, [*texts, *long_texts.values()])
    words = ("--model", request.getfixturevalue(form), "--input", texts, "--probabilities", "--output")
    predict_here(*words, tmp_path / "a.jsonl", "--dtype", "fp32")
    predict_here(*words, tmp_path / "b.jsonl", "--dtype", "int8")
    pairs = list(zip(*(read_json_lines(tmp_path / name) for name in ("a.jsonl", "b.jsonl")), strict=True))
    assert any(a != b for a, b in pairs)
    for a, b in pairs:
        assert b["probabilities"] == pytest.approx(a["probabilities"], abs=0.02)
    read_to_the_end = [b["label"] for _, b in pairs[-5:]] == list(long_texts)
    assert read_to_the_end == (form == "long_checkpoint")


def test_without_native_bfloat16_the_default_is_float32(checkpoint, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "hierarchical_clinicalbert.prediction.model.has_bf16", lambda cpu: False
    )  # int8 may be available all the same
    words = ("--model", checkpoint, "--input", write_texts(tmp_path, texts), "--probabilities", "--output")
    predict_here(*words, tmp_path / "a.jsonl")
    predict_here(*words, tmp_path / "b.jsonl", "--dtype", "fp32")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
