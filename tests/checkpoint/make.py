"""Make the checkpoints of this folder, which tests/shipped/test_compatibility.py loads: ``python tests/checkpoint/make.py``.

A published checkpoint must stay loadable. So these are kept, and made again only for a release that changes the stored format.
They lack the code that is published with a checkpoint. The encoder is a tiny BERT. Encoder and heads have random weights.
``expected.json`` holds their predictions.
"""

import json
import os
import shutil
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent.parent))

import torch
from peft import LoraConfig, inject_adapter_in_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, BertConfig, BertModel, BertTokenizerFast

from checkpoint_hierarchical import SHIPPED_FILES, load_encoder
from configuration_hierarchical import HierarchicalConfig
from modeling_hierarchical import HierarchicalForSequenceClassification

TAXONOMY = ["general", {"specific": [{"neoplasms": ["carcinoma", "lymphoma"]}, "digestive", "nervous"]}]
TEXTS = [
    "Colonoscopy of the bowel",
    "A headache, and then seizures",
    "An aspirin a day " * 12,  # beyond the 32 tokens that the encoder reads
]
WORDS = "a an and aspirin bowel brain carcinoma colon colonoscopy day headache of seizures the then tumour , ."


def main() -> None:
    torch.manual_seed(0)
    for name in ("encoder", "adapter_form", "self_contained"):
        shutil.rmtree(FOLDER / name, ignore_errors=True)
    tokenizer = make_tokenizer()
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **shape)).save_pretrained(
        FOLDER / "encoder"
    )
    tokenizer.save_pretrained(FOLDER / "encoder")

    config = HierarchicalConfig(
        text_config=AutoConfig.from_pretrained(FOLDER / "encoder"),
        taxonomy=TAXONOMY,
        encoder_name_or_path=str(FOLDER / "encoder"),
    )
    model = HierarchicalForSequenceClassification(config, encoder=load_encoder(config))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["query", "dense"], init_lora_weights=False), model.encoder)
    torch.nn.init.normal_(model.heads.weight)
    size = (len(tokenizer), config.tree.num_leaves)
    model.set_lexical_head(
        {"idf": torch.rand(size[0]), "weight": torch.randn(size[::-1]), "bias": torch.randn(size[1])}, 0.4
    )
    model.set_calibration(
        temperatures=[0.8, 1.5, 1.2], conformal_thresholds=[percent / 100 for percent in range(1, 100)]
    )
    model.eval()
    config.encoder_name_or_path = "encoder"  # the tests load it with this folder as the current one
    model.save_pretrained(FOLDER / "adapter_form")
    os.chdir(FOLDER)
    HierarchicalForSequenceClassification.from_pretrained("adapter_form").save_pretrained("self_contained")
    for form in ("adapter_form", "self_contained"):
        tokenizer.save_pretrained(FOLDER / form)
        for name in SHIPPED_FILES:
            (FOLDER / form / name).unlink()

    with torch.inference_mode():
        output = model(**tokenizer(TEXTS, truncation=True, padding=True, return_tensors="pt"))
    expected = {
        "texts": TEXTS,
        "labels": config.tree.labels,
        "num_leaves": config.tree.num_leaves,
        "probabilities": [[round(value, 7) for value in row] for row in output.node_log_probs.exp().tolist()],
    }
    (FOLDER / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


def make_tokenizer() -> BertTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS.split()])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=32)


if __name__ == "__main__":
    main()
