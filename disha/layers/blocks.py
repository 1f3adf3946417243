"""The adapters of a layer.

- `Slot` says which weight of a module a block is for.
- `AdapterBlock` is an adapter's block for one weight.
- `Adapters` is the child module `disha` of a layer: its blocks by adapter, and which of them act.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from disha.checks import check_type
from disha.config import AdapterConfig
from disha.effective.contexts import OPEN_CONTEXTS, Group, Override, current_context
from disha.effective.torch_patches import install
from disha.errors import ArgumentError, ModeError
from disha.functional import Geometry, Layout, Method, Update
from disha.functional.layouts import OutputRanges
from disha.functional.new_rows import NewRows
from disha.functional.routed import Route, Routed
from disha.functional.shard_sums import merge_dtype
from disha.functional.weight_updates import Updates, WithNewRows
from disha.layers import compiled
from disha.layers.containers import CHILD_NAME
from disha.layers.model_record import ModelRecord
from disha.private_torch import gives_empty_memory
from disha.sharding.tensor_parallel import Split
from disha.sharding.zero import gathered_parameter, restart_trace, whole_shape

SCALE = "scale"
"""Key in the state dict of a block whose scale is not that of its configuration."""

MERGED = f"{CHILD_NAME}.merged"
"""Key in the state dict of a layer whose weights were merged when it was taken."""


@dataclass(frozen=True)
class Slot:
    """A weight of a module that can be adapted: a parameter, or some outputs of one.

    Attributes:
        name: its name in targets and files, behind that of the module; empty for `weight`.
        parameter: the module's attribute that has it.
        layout: its layout.
        output_ranges: the outputs that the slot is for; empty for all.
        quantized: whether it is quantised: then a hook adds the update to the module's output.
        shape: the shape of the weight, if the parameter is stored in another form.
    """

    name: str
    parameter: str
    layout: Layout
    output_ranges: OutputRanges = ()
    quantized: bool = False
    shape: tuple[int, ...] | None = None


class AdapterBlock(nn.Module):
    """The trainable block of one adapter for one weight.

    Attributes:
        slot: the weight.
        geometry: the sizes of the weight, or of the outputs that the block adapts.
        method: the method, which says what dW is; `ROWS` for new rows, which have none.
        parameter_name: the name of D among the parameters of this module.
        config: the configuration of the adapter.
        r: the block's own shard size; that of the configuration may be another one.
        scale: runtime scale s.
        dropout: probability of zeroing each of the block's inputs in training.
        split: how tensor parallelism divides the weight, and with it the block, or None.
        scale_tensor: the scale as a 0-dim tensor. Compiled code reads it, so that it need not be
            compiled again for a new scale.
    """

    slot: Slot
    geometry: Geometry
    is_new_rows = False
    method: Method
    parameter_name: str
    config: AdapterConfig
    r: int
    dropout: float
    split: Split | None
    scale_tensor: Tensor

    def __init__(
        self,
        values: Tensor,
        slot: Slot,
        geometry: Geometry,
        method: Method,
        config: AdapterConfig,
        r: int,
        split: Split | None,
    ) -> None:
        super().__init__()
        # Written to __dict__, because assigning through nn.Module is slow.
        vars(self).update(
            slot=slot,
            geometry=geometry,
            method=method,
            parameter_name=method.block_name,
            config=config,
            r=r,
            dropout=config.dropout,
            split=split,
        )
        vars(self)["_scale"] = self._first_scale
        self._parameters[method.block_name] = nn.Parameter(values)
        self.register_buffer("scale_tensor", None, persistent=False)
        self._write_scale()

    @property
    def _first_scale(self) -> float:
        """The scale with which the adapter begins."""
        return float(self.config.scale)

    @property
    def block(self) -> nn.Parameter:
        """The trainable block D."""
        return self._parameters[self.parameter_name]  # type: ignore[return-value]

    @property
    def scale(self) -> float:
        """The runtime scale s; a new one acts at once, also in compiled code."""
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self._scale = float(scale)
        self._write_scale()

    @property
    def r_out(self) -> int | None:
        """Size of the output shard of a tile, else None."""
        return self.config.r_out

    def make_update(self, on_meta: bool = False, group: Group | None = None) -> Update:
        """Return the update for products with the weight, with the current scale and dropout.

        `on_meta` is as in `read_values`. `group` is given while compiling: the scale is then a
        tensor, times the group's factor.
        """
        values = self.read_values(on_meta)
        dropout = self.dropout if self.training else 0.0
        scale = self._scale if group is None else self.scale_tensor * self._read_factor(group)
        return Update(self.method, values, scale, dropout, self.slot.output_ranges)

    def _read_factor(self, group: Group) -> Tensor:
        """Return what compiled code multiplies by: 0 where a context disables adapters, else 1."""
        return getattr(compiled, compiled.factor_name(group.name, self.scale_tensor.device))

    def read_values(self, on_meta: bool = False) -> Tensor:
        """Return D, which a product reads.

        With `on_meta`, it may be on the meta device, because the weight is too.
        """
        # D is the parameter itself, unless accelerate, ZeRO-3 or FSDP keeps it elsewhere.
        # Read as attributes: torch 2.15 compiles no guards for items of `__dict__`.
        parameters = self._parameters
        values: Any = parameters.get(self.parameter_name)
        if "forward" in self.__dict__:  # that of a hook of accelerate
            values = self._load_by_hook()
        elif type(parameters) is not dict and values is not None:  # that of ZeRO-3
            values = self._gather_from_zero(values)
        if values is None:
            raise ModeError(
                "an adapter can't act while its block is pruned or parametrised (undo it with "
                "torch.nn.utils.prune.remove or parametrize.remove_parametrizations), or part of a "
                "flat parameter (use fully_shard, or FullyShardedDataParallel with "
                "use_orig_params=True)"
            )
        if values.is_meta and not on_meta:
            raise ModeError(
                "an adapter can't act: its block is on the meta device and has no values, but its "
                "weight has; give the model its weights first and inject afterwards, or load the "
                "block with the model. If accelerate offloads the model, inject first, then offload"
            )
        return values

    def _gather_from_zero(self, parameter: Any) -> Tensor:
        """Return the block with the values that ZeRO-3 gathers from all ranks."""
        restart_trace(parameter)
        # ZeRO-3 has put a dict of its own here. In a forward, looking the block up gathers it;
        # elsewhere, and in compiled code, only the hooks of a call of this module do.
        values: Any = self._parameters[self.parameter_name]
        return values if values.shape == whole_shape(values) else self()

    def _load_by_hook(self) -> Tensor:
        """Return the block on the device to which accelerate's hook of `forward` loads it."""
        values = self()
        is_copy = self._parameters.get(self.parameter_name) is not values
        if is_copy and self.training and values.requires_grad and torch.is_grad_enabled():
            raise ModeError(
                "an adapter can't train while its block is offloaded, because the gradient of the "
                "copy that is loaded is lost. To train, offload first and inject afterwards: then "
                "blocks stay on their device. Otherwise call model.eval(), or use torch.no_grad()"
            )
        return values

    def forward(self) -> Tensor:
        """Return the block."""
        return self.block

    def reset_parameters(self) -> None:
        """Set the block as `init` in the configuration says."""
        if self.block.is_meta:
            return  # it has no values
        with gathered_parameter(self.block, writes=True):
            values = self.block.detach()
            layout = self.slot.layout
            if self.config.init == "zeros":
                self.method.start(self.method.matrix_block(layout, values), self.geometry, layout)
            else:
                # A vector has no fan-in, so it counts as one row.
                matrix = values if values.dim() >= 2 else values.view(1, -1)
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
            # Ranks that share a block start with the same values, also if their seeds differ.
            if self.split is not None:
                self.split.broadcast_from_first_rank(values)

    def reconfigure(self, config: AdapterConfig) -> None:
        """Take another configuration with the same shapes, but keep the scale."""
        self.config = config
        self.dropout = config.dropout

    def extra_repr(self) -> str:
        """Return the block's description in a model's printout."""
        parts = [f"method={self.method.name}", f"r={self.r}"]
        if self.r_out is not None:
            parts.append(f"r_out={self.r_out}")
        parts += [f"shape={tuple(whole_shape(self.block))}", f"scale={self.scale:g}"]
        return ", ".join(parts)

    def _write_scale(self) -> None:
        """Replace `scale_tensor` by a new one: autograd may have saved the old one."""
        # It is 0-dim, so that it changes no result's dtype, and at least float32, so that it is not
        # rounded.
        block = self.block
        former = self._buffers["scale_tensor"]
        dtype = merge_dtype(block.dtype).to_real()
        device = block.device
        if block.is_meta and former is not None:
            device = former.device  # to which an offloaded block will be loaded
        with torch.inference_mode(False):
            self._buffers["scale_tensor"] = torch.full((), self._scale, dtype=dtype, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterBlock:
        was_on_meta = self.block.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        lost_values = was_on_meta or gives_empty_memory(fn)
        if lost_values and not self.block.is_meta:
            # No checkpoint of the base has values for the new memory.
            self._fill_new_memory()
        self._write_scale()  # follows the device, keeps its own dtype, survives to_empty()
        return self

    def _fill_new_memory(self) -> None:
        self.reset_parameters()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._scale != self._first_scale:  # else an equal model has it
            destination[prefix + SCALE] = torch.tensor(self._scale, dtype=torch.float64)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        *args: Any,
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, *args
        )
        if prefix + self.parameter_name in state_dict:
            self.scale = float(state_dict.get(prefix + SCALE, self._first_scale))
        if prefix + SCALE in unexpected_keys:
            unexpected_keys.remove(prefix + SCALE)
        if self.scale_tensor.device != self.block.device:
            self._write_scale()  # load_state_dict(assign=True) has taken the block off meta


class NewRowsBlock(AdapterBlock):
    """The new rows of one adapter for one table: the values of the rows in `slot.output_ranges`.

    They have no method, no scale and no dropout, and no setting changes their values. They start
    with those of W. Where they have lost their values to new memory, they are NaN, until the base
    is loaded or the rows themselves.
    """

    is_new_rows = True
    _first_scale = 1.0

    def make_update(self, on_meta: bool = False, group: Group | None = None) -> Any:
        """Return the rows for products with the table; arguments are as in `AdapterBlock`."""
        acts = None if group is None else self.scale_tensor * self._read_factor(group) != 0
        return NewRows(self.read_values(on_meta), self.slot.output_ranges, acts)

    def reset_parameters(self) -> None:
        """Do nothing: only the layer knows the rows of W (`layers.adapted.reset_parameters`)."""

    @property
    def scale(self) -> float:
        """1: a row is replaced, so there is no update to scale."""
        return 1.0

    @scale.setter
    def scale(self, scale: float) -> None:
        pass  # `set_adapter_scale` sets the scale of all blocks of an adapter

    @property
    def r_out(self) -> None:
        """No output shard."""

    def _fill_new_memory(self) -> None:
        with gathered_parameter(self.block, writes=True):
            self.block.detach().fill_(math.nan)


@dataclass(frozen=True)
class Original:
    """What unmerging needs of a merged parameter."""

    weight: Tensor  # the former parameter, if another one stands in for it, or else its data
    was_quantized: bool  # whether a dense weight stands in for a quantised one
    written: Mapping[torch.dtype, int]  # the checksums of what merging wrote (layers/fingerprints)


@dataclass(frozen=True)
class Merged:
    """The adapters that are merged into a layer, if any, and the originals of its parameters."""

    adapters: tuple[str, ...]
    originals: Mapping[str, Original]


class Adapters(nn.Module):
    """The adapters of one layer, by name, and which of them act.

    If an adapter has one block here, and that is for the module's `weight`, `adapters[name]` is the
    block. Otherwise it is a dict of blocks by the names of their weights. `blocks_by_name(name)`
    returns the blocks in both cases.

    If layers share a parameter, one of them has its block, and the others borrow it.
    """

    merged: Merged | None
    _active: tuple[str, ...]
    all_blocks: dict[str, dict[str, tuple[AdapterBlock, ...]]]
    """Parameter -> adapter -> its blocks for the parameter, each for other outputs."""
    active_blocks: dict[str, tuple[AdapterBlock, ...]]
    """Parameter -> the blocks that act on it outside of contexts; none while merged."""
    only_linear_block: AdapterBlock | None
    """The block that acts on `weight`, if it is the only one, and `weight` a whole matrix."""
    group: Group
    """The layers that the same contexts cover."""
    record: ModelRecord
    """What the adapters of the model remember of it."""
    names: tuple[str, ...]
    """The names of the layer in the record."""

    def __init__(self, record: ModelRecord, names: tuple[str, ...]) -> None:
        super().__init__()
        install()
        self.merged = None
        self.active = ()
        self.belong_to(record, names)
        record.group.take(self)

    def belong_to(self, record: ModelRecord, names: tuple[str, ...]) -> None:
        """Set the record of the model, and the names of the layer there."""
        former = vars(self).get("record", record)
        former.members.discard(self)
        record.members.add(self)
        vars(self).update(record=record, names=names)

    def __setattr__(self, name: str, value: Any) -> None:
        # `nn.Module` would refuse `self.training = True` if an adapter is called "training".
        if isinstance(value, nn.Module):
            self._modules[name] = value
        else:
            object.__setattr__(self, name, value)

    def forward(self, input: Any) -> Any:
        """Return the input, for code that runs each child of a layer in turn."""
        return input

    def train(self, mode: bool = True) -> Adapters:
        """Set the mode of the blocks, and warn if none trains, as after PEFT has frozen all."""
        if mode and "peft" in sys.modules:
            blocks = [block.block for blocks in self.active_blocks.values() for block in blocks]
            if blocks and not any(block is None or block.requires_grad for block in blocks):
                warnings.warn(
                    f"adapter {self.active[0]!r} is frozen, so it will not train; if a peft_config "
                    "has frozen it, leave that out, because it adds an adapter of PEFT instead",
                    stacklevel=2,
                )
        return super().train(mode)

    @property
    def is_dense(self) -> bool:
        """Whether a dense merged weight stands in for a quantised one."""
        if self.merged is None:
            return False
        return any(original.was_quantized for original in self.merged.originals.values())

    def __iter__(self) -> Iterator[str]:
        yield from list(self._modules)  # a copy: another thread may add one

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, adapter: str) -> AdapterBlock:
        """Return the block of an adapter, or the dict of its blocks."""
        return self._modules[adapter]  # type: ignore[return-value]

    def blocks_by_name(self, adapter: str | None = None) -> dict[tuple[str, str], AdapterBlock]:
        """Return (adapter, name of the weight) -> block, of one adapter or of all."""
        names = list(self) if adapter is None else [adapter]
        blocks = {}
        for name in names:
            child: Any = self._modules.get(name, {})
            if isinstance(child, AdapterBlock):
                blocks[name, child.slot.name] = child
                continue
            for block in child.values():
                blocks[name, block.slot.name] = block
        return blocks

    def add(
        self,
        adapter: str,
        blocks: Sequence[AdapterBlock],
        borrowed: Sequence[tuple[str, AdapterBlock]] = (),
    ) -> None:
        """Add the blocks of an adapter; `activate` makes them act.

        `borrowed` names parameters of this layer whose blocks are children of another layer.
        """
        by_name = {block.slot.name or "weight": block for block in blocks}
        child: nn.Module
        if list(by_name) == ["weight"]:
            child = by_name["weight"]
        else:
            child = nn.ModuleDict()
            # A ModuleDict refuses the names of its methods as keys, such as "keys".
            child._modules.update(by_name)
        child.train(self.training)
        vars(child)["borrowed"] = borrowed
        self._modules[adapter] = child

    def discard(self, adapter: str) -> None:
        """Remove the blocks of an adapter, and deactivate it."""
        self._modules.pop(adapter, None)
        self.active = tuple(name for name in self.active if name != adapter)

    def set_merged(self, merged: Merged | None) -> None:
        """Set what is merged into the layer; while it is merged, no block acts."""
        self.merged = merged
        self._sort_blocks()

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that act. New ones act at once; those that this layer lacks are ignored."""
        return self._active

    @active.setter
    def active(self, adapters: tuple[str, ...]) -> None:
        self._active = adapters
        self._sort_blocks()

    def _sort_blocks(self) -> None:
        """Store the blocks of each parameter, and those that act: every forward asks for them."""
        all_blocks: dict[str, dict[str, tuple[AdapterBlock, ...]]] = {}
        children: dict[str, Any] = dict(self._modules)  # a copy: another thread may add one
        for adapter, child in children.items():
            own_blocks = self.blocks_by_name(adapter).values()
            placed = [(block.slot.parameter, block) for block in own_blocks]
            for parameter, block in (*placed, *child.borrowed):
                of_adapters = all_blocks.setdefault(parameter, {})
                of_adapters[adapter] = (*of_adapters.get(adapter, ()), block)
        self.all_blocks = all_blocks
        names = self.active if self.merged is None else ()
        acting = {parameter: self.blocks_for(parameter, names) for parameter in all_blocks}
        only = None
        on_weight = acting.get("weight", ())
        if len(on_weight) == 1:
            (block,) = on_weight
            is_whole_matrix = block.split is None and block.slot.layout.pattern == "out in"
            if is_whole_matrix and not block.is_new_rows:
                only = block
        # Assigned as an attribute, `only` would become a child.
        vars(self).update(active_blocks=acting, only_linear_block=only)

    def blocks_for(self, parameter: str, adapters: Iterable[str]) -> tuple[AdapterBlock, ...]:
        """Return the blocks for a parameter that these adapters have, whether they act or not.

        New rows come last, because they replace what the others give.
        """
        by_adapter = self.all_blocks.get(parameter, {})
        blocks: list[AdapterBlock] = []
        for adapter in adapters:
            blocks += by_adapter.get(adapter, ())
        if len(blocks) > 1:
            blocks.sort(key=lambda block: block.is_new_rows)
        return tuple(blocks)

    def find_override(self, compiling: bool = False) -> Override | None:
        """Return what acts in place of the active adapters, or None if no context covers the layer.

        Where a context disables adapters, this is (): nothing acts. Compiled code (`compiling`)
        gets None there, and multiplies scales by 0 (`layers.compiled`).
        """
        if compiling:
            return getattr(compiled, self.group.name)
        context = current_context(self.group) if OPEN_CONTEXTS else None
        return None if context is None else context.override

    def acting_blocks(self, parameter: str, override: Override | None) -> tuple[AdapterBlock, ...]:
        """Return the blocks that act on a parameter; for a route, those of its adapters."""
        if override is None or self.merged is not None:  # while merged, the active ones are none
            return self.active_blocks.get(parameter, ())
        if isinstance(override, Route):
            # One without adapters still checks the number of samples, so it gets any blocks.
            override = override.adapters or tuple(self)
        return self.blocks_for(parameter, override)

    def updates(
        self, parameter: str, override: Override | None, compiling: bool, on_meta: bool = False
    ) -> Updates:
        """Return the updates of the blocks that act on a parameter.

        `compiling` and `on_meta` are as in `AdapterBlock.make_update`.
        """
        group = self.group if compiling else None
        chosen: dict[Any, Override | None] = {None: override}
        if isinstance(override, Route):
            chosen = {name: (name,) for name in override.adapters}
        updates_of: dict[Any, tuple[Update, ...]] = {}
        rows_of: dict[Any, list[NewRows]] = {}
        for adapter, names in chosen.items():
            made: list[Any] = []
            rows: list[Any] = []
            for block in self.acting_blocks(parameter, names):
                kind = rows if block.is_new_rows else made
                kind.append(block.make_update(on_meta, group))
            updates_of[adapter] = tuple(made)
            rows_of[adapter] = rows
        if isinstance(override, Route):
            updates: Updates = Routed(override, updates_of)
        else:
            updates = Updates(updates_of[None])
        return WithNewRows(updates, rows_of) if any(rows_of.values()) else updates

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        install()
        self.group.take(self)
        self.record.members.add(self)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module has, or had before it was adapted."""
    cls = type(module)
    if hasattr(cls, "_original_class") and isinstance(module._modules.get(CHILD_NAME), Adapters):
        cls = cls._original_class
    return cls


def check_adapter_name(adapter: str) -> str:
    """Return an adapter's name, or raise if it can't be a part of a state-dict key."""
    check_type("an adapter's name", adapter, str, "a str")
    if not adapter or "." in adapter:
        raise ArgumentError(
            f"{adapter!r} can't name an adapter: the name must not be empty or contain a dot"
        )
    return adapter
