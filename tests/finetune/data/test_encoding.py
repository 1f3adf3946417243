from __future__ import annotations

import copy
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disha.finetune.data.encoding import Encoder, Tally, encode_rows
from disha.finetune.data.rows import Row
from disha.finetune.errors import BadRowError, DataError, TokenizerError
from disha.finetune.text.chat import encode_chat
from disha.finetune.text.templates import CHATML, Template
from disha.finetune.text.tokenizer import Tokenizer

FIELDS = ("query", "response")


def pair(query, response):
    return Row({"query": query, "response": response}, "here")


def pairs(tokenizer, max_length, **changes):
    return Encoder(tokenizer, FIELDS, max_length, CHATML, **changes)


def texts(tokenizer, max_length):
    return Encoder(tokenizer, ("text",), max_length)


def text_row(text):
    return Row({"text": text}, "here")


def encode_prompt(query, tokenizer):
    return [token for part in CHATML.parts(query, tokenizer) for token in part]


def learned(example):
    return [example.tokens[first:end] for first, end in example.learned]


def test_prompt_and_response_are_laid_out_in_the_template(smollm_tokenizer):
    example = pairs(smollm_tokenizer, 64).encode(pair("2 + 2", "Four."))
    prompt = smollm_tokenizer.backend.decode(list(example.prompt), skip_special_tokens=False)
    assert prompt == "<|im_start|>user\n2 + 2<|im_end|>\n<|im_start|>assistant\n"
    assert learned(example) == [(*smollm_tokenizer.encode("Four."), smollm_tokenizer.end)]
    assert example.learned[0][1] == len(example.tokens)
    assert list(example.prompt) == encode_prompt("2 + 2", smollm_tokenizer)


def test_any_template_with_a_text_before_and_after(smollm_tokenizer):
    encoder = Encoder(smollm_tokenizer, FIELDS, 64, Template("Q: ", "\nA: "))
    prompt = smollm_tokenizer.decode(encoder.encode(pair("why", "so")).prompt)
    assert prompt == "Q: why\nA: "


def test_special_tokens_in_a_row_are_text(smollm_tokenizer):
    example = pairs(smollm_tokenizer, 128).encode(pair("a <|im_end|> b", "c <|im_end|> d"))
    in_template = 1
    assert example.prompt.count(smollm_tokenizer.end) == in_template
    assert learned(example)[0].count(smollm_tokenizer.end) == 1


def test_begin_token_comes_first(smollm_tokenizer):
    with_begin = Tokenizer(smollm_tokenizer.backend, smollm_tokenizer.end, begin=(7,))
    example = pairs(with_begin, 64).encode(pair("a", "b"))
    without = pairs(smollm_tokenizer, 64).encode(pair("a", "b"))
    assert example.tokens == (7, *without.tokens)
    assert learned(example) == learned(without)


def test_a_long_query_loses_its_end_and_the_response_stays(smollm_tokenizer):
    rows = [pair("one two three " * 30, "Yes, it is."), pair("a", "b")]
    examples, tally = encode_rows(rows, pairs(smollm_tokenizer, 40))
    assert (tally.cut, tally.dropped, tally.bad) == (1, 0, 0)
    cut = examples[0]
    assert len(cut.tokens) == 40
    assert learned(cut) == [(*smollm_tokenizer.encode("Yes, it is."), smollm_tokenizer.end)]
    prompt = smollm_tokenizer.backend.decode(list(cut.prompt), skip_special_tokens=False)
    assert prompt.startswith("<|im_start|>user\none two three one")
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_row_whose_response_does_not_fit_is_counted(smollm_tokenizer):
    rows = [pair("a", "word " * 60), pair("a", "b")]
    examples, tally = encode_rows(rows, pairs(smollm_tokenizer, 40))
    assert (len(examples), tally.cut, tally.dropped) == (1, 0, 1)


def test_a_query_that_would_be_lost_as_a_whole_is_left_out_and_an_empty_one_is_kept(
    tiny_tokenizer,
):
    length = len(pairs(tiny_tokenizer, 64).encode(pair("", "b")).tokens)
    assert pairs(tiny_tokenizer, length).encode(pair("", "b")) is not None
    assert pairs(tiny_tokenizer, length).encode(pair("a", "b")) is None
    assert pairs(tiny_tokenizer, length + 1).outcome(pair("aa", "b")).is_cut


def test_the_longest_row_that_fits_is_kept_whole(smollm_tokenizer):
    row = pair("what is this", "a thing")
    whole = pairs(smollm_tokenizer, 512).encode(row)
    at_limit = pairs(smollm_tokenizer, len(whole.tokens)).outcome(row)
    assert (at_limit.example, at_limit.is_cut) == (whole, False)
    assert pairs(smollm_tokenizer, len(whole.tokens) - 1).outcome(row).is_cut


@given(st.text(max_size=40), st.text(max_size=40).filter(str.strip), st.integers(2, 60))
def test_no_example_is_too_long_and_every_response_whole(
    tiny_tokenizer, query, response, max_length
):
    example = pairs(tiny_tokenizer, max_length).encode(pair(query, response))
    answer = (*tiny_tokenizer.encode(response, special=False), tiny_tokenizer.end)
    prompt = encode_prompt(query, tiny_tokenizer)
    if example is None:
        assert len(encode_prompt(query[:1], tiny_tokenizer)) + len(answer) > max_length
    else:
        assert learned(example) == [answer]
        assert len(example.tokens) == min(max_length, len(prompt) + len(answer))


def test_a_text_is_learned_as_a_whole_but_for_its_first_token(smollm_tokenizer):
    example = texts(smollm_tokenizer, 64).encode(text_row("It <|im_end|> is."))
    assert example.tokens[-1] == smollm_tokenizer.end
    assert example.tokens.count(smollm_tokenizer.end) == 1
    assert smollm_tokenizer.decode(example.tokens[:-1]) == "It <|im_end|> is."
    assert learned(example) == [example.tokens[1:]]
    with_begin = Tokenizer(smollm_tokenizer.backend, smollm_tokenizer.end, begin=(7,))
    assert texts(with_begin, 64).encode(text_row("It <|im_end|> is.")).tokens == (
        7,
        *example.tokens,
    )


def test_a_long_text_loses_its_end(smollm_tokenizer):
    row = text_row("one two three " * 30)
    whole = texts(smollm_tokenizer, 512).encode(row)
    examples, tally = encode_rows([row, text_row("short")], texts(smollm_tokenizer, 10))
    assert examples[0].tokens == whole.tokens[:10]
    assert examples[0].learned == ((1, 10),)
    assert (tally.cut, tally.dropped) == (1, 0)


MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def chats(tokenizer, max_length, **changes):
    return Encoder(tokenizer, ("messages",), max_length, **changes)


def chat_row(*messages):
    return Row({"messages": list(messages)}, "here")


def test_chat_messages_go_through_the_chat_template(tiny_tokenizer):
    example = chats(tiny_tokenizer, 64).encode(chat_row(*MESSAGES, *MESSAGES))
    ids, spans = encode_chat([*MESSAGES, *MESSAGES], tiny_tokenizer)
    assert (example.tokens, example.learned) == (tuple(ids), tuple(spans))


def test_a_hostile_chat_template_ends_the_run_and_is_named(tiny_tokenizer):
    hostile = dataclasses.replace(tiny_tokenizer, chat_template="{{ 'x' * 9999999999 }}")
    encoder = chats(hostile, 64, skip_bad_rows=True)
    complaint = (
        r"here: the chat template of .*tiny\.gguf needs more than 256 MiB .*; use --template"
    )
    with pytest.raises(TokenizerError, match=complaint):
        encode_rows([chat_row(*MESSAGES)], encoder)


def test_a_chat_too_long_is_left_out(tiny_tokenizer):
    length = len(encode_chat(MESSAGES, tiny_tokenizer)[0])
    rows = [chat_row(*MESSAGES), chat_row(*MESSAGES, *MESSAGES)]
    examples, tally = encode_rows(rows, chats(tiny_tokenizer, length))
    assert (len(examples), tally.cut, tally.dropped) == (1, 0, 1)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (pair("a", " \n"), "here: field 'response' is empty, so there is nothing to learn"),
        (pair(3, "b"), "here: field 'query' must be text, found int 3"),
        (pair("a\ud83d", "b"), "here: field 'query' holds half of a surrogate pair"),
        (Row({"query": "a"}, "here"), "here has no field 'response'; its fields are: 'query'"),
        (Row({}, "here", "here is not JSON"), "here is not JSON"),
    ],
)
def test_a_bad_pair_is_named(tiny_tokenizer, row, complaint):
    encoder = pairs(tiny_tokenizer, 64)
    with pytest.raises(BadRowError, match=complaint):
        encoder.encode(row)
    with pytest.raises(BadRowError, match=complaint):
        encode_rows([pair("a", "b"), row], encoder)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("  ", "here: field 'messages' is empty"),
        ([], "here: a conversation must be a list of messages"),
        (3, "field 'messages' must be text or a list of chat messages, found int 3"),
        ([*MESSAGES, {"role": "user", "content": "\ud83d"}], "message 3 holds half of a surrogate"),
        (MESSAGES[:1], "here: a conversation must have a message of the role assistant"),
        (
            [{"role": "robot", "content": ""}],
            "here: message 1 of the conversation must have a role of",
        ),
    ],
)
def test_a_bad_chat_is_named(tiny_tokenizer, value, complaint):
    with pytest.raises(BadRowError, match=complaint):
        chats(tiny_tokenizer, 64).encode(Row({"messages": value}, "here"))


def test_bad_rows_are_counted_when_they_may_be_skipped(tiny_tokenizer):
    good, bad, long = (
        pair("a", "b"),
        [pair("a", number) for number in range(9)],
        pair("a", "b" * 99),
    )
    encoder = pairs(tiny_tokenizer, 64, skip_bad_rows=True)
    examples, tally = encode_rows([bad[0], good, long, *bad[1:], good], encoder)
    assert len(examples) == tally.used == 2
    assert (tally.bad, tally.dropped, tally.rows) == (9, 1, 12)
    assert tally.complaints == [
        f"here: field 'response' must be text, found int {number}" for number in range(5)
    ]
    assert encoder.encode(bad[0]) is None


def test_rows_of_which_none_can_be_used_are_refused_with_the_reasons(tiny_tokenizer):
    rows = [pair("a", "b" * 99), pair("a", 3), pair("a", "c" * 99)]
    encoder = pairs(tiny_tokenizer, 50, skip_bad_rows=True)
    with pytest.raises(
        DataError,
        match=r"none of the 3 rows can be used: 2 don't fit into --max_seq_length 50 .* \(raise it"
        r"\); something is wrong with 1, such as: here: field 'response' must be text",
    ):
        encode_rows(rows, encoder)


def test_no_rows_are_no_examples(tiny_tokenizer):
    examples, tally = encode_rows((), pairs(tiny_tokenizer, 64))
    assert (len(examples), tally.rows) == (0, 0)


def test_an_encoder_can_be_copied_to_other_processes(tiny_tokenizer):
    encoder = pairs(tiny_tokenizer, 64)
    row = pair("hello world", "hell")
    assert copy.deepcopy(encoder).encode(row) == encoder.encode(row)


def test_a_text_of_no_tokens_is_a_bad_row():
    class Silent:
        end, begin = 1, ()

        def encode(self, text, *, special):
            return []

    encoder = Encoder(Silent(), ("query",), 160, skip_bad_rows=True)
    outcome = encoder.outcome(Row({"query": "\u0378"}, "rows.txt, line 3"))
    assert outcome.complaint == (
        "rows.txt, line 3: field 'query' has no tokens, so there is nothing to learn"
    )


def test_what_is_said_of_rows_that_were_not_used_as_they_are():
    assert Tally(used=3).remarks == ""
    tally = Tally(used=3, cut=1, dropped=1200, bad=2, complaints=["rows, line 2 is not JSON"])
    assert tally.remarks == (
        "; 1 of them cut to fit; 1,200 left out as too long; 2 left out as unusable, such as: "
        "rows, line 2 is not JSON"
    )
