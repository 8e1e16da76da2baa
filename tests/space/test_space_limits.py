"""Test what the Space keeps, logs, serves and accepts: privacy, limits for all users together, and
hostile clients.
"""

import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import ROOT
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from gradio_client.utils import QueueError
from space_server import SpaceServer, stored, wait_until

from hierarchical_clinicalbert.publishing.hub import SPACE_FILES

MEGABYTE = 2**20
LONG_LINES = ["a" * 20_000] * 60
LONGER_LINES = ["\u00e9" * 20_000] * 100  # results of 12 MB of JSON, which sockets do not hold
KEPT_SECONDS = 5
FULL = b"a\n" * (5 * MEGABYTE)  # a file of 10 MB, the most that is documented; it has too many rows


def strict_space(model: str, folder: Path, **limits: int) -> SpaceServer:
    """Serve a copy of the Space with smaller limits of `retention.py`."""
    space = folder / "space"
    for name in SPACE_FILES:
        (space / name).parent.mkdir(parents=True, exist_ok=True)
        source = next(folder for folder in (ROOT / "space", ROOT) if (folder / name).exists())
        (space / name).write_bytes((source / name).read_bytes())
    code = (space / "retention.py").read_text()
    for name, limit in limits.items():
        code, count = re.subn(rf"(?m)^{name} = [^#\n]+", f"{name} = {limit}  ", code)
        assert count == 1
    (space / "retention.py").write_text(code)
    return SpaceServer(model, folder, app=space / "app.py")


def classify_file(space: SpaceServer, upload: httpx.Response) -> str:
    """Return the id of the event, with which `SpaceServer.result` reads the result."""
    return space.call("classify_file", stored(upload), None, None, None)


def classify_lines(space: SpaceServer, lines: list[str]) -> str:
    return classify_file(space, space.upload("\n".join(lines).encode()))


def is_on_disk(space: SpaceServer, content: bytes) -> bool:
    return any(content in kept for kept in space.files().values())


# ── Privacy ───────────────────────────────────────────────────────────────────────────────────────


def test_nothing_of_what_is_sent_is_logged_or_kept(space, texts, tmp_path):
    mark = "Zebrafish-4711"
    (tmp_path / f"{mark}.csv").write_text(f"{mark},text\n{mark},{mark} {texts[0]}\n{mark}\n")
    space.client.predict(f"{mark} colitis", api_name="/explain")
    space.client.predict(
        handle_file(str(tmp_path / f"{mark}.csv")), "text", api_name="/classify_file"
    )
    with pytest.raises(AppError):
        space.client.predict(mark * 5000, api_name="/classify")
    # call every function of the page with invalid arguments, also functions that are hidden from
    # clients
    functions = space.http.get("/config").json()["dependencies"]
    assert {"classify", "explain", "classify_file", "run_file"} <= {
        function["api_name"] for function in functions
    }
    for function in functions:
        for value in (
            mark,
            {"path": f"/etc/{mark}", "meta": {"_type": "gradio.FileData"}},
            "half \ud800 " + mark,
        ):
            messages = space.press(function["id"], [value] * 3, f"{mark}{function['id']}")
            assert '"process_completed"' in messages
    for route in ("call/v2/classify", f"run/{mark}", f"call/{mark}"):
        space.http.post(f"/gradio_api/{route}", json={"data": [mark], mark: mark})
    assert mark not in space.log()
    assert not [
        path
        for path, content in space.files().items()
        if mark.encode() in content or mark in path.name
    ]


def test_no_path_of_the_server_is_served(space, clear_checkpoint):
    for path in (
        "/etc/passwd",
        f"{clear_checkpoint}/config.json",
        str(ROOT / "space" / "app.py"),
        "../../etc/passwd",
    ):
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/"):
            assert space.http.get(f"{route}{path}").status_code in (403, 404)
    local = "http://127.0.0.1:1/"
    for route in (
        "deep_link?session_hash=x",
        f"proxy={local}",
        f"file={local}",
        "runs",
        "openapi.json",
    ):
        assert space.http.get(f"/gradio_api/{route}").status_code == 404
    assert space.http.get("/monitoring").status_code == 404


# ── What is kept, and for how long ────────────────────────────────────────────────────────────────


@pytest.fixture
def hasty_space(clear_checkpoint, tmp_path) -> Iterator[SpaceServer]:
    """Serve a Space that keeps things for seconds.

    Of `LONGER_LINES`, one result fits, and two do not.
    """
    limits = {"MAX_UNREAD": 8_000_000, "KEPT_SECONDS": KEPT_SECONDS, "SWEEP_SECONDS": 1}
    with strict_space(clear_checkpoint, tmp_path, **limits) as space:
        yield space


def test_results_and_files_that_nobody_reads_are_deleted_in_time(hasty_space):
    space = hasty_space
    classify_lines(space, LONGER_LINES)
    unread, read = (space.call("classify", "Zebrafish with colitis", None, False) for _ in range(2))
    # so the first one is complete, too
    assert "event: complete" in space.result("classify", read).text
    space.upload(b"Okapi\n")
    space.open_file(b"Okapi\n", "unused")
    assert is_on_disk(space, b"Okapi")
    time.sleep(KEPT_SECONDS + 2)
    for event in (unread, read, "a1b2"):
        answer = space.result("classify", event)
        assert answer.status_code == 404
        assert answer.json()["detail"].startswith("There is no such result.")
    assert not is_on_disk(space, b"Okapi")
    assert "There is no file" in space.run_file("unused")
    assert (
        "event: complete" in space.result("classify_file", classify_lines(space, LONGER_LINES)).text
    )

    # downloads of an open page
    with space.http.stream("GET", "/gradio_api/heartbeat/open") as page:
        beats = page.iter_raw()  # without a reference, it closes the connection
        next(beats)
        space.open_file(b"Okapi\n", "open")
        space.run_file("open")
        assert any(path.name == "predictions.csv" for path in space.files())
        wait_until(lambda: not any(path.name.startswith("predictions") for path in space.files()))


def test_a_closed_page_keeps_no_file(space):
    with space.http.stream("GET", "/gradio_api/heartbeat/closed") as page:
        beats = page.iter_raw()
        next(beats)
        space.open_file(b"Okapi\n", "closed")
        assert "Okapi" in space.run_file("closed")
    wait_until(lambda: "There is no file" in space.run_file("closed"))


# ── How much ──────────────────────────────────────────────────────────────────────────────────────


def test_requests_that_are_too_large_are_refused(space):
    big = b"x" * (11 * MEGABYTE)
    before = space.files()
    several = [("files", (f"{i}.csv", big[: len(big) // 4])) for i in range(8)]
    for path, body in (
        ("upload", {"files": {"files": ("a.csv", big)}}),
        ("upload", {"files": several}),
        ("call/upload", {"content": big[: 8 * MEGABYTE]}),
        ("queue/join", {"content": big}),
    ):
        answer = space.http.post(f"/gradio_api/{path}", **body)
        assert answer.status_code == 413
    assert answer.json()["detail"] == "The request is too large."  # which the page shows
    assert not any(
        len(content) > MEGABYTE for file, content in space.files().items() if file not in before
    )


@pytest.fixture(scope="module")
def small_space(long_checkpoint, tmp_path_factory) -> Iterator[SpaceServer]:
    """Serve a Space with a checkpoint for long texts.

    Of `LONG_LINES`, one result fits, and two do not.
    """
    limits = {"MAX_UNREAD": 2_200_000, "MAX_STORED": 25 * MEGABYTE}
    with strict_space(long_checkpoint, tmp_path_factory.mktemp("small"), **limits) as space:
        yield space
    assert not space.files()  # at its end, it deletes what nobody has read


def test_long_texts_are_read_to_their_ends(small_space, long_texts):
    client = small_space.client
    for label, text in long_texts.items():
        result = client.predict(text, api_name="/classify")
        assert (result["label"], result["truncated"]) == (label, False)
    explained = client.predict(text, label, api_name="/explain")
    heaviest = max(explained["words"], key=lambda word: word["weight"])
    assert heaviest["start"] > text.index("We treated")
    assert explained["characters_read"] == len(text)
    # 8 for each of 3,072 tokens
    with pytest.raises(AppError, match="24,580 characters; at most 24,576"):
        client.predict("word " * 4_916, api_name="/classify")


def test_unread_results_and_uploads_have_a_limit(small_space):
    """Of files that are read at once, any number is accepted."""
    space = small_space
    for _ in range(3):
        assert (
            "event: complete"
            in space.result("classify_file", classify_lines(space, LONG_LINES)).text
        )
    unread = classify_lines(space, LONG_LINES)
    refused = classify_lines(space, LONG_LINES)
    answer = space.result("classify_file", refused).text
    assert answer.startswith("event: error")
    assert "the unread results of all users have reached 2 MB" in answer
    assert (
        "event: complete"
        in space.result("classify", space.call("classify", "Colitis", None, False)).text
    )
    assert "event: complete" in space.result("classify_file", unread).text

    sent = [space.upload(FULL) for _ in range(2)]
    assert [answer.status_code for answer in sent] == [200, 200]
    kept = sum(map(len, space.files().values()))
    full = space.upload(FULL)
    assert (full.status_code, full.headers["retry-after"]) == (429, "60")
    assert (
        full.json()["detail"]
        == "The files of all users have reached 25 MB: try again in 60 seconds."
    )
    assert sum(map(len, space.files().values())) == kept
    assert (
        "more than 10,000 rows" in space.result("classify_file", classify_file(space, sent[0])).text
    )
    assert space.upload(FULL).status_code == 200  # because the file that was read is deleted


def test_an_upload_that_breaks_off_leaves_nothing(space):
    head = (
        "POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; "
        "boundary=b\r\n"
    )
    head += (
        "Content-Length: 5000000\r\n\r\n--b\r\nContent-Disposition: form-data; name=files; "
        "filename=a.csv\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", space.port), timeout=60) as connection:
        connection.sendall(head.encode() + b"Tapir\n" * 400_000)
        wait_until(lambda: is_on_disk(space, b"Tapir"))
    wait_until(lambda: not is_on_disk(space, b"Tapir"))


def test_a_text_waits_for_no_file_and_a_full_queue_is_reported(space, texts):
    """Classify texts while a file of 10,000 rows is classified; its run is cancelled before the
    end.
    """
    space.open_file(f"{texts[0][:900]}\n".encode() * 10_000, "long")
    run = ("run_file", [None, "text", 0.9, None])
    event = space.join(*run, "long").json()["event_id"]
    with space.http.stream(
        "GET", "/gradio_api/queue/data", params={"session_hash": "long"}
    ) as messages:
        lines = messages.iter_lines()
        assert any('"process_generating"' in line for line in lines)
        assert space.client.predict("A study of colitis.", api_name="/classify")["label"]
        assert "Prediction" in space.press("show_result", ["A study of colitis.", 0.9], "short")
        waiting = [space.join(*run, f"{i}").status_code for i in range(101)]
        assert waiting == [200] * 100 + [503]
        with pytest.raises(QueueError, match="Queue is full!"):
            space.client.predict("A study of colitis.", api_name="/classify")
        functions = space.http.get("/config").json()["dependencies"]
        number = next(one["id"] for one in functions if one["api_name"] == "run_file")
        cancel = {"session_hash": "long", "fn_index": number, "event_id": event}
        assert space.http.post("/gradio_api/cancel", json=cancel).json() == {"success": True}
        assert not any("Done:" in line for line in lines)
    wait_until(
        lambda: space.join("show_result", ["A study of colitis.", 0.9], "last").status_code == 200
    )
