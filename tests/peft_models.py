"""What the tests of PEFT's folders share: small models, and reading and changing a folder."""

import json
from contextlib import contextmanager

import safetensors.torch
import torch
from torch import nn

from disha import AdapterFileError, ConversionError
from tests import language_models
from tests.conftest import perturb, refused


class Net(nn.Module):
    """Names that end alike, sizes that 4 does not divide, a buffer, biases here and there."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(10, 6)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(6, 6, bias=False), "v": nn.Linear(6, 6)})
            for _ in range(3)
        )
        self.scale = nn.Parameter(torch.ones(6))
        self.norm = nn.BatchNorm1d(6)
        self.q = nn.Linear(6, 4)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x):
        x = self.inner(x)
        for layer in self.layers:
            x = x + torch.tanh(layer["q"](x)) * layer["v"](x)
        return self.head(self.q(self.norm(x * self.scale)))


def net():
    torch.manual_seed(0)
    return Net().double().eval()


def llama():
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return language_models.llama(hidden_size=12, intermediate_size=20, **heads).double().eval()


INPUTS = {
    net: torch.sin(torch.arange(30, dtype=torch.float64)).view(3, 10),
    llama: torch.arange(14).view(2, 7),
}


def output(model, make):
    with torch.no_grad():
        found = model(INPUTS[make])
    return found.logits if make is llama else found


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def perturb_all(model, also_train=()):
    """Give blocks and what else was trained other values."""
    perturb(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in also_train:
                parameter.add_(torch.randn_like(parameter) * 0.3)


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def tensors_of(folder):
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def rewrite(folder, tensors=None, **fields):
    """Change fields of a folder's configuration, or its tensors; `...` takes a field away."""
    config = {**config_of(folder), **fields}
    config = {field: value for field, value in config.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if tensors is not None:
        safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")


def with_fields(**fields):
    """Return what changes fields of the configuration of a folder."""
    return lambda folder: rewrite(folder, **fields)


def with_tensor(key, change):
    """Return what puts `change` of a tensor, or of None, into a folder; None takes it away."""

    def apply(folder):
        tensors = tensors_of(folder)
        full = f"base_model.model.{key}"
        tensors[full] = change(tensors.get(full))
        rewrite(folder, {key: tensor for key, tensor in tensors.items() if tensor is not None})

    return apply


@contextmanager
def refused_export(tmp_path, model, message, kind=ConversionError):
    """The body raises with this message, and neither the folder nor the model has changed."""
    with refused(model, kind, message):
        yield
    assert list(tmp_path.iterdir()) == []


def refused_to_load(folder, form, model, reason, kind=AdapterFileError):
    """The folder is refused for this reason, and the model stays as it was."""
    with refused(model, kind) as caught:
        form.load(model, folder)
    assert reason in str(caught.value), str(caught.value)
    assert str(folder) in str(caught.value)


def assert_same_folders(first, second):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
