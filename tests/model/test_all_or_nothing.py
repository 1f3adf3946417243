"""A call that raises leaves the model as before.

Operations on whole models (`disha.model`, `disha.files`) change them through what is below them:
the layers and the sharding. Each such call is a step that may fail, before it has done anything or
just after it. The steps of an operation are recorded first. Then the operation runs many times,
and each time another step fails, where most has been changed: the last time that it is taken.
"""

import inspect
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import disha
from tests.conftest import assert_unchanged, perturb, seed_torch, snapshot

PACKAGE = Path(disha.__file__).parent
OPERATIONS_IN = tuple(str(PACKAGE / name) for name in ("model", "files"))
STEPS_IN = tuple(str(PACKAGE / name) for name in ("layers", "sharding"))


class Failed(BaseException):
    """Not an Exception, so that nothing takes it for an error of its own."""


class Steps:
    """The steps of an operation: their places in the code, and how often each is taken."""

    def __init__(self, failing=None):
        self.taken = Counter()
        self.failing = failing  # a step, and the number of times at which it fails

    def __enter__(self):
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def _note(self, frame, event, _):
        if event not in ("call", "return") or not frame.f_code.co_filename.startswith(STEPS_IN):
            return
        if frame.f_code.co_flags & inspect.CO_GENERATOR:
            return  # one that is left early raises where nobody can catch it
        caller = frame.f_back
        if caller is not None and caller.f_code.co_filename.startswith(OPERATIONS_IN):
            step = event, caller.f_code, frame.f_code
            self.taken[step] += 1
            if self.failing == (step, self.taken[step]):
                sys.setprofile(None)
                raise Failed


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        layer = nn.TransformerEncoderLayer(8, 2, 4, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, tokens):
        x = self.embed(tokens)
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(self.norm(self.encoder(self.lstm(x)[0]).mean(1)))


TOKENS = torch.arange(6).view(2, 3)


def plain(folder):
    return Net()


def adapted(folder):
    """Two adapters, of which the first is in a file of other values."""
    seed_torch(0)
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


# --- the operations: each gets a model, and the path of a file of its first adapter ---------------


def inject(model, path):
    disha.inject_adapters(model, ".", 2, adapter="c", also_train="bias")


def inject_the_first(model, path):
    disha.inject_adapters(model, ".", 2)


def remove_one(model, path):
    disha.remove_adapters(model, "a")


def remove_all(model, path):
    disha.remove_adapters(model)


def mark_trainable(model, path):
    disha.mark_only_adapters_trainable(model)


def activate(model, path):
    disha.set_active_adapters(model, ["a", "b"])


def scale(model, path):
    disha.set_adapter_scale(model, 0.5, "a")


def merge(model, path):
    disha.merge_adapters(model, ["a", "b"])


def unload(model, path):
    disha.merge_adapters(model, unload=True)


def unmerge(model, path):
    disha.unmerge_adapters(model)


def load(model, path):
    disha.load_adapter(model, path, adapter="c")


def replace(model, path):
    disha.load_adapter(model, path, "a", replace=True)


def replace_blocks_only(model, path):
    disha.load_adapter(model, path, "b", replace=True, also_train=False)


def combine(model, path):
    disha.combine_adapters(model, {"a": 0.5}, "c", also_train=False)


def load_a_state(model, path):
    state = disha.adapter_state_dict(model, "a")
    other = {key: value + 1 for key, value in state.items() if "running" not in key}
    disha.load_adapter_state_dict(model, other, "a")


def check(model, path):
    disha.check_adapters(model, TOKENS)


OPERATIONS = (
    (plain, inject_the_first),
    (plain, load),
    (adapted, inject),
    (adapted, remove_one),
    (adapted, remove_all),
    (adapted, mark_trainable),
    (adapted, activate),
    (adapted, scale),
    (adapted, merge),
    (adapted, unload),
    (adapted, replace),
    (adapted, replace_blocks_only),
    (adapted, combine),
    (adapted, load_a_state),
    (adapted, check),
    (merged, unmerge),
)


@pytest.mark.parametrize(("make", "operation"), OPERATIONS)
@pytest.mark.filterwarnings("ignore")
def test_each_step_may_fail(make, operation, tmp_path):
    adapted(tmp_path)
    path = tmp_path / "a.safetensors"
    recorded = make(tmp_path)
    with Steps() as steps:
        operation(recorded, path)
    assert steps.taken
    model = make(tmp_path)
    before = snapshot(model)
    for step, count in steps.taken.items():
        with pytest.raises(Failed), Steps(failing=(step, count)):
            operation(model, path)
        assert_unchanged(model, before)
