from __future__ import annotations

import pickle

import pytest
from hypothesis import given

from disha.finetune.text.tokenizer import Tokenizer
from tests.finetune.text import tiny_tokenizers
from tests.finetune.text.texts import texts

BYTE_LEVEL = Tokenizer(tiny_tokenizers.llama3().backend, end=4, begin=(0,))
SENTENCEPIECE = Tokenizer(tiny_tokenizers.mistral().backend, end=2, begin=(1,))
EITHER = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE])


@given(text=texts())
def test_byte_level_text_comes_back(text):
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text, special=False)) == text


@EITHER
@given(text=texts())
def test_text_from_strangers_makes_no_special_tokens(tokenizer, text):
    assert not {0, 1, 2} & set(tokenizer.encode(text, special=False))


@EITHER
def test_nothing_is_added(tokenizer):
    assert tokenizer.begin not in tokenizer.encode("the answer")
    assert tokenizer.end not in tokenizer.encode("the answer")


@given(text=texts())
def test_what_continues_a_text_joins_it(text):
    """A line break merges with nothing after it, so pieces around one are the whole's pieces."""
    joined = SENTENCEPIECE.encode("the answer:\n", special=False)
    joined += SENTENCEPIECE.encode(text, special=False, continues=True)
    assert joined == SENTENCEPIECE.encode(f"the answer:\n{text}", special=False)


@given(text=texts())
def test_byte_level_text_is_the_same_wherever_it_stands(text):
    assert BYTE_LEVEL.encode(text, continues=True) == BYTE_LEVEL.encode(text)


@EITHER
def test_places_are_those_of_the_characters(tokenizer):
    text = "the 東京 answer"
    ids, places = tokenizer.encode_with_places(text)
    assert ids == tokenizer.encode(text)
    assert places[0][0] == 0
    assert places[-1][1] == len(text)
    assert all(first <= end for first, end in places)
    assert text[places[-1][0] : places[-1][1]].strip() == "answer"


def test_tokens_that_settle_what_came_before():
    known = SENTENCEPIECE.backend.token_to_id("▁the")
    assert SENTENCEPIECE.settles(known)
    assert not SENTENCEPIECE.settles(SENTENCEPIECE.backend.token_to_id("<0x41>"))
    assert not SENTENCEPIECE.settles(2)
    assert not SENTENCEPIECE.settles(999_999)
    assert not BYTE_LEVEL.settles(4)
    assert BYTE_LEVEL.settles(30)


def test_the_end_token_is_one_of_those_that_end_a_text():
    assert Tokenizer(BYTE_LEVEL.backend, end=4).ends == {4}
    assert Tokenizer(BYTE_LEVEL.backend, end=4, ends=frozenset({1})).ends == {1, 4}


def test_the_length_of_texts_is_not_limited():
    backend = tiny_tokenizers.smollm2().backend
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    text = "the answer is that there is not one"
    tokenizer = Tokenizer(backend, end=2)
    assert tokenizer.encode(text) == tiny_tokenizers.smollm2().backend.encode(text).ids


@EITHER
def test_it_goes_into_other_processes(tokenizer):
    copied = pickle.loads(pickle.dumps(tokenizer))
    assert copied.encode("the answer", continues=True) == tokenizer.encode(
        "the answer", continues=True
    )
    assert copied.ends == tokenizer.ends
