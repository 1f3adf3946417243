"""What the library has to reach: figures of the results, each with its limit.

A target is data: which case of which table, which figure of it, and the most that it may be. Where
results have no such case (a quick run, a package that is missing), a target is not measured, which
is not met.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from benchmarks import cost_model
from benchmarks.candidates import BASE, CANDIDATES, METHOD_TITLES
from benchmarks.markdown import count_text
from benchmarks.protocol import Spread, paired_ratios

__all__ = ["TARGETS", "Outcome", "Target", "candidate_floor", "judge", "over_base", "size_title"]

T = TypeVar("T")
Case = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """One figure and its limit.

    Args:
        title: what the figure is.
        table: where its case is.
        where: keys of the case and the values that they must have.
        figure: reads it off the case; raises KeyError where the case lacks it.
        limit: the most it may be.
        strict: whether the limit itself is too much already.
        at_floor: the same figure if our side of it took what its floor says: in a step the
            multiply-adds of its products, at the base's rate; for few tokens, where the base is
            far from the rate of large products, no more than the base. None where times are not
            compared.
    """

    title: str
    table: str
    where: Mapping[str, Any]
    figure: Callable[[Case], Spread]
    limit: float
    strict: bool = False
    at_floor: Callable[[Case], float] | None = None

    def allows(self, value: float) -> bool:
        """Whether a figure keeps the limit."""
        return value < self.limit if self.strict else value <= self.limit


@dataclass(frozen=True)
class Outcome:
    """A target with what was measured and what the floor would give, None where nothing was."""

    target: Target
    figure: Spread | None = None
    at_floor: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the median keeps the limit; None where nothing was measured."""
        return None if self.figure is None else self.target.allows(self.figure.median)

    @property
    def beyond_floor(self) -> bool:
        """Whether the limit asks for less than the floor."""
        return self.at_floor is not None and not self.target.allows(self.at_floor)


def judge(tables: Mapping[str, Sequence[Case]]) -> list[Outcome]:
    """Hold every target against the tables of a file of results."""
    return [_judge(target, tables.get(target.table, ())) for target in TARGETS]


def _judge(target: Target, cases: Iterable[Case]) -> Outcome:
    for case in cases:
        if all(case.get(key) == value for key, value in target.where.items()):
            figure = _where_measured(target.figure, case)
            floor = None if target.at_floor is None else _where_measured(target.at_floor, case)
            return Outcome(target, figure, floor)
    return Outcome(target)


def _where_measured(read: Callable[[Case], T], case: Case) -> T | None:
    try:
        return read(case)
    except KeyError:
        return None


def over_base(case: Case, name: str) -> Spread:
    """Return a candidate's time over the frozen base's."""
    return Spread.of(paired_ratios(case["seconds"], name, BASE))


def candidate_floor(table: str, case: Case, method: str) -> float | None:
    """Return the multiply-adds of a method over the frozen base's, None where none are known.

    Args:
        table: the case's.
        case: which gives the sizes.
        method: one of the cost model's.
    """
    if method not in cost_model.METHODS:
        return None
    if table == "model_step":
        return cost_model.decoder_step_floor(
            _decoder(case), case["batch"], case["length"], method, case["r"]
        )
    layer = cost_model.Linear(case["width"], case["width"])
    floor = cost_model.step_floor if table == "layer_step" else cost_model.forward_floor
    return floor(layer, case["tokens"], method, case["r"])


def _decoder(case: Case) -> cost_model.Decoder:
    # A quick run keeps some of the layers only.
    whole = cost_model.SMOLLM2_135M
    return cost_model.Decoder(**{**vars(whole), "layers": case["layers"]})


def _over(name: str, to: str) -> Callable[[Case], Spread]:
    return lambda case: Spread.of(paired_ratios(case["seconds"], name, to))


def _own_floor(table: str, case: Case, name: str) -> float:
    floor = candidate_floor(table, case, CANDIDATES[name].method)
    assert floor is not None
    return floor


def _compared(
    table: str, where: Mapping[str, Any], names: tuple[str, str], limit: float, strict: bool = False
) -> Target:
    """Return the target of a candidate's time over another's."""
    name, to = names
    few = table == "few_tokens"

    def at_floor(case: Case) -> float:
        return (1.0 if few else _own_floor(table, case, name)) / over_base(case, to).median

    other = SHORT_TITLES.get(to, CANDIDATES[to].title)
    what = "forward" if few else "step"
    title = f"{METHOD_TITLES[name]} {what} / {other}, {size_title(where)}"
    return Target(title, table, where, _over(name, to), limit, strict, at_floor)


def _floored(table: str, where: Mapping[str, Any], name: str, limit: float) -> Target:
    """Return the target of a candidate's step over its own floor."""

    def figure(case: Case) -> Spread:
        floor = _own_floor(table, case, name)
        ratios = paired_ratios(case["seconds"], name, BASE)
        return Spread.of([ratio / floor for ratio in ratios])

    title = f"{METHOD_TITLES[name]} step / its floor, {size_title(where)}"
    return Target(title, table, where, figure, limit, at_floor=lambda case: 1.0)


def _seconds(name: str) -> Callable[[Case], Spread]:
    return lambda case: Spread.of(case["seconds"][name])


def _bytes(name: str, to: Callable[[Case], float]) -> Callable[[Case], Spread]:
    return lambda case: Spread.of([case["kept_bytes"][name] / to(case)])


def _inputs_and_activations(case: Case) -> float:
    inputs = case["layers"] * case["tokens"] * case["width"] * 4
    return float(case["kept_bytes"][BASE] + inputs)


def _layer(width: int, tokens: int, dtype: str) -> dict[str, Any]:
    return {"width": width, "tokens": tokens, "dtype": dtype, "r": 64}


def size_title(case: Case) -> str:
    """Return what a case, or where a target finds one, is called: 2048 wide, 4 tokens, float32."""
    where = case["model"] if "model" in case else f"{case['width']} wide"
    return f"{where}, {count_text(case['tokens'], 'token')}, {case['dtype']}"


STEPS = (
    _layer(2048, 1024, "float32"),
    _layer(1024, 2048, "float32"),
    _layer(4096, 512, "bfloat16"),
    _layer(1024, 1024, "bfloat16"),
)
FEW = tuple(
    _layer(2048, tokens, dtype) for dtype in ("float32", "bfloat16") for tokens in (1, 4, 8, 16)
)
WHOLE = tuple(
    {"model": "SmolLM2-135M", "layers": 30, "tokens": tokens, "dtype": dtype}
    for tokens, dtype in ((512, "float32"), (1024, "bfloat16"))
)
SHORT_TITLES = {BASE: "frozen", "loralib": "loralib"}
MEMORY = {"what": "counted", "layers": 4, "width": 1024, "tokens": 512}


def _layer_targets() -> Iterable[Target]:
    for where in (STEPS[0], STEPS[2]):
        yield _floored("layer_step", where, "bone", 1.05)
    for where in STEPS:
        for peer in ("peft_lora", "loralib", "peft_miss"):
            yield _compared("layer_step", where, ("bone", peer), 1.0, strict=True)
    for where in STEPS:
        if where["tokens"] >= 1024:
            yield _floored("layer_step", where, "bat", 1.1)
        if where["dtype"] == "bfloat16":
            yield _compared("layer_step", where, ("bat", "peft_bat"), 0.80)
    for name, limit in (("bone", 1.15), ("bat", 1.75)):
        yield _compared("layer_step", STEPS[3], (name, BASE), limit)


def _few_token_targets() -> Iterable[Target]:
    for where in FEW:
        if where["tokens"] == 16:
            limit = 3.2
        elif where["dtype"] == "float32":
            limit = 2.5
        else:
            limit = 4.0 if where["tokens"] == 1 else 3.2
        yield _compared("few_tokens", where, ("bat", BASE), limit)
    for where in FEW:
        yield _compared("few_tokens", where, ("bat", "peft_bat"), 1 / 6)
    for where in FEW:
        yield _compared("few_tokens", where, ("bone", "loralib"), 1.0)


def _model_targets() -> Iterable[Target]:
    for where, bat_limit in zip(WHOLE, (0.88, 0.80), strict=True):
        yield _floored("model_step", where, "bone", 1.05)
        yield _compared("model_step", where, ("bone", "peft_lora"), 1.0, strict=True)
        yield _compared("model_step", where, ("bone", "peft_miss"), 1.0)
        yield _compared("model_step", where, ("bat", "peft_bat"), bat_limit)


def _memory_targets() -> Iterable[Target]:
    for text, figure, limit in (
        (
            "BAT keeps / inputs and activations",
            _bytes("bat", _inputs_and_activations),
            1.02,
        ),
        ("BAT keeps / PEFT BAT", _bytes("bat", lambda case: case["kept_bytes"]["peft_bat"]), 1 / 3),
    ):
        yield Target(f"{text}, 4 layers", "memory", MEMORY, figure, limit)


def _start_up_targets() -> Iterable[Target]:
    for what, layers, limit in (
        ("inject 1,000 layers, meta", 1000, 0.1),
        ("inject 1,000 layers of 64 x 64, CPU", 1000, 0.3),
        ("plan and inject a 7B Llama, meta", 224, 0.2),
    ):
        where = {"what": what, "layers": layers}
        for name in ("bone", "bat"):
            text = f"{METHOD_TITLES[name]}: {what} (seconds)"
            yield Target(text, "start_up", where, _seconds(name), limit, strict=True)


TARGETS: tuple[Target, ...] = (
    *_layer_targets(),
    *_few_token_targets(),
    *_model_targets(),
    *_memory_targets(),
    *_start_up_targets(),
)
