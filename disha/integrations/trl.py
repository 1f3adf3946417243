"""Trainers of `trl` that use the trained model itself as the reference, with its adapter off.

For a model without PEFT, `trl` loads the base a second time as the frozen reference. In all else
the trainers and their results are those of `trl`. `SFTTrainer` needs no reference.

With `use_vllm=True`, vLLM gets the weights that the model computes with, W + sum of s dW, one at a
time; or the adapter alone, as a LoRA. Nothing is merged, so the base does not drift.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import trl
from torch import Tensor, nn
from trl.generation import vllm_generation

import disha
from disha.errors import ArgumentError, ConversionError
from disha.files.disk import PathLike
from disha.files.loading import load_contents
from disha.files.saving import adapter_contents
from disha.functional.new_rows import method_of_block
from disha.interop.experts import ExpertForm
from disha.interop.lora import export
from disha.interop.low_rank import find_served_rank
from disha.layers.adapted import refuse_merged
from disha.layers.spec import BlockSpec
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
LORAS = 2
"""Places for adapters at a server: if none is empty, vLLM may give one to requests for the base."""


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
    refuse_merged(view.find_layers(), "train")
    if not _active_adapters(view):
        raise ArgumentError(
            f"no adapter of the model is active (it has {', '.join(view.adapters) or 'none'}), so "
            "none would train; call inject_adapters or set_active_adapters first"
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


def _active_adapters(view: ModelView) -> list[str]:
    """Return the names of the adapters that act in any layer."""
    return sorted({name for layer in view.find_layers() for name in layer.disha.active})


def _make_reference(view: ModelView, adapters: Names, undo: ExitStack) -> _Reference:
    """Return the reference with these adapters, or with copies of those that act now."""
    active = _active_adapters(view)
    if adapters is None:
        names = _copy_trained_adapters(view, active, undo)
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
    """Copy the adapters that act, and return the names of the copies.

    The model acts the same without a new one, whose update is zero.
    """
    copies = []
    for name in names:
        contents = adapter_contents(view, name)
        if any(_acts(layer, contents.tensors[layer.key]) for layer in contents.layers):
            copy_name = f"{name}_reference"
            copies.append(copy_name)
            load_contents(
                view,
                "the model",
                contents,
                copy_name,
                replace=True,
                freeze=False,
                activate=False,
                around=undo,
            )
    return copies


def _acts(layer: BlockSpec, block: Tensor) -> bool:
    """Whether a block's update is not zero. The update of a LoRA is if one of its factors is."""
    method = method_of_block(layer.method)
    factors = method.lora_factors(layer.layout, block, layer.geometry)
    return all(bool(factor.any()) for factor in factors or [block])


class _SyncOfWeights(vllm_generation.VLLMGeneration):  # type: ignore[misc]
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


class _SyncOfAdapter(vllm_generation.VLLMGeneration):  # type: ignore[misc]
    """Writes the adapter as a LoRA, and has vLLM load it over the base that it has."""

    def __init__(
        self, *args: Any, folder: PathLike, addresses: Sequence[str], **named: Any
    ) -> None:
        self.folder = Path(folder).resolve()
        self.addresses = addresses
        self.servers: list[Any] = []
        super().__init__(*args, **named)

    def _init_vllm(self) -> None:
        """Start or find vLLM, and let it load the adapter before anything is trained."""
        if self.enable_sleep_mode:
            raise ArgumentError(
                "in vllm_enable_sleep_mode vLLM forgets the base, which only a sync of all weights "
                "gives back; leave it or vllm_adapter_folder out"
            )
        rank = self._write_adapter()
        start: Any = getattr(vllm_generation, "LLM", None)

        def start_with_lora(**settings: Any) -> Any:
            return start(**settings, enable_lora=True, max_lora_rank=find_served_rank(rank))

        def open_no_channel(client: Any, device: Any) -> None:
            """Do without the channel for weights, which needs a GPU."""

        with (
            patch.object(vllm_generation, "LLM", start_with_lora, create=True),
            patch.object(vllm_generation.VLLMClient, "init_communicator", open_no_channel),
        ):
            super()._init_vllm()
        if self.mode == "colocate":
            self.llm.generate = partial(self.llm.generate, lora_request=self._request())
        elif self.accelerator.is_main_process:
            self._find_servers(rank)
            self.vllm_client.model = self.folder.name
        self.sync_weights()

    def _find_servers(self, rank: int) -> None:
        """Find the servers that load the adapter, and check that each takes it."""
        self.servers = [
            vllm_generation.VLLMClient(base_url=address, connection_timeout=self.server_timeout)
            for address in self.addresses
        ] or [self.vllm_client]
        for server in self.servers:
            taken = server.get_server_info()["lora_config"]
            if taken is None or taken["max_lora_rank"] < rank or taken["max_loras"] < LORAS:
                raise ArgumentError(
                    f"the adapter is a LoRA of rank {rank}; start vLLM at {server.base_url} with "
                    f"--enable-lora --max-lora-rank {find_served_rank(rank)} --max-loras {LORAS}"
                )

    def sync_weights(self) -> None:
        """Let vLLM load the adapter as it is now, in the place of its former values."""
        self._write_adapter()
        if self.mode == "colocate":
            self.llm.llm_engine.add_lora(self._request(load_inplace=True))
            self.llm.reset_prefix_cache()
        for server in self.servers:
            self._load_adapter(server)

    def _load_adapter(self, server: Any) -> None:
        """Let a server load the adapter, and forget what it computed with the former one.

        An adapter that vLLM loads in place is read from its folder again at every step.
        """
        name = {"lora_name": self.folder.name}
        server.session.post(f"{server.base_url}/v1/unload_lora_adapter", json=name)
        asked = name | {"lora_path": str(self.folder)}
        answer = server.session.post(f"{server.base_url}/v1/load_lora_adapter", json=asked)
        if not answer.ok:
            raise ArgumentError(
                f"vLLM at {server.base_url} did not load the adapter: {answer.text}; it must "
                f"see {self.folder}, and have VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            )
        server.reset_prefix_cache()

    def _write_adapter(self) -> int:
        """Write the adapter that is active, and return its largest rank."""
        names = _active_adapters(ModelView(self.model))
        if len(names) > 1:
            raise ArgumentError(
                f"vLLM gets one adapter by vllm_adapter_folder, and {', '.join(names)} are active; "
                "leave it out, and vLLM gets all weights"
            )
        reads_stacks = self.model.config.model_type == "gpt_oss"
        experts: ExpertForm = "stacked" if reads_stacks else "separate"
        try:
            report = export(self.model, self.folder, *names, experts=experts)
        except (ArgumentError, ConversionError) as error:
            raise ArgumentError(
                f"the adapter is no LoRA: {error}. Leave vllm_adapter_folder out: then vLLM gets "
                "all weights"
            ) from error
        self.accelerator.wait_for_everyone()  # one process may have written for all
        return max(layer.rank for layer in report.layers)

    def _request(self, **named: Any) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(self.folder.name, 1, str(self.folder), **named)


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
        vllm_adapter_folder: PathLike | None = None,
        vllm_adapter_servers: Sequence[str] = (),
        **named: Any,
    ) -> None:
        generation: Any = _SyncOfWeights
        if vllm_adapter_folder is not None:
            generation = partial(
                _SyncOfAdapter, folder=vllm_adapter_folder, addresses=vllm_adapter_servers
            )
        args = self._config() if args is None else copy.copy(args)
        view = ModelView(model)
        beta = args.beta
        with ExitStack() as undo:
            _prepare_model(view, args, named, undo)
            reference_model = _make_reference(view, reference, undo) if beta else None
            args.beta = 0.0  # with another value, trl would load a reference
            with patch.object(
                sys.modules[self._trainer.__module__], "VLLMGeneration", generation, create=True
            ):
                super().__init__(model, reward_funcs, args, **named)  # type: ignore[call-arg]
            undo.pop_all()
        args.beta = self.beta = beta
        self.ref_model = reference_model


class GRPOTrainer(_TrainerWithRewards, trl.GRPOTrainer):  # type: ignore[misc]
    """`trl.GRPOTrainer` for a model with adapters. Completions are generated with the adapter.

    There is a reference only if `args.beta` is not 0. The arguments are as in `DPOTrainer`, and:

    Args:
        vllm_adapter_folder: with `use_vllm=True`, each sync writes the adapter as a LoRA into this
            folder, and vLLM loads it over its base, that of `model.name_or_path`. A server must
            see the folder too. Without it vLLM gets all weights.
        vllm_adapter_servers: the addresses of the servers that load the adapter, such as
            `["http://a:8000", "http://b:8000"]`, if `args.vllm_server_base_url` is that of a load
            balancer before them.
    """

    _config = trl.GRPOConfig
    _trainer = trl.GRPOTrainer


class RLOOTrainer(_TrainerWithRewards, trl.RLOOTrainer):  # type: ignore[misc]
    """`trl.RLOOTrainer` for a model with adapters, as `GRPOTrainer` is."""

    _config = trl.RLOOConfig
    _trainer = trl.RLOOTrainer
