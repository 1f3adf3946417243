from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from disha.finetune.errors import DataError, TokenizerError
from disha.finetune.text.chat import encode_chat, render
from disha.finetune.text.from_folder import open_tokenizer
from tests.finetune.text import chat_templates, tiny_tokenizers
from tests.finetune.text.texts import texts

ENDS = {
    "smollm2": "<|im_end|>",
    "qwen2": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama2": " </s>",
    "mistral": "</s>",
}


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


TWO_TURNS = [user("what is"), assistant("the answer"), user("and more"), assistant("no more")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {
        name: family().write(folder / name) for name, family in tiny_tokenizers.FAMILIES.items()
    }


@pytest.fixture(scope="module", params=tiny_tokenizers.FAMILIES)
def family(request, folders):
    """Its name, its tokenizer as we read it, and as transformers does."""
    folder = folders[request.param]
    return request.param, open_tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))


def learned(messages, tokenizer):
    """The text of each span that is learned, special tokens and all."""
    ids, spans = encode_chat(messages, tokenizer)
    assert all(0 < first < end <= len(ids) for first, end in spans)
    assert spans == sorted(spans)
    return [
        tokenizer.backend.decode(ids[first:end], skip_special_tokens=False) for first, end in spans
    ]


@given(
    turns=st.lists(st.tuples(texts(), texts()), min_size=1, max_size=3),
    told=st.one_of(st.none(), texts()),
)
def test_ids_equal_those_of_transformers(family, turns, told):
    name, ours, theirs = family
    messages = [message for asked, said in turns for message in (user(asked), assistant(said))]
    if told is not None and name != "mistral":
        messages.insert(0, system(told))
    ids, _ = encode_chat(messages, ours)
    assert ids == theirs.apply_chat_template(messages, tokenize=True)["input_ids"]


@given(asked=texts())
def test_prompts_equal_those_of_transformers(family, asked):
    _, ours, theirs = family
    assert render([user(asked)], ours, prompts=True) == theirs.apply_chat_template(
        [user(asked)], tokenize=False, add_generation_prompt=True
    )


def test_each_turn_and_what_ends_it_is_learned(family):
    name, ours, _ = family
    expected = [f"the answer{ENDS[name]}", f"no more{ENDS[name]}"]
    if name == "qwen3":  # writes no thoughts into earlier turns, so only the last is as asked for
        expected = [f"<think>\n\n</think>\n\nno more{ENDS[name]}"]
    assert learned(TWO_TURNS, ours) == expected


def test_a_thought_is_learned_with_its_answer(folders):
    tokenizer = open_tokenizer(folders["qwen3"])
    asked = user("what is the question")
    expected = ["<think>\nhmm\n</think>\n\nthe answer<|im_end|>"]
    assert (
        learned([asked, assistant("<think>\nhmm\n</think>\n\nthe answer")], tokenizer) == expected
    )
    given_apart = {**assistant("the answer"), "reasoning_content": "hmm"}
    assert learned([asked, given_apart], tokenizer) == expected


def test_prompts_of_the_learned_turns_are_what_generation_starts_from(family):
    _, ours, _ = family
    for messages in (TWO_TURNS[:2], TWO_TURNS):
        ids, spans = encode_chat(messages, ours)
        prompt = ours.encode(render(messages[:-1], ours, prompts=True))
        assert ids[: spans[-1][0]] == prompt


def test_a_prompt_that_goes_on_otherwise_ends_where_it_does(folders):
    """As DeepSeek's templates, which begin a thought for the model."""
    template = chat_templates.QWEN2.replace(
        "{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>\\n' }}"
    )
    tokenizer = dataclasses.replace(open_tokenizer(folders["qwen2"]), chat_template=template)
    assert render(TWO_TURNS[:1], tokenizer, prompts=True).endswith("assistant\n<think>\n")
    assert learned(TWO_TURNS, tokenizer) == ["the answer<|im_end|>", "no more<|im_end|>"]


def test_turns_that_are_written_otherwise_later_are_not_learned(folders):
    tokenizer = dataclasses.replace(
        open_tokenizer(folders["mistral"]), chat_template=chat_templates.SYSTEM_IN_LAST_TURN
    )
    assert learned([system("be kind"), *TWO_TURNS], tokenizer) == ["no more</s>"]
    assert learned(TWO_TURNS, tokenizer) == ["no more</s>"]


def test_messages_after_the_last_answer_are_left_out(family):
    _, ours, _ = family
    assert encode_chat([*TWO_TURNS, user("and then")], ours) == encode_chat(TWO_TURNS, ours)


def test_several_answers_in_a_row(folders):
    tokenizer = open_tokenizer(folders["llama3"])
    messages = [user("what"), assistant("the"), assistant("answer")]
    assert learned(messages, tokenizer) == ["the<|eot_id|>", "answer<|eot_id|>"]


def test_an_opening_of_the_assistant_is_not_learned(folders):
    tokenizer = open_tokenizer(folders["llama3"])
    messages = [assistant("hello"), user("what"), assistant("the answer")]
    assert learned(messages, tokenizer) == ["the answer<|eot_id|>"]
    with pytest.raises(DataError, match="nothing of the conversation can be learned"):
        encode_chat(messages[:1], tokenizer)


def test_keys_without_a_value_are_not_seen(folders):
    tokenizer = dataclasses.replace(
        open_tokenizer(folders["llama3"]),
        chat_template="{% for m in messages %}{{ m.content }}{{ 'x' in m }}{% endfor %}",
    )
    assert render([{**user("a"), "x": None}], tokenizer) == "aFalse"


def test_chatml_stands_in_for_a_missing_template(folders):
    tokenizer = dataclasses.replace(open_tokenizer(folders["smollm2"]), chat_template=None)
    ids, _ = encode_chat(TWO_TURNS[:2], tokenizer)
    assert ids == tokenizer.encode(
        "<|im_start|>user\nwhat is<|im_end|>\n<|im_start|>assistant\nthe answer<|im_end|>\n"
    )
    assert learned(TWO_TURNS, tokenizer) == ["the answer<|im_end|>", "no more<|im_end|>"]
    beginning = dataclasses.replace(tokenizer, begin=(0,))
    assert encode_chat(TWO_TURNS[:2], beginning)[0] == [0, *ids]
    assert learned(TWO_TURNS, beginning) == learned(TWO_TURNS, tokenizer)


def test_without_template_or_chatml_the_way_out_is_told(folders):
    tokenizer = dataclasses.replace(open_tokenizer(folders["mistral"]), chat_template=None)
    with pytest.raises(DataError, match=r"no chat template .* put a chat_template\.jinja beside"):
        encode_chat(TWO_TURNS, tokenizer)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        (None, "must be a list of messages, got None"),
        ([], r"must be a list of messages, got \[\]"),
        ("user: hi", "must be a list of messages, got 'user: hi'"),
        ({"role": "user"}, "must be a list of messages, got {"),
        (["hi"], "message 1 .* must be an object with role and content, got 'hi'"),
        ([{"content": "hi"}], "message 1 .* role of system, developer, user.*; got None"),
        ([user("hi"), {"role": "bot", "content": "x"}], "message 2 .*; got 'bot'"),
        ([{"role": ["user"], "content": "x"}], r"message 1 .*; got \['user'\]"),
        ([{"role": "user"}], "message 1 .* must have a text as its content, got None"),
        ([user([{"type": "text", "text": "x"}])], "must have a text as its content, got"),
        ([user(3)], "must have a text as its content, got 3"),
        ([user("hi")], "must have a message of the role assistant"),
        ([user("x" * 999), user(["y" * 999])], r"got \['y{58}$"),
    ],
)
def test_malformed_messages_are_named(folders, messages, complaint):
    with pytest.raises(DataError, match=complaint):
        encode_chat(messages, open_tokenizer(folders["llama3"]))


def test_messages_the_template_refuses(folders):
    messages = [user("a"), user("b"), assistant("c")]
    with pytest.raises(DataError, match="can't take the messages: Conversation roles must alter"):
        encode_chat(messages, open_tokenizer(folders["llama2"]))


def test_a_template_that_makes_no_text(folders):
    tokenizer = dataclasses.replace(open_tokenizer(folders["llama3"]), chat_template="\n {# #}")
    with pytest.raises(DataError, match="makes no text"):
        encode_chat(TWO_TURNS, tokenizer)


def test_a_template_that_is_damaged(folders):
    tokenizer = dataclasses.replace(open_tokenizer(folders["llama3"]), chat_template="{% if %}")
    with pytest.raises(TokenizerError, match="chat template is damaged"):
        encode_chat(TWO_TURNS, tokenizer)


def test_a_call_of_a_tool_needs_no_content(folders):
    call = {"role": "assistant", "tool_calls": [{"name": "add"}]}
    tokenizer = dataclasses.replace(
        open_tokenizer(folders["llama3"]),
        chat_template=(
            "{% for m in messages %}{{ m.role }}:{{ m.content or m.tool_calls[0].name }}"
            "{{ eos_token }}{% endfor %}"
        ),
    )
    assert learned([user("add"), call], tokenizer) == ["assistant:add<|eot_id|>"]
