"""What a hash of a base model counts, and what it does not."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch.utils._python_dispatch import return_and_correct_aliasing

from disha.finetune.base_model import open_base_model
from disha.finetune.hashing import add_state
from disha.finetune.settings import ModelSettings

CPU = torch.device("cpu")


def hash_of(state):
    digest = hashlib.sha256()
    add_state(digest, state)
    return digest.hexdigest()


def model_hash(path, **settings):
    digest = hashlib.sha256()
    open_base_model(ModelSettings(base_model_name_or_path=path, **settings)).load(CPU, digest)
    return digest.hexdigest()


def test_how_a_model_is_kept_does_not_count(tiny_folder, tiny_path):
    folder = tiny_folder("llama3")
    kept = {bits: model_hash(folder, bits=bits) for bits in ("fp32", "bf16", "8", "4")}
    assert len(set(kept.values())) == 1
    assert model_hash(tiny_path) == model_hash(tiny_path, bits="bf16") != kept["fp32"]


class Quantised(torch.Tensor):
    """A tensor of two others, as quantised weights are."""

    @staticmethod
    def __new__(cls, codes, scales):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scales):
        self.codes, self.scales = codes, scales

    def __tensor_flatten__(self):
        return ["codes", "scales"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return return_and_correct_aliasing(function, args, kwargs or {}, args[0])


WEIGHT = torch.arange(6.0).view(2, 3)
CODES, SCALES = torch.arange(6, dtype=torch.int8).view(2, 3), torch.ones(2)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (WEIGHT, WEIGHT.view(3, 2)),
        (WEIGHT, WEIGHT.view(torch.int32)),
        (WEIGHT, WEIGHT.t()),
        (WEIGHT.to(torch.float8_e4m3fn), (WEIGHT + 1).to(torch.float8_e4m3fn)),
        (WEIGHT > 1, WEIGHT > 2),
        (WEIGHT.to_sparse(), (WEIGHT + 1).to_sparse()),
        (WEIGHT.to(torch.complex64).conj(), WEIGHT.to(torch.complex64).conj() * 1j),
        (torch.tensor(1.0), torch.tensor(2.0)),
        (Quantised(CODES, SCALES), Quantised(CODES, SCALES + 1)),
        (Quantised(CODES, SCALES), Quantised(CODES + 1, SCALES)),
    ],
)
def test_every_value_dtype_and_shape_counts(one, other):
    assert hash_of({"a": one}) == hash_of({"a": one, "extra": {"not": "a tensor"}})
    assert hash_of({"a": one}) != hash_of({"a": other})
    assert hash_of({"a": one}) != hash_of({"b": one})
