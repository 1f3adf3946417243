"""A save names the layers that an adapter had and has no more."""

import copy
import warnings

import pytest
import torch
from torch import nn

import disha
from disha.model.view import ModelView
from tests.conftest import Tied, perturb, pickled


def replace_head(model):
    """Put a larger head in the place of the adapted one, as for new tokens."""
    former = model.head
    model.head = nn.Linear(former.in_features, former.out_features + 1, bias=False)
    return model


SAYS = r"lacks 1 layer that it was injected into: head\. Replacing a module, as resize_token_emb"


def save_silently(model, path, adapter="default"):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        disha.save_adapter(model, path, adapter)


def test_a_replaced_layer_is_named(model, tmp_path):
    replace_head(disha.inject_adapters(model, "all-linear", 2))
    model.head.requires_grad_(False)
    with pytest.warns(UserWarning, match=SAYS):
        disha.save_adapter(model, tmp_path)


def test_a_head_that_transformers_has_resized_is_named(tmp_path):
    pytest.importorskip("transformers")
    from tests import language_models

    llama = language_models.llama(tie_word_embeddings=False)
    disha.inject_adapters(llama, "q_proj|lm_head", 2)
    llama.resize_token_embeddings(llama.config.vocab_size + 8, mean_resizing=False)
    disha.mark_only_adapters_trainable(llama)
    with pytest.warns(UserWarning, match=r"injected into: lm_head\."):
        disha.save_adapter(llama, tmp_path)


def test_it_is_named_of_a_loaded_adapter_too(model, tmp_path):
    disha.save_adapter(disha.inject_adapters(model, "all-linear", 2), tmp_path)
    loaded = disha.remove_adapters(copy.deepcopy(model))
    disha.load_adapter(loaded, tmp_path)
    replace_head(loaded).head.requires_grad_(False)
    with pytest.warns(UserWarning, match=SAYS):
        disha.save_adapter(loaded, tmp_path)


def test_it_is_named_in_a_copy_and_below_another_module(model, tmp_path):
    outer = nn.ModuleDict({"inner": copy.deepcopy(disha.inject_adapters(model, "all-linear", 2))})
    replace_head(outer["inner"]).head.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"injected into: inner\.head\."):
        disha.save_adapter(outer, tmp_path)


def test_a_complete_adapter_is_saved_in_silence(model, tmp_path):
    save_silently(disha.inject_adapters(model, "all-linear", 2), tmp_path)


def test_a_tied_weight_counts_once(tmp_path):
    save_silently(disha.inject_adapters(Tied(), "embed|proj", 2), tmp_path)


def test_a_part_of_a_model_is_saved_in_silence(model, tmp_path):
    disha.inject_adapters(model, "all-linear", 2)
    save_silently(model.layers, tmp_path)


def test_a_removed_adapter_is_forgotten(model, tmp_path):
    disha.inject_adapters(model, "all-linear", 2)
    disha.remove_adapters(model)
    assert not [name for name in vars(model) if "disha" in name]
    save_silently(disha.inject_adapters(model, "q_proj", 2), tmp_path)


def test_the_name_of_a_removed_adapter_is_kept_nowhere(model):
    disha.inject_adapters(model, "all-linear", 2, adapter="a")
    disha.inject_adapters(model, "all-linear", 2, adapter="b")
    disha.remove_adapters(model, "b")
    (memory,) = ModelView(model).memories
    assert memory.state.adapters == {"a"}


def two_parts():
    """A model with a body that has a batch norm, and a head."""
    return nn.ModuleDict(
        {"body": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "head": nn.Linear(4, 2)}
    )


def flags(model):
    return {name: p.requires_grad for name, p in model.named_parameters() if "disha" not in name}


@pytest.fixture
def parts():
    model = two_parts()
    model.body[1].bias.requires_grad_(False)
    return disha.inject_adapters(model, "all-linear", 2)


class TestParts:
    """A call on a part does what its name says for that part, and leaves the rest as it was."""

    def test_removal_leaves_the_base_frozen_until_the_last_adapter_goes(self, parts):
        disha.remove_adapters(parts.head)
        assert type(parts.head) is nn.Linear
        assert not any(flags(parts).values())
        assert list(disha.adapter_state_dict(parts)) == ["body.0.disha.default.bone_block"]
        disha.remove_adapters(parts)
        assert [name for name, flag in flags(parts).items() if not flag] == ["body.1.bias"]

    def test_the_last_part_restores_the_flags_that_it_reaches(self, parts):
        disha.remove_adapters(parts.head)
        disha.remove_adapters(parts.body)
        assert flags(parts.body) == {
            "0.weight": True,
            "0.bias": True,
            "1.weight": True,
            "1.bias": False,
        }

    def test_unloading_a_part_keeps_the_rest(self, parts):
        perturb(parts)
        x = torch.randn(3, 4)
        parts.eval()
        expected = parts.head(parts.body(x))
        disha.merge_adapters(parts.body, unload=True)
        assert type(parts.body[0]) is nn.Linear
        assert not any(flags(parts).values())
        torch.testing.assert_close(parts.head(parts.body(x)), expected)

    def test_unloading_a_part_keeps_what_the_buffers_of_the_rest_were(self, parts):
        parts.body[1].running_mean.fill_(2.0)
        disha.merge_adapters(parts.head, unload=True)
        disha.remove_adapters(parts)
        assert not parts.body[1].running_mean.any()

    def test_a_part_is_saved_with_its_buffers_and_lost_layers(self, parts, tmp_path):
        parts.body[1].running_mean.fill_(2.0)
        assert "1.running_mean" in disha.adapter_state_dict(parts.body)
        parts.body[0] = nn.Linear(4, 4).requires_grad_(False)
        with pytest.raises(disha.DishaError, match="no adapter"):
            disha.save_adapter(parts.body, tmp_path)

    @pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
    def test_copies_of_the_whole_and_of_a_part_remember(self, parts, copied):
        whole = disha.remove_adapters(copied(parts))
        assert [name for name, flag in flags(whole).items() if not flag] == ["body.1.bias"]
        body = copied(parts.body)
        body[1].running_mean.fill_(2.0)
        disha.remove_adapters(body)
        assert flags(body)["1.bias"] is False
        assert flags(body)["0.weight"] is True
        assert not body[1].running_mean.any()

    def test_marking_a_model_of_which_a_part_was_adapted_alone(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        disha.inject_adapters(model[0], "all-linear", 2)
        disha.mark_only_adapters_trainable(model)
        assert not any(flags(model).values())
        assert all(flags(disha.remove_adapters(model)).values())

    def test_a_model_that_is_put_into_another_one(self, parts):
        outer = nn.ModuleDict({"net": parts, "extra": nn.Linear(2, 2)})
        disha.inject_adapters(outer, "extra", 2, adapter="more")
        disha.remove_adapters(outer)
        assert [name for name, flag in flags(outer).items() if not flag] == ["net.body.1.bias"]

    def test_a_part_that_got_adapters_first(self):
        model = two_parts()
        model.body[1].bias.requires_grad_(False)
        disha.inject_adapters(model.body, "0", 2)
        disha.inject_adapters(model, "head", 2, adapter="whole")
        assert len({layer.disha.memory for layer in (model.body[0], model.head)}) == 1
        disha.remove_adapters(model)
        assert [name for name, flag in flags(model).items() if not flag] == ["body.1.bias"]

    def test_a_part_into_which_a_part_of_another_model_is_put(self, parts, tmp_path):
        other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        other[0].bias.requires_grad_(False)
        parts.body.append(disha.inject_adapters(other, "all-linear", 2)[0])
        disha.inject_adapters(parts.body, "0", 2, adapter="more")
        save_silently(parts, tmp_path)
        disha.remove_adapters(parts)
        frozen = [name for name, flag in flags(parts).items() if not flag]
        assert frozen == ["body.1.bias", "body.2.bias"]

    def test_a_list_that_has_lost_modules(self):
        layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3))
        layers[2][1].bias.requires_grad_(False)
        model = disha.inject_adapters(nn.ModuleDict({"layers": layers}), r"\.0$", 2)
        model.layers = nn.ModuleList([layers[0], layers[2]])
        disha.remove_adapters(model)
        assert [name for name, flag in flags(model).items() if not flag] == ["layers.1.1.bias"]

    def test_what_is_beside_a_list_whose_adapted_modules_have_moved(self):
        layers = nn.ModuleList([nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4)])
        layers[0].running_mean.fill_(5.0)
        model = nn.ModuleDict({"body": nn.ModuleDict({"layers": layers}), "norm": nn.LayerNorm(4)})
        disha.inject_adapters(model, r"\.2$", 2, also_train="norm")
        disha.inject_adapters(model, r"\.2$", 2, adapter="more")
        model.body.layers = nn.ModuleList([nn.BatchNorm1d(4), *layers])
        model.body.layers[0].running_mean.fill_(2.0)
        assert len(disha.adapter_parameters(model, "more")) == 3
        disha.remove_adapters(model)
        assert flags(model)["norm.weight"]
        assert model.body.layers[0].running_mean[0] == 2.0

    @pytest.mark.parametrize("call", [disha.remove_adapters, disha.merge_adapters])
    @pytest.mark.parametrize("part", ["embed", "head"])
    def test_half_of_a_tied_weight_is_refused(self, call, part):
        model = disha.inject_adapters(Tied(), "embed|head", 2)
        with pytest.raises(disha.AdapterStateError, match=r"tied to .* pass the complete model"):
            call(getattr(model, part))
        call(model)

    def test_half_of_a_tied_weight_is_refused_in_another_model_too(self):
        tied = disha.inject_adapters(Tied(), "embed|head", 2)
        model = nn.ModuleDict({"reader": tied.embed, "writer": tied.head, "body": nn.Linear(4, 4)})
        disha.inject_adapters(model, "body", 2, adapter="more")
        with pytest.raises(disha.AdapterStateError, match="is tied to writer"):
            disha.remove_adapters(model.reader)
        disha.remove_adapters(model)

    def test_a_module_with_many_names_ends(self):
        model = nn.Linear(4, 4)
        for _ in range(40):
            model = nn.ModuleList([model, model])
        disha.remove_adapters(disha.inject_adapters(model, "0$", 2))


def test_one_layer_of_an_encoder_takes_a_padded_batch():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
    encoder = encoder.eval()
    perturb(disha.inject_adapters(encoder.layers[1], "all-linear", 2))
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        nested = encoder(x, src_key_padding_mask=mask)
        encoder.use_nested_tensor = False
        plain = encoder(x, src_key_padding_mask=mask)
    torch.testing.assert_close(nested, plain.masked_fill(mask.unsqueeze(-1), 0.0))


class TestNames:
    """The state knows a model by the names of its last change."""

    def test_a_tie_over_the_edge_of_a_part_outlives_a_change_of_the_part(self):
        model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "dec": nn.ModuleDict()})
        model.dec["head"] = nn.Linear(4, 6, bias=False)
        model.dec["head"].weight = model.embed.weight
        disha.inject_adapters(model, "embed|head", 2)
        model.dec["extra"] = nn.Linear(4, 4)
        disha.inject_adapters(model.dec, "extra", 2, adapter="b")
        with pytest.raises(disha.AdapterStateError, match="pass the complete model"):
            disha.merge_adapters(model.dec, "default")

    def test_a_module_that_took_the_index_of_a_lost_one_keeps_its_flags(self):
        layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3))
        layers[2][1].bias.requires_grad_(False)
        model = disha.inject_adapters(nn.ModuleDict({"layers": layers}), r"\.0$", 2)
        del model.layers[1]
        disha.inject_adapters(model, r"\.0$", 2, adapter="b")
        disha.remove_adapters(model)
        assert [name for name, flag in flags(model).items() if not flag] == ["layers.1.1.bias"]

    def test_copies_of_a_layer_in_one_list_are_all_unfrozen(self):
        model = disha.inject_adapters(nn.ModuleList([nn.Sequential(nn.Linear(4, 4))]), "0.0", 2)
        copies = nn.ModuleList(copy.deepcopy(model[0]) for _ in range(3))
        assert all(flags(disha.remove_adapters(copies)).values())

    def test_a_copy_of_one_side_of_a_tie_is_a_model_of_its_own(self):
        model = disha.inject_adapters(Tied(), "embed|head", 2)
        for layer in (copy.deepcopy(model.head), copy.deepcopy(model.embed)):
            assert not isinstance(disha.remove_adapters(layer), disha.AdaptedLayer)

    def test_two_adapters_of_a_tie_are_copied_once(self):
        model = disha.inject_adapters(Tied(), "head", 2, adapter="a")
        disha.inject_adapters(model, "head", 2, adapter="b")
        copied = copy.deepcopy(model)
        for name in "ab":
            keys = disha.adapter_state_dict(copied, name).keys()
            assert keys == disha.adapter_state_dict(model, name).keys()

    def test_a_copied_side_of_a_tie_may_have_another_attribute(self):
        class Head(nn.Module):
            def __init__(self, kernel):
                super().__init__()
                self.kernel = kernel

            def forward(self, x):
                return x @ self.kernel.T

        model = nn.ModuleDict({"embed": nn.Embedding(6, 4)})
        model["head"] = Head(model.embed.weight)
        perturb(disha.inject_adapters(model, "embed", 2))
        x = torch.randn(3, 4)
        assert torch.equal(copy.deepcopy(model["head"])(x), model["head"](x))

    def test_a_model_that_was_unloaded_starts_anew(self):
        model = disha.inject_adapters(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "0", 2)
        disha.merge_adapters(model, unload=True)
        model[1].weight.requires_grad_(False)
        disha.remove_adapters(disha.inject_adapters(model, "0", 2))
        assert not model[1].weight.requires_grad
