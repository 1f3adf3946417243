import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import disha
from disha.tree import adapted_layers, join, module_names, wrapped_for_distribution
from tests.conftest import Shared


def names_of(model):
    return [name for names in module_names(model).values() for name in names]


def test_plain_model_has_its_own_names(model):
    assert names_of(model) == [name for name, _ in model.named_modules()]


def test_adapters_are_left_out(model):
    before = names_of(model)
    disha.inject_adapters(model, "all-linear", 2)
    assert names_of(model) == before


def test_shared_module_has_all_its_names():
    model = Shared()
    assert module_names(model)[model.first] == ("first", "second")
    assert next(iter(module_names(nn.Sequential(model, model)).items()))[1] == ("",)
    assert module_names(nn.Sequential(model, model))[model.first] == (
        "0.first", "0.second", "1.first", "1.second")  # fmt: skip


def test_a_module_that_contains_itself_ends():
    model = nn.Sequential(nn.Linear(2, 2))
    model.append(model)
    assert names_of(model) == ["", "0"]


def test_wrappers_do_not_show():
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    wrapped = nn.Sequential(
        checkpoint_wrapper(nn.Linear(4, 4)), nn.ReLU(), torch.compile(nn.Linear(4, 4))
    )
    compiled = torch.compile(wrapped)
    assert set(names_of(compiled)) == set(names_of(plain))
    disha.inject_adapters(compiled, "^(0|2)$", 2)
    assert [name for name, _ in adapted_layers(compiled)] == ["0", "2"]


def test_wrapped_model_saves_under_clean_names_and_loads_into_a_plain_one(tmp_path):
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    wrapped = nn.Sequential(checkpoint_wrapper(nn.Linear(4, 4)), nn.ReLU())
    wrapped[0].load_state_dict(plain[0].state_dict())
    disha.inject_adapters(wrapped, "^0$", 2, init="kaiming")
    disha.save_adapter(wrapped, tmp_path / "a")
    disha.load_adapter(plain, tmp_path / "a")
    x = torch.randn(3, 4)
    assert torch.equal(plain(x), wrapped(x))


def test_a_users_attribute_called_module_keeps_its_name():
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    assert names_of(model) == ["", "module"]
    assert wrapped_for_distribution(module_names(model)) is None


def test_join():
    assert [join("", "a"), join("a", ""), join("a", "b"), join("", "")] == ["a", "a", "a.b", ""]
