"""Test the model card: it parses back to the run's metrics, no name breaks it, no path leaks, and the id can be replaced."""

import getpass
import json
import re
import socket
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT, snippets
from huggingface_hub import ModelCard

from configuration_hierarchical import Calibration, HierarchicalConfig
from hierarchical_clinicalbert.data.label_forms import ManyNodesRows, OnePathRows
from hierarchical_clinicalbert.data.report import length_report
from hierarchical_clinicalbert.evaluation.many_nodes import ManyNodesForm
from hierarchical_clinicalbert.evaluation.metrics import per_class_report
from hierarchical_clinicalbert.evaluation.one_path import OnePathForm
from hierarchical_clinicalbert.publishing import card
from hierarchical_clinicalbert.publishing.environment import describe_environment
from taxonomy_hierarchical import DEFAULT_TAXONOMY, Taxonomy

ENCODER, COMMIT = "emilyalsentzer/Bio_ClinicalBERT", "d5892b39a4adaed74b92212a44081509db72f87b"
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
    "lora_target_modules": ["query", "value"],
    "attn_implementation": None,
    "focal_gamma": 1.0,
    "learning_rate": 6e-4,
    "max_length": 256,
}
ENVIRONMENT = {"hardware": "AMD EPYC, 2 cores", "versions": {"python": "3.11.7", "torch": "2.13.0"}}


def make_config(taxonomy=DEFAULT_TAXONOMY, **changes) -> HierarchicalConfig:
    settings = {"encoder_name_or_path": ENCODER, "encoder_revision": COMMIT, "adapter_subfolder": "adapter", **changes}
    return HierarchicalConfig(taxonomy=taxonomy, **settings)


def make_report(tree: Taxonomy, sources: dict[str, str] | None = None) -> dict:
    """Make a data report with the functions of train.py; one text of each split has two labels."""
    sources = sources or {split: f"/home/alice/data/{split}.csv" for split in ("train", "validation", "test")}
    parts = []
    for split in ("train", "validation", "test"):
        labels = [*range(1, tree.num_leaves), 1, 1]  # leaf 0 has no row
        texts = [f"{split} {i}" for i in range(len(labels))]
        texts[1] = texts[0]
        part = pd.DataFrame({"split": split, "text": texts, "nodes": [(label,) for label in labels]})
        parts.append(part.assign(text_id=pd.factorize(part["text"])[0] + 10_000 * len(parts)))
    return {
        "sources": [
            {"split": split, "name": name, "dataset": None, "sha256": {Path(name).name: "ab" * 32}}
            for split, name in sources.items()
        ],
        "columns": {"text": "text", "label": ["label"]},
        "taxonomy": "from /home/alice/taxonomy.yaml",
        "split": {"method": "as given", "split_off": {}, "seed": 42},
        "splits": {part["split"].iloc[0]: OnePathRows().describe(part, tree, 0) for part in parts},
        "classes_without_training_rows": [tree.labels[0]],
        "trained_before": {"scores": "verified", "moved": {}},
        "lengths": {part["split"].iloc[0]: length_report([10, 20, 300], 256) for part in parts},
    }


def make_metrics(tree: Taxonomy) -> dict:
    """Make metrics with the function and the names of train.py."""
    form, metrics = OnePathForm(tree), {}
    generator = np.random.default_rng(0)
    for prefix in ("quantized_eval", "quantized_test", "eval", "test"):
        logits, labels = generator.normal(size=(40, tree.num_leaves)), generator.integers(tree.num_nodes, size=40)
        scores = form.measure(logits, labels, np.arange(40) // 2)
        metrics |= {f"{prefix}_{name}": value for name, value in {"loss": 0.5, "runtime": 2.0, **scores}.items()}
    return {
        "train_runtime": 125.0,
        "train_precision": "bf16",
        "train_quantization": "4bit",
        "trainable_parameters": 665_862,
        "all_parameters": 23_231_238,
        "trainable_share": 665_862 / 23_231_238,
        "encoder_bytes": 53_310_240,
        "encoder_bytes_float32": 90_261_504,
        "environment": ENVIRONMENT,
        **metrics,
    }


@pytest.fixture(scope="module")
def metrics() -> dict:
    return make_metrics(Taxonomy(DEFAULT_TAXONOMY))


@pytest.fixture
def written(tmp_path, metrics):
    """Return a function that writes a card, by default of a finished run, and returns its text."""

    def write(config=None, settings=SETTINGS, report=None, metrics=metrics, **arguments) -> str:
        config = config or make_config()
        report = make_report(config.tree) if report is None else report
        card.write(tmp_path, config, settings, report, metrics, **arguments)
        return (tmp_path / "README.md").read_text(encoding="utf-8")

    return write


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


# ── front matter ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_results_parse_back_to_the_numbers_of_the_metrics_file(written, metrics):
    parsed = ModelCard(written(model_id="me/model")).data
    prefixes = {"validation": "eval", "test": "test"}
    published = {f"{prefixes[r.dataset_split]}_{r.metric_name}": r.metric_value for r in parsed.eval_results}
    shown = {name.removeprefix("eval_") for name in metrics if name.startswith("eval_")}
    shown -= {"loss", "runtime"} | {name for name in shown if name.endswith("_by_chance")}
    assert published == {
        f"{prefix}_{name}": metrics[f"{prefix}_{name}"] for prefix in ("eval", "test") for name in shown
    }
    assert parsed.model_name == "me/model"
    types = {r.metric_name: r.metric_type for r in parsed.eval_results}
    assert (types["accuracy"], types["level_2_macro_f1"], types["level_1_accuracy"]) == ("accuracy", "f1", "accuracy")
    names = {(r.task_type, r.dataset_type, r.dataset_name, r.dataset_split, r.verified) for r in parsed.eval_results}
    assert names == {("text-classification", "unknown", f"{s}.csv", s, None) for s in ("validation", "test")}


def test_the_front_matter_has_the_fields_of_the_hub(written):
    front = ModelCard(written()).data.to_dict()
    assert front["license"] == "apache-2.0"
    assert (front["library_name"], front["pipeline_tag"]) == ("transformers", "text-classification")
    assert {"hierarchical-text-classification", "medical", "lora"} <= set(front["tags"])
    assert (front["base_model"], front["base_model_relation"]) == (ENCODER, "adapter")
    assert front["metrics"] == ["accuracy", "f1", "precision", "recall"]
    assert front["widget"] == [{"text": card.EXAMPLE}]
    assert front.keys().isdisjoint({"datasets", "language", "model_name"})


def test_a_whole_model_is_a_finetune_of_its_encoder(written):
    text = written(make_config(adapter_subfolder=None))
    assert ModelCard(text).data.base_model_relation == "finetune"
    assert card.WHOLE_MODEL_SENTENCE in text
    assert card.ADAPTER_SENTENCE not in text


def test_an_encoder_from_a_folder_is_no_base_model(written):
    text = written(make_config(encoder_name_or_path="/home/alice/encoder", encoder_revision=None))
    assert ModelCard(text).data.to_dict().keys().isdisjoint({"base_model", "base_model_relation"})
    assert card.LOCAL_ADAPTER_SENTENCE in text
    assert "huggingface.co" not in section(text, "Training")


def test_only_a_data_set_of_the_hub_is_named_as_one(written):
    tree = Taxonomy(DEFAULT_TAXONOMY)
    hub = {"train": "TimSchopf/medical_abstracts [train]", "test": "TimSchopf/medical_abstracts [test]"}
    report = make_report(tree, hub)
    for source in report["sources"]:
        source["dataset"] = "TimSchopf/medical_abstracts"
    parsed = ModelCard(written(report=report)).data
    assert parsed.datasets == ["TimSchopf/medical_abstracts"]
    assert {(r.dataset_type, r.dataset_name) for r in parsed.eval_results} == {("TimSchopf/medical_abstracts",) * 2}
    for source in ("saved/set [train]", "corpus/all.csv", "/data/set [train]", "all.csv"):
        parsed = ModelCard(written(report=make_report(tree, {"all": source}))).data
        assert parsed.datasets is None
        assert {r.dataset_name for r in parsed.eval_results} <= {"set [train]", "all.csv"}


# ── names and paths ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_hostile_names_break_neither_front_matter_nor_tables_nor_code(written):
    config = make_config(HOSTILE)
    sources = {split: f"/data/--- <b>`x|y`: \n--- {split}.csv" for split in ("train", "validation", "test")}
    report = make_report(config.tree, sources)
    report["columns"] = {"text": "te|xt", "label": ["<la`bel>"]}
    metrics = make_metrics(config.tree)
    text = written(config, report=report, metrics=metrics)

    parsed = ModelCard(text)
    assert {r.dataset_name for r in parsed.data.eval_results} == {
        f"--- <b>`x|y`: --- {split}.csv" for split in ("validation", "test")
    }
    assert parsed.text.lstrip().startswith("# Hierarchical text classifier")

    fence, drawn = re.search(r"^(`{5,})text\n(.*?)\n\1$", text, re.M | re.S).groups()
    assert drawn == config.tree.draw()  # whole, and ended by nothing in it
    outside = card.unsigned(text).replace(f"{fence}text\n{drawn}\n{fence}", "")
    for code in re.findall(r"^```\w+\n.*?^```$", outside, re.M | re.S):
        outside = outside.replace(code, "")
    outside = outside.split("\n---\n", 1)[1].replace('"<commit>"', "")
    assert not re.search(r"[<>]|\$\$|\*bold|\[link", outside)
    assert "&#60;script&#62;alert(1)&#60;/script&#62;" in outside
    assert not re.findall(r"^(?:---|# heading)", outside, re.M)

    tables = [lines for block in text.split("\n\n") if (lines := block.split("\n"))[0].startswith("| ")]
    assert len(tables) >= 7
    for lines in tables:
        assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert len(snippets(text)) == 3
    assert "{{ config }} {% raw %}" in drawn


def test_no_path_of_the_machine_is_written(written, tmp_path):
    config = make_config(encoder_name_or_path="/home/alice/encoder", encoder_revision=None)
    settings = SETTINGS | {"model_name_or_path": "/home/alice/run", "attn_implementation": "/home/alice/kernel"}
    text = written(config, settings=settings)
    assert "kernel" in text
    assert "train.csv" in text
    assert "taxonomy.yaml" in text
    assert "alice" not in text
    assert str(tmp_path) not in text
    assert "continued from an earlier checkpoint" in text
    assert not re.search(r"(?<![\w:/<.*])/\w+/", text)


def test_plain_text_stays_readable():
    assert card.escape("T-cell (mature), my_data.csv: 5 %") == "T-cell (mature), my_data.csv: 5 %"
    assert card.escape("_x_ a|b\n`c`") == "&#95;x&#95; a&#124;b &#96;c&#96;"


# ── snippets and renaming ────────────────────────────────────────────────────────────────────────────────────────────


def test_three_snippets_compile_and_name_the_model(written):
    for model_id in (None, "me/model"):
        text = written(model_id=model_id)
        code = snippets(text)
        assert len(code) == 3
        for snippet in code:
            compile(snippet, "snippet", "exec")
            assert f'"{model_id or card.MODEL_PLACEHOLDER}"' in snippet
            assert "trust_remote_code=True" in snippet
        assert (card.PLACEHOLDER_NOTE in text) == (model_id is None)


def test_a_renamed_card_is_the_card_of_that_model(written):
    draft, final = written(), written(model_id="me/model")
    assert ModelCard(card.update_for_publishing(draft, "me/model")).data.to_dict() == ModelCard(final).data.to_dict()
    assert ModelCard(card.update_for_publishing(draft, "me/model")).text == ModelCard(final).text
    assert card.update_for_publishing(
        card.update_for_publishing(draft, "a/b.c"), "me/model"
    ) == card.update_for_publishing(draft, "me/model")
    assert card.update_for_publishing(
        card.update_for_publishing(draft, "me/model", True), "me/model", True
    ) == card.update_for_publishing(draft, "me/model", True)


def test_renaming_keeps_what_was_written_by_hand(written):
    config = make_config(["old/model", "old/model-2"])
    text = card.update_for_publishing(
        written(config, report=make_report(config.tree), metrics=make_metrics(config.tree)), "old/model"
    )
    by_hand = text.replace("license: apache-2.0", "# my remark\nlanguage: [en]\nlicense: mit\nextra: {a: 1}")
    by_hand = by_hand.replace(
        "## Use\n", "## Demo\n\nSee old/model-2 and its [Space](https://hf.co/spaces/old/model).\n\n## Use\n"
    )
    renamed, parsed = ModelCard(card.update_for_publishing(by_hand, "new/model")), ModelCard(by_hand)
    assert renamed.text == parsed.text.replace('"old/model"', '"new/model"')
    assert all('"new/model"' in snippet for snippet in snippets(str(renamed)))
    assert "See old/model-2 and its [Space](https://hf.co/spaces/old/model)." in renamed.text
    assert "\nold/model\nold/model-2\n" in renamed.text  # classes of these names
    front = renamed.data.to_dict()
    assert (front["language"], front["license"], front["extra"]) == (["en"], "mit", {"a": 1})
    assert front["model-index"][0]["name"] == "new/model"
    parsed.data.model_name = "new/model"
    assert front == parsed.data.to_dict()


@pytest.mark.parametrize("encoder", [ENCODER, "/home/alice/encoder"])
def test_a_merged_card_describes_the_whole_model(written, encoder):
    renamed = card.update_for_publishing(written(make_config(encoder_name_or_path=encoder)), "me/model", merged=True)
    relation = ModelCard(renamed).data.get("base_model_relation")
    assert relation == ("finetune" if encoder == ENCODER else None)
    assert card.WHOLE_MODEL_SENTENCE in renamed
    assert card.ADAPTER_SENTENCE not in renamed
    assert card.LOCAL_ADAPTER_SENTENCE not in renamed


def test_another_relation_and_a_foreign_body_are_left_alone():
    foreign = "# Mine\n\nyour-name/your-model\n"
    assert card.update_for_publishing(foreign, "me/model", merged=True) == foreign
    front = "---\nbase_model_relation: quantized\nmodel-index:\n- name: {}\n  results: []\n---\n"
    assert (
        card.update_for_publishing(front.format("x") + foreign, "you/it", merged=True)
        == front.format("you/it") + foreign
    )


# ── sections ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_card_of_an_unfinished_run_has_no_results(written):
    text = written(metrics={})
    assert "not finished" in section(text, "Results")
    assert ModelCard(text).data.to_dict().keys().isdisjoint({"model-index", "metrics"})
    assert "├── neoplasms" in text
    renamed = card.update_for_publishing(card.update_for_publishing(text, "me/draft"), "me/model")
    assert all('"me/model"' in snippet for snippet in snippets(renamed))
    assert "there are no scores" in section(written(metrics={"train_runtime": 1.0}), "Results")


def test_scores_stand_beside_those_of_the_quantized_encoder(written, metrics):
    shown = section(written(), "Results")
    assert f"| accuracy | {metrics['eval_accuracy']:.4f} | {metrics['test_accuracy']:.4f} |" in shown
    assert f"| level 2 macro F1 | {metrics['eval_level_2_macro_f1']:.4f} |" in shown
    trained, served = metrics["quantized_test_accuracy"], metrics["test_accuracy"]
    assert f"| test accuracy | {trained:.4f} | {served:.4f} | {served - trained:+.4f} |" in shown
    plain = {name: value for name, value in metrics.items() if not name.startswith("quantized")}
    assert "as trained" not in section(written(metrics=plain), "Results")


def test_results_show_intervals_classes_and_what_the_lexical_head_changed(written, metrics):
    before = {f"uncalibrated_test_{name}": metrics[f"test_{name}"] - 0.01 for name in ("accuracy", "log_loss")}
    rows = [
        {"label": f"kind <{i}>", "support": i, "precision": 0.5, "recall": 0.25, "f1": 1 / 3, "f1_interval": [0.2, 0.4]}
        for i in range(60)
    ]
    without = {"without_lexical_head_test_accuracy": 0.4321}
    full = {
        **metrics,
        **before,
        **without,
        "lexical_weight": 0.4,
        "per_class": rows,
        "intervals": {"test_accuracy": [0.71, 0.75], "test_macro_f1": [0.6, 0.7]},
    }
    config = make_config()
    config.calibration = Calibration(lexical_weight=0.4, scales=[1.0] * config.tree.num_nodes)
    printed = section(written(config=config, metrics=full), "Results")
    assert "test accuracy 0.7100 – 0.7500; test macro F1 0.6000 – 0.7000" in printed
    shown = re.findall(
        r"(?m)^\| kind &#60;(\d+)&#62; \| (\d+) \| 0.5000 \| 0.2500 \| 0.3333 \| 0.2000 – 0.4000 \|$", printed
    )
    assert shown == [(str(i), str(i)) for i in range(59, 9, -1)]
    assert "and 10 less common ones" in printed
    assert f"are of the {sum(range(60)):,} test rows that are labelled with a leaf" in printed
    rows[59]["f1_interval"] = None
    assert "| kind &#60;59&#62; | 59 | 0.5000 | 0.2500 | 0.3333 |  |" in section(written(metrics=full), "Results")
    assert "a linear classifier over the words" in printed
    accuracy, trained = metrics["test_accuracy"], metrics["quantized_test_accuracy"]
    assert f"| test accuracy | {accuracy - 0.01:.4f} | 0.4321 | {accuracy:.4f} |" in printed
    # quantization is judged with the same heads on both sides
    assert f"| test accuracy | {trained:.4f} | {accuracy - 0.01:.4f} | {accuracy - 0.01 - trained:+.4f} |" in printed
    assert "one temperature per decision and one bias per node" in printed
    config.calibration.lexical_weight = 0.0
    none = section(written(config=config, metrics={**full, "lexical_weight": 0.0}), "Results")
    assert "one temperature per decision" in none
    assert "linear classifier" not in none
    assert f"| test accuracy | {accuracy - 0.01:.4f} | {accuracy:.4f} |" in none
    assert re.search(r"(?m)^\| test log loss.*? \| [\d.]+ \| [\d.]+ \|$", none)


def test_validation_scores_that_selected_the_checkpoint_are_called_optimistic(written, metrics):
    sentence, chosen = (
        "The validation rows also selected the checkpoint, so their scores are optimistic",
        SETTINGS | {"load_best_model_at_end": True},
    )
    assert sentence in section(written(settings=chosen), "Results")
    assert "| load_best_model_at_end | True |" in section(written(settings=chosen), "Training")
    assert sentence not in written(settings=SETTINGS | {"load_best_model_at_end": False})
    test_only = {name: value for name, value in metrics.items() if not name.startswith("eval_")}
    assert sentence not in written(settings=chosen, metrics=test_only)


def test_the_guarantee_is_worded_as_it_is_beside_the_measured_coverage(written, metrics):
    config = make_config()
    config.calibration.scales = [1.0] * config.tree.num_nodes
    with_answers = {**metrics, **{f"test_answer_{name}": value for name, value in
             {"coverage": 0.8876, "leaves": 1.9, "nodes": 1.5, "single_leaf": 0.6}.items()}}  # fmt: skip
    for chosen in True, False:
        settings = SETTINGS | {"load_best_model_at_end": chosen}
        text = " ".join(section(written(config, settings=settings, metrics=with_answers), "Results").split())
        assert "On the test texts, the coverage is 88.8%." in text
        assert "split conformal prediction" in text
        assert ("does not account for the selection of the checkpoint on the same rows" in text) == chosen


def test_the_training_section_shows_encoder_settings_and_size(written):
    shown = section(written(), "Training")
    assert f"[{ENCODER}](https://huggingface.co/{ENCODER}) at revision `{COMMIT}`" in shown.replace("&#95;", "_")
    assert "665,862 of 23,231,238 parameters (2.9%)" in shown
    assert "| lora_target_modules | query, value |" in shown
    assert "| learning_rate | 0.0006 |" in shown
    assert "attn_implementation" not in shown  # it was not set
    assert "continued" not in shown
    assert "| train_precision | fp32 |" in section(written(settings=SETTINGS | {"train_precision": "fp32"}), "Training")


def test_only_plots_that_are_there_are_shown(written, tmp_path):
    assert "![" not in written()
    (tmp_path / "plots").mkdir()
    for level in (2, 3):  # the taxonomy has two levels: the third is of another run
        (tmp_path / "plots" / f"confusion_matrix_level_{level}.png").touch()
    images = re.findall(r"!\[(.*?)\]\((.*?)\)", written())
    assert images == [("Confusion matrix of the test rows, level 2", "plots/confusion_matrix_level_2.png")]


def test_the_data_section_shows_rows_conflicts_lengths_and_classes(written):
    report = make_report(Taxonomy(DEFAULT_TAXONOMY))
    text = written(report=report)
    shown = section(text, "Data")
    ceiling = report["splits"]["train"]["accuracy_ceiling"]
    assert f"| train | 6 | 0 | 1 | 1 | 2 | {ceiling:.2%} |" in shown
    assert "| test | 20 | 300 | 300 | 1 | 256 |" in shown
    assert "| neoplasms | 3 | 3 | 3 |" in shown
    assert "Classes without training rows: general pathological conditions." in shown
    assert "| train | train.csv | abababababab |" in shown
    assert "several labels (1 train, 1 validation, 1 test)" in section(text, "Limits and intended use")
    split_off = report | {"split": {"method": "by class", "split_off": {"test": 0.1}, "seed": 7}}
    assert "0.1 for test; seed 7" in section(written(report=split_off), "Data")


def test_a_large_taxonomy_makes_no_large_card(written):
    config = make_config([{f"parent {i}": [f"child {i} {j}" for j in range(50)]} for i in range(60)])
    text = written(config, report=make_report(config.tree), metrics={})
    assert len(text) < 25_000
    assert "and 40 smaller ones." in text
    assert "and 2,980 smaller ones." in text
    assert "and 2,860 more nodes" in text


def test_the_limits_are_stated(written, metrics):
    shown = section(written(), "Limits and intended use")
    for words in ("Not a medical device", "not for diagnosis", "one path", "256 tokens", f"{metrics['test_ece']:.3f}"):
        assert words in shown


def test_the_training_time_is_in_minutes_and_a_resumed_run_says_of_which_part(written, metrics):
    assert "Training time, evaluations included: 2.1 minutes." in section(written(), "Environmental impact")
    shown = section(written(metrics=metrics | {"resumed_from_step": 1200}), "Environmental impact")
    assert "Training time from step 1,200 on, where it was resumed, evaluations included: 2.1 minutes." in shown


def test_the_environment_names_hardware_and_libraries_but_no_machine(written):
    environment = describe_environment("cpu")
    assert {"python", "torch", "transformers", "peft", "bitsandbytes"} <= environment["versions"].keys()
    assert re.fullmatch(r".+, \d+ cores", environment["hardware"])
    assert socket.gethostname() not in json.dumps(environment)
    assert f"/{getpass.getuser()}" not in json.dumps(environment)
    text = written(metrics={"environment": environment})
    assert f"transformers {environment['versions']['transformers']}" in section(text, "Environmental impact")


def test_the_citation_is_that_of_the_citation_file(written):
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    shown = section(written(), "Citation")
    assert f"title = {{{cited['title']}}}" in shown
    assert f"author = {{{' and '.join('{' + author['name'] + '}' for author in cited['authors'])}}}" in shown
    assert f"license = {{{cited['license']}}}" in shown
    assert ("year = " in shown) == ("date-released" in cited)


@pytest.mark.parametrize(
    ("settings", "cited"),
    [
        ({"tuning": "lora", "quantization": "4bit", "focal_gamma": 1.0}, ["LoRA", "QLoRA", "Focal"]),
        ({"tuning": "lora", "quantization": "none", "focal_gamma": 0.0}, ["LoRA"]),
        ({"tuning": "full", "quantization": "none", "focal_gamma": 2.0, "consistency": 0.0}, ["Focal"]),
        ({"tuning": "full", "quantization": "none", "focal_gamma": 0.0, "consistency": 1.0}, ["Consistency"]),
    ],
)
def test_only_methods_that_were_used_are_cited(written, settings, cited):
    assert re.findall(r"^- (\w+)", section(written(settings=settings), "Citation"), re.M) == cited


# ── Multi-label ────────────────────────────────────────────────────────────────────────────────────────────


def make_label_sets_report(tree: Taxonomy) -> dict:
    """Describe label sets as `split_rows` does. Of eight training texts, two have two labels and three have one."""
    one, other = (tree.id(name) for name in ("neoplasms", "nervous system diseases"))
    sizes = {"train": 8, "validation": 4, "test": 4}
    rows = pd.DataFrame(
        {"split": split, "text_id": f"{split} {i}", "nodes": (one, other) if i < 2 else (one,) if i % 2 else ()}
        for split, size in sizes.items()
        for i in range(size)
    )
    return {
        "sources": [{"split": "all", "name": "/all.jsonl", "dataset": None, "sha256": {"all.jsonl": "ab" * 32}}],
        "columns": {"text": "text", "label": ["labels"]},
        "taxonomy": "from /home/alice/taxonomy.yaml",
        "split": {"method": "by class, identical texts kept together", "split_off": {"test": 0.1}, "seed": 42},
        "splits": {split: ManyNodesRows().describe(part, tree, 1) for split, part in rows.groupby("split", sort=False)},
        "united_rows": {"train": 7, "validation": 0, "test": 1},
        "classes_without_training_rows": [],
        "trained_before": {"scores": "verified", "moved": {}},
        "lengths": {split: length_report([10, 20, 300], 256) for split in sizes},
    }


@pytest.fixture
def written_multi_label(written):
    """Return a function that writes the card of a multi-label run, by default a finished one, and returns its text."""
    config = make_config(problem_type="multi_label_classification")
    tree, generator = config.tree, np.random.default_rng(0)
    form = ManyNodesForm(tree)
    config.calibration = Calibration(
        lexical_weight=0.3,
        scales=[1.0] * tree.num_nodes,
        thresholds=np.linspace(0.2, 0.5, tree.num_nodes).tolist(),
        set_thresholds=[round(0.99 - i / 100, 2) for i in range(99)],
        num_texts=120,
    )
    labels = form.decisions.targets([[i % tree.num_nodes] if i % 5 else [] for i in range(50)]).numpy()
    measured = {"train_runtime": 60.0, "test_answer_recall": 0.9123, "test_answer_nodes": 2.25, "lexical_weight": 0.3}
    for step in ("quantized_", "uncalibrated_", "without_lexical_head_", ""):
        for prefix in ("eval", "test"):
            u = generator.normal(size=labels.shape) + labels
            scores = form.measure(u, labels)
            measured |= {f"{step}{prefix}_{name}": value for name, value in scores.items()}
    correct, chosen, _ = form.class_outcomes(u, labels, np.arange(50), config.calibration.thresholds)
    rows, intervals = per_class_report(tree.labels, correct, chosen)
    measured |= {"per_class": rows, "intervals": {f"test_{name}": ends for name, ends in intervals.items()}}

    def write(config=config, metrics=measured, report=None, **arguments) -> tuple[str, dict]:
        report = make_label_sets_report(tree) if report is None else report
        return written(config, metrics=metrics, report=report, **arguments), metrics

    return write


def test_a_multi_label_card_names_its_scores_as_the_metrics_file_does(written_multi_label):
    text, metrics = written_multi_label(model_id="me/model")
    parsed = ModelCard(text).data
    published = {f"{r.dataset_split}_{r.metric_name}": (r.metric_type, r.metric_value) for r in parsed.eval_results}
    for name in ("micro_f1", "macro_f1", "leaf_micro_f1", "leaf_macro_f1", "example_f1", "level_2_micro_f1"):
        assert published[f"test_{name}"] == ("f1", metrics[f"test_{name}"])
        assert published[f"validation_{name}"] == ("f1", metrics[f"eval_{name}"])
    assert {"test_mean_average_precision", "test_log_loss", "test_ece"} < published.keys()
    assert not any("by_chance" in name for name in published)
    assert parsed.to_dict()["metrics"] == ["f1"]
    assert ModelCard(card.update_for_publishing(text, "you/model")).data.model_name == "you/model"


def test_the_template_is_rendered_completely(written, written_multi_label):
    for text in (written(), written_multi_label()[0]):
        assert not re.search(r"\}\}|\{\{|\{%|%\}", re.sub(r"(?ms)^```.*?^```", "", text))


def test_thousands_of_label_columns_are_not_all_listed(written):
    columns = [f"label {i}" for i in range(5000)]
    text = written(report=make_report(make_config().tree) | {"columns": {"text": "text", "label": columns}})
    assert "label 19 and 4,980 more" in text
    assert "label 20" not in text


def test_a_multi_label_card_says_how_thresholds_and_answers_were_fitted(written_multi_label):
    text, metrics = written_multi_label(settings=SETTINGS | {"load_best_model_at_end": True})
    shown = " ".join(section(text, "Results").split())
    for words in (
        "every node that reaches its threshold, with its ancestors",
        "lie between 0.20 and 0.50, with a median of 0.35",
        "F1 scores on the validation rows are optimistic, because the thresholds were fitted on these rows",
        "calibrated by a scale and a bias",
        "a linear classifier over the words",
        "contains at least 90 % of a text's nodes, on average over labelled texts",
        "does not account for the selection of the checkpoint on the same rows",
        "On the test texts, the mean recall is 91.2%, with 2.2 nodes per set on average.",
        "fitted on 120 texts",
        "| node | texts | precision | recall | F1 | 95 % of F1 |",
        "95 % bootstrap intervals: test micro F1",
    ):
        assert words in shown, words
    for words in ("leaf.", "temperature", "coverage", "labelled with a leaf", "points of accuracy"):
        assert words not in shown, words
    printed = section(text, "Results")
    for name, title in (("micro_f1", "micro F1"), ("log_loss", "log loss of a node (nats)")):
        parts = [f"{metrics[f'{step}test_{name}']:.4f}" for step in ("uncalibrated_", "without_lexical_head_", "")]
        assert f"| test {title} | {' | '.join(parts)} |" in printed
        assert f"| test {title} | {metrics[f'quantized_test_{name}']:.4f} | {parts[0]} |" in printed
    assert (
        printed.count("| expected calibration error |")
        == printed.count("| expected calibration error if perfectly calibrated |")
        == 1
    )
    assert len([line for line in printed.splitlines() if re.match(r"\| [\w ]+ \| \d+ \| [\d.]+ \|", line)]) == 6
    assert "Conformal risk control" in section(text, "Citation")
    assert "path" not in section(text, "Limits and intended use")


def test_a_multi_label_card_describes_the_label_sets(written_multi_label):
    report = make_label_sets_report(Taxonomy(DEFAULT_TAXONOMY))
    shown = section(written_multi_label(report=report)[0], "Data")
    assert "| train | 8 | 1 | 0.88 | 3 |" in shown
    assert "7 train rows and 1 test rows" in shown
    assert "in the train texts: neoplasms and nervous system diseases (2)." in shown
    assert "| neoplasms | 5 | 3 | 3 |" in shown
    assert "ceiling" not in shown
    report["splits"]["train"]["pairs"][0]["labels"][1] = "a | b"
    assert "neoplasms and a &#124; b (2)." in section(written_multi_label(report=report)[0], "Data")


def test_the_snippets_of_a_multi_label_card_use_only_what_the_checkpoint_has(written_multi_label):
    for text, offered in ((written_multi_label()[0], True), (unfinished_multi_label(written_multi_label), False)):
        code = snippets(text)
        assert len(code) == 3
        for snippet in code:
            compile(snippet, "snippet", "exec")
        assert ("recall=0.9" in code[0]) == offered
        assert "top_k=3" in code[0]
        assert "top_k=None" in code[1]
        tables = [lines for block in text.split("\n\n") if (lines := block.split("\n"))[0].startswith("| ")]
        for lines in tables:
            assert {line.count("|") for line in lines} == {lines[0].count("|")}


def unfinished_multi_label(write) -> str:
    return write(make_config(problem_type="multi_label_classification"), metrics={})[0]


def test_an_uncalibrated_multi_label_card_says_at_which_threshold_it_was_scored(written_multi_label):
    _, metrics = written_multi_label()
    test_only = {name: value for name, value in metrics.items() if re.match("test_(?!answer)", name)}
    text, _ = written_multi_label(make_config(problem_type="multi_label_classification"), metrics=test_only)
    shown = " ".join(section(text, "Results").split())
    assert "every node that reaches the probability 0.5, with its ancestors" in shown
    assert "The pipeline predicts the nodes of probability 0.5 or more." in shown
    assert "recall=0.9" not in text


def test_a_multi_label_card_shows_its_plots(written_multi_label, tmp_path):
    (tmp_path / "plots").mkdir()
    for name in ("f1_by_frequency", "precision_recall", "reliability_diagram", "confusion_matrix_level_1"):
        (tmp_path / "plots" / f"{name}.png").touch()
    images = re.findall(r"!\[.*?\]\(plots/(.*?)\.png\)", written_multi_label()[0])
    assert images == ["f1_by_frequency", "precision_recall", "reliability_diagram"]
