"""The study of convergence: equal terms, a sweep that goes on, a page made of its files."""

import copy
import json
import math
import re
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import report
from benchmarks.convergence import curves, tables
from benchmarks.convergence.findings import (
    LIMITS,
    Overall,
    Point,
    at_forgetting,
    longer,
    main_findings,
    points,
    ratios,
    with_groups,
)
from benchmarks.convergence.methods import (
    FULL,
    LARGEST_DIFFERENCE,
    METHODS,
    SHIRA,
    adapt,
    adapter_parameters,
    set_scale,
)
from benchmarks.convergence.runs import RESULTS, Cell, Run, best_rate, read_runs, write_run
from benchmarks.convergence.study import LONGER, main_cell, missing_runs
from benchmarks.convergence.tasks import EVERY_TASK, TASKS, packages
from benchmarks.convergence.tasks.digits import Digits, ViT
from benchmarks.convergence.training import train
from benchmarks.convergence.transfer import rate_of_lowest
from tests.language_models import llama

ROOT = Path(__file__).parent.parent.parent
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
HASHED = re.compile(r'(?<=["#])[mp][0-9a-f]{10}(?=["\)])')


class TinyDigits(Digits):
    """The digits, in a few steps from an untrained model."""

    steps, batch, evaluate_every = 6, 16, 3

    def pretrained(self) -> nn.Module:
        torch.manual_seed(0)
        return ViT()


@pytest.fixture
def tiny(monkeypatch):
    task = TinyDigits()
    monkeypatch.setitem(EVERY_TASK, "digits", task)
    return task


def sizes_of(task):
    """A model of the task's layer names and sizes, without its weights."""
    if task == "digits":
        return ViT()
    if task == "packages":
        from transformers import BertConfig, BertModel

        config = json.loads((packages._model_folder() / "config.json").read_text())
        return packages.Encoder(BertModel(BertConfig(**config), add_pooling_layer=False), 8)
    sizes = {"vocab_size": 64, "hidden_size": 576, "intermediate_size": 1536}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    return llama(num_hidden_layers=1, **sizes, **heads).eval()


def update(model, base, name):
    """What a layer computes with, from its outputs for unit vectors, minus the base weight."""
    layer, weight = model.get_submodule(name), base.get_submodule(name).weight
    units = torch.eye(weight.shape[1])
    with torch.no_grad():
        return (layer(units) - layer(torch.zeros_like(units[:1]))).T - weight


class TestMethods:
    @pytest.mark.parametrize("task", TASKS)
    def test_all_have_as_many_parameters_as_bone(self, task):
        model, counts = sizes_of(task).requires_grad_(False), {}
        for method in METHODS:
            twin = copy.deepcopy(model)
            names = adapt(
                twin, TASKS[task].layers["all"], TASKS[task].head, main_cell(task, method)
            )
            counts[method] = sum(p.numel() for p in adapter_parameters(twin, TASKS[task].head))
            assert len(names) >= 7  # those of one layer
        full = counts.pop(FULL)
        assert all(abs(n / counts["bone"] - 1) <= LARGEST_DIFFERENCE for n in counts.values())
        assert full > 5 * counts["bone"]

    @pytest.mark.parametrize("method", METHODS)
    def test_adapting_changes_no_output(self, method):
        model, images = ViT().requires_grad_(False), torch.rand(3, 8, 8)
        before = model(images)
        adapt(model, TASKS["digits"].layers["all"], None, main_cell("digits", method))
        torch.testing.assert_close(model(images), before, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("method", [name for name in METHODS if name != FULL])
    def test_a_scale_multiplies_the_update(self, method):
        torch.manual_seed(0)
        base = ViT().requires_grad_(False)
        model, name = copy.deepcopy(base), "blocks.1.up"
        adapt(model, TASKS["digits"].layers["all"], None, main_cell("digits", method))
        start = update(model, base, name)
        with torch.no_grad():
            for parameter in adapter_parameters(model, None):
                if parameter.dim() > 1 or method == SHIRA:  # not DoRA's magnitudes
                    parameter.add_(0.05 * torch.randn_like(parameter))
        whole = update(model, base, name)
        assert (whole - start).norm() > 0.1
        if method in ("pissa", "olora", "dora"):
            set_scale(model, 0.5)  # the base is changed, or the update is normalised
            assert (update(model, base, name) - whole).norm() > 0.1
        else:
            for scale in (0.0, 0.25):
                set_scale(model, scale)
                found = update(model, base, name)
                torch.testing.assert_close(found, scale * whole, atol=1e-5, rtol=1e-4)
        set_scale(model, 1.0)
        torch.testing.assert_close(update(model, base, name), whole)


class TestTasks:
    def test_rows_are_held_out(self):
        rows = TASKS["arithmetic"].rows
        parts = [{tuple(ids) for ids, _ in part} for part in rows]
        assert all(len(part) >= 24 for part in parts)
        assert len(set.union(*parts)) == sum(map(len, parts))
        assert all(0 < prompt < len(ids) for part in rows for ids, prompt in part)

    def test_the_loss_of_a_batch_is_that_of_its_answers(self):
        torch.manual_seed(0)
        model, task = sizes_of("arithmetic"), TASKS["arithmetic"]
        rows = [([3, 5, 9, 2, 6], 3), ([7, 1, 4], 1)]
        logs = [model(torch.tensor([ids])).logits.log_softmax(-1)[0] for ids, _ in rows]
        answered = [-logs[0][2, 2], -logs[0][3, 6], -logs[1][0, 1], -logs[1][1, 4]]
        expected = torch.stack(answered).mean()
        torch.testing.assert_close(task.loss(model, task.batch_of(rows)), expected)
        assert task.score(model, rows) == pytest.approx(float(expected.detach()), rel=1e-5)


class TestTraining:
    def test_a_run_is_the_same_again_and_another_with_another_seed(self, tiny):
        run = Run(Cell("digits", "lora", 8), 1e-2, 0)
        found, again = train(run), train(run)
        other = train(replace(run, seed=1))
        assert found.pop("seconds") > 0
        assert found == {key: value for key, value in again.items() if key != "seconds"}
        assert other["validation"][1:] != found["validation"][1:]
        assert found["steps"] == [0, 3, 6]
        assert found["validation"][-1] < found["validation"][0]
        assert found["forgetting"][0] == other["forgetting"][0] != found["forgetting"][1]

    def test_methods_of_one_seed_see_the_same_rows_and_begin_alike(self, tiny):
        seen, batch_of = {}, tiny.batch_of
        for method in ("bone", "lora"):
            rows = []
            tiny.batch_of = lambda some, kept=rows: kept.append(batch_of(some)) or kept[-1]
            found = train(Run(main_cell("digits", method), 1e-3, 2))
            seen[method] = (torch.cat([labels for _, labels in rows]), found["validation"][0])
        assert torch.equal(seen["bone"][0], seen["lora"][0])
        assert seen["bone"][1] == seen["lora"][1]


CELL = Cell("digits", "bone", 8)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def results_of(losses, seed=0):
    """Results as runs leave them, of final validation losses by rate."""
    return {Run(CELL, rate, seed): {"validation": [9.0, loss]} for rate, loss in losses.items()}


class TestSearch:
    def test_all_rates_first_then_the_other_seeds_at_the_best(self):
        assert [run.rate for run in missing_runs(CELL, RATES, 3, True, {})] == [*RATES]
        results = results_of({1e-3: 2.0, 3e-3: 1.0, 1e-2: 1.5})
        assert missing_runs(CELL, RATES, 3, True, results) == [Run(CELL, 3e-2, 0)]
        results |= results_of({3e-2: None})
        assert missing_runs(CELL, RATES, 3, True, results) == [
            Run(CELL, 3e-3, 1), Run(CELL, 3e-3, 2)
        ]  # fmt: skip
        assert best_rate(CELL, results) == 3e-3
        results |= results_of({3e-3: 1.1}, 1) | results_of({3e-3: 1.2}, 2)
        assert missing_runs(CELL, RATES, 3, True, results) == []

    @pytest.mark.parametrize(("losses", "rate"), [((1.0, 2.0, 3.0, 4.0), 3e-4),
                                                  ((4.0, 3.0, 2.0, 1.0), 1e-1)])  # fmt: skip
    def test_a_search_goes_on_beyond_the_edge(self, losses, rate):
        results = results_of(dict(zip(RATES, losses, strict=True)))
        assert missing_runs(CELL, RATES, 3, True, results) == [Run(CELL, rate, 0)]

    def test_rates_that_are_given_are_all(self):
        results = results_of({1e-3: 1.0})
        assert missing_runs(CELL, (1e-3,), 2, False, results) == [Run(CELL, 1e-3, 1)]


class TestRuns:
    def test_the_kept_file_is_what_would_be_written(self, tmp_path):
        file = tmp_path / "runs.jsonl"
        shutil.copy(RESULTS, file)
        run, found = next(iter(read_runs(file).items()))
        write_run(file, run, found)
        assert file.read_bytes() == RESULTS.read_bytes()


class TestFindings:
    @pytest.mark.parametrize(
        ("limit", "loss"), [(1.0, 3.0), (1.25, 2.5), (2.0, 1.0), (0.5, math.inf)]
    )
    def test_loss_at_equal_forgetting_is_read_off_the_curve(self, limit, loss):
        # For 1.25, the end of the curve would forget less than its middle.
        last = Point(1.0, 1.0, 1.9 if limit == 1.25 else 1.2)
        curve = [Point(0.0, 3.0, 1.0), Point(0.5, 2.0, 1.5), last]
        assert at_forgetting(curve, limit) == pytest.approx(loss)


@pytest.mark.parametrize(
    ("losses", "rate"),
    [
        ({1e-3: 2.0, 1e-2: 1.0, 1e-1: 2.0}, 1e-2),
        ({1e-3: 1.2, 1e-2: 1.0, 1e-1: 1.4}, 10 ** (-2 - 1 / 6)),
        ({1e-3: 1.0, 1e-2: 1.5}, None),
    ],
)
def test_the_best_rate_is_the_lowest_point_of_a_parabola(losses, rate):
    assert rate_of_lowest(losses) == (None if rate is None else pytest.approx(rate))


def assert_same_picture(found, expected):
    """Two SVGs are alike; the last of six decimals may be rounded otherwise on this processor.

    The names of markers and clip paths are hashes, also of what is rounded.
    """
    found, expected = (HASHED.sub("", svg) for svg in (found, expected))
    assert NUMBER.sub("#", found) == NUMBER.sub("#", expected)
    numbers = [[float(number) for number in NUMBER.findall(svg)] for svg in (found, expected)]
    found, expected = torch.tensor(numbers, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1.5e-6)


KEPT = read_runs(RESULTS)


class TestReport:
    """The pages follow from the results that are committed."""

    def test_the_pictures_are_what_the_results_give(self):
        import matplotlib as mpl

        for name, picture in curves.drawn(KEPT).items():
            committed = (ROOT / report.PICTURES / f"evidence-{name}.svg").read_text()
            if f"Matplotlib v{mpl.__version__}" not in committed:
                continue  # by another release of matplotlib, which draws text its own way
            assert_same_picture(picture.decode(), committed)

    def test_every_kept_run_is_of_the_study(self):
        cells = {run.cell for run in KEPT}
        assert {cell.task for cell in cells} == set(TASKS)
        assert {cell.method for cell in cells} == set(METHODS)

    def test_the_verdict_says_what_the_files_say(self):
        found = main_findings(KEPT)
        rows = {row.split(" | ")[0]: row for row in tables.verdict(found).splitlines()}
        for what, key in (("test loss", "loss"), ("loss on what the base could do", "forgetting")):
            by_hand = [one["bone"].mean(key) / one["lora"].mean(key) for one in found.values()]
            assert list(ratios(found, "bone", what).values()) == by_hand
            assert f"| {what} | {Overall.of(by_hand)} |" in rows[f"| {what}"]
            assert not Overall.of(by_hand).clear  # the page says so

    def test_another_result_gives_another_table(self):
        changed = {
            run: {**record, "loss": 0.5 * record["loss"]}
            if run.cell.method == "bone" and record.get("loss")
            else record
            for run, record in KEPT.items()
        }
        before, after = (longer(results) for results in (KEPT, changed))
        shown = tables.verdict(main_findings(changed))
        assert "| test loss | **0.50" in shown
        assert "| lower, higher in single tasks | 5, 0 |" in shown
        assert after.own["bone"].mean("loss") == before.own["bone"].mean("loss") / 2

    def test_the_advice_on_rates_follows_from_the_kept_runs(self):
        long = longer(KEPT)
        for limit in LIMITS:  # all but SHiRA are alike at equal forgetting
            lowest = [long.at(name, limit)[0] for name in LONGER if name != SHIRA]
            assert max(lowest) - min(lowest) < 0.03
            assert long.at(SHIRA, limit)[0] < min(lowest)
        for third, rate in ((1e-4, 3e-4), (3e-4, 1e-3), (1e-3, 3e-3)):  # as good as LoRA there ...
            pairs = list(zip(long.ends("bone", third), long.ends("lora", rate), strict=False))
            assert statistics.fmean(one.loss - other.loss for one, other in pairs) < 0
            rises = [one.forgetting - other.forgetting for one, other in pairs]
            assert abs(statistics.fmean(rises)) < 0.05
        for rate in (1e-4, 3e-4, 1e-3):  # ... and at the same rate, more forgetting
            pairs = zip(long.ends("bone", rate), long.ends("lora", rate), strict=False)
            assert all(one.forgetting > other.forgetting for one, other in pairs)
        mild, own = 3e-4, long.own["bone"].rate
        pairs = zip(long.ends("bone", mild), long.ends("bone", own), strict=False)
        assert all(low.loss < high.loss and 2 * low.forgetting < high.forgetting
                   for low, high in pairs)  # fmt: skip
        # Scaling beats a lower rate.
        for name, low, high in (("bone", 1e-4, mild), ("lora", 3e-4, 1e-3)):
            end, curve = long.ends(name, low)[0], points(long.records[name][high][0])
            assert at_forgetting(curve, end.forgetting) < end.loss - 0.01
        found = main_findings(KEPT)
        for task in ("arithmetic", "docstrings"):  # with r = 16, a tenth is best
            own = found[task]
            assert (own["bone"].rate, own["lora"].rate) == (mild, 3e-3)
        text = (ROOT / "docs/evidence.md").read_text()
        assert f"rate](choosing.md#learning-rate): {mild:g} for the language model" in text

    def test_a_table_says_where_it_has_every_seed(self):
        shira, lora = (main_cell("documentation", name) for name in (SHIRA, "lora"))
        less = {run: one for run, one in KEPT.items() if run.cell != shira}
        rates = TASKS["documentation"].rates
        more = less | {Run(shira, rate, 0): KEPT[Run(lora, rate, 0)] for rate in rates}
        assert "SHiRA" not in tables.losses_at_rates(longer(less))
        shown = tables.losses_at_rates(longer(more)).splitlines()
        rows = {row.split(" |")[0]: row for row in shown}
        assert "2.539 +0.23 \\*" in rows["| LoRA"]  # all seeds
        assert "2.540 +0.23 |" in rows["| SHiRA"]

    def test_the_advice_on_a_lora_rate_follows_from_the_kept_runs(self):
        found = main_findings(KEPT)
        widths = {"digits": 64, "packages": 384}
        times = []
        for task, one in found.items():
            rank = alpha = TASKS[task].r / 2  # of a LoRA with as many parameters in a square layer
            factor = alpha / math.sqrt(3 * rank * widths.get(task, 576))
            times.append(one["bone"].rate / one["lora"].rate / factor)
        told = f"{min(times):.1f} to {max(times):.1f} times"
        evidence, choosing = (
            " ".join((ROOT / name).read_text().split())
            for name in ("benchmarks/results/learning.md", "docs/choosing.md")
        )
        assert f"rate of MiSS was {told} the product" in evidence
        assert f"The best rates here were [{told} this product]" in choosing

    def test_pairs_are_of_equal_seeds(self):
        groups = with_groups(KEPT)
        rows = tables.paired(groups, KEPT).splitlines()
        (row,) = (row for row in rows if row.startswith("| MiSS, n groups - MiSS |"))
        cells = row.strip("| ").split(" | ")[1:]
        for cell, (task, found) in zip(cells, groups.items(), strict=True):
            gaps = []
            for seed in range(8):
                mine = KEPT.get(Run(main_cell(task, "groups_all"), found["groups_all"].rate, seed))
                ours = KEPT.get(Run(main_cell(task, "bone"), found["bone"].rate, seed))
                if mine and ours:
                    gaps.append(mine["loss"] - ours["loss"])
            assert len(gaps) >= 3
            assert float(cell.split()[0]) == pytest.approx(sum(gaps) / len(gaps), abs=6e-4)
