"""Tiny language models of `transformers`: random, and always the same."""

from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from tests.conftest import seed_torch

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SMALLER = {"num_hidden_layers": 1, "num_attention_heads": 2}


def llama(**options: object) -> nn.Module:
    seed_torch(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **options}))


def mixtral(**options: object) -> nn.Module:
    seed_torch(0)
    return MixtralForCausalLM(MixtralConfig(**{**SIZES, "num_local_experts": 4, **options}))


def gpt2(**options: object) -> nn.Module:
    seed_torch(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 32}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **options}))
