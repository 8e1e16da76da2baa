"""Check the scripts that classify texts and halve an encoder."""

import torch
from conftest import run, untrained_model
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertModel, pipeline


def test_the_script_prints_a_path_for_each_predicted_label(labels_checkpoint, tmp_path):
    (tmp_path / "texts.csv").write_text("text\nColitis with epilepsy\n", encoding="utf-8-sig")  # as Excel saves it
    printed = run(labels_checkpoint, tmp_path / "texts.csv", command="examples/classify.py").stdout.split("\n")
    classify = pipeline("hierarchical-text-classification", model=labels_checkpoint, trust_remote_code=True)
    paths = [one["path"] for one in classify("Colitis with epilepsy")["labels"]]
    assert len(paths) == 2
    expected = ["→ " + " → ".join(f"{node['label']} ({node['score']:.0%})" for node in path) for path in paths]
    assert printed == ["", "  Colitis with epilepsy", *expected, ""]


def test_half_of_an_encoder_has_every_second_layer_and_the_last(tiny_encoder, tmp_path):
    BertModel(AutoConfig.from_pretrained(tiny_encoder, num_hidden_layers=4)).save_pretrained(tmp_path / "four")
    model, tokenizer = untrained_model(str(tmp_path / "four"), ["a", "b"]), AutoTokenizer.from_pretrained(tiny_encoder)
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "checkpoint")
    run(tmp_path / "checkpoint", tmp_path / "half", command="examples/half_encoder.py")
    inputs = tokenizer("Colitis with epilepsy", return_tensors="pt")
    with torch.inference_mode():
        expected = model.encoder.embeddings(inputs["input_ids"])
        for layer in (1, 3):
            expected = model.encoder.encoder.layer[layer](expected)
        found = AutoModel.from_pretrained(tmp_path / "half").eval()(**inputs).last_hidden_state
    torch.testing.assert_close(found, expected)
