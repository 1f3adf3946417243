"""Folders as Hugging Face libraries write them, with models of every family small enough to train.

The weights are random and large enough for attention to be far from uniform; norms and biases are
random too, so that none can be left out unnoticed. The tokenizer is that of `tiny_gguf`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.finetune import tiny_gguf
from tests.finetune.tiny_gguf import (
    CONTEXT,
    EPSILON,
    HEAD_DIM,
    MERGES,
    SPECIAL,
    TOKENS,
    llama3_factors,
)

FAMILIES = ("llama2", "llama3", "mistral", "qwen2", "qwen3", "smollm2")
"""Those that the built-in decoder reads."""

OTHERS = ("gemma3", "glm", "gpt_oss", "mamba", "mixtral", "phi", "qwen3_moe", "rwkv")
"""Those that need transformers."""

WINDOW = 12

PAD, BEGIN, END = range(3)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_SIZES: Mapping[str, Any] = {
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "intermediate_size": 128,  # 4 bits on the CPU need multiples of 64
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": EPSILON,
    "pad_token_id": PAD,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
}

_LLAMA3_ROPE: Mapping[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# What tells the families apart, in sizes where it shows.
_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama2": {"model_type": "llama", "num_key_value_heads": 4},
    "llama3": {"model_type": "llama", "rope_parameters": _LLAMA3_ROPE},
    "mistral": {"model_type": "mistral", "sliding_window": WINDOW},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 32},
    "smollm2": {"model_type": "llama", "tie_word_embeddings": True},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": WINDOW},
    "glm": {"model_type": "glm", "head_dim": 16},
    "gpt_oss": {
        "model_type": "gpt_oss",
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    },
    "mamba": {"model_type": "mamba", "state_size": 4},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4},
    "phi": {"model_type": "phi"},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
    },
    "rwkv": {"model_type": "rwkv", "context_length": CONTEXT, "attention_hidden_size": 64},
    # transformers splits its query_key_value and renames its attention.
    "sarvam_moe": {
        "model_type": "sarvam_moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
    },
}
_BEGIN_EVERY_TEXT = ("llama2", "llama3", "mistral")


def write_folder(
    path: Path, family: str, *, shard_size: str | None = None, seed: int = 0, **changes: Any
) -> Path:
    """Write config.json, safetensors, tokenizer.json and its configurations into a folder.

    Args:
        path: the folder; made if it is not there.
        family: one of `FAMILIES` or `OTHERS`, or `sarvam_moe`.
        shard_size: the most that one safetensors file holds, such as "50KB"; one file if None.
        seed: of the weights.
        changes: keys of config.json to add or replace.

    Returns:
        The folder.
    """
    model = random_model(family, seed=seed, **changes)
    model.save_pretrained(path, **({} if shard_size is None else {"max_shard_size": shard_size}))
    write_tokenizer(path, begin=family in _BEGIN_EVERY_TEXT)
    return path


def random_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The model of transformers that `write_folder` saves."""
    config = AutoConfig.for_model(**{**_SIZES, **_CONFIGS[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if name.endswith("norm.weight") else noise)
    return model


def write_gguf(path: Path, family: str, *, seed: int = 0, **changes: Any) -> Path:
    """Write the model that `write_folder` writes as a GGUF file, as converters do.

    Args:
        path: the file.
        family: one of `FAMILIES`; of Mistral without its window, which GGUF does not know.
        seed: of the weights.
        changes: keys of config.json to add or replace.
    """
    model = random_model(family, seed=seed, **changes)
    config, state = model.config, dict(model.state_dict())
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    architecture = "llama" if config.model_type == "mistral" else config.model_type
    head_dim = getattr(config, "head_dim", None) or HEAD_DIM
    described = {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": config.rope_parameters["rope_theta"],
    }
    extra = {}
    if config.rope_parameters["rope_type"] == "llama3":
        extra["rope_freqs.weight"] = llama3_factors(head_dim, config.rope_parameters)
    metadata = {f"{architecture}.{key}": value for key, value in described.items()}
    return tiny_gguf.write_gguf(
        path, state, architecture=architecture, metadata=metadata, extra=extra
    )


def edit_config(folder: Path, *, without: tuple[str, ...] = (), **changes: Any) -> None:
    """Change config.json of a folder as it stands, with keys that no library would write."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: config[key] for key in config if key not in without}))


def tokenizer(*, begin: bool) -> Tokenizer:
    """A byte-level BPE tokenizer that cuts as SmolLM2's does.

    Args:
        begin: whether it puts <|im_start|> before every text.
    """
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(m.split()) for m in MERGES]))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    if begin:
        token = SPECIAL[BEGIN]
        made.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, BEGIN)]
        )
    return made


def write_tokenizer(folder: Path, *, begin: bool = False) -> None:
    """Write tokenizer.json and tokenizer_config.json into a folder."""
    tokenizer(begin=begin).save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIAL[PAD],
        "bos_token": SPECIAL[BEGIN],
        "eos_token": SPECIAL[END],
        "add_bos_token": begin,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2))
