"""Adapters as GGUF files of a LoRA, read back by the package `gguf`.

What their numbers must be is worked out from how converters write a base model's weights
(`tests/finetune/tiny_gguf.py`): B A, scaled as llama.cpp does, is dW as such a file would hold it.
`tests/llamacpp` has llama.cpp itself compute with them.
"""

from __future__ import annotations

import copy
import sys
from contextlib import contextmanager
from dataclasses import replace

import gguf
import pytest
import torch
import transformers
from disha.finetune.models.decoder import Decoder, DecoderConfig
from torch import nn

import disha
from disha import ConversionError
from disha.files.contents import adapter_contents, read_contents
from disha.functional import bat_delta_weight
from disha.interop import lora
from disha.interop.gguf import ARCHITECTURES, LAYER_PARTS
from disha.model import ModelView
from tests.conftest import assert_unchanged, perturb, snapshot
from tests.finetune import tiny_gguf
from tests.finetune.tiny_gguf import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS


def decoder(*, tied=False):
    """Our own decoder, of the sizes of `tiny_gguf`."""
    torch.manual_seed(0)
    sizes = {"vocabulary": 32, "hidden": HIDDEN, "feed_forward": 96, "layers": LAYERS}
    heads = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "context": 32}
    config = DecoderConfig(**sizes, **heads, rope_base=1e4, norm_epsilon=1e-5, tied_head=tied)
    return Decoder(config)


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
    names = {name.rpartition(".")[0] for name in tensors}
    assert tensors.keys() == {f"{name}.lora_{half}" for name in names for half in "ab"}
    found = {}
    for name in names:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        a = a.T if name == "token_embd.weight" else a
        scale = fields["adapter.lora.alpha"] / b.shape[1]
        found[name] = scale * b.double() @ a.double()
    return fields, found


def delta(layer):
    """s dW of a layer, (out, in) and in float64."""
    block = layer.disha["default"]
    if block.method.name == "bat":
        dense = bat_delta_weight(layer.base_weight.detach().double(), block.block.detach().double())
    else:
        dense = layer.delta_weight(block).detach().double()
    return block.scale * (dense.T if isinstance(layer, nn.Embedding) else dense)


def check_written(path, model, tolerance=1e-6):
    fields, found = updates(path)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, disha.AdaptedLayer)}
    assert len(found) == len(layers)
    for name, layer in layers.items():
        key = f"{name}.weight"
        expected = tiny_gguf._gguf_rows(key, delta(layer))
        actual = found[tiny_gguf._gguf_name(key)]
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
        {"r_out": 16},
        {"rank_pattern": {"q_proj": 4, "down": 20}},
        {"scale": -2.5, "rank_pattern": {"v_proj": 6}},
        {"scale": 0.0},
        {"dtype": torch.bfloat16},
    ],
    ids=["bone", "tile", "ranks", "scale", "silent", "bf16"],
)
def test_what_is_read_back_is_the_update(tmp_path, options):
    model = adapted(decoder(), "layers|lm_head", **options)
    report = lora.export_gguf(model, tmp_path / "lora.gguf")
    fields = check_written(tmp_path / "lora.gguf", model)
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 8
    assert report.error == 0
    assert len(report.layers) == 7 * LAYERS + 1


def test_one_alpha_for_all_is_the_rank_of_most_layers(tmp_path):
    model = adapted(decoder(), "q_proj|v_proj|o_proj", rank_pattern={"q_proj": 3})
    lora.export_gguf(model, tmp_path / "lora.gguf")
    fields, tensors = read(tmp_path / "lora.gguf")
    assert fields["adapter.lora.alpha"] == 8
    block = model.model.layers[0].self_attn.v_proj.disha["default"].block
    assert torch.equal(tensors["blk.0.attn_v.weight.lora_b"], block.detach().T)  # its very bits
    assert tensors["blk.1.attn_q.weight.lora_a"].shape == (3, HIDDEN)


def test_bat_is_cut_to_a_rank(tmp_path):
    model = adapted(decoder(), "_proj", 16, method="bat")
    with refused(tmp_path, "give `rank`", model, kind=disha.ArgumentError):
        lora.export_gguf(model, tmp_path / "lora.gguf")
    with refused(tmp_path, "would lose more than max_error", model):
        lora.export_gguf(model, tmp_path / "lora.gguf", rank=8, max_error=0.1)
    assert 0.1 < lora.export_gguf(model, tmp_path / "lora.gguf", rank=8).error < 1
    report = lora.export_gguf(model, tmp_path / "lora.gguf", rank=64)
    assert report.error < 1e-5
    check_written(tmp_path / "lora.gguf", model, tolerance=1e-4)


def test_a_llama_of_transformers(tmp_path):
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
    config = transformers.LlamaConfig(vocab_size=32, pad_token_id=3, **sizes, **heads)
    model = adapted(transformers.LlamaForCausalLM(config), "_proj|lm_head|embed_tokens")
    lora.export_gguf(model, tmp_path / "lora.gguf")
    check_written(tmp_path / "lora.gguf", model)
    _, found = updates(tmp_path / "lora.gguf")
    assert not found["token_embd.weight"][:, 3].any()
    assert found["token_embd.weight"][:, 4].any()


def test_names_without_the_models_prefix(tmp_path):
    model = decoder()
    adapted(model)
    lora.export_gguf(model, tmp_path / "whole.gguf")
    lora.export_gguf(model.model, tmp_path / "inner.gguf")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "inner.gguf").read_bytes()


def test_names_are_those_of_the_gguf_package():
    for architecture in ARCHITECTURES:
        arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        names = gguf.get_tensor_name_map(arch, 3)
        for part, ours in LAYER_PARTS.items():
            assert names.get_name(f"model.layers.2.{part}") == f"blk.2.{ours}"
        assert names.get_name("lm_head") == "output"
        assert names.get_name("model.embed_tokens") == "token_embd"


def test_rows_of_other_architectures_stay_in_order(tmp_path):
    model = adapted(decoder(), "q_proj|k_proj")
    lora.export_gguf(model, tmp_path / "lora.gguf", architecture="qwen2")
    fields, found = updates(tmp_path / "lora.gguf")
    assert fields["general.architecture"] == "qwen2"
    for index, layer in enumerate(model.model.layers):
        torch.testing.assert_close(
            found[f"blk.{index}.attn_q.weight"], delta(layer.self_attn.q_proj)
        )
        torch.testing.assert_close(
            found[f"blk.{index}.attn_k.weight"], delta(layer.self_attn.k_proj)
        )


@pytest.mark.parametrize(
    ("kind", "architecture"), [("mistral", "llama"), ("qwen2", "qwen2"), ("gemma2", None)]
)
def test_the_architecture_follows_the_model_type(tmp_path, kind, architecture):
    config = transformers.AutoConfig.for_model(
        kind, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS
    )
    model = adapted(decoder(), "q_proj")
    model.config = config
    path = tmp_path / "lora.gguf"
    if architecture is None:
        with refused(tmp_path, "the model type 'gemma2'", model, kind=disha.ArgumentError):
            lora.export_gguf(model, path)
        architecture = "llama"
        lora.export_gguf(model, path, architecture=architecture)
    else:
        lora.export_gguf(model, path)
    assert read(path)[0]["general.architecture"] == architecture


def test_a_file_becomes_the_same_file(tmp_path):
    base = decoder()
    model = adapted(copy.deepcopy(base), "_proj", 16, method="bat")
    lora.export_gguf(model, tmp_path / "model.gguf", rank=4)
    disha.save_adapter(model, tmp_path / "adapter.safetensors")
    header, tensors = read_contents(tmp_path / "adapter.safetensors")
    state = base.state_dict()
    report = lora.write_gguf(
        tmp_path / "file.gguf",
        header,
        tensors,
        heads=HEADS,
        kv_heads=KV_HEADS,
        rank=4,
        base=lambda name: state[f"{name}.weight"],
    )
    assert 0 < report.error < 1
    expected, found = updates(tmp_path / "model.gguf"), updates(tmp_path / "file.gguf")
    assert found[0].keys() == expected[0].keys()
    assert found[1].keys() == expected[1].keys()
    for name, update in expected[1].items():
        assert torch.equal(found[1][name], update)


def test_away_from_the_model_heads_must_be_told(tmp_path):
    contents = adapter_contents(ModelView(adapted(decoder(), "q_proj|v_proj")))
    path = tmp_path / "lora.gguf"
    with refused(tmp_path, "give `heads` and `kv_heads`", kind=disha.ArgumentError):
        lora.write_gguf(path, *contents)
    with refused(tmp_path, "64 rows, which can't be split into 3 heads", kind=disha.ArgumentError):
        lora.write_gguf(path, *contents, heads=3)
    lora.write_gguf(path, *contents, heads=HEADS)
    path.unlink()
    contents = adapter_contents(ModelView(adapted(decoder(), "v_proj")))
    lora.write_gguf(path, *contents)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"architecture": "gpt2"}, disha.ArgumentError, "for llama, qwen2"),
        ({"heads": 0}, disha.ArgumentError, "heads must be at least 1"),
        ({"heads": 0.5}, disha.ArgumentTypeError, "heads must be an int"),
        ({"kv_heads": -1}, disha.ArgumentError, "kv_heads must be at least 1"),
        ({"rank": 0}, disha.ArgumentError, "rank must be at least 1"),
        ({"adapter": "other"}, disha.ArgumentError, "no adapter 'other'"),
        ({"path": 3}, disha.ArgumentTypeError, "path must be"),
    ],
)
def test_arguments(tmp_path, options, kind, message):
    model = adapted(decoder(), "q_proj")
    with refused(tmp_path, message, model, kind=kind):
        lora.export_gguf(model, **{"path": tmp_path / "lora.gguf", **options})


def test_layers_without_a_place_in_the_file_are_refused(tmp_path):
    model = decoder()
    model.extra = nn.Linear(8, 8)
    adapted(model, "extra|q_proj")
    with refused(tmp_path, r"no place for 1 of 3 layers \(extra\)", model):
        lora.export_gguf(model, tmp_path / "lora.gguf")


def test_layers_with_one_name_in_the_file_are_refused(tmp_path):
    header, tensors = adapter_contents(ModelView(adapted(decoder(), "0.mlp.up_proj")))
    (layer,) = header.layers
    other = replace(layer, name=layer.name.removeprefix("model."))
    both = replace(header, layers=(layer, other))
    with refused(tmp_path, r"up_proj, layers\.0\.mlp\.up_proj have the same names in GGUF"):
        lora.write_gguf(tmp_path / "a.gguf", both, {**tensors, other.key: tensors[layer.key]})


@pytest.mark.parametrize(("target", "what"), [("lm_head", "lm_head"), ("embed", "the embedding")])
def test_a_tied_head_is_refused(tmp_path, target, what):
    model = adapted(decoder(tied=True), target)
    with refused(tmp_path, f"{what} is adapted", model):
        lora.export_gguf(model, tmp_path / "lora.gguf")


def test_an_adapter_alone_has_to_be_told_whether_the_head_is_tied(tmp_path):
    path = tmp_path / "lora.gguf"
    contents = adapter_contents(ModelView(adapted(decoder(), "embed_tokens")))
    for told in (None, True):
        with pytest.raises(ConversionError, match="embedding is adapted"):
            lora.write_gguf(path, *contents, tied_head=told)
    lora.write_gguf(path, *contents, tied_head=False)
    assert path.exists()


def test_without_a_head_the_configuration_tells_whether_it_is_tied(tmp_path):
    for tied in (False, True):
        model = adapted(decoder(tied=tied), "embed_tokens")
        if tied:
            with refused(tmp_path, "the embedding is adapted", model):
                lora.export_gguf(model.model, tmp_path / "lora.gguf")
        else:
            lora.export_gguf(model.model, tmp_path / "lora.gguf")
            (tmp_path / "lora.gguf").unlink()
    del model.model.config
    with refused(tmp_path, "whether they do is unknown here", model):
        lora.export_gguf(model.model, tmp_path / "lora.gguf")


def test_away_from_the_model_embeddings_are_refused(tmp_path):
    contents = adapter_contents(ModelView(adapted(decoder(), "embed_tokens")))
    with refused(tmp_path, "whether they do is unknown here"):
        lora.write_gguf(tmp_path / "lora.gguf", *contents)


def test_what_was_trained_beside_is_refused(tmp_path):
    model = adapted(decoder(), "q_proj", also_train="norm")
    with refused(tmp_path, "were trained with the blocks", model):
        lora.export_gguf(model, tmp_path / "lora.gguf")


def test_values_beyond_float32_are_refused(tmp_path):
    model = adapted(decoder(), "q_proj", scale=1e38)
    with torch.no_grad():
        next(disha.adapter_parameters(model)).fill_(100.0)
    with refused(tmp_path, "would not be finite in float32", model, kind=disha.AdapterStateError):
        lora.export_gguf(model, tmp_path / "lora.gguf")


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    model = adapted(decoder(), "q_proj")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with refused(tmp_path, r'pip install "disha-torch\[gguf\]"', kind=disha.MissingPackageError):
        lora.export_gguf(model, tmp_path / "lora.gguf")
    with refused(tmp_path, r'pip install "disha-torch\[gguf\]"', kind=ImportError):
        lora.write_gguf(tmp_path / "lora.gguf", *adapter_contents(ModelView(model)), heads=HEADS)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "lora.gguf"
    model = adapted(decoder(), "q_proj")
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
