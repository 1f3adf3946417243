import io
import json
import sys

import pytest
import torch

import disha
from disha.cli.models import PromptRunner
from disha.finetune.base import load_base
from tests.finetune.tiny_models import write_model
from tests.peft_models import rewrite

SHORT = ("--max_new_tokens", 6)


@pytest.fixture
def asks(run, language_model):
    def ask(*arguments):
        return run("generate", *SHORT, *arguments)

    return ask


@pytest.fixture
def runner(language_model):
    model, tokenizer = load_base(str(language_model / "model"))
    disha.load_adapter(model, language_model / "adapter.safetensors")
    return PromptRunner(model, tokenizer, is_chat=True)


def answer(runner, prompt, tokens=6):
    """The answer that `model.generate` gives without a cache between turns."""
    ids = runner.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    found = runner.model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return runner.tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_an_answer_is_that_of_the_model(asks, runner, language_model):
    done = asks("--adapter", language_model / "adapter.safetensors", "--prompt", "hello")
    assert done.code == 0
    assert done.out == answer(runner, "<user>hello</s><assistant>") + "\n"
    assert "the base is" in done.err
    disha.remove_adapters(runner.model)
    base = asks("--base", language_model / "model", "--prompt", "hello")
    assert base.out == answer(runner, "<user>hello</s><assistant>") + "\n"
    assert base.out != done.out
    assert "the base is" not in base.err


def test_conversations_need_a_template(asks, tmp_path):
    base = write_model(tmp_path / "base")
    model = disha.inject_adapters(load_base(str(base))[0], "q_proj", 4)
    disha.save_adapter(model, tmp_path / "a", metadata={"prompt": "chat"})
    done = asks("--base", base, "--adapter", tmp_path / "a", "--prompt", "hello")
    assert "has no chat template" in done.err


def test_a_tokenizer_that_gives_more_than_the_model_takes(runner):
    expected = answer(runner, "hello")
    runner.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert runner.answer(["hello"], max_new_tokens=6, do_sample=False) == [expected]


def test_an_answer_is_streamed(asks, language_model, monkeypatch):
    class Screen(io.StringIO):
        flushes = 0

        def flush(self):
            self.flushes += 1

    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    done = asks("--base", language_model / "model", "--prompt", "one", "two")
    assert done.code == 0
    assert screen.getvalue().count("\n") == 4  # each prompt, each answer
    assert screen.flushes > 2


def test_prompts_come_from_standard_input(asks, language_model, monkeypatch):
    base = language_model / "model"
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nworld\n"))
    piped = asks("--base", base).out
    assert piped == asks("--base", base, "--prompt", "hello", "world").out
    assert [line for line in piped.splitlines() if line[0] == ">"] == ["> hello", "> world"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert "there is no prompt" in asks("--base", base).complaint


def test_sampling_is_reproducible(asks, language_model):
    def sampled(seed):
        given = ("--temperature", 2.0, "--top_k", 20, "--seed", seed, "--prompt", "hello")
        return asks("--base", language_model / "model", *given).out

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(5)}) > 1


def test_a_temperature_of_0_takes_the_most_likely_token(asks, language_model):
    given = ("--base", language_model / "model", "--prompt", "hello")
    greedy = asks(*given).out
    assert asks(*given, "--temperature", 0, "--top_k", 20, "--top_p", 0.9).out == greedy


def test_no_limit_of_tokens_is_sampling_too(asks, language_model):
    given = ("--base", language_model / "model", "--prompt", "hello", "--top_k", 0)
    assert len({asks(*given, "--seed", seed).out for seed in range(5)}) > 1


def test_a_flag_that_comes_twice_adds_its_prompts(asks, language_model):
    given = ("--base", language_model / "model", "--json", "--prompt", "one", "--prompt", "two")
    assert asks(*given).out.count('"prompt"') == 2


def test_an_adapter_that_was_trained_on_texts_is_asked_in_texts(asks, runner, language_model):
    path = language_model / "text.safetensors"
    disha.save_adapter(runner.model, path, metadata={"prompt": "text"})
    given = ("--base", language_model / "model", "--adapter", path, "--prompt", "hello")
    assert asks(*given).out == answer(runner, "hello") + "\n"


def test_an_adapter_of_another_base_is_refused(asks, language_model, tmp_path):
    model, tokenizer = load_base(str(language_model / "model"))
    disha.inject_adapters(model, "q_proj", r=4)
    path = tmp_path / "adapter.safetensors"
    note = '{"base_model_name_or_path": "./model", "bits": "fp32"}'
    disha.save_adapter(model, path, metadata={"base": note})
    assert "which is not there; give --base" in asks("--adapter", path, "--prompt", "a").complaint
    with torch.no_grad():
        for layer in model.model.layers:
            disha.remove_adapters(model) if disha.summary(model).layers else None
            layer.self_attn.q_proj.weight.add_(1)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for named in ((), ("--base", tmp_path / "model")):
        done = asks("--adapter", path, "--prompt", "a", *named)
        assert (done.code, done.out) == (2, "")
        assert "other base weights" in done.err.splitlines()[-1]
        assert done.err.endswith("--force uses it all the same\n")
    assert asks("--adapter", path, "--prompt", "a", "--force").code == 0


def test_answers_as_json(asks, language_model):
    base = language_model / "model"
    plain = asks("--base", base, "--prompt", "hello").out
    lines = asks("--base", base, "--prompt", "hello", "world", "--json").out.splitlines()
    first, second = map(json.loads, lines)
    assert first == {"prompt": "hello", "answer": plain.strip()}
    assert second["prompt"] == "world"


def test_a_system_message_comes_first(asks, runner, language_model):
    adapter = language_model / "adapter.safetensors"
    done = asks("--adapter", adapter, "--prompt", "hello", "--system", "be brief")
    assert done.out == answer(runner, "<system>be brief</s><user>hello</s><assistant>") + "\n"


def test_tools_are_handed_to_the_template(runner):
    runner.tokenizer.chat_template = "{{ tools[0]['name'] }} {{ messages[0]['content'] }}"
    assert runner.render("hello", tools=[{"name": "f"}]) == "f hello"


def test_a_folder_of_peft_is_an_adapter_that_names_its_base(asks, runner, language_model, tmp_path):
    base = str(language_model / "model")
    disha.interop.peft.export(runner.model, tmp_path)
    rewrite(tmp_path, base_model_name_or_path=base)
    expected = asks("--adapter", language_model / "adapter.safetensors", "--prompt", "hello").out
    assert asks("--adapter", tmp_path, "--prompt", "hello").out == expected


# --- a conversation ------------------------------------------------------------------------------


def test_a_conversation_remembers_all_but_stopped_answers(
    asks, runner, language_model, monkeypatch
):
    lines = iter(["hello", "", "stop here", "and you?"])

    def typed(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    whole = PromptRunner.answer

    def stopped(runner, texts, **options):
        if "stop here" in texts[0]:
            raise KeyboardInterrupt
        return whole(runner, texts, **options)

    monkeypatch.setattr(PromptRunner, "answer", stopped)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", typed)
    done = asks("--adapter", language_model / "adapter.safetensors")
    monkeypatch.undo()
    first = answer(runner, "<user>hello</s><assistant>")
    second = answer(runner, f"<user>hello</s><assistant>{first}</s><user>and you?</s><assistant>")
    assert done.code == 0
    shown = [line for line in done.out.splitlines()[1:] if line]
    assert shown == [first, "(stopped)", second]
