"""`--dry_run`: what a run would do, and nothing of it done."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import disha
from disha.finetune.adapting import inject
from disha.finetune.data.batches import TokenBatch
from disha.finetune.data.encoding import Encoder
from disha.finetune.data.rows import Dataset, Row
from disha.finetune.estimate import Measuring, estimate
from disha.finetune.models.decoder import Decoder, DecoderConfig
from disha.finetune.preview import _example, collapsed
from disha.finetune.report import peak_memory
from disha.finetune.settings import FinetuneSettings, TrainingSettings
from disha.finetune.training.objectives import objective_for
from disha.finetune.training.optimizers import make_optimizer
from tests.finetune import tiny_gguf
from tests.finetune.command_line import ROWS, with_values, write_rows
from tests.processes import environment

LAYERS = 2 * 8 * (64 + 32 + 32 + 64 + 96 + 96 + 64)


def test_nothing_is_written_and_no_weight_is_read(finetune, monkeypatch):
    def read(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr("disha.finetune.models.gguf.GGUFCheckpoint.rows", read)
    done = finetune("--dry_run")
    assert (done.code, done.err) == (0, "")
    assert not finetune.output.exists()


def test_layers_and_parameters_are_those_of_the_run(finetune):
    shown = finetune("--dry_run").out
    assert re.search(r"model\.layers\.0-1\.mlp\.down_proj +2 +8 +96 -> 64 +1,024\n", shown)
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
        ({"streaming": True}, "6 steps of 4 rows, 0.60 passes over the data"),
    ],
)
def test_steps_and_rows_are_told(finetune, changes, expected):
    assert expected in finetune("--dry_run", **changes).out


def test_rows_that_are_cut_or_left_out_are_counted(finetune, tmp_path):
    rows = [*ROWS, {"query": "x" * 400, "response": "y"}, {"query": "x", "response": "y" * 400}]
    data = write_rows(tmp_path / "long.jsonl", [*rows, {}])
    shown = " ".join(finetune("--dry_run", "--skip_bad_rows", data_path=data).out.split())
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


# --- it fits a screen -----------------------------------------------------------------------------


def lines_of(done):
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 100
    return lines


def test_what_is_learned_is_marked(finetune):
    shown = finetune("--dry_run").out.replace("\n  ", "")
    assert re.search(r"the first row, \d+ tokens; the \d+ in \[\[ \]\] are learned:", shown)
    question = "<|im_start|>user\\nsay hello 0<|im_end|>\\n<|im_start|>assistant\\n"
    assert f"{question}[[hello hello hello hello<|im_end|>]]" in shown


def test_every_answer_of_a_conversation_is_marked(tiny_tokenizer):
    messages = [
        {"role": role, "content": f"{role} \x1b[2J " + "long \n" * 40}
        for _ in range(12)
        for role in ("user", "assistant")
    ]
    encoder = Encoder(tiny_tokenizer, ("messages",), 100_000, None)
    data = Dataset([Row({"messages": messages}, "row 1")], [])
    lines = "\n".join(_example(SimpleNamespace(encoder=encoder, dataset=data))).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) <= 14
    shown = "".join(lines)
    assert shown.count("[[") == shown.count("]]") == 6 + 1  # once in the title
    assert "characters ..." in shown
    assert "\x1b" not in shown


class Net(nn.Module):
    """Many groups of layers with long names, and layers that can't be adapted."""

    def __init__(self):
        super().__init__()
        for number in range(40):
            self.add_module(f"a_rather_long_name_of_a_layer_{number}" * 3, nn.Linear(8, 8))
        self.towers = nn.ModuleList(nn.ModuleList([nn.Linear(8, 8)] * 3) for _ in range(5))
        self.others = nn.ModuleList(nn.Bilinear(8, 8, 8) for _ in range(30))

    def forward(self, x):
        for layer in (*self.children(), *(layer for tower in self.towers for layer in tower)):
            x = layer(x) if isinstance(layer, nn.Linear) else x
        return x


@pytest.fixture
def numbers(tmp_path):
    rows = [{"query": [0.5] * 8, "response": [1.0] * 8} for _ in range(20)]
    return write_rows(tmp_path / "numbers.jsonl", rows)


def test_a_model_of_many_groups_fits_a_screen(finetune, numbers):
    model = {"base_model_name_or_path": None, "model": "tests.finetune.test_preview:Net"}
    lines = lines_of(
        finetune("--dry_run", **model, data_path=numbers, max_seq_length=None, target=".")
    )
    assert len(lines) <= 40
    assert any(re.search(r"^and \d+ more groups of layers$", line) for line in lines)


@pytest.mark.parametrize(
    ("numbers_seen", "expected"),
    [((0, 1, 2, 3), "0-3"), ((4,), "4"), ((0, 2), "0,2"), ((1, 2, 7), "1-2,7")],
)
def test_names_collapse(numbers_seen, expected):
    names = [f"a.{number}.b2" for number in numbers_seen]
    assert collapsed(names) == f"a.{expected}.b2"


def test_names_with_many_gaps_stay_short():
    assert collapsed([f"a.{number}" for number in range(0, 40, 2)]) == "a.0,2,...,38"


# --- memory and time ------------------------------------------------------------------------------

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


def batch_of(rows=2, time=32):
    tokens = torch.zeros(rows, time, dtype=torch.int64)
    return TokenBatch(tokens, tokens, None, rows * time, rows * time)


def empty(config=CONFIG, dtype=torch.float32):
    with torch.device("meta"):
        return Decoder(config).to(dtype)


def estimated(config=CONFIG, batch=None, dtype=torch.float32, **changes):
    return estimate(empty(config, dtype), with_values(SETTINGS, **changes), batch or batch_of())


def run_for_real(settings, dtype=torch.float32):
    """The peak of what one batch makes, with a real model; its weights are not counted."""
    model = Decoder(CONFIG).to(dtype)
    inject(model, settings.adapter)
    objective = objective_for(model, has_tokenizer=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    with Measuring(real=True) as live:
        torch.autograd.grad(objective(batch_of()), trained)
    return live.peak


@pytest.mark.parametrize("method", ["bone", "bat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_values_a_batch_takes_what_it_takes_for_real(method, dtype):
    settings = with_values(SETTINGS, method=method)
    found = estimate(empty(dtype=dtype), settings, batch_of()).batch
    assert found == pytest.approx(run_for_real(settings, dtype), rel=0.1)


def kept_for_backward(settings):
    """What autograd keeps of a real model, counted independently."""
    model = Decoder(CONFIG)
    inject(model, settings.adapter)
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = objective_for(model, has_tokenizer=True)(batch_of())
    del loss
    return sum(s.nbytes() for pointer, s in kept.items() if pointer not in owned)


@pytest.mark.parametrize("method", ["bone", "bat"])
def test_what_autograd_keeps_is_most_of_a_batch(method):
    settings = with_values(SETTINGS, method=method)
    kept = kept_for_backward(settings)
    assert kept < estimated(method=method).batch < 2 * kept


STEP = """
import resource, torch
from disha.finetune.adapting import inject
from disha.finetune.training.objectives import objective_for
from disha.finetune.training.optimizers import make_optimizer
from tests.finetune.test_preview import LARGE, SETTINGS, Decoder, batch_of

def peak():
    # ru_maxrss would count the memory of the process that started this one.
    line, = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

def now():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

before = now()
model = Decoder(LARGE)
inject(model, SETTINGS.adapter)
objective = objective_for(model, has_tokenizer=True)
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained)
objective(batch_of(2, 256)).backward()
optimizer.step()
print(peak() - before)
"""
LARGE = replace(CONFIG, vocabulary=20_000, hidden=512, feed_forward=1536, layers=6, head_dim=128)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted otherwise elsewhere")
def test_a_real_step_takes_the_memory_that_was_estimated():
    found = estimated(LARGE, batch_of(2, 256)).total
    done = subprocess.run(
        [sys.executable, "-c", STEP], capture_output=True, text=True, env=environment(), check=True
    )
    assert found == pytest.approx(int(done.stdout), rel=0.25)


def test_weights_adapter_and_optimizer_are_counted():
    found = estimated()
    model = Decoder(CONFIG)
    base = sum(p.nbytes for p in model.parameters())
    inject(model, SETTINGS.adapter)
    blocks = sum(p.nbytes for p in disha.adapter_parameters(model))
    assert (found.base, found.adapter, found.optimizer) == (base, blocks, 2 * blocks)
    assert found.total == base + 3 * blocks + found.batch


@pytest.mark.parametrize("name", ["sgd", "adafactor"])
def test_what_another_optimizer_keeps_is_counted(name):
    model = Decoder(CONFIG)
    inject(model, SETTINGS.adapter)
    optimizer = make_optimizer(model, TrainingSettings(optimizer=name))
    for block in disha.adapter_parameters(model):
        block.grad = torch.ones_like(block)
    optimizer.step()
    state = [one for kept in optimizer.state.values() for one in kept.values()]
    moments = sum(one.nbytes for one in state if one.dim() > 0)
    assert estimated(optimizer=name).optimizer == moments


def test_operations_are_those_of_the_products():
    """A frozen product is computed forward and for its input, an adapter's for its block too."""
    tokens, model = 2 * 32, Decoder(CONFIG)
    layers = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    frozen = sum(m.weight.numel() for m in [*layers, model.lm_head])
    blocks = sum(8 * m.out_features for m in layers)
    expected = 2 * tokens * (2 * frozen + 3 * blocks)
    assert estimated().operations == pytest.approx(expected, rel=0.1)


def test_checkpointing_keeps_less_and_longer_rows_more():
    config = replace(CONFIG, layers=16)
    usual = estimated(config).batch
    assert estimated(config, gradient_checkpointing=True).batch < 0.6 * usual
    assert estimated(config, batch_of(2, 64)).batch == pytest.approx(2 * usual, rel=0.1)


@pytest.mark.parametrize(("bits", "bytes_each"), [("8", 1.0), ("4", 0.516)])
def test_quantised_weights_count_as_packed(bits, bytes_each):
    found = estimated(dtype=torch.bfloat16, bits=bits).base
    layers = [m for m in Decoder(CONFIG).model.layers.modules() if isinstance(m, nn.Linear)]
    linear = sum(m.weight.numel() for m in layers)
    others = sum(p.numel() for p in Decoder(CONFIG).parameters()) - linear
    assert found == pytest.approx(others * 2 + linear * bytes_each, rel=0.01)


@pytest.mark.skipif(sys.platform == "win32", reason="its peak memory is not known")
def test_a_large_model_is_estimated_without_its_memory():
    config = replace(
        CONFIG, vocabulary=128_256, hidden=8192, feed_forward=28_672, layers=8, heads=64,
        kv_heads=8, head_dim=128,
    )  # fmt: skip
    before = peak_memory()
    found = estimated(config, bits="bf16", bone_r=64, dtype=torch.bfloat16)
    assert found.base == pytest.approx(17.9e9, rel=0.01)
    assert peak_memory() - before < 1e9


class NeedsValues(nn.Module):
    """A model whose forward depends on the values of its input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x) if x.sum().item() > 0 else -self.layer(x)


class Images(nn.Module):
    """A convolution, statistics, and a head."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv1d(1, 8, 3), nn.BatchNorm1d(8)
        self.head = nn.Linear(48, 8)

    def forward(self, x):
        return self.head(self.norm(self.convolution(x.unsqueeze(1))).flatten(1))


@pytest.mark.parametrize("name", ["NeedsValues", "Images"])
def test_models_of_any_kind_are_estimated(finetune, numbers, name):
    model = {"base_model_name_or_path": None, "model": f"tests.finetune.test_preview:{name}"}
    changes = {"data_path": numbers, "max_seq_length": None, "bone_r": 2}
    shown = " ".join(finetune("--dry_run", **model, **changes).out.split())
    assert re.search(r"about [\d.]+ MiB: base model .*, and at most [\d.]+ MiB for a batch", shown)
    assert re.search(r"time: about [\d.e-]+ s a step, 0 s in all: [\d.e-]+ billion", shown)
    assert "batch of shape (4, 8)" in shown


def test_a_language_model_of_ones_own_is_estimated(finetune):
    model = {"base_model_name_or_path": None, "model": "tests.finetune.factories:gpt2"}
    shown = " ".join(finetune("--dry_run", **model).out.split())
    assert "for a batch of 4 rows of 96 tokens time: about" in shown


@pytest.mark.parametrize("kind", ["gemma3", "mixtral", "gpt_oss"])
def test_models_of_transformers_are_estimated_without_values(finetune, tiny_folder, kind):
    shown = finetune("--dry_run", base_model_name_or_path=tiny_folder(kind), bone_r=4).out
    assert "memory of each process: about" in shown
    assert "time: about" in shown


def test_an_estimate_that_needs_the_values_of_a_file_says_so(finetune, monkeypatch):
    def forward(self, tokens, *_, **__):
        return tokens.sum().item()

    monkeypatch.setattr(Decoder, "forward", forward)
    done = finetune("--dry_run")
    assert done.code == 0
    assert "memory and time: not known, because the model needs values to run" in done.out
