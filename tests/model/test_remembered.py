"""What training does to batch and instance norms is part of the adapter."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import disha
from tests.conftest import assert_same

ROOT = Path(__file__).parent.parent.parent


class Bert(nn.Module):
    """A small encoder in the style of BERT, with a head that trains with the adapter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classifier = nn.Linear(8, 3)

    def forward(self, ids):
        return self.classifier(self.encoder(self.embed(ids)).mean(1))


def resnet():
    return pytest.importorskip("torchvision").models.resnet18(num_classes=3)


def small(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), norm(4, affine=True, track_running_stats=True), nn.Flatten(),
        nn.Linear(144, 2),
    )  # fmt: skip


def instance():
    return small(nn.InstanceNorm2d)


def images(count=5, size=8, seed=3):
    return 2 + 3 * torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def inputs_of(name):
    if name == "Bert":
        return torch.arange(24).view(4, 6) % 11
    return images(4, 32) if name == "Resnet" else images()


def made(name):
    torch.manual_seed(0)
    return {"Bert": Bert, "Resnet": resnet, "instance": instance, "small": small}[name]()


def train(model, x, steps=3):
    model.train()
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-6)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.eval()


def adapted(model):
    return disha.inject_adapters(model, r"0|3", r=2)


def trained(model=None):
    return train(adapted(small() if model is None else model), images())


ADAPTED = {
    "Resnet": (r"conv\d|fc", {}),
    "Bert": ("linear|out_proj|in_proj", {"also_train": "classifier"}),
    "instance": ("0|3", {}),
}
FRESH = f"""
import torch, disha
from tests.model.test_remembered import inputs_of, made
for name in {[*ADAPTED]}:
    model = made(name)
    model.load_state_dict(torch.load(f"{{name}}.pt"))
    disha.load_adapter(model, f"{{name}}.safetensors")
    with torch.no_grad():
        torch.save(model.eval()(inputs_of(name)), f"{{name}}.logits")
"""


def test_a_fresh_process_computes_the_same(tmp_path):
    expected = {}
    for name, (target, beside) in ADAPTED.items():
        x, model = inputs_of(name), disha.inject_adapters(made(name), target, r=2, **beside)
        train(model, x)
        disha.save_adapter(model, tmp_path / f"{name}.safetensors")
        torch.save(made(name).state_dict(), tmp_path / f"{name}.pt")
        with torch.no_grad():
            expected[name] = model(x)
    path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", FRESH], cwd=tmp_path, check=True, env=path)
    for name, output in expected.items():
        assert output.isfinite().all()
        assert torch.equal(torch.load(tmp_path / f"{name}.logits"), output)


def test_inspect_names_what_training_has_changed(tmp_path):
    path = tmp_path / "a.safetensors"
    disha.save_adapter(trained(), path)
    found = disha.inspect_adapter(path)
    names = ("1.num_batches_tracked", "1.running_mean", "1.running_var")
    assert found.also_train == names
    assert all(name in str(found) for name in names)


def test_a_model_that_was_never_in_train_has_none(tmp_path):
    model = adapted(small().eval())
    model(images())
    disha.save_adapter(model, tmp_path)
    assert disha.inspect_adapter(tmp_path).also_train == ()
    base = small()
    base[1].running_mean = base[1].running_var = None  # then it has none, whatever else it holds
    assert not any(key.startswith("1.") for key in disha.adapter_state_dict(trained(base)))


def test_removing_puts_the_old_ones_back():
    before = copy.deepcopy(small().state_dict())
    model = disha.remove_adapters(trained())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any("statistics" in name for name in vars(model[1]))


def test_what_fails_changes_no_statistic(tmp_path):
    path = tmp_path / "a.safetensors"
    disha.save_adapter(trained(), path)
    wider = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(144, 2))
    before = copy.deepcopy(wider.state_dict())
    with pytest.raises(disha.AdapterFileError, match=r"1\.running_mean"):
        disha.load_adapter(wider, path)
    assert_same(wider.state_dict(), before)
    assert "_disha_statistics" not in vars(wider[1])


def test_state_dicts_carry_them():
    model = trained()
    state = {key: value.clone() for key, value in disha.adapter_state_dict(model).items()}
    fresh = adapted(small())
    untrained = {key: value.clone() for key, value in disha.adapter_state_dict(fresh).items()}
    assert disha.load_adapter_state_dict(fresh, state).complete
    assert torch.equal(fresh.eval()(images()), model(images()))
    assert disha.load_adapter_state_dict(fresh, untrained).complete  # as before the training
    assert torch.equal(fresh(images()), small().eval()(images()))
    state["1.num_batches_tracked"] = torch.ones(())
    with pytest.raises(disha.AdapterStateError, match=r"torch\.float32, must be an integer"):
        disha.load_adapter_state_dict(fresh, state)


def test_replacing_swaps_them(tmp_path):
    disha.save_adapter(adapted(small()), tmp_path / "untrained.safetensors")
    model = trained()
    disha.save_adapter(model, tmp_path / "trained.safetensors")
    expected = model(images())
    disha.load_adapter(model, tmp_path / "untrained.safetensors", replace=True)
    assert torch.equal(model(images()), small().eval()(images()))
    disha.load_adapter(model, tmp_path / "trained.safetensors", replace=True)
    assert torch.equal(model(images()), expected)


def test_a_second_adapter_does_not_change_those_of_the_first(tmp_path):
    first, path = trained(), tmp_path / "second.safetensors"
    disha.save_adapter(train(adapted(small()), images() + 1), path)
    expected = first(images())
    says = r"1\.running_mean: another adapter .*; to load the layers alone, pass also_train=False"
    with pytest.raises(disha.AdapterFileError, match=says):
        disha.load_adapter(first, path, "second")
    disha.load_adapter(first, path, "second", also_train=False, activate=False)
    assert torch.equal(first(images()), expected)


def test_also_train_false_leaves_them_out(tmp_path):
    disha.save_adapter(trained(), tmp_path / "a.safetensors")
    model = small()
    disha.load_adapter(model, tmp_path / "a.safetensors", also_train=False)
    assert torch.equal(model[1].running_mean, torch.zeros(4))


def test_buffers_that_no_state_dict_has_stay_out():
    norm = nn.BatchNorm1d(3)
    norm.register_buffer("scratch", torch.zeros(2), persistent=False)
    norm.register_buffer("absent", None)
    model = adapted(nn.Sequential(nn.Linear(4, 3), norm))
    model(torch.randn(5, 4))
    norm.scratch += 1
    beside = {key for key in disha.adapter_state_dict(model) if "block" not in key}
    assert beside == {f"1.{name}" for name in nn.BatchNorm1d(3)._buffers}


def test_a_checkpoint_of_the_base_brings_its_statistics():
    trained_base, model = train(small(), images()), small()
    disha.inject_adapters(model, r"0|3", r=2)
    model.load_state_dict(trained_base.state_dict(), strict=False)
    model.load_state_dict({}, strict=False)  # which has none
    for same in (model, copy.deepcopy(model).bfloat16()):
        assert not any("running" in key for key in disha.adapter_state_dict(same))
    state = model.state_dict()
    train(model, images())
    model.load_state_dict(state)  # of an adapted model: not the base's
    now = disha.remove_adapters(train(model, images())).state_dict()
    assert all(torch.equal(now[key], value) for key, value in trained_base.state_dict().items())
    assert not any(module._load_state_dict_pre_hooks for module in model.modules())


def test_norms_that_came_after_the_injection_are_saved():
    model = adapted(nn.Sequential(nn.Linear(4, 3), nn.LazyBatchNorm1d()))  # which has no values yet
    model.append(nn.BatchNorm1d(3))
    model(torch.randn(5, 4))
    assert {f"{n}.running_mean" for n in "12"} <= disha.adapter_state_dict(model).keys()
