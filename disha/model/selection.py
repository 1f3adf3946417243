"""Which weights of a model a target selects.

The candidates are the weights of the model. A target selects some of them by their names. What it
selects and `exclude` leaves out stays in the selection, with that reason.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from disha.checks import check_regexes
from disha.config import ALL_LINEAR, AdapterConfig, Target, find_first_match, find_matching
from disha.errors import ArgumentError
from disha.functional import Layout, layout_of
from disha.functional.layouts import MATRIX, OutputRanges
from disha.functional.new_rows import NEW_ROWS
from disha.layers.kinds import declare, list_weights, shape_of
from disha.layers.spec import BlockSpec
from disha.layers.weights import matrix_weights
from disha.model.plan import Skipped
from disha.model.view import ModelView
from disha.sharding.imported import imported_class
from disha.text import first_few, group_by_reason, join

EXCLUDED = "excluded"
"""The reason of what `exclude` leaves out."""

Slot = tuple[Any, str]
"""A module, and its attribute that holds a parameter."""


class Candidate(NamedTuple):
    """A weight of the model that a target may select, or a module without one."""

    module: nn.Module
    module_names: tuple[str, ...]  # its names in the model; a shared module has several
    spec: BlockSpec

    @property
    def names(self) -> tuple[str, ...]:
        """Its names in targets and files; a `weight` has the names of its module."""
        return self.spec.names

    @property
    def slot(self) -> Slot:
        """The module and the attribute that hold its parameter."""
        return self.module, self.spec.parameter

    @property
    def names_to_match(self) -> tuple[str, ...]:
        """Its names in `layouts` and `rows`, where a module's name means its `weight`."""
        names = [*self.spec.names]
        for name in self.module_names:
            if self.spec.parameter == "weight":
                names.append(name)
            names.append(join(name, self.spec.parameter))
        return tuple(names)

    def skip(self, reason: str) -> Skipped:
        """Return what a plan says of it if it is not adapted."""
        return Skipped(self.spec.name, reason, bool(self.spec.parameter))


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
        self.candidates = list_candidates(view)
        if new_rows:
            self.candidates = list(dict.fromkeys(map(as_table, self.candidates)))
        elif config.layouts or config.rows:
            declared = [_with_declaration(candidate, config) for candidate in self.candidates]
            # Parts of one weight may have become that weight, which counts once.
            self.candidates = list(dict.fromkeys(declared))

    def select(self) -> tuple[list[Candidate], list[Skipped]]:
        """Return what is selected, and what of that `exclude` leaves out."""
        linear: Collection[Slot] = ()
        if ALL_LINEAR in self.regexes:
            linear = _find_linear_weights(self.view, self.candidates)
        # The forward of nn.MultiheadAttention reads the weight of its child `out_proj`.
        readers: dict[nn.Module, nn.Module] = {
            module.out_proj: module
            for module in self.view.names
            if isinstance(module, nn.MultiheadAttention)
        }
        selected = []
        excluded = []
        for candidate in self.candidates:
            # A target may name the weight, its module, or the module that reads it.
            module = candidate.module
            reader = readers.get(module, module)
            by_name = dict.fromkeys((*candidate.names, *candidate.module_names), module)
            by_name |= dict.fromkeys(self.view.names[reader], reader)
            names = [*by_name]
            if candidate.slot not in linear and not self._matches(by_name):
                continue
            if not candidate.spec.parameter and not _has_parameters(module):
                continue  # a container, for example, which a target may match without harm
            regex = find_first_match(self.new_rows, names)
            if regex is not None:
                spec = candidate.spec.but(outputs=self.new_rows[regex])
                selected.append(candidate._replace(spec=spec))
            elif find_matching(self.config.exclude, names):
                excluded.append(candidate.skip(EXCLUDED))
            else:
                selected.append(candidate)
        return selected, excluded

    def _matches(self, by_name: Mapping[str, nn.Module]) -> bool:
        """Whether the target matches any of these names, each given with its module."""
        if callable(self.target):
            return any(self.target(name, module) for name, module in by_name.items())
        return bool(find_matching(self.regexes, [*by_name]))

    @property
    def unknown(self) -> tuple[BlockSpec, ...]:
        """The matrix parameters of unknown layout."""
        specs = [candidate.spec for candidate in self.candidates]
        return tuple(spec for spec in specs if spec.parameter and not spec.has_layout)

    def refuse_unused(self) -> None:
        """Raise if a pattern of the target, or of another setting, matches nothing in the model."""
        names = [
            name
            for candidate in self.candidates
            for name in (*candidate.module_names, *candidate.names_to_match)
        ]
        regexes = [regex for regex in self.regexes if regex != ALL_LINEAR]
        refuse_unused(self.argument, regexes, names)
        if self.new_rows:
            return
        for setting in ("exclude", "rank_pattern", "layouts", "rows"):
            refuse_unused(setting, vars(self.config)[setting], names)
        for key, pattern in self.config.layouts.items():
            matched = [x for x in self.candidates if find_matching([key], x.names_to_match)]
            known = [candidate.spec.layout.pattern for candidate in matched]
            if matched and pattern not in known:
                name = matched[0].spec.full_name
                raise ArgumentError(
                    f"layouts {key!r} matches only weights whose layout is known, such as {name}; "
                    f"to give it another, name it whole: layouts={ {name: pattern} }"
                )

    def explain_nothing(self, skipped: Sequence[Skipped]) -> str:
        """Return the message of the error if nothing that is selected can be adapted."""
        request = f"{self.argument}={self.target!r}"
        if callable(self.target):
            request = "the predicate"
        if skipped:
            return f"{request} selects only modules that can't be adapted: {list_reasons(skipped)}"
        if [*self.regexes] == [ALL_LINEAR] and self.unknown:
            first = self.unknown[0]
            return f"{request} selects no layer; {first.name}: {first.reason_against_layout}"
        message = f"{request} selects no layer that can be adapted"
        names = [x.spec.name for x in self.candidates if x.spec.has_layout]
        nearest = list_nearest(str(self.target), names)
        return f"{message}; the nearest names are {nearest}" if nearest else message


# --- candidates ----------------------------------------------------------------------------------


def list_candidates(view: ModelView) -> list[Candidate]:
    """Return all weights, matrices of unknown layout, and modules that have neither."""
    candidates = []
    for module, names in view.names.items():
        specs = [
            spec.placed(names, spec.name, shape=shape_of(module, spec))
            for spec in list_weights(module)
        ]
        if not specs:
            specs = [BlockSpec(names[0], names=names, module=names[0], parameter="")]
        candidates += [Candidate(module, names, spec) for spec in specs]
    return candidates


def _with_declaration(candidate: Candidate, config: AdapterConfig) -> Candidate:
    """Return a weight with the layout and the outputs that the user declares for it."""
    spec = candidate.spec
    key = find_layout_key(candidate, config)
    is_dense = not spec.quantized and spec.parameter in matrix_weights(candidate.module)
    if key is not None and is_dense:
        layout = layout_of(config.layouts[key])
        reason = layout.reason_against_shape(spec.shape)
        if reason is not None:
            raise ArgumentError(f"layouts {key!r} does not fit {spec.name}: {reason}")
        spec = as_whole(candidate, layout)
    regex = find_first_match(config.rows, candidate.names_to_match)
    if regex is not None and spec.has_layout:
        if spec.outputs:
            raise ArgumentError(
                f"{spec.name} has rows of its own; choose it by its name, not by rows"
            )
        spec = spec.but(outputs=config.rows[regex])
    return candidate._replace(spec=spec)


def find_layout_key(candidate: Candidate, config: AdapterConfig) -> str | None:
    """Return the key of `layouts` that gives a weight its layout, or None.

    A weight of unknown layout takes the first key that is found in one of its names. One of a
    known layout takes only a key that is one of its names.
    """
    names = candidate.names_to_match
    if not candidate.spec.has_layout:
        return find_first_match(config.layouts, names)
    for key in config.layouts:
        if key.removeprefix("^").removesuffix("$").replace("\\", "") in names:
            return key
    return None


def as_whole(candidate: Candidate, layout: Layout) -> BlockSpec:
    """Return the spec of the whole parameter in this layout."""
    spec = candidate.spec
    own_name = declare(spec.parameter, layout).name
    return spec.placed(candidate.module_names, own_name, layout=layout, outputs=())


def as_table(candidate: Candidate) -> Candidate:
    """Return a weight as a matrix that gets new rows, which are its outputs."""
    spec = candidate.spec
    if spec.parameter and not spec.quantized:
        spec = as_whole(candidate, MATRIX)
    return candidate._replace(spec=spec.but(method=NEW_ROWS))


def find_tied(view: ModelView, spec: BlockSpec, exclude: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the other names of a parameter, whose modules read its update too."""
    parameter = view.parameters_by_name.get(spec.full_name)
    if spec.quantized or parameter is None or len(parameter.names) == 1:
        return ()
    tied: dict[Slot, str] = {}
    for name in parameter.names:
        owner, _, attribute = name.rpartition(".")
        place = view.modules[owner], attribute
        is_left_out = find_matching(exclude, (name, name.removesuffix(".weight")))
        if place != (view.modules[spec.module], spec.parameter) and not is_left_out:
            tied.setdefault(place, name)  # a shared module has several names
    return tuple(tied.values())


# --- "all-linear" --------------------------------------------------------------------------------


def _find_linear_weights(view: ModelView, candidates: Iterable[Candidate]) -> set[Slot]:
    """Return where linear weights are, except output heads that are tied to an embedding."""
    modules_of_peft = _find_modules_of_peft(view)
    tables = set()  # the parameters of embeddings, by their ids
    linear = {}
    for candidate in candidates:
        spec = candidate.spec
        # Copied to a plain dict, because a lookup in ZeRO-3's own may gather the parameter.
        parameter = dict(candidate.module._parameters).get(spec.parameter)
        if isinstance(candidate.module, (nn.Embedding, nn.EmbeddingBag)):
            if parameter is not None:  # else the weight is computed from others
                tables.add(id(parameter))
            continue
        is_matrix = not spec.layout.has_kernel and spec.layout.pattern != "index out"
        if spec.has_layout and is_matrix and candidate.module not in modules_of_peft:
            linear[candidate.slot] = id(parameter)
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


def list_reasons(skipped: Iterable[Skipped]) -> str:
    """Return the names of weights and why they are not adapted, as text."""
    reasons = group_by_reason((item.name or "(the model)", item.reason) for item in skipped)
    return first_few(reasons, 5, "; ")
