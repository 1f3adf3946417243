"""The form of a row: whichever form it comes in, it becomes one that `trl` trains on.

A row that asks and answers becomes a conversation, in the same way for every chat template:

| columns of a row | its messages |
|---|---|
| `messages`, or `conversations` of ShareGPT, as a list or as JSON | those |
| `prompt` and `completion`, as lists of messages | both; the completion is learned |
| `instruction`, `input` and `output` of Alpaca | a question with its input, an answer |
| `query` and `response`, or two fields by name | a question, an answer |
| `system`, and `history` with pairs of question and answer, beside these | earlier messages |

The conversation is split where the first answer to learn begins, because `trl` learns completions.
Of a completion, it learns the answers where it can mark them in the chat template. Elsewhere, the
completion is the last answer alone. Texts (`text`, or `prompt` and `completion`) stay texts.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Dataset, Features, Json, Value
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl import is_conversational
from trl.chat_template_utils import get_training_chat_template

from disha.errors import ArgumentError
from disha.text import brief, first_few

Row = Mapping[str, Any]
Message = dict[str, Any]
Reader = Callable[[Row], list[Message]]
"""Takes a row, and returns its messages. A message may have a weight: 0 if it is not learned."""

SPLIT = ("prompt", "completion")
CONVERSATIONS = ("messages", "conversations")
KNOWN_FIELDS = (
    SPLIT,
    ("instruction", "output"),
    ("query", "response"),
    ("messages",),
    ("conversations",),
    ("text",),
)
"""The fields by which a form is known, in the order in which they are looked for."""

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
}
"""The roles of ShareGPT, and of other formats -> those of chat templates."""

CALL = "function_call"
"""ShareGPT's role of a message whose text is a call of a function, as JSON."""

FOR_TEMPLATES = ("tools", "chat_template_kwargs")
"""Columns that `trl` hands to the chat template."""

KEYS_OF_MESSAGES = {"role", "content", "tool_calls"}
TEXT = Value("string")


def form_rows(
    rows: Dataset,
    fields: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    learn_all: bool = False,
) -> Dataset:
    """Return rows as `trl` trains them: as conversations if there is a chat template.

    With `learn_all`, the rows of `messages` stay whole, and `trl` learns the questions too.

    Raises:
        ArgumentError: the columns are of no known form, or a row can't be used.

    Warns:
        UserWarning: columns, parts of messages, or answers are not used.
    """
    columns = rows.column_names
    if "input_ids" in columns:
        return rows
    form = _choose_form(rows, fields, tokenizer, learn_all)
    name = rows.info.description or "the data"

    def form_row(row: Row, index: int) -> Row:
        try:
            return form.form_row(row)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ArgumentError(f"row {index + 1} of {name} can't be used: {error}") from error

    formed = rows.map(
        form_row,
        with_indices=True,
        remove_columns=columns,
        features=Features(form.features(columns)),
        load_from_cache_file=False,  # what is not used is only seen while rows are formed
        desc="Forming the rows",
    )
    unused = [column for column in columns if column not in form.columns]
    if unused:
        warnings.warn(f"{name}: not used: {_columns(unused)}", stacklevel=2)
    for remark in form.remarks:
        warnings.warn(f"{name}: {remark}", stacklevel=2)
    return formed


def marks_answers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether `trl` can mark the answers in a conversation."""
    try:
        get_training_chat_template(tokenizer)
    except ValueError:
        return False
    return True


def learns_marked_answers(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether `trl` should learn the marked answers of formed rows, and nothing else."""
    is_split = set(SPLIT) <= set(rows.column_names)
    return is_split and is_conversational(rows[0]) and marks_answers(tokenizer)


def _columns(names: Sequence[str]) -> str:
    noun = "the column" if len(names) == 1 else "the columns"
    return f"{noun} {first_few(names, 5, ', ')}"


# --- which form ----------------------------------------------------------------------------------


def _choose_form(
    rows: Dataset, named: Sequence[str], tokenizer: PreTrainedTokenizerBase, learn_all: bool
) -> _Texts | _Conversations:
    """Return the form of rows, by the fields that were named, or by those of a known form."""
    columns = rows.column_names
    fields = tuple(named or _known_fields(columns))
    absent = [field for field in fields if field not in columns]
    if absent or len(fields) not in (1, 2):
        raise ArgumentError(
            f"the rows have the fields {', '.join(columns)}; name the question and the answer, or "
            f"a text, with --dataset_field, as one or two of them, got {' '.join(fields) or 'none'}"
        )
    first_row = rows[0]
    if len(fields) == 1:
        [field] = fields
        if field not in CONVERSATIONS and not _is_list_of_messages(first_row[field]):
            return _Texts(("text",), {field}, partial(_form_text, field=field))
        read: Reader = partial(_read_conversation, field=field)
        used = {field, "system"}
    elif fields == SPLIT and _is_list_of_messages(first_row["prompt"]):
        read = _read_split_conversation
        used = set(SPLIT)
    elif fields == SPLIT and not named:
        return _Texts(SPLIT, SPLIT, _form_completion)
    else:
        read = partial(_read_pair, question=fields[0], answer=fields[1])
        used = {*fields, "system", "history"}
        if fields[0] == "instruction":
            used.add("input")
        if not tokenizer.chat_template:
            return _Texts(SPLIT, used, partial(_form_lines, read=read))
    if not tokenizer.chat_template:
        raise ArgumentError(
            "the rows are conversations, and the model has no chat template; give one with "
            "--chat_template_path"
        )
    return _Conversations(tokenizer, read, used, learn_all and len(fields) == 1)


def _known_fields(columns: Sequence[str]) -> tuple[str, ...]:
    """Return the fields of the first form that the columns have; none if they have none."""
    for fields in KNOWN_FIELDS:
        if set(fields) <= set(columns):
            return fields
    return ()


def _is_list_of_messages(value: Any) -> bool:
    """Return whether a value is a list of messages, also as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return False
    if not isinstance(value, list) or not value or not isinstance(value[0], Mapping):
        return False
    return "role" in value[0] or "from" in value[0]


# --- texts ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Texts:
    """Rows that become texts."""

    names: Sequence[str]
    """The columns that rows get."""
    columns: Collection[str]
    form_row: Callable[[Row], Row]
    remarks: Sequence[str] = ()

    def features(self, columns: Collection[str]) -> dict[str, Any]:
        """Return the kinds of the columns that rows get."""
        return dict.fromkeys(self.names, TEXT)


def _form_text(row: Row, field: str) -> Row:
    return {"text": _text(row, field)}


def _form_completion(row: Row) -> Row:
    return {"prompt": _text(row, "prompt"), "completion": _answer(row, "completion")}


def _form_lines(row: Row, read: Reader) -> Row:
    """Return messages as texts, each on a line, because there is no chat template."""
    *asked, answer = read(row)
    question = "\n".join(message["content"] for message in asked)
    return {"prompt": question, "completion": f"\n{answer['content']}"}


def _text(row: Row, field: str) -> str:
    """Return the text in a field. Numbers become text, and parts of a text are joined."""
    value = row.get(field)
    if value is None or isinstance(value, Mapping):
        raise ValueError(f"there is no text as {field} in {brief(row)}")
    if isinstance(value, list):
        return _join_parts(value, field)
    return str(value)


def _answer(row: Row, field: str) -> str:
    """Return the text in a field, which must not be empty."""
    text = _text(row, field)
    if not text.strip():
        raise ValueError(f"{field} is empty in {brief(row)}; leave such rows out")
    return text


def _join_parts(parts: Sequence[Any], field: str) -> str:
    """Return the text of content parts, such as `[{"type": "text", "text": "..."}]`."""
    texts = []
    for part in parts:
        if not isinstance(part, Mapping):
            raise ValueError(
                f"{field} is a list that is not of texts, {brief(parts)}; join it to one text"
            )
        if not isinstance(part.get("text"), str):
            kind = part.get("type", "unknown")
            raise ValueError(f"a part of {field} is of type {kind}, and only text can be learned")
        texts.append(part["text"])
    return "".join(texts)


# --- conversations -------------------------------------------------------------------------------


class _Conversations:
    """Rows that become conversations, each split where the first answer to learn begins."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        read: Reader,
        columns: Collection[str],
        learn_all: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._read = read
        self._learn_all = learn_all
        self._marks_answers = marks_answers(tokenizer)
        self._template = tokenizer.chat_template
        if self._marks_answers:  # trl renders its own form of some templates
            self._template = get_training_chat_template(tokenizer) or self._template
        self._shown: set[Any] = set()
        self._keys: set[str] = set()
        self._read_keys: set[str] = set()
        self._leaves_answers = False
        self.columns = {*columns, *FOR_TEMPLATES}

    def features(self, columns: Collection[str]) -> dict[str, Any]:
        """Return the kinds of the columns that rows get."""
        names = ["messages"] if self._learn_all else [*SPLIT]
        names += [name for name in FOR_TEMPLATES if name in columns]
        return dict.fromkeys(names, Json())

    @property
    def remarks(self) -> Sequence[str]:
        """What the rows so far hold and `trl` will not learn."""
        remarks = []
        unread = self._keys - self._read_keys
        if unread:
            keys = ", ".join(sorted(unread))
            remarks.append(f"the chat template does not read this of messages: {keys}")
        if self._leaves_answers:
            remarks.append(
                "of a conversation, only the last answer is learned, because trl can't mark "
                "answers in this chat template"
            )
        return remarks

    def form_row(self, row: Row) -> Row:
        """Return a conversation, with what the chat template needs beside it."""
        messages = self._read(row)
        formed: Message = {}
        if "tools" in row:
            formed["tools"] = _parse_json(row["tools"], "tools")
        if "chat_template_kwargs" in row:
            options = _parse_json(row["chat_template_kwargs"], "chat_template_kwargs")
            formed["chat_template_kwargs"] = options or {}
        learned = _find_learned_answers(messages)
        if self._learn_all and any(message.get("weight") == 0 for message in messages):
            raise ValueError(
                "it has weights of 0, and --assistant_only_loss False learns all of it"
            )
        for message in messages:
            message.pop("weight", None)
            self._note_keys(message)
        self._require_shown(messages, **formed)
        if self._learn_all:
            return {"messages": messages, **formed}
        first, last = self._choose_completion(messages, learned)
        return {"prompt": messages[:first], "completion": messages[first : last + 1], **formed}

    def _choose_completion(
        self, messages: Sequence[Message], learned: Sequence[int]
    ) -> tuple[int, int]:
        """Return the positions of the first and the last message of what `trl` learns.

        Where it can mark answers, it learns all answers in the completion, and so it starts at the
        first answer to learn. Elsewhere, it learns the completion whole: the last answer alone.
        """
        first = learned[0]
        last = learned[-1]
        if not self._marks_answers:
            self._leaves_answers |= first != last
            first = last
        elif len(learned) < sum(_is_answer(message) for message in messages[first : last + 1]):
            raise ValueError(
                "an answer of weight 0 stands between others, and trl learns all answers after "
                "the first; split the row there"
            )
        if first == 0:
            raise ValueError(
                "it begins with an answer; put a question before it, or give it the weight 0"
            )
        return first, last

    def _note_keys(self, message: Message) -> None:
        """Remember what else a message has. Texts are looked for when they are rendered."""
        for key in message.keys() - KEYS_OF_MESSAGES:
            self._keys.add(key)
            is_text = isinstance(message[key], str)
            if not is_text and re.search(rf"\b{re.escape(key)}\b", self._template):
                self._read_keys.add(key)

    def _require_shown(
        self, messages: Sequence[Message], tools: Any = None, chat_template_kwargs: Any = None
    ) -> None:
        """Raise if the chat template leaves out a message, a call of a tool, or the tools.

        Whether it does depends on the roles, and not on the words: conversations with the same
        roles are tried once, with words that can be found again.
        """
        marked = [_with_marks(message, position) for position, message in enumerate(messages)]
        shape = json.dumps([marked, bool(tools), chat_template_kwargs])
        if shape in self._shown:
            return
        options = chat_template_kwargs if chat_template_kwargs else {}
        try:
            shown = self._tokenizer.apply_chat_template(
                marked,
                tools=tools,
                tokenize=False,
                chat_template=self._template,
                **options,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"the chat template refuses it: {error}") from error
        for key in self._keys - self._read_keys:
            if any(message.get(key) in shown for message in marked if key in message):
                self._read_keys.add(key)
        for message in marked:
            lost = [mark for mark in _marks(message) if mark not in shown]
            if lost:
                what = "calls of tools" if message.get("tool_calls") else "messages"
                raise ValueError(
                    f"the chat template leaves out {what} of the role {message['role']}; give "
                    "another with --chat_template_path"
                )
        for tool in tools or ():
            if tool.get("function", tool)["name"] not in shown:
                raise ValueError(
                    "the chat template leaves out the tools; give another with --chat_template_path"
                )
        self._shown.add(shape)


def _find_learned_answers(messages: Sequence[Message]) -> list[int]:
    """Return the positions of the answers to learn: those whose weight is not 0."""
    learned = []
    for position, message in enumerate(messages):
        weight = message.get("weight", 1)
        if weight not in (0, 1):
            raise ValueError(f"the weight of a message must be 0 or 1, got {brief(weight)}")
        if not _is_answer(message) or not weight:
            continue
        if not (message["content"].strip() or message.keys() - {"role", "content", "weight"}):
            raise ValueError(
                f"message {position + 1} is an empty answer; leave it out, or give it the weight 0"
            )
        learned.append(position)
    if not learned:
        raise ValueError("there is no answer to learn in it")
    return learned


def _is_answer(message: Message) -> bool:
    return bool(message["role"] == "assistant")


def _with_marks(message: Message, position: int) -> Message:
    """Return a message with words that can be found again in what a template renders."""
    marked: Message = {"role": message["role"], "content": ""}
    for key in message.keys() - KEYS_OF_MESSAGES:
        if isinstance(message[key], str):
            marked[key] = f"{key}-{position}-"
    if message["content"]:
        marked["content"] = f"content-{position}-"
    calls = [
        {
            "name": f"call-{position}-{number}-",
            "arguments": {"key": f"argument-{position}-{number}-"},
        }
        for number, _ in enumerate(message.get("tool_calls", ()))
    ]
    if calls:
        marked["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return marked


def _marks(message: Message) -> list[str]:
    """Return the words that `_with_marks` has put into a message."""
    marks = [message["content"]]
    for call in message.get("tool_calls", ()):
        marks += [call["function"]["name"], call["function"]["arguments"]["key"]]
    return marks


# --- the messages of a row -----------------------------------------------------------------------


def _read_pair(row: Row, question: str, answer: str) -> list[Message]:
    """Return a question and its answer as messages, after those of `system` and `history`."""
    query = _text(row, question)
    if question == "instruction" and row.get("input"):
        query += f"\n\n{_text(row, 'input')}"
    response = {"role": "assistant", "content": _answer(row, answer)}
    return [*_system(row), *_history(row), {"role": "user", "content": query}, response]


def _read_conversation(row: Row, field: str) -> list[Message]:
    messages = _messages(row[field], field)
    system = _system(row)
    if system and messages[0]["role"] == "system":
        raise ValueError("it has a system message, and a text in the column system")
    return [*system, *messages]


def _read_split_conversation(row: Row) -> list[Message]:
    """Return the messages of `prompt` and `completion`; those of the prompt are not learned."""
    prompt = [{**message, "weight": 0} for message in _messages(row["prompt"], "prompt")]
    return [*prompt, *_messages(row["completion"], "completion")]


def _system(row: Row) -> list[Message]:
    if not row.get("system"):
        return []
    return [{"role": "system", "content": _text(row, "system")}]


def _history(row: Row) -> list[Message]:
    """Return the earlier turns of a row: pairs of question and answer, or messages."""
    earlier = _parse_json(row.get("history"), "history") or []
    if earlier and isinstance(earlier[0], Mapping):
        return _messages(earlier, "history")
    messages = []
    for pair in earlier:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"history needs pairs of question and answer, got {brief(pair)}")
        question, answer = map(str, pair)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def _messages(value: Any, field: str) -> list[Message]:
    """Return the messages in a field, which may be JSON."""
    given = _parse_json(value, field)
    if not isinstance(given, list) or not given:
        raise ValueError(f"{field} must be a list of messages, got {brief(given)}")
    return [_message(item) for item in given]


def _message(given: Any) -> Message:
    """Return a message with a role and a content, as chat templates read it."""
    if not isinstance(given, Mapping):
        raise ValueError(f"a message must have a role and a content, got {brief(given)}")
    # In a table, a message has all keys that any message has.
    message = {key: value for key, value in given.items() if value is not None}
    role = message.pop("role", None)
    if "from" in message:
        role = message.pop("from")
    if not isinstance(role, str):
        raise ValueError(f"there is no text as role in {brief(given)}")
    content = message.pop("content", None)
    if "value" in message:
        content = message.pop("value")
    calls = _parse_json(message.pop("tool_calls", None), "tool_calls") or []
    if role == CALL:
        role = "assistant"
        calls = _parse_json(content, CALL)
        if not isinstance(calls, list):
            calls = [calls]
        content = None
    message["role"] = ROLES.get(role, role)
    if calls:
        message["tool_calls"] = [_call(call) for call in calls]
        if content is None:
            content = ""
    if message["role"] == "tool" and isinstance(content, Mapping):
        content = json.dumps(content, ensure_ascii=False)
    message["content"] = _text({**given, "content": content}, "content")
    return message


def _call(given: Any) -> Message:
    """Return the call of a tool in the form of chat templates, with its arguments as an object."""
    if not isinstance(given, Mapping):
        raise ValueError(f"the call of a tool needs a name and arguments, got {brief(given)}")
    call = given.get("function", given)
    if not isinstance(call, Mapping) or "name" not in call:
        raise ValueError(f"the call of a tool needs a name and arguments, got {brief(given)}")
    arguments = _parse_json(call.get("arguments"), f"arguments of {call['name']}") or {}
    outer = {key: value for key, value in given.items() if key not in ("name", "arguments")}
    return {"type": "function", **outer, "function": {**call, "arguments": arguments}}


def _parse_json(value: Any, field: str) -> Any:
    """Return a value, or what it says as JSON if it is a text; None if the text is empty."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{field} is a text that is not JSON ({error}): {brief(value)}") from error
