"""A dry run simulates the device that a run would have, and reads no weight."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from trl.trainer import utils as trl_utils

import disha
from benchmarks.four_bits import quantize
from benchmarks.memory import allocated_peak
from benchmarks.steps import full_step
from disha.finetune import dry_run, main
from disha.finetune.dry_run import make_without_values, simulate_step
from disha.finetune.trainer import score_positions
from disha.integrations.memory import memory_modes
from tests.finetune.tiny_models import SIZES

PARTS = ["weights", "adapter", "gradients", "optimizer", "activations", "peak"]


@pytest.fixture
def simulated(tiny, data, tmp_path, capsys):
    """What a dry run prints of the memory: the part of each, and the verdict."""

    def run(*words, base=tiny):
        flags = ["--data", data, "--r", 8, "--dry_run", "--output_dir", tmp_path / "out"]
        assert main([str(word) for word in ["--base", base, *flags, *words]]) == 0
        *lines, verdict = capsys.readouterr().out.partition("simulated:\n")[2].splitlines()
        parts = {line.split()[0]: float(line.split()[1]) for line in lines}
        assert list(parts) == PARTS
        return parts, verdict

    return run


def test_no_weight_is_read(simulated, tiny, tmp_path):
    copied = tmp_path / "base"
    copied.mkdir()
    for file in tiny.iterdir():
        if file.suffix != ".safetensors":
            (copied / file.name).write_bytes(file.read_bytes())
    parts, verdict = simulated(base=copied)
    assert parts["weights"] > 0
    assert verdict == "fits 8 GB"


def test_the_base_has_the_dtype_of_the_device(simulated, monkeypatch):
    """Over 4 bits, a processor computes in float32, and an accelerator in bfloat16."""
    monkeypatch.setattr(dry_run, "TILE_OF_TRL", dry_run.TILE)
    here, _ = simulated("--bits", 4, "--dry_run_device", "cpu")
    there, _ = simulated("--bits", 4, "--dry_run_device", "cuda")
    assert there["weights"] < here["weights"]
    assert there["activations"] < 0.8 * here["activations"]


def test_recomputation_is_simulated(simulated):
    kept, _ = simulated()
    recomputed, _ = simulated("--gradient_checkpointing", True)
    assert recomputed["activations"] < kept["activations"]


@pytest.mark.parametrize(("bits", "recomputes"), [("fp32", False), ("fp32", True), ("4", False)])
def test_a_simulated_step_needs_what_the_allocator_gives_out(bits, recomputes):
    config = LlamaConfig(**SIZES, vocab_size=512)
    ids = torch.ones(2, 64, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    def adapt(model):
        disha.inject_adapters(model, "all-linear", 16, exclude=["lm_head"])
        if recomputes:
            model.gradient_checkpointing_enable()
        trained = [value for value in model.parameters() if value.requires_grad]
        return model, torch.optim.AdamW(trained)

    modes = memory_modes()
    with modes[0]:
        made = adapt(make_without_values(config, bits, torch.float32))
    parts = simulate_step(made[0], batch, made[1], modes)

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model, optimizer = adapt(quantize(model, torch.float32) if bits == "4" else model)
    trl_utils.add_fused_lm_head(model.train(), outputs=dry_run.SCORED)
    with score_positions(only_learned=False):
        step = full_step(lambda: model(**batch, fused_lm_head=True).loss, optimizer)
        step()
        measured = allocated_peak(step, torch.device("cpu"))
    assert parts["gradients"] + parts["activations"] == pytest.approx(measured, rel=0.05)
