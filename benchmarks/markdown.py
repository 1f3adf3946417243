"""Tables in Markdown, and the numbers in them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.protocol import Spread, paired_ratios

NOTHING = "-"
MARKED = re.compile(r"(<!-- table: (\w+) -->\n\n).*?(\n?<!-- end -->)", re.DOTALL)
"""A table on a page: from the line with its name to the end."""

Case = Mapping[str, Any]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table: the first column is aligned to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def fill(page: str, tables: Mapping[str, str]) -> str:
    """Return a page with each table that it names."""
    return MARKED.sub(lambda found: f"{found[1]}{tables[found[2]]}{found[3]}", page)


def count_text(count: int, noun: str) -> str:
    """Return a number of things: 1 token, 1,024 tokens."""
    plural = "" if count == 1 else "s"
    return f"{count:,} {noun}{plural}"


def ratio_text(value: float) -> str:
    """Return a ratio with the digits that matter: 1.047, 12.3, 105."""
    if value < 10:
        return f"{value:.3f}"
    if value < 100:
        return f"{value:.1f}"
    return f"{value:.0f}"


def spread_text(spread: Spread) -> str:
    """Return a median and half the distance of its quartiles: 1.047±0.007."""
    half = (spread.high - spread.low) / 2
    return ratio_text(spread.median) + (f"±{half:.3f}" if half else "")


def short_text(spread: Spread) -> str:
    """Return a median with two decimals, and its quartiles if they differ: 1.05 (1.04 to 1.06)."""
    told = f"{spread.median:.2f}"
    if spread.low == spread.high:
        return told
    return f"{told} ({spread.low:.2f} to {spread.high:.2f})"


def seconds_text(seconds: float) -> str:
    """Return a time in a suitable unit: 12.3 ms."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def bytes_text(count: float) -> str:
    """Return a number of bytes in a suitable unit: 8.5 MiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            value = count / size
            return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.4g} {unit}"
    return f"{count:.0f} B"


def size_text(case: Case) -> str:
    """Return the size of a case: 1024 wide, 2,048 tokens, float32."""
    if "model" in case:
        where = case["model"]
    elif "outputs" in case:
        where = f"{case['width']} x {case['outputs']}"
    else:
        where = f"{case['width']} wide"
    return f"{where}, {count_text(case['tokens'], 'token')}, {case['dtype']}"


def median_text(case: Case, name: str) -> str:
    """Return the median of the times of a run; nothing if it failed."""
    seconds = case["seconds"].get(name)
    return NOTHING if seconds is None else seconds_text(statistics.median(seconds))


def divided_text(case: Case, name: str, to: str) -> str:
    """Return the time of a run divided by another's; nothing if one of them failed."""
    seconds = case["seconds"]
    if name not in seconds or to not in seconds or name == to:
        return NOTHING
    return spread_text(Spread.of(paired_ratios(seconds, name, to)))


def versions_text(results: Mapping[str, Any]) -> str:
    """Return the versions in a file of results: torch 2.13.0, peft 0.21.2."""
    return ", ".join(f"{name} {version}" for name, version in results["versions"].items())


def run_text(results: Mapping[str, Any]) -> str:
    """Return when and where results were measured, and with which versions."""
    machine = results["machine"]
    memory = machine["memory_bytes"]
    of_memory = "" if memory is None else f", {bytes_text(memory)} of memory"
    return (
        f"{results['date'][:10]}, {results['device']}, {machine['processor']} "
        f"({machine['instructions']}), {count_text(machine['cores'], 'core')}{of_memory}; "
        f"{versions_text(results)}."
    )
