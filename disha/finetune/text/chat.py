"""Encodes conversations to token ids, with the model's own chat template.

The ids equal those of ``apply_chat_template`` of transformers: the template writes the conversation
as one text, which is then cut into tokens. So if a message spells a special token, such as
``<|im_end|>``, it contains that token.

The model learns the turns of the assistant: the text after the prompt for each turn. Some templates
write a turn in another form when other turns follow it. Qwen3's leaves out the thoughts, and some
of Mistral's move the system message to the last question. The model is never asked to write a turn
in that form, so such a turn stays in the text but is not learned. If no turn can be learned, the
conversation is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from disha.finetune.errors import DataError
from disha.finetune.text.jinja import Form, Rendered, run_template
from disha.finetune.text.tokenizer import Tokenizer
from disha.text import brief

__all__ = ["encode_chat", "render"]

Message = Mapping[str, Any]
Span = tuple[int, int]

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
ROLES = ("system", "developer", "user", "assistant", "tool")
CHATML_PROGRAM = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML as a chat template, for tokenizers that know its tokens and have no chat template."""


def encode_chat(messages: object, tokenizer: Tokenizer) -> tuple[list[int], list[Span]]:
    """Return the token ids of a conversation, and which of them are learned.

    Messages after the assistant's last turn are left out, as they are not learned.

    Args:
        messages: a list of objects with ``role`` and ``content``, as in a row of data.
        tokenizer: the model's tokenizer. If it has no chat template but knows ChatML's tokens,
            ChatML is used.

    Returns:
        The ids, and the learned spans of tokens as (first, end). Each span is the content of a turn
        of the assistant and the token that ends the turn.

    Raises:
        DataError: the messages are malformed, or the template refuses them. The caller adds the
            file and row.
        TokenizerError: the chat template is damaged, or the model does not know one of the tokens.
    """
    turns = _up_to_last_answer(_checked(messages))
    rendered = _rendered(turns, tokenizer, [form for one in _answered(turns) for form in one])
    text = rendered.text
    ids, places = tokenizer.encode_with_places(text)
    begin = _begin(tokenizer.known(ids), tokenizer)
    learned = [
        span
        for characters in _answers(turns, rendered)
        if (span := _tokens_of(characters, ids, places, tokenizer)) is not None
    ]
    # The first token of a text can't be learned: no token before it predicts it.
    shifted = [(max(1, first + len(begin)), end + len(begin)) for first, end in learned]
    spans = [(first, end) for first, end in shifted if first < end]
    if not spans:
        raise DataError(
            "nothing of the conversation can be learned: the chat template writes every turn of "
            "the assistant differently from the prompt for it"
        )
    return [*begin, *ids], spans


def render(messages: Sequence[Message], tokenizer: Tokenizer, *, prompts: bool = False) -> str:
    """Write messages as one text, with the tokenizer's chat template.

    Args:
        messages: the conversation.
        tokenizer: the tokenizer that has the template.
        prompts: whether to end with the prompt for the assistant's turn.

    Raises:
        DataError: the template refuses the messages, or there is no template.
        TokenizerError: the template is damaged.
    """
    return _rendered(messages, tokenizer, prompts=prompts).text


def _rendered(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    others: Sequence[Form] = (),
    *,
    prompts: bool = False,
) -> Rendered:
    given = [
        {key: value for key, value in message.items() if value is not None} for message in messages
    ]
    variables = {
        **tokenizer.named,
        "messages": given,
        "tools": None,
        "documents": None,
        "add_generation_prompt": prompts,
    }
    rendered = run_template(
        _template(tokenizer), variables, tokenizer.source, others, tokenizer.now
    )
    if not rendered.text.strip():
        raise DataError("the model's chat template makes no text of the messages")
    return rendered


def _template(tokenizer: Tokenizer) -> str:
    if tokenizer.chat_template is not None:
        return tokenizer.chat_template
    if not tokenizer.knows(*CHATML_TOKENS):
        raise DataError(
            "the model's tokenizer has no chat template and does not know ChatML's tokens; put a "
            "chat_template.jinja beside its tokenizer.json, or give rows of two fields"
        )
    return CHATML_PROGRAM


def _begin(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the begin tokens, for ChatML only: a model's own template writes them itself."""
    begin = tokenizer.begin
    is_written = tokenizer.chat_template is not None or tuple(ids[: len(begin)]) == begin
    return () if is_written else begin


def _checked(messages: object) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"a conversation must be a list of messages, got {brief(messages):.60}")
    for number, message in enumerate(messages, start=1):
        _check(message, f"message {number} of the conversation")
    return messages


def _check(message: object, which: str) -> None:
    if not isinstance(message, Mapping):
        raise DataError(
            f"{which} must be an object with role and content, got {brief(message):.60}"
        )
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"{which} must have a role of {', '.join(ROLES)}; got {brief(role):.60}")
    calls_tools = role == "assistant" and message.get("tool_calls")
    if not isinstance(content, str) and not (content is None and calls_tools):
        raise DataError(f"{which} must have a text as its content, got {brief(content):.60}")


def _up_to_last_answer(messages: list[Message]) -> list[Message]:
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise DataError(
            "a conversation must have a message of the role assistant to learn from; there is none "
            f"among its {len(messages)}"
        )
    return messages[: answers[-1] + 1]


def _answered(messages: Sequence[Message]) -> Iterator[tuple[Form, Form, Form]]:
    """Yield three forms for each turn of the assistant: before it, with it, and asking for it.

    If no message comes before a turn, there is no prompt for it.
    """
    for place, message in enumerate(messages):
        if message["role"] == "assistant" and place > 0:
            yield (place, False), (place + 1, False), (place, True)


def _answers(messages: Sequence[Message], rendered: Rendered) -> Iterator[Span]:
    """Yield the places in the text of the assistant's turns that can be learned."""
    for before, after, asking in _answered(messages):
        forms = [rendered.others[form] for form in (before, after)]
        if all(shared == length for length, shared in forms):
            end, _ = rendered.others[after]
            # The end of the prompt may differ from the answer, such as where it begins a thought.
            _, shared = rendered.others[asking]
            yield min(shared, end), end


def _tokens_of(
    characters: Span, ids: Sequence[int], places: Sequence[Span], tokenizer: Tokenizer
) -> Span | None:
    """Return the span of tokens with any of these characters, up to the last end token."""
    first, end = characters
    inside = [token for token, (start, stop) in enumerate(places) if stop > first and start < end]
    if not inside:
        return None
    ending = [token for token in inside if ids[token] in tokenizer.ends]
    last = ending[-1] if ending else inside[-1]
    return inside[0], last + 1
