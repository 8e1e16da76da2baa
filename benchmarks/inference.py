"""Measure rate, latency, memory and agreement of inference on a CPU, beside peers with the same weights:

    pip install -r tests/requirements.txt -r tests/optional.txt nncf
    python benchmarks/inference.py --encoder ENCODER [--texts ohsumed/test.csv] [--model CHECKPOINT]

- Peers: the stock ``pipeline("text-classification")`` in float32, 32 texts a batch, and in bfloat16; ONNX Runtime in float32
  and with dynamic int8 weights, each also with attention fused by its optimizer; torch.compile in bfloat16, or in float32 on
  processors without bfloat16 products; OpenVINO in float32, in bfloat16, in static int8 by NNCF, calibrated on
  `CALIBRATION_TEXTS` texts, and in dynamic int8, where each token is rounded in groups of `GROUP` numbers. ONNX Runtime uses
  the batches by length of this project's pipeline. torch.compile and OpenVINO run the encoder inside it.
- This project: ``pipeline("hierarchical-text-classification")`` in float32, bfloat16 and int8.
- Processors without bfloat16 products leave out bfloat16, and encoders other than BERT the fused attention of ONNX Runtime.

A laptop without bfloat16 products is simulated by limiting the instruction set, for torch and OpenVINO. ONNX Runtime has no such
limit, so its rates are upper bounds:

    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2_VNNI python benchmarks/inference.py …

Peers alternate in every round. "Share of the peak" divides useful FLOPs per second, without padding, by the highest rate at which
this machine multiplies 4,096 × 4,096 matrices of the type, measured in the same round.

Each round has new texts, as in a long file: oneDNN compiles products for every new number of tokens, which takes longer than
the products themselves.

Tables are in benchmarks/results/inference.md.
"""

import argparse
import csv
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import harness
import pandas as pd
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, PreTrainedTokenizerBase, pipeline
from transformers.modeling_outputs import BaseModelOutput

from checkpoint_hierarchical import load_encoder
from configuration_hierarchical import Calibration, HierarchicalConfig
from hierarchical_clinicalbert.checkpoint_files import ONNX_FILE, QUANTIZED_ONNX_FILE
from hierarchical_clinicalbert.machine import has_bf16, keep_memory
from hierarchical_clinicalbert.prediction.int8 import quantize
from hierarchical_clinicalbert.prediction.model import KEPT_MEMORY
from hierarchical_clinicalbert.publishing.export import Logits, export_onnx, load_merged, quiet_logs
from modeling_hierarchical import HierarchicalForSequenceClassification
from pipeline_hierarchical import TOKENS_ON_CPU, batches_by_length, padded_length
from taxonomy_hierarchical import Taxonomy

PEAK_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
CALIBRATION_TEXTS = 300  # NNCF's default
LIMITED_ISA = {name: os.environ[name] for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA") if name in os.environ}
OPENVINO_INT8 = ["static int8", "dynamic int8"]
# also the type of the operations around int8 products
FASTEST_FLOAT = "bf16" if has_bf16(cpu=True) and not LIMITED_ISA else "fp32"
DTYPES = [dtype for dtype in PEAK_TYPES if dtype != "bf16" or FASTEST_FLOAT == "bf16"]
OPENVINO_DTYPES = [*(dtype for dtype in DTYPES if dtype != "int8"), *OPENVINO_INT8]
TAXONOMY = {f"group {i}": [f"class {i}.{j}" for j in range(5)] for i in range(5)}
COLD = """
import sys
from transformers import pipeline
import torch
dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[sys.argv[2]]
classify = pipeline("hierarchical-text-classification", model=sys.argv[1], trust_remote_code=True, dtype=dtype)
print(classify(sys.argv[3])["label"])
"""


def main() -> None:
    parser = harness.flag_parser(__doc__, "inference.json")
    parser.add_argument("--encoder", required=True)
    corpus = harness.ROOT / "examples" / "corpus" / "test.csv"
    parser.add_argument("--texts", type=Path, default=corpus, help="CSV with columns text and label")
    parser.add_argument("--model", help="a trained checkpoint; by default random heads over the encoder")
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
            results["machine"] = {"cpu": harness.processor(), "cores": os.cpu_count(), **LIMITED_ISA}
            harness.write_results(arguments.output, results)
            print(f"\n{part}")
            columns = results[part][0]
            harness.print_table(columns, ([row.get(name, "") for name in columns] for row in results[part]))


def read_column(file: Path, name: str) -> list[str]:
    """Read a column of a CSV file."""
    return pd.read_csv(file, dtype=str, keep_default_na=False)[name].tolist()


def make_checkpoint(encoder: str, folder: Path, config: BertConfig | None = None) -> str:
    """Write a self-contained checkpoint with random heads, and with a random encoder if its configuration is given."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    tokenizer.model_max_length = 512
    text_config = config or AutoConfig.from_pretrained(encoder)
    whole = HierarchicalConfig(text_config=text_config, taxonomy=Taxonomy(TAXONOMY), encoder_name_or_path=encoder)
    model = HierarchicalForSequenceClassification(whole, encoder=None if config else load_encoder(whole))
    torch.nn.init.normal_(model.heads.weight, std=0.3)
    size, leaves = len(tokenizer), whole.tree.num_leaves
    lexical = {"idf": torch.rand(size), "weight": torch.randn(leaves, size), "bias": torch.zeros(leaves)}
    model.set_calibration(Calibration(lexical_weight=1.0), lexical)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def ours(model: str, dtype: str, **kwargs):
    """Return this project's pipeline."""
    torch_dtype = PEAK_TYPES[FASTEST_FLOAT if dtype == "int8" else dtype]
    classify = harness.load_classifier(model, dtype=torch_dtype, device="cpu", **kwargs)
    if dtype == "int8":
        quantize(classify.model.encoder)
    return classify


def stock(model: str, dtype: str):
    """Return the standard text-classification pipeline of transformers."""
    return pipeline(
        "text-classification", model=model, trust_remote_code=True, dtype=PEAK_TYPES[dtype], device="cpu", batch_size=32
    )


class OverBatches:
    """Run a function from a batch's inputs to its logits over batches by length. Calls return (num_texts, num_leaves) probabilities."""

    def __init__(self, model: str, run: Callable[[dict[str, torch.Tensor]], torch.Tensor]):
        self.tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
        self.run = run

    def __call__(self, texts: list[str]) -> torch.Tensor:
        encoded = self.tokenizer(texts, truncation=True, verbose=False)
        batches = batches_by_length([len(ids) for ids in encoded["input_ids"]], None, TOKENS_ON_CPU)
        outputs = []
        for batch in batches:
            length = padded_length(len(encoded["input_ids"][batch[0]]), len(batch), self.tokenizer.model_max_length)
            inputs = self.tokenizer.pad(
                {k: [v[i] for i in batch] for k, v in encoded.items()},
                padding="max_length",
                max_length=length,
                return_tensors="pt",
            )
            outputs.append(self.run(dict(inputs)).float().softmax(-1))
        order = torch.tensor([i for batch in batches for i in batch])
        return torch.cat(outputs)[order.argsort()]


def fuse(model: str, file: Path, quantized: Path) -> None:
    """Write a checkpoint as ONNX whose attention ONNX Runtime's optimizer fuses, in float32 and with int8 weights.

    The optimizer recognises only the attention graph of torch's older exporter.
    """
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.optimizer import optimize_model

    plain = load_merged(Path(model)).eval()
    plain.encoder.set_attn_implementation("eager")
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    names = tokenizer.model_input_names
    encoded = tokenizer(["A study of ulcers.", "Epilepsy"], padding=True, return_tensors="pt")
    with quiet_logs():
        torch.onnx.export(
            Logits(plain, names).eval(),
            tuple(encoded[name] for name in names),
            file,
            dynamo=False,
            opset_version=17,
            input_names=names,
            output_names=["logits"],
            dynamic_axes={name: {0: "batch", 1: "length"} for name in names},
        )
        config = plain.encoder.config
        fused = optimize_model(str(file), "bert", config.num_attention_heads, config.hidden_size)
        if fused.get_fused_operator_statistics()["Attention"] != config.num_hidden_layers:
            raise SystemExit("ONNX Runtime's optimizer has not fused the attention of every layer")
        fused.save_model_to_file(str(file))
        options = {"DefaultTensorType": TensorProto.FLOAT}  # shape inference does not support fused operations
        quantize_dynamic(
            file, quantized, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True, extra_options=options
        )


def runtime(model: str, file: Path) -> OverBatches:
    """Return an ONNX file in ONNX Runtime as a classifier."""
    import onnxruntime

    # errors only: the older exporter leaves shapes unknown, which would be reported at each batch
    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return OverBatches(
        model,
        lambda inputs: torch.from_numpy(session.run(["logits"], {k: v.numpy() for k, v in inputs.items()})[0]),
    )


def openvino_encoder(
    encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, dtype: str, texts: list[str], hint: str = "THROUGHPUT"
) -> nn.Module:
    """Return an encoder in OpenVINO: "fp32", "bf16", "dynamic int8", or "static int8", which NNCF calibrates on the texts."""
    from hierarchical_clinicalbert.prediction.openvino import OpenVinoEncoder, convert

    names = tokenizer.model_input_names
    converted = convert(encoder, names, int8=dtype == "dynamic int8")
    if dtype == "static int8":
        import nncf

        tokenize = partial(tokenizer, truncation=True, return_tensors="np")
        dataset = nncf.Dataset(texts, lambda text: {name: tokenize(text)[name] for name in names})
        converted = nncf.quantize(converted, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(texts))
    return OpenVinoEncoder(converted, PEAK_TYPES[FASTEST_FLOAT if dtype.endswith("int8") else dtype], hint)


def openvino(model: str, dtype: str, texts: list[str], hint: str = "THROUGHPUT"):
    """Return this project's pipeline with its encoder in OpenVINO."""
    classify = ours(model, "fp32")
    encoder, tokenizer = classify.model.encoder, classify.tokenizer
    classify.model.encoder = openvino_encoder(encoder, tokenizer, dtype, texts[-CALIBRATION_TEXTS:], hint)
    return classify


class CompiledEncoder(nn.Module):
    """Run an encoder compiled by torch.compile with its fastest settings: constant weights, tuned products, one dynamic graph."""

    def __init__(self, encoder: nn.Module):
        import torch._inductor.config as settings

        super().__init__()
        settings.freezing = settings.max_autotune = settings.cpp.enable_concat_linear = True
        self.run = torch.compile(encoder, dynamic=True)

    def forward(self, **inputs: torch.Tensor) -> BaseModelOutput:
        with torch.no_grad():  # in inference mode, torch does not treat the weights as constants
            return self.run(**inputs)


def compiled(model: str):
    """Return this project's pipeline with a compiled encoder. Each core computes its own batches."""
    classify = ours(model, FASTEST_FLOAT)
    plain = AutoModel.from_pretrained(model, trust_remote_code=True, dtype=PEAK_TYPES[FASTEST_FLOAT])
    classify.model.encoder = CompiledEncoder(plain.encoder.eval())
    return classify


def peers(
    model: str, scratch: Path, texts: list[str]
) -> dict[str, tuple[str, Callable, Callable[[list[str]], torch.Tensor]]]:
    """Return for each peer its dtype, the function to time, and a function that returns leaf probabilities (num_texts, num_leaves)."""
    names = ours(model, "fp32").tree.labels
    export_onnx(Path(model), scratch)
    files = {"ONNX Runtime, fp32": scratch / ONNX_FILE, "ONNX Runtime, int8": scratch / QUANTIZED_ONNX_FILE}
    if AutoConfig.from_pretrained(model, trust_remote_code=True).text_config.model_type == "bert":
        fused, fused_int8 = scratch / "fused.onnx", scratch / "fused_int8.onnx"
        fuse(model, fused, fused_int8)
        files |= {"ONNX Runtime, fused fp32": fused, "ONNX Runtime, fused int8": fused_int8}
    result: dict = {}
    for dtype in (dtype for dtype in DTYPES if dtype != "int8"):
        classify = stock(model, dtype)
        result[f"stock pipeline, {dtype}"] = (
            dtype,
            lambda texts, classify=classify: classify(texts, truncation=True),
            lambda texts, classify=classify: in_order(classify(texts, truncation=True, top_k=None), names),
        )
    for name, file in files.items():
        call = runtime(model, file)
        result[name] = (name.rpartition(" ")[2], call, call)
    pipelines = {f"OpenVINO, {dtype}": partial(openvino, model, dtype, texts) for dtype in OPENVINO_DTYPES}
    pipelines[f"torch.compile, {FASTEST_FLOAT}"] = partial(compiled, model)
    pipelines |= {f"this project, {dtype}": partial(ours, model, dtype) for dtype in DTYPES}
    for name, load in pipelines.items():
        classify = load()
        result[name] = (
            name.rpartition(" ")[2],
            classify,
            lambda texts, classify=classify: in_order(
                [
                    [{"label": k, "score": v} for level in prediction["levels"] for k, v in level.items()]
                    for prediction in classify(texts, levels=True)
                ],
                names,
            ),
        )
    return result


def in_order(results: list[list[dict]], names: list[str]) -> torch.Tensor:
    """Return the scores of all predicted labels, (num_texts, num_labels), in the order of ``names``."""
    labels = {node["label"] for node in results[0]}
    order = [name for name in names if name in labels]
    rows = [{node["label"]: node["score"] for node in result} for result in results]
    return torch.tensor([[row[name] for name in order] for row in rows])


def throughput(model: str, texts: list[str], arguments: argparse.Namespace, scratch: Path) -> list[dict]:
    return compare(model, texts, arguments.rows, arguments.rounds, scratch / "small")


def base_size(model: str, texts: list[str], arguments: argparse.Namespace, scratch: Path) -> list[dict]:
    """Repeat the comparison at the size of BERT base, with random weights."""
    config = BertConfig(vocab_size=AutoConfig.from_pretrained(arguments.encoder).vocab_size)
    large = make_checkpoint(arguments.encoder, scratch / "base", config)
    return compare(large, texts, arguments.rows // 4, min(arguments.rounds, 3), scratch / "large")


def compare(model: str, texts: list[str], count: int, rounds: int, scratch: Path) -> list[dict]:
    """Measure the rates of all peers. Each round has new texts, so that compiling for new lengths is included."""
    all_peers = peers(model, scratch, texts)
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    config = AutoConfig.from_pretrained(model, trust_remote_code=True).text_config
    warm_up, *timed = ([texts[(turn * count + i) % len(texts)] for i in range(count)] for turn in range(rounds + 1))
    flops = [
        sum(useful_flops(config, len(ids)) for ids in tokenizer(part, truncation=True)["input_ids"]) for part in timed
    ]
    seconds: dict[str, list[float]] = {name: [] for name in all_peers}
    peaks: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    for _, call, _ in all_peers.values():
        call(warm_up)  # compile, and fill caches
    for part in timed:
        for dtype in DTYPES:
            peaks[dtype].append(peak(dtype))
        for name, (_, call, _) in all_peers.items():
            started = time.perf_counter()
            call(part)
            seconds[name].append(time.perf_counter() - started)
    reference = None
    rows = []
    for name, (dtype, _, predict) in all_peers.items():
        probabilities = predict(warm_up)
        reference = probabilities if reference is None else reference
        probabilities = probabilities[:, : reference.shape[1]]  # this project's have inner nodes after the leaves
        speeds = [count / s for s in seconds[name]]
        rates = [f / s / p for f, s, p in zip(flops, seconds[name], peaks[dtype], strict=True)]
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
                "times the first": round(first, 2),
                "times ONNX Runtime, int8": round(onnx, 2),
                "share of the peak": round(statistics.median(rates), 3),
                "peak, TFLOP/s": round(statistics.median(peaks[dtype]) / 1e12, 2),
                "same label": round((probabilities.argmax(1) == reference.argmax(1)).float().mean().item(), 3),
                "largest gap of a probability": round((probabilities - reference).abs().max().item(), 4),
            }
        )
    return rows


def useful_flops(config: BertConfig, tokens: int) -> float:
    """Count the FLOPs of the matrix products of one text: linear layers, and attention over its own tokens."""
    return config.num_hidden_layers * sum(harness.layer_flops(config, tokens))


def peak(dtype: str) -> float:
    """Measure the FLOP/s of a large matrix product, as the best of five."""
    n = 4096
    if dtype == "int8":
        a, b = (torch.randint(-127, 127, (n, n), dtype=torch.int8) for _ in range(2))
    else:
        a, b = (torch.randn(n, n).to(PEAK_TYPES[dtype]) for _ in range(2))
    multiply = torch._int_mm if dtype == "int8" else torch.matmul
    with torch.inference_mode():
        return harness.best_rate(lambda: multiply(a, b), n, repeats=5)


def latency(model: str, texts: list[str], arguments: argparse.Namespace, scratch: Path) -> list[dict]:
    """Measure the latency of single texts, with alternating peers, and the time from process start to the first prediction."""
    export_onnx(Path(model), scratch)
    all_peers = {
        "stock pipeline, fp32": stock(model, "fp32"),
        "ONNX Runtime, int8": runtime(model, scratch / QUANTIZED_ONNX_FILE),
        **{f"OpenVINO, {dtype}": openvino(model, dtype, texts, "LATENCY") for dtype in OPENVINO_DTYPES},
        **{f"this project, {dtype}": ours(model, dtype) for dtype in DTYPES},
    }
    flags = {"stock pipeline, fp32": {"truncation": True}}
    seconds: dict[str, list[float]] = {name: [] for name in all_peers}
    for text in texts[:60]:
        for name, call in all_peers.items():
            input_ = [text] if name.startswith("ONNX") else text
            time.sleep(0.1)  # the threads of ONNX Runtime spin for some time, and would slow down the next peer
            started = time.perf_counter()
            call(input_, **flags.get(name, {}))
            seconds[name].append(time.perf_counter() - started)
    rows = [
        {
            "pipeline": name,
            "p50 ms": round(1000 * statistics.median(times[5:]), 1),
            "p95 ms": round(1000 * statistics.quantiles(times[5:], n=20)[-1], 1),
        }
        for name, times in seconds.items()
    ]
    starts = []
    for _ in range(3):
        started = time.perf_counter()
        command = [sys.executable, "-W", "ignore", "-c", COLD, model, FASTEST_FLOAT, texts[0]]
        subprocess.run(command, check=True, capture_output=True)
        starts.append(time.perf_counter() - started)
    return [*rows, {"pipeline": "this project: a new process", "p50 ms": round(1000 * statistics.median(starts))}]


def scale(model: str, texts: list[str], arguments: argparse.Namespace, scratch: Path) -> list[dict]:
    """Measure time and peak memory of predict.py over 1, 10 and 100 times as many rows."""
    rows = []
    for times in (1, 10, 100):
        count = times * arguments.rows // 4
        source = scratch / f"{times}.csv"
        with source.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text"])
            writer.writerows([texts[i % len(texts)]] for i in range(count))
        words = ["--model", model, "--input", source, "--output", scratch / f"{times}.jsonl"]
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, harness.ROOT / "predict.py", *words], stderr=subprocess.DEVNULL)
        memory = 0
        while process.poll() is None:
            memory = max(memory, peak_memory(process.pid))
            time.sleep(0.1)
        if process.returncode:
            raise RuntimeError(f"predict.py ended with {process.returncode}")
        seconds = time.perf_counter() - started
        rows.append({"rows": count, "seconds": round(seconds, 1), "peak memory, MiB": round(memory / 1024)})
    return rows


def peak_memory(process: int) -> int:
    """Return the peak memory of a Linux process in kB; 0 after its end. `wait4` would include this process's own peak."""
    match = re.search(r"^VmHWM:\s+(\d+)", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return int(match[1]) if match else 0


def padding(model: str, texts: list[str], arguments: argparse.Namespace, scratch: Path) -> list[dict]:
    """Count the tokens of all texts, and measure the share of padding in this project's batches."""
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    rows = []
    for count in (arguments.rows, len(texts)):
        lengths = [len(ids) for ids in tokenizer(texts[:count], truncation=True, verbose=False)["input_ids"]]
        batches = batches_by_length(lengths, None, TOKENS_ON_CPU)
        computed = sum(
            len(batch) * padded_length(lengths[batch[0]], len(batch), tokenizer.model_max_length) for batch in batches
        )
        rows.append(
            {"texts": count, "tokens": sum(lengths), "padding, %": round(100 * (1 - sum(lengths) / computed), 1)}
        )
    return rows


def accuracy(model: str, texts: list[str], arguments: argparse.Namespace, scratch: Path) -> list[dict]:
    """Measure the accuracy of a trained checkpoint on the labels of the file: all dtypes of this project, and int8 of the peers."""
    if arguments.model is None:
        return [{"accuracy": "needs --model"}]
    labels = read_column(arguments.texts, "label")
    names = {label: label for label in labels}
    classes = arguments.texts.parent / "labels.csv"
    if classes.exists():
        names = dict(zip(read_column(classes, "label"), read_column(classes, "name"), strict=True))
    tree = ours(model, "fp32").tree
    classes_of_leaves = [label.rpartition("/")[2] for label in tree.labels[: tree.num_leaves]]
    rows = []
    for name, (dtype, _, probabilities) in peers(model, scratch, texts).items():
        if dtype == "int8" or name.startswith("this project"):
            leaves = probabilities(texts)[:, : tree.num_leaves].argmax(1).tolist()
            correct = sum(classes_of_leaves[leaf] == names[label] for leaf, label in zip(leaves, labels, strict=True))
            rows.append({"pipeline": name, "accuracy, %": round(100 * correct / len(labels), 2)})
    return rows


PARTS = {
    "throughput": throughput,
    "base_size": base_size,
    "latency": latency,
    "scale": scale,
    "padding": padding,
    "accuracy": accuracy,
}

if __name__ == "__main__":
    main()
