"""Compare predict.py --backend openvino with the same model in torch, and its encoders with
transformers'.
"""

import json
import sys

import pytest
import torch
from conftest import ROOT, predict_here, write_csv
from transformers import AutoConfig, AutoModel

from hierarchical_clinicalbert.errors import InputError

SMALL = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
}


def test_predictions_equal_those_of_torch_and_nearly_in_8_bits(
    openvino, long_checkpoint, texts, long_texts, tmp_path
):
    file = write_csv(
        tmp_path / "in.csv", [{"text": text} for text in [*texts, *long_texts.values()]]
    )
    scores = {}
    flags = {
        "torch": ("--dtype", "fp32"),
        "openvino": ("--dtype", "fp32", "--backend", "openvino"),
        "8 bits": ("--dtype", "int8"),
    }
    for name, words in flags.items():
        output = tmp_path / f"{name}.jsonl"
        words = (*words, "--probabilities")
        assert (
            predict_here("--model", long_checkpoint, "--input", file, "--output", output, *words)
            == 0
        )
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        scores[name] = [list(row["probabilities"].values()) for row in rows]
        assert [row["label"] for row in rows[-5:]] == list(long_texts)
    expected, exact, rounded = (torch.tensor(rows) for rows in scores.values())
    torch.testing.assert_close(exact, expected, atol=1e-4, rtol=0)
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, expected, atol=0.02, rtol=0)


def test_an_encoder_reads_batches_of_any_shape(openvino):
    from hierarchical_clinicalbert.prediction.openvino import OpenVinoEncoder, convert

    torch.manual_seed(0)
    settings = {
        **SMALL,
        "pad_token_id": 0,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "local_attention": 8,
    }
    encoder = AutoModel.from_config(AutoConfig.for_model("modernbert", **settings)).eval()
    converted = OpenVinoEncoder(convert(encoder, ["input_ids", "attention_mask"]), torch.float32)
    for rows, length in ((3, 20), (1, 5), (8, 33)):
        mask = (torch.arange(length) < torch.randint(3, length + 1, (rows, 1))).long()
        inputs = {"input_ids": torch.randint(5, 90, (rows, length)), "attention_mask": mask}
        with torch.no_grad():
            expected = encoder(**inputs).last_hidden_state[mask.bool()]
        found = converted(**inputs).last_hidden_state[mask.bool()]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_an_encoder_that_cannot_be_converted_is_named(openvino, capsys):
    from hierarchical_clinicalbert.prediction.openvino import convert

    settings = {**SMALL, "pad_token_id": 1, "attention_window": 8, "max_position_embeddings": 66}
    encoder = AutoModel.from_config(AutoConfig.for_model("longformer", **settings)).eval()
    for int8, advice in ((False, "--backend torch"), (True, "--dtype bf16 or fp32")):
        with pytest.raises(
            InputError, match=rf"^OpenVINO cannot run LongformerModel \(.+\): give {advice}$"
        ):
            convert(encoder, ["input_ids", "attention_mask"], int8)
    assert "def forward" not in capsys.readouterr().err  # the graph that torch prints


@pytest.mark.parametrize("flag", [("--backend", "openvino"), ("--dtype", "int8")])
def test_a_missing_package_is_named(flag, clear_checkpoint, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "openvino", None)
    words = ("--input", ROOT / "examples" / "unseen.csv", "--output", tmp_path / "out.jsonl", *flag)
    with pytest.raises(
        InputError, match=f"^{' '.join(flag)} needs OpenVINO: pip install openvino$"
    ):
        predict_here("--model", clear_checkpoint, *words)
