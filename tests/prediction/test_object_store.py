"""Test reading from and writing to an object store, with an S3 server on this machine.

Skipped without moto.
"""

import io
import signal
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, STRIKE, complete, predict_here

from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.prediction.input import read_records
from hierarchical_clinicalbert.reading.sources import find_sources

boto3 = pytest.importorskip("boto3")
moto = pytest.importorskip("moto.server")
BUCKET = "pubmed"


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    """Serve S3, and yield the environment of a client."""
    one = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    one.start()
    yield {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{one.get_host_and_port()[1]}",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    one.stop()


@pytest.fixture
def bucket(server, monkeypatch) -> Iterator:
    """Make an empty bucket, and set the environment of a client."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    store = boto3.resource("s3")
    one = store.create_bucket(Bucket=BUCKET)
    yield one
    one.objects.all().delete()
    one.delete()


def contents(bucket) -> dict[str, bytes]:
    """Return the objects of the bucket by name, without the empty ones that stand for folders."""
    return {
        one.key: one.get()["Body"].read()
        for one in bucket.objects.all()
        if not one.key.endswith("/")
    }


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Write a folder of two files with 1,200 rows, one of them unreadable."""
    folder = tmp_path_factory.mktemp("texts")
    table = pd.DataFrame({"text": [f"We treated {i} patients with fever." for i in range(1200)]})
    table.loc[1100, "text"] = ""
    table[:700].to_csv(folder / "part-1.csv", index=False)
    table[700:].to_json(folder / "part-2.jsonl.gz", orient="records", lines=True)
    return folder


def upload(bucket, folder: Path) -> None:
    for file in folder.iterdir():
        bucket.upload_file(str(file), f"in/{file.name}")
    bucket.put_object(Key="in/_SUCCESS", Body=b"")


def test_a_killed_run_in_a_store_writes_the_same_bytes_as_on_a_disk(
    bucket, clear_checkpoint, texts, tmp_path, capsys
):
    upload(bucket, texts)
    before = contents(bucket)
    assert (
        predict_here("--model", clear_checkpoint, "--input", texts, "--output", f"{tmp_path}/out/")
        == 1
    )
    local = {
        str(file.relative_to(tmp_path)): file.read_bytes()
        for file in tmp_path.rglob("*")
        if file.is_file()
    }
    words = ("--model", clear_checkpoint, "--input", f"s3://{BUCKET}/in/")
    words += ("--output", f"s3://{BUCKET}/out/?region=us-east-1")
    uploaded = ("os.remove", "/part.new")  # which is deleted from the disk
    done = complete("-c", STRIKE, ROOT / "predict.py", *uploaded, int(signal.SIGKILL), *words)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [key for key in contents(bucket) if key.startswith("out")] == [
        "out/.parts/000000000.jsonl"
    ]
    with pytest.raises(
        InputError, match=rf"s3://{BUCKET}/out/.parts was started with another probabilities"
    ):
        predict_here(*words, "--probabilities")
    assert predict_here(*words) == 1
    assert "continuing at row 1,024" in capsys.readouterr().err
    found = {key: value for key, value in contents(bucket).items() if key not in before}
    assert found.keys() == local.keys()
    assert found["out/part-00000.parquet"] == local["out/part-00000.parquet"]
    # the input's files
    expected = local["out/errors.jsonl"].replace(str(texts).encode(), f"s3://{BUCKET}/in".encode())
    assert found["out/errors.jsonl"] == expected
    with pytest.raises(InputError, match="already exists"):
        predict_here(*words)
    assert predict_here(*words, "--overwrite") == 1


def test_sources_are_found_and_read_as_on_a_disk(bucket, texts):
    upload(bucket, texts)
    pd.read_csv(texts / "part-1.csv").to_parquet(stream := io.BytesIO())
    bucket.put_object(Key="in/part 3 [ü%20].parquet", Body=stream.getvalue())
    table = [(None if text == "" else text) for text in pd.read_csv(texts / "part-1.csv")["text"]]
    for name, count in (("in/part 3 [ü%20].parquet", 700), ("*/part-[12]*", 1200)):
        records = list(read_records(find_sources(f"s3://{BUCKET}/{name}"), None, None))
        assert [record.text for record in records[:700]] == table
        assert (len(records), records[-1].done) == (count, 1)
    for key in ("notes/a.txt", "notes/flu/b.txt", "notes/_x.txt"):
        bucket.put_object(Key=key, Body=key.encode())
    records = read_records(find_sources(f"s3://{BUCKET}/notes"), None, "id")
    assert [(one.id, one.text) for one in records] == [
        ("a.txt", "notes/a.txt"),
        ("flu/b.txt", "notes/flu/b.txt"),
    ]


def test_an_error_of_a_store_is_reported_in_one_line(
    bucket, clear_checkpoint, texts, closed_port, tmp_path, monkeypatch
):
    upload(bucket, texts)
    words = {
        "--model": clear_checkpoint,
        "--input": str(texts / "part-1.csv"),
        "--output": f"{tmp_path}/out.csv",
    }
    for given, message in (
        ({"--output": "s3://no-such-bucket/out.csv"}, "--output s3://no-such-bucket/out.csv"),
        (
            {"--input": f"s3://{BUCKET}/in/none.csv"},
            f"--input s3://{BUCKET}/in/none.csv: there is no such file",
        ),
        (
            dict.fromkeys(["--input", "--output"], f"s3://{BUCKET}/in/part-1.csv"),
            "is also an input",
        ),
    ):
        with pytest.raises(InputError) as error:
            predict_here(*(word for pair in (words | given).items() for word in pair))
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port}")
    with pytest.raises(InputError, match=rf"^--input s3://{BUCKET}/in: .*NETWORK_CONNECTION"):
        predict_here(
            "--model",
            clear_checkpoint,
            "--input",
            f"s3://{BUCKET}/in",
            "--output",
            tmp_path / "out.csv",
        )
    assert not [*tmp_path.iterdir()]
