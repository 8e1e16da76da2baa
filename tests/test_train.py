"""Test train.py from the command line: its log, its metrics, and its checkpoint as the pipelines
load it.
"""

import json
import re
import shlex

import numpy as np
import pytest
import torch
from conftest import CLEAR, CORPUS, ROOT, predict_here, read_csv, run, train_label_sets, write_csv
from sklearn.metrics import accuracy_score, f1_score, log_loss
from transformers import AutoModel, AutoTokenizer, pipeline

import train
from hierarchical_clinicalbert.errors import InputError


def test_the_log_names_columns_precision_sizes_scores_and_the_next_commands(quickstart_run):
    output, log = quickstart_run
    for words in ("'text'", "'label'", "encoder 4bit, tuning lora", "in float32"):
        assert words in log
    assert "calibrated on the validation rows: scales of the scores from" in log
    table = re.split(r"validation +test\n", log)[1]
    for name in ("log_loss", "accuracy", "macro_f1", "ece"):
        assert re.search(rf"^{name} +\d\.\d{{4}} +\d\.\d{{4}}$", table, re.MULTILINE), name
    metrics = json.loads((output / "metrics.json").read_text())
    assert (
        f"{100 * metrics['test_accuracy']:.0f} % of 150 test texts are classified correctly" in log
    )
    assert f"best epoch: {metrics['best_epoch']:.4g} of {metrics['epoch']:.4g}" in log
    assert "{'" not in log  # no dicts of the Trainer
    commands = [shlex.split(line) for line in log.splitlines() if line.startswith("  python ")]
    assert [words[1] for words in commands] == ["predict.py", "space/app.py", "push_to_hub.py"]
    assert {words[words.index("--model") + 1] for words in commands} == {str(output)}


def test_metrics_have_the_promised_names_and_agree_with_scikit_learn(quickstart_run):
    output, _ = quickstart_run
    metrics = json.loads((output / "metrics.json").read_text())
    names = [
        "accuracy",
        "macro_f1",
        "weighted_f1",
        "hierarchical_precision",
        "hierarchical_recall",
        "hierarchical_f1",
    ]
    names += [
        "log_loss",
        "ece",
        "level_1_accuracy",
        "level_1_macro_f1",
        "level_2_accuracy",
        "level_2_macro_f1",
    ]
    for prefix in ("eval_", "test_", "quantized_eval_"):
        assert {prefix + name for name in names} <= metrics.keys()
    # of the model before calibration, and they say so
    assert metrics.keys().isdisjoint({"eval_loss", "test_loss"})
    assert {"uncalibrated_eval_loss", "uncalibrated_test_loss"} <= metrics.keys()
    assert {
        "trainable_parameters",
        "trainable_share",
        "encoder_bytes",
        "encoder_bytes_float32",
    } <= metrics.keys()
    files = {split: {f"{split}.csv"} for split in ("train", "validation", "test")}
    assert {split: {*hashes} for split, hashes in metrics["environment"]["data"].items()} == files
    rows = read_csv(output / "test_predictions.csv")
    truth = [row["label"] for row in rows]
    predicted = [row["prediction"] for row in rows]
    assert metrics["test_accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert metrics["test_macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    # the calibration lowers the log loss
    assert metrics["lexical_weight"] > 0
    assert metrics["eval_log_loss"] < metrics["uncalibrated_eval_log_loss"]
    assert 0.8 < metrics["test_set_coverage"] <= 1


def test_the_saved_tokenizer_knows_the_length_of_texts_and_only_states_are_pickled(quickstart_run):
    output, _ = quickstart_run
    tokenizer = AutoTokenizer.from_pretrained(output, trust_remote_code=True)
    assert (tokenizer.model_max_length, tokenizer.padding_side) == (256, "right")  # of the recipe
    pickles = {
        path for suffix in ("bin", "pkl", "pt", "pth") for path in output.rglob(f"*.{suffix}")
    }
    assert {path.name for path in pickles} <= {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert all(path.parent.name.startswith("checkpoint-") for path in pickles)


def test_the_stock_pipeline_has_the_scores_of_the_metrics_file(quickstart_run):
    output, _ = quickstart_run
    metrics = json.loads((output / "metrics.json").read_text())
    rows = read_csv(CORPUS / "test.csv")
    classify = pipeline("text-classification", model=str(output), trust_remote_code=True)
    labels = [*classify.model.config.label2id]
    results = classify([row["text"] for row in rows], truncation=True, top_k=None)
    scores = [{one["label"]: one["score"] for one in result} for result in results]
    p = np.array([[of_text[label] for label in labels] for of_text in scores])
    truth = [row["label"] for row in rows]
    assert metrics["test_log_loss"] == pytest.approx(
        log_loss(truth, p[:, np.argsort(labels)]), abs=1e-5
    )
    assert metrics["test_accuracy"] == pytest.approx(
        accuracy_score(truth, np.array(labels)[p.argmax(1)])
    )


@pytest.mark.parametrize("several", [False, True], ids=["one path", "many nodes"])
def test_predictions_and_measured_sets_are_those_of_the_pipeline(
    quickstart_run, tiny_encoder, tmp_path, several
):
    output = quickstart_run[0]
    rows = read_csv(CORPUS / "test.csv")
    if several:
        output = tmp_path / "results"
        log = train_label_sets(
            tiny_encoder, output, "--max_length", 64, "--label_smoothing_factor", 0.1
        )
        assert "Disabling label smoothing" not in log  # the Trainer's own
        with (ROOT / "examples" / "multi_label" / "test.jsonl").open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
    classify = pipeline(
        "hierarchical-text-classification", model=str(output), trust_remote_code=True
    )
    guarantee, plural = ("recall", "s") if several else ("coverage", "")
    results = classify([row["text"] for row in rows], **{guarantee: 0.9})
    if several:
        assert f"; {sum(result['truncated'] for result in results)} texts truncated at 64" in log
    listed = read_csv(output / "test_predictions.csv")
    tree = classify.tree
    shares = []
    for row, one, result in zip(rows, listed, results, strict=True):
        labels = row["labels"] if several else [row["label"]]
        predicted = [node["label"] for node in result["labels"]]
        for column, expected in ((f"label{plural}", labels), (f"prediction{plural}", predicted)):
            assert {*filter(None, one[column].split("; "))} == {*expected}
        paths = (" > ".join(step["label"] for step in node["path"]) for node in result["labels"])
        assert one[f"path{plural}"] == "; ".join(paths)
        assert one["correct"] == str({*predicted} == {*labels})
        assert one["second_choice"] not in predicted
        # of one path, a leaf counts as held if the set has it or a node above
        predicted_set = {tree.id(node["label"]) for node in result["prediction_set"]}
        true = tree.with_ancestors(map(tree.id, labels))
        if true:
            shares.append(
                len(true & predicted_set) / len(true)
                if several
                else float(bool(true & predicted_set))
            )
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics[f"test_set_{guarantee}"] == pytest.approx(np.mean(shares))


def test_a_checkpoint_is_scored_without_training_as_it_was_after_training(quickstart_run, tmp_path):
    output, _ = quickstart_run
    test_file = CORPUS / "test.csv"
    flags = [
        "--model_name_or_path",
        output,
        "--output_dir",
        tmp_path / "scores",
        "--test_file",
        test_file,
    ]
    run("--do_train", "false", "--do_predict", *flags)
    scored = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    trained = json.loads((output / "metrics.json").read_text())
    of_sets = ("test_set_coverage", "test_set_nodes")
    for name in (
        "test_accuracy",
        "test_macro_f1",
        "test_log_loss",
        "test_ece",
        "test_level_1_accuracy",
        *of_sets,
    ):
        assert scored[name] == pytest.approx(trained[name], abs=1e-6), name
    assert not (tmp_path / "scores" / "config.json").exists()
    message = (
        "scores already holds a run: give another --output_dir, or --overwrite_output_dir true"
    )
    for words in (("--do_train", "false", "--do_predict"), ("--train_file", test_file)):
        with pytest.raises(InputError, match=message):
            train.main([str(word) for word in (*words, *flags)])
    run(
        "--do_train",
        "false",
        "--do_predict",
        *flags,
        "--overwrite_output_dir",
        "true",
        "--max_length",
        48,
    )
    scored = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert "test_log_loss" in scored
    assert not {*of_sets} & {*scored}  # the thresholds of sets are for another length


def test_a_warm_start_with_a_grown_taxonomy_keeps_the_adapter_and_the_known_heads(
    quickstart_run, tmp_path
):
    output, _ = quickstart_run
    old = AutoModel.from_pretrained(output, trust_remote_code=True, merge_adapter=False)
    before = old.config.tree
    lines = ["parent,name,description", "specific disease,infections,"]
    for label, parent in zip(before.labels, before.parents, strict=True):
        description = "cancer and benign tumours" if label == "neoplasms" else ""
        lines.append(f"{'' if parent < 0 else before.labels[parent]},{label},{description}")
    (tmp_path / "grown.csv").write_text("\n".join(lines) + "\n")
    words = [
        "--model_name_or_path",
        output,
        "--output_dir",
        tmp_path / "results",
        "--taxonomy",
        tmp_path / "grown.csv",
    ]
    words += ["--train_file", CORPUS / "train.csv", "--validation_file", CORPUS / "validation.csv"]
    # the adapter has r = 16
    log = run(*words, "--max_steps", 1, "--learning_rate", 1e-12, "--lora_r", 4).stderr
    card = (tmp_path / "results" / "README.md").read_text()
    assert "| lora_r | 16 |" in card
    assert "Training continued from an earlier checkpoint" in card
    # the title is the continued checkpoint's, and the taxonomy is no longer the default one
    assert "\n# Synthetic abstracts by disease\n" in card
    assert "Not a medical device" in card
    assert "heads kept: 6; initialised: 'infections'" in log
    assert "the adapter keeps its settings: lora_r 16, lora_alpha 32" in log
    new = AutoModel.from_pretrained(
        tmp_path / "results", trust_remote_code=True, merge_adapter=False
    )
    after = new.config.tree
    assert (after.num_leaves, after.descriptions) == (6, {"neoplasms": "cancer and benign tumours"})
    for node in range(before.num_nodes):
        torch.testing.assert_close(
            new.heads.weight[after.id(before.labels[node])], old.heads.weight[node]
        )
    adapters = [{n: p for n, p in m.encoder.named_parameters() if "lora" in n} for m in (old, new)]
    assert adapters[0]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor)


def test_labels_in_several_forms_are_one_class_of_the_checkpoint(tiny_encoder, tmp_path):
    """Train on labels that differ in white space, invisible characters and width, and in case."""
    wide = "\uff48eart\u200b failure"
    forms = ["heart  failure", "heart\u00a0failure", wide, "Heart failure", "flu"]
    rows = [{"text": f"Case {i}.", "label": forms[i % 5]} for i in range(20)]
    output = tmp_path / "results"
    words = ["--train_file", write_csv(tmp_path / "train.csv", rows), "--validation_size", 0]
    words += ["--max_steps", 1, "--model_name_or_path", tiny_encoder, "--output_dir", output]
    log = run(*words).stderr
    assert "with their rows: 'Heart failure' (4) and 'heart failure' (12); if they mean" in log
    stored = json.loads((output / "config.json").read_text())
    assert {*stored["id2label"].values()} == {"heart failure", "Heart failure", "flu"}
    report = json.loads((output / "data_report.json").read_text())
    assert report["look_alikes"] == [{"Heart failure": 4, "heart failure": 12}]
    test_file = write_csv(tmp_path / "test.csv", [{"text": "A case.", "label": wide}])
    words = ["--do_train", "false", "--do_predict", "--model_name_or_path", output]
    run(*words, "--test_file", test_file, "--output_dir", tmp_path / "scores")
    assert read_csv(tmp_path / "scores" / "test_predictions.csv")[0]["label"] == "heart failure"


def test_without_validation_rows_nothing_is_calibrated_and_nothing_guaranteed(
    uncalibrated_run, tmp_path
):
    output, log = uncalibrated_run
    assert (output / "checkpoint-5").is_dir()  # by --save_strategy best
    assert "no lexical head, and the model's probabilities are not calibrated" in log
    config = json.loads((output / "config.json").read_text())
    assert config["calibration"] == {"max_length": 128}
    metrics = json.loads((output / "metrics.json").read_text())
    prefixes = ("eval_", "quantized_", "uncalibrated_", "test_set_")
    assert [name for name in metrics if name.startswith(prefixes)] == []
    assert not (output / "validation_predictions.csv").exists()

    classify = pipeline(
        "hierarchical-text-classification", model=str(output), trust_remote_code=True
    )
    rows = read_csv(output.parent / "test.csv")
    results = classify([row["text"] for row in rows], levels=True)
    truth = [row["label"] for row in rows]
    nodes = [
        {label: score for level in result["levels"] for label, score in level.items()}
        for result in results
    ]
    correct = [one[label] for one, label in zip(nodes, truth, strict=True)]
    assert metrics["test_log_loss"] == pytest.approx(-np.log(correct).mean(), abs=1e-5)
    assert metrics["test_accuracy"] == pytest.approx(
        accuracy_score(truth, [result["label"] for result in results])
    )

    message = (
        "this checkpoint was not calibrated: coverage needs one that was trained with "
        "validation rows"
    )
    with pytest.raises(ValueError, match=message):
        classify("A study of ulcers.", coverage=0.9)
    words = (
        "--model",
        output,
        "--input",
        output.parent / "test.csv",
        "--output",
        tmp_path / "out.jsonl",
    )
    with pytest.raises(InputError, match=message):
        predict_here(*words, "--coverage", 0.9)
    assert list(tmp_path.iterdir()) == []


def test_full_fine_tuning_of_one_file_leaves_one_self_contained_model(tiny_encoder, tmp_path):
    rows = read_csv(CORPUS / "validation.csv")
    codes = {name: str(code) for code, name in enumerate(CLEAR, start=1)}
    data = [
        {"condition_label": codes[row["label"]], "medical_abstract": row["text"]} for row in rows
    ]
    write_csv(tmp_path / "your.csv", data)
    done = run(
        "--data_path",
        tmp_path / "your.csv",
        "--output_dir",
        tmp_path / "results",
        "--model_name_or_path",
        tiny_encoder,
        "--tuning",
        "full",
        "--num_train_epochs",
        "1",
        "--class_names",
        json.dumps({code: name for name, code in codes.items()}),
    )
    card = (tmp_path / "results" / "README.md").read_text()
    assert "Encoder: from a local folder" in card
    assert "base_model:" not in card
    assert "lora_r" not in card
    assert "'medical_abstract'" in done.stderr
    assert (tmp_path / "results" / "model.safetensors").exists()
    metrics = json.loads((tmp_path / "results" / "metrics.json").read_text())
    assert metrics["trainable_share"] == 1
    assert not any(name.startswith("quantized_") for name in metrics)
    labels = json.loads((tmp_path / "results" / "config.json").read_text())["id2label"]
    assert sorted(labels.values()) == sorted(codes)
