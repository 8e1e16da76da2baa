"""Test the API of the Space with models for one path and for several labels a text: results, files, types and refusals."""

import csv
import signal
from types import SimpleNamespace

import pytest
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from space_server import SpaceServer
from transformers import pipeline

TEXTS = ("Outcomes of epilepsy after hypertension.", "Fever and dementia", "We report on the weather.")
FORMS = {
    "one path": ("space", "plain_checkpoint", "coverage"),
    "several labels": ("labels_space", "labels_checkpoint", "recall"),
}


@pytest.fixture(scope="module", params=FORMS)
def form(request) -> SimpleNamespace:
    """Return a served checkpoint with a client, the pipeline of the same checkpoint, and the name of its guarantee."""
    server, checkpoint, guarantee = FORMS[request.param]
    server, model = request.getfixturevalue(server), request.getfixturevalue(checkpoint)
    classify = pipeline("hierarchical-text-classification", model=model, trust_remote_code=True)
    return SimpleNamespace(client=server.client, server=server, classify=classify, guarantee=guarantee)


def flat(value) -> list:
    """Return the leaves of a JSON value in order."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return [value] if inner is None else [leaf for part in inner for leaf in flat(part)]


def assert_same(value, expected) -> None:
    """Compare JSON values, numbers with a tolerance."""
    pairs = list(zip(flat(value), flat(expected), strict=True))
    assert [a for a, _ in pairs if not isinstance(a, float)] == [b for _, b in pairs if not isinstance(b, float)]
    numbers = [pair for pair in pairs if isinstance(pair[0], float)]
    assert [a for a, _ in numbers] == pytest.approx([b for _, b in numbers], abs=1e-5)


def test_results_are_those_of_the_pipeline(form, texts):
    for text in (*TEXTS, *texts[:3]):
        for levels in (True, False):
            result = form.client.predict(text, 0.8, levels, api_name="/classify")
            expected = form.classify(text, levels=levels, **{form.guarantee: 0.8})
            assert result.keys() == expected.keys()
            assert_same(result, expected)
    assert "prediction_set" not in form.client.predict(TEXTS[0], api_name="/classify")


def test_the_words_of_the_first_prediction_are_explained_or_else_of_the_most_probable_root(form):
    for text in TEXTS:
        result = form.classify(text, levels=True)
        expected = result["label"] or max(result["levels"][0], key=result["levels"][0].get)
        assert form.client.predict(text, api_name="/explain")["label"] == expected


def test_the_rows_of_a_file_are_classified_as_single_texts(form, tmp_path):
    rows = [["id", "abstract"], ["a", TEXTS[0]], ["b"], ["c", " "], ["d", "x" * 20_001], ["e", TEXTS[2]]]
    with (tmp_path / "in.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    result = form.client.predict(handle_file(str(tmp_path / "in.csv")), None, 0.9, api_name="/classify_file")
    assert result["column"] == "abstract"
    assert [(row["line"], row["text"]) for row in result["rows"]] == [(2, TEXTS[0]), (6, TEXTS[2])]
    assert [problem["line"] for problem in result["problems"]] == [3, 4, 5]
    assert "20,001 characters; at most 20,000" in result["problems"][2]["problem"]
    for row in result["rows"]:
        single = form.classify(row["text"], **{form.guarantee: 0.9})
        expected = {"line": row["line"], "text": row["text"], "result_version": 2, **single}
        for name in ("labels", "scores", "paths"):
            expected[name] = [node[name[:-1]] for node in single["labels"]]
        expected["paths"] = [[step["label"] for step in path] for path in expected["paths"]]
        if "known" in single:
            expected["known_labels"] = [node["known"] for node in single["labels"]]
        for name in ("path", "prediction_set"):
            expected[name] = [node["label"] for node in single[name]]
        assert row.keys() == expected.keys()
        assert_same(row, {name: expected[name] for name in row})


def test_the_api_is_typed_and_documented(form):
    api = form.client.view_api(return_format="dict")["named_endpoints"]
    assert api.keys() == {"/classify", "/explain", "/classify_file"}
    assert [one["parameter_name"] for one in api["/classify"]["parameters"]] == ["text", form.guarantee, "levels"]
    types = {name: endpoint["returns"][0]["python_type"]["type"] for name, endpoint in api.items()}
    fields = (
        "labels",
        "label",
        "score",
        "path",
        "p_value",
        "known",
        "prediction_set",
        "tokens",
        "tokens_read",
        "truncated",
        "levels",
    )
    assert all(f"{field}: " in types["/classify"] for field in fields)
    assert "words: list[dict(word: str, start: int, end: int, weight: float" in types["/explain"]
    assert "problems: list[dict(line: int, problem: str)]" in types["/classify_file"]
    assert "paths: list[list[str]]" in types["/classify_file"]
    documented = form.server.http.get("/gradio_api/info").json()["named_endpoints"]
    for name, sentence in (
        ("/classify", f"prediction set with this {form.guarantee}"),
        ("/classify", f"missing without a {form.guarantee}"),
        ("/explain", "integrated gradients"),
        ("/classify_file", "10,000 rows"),
    ):
        assert sentence in documented[name]["description"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("  \0", None, "/classify"), "The text is empty"),
        (("x" * 20_001, None, "/classify"), "20,001 characters; at most 20,000"),
        ((7, None, "/classify"), "The value is not text but int"),
        (("text", 2, "/classify"), "must be a number between 0.5 and 0.99"),
        (("text", "x", "/classify"), "must be a number between 0.5 and 0.99"),
        (("text", "no such node", "/explain"), "no such node"),
        (({"path": "/etc/passwd", "meta": {"_type": "other"}}, None, "/classify_file"), "upload it again"),
        (({"path": "http://127.0.0.1:1/a.csv", "meta": {"_type": "gradio.FileData"}}, None, "/classify_file"), "URL"),
        (({"path": "http://127.0.0.1:1/a.csv", "meta": {"_type": "gradio.FileData"}}, None, "/classify"), "URL"),
    ],
)
def test_a_refusal_says_why(form, given, message):
    *words, name = given
    with pytest.raises(AppError, match=message):
        form.client.predict(*words, api_name=name)


def test_a_recall_that_needs_more_texts_is_refused(labels_space):
    message = "Recall 0.97 needs 33 labelled validation texts, and the checkpoint was calibrated on fewer"
    assert message in labels_space.result("classify", labels_space.call("classify", "Epilepsy", 0.97, False)).text


def test_a_model_without_calibration_classifies_and_has_no_coverage(uncalibrated_run, texts, tmp_path):
    """Also check that the files of a Space are deleted when the terminal that started it is closed."""
    model = str(uncalibrated_run[0])
    expected = pipeline("hierarchical-text-classification", model=model, trust_remote_code=True)(texts[0])
    with SpaceServer(model, tmp_path) as server:
        parts = server.http.get("/config").json()["components"]
        controls = {part["props"].get("elem_id"): part["props"] for part in parts}
        for name in ("coverage", "file-coverage"):
            assert controls[name]["interactive"] is False
            assert "Not available: this model was trained without validation rows" in controls[name]["info"]
        assert "no: trained without validation rows" in controls["facts"]["value"]
        result = server.client.predict(texts[0], api_name="/classify")
        assert (result["label"], "prediction_set" in result) == (expected["label"], False)
        with pytest.raises(AppError, match="This checkpoint was not calibrated"):
            server.client.predict(texts[0], 0.9, api_name="/classify")
        # the page sends the value of its slider, which nobody can move
        shown = server.press("show_result", [texts[0], controls["coverage"]["value"]], "page")
        assert expected["label"] in shown
        assert "coverage needs one that was trained with validation rows" in shown
        server.open_file(texts[0].encode(), "page")
        assert "Done: 1 of 1 rows" in server.run_file("page", controls["file-coverage"]["value"])
        assert server.files()
        # nohup has what it starts ignore SIGHUP, and so would the Space that a test starts under it
        server.stop(signal.SIGTERM if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else signal.SIGHUP)
        assert not server.files()


def test_the_prediction_depends_only_on_the_characters_read(space, texts):
    long, whole = " ".join(texts), "A study of ulcers. \n"
    result = space.client.predict(long, api_name="/classify")
    assert 128 == result["tokens_read"] < result["tokens"]
    assert space.client.predict(whole, "neoplasms", api_name="/explain")["characters_read"] == len(whole)
    read = space.client.predict(long, "neoplasms", api_name="/explain")["characters_read"]
    shortened = space.client.predict(long[:read], api_name="/classify")
    assert shortened["score"] == pytest.approx(result["score"], abs=1e-5)
    assert shortened["tokens_read"] == shortened["tokens"] == result["tokens_read"]


def test_long_texts_are_read_to_their_ends(long_space, long_texts):
    for label, text in long_texts.items():
        result = long_space.client.predict(text, api_name="/classify")
        assert (result["label"], result["truncated"]) == (label, False)
    explained = long_space.client.predict(text, label, api_name="/explain")
    heaviest = max(explained["words"], key=lambda word: word["weight"])
    assert heaviest["start"] > text.index("We treated")
    assert explained["characters_read"] == len(text)
    difference = explained["score"] - explained["blank_score"] + explained["error"]
    total = sum(word["weight"] for word in explained["words"]) + explained["rest"]
    assert total == pytest.approx(difference, abs=1e-4)
    assert long_space.client.predict("word " * 4_915, api_name="/classify")[
        "truncated"
    ]  # 8 characters for each of 3,072 tokens
    with pytest.raises(AppError, match="24,580 characters; at most 24,576"):
        long_space.client.predict("word " * 4_916, api_name="/classify")


def test_equal_files_of_several_clients_are_each_read(space, tmp_path):
    (tmp_path / "same.csv").write_text("text\nColitis\n")
    jobs = [space.client.submit(handle_file(str(tmp_path / "same.csv")), api_name="/classify_file") for _ in range(4)]
    assert [len(job.result(120)["rows"]) for job in jobs] == [1] * 4
