"""Layers with quantised weights: real ones where they run on a CPU, else stand-ins.

A stand-in has the attributes of the library's class, and computes what it computes. Where nothing
may read W but the forward, reading it fails.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)
from transformers.integrations.bitnet import BitLinear
from transformers.integrations.compressed_tensors import CompressedTensorsFP8Linear
from transformers.integrations.finegrained_fp8 import FP8GroupedLinear, FP8Linear
from transformers.integrations.gemma_quant import QuantizedLinear

IN, OUT, GROUP = 16, 32, 8
SHIFTS = 4 * torch.arange(8)


def pack(codes: torch.Tensor, dim: int) -> torch.Tensor:
    """Return codes of four bits in int32 words, eight consecutive ones along `dim` in each."""
    eights = codes.long().unfold(dim, 8, 8)
    return (eights << SHIFTS).sum(-1).to(torch.int32)


def unpack(words: torch.Tensor, dim: int) -> torch.Tensor:
    codes = (words.unsqueeze(-1).long() >> SHIFTS) & 15
    return codes.movedim(-1, dim + 1).flatten(dim, dim + 1)


class Unread(nn.Module):
    """Nothing but the forward may ask for the weight."""

    @property
    def weight(self):
        raise AssertionError("W was read")


class GptqLinear(Unread):
    """`QuantLinear` of AutoGPTQ; `TorchQuantLinear` of GPTQModel has `in_features`."""

    sizes = ("infeatures", "outfeatures")

    def __init__(self, inputs: int = IN, outputs: int = OUT) -> None:
        super().__init__()
        for name, size in zip(self.sizes, (inputs, outputs), strict=True):
            setattr(self, name, size)
        self.bits, self.group_size = 4, GROUP
        codes = torch.randint(0, 16, (inputs, outputs))
        zeros = torch.randint(0, 16, (inputs // GROUP, outputs))
        self.register_buffer("qweight", pack(codes, 0))
        self.register_buffer("qzeros", pack(zeros, 1))
        self.register_buffer("scales", torch.rand(inputs // GROUP, outputs) / 8)
        self.register_buffer("g_idx", torch.arange(inputs, dtype=torch.int32) // GROUP)
        self.register_buffer("bias", torch.randn(outputs))

    def dequantize_weight(self):
        zeros = unpack(self.qzeros, 1)[self.g_idx]
        return self.scales[self.g_idx] * (unpack(self.qweight, 0) - zeros)  # (in, out)

    def forward(self, x):
        return x @ self.dequantize_weight().to(x.dtype) + self.bias


class GptqModelLinear(GptqLinear):
    sizes = ("in_features", "out_features")


class AwqLinear(Unread):
    """`WQLinear_GEMM` of AutoAWQ, whose forward gives no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = IN, OUT
        self.w_bit, self.group_size = 4, GROUP
        self.register_buffer("qweight", pack(torch.randint(0, 16, (IN, OUT)), 1))
        self.register_buffer("qzeros", pack(torch.randint(0, 16, (IN // GROUP, OUT)), 1))
        self.register_buffer("scales", torch.rand(IN // GROUP, OUT) / 8)
        self.bias = None

    @torch.no_grad()
    def forward(self, x):
        groups = torch.arange(IN) // GROUP
        codes = unpack(self.qweight, 1) - unpack(self.qzeros, 1)[groups]
        return x @ (codes * self.scales[groups])


class HqqLinear(nn.Module):
    """`HQQLinear`: has no weight, lists its state itself, and does not move."""

    def __init__(self, view_as_float: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = IN, OUT
        codes = torch.randint(0, 256, (OUT // 2, IN), dtype=torch.uint8)
        if view_as_float:
            codes = codes.view(torch.float16)
        self.W_q = nn.Parameter(codes, requires_grad=False)
        self.meta = {"shape": (OUT, IN), "scale": torch.rand(OUT, 1) / 8, "zero": 8.0}
        self.bias = torch.randn(OUT)
        self.compute_dtype = torch.float32

    def dequantize(self):
        codes = self.W_q.view(torch.uint8)
        codes = torch.cat([codes >> 4, codes & 15])
        return (codes.float() - self.meta["zero"]) * self.meta["scale"]

    def forward(self, x):
        return torch.matmul(x, self.dequantize().t()) + self.bias

    def to(self, *args, **kwargs):
        return self

    def state_dict(self, *args, **kwargs):
        state = {"W_q": self.W_q, "scale": self.meta["scale"], "bias": self.bias}
        if "destination" in kwargs and "prefix" in kwargs:
            for key, value in state.items():
                kwargs["destination"][kwargs["prefix"] + key] = value
        return state


class CpuFP8Linear(FP8Linear):
    """The fp8 linear of transformers, whose kernels need a GPU."""

    def forward(self, input):
        weight = self.weight.to(input.dtype)
        scales = self.weight_scale_inv.repeat_interleave(8, 0).repeat_interleave(8, 1)
        return F.linear(input, weight * scales, self.bias)


class CpuFP8GroupedLinear(FP8GroupedLinear):
    """(..., groups, in) -> (..., groups, out / groups)."""

    def forward(self, input):
        weight = self.weight.to(input.dtype).view(2, -1, input.shape[-1])
        return torch.einsum("...gi,goi->...go", input, weight)


def fp8(cls=CpuFP8Linear):
    layer = cls(IN, OUT, block_size=(8, 8))
    layer.weight.data.copy_(torch.randn(OUT, IN))
    layer.weight_scale_inv.data.uniform_(0, 0.25)
    return layer


def compressed_fp8():
    layer = CompressedTensorsFP8Linear(IN, OUT, has_bias=True)
    layer.weight.data.copy_(torch.randn(OUT, IN))
    layer.weight_scale.data.uniform_(0, 0.25)
    layer.bias.data.normal_()
    return layer


def bitnet():
    layer = BitLinear(IN, OUT, False, dtype=torch.float32)
    layer.weight.copy_(torch.randint(0, 255, layer.weight.shape, dtype=torch.uint8))
    return layer


def gemma():
    layer = QuantizedLinear(IN, OUT, num_bits=2)
    layer.weight.data.copy_(torch.randint(0, 255, layer.weight.shape, dtype=torch.uint8))
    return layer


def compressed_forward(self, input):
    if "weight_packed" in self._parameters:
        weight = (unpack(self.weight_packed, 1) - 8) * self.weight_scale
    else:
        weight = self.weight / self.weight_scale
        weight = weight.round() * self.weight_scale  # has no gradient
    return F.linear(input, weight, self.bias)


def compressed():
    """A linear layer as compressed-tensors leaves it: no weight, and a forward of the instance."""
    layer = nn.Linear(IN, OUT)
    del layer._parameters["weight"]
    codes, frozen = torch.randint(0, 16, (OUT, IN)), {"requires_grad": False}
    layer.weight_packed = nn.Parameter(pack(codes, 1), **frozen)
    layer.weight_scale = nn.Parameter(torch.rand(OUT, 1) / 8, **frozen)
    layer.weight_shape = nn.Parameter(torch.tensor([OUT, IN]), **frozen)
    layer.quantization_scheme = SimpleNamespace(weights=SimpleNamespace(num_bits=4))
    layer.forward = compressed_forward.__get__(layer)
    return layer


def decompress(layer):
    weight = (unpack(layer.weight_packed, 1) - 8) * layer.weight_scale
    del layer._parameters["weight_packed"], layer._parameters["weight_shape"]
    layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    return layer


def torchao(config, dtype=torch.float32):
    layer = nn.Linear(IN, OUT, dtype=dtype)
    quantize_(layer, config)
    return layer


BASES = {
    "gptq": GptqLinear,
    "gptqmodel": GptqModelLinear,
    "awq": AwqLinear,
    "hqq": HqqLinear,
    "hqq as float": lambda: HqqLinear(view_as_float=True),
    "fp8": fp8,
    "compressed fp8": compressed_fp8,
    "bitnet": bitnet,
    "gemma": gemma,
    "compressed": compressed,
    "decompressed": lambda: decompress(compressed()),
    "torchao int8": lambda: torchao(Int8WeightOnlyConfig()),
    "torchao int8 dynamic": lambda: torchao(Int8DynamicActivationInt8WeightConfig()),
    "torchao int4": lambda: torchao(
        IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))
    ),
    "torchao float8": lambda: torchao(Float8WeightOnlyConfig()),
}
READABLE = {name for name in BASES if name.startswith(("torchao", "hqq", "decompressed"))}
MERGEABLE = {name for name in BASES if name.startswith("torchao")}


def base(name: str) -> nn.Module:
    torch.manual_seed(0)
    return BASES[name]().requires_grad_(False)
