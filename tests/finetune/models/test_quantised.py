from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn

import disha
from disha.finetune.errors import CheckpointError
from disha.finetune.generation import generate
from disha.finetune.models.checkpoint import open_model
from tests.finetune import tiny_checkpoints

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS = {8: Linear8bitLt, 4: Linear4bit}
BITS = tuple(KINDS)

# How far quantisation moves the log probabilities of the tiny models, on average.
ERRORS = {8: 0.1, 4: 1.0}


def load(path, bits, dtype=torch.float32):
    return open_model(path).load_model(dtype, bits=bits)


def dense_weight(layer):
    if isinstance(layer, Linear4bit):
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return layer.weight.data.float() * layer.weight.SCB[:, None] / 127


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return tiny_checkpoints.write_gguf(path, "smollm2")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", ["smollm2", "qwen2", "qwen3"])
def test_linear_layers_of_the_decoder_layers_are_quantised_and_nothing_else(
    tiny_folder, family, bits
):
    model = load(tiny_folder(family), bits)
    for name, module in model.named_modules():
        if name.endswith(PROJECTIONS):
            assert type(module) is KINDS[bits], name
            assert module.weight.dtype in (torch.int8, torch.uint8), name
            assert not module.weight.requires_grad
        elif isinstance(module, nn.Linear):
            assert type(module) is nn.Linear, name
    dense = load(tiny_folder(family), None)
    for name, values in dense.named_parameters():
        if not (name.endswith("weight") and name.split(".")[-2] in PROJECTIONS):
            assert torch.equal(model.get_parameter(name), values), name
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("bits", BITS)
def test_weights_are_near_those_of_the_file(tiny_folder, gguf_path, bits):
    for path in (tiny_folder("smollm2"), gguf_path):
        model, dense = load(path, bits), load(path, None)
        for name, layer in model.named_modules():
            if name.endswith(PROJECTIONS):
                expected = dense.get_submodule(name).weight.detach()
                error = (dense_weight(layer) - expected).abs().max() / expected.abs().max()
                assert error < {8: 0.01, 4: 0.2}[bits], (path, name)


def test_four_bits_are_nf4_with_scales_quantised_again(tiny_folder):
    for dtype in (torch.float32, torch.bfloat16):
        layer = load(tiny_folder("llama3"), 4, dtype).model.layers[0].mlp.up_proj
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)
        assert layer.compute_dtype == state.dtype == dtype
        assert layer.weight.numel() == 64 * 128 // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
@torch.inference_mode()
def test_what_it_computes_is_near_the_dense_model(tiny_folder, bits, dtype):
    tokens = torch.arange(3, 60).unsqueeze(0)
    expected = load(tiny_folder("llama3"), None)(tokens).log_softmax(-1)
    logits = load(tiny_folder("llama3"), bits, dtype).eval()(tokens)
    assert logits.dtype == dtype
    error = (logits.float().log_softmax(-1) - expected).abs().mean()
    assert error < ERRORS[bits]


@pytest.mark.parametrize("bits", BITS)
def test_it_generates(tiny_folder, bits):
    model = load(tiny_folder("qwen3"), bits).eval()
    made = list(generate(model, [5, 60, 70], max_new_tokens=6, ends=frozenset()))
    with torch.inference_mode():
        again = model(torch.tensor([[5, 60, 70, *made]]))[0, 2:-1].argmax(-1)
    assert made == again.tolist()


@pytest.mark.parametrize("method", ["bone", "bat"])
@pytest.mark.parametrize("bits", BITS)
def test_adapters_on_it_learn(tiny_folder, bits, method):
    torch.manual_seed(0)
    model = load(tiny_folder("smollm2"), bits)
    disha.inject_adapters(model, "|".join(PROJECTIONS), 8, method=method, dtype=torch.float32)
    trained = [one for one in model.parameters() if one.requires_grad]
    assert len(trained) == 2 * len(PROJECTIONS)
    before = {name: v.clone() for name, v in model.named_parameters() if not v.requires_grad}
    tokens = torch.randint(3, 260, (4, 16), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(model.get_parameter(name), v) for name, v in before.items())


def test_without_bitsandbytes_it_says_what_to_install(tiny_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(disha.MissingPackageError, match=r"pip install 'disha-torch\[quant\]'"):
        load(tiny_folder("smollm2"), 4)


def test_without_bitsandbytes_dense_models_load(tiny_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert load(tiny_folder("smollm2"), None).config.layers == 2


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"intermediate_size": 96},
            r"mlp\.down_proj has 96 inputs and 64 outputs; 4 bits on the CPU",
        ),
        ({"head_dim": 8}, r"k_proj has 64 inputs and 16 outputs; .*Use --bits 8"),
    ],
)
def test_sizes_that_the_library_gets_wrong_are_refused(tmp_path, changes, complaint):
    path = tiny_checkpoints.write_folder(tmp_path / "model", "smollm2", **changes)
    with pytest.raises(CheckpointError, match=complaint):
        load(path, 4)
    assert load(path, 8).config.layers == 2
