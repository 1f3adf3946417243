"""What a run chooses by device and size, in a table over devices that need not be here."""

import pytest
import torch
from torch import nn

import disha
from disha.finetune import arguments
from disha.finetune.arguments import parse_flags
from disha.finetune.choices import choose, choose_rate, describe

PROCESSOR = ("cpu", True)
RECENT = ("cuda", True)
OLD = ("cuda", False)
APPLE = ("mps", True)
OLD_APPLE = ("mps", False)
"""A kind of device, and whether it has bfloat16."""


@pytest.mark.parametrize(
    ("device", "bits", "scales_losses", "recomputes"),
    [
        (PROCESSOR, "fp32", False, False),
        (RECENT, "bf16", False, True),
        (OLD, "fp16", True, True),
        (APPLE, "bf16", False, True),
        (OLD_APPLE, "fp16", True, True),
    ],
)
def test_a_device_sets_dtype_and_recomputation(device, bits, scales_losses, recomputes):
    choices = choose(*device, {})
    assert choices["bits"].value == bits
    assert choices["fp16"].value == scales_losses
    assert choices["gradient_checkpointing"].value == recomputes


def plan_of(width, wide, depth, method):
    """Return the plan of a Llama of these sizes, with r = 64."""
    with torch.device("meta"):
        layers = [nn.Linear(size, 8) for size in (*6 * [width], wide) for _ in range(depth)]
    return disha.plan_adapters(nn.ModuleList(layers), "all-linear", 64, method=method)


@pytest.mark.parametrize(
    ("width", "wide", "depth", "rates"),
    [
        (
            576,
            1536,
            30,
            {"bone": 2.4e-4, "bat": 2.4e-4, "bone_groups3": 4.8e-4, "bone_groups_all": 9.7e-4},
        ),
        (2048, 8192, 16, {"bone": 1.1e-4, "bone_groups_all": 1.3e-3}),
        (4096, 14336, 32, {"bone": 4.4e-5, "bone_groups_all": 9.4e-4}),
        (8192, 28672, 80, {"bone": 1.5e-5, "bone_groups_all": 5.9e-4}),
    ],
)
def test_the_layers_set_the_rate(width, wide, depth, rates):
    for method, rate in rates.items():
        plan = plan_of(width, wide, depth, method)
        assert choose_rate(plan)["learning_rate"].value == rate


@pytest.mark.parametrize("device", [PROCESSOR, RECENT, OLD, APPLE])
@pytest.mark.parametrize("bits", ["fp32", "bf16", "fp16", "8", "4"])
def test_flags_have_precedence(device, bits):
    given = {"bits": bits, "gradient_checkpointing": False, "learning_rate": 0.1, "fp16": False}
    choices = choose(*device, given)
    assert {name: choice.value for name, choice in choices.items()} == {
        name: given[name] for name in choices
    }


def test_autocast_to_bfloat16_leaves_losses_unscaled():
    assert not choose(*OLD, {"bf16": True})["fp16"].value


@pytest.mark.parametrize(
    ("device", "line"),
    [
        (
            PROCESSOR,
            "--bits fp32 (processors multiply float32 fastest), "
            "--gradient_checkpointing false (a processor has more memory than time)",
        ),
        (
            RECENT,
            "--bits bf16 (the device has bfloat16), "
            "--gradient_checkpointing true (an accelerator has more time than memory)",
        ),
    ],
)
def test_the_line_says_each_choice_as_its_flag_with_the_reason(device, line):
    assert describe(choose(*device, {"bits": "auto"})) == line


def test_the_line_of_the_rate_says_for_which_layers_it_is():
    assert describe(choose_rate(plan_of(4096, 14336, 32, "bone_groups_all"))) == (
        "--learning_rate 0.00094 (for bone_groups_all in 224 layers of up to 14,336 inputs)"
    )


def test_the_line_says_what_was_given():
    line = describe(choose(*PROCESSOR, {"learning_rate": 1e-3}))
    assert line.endswith("--learning_rate 0.001 (as given)")


class TestParsed:
    """The flags that the trainer gets."""

    def parse(self, monkeypatch, device, *words):
        kind, has = device
        monkeypatch.setattr(arguments, "best_device", lambda: torch.device(kind))
        monkeypatch.setattr(arguments, "has_bfloat16", lambda kind: has)
        return parse_flags([*words])

    def test_on_a_processor(self, monkeypatch, tiny):
        adapter, _, training = self.parse(monkeypatch, PROCESSOR, "--base", str(tiny))
        assert adapter.bits == "fp32"
        chosen = (training.fp16, training.bf16, training.gradient_checkpointing)
        assert chosen == (False, False, False)
        assert training.learning_rate is None  # until the layers are known
        assert training.optim == "adamw_torch_fused"

    def test_on_a_gpu(self, monkeypatch, tiny):
        adapter, _, training = self.parse(monkeypatch, RECENT, "--base", str(tiny))
        assert (adapter.bits, training.fp16, training.bf16) == ("bf16", False, False)
        assert training.gradient_checkpointing
        assert training.tf32 is None

    def test_on_a_gpu_without_bfloat16(self, monkeypatch):
        adapter, _, training = self.parse(monkeypatch, OLD)
        assert (adapter.bits, training.fp16) == ("fp16", True)

    def test_a_flag_of_the_command_line(self, monkeypatch):
        words = ["--bits", "fp32", "--gradient_checkpointing", "False", "--learning_rate", "0.5"]
        adapter, _, training = self.parse(monkeypatch, OLD, *words)
        assert (adapter.bits, training.fp16) == ("fp32", False)
        assert (training.gradient_checkpointing, training.learning_rate) == (False, 0.5)
