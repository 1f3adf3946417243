"""Conversations to token ids, through the model's own chat template.

The ids are those of ``apply_chat_template`` of transformers: the whole conversation is written as
text, then cut into tokens at once. A message that spells a special token, such as
``<|im_end|>``, therefore *is* that token, as it is there.

What is learned of a conversation is what the model would have been asked to write: for each turn
of the assistant, what the conversation up to and with it has after the prompt for it. Some
templates write a turn otherwise once others follow it: Qwen3's leaves its thoughts out, some of
Mistral's move the system's message to the last question. Such a turn is not what the model will
be asked to write, so it stands in the text but is not learned. Where that is so of the last turn
too, the conversation is refused.
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

ROLES = ("system", "developer", "user", "assistant", "tool")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def encode_chat(messages: object, tokenizer: Tokenizer) -> tuple[list[int], list[Span]]:
    """Token ids of a conversation, and which of them are learned.

    Messages after the assistant's last turn are left out, as nothing of them is learned.

    Args:
        messages: a list of objects with ``role`` and ``content``, as rows hold it.
        tokenizer: the model's; without a chat template, ChatML is used if it knows its tokens.

    Returns:
        The ids, and the spans of tokens, as (first, end), that the assistant wrote: its content
        and the token that ends its turn.

    Raises:
        DataError: the messages are malformed, or the template can't take them; without the place,
            which the caller knows.
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
            "nothing of the conversation can be learned: no turn of the assistant stands in it as "
            "it would be asked for"
        )
    return [*begin, *ids], spans


def render(messages: Sequence[Message], tokenizer: Tokenizer, *, prompts: bool = False) -> str:
    """The text that the tokenizer's chat template makes of messages.

    Args:
        messages: the conversation.
        tokenizer: whose template it is.
        prompts: whether to end with what asks the assistant for its turn.

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
    if not (tokenizer.knows("<|im_start|>") and tokenizer.knows("<|im_end|>")):
        raise DataError(
            "the model's tokenizer has no chat template and does not know ChatML's tokens; put a "
            "chat_template.jinja beside its tokenizer.json, or give rows of two fields"
        )
    return CHATML


def _begin(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """The begin token where ChatML stands in for a chat template; those write it themselves."""
    begin = tokenizer.begin
    if tokenizer.chat_template is not None or begin is None or begin in ids[:1]:
        return []
    return [begin]


def _checked(messages: object) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"a conversation must be a list of messages, got {_shortened(messages)}")
    for number, message in enumerate(messages, start=1):
        _check(message, f"message {number} of the conversation")
    return messages


def _check(message: object, which: str) -> None:
    if not isinstance(message, Mapping):
        raise DataError(
            f"{which} must be an object with role and content, got {_shortened(message)}"
        )
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"{which} must have a role of {', '.join(ROLES)}; got {_shortened(role)}")
    calls_tools = role == "assistant" and message.get("tool_calls")
    if not isinstance(content, str) and not (content is None and calls_tools):
        raise DataError(f"{which} must have a text as its content, got {_shortened(content)}")


def _up_to_last_answer(messages: list[Message]) -> list[Message]:
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise DataError(
            "a conversation must have a message of the role assistant to learn from; there is none "
            f"among its {len(messages)}"
        )
    return messages[: answers[-1] + 1]


def _answers(messages: Sequence[Message], text: str, tokenizer: Tokenizer) -> Iterator[Span]:
    """Where in `text` the assistant's turns stand, those that it writes as it would ask for."""
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            span = _answer(messages, place, text, tokenizer)
            if span is not None:
                yield span


def _answer(
    messages: Sequence[Message], place: int, text: str, tokenizer: Tokenizer
) -> Span | None:
    if place == 0:  # asked for by nothing
        return None
    asked = render(messages[:place], tokenizer)
    answered = render(messages[: place + 1], tokenizer)
    if not text.startswith(asked) or not text.startswith(answered):
        return None
    # A prompt may go on with what the answer itself has otherwise, such as a thought begun.
    prompt = render(messages[:place], tokenizer, prompts=True)
    return _agreement(prompt, answered), len(answered)


def _agreement(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
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


def _shortened(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
