"""Bone and Bat: the small modules that own one trainable block each.

A block knows its numbers, its scale and its dropout. How it acts on an input is the business of
the adapted layer (`disha.layers.linear` and its siblings), which calls `disha.functional`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disha.config import AdapterConfig

__all__ = ["BLOCKS", "Bat", "Block", "Bone"]


def _lasting() -> AbstractContextManager[object]:
    """Return a context in which tensors that can be trained are made.

    An inference tensor never could be, even after inference mode ends.
    """
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


class Block(nn.Module):
    """One adapter's trainable block at one layer.

    Args:
        shape: shape of the block.
        config: the adapter's configuration.
        r: shard size at this layer.
        device: where to create it.
        dtype: what to create it in.

    Attributes:
        dropout: probability of zeroing each of the block's inputs in training.
        strength: the runtime scale s as a number. Change it with `set_strength`.
        scale: the same as a 0-dim tensor, 0 while disabled: what a compiled graph reads, so that
            neither scaling nor disabling recompiles. Not part of the state dict.
    """

    method: ClassVar[str]
    parameter_name: ClassVar[str]
    config: AdapterConfig
    r: int
    strength: float
    enabled: bool
    dropout: float
    scale: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        *,
        config: AdapterConfig,
        r: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # Straight into __dict__: each assignment through nn.Module costs as much as all of these.
        vars(self).update(
            config=config,
            r=r,
            strength=float(config.scale),
            enabled=True,
            dropout=config.dropout,
        )
        with _lasting():
            values = torch.empty(tuple(shape), device=device, dtype=dtype)
            self._parameters[self.parameter_name] = nn.Parameter(values)
            self.register_buffer("scale", self._scale_tensor(), persistent=False)
            self.reset_parameters()

    @property
    def block(self) -> nn.Parameter:
        """The trainable block D."""
        parameter: nn.Parameter = self._parameters[self.parameter_name]  # type: ignore[assignment]
        return parameter

    @property
    def r_out(self) -> int | None:
        """Size of the output shard of a tile, else None."""
        return None

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

    def set_strength(self, strength: float) -> None:
        """Set the runtime scale."""
        self.strength = float(strength)
        self._write_scale()

    def reconfigure(self, config: AdapterConfig) -> None:
        """Take over the scale and the dropout of another configuration of the same shape."""
        self.config = config
        self.dropout = config.dropout
        self.set_strength(config.scale)

    def set_enabled(self, enabled: bool) -> None:
        """Let compiled graphs see the block (True) or a scale of 0 (False)."""
        if enabled != self.enabled:
            self.enabled = enabled
            self._write_scale()

    def current_scale(self) -> float | Tensor:
        """The scale as forward must read it: a tensor in graphs, else the number."""
        return self.scale if torch.compiler.is_compiling() else self.strength

    def dropped(self, x: Tensor) -> Tensor:
        """Return the block's input: x, with dropout in training."""
        return F.dropout(x, self.dropout) if self.drops else x

    @property
    def drops(self) -> bool:
        """Whether dropout acts now."""
        return self.training and self.dropout > 0.0

    def extra_repr(self) -> str:
        """Describe the block in a model's printout."""
        tile = "" if self.r_out is None else f", r_out={self.r_out}"
        return f"r={self.r}{tile}, shape={tuple(self.block.shape)}, scale={self.strength:g}"

    def _write_scale(self) -> None:
        # A new tensor rather than an in-place write: autograd may have saved the old one.
        with _lasting():
            self._buffers["scale"] = self._scale_tensor()

    def _scale_tensor(self) -> Tensor:
        # 0-dim, so it never changes a result's dtype; at least float32, so it is not rounded.
        value = self.strength if self.enabled else 0.0
        block = self.block
        dtype = torch.float64 if block.dtype == torch.float64 else torch.float32
        if block.is_meta:  # no tensor there has a value, and asking for one takes longer
            return torch.empty((), dtype=dtype, device=block.device)
        return torch.full((), value, dtype=dtype, device=block.device)

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
        if self.scale.device != self.block.device:
            self._write_scale()  # load_state_dict(assign=True) has taken the block off meta
        missing_keys.extend(key for key in missing if key != prefix + self.parameter_name)


class Bone(Block):
    """A Bone block, (r, out), or a tile, (r, r_out): added to every shard of the weight."""

    method = "bone"
    parameter_name = "bone_block"

    @property
    def r_out(self) -> int | None:
        """Size of the output shard of a tile, else None."""
        return self.config.r_out


class Bat(Block):
    """A BAT block, (ceil(out / r), r, r): also multiplied into the frozen shards."""

    method = "bat"
    parameter_name = "bat_block"


BLOCKS: dict[str, type[Block]] = {block.method: block for block in (Bone, Bat)}
