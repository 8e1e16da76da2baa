"""Run the common tests of transformers, which it runs over each of its models, over ours.

The tests come from the source distribution of the installed version, which `make test` fetches,
because wheels hold no tests.
"""

import importlib
import sys
import types
import unittest
import warnings
from importlib.metadata import version

import pytest
import torch
from conftest import ROOT

from configuration_hierarchical import HierarchicalConfig
from modeling_hierarchical import HierarchicalForSequenceClassification

SOURCES = ROOT / ".venv" / f"transformers-{version('transformers')}" / "tests"
if not SOURCES.is_dir():
    pytest.skip(f"{SOURCES} is not there: `make test` fetches it", allow_module_level=True)

REFUSED = (
    "design: a checkpoint that lacks weights is refused; transformers would draw these at random"
)
EXCLUDED = {
    "test_can_init_all_missing_weights": REFUSED,
    "test_correct_missing_keys": REFUSED,
    "test_model_weights_reload_no_missing_tied_weights": REFUSED,
}


def common_tests() -> types.ModuleType:
    """Import tests/test_modeling_common.py, with empty classes for two that the source distribution
    leaves out.
    """
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(SOURCES)]
    sys.modules[package.__name__] = package
    for name, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        module = types.ModuleType(f"{package.__name__}.{name}")
        setattr(module, mixin, type(mixin, (), {}))
        sys.modules[module.__name__] = module
    with warnings.catch_warnings(action="ignore"):  # of marks that are not registered here
        return importlib.import_module(f"{package.__name__}.test_modeling_common")


class TinyModel:
    """Provide what the common tests need: the configuration of a tiny model, its sizes, and
    inputs.
    """

    batch_size = 5
    seq_length = 7
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    is_training = True

    def get_config(self) -> HierarchicalConfig:
        text_config = {
            "model_type": "bert",
            "vocab_size": 99,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "intermediate_size": 37,
            "max_position_embeddings": 64,
        }
        return HierarchicalConfig(
            text_config=text_config, taxonomy={"a": {"b": ["c", "d"], "e": None}, "f": None}
        )

    def prepare_config_and_inputs_for_common(
        self,
    ) -> tuple[HierarchicalConfig, dict[str, torch.Tensor]]:
        ids = torch.randint(1, 99, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class TestModel(common_tests().ModelTesterMixin, unittest.TestCase):
    all_model_classes = (HierarchicalForSequenceClassification,)
    _is_composite = True

    def setUp(self) -> None:
        self.model_tester = TinyModel()

    def _prepare_for_class(
        self, inputs_dict: dict, model_class: type, return_labels: bool = False
    ) -> dict:
        """Add labels on request: the common tests know only the classes of transformers that take
        labels.
        """
        inputs = super()._prepare_for_class(inputs_dict, model_class)
        return inputs | (
            {"labels": torch.zeros(self.model_tester.batch_size).long()} if return_labels else {}
        )


for name, reason in EXCLUDED.items():
    setattr(TestModel, name, unittest.skip(reason)(getattr(TestModel, name)))
