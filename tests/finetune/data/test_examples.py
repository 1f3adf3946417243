from __future__ import annotations

import json

import pytest
import torch

from disha.finetune.data.examples import (
    CHAT,
    PLAIN,
    Example,
    Pair,
    batch_by_length,
    collate,
    encode_pairs,
    encode_prompt,
    read_pairs,
    shuffled_batches,
    split_held_out,
    template_for,
)
from disha.finetune.errors import DataError
from disha.finetune.models.decoder import IGNORED
from disha.finetune.text.tokenizer import Tokenizer

FIELDS = ("query", "response")


def lines_file(tmp_path, *lines):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def row(**fields):
    return json.dumps(fields)


def examples_of(*lengths):
    return [Example(tuple(range(100, 100 + length)), length // 2) for length in lengths]


def test_rows_are_read_in_order(tmp_path):
    path = lines_file(tmp_path, row(query="a", response="b"), "", row(response="dé", query=""))
    assert read_pairs(path, FIELDS) == [Pair("a", "b"), Pair("", "dé")]


def test_any_two_fields(tmp_path):
    path = lines_file(tmp_path, row(instruction="a", output="b", more=3))
    assert read_pairs(path, ("instruction", "output")) == [Pair("a", "b")]


GOOD = row(query="a", response="b")


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ((GOOD, "{oops"), r"rows\.jsonl, line 2 is not JSON"),
        ((GOOD, "[" * 100_000), r"rows\.jsonl, line 2 is not JSON"),
        ((GOOD, "", "[1, 2]"), r"rows\.jsonl, line 3 holds a JSON list"),
        (("3",), r"rows\.jsonl, line 1 holds a JSON int"),
        (
            (GOOD, row(query="a", answer="b")),
            r"line 2 has no field 'response'; its fields are: 'query', 'answer' \(--dataset_field",
        ),
        (("{}",), r"line 1 has no field 'query'; its fields are: none"),
        ((row(query=3, response="b"),), r"line 1: field 'query' must be text, found int 3"),
        ((GOOD, row(query="a", response=None)), r"line 2: field 'response' must be text, found No"),
        ((row(query="a", response=" \n"),), r"line 1: field 'response' is empty"),
        ((), r"rows\.jsonl holds no rows"),
        (("", "  "), r"rows\.jsonl holds no rows"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, lines, complaint):
    with pytest.raises(DataError, match=complaint):
        read_pairs(lines_file(tmp_path, *lines), FIELDS)


def test_half_a_surrogate_pair_is_named(tmp_path):
    path = lines_file(
        tmp_path, row(query="a", response="b"), '{"query": "\\ud83d", "response": "b"}'
    )
    with pytest.raises(DataError, match="line 2: field 'query' holds half of a surrogate pair"):
        read_pairs(path, FIELDS)


def test_a_byte_order_mark_and_other_line_ends_are_no_matter(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"query": "a", "response": "b"}\r\n\r\n')
    assert read_pairs(path, FIELDS) == [Pair("a", "b")]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"there is no data file .*absent\.jsonl"):
        read_pairs(tmp_path / "absent.jsonl", FIELDS)


def test_a_file_of_other_bytes_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"rows\.jsonl is not UTF-8 text"):
        read_pairs(path, FIELDS)


def test_holding_out_keeps_every_row_once_and_order():
    pairs = [Pair(str(i), "x") for i in range(40)]
    dataset = split_held_out(pairs, 0.25, seed=3)
    assert len(dataset.held_out) == 10
    assert set(dataset.training) | set(dataset.held_out) == set(pairs)
    assert set(dataset.training).isdisjoint(dataset.held_out)
    assert list(dataset.training) == sorted(dataset.training, key=pairs.index)
    assert dataset == split_held_out(pairs, 0.25, seed=3)
    assert dataset != split_held_out(pairs, 0.25, seed=4)


def test_holding_out_nothing_and_too_much():
    pairs = [Pair("a", "b")]
    assert split_held_out(pairs, 0.0, seed=0).held_out == ()
    with pytest.raises(DataError, match=r"holding out 0\.5 of 1 rows leaves none"):
        split_held_out(pairs, 0.5, seed=0)


def test_template_follows_the_vocabulary(smollm_tokenizer, monkeypatch):
    assert template_for(smollm_tokenizer) is CHAT
    monkeypatch.setattr(Tokenizer, "knows", lambda self, token: False)
    assert template_for(smollm_tokenizer) is PLAIN


def test_prompt_and_response_are_laid_out_in_the_template(smollm_tokenizer):
    (example,) = encode_pairs([Pair("2 + 2", "Four.")], smollm_tokenizer, 64).examples
    prompt = smollm_tokenizer.backend.decode(list(example.prompt), skip_special_tokens=False)
    assert prompt == "<|im_start|>user\n2 + 2<|im_end|>\n<|im_start|>assistant\n"
    response = example.tokens[example.prompt_length :]
    assert response == (*smollm_tokenizer.encode("Four."), smollm_tokenizer.end)
    assert list(example.prompt) == encode_prompt("2 + 2", smollm_tokenizer)


def test_special_tokens_in_a_row_are_text(smollm_tokenizer):
    pair = Pair("a <|im_end|> b", "c <|im_end|> d")
    (example,) = encode_pairs([pair], smollm_tokenizer, 128).examples
    in_template = 1
    assert example.prompt.count(smollm_tokenizer.end) == in_template
    assert example.tokens[example.prompt_length :].count(smollm_tokenizer.end) == 1


def test_begin_token_comes_first(smollm_tokenizer):
    with_begin = Tokenizer(smollm_tokenizer.backend, smollm_tokenizer.end, begin=7)
    (example,) = encode_pairs([Pair("a", "b")], with_begin, 64).examples
    (without,) = encode_pairs([Pair("a", "b")], smollm_tokenizer, 64).examples
    assert example.tokens == (7, *without.tokens)


def test_a_long_query_loses_its_end_and_the_response_stays(smollm_tokenizer):
    long, short = Pair("one two three " * 30, "Yes, it is."), Pair("a", "b")
    encoded = encode_pairs([long, short], smollm_tokenizer, 40)
    assert (encoded.cut, encoded.dropped) == (1, 0)
    cut = encoded.examples[0]
    assert len(cut.tokens) == 40
    assert cut.tokens[cut.prompt_length :] == (
        *smollm_tokenizer.encode("Yes, it is."),
        smollm_tokenizer.end,
    )
    prompt = smollm_tokenizer.backend.decode(list(cut.prompt), skip_special_tokens=False)
    assert prompt.startswith("<|im_start|>user\none two three one")
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_row_whose_response_does_not_fit_is_counted(smollm_tokenizer):
    pairs = [Pair("a", "word " * 60), Pair("a", "b")]
    encoded = encode_pairs(pairs, smollm_tokenizer, 40)
    assert (len(encoded.examples), encoded.cut, encoded.dropped) == (1, 0, 1)


def test_the_longest_row_that_fits_is_kept_whole(smollm_tokenizer):
    pair = Pair("what is this", "a thing")
    (whole,) = encode_pairs([pair], smollm_tokenizer, 512).examples
    at_limit = encode_pairs([pair], smollm_tokenizer, len(whole.tokens))
    assert (at_limit.examples, at_limit.cut) == ((whole,), 0)
    assert encode_pairs([pair], smollm_tokenizer, len(whole.tokens) - 1).cut == 1


def test_labels_are_the_response_moved_ahead_and_nothing_else():
    batch = collate([Example((5, 6, 7, 8, 9), 3), Example((4, 3, 2), 1)])
    assert batch.tokens.tolist() == [[5, 6, 7, 8], [4, 3, 0, 0]]
    off = IGNORED
    assert batch.labels.tolist() == [[off, off, 8, 9], [3, 2, off, off]]
    assert (batch.real_tokens, batch.supervised) == (6, 4)
    assert int((batch.labels != IGNORED).sum()) == batch.supervised


def test_batches_by_length_hold_every_example_once():
    examples = examples_of(4, 9, 6, 7, 3, 12, 5)
    batches = list(batch_by_length(examples, 3))
    assert [batch.tokens.shape[1] for batch in batches] == [11, 5, 2]
    assert sum(batch.supervised for batch in batches) == sum(e.supervised for e in examples)


def rows_of(batches):
    return [row for batch in batches for row in batch.tokens.tolist()]


def test_shuffling_is_decided_by_seed_and_epoch():
    examples = examples_of(*range(4, 104))

    def order(seed, epoch):
        return rows_of(shuffled_batches(examples, 4, seed=seed, epoch=epoch))

    assert order(1, 1) == order(1, 1)
    assert order(1, 1) != order(1, 2)
    assert order(1, 1) != order(2, 1)


def test_an_epoch_holds_every_example_once():
    examples = [Example((index + 1, 1, 1), 1) for index in range(103)]
    batches = list(shuffled_batches(examples, 4, seed=0, epoch=1))
    assert sorted(first for first, *_ in rows_of(batches)) == list(range(1, 104))
    assert max(len(batch.tokens) for batch in batches) == 4


def test_shuffling_pads_little():
    lengths = torch.randint(8, 160, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = list(shuffled_batches(examples_of(*lengths), 4, seed=0, epoch=1))
    real = sum(batch.real_tokens for batch in batches)
    assert real / sum(batch.tokens.numel() for batch in batches) > 0.9
