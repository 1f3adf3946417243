"""`--dry_run`: what a run would do, and nothing of it done."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import disha
from disha.finetune.adapting import ALL_PROJECTIONS
from disha.finetune.models.decoder import Decoder, DecoderConfig
from disha.finetune.preview import estimate_memory, meta_decoder
from disha.finetune.settings import FinetuneSettings
from tests.finetune import tiny_gguf
from tests.finetune.command_line import ROWS, with_values, write_rows

LAYERS = 2 * 8 * (64 + 32 + 32 + 64 + 96 + 96 + 64)


def test_nothing_is_written_and_no_weight_is_read(finetune, monkeypatch):
    def read(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr("disha.finetune.models.gguf.GGUFCheckpoint.load_model", read)
    done = finetune("--dry_run")
    assert (done.code, done.err) == (0, "")
    assert not finetune.output.exists()


def test_layers_and_parameters_are_those_of_the_run(finetune):
    shown = finetune("--dry_run").out
    assert "model.layers.1.mlp.down_proj" in shown
    assert f"14 layers, {LAYERS:,} parameters; trainable {LAYERS:,} of " in shown
    report = finetune.good(max_steps=1)
    assert report["parameters"]["trainable"] == LAYERS
    assert f" of {report['parameters']['total']:,} " in shown


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_steps": None}, "10 steps of 4 rows, 1.00 passes over the data"),
        ({"max_steps": 5}, "5 steps of 4 rows, 0.50 passes"),
        ({"max_steps": None, "num_train_epochs": 2.5}, "25 steps of 4 rows, 2.50 passes"),
        ({"max_steps": None, "gradient_accumulation_steps": 5}, "2 steps of 20 rows, 1.00 passes"),
        ({"eval_fraction": 0.25}, "30 rows to train on; 10 held out"),
        ({"dataset_split": "train[:50%]"}, "20 rows to train on; 0 held out"),
        ({"streaming": True, "packing": True}, "6 steps of 4 rows\n"),
    ],
)
def test_steps_and_rows_are_told(finetune, changes, expected):
    assert expected in finetune("--dry_run", **changes).out


def test_rows_that_are_cut_or_left_out_are_counted(finetune, tmp_path):
    rows = [*ROWS, {"query": "x" * 400, "response": "y"}, {"query": "x", "response": "y" * 400}]
    data = write_rows(tmp_path / "long.jsonl", [*rows, {}])
    shown = finetune("--dry_run", "--skip_bad_rows", data_path=data).out
    assert "43 rows to train on; 0 held out; 1 of them cut to fit; " in shown
    assert "1 left out as too long; 1 left out as unusable, such as: " in shown


def test_memory_grows_with_what_is_asked_for(finetune):
    def memory(**changes):
        found = re.search(
            r"memory of each process: about ([\d.]+) MiB", finetune("--dry_run", **changes).out
        )
        return float(found[1])

    usual = memory(per_device_train_batch_size=64)
    assert memory(per_device_train_batch_size=128) > 1.5 * usual
    assert memory(per_device_train_batch_size=64, gradient_checkpointing=True) < usual


def test_what_does_not_fit_is_told_here_too(finetune):
    done = finetune("--dry_run", target="no_such_layer")
    assert done.code == 2
    assert "no_such_layer" in done.complaint
    assert finetune("--dry_run", max_seq_length=tiny_gguf.CONTEXT + 1).code == 2


# --- memory ---------------------------------------------------------------------------------------

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
SETTINGS = with_values(
    FinetuneSettings(), bone_r=8, per_device_train_batch_size=2, max_seq_length=32, bits="fp32"
)


def plan_of(settings, config=CONFIG):
    model = meta_decoder(config)
    return disha.plan_adapters(
        model, ALL_PROJECTIONS, settings.adapter.bone_r, method=settings.adapter.method_name
    )


def kept_for_backward(settings, dtype):
    """What autograd really keeps, of a real model, counted here independently."""
    model = Decoder(CONFIG).to(dtype)
    disha.inject_adapters(
        model,
        ALL_PROJECTIONS,
        settings.adapter.bone_r,
        method=settings.adapter.method_name,
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
    settings = with_values(SETTINGS, method=method, bits=bits)
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
        settings = with_values(SETTINGS, **changes)
        return estimate_memory(CONFIG, settings, plan_of(settings)).kept

    assert kept(gradient_checkpointing=True) < 0.6 * kept()
    assert kept(max_seq_length=64) == pytest.approx(2 * kept(), rel=0.1)


@pytest.mark.parametrize(("bits", "bytes_each"), [("8", 1.0), ("4", 0.516)])
def test_quantised_weights_count_as_packed(bits, bytes_each):
    settings = with_values(SETTINGS, bits=bits)
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
    settings = with_values(SETTINGS, bits="bf16", bone_r=64)
    found = estimate_memory(config, settings, plan_of(settings, config))
    assert found.base == pytest.approx(141e9, rel=0.01)
