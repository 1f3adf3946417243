"""The walk over a model: clean names, aliases, wrappers, buffers, and what is refused."""

import ast
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import disha
from disha.layers.wrappers import clean_key
from disha.model.view import ModelView
from tests.conftest import Shared


def names_of(model):
    return [name for names in ModelView(model).names.values() for name in names]


def test_plain_model_has_its_own_names(model):
    assert names_of(model) == [name for name, _ in model.named_modules()]
    assert list(ModelView(model).modules.items()) == list(model.named_modules())


def test_adapters_are_left_out(model):
    before = names_of(model)
    disha.inject_adapters(model, "all-linear", 2)
    assert names_of(model) == before


def test_shared_module_has_all_its_names():
    model = Shared()
    assert ModelView(model).names[model.first] == ("first", "second")
    twice = ModelView(nn.Sequential(model, model))
    assert next(iter(twice.names.items()))[1] == ("",)
    assert twice.names[model.first] == ("0.first", "0.second", "1.first", "1.second")


def test_tied_parameters_come_once():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.Linear(5, 2))
    model[1].weight = model[0].weight
    tied, weight, bias = ModelView(model).parameters
    assert tied.names == ("0.weight", "1.weight")
    assert (tied.module, tied.attribute, tied.name) == (model[0], "weight", "0.weight")
    assert tied.value is model[0].weight
    assert (weight.names, bias.names) == (("2.weight",), ("2.bias",))
    assert ModelView(model).parameters_by_name["1.weight"] is not None


def test_buffers_are_those_of_state_dicts():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[1].register_buffer("scale", torch.ones(3))
    model[1].register_buffer("scratch", torch.ones(3), persistent=False)
    model[1].register_buffer("absent", None)
    buffers = {buffer.name: buffer.is_statistic for buffer in ModelView(model).buffers}
    statistics = ("0.running_mean", "0.running_var", "0.num_batches_tracked")
    assert buffers == {**dict.fromkeys(statistics, True), "1.scale": False}


def test_a_module_that_contains_itself_ends():
    model = nn.Sequential(nn.Linear(2, 2))
    model.append(model)
    assert names_of(model) == ["", "0"]


def test_what_is_inside_has_names_from_there():
    inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    view = ModelView(nn.ModuleDict({"a": inner, "ab": nn.Linear(2, 2), "b": nn.Sequential(inner)}))
    assert view.inside(inner) == {inner: "", inner[0]: "0", inner[1]: "1"}
    assert view.inside(view.modules["b"])[inner[0]] == "0.0"
    assert view.inside(view.model) == {module: names[0] for module, names in view.names.items()}


def test_an_average_has_the_names_of_its_model():
    average = torch.optim.swa_utils.AveragedModel(nn.Sequential(nn.Linear(4, 4)))
    assert ModelView(average).modules["0"] is average.module[0]


def test_wrappers_do_not_show():
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    wrapped = nn.Sequential(
        checkpoint_wrapper(nn.Linear(4, 4)), nn.ReLU(), torch.compile(nn.Linear(4, 4))
    )
    compiled = torch.compile(wrapped)
    assert set(names_of(compiled)) == set(names_of(plain))
    assert ModelView(compiled).modules[""] is wrapped
    disha.inject_adapters(compiled, "^(0|2)$", 2)
    assert [*ModelView(compiled).find_layers().values()] == ["0", "2"]


@pytest.mark.parametrize(
    ("key", "clean"),
    [
        ("0.weight", "0.weight"),
        ("module.0.weight", "0.weight"),
        ("_orig_mod.module.0._checkpoint_wrapped_module.weight", "0.weight"),
        ("_fsdp_wrapped_module.a.module.weight", "a.module.weight"),
    ],
)
def test_keys_without_wrappers(key, clean):
    assert clean_key(key) == clean


def test_wrapped_model_saves_under_clean_names_and_loads_into_a_plain_one(tmp_path):
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    wrapped = nn.Sequential(checkpoint_wrapper(nn.Linear(4, 4)), nn.ReLU())
    wrapped[0].load_state_dict(plain[0].state_dict())
    disha.inject_adapters(wrapped, "^0$", 2, init="kaiming")
    disha.save_adapter(wrapped, tmp_path / "a")
    disha.load_adapter(plain, tmp_path / "a")
    x = torch.randn(3, 4)
    assert torch.equal(plain(x), wrapped(x))
    assert torch.equal(plain[0].weight @ x.T, wrapped[0].weight @ x.T)  # as attention reads it


def test_a_users_attribute_called_module_keeps_its_name():
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    assert names_of(model) == ["", "module"]
    ModelView(model).refuse_wrapped("do this", "unwrap it")


# --- one walk ------------------------------------------------------------------------------------


class Watched(nn.Sequential):
    """Counts how often something looks through the children of its instances."""

    looks: ClassVar[Counter] = Counter()

    @property
    def _modules(self):
        Watched.looks[id(self)] += 1
        return self.__dict__["_modules"]

    @_modules.setter
    def _modules(self, value):
        self.__dict__["_modules"] = value


OPERATIONS = {
    "plan": lambda model, path: disha.plan_adapters(model, ".", 2, adapter="second"),
    "inject": lambda model, path: disha.inject_adapters(model, "all-linear", 2, adapter="second"),
    "load": lambda model, path: disha.load_adapter(model, path, adapter="second", also_train=False),
    "replace": lambda model, path: disha.load_adapter(model, path, replace=True),
    "save": lambda model, path: disha.save_adapter(model, path),
    "merge": lambda model, path: disha.merge_adapters(model),
    "unmerge": lambda model, path: disha.unmerge_adapters(model),
    "remove": lambda model, path: disha.remove_adapters(model),
    "activate": lambda model, path: disha.set_active_adapters(model, []),
    "scale": lambda model, path: disha.set_adapter_scale(model, 2.0),
    "combine": lambda model, path: disha.combine_adapters(
        model, {"default": 2.0}, into="second", also_train=False
    ),
    "parameters": lambda model, path: list(disha.adapter_parameters(model)),
    "flags": lambda model, path: disha.mark_only_adapters_trainable(model),
    "summary": lambda model, path: disha.summary(model),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_walks_the_model_once(tmp_path, operation):
    inner = Watched(nn.Linear(4, 4), nn.Embedding(3, 4), nn.TransformerEncoderLayer(4, 2, 4))
    model = nn.Sequential(inner, nn.Linear(4, 4))
    disha.inject_adapters(model, "all-linear", 2, also_train="^1.bias")
    disha.save_adapter(model, tmp_path / "adapter")
    if operation == "unmerge":
        disha.merge_adapters(model)
    Watched.looks.clear()
    OPERATIONS[operation](model, tmp_path / "adapter")
    assert Watched.looks == {id(inner): 1}


def test_nothing_else_walks():
    """What is left looks through a layer, or goes with a state dict."""
    walks = {"modules", "named_modules", "children", "named_children", "parameters"}
    package = Path(disha.__file__).parent
    found = {
        (path.relative_to(package).as_posix(), ast.unparse(node))
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in walks
        and not node.args
        and not {"cli", "finetune"} & set(path.parts)  # which use the library as a user would
    }
    assert found == {
        ("layers/weights.py", "computed.modules()"),
        ("model/check.py", "view.model.modules()"),
        ("model/computed_weights.py", "module.parametrizations.modules()"),
        ("model/computed_weights.py", "module.parametrizations[attribute].parameters()"),
        ("model/rates.py", "model.modules()"),
        ("model/many.py", "model.named_modules()"),
        ("model/routing.py", "module.modules()"),
        ("model/view.py", "module.modules()"),
        ("layers/state_dicts.py", "model.named_modules()"),
        ("layers/state_dicts.py", "self.modules()"),
    }
