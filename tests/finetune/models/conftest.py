"""The demo's model as transformers reads it, once for all tests of models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


def transformers_model(path: Path) -> PreTrainedModel:
    """The model that transformers reads from a GGUF file."""
    model = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    )
    return model.eval()


@pytest.fixture(scope="session")
def smollm_reference(smollm_path: Path) -> PreTrainedModel:
    return transformers_model(smollm_path)
