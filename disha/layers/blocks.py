"""AdapterBlock: the trainable block that one adapter has for one weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from disha.checks import check_scale
from disha.config import AdapterConfig
from disha.effective.contexts import Group
from disha.errors import ArgumentError, ModeError
from disha.functional import Method, Update
from disha.functional.new_rows import NewRows
from disha.functional.shard_sums import merge_dtype
from disha.layers import compiled
from disha.layers.spec import BlockSpec
from disha.private_torch import gives_empty_memory
from disha.sharding.tensor_parallel import Split
from disha.sharding.tensors import write
from disha.sharding.zero import gathered_parameter, restart_trace, whole_shape

SCALE = "scale"
"""Key in the state dict of a block whose scale is not the one with which it was made."""


class AdapterBlock(nn.Module):
    """The trainable block of one adapter for one weight.

    Attributes:
        spec: the weight and the block, as they were when the block was made.
        method: the method, which says what dW is; `ROWS` for new rows, which have none.
        parameter_name: the name of D among the parameters of this module.
        config: the configuration of the adapter.
        scale: runtime scale s.
        dropout: probability of zeroing each of the block's inputs in training.
        split: how tensor parallelism divides the weight, and with it the block, or None.
        scale_tensor: the scale as a 0-dim tensor. Compiled code reads it, so that it need not be
            compiled again for a new scale.
    """

    spec: BlockSpec
    is_new_rows = False
    method: Method
    parameter_name: str
    config: AdapterConfig
    dropout: float
    split: Split | None
    scale_tensor: Tensor

    def __init__(
        self, values: Tensor, spec: BlockSpec, config: AdapterConfig, split: Split | None
    ) -> None:
        super().__init__()
        method = spec.method_of_block
        # Written to __dict__, because assigning through nn.Module is slow.
        vars(self).update(
            spec=spec,
            method=method,
            parameter_name=method.block_name,
            config=config,
            dropout=config.dropout,
            split=split,
        )
        vars(self)["_scale"] = self.first_scale
        self._parameters[method.block_name] = nn.Parameter(values)
        self.register_buffer("scale_tensor", None, persistent=False)
        self._write_scale()

    @property
    def first_scale(self) -> float:
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
    def r(self) -> int:
        """The block's own shard size; that of the configuration may be another one."""
        return self.spec.r

    @property
    def r_out(self) -> int | None:
        """Size of the output shard of a tile, else None."""
        return self.spec.r_out

    def make_update(self, on_meta: bool = False, group: Group | None = None) -> Update:
        """Return the update for products with the weight, with the current scale and dropout.

        `on_meta` is as in `read_values`. `group` is given while compiling: the scale is then a
        tensor, times the group's factor.
        """
        values = self.read_values(on_meta)
        dropout = self.dropout if self.training else 0.0
        scale = self._scale if group is None else self.scale_tensor * self._read_factor(group)
        return Update(self.method, values, scale, dropout, self.spec.outputs)

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
        block = self.block
        with gathered_parameter(block, writes=True):
            values = block.detach()
            if self.split is not None:  # the start of each number may depend on all of them
                values = torch.empty(block.shape, device=block.device, dtype=block.dtype)
            layout = self.spec.layout
            if self.config.init == "zeros":
                matrix = self.method.matrix_block(layout, values)
                self.method.start(matrix, self.spec.geometry, layout)
            else:
                # A vector has no fan-in, so it counts as one row.
                matrix = values if values.dim() >= 2 else values.view(1, -1)
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
            # Ranks that share a block start with the same values, also if their seeds differ.
            if self.split is not None:
                self.split.broadcast_from_first_rank(values)
                write(block, values)

    def reconfigure(self, config: AdapterConfig) -> None:
        """Take another configuration with the same shapes, but keep the scale."""
        self.config = config
        self.dropout = config.dropout

    def extra_repr(self) -> str:
        """Return the block's description in a model's printout."""
        parts = [f"method={self.method.name}", f"r={self.r}"]
        if self.r_out is not None:
            parts.append(f"r_out={self.r_out}")
        values = self._parameters.get(self.parameter_name)  # not there if it is pruned
        if values is not None:
            parts.append(f"shape={tuple(whole_shape(values))}")
        parts.append(f"scale={self.scale:g}")
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
        if self._parameters.get(self.parameter_name) is None:  # as while it is pruned
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
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
        if self._scale != self.first_scale:  # else an equal model has it
            destination[prefix + SCALE] = torch.tensor(self._scale, dtype=torch.float64)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        if prefix + self.parameter_name in state_dict:
            try:
                scale = state_dict.get(prefix + SCALE, self.first_scale)
                self.scale = check_scale(float(scale), prefix + SCALE)
            except ArgumentError as error:
                error_msgs.append(str(error))
        if prefix + SCALE in unexpected_keys:
            unexpected_keys.remove(prefix + SCALE)
        if self.scale_tensor.device != self.block.device:
            self._write_scale()  # load_state_dict(assign=True) has taken the block off meta


class NewRowsBlock(AdapterBlock):
    """The new rows of one adapter for one table: the values of the rows in `spec.outputs`.

    They have no method, no scale and no dropout, and no setting changes their values. They start
    with those of W. Where they have lost their values to new memory, they are NaN, until the base
    is loaded or the rows themselves.
    """

    is_new_rows = True
    first_scale = 1.0

    def make_update(self, on_meta: bool = False, group: Group | None = None) -> Any:
        """Return the rows for products with the table; arguments are as in `AdapterBlock`."""
        acts = None if group is None else self.scale_tensor * self._read_factor(group) != 0
        return NewRows(self.read_values(on_meta), self.spec.outputs, acts)

    def reset_parameters(self) -> None:
        """Do nothing: only the layer knows the rows of W (`layers.adapted.reset_parameters`)."""

    @property
    def scale(self) -> float:
        """1: a row is replaced, so there is no update to scale."""
        return 1.0

    @scale.setter
    def scale(self, scale: float) -> None:
        pass  # `set_adapter_scale` sets the scale of all blocks of an adapter

    def _fill_new_memory(self) -> None:
        with gathered_parameter(self.block, writes=True):
            self.block.detach().fill_(math.nan)
