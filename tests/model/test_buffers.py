"""What training does to buffers is part of the adapter: running statistics, and `also_train`."""

import copy
import subprocess
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import nn

import disha
from disha.model.buffers import release_buffers
from disha.model.view import ModelView
from tests.conftest import assert_same, pickled, seed_torch

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
    seed_torch(0)
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
    seed_torch(0)
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
from tests.model.test_buffers import inputs_of, made
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
    assert not any("disha" in name for name in vars(model[1]))


def test_what_fails_changes_no_statistic(tmp_path):
    path = tmp_path / "a.safetensors"
    disha.save_adapter(trained(), path)
    wider = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(144, 2))
    before = copy.deepcopy(wider.state_dict())
    with pytest.raises(disha.AdapterFileError, match=r"1\.running_mean"):
        disha.load_adapter(wider, path)
    assert_same(wider.state_dict(), before)
    assert not any("disha" in name for name in vars(wider[1]))


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


def test_an_adapter_file_that_is_loaded_as_a_state_dict_is_no_checkpoint_of_the_base(tmp_path):
    """Trainer resumes so, with a hook that gives the blocks their keys in the model."""
    model = trained()
    disha.save_adapter(model, tmp_path / "a.safetensors")
    fresh = adapted(small())
    fresh.load_state_dict(load_file(tmp_path / "a.safetensors"), strict=False)
    assert disha.adapter_state_dict(fresh).keys() == disha.adapter_state_dict(model).keys()


def test_norms_that_came_after_the_injection_are_saved():
    model = adapted(nn.Sequential(nn.Linear(4, 3), nn.LazyBatchNorm1d()))  # which has no values yet
    model.append(nn.BatchNorm1d(3))
    model(torch.randn(5, 4))
    assert {f"{n}.running_mean" for n in "12"} <= disha.adapter_state_dict(model).keys()


def test_a_statistic_that_has_become_nan_is_saved():
    model = adapted(small())
    model[1].running_mean[0] = float("nan")
    assert "1.running_mean" in disha.adapter_state_dict(model)


def test_what_was_forgotten_is_remembered_again_if_a_later_step_fails():
    model = trained()
    view = ModelView(model)
    (memory,) = view.memories
    remembered = memory.state.buffers
    with ExitStack() as undo:
        view.keep(undo)
        view.forget_buffers()
        assert not memory.state.buffers
    assert memory.state.buffers == remembered


class Normaliser(nn.Module):
    """Subtracts the mean of all inputs that it has seen in training."""

    def __init__(self, width=4):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.register_buffer("mu", torch.zeros(width))
        self.register_buffer("count", torch.zeros((), dtype=torch.int32))
        self.register_buffer("last", torch.zeros(width), persistent=False)

    def forward(self, x):
        if self.training:
            self.last = x.detach().mean(0)
            self.count += 1
            self.mu += (self.last - self.mu) / self.count
        return (x - self.mu) * self.gain


def normalised():
    seed_torch(0)
    return nn.Sequential(nn.Linear(4, 4), Normaliser(), nn.Linear(4, 2))


ROWS = 3 + torch.arange(20.0).view(5, 4) % 7


def normalised_and_trained(**settings):
    return train(disha.inject_adapters(normalised(), "0|2", r=2, **settings), ROWS)


def saved_silently(model, path, adapter="default"):
    """Save an adapter, and return its names besides blocks."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        disha.save_adapter(model, path, adapter)
    return disha.inspect_adapter(path).also_train


class TestAlsoTrain:
    """`also_train` covers the persistent buffers that it matches."""

    def test_a_module_is_saved_with_its_buffers(self, tmp_path):
        model = normalised_and_trained(also_train=r"^1\.")
        assert saved_silently(model, tmp_path) == ("1.count", "1.gain", "1.mu")
        fresh = normalised()
        disha.load_adapter(fresh, tmp_path)
        assert torch.equal(fresh.eval()(ROWS), model(ROWS))

    def test_a_regex_may_match_buffers_only(self, tmp_path):
        model = normalised_and_trained(also_train="mu|count")
        assert saved_silently(model, tmp_path) == ("1.count", "1.mu")

    def test_a_regex_may_match_running_statistics_only(self):
        plan = disha.plan_adapters(small(), "0", 2, also_train="running_mean")
        assert plan.also_train == ()  # every adapter has them

    def test_one_that_matches_no_saved_buffer_is_refused(self):
        with pytest.raises(disha.ArgumentError, match=r"also_train .*last' matches nothing"):
            disha.plan_adapters(normalised(), "0", 2, also_train=r"1\.last")

    def test_a_buffer_that_has_not_changed_is_not_saved(self, tmp_path):
        model = disha.inject_adapters(normalised(), "0", 2, also_train=r"^1\.")
        assert saved_silently(model, tmp_path) == ("1.gain",)

    def test_what_is_loaded_is_saved_again(self, tmp_path):
        disha.save_adapter(normalised_and_trained(also_train=r"^1\."), tmp_path / "first")
        model = normalised()
        disha.load_adapter(model, tmp_path / "first", "again")
        assert saved_silently(model, tmp_path / "second", "again") == ("1.count", "1.gain", "1.mu")

    def test_removing_the_adapter_puts_the_old_values_back(self):
        model = normalised_and_trained(also_train="mu|count")
        before = normalised().state_dict()
        assert_same(disha.remove_adapters(model).state_dict(), before)

    def test_removing_one_of_two_puts_its_buffers_back(self):
        model = disha.inject_adapters(normalised(), "0", 2, adapter="other")
        train(disha.inject_adapters(model, "0", 2, also_train="mu|count"), ROWS)
        disha.remove_adapters(model, "default")
        assert torch.equal(model[1].mu, torch.zeros(4))
        assert disha.adapter_state_dict(model, "other").keys() == {"0.disha.other.bone_block"}

    def test_what_was_released_is_as_before_if_a_later_step_fails(self):
        model = normalised_and_trained(also_train="mu|count")
        trained_mean = model[1].mu.clone()
        with ExitStack() as undo:
            release_buffers(ModelView(model), "default", undo)
            assert torch.equal(model[1].mu, torch.zeros(4))
        assert torch.equal(model[1].mu, trained_mean)

    def test_replacing_one_of_two_leaves_the_buffers_of_the_other(self, tmp_path):
        untrained = disha.inject_adapters(normalised(), "0", 2, also_train="mu")
        disha.save_adapter(untrained, tmp_path / "a.safetensors")
        model = disha.inject_adapters(normalised(), "0", 2, adapter="other", also_train="count")
        train(disha.inject_adapters(model, "0", 2, also_train="mu"), ROWS)
        disha.load_adapter(model, tmp_path / "a.safetensors", replace=True)
        assert torch.equal(model[1].mu, torch.zeros(4))
        assert model[1].count == 3

    def test_only_the_adapter_that_names_a_buffer_saves_it(self):
        model = disha.inject_adapters(normalised(), "0", 2, adapter="other")
        train(disha.inject_adapters(model, "0", 2, also_train="mu|count"), ROWS)
        assert "1.mu" in disha.adapter_state_dict(model)
        assert "1.mu" not in disha.adapter_state_dict(model, "other")

    def test_a_buffer_belongs_to_one_adapter(self):
        model = disha.inject_adapters(normalised(), "0", 2, also_train="mu")
        with pytest.raises(disha.ArgumentError, match=r"matches 1\.mu: it is already trained with"):
            disha.inject_adapters(model, "0", 2, adapter="other", also_train="mu")

    def test_a_file_does_not_take_the_buffer_of_another_adapter(self, tmp_path):
        disha.save_adapter(normalised_and_trained(also_train="mu|count"), tmp_path)
        model = disha.inject_adapters(normalised(), "0", 2, adapter="other", also_train="mu")
        with pytest.raises(disha.AdapterFileError, match=r"1\.mu: it is already trained with"):
            disha.load_adapter(model, tmp_path)

    def test_state_dicts_carry_them(self):
        model = normalised_and_trained(also_train=r"^1\.")
        state = {key: value.clone() for key, value in disha.adapter_state_dict(model).items()}
        fresh = disha.inject_adapters(normalised(), "0|2", 2, also_train=r"^1\.")
        assert disha.load_adapter_state_dict(fresh, state).complete
        assert torch.equal(fresh.eval()(ROWS), model(ROWS))

    def test_replacing_swaps_them(self, tmp_path):
        settings = {"also_train": r"^1\."}
        untrained = disha.inject_adapters(normalised(), "0|2", 2, **settings)
        disha.save_adapter(untrained, tmp_path / "untrained")
        model = normalised_and_trained(**settings)
        disha.load_adapter(model, tmp_path / "untrained", replace=True)
        assert torch.equal(model(ROWS), normalised().eval()(ROWS))

    def test_a_checkpoint_of_the_base_brings_their_former_values(self):
        model = disha.inject_adapters(normalised(), "0|2", 2, also_train="mu|count")
        base = train(normalised(), ROWS + 1).state_dict()
        model.load_state_dict(base, strict=False)
        train(model, ROWS)
        assert_same(disha.remove_adapters(model).state_dict(), base)

    @pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
    def test_copies_remember_them(self, copied):
        model = copied(normalised_and_trained(also_train="mu|count"))
        assert {"1.mu", "1.count"} <= disha.adapter_state_dict(model).keys()
        assert_same(disha.remove_adapters(model).state_dict(), normalised().state_dict())

    @pytest.mark.parametrize(
        "dtype",
        [torch.bool, torch.uint8, torch.int16, torch.float16, torch.float8_e4m3fn, torch.complex64],
    )
    def test_a_buffer_may_have_any_dtype_of_a_file(self, dtype, tmp_path):
        if dtype not in safetensors.torch._SIZE:
            pytest.skip("the first supported safetensors have no complex numbers")
        layer = nn.Linear(4, 4)
        layer.register_buffer("codes", torch.zeros(3).to(dtype))
        base = copy.deepcopy(layer)
        disha.inject_adapters(layer, "all-linear", 2, also_train="codes")
        layer.codes[1] = 1
        assert saved_silently(layer, tmp_path) == ("codes",)
        disha.load_adapter(base, tmp_path)
        assert torch.equal(base.codes, layer.codes)


class TestUnsaved:
    """A buffer that has changed and that no adapter saves is named."""

    def test_a_save_names_it(self, tmp_path):
        model = normalised_and_trained()
        says = r"lacks 2 buffers of the model that changed since .*: 1\.mu, 1\.count\. To save them"
        with pytest.warns(UserWarning, match=says):
            disha.save_adapter(model, tmp_path)

    def test_removing_the_adapters_names_it(self):
        with pytest.warns(UserWarning, match=r"can't be put back: 1\.mu, 1\.count\. Name them in"):
            disha.remove_adapters(normalised_and_trained())

    def test_a_change_beside_a_few_values_is_noticed(self, tmp_path):
        model = nn.Sequential(nn.Linear(4, 4))
        model.register_buffer("codes", torch.zeros(20, 20))
        disha.inject_adapters(model, "0", 2)
        model.codes.mul_(0).add_(1e-3)
        with pytest.warns(UserWarning, match="lacks 1 buffer"):
            disha.save_adapter(model, tmp_path)

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: model.double(),
            lambda model: model.bfloat16(),
            lambda model: model.load_state_dict(normalised().state_dict(), strict=False),
            lambda model: train(model, ROWS).load_state_dict(model.state_dict(), assign=True),
        ],
        ids=["a wider dtype", "a narrower dtype", "a checkpoint of the base", "an adapted one"],
    )
    def test_moving_and_loading_are_no_change(self, change, tmp_path):
        model = disha.inject_adapters(normalised(), "0|2", 2, also_train="mu|count")
        change(model)
        saved_silently(model, tmp_path)

    def test_another_checkpoint_of_the_base_is_no_change(self, tmp_path):
        model = disha.inject_adapters(normalised(), "0|2", 2)
        model.load_state_dict(train(normalised(), ROWS).state_dict(), strict=False)
        saved_silently(model, tmp_path)

    def test_nan_is_no_change(self, tmp_path):
        model = nn.Sequential(nn.Linear(4, 4))
        model.register_buffer("unset", torch.tensor([1.0, float("nan")]))
        saved_silently(disha.inject_adapters(model, "0", 2), tmp_path)

    def test_sparse_buffers_are_left_alone(self, tmp_path):
        model = nn.Sequential(nn.Linear(4, 4))
        model.register_buffer("adjacency", torch.eye(4).to_sparse())
        saved_silently(disha.inject_adapters(model, "0", 2), tmp_path)
