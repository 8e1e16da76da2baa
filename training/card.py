"""The model card, README.md of a checkpoint, written from the run itself so that it cannot disagree with it."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import PretrainedConfig

from configuration_hierarchical import Taxonomy

TRAINING_SETTINGS = (
    *("learning_rate", "heads_learning_rate", "num_train_epochs", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "warmup_steps", "weight_decay", "label_smoothing_factor", "seed"),
)
NOT_SHOWN = (
    "model_name_or_path",
    "model_revision",
    "cache_dir",
)  # the card names the encoder; the rest is the machine's
HEADLINE_METRICS = (
    *("accuracy", "macro_f1", "weighted_f1", "hierarchical_precision", "hierarchical_recall", "hierarchical_f1"),
    *("log_loss", "ece"),
)


def write(
    folder: Path,
    config: PretrainedConfig,
    settings: dict[str, Any],
    data_report: dict[str, Any],
    metrics: dict[str, Any],
) -> None:
    """Writes README.md into a checkpoint's folder.

    Args:
        config: of the checkpoint.
        settings: the flags that shaped the run.
        data_report: as in data_report.json.
        metrics: as in metrics.json.
    """
    tree = Taxonomy(config.taxonomy, config.label_separator)
    hub_encoder = not Path(config.encoder_name_or_path).is_absolute()
    front = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["hierarchical-text-classification", "medical"],
        base_model=config.encoder_name_or_path if hub_encoder else None,
        base_model_relation=None if not hub_encoder else "adapter" if config.adapter_subfolder else "finetune",
    )
    encoder = config.encoder_name_or_path if hub_encoder else Path(config.encoder_name_or_path).name
    at = f" at revision `{config.encoder_revision}`" if config.encoder_revision else ""
    names = [*HEADLINE_METRICS, *(f"level_{k}_{m}" for k in range(1, tree.depth + 1) for m in ("accuracy", "macro_f1"))]
    splits = [prefix for prefix in ("eval", "test") if f"{prefix}_log_loss" in metrics]
    results = [
        f"| {name} | " + " | ".join(number(metrics.get(f"{prefix}_{name}")) for prefix in splits) + " |"
        for name in names
    ]
    rows = ", ".join(f"{name} {report['rows']:,}" for name, report in data_report["splits"].items())
    text = f"""---
{front.to_yaml()}
---

# A hierarchical text classifier

Sorts a text into a taxonomy of {tree.num_leaves} classes and {tree.depth} levels. Each decision is a softmax over
siblings, so a parent is exactly as probable as its children together, and the logits are log-probabilities of the leaves.

```
{fenced(tree.tree())}
```

## Use

```python
from transformers import pipeline

classify = pipeline("text-classification", model="path/or/repo", trust_remote_code=True)
classify("An abstract.", truncation=True)
```

## Results

Measured on the checkpoint as it is loaded above ({rows} rows).

| | {" | ".join("validation" if prefix == "eval" else prefix for prefix in splits)} |
| --- |{" ---: |" * len(splits)}
{chr(10).join(results)}

## Training

Encoder: `{encoder}`{at}.

| setting | value |
| --- | --- |
{chr(10).join(f"| {name} | {value} |" for name, value in settings.items() if value is not None and name not in NOT_SHOWN)}

## Limits

Not a medical device, and not for diagnosis. It was measured on texts like those it was trained on; on others, measure
first.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def fenced(text: str) -> str:
    """Text that cannot end the code block it stands in."""
    return text.replace("```", "'''")
