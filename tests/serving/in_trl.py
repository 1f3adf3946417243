"""Run by vLLM's Python: train by GRPO with vLLM inside, and write what each step has found.

The file that the command line names has a model, the method and the rank of its adapter, what is
sent to vLLM (`weights` or `adapter`), and a server's address, or null for vLLM in this process.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TRL_EXPERIMENTAL_SILENCE": "1"}

import torch
import transformers
import vllm.model_executor.layers.utils as kernels
from datasets import Dataset
from trl import GRPOConfig
from trl.generation import vllm_generation
from vllm import LLM

import disha
from disha.integrations.trl import GRPOTrainer


def keep_weights(layer: torch.nn.Module, remove_weight: bool) -> None:
    """Multiply by the weight as it is: the kernel for processors packs a copy, and never again."""
    layer.cpu_linear = torch.nn.functional.linear


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@torch.no_grad()
def log_probs_of(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def main() -> None:
    file = Path(sys.argv[1])
    asked = json.loads(file.read_text())
    if asked["sent"] == "weights":
        kernels.dispatch_cpu_unquantized_gemm = keep_weights
    vllm_generation.LLM = lambda **settings: LLM(
        **{**settings, "dtype": "float32", "enforce_eager": True}
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(asked["model"], padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32)
    before = {name: value.clone() for name, value in model.named_parameters()}
    disha.inject_adapters(model, "layers", asked["r"], method=asked["method"])
    steps = []

    def reward(prompts, completion_ids, **columns):
        engine = trainer.vllm_generation
        engine.generation_kwargs = {"temperature": 0.0, "ignore_eos": True}
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        _, answers, found, _ = engine.generate(ids, None, num_generations=1)
        engine.generation_kwargs = {}
        errors, equal = [], True
        for prompt, tokens, log_probs in zip(ids, answers, found, strict=True):
            tokens = list(tokens)
            equal = equal and tokens == greedy(model, prompt, 6)
            wanted = log_probs_of(model, prompt, tokens)
            errors.append(float((torch.tensor(log_probs)[:, 0] - wanted).abs().max()))
            with disha.adapters_disabled(model):
                effect = log_probs_of(model, prompt, tokens) - wanted
        step = {"equal": equal, "error": max(errors), "effect": float(effect.abs().max())}
        steps.append(step | {"rollouts": completion_ids})
        return [float(sum(ids) % 7) for ids in completion_ids]

    settings = {
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "max_completion_length": 6,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "use_vllm": True,
        "vllm_mode": "server" if asked["server"] else "colocate",
        "vllm_server_base_url": asked["server"],
        "vllm_max_model_length": 64,
    }
    trainer = GRPOTrainer(
        model,
        reward,
        GRPOConfig(str(file.parent / "run"), **settings),
        train_dataset=Dataset.from_list([{"prompt": "say two"}] * 6),
        processing_class=tokenizer,
        vllm_adapter_folder=file.parent / "adapter" if asked["sent"] == "adapter" else None,
    )
    trainer.train()
    same = all(
        torch.equal(value, before[name])
        for name, value in model.named_parameters()
        if name in before
    )
    found = {"steps": steps, "base_is_the_same": same}
    file.with_name("found.json").write_text(json.dumps(found))


if __name__ == "__main__":  # vLLM starts processes, which import this file
    main()
