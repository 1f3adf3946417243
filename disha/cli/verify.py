"""``disha verify``: whether an adapter file is sound, and belongs to a base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import disha
from disha.cli.dispatcher import DONE, NO
from disha.cli.flags import Flags, parsed
from disha.cli.output import show, with_progress
from disha.files.statistics import statistics_of
from disha.interop.checkpoints import verify_against
from disha.tables import table
from disha.text import counted

__all__ = ["run"]

DESCRIPTION = """Check an adapter file, and whether it belongs to a base checkpoint.

The file must be complete, its header and its tensors must agree, and all values must be finite.
With --base, every layer must fit the checkpoint, and the checkpoint must be the one that the
adapter was saved from.

The exit code is 0 if the file is sound, 1 if it is not, and 2 if it could not be checked.

examples:
  disha verify adapter.safetensors
  disha verify adapter.safetensors --base path/to/model
  disha verify adapter.safetensors --json | jq '.checks[] | select(.passed == false)'"""


@dataclass(frozen=True)
class VerifyFlags(Flags):
    """The arguments of `disha verify`.

    Args:
        file: The adapter file.
        base: A base checkpoint: a safetensors file, or a folder as Hugging Face libraries write
            it.
    """

    file: Path
    base: Path | None = None


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        check: `"structure"`, `"values"` or `"base"`.
        passed: whether the file passed the check.
        remark: the details.
    """

    check: str
    passed: bool
    remark: str


def run(arguments: Sequence[str]) -> int:
    """Check a file, with the given command-line arguments."""
    flags = parsed(VerifyFlags, "verify", arguments, DESCRIPTION)
    checks: list[Check] = []
    report = None
    try:
        described = disha.inspect_adapter(flags.file)
    except disha.AdapterFileError as error:
        checks.append(Check("structure", False, "; ".join(str(error).splitlines())))
    else:
        try:
            checks += _checks_of_contents(described)
        except disha.AdapterFileError as error:
            checks.append(Check("values", False, str(error)))
        else:
            if flags.base is not None:
                report = verify_against(flags.base, flags.file)
                summary = str(report).splitlines()[-1].partition(": ")[2]
                checks.append(Check("base", report.ok, summary))
    sound = all(check.passed for check in checks)
    rows = [(one.check, "ok" if one.passed else "WRONG", one.remark) for one in checks]
    lines = [table(("check", "found", "remark"), rows)]
    if report is not None and not report.ok:
        lines += str(report).splitlines()[:-1]
    lines.append(f"{flags.file} is {'sound' if sound else 'not sound'}")
    show(
        flags.json,
        "\n".join(lines),
        {
            "path": str(flags.file),
            "sound": sound,
            "checks": [asdict(check) for check in checks],
            "base": report
            and {
                "path": str(report.base),
                "layers": [asdict(one) for one in report.layers],
                "also_train": [asdict(one) for one in report.also_train],
            },
        },
    )
    return DONE if sound else NO


def _checks_of_contents(described: disha.AdapterFile) -> Iterator[Check]:
    yield Check(
        "structure",
        True,
        f"format {described.format}, {counted(len(described.layers), 'layer')}, "
        f"{counted(described.parameters, 'parameter')}",
    )
    tensors = with_progress(statistics_of(described), len(described.tensors), "reading tensors")
    broken = [f"{key} ({found.not_finite:,})" for key, found in tensors if found.not_finite]
    remark = f"not finite in {', '.join(broken[:5])}" if broken else "all finite"
    yield Check("values", not broken, remark + (", ..." if len(broken) > 5 else ""))
