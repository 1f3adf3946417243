from __future__ import annotations

import copy

import pytest
from tokenizers.pre_tokenizers import Digits, Sequence
from transformers import AutoTokenizer

from disha.finetune.errors import TokenizerError
from disha.finetune.models.gguf import GGUFCheckpoint
from disha.finetune.text.tokenizer import Tokenizer
from tests.finetune import tiny_gguf

LINES = 1000


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
    assert tiny_tokenizer.begin is None
    assert read(tmp_path, {"tokenizer.ggml.add_bos_token": True}).begin == 1


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
        ({"tokenizer.ggml.model": "llama"}, "tokenizer of kind 'llama'; supported is 'gpt2'"),
        ({"tokenizer.ggml.pre": "deepseek-llm"}, "named 'deepseek-llm'.*supported are gpt-2, smol"),
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


def read(folder, metadata):
    path = tiny_gguf.write_gguf(
        folder / "tiny.gguf", tiny_gguf.random_state(tied=True), metadata=metadata
    )
    return Tokenizer.from_gguf(GGUFCheckpoint.open(path).fields, path)
