"""Test the Space without a browser: figures and tables, explanations against brute force, the API, and the files it keeps."""

import csv
import io
import json
import math
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import ROOT, parquet, run_outside
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from gradio_client.utils import QueueError
from space_server import SpaceServer
from transformers import pipeline

sys.path.insert(0, str(ROOT / "space"))

import views
from attribution import Explainer, split_at_jumps
from classification import check_text, classify_all
from service import MENU, Service
from tables import FORMULA, MAX_BYTES, MAX_COLUMNS, Refused, defuse, join_lists, read_table, to_csv

from hierarchical_clinicalbert.publishing.hub import SPACE_FILES
from taxonomy_hierarchical import Taxonomy

HOSTILE = "<img src=x onerror=alert(1)> ${alert(2)} {{this}} `x` & ' \" \u202eevil \x07"


@pytest.fixture(scope="module")
def classifier(clear_checkpoint):
    return pipeline("hierarchical-text-classification", model=clear_checkpoint, trust_remote_code=True)


@pytest.fixture(scope="module")
def labels_classifier(labels_checkpoint):
    return pipeline("hierarchical-text-classification", model=labels_checkpoint, trust_remote_code=True)


@pytest.fixture(scope="module")
def client(space) -> Client:
    return Client(space.address, verbose=False)


@pytest.fixture(scope="module")
def labels_client(labels_space) -> Client:
    return Client(labels_space.address, verbose=False)


# words


@pytest.fixture
def attention_classifier(labels_checkpoint):
    """Return a multi-label classifier with label attention."""
    found = pipeline("hierarchical-text-classification", model=labels_checkpoint, trust_remote_code=True)
    found.model.config.pooling = "label_attention"
    queries = torch.randn(found.model.heads.weight.shape, generator=torch.Generator().manual_seed(0))
    found.model.heads.query = torch.nn.Parameter(queries)
    return found


@pytest.mark.parametrize("kind", ["classifier", "attention_classifier"])
def test_weights_are_the_integral_of_the_gradient_word_by_word(kind, request, texts, monkeypatch):
    """Compare with 2,000 steps of the trapezoidal rule, by autograd, over embeddings and the lexical head's counts."""
    classifier = request.getfixturevalue(kind)
    explainer = Explainer(classifier)
    text = "Allodynia and epilepsy, nervous complaints. " + texts[0]
    found = explainer.explain(text, "nervous system diseases")
    model, tokenizer = classifier.model, classifier.tokenizer
    node = classifier.tree.id("nervous system diseases")
    encoded = tokenizer(text, truncation=True, return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    blank = torch.full_like(ids, tokenizer.pad_token_id)
    blank[0, 0], blank[0, -1] = ids[0, 0], ids[0, -1]
    embed, head = model.get_input_embeddings(), model.heads.lexical
    assert head is not None

    def weighed(tokens):  # TF-IDF as its docstring has it
        counts = torch.bincount(tokens[0], minlength=len(head.idf)).float()
        vector = torch.where(counts > 0, 1 + counts.clamp(min=1).log(), 0.0) * head.idf
        return vector / vector.norm()

    vectors = [embed(tokens).detach() for tokens in (blank, ids)]
    tfidf = [weighed(tokens) for tokens in (blank, ids)]
    steps = 2000
    places = torch.linspace(0, 1, steps + 1)
    by_place, by_token = torch.zeros(ids.shape[1]), torch.zeros(len(head.idf))
    for part in places.split(67):
        x = (vectors[0] + part[:, None, None] * (vectors[1] - vectors[0])).requires_grad_()
        s = (tfidf[0] + part[:, None] * (tfidf[1] - tfidf[0])).requires_grad_()
        encoder = model.encoder(inputs_embeds=x, attention_mask=mask.expand(len(part), -1)).last_hidden_state
        with monkeypatch.context() as patched:
            patched.setattr(head, "forward", lambda ids, mask, s=s: s @ head.weight.T + head.bias)
            of_tokens = model.heads.query is not None
            scores = model.heads(encoder if of_tokens else model.pool(encoder, mask.expand(len(part), -1)), ids, mask)
            log_probs, logits = model.heads.decisions(scores)
            values = logits if model.config.is_multi_label else log_probs.exp()
        step = torch.where((part == 0) | (part == 1), 0.5, 1.0) / steps
        g, h = torch.autograd.grad((values[:, node] * step).sum(), (x, s))
        by_place += (g * (vectors[1] - vectors[0])).sum((0, 2))
        by_token += h.sum(0) * (tfidf[1] - tfidf[0])
    expected: dict[int, float] = {}
    for place, word in enumerate(encoded.word_ids(0)):
        if word is not None:
            token = ids[0, place]
            share = by_token[token] / (ids[0] == token).sum()
            expected[word] = expected.get(word, 0.0) + (by_place[place] + share).item()
    assert [word["weight"] for word in found["words"]] == pytest.approx(
        list(expected.values()), abs=8e-3 if classifier.model.config.is_multi_label else 2e-3
    )
    assert max(abs(weight) for weight in expected.values()) > 0.01
    for word in found["words"]:
        assert text[word["start"] : word["end"]] == word["word"]


def test_weights_add_up_and_the_pieces_of_a_word_are_one_word(classifier, texts):
    explainer = Explainer(classifier)
    for node in ("neoplasms", "specific disease"):
        for text in (text[:300].rpartition(" ")[0] for text in texts[:3]):
            found = explainer.explain(text, node)
            total = sum(word["weight"] for word in found["words"]) + found["rest"] - found["error"]
            assert total == pytest.approx(found["score"] - found["blank_score"], abs=1e-6)
            assert abs(found["error"]) < 0.02
            shown = [word["word"] for word in found["words"] if word["word"].isalpha()]
            assert shown == re.findall(r"[A-Za-z]+", re.sub(r"\w*\d\w*", "", text))
            probability = classify_all(classifier, [text], None)[0]["levels"]
            assert found["score"] == pytest.approx(
                next(level[node] for level in probability if node in level), abs=1e-5
            )


def test_weights_of_a_label_add_up_to_its_log_odds(labels_classifier):
    found = Explainer(labels_classifier).explain("Outcomes of epilepsy after hypertension.", "nervous system diseases")
    total = sum(word["weight"] for word in found["words"]) + found["rest"] - found["error"]
    odds = [found[name] / (1 - found[name]) for name in ("score", "blank_score")]
    assert total == pytest.approx(math.log(odds[0] / odds[1]), abs=1e-3)
    weights = {word["word"]: word["weight"] for word in found["words"]}
    assert max(weights, key=weights.get) == "epilepsy"
    page = views.words("Outcomes of epilepsy after hypertension.", found, True)
    assert f"data-weight='{weights['epilepsy']:.6f}'" in page
    assert f"{views.log_odds(weights['epilepsy'])} log-odds" in page


def test_explaining_does_not_affect_concurrent_classification(classifier, texts):
    explainer = Explainer(classifier)
    before = [classify_all(classifier, [text], None)[0]["score"] for text in texts[:6]]
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(lambda: [explainer.explain(text, "neoplasms") for text in texts[:6]])
        rounds = 0
        while not busy.done() or rounds == 0:
            assert [classify_all(classifier, [text], None)[0]["score"] for text in texts[:6]] == pytest.approx(
                before, abs=1e-6
            )
            rounds += 1
    assert len(busy.result()) == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_is_explained_as_in_full(clear_checkpoint, texts, dtype):
    """Compare with and without the lexical head, because this head has most of the weight."""
    half, full = (
        pipeline("hierarchical-text-classification", model=clear_checkpoint, trust_remote_code=True, dtype=some, device="cpu")
        for some in (dtype, torch.float32)
    )  # fmt: skip
    assert half.model.get_input_embeddings().weight.dtype == dtype
    for lexical in (True, False):
        if not lexical:
            for classify in (half, full):
                classify.model.set_calibration(replace(classify.model.config.calibration, lexical_weight=None))
        found, expected = (Explainer(some).explain(texts[0], "neoplasms") for some in (half, full))
        total = sum(word["weight"] for word in found["words"]) + found["rest"] - found["error"]
        assert total == pytest.approx(found["score"] - found["blank_score"], abs=1e-6)
        weights, others = ([word["weight"] for word in some["words"]] for some in (found, expected))
        assert weights == pytest.approx(others, abs=0.05 * max(map(abs, others)))


def test_pieces_of_a_path_cover_it_and_a_jump_has_one_of_its_own():
    pieces = split_at_jumps([0.1] * 9 + [0.9] * 8, 0.01)
    assert pieces[0][0] == 0
    assert pieces[-1][1] == 1
    assert [a[1] for a in pieces[:-1]] == [b[0] for b in pieces[1:]]
    assert (8 / 16, 9 / 16) in [piece[:2] for piece in pieces]
    assert split_at_jumps([0.2] * 17, 0.01) == [(0.0, 1.0, 3)]


# files


def test_half_of_a_surrogate_pair_is_no_text():
    with pytest.raises(Refused, match="not valid Unicode"):
        check_text("half \ud800")


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"text\n", "csv", "no rows"),
        (b"\n", "csv", "no rows"),
        (b"We followed 212 patients with fibrillation.\nBlood was drawn.\n", "csv", "is the header missing"),
        (b",,\nid,text,label\n1,We followed 212 patients,heart\n", "csv", "is the header missing"),
        (b"id;befund\n1;Kolitis\n", "csv", "separated by semicolons"),
        (b"text\n" * 10_002, "csv", "more than 10,000 rows"),
        (b"x" * (MAX_BYTES + 1), "txt", "at most 10 MB"),
        (b",".join(b"%d" % i for i in range(MAX_COLUMNS + 1)) + b"\n", "csv", "more than 1,000 columns"),
        (b"1," * (MAX_BYTES // 2), "csv", "more than 1,000 columns"),
        (b"".join(b'{"%d": 0}\n' % i for i in range(MAX_COLUMNS + 1)), "jsonl", "more than 1,000 columns"),
    ],
)
def test_a_file_beyond_the_limits_or_without_rows_is_refused_in_words(content, kind, message):
    with pytest.raises(Refused, match=message):
        read_table(content, kind)


def test_a_column_is_read_by_its_whole_name():
    content = parquet({"a.b": ["dotted"], "a": ["the longest of them"], "s": [{"b": "inner"}], "n": [1]})
    table = read_table(content, "parquet")
    assert (table.columns, table.column) == (["a.b", "a", "s", "n"], "a")
    rows = [read_table(content, "parquet", name).rows[0] for name in ("a.b", "s", "n")]
    assert [(row.text, row.problem) for row in rows] == [
        ("dotted", None), (None, "the value is not text but dict"), (None, "the value is not text but int"),
    ]  # fmt: skip
    for other, kind in ((content, "parquet"), (b"a,b\n1,2\n", "csv")):
        with pytest.raises(Refused, match="no such column"):
            read_table(other, kind, "c")
    nfc, nfd = "r\u00e9sum\u00e9", "re\u0301sume\u0301"
    assert read_table(f"{nfd},b\nx,2\n".encode(), "csv", nfc).rows[0].text == "x"


def test_parquet_files_within_the_limits_are_read():
    texts = [f"text {i} " + "x" * 150 for i in range(10_000)]
    categories = pa.array(texts).dictionary_encode()
    vectors = pa.array([[0.5] * 384] * 3000, pa.list_(pa.float32()))
    for columns in ({"text": categories}, {"a": texts[:3000], "vector": vectors}):
        rows = read_table(parquet(columns), "parquet").rows
        assert [row.text for row in rows] == texts[: len(rows)]
        assert len(rows) in (3000, 10_000)


def understate_sizes(content: bytes) -> bytes:
    """Change a Parquet footer to claim that each column and each row group unpacks to at most a kilobyte.

    Thrift writes an integer in groups of seven bits, the lowest first, with the sign in the lowest bit. Padding with more bytes than
    needed keeps the length of the footer.
    """
    metadata = pq.read_metadata(io.BytesIO(content))
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    sizes = {group.total_byte_size for group in groups} | {column.total_uncompressed_size for column in columns}
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    footer = content[start:]

    def written(number: int, length: int) -> bytes:
        digits = [2 * number >> 7 * i & 127 for i in range(length)]
        return bytes([digit | 128 for digit in digits[:-1]] + digits[-1:])

    for size in sorted(sizes, reverse=True):
        length = -(-(2 * size).bit_length() // 7)
        if length > 2:
            assert written(size, length) in footer
            footer = footer.replace(written(size, length), written(1000, length))
    return content[:start] + footer


def hostile_files() -> dict[str, bytes]:
    """Return contents, by name, of files of at most 10 MB that unpack to much more."""
    full, once = MAX_BYTES - 100, pa.array([0] * 10_000, pa.int32())
    texts, short = pa.array(["x" * 2**20] * 200), pa.array(["x" * 2**20] * 40)
    pages = pa.DictionaryArray.from_arrays(once, ["x" * 10**7])
    nulls = pa.nulls(30_000_000, pa.int8())
    for _ in range(3):
        nulls = pa.ListArray.from_arrays(pa.array([0, len(nulls)], pa.int32()), nulls)
    one_page = {"use_dictionary": False, "data_page_size": 2**31 - 1}
    files = {
        f"{codec}.parquet": parquet({"text": texts}, compression=codec, **one_page)
        for codec in ("snappy", "brotli", "zstd")
    }
    files["columns.parquet"] = parquet({f"c{i}": short for i in range(30)}, compression="zstd", **one_page)
    files["repeated.parquet"] = parquet({"text": pa.DictionaryArray.from_arrays(once, short[:1])})
    files["dictionaries.parquet"] = parquet({f"c{i}": pages for i in range(40)}, compression="zstd")
    files["lists.parquet"] = parquet({"text": nulls}, compression="zstd")
    files = {name: understate_sizes(content) for name, content in files.items()}
    return files | {
        "brackets.jsonl": b"[" * full,
        "objects.jsonl": b'{"text":[' + b'{"":{}},' * (full // 8) + b"0]}\n",
        "names.jsonl": b"{" + b",".join(b'"%x":0' % i for i in range(full // 10)) + b"}\n",
        "fields.csv": b"12," * (full // 3),
        "cells.csv": b",".join(b"%x" % i for i in range(1000)) + b"\n" + (b"," * 999 + b"\n") * 10_000,
        "lines.csv": b'text\n"\xff' + b"\n" * (full // 2) + b'"\n',
        "lines.txt": b"a\n" * (full // 2),
        "wide.txt": ("\U0001f600" + "a" * 1030 + "\n").encode() * 10_000,
        "control.txt": (b"\1" * 1040 + b"\n") * 10_000,
    }


def test_no_file_of_10_mb_takes_a_gigabyte(tmp_path):
    """Measure the peak memory of a fresh process and its subprocesses, minus the memory at the start."""
    for name, content in hostile_files().items():
        assert len(content) <= MAX_BYTES, name
        (tmp_path / name).write_bytes(content)
    code = f"""
import json, resource, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "space")!r})
from tables import Refused, read_table

def most(who):
    return resource.getrusage(who).ru_maxrss * 1024

rest, results = most(resource.RUSAGE_SELF), {{}}
for file in sorted(Path({str(tmp_path)!r}).glob("*.*")):
    try:
        results[file.name] = len(read_table(file.read_bytes(), file.suffix[1:]).rows)
    except Refused as error:
        results[file.name] = str(error)
print(json.dumps([results, most(resource.RUSAGE_SELF) - rest + most(resource.RUSAGE_CHILDREN)]))
"""
    results, memory = run_outside(code, tmp_path, fresh=True)
    assert memory < 10**9, results
    packed = [results[name] for name in results if name.endswith("parquet") and name != "lists.parquet"]
    assert all("more than 41,943,040 bytes" in one or "does not fit in memory" in one for one in packed), packed
    assert results["wide.txt"] == results["cells.csv"] == 10_000
    too_many = "The file has more than 1,000 columns, the most that is accepted."
    assert results["names.jsonl"] == results["fields.csv"] == too_many


def test_formulas_are_defused_and_all_else_comes_back_as_it_was():
    cells = ["=1+1", "+1", "-1", "@sum", "\tx", "\rx", "plain", "p = 0.5 (-1)", "", 'a "quoted", one\nand more']
    records = [{"text": cell, "probability": -0.5} for cell in cells]
    back = list(csv.DictReader(io.StringIO(to_csv(records), newline="")))
    assert [row["text"] for row in back] == [f"\\{cell}" if cell[:1] in "=+-@\t\r" and cell else cell for cell in cells]
    assert {row["probability"] for row in back} == {"-0.5"}  # a number of ours is no formula
    assert defuse("Fever;=x, 'y' |\n -z") == "Fever;\\=x, 'y' |\n \\-z"
    lists = [["=x", "a;-b"], ['"', ", =c"], ["\\", "+\\=", ";\\=d"]]
    assert [json.loads(defuse(cell)) for cell in lists] == lists


# what OWASP lists, in front of what a spreadsheet may drop and behind what may end a cell
FORMULAS = [
    f"a{end}{dropped}{start}HYPERLINK(1)"
    for end in ("", ",", ";", "\t", "|", "\n", "\r\n", ";,", "x")
    for dropped in ("", " ", '"', "'", '""', "''", ' "', " '", "\u00a0", "\t", "\r", "\n", "'\n", "\0")
    for start in ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20", "\t", "\r", "\n", "\\=", "\\\\-", "\\\t=")
]


def test_no_cell_of_a_download_is_a_formula_wherever_a_spreadsheet_splits_it(space):
    texts = [*FORMULAS, *(text[1:] + " x" for text in FORMULAS if len(text) > 13)]
    upload = {"files": ("a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))}
    sent = httpx.post(f"{space.address}/gradio_api/upload", files=upload, timeout=120).json()
    ask(space, "open_file", [{"path": sent[0], "meta": {"_type": "gradio.FileData"}}, None], "formulas")
    ask(space, "begin_file", [None], "formulas")
    ask(space, "run_file", [None, "text", 0.9, None], "formulas")
    downloads = [
        content.decode("utf-8-sig") for path, content in space.files().items() if path.name == "predictions.csv"
    ]
    (download,) = (content for content in downloads if "HYPERLINK" in content)
    csv.field_size_limit(len(download))
    for delimiter in ",;\t|":
        for quotes in ({"quotechar": '"'}, {"quotechar": "'"}, {"quoting": csv.QUOTE_NONE}):
            cells = [
                cell
                for row in csv.reader(io.StringIO(download, newline=""), delimiter=delimiter, **quotes)
                for cell in row
            ]
            assert sum("HYPERLINK" in cell for cell in cells) > 1
            for cell in cells:
                assert not cell.startswith(
                    ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
                )
                assert not re.match(r"[\s\0\"']*[=+@\uff1d\uff0b\uff0d\uff20-]", cell), (delimiter, quotes, cell)

    # read back as docs/space.md says
    marked = re.compile(FORMULA.pattern.replace("(?=", r"(\\) (?="), re.VERBOSE)
    rows = csv.DictReader(io.StringIO(download, newline=""))
    assert [marked.sub(lambda match: match[0][:-1], row["text"]) for row in rows] == texts


# what is shown


def test_nothing_hostile_becomes_markup(classifier):
    found = classify_all(classifier, [HOSTILE], None)[0]
    found["label"] = found["path"][-1]["label"] = HOSTILE
    explained = {
        "label": HOSTILE, "score": 0.5, "blank_score": 0.1, "rest": 0.0, "error": 0.0, "characters_read": 20,
        "words": [{"word": HOSTILE[:20], "start": 0, "end": 20, "weight": 0.4}],
    }  # fmt: skip
    record = {"line": 1, "text": HOSTILE, "predicted": HOSTILE, "probability": 1.0, "answer": [HOSTILE]}
    pages = [
        views.result("", found, views.coverage_answer(0.9, found["path"]), {HOSTILE: HOSTILE}), views.words(HOSTILE, explained, False), views.refusal(HOSTILE), views.facts({HOSTILE: HOSTILE}),
        views.preview([record]), views.problems([{"line": 1, "problem": HOSTILE}]),
        views.result("", found | {"labels": [found]}, "", {HOSTILE: HOSTILE}), views.recall_answer(0.9, found["path"]),
        views.labels_preview([record | {"labels": [HOSTILE], "scores": [1.0]}]),
    ]  # fmt: skip
    for page in pages:
        assert "<img" not in page
        assert "alert(1)&gt;" in page
        assert not re.search(r"[${}`\x07]", page)
    levels = [{HOSTILE: 0.7, "b": 0.3}]
    for figure in (
        views.bars(levels, [HOSTILE]),
        views.icicle(levels, {HOSTILE: "", "b": ""}, [HOSTILE]),
        views.tree([(HOSTILE, 1), ("b", 1)], levels[0], {HOSTILE}),
    ):
        assert "<img" not in figure.to_json()
        assert "\\u003cimg" not in figure.to_json()


def test_a_name_from_right_to_left_does_not_split_the_number_beside_it():
    name = "\u0646\u0648\u0639 2"
    assert views.bars([{name: 0.3}], []).data[0].hovertext == (f"\u2068{name}\u2069: 30.0 %",)
    assert views.plotly_text("type 2") == "type 2"


def test_a_description_stands_beside_the_label(classifier):
    found = classify_all(classifier, ["A case of epilepsy."], None)[0]
    assert "a seizure disorder" in views.result("", found, "", {found["label"]: "a seizure disorder"})
    assert "a seizure disorder" not in views.result("", found, "", {"another": "a seizure disorder"})


def test_a_deep_taxonomy_of_thousands_is_drawn_with_few_boxes():
    """Draw a ten-level chain beside 3,000 siblings: there are few boxes and bars, and boxes of parents contain their children."""
    chain = [f"level {i}" for i in range(1, 11)]
    parents = {name: chain[i - 1] if i else "" for i, name in enumerate(chain)}
    parents |= {f"sibling {i}": "level 1" for i in range(3000)}
    levels = [{name: 0.6} for name in chain]
    levels[0] = {"level 1": 1.0}
    levels[1] |= {f"sibling {i}": 0.4 / 3000 for i in range(3000)}
    figure = views.icicle(levels, parents, chain)
    bar = figure.data[0]
    assert len(bar.y) == 11
    assert "3,000 others 40.0 %" in bar.text
    low = dict(zip(bar.text, zip(bar.base, bar.y, strict=True), strict=True))
    assert low["3,000 others 40.0 %"] == pytest.approx((0.6, 0.4))
    assert sum(len(trace.y) for trace in views.bars(levels, chain).data) == 1 + 7 + 1 + 1
    assert (
        views.bars(levels, chain).layout.height
        == views.bars([dict.fromkeys(level, 0.0) for level in levels], []).layout.height
    )


def test_the_tree_of_several_labels_has_a_bar_a_node_and_adds_nothing_up():
    nodes = [("a", 1), ("b", 2), ("c", 2), ("d", 1)]
    figure = views.tree(nodes, {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6}, {"a", "c"})
    assert list(figure.data[0].x) == [0.9, 0.8, 0.7, 0.6]
    shown = [note.text for note in figure.layout.annotations]
    assert shown == ["✓ a  <b>90.0 %</b>", "b  <b>80.0 %</b>", "✓ c  <b>70.0 %</b>", "d  <b>60.0 %</b>"]
    shift = [note.xshift for note in figure.layout.annotations]
    assert shift[1] == shift[2] > shift[0] == shift[3]
    assert views.tree(nodes, None, set()).layout.height == figure.layout.height


def test_a_tree_of_thousands_shows_what_is_predicted_and_most_probable_with_the_nodes_above():
    nodes = [("root", 1), *((f"leaf {i}", 2) for i in range(3000))]
    scores = {label: 1 - i / 3001 for i, (label, _) in enumerate(nodes)}
    figure = views.tree(nodes, scores, {"root", "leaf 2999"})
    shown = [note.text for note in figure.layout.annotations]
    assert len(shown) == views.TREE_ROWS + 1
    assert shown[0].startswith("✓ root")
    assert shown[-2].startswith("✓ leaf 2999")
    assert shown[-1] == f"2,971 others, each at most {views.percent(scores['leaf 28'])}"


def test_the_menu_of_a_large_taxonomy_has_the_most_probable_nodes_in_reading_order():
    tree = Taxonomy([{"root": [f"leaf {i}" for i in range(3000)]}])
    own = SimpleNamespace(tree=tree)
    assert len(Service.choices(own)) == MENU
    scores = {f"leaf {i}": i / 3000 for i in range(3000)}
    found = Service.choices(own, {"levels": [{"root": 1.0}, scores]})
    first = 3001 - MENU
    assert found == [("root", "root"), *((f"root › leaf {i}", f"leaf {i}") for i in range(first, 3000))]


def test_a_single_remaining_node_is_drawn_instead_of_others():
    level = {f"leaf {i}": 1 / (views.BARS + 1) for i in range(views.BARS + 1)}
    assert not any("others" in note.text for note in views.bars([level], []).layout.annotations)
    nodes = [(f"leaf {i}", 1) for i in range(views.TREE_ROWS + 1)]
    shown = [note.text for note in views.tree(nodes, None, set()).layout.annotations]
    assert shown == [label for label, _ in nodes]


def luminance(colour: str) -> float:
    """Return the relative luminance of WCAG 2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_every_probability_in_the_icicle_can_be_read():
    """Check for a contrast of at least 4.5, which level AA of WCAG 2 requires."""
    for share in range(1, 101):
        figure = views.icicle([{"a": share / 100, "b": 1 - share / 100}], {"a": "", "b": ""}, ["a", "b"])
        for text, box in zip(figure.data[0].textfont.color, figure.data[0].marker.color, strict=True):
            light, dark = sorted((luminance(text), luminance(box)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (share, text, box)


def test_line_breaks_of_windows_are_kept():
    assert views.escape_html("a\r\nb\x07") == "a\r\nb\ufffd"


def test_no_label_and_a_long_answer_are_shown(labels_classifier):
    found = classify_all(labels_classifier, ["We report on the weather."], None)[0]
    assert found["labels"] == []
    assert "No label" in views.result("", found, "", {})
    assert views.recall_answer(0.5, []) == "For 50% recall: no node"
    long = views.recall_answer(0.9, [{"label": f"n{i}", "score": 0.5} for i in range(100)])
    assert long.endswith("<bdi>n19</bdi></b> and 80 more")
    record = {"line": 1, "text": "a", "labels": [], "scores": [], "answer": [f"n{i}" for i in range(100)]}
    assert "<bdi>n19</bdi> and 80 more<" in views.labels_preview([record])


def test_only_exact_probabilities_are_shown_as_0_or_100_percent():
    shown = [views.percent(share) for share in (0, 0.0004, 0.5, 0.99951, 1)]
    assert shown == ["0.0 %", "< 0.1 %", "50.0 %", "> 99.9 %", "100.0 %"]


def test_the_most_important_sections_of_the_card_are_shown_first(clear_checkpoint):
    card = (Path(clear_checkpoint) / "README.md").read_text()
    first, more = views.card_parts(card)
    assert re.findall(r"(?m)^## (.*)", first) == ["Results", "Limits and intended use", "Licence"]
    assert "Training" in re.findall(r"(?m)^## (.*)", more)
    assert "general pathological conditions" in first
    assert "trust_remote_code" not in first + more
    assert "![" not in first + more
    assert views.licence(card) == "apache-2.0"


# the API


def test_answers_are_those_of_the_pipeline(client, classifier, texts):
    for text in texts[:3]:
        found, expected = client.predict(text, 0.8, api_name="/classify"), classifier(text, coverage=0.8)
        assert found["label"] == expected["label"]
        assert found["score"] == pytest.approx(expected["score"], abs=1e-5)
        assert [n["label"] for n in found["answer"]] == [n["label"] for n in expected["answer"]]
        for level, other in zip(found["levels"], expected["levels"], strict=True):
            assert level == pytest.approx(other, abs=1e-5)
    assert client.predict(texts[0], api_name="/classify")["answer"] is None


def test_labels_are_those_of_the_pipeline(labels_client, labels_classifier):
    for text in ("Outcomes of epilepsy after hypertension.", "Fever and dementia", "We report on the weather."):
        expected = labels_classifier(text, recall=0.8)
        found = labels_client.predict(text, 0.8, api_name="/classify")
        for name in ("labels", "answer"):
            assert [node["label"] for node in found[name]] == [node["label"] for node in expected[name]]
            assert [node["score"] for node in found[name]] == pytest.approx(
                [node["score"] for node in expected[name]], abs=1e-5
            )
        assert [node["path"][0]["label"] for node in found["labels"]] == [
            node["path"][0]["label"] for node in expected["labels"]
        ]
        for level, other in zip(found["levels"], expected["levels"], strict=True):
            assert level == pytest.approx(other, abs=1e-5)
    assert found["labels"] == []
    found = labels_client.predict("Outcomes of epilepsy after hypertension.", api_name="/classify")
    assert {node["label"] for node in found["labels"]} == {"nervous system diseases", "cardiovascular diseases"}
    assert found["answer"] is None
    words = labels_client.predict("Outcomes of epilepsy after hypertension.", api_name="/explain")
    assert words["label"] == found["labels"][0]["label"]


def test_a_file_of_several_labels_a_text(labels_client, tmp_path):
    (tmp_path / "in.txt").write_text("Outcomes of epilepsy after hypertension.\nWe report on the weather.\n")
    file = handle_file(str(tmp_path / "in.txt"))
    found = labels_client.predict(file, None, 0.9, api_name="/classify_file")
    first, second = found["rows"]
    assert set(first["labels"]) == {"nervous system diseases", "cardiovascular diseases"}
    assert all(score > 0.5 for score in first["scores"])
    assert set(first["labels"]) < set(first["answer"])
    assert (second["labels"], second["scores"]) == ([], [])
    (row, other) = csv.DictReader(io.StringIO(to_csv([join_lists(record) for record in found["rows"]]), newline=""))
    assert row["labels"].split("; ") == first["labels"]
    assert [float(score) for score in row["scores"].split("; ")] == first["scores"]
    assert (other["labels"], other["scores"]) == ("", "")
    ambiguous = {"labels": ["ulcers; other", "burns"]}  # two labels, which must not be read back as three
    (row,) = csv.DictReader(io.StringIO(to_csv([join_lists(ambiguous)])))
    assert json.loads(row["labels"]) == ambiguous["labels"]


def test_the_api_of_several_labels_is_typed(labels_client):
    api = labels_client.view_api(return_format="dict")["named_endpoints"]
    returned = api["/classify"]["returns"][0]["python_type"]["type"]
    assert "labels: list[dict(" in returned
    assert [parameter["parameter_name"] for parameter in api["/classify"]["parameters"]] == ["text", "recall"]
    assert "scores: list[float]" in api["/classify_file"]["returns"][0]["python_type"]["type"]


@pytest.mark.parametrize(
    ("recall", "message"),
    [
        (0.97, "Recall 0.97 needs 33 labelled validation texts, and the checkpoint was calibrated on fewer"),
        (2, "The recall must lie between 0.5 and 0.99"),
    ],
)
def test_a_recall_that_is_not_guaranteed_is_refused(labels_client, recall, message):
    with pytest.raises(AppError, match=message):
        labels_client.predict("Epilepsy", recall, api_name="/classify")


def test_a_model_without_calibration_answers_and_has_no_coverage(uncalibrated_run, texts, tmp_path):
    """Also check that the files of a Space are deleted when the terminal that started it is closed."""
    model = str(uncalibrated_run[0])
    classifier = pipeline("hierarchical-text-classification", model=model, trust_remote_code=True)
    expected = classifier(texts[0])
    upload = {"files": ("in.csv", f'text\n"{texts[0]}"\n'.encode())}
    with SpaceServer(model, tmp_path) as started:
        page = httpx.get(f"{started.address}/config", timeout=120).json()
        controls = {part["props"].get("elem_id"): part["props"] for part in page["components"]}
        for name in ("coverage", "file-coverage"):
            assert controls[name]["interactive"] is False
            assert "Not available: this model was trained without validation rows" in controls[name]["info"]
        assert "no: trained without validation rows" in controls["facts"]["value"]
        mine = Client(started.address, verbose=False)
        found = mine.predict(texts[0], api_name="/classify")
        assert (found["label"], found["answer"]) == (expected["label"], None)
        assert found["score"] == pytest.approx(expected["score"], abs=1e-5)
        with pytest.raises(AppError, match="This checkpoint was not calibrated"):
            mine.predict(texts[0], 0.9, api_name="/classify")
        # the page sends the value of its slider, which nobody can move
        shown = ask(started, "show_result", [texts[0], controls["coverage"]["value"]], "page")
        assert expected["label"] in shown
        assert "coverage needs one that was trained with validation rows" in shown
        sent = httpx.post(f"{started.address}/gradio_api/upload", files=upload, timeout=120).json()
        ask(started, "open_file", [{"path": sent[0], "meta": {"_type": "gradio.FileData"}}, None], "page")
        ask(started, "begin_file", [None], "page")
        done = ask(started, "run_file", [None, "text", controls["file-coverage"]["value"], None], "page")
        assert "Done: 1 of 1 rows" in done
        assert started.files()
        # nohup has what it starts ignore SIGHUP, and so would the Space that a test starts under it
        started.stop(signal.SIGTERM if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else signal.SIGHUP)
        assert not started.files()


def test_the_prediction_depends_only_on_the_characters_read(client, texts):
    long = " ".join(texts)
    found = client.predict(long, api_name="/classify")
    assert 0 < found["characters_read"] < found["characters"] == len(long)
    whole = "A study of ulcers. \n"
    explained = client.predict(whole, "neoplasms", api_name="/explain")
    assert explained["characters_read"] == client.predict(whole, api_name="/classify")["characters_read"] == len(whole)
    cut_there = client.predict(long[: found["characters_read"]], api_name="/classify")
    assert cut_there["score"] == pytest.approx(found["score"], abs=1e-5)
    assert cut_there["characters_read"] == found["characters_read"]


def test_a_file_through_the_api(client, texts, tmp_path):
    with (tmp_path / "in.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "abstract"], ["a", texts[0]], ["b"], ["c", " "], ["d", texts[1]]])
    found = client.predict(handle_file(str(tmp_path / "in.csv")), api_name="/classify_file")
    assert found["column"] == "abstract"
    assert [(row["line"], row["text"]) for row in found["rows"]] == [(2, texts[0]), (5, texts[1])]
    single = client.predict(texts[1], api_name="/classify")
    assert found["rows"][1]["predicted"] == single["label"]
    assert found["rows"][1]["probability"] == pytest.approx(single["score"], abs=2e-5)
    assert [problem["line"] for problem in found["problems"]] == [3, 4]


def test_the_api_is_typed_and_documented(space, client):
    api = client.view_api(return_format="dict")["named_endpoints"]
    assert api.keys() == {"/classify", "/explain", "/classify_file"}
    returned = api["/classify"]["returns"][0]["python_type"]["type"]
    assert "path: list[dict(label: str, score: float)]" in returned
    assert (
        "words: list[dict(word: str, start: int, end: int, weight: float"
        in api["/explain"]["returns"][0]["python_type"]["type"]
    )
    assert "problems: list[dict(line: int, problem: str)]" in api["/classify_file"]["returns"][0]["python_type"]["type"]
    described = {
        name: endpoint["description"]
        for name, endpoint in httpx.get(f"{space.address}/gradio_api/info", timeout=120)
        .json()["named_endpoints"]
        .items()
    }
    assert "Classify a text" in described["/classify"]
    assert "integrated gradients" in described["/explain"]
    assert "10,000 rows" in described["/classify_file"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("  \0", None, "/classify"), "There is no text"),
        (("x" * 20_001, None, "/classify"), "20,001 characters; at most 20,000"),
        ((7, None, "/classify"), "A text is needed"),
        (("text", 2, "/classify"), "between 0.5 and 0.99"),
        (("text", "x", "/classify"), "must be a number"),
        (("text", "no such node", "/explain"), "no such node"),
    ],
)
def test_a_refusal_says_why(client, words, message):
    *given, name = words
    with pytest.raises(AppError, match=message):
        client.predict(*given, api_name=name)


# safety


def test_nothing_of_what_is_sent_is_logged_or_kept(space, client, texts, tmp_path):
    mark = "Zebrafish-4711"
    csv_file = tmp_path / f"{mark}.csv"
    csv_file.write_text(f"{mark},text\n{mark},{mark} {texts[0]}\n{mark}\n")
    client.predict(f"{mark} {texts[0]}", api_name="/classify")
    client.predict(f"{mark} colitis", api_name="/explain")
    client.predict(handle_file(str(csv_file)), "text", api_name="/classify_file")
    with pytest.raises(AppError):
        client.predict(mark * 5000, api_name="/classify")
    # call every function of the page with invalid arguments, also functions that are hidden from clients
    functions = httpx.get(f"{space.address}/config", timeout=120).json()["dependencies"]
    assert {"classify", "explain", "classify_file", "run_file"} <= {function["api_name"] for function in functions}
    for function in functions:
        session = {"session_hash": f"{mark}{function['id']}"}
        for value in (mark, {"path": f"/etc/{mark}", "meta": {"_type": "gradio.FileData"}}, "half \ud800 " + mark):
            body = json.dumps({"data": [value] * 3, "fn_index": function["id"], **session}).encode("ascii")
            with httpx.Client(base_url=f"{space.address}/gradio_api/queue", timeout=120) as http:
                joined = http.post("join", content=body, headers={"content-type": "application/json"})
                assert joined.status_code == 200
                assert '"process_completed"' in http.get("data", params=session).text
    for route in ("call/v2/classify", f"run/{mark}", f"call/{mark}"):
        httpx.post(f"{space.address}/gradio_api/{route}", json={"data": [mark], mark: mark}, timeout=120)
    assert mark not in space.log()
    kept = {path: content for path, content in space.files().items() if mark.encode() in content or mark in path.name}
    assert not kept


def test_no_path_of_the_server_is_served(space, client, clear_checkpoint):
    for path in ("/etc/passwd", f"{clear_checkpoint}/config.json", str(ROOT / "space" / "app.py"), "../../etc/passwd"):
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/"):
            assert httpx.get(f"{space.address}{route}{path}", timeout=120).status_code in (403, 404)
    for route in (
        "deep_link?session_hash=x",
        "proxy=http://127.0.0.1:1/",
        "file=http://127.0.0.1:1/",
        "runs",
        "openapi.json",
    ):
        assert httpx.get(f"{space.address}/gradio_api/{route}", timeout=120).status_code == 404
    assert httpx.get(f"{space.address}/monitoring", timeout=120).status_code == 404
    with pytest.raises(AppError, match="upload it again"):
        client.predict({"path": "/etc/passwd", "meta": {"_type": "other"}}, api_name="/classify_file")


def test_requests_that_are_too_large_are_refused(space):
    big = b"x" * (MAX_BYTES + 2**20)
    answer = httpx.post(f"{space.address}/gradio_api/upload", files={"files": ("a.csv", big)}, timeout=120)
    assert answer.status_code == 413
    answer = httpx.post(f"{space.address}/gradio_api/queue/join", content=big, timeout=120)
    assert answer.status_code == 413
    assert answer.json()["detail"] == "The request is too large."  # which the page shows
    several = [("files", (f"{i}.csv", b"x" * (MAX_BYTES // 4))) for i in range(8)]
    answer = httpx.post(f"{space.address}/gradio_api/upload", files=several, timeout=120)
    assert answer.status_code == 413
    answer = httpx.post(f"{space.address}/gradio_api/call/upload", content=b"x" * 2**23, timeout=120)
    assert answer.status_code == 413
    assert not any(len(content) > 2**20 for content in space.files().values())


def is_on_disk(space: SpaceServer, content: bytes) -> bool:
    return any(content in kept for kept in space.files().values())


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(300):
        if condition():
            return
        time.sleep(0.2)
    pytest.fail("waited for a minute")


def ask(space: SpaceServer, name: str, data: list, session: str) -> str:
    """Call a function of the page as the browser does. Return the messages of the server."""
    functions = httpx.get(f"{space.address}/config", timeout=120).json()["dependencies"]
    number = next(function["id"] for function in functions if function["api_name"] == name)
    with httpx.Client(base_url=f"{space.address}/gradio_api/queue", timeout=120) as http:
        http.post("join", json={"data": data, "fn_index": number, "session_hash": session})
        return http.get("data", params={"session_hash": session}).text


def strict_space(model: str, folder: Path, **limits: int) -> SpaceServer:
    """Serve a copy of the Space with smaller limits of `retention.py`."""
    space = folder / "space"
    space.mkdir()
    for name in SPACE_FILES:
        (space / name).parent.mkdir(parents=True, exist_ok=True)
        file = ROOT / "space" / name
        (space / name).write_bytes((file if file.exists() else ROOT / name).read_bytes())
    code = (space / "retention.py").read_text()
    for name, limit in limits.items():
        code, count = re.subn(rf"(?m)^{name} = [^#\n]+", f"{name} = {limit}  ", code)
        assert count == 1
    (space / "retention.py").write_text(code)
    return SpaceServer(model, folder, app=space / "app.py")


def send_file(http: httpx.Client, name: str, content: bytes) -> httpx.Response:
    return http.post("/gradio_api/upload", files={"files": (name, content)})


def call_api(http: httpx.Client, name: str, *data: object) -> str:
    """Call the API without a client library. Return the id of the event, with which `read_result` reads the result."""
    called = http.post(f"/gradio_api/call/{name}", json={"data": [*data]})
    assert called.status_code == 200, called.text
    return called.json()["event_id"]


LONG_LINES = ["a" * 20_000] * 60


def classify_lines(http: httpx.Client, lines: list[str]) -> str:
    path = send_file(http, "lines.txt", "\n".join(lines).encode()).json()[0]
    return call_api(http, "classify_file", {"path": path, "meta": {"_type": "gradio.FileData"}}, None, None)


def read_result(http: httpx.Client, name: str, event: str) -> httpx.Response:
    return http.get(f"/gradio_api/call/{name}/{event}")


def test_results_and_sessions_that_nobody_uses_are_deleted_in_time(clear_checkpoint, tmp_path):
    with (
        strict_space(clear_checkpoint, tmp_path, MAX_UNREAD=2_200_000, KEPT_SECONDS=4, SWEEP_SECONDS=1) as started,
        httpx.Client(base_url=started.address, timeout=120) as http,
    ):
        classify_lines(http, LONG_LINES)  # more than half of the limit
        unread = call_api(http, "classify", "Zebrafish with colitis", None)
        read = call_api(http, "classify", "Zebrafish with colitis", None)
        assert "event: complete" in read_result(http, "classify", read).text  # so the first one is complete, too
        time.sleep(6)
        for event in (unread, read, "a1b2"):
            answer = read_result(http, "classify", event)
            assert answer.status_code == 404
            assert answer.json()["detail"].startswith("There is no such result.")
        assert "event: complete" in read_result(http, "classify_file", classify_lines(http, LONG_LINES)).text
        ask(started, "begin_file", [None], "unused")
        time.sleep(6)
        assert "Nothing is running." in ask(started, "cancel_file", [None], "unused")
        classify_lines(http, ["Colitis"] * 10_000)  # for longer than a session is kept
        ask(started, "begin_file", [None], "waiting")
        assert "There is no file" in ask(started, "run_file", [None, "text", 0.9, None], "waiting")


def test_unread_results_have_a_limit(clear_checkpoint, tmp_path):
    lines = LONG_LINES  # one result fits, and two do not
    with (
        strict_space(clear_checkpoint, tmp_path, MAX_UNREAD=2_200_000) as started,
        httpx.Client(base_url=started.address, timeout=120) as http,
    ):
        for _ in range(3):  # a client that reads its results meets no limit
            assert "event: complete" in read_result(http, "classify_file", classify_lines(http, lines)).text
        unread, refused = classify_lines(http, lines), classify_lines(http, lines)
        answer = read_result(http, "classify_file", refused).text
        assert answer.startswith("event: error")
        assert "the unread results of all users have reached" in answer
        small = call_api(http, "classify", "Colitis", None)
        assert "event: complete" in read_result(http, "classify", small).text
        assert "event: complete" in read_result(http, "classify_file", unread).text
        classify_lines(http, lines)
        (tmp_path / "in.txt").write_text("\n".join(lines))
        client = Client(started.address, verbose=False)
        with pytest.raises(AppError, match="the unread results of all users have reached 2 MB"):
            client.predict(handle_file(tmp_path / "in.txt"), api_name="/classify_file")


def test_a_client_that_stops_reading_is_disconnected_in_time(clear_checkpoint, tmp_path):
    """Ask for a result of 12 MB of JSON, which the sockets do not hold, and read nothing."""
    lines = ["\u00e9" * 20_000] * 100
    with (
        strict_space(clear_checkpoint, tmp_path, MAX_UNREAD=8_000_000, KEPT_SECONDS=20, SWEEP_SECONDS=1) as started,
        httpx.Client(base_url=started.address, timeout=120) as http,
        socket.socket() as connection,
    ):
        event = classify_lines(http, lines)
        host, port = started.address.removeprefix("http://").split(":")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect((host, int(port)))
        connection.sendall(f"GET /gradio_api/call/classify_file/{event} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answer = connection.recv(1000)  # until then the file is classified
        other = read_result(http, "classify_file", classify_lines(http, lines[:40])).text
        assert "the unread results of all users have reached" in other  # with what the stopped client has not read
        time.sleep(22)
        assert "event: complete" in read_result(http, "classify_file", classify_lines(http, lines)).text
        while part := connection.recv(2**16):
            answer += part
        assert b"event: complete" in answer
        assert len(answer) < 6 * 20_000 * 100


def test_what_was_sent_and_answered_is_not_kept(space):
    """Send texts of 3 MB, which are refused, in sessions of their own: their memory is used again."""
    with httpx.Client(base_url=space.address, timeout=120) as http:

        def send_texts(count: int) -> int:
            for _ in range(count):
                answer = read_result(http, "classify", call_api(http, "classify", "a" * 3 * 2**20, None))
                assert "at most 20,000 are accepted" in answer.text
            return space.memory()

        before = send_texts(10)
        assert send_texts(60) - before < 60 * 2**20


def test_uploads_have_a_limit(clear_checkpoint, tmp_path):
    """Upload files of 10 MB, the most that is documented. Of files that are read at once, any number is accepted."""
    full = ("a\n" * (MAX_BYTES // 2)).encode()

    def classify(http: httpx.Client, sent: httpx.Response) -> str:
        file = {"path": sent.json()[0], "meta": {"_type": "gradio.FileData"}}
        return read_result(http, "classify_file", call_api(http, "classify_file", file, None, None)).text

    with (
        strict_space(clear_checkpoint, tmp_path, MAX_STORED=25 * 2**20) as started,
        httpx.Client(base_url=started.address, timeout=120) as http,
    ):
        for _ in range(5):
            assert "more than 10,000 rows" in classify(http, send_file(http, "a.txt", full))
        sent = [send_file(http, "a.txt", full) for _ in range(2)]
        assert [answer.status_code for answer in sent] == [200, 200]
        kept = sum(map(len, started.files().values()))
        refused = send_file(http, "a.txt", full)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "60"
        assert refused.json()["detail"] == "The files of all users have reached 25 MB: try again in 60 seconds."
        assert sum(map(len, started.files().values())) == kept
        tiny = [send_file(http, "a.txt", b"a\n").status_code for _ in range(100)]
        assert tiny[0] == 200
        assert tiny[-1] == 429  # many tiny files fill a disk, too
        assert "more than 10,000 rows" in classify(http, sent[0])  # and so it is deleted
        assert send_file(http, "a.txt", b"a\n" * 1000).status_code == 200


def test_downloads_and_uploads_are_deleted_in_time_and_all_with_the_process(clear_checkpoint, tmp_path):
    with strict_space(clear_checkpoint, tmp_path, KEPT_SECONDS=4, SWEEP_SECONDS=1) as started:
        upload = {"files": ("never-classified.csv", b"text\nZebrafish\n")}
        assert httpx.post(f"{started.address}/gradio_api/upload", files=upload, timeout=120).status_code == 200
        assert is_on_disk(started, b"Zebrafish")
        wait_until(lambda: not is_on_disk(started, b"Zebrafish"))
        sent = httpx.post(f"{started.address}/gradio_api/upload", files={"files": ("a.txt", b"Okapi\n")}, timeout=120)
        with httpx.stream("GET", f"{started.address}/gradio_api/heartbeat/open", timeout=120) as page:
            beats = page.iter_raw()
            next(beats)  # the page stays open: its downloads are deleted by their age
            ask(started, "open_file", [{"path": sent.json()[0], "meta": {"_type": "gradio.FileData"}}, None], "open")
            ask(started, "begin_file", [None], "open")
            ask(started, "run_file", [None, "text", 0.9, None], "open")
            assert any(Path(path).name == "predictions.csv" for path in started.files())
            wait_until(lambda: not any(Path(path).name.startswith("predictions") for path in started.files()))
        httpx.post(f"{started.address}/gradio_api/upload", files=upload, timeout=120)
        started.stop()
        assert not started.files()


def test_a_closed_page_keeps_no_file(space):
    upload = httpx.post(f"{space.address}/gradio_api/upload", files={"files": ("a.txt", b"Okapi\n")}, timeout=120)
    with httpx.stream("GET", f"{space.address}/gradio_api/heartbeat/closed", timeout=120) as page:
        beats = page.iter_raw()  # without a reference, it closes the connection
        next(beats)
        ask(space, "open_file", [{"path": upload.json()[0], "meta": {"_type": "gradio.FileData"}}, None], "closed")
        ask(space, "begin_file", [None], "closed")
        assert "Okapi" in ask(space, "run_file", [None, "text", 0.9, None], "closed")

    def forgotten() -> bool:
        ask(space, "begin_file", [None], "closed")
        return "There is no file" in ask(space, "run_file", [None, "text", 0.9, None], "closed")

    wait_until(forgotten)


def test_an_upload_that_breaks_off_leaves_nothing(space):
    host, port = space.address.removeprefix("http://").split(":")
    head = "POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    head += "Content-Length: 5000000\r\n\r\n--b\r\nContent-Disposition: form-data; name=files; filename=a.csv\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head.encode() + b"Tapir\n" * 400_000)
        wait_until(lambda: is_on_disk(space, b"Tapir"))
    wait_until(lambda: not is_on_disk(space, b"Tapir"))


def test_equal_files_of_several_clients_are_each_read(space, tmp_path):
    (tmp_path / "same.csv").write_text("text\nColitis\n")
    client = Client(space.address, verbose=False)
    jobs = [client.submit(handle_file(str(tmp_path / "same.csv")), api_name="/classify_file") for _ in range(4)]
    assert [len(job.result(120)["rows"]) for job in jobs] == [1] * 4


@pytest.mark.parametrize("name", ["/classify_file", "/classify"])
def test_no_client_makes_the_server_download(client, name):
    with pytest.raises(AppError, match="A URL is not fetched"):
        client.predict({"path": "http://127.0.0.1:1/a.csv", "meta": {"_type": "gradio.FileData"}}, api_name=name)


def test_a_text_waits_for_no_file_and_a_full_queue_is_reported(space, client, texts):
    """Classify texts while a file of 10,000 rows is classified; its run is cancelled before the end."""
    functions = httpx.get(f"{space.address}/config", timeout=120).json()["dependencies"]
    numbers = {function["api_name"]: function["id"] for function in functions}
    upload = {"files": ("long.txt", f"{texts[0][:900]}\n".encode() * 10_000)}
    file = {"path": httpx.post(f"{space.address}/gradio_api/upload", files=upload, timeout=120).json()[0]}
    ask(space, "open_file", [file | {"meta": {"_type": "gradio.FileData"}}, None], "long")
    ask(space, "begin_file", [None], "long")
    body = {"data": [None, "text", 0.9, None], "fn_index": numbers["run_file"], "session_hash": "long"}
    with httpx.Client(base_url=f"{space.address}/gradio_api", timeout=120) as http:
        assert http.post("queue/join", json=body).status_code == 200
        with http.stream("GET", "queue/data", params={"session_hash": "long"}) as messages:
            lines = messages.iter_lines()
            assert any('"process_generating"' in line for line in lines)
            assert client.predict("A study of colitis.", api_name="/classify")["label"]
            assert "Most probable class" in ask(space, "show_result", ["A study of colitis.", 0.9], "short")
            waiting = [http.post("queue/join", json=body | {"session_hash": f"{i}"}).status_code for i in range(101)]
            assert waiting == [200] * 100 + [503]
            with pytest.raises(QueueError, match="Queue is full!"):
                client.predict("A study of colitis.", api_name="/classify")
            cancel = {"data": [None], "fn_index": numbers["cancel_file"], "session_hash": "long"}
            assert "Cancelled" in http.post("run/predict", json=cancel).text  # else "Nothing is running."
            assert not any("Done:" in line for line in lines)

    def answers() -> bool:
        try:
            return bool(client.predict("A study of colitis.", api_name="/classify"))
        except QueueError:
            return False

    wait_until(answers)


# how it is published


def test_the_front_matter_and_the_requirements_agree():
    front = yaml.safe_load((ROOT / "space" / "README.md").read_text().split("---")[1])
    assert front["sdk"] == "gradio"
    assert (ROOT / "space" / front["app_file"]).is_file()
    assert front["license"] == "apache-2.0"
    requirements = (ROOT / "space" / "requirements.txt").read_text().split()
    from packaging.requirements import Requirement

    gradio = next(Requirement(line) for line in requirements if line.startswith("gradio"))
    assert front["sdk_version"] in gradio.specifier


def test_every_package_that_the_space_imports_is_required():
    import ast

    modules = {
        "hierarchical_clinicalbert",
        "taxonomy_hierarchical",
        *(file.stem for file in (ROOT / "space").glob("*.py")),
    }
    imported = set()
    for file in (ROOT / "space").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    others = imported - modules - set(sys.stdlib_module_names) - {"spaces", "starlette"}  # gradio brings starlette
    required = {re.split(r"[<>=]", line)[0] for line in (ROOT / "space" / "requirements.txt").read_text().split()}
    assert others <= required


# As in the package of this name: arguments and results are pickled, and an error comes back as its type's name.
ZERO_GPU = """
import pickle
lent = 0
def GPU(function):
    global lent
    lent += 1
    def run(*arguments):
        try:
            return pickle.loads(pickle.dumps(function(*pickle.loads(pickle.dumps(arguments)))))
        except Exception as error:
            raise RuntimeError(type(error).__name__) from None
    return run
"""


def test_where_zerogpu_is_its_decorator_is_used(clear_checkpoint, tmp_path):
    (tmp_path / "spaces.py").write_text(ZERO_GPU)
    code = f"""
import json, sys
sys.path[:0] = [{str(ROOT / "space")!r}, {str(tmp_path)!r}]
import spaces, app
service = app.Service(app.load({clear_checkpoint!r}, None))
node = service.classify("A study of angina.")["label"]
progress = lambda share, desc: None
pages = [service.show_result("", 0.9)[0], service.show_result("A study of angina.", 2)[0]]
pages += [service.show_words("A study of angina.", node, progress), service.explain("A study of angina.", node)["label"]]
print(json.dumps([spaces.lent, node, *pages]))
"""
    count, node, empty, high, words, explained = run_outside(code, tmp_path, {"HF_HUB_OFFLINE": "1"})
    assert count == 2
    assert "There is no text to classify." in empty
    assert node in high
    assert "The coverage must lie between 0.5 and 0.99." in high
    assert "angina" in words
    assert explained == node


def test_a_model_that_cannot_be_loaded_is_one_line(tiny_encoder, tmp_path):
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text('{"model_type": ')
    messages = {tiny_encoder: "it is not a checkpoint of this project", str(tmp_path / "torn"): "config.json"}
    code = f"""
import io, json, sys
sys.path.insert(0, {str(ROOT / "space")!r})
import app
outcomes = []
for model in {[*messages]!r}:
    sys.argv, sys.stderr = ["app.py", "--model", model], io.StringIO()
    try:
        app.main()
    except SystemExit as error:
        outcomes.append([error.code, sys.stderr.getvalue()])
print(json.dumps(outcomes))
"""
    for (exit_code, stderr), (model, message) in zip(run_outside(code, tmp_path), messages.items(), strict=True):
        assert exit_code == 2
        assert "Traceback" not in stderr
        last = stderr.strip().splitlines()[-1]
        assert last.startswith(f"app.py: error: cannot load the model {model}: ")
        assert message in last


@pytest.mark.parametrize("name", ["queueing.AsyncQueue", "state_holder.SessionState._update_value_in_config"])
def test_a_gradio_that_cannot_be_limited_is_one_line(clear_checkpoint, tmp_path, name):
    code = f"""
import io, json, sys
sys.path.insert(0, {str(ROOT / "space")!r})
import app
import gradio
del gradio.{name}
sys.argv, sys.stderr = ["app.py", "--model", {clear_checkpoint!r}], io.StringIO()
try:
    app.main()
except SystemExit as error:
    print(json.dumps([error.code, sys.stderr.getvalue()]))
"""
    exit_code, stderr = run_outside(code, tmp_path, {"HF_HUB_OFFLINE": "1"})
    assert exit_code == 2
    assert "Traceback" not in stderr
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("app.py: error: gradio 6.")
    assert f"{name.rpartition('.')[2]}, which the Space needs" in last


def test_the_space_starts_where_gradios_own_folder_cannot_be_made(clear_checkpoint, tmp_path):
    """Block gradio's default folder by a file, as if another user owned it. The Space's own folder is private, and deleted at the end."""
    (tmp_path / "gradio").write_text("")
    code = f"""
import json, os, stat, sys
sys.path.insert(0, {str(ROOT / "space")!r})
import app
page = app.build(app.load({clear_checkpoint!r}, None), {clear_checkpoint!r})
print(json.dumps([page.GRADIO_CACHE, stat.S_IMODE(os.stat(page.GRADIO_CACHE).st_mode)]))
"""
    folder, mode = run_outside(code, tmp_path, {"HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)})
    assert Path(folder).parent == tmp_path
    assert mode == 0o700
    assert not Path(folder).exists()
