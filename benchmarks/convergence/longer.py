"""The longer training: one rate for all, r from small to large, forgetting against learning.

The same runs answer all of it. They share one grid of learning rates, and each keeps what the
runtime scale makes of it. Numbers are of the first seed, unless the text says otherwise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from itertools import pairwise
from typing import Any

from benchmarks.convergence.findings import Mean, differ
from benchmarks.convergence.methods import IDENTITY, METHODS
from benchmarks.convergence.plan import (
    LONG,
    Results,
    Study,
    best_rate,
    main_cell,
    runs_left,
)
from benchmarks.convergence.tasks import TASKS
from benchmarks.markdown import count_text, folded, table

__all__ = ["Longer", "Point", "at_forgetting", "longer", "of_results"]

NOTHING = ""
STEPS = 400
"""Steps in which the scale goes from 0 to 1, between the scales that were measured."""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Reported:
    """A comparison by others, with one learning rate for all methods.

    Args:
        source: who reports it.
        link: where.
        rate: the learning rate.
        what: model and task.
        correct: method -> correct answers, in percent.
        forgetting: method -> its forgetting, in a measure of its own; empty if not reported.
    """

    source: str
    link: str
    rate: float
    what: str
    correct: Mapping[str, float]
    forgetting: Mapping[str, float] = field(default_factory=dict)


REPORTED = (
    Reported(
        "the paper",
        "citing.md",
        2e-5,
        "a Llama with 7B parameters on GSM8K",
        {"lora": 40.75, "bone": 48.16},
    ),
    Reported(
        "PEFT's own comparison",
        "https://github.com/huggingface/peft/tree/main/method_comparison",
        1e-4,
        "a Llama with 3B parameters on GSM8K",
        {"lora": 47.84, "bone": 48.67, "bat": 50.42},
        {"lora": 0.050, "bone": 0.197},
    ),
)
"""Figures of others, with larger models than those of this study."""


@dataclass(frozen=True)
class Point:
    """What a trained adapter does at one scale.

    Args:
        scale: from 0 to 1.
        loss: on the test rows of the task.
        elsewhere: the loss on text that the base wrote.
    """

    scale: float
    loss: float
    elsewhere: float


@dataclass(frozen=True)
class Longer:
    """The runs of the longer training.

    Args:
        records: method -> learning rate -> the first seed's results, at the main r.
        own: method -> its own learning rate, once its search is finished.
        seeds: method -> seed -> the results at the method's own rate.
        sizes: method -> r -> the results at the method's own rate.
        there: the number of runs that are done.
        missing: how many are known to be missing.
    """

    records: Mapping[str, Mapping[float, Record]]
    own: Mapping[str, float]
    seeds: Mapping[str, Mapping[int, Record]]
    sizes: Mapping[str, Mapping[int, Record]]
    there: int
    missing: int

    @property
    def rates(self) -> list[float]:
        """All learning rates that were tried."""
        return sorted({rate for tried in self.records.values() for rate in tried})

    @property
    def base(self) -> float:
        """The base's loss on its own text."""
        return float(next(one["forgetting"][0] for one in self._all if "forgetting" in one))

    @property
    def untrained(self) -> float:
        """The validation loss before training."""
        return float(self._all[0]["validation"][0])

    @property
    def _all(self) -> list[Record]:
        return [record for tried in self.records.values() for record in tried.values()]

    def loss(self, method: str, rate: float) -> float | None:
        """Return the test loss of a run: inf if it diverged, None if it is missing."""
        record = self.records.get(method, {}).get(rate)
        return None if record is None else _loss(record)

    def losses(self, rate: float) -> dict[str, float]:
        """Return method -> test loss at one rate for all, the lowest first."""
        known = ((self.loss(method, rate), method) for method in self.records)
        ranked = sorted((loss, method) for loss, method in known if loss is not None)
        return {method: loss for loss, method in ranked}

    def at_own(self, method: str) -> float:
        """Return the mean test loss at a method's own rate, over the seeds that are there."""
        return statistics.fmean(map(_loss, self.seeds[method].values()))

    def curve(self, method: str) -> list[Point]:
        """Return the points of a method at its own rate, the mean over seeds."""
        curves = [points for one in self.seeds[method].values() if (points := _points(one))]
        return [
            Point(*(statistics.fmean(values) for values in zip(*map(astuple, same), strict=True)))
            for same in zip(*curves, strict=True)
        ]

    @property
    def noise(self) -> float | None:
        """The largest standard deviation between a method's seeds; None with one seed of each."""
        spreads = [Mean.of([*map(_loss, records.values())]).deviation
                   for records in self.seeds.values() if len(records) > 1]  # fmt: skip
        return max(spreads, default=None)


def of_results(study: Study, results: Results) -> Longer:
    """Return what the results say of the longer training.

    Args:
        study: what was planned.
        results: of the runs that are done.
    """
    seed = study.seeds[0]
    cells = [cell for cell in study.cells if cell.task == LONG]
    main = {cell.method: cell for cell in cells if cell == main_cell(LONG, cell.method)}
    rates = {name: best_rate(cell, study, results) for name, cell in main.items()}
    own = {name: rate for name, rate in rates.items() if rate is not None}
    done = {run: record for run, record in results.items() if run.cell in set(cells)}
    of_long = Study(tuple(cells), study.rates, study.seeds, study.leaders)
    return Longer(
        records={
            name: {run.rate: record for run, record in done.items()
                   if run.cell == cell and run.seed == seed}
            for name, cell in main.items()
        },
        own=own,
        seeds={
            name: {run.seed: record for run, record in done.items()
                   if run.cell == main[name] and run.rate == rate}
            for name, rate in own.items()
        },
        sizes={
            name: {run.cell.r: record for run, record in sorted(done.items(), key=_size)
                   if run.cell.method == name and run.rate == rate and run.seed == seed}
            for name, rate in own.items()
        },
        there=len(done),
        missing=runs_left(of_long, done),
    )  # fmt: skip


def _size(done: tuple[Any, Record]) -> int:
    return int(done[0].cell.r)


def _loss(record: Record) -> float:
    loss = record.get("loss")
    return math.inf if loss is None else float(loss)


def _points(record: Record) -> list[Point]:
    """Return the points of one run; none if it diverged."""
    points = record.get("scales", ())
    return [] if any(None in point for point in points) else [Point(*point) for point in points]


def at_forgetting(points: Sequence[Point], elsewhere: float) -> float:
    """Return the lowest loss on a curve where the loss elsewhere is at most a limit.

    Between two points, both losses are taken as straight lines.

    Args:
        points: with rising scales.
        elsewhere: the limit.

    Returns:
        inf if no point of the curve is within the limit.
    """
    found = math.inf
    for one, other in pairwise(points):
        for step in range(STEPS + 1):
            share = step / STEPS
            if _between(one.elsewhere, other.elsewhere, share) <= elsewhere + 1e-9:
                found = min(found, _between(one.loss, other.loss, share))
    return found


def _between(one: float, other: float, share: float) -> float:
    return one + share * (other - one)


# --- the part of the page ------------------------------------------------------------------------


def longer(found: Longer, picture: str) -> str:
    """Return the part of the page.

    Args:
        found: the runs.
        picture: the path of the picture.
    """
    task = TASKS[LONG]
    parts = [
        f"## A longer training: {task.steps} steps\n",
        f"{task.about} Each of the {task.steps} steps has {task.batch} rows, and no row comes "
        f"twice. r is {task.r}, and the other methods have as many parameters.\n",
        _missing(found),
    ]
    if found.there:
        parts += [f"![The longer training]({picture})\n", _one_rate(found)]
    if "bone" in found.own and "lora" in found.own:
        parts += [_reported(found), _forgetting(found), _sizes(found), _identity(found)]
    return "\n".join(part for part in parts if part)


def _missing(found: Longer) -> str:
    if not found.missing:
        return ""
    return (
        f"**Of {count_text(found.there + found.missing, 'run')}, {found.missing} are missing.** "
        "`make evidence` does them. Until then, this part is provisional. The verdict includes it "
        "when Bone, BAT and LoRA are finished.\n"
    )


def _one_rate(found: Longer) -> str:
    rows = [
        [METHODS[name].title, *(_at_rate(found, name, r) for r in found.rates), _own(found, name)]
        for name, tried in found.records.items()
        if tried
    ]
    header = ["method", *(f"{rate:g}" for rate in found.rates), "at its own rate"]
    sentences = [
        _leads(found),
        *(_at_one(found, one.rate, f"the rate of {one.source}") for one in REPORTED),
        _at_own(found),
        _noise(found),
    ]
    return "\n".join([
        "### One learning rate for all\n",
        " ".join(filter(None, sentences)) + "\n",
        table(header, rows),
        "The loss on test rows; **the lowest** at each rate. The own rate is chosen by the "
        "validation loss. In the last column, the loss is the mean over the seeds that are done.\n",
    ])  # fmt: skip


def _at_rate(found: Longer, method: str, rate: float) -> str:
    loss = found.loss(method, rate)
    if loss is None:
        return NOTHING
    text = _text(loss)
    ranked = list(found.losses(rate))
    return f"**{text}**" if len(ranked) > 1 and ranked[0] == method else text


def _own(found: Longer, method: str) -> str:
    if method not in found.own:
        return NOTHING
    seeds = count_text(len(found.seeds[method]), "seed")
    return f"{found.own[method]:g}: {_text(found.at_own(method))} ({seeds})"


def _text(loss: float) -> str:
    return "diverged" if math.isinf(loss) else f"{loss:.3f}"


def _lowest(losses: Mapping[str, float]) -> str:
    """Say which loss is the lowest, and what Bone and LoRA have."""
    best = min(losses, key=lambda name: (losses[name], name))
    others = [name for name in ("bone", "lora") if name in losses and name != best]
    listed = ", ".join(f"{METHODS[name].title} {_text(losses[name])}" for name in others)
    return f"{METHODS[best].title} is lowest with {_text(losses[best])} ({listed})"


def _at_one(found: Longer, rate: float, what: str) -> str:
    """Say who is lowest at one rate for all."""
    losses = found.losses(rate)
    if not {"bone", "lora"} <= set(losses):
        return ""
    return f"At {rate:g}, {what}, {_lowest(losses)}."


def _leads(found: Longer) -> str:
    """Say at which rates Bone is lower than LoRA."""
    pairs = [(r, found.loss("bone", r), found.loss("lora", r)) for r in found.rates]
    known = [(r, bone, lora) for r, bone, lora in pairs if bone is not None and lora is not None]
    lower = [f"{rate:g}" for rate, bone, lora in known if bone < lora]
    other = [f"{rate:g}" for rate, bone, lora in known if not bone < lora]
    text = "**With one rate for all, Bone's test loss is"
    if not known:
        return ""
    if not lower or not other:
        than = "lower" if lower else "not lower"
        return f"{text} {than} than LoRA's at {_joined(lower or other)}.**"
    return f"{text} lower than LoRA's at {_joined(lower)}, and not at {_joined(other)}.**"


def _joined(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _at_own(found: Longer) -> str:
    """Say who is lowest if each has its own rate, and whether Bone and LoRA differ."""
    if not {"bone", "lora"} <= set(found.own):
        return ""
    text = _lowest({name: found.at_own(name) for name in found.own})
    gap = _gap(found, "bone", "lora", {name: _seed_losses(found, name) for name in found.own})
    return f"Each at its own rate, {text}. **There, Bone is {gap}.**"


def _seed_losses(found: Longer, method: str) -> dict[int, float]:
    return {seed: _loss(record) for seed, record in found.seeds[method].items()}


def _gap(found: Longer, one: str, other: str, losses: Mapping[str, Mapping[int, float]]) -> str:
    """Say how far a method is from another, over the seeds that both have."""
    both = sorted(set(losses[one]) & set(losses[other]))
    mine, others = ([losses[name][seed] for seed in both] for name in (one, other))
    gap = statistics.fmean(mine) - statistics.fmean(others)
    text = f"{abs(gap):.3f} {'lower' if gap < 0 else 'higher'} than {METHODS[other].title}"
    if len(both) < 2:
        return f"{text}, with one seed"
    return f"{text}, {'beyond' if differ(mine, others) else 'within'} noise"


def _noise(found: Longer) -> str:
    if found.noise is None:
        return "Where there is one seed, a small difference says nothing."
    return (
        f"The standard deviation between seeds is at most {found.noise:.3f}; where there is one "
        "seed, a difference of that size says nothing."
    )


# --- beside what others report -------------------------------------------------------------------


def _reported(found: Longer) -> str:
    """Compare figures of others with the runs at the same rate, where Bone and LoRA have one."""
    known = [one for one in REPORTED if {"bone", "lora"} <= _methods_at(found, one.rate)]
    if not known:
        return ""
    methods = ("lora", "bone", "bat")
    rows = [row for one in known for row in _beside(found, one, methods)]
    points = "\n".join(f"- {_point(found, one)}" for one in known)
    return "\n".join([
        "### Beside what others report\n",
        "Others also train all methods with one rate, and with larger models. They count correct "
        "answers, so higher is better. This study has the test loss, so lower is better.\n",
        f"{points}\n",
        table(["one rate for all", *(METHODS[name].title for name in methods)], rows),
    ])  # fmt: skip


def _methods_at(found: Longer, rate: float) -> set[str]:
    return {name for name, loss in found.losses(rate).items() if math.isfinite(loss)}


def _beside(found: Longer, one: Reported, methods: Sequence[str]) -> list[list[str]]:
    theirs = (f"{one.correct[name]:.2f}%" if name in one.correct else NOTHING for name in methods)
    losses = found.losses(one.rate)
    ours = (_text(losses[name]) if name in losses else NOTHING for name in methods)
    return [
        [f"{one.rate:g}: [{one.source}]({one.link}), {one.what}", *theirs],
        [f"{one.rate:g}: here", *ours],
    ]


def _point(found: Longer, one: Reported) -> str:
    """Say whether the order is the same, and what own rates and forgetting change."""
    losses = found.losses(one.rate)
    theirs = [name for name in sorted(one.correct, key=one.correct.__getitem__, reverse=True)
              if name in losses]  # fmt: skip
    same = theirs == [name for name in losses if name in theirs]
    sentences = [
        f"**At {one.rate:g}, {one.source} has this order, the best first: "
        f"{', '.join(METHODS[name].title for name in theirs)}.** "
        f"The order is {'the same' if same else 'another'} here.",
        f"Here, {_leader(losses['lora'] - losses['bone'])} at this rate; each at its own rate, "
        f"{_leader(found.at_own('lora') - found.at_own('bone'))}.",
    ]
    if one.forgetting:
        ours = (found.records[name][one.rate]["forgetting"][1] for name in ("bone", "lora"))
        bone, lora = (f"{loss - found.base:+.3f}" for loss in ours)
        sentences.append(
            "Forgetting, in a measure of its own, is there "
            f"{one.forgetting['bone']:.3f} for Bone and {one.forgetting['lora']:.3f} for LoRA. "
            f"Here, it is {bone} and {lora} at this rate."
        )
    return " ".join(sentences)


def _leader(gap: float) -> str:
    return f"{'Bone' if gap > 0 else 'LoRA'} leads by {abs(gap):.3f}"


# --- forgetting ----------------------------------------------------------------------------------


def _forgetting(found: Longer) -> str:
    curves = {name: points for name in found.own if (points := found.curve(name))}
    least = min(curves, key=lambda name: curves[name][-1].elsewhere)
    limit = curves[least][-1].elsewhere
    equal = {name: _equal_losses(found, name, limit) for name in curves}
    means = {name: statistics.fmean(losses.values()) for name, losses in equal.items()}
    rows = [
        [
            METHODS[name].title,
            f"{found.own[name]:g}",
            f"{points[-1].loss:.3f}",
            f"{points[-1].elsewhere - found.base:+.3f}",
            f"{means[name]:.3f}",
            _text(_any_rate(found, name, limit)),
        ]
        for name, points in curves.items()
    ]
    header = ["method", "own rate", "test loss", "forgetting", "test loss at equal forgetting",
              "the same, at any rate"]  # fmt: skip
    said = f"The least forgetful is {METHODS[least].title} ({limit - found.base:+.3f}). "
    said += f"At equal forgetting, {_lowest(means)}."
    if {"bone", "lora"} <= set(equal):
        said += f" **There, Bone is {_gap(found, 'bone', 'lora', equal)}.**"
    return "\n".join([
        "### Forgetting against learning\n",
        "Forgetting is the rise of the loss on text that the base itself wrote, from "
        f"{found.base:.3f}. A runtime scale below 1 takes back a part of both learning and "
        "forgetting. So methods can be compared at equal forgetting: each is scaled down until it "
        "forgets no more than the least forgetful one.\n",
        f"{said}\n",
        table(header, rows),
        "The last column takes the best of all rates, with the first seed.\n",
        folded("Every scale", _every_scale(found, curves)),
    ])  # fmt: skip


def _equal_losses(found: Longer, method: str, limit: float) -> dict[int, float]:
    """Return seed -> the lowest loss within a limit of forgetting, at the method's own rate."""
    curves = {seed: _points(record) for seed, record in found.seeds[method].items()}
    return {seed: at_forgetting(points, limit) for seed, points in curves.items() if points}


def _any_rate(found: Longer, method: str, limit: float) -> float:
    """Return the lowest loss within a limit of forgetting, of all rates of a method."""
    curves = map(_points, found.records[method].values())
    return min((at_forgetting(points, limit) for points in curves if points), default=math.inf)


def _every_scale(found: Longer, curves: Mapping[str, Sequence[Point]]) -> str:
    scales = [point.scale for point in next(iter(curves.values()))]
    rows = [
        [METHODS[name].title, *(f"{p.loss:.3f}, {p.elsewhere - found.base:+.3f}" for p in points)]
        for name, points in curves.items()
    ]
    about = "\nTest loss and forgetting. DoRA keeps its trained magnitudes at scale 0.\n"
    return table(["method", *(f"scale {scale:g}" for scale in scales)], rows) + about


# --- r, and LoRA from identity -------------------------------------------------------------------


def _sizes(found: Longer) -> str:
    sizes = sorted({r for of_r in found.sizes.values() for r in of_r})
    both = [r for r in sizes if all(r in found.sizes[name] for name in ("bone", "lora"))]
    if len(both) < 2:
        return ""
    rows = [
        [str(r), f"{found.sizes['bone'][r]['parameters']:,}",
         *(_text(_loss(found.sizes[name][r])) for name in ("bone", "lora"))]
        for r in both
    ]  # fmt: skip
    return "\n".join([
        f"### r from {both[0]} to {both[-1]}\n",
        _size_sentence(found, both) + "\n",
        table(["r of Bone", "parameters", "Bone", "LoRA"], rows),
    ])  # fmt: skip


def _size_sentence(found: Longer, both: Sequence[int]) -> str:
    first, last = both[0], both[-1]
    ends = "; ".join(
        f"{METHODS[name].title} from {_text(_loss(found.sizes[name][first]))} to "
        f"{_text(_loss(found.sizes[name][last]))}"
        for name in ("bone", "lora")
    )
    lower = [str(r) for r in both if _loss(found.sizes["bone"][r]) < _loss(found.sizes["lora"][r])]
    where = f"lower than LoRA at r = {_joined(lower)}" if lower else "not lower than LoRA at any r"
    return (
        f"Test loss from r = {first} to r = {last}: {ends}. **Bone is {where}.** LoRA has as many "
        f"parameters as Bone of that r. Both keep the rate that is best at r = {TASKS[LONG].r}."
    )


def _identity(found: Longer) -> str:
    """Say what Bone would gain from training A."""
    if IDENTITY not in found.own:
        return ""
    losses = {name: _seed_losses(found, name) for name in (IDENTITY, "bone", "lora")}
    gaps = [_gap(found, IDENTITY, name, losses) for name in ("bone", "lora")]
    return "\n".join([
        f"### {METHODS[IDENTITY].title}\n",
        "Bone is a LoRA with A = [I I ... I], which is not trained. LoRA from identity begins "
        "there too, and trains A. At equal parameters, its rank is therefore lower than Bone's r. "
        f"**Each at its own rate, its test loss is {'; it is '.join(gaps)}.**\n",
    ])  # fmt: skip
