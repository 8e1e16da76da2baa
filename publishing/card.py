"""Write the model card: collect a run's facts, and render card.md.jinja as README.md of a checkpoint.

Worth knowing:

1. The Hub reads the front matter. It holds the results as `EvalResult`s, with the numbers of metrics.json.
2. Names of classes, columns and files are user text. `table` and `escape` replace characters with a meaning in Markdown or
   HTML by numeric entities. The fence around the taxonomy is longer than any run of backticks in it.
3. The card holds names of files and folders, never their paths.
4. A card is written before the id on the Hub is final. `rename` replaces the id, and keeps edits made by hand.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from configuration_hierarchical import HierarchicalConfig
from publishing.environment import read_emissions

TEMPLATE = Path(__file__).parent / "card.md.jinja"
TRAINING_SETTINGS = (
    *("learning_rate", "heads_learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "optim", "weight_decay", "label_smoothing_factor"),
    *("load_best_model_at_end", "seed"),
)
NOT_SHOWN = ("model_name_or_path", "model_revision")  # a sentence names the encoder
METRICS = {  # name in metrics.json, without its prefix: (type on the Hub, title in the card)
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
CLASSES_SHOWN = 20  # per level, in the data section
LEAVES_SHOWN = 50  # in the results
NODES_SHOWN = 200  # in the drawn taxonomy

MODEL_PLACEHOLDER = "your-name/your-model"
PLACEHOLDER_NOTE = f"`{MODEL_PLACEHOLDER}` stands for the model's id on the Hub; the checkpoint's folder works too."
ADAPTER_SENTENCE = (
    "The repository holds the heads and a PEFT adapter (`adapter/`), which is added to the encoder as it is loaded. The\n"
    "encoder is downloaded from its own repository, at the revision named below."
)
LOCAL_ADAPTER_SENTENCE = (
    "The checkpoint holds the heads and a PEFT adapter (`adapter/`), which is added to the encoder as it is loaded. The\n"
    "encoder came from a folder, not from the Hub: the checkpoint loads only where that folder is."
)
WHOLE_MODEL_SENTENCE = "The repository holds the whole model, with the encoder's weights."


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
    """Write README.md into a checkpoint's folder, which may also hold plots and codecarbon's emissions.csv.

    Args:
        config: the saved configuration.
        settings: the flags of the run.
        data_report: content of data_report.json, or empty.
        metrics: content of metrics.json, or empty before training is finished.
        model_id: id on the Hub; None for a placeholder in the snippets.
        licence: of the weights, as an identifier of the Hub.
        environment: from `publishing.environment.describe_environment`.
    """
    facts = collect_facts(folder, config, settings, data_report, metrics, environment)
    facts |= {"model_id": model_id or MODEL_PLACEHOLDER, "licence": licence}
    facts["placeholder_note"] = "" if model_id else PLACEHOLDER_NOTE
    helpers = {"escape": escape, "table": table, "count": "{:,}".format, "score": format_score}
    helpers["duration"] = format_duration
    card = ModelCard.from_template(metadata(facts), template_path=str(TEMPLATE), **facts, **helpers)
    (folder / "README.md").write_text(f"{str(card).rstrip()}\n", encoding="utf-8")


def rename(text: str, model_id: str, merged: bool = False) -> str:
    """Replace the model's id in a card's metadata and snippets.

    Args:
        text: the card, possibly edited by hand.
        model_id: the new id on the Hub.
        merged: whether to describe the merged model in place of the adapter.

    Raises:
        ValueError, yaml.YAMLError: the metadata cannot be read.
    """
    card = ModelCard(text)
    old_id = card.data.model_name or MODEL_PLACEHOLDER
    if card.data.model_name:
        card.data.model_name = model_id
    if merged and card.data.get("base_model_relation") == "adapter":
        card.data.base_model_relation = "finetune"  # "merge" on the Hub means several models in one
    replacements = {f'"{old_id}"': f'"{model_id}"', f"{PLACEHOLDER_NOTE}\n\n": ""}
    if merged:
        replacements |= dict.fromkeys((ADAPTER_SENTENCE, LOCAL_ADAPTER_SENTENCE), WHOLE_MODEL_SENTENCE)
    for before, after in replacements.items():
        card.text = card.text.replace(before, after)
    return str(card) if card.data.to_dict() else card.text


# ── Facts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def collect_facts(
    folder: Path,
    config: HierarchicalConfig,
    settings: dict[str, Any],
    report: dict[str, Any],
    metrics: dict[str, Any],
    environment: dict[str, Any] | None,
) -> dict[str, Any]:
    """Collect the template's variables."""
    tree, splits, encoder = config.tree, report.get("splits", {}), hub_encoder(config)
    names = metric_names(tree.depth)
    scores = {
        split: {name: metrics[f"{prefix}_{name}"] for name in names if f"{prefix}_{name}" in metrics}
        for split, prefix in PREFIXES.items()
        if f"{prefix}_log_loss" in metrics
    }
    adapter = ADAPTER_SENTENCE if encoder else LOCAL_ADAPTER_SENTENCE
    drawn = tree.tree().split("\n")
    start, step = settings.get("model_name_or_path"), metrics.get("resumed_from_step")
    origin, best_split = report.get("taxonomy", ""), "test" if "test" in scores else "validation"
    moved = report.get("trained_before", {}).get("rows", {})
    classes = sorted(metrics.get("per_class", []), key=lambda row: -row["support"])
    leaf_rows = sum(row["support"] for row in classes)
    conflicting = {split: counts.get("conflicting_texts", 0) for split, counts in splits.items()}
    shown = {name: value for name, value in settings.items() if value is not None and name not in NOT_SHOWN}
    return {
        **{"config": config, "settings": settings, "report": report, "metrics": metrics, "scores": scores},
        **{"tree": tree, "encoder": encoder, "environment": environment},
        **{"classes_shown": CLASSES_SHOWN, "leaves_shown": LEAVES_SHOWN},
        # the model
        "form": adapter if config.adapter_subfolder else WHOLE_MODEL_SENTENCE,
        "drawn": "\n".join(drawn[:NODES_SHOWN]),
        "hidden_nodes": len(drawn) - NODES_SHOWN,
        "fence": "`" * max(3, 1 + max(map(len, re.findall("`+", "\n".join(drawn))), default=0)),
        # data
        "sources": [{**source, "name": read_source(source["name"])[0]} for source in report.get("sources", [])],
        "taxonomy_source": f"from {Path(origin[5:]).name}" if origin.startswith("from ") else origin,
        "moved": " and ".join(f"{rows:,} {split} rows" for split, rows in moved.items() if rows and split != "train"),
        "conflicting": ", ".join(f"{texts:,} {split}" for split, texts in conflicting.items() if texts),
        # training
        "continued": start and config.encoder_name_or_path not in (start, str(Path(start).resolve()), Path(start).name),
        "resumed": f" from step {step:,} on, where it was resumed" if step else "",
        "settings_shown": {name: format_setting(value) for name, value in shown.items()},
        "emissions": read_emissions(folder, metrics, environment),
        # results
        "unverified": report.get("trained_before", {}).get("scores") == "unverified",
        "chosen": settings.get("load_best_model_at_end"),
        "best_split": best_split,
        "scored_rows": ", ".join(f"{splits[split]['rows']:,} {split} rows" for split in scores if split in splits),
        "leaf_rows": leaf_rows if leaf_rows != splits.get(best_split, {}).get("rows", leaf_rows) else 0,
        "score_rows": [
            [title, *(format_score(values.get(name)) for values in scores.values())]
            for name, (_, title) in names.items()
            if any(name in values for values in scores.values())
        ],
        "intervals": intervals(metrics),
        "classes": classes,
        "quantized_rows": quantized_rows(metrics, scores),
        "uncalibrated": any(name.startswith("uncalibrated_") for name in metrics),
        "calibration_rows": calibration_rows(metrics, scores, names),
        "plots": plots(folder, best_split, tree.depth),
    }


def metric_names(depth: int) -> dict[str, tuple[str, str]]:
    """Return the metrics of the card, with the per-level metrics, in the form of `METRICS`."""
    levels = {
        f"level_{k}_{name}": (METRICS[name][0], f"level {k} {METRICS[name][1]}")
        for k in range(1, depth + 1)
        for name in LEVEL_METRICS
    }
    return METRICS | levels


def hub_encoder(config: HierarchicalConfig) -> str | None:
    """Return the encoder's id on the Hub, or None for an encoder from a folder, which has no commit."""
    local = Path(config.encoder_name_or_path).is_absolute() or config.encoder_revision is None
    return None if local else config.encoder_name_or_path


def read_source(name: str) -> tuple[str, str | None]:
    """Return the shown name of a source in the data report, and the id if the source is a data set on the Hub.

    The report names a data set ``id [split]``. A folder saved by `datasets` looks alike: ``path [split]``.
    """
    matched = re.fullmatch(r"(.+?)( \[[^\[\]]*\])?", name, re.DOTALL)
    place, split = matched.groups(default="") if matched else (name, "")
    if split and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", place) and not Path(place).exists():
        return name, place
    return " ".join(f"{Path(place).resolve().name}{split}".split()), None


def format_setting(setting: Any) -> str:
    """Format a setting as text. A path is reduced to its last part."""
    setting = getattr(setting, "value", setting)  # transformers has enums
    if isinstance(setting, (list, tuple)):
        return ", ".join(map(format_setting, setting))
    if isinstance(setting, str) and Path(setting).is_absolute():
        return Path(setting).name
    return f"{setting:g}" if isinstance(setting, float) else str(setting)


def intervals(metrics: dict[str, Any]) -> str:
    """Format the bootstrap intervals of accuracy and macro-F1."""
    return "; ".join(
        f"{split} {METRICS[name][1]} {format_score(low)} – {format_score(high)}"
        for key, (low, high) in metrics.get("intervals", {}).items()
        for split, prefix in PREFIXES.items()
        if (name := key.removeprefix(f"{prefix}_")) != key
    )


def quantized_rows(metrics: dict[str, Any], scores: dict[str, dict[str, float]]) -> list[list[str]]:
    """Compare scores over the quantized encoder in training with scores over the encoder in full precision."""
    rows = []
    for split, values in scores.items():
        for name in ("accuracy", "macro_f1", "hierarchical_f1", "log_loss"):
            trained = metrics.get(f"quantized_{PREFIXES[split]}_{name}")
            if trained is not None and name in values:
                full = metrics.get(f"uncalibrated_{PREFIXES[split]}_{name}", values[name])
                rows.append(
                    [f"{split} {METRICS[name][1]}", format_score(trained), format_score(full), f"{full - trained:+.4f}"]
                )
    return rows


def calibration_rows(
    metrics: dict[str, Any], scores: dict[str, dict[str, float]], names: dict[str, tuple[str, str]]
) -> list[list[str]]:
    """Compare scores before and after calibration, and without the lexical head if there is one."""
    steps = ["uncalibrated"]
    compared = ["log_loss", "ece", *(name for name in names if re.fullmatch(r"level_\d+_ece", name))]
    if metrics.get("lexical_weight"):
        steps.append("without_lexical_head")
        compared = ["accuracy", "macro_f1", "hierarchical_f1", *compared]  # temperatures alone change few predictions
    rows = []
    for split, values in scores.items():
        for name in compared:
            before = [metrics.get(f"{step}_{PREFIXES[split]}_{name}") for step in steps]
            if before[0] is not None and name in values:
                rows.append([f"{split} {names[name][1]}", *map(format_score, before), format_score(values[name])])
    return rows


def plots(folder: Path, split: str, depth: int) -> dict[str, str]:
    """Find the folder's plots; return their titles by name."""
    levels = range(1, depth + 1)
    titles = {f"confusion_matrix_level_{k}": f"Confusion matrix of the {split} rows, level {k}" for k in levels}
    titles["reliability_diagram"] = f"Reliability diagram of the {split} rows"
    titles["reliability_diagram_uncalibrated"] = "The same before calibration"
    return {name: title for name, title in titles.items() if (folder / "plots" / f"{name}.png").is_file()}


# ── Metadata ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def metadata(facts: dict[str, Any]) -> ModelCardData:
    """Build the front matter, see https://github.com/huggingface/hub-docs/blob/main/modelcard.md."""
    encoder, results = facts["encoder"], eval_results(facts)
    types = {result.metric_type for result in results}
    datasets = [read_source(source["name"])[1] for source in facts["report"].get("sources", [])]
    lora = ["lora"] if facts["settings"].get("tuning") == "lora" else []
    relation = "adapter" if facts["config"].adapter_subfolder else "finetune"
    return ModelCardData(
        license=facts["licence"],
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["hierarchical-text-classification", "medical", "clinical", *lora],
        base_model=encoder,
        base_model_relation=relation if encoder else None,
        datasets=list(dict.fromkeys(filter(None, datasets))) or None,
        metrics=[kind for kind in HUB_METRICS if kind in types] or None,
        eval_results=results or None,
        model_name=facts["model_id"],
        co2_eq_emissions=None if facts["resumed"] else facts["emissions"],  # the whole training's, or none
    )


def eval_results(facts: dict[str, Any]) -> list[EvalResult]:
    """Build the entries of ``model-index``. Their data set is the split's source, or the source of the rows it was split from."""
    sources = {source["split"]: source["name"] for source in facts["report"].get("sources", [])}
    names = metric_names(facts["tree"].depth)
    results = []
    for split, values in facts["scores"].items():
        source = sources.get(split) or sources.get("all") or sources.get("train")
        name, dataset = read_source(source) if source else ("held-out rows", None)
        results += [
            EvalResult(
                task_type="text-classification",
                dataset_type=dataset or "unknown",
                dataset_name=dataset or name,
                dataset_split=split,
                metric_type=names[metric][0],
                metric_name=f"{metric} (unverified)" if facts["unverified"] else metric,
                metric_value=value,
            )
            for metric, value in values.items()
            if not metric.endswith("_by_chance")  # a property of the sample, not of the model
        ]
    return results


# ── Markdown ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """Format a Markdown table, with any text in its cells. The columns after the first ``text_columns`` hold numbers."""
    lines = [map(escape, header), ["---"] * text_columns + ["---:"] * (len(header) - text_columns)]
    lines += [map(escape, row) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape(text: str) -> str:
    """Replace characters with a meaning in Markdown or HTML by numeric entities, and put the text on one line."""
    special = r"[\\`*\[\]<>|&$~#!]|(?<![^\W_])_|_(?![^\W_])"  # an underscore inside a word has no meaning
    return re.sub(special, lambda matched: f"&#{ord(matched[0])};", " ".join(text.split()))


def format_score(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def format_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
