"""Feed random input to all parsers: each must give the documented error or a correct result.

Each test draws a few dozen inputs, the same in each run. ``FUZZ_EXAMPLES=20000 pytest
tests/test_fuzz.py`` draws 20,000 other inputs.
"""

import gzip
import json
from pathlib import Path

import pytest
import yaml
from fuzzing import fuzz, refused_in_one_line
from hypothesis import given
from hypothesis import strategies as st

from hierarchical_clinicalbert.data.tables import read_table
from hierarchical_clinicalbert.data.taxonomy_files import read_taxonomy
from hierarchical_clinicalbert.prediction.input import read_records
from hierarchical_clinicalbert.reading.sources import find_sources
from taxonomy_hierarchical import Taxonomy

# text as people write it, and as they do not: quotes, separators, control characters, halves of
# surrogate pairs
TEXT = st.text(
    st.one_of(st.sampled_from("ab /,;\"'\t\n\r\\{}[]:&*#-\0\ufeff\u2028"), st.characters()),
    max_size=12,
)
NAMES = st.text("abcdeAÄß /.", min_size=1, max_size=3)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)),
    max_leaves=12,
)
TREES = st.recursive(
    st.one_of(NAMES, st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(NAMES, inner, max_size=4)),
    max_leaves=20,
)
ODD_BYTES = st.one_of(
    st.binary(max_size=200), TEXT.map(lambda text: text.encode("utf-8", "surrogatepass"))
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Return a function that writes bytes to a file, given by name, and returns its path."""
    folder = tmp_path_factory.mktemp("fuzz")

    def write(name: str, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


# ── taxonomies ────────────────────────────────────────────────────────────────────────────────────


@fuzz
@given(st.sampled_from([".yaml", ".json", ".csv", ".txt"]), st.one_of(ODD_BYTES, JSON, TREES))
def test_any_bytes_of_a_taxonomy_file_are_a_taxonomy_or_one_error(file, suffix, content):
    """A taxonomy survives a round trip through JSON, and each label gives its node."""
    if not isinstance(content, bytes):
        dump = yaml.safe_dump if suffix == ".yaml" else json.dumps
        content = dump(content).encode("utf-8", "surrogatepass")
    with refused_in_one_line():
        tree = read_taxonomy(file(f"tree{suffix}", content))
        assert (
            Taxonomy(json.loads(json.dumps(tree.to_nested(), sort_keys=True)), tree.separator)
            == tree
        )
        for node in range(tree.num_nodes):
            assert tree.id(tree.labels[node]) == node
            assert tree.node_of_path[tuple(tree.names[i] for i in tree.path(node))] == node
            assert bool(tree.children(node)) == (node >= tree.num_leaves)


# ── data ──────────────────────────────────────────────────────────────────────────────────────────


@fuzz
@given(
    st.sampled_from(["csv", "tsv", "json", "jsonl", "ndjson", "parquet", "csv.gz", "jsonl.gz"]),
    st.one_of(
        ODD_BYTES,
        JSON,
        st.lists(st.one_of(JSON, st.fixed_dictionaries({"text": TEXT, "id": SCALARS})), max_size=4),
    ),
    st.sampled_from([b"", b"text,id\n", b"text\tid\n"]),
    st.booleans(),
)
def test_any_file_gives_columns_of_equal_length_and_records_with_a_text_or_a_problem(
    file, kind, content, head, whole
):
    if not isinstance(content, bytes):
        lines = content if isinstance(content, list) and kind != "json" else [content]
        content = "\n".join(map(json.dumps, lines)).encode()
    if kind.startswith(("csv", "tsv")):
        content = head + content
    if kind.endswith(".gz"):
        content = gzip.compress(content) if whole else gzip.compress(content)[:-3]
    sources = find_sources(str(file(f"records.{kind}", content)))
    with refused_in_one_line():
        assert len(read_table(*sources))
    with refused_in_one_line():
        for record in read_records(sources, None, "id"):
            assert (record.text is None) != (record.problem is None)
            assert record.text is None or (record.text.strip() and record.text.encode())
            json.dumps(record.id, allow_nan=False).encode()
