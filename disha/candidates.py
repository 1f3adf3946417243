"""Candidates: what a target or a file can select in a model, and whether it can be adapted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.sparse import SparseSemiStructuredTensor

from disha import functional
from disha.config import AdapterConfig
from disha.errors import ArgumentError
from disha.freezing import attributes_of
from disha.functional import Geometry, Layout, Rows, Update
from disha.layers import (
    AdaptedLayer,
    Slot,
    declared_slots,
    device_of_weight,
    matrix_parameters,
    offloading_hooks,
    quantisation_of,
    read_weight,
    slot_of,
    stored_weight,
    weight_shape,
)
from disha.model import ModelView, join
from disha.sharding import Split, is_partitioned, split_of

__all__ = ["Candidate", "UnknownLayout", "as_declared", "candidates_of"]


@dataclass(frozen=True)
class UnknownLayout:
    """A matrix parameter that is not adapted because its layout is unknown.

    Attributes:
        name: its name in the model.
        shape: its shape.
    """

    name: str
    shape: tuple[int, ...]

    @property
    def reason(self) -> str:
        """Why it is not adapted, and what to do."""
        return (
            f"the layout of this parameter of shape {self.shape} is unknown; declare it, such as "
            f"{self.remedy}"
        )

    @property
    def remedy(self) -> str:
        """The argument that would adapt it."""
        axes = {2: "out in", 3: "expert out in"}.get(len(self.shape), "out in *kernel")
        return f"layouts={{{re.escape(self.name) + '$'!r}: {axes!r}}}"


@dataclass(frozen=True)
class Candidate:
    """A weight, a matrix parameter of unknown layout, or a module without either.

    Attributes:
        module: the module.
        module_names: its clean names.
        attribute: the name of the weight or matrix in the module; empty if there is none.
        slot: the place of the weight; None if its layout is unknown.
        preloaded: whether accelerate loads the weight together with those of an outer module.
    """

    module: nn.Module
    module_names: tuple[str, ...]
    attribute: str = ""
    slot: Slot | None = None
    preloaded: bool = False

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Its names in targets and files."""
        below = self.attribute if self.slot is None else self.slot.name
        return tuple(join(name, below) for name in self.module_names)

    @property
    def name(self) -> str:
        """Its main name."""
        return self.names[0]

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Its names in `layouts` and `rows`, where a module's name means its `weight`."""
        modules = self.module_names if self.attribute == "weight" else ()
        parameters = (join(name, self.attribute) for name in self.module_names)
        return (*self.names, *modules, *parameters)

    @property
    def type_name(self) -> str:
        """The name of the module's class."""
        return type(self.module).__qualname__

    @property
    def parameter(self) -> nn.Parameter | None:
        """The parameter, or None if the weight is computed from others."""
        return self.module._parameters.get(self.attribute)

    @property
    def unknown(self) -> UnknownLayout | None:
        """The report on a matrix of unknown layout, or None."""
        if self.slot is not None or self.parameter is None:
            return None
        return UnknownLayout(self.name, tuple(self.parameter.shape))

    # --- of weights only -------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """The weight's layout."""
        assert self.slot is not None
        return self.slot.layout

    @property
    def rows(self) -> Rows:
        """The adapted outputs; empty for all."""
        return () if self.slot is None else self.slot.rows

    @property
    def opaque(self) -> bool:
        """Whether the weight is opaque, so the update is added to its module's output."""
        return self.slot is not None and self.slot.opaque

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, with all of its rows."""
        assert self.slot is not None
        return weight_shape(self.module, self.slot)

    @property
    def geometry(self) -> Geometry:
        """The sizes of the adapted part."""
        return self.layout.geometry(self.shape, self.rows)

    @property
    def is_meta(self) -> bool:
        """Whether the weight has no values, not even while its module runs."""
        look = stored_weight if self.opaque else read_weight
        weight = look(self.module, self.attribute)
        return isinstance(weight, Tensor) and device_of_weight(self.module, weight).type == "meta"

    def laid_out(self, layout: Layout) -> Candidate:
        """Return the parameter, with all of its rows, as a weight of another layout."""
        return replace(self, slot=slot_of(self.attribute, layout))

    def in_rows(self, rows: Rows) -> Candidate:
        """Return these rows of the weight."""
        assert self.slot is not None
        return replace(self, slot=replace(self.slot, rows=rows))

    def obstacle(self, method: str) -> str | None:
        """Return why `method` can't adapt it, or None if it can."""
        module, slot = self.module, self.slot
        if slot is None:
            unknown = self.unknown
            return f"no layer kind adapts {self.type_name}" if unknown is None else unknown.reason
        taken = None if isinstance(module, AdaptedLayer) else _taken_name(module)
        if taken not in (None, self.attribute):
            return f"it has its own attribute {taken!r}, which adapters would replace"
        if self.preloaded:
            return (
                "accelerate loads its weight together with all others of an outer module "
                "(preload_module_classes), and would look for the block there; inject first, then "
                "offload"
            )
        found = self._opaque_obstacle(method) if slot.opaque else self._dense_obstacle()
        return found or self._rows_obstacle()

    def _opaque_obstacle(self, method: str) -> str | None:
        """Return why `method` can't adapt an opaque weight, which is not read here."""
        quantisation = quantisation_of(self.module, stored_weight(self.module, self.attribute))
        if quantisation is None or quantisation.read is not None:
            return None
        if not functional.method_of(method).reads_weight:
            return None
        others = functional.method_names(lambda one: not one.reads_weight)
        return (
            f"its weight is quantised ({quantisation.name}) and can't be read as numbers, as "
            f"method {method!r} requires; methods without this need: {others}"
        )

    def _dense_obstacle(self) -> str | None:
        """Return why no method can adapt a weight that is not opaque."""
        weight = read_weight(self.module, self.attribute)
        if isinstance(weight, UninitializedParameter):
            return "its weight is not initialised yet; run the model once before injecting"
        if is_partitioned(weight):
            return (
                "its weight is partitioned by DeepSpeed ZeRO-3 (deepspeed.zero.Init), under which "
                "adapters can't act; use ZeRO-2 or fully_shard"
            )
        # Any floating-point dtype will do: a user's hook may cast the weight before each forward.
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            return "its weight is not a floating-point tensor"
        if weight.layout is not torch.strided or isinstance(weight, SparseSemiStructuredTensor):
            return "its weight is sparse; store it as a dense tensor (Tensor.to_dense)"
        if not weight.numel():
            return "its weight is empty"
        split = split_of(weight)
        if split is not None and split.obstacle is not None:
            return split.obstacle
        return self.layout.misfit(weight.shape)

    def _rows_obstacle(self) -> str | None:
        """Return why the weight can't have these rows."""
        out_features = self.layout.geometry(self.shape).out_features
        beyond = [rows for rows in self.rows if rows[1] > out_features]
        return f"rows {beyond[0]} are out of range: it has {out_features} rows" if beyond else None

    def misfit(self, config: AdapterConfig, r: int) -> str | None:
        """Return why a block of that size does not fit the weight, or None if it does."""
        problem = self.layout.reason_against(self.geometry, r, config.r_out)
        split = None if self.opaque else split_of(read_weight(self.module, self.attribute))
        return problem if split is None else problem or self._cut_misfit(config, r, split)

    def _cut_misfit(self, config: AdapterConfig, r: int, split: Split) -> str | None:
        """Return why a block can't be cut like a tensor-parallel weight, or None if it can."""
        placed = f"its weight is a DTensor placed as {split.placements}"
        if config.dropout:
            return f"{placed}, and each rank would drop different inputs of it; use dropout=0"
        method = functional.method_of(config.method)
        shape = method.block_shape(self.layout, self.shape, r, config.r_out, self.rows)
        update = Update(method, torch.empty(shape, device="meta"), rows=self.rows)
        parts = split.parts
        cuts = [functional.update_of_part(update, self.layout, self.shape, part) for part in parts]
        if None not in cuts:
            return None
        ends = " and ".join(f"{first}:{stop}" for first, stop in parts[cuts.index(None)])
        return (
            f"{placed}, and a {config.method!r} block of r={r} can't be cut at the edges of a "
            f"rank's part ({ends}); choose an r that divides these, or another method"
        )


def _taken_name(module: nn.Module) -> str | None:
    """Return an attribute of a module whose name the adapted class needs, or None."""
    # Not by hasattr, which would run a property of the user's class.
    own = {*attributes_of(module), *module._parameters, *module._buffers, *module._modules}
    return next((n for n in _ADDED if n in own or hasattr(type(module), n)), None)


_ADDED = sorted(
    name
    for name in {*vars(AdaptedLayer), *AdaptedLayer.__annotations__}.difference(dir(nn.Module))
    if not name.startswith("_")
)
"""The public names that adapting adds to a module."""


def candidates_of(view: ModelView) -> list[Candidate]:
    """Return all candidates of a model, in the order of its modules.

    Args:
        view: the model.
    """
    preloaded: set[nn.Module] = set()
    for module in view.names:
        if any(hook.place_submodules for hook in offloading_hooks(module)):
            preloaded |= set(view.inside(module))
    found: list[Candidate] = []
    for module, names in view.names.items():
        slots = declared_slots(module)
        own = [
            Candidate(module, names, slot.parameter, slot, module in preloaded) for slot in slots
        ]
        if not any(slot.opaque for slot in slots):
            known = {slot.parameter for slot in slots}
            unknown = (name for name in matrix_parameters(module) if name not in known)
            own += [Candidate(module, names, name) for name in unknown]
        found += own or [Candidate(module, names)]
    return found


def as_declared(
    candidates: list[Candidate], layouts: Mapping[str, str], rows: Mapping[str, Rows]
) -> list[Candidate]:
    """Return candidates with the layouts and rows that the user declares.

    Args:
        candidates: those of a model.
        layouts: regex of names of parameters -> layout.
        rows: regex of names of weights or parameters -> rows.

    Raises:
        ArgumentError: a parameter can't have the layout.
    """
    if not layouts and not rows:
        return candidates
    found: dict[Candidate, None] = {}  # a set in order: several slots may become one weight
    for one in candidates:
        if not one.opaque and one.attribute in matrix_parameters(one.module):
            pattern = _first_match(layouts, one.parameter_names)
            if pattern is not None:
                one = one.laid_out(functional.layout_of(layouts[pattern]))
                misfit = one.layout.misfit(one.shape)
                if misfit is not None:
                    raise ArgumentError(
                        f"layouts={{{pattern!r}: {one.layout.pattern!r}}} does not fit {one.name}: "
                        f"{misfit}; give it a layout with as many axes"
                    )
        if one.slot is not None:
            pattern = _first_match(rows, one.parameter_names)
            one = one if pattern is None else one.in_rows(rows[pattern])
        found[one] = None
    return list(found)


def _first_match(patterns: Iterable[str], names: Sequence[str]) -> str | None:
    """Return the first pattern that is found in any of the names, or None."""
    return next((p for p in patterns if any(re.search(p, name) for name in names)), None)
