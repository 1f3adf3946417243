"""LoRA of stacked experts: one pair of factors for a stack, or one for each expert.

The experts of a layer are stacks: `experts.gate_up_proj` and `experts.down_proj`, each of shape
(expert, out, in) or (expert, in, out). In a Bone adapter of a stack, A is the same for all experts,
and B is (expert, out, r). Two forms of LoRA hold such factors:

- *stacked*, PEFT's `target_parameters`. The rows of A are (expert, rank), the columns of B are
  (rank, expert). PEFT wraps a module once for each of its parameters, so if both stacks are
  adapted, the keys of the first have `base_layer` in them. vLLM reads it for GPT-OSS.
- *separate*, a LoRA for each matrix of each expert. SGLang reads it, and vLLM does for Mixtral and
  Qwen3-MoE. The rows of `gate_up_proj` are those of gate and up: first all of gate, or by turns
  (GPT-OSS). Both get A, and their rows of B.

Source: PEFT 0.21, `ParamWrapper`; vLLM 0.33, `LoRAModelManager`; SGLang 0.5.23, `LoRAAdapter`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from einops import rearrange
from torch import Tensor, nn

from disha.errors import AdapterFileError, ArgumentError, ConversionError
from disha.functional import Layout
from disha.interop.low_rank import LowRankUpdate, is_stack, listed
from disha.text import counted

__all__ = [
    "DOWN",
    "FAMILIES",
    "GATE_UP",
    "SEPARATE_BEFORE",
    "SERVED_TARGETS",
    "ExpertForm",
    "Matrices",
    "by_expert",
    "checked_form",
    "family_of",
    "in_model",
    "joined",
    "matrices_of",
    "misread",
    "misread_unseen",
    "refuse_beside",
    "renamed",
    "separated",
    "single_expert",
    "stack_factors",
    "stack_names",
    "stacked",
    "taken_for_experts",
]

ExpertForm = Literal["stacked", "separate"]
"""The two forms of LoRA for experts."""

GATE_UP, DOWN = "gate_up_proj", "down_proj"

SERVED_TARGETS = ("gate_proj", "up_proj", "down_proj")
"""The `target_modules` of single experts."""

_OLD_TARGETS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""The targets that PEFT takes for projections of experts: see `taken_for_experts`."""

SEPARATE_BEFORE = Layout("expert out in")
"""The layout of stacks that `transformers` joins from single experts as it loads a model."""

WRAPPED = ".base_layer"
"""What PEFT adds to the name of a module for each wrapper inside the outermost one."""


@dataclass(frozen=True)
class Family:
    """How models of one type name and store their experts.

    Attributes:
        layout: layout of both stacks.
        block: the module that holds the experts, in the names of single experts. In the names of
            stacks, it is `mlp`.
        gate: name of an expert's gate projection.
        up: name of its up projection.
        down: name of its down projection.
        by_turns: whether the rows of gate and up take turns in `gate_up_proj`.
    """

    layout: Layout
    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    by_turns: bool = False

    def split(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of gate and of up; rows are the axis before the last."""
        rows = "(row two)" if self.by_turns else "(two row)"
        gate, up = rearrange(gate_up, f"... {rows} r -> two ... row r", two=2)
        return gate.contiguous(), up.contiguous()

    def joined(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return the rows of `gate_up_proj`: the inverse of `split`."""
        rows = "(row two)" if self.by_turns else "(two row)"
        return rearrange([gate, up], f"two ... row r -> ... {rows} r").contiguous()


_OUT_IN = Family(SEPARATE_BEFORE)
FAMILIES: Mapping[str, Family] = {
    "mixtral": dataclasses.replace(
        _OUT_IN, block="block_sparse_moe", gate="w1", up="w3", down="w2"
    ),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"), _OUT_IN),
    "gpt_oss": Family(Layout("expert in out"), by_turns=True),
}
"""Model type in `transformers` -> how its models name and store experts."""


def checked_form(experts: str) -> ExpertForm:
    """Return the form, if it is one.

    Raises:
        ArgumentError: it is not.
    """
    if experts not in get_args(ExpertForm):
        raise ArgumentError(
            f"experts must be {' or '.join(map(repr, get_args(ExpertForm)))}, got {experts!r}"
        )
    return cast("ExpertForm", experts)


def family_of(model_type: str | None, what: str) -> Family:
    """Return the family of a type of model.

    Args:
        model_type: the type, or None if it is unknown.
        what: what needs it, for the error.

    Raises:
        ConversionError: it is unknown here.
    """
    family = FAMILIES.get(model_type or "")
    if family is None:
        found, remedy = f"is {model_type!r}", ""
        if model_type is None:
            found = "is unknown here"
            remedy = "Give `model_type` (--base CHECKPOINT for the command). "
        raise ConversionError(
            f"{what} depends on the type of the model, which {found}; known are "
            f"{', '.join(FAMILIES)}. {remedy}For other types, use stacked experts and the model "
            "itself (disha.interop.lora.export and load), or merge the adapter (disha merge)"
        )
    return family


# --- writing: stacked ----------------------------------------------------------------------------


def stack_names(names: Iterable[str]) -> dict[str, str]:
    """Return stack -> the name of its factors in a PEFT folder.

    Args:
        names: the adapted stacks of a model.
    """
    found: dict[str, str] = {}
    stacks = set(names)
    for name in stacks:
        owner, _, last = name.rpartition(".")
        inner = last == GATE_UP and f"{owner}.{DOWN}" in stacks
        found[name] = owner + WRAPPED if inner else owner
    return found


def stack_factors(update: LowRankUpdate) -> tuple[Tensor, Tensor]:
    """Return A (expert * rank, in) and B (out, rank * expert) of a stack, as PEFT has them."""
    a = rearrange(update.a, "expert r i -> (expert r) i")
    return a.contiguous(), rearrange(update.b, "expert o r -> o (r expert)").contiguous()


def misread(owner: nn.Module, name: str, layout: Layout) -> str | None:
    """Return why PEFT would read a stack in another way, or None if it would not.

    PEFT takes the inputs for the second axis if the module says `is_transposed`, and for the third
    if it does not.
    """
    if bool(getattr(owner, "is_transposed", False)) != layout.in_first:
        return (
            f"its layout is {layout.pattern!r}, and its module does not say so (is_transposed), so "
            "PEFT would take its inputs for its outputs"
        )
    order = [one for one in owner._parameters if one in (GATE_UP, DOWN)]
    if order not in ([GATE_UP, DOWN], [name.rpartition(".")[2]]):
        return f"its module has its parameters in the order {', '.join(order)}"
    return None


def misread_unseen(stacks: Mapping[str, Layout], model_type: str | None) -> list[str]:
    """Return the stacks that PEFT may read in another way, each with the reason, without the model.

    Args:
        stacks: stack -> its layout.
        model_type: type of the model, or None if it is unknown.
    """
    family = FAMILIES.get(model_type or "")
    return [
        f"{name}: its layout is {layout.pattern!r}, which PEFT knows only if the module says so "
        "(is_transposed), as that of gpt_oss does; name the base (--base for the command), or "
        "export from the model (disha.interop.lora.export)"
        for name, layout in stacks.items()
        if layout.in_first and (family is None or family.layout != layout)
    ]


def taken_for_experts(modules: Iterable[str]) -> list[str]:
    """Return the modules that PEFT takes for projections of experts, each with the reason.

    In a model with stacks of experts, PEFT reads a target of such a name as a target of the stack.
    In this way, it loads LoRA from the time before `transformers` stacked the experts.

    Args:
        modules: the adapted modules of a model that has such stacks.
    """
    return [
        f"{name}: PEFT takes a target of this name for a projection of the experts; write the LoRA "
        'for a server (experts="separate"; --experts separate for the command)'
        for name in modules
        if name.rpartition(".")[2] in _OLD_TARGETS
    ]


# --- writing: separate ---------------------------------------------------------------------------


def refuse_beside(also_train: Sequence[str]) -> None:
    """Raise if parameters were trained with separate experts, which are for servers only.

    Raises:
        ConversionError: some were.
    """
    if also_train:
        raise ConversionError(
            f"vLLM and SGLang refuse a LoRA with parameters that were trained with it "
            f"({listed(also_train)}); leave them out (--no-also-train for the command), or merge "
            "the adapter (disha merge)"
        )


def separated(updates: Sequence[LowRankUpdate], family: Family) -> list[LowRankUpdate]:
    """Return the updates with those of each expert in place of those of stacks.

    Raises:
        ConversionError: one stack of a layer is adapted, but not the other. vLLM and SGLang read
            experts only with all their projections.
    """
    names = {update.record.name for update in updates if is_stack(update.record)}
    for name in sorted(names):
        owner, _, last = name.rpartition(".")
        other = f"{owner}.{DOWN if last == GATE_UP else GATE_UP}"
        if other not in names:
            raise ConversionError(
                f"{name} is adapted, and {other} is not; vLLM and SGLang read separate experts "
                "only with both. Adapt both, or merge the adapter (disha merge)"
            )
    found: list[LowRankUpdate] = []
    for update in updates:
        if is_stack(update.record):
            found += _single_experts(update, family)
        else:
            name = renamed(update.record.name, "mlp", family.block)
            found.append(_named(update, name))
    return found


def _single_experts(update: LowRankUpdate, family: Family) -> Iterator[LowRankUpdate]:
    owner, _, last = update.record.name.rpartition(".")
    owner = renamed(owner, "mlp", family.block)
    if update.record.layout != family.layout:
        raise ConversionError(
            f"{update.record.name} has the layout {update.record.layout}, and models of this type "
            f"have {family.layout}; name the base that the adapter is for"
        )
    projections = {family.down: update.b}
    if last == GATE_UP:
        projections = dict(zip((family.gate, family.up), family.split(update.b), strict=True))
    for expert, a in enumerate(update.a):
        for projection, b in projections.items():
            name = f"{owner}.{expert}.{projection}"
            yield dataclasses.replace(_named(update, name), a=a, b=b[expert])


def _named(update: LowRankUpdate, name: str) -> LowRankUpdate:
    layout = update.record.layout
    layout = layout if layout.expert_dim is None else Layout("out in")
    return update.with_record(name=name, layout=layout)


def renamed(name: str, old: str, new: str) -> str:
    """Return a dotted name in which the part `old` is replaced by `new`.

    Args:
        name: the name.
        old: a part of it, between dots.
        new: what replaces that part.
    """
    return ".".join(new if part == old else part for part in name.split("."))


# --- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matrices:
    """The factors of a stack: A (expert, rank, in) and B (expert, out, rank).

    Attributes:
        a: A.
        b: B.
        keys: the names that `rank_pattern` and `alpha_pattern` know it by.
    """

    a: Tensor
    b: Tensor
    keys: tuple[str, ...]


_SINGLE = re.compile(r"((?:.+\.)?experts)\.(0|[1-9][0-9]{0,5})\.(\w+)")
"""The name of a matrix of one expert: the module of the experts, the number, the projection."""


def stacked(name: str, targets: Collection[str]) -> str | None:
    """Return the stack whose factors have this name in a PEFT folder, or None if it is a module.

    Args:
        name: the name, without `lora_A.weight`.
        targets: `target_parameters`.

    Raises:
        ConversionError: it is a parameter other than the two stacks of a module `experts`.
    """
    owner = name.replace(WRAPPED, "")
    depth = name.count(WRAPPED)
    if not targets or (depth == 0 and owner.rpartition(".")[2] != "experts"):
        return None
    found = [
        full
        for full in (f"{owner}.{DOWN}", f"{owner}.{GATE_UP}")  # from the outermost wrapper inwards
        if any(full == target or full.endswith(f".{target}") for target in targets)
    ]
    if depth >= len(found):
        raise ConversionError(
            f"{name} is a parameter that PEFT's target_parameters names; those that can be read "
            f"are experts.{GATE_UP} and experts.{DOWN}. Use this LoRA with PEFT, or merge it there"
        )
    return found[depth]


def matrices_of(name: str, a: Tensor, b: Tensor, rank: int) -> Matrices:
    """Return the factors of a stack from those of a PEFT folder: the inverse of `stack_factors`.

    Raises:
        AdapterFileError: they are not factors of this rank.
    """
    rows = a.shape[0] if a.dim() == 2 and b.dim() == 2 else 0
    if not rows or rows % rank or b.shape[1] != rows:
        raise AdapterFileError(
            f"{name} has factors of shape {tuple(a.shape)} and {tuple(b.shape)}; for rank {rank} "
            f"these must be ({rank} * experts, in) and (out, {rank} * experts)"
        )
    return Matrices(
        rearrange(a, "(expert r) i -> expert r i", r=rank),
        rearrange(b, "o (r expert) -> expert o r", r=rank),
        (name,),
    )


def single_expert(name: str) -> bool:
    """Whether this is the name of one matrix of one expert."""
    return _SINGLE.fullmatch(name) is not None


def by_expert(names: Iterable[str]) -> dict[str, dict[str, dict[int, str]]]:
    """Return module of the experts -> projection -> number of the expert -> name.

    Args:
        names: names of layers. Those that are not of single experts are left out.
    """
    found: dict[str, dict[str, dict[int, str]]] = {}
    for name in names:
        match = _SINGLE.fullmatch(name)
        if match is not None:
            owner, expert, projection = match.groups()
            found.setdefault(owner, {}).setdefault(projection, {})[int(expert)] = name
    return found


def in_model(name: str, model_type: str | None) -> str:
    """Return the name in the model of a layer of a LoRA with single experts.

    Args:
        name: the name in the LoRA.
        model_type: type of the model, or None if it is unknown.
    """
    family = FAMILIES.get(model_type or "")
    return name if family is None else renamed(name, family.block, "mlp")


def joined(
    pairs: Mapping[str, tuple[Tensor, Tensor]], model_type: str | None
) -> dict[str, Matrices]:
    """Return stack -> its factors, for the single experts among these pairs.

    Args:
        pairs: name -> A and B.
        model_type: type of the model, or None if it is unknown.

    Raises:
        ConversionError: the type of the model is unknown, or it has no such projections.
        AdapterFileError: experts are missing, or their factors differ in shape.
    """
    layers = by_expert(pairs)
    if not layers:
        return {}
    family = family_of(model_type, "how to stack single experts")
    found = {}
    for owner, projections in layers.items():
        stacks = {last: _stack(pairs, owner, names) for last, names in projections.items()}
        gate, up, down = (stacks.pop(one, None) for one in (family.gate, family.up, family.down))
        if stacks or (gate is None) != (up is None):
            raise ConversionError(
                f"{owner} has {', '.join(projections)}; experts of a {model_type} model have "
                f"{family.gate} and {family.up}, {family.down}, or all three"
            )
        name = in_model(owner, model_type)
        if gate is not None and up is not None:
            if gate.a.shape != up.a.shape or not torch.equal(gate.a, up.a):
                raise ConversionError(
                    f"{owner}: {family.gate} and {family.up} have different lora_A, so their "
                    f"{GATE_UP} is not a Bone adapter; use this LoRA with PEFT, or merge it there"
                )
            b = family.joined(gate.b, up.b)
            found[f"{name}.{GATE_UP}"] = Matrices(gate.a, b, gate.keys + up.keys)
        if down is not None:
            found[f"{name}.{DOWN}"] = down
    return found


def _stack(
    pairs: Mapping[str, tuple[Tensor, Tensor]], owner: str, names: Mapping[int, str]
) -> Matrices:
    count = len(names)
    missing = [str(expert) for expert in range(max(names) + 1) if expert not in names][:5]
    if missing:
        raise AdapterFileError(
            f"{owner} has a LoRA for {counted(count, 'expert')}, but not for {listed(missing)}; an "
            "adapter of a stack has one for each expert"
        )
    keys = tuple(names[expert] for expert in range(count))
    shapes = {(tuple(pairs[key][0].shape), tuple(pairs[key][1].shape)) for key in keys}
    if len(shapes) > 1 or any(len(shape) != 2 for one in shapes for shape in one):
        shown = [f"{one[0]} and {one[1]}" for one in sorted(shapes)]
        raise AdapterFileError(
            f"the experts of {owner} have factors of shapes {listed(shown)}; a stack needs one "
            "rank for all of them. Use this LoRA with PEFT, or merge it there"
        )
    a, b = (torch.stack([pairs[key][index] for key in keys]) for index in (0, 1))
    return Matrices(a, b, keys)
