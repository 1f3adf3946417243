"""What a dry run says that a step needs is what the step allocates, and what a machine lacks."""

import random
from types import SimpleNamespace

import pytest
import torch

from benchmarks.memory import allocated_peak
from disha.finetune.arguments import parse_flags
from disha.finetune.memory import free_memory, run_memory
from disha.finetune.preview import fold, judge
from disha.finetune.train import make_trainer
from disha.functional.layouts import MATRIX
from disha.layers.spec import BlockSpec
from tests.finetune.tiny_models import write_model, write_rows

GIB = 2**30


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3}
    return write_model(tmp_path_factory.mktemp("base"), **sizes, num_attention_heads=8)


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory):
    """Rows of which nearly all is learned: a simulation can't know how much that is."""
    draw = random.Random(0)
    rows = [{"query": "a", "response": "".join(draw.choices("klmnop", k=100))} for _ in range(6)]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)


def trainer_of(base, rows, folder, *words):
    flags = ["--base", base, "--data", rows, "--r", 16, "--learning_rate", 1e-3]
    flags += ["--output_dir", folder, "--report_to", "none", *words]
    return make_trainer(parse_flags([str(word) for word in flags]), {})[0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["bone", "bat", "lora"])
def test_a_step_allocates_what_was_simulated(method, checkpointing, base, long_rows, tmp_path):
    words = ["--method", method, "--gradient_checkpointing", checkpointing]
    found = run_memory(trainer_of(base, long_rows, tmp_path, *words, "--dry_run"), "fp32")
    trainer = trainer_of(base, long_rows, tmp_path, *words)
    model = trainer.model.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(4)])

    def step():
        trainer.compute_loss(model, dict(batch)).backward()

    weights = sum(weight.nbytes for weight in model.parameters() if not weight.requires_grad)
    real = weights + allocated_peak(step, torch.device("cpu"))
    simulated = found["weights"] + found["gradients"] + found["activations"]
    assert simulated == pytest.approx(real, rel=0.1)
    assert found["weights"] == weights
    trained = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    assert found["adapter"] == found["gradients"] == trained
    assert found["optimizer"] == pytest.approx(2 * trained, rel=0.01)
    assert found["program"] < free_memory(torch.device("cpu"))


def test_few_bits_take_less(base, long_rows, tmp_path):
    trainer = trainer_of(base, long_rows, tmp_path, "--dry_run")
    sizes = {bits: run_memory(trainer, bits)["weights"] for bits in ("fp32", "8", "4")}
    linear = 3 * 256 * (2 * 256 + 2 * 64 + 3 * 704)
    assert sizes["fp32"] - sizes["8"] == pytest.approx(3 * linear, rel=0.02)
    assert sizes["fp32"] - sizes["4"] == pytest.approx(3.5 * linear, rel=0.02)


NEEDED = {
    "program": GIB, "weights": 2 * GIB, "adapter": GIB, "gradients": GIB, "optimizer": 2 * GIB,
    "activations": 3 * GIB,
}  # fmt: skip


class TestVerdict:
    def judged(self, kind, free, bits="bf16", **given):
        args = {"runs_on": torch.device(kind), "train_batch_size": 4, "fsdp": [], **given}
        args.setdefault("gradient_checkpointing", False)
        return list(judge(NEEDED, free * GIB, SimpleNamespace(**args), bits))

    def test_a_processor_holds_the_program_too(self):
        first, last = self.judged("cpu", 16)
        assert first == (
            "it needs 10.00 GiB with the 4 rows that are longest: program 1.00, base 2.00, blocks "
            "1.00, gradients and optimizer 3.00, activations 3.00"
        )
        assert last == "it fits: cpu has 16.00 GiB"
        assert "it needs 9.00 GiB" in self.judged("cuda", 16)[0]

    @pytest.mark.parametrize(
        ("given", "advice"),
        [
            ({}, "--gradient_checkpointing, a smaller --per_device_train_batch_size or "
                 "--max_length, --bits 4"),
            ({"gradient_checkpointing": True, "bits": "4"},
             "a smaller --per_device_train_batch_size or --max_length"),
        ],
    )  # fmt: skip
    def test_what_does_not_fit_has_advice(self, given, advice):
        told = self.judged("cuda", 9, **given)  # a tenth is left free
        assert told[-1] == f"it does not fit: cuda has 9.00 GiB; try {advice}"

    def test_sharding_is_named(self):
        assert self.judged("cuda", 80, fsdp=["full_shard"])[1].startswith("sharding divides base")


def test_layers_are_folded_by_their_numbers():
    layers = [
        BlockSpec(f"layers.{n}.q", layout=MATRIX, shape=(6 if n < 3 else 8, 4), method="bone", r=2)
        for n in (0, 1, 2, 4)
    ]
    layers.append(BlockSpec("head", layout=MATRIX, shape=(2, 4), method="bone", r=2))
    assert list(fold(layers)) == [
        "layers.0-2.q: 3 x 4 -> 6, bone, r = 2, 12 parameters each",
        "layers.4.q: 1 x 4 -> 8, bone, r = 2, 16 parameters each",
        "head: 1 x 4 -> 2, bone, r = 2, 4 parameters each",
    ]
