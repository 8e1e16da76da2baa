"""Test classes that get heads without training: in a model, and from the command line of a user who
has no or few rows.
"""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLEAR, clear_rows, read_csv, run, write_csv
from safetensors.torch import load_file
from scipy.special import log_softmax, softmax
from test_prototypes import ROWS, offsets_and_names, unit, vectors
from transformers import AutoTokenizer, pipeline

import train
from configuration_hierarchical import MULTI_LABEL, SINGLE_LABEL, Calibration, HierarchicalConfig
from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.evaluation.open_world import fit_open_world
from modeling_hierarchical import HierarchicalForSequenceClassification
from taxonomy_hierarchical import DEFAULT_TAXONOMY, TaxonomyError

TREE = {"a": {"b": ["c", "d"], "e": None}, "f": ["g", "h"], "i": None}
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
IDS = torch.arange(5, 55).view(5, 10)


def model_of(
    problem_type: str = SINGLE_LABEL, calibrated: bool = True
) -> HierarchicalForSequenceClassification:
    """Return a model with random heads; if ``calibrated``, with a lexical head, and a temperature
    for each decision.
    """
    config = HierarchicalConfig(text_config=SMALL, taxonomy=TREE, problem_type=problem_type)
    model = HierarchicalForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.heads.weight)
    torch.nn.init.normal_(model.heads.bias)
    if calibrated:
        tree = config.tree
        classes = config.num_labels
        scales = [0.5 + decision / 4 for decision in tree.decision_of]
        biases = torch.randn(tree.num_nodes).tolist()
        thresholds = [0.3] * tree.num_nodes if problem_type == MULTI_LABEL else None
        lexical = {
            "idf": torch.rand(64),
            "weight": torch.randn(classes, 64),
            "bias": torch.randn(classes),
        }
        calibration = Calibration(0.7, scales, biases, thresholds, [0.2] * 99, 64, 50)
        model.set_calibration(calibration, lexical)
    return model


def outputs(model: HierarchicalForSequenceClassification) -> dict[str, dict[str, np.ndarray]]:
    """Return each node's probabilities and decision scores for five texts, by label."""
    with torch.no_grad():
        found = model(IDS)
    labels = model.config.tree.labels
    columns = {"p": found.node_log_probs.exp(), "score": found.decision_logits}
    return {
        name: dict(zip(labels, values.double().numpy().T, strict=True))
        for name, values in columns.items()
    }


# ── In a model ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("problem_type", [SINGLE_LABEL, MULTI_LABEL])
def test_a_new_leaf_changes_known_nodes_only_by_its_share(problem_type):
    """Test the scores of known nodes beside the new leaf, with all that is calibrated."""
    model = model_of(problem_type)
    before = outputs(model)
    grown = copy.deepcopy(model)
    nested = {"a": {"b": ["new", "d", "c"], "e": None}, "f": ["g", "h"], "i": None}  # ids change
    assert grown.add_nodes(nested) == (["new"], [])
    after = outputs(grown)
    tree = grown.config.tree
    for label in ("c", "d", "e", "g", "h", "f", "i"):
        np.testing.assert_allclose(after["score"][label], before["score"][label], atol=1e-4)
    assert (after["p"]["new"] <= after["p"]["b"]).all()
    if problem_type == SINGLE_LABEL:
        np.testing.assert_allclose(
            sum(after["p"][leaf] for leaf in grown.config.id2label.values()), 1, rtol=1e-5
        )
    stored = grown.config.calibration
    assert (stored.set_thresholds, stored.num_texts) == (None, None)
    assert stored.thresholds == (None if problem_type == SINGLE_LABEL else [0.3] * 10)
    assert stored.scales == [0.5 + decision / 4 for decision in tree.decision_of]


@pytest.mark.parametrize(
    ("nested", "new", "gone"),
    [
        # a leaf has another parent, a subtree is a root, and a leaf is below a new node
        ({"b": ["c", "d"], "a": ["g"], "f": {"between": ["h", "e"]}, "i": None}, ["between"], []),
        ({"a": {"b": ["c", "d"]}, "f": ["g", "h"], "i": None}, [], ["e"]),
    ],
)
def test_leaves_that_stay_keep_their_odds(nested, new, gone):
    model = model_of(calibrated=False)
    before = outputs(model)["p"]
    assert model.add_nodes(nested) == (new, gone)
    after = outputs(model)["p"]
    kept = {*"cdeghi"} - {*gone}
    total = sum(before[leaf] for leaf in kept)
    for leaf in kept:
        np.testing.assert_allclose(after[leaf], before[leaf] / total, rtol=1e-4)
    np.testing.assert_allclose(after["b"], (before["c"] + before["d"]) / total, rtol=1e-4)


@pytest.mark.parametrize("problem_type", [SINGLE_LABEL, MULTI_LABEL])
def test_a_renamed_node_stays_the_same_and_keeps_its_guarantee(problem_type):
    model = model_of(problem_type)
    before = outputs(model)["p"]
    sets = model.config.calibration.set_thresholds
    nested = {"a": {"B": ["c", "d"], "e": None}, "f": ["g", "h"], "i": None}
    with pytest.raises(TaxonomyError, match="'b' is renamed to 'x', which is not in the taxonomy"):
        model.add_nodes(nested, renamed={"b": "x"})
    assert model.add_nodes(nested, renamed={"b": "B"}) == ([], [])
    after = outputs(model)["p"]
    for label, p in before.items():
        np.testing.assert_array_equal(after["B" if label == "b" else label], p)
    assert model.config.calibration.set_thresholds == sets


def test_with_family_attention_known_nodes_keep_their_queries():
    config = HierarchicalConfig(
        text_config=SMALL, taxonomy=TREE, problem_type=MULTI_LABEL, pooling="family_attention"
    )
    model = HierarchicalForSequenceClassification(config).eval()
    for weight in (model.heads.weight, model.heads.query):
        torch.nn.init.normal_(weight)
    before = outputs(model)["p"]
    nested = {"f": ["g", "new", "h"], "a": {"b": ["d", "c"], "e": None, "x": ["y"]}, "i": None}
    assert model.add_nodes(nested) == (["new", "y", "x"], [])
    after = outputs(model)["p"]
    for label, p in before.items():
        np.testing.assert_allclose(after[label], p, rtol=1e-4)


@pytest.mark.parametrize(
    "changed",
    [
        {"a": ["b", "e"], "f": ["g", "h"], "i": None},
        {"a": {"b": ["c"], "e": None}, "f": ["g", "h", "d"], "i": None},
    ],
)
def test_with_label_attention_nodes_are_merged_or_moved_before_a_training_alone(changed):
    settings = {"text_config": SMALL, "taxonomy": TREE, "pooling": "label_attention"}
    model = HierarchicalForSequenceClassification(HierarchicalConfig(**settings)).eval()
    torch.nn.init.normal_(model.heads.weight)
    config = model.config.to_dict()
    before = outputs(model)
    with pytest.raises(
        ValueError, match="with label attention, moved or merged nodes need training"
    ):
        model.add_nodes(changed)
    assert model.config.to_dict() == config
    np.testing.assert_equal(outputs(model), before)
    assert model.add_nodes(changed, trains=True)[0] == []


# ── From the command line ─────────────────────────────────────────────────────────────────────────


def taxonomy_file(file: Path, classes: dict[str, str]) -> str:
    """Write a taxonomy of roots with descriptions."""
    return write_csv(
        file, [{"parent": "", "name": name, "description": text} for name, text in classes.items()]
    )


def accuracy(folder: Path, labels: set[str]) -> float:
    """Return the accuracy on the test rows of some classes."""
    rows = [row for row in read_csv(folder / "test_predictions.csv") if row["label"] in labels]
    return sum(row["label"] == row["prediction"] for row in rows) / len(rows)


def outputs_of(folder: Path, texts: list[str]) -> tuple[HierarchicalForSequenceClassification, Any]:
    """Return the model of a checkpoint, and its outputs for texts."""
    model = HierarchicalForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model, model(**tokenizer(texts, return_tensors="pt", padding=True))


def test_without_rows_the_largest_cosine_of_a_phrase_wins(minilm, tmp_path):
    """Compare the order of the roots with cosines of the encoder, loaded by transformers alone."""
    words = [
        "--taxonomy",
        taxonomy_file(tmp_path / "classes.csv", {name: CLEAR[name][0] for name in CLEAR}),
    ]
    words += ["--model_name_or_path", minilm, "--output_dir", tmp_path / "results"]
    done = run(*words)
    assert "no training steps" in done.stderr
    assert "the model's probabilities are not calibrated" in done.stderr
    card = (tmp_path / "results" / "README.md").read_text()
    assert "No training steps: the heads of neoplasms, digestive system diseases, " in card
    assert "No labelled rows were given. Taxonomy: from classes.csv." in card
    texts = [row["text"] for row in clear_rows(3)[::9]]
    model, found = outputs_of(tmp_path / "results", texts)
    phrases = vectors(
        minilm, tuple(f"{name}: {CLEAR[name][0]}" for name in model.config.tree.labels)
    )
    cosines = unit(vectors(minilm, tuple(texts))) @ unit(phrases).T
    for scores, cosine in zip(found.node_log_probs.numpy(), cosines, strict=True):
        order = np.argsort(cosine)
        apart = np.diff(cosine[order]) > 0.02  # which bfloat16 tells apart
        assert (np.diff(scores[order])[apart] > 0).all()


@pytest.mark.parametrize("problem_type", [SINGLE_LABEL, MULTI_LABEL])
def test_without_rows_unlabelled_texts_move_the_heads_as_worked_by_hand(
    minilm, tmp_path, problem_type
):
    (tmp_path / "classes.json").write_text(json.dumps(DEFAULT_TAXONOMY))
    words = [
        "--taxonomy",
        tmp_path / "classes.json",
        "--model_name_or_path",
        minilm,
        "--problem_type",
        problem_type,
    ]
    words += [
        "--unlabelled_file",
        write_csv(tmp_path / "texts.csv", ROWS),
        "--output_dir",
        tmp_path / "results",
    ]
    train.main([*map(str, words), "--bf16", "false"])
    assert (
        "are the embeddings of unlabelled texts, class names"
        in (tmp_path / "results/README.md").read_text()
    )
    rows = [*{row["text"]: row for row in ROWS}.values()]  # each text counts once
    model, found = outputs_of(tmp_path / "results", [row["text"] for row in rows])
    offsets, directions = offsets_and_names(minilm, [*model.config.id2label.values()], rows)
    prototypes = names = np.stack(directions)
    for _ in range(3):
        shares = softmax(24 * offsets @ prototypes[:5].T, axis=1)
        members = np.stack(
            [shares[:, leaves].sum(1) for leaves in model.config.tree.leaves_at_or_below]
        )[: len(names)]
        prototypes = unit((4 + len(rows) / (2 * len(names))) * names + members @ offsets)
    expected = 12 * offsets @ prototypes.T
    if problem_type == MULTI_LABEL:  # log-odds given the parent
        counts = members.sum(1)
        tree = model.config.tree
        of_parent = [counts[parent] if parent >= 0 else len(rows) for parent in tree.parents]
        expected += np.log((counts + 0.5) / (of_parent - counts + 0.5))
    else:
        expected = log_softmax(expected, axis=1)
    scores = found.decision_logits if problem_type == MULTI_LABEL else found.logits
    np.testing.assert_allclose(scores, expected, atol=1e-2)


@pytest.mark.parametrize("stored", [False, True])
def test_heads_beside_known_ones_are_those_worked_by_hand(minilm, tmp_path, stored):
    """Class means are those of the checkpoint, if it has ``stored`` them, else the phrases."""
    factor = 2.5 if stored else 1
    names = [*CLEAR][:4]
    first = taxonomy_file(tmp_path / "first.csv", dict.fromkeys(names[:3], ""))
    words = [
        "--model_name_or_path",
        minilm,
        "--taxonomy",
        first,
        "--output_dir",
        tmp_path / "first",
    ]
    train.main([*map(str, words), "--bf16", "false"])
    model = HierarchicalForSequenceClassification.from_pretrained(
        tmp_path / "first", merge_adapter=False
    )
    ids = model.config.label2id
    means = phrases = vectors(minilm, tuple(sorted(names[:3], key=ids.get)))
    if stored:
        rows = [row for row in clear_rows(1, wrong=False) if row["label"] in ids]
        texts = vectors(minilm, tuple(row["text"] for row in rows))
        nodes = [[ids[row["label"]]] for row in rows]
        means = np.stack([texts[[node == [i] for node in nodes]].mean(0) for i in range(3)])
        described = np.c_[texts, np.zeros(len(texts), np.float32)]
        open_world = fit_open_world(model.config.tree, texts, nodes, described)
        model.set_calibration(Calibration(), None, open_world)
        model.save_pretrained(tmp_path / "first")
    known = model.heads.weight.detach().numpy()
    known_scores = known @ means.mean(0) + model.heads.bias.detach().numpy()

    # ── By hand: a new sibling, and a new branch of two, of which one has rows ────────────────────
    center = means.mean(0)
    differences = means - means.mean(0)
    variance = (differences**2).sum(1).mean()
    scatter = differences.T @ differences + variance * np.eye(len(center))
    given = [f"We treated {name}." for name in CLEAR[names[3]]]
    length = factor * np.linalg.norm(known - known.mean(0), axis=1).mean()
    expected = {}
    for name, texts, mean_head, level in (
        (names[3], given, known.mean(0), known_scores.mean()),
        ("burns", [], 0, -np.log(2)),
        ("fever", ["Outcomes of fever."], 0, -np.log(2)),
    ):
        direction = 4 * unit(vectors(minilm, (name,))[0] - phrases.mean(0))
        for text in texts:
            direction += (vectors(minilm, (text,))[0] - center) / np.sqrt(variance)
        weight = mean_head + length * unit(np.linalg.solve(scatter, direction))
        expected[name] = (weight, level - weight @ center)

    # ── By train.py ───────────────────────────────────────────────────────────────────────────────
    grown = [*names, {"other conditions": ["burns", "fever"]}]
    (tmp_path / "grown.json").write_text(json.dumps(grown))
    rows = [{"text": text, "label": names[3]} for text in given]
    rows += [{"text": "Outcomes of fever.", "label": "other conditions/fever"}]
    words = ["--model_name_or_path", tmp_path / "first", "--taxonomy", tmp_path / "grown.json"]
    words += ["--train_file", write_csv(tmp_path / "train.csv", rows), "--num_train_epochs", 0]
    train.main([*map(str, words), "--output_dir", str(tmp_path / "grown"), "--bf16", "false"])
    model = HierarchicalForSequenceClassification.from_pretrained(tmp_path / "grown")
    for name, (weight, bias) in expected.items():
        node = next(i for i, found in enumerate(model.config.tree.names) if found == name)
        np.testing.assert_allclose(model.heads.weight[node].detach(), weight, atol=2e-3)
        np.testing.assert_allclose(model.heads.bias[node].detach(), bias, atol=2e-3)


def test_with_label_attention_new_classes_need_training(tiny_encoder, tmp_path):
    rows = write_csv(
        tmp_path / "rows.csv", [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]
    )
    for name, labels in (("first", ["a", "b"]), ("grown", ["a", "b", "c"])):
        (tmp_path / f"{name}.json").write_text(json.dumps(labels))
    words = ["--pooling", "label_attention", "--quantization", "none", "--validation_size", 0]
    first = ["--train_file", rows, "--taxonomy", tmp_path / "first.json", "--max_steps", 1]
    first += ["--model_name_or_path", tiny_encoder, "--output_dir", tmp_path / "first"]
    train.main([*map(str, words + first)])
    grown = ["--model_name_or_path", tmp_path / "first", "--taxonomy", tmp_path / "grown.json"]
    grown += ["--output_dir", tmp_path / "grown"]
    with pytest.raises(InputError, match="label attention, new nodes need training"):
        train.main([*map(str, grown)])


def test_classes_are_added_to_a_classifier_without_rows(minilm, tmp_path):
    """Such a checkpoint has no class means: the phrases take their place."""
    described = {f"K{i}": ", ".join(names[:2]) for i, names in enumerate(CLEAR.values())}
    first = taxonomy_file(
        tmp_path / "first.csv", {label: described[label] for label in [*described][:3]}
    )
    run("--taxonomy", first, "--model_name_or_path", minilm, "--output_dir", tmp_path / "first")
    folder = tmp_path / "grown"
    taxonomy = taxonomy_file(tmp_path / "classes.csv", described)
    run("--taxonomy", taxonomy, "--model_name_or_path", tmp_path / "first", "--output_dir", folder)
    classify = pipeline(
        "hierarchical-text-classification", model=str(folder), trust_remote_code=True
    )
    given = [(f"K{i}", name) for i, names in enumerate(CLEAR.values()) for name in names[2:]]
    found = classify([f"We report on patients with {name}." for _, name in given])
    correct = [result["label"] == label for result, (label, _) in zip(found, given, strict=True)]
    assert np.mean(correct) > 0.5
    assert np.mean(correct[12:]) >= 0.5  # of the classes K3 and K4


@pytest.fixture(scope="module")
def known(minilm, tmp_path_factory) -> Path:
    """Train a calibrated checkpoint with a lexical head on all classes but two."""
    folder = tmp_path_factory.mktemp("known")
    for split, offset in (("train", 1), ("validation", 2)):
        rows = [row for row in clear_rows(offset) if row["label"] in [*CLEAR][:3]]
        write_csv(folder / f"{split}.csv", rows)
    taxonomy = taxonomy_file(folder / "classes.csv", dict.fromkeys([*CLEAR][:3], ""))
    run(
        *(
            "--train_file",
            folder / "train.csv",
            "--validation_file",
            folder / "validation.csv",
            "--taxonomy",
            taxonomy,
        ),
        *("--max_steps", 4),
        *(
            "--model_name_or_path",
            minilm,
            "--quantization",
            "none",
            "--eval_strategy",
            "no",
            "--save_strategy",
            "no",
        ),
        *(
            "--load_best_model_at_end",
            "false",
            "--output_dir",
            folder / "results",
            "--heads_init",
            "prototypes",
        ),
    )
    return folder / "results"


def test_a_checkpoint_of_several_labels_grows_without_naming_its_form(labels_checkpoint, tmp_path):
    stored = json.loads(Path(labels_checkpoint, "config.json").read_text())
    (tmp_path / "grown.json").write_text(json.dumps([*stored["id2label"].values(), "renal colic"]))
    words = [
        "--model_name_or_path",
        labels_checkpoint,
        "--tuning",
        "full",
        "--output_dir",
        tmp_path / "a",
    ]
    train.main([*map(str, words), "--taxonomy", str(tmp_path / "grown.json")])
    grown = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (grown["problem_type"], len(grown["id2label"])) == (
        MULTI_LABEL,
        len(stored["id2label"]) + 1,
    )


@pytest.mark.parametrize("rows_per_class", [0, 4])
def test_classes_are_added_to_a_checkpoint_without_training(known, tmp_path, rows_per_class):
    new = [*CLEAR][3:]
    renamed = {"neoplasms": "tumours"}
    classes = {
        renamed.get(name, name): ", ".join(names[:3]) if name in new else ""
        for name, names in CLEAR.items()
    }
    test = [
        {**row, "label": renamed.get(row["label"], row["label"])}
        for row in clear_rows(3, wrong=False)
    ]
    words = [
        "--taxonomy",
        taxonomy_file(tmp_path / "classes.csv", classes),
        "--renamed_nodes",
        json.dumps(renamed),
    ]
    words += ["--model_name_or_path", known, "--test_file", write_csv(tmp_path / "test.csv", test)]
    if rows_per_class:
        rows = [row for label in new for row in clear_rows(1, wrong=False) if row["label"] == label]
        some = [
            row
            for label in new
            for row in [r for r in rows if r["label"] == label][::5][:rows_per_class]
        ]
        words += ["--train_file", write_csv(tmp_path / "train.csv", some), "--num_train_epochs", 0]
    folder = tmp_path / "results"
    log = run(*words, "--output_dir", folder).stderr
    assert (
        "heads kept: 3; initialised: 'cardiovascular diseases', 'general pathological "
        "conditions'; dropped: none"
    ) in log
    removed = "the checkpoint's prediction sets for 90 % coverage and p-values are removed"
    assert f"{removed}: they were fitted to its earlier taxonomy; to fit new ones, train" in log
    assert accuracy(folder, {*new}) > 0.5
    assert accuracy(folder, {*classes} - {*new}) > 0.6
    before, after = (json.loads((path / "config.json").read_text()) for path in (known, folder))
    assert "set_thresholds" in before["calibration"]
    assert "set_thresholds" not in after["calibration"]
    heads = [load_file(path / "heads.safetensors") for path in (known, folder)]
    # class means are kept, for the classes that come next, but no p-values
    assert [len(one["open_world.references"]) > 0 for one in heads] == [True, False]
    for label, old in before["label2id"].items():
        kept = after["label2id"][renamed.get(label, label)]
        for name in ("weight", "bias"):
            assert heads[0][name][old].equal(heads[1][name][kept])
    card = (folder / "README.md").read_text()
    assert (
        "No training steps: the heads of cardiovascular diseases, general pathological "
        "conditions are the"
    ) in card
    assert "The calibration is that of the earlier checkpoint, which lacked these classes." in card


@pytest.mark.parametrize("trains", [False, True])
def test_exchanged_names_take_their_heads_with_them(known, tmp_path, trains):
    """The taxonomy stays equal. Steps, if there are any, are too small to change the heads."""
    first, second, third = [*CLEAR][:3]
    renamed = {first: second, second: first}
    words = ["--model_name_or_path", known, "--renamed_nodes", json.dumps(renamed)]
    same = dict.fromkeys([first, second, third], "")
    words += ["--taxonomy", taxonomy_file(tmp_path / "same.csv", same)]
    texts = [row["text"] for row in clear_rows(3)[::9]]
    model, before = outputs_of(known, texts)
    if trains:
        rows = [{"text": text, "label": first} for text in texts]
        words += ["--train_file", write_csv(tmp_path / "train.csv", rows), "--validation_size", 0]
        words += ["--max_steps", 1, "--learning_rate", 1e-12, "--quantization", "none"]
        model.set_calibration(Calibration())  # a run with steps drops it
        tokenizer = AutoTokenizer.from_pretrained(known)
        with torch.no_grad():
            before = model(**tokenizer(texts, return_tensors="pt", padding=True))
    log = run(*words, "--output_dir", tmp_path / "results").stderr
    assert "heads kept: 3; initialised: none; dropped: none" in log
    after_model, after = outputs_of(tmp_path / "results", texts)
    ids = model.config.label2id
    assert after_model.config.label2id == ids
    for old, new in {**renamed, third: third}.items():
        scores = after.logits[:, ids[new]]
        torch.testing.assert_close(scores, before.logits[:, ids[old]], atol=1e-4, rtol=0)
    apart = before.logits[:, ids[first]] - before.logits[:, ids[second]]
    assert apart.abs().max() > 0.01


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--test_file", "rows.csv"), "no training rows: give --train_file"),
        (
            ("--train_file", "rows.csv", "--num_train_epochs", "0", "--max_steps", "2"),
            "0 takes no steps: leave out --max_steps",
        ),
        (
            ("--taxonomy", "same.csv", "--model_name_or_path", "known"),
            "--taxonomy is the checkpoint's: nothing would change",
        ),
        (
            (
                "--taxonomy",
                "same.csv",
                "--renamed_nodes",
                '{"x": "neoplasms"}',
                "--model_name_or_path",
                "known",
            ),
            "'x' is not in",
        ),
        (
            (
                "--taxonomy",
                "same.csv",
                "--renamed_nodes",
                '{"neoplasms": "neoplasms"}',
                "--model_name_or_path",
                "known",
            ),
            "nothing would change",
        ),
        (
            (
                "--taxonomy",
                "same.csv",
                "--renamed_nodes",
                '{"neoplasms": "digestive system diseases"}',
                "--model_name_or_path",
                "known",
            ),
            (
                "'neoplasms' and 'digestive system diseases' would be one node: rename both, or "
                "neither"
            ),
        ),
        (
            (
                "--taxonomy",
                "grown.csv",
                "--unlabelled_file",
                "rows.csv",
                "--model_name_or_path",
                "known",
            ),
            "for a new classifier",
        ),
        (
            ("--taxonomy", "same.csv", "--problem_type", MULTI_LABEL),
            "several labels without training rows need --unlabelled_file",
        ),
        (
            ("--taxonomy", "same.csv", "--renamed_nodes", '{"x": "y"}'),
            "--renamed_nodes is for the nodes of a checkpoint",
        ),
    ],
)
def test_what_cannot_be_built_is_one_line(flags, message, known, tiny_encoder, tmp_path):
    taxonomy_file(tmp_path / "same.csv", dict.fromkeys([*CLEAR][:3], ""))
    taxonomy_file(tmp_path / "grown.csv", dict.fromkeys(CLEAR, ""))
    write_csv(tmp_path / "rows.csv", clear_rows(1))
    files = {name: str(tmp_path / name) for name in ("same.csv", "grown.csv", "rows.csv")} | {
        "known": str(known)
    }
    words = ["--model_name_or_path", tiny_encoder, *(files.get(word, word) for word in flags)]
    with pytest.raises(InputError, match=message) as refused:
        train.main([*words, "--output_dir", str(tmp_path / "results")])
    assert "\n" not in str(refused.value)
