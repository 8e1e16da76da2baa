"""Compare the fast paths on a CPU with PEFT, with SDPA and with plain layers."""

import copy
import sys

import pytest
import torch
from small_encoders import small_encoder
from transformers import AutoConfig, AutoModel, AutoTokenizer

from cpu_hierarchical import PackedLinear, pack_linear_layers
from hierarchical_clinicalbert.training.arguments import ModelArguments
from hierarchical_clinicalbert.training.cpu import use_training_kernels
from hierarchical_clinicalbert.training.model import build_model
from taxonomy_hierarchical import Taxonomy

TREE = Taxonomy({"a": ["b", "c"], "d": None})
TEXTS = [
    "Carcinoma of the colon.",
    (
        "A long note on the treatment of epilepsy in children, and on what became of them after "
        "nine years of it."
    ),
    "Angina pectoris in a patient of 57 years",
]


def lora_model(minilm: str, quantization: str = "4bit", **settings):
    """Build a model with a random adapter, because a new adapter is zero."""
    model = build_model(
        ModelArguments(minilm, quantization=quantization, lora_r=4, **settings), TREE, seed=3
    )
    model.heads.dropout.p = 0.0
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


@pytest.fixture(scope="module")
def batch(minilm):
    tokens = AutoTokenizer.from_pretrained(minilm)(TEXTS, padding=True, return_tensors="pt")
    return {**tokens, "labels": torch.tensor([0, 1, 2])}


def step(model, batch, dtype=torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """Return node log-probabilities, and the gradients of all trained weights as one vector.

    Weights without a gradient are left out, such as Longformer's layers for global attention, which
    are not in use.
    """
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = model(**batch)
    output.loss.backward()
    gradients = [
        p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None
    ]
    return output.node_log_probs.detach(), torch.cat(gradients)


def assert_same(model, fast, batch, dtype=torch.bfloat16) -> None:
    """Check that two models have equal outputs and gradients up to the precision in which both
    compute.
    """
    error = 0.02 if dtype == torch.bfloat16 else 1e-5
    (outputs, gradients), (fast_outputs, fast_gradients) = (
        step(one, batch, dtype) for one in (model, fast)
    )
    torch.testing.assert_close(fast_outputs, outputs, atol=error, rtol=0)
    assert torch.cosine_similarity(gradients, fast_gradients, dim=0) > 0.999
    assert fast_gradients.norm() / gradients.norm() == pytest.approx(1, abs=error)


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [("4bit", torch.bfloat16), ("8bit", torch.bfloat16), ("none", torch.float32)],
)
def test_outputs_and_gradients_are_those_of_peft(minilm, batch, quantization, dtype):
    model, fast = (lora_model(minilm, quantization) for _ in range(2))
    use_training_kernels(fast.encoder, dtype)
    assert_same(model, fast, batch, dtype)


KINDS = ("roberta", "electra", "distilbert", "modernbert", "deberta-v2", "longformer")


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_of_other_encoders(kind, tmp_path):
    """Compare encoders with windowed attention, or with custom attention layers."""
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model(**small_encoder(kind))).save_pretrained(tmp_path)
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[1, 11:] = mask[2, 4:] = 0
    given = {
        "input_ids": torch.randint(5, 60, (3, 20)),
        "attention_mask": mask,
        "labels": torch.tensor([0, 1, 2]),
    }
    model, fast = (lora_model(str(tmp_path), "none") for _ in range(2))
    use_training_kernels(fast.encoder, torch.bfloat16)
    assert_same(model, fast, given)


@pytest.mark.parametrize("hole", [False, True])
def test_padding_may_stand_on_the_left_or_in_between(minilm, batch, hole):
    mask = batch["attention_mask"].flip(1)
    if hole:
        mask[:, 12] = 0
    given = {**batch, "input_ids": batch["input_ids"].flip(1), "attention_mask": mask}
    model, fast = (lora_model(minilm) for _ in range(2))
    use_training_kernels(fast.encoder, torch.bfloat16)
    assert_same(model, fast, given)


def test_training_works_without_the_private_names_that_the_attention_uses(
    minilm, batch, monkeypatch, caplog
):
    model, plain = (lora_model(minilm, "none") for _ in range(2))
    monkeypatch.setitem(sys.modules, "cpu_hierarchical", None)  # importing it raises ImportError
    use_training_kernels(plain.encoder, torch.bfloat16)
    (warning,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "training without the faster CPU attention" in warning.getMessage()
    assert plain.encoder.config._attn_implementation == "sdpa"
    assert_same(model, plain, batch)


packs = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="torch has no bfloat16 products by oneDNN here",
)
CLOSE = {torch.bfloat16: {"atol": 0.06, "rtol": 0.02}, torch.float32: {"atol": 1e-5, "rtol": 1e-5}}


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=packs), torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_layers_give_the_outputs_and_gradients_of_plain_layers(kind, dtype):
    torch.manual_seed(0)
    plain = AutoModel.from_config(AutoConfig.for_model(**small_encoder(kind))).to(dtype)
    plain.eval().requires_grad_(False)
    packed = copy.deepcopy(plain)
    pack_linear_layers(packed)
    vectors = plain.get_input_embeddings()(torch.randint(5, 60, (3, 20))).requires_grad_()
    given = {"inputs_embeds": vectors, "attention_mask": torch.ones(3, 20).long()}
    outputs, expected = (encoder(**given).last_hidden_state for encoder in (packed, plain))
    gradients = [
        torch.autograd.grad(values[:, 0, :9].square().sum(), vectors)[0]
        for values in (outputs, expected)
    ]
    torch.testing.assert_close(*gradients, **CLOSE[dtype])
    with torch.inference_mode():
        for values in (outputs, packed(**given).last_hidden_state):
            torch.testing.assert_close(values, expected, **CLOSE[dtype])
    layers = [module for module in packed.modules() if isinstance(module, PackedLinear)]
    assert len(layers) == sum(type(module) is torch.nn.Linear for module in plain.modules())
    assert any("packed" in vars(module) for module in layers)
    packed.requires_grad_()(**given).last_hidden_state.square().sum().backward()
    assert layers[0].weight.grad is not None
