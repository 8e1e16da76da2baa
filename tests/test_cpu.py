"""The fast path of LoRA on a CPU, against PEFT, against SDPA, and against derivatives taken numerically."""

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModel, AutoTokenizer

from attention_hierarchical import ATTENTION, PerDocumentAttention, text_spans
from configuration_hierarchical import Taxonomy
from training.arguments import ModelArguments
from training.cpu import speed_up
from training.model import build_model

TREE = Taxonomy({"a": ["b", "c"], "d": None})
TEXTS = [
    "Carcinoma of the colon.",
    "A long note on the treatment of epilepsy in children, and on what became of them after nine years of it.",
    "Angina pectoris in a patient of 57 years",
]


def lora_model(minilm: str, quantization: str = "4bit", **settings):
    """A model whose adapter is no longer the zero that it starts as."""
    model = build_model(
        ModelArguments(minilm, quantization=quantization, lora_r=4, head_dropout=0.0, **settings), TREE, seed=3
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


@pytest.fixture(scope="module")
def batch(minilm):
    tokens = AutoTokenizer.from_pretrained(minilm)(TEXTS, padding=True, return_tensors="pt")
    return {**tokens, "labels": torch.tensor([0, 1, 2])}


def step(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Node log-probabilities, and the gradients of all that is trained, as one vector."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch)
    output.loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    return output.node_log_probs.detach(), torch.cat(gradients)


def assert_same(model, fast, batch) -> None:
    """Equal but for bfloat16, in which PEFT, too, computes here."""
    (outputs, gradients), (fast_outputs, fast_gradients) = step(model, batch), step(fast, batch)
    torch.testing.assert_close(fast_outputs, outputs, atol=0.02, rtol=0)
    assert torch.cosine_similarity(gradients, fast_gradients, dim=0) > 0.999
    assert fast_gradients.norm() / gradients.norm() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("quantization", ["4bit", "none", "8bit"])
def test_outputs_and_gradients_are_those_of_peft(minilm, batch, quantization):
    model, fast = (lora_model(minilm, quantization) for _ in range(2))
    speed_up(fast.encoder)
    assert_same(model, fast, batch)


SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
ENCODERS = {
    "roberta": {**SMALL, "pad_token_id": 1},
    "electra": {**SMALL, "embedding_size": 16},
    "distilbert": {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
    "modernbert": {**SMALL, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8,
                   "global_attn_every_n_layers": 2},
    "deberta-v2": {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
}  # fmt: skip


@pytest.mark.parametrize("kind", ENCODERS)
def test_other_encoders_too(kind, tmp_path):
    """Also those whose layers see a window, or have an attention of their own."""
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model(kind, **ENCODERS[kind])).save_pretrained(tmp_path)
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[1, 11:] = mask[2, 4:] = 0
    given = {"input_ids": torch.randint(5, 90, (3, 20)), "attention_mask": mask, "labels": torch.tensor([0, 1, 2])}
    model, fast = (lora_model(str(tmp_path), "none") for _ in range(2))
    speed_up(fast.encoder)
    adapted = [module for module in fast.modules() if isinstance(module, LoraLayer)]
    assert adapted
    assert all("forward" in vars(module) for module in adapted)
    assert_same(model, fast, given)


def test_with_gradient_checkpointing_too(minilm, batch):
    model, fast = (lora_model(minilm) for _ in range(2))
    speed_up(fast.encoder)
    fast.gradient_checkpointing_enable()
    assert_same(model, fast, batch)


@pytest.mark.parametrize("hole", [False, True])
def test_padding_may_stand_on_the_left_or_in_between(minilm, batch, hole):
    mask = batch["attention_mask"].flip(1)
    if hole:
        mask[:, 12] = 0
    given = {**batch, "input_ids": batch["input_ids"].flip(1), "attention_mask": mask}
    model, fast = (lora_model(minilm) for _ in range(2))
    speed_up(fast.encoder)
    assert_same(model, fast, given)


def test_a_disabled_or_merged_adapter_is_respected(minilm, batch):
    model, fast = (lora_model(minilm, "none") for _ in range(2))
    speed_up(fast.encoder)
    for one in (model, fast):
        for module in one.encoder.modules():
            if isinstance(module, LoraLayer):
                module.enable_adapters(False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        bare, same = (one(**batch).node_log_probs for one in (model, fast))
    torch.testing.assert_close(same, bare, atol=0.02, rtol=0)
    for one in (model, fast):
        for module in one.encoder.modules():
            if isinstance(module, LoraLayer):
                module.enable_adapters(True)
                module.merge()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole, same = (one(**batch).node_log_probs for one in (model, fast))
    torch.testing.assert_close(same, whole, atol=0.02, rtol=0)
    assert (whole - bare).abs().max() > 0.05


def test_dropout_of_the_adapter_and_a_chosen_attention_are_kept(minilm):
    model = lora_model(minilm, lora_dropout=0.1, attn_implementation="eager")
    speed_up(model.encoder)
    assert not any("forward" in vars(module) for module in model.modules() if isinstance(module, LoraLayer))
    assert model.encoder.config._attn_implementation == "eager"


def test_the_attention_is_not_written_into_a_checkpoint(minilm, tmp_path):
    model = lora_model(minilm)
    speed_up(model.encoder)
    assert model.encoder.config._attn_implementation == ATTENTION
    model.save_pretrained(tmp_path)
    assert ATTENTION not in (tmp_path / "config.json").read_text()


def test_attention_is_that_of_sdpa_and_its_gradients_are_the_numerical_ones():
    query, key, value = (torch.randn(3, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]])
    spans = text_spans(3, 5, mask)
    assert spans == [slice(0, 5), slice(0, 2), slice(2, 5)]
    output = PerDocumentAttention.apply(query, key, value, spans, 0.3)
    expected = scaled_dot_product_attention(query, key, value, mask[:, None, None, :].bool(), scale=0.3)
    kept = mask.bool()[:, :, None, None]
    torch.testing.assert_close(output * kept, expected.transpose(1, 2) * kept)
    assert torch.autograd.gradcheck(
        lambda *tensors: PerDocumentAttention.apply(*tensors, spans, 0.3), (query, key, value)
    )


def test_a_mask_with_a_hole_or_an_empty_row_has_no_spans():
    assert text_spans(2, 4, torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1]])) is None
    assert text_spans(2, 4, torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])) is None
    assert text_spans(2, 4, None) == [slice(0, 4)] * 2
