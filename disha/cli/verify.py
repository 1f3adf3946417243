"""``disha verify``: whether an adapter file is sound, and of a base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from disha.cli.exit_codes import DONE, NO
from disha.cli.flags import FileArgument, Flags, parsed
from disha.cli.output import show, shown
from disha.errors import AdapterFileError
from disha.files import AdapterFile, inspect_adapter
from disha.files.statistics import statistics_of
from disha.interop.checkpoints import BaseReport, verify_against
from disha.tables import table

__all__ = ["run"]

DESCRIPTION = """Check an adapter file: that it is whole, that its header and its tensors agree,
that all values are finite; and, with --base, that every layer fits a checkpoint, and that the
weights there are those that the adapter was saved from.

Exit code 0: all is well; 1: it is not; 2: it could not be checked.

examples:
  disha verify adapter.safetensors
  disha verify adapter.safetensors --base path/to/model
  disha verify adapter.safetensors --json | jq '.checks[] | select(.passed == false)'"""


@dataclass(frozen=True)
class VerifyFlags(Flags):
    """The arguments of `disha verify`."""

    file: FileArgument
    """The adapter file."""

    base: Annotated[Path | None, tyro.conf.arg(metavar="CHECKPOINT")] = None
    """A base checkpoint: a safetensors file, or a folder as Hugging Face libraries write it."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        check: `"structure"`, `"values"` or `"base"`.
        passed: whether it is as it must be.
        remark: what was found.
    """

    check: str
    passed: bool
    remark: str


def run(arguments: Sequence[str]) -> int:
    """Check a file, as command-line `arguments` say."""
    flags = parsed(VerifyFlags, "verify", arguments, DESCRIPTION)
    checks: list[Check] = []
    report = None
    try:
        described = inspect_adapter(flags.file)
    except AdapterFileError as error:
        checks.append(Check("structure", False, "; ".join(str(error).splitlines())))
    else:
        checks += _checks_of_contents(described)
        if flags.base is not None:
            report = verify_against(flags.base, flags.file)
            checks.append(_check_of_base(report))
    sound = all(check.passed for check in checks)
    show(
        flags.json,
        _text(flags.file, checks, report),
        {
            "path": str(flags.file),
            "sound": sound,
            "checks": [asdict(check) for check in checks],
            "base": None if report is None else _base_fields(report),
        },
    )
    return DONE if sound else NO


def _checks_of_contents(described: AdapterFile) -> Iterator[Check]:
    yield Check(
        "structure",
        True,
        f"format {described.format}, {len(described.layers)} layers, "
        f"{described.parameters:,} parameters",
    )
    tensors = shown(statistics_of(described), len(described.tensors), "reading tensors")
    broken = [f"{key} ({found.infinite:,})" for key, found in tensors if found.infinite]
    remark = f"not finite in {', '.join(broken[:5])}" if broken else "all finite"
    yield Check("values", not broken, remark + (", ..." if len(broken) > 5 else ""))


def _check_of_base(report: BaseReport) -> Check:
    return Check("base", report.ok, str(report).splitlines()[-1].partition(": ")[2])


def _base_fields(report: BaseReport) -> dict[str, object]:
    return {
        "path": str(report.base),
        "layers": [asdict(one) for one in report.layers],
        "also_train": [asdict(one) for one in report.also_train],
    }


def _text(path: Path, checks: Sequence[Check], report: BaseReport | None) -> str:
    rows = [(one.check, "ok" if one.passed else "WRONG", one.remark) for one in checks]
    lines = [table(("check", "found", "remark"), rows)]
    if report is not None and not report.ok:
        lines += str(report).splitlines()[:-1]
    sound = all(check.passed for check in checks)
    lines.append(f"{path} is {'sound' if sound else 'not sound'}")
    return "\n".join(lines)
