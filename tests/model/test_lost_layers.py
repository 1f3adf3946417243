"""A save names the layers that an adapter had and has no more."""

import copy
import warnings

import pytest
from torch import nn

import disha
from tests.conftest import Tied


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
