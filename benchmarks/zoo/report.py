"""The results as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.zoo.trial import Result

__all__ = ["FAILURES", "failed", "text", "write"]

FAILURES = ("silent", "wrong", "exception")
COLUMNS = ("library", "run", "held", *FAILURES, "refused", "not run", "exact")


def failed(results: Sequence[Result]) -> list[Result]:
    """Return the results that are failures of disha."""
    return [result for result in results if result.status in FAILURES]


def write(results: Sequence[Result], path: Path, **about: object) -> None:
    """Write everything to a JSON file, with one line for each result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(result.as_dict()) for result in results)
    everything = f'{json.dumps(about)[:-1]}, "results": [\n{lines}\n]}}\n'
    path.write_text(everything, encoding="utf-8")


def text(results: Sequence[Result]) -> str:
    """Return the table of all libraries, and then the failures and refusals in short."""
    libraries = list(dict.fromkeys(result.library for result in results))
    rows = [_row(name, [r for r in results if r.library == name]) for name in libraries]
    if len(rows) > 1:
        rows.append(_row("all", results))
    lines = [_table([COLUMNS, *rows])]
    for title, chosen in (
        ("failures", failed(results)),
        ("refused", [r for r in results if r.status == "refused"]),
        ("not run", [r for r in results if r.status == "not run"]),
    ):
        if chosen:
            lines += ["", f"{title}:"]
            lines += [f"  {r.library} {r.name}: {_short(r)}" for r in chosen]
    return "\n".join(lines)


def _row(name: str, results: Sequence[Result]) -> tuple[str, ...]:
    ran = [r for r in results if r.status != "not run"]
    return (
        name,
        str(len(ran)),
        str(sum(r.status == "held" for r in ran)),
        *(str(sum(r.status == status for r in ran)) for status in FAILURES),
        str(sum(r.status == "refused" for r in ran)),
        str(len(results) - len(ran)),
        str(sum(r.exact for r in ran)),
    )


def _short(result: Result) -> str:
    more = f" (and {len(result.reasons) - 2} more)" if len(result.reasons) > 2 else ""
    return "; ".join(reason[:230] for reason in result.reasons[:2]) + more


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
