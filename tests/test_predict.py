"""predict.py: against the stock pipeline, over every kind of file, killed, and with rows that cannot be read."""

import csv
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from conftest import CORPUS, ROOT, read_csv, run
from safetensors.torch import load_file, save_file
from transformers import pipeline

from errors import InputError
from predict import main
from training.records import read_records


@pytest.fixture(scope="module")
def checkpoint(tiny_encoder, tmp_path_factory) -> str:
    """A trained checkpoint, calibrated and with a lexical head, and of an encoder that takes no time."""
    output = tmp_path_factory.mktemp("checkpoint") / "results"
    run(
        ROOT / "recipes" / "quickstart.yaml", "--model_name_or_path", tiny_encoder, "--max_steps", 5, "--eval_strategy",
        "no", "--save_strategy", "no", "--load_best_model_at_end", "false", "--output_dir", output,
    )  # fmt: skip
    return str(output)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [row["text"] for row in read_csv(CORPUS / "test.csv")][:20]


def predict(*words: object, check: bool = True, given: str | None = None) -> subprocess.CompletedProcess:
    line = [sys.executable, str(ROOT / "predict.py"), *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, input=given)
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


def inside(*words: object) -> int:
    """predict.py in this process, which saves the seconds that it takes to start."""
    return main([str(word) for word in words])


def read_json_lines(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_answers_are_those_of_the_stock_pipeline_and_bad_rows_stand_apart(checkpoint, texts, tmp_path):
    rows = [["id", "text"], *([f"n{i}", text] for i, text in enumerate(texts))]
    rows[3:3] = [["short"], ["empty", "  "], ["long", "a", "b"]]
    with (tmp_path / "in.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    with (tmp_path / "in.csv").open("ab") as file:
        file.write(b'latin,"caf\xe9 au lait"\nopen,"never closed\n')
    words = ("--model", checkpoint, "--input", tmp_path / "in.csv", "--id_column", "id", "--dtype", "fp32")
    done = predict(*words, "--output", tmp_path / "out.jsonl", "--probabilities", "--coverage", 0.9, check=False)
    assert done.returncode == 1
    assert f"done: {tmp_path / 'out.jsonl'}; 5 rows could not be read" in done.stderr
    assert "never closed" not in done.stderr

    found = read_json_lines(tmp_path / "out.jsonl")
    stock = pipeline("text-classification", model=checkpoint, trust_remote_code=True)
    for row, expected, i in zip(found, stock(texts, truncation=True, top_k=None), range(20), strict=True):
        assert row["id"] == f"n{i}"
        assert row["label"] == expected[0]["label"] == row["path"][-1]
        assert row["score"] == pytest.approx(expected[0]["score"], abs=2e-5)
        assert row["probabilities"] == pytest.approx({one["label"]: one["score"] for one in expected}, abs=2e-5)
        assert 1 <= len(row["answer"]) <= 3
    problems = read_json_lines(tmp_path / "out.jsonl.errors.jsonl")
    assert [(one["row"], one["line"]) for one in problems] == [(2, 4), (3, 5), (4, 6), (23, 25), (24, 26)]
    said = [one["problem"] for one in problems]
    assert said[:4] == [
        "1 fields, where the header has 2", "the text is empty", "3 fields, where the header has 2", "the text is not UTF-8",
    ]  # fmt: skip
    assert said[4].startswith("not CSV: ")
    assert {path.name for path in tmp_path.iterdir()} == {"in.csv", "out.jsonl", "out.jsonl.errors.jsonl"}


def test_every_kind_of_input_and_output_says_the_same(checkpoint, texts, tmp_path):
    table = pd.DataFrame({"abstract": texts, "number": range(len(texts))})
    table.to_csv(tmp_path / "one.csv", index=False)
    table.to_csv(tmp_path / "one.tsv", index=False, sep="\t")
    table.to_parquet(tmp_path / "one.parquet")
    lines = table.to_json(orient="records", lines=True)
    (tmp_path / "one.jsonl").write_text(lines)
    (tmp_path / "one.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    table[:8].to_csv(tmp_path / "part-0.csv", index=False)
    table[8:].to_csv(tmp_path / "part-1.csv", index=False)
    found = {}
    for name in ("one.csv", "one.tsv", "one.parquet", "one.jsonl", "one.jsonl.gz", "part-*.csv", "-"):
        output = tmp_path / f"{name.replace('*', 'x')}.out.jsonl"
        form = ("--input_format", "jsonl") if name == "-" else ()
        words = ("--model", checkpoint, "--input", name if name == "-" else tmp_path / name, "--output", output, *form)
        if name == "-":
            predict(*words, given=lines)
        else:
            assert inside(*words) == 0
        found[name] = output.read_text()
    assert len(set(found.values())) == 1
    expected = read_json_lines(tmp_path / "one.csv.out.jsonl")
    assert [row["row"] for row in expected] == list(range(20))

    words = ("--model", checkpoint, "--input", tmp_path / "one.csv", "--id_column", "number", "--probabilities")
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        inside(*words, "--output", tmp_path / name)
    rows = read_json_lines(tmp_path / "a.jsonl")
    assert [row["id"] for row in rows] == [str(i) for i in range(20)]
    for row, cells, record in zip(
        rows, read_csv(tmp_path / "a.csv"), pd.read_parquet(tmp_path / "a.parquet").to_dict("records"), strict=True
    ):
        assert (cells["id"], cells["label"], float(cells["score"])) == (row["id"], row["label"], row["score"])
        assert cells["path"] == " > ".join(row["path"])
        assert {k: float(cells[f"probability of {k}"]) for k in row["probabilities"]} == row["probabilities"]
        assert {**record, "path": list(record["path"])} == row


def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_bytes(checkpoint, texts, tmp_path):
    rows = pd.DataFrame({"text": [f"{i} {texts[i % 20][:60]}" for i in range(6500)]})
    rows.loc[[7, 1500, 4400], "text"] = ""
    rows.to_csv(tmp_path / "in.csv", index=False)
    words = ("--model", checkpoint, "--input", tmp_path / "in.csv", "--output")
    unbroken, broken = tmp_path / "unbroken.jsonl", tmp_path / "broken.jsonl"
    assert predict(*words, unbroken, check=False).returncode == 1
    line, parts = [sys.executable, str(ROOT / "predict.py"), *map(str, (*words, broken))], 0
    for kill in (signal.SIGINT, signal.SIGKILL, signal.SIGKILL):
        process = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(Path(f"{broken}.parts").glob("0*.jsonl"))) <= parts:
            time.sleep(0.01)
        process.send_signal(kill)
        assert process.wait(timeout=120) == (130 if kill == signal.SIGINT else -kill)
        assert not broken.exists()
        parts = len(list(Path(f"{broken}.parts").glob("0*.jsonl")))
    for other, message in (
        (("--probabilities",), "begun with another probabilities"),
        (("--coverage", 0.5, "--batch_size", 3), "begun with another coverage, batch_size"),
    ):
        with pytest.raises(InputError, match=message):
            inside(*words, broken, *other)
    original = (tmp_path / "in.csv").read_bytes()
    (tmp_path / "in.csv").write_bytes(original.replace(b"1 ", b"1x ", 1))
    with pytest.raises(InputError, match="the input, or an option, is another one"):
        inside(*words, broken)
    (tmp_path / "in.csv").write_bytes(original)
    done = predict(*words, broken, check=False)
    assert done.returncode == 1
    assert "went on after" in done.stderr
    assert_same_files(broken, unbroken)
    assert [row["row"] for row in read_json_lines(f"{broken}.errors.jsonl")] == [7, 1500, 4400]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"in.csv", *(f"{path.name}{end}" for path in (broken, unbroken) for end in ("", ".errors.jsonl"))}


def test_a_run_that_was_killed_as_it_cleared_up_is_not_done_for_another_input(checkpoint, texts, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    for name, some in (("one", texts[:2]), ("two", texts[2:4])):
        pd.DataFrame({"text": some}).to_csv(tmp_path / f"{name}.csv", index=False)

    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    words = ("--model", checkpoint, "--output", output, "--input")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            inside(*words, tmp_path / "one.csv")
    answers = output.read_bytes()
    with pytest.raises(InputError, match="the input, or an option, is another one"):
        inside(*words, tmp_path / "two.csv")
    assert inside(*words, tmp_path / "one.csv") == 0
    assert output.read_bytes() == answers
    assert not Path(f"{output}.parts").exists()


def test_json_lines_have_the_columns_of_their_first_objects_together(tmp_path):
    def read(*rows: dict, text: str | None = None, key: str | None = None) -> list[tuple]:
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        records = read_records([(str(path), "jsonl")], text, key)
        return [(record.id, record.text, record.problem) for record in records]

    missing = "the text is missing"
    assert read({"id": 1}, {"id": 2, "text": "x"}) == [(None, None, missing), (None, "x", None)]
    assert read({}, {"text": "x"}) == [(None, None, missing), (None, "x", None)]
    named = [{"document": "doc-1.pdf"}, {"document": "doc-2.pdf", "text": "x"}]  # which alone would be taken for a text
    assert read(*named) == [(None, None, missing), (None, "x", None)]
    texts = [{"text": str(i)} for i in range(9)]
    found = read(*texts, {"text": "9", "abstract": "of one row alone"})
    assert [text for _, text, _ in found] == [str(i) for i in range(10)]
    assert read({"text": "x"}, {"text": "y", "key": 7}, key="key") == [(None, "x", None), (7, "y", None)]
    with pytest.raises(InputError, match="has no column 'key'"):
        read({"text": "x"}, key="key")
    with pytest.raises(InputError, match="no column is called"):
        read({"body": "x"}, {"id": 1})


def test_a_stray_quotation_mark_in_tsv_is_named_and_the_rows_after_it_are_read(tmp_path):
    def read(text: str) -> list[tuple]:
        (tmp_path / "in.tsv").write_text(text)
        records = read_records([(str(tmp_path / "in.tsv"), "tsv")], None, None)
        return [(record.line, record.text, record.problem) for record in records]

    said = "a quotation mark begins a text that takes in the rows below it"
    for columns, rows in (
        ("text\tyear", '"Stroke" was\t1\n"Heart was\t2\ntwo\t3\nend"\t4\nfour\t5\n"two\nlines"\t6\n'),
        ("year\ttext", '1\t"Stroke" was\n2\t"Heart was\n3\ttwo\n4\tend"\n5\tfour\n6\t"two\nlines"\n'),
    ):
        broken, taken, *others = read(f"{columns}\n{rows}")
        assert broken[1] is None
        assert "not TSV" in broken[2]
        assert (taken[0], taken[1]) == (5, None)
        assert said in taken[2]
        assert others == [(6, "four", None), (8, "two\nlines", None)]


@pytest.mark.parametrize(
    "column", [pyarrow.array([10**17], pyarrow.timestamp("ms")), pyarrow.array([2**31 - 1], pyarrow.date32())]
)
def test_ids_that_python_has_no_values_for_are_named(column, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "id": column}), tmp_path / "in.parquet")
    with pytest.raises(InputError, match=r"the column 'id' holds what cannot be read.*give another --id_column"):
        list(read_records([(str(tmp_path / "in.parquet"), "parquet")], None, "id"))


def assert_same_files(one: Path, other: Path) -> None:
    """With those of their errors."""
    assert one.read_bytes() == other.read_bytes()
    assert Path(f"{one}.errors.jsonl").read_bytes() == Path(f"{other}.errors.jsonl").read_bytes()


def launch(*words: object) -> subprocess.CompletedProcess:
    """predict.py in two processes."""
    config = ROOT / "recipes" / "accelerate" / "ddp.yaml"
    line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2",
            str(ROOT / "predict.py"), *map(str, words)]  # fmt: skip
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_two_processes_write_what_one_does_in_the_order_of_the_input(checkpoint, texts, tmp_path):
    rows = pd.DataFrame({"text": [f"{i} {texts[i % 20][:60]}" for i in range(3500)]})
    rows.loc[[7, 3400], "text"] = ""
    rows.to_csv(tmp_path / "in.csv", index=False)
    words = ("--model", checkpoint, "--input", tmp_path / "in.csv", "--probabilities", "--output")
    assert inside(*words, tmp_path / "one.jsonl") == 1
    done = launch(*words, tmp_path / "two.jsonl")
    assert "2 rows could not be read" in done.stderr
    assert_same_files(tmp_path / "two.jsonl", tmp_path / "one.jsonl")
    assert not list(tmp_path.glob("*.parts"))


def test_shards_in_shards_out_and_a_lost_one_costs_itself_alone(checkpoint, texts, tmp_path):
    for i in range(3):
        frame = pd.DataFrame({"text": [f"{i} {text}" for text in texts], "key": [f"{i}-{j}" for j in range(20)]})
        frame.to_parquet(tmp_path / f"part-{i}.parquet")
    good = (tmp_path / "part-1.parquet").read_bytes()
    words = ("--model", checkpoint, "--input", tmp_path / "part-*.parquet", "--id_column", "key", "--output")
    inside(*words, f"{tmp_path}/one/")
    # a shard that is broken in its middle, where the schema does not show it
    (tmp_path / "part-1.parquet").write_bytes(good[:60] + bytes(100) + good[160:])
    with pytest.raises(InputError, match=r"part-1\.parquet"):
        inside(*words, f"{tmp_path}/two/")
    (tmp_path / "part-1.parquet").write_bytes(good)
    done = launch(*words, f"{tmp_path}/two/")
    assert done.returncode == 0, done.stderr
    for i in range(3):
        expected = (tmp_path / "one" / f"part-{i}.parquet").read_bytes()
        assert (tmp_path / "two" / f"part-{i}.parquet").read_bytes() == expected
        same_input = [(tmp_path / name / ".inputs" / f"part-{i}.parquet").read_text() for name in ("one", "two")]
        assert same_input[0] == same_input[1]
        read = pd.read_parquet(tmp_path / "two" / f"part-{i}.parquet")
        assert list(read["id"]) == [f"{i}-{j}" for j in range(20)]
    (tmp_path / "two" / "part-2.parquet").unlink()
    stamp = (tmp_path / "two" / "part-0.parquet").stat().st_mtime_ns
    inside(*words, f"{tmp_path}/two/")
    assert (tmp_path / "two" / "part-0.parquet").stat().st_mtime_ns == stamp
    assert (tmp_path / "two" / "part-2.parquet").read_bytes() == expected
    with pytest.raises(InputError, match="begun with another probabilities"):
        inside(*words, f"{tmp_path}/two/", "--probabilities")


def test_an_output_in_a_folder_is_kept_for_the_input_that_it_was_made_of(checkpoint, texts, tmp_path, monkeypatch):
    for name in ("2023/notes.csv", "2023/more.csv", "2024/notes.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pd.DataFrame({"text": [f"{name} {text}" for text in texts]}).to_csv(tmp_path / name, index=False)
    monkeypatch.chdir(tmp_path)
    words, output = ("--model", checkpoint, "--output", "out/", "--input"), tmp_path / "out" / "notes.csv"
    assert inside(*words, "2023/notes.csv") == 0
    answers, stamp = output.read_bytes(), output.stat().st_mtime_ns
    assert inside(*words, "2023/*.csv") == 0
    assert (tmp_path / "out" / "more.csv").exists()
    assert output.stat().st_mtime_ns == stamp
    another = r"out/notes\.csv was made of another input, or with other options: give another folder, or --over"
    with pytest.raises(InputError, match=another):
        inside(*words, "2024/notes.csv")
    assert output.read_bytes() == answers
    assert inside(*words, "2024/notes.csv", "--overwrite") == 0
    (tmp_path / "out" / ".inputs" / "notes.csv").unlink()
    with pytest.raises(InputError, match=another):
        inside(*words, "2024/notes.csv")

    # other options begin anew for one file: what the folder holds of others is not of these options
    assert inside(*words, "2023/notes.csv", "--overwrite", "--probabilities") == 0
    with pytest.raises(InputError, match=r"out/more\.csv was made of another input, or with other options"):
        inside(*words, "2023/*.csv", "--probabilities")
    assert inside(*words, "2023/*.csv", "--overwrite") == 0

    # killed before the output is at its place, and once it is
    for owner, function in ((Path, "replace"), (shutil, "rmtree")):
        output.unlink(missing_ok=True)
        whole = getattr(owner, function)

        def killed(path, *more, whole=whole, **options):
            if Path(path).name in ("notes.csv.new", "notes.csv.parts"):
                raise KeyboardInterrupt
            return whole(path, *more, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, function, killed)
            with pytest.raises(KeyboardInterrupt):
                inside(*words, "2023/notes.csv")
        assert output.exists() == (owner is shutil)
        assert inside(*words, "2023/notes.csv") == 0
        assert output.read_bytes() == answers
        assert not list(output.parent.glob("*.parts"))


def test_carriage_returns_in_ids_do_not_shift_the_rows_of_a_csv_file(checkpoint, texts, tmp_path):
    ids = ["a\rb", "plain", "c\r\nd", 7, 'q"\r,', "e\nf", "\r"]
    lines = [json.dumps({"text": text, "id": key}) + "\n" for key, text in zip(ids, texts, strict=False)]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    words = (
        "--model",
        checkpoint,
        "--input",
        tmp_path / "in.jsonl",
        "--id_column",
        "id",
        "--probabilities",
        "--output",
    )
    assert inside(*words, tmp_path / "out.csv") == 0
    assert inside(*words, tmp_path / "out.jsonl") == 0
    expected = [(str(row["id"]), row["label"], row["score"]) for row in read_json_lines(tmp_path / "out.jsonl")]
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["label"], float(row["score"])) for row in rows] == expected
    table = pd.read_csv(tmp_path / "out.csv", dtype={"id": str}, keep_default_na=False)
    assert list(zip(table["id"], table["label"], table["score"], strict=True)) == expected
    assert [key for key, _, _ in expected] == list(map(str, ids))


def test_errors_of_a_former_run_are_not_said_to_be_of_this_one(checkpoint, texts, tmp_path):
    words = ("--model", checkpoint, "--input", tmp_path / "in.csv", "--output", tmp_path / "out.jsonl")
    pd.DataFrame({"text": [texts[0], ""]}).to_csv(tmp_path / "in.csv", index=False)
    assert inside(*words) == 1
    (tmp_path / "out.jsonl").unlink()
    pd.DataFrame({"text": texts[:2]}).to_csv(tmp_path / "in.csv", index=False)
    assert inside(*words) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"in.csv", "out.jsonl"}


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
def test_an_id_is_what_json_knows(ids, expected, tmp_path):
    table = pyarrow.table({"id": pyarrow.array(ids, from_pandas=False), "text": ["A study of ulcers."] * len(ids)})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    records = list(read_records([(str(tmp_path / "in.parquet"), "parquet")], None, "id"))
    assert [record.problem or record.id for record in records] == expected
    json.dumps([record.id for record in records], allow_nan=False)


def test_dates_and_numbers_that_are_none_are_ids_of_answers(checkpoint, texts, tmp_path):
    table = pyarrow.table({"text": texts[:2], "day": [date(2024, 2, 3), None], "number": [float("nan"), 2.5]})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    for column, ids in (("day", ["2024-02-03", None]), ("number", [None, 2.5])):
        output = tmp_path / f"{column}.jsonl"
        words = ("--model", checkpoint, "--input", tmp_path / "in.parquet", "--id_column", column, "--output", output)
        assert inside(*words) == 0
        assert "NaN" not in output.read_text()
        assert [row["id"] for row in read_json_lines(output)] == ids


def test_two_versions_of_an_encoder_are_not_mixed(checkpoint, texts, tmp_path):
    model, encoder = tmp_path / "model", tmp_path / "encoder"
    shutil.copytree(checkpoint, model)
    config = json.loads((model / "config.json").read_text())
    shutil.copytree(config["encoder_name_or_path"], encoder)
    (model / "config.json").write_text(json.dumps(config | {"encoder_name_or_path": str(encoder)}))
    pd.DataFrame({"text": texts[:2]}).to_csv(tmp_path / "in.csv", index=False)
    words = ("--model", model, "--input", tmp_path / "in.csv", "--output", f"{tmp_path}/out/")
    assert inside(*words) == 0
    weights = load_file(encoder / "model.safetensors")
    save_file(
        {name: weight * 1.01 for name, weight in weights.items()}, encoder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InputError, match="begun with another fingerprint"):
        inside(*words)


@pytest.mark.parametrize(
    ("given", "output", "message"),
    [
        ("a.csv", "a.csv", "--output a.csv is also an input: give another name"),
        ("linked.csv", "a.csv", "--output a.csv is also an input: give another name"),
        ("*.csv", "./", "--output a.csv is also an input: give another name"),
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
        inside("--model", "nothing", "--input", given, "--output", output, *more)
    assert str(error.value) == message
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_int8_answers_nearly_as_float32_does(checkpoint, texts, tmp_path):
    optional = ROOT / ".venv" / "optional"  # see the Makefile
    if not optional.exists():
        pytest.skip("torchao is not in .venv/optional, where make test puts it")
    pd.DataFrame({"text": texts}).to_csv(tmp_path / "in.csv", index=False)
    words = ("--model", checkpoint, "--input", tmp_path / "in.csv", "--probabilities", "--output")
    inside(*words, tmp_path / "a.jsonl", "--dtype", "fp32")
    int8 = (*words, tmp_path / "b.jsonl", "--dtype", "int8")
    run(*int8, command="predict.py", settings={"PYTHONPATH": str(optional)})
    pairs = list(zip(*(read_json_lines(tmp_path / name) for name in ("a.jsonl", "b.jsonl")), strict=True))
    assert any(a != b for a, b in pairs)
    for a, b in pairs:
        assert b["probabilities"] == pytest.approx(a["probabilities"], abs=0.02)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--input", "none.csv"), "there is no such file"),
        (("--input", "-"), "--input_format"),
        (("--input", "in.txt"), "does not tell its kind"),
        (("--input", "empty.csv"), "is empty"),
        (("--input", "header.csv"), "has no rows"),
        (("--input", "in.csv", "--text_column", "body"), "no column 'body' (--text_column); it has 'text', 'label'"),
        (("--input", "in.csv", "--id_column", "key"), "no column 'key' (--id_column)"),
        (("--input", "twice.csv"), "two columns called 'text'"),
        (("--input", "cut.csv.gz"), "damaged or was not copied to its end"),
        (("--input", "wrong.parquet"), "not a Parquet file"),
        (("--input", "in.csv", "--coverage", "2"), "--coverage must be between 0 and 1"),
        (("--input", "in.csv", "--batch_size", "0"), "--batch_size must be at least 1"),
        (("--input", "in.csv", "--output", "out.txt"), "must end in one of"),
        (("--input", "in.csv", "--output", "there.jsonl"), "is there already"),
        (("--input", "in.csv", "--model", "nothing"), "cannot load the model nothing"),
        (("--input", "in.csv", "--outptu", "x"), "unrecognized arguments"),
    ],
)
def test_what_cannot_be_done_is_one_line(checkpoint, words, message, tmp_path, monkeypatch):
    (tmp_path / "in.csv").write_text("text,label\nA study of ulcers.,a\n")
    (tmp_path / "in.txt").write_text("A study of ulcers.\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("text\n")
    (tmp_path / "twice.csv").write_text("text,text\na,b\n")
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(b"text\n" + os.urandom(3000).hex().encode() + b"\n")[:-500])
    (tmp_path / "wrong.parquet").write_text("text\n")
    (tmp_path / "there.jsonl").write_text("kept\n")
    given = {"--model": checkpoint, "--output": "out.jsonl", **dict(zip(words[::2], words[1::2], strict=True))}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        main([word for pair in given.items() for word in pair])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert (tmp_path / "there.jsonl").read_text() == "kept\n"
    assert not list(tmp_path.glob("out.*"))


def test_the_command_says_it_in_one_line(tmp_path):
    done = predict("--model", "nothing", "--input", "none.csv", "--output", tmp_path / "out.jsonl", check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == "predict.py: error: --input none.csv: there is no such file"
    assert "Traceback" not in done.stderr
