"""The benchmarks: timing, the roofline, the checks before timing, the page."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import __main__ as command
from benchmarks import candidates, layers, many, passes, report, results, roofline, speed, steps
from benchmarks.candidates import BASE, CANDIDATES, EVERY_METHOD, lora_rank
from benchmarks.layers import Size, build_layers
from benchmarks.markdown import MARKED, fill
from benchmarks.memory import allocated_peak, kept_bytes, stack
from benchmarks.protocol import Budget, Spread, compare, paired_ratios
from benchmarks.roofline import SMOLLM2_LINEARS, Linear
from benchmarks.steps import CandidateError
from benchmarks.timers import ClockTimer

MIB = 2**20
ROOT = Path(__file__).parent.parent.parent


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
    seconds = compare(runs, Budget(1e9, most_rounds=20, warm_up=3), ClockTimer(clock))
    rounds = [clock.order[i : i + 4] for i in range(0, len(clock.order), 4)]
    assert len(rounds) == 23
    assert all(sorted(one) == list("abcd") for one in rounds)
    assert len({tuple(one) for one in rounds}) > 5
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abcd", 20)


def test_warm_up_is_left_out():
    clock = Clock()
    seconds = compare(
        {"a": clock.run("a", 9.0, 8.0, 1.0, 2.0)}, Budget(1e9, 2, 2, warm_up=2), ClockTimer(clock)
    )
    assert seconds == {"a": [1.0, 2.0]}


@pytest.mark.parametrize(("allowed", "rounds"), [(0.0, 3), (6.5, 6), (100.0, 8)])
def test_no_round_starts_after_the_budget_but_for_the_least(allowed, rounds):
    clock = Clock()
    budget = Budget(allowed, least_rounds=3, most_rounds=8, warm_up=1)
    assert len(compare({"a": clock.run("a", 1.0)}, budget, ClockTimer(clock))["a"]) == rounds


def test_the_device_is_waited_for_on_both_sides_of_a_run():
    clock = Clock()

    def wait():  # what was given to the device before takes its time now
        clock.order.append("wait")
        clock.now += 0.5

    budget = Budget(0.0, 1, 1, warm_up=0)
    seconds = compare({"a": clock.run("a", 1.0)}, budget, ClockTimer(clock, wait))
    assert clock.order == ["wait", "a", "wait"]
    assert seconds == {"a": [1.5]}


def test_ratios_are_taken_within_a_round():
    # The machine is ten times slower in the second round; the ratio is not.
    seconds = {"base": [1.0, 10.0, 1.0], "a": [2.0, 20.0, 3.0]}
    assert paired_ratios(seconds, "a", "base") == [2.0, 2.0, 3.0]
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


@pytest.mark.parametrize(
    ("name", "own"),
    [("frozen", 0), ("bone", 32 * 16), ("bat", 32 * 64), ("peft_miss", 32 * 16),
     ("peft_lora", 32 * (64 + 8)), ("loralib", 32 * (64 + 8))],
)  # fmt: skip
def test_bytes_kept_are_those_counted_by_hand(name, own):
    model, names = stack(3, 64, torch.device("cpu"))
    adapted = candidates.adapted_model(CANDIDATES[name], model, names, 16)
    x = torch.randn(32, 64, requires_grad=True)
    assert kept_bytes(adapted, lambda: adapted(x)) == 3 * 4 * (own + 32 * 64)


BY_HAND = {"S D": 2, "dY D^T": 0.1, "S^T dY": 1, "W D": 1, "dY^T X": 0.5, "W^T G": 1}


def case_of(width, tokens, r, products=BY_HAND, cached=4, **more):
    layers = [{"in": width, "out": width, "products": products}]
    rates = {"cached": cached, "memory": 2, "layers": layers}
    sizes = {"width": width, "tokens": tokens, "dtype": "float32", "r": r}
    return {**sizes, "rates": rates, "seconds": {BASE: [2.0, 1.0]}, **more}


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        # x and S; dX twice and dS; y twice, S and D; 32 multiply-adds at 0.1; dY, S and D
        ("bone", [80 / 4, 144 / 4, 208 / 4, 32 / 0.1, 144 / 4]),
        # W, W_eff and D, twice; 128 multiply-adds at 0.5; W, G and D; G and D
        ("bat", [576 / 4, 576 / 4, 128 / 0.5, 576 / 4, 320 / 4]),
    ],
)
def test_a_roofline_is_that_counted_by_hand(method, parts):
    assert roofline.floor("layer_step", case_of(8, 2, 2), method) == pytest.approx(1 + sum(parts))


def test_a_roofline_of_few_tokens_is_that_of_their_bytes():
    case = case_of(8, 2, 2)
    assert roofline.floor("few_tokens", {**case, "width": 2048, "r": 64}, "bone") == 1 + 64 / 2048


def test_layers_that_read_one_input_share_its_shard_sum():
    rates = [{"in": one.in_features, "out": one.out_features, "products": BY_HAND}
             for one in set(SMOLLM2_LINEARS)]  # fmt: skip
    model = {"layers": 30, "tokens": 4, "dtype": "float32", "r": 64, "seconds": {BASE: [1.0]},
             "rates": {"cached": 4, "memory": 2, "layers": rates}}  # fmt: skip
    whole = roofline.floor("model_step", model, "bone")
    terms = roofline._input_terms
    alone = 1 + sum(
        sum(max(t.bytes / 4, t.macs and t.macs / BY_HAND[t.product]) for t in both)
        for both in (
            (
                *terms(one.in_features, 4, "bone", 64, 4),
                *roofline._layer_terms(one, 4, "bone", 64, 4),
            )
            for one in SMOLLM2_LINEARS
        )
    )
    once = sum(term.bytes / 4 for term in terms(576, 4, "bone", 64, 4))
    assert alone - whole == pytest.approx(30 * 3 * once)  # k, v and up


def test_lora_has_as_many_parameters_as_bone():
    assert lora_rank([(2048, 2048)], 64) == 32
    assert lora_rank(SMOLLM2_LINEARS, 64) == 32  # of 32.6: the next that kernels like
    assert lora_rank([(8, 8)], 1) == 1
    assert Linear(10, 9).block("bat", 4) == 3 * 16
    assert Linear(10, 9).block("bone", 4) == 36


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_candidate_builds_acts_and_has_equally_many_parameters(dtype):
    plain = nn.Linear(32, 32, bias=False, dtype=dtype).requires_grad_(False)
    x = torch.randn(8, 32, dtype=dtype)
    built = build_layers(plain, x, 4, [CANDIDATES[name] for name in EVERY_METHOD])
    for name, layer in built.items():
        parameters = steps.trainable(layer)
        count = sum(parameter.numel() for parameter in parameters)
        assert {parameter.dtype for parameter in parameters} <= {dtype}
        # LoKr has a square of four values beside its factors.
        assert count == {BASE: 0, "lycoris_lokr": 132}.get(name, 128)


def test_a_candidate_that_does_nothing_is_not_timed():
    plain = nn.Linear(32, 32, bias=False)
    nothing = CANDIDATES["bone"]._replace(adapt=CANDIDATES[BASE].adapt)
    with pytest.raises(CandidateError, match="not that of base and adapter"):
        build_layers(plain, torch.randn(8, 32), 4, [nothing])
    training = CANDIDATES["bone"]._replace(adapt=lambda *_: None)
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


def test_a_run_is_written_and_becomes_tables(tmp_path, monkeypatch, capsys):
    for race in ("STEP", "FORWARD"):
        short = getattr(layers, race)._replace(budget=Budget(0.0, 2, 2, 0))
        monkeypatch.setattr(layers, race, short)
    monkeypatch.setattr(roofline, "BUDGET", Budget(0.0, 2, 2, 0))
    monkeypatch.setattr(layers, "STEPS", (Size(128, 8, torch.float32),))
    monkeypatch.setattr(layers, "FEW", (Size(128, 1, torch.float32),))
    path = tmp_path / "out" / "results.json"
    command.main(["--out", str(path), "--only", "layer_step", "few_tokens"])
    found = results.read_results(path)
    assert list(found["tables"]) == ["layer_step", "few_tokens"]
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__
    capsys.readouterr()
    report.main([str(path)])
    shown = capsys.readouterr().out
    for words in ("128 wide, 8 tokens, float32", "roofline MiSS", "| disha LoRA |"):
        assert words in shown
    speed.draw(speed.compared(found["tables"]), tmp_path / "compared.png")
    assert (tmp_path / "compared.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["groups", "loras"])
def test_a_race_of_few_candidates_becomes_a_table(tmp_path, monkeypatch, name):
    for sizes in ("WITH_GROUPS", "LORA_STEPS", "LORA_FEW"):
        monkeypatch.setattr(layers, sizes, (Size(128, 8, torch.float32),))
    race = name.upper()
    short = getattr(layers, race)._replace(budget=Budget(0.0, 2, 2, 0))
    monkeypatch.setattr(layers, race, short)
    monkeypatch.setattr(torch, "compile", lambda layer, **_: layer)  # it would take a minute
    path = tmp_path / "results.json"
    command.main(["--out", str(path), "--only", name])
    found = results.read_results(path)
    step, forward = sorted(found["tables"][name], key=lambda case: case["work"], reverse=True)
    assert (forward["work"], step["work"]) == ("forward", "step")
    sums = 8 * 64 * 4  # S(x) of MiSS, in bytes
    lora = 8 * (128 + 32) * 4
    assert step["kept_bytes"] == {
        "groups": {
            "frozen": 0, "bone": sums, "groups2": 2 * sums, "groups4": 2 * sums,
            "groups_all": 2 * sums, "bone_2r": 2 * sums, "peft_lora": lora,
        },
        "loras": {"frozen": 0, "bone": sums, "lora": lora, "peft_lora": lora, "loralib": lora},
    }[name]  # fmt: skip
    shown = speed.tables([found])
    assert "step, 128 wide" in shown[name]
    assert "| PEFT LoRA |" in shown[f"{name}_kept"]


def test_adapters_at_once_and_passes_become_tables(tmp_path, monkeypatch):
    short = Budget(0.0, 2, 2, 0)
    monkeypatch.setattr(many, "SIZES", ((2, 1),))
    monkeypatch.setattr(many, "BUDGET", short)
    monkeypatch.setattr(many, "WIDTH", 36)
    monkeypatch.setattr(passes, "STEPS", (Size(128, 8, torch.float32),))
    monkeypatch.setattr(passes, "BUDGET", short)
    path = tmp_path / "results.json"
    assert command.main(["--out", str(path), "--only", "many", "passes"]) == 0
    found = results.read_results(path)
    (case,) = found["tables"]["many"]
    kept = case["kept_bytes"]
    assert 1.9 < kept["bone_at_once"] / kept["peft_miss_one_by_one"] < 2.1  # two rows, one row
    shown = speed.tables([found])
    assert "2 adapters, 1 row each" in shown["many"]
    assert "2 adapters, 1 row each" in shown["many_memory"]
    assert "128 wide, 8 tokens, float32" in shown["passes"]
    assert "| dX += dS |" in shown["passes"]


def test_the_pages_are_what_the_kept_results_give(monkeypatch):
    monkeypatch.chdir(ROOT)
    tables = report.kept_tables()
    named = set()
    for page in report.PAGES:
        text = page.read_text(encoding="utf-8")
        assert fill(text, tables) == text, "python -m benchmarks.report"
        named.update(found[2] for found in MARKED.finditer(text))
    assert named == tables.keys()


def test_the_summary_says_what_the_files_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    tables = speed.newest(report.kept_runs())
    rows = {(row.line, row.label): row.ratios for row in speed.compared(tables)}
    memory = tables["memory"][0]["kept_bytes"]
    assert rows["Memory", "activations kept by 4 layers"]["bone"].median == pytest.approx(
        memory["bone"] / memory["peft_lora"]
    )
    step = next(case for case in tables["model_step"] if case["dtype"] == "float32")["seconds"]
    ratios = np.array(step["bat"]) / np.array(step["peft_lora"])
    found = rows["One training step", "SmolLM2-135M, float32"]["bat"]
    assert (found.low, found.median, found.high) == pytest.approx(
        tuple(np.quantile(ratios, [0.25, 0.5, 0.75]))
    )
    assert len(rows) == len(speed.COMPARED)


def test_a_table_is_of_the_first_file_that_has_it():
    older, newer = ({"tables": {"memory": [name], **more}} for name, more in
                    (("old", {"routed": ["old"]}), ("new", {})))  # fmt: skip
    assert speed.newest([newer, older]) == {"memory": ["new"], "routed": ["old"]}


def test_results_are_rounded_and_read_back(tmp_path):
    path = tmp_path / "results.json"
    found = results.describe(torch.device("cpu"))
    found["tables"] = {"layer_step": [{"seconds": {BASE: [0.123456, 2.0]}}]}
    results.write_results(path, found)
    assert results.read_results(path)["tables"]["layer_step"][0]["seconds"] == {
        "frozen": [0.1235, 2.0]
    }
    assert "[0.1235, 2.0]" in path.read_text()  # a list of numbers is one line
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_tables_on_one_trainer_divide_step_by_step():
    def took(seconds, peak):
        return {"title": "-", "seconds": seconds, "pass_bytes": peak}

    adapter = {"sft_bone": took([1.0, 3.0], 6), "sft_miss": took([1.0, 2.0], 8),
               "sft_lora": took([2.0, 6.0], 8)}  # fmt: skip
    told = speed.adapter([{"dtype": "float32", "contestants": adapter}])
    assert "| float32, SFTTrainer, disha MiSS | 0.500 | 0.750 |" in told
    job = {"trainer_lora": took([2.0, 2.0], 8), "trainer_miss": took([1.0, 3.0], 4),
           "trainer_bone": took([1.0, 1.0], 6), "learned_bone": took([1.0, 1.0], 4),
           "grouped_bone": took([0.2, 0.8], 2)}  # fmt: skip
    told = speed.job([{"contestants": job}])
    assert "| adapter | 0.500 | 0.750 |" in told
    assert "| rows by length | 0.500 | 0.500 |" in told
    assert "| all | 0.250 | 0.250 |" in told
