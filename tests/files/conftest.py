import pytest
import torch

import disha
from tests.adapter_files import trained


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


@pytest.fixture
def saved(path):
    """A model whose adapter is in the file at `path`."""
    model = trained()
    with torch.no_grad():
        model.layers[0]["attn"].norm.weight.add_(0.5)
    disha.save_adapter(model, path)
    return model
