"""Functions for `--model tests.finetune.factories:...`, good and bad."""

from __future__ import annotations

import torch
from torch import nn

from tests.finetune import tiny_checkpoints, tiny_gguf

SEED = 3


def gpt2():
    """A model and a tokenizer of transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    sizes = {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 2}
    special = {"bos_token_id": tiny_checkpoints.BEGIN, "eos_token_id": tiny_checkpoints.END}
    torch.manual_seed(SEED)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tiny_gguf.TOKENS), **sizes, **special))
    backend = tiny_checkpoints.tokenizer(begin=False)
    return model, PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


def gpt2_alone():
    return gpt2()[0]


def classifier():
    """Three classes of four numbers."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
    )


def regressor():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))


def unseeded():
    """A model with random weights, and with statistics that training must not change.

    Its function prints something, which must not mix with what the command prints for itself.
    """
    print("making the model", end=" ")
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))


def without_layers():
    return nn.Embedding(3, 4)


def with_an_unusable_tokenizer():
    return gpt2_alone(), "a tokenizer"


def number():
    return 3


def three():
    return classifier(), None, None


def failing():
    raise OSError("no weights here")


def with_an_argument(path):
    return path


VALUE = 3
