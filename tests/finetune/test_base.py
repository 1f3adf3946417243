import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config

from disha import ArgumentError
from disha.finetune.base import best_device, load_base
from tests.finetune import tiny_gguf
from tests.finetune.tiny_models import tokenizer, write_model


@pytest.mark.parametrize(
    ("bits", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("auto", torch.float32)]
)
def test_a_folder(tiny, bits, dtype):
    model, tokenizer = load_base(str(tiny), bits)
    assert model.dtype == dtype
    assert not model.training
    assert tokenizer.pad_token == tokenizer.eos_token


@pytest.mark.parametrize("bits", ["8", "4"])
def test_bits(tiny, bits):
    model, _ = load_base(str(tiny), bits, torch.device("cpu"))
    assert getattr(model, f"is_loaded_in_{bits}bit")
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


def test_four_bits_of_experts(tmp_path):
    model, _ = load_base(str(write_model(tmp_path, "Mixtral")), "4", torch.device("cpu"))
    layer = model.model.layers[0]
    for name in ("gate_up_proj", "down_proj"):
        assert layer.mlp.experts.parametrizations[name].original.dtype == torch.uint8
    assert layer.self_attn.q_proj.weight.dtype == torch.float32  # accelerate shards no integers
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


@pytest.mark.parametrize(("kind", "limit"), [("F32", 1e-6), ("Q8_0", 0.01), ("Q4_1", 0.1)])
def test_a_gguf_file_computes_what_its_weights_say(tmp_path, kind, limit):
    state = tiny_gguf.random_state(tied=True)
    path = tiny_gguf.write_gguf(tmp_path / "tiny.gguf", state, kind=kind)
    model, tokenizer = load_base(str(path), "fp32", best_device())
    found = model.state_dict()
    for name, values in state.items():
        torch.testing.assert_close(found[name].cpu(), values, rtol=limit, atol=limit)
    assert tokenizer("hello")["input_ids"]
    with pytest.raises(ArgumentError, match="cannot combine Quantization and loading a model from"):
        load_base(str(path), "4")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "can't load ./nowhere"),
        ("someone/nothing", "can't load someone/nothing"),
    ],
)
def test_no_such_model(name, message):
    with pytest.raises(ArgumentError, match=message):
        load_base(name)


def test_a_model_that_writes_no_text(tmp_path):
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match=r"can't load .* Unrecognized configuration"):
        load_base(str(tmp_path))


def test_a_base_without_some_values_is_refused(tmp_path):
    """transformers would give them random values."""
    path = write_model(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ArgumentError, match=r"has no values for model\.norm\.weight"):
        load_base(str(tmp_path))


def test_code_in_the_folder_does_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question: "y")  # nobody is asked on a terminal
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}})
    )
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_base(str(tmp_path))


def test_bits_without_bitsandbytes(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ArgumentError, match="bitsandbytes"):
        load_base(str(tiny), "4")
