"""LoRA of stacked experts: a pair of factors for a stack, or a pair for each expert.

In a Bone adapter of `experts.gate_up_proj` or `experts.down_proj`, A is the same for all experts,
and B is (expert, out, r). Two forms of LoRA hold such factors:

- *stacked*, PEFT's `target_parameters`. The rows of A are (expert, rank), the columns of B are
  (rank, expert). PEFT wraps a module once for each of its parameters, so if both stacks are
  adapted, the keys of the first have `base_layer` in them. vLLM reads it for GPT-OSS.
- *separate*, a LoRA for each matrix of each expert. Of models whose experts are stacked, no module
  has these names, but a checkpoint may, into which it is merged. SGLang reads it, and vLLM does for
  Mixtral and Qwen3-MoE. The rows of `gate_up_proj` are those of gate
  and up: first all of gate, or one of each in turn (GPT-OSS). Both get A, and their rows of B.

Source: PEFT 0.21, `ParamWrapper`; vLLM 0.33, `LoRAModelManager`; SGLang 0.5.23, `LoRAAdapter`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from einops import rearrange
from torch import Tensor

from disha.errors import ConversionError
from disha.functional import Layout
from disha.interop.low_rank import LowRankUpdate, is_stack, list_names
from disha.layers.spec import BlockSpec

GATE_UP, DOWN = "gate_up_proj", "down_proj"

SERVED_TARGETS = ("gate_proj", "up_proj", "down_proj")
"""The names in `target_modules` by which SGLang knows the projections of single experts."""

_NAMES_BEFORE_STACKING = ("gate", *SERVED_TARGETS, "w1", "w2", "w3")
"""Names of layers in a mixture of experts before `transformers` 5 stacked the experts.

In a model whose experts it stacks, PEFT takes a target of such a name for one of that time.
"""

JOINED = Layout("expert out in")
"""The layout of stacks that `transformers` joins from single experts as it loads a model."""

WRAPPED = ".base_layer"  # what PEFT adds to a name for each wrapper inside the outermost one


@dataclass(frozen=True)
class Family:
    """How models of one type store both stacks, and name the matrices of single experts."""

    layout: Layout
    parent: str = "mlp"  # the module around single experts; the one around stacks is always `mlp`
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    alternates: bool = False  # whether the rows of gate and up alternate

    def projections(self, stack: str, b: Tensor) -> dict[str, Tensor]:
        """Return the projections in a stack, each with its rows of B (expert, out, r)."""
        if stack == DOWN:
            return {self.down: b}
        rows = "(row two)" if self.alternates else "(two row)"
        gate, up = rearrange(b, f"expert {rows} r -> two expert row r", two=2)
        return {self.gate: gate, self.up: up}


FAMILIES = {
    "mixtral": Family(JOINED, parent="block_sparse_moe", gate="w1", up="w3", down="w2"),
    "qwen2_moe": Family(JOINED),
    "qwen3_moe": Family(JOINED),
    "olmoe": Family(JOINED),
    "deepseek_v3": Family(JOINED),
    "gpt_oss": Family(Layout("expert in out"), alternates=True),
}
"""Model type in `transformers` -> how its models name and store experts."""


ExpertForm = Literal["stacked", "separate"]
"""One parameter for a stack of experts, or one for each expert."""


def family_of(model_type: str | None, what: str) -> Family:
    """Return the family of a type of model; `what` says in the error what depends on it."""
    family = FAMILIES.get(model_type or "")
    if family is None:
        raise ConversionError(
            f"{what} depends on the model type, which is {model_type or 'unknown here'}; known are "
            f"{', '.join(FAMILIES)}. Give `model_type` (--base), or merge the adapter"
        )
    return family


# --- writing: stacked ----------------------------------------------------------------------------


def factors_name(stack: str, stacks: Collection[str]) -> str:
    """Return the name of a stack's factors in a PEFT folder that holds these stacks."""
    owner, _, last = stack.rpartition(".")
    is_inner = last == GATE_UP and f"{owner}.{DOWN}" in stacks
    return owner + WRAPPED if is_inner else owner


def stack_factors(update: LowRankUpdate) -> tuple[Tensor, Tensor]:
    """Return A (expert * rank, in) and B (out, rank * expert) of a stack, as PEFT has them."""
    a = rearrange(update.a, "expert r i -> (expert r) i")
    return a, rearrange(update.b, "expert o r -> o (r expert)")


def list_misread_by_peft(
    layers: Sequence[BlockSpec], form: str, model_type: str | None
) -> list[str]:
    """Return a line for each layer that PEFT would take for something else."""
    if form == "separate":
        return []  # it is not for PEFT
    stacks = [layer for layer in layers if is_stack(layer)]
    family = FAMILIES.get(model_type or "")
    reasons = []
    for stack in stacks:
        is_known = family is not None and family.layout == stack.layout
        if stack.layout.in_first and not is_known:
            reasons.append(
                f"{stack.name}: PEFT would take its inputs for its outputs, except in models of "
                f"type gpt_oss; this one is {model_type or 'unknown'} (--base for the command)"
            )
    if all(stack.layout != JOINED for stack in stacks):
        return reasons
    for layer in layers:
        last = layer.name.rpartition(".")[2]
        if last in _NAMES_BEFORE_STACKING and layer not in stacks:
            reasons.append(
                f"{layer.name}: PEFT takes a target of this name for a projection of the experts; "
                'write the experts apart (experts="separate")'
            )
    return reasons


# --- writing: separate ---------------------------------------------------------------------------


def convert_experts(
    updates: list[LowRankUpdate],
    form: str,
    also_train: Sequence[str],
    model_type: str | None,
) -> list[LowRankUpdate]:
    """Return the updates with experts in one of the two forms."""
    names = {update.record.name for update in updates if is_stack(update.record)}
    if form == "stacked" or not names:
        return updates
    if also_train:
        raise ConversionError(
            f"vLLM and SGLang refuse a LoRA with other parameters ({list_names(also_train)}); "
            "leave them out (--no_also_train), or merge the adapter"
        )
    for name in sorted(names):
        owner, _, last = name.rpartition(".")
        other_stack = DOWN if last == GATE_UP else GATE_UP
        other = f"{owner}.{other_stack}"
        if other not in names:
            raise ConversionError(
                f"{name} is adapted, and {other} is not; vLLM and SGLang read both or none"
            )
    family = family_of(model_type, "what separate experts are called")
    separate: list[LowRankUpdate] = []
    for update in updates:
        separate += _separate(update, family)
    return separate


def _separate(update: LowRankUpdate, family: Family) -> Iterator[LowRankUpdate]:
    """Yield the updates of each expert in place of that of a stack; any other update once."""
    # Layers beside the experts, such as their router, are renamed with them.
    name = replace_part(update.record.name, "mlp", family.parent)
    if not is_stack(update.record):
        renamed = replace(update.record, name=name)
        yield replace(update, record=renamed)
        return
    if update.record.layout != family.layout:
        raise ConversionError(
            f"{update.record.name} is {update.record.layout}, and models of this type have "
            f"{family.layout}; name the base that the adapter is for"
        )
    owner, _, last = name.rpartition(".")
    projections = family.projections(last, update.b)
    for expert, a in enumerate(update.a):
        for projection, b in projections.items():
            name = f"{owner}.{expert}.{projection}"
            record = update.record
            record = record.but(
                name=name,
                layout=Layout("out in"),
                shape=(record.out_features, record.in_features),
            )
            yield LowRankUpdate(record, a.clone(), b[expert])  # no two share memory


def replace_part(name: str, old: str, new: str) -> str:
    """Return a dotted name with `new` in place of each part `old`."""
    inside = f".{name}.".replace(f".{old}.", f".{new}.")
    return inside[1:-1]


# --- reading -------------------------------------------------------------------------------------

SINGLE_EXPERT = re.compile(r"((?:.+\.)?experts)\.(\d{1,9})\.(\w+)")
"""The name of a matrix of one expert: the module of the experts, the number, the projection."""


def find_stack(name: str, targets: Collection[str]) -> str | None:
    """Return the stack whose factors have this name in a PEFT folder, or None if it is a module."""
    owner = name.replace(WRAPPED, "")
    depth = name.count(WRAPPED)
    if not targets or (depth == 0 and owner.rpartition(".")[2] != "experts"):
        return None
    ends = tuple(f".{target}" for target in targets)
    from_outermost = (f"{owner}.{DOWN}", f"{owner}.{GATE_UP}")  # the order in which PEFT wraps them
    stacks = [stack for stack in from_outermost if f".{stack}".endswith(ends)]
    if depth >= len(stacks):
        raise ConversionError(
            f"{name} is a parameter other than experts.{GATE_UP} and experts.{DOWN}; merge this "
            "LoRA in PEFT"
        )
    return stacks[depth]


def matrices_of(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (expert, rank, in) and B (expert, out, rank): the inverse of `stack_factors`."""
    return (
        rearrange(a, "(expert r) i -> expert r i", r=rank),
        rearrange(b, "o (r expert) -> expert o r", r=rank),
    )
