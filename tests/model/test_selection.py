"""Which weights of a model a target selects."""

import pytest
from torch import nn

import disha
from disha.layers.adapted import AdaptedLinear
from tests.conftest import Shared, Tied
from tests.layers.test_kinds import Gain, Mixed
from tests.reference import METHODS


def adapted_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, AdaptedLinear)]


class TestTargets:
    def test_regex_is_searched_in_dotted_names(self, model):
        disha.inject_adapters(model, r"layers\.1.*(q|v)_proj", 2)
        assert adapted_names(model) == ["layers.1.attn.q_proj", "layers.1.attn.v_proj"]

    def test_any_of_several_names_may_match(self, model, tmp_path):
        disha.inject_adapters(model, ["q_proj", "^head$"], 2)
        names = ["layers.0.attn.q_proj", "layers.1.attn.q_proj", "head"]
        assert adapted_names(model) == names
        disha.save_adapter(model, tmp_path / "a.safetensors")
        file = disha.inspect_adapter(tmp_path / "a.safetensors")
        assert file.config.target == ("q_proj", "^head$")
        both = disha.plan_adapters(Tied(), ["all-linear", "^head$"], 2)
        assert {layer.name for layer in both.layers} >= {"head", "layers.0.attn.q_proj"}

    def test_predicate_gets_name_and_module(self, model):
        disha.inject_adapters(model, lambda name, m: "layers" in name and m.bias is not None
                              if isinstance(m, nn.Linear) else False, 2)  # fmt: skip
        assert adapted_names(model) == ["layers.0.attn.v_proj", "layers.1.attn.v_proj"]

    def test_all_linear_takes_every_linear_layer(self, model):
        disha.inject_adapters(model, "all-linear", 2)
        linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        assert adapted_names(model) == linears
        assert "head" in linears

    def test_all_linear_leaves_a_tied_head_out(self):
        model = disha.inject_adapters(Tied(), "all-linear", 2)
        assert "head" not in adapted_names(model)
        assert len(adapted_names(model)) == 4

    def test_regex_reaches_a_tied_head_when_asked(self):
        assert adapted_names(disha.inject_adapters(Tied(), "^head$", 2)) == ["head"]

    def test_containers_and_weightless_modules_are_no_misses(self, model):
        plan = disha.plan_adapters(model, "layers.0", 2)
        assert [skipped.name for skipped in plan.skipped] == ["layers.0.attn.norm"]

    def test_exclude_leaves_out_with_a_reason(self, model):
        plan = disha.plan_adapters(model, "all-linear", 2, exclude=["head", "layers.0"])
        assert [layer.name for layer in plan.layers] == [
            "layers.1.attn.q_proj",
            "layers.1.attn.v_proj",
        ]
        assert {(s.name, s.reason) for s in plan.skipped} == {
            ("head", "excluded"),
            ("layers.0.attn.q_proj", "excluded"),
            ("layers.0.attn.v_proj", "excluded"),
        }

    def test_patterns_may_name_what_the_target_leaves_out(self):
        options = {"exclude": "head", "rank_pattern": {"embed": 1}}
        plan = disha.plan_adapters(Tied(), "all-linear", 2, **options)
        assert "head" not in [layer.name for layer in plan.layers]

    def test_all_linear_leaves_convolutions_out(self):
        convs = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyConv1d(8, 3)]
        model = nn.Sequential(*convs, nn.Linear(8, 4))
        plan = disha.plan_adapters(model, "all-linear", 2)
        assert [layer.name for layer in plan.layers] == ["4"]
        all_of_them = disha.plan_adapters(model, lambda name, m: "Conv2d" in type(m).__name__, 2)
        assert [layer.name for layer in all_of_them.layers] == ["0", "1"]

    def test_rank_pattern_may_name_a_module_with_several_weights(self):
        model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "lstm": nn.LSTM(8, 8)})
        plan = disha.plan_adapters(model, "all-linear", 4, rank_pattern={"attn$": 2, "^lstm$": 1})
        found = {one.name: one.r for one in plan.layers}
        assert found == {
            **dict.fromkeys(("attn.q_proj", "attn.k_proj", "attn.v_proj"), 2),
            "attn.out_proj": 4,
            **dict.fromkeys(("lstm.weight_ih_l0", "lstm.weight_hh_l0"), 1),
        }

    def test_rank_pattern_gives_layers_their_own_r(self, model):
        disha.inject_adapters(model, "proj", 4, rank_pattern={r"0\.attn\.q": 1, "q_proj": 3})
        ranks = {row.name: row.r for row in disha.summary(model).layers}
        assert ranks == {
            "layers.0.attn.q_proj": 1,
            "layers.0.attn.v_proj": 4,
            "layers.1.attn.q_proj": 3,
            "layers.1.attn.v_proj": 4,
        }

    def test_a_model_that_is_itself_one_linear(self):
        model = nn.Linear(4, 3)
        assert disha.inject_adapters(model, "all-linear", 2) is model
        assert isinstance(model, AdaptedLinear)

    def test_shared_module_is_adapted_once_and_matched_by_any_name(self):
        model = disha.inject_adapters(Shared(), "second", 2)
        assert model.first is model.second
        assert len(list(disha.adapter_parameters(model))) == 1
        assert [row.name for row in disha.summary(model).layers] == ["first"]


def test_all_linear_takes_recurrent_and_bilinear_weights_too():
    plan = disha.plan_adapters(Mixed(), "all-linear", 2)
    names = [layer.name for layer in plan.layers]
    assert names == ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "mix", "proj"]


@pytest.mark.parametrize("method", METHODS)
def test_a_pattern_takes_every_kind_and_says_what_it_can_not_take(method):
    model = nn.Sequential(Mixed(), nn.LayerNorm(4), Gain(4))
    plan = disha.plan_adapters(model, ".", 2, method=method)
    assert {layer.name.removeprefix("0.") for layer in plan.layers} == {
        "embed", "conv", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "mix", "proj"
    }  # fmt: skip
    assert {(s.name, s.reason) for s in plan.skipped} == {
        ("1", "no layer kind adapts LayerNorm"),
        ("2", "no layer kind adapts Gain"),
    }


def test_adapters_of_peft_are_left_alone():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
    plan = disha.plan_adapters(model, "all-linear", 2)
    assert all("lora_" not in one.name for one in plan.layers)
    assert len(plan.layers) == 2
