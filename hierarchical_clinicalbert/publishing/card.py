"""Write the model card: collect a run's facts, and render card.md.jinja as README.md of a
checkpoint.

What differs between the two forms of label is in card.<problem_type>.md.jinja. What publishing
writes anew is in card.parts.md.jinja.

Worth knowing:

1. The Hub reads the front matter. It holds the results as `EvalResult`s, with the numbers of
   metrics.json.
2. Names of classes, columns and files are user text, which `escape` makes harmless. Files and
   folders are shown by name, without their path.
3. A card is written before the id on the Hub is final. `update_for_publishing` renders the parts
   with the id again, and keeps what was written by hand outside of them.
"""

import re
from itertools import count
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedTokenizerBase

from configuration_hierarchical import HierarchicalConfig
from hierarchical_clinicalbert.checkpoint_files import SCORE_FILES, encoder_on_hub
from hierarchical_clinicalbert.data.report import list_rows
from hierarchical_clinicalbert.evaluation.forms import form_of
from hierarchical_clinicalbert.evaluation.metrics import PREFIXES, of_all_levels, scores_by_split
from hierarchical_clinicalbert.evaluation.plots import read_description
from hierarchical_clinicalbert.evaluation.report import (
    MEASURED_TARGET,
    headline,
    measured_threshold,
    share_format,
)
from modeling_hierarchical import HierarchicalForSequenceClassification
from pipeline_hierarchical import HierarchicalTextClassificationPipeline
from taxonomy_hierarchical import Taxonomy

TEMPLATE = Path(__file__).parent / "card.md.jinja"
TRAINING_SETTINGS = (
    *("heads_init", "contrastive_steps", "lexical_head"),
    *("focal_gamma", "class_weighting", "consistency"),
    *("teacher", "teacher_weight", "teacher_temperature"),
    *(
        "learning_rate",
        "heads_learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "num_train_epochs",
    ),
    *(
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "optim",
        "weight_decay",
        "label_smoothing_factor",
    ),
    *("load_best_model_at_end", "seed"),
)
PLOTS = {
    "training_curves": "Training curves",
    "reliability_diagram": "Reliability diagram of the {split} rows",
}
# texts of a class that the first lines name as weak: the F1 of fewer is mostly chance
MIN_SUPPORT = 10
SHOWN_ROOTS = 4  # in a title
NOT_SHARES = ("log_loss", "ece")  # types of metrics

MEDICAL_EXAMPLE = (
    "Colonoscopy was performed in 120 patients with suspected inflammatory bowel disease."
)
LICENCE = "apache-2.0"  # of the weights, as an identifier of the Hub
MODEL_PLACEHOLDER = "your-name/your-model"
PARTS = ("use", "result", "loading")  # that publishing writes anew


def write(
    folder: Path,
    config: HierarchicalConfig,
    settings: dict[str, Any],
    data_report: dict[str, Any],
    metrics: dict[str, Any],
    model_id: str | None = None,
    example_result: dict[str, Any] | None = None,
) -> None:
    """Write README.md into a checkpoint's folder, which may also hold plots.

    Args:
        settings: the flags of the run.
        data_report, metrics: content of data_report.json and metrics.json. There are no metrics
            before the end of a run.
        model_id: id on the Hub; None for a placeholder in the snippets.
        example_result: what `classify_example` returns.
    """
    facts = collect_facts(folder, config, settings, data_report, metrics)
    facts["model_id"] = model_id or MODEL_PLACEHOLDER
    has_adapter = config.adapter_subfolder is not None
    facts["part"] = render_parts(
        config, facts["model_id"], example(config), example_result, has_adapter
    )
    card = ModelCard.from_template(metadata(facts), template_path=str(TEMPLATE), **facts)
    (folder / "README.md").write_text(f"{str(card).rstrip()}\n", encoding="utf-8")


def delete_scores(folder: Path) -> None:
    """Delete the scores, predictions and plots of a model."""
    for pattern in SCORE_FILES:
        for file in folder.glob(pattern):
            file.unlink(missing_ok=True)


def delete_description(folder: Path) -> None:
    """Delete the scores of a model before other weights replace it: a killed run must not leave
    those of another model.

    The card, which a person may have edited, is renamed.
    """
    if (folder / "README.md").is_file():
        names = (folder / f"README.previous-{number}.md" for number in count(1))
        (folder / "README.md").replace(next(name for name in names if not name.exists()))
    delete_scores(folder)


def render_parts(
    config: HierarchicalConfig,
    model_id: str,
    text: str,
    example_result: dict[str, Any] | None,
    has_adapter: bool,
) -> dict[str, str]:
    """Render the `PARTS` of a card, each between two comments.

    Args:
        text: the example in the code.
        example_result: what `classify_example` returns for it. None: the card shows no result.
        has_adapter: whether the checkpoint is in the adapter form.
    """
    form = form_of(config.tree, config.problem_type)
    output = printed(example_result) if example_result else ""
    facts = {
        "form_template": form_template(config),
        "placeholder": MODEL_PLACEHOLDER,
        "model_id": model_id,
        "example": text,
        "output": output,
        "fence": fence(output),
        "has_adapter": has_adapter,
        "offers_sets": measured_threshold(form.decisions, config.calibration) is not None,
        "guarantee": form.decisions.guarantee,
    }
    template = TEMPLATE.with_name("card.parts.md.jinja").read_text(encoding="utf-8")
    parts = jinja2.Template(template).make_module(facts)
    return {
        name: "\n".join((start_of(name), getattr(parts, name)(), end_of(name))) for name in PARTS
    }


def start_of(part: str) -> str:
    return f"<!-- {part}: publishing writes this part anew -->"


def end_of(part: str) -> str:
    return f"<!-- end of {part} -->"


def update_for_publishing(
    text: str,
    config: HierarchicalConfig,
    model_id: str,
    merged: bool,
    examples: list[str],
    example_result: dict[str, Any] | None = None,
) -> str:
    """Write the model's id into a card's metadata, and its `PARTS` anew. Other edits by hand are
    kept.

    Args:
        config: of the checkpoint, before an adapter is merged.
        merged: whether to describe the merged model in place of the adapter.
        examples: texts for the widget, the first one also for the code. Without any, the widget
            keeps its own.
        example_result: what `classify_example` returns for the first of them. None: the card keeps
            its own.

    Raises:
        ValueError, yaml.YAMLError: the metadata cannot be read.
    """
    card = ModelCard(text)
    if card.data.model_name:
        card.data.model_name = model_id
    if merged and card.data.get("base_model_relation") == "adapter":
        card.data.base_model_relation = "finetune"  # "merge" on the Hub means several models in one
    if examples:
        card.data.widget = [{"text": example} for example in examples]
    shown = examples[0] if examples else example(config)
    has_adapter = config.adapter_subfolder is not None and not merged
    parts = render_parts(config, model_id, shown, example_result, has_adapter)
    if example_result is None:
        parts.pop("result")
    for name, part in parts.items():
        before, start, rest = card.text.partition(start_of(name))
        _, end, after = rest.partition(end_of(name))
        if start and end:
            card.text = before + part + after
    return str(card) if card.data.to_dict() else card.text  # not with empty metadata


# ── Facts ─────────────────────────────────────────────────────────────────────────────────────────


def collect_facts(
    folder: Path,
    config: HierarchicalConfig,
    settings: dict[str, Any],
    report: dict[str, Any],
    metrics: dict[str, Any],
) -> dict[str, Any]:
    """Collect the template's variables."""
    tree = config.tree
    form = form_of(config.tree, config.problem_type)

    # ── Model, data and training ──────────────────────────────────────────────────────────────────
    drawn = tree.draw()
    origin = report["taxonomy"]
    start = settings.get("model_name_or_path")
    facts = {
        # functions
        "escape": escape,
        "count": "{:,}".format,
        "score": "{:.4f}".format,
        "source_name": source_name,
        # values
        "licence": LICENCE,
        "example": example(config),
        "config": config,
        "settings": settings,
        "report": report,
        "metrics": metrics,
        "tree": tree,
        "encoder": config.encoder_name_or_path if encoder_on_hub(config) else None,
        "drawn": drawn.split("\n"),
        "fence": fence(drawn),
        "form_template": form_template(config),
        "offers_sets": measured_threshold(form.decisions, config.calibration) is not None,
        "guarantee": form.decisions.guarantee,
        "title": config.page.get("title") or default_title(tree),
        "medical": config.page.get("medical", False),
        "continued": start
        and config.encoder_name_or_path
        not in (start, str(Path(start).resolve()), Path(start).name),
        "settings_shown": {
            name: format_setting(value)
            for name, value in settings.items()
            if value is not None
            and name not in ("model_name_or_path", "model_revision")  # a sentence names the encoder
        },
        "taxonomy_source": f"from {Path(origin[5:]).name}"
        if origin.startswith("from ")
        else origin,
        "merged": list_rows(report["merged_rows"]),
    }

    # ── Results ───────────────────────────────────────────────────────────────────────────────────
    scored = scores_by_split(metrics)
    table = of_all_levels(form.metrics, tree.depth)
    titles = {
        f"{PREFIXES[split]}_{name}": f"{split} {metric.title}"
        for split in scored
        for name, metric in table.items()
    }
    best_split = "test" if "test" in scored else "validation"
    num_rows = {split: report["splits"][split]["rows"] for split in scored}
    share = share_format(num_rows.get(best_split, 0))
    digits = 2 + (num_rows.get(best_split, 0) >= 1000)
    worst = sorted(metrics.get("per_class", []), key=lambda row: row["f1"])
    return facts | {
        "scores": {
            split: {name: scores[name] for name in table if name in scores}
            for split, scores in scored.items()
        },
        "metrics_table": table,
        "key_metrics": {name: metric for name, metric in form.metrics.items() if metric.is_key},
        "headline": headline(form, metrics, num_rows),
        "weakest": [row for row in worst if row["support"] >= MIN_SUPPORT][:3],
        "share": share,
        "measured": lambda metric, value: (
            f"{value:.{digits}f}" if metric.hub_type in NOT_SHARES else share(value)
        ),
        "best_split": best_split,
        "intervals": {titles[name]: ends for name, ends in metrics.get("intervals", {}).items()},
        "plots": {
            name: (title.format(split=best_split, level=k), read_description(file))
            for pattern, title in (form.plot_titles | PLOTS).items()
            for k in range(1, tree.depth + 1)
            if (file := folder / "plots" / f"{(name := pattern.format(level=k))}.png").is_file()
        },
    }


def form_template(config: HierarchicalConfig) -> jinja2.Template:
    """Return the template of what differs between the two forms of label."""
    file = TEMPLATE.with_name(f"card.{config.problem_type}.md.jinja")
    return jinja2.Template(file.read_text(encoding="utf-8"))


def default_title(tree: Taxonomy) -> str:
    """Return a title from the names of the roots."""
    roots = tree.children(-1)
    more = ", …" if len(roots) > SHOWN_ROOTS else ""
    return f"Text classifier: {', '.join(tree.names[root] for root in roots[:SHOWN_ROOTS])}{more}"


def example(config: HierarchicalConfig) -> str:
    """Return the text of the card's code: the publisher's first example, or one that suits the
    model.
    """
    tree = config.tree
    leaf = config.tree.labels[0]
    about_leaf = f"A text about {tree.descriptions.get(leaf, tree.names[0])}"
    return next(
        iter(config.page.get("examples", [])),
        MEDICAL_EXAMPLE if config.page.get("medical") else about_leaf,
    )


def classify_example(
    model: HierarchicalForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    text: str | None = None,
) -> dict[str, Any]:
    """Return the pipeline's result for a text, by default of `example`, with a prediction set if
    there are thresholds.
    """
    classify = HierarchicalTextClassificationPipeline(model=model, tokenizer=tokenizer)
    offers_sets = measured_threshold(classify.decisions, model.config.calibration) is not None
    sets: dict[str, Any] = {classify.decisions.guarantee: MEASURED_TARGET} if offers_sets else {}
    return classify(text or example(model.config), **sets)


def printed(result: dict[str, Any]) -> str:
    """Return the nodes of a result of the pipeline, with two decimals, as its fields."""
    fields = [name for name in ("labels", "prediction_set") if name in result]
    shown = {
        one: [{"label": node["label"], "score": round(node["score"], 2)} for node in result[one]]
        for one in fields
    }
    return "\n".join(f"{name}: {nodes}" for name, nodes in shown.items())


def source_name(source: dict[str, Any]) -> str:
    """Return the id of a data set on the Hub, or the name of a file or folder without its path,
    on one line.
    """
    return source["dataset"] or " ".join(Path(source["name"]).name.split())


def format_setting(setting: Any) -> str:
    """Format a setting as text. A path is reduced to its last part."""
    setting = getattr(setting, "value", setting)  # transformers has enums
    if isinstance(setting, (list, tuple)):
        return ", ".join(map(format_setting, setting))
    if isinstance(setting, str) and Path(setting).is_absolute():
        return Path(setting).name
    return f"{setting:g}" if isinstance(setting, float) else str(setting)


# ── Metadata ──────────────────────────────────────────────────────────────────────────────────────


def metadata(facts: dict[str, Any]) -> ModelCardData:
    """Build the front matter, see
    https://github.com/huggingface/hub-docs/blob/main/modelcard.md.
    """
    encoder = facts["encoder"]
    results = eval_results(facts)
    datasets = [source["dataset"] for source in facts["report"]["sources"]]
    lora = ["lora"] if facts["settings"].get("tuning") == "lora" else []
    relation = "adapter" if facts["config"].adapter_subfolder else "finetune"
    medical = ["medical", "clinical"] if facts["medical"] else []
    return ModelCardData(
        license=facts["licence"],
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["hierarchical-text-classification", *medical, *lora],
        base_model=encoder,
        base_model_relation=relation if encoder else None,
        datasets=list(dict.fromkeys(filter(None, datasets))) or None,
        eval_results=results or None,
        model_name=facts["model_id"],
        widget=[
            {"text": text} for text in facts["config"].page.get("examples", [facts["example"]])
        ],
    )


def eval_results(facts: dict[str, Any]) -> list[EvalResult]:
    """Build the entries of ``model-index``.

    Each names the source of its split, or of the rows that the split was taken from.
    """
    sources = {source["split"]: source for source in facts["report"]["sources"]}
    unverified = facts["report"]["trained_before"]["scores"] == "unverified"
    results = []
    for split, values in facts["scores"].items():
        source = sources.get(split) or sources.get("all") or sources["train"]
        results += [
            EvalResult(
                task_type="text-classification",
                dataset_type=source["dataset"] or "unknown",
                dataset_name=source_name(source),
                dataset_split=split,
                metric_type=facts["metrics_table"][metric].hub_type,
                metric_name=f"{metric} (unverified)" if unverified else metric,
                metric_value=value,
            )
            for metric, value in values.items()
        ]
    return results


# ── Markdown ──────────────────────────────────────────────────────────────────────────────────────


def escape(text: str) -> str:
    """Replace characters with a meaning in Markdown or HTML by numeric entities, and put the
    text on one line.
    """
    # an underscore inside a word has no meaning
    special = r"[\\`*\[\]<>|&$~#!]|(?<![^\W_])_|_(?![^\W_])"
    return re.sub(special, lambda matched: f"&#{ord(matched[0])};", " ".join(text.split()))


def fence(text: str) -> str:
    """Return the backticks that can enclose a text as code."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    return "`" * max(3, 1 + longest)
