"""Test contrastive steps before prototypes: the loss against a manual calculation, and the effect
on unseen texts.
"""

import numpy as np
import pytest
import torch
from conftest import run, write_csv
from safetensors.torch import load_file
from test_prototypes import ROWS, tokenized, trainer_of

from hierarchical_clinicalbert.training.contrastive import TEMPERATURE, contrastive_loss
from hierarchical_clinicalbert.training.prototypes import initialise_heads


def test_the_loss_is_that_of_the_paper_worked_by_hand():
    """Compare the loss with a manual calculation.

    The first three texts are in pairs, the fourth and fifth are not.
    """
    vectors = np.random.default_rng(0).normal(size=(5, 8))
    classes = [{0}, {0, 1}, {1}, {2}, set()]
    z = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    losses = []
    for i in range(5):
        others = [j for j in range(5) if j != i]
        positive = [p for p in others if classes[i] & classes[p]]
        if positive:
            total = sum(np.exp(z[i] @ z[a] / TEMPERATURE) for a in others)
            losses.append(
                -np.mean([np.log(np.exp(z[i] @ z[p] / TEMPERATURE) / total) for p in positive])
            )
    members = torch.tensor([[float(c in own) for c in range(3)] for own in classes])
    assert contrastive_loss(torch.from_numpy(vectors), members).item() == pytest.approx(
        np.mean(losses), rel=1e-6
    )


def separation(trainer, rows: list[int]) -> float:
    """Return the mean cosine between texts of one class, minus the mean cosine between texts of two
    classes.
    """
    with torch.no_grad():
        vectors = trainer.embed(
            [trainer.processing_class(ROWS[row]["text"])["input_ids"] for row in rows]
        )
    unit = torch.nn.functional.normalize(vectors).numpy()
    cosines = unit @ unit.T
    labels = np.array([ROWS[row]["label"] for row in rows])
    same = labels[:, None] == labels
    return cosines[same & ~np.eye(len(rows), dtype=bool)].mean() - cosines[~same].mean()


def test_unseen_texts_of_a_class_come_closer(minilm, tmp_path):
    trainer = trainer_of(minilm, tmp_path)
    trainer.args.learning_rate = 1e-3
    trainer.args.contrastive_steps = 10
    known = range(0, len(ROWS), 2)
    unseen = range(1, len(ROWS), 2)
    before = separation(trainer, unseen)
    frozen = trainer.model.encoder.get_input_embeddings().weight.clone()
    rows = tokenized(trainer).select(known)
    initialise_heads(trainer, rows)
    assert separation(trainer, unseen) > before + 0.05
    torch.testing.assert_close(
        trainer.model.encoder.get_input_embeddings().weight, frozen, atol=0, rtol=0
    )


def test_log_and_card_say_what_was_done_and_a_resumed_or_continued_run_does_not_repeat_it(
    tiny_encoder, tmp_path
):
    first = tmp_path / "first"
    second = tmp_path / "second"
    words = (
        "--train_file",
        write_csv(tmp_path / "rows.csv", ROWS),
        "--validation_size",
        0,
        "--test_size",
        0,
    )
    words += ("--quantization", "none", "--contrastive_steps", 2)
    fresh = (*words, "--model_name_or_path", tiny_encoder, "--output_dir", first)
    assert "contrastive learning: 2 steps, loss " in run(*fresh, "--max_steps", 1).stderr
    resumed = run(
        *fresh, "--max_steps", 2, "--resume_from_checkpoint", "auto", "--heads_init", "random"
    ).stderr
    assert "contrastive" not in resumed
    assert "| heads_init | prototypes |" in (first / "README.md").read_text()
    words += (
        "--model_name_or_path",
        first,
        "--output_dir",
        second,
        "--max_steps",
        1,
        "--learning_rate",
        1e-9,
    )
    continued = run(*words).stderr
    assert (
        "trained heads are kept: --contrastive_steps and --heads_init have no effect" in continued
    )
    assert "heads are initialised from" not in continued
    assert [
        "contrastive_steps" in (folder / "README.md").read_text() for folder in (first, second)
    ] == [True, False]
    before, after = (load_file(folder / "heads.safetensors") for folder in (first, second))
    for name in ("weight", "bias"):
        torch.testing.assert_close(after[name], before[name], atol=1e-6, rtol=0)
