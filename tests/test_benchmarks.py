"""The benchmarks: timing, the cost model, the checks before timing, the page."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import __main__ as command
from benchmarks import (
    candidates,
    compiled,
    finetuning,
    report,
    results,
    roofline,
    steps,
    whole_model,
)
from benchmarks.candidates import BASE, CANDIDATES, lora_rank
from benchmarks.cost_model import (
    METHODS,
    MODELS,
    SMOLLM2_135M,
    Linear,
    adapter_parameters,
    decoder_step_floor,
    forward_floor,
    forward_macs,
    kept_bytes,
    predict,
    step_floor,
    step_macs,
)
from benchmarks.devices import FACTS, NOT_ASKED
from benchmarks.layers import build_layers
from benchmarks.memory import allocated_peak, fresh_growth, stack
from benchmarks.memory import kept_bytes as measured_kept_bytes
from benchmarks.protocol import Budget, Spread, compare, paired_ratios, slow_dtypes
from benchmarks.settings import FINETUNE_RUNS, FULL, QUICK, ExpertModel, LayerSize, ModelRun
from benchmarks.steps import CandidateError
from benchmarks.targets import TARGETS, judge, roofline_floor
from disha.finetune.metrics import Metrics
from disha.finetune.models.decoder import Decoder, DecoderConfig

MIB = 2**20
ROOT = Path(__file__).parent.parent


class Clock:
    """A clock that only the runs move on, and a note of their order."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def __call__(self):
        return self.now

    def run(self, name, *durations):
        remaining = iter(durations)

        def run():
            self.order.append(name)
            self.now += next(remaining, durations[-1])

        return run


def test_each_round_runs_everything_once_in_an_order_of_its_own():
    clock = Clock()
    runs = {name: clock.run(name, 1.0) for name in "abcd"}
    seconds = compare(runs, Budget(1e9, most_rounds=20, warm_up=3), clock=clock)
    rounds = [clock.order[i : i + 4] for i in range(0, len(clock.order), 4)]
    assert len(rounds) == 23
    assert all(sorted(one) == list("abcd") for one in rounds)
    assert len({tuple(one) for one in rounds}) > 5
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abcd", 20)


def test_warm_up_is_left_out():
    clock = Clock()
    seconds = compare(
        {"a": clock.run("a", 9.0, 8.0, 1.0, 2.0)}, Budget(1e9, 2, 2, warm_up=2), clock=clock
    )
    assert seconds == {"a": [1.0, 2.0]}


@pytest.mark.parametrize(("allowed", "rounds"), [(0.0, 3), (6.5, 6), (100.0, 8)])
def test_no_round_starts_after_the_budget_but_for_the_least(allowed, rounds):
    clock = Clock()
    budget = Budget(allowed, least_rounds=3, most_rounds=8, warm_up=1)
    assert len(compare({"a": clock.run("a", 1.0)}, budget, clock=clock)["a"]) == rounds


def test_the_device_is_waited_for_on_both_sides_of_a_run():
    clock = Clock()

    def wait():  # what was given to the device before takes its time now
        clock.order.append("wait")
        clock.now += 0.5

    budget = Budget(0.0, 1, 1, warm_up=0)
    seconds = compare({"a": clock.run("a", 1.0)}, budget, synchronise=wait, clock=clock)
    assert clock.order == ["wait", "a", "wait"]
    assert seconds == {"a": [1.5]}


def test_ratios_are_taken_within_a_round():
    # The machine is ten times slower in the second round; the ratio is not.
    seconds = {"base": [1.0, 10.0, 1.0], "a": [2.0, 20.0, 3.0]}
    assert paired_ratios(seconds, "a", "base") == [2.0, 2.0, 3.0]
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


@pytest.mark.parametrize(
    ("width", "tokens", "bone", "bat"),
    [(2048, 1024, 1.047, 1.59), (1024, 2048, 1.094, 1.55), (4096, 512, 1.023, 1.69),
     (1024, 1024, 1.094, 1.59)],
)  # fmt: skip
def test_floors_of_a_step_are_those_counted_by_hand(width, tokens, bone, bat):
    layer = Linear(width, width)
    assert step_floor(layer, tokens, "bone", 64) == pytest.approx(bone, abs=6e-4)
    assert step_floor(layer, tokens, "bat", 64) == pytest.approx(bat, abs=6e-3)
    assert step_floor(layer, tokens, "lora", 64) == pytest.approx(bone, abs=6e-4)
    assert step_floor(layer, tokens, "frozen", 64) == 1


def test_floors_of_layers_that_are_not_square():
    layer, r, tokens = Linear(576, 1536), 64, 512
    assert step_floor(layer, tokens, "bone", r) == pytest.approx(1 + 3 * r / (2 * 576))
    assert step_floor(layer, tokens, "bat", r) == pytest.approx(1.5 * (1 + r / tokens))
    assert forward_floor(layer, tokens, "bone", r) == pytest.approx(1 + r / 576)
    assert forward_floor(layer, tokens, "bat", r) == pytest.approx(1 + r / tokens)
    assert forward_floor(layer, 1, "bat", r) == pytest.approx(2)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_computes_more_than_a_forward(method):
    layer = Linear(96, 64)
    assert step_macs(layer, 32, method, 8) > forward_macs(layer, 32, method, 8)


def test_bytes_kept_are_those_counted_by_hand():
    # 4 layers of 1024, 512 tokens, float32, the activations' 8 MiB included
    kept = {
        method: 8 + 4 * kept_bytes(Linear(1024, 1024), 512, method, 64, 4) / MIB
        for method in METHODS
    }
    assert kept == {"frozen": 8, "bone": 8.5, "bat": 16, "lora": 16.25}


@pytest.mark.parametrize("name", ["frozen", "bone", "bat", "peft_miss", "peft_lora", "loralib"])
def test_bytes_kept_on_paper_are_those_that_autograd_keeps(name):
    model, names = stack(3, 64, torch.device("cpu"))
    adapted = candidates.adapted_model(CANDIDATES[name], model, names, 16)
    x = torch.randn(32, 64, requires_grad=True)
    own = kept_bytes(Linear(64, 64), 32, CANDIDATES[name].method, 16, 4)
    assert measured_kept_bytes(adapted, lambda: adapted(x)) == 3 * (own + 32 * 64 * 4)


def test_sizes_of_the_language_models():
    norms = (2 * 30 + 1) * 576
    assert SMOLLM2_135M.weights + norms == 134_515_008
    assert [round(model.weights / 1e9, 1) for model in MODELS] == [6.7, 69.0]


def test_floor_of_a_whole_model_counts_head_and_attention():
    hidden, tokens = 576, 512
    linear, out = 30 * 3_538_944, 30 * 5184
    other = 2 * tokens * hidden * 49152 + 30 * 3 * tokens * tokens * hidden
    frozen = 2 * tokens * linear + other
    floor = decoder_step_floor(SMOLLM2_135M, 1, tokens, "bone", 64)
    assert floor == pytest.approx((frozen + 3 * tokens * 64 * out) / frozen)
    bat = decoder_step_floor(SMOLLM2_135M, 1, tokens, "bat", 64)
    assert bat == pytest.approx((frozen + (tokens + 3 * 64) * linear) / frozen)


BY_HAND = roofline.Rates(
    {"S D": 2, "dY D^T": 0.1, "S^T dY": 1, "W D": 1, "dY^T X": 0.5, "W^T G": 1}, cached=4, memory=2
)


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("frozen", []),
        # x and S; dX twice and dS; y twice, S and D; 16 multiply-adds at 0.1; dY, S and D
        ("bone", [80 / 4, 144 / 4, 112 / 4, 16 / 0.1, 80 / 4]),
        # W, W_eff and D, twice; 64 multiply-adds at 0.5; W, G and D; G and D
        ("bat", [288 / 4, 288 / 4, 64 / 0.5, 288 / 4, 160 / 4]),
        (roofline.FORMED, [80 / 4, 288 / 4, 288 / 4, 80 / 4]),
    ],
)
def test_a_roofline_is_that_counted_by_hand(method, parts):
    found = roofline.layer_seconds(Linear(8, 4), 2, method, 2, 4, BY_HAND)
    assert found == pytest.approx(sum(parts))


def test_a_pass_that_no_cache_holds_takes_the_rate_of_memory():
    inside, outside = (roofline.Term("a pass", roofline.CACHED_BYTES + more) for more in (0, 4))
    assert roofline.seconds([inside], BY_HAND) == roofline.CACHED_BYTES / 4
    assert roofline.seconds([outside], BY_HAND) == roofline.CACHED_BYTES / 2 + 2


EQUAL = roofline.Rates(dict.fromkeys(BY_HAND.products, 5.0), float("inf"), float("inf"))


@pytest.mark.parametrize("method", roofline.METHODS)
def test_without_bytes_the_roofline_counts_multiply_adds(method):
    layer, tokens, r = Linear(64, 48), 32, 8
    added = roofline.layer_seconds(layer, tokens, method, r, 4, EQUAL)
    base = 2 * tokens * layer.values / 5
    assert 1 + added / base == pytest.approx(step_floor(layer, tokens, method, r))
    model, rates = SMOLLM2_135M, dict.fromkeys(SMOLLM2_135M.linears, EQUAL)
    added = roofline.decoder_seconds(model, tokens, method, 64, 2, rates)
    frozen = sum(2 * tokens * layer.values for layer in model.linears)
    frozen += 2 * tokens * 576 * 49152 + 30 * 3 * tokens * tokens * 576
    floor = decoder_step_floor(model, 1, tokens, method, 64)
    assert 1 + added / (frozen / 5) == pytest.approx(floor)


def test_layers_that_read_one_input_share_its_shard_sum():
    rates = dict.fromkeys(SMOLLM2_135M.linears, BY_HAND)
    whole = roofline.decoder_seconds(SMOLLM2_135M, 4, "bone", 64, 4, rates)
    alone = sum(
        roofline.layer_seconds(layer, 4, "bone", 64, 4, BY_HAND) for layer in SMOLLM2_135M.linears
    )
    once = roofline.seconds(roofline.input_terms(576, 4, "bone", 64, 4), BY_HAND)
    assert alone - whole == pytest.approx(30 * 3 * once)  # k, v and up


@pytest.mark.parametrize("method", ["bone", "bat", roofline.FORMED])
def test_a_roofline_grows_with_r(method):
    found = [
        roofline.layer_seconds(Linear(64, 48), 32, method, r, 2, BY_HAND) for r in (2, 4, 8, 16)
    ]
    assert found == sorted(set(found))


def test_the_roofline_of_few_tokens_is_the_bytes_that_are_read():
    layer = Linear(2048, 2048)
    assert roofline.few_tokens_floor(layer, "frozen", 64) == 1
    assert {roofline.few_tokens_floor(layer, name, 64) for name in ("bone", "bat", "lora")} == {
        1 + 64 / 2048
    }


def test_predictions_of_a_whole_model():
    frozen, bone, bat, lora = (
        predict(MODELS[0], method, r=64, batch=1, length=1024) for method in METHODS
    )
    assert (frozen.trainable, frozen.kept_bytes, frozen.step_ratio) == (0, 0, 1)
    assert bone.trainable == pytest.approx(lora.trainable)
    assert bone.state_bytes == 16 * bone.trainable
    assert bone.kept_bytes == 2 * 1024 * 64 * 7 * 32  # S of seven projections in 32 layers
    assert bone.step_ratio == pytest.approx(lora.step_ratio)
    assert bat.step_ratio > lora.step_ratio


def test_lora_has_as_many_parameters_as_bone():
    assert lora_rank([(2048, 2048)], 64) == 32
    sizes = [(layer.in_features, layer.out_features) for layer in SMOLLM2_135M.linears]
    rank = lora_rank(sizes, 64)
    assert rank == 32  # of 32.6: the next smaller that kernels like
    assert lora_rank([(8, 8)], 1) == 1
    assert adapter_parameters(Linear(10, 9), "bat", 4) == 3 * 16
    assert adapter_parameters(Linear(10, 9), "lora", 4) == pytest.approx(36)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_candidate_builds_acts_and_has_equally_many_parameters(dtype):
    plain = nn.Linear(32, 32, bias=False, dtype=dtype).requires_grad_(False)
    x = torch.randn(8, 32, dtype=dtype)
    layers, left_out = build_layers(plain, x, 4, list(CANDIDATES.values()))
    assert left_out == {}
    assert list(layers) == list(CANDIDATES)
    for name, layer in layers.items():
        parameters = steps.trainable(layer)
        count = sum(parameter.numel() for parameter in parameters)
        assert {parameter.dtype for parameter in parameters} <= {dtype}
        # LoKr has a square of four values beside its factors.
        assert count == {BASE: 0, "lycoris_lokr": 132}.get(name, 128)


def test_a_package_that_is_missing_leaves_its_candidates_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(candidates.importlib.util, "find_spec", lambda name: None)
    plain = nn.Linear(32, 32, bias=False).requires_grad_(False)
    layers, left_out = build_layers(plain, torch.randn(8, 32), 4, list(CANDIDATES.values()))
    assert list(layers) == [BASE, "bone", "tile", "bat"]
    assert left_out["lycoris_lokr"] == "lycoris-lora is not installed"


def test_a_candidate_that_does_nothing_is_not_timed():
    plain = nn.Linear(32, 32, bias=False)
    nothing = dataclasses.replace(CANDIDATES["bone"], adapt=CANDIDATES[BASE].adapt)
    with pytest.raises(CandidateError, match="not that of base and adapter"):
        build_layers(plain, torch.randn(8, 32), 4, [nothing])
    training = dataclasses.replace(CANDIDATES["bone"], adapt=lambda *_: None)
    with pytest.raises(CandidateError, match="trains a parameter of the base"):
        build_layers(plain, torch.randn(8, 32), 4, [training])


def test_candidates_of_one_method_must_return_the_same():
    outputs = {"bone": torch.ones(3), "peft_miss": torch.ones(3), "bat": torch.zeros(3)}
    candidates.check_same_results(outputs, torch.float32)
    for dtype, wrong in ((torch.float32, 1.001), (torch.bfloat16, 1.1)):
        with pytest.raises(CandidateError, match="peft_miss and bone"):
            candidates.check_same_results({**outputs, "peft_miss": torch.full((3,), wrong)}, dtype)
    rounded = {**outputs, "peft_miss": torch.full((3,), 1.001)}
    candidates.check_same_results(rounded, torch.bfloat16)


def test_peak_counts_what_is_freed_again():
    def run():
        first = torch.ones(MIB)  # 4 MiB each
        second = first + 1
        del first
        return second * 2

    # and a few bytes for the scalars that are added and multiplied by
    assert 0 <= allocated_peak(run, torch.device("cpu")) - 8 * MIB < 1024


def test_resident_growth_sees_the_activations():
    assert fresh_growth("bone", layers=1, width=64, tokens=2**17) >= 32 * MIB


TINY = dataclasses.replace(
    QUICK,
    layer_steps=(LayerSize(32, 8, torch.float32),),
    layer_step_budget=Budget(0.0, 2, 2, 0),
    rates_budget=Budget(0.0, 1, 1, 0),
    few_tokens=(LayerSize(32, 1, torch.bfloat16),),
    few_tokens_budget=Budget(0.0, 2, 2, 0),
    model_steps=(ModelRun(torch.float32, batch=1, length=8, layers=1),),
    model_step_budget=Budget(0.0, 1, 1, 0),
    memory_width=64,
    memory_tokens=8,
    resident_candidates=(),
    many_layers=3,
    adapter_layers=(1, 2),
    start_up_budget=Budget(0.0, 1, 1, 0),
    routed_width=32,
    routed_budget=Budget(0.0, 1, 1, 0),
    loaded_adapters=3,
    switched_adapters=4,
    expert_models=(
        ExpertModel("Mixtral", 64, 16, 4, 2, 4, 8, "intermediate_size", "num_local_experts"),
    ),
    expert_budget=Budget(0.0, 1, 1, 0),
    finetune=dataclasses.replace(
        QUICK.finetune, length=8, accumulation=2, budget=Budget(0.0, 2, 2, 1)
    ),
    side_by_side=dataclasses.replace(QUICK.side_by_side, contestants=("disha", "peft_lora")),
    compiled_width=64,
    compiled_candidates=("frozen", "bone", "peft_lora"),
    compiled_layers=(LayerSize(32, 8, torch.float32),),
    compiled_models=(ModelRun(torch.float32, batch=1, length=8, layers=1),),
    compiled_budget=Budget(0.0, 2, 2, 0),
)
DEVICES = {
    "layout": "experts, grouped",
    "method": "bat",
    "facts": {**dict.fromkeys(FACTS, ""), "unsynchronised": "aten._to_copy", "routed": NOT_ASKED},
    "left_out": {},
}
RUN = {
    "what": "run",
    "title": "Bone",
    "flags": [],
    "steps": 60,
    "before": 3.8368,
    "after": 2.9142,
    "trainable": 9_953_280,
    "peak_memory_bytes": 2**31,
    "left_out": {},
}


@pytest.fixture(scope="module")
def loop():
    """The case that times the loop of `disha finetune`."""
    return finetuning.loop(TINY.finetune, torch.device("cpu"))


def tiny_model(dtype, device):
    sizes = {"vocabulary": 64, "hidden": 64, "feed_forward": 128, "layers": 2, "heads": 1}
    more = {"kv_heads": 1, "head_dim": 64, "context": 32, "rope_base": 1e4, "norm_epsilon": 1e-5}
    return Decoder(DecoderConfig(**sizes, **more, tied_head=True)).to(device, dtype)


def test_the_commands_measure_every_table_and_report_it(tmp_path, monkeypatch, capsys, loop):
    monkeypatch.setattr(command, "QUICK", TINY)
    monkeypatch.setattr(command, "slow_dtypes", lambda dtypes, device: {})
    monkeypatch.setattr(whole_model, "read_model", tiny_model)
    monkeypatch.setattr(compiled, "compile_model", lambda model: model)  # takes seconds
    monkeypatch.setattr(compiled, "COUNTED", (BASE, "bone"))
    measured = {**command.TABLES, "devices": lambda profile, device: [DEVICES]}
    monkeypatch.setattr(command, "TABLES", measured)
    monkeypatch.setattr(finetuning, "loop", lambda sizes, device: loop)
    monkeypatch.setattr(finetuning, "end_to_end", lambda title, flags, sizes: RUN)
    path, docs = tmp_path / "out" / "results.json", tmp_path / "docs"
    assert command.main(["--quick", "--device", "cpu", "--out", str(path)]) == 0
    found = results.read_results(path)
    assert list(found["tables"]) == list(command.TABLES)
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__

    contest, padding, loss = found["tables"]["side_by_side"]
    tokens = []
    for took in contest["contestants"].values():
        tokens.append(took["seconds_per_step"][0] * took["tokens_per_second"][0])
        assert min(took["first_step"]) > min(took["evaluation"]) > 0
        assert 0 < min(took["saving"]) < 5
        assert min(took["peak_bytes"]) > 1e8
    assert tokens[0] == pytest.approx(tokens[1], rel=1e-3)  # the same rows, in as many steps
    assert contest["trained"]["miss"] == contest["trained"]["lora"]
    assert roofline_floor("layer_step", found["tables"]["layer_step"][0], "bone") > 1
    rates = found["tables"]["model_step"][0]["rates"]["layers"]
    assert [(one["in"], one["out"]) for one in rates] == [(64, 64), (64, 128), (128, 64)]
    for parts in padding["parts"].values():
        assert parts["by length"] < min(parts["as they come"], 0.05)
    assert loss["peak_bytes"]["parts"] < loss["peak_bytes"]["whole"]

    assert report.main([str(path), "--docs", str(docs)]) == 0
    text = (docs / "performance.md").read_text()
    assert sorted(file.name for file in (docs / "assets").iterdir()) == [
        "compared.png", "few_tokens.png", "layer_step.png", "memory.png", "model_step.png",
    ]  # fmt: skip
    for line in ("| disha BAT |", "| PEFT MiSS |", "## Routed batches", "| 7B, Bone |",
                 "| second | 4 | ", "| *roofline BAT* |", "| the rest |", "| dY^T X |",
                 "| float32 | Trainer, PEFT LoRA | 1.000 | 1.000 |", "| evaluation | saving |",
                 "| Mixtral, 4 experts of 64 x 16, 8 tokens, grouped_mm |",
                 "| Bone | 60 | 3.837 | 2.914 | 9,953,280 | 2 GiB |"):  # fmt: skip
        assert line in text
    assert "tokens per second" not in text  # on a CPU ratios only
    assert "*Run 1.*" not in text  # there is one
    assert "targets met" in capsys.readouterr().out


def test_dtypes_that_the_device_cannot_compute_in_are_left_out_and_said_to_be(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(command, "QUICK", TINY)
    monkeypatch.setattr(command, "slow_dtypes", lambda dtypes, device: {dtypes[1]: 437.0})
    path = tmp_path / "results.json"
    tables = ["layer_step", "few_tokens"]
    assert command.main(["--quick", "--device", "cpu", "--out", str(path), "--only", *tables]) == 0
    found = results.read_results(path)
    assert {case["dtype"] for name in tables for case in found["tables"][name]} == {"float32"}
    assert "Without bfloat16" in page_of(found)
    assert "a product took 437 times as long as in float32" in page_of(found)


def test_only_a_dtype_that_is_far_slower_is_slow(monkeypatch):
    taken = {torch.float32: 1.0, torch.bfloat16: 400.0, torch.float16: 3.0}
    clock = Clock()
    product = torch.Tensor.__matmul__

    def timed(a, b):
        clock.now += taken[a.dtype]
        return product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", timed)
    found = slow_dtypes(tuple(taken), torch.device("cpu"), clock)
    assert found == {torch.bfloat16: 400.0}


def page_of(*found):
    """The page of some results, named by their processors."""
    return report.page({Path(f"{one['machine']['processor']}.json"): one for one in found})


def step_case(**seconds):
    size = {"width": 2048, "tokens": 1024, "dtype": "float32", "r": 64}
    return {**size, "seconds": seconds, "left_out": {}}


def rates_of(macs_per_second, width=2048):
    """The rates of a machine that computes every product equally fast, and copies at once."""
    products = dict.fromkeys(("x W^T", "dY W", *BY_HAND.products), macs_per_second)
    layers = [{"in": width, "out": width, "products": products}]
    return {"cached": 1e30, "memory": 1e30, "layers": layers}


def test_targets_are_met_missed_or_not_measured():
    case = step_case(
        frozen=[1.0, 2.0], bone=[1.08, 2.16], bat=[1.8, 3.6], peft_miss=[1.09, 2.18], loralib=[1, 2]
    )
    where = "2048 wide, 1,024 tokens, float32"
    floors = [f"{name} step / its roofline floor, {where}" for name in ("Bone", "BAT")]
    outcomes = {outcome.target.title: outcome for outcome in judge({"layer_step": [case]})}
    assert [outcomes[title].met for title in floors] == [None, None]  # without rates
    case["rates"] = rates_of(2 * 1024 * 2048 * 2048)  # at which the base takes a second
    outcomes = {outcome.target.title: outcome for outcome in judge({"layer_step": [case]})}
    assert [outcomes[title].met for title in floors] == [True, False]
    assert outcomes[floors[0]].figure.median == pytest.approx(1.08 / 1.046875)
    assert outcomes[f"Bone step / PEFT MiSS, {where}"].met is True
    assert outcomes[f"Bone step / loralib, {where}"].met is False
    assert outcomes[f"Bone step / PEFT LoRA, {where}"].met is None
    assert sum(outcome.met is None for outcome in outcomes.values()) == len(TARGETS) - 4


def test_the_whole_job_is_judged_against_each_script():
    took = {
        "disha": {"seconds_per_step": [1.0, 1.0], "peak_bytes": [7, 7]},
        "peft_miss": {"seconds_per_step": [1.0, 1.0], "peak_bytes": [9, 9]},
        "peft_lora": {"seconds_per_step": [2.0, 3.0], "peak_bytes": [10, 10]},
    }
    case = {"what": "contest", "model": "SmolLM2-135M", "dtype": "float32", "contestants": took}
    judged = {one.target.title: one for one in judge({"side_by_side": [case]})}
    start = "whole job:"
    assert judged[f"{start} step / Trainer, PEFT MiSS, float32"].met is False  # not faster
    assert judged[f"{start} step / Trainer, PEFT LoRA, float32"].met is True
    memory = judged[f"{start} peak memory / Trainer, PEFT LoRA, float32"]
    assert (memory.met, memory.figure.median) == (True, 0.7)
    assert judged[f"{start} step / Trainer, PEFT LoRA, bfloat16"].met is None


def test_faster_means_less_than_one():
    case = step_case(frozen=[1.0], bone=[1.1], peft_miss=[1.1])
    outcomes = {outcome.target.title: outcome for outcome in judge({"layer_step": [case]})}
    assert outcomes["Bone step / PEFT MiSS, 2048 wide, 1,024 tokens, float32"].met is False


def test_other_machines_are_listed_with_their_score():
    runs = []
    for name, seconds in (("here", 1.08), ("there", 1.04)):
        found = results.describe("full", torch.device("cpu"))
        found["machine"]["processor"] = name
        case = step_case(frozen=[1.0], bone=[seconds]) | {"pieces": {"S(x)": [0.01]}}
        case["rates"] = rates_of(2 * 1024 * 2048 * 2048)
        runs.append({**found, "tables": {"layer_step": [case]}})
    text = page_of(*runs)
    rest = len(TARGETS) - 1
    assert "| <= 1.080 | 1.032 | met |" in text
    assert "0.993" not in text
    assert f"1 target met, 0 missed, {rest} not measured</summary>" in text
    assert "- `there.json`: " in text
    assert f": 1 target met, 0 missed, {rest} not measured\n" in text


def test_a_table_is_of_the_first_file_that_has_it():
    first, second = (results.describe("full", torch.device("cpu")) for _ in range(2))
    first["machine"]["processor"], second["machine"]["processor"] = "first", "second"
    first["tables"] = {"layer_step": [step_case(frozen=[1.0], bone=[1.5])]}
    second["tables"] = {
        "layer_step": [step_case(frozen=[1.0], bone=[2.5])],
        "few_tokens": [step_case(frozen=[1.0], bone=[3.5])],
    }
    text = page_of(first, second)
    assert "| disha Bone | 1.500 |" in text
    assert "| disha Bone | 2.500 |" not in text
    assert "| disha Bone | 3.500 |" in text
    assert "linear layer\n\n*Run 1.* Forward" in text
    assert "tokens\n\n*Run 2.* Without" in text
    assert "## Other machines" not in text


def test_bone_below_the_frozen_base_is_explained():
    case = step_case(frozen=[1.0], bone=[1.1]) | {"tokens": 4}
    found = results.describe("full", torch.device("cpu"))
    for seconds, explained in ((1.1, False), (0.7, True)):
        case["seconds"]["bone"] = [seconds]
        text = page_of(found | {"tables": {"few_tokens": [case]}})
        assert (report.LESS_THAN_FROZEN in text) is explained


def test_the_page_is_what_the_kept_results_give(tmp_path):
    kept = sorted((ROOT / "benchmarks" / "results").glob("2*.json"), reverse=True)
    assert report.main([*map(str, kept), "--docs", str(tmp_path)]) == 0
    (written,) = tmp_path.glob("*.md")
    assert written.read_text() == (ROOT / "docs" / "performance.md").read_text()


def test_the_lines_on_top_say_what_the_files_say():
    """Each figure is computed again from the files, with NumPy."""
    tables = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("2*.json"), reverse=True):
        tables = {**json.loads(path.read_text())["tables"], **tables}
    text = (ROOT / "docs" / "performance.md").read_text().split("</div>")[0]

    def times(values, name, other="peft_lora"):
        ratios = np.array(values[name]) / np.array(values[other])
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        return f"{middle:.2f} ({low:.2f} to {high:.2f})"

    def counted(values, name):
        return f"{values[name] / values['peft_lora']:.2f}"

    def field(name):
        return {who: took[name] for who, took in job["contestants"].items()}

    job, layers, start = (tables[name][0] for name in ("side_by_side", "memory", "model_step"))
    experts = next(case for case in tables["experts"] if case["implementation"] == "grouped_mm")
    one = next(case for case in tables["few_tokens"] if case["tokens"] == 1)
    many = max(tables["routed"], key=lambda case: (case["adapters"], -case["tokens"]))
    (llama,) = (case for case in tables["start_up"] if "7B Llama" in case["what"])
    for name, said in {
        "Memory in training": [
            f"Whole job: Bone {times(field('peak_bytes'), 'disha')}",
            f"PEFT MiSS {times(field('peak_bytes'), 'peft_miss')}",
            f"by 4 layers: Bone {counted(layers['kept_bytes'], 'bone')}",
            f"BAT {counted(layers['kept_bytes'], 'bat')}",
        ],
        "Time of a training step": [
            f"Whole job: Bone {times(field('seconds_per_step'), 'disha')}",
            f"with Trainer's padding: Bone {times(field('seconds_per_step'), 'disha_padded')}",
            f"Model alone: Bone {times(start['seconds'], 'bone')}",
            f"BAT {times(start['seconds'], 'bat')}",
        ],
        f"{experts['model']}, {experts['experts']} experts": [
            f"Step: Bone {times(experts['seconds'], 'bone')}",
            f"Kept for backward: Bone {counted(experts['kept_bytes'], 'bone')}",
        ],
        "Serving unmerged": [
            f"one token: Bone {times(one['seconds'], 'bone')}",
            f"{many['adapters']} adapters: Bone "
            + times(many["seconds"], "bone_routed", "peft_lora_routed"),
        ],
        "Start": [f"7B Llama: Bone {times(llama['seconds'], 'bone')}"],
    }.items():
        (line,) = (line for line in text.splitlines() if line.startswith(f"- **{name}.**"))
        assert [part for part in said if part not in line] == []
    assert text.count("- **") == 5


def test_every_target_has_a_case_in_the_full_run():
    sizes = {("layer_step", size.width, size.tokens, size.dtype) for size in FULL.layer_steps} | {
        ("few_tokens", size.width, size.tokens, size.dtype) for size in FULL.few_tokens
    }
    runs = {(run.batch * run.length, run.dtype, run.layers) for run in FULL.model_steps}
    for target in TARGETS:
        where = target.where
        if target.table in ("layer_step", "few_tokens"):
            dtype = getattr(torch, where["dtype"])
            assert (target.table, where["width"], where["tokens"], dtype) in sizes
        elif target.table == "model_step":
            assert (where["tokens"], getattr(torch, where["dtype"]), where["layers"]) in runs
        elif target.table == "memory":
            assert where["width"] == FULL.memory_width
        elif target.table == "side_by_side":
            assert where["dtype"] in FULL.side_by_side.dtypes
        elif target.table == "routed":
            assert (where["adapters"], where["samples"]) in {
                (adapters, FULL.routed_samples) for adapters in FULL.routed_adapters
            }
            assert where["tokens"] // where["samples"] in FULL.routed_tokens
        elif target.table == "loaded":
            assert where["adapters"] == FULL.loaded_adapters
        else:
            assert target.table == "start_up"
            assert where["layers"] in (FULL.many_layers, 224)
    assert len({target.title for target in TARGETS}) == len(TARGETS)


def test_a_page_on_a_gpu_has_tokens_per_second():
    found = results.describe("full", torch.device("cpu")) | {"device": "a GPU"}
    case = step_case(frozen=[0.5], bone=[1.0])
    text = page_of(found | {"tables": {"layer_step": [case]}})
    assert "| frozen base | 2,048 |" in text
    assert "| disha Bone | 1,024 |" in text
    assert "| disha Bone | 2.000 |" in text


def test_results_are_rounded_and_read_back(tmp_path):
    path = tmp_path / "results.json"
    found = results.describe("full", torch.device("cpu"))
    found["tables"] = {"layer_step": [step_case(frozen=[0.123456, 2.0])]}
    results.write_results(path, found)
    assert results.read_results(path)["tables"]["layer_step"][0]["seconds"] == {
        "frozen": [0.1235, 2.0]
    }
    assert "[0.1235, 2.0]" in path.read_text()  # a list of numbers is one line
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"format": 99}), None])
def test_a_file_of_anything_else_is_refused(content, tmp_path, capsys):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(results.ResultsError, match=r"results\.json"):
        results.read_results(path)
    assert report.main([str(path), "--docs", str(tmp_path / "docs")]) == 2
    assert not (tmp_path / "docs").exists()
    assert "error:" in capsys.readouterr().err


# --- the fine-tuning command ---------------------------------------------------------------------


def test_the_loop_and_the_bare_step_are_timed_equally_often(loop):
    assert {name: len(times) for name, times in loop["seconds"].items()} == {"bare": 2, "loop": 2}
    assert all(time > 0 for times in loop["seconds"].values() for time in times)


def test_a_bare_step_updates_the_blocks_as_a_step_of_the_loop_does():
    # Otherwise the comparison would be unfair.
    cpu = torch.device("cpu")
    for make in (
        lambda: finetuning.bare_step(TINY.finetune, cpu),
        lambda: finetuning.loop_step(TINY.finetune, cpu, Metrics(None, None)),
    ):
        seen = []
        original = torch.optim.AdamW.step

        def stepping(self, *given, seen=seen, original=original, **named):
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            seen.append(sum(float(g.abs().sum()) for g in grads if g is not None))
            return original(self, *given, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", stepping)
            make()()
        assert len(seen) == 1
        assert seen[0] > 0


@pytest.mark.parametrize(("slower", "verdict"), [(1.02, "met"), (1.08, "**missed**")])
def test_the_page_says_whether_the_loop_keeps_its_limit(loop, slower, verdict):
    timed = {**loop, "seconds": {"bare": [1.0, 1.0], "loop": [slower, slower]}}
    found = results.describe("full", torch.device("cpu"))
    text = page_of(found | {"tables": {"finetuning": [timed, RUN]}})
    assert f"It takes **{slower:.3f}** times as long" in text
    assert f"The limit of 1.053 is {verdict}." in text


def test_every_way_of_training_has_lowered_the_loss():
    kept = sorted((ROOT / "benchmarks" / "results").glob("2*.json"), reverse=True)
    tables = (json.loads(path.read_text())["tables"] for path in kept)
    loop, *runs = next(one["finetuning"] for one in tables if "finetuning" in one)
    assert loop["what"] == "loop"
    assert [run["title"] for run in runs] == list(FINETUNE_RUNS)
    assert all(run["after"] < run["before"] for run in runs)
