from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch

import disha
from disha.finetune.answering import (
    Answerer,
    open_answerer,
    prompts_of,
    template_of,
)
from disha.finetune.errors import DataError, SettingsError
from disha.finetune.evaluating import evaluate
from disha.finetune.settings import (
    EvaluateSettings,
    GenerateSettings,
    ModelSettings,
    RowSettings,
    SamplingSettings,
)
from disha.finetune.text.templates import CHATML, PLAIN
from tests.finetune import tiny_gguf
from tests.finetune.command_line import ROWS, write_rows

PROMPT = "hello world"


def answerer(model, tokenizer, **sampling):
    sampling = SamplingSettings(**{"max_new_tokens": 8, **sampling})
    return Answerer(model.eval(), tokenizer, PLAIN, sampling)


def settings(path, **changes):
    return GenerateSettings(model=ModelSettings(base_model_name_or_path=path), **changes)


def adapter_of(tmp_path, model, method):
    """A file of an adapter that changes what the model says."""
    disha.inject_adapters(model, r"_proj$", 8, method=method)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in disha.adapter_parameters(model):
            block.normal_(std=0.1, generator=generator)
    disha.save_adapter(model, tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


def test_an_answer_goes_on_as_long_as_the_model_takes_it(tiny_model, tiny_tokenizer):
    endless = dataclasses.replace(tiny_tokenizer, ends=frozenset(), end=0)
    asked = answerer(tiny_model, endless, max_new_tokens=10**12)
    prompt = PLAIN.prompt(PROMPT, endless)
    made = list(asked.answer(PROMPT))
    assert 0 < len(made) <= tiny_gguf.CONTEXT - len(prompt)


def test_a_prompt_that_leaves_no_room_is_refused(tiny_model, tiny_tokenizer):
    with pytest.raises(DataError, match=r"leaves no room for an answer.*at most 128"):
        list(answerer(tiny_model, tiny_tokenizer).answer("z" * 128))


@pytest.mark.parametrize("method", ["bone", "bat"])
def test_base_and_adapter_answer_apart_and_merging_changes_nothing(
    tmp_path, tiny_path, tiny_model, tiny_tokenizer, method
):
    base = "".join(answerer(tiny_model, tiny_tokenizer).answer(PROMPT))
    file = adapter_of(tmp_path, tiny_model, method)
    sampling = SamplingSettings(max_new_tokens=8)
    asked = settings(tiny_path, adapter=file, template=PLAIN.setting, sampling=sampling)
    adapted = open_answerer(asked)
    merged = open_answerer(dataclasses.replace(asked, merge=True))
    answer = "".join(adapted.answer(PROMPT))
    assert "".join(adapted.base_answer(PROMPT)) == base != answer
    assert "".join(adapted.answer(PROMPT)) == answer
    assert "".join(merged.answer(PROMPT)) == answer


@pytest.mark.parametrize(
    ("sampling", "complaint"),
    [
        ({"top_k": 5}, "--top_k limits sampling, but --temperature 0 disables sampling"),
        ({"top_p": 0.9}, "--top_p limits sampling"),
    ],
)
def test_what_only_drawing_follows_needs_a_temperature(tiny_path, sampling, complaint):
    with pytest.raises(SettingsError, match=complaint):
        settings(tiny_path, prompt=("a",), sampling=SamplingSettings(**sampling)).check()
    drawing = SamplingSettings(**sampling, temperature=0.7)
    settings(tiny_path, prompt=("a",), sampling=drawing).check()


def test_prompts_that_are_no_text_are_refused(tiny_path):
    with pytest.raises(DataError, match=r"--prompt must be UTF-8 text, got 'a\\udcff'"):
        prompts_of(settings(tiny_path, prompt=("a\udcff",)))
    assert prompts_of(settings(tiny_path, prompt=("a", "é"))) == ["a", "é"]


@pytest.fixture
def adapter(tmp_path, tiny_model):
    """An adapter that notes a template."""
    disha.inject_adapters(tiny_model, "_proj$", 4)
    path = tmp_path / "adapter.safetensors"
    disha.save_adapter(tiny_model, path, metadata={"template": r"Q: {query}\nA: "})
    return path


@pytest.fixture
def usual(tiny_path):
    return GenerateSettings(
        ModelSettings(base_model_name_or_path=tiny_path),
        SamplingSettings(max_new_tokens=12),
        prompt=("say hello",),
    )


def changed(usual, **changes):
    return GenerateSettings(**{**vars(usual), **changes})


def test_the_template_is_the_one_given_or_the_adapters_or_the_usual(adapter, tiny_tokenizer):
    assert template_of("none", adapter, tiny_tokenizer) is None
    assert template_of("auto", adapter, tiny_tokenizer) == CHATML
    assert template_of(PLAIN.setting, adapter, tiny_tokenizer) == PLAIN
    assert template_of(None, adapter, tiny_tokenizer).before == "Q: "
    assert template_of(None, None, tiny_tokenizer) == CHATML


@pytest.mark.parametrize("note", ["prompt.txt", "{folder}/prompt.txt", "{folder}/huge.txt"])
def test_a_note_that_names_a_file_is_not_read_as_one(
    tmp_path, tiny_path, tiny_model, monkeypatch, note
):
    (tmp_path / "prompt.txt").write_text("a secret {query}")
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(40 << 30)
    monkeypatch.chdir(tmp_path)
    disha.inject_adapters(tiny_model, "_proj$", 4)
    path, note = tmp_path / "adapter.safetensors", note.replace("{folder}", str(tmp_path))
    disha.save_adapter(tiny_model, path, metadata={"template": note})
    complaint = r"{query} in it exactly once.*; the note in .*adapter\.safetensors has it 0 times"
    model = ModelSettings(base_model_name_or_path=tiny_path)
    with pytest.raises(SettingsError, match=complaint):
        open_answerer(GenerateSettings(model, prompt=("a",), adapter=path))
    rows = write_rows(tmp_path / "rows.jsonl", ROWS[:2])
    with pytest.raises(SettingsError, match=complaint):
        evaluate(
            EvaluateSettings(
                model, RowSettings(data_path=(rows,), max_seq_length=100), adapter=path
            )
        )


def test_a_model_without_a_tokenizer_cannot_be_asked(usual):
    model = ModelSettings(model="tests.finetune.factories:classifier")
    with pytest.raises(SettingsError, match="came without a tokenizer, so it can't be asked"):
        open_answerer(changed(usual, model=model))


def test_prompts_come_from_the_command_line_or_a_file(usual, tmp_path):
    assert prompts_of(usual) == ["say hello"]
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\r\n\n two \nthree\u2028\x0c3".encode())
    assert prompts_of(changed(usual, prompt_file=path)) == ["one", " two ", "three\u2028\x0c3"]


def test_without_a_standard_input_nobody_types(usual, monkeypatch):
    """Python has none if it was closed, as by `<&-`."""
    monkeypatch.setattr("sys.stdin", None)
    assert not changed(usual, prompt=()).converses


def test_prompts_come_from_a_pipe(usual):
    reading, writing = os.pipe()
    os.write(writing, b"one\ntwo\n")
    os.close(writing)
    assert prompts_of(changed(usual, prompt_file=Path(f"/dev/fd/{reading}"))) == ["one", "two"]
    os.close(reading)
