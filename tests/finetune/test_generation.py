from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

import disha
from disha.finetune.errors import CheckpointError, DataError
from disha.finetune.generation import (
    Memory,
    complete,
    context_of,
    generate,
    likely_tokens,
    stream_text,
)
from disha.finetune.models.folder import FolderCheckpoint
from disha.finetune.text.tokenizer import Tokenizer
from tests.finetune import tiny_checkpoints, tiny_gguf
from tests.finetune.text import tiny_tokenizers
from tests.finetune.text.texts import texts

PROMPT = [5, 60, 70, 8, 200, 131, 44, 9]
BYTE_LEVEL = Tokenizer(tiny_tokenizers.qwen3().backend, end=2)
SENTENCEPIECE = Tokenizer(tiny_tokenizers.mistral().backend, end=2, begin=(1,))
EITHER = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE])


class Other(nn.Module):
    """A model that is not ours: the same decoder, behind a forward of its own."""

    def __init__(self, inner, wrap=lambda logits: logits):
        super().__init__()
        self.inner = inner
        self.wrap = wrap
        self.lengths = []

    def forward(self, tokens):
        self.lengths.append(tokens.shape[1])
        return self.wrap(self.inner(tokens))


def made(model, prompt=PROMPT, count=12, ends=frozenset(), **choice):
    return list(generate(model, prompt, max_new_tokens=count, ends=ends, **choice))


@pytest.fixture(scope="module", params=tiny_checkpoints.FAMILIES)
def family(request, tmp_path_factory):
    """A model as transformers knows it, and as ours."""
    reference = tiny_checkpoints.random_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    tiny_checkpoints.write_folder(folder, request.param)
    return reference, FolderCheckpoint(folder).load_model(torch.float32)


def test_it_generates_what_transformers_does(family):
    reference, model = family
    expected = reference.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        max_new_tokens=30,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )[0, len(PROMPT) :].tolist()
    assert made(model, count=30) == expected
    assert len(set(expected)) > 5


def test_models_of_transformers_are_run_as_they_are(family):
    reference, model = family
    assert context_of(reference) == tiny_gguf.CONTEXT
    assert made(reference) == made(model)


@pytest.mark.parametrize("kind", [*tiny_checkpoints.OTHERS, "smollm2", "qwen3"])
def test_a_memory_gives_what_the_whole_text_gives(tiny_folder, kind):
    model, read = watched(tiny_folder, kind)
    memory, text = Memory(model), []
    for piece in ([5, 60, 70, 8], [9], [200, 131, 44], [7, 7], [12]):
        text += piece
        expected = logits_after(model, text)
        read.clear()
        found = memory.logits_after(torch.tensor([piece]))[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        # In transformers, RWKV's state goes wrong if it has several rows, so it is not used.
        assert sum(read) == len(text if kind == "rwkv" else piece)


@pytest.mark.parametrize("kind", ["smollm2", "mamba", "mixtral", "rwkv"])
def test_a_memory_serves_the_turns_of_a_conversation(tiny_folder, kind):
    model, read = watched(tiny_folder, kind)
    memory = Memory(model)
    text = [*PROMPT]
    for turn in ([], [9, 8, 7], [200]):
        text += turn
        expected = made(model, text, 6)
        read.clear()
        assert made(model, text, 6, memory=memory) == expected
        new = 5 + (len(turn) + 1 if turn else len(PROMPT))
        assert sum(read) == new or kind == "rwkv"
        text += expected
    for other in (text[:4], [*text[:9], 3, 4], [*text[:9], 3, 4], [6]):
        assert made(model, other, 6, memory=memory) == made(model, other, 6)


def test_an_interrupted_memory_begins_again(tiny_folder):
    model, _ = watched(tiny_folder, "mixtral")
    memory = Memory(model)
    expected = made(model, PROMPT, 6)
    made(model, PROMPT, 6, memory=memory)

    def interrupt(*_):
        raise KeyboardInterrupt

    with model.model.layers[1].register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt):
        made(model, [*PROMPT, 9], 6, memory=memory)
    assert made(model, PROMPT, 6, memory=memory) == expected


def watched(tiny_folder, kind):
    """A model, and a list of how many tokens each call has read."""
    folder = tiny_folder(kind)
    if kind in tiny_checkpoints.FAMILIES:
        model = FolderCheckpoint(folder).load_model(torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    read = []
    embedding = next(one for one in model.modules() if isinstance(one, nn.Embedding))
    embedding.register_forward_hook(lambda _, inputs, __: read.append(inputs[0].shape[1]))
    return model.eval(), read


@torch.no_grad()
def logits_after(model, text):
    output = model(torch.tensor([text]))
    return getattr(output, "logits", output)[0, -1]


@pytest.mark.parametrize(
    "wrap", [lambda logits: logits, lambda logits: type("Output", (), {"logits": logits})()]
)
def test_another_model_goes_through_the_whole_text(tiny_model, wrap):
    other = Other(tiny_model, wrap)
    assert made(other) == made(tiny_model)
    assert other.lengths == list(range(len(PROMPT), len(PROMPT) + 12))


def test_a_model_without_logits_is_refused(tiny_model):
    with pytest.raises(CheckpointError, match="returned a dict"):
        made(Other(tiny_model, lambda logits: {"logits": logits}))


@torch.no_grad()
def test_logits_that_are_nan_are_refused(tiny_model):
    tiny_model.model.norm.weight[0] = torch.nan
    for settings in ({}, {"temperature": 1.0}):
        with pytest.raises(CheckpointError, match="returns NaN as logits"):
            made(tiny_model, **settings)
    with pytest.raises(CheckpointError, match="returns NaN as logits"):
        complete(tiny_model, [PROMPT], max_new_tokens=2, ends=frozenset())


def test_any_of_the_ends_ends_it(tiny_model):
    free = made(tiny_model)
    first, later = free.index(free[2]), free.index(free[6])
    assert made(tiny_model, ends=frozenset({free[6]})) == free[:later]
    assert made(tiny_model, ends=frozenset({free[6], free[2]})) == free[: min(first, later)]


def test_tokens_come_as_soon_as_they_are_known(tiny_model):
    other = Other(tiny_model)
    tokens = generate(other, PROMPT, max_new_tokens=12, ends=frozenset())
    assert other.lengths == []
    assert next(tokens) == made(tiny_model)[0]
    assert len(other.lengths) == 1


def test_the_text_ends_where_the_model_takes_no_more(tiny_model):
    prompt = [7] * (tiny_gguf.CONTEXT - 5)
    assert len(made(tiny_model, prompt, count=50)) == 5
    assert len(complete(tiny_model, [prompt], max_new_tokens=50, ends=frozenset())[0]) == 5
    assert len(made(Other(tiny_model), prompt, count=7)) == 7  # says nothing of its limit


@pytest.mark.parametrize("extra", [0, 3])
def test_a_prompt_that_leaves_no_room_is_refused(tiny_model, extra):
    prompt = [7] * (tiny_gguf.CONTEXT + extra)
    with pytest.raises(DataError, match=f"prompt of {len(prompt)} tokens leaves no room"):
        made(tiny_model, prompt)
    with pytest.raises(DataError, match="leaves no room"):
        complete(tiny_model, [PROMPT, prompt], max_new_tokens=3, ends=frozenset())


def test_an_empty_prompt_is_refused(tiny_model):
    with pytest.raises(DataError, match="at least one token"):
        made(tiny_model, [])
    with pytest.raises(DataError, match="at least one token"):
        complete(tiny_model, [PROMPT, []], max_new_tokens=3, ends=frozenset())


def test_adapters_take_part(tiny_model):
    without = made(tiny_model)
    disha.inject_adapters(tiny_model, "_proj", r=4)
    assert made(tiny_model) == without
    with torch.no_grad():
        for block in disha.adapter_parameters(tiny_model):
            block.copy_(torch.randn(block.shape, generator=torch.Generator().manual_seed(0)) * 0.3)
    assert made(tiny_model) != without
    assert made(tiny_model) == made(Other(tiny_model))


def test_a_compiled_model_generates_as_before(tiny_model):
    compiled = torch.compile(tiny_model, backend="eager")
    assert made(compiled) == made(tiny_model)


def test_modes_of_training_come_back(tiny_model):
    model = nn.Sequential(Other(tiny_model), nn.Dropout(0.5))
    model.train()
    model[0].inner.eval()
    modes = [module.training for module in model.modules()]
    assert made(model) == made(model) == made(tiny_model)
    assert [module.training for module in model.modules()] == modes
    tokens = generate(model, PROMPT, max_new_tokens=3, ends=frozenset())
    next(tokens)
    assert not model[1].training
    tokens.close()
    assert [module.training for module in model.modules()] == modes
    complete(model, [PROMPT], max_new_tokens=3, ends=frozenset())
    assert [module.training for module in model.modules()] == modes


@given(
    prompts=st.lists(st.lists(st.integers(3, 250), min_size=1, max_size=4), min_size=0, max_size=6),
    count=st.integers(1, 8),
)
def test_several_texts_are_continued_as_each_alone(family, prompts, count):
    _, model = family
    alone = [made(model, prompt, count) for prompt in prompts]
    assert complete(model, prompts, max_new_tokens=count, ends=frozenset()) == alone
    ends = frozenset(token for continuation in alone for token in continuation[1:3])
    assert complete(model, prompts, max_new_tokens=count, ends=ends) == [
        made(model, prompt, count, ends) for prompt in prompts
    ]


def test_several_texts_with_another_model(tiny_model):
    prompts = [PROMPT, PROMPT[:3], PROMPT[::-1], [9]]
    other = Other(tiny_model)
    expected = [made(tiny_model, prompt, 6) for prompt in prompts]
    assert complete(other, prompts, max_new_tokens=6, ends=frozenset()) == expected
    assert len(other.lengths) == 3 * 6


def test_texts_of_one_length_stop_when_all_have_ended(tiny_model):
    one, two = made(tiny_model), made(tiny_model, PROMPT[::-1])
    other = Other(tiny_model)
    ends = frozenset({one[1], two[4]})
    complete(other, [PROMPT, PROMPT[::-1]], max_new_tokens=12, ends=ends)
    assert len(other.lengths) <= 5


def test_a_seed_decides_what_is_drawn(tiny_model):
    drawn = [made(tiny_model, temperature=1.5, seed=seed) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1]
    assert len({tuple(tokens) for tokens in drawn}) == 3
    assert drawn[0] == made(Other(tiny_model), temperature=1.5, seed=0)


def test_a_seed_leaves_pytorch_s_own_random_numbers_alone(tiny_model):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    made(tiny_model, temperature=1.0, seed=5)
    assert torch.equal(torch.rand(4), expected)
    torch.manual_seed(3)
    first = made(tiny_model, temperature=1.5)
    torch.manual_seed(3)
    assert made(tiny_model, temperature=1.5) == first


def test_one_token_to_draw_from_is_the_most_likely(tiny_model):
    greedy = made(tiny_model)
    assert made(tiny_model, temperature=2.0, top_k=1, seed=0) == greedy
    assert made(tiny_model, temperature=2.0, top_p=1e-9, seed=0) == greedy
    for temperature in (1e-6, 1e-40, 5e-324):
        assert made(tiny_model, temperature=temperature, seed=0) == greedy


def test_a_temperature_however_high_draws_evenly(tiny_model):
    chances, _ = likely_tokens(torch.tensor([5.0, -5.0]), 1e308)
    assert chances.tolist() == [0.5, 0.5]


logit_lists = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12)


@given(
    logits=logit_lists,
    temperature=st.floats(0.1, 5),
    top_k=st.one_of(st.none(), st.integers(1, 15)),
    top_p=st.floats(0.01, 1),
)
def test_what_is_drawn_from_equals_the_slow_definition(logits, temperature, top_k, top_p):
    chances, ids = likely_tokens(torch.tensor(logits), temperature, top_k, top_p)
    expected = kept_slowly(logits, temperature, top_k, top_p)
    assert ids.tolist() == [index for index, _ in expected]
    total = sum(chance for _, chance in expected)
    torch.testing.assert_close(
        chances / chances.sum(),
        torch.tensor([chance / total for _, chance in expected], dtype=torch.float64),
    )


def kept_slowly(logits, temperature, top_k, top_p):
    """The tokens to draw from with their probabilities, by going through them one by one."""
    weights = [2.718281828459045 ** (logit / temperature) for logit in logits]
    ranked = sorted(enumerate(weights), key=lambda pair: (-logits[pair[0]], pair[0]))
    ranked = ranked[:top_k]
    total = sum(weight for _, weight in ranked)
    kept, together = [], 0.0
    for index, weight in ranked:
        kept.append((index, weight / total))
        together += weight / total
        if together >= top_p < 1:  # 1 keeps all, whatever is lost in rounding
            break
    return kept


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0])

    class Constant(nn.Module):
        def forward(self, tokens):
            return logits.expand(*tokens.shape, 4)

    drawn = torch.tensor(made(Constant(), [0], 4000, temperature=0.7, seed=0))
    shares = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(shares, (logits / 0.7).softmax(-1), atol=0.03, rtol=0)


@EITHER
@given(text=texts())
def test_pieces_of_a_text_join_to_the_text(tokenizer, text):
    ids = tokenizer.encode(text, special=False)
    pieces = list(stream_text(tokenizer, ids))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert all(pieces)


@EITHER
@given(ids=st.lists(st.integers(0, 460), max_size=25))
def test_pieces_of_any_tokens_join_to_their_text(tokenizer, ids):
    assert "".join(stream_text(tokenizer, ids)) == tokenizer.decode(ids)


@EITHER
def test_pieces_are_whole_characters_as_soon_as_they_can_be(tokenizer):
    ids = tokenizer.encode("the 😀 answer", special=False)
    told = [""]

    def one_by_one():
        for count, index in enumerate(ids, start=1):
            yield index
            so_far = tokenizer.decode(ids[:count])
            if not so_far.endswith("\ufffd") and tokenizer.settles(index):
                assert told[-1] == so_far

    for piece in stream_text(tokenizer, one_by_one()):
        told.append(told[-1] + piece)
        assert "\ufffd" not in piece
    assert told[-1] == "the 😀 answer"
    assert len(told) < len(ids) + 1  # some tokens are parts of a character


def test_the_demos_model_says_the_same_in_pieces(smollm, smollm_tokenizer):
    prompt = smollm_tokenizer.encode("def greet(name):\n    # says hello, 12 times\n")
    ids = made(smollm, prompt, 12, smollm_tokenizer.ends)
    assert "".join(stream_text(smollm_tokenizer, iter(ids))) == smollm_tokenizer.decode(ids)
