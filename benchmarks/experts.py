"""`python -m benchmarks.experts`: a training step of mixtures of experts, adapted in several ways.

What is adapted are the stacked weights of the experts and nothing else: disha's Bone and BAT, and
PEFT's LoRA by `target_parameters`, all with as many trainable parameters as nearly as the ranks
allow. The models are of transformers, random, of one layer, in each implementation of
their experts. The step is loss, forward and backward down to the embedding's output, which requires
a gradient in every candidate, the frozen base included.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import disha
from benchmarks.candidates import BASE, CandidateError, lora_rank, trainable
from benchmarks.memory import kept_bytes
from benchmarks.protocol import Budget, Spread, compare, paired_ratios, synchroniser
from benchmarks.results import describe, write_results

__all__ = ["IMPLEMENTATIONS", "MODELS", "ExpertModel", "experts", "main"]

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
"""How transformers computes experts."""

TARGET = r"experts\.(gate_up|down)_proj$"
TARGET_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SCALE = 0.02
PEFT = "peft_lora"


@dataclass(frozen=True)
class ExpertModel:
    """A model and the batch of one step.

    Args:
        architecture: the prefix of its classes in transformers.
        hidden: width of a token.
        inner: width within an expert.
        experts: how many a layer has.
        chosen: how many a token goes to.
        r: the shard size.
        layers: how many.
        batch: number of sequences.
        length: tokens in each.
        names: what the configuration calls `inner` and `experts`.
        batched: whether batched_mm is measured: it copies a matrix for every token and expert.
    """

    architecture: str
    hidden: int
    inner: int
    experts: int
    chosen: int
    r: int
    layers: int
    batch: int
    length: int
    names: tuple[str, str]
    batched: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(in, out) of an expert's two weights."""
        return [(self.hidden, 2 * self.inner), (self.inner, self.hidden)]

    def build(self, implementation: str, device: torch.device) -> nn.Module:
        """Return the model, random and frozen."""
        import transformers

        inner, experts = self.names
        config = getattr(transformers, f"{self.architecture}Config")(
            vocab_size=1024,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=self.hidden // 64,
            head_dim=64,
            num_experts_per_tok=self.chosen,
            **{inner: self.inner, experts: self.experts},
            **self.more,
        )
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, f"{self.architecture}ForCausalLM")._from_config(
            config, experts_implementation=implementation, dtype=torch.float32
        )
        return model.to(device).requires_grad_(False).train()


_MIXTRAL = ("intermediate_size", "num_local_experts")
_QWEN3 = ("moe_intermediate_size", "num_experts")
MODELS: Mapping[str, Sequence[ExpertModel]] = {
    "full": (
        ExpertModel("Mixtral", 512, 1024, 8, 2, 64, 1, 1, 512, _MIXTRAL),
        ExpertModel("Qwen3Moe", 512, 256, 32, 4, 32, 1, 1, 512, _QWEN3),
        ExpertModel("Mixtral", 256, 512, 8, 2, 32, 1, 1, 128, _MIXTRAL, batched=True),
    ),
    "quick": (ExpertModel("Mixtral", 128, 256, 4, 2, 16, 1, 1, 64, _MIXTRAL, batched=True),),
}
BUDGETS = {
    "full": Budget(25.0, least_rounds=9, most_rounds=60),
    "quick": Budget(2.0, least_rounds=2, most_rounds=5),
}


CLOCKS: Mapping[str, Callable[[], float]] = {
    "wall": time.perf_counter,
    "cpu": time.process_time,
}
"""What tells the time. On a machine that others use as well, the CPU time of one thread."""


def experts(profile: str, device: torch.device, clock: str = "wall") -> list[dict[str, Any]]:
    """Measure every model in every implementation.

    Args:
        profile: a key of `MODELS`.
        device: where.
        clock: a key of `CLOCKS`.
    """
    return [
        _measure(model, implementation, BUDGETS[profile], device, clock)
        for model in MODELS[profile]
        for implementation in IMPLEMENTATIONS
        if implementation != "batched_mm" or model.batched
    ]


def _measure(
    size: ExpertModel, implementation: str, budget: Budget, device: torch.device, clock: str
) -> dict[str, Any]:
    base = size.build(implementation, device)
    rank = lora_rank(size.sizes, size.r)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1024, (size.batch, size.length), generator=generator).to(device)
    ways: dict[str, Callable[[nn.Module], nn.Module]] = {
        BASE: lambda model: model,
        "bone": lambda model: disha.inject_adapters(model, TARGET, size.r),
        "bat": lambda model: disha.inject_adapters(model, TARGET, size.r, method="bat"),
        PEFT: lambda model: _lora(model, rank),
    }
    steps, parameters, kept = {}, {}, {}
    for name, adapt in ways.items():
        shared = {id(parameter): parameter for parameter in base.parameters()}
        model = adapt(copy.deepcopy(base, dict(shared))).train()
        _fill(model)
        model.get_input_embeddings().register_forward_hook(_require_gradient)
        step = _Step(model, ids)
        step()
        _check(name, model)
        steps[name], parameters[name] = step, sum(p.numel() for p in trainable(model))
        step.clear()
        kept[name] = kept_bytes(model, step.loss)
    return {
        "model": size.architecture,
        "implementation": implementation,
        "hidden": size.hidden,
        "inner": size.inner,
        "experts": size.experts,
        "chosen": size.chosen,
        "layers": size.layers,
        "tokens": size.batch * size.length,
        "dtype": "float32",
        "r": size.r,
        "lora_rank": rank,
        "parameters": parameters,
        "kept_bytes": kept,
        "clock": clock,
        "seconds": compare(steps, budget, synchronise=synchroniser(device), clock=CLOCKS[clock]),
    }


def _lora(model: nn.Module, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=[], target_parameters=TARGET_PARAMETERS
    )
    adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=False)
    return adapted


def _fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * SCALE)


def _require_gradient(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output.requires_grad_()


class _Step:
    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.model, self.ids, self.parameters = model, ids, trainable(model)

    def clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def loss(self) -> Tensor:
        loss: Tensor = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        return loss

    def __call__(self) -> Tensor:
        self.clear()
        loss = self.loss()
        loss.backward()
        return loss.detach()


def _check(name: str, model: nn.Module) -> None:
    for parameter in trainable(model):
        gradient = parameter.grad
        if gradient is None or not gradient.any() or not torch.isfinite(gradient).all():
            raise CandidateError(f"{name}: a gradient is missing, zero or not finite")


def _line(row: Mapping[str, Any]) -> str:
    """Return the ratios of one case as text."""
    seconds = row["seconds"]

    def ratio(name: str, to: str) -> str:
        spread = Spread.of(paired_ratios(seconds, name, to))
        return f"{name}/{to} {spread.median:.3f} [{spread.low:.3f}, {spread.high:.3f}]"

    pairs = [("bone", PEFT), ("bat", PEFT), ("bone", BASE), ("bat", BASE), (PEFT, BASE)]
    kept = {name: round(size / 2**20, 1) for name, size in row["kept_bytes"].items()}
    return (
        f"{row['model']} {row['hidden']}/{row['inner']} x {row['experts']}, "
        f"{row['tokens']} tokens, {row['implementation']}, {len(seconds[BASE])} rounds, base "
        f"{Spread.of(seconds[BASE]).median * 1e3:.0f} ms: "
        f"{'; '.join(ratio(*pair) for pair in pairs)}; kept MiB {kept}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the ratios, write the results.

    Args:
        arguments: of the command line; the process's by default.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small size, to see that all works")
    parser.add_argument("--out", type=Path, default=Path("bench-output/experts.json"))
    parser.add_argument("--threads", type=int, help="of torch on the CPU; all cores by default")
    parser.add_argument("--device", help="cpu or cuda; cuda by default where there is one")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    asked = parser.parse_args(arguments)
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    device = torch.device(asked.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    profile = "quick" if asked.quick else "full"
    results = describe(profile, device)
    started = time.perf_counter()
    results["tables"]["experts"] = experts(profile, device, asked.clock)
    results["table_seconds"]["experts"] = time.perf_counter() - started
    write_results(asked.out, results)
    for row in results["tables"]["experts"]:
        print(_line(row))
    print(f"results: {asked.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
