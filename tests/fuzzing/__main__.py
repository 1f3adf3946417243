"""`python -m tests.fuzzing`: hostile files and templates, saves and runs that meet, failing files,
and operations on models that are interrupted.

With the default numbers it takes an hour on two cores."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import traceback
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

from tqdm import tqdm

from disha.text import table
from tests.fuzzing.crafting import RECIPES, craft
from tests.fuzzing.faults import CODES
from tests.fuzzing.operations import JOBS, Trials
from tests.fuzzing.saving import kill_saves, meet
from tests.fuzzing.workers import Outcome, try_files


def main() -> int:
    """Run everything; return 1 if anything that must hold does not."""
    arguments = _parser().parse_args()
    numbers = range(arguments.first, arguments.first + arguments.files)
    failures = _try(arguments, numbers)
    if arguments.kills:
        failures += _kill(arguments)
    if arguments.runs:
        failures += _meet_runs(arguments)
    if arguments.faults:
        failures += sum(map(_break, JOBS))
    # In a process of its own: one that has forked the others would count their memory too.
    templates = [sys.executable, "-m", "tests.finetune.text.hostile_templates"]
    failures += subprocess.run(templates, check=False).returncode
    print("everything holds" if not failures else f"{failures} FAILURES, kept in {arguments.out}")
    return int(failures > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    parser.add_argument("--files", type=int, default=20_000, help="how many hostile files")
    parser.add_argument("--kills", type=int, default=200, help="how many killed saves")
    parser.add_argument("--meetings", type=int, default=200, help="saves of each of two processes")
    parser.add_argument("--runs", type=int, default=50, help="pairs of runs in one folder")
    parser.add_argument(
        "--faults",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let each operation on files fail, in everything that reads or writes them",
    )
    parser.add_argument("--seed", type=int, default=0, help="another makes other files")
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--workers", type=int, default=2, help="processes that try or interrupt")
    parser.add_argument("--out", type=Path, default=Path("fuzz-output"), help="for what fails")
    return parser


def _try(arguments: argparse.Namespace, numbers: range) -> int:
    outcomes = []
    failed = 0
    bar = tqdm(total=len(numbers), desc="hostile files", unit=" files", mininterval=1)
    for outcome in try_files(numbers, seed=arguments.seed, workers=arguments.workers):
        outcomes.append(outcome)
        if outcome.failure:
            failed += 1
            _keep(arguments, outcome)
        bar.update()
        bar.set_postfix(loaded=sum(o.accepted for o in outcomes), failures=failed, refresh=False)
    bar.close()
    print(_summary(outcomes))
    return failed


def _keep(arguments: argparse.Namespace, outcome: Outcome) -> None:
    """Keep a file that something came of, and say what."""
    arguments.out.mkdir(exist_ok=True)
    path = arguments.out / f"{arguments.seed}-{outcome.number}.safetensors"
    path.write_bytes(craft(outcome.number, arguments.seed).data)
    path.with_suffix(".txt").write_text(f"{outcome.recipe}\n{outcome.failure}\n")
    tqdm.write(f"number {outcome.number} ({outcome.recipe}), kept as {path}:\n{outcome.failure}")


def _summary(outcomes: list[Outcome]) -> str:
    by_recipe: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_recipe[outcome.recipe].append(outcome)
    rows = []
    for recipe in filter(by_recipe.__contains__, RECIPES):
        mine = by_recipe[recipe]
        rows.append(
            (
                recipe,
                len(mine),
                sum(one.accepted for one in mine),
                f"{max(one.size for one in mine) / 1e6:.2f}",
                f"{max(one.usage.seconds for one in mine):.2f}",
                f"{max(one.usage.memory for one in mine) / 1e6:.0f}",
            )
        )
    header = ("recipe", "files", "loaded", "largest MB", "slowest s", "most memory MB")
    loaded = sum(one.accepted for one in outcomes)
    failed = sum(bool(one.failure) for one in outcomes)
    total = f"{len(outcomes):,} files: {loaded:,} loaded, {failed:,} failures, the rest refused"
    return f"{table(header, rows)}\n{total}"


def _kill(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "adapter.safetensors")
        kills = kill_saves(path, arguments.kills, arguments.seed)
        left: Counter[int | None] = Counter()
        try:
            left.update(tqdm(kills, total=arguments.kills, desc="killed saves", unit=""))
            loads, seen = meet(path, arguments.meetings)
        except AssertionError as error:
            print(f"killed or meeting saves: {error}")
            return 1
    print(
        f"{left.total()} saves killed: {left.pop(None, 0)} times nothing was there, else one of "
        f"{len(left)} versions; {loads} loads while two processes saved: {len(seen)} versions"
    )
    return 0


def _meet_runs(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        numbers = (str(arguments.runs), str(arguments.seed))
        command = [sys.executable, "-m", "tests.fuzzing.runs", folder, *numbers]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    for outcome, count in sorted(Counter(done.stdout.splitlines()).items()):
        print(f"{count} pairs of runs, {outcome}")
    return int(done.returncode != 0)


def _break(name: str) -> int:
    """Let every operation of a job fail with every code, once or lastingly, or be the last."""
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(JOBS[name], Path(folder))
        kinds = [(code, lasting) for code in CODES for lasting in (False, True)]
        ways = [partial(trials.fail, code=code, lasting=lasting) for code, lasting in kinds]
        ways.append(trials.kill)
        tried = [partial(way, at) for at in range(trials.operations) for way in ways]
        failures = 0
        for one in tqdm(tried, desc=name, unit="", leave=False):
            try:
                one()
            except Exception:
                failures += 1
                traceback.print_exc()
    print(f"{name}: {trials.operations} operations, {len(tried):,} trials, {failures} failures")
    return failures


if __name__ == "__main__":
    sys.exit(main())
