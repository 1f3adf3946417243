"""Checkpoints of FSDP2 and DeepSpeed that leave out the base.

These engines write and read the state of a model themselves, with all ranks together.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection
from typing import Any
from weakref import WeakSet

from torch import nn

import disha
from disha.errors import ArgumentError
from disha.layers.wrappers import clean_key
from disha.model import buffers
from disha.model.view import ModelView
from disha.sharding.zero import is_partitioned

_WITHOUT_BASE: WeakSet[nn.Module] = WeakSet()
"""The models whose frozen parameters DeepSpeed leaves out."""


def kept_keys(model: nn.Module, adapter: str) -> set[str]:
    """Return the keys of an adapter in a model's state; raise if another adapter trains."""
    kept = set(disha.adapter_state_dict(model, adapter))
    for _, layer, other, block in ModelView(model).blocks():
        if other != adapter and other in layer.disha.active and block.block.requires_grad:
            raise ArgumentError(
                f"adapter {other!r} trains, and checkpoints would hold {adapter!r} alone; name the "
                "adapter to save, and activate no other (set_active_adapters)"
            )
    return kept


def leave_out_base(model: nn.Module, kept: Collection[str], engine: str) -> None:
    """Keep the base out of the state that an engine writes, and let loading do without it."""
    is_deepspeed = engine == "DEEPSPEED"
    if is_deepspeed:
        _leave_base_out_of_deepspeed()
        trl_utils = sys.modules.get("trl.trainer.utils")
        if trl_utils is not None:  # a trainer of trl has imported it by now
            _let_trl_read_effective_heads(trl_utils)
        _WITHOUT_BASE.add(model)
    elif engine != "FSDP":
        return

    # Until training has changed them, buffers are not among the adapter's tensors.
    saved_once_changed = buffers.list_saved(ModelView(model))

    def is_base(key: str) -> bool:
        name = clean_key(key)
        return ".disha." not in key and name not in kept and name not in saved_once_changed

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        # While it is on the meta device, accelerate asks for the state to distribute the base.
        is_placed = not any(value.is_meta for value in state.values())
        if is_deepspeed or (is_placed and ModelView(module).is_sharded):
            for key in filter(is_base, list(state)):
                del state[key]

    def forgive(module: nn.Module, incompatible: Any) -> None:
        missing = incompatible.missing_keys
        missing[:] = [key for key in missing if not is_base(key)]

    model.register_state_dict_post_hook(drop)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_post_hook(forgive)  # type: ignore[no-untyped-call]


@functools.cache
def _leave_base_out_of_deepspeed() -> None:
    """Let engines of these models do what `Trainer` asks of them for a model of PEFT only."""
    from deepspeed import DeepSpeedEngine

    def without_base(method: Any) -> Any:
        def call(engine: Any, *given: Any, **named: Any) -> Any:
            if engine.module in _WITHOUT_BASE:
                named["exclude_frozen_parameters"] = True
            return method(engine, *given, **named)

        return functools.wraps(method)(call)

    for name in ("save_checkpoint", "_zero3_consolidated_16bit_state_dict"):
        setattr(DeepSpeedEngine, name, without_base(getattr(DeepSpeedEngine, name)))


@functools.cache
def _let_trl_read_effective_heads(trl_utils: Any) -> None:
    """Let the losses of trl read the weight of a head that is adapted.

    They ask it whether ZeRO-3 has gathered it. An effective weight, and a computed one, has its
    values.
    """
    gather = getattr(trl_utils, "maybe_gather_lm_head_ctx", None)
    if gather is None:
        return

    def gather_partitioned(*weights: Any) -> Any:
        return gather(*filter(is_partitioned, weights))

    trl_utils.maybe_gather_lm_head_ctx = gather_partitioned
