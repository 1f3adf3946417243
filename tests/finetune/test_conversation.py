"""Conversations: the whole text is what a fresh model would get, and only new tokens are read."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import disha
from disha.finetune.answering import Answerer
from disha.finetune.conversation import Conversation
from disha.finetune.errors import DataError
from disha.finetune.generation import generate
from disha.finetune.settings import SamplingSettings
from disha.finetune.text.templates import CHATML, PLAIN, Template, template_from
from tests.conftest import perturb
from tests.finetune import tiny_gguf

CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"  # noqa: E501
QUESTIONS = ("say hello", "and well?", "yellow")


def chatting(model, tokenizer, template, **sampling):
    sampling = SamplingSettings(**{"max_new_tokens": 6, **sampling})
    return Answerer(model.eval(), tokenizer, template, sampling)


def read_by(model):
    """How many tokens the model reads, call by call."""
    read = []
    embedding = next(one for one in model.modules() if isinstance(one, nn.Embedding))
    embedding.register_forward_hook(lambda _, inputs, __: read.append(inputs[0].shape[1]))
    return read


def fresh(answerer, ids):
    """The answer of a model that remembers nothing, as tokens."""
    sampling = vars(answerer.sampling)
    return list(generate(answerer.model, ids, ends=answerer.tokenizer.ends, **sampling))


@pytest.fixture
def with_chat(tiny_tokenizer):
    return dataclasses.replace(tiny_tokenizer, chat_template=CHAT)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("template", [CHATML, Template("Q: ", " A:"), None])
def test_answers_equal_those_of_a_fresh_model_and_only_new_tokens_are_read(
    tiny_model, tiny_tokenizer, template, temperature
):
    answerer = chatting(tiny_model, tiny_tokenizer, template, temperature=temperature)
    conversation, text, known = Conversation(answerer), [], 0
    read = read_by(tiny_model)
    before, after = (template.before, template.after) if template else ("", "")
    for number, question in enumerate(QUESTIONS):
        # Written out by hand: prompts, answers, end tokens and line breaks.
        if number:
            text.append(tiny_tokenizer.end)
        text += tiny_tokenizer.encode(("\n" if number else "") + before + question + after)
        read.clear()
        said = "".join(conversation.ask(question))
        total = sum(read)
        answer = fresh(answerer, text)
        assert said == tiny_tokenizer.decode(answer)
        is_cut = len(answer) == answerer.sampling.max_new_tokens
        text += answer
        # The last token of an answer that is cut is not read before the next question.
        assert known + total == len(text) - is_cut
        known += total


def test_a_chat_template_writes_all_turns(tiny_model, with_chat):
    answerer = chatting(tiny_model, with_chat, template_from("chat", with_chat))
    conversation, messages = Conversation(answerer), []
    read = read_by(tiny_model)
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        said = "".join(conversation.ask(question))
        text = "".join(
            f"<|im_start|>{one['role']}\n{one['content'].strip()}<|im_end|>\n" for one in messages
        )
        ids = with_chat.encode(f"{text}<|im_start|>assistant\n")
        total = sum(read)
        assert said == with_chat.decode(fresh(answerer, ids))
        assert total < len(ids) + 6 or len(messages) == 1
        messages.append({"role": "assistant", "content": said})
        read.clear()


def test_the_begin_token_comes_once(tiny_model, tiny_tokenizer):
    tokenizer = dataclasses.replace(tiny_tokenizer, begin=(259,))
    for template in (CHATML, None):
        conversation = Conversation(chatting(tiny_model, tokenizer, template))
        for question in QUESTIONS:
            list(conversation.ask(question))
        assert conversation._prompt[0] == 259
        assert conversation._prompt.count(259) == 1


def test_the_first_answer_is_that_of_a_single_prompt(tiny_model, tiny_tokenizer):
    for template in (CHATML, PLAIN, None):
        answerer = chatting(tiny_model, tiny_tokenizer, template)
        question = "say <|im_end|> hello"
        assert list(Conversation(answerer).ask(question)) == list(answerer.answer(question))


def test_the_base_answers_apart_and_disturbs_nothing(tiny_model, tiny_tokenizer):
    base = "".join(chatting(tiny_model, tiny_tokenizer, CHATML).answer(QUESTIONS[0]))
    disha.inject_adapters(tiny_model, "_proj$", 8)
    perturb(tiny_model, size=0.3)
    answerer = chatting(tiny_model, tiny_tokenizer, CHATML)
    plain, compared = Conversation(answerer), Conversation(answerer)
    expected = ["".join(plain.ask(question)) for question in QUESTIONS]
    found, bases = [], []
    for question in QUESTIONS:
        found.append("".join(compared.ask(question)))
        bases += ["".join(compared.base_answer()) for _ in range(2)]
    assert found == expected
    assert bases[:2] == [base, base]
    assert base != expected[0]


def test_there_is_no_base_answer_before_a_question(tiny_model, tiny_tokenizer):
    conversation = Conversation(chatting(tiny_model, tiny_tokenizer, CHATML))
    with pytest.raises(DataError, match="no question yet"):
        list(conversation.base_answer())
    list(conversation.ask("a"))
    conversation.reset()
    with pytest.raises(DataError, match="no question yet"):
        list(conversation.base_answer())


def test_reset_forgets_everything(tiny_model, tiny_tokenizer):
    conversation = Conversation(chatting(tiny_model, tiny_tokenizer, CHATML))
    first = list(conversation.ask(QUESTIONS[0]))
    list(conversation.ask(QUESTIONS[1]))
    conversation.reset()
    assert list(conversation.ask(QUESTIONS[0])) == first


def test_what_has_come_of_a_stopped_answer_stays(tiny_model, tiny_tokenizer):
    tokenizer = dataclasses.replace(tiny_tokenizer, ends=frozenset())
    answerer = chatting(tiny_model, tokenizer, CHATML)
    conversation = Conversation(answerer)
    pieces = conversation.ask(QUESTIONS[0])
    next(pieces)
    pieces.close()
    [turn] = conversation._turns
    assert 0 < len(turn.answer) < 6
    ids = [*answerer.prompt(QUESTIONS[0]), *turn.answer, tokenizer.end]
    ids += tokenizer.encode(f"\n{CHATML.before}{QUESTIONS[1]}{CHATML.after}")
    said = "".join(conversation.ask(QUESTIONS[1]))
    assert said == tokenizer.decode(fresh(answerer, ids))


def test_a_full_context_forgets_the_oldest_turns_and_says_how_many(tiny_model, tiny_tokenizer):
    answerer = chatting(tiny_model, tiny_tokenizer, CHATML)
    conversation, forgotten = Conversation(answerer), 0
    for number in range(12):
        said = "".join(conversation.ask(f"say {number} hello"))
        forgotten += conversation.forgotten
        assert len(conversation._turns) == number + 1 - forgotten
        assert len(conversation._prompt) + 6 <= tiny_gguf.CONTEXT
        assert said == tiny_tokenizer.decode(fresh(answerer, conversation._prompt))
        if conversation.forgotten:
            assert len(conversation._prompt) <= tiny_gguf.CONTEXT // 2
    assert forgotten > 4


@pytest.mark.parametrize("question", ["z" * 200, "a\udcff"])
def test_a_question_that_can_not_be_asked_leaves_the_conversation_as_it_was(
    tiny_model, tiny_tokenizer, question
):
    conversation = Conversation(chatting(tiny_model, tiny_tokenizer, CHATML))
    list(conversation.ask(QUESTIONS[0]))
    twin = Conversation(chatting(tiny_model, tiny_tokenizer, CHATML))
    list(twin.ask(QUESTIONS[0]))
    with pytest.raises(DataError, match=r"leaves no room|must be UTF-8"):
        list(conversation.ask(question))
    assert list(conversation.ask(QUESTIONS[1])) == list(twin.ask(QUESTIONS[1]))


@torch.no_grad()
def test_a_model_without_a_cache_converses_too(tiny_model, tiny_tokenizer):
    class Other(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, tokens):
            return self.inner(tokens)

    ours = Conversation(chatting(tiny_model, tiny_tokenizer, CHATML))
    other = Conversation(chatting(Other(tiny_model), tiny_tokenizer, CHATML))
    for question in QUESTIONS:
        assert list(other.ask(question)) == list(ours.ask(question))
