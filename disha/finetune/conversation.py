"""A conversation with a model. Answers depend on all earlier turns, which are read only once."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from disha.finetune.adapting import without_adapter
from disha.finetune.answering import Answerer
from disha.finetune.errors import DataError
from disha.finetune.generation import Memory, context_of
from disha.finetune.text.chat import render
from disha.finetune.text.templates import Template
from disha.finetune.text.tokenizer import is_text

__all__ = ["Conversation"]


@dataclass(frozen=True)
class _Turn:
    question: str
    answer: list[int] = field(default_factory=list)


class Conversation:
    """Several turns of questions and answers.

    The first prompt is that of a single question. The tokenizer's chat template writes all turns
    itself. With any other template, a turn is a prompt, its answer and the end token, as in
    training, and a line break separates two turns. If the turns leave too little of the model's
    context free, the oldest ones are forgotten until half of it is free.

    Args:
        answerer: the model, its template, and how tokens are chosen.
    """

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self._turns: list[_Turn] = []
        self._memory = Memory(self._answerer.model)
        self._prompt: list[int] = []
        self.forgotten = 0

    def ask(self, question: str) -> Generator[str]:
        """Yield the answer to a question piece by piece.

        If the answer is stopped, its part so far stays in the conversation. Afterwards,
        `forgotten` is how many of the oldest turns were forgotten for this question.

        Raises:
            DataError: the question is not valid text, or leaves no room for an answer. The
                conversation is as before.
        """
        if not is_text(question):
            raise DataError(f"a question must be UTF-8 text, got {question!a:.60}")
        turns, prompt = self._fitting(question)
        turn = _Turn(question)
        before, self._turns = self._turns, [*turns, turn]
        self.forgotten, self._prompt = len(before) - len(turns), prompt
        try:
            yield from self._answerer.continuation(prompt, turn.answer, self._memory)
        except DataError:
            self._turns = before
            raise

    def base_answer(self) -> Generator[str]:
        """Yield the base model's answer to the last question; the conversation does not change.

        Raises:
            DataError: there is no question yet.
        """
        if not self._turns:
            raise DataError("there is no question yet that the base model could answer")
        with without_adapter(self._answerer.model, self._answerer.base):
            yield from self._answerer.continuation(self._prompt)

    def _fitting(self, question: str) -> tuple[list[_Turn], list[int]]:
        """Return the turns that fit the model's context before a question, and the whole prompt."""
        turns = list(self._turns)
        prompt = self._ids(turns, question)
        context = context_of(self._answerer.model)
        if context is None:
            return turns, prompt
        room = min(self._answerer.sampling.max_new_tokens, context // 4)
        if len(prompt) + room > context:
            while turns and len(prompt) > context // 2:
                turns = turns[1:]
                prompt = self._ids(turns, question)
        return turns, prompt

    def _ids(self, turns: Sequence[_Turn], question: str) -> list[int]:
        answerer, template = self._answerer, self._answerer.template
        if not turns:
            return answerer.prompt(question)
        tokenizer = answerer.tokenizer
        if template is not None and not template.begins:
            messages = []
            for turn in turns:
                messages.append({"role": "user", "content": turn.question})
                messages.append({"role": "assistant", "content": tokenizer.decode(turn.answer)})
            messages.append({"role": "user", "content": question})
            return tokenizer.encode(render(messages, tokenizer, prompts=True))
        before, after = ("", "") if template is None else (template.before, template.after)
        further = Template(f"\n{before}", after, begins=False)
        ids = answerer.prompt(turns[0].question)
        for turn, following in zip(
            turns, [*(t.question for t in turns[1:]), question], strict=True
        ):
            ids += [*turn.answer, tokenizer.end, *further.prompt(following, tokenizer)]
        return ids
