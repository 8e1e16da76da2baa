"""Test the API of the Space with models for one path and for several labels a text: results, files,
types and refusals.
"""

from types import SimpleNamespace

import pytest
from conftest import close
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from transformers import pipeline

from hierarchical_clinicalbert.reading.results import to_row

TEXTS = (
    "Outcomes of epilepsy after hypertension.",
    "Fever and dementia",
    "We report on the weather.",
)
FORMS = {
    "one path": ("space", "plain_checkpoint", "coverage"),
    "several labels": ("labels_space", "labels_checkpoint", "recall"),
}


@pytest.fixture(scope="module", params=FORMS)
def form(request) -> SimpleNamespace:
    """Return a served checkpoint with a client, the pipeline of the same checkpoint, and the name
    of its guarantee.
    """
    server, checkpoint, guarantee = FORMS[request.param]
    server = request.getfixturevalue(server)
    model = request.getfixturevalue(checkpoint)
    classify = pipeline("hierarchical-text-classification", model=model, trust_remote_code=True)
    return SimpleNamespace(
        client=server.client, server=server, classify=classify, guarantee=guarantee
    )


def test_results_are_those_of_the_pipeline(form, texts):
    for text in (*TEXTS, texts[0]):
        for levels in (True, False):
            result = form.client.predict(text, 0.8, levels, api_name="/classify")
            expected = form.classify(text, levels=levels, **{form.guarantee: 0.8})
            assert result == close(expected)
        # the words of the first prediction are explained, or else of the most probable root
        roots = form.classify(text, levels=True)["levels"][0]
        explained = form.client.predict(text, api_name="/explain")["label"]
        assert explained == (expected["label"] or max(roots, key=roots.get))
    assert "prediction_set" not in form.client.predict(TEXTS[0], api_name="/classify")


def test_the_rows_of_a_file_are_classified_as_single_texts(form, tmp_path):
    (tmp_path / "in.csv").write_text(
        f"id,abstract\na,{TEXTS[0]}\nb\nc, \nd,{'x' * 20_001}\ne,{TEXTS[2]}\n"
    )
    result = form.client.predict(
        handle_file(str(tmp_path / "in.csv")), None, 0.9, api_name="/classify_file"
    )
    assert result["column"] == "abstract"
    assert [(row["line"], row["text"]) for row in result["rows"]] == [(2, TEXTS[0]), (6, TEXTS[2])]
    assert [problem["line"] for problem in result["problems"]] == [3, 4, 5]
    assert "20,001 characters; at most 20,000" in result["problems"][2]["problem"]
    for row in result["rows"]:
        single = form.classify(row["text"], **{form.guarantee: 0.9})
        assert row == close(
            {"line": row["line"], "text": row["text"], "result_version": 3, **to_row(single)}
        )


@pytest.mark.parametrize(("kind", "encoding"), [("txt", "cp1252"), ("csv", "utf-16")])
def test_a_file_in_another_encoding_needs_its_name(space, tmp_path, kind, encoding):
    lines = ["text", "Ménière"] if kind == "csv" else ["Ménière"]
    (tmp_path / f"in.{kind}").write_text("\n".join(lines), encoding=encoding)

    def classify(**given: str) -> dict:
        file = handle_file(str(tmp_path / f"in.{kind}"))
        return space.client.predict(file, **given, api_name="/classify_file")

    result = classify(encoding=encoding)
    assert [row["text"] for row in result["rows"]] == ["Ménière"]
    with pytest.raises(AppError, match="no such encoding"):
        classify(encoding="nonsense")
    if kind == "txt":
        assert "choose the encoding cp1252" in classify()["problems"][0]["problem"]


def test_the_api_is_typed_and_documented(form):
    api = form.client.view_api(return_format="dict")["named_endpoints"]
    assert api.keys() == {"/classify", "/explain", "/classify_file"}
    assert [one["parameter_name"] for one in api["/classify"]["parameters"]] == [
        "text",
        form.guarantee,
        "levels",
    ]
    types = {name: endpoint["returns"][0]["python_type"]["type"] for name, endpoint in api.items()}
    fields = form.classify(TEXTS[0], levels=True, **{form.guarantee: 0.9})
    assert all(f"{field}: " in types["/classify"] for field in (*fields, "p_value"))
    assert "words: list[dict(word: str, start: int, end: int, weight: float" in types["/explain"]
    assert "problems: list[dict(line: int, problem: str)]" in types["/classify_file"]
    assert "paths: list[list[str]]" in types["/classify_file"]
    documented = form.server.http.get("/gradio_api/info").json()["named_endpoints"]
    description = " ".join(documented["/classify"]["description"].split())
    assert f"prediction set with this {form.guarantee}" in description
    assert f"missing without a {form.guarantee}" in description


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("  \0", None, "/classify"), "The text is empty"),
        (("x" * 20_001, None, "/classify"), "20,001 characters; at most 20,000"),
        ((7, None, "/classify"), "The value is not text but int"),
        (("text", "x", "/classify"), "must be a number between 0.5 and 0.99"),
        (("text", "no such node", "/explain"), "no such node"),
        (
            ({"path": "/etc/passwd", "meta": {"_type": "other"}}, None, "/classify_file"),
            "upload it again",
        ),
        (
            (
                {"path": "http://127.0.0.1:1/a.csv", "meta": {"_type": "gradio.FileData"}},
                None,
                "/classify_file",
            ),
            "URL",
        ),
    ],
)
def test_a_refusal_says_why(form, given, message):
    *words, name = given
    with pytest.raises(AppError, match=message):
        form.client.predict(*words, api_name=name)


def test_the_prediction_depends_only_on_the_characters_read(space, texts):
    long = " ".join(texts)
    whole = "A study of ulcers. \n"
    result = space.client.predict(long, api_name="/classify")
    assert space.client.predict(whole, "neoplasms", api_name="/explain")["characters_read"] == len(
        whole
    )
    read = space.client.predict(long, "neoplasms", api_name="/explain")["characters_read"]
    shortened = space.client.predict(long[:read], api_name="/classify")
    assert shortened["score"] == pytest.approx(result["score"], abs=1e-5)
    assert shortened["tokens"] == result["tokens_read"] == 128


def test_equal_files_of_several_clients_are_each_read(space, tmp_path):
    (tmp_path / "same.csv").write_text("text\nColitis\n")
    jobs = [
        space.client.submit(handle_file(str(tmp_path / "same.csv")), api_name="/classify_file")
        for _ in range(4)
    ]
    assert [len(job.result(120)["rows"]) for job in jobs] == [1] * 4
