"""Checkpoints of every form, dtype, form of label and pooling, with a lexical head, p-values or
windows: loaded, saved, loaded again.

The product of these factors has hundreds of cases. `allpairspy` chooses some of them, so that every
pair of values of two factors occurs in at least one case.
"""

import copy
import json
import os
import random
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from allpairspy import AllPairs
from conftest import ROOT, complete
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoTokenizer, BertConfig, BertModel, BitsAndBytesConfig

from checkpoint_hierarchical import load_encoder, special_tokens
from configuration_hierarchical import Calibration, HierarchicalConfig
from hierarchical_clinicalbert.evaluation.open_world import fit_open_world
from modeling_hierarchical import HierarchicalForSequenceClassification
from pipeline_hierarchical import HierarchicalTextClassificationPipeline

TAXONOMY = [
    "general",
    {"specific": [{"neoplasms": ["carcinoma", "lymphoma"]}, "digestive", "nervous"]},
]
LEAVES = ("general", "carcinoma", "lymphoma", "digestive", "nervous")
WORDS = (
    "a",
    "aspirin",
    "bowel",
    "brain",
    "carcinoma",
    "colon",
    "day",
    "headache",
    "seizures",
    "tumour",
)  # of the tokenizer
WINDOW = 16  # tokens
MAX_LENGTH = 64
FACTORS = {
    "form": ("adapter", "merged", "full", "8 bits", "4 bits"),
    "dtype": ("float32", "bfloat16", "float16", "cast after loading"),
    "problem_type": ("single_label_classification", "multi_label_classification"),
    "pooling": ("mean", "cls", "label_attention", "family_attention"),
    "part": ("lexical head", "p-values", "windows"),
}
# The largest difference of a probability, by what rounds most. Numbers of bfloat16 have 8 bits, of
# float16 11, and rounded weights and activations add up over the layers. bitsandbytes computes in
# float16 or bfloat16 over weights in 4 and 8 bits.
TOLERANCES = {
    "4 bits": 0.02,
    "8 bits": 0.02,
    "bfloat16": 0.03,
    "cast after loading": 0.03,
    "float16": 0.004,
}


class Case(NamedTuple):
    form: str
    dtype: str
    problem_type: str
    pooling: str
    part: str

    @property
    def tolerance(self) -> float:
        return max(TOLERANCES.get(value, 1e-5) for value in (self.form, self.dtype))


CASES = [Case(*values) for values in AllPairs([*FACTORS.values()])]


def test_every_pair_of_values_occurs():
    occurring = {pair for case in CASES for pair in combinations(enumerate(case), 2)}
    for (i, first), (j, second) in combinations(enumerate(FACTORS.values()), 2):
        assert {((i, one), (j, other)) for one, other in product(first, second)} <= occurring


# ── Checkpoints, and what their models predict in float32 ─────────────────────────────────────────


def draw_texts(generator: random.Random, count: int, length: int) -> list[str]:
    return [" ".join(generator.choices(WORDS, k=length)) for _ in range(count)]


def build_model(
    case: Case, folder: Path, tokenizer: Any, seed: int
) -> HierarchicalForSequenceClassification:
    """Build a model with random weights. In the adapter form, its encoder is in the folder."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
    }
    positions = WINDOW if case.part == "windows" else MAX_LENGTH
    text_config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=positions, **sizes)
    encoder = BertModel(text_config, add_pooling_layer=False)
    torch.nn.init.normal_(encoder.embeddings.word_embeddings.weight)  # so that texts differ
    encoder.save_pretrained(folder)
    before, after = special_tokens(tokenizer)
    config = HierarchicalConfig(
        text_config=text_config,
        taxonomy=TAXONOMY,
        encoder_name_or_path=str(folder),
        problem_type=case.problem_type,
        pooling=case.pooling,
        tokens_before=before,
        tokens_after=after,
    )
    model = HierarchicalForSequenceClassification(config, encoder=load_encoder(config))
    torch.nn.init.normal_(model.heads.weight, std=0.3)
    if case.form in ("adapter", "merged"):
        adapter = LoraConfig(r=2, target_modules=["query", "dense"], init_lora_weights=False)
        inject_adapter_in_model(adapter, model.encoder)
    num_nodes = model.config.tree.num_nodes
    num_classes = model.config.num_labels
    calibration = Calibration(
        scales=[0.8 + i / 10 for i in range(num_nodes)],
        biases=[i / 4 - 0.5 for i in range(num_nodes)],
        max_length=tokenizer.model_max_length,
    )
    lexical = None
    open_world = None
    if case.part == "lexical head":
        calibration.lexical_weight = 0.4
        weight = torch.randn(num_classes, len(tokenizer)) * (
            torch.rand(num_classes, len(tokenizer)) < 0.5
        )
        lexical = {
            "idf": torch.rand(len(tokenizer)),
            "weight": weight,
            "bias": torch.randn(num_classes),
        }
    if case.part == "p-values":
        texts = draw_texts(random.Random(seed), 90, length=12)
        with torch.inference_mode():
            inputs = tokenizer(texts, padding=True, return_tensors="pt")
            vectors = model.eval()(**inputs, output_vectors=True).vectors.numpy()
        nodes = [[i % num_nodes] for i in range(len(texts))]
        open_world = fit_open_world(model.config.tree, vectors[:60, :-1], nodes[:60], vectors[60:])
    model.set_calibration(calibration, lexical, open_world)
    model.record_self_test(tokenizer)
    model.config.self_test["transformers"] = "0.0"  # so that pipelines compute it
    return model.eval()


def save_form(case: Case, model: Any, folder: Path) -> Any:
    """Save a model in the form of a case, and return one of which predictions are expected:
    quantized, in those forms.
    """
    model.save_pretrained(folder)
    load = HierarchicalForSequenceClassification.from_pretrained
    if case.form == "merged":
        load(folder).save_pretrained(folder)
    if case.form.endswith("bits"):
        bits = BitsAndBytesConfig(
            load_in_4bit=case.form == "4 bits", load_in_8bit=case.form == "8 bits"
        )
        model = load(folder, quantization_config=bits)
        load(folder, quantization_config=bits).save_pretrained(folder)
    return model


def is_clear(case: Case, result: dict[str, Any]) -> bool:
    """Return whether no rounding within the tolerance changes the labels of a result."""
    probabilities = {label: score for level in result["levels"] for label, score in level.items()}
    if case.problem_type == "multi_label_classification":
        margins = [abs(score - 0.5) for score in probabilities.values()]
    else:
        first, second, *_ = sorted((probabilities[leaf] for leaf in LEAVES), reverse=True)
        margins = [first - second]
    return min(margins) > 2 * case.tolerance


# ── What a user's processes find ──────────────────────────────────────────────────────────────────

# without access to the repository: by AutoModel and both pipelines, then saved and loaded again
LOAD = """
import json, pathlib, sys, traceback
import torch
from transformers import AutoModel, AutoTokenizer, pipeline

def load(folder, dtype):
    return AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=dtype)

def classify(folder, dtype, texts):
    model = load(folder, dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        output = model(**tokenizer(texts, padding=True, return_tensors="pt"))
    options = {"model": folder, "trust_remote_code": True, "dtype": dtype}
    return {
        "model": output.node_log_probs.float().exp().tolist(),
        "own": pipeline("hierarchical-text-classification", **options)(texts, levels=True),
        "stock": pipeline("text-classification", **options)(texts, top_k=None),
    }

found = []
for case in json.loads(pathlib.Path("cases.json").read_text()):
    folder, again, texts = case["folder"], case["folder"] + "-again", case["texts"]
    dtype = getattr(torch, case["dtype"], "auto")
    try:
        first = classify(folder, dtype, texts)
        # once more: bitsandbytes repacks weights in their first forward
        model = load(folder, dtype)
        if case["dtype"] == "cast after loading":
            quantized = case["form"].endswith("bits")  # transformers refuses half() for these
            several_labels = case["problem_type"].startswith("multi")
            model = model.half() if several_labels and not quantized else model.bfloat16()
        model.save_pretrained(again)
        AutoTokenizer.from_pretrained(folder).save_pretrained(again)
        found.append([first, classify(again, dtype, texts)])
    except Exception:  # of one case, which its test shows
        found.append(traceback.format_exc())
pathlib.Path(sys.argv[1]).write_text(json.dumps(found))
"""

PREDICT = """
import json, pathlib, sys, traceback
sys.path.insert(0, sys.argv[2])
import predict

def classify(case, folder):
    dtype = "bf16" if case["dtype"] in ("bfloat16", "cast after loading") else "fp32"
    output = pathlib.Path(f"{folder}.jsonl")
    words = ["--model", folder, "--input", f"{case['folder']}.txt", "--output", str(output)]
    words += ["--dtype", dtype, "--input_format", "txt", "--probabilities"]
    assert predict.main(words) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]

found = []
for case in json.loads(pathlib.Path("cases.json").read_text()):
    try:
        folders = (case["folder"], case["folder"] + "-again")
        found.append([classify(case, folder) for folder in folders])
    except Exception:
        found.append(traceback.format_exc())
pathlib.Path(sys.argv[1]).write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[Case, dict[str, Any]]:
    """Return for each case what its model predicts before it is saved, and what two fresh processes
    predict.
    """
    folder = tmp_path_factory.mktemp("combinations")
    given = []
    results: dict[Case, dict[str, Any]] = {}
    for number, case in enumerate(CASES):
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests" / "checkpoint" / "encoder")
        tokenizer.model_max_length = MAX_LENGTH
        texts = draw_texts(random.Random(number), 3, length=50 if case.part == "windows" else 12)
        for seed in range(100):
            model = build_model(case, folder / f"encoder-{number}", tokenizer, seed)
            model = save_form(case, model, folder / str(number))
            classify = HierarchicalTextClassificationPipeline(
                model, copy.deepcopy(tokenizer), device="cpu"
            )
            expected = classify(texts, levels=True)
            if all(is_clear(case, result) for result in expected):
                break
        else:
            raise AssertionError(f"no model of {case} predicts all texts clearly")
        tokenizer.save_pretrained(folder / str(number))
        (folder / f"{number}.txt").write_text("\n".join(texts))
        given.append({"folder": str(number), "texts": texts, **case._asdict()})
        results[case] = {"expected": expected, "labels": model.config.tree.labels}
    (folder / "cases.json").write_text(json.dumps(given))

    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules")}
    for name, words in (("loaded", [LOAD]), ("predicted", [PREDICT, ROOT])):
        file = folder / f"{name}.json"
        done = complete(
            "-c", words[0], file, *words[1:], cwd=folder, environment=environment, modules=None
        )
        assert done.returncode == 0, done.stderr[-4000:]
        for case, found in zip(CASES, json.loads(file.read_text()), strict=True):
            results[case][name] = found
    return results


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_a_checkpoint_predicts_as_its_model_also_when_it_is_saved_again(case, results):
    of_case = results[case]
    for found in (of_case["loaded"], of_case["predicted"]):
        assert not isinstance(found, str), found

    def close_to(values: Any) -> Any:
        return pytest.approx(values, abs=case.tolerance)

    for loaded, predicted in zip(of_case["loaded"], of_case["predicted"], strict=True):
        for text, expected in enumerate(of_case["expected"]):
            probabilities = {
                label: score for level in expected["levels"] for label, score in level.items()
            }
            labels = [one["label"] for one in expected["labels"]]
            by_model = dict(zip(of_case["labels"], loaded["model"][text], strict=True))
            assert by_model == close_to(probabilities)
            own = loaded["own"][text]
            assert [one["label"] for one in own["labels"]] == labels
            assert {
                label: score for level in own["levels"] for label, score in level.items()
            } == close_to(probabilities)
            stock = {one["label"]: one["score"] for one in loaded["stock"][text]}
            assert stock == close_to({label: probabilities[label] for label in stock})
            assert predicted[text]["labels"] == labels
            written = predicted[text]["probabilities"]  # of the leaves, or of all nodes
            assert written == close_to({label: probabilities[label] for label in written})
            if case.part == "p-values":  # a text may pass one of 30 references
                p_values = [own["p_value"], predicted[text]["p_value"]]
                assert p_values == pytest.approx(
                    [expected["p_value"]] * 2, abs=case.tolerance + 0.1
                )
