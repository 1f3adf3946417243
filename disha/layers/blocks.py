"""A layer's adapters: Slot is where a weight is, AdapterBlock its block, Adapters all of them.

`Adapters` is the child `disha` of a layer: its blocks by adapter, and which of them act now.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from disha.checks import check_type
from disha.config import AdapterConfig
from disha.effective.contexts import LOOSE, OPEN, Group, Override, current_context
from disha.effective.torch_patches import install
from disha.errors import ArgumentError, ModeError
from disha.functional import Layout, Method, Update, method_of
from disha.functional.layouts import OutputRanges
from disha.functional.routed import Route, Routed
from disha.functional.shard_sums import merge_dtype
from disha.functional.updates import Updates
from disha.layers import compiled
from disha.sharding.tensor_parallel import Split
from disha.sharding.zero import expect, gathered_by, whole_shape

CHILD_NAME = "disha"
"""Name of the one sub-module that adapting adds to a module."""

MERGED = f"{CHILD_NAME}.merged"
"""Key that marks a layer's part of a state dict that was taken while adapters were merged."""


@dataclass(frozen=True)
class Slot:
    """A weight of a module that adapters can have: a parameter, or some rows of one."""

    name: str  # below its module, in targets and files; empty for `weight`
    parameter: str  # the attribute of the module that holds it
    layout: Layout
    rows: OutputRanges = ()  # the adapted outputs; empty for all
    quantized: bool = False  # whether the update is added to the output of the module
    shape: tuple[int, ...] | None = None  # the weight's, if the parameter does not show it


def block_name(method: str) -> str:
    """Return the name of a block of that method in state dicts and files."""
    return f"{method}_block"


class AdapterBlock(nn.Module):
    """One adapter's trainable block of one weight; `split` is the cut of a tensor-parallel plan."""

    slot: Slot
    method: Method
    parameter_name: str
    config: AdapterConfig
    r: int
    scale: float
    dropout: float
    split: Split | None
    awaits_base: bool
    """Whether the block starts with values of W, and has got its memory before W has its values."""
    scale_tensor: Tensor
    """The scale as a 0-dim tensor: compiled code reads it, so scaling compiles nothing again."""

    def __init__(
        self, values: Tensor, slot: Slot, config: AdapterConfig, r: int, split: Split | None
    ) -> None:
        super().__init__()
        # Written to __dict__, because assigning through nn.Module is slow.
        vars(self).update(
            slot=slot,
            method=method_of(config.method),
            parameter_name=block_name(config.method),
            config=config,
            r=r,
            scale=float(config.scale),
            dropout=config.dropout,
            split=split,
            awaits_base=False,
        )
        self._parameters[self.parameter_name] = nn.Parameter(values)
        self.register_buffer("scale_tensor", None, persistent=False)
        self._write_scale()

    @property
    def block(self) -> nn.Parameter:
        """The trainable block D."""
        return self._parameters[self.parameter_name]  # type: ignore[return-value]

    @property
    def r_out(self) -> int | None:
        """Size of the output shard of a tile, else None."""
        return self.config.r_out

    def update(self, on_meta: bool = False, group: Group | None = None) -> Update:
        """Return the update for products with the weight, with the current scale and dropout."""
        # Attributes, not items of `__dict__`: torch 2.15 compiles no guards for those.
        parameters = self._parameters
        values: Any = parameters.get(self.parameter_name)
        if "forward" in self.__dict__:
            # A device hook (accelerate's) replaces forward, and loads the block to its device.
            values = self._from_hook()
        elif type(parameters) is not dict and values is not None:
            # In a forward, the dict of ZeRO-3 gathers the block for the layer that runs; elsewhere,
            # and in compiled code, only its hooks do.
            expect(values)
            values = parameters[self.parameter_name]
            if values.shape != whole_shape(values):
                values = self()
        if values is None:
            raise ModeError(
                "an adapter can't act while its block is part of a flat parameter; use "
                "fully_shard, or FullyShardedDataParallel with use_orig_params=True"
            )
        if values.is_meta and not on_meta:
            raise ModeError(
                "an adapter can't act: its block is on the meta device, where it has no values, "
                "and its weight is not; give the model its weights first and inject afterwards, or "
                "load the block with the model. If accelerate has offloaded it, a hook of the "
                "block must load it: inject first, then offload"
            )
        dropout = self.dropout if self.training else 0.0
        if group is None:
            scale = self.scale
        else:
            name = compiled.factor_name(group.name, self.scale_tensor.device)
            scale = self.scale_tensor * getattr(compiled, name)
        return Update(self.method, values, scale, dropout, self.slot.rows, None, self.r)

    def _from_hook(self) -> Tensor:
        """Return the block after its device hook has loaded it."""
        values = self()
        taken_away = self._parameters.get(self.parameter_name) is not values
        if taken_away and self.training and values.requires_grad and torch.is_grad_enabled():
            raise ModeError(
                "an adapter can't train while its block is offloaded: its hook loads a copy whose "
                "gradient is lost. To train, offload first and inject afterwards, so that blocks "
                "stay on their device; otherwise call model.eval(), or use torch.no_grad()"
            )
        return values

    def forward(self) -> Tensor:
        """Return the block."""
        return self.block

    def reset_parameters(self, start: Tensor | None = None) -> None:
        """Set the block to these values, or as `init` in the configuration says."""
        if self.block.is_meta:
            return  # there are no values
        with gathered_by(self.block, writes=True):
            values = self.block.detach()
            if start is not None:
                values.copy_(start)
            elif self.config.init == "zeros":
                values.zero_()
            else:
                # A block of fewer than two dimensions has no fan-in, so it counts as one row.
                rows = values if values.dim() >= 2 else values.view(1, -1)
                nn.init.kaiming_uniform_(rows, a=math.sqrt(5))
                if self.split is not None:
                    self.split.broadcast_from_first_rank(values)

    def set_scale(self, scale: float) -> None:
        """Set the runtime scale."""
        self.scale = float(scale)
        self._write_scale()

    def reconfigure(self, config: AdapterConfig) -> None:
        """Take the dropout from another configuration with the same shapes, but not the scale."""
        self.config = config
        self.dropout = config.dropout

    def extra_repr(self) -> str:
        """Return the block's description in a model's printout."""
        tile = "" if self.r_out is None else f", r_out={self.r_out}"
        return f"r={self.r}{tile}, shape={tuple(whole_shape(self.block))}, scale={self.scale:g}"

    def _write_scale(self) -> None:
        """Make `scale_tensor` anew: autograd may have saved the old one."""
        # 0-dim, so it never changes a result's dtype; at least float32, so it is not rounded.
        block = self.block
        former = self._buffers["scale_tensor"]
        dtype = merge_dtype(block.dtype).to_real()
        # The tensor of an offloaded block stays on the device to which the block will be loaded.
        device = former.device if block.is_meta and former is not None else block.device
        with torch.inference_mode(False):
            self._buffers["scale_tensor"] = torch.full((), self.scale, dtype=dtype, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterBlock:
        was_on_meta = self.block.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_on_meta and not self.block.is_meta:
            # `to_empty()` gives memory without values, and no checkpoint of the base has them.
            self.reset_parameters()
            self.awaits_base = self.method.replaces
        self._write_scale()  # follows the device, keeps its own dtype, survives to_empty()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.scale_tensor.device != self.block.device:
            self._write_scale()  # load_state_dict(assign=True) has taken the block off meta
        # A base model's checkpoint has no blocks, but must still load strictly. If one has some
        # blocks, a hook of the model (model/buffers.py) adds the others to the missing keys.
        missing_keys = args[2]
        key = prefix + self.parameter_name
        if key in missing_keys:
            missing_keys.remove(key)


@dataclass(frozen=True)
class Original:
    """The original of a merged parameter, for unmerging."""

    weight: Tensor  # the parameter itself if another one replaces it, else its former data
    dense: bool  # whether a dense weight replaces a quantised one
    merged: str | None  # the fingerprint of what merging wrote


@dataclass(frozen=True)
class Merged:
    """The adapters that are merged into a layer, perhaps none, and its former parameters."""

    adapters: tuple[str, ...]
    originals: Mapping[str, Original]


class Adapters(nn.Module):
    """The adapters of one layer, by name, and which of them act.

    If an adapter has only a block for the module's `weight`, `adapters[name]` is that block.
    Otherwise it is a dict of blocks by the names of their weights, of which types do not tell;
    `blocks(name)` has the blocks of any layer.

    If layers share a parameter, one of them has its block, and the others borrow it.
    """

    active: tuple[str, ...]
    merged: Merged | None
    all_blocks: dict[str, dict[str, tuple[AdapterBlock, ...]]]
    """Parameter -> adapter -> its blocks on the parameter, which differ in their rows."""
    active_blocks: dict[str, tuple[AdapterBlock, ...]]
    """Parameter -> the blocks that act on it outside of contexts: none while merged."""
    only_linear_block: AdapterBlock | None
    """The only block that acts on `weight`, if that is a whole matrix (out, in)."""
    group: Group
    """The layers that contexts cover together with this one."""

    def __init__(self, group: Group = LOOSE) -> None:
        super().__init__()
        install()
        vars(self)["merged"] = None
        self.activate(())
        group.take(self)

    def __setattr__(self, name: str, value: Any) -> None:
        # `nn.Module` would refuse `self.training = True` if an adapter is called "training".
        if isinstance(value, nn.Module):
            self._modules[name] = value
        else:
            vars(self)[name] = value

    @property
    def is_dense(self) -> bool:
        """Whether a dense weight that replaces a quantised one is merged in."""
        return self.merged is not None and any(
            original.dense for original in self.merged.originals.values()
        )

    def __iter__(self) -> Iterator[str]:
        yield from list(self._modules)  # a copy: another thread may add one

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, adapter: str) -> AdapterBlock:
        return self._modules[adapter]  # type: ignore[return-value]

    def blocks(self, adapter: str | None = None) -> dict[tuple[str, str], AdapterBlock]:
        """Return (adapter, name of the weight) -> block, of one adapter or of all."""
        found = {}
        for name in self if adapter is None else [adapter]:
            child: Any = self._modules.get(name, {})
            for block in (child,) if isinstance(child, AdapterBlock) else child.values():
                found[name, block.slot.name] = block
        return found

    def add(
        self,
        adapter: str,
        blocks: Sequence[AdapterBlock],
        borrowed: Sequence[tuple[str, AdapterBlock]] = (),
    ) -> None:
        """Add blocks under a name that `check_adapter_name` allows; `activate` takes note of them.

        The borrowed ones are on these parameters, and children of another layer.
        """
        by_name = {block.slot.name or "weight": block for block in blocks}
        child: nn.Module
        if list(by_name) == ["weight"]:
            child = by_name["weight"]
        else:
            child = nn.ModuleDict()
            # Not by the dict's own functions: they refuse names of its methods, such as "keys".
            child._modules.update(by_name)
        child.train(self.training)
        vars(child)["borrowed"] = borrowed
        self._modules[adapter] = child

    def discard(self, adapter: str) -> None:
        """Remove the blocks of an adapter, and deactivate it."""
        self._modules.pop(adapter, None)
        self.activate(tuple(name for name in self.active if name != adapter))

    def set_merged(self, merged: Merged | None) -> None:
        """Note what is merged into the layer: then no block acts."""
        self.merged = merged
        self.activate(self.active)

    def activate(self, adapters: tuple[str, ...]) -> None:
        """Make exactly these adapters act, and store what every forward asks.

        Names that this layer lacks are ignored.
        """
        all_blocks: dict[str, dict[str, tuple[AdapterBlock, ...]]] = {}
        children: dict[str, Any] = dict(self._modules)  # a copy: another thread may add one
        for adapter, child in children.items():
            held = [(block.slot.parameter, block) for block in self.blocks(adapter).values()]
            for parameter, block in (*held, *child.borrowed):
                of_adapters = all_blocks.setdefault(parameter, {})
                of_adapters[adapter] = (*of_adapters.get(adapter, ()), block)
        # Written to __dict__, because assigning through nn.Module is slow.
        vars(self).update(active=adapters, all_blocks=all_blocks)
        names = adapters if self.merged is None else ()
        acting = {parameter: self.blocks_of(names, parameter) for parameter in all_blocks}
        on_weight = acting.get("weight", ())
        only = on_weight[0] if len(on_weight) == 1 else None
        if only is not None and (only.split is not None or only.slot.layout.pattern != "out in"):
            only = None  # only a whole matrix has the short way
        vars(self).update(active_blocks=acting, only_linear_block=only)

    def blocks_of(self, adapters: Iterable[str], parameter: str) -> tuple[AdapterBlock, ...]:
        """The blocks of some adapters on a parameter."""
        by_adapter = self.all_blocks.get(parameter, {})
        blocks: tuple[AdapterBlock, ...] = ()
        for adapter in adapters:
            blocks += by_adapter.get(adapter, ())
        return blocks

    def override(self, compiling: bool = False) -> Override | None:
        """What acts in place of the active adapters: None for no change, () for nothing.

        Compiled code (`compiling`) gets None while adapters are disabled too: there, a factor of
        the scale is 0 (`layers.compiled`).
        """
        if compiling:
            return getattr(compiled, self.group.name)
        context = current_context(self.group) if OPEN else None
        if context is None:
            return None
        return () if context.override is None else context.override

    def blocks_on(self, parameter: str, override: Override | None) -> tuple[AdapterBlock, ...]:
        """The blocks that act on a parameter; of a route, those of all adapters.

        Readers ask the first one what all share, such as the layout, and `updates` for the rest.
        """
        if override is None or self.merged is not None:
            return self.active_blocks.get(parameter, ())
        return self.blocks_of(self if isinstance(override, Route) else override, parameter)

    def updates(
        self, parameter: str, override: Override | None, compiling: bool, on_meta: bool = False
    ) -> Updates:
        """The updates of the blocks that `blocks_on` gives; `compiling` as for `override`."""
        if isinstance(override, Route):
            by_adapter = {
                adapter: self.updates(parameter, (adapter,), compiling, on_meta).every
                for adapter in override.adapters
            }
            return Routed(override, by_adapter)
        group = self.group if compiling else None
        blocks = self.blocks_on(parameter, override)
        return Updates(tuple([block.update(on_meta, group) for block in blocks]))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        install()
        self.group.take(self)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, or the one that it had before it was adapted."""
    cls = type(module)
    if hasattr(cls, "_original_class") and isinstance(module._modules.get(CHILD_NAME), Adapters):
        cls = cls._original_class
    return cls


def check_adapter_name(adapter: str) -> str:
    """Return a name if it can be one part of a state-dict key."""
    check_type("an adapter's name", adapter, str, "a str")
    if not adapter or "." in adapter:
        raise ArgumentError(
            f"{adapter!r} can't name an adapter: a name must not be empty or have a dot"
        )
    return adapter
