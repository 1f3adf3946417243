"""Run by vLLM's Python: measure what an adapter costs a token, and print the ratios.

The model is random, with the sizes of SmolLM2-135M, and the adapter has rank 64 on all its linear
layers. Times are of the processor, not of the clock, in rounds of random order.
"""

import os
import random
import statistics
import sys
import time
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # this process does all the work

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

import disha

RANK, ROUNDS, TOKENS, BATCHES = 64, 9, 16, (1, 8)
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
}


def write(folder: Path) -> None:
    """Write a model and an adapter of it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    model.save_pretrained(folder / "model")
    disha.inject_adapters(model, "layers", RANK, init="kaiming")
    disha.interop.lora.export(model, folder / "adapter")


def seconds(engine: LLM, request: LoRARequest | None, batch: int, tokens: int = TOKENS) -> float:
    """Return the processor's seconds for a batch of answers."""
    prompts = [{"prompt_token_ids": random.sample(range(5, 900), 16)} for _ in range(batch)]
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    start = time.process_time()
    engine.generate(prompts, sampling, lora_request=request, use_tqdm=False)
    return time.process_time() - start


def main() -> None:
    folder = Path(sys.argv[1])
    write(folder)
    settings = {
        "model": str(folder / "model"),
        "dtype": "float32",
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        "max_model_len": 256,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
    }
    able = LLM(**settings, enable_lora=True, max_loras=2, max_lora_rank=RANK)
    plain = LLM(**settings)
    request = LoRARequest("adapter", 1, str(folder / "adapter"))
    cases = {"plain": (plain, None), "base": (able, None), "adapter": (able, request)}
    for batch in BATCHES:
        for case in cases.values():
            seconds(*case, batch, tokens=4)
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(ROUNDS):
            for name in random.sample(list(cases), len(cases)):
                times[name].append(seconds(*cases[name], batch))
        for name in ("base", "adapter"):
            ratios = [one / other for one, other in zip(times[name], times["plain"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(f"{batch} at once, {name}: {middle:.2f} ({low:.2f} to {high:.2f})", flush=True)


if __name__ == "__main__":  # vLLM starts processes, which import this file
    main()
