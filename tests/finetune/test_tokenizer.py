import json
import shutil

import pytest
import torch
from transformers import GenerationConfig

from disha import ArgumentError
from disha.finetune.base import load_base
from disha.finetune.notes import EOS_KEY, TOKENS_KEY
from disha.finetune.tokenizer import end_answers, load_tokenizer, template_at
from tests.finetune.tiny_models import CHATML, tokenizer


def test_of_several_chat_templates_the_default_is_used(chatty, tmp_path):
    shutil.copytree(chatty, tmp_path, dirs_exist_ok=True)
    words = tokenizer(chat=True)
    words.chat_template = {"default": CHATML, "tool_use": "{{ tools }}"}
    words.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), {})[0].chat_template == CHATML
    assert template_at(str(tmp_path)) == CHATML


def test_a_model_without_a_chat_template_gives_none(tiny):
    with pytest.raises(ValueError, match="chat_template is not set"):
        template_at(str(tiny))


def test_a_chat_template_that_is_not_there_is_not_called_a_base():
    with pytest.raises(ArgumentError, match=r"can't load ./none\.jinja"):
        template_at("./none.jinja")


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


def test_a_new_token_that_the_vocabulary_has_changes_no_other_row(tiny):
    plain = "Ò"
    before, words = load_base(str(tiny))
    assert plain in words.get_vocab()
    after, words = load_base(str(tiny), notes={TOKENS_KEY: json.dumps([plain, "<think>"])})
    rows = before.get_input_embeddings().weight
    assert torch.equal(after.get_input_embeddings().weight[: len(rows)], rows)
    assert words.convert_tokens_to_ids("<think>") == len(rows)


def test_a_template_that_shows_no_end_of_answers_is_named():
    words = tokenizer()
    words.chat_template = "{{ raise_exception('a system message first') }}"
    generation = GenerationConfig(eos_token_id=2)
    with pytest.warns(UserWarning, match="does not show how answers end: 'a system message first'"):
        end_answers(generation, words, {})
    assert generation.eos_token_id == [2]


def test_of_new_tokens_the_one_that_ends_answers_is_not_shown(tiny):
    notes = {TOKENS_KEY: '["<think>", "<end>"]', EOS_KEY: "<end>"}
    words, _ = load_tokenizer(str(tiny), notes)
    ids = words("<think>two<end>")["input_ids"]
    assert ids[-1] == words.eos_token_id
    assert words.decode(ids, skip_special_tokens=True) == "<think>two"
