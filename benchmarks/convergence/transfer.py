"""How the best rate moves with method, r, width, depth and steps, and whether a rule predicts it.

    python -m benchmarks.convergence.transfer           do the missing runs, one after another
    python -m benchmarks.convergence.transfer --moves   measure what a step does in each setting
    python -m benchmarks.convergence.transfer --table   print best rates beside both rules

A setting is a cell: a task, whose width, depth and steps may be others than those of the study, a
method and an r. The rates of its search are 1, 2, 5, 10 ... until the lowest validation loss is not
at an edge. Then the best rate is the lowest point of a parabola through the three around it, over
the logarithm of the rate. The searches of the study count too.

The question was fixed before the runs: divided by a rule, is the best rate of every setting within
a factor of 1.5 of one constant? It is not. By the sizes of layers, 50 of 84 are, where without a
rule 19 are. By what a step does, as measured, all but LoRA are within each task of a pretrained
model, and the tasks differ. The rules, and the constants in them, were made with the same runs: the
library has them, as `Method.step` and `suggest_rate`.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import disha
from benchmarks.convergence.methods import FULL, METHODS
from benchmarks.convergence.plan import Results, final_loss
from benchmarks.convergence.runs import RESULTS, Cell, Run, read_runs, write_run
from benchmarks.convergence.tasks import RESIZED, TASKS
from benchmarks.convergence.tasks.task import IGNORED
from benchmarks.convergence.training import train
from benchmarks.markdown import table
from disha.functional import method_of
from disha.model.rates import MOVE, MOVE_OF_FACTORS

RUNS = RESULTS.with_name("rates.jsonl")
MOVES = RESULTS.with_name("rates-moves.json")
GRID = tuple(float(f"{digit}e{power}") for power in range(-6, 1) for digit in (1, 2, 5))
FIRST = {
    "bone": 5e-3,
    "bat": 5e-3,
    "groups2": 1e-2,
    "groups4": 2e-2,
    "groups_all": 5e-2,
    "lora": 1e-2,
}
"""Method -> the rate with which a search in the vision task begins."""
LIMIT = 1.5
MOVES_OF = {False: MOVE, True: MOVE_OF_FACTORS}
"""Whether it is a LoRA -> what `suggest_rate` divides by the move."""
LAYERS = {
    "digits": lambda width: (*4 * [(width, width)], (width, 4 * width), (4 * width, width)),
    "smollm": lambda _: (
        *2 * [(576, 576)], *2 * [(576, 192)], *2 * [(576, 1536)], (1536, 576)
    ),
}  # fmt: skip


def settings() -> list[Cell]:
    """Return the settings, the most telling first."""
    three = ("bone", "groups_all", "lora")
    others = ("bat", "groups2", "groups4")
    widths = [f"digits, width {width}" for width in (32, 128)]
    lengths = [f"digits, {steps} steps" for steps in (50, 450)]
    depths = [f"digits, depth {depth}" for depth in (2, 8)]
    return [
        *(Cell(task, name, 8) for task in widths for name in three),
        *(Cell("digits", name, 8) for name in (*three, *others)),
        *(Cell("digits", name, r) for r in (32, 16, 64) for name in three),
        *(Cell(widths[1], name, 32) for name in three),
        *(Cell(task, name, 8) for task in (*lengths, *depths) for name in three),
        *(Cell(task, name, 8) for task in widths for name in others),
    ]


def missing(cell: Cell) -> Run | None:
    """Return the next run that the search of a setting needs, or None."""
    found = _losses(cell, read_runs(RUNS))
    start = GRID.index(FIRST[cell.method])
    best = min(found, key=lambda rate: (found[rate], rate), default=GRID[start])
    for place in (start, start - 1, start + 1, GRID.index(best) - 1, GRID.index(best) + 1):
        if GRID[place] not in found:
            return Run(cell, GRID[place], 0)
    return None


def _losses(cell: Cell, results: Results) -> dict[float, float]:
    """Return rate -> validation loss of the first seed."""
    return {
        run.rate: final_loss(record)
        for run, record in results.items()
        if run.cell == cell and run.seed == 0
    }


# --- the best rate, and what two rules say of it ------------------------------------------------


def rate_of_lowest(losses: dict[float, float]) -> float | None:
    """Return the lowest point of a parabola through the three best; None if it is at an edge."""
    rates = sorted(losses)
    best = min(range(len(rates)), key=lambda place: losses[rates[place]], default=0)
    if not 0 < best < len(rates) - 1:
        return None
    around = rates[best - 1 : best + 2]
    # A run that diverged would pull the parabola to the other side.
    most = losses[rates[best]] + max(0.5 * losses[rates[best]], 0.3)
    x, y = [math.log(rate) for rate in around], [min(losses[rate], most) for rate in around]
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    return math.exp((x[0] + x[1]) / 2 - left * (x[2] - x[0]) / (2 * (right - left)))


def best_rates() -> dict[Cell, float]:
    """Return the best rate of each setting; of two searches, the geometric mean."""
    searches = read_runs(RESULTS), read_runs(RUNS)
    cells = {run.cell for results in searches for run in results}
    found: dict[Cell, float] = {}
    for cell in sorted(cells, key=lambda one: (one.task, one.method, one.r, one.layers)):
        if cell.method in (*FIRST, "tile", FULL) and cell.dtype == "float32":
            both = [rate_of_lowest(_losses(cell, results)) for results in searches]
            searched = [rate for rate in both if rate is not None]
            if searched:
                found[cell] = statistics.geometric_mean(searched)
    return found


def step_by_sizes(cell: Cell) -> float:
    """Return sqrt(L) x the mean step of the layers, as `Plan.rate` has it."""
    sizes = _layers(cell)
    if cell.method == FULL:
        steps = [float(inputs) for inputs, _ in sizes]
    else:
        method, r = _of_library(cell)
        steps = [method_of(method).step(inputs, r) for inputs, _ in sizes]
    return statistics.fmean(steps) * math.sqrt(len(steps))


def _of_library(cell: Cell) -> tuple[str, int]:
    """Return the library's name of a cell's method, and its r; a LoRA has as many parameters."""
    if cell.method == "lora":
        sizes = _layers(cell)
        return "lora", round(cell.r * sum(out for _, out in sizes) / sum(map(sum, sizes)))
    return cell.method.replace("groups", "bone_groups").replace("tile", "bone"), cell.r


def _layers(cell: Cell) -> list[tuple[int, int]]:
    """Return the sizes (in, out) of the adapted layers."""
    task: Any = (TASKS | RESIZED)[cell.task]
    if cell.task == "packages":
        width, depth = 384, 6
    elif cell.task.startswith("digits"):
        width, depth = task.width, task.depth
    else:
        width, depth = 0, 30
    of_block = LAYERS["smollm" if width == 0 else "digits"](width)
    parts = {"all": slice(None), "attention": slice(4), "feed-forward": slice(4, None)}
    return depth * [*of_block[parts[cell.layers]]]


def measure_move(cell: Cell) -> float:
    """Return how far a unit of rate moves log-probabilities, by `disha.suggest_rate`."""
    task = (TASKS | RESIZED)[cell.task]
    model: Any = copy.deepcopy(task.base())
    method, r = _of_library(cell)
    torch.manual_seed(0)
    disha.inject_adapters(model, task.layers[cell.layers], r, method=method)
    if task.head is not None:  # a head of zeros would hide what is below it
        nn.init.normal_(model.get_submodule(task.head).weight, std=0.05)
    inputs, labels = task.batch_of(task.rows.training[: 4 * task.batch])

    def loss(output: Any) -> torch.Tensor:
        logits = getattr(output, "logits", output)
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)

    return MOVES_OF[method == "lora"] / disha.suggest_rate(model, inputs, loss=loss)


# --- commands -----------------------------------------------------------------------------------


def print_table() -> None:
    """Print every setting, and how well each rule holds, as Markdown."""
    best = best_rates()
    moves = json.loads(MOVES.read_text(encoding="utf-8")) if MOVES.exists() else {}
    rows, products = [], defaultdict(list)
    for cell, rate in best.items():
        by_sizes, move = rate * step_by_sizes(cell), moves.get(_key(cell))
        kind = "LoRA" if cell.method == "lora" else "others"
        products["no rule"].append(rate)
        products["by sizes"].append(by_sizes)
        if move is not None:
            products[f"measured, {kind}"].append(rate * move)
            products[f"measured, {kind}, {cell.task}"].append(rate * move)
        last = "-" if move is None else f"{rate * move:.2f}"
        title = METHODS[cell.method].title
        rows.append(
            [cell.task, cell.layers, title, str(cell.r), f"{rate:.2g}", f"{by_sizes:.2f}", last]
        )
    print(table(["task", "layers", "method", "r", "best rate", "x step", "x move"], rows))
    print(table(["rule", "settings", "constant", "spread", "within 1.5"], [*_summed(products)]))


def _summed(products: dict[str, list[float]]) -> Iterator[list[Any]]:
    for name, values in products.items():
        mean = statistics.geometric_mean(values)
        spread = math.exp(statistics.pstdev([math.log(value) for value in values]))
        near = sum(1 / LIMIT <= value / mean <= LIMIT for value in values)
        yield [name, str(len(values)), f"{mean:.2g}", f"x {spread:.2f}", f"{near} of {len(values)}"]


def _key(cell: Cell) -> str:
    return f"{cell.task}/{cell.title}"


def main() -> None:
    """Do what the flag says."""
    if "--table" in sys.argv:
        print_table()
    elif "--moves" in sys.argv:
        moves = json.loads(MOVES.read_text(encoding="utf-8")) if MOVES.exists() else {}
        for cell in best_rates():
            if cell.method in FIRST and cell.task != "documentation" and _key(cell) not in moves:
                moves[_key(cell)] = float(f"{measure_move(cell):.4g}")
                MOVES.write_text(json.dumps(moves, indent=1) + "\n", encoding="utf-8")
    else:
        for cell in settings():
            while (run := missing(cell)) is not None:
                found = train(run)
                write_run(RUNS, run, found)
                print(f"{run.title}: {found['validation'][-1]}", flush=True)


if __name__ == "__main__":
    main()
