"""A call that raises leaves the model as before: each step of each operation fails once."""

import contextlib

import pytest
import torch
from torch import nn

import disha
from disha.files import loading
from disha.layers import gradient_flags as flags
from disha.layers.blocks import AdapterBlock, Adapters
from disha.model import check, inject, merge, running_statistics, state
from tests.conftest import assert_unchanged, perturb, snapshot

STEPS = [
    *((inject, name) for name in ("make_block", "adapt", "restore", "_guard_encoders")),
    *((flags, name) for name in ("claim", "release", "set_requires_grad", "restore_flags")),
    *((Adapters, name) for name in ("__init__", "add", "discard", "activate")),
    *((AdapterBlock, name) for name in ("reconfigure", "set_scale", "update")),
    *((merge, name) for name in ("_replace", "_set_merged", "_compute_merged", "_get_original")),
    *((module, "write") for module in (state, loading, check, running_statistics)),
]
"""The functions whose calls are the steps of operations."""


class Failed(BaseException):
    """Not an Exception, so that nothing takes it for an error of its own."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, tokens):
        x = self.embed(tokens)
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(self.norm(self.lstm(x)[0].mean(1)))


TOKENS = torch.arange(6).view(2, 3)


def adapted(folder):
    """Two adapters, of which the first is in a file of other values."""
    torch.manual_seed(0)
    model = Net()
    disha.inject_adapters(model, ["head", "attention"], 2, adapter="a", also_train="norm.weight")
    perturb(model)
    disha.save_adapter(model, folder / "a.safetensors", "a")
    disha.set_adapter_scale(perturb(model, seed=1), 0.25, "a")
    model(TOKENS)  # which changes the running statistics
    return disha.inject_adapters(model, ".", 2, adapter="b", init="kaiming")


def merged(folder):
    model = adapted(folder)
    disha.merge_adapters(model)
    return model


OPERATIONS = {
    "inject": (
        lambda model, path: disha.inject_adapters(model, ".", 2, adapter="c", also_train="bias"),
        adapted,
    ),
    "inject first": (lambda model, path: disha.inject_adapters(model, ".", 2), lambda _: Net()),
    "remove one": (lambda model, path: disha.remove_adapters(model, "a"), adapted),
    "remove all": (lambda model, path: disha.remove_adapters(model), adapted),
    "mark": (lambda model, path: disha.mark_only_adapters_trainable(model), adapted),
    "activate": (lambda model, path: disha.set_active_adapters(model, ["a", "b"]), adapted),
    "scale": (lambda model, path: disha.set_adapter_scale(model, 0.5, "a"), adapted),
    "merge": (lambda model, path: disha.merge_adapters(model, ["a", "b"]), adapted),
    "unload": (lambda model, path: disha.merge_adapters(model, unload=True), adapted),
    "unmerge": (lambda model, path: disha.unmerge_adapters(model), merged),
    "load": (lambda model, path: disha.load_adapter(model, path, adapter="c"), lambda _: Net()),
    "replace": (lambda model, path: disha.load_adapter(model, path, "a", replace=True), adapted),
    "replace some": (
        lambda model, path: disha.load_adapter(model, path, "b", replace=True, also_train=False),
        adapted,
    ),
    "combine": (
        lambda model, path: disha.combine_adapters(model, {"a": 0.5}, "c", also_train=False),
        adapted,
    ),
    "load a state": (
        lambda model, path: disha.load_adapter_state_dict(
            model,
            {k: v + 1 for k, v in disha.adapter_state_dict(model, "a").items() if "run" not in k},
            "a",
        ),
        adapted,
    ),
    "check": (lambda model, path: disha.check_adapters(model, TOKENS), adapted),
}


@pytest.mark.parametrize("after", [False, True], ids=["before the step", "after the step"])
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.filterwarnings("ignore")
def test_each_step_may_fail(name, after, tmp_path, monkeypatch):
    operation, make = OPERATIONS[name]
    adapted(tmp_path)
    model, path, left = make(tmp_path), tmp_path / "a.safetensors", [0]

    def failing(step):
        def run(*args, **kwargs):
            left[0] -= 1
            fails = left[0] == 0
            result = None if fails and not after else step(*args, **kwargs)
            if fails:
                raise Failed
            return result

        return run

    for owner, step in STEPS:
        monkeypatch.setattr(owner, step, failing(getattr(owner, step)))
    before, tried = snapshot(model), 0
    while True:
        left[0] = tried + 1
        with contextlib.suppress(Failed):
            operation(model, path)
            break
        tried += 1
        assert_unchanged(model, before)
    assert tried > 0
