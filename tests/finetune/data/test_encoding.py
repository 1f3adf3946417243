from __future__ import annotations

import copy
import dataclasses
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile

import pyarrow as pa
import pyarrow.csv as pa_csv
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet as pq

from disha.finetune.data.dataset import open_rows
from disha.finetune.data.encoding import Encoder, Tally, encode_rows
from disha.finetune.data.rows import Row, Rows
from disha.finetune.data.tensors import read_samples
from disha.finetune.errors import (
    BadRowError,
    DataError,
    OutputError,
    TokenizerError,
    TrainingError,
)
from disha.finetune.stopping import SIGNALS, listening
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
    examples, tally = encode_rows(Rows([rows]), pairs(smollm_tokenizer, 40))
    assert (tally.cut, tally.dropped, tally.bad) == (1, 0, 0)
    cut = examples[0]
    assert len(cut.tokens) == 40
    assert learned(cut) == [(*smollm_tokenizer.encode("Yes, it is."), smollm_tokenizer.end)]
    prompt = smollm_tokenizer.backend.decode(list(cut.prompt), skip_special_tokens=False)
    assert prompt.startswith("<|im_start|>user\none two three one")
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_row_whose_response_does_not_fit_is_counted(smollm_tokenizer):
    rows = [pair("a", "word " * 60), pair("a", "b")]
    examples, tally = encode_rows(Rows([rows]), pairs(smollm_tokenizer, 40))
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
    examples, tally = encode_rows(Rows([[row, text_row("short")]]), texts(smollm_tokenizer, 10))
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
        encode_rows(Rows([[chat_row(*MESSAGES)]]), encoder)


def test_a_chat_too_long_is_left_out(tiny_tokenizer):
    length = len(encode_chat(MESSAGES, tiny_tokenizer)[0])
    rows = [chat_row(*MESSAGES), chat_row(*MESSAGES, *MESSAGES)]
    examples, tally = encode_rows(Rows([rows]), chats(tiny_tokenizer, length))
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
        encode_rows(Rows([[pair("a", "b"), row]]), encoder)


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


def test_values_of_any_depth_are_bad_rows(tiny_tokenizer):
    """A file is read with fewer functions under way than a row is encoded with."""
    deep = []
    for _ in range(5000):
        deep = [deep]
    messages = [{"role": "user", "content": deep}, {"role": "assistant", "content": "b"}]
    for value in (deep, messages, [{"role": deep, "content": "a"}], [{"role": "user"}, deep]):
        row = Row({"query": value, "response": "b"}, "here")
        for names in (("query", "response"), ("query",)):
            encoder = Encoder(tiny_tokenizer, names, 64, CHATML)
            assert encoder.outcome(row).complaint.startswith("here: ")
        with pytest.raises(BadRowError, match="must be a number or a list of numbers"):
            read_samples(Rows([[row]]), ("query", "response"))


def test_bad_rows_are_counted_when_they_may_be_skipped(tiny_tokenizer):
    good, bad, long = (
        pair("a", "b"),
        [pair("a", number) for number in range(9)],
        pair("a", "b" * 99),
    )
    encoder = pairs(tiny_tokenizer, 64, skip_bad_rows=True)
    examples, tally = encode_rows(Rows([[bad[0], good, long, *bad[1:], good]]), encoder)
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
        encode_rows(Rows([rows]), encoder)


def test_no_rows_are_no_examples(tiny_tokenizer):
    examples, tally = encode_rows(Rows([[]]), pairs(tiny_tokenizer, 64))
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


# --- many rows -----------------------------------------------------------------------------------

MANY = [
    {"query": f"hello {number}", "response": "world " * (number * 7 % 13 + 1)}
    for number in range(330)
]


def written(path, rows=MANY):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def many(tmp_path):
    return open_rows(written(tmp_path / "rows.jsonl"), "train")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("on_disk", [False, True])
def test_neither_workers_nor_a_temporary_file_change_anything(
    many, tiny_tokenizer, workers, on_disk
):
    encoder = pairs(tiny_tokenizer, 160)
    alone, tally = encode_rows(many, encoder)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    helped, counted = encode_rows(many, encoder, workers=workers, on_disk=on_disk)
    assert torch.equal(torch.rand(3), expected)  # the random state of training is left alone
    assert (list(helped), helped.digest(), counted) == (list(alone), alone.digest(), tally)
    assert list(helped.shuffled(5)) == list(alone.shuffled(5))
    assert tally == Tally(330)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_nor_where_rows_are_in_other_files(tmp_path, tiny_tokenizer, suffix):
    table = pa.Table.from_pylist(MANY)
    path = tmp_path / f"rows.{suffix}"
    (pq.write_table if suffix == "parquet" else pa_csv.write_csv)(table, path)
    written(tmp_path / "rows.jsonl")
    one, other = (
        encode_rows(open_rows(path, "train[10%:]"), pairs(tiny_tokenizer, 160), workers=2)[0]
        for path in (path, tmp_path / "rows.jsonl")
    )
    assert list(one) == list(other)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_row_is_raised_in_one_clear_line_or_counted(tmp_path, tiny_tokenizer, workers):
    path = written(tmp_path / "rows.jsonl", [*MANY[:50], {"query": 3}, *MANY[50:60]])
    complaint = f"{path}, line 51: field 'query' must be text, found int 3"
    rows = open_rows(path, "train")
    with pytest.raises(BadRowError) as caught:
        encode_rows(rows, pairs(tiny_tokenizer, 160), workers=workers)
    assert str(caught.value) == complaint
    skipping = pairs(tiny_tokenizer, 160, skip_bad_rows=True)
    _, tally = encode_rows(rows, skipping, workers=workers)
    assert tally == Tally(60, bad=1, complaints=[complaint])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_changes_meanwhile_stops_it(many, tmp_path, tiny_tokenizer, workers):
    os.utime(tmp_path / "rows.jsonl", ns=(1, 1))
    with pytest.raises(DataError, match=r"rows\.jsonl was changed while it was being read"):
        encode_rows(many, pairs(tiny_tokenizer, 160), workers=workers)


@pytest.mark.parametrize("operation", ["write", "flush"])
def test_a_temporary_file_that_can_not_be_written_says_so(
    many, tiny_tokenizer, monkeypatch, operation
):
    """A buffered file is full only when its buffer is."""

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    full = type("Full", (io.BytesIO,), {operation: refuse})
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(OutputError, match="No space left on device; set TMPDIR to a folder"):
        encode_rows(many, pairs(tiny_tokenizer, 160), on_disk=True)


READ_A_LARGE_FILE = """
import sys
from pathlib import Path
import pyarrow.parquet
from disha.finetune.data.dataset import open_rows
from disha.finetune.data.encoding import Encoder, encode_rows
from disha.finetune.text.templates import PLAIN
from disha.finetune.data.batches import TextBatches

class Bytes:
    begin, end, special = (), 0, frozenset()
    def encode(self, text, special=True, continues=False):
        return list(text.encode())
    def encode_with_places(self, text):
        return self.encode(text), [(i, i + 1) for i in range(len(text))]
    def known(self, ids):
        return ids

def peak():
    line, = (l for l in open("/proc/self/status") if l.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

before = peak()
encoder = Encoder(Bytes(), ("query", "response"), 9999, PLAIN)
for path in sys.argv[1:]:
    examples, _ = encode_rows(open_rows(Path(path), "train[:90%]"), encoder, on_disk=True)
    count = sum(len(batch) for batch in TextBatches(examples, 2, seed=0).batches(1))
    print(count, peak() - before)
"""


def test_large_files_take_little_memory(tmp_path):
    paths = [tmp_path / f"rows.{suffix}" for suffix in ("jsonl", "csv", "parquet")]
    for path in paths:
        write_large_file(path, path.suffix.removeprefix("."), 5_000)
        assert path.stat().st_size > 24e6  # so that the tokens have 96 MB
    finished = subprocess.run(
        [sys.executable, "-c", READ_A_LARGE_FILE, *map(str, paths)],
        capture_output=True,
        text=True,
        check=True,
    )
    for line in finished.stdout.splitlines():
        examples, growth = map(int, line.split())
        assert examples == 4_500
        assert growth < 40e6


def write_large_file(path, suffix, count):
    text = "some words, " * 400
    if suffix == "parquet":
        rows = [{"query": text, "response": "b"}] * count
        options = {"compression": "none", "use_dictionary": False, "row_group_size": 200}
        pq.write_table(pa.Table.from_pylist(rows), path, **options)
        return
    row = {"jsonl": f'{{"query": "{text}", "response": "b"}}\n', "csv": f'"{text}",b\n'}[suffix]
    with path.open("w") as file:
        file.write("query,response\n" if suffix == "csv" else "")
        file.writelines(row for _ in range(count))


class EndsItself:
    """Encodes nothing: the process that tries is killed, as one that takes too much memory is."""

    def outcome(self, row):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_was_killed_is_told_of_in_one_line(many):
    with pytest.raises(
        TrainingError, match=r"a worker process that prepares rows has ended .*lower --data"
    ):
        encode_rows(many, EndsItself(), workers=1)


class Revealing(EndsItself):
    """Complains of how the process that encodes takes signals."""

    def outcome(self, row):
        os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C does for all processes
        found = tuple(map(signal.getsignal, SIGNALS))
        raise BadRowError(str(found))


def test_processes_that_prepare_rows_leave_ctrl_c_to_training_and_can_be_told_to_end(many):
    wanted = (signal.SIG_DFL if n == signal.SIGTERM else signal.SIG_IGN for n in SIGNALS)
    usual = str(tuple(wanted))
    with listening(), pytest.raises(BadRowError, match=re.escape(usual)):
        encode_rows(many, Revealing(), workers=1)
