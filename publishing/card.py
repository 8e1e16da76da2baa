"""The model card, README.md of a checkpoint, written from the run itself so that it cannot disagree with it.

Worth knowing:

1. The front matter is what the Hub reads. Results stand there as `EvalResult`s, with the numbers of metrics.json.
2. Names of classes, columns and files are user input. `table` and `plain` write the characters that Markdown or HTML
   would read as numeric entities, and the taxonomy stands in a fence longer than any row of backticks in it.
3. No path of the machine is written: of a file or a folder, only its name.
4. The snippets stand between two comments, the first of which holds the id that they name. So `rename` finds what to
   change when the model is published, and leaves alone what somebody has written since.
"""

import csv
import json
import math
import os
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from configuration_hierarchical import HierarchicalConfig
from taxonomy_hierarchical import Taxonomy

TRAINING_SETTINGS = (
    *("learning_rate", "heads_learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "optim", "weight_decay", "label_smoothing_factor"),
    *("load_best_model_at_end", "seed"),
)
NOT_SHOWN = {
    "model_name_or_path",
    "model_revision",
    "cache_dir",
}  # the card names the encoder; the rest is the machine's
METRICS = {  # name in metrics.json, after its prefix: (type on the Hub, what the card calls it)
    "accuracy": ("accuracy", "accuracy"),
    "any_label_accuracy": ("accuracy", "accuracy, any label of a repeated text counting"),
    "macro_f1": ("f1", "macro F1"),
    "weighted_f1": ("f1", "weighted F1"),
    "hierarchical_precision": ("precision", "hierarchical precision"),
    "hierarchical_recall": ("recall", "hierarchical recall"),
    "hierarchical_f1": ("f1", "hierarchical F1"),
    "log_loss": ("log_loss", "log loss (nats)"),
    "ece": ("ece", "expected calibration error"),
    "ece_by_chance": ("ece", "calibration error by chance alone"),
}
LEVEL_METRICS = ("accuracy", "macro_f1", "ece", "ece_by_chance")
HUB_METRICS = ("accuracy", "f1", "precision", "recall")  # the types that hf.co/metrics lists
PREFIXES = {"validation": "eval", "test": "test"}
CLASSES_SHOWN = 20  # of a level
LEAVES_SHOWN = 50  # of the results
NODES_SHOWN = 200  # of the tree

MODEL_PLACEHOLDER = "your-name/your-model"
PLACEHOLDER_NOTE = (
    f"`{MODEL_PLACEHOLDER}` stands for the model's id on the Hub; the path of the checkpoint's folder works too."
)
ADAPTER_FORM = (
    "The repository holds the heads and a PEFT adapter (`adapter/`), which is added to the encoder as it is loaded. The\n"
    "encoder is fetched from its own repository, at the revision named below."
)
LOCAL_ADAPTER_FORM = (
    "The checkpoint holds the heads and a PEFT adapter (`adapter/`), which is added to the encoder as it is loaded. The\n"
    "encoder came from a folder, not from the Hub: the checkpoint loads only where that folder is."
)
WHOLE_FORM = "The repository holds the whole model, the encoder's weights included."
UNVERIFIED = (
    "**These scores are unverified**: it is not known which texts the checkpoint was trained on that training continued from,\n"
    "and rows that were scored may be among them."
)
# after an empty line, which a drawn taxonomy cannot hold
USE = re.compile(r"(?<=\n)\r?\n<!-- use: (?P<id>\S+) -->(?P<body>.*?)<!-- /use -->", re.DOTALL)
PINNED = re.compile(r'^commit = "([0-9a-f]{40})"\r?$', re.MULTILINE)
INDEX_NAME = re.compile(r"^(model-index:[ \t]*\r?\n[ \t]*-[ \t]+name:)[^\r\n]*", re.MULTILINE)
ADAPTER_RELATION = re.compile(r"^(base_model_relation:[ \t]*)([\"']?)adapter\2(?=[ \t\r]*$)", re.MULTILINE)

CITATION = """@software{hierarchical_clinicalbert,
  title = {Hierarchical ClinicalBERT},
  author = {{The Hierarchical ClinicalBERT developers}},
  license = {Apache-2.0}
}"""
LORA = "- LoRA: Hu et al., 2021, [arXiv:2106.09685](https://arxiv.org/abs/2106.09685)"
QLORA = "- QLoRA: Dettmers et al., 2023, [arXiv:2305.14314](https://arxiv.org/abs/2305.14314)"
R_DROP = "- Consistency of two views: R-Drop, Liang et al., 2021, [arXiv:2106.14448](https://arxiv.org/abs/2106.14448)"
FOCAL = "- Focal loss: Lin et al., 2017, [arXiv:1708.02002](https://arxiv.org/abs/1708.02002)"


@dataclass(frozen=True)
class Run:
    """What the sections are written from: the arguments of `write`, and what follows from them.

    Attributes:
        tree: the taxonomy.
        scores: for each split that was measured, the metrics that the card shows, by their names without the prefix.
        emissions: ``co2_eq_emissions`` of the front matter, in grams.
    """

    folder: Path
    config: HierarchicalConfig
    settings: dict[str, Any]
    data: dict[str, Any]
    metrics: dict[str, Any]
    model_id: str
    licence: str
    environment: dict[str, Any] | None
    tree: Taxonomy
    scores: dict[str, dict[str, float]]
    emissions: dict[str, Any] | None


def write(
    folder: Path,
    config: HierarchicalConfig,
    settings: dict[str, Any],
    data_report: dict[str, Any],
    metrics: dict[str, Any],
    *,
    model_id: str | None = None,
    licence: str = "apache-2.0",
    environment: dict[str, Any] | None = None,
) -> None:
    """Writes README.md into a checkpoint's folder, in which it looks for plots and for codecarbon's emissions.csv.

    Args:
        config: of the checkpoint, as it is saved.
        settings: the flags that shaped the run.
        data_report: as in data_report.json, or empty.
        metrics: as in metrics.json, or empty where training is not finished.
        model_id: on the Hub; without one the snippets name a placeholder.
        licence: of the weights, by the Hub's identifier.
        environment: what `environment` returns.
    """
    run = Run(
        *(folder, config, settings, data_report, metrics, model_id or MODEL_PLACEHOLDER, licence, environment),
        tree=config.tree,
        scores=measured(metrics, config.tree.depth),
        emissions=read_emissions(folder, metrics, environment),
    )
    sections = [front_matter, about, use, data, training, results, limits, impact, licence_and_citation]
    text = "\n\n".join(filter(None, (section(run) for section in sections)))
    (folder / "README.md").write_text(text + "\n", encoding="utf-8")


def rename(text: str, model_id: str, merged: bool = False) -> str:
    """A card under another id: in its snippets, and as the name in ``model-index``. All else stays as it is.

    Args:
        text: of a card. One that `write` did not write, or whose comments around the snippets are gone, keeps its body.
        model_id: on the Hub.
        merged: the card will stand beside the whole model, no longer beside an adapter.
    """
    front = REGEX_YAML_BLOCK.match(text)
    head, body = (front[0], text[front.end() :]) if front else ("", text)
    head = INDEX_NAME.sub(lambda found: f"{found[1]} {json.dumps(model_id)}", head)
    if merged:
        head = ADAPTER_RELATION.sub(r"\1finetune", head)  # the Hub's "merge" is of several models into one

    def change(found: re.Match) -> str:
        use = re.sub(re.escape(PLACEHOLDER_NOTE) + r"\s*", "", found[0])
        use = re.sub(rf"(?<![\w./-]){re.escape(found['id'])}(?![\w/-]|\.\w)", model_id, use)
        if merged:
            use = use.replace(ADAPTER_FORM, WHOLE_FORM).replace(LOCAL_ADAPTER_FORM, WHOLE_FORM)
        return use

    return head + USE.sub(change, body, count=1)


def pin(text: str, commit: str | None) -> str:
    """A card whose snippets name a commit, of the weights as of the code, or with None no commit. All else stays as it is.

    Args:
        text: of a card. One that `write` did not write, or whose comments around the snippets are gone, stays as it is.
        commit: 40 hexadecimal digits. It takes the place of one that the snippets name; what was pinned by hand stays.
    """

    def block(found: re.Match) -> str:
        end = "\r\n" if "\r\n" in found[0] else "\n"
        code = re.sub(r'(?m)^commit = "[0-9a-f]{40}"\s*', "", found[0])
        code = code.replace("revision=commit, code_revision=commit, ", "")
        if "revision=" in code:  # by hand
            return found[0]
        if commit is None:
            return code
        code = code.replace("trust_remote_code=True", "revision=commit, code_revision=commit, trust_remote_code=True")
        return re.sub(r"(?m)\A(?:(?:```python|from |import ).*\n)+", rf'\g<0>{end}commit = "{commit}"{end}', code)

    return USE.sub(lambda found: re.sub(r"(?ms)^```python\r?\n.*?^```", block, found[0]), text, count=1)


def pinned_commit(text: str) -> str | None:
    """The commit that a card's snippets name."""
    use = USE.search(text)
    found = PINNED.search(use["body"]) if use else None
    return found[1] if found else None


def snippets(text: str) -> list[str]:
    """The Python code of a card's snippets."""
    found = USE.search(text)
    return re.findall(r"(?ms)^```python\r?\n(.*?)^```", found["body"]) if found else []


def environment(device: torch.device | str) -> dict[str, Any]:
    """What a run ran on: ``hardware``, a text, and ``versions`` of the libraries. Nothing names a machine or a person.

    Args:
        device: of training. Under data parallelism every process is taken to have one like it.
    """
    device, info = torch.device(device), Path("/proc/cpuinfo")
    cpu = re.search(r"(?m)^model name\s*:\s*(.+)$", info.read_text(errors="replace")) if info.is_file() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hardware = f"{cpu[1] if cpu else platform.processor() or platform.machine()}, {cores} cores"
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        count = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        hardware = f"{count} × {gpu.name} ({gpu.total_memory / 2**30:.0f} GiB); {hardware}"
    elif device.type != "cpu":
        hardware = f"{device.type} device; {hardware}"
    versions = {"python": platform.python_version()}
    for library in ("torch", "transformers", "peft", "bitsandbytes"):
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return {"hardware": hardware, "versions": versions}


# ── what the sections draw on ────────────────────────────────────────────────────────────────────────────────────────


def measured(metrics: dict[str, Any], depth: int) -> dict[str, dict[str, float]]:
    """For each split that was scored, the metrics that the card shows, by their names without the prefix."""
    names = [*METRICS, *(f"level_{k}_{name}" for k in range(1, depth + 1) for name in LEVEL_METRICS)]
    return {
        split: {name: metrics[f"{prefix}_{name}"] for name in names if f"{prefix}_{name}" in metrics}
        for split, prefix in PREFIXES.items()
        if f"{prefix}_log_loss" in metrics
    }


def describe_metric(name: str) -> tuple[str, str]:
    """A metric's type on the Hub, and what the card calls it."""
    level = re.fullmatch(r"level_(\d+)_(.+)", name)
    if level is None:
        return METRICS[name]
    kind, title = METRICS[level[2]]
    return kind, f"level {level[1]} {title}"


def hub_encoder(config: HierarchicalConfig) -> str | None:
    """The encoder's id on the Hub; None where it came from a folder, and so has no commit."""
    local = Path(config.encoder_name_or_path).is_absolute() or config.encoder_revision is None
    return None if local else config.encoder_name_or_path


def read_source(name: str) -> tuple[str, str | None]:
    """A source of the data report as the card may show it, and its id where it is a data set on the Hub.

    The report calls a data set ``id [split]``, and a folder saved by `datasets` alike, ``path [split]``.
    """
    found = re.fullmatch(r"(.+?)( \[[^\[\]]*\])?", name, re.DOTALL)
    place, split = found.groups(default="") if found else (name, "")
    if split and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", place) and not Path(place).exists():
        return name, place
    return " ".join(f"{Path(place).resolve().name}{split}".split()), None


def read_emissions(folder: Path, metrics: dict[str, Any], environment: dict[str, Any] | None) -> dict[str, Any] | None:
    """The Hub's ``co2_eq_emissions``, in grams, from codecarbon's emissions.csv, in kilograms.

    Every run in a folder adds a row. A last row of another duration than this run's is an earlier run's, and no answer.
    """
    path, runtime = folder / "emissions.csv", metrics.get("train_runtime")
    if runtime is None or not path.is_file():
        return None
    try:
        with path.open(encoding="utf-8", newline="") as file:
            row = list(csv.DictReader(file))[-1]
        kilograms, ours = float(row["emissions"]), abs(float(row["duration"]) - runtime) <= 60 + 0.1 * runtime
    except (IndexError, KeyError, TypeError, ValueError):
        return None
    if not ours or not math.isfinite(kilograms):
        return None
    found = {
        "emissions": round(1000 * kilograms, 6),
        "source": f"CodeCarbon {row.get('codecarbon_version') or ''}".strip(),
        "training_type": "fine-tuning",
        "geographical_location": row.get("country_name"),
        "hardware_used": environment and environment["hardware"],
    }
    return {name: value for name, value in found.items() if value not in (None, "")}


# ── front matter ─────────────────────────────────────────────────────────────────────────────────────────────────────


def front_matter(run: Run) -> str:
    """The YAML that the Hub reads: https://github.com/huggingface/hub-docs/blob/main/modelcard.md."""
    encoder, lora = hub_encoder(run.config), ["lora"] if run.settings.get("tuning") == "lora" else []
    evaluated = eval_results(run)
    kinds = {result.metric_type for result in evaluated}
    datasets = [read_source(source["name"])[1] for source in run.data.get("sources", [])]
    front = ModelCardData(
        license=run.licence,
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["hierarchical-text-classification", "medical", "clinical", *lora],
        base_model=encoder,
        base_model_relation=None if encoder is None else "adapter" if run.config.adapter_subfolder else "finetune",
        datasets=list(dict.fromkeys(filter(None, datasets))) or None,
        metrics=[kind for kind in HUB_METRICS if kind in kinds] or None,
        eval_results=evaluated or None,
        model_name=run.model_id if evaluated else None,
        co2_eq_emissions=None if run.metrics.get("resumed_from_step") else run.emissions,  # of all training, or none
    )
    return f"---\n{front.to_yaml()}\n---"


def eval_results(run: Run) -> list[EvalResult]:
    """What ``model-index`` holds: the data set is the split's own source, or the one that it was carved from."""
    names = {source["split"]: source["name"] for source in run.data.get("sources", [])}
    found = []
    for split, values in run.scores.items():
        source = names.get(split) or names.get("all") or names.get("train")
        name, dataset = read_source(source) if source else ("held-out rows", None)
        found += [
            EvalResult(
                task_type="text-classification",
                dataset_type=dataset or "unknown",
                dataset_name=dataset or name,
                dataset_split=split,
                metric_type=describe_metric(metric)[0],
                metric_name=f"{metric} (unverified)" if is_unverified(run) else metric,
                metric_value=value,
            )
            for metric, value in values.items()
            if not metric.endswith("_by_chance")  # of the sample, not of the model
        ]
    return found


# ── sections ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def about(run: Run) -> str:
    tree = run.tree
    lines = tree.tree().split("\n")
    drawn, hidden = "\n".join(lines[:NODES_SHOWN]), len(lines) - NODES_SHOWN
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", drawn)), default=0))
    more = f"\n\nand {hidden:,} more nodes: `config.json` holds the whole taxonomy." if hidden > 0 else ""
    return f"""\
# Hierarchical text classifier

Sorts medical text into a taxonomy of {tree.num_leaves:,} classes, {tree.depth} level{"s"[: tree.depth > 1]} deep.
A text goes in; a path from a root to a leaf comes out, with a probability for every node. Each decision is a softmax
over siblings, so a parent is exactly as probable as its children together; the logits are log-probabilities of the
leaves.

**Not a medical device, and not for diagnosis.**

{fence}text
{drawn}
{fence}{more}"""


def use(run: Run) -> str:
    note = f"\n{PLACEHOLDER_NOTE}\n" if run.model_id == MODEL_PLACEHOLDER else ""
    adapter_form = ADAPTER_FORM if hub_encoder(run.config) else LOCAL_ADAPTER_FORM
    model = json.dumps(run.model_id)
    return f"""\
## Use

<!-- use: {run.model_id} -->
{note}
The path through the taxonomy:

```python
from transformers import pipeline

classify = pipeline("hierarchical-text-classification", model={model}, trust_remote_code=True)
result = classify("Colonoscopy was performed in 120 patients with suspected inflammatory bowel disease.")
print(result["label"], result["score"])
print([(node["label"], node["score"]) for node in result["path"]])
```

The leaf alone, by the pipeline of transformers, which cuts a long text only where it is told to:

```python
from transformers import pipeline

classify = pipeline("text-classification", model={model}, trust_remote_code=True)
text = "Colonoscopy was performed in 120 patients with suspected inflammatory bowel disease."
print(classify(text, truncation=True))
```

Without a pipeline:

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({model}, trust_remote_code=True)
model = AutoModelForSequenceClassification.from_pretrained({model}, trust_remote_code=True)

texts = ["Colonoscopy was performed in 120 patients with suspected inflammatory bowel disease."]
with torch.inference_mode():
    output = model(**tokenizer(texts, truncation=True, padding=True, return_tensors="pt"))
tree = model.config.tree
for leaf, log_probs in zip(output.logits.argmax(-1).tolist(), output.node_log_probs):
    print(" > ".join(f"{{tree.names[node]}} ({{log_probs[node].exp().item():.3f}})" for node in tree.path(leaf)))
```

{adapter_form if run.config.adapter_subfolder else WHOLE_FORM}

`trust_remote_code=True` runs the Python files of the repository: read them, and pin the commit that you have read, the
weights by `revision` and the files by `code_revision`. `quantization_config=BitsAndBytesConfig(load_in_4bit=True)` loads the encoder in 4 bits, with `bitsandbytes` and `peft`
installed; for a pipeline it goes into `model_kwargs`.

<!-- /use -->"""


def data(run: Run) -> str:
    report = run.data
    if not report.get("splits"):
        return ""
    splits, lengths = report["splits"], report.get("lengths", {})
    sources = (
        [source["split"], read_source(source["name"])[0], ", ".join(hash[:12] for hash in source["sha256"].values())]
        for source in report["sources"]
    )
    counted = {"rows": "rows", "dropped_rows": "dropped", "normalised_duplicates": "duplicates",
               "conflicting_texts": "texts with several labels", "conflicting_rows": "their rows"}  # fmt: skip
    counts = (
        [split, *(f"{found[key]:,}" for key in counted), f"{found['accuracy_ceiling']:.2%}"]
        for split, found in splits.items()
    )
    keys = {"p50": "median tokens", "p90": "90 % within", "max": "longest", "cut": "texts cut", "max_length": "at"}
    tokens = ([split, *(f"{found[key]:,}" for key in keys)] for split, found in lengths.items())
    parts = [
        "## Data",
        table(["split", "source", "SHA-256"], sources, text_columns=3),
        how_split(report),
        table(["split", *counted.values(), "accuracy ceiling"], counts),
        "Dropped are training rows whose text is also in another split, and validation rows whose text is also a test row.\n"
        "Texts that agree but for case, white space and their Unicode form are the same. Where one has several labels, no\n"
        "classifier can be right on more rows than the ceiling says.",
        moved_rows(report),
        table(["split", *keys.values()], tokens) if lengths else "",
        *(class_counts(level, splits) for level in next(iter(splits.values()))["classes"]),
    ]
    return "\n\n".join(filter(None, parts))


def how_split(report: dict[str, Any]) -> str:
    columns, origin, split = report["columns"], report["taxonomy"], report["split"]
    if origin.startswith("from "):
        origin = f"from {Path(origin.removeprefix('from ')).name}"
    carved = " and ".join(f"{share:g} for {name}" for name, share in split["carved"].items())
    shares = f" (shares of the training texts: {carved}; seed {split['seed']})" if carved else ""
    unseen = report["classes_without_training_rows"]
    more = f" and {len(unseen) - CLASSES_SHOWN:,} more" if len(unseen) > CLASSES_SHOWN else ""
    without = f" Classes without training rows: {plain(', '.join(unseen[:CLASSES_SHOWN]))}{more}." if unseen else ""
    return (
        f"Text column: {plain(columns['text'])}. Label column: {plain(', '.join(columns['label']))}. "
        f"Taxonomy: {plain(origin)}. Split: {split['method']}{shares}.{without}"
    )


def moved_rows(report: dict[str, Any]) -> str:
    """What became of rows to be scored whose text an earlier run of the checkpoint was trained on."""
    counts = report.get("trained_before", {}).get("rows", {})
    rows = " and ".join(f"{count:,} {split} rows" for split, count in counts.items() if count and split != "train")
    return f"Of texts that an earlier run was trained on: {rows}, which became training rows." if rows else ""


def is_unverified(run: Run) -> bool:
    """Whether scored rows may be of texts that an earlier run of the checkpoint was trained on."""
    return run.data.get("trained_before", {}).get("scores") == "unverified"


def class_counts(level: str, splits: dict[str, dict]) -> str:
    """Rows of a level's classes, the most common of the first split first."""
    classes = next(iter(splits.values()))["classes"][level]
    shown = sorted(classes, key=lambda name: -classes[name])[:CLASSES_SHOWN]
    rows = ([name, *(f"{found['classes'][level][name]:,}" for found in splits.values())] for name in shown)
    hidden = len(classes) - len(shown)
    return table([f"class on level {level}", *splits], rows) + (f"\n\nand {hidden:,} smaller ones." if hidden else "")


def training(run: Run) -> str:
    config, settings, metrics = run.config, run.settings, run.metrics
    encoder, start = hub_encoder(config), settings.get("model_name_or_path")
    at = f" at revision `{config.encoder_revision}`" if config.encoder_revision else ""
    named = (
        f"[{plain(encoder)}](https://huggingface.co/{encoder})"
        if encoder
        else "from a folder of the machine that trained"
    )
    lines = [f"Encoder: {named}{at} ({config.text_config.model_type}, width {config.hidden_size})."]
    if start and config.encoder_name_or_path not in (start, str(Path(start).resolve()), Path(start).name):
        lines.append("Training continued from an earlier checkpoint; what that one was trained on is not told here.")
    if "trainable_parameters" in metrics:
        lines.append(
            f"Trained: {metrics['trainable_parameters']:,} of {metrics['all_parameters']:,} parameters "
            f"({metrics['trainable_share']:.1%}). The encoder took {metrics['encoder_bytes'] / 1e6:.1f} MB in memory, "
            f"which in float32 would be {metrics['encoder_bytes_float32'] / 1e6:.1f} MB."
        )
    if "train_precision" in metrics and "train_precision" not in settings:
        lines.append(f"Precision: {metrics['train_precision']}.")
    rows = ([name, shown(value)] for name, value in settings.items() if value is not None and name not in NOT_SHOWN)
    return "\n\n".join(["## Training", "\n".join(lines), table(["setting", "value"], rows, text_columns=2)])


def shown(setting: Any) -> str:
    """A setting as text; of a path, its last part."""
    setting = getattr(setting, "value", setting)  # of an enum of transformers
    if isinstance(setting, (list, tuple)):
        return ", ".join(map(shown, setting))
    if isinstance(setting, str) and Path(setting).is_absolute():
        return Path(setting).name
    return f"{setting:g}" if isinstance(setting, float) else str(setting)


def results(run: Run) -> str:
    scores, found = run.scores, run.data.get("splits", {})
    if not scores:
        why = "No labelled rows were held out, so nothing was measured." if run.metrics else "The run is not finished."
        return f"## Results\n\n{why}"
    rows = ", ".join(f"{found[split]['rows']:,} {split} rows" for split in scores if split in found)
    names = dict.fromkeys(name for values in scores.values() for name in values)
    cells = ([describe_metric(name)[1], *(number(values.get(name)) for values in scores.values())] for name in names)
    plotted = f"of the {'test' if 'test' in scores else 'validation'} rows"
    plots = {
        f"confusion_matrix_level_{k}": f"Confusion matrix {plotted}, level {k}" for k in range(1, run.tree.depth + 1)
    }
    plots["reliability_diagram"] = f"Reliability diagram {plotted}"
    plots["reliability_diagram_uncalibrated"] = "The same before calibration"
    parts = [
        "## Results",
        f"Measured on the checkpoint as it is loaded above, over the encoder in full precision{rows and ': '}{rows}.\n"
        f"What is scored is the path to the most probable leaf.{of_leaves(run)}{chosen_by(run)}",
        UNVERIFIED if is_unverified(run) else "",
        table(["metric", *scores], cells),
        intervals(run),
        per_class(run),
        as_trained(run),
        calibration(run),
        *(f"![{title}](plots/{s}.png)" for s, title in plots.items() if (run.folder / "plots" / f"{s}.png").is_file()),
    ]
    return "\n\n".join(filter(None, parts))


def intervals(run: Run) -> str:
    """How sure the scores are, the rows being a sample."""
    found = []
    for name, (low, high) in run.metrics.get("intervals", {}).items():
        prefix, _, metric = name.partition("_")
        split = next(split for split, given in PREFIXES.items() if given == prefix)
        found.append(f"{split} {METRICS[metric][1]} {number(low)} – {number(high)}")
    return f"95 % bootstrap intervals: {'; '.join(found)}." if found else ""


def of_leaves(run: Run) -> str:
    """How many of the test rows, or else of the validation rows, scores of leaves are of, where others have inner labels."""
    split = "test" if "test" in run.scores else "validation"
    rows = sum(row["support"] for row in run.metrics.get("per_class", []))
    if not rows or rows == run.data.get("splits", {}).get(split, {}).get("rows", rows):
        return ""
    return f"\nAccuracy, macro and weighted F1 are of the {rows:,} {split} rows that are labelled with a leaf."


def chosen_by(run: Run) -> str:
    """What it means for their scores that the validation rows chose the checkpoint, if they did."""
    if "validation" not in run.scores or not run.settings.get("load_best_model_at_end"):
        return ""
    return (  # benchmarks/studies/selection.py
        "\nThe validation rows also chose the checkpoint, which flatters their scores: in a simulation by 2 to 5 points of\n"
        "accuracy with 30 to 100 rows and 5 to 20 evaluations."
    )


def per_class(run: Run) -> str:
    """Precision, recall and F1 of the classes, the most common first."""
    classes = sorted(run.metrics.get("per_class", []), key=lambda row: -row["support"])
    if not classes:
        return ""
    rows = (
        [
            row["label"],
            f"{row['support']:,}",
            *(number(row[name]) for name in ("precision", "recall", "f1")),
            " – ".join(map(number, row["f1_interval"] or ())),
        ]
        for row in classes[:LEAVES_SHOWN]
    )
    hidden = len(classes) - LEAVES_SHOWN
    shown = table(["class", "rows", "precision", "recall", "F1", "95 % of F1"], rows)
    return shown + (f"\n\nand {hidden:,} less common ones, in `metrics.json`." if hidden > 0 else "")


def as_trained(run: Run) -> str:
    """The scores over the quantized encoder of training beside those over the one in full precision."""
    rows = []
    for split, values in run.scores.items():
        for name in ("accuracy", "macro_f1", "hierarchical_f1", "log_loss"):
            quantized = run.metrics.get(f"quantized_{PREFIXES[split]}_{name}")
            if quantized is not None and name in values:
                full = run.metrics.get(f"uncalibrated_{PREFIXES[split]}_{name}", values[name])
                rows.append(
                    [f"{split} {METRICS[name][1]}", number(quantized), number(full), f"{full - quantized:+.4f}"]
                )
    if not rows:
        return ""
    compared = table(["metric", "as trained", "in full precision", "difference"], rows)
    form = run.metrics.get("train_quantization", "quantized")
    before = ", before calibration" if any(name.startswith("uncalibrated_") for name in run.metrics) else ""
    return f"Training used a {form} encoder. These are the scores over that one{before}:\n\n{compared}"


def calibration(run: Run) -> str:
    """What calibration changed, and what answers with a guarantee look like."""
    if run.config.temperatures is None:
        return "The probabilities are not calibrated: no validation rows were scored." if run.scores else ""
    fitted = (
        "Probabilities are calibrated by one temperature a decision, fitted on the validation rows with a prior that holds it\n"
        "near 1 where they are few, and applied inside the model. Scores of the validation rows are cross-validated: each fifth\n"
        "is answered by what the other four fitted. What each part adds:"
    )
    rows, weight = [], run.metrics.get("lexical_weight")
    changed = ("accuracy", "macro_f1", "hierarchical_f1") if weight else ()  # temperatures alone change few answers
    steps = ["uncalibrated", *(["without_lexical_head"] if weight else [])]
    for split, values in run.scores.items():
        for name in (*changed, "log_loss", "ece", *(f"level_{k}_ece" for k in range(1, run.tree.depth + 1))):
            before = [run.metrics.get(f"{step}_{PREFIXES[split]}_{name}") for step in steps]
            if before[0] is not None and name in values:
                rows.append([f"{split} {describe_metric(name)[1]}", *map(number, before), number(values[name])])
    words = (
        "Beside the encoder, a linear classifier over the words of a text (TF-IDF), fitted on the training rows, has its say in\n"
        "each decision. How much it says was fitted on the validation rows.\n"
    )
    columns = ["encoder alone, uncalibrated", "encoder alone, calibrated"] if weight else ["before calibration"]
    parts = [
        f"{words if weight else ''}{fitted}",
        table(["metric", *columns, "as loaded above"], rows),
    ]
    found = {
        name.removeprefix("test_answer_"): run.metrics[name] for name in run.metrics if name.startswith("test_answer_")
    }
    if found:
        chosen = run.settings.get("load_best_model_at_end")
        parts.append(
            "With `coverage=0.9` the pipeline answers with at most three nodes, or all roots, that hold the correct leaf for 90 %\n"
            f"of texts like the validation rows. This is split conformal prediction"
            f"{', up to the choice of the checkpoint on the same rows' if chosen else ''}. The\n"
            f"measured coverage is {found['coverage']:.1%} of the test texts, by answers of {found['leaves']:.1f} leaves on average;\n"
            f"{found['single_leaf']:.0%} of the answers were one leaf. It holds for texts that are truncated as those were, so the\n"
            "pipeline refuses `coverage` together with `stride` or another `max_length`."
        )
    return "\n\n".join(parts)


def limits(run: Run) -> str:
    lines = [
        "Meant for sorting medical texts, such as abstracts, for search, statistics and review, where a person checks\n"
        "  what matters. Not a medical device, and not for diagnosis, treatment or any decision about a patient.",
        "Measured only on texts like those it was trained on. On texts of another kind or language, measure first.",
        "Each text gets one path, also where several fit, or none.",
    ]
    if run.settings.get("max_length"):
        lines.append(f"Texts were cut at {run.settings['max_length']:,} tokens; what follows was not read.")
    errors = [f"{values['ece']:.3f} on the {split} rows" for split, values in run.scores.items() if "ece" in values]
    chance = [f"{values['ece_by_chance']:.3f}" for values in run.scores.values() if "ece_by_chance" in values]
    if errors:
        would = f", where right ones would show {' and '.join(chance)} by chance" if chance else ""
        lines.append(f"Probabilities are estimates. Their expected calibration error is {' and '.join(errors)}{would}.")
    splits = run.data.get("splits", {})
    noisy = [f"{found['conflicting_texts']:,} {name}" for name, found in splits.items() if found["conflicting_texts"]]
    if noisy:
        lines.append(f"The labels are noisy: some texts occur with several labels ({', '.join(noisy)}).")
    if run.data.get("classes_without_training_rows"):
        lines.append("Some classes had no training rows (see Data): expect no right answers there.")
    return "## Limits and intended use\n\n" + bullets(lines)


def impact(run: Run) -> str:
    lines, step = [], run.metrics.get("resumed_from_step")
    part = f" from step {step:,} on, where it was resumed" if step else ""
    if "train_runtime" in run.metrics:
        lines.append(f"Training time{part}, evaluations included: {duration(run.metrics['train_runtime'])}.")
    if run.environment:
        versions = ", ".join(f"{name} {number}" for name, number in run.environment["versions"].items())
        lines += [f"Hardware: {plain(run.environment['hardware'])}.", f"Software: {plain(versions)}."]
    if run.emissions:
        grams = f"{run.emissions['emissions']:.3g} g of CO₂ equivalents"
        lines.append(f"Emissions of training{part}, as {plain(run.emissions['source'])} estimates them: {grams}.")
    else:
        lines.append(
            "Emissions were not measured. After `pip install codecarbon`, `--report_to codecarbon` measures them."
        )
    return "## Environmental impact\n\n" + bullets(lines)


def licence_and_citation(run: Run) -> str:
    lora, quantized = run.settings.get("tuning") == "lora", run.settings.get("quantization") == "4bit"
    focal, halves = (run.settings.get(name, 0) > 0 for name in ("focal_gamma", "consistency"))
    used = {LORA: lora, QLORA: lora and quantized, FOCAL: focal, R_DROP: halves}
    references = "\n".join(reference for reference, is_used in used.items() if is_used)
    return f"""\
## Licence

Of the weights that were trained: {plain(run.licence)}. The encoder and the data have licences of their own, which apply
too.

## Citation

```bibtex
{CITATION}
```

{references}""".rstrip()


# ── Markdown ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table whose cells may be any text; the columns after the first ``text_columns`` hold numbers."""
    lines = [map(plain, header), ["---"] * text_columns + ["---:"] * (len(header) - text_columns)]
    lines += [map(plain, row) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(text: str) -> str:
    """Text on one line that Markdown and HTML show as it is: their characters become numeric entities."""
    special = r"[\\`*\[\]<>|&$~#!]|(?<![^\W_])_|_(?![^\W_])"  # an underscore inside a word means nothing to them
    return re.sub(special, lambda found: f"&#{ord(found[0])};", " ".join(text.split()))


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
