"""The public API as a type checker sees it: every public name, in use, with the type it has.

Checked by mypy, strictly, and never run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor, nn

import disha
from disha import functional
from disha.config import AdapterConfig

Shape = tuple[int, ...]


def adapting(model: nn.Module) -> None:
    """Any model comes back as a module, and a predicate chooses as a regex does."""
    assert_type(disha.__version__, str)
    assert_type(disha.inject_adapters(model, "all-linear", r=8, method="bat"), nn.Module)
    disha.inject_adapters(
        model,
        lambda name, module: name.endswith("q_proj") and isinstance(module, nn.Linear),
        4,
        r_out=2,
        adapter="second",
        exclude=["head"],
        rank_pattern={"v_proj": 2},
        dropout=0.1,
        scale=0.5,
        dtype=torch.float32,
        init="kaiming",
        freeze=False,
        also_train="norm",
    )
    plan = disha.plan_adapters(model, "q_proj", 8, also_train=["norm"])
    assert_type(plan, disha.Plan)
    assert_type(plan.config, AdapterConfig)
    assert_type((plan.added, plan.trainable, plan.total), tuple[int, int, int])
    assert_type(plan.percent, float)
    assert_type(disha.adapter_parameters(model, "second"), list[nn.Parameter])
    disha.mark_only_adapters_trainable(model)
    disha.inject_adapters(
        model, "mix", 4, layouts={"mix": "in out"}, rows={"qkv": [(0, 8), (16, 24)]}
    )
    checked = disha.check_adapters(model, torch.ones(1, 8))
    assert_type(checked, disha.CheckReport)
    found = disha.summary(model)
    assert_type(found, disha.Summary)
    assert_type(found.percent, float)
    assert_type(disha.remove_adapters(model, "second"), nn.Module)


def configuring() -> None:
    """A configuration is plain data."""
    config = AdapterConfig(r=8, target=None, rank_pattern={"q": 4}, also_train=("norm",))
    assert_type(config.rank_of("layers.0.q_proj"), int)
    assert_type(config.rank_pattern, Mapping[str, int])
    assert_type(AdapterConfig.from_json(config.to_json()), AdapterConfig)
    assert_type(config.changed(scale=2.0), AdapterConfig)


def controlling(model: nn.Module, x: Tensor) -> None:
    """Contexts yield nothing."""
    disha.set_active_adapters(model, "a")
    disha.set_active_adapters(model, ["a", "b"])
    disha.set_adapter_scale(model, 0.5, adapter="a")
    with disha.adapters_active(model, ["a", "b"]) as nothing:
        assert_type(nothing, None)
    with disha.adapters_disabled(model) as nothing:
        assert_type(nothing, None)
    with disha.route_adapters(model, ["a", None]) as nothing:
        assert_type(nothing, None)
    disha.combine_adapters(model, {"a": 0.3, "b": 0.7}, into="c", r=8)
    disha.merge_adapters(model, ["a", "b"], untie=True, dense=True)
    disha.unmerge_adapters(model)


def keeping(model: nn.Module, path: Path) -> None:
    """Paths are str or path-like; reports are data."""
    state = disha.adapter_state_dict(model)
    assert_type(state, dict[str, Tensor])
    report = disha.load_adapter_state_dict(model, state, strict=False)
    assert_type(report, disha.LoadReport)
    assert_type(report.complete, bool)
    disha.save_adapter(model, str(path), metadata={"task": "dialogue"})
    disha.save_adapter(model, path, "second")
    loaded = disha.load_adapter(model, path, layers="q_proj", replace=True, dtype=torch.bfloat16)
    assert_type(loaded, disha.LoadReport)
    file = disha.inspect_adapter(path)
    assert_type(file, disha.AdapterFile)
    assert_type(file.parameters, int)


def layers(x: Tensor) -> None:
    """Layers that have an adapter from birth are linear layers."""
    bone = disha.BoneLinear(8, 16, r=4, r_out=8)
    assert_type(disha.BoneLinear.from_linear(nn.Linear(8, 16), r=4), disha.BoneLinear)
    assert_type(disha.BatLinear.from_linear(nn.Linear(8, 16), r=4), disha.BatLinear)
    linear: nn.Linear = disha.BatLinear(8, 16, False, "cpu", torch.float64, r=4, freeze=False)
    adapted: disha.AdaptedLayer = bone
    block = adapted.disha["default"]
    assert_type(adapted.delta_weight(block), Tensor)
    assert_type(adapted.base_weight, Tensor)
    print(linear(x))


class Mixer(nn.Module):
    """A layer of the user's."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.ones(size, size))


disha.register_layer_kind(Mixer, {"mix": "in out"})


def failing() -> None:
    """Every error is a DishaError, and the built-in that is expected for its cause."""
    errors: list[disha.DishaError] = [disha.ConversionError(), disha.ModeError()]
    values: list[ValueError] = [
        *(disha.ArgumentError(), disha.TargetError()),
        *(disha.AdapterStateError(), disha.AdapterFileError()),
    ]
    unreadable: OSError = disha.AdapterIOError()
    wrong_type: TypeError = disha.ArgumentTypeError()
    not_installed: ImportError = disha.MissingPackageError()
    merged: disha.ModeError = disha.MergeError()
    at_run_time: RuntimeError = merged
    warning: UserWarning = disha.AdapterFileWarning()
    print(errors, values, unreadable, wrong_type, not_installed, at_run_time, warning)


class Everywhere(functional.Method):
    """A method of the user's."""

    name = "everywhere"
    block_axes = 1

    def shape(self, geometry: functional.Geometry, r: int, r_out: int | None) -> Shape:
        return (*geometry.stack, geometry.out_features)

    def delta(
        self, block: Tensor, geometry: functional.Geometry, matrices: Tensor | None
    ) -> Tensor:
        return block.unsqueeze(-1).expand(*block.shape, geometry.in_features)


disha.register_method(Everywhere())


def converting(model: nn.Module, folder: Path) -> None:
    """Reached as `disha.interop`."""
    print(disha.functional.Method, disha.integrations.__doc__)
    disha.interop.peft.export(model, folder)
    assert_type(disha.interop.peft.load(model, folder, replace=True), disha.LoadReport)
    disha.interop.lora.export(model, folder, rank=8)
    assert_type(disha.interop.lora.load(model, folder), disha.LoadReport)
    disha.interop.checkpoints.merge_into_checkpoint(folder, folder / "a", folder / "merged")
