from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from disha.finetune.errors import TokenizerError
from disha.finetune.text.adopted import adopt
from disha.finetune.text.tokenizer import Tokenizer
from tests.finetune.text import tiny_tokenizers


def test_ours_is_taken_as_it_is():
    tokenizer = Tokenizer(tiny_tokenizers.qwen2().backend, end=2)
    assert adopt(tokenizer) is tokenizer


@pytest.mark.parametrize("family", tiny_tokenizers.FAMILIES)
def test_a_fast_tokenizer_of_transformers(tmp_path, family):
    theirs = AutoTokenizer.from_pretrained(str(tiny_tokenizers.FAMILIES[family]().write(tmp_path)))
    ours = adopt(theirs)
    put_before = list(ours.begin)
    assert theirs("the answer")["input_ids"] == put_before + ours.encode("the answer")
    assert ours.end == theirs.eos_token_id
    assert ours.chat_template == theirs.chat_template
    assert ours.named == theirs.special_tokens_map


def test_a_fast_tokenizer_without_an_end_is_refused():
    theirs = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizers.qwen2().backend)
    theirs.eos_token = None
    with pytest.raises(TokenizerError, match="set its eos_token"):
        adopt(theirs)


def test_a_bare_tokenizer_with_one_usual_end():
    ours = adopt(tiny_tokenizers.mistral().backend)
    assert (ours.begin, ours.end, ours.chat_template) == ((1,), 2, None)


def test_a_bare_tokenizer_that_ends_texts_itself():
    backend = tiny_tokenizers.qwen2().backend
    backend.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    ours = adopt(backend)
    assert (ours.begin, ours.end) == ((), 0)


def test_a_bare_tokenizer_with_several_usual_ends_is_refused():
    with pytest.raises(TokenizerError, match=r"and 2 of the usual ones.*wrap it as"):
        adopt(tiny_tokenizers.qwen2().backend)


@pytest.mark.parametrize("other", [None, "gpt2", str.split, 3])
def test_anything_else_is_refused_by_name(other):
    with pytest.raises(TokenizerError, match=f"class {type(other).__name__} can't be used; give"):
        adopt(other)
