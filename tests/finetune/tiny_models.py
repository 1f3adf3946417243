"""Tiny random language models on disk, with a tokenizer, and rows that they can learn."""

import json
import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED_WITHOUT_END = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
)
"""A chat template that marks answers, and leaves the end of the turn out of the mark."""

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
EXPERTS = {"num_experts_per_tok": 2}
FAMILIES = {
    "Llama": SIZES,
    "Gemma": SIZES | {"head_dim": 32},
    "Phi": SIZES,
    "Mixtral": SIZES | EXPERTS | {"num_local_experts": 4},
    "GptOss": SIZES | EXPERTS | {"num_local_experts": 4, "head_dim": 32},
    "Qwen3Moe": SIZES | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 32},
    "Mamba": {"hidden_size": 64, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 8},
}
"""A family of `transformers` -> the sizes of its tiny model."""


def tokenizer(*, chat: bool = False) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of bytes and a few words."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([" ".join(["say", *WORDS])], trainer)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    if chat:
        made.chat_template = CHATML
    return made


def write_model(
    folder: Path, family: str = "Llama", *, chat: bool = False, seed: int = 0, **more: object
) -> Path:
    """Write a tiny random model of a family."""
    torch.manual_seed(seed)
    words = tokenizer(chat=chat)
    config = getattr(transformers, f"{family}Config")(
        **{**FAMILIES.get(family, SIZES), "vocab_size": len(words), **more},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def rows(count: int = 48) -> list[dict[str, str]]:
    """Rows such as `say two 3` and `two two two`."""
    draw = random.Random(0)
    found = []
    for _ in range(count):
        word, times = draw.choice(WORDS), draw.randint(1, 4)
        found.append({"query": f"say {word} {times}", "response": " ".join([word] * times)})
    return found


def write_rows(path: Path, written: list | None = None) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in written or rows()))
    return path
