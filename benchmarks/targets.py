"""The targets of the library: figures of the results, each with a limit.

A target is data: a case of a table, a figure of it, and the limit. If the results have no such case
(a quick run, a missing package), the target is not measured. That does not count as met.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import cost_model
from benchmarks.candidates import BASE, CANDIDATES, METHOD_TITLES
from benchmarks.markdown import count_text
from benchmarks.protocol import Spread, paired_ratios

__all__ = ["TARGETS", "Outcome", "Target", "candidate_floor", "judge", "over_base", "size_title"]

Case = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """One figure and its limit.

    Args:
        title: what the figure is.
        table: where its case is.
        where: keys of the case and their values.
        figure: reads it from the case; raises KeyError if the case lacks it.
        limit: the largest value allowed.
        strict: whether the figure must be below the limit.
    """

    title: str
    table: str
    where: Mapping[str, Any]
    figure: Callable[[Case], Spread]
    limit: float
    strict: bool = False


@dataclass(frozen=True)
class Outcome:
    """A target and the measured figure, None if it was not measured."""

    target: Target
    figure: Spread | None = None

    @property
    def met(self) -> bool | None:
        """Whether the median keeps the limit; None if it was not measured."""
        if self.figure is None:
            return None
        value, limit = self.figure.median, self.target.limit
        return value < limit if self.target.strict else value <= limit


def judge(tables: Mapping[str, Sequence[Case]]) -> list[Outcome]:
    """Return every target with what the tables of a file of results say of it."""
    return [_judge(target, tables.get(target.table, ())) for target in TARGETS]


def _judge(target: Target, cases: Iterable[Case]) -> Outcome:
    for case in cases:
        if all(case.get(key) == value for key, value in target.where.items()):
            try:
                return Outcome(target, target.figure(case))
            except KeyError:
                break
    return Outcome(target)


def over_base(case: Case, name: str) -> Spread:
    """Return time of a candidate / time of the frozen base."""
    return Spread.of(paired_ratios(case["seconds"], name, BASE))


def candidate_floor(table: str, case: Case, method: str) -> float | None:
    """Return multiply-adds of a method / those of the frozen base, None if they are not known.

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
    return replace(cost_model.SMOLLM2_135M, layers=case["layers"])  # a quick run keeps fewer


def _over(name: str, to: str) -> Callable[[Case], Spread]:
    return lambda case: Spread.of(paired_ratios(case["seconds"], name, to))


def _compared(
    table: str, where: Mapping[str, Any], names: tuple[str, str], limit: float, strict: bool = False
) -> Target:
    """Return the target of a candidate's time / another's."""
    name, to = names
    other = SHORT_TITLES.get(to, CANDIDATES[to].title)
    what = "forward" if table == "few_tokens" else "step"
    title = f"{METHOD_TITLES[name]} {what} / {other}, {size_title(where)}"
    return Target(title, table, where, _over(name, to), limit, strict)


def _floored(table: str, where: Mapping[str, Any], name: str, limit: float) -> Target:
    """Return the target of a candidate's step / its own floor."""

    def figure(case: Case) -> Spread:
        floor = candidate_floor(table, case, CANDIDATES[name].method)
        assert floor is not None
        ratios = paired_ratios(case["seconds"], name, BASE)
        return Spread.of([ratio / floor for ratio in ratios])

    title = f"{METHOD_TITLES[name]} step / its floor, {size_title(where)}"
    return Target(title, table, where, figure, limit)


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
    """Return the name of a case, or of where a target finds one: 2048 wide, 4 tokens, float32."""
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
