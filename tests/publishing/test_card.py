"""Test the model card: it parses back to the run's metrics, no name breaks it, no path leaks, and
the id can be replaced.
"""

import ast
import getpass
import json
import re
import socket
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import snippets
from huggingface_hub import ModelCard
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from configuration_hierarchical import MULTI_LABEL, SINGLE_LABEL, Calibration, HierarchicalConfig
from hierarchical_clinicalbert.data.label_forms import ManyNodesRows, OnePathRows
from hierarchical_clinicalbert.data.report import describe_split, length_report
from hierarchical_clinicalbert.evaluation.forms import form_of
from hierarchical_clinicalbert.publishing import card
from hierarchical_clinicalbert.training.publish import describe_environment
from taxonomy_hierarchical import DEFAULT_TAXONOMY

ENCODER = "emilyalsentzer/Bio_ClinicalBERT"
COMMIT = "d5892b39a4adaed74b92212a44081509db72f87b"
HOSTILE = [
    "colon: and 'quotes' \"both\"",
    "a | b \\| c",
    "````",
    "---",
    "<script>alert(1)</script>",
    "<!-- other/model -->",
    "{{ config }} {% raw %}",
    {"```python": ["# heading", "[link](http://x) *bold* _it_ $$x$$ &lt;"]},
]
SETTINGS = {
    "model_name_or_path": ENCODER,
    "model_revision": COMMIT,
    "quantization": "4bit",
    "tuning": "lora",
    "lora_r": 16,
    "attn_implementation": None,
    "focal_gamma": 1.0,
    "learning_rate": 6e-4,
    "max_length": 256,
    "load_best_model_at_end": True,
}
FORMS = pytest.mark.parametrize("problem_type", [SINGLE_LABEL, MULTI_LABEL])
SPLITS = ("train", "validation", "test")


def make_config(
    taxonomy=DEFAULT_TAXONOMY, calibrated: bool = True, **changes
) -> HierarchicalConfig:
    settings = {
        "encoder_name_or_path": ENCODER,
        "encoder_revision": COMMIT,
        "adapter_subfolder": "adapter",
    }
    settings |= {"page": {"title": "Abstracts by disease", "medical": True}, **changes}
    config = HierarchicalConfig(taxonomy=taxonomy, **settings)
    if calibrated:
        config.calibration = Calibration(
            lexical_weight=0.3,
            scales=[1.0] * config.tree.num_nodes,
            thresholds=np.linspace(0.2, 0.5, config.tree.num_nodes).tolist()
            if config.is_multi_label
            else None,
            set_thresholds=[0.5] * 99,
            num_texts=120,
        )
    return config


def make_report(
    config: HierarchicalConfig, sources: dict[str, str] | None = None, **changes
) -> dict:
    """Make a data report with the functions of train.py.

    Leaf 0 has no row, and the first text has two labels.
    """
    tree = config.tree
    form = ManyNodesRows() if config.is_multi_label else OnePathRows()
    sources = sources or {split: f"/home/alice/data/{split}.csv" for split in SPLITS}
    splits = {}
    for number, split in enumerate(SPLITS):
        nodes = [(label,) for label in [*range(1, tree.num_leaves), 1, 1]]
        texts = [0, 0, *range(2, len(nodes))]
        if config.is_multi_label:
            nodes = [(1, 3), (1, 3), (1,), (), (), (1,), (1,), ()]
            texts = range(8)
        part = pd.DataFrame(
            {"text_id": [100_000 * number + text for text in texts], "nodes": nodes, "split": split}
        )
        splits[split] = describe_split(part, tree, form, number)
    return {
        "sources": [
            {"split": split, "name": name, "dataset": None, "sha256": {Path(name).name: "ab" * 32}}
            for split, name in sources.items()
        ],
        "columns": {"text": "text", "label": ["label"]},
        "taxonomy": "from /home/alice/taxonomy.yaml",
        "split": {"method": "as given", "split_off": {}, "seed": 42},
        "splits": splits,
        "classes_without_training_rows": [tree.labels[0]],
        "trained_before": {"scores": "verified", "left_out": {}},
        "lengths": {split: length_report([10, 20, 300], 256) for split in SPLITS},
        "merged_rows": {"train": 7, "validation": 0, "test": 1} if config.is_multi_label else {},
        **changes,
    }


def make_metrics(config: HierarchicalConfig) -> dict:
    """Make metrics with the function and the names of train.py."""
    tree = config.tree
    form = form_of(config.tree, config.problem_type)
    generator = np.random.default_rng(0)
    labels = form.decisions.targets([[i % tree.num_nodes] for i in range(40)]).numpy()
    metrics = {}
    for prefix in ("uncalibrated_eval", "uncalibrated_test", "eval", "test"):
        logits = generator.normal(size=(40, form.decisions.num_classes))
        scores = {"loss": 0.5, "runtime": 2.0, **form.measure(logits, labels)}
        metrics |= {f"{prefix}_{name}": value for name, value in scores.items()}
    classes = tree.labels[: form.decisions.num_classes]
    row = {"precision": 0.5, "recall": 0.25, "f1": 1 / 3, "support": 20, "f1_interval": [0.2, 0.4]}
    worst = {
        "by": "confidence",
        "group": "at most 40%",
        "texts": 52,
        form.decisions.guarantee: 0.769,
        "nodes": 2.8,
    }
    return {
        "train_runtime": 125.0,
        "trainable_parameters": 665_862,
        "all_parameters": 23_231_238,
        "trainable_share": 665_862 / 23_231_238,
        "encoder_bytes": 53_310_240,
        "encoder_bytes_float32": 90_261_504,
        "environment": describe_environment(torch.device("cpu")),
        "lexical_weight": 0.3,
        "per_class": [{"label": label, **row} for label in classes],
        "intervals": {f"test_{form.micro_f1}": [0.71, 0.75], "test_macro_f1": [0.6, 0.7]},
        f"test_set_{form.decisions.guarantee}": 0.8876,
        "test_set_nodes": 2.25,
        "worst_band": worst,
        "set_groups": [worst, worst | {"by": "root", "group": tree.labels[-1], "texts": 30}],
        **metrics,
    }


METRICS = {
    form: make_metrics(make_config(problem_type=form)) for form in (SINGLE_LABEL, MULTI_LABEL)
}


@pytest.fixture
def written(tmp_path):
    """Return a function that writes a card, by default of a finished run, and returns its text."""

    def write(
        config=None, settings=(), report=None, metrics=None, problem_type=SINGLE_LABEL, **arguments
    ) -> str:
        config = config or make_config(problem_type=problem_type)
        report = make_report(config) if report is None else report
        metrics = METRICS[config.problem_type] if metrics is None else metrics
        card.write(tmp_path, config, SETTINGS | dict(settings), report, metrics, **arguments)
        return (tmp_path / "README.md").read_text(encoding="utf-8")

    return write


def section(text: str, title: str) -> str:
    """Return what stands under a heading, or in a folded part."""
    (start,) = {f"\n## {title}\n", f"<summary>{title}</summary>\n"} & {
        *re.findall(r"\n## .*\n|<summary>.*</summary>\n", text)
    }
    return re.split(r"\n## |\n</details>|\n<details>", text.split(start)[1])[0]


# ── front matter ──────────────────────────────────────────────────────────────────────────────────


@FORMS
def test_the_results_parse_back_to_the_numbers_of_the_metrics_file(written, problem_type):
    parsed = ModelCard(written(problem_type=problem_type, model_id="me/model")).data
    metrics = METRICS[problem_type]
    prefixes = {"validation": "eval", "test": "test"}
    published = {
        f"{prefixes[r.dataset_split]}_{r.metric_name}": r.metric_value for r in parsed.eval_results
    }
    assert published == {
        name: value
        for name, value in metrics.items()
        if re.match("(eval|test)_(?!set_)", name)
        and not re.search("_(loss|runtime)$", name.replace("log_loss", ""))
    }
    types = {r.metric_name: r.metric_type for r in parsed.eval_results}
    assert types["log_loss"] == "log_loss"
    assert {
        types["macro_f1"],
        types[f"level_2_{'macro' if problem_type == SINGLE_LABEL else 'micro'}_f1"],
    } == {"f1"}
    names = {
        (r.task_type, r.dataset_type, r.dataset_name, r.dataset_split, r.verified)
        for r in parsed.eval_results
    }
    assert names == {
        ("text-classification", "unknown", f"{s}.csv", s, None) for s in ("validation", "test")
    }

    front = parsed.to_dict()
    assert front["license"] == "apache-2.0"
    assert (front["library_name"], front["pipeline_tag"]) == ("transformers", "text-classification")
    assert {"hierarchical-text-classification", "medical", "lora"} <= set(front["tags"])
    assert (front["base_model"], front["base_model_relation"]) == (ENCODER, "adapter")
    assert front["widget"] == [{"text": card.MEDICAL_EXAMPLE}]
    assert front["model-index"][0]["name"] == "me/model"
    assert front.keys().isdisjoint({"datasets", "language"})


def test_only_a_data_set_of_the_hub_is_named_as_one(written):
    hub = {split: f"TimSchopf/medical_abstracts [{split}]" for split in ("train", "test")}
    report = make_report(make_config(), hub)
    for source in report["sources"]:
        source["dataset"] = "TimSchopf/medical_abstracts"
    parsed = ModelCard(written(report=report)).data
    assert parsed.datasets == ["TimSchopf/medical_abstracts"]
    assert {(r.dataset_type, r.dataset_name) for r in parsed.eval_results} == {
        ("TimSchopf/medical_abstracts",) * 2
    }
    for source in ("saved/set [train]", "/data/all.csv"):
        parsed = ModelCard(written(report=make_report(make_config(), {"all": source}))).data
        assert parsed.datasets is None
        assert {r.dataset_name for r in parsed.eval_results} == {Path(source).name}


# ── names and paths ───────────────────────────────────────────────────────────────────────────────


@FORMS
def test_hostile_names_break_neither_front_matter_nor_tables_nor_code(written, problem_type):
    config = make_config(HOSTILE, problem_type=problem_type, page={})
    sources = {split: f"/data/--- <b>`x|y`: \n--- {split}.csv" for split in SPLITS}
    report = make_report(config, sources, columns={"text": "te|xt", "label": ["<la`bel>"]})
    text = written(config, report=report, metrics=make_metrics(config))

    parsed = ModelCard(text)
    assert {r.dataset_name for r in parsed.data.eval_results} == {
        f"--- <b>`x|y`: --- {split}.csv" for split in ("validation", "test")
    }
    assert parsed.text.lstrip().startswith("# Text classifier: colon: and")

    fence, drawn = re.search(r"^(`{5,})text\n(.*?)\n\1$", text, re.M | re.S).groups()
    assert drawn == config.tree.draw()  # whole, and ended by nothing in it
    outside = text.replace(f"{fence}text\n{drawn}\n{fence}", "")
    for code in re.findall(r"^```\w+\n.*?^```$", outside, re.M | re.S):
        outside = outside.replace(code, "")
    outside = re.sub(
        '"<commit>"|</?(details|summary)>|<!-- .* (anew|use|result|loading) -->',
        "",
        outside.split("\n---\n", 1)[1],
    )
    assert not re.search(
        r"[<>]|\$\$|\*bold|\[link|\}\}|\{\{|\{%|%\}", outside.replace("{{ config }} {% raw %}", "")
    )
    assert "&#60;script&#62;alert(1)&#60;/script&#62;" in outside
    assert not re.findall(r"^(?:---|# heading)", outside, re.M)

    tables = [
        lines for block in text.split("\n\n") if (lines := block.split("\n"))[0].startswith("| ")
    ]
    assert len(tables) >= 7
    for lines in tables:
        assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert len(snippets(text)) == 3


def test_no_path_of_the_machine_is_written(written, tmp_path):
    config = make_config(encoder_name_or_path="/home/alice/encoder", encoder_revision=None)
    settings = {
        "model_name_or_path": "/home/alice/run",
        "attn_implementation": "/home/alice/kernel",
    }
    text = written(config, settings=settings)
    assert all(name in text for name in ("kernel", "train.csv", "taxonomy.yaml"))
    assert "alice" not in text
    assert str(tmp_path) not in text
    assert "continued from an earlier checkpoint" in text
    assert not re.search(r"(?<![\w:/<.*])/\w+/", text)


# ── snippets and renaming ─────────────────────────────────────────────────────────────────────────


def test_renaming_keeps_what_was_written_by_hand(written):
    config = make_config(["old/model", "old/model-2"])
    text = written(config, metrics=make_metrics(config), model_id="old/model")
    by_hand = text.replace(
        "license: apache-2.0", "# my remark\nlanguage: [en]\nlicense: mit\nextra: {a: 1}"
    )
    by_hand = by_hand.replace(
        "## Use\n",
        "## Demo\n\nSee old/model-2 and its [Space](https://hf.co/spaces/old/model).\n\n## Use\n",
    )
    renamed = ModelCard(card.update_for_publishing(by_hand, config, "new/model", False, []))
    parsed = ModelCard(by_hand)
    assert renamed.text == parsed.text.replace('"old/model"', '"new/model"')
    assert all('"new/model"' in snippet for snippet in snippets(str(renamed)))
    assert "See old/model-2 and its [Space](https://hf.co/spaces/old/model)." in renamed.text
    assert "\nold/model\nold/model-2\n" in renamed.text  # classes of these names
    front = renamed.data.to_dict()
    assert (front["language"], front["license"], front["extra"]) == (["en"], "mit", {"a": 1})
    parsed.data.model_name = "new/model"
    assert front == parsed.data.to_dict()


def test_a_merged_card_describes_the_whole_model_and_has_the_given_examples(written):
    results = [{"labels": [{"label": label, "score": 0.5}]} for label in ("before", "after")]
    config = make_config()
    examples = ['One "\\" text.', "Another."]
    text = written(config, example_result=results[0])
    old = re.search(r'classify\((".*?")', text)[1]
    renamed = card.update_for_publishing(text, config, "me/model", True, examples, results[1])
    assert (
        "after" in section(renamed, "Use"),
        "before" in section(renamed, "Use"),
        old in renamed,
    ) == (
        True,
        False,
        False,
    )
    assert ast.literal_eval(re.search(r'classify\((".*?(?<!\\)")', renamed)[1]) == examples[0]
    # by hand: these parts are the user's own
    edited = re.sub("<!-- end of (?:use|loading) -->", "", text)
    assert (
        card.update_for_publishing(edited, config, "me/model", True, examples, results[1]).count(
            old
        )
        == 3
    )
    assert ModelCard(renamed).data.base_model_relation == "finetune"
    assert ModelCard(renamed).data.widget == [{"text": text} for text in examples]
    assert "The repository holds the whole model" in renamed
    assert "PEFT adapter (`adapter/`)" not in renamed


# ── sections ──────────────────────────────────────────────────────────────────────────────────────


def test_the_card_of_an_unfinished_run_has_no_results(written):
    text = written(metrics={})
    assert "not finished" in section(text, "Scores")
    assert ModelCard(text).data.to_dict().keys().isdisjoint({"model-index", "metrics"})
    assert "├── neoplasms" in text
    assert "there are no scores" in section(written(metrics={"train_runtime": 1.0}), "Scores")


@FORMS
def test_all_scores_are_shown_with_their_guarantees(written, problem_type):
    printed = section(written(problem_type=problem_type), "Results")
    metrics = METRICS[problem_type]
    titles = {"macro_f1": "macro F1", "ece": "expected calibration error"}
    titles["log_loss"] = (
        "log loss (nats)" if problem_type == SINGLE_LABEL else "log loss of a node (nats)"
    )
    for name, title in titles.items():
        assert (
            f"| {title} | {metrics[f'eval_{name}']:.4f} | {metrics[f'test_{name}']:.4f} |\n"
            in printed
        )
    assert f"| level 2 {'macro' if problem_type == SINGLE_LABEL else 'micro'} F1 | " in printed
    assert "0.7100 – 0.7500; test macro F1 0.6000 – 0.7000" in printed
    guarantee, other = (
        ("coverage", "recall") if problem_type == SINGLE_LABEL else ("recall", "coverage")
    )
    assert (
        f"On the test texts, the {guarantee} is 88.8%,\nand 76.9% in the worst band of "
        "confidence, the 52"
    ) in printed
    assert "| texts whose most probable leaf has at most 40% | 52 | 76.9% | 2.8 |" in printed
    assert f"={other}" not in printed
    assert ("lie between 0.20 and 0.50." in printed) == (problem_type == MULTI_LABEL)


@FORMS
def test_the_first_lines_say_what_the_model_does_how_often_it_is_right_and_where_it_is_wrong(
    written, problem_type
):
    config = make_config(problem_type=problem_type)
    metrics = METRICS[problem_type]
    names = [f"kind {i}" for i in range(5)]
    rows = [
        {"label": name, "support": 9 + i, "f1": i / 10, "f1_interval": None}
        for i, name in enumerate(names)
    ]
    metrics = metrics | {"per_class": [{"precision": 0.5, "recall": 0.5, **row} for row in rows]}
    node = {"label": "neoplasms", "score": 0.98765, "path": []}
    result = {"labels": [node], "prediction_set": [node, node | {"label": "other"}]}
    text = written(config, metrics=metrics, example_result=result)
    first = ModelCard(text).text.split("\n## ")[0]
    assert first.lstrip().startswith("# Abstracts by disease\n")
    num_rows = make_report(config)["splits"]["test"]["rows"]
    if problem_type == SINGLE_LABEL:
        accuracy, leaves = (
            f"{100 * metrics[f'test_{name}']:.0f} %" for name in ("accuracy", "leaf_labels")
        )
        correct = (
            f"**{accuracy} of the {leaves} of {num_rows} test texts that have a leaf as label "
            "are classified correctly"
        )
        assert correct in first
    else:
        assert (
            f"**F1 {metrics['test_micro_f1']:.2f} over all nodes of {num_rows} test texts" in first
        )
    assert "of 90 % hold 2.2 nodes, and reach 89 %" in first
    assert (
        "Lowest F1: kind 1 (10 % of 10 texts), kind 2 (20 % of 11 texts), kind 3 (30 % of "
        "12 texts)."
    ) in first
    assert "Not a medical device, and not for diagnosis, treatment" in first
    assert "Not for texts unlike the training texts" in first
    use = section(text, "Use")
    assert (
        "\nlabels: [{'label': 'neoplasms', 'score': 0.99}]\nprediction_set: [{'label': "
        "'neoplasms', 'score'"
    ) in use
    # three lines of code
    assert len(snippets(text)[0].split("\n\n")) == len(snippets(text)[0].splitlines()) - 2 == 2


def test_only_a_medical_model_is_called_one(written):
    text = written(
        make_config(["sport", "politics"], page={"examples": ["The match", "The vote"]}), metrics={}
    )
    assert "medical" not in text.casefold()
    assert "Colonoscopy" not in text
    assert ModelCard(text).data.widget == [{"text": "The match"}, {"text": "The vote"}]
    assert 'classify("The match"' in snippets(text)[0]
    assert "# Text classifier: sport, politics\n" in text


def test_results_show_the_most_common_classes(written):
    row = {"precision": 0.5, "recall": 0.25, "f1": 1 / 3, "f1_interval": [0.2, 0.4]}
    rows = [{"label": f"kind <{i}>", "support": i, **row} for i in range(60)]
    rows[59]["f1_interval"] = None
    printed = section(written(metrics=METRICS[SINGLE_LABEL] | {"per_class": rows}), "Results")
    pattern = (
        r"(?m)^\| kind &#60;(\d+)&#62; \| (\d+) \| 0.5000 \| 0.2500 \| 0.3333 \| (0.2000 – "
        r"0.4000)? \|$"
    )
    shown = re.findall(pattern, printed)
    assert [(int(i), int(support)) for i, support, _ in shown] == [(i, i) for i in range(59, 9, -1)]
    assert [interval for _, _, interval in shown[:2]] == ["", "0.2000 – 0.4000"]
    assert "and 10 less common ones" in printed
    assert f"are of the {sum(range(60)):,} test rows that are labelled with a leaf" in printed


@FORMS
def test_scores_and_guarantees_on_rows_that_selected_the_checkpoint_are_called_optimistic(
    written, problem_type
):
    sentence = "The validation rows also selected the checkpoint, so their scores are optimistic"
    guarantee = "does not account for the selection of the checkpoint on the same rows"
    for chosen in True, False:
        text = written(problem_type=problem_type, settings={"load_best_model_at_end": chosen})
        assert (sentence in text) == (guarantee in section(text, "Results")) == chosen
        assert f"| load_best_model_at_end | {chosen} |" in text
    test_only = {
        name: value for name, value in METRICS[problem_type].items() if not name.startswith("eval_")
    }
    assert sentence not in written(problem_type=problem_type, metrics=test_only)


@FORMS
def test_only_plots_that_are_there_are_shown(written, tmp_path, problem_type):
    assert "![" not in written(problem_type=problem_type)
    (tmp_path / "plots").mkdir()
    numbered = PngInfo()
    numbered.add_text("Description", "1: 神経; 2: *")
    for name in (
        "training_curves",
        "f1_by_frequency",
        "confusion_matrix_level_2",
        "confusion_matrix_level_3",
    ):
        Image.new("L", (1, 1)).save(
            tmp_path / "plots" / f"{name}.png", pnginfo=numbered if name[-1] in "2y" else None
        )
    shown = written(problem_type=problem_type)
    assert shown.count("Names that the font of the plots lacks: 1: 神経; 2: &#42;.") == 1
    images = re.findall(r"!\[(.*?)\]\(plots/(.*?)\.png\)", shown)
    if problem_type == SINGLE_LABEL:  # the taxonomy has two levels: the third is of another run
        expected = ("Confusion matrix of the test rows, level 2", "confusion_matrix_level_2")
    else:
        expected = ("F1 of each node over its number of test texts", "f1_by_frequency")
    assert images == [expected, ("Training curves", "training_curves")]


def test_the_data_section_shows_rows_conflicts_lengths_and_classes(written):
    report = make_report(
        make_config(), columns={"text": "text", "label": [f"label {i}" for i in range(5000)]}
    )
    text = written(report=report)
    shown = section(text, "Data")
    limits = section(text, "Limits and intended use")
    ceiling = report["splits"]["train"]["accuracy_ceiling"]
    assert f"| train | 6 | 0 | 1 | 1 | 2 | {ceiling:.2%} |" in shown
    assert "| neoplasms | 3 | 3 | 3 |" in shown
    assert "| train | train.csv | abababababab |" in shown
    assert "label 19 and 4,980 more" in shown
    assert "so expect no correct predictions: general pathological conditions." in limits
    assert (
        "256 tokens; the model does not see the rest. Truncated: 1 train texts, 1 "
        "validation texts, 1 test"
    ) in limits
    split_off = {"method": "by class", "split_off": {"test": 0.1}, "seed": 7}
    before = {"scores": "unverified", "left_out": {}}
    text = written(report=make_report(make_config(), split=split_off, trained_before=before))
    assert "0.1 for test; seed 7" in section(text, "Data")
    assert "**These scores are unverified**" in text
    assert {r.metric_name.split(" ")[1] for r in ModelCard(text).data.eval_results} == {
        "(unverified)"
    }


def test_the_data_section_of_a_multi_label_card_shows_labels_and_merged_rows(written):
    shown = section(written(problem_type=MULTI_LABEL), "Data")
    assert "| train | 8 | 0 | 0.88 | 3 |" in shown
    assert "7 train rows and 1 test rows" in shown
    assert "| neoplasms | 5 | 5 | 5 |" in shown
    assert "ceiling" not in shown


def test_the_training_section_shows_encoder_settings_size_time_and_machine(written):
    environment = METRICS[SINGLE_LABEL]["environment"]
    assert socket.gethostname() not in json.dumps(environment)
    assert f"/{getpass.getuser()}" not in json.dumps(environment)
    metrics = METRICS[SINGLE_LABEL] | {"resumed_from_step": 1200}
    shown = section(written(metrics=metrics), "Training").replace("&#95;", "_")
    for words in (
        f"[{ENCODER}](https://huggingface.co/{ENCODER}) at revision `{COMMIT}`",
        "665,862 of 23,231,238 parameters (2.9%)",
        "| lora_r | 16 |",
        "| learning_rate | 0.0006 |",
        (
            "Training time from step 1,200 on, where it was resumed, evaluations included: 2.1 "
            "minutes."
        ),
        f"transformers {environment['versions']['transformers']}",
    ):
        assert words in shown, words
    assert "attn_implementation" not in shown  # it was not set
    assert "continued" not in shown
