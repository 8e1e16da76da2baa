"""Check the script that classifies texts."""

from conftest import run
from transformers import pipeline


def test_the_script_prints_a_path_for_each_predicted_label(labels_checkpoint, tmp_path):
    (tmp_path / "texts.csv").write_text("text\nColitis with epilepsy\n", encoding="utf-8-sig")  # as Excel saves it
    printed = run(labels_checkpoint, tmp_path / "texts.csv", command="examples/classify.py").stdout.split("\n")
    classify = pipeline("hierarchical-text-classification", model=labels_checkpoint, trust_remote_code=True)
    paths = [one["path"] for one in classify("Colitis with epilepsy")["labels"]]
    assert len(paths) == 2
    expected = ["→ " + " → ".join(f"{node['label']} ({node['score']:.0%})" for node in path) for path in paths]
    assert printed == ["", "  Colitis with epilepsy", *expected, ""]
