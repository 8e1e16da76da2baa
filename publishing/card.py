"""The model card: facts of a run, for the template card.md.jinja, which becomes README.md of a checkpoint.

Worth knowing:

1. The front matter is what the Hub reads. It holds the results as `EvalResult`s, with the numbers of metrics.json.
2. Names of classes, columns and files are user text. `table` and `escape` write characters that Markdown or HTML would
   interpret as numeric entities. The fence around the taxonomy is longer than any row of backticks in it.
3. No path of the machine is written: of a file or a folder, only its name.
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
NOT_SHOWN = (
    "model_name_or_path",
    "model_revision",
    "cache_dir",
)  # the encoder has a sentence; the cache is the machine's
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
    """Write README.md into a checkpoint's folder, where plots and codecarbon's emissions.csv are looked for.

    Args:
        config: of the checkpoint, as it is saved.
        settings: the flags that shaped the run.
        data_report: as in data_report.json, or empty.
        metrics: as in metrics.json, or empty where training is not finished.
        model_id: on the Hub; without one the snippets name a placeholder.
        licence: of the weights, by the Hub's identifier.
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
    """Give a card another id: as the name in its metadata, and where its snippets load the model.

    Args:
        text: of a card, which may have been edited by hand.
        model_id: on the Hub.
        merged: the card will stand beside the whole model, no longer beside an adapter.

    Raises:
        ValueError, yaml.YAMLError: the metadata cannot be read.
    """
    card = ModelCard(text)
    old_id = card.data.model_name or MODEL_PLACEHOLDER
    if card.data.model_name:
        card.data.model_name = model_id
    if merged and card.data.get("base_model_relation") == "adapter":
        card.data.base_model_relation = "finetune"  # the Hub's "merge" is of several models into one
    replaced = {f'"{old_id}"': f'"{model_id}"', f"{PLACEHOLDER_NOTE}\n\n": ""}
    if merged:
        replaced |= dict.fromkeys((ADAPTER_SENTENCE, LOCAL_ADAPTER_SENTENCE), WHOLE_MODEL_SENTENCE)
    for before, after in replaced.items():
        card.text = card.text.replace(before, after)
    return str(card) if card.data.to_dict() else card.text


# ── facts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def collect_facts(
    folder: Path,
    config: HierarchicalConfig,
    settings: dict[str, Any],
    report: dict[str, Any],
    metrics: dict[str, Any],
    environment: dict[str, Any] | None,
) -> dict[str, Any]:
    """Collect what the template shows, and what it takes that from."""
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
        "conflicting": ", ".join(
            f"{counts['conflicting_texts']:,} {split}"
            for split, counts in splits.items()
            if counts["conflicting_texts"]
        ),
        # training
        "continued": start and config.encoder_name_or_path not in (start, str(Path(start).resolve()), Path(start).name),
        "resumed": f" from step {step:,} on, where it was resumed" if step else "",
        "settings_shown": {
            name: format_setting(value)
            for name, value in settings.items()
            if value is not None and name not in NOT_SHOWN
        },
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
    """Name the metrics that the card shows: for each its type on the Hub, and what the card calls it."""
    levels = {
        f"level_{k}_{name}": (METRICS[name][0], f"level {k} {METRICS[name][1]}")
        for k in range(1, depth + 1)
        for name in LEVEL_METRICS
    }
    return METRICS | levels


def hub_encoder(config: HierarchicalConfig) -> str | None:
    """Find the encoder's id on the Hub; None if it came from a folder, and so has no commit."""
    local = Path(config.encoder_name_or_path).is_absolute() or config.encoder_revision is None
    return None if local else config.encoder_name_or_path


def read_source(name: str) -> tuple[str, str | None]:
    """Split a source of the data report into the name that the card shows, and its id if it is a data set on the Hub.

    The report calls a data set ``id [split]``, and a folder saved by `datasets` alike, ``path [split]``.
    """
    matched = re.fullmatch(r"(.+?)( \[[^\[\]]*\])?", name, re.DOTALL)
    place, split = matched.groups(default="") if matched else (name, "")
    if split and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", place) and not Path(place).exists():
        return name, place
    return " ".join(f"{Path(place).resolve().name}{split}".split()), None


def format_setting(setting: Any) -> str:
    """Write a setting as text; of a path, its last part."""
    setting = getattr(setting, "value", setting)  # of an enum of transformers
    if isinstance(setting, (list, tuple)):
        return ", ".join(map(format_setting, setting))
    if isinstance(setting, str) and Path(setting).is_absolute():
        return Path(setting).name
    return f"{setting:g}" if isinstance(setting, float) else str(setting)


def intervals(metrics: dict[str, Any]) -> str:
    """List the bootstrap intervals of scores over all leaves."""
    return "; ".join(
        f"{split} {METRICS[name][1]} {format_score(low)} – {format_score(high)}"
        for key, (low, high) in metrics.get("intervals", {}).items()
        for split, prefix in PREFIXES.items()
        if (name := key.removeprefix(f"{prefix}_")) != key
    )


def quantized_rows(metrics: dict[str, Any], scores: dict[str, dict[str, float]]) -> list[list[str]]:
    """Compare scores over the quantized encoder of training with those over the encoder in full precision."""
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
    """Compare scores before and after calibration and, where there is one, the lexical head."""
    steps, compared = (
        ["uncalibrated"],
        ["log_loss", "ece", *(name for name in names if re.fullmatch(r"level_\d+_ece", name))],
    )
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
    """Find the plots in a folder that the card shows: titles by name."""
    titles = {
        f"confusion_matrix_level_{k}": f"Confusion matrix of the {split} rows, level {k}" for k in range(1, depth + 1)
    }
    titles["reliability_diagram"] = f"Reliability diagram of the {split} rows"
    titles["reliability_diagram_uncalibrated"] = "The same before calibration"
    return {name: title for name, title in titles.items() if (folder / "plots" / f"{name}.png").is_file()}


# ── metadata ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def metadata(facts: dict[str, Any]) -> ModelCardData:
    """Build the front matter, as in https://github.com/huggingface/hub-docs/blob/main/modelcard.md."""
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
        co2_eq_emissions=None if facts["resumed"] else facts["emissions"],  # of all training, or none
    )


def eval_results(facts: dict[str, Any]) -> list[EvalResult]:
    """Build the entries of ``model-index``. Their data set is the split's own source, or the one that it was carved from."""
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
    """Write a Markdown table whose cells may be any text. The columns after the first ``text_columns`` hold numbers."""
    lines = [map(escape, header), ["---"] * text_columns + ["---:"] * (len(header) - text_columns)]
    lines += [map(escape, row) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape(text: str) -> str:
    """Escape text, on one line: characters that Markdown or HTML would interpret become numeric entities."""
    special = r"[\\`*\[\]<>|&$~#!]|(?<![^\W_])_|_(?![^\W_])"  # an underscore inside a word means nothing to them
    return re.sub(special, lambda matched: f"&#{ord(matched[0])};", " ".join(text.split()))


def format_score(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def format_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
