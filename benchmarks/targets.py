"""The targets of the library: figures of the results, each with a limit.

A target is data: a case of a table, a figure of it, and the limit. If the results have no such case
(a quick run, a missing package), the target is not measured. That does not count as met.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import cost_model, roofline
from benchmarks.candidates import BASE, CANDIDATES, METHOD_TITLES
from benchmarks.markdown import count_text
from benchmarks.protocol import Spread, paired_ratios

__all__ = [
    "TARGETS",
    "Outcome",
    "Target",
    "candidate_floor",
    "judge",
    "over_base",
    "roofline_floor",
    "size_title",
]

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


def roofline_floor(table: str, case: Case, method: str) -> float | None:
    """Return the least time of a method / that of the frozen base, None if it is not known.

    Args:
        table: the case's.
        case: which gives the sizes, and for a training step the rates.
        method: one of the cost model's or the roofline's.
    """
    r, tokens = case["r"], case["tokens"]
    if table == "few_tokens":
        layer = cost_model.Linear(case["width"], case["width"])
        known = method in cost_model.METHODS
        return roofline.few_tokens_floor(layer, method, r) if known else None
    if "rates" not in case or method not in (*roofline.METHODS, roofline.FORMED):
        return None
    rates = roofline.read_rates(case["rates"])
    itemsize = getattr(torch, case["dtype"]).itemsize
    if table == "model_step":
        model = _decoder(case)
        if not rates.keys() >= set(model.linears):
            return None
        added = roofline.decoder_seconds(model, tokens, method, r, itemsize, rates)
    else:
        ((layer, own),) = rates.items()
        added = roofline.layer_seconds(layer, tokens, method, r, itemsize, own)
    return 1 + added / min(case["seconds"][BASE])


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
    """Return the target of a candidate's step / its own roofline floor."""

    def figure(case: Case) -> Spread:
        floor = roofline_floor(table, case, CANDIDATES[name].method)
        if floor is None:
            raise KeyError("rates")
        ratios = paired_ratios(case["seconds"], name, BASE)
        return Spread.of([ratio / floor for ratio in ratios])

    title = f"{METHOD_TITLES[name]} step / its roofline floor, {size_title(where)}"
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
    for where in STEPS:
        yield from _step_targets("layer_step", where)
        if where["dtype"] == "bfloat16":
            yield _compared("layer_step", where, ("bat", "peft_bat"), 0.80)


def _step_targets(table: str, where: Mapping[str, Any]) -> Iterable[Target]:
    """Yield what holds for each training step."""
    for name, limit in (("bone", 1.08), ("bat", 1.12)):
        yield _floored(table, where, name, limit)
    for peer in ("peft_lora", "loralib", "peft_miss"):
        yield _compared(table, where, ("bone", peer), 1.0, strict=True)


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
        yield from _step_targets("model_step", where)
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


def _job_targets() -> Iterable[Target]:
    for dtype in ("float32", "bfloat16"):
        where = {"what": "contest", "model": "SmolLM2-135M", "dtype": dtype}
        for field, peer, limit in (
            ("seconds_per_step", "peft_miss", 1.0),
            ("seconds_per_step", "peft_lora", 1.0),
            ("peak_bytes", "peft_lora", 0.8),
        ):
            what = "step" if field == "seconds_per_step" else "peak memory"
            title = f"whole job: {what} / Trainer, {CANDIDATES[peer].title}, {dtype}"
            figure, is_time = _job(field, peer), field == "seconds_per_step"
            yield Target(title, "side_by_side", where, figure, limit, strict=is_time)


def _job(field: str, to: str) -> Callable[[Case], Spread]:
    def figure(case: Case) -> Spread:
        values = {name: took[field] for name, took in case["contestants"].items()}
        return Spread.of(paired_ratios(values, "disha", to))

    return figure


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


def _adapter_targets() -> Iterable[Target]:
    for tokens in (64, 2048):
        for name in ("bone", "bat"):
            for adapters in (1, 8, 64):
                alone = adapters == 1
                other, limit = ("one_adapter", 1.05) if alone else ("one_by_one", 1.0)
                text = "without a route" if alone else "adapter by adapter"
                yield Target(
                    f"{METHOD_TITLES[name]} batch of {count_text(tokens, 'token')}, "
                    f"{count_text(adapters, 'adapter')} / {text}",
                    "routed",
                    {"adapters": adapters, "samples": 64, "tokens": tokens},
                    _over(f"{name}_routed", f"{name}_{other}"),
                    limit,
                )
    for title, figure, limit in (
        ("1,000 loaded adapters: last load / first", _last_load_over_first, 1.5),
        ("1,000 loaded adapters: forward / of one", _over("active_of_many", "active_of_one"), 1.05),
        ("1,000 loaded adapters: resident growth / blocks", _resident_over_blocks, 2.0),
    ):
        yield Target(title, "loaded", {"adapters": 1000}, figure, limit)


def _last_load_over_first(case: Case) -> Spread:
    seconds, part = case["load_seconds"], len(case["load_seconds"]) // 10
    first = Spread.of(seconds[:part]).median
    return Spread.of([one / first for one in seconds[-part:]])


def _resident_over_blocks(case: Case) -> Spread:
    if case["resident_bytes"] is None:
        raise KeyError("resident_bytes")
    return Spread.of([case["resident_bytes"] / case["block_bytes"]])


TARGETS: tuple[Target, ...] = (
    *_layer_targets(),
    *_few_token_targets(),
    *_model_targets(),
    *_memory_targets(),
    *_job_targets(),
    *_adapter_targets(),
    *_start_up_targets(),
)
