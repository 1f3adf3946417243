"""Gradient checkpointing: the gradients are those without it, reentrant or not."""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

import disha
from disha import ArgumentError, ArgumentTypeError
from tests.conftest import perturb


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 7)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.down = nn.Linear(7, 6)

    def forward(self, x):
        return x + self.down(self.conv(torch.tanh(self.up(x))))


class Model(nn.Module):
    """Embeds tokens, or takes numbers; then blocks, checkpointed or not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.call = lambda block, x: block(x)

    def forward(self, x):
        x = self.embed(x) if not x.is_floating_point() else x
        for block in self.blocks:
            x = self.call(block, x)
        return x


ADAPTERS = {
    "bone": {"target_regex": "up|down|conv", "r": 3},
    "tile": {"target_regex": "up|down|conv", "r": 2, "r_out": 1},
    "bat": {"target_regex": "up|down", "r": 3, "method": "bat"},
    "dropout": {"target_regex": "up|down|conv", "r": 3, "dropout": 0.5},
    "bat with dropout": {"target_regex": "up|down", "r": 3, "method": "bat", "dropout": 0.5},
    "embedding": {"target_regex": "embed|up", "r": 3},
}
TOKENS = torch.arange(8).view(2, 4)


def adapted(case="bone"):
    torch.manual_seed(0)
    model = disha.inject_adapters(Model(), **ADAPTERS[case])
    perturb(model)
    return model


def gradients(model, x=TOKENS):
    torch.manual_seed(1)
    model.zero_grad()
    model(x).square().sum().backward()
    return [block.grad for block in disha.adapter_parameters(model)]


def all_equal(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


def checkpointed(model, reentrant):
    model.call = functools.partial(checkpoint, use_reentrant=reentrant)
    return model


@pytest.mark.parametrize("case", ADAPTERS)
def test_not_reentrant(case):
    model = adapted(case)
    expected = gradients(model)
    assert all_equal(gradients(checkpointed(model, False)), expected)


@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("floating", [False, True])
def test_reentrant(case, floating):
    model = adapted(case)
    x = torch.randn(2, 4, 6) if floating else TOKENS
    expected = [block for block in gradients(model, x) if block is not None]
    with disha.enable_input_gradients(model):
        found = gradients(checkpointed(model, True), x)
        assert all_equal([block for block in found if block is not None], expected)
    assert not x.requires_grad
    assert x.grad is None


def test_reentrant_loses_gradients_without_it():
    model = checkpointed(adapted(), True)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        output = model(TOKENS)
    assert not output.requires_grad


@pytest.mark.parametrize("implementation", list(CheckpointImpl))
def test_wrapped_after_injection(implementation, tmp_path):
    model = adapted()
    expected = gradients(model)
    disha.save_adapter(model, tmp_path / "plain")
    wrap = functools.partial(checkpoint_wrapper, checkpoint_impl=implementation)
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=wrap, check_fn=lambda module: isinstance(module, Block)
    )
    with disha.enable_input_gradients(model):
        assert all_equal(gradients(model), expected)
        # A graph gets plain autograd in place of fused products: equal to rounding.
        compiled = gradients(torch.compile(model, backend="eager"))
        torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
    disha.save_adapter(model, tmp_path / "wrapped")
    assert (tmp_path / "wrapped").read_bytes() == (tmp_path / "plain").read_bytes()


class TestInputGradients:
    def test_after_a_module(self):
        """What comes before it is not differentiated."""

        class Patches(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = nn.Conv1d(4, 4, 1)
                self.model = adapted()

            def forward(self, x):
                return self.model(self.embed(x))

        patches, x = Patches().requires_grad_(False), torch.randn(2, 4, 6)
        disha.mark_only_adapters_trainable(patches)
        expected = gradients(patches, x)
        checkpointed(patches.model, True)
        for after in (patches.embed, [patches.embed]):
            with disha.enable_input_gradients(patches, after):
                embedded = patches.embed(x)
                assert embedded.grad_fn.next_functions[0][0] is None  # nothing before it
                assert all_equal(gradients(patches, x), expected)

    def test_after_a_module_with_several_outputs(self):
        class Pair(nn.Module):
            def forward(self, x):
                return x, [x * 2, x > 0]

        model = nn.Sequential(Pair())
        disha.enable_input_gradients(model, model[0])
        first, (second, mask) = model(torch.randn(2))
        assert first.requires_grad
        assert second.requires_grad
        assert not mask.requires_grad

    def test_after_a_module_whose_output_has_names(self):
        outputs = pytest.importorskip("transformers.modeling_outputs")

        class Named(nn.Module):
            def forward(self, x):
                output = outputs.BaseModelOutput(last_hidden_state=x, hidden_states=(x * 2,))
                return {"here": x + 1, "inside": Point(x * 3, [output])}

        class Point(NamedTuple):
            first: torch.Tensor
            rest: list

        model = nn.Sequential(Named())
        disha.enable_input_gradients(model, model[0])
        found = model(torch.randn(2))
        point = found["inside"]
        assert type(point) is Point
        [output] = point.rest
        assert type(output) is outputs.BaseModelOutput
        for one in (found["here"], point.first, output[0], output.hidden_states[0]):
            assert one.requires_grad

    def test_a_dict_that_the_model_gets(self):
        class FromDict(nn.Linear):
            def forward(self, batch):
                assert batch["x"].requires_grad
                return super().forward(batch["x"])

        model = FromDict(2, 2)
        disha.enable_input_gradients(model)
        model({"x": torch.randn(2)})

    def test_values_and_flags_stay(self):
        model = adapted()
        flags = [p.requires_grad for p in model.parameters()]
        expected = model(TOKENS)
        with disha.enable_input_gradients(model):
            assert torch.equal(model(TOKENS), expected)
            assert [p.requires_grad for p in model.parameters()] == flags

    def test_removal_is_complete_and_can_be_repeated(self):
        model = adapted()
        handle = disha.enable_input_gradients(model)
        assert model.embed(TOKENS).requires_grad
        with handle:
            assert model.embed(TOKENS).requires_grad
        handle.remove()
        assert not model.embed(TOKENS).requires_grad
        assert not any(module._forward_hooks for module in model.modules())
        assert not any(module._forward_pre_hooks for module in model.modules())

    def test_by_name_and_beside_what_is_no_tensor(self):
        class Picky(nn.Module):
            def forward(self, x, *, mask, note):
                assert x.requires_grad
                assert mask.dtype == torch.bool
                assert not mask.requires_grad
                assert note == "kept"
                return x

        layer, x = Picky(), torch.randn(2)
        disha.enable_input_gradients(layer)
        layer(x=x, mask=x > 0, note="kept")
        layer(x.clone().requires_grad_(), mask=x > 0, note="kept")

    def test_the_module_may_work_in_place(self):
        """As on any tensor: what requires gradients is no leaf."""

        class InPlace(nn.Module):
            def forward(self, x):
                x += 1.0
                return x.mul_(2.0)

        layer = InPlace()
        disha.enable_input_gradients(layer)
        x = torch.ones(2)
        layer(x).sum().backward()
        assert torch.equal(x, torch.full((2,), 4.0))

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients_it_does_nothing(self, mode):
        model = adapted()
        disha.enable_input_gradients(model)
        with mode():
            assert not model(TOKENS).requires_grad
        with torch.inference_mode():
            x = torch.randn(2, 4, 6)
        layer = nn.Identity()
        disha.enable_input_gradients(layer)
        assert not layer(x).requires_grad  # made in inference mode: it never can

    def test_under_functorch(self):
        layer = nn.Linear(3, 3)
        x = torch.randn(4, 3)
        expected = torch.func.grad(lambda x: layer(x).sum())(x)
        disha.enable_input_gradients(layer)
        assert torch.equal(torch.func.grad(lambda x: layer(x).sum())(x), expected)
        torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))

    def test_what_is_no_module(self):
        with pytest.raises(ArgumentTypeError, match=r"model must be an nn\.Module, got str"):
            disha.enable_input_gradients("model")
        with pytest.raises(ArgumentTypeError, match=r"after must be an nn\.Module, got str"):
            disha.enable_input_gradients(adapted(), ["embed"])
        with pytest.raises(ArgumentError, match=r"after=Linear is not a module of the model"):
            disha.enable_input_gradients(adapted(), nn.Linear(2, 2))


def test_nothing_is_warned_of():
    model = checkpointed(adapted(), True)
    with warnings.catch_warnings(), disha.enable_input_gradients(model):
        warnings.simplefilter("error")
        gradients(model)
