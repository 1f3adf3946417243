"""A dry run simulates the device and the engine that a run would have, and reads no weight."""

import dataclasses
import json

import pytest
import torch

from benchmarks import dry_run as compared
from disha.finetune import dry_run, main
from disha.finetune.dry_run import Step, judge

GIB = 2**30
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


def test_each_device_has_its_part(simulated, tmp_path):
    zero = tmp_path / "zero.json"
    zero.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    eight = ("--dry_run_devices", 8, "--per_device_train_batch_size", 1)
    whole, _ = simulated(*eight)
    sharded, _ = simulated(*eight, "--fsdp", "full_shard")
    packed, _ = simulated(*eight, "--fsdp", "full_shard", "--bits", 4)
    partitioned, _ = simulated(*eight, "--deepspeed", zero)
    assert 0 < sharded["weights"] <= whole["weights"] / 4
    assert partitioned["weights"] <= whole["weights"] / 4
    assert packed["weights"] <= sharded["weights"]


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


ASKED = Step("bf16", 4, False, 1, "")


@pytest.mark.parametrize(
    ("gib", "told"), [(2, "fits 8 GB"), (10, "fits 12 GB"), (20, "fits 24 GB")]
)
def test_a_verdict_names_the_smallest_device(gib, told):
    assert judge(ASKED, gib * GIB, None) == told


@pytest.mark.parametrize(
    ("enough", "flags"),
    [
        ({"recomputes": True}, "--gradient_checkpointing true"),
        ({"bits": "4"}, "--bits 4"),
        ({"recomputes": True, "bits": "4"}, "--gradient_checkpointing true --bits 4"),
        ({"devices": 4}, "--gradient_checkpointing true --fsdp full_shard on 4 devices"),
    ],
)
def test_a_verdict_says_what_to_change(enough, flags):
    def simulate(step):
        fits = all(getattr(step, name) == value for name, value in enough.items())
        return {"peak": (10 if fits else 60) * GIB}

    told = judge(ASKED, 30 * GIB, simulate)
    assert told == f"does not fit 24 GB, but 40 GB; fits 24 GB with {flags} (10.0 GiB)"


def test_a_verdict_says_that_nothing_helps():
    told = judge(ASKED, 300 * GIB, lambda step: {"peak": 300 * GIB})
    assert told == "does not fit 24 GB; neither recomputing, 4 bits nor 8 devices are enough"
    asked = dataclasses.replace(ASKED, engine="FSDP2", devices=8)
    assert "8 devices" in judge(asked, 300 * GIB, lambda step: {"peak": 300 * GIB})


@pytest.mark.parametrize("name", ["one process, recomputed", "DDP", "FSDP2"])
def test_a_simulated_step_needs_what_the_allocator_gives_out(name):
    step = compared.STEPS[name]
    simulated = compared.simulate(step, compared.TINY)["peak"]
    real = compared.measure(step, compared.TINY)
    assert simulated == pytest.approx(real, rel=0.05)


def test_a_group_is_left_when_a_simulation_ends():
    with dry_run.pretend_group(4):
        assert torch.distributed.get_world_size() == 4
    assert not torch.distributed.is_initialized()
