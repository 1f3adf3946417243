r"""How the best rate moves with method, r, width, depth and steps, and whether a rule predicts it.

    python -m benchmarks.convergence.transfer    measure what a step does in each setting

A setting is a cell: a task, whose width, depth and steps may be others than those of the study, a
method, an r, and the adapted layers. Its search has run at the rates 1, 2, 5, 10 ... until the
lowest validation loss was not at an edge, by a command such as

    python -m benchmarks.convergence --task "digits, width 32" --method bone --r 8 \
        --rates 2e-3 5e-3 1e-2 2e-2 --seeds 1 --out benchmarks/results/rates.jsonl

The best rate is the lowest point of a parabola through the three around it, over the logarithm of
the rate. The searches of the study count too.

The question was fixed before the runs: divided by a rule, is the best rate of every setting within
a factor of 1.5 of one constant? It is not: the table says how many are. The rules, and the
constants in them, were made with the same runs: the library has them, as `Method.step` and
`suggest_rate`.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import disha
from benchmarks.convergence.methods import FULL
from benchmarks.convergence.runs import RESULTS, Cell, read_runs, tried_rates
from benchmarks.convergence.tasks import EVERY_TASK, TASKS
from benchmarks.convergence.tasks.task import IGNORED
from benchmarks.markdown import table
from disha.functional import method_of
from disha.model.rates import MOVE, MOVE_OF_FACTORS

RUNS = RESULTS.with_name("rates.jsonl")
MOVES = RESULTS.with_name("rates-moves.json")
WITH_MOVES = ("bone", "bat", "groups2", "groups4", "groups_all", "lora")
"""The methods whose steps are measured."""
LIMIT = 1.5
MOVES_OF = {False: MOVE, True: MOVE_OF_FACTORS}
"""Whether it is a LoRA -> what `suggest_rate` divides by the move."""
LAYERS = {
    "digits": lambda width: (*4 * [(width, width)], (width, 4 * width), (4 * width, width)),
    "smollm": lambda _: (
        *2 * [(576, 576)], *2 * [(576, 192)], *2 * [(576, 1536)], (1536, 576)
    ),
}  # fmt: skip


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
        if cell.method in (*WITH_MOVES, "tile", FULL):
            both = [rate_of_lowest(tried_rates(cell, results)) for results in searches]
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
    task: Any = EVERY_TASK[cell.task]
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
    task = EVERY_TASK[cell.task]
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


# --- the table, and the command ------------------------------------------------------------------


def rules() -> str:
    """Return the table of how well each rule holds."""
    moves = json.loads(MOVES.read_text(encoding="utf-8"))
    products = defaultdict(list)
    for cell, rate in best_rates().items():
        products["nothing"].append(rate)
        products["the rule of a plan"].append(rate * step_by_sizes(cell))
        if _key(cell) in moves and cell.method == "lora":
            products["the measured step of a LoRA"].append(rate * moves[_key(cell)])
        elif _key(cell) in moves:
            products["the measured step"].append(rate * moves[_key(cell)])
            if cell.task in TASKS:
                products[f"the measured step, in {cell.task}"].append(rate * moves[_key(cell)])
    header = ["divided by", "settings", "constant", "spread", "within 1.5"]
    return table(header, [*_summed(products)])


def _summed(products: dict[str, list[float]]) -> Iterator[list[Any]]:
    for name, values in sorted(products.items()):
        mean = statistics.geometric_mean(values)
        spread = math.exp(statistics.pstdev([math.log(value) for value in values]))
        near = sum(1 / LIMIT <= value / mean <= LIMIT for value in values)
        yield [name, str(len(values)), f"{mean:.2g}", f"x {spread:.2f}", str(near)]


def _key(cell: Cell) -> str:
    return f"{cell.task}/{cell.title}"


def main() -> None:
    """Measure the settings that the file lacks, and write it."""
    moves = json.loads(MOVES.read_text(encoding="utf-8"))
    for cell in best_rates():
        if cell.method in WITH_MOVES and cell.task != "documentation" and _key(cell) not in moves:
            moves[_key(cell)] = float(f"{measure_move(cell):.4g}")
            MOVES.write_text(json.dumps(moves, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
