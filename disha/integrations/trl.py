"""Trainers of `trl` that use the trained model itself as the reference, with its adapter off.

For a model without PEFT, `trl` loads the base a second time as the frozen reference. In all else
the trainers and their results are those of `trl`. `SFTTrainer` needs no reference.

With `use_vllm=True`, vLLM gets the weights that the model computes with, W + sum of s dW, one at a
time. Nothing is merged, so the base does not drift.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import trl
from torch import Tensor, nn
from trl.generation import vllm_generation

import disha
from disha.errors import ArgumentError
from disha.files.loading import load_contents
from disha.files.saving import adapter_contents
from disha.layers.adapted import refuse_merged
from disha.model.computed_weights import computed_weights
from disha.model.control import check_names
from disha.model.view import ModelView

__all__ = ["DPOTrainer", "GRPOTrainer", "RLOOTrainer"]

Names = Sequence[str] | None
REFUSED = {
    "peft_config": "peft_config adds an adapter of PEFT, and the model has one of disha, which "
    "would be frozen",
    "ref_model": "ref_model is a second model, and here the reference is the trained model itself; "
    "name the adapters that act in it with `reference`, or use the trainer of trl",
    "sync_ref_model": "sync_ref_model=True writes into a second model, and here the reference is "
    "the trained model itself; leave it out",
}
"""Arguments and settings of `trl` that are refused -> why, and what to do."""


class _Reference(nn.Module):
    """Stands for a frozen model, without parameters: a call runs the trained model with these."""

    model: Any

    def __init__(self, model: nn.Module, adapters: Sequence[str]) -> None:
        super().__init__()
        self.config = model.config
        self.adapters = adapters
        vars(self)["model"] = model  # not a child of it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model. `trl` replaces `forward` of a reference, so this does not use it."""
        with disha.adapters_active(self.model, self.adapters):
            return self.model(*args, **kwargs)

    def state_dict(self, *args: Any, **named: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Return what the results depend on. `trl` stores some results under a hash of it."""
        whole = self.model.state_dict()
        state = {key: value for key, value in whole.items() if ".disha." not in key}
        for adapter in self.adapters:
            state |= disha.adapter_state_dict(self.model, adapter)
        return state


def _prepare_model(view: ModelView, args: Any, given: Mapping[str, Any], undo: ExitStack) -> None:
    """Prepare a model for training as the settings ask, or raise."""
    if not view.adapters:
        raise ArgumentError("the model has no adapter; call inject_adapters first")
    refuse_merged(view.find_layers(), "train")
    if not any(layer.disha.active for layer in view.find_layers()):
        raise ArgumentError(
            f"no adapter of the model is active ({', '.join(view.adapters)}), so none would train; "
            "call set_active_adapters first"
        )
    for name, reason in REFUSED.items():
        if given.get(name) is not None or getattr(args, name, False):
            raise ArgumentError(reason)
    others = view.list_trained()
    if others:
        raise ArgumentError(
            f"{others[0].name} trains with the adapter, so it would change the reference, in which "
            "adapters are off; freeze it, and inject without also_train"
        )
    if getattr(args, "disable_dropout", True):
        for *_, block in view.blocks():
            undo.callback(setattr, block, "dropout", block.dropout)
            block.dropout = 0.0  # trl does this for the dropout of torch


def _make_reference(view: ModelView, adapters: Names, undo: ExitStack) -> _Reference:
    """Return the reference with these adapters, or with copies of those that act now."""
    active = {name for layer in view.find_layers() for name in layer.disha.active}
    if adapters is None:
        names = _copy_trained_adapters(view, sorted(active), undo)
    else:
        names = list(check_names(view, adapters))
    for name in names:
        if name in active:
            raise ArgumentError(
                f"adapter {name!r} is active and trains, so it can't be the reference; load it "
                "again under another name, with activate=False"
            )
        for block in disha.adapter_parameters(view.model, name):
            undo.callback(block.requires_grad_, block.requires_grad)
            block.requires_grad_(False)
    return _Reference(view.model, names)


def _copy_trained_adapters(view: ModelView, names: Sequence[str], undo: ExitStack) -> list[str]:
    """Copy the adapters that are not new, and return the names of the copies.

    The blocks of a new adapter are zero, so the model acts the same without it.
    """
    load = partial(load_contents, view, "the model", replace=True, freeze=False, activate=False)
    copies = []
    for name in names:
        contents = adapter_contents(view, name)
        if not any(tensor.any() for tensor in contents.tensors.values()):
            continue
        copy_name = f"{name}_reference"
        copies.append(copy_name)
        if copy_name not in view.adapters:
            load(contents, copy_name)
            undo.callback(disha.remove_adapters, view.model, copy_name)
            continue
        blocks = disha.adapter_parameters(view.model, copy_name)
        if any(block.requires_grad for block in blocks):
            raise ArgumentError(
                f"the reference is a copy of adapter {name!r} under the name {copy_name!r}, but "
                "the model has an adapter of that name, and it trains; remove it, or name the "
                "adapters of the reference yourself"
            )
        former = adapter_contents(view, copy_name)
        values = {key: tensor.clone() for key, tensor in former.tensors.items()}
        undo.callback(load, replace(former, tensors=values), copy_name)
        load(contents, copy_name)
    return copies


class _VLLMGeneration(vllm_generation.VLLMGeneration):  # type: ignore[misc]
    """Sends vLLM the weights that the adapted model computes with."""

    model: Any

    def _init_vllm(self) -> None:
        """Start vLLM with a dense base: it quantises one like `model`, and gets dense weights."""
        model = self.model
        self.model = SimpleNamespace(name_or_path=model.name_or_path, named_modules={}.items)
        try:
            super()._init_vllm()
        finally:
            self.model = model

    def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
        device = self.accelerator.device
        for name, weight in computed_weights(ModelView(self.model)):
            yield name, weight.to(device)


@contextmanager
def _sending_computed_weights(trainer: type) -> Iterator[None]:
    """Run a body that makes a trainer of `trl`, and let it send vLLM the computed weights."""
    module: Any = sys.modules[trainer.__module__]
    former = module.VLLMGeneration
    module.VLLMGeneration = _VLLMGeneration
    try:
        yield
    finally:
        module.VLLMGeneration = former


class DPOTrainer(trl.DPOTrainer):  # type: ignore[misc]
    """`trl.DPOTrainer` for a model with adapters, without a second model for the reference.

    The reference is the model at the time when the trainer is made. If the adapter is new, that is
    the base. If the adapter was trained before, that is the base with a frozen copy of the adapter.

    Args:
        model: a model with adapters, but without `also_train`.
        args: a `trl.DPOConfig`.
        reference: the adapters that act in the reference instead; `[]` for the base.
        named: other arguments of `trl.DPOTrainer`.

    Raises:
        ArgumentError: the model or a setting does not fit.
        ArgumentTypeError: `reference` is not a list of names.

    If this raises, the model is as before.
    """

    def __init__(
        self, model: nn.Module, args: Any = None, *, reference: Names = None, **named: Any
    ) -> None:
        view = ModelView(model)
        with ExitStack() as undo:
            _prepare_model(view, args, named, undo)
            reference_model = _make_reference(view, reference, undo)
            super().__init__(model, reference_model, args, **named)
            undo.pop_all()


class _TrainerWithRewards:
    """What the trainers with rewards have in common."""

    _config: Any
    _trainer: Any

    def __init__(
        self,
        model: nn.Module,
        reward_funcs: Any = None,
        args: Any = None,
        *,
        reference: Names = None,
        **named: Any,
    ) -> None:
        args = self._config() if args is None else copy.copy(args)
        view = ModelView(model)
        beta = args.beta
        with ExitStack() as undo:
            _prepare_model(view, args, named, undo)
            reference_model = _make_reference(view, reference, undo) if beta else None
            args.beta = 0.0  # with another value, trl would load a reference
            with _sending_computed_weights(self._trainer):
                super().__init__(model, reward_funcs, args, **named)  # type: ignore[call-arg]
            undo.pop_all()
        args.beta = self.beta = beta
        self.ref_model = reference_model


class GRPOTrainer(_TrainerWithRewards, trl.GRPOTrainer):  # type: ignore[misc]
    """`trl.GRPOTrainer` for a model with adapters. Completions are generated with the adapter.

    There is a reference only if `args.beta` is not 0. The arguments are as in `DPOTrainer`.
    """

    _config = trl.GRPOConfig
    _trainer = trl.GRPOTrainer


class RLOOTrainer(_TrainerWithRewards, trl.RLOOTrainer):  # type: ignore[misc]
    """`trl.RLOOTrainer` for a model with adapters, as `GRPOTrainer` is."""

    _config = trl.RLOOConfig
    _trainer = trl.RLOOTrainer
