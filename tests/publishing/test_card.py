"""Test the model card of finished runs: it parses back to the run's metrics, no name breaks it,
and no path leaks.
"""

import ast
import getpass
import json
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import snippets, train_label_sets
from huggingface_hub import ModelCard
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from configuration_hierarchical import HierarchicalConfig
from hierarchical_clinicalbert.publishing import card

ENCODER = "emilyalsentzer/Bio_ClinicalBERT"
COMMIT = "d5892b39a4adaed74b92212a44081509db72f87b"
HOSTILE = {
    "general pathological conditions": "colon: and 'quotes' \"both\"",
    "specific disease": "# heading {{ config }} {% raw %} [link](http://x) *bold* _it_ $$x$$ &lt;",
    "neoplasms": "a | b \\| c",
    "digestive system diseases": "````",
    "nervous system diseases": "---",
    "cardiovascular diseases": "<script>alert(1)</script> <!-- other/model -->",
}


class Run:
    """A finished run: its card, and what the card was written from."""

    def __init__(self, folder: Path, names: Mapping[str, str] = {}):
        """Read the files of a run. ``names`` replaces names of nodes."""

        def read(name: str) -> Any:
            content = (folder / name).read_text(encoding="utf-8")
            for old, new in names.items():
                content = content.replace(json.dumps(old), json.dumps(new))
            return json.loads(content)

        self.folder = folder
        self.text = (folder / "README.md").read_text(encoding="utf-8")
        self.config = HierarchicalConfig(**read("config.json"))
        self.report = read("data_report.json")
        self.metrics = read("metrics.json")
        self.several = self.config.is_multi_label
        self.guarantee = "recall" if self.several else "coverage"

    def write(self, folder: Path, report=None, metrics=None, settings=None, **arguments) -> str:
        """Write the card, by default of this run, to another folder, and return it."""
        report = self.report if report is None else report
        metrics = self.metrics if metrics is None else metrics
        card.write(folder, self.config, settings or {}, report, metrics, **arguments)
        return (folder / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folders(quickstart_run, tiny_encoder, tmp_path_factory) -> list[Path]:
    """Return the folders of a run with one path a text, and of one with several labels."""
    several = tmp_path_factory.mktemp("several") / "results"
    train_label_sets(tiny_encoder, several)
    return [quickstart_run[0], several]


@pytest.fixture(params=["one path", "several labels"])
def folder(request, folders) -> Path:
    return folders[request.param == "several labels"]


@pytest.fixture
def finished(folder) -> Run:
    return Run(folder)


@pytest.fixture
def one_path(folders) -> Run:
    return Run(folders[0])


def section(text: str, title: str) -> str:
    """Return what stands under a heading, or in a folded part."""
    titles = re.findall(r"\n## .*\n|<summary>.*</summary>\n", text)
    (start,) = {f"\n## {title}\n", f"<summary>{title}</summary>\n"} & {*titles}
    return re.split(r"\n## |\n</details>|\n<details>", text.split(start)[1])[0]


# ── front matter ──────────────────────────────────────────────────────────────────────────────────


def test_the_results_parse_back_to_the_numbers_of_the_metrics_file(finished):
    results = ModelCard(finished.text).data.eval_results
    measured = [name for name in finished.metrics if name.startswith("uncalibrated_eval_")]
    names = {name.removeprefix("uncalibrated_eval_") for name in measured} - {"loss"}
    prefixes = {"validation": "eval", "test": "test"}
    published = {f"{prefixes[r.dataset_split]}_{r.metric_name}": r.metric_value for r in results}
    assert published == {
        f"{prefix}_{name}": finished.metrics[f"{prefix}_{name}"]
        for prefix in prefixes.values()
        for name in names
    }
    types = {r.metric_name: r.metric_type for r in results}
    level = "level_2_micro_f1" if finished.several else "level_2_macro_f1"
    assert (types["log_loss"], types["macro_f1"], types[level]) == ("log_loss", "f1", "f1")
    kind = "jsonl" if finished.several else "csv"
    data = {
        (r.task_type, r.dataset_type, r.dataset_name, r.dataset_split, r.verified) for r in results
    }
    assert data == {("text-classification", "unknown", f"{s}.{kind}", s, None) for s in prefixes}


def test_only_an_encoder_and_a_data_set_of_the_hub_are_named_as_such(one_path, tmp_path):
    front = ModelCard(one_path.text).data.to_dict()
    assert (front["license"], front["library_name"]) == ("apache-2.0", "transformers")
    assert front["pipeline_tag"] == "text-classification"
    assert {"hierarchical-text-classification", "medical", "lora"} <= {*front["tags"]}
    assert front["widget"] == [{"text": card.MEDICAL_EXAMPLE}]
    assert front.keys().isdisjoint({"base_model", "base_model_relation", "datasets", "language"})

    hub = "TimSchopf/medical_abstracts"
    sources = [
        source | {"name": f"{hub} [x]", "dataset": hub} for source in one_path.report["sources"]
    ]
    one_path.config.encoder_name_or_path = ENCODER
    one_path.config.encoder_revision = COMMIT
    text = one_path.write(
        tmp_path, report=one_path.report | {"sources": sources}, model_id="me/model"
    )
    parsed = ModelCard(text).data
    assert (parsed.base_model, parsed.get("base_model_relation")) == (ENCODER, "adapter")
    assert (parsed.datasets, parsed.model_name) == ([hub], "me/model")
    assert {(r.dataset_type, r.dataset_name) for r in parsed.eval_results} == {(hub, hub)}
    link = f"[{ENCODER}](https://huggingface.co/{ENCODER})"
    assert f"{link} at revision `{COMMIT}`" in section(text, "Training")


# ── names and paths ───────────────────────────────────────────────────────────────────────────────


def test_hostile_names_break_neither_front_matter_nor_tables_nor_code(folder, tmp_path):
    run = Run(folder, HOSTILE)
    run.config.page = {}
    sources = [
        s | {"name": f"/data/--- <b>`x|y`: \n--- {s['split']}.csv"} for s in run.report["sources"]
    ]
    columns = {"text": "te|xt", "label": ["<la`bel>"]}
    text = run.write(tmp_path, report=run.report | {"sources": sources, "columns": columns})

    parsed = ModelCard(text)
    named = {r.dataset_name for r in parsed.data.eval_results}
    assert named == {f"--- <b>`x|y`: --- {split}.csv" for split in ("validation", "test")}
    assert parsed.text.lstrip().startswith("# Text classifier: colon: and")

    fence, drawn = re.search(r"^(`{5,})text\n(.*?)\n\1$", text, re.M | re.S).groups()
    assert drawn == run.config.tree.draw()  # whole, and ended by nothing in it
    outside = text.replace(f"{fence}text\n{drawn}\n{fence}", "").split("\n---\n", 1)[1]
    for code in re.findall(r"^```\w+\n.*?^```$", outside, re.M | re.S):
        outside = outside.replace(code, "")
    ours = '"<commit>"|</?(details|summary)>|<!-- .* (anew|use|result|loading) -->'
    outside = re.sub(ours, "", outside).replace("{{ config }} {% raw %}", "")
    assert not re.search(r"[<>]|\$\$|\*bold|\[link|\}\}|\{\{|\{%|%\}", outside)
    assert "&#60;script&#62;alert(1)&#60;/script&#62;" in outside
    assert not re.findall(r"^(?:---|# heading)", outside, re.M)

    blocks = [block.split("\n") for block in text.split("\n\n")]
    tables = [lines for lines in blocks if lines[0].startswith("| ")]
    assert len(tables) >= 7
    for lines in tables:
        assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert len(snippets(text)) == 3


def test_no_path_and_no_name_of_the_machine_is_written(finished, tmp_path):
    """Read the card of the run, and one whose settings and sources are absolute paths."""
    environment = json.dumps(finished.metrics["environment"])
    assert socket.gethostname() not in environment
    assert f"/{getpass.getuser()}" not in environment
    settings = {
        "model_name_or_path": "/home/alice/run",
        "attn_implementation": "/home/alice/kernel",
    }
    sources = [
        s | {"name": f"/home/alice/{Path(s['name']).name}"} for s in finished.report["sources"]
    ]
    report = finished.report | {"sources": sources, "taxonomy": "from /home/alice/taxonomy.yaml"}
    text = finished.write(tmp_path, report=report, settings=settings)
    assert all(name in text for name in ("kernel", "train.", "taxonomy.yaml"))
    assert "continued from an earlier checkpoint" in text
    for written in (text, finished.text):
        assert "alice" not in written
        assert str(finished.folder.parent) not in written
        assert not re.search(r"(?<![\w:/<.*])/\w+/", written)


# ── publishing ────────────────────────────────────────────────────────────────────────────────────


def test_renaming_keeps_what_was_written_by_hand(folders, tmp_path):
    run = Run(folders[0], {"neoplasms": "old/model", "cardiovascular diseases": "old/model-2"})
    text = run.write(tmp_path, model_id="old/model")
    by_hand = text.replace(
        "license: apache-2.0", "# my remark\nlanguage: [en]\nlicense: mit\nextra: {a: 1}"
    )
    demo = "See old/model-2 and its [Space](https://hf.co/spaces/old/model)."
    by_hand = by_hand.replace("## Use\n", f"## Demo\n\n{demo}\n\n## Use\n")
    renamed = ModelCard(card.update_for_publishing(by_hand, run.config, "new/model", False, []))
    before = ModelCard(by_hand)
    assert renamed.text == before.text.replace('"old/model"', '"new/model"')
    assert all('"new/model"' in snippet for snippet in snippets(str(renamed)))
    assert demo in renamed.text
    assert "├── old/model\n" in renamed.text  # a class of this name
    front = renamed.data.to_dict()
    assert (front["language"], front["license"], front["extra"]) == (["en"], "mit", {"a": 1})
    before.data.model_name = "new/model"
    assert front == before.data.to_dict()


def test_a_merged_card_describes_the_whole_model_and_has_the_given_examples(one_path, tmp_path):
    one_path.config.encoder_name_or_path = ENCODER
    one_path.config.encoder_revision = COMMIT
    before, after = ({"labels": [{"label": name, "score": 0.5}]} for name in ("before", "after"))
    text = one_path.write(tmp_path, example_result=before)
    old = re.search(r'classify\((".*?")', text)[1]
    examples = ['One "\\" text.', "Another."]

    def publish(written: str) -> str:
        return card.update_for_publishing(
            written, one_path.config, "me/model", True, examples, after
        )

    renamed = publish(text)
    assert "after" in section(renamed, "Use")
    assert "before" not in section(renamed, "Use")
    assert old not in renamed
    assert ast.literal_eval(re.search(r'classify\((".*?(?<!\\)")', renamed)[1]) == examples[0]
    edited = re.sub("<!-- end of (?:use|loading) -->", "", text)  # these parts are the user's own
    assert publish(edited).count(old) == 3
    assert ModelCard(renamed).data.base_model_relation == "finetune"
    assert ModelCard(renamed).data.widget == [{"text": example} for example in examples]
    assert "The repository holds the whole model" in renamed
    assert "PEFT adapter (`adapter/`)" not in renamed


# ── sections ──────────────────────────────────────────────────────────────────────────────────────


def test_the_card_of_an_unfinished_run_has_no_results(one_path, tmp_path):
    text = one_path.write(tmp_path, metrics={})
    assert "not finished" in section(text, "Scores")
    assert ModelCard(text).data.to_dict().keys().isdisjoint({"model-index", "metrics"})
    assert "├── neoplasms" in text
    without = one_path.write(tmp_path, metrics={"train_runtime": 1.0})
    assert "there are no scores" in section(without, "Scores")


def test_all_scores_are_shown_with_their_guarantees(finished):
    printed = section(finished.text, "Results")
    metrics = finished.metrics
    titles = {"macro_f1": "macro F1", "ece": "expected calibration error"}
    if finished.several:
        titles |= {"log_loss": "log loss of a node (nats)", "level_2_micro_f1": "level 2 micro F1"}
    else:
        titles |= {"log_loss": "log loss (nats)", "level_2_macro_f1": "level 2 macro F1"}
    for name, title in titles.items():
        assert (
            f"| {title} | {metrics[f'eval_{name}']:.4f} | {metrics[f'test_{name}']:.4f} |\n"
            in printed
        )
    low, high = metrics["intervals"]["test_macro_f1"]
    assert f"; test macro F1 {low:.4f} – {high:.4f}." in printed
    reached = metrics[f"test_set_{finished.guarantee}"]
    worst = metrics["worst_band"]
    share = f"{worst[finished.guarantee]:.1%}"
    assert f"On the test texts, the {finished.guarantee} is {reached:.1%},\n" in printed
    assert f"and {share} in the worst band of confidence, the {worst['texts']} texts" in printed
    row = f"{worst['group']} | {worst['texts']} | {share} | {worst['nodes']:.1f} |"
    assert f"| texts whose most probable leaf has {row}" in printed
    assert f"With `{finished.guarantee}=0.9` the pipeline returns" in printed
    if finished.several:
        thresholds = finished.config.calibration.thresholds
        assert f"lie between {min(thresholds):.2f} and {max(thresholds):.2f}." in printed
    else:
        assert "thresholds of the nodes" not in printed


def test_the_first_lines_say_what_the_model_does_and_how_well(finished, tmp_path):
    metrics = finished.metrics
    first = ModelCard(finished.text).text.split("\n## ")[0]
    assert first.lstrip().startswith(f"# {finished.config.page['title']}\n")
    if finished.several:
        assert f"**F1 {metrics['test_micro_f1']:.2f} over all nodes of 120 test texts" in first
    else:
        accuracy = f"{100 * metrics['test_accuracy']:.0f} %"
        assert f"**{accuracy} of 150 test texts are classified correctly" in first
    reached = metrics[f"test_set_{finished.guarantee}"]
    sets = f"of 90 % hold {metrics['test_set_nodes']:.1f} nodes, and reach {100 * reached:.0f} %"
    assert sets in first
    assert "Not a medical device, and not for diagnosis, treatment" in first
    assert "Not for texts unlike the training texts" in first
    use = section(finished.text, "Use")
    for field in ("labels", "prediction_set"):
        assert re.search(rf"\n{field}: \[.*'score': \d\.\d+\}}\]\n", use)
    assert len(snippets(finished.text)[0].splitlines()) == 4  # three of them code

    # the weakest of the nodes with at least ten texts
    rows = [{"label": f"kind {i}", "support": 9 + i, "f1": i / 10} for i in range(5)]
    more = {"precision": 0.5, "recall": 0.5, "f1_interval": None}
    text = finished.write(tmp_path, metrics=metrics | {"per_class": [row | more for row in rows]})
    weakest = "kind 1 (10 % of 10 texts), kind 2 (20 % of 11 texts), kind 3 (30 % of 12 texts)."
    assert f"Lowest F1: {weakest}" in text
    if not finished.several:
        text = finished.write(tmp_path, metrics=metrics | {"test_leaf_labels": 0.5})
        assert f"**{accuracy} of the 50 % of 150 test texts that have a leaf as label are" in text


def test_only_a_medical_model_is_called_one(one_path, tmp_path):
    assert "medical" in one_path.text
    one_path.config.page = {"examples": ["The match", "The vote"]}
    text = one_path.write(tmp_path, metrics={})
    assert "medical" not in text.casefold()
    assert "Colonoscopy" not in text
    assert ModelCard(text).data.widget == [{"text": "The match"}, {"text": "The vote"}]
    assert 'classify("The match"' in snippets(text)[0]
    assert "# Text classifier: general pathological conditions, specific disease\n" in text


def test_results_show_the_most_common_classes(one_path, tmp_path):
    row = {"precision": 0.5, "recall": 0.25, "f1": 1 / 3, "f1_interval": [0.2, 0.4]}
    rows = [{"label": f"kind <{i}>", "support": i, **row} for i in range(60)]
    rows[59]["f1_interval"] = None
    printed = section(
        one_path.write(tmp_path, metrics=one_path.metrics | {"per_class": rows}), "Results"
    )
    pattern = (
        r"(?m)^\| kind &#60;(\d+)&#62; \| (\d+) \| 0.5000 \| 0.2500 \| 0.3333 \| (0.2000 – "
        r"0.4000)? \|$"
    )
    shown = re.findall(pattern, printed)
    assert [(int(i), int(support)) for i, support, _ in shown] == [(i, i) for i in range(59, 9, -1)]
    assert [interval for _, _, interval in shown[:2]] == ["", "0.2000 – 0.4000"]
    assert "and 10 less common ones" in printed
    assert f"are of the {sum(range(60)):,} test rows that are labelled with a leaf" in printed


def test_scores_and_guarantees_on_rows_that_selected_the_checkpoint_are_optimistic(
    finished, tmp_path
):
    sentence = "The validation rows also selected the checkpoint, so their scores are optimistic"
    guarantee = "does not account for the selection of the checkpoint on the same rows"
    for chosen in (True, False):
        text = finished.write(tmp_path, settings={"load_best_model_at_end": chosen})
        assert (sentence in text) == (guarantee in section(text, "Results")) == chosen
        assert f"| load_best_model_at_end | {chosen} |" in text
    test_only = {
        name: value for name, value in finished.metrics.items() if not name.startswith("eval_")
    }
    assert sentence not in finished.write(
        tmp_path, metrics=test_only, settings={"load_best_model_at_end": True}
    )


def test_only_plots_that_are_there_are_shown(finished, tmp_path):
    def images(text: str) -> dict[str, str]:
        return {file: caption for caption, file in re.findall(r"!\[(.*?)\]\(plots/(.*?)\)", text)}

    assert images(finished.text).keys() == {
        file.name for file in (finished.folder / "plots").iterdir()
    }
    assert images(finished.write(tmp_path)) == {}
    (tmp_path / "plots").mkdir()
    numbered = PngInfo()
    numbered.add_text("Description", "1: 神経; 2: *")
    for name in ("confusion_matrix_level_2", "confusion_matrix_level_3", "f1_by_frequency"):
        Image.new("L", (1, 1)).save(tmp_path / "plots" / f"{name}.png", pnginfo=numbered)
    shown = finished.write(tmp_path)
    assert shown.count("Names that the font of the plots lacks: 1: 神経; 2: &#42;.") == 1
    if finished.several:
        assert images(shown) == {
            "f1_by_frequency.png": "F1 of each node over its number of test texts"
        }
    else:  # the taxonomy has two levels: the third is of another run
        assert images(shown) == {
            "confusion_matrix_level_2.png": "Confusion matrix of the test rows, level 2"
        }


def test_the_data_section_shows_rows_labels_files_lengths_and_merged_rows(finished, tmp_path):
    shown = section(finished.text, "Data")
    sha = finished.metrics["environment"]["data"]["test"]
    (name,) = sha
    assert f"| test | {name} | {sha[name][:12]} |" in shown
    if finished.several:
        assert "| train | 480 | 0 | 1.40 | 59 |" in shown
        assert "| neoplasms | 149 | 36 | 35 |" in shown
        assert "ceiling" not in shown
        merged = {"train": 7, "validation": 0, "test": 1}
        shown = section(
            finished.write(tmp_path, report=finished.report | {"merged_rows": merged}), "Data"
        )
        assert "7 train rows and 1 test rows" in shown
    else:
        assert "| train | 800 | 0 | 0 | 0 | 0 | 100.00% |" in shown
        assert "| neoplasms | 176 | 22 | 33 |" in shown
        limits = section(finished.text, "Limits and intended use")
        assert "256 tokens; the model does not see the rest. Truncated: 3 train texts." in limits


def test_repeated_texts_many_columns_and_classes_without_rows_are_reported(one_path, tmp_path):
    report = one_path.report | {
        "columns": {"text": "text", "label": [f"label {i}" for i in range(5000)]},
        "split": {"method": "by class", "split_off": {"test": 0.1}, "seed": 7},
        "classes_without_training_rows": ["neoplasms"],
    }
    repeats = {"conflicting_texts": 1, "conflicting_rows": 2, "accuracy_ceiling": 0.875}
    report["splits"]["train"] |= repeats
    text = one_path.write(tmp_path, report=report)
    shown = section(text, "Data")
    assert "| train | 800 | 0 | 0 | 1 | 2 | 87.50% |" in shown
    assert "label 19 and 4,980 more" in shown
    assert "0.1 for test; seed 7" in shown
    limits = section(text, "Limits and intended use")
    assert "so expect no correct predictions: neoplasms." in limits


def test_the_training_section_shows_settings_size_time_and_machine(one_path, tmp_path):
    shown = section(one_path.text, "Training")
    metrics = one_path.metrics
    trained = metrics["trainable_parameters"]
    whole = metrics["all_parameters"]
    versions = metrics["environment"]["versions"]
    for words in (
        f"{trained:,} of {whole:,} parameters ({trained / whole:.1%})",
        "| lora_r | 16 |",
        "| learning_rate | 0.001 |",
        f"Training time, evaluations included: {metrics['train_runtime'] / 60:.1f} minutes.",
        f"transformers {versions['transformers']}",
    ):
        assert words in shown, words
    assert "attn_implementation" not in shown  # it was not set
    assert "continued" not in shown
    resumed = one_path.write(
        tmp_path, metrics=metrics | {"resumed_from_step": 1200, "train_runtime": 125.0}
    )
    assert (
        "Training time from step 1,200 on, where it was resumed, evaluations included: 2.1 minutes."
        in resumed
    )
