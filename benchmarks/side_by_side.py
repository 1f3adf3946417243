"""The table of the whole job: `disha finetune` beside a script with Trainer and PEFT.

Every contestant trains the same model on the same rows, once each, in a process of its own. Rounds
of all contestants follow each other, in a new random order each. What is reported of a process:

- the time of a step: seconds per token after the first step, times the mean tokens of a step
- the peak of its resident memory, to the end of its last step
- the time from its start to the end of its first step
- the time of one evaluation: the loss on the same held-out rows. `disha finetune` evaluates before
  the first step too, so this is part of its time to the first step
- the time to save the adapter

Two other cases are counts of the parts that make the difference: the padding in batches, and the
memory of the loss of a large vocabulary.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.memory import allocated_peak, status_bytes
from benchmarks.protocol import Budget, compare, synchroniser
from benchmarks.settings import Profile, R, SideBySide
from disha.files import ADAPTER_NAME
from disha.finetune.base_model import demo_model
from disha.finetune.data.batches import TextBatches
from disha.finetune.data.docstrings import docstring_pairs
from disha.finetune.data.examples import Example, StoredExamples
from disha.finetune.models.checkpoint import open_model
from disha.finetune.text.from_gguf import tokenizer_from_gguf
from disha.finetune.text.tokenizer import Tokenizer
from disha.finetune.training.cross_entropy import summed_cross_entropy

__all__ = ["CONTESTANTS", "side_by_side"]

CONTESTANTS: Mapping[str, str] = {
    "disha": "disha finetune",
    "disha_padded": "disha finetune, rows as they come",
    "peft_miss": "Trainer, PEFT MiSS",
    "peft_lora": "Trainer, PEFT LoRA",
}
PAUSE = 0.02
"""Seconds between looks at what a process has written."""


def side_by_side(profile: Profile, device: torch.device) -> list[dict[str, Any]]:
    """Let the contestants train, and count what their batches and their losses take."""
    sizes = profile.side_by_side
    checkpoint = open_model(demo_model())
    assert checkpoint.fields is not None
    tokenizer = tokenizer_from_gguf(checkpoint.fields, checkpoint.path)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = _write_model(folder / "model", tokenizer, is_tiny=sizes.is_tiny)
        pairs, lengths = _pairs(tokenizer)
        rows = _write_rows(folder, pairs, lengths, sizes)
        cases = [_contest(folder, model, rows, dtype, sizes) for dtype in sizes.dtypes]
    return [*cases, _padding(lengths, sizes), _vocabulary(sizes, device)]


# --- the same model and rows for all -------------------------------------------------------------


class _Model(NamedTuple):
    """A model on disk: its folder, and the sizes of the weights that are adapted."""

    folder: Path
    outputs: int
    inputs: int


def _write_model(folder: Path, tokenizer: Tokenizer, *, is_tiny: bool) -> _Model:
    """Write SmolLM2-135M as a folder of Hugging Face libraries."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    decoder = open_model(demo_model()).load_model(torch.float32)
    found = decoder.config
    config = LlamaConfig(
        vocab_size=found.vocabulary,
        hidden_size=16 if is_tiny else found.hidden,
        intermediate_size=32 if is_tiny else found.feed_forward,
        num_hidden_layers=2 if is_tiny else found.layers,
        num_attention_heads=2 if is_tiny else found.heads,
        num_key_value_heads=1 if is_tiny else found.kv_heads,
        max_position_embeddings=found.context,
        rope_theta=found.rope_base,
        rms_norm_eps=found.norm_epsilon,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.end,
        eos_token_id=tokenizer.end,
    )
    model = LlamaForCausalLM(config)
    if not is_tiny:
        model.load_state_dict(decoder.state_dict())
    model.save_pretrained(folder)
    end = tokenizer.backend.id_to_token(tokenizer.end)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, eos_token=end)
    fast.save_pretrained(folder)
    weights = [m.weight for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    return _Model(folder, sum(w.shape[0] for w in weights), sum(w.shape[1] for w in weights))


def _pairs(tokenizer: Tokenizer) -> tuple[list[dict[str, str]], list[int]]:
    """Return the demo's rows, and how many tokens each has in the form that all train on."""
    pairs = [
        {"query": row.text("query"), "response": row.text("response")}
        for row in docstring_pairs().training
    ]
    random.Random(0).shuffle(pairs)
    texts = [f"{pair['query']}\n{pair['response']}" for pair in pairs]
    return pairs, [len(ids.ids) + 1 for ids in tokenizer.backend.encode_batch(texts)]


class _Rows(NamedTuple):
    """Files of the rows to train on, and of those to measure the loss on."""

    training: Path
    held_out: Path


def _write_rows(
    folder: Path, pairs: Sequence[Mapping[str, str]], lengths: Sequence[int], sizes: SideBySide
) -> _Rows:
    """Write as many rows as are used. None is so long that it would be cut."""
    fitting = (
        json.dumps(pair) + "\n"
        for pair, length in zip(pairs, lengths, strict=True)
        if length < sizes.length - 8
    )
    rows = _Rows(folder / "training.jsonl", folder / "held_out.jsonl")
    for path, count in zip(rows, (sizes.steps * sizes.batch, sizes.held_out), strict=True):
        path.write_text("".join(islice(fitting, count)))
    return rows


# --- the contest ---------------------------------------------------------------------------------


class _Measured(NamedTuple):
    """What a process took."""

    seconds_per_step: float
    tokens_per_second: float
    first_step: float
    peak_bytes: int
    evaluation: float
    saving: float


def _contest(
    folder: Path, model: _Model, rows: _Rows, dtype: str, sizes: SideBySide
) -> dict[str, Any]:
    r = min(R, 8) if sizes.is_tiny else R
    lora = max(1, round(r * model.outputs / (model.inputs + model.outputs)))
    found: dict[str, list[_Measured]] = {name: [] for name in sizes.contestants}
    order, shuffle = list(sizes.contestants), random.Random(0).shuffle
    for number in range(sizes.rounds):
        shuffle(order)
        for name in order:
            own = folder / f"{dtype}-{number}-{name}"
            own.mkdir()
            rank = lora if name == "peft_lora" else r
            command = _command(name, own, model.folder, rows, dtype, rank, sizes)
            found[name].append(_measure(command, own, sizes.steps))
    return {
        "what": "contest",
        "model": "SmolLM2-135M" if not sizes.is_tiny else "tiny",
        "dtype": dtype,
        "rows": sizes.steps * sizes.batch,
        "batch": sizes.batch,
        "steps": sizes.steps,
        "length": sizes.length,
        "held_out": sizes.held_out,
        "r": r,
        "lora_rank": lora,
        "trained": {"miss": r * model.outputs, "lora": lora * (model.inputs + model.outputs)},
        "contestants": {
            name: {field: [getattr(one, field) for one in ones] for field in _Measured._fields}
            for name, ones in found.items()
        },
        "left_out": {},
    }


def _command(
    name: str, folder: Path, model: Path, rows: _Rows, dtype: str, r: int, sizes: SideBySide
) -> list[str]:
    if name.startswith("peft"):
        plan = {"model": str(model), "dtype": dtype, "r": r, "batch": sizes.batch}
        plan |= {"rows": str(rows.training), "held_out": str(rows.held_out)}
        plan["method"] = name.removeprefix("peft_")
        (folder / "plan.json").write_text(json.dumps(plan))
        return [sys.executable, "-m", "benchmarks.trainer_script", str(folder)]
    flags = {
        "base_model_name_or_path": model,
        "data_path": rows.training,
        "eval_path": rows.held_out,
        "output_dir": folder,
        "bits": {"float32": "fp32", "bfloat16": "bf16"}[dtype],
        "bone_r": r,
        "template": r"{query}\n",
        "per_device_train_batch_size": sizes.batch,
        "max_seq_length": sizes.length,
        "samples": 0,
        "group_by_length": name == "disha",
    }
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    return [sys.executable, "-m", "disha", "finetune", *words]


def _measure(command: Sequence[str], folder: Path, steps: int) -> _Measured:
    """Run a process to its end, and read what it has written."""
    metrics = folder / "metrics.jsonl"
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    started, first_step, peak = time.perf_counter(), None, 0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, env=os.environ | threads, stdout=said, stderr=said)
        done: list[dict[str, Any]] = []
        while len(done) < steps:
            time.sleep(PAUSE)
            ended = process.poll() is not None
            peak = max(peak, status_bytes("VmHWM", process.pid) or 0)
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            records = [json.loads(line) for line in lines if line.endswith("}")]
            done = [one for one in records if "tokens" in one]
            if done and first_step is None:
                first_step = time.perf_counter() - started
            if ended:
                break
        if process.wait() or len(done) < steps or first_step is None:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed: {said.read().decode()[-2000:]}")
    tokens = [one["tokens"] for one in done]
    seconds = [one["tokens"] / one["tokens_per_second"] for one in done]
    speed = sum(tokens[1:]) / sum(seconds[1:])
    step = statistics.mean(tokens) / speed
    return _Measured(step, speed, first_step, peak, *_evaluation_and_saving(folder))


def _evaluation_and_saving(folder: Path) -> tuple[float, float]:
    """Return the seconds of one evaluation, and of saving the adapter."""
    times, report = folder / "times.json", folder / "report.json"
    if times.exists():  # a script has written them
        found = json.loads(times.read_text())
        return found["evaluation"], found["saving"]
    phases = json.loads(report.read_text())["phase_seconds"]
    (evaluation,) = (taken for name, taken in phases.items() if "loss before training" in name)
    # The adapter takes its name when it is complete. The last line before it is that of a step.
    complete = (folder / ADAPTER_NAME).stat().st_ctime
    return evaluation, complete - (folder / "metrics.jsonl").stat().st_mtime


# --- what makes the difference -------------------------------------------------------------------


def _padding(lengths: Sequence[int], sizes: SideBySide) -> dict[str, Any]:
    """Count which part of a batch is padding, with and without rows of similar length together."""
    rows = [Example((0,) * length, ((1, length),)) for length in lengths if length <= sizes.length]
    parts: dict[str, dict[str, float]] = {}
    for size in (4, 16):
        sources = {
            "as they come": TextBatches(StoredExamples(rows), size, 0, by_length=False),
            "by length": TextBatches(StoredExamples(rows), size, 0),
            "packed": TextBatches(StoredExamples(rows), size, 0, sizes.length),
        }
        parts[str(size)] = {name: _padded(source) for name, source in sources.items()}
    return {
        "what": "padding",
        "rows": len(rows),
        "length": sizes.length,
        "parts": parts,
        "left_out": {},
    }


def _padded(source: TextBatches) -> float:
    batches = [source.collate(batch) for batch in source.batches(1)]
    return 1 - sum(one.size for one in batches) / sum(one.tokens.numel() for one in batches)


def _vocabulary(sizes: SideBySide, device: torch.device) -> dict[str, Any]:
    """Measure the loss of a large vocabulary and its gradient, whole and in parts."""
    width = 576
    torch.manual_seed(0)
    head = nn.Linear(width, sizes.words, bias=False, device=device).requires_grad_(False)
    hidden = torch.randn(1, sizes.tokens, width, device=device, requires_grad=True)
    labels = torch.randint(sizes.words, (1, sizes.tokens), device=device)

    def whole() -> Tensor:
        return F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="sum")

    losses = {"whole": whole, "parts": partial(summed_cross_entropy, hidden, labels, head)}
    runs = {name: partial(_backward, loss, hidden) for name, loss in losses.items()}
    peaks = {name: allocated_peak(run, device) for name, run in runs.items()}
    budget = Budget(10.0, least_rounds=2, most_rounds=5, warm_up=0)
    seconds = compare(runs, budget, synchronise=synchroniser(device))
    return {
        "what": "vocabulary",
        "words": sizes.words,
        "tokens": sizes.tokens,
        "width": width,
        "dtype": "float32",
        "peak_bytes": peaks,
        "seconds": seconds,
        "left_out": {},
    }


def _backward(loss: Any, hidden: Tensor) -> None:
    torch.autograd.grad(loss(), hidden)
