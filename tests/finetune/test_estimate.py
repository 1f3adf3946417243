from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import disha
from disha.finetune.estimate import estimate_memory, meta_decoder
from disha.finetune.models.decoder import Decoder, DecoderConfig
from disha.finetune.settings import FinetuneSettings
from disha.finetune.settings.adapter import ALL_PROJECTIONS

CONFIG = DecoderConfig(
    vocabulary=300,
    hidden=64,
    feed_forward=96,
    layers=5,
    heads=4,
    kv_heads=2,
    head_dim=16,
    context=256,
    rope_base=1e4,
    norm_epsilon=1e-5,
    tied_head=False,
)
SETTINGS = FinetuneSettings().changed(
    bone_r=8, per_device_train_batch_size=2, max_seq_length=32, bits="fp32"
)


def plan_of(settings, config=CONFIG):
    model = meta_decoder(config)
    return disha.plan_adapters(
        model, ALL_PROJECTIONS, settings.adapter.bone_r, method=settings.adapter.kind
    )


def kept_for_backward(settings, dtype):
    """What autograd really keeps, of a real model, counted here independently."""
    model = Decoder(CONFIG).to(dtype)
    disha.inject_adapters(
        model,
        ALL_PROJECTIONS,
        settings.adapter.bone_r,
        method=settings.adapter.kind,
        dtype=torch.float32,
    )
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    tokens = torch.zeros(2, 32, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(tokens).float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    del loss
    return sum(s.nbytes() for pointer, s in kept.items() if pointer not in owned)


@pytest.mark.parametrize("method", ["bone", "bat"])
@pytest.mark.parametrize("bits", ["fp32", "bf16"])
def test_what_is_kept_is_what_autograd_keeps(method, bits):
    settings = SETTINGS.changed(method=method, bits=bits)
    dtype = torch.float32 if bits == "fp32" else torch.bfloat16
    estimated = estimate_memory(CONFIG, settings, plan_of(settings)).kept
    assert estimated == pytest.approx(kept_for_backward(settings, dtype), rel=0.05)


def test_weights_adapter_and_optimiser_are_counted():
    found = estimate_memory(CONFIG, SETTINGS, plan_of(SETTINGS))
    model = Decoder(CONFIG)
    base = sum(p.nbytes for p in model.parameters())
    disha.inject_adapters(model, ALL_PROJECTIONS, 8)
    blocks = sum(p.nbytes for p in disha.adapter_parameters(model))
    assert (found.base, found.adapter, found.optimiser) == (base, blocks, 3 * blocks)
    assert found.total == base + 4 * blocks + found.kept


def test_checkpointing_keeps_less_and_longer_rows_more():
    def kept(**changes):
        settings = SETTINGS.changed(**changes)
        return estimate_memory(CONFIG, settings, plan_of(settings)).kept

    assert kept(gradient_checkpointing=True) < 0.6 * kept()
    assert kept(max_seq_length=64) == pytest.approx(2 * kept(), rel=0.1)


@pytest.mark.parametrize(("bits", "bytes_each"), [("8", 1.0), ("4", 0.516)])
def test_quantised_weights_count_as_packed(bits, bytes_each):
    settings = SETTINGS.changed(bits=bits)
    found = estimate_memory(CONFIG, settings, plan_of(settings)).base
    layers = [m for m in Decoder(CONFIG).model.layers.modules() if isinstance(m, nn.Linear)]
    linear = sum(m.weight.numel() for m in layers)
    others = sum(p.numel() for p in Decoder(CONFIG).parameters()) - linear
    assert found == pytest.approx(others * 2 + linear * bytes_each, rel=0.01)


def test_a_70b_model_is_estimated_without_its_memory():
    config = replace(
        CONFIG, vocabulary=128_256, hidden=8192, feed_forward=28_672, layers=80, heads=64,
        kv_heads=8, head_dim=128,
    )  # fmt: skip
    settings = SETTINGS.changed(bits="bf16", bone_r=64)
    found = estimate_memory(config, settings, plan_of(settings, config))
    assert found.base == pytest.approx(141e9, rel=0.01)
