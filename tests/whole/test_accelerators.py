"""On an accelerator, adapters do what they do on the processor: `pytest -m cuda`.

Without an accelerator, these tests run on the processor, so that a mistake in them is seen there.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import disha
from tests.conftest import (
    Made,
    assert_same,
    freshly_compiled,
    kept_by,
    needs_fully_shard,
    perturb,
)

pytestmark = pytest.mark.cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
METHODS = {"bone": {}, "tile": {"r_out": 16}, "bat": {"method": "bat"}}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="records a graph of CUDA")


def accelerator() -> torch.device:
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


@pytest.fixture(scope="module")
def device():
    return accelerator()


@pytest.fixture(autouse=True)
def _exact():
    """Multiply as exactly as the dtype allows, also in convolutions and recurrent layers."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def layers(**options) -> nn.Module:
    """Two linear layers with an adapter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))
    return disha.inject_adapters(model, "all-linear", 8, **options)


class Everything(nn.Module):
    """A layer of each kind whose kernels an accelerator has of its own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.recurrent = nn.LSTM(32, 32, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.convolution = nn.Conv1d(64, 32, 3, padding=1)
        self.raw = nn.Parameter(torch.randn(32, 24) / 6)
        self.experts = nn.Parameter(torch.randn(3, 24, 16) / 5)

    def forward(self, tokens):
        x, _ = self.recurrent(self.embed(tokens))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.convolution(x.mT).mT @ self.raw
        return torch.einsum("bti,eio->bteo", x, self.experts).mean(2)


def everything() -> nn.Module:
    torch.manual_seed(0)
    layouts = {"raw": "in out", "experts": "expert in out"}
    disha.register_layer_kind(Everything, layouts)
    return perturb(disha.inject_adapters(Everything(), ".*", 4), size=0.1)


TOKENS = torch.arange(24).view(3, 8) % 20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_new_adapter_changes_no_bit(device, method, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(64, 32, dtype=dtype, device=device)
    x = torch.randn(2, 5, 64, dtype=dtype, device=device)
    before = layer(x)
    disha.inject_adapters(layer, "", 16, **METHODS[method])
    assert_same(layer(x), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("method", METHODS)
def test_values_and_gradients_are_those_of_the_processor(device, method, tokens, dtype):
    model = perturb(layers(**METHODS[method]).double(), size=0.1)
    x = torch.randn(tokens, 32, dtype=torch.float64)
    other = copy.deepcopy(model).to(device, dtype)
    found, expected = (
        torch.autograd.grad(one(inputs).square().sum(), list(disha.adapter_parameters(one)))
        for one, inputs in ((other, x.to(device, dtype)), (model, x))
    )
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for one, reference in zip(found, expected, strict=True):
        difference = one.cpu().double() - reference
        assert difference.norm() < tolerance * reference.norm()


def test_every_kind_of_layer_computes_and_learns_as_on_the_processor(device):
    model = everything()
    moved = copy.deepcopy(model).to(device)
    expected, found = model(TOKENS), moved(TOKENS.to(device))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)
    expected.square().sum().backward()
    found.square().sum().backward()
    for one, other in zip(
        disha.adapter_parameters(moved), disha.adapter_parameters(model), strict=True
    ):
        assert one.device.type == device.type
        torch.testing.assert_close(one.grad.cpu(), other.grad, rtol=1e-3, atol=1e-4)


def test_every_adapter_acts_trains_and_merges(device):
    report = disha.check_adapters(everything().to(device), TOKENS.to(device))
    assert " in order" in str(report)
    *_, last = str(report).splitlines()
    right, _, total = last.split()[:3]
    assert right == total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_is_undone_bit_for_bit(device, dtype):
    model = perturb(layers().to(device, dtype), size=0.05)
    x = torch.randn(4, 32, dtype=dtype, device=device)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    unmerged = model(x)
    disha.merge_adapters(model)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(model(x), unmerged, rtol=tolerance, atol=tolerance)
    disha.unmerge_adapters(model)
    assert_same(dict(model.state_dict()), before)


def test_a_file_goes_from_the_accelerator_to_the_processor_and_back(device, tmp_path):
    model = perturb(layers().to(device))
    disha.save_adapter(model, tmp_path / "one.safetensors")
    there = layers()
    disha.load_adapter(there, tmp_path / "one.safetensors", replace=True)
    disha.save_adapter(there, tmp_path / "two.safetensors")
    back = layers().to(device)
    disha.load_adapter(back, tmp_path / "two.safetensors", replace=True)
    assert_same(dict(back.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_autocast_trains_in_sixteen_bits(device, method, dtype):
    model = perturb(layers(**METHODS[method]).to(device), size=0.1)
    x = torch.randn(6, 32, device=device)
    exact = model(x)
    with torch.autocast(device.type, dtype):
        output = model(x)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), exact, rtol=0.05, atol=0.05)
    output.float().square().mean().backward()
    for block in disha.adapter_parameters(model):
        assert block.grad.dtype == torch.float32
        assert block.grad.isfinite().all()
        assert block.grad.any()


def test_scaled_gradients_of_float16_train(device):
    model = perturb(layers().to(device), size=0.1)
    optimizer = torch.optim.AdamW(disha.adapter_parameters(model), lr=1e-2)
    scaler = torch.amp.GradScaler(device.type)
    x = torch.randn(64, 32, device=device)
    losses = []
    for _ in range(10):
        with torch.autocast(device.type, torch.float16):
            loss = F.mse_loss(model(x).float(), x)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_step_is_the_eager_one(device, method):
    model = perturb(layers(**METHODS[method]).to(device), size=0.1)
    x = torch.randn(16, 32, device=device)
    blocks = list(disha.adapter_parameters(model))
    expected = torch.autograd.grad(model(x).square().sum(), blocks)
    compiled = freshly_compiled(model, "eager" if device.type == "cpu" else "inductor")
    found = torch.autograd.grad(compiled(x).square().sum(), blocks)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@needs_cuda
@pytest.mark.parametrize("method", METHODS)
def test_a_step_can_be_recorded_as_a_graph(method):
    model = perturb(layers(**METHODS[method]).cuda(), size=0.1)
    x = torch.randn(16, 32, device="cuda")

    def step():
        model.zero_grad()
        model(x).square().sum().backward()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    expected = [block.grad.clone() for block in disha.adapter_parameters(model)]
    graph = torch.cuda.CUDAGraph()
    model.zero_grad()
    with torch.cuda.graph(graph):
        model(x).square().sum().backward()
    graph.replay()
    found = [block.grad for block in disha.adapter_parameters(model)]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_recomputed_layers_give_the_same_gradients(device, method):
    model = perturb(layers(**METHODS[method]).to(device), size=0.1)
    x = torch.randn(16, 32, device=device)
    blocks = list(disha.adapter_parameters(model))
    expected = torch.autograd.grad(model(x).square().sum(), blocks)
    output = checkpoint(model, x, use_reentrant=False)
    found = torch.autograd.grad(output.square().sum(), blocks)
    torch.testing.assert_close(found, expected)


def test_each_sample_takes_its_adapter(device):
    model = layers(adapter="one")
    disha.inject_adapters(model, "all-linear", 8, adapter="other")
    model = perturb(model, size=0.1).to(device)
    x = torch.randn(2, 5, 32, device=device)
    expected = []
    for sample, name in zip(x, ("one", "other"), strict=True):
        with disha.adapters_active(model, name):
            expected.append(model(sample))
    with disha.route_adapters(model, ["one", "other"]):
        found = model(x)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_nothing_of_the_inputs_size_is_kept(device):
    model = Made(lambda self, x: self.layer(x), layer=nn.Linear(256, 256)).to(device)
    model = perturb(disha.inject_adapters(model.requires_grad_(False), "layer", 8))
    x = torch.randn(64, 256, device=device)
    weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
    kept = kept_by(lambda: model(x))
    assert sum(size for place, size in kept.items() if place not in weights) == 64 * 8 * 4


def test_the_simulated_memory_of_a_step_is_that_of_the_allocator(device):
    pytest.importorskip("bitsandbytes")
    from benchmarks.memory import allocated_peak
    from disha.finetune.memory import step_memory

    if device.type not in ("cpu", "cuda"):
        pytest.skip("its allocator keeps no peak")
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4))).to(device)
    disha.inject_adapters(model, "all-linear", 16)
    optimizer = torch.optim.AdamW(disha.adapter_parameters(model))
    x = torch.randn(1024, 512, device=device)

    def loss():
        return model(x).square().mean()

    simulated = step_memory(model, optimizer, loss)
    loss().backward()  # libraries of kernels take their workspaces
    model.zero_grad()
    real = allocated_peak(lambda: loss().backward(), device)
    assert simulated["gradients"] + simulated["activations"] == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_layers_act_and_learn(device, bits):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(64, 64)
    if bits == 4:
        layer = bitsandbytes.nn.LinearNF4(64, 64, compute_dtype=torch.float32)
    else:
        layer = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    model = nn.Sequential(layer).to(device)  # quantises
    x = torch.randn(8, 64, device=device)
    before = model(x)
    disha.inject_adapters(model, "0", 8)
    assert_same(model(x), before)
    perturb(model)
    block = next(iter(disha.adapter_parameters(model)))
    update = model(x).float() - before.float()
    expected = x.view(8, 8, 8).sum(1) @ block.float()
    torch.testing.assert_close(update, expected, rtol=0.02, atol=0.05)
    model(x).float().square().sum().backward()
    assert block.grad.any()


@pytest.mark.parametrize("kind", ["eager", "grouped_mm"])
def test_experts_of_transformers_compute_as_on_the_processor(device, kind):
    pytest.importorskip("transformers")
    from tests.language_models import mixtral

    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 32}
    base = mixtral(**sizes, experts_implementation="eager")
    model = perturb(disha.inject_adapters(base, "experts", 8), size=0.05)
    tokens = torch.arange(12).view(2, 6)
    expected = model(tokens).logits
    model.set_experts_implementation(kind)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16  # its grouped product has
    found = model.to(device, dtype)(tokens.to(device)).logits
    difference = found.float().cpu() - expected
    assert difference.norm() < (1e-4 if dtype == torch.float32 else 0.05) * expected.norm()


@needs_fully_shard
def test_a_sharded_step_has_the_loss_of_the_whole_model(device, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if device.type not in ("cpu", "cuda"):
        pytest.skip("has no backend of torch's")
    backend = "nccl" if device.type == "cuda" else "gloo"
    model = perturb(layers().to(device), size=0.1)
    x = torch.randn(4, 32, device=device)
    expected = model(x).square().mean()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh(device.type, (1,)))
        loss = model(x).square().mean()
        loss.backward()
        torch.testing.assert_close(loss, expected)
        assert all(block.grad is not None for block in disha.adapter_parameters(model))
    finally:
        torch.distributed.destroy_process_group()


class NoDoubles(TorchDispatchMode):
    """Refuses tensors in float64, which MPS does not have."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for one in tree_leaves(output):
            assert getattr(one, "dtype", None) is not torch.float64, func
        return output


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_computed_in_float64(tmp_path, method):
    tokens = torch.arange(4 * 32, dtype=torch.float32).view(4, 32)
    with NoDoubles():
        model = perturb(layers(**METHODS[method]))
        model(tokens).square().mean().backward()
        disha.check_adapters(model, tokens)
        disha.merge_adapters(model)
        disha.unmerge_adapters(model)
        disha.save_adapter(model, tmp_path / "adapter.safetensors")
        disha.load_adapter(model, tmp_path / "adapter.safetensors", replace=True)
        disha.interop.lora.export(model, tmp_path / "lora", rank=4)
