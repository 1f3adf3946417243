"""ModelView: the modules, parameters, buffers and adapters of a model, from one walk over it.

A public function builds one view and passes it down. Names are those in the unwrapped model, so
`torch.compile`, DDP, FSDP and checkpointing do not change what targets match and files hold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from disha.effective.contexts import (
    LOCK,
    OPEN_CONTEXTS,
    Context,
    current_context,
)
from disha.errors import (
    AdapterStateError,
    ArgumentError,
    ArgumentTypeError,
    ModeError,
    TargetError,
)
from disha.layers.adapted import AdaptedLayer, refuse_merged, set_state, state_of
from disha.layers.adapters import Adapters, check_adapter_name
from disha.layers.blocks import AdapterBlock
from disha.layers.containers import CHILD_NAME
from disha.layers.encoder import EncoderLayer, guard_encoder
from disha.layers.memory import (
    NOWHERE,
    PLACES,
    Flag,
    FormerBuffer,
    ModelMemory,
    Place,
    is_below,
    place_copy,
    walk_up,
)
from disha.layers.weights import count_values
from disha.layers.wrappers import Wrapper, imported_wrappers
from disha.model.found import ModelBlock, ModelTensor, persistent_buffers_of
from disha.sharding.ranks import Ranks
from disha.sharding.tensors import is_sharded
from disha.sharding.zero import is_partitioned
from disha.text import join

MOST_NAMES = 16
"""The most names of a module that a view takes. Where modules are shared at many levels, they have
exponentially many."""


class ModelView:
    """The modules, parameters and adapters of a model; the adapters are always up to date."""

    names: dict[nn.Module, tuple[str, ...]]
    """Every module -> its clean names; a shared module has several. Adapters are left out."""

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(f"model must be an nn.Module, got {type(model).__name__}")
        self.model = model
        self.names = {}
        self._holders: list[nn.Module] = []  # of parameters, in the order of `named_parameters`
        self.wrappers: list[tuple[Any, Wrapper]] = []  # wrapping modules, and their kinds
        self._classes = imported_wrappers()
        self._walk(model, "", on_path=set())
        place_copy(self.names, [(layer, layer.disha) for layer in self.find_layers()])

    def _walk(self, module: nn.Module, name: str, on_path: set[nn.Module]) -> None:
        if isinstance(module, Adapters):
            self._holders += module.modules()
            return
        names = self.names.get(module, ())
        if module in on_path or len(names) == MOST_NAMES:
            return
        self.names[module] = (*names, name)
        self._holders.append(module)
        wrappers = [wrapper for cls, wrapper in self._classes if isinstance(module, cls)]
        self.wrappers += [(module, wrapper) for wrapper in wrappers]
        children = module._modules
        if not children:
            return
        on_path.add(module)
        # A child in a wrapper has the name of the wrapper itself.
        hidden = [wrapper.child for wrapper in wrappers]
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
    def parameters(self) -> tuple[ModelTensor, ...]:
        """The parameters of the model, each once. Those of blocks are left out."""
        found: dict[int, ModelTensor] = {}
        for module, names in self.names.items():
            for attribute, parameter in module._parameters.items():
                if parameter is not None:
                    new = ModelTensor(module, attribute, "flags")
                    known = found.setdefault(id(parameter), new)
                    known.names += tuple(join(name, attribute) for name in names)
                    known.holders += ((module, attribute),)
        return tuple(found.values())

    @cached_property
    def parameters_by_name(self) -> dict[str, ModelTensor]:
        """Every clean name of a parameter -> the parameter."""
        return {name: parameter for parameter in self.parameters for name in parameter.names}

    @cached_property
    def buffers(self) -> tuple[ModelTensor, ...]:
        """The persistent buffers of the model, except sparse ones and those of special classes."""
        buffers = []
        for module, names in self.names.items():
            persistent = persistent_buffers_of(module)
            is_norm = "running_mean" in persistent
            for attribute, buffer in persistent.items():
                is_plain = type(buffer) is Tensor or is_sharded(buffer)
                if is_plain and buffer.layout is torch.strided:
                    aliases = tuple(join(name, attribute) for name in names)
                    holders = ((module, attribute),)
                    buffers.append(
                        ModelTensor(module, attribute, "buffers", is_norm, aliases, holders)
                    )
        return tuple(buffers)

    @property
    def tensors(self) -> tuple[ModelTensor, ...]:
        """The parameters and the buffers."""
        return (*self.parameters, *self.buffers)

    # --- adapters --------------------------------------------------------------------------------

    def find_layers(self) -> dict[AdaptedLayer, str]:
        """Return the adapted layers, as they are now -> their clean names."""
        layers: dict[AdaptedLayer, str] = {}
        for module, names in self.names.items():
            if isinstance(module, AdaptedLayer) and CHILD_NAME in module._modules:
                layers[module] = names[0]
        return layers

    def blocks(self, adapter: str | None = None) -> list[ModelBlock]:
        """Return the blocks of all adapters, or of one, layer by layer."""
        return [
            ModelBlock(join(name, weight), layer, other, block)
            for layer, name in self.find_layers().items()
            for (other, weight), block in layer.disha.blocks_by_name(adapter).items()
        ]

    def find_borrowers(self) -> dict[AdapterBlock, dict[str, AdaptedLayer]]:
        """Return each block -> the names of the tied parameters that borrow it -> their layers."""
        borrowers: dict[AdapterBlock, dict[str, AdaptedLayer]] = {
            model_block.block: {} for model_block in self.blocks()
        }
        for layer, name in self.find_layers().items():
            for tied in layer.disha.borrowed.values():
                for parameter, block in tied:
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
        return list(dict.fromkeys(name for layer in self.find_layers() for name in layer.disha))

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

    def list_trained(self, adapter: str | None = None) -> list[ModelTensor]:
        """Return the parameters that train with an adapter, or with any, besides the blocks.

        One that requires gradients, but that `also_train` did not name, trains with every adapter.
        """
        trained = []
        for parameter in self.parameters:
            claimant = parameter.claimant
            if claimant is None:
                trains = parameter.value.requires_grad
            else:
                trains = adapter in (None, claimant)
            if trains:
                trained.append(parameter)
        return trained

    def refuse_inside(self, action: str) -> None:
        """Raise if adapters are merged, or this thread or task is in a context of the model."""
        refuse_merged(self.find_layers(), action)
        for layer in self.find_layers():
            context = current_context(layer.disha.group)
            if context is not None:
                raise ModeError(f"can't {action} inside {context.function}; leave it first")

    def open_contexts(self) -> list[Context]:
        """Return the contexts of the model that are open in any thread or task."""
        groups = {layer.disha.group for layer in self.find_layers()}
        return [context for context in list(OPEN_CONTEXTS) if any(map(context.covers, groups))]

    # --- what the adapters remember --------------------------------------------------------------

    @property
    def memories(self) -> list[ModelMemory]:
        """The memories that know modules of the model: one, unless parts got adapters alone."""
        places = [PLACES.get(module) for module in self.names]
        return list({place.memory: None for place in places if place is not None})

    def find_today(self, memory: ModelMemory, name: str) -> str | None:
        """Return today's name of what a memory knows by a name, or None if it is elsewhere."""
        for above in walk_up(name):
            if (memory, above) in self._names_today:
                return join(self._names_today[memory, above], name[len(above) :].removeprefix("."))
        return None

    @cached_property
    def _names_today(self) -> dict[tuple[ModelMemory, str], str]:
        names_today: dict[tuple[ModelMemory, str], str] = {}
        for module, names in self.names.items():
            memory, names_in_memory = PLACES.get(module, NOWHERE)
            names_today |= {(memory, name): names[0] for name in names_in_memory}
        return names_today

    def _forget_names(self) -> None:
        self.__dict__.pop("_names_today", None)

    def keep(self, undo: ExitStack) -> None:
        """Let `undo` put back adapters, what they remember, and all `requires_grad` flags."""
        states = {module: state_of(module) for module in self.names}
        places = {module: PLACES.get(module) for module in self.names}
        memories = [(memory, memory.state) for memory in self.memories]
        flags = [(parameter, parameter.requires_grad) for parameter in self.list_parameters()]

        def put_back() -> None:
            for module, state in states.items():
                set_state(module, state)
            for module, place in places.items():
                PLACES.pop(module, None)
                if place is not None:
                    PLACES[module] = place
            self._forget_names()
            for memory, former in memories:
                memory.state = former
            self.guard_encoders()
            for parameter, flag in flags:
                parameter.requires_grad = flag

        undo.callback(put_back)

    def unite(self) -> ModelMemory:
        """Let one memory know all of the model, by the names of today; return it.

        It takes over what those of parts know, which got adapters by themselves.
        """
        # `above` is the name of this part in its memory.
        memory, (above, *_) = PLACES.get(self.modules[""]) or Place(ModelMemory(), ("",))
        places = {
            module: Place(memory, tuple(join(above, name) for name in names))
            for module, names in self.names.items()
        }
        if all(PLACES.get(module) == place for module, place in places.items()):
            return memory

        def rename(other: ModelMemory, name: str) -> str | None:
            today = self.find_today(other, name)
            if today is None:  # outside of this part
                return name if other is memory else None
            owner = next(above for above in walk_up(today) if above in self.modules)
            known_by, known_names = PLACES.get(self.modules[owner], NOWHERE)
            is_another = not any(is_below(name, known) for known in known_names)
            if known_by is other and is_another:
                return None  # another module has this name now
            return join(above, today)

        state = memory.state.renamed(partial(rename, memory))
        for other in self.memories:
            if other is not memory:
                state = state.joined(other.state.renamed(partial(rename, other)))
        layers = self.find_layers()
        for layer in layers:
            layer_state = layer.disha.state(type(layer))
            set_state(layer, layer_state.but(memory=memory, names=places[layer].names))
        for group in {layer.disha.group for layer in layers}:
            if memory.group not in group.lineage:
                members = [layer.disha for layer in layers if layer.disha.group is group]
                group.split_off(members, parent=memory.group)
        PLACES.update(places)
        self._forget_names()
        memory.state = state
        return memory

    def remember(self, formers: Mapping[ModelTensor, Flag | FormerBuffer]) -> None:
        """Let the memory of each tensor know this of it, under all of its names."""
        changed = defaultdict[tuple[ModelMemory, str], dict[str, Any]](dict)
        for tensor, former in formers.items():
            for memory, name in tensor.names_in_memory():
                changed[memory, tensor.table][name] = former
        for (memory, table), new in changed.items():
            known = vars(memory.state)[table]
            memory.state = memory.state.but(**{table: {**known, **new}})

    def forget(self, adapters: Container[str]) -> None:
        """Forget the specs of adapters that are removed from this part."""
        for memory in self.memories:
            specs = {
                key: spec
                for key, spec in memory.state.specs.items()
                if key[0] not in adapters or self.find_today(memory, key[1]) is None
            }
            left = {adapter for adapter, _ in specs}
            routing = {name: why for name, why in memory.state.routing.items() if name in left}
            memory.state = memory.state.but(specs=specs, routing=routing)

    def forget_buffers(self) -> None:
        """Forget what the buffers of this part were before the first adapter."""
        for memory in self.memories:
            buffers = {
                name: former
                for name, former in memory.state.buffers.items()
                if self.find_today(memory, name) is None
            }
            memory.state = memory.state.but(buffers=buffers)

    @property
    def has_adapters_anywhere(self) -> bool:
        """Whether the model still has adapters, also outside of this part of it."""
        if self.find_layers():
            return True
        return any(
            len(adapters) and self.find_today(memory, adapters.names[0]) is None
            for memory in self.memories
            for adapters in list(memory.members)
        )

    def refuse_half_of_ties(self, action: str) -> None:
        """Raise if a weight of this part is tied to one outside: both have one update."""
        for memory in self.memories:
            for spec in memory.state.specs.values():
                names = [self.find_today(memory, name) for name in (spec.name, *spec.tied)]
                inside = [name for name in names if name is not None]
                if not inside or None not in names:
                    continue
                outside = (spec.name, *spec.tied)[names.index(None)]
                living = [name for adapters in list(memory.members) for name in adapters.names]
                if not any(is_below(outside, name) for name in living):
                    continue  # this is a copy of one side alone
                raise AdapterStateError(
                    f"can't {action} here: {inside[0] or 'the weight'} is tied to {outside}, "
                    "which is outside this part of the model; pass the complete model"
                )

    def list_lost_layers(self, adapter: str) -> list[str]:
        """Return the names, at the injection, of the weights that the adapter adapts no more.

        Code of the user may put another module in the place of an adapted one, as the method
        `resize_token_embeddings` of transformers does. The block goes with the old module.
        """
        adapted = {
            (model_block.layer.disha.memory, join(name, model_block.block.spec.own_name))
            for model_block in self.blocks(adapter)
            for name in model_block.layer.disha.names
        }
        names = [
            self.find_today(memory, name)
            for memory in self.memories
            for other, name in memory.state.specs
            if other == adapter and (memory, name) not in adapted
        ]
        return [name for name in names if name is not None]

    def guard_encoders(self) -> None:
        """Let encoders return the same with adapted layers as with plain ones; else undo that."""
        for module in self.names:
            if isinstance(module, EncoderLayer):
                is_adapted = any(isinstance(inner, AdaptedLayer) for inner in module.modules())
                guard_encoder(module, is_adapted)

    # --- wrappers and shards ---------------------------------------------------------------------

    @property
    def wrapper(self) -> nn.Module | None:
        """A wrapper in the model that keeps track of its parameters; None if there is none."""
        return next((module for module, wrapper in self.wrappers if wrapper.distributes), None)

    def refuse_wrapped(self, action: str, remedy: str) -> None:
        """Raise if a wrapper has the model or a part of it."""
        if self.wrapper is not None:
            name = type(self.wrapper).__name__
            raise TargetError(f"can't {action}: the model is wrapped by {name}; {remedy}")

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP manages a module, or one has a sharded or partitioned parameter."""
        if any(wrapper.shards for _, wrapper in self.wrappers):
            return True
        return any(is_sharded(value) or is_partitioned(value) for value in self.list_parameters())

    def reshard(self) -> None:
        """Make FSDP hold shards. Parameters that a forward has gathered are only temporary."""
        for module, wrapper in self.wrappers:
            if wrapper.name == "FSDPModule":
                module.reshard()

    @cached_property
    def ranks(self) -> Ranks:
        """The ranks that hold the shards of the parameters; FSDP reshards what it has gathered."""
        self.reshard()  # a gathered parameter does not show its ranks
        return Ranks(self.list_parameters())

    def list_parameters(self) -> list[nn.Parameter]:
        """Return all parameters, those of blocks included, each once, in the model's order."""
        held = [value for module in self._holders for value in module._parameters.values()]
        return list({id(value): value for value in held if value is not None}.values())

    def count_parameters(self, trains: Callable[[ModelTensor], bool]) -> tuple[int, int]:
        """Return how many values train, and how many there are; `trains` is asked except of blocks.

        A lazy parameter has no size yet.
        """
        blocks = [model_block.values for model_block in self.blocks()]
        sizes = [(count_values(block), block.requires_grad) for block in blocks]
        for parameter in self.parameters:
            if not is_lazy(parameter.value):
                size = count_values(parameter.value, parameter.module)
                sizes.append((size, trains(parameter)))
        trained = sum(size for size, is_trained in sizes if is_trained)
        return trained, sum(size for size, _ in sizes)


@contextmanager
def all_or_nothing(view: ModelView, around: ExitStack | None = None) -> Iterator[ExitStack]:
    """Put back what `ModelView.keep` keeps, and undo what is on the stack, if the body raises.

    Before it makes any other change, the body puts on the stack how to undo that. `around` is the
    stack of a larger operation, which may still raise later and then undoes these changes too.
    """
    view.reshard()
    with LOCK, ExitStack() as undo:
        view.keep(undo)
        yield undo
        # The body has not raised: forget the undo steps, or hand them to `around`.
        undo_later = undo.pop_all()
        if around is not None:
            around.push(undo_later)
