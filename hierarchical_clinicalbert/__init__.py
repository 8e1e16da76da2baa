"""Sort medical text into a taxonomy: the names for Python, and the library behind the commands.

The names are loaded when they are used, so a command loads only what it needs. See docs/python.md.

A command imports this package before transformers, which imports bitsandbytes. On CPUs with
bfloat16 products, bitsandbytes loads a kernel from the Hub at its import: code at no pinned commit.
The variable names a folder in its place that does not exist.
"""

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from configuration_hierarchical import HierarchicalConfig as HierarchicalConfig
    from hierarchical_clinicalbert.data.rows import read_rows as read_rows
    from hierarchical_clinicalbert.errors import InputError as InputError
    from hierarchical_clinicalbert.training.arguments import (
        HierarchicalTrainingArguments as HierarchicalTrainingArguments,
    )
    from hierarchical_clinicalbert.training.arguments import ModelArguments as ModelArguments
    from hierarchical_clinicalbert.training.model import build_model as build_model
    from hierarchical_clinicalbert.training.trainer import (
        HierarchicalTrainer as HierarchicalTrainer,
    )
    from modeling_hierarchical import (
        HierarchicalForSequenceClassification as HierarchicalForSequenceClassification,
    )
    from pipeline_hierarchical import (
        HierarchicalTextClassificationPipeline as HierarchicalTextClassificationPipeline,
    )
    from taxonomy_hierarchical import Taxonomy as Taxonomy

os.environ.setdefault("LOCAL_KERNELS", "kernels-community/quantization-bitsandbytes=none")
logging.getLogger("bitsandbytes").setLevel(
    logging.ERROR
)  # it warns of the missing kernel, and of each 8-bit layer's cast

MODULES = {
    "HierarchicalConfig": "configuration_hierarchical",
    "HierarchicalForSequenceClassification": "modeling_hierarchical",
    "HierarchicalTextClassificationPipeline": "pipeline_hierarchical",
    "HierarchicalTrainer": "hierarchical_clinicalbert.training.trainer",
    "HierarchicalTrainingArguments": "hierarchical_clinicalbert.training.arguments",
    "InputError": "hierarchical_clinicalbert.errors",
    "ModelArguments": "hierarchical_clinicalbert.training.arguments",
    "Taxonomy": "taxonomy_hierarchical",
    "build_model": "hierarchical_clinicalbert.training.model",
    "read_rows": "hierarchical_clinicalbert.data.rows",
}
__all__ = [*MODULES]


def __getattr__(name: str) -> Any:
    """Load a name of `MODULES`."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(MODULES[name]), name)
