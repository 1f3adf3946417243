import io
import sys

import pytest
import torch

import disha
from disha.cli.generate import Conversation
from disha.cli.models import Asker
from disha.finetune.base import load_base
from tests.finetune.tiny_models import write_model

SHORT = ("--max_new_tokens", 6)


@pytest.fixture
def asks(run, language_model):
    def ask(*arguments):
        return run("generate", *SHORT, *arguments)

    return ask


@pytest.fixture
def asker(language_model):
    model, tokenizer = load_base(str(language_model / "model"))
    disha.load_adapter(model, language_model / "adapter.safetensors")
    return Asker(model, tokenizer, is_chat=True)


def answer(asker, prompt, tokens=6):
    """The answer that `model.generate` gives without a cache between turns."""
    ids = asker.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    found = asker.model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return asker.tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_an_answer_is_that_of_the_model(asks, asker, language_model):
    done = asks("--adapter", language_model / "adapter.safetensors", "--prompt", "hello")
    assert done.code == 0
    assert done.out == answer(asker, "<user>hello</s><assistant>") + "\n"
    assert "the base is" in done.err
    disha.remove_adapters(asker.model)
    base = asks("--base", language_model / "model", "--prompt", "hello")
    assert base.out == answer(asker, "<user>hello</s><assistant>") + "\n"
    assert base.out != done.out
    assert "the base is" not in base.err


def test_conversations_need_a_template(asks, tmp_path):
    base = write_model(tmp_path / "base")
    model = disha.inject_adapters(load_base(str(base))[0], "q_proj", 4)
    disha.save_adapter(model, tmp_path / "a", metadata={"prompt": "chat"})
    done = asks("--base", base, "--adapter", tmp_path / "a", "--prompt", "hello")
    assert "has no chat template" in done.err


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


def test_an_adapter_that_was_trained_on_texts_is_asked_in_texts(asks, asker, language_model):
    path = language_model / "text.safetensors"
    disha.save_adapter(asker.model, path, metadata={"prompt": "text"})
    given = ("--base", language_model / "model", "--adapter", path, "--prompt", "hello")
    assert asks(*given).out == answer(asker, "hello") + "\n"


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
    done = asks("--adapter", path, "--prompt", "a")
    assert done.code == 2
    assert "other" in done.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((), "name the model with --base or --adapter"),
        (("--base", "absent/model"), "absent/model"),
        (("--base", "MODEL", "--bits", "7"), "--bits"),
        (("--base", "MODEL", "--max_new_token", "x"), "max_new_tokens"),
        (("--base", "MODEL", "--temprature", "1"), "did you mean --temperature?"),
        (("--adapter", "absent.safetensors"), "absent.safetensors"),
    ],
)
def test_bad_input(complaint, language_model, given, says):
    words = [str(language_model / "model") if word == "MODEL" else word for word in given]
    assert says in complaint("generate", "--prompt", "a", *words)


# --- a conversation ------------------------------------------------------------------------------


def test_a_conversation_remembers_and_keeps_its_cache(asks, asker, language_model, monkeypatch):
    lines = iter(["hello", "", "and you?"])
    kept = []
    generate = type(asker.model).generate

    def spied(self, *given, **options):
        kept.append(options.get("past_key_values"))
        return generate(self, *given, **options)

    def typed(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(type(asker.model), "generate", spied)
    done = asks("--adapter", language_model / "adapter.safetensors")
    monkeypatch.undo()
    first = answer(asker, "<user>hello</s><assistant>")
    second = answer(asker, f"<user>hello</s><assistant>{first}</s><user>and you?</s><assistant>")
    assert done.code == 0
    assert [line for line in done.out.splitlines()[1:] if line] == [first, second]
    assert [one is not None for one in kept] == [False, True]


def test_a_stopped_answer_is_forgotten(asker, capsys):
    conversation = Conversation(asker, {"max_new_tokens": 6, "do_sample": False})
    conversation.ask("hello")
    before = list(conversation.turns)
    generate = asker.model.generate

    def stopped(**options):
        options["streamer"].put(torch.tensor([[5]]))
        raise KeyboardInterrupt

    asker.model.generate = stopped
    with pytest.raises(KeyboardInterrupt):
        conversation.ask("and you?")
    asker.model.generate = generate
    assert conversation.turns == before
    conversation.ask("and you?")
    text = f"<user>hello</s><assistant>{before[1]['content']}</s><user>and you?</s><assistant>"
    assert conversation.turns[-1]["content"] == answer(asker, text)
