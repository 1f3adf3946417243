"""`python -m benchmarks.report`: write the tables of the pages, and the pictures, from the results.

A page says where a table stands, by its name:

    <!-- table: few_tokens -->
    ...
    <!-- end -->

What is between the two lines is written anew. All else on a page is written by hand, so after a new
run, read it again. `python -m benchmarks.report FILES` prints the tables of files of results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import drift, fits, speed
from benchmarks.convergence import curves, transfer
from benchmarks.convergence import tables as learning
from benchmarks.convergence.runs import RESULTS, read_runs
from benchmarks.markdown import fill
from benchmarks.results import read_results, write_whole

FOLDER = Path("benchmarks/results")
PAGES = (
    FOLDER / "speed.md",
    FOLDER / "learning.md",
    FOLDER / "gpu.md",
    FOLDER / "drift.md",
    Path("docs/performance.md"),
    Path("docs/evidence.md"),
    Path("docs/guides/memory.md"),
)
PICTURES = Path("docs/assets")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write pages and pictures, or print the tables of some files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report")
    parser.add_argument(
        "results", type=Path, nargs="*", help="print the tables of these files, the newest first"
    )
    asked = parser.parse_args(arguments)
    if asked.results:
        shown = speed.tables([read_results(path) for path in asked.results])
        print("\n".join(f"{name}:\n\n{text}" for name, text in shown.items()))
        return
    tables = kept_tables()
    for page in PAGES:
        write_whole(page, fill(page.read_text(encoding="utf-8"), tables))
        print(page)
    write_pictures(PICTURES)


def kept_runs() -> list[speed.Results]:
    """Return the kept files of `python -m benchmarks` and of `side_by_side`, the newest first."""
    return [read_results(path) for path in sorted(FOLDER.glob("2*.json"), reverse=True)]


def kept_tables() -> dict[str, str]:
    """Return name -> table, of all that is kept."""
    gpu = speed.tables([read_results(FOLDER / "gpu.json")])
    return {
        **speed.tables(kept_runs()),
        **{f"gpu_{name}": text for name, text in gpu.items()},
        **learning.tables(read_runs(RESULTS)),
        "rules": transfer.rules(),
        "recipes": fits.recipes(read_results(fits.RESULTS)),
        "drift": drift.drift_table(read_results(FOLDER / "drift.json")),
    }


def write_pictures(folder: Path) -> None:
    """Draw what the pages show of speed and of learning."""
    speed.draw(speed.compared(speed.newest(kept_runs())), folder / "compared.png")
    for name, picture in curves.drawn(read_runs(RESULTS)).items():
        (folder / f"evidence-{name}.svg").write_bytes(picture)


if __name__ == "__main__":
    sys.exit(main())
