"""Run inference.ipynb from top to bottom on a test checkpoint, and compare the types of the outputs."""

import nbformat
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "inference.ipynb"


def test_the_notebook_runs_from_top_to_bottom(clear_checkpoint, labels_checkpoint, monkeypatch):
    monkeypatch.setenv("CHECKPOINT", clear_checkpoint)
    monkeypatch.setenv("LABELS_CHECKPOINT", labels_checkpoint)
    book = nbformat.read(NOTEBOOK, as_version=4)
    kinds = {
        cell["id"]: [o.output_type for o in cell.outputs if o.get("name") != "stderr"]
        for cell in book.cells
        if cell.cell_type == "code"
    }
    assert all(kinds.values()), "a cell of the notebook as it is committed has no output"
    resources = {"metadata": {"path": str(ROOT)}}
    NotebookClient(book, timeout=300, kernel_name="python3", resources=resources).execute()
    for cell in book.cells:
        if cell.cell_type == "code":
            assert [o.output_type for o in cell.outputs if o.get("name") != "stderr"] == kinds[cell["id"]]
    last = book.cells[-1].outputs[-1].text
    assert "the heaviest word: " in last
