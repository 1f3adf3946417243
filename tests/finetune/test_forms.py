"""The forms of rows: each is understood, or named with its row. Nothing is trained here."""

import json
import warnings
from pathlib import Path

import datasets
import pytest
import trl
from trl import SFTConfig, SFTTrainer

from disha import ArgumentError
from disha.finetune.base import load_base
from disha.finetune.data import load_rows
from disha.finetune.forms import form_rows, learns_marked_answers
from tests.finetune.tiny_models import MARKED_WITHOUT_END, tokenizer, write_rows

PAIR = {"query": "say two", "response": "two"}
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
LONGER = [*TALK, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
PLAIN = {"prompt": "say two", "completion": "\ntwo"}
CHAT = {
    "prompt": [{"role": "user", "content": "say two"}],
    "completion": [{"role": "assistant", "content": "two"}],
}
SPLIT = {"prompt": TALK[:1], "completion": TALK[1:]}
SYSTEM = {"role": "system", "content": "be brief"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLING = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "b"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def template(name):
    """A tokenizer with a chat template that `trl` has a form to train with."""
    words = tokenizer()
    words.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return words


@pytest.fixture(scope="module")
def qwen():
    return template("qwen3")


def form(row, *fields, words=None, **options):
    words = tokenizer(chat=True) if words is None else words
    rows = datasets.Dataset.from_list([row], on_mixed_types="use_json")
    return form_rows(rows, fields, words, **options)[0]


@pytest.mark.parametrize(
    ("row", "fields", "chat", "expected"),
    [
        (PAIR, (), False, PLAIN),
        (PAIR, (), True, CHAT),
        ({"q": "say two", "a": "two"}, ("q", "a"), False, PLAIN),
        ({"q": 2, "a": 4}, ("q", "a"), False, {"prompt": "2", "completion": "\n4"}),
        ({"instruction": "say", "input": "two", "output": "two"}, (), False,
         {"prompt": "say\n\ntwo", "completion": "\ntwo"}),
        ({"instruction": "say two", "input": "", "output": "two"}, (), False, PLAIN),
        ({"prompt": "p", "completion": "c"}, (), True, {"prompt": "p", "completion": "c"}),
        ({"prompt": "say two", "completion": "two"}, ("prompt", "completion"), True, CHAT),
        ({"prompt": 1, "completion": 2}, (), True, {"prompt": "1", "completion": "2"}),
        ({"prompt": "p", "completion": ""}, (), True, {"prompt": "p", "completion": ""}),
        ({"query": "say two", "response": ""}, (), False, {**PLAIN, "completion": "\n"}),
        ({"messages": [SYSTEM, *TALK], "system": "be brief"}, (), True,
         {**SPLIT, "prompt": [SYSTEM, SYSTEM, *TALK[:1]]}),
        ({"text": "all of it"}, (), False, {"text": "all of it"}),
        ({"text": 5}, (), False, {"text": "5"}),
        ({"body": "all of it"}, ("body",), False, {"text": "all of it"}),
        ({"messages": TALK}, (), True, SPLIT),
        ({"conversations": SHAREGPT}, (), True, SPLIT),
        ({"prompt": TALK[:1], "completion": TALK[1:]}, (), True, SPLIT),
        ({"messages": json.dumps(TALK)}, (), True, SPLIT),
        ({**SPLIT, "system": "be brief"}, (), True, {**SPLIT, "prompt": [SYSTEM, *TALK[:1]]}),
        ({"turns": json.dumps(SHAREGPT)}, ("turns",), True, SPLIT),
        ({"text": '[{"a": 1}]'}, (), True, {"text": '[{"a": 1}]'}),
    ],
)  # fmt: skip
def test_forms(row, fields, chat, expected):
    assert form(row, *fields, words=tokenizer(chat=chat)) == expected


def test_parts_of_a_text_are_joined():
    parts = [{"type": "text", "text": "say "}, {"type": "text", "text": "two"}]
    said = [{"role": "user", "content": parts}, {"role": "assistant", "content": "two"}]
    assert form({"messages": said}) == CHAT
    assert form({"query": parts, "response": "two"}) == CHAT


def test_the_column_system_is_an_earlier_message():
    row = {**PAIR, "system": "be brief"}
    assert form(row)["prompt"] == [SYSTEM, {"role": "user", "content": "say two"}]
    assert form(row, words=tokenizer())["prompt"] == "be brief\nsay two"
    assert form({"messages": TALK, "system": "be brief"})["prompt"] == [SYSTEM, TALK[0]]


def test_calls_of_tools(qwen):
    row = {"messages": json.dumps(CALLING), "tools": json.dumps(TOOLS)}
    formed = form(row, words=qwen)
    assert formed["prompt"] + formed["completion"] == CALLING
    assert len(formed["prompt"]) == 1
    assert formed["tools"] == TOOLS


def test_arguments_as_json_become_an_object(qwen):
    call = {"name": "f", "arguments": '{"x": 1}'}
    messages = [CALLING[0], {"role": "assistant", "tool_calls": [call]}, *CALLING[2:]]
    assert form({"messages": messages}, words=qwen)["completion"] == CALLING[1:]


@pytest.mark.parametrize(
    ("weights", "prompt", "completion"),
    [((0, 1), 3, 1), ((1, 0), 1, 1), ((1, 1), 1, 3), ((None, 0), 1, 1)],
)
def test_answers_of_weight_0_are_not_learned(weights, prompt, completion, qwen):
    messages = [dict(message) for message in LONGER]
    messages[1]["weight"], messages[3]["weight"] = weights
    formed = form({"messages": messages}, words=qwen)
    assert formed == {
        "prompt": LONGER[:prompt],
        "completion": LONGER[prompt : prompt + completion],
    }


def test_only_the_last_answer_is_learned_where_trl_can_not_mark_answers():
    with pytest.warns(UserWarning, match="only the last answer is learned, because trl can't mark"):
        assert form({"messages": LONGER}) == {"prompt": LONGER[:3], "completion": LONGER[3:]}


def test_whole_conversations_can_be_learned(qwen):
    assert form({"messages": LONGER}, words=qwen, learn_all=True) == {"messages": LONGER}
    assert form(PAIR, words=qwen, learn_all=True) == CHAT
    assert form({"messages": LONGER}, learn_all=True) == {"messages": LONGER}  # and nothing is said
    form({"prompt": LONGER[:1], "completion": LONGER[1:]}, learn_all=True)
    weighed = [TALK[0], {**TALK[1], "weight": 0}, *LONGER[2:]]
    with pytest.raises(ArgumentError, match="only 1 where all is learned"):
        form({"messages": weighed}, words=qwen, learn_all=True)


def test_what_is_not_used_is_named_once():
    talk = [{**message, "mood": "calm"} for message in TALK]
    rows = datasets.Dataset.from_list([{"messages": talk, "id": 1, "source": "x"}] * 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        form_rows(rows, (), tokenizer(chat=True))
    assert [str(warning.message) for warning in caught] == [
        "the data: not used: the columns id, source",
        "the data: the chat template does not read this of messages: mood",
    ]


def test_a_key_is_read_if_it_is_shown_for_this_role(qwen):
    """That the template names a key for calls of tools, or in a comment, is not enough."""
    asked = {"role": "user", "content": "a", "name": "Ann"}
    said = {"role": "assistant", "content": "b", "reasoning_content": "c", "train": False}
    with pytest.warns(UserWarning, match="does not read this of messages: name, train$"):
        form({"messages": [asked, said]}, words=qwen)


def test_a_key_is_read_if_it_is_shown_for_one_role(qwen):
    messages = [{**message, "reasoning_content": "c"} for message in TALK]
    with warnings.catch_warnings(action="error"):
        form({"messages": messages}, words=qwen)


def test_an_empty_text_is_no_json(qwen):
    assert form({"messages": TALK, "tools": ""}, words=qwen)["tools"] is None


def answered(*contents):
    return [{"role": "user", "content": "a"}, *({"role": "assistant", **c} for c in contents)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "q", "response": None}, "no text as response"),
        ({"query": {"a": 1}, "response": "r"}, "no text as query"),
        ({"query": ["a", "b"], "response": "r"}, "no text as query"),
        ({"prompt": "p", "completion": None}, "no text as completion"),
        ({"text": None}, "no text as text"),
        ({"messages": TALK[:1]}, "no answer to learn"),
        ({"messages": TALK[1:]}, "begins with an answer"),
        ({"messages": answered({})}, "no text as content"),
        ({"messages": answered({"content": "b", "weight": 0.5})}, "weight of a message is 0 or 1"),
        ({"messages": answered({"content": [{"type": "image", "url": "u"}]})}, "only text can be"),
    ],
)
def test_rows_that_can_not_be_used(row, message):
    with pytest.raises(ArgumentError, match=f"row 1 of the data can't be used: .*{message}"):
        form(row)


def test_an_answer_of_weight_0_between_others_is_refused(qwen):
    weights = [{"content": "b"}, {"content": "c", "weight": 0}, {"content": "d"}]
    with pytest.raises(ArgumentError, match="weight 0 stands between others"):
        form({"messages": answered(*weights)}, words=qwen)


@pytest.mark.parametrize(
    ("name", "messages", "says"),
    [
        ("qwen3", [{"role": "narrator", "content": "n"}, *TALK], "content of the role narrator"),
        ("llama3", CALLING, "leaves out the tool_calls of the role assistant"),
        ("gemma", [SYSTEM, *TALK], "System role not supported"),
    ],
)
def test_what_a_template_does_not_show_is_refused(name, messages, says):
    with pytest.raises(ArgumentError, match=says):
        form({"messages": messages}, words=template(name))


def test_tools_that_a_template_does_not_show_are_refused():
    with pytest.raises(ArgumentError, match="leaves out the tools"):
        form({"messages": TALK, "tools": TOOLS})


def test_a_role_that_a_template_shows_is_used():
    """As by the template of the tiny models, which shows every role."""
    said = [{"role": "narrator", "content": "n"}, *TALK]
    assert form({"messages": said})["prompt"] == said[:2]


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        (PAIR, ("query", "answer"), "have the fields query, response; .* got query answer"),
        (PAIR, ("query", "response", "query"), "one or two of them"),
        ({"a": "x", "b": "y"}, (), "have the fields a, b; name the question and the answer"),
        ({"messages": TALK}, (), "the model has no chat template"),
    ],
)
def test_columns_of_no_known_form(row, fields, message):
    with pytest.raises(ArgumentError, match=message):
        form(row, *fields, words=tokenizer())


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([PAIR, {"query": "a"}], "no text as response"),
        ([{"messages": TALK}, {"messages": TALK[:1]}], "no answer to learn"),
    ],
)
def test_a_row_that_can_not_be_used_is_named_with_its_file(tmp_path, rows, says):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ArgumentError) as caught:
        form_rows(load_rows(str(path)), (), tokenizer(chat=True))
    assert str(caught.value).startswith(f"row 2 of {path} can't be used: ")
    assert says in str(caught.value)


def test_texts_and_numbers_in_one_field_are_texts(tmp_path):
    rows = [{"prompt": "p", "completion": completion} for completion in ("two", 5)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert form_rows(load_rows(str(path)), (), tokenizer())["completion"][:] == ["two", "5"]


def labels(base, words, rows, folder, **options):
    """The text that `trl` learns of the first row, and the text that it does not learn."""
    args = SFTConfig(folder, report_to=[], use_cpu=True, bf16=False, **options)
    trainer = SFTTrainer(base, args, train_dataset=rows, processing_class=words)
    row = trainer.train_dataset[0]
    pairs = list(zip(row["input_ids"], row["labels"], strict=True))
    learned = words.decode([token for token, label in pairs if label != -100])
    return learned, words.decode([token for token, label in pairs if label == -100])


@pytest.mark.parametrize("chat", [False, True])
def test_only_the_answer_is_learned(tiny, chatty, tmp_path, chat):
    base, words = load_base(str(chatty if chat else tiny))
    rows = form_rows(datasets.Dataset.from_list([PAIR]), (), words)
    learned, asked = labels(base, words, rows, tmp_path)
    assert learned.strip() == ("two<|im_end|>" if chat else "two</s>")
    assert asked.strip().endswith("assistant" if chat else "say two")


def test_the_answers_of_a_conversation_are_those_that_trl_learns_of_messages(tiny, qwen, tmp_path):
    base, _ = load_base(str(tiny))
    qwen.pad_token = qwen.eos_token
    given = datasets.Dataset.from_list([{"messages": LONGER}])
    rows = form_rows(given, (), qwen)
    assert learns_marked_answers(rows, qwen)
    expected = labels(base, qwen, given, tmp_path, assistant_only_loss=True)
    assert labels(base, qwen, rows, tmp_path, assistant_only_loss=True) == expected


def test_marked_answers_without_their_end_are_not_learned(qwen, monkeypatch):
    """Such a model would never stop. The last answer is learned instead, with its end."""
    monkeypatch.setattr(qwen, "chat_template", MARKED_WITHOUT_END)
    rows = form_rows(datasets.Dataset.from_list([{"messages": LONGER}]), (), qwen)
    assert not learns_marked_answers(rows, qwen)
