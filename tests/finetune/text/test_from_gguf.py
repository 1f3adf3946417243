from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import Digits, Sequence
from transformers import AutoTokenizer

from disha.finetune.errors import TokenizerError
from disha.finetune.models.gguf import GGUFCheckpoint
from disha.finetune.text.from_gguf import tokenizer_from_gguf
from tests.finetune import tiny_gguf
from tests.finetune.text import tiny_tokenizers
from tests.finetune.text.texts import texts

LINES = 1000
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


@pytest.fixture(scope="module")
def as_transformers_reads_it(smollm_path):
    """What transformers makes of the file.

    It knows the vocabulary and merges, but not ``tokenizer.ggml.pre``: it cuts text as GPT-2 does
    and leaves out the step that makes a piece of every digit.
    """
    return AutoTokenizer.from_pretrained(str(smollm_path.parent), gguf_file=smollm_path.name)


@pytest.fixture(scope="module")
def reference(as_transformers_reads_it):
    """The same, with the step that the file asks for by ``tokenizer.ggml.pre`` = smollm.

    Both the model's own tokenizer.json (Digits, then ByteLevel) and llama.cpp (split at every
    \\p{N}, then as GPT-2) define it so.
    """
    reference = copy.deepcopy(as_transformers_reads_it)
    backend = reference.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    return reference


def sample(lines):
    chosen = lines[: 2 * LINES]
    assert len(chosen) == 2 * LINES
    assert sum(not line.isascii() for line in chosen) >= 100
    assert sum(any(c.isdigit() for c in line) for line in chosen) >= 200
    return chosen


def test_ids_equal_the_reference_on_real_lines(smollm_tokenizer, reference, library_lines):
    lines = sample(library_lines)
    differing = [
        line for line in lines if smollm_tokenizer.encode(line) != reference(line)["input_ids"]
    ]
    assert differing == []


def test_ids_equal_transformers_alone_where_no_digit_follows_a_space(
    smollm_tokenizer, as_transformers_reads_it, library_lines
):
    lines = [line for line in library_lines if not any(c.isnumeric() for c in line)][:LINES]
    assert len(lines) == LINES
    differing = [
        line
        for line in lines
        if smollm_tokenizer.encode(line) != as_transformers_reads_it(line)["input_ids"]
    ]
    assert differing == []


def test_ids_equal_the_reference_on_whole_texts(smollm_tokenizer, reference, library_lines):
    text = "\n".join(sample(library_lines)[:300])
    assert smollm_tokenizer.encode(text) == reference(text)["input_ids"]


def test_every_digit_is_a_token(smollm_tokenizer):
    pieces = [smollm_tokenizer.decode([i]) for i in smollm_tokenizer.encode("x =   1234")]
    assert pieces == ["x", " =", "   ", "1", "2", "3", "4"]
    spaces = smollm_tokenizer.encode("x   ")[1:]
    assert smollm_tokenizer.encode("x   1") == [
        *smollm_tokenizer.encode("x"),
        *spaces,
        *smollm_tokenizer.encode("1"),
    ]


def test_text_comes_back(smollm_tokenizer, library_lines):
    for line in [line for line in library_lines if line.isascii()][:300]:
        assert smollm_tokenizer.decode(smollm_tokenizer.encode(line, special=False)) == line


def test_special_tokens_only_where_asked_for(smollm_tokenizer):
    assert smollm_tokenizer.encode("<|im_end|>") == [smollm_tokenizer.end]
    as_text = smollm_tokenizer.encode("<|im_end|>", special=False)
    assert len(as_text) > 1
    assert smollm_tokenizer.end not in as_text
    assert smollm_tokenizer.decode(as_text) == "<|im_end|>"
    assert smollm_tokenizer.encode("<|im_end|>") == [smollm_tokenizer.end]


def test_merges_are_used(tiny_tokenizer):
    assert tiny_tokenizer.encode("hello") == [tiny_gguf.TOKENS.index("hello")]
    assert [tiny_gguf.TOKENS[i] for i in tiny_tokenizer.encode("hell wo")] == ["hell", "Ġwo"]


def test_begin_token_only_if_the_file_says_so(tmp_path, tiny_tokenizer):
    assert tiny_tokenizer.begin == ()
    assert read(tmp_path, {"tokenizer.ggml.add_bos_token": True}).begin == (1,)


def test_user_defined_tokens_are_whole(tmp_path):
    types = [3, 3, 3, *[1] * (len(tiny_gguf.TOKENS) - 4), 4]
    tokens = [*tiny_gguf.TOKENS[:-1], "<tool>"]
    merges = list(tiny_gguf.MERGES[:-1])
    tokenizer = read(
        tmp_path,
        {
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": merges,
        },
    )
    assert tokenizer.encode("a<tool>b")[1] == len(tokens) - 1
    assert tokenizer.decode(tokenizer.encode("a<tool>b")) == "a<tool>b"


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ({"tokenizer.ggml.model": "bert"}, "kind 'bert'; supported are 'gpt2'.*'llama'"),
        ({"tokenizer.ggml.model": ["gpt2"]}, r"model = \['gpt2'\], which is not text"),
        ({"tokenizer.ggml.pre": ["qwen2"]}, r"pre = \['qwen2'\], which is not text"),
        ({"tokenizer.ggml.pre": "deepseek-llm"}, "named 'deepseek-llm'.*supported are gpt-2, llam"),
        ({"tokenizer.ggml.pre": "default"}, "named 'default'.*--tokenizer tokenizer.json"),
        ({"tokenizer.ggml.pre": None}, r"lacks the metadata key tokenizer\.ggml\.pre"),
        ({"tokenizer.ggml.merges": None}, r"lacks the metadata key tokenizer\.ggml\.merges"),
        ({"tokenizer.ggml.merges": ["he"]}, "damaged merge, 'he'"),
        ({"tokenizer.ggml.merges": ["zz yy"]}, "damaged list of merges"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "but 2 token types"),
        ({"tokenizer.ggml.eos_token_id": 99999}, "eos_token_id = 99999, which is not among"),
        ({"tokenizer.ggml.eos_token_id": None}, r"lacks the metadata key .*eos_token_id"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, metadata, complaint):
    with pytest.raises(TokenizerError, match=complaint):
        read(tmp_path, metadata)


BYTE_LEVEL = {
    "llama-bpe": tiny_tokenizers.llama3(),
    "qwen2": tiny_tokenizers.qwen3(),
    "smollm": tiny_tokenizers.smollm2(),
}
SENTENCEPIECE = tiny_tokenizers.llama2()


@pytest.mark.parametrize("pre", BYTE_LEVEL)
@given(text=texts())
def test_byte_level_ids_equal_those_of_the_model_s_own_tokenizer(pre, text):
    assert byte_level(pre).encode(text) == ids(BYTE_LEVEL[pre].backend, text)


@pytest.mark.parametrize("pre", BYTE_LEVEL)
def test_ways_of_cutting_differ(pre):
    others = [byte_level(other).encode("x 1234567\n\n  e\u0301") for other in BYTE_LEVEL]
    assert others.count(byte_level(pre).encode("x 1234567\n\n  e\u0301")) == 1


def test_llama3_takes_a_piece_that_is_a_token_whole():
    """Its vocabulary has tokens that no merge makes."""
    fields = byte_level_fields("llama-bpe")
    fields["tokenizer.ggml.tokens"] = [*fields["tokenizer.ggml.tokens"], "qzqz"]
    fields["tokenizer.ggml.token_type"] = [*fields["tokenizer.ggml.token_type"], NORMAL]
    whole = len(fields["tokenizer.ggml.tokens"]) - 1
    assert tokenizer_from_gguf(fields, Path("x")).encode("qzqz") == [whole]
    fields["tokenizer.ggml.pre"] = "qwen2"
    assert len(tokenizer_from_gguf(fields, Path("x")).encode("qzqz")) == 4


def test_llama3_begins_unless_the_file_says_otherwise():
    assert byte_level("llama-bpe").begin == (0,)
    fields = byte_level_fields("llama-bpe") | {"tokenizer.ggml.add_bos_token": False}
    assert tokenizer_from_gguf(fields, Path("x")).begin == ()
    assert byte_level("qwen2").begin == ()


def test_every_token_that_ends_a_text_is_known():
    fields = byte_level_fields("llama-bpe")
    assert tokenizer_from_gguf(fields, Path("x")).ends == {1, 4}
    assert tokenizer_from_gguf(fields, Path("x")).end == 4
    fields["tokenizer.ggml.eot_token_id"] = 2
    assert tokenizer_from_gguf(fields, Path("x")).ends == {1, 2, 4}


def test_what_chat_templates_see_is_read():
    fields = byte_level_fields("llama-bpe") | {"tokenizer.chat_template": "{{ bos_token }}"}
    tokenizer = tokenizer_from_gguf(fields, Path("x"))
    assert tokenizer.chat_template == "{{ bos_token }}"
    assert tokenizer.named == {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}


@given(text=texts())
def test_sentencepiece_ids_equal_the_tokenizer_json_s(text):
    """The tokenizer.json has the merges; the GGUF file only scores of the tokens."""
    assert sentencepiece().encode(text) == ids(SENTENCEPIECE.backend, text)


@given(text=texts())
def test_sentencepiece_ids_equal_its_definition(text):
    assert sentencepiece().encode(text, special=False) == by_scores(text)


@given(st.text(alphabet="aet -", max_size=40))
def test_sentencepiece_merges_the_leftmost_of_equals(text):
    assert sentencepiece().encode(text, special=False) == by_scores(text)


@given(text=texts())
def test_sentencepiece_text_comes_back(text):
    tokenizer = sentencepiece()
    decoded = tokenizer.decode(tokenizer.encode(text, special=False))
    assert decoded == text.replace("▁", " ")


def test_sentencepiece_begins_unless_the_file_says_otherwise():
    assert sentencepiece().begin == (1,)
    assert sentencepiece({"tokenizer.ggml.add_bos_token": False}).begin == ()


def test_sentencepiece_puts_a_space_first_unless_the_file_says_otherwise():
    assert sentencepiece().backend.encode("the", add_special_tokens=False).tokens == ["▁the"]
    bare = sentencepiece({"tokenizer.ggml.add_space_prefix": False})
    assert bare.encode("the") != sentencepiece().encode("the")
    assert bare.decode(bare.encode(" the")) == " the"


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ({"tokenizer.ggml.scores": None}, r"lacks the metadata key tokenizer\.ggml\.scores"),
        ({"tokenizer.ggml.scores": [0.5]}, "tokens but 1 scores"),
        ({"tokenizer.ggml.precompiled_charsmap": [1]}, "precompiled_charsmap.*not supported"),
        ({"tokenizer.ggml.remove_extra_whitespaces": True}, "remove_extra_white.*not supported"),
    ],
)
def test_sentencepiece_that_is_not_supported_is_named(metadata, complaint):
    with pytest.raises(TokenizerError, match=complaint):
        sentencepiece(metadata)


def test_sentencepiece_without_bytes_is_refused():
    fields = sentencepiece_fields()
    fields["tokenizer.ggml.tokens"][3] = "no byte"
    with pytest.raises(TokenizerError, match=r"without 1 of the 256 byte tokens, such as <0x00>"):
        tokenizer_from_gguf(fields, Path("x"))


def byte_level_fields(pre):
    """The metadata that a converter writes for a tokenizer.json."""
    backend = BYTE_LEVEL[pre].backend
    described = json.loads(backend.to_str())
    added = {token["content"]: token["special"] for token in described["added_tokens"]}
    tokens = [backend.id_to_token(index) for index in range(backend.get_vocab_size())]
    kinds = {True: CONTROL, False: USER_DEFINED}
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds.get(added.get(token), NORMAL) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in described["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": backend.token_to_id(BYTE_LEVEL[pre].config["eos_token"]),
    }
    begin = BYTE_LEVEL[pre].config["bos_token"]
    if begin is not None:
        fields["tokenizer.ggml.bos_token_id"] = backend.token_to_id(begin)
    return fields


def byte_level(pre):
    return tokenizer_from_gguf(byte_level_fields(pre), Path("x"))


def sentencepiece_fields():
    """As SentencePiece writes its own vocabularies: what was merged first has the best score."""
    backend = SENTENCEPIECE.backend
    tokens = [backend.id_to_token(index) for index in range(backend.get_vocab_size())]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            UNKNOWN,
            CONTROL,
            CONTROL,
            *[BYTE] * 256,
            *[NORMAL] * (len(tokens) - 259),
        ],
        "tokenizer.ggml.scores": [
            *[0.0] * 259,
            *(-float(index) for index in range(len(tokens) - 259)),
        ],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def sentencepiece(metadata=None):
    return tokenizer_from_gguf(sentencepiece_fields() | (metadata or {}), Path("x"))


def by_scores(text):
    """SentencePiece's definition, the slow way: join the best neighbours until none can be."""
    fields = sentencepiece_fields()
    tokens = fields["tokenizer.ggml.tokens"]
    known = {token: index for index, token in enumerate(tokens) if index >= 259}
    scores = fields["tokenizer.ggml.scores"]
    pieces = list(f"▁{text}".replace(" ", "▁")) if text else []
    while True:
        joined = [
            (scores[known[one + other]], -place)
            for place, (one, other) in enumerate(pairwise(pieces))
            if one + other in known
        ]
        if not joined:
            break
        place = -max(joined)[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    return [
        index
        for piece in pieces
        for index in ([known[piece]] if piece in known else [3 + byte for byte in piece.encode()])
    ]


def ids(backend, text):
    backend.encode_special_tokens = False
    return backend.encode(text, add_special_tokens=False).ids


def read(folder, metadata):
    path = tiny_gguf.write_gguf(
        folder / "tiny.gguf", tiny_gguf.random_state(tied=True), metadata=metadata
    )
    return tokenizer_from_gguf(GGUFCheckpoint(path).fields, path)
