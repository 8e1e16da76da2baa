"""Measure rate, latency, memory and agreement of inference on a CPU, beside peers with the same
weights:

    pip install -r tests/requirements.txt -r tests/optional.txt nncf
    python benchmarks/inference.py --encoder ENCODER [--texts ohsumed/test.csv] [--model CHECKPOINT]

- Peers: the stock ``pipeline("text-classification")`` in float32, 32 texts a batch, and in
  bfloat16; ONNX Runtime in float32 and with dynamic int8 weights; torch.compile in bfloat16, or in
  float32 on processors without bfloat16 products; OpenVINO in float32, in bfloat16, in static int8
  by NNCF, calibrated on `CALIBRATION_TEXTS` texts, and in dynamic int8. ONNX Runtime uses the
  batches by length of this project's pipeline. torch.compile and OpenVINO run the encoder inside
  it.
- This project: ``pipeline("hierarchical-text-classification")`` in float32 and bfloat16. Its int8
  is OpenVINO's dynamic one.
- Processors without bfloat16 products leave out bfloat16.

A laptop without bfloat16 products is simulated by limiting the instruction set, for torch and
OpenVINO. ONNX Runtime has no such limit, so its rates are upper bounds:

    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2_VNNI python benchmarks/inference.py …

Peers alternate in every round. Each round has new texts, as in a long file: oneDNN compiles
products for every new number of tokens, which takes longer than the products themselves.

Tables are in benchmarks/results/inference.md.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pandas as pd
import torch
import transformers
from heads import add_lexical_head
from scipy.special import softmax
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    PreTrainedTokenizerBase,
    pipeline,
)
from transformers.modeling_outputs import BaseModelOutput

from checkpoint_hierarchical import load_encoder
from configuration_hierarchical import HierarchicalConfig
from hierarchical_clinicalbert.checkpoint_files import ONNX_FILE, QUANTIZED_ONNX_FILE
from hierarchical_clinicalbert.machine import has_bf16, keep_memory
from hierarchical_clinicalbert.prediction.model import KEPT_MEMORY
from hierarchical_clinicalbert.publishing.export import export_onnx
from modeling_hierarchical import HierarchicalForSequenceClassification
from pipeline_hierarchical import TOKENS_ON_CPU, batches_by_length, padded_length
from taxonomy_hierarchical import Taxonomy

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CALIBRATION_TEXTS = 300  # NNCF's default
LIMITED_ISA = {
    name: os.environ[name]
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
    if name in os.environ
}
# also the type of the operations around int8 products
FASTEST_FLOAT = "bf16" if has_bf16(cpu=True) and not LIMITED_ISA else "fp32"
DTYPES = [dtype for dtype in TYPES if dtype != "bf16" or FASTEST_FLOAT == "bf16"]
OPENVINO_DTYPES = [*DTYPES, "static int8", "dynamic int8"]
TAXONOMY = {f"group {i}": [f"class {i}.{j}" for j in range(5)] for i in range(5)}
Peer = tuple[Callable, Callable[[list[str]], np.ndarray]]


def main() -> None:
    parser = harness.flag_parser(__doc__, "inference.json")
    parser.add_argument("--encoder", required=True)
    corpus = harness.ROOT / "examples" / "corpus" / "test.csv"
    parser.add_argument(
        "--texts", type=Path, default=corpus, help="CSV with columns text and label"
    )
    parser.add_argument(
        "--model", help="a trained checkpoint; by default random heads over the encoder"
    )
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    arguments = parser.parse_args()
    keep_memory(*KEPT_MEMORY)  # for all peers, as in predict.py
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    texts = read_column(arguments.texts, "text")
    results = harness.read_results(arguments.output, {})
    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model or make_checkpoint(arguments.encoder, Path(scratch) / "model")
        for part in arguments.parts:
            results[part] = PARTS[part](model, texts, arguments, Path(scratch))
            results["machine"] = {
                "cpu": harness.processor(),
                "cores": os.cpu_count(),
                **LIMITED_ISA,
            }
            harness.write_results(arguments.output, results)
            print(f"\n{part}")
            columns = results[part][0]
            harness.print_table(
                columns, ([row.get(name, "") for name in columns] for row in results[part])
            )


def read_column(file: Path, name: str) -> list[str]:
    """Read a column of a CSV file."""
    return pd.read_csv(file, dtype=str, keep_default_na=False)[name].tolist()


def make_checkpoint(encoder: str, folder: Path, config: BertConfig | None = None) -> str:
    """Write a self-contained checkpoint with random heads, and with a random encoder if its
    configuration is given.
    """
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    tokenizer.model_max_length = 512
    text_config = config or AutoConfig.from_pretrained(encoder)
    whole = HierarchicalConfig(
        text_config=text_config, taxonomy=Taxonomy(TAXONOMY), encoder_name_or_path=encoder
    )
    model = HierarchicalForSequenceClassification(
        whole, encoder=None if config else load_encoder(whole)
    )
    torch.nn.init.normal_(model.heads.weight, std=0.3)
    add_lexical_head(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def ours(model: str, dtype: str, **kwargs):
    """Return this project's pipeline."""
    return harness.load_classifier(model, dtype=TYPES[dtype], device="cpu", **kwargs)


def stock(model: str, dtype: str):
    """Return the standard text-classification pipeline of transformers."""
    return pipeline(
        "text-classification",
        model=model,
        trust_remote_code=True,
        dtype=TYPES[dtype],
        device="cpu",
        batch_size=32,
    )


def runtime(model: str, file: Path) -> Callable[[list[str]], np.ndarray]:
    """Return an ONNX file in ONNX Runtime as a function from texts to leaf probabilities, over this
    project's batches.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)

    def classify(texts: list[str]) -> torch.Tensor:
        encoded = tokenizer(texts, truncation=True, verbose=False)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        outputs = []
        batches = batches_by_length(lengths, None, TOKENS_ON_CPU)
        for batch in batches:
            length = padded_length(lengths[batch[0]], len(batch), tokenizer.model_max_length)
            rows = {name: [values[i] for i in batch] for name, values in encoded.items()}
            inputs = tokenizer.pad(
                rows, padding="max_length", max_length=length, return_tensors="np"
            )
            outputs.append(softmax(session.run(["logits"], dict(inputs))[0], axis=-1))
        return np.concatenate(outputs)[np.argsort([i for batch in batches for i in batch])]

    return classify


def openvino_encoder(
    encoder: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    texts: list[str],
    hint: str = "THROUGHPUT",
) -> nn.Module:
    """Return an encoder in OpenVINO: "fp32", "bf16", "dynamic int8", or "static int8", which NNCF
    calibrates on the texts.
    """
    from hierarchical_clinicalbert.prediction.openvino import OpenVinoEncoder, convert

    names = tokenizer.model_input_names
    converted = convert(encoder, names, int8=dtype == "dynamic int8")
    if dtype == "static int8":
        import nncf

        tokenize = partial(tokenizer, truncation=True, return_tensors="np")
        dataset = nncf.Dataset(texts, lambda text: {name: tokenize(text)[name] for name in names})
        converted = nncf.quantize(
            converted, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(texts)
        )
    return OpenVinoEncoder(
        converted, TYPES[FASTEST_FLOAT if dtype.endswith("int8") else dtype], hint
    )


def openvino(model: str, dtype: str, texts: list[str], hint: str = "THROUGHPUT"):
    """Return this project's pipeline with its encoder in OpenVINO."""
    classify = ours(model, "fp32")
    encoder = classify.model.encoder
    tokenizer = classify.tokenizer
    classify.model.encoder = openvino_encoder(
        encoder, tokenizer, dtype, texts[-CALIBRATION_TEXTS:], hint
    )
    return classify


class CompiledEncoder(nn.Module):
    """Run an encoder compiled by torch.compile with its fastest settings: constant weights, tuned
    products, one dynamic graph.
    """

    def __init__(self, encoder: nn.Module):
        import torch._inductor.config as settings

        super().__init__()
        settings.freezing = settings.max_autotune = settings.cpp.enable_concat_linear = True
        self.run = torch.compile(encoder, dynamic=True)

    def forward(self, **inputs: torch.Tensor) -> BaseModelOutput:
        with torch.no_grad():  # in inference mode, torch does not treat the weights as constants
            return self.run(**inputs)


def compiled(model: str):
    """Return this project's pipeline with a compiled encoder.

    Each core computes its own batches.
    """
    classify = ours(model, FASTEST_FLOAT)
    plain = AutoModel.from_pretrained(model, trust_remote_code=True, dtype=TYPES[FASTEST_FLOAT])
    classify.model.encoder = CompiledEncoder(plain.encoder.eval())
    return classify


def peers(model: str, scratch: Path, texts: list[str]) -> dict[str, Peer]:
    """Return for each peer the function to time, and one that returns leaf probabilities,
    (num_texts, num_leaves).
    """
    tree = ours(model, "fp32").tree
    leaves = tree.labels[: tree.num_leaves]
    export_onnx(Path(model), scratch)
    result: dict[str, Peer] = {}
    for dtype in DTYPES:
        classify = partial(stock(model, dtype), truncation=True)

        def of_stock(texts: list[str], classify: Callable = classify) -> np.ndarray:
            scores = (
                {one["label"]: one["score"] for one in of_text}
                for of_text in classify(texts, top_k=None)
            )
            return np.array([[of_text[leaf] for leaf in leaves] for of_text in scores])

        result[f"stock pipeline, {dtype}"] = classify, of_stock
    for name, file in (
        ("ONNX Runtime, fp32", ONNX_FILE),
        ("ONNX Runtime, int8", QUANTIZED_ONNX_FILE),
    ):
        call = runtime(model, scratch / file)
        result[name] = call, call
    pipelines = {f"OpenVINO, {dtype}": openvino(model, dtype, texts) for dtype in OPENVINO_DTYPES}
    pipelines[f"torch.compile, {FASTEST_FLOAT}"] = compiled(model)
    pipelines |= {f"this project, {dtype}": ours(model, dtype) for dtype in DTYPES}
    for name, classify in pipelines.items():

        def of_ours(texts: list[str], classify: Any = classify) -> np.ndarray:
            return harness.node_probabilities(classify, texts)[:, : len(leaves)]

        result[name] = classify, of_ours
    return result


def throughput(
    model: str, texts: list[str], arguments: argparse.Namespace, scratch: Path
) -> list[dict]:
    return compare(model, texts, arguments.rows, arguments.rounds, scratch / "small")


def base_size(
    model: str, texts: list[str], arguments: argparse.Namespace, scratch: Path
) -> list[dict]:
    """Repeat the comparison at the size of BERT base, with random weights."""
    config = BertConfig(vocab_size=AutoConfig.from_pretrained(arguments.encoder).vocab_size)
    large = make_checkpoint(arguments.encoder, scratch / "base", config)
    return compare(large, texts, arguments.rows // 4, min(arguments.rounds, 3), scratch / "large")


def compare(model: str, texts: list[str], count: int, rounds: int, scratch: Path) -> list[dict]:
    """Measure the rates of all peers.

    Each round has new texts, so that compiling for new lengths is included.
    """
    all_peers = peers(model, scratch, texts)
    warm_up, *timed = (
        [texts[(turn * count + i) % len(texts)] for i in range(count)] for turn in range(rounds + 1)
    )
    seconds: dict[str, list[float]] = {name: [] for name in all_peers}
    for call, _ in all_peers.values():
        call(warm_up)  # compile, and fill caches
    for part in timed:
        for name, (call, _) in all_peers.items():
            started = time.perf_counter()
            call(part)
            seconds[name].append(time.perf_counter() - started)
    reference = None
    rows = []
    for name, (_, predict) in all_peers.items():
        probabilities = predict(warm_up)
        reference = probabilities if reference is None else reference
        speeds = [count / s for s in seconds[name]]
        first, onnx = (
            statistics.median(a / b for a, b in zip(seconds[other], seconds[name], strict=True))
            for other in ("stock pipeline, fp32", "ONNX Runtime, int8")
        )
        rows.append(
            {
                "pipeline": name,
                "rows/s": round(statistics.median(speeds), 1),
                "lowest": round(min(speeds), 1),
                "highest": round(max(speeds), 1),
                "speed-up over the stock pipeline": round(first, 2),
                "speed-up over ONNX Runtime, int8": round(onnx, 2),
                "same label": round(
                    float((probabilities.argmax(1) == reference.argmax(1)).mean()), 3
                ),
                "largest gap of a probability": round(
                    float(np.abs(probabilities - reference).max()), 4
                ),
            }
        )
    return rows


def latency(
    model: str, texts: list[str], arguments: argparse.Namespace, scratch: Path
) -> list[dict]:
    """Measure the latency of single texts, with alternating peers."""
    export_onnx(Path(model), scratch)
    all_peers = {
        "stock pipeline, fp32": partial(stock(model, "fp32"), truncation=True),
        "ONNX Runtime, int8": runtime(model, scratch / QUANTIZED_ONNX_FILE),
        **{
            f"OpenVINO, {dtype}": openvino(model, dtype, texts, "LATENCY")
            for dtype in OPENVINO_DTYPES
        },
        **{f"this project, {dtype}": ours(model, dtype) for dtype in DTYPES},
    }
    seconds: dict[str, list[float]] = {name: [] for name in all_peers}
    for text in texts[:60]:
        for name, call in all_peers.items():
            input_ = [text] if name.startswith("ONNX") else text
            # the threads of ONNX Runtime spin for some time, and would slow down the next peer
            time.sleep(0.1)
            started = time.perf_counter()
            call(input_)
            seconds[name].append(time.perf_counter() - started)
    return [
        {
            "pipeline": name,
            "p50 ms": round(1000 * statistics.median(times[5:]), 1),
            "p95 ms": round(1000 * statistics.quantiles(times[5:], n=20)[-1], 1),
        }
        for name, times in seconds.items()
    ]


def accuracy(
    model: str, texts: list[str], arguments: argparse.Namespace, scratch: Path
) -> list[dict]:
    """Measure the accuracy of a trained checkpoint on the labels of the file: all dtypes of this
    project, and int8 of the peers.
    """
    if arguments.model is None:
        return [{"accuracy": "needs --model"}]
    labels = read_column(arguments.texts, "label")
    classes = arguments.texts.parent / "labels.csv"
    names = {label: label for label in labels}
    if classes.exists():
        names = dict(zip(read_column(classes, "label"), read_column(classes, "name"), strict=True))
    tree = ours(model, "fp32").tree
    classes_of_leaves = [label.rpartition("/")[2] for label in tree.labels[: tree.num_leaves]]
    rows = []
    for name, (_, probabilities) in peers(model, scratch, texts).items():
        if name.endswith("int8") or name.startswith("this project"):
            leaves = probabilities(texts).argmax(1).tolist()
            correct = sum(
                classes_of_leaves[leaf] == names[label]
                for leaf, label in zip(leaves, labels, strict=True)
            )
            rows.append({"pipeline": name, "accuracy, %": round(100 * correct / len(labels), 2)})
    return rows


PARTS = {part.__name__: part for part in (throughput, base_size, latency, accuracy)}

if __name__ == "__main__":
    main()
