import re

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from configuration_hierarchical import MULTI_LABEL, SINGLE_LABEL, HierarchicalConfig
from decisions_hierarchical import Decisions
from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.training.arguments import (
    HierarchicalTrainingArguments,
    ModelArguments,
)
from hierarchical_clinicalbert.training.loop import TrainingLoop
from hierarchical_clinicalbert.training.losses import FocalLoss
from hierarchical_clinicalbert.training.model import build_model, size_report
from hierarchical_clinicalbert.training.sampler import LengthGroupedSampler
from hierarchical_clinicalbert.training.tokens import Collator
from hierarchical_clinicalbert.training.views import halves
from modeling_hierarchical import HierarchicalForSequenceClassification
from taxonomy_hierarchical import Taxonomy

TREE = Taxonomy({"a": ["b", "c"], "d": None, "e": ["f", "g", "h"]})
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
FORMS = pytest.mark.parametrize("several", [False, True], ids=["one path", "many nodes"])


def rows(count: int = 16, several: bool = False) -> Dataset:
    """Return texts of unequal lengths.

    Labels are leaves and inner nodes: one, or with ``several`` none to three.
    """
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(4, 20, (count,), generator=generator).tolist()
    labels = torch.randint(0, TREE.num_nodes, (count, 3), generator=generator).tolist()
    labels = [nodes[: i % 4] if several else nodes[:1] for i, nodes in enumerate(labels)]
    return Dataset.from_dict(
        {
            "input_ids": [
                torch.randint(5, 60, (n,), generator=generator).tolist() for n in lengths
            ],
            "attention_mask": [[1] * n for n in lengths],
            "labels": labels,
            "sentences": [[-1, *(i // 3 for i in range(n - 2)), -1] for n in lengths],
            "row": list(range(count)),
        }
    )


def loss(decisions: Decisions, data: Dataset) -> FocalLoss:
    return FocalLoss(
        decisions, decisions.targets(data["labels"][:]), 2.0, balanced=True, label_smoothing=0.1
    )


def batch_of(
    model: HierarchicalForSequenceClassification, tokenizer, data: Dataset, some: range = range(8)
) -> dict:
    return Collator(tokenizer, model.heads.decisions.targets)([data[i] for i in some])


def arguments(folder, **settings) -> HierarchicalTrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "bf16": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "train_sampling_strategy": "sequential",
        "metric_for_best_model": None,
        "disable_tqdm": True,
    }
    return HierarchicalTrainingArguments(**{**defaults, **settings})


def trainer(model, tokenizer, data, args, **settings) -> TrainingLoop:
    given = {
        "train_dataset": data,
        "eval_dataset": data,
        "loss_function": loss(model.heads.decisions, data),
        **settings,
    }
    collator = Collator(tokenizer, model.heads.decisions.targets)
    return TrainingLoop(
        model=model, args=args, processing_class=tokenizer, data_collator=collator, **given
    )


@pytest.mark.parametrize(
    ("encoder", "flags", "message"),
    [
        (
            "mpnet",
            {"gradient_checkpointing": True},
            "--activation_checkpointing: MPNetModel of transformers does not",
        ),
        (
            "deberta",
            {"bf16": True},
            r"DeBERTa \(version 1\) .* fails in bf16 and fp16: give --bf16 false",
        ),
    ],
)
def test_a_flag_with_which_an_encoder_cannot_train_is_refused(tmp_path, encoder, flags, message):
    model = HierarchicalForSequenceClassification(
        HierarchicalConfig(text_config={"model_type": encoder, **TINY}, taxonomy=TREE)
    )
    with pytest.raises(InputError, match=message):
        TrainingLoop(model=model, args=arguments(tmp_path, **flags))
    TrainingLoop(model=model, args=arguments(tmp_path))


def tiny_model(several: bool = False) -> HierarchicalForSequenceClassification:
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    settings = {"taxonomy": TREE, "problem_type": MULTI_LABEL if several else SINGLE_LABEL}
    config = HierarchicalConfig(text_config={"model_type": "bert", **TINY, **dropout}, **settings)
    return HierarchicalForSequenceClassification(config)


def lora_model(minilm: str, quantization: str, **settings) -> HierarchicalForSequenceClassification:
    model = build_model(
        ModelArguments(minilm, quantization=quantization, lora_r=4, **settings), TREE, seed=3
    )
    model.heads.dropout.p = 0.0
    return model


def trained_weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@FORMS
@pytest.mark.parametrize(("focal", "consistency"), [(True, 0.0), (True, 1.5), (False, 0.0)])
def test_accumulation_gives_the_gradient_of_one_large_batch(
    tmp_path, tokenizer, focal, consistency, several
):
    data = rows(several=several)
    after = []
    for size, steps in ((16, 1), (4, 4)):
        model = tiny_model(several)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        args = arguments(tmp_path, max_steps=1, max_grad_norm=0.0, consistency=consistency, **batch)
        given = {} if focal else {"loss_function": None}
        trainer(model, tokenizer, data, args, optimizers=(optimizer, scheduler), **given).train()
        after.append(trained_weights(model))
    moved = max(
        (after[0][name] - p).abs().max() for name, p in tiny_model(several).named_parameters()
    )
    assert moved > 1e-3
    for name in after[0]:
        torch.testing.assert_close(after[0][name], after[1][name], atol=1e-5, rtol=0, msg=name)


@FORMS
def test_the_loss_of_halves_is_that_of_each_and_their_disagreement(tmp_path, tokenizer, several):
    data = rows(several=several)
    model = tiny_model(several)
    decisions = model.heads.decisions
    function = loss(model.heads.decisions, data)
    ours = trainer(
        model.train(),
        tokenizer,
        data,
        arguments(tmp_path, seed=5, consistency=0.7),
        loss_function=function,
    )
    inputs = batch_of(model, tokenizer, data)
    labels = inputs["labels"]
    sentences = inputs["sentences"]
    found = ours.compute_loss(model, inputs, num_items_in_batch=11 * labels[0].numel())
    whole = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    views, first, second = halves(whole, sentences, list(range(8)), tokenizer.pad_token_id, 5, 0)
    assert len(views["input_ids"]) > 8
    scores = model(**views).decision_logits
    one = scores[first]
    other = scores[second]
    apart = decisions.divergence(one, other).sum() / 11
    expected = sum(function(half, labels, 11) for half in (one, other)) / 2 + 0.7 * apart
    torch.testing.assert_close(found, expected)
    model.eval()  # where texts are whole
    evaluated = ours.compute_loss(model, inputs)
    torch.testing.assert_close(evaluated, function(model(**whole).decision_logits, labels))


@pytest.mark.parametrize(
    ("settings", "step"),
    [({"save_strategy": "steps", "save_steps": 2}, 2), ({"logging_steps": 2}, 2), ({}, 3)],
)
def test_a_loss_that_is_not_finite_ends_the_run_before_a_checkpoint_is_written(
    tmp_path, tokenizer, settings, step
):
    data = rows()
    model = tiny_model()
    with torch.no_grad():
        model.encoder.embeddings.word_embeddings.weight[data["input_ids"][6][2]] = float("nan")
    args = arguments(
        tmp_path, max_steps=3, per_device_train_batch_size=4, **{"logging_steps": 99, **settings}
    )
    with pytest.raises(InputError, match=f"is nan at step {step} or before: lower --learning_rate"):
        trainer(model, tokenizer, data, args).train()
    assert list(tmp_path.glob("checkpoint-*")) == []


def test_the_log_has_a_line_for_each_loss_and_each_evaluation(tmp_path, tokenizer, caplog, capsys):
    caplog.set_level("INFO")
    data = rows()
    every = {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2, "max_steps": 6}
    settings = arguments(
        tmp_path, metric_for_best_model="f1", per_device_train_batch_size=4, **every
    )
    f1 = iter([0.25, 0.75, 0.5])
    trainer(
        tiny_model(), tokenizer, data, settings, compute_metrics=lambda _: {"f1": next(f1)}
    ).train()
    lines = [re.sub(r"(loss|rate) [\d.e-]+", r"\1 _", line) for line in caplog.messages]
    losses = "loss _, validation loss _"
    assert [line for line in lines if line.startswith(("step", "epoch"))] == [
        "step 2 of 6: loss _, learning rate _",
        f"epoch 0.5: {losses}, f1 0.2500 (best so far)",
        "step 4 of 6: loss _, learning rate _",
        f"epoch 1: {losses}, f1 0.7500 (best so far)",
        "step 6 of 6: loss _, learning rate _",
        f"epoch 1.5: {losses}, f1 0.5000 (best: 0.7500, epoch 1)",
    ]
    assert capsys.readouterr().out == ""  # no dicts


def test_evaluating_in_the_middle_of_quantized_training_changes_nothing(
    tmp_path, minilm, tokenizer
):
    data = rows()
    after = {}
    for strategy in ("no", "steps"):
        model = lora_model(minilm, "4bit")
        args = arguments(
            tmp_path,
            max_steps=4,
            per_device_train_batch_size=4,
            eval_strategy=strategy,
            eval_steps=2,
            bf16=True,
        )
        trainer(model, tokenizer, data, args).train()
        after[strategy] = (
            trained_weights(model),
            {n: t.clone() for n, t in model.encoder.state_dict().items()},
        )
    for without, with_evaluation in zip(after["no"], after["steps"], strict=True):
        assert without.keys() == with_evaluation.keys()
        for name, tensor in without.items():
            assert tensor.equal(with_evaluation[name]), name


def test_the_best_adapter_and_heads_are_restored(tmp_path, minilm, tokenizer):
    data = rows()
    scores = iter([0.9, 0.5, 0.4])
    model = lora_model(minilm, "4bit")
    every_step = {
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
    }
    best = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
        "save_total_limit": None,
    }
    args = arguments(
        tmp_path, max_steps=3, per_device_train_batch_size=4, warmup_steps=0, **every_step, **best
    )
    run = trainer(model, tokenizer, data, args, compute_metrics=lambda _: {"score": next(scores)})
    run.train()
    model.save_pretrained(tmp_path / "final")
    for file in ("heads.safetensors", "adapter/adapter_model.safetensors"):
        final = load_file(tmp_path / "final" / file)
        best, last = (load_file(tmp_path / f"checkpoint-{step}" / file) for step in (1, 3))
        assert all(final[name].equal(best[name]) for name in final), file
        assert any(not final[name].equal(last[name]) for name in final), file


@pytest.mark.parametrize("count", [7, 100, 1000])
def test_batches_hold_texts_of_like_length_and_differ_between_epochs(count):
    lengths = torch.randint(10, 512, (count,), generator=torch.Generator().manual_seed(0))

    def batches(epoch: int, seed: int = 5) -> list[list[int]]:
        sampler = LengthGroupedSampler(8, lengths.tolist(), seed)
        sampler.set_epoch(epoch)
        rows = list(sampler)
        assert sorted(rows) == list(range(count))
        return [rows[start : start + 8] for start in range(0, count, 8)]

    first = batches(0)
    assert first == batches(0) != batches(0, seed=6)
    if count > 7:
        assert {*map(frozenset, first)} != {*map(frozenset, batches(1))}
        longest = [max(lengths[rows].tolist()) for rows in first]
        assert longest[0] == max(longest[:-1])  # the last batch is incomplete
        padded = sum(len(rows) * most for rows, most in zip(first, longest, strict=True))
        assert 1 - int(lengths.sum()) / padded < 0.15  # of the tokens are padding
        assert longest[1:-1] != sorted(longest[1:-1], reverse=True)


def test_heads_have_a_learning_rate_of_their_own(tmp_path, tokenizer):
    model = tiny_model()
    run = trainer(
        model, tokenizer, rows(), arguments(tmp_path, learning_rate=1e-4, heads_learning_rate=1e-2)
    )
    rate_of = {
        id(p): group["lr"] for group in run.create_optimizer().param_groups for p in group["params"]
    }
    assert rate_of.keys() == {id(p) for p in model.parameters()}
    for name, p in model.named_parameters():
        assert rate_of[id(p)] == (1e-2 if name.startswith("heads.") else 1e-4), name


@pytest.mark.parametrize(("quantization", "saved"), [("none", 0), ("8bit", 3), ("4bit", 3.5)])
def test_quantized_encoders_are_as_small_as_reported_and_what_is_trained_is_in_float32(
    minilm, quantization, saved
):
    model = lora_model(minilm, quantization)
    # weights in the layers of MiniLM
    size = size_report(model)
    linear = 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    # beside the weights, a scale a row or a block
    assert size["encoder_bytes_float32"] - size["encoder_bytes"] == pytest.approx(
        saved * linear, rel=0.02
    )
