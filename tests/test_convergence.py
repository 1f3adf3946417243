"""The study of convergence: equal terms, a sweep that goes on, a page made of its files."""

import ast
import copy
import json
import math
import random
import re
import shutil
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.convergence import __main__ as command
from benchmarks.convergence import costs, curves, longer, report
from benchmarks.convergence.findings import Costs, Mean, differ, finding, task_findings
from benchmarks.convergence.methods import (
    FULL,
    IDENTITY,
    LARGEST_DIFFERENCE,
    METHODS,
    adapt,
    adapter_parameters,
    ranks,
    set_scale,
    updates,
)
from benchmarks.convergence.plan import (
    GRID,
    LONG,
    LONGER,
    MOST_EXTENSIONS,
    RATES,
    STUDY,
    Study,
    best_rate,
    compared,
    main_cell,
    runs_left,
    wanted,
)
from benchmarks.convergence.runs import RESULTS, Cell, Run, read_runs, write_run
from benchmarks.convergence.sweep import sweep, time_left
from benchmarks.convergence.tasks import TASKS, arithmetic, docstrings, documentation, packages
from benchmarks.convergence.tasks.digits import Digits, ViT
from benchmarks.convergence.tasks.language import LanguageTask
from benchmarks.convergence.tasks.prose import passages
from benchmarks.convergence.tasks.task import batch_order
from benchmarks.convergence.training import cosine, effective_rank, train
from benchmarks.convergence.verdict import verdict
from benchmarks.protocol import Budget
from disha.finetune.models.decoder import Decoder, DecoderConfig

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class TinyDigits(Digits):
    """The digits, in a few steps from an untrained model."""

    steps, batch, evaluate_every = 6, 16, 3

    def pretrained(self) -> nn.Module:
        torch.manual_seed(0)
        return ViT()


@pytest.fixture
def tiny(monkeypatch):
    task = TinyDigits()
    monkeypatch.setitem(TASKS, "digits", task)
    return task


def sizes_of(task):
    """A model of the task's layer names and sizes, without its weights."""
    if task == "digits":
        return ViT()
    if task == "packages":
        from transformers import BertConfig, BertModel

        config = json.loads((packages._model_folder() / "config.json").read_text())
        return packages.Encoder(BertModel(BertConfig(**config), add_pooling_layer=False), 8)
    return Decoder(
        DecoderConfig(
            vocabulary=64, hidden=576, feed_forward=1536, layers=2, heads=9, kv_heads=3,
            head_dim=64, context=64, rope_base=1e4, norm_epsilon=1e-5, tied_head=True,
        )
    )  # fmt: skip


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
            assert len(names) > 10
        full = counts.pop(FULL)
        assert all(abs(n / counts["bone"] - 1) <= LARGEST_DIFFERENCE for n in counts.values())
        assert full > 5 * counts["bone"]

    @pytest.mark.parametrize("cell", [c for c in STUDY.cells if c.task == "digits"], ids=str)
    def test_every_cell_of_the_digits_can_be_built(self, cell):
        model = ViT().requires_grad_(False)
        adapt(model, TASKS["digits"].layers[cell.layers], None, cell)
        dtype = getattr(torch, cell.dtype)
        assert {p.dtype for p in adapter_parameters(model, None)} == {dtype}

    @pytest.mark.parametrize("method", METHODS)
    def test_adapting_changes_no_output(self, method):
        model, images = ViT().requires_grad_(False), torch.rand(3, 8, 8)
        before = model(images)
        adapt(model, TASKS["digits"].layers["all"], None, main_cell("digits", method))
        torch.testing.assert_close(model(images), before, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("method", METHODS)
    def test_the_update_is_what_is_added_to_the_weight(self, method):
        torch.manual_seed(0)
        base = ViT().requires_grad_(False)
        model, name = copy.deepcopy(base), "blocks.1.up"
        adapt(model, TASKS["digits"].layers["all"], None, main_cell("digits", method))
        nothing = updates(model, base, [name])[name]
        assert nothing.shape == base.blocks[1].up.weight.shape
        torch.testing.assert_close(nothing, torch.zeros_like(nothing), atol=1e-5, rtol=0)
        with torch.no_grad():
            for parameter in adapter_parameters(model, None):
                parameter.add_(0.05 * torch.randn_like(parameter))
        found, x = updates(model, base, [name])[name], torch.randn(5, 64)
        expected = nn.functional.linear(x, base.blocks[1].up.weight + found, base.blocks[1].up.bias)
        torch.testing.assert_close(model.blocks[1].up(x), expected, atol=1e-4, rtol=1e-4)
        assert found.norm() > 0.1

    @pytest.mark.parametrize("method", [name for name in METHODS if name != FULL])
    def test_a_scale_multiplies_the_update(self, method):
        torch.manual_seed(0)
        base = ViT().requires_grad_(False)
        model, name = copy.deepcopy(base), "blocks.1.up"
        adapt(model, TASKS["digits"].layers["all"], None, main_cell("digits", method))
        start = updates(model, base, [name])[name]
        with torch.no_grad():
            for parameter in adapter_parameters(model, None):
                if parameter.dim() > 1:  # not DoRA's magnitudes, which act at every scale
                    parameter.add_(0.05 * torch.randn_like(parameter))
        whole = updates(model, base, [name])[name]
        assert (whole - start).norm() > 0.1
        if method in ("pissa", "olora", "dora"):
            set_scale(model, 0.5)  # the base is changed, or the update is normalised
            assert (updates(model, base, [name])[name] - whole).norm() > 0.1
        else:
            for scale in (0.0, 0.25):
                set_scale(model, scale)
                found = updates(model, base, [name])[name]
                torch.testing.assert_close(found, scale * whole, atol=1e-5, rtol=1e-4)
        set_scale(model, 1.0)
        torch.testing.assert_close(updates(model, base, [name])[name], whole)

    def test_lora_from_identity_begins_with_the_gradient_of_bone(self):
        torch.manual_seed(0)
        base, x = nn.Sequential(nn.Linear(12, 12)).requires_grad_(False), torch.randn(5, 12)
        gradients = []
        for method, r in (("bone", 4), (IDENTITY, 8)):  # rank 4 costs as much as Bone's r = 8
            model = copy.deepcopy(base)
            adapt(model, "0", None, Cell("digits", method, r))
            model(x).square().sum().backward()
            gradients.append([p.grad for p in adapter_parameters(model, None)])
        (bone,), (of_a, of_b) = gradients
        torch.testing.assert_close(of_b.T, bone)
        assert of_a.shape == (4, 12)
        assert not of_a.any()

    def test_a_count_that_is_off_is_refused(self, monkeypatch):
        bone = METHODS["bone"]

        def larger(model, layers, cell):
            bone.adapt(model, layers, replace(cell, r=cell.r + 1))

        monkeypatch.setitem(METHODS, "bone", replace(bone, adapt=larger))
        with pytest.raises(ValueError, match="parameters where Bone has"):
            adapt(ViT().requires_grad_(False), r"\.up$", None, Cell("digits", "bone", 8))

    def test_ranks_are_as_even_as_the_number_allows(self):
        layers = {str(i): nn.Linear(10, 10) for i in range(5)}
        assert ranks(layers, 20 * 12) == {"0": 3, "1": 3, "2": 2, "3": 2, "4": 2}
        assert ranks(layers, 40 * 10, factors=2) == dict.fromkeys(layers, 2)
        assert ranks(layers, 20 * 10 + 50, beside=True) == dict.fromkeys(layers, 2)


class Tokens(documentation.Documentation):
    """The longer task without its rows."""


def replace_end(token):
    """A tokenizer that only knows the token of the end."""
    return type("Tokenizer", (), {"end": token})()


class TestTasks:
    def test_an_order_has_every_row_once_before_any_comes_again(self):
        order = batch_order(rows=10, batch=5, steps=4, seed=1)
        assert sorted(order[0] + order[1]) == sorted(order[2] + order[3]) == list(range(10))
        assert order == batch_order(10, 5, 4, seed=1) != batch_order(10, 5, 4, seed=2)

    def test_word_problems_have_the_right_answer(self):
        generator, kinds = random.Random(1), set()
        for _ in range(300):
            problem, answer = arithmetic.word_problem(generator)
            a, b = map(int, re.findall(r"\d+", problem))
            verb = problem.split()[3 if " bags " in problem else 5]
            kinds.add(verb)
            expected = {"bags": a * b, "gets": a + b, "loses": a - b}[verb]
            assert (int(answer), int(answer) >= 0) == (expected, True)
        assert kinds == {"bags", "gets", "loses"}

    @pytest.mark.parametrize("module", [arithmetic, docstrings, documentation], ids=str)
    def test_rows_are_held_out(self, module, monkeypatch):
        if module is documentation:  # one package, so that it takes no time
            monkeypatch.setattr(module, "PACKAGES", ("numpy",))
            monkeypatch.setattr(module, "TRAINING_ROWS", 100)
            monkeypatch.setattr(module, "_rows", module._rows.__wrapped__)
        parts = [{tuple(ids) for ids, _ in part} for part in module._rows()]
        assert all(len(part) >= 24 for part in parts)
        assert len(set.union(*parts)) == sum(map(len, parts))
        assert all(0 < prompt < len(ids) for part in module._rows() for ids, prompt in part)

    def test_packages_are_held_out_and_even(self):
        rows = packages._rows()
        assert len({tuple(ids) for ids, _ in rows}) > 0.98 * len(rows)
        assert {label for _, label in rows} == set(range(packages.CLASSES))
        held_out = packages.VALIDATION_ROWS + packages.TEST_ROWS
        assert len(TASKS["packages"].training_rows()) == len(rows) - held_out > 300
        for part in (rows[:held_out], rows[held_out:]):
            counts = Counter(label for _, label in part)
            assert min(counts[label] for label in range(packages.CLASSES)) > 0.5 * max(
                counts.values()
            )

    def test_prose_is_of_many_topics(self):
        found = passages(24, 240)
        assert len(set(found)) == 24
        assert all(120 < len(text) <= 240 for text in found)
        with pytest.raises(ValueError, match="passages, not"):
            passages(10_000, 240)

    def test_exact_answers_are_those_of_greedy_decoding(self):
        torch.manual_seed(0)
        model = sizes_of("arithmetic")
        right, _ = rows = [([3, 5, 9], 3), ([7, 1, 4, 4], 4)]
        for ids, prompt in rows:
            while len(ids) < prompt + 3:
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        task = TASKS["arithmetic"]
        assert isinstance(task, LanguageTask)
        assert task._score(model, rows).exact == 1
        right[0][-2] = (right[0][-2] + 1) % 64
        assert task._score(model, rows).exact == 0.5
        tokens = Tokens()._score(model, rows)
        assert 0 < tokens.exact < 1
        assert tokens.exact * 6 == pytest.approx(round(tokens.exact * 6))

    def test_text_of_the_base_is_drawn_from_its_probabilities(self, monkeypatch):
        torch.manual_seed(0)
        monkeypatch.setattr(documentation, "OWN_TEXTS", 200)
        monkeypatch.setattr(documentation, "LONGEST", 2)
        monkeypatch.setattr(documentation, "demo_tokenizer", lambda: replace_end(3))
        model = sizes_of("arithmetic").eval()
        model.lm_head.weight.data *= 20
        task = Tokens()
        task.base = lambda: model
        texts = documentation.own_text.__wrapped__(task)
        assert {len(text) for text in texts} == {3}
        assert {text[0] for text in texts} == {3}
        with torch.no_grad():
            chances = model(torch.tensor([[3]]))[0, -1].softmax(-1)
        expected = [int(chances.argmax()), round(200 * float(chances.max()))]
        ((likely, count),) = Counter(text[1] for text in texts).most_common(1)
        assert likely == expected[0]
        assert abs(count - expected[1]) < 25
        assert task.forgotten(model, model)[0] == task.forgotten(model, model)[1]

    def test_products_are_computed_in_the_precision_of_the_task(self):
        model, rows = sizes_of("arithmetic"), [([3, 5, 9, 2, 6], 3), ([7, 1, 4], 1)]
        batch = Tokens().batch_of(rows, CPU)
        seen = []
        hook = model.model.register_forward_pre_hook(
            lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
        )
        losses = [task.loss(model, batch) for task in (TASKS["arithmetic"], Tokens())]
        hook.remove()
        assert seen == [False, True]
        assert losses[1].dtype == torch.float32
        torch.testing.assert_close(*losses, atol=0.05, rtol=0.01)
        assert losses[0] != losses[1]

    def test_the_loss_of_a_batch_is_that_of_its_answers(self):
        torch.manual_seed(0)
        model, task = sizes_of("arithmetic"), TASKS["arithmetic"]
        rows = [([3, 5, 9, 2, 6], 3), ([7, 1, 4], 1)]
        logs = [model(torch.tensor([ids])).log_softmax(-1)[0] for ids, _ in rows]
        answered = [-logs[0][2, 2], -logs[0][3, 6], -logs[1][0, 1], -logs[1][1, 4]]
        expected = torch.stack(answered).mean()
        torch.testing.assert_close(task.loss(model, task.batch_of(rows, CPU)), expected)
        assert task._score(model, rows).loss == pytest.approx(float(expected.detach()), rel=1e-5)


class TestTraining:
    def test_the_schedule_rises_and_falls_to_nothing(self):
        shares = [cosine(step, 100) for step in range(100)]
        assert shares[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
        assert shares[6] == 1
        assert shares[6:] == sorted(shares[6:], reverse=True)
        assert cosine(100, 100) == pytest.approx(0)

    def test_effective_rank(self):
        assert effective_rank(torch.zeros(4, 3)) == 0
        assert effective_rank(torch.outer(torch.rand(6), torch.rand(5))) == pytest.approx(1)
        assert effective_rank(3 * torch.eye(5)) == pytest.approx(5)
        assert 1 < effective_rank(torch.diag(torch.tensor([1.0, 0.1]))) < 2

    def test_a_run_is_the_same_again_and_another_with_another_seed(self, tiny):
        run = Run(Cell("digits", "lora", 8), 1e-2, 0)
        found, again = train(run, CPU, tiny), train(run, CPU, tiny)
        other = train(replace(run, seed=1), CPU, tiny)
        assert found.pop("seconds") > 0
        assert found == {key: value for key, value in again.items() if key != "seconds"}
        assert other["validation"][1:] != found["validation"][1:]
        assert found["steps"] == [0, 3, 6]
        assert found["validation"][-1] < found["validation"][0]
        assert len(found["gradient_norms"]) == 6
        assert found["forgetting"][0] == other["forgetting"][0] != found["forgetting"][1]

    def test_methods_of_one_seed_see_the_same_rows_and_begin_alike(self, tiny):
        seen = {}
        for method in ("bone", "lora"):
            rows = []
            task = TinyDigits()
            batch_of = task.batch_of
            task.batch_of = lambda some, device, kept=rows, make=batch_of: kept.append(
                make(some, device)) or make(some, device)  # fmt: skip
            found = train(Run(main_cell("digits", method), 1e-3, 2), CPU, task)
            seen[method] = (torch.cat([labels for _, labels in rows]), found["validation"][0])
        assert torch.equal(seen["bone"][0], seen["lora"][0])
        assert seen["bone"][1] == seen["lora"][1]

    def test_the_scale_draws_a_curve_from_the_base_to_the_trained(self, tiny):
        tiny.scales = (0.0, 0.5, 1.0)
        found = train(Run(Cell("digits", "lora", 8), 1e-2, 0), CPU, tiny)
        base = tiny.base()
        (_, *at_zero), (middle, *_), (_, *at_one) = found["scales"]
        assert at_zero == pytest.approx([tiny.test(base).loss, found["forgetting"][0]])
        assert at_one == pytest.approx([found["loss"], found["forgetting"][1]])
        assert middle == 0.5

    def test_divergence_is_told(self, tiny):
        found = train(Run(Cell("digits", FULL, 8), 1e30, 0), CPU, tiny)
        assert found["validation"][-1] is None
        assert "loss" not in found


CELL = Cell("digits", "bone", 8)
SMALL = Study((CELL,), {("digits", "bone"): (1e-3, 3e-3, 1e-2, 3e-2)})


def results_of(cell, losses, seed=0):
    """Results as runs leave them, of final validation losses by rate."""
    return {Run(cell, rate, seed): {"validation": [9.0, loss], "steps": [0, 10],
                                    "gradient_norms": [1.0], "forgetting": [0.5, 0.6],
                                    "parameters": 18, "loss": loss, "exact": 0.5,
                                    "effective_rank": 3.0, "relative_norm": 0.1, "seconds": 2.0}
            for rate, loss in losses.items()}  # fmt: skip


class TestPlan:
    def test_all_rates_first_then_the_other_seeds_at_the_best(self):
        assert [run.rate for run in wanted(SMALL, {})] == [1e-3, 3e-3, 1e-2, 3e-2]
        results = results_of(CELL, {1e-3: 2.0, 3e-3: 1.0, 1e-2: 1.5})
        assert wanted(SMALL, results) == [Run(CELL, 3e-2, 0)]
        results |= results_of(CELL, {3e-2: None})
        assert wanted(SMALL, results) == [Run(CELL, 3e-3, 1), Run(CELL, 3e-3, 2)]
        assert best_rate(CELL, SMALL, results) == 3e-3
        results |= results_of(CELL, {3e-3: 1.1}, 1) | results_of(CELL, {3e-3: 1.2}, 2)
        assert wanted(SMALL, results) == []

    @pytest.mark.parametrize(("losses", "beyond"), [((1, 2, 3, 4), 3e-4), ((4, 3, 2, 1), 1e-1)])
    def test_a_best_at_the_edge_is_looked_beyond(self, losses, beyond):
        rates = dict(zip((1e-3, 3e-3, 1e-2, 3e-2), map(float, losses), strict=True))
        results = results_of(CELL, rates)
        assert wanted(SMALL, results) == [Run(CELL, beyond, 0)]
        assert best_rate(CELL, SMALL, results) is None
        results |= results_of(CELL, {beyond: 5.0})
        assert {run.seed for run in wanted(SMALL, results)} == {1, 2}

    def test_the_search_ends(self):
        results = results_of(CELL, dict.fromkeys((1e-3, 3e-3, 1e-2, 3e-2), 2.0))
        losses = iter([1.9, 1.8, 1.7, 1.6, 1.5, 1.4])
        extensions = 0
        while (run := wanted(SMALL, results)[0]).seed == 0:
            results |= results_of(CELL, {run.rate: next(losses)})
            extensions += 1
        assert extensions == MOST_EXTENSIONS

    def test_a_follower_takes_the_rate_of_its_leader_once(self):
        follower = replace(CELL, r=2)
        study = replace(SMALL, cells=(CELL, follower), leaders={follower: CELL})
        assert (study.least_runs(CELL), study.least_runs(follower)) == (6, 1)
        assert {run.cell for run in wanted(study, {})} == {CELL}
        assert runs_left(study, {}) == 7
        results = results_of(CELL, {1e-3: 2.0, 3e-3: 1.0, 1e-2: 1.5, 3e-2: 2.5})
        assert wanted(study, results) == [
            Run(follower, 3e-3, 0), Run(CELL, 3e-3, 1), Run(CELL, 3e-3, 2)
        ]  # fmt: skip
        results |= results_of(follower, {3e-3: 4.0})
        assert [run.seed for run in wanted(study, results)] == [1, 2]
        assert runs_left(study, results) == 2
        assert finding(follower, study, results).mean("loss").value == 4.0

    def test_every_search_comes_before_the_other_seeds(self):
        other = replace(CELL, method="lora")
        rates = {("digits", "bone"): (1e-3,), ("digits", "lora"): (1e-2,)}
        study = replace(SMALL, cells=(CELL, other), rates=rates)
        results = results_of(CELL, {1e-3: 2.0})
        assert wanted(study, results)[0] == Run(other, 1e-2, 0)
        results |= results_of(other, {1e-2: 2.0})
        assert [run.seed for run in wanted(study, results)] == [1, 1, 2, 2]

    def test_a_best_rate_below_a_grid_of_any_steps_is_looked_beyond(self):
        study = replace(SMALL, rates={("digits", "bone"): GRID})
        losses = dict(zip(GRID, (1.0, 2.0, 3.0, 4.0), strict=True))
        assert wanted(study, results_of(CELL, losses)) == [Run(CELL, 1e-5, 0)]

    def test_the_study_is_what_it_says(self):
        assert len(set(STUDY.cells)) == len(STUDY.cells)
        for task in TASKS:
            main = {c.method for c in STUDY.cells if c == main_cell(task, c.method)}
            assert main == set(compared(task))
        assert {*LONGER} == {"bone", "bat", "lora", "rslora", "dora", IDENTITY}
        assert {STUDY.rates[LONG, method] for method in LONGER} == {GRID}
        assert {c.r for c in STUDY.cells if c.task == LONG and c.method == "bone"} == {
            8, 32, 64, 128
        }  # fmt: skip
        assert all(len(rates) >= 4 and set(rates) <= {*RATES, *GRID}
                   for rates in STUDY.rates.values())  # fmt: skip
        assert len(STUDY.seeds) == 3
        assert len({Run(cell, 1e-3, 0).title for cell in STUDY.cells}) == len(STUDY.cells)


class TestRuns:
    def test_what_is_written_is_read(self, tmp_path):
        file = tmp_path / "runs.jsonl"
        run = Run(Cell("digits", "tile", 8, 32, "attention", "bfloat16"), 3e-5, 2)
        write_run(file, run, {"validation": [1.23456789, None]})
        assert run.title == "digits/tile-r8x32-attention-bfloat16/rate3e-05-seed2"
        (found,) = read_runs(file).items()
        assert found[0] == run
        assert found[1]["validation"] == [1.23457, None]

    def test_runs_are_lines_in_the_order_of_their_titles(self, tmp_path):
        file = tmp_path / "runs.jsonl"
        runs = [Run(CELL, 1e-3, seed) for seed in (2, 0, 1)]
        for run in runs:
            write_run(file, run, {"loss": 1.0})
        write_run(file, runs[0], {"loss": 2.0})
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [(one["seed"], one["loss"]) for one in lines] == [(0, 1.0), (1, 1.0), (2, 2.0)]

    def test_a_file_that_is_not_there_has_no_runs(self, tmp_path):
        assert read_runs(tmp_path / "runs.jsonl") == {}

    def test_what_is_no_number_is_not_written(self, tmp_path):
        with pytest.raises(ValueError, match="Out of range"):
            write_run(tmp_path / "runs.jsonl", Run(CELL, 1e-3, 0), {"loss": float("nan")})
        assert list(tmp_path.iterdir()) == []

    def test_the_kept_file_is_what_would_be_written(self, tmp_path):
        file = tmp_path / "runs.jsonl"
        shutil.copy(RESULTS, file)
        run, found = next(iter(read_runs(file).items()))
        write_run(file, run, found)
        assert file.read_bytes() == RESULTS.read_bytes()


class TestSweep:
    def test_it_goes_on_where_it_was_stopped(self, tmp_path):
        done, file = [], tmp_path / "runs.jsonl"

        def train_one(run):
            if len(done) == 3:
                raise KeyboardInterrupt
            done.append(run)
            (found,) = results_of(CELL, {run.rate: 1 + abs(run.rate - 3e-3)}).values()
            return found

        with pytest.raises(KeyboardInterrupt):
            sweep(SMALL, file, 0, train_one=train_one, say=lambda line: None)
        assert len(read_runs(file)) == 3
        first, lines = list(done), []
        done.clear()
        assert sweep(SMALL, file, 0, train_one=train_one, say=lines.append) == 3
        assert not set(first) & set(done)
        assert len(read_runs(file)) == 6
        assert "6 runs done" in lines[-1]
        assert "about 0 min left" in lines[-1]
        assert sweep(SMALL, file, 0, train_one=train_one) == 0

    def test_time_left_counts_cells_that_have_not_begun(self):
        other = Cell("packages", "bone", 8)
        study = Study((CELL, other), {**SMALL.rates, ("packages", "bone"): (1e-3,) * 4})
        seconds = {Run(CELL, rate, 0): 10.0 for rate in (1e-3, 3e-3)}
        assert time_left(study, seconds, workers=2) == (4 * 10 + 6 * 10) / 2

    def test_a_tiny_study_from_runs_to_page(self, tiny, tmp_path):
        cells = tuple(main_cell("digits", method) for method in ("bone", "lora"))
        study = Study(cells, {("digits", c.method): (1e-2,) for c in cells}, seeds=(0, 1))
        file, costs_file = tmp_path / "runs.jsonl", tmp_path / "costs.json"
        assert sweep(study, file, 0, say=lambda line: None) == 4
        assert sweep(study, file, 0) == 0
        measured = costs.costs(tiny, ["bone", "lora"], Budget(0.0, 2, 2, 1), CPU)
        head = {"machine": {"processor": "p", "threads": 1}, "device": "cpu", "versions": {}}
        costs_file.write_text(json.dumps({**head, "tables": {"costs": [measured]}}))
        pages = []
        for docs in (tmp_path / "a", tmp_path / "b"):
            written = report.write(study, file, costs_file, docs)
            pages.append({path.name: path.read_bytes() for path in written})
        assert pages[0] == pages[1]
        assert len(pages[0]) == 5
        text = pages[0]["evidence.md"].decode()
        loss = finding(cells[0], study, read_runs(file)).mean("loss")
        assert f"{loss.value:.3f} ± {loss.deviation:.3f}" in text
        assert "4 runs" in text

    def test_the_command_does_one_task_and_says_so(self, monkeypatch, tmp_path, capsys):
        asked = []
        monkeypatch.setattr(command, "sweep", lambda *given: asked.append(given) or 7)
        assert command.main(["--tasks", "packages", "--results", str(tmp_path / "runs.jsonl")]) == 0
        assert {cell.task for cell in asked[0][0].cells} == {"packages"}
        assert "7 runs done" in capsys.readouterr().out


class TestFindings:
    def test_noise_is_told_apart_as_a_paired_t_test_does(self):
        from scipy.stats import ttest_rel

        generator = random.Random(0)
        verdicts = set()
        for _ in range(200):
            one = [generator.gauss(0, 1) for _ in range(3)]
            other = [value + generator.gauss(0.5, 0.2) for value in one]
            expected = bool(ttest_rel(one, other).pvalue < 0.05)
            assert differ(one, other) is expected
            verdicts.add(expected)
        assert verdicts == {True, False}
        assert not differ([1.0], [2.0])

    def test_mean_and_deviation(self):
        assert Mean.of([1.0, 2.0, 3.0]) == Mean(2.0, 1.0)
        assert Mean.of([5.0]) == Mean(5.0, 0.0)

    def test_steps_and_seconds_to_loras_loss(self):
        cells = [Cell("digits", name, 8) for name in ("bone", "lora", "bat")]
        study = Study(tuple(cells), {("digits", c.method): (1e-3,) for c in cells}, seeds=(0,))
        curves = {"bone": [9, 4, 2, 1], "lora": [9, 6, 4, 2.5], "bat": [9, 8, 7, 6]}
        results = {}
        for cell in cells:
            (record,) = results_of(cell, {1e-3: curves[cell.method][-1]}).values()
            record |= {"validation": curves[cell.method], "steps": [0, 5, 10, 15]}
            results[Run(cell, 1e-3, 0)] = record
        measured = {"seconds": {"bone": [2, 2], "lora": [1, 4]},
                    "peak_bytes": {"bone": 1, "lora": 2}}  # fmt: skip
        found = task_findings(cells, study, results, measured)
        assert found.goal == 2.5
        assert found.near_goal == pytest.approx(2.825)
        assert [found.findings[n].steps_to(found.goal) for n in curves] == [10, 15, None]
        assert found.seconds_to("bone", found.goal) == 20
        assert found.seconds_to("bat", found.goal) is None
        assert found.costs["bone"].ratio == pytest.approx((2 + 0.5) / 2)
        assert found.ranked == ["bone", "lora", "bat"]

    def test_an_unfinished_cell_is_no_finding(self):
        results = results_of(CELL, {1e-3: 2.0, 3e-3: 1.0, 1e-2: 1.5, 3e-2: 2.5})
        assert finding(CELL, SMALL, results) is None
        results |= results_of(CELL, {3e-3: 1.1}, 1) | results_of(CELL, {3e-3: 1.2}, 2)
        assert finding(CELL, SMALL, results).mean("loss").value == pytest.approx(1.1)

    def test_what_diverged_is_not_called_unfinished(self):
        results = results_of(CELL, {1e-3: 2.0, 3e-3: 1.0, 1e-2: 1.5, 3e-2: 2.5})
        found = task_findings([CELL], SMALL, results, None)
        assert (found.unfinished, found.diverged) == ((CELL.method,), ())
        results |= results_of(CELL, {3e-3: 1.1}, 1) | results_of(CELL, {3e-3: 1.2}, 2)
        results[Run(CELL, 3e-3, 2)] = {"validation": [9.0, None]}
        found = task_findings([CELL], SMALL, results, None)
        assert (found.findings, found.unfinished, found.diverged) == ({}, (), (CELL.method,))


def assert_same_picture(found, expected):
    """Two SVGs are alike; the last of six decimals may be rounded otherwise on this processor."""
    assert NUMBER.sub("#", found) == NUMBER.sub("#", expected)
    numbers = [[float(number) for number in NUMBER.findall(svg)] for svg in (found, expected)]
    found, expected = torch.tensor(numbers, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1.5e-6)


class TestVerdict:
    """Every sentence of the box is computed again, from the files and with scipy."""

    BOX = (ROOT / "docs" / "evidence.md").read_text().split("</div>")[0]

    @staticmethod
    def best_runs(task, method):
        """The seeds of the main comparison, of the file itself: three, unless it lacks some."""
        chosen = TASKS[task]
        cell = {"task": task, "method": method, "r": chosen.r, "r_out": None, "layers": "all",
                "dtype": "float32"}  # fmt: skip
        runs = [json.loads(line) for line in RESULTS.read_text().splitlines()]
        runs = [run for run in runs if run["cell"] == cell]
        first = [run for run in runs if run["seed"] == 0 and run["validation"][-1] is not None]
        rate = min(first, key=lambda run: run["validation"][-1])["rate"] if first else None
        return sorted((run for run in runs if run["rate"] == rate), key=lambda run: run["seed"])

    @classmethod
    def tasks(cls):
        """The tasks of which Bone, BAT and LoRA have all their runs."""
        needed = ("bone", "bat", "lora")
        return [t for t in TASKS if all(len(cls.best_runs(t, name)) == 3 for name in needed)]

    @classmethod
    def figures(cls, method, what):
        """Mean ratio, its interval, and in how many tasks the method is clearly lower, higher."""
        from scipy import stats

        costs_of = {
            one["task"]: one for one in json.loads(costs.COSTS.read_text())["tables"]["costs"]
        }
        ratios, lower, higher = [], 0, 0
        for task in cls.tasks():
            if task not in costs_of and what in ("time of a step", "memory of a step"):
                continue
            if what == "time of a step":
                seconds = [
                    torch.tensor(costs_of[task]["seconds"][name]) for name in (method, "lora")
                ]
                ratios.append((seconds[0].double() / seconds[1].double()).quantile(0.5).item())
            elif what == "memory of a step":
                peaks = costs_of[task]["peak_bytes"]
                ratios.append(peaks[method] / peaks["lora"])
            else:
                mine, others = (
                    [run["loss"] if what == "test loss" else run["forgetting"][1]
                     for run in cls.best_runs(task, name)]
                    for name in (method, "lora")
                )  # fmt: skip
                ratios.append(sum(mine) / sum(others))
                if stats.ttest_rel(mine, others).pvalue < 0.05:
                    lower, higher = lower + (ratios[-1] < 1), higher + (ratios[-1] > 1)
        logs = torch.tensor(ratios, dtype=torch.float64).log()
        half = stats.t.ppf(0.975, len(logs) - 1) * logs.std().item() / len(logs) ** 0.5
        mean = logs.mean().item()
        return *(math.exp(mean + shift) for shift in (0, -half, half)), lower, higher

    @pytest.mark.parametrize(
        ("line", "what", "sides"),
        [
            ("Quality", "test loss", ("better", "worse")),
            ("Speed", "time of a step", ("faster", "slower")),
            ("Memory", "memory of a step", ("less", "more")),
            ("Forgetting", "forgetting", ("less", "more")),
        ],
    )
    def test_a_line_says_what_the_files_say(self, line, what, sides):
        (said,) = re.findall(rf"^- \*\*{line}\. .*$", self.BOX, re.MULTILINE)
        found = {name: self.figures(name, what) for name in ("bone", "bat")}
        words = {
            METHODS[name].title: "no clear difference" if low <= 1 <= high
            else f"clearly {sides[mean > 1]}"
            for name, (mean, low, high, *_) in found.items()
        }  # fmt: skip
        told = "; ".join(f"{name}: {word}" for name, word in words.items())
        if len(set(words.values())) == 1:
            told = f"{' and '.join(words)}: {words['Bone']}"
        assert said.startswith(f"- **{line}. {told}.** ")
        for name, (mean, low, high, lower, higher) in found.items():
            title = METHODS[name].title
            assert f"{title} {mean:.2f} ({low:.2f} to {high:.2f})" in said
            if what in ("test loss", "forgetting"):
                less, more = sides if what == "test loss" else ("less forgetful", "more forgetful")
                told = f"is clearly {less} in {lower or 'none'} and clearly {more} in "
                told += f"{higher or 'none'}"
                told = told if lower or higher else "differs clearly in none"
                assert f"{title} {told}" in said

    def test_it_names_its_limits(self):
        text = " ".join(self.BOX.split())
        tasks = self.tasks()
        steps = max(self.best_runs(task, "lora")[0]["steps"][-1] for task in tasks)
        assert f"over {len(tasks)} tasks" in text
        assert f"(at most {steps} steps)" in text

    @pytest.mark.parametrize(("factor", "word"), [(0.5, "better"), (2.0, "worse")])
    def test_another_result_gives_another_sentence(self, factor, word):
        found = self.findings(factor)
        text = verdict(found)
        assert f"**Quality. Bone: clearly {word}.**" in text
        assert f"clearly {word} in 2" in text
        assert "**Speed: not measured.**" in text
        assert "**Memory: not measured.**" in text
        measured = {"bone": Costs(1.0, 0.5, 1), "lora": Costs(2.0, 1.0, 2)}
        found["digits"] = replace(found["digits"], costs=measured)
        (speed,) = re.findall(r"Speed.*", verdict(found))
        assert speed.endswith("Bone 0.50 (one task). Measured in 1 task.")
        assert verdict({}) == ""

    @staticmethod
    def findings(factor):
        """Two tasks in which the loss of Bone is LoRA's times a factor."""
        found = {}
        for task in ("digits", "packages"):
            cells = [Cell(task, name, 8) for name in ("bone", "lora")]
            study = Study(tuple(cells), {(task, c.method): (1e-3,) for c in cells}, seeds=(0, 1))
            results = {}
            for cell in cells:
                for seed, loss in enumerate((1.0, 1.1)):
                    scaled = loss * (factor if cell.method == "bone" else 1)
                    ((run, record),) = results_of(cell, {1e-3: 1.0}, seed).items()
                    more = {"steps": [0, 5], "forgetting": [1.0, 1.5]}
                    results[run] = {**record, "loss": scaled, **more}
            found[task] = task_findings(cells, study, results, None)
        return found


class TestLonger:
    """Every sentence on the longer training is computed again, from the records of its runs."""

    STUDY = replace(STUDY, cells=tuple(cell for cell in STUDY.cells if cell.task == LONG))

    @classmethod
    def made_up(cls, most, best_of_bone=3e-4):
        """The first runs of the study, from a formula."""
        results, best = {}, {"bone": best_of_bone, "lora": 4e-4}
        while len(results) < most and (left := wanted(cls.STUDY, results)):
            run = left[0]
            away = math.log10(run.rate / best.get(run.cell.method, 3e-4))
            loss = 2.4 + away**2 / 10 + random.Random(run.title).random() / 50
            grown = [0.0, 0.02, 0.1, 0.2, 0.3 + away / 10]
            scales = [
                [scale, 3.3 - (3.3 - loss) * scale, 3.4 + more]
                for scale, more in zip((0.0, 0.25, 0.5, 0.75, 1.0), grown, strict=True)
            ]
            ((_, record),) = results_of(run.cell, {run.rate: loss}).items()
            results[run] = {**record, "scales": scales, "forgetting": [3.4, scales[-1][2]]}
        return results

    @staticmethod
    def sentences(results):
        """What the page must say, by plain arithmetic over the records."""
        from scipy.stats import ttest_rel

        main = {}  # method -> rate -> seed -> record
        for run, record in results.items():
            if run.cell == main_cell(LONG, run.cell.method):
                main.setdefault(run.cell.method, {}).setdefault(run.rate, {})[run.seed] = record
        first = {
            name: {rate: seeds[0].get("loss", math.inf) for rate, seeds in rates.items()}
            for name, rates in main.items()
        }
        both = sorted(set(first.get("bone", ())) & set(first.get("lora", ())))
        lower = [f"{rate:g}" for rate in both if first["bone"][rate] < first["lora"][rate]]
        higher = [f"{rate:g}" for rate in both if f"{rate:g}" not in lower]
        said = []
        if both:
            parts = [("lower than LoRA's at ", lower), ("not at ", higher)]
            if not lower:
                parts = [("not lower than LoRA's at ", higher)]
            told = ", and ".join(
                words + " and ".join(filter(None, [", ".join(some[:-1]), some[-1]]))
                for words, some in parts
                if some
            )
            said.append(f"**With one rate for all, Bone's test loss is {told}.**")
        for rate in {2e-5, 1e-4} & set(both):
            losses = {METHODS[name].title: rates[rate] for name, rates in first.items()
                      if rate in rates}  # fmt: skip
            best = min(losses, key=losses.get)
            said.append(f"At {rate:g}, the rate of")
            said.append(f"{best} is lowest with {losses[best]:.3f} (")
        own = {name: best_rate(main_cell(LONG, name), STUDY, results) for name in main}
        seeds = {name: main[name][rate] for name, rate in own.items() if rate is not None}

        def gap(one, other):
            shared = sorted(set(one) & set(other))
            pairs = [[values[seed] for seed in shared] for values in (one, other)]
            mean = sum(a - b for a, b in zip(*pairs, strict=True)) / len(shared)
            text = f"{abs(mean):.3f} {'lower' if mean < 0 else 'higher'} than"
            if len(shared) < 2:
                return text, "with one seed"
            clear = ttest_rel(*pairs).pvalue < 0.05
            return text, "beyond noise" if clear else "within noise"

        def losses(name):
            return {seed: record["loss"] for seed, record in seeds[name].items()}

        if {"bone", "lora"} <= set(seeds):
            text, noise = gap(losses("bone"), losses("lora"))
            said.append(f"**There, Bone is {text} LoRA, {noise}.**")

            def leader(gap):
                return f"{'Bone' if gap > 0 else 'LoRA'} leads by {abs(gap):.3f}"

            means = [statistics.fmean(losses(name).values()) for name in ("bone", "lora")]
            orders = {2e-5: ["bone", "lora"], 1e-4: ["bat", "bone", "lora"]}
            for rate in {2e-5, 1e-4} & set(both):
                pair = [first[name][rate] for name in ("bone", "lora")]
                said.append(f"Here, {leader(pair[1] - pair[0])} at this rate; each at its own "
                            f"rate, {leader(means[1] - means[0])}.")  # fmt: skip
                theirs = [name for name in orders[rate] if rate in first.get(name, ())]
                same = sorted(theirs, key=lambda name: first[name][rate]) == theirs
                said.append(f"{', '.join(METHODS[name].title for name in theirs)}.** "
                            f"The order is {'the same' if same else 'another'} here.")  # fmt: skip
            grown = [main[name][1e-4][0]["forgetting"] for name in ("bone", "lora")]
            grown = " and ".join(f"{after - before:+.3f}" for before, after in grown)
            said.append(f"Here, it is {grown} at this rate.")
            ends = {
                name: sum(one["forgetting"][1] for one in found.values()) / len(found)
                for name, found in seeds.items()
            }
            least = min(ends, key=ends.get)
            base = next(iter(results.values()))["forgetting"][0]
            said.append(
                f"The least forgetful is {METHODS[least].title} ({ends[least] - base:+.3f})."
            )
            fine = torch.linspace(0, 1, 1601, dtype=torch.float64)

            def within(record):
                scales, loss, elsewhere = (
                    torch.tensor(values, dtype=torch.float64)
                    for values in zip(*record["scales"], strict=True)
                )
                place = torch.searchsorted(scales, fine).clamp(1, len(scales) - 1)
                share = (fine - scales[place - 1]) / (scales[place] - scales[place - 1])
                loss, elsewhere = (torch.lerp(v[place - 1], v[place], share)
                                   for v in (loss, elsewhere))  # fmt: skip
                return loss[elsewhere <= ends[least] + 1e-9].min().item()

            equal = [{seed: within(one) for seed, one in seeds[name].items()}
                     for name in ("bone", "lora")]  # fmt: skip
            text, noise = gap(*equal)
            said.append(f"**There, Bone is {text} LoRA, {noise}.**")
        if IDENTITY in seeds:
            for other in ("bone", "lora"):
                text, noise = gap(losses(IDENTITY), losses(other))
                said.append(f"is {text} {METHODS[other].title}, {noise}")
        spreads = [statistics.stdev(losses(name).values()) for name in seeds
                   if len(seeds[name]) > 1]  # fmt: skip
        if spreads:
            said.append(f"The standard deviation between seeds is at most {max(spreads):.3f};")
        sized = {
            (run.cell.method, run.cell.r): record["loss"] for run, record in results.items()
            if run.seed == 0 and run.rate == own.get(run.cell.method)
        }  # fmt: skip
        sizes = [r for r in (8, 32, 64, 128) if {("bone", r), ("lora", r)} <= set(sized)]
        if len(sizes) > 1:
            won = [str(r) for r in sizes if sized["bone", r] < sized["lora", r]]
            where = " and ".join(filter(None, [", ".join(won[:-1]), *won[-1:]]))
            said.append(f"**Bone is lower than LoRA at r = {where}.**" if won
                        else "**Bone is not lower than LoRA at any r.**")  # fmt: skip
            ends = " to ".join(f"{sized['bone', r]:.3f}" for r in (sizes[0], sizes[-1]))
            said.append(f"Test loss from r = {sizes[0]} to r = {sizes[-1]}: Bone from {ends};")
        return said

    @pytest.mark.parametrize(
        ("most", "sentences"), [(0, 0), (3, 0), (6, 5), (8, 13), (10, 13), (26, 17), (99, 18)]
    )
    def test_a_sentence_says_what_the_runs_say(self, most, sentences):
        results = self.made_up(most)
        text = longer.longer(longer.of_results(self.STUDY, results), "picture.svg")
        said = self.sentences(results)
        assert len(said) == sentences
        for sentence in said:
            assert sentence in text
        left = 42 - len(results)
        missing = f"**Of 42 runs, {left} are missing.**"
        assert (missing in text, "missing" in text) == (left > 0, left > 0)
        assert ("picture.svg" in text) == (most > 0)

    def test_the_page_says_what_the_kept_runs_say(self):
        page = (ROOT / "docs" / "evidence.md").read_text()
        results = {run: one for run, one in read_runs(RESULTS).items() if run.cell.task == LONG}
        for sentence in self.sentences(results):
            assert sentence in page
        left = runs_left(self.STUDY, results)
        assert (f", {left} are missing.**" in page) == (left > 0)

    @pytest.mark.parametrize(("most", "complete"), [(38, False), (39, True)])
    def test_the_verdict_takes_it_in_once_its_methods_are_finished(self, most, complete):
        cells = [cell for cell in self.STUDY.cells if cell == main_cell(LONG, cell.method)]
        found = task_findings(cells, self.STUDY, self.made_up(most), None)
        assert report._is_complete(found) is complete

    def test_a_diverged_run_is_shown_as_such(self):
        results = self.made_up(10)
        run = Run(main_cell(LONG, "bone"), 3e-3, 0)
        results[run] = {"validation": [9.0, None], "steps": [0, 10], "seconds": 1.0}
        found = longer.of_results(self.STUDY, results)
        assert "| diverged |" in longer.longer(found, "picture.svg")
        assert curves.longer(found).startswith(b"<?xml")

    def test_other_runs_give_other_sentences(self):
        texts = [longer.longer(longer.of_results(self.STUDY, self.made_up(99, best)), "")
                 for best in (1e-4, 1e-1)]  # fmt: skip
        assert "lower than LoRA's at 2e-05 and 0.0001, and not at" in texts[0]
        assert "test loss is not lower than LoRA's at 2e-05" in texts[1]

    @pytest.mark.parametrize(
        ("limit", "loss"), [(1.0, 3.0), (1.25, 2.5), (2.0, 1.0), (0.5, math.inf)]
    )
    def test_loss_at_equal_forgetting_is_read_off_the_curve(self, limit, loss):
        points = [longer.Point(0.0, 3.0, 1.0), longer.Point(0.5, 2.0, 1.5),
                  longer.Point(1.0, 1.0, 1.2)]  # fmt: skip
        if limit == 1.25:  # the end of the curve forgets less than its middle
            points[-1] = longer.Point(1.0, 1.0, 1.9)
        assert longer.at_forgetting(points, limit) == pytest.approx(loss)


COMMAND = "python -m benchmarks.convergence.report"


class TestReport:
    """The page that is committed follows from the results that are committed."""

    def test_it_is_what_the_results_give(self, tmp_path):
        import matplotlib as mpl

        page, *pictures = report.write(STUDY, RESULTS, costs.COSTS, tmp_path)
        assert page.read_text() == (ROOT / "docs" / page.name).read_text(), COMMAND
        for path in pictures:
            committed = (ROOT / "docs" / path.relative_to(tmp_path)).read_text()
            if f"Matplotlib v{mpl.__version__}" not in committed:
                continue  # by another release of matplotlib, which draws text its own way
            assert_same_picture(path.read_text(), committed)

    @pytest.mark.parametrize(
        "change", [("123.456789", "123.456799"), ("#m1", "#m2"), ("steps", "seconds")]
    )
    def test_what_differs_in_a_picture_is_noticed(self, change):
        picture = '<!-- steps --><use xlink:href="#m1" x="123.456789" y="7"/>'
        assert_same_picture(picture, picture.replace("789", "790"))
        with pytest.raises(AssertionError):
            assert_same_picture(picture, picture.replace(*change))

    def test_every_kept_run_is_of_the_study(self):
        strangers = [run.title for run in read_runs(RESULTS)
                     if run.cell not in STUDY.cells or run.rate not in (*RATES, *GRID)]  # fmt: skip
        assert strangers == []

    def test_numbers_come_from_files(self, tmp_path):
        file, page = tmp_path / "runs.jsonl", tmp_path / "docs" / "evidence.md"
        shutil.copy(RESULTS, file)
        report.write(STUDY, file, costs.COSTS, tmp_path / "docs")
        assert page.read_text() == (ROOT / "docs" / "evidence.md").read_text()
        results = read_runs(file)
        cell = main_cell("digits", "bone")
        before = finding(cell, STUDY, results).mean("loss").value
        changed = next(run for run in results if run.cell == cell and run.seed == 1)
        write_run(file, changed, {**results[changed], "loss": 123.0})
        after = finding(cell, STUDY, read_runs(file)).mean("loss").value
        assert f"{after:.3f} ±" not in page.read_text()
        report.write(STUDY, file, costs.COSTS, tmp_path / "docs")
        assert f"{before:.3f} ±" not in page.read_text()
        assert f"{after:.3f} ±" in page.read_text()

    @pytest.mark.parametrize("module", [report, longer], ids=["report", "longer"])
    def test_no_measured_number_is_typed_into_the_text(self, module):
        tree = ast.parse(Path(module.__file__).read_text())
        texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)
                 and isinstance(node.value, str)]  # fmt: skip
        assert [text for text in texts if re.search(r"\d\.\d", text)] == []
