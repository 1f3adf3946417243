"""Block: the small module that owns one trainable block, and Slot: the weight that it adapts.

A block knows its numbers, its scale and its dropout. How it acts is the business of
`disha.functional`, by the name of its method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from disha.config import AdapterConfig
from disha.errors import ModeError
from disha.functional import Layout, Rows, Update

__all__ = ["Block", "Slot", "block_name"]


@dataclass(frozen=True)
class Slot:
    """A weight of a module that adapters can have: a parameter, or some rows of one.

    Attributes:
        name: what targets and files call it below its module: its own name, empty for `weight`.
        parameter: the attribute of the module that holds it.
        layout: the parameter's layout.
        rows: the outputs that are adapted, where not all of the parameter's are.
        linear: whether `"all-linear"` means it.
        opaque: whether the module's product is added to, and the weight itself is not replaced.
        shape: the weight's shape where it can't be told from the parameter, else None.
    """

    name: str
    parameter: str
    layout: Layout
    rows: Rows = ()
    linear: bool = False
    opaque: bool = False
    shape: tuple[int, ...] | None = None


def block_name(method: str) -> str:
    """Return what state dicts and files call a block of that method.

    Args:
        method: the method.
    """
    return f"{method}_block"


def _lasting() -> AbstractContextManager[object]:
    """Return a context in which tensors that can be trained are made.

    A tensor made in inference mode can't be trained, even after that mode ends.
    """
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


class Block(nn.Module):
    """One adapter's trainable block of one weight.

    Args:
        shape: shape of the block.
        slot: the weight that it adapts.
        config: the adapter's configuration.
        r: shard size at this weight.
        device: where to create it.
        dtype: what to create it in.

    Attributes:
        rows: the slot's rows.
        method: the name of the block's method.
        parameter_name: what state dicts and files call the block.
        dropout: probability of zeroing each of the block's inputs in training.
        scale: the runtime scale s. Change it with `set_scale`.
        scale_tensor: s as a 0-dim tensor, 0 while disabled. Compiled code reads it, so that neither
            scaling nor disabling recompiles. Not part of the state dict.
    """

    slot: Slot
    rows: Rows
    method: str
    parameter_name: str
    config: AdapterConfig
    r: int
    scale: float
    enabled: bool
    dropout: float
    scale_tensor: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        *,
        slot: Slot,
        config: AdapterConfig,
        r: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # nn.Module's assignment is slow: one costs as much as this whole update of __dict__.
        vars(self).update(
            slot=slot,
            rows=slot.rows,
            method=config.method,
            parameter_name=block_name(config.method),
            config=config,
            r=r,
            scale=float(config.scale),
            enabled=True,
            dropout=config.dropout,
        )
        with _lasting():
            values = torch.empty(tuple(shape), device=device, dtype=dtype)
            self._parameters[self.parameter_name] = nn.Parameter(values)
            self.register_buffer("scale_tensor", self._new_scale_tensor(), persistent=False)
            self.reset_parameters()

    @property
    def block(self) -> nn.Parameter:
        """The trainable block D."""
        parameter: nn.Parameter = self._parameters[self.parameter_name]  # type: ignore[assignment]
        return parameter

    @property
    def r_out(self) -> int | None:
        """Size of the output shard of a tile, else None."""
        return self.config.r_out

    def update(self, on_meta: bool = False) -> Update:
        """Return what products with the weight need of the block, as it acts now.

        Args:
            on_meta: whether the weight is on the meta device, where the block may then be too.

        Raises:
            ModeError: the block has no values here, or they can't be trained.
        """
        own = self.__dict__
        # A device hook (accelerate's) replaces forward, and brings the block to its device.
        values = self._brought() if "forward" in own else own["_parameters"][own["parameter_name"]]
        if values.is_meta and not on_meta:
            raise ModeError(
                "an adapter can't act: its block is on the meta device, where it has no values, "
                "and its weight is not; give the model its weights first and inject afterwards, or "
                "load the block with the model. Where accelerate has offloaded it, a hook of "
                "the block has to bring it: inject first, then offload"
            )
        dropout = own["dropout"] if own["training"] else 0.0
        if is_compiling():
            # A graph reads a tensor, so that neither scaling nor disabling compiles again.
            return Update(
                own["method"], values, own["_buffers"]["scale_tensor"], dropout, own["rows"]
            )
        return Update(own["method"], values, own["scale"], dropout, own["rows"])

    def _brought(self) -> Tensor:
        """Return the block as the hook of a device brings it."""
        try:
            values: Tensor = self()
        except KeyError as error:
            raise ModeError(
                f"an adapter can't act: a hook has to bring its block, and has none ({error}). If "
                "accelerate has loaded a checkpoint, it had no adapter: inject afterwards"
            ) from error
        taken_away = self._parameters.get(self.parameter_name) is not values
        if taken_away and self.training and values.requires_grad and torch.is_grad_enabled():
            raise ModeError(
                "an adapter can't train while its block is offloaded: its hook brings a copy whose "
                "gradient is lost. To train, offload first and inject afterwards, so that blocks "
                "stay on their device; otherwise call model.eval(), or use torch.no_grad()"
            )
        return values

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == self.__dict__.get("parameter_name") and not isinstance(value, nn.Parameter):
            vars(self)["forward"] = self._flattened

    def _flattened(self) -> Tensor:
        raise ModeError(
            "an adapter can't act whose block is part of a flat parameter; use fully_shard in the "
            "place of FullyShardedDataParallel"
        )

    def forward(self) -> Tensor:
        """Return the block."""
        return self.block

    def reset_parameters(self) -> None:
        """Set the block to its initial values: zeros, or as `init` in the configuration says."""
        if self.block.is_meta:
            return  # there are no values
        values = self.block.detach()
        if self.config.init == "zeros":
            values.zero_()
        else:
            # A block of fewer than two dimensions has no fan-in of its own: it is one row.
            rows = values if values.dim() >= 2 else values.view(1, -1)
            nn.init.kaiming_uniform_(rows, a=math.sqrt(5))

    def set_scale(self, scale: float) -> None:
        """Set the runtime scale."""
        self.scale = float(scale)
        self._write_scale()

    def reconfigure(self, config: AdapterConfig) -> None:
        """Take over the scale and the dropout of another configuration of the same shape."""
        self.config = config
        self.dropout = config.dropout
        self.set_scale(config.scale)

    def set_enabled(self, enabled: bool) -> None:
        """Let compiled graphs see the block (True) or a scale of 0 (False)."""
        if enabled != self.enabled:
            self.enabled = enabled
            self._write_scale()

    def extra_repr(self) -> str:
        """Describe the block in a model's printout."""
        tile = "" if self.r_out is None else f", r_out={self.r_out}"
        return f"r={self.r}{tile}, shape={tuple(self.block.shape)}, scale={self.scale:g}"

    def _write_scale(self) -> None:
        # A new tensor rather than an in-place write: autograd may have saved the old one.
        with _lasting():
            self._buffers["scale_tensor"] = self._new_scale_tensor()

    def _new_scale_tensor(self) -> Tensor:
        # 0-dim, so it never changes a result's dtype; at least float32, so it is not rounded.
        value = self.scale if self.enabled else 0.0
        block = self.block
        dtype = torch.float64 if block.dtype == torch.float64 else torch.float32
        device = block.device
        if block.is_meta:
            scale = self._buffers.get("scale_tensor")
            if scale is None or scale.is_meta:
                # A tensor on meta has no value, and torch.full takes longer.
                return torch.empty((), dtype=dtype, device=device)
            device = scale.device  # the block is offloaded, and is brought to where the scale is
        return torch.full((), value, dtype=dtype, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Block:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._write_scale()  # follows the device, keeps its own dtype, survives to_empty()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # A copy made inside adapters_disabled is outside of it.
        self.set_enabled(True)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # A base model's checkpoint has no blocks, and still has to load strictly. Whether an
        # adapter is complete is for load_adapter_state_dict and load_adapter to check.
        missing: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        if self.scale_tensor.device != self.block.device:
            self._write_scale()  # load_state_dict(assign=True) has taken the block off meta
        missing_keys.extend(key for key in missing if key != prefix + self.parameter_name)
