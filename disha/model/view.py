"""ModelView: the modules, parameters, buffers and adapters of a model, from one walk over it.

A public function builds one view and passes it down. Names are those in the unwrapped model, so
`torch.compile`, DDP, FSDP and checkpointing do not change what targets match and files hold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from disha.effective.contexts import LOCK, OPEN_CONTEXTS, Context, current_context
from disha.errors import (
    AdapterStateError,
    ArgumentError,
    ArgumentTypeError,
    ModeError,
    TargetError,
)
from disha.layers.adapted import AdaptedLayer, refuse_merged
from disha.layers.blocks import CHILD_NAME, AdapterBlock, Adapters, check_adapter_name
from disha.layers.gradient_flags import is_claimed
from disha.layers.weights import count_values
from disha.private_torch import CHECKPOINTED, COMPILED, FSDP_CHILD
from disha.sharding.imported import imported_class
from disha.sharding.ranks import Ranks
from disha.sharding.tensors import is_sharded
from disha.sharding.zero import is_partitioned
from disha.text import join


class _Wrapper(NamedTuple):
    """A class of torch or DeepSpeed that wraps a module."""

    module: str  # where the class is defined
    name: str
    child: str  # the attribute that holds the wrapped module; empty if the module changes its class
    distributes: bool = False  # keeps track of parameters, so that none may be added or removed
    shards: bool = False  # replaces parameters by shards


_FSDP = "torch.distributed.fsdp"
_WRAPPERS = (
    _Wrapper(*COMPILED),
    _Wrapper(*CHECKPOINTED),
    _Wrapper(
        "torch.nn.parallel.distributed", "DistributedDataParallel", "module", distributes=True
    ),
    _Wrapper("torch.optim.swa_utils", "AveragedModel", "module"),
    _Wrapper("torch.nn.parallel.data_parallel", "DataParallel", "module", distributes=True),
    _Wrapper("deepspeed.runtime.engine", "DeepSpeedEngine", "module", distributes=True),
    _Wrapper(_FSDP, "FullyShardedDataParallel", FSDP_CHILD, distributes=True, shards=True),
    _Wrapper(_FSDP, "FSDPModule", "", distributes=True, shards=True),
)


def clean_key(key: str) -> str:
    """Return a state-dict key without the parts that wrappers add."""
    # A model may have a child `module` itself, so only at the start is that name a wrapper's.
    added = {wrapper.child for wrapper in _WRAPPERS if wrapper.child != "module"}
    parts = [part for part in key.split(".") if part not in added]
    return ".".join(parts).removeprefix("module.")


class ModelBlock(NamedTuple):
    """A block of a model: the clean name of its weight, the layer, and the name of the adapter."""

    name: str
    layer: AdaptedLayer
    adapter: str
    block: AdapterBlock

    @property
    def values(self) -> nn.Parameter:
        """The trainable values D of the block."""
        return self.block.block


class ModelParameter(NamedTuple):
    """A parameter of a model, with all of its clean names; a tied one has several."""

    names: tuple[str, ...]
    module: nn.Module  # the first that holds it, or the one where an adapter trains it
    attribute: str  # its name in that module

    @property
    def name(self) -> str:
        """Its main name."""
        return self.names[0]

    @property
    def value(self) -> nn.Parameter:
        """The parameter as the module holds it now."""
        parameter = self.module._parameters[self.attribute]
        assert parameter is not None
        return parameter

    def is_claimed(self, adapter: str | None = None) -> bool:
        """Whether it trains with an adapter, or with any, because `also_train` named it."""
        return is_claimed(self.module, self.attribute, adapter)

    @property
    def size(self) -> int:
        """Number of its values; a packed one counts as unpacked."""
        return count_values(self.value, self.module)


class ModelBuffer(NamedTuple):
    """A persistent buffer of a model, with all of its clean names."""

    names: tuple[str, ...]
    module: nn.Module
    attribute: str  # its name in the module
    is_statistic: bool  # whether it is one of the running statistics of a norm

    @property
    def name(self) -> str:
        """Its main name."""
        return self.names[0]

    @property
    def value(self) -> Tensor:
        """The buffer as the module holds it now."""
        buffer = self.module._buffers[self.attribute]
        assert buffer is not None
        return buffer


def persistent_buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a module, not those of its children, that are in state dicts."""
    return {
        name: buffer
        for name, buffer in module._buffers.items()
        if buffer is not None
        and not is_lazy(buffer)
        and name not in module._non_persistent_buffers_set
    }


class ModelView:
    """The modules, parameters and adapters of a model; the adapters are always up to date."""

    names: dict[nn.Module, tuple[str, ...]]
    """Every module -> its clean names; a shared module has several. Adapters are left out."""

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(f"model must be an nn.Module, got {type(model).__name__}")
        self.model = model
        self.names = {}
        self._wrappers = [
            (imported_class(wrapper.module, wrapper.name), wrapper) for wrapper in _WRAPPERS
        ]
        self._walk(model, "", on_path=set())

    def _walk(self, module: nn.Module, name: str, on_path: set[nn.Module]) -> None:
        if isinstance(module, Adapters) or module in on_path:
            return
        self.names[module] = (*self.names.get(module, ()), name)
        children = module._modules
        if not children:
            return
        on_path.add(module)
        # A child in a wrapper has the name of the wrapper itself.
        hidden = [wrapper.child for cls, wrapper in self._wrappers if isinstance(module, cls)]
        for child_name, child in children.items():
            if child is not None:
                below = name if child_name in hidden else join(name, child_name)
                self._walk(child, below, on_path)
        on_path.remove(module)

    # --- modules and parameters ------------------------------------------------------------------

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Every clean name -> its module. A wrapper is left out; its module has the name."""
        return {name: module for module, names in self.names.items() for name in names}

    def inside(self, module: nn.Module) -> dict[nn.Module, str]:
        """Return a module and all modules inside it -> their names relative to it."""
        name = self.names[module][0]
        prefix = f"{name}." if name else ""
        inside = {}
        for other, aliases in self.names.items():
            for alias in aliases:
                if alias == name or alias.startswith(prefix):
                    inside[other] = alias[len(prefix) :]
                    break
        return inside

    @cached_property
    def parameters(self) -> tuple[ModelParameter, ...]:
        """The parameters of the model, each once. Those of blocks are left out."""
        aliases = defaultdict[int, list[str]](list)
        places: dict[int, tuple[nn.Module, str]] = {}
        for module, names in self.names.items():
            for attribute, parameter in module._parameters.items():
                if parameter is None:
                    continue
                key = id(parameter)
                aliases[key] += [join(name, attribute) for name in names]
                # The place of a tied parameter is the module that claims it, or else the first.
                if key not in places or is_claimed(module, attribute):
                    places[key] = module, attribute
        return tuple(
            ModelParameter(tuple(aliases[key]), module, attribute)
            for key, (module, attribute) in places.items()
        )

    @cached_property
    def parameters_by_name(self) -> dict[str, ModelParameter]:
        """Every clean name of a parameter -> the parameter."""
        return {name: parameter for parameter in self.parameters for name in parameter.names}

    @cached_property
    def buffers(self) -> tuple[ModelBuffer, ...]:
        """The persistent buffers of the model, except sparse ones and those of special classes."""
        buffers = []
        for module, names in self.names.items():
            persistent = persistent_buffers_of(module)
            is_norm = "running_mean" in persistent
            for attribute, buffer in persistent.items():
                is_plain = type(buffer) is Tensor or is_sharded(buffer)
                if is_plain and buffer.layout is torch.strided:
                    aliases = tuple(join(name, attribute) for name in names)
                    buffers.append(ModelBuffer(aliases, module, attribute, is_norm))
        return tuple(buffers)

    # --- adapters --------------------------------------------------------------------------------

    @property
    def layers(self) -> dict[AdaptedLayer, str]:
        """The adapted layers -> their clean names."""
        return {
            module: names[0]
            for module, names in self.names.items()
            if isinstance(module, AdaptedLayer) and CHILD_NAME in module._modules
        }

    def blocks(self, adapter: str | None = None) -> list[ModelBlock]:
        """Return the blocks of all adapters, or of one, layer by layer."""
        return [
            ModelBlock(join(name, weight), layer, other, block)
            for layer, name in self.layers.items()
            for (other, weight), block in layer.disha.blocks_by_name(adapter).items()
        ]

    def find_borrowers(self) -> dict[AdapterBlock, dict[str, AdaptedLayer]]:
        """Return each block -> the names of the tied parameters that borrow it -> their layers."""
        borrowers: dict[AdapterBlock, dict[str, AdaptedLayer]] = {
            model_block.block: {} for model_block in self.blocks()
        }
        for layer, name in self.layers.items():
            for child in layer.disha.children():
                for parameter, block in child.borrowed:  # type: ignore[union-attr]
                    if block not in borrowers:
                        raise AdapterStateError(
                            f"{join(name, parameter)} is tied to a parameter outside this part of "
                            "the model, and its block is there; pass the complete model"
                        )
                    borrowers[block][join(name, parameter)] = layer
        return borrowers

    @property
    def adapters(self) -> list[str]:
        """The names of all adapters, in the order of the layers."""
        names: list[str] = []
        for layer in self.layers:
            names += [name for name in layer.disha if name not in names]
        return names

    def require(self, adapter: str) -> list[ModelBlock]:
        """Return the blocks of an adapter, or raise if there are none."""
        blocks = self.blocks(adapter)
        if not blocks and adapter not in self.adapters:
            known = ", ".join(map(repr, self.adapters)) or "none"
            raise ArgumentError(f"the model has no adapter {adapter!r}; it has {known}")
        return blocks

    def check_can_add(
        self,
        adapter: str,
        action: str = "add an adapter",
        before_wrapping: str = "inject first, then wrap. To load into an existing adapter, pass "
        "replace=True to load_adapter",
    ) -> None:
        """Raise unless an adapter of this name can be added to the model."""
        check_adapter_name(adapter)
        self.refuse_inside(action)
        self.refuse_wrapped(action, before_wrapping)
        if adapter in self.adapters:
            raise ArgumentError(
                f"the model has an adapter {adapter!r} already; choose another name"
            )

    def list_trained(self, adapter: str | None = None) -> list[ModelParameter]:
        """Return the parameters that train with an adapter, or with any, besides the blocks.

        One that requires gradients, but that `also_train` did not name, trains with every adapter.
        """
        return [
            parameter
            for parameter in self.parameters
            if parameter.is_claimed(adapter)
            or (parameter.value.requires_grad and not parameter.is_claimed())
        ]

    def refuse_inside(self, action: str) -> None:
        """Raise if adapters are merged, or this thread or task is in a context of the model."""
        refuse_merged(self.layers, action)
        for layer in self.layers:
            context = current_context(layer.disha.group)
            if context is not None:
                raise ModeError(f"can't {action} inside {context.function}; leave it first")

    def open_contexts(self) -> list[Context]:
        """Return the contexts of the model that are open in any thread or task."""
        groups = {layer.disha.group for layer in self.layers}
        return [context for context in list(OPEN_CONTEXTS) if any(map(context.covers, groups))]

    # --- wrappers and shards ---------------------------------------------------------------------

    def refuse_wrapped(self, action: str, remedy: str) -> None:
        """Raise if a wrapper that keeps track of parameters has the model or a part of it."""
        classes = tuple(cls for cls, wrapper in self._wrappers if wrapper.distributes)
        for module in self.names:
            if isinstance(module, classes):
                raise TargetError(
                    f"can't {action}: the model is wrapped by {type(module).__name__}; {remedy}"
                )

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP manages a module, or one has a sharded or partitioned parameter."""
        classes = tuple(cls for cls, wrapper in self._wrappers if wrapper.shards)
        for module in self.names:
            if isinstance(module, classes):
                return True
            for parameter in module._parameters.values():
                if is_sharded(parameter) or is_partitioned(parameter):
                    return True
        return False

    def reshard(self) -> None:
        """Make FSDP hold shards. Parameters that a forward has gathered are only temporary."""
        cls = imported_class(_FSDP, "FSDPModule")
        for module in self.names:
            if isinstance(module, cls):
                module.reshard()

    @cached_property
    def ranks(self) -> Ranks:
        """The ranks that hold the shards of the parameters; FSDP reshards what it has gathered."""
        self.reshard()  # a gathered parameter does not show its ranks
        return Ranks(self.list_parameters())

    def list_parameters(self) -> list[nn.Parameter]:
        """Return all parameters, those of blocks included, each once."""
        blocks = [model_block.values for model_block in self.blocks()]
        return [*(parameter.value for parameter in self.parameters), *blocks]


@contextmanager
def all_or_nothing(view: ModelView, around: ExitStack | None = None) -> Iterator[ExitStack]:
    """Give the body a stack, on which it puts how to undo each change, before it makes the change.

    If the body raises, all changes are undone. `around` is the stack of a larger operation, which
    may still raise later and then undoes these changes too.
    """
    view.reshard()
    with LOCK, ExitStack() as undo:
        yield undo
        # The body has not raised: forget the undo steps, or hand them to `around`.
        undo_later = undo.pop_all()
        if around is not None:
            around.push(undo_later)
