"""Models that accelerate has spread over devices: adapters act, or an error says what to do.

Every device is the CPU here. What is offloaded is on the meta device between forwards, as anywhere.
"""

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import disha
from disha import AdapterFileError, AdapterStateError, MergeError, ModeError
from disha.functional import method_of
from tests.conftest import Made, assert_same, perturb, seed_torch
from tests.language_models import llama
from tests.reference import METHODS

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
from accelerate.hooks import remove_hook_from_submodules  # noqa: E402
from accelerate.utils import set_module_tensor_to_device  # noqa: E402


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.proj = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.norm(x + self.proj(x))


class Small(nn.Module):
    """An embedding, a convolution and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = Mixer()
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))

    def forward(self, tokens):
        return self.head(self.conv(self.mixer(tokens).mT).mT)


def logits(model, tokens):
    return model.llama(input_ids=tokens, use_cache=False).logits


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "small": (Small, ("mixer", "conv", "head")),
    "llama": (
        lambda: Made(logits, llama=llama(vocab_size=12, max_position_embeddings=32)),
        (
            *("llama.model.embed_tokens", "llama.model.layers.0", "llama.model.layers.1"),
            *("llama.model.norm", "llama.model.rotary_emb", "llama.lm_head"),
        ),
    ),
}


def everywhere(model: nn.Module, parts: tuple[str, ...], folder: Path) -> None:
    """Every part on a device of its own, none offloaded."""
    devices = dict.fromkeys(parts, "cpu")
    accelerate.dispatch_model(model, devices, main_device="cpu", force_hooks=True)


def half_on_disk(model: nn.Module, parts: tuple[str, ...], folder: Path) -> None:
    devices = {part: ("cpu", "disk")[index % 2] for index, part in enumerate(parts)}
    accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=folder)


def to_cpu(model: nn.Module, parts: tuple[str, ...], folder: Path) -> None:
    accelerate.cpu_offload(model)


def to_cpu_with_buffers(model: nn.Module, parts: tuple[str, ...], folder: Path) -> None:
    accelerate.cpu_offload(model, offload_buffers=True)


def to_disk(model: nn.Module, parts: tuple[str, ...], folder: Path) -> None:
    accelerate.disk_offload(model, folder)


WAYS = (everywhere, half_on_disk, to_cpu, to_cpu_with_buffers, to_disk)
CASES = [
    pytest.param(name, method, way, id=f"{name}-{method}-{way.__name__}")
    for (name, way), method in zip(
        itertools.product(MODELS, WAYS), itertools.cycle(METHODS), strict=False
    )
]
"""Each model in each way; the methods take turns."""


def fresh(name: str) -> nn.Module:
    seed_torch(0)
    return MODELS[name][0]().double().eval()


def injected(model: nn.Module, method: str, **options: object) -> nn.Module:
    """Adapt every kind of layer that the method can."""
    target = "all-linear" if method == "bat" else r"embed|conv|proj|head\.\d"
    with warnings.catch_warnings(action="ignore"):  # of containers that the regex matches too
        return disha.inject_adapters(model, target, 2, method=method, **options)


def adapted(name: str, method: str = "bone") -> nn.Module:
    return perturb(injected(fresh(name), method))


def dispatched(name: str, way: Callable[..., None], folder: Path) -> nn.Module:
    model = fresh(name)
    way(model, MODELS[name][1], folder)
    return model


def tokens() -> torch.Tensor:
    return torch.arange(6).view(2, 3)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.device.type == "cpu"
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "method", "way"), CASES)
class TestForward:
    def check(self, model: nn.Module, name: str, method: str) -> None:
        plain = adapted(name, method)
        base = fresh(name)(tokens())
        assert not torch.allclose(plain(tokens()), base, atol=1e-3)
        for _ in range(2):
            close(model(tokens()), plain(tokens()))
        with torch.no_grad():
            close(model(tokens()), plain(tokens()))
            with disha.adapters_disabled(model):
                close(model(tokens()), base)
            for of in (model, plain):
                disha.set_adapter_scale(of, 0.5)
            close(model(tokens()), plain(tokens()))
            disha.set_active_adapters(model, [])
            close(model(tokens()), base)

    def test_injected_before(self, name, method, way, tmp_path):
        model = adapted(name, method)
        way(model, MODELS[name][1], tmp_path)
        self.check(model, name, method)

    def test_injected_afterwards(self, name, method, way, tmp_path):
        model = dispatched(name, way, tmp_path)
        before = model(tokens())
        injected(model, method)
        close(model(tokens()), before)
        assert not any(block.is_meta for block in disha.adapter_parameters(model))
        state = disha.adapter_state_dict(adapted(name, method))
        disha.load_adapter_state_dict(model, state)
        self.check(model, name, method)

    def test_training_after_injecting_afterwards(self, name, method, way, tmp_path):
        """Blocks stay where they are, so that they train under weights that are offloaded."""
        model, plain = dispatched(name, way, tmp_path).train(), fresh(name).train()
        for of in (model, plain):
            seed_torch(0)  # for methods whose blocks start at random
            injected(of, method)
            optimizer = torch.optim.AdamW(disha.adapter_parameters(of), lr=0.05)
            for _ in range(2):
                optimizer.zero_grad()
                of(tokens()).square().mean().backward()
                optimizer.step()
        blocks = map(disha.adapter_parameters, (model, plain))
        for block, expected in zip(*blocks, strict=True):
            close(block, expected)
        close(model(tokens()), plain(tokens()))

    def test_training_after_injecting_before(self, name, method, way, tmp_path):
        """The gradient of a copy that a hook brings would be lost."""
        model, plain = adapted(name, method).train(), adapted(name, method).train()
        way(model, MODELS[name][1], tmp_path)
        if not any(block.is_meta for block in disha.adapter_parameters(model)):
            for of in (model, plain):
                of(tokens()).square().mean().backward()
            blocks = map(disha.adapter_parameters, (model, plain))
            for block, expected in zip(*blocks, strict=True):
                close(block.grad, expected.grad)
            return
        with pytest.raises(ModeError, match="offload first and inject afterwards"):
            model(tokens())
        with torch.no_grad():
            close(model(tokens()), plain(tokens()))
        close(model.eval()(tokens()), plain.eval()(tokens()))


@pytest.mark.parametrize(("name", "method", "way"), CASES)
def test_merged_before(name, method, way, tmp_path):
    model, expected = adapted(name, method), adapted(name, method)(tokens())
    disha.merge_adapters(model)
    way(model, MODELS[name][1], tmp_path)
    close(model(tokens()), expected)
    layers = (module for module in model.modules() if isinstance(module, disha.AdaptedLayer))
    if any(layer._parameters["weight"].is_meta for layer in layers):
        with pytest.raises(MergeError, match="remove the hooks first"):
            disha.unmerge_adapters(model)
        close(model(tokens()), expected)
        remove_hook_from_submodules(model)
    disha.unmerge_adapters(model)
    close(model(tokens()), expected)
    with disha.adapters_disabled(model):
        close(model(tokens()), fresh(name)(tokens()))


@pytest.mark.parametrize("injected_first", [True, False])
@pytest.mark.parametrize("way", [everywhere, half_on_disk, to_cpu])
class TestOperations:
    def build(self, way: Callable[..., None], folder: Path, injected_first: bool) -> nn.Module:
        if injected_first:
            model = adapted("small")
            way(model, MODELS["small"][1], folder)
            return model
        model = injected(dispatched("small", way, folder), "bone")
        disha.load_adapter_state_dict(model, disha.adapter_state_dict(adapted("small")))
        return model

    def test_merging(self, way, injected_first, tmp_path):
        model, expected = self.build(way, tmp_path, injected_first), adapted("small")(tokens())
        if way is everywhere:
            disha.merge_adapters(model)
            close(model(tokens()), expected)
            disha.unmerge_adapters(model)
        else:
            with pytest.raises(MergeError, match=r"has no values yet, or .* \(meta device\)"):
                disha.merge_adapters(model)
        close(model(tokens()), expected)

    def test_saving(self, way, injected_first, tmp_path):
        model, path = self.build(way, tmp_path / "weights", injected_first), tmp_path / "adapter"
        if injected_first and way is not everywhere:
            with pytest.raises(AdapterStateError, match="on the meta device"):
                disha.save_adapter(model, path)
            assert not path.exists()
            remove_hook_from_submodules(model)
        disha.save_adapter(model, path)
        other = fresh("small")
        disha.load_adapter(other, path)
        close(other(tokens()), adapted("small")(tokens()))

    def test_replacing(self, way, injected_first, tmp_path):
        model = self.build(way, tmp_path / "weights", injected_first)
        source = adapted("small")
        perturb(source, seed=5)
        disha.save_adapter(source, tmp_path / "adapter")
        if injected_first and way is not everywhere:
            with pytest.raises(AdapterFileError, match="can't go into a parameter on the meta dev"):
                disha.load_adapter(model, tmp_path / "adapter", replace=True)
            close(model(tokens()), adapted("small")(tokens()))
        else:
            disha.load_adapter(model, tmp_path / "adapter", replace=True)
            close(model(tokens()), source(tokens()))

    def test_a_second_adapter(self, way, injected_first, tmp_path):
        model, plain = self.build(way, tmp_path, injected_first), adapted("small")
        injected(plain, "bat", adapter="second", init="kaiming")
        disha.save_adapter(plain, tmp_path / "second", "second")
        disha.load_adapter(model, tmp_path / "second", "second")
        for active in (["second"], ["default", "second"], ["default"]):
            for of in (model, plain):
                disha.set_active_adapters(of, active)
            close(model(tokens()), plain(tokens()))
        with disha.route_adapters(model, ["second", None]), torch.no_grad():
            output = model(tokens())
        close(output[1], fresh("small")(tokens())[1])
        disha.set_active_adapters(plain, "second")
        close(output[0], plain(tokens())[0])

    def test_removing(self, way, injected_first, tmp_path):
        model = self.build(way, tmp_path, injected_first)
        disha.remove_adapters(model)
        assert not any(isinstance(module, disha.AdaptedLayer) for module in model.modules())
        close(model(tokens()), fresh("small")(tokens()))
        remove_hook_from_submodules(model)
        assert_same(model.state_dict(), fresh("small").state_dict())

    def test_removing_the_hooks(self, way, injected_first, tmp_path):
        model, expected = self.build(way, tmp_path, injected_first), adapted("small")(tokens())
        remove_hook_from_submodules(model)
        assert not any(parameter.is_meta for parameter in model.parameters())
        close(model(tokens()), expected)
        disha.merge_adapters(model)
        close(model(tokens()), expected)
        disha.unmerge_adapters(model)
        disha.remove_adapters(model)
        close(model(tokens()), fresh("small")(tokens()))


@pytest.mark.parametrize("method", METHODS)
class TestCheckpoints:
    """`load_checkpoint_and_dispatch`: a checkpoint of a base model has no blocks."""

    def build(self, folder: Path, devices: dict[str, str], inject: Callable[..., object] | None):
        torch.save(fresh("small").state_dict(), folder / "base.bin")
        with accelerate.init_empty_weights():
            model = Small().double()
        if inject is not None:
            inject(model)
        return accelerate.load_checkpoint_and_dispatch(
            model, f"{folder}/base.bin", device_map=devices, offload_folder=folder / "weights"
        ).eval()

    @pytest.mark.parametrize("head", ["cpu", "disk"])
    def test_injected_afterwards(self, method, head, tmp_path):
        devices = {"mixer": "cpu", "conv": "cpu", "head": head}
        model = injected(self.build(tmp_path, devices, None), method)
        plain = adapted("small", method)
        disha.load_adapter_state_dict(model, disha.adapter_state_dict(plain))
        close(model(tokens()), plain(tokens()))

    def test_a_state_without_blocks(self, method):
        model = adapted("small", method)
        accelerate.cpu_offload(model, state_dict=fresh("small").state_dict())
        with pytest.raises(KeyError, match=method_of(method).block_name):
            model(tokens())
        disha.remove_adapters(model)
        close(model(tokens()), fresh("small")(tokens()))


@pytest.mark.parametrize("way", WAYS)
def test_new_rows_of_an_offloaded_table(way, tmp_path):
    model = dispatched("small", way, tmp_path)
    disha.inject_adapters(model, "proj", 2, also_train_rows={"embed": [1, 3]})
    close(model(tokens()), fresh("small")(tokens()))


def test_a_block_without_values_raises_and_a_dry_run_does_not():
    model = Small()
    with torch.device("meta"):
        empty = injected(Small(), "bone")
    assert empty(tokens().to("meta")).is_meta
    empty.load_state_dict(model.state_dict(), strict=False, assign=True)
    with pytest.raises(ModeError, match="give the model its weights first and inject afterwards"):
        empty(tokens())
    with disha.adapters_disabled(empty):
        torch.testing.assert_close(empty(tokens()), model(tokens()), rtol=0, atol=1e-6)


def test_a_weight_that_no_hook_brings_raises():
    """Attention reads the weight of its last projection without calling it."""
    model, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(2, 3, 8)
    perturb(disha.inject_adapters(model, "all-linear", 2))
    expected = model(x, x, x)[0]
    accelerate.cpu_offload(model)
    with pytest.raises(ModeError, match="preload_module_classes"):
        model(x, x, x)
    remove_hook_from_submodules(model)
    accelerate.cpu_offload(model, preload_module_classes=[type(model).__name__])
    close(model(x, x, x)[0], expected)


def test_preloaded_modules_take_adapters_before_only():
    model = adapted("small")
    accelerate.cpu_offload(model, preload_module_classes=["Mixer"])
    close(model(tokens()), adapted("small")(tokens()))
    model = fresh("small")
    accelerate.cpu_offload(model, preload_module_classes=["Mixer"])
    disha.inject_adapters(model, "proj", 2)
    with pytest.raises(KeyError, match="bone_block"):  # accelerate looks for the block too
        model(tokens())
    disha.remove_adapters(model)
    disha.inject_adapters(model, "conv", 2)
    close(model(tokens()), fresh("small")(tokens()))


def test_what_moves_to_another_device_is_the_weight_itself():
    """The hooks read the parameter to move it: the update must not move into it."""
    layer = adapted("small").mixer.proj
    weight = layer.base_weight.clone()
    set_module_tensor_to_device(layer, "weight", "meta")
    assert layer._parameters["weight"].is_meta
    set_module_tensor_to_device(layer, "weight", "cpu", value=weight)
    assert torch.equal(layer._parameters["weight"], weight)
    set_module_tensor_to_device(layer, "weight", "cpu:1")  # the CPU, but not the same to accelerate
    assert torch.equal(layer._parameters["weight"], weight)


def test_a_tied_weight_stays_tied():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.proj = nn.Embedding(12, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 12, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.proj(self.embed(tokens)))

    model = perturb(disha.inject_adapters(Tied(), "head|proj", 2))
    expected = model(tokens())
    devices = dict.fromkeys(("embed", "proj", "head"), "cpu")
    accelerate.dispatch_model(model, devices, main_device="cpu", force_hooks=True)
    assert torch.equal(model(tokens()), expected)
    assert model.head._parameters["weight"] is model.embed._parameters["weight"]
