"""The public API as a type checker sees it: every public name, in use, with the type it has.

Checked by mypy, strictly, and never run (`tests/test_typing.py` holds that no name is left out).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import assert_type

import disha
from disha import functional
from disha.files import AdapterHeader, LayerRecord, TensorRecord
from disha.functional import Layout, Method, Reduced, Rows, Scale, Update
from disha.interop import checkpoints, lora, peft
from disha.interop.checkpoints import Finding, MergedCheckpoint
from disha.interop.low_rank import LoraLayer, LoraReport
from disha.interop.peft import BaseShapes, PeftFolder
from disha.layers import Block
from disha.plan import PlannedLayer, SkippedModule
from disha.summaries import LayerSummary

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
    assert_type(plan.layers, tuple[PlannedLayer, ...])
    assert_type(plan.skipped, tuple[SkippedModule, ...])
    assert_type(plan.config, disha.AdapterConfig)
    assert_type((plan.added, plan.trainable, plan.total), tuple[int, int, int])
    assert_type(plan.percent, float)
    assert_type(disha.adapter_parameters(model, "second"), Iterator[nn.Parameter])
    disha.mark_only_adapters_trainable(model)
    disha.inject_adapters(
        model, "mix", 4, layouts={"mix": "in out"}, rows={"qkv": [(0, 8), (16, 24)]}
    )
    checked = disha.check_adapters(model, torch.ones(1, 8))
    assert_type(checked, disha.CheckReport)
    found = disha.summary(model)
    assert_type(found, disha.Summary)
    assert_type(found.layers, tuple[LayerSummary, ...])
    assert_type(found.percent, float)
    assert_type(disha.remove_adapters(model, "second"), nn.Module)


def configuring() -> None:
    """A configuration is plain data."""
    config = disha.AdapterConfig(r=8, target=None, rank_pattern={"q": 4}, also_train=("norm",))
    assert_type(config.rank_of("layers.0.q_proj"), int)
    assert_type(config.rank_pattern, Mapping[str, int])
    assert_type(disha.AdapterConfig.from_json(config.to_json()), disha.AdapterConfig)
    assert_type(config.changed(scale=2.0), disha.AdapterConfig)


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
    with disha.enable_input_gradients(model, after=[model]) as handle:
        assert_type(handle, disha.InputGradients)
    handle.remove()


def keeping(model: nn.Module, path: Path) -> None:
    """Paths are str or path-like; reports are data."""
    state = disha.adapter_state_dict(model)
    assert_type(state, dict[str, Tensor])
    report = disha.load_adapter_state_dict(model, state, strict=False)
    assert_type(report, disha.LoadReport)
    assert_type(report.complete, bool)
    assert_type(report.wrong_shape, tuple[tuple[str, Shape, Shape], ...])
    disha.save_adapter(model, str(path), metadata={"task": "dialogue"})
    disha.save_adapter(model, path, "second")
    loaded = disha.load_adapter(model, path, layers="q_proj", replace=True, dtype=torch.bfloat16)
    assert_type(loaded, disha.LoadReport)
    file = disha.inspect_adapter(path)
    assert_type(file, disha.AdapterFile)
    assert_type(file.layers, tuple[LayerRecord, ...])
    assert_type(file.tensors, Mapping[str, TensorRecord])
    assert_type(file.parameters, int)


def layers(x: Tensor) -> None:
    """Layers that have an adapter from birth are linear layers."""
    bone = disha.BoneLinear(8, 16, r=4, r_out=8)
    assert_type(disha.BoneLinear.from_linear(nn.Linear(8, 16), r=4), disha.BoneLinear)
    assert_type(disha.BatLinear.from_linear(nn.Linear(8, 16), r=4), disha.BatLinear)
    linear: nn.Linear = disha.BatLinear(8, 16, False, "cpu", torch.float64, r=4, freeze=False)
    adapted: disha.AdaptedLayer = bone
    block: Block = adapted.disha["default"]
    assert_type(adapted.geometry(), disha.Geometry)
    assert_type(adapted.delta_weight(block), Tensor)
    assert_type(adapted.base_weight, Tensor)
    assert_type(adapted.merged_weight(["default"]), Tensor)
    assert_type(block.update(), Update)
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


def computing(x: Tensor, weight: Tensor, block: Tensor, scale: Scale) -> None:
    """The mathematics goes from tensors to tensors."""
    tensors = [
        functional.shard_sum(x, 4, dtype=torch.float32, dim=-2),
        functional.bone_delta(x, block, 16, scale),
        functional.bone_delta_weight(block, 8, 16),
        functional.bone_forward(x, weight, None, block, scale),
        functional.bat_delta_weight(weight, block),
        functional.bat_forward(x, weight, None, block, scale),
        functional.embedding_delta(x, block, 16, padding_idx=0),
        functional.merged_weight(weight, [(weight, scale)]),
        functional.weighted_sum([(block, 0.5)]),
        functional.added(x, x),
        functional.routed_bone_delta(x, [block], [scale], x),
        functional.take_rows(x, ((0, 2),), dim=0),
        functional.place_rows(x, ((0, 2),), 4),
    ]
    assert_type(tensors, list[Tensor])
    assert_type(functional.shard_count(10, 4), int)
    assert_type(functional.bone_lora_factors(block, 8, 16), tuple[Tensor, Tensor])
    with functional.without_autocast(x.device):
        pass


def asking_the_table(block: Tensor, weight: Tensor) -> None:
    """Every method answers for every layout."""
    layout = functional.layout_of(functional.PATTERNS[0])
    assert_type(layout, Layout)
    assert_type(layout.turned(), Layout | None)
    assert_type(functional.METHODS, dict[str, Method])
    assert_type(functional.method_of("bat"), Method)
    assert_type(functional.method_names(lambda method: method.additive), str)
    rows: Rows = ((0, 2), (4, 6))
    geometry = layout.geometry(weight.shape, rows)
    assert_type(geometry, functional.Geometry)
    assert_type(functional.block_shape("bone", layout, weight.shape, 4, r_out=2, rows=rows), Shape)
    assert_type(functional.stack_of("bone", layout, block.shape), Shape)
    assert_type(functional.misfit("bone", layout, geometry, 4), str | None)
    assert_type(functional.delta_weight("bone", layout, block, weight, rows), Tensor)
    assert_type(functional.widened("bone", layout, block, 2, 4), Tensor | None)
    factors = functional.lora_factors("bone", layout, block, geometry)
    assert_type(factors, tuple[Tensor, Tensor] | None)
    kept = functional.kept_block("bone", layout, functional.matrix_block("bone", layout, block))
    assert_type(kept, Tensor)


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


functional.METHODS[Everywhere.name] = Everywhere()


def multiplying(x: Tensor, weight: Tensor, block: Tensor, ends: Tensor) -> None:
    """A product takes a weight and its updates."""
    updates = [Update("bone", block, 0.5), Update("bat", block, dropout=0.1, rows=((0, 2),))]
    matrix, kernel, index = Layout("out in"), Layout("out in *kernel"), Layout("index out")
    conv = F.conv1d

    def embed(indices: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
        return F.embedding(indices, table)

    look_up: functional.Product = embed
    tensors = [
        functional.effective_weight(weight, matrix, updates),
        functional.adapted_linear(x, weight, None, updates),
        functional.adapted_stack(x, weight, updates),
        functional.adapted_grouped(torch._grouped_mm, x, weight, ends, updates),
        functional.adapted_product(conv, x, weight, None, kernel, updates, groups=2),
        functional.update_product(look_up, ends, weight, index, updates[0]),
    ]
    assert_type(tensors, list[Tensor])
    assert_type(functional.reduced_updates(updates, matrix, 16), list[Reduced])
    part = ((0, 2), (0, 8))
    assert_type(functional.update_of_part(updates[0], matrix, (4, 8), part), list[Update] | None)
    assert_type(functional.update_of_rows(updates[0], 0, 2, 16), list[Update] | None)


def converting(model: nn.Module, folder: Path) -> None:
    """Reached as `disha.interop`, or imported from it."""
    disha.interop.peft.export(model, folder, dropout=0.0, task_type="CAUSAL_LM")
    assert_type(disha.interop.peft.load(model, folder, replace=True), disha.LoadReport)
    found = peft.read_folder(folder)
    assert_type(found, PeftFolder)
    assert_type(found.blocks, dict[str, Tensor])
    assert_type(found.without(["head.weight"]), PeftFolder)
    shapes: BaseShapes = {"0.weight": (16, 8)}
    header, tensors = peft.contents_of(found, shapes)
    assert_type(header, AdapterHeader)
    assert_type(tensors, dict[str, Tensor])
    peft.write_folder(folder, header, tensors)
    report = disha.interop.lora.export(model, folder, rank=8, max_error=0.1)
    assert_type(report, LoraReport)
    assert_type(report.layers, tuple[LoraLayer, ...])
    assert_type(lora.export_tensors(model), tuple[dict[str, Tensor], dict[str, Any]])
    assert_type(lora.load(model, folder), disha.LoadReport)
    assert_type(lora.read_lora(folder), tuple[AdapterHeader, dict[str, Tensor]])
    assert_type(lora.write_lora(folder, header, tensors), LoraReport)
    assert_type(lora.export_gguf(model, folder / "a.gguf", heads=4), LoraReport)
    assert_type(lora.write_gguf(folder / "a.gguf", header, tensors), LoraReport)


def merging_on_disk(base: Path, adapter: Path) -> None:
    """Checkpoints are opened, compared and merged without a model."""
    checkpoint = checkpoints.open_checkpoint(base)
    assert_type(checkpoint, checkpoints.Checkpoint)
    assert_type(checkpoint.tensor("0.weight"), Tensor)
    assert_type(checkpoints.base_shapes(checkpoint, ["0.weight"])("0.weight"), Shape | None)
    header = disha.inspect_adapter(adapter)
    assert_type(checkpoints.base_weights(checkpoint, header)("0"), Tensor)
    report = checkpoints.verify_against(base, adapter)
    assert_type(report, checkpoints.BaseReport)
    assert_type(report.missing, tuple[Finding, ...])
    made = checkpoints.merge_into_checkpoint(base, adapter, base / "merged", scale=0.5)
    assert_type(made, MergedCheckpoint)
