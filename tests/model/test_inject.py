import copy
import re

import pytest
import torch
from torch import nn

import disha
from disha import ArgumentError, ArgumentTypeError, DishaError, MergeError, TargetError
from disha.layers.adapted import AdaptedLinear
from tests.conftest import (
    Layered,
    Shared,
    Tied,
    assert_unchanged,
    perturb,
    pickled,
    refused,
    snapshot,
)


def adapted_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, AdaptedLinear)]


class TestForwardsOfInstances:
    """Device hooks set a forward on the instance, which runs the class's own."""

    def test_one_that_calls_the_former(self, model, tokens):
        head, forward = model.head, model.head.forward
        head.forward = lambda x: forward(x)
        before = model(tokens)
        disha.inject_adapters(model, "head", 2)
        assert torch.equal(model(tokens), before)
        perturb(model)
        output = model(tokens)
        assert not torch.allclose(output, before)
        disha.merge_adapters(model)
        assert torch.allclose(model(tokens), output, atol=1e-6)


class TestIdentity:
    def test_objects_hooks_references_and_base_keys_stay(self, model, tokens):
        q_proj = model.layers[0]["attn"].q_proj
        weight, calls = q_proj.weight, []
        q_proj.register_forward_hook(lambda *_: calls.append("forward"))
        q_proj.register_forward_pre_hook(lambda *_: calls.append("pre"))
        model.elsewhere = [q_proj]
        keys = list(model.state_dict())
        disha.inject_adapters(model, "all-linear", 2)
        assert model.layers[0]["attn"].q_proj is q_proj is model.elsewhere[0]
        assert q_proj.base_weight is weight
        assert isinstance(q_proj, nn.Linear)
        assert [key for key in model.state_dict() if "disha" not in key] == keys
        model(tokens)
        assert calls == ["pre", "forward"]

    def test_base_checkpoint_loads_strictly_into_the_adapted_model(self, model):
        state = Layered().state_dict()
        perturb(disha.inject_adapters(model, "all-linear", 2))
        blocks = [p.clone() for p in disha.adapter_parameters(model)]
        result = model.load_state_dict(state, strict=True)
        assert not result.missing_keys
        assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)
        assert all(map(torch.equal, disha.adapter_parameters(model), blocks))

    def test_base_checkpoint_with_a_gap_still_fails_strictly(self, model):
        state = Layered().state_dict()
        del state["head.weight"]
        disha.inject_adapters(model, "all-linear", 2)
        with pytest.raises(RuntimeError, match=r"Missing key.*head\.weight"):
            model.load_state_dict(state, strict=True)

    def test_full_state_dict_round_trip(self, model, tokens):
        perturb(disha.inject_adapters(model, "all-linear", 2))
        other = disha.inject_adapters(Layered(), "all-linear", 2)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(tokens), model(tokens))

    @pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
    def test_copies_keep_adapters_flags_and_the_way_back(self, model, tokens, clone):
        keys = list(model.state_dict())
        perturb(disha.inject_adapters(model, "attn", 2, also_train="norm"))
        twin = clone(model)
        assert torch.equal(twin(tokens), model(tokens))
        perturb(twin, seed=1)
        assert not torch.equal(twin(tokens), model(tokens))
        assert adapted_names(twin) == adapted_names(model)
        disha.remove_adapters(twin)
        assert list(twin.state_dict()) == keys
        assert all(p.requires_grad for p in twin.parameters())
        assert adapted_names(model)


class TestRemove:
    def test_everything_is_as_before(self, model):
        model.embed.weight.requires_grad_(False)
        before = snapshot(model)
        disha.inject_adapters(model, "all-linear", 2, also_train=["norm", "embed"])
        assert model.embed.weight.requires_grad
        disha.inject_adapters(model, "head", 3, adapter="b", method="bat")
        disha.remove_adapters(model)
        assert_unchanged(model, before)

    def test_one_of_two_leaves_the_other(self, model, tokens):
        perturb(disha.inject_adapters(model, "q_proj", 2, adapter="a"))
        alone = model(tokens)
        disha.inject_adapters(model, "proj", 2, adapter="b")
        disha.set_active_adapters(model, ["a", "b"])
        disha.remove_adapters(model, "b")
        assert adapted_names(model) == ["layers.0.attn.q_proj", "layers.1.attn.q_proj"]
        assert torch.equal(model(tokens), alone)
        assert not model.head.weight.requires_grad

    def test_the_other_is_made_active_after_the_active_one_is_removed(self, model, tokens):
        perturb(disha.inject_adapters(model, "q_proj", 2, adapter="a"))
        alone = model(tokens)
        disha.inject_adapters(model, "proj", 2, adapter="b")
        disha.remove_adapters(model, "b")
        disha.set_active_adapters(model, "a")
        assert torch.equal(model(tokens), alone)

    def test_unknown_adapter(self, model):
        disha.inject_adapters(model, "head", 2)
        with refused(model, ArgumentError, "no adapter 'x'; it has 'default'"):
            disha.remove_adapters(model, "x")

    def test_layer_with_an_adapter_from_birth(self):
        layer = disha.BoneLinear(4, 3, r=2)
        disha.remove_adapters(layer)
        assert type(layer) is nn.Linear
        assert layer.weight.requires_grad
        assert list(layer.state_dict()) == ["weight", "bias"]


class TestTraining:
    def test_only_blocks_and_also_train_require_gradients(self, model, tokens):
        disha.inject_adapters(model, "q_proj", 2, also_train=r"layers\.1.*norm\.weight")
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained == [
            "layers.0.attn.q_proj.disha.default.bone_block",
            "layers.1.attn.q_proj.disha.default.bone_block",
            "layers.1.attn.norm.weight",
        ]
        model(tokens).square().sum().backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == set(trained)

    def test_freeze_false_leaves_flags_alone(self, model):
        model.head.weight.requires_grad_(False)
        disha.inject_adapters(model, "q_proj", 2, freeze=False)
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        assert frozen == ["head.weight"]

    def test_second_adapter_leaves_what_the_first_trains(self, model):
        disha.inject_adapters(model, "q_proj", 2, adapter="a", also_train="norm.weight")
        disha.inject_adapters(model, "q_proj", 3, adapter="b", method="bat")
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert {name for name in trained if "norm" in name} == {
            "layers.0.attn.norm.weight",
            "layers.1.attn.norm.weight",
        }
        assert all(p.requires_grad for p in disha.adapter_parameters(model))
        assert model.layers[0]["attn"].q_proj.disha.active == ("b",)

    def test_second_adapter_becomes_active_everywhere(self, model, tokens):
        base = model(tokens)
        perturb(disha.inject_adapters(model, "q_proj", 2, adapter="a"))
        assert not torch.equal(model(tokens), base)
        disha.inject_adapters(model, "head", 2, adapter="b")
        assert torch.equal(model(tokens), base)

    def test_a_removed_adapter_trains_nothing_any_more(self, model):
        disha.inject_adapters(model, "head", 2, adapter="a", also_train="norm.weight")
        disha.inject_adapters(model, "head", 2, adapter="b")
        disha.remove_adapters(model, "a")
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained == ["head.disha.b.bone_block"]
        disha.inject_adapters(model, "head", 2, adapter="c", also_train="norm.weight")
        disha.remove_adapters(model)
        assert all(p.requires_grad for p in model.parameters())

    def test_patterns_match_any_name_of_what_is_shared_or_tied(self):
        model = disha.inject_adapters(Tied(), "q_proj", 2, also_train=r"^head\.weight$")
        assert model.embed.weight.requires_grad
        shared = disha.inject_adapters(Shared(), "first", 4, rank_pattern={"second": 2})
        assert shared.first.disha["default"].r == 2
        chosen = disha.plan_adapters(Shared(), lambda name, _: name == "second", 2)
        assert [one.names for one in chosen.layers] == [("first", "second")]

    def test_mark_only_adapters_trainable(self, model):
        disha.inject_adapters(model, "q_proj", 2, freeze=False, also_train="norm.bias")
        for block in disha.adapter_parameters(model):
            block.requires_grad_(False)
        disha.mark_only_adapters_trainable(model)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained == [
            "layers.0.attn.q_proj.disha.default.bone_block",
            "layers.0.attn.norm.bias",
            "layers.1.attn.q_proj.disha.default.bone_block",
            "layers.1.attn.norm.bias",
        ]

    def test_mark_refuses_a_plain_model(self, model):
        with refused(model, ArgumentError, r"^the model has no adapter, so nothing"):
            disha.mark_only_adapters_trainable(model)

    def test_adapter_parameters_are_all_that_trains_and_is_saved(self, model, tokens):
        disha.inject_adapters(model, "q_proj", 2, also_train="norm")
        disha.inject_adapters(model, "q_proj", 2, adapter="b", also_train="head.weight")
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {id(p) for p in disha.adapter_parameters(model)} == {id(p) for p in trained}
        of_b = list(disha.adapter_parameters(model, "b"))
        saved = disha.adapter_state_dict(model, "b").values()
        assert {p.data_ptr() for p in of_b} == {tensor.data_ptr() for tensor in saved}
        blocks = torch.optim.SGD([p for p in trained if p.dim() == 2])
        report = disha.check_adapters(model, tokens, optimizer=blocks)
        norms = [f"layers.{n}.attn.norm.{p}" for n in range(2) for p in ("weight", "bias")]
        assert not report.ok
        assert list(report.untrained) == norms
        assert "the optimizer lacks 4 parameters that should train" in str(report)
        complete = torch.optim.SGD(disha.adapter_parameters(model))
        assert disha.check_adapters(model, tokens, optimizer=complete).ok

    def test_adapter_parameters_of_a_whole_of_which_a_part_was_adapted(self):
        whole = nn.ModuleDict({"embed": nn.Embedding(4, 4), "part": nn.Sequential(nn.Linear(4, 4))})
        whole["part"].append(nn.Linear(4, 4, bias=False))
        whole["part"][1].weight = whole["embed"].weight
        disha.inject_adapters(whole["part"], "0", 2, also_train="1.weight")
        trained = {id(p) for p in disha.adapter_parameters(whole)}
        assert trained == {id(p) for p in whole["part"].parameters() if p.requires_grad}
        assert id(whole["embed"].weight) in trained

    def test_adapter_parameters_of_one_and_of_all(self, model):
        disha.inject_adapters(model, "q_proj", 2, adapter="a")
        disha.inject_adapters(model, "head", 2, adapter="b")
        assert [tuple(p.shape) for p in disha.adapter_parameters(model, "b")] == [(2, 12)]
        assert len(list(disha.adapter_parameters(model))) == 3
        with pytest.raises(ArgumentError, match="it has 'a', 'b'"):
            disha.adapter_parameters(model, "c")

    def test_adapter_parameters_can_be_read_twice(self, model, tokens):
        disha.inject_adapters(model, "q_proj", 2)
        parameters = disha.adapter_parameters(model)
        torch.optim.AdamW(parameters)
        model(tokens).sum().backward()
        assert torch.nn.utils.clip_grad_norm_(parameters, 1.0) > 0


class ReadOnly(nn.Module):
    """Refuses new attributes once it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.__dict__["sealed"] = True

    def __setattr__(self, name, value):
        if self.__dict__.get("sealed"):
            raise AttributeError(f"{name} is read-only")
        super().__setattr__(name, value)


def test_read_only_modules_are_adapted_and_restored():
    model = ReadOnly()
    before = snapshot(model)
    disha.inject_adapters(model, "linear", 2, also_train="bias")
    disha.remove_adapters(model)
    assert_unchanged(model, before)


class WrappedByParallel(nn.DataParallel):
    """DataParallel without devices: only its place in the tree matters."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "kind", "says"),
        [
            (("k_proj", 2), TargetError, r"'k_proj'.*nearest names are .*q_proj"),
            (("layer.0.attn.q_prj", 2), TargetError, "'layers.0.attn.q_proj'"),
            (("norm", 2), TargetError, "only modules that can't be adapted.*LayerNorm"),
            ((["q_proj", "v_prj"], 2), ArgumentError, "target_regex 'v_prj' matches nothing in"),
            (("(", 2), ArgumentError, "not a valid regex"),
            ((3, 2), ArgumentTypeError, "target_regex must be a regex"),
            (("head", 0), ArgumentError, "r must be at least 1"),
            (("head", 9), ArgumentError, "head: r=9 is larger than in_features=8.*rank_pattern"),
        ],
    )
    def test_bad_target_or_r(self, model, arguments, kind, says):
        with refused(model, kind, says) as caught:
            disha.inject_adapters(model, *arguments)
        assert isinstance(caught.value, (ValueError, TypeError))

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ({"method": "dora"}, "unknown method 'dora'"),
            ({"adapter": ""}, "not be empty"),
            ({"adapter": "a.b"}, "can.t name an adapter"),
            ({"adapter": "taken"}, "has an adapter 'taken' already"),
            (
                {"r_out": 5},
                "head: r_out=5 does not divide out_features=12.*or an `r_out` that divides",
            ),
            ({"exclude": "layers.7"}, "exclude 'layers.7' matches nothing"),
            ({"exclude": ["q_proj", "nope"]}, "exclude 'nope' matches"),
            ({"rank_pattern": {"mlp": 2}}, "rank_pattern 'mlp' matches nothing in the model"),
            ({"rank_pattern": {"q_proj": 9}}, "q_proj and 1 more: r=9 is larger"),
            ({"also_train": "scale"}, "also_train 'scale' matches nothing"),
        ],
    )
    def test_bad_options(self, model, arguments, says):
        disha.inject_adapters(model, "v_proj", 2, adapter="taken")
        with refused(model, DishaError, says):
            disha.inject_adapters(model, "all-linear", 2, **arguments)

    @pytest.mark.parametrize(
        ("word", "says"),
        [
            (
                {"target_modules": ["head"]},
                "there is no argument target_modules; write target_regex",
            ),
            ({"lora_alpha": 4}, "write scale, which is lora_alpha / r"),
            ({"target": "head", "target_regex": "head"}, "unexpected keyword argument 'target'"),
            ({"target_regex": "head", "methods": "bat"}, "unexpected keyword argument 'methods'"),
            ({}, "missing 1 required positional argument: 'target_regex'"),
        ],
    )
    def test_words_of_peft_and_of_nobody(self, model, word, says):
        with pytest.raises(TypeError, match=says):
            disha.inject_adapters(model, r=2, **word)

    def test_target_is_what_a_plan_and_the_command_call_it(self, model):
        assert disha.plan_adapters(model, target="v_proj", r=2).config.target == "v_proj"
        disha.inject_adapters(model, target="v_proj", r=2)
        assert all("v_proj" in layer.name for layer in disha.summary(model).layers)

    def test_a_model_without_any_adaptable_layer(self):
        with pytest.raises(TargetError, match="no layer that can be adapted"):
            disha.inject_adapters(nn.Sequential(nn.ReLU()), "all-linear", 2)

    def test_what_is_no_model(self):
        with pytest.raises(ArgumentTypeError, match=r"nn\.Module, got dict"):
            disha.inject_adapters({}, "all-linear", 2)

    def test_a_model_wrapped_for_distribution(self, model):
        wrapped = WrappedByParallel(model)
        with refused(wrapped, TargetError, "inject first, then wrap"):
            disha.inject_adapters(wrapped, "all-linear", 2)

    def test_injecting_and_removing_while_merged(self, model):
        disha.inject_adapters(model, "head", 2)
        disha.merge_adapters(model)
        with refused(model, MergeError, "unmerge_adapters"):
            disha.inject_adapters(model, "q_proj", 2, adapter="b")
        with refused(model, MergeError, r"can't remove adapters while.*unmerge_adapters"):
            disha.remove_adapters(model)

    @pytest.mark.parametrize("adapter", [None, "default"])
    def test_removing_from_a_layer_whose_class_was_changed(self, model, adapter):
        disha.inject_adapters(model, "proj", 2)
        layer = model.layers[1]["attn"].v_proj
        layer.__class__ = type("Changed", (type(layer),), {})
        with refused(model, ArgumentError, r"^layers\.1\.attn\.v_proj has become a Changed"):
            disha.remove_adapters(model, adapter)

    def test_removing_from_a_wrapped_model_says_what_to_do(self, model):
        wrapped = WrappedByParallel(disha.inject_adapters(model, "proj", 2))
        says = r"can't remove adapters: .*; remove them before wrapping \(of DDP, .* off with set_a"
        with pytest.raises(TargetError, match=says):
            disha.remove_adapters(wrapped)

    def test_a_model_that_is_a_layer_itself(self, tmp_path):
        with pytest.raises(TargetError, match=r"'head' selects no layer that can be adapted$"):
            disha.inject_adapters(nn.Linear(4, 4), "head", 2)
        disha.save_adapter(disha.inject_adapters(Layered(), "head", 2), tmp_path / "a")
        with pytest.raises(disha.AdapterFileError, match=r"head: the model has no such layer$"):
            disha.load_adapter(nn.Linear(4, 4), tmp_path / "a")


def test_everything_behind_a_parameter_that_can_not_train_is_frozen(model):
    wrapped = nn.Module()
    wrapped.table = nn.Parameter(torch.arange(3), requires_grad=False)
    wrapped.inner = model
    disha.inject_adapters(wrapped, "head", 2, also_train="norm")
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    norms = {f"inner.layers.{n}.attn.norm.{p}" for n in range(2) for p in ("weight", "bias")}
    assert trained == {"inner.head.disha.default.bone_block", *norms}


def test_complex_parameters_are_frozen_too(model):
    """As in layers that multiply a spectrum. They can't train with an adapter."""
    model.spectrum = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    disha.inject_adapters(model, "head", 2)
    assert not model.spectrum.requires_grad
    model.spectrum.requires_grad_(True)
    disha.mark_only_adapters_trainable(model)
    assert not model.spectrum.requires_grad
    disha.remove_adapters(model)
    assert model.spectrum.requires_grad


def test_error_messages_name_no_internal(model):
    with pytest.raises(TargetError) as caught:
        disha.inject_adapters(model, "nothing_like_it", 2)
    assert not re.search(r"Layered|object at", str(caught.value))


@pytest.mark.parametrize("name", ["train", "training", "active", "state_dict", "_modules"])
def test_an_adapter_may_have_the_name_of_an_attribute(name, tmp_path):
    model, x = nn.Sequential(nn.Linear(6, 8)), torch.randn(3, 6)
    disha.inject_adapters(model, "0", 2, adapter=name, init="kaiming")
    expected = model.train().eval()(x)
    for other in (copy.deepcopy(model), pickled(model)):
        assert torch.equal(other(x), expected)
    disha.save_adapter(model, tmp_path, name)
    disha.load_adapter(model, tmp_path, name, replace=True)
    model.load_state_dict(model.double().float().state_dict())
    with disha.route_adapters(model, [name, None, name]):
        assert torch.allclose(model(x)[::2], expected[::2])
    disha.remove_adapters(model, name)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
