"""Which weights of a model a target selects.

The candidates are the weights of the model, each as a `PlannedLayer` that has no block yet. A
target selects some of them by their names. What it selects and `exclude` leaves out stays in the
selection, with that reason.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import nn

from disha.checks import check_regexes
from disha.config import ALL_LINEAR, AdapterConfig, Target, find_first_match, find_matching
from disha.errors import ArgumentError
from disha.functional import layout_of
from disha.functional.layouts import MATRIX, OutputRanges
from disha.layers.kinds import declared_slots, slot_of
from disha.layers.weights import matrix_weights
from disha.model.plan import EXCLUDED, Place, PlannedLayer
from disha.model.reasons import reason_against_adapting
from disha.model.view import ModelView
from disha.sharding.imported import imported_class
from disha.text import first_few, group_by_reason


class Selection:
    """What one argument, such as `target_regex`, selects among the weights of a model.

    Attributes:
        argument: the name of the argument, for errors.
        regexes: those of the target; none if it is a predicate.
        candidates: all weights of the model, with the declared layouts and rows.
        new_rows: regex of the target -> the rows of what it selects that get new values; empty if
            weights are selected for a method.
    """

    def __init__(
        self,
        view: ModelView,
        argument: str,
        target: Target,
        config: AdapterConfig,
        new_rows: Mapping[str, OutputRanges] = MappingProxyType({}),
    ) -> None:
        self.view = view
        self.argument = argument
        self.target = target
        self.config = config
        self.new_rows = new_rows
        self.regexes = () if callable(target) else check_regexes(argument, target)
        self.candidates = list_weights(view, config)
        if new_rows:
            self.candidates = list(dict.fromkeys(map(as_table, self.candidates)))
        elif config.layouts or config.rows:
            declared = [_declare(layer, config) for layer in self.candidates]
            # Slots that were parts of one weight have become that weight, which counts once.
            self.candidates = list(dict.fromkeys(declared))

    def select(self) -> list[PlannedLayer]:
        """Return what is selected: weights, and modules that have parameters but no matrix."""
        linear: Collection[Place] = ()
        if ALL_LINEAR in self.regexes:
            linear = _find_linear_weights(self.view, self.candidates)
        # The forward of nn.MultiheadAttention reads the weight of its child `out_proj`.
        readers: dict[nn.Module, nn.Module] = {
            module.out_proj: module
            for module in self.view.names
            if isinstance(module, nn.MultiheadAttention)
        }
        selected = []
        for layer in self.candidates:
            # A target may name the weight, its module, or the module that reads it.
            reader = readers.get(layer.module, layer.module)
            by_name = dict.fromkeys((*layer.names, *layer.module_names), layer.module)
            by_name |= dict.fromkeys(self.view.names[reader], reader)
            names = [*by_name]
            if layer.place not in linear and not self._matches(by_name):
                continue
            if not layer.attribute and not _has_parameters(layer.module):
                continue  # a container, for example, which a target may match without harm
            regex = find_first_match(self.new_rows, names)
            if regex is not None and layer.slot is not None:
                slot = replace(layer.slot, output_ranges=self.new_rows[regex])
                layer = replace(layer, slot=slot)
            elif find_matching(self.config.exclude, names):
                layer = replace(layer, reason=EXCLUDED)
            selected.append(layer)
        return selected

    def _matches(self, by_name: Mapping[str, nn.Module]) -> bool:
        """Whether the target matches any of these names, each given with its module."""
        if callable(self.target):
            return any(self.target(name, module) for name, module in by_name.items())
        return bool(find_matching(self.regexes, [*by_name]))

    @property
    def unknown(self) -> tuple[PlannedLayer, ...]:
        """The matrix parameters of unknown layout."""
        return tuple(layer for layer in self.candidates if layer.slot is None and layer.attribute)

    def refuse_unused(self) -> None:
        """Raise if a pattern of the target, or of another setting, matches nothing in the model."""
        names = [
            name
            for layer in self.candidates
            for name in (*layer.module_names, *layer.names_to_match)
        ]
        regexes = [regex for regex in self.regexes if regex != ALL_LINEAR]
        refuse_unused(self.argument, regexes, names)
        if self.new_rows:
            return
        for setting in ("exclude", "rank_pattern", "layouts", "rows"):
            refuse_unused(setting, vars(self.config)[setting], names)
        for key, pattern in self.config.layouts.items():
            matched = [x for x in self.candidates if find_matching([key], x.names_to_match)]
            patterns = [layer.slot.layout.pattern for layer in matched if layer.slot is not None]
            if matched and pattern not in patterns:
                name = matched[0].full_name
                raise ArgumentError(
                    f"layouts {key!r} matches only weights whose layout is known, such as {name}; "
                    f"to give it another, name it whole: layouts={ {name: pattern} }"
                )

    def explain_nothing(self, skipped: Sequence[PlannedLayer]) -> str:
        """Return the message of the error if nothing that is selected can be adapted."""
        request = f"{self.argument}={self.target!r}"
        if callable(self.target):
            request = "the predicate"
        if skipped:
            return f"{request} selects only modules that can't be adapted: {list_reasons(skipped)}"
        if [*self.regexes] == [ALL_LINEAR] and self.unknown:
            first = self.unknown[0]
            return f"{request} selects no layer; {first.name}: {reason_against_adapting(first)}"
        message = f"{request} selects no layer that can be adapted"
        names = [layer.name for layer in self.candidates if layer.slot is not None]
        nearest = list_nearest(str(self.target), names)
        return f"{message}; the nearest names are {nearest}" if nearest else message


# --- candidates ----------------------------------------------------------------------------------


def list_weights(view: ModelView, config: AdapterConfig) -> list[PlannedLayer]:
    """Return all weights, matrices of unknown layout, and modules that have neither."""
    layers = []
    for module, names in view.names.items():
        if isinstance(module, torch.jit.ScriptModule):  # its code is compiled and can't change
            layers.append(PlannedLayer(module, names, config))
            continue
        slots = declared_slots(module)
        weights = [PlannedLayer(module, names, config, slot.parameter, slot) for slot in slots]
        if not slots or not slots[0].quantized:
            declared = [slot.parameter for slot in slots]
            weights += [
                PlannedLayer(module, names, config, name)
                for name in matrix_weights(module)
                if name not in declared
            ]
        layers += weights or [PlannedLayer(module, names, config)]
    return layers


def _declare(layer: PlannedLayer, config: AdapterConfig) -> PlannedLayer:
    """Return a weight with the layout and the rows that the user declares for it."""
    slot = layer.slot
    is_quantized = slot is not None and slot.quantized
    key = find_layout_key(layer, config)
    if key is not None and not is_quantized and layer.attribute in matrix_weights(layer.module):
        layout = layout_of(config.layouts[key])
        reason = layout.reason_against_shape(layer.shape)
        if reason is not None:
            raise ArgumentError(f"layouts {key!r} does not fit {layer.name}: {reason}")
        slot = slot_of(layer.attribute, layout)
    regex = find_first_match(config.rows, layer.names_to_match)
    if regex is not None and slot is not None:
        if slot.output_ranges:
            raise ArgumentError(
                f"{layer.name} has rows of its own; choose it by its name, not by rows"
            )
        slot = replace(slot, output_ranges=config.rows[regex])
    return replace(layer, slot=slot)


def find_layout_key(layer: PlannedLayer, config: AdapterConfig) -> str | None:
    """Return the key of `layouts` that gives a weight its layout, or None.

    A weight of unknown layout takes the first key that is found in one of its names. One of a
    known layout takes only a key that is one of its names.
    """
    names = layer.names_to_match
    if layer.slot is None:
        return find_first_match(config.layouts, names)
    for key in config.layouts:
        if key.removeprefix("^").removesuffix("$").replace("\\", "") in names:
            return key
    return None


def as_table(layer: PlannedLayer) -> PlannedLayer:
    """Return a weight as a matrix that gets new rows, which are its outputs."""
    slot = layer.slot
    if layer.attribute and (slot is None or not slot.quantized):
        slot = slot_of(layer.attribute, MATRIX)
    return replace(layer, slot=slot, is_new_rows=True)


def find_tied(
    view: ModelView, layer: PlannedLayer, exclude: Iterable[str] = ()
) -> dict[str, Place]:
    """Return the other places of a layer's parameter, whose modules read its update too."""
    parameter = view.parameters_by_name.get(layer.full_name)
    quantized = layer.slot is not None and layer.slot.quantized
    if quantized or parameter is None or len(parameter.names) == 1:
        return {}
    places: dict[str, Place] = {}
    for name in parameter.names:
        owner, _, attribute = name.rpartition(".")
        place = view.modules[owner], attribute
        if place == layer.place or place in places.values():
            continue  # a shared module has several names
        if not find_matching(exclude, (name, name.removesuffix(".weight"))):
            places[name] = place
    return places


# --- "all-linear" --------------------------------------------------------------------------------


def _find_linear_weights(view: ModelView, candidates: Iterable[PlannedLayer]) -> set[Place]:
    """Return where linear weights are, except output heads that are tied to an embedding."""
    modules_of_peft = _find_modules_of_peft(view)
    tables = set()  # the parameters of embeddings, by their ids
    linear = {}
    for layer in candidates:
        # Copied to a plain dict, because a lookup in ZeRO-3's own may gather the parameter.
        parameter = dict(layer.module._parameters).get(layer.attribute)
        if isinstance(layer.module, (nn.Embedding, nn.EmbeddingBag)):
            if parameter is not None:  # else the weight is computed from others
                tables.add(id(parameter))
        elif layer.slot is not None and layer.module not in modules_of_peft:
            layout = layer.slot.layout
            if not layout.has_kernel and layout.pattern != "index out":
                linear[layer.place] = id(parameter)
    return {place for place, parameter in linear.items() if parameter not in tables}


def _find_modules_of_peft(view: ModelView) -> set[nn.Module]:
    """Return the modules that PEFT has added beside the layers that it adapts."""
    tuner = imported_class("peft.tuners.tuners_utils", "BaseTunerLayer")
    added = set()
    for module in view.names:
        if isinstance(module, tuner):
            for inner, name in view.inside(module).items():
                if name.split(".")[0] not in ("", "base_layer"):
                    added.add(inner)
    return added


def _has_parameters(module: nn.Module) -> bool:
    return any(parameter is not None for parameter in module._parameters.values())


# --- messages ------------------------------------------------------------------------------------


def refuse_unused(argument: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    """Raise if a pattern matches none of the names."""
    used = find_matching(patterns, names)
    unused = ", ".join(repr(pattern) for pattern in patterns if pattern not in used)
    if unused:
        raise ArgumentError(
            f"{argument} {unused} matches nothing in the model; correct or remove it"
        )


def list_nearest(pattern: str, names: Iterable[str]) -> str:
    """Return the names most similar to a pattern, as text; empty if there is no name."""
    # Only the end of the pattern is compared: the time grows with the product of both lengths.
    plain = re.sub(r"[^\w.]", "", pattern[-200:])
    nonempty = [name for name in names if name]
    return ", ".join(map(repr, difflib.get_close_matches(plain, nonempty, 5, 0.0)))


def list_reasons(layers: Iterable[PlannedLayer]) -> str:
    """Return the names of weights and why they are not adapted, as text."""
    reasons = group_by_reason((layer.name or "(the model)", str(layer.reason)) for layer in layers)
    return first_few(reasons, 5, "; ")
