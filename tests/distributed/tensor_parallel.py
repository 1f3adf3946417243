"""Tensor parallelism on two ranks: it acts, or it raises, before injecting and after."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import disha
from disha import AdaptedLayer, MergeError, ModeError, TargetError
from tests.conftest import perturb, snapshot
from tests.distributed.harness import assert_same, blocks, close, main
from tests.processes import RANKS

PLAN = {"up": ColwiseParallel, "down": RowwiseParallel}
METHODS = ("bone", "bat")


class Feedforward(nn.Module):
    """What tensor parallelism is for: one product cut by columns, the next by rows, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.down(torch.tanh(self.up(x))))


def fresh() -> Feedforward:
    torch.manual_seed(0)
    return Feedforward().double()


def adapted(target: str, method: str = "bone") -> Feedforward:
    model = disha.inject_adapters(fresh(), target, 2, method=method)
    perturb(model)
    return model


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (RANKS,))


def parallel(model: nn.Module) -> nn.Module:
    return parallelize_module(model, mesh(), {name: style() for name, style in PLAN.items()})


def inputs() -> torch.Tensor:
    return torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def check_injecting_into_parallel_weights_is_refused(folder):
    for method in METHODS:
        for target in ("up", "down", "up|down"):
            model = parallel(fresh())
            expected = model(inputs())
            with pytest.raises(TargetError, match="is a DTensor of a tensor-parallel plan"):
                disha.inject_adapters(model, target, 2, method=method)
            assert not any(isinstance(module, AdaptedLayer) for module in model.modules())
            close(model(inputs()), expected)


def check_injecting_beside_parallel_weights(folder):
    """The weights that have no plan are adapted, and a warning names those that have one."""
    for method in METHODS:
        model = parallel(fresh())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            disha.inject_adapters(model, "all-linear", 2, method=method)
        (warning,) = (one for one in caught if "DTensor" in str(one.message))
        assert "selects 2 weights that can't be adapted: up: " in str(warning.message)
        assert [name for name, one in model.named_modules() if isinstance(one, AdaptedLayer)] == [
            "head"
        ]
        perturb(model)
        plain = adapted("head", method)
        close(model(inputs()), plain(inputs()))
        for of in (model, plain):
            of(inputs()).square().sum().backward()
        for block, expected in zip(
            disha.adapter_parameters(model), disha.adapter_parameters(plain), strict=True
        ):
            close(block.grad, expected.grad)


def check_parallelizing_beside_adapted_weights(folder):
    for method in METHODS:
        model, plain = parallel(adapted("head", method)), adapted("head", method)
        close(model(inputs()), plain(inputs()))


def check_parallelizing_adapted_weights_raises(folder):
    """Torch refuses a plan for them. It has cut W by then, and the forward refuses that."""
    for method in METHODS:
        for target in ("up", "down", "up|down"):
            model = adapted(target, method)
            with pytest.raises((KeyError, AttributeError)):
                parallel(model)
            with pytest.raises(ModeError, match="merge the adapter first"):
                model(inputs())
            with pytest.raises(MergeError, match="sharded parameters"):
                disha.merge_adapters(model)


def check_merged_weights_can_be_parallelized(folder):
    for method in METHODS:
        model = adapted("all-linear", method)
        expected = model(inputs())
        disha.merge_adapters(model)
        plain = fresh()
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if "disha" not in k})
        close(parallel(plain)(inputs()), expected)


def check_replicated_weights_act(folder):
    """`distribute_module` makes DTensors of blocks too: products compute with both."""
    for method in METHODS:
        model, plain = adapted("all-linear", method), adapted("all-linear", method)
        distribute_module(model, mesh())
        weight = model.up.weight
        assert weight.shape == (12, 8)
        assert weight.device.type == "cpu"
        x = DTensor.from_local(inputs(), mesh(), [Replicate()])
        expected, output = plain(inputs()), model(x)
        close(output.full_tensor(), expected)
        output.full_tensor().square().sum().backward()
        expected.square().sum().backward()
        for block, other in zip(
            disha.adapter_parameters(model), disha.adapter_parameters(plain), strict=True
        ):
            close(block.grad.full_tensor(), other.grad)
        assert_same(blocks(model), blocks(plain))
        with disha.adapters_disabled(model):
            close(model(x).full_tensor(), fresh()(inputs()))
        disha.save_adapter(model, folder / method)
        disha.save_adapter(plain, folder / f"{method}-{dist.get_rank()}")
        plain_bytes = (folder / f"{method}-{dist.get_rank()}").read_bytes()
        assert (folder / method).read_bytes() == plain_bytes


def check_routed_samples_of_replicated_weights_are_refused(folder):
    model = distribute_module(adapted("up"), mesh())
    x = DTensor.from_local(inputs(), mesh(), [Replicate()])
    with disha.route_adapters(model, ["default", None] * 2), pytest.raises(ModeError):
        model(x)


def check_a_refused_injection_changes_nothing(folder):
    model = parallel(fresh())
    before = snapshot(model)
    values = before.pop("values")
    with pytest.raises(TargetError):
        disha.inject_adapters(model, "up", 2)
    after = snapshot(model)
    after.pop("values")
    assert after == before
    assert set(values) == set(model.state_dict())


if __name__ == "__main__":
    main(globals())
