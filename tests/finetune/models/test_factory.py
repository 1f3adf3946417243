from __future__ import annotations

import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel

import disha
from disha.finetune.errors import CheckpointError, SettingsError
from disha.finetune.models.factory import (
    called,
    explaining_failures,
    load_factory,
    tensor_of,
)

MODULE = "models_of_a_user"

SOURCE = """
    import torch
    from torch import nn
    from transformers import GPT2Config, GPT2LMHeadModel

    SIZE = 4

    def make_gpt2():
        torch.manual_seed(0)
        config = GPT2Config(n_embd=32, n_head=2, n_layer=2, n_positions=64, vocab_size=50,
            bos_token_id=1, eos_token_id=2)
        return GPT2LMHeadModel(config).eval()

    def make_images():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LazyLinear(10))

    def make_pair():
        return nn.Linear(SIZE, SIZE), "a tokenizer"

    def make_nothing():
        pass

    def make_three():
        return nn.Linear(2, 2), None, None

    def make_swapped():
        return "a tokenizer", nn.Linear(2, 2)

    def make_with_size(size):
        return nn.Linear(size, size)

    def make_failing():
        return nn.Linear(-1, 2)

    def make_leaving():
        raise SystemExit("no weights here")

    def make_empty():
        return nn.Linear(2, 2, device="meta"), "a tokenizer"
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current directory, with a module of a user's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{MODULE}.py").write_text(textwrap.dedent(SOURCE))
    known, path = set(sys.modules), list(sys.path)
    yield tmp_path
    assert sys.path == path
    for name in set(sys.modules) - known:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(
            sys.modules[name].__file__
        ):
            del sys.modules[name]


def test_a_gpt2_of_transformers_is_made_and_adapted(here):
    model, tokenizer = load_factory(f"{MODULE}:make_gpt2")
    assert isinstance(model, GPT2LMHeadModel)
    assert tokenizer is None
    tokens = torch.arange(12).unsqueeze(0)
    logits = tensor_of(model(tokens))
    assert logits.shape == (1, 12, 50)
    disha.inject_adapters(model, "attn|mlp", 4)
    assert torch.equal(tensor_of(model(tokens)), logits)


def test_a_model_of_no_text_is_made(here):
    model, tokenizer = load_factory(f"{MODULE}:make_images")
    assert tensor_of(model(torch.randn(2, 3, 6, 6))).shape == (2, 10)
    assert tokenizer is None


def test_a_tokenizer_may_come_with_it(here):
    model, tokenizer = load_factory(f"{MODULE}:make_pair")
    assert isinstance(model, nn.Linear)
    assert tokenizer == "a tokenizer"


def test_installed_modules_and_packages_of_modules_are_found_too(here):
    package = here / "package_of_a_user"
    package.mkdir()
    (package / "inner.py").write_text("from torch import nn\n\ndef make(): return nn.ReLU()\n")
    assert isinstance(load_factory("package_of_a_user.inner:make")[0], nn.ReLU)
    assert isinstance(load_factory("torch.nn:Identity")[0], nn.Identity)


@pytest.mark.parametrize("name", ["absent_module", "absent_package.inner", f"{MODULE}.inner"])
def test_a_module_that_is_not_there_is_named(here, name):
    with pytest.raises(SettingsError, match=r"there is no module '.*neither installed nor in the"):
        load_factory(f"{name}:make")


def test_what_fails_inside_the_import_is_named(here):
    (here / "needs.py").write_text("import torch\n\nimport something_absent\n")
    (here / "breaks.py").write_text("\n1 / 0\n")
    (here / "wrong.py").write_text("def make(:\n")
    (here / "script.py").write_text("import sys\n\nsys.exit()\n")
    with pytest.raises(CheckpointError) as caught:
        load_factory("needs:make")
    message = str(caught.value)
    assert "importing needs failed at " in message
    assert "needs.py, line 3, with ModuleNotFoundError: No module named 'something_abs" in message
    with pytest.raises(CheckpointError, match=r"breaks\.py, line 2, with ZeroDivisionError"):
        load_factory("breaks:make")
    with pytest.raises(CheckpointError, match=r"importing wrong failed.* with SyntaxError"):
        load_factory("wrong:make")
    with pytest.raises(
        CheckpointError, match=r"script failed at .*script\.py, line 3, with System"
    ):
        load_factory("script:make")


def test_a_function_that_is_not_there_gets_the_nearest_names(here):
    with pytest.raises(SettingsError, match="no function 'make_gpt3'; the nearest are make_gpt2"):
        load_factory(f"{MODULE}:make_gpt3")


def test_what_is_no_function_is_named(here):
    with pytest.raises(SettingsError, match="SIZE is a int, not a function"):
        load_factory(f"{MODULE}:SIZE")


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        ("make_nothing", "returned a NoneType; it must return an nn.Module, or a pair"),
        ("make_three", "returned a tuple of Linear, NoneType, NoneType; it must"),
        ("make_swapped", "returned a tuple of str, Linear; it must"),
        ("make_with_size", r"without arguments, failed with TypeError: .*'size'"),
        ("make_failing", r"failed at .*, line \d+, with RuntimeError: .*negative"),
        ("make_leaving", r"failed at .*, line \d+, with SystemExit: no weights here"),
        ("make_empty", "returned a model without weights: weight is on the meta device"),
    ],
)
def test_what_a_function_does_wrong_is_named(here, function, complaint):
    with pytest.raises(CheckpointError, match=complaint) as caught:
        load_factory(f"{MODULE}:{function}")
    assert f"--model {MODULE}:{function}" in str(caught.value)


def test_interrupts_are_not_taken_for_failures(here):
    (here / "stops.py").write_text("def make(): raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_factory("stops:make")


def test_logits_are_a_tensor_or_an_attribute():
    logits = torch.randn(2, 3)
    assert tensor_of(logits) is logits
    assert tensor_of(SimpleNamespace(logits=logits)) is logits
    for output in (None, (logits,), SimpleNamespace(logits=None)):
        with pytest.raises(CheckpointError, match="it must return a tensor, or an object"):
            tensor_of(output)


def test_what_a_model_fails_with_on_tokens_is_named():
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    assert called(nn.Embedding(4, 5), tokens).shape == (2, 3, 5)
    with pytest.raises(
        CheckpointError, match=r"failed at .*, with RuntimeError: .* shape \(2, 3\)"
    ):
        called(nn.Linear(4, 5), tokens)


def test_lack_of_memory_is_not_the_model_s_mistake():
    class Large(nn.Module):
        def forward(self, tokens):
            raise torch.OutOfMemoryError("too large")

    with pytest.raises(torch.OutOfMemoryError):
        called(Large(), torch.zeros(1, 1))


def test_how_a_users_model_fails_is_said_in_one_line():
    with (
        pytest.raises(CheckpointError, match=r"^--model a:b: the model failed at .* with KeyError"),
        explaining_failures("a:b"),
    ):
        raise KeyError("x")
    with pytest.raises(KeyError), explaining_failures(None):
        raise KeyError("x")
    with pytest.raises(FileNotFoundError), explaining_failures("a:b"):
        raise FileNotFoundError
    with explaining_failures("a:b"):
        pass
