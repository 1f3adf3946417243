"""Adapters as GGUF files of a LoRA, read back by the package `gguf`.

B A, scaled as llama.cpp does, must be dW as converters store a base model's weights.
`tests/llamacpp` has llama.cpp itself compute with such files.
"""

from __future__ import annotations

import copy
import sys
from contextlib import contextmanager

import gguf
import pytest
import torch
from torch import nn

import disha
from disha.files.contents import adapter_contents, read_contents
from disha.interop import lora
from disha.model import ModelView
from tests.conftest import assert_unchanged, perturb, snapshot
from tests.test_interop_lora import tiny_llama

HEADS, KV_HEADS, LAYERS = 4, 2, 2
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NAMES = {
    f"model.layers.{n}.{ours}": f"blk.{n}.{theirs}"
    for n in range(LAYERS)
    for ours, theirs in PARTS.items()
} | {"lm_head": "output", "model.embed_tokens": "token_embd"}


def adapted(base, target="layers", r=8, **options):
    model = disha.inject_adapters(base, target, r, **options)
    perturb(model)
    return model


def read(path):
    """The file's fields, and its tensors by name."""
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return fields, {one.name: torch.from_numpy(one.data.copy()) for one in reader.tensors}


def updates(path):
    """What llama.cpp adds to each weight: alpha / rank B A, its rank being the size of B."""
    fields, tensors = read(path)
    found = {}
    for name in {name.rpartition(".")[0] for name in tensors}:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        a = a.T if name == "token_embd.weight" else a
        scale = fields["adapter.lora.alpha"] / b.shape[1]
        found[name] = scale * b.double() @ a.double()
    return fields, found


def delta(layer):
    """s dW of a layer, (out, in) and in float64."""
    block = layer.disha["default"]
    dense = layer.delta_weight(block).detach().double()
    return block.scale * (dense.T if isinstance(layer, nn.Embedding) else dense)


def rows_in_gguf(name, weight):
    """The rows of q and k in the order of interleaved rotary embeddings."""
    if not name.endswith(("q_proj", "k_proj")):
        return weight
    heads = HEADS if name.endswith("q_proj") else KV_HEADS
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def check_written(path, model, tolerance=1e-6):
    fields, found = updates(path)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, disha.AdaptedLayer)}
    assert found.keys() == {f"{NAMES[name]}.weight" for name in layers}
    for name, layer in layers.items():
        expected = rows_in_gguf(name, delta(layer))
        actual = found[f"{NAMES[name]}.weight"]
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
    return fields


@contextmanager
def refused(tmp_path, message, *models, kind=disha.ConversionError):
    before = [snapshot(model) for model in models]
    with pytest.raises(kind, match=message):
        yield
    assert list(tmp_path.iterdir()) == []
    for model, was in zip(models, before, strict=True):
        assert_unchanged(model, was)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r_out": 4},
        {"rank_pattern": {"q_proj": 4, "down": 10}},
        {"scale": -2.5, "rank_pattern": {"v_proj": 6}},
        {"scale": 0.0},
        {"dtype": torch.bfloat16},
    ],
    ids=["bone", "tile", "ranks", "scale", "silent", "bf16"],
)
def test_what_is_read_back_is_the_update(tmp_path, options):
    model = adapted(tiny_llama(), "layers|lm_head", **options)
    report = lora.export_gguf(model, tmp_path / "lora.gguf")
    fields = check_written(tmp_path / "lora.gguf", model)
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 8
    assert report.error == 0
    assert len(report.layers) == 7 * LAYERS + 1


def test_an_embedding_with_a_padding_row(tmp_path):
    model = adapted(tiny_llama(pad_token_id=3), "embed_tokens")
    lora.export_gguf(model, tmp_path / "lora.gguf")
    check_written(tmp_path / "lora.gguf", model)
    _, found = updates(tmp_path / "lora.gguf")
    assert not found["token_embd.weight"][:, 3].any()


def test_bat_is_cut_to_a_rank(tmp_path):
    model = adapted(tiny_llama(), "_proj", 4, method="bat")
    with refused(tmp_path, "give `rank`", model, kind=disha.ArgumentError):
        lora.export_gguf(model, tmp_path / "lora.gguf")
    assert 0.1 < lora.export_gguf(model, tmp_path / "lora.gguf", rank=2).error < 1
    assert lora.export_gguf(model, tmp_path / "lora.gguf", rank=24).error < 1e-5
    check_written(tmp_path / "lora.gguf", model, tolerance=1e-4)


def test_names_without_the_models_prefix(tmp_path):
    model = adapted(tiny_llama())
    lora.export_gguf(model, tmp_path / "whole.gguf")
    lora.export_gguf(model.model, tmp_path / "inner.gguf")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "inner.gguf").read_bytes()


def test_rows_of_other_architectures_stay_in_order(tmp_path):
    model = adapted(tiny_llama(), "q_proj|k_proj")
    model.config.model_type = "qwen2"
    lora.export_gguf(model, tmp_path / "lora.gguf")
    fields, found = updates(tmp_path / "lora.gguf")
    assert fields["general.architecture"] == "qwen2"
    for index, layer in enumerate(model.model.layers):
        for part, own in (("attn_q", layer.self_attn.q_proj), ("attn_k", layer.self_attn.k_proj)):
            torch.testing.assert_close(found[f"blk.{index}.{part}.weight"], delta(own))


def test_the_architecture_follows_the_model_type(tmp_path):
    model, path = adapted(tiny_llama(), "q_proj"), tmp_path / "lora.gguf"
    model.config.model_type = "gemma2"
    with refused(tmp_path, "not for gemma2", model):
        lora.export_gguf(model, path)
    model.config.model_type = "mistral"
    lora.export_gguf(model, path)
    assert read(path)[0]["general.architecture"] == "llama"


def test_a_file_becomes_the_same_file(tmp_path):
    base = tiny_llama()
    model = adapted(copy.deepcopy(base), "_proj", 4, method="bat")
    lora.export_gguf(model, tmp_path / "model.gguf", rank=4)
    disha.save_adapter(model, tmp_path / "adapter.safetensors")
    header, tensors = read_contents(tmp_path / "adapter.safetensors")
    state, path = base.state_dict(), tmp_path / "file.gguf"
    config = base.config.to_dict()
    weight = lambda name: state[f"{name}.weight"]  # noqa: E731
    lora.write_gguf(path, header, tensors, config, base=weight, rank=4)
    assert path.read_bytes() == (tmp_path / "model.gguf").read_bytes()


def test_away_from_the_model_heads_must_be_told(tmp_path):
    contents = adapter_contents(ModelView(adapted(tiny_llama(), "q_proj|v_proj")))
    with refused(tmp_path, "num_attention_heads", kind=disha.ArgumentError):
        lora.write_gguf(tmp_path / "lora.gguf", *contents, {})
    lora.write_gguf(tmp_path / "lora.gguf", *contents, {"num_attention_heads": HEADS})
    contents = adapter_contents(ModelView(adapted(tiny_llama(), "v_proj")))
    lora.write_gguf(tmp_path / "v.gguf", *contents, {})


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"rank": 0}, disha.ArgumentError, "rank must be at least 1"),
        ({"adapter": "other"}, disha.ArgumentError, "no adapter 'other'"),
        ({"path": 3}, disha.ArgumentTypeError, "path must be"),
    ],
)
def test_arguments(tmp_path, options, kind, message):
    model = adapted(tiny_llama(), "q_proj")
    with refused(tmp_path, message, model, kind=kind):
        lora.export_gguf(model, **{"path": tmp_path / "lora.gguf", **options})


def test_what_the_file_has_no_place_for(tmp_path):
    model = tiny_llama()
    model.extra = nn.Linear(8, 8)
    adapted(model, "extra|q_proj")
    with refused(tmp_path, r"1 of 3 layers \(extra\)", model):
        lora.export_gguf(model, tmp_path / "lora.gguf")
    model = adapted(tiny_llama(), "q_proj", also_train="norm")
    with refused(tmp_path, "which trained with the blocks", model):
        lora.export_gguf(model, tmp_path / "lora.gguf")


@pytest.mark.parametrize("target", ["lm_head", "embed"])
def test_a_tied_head_is_refused(tmp_path, target):
    model = adapted(tiny_llama(tie_word_embeddings=True), target)
    with refused(tmp_path, "lm_head is adapted", model):
        lora.export_gguf(model, tmp_path / "lora.gguf")


def test_an_adapter_alone_has_to_be_told_whether_the_head_is_tied(tmp_path):
    path = tmp_path / "lora.gguf"
    contents = adapter_contents(ModelView(adapted(tiny_llama(), "embed_tokens")))
    for told in (None, True):
        with refused(tmp_path, "lm_head is adapted"):
            lora.write_gguf(path, *contents, {"tie_word_embeddings": told})
    lora.write_gguf(path, *contents, {"tie_word_embeddings": False})
    assert path.exists()


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    model = adapted(tiny_llama(), "q_proj")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with refused(tmp_path, r'pip install "disha-torch\[gguf\]"', kind=disha.MissingPackageError):
        lora.export_gguf(model, tmp_path / "lora.gguf")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "lora.gguf"
    model = adapted(tiny_llama(), "q_proj")
    lora.export_gguf(model, path)
    before = path.read_bytes()
    perturb(model, seed=1)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
    with pytest.raises(disha.AdapterIOError, match="No space left"):
        lora.export_gguf(model, path)
    assert [file.name for file in tmp_path.iterdir()] == ["lora.gguf"]
    assert path.read_bytes() == before
