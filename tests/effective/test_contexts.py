"""Contexts belong to a thread or task: others do not see them, and nothing is left behind."""

import asyncio
import copy
import itertools
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import disha
from disha import private_torch
from disha.effective import contexts
from disha.errors import ModeError
from tests.conftest import Made, freshly_compiled, perturb, pickled, seed_torch

X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)
NAMES = (None, "a", "b", "c")
KEPT = [torch.ops.aten.addmm.default]
KEEP = {"use_reentrant": False, "context_fn": lambda: create_selective_checkpoint_contexts(KEPT)}


def net(method="bone"):
    """Return a model with the adapters a, b and c."""
    seed_torch(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 4)).double()
    for adapter, target in (("a", "."), ("b", "2|3"), ("c", "0|3")):
        disha.inject_adapters(model, target, 2, adapter=adapter, method=method)
    perturb(model)
    return model


def outputs_of(model):
    """Return adapter or None -> the output of all samples with it alone."""
    expected = {}
    for name in NAMES:
        disha.set_active_adapters(model, [] if name is None else name)
        expected[name] = model(X).detach()
    disha.set_active_adapters(model, "c")
    return expected


@pytest.fixture
def model():
    return net()


@pytest.fixture
def expected(model):
    return outputs_of(model)


def close(actual, expected):
    return torch.allclose(actual, expected, rtol=0, atol=1e-12)


def jobs(model, expected, seed, routes):
    """Yield (context, the output that it must give) without an end, with so many lists of names."""
    draw = random.Random(seed)
    lists = [[NAMES[(shift + i * i) % 4] for i in range(len(X))] for shift in range(routes)]
    while True:
        kind = draw.choice(["route", "active", "disabled", "none", "nested"])
        if kind == "route":
            names = draw.choice(lists)
            wanted = torch.stack([expected[name][i] for i, name in enumerate(names)])
            yield disha.route_adapters(model, names), wanted
        elif kind == "active":
            name = draw.choice("abc")
            yield disha.adapters_active(model, name), expected[name]
        elif kind == "disabled":
            yield disha.adapters_disabled(model), expected[None]
        elif kind == "nested":
            stack = ExitStack()
            stack.enter_context(disha.adapters_active(model, "a"))
            stack.enter_context(disha.adapters_active(model, "b"))
            yield stack, expected["b"]
        else:
            yield nullcontext(), expected["c"]


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_threads_with_contexts_of_their_own(model, expected, way):
    # A list of names compiles once, and a model has 8 graphs by default.
    run, routes = (model, 4) if way == "eager" else (torch.compile(model, backend="eager"), 3)
    torch._dynamo.reset()
    start, wrong = threading.Barrier(8), []

    def serve(seed):
        start.wait()
        for context, wanted in itertools.islice(jobs(model, expected, seed, routes), 250):
            with torch.no_grad(), context:
                output = run(X)
                time.sleep(0)  # let another thread run inside the context
            if not close(output, wanted):
                wrong.append(seed)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(serve, range(8)))
    assert not wrong
    assert close(run(X), expected["c"])
    assert not contexts.OPEN_CONTEXTS


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_tasks_with_contexts_of_their_own(model, expected, way):
    run = model if way == "eager" else freshly_compiled(model, fullgraph=False)

    async def request(number):
        name = NAMES[number % 4]
        names = [] if name is None else [name]
        context = (
            disha.adapters_active(model, names)
            if number % 3
            else disha.route_adapters(model, [name] * len(X))
        )
        with context:
            for _ in range(3):
                await asyncio.sleep(0)
                with torch.no_grad():
                    if not close(run(X), expected[name]):
                        return number
                if way == "eager" and not close(await asyncio.to_thread(run, X), expected[name]):
                    return number  # the context holds in a thread that the task starts
        return None

    async def serve():
        return await asyncio.gather(*(request(number) for number in range(200)))

    assert set(asyncio.run(serve())) == {None}
    assert close(run(X), expected["c"])
    assert not contexts.OPEN_CONTEXTS


class TestOrder:
    def test_contexts_end_in_any_order(self, model, expected):
        for order in itertools.permutations(range(3)):
            made = [
                disha.adapters_active(model, "a"),
                disha.adapters_disabled(model),
                disha.route_adapters(model, ["b"] * len(X)),
            ]
            for one in made:
                one.__enter__()
            now = ["a", None, "b"]
            for ends in order:
                inside = [now[i] for i in range(3) if now[i] != "over"]
                assert close(model(X), expected[None if None in inside else inside[-1]])
                made[ends].__exit__(None, None, None)
                now[ends] = "over"
            assert close(model(X), expected["c"])
        assert not contexts.OPEN_CONTEXTS

    def test_a_context_that_another_thread_ends(self, model, expected):
        context = disha.adapters_disabled(model)
        context.__enter__()
        with ThreadPoolExecutor(1) as pool:
            assert close(pool.submit(model, X).result(), expected["c"])
            pool.submit(context.__exit__, None, None, None).result()
        assert close(model(X), expected["c"])

    def test_a_task_that_outlives_the_context(self, model, expected):

        async def late(ended):
            inside = model(X)
            await ended.wait()
            return inside, model(X)

        async def main():
            ended = asyncio.Event()
            with disha.adapters_disabled(model):
                task = asyncio.create_task(late(ended))
                await asyncio.sleep(0)
            ended.set()
            return await task

        inside, after = asyncio.run(main())
        assert close(inside, expected[None])
        assert close(after, expected["c"])

    def test_disabling_wins_and_otherwise_the_innermost(self, model, expected):
        with disha.adapters_active(model, []):
            assert close(model(X), expected[None])
            with disha.adapters_active(model, "a"):
                assert close(model(X), expected["a"])
                with disha.adapters_disabled(model), disha.adapters_active(model, "b"):
                    assert close(model(X), expected[None])

    def test_several_adapters_add_up(self, model):
        disha.set_active_adapters(model, ["a", "b"])
        both = model(X)
        disha.set_active_adapters(model, [])
        with disha.adapters_active(model, ["b", "a"]):
            assert close(model(X), both)

    def test_gradients_go_to_the_acting_adapter(self, model):
        with disha.adapters_active(model, "a"):
            model(X).sum().backward()
        assert all(p.grad is not None for p in disha.adapter_parameters(model, "a"))
        assert all(p.grad is None for p in disha.adapter_parameters(model, "c"))


class TestParts:
    def test_a_part_of_the_model(self, model):
        first = model[0]
        with disha.adapters_disabled(first):
            part = model(X)
            with disha.adapters_disabled(model):
                base = model(X)
            assert close(model(X), part)
        adapted = model(X)
        disha.set_active_adapters(first, [])
        assert close(model(X), part)
        assert not close(part, adapted)
        assert not close(part, base)

    def test_a_part_inside_a_context_of_the_model(self, model, expected):
        with disha.adapters_disabled(model):
            with disha.adapters_disabled(model[0]):
                assert close(model(X), expected[None])
            assert close(model(X), expected[None])
        assert close(model(X), expected["c"])

    def test_another_model_is_not_covered(self):
        model, other = net(), net()
        expected = outputs_of(other)
        with disha.adapters_disabled(model):
            assert close(other(X), expected["c"])

    @pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
    def test_a_copy_is_not_covered(self, model, expected, clone):
        with disha.adapters_disabled(model):
            twin = clone(model)
            assert close(twin(X), expected["c"])
            with disha.adapters_disabled(twin):
                assert close(twin(X), expected[None])
            assert close(torch.compile(twin, backend="eager")(X), expected["c"])

    def test_layers_that_were_made_one_by_one(self):
        layers = nn.Sequential(disha.BoneLinear(6, 8, r=2), disha.BoneLinear(8, 4, r=2)).double()
        beside = disha.BoneLinear(6, 4, r=2).double()
        perturb(layers)
        perturb(beside)
        adapted, own = layers(X), beside(X)
        with disha.adapters_disabled(layers):
            assert not close(layers(X), adapted)
            assert close(beside(X), own)
        assert close(layers(X), adapted)


def test_a_context_that_is_not_entered_says_so(model, expected):
    for name, *names in (("adapters_disabled",), ("adapters_active", "a"), ("route_adapters", "a")):
        with pytest.warns(UserWarning, match=f"write `with disha.{name}"):
            getattr(disha, name)(model, *names)
    assert close(disha.adapters_disabled(model)(model)(X), expected[None])  # as a decorator
    assert close(model(X), expected["c"])


def residual(self, x):
    return x + self.linear(x)


class TestServing:
    """Load, use and remove adapters while other threads use the model."""

    def test_new_adapters_come_and_go_beside_forwards(self, model, expected, tmp_path):
        other = net("bat")
        disha.save_adapter(other, tmp_path / "new", "a")
        new = outputs_of(other)["a"]
        stop, wrong = threading.Event(), []

        def serve(seed):
            work = jobs(model, expected, seed, routes=4)
            for done in itertools.count():
                context, wanted = next(work)
                with torch.no_grad(), context:
                    output = model(X)
                if not close(output, wanted):
                    wrong.append(output)
                if stop.is_set():
                    return done
            return None

        with ThreadPoolExecutor(4) as pool:
            threads = [pool.submit(serve, seed) for seed in range(4)]
            for _ in range(30):
                disha.load_adapter(model, tmp_path / "new", "new", activate=False)
                with torch.no_grad(), disha.adapters_active(model, "new"):
                    assert close(model(X), new)
                disha.remove_adapters(model, "new")
            stop.set()
            done = [thread.result() for thread in threads]
        assert not wrong
        assert all(done)

    def test_layers_come_and_go_while_contexts_open(self, monkeypatch):
        model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(12)))
        disha.inject_adapters(model, "0|1", 2, adapter="a")
        stop = threading.Event()

        def serve(_):
            while not stop.is_set():
                with torch.no_grad(), disha.adapters_active(model, "a"):
                    model(X.float())

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(2) as pool:
                threads = [pool.submit(serve, seed) for seed in range(2)]
                for _ in range(60):
                    disha.inject_adapters(model, ".", 2, adapter="new")
                    disha.remove_adapters(model, "new")
                stop.set()
                assert [thread.result() for thread in threads] == [None, None]
        finally:
            stop.set()
            sys.setswitchinterval(interval)

    def test_a_merge_beside_a_context_of_another_thread_is_refused(self, model, expected):
        def merge():
            with pytest.raises(ModeError, match="another thread or task is inside adapters_disabl"):
                disha.merge_adapters(model)

        with disha.adapters_disabled(model), ThreadPoolExecutor(1) as pool:
            pool.submit(merge).result()
            assert close(model(X), expected[None])
        disha.merge_adapters(model)
        assert close(model(X), expected["c"])

    def test_an_adapter_can_come_while_a_layer_lists_its_own(self, model):
        layer = disha.summary(model).layers[0].name
        names = iter(model.get_submodule(layer).disha)
        first = next(names)
        disha.inject_adapters(model, layer, 2, adapter="new")
        assert [first, *names] == ["a", "c"]

    def test_layers_that_no_adapter_had_before(self, model, tmp_path):
        disha.save_adapter(model, tmp_path / "all", "a")
        disha.remove_adapters(model)
        plain = model(X)
        disha.load_adapter(model, tmp_path / "all", "a", activate=False)
        assert torch.equal(model(X), plain)
        with disha.adapters_active(model, "a"):
            assert not torch.equal(model(X), plain)

    def test_layers_that_another_thread_adds_are_covered_too(self):
        _loose, x = disha.BoneLinear(4, 4, r=2), torch.randn(2, 4)  # that no context covers
        model = disha.inject_adapters(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "0", 2)
        with ThreadPoolExecutor(1) as pool, disha.adapters_disabled(model):
            base = model(x)
            pool.submit(disha.inject_adapters, model, "1", 2, adapter="b", init="kaiming").result()
            assert torch.equal(model(x), base)
        assert not torch.equal(model(x), base)

    def test_an_adapter_in_use_is_not_removed(self, model):

        def remove(name=None):
            disha.remove_adapters(model, name)

        with ThreadPoolExecutor(1) as pool:
            for context in (
                disha.route_adapters(model, ["a"] * len(X)),
                disha.adapters_active(model, "a"),
            ):
                with context:
                    for name in ("a", None):
                        with pytest.raises(ModeError, match="'a' while another thread"):
                            pool.submit(remove, name).result()
                    pool.submit(disha.inject_adapters, model, ".", 2, adapter="d").result()
                    pool.submit(remove, "d").result()
        remove("a")


class TestCompiled:
    def compiled(self):
        """Return a model, compiled too, the counter of its graphs, and `outputs_of` it."""
        model = net()
        expected = outputs_of(model)
        counter = CompileCounter()
        return model, freshly_compiled(model, counter), counter, expected

    def test_disabling_in_one_thread_compiles_nothing_and_others_see_nothing(self):
        model, graph, counter, expected = self.compiled()
        assert close(graph(X), expected["c"])
        with ThreadPoolExecutor(1) as pool, disha.adapters_disabled(model):
            assert close(graph(X), expected[None])
            assert close(pool.submit(graph, X).result(), expected["c"])
        assert close(graph(X), expected["c"])
        assert counter.frame_count == 1

    def test_equal_blocks_of_a_model_share_a_graph(self):
        seed_torch(0)
        model = nn.Sequential(*(Made(residual, linear=nn.Linear(6, 6)) for _ in range(12))).double()
        disha.inject_adapters(model, "all-linear", 2, init="kaiming")
        torch._dynamo.reset()
        counter = CompileCounter()
        expected = model(X)
        with disha.adapters_disabled(model):
            base = model(X)
        for block in model:
            block.compile(backend=counter, fullgraph=True)
        with torch.no_grad():
            assert close(model(X), expected)
            with disha.adapters_disabled(model):
                assert close(model(X), base)
        assert counter.frame_count == 1

    def test_every_set_of_acting_adapters_compiles_once(self):
        model, graph, counter, expected = self.compiled()
        for _ in range(3):
            for name in "abc":
                with disha.adapters_active(model, name):
                    assert close(graph(X), expected[name])
            assert close(graph(X), expected["c"])
        assert counter.frame_count == 4


class CheckpointFunction(torch.autograd.Function):
    """Activation checkpointing as in fairscale: the function is not the first argument."""

    __module__ = "fairscale.nn.checkpoint.checkpoint_activations"

    @staticmethod
    def forward(ctx, dummy, function, x):
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            ctx.function(x).backward(gradient)
        return None, None, x.grad


class TestBackward:
    """Activation checkpointing computes layers again, on an accelerator in a thread of autograd."""

    @pytest.mark.parametrize("where", ["inside", "after", "in another context", "in a thread"])
    @pytest.mark.parametrize("kind", [{"use_reentrant": True}, {"use_reentrant": False}, KEEP])
    def test_the_adapters_of_forward_act_again(self, kind, where):
        model, twin, x = net(), net(), X.clone().requires_grad_()
        with disha.adapters_active(model, "a"):
            model(x).sum().backward()
        with disha.adapters_active(twin, "a"):
            loss = checkpoint(twin, x, **kind).sum()
            if where == "inside":
                loss.backward()
            elif where == "in a thread":
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(loss.backward).result()
        if where == "after":
            loss.backward()
        elif where == "in another context":
            with disha.adapters_active(twin, "b"):
                loss.backward()
        for mine, plain in zip(twin.parameters(), model.parameters(), strict=True):
            assert (mine.grad is None) == (plain.grad is None)
            assert mine.grad is None or torch.equal(mine.grad, plain.grad)

    def test_a_checkpoint_of_another_library(self):
        model, twin, x = net(), net(), X.clone().requires_grad_()
        with disha.adapters_active(model, "a"):
            model(X).sum().backward()
        with disha.adapters_active(twin, "a"):
            loss = CheckpointFunction.apply(torch.ones(1, requires_grad=True), twin, x).sum()
        loss.backward()
        for mine, plain in zip(twin.parameters(), model.parameters(), strict=True):
            assert (mine.grad is None) == (plain.grad is None)
            assert mine.grad is None or torch.equal(mine.grad, plain.grad)

    def test_a_function_of_ones_own_with_that_name_gets_what_it_was_given(self):
        class CheckpointFunction(torch.autograd.Function):
            @staticmethod
            def forward(ctx, scale, x):
                return x * scale.factor

            @staticmethod
            def backward(ctx, gradient):
                return None, gradient

        def scale():
            raise AssertionError("never called")

        scale.factor = 3.0
        assert torch.equal(CheckpointFunction.apply(scale, X), 3.0 * X)

    def test_in_two_threads_at_once(self):
        model, twin, both = net(), net(), threading.Barrier(2)

        def part(x):
            if threading.current_thread() is not threading.main_thread():
                both.wait()
            return model(x)

        with disha.adapters_active(twin, "a"):
            (2 * twin(X)).sum().backward()
        with disha.adapters_active(model, "a"):
            losses = [checkpoint(part, X, use_reentrant=False).sum() for _ in range(2)]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(torch.Tensor.backward, losses))
        for mine, plain in zip(model.parameters(), twin.parameters(), strict=True):
            assert (mine.grad is None) == (plain.grad is None)
            assert mine.grad is None or close(mine.grad, plain.grad)

    def in_a_thread_of_autograd(self, monkeypatch, function):
        """Run a function as autograd does: in a thread that Python has not made."""
        import _thread

        outcome, done = [], threading.Event()

        def body():
            try:
                outcome.append(function())
            except ModeError as error:
                outcome.append(error)
            done.set()

        monkeypatch.setattr(private_torch, "_graph_task", lambda: 7)
        _thread.start_new_thread(body, ())
        done.wait()
        return outcome[0]

    def test_an_open_context_raises(self, monkeypatch):
        model, other = net(), net()
        expected = outputs_of(other)
        with disha.adapters_active(model, "a"):
            error = self.in_a_thread_of_autograd(monkeypatch, lambda: model(X))
            beside = self.in_a_thread_of_autograd(monkeypatch, lambda: other(X))
        assert isinstance(error, ModeError)
        assert "because adapters_active is open" in str(error)
        assert close(beside, expected["c"])

    def test_what_acted_in_forward_is_known_to_a_checkpoint(self, model, expected, monkeypatch):
        run = contexts.bind_contexts(lambda: model(X))
        with disha.adapters_disabled(model):
            output = self.in_a_thread_of_autograd(monkeypatch, run)
        assert close(output, expected["c"])

    def test_without_contexts_nothing_is_asked(self, model, expected, monkeypatch):
        output = self.in_a_thread_of_autograd(monkeypatch, lambda: model(X))
        assert close(output, expected["c"])
