"""Heads that are initialised from the class names, against vectors that transformers gives by itself, and from the command line."""

import numpy as np
import pytest
import torch
from conftest import CLEAR, read_csv, run, write_csv
from datasets import Dataset
from safetensors.torch import load_file
from test_trainer import arguments
from transformers import AutoModel, AutoTokenizer

from taxonomy_hierarchical import DEFAULT_TAXONOMY, Taxonomy
from training.arguments import ModelArguments
from training.label_names import TEXTS, TYPICAL_SCORE, initialise_heads, set_heads_from_names
from training.model import build_model
from training.trainer import HierarchicalTrainer
from training.views import build_collator

TREE = Taxonomy(DEFAULT_TAXONOMY)
ROWS = [
    {"text": f"We studied {name} in adults, and report how {name} was treated.", "label": label}
    for label, names in CLEAR.items()
    for name in names
]


def test_scores_are_those_worked_by_hand(minilm, tmp_path):
    """With all texts known, from the encoder as it is, loaded the plain way."""
    tokenizer, encoder = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm).eval()

    def vector(text: str) -> torch.Tensor:
        with torch.no_grad():
            return encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)

    assert len(ROWS) <= TEXTS
    texts = torch.stack([vector(row["text"]) for row in ROWS])
    names = torch.stack([vector(label) for label in TREE.labels[: TREE.num_leaves]])
    spread = sum(float((one - texts.mean(0)) @ (one - texts.mean(0))) for one in texts) / len(texts)
    directions = [(one - names.mean(0)) / (one - names.mean(0)).norm() for one in names]
    expected = torch.tensor(
        [[TYPICAL_SCORE * float(u @ (one - texts.mean(0))) / spread**0.5 for u in directions] for one in texts]
    ).log_softmax(-1)

    model = build_model(ModelArguments(minilm, quantization="none"), TREE, seed=1)
    trainer = HierarchicalTrainer(
        model=model, args=arguments(tmp_path), processing_class=tokenizer, data_collator=build_collator(tokenizer)
    )
    data = Dataset.from_dict(
        {
            "input_ids": tokenizer([row["text"] for row in ROWS])["input_ids"],
            "labels": [TREE.labels.index(row["label"]) for row in ROWS],
        }
    )
    model.train()
    assert set_heads_from_names(trainer, data, only_if_better=True)
    assert model.training
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(**tokenizer(row["text"], return_tensors="pt")).logits for row in ROWS])
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


@pytest.fixture(scope="module")
def accuracy(minilm, tmp_path_factory) -> dict[str, float]:
    """Of test rows after a step that is too small to teach anything, for each way to begin."""
    folder = tmp_path_factory.mktemp("names")
    known = write_csv(folder / "train.csv", [{**row, "text": f"{row['text']} Nobody died."} for row in ROWS])
    unseen = write_csv(folder / "test.csv", ROWS)
    found = {}
    flags = {"label_names": [], "random": ["--heads_init", "random"]}  # the former comes by itself, with 30 rows
    for begin, words in flags.items():
        output = folder / begin
        done = run(
            *("--train_file", known, "--test_file", unseen, "--validation_size", 0, "--max_steps", 1),
            *("--learning_rate", 1e-9, "--model_name_or_path", minilm, "--output_dir", output, *words),
        )
        assert ("initialised from the class names" in done.stderr) == (begin == "label_names")
        rows = read_csv(output / "test_predictions.csv")
        found[begin] = sum(row["label"] == row["prediction"] for row in rows) / len(rows)
    return found


def test_it_is_right_about_most_texts_before_it_is_trained(accuracy):
    assert accuracy["label_names"] > 0.6
    assert accuracy["label_names"] > accuracy["random"] + 0.2


def test_descriptions_are_used_where_names_say_nothing_and_not_where_they_say_nothing_themselves(minilm, tmp_path):
    """From the command line, with codes as names. Then with the names, which the descriptions contradict."""
    codes = {label: f"X{i}" for i, label in enumerate(CLEAR)}
    others = dict(zip(CLEAR, [*list(CLEAR)[1:], next(iter(CLEAR))], strict=True))
    for names, described, used in ((codes, {x: x for x in CLEAR}, True), ({x: x for x in CLEAR}, others, False)):
        rows = [{"text": row["text"], "label": names[row["label"]]} for row in ROWS]
        classes = [{"parent": "", "name": names[label], "description": described[label]} for label in CLEAR]
        done = run(
            *("--train_file", write_csv(tmp_path / "train.csv", rows), "--validation_size", 0, "--max_steps", 1),
            *(
                "--test_file",
                write_csv(tmp_path / "test.csv", [{**r, "text": f"{r['text']} All lived."} for r in rows]),
            ),
            *("--taxonomy", write_csv(tmp_path / "classes.csv", classes), "--learning_rate", 1e-9),
            *("--model_name_or_path", minilm, "--output_dir", tmp_path / f"out-{used}"),
        )
        assert ("initialised from the class names and descriptions" in done.stderr) == used
        found = read_csv(tmp_path / f"out-{used}" / "test_predictions.csv")
        assert sum(row["label"] == row["prediction"] for row in found) / len(found) > 0.6
        card = (tmp_path / f"out-{used}" / "README.md").read_text()
        assert all(f"{names[label]} – {described[label]}" in card for label in CLEAR)


def test_names_that_say_nothing_leave_the_heads_as_they_are(minilm, tmp_path):
    """The names stand for other classes than their own."""
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    model = build_model(ModelArguments(minilm, quantization="none"), TREE, seed=1)
    trainer = HierarchicalTrainer(
        model=model, args=arguments(tmp_path), processing_class=tokenizer, data_collator=build_collator(tokenizer)
    )
    data = Dataset.from_dict(
        {
            "input_ids": tokenizer([row["text"] for row in ROWS])["input_ids"],
            "labels": [(TREE.labels.index(row["label"]) + 1) % TREE.num_leaves for row in ROWS],
        }
    )
    before = {name: tensor.clone() for name, tensor in model.heads.state_dict().items()}
    assert not set_heads_from_names(trainer, data, only_if_better=True)
    torch.testing.assert_close(dict(model.heads.state_dict()), before, atol=0, rtol=0)
    assert set_heads_from_names(trainer, data)


def test_with_many_rows_a_class_it_begins_by_chance_unless_asked(tiny_encoder, tmp_path):
    rows = [{**row, "text": f"{row['text']} {i} took part."} for row in ROWS for i in range(6)]  # 36 a class
    words = ("--train_file", write_csv(tmp_path / "rows.csv", rows), "--validation_size", 0, "--max_steps", 1)
    words += ("--model_name_or_path", tiny_encoder, "--quantization", "none")
    for asked, begun in ([], False), (["--heads_init", "label_names"], True):
        done = run(*words, "--output_dir", tmp_path / f"out-{begun}", *asked)
        assert ("initialised from the class names" in done.stderr) == begun


@pytest.mark.parametrize(
    ("asked", "asked_again", "expected"), [([], [], "random"), (["label_names"], ["random"], "label_names")]
)
def test_the_card_of_a_resumed_run_says_how_the_heads_began(tiny_encoder, tmp_path, asked, asked_again, expected):
    """The names are codes, which fit no text, over an encoder that knows nothing: unless asked, the heads begin by chance."""
    codes = {label: f"C{i:02}" for i, label in enumerate(CLEAR)}
    rows = [{"text": row["text"], "label": codes[row["label"]]} for row in ROWS]
    words = ("--train_file", write_csv(tmp_path / "rows.csv", rows), "--validation_size", 0, "--test_size", 0)
    words += ("--model_name_or_path", tiny_encoder, "--quantization", "none", "--lexical_head", "false")
    words += ("--output_dir", tmp_path / "out")
    done = run(*words, "--max_steps", 1, *(["--heads_init", *asked] if asked else []))
    assert ("initialised at random" in done.stderr) == (expected == "random")
    again = ["--heads_init", *asked_again] if asked_again else []
    done = run(*words, "--max_steps", 2, "--resume_from_checkpoint", "auto", *again)
    assert f"resuming from {tmp_path / 'out' / 'checkpoint-1'}" in done.stderr
    assert f"| heads_init | {expected} |" in (tmp_path / "out" / "README.md").read_text()


def test_what_is_trained_goes_on_with_its_own_heads(clear_checkpoint, tmp_path):
    file = write_csv(tmp_path / "rows.csv", ROWS)
    done = run(
        *("--train_file", file, "--validation_size", 0, "--max_steps", 1, "--learning_rate", 1e-9),
        *("--quantization", "none"),
        *("--lexical_head", "false", "--model_name_or_path", clear_checkpoint, "--output_dir", tmp_path / "out"),
    )
    assert "initialised from the class names" not in done.stderr
    before, after = (load_file(f"{folder}/heads.safetensors") for folder in (clear_checkpoint, tmp_path / "out"))
    for name in ("weight", "bias"):
        torch.testing.assert_close(after[name], before[name], atol=1e-6, rtol=0)


def several_labels(tokenizer, minilm, folder) -> tuple[HierarchicalTrainer, Dataset, np.ndarray]:
    """A trainer of several labels a text, rows with two labels each, and each node's log-odds given its parent."""
    model = build_model(ModelArguments(minilm, quantization="none"), TREE, 1, problem_type="multi_label_classification")
    trainer = HierarchicalTrainer(
        model=model, args=arguments(folder), processing_class=tokenizer, data_collator=build_collator(tokenizer)
    )
    labels = np.zeros((len(ROWS), TREE.num_nodes), dtype=np.int8)
    for i in range(len(ROWS)):
        for node in (TREE.id(ROWS[i]["label"]), TREE.id(ROWS[i // 2]["label"])):
            labels[i, TREE.path(node)] = 1
    data = Dataset.from_dict({"input_ids": tokenizer([row["text"] for row in ROWS])["input_ids"]})
    odds = []
    for node, parent in enumerate(TREE.parents):
        given = labels if parent < 0 else labels[labels[:, parent] == 1]
        odds.append(np.log((given[:, node].sum() + 0.5) / (len(given) - given[:, node].sum() + 0.5)))
    return trainer, data.add_column("labels", [*labels]), np.array(odds)


def test_with_several_labels_every_nodes_score_is_worked_by_hand(minilm, tmp_path):
    tokenizer, encoder = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm).eval()

    def vectors(texts: list[str]) -> np.ndarray:
        with torch.no_grad():
            return np.stack(
                [encoder(**tokenizer(t, return_tensors="pt")).last_hidden_state[0].mean(0).numpy() for t in texts]
            )

    trainer, data, odds = several_labels(tokenizer, minilm, tmp_path)
    texts, names = vectors([row["text"] for row in ROWS]), vectors(TREE.labels)
    spread = np.sqrt(((texts - texts.mean(0)) ** 2).sum(1).mean())
    directions = names - names.mean(0)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    expected = odds + TYPICAL_SCORE * (texts - texts.mean(0)) @ directions.T / spread
    given = ModelArguments(minilm, heads_init="label_names")
    assert initialise_heads(trainer, data, given) == "label_names"
    model = trainer.model.eval()
    with torch.no_grad():
        found = torch.cat(
            [model(**tokenizer(row["text"], return_tensors="pt")).decision_logits for row in ROWS]
        ).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_with_several_labels_biases_start_at_the_log_odds_of_the_training_rows(minilm, tmp_path):
    trainer, data, odds = several_labels(AutoTokenizer.from_pretrained(minilm), minilm, tmp_path)
    weight = trainer.model.heads.weight.detach().clone()
    assert initialise_heads(trainer, data, ModelArguments(minilm, heads_init="random")) == "random"
    np.testing.assert_allclose(trainer.model.heads.bias.detach(), odds, atol=1e-6)
    torch.testing.assert_close(trainer.model.heads.weight.detach(), weight, atol=0, rtol=0)
