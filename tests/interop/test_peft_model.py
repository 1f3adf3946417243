"""A model as PEFT sees it: what is refused, and what is saved with the blocks."""

import copy
from contextlib import contextmanager
from typing import NamedTuple

import peft
import pytest
import torch
from peft import LoraConfig, MissConfig, PeftModel, get_peft_model
from torch import nn

import disha
from disha import ConversionError
from disha.files.saving import adapter_contents
from disha.interop import lora, peft_format
from disha.interop import peft as miss
from disha.interop.lora import write_lora
from disha.model.view import ModelView
from disha.sharding.ranks import Ranks
from tests.conftest import Doubled, Layered, Made, Shared, Tied, perturb, refused
from tests.peft_models import (
    close,
    config_of,
    llama,
    net,
    output,
    perturb_all,
    refused_to_load,
    rewrite,
    tensors_of,
)

FORMATS = {"miss": miss, "lora": lora}
in_both_formats = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


# --- layers that PEFT would run otherwise --------------------------------------------------------


def self_attention():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    return Made(lambda self, x: self.attention(x, x, x)[0], attention=attention)


class Encoder(nn.TransformerEncoderLayer):
    """A subclass, which has the fast path of its base class."""

    def __init__(self):
        super().__init__(8, 2, 16, dropout=0.0, batch_first=True)


class Widened(Encoder):
    """An encoder layer with something after it, which is called."""

    def __init__(self):
        super().__init__()
        self.after = nn.Linear(8, 8)

    def forward(self, src, *args, **kwargs):
        return self.after(super().forward(src, *args, **kwargs))


SILENT = {
    "shared": (Shared, "first", (3, 6), "one module with the names first, second"),
    "own forward": (
        lambda: nn.Sequential(Doubled(8, 8)), "0", (3, 8), "Doubled has a forward of its own"),
    "fast path": (lambda: nn.Sequential(Encoder()), "linear1", (2, 3, 8), "Encoder reads its"),
    "output of attention": (self_attention, "out_proj", (2, 3, 8), "MultiheadAttention reads"),
}  # fmt: skip
"""Models on which PEFT loads the adapter and then computes something else, without a word."""


@in_both_formats
@pytest.mark.parametrize("case", SILENT)
def test_layers_that_peft_would_not_apply_are_refused(tmp_path, case, form):
    make, target, shape, message = SILENT[case]
    base, x = make().eval(), torch.randn(shape)
    ours = perturb(disha.inject_adapters(copy.deepcopy(base), target, 2))
    refused_to_export(tmp_path, form, ours, message)
    # An adapter away from its model does not show it, so the check is needed.
    write = {miss: miss.write_folder, lora: write_lora}[form]
    write(tmp_path, adapter_contents(ModelView(ours)))
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    with torch.no_grad():
        assert not torch.allclose(theirs(x), ours(x), atol=1e-3)


@in_both_formats
def test_layers_beside_those_that_are_read_are_not_refused(tmp_path, form):
    base = nn.TransformerEncoder(Widened(), 1, enable_nested_tensor=False).eval()
    ours = perturb(disha.inject_adapters(copy.deepcopy(base), "after", 4))
    form.export(ours, tmp_path)
    theirs, x = PeftModel.from_pretrained(base, str(tmp_path)).eval(), torch.randn(2, 3, 8)
    torch.testing.assert_close(theirs(x), ours(x))


def test_peft_runs_fused_encoder_layers_without_its_adapter():
    """What the refusal is for: PEFT's output is the base's where torch takes its fast path."""
    base = nn.Sequential(Encoder()).eval()
    x = torch.randn(1, 3, 8)
    with torch.no_grad():
        expected = base(x)
        model = get_peft_model(base, MissConfig(r=4, target_modules=["linear1"])).eval()
        for name, parameter in model.named_parameters():
            if "miss_block" in name:
                parameter.normal_()
        model.requires_grad_(False)
        torch.testing.assert_close(model(x), expected)


# --- what PEFT has no place for ------------------------------------------------------------------


def linears(**modules):
    return nn.ModuleDict({**modules, "q": nn.Linear(8, 8)})


class Case(NamedTuple):
    """A model, what is adapted and trained in it, and why PEFT has no place for that."""

    make: object
    reason: str
    also_train: str | None = None
    exclude: str | None = None
    forms: tuple[str, ...] = ("miss", "lora")


REFUSED = {
    "the model": Case(lambda: nn.Linear(8, 8), "not the model itself"),
    "attention": Case(self_attention, "can only replace modules"),
    "a parameter": Case(lambda: nn.Sequential(nn.LSTM(8, 8)), "can only replace modules"),
    "a parametrization": Case(
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))),
        "its weight is computed",
    ),
    "the model's own parameter": Case(net, "scale: it belongs to the model itself", r"^scale"),
    "a layer's own weight": Case(net, "head.0: PEFT would not adapt it", r"^head\.0\.weight"),
    "a layer's bias": Case(Layered, "v_proj: PEFT would not adapt it", r"v_proj.bias"),
    "a parameter around a layer": Case(
        lambda: nn.ModuleDict({"inner": net()}),
        "PEFT would not adapt it, as a part",
        r"inner\.scale",
    ),
    "a list of parameters": Case(
        lambda: linears(tokens=nn.ParameterList([torch.zeros(8)])),
        "can't save a ParameterList",
        "tokens",
    ),
    "a name that hides a layer": Case(
        lambda: nn.ModuleDict({"a": nn.LayerNorm(8), "b": nn.ModuleDict({"a": linears()})}),
        "b.a.q: PEFT would not adapt it",
        r"^a\.",
    ),
}


@pytest.mark.parametrize(
    ("case", "form"), [(case, form) for case in REFUSED for form in REFUSED[case].forms]
)
def test_what_peft_has_no_place_for(tmp_path, case, form):
    make, reason, also_train, exclude, _ = REFUSED[case]
    model = disha.inject_adapters(make(), ".*", 2, also_train=also_train, exclude=exclude)
    refused_to_export(tmp_path, FORMATS[form], model, reason)


def refused_to_export(folder, form, model, reason):
    with refused(model, ConversionError, "nothing was written") as caught:
        form.export(model, folder / "folder")
    assert reason in str(caught.value), str(caught.value)
    assert list(folder.iterdir()) == []


# --- what was trained beside ---------------------------------------------------------------------


SAVED = {
    "one module": (r"^norm\.", ["norm"], ("norm.bias", "norm.running_mean", "norm.weight")),
    "two in one": (r"^head\.", ["head.0", "head.2"], None),
    "a part of a module": (r"^head\.0\.w", ["head.0"], ("head.0.bias", "head.0.weight")),
}
"""What is trained, `modules_to_save` in the folder, and what comes back if it is more."""


@in_both_formats
@pytest.mark.parametrize("case", SAVED)
def test_peft_gets_what_was_trained_beside(case, form, tmp_path):
    also_train, modules, more = SAVED[case]
    model = disha.inject_adapters(net(), r"layers\.", 2, also_train=also_train)
    names = adapter_contents(ModelView(model)).also_train
    perturb_all(model, names)
    if modules == ["norm"]:
        model.norm.running_mean.add_(0.5)  # as training does
    expected = output(model, net)

    form.export(model, tmp_path)
    assert config_of(tmp_path)["modules_to_save"] == modules
    theirs = PeftModel.from_pretrained(net(), tmp_path).eval()
    close(output(theirs, net), expected)

    again = net()
    form.load(again, tmp_path)
    close(output(again, net), expected)
    assert adapter_contents(ModelView(again)).also_train == (more or names)


@in_both_formats
def test_statistics_that_peft_would_not_save_are_refused(tmp_path, form):
    model = disha.inject_adapters(net(), r"layers\.", 2)
    model.norm.running_mean.add_(0.5)
    refused_to_export(tmp_path, form, model, "norm.running_mean: PEFT saves buffers only with")


def around():
    """Its head has a parameter of its own and a module in it."""
    parts = {"gain": nn.Parameter(torch.ones(4)), "inner": nn.Sequential(nn.Linear(4, 2))}
    model = net()
    model.head = Made(lambda self, x: self.inner(x * self.gain), **parts).double()
    return model


@in_both_formats
@pytest.mark.parametrize("make", [net, around])
def test_a_saved_module_may_have_modules_in_it(tmp_path, form, make):
    torch.manual_seed(0)
    base = make()
    model = disha.inject_adapters(copy.deepcopy(base), r"layers\.", 2, also_train=r"^head\.")
    perturb_all(model, adapter_contents(ModelView(model)).also_train)
    expected = output(model, net)
    form.export(model, tmp_path)
    rewrite(tmp_path, modules_to_save=["head"])  # as PEFT writes it; `around` has it already
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    close(output(theirs, net), expected)
    again = copy.deepcopy(base)
    form.load(again, tmp_path)
    close(output(again, net), expected)


@in_both_formats
def test_weights_that_two_modules_share_are_saved_with_both(tmp_path, form):
    model = disha.inject_adapters(Tied().double(), "q_proj", 2, also_train="embed")
    perturb_all(model, ["embed.weight"])
    tokens = torch.arange(10).view(2, 5)
    expected = model(tokens)
    form.export(model, tmp_path)
    assert config_of(tmp_path)["modules_to_save"] == ["embed", "head"]

    base = Tied().double()
    base.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        base.embed.weight.zero_()
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    close(theirs(tokens), expected)
    ours = copy.deepcopy(base)
    form.load(ours, tmp_path)
    close(ours(tokens), expected)

    tensors = tensors_of(tmp_path)
    tensors["base_model.model.head.weight"] += 1
    rewrite(tmp_path, tensors)
    refused_to_load(tmp_path, form, copy.deepcopy(base), "ties it to embed.weight, which differs")
    del tensors["base_model.model.head.weight"]
    rewrite(tmp_path, tensors, modules_to_save=["embed"])
    refused_to_load(tmp_path, form, copy.deepcopy(base), "ties it to head.weight, which differs")
    tensors["base_model.model.embed.weight"] = base.embed.weight.detach()  # whole, and frozen
    rewrite(tmp_path, tensors, modules_to_save=None)
    assert form.load(base, tmp_path).complete


@in_both_formats
def test_biases_of_a_shared_module_come_back(tmp_path, form):
    def make():
        torch.manual_seed(0)
        base = Shared()
        base.norm = nn.LayerNorm(6)
        base.again = base.norm
        return base

    model = disha.inject_adapters(make(), "last", 2, also_train="norm")
    perturb_all(model, ["norm.weight", "norm.bias"])
    form.export(model, tmp_path)
    assert config_of(tmp_path)["modules_to_save"] == ["again", "norm"]
    again = make()
    form.load(again, tmp_path)
    assert torch.equal(again.norm.bias, model.norm.bias)


def with_buffer():
    base = net()
    base.head[2].register_buffer("shift", torch.zeros(2, dtype=torch.float64))
    return base


@in_both_formats
def test_frozen_weights_that_are_not_the_models_are_refused(tmp_path, form):
    model = disha.inject_adapters(with_buffer(), "inner", 2, also_train="^head")
    form.export(model, tmp_path)
    name = "inner.base_layer.weight"
    more = {f"base_model.model.{name}": torch.ones(2)}
    rewrite(tmp_path, {**tensors_of(tmp_path), **more}, modules_to_save=["head"])
    refused_to_load(tmp_path, form, with_buffer(), f"{name}: it does not train, and differs")


@in_both_formats
def test_buffers_of_a_saved_module_go_both_ways(tmp_path, form):
    model = disha.inject_adapters(with_buffer(), "inner", 2, also_train="^head")
    model.head[2].shift += 1
    form.export(model, tmp_path)
    again = with_buffer()
    form.load(again, tmp_path)
    assert torch.equal(again.head[2].shift, model.head[2].shift)
    assert torch.equal(disha.remove_adapters(again).head[2].shift, with_buffer().head[2].shift)


@in_both_formats
def test_nothing_is_gathered_while_ranks_may_fail(tmp_path, form, monkeypatch):
    model = disha.inject_adapters(with_buffer(), "inner", 2)
    form.export(model, tmp_path)
    more = {"base_model.model.inner.base_layer.weight": with_buffer().inner.weight.detach()}
    rewrite(tmp_path, {**tensors_of(tmp_path), **more})
    inside = []
    gathered = []

    @contextmanager
    def fail_together(ranks, action):
        inside.append(action)
        yield
        inside.pop()

    def note_gather(tensor):
        gathered.append(tuple(inside))
        return tensor

    monkeypatch.setattr(Ranks, "fail_together", fail_together)
    monkeypatch.setattr(peft_format, "gather", note_gather)
    form.load(with_buffer(), tmp_path)
    assert gathered == [()]


@in_both_formats
def test_whole_embeddings_must_be_the_models(tmp_path, form):
    ours = perturb(disha.inject_adapters(llama(), "q_proj", 2))
    form.export(ours, tmp_path)
    theirs = PeftModel.from_pretrained(llama(), tmp_path)
    theirs.get_input_embeddings().half()  # as after a training in 16 bits
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    model = llama()
    assert form.load(model, tmp_path).complete
    close(output(model, llama), output(ours, llama))
    assert adapter_contents(ModelView(model)).also_train == ()
    disha.remove_adapters(model).model.embed_tokens.weight.data[0] += 1
    refused_to_load(tmp_path, form, model, "embed_tokens.weight: it does not train, and differs")
    form.load(model, tmp_path, also_train=False)


def test_peft_parts_a_tied_weight_that_it_saves(tmp_path):
    """What the refusal is for: PEFT trains a copy, and the head keeps the old values."""
    for config in (MissConfig, LoraConfig):
        model = get_peft_model(
            Tied(), config(r=2, target_modules=["q_proj"], modules_to_save=["embed"])
        )
        wrapper = model.base_model.model.embed
        assert isinstance(wrapper, peft.utils.ModulesToSaveWrapper)
        assert wrapper.weight is not model.base_model.model.head.weight
