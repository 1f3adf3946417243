import pytest
import safetensors.torch
import torch
from torch import nn

import disha
from disha import AdapterStateError, ArgumentError, MergeError
from tests.conftest import Layered, Shared, assert_same, perturb, refused, seed_torch


@pytest.fixture
def adapted(model):
    return perturb(disha.inject_adapters(model, "proj", 2, also_train=r"norm\.weight"))


def fresh():
    seed_torch(0)
    return disha.inject_adapters(Layered(), "proj", 2, also_train=r"norm\.weight")


class TestFilter:
    def test_same_keys_and_same_memory_as_the_models(self, adapted):
        state, whole = disha.adapter_state_dict(adapted), adapted.state_dict()
        assert list(state) == [key for key in whole if "disha" in key or "norm.weight" in key]
        assert all(state[key].data_ptr() == whole[key].data_ptr() for key in state)
        assert not any(value.requires_grad for value in state.values())

    def test_torch_save_and_load_state_dict_work_with_it(self, adapted, tokens, tmp_path):
        torch.save(disha.adapter_state_dict(adapted), tmp_path / "state")
        other, state = fresh(), torch.load(tmp_path / "state", weights_only=True)
        assert not other.load_state_dict(state, strict=False).unexpected_keys
        assert torch.equal(other(tokens), adapted(tokens))

    @pytest.mark.parametrize("wrapped", [False, True])
    def test_a_scale_that_has_changed_comes_along(self, adapted, tokens, wrapped):
        disha.set_adapter_scale(adapted, 0.5)
        expected = adapted(tokens)
        source = nn.DataParallel(adapted) if wrapped else adapted
        state = disha.adapter_state_dict(source)
        loaded = fresh()
        disha.load_adapter_state_dict(loaded, state)
        assert torch.equal(loaded(tokens), expected)
        source.load_state_dict(state, strict=False)
        assert torch.equal(adapted(tokens), expected)

    def test_a_scale_that_is_not_finite_is_refused(self, adapted):
        disha.set_adapter_scale(adapted, 0.5)
        state = disha.adapter_state_dict(adapted)
        [key, *_] = [key for key in state if key.endswith(".scale")]
        with refused(adapted, ArgumentError, f"{key} must be finite"):
            disha.load_adapter_state_dict(adapted, {**state, key: torch.tensor(float("nan"))})

    def test_one_adapter_of_several(self, adapted):
        disha.inject_adapters(adapted, "head", 3, adapter="b", method="bat")
        assert list(disha.adapter_state_dict(adapted, "b")) == ["head.disha.b.bat_block"]
        assert not any(".b." in key for key in disha.adapter_state_dict(adapted))

    def test_shared_module_has_both_its_keys(self):
        model = disha.inject_adapters(Shared(), "first", 2)
        keys = ["first.disha.default.bone_block", "second.disha.default.bone_block"]
        assert list(disha.adapter_state_dict(model)) == keys
        disha.load_adapter_state_dict(model, disha.adapter_state_dict(model))

    def test_unknown_adapter(self, model):
        with pytest.raises(ArgumentError, match="no adapter 'default'; it has none"):
            disha.adapter_state_dict(model)

    @pytest.mark.parametrize(("flattened", "name"), [(True, "the model"), (False, "inner")])
    def test_a_block_that_was_flattened_or_taken_out(self, flattened, name):
        layer = nn.Linear(4, 6)
        model = layer if flattened else nn.ModuleDict({name: layer})
        block = disha.inject_adapters(model, "all-linear", 2) and layer.disha["default"]
        flat = nn.Parameter(block.block.detach().flatten())
        block._parameters[block.parameter_name] = flat if flattened else None
        says = f"^the block of {name} or its weight is missing or flattened.*fully_shard"
        with pytest.raises(AdapterStateError, match=says):
            disha.adapter_state_dict(model)

    def test_a_state_dict_of_its_own_that_lacks_the_parameters(self):
        class Copying(nn.Sequential):
            def state_dict(self, *args, **kwargs):
                return {key: value.clone() for key, value in super().state_dict().items()}

        model = disha.inject_adapters(Copying(nn.Linear(4, 6)), "0", 2)
        says = r"lacks 0\.bone_block.*state_dict of its own.*use save_adapter and load_adapter"
        with pytest.raises(AdapterStateError, match=says):
            disha.adapter_state_dict(model)
        with pytest.raises(AdapterStateError, match=says):
            disha.load_adapter_state_dict(model, model.state_dict(), strict=False)


class TestLoad:
    def test_round_trip(self, adapted, tokens):
        other = fresh()
        report = disha.load_adapter_state_dict(other, disha.adapter_state_dict(adapted))
        assert report.complete
        assert list(report.matched) == list(disha.adapter_state_dict(adapted))
        assert torch.equal(other(tokens), adapted(tokens))

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
    @pytest.mark.parametrize("strict", [True, False])
    def test_two_keys_of_one_parameter_are_refused(self, adapted, prefix, strict):
        own = disha.adapter_state_dict(adapted)
        key = next(iter(own))
        for state in ({**own, prefix + key: own[key]}, {prefix + key: own[key], **own}):
            with refused(adapted, AdapterStateError, f"has '{key}' twice"):
                disha.load_adapter_state_dict(adapted, state, strict=strict)

    def test_a_child_that_has_the_name_of_a_wrappers(self):
        model = nn.ModuleDict(
            {"fc": nn.Linear(4, 4), "module": nn.ModuleDict({"fc": nn.Linear(4, 4)})}
        )
        disha.inject_adapters(model, "fc", 2, init="kaiming")
        assert disha.load_adapter_state_dict(model, disha.adapter_state_dict(model)).complete
        one = {"fc.disha.default.bone_block": torch.zeros(2, 4)}
        disha.load_adapter_state_dict(model, one, strict=False)
        assert [bool(block.any()) for block in disha.adapter_parameters(model)] == [False, True]

    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
    def test_buffers_in_a_child_that_has_the_name_of_a_wrappers(self, prefix):
        def made():
            norms = {"norm": nn.BatchNorm1d(4), "module": nn.Sequential(nn.BatchNorm1d(4))}
            model = nn.ModuleDict({"fc": nn.Linear(4, 4), **norms})
            return disha.inject_adapters(model, "fc", 2)

        model, other = made(), made()
        model["module"](torch.randn(5, 4))
        state = {prefix + key: value for key, value in disha.adapter_state_dict(model).items()}
        assert disha.load_adapter_state_dict(other, state).complete
        assert_same(other["module"].state_dict(), model["module"].state_dict())

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
    def test_keys_of_a_wrapped_model(self, adapted, tokens, prefix):
        state = {prefix + key: value for key, value in disha.adapter_state_dict(adapted).items()}
        other = fresh()
        assert disha.load_adapter_state_dict(other, state).complete
        assert torch.equal(other(tokens), adapted(tokens))

    def test_into_a_compiled_model(self, adapted, tokens):
        other = fresh()
        compiled = torch.compile(other, backend="eager")
        disha.load_adapter_state_dict(compiled, disha.adapter_state_dict(adapted))
        assert torch.allclose(compiled(tokens), adapted(tokens), atol=1e-6)

    def test_everything_that_is_wrong_is_reported_together(self, adapted):
        state = disha.adapter_state_dict(adapted)
        first, second, third, fourth, *_ = state
        del state[first]
        state[second] = state[second][:1]
        state[third] = torch.full_like(state[third], float("nan"))
        state[fourth] = state[fourth].to(torch.int32)
        state["other.bone_block"] = torch.zeros(1)
        other = fresh()
        with refused(other, AdapterStateError) as caught:
            disha.load_adapter_state_dict(other, state)
        text = str(caught.value)
        assert f"missing: {first}" in text
        assert "unexpected: other.bone_block" in text
        assert f"wrong: {second} has the shape (1, 8), must be (2, 8)" in text
        assert f"wrong: {third} holds values that are not finite" in text
        assert f"wrong: {fourth} has dtype torch.int32, must be floating-point" in text
        assert isinstance(caught.value, ValueError)

    def test_not_strict_loads_what_fits(self, adapted):
        state = disha.adapter_state_dict(adapted)
        first, *rest = state
        value = state.pop(first)
        state["extra"] = value
        other = fresh()
        report = disha.load_adapter_state_dict(other, state, strict=False)
        assert report.missing == (first,)
        assert report.unexpected == ("extra",)
        assert report.matched == tuple(rest)
        loaded = other.state_dict()
        assert all(torch.equal(loaded[key], state[key]) for key in rest)
        assert not loaded[first].any()

    def test_not_strict_still_refuses_wrong_shapes(self, adapted):
        state = {key: value[:1] for key, value in disha.adapter_state_dict(adapted).items()}
        other = fresh()
        with refused(other, AdapterStateError, "has the shape"):
            disha.load_adapter_state_dict(other, state, strict=False)

    def test_a_report_of_as_much_as_is_shown_is_not_cut(self):
        keys = tuple(f"{number}" for number in range(20))
        wrong = tuple((key, "is odd") for key in keys)
        whole = disha.LoadReport(matched=(), missing=keys, unexpected=keys, wrong=wrong)
        lines = str(whole).splitlines()
        assert lines[0] == "0 keys fit"
        assert len(lines) == 1 + 3 * 20
        assert lines[1] == "missing: 0"
        assert lines[-1] == "wrong: 19 is odd"

    def test_a_longer_report_counts_what_it_hides(self):
        keys = tuple(f"{number}" for number in range(23))
        wrong = tuple((key, "is odd") for key in keys[:22])
        lines = str(disha.LoadReport(("a", "b"), keys, keys[:21], wrong)).splitlines()
        assert len(lines) == 1 + 3 * 21
        assert lines[:2] == ["2 keys fit", "missing: 0"]
        assert lines[20:22] == ["missing: 19", "and 3 more"]
        assert lines[42] == "and 1 more"
        assert lines[-2:] == ["wrong: 19 is odd", "and 2 more"]

    def test_what_is_no_state(self, adapted):
        key = next(iter(disha.adapter_state_dict(adapted)))
        nothing = torch.zeros(2, 8, device="meta")
        for value, says in (("x", "is not a tensor but a str"), (nothing, "has no values")):
            with pytest.raises(AdapterStateError, match=f"wrong: {key} {says}"):
                disha.load_adapter_state_dict(adapted, {key: value})

    def test_into_a_model_without_values(self, adapted):
        other = fresh().to("meta")
        with pytest.raises(AdapterStateError, match="can't go into a parameter on the meta device"):
            disha.load_adapter_state_dict(other, disha.adapter_state_dict(adapted))

    def test_while_merged(self, adapted):
        state = {k: v.clone() for k, v in disha.adapter_state_dict(adapted).items()}
        disha.merge_adapters(adapted)
        with refused(adapted, MergeError, "can't load an adapter while adapters are merged"):
            disha.load_adapter_state_dict(adapted, state)


class TestByTorch:
    """`load_state_dict` of the model itself."""

    @pytest.mark.parametrize("write", [torch.save, safetensors.torch.save_file])
    def test_a_state_that_was_taken_while_merged(self, adapted, tokens, tmp_path, write):
        disha.merge_adapters(adapted)
        write(adapted.state_dict(), tmp_path / "state")
        disha.unmerge_adapters(adapted)
        read = torch.load if write is torch.save else safetensors.torch.load_file
        state, expected = read(tmp_path / "state"), adapted(tokens)
        for strict in (True, False):
            with pytest.raises(RuntimeError, match="taken while adapters were merged") as caught:
                adapted.load_state_dict(state, strict=strict)
            assert str(caught.value).count("merged, so") == 1
            assert torch.equal(adapted(tokens), expected)
        plain = Layered()
        plain.load_state_dict(state, strict=False)
        assert torch.allclose(plain(tokens), expected, atol=1e-5)
