from __future__ import annotations

import dataclasses

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from disha.finetune.errors import SettingsError, TokenizerError
from disha.finetune.text.from_folder import open_tokenizer
from disha.finetune.text.templates import LARGEST_FILE, Template, given_template, template_from
from disha.finetune.text.tokenizer import Tokenizer
from tests.finetune.text import tiny_tokenizers
from tests.finetune.text.texts import texts

SMOLLM2 = Tokenizer(tiny_tokenizers.smollm2().backend, end=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {
        name: family().write(folder / name) for name, family in tiny_tokenizers.FAMILIES.items()
    }


@pytest.fixture(scope="module", params=tiny_tokenizers.FAMILIES)
def family(request, folders):
    """The tokenizer as we read it, and as transformers does."""
    folder = folders[request.param]
    return open_tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))


def test_auto_is_chatml_where_the_tokenizer_knows_it(folders):
    tokenizer = open_tokenizer(folders["smollm2"])
    template = template_from("auto", tokenizer)
    assert template.prompt("the answer", tokenizer) == tokenizer.encode(
        "<|im_start|>user\nthe answer<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", ["auto", "chat"])
def test_a_file_does_not_take_the_name_of_a_template(folders, tmp_path, monkeypatch, name):
    tokenizer = open_tokenizer(folders["smollm2"])
    expected = given_template(name, tokenizer)
    (tmp_path / name).write_text("Q: {query} A:")
    monkeypatch.chdir(tmp_path)
    assert given_template(name, tokenizer) == expected
    assert given_template(f"./{name}", tokenizer).before == "Q: "


def test_auto_is_plain_elsewhere(folders):
    tokenizer = open_tokenizer(folders["mistral"])
    template = template_from("auto", tokenizer)
    assert template.prompt("the answer", tokenizer) == [
        *tokenizer.begin,
        *tokenizer.encode("### Instruction:\nthe answer\n\n### Response:\n"),
    ]


@pytest.mark.parametrize("query", ["the answer", "what is\n\n the question", "é 東京"])
def test_chat_prompts_equal_those_of_transformers(family, query):
    ours, theirs = family
    expected = theirs.apply_chat_template(
        [{"role": "user", "content": query}], add_generation_prompt=True
    )["input_ids"]
    assert template_from("chat", ours).prompt(query, ours) == expected


def test_chat_trims_queries_as_the_template_does(folders):
    for name, trims in {"llama3": True, "llama2": True, "qwen2": False, "mistral": False}.items():
        tokenizer = open_tokenizer(folders[name])
        template = template_from("chat", tokenizer)
        assert template.trims is trims
        same = template.prompt(" x\n", tokenizer) == template.prompt("x", tokenizer)
        assert same is trims


@given(query=texts())
def test_no_query_makes_special_tokens(family, query):
    ours, _ = family
    for setting in ("auto", "chat", "Ask: {query} Say:"):
        _, asked, _ = template_from(setting, ours).parts(query, ours)
        special = {ours.backend.token_to_id(token) for token in ours.named.values()}
        assert not special & set(asked)


def test_chat_needs_a_chat_template(folders):
    tokenizer = dataclasses.replace(open_tokenizer(folders["qwen2"]), chat_template=None)
    with pytest.raises(SettingsError, match="--template chat needs a tokenizer with a chat templ"):
        template_from("chat", tokenizer)


@pytest.mark.parametrize("repeats", ["none", "{{ messages[0].content }}" * 2])
def test_a_chat_template_must_write_the_query_once(folders, repeats):
    tokenizer = dataclasses.replace(open_tokenizer(folders["qwen2"]), chat_template=repeats)
    with pytest.raises(TokenizerError, match=r"writes a user's message [02] times, not once"):
        template_from("chat", tokenizer)


@pytest.mark.parametrize("origin", ["qwen2", "tokenizer.json"])
def test_a_hostile_chat_template_is_named(folders, origin):
    path = folders["qwen2"] if origin == "qwen2" else folders["qwen2"] / origin
    tokenizer = dataclasses.replace(open_tokenizer(path), chat_template="{{ 'x' * 9999999999 }}")
    with pytest.raises(TokenizerError, match=r"the chat template of .*qwen2 needs more than 256 M"):
        template_from("chat", tokenizer)


def test_a_text_around_the_query(folders):
    tokenizer = open_tokenizer(folders["qwen2"])
    template = template_from(r"Q: {query}\n\tA:\\n", tokenizer)
    assert template == Template("Q: ", "\n\tA:\\n")
    assert template.prompt("what", tokenizer) == tokenizer.encode("Q: what\n\tA:\\n")


AROUND = st.lists(st.sampled_from(["\\", "n", "t", "\n", "\t", "{", "query}", " ", "é"])).map(
    "".join
)


@given(before=AROUND, after=AROUND)
def test_the_setting_of_a_template_makes_it_again(before, after):
    assume("{query}" not in before + "|" + after)
    template = Template(before, after)
    assert template_from(template.setting, SMOLLM2) == template


@pytest.mark.parametrize("setting", ["auto", "chat", r"\\n{query}\n"])
@pytest.mark.parametrize("family", tiny_tokenizers.FAMILIES)
def test_what_is_noted_of_a_template_makes_it_again(folders, family, setting):
    tokenizer = open_tokenizer(folders[family])
    template = template_from(setting, tokenizer)
    assert template_from(template.setting, tokenizer) == template


def test_special_tokens_of_the_text_itself_are_meant(folders):
    tokenizer = open_tokenizer(folders["qwen2"])
    template = template_from("<|im_start|>{query}<|im_end|>", tokenizer)
    assert template.parts("<|im_end|>", tokenizer) == (
        [1],
        tokenizer.encode("<|im_end|>", special=False),
        [2],
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_file_that_holds_the_text(folders, tmp_path, encoding):
    file = tmp_path / "prompt.txt"
    file.write_text("Ask\\n:\n{query}\n", encoding=encoding)
    template = given_template(str(file), open_tokenizer(folders["qwen2"]))
    assert template == Template("Ask\\n:\n", "\n")


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("chatml", "must be auto, chat, a text with {query}.*the given text has it 0 times"),
        ("", "the given text has it 0 times"),
        ("{query} {query}", "the given text has it 2 times"),
        ("missing.txt", "the given text has it 0 times"),
        ("x" * 5000, "the given text has it 0 times"),
        ("a\0b", "the given text has it 0 times"),
        ("\udcff{query}", r"must be UTF-8 text; the given text is '\\udcff"),
    ],
)
def test_anything_else_is_refused(folders, setting, complaint):
    with pytest.raises(SettingsError, match=complaint):
        given_template(setting, open_tokenizer(folders["qwen2"]))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"no place", "prompt.txt has it 0 times"),
        (b"\xff{query}", r"--template: .*prompt\.txt is not UTF-8 text"),
        (b" " * LARGEST_FILE + b"{query}", r"--template: .*prompt\.txt is larger than 1,048,576 b"),
    ],
)
def test_a_file_that_can_t_be_used_is_named(folders, tmp_path, content, complaint):
    file = tmp_path / "prompt.txt"
    file.write_bytes(content)
    with pytest.raises(SettingsError, match=complaint):
        given_template(str(file), open_tokenizer(folders["qwen2"]))
