"""A training step over a base in 8 or 4 bits, divided by that of PEFT's LoRA.

    python -m benchmarks.quantized
    python -m benchmarks.quantized --tiny    # a tiny model, to try the command

The base is a random Llama in bfloat16, or in float32 if the processor has no instructions for that.
bitsandbytes quantises all its projections. Bone and BAT of disha, and MiSS and LoRA of PEFT, train
about as many parameters, in the base's dtype. In one process and on one thread, they take turns in
random order, with a complete step: forward, backward, AdamW. *Time* is processor time, divided
within a round: the median, and half the distance of the quartiles. *Memory* is the most that the
allocator gives out in a step, beyond what is there before it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.candidates import CANDIDATES, MODEL_SCALE
from benchmarks.four_bits import quantize
from benchmarks.markdown import ratio_text, run_text, spread_text, table
from benchmarks.memory import allocated_peak
from benchmarks.protocol import Budget, R, Spread, compare, paired_ratios, slow_dtypes
from benchmarks.results import describe
from benchmarks.steps import check_gradients, fill, full_step, language_loss, trainable
from benchmarks.timers import ClockTimer
from benchmarks.whole_model import projections

CPU, ROWS, VOCABULARY = torch.device("cpu"), 4, 1024
COMPARED, OTHER = ("bone", "bat", "peft_miss", "peft_lora"), "peft_lora"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantized")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the command")
    tiny = parser.parse_args(arguments).tiny
    sizes = (128, (8,), Budget(0.0, 2)) if tiny else (512, (64, 256), Budget(40.0, 9, 40))
    print(run_text(describe(CPU)), end="\n\n")
    print(table(["bits, tokens, adapter", "time", "memory"], list(measured(*sizes))))


def measured(width: int, lengths: Sequence[int], budget: Budget) -> Iterator[list[str]]:
    """Yield the row of each number of bits and tokens, and of each adapter but LoRA."""
    dtype = torch.float32 if slow_dtypes({torch.bfloat16}, CPU) else torch.bfloat16
    for bits in (8, 4):
        for length in lengths:
            ids = torch.randint(VOCABULARY, (ROWS, length))
            steps = {name: training_step(name, width, dtype, bits, ids) for name in COMPARED}
            seconds = compare(steps, budget, ClockTimer(time.process_time))
            peaks = {name: allocated_peak(step, CPU) for name, step in steps.items()}
            for name in COMPARED[:-1]:
                ratio = spread_text(Spread.of(paired_ratios(seconds, name, OTHER)))
                case = f"{bits}, {ROWS * length:,}, {CANDIDATES[name].title}"
                yield [case, ratio, ratio_text(peaks[name] / peaks[OTHER])]


def training_step(
    name: str, width: int, dtype: torch.dtype, bits: int, ids: torch.Tensor
) -> Callable[[], None]:
    """Return the step of an adapter over a base of its own."""
    torch.manual_seed(0)
    model = quantize(llama(width).to(dtype), bits=bits)
    setattr(model, f"is_loaded_in_{bits}bit", True)  # PEFT asks
    CANDIDATES[name].adapt(model, projections(model), R)
    for parameter in trainable(model):
        parameter.data = parameter.data.to(dtype)
    fill(trainable(model), MODEL_SCALE)
    loss = language_loss(model.train(), ids)
    loss().backward()
    check_gradients(name, model)
    return full_step(loss, torch.optim.AdamW(trainable(model), lr=1e-4))


def llama(width: int) -> LlamaForCausalLM:
    """Return a Llama of four layers, with random weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=4,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
    )
    return LlamaForCausalLM(config)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
