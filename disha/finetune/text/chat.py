"""Conversations to token ids, through the model's own chat template.

The ids are those of ``apply_chat_template`` of transformers: all of the conversation becomes one
text, which is then cut into tokens. So a message that spells a special token, such as
``<|im_end|>``, contains that token.

The model learns what it would be asked to write: of each turn of the assistant, the text after the
prompt for it. Some templates write a turn differently once others follow it: Qwen3's leaves its
thoughts out, and some of Mistral's move the system's message to the last question. The model will
not be asked to write such a turn, so it is in the text but is not learned. If that is true of the
last turn too, the conversation is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from disha.finetune.errors import DataError
from disha.finetune.text.jinja import run_template
from disha.finetune.text.tokenizer import Tokenizer

__all__ = ["encode_chat", "render"]

Message = Mapping[str, Any]
Span = tuple[int, int]

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
ROLES = ("system", "developer", "user", "assistant", "tool")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def encode_chat(messages: object, tokenizer: Tokenizer) -> tuple[list[int], list[Span]]:
    """Token ids of a conversation, and which of them are learned.

    Messages after the assistant's last turn are left out, as they are not learned.

    Args:
        messages: a list of objects with ``role`` and ``content``, as rows have it.
        tokenizer: the model's; without a chat template, ChatML is used if it knows ChatML's tokens.

    Returns:
        The ids, and the spans of tokens, as (first, end), that the assistant wrote: its content
        and the token that ends its turn.

    Raises:
        DataError: the messages are malformed, or the template can't take them. The caller adds
            where they are from.
        TokenizerError: the chat template is damaged.
    """
    turns = _up_to_last_answer(_checked(messages))
    text = render(turns, tokenizer)
    ids, places = tokenizer.encode_with_places(text)
    begin = _begin(ids, tokenizer)
    learned = [
        span
        for characters in _answers(turns, text, tokenizer)
        if (span := _tokens_of(characters, ids, places, tokenizer)) is not None
    ]
    # The model has nothing to predict a text's very first token from.
    shifted = [(max(1, first + len(begin)), end + len(begin)) for first, end in learned]
    spans = [(first, end) for first, end in shifted if first < end]
    if not spans:
        raise DataError(
            "nothing of the conversation can be learned: the chat template writes no turn of the "
            "assistant as it would ask for it"
        )
    return [*begin, *ids], spans


def render(messages: Sequence[Message], tokenizer: Tokenizer, *, prompts: bool = False) -> str:
    """The text that the tokenizer's chat template makes of messages.

    Args:
        messages: the conversation.
        tokenizer: whose template it is.
        prompts: whether to end with the prompt for the assistant's turn.

    Raises:
        DataError: the template can't take the messages, or there is none.
        TokenizerError: the template is damaged.
    """
    given = [
        {key: value for key, value in message.items() if value is not None} for message in messages
    ]
    text = run_template(
        _template(tokenizer),
        {
            **tokenizer.named,
            "messages": given,
            "tools": None,
            "documents": None,
            "add_generation_prompt": prompts,
        },
    )
    if not text.strip():
        raise DataError("the model's chat template makes no text of the messages")
    return text


def _template(tokenizer: Tokenizer) -> str:
    if tokenizer.chat_template is not None:
        return tokenizer.chat_template
    if not tokenizer.knows(*CHATML_TOKENS):
        raise DataError(
            "the model's tokenizer has no chat template and does not know ChatML's tokens; put a "
            "chat_template.jinja beside its tokenizer.json, or give rows of two fields"
        )
    return CHATML


def _begin(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """The begin token, if ChatML replaces a chat template, which would write it itself."""
    begin = tokenizer.begin
    if tokenizer.chat_template is not None or begin is None or begin in ids[:1]:
        return []
    return [begin]


def _checked(messages: object) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"a conversation must be a list of messages, got {messages!r:.60}")
    for number, message in enumerate(messages, start=1):
        _check(message, f"message {number} of the conversation")
    return messages


def _check(message: object, which: str) -> None:
    if not isinstance(message, Mapping):
        raise DataError(f"{which} must be an object with role and content, got {message!r:.60}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"{which} must have a role of {', '.join(ROLES)}; got {role!r:.60}")
    calls_tools = role == "assistant" and message.get("tool_calls")
    if not isinstance(content, str) and not (content is None and calls_tools):
        raise DataError(f"{which} must have a text as its content, got {content!r:.60}")


def _up_to_last_answer(messages: list[Message]) -> list[Message]:
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise DataError(
            "a conversation must have a message of the role assistant to learn from; there is none "
            f"among its {len(messages)}"
        )
    return messages[: answers[-1] + 1]


def _answers(messages: Sequence[Message], text: str, tokenizer: Tokenizer) -> Iterator[Span]:
    """Where in `text` the assistant's turns are that the template writes as it asks for them."""
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            span = _answer(messages, place, text, tokenizer)
            if span is not None:
                yield span


def _answer(
    messages: Sequence[Message], place: int, text: str, tokenizer: Tokenizer
) -> Span | None:
    if place == 0:  # there is nothing that asks for it
        return None
    asked = render(messages[:place], tokenizer)
    answered = render(messages[: place + 1], tokenizer)
    if not text.startswith(asked) or not text.startswith(answered):
        return None
    # A prompt may end with what the answer has differently, such as the beginning of a thought.
    prompt = render(messages[:place], tokenizer, prompts=True)
    return _agreement(prompt, answered), len(answered)


def _agreement(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _tokens_of(
    characters: Span, ids: Sequence[int], places: Sequence[Span], tokenizer: Tokenizer
) -> Span | None:
    """The tokens with any of these characters, up to the last that ends a text."""
    first, end = characters
    inside = [token for token, (start, stop) in enumerate(places) if stop > first and start < end]
    if not inside:
        return None
    ending = [token for token in inside if ids[token] in tokenizer.ends]
    last = ending[-1] if ending else inside[-1]
    return inside[0], last + 1
