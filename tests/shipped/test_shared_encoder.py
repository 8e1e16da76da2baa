"""Test that models in one process share their encoder's weights, and that each predicts as it does
alone.
"""

import re
from functools import partial

import pytest
import torch
from conftest import untrained_model
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoTokenizer

from modeling_hierarchical import HierarchicalForSequenceClassification
from pipeline_hierarchical import HierarchicalTextClassificationPipeline


def write_adapter(encoder: str, folder, taxonomy: dict, seed: int, **lora) -> str:
    """Write a checkpoint in adapter form whose adapter changes predictions."""
    torch.manual_seed(seed)
    model = untrained_model(encoder, taxonomy)
    inject_adapter_in_model(LoraConfig(**lora), model.encoder)
    for name, parameter in model.encoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoints(tiny_encoder, tmp_path_factory) -> list[str]:
    """Return two checkpoints with different adapted layers, ranks and taxonomies."""
    folder = tmp_path_factory.mktemp("shared")
    return [
        write_adapter(
            tiny_encoder, folder / "a", {"a": ["b", "c"]}, 1, r=4, target_modules=["query", "value"]
        ),
        write_adapter(
            tiny_encoder,
            folder / "b",
            {"d": None, "e": ["f", "g"]},
            2,
            r=8,
            target_modules=["query", "dense"],
        ),
    ]


def load(checkpoint: str, **arguments) -> HierarchicalForSequenceClassification:
    return HierarchicalForSequenceClassification.from_pretrained(
        checkpoint, **{"merge_adapter": False, **arguments}
    )


def test_models_over_one_encoder_predict_as_alone_and_hold_its_weights_once(
    checkpoints, tiny_encoder
):
    texts = ["Hepatitis in 41 patients.", "Angina."]
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    tokenizer.model_max_length = 128
    build = partial(HierarchicalTextClassificationPipeline, tokenizer=tokenizer, device="cpu")
    alone = [build(model=load(checkpoint))(texts) for checkpoint in checkpoints]
    first, second = (load(checkpoint) for checkpoint in checkpoints)
    second.share_encoder(first)
    pipelines = [build(model=first), build(model=second)]
    assert [classify(texts) for classify in pipelines * 2] == alone * 2
    kept, shared = (
        {
            weight.data_ptr()
            for name, weight in model.encoder.named_parameters()
            if "lora_" not in name
        }
        for model in (first, second)
    )
    assert kept == shared


def test_encoders_that_differ_are_not_shared(checkpoints):
    first, other = (load(checkpoint) for checkpoint in checkpoints)
    merged = load(checkpoints[0], merge_adapter=True)
    with pytest.raises(ValueError, match="load both with merge_adapter=False"):
        merged.share_encoder(other)
    with pytest.raises(ValueError, match="load both with merge_adapter=False"):
        other.share_encoder(merged)
    with pytest.raises(ValueError, match="differ in dtype or device, or are quantized"):
        load(checkpoints[0], dtype=torch.bfloat16).share_encoder(other)
    other.config.encoder_revision = "0" * 40
    with pytest.raises(
        ValueError,
        match=re.escape(f"are different: {first.config.encoder_name_or_path} at None and"),
    ):
        first.share_encoder(other)
