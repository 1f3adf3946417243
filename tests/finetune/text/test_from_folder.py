from __future__ import annotations

import json

import pytest
from hypothesis import given
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from disha.finetune.errors import TokenizerError
from disha.finetune.text.from_folder import open_tokenizer
from disha.finetune.text.templates import template_from
from tests.finetune.text import tiny_tokenizers
from tests.finetune.text.texts import texts


@pytest.fixture(scope="module", params=tiny_tokenizers.FAMILIES)
def family(request, tmp_path_factory):
    """A folder, as we read it, and as transformers does."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_tokenizers.FAMILIES[request.param]().write(folder)
    return open_tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))


@given(text=texts())
def test_ids_equal_those_of_transformers(family, text):
    ours, theirs = family
    assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


@given(text=texts())
def test_text_equals_that_of_transformers(family, text):
    ours, theirs = family
    ids = ours.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_begin_and_end_equal_those_of_transformers(family):
    ours, theirs = family
    put_before = list(ours.begin)
    assert theirs("the answer")["input_ids"] == put_before + ours.encode("the answer")
    assert ours.end == theirs.eos_token_id
    assert ours.chat_template == theirs.chat_template


def test_names_of_special_tokens_equal_those_of_transformers(family):
    ours, theirs = family
    assert ours.named.items() <= theirs.special_tokens_map.items()
    assert ours.named["eos_token"] == theirs.eos_token


@pytest.mark.parametrize(
    ("family", "begin", "end", "ends"),
    [
        ("smollm2", (), 2, {2}),
        ("qwen3", (), 2, {0, 2}),
        ("llama3", (0,), 4, {1, 4}),
        ("llama2", (1,), 2, {2}),
        ("mistral", (1,), 2, {2}),
    ],
)
def test_begin_and_ends_of_each_family(tmp_path, family, begin, end, ends):
    tokenizer = open_tokenizer(tiny_tokenizers.FAMILIES[family]().write(tmp_path))
    assert (tokenizer.begin, tokenizer.end, tokenizer.ends) == (begin, end, ends)


def test_the_file_itself_can_be_named(tmp_path):
    tiny_tokenizers.llama3().write(tmp_path)
    assert open_tokenizer(tmp_path / "tokenizer.json").begin == (0,)
    assert open_tokenizer(tmp_path / "tokenizer.json").chat_template is not None


def test_llama_classes_put_a_space_first_as_their_configuration_says(tmp_path):
    newer = open_tokenizer(tiny_tokenizers.llama2().write(tmp_path / "newer"))
    older = open_tokenizer(tiny_tokenizers.llama2().write(tmp_path / "older", legacy=None))
    assert older.encode("</s>the") == [2, *older.encode("the")]
    assert newer.encode("</s>the") == [2, *newer.encode("the", continues=True)]
    assert newer.encode("the") == older.encode("the")


def test_special_tokens_can_be_in_a_file_of_their_own(tmp_path):
    tiny_tokenizers.mistral().write(tmp_path, bos_token=None, eos_token=None)
    (tmp_path / "config.json").unlink()
    with pytest.raises(TokenizerError, match="which token ends a text"):
        open_tokenizer(tmp_path)
    special = {"eos_token": {"content": "</s>", "lstrip": False}, "bos_token": "<s>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.end == 2
    assert tokenizer.named["bos_token"] == "<s>"


@pytest.mark.parametrize("told", [5, [5, 3]])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_the_end_can_be_told_by_the_model_s_files(tmp_path, name, told):
    tiny_tokenizers.mistral().write(tmp_path, eos_token=None)
    (tmp_path / "config.json").unlink()
    (tmp_path / name).write_text(json.dumps({"eos_token_id": told}))
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.end == 5
    assert tokenizer.ends == ({5} if told == 5 else {3, 5})


def test_a_chat_template_of_its_own_file_goes_first(tmp_path):
    tiny_tokenizers.qwen2().write(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("from the file\n", encoding="utf-8")
    assert open_tokenizer(tmp_path).chat_template == "from the file\n"


def test_of_several_chat_templates_the_default_is_taken(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    tiny_tokenizers.qwen2().write(tmp_path, chat_template=named)
    assert open_tokenizer(tmp_path).chat_template == "plain"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ([{"name": "tool_use", "template": "tools"}], "named default, only tool_use"),
        ([{"name": "default"}], "damaged chat_template"),
        (3, "damaged chat_template"),
    ],
)
def test_chat_templates_that_can_t_be_used_are_named(tmp_path, template, complaint):
    tiny_tokenizers.qwen2().write(tmp_path, chat_template=template)
    with pytest.raises(TokenizerError, match=complaint):
        open_tokenizer(tmp_path)


def test_a_chat_template_that_is_no_text_is_named(tmp_path):
    tiny_tokenizers.qwen2().write(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja is not UTF-8 text"):
        open_tokenizer(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"no tokenizer at .*tokenizer\.json"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", '{"model": 3}', "[]"])
def test_a_damaged_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json can't be read as a tokenizer"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, r'{"eos_token": "\ud800"}'])
def test_a_damaged_file_beside_it_is_named(tmp_path, content):
    tiny_tokenizers.qwen2().write(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(
        TokenizerError, match=r"generation_config\.json (is not valid JSON|must be a JSON object)"
    ):
        open_tokenizer(tmp_path)


def test_several_tokens_may_come_before_every_text(tmp_path):
    """As GLM's [gMASK] and <sop>."""
    family = tiny_tokenizers.mistral()
    family.backend.post_processor = TemplateProcessing(
        single="<s> <unk> $A", special_tokens=[("<s>", 1), ("<unk>", 0)]
    )
    tokenizer = open_tokenizer(family.write(tmp_path))
    assert tokenizer.begin == (1, 0)
    prompt = template_from("Q: {query}", tokenizer).prompt("the answer", tokenizer)
    assert prompt == family.backend.encode("Q: the answer").ids
