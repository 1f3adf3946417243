"""The report of a check: a row for each block, printed as a table."""

from __future__ import annotations

from dataclasses import dataclass

from disha.text import counted, first_few, group_by_reason, printable, table

WORDS = {True: "yes", False: "NO", None: "-"}
"""What a column of the table says."""


@dataclass(frozen=True)
class CheckedWeight:
    """What the check found for one block of one weight."""

    name: str  # the weight's name in the model
    adapter: str
    read: bool  # whether the model read the weight
    acts: bool  # whether the block changes the output
    gradient: bool  # whether the block gets a gradient
    merges: bool | None  # whether the output stays the same when merged; None if that is refused
    reason: str = ""  # why it is not in order, or why merging is refused; else empty

    @property
    def ok(self) -> bool:
        """Whether the block acts and trains, and merging keeps the output or is refused."""
        return self.acts and self.gradient and self.merges is not False


@dataclass(frozen=True)
class CheckReport:
    """What `check_adapters` found; `print(report)` shows it as a table.

    Attributes:
        weights: one entry for each active block.
        untrained: parameters that require gradients, but are not in the optimizer.
        unknown: how many parameters the optimizer has that the model lacks, such as the blocks of a
            module that was replaced.
        base_changed: whether the model computes something else than its base even while no update
            acts, for example because its forward asks for the class of a layer; None if that
            could not be compared.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import disha
        >>> model = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
        >>> model.forward = lambda x: model["used"](x)
        >>> model = disha.inject_adapters(model, "all-linear", r=2)
        >>> report = disha.check_adapters(model, torch.randn(3, 4))
        >>> report.ok, [one.name for one in report.problems]
        (False, ['idle'])
    """

    weights: tuple[CheckedWeight, ...]
    untrained: tuple[str, ...] = ()
    unknown: int = 0
    base_changed: bool | None = None

    @property
    def problems(self) -> tuple[CheckedWeight, ...]:
        """The entries with a problem."""
        return tuple(weight for weight in self.weights if not weight.ok)

    @property
    def ok(self) -> bool:
        """Whether all blocks act, train and merge, no parameter is missing, and no base changed."""
        return not self.problems and not self.untrained and not self.base_changed

    def __str__(self) -> str:
        rows = []
        for weight in self.weights:
            answers = (weight.read, weight.acts, weight.gradient, weight.merges)
            words = [WORDS[answer] for answer in answers]
            rows.append((weight.name or "(the model)", weight.adapter, *words))
        lines = [table(("weight", "adapter", "read", "acts", "gradient", "merges"), rows)]
        reasons = group_by_reason(
            (weight.name, weight.reason) for weight in self.weights if weight.reason
        )
        lines += [printable(reason) for reason in reasons]
        if self.untrained:
            lines.append(
                f"the optimizer lacks {counted(len(self.untrained), 'parameter')} that should "
                f"train ({first_few(self.untrained, 5, ', ')}); give it adapter_parameters(model)"
            )
        if self.unknown:
            lines.append(f"the optimizer has {counted(self.unknown, 'parameter')} of other modules")
        if self.base_changed:
            lines.append(
                "adapting changed the model: while no update acts, it computes something else than "
                "its base. Its forward may ask for the class or the children of a layer"
            )
        good = len(self.weights) - len(self.problems)
        lines.append(f"{good:,} of {counted(len(self.weights), 'block')} in order")
        return "\n".join(lines)
