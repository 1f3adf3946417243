import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config

import disha
from disha import ArgumentError
from disha.finetune.base import best_device, load_base, template_at
from disha.finetune.notes import BASE_KEY, base_note, read_noted_base
from tests.finetune import tiny_gguf
from tests.finetune.tiny_models import CHATML, tokenizer, write_model


@pytest.mark.parametrize(
    ("bits", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("auto", torch.float32)]
)
def test_a_folder(tiny, bits, dtype):
    model, tokenizer = load_base(str(tiny), bits)
    assert model.dtype == dtype
    assert not model.training
    assert tokenizer.pad_token == tokenizer.eos_token


@pytest.mark.parametrize("bits", ["8", "4"])
def test_bits(tiny, bits):
    model, _ = load_base(str(tiny), bits, torch.device("cpu"))
    assert getattr(model, f"is_loaded_in_{bits}bit")
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


def test_four_bits_of_experts(tmp_path):
    model, _ = load_base(str(write_model(tmp_path, "Mixtral")), "4", torch.device("cpu"))
    layer = model.model.layers[0]
    for name in ("gate_up_proj", "down_proj"):
        assert layer.mlp.experts.parametrizations[name].original.dtype == torch.uint8
    assert layer.self_attn.q_proj.weight.dtype == torch.float32  # accelerate shards no integers
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


@pytest.mark.parametrize(("kind", "limit"), [("F32", 1e-6), ("Q8_0", 0.01), ("Q4_1", 0.1)])
def test_a_gguf_file_computes_what_its_weights_say(tmp_path, kind, limit):
    state = tiny_gguf.random_state(tied=True)
    path = tiny_gguf.write_gguf(tmp_path / "tiny.gguf", state, kind=kind)
    model, tokenizer = load_base(str(path), "fp32", best_device())
    found = model.state_dict()
    for name, values in state.items():
        torch.testing.assert_close(found[name].cpu(), values, rtol=limit, atol=limit)
    assert tokenizer("hello")["input_ids"]
    with pytest.raises(ArgumentError, match="cannot combine Quantization and loading a model from"):
        load_base(str(path), "4")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "can't load the base ./nowhere"),
        ("someone/nothing", "can't load the base someone/nothing"),
    ],
)
def test_no_such_model(name, message):
    with pytest.raises(ArgumentError, match=message):
        load_base(name)


def test_a_model_that_writes_no_text(tmp_path):
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match=r"can't load the base .* Unrecognized configuration"):
        load_base(str(tmp_path))


def test_a_base_without_some_values_is_refused(tmp_path):
    """transformers would give them random values."""
    path = write_model(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ArgumentError, match=r"has no values for model\.norm\.weight"):
        load_base(str(tmp_path))


def test_of_several_chat_templates_the_default_is_used(chatty, tmp_path):
    shutil.copytree(chatty, tmp_path, dirs_exist_ok=True)
    words = tokenizer(chat=True)
    words.chat_template = {"default": CHATML, "tool_use": "{{ tools }}"}
    words.save_pretrained(tmp_path)
    assert load_base(str(tmp_path))[1].chat_template == CHATML
    assert template_at(str(tmp_path)) == CHATML


def test_a_model_without_a_chat_template_gives_none(tiny):
    with pytest.raises(ValueError, match="chat_template is not set"):
        template_at(str(tiny))


def test_code_in_the_folder_does_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question: "y")  # nobody is asked on a terminal
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}})
    )
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_base(str(tmp_path))


def test_bits_without_bitsandbytes(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ArgumentError, match="bitsandbytes"):
        load_base(str(tiny), "4")


def test_a_chat_template_with_the_line_ends_of_windows(tmp_path):
    """Simulated: the file that an editor of Windows writes gives the same prompts."""
    turns = [{"role": "user", "content": "say two"}, {"role": "assistant", "content": "two two"}]
    template = "{% for m in messages %}\n{{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}\n"
    path, words, prompts = tmp_path / "template.jinja", tokenizer(), []
    for ends in (b"\n", b"\r\n"):
        path.write_bytes(template.encode().replace(b"\n", ends))
        words.chat_template = template_at(str(path))
        prompts.append(words.apply_chat_template(turns, tokenize=False))
    assert prompts == ["user\nsay two\nassistant\ntwo two\n"] * 2


class TestNote:
    def save(self, path, note):
        model = disha.inject_adapters(torch.nn.Linear(4, 4), "all-linear", r=2)
        disha.save_adapter(model, path, metadata={} if note is None else {BASE_KEY: note})
        return path

    def test_a_path_stays_right_when_both_are_moved(self, tmp_path):
        base = tmp_path / "here" / "model"
        base.mkdir(parents=True)
        adapter = tmp_path / "here" / "out" / "adapter.safetensors"
        adapter.parent.mkdir()
        self.save(adapter, base_note(str(base), "4", adapter))
        assert str(tmp_path) not in adapter.read_bytes()[:2000].decode(errors="replace")
        os.rename(tmp_path / "here", tmp_path / "there")
        moved = tmp_path / "there" / "out" / "adapter.safetensors"
        assert read_noted_base(moved) == (str(tmp_path / "there" / "model"), "4")
        (tmp_path / "there" / "model").rmdir()
        with pytest.raises(ArgumentError, match="which is not there; give --base"):
            read_noted_base(moved)

    def test_a_base_on_another_drive_is_noted_whole(self, tmp_path, monkeypatch):
        """Simulated: on Windows, no relative path leads from one drive to another."""

        def refuse(path, start):
            raise ValueError("path is on mount 'D:', start on mount 'C:'")

        monkeypatch.setattr(os.path, "relpath", refuse)
        note = json.loads(base_note(str(tmp_path), "4", tmp_path / "adapter.safetensors"))
        assert note["base_model_name_or_path"] == str(tmp_path)

    def test_a_name(self, tmp_path):
        path = tmp_path / "adapter.safetensors"
        self.save(path, base_note("Qwen/Qwen3-0.6B", "bf16", path))
        assert read_noted_base(path) == ("Qwen/Qwen3-0.6B", "bf16")

    def test_no_note(self, tmp_path):
        with pytest.raises(ArgumentError, match="notes no base that can be used; name it too"):
            read_noted_base(self.save(tmp_path / "adapter.safetensors", None))

    @pytest.mark.parametrize("note", ["{", "[]", "{}", '{"base_model_name_or_path": 1}'])
    def test_a_note_that_says_nothing(self, tmp_path, note):
        path = self.save(tmp_path / "adapter.safetensors", note)
        with pytest.raises(ArgumentError, match="notes no base that can be used"):
            read_noted_base(path)
