"""Measure speed and memory of training beside peers: ``python benchmarks/training.py --encoder
FOLDER [--parts speed …]``.

Speed: documents per second over a sample of a training file with the file's distribution of
lengths. Every measurement is a fresh process that trains on the sample once to warm up and once for
the measurement. Peers alternate in every round, so that load on the machine affects all; compare
ratios of medians. The peers, all with AdamW and 23 classes:

- run_classification: the transformers example script of that name. Every weight is trained, in
  float32, with the encoder's dropout, in random order, padded to the longest text of the batch.
- plain LoRA: a loop as a careful user writes it. PEFT over the unquantized encoder, bfloat16
  autocast where it is native, no dropout, sorted by length, torch's SDPA.
- compiled LoRA: the same through torch.compile, forward and backward, for batches of any shape. The
  warm-up compiles.
- LoRA, QLoRA: this project's trainer with its default settings, over an unquantized or a 4-bit
  encoder.

Memory: peak resident memory of the process over two steps, or on a GPU the peak that torch
allocated. The model has the size of BERT base and random weights, and its batches have no padding.
"""

import argparse
import json
import resource
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

from hierarchical_clinicalbert.machine import has_bf16, keep_memory

BATCH = 16
CLASSES = 23
OURS = {"LoRA": ("lora", "none"), "QLoRA": ("lora", "4bit"), "full fine-tuning": ("full", "none")}
LENGTH = 512
SPEED = ("run_classification", "plain LoRA", "compiled LoRA", "LoRA", "QLoRA")
MEMORY = [
    (batch, length, checkpointing)
    for batch in (1, 8)
    for length in (128, 512)
    for checkpointing in (False, True)
]


def main() -> None:
    parser = harness.flag_parser(__doc__, "training.json")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument(
        "--encoder", required=True, help="folder of the encoder whose training is timed"
    )
    parser.add_argument(
        "--train_file", type=Path, default=harness.ROOT / "examples" / "corpus" / "train.csv"
    )
    parser.add_argument("--documents", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        print(json.dumps(work(**arguments.worker)))
        return
    result = harness.read_results(arguments.output, {})
    result["machine"] = machine()
    print(result["machine"])
    with tempfile.TemporaryDirectory() as folder:
        for part in arguments.parts:
            result[part] = PARTS[part](arguments, Path(folder))
            harness.write_results(arguments.output, result)


def machine() -> str:
    """Describe the machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return (
        f"{harness.processor()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}"
    )


def run(**task: object) -> dict:
    """Run one measurement in a fresh process."""
    return harness.run_alone(__file__, "--encoder", "", "--worker", json.dumps(task))


def measure_speed(arguments: argparse.Namespace, _: Path) -> list[dict]:
    runs: dict[str, list[dict]] = {name: [] for name in SPEED}
    for turn in range(arguments.rounds):
        for name in SPEED:
            # the first steps are slow
            documents = arguments.documents // (4 if name == SPEED[0] else 1)
            task = {
                "contender": name,
                "encoder": arguments.encoder,
                "length": LENGTH,
                "documents": documents,
            }
            runs[name].append(run(**task, train_file=str(arguments.train_file)))
            print(
                f"round {turn + 1}, {name}: {runs[name][-1]['documents_per_second']:.2f}/s",
                flush=True,
            )
    rows = []
    for name, done in runs.items():
        speeds = [one["documents_per_second"] for one in done]
        first = rows[0]["documents_per_second"] if rows else statistics.median(speeds)
        rows.append(
            {
                "length": LENGTH,
                "contender": name,
                "documents_per_second": statistics.median(speeds),
                "lowest": min(speeds),
                "highest": max(speeds),
                "ratio": statistics.median(speeds) / first,
                "peak_gigabytes": statistics.median(one["peak_gigabytes"] for one in done),
            }
        )
    columns = [("tokens", "{length}"), ("training", "{contender}")]
    columns.append(("documents/s", "{documents_per_second:.1f} ({lowest:.1f} – {highest:.1f})"))
    columns.append(("speed-up over the first", "{ratio:.1f}"))
    harness.print_rows(rows, [*columns, ("memory", "{peak_gigabytes:.2f} GB")], left=2)
    return rows


def measure_memory(arguments: argparse.Namespace, folder: Path) -> list[dict]:
    from transformers import AutoTokenizer, BertConfig, BertModel

    AutoTokenizer.from_pretrained(arguments.encoder).save_pretrained(folder)
    BertModel(BertConfig(), add_pooling_layer=False).save_pretrained(folder)
    rows = []
    table = []
    for batch, length, checkpointing in MEMORY:
        row: dict[str, Any] = {
            "batch": batch,
            "length": length,
            "gradient_checkpointing": checkpointing,
        }
        task = {"encoder": str(folder), "length": length, "documents": 2 * batch, "batch": batch}
        for name in OURS:
            row[name] = run(contender=name, gradient_checkpointing=checkpointing, **task)[
                "peak_gigabytes"
            ]
        rows.append(row)
        print(row, flush=True)
        share = row["QLoRA"] / row["full fine-tuning"]
        memory = (f"{row[name]:.2f} GB" for name in OURS)
        table.append([batch, length, "on" if checkpointing else "off", *memory, f"{share:.2f}"])
    harness.print_table(
        ["batch", "tokens", "gradient checkpointing", *OURS, "QLoRA / full"], table, left=3
    )
    return rows


def work(
    contender: str,
    encoder: str,
    length: int,
    documents: int,
    train_file: str | None = None,
    batch: int = BATCH,
    gradient_checkpointing: bool = False,
) -> dict:
    """Train a sample. Return its speed and the peak memory."""
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    if train_file is None:
        ids = [torch.randint(1000, 30000, (length,)).tolist() for _ in range(documents)]
    else:
        table = pd.read_csv(train_file, dtype=str)
        texts = list(table["text"] if "text" in table else table["medical_abstract"])
        ids = sorted(tokenizer(texts, truncation=True, max_length=length)["input_ids"], key=len)
        ids = [ids[i] for i in np.linspace(0, len(ids) - 1, documents).round().astype(int)]
    np.random.default_rng(0).shuffle(ids)
    labels = [i % CLASSES for i in range(documents)]
    if contender in OURS:
        train = ours(contender, encoder, tokenizer, ids, labels, batch, gradient_checkpointing)
    else:
        train = PEERS[contender](encoder, tokenizer, ids, labels)
    if train_file is not None:  # warm up
        train()
    started = time.perf_counter()
    train()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated()
    return {"documents_per_second": documents / seconds, "peak_gigabytes": memory / 1e9}


def ours(
    contender: str,
    encoder: str,
    tokenizer: object,
    ids: list[list[int]],
    labels: list[int],
    batch: int,
    gradient_checkpointing: bool,
) -> Callable[[], None]:
    """Return a function that trains with this project's trainer and its defaults."""
    from datasets import Dataset
    from transformers import DataCollatorWithPadding

    from decisions_hierarchical import OnePath
    from hierarchical_clinicalbert.training.arguments import (
        HierarchicalTrainingArguments,
        ModelArguments,
    )
    from hierarchical_clinicalbert.training.cpu import KEPT_MEMORY
    from hierarchical_clinicalbert.training.losses import FocalLoss
    from hierarchical_clinicalbert.training.model import build_model
    from hierarchical_clinicalbert.training.trainer import HierarchicalTrainer
    from taxonomy_hierarchical import Taxonomy

    if not torch.cuda.is_available():
        keep_memory(*KEPT_MEMORY)  # as in train.py
    tuning, quantization = OURS[contender]
    tree = Taxonomy(
        {f"parent {i}": [f"child {i} {j}" for j in range(5 if i < 3 else 4)] for i in range(5)}
    )
    model = build_model(
        ModelArguments(encoder, tuning=tuning, quantization=quantization), tree, seed=0
    )
    arguments = HierarchicalTrainingArguments(
        output_dir=tempfile.gettempdir(),
        num_train_epochs=1,
        per_device_train_batch_size=batch,
        save_strategy="no",
        eval_strategy="no",
        load_best_model_at_end=False,
        disable_tqdm=True,
        logging_steps=1000,
        activation_checkpointing=gradient_checkpointing,
        remove_unused_columns=True,
    )
    rows = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": labels}
    trainer = HierarchicalTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(rows | {"length": [len(row) for row in ids]}),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        loss_function=FocalLoss(OnePath(tree), torch.tensor(labels), gamma=1.0),
    )
    return trainer.train


def run_classification(
    encoder: str, tokenizer: object, ids: list[list[int]], labels: list[int]
) -> Callable[[], None]:
    """Return a function that trains with the Trainer and the classifier of transformers."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=CLASSES)
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        save_strategy="no",
        disable_tqdm=True,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    rows = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": labels}
    data = Dataset.from_dict(rows)
    return Trainer(
        model=model, args=arguments, train_dataset=data, processing_class=tokenizer
    ).train


def plain_lora(
    encoder: str, tokenizer: Any, ids: list[list[int]], labels: list[int], compiled: bool = False
) -> Callable[[], None]:
    """Return a function that runs a training loop, with autocast if bfloat16 is native."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        encoder, num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(model, config)
    if compiled:
        model = torch.compile(model, dynamic=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ordered = sorted(ids, key=len)
    batches = []
    for start in range(0, len(ids), BATCH):
        batch = tokenizer.pad({"input_ids": ordered[start : start + BATCH]}, return_tensors="pt")
        batches.append({**batch, "labels": torch.tensor(labels[start : start + BATCH])})

    def train() -> None:
        for batch in batches:
            with torch.autocast(device, torch.bfloat16, enabled=has_bf16(cpu=device == "cpu")):
                loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return train


PEERS = {
    "run_classification": run_classification,
    "plain LoRA": plain_lora,
    "compiled LoRA": partial(plain_lora, compiled=True),
}


PARTS = {"speed": measure_speed, "memory": measure_memory}


if __name__ == "__main__":
    main()
