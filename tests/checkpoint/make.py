"""Make the checkpoints of this folder, which tests/shipped/test_compatibility.py loads: ``python
tests/checkpoint/make.py``.

A published checkpoint must stay loadable. So these are kept, and made again only for a release that
changes the stored format. They lack the code that is published with a checkpoint. The encoder is a
tiny BERT. Encoder and heads have random weights. ``expected.json`` holds the predictions of the two
forms of one model, and ``expected_several_labels.json`` those of a multi-label model.
"""

import copy
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
from configuration_hierarchical import Calibration, HierarchicalConfig
from modeling_hierarchical import HierarchicalForSequenceClassification
from pipeline_hierarchical import HierarchicalTextClassificationPipeline

TAXONOMY = [
    "general",
    {"specific": [{"neoplasms": ["carcinoma", "lymphoma"]}, "digestive", "nervous"]},
]
TEXTS = [
    "Colonoscopy of the bowel",
    "A headache, and then seizures",
    "An aspirin a day " * 12,  # beyond the 32 tokens that the encoder reads
]
WORDS = (
    "a an and aspirin bowel brain carcinoma colon colonoscopy day headache of seizures the then "
    "tumour , ."
)


def main() -> None:
    torch.manual_seed(0)
    for name in ("encoder", "adapter_form", "self_contained", "several_labels"):
        shutil.rmtree(FOLDER / name, ignore_errors=True)
    tokenizer = make_tokenizer()
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    BertModel(
        BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **shape)
    ).save_pretrained(FOLDER / "encoder")
    tokenizer.save_pretrained(FOLDER / "encoder")

    model = make_model("single_label_classification", len(tokenizer))
    inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["query", "dense"], init_lora_weights=False), model.encoder
    )
    save(model, tokenizer, "adapter_form", "expected.json")
    os.chdir(FOLDER)
    merged = HierarchicalForSequenceClassification.from_pretrained("adapter_form")
    save(merged, tokenizer, "self_contained", "expected.json")
    several = make_model("multi_label_classification", len(tokenizer))
    save(several, tokenizer, "several_labels", "expected_several_labels.json")


def make_model(problem_type: str, vocab_size: int) -> HierarchicalForSequenceClassification:
    """Make a model with random weights and a calibration that uses all its fields."""
    config = HierarchicalConfig(
        text_config=AutoConfig.from_pretrained(FOLDER / "encoder"),
        taxonomy=TAXONOMY,
        encoder_name_or_path=str(FOLDER / "encoder"),
        problem_type=problem_type,
    )
    model = HierarchicalForSequenceClassification(config, encoder=load_encoder(config))
    torch.nn.init.normal_(model.heads.weight)
    num_nodes = config.tree.num_nodes
    num_classes = config.num_labels
    calibration = Calibration(
        lexical_weight=0.4,
        scales=[0.8 + i / 10 for i in range(num_nodes)],
        biases=[i / 4 - 0.5 for i in range(num_nodes)],
        set_thresholds=[percent / 100 for percent in range(1, 100)],
        max_length=32,
    )
    if config.is_multi_label:
        calibration.thresholds = [0.2 + i / 20 for i in range(num_nodes)]
        calibration.set_thresholds = calibration.set_thresholds[::-1]
        calibration.num_texts = 120
    size = (num_classes, vocab_size)
    lexical = {
        "idf": torch.rand(size[1]),
        "weight": torch.randn(size),
        "bias": torch.randn(size[0]),
    }
    model.set_calibration(calibration, lexical)
    config.encoder_name_or_path = "encoder"  # the tests load it with this folder as the current one
    return model.eval()


def save(
    model: HierarchicalForSequenceClassification,
    tokenizer: BertTokenizerFast,
    form: str,
    expected: str,
) -> None:
    """Save a model without its code, and the results of the pipeline."""
    model.save_pretrained(FOLDER / form)
    tokenizer.save_pretrained(FOLDER / form)
    for name in SHIPPED_FILES:
        (FOLDER / form / name).unlink()
    reader = copy.deepcopy(tokenizer)  # truncation and padding change its stored state
    tree = model.config.tree
    share = {model.heads.decisions.guarantee: 0.85}
    with torch.inference_mode():
        output = model(**reader(TEXTS, truncation=True, padding=True, return_tensors="pt"))
    classify = HierarchicalTextClassificationPipeline(model=model, tokenizer=reader, device="cpu")
    results = classify(TEXTS, **share)
    stored = {
        "texts": TEXTS,
        "labels": tree.labels,
        "num_leaves": tree.num_leaves,
        "probabilities": [
            [round(value, 7) for value in row] for row in output.node_log_probs.exp().tolist()
        ],
        "predicted": [[node["label"] for node in result["labels"]] for result in results],
        "prediction_sets": [
            [node["label"] for node in result["prediction_set"]] for result in results
        ],
    }
    (FOLDER / expected).write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


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
