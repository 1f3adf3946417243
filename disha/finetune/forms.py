"""The form of a row: whichever form it comes in, it becomes one that `trl` trains on.

A row that asks and answers becomes a conversation, in the same way for every chat template:

| columns of a row | its messages |
|---|---|
| `messages`, or `conversations` of ShareGPT, as a list or as JSON | those |
| `prompt` and `completion`, as lists of messages | both; the completion is learned |
| `instruction`, `input` and `output` of Alpaca | a question with its input, an answer |
| `query` and `response`, or two fields by name | a question, an answer |
| `system`, beside these | a message before them |

The conversation is split where the first answer to learn begins, because `trl` learns completions.
Of a completion, it learns the answers where it can mark them in the chat template. Elsewhere, the
completion is the last answer alone. Texts (`text`, or `prompt` and `completion`) stay texts.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from datasets import Dataset, Features, Json, Value
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl import is_conversational, maybe_convert_to_chatml
from trl.chat_template_utils import get_training_chat_template

from disha.errors import ArgumentError
from disha.text import brief, first_few

Row = Mapping[str, Any]
Message = dict[str, Any]
Reader = Callable[[Row], Row]
"""Takes a row, and returns its texts, or its `messages`. An answer may have the weight 0."""

SPLIT = ("prompt", "completion")
KNOWN_FIELDS = (
    SPLIT,
    ("instruction", "output"),
    ("query", "response"),
    ("messages",),
    ("conversations",),
    ("text",),
)
"""The fields by which a form is known, in the order in which they are looked for."""

ROLES = {"human": "user", "gpt": "assistant"}
"""The roles of ShareGPT -> those of chat templates."""

FOR_TEMPLATES = ("tools", "chat_template_kwargs")
"""Columns that `trl` hands to the chat template."""

KEYS_OF_MESSAGES = {"role", "content", "tool_calls"}


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
    name = rows.info.description or "the data"
    read, used, stays_whole = _choose_reader(rows, fields, bool(tokenizer.chat_template))
    conversations = _Conversations(tokenizer, learn_all and stays_whole)

    def form_row(row: Row, index: int) -> Row:
        try:
            found = read(row)
            if "messages" not in found:
                return found
            return conversations.form(found["messages"], row)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ArgumentError(f"row {index + 1} of {name} can't be used: {error}") from error

    kinds: dict[str, Any] = {}
    for column, value in form_row(rows[0], 0).items():
        kinds[column] = Value("string") if isinstance(value, str) else Json()
    formed = rows.map(
        form_row,
        with_indices=True,
        remove_columns=columns,
        features=Features(kinds),
        load_from_cache_file=False,  # what is not used is only seen while rows are formed
        desc="Forming the rows",
    )
    unused = [column for column in columns if column not in used]
    remarks = conversations.remarks()
    if unused:
        remarks.insert(0, f"not used: the columns {first_few(unused, 5, ', ')}")
    for remark in remarks:
        warnings.warn(f"{name}: {remark}", stacklevel=2)
    return formed


def learns_marked_answers(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether `trl` should learn the marked answers of formed rows, and nothing else."""
    is_split = set(SPLIT) <= set(rows.column_names)
    return is_split and is_conversational(rows[0]) and bool(_training_template(tokenizer))


def _training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the chat template in which `trl` marks answers, which may be a form of its own."""
    try:
        return get_training_chat_template(tokenizer) or tokenizer.chat_template
    except ValueError:
        return None


# --- how a row is read ---------------------------------------------------------------------------


def _choose_reader(
    rows: Dataset, named: Sequence[str], has_template: bool
) -> tuple[Reader, set[str], bool]:
    """Return what reads a row, the columns that it reads, and whether its rows may stay whole."""
    columns = rows.column_names
    known = [fields for fields in KNOWN_FIELDS if set(fields) <= set(columns)]
    fields = tuple(named) if named or not known else known[0]
    if not set(fields) <= set(columns) or len(fields) not in (1, 2):
        raise ArgumentError(
            f"the rows have the fields {', '.join(columns)}; name the question and the answer, or "
            f"a text, with --dataset_field, as one or two of them, got {' '.join(fields) or 'none'}"
        )
    has_messages = _holds_messages(rows[0][fields[0]])
    if has_messages and not has_template:
        raise ArgumentError(
            "the rows are conversations, and the model has no chat template; give one with "
            "--chat_template_path"
        )
    read: Reader
    used = {*fields}
    if has_messages and fields == SPLIT:
        read = _read_split_conversation
        used.add("system")
    elif has_messages and len(fields) == 1:
        read = partial(_read_conversation, field=fields[0])
        used.add("system")
    elif len(fields) == 1:
        return partial(_read_text, field=fields[0]), used, False
    elif fields == SPLIT and not named:
        return _read_completion, used, False
    else:
        read = partial(_read_pair, question=fields[0], answer=fields[1])
        used.add("system")
        if fields[0] == "instruction":
            used.add("input")
        if not has_template:
            return partial(_read_lines, read=read), used, False
    return read, used | {*FOR_TEMPLATES}, len(fields) == 1


def _holds_messages(value: Any) -> bool:
    """Return whether a value is a list of messages, also as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return False
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and ("role" in first or "from" in first)


def _read_text(row: Row, field: str) -> Row:
    return {"text": _text(row[field], field)}


def _read_completion(row: Row) -> Row:
    return {"prompt": _text(row["prompt"], "prompt"), "completion": _answer(row, "completion")}


def _read_pair(row: Row, question: str, answer: str) -> Row:
    """Return a question and its answer as messages, after that of `system`."""
    asked = _text(row[question], question)
    if question == "instruction" and row.get("input"):
        asked += f"\n\n{_text(row['input'], 'input')}"
    response = {"role": "assistant", "content": _answer(row, answer)}
    return {"messages": [*_system(row), {"role": "user", "content": asked}, response]}


def _read_lines(row: Row, read: Reader) -> Row:
    """Return a question and its answer as texts, each on a line: there is no chat template."""
    *asked, answer = read(row)["messages"]
    question = "\n".join(message["content"] for message in asked)
    return {"prompt": question, "completion": f"\n{answer['content']}"}


def _read_conversation(row: Row, field: str) -> Row:
    """Return the messages of a field, after that of `system`."""
    messages = _messages(row[field])
    system = _system(row)
    if system and messages[0]["role"] == "system":
        raise ValueError("it has a system message, and a text in the column system")
    return {"messages": [*system, *messages]}


def _read_split_conversation(row: Row) -> Row:
    """Return the messages of `prompt` and `completion`; those of the prompt are not learned."""
    asked = _read_conversation(row, "prompt")["messages"]
    prompt = [{**message, "weight": 0} for message in asked]
    return {"messages": [*prompt, *_messages(row["completion"])]}


def _system(row: Row) -> list[Message]:
    if not row.get("system"):
        return []
    return [{"role": "system", "content": _text(row["system"], "system")}]


def _answer(row: Row, field: str) -> str:
    """Return the text in a field, which must not be empty."""
    text = _text(row[field], field)
    if not text.strip():
        raise ValueError(f"{field} is empty in {brief(row)}; leave such rows out")
    return text


def _text(value: Any, field: str) -> str:
    """Return the text in a field. Numbers become text, and parts of a text are joined."""
    if isinstance(value, list):
        if all(isinstance(part, Mapping) and "text" in part for part in value):
            return "".join(part["text"] for part in value)
        value = None
    if value is None or isinstance(value, Mapping):
        raise ValueError(f"there is no text as {field}, and only text can be learned")
    return str(value)


def _messages(given: Any) -> list[Message]:
    """Return messages, which may be JSON, as chat templates read them."""
    messages = [{**message} for message in _parse_json(given)]
    return [_message(one) for one in maybe_convert_to_chatml({"messages": messages})["messages"]]


def _message(given: Message) -> Message:
    """Return a message with the role of a chat template, a text, and calls of tools as objects."""
    # In a table, a message has all keys that any message has.
    message = {key: value for key, value in given.items() if value is not None}
    message["role"] = ROLES.get(message["role"], message["role"])
    calls = _parse_json(message.pop("tool_calls", None))
    if calls:
        message["tool_calls"] = [_call(call) for call in calls]
        message.setdefault("content", "")
    message["content"] = _text(message.get("content"), "content")
    return message


def _call(given: Message) -> Message:
    """Return the call of a tool in the form of chat templates, with its arguments as an object."""
    call = given if "function" in given else {"function": given}
    arguments = _parse_json(call["function"].get("arguments")) or {}
    return {"type": "function", **call, "function": {**call["function"], "arguments": arguments}}


def _parse_json(value: Any) -> Any:
    """Return a value, or what it says as JSON if it is a text; None if the text is empty."""
    if not isinstance(value, str):
        return value
    return json.loads(value) if value.strip() else None


# --- conversations -------------------------------------------------------------------------------


class _Conversations:
    """Splits conversations where the first answer to learn begins, and tries the chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, learn_all: bool) -> None:
        self._tokenizer = tokenizer
        self._learn_all = learn_all
        self._training_template = None
        if tokenizer.chat_template:
            self._training_template = _training_template(tokenizer)
        self._tried: set[str] = set()
        self._keys: set[str] = set()
        self._shown_keys: set[str] = set()
        self._leaves_answers = False

    def form(self, messages: list[Message], row: Row) -> Row:
        """Return a conversation, with what the chat template needs beside it."""
        beside = {key: _parse_json(row[key]) for key in FOR_TEMPLATES if key in row}
        first, last = self._choose_completion(messages)
        for message in messages:
            weight = message.pop("weight", 1)
            if weight not in (0, 1):
                raise ValueError(f"the weight of a message must be 0 or 1, got {brief(weight)}")
            if self._learn_all and weight == 0:
                raise ValueError(
                    "it has weights of 0, and --assistant_only_loss False learns all of it"
                )
        self._try_template(messages, **beside)
        if self._learn_all:
            return {"messages": messages, **beside}
        return {"prompt": messages[:first], "completion": messages[first : last + 1], **beside}

    def remarks(self) -> list[str]:
        """Return what the rows so far hold and `trl` will not learn."""
        remarks = []
        unread = sorted(self._keys - self._shown_keys)
        if unread:
            remarks.append(f"the chat template does not read this of messages: {', '.join(unread)}")
        if self._leaves_answers:
            remarks.append(
                "of a conversation, only the last answer is learned, because trl can't mark "
                "answers in this chat template"
            )
        return remarks

    def _choose_completion(self, messages: Sequence[Message]) -> tuple[int, int]:
        """Return the positions of the first and the last message of what `trl` learns.

        Where it can mark answers, it learns all answers in the completion, and so it starts at the
        first answer to learn. Elsewhere, it learns the completion whole: the last answer alone.
        """
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        learned = [n for n in answers if messages[n].get("weight", 1)]
        if not learned:
            raise ValueError("there is no answer to learn in it")
        for n in learned:
            message = messages[n]
            if not message["content"].strip() and message.keys() <= {"role", "content", "weight"}:
                raise ValueError(
                    f"message {n + 1} is an empty answer; leave it out, or give it the weight 0"
                )
        first = learned[0]
        last = learned[-1]
        if self._training_template is None:
            self._leaves_answers |= first != last
            first = last
        elif len(learned) < sum(first <= n <= last for n in answers):
            raise ValueError(
                "an answer of weight 0 stands between others, and trl learns all answers after "
                "the first; split the row there"
            )
        if first == 0:
            raise ValueError(
                "it begins with an answer; put a question before it, or give it the weight 0"
            )
        return first, last

    def _try_template(
        self, messages: Sequence[Message], tools: Any = None, chat_template_kwargs: Any = None
    ) -> None:
        """Raise if the chat template leaves out a message, a call of a tool, or the tools.

        Whether it does depends on the roles, and not on the words: conversations with the same
        roles are tried once, with words that can be found again.
        """
        marked = [_mark(message, position) for position, message in enumerate(messages)]
        shape = json.dumps([marked, bool(tools), chat_template_kwargs])
        if shape in self._tried:
            return
        template = self._training_template or self._tokenizer.chat_template
        options = chat_template_kwargs or {}
        try:
            shown = self._tokenizer.apply_chat_template(
                marked,
                tools=tools,
                tokenize=False,
                chat_template=template,
                **options,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"the chat template refuses it: {error}") from error
        for message in marked:
            for key in message.keys() - KEYS_OF_MESSAGES:
                self._keys.add(key)
                is_shown = re.search(rf"\b{re.escape(key)}\b", template) is not None
                if isinstance(message[key], str):
                    is_shown = message[key] in shown
                if is_shown:
                    self._shown_keys.add(key)
            calls = message.get("tool_calls", ())
            words = [message["content"]]
            for call in calls:
                words += [call["function"]["name"], call["function"]["arguments"]["key"]]
            if any(word not in shown for word in words):
                what = "calls of tools" if calls else "messages"
                raise ValueError(
                    f"the chat template leaves out {what} of the role {message['role']}; give "
                    "another with --chat_template_path"
                )
        if any(tool.get("function", tool)["name"] not in shown for tool in tools or ()):
            raise ValueError(
                "the chat template leaves out the tools; give another with --chat_template_path"
            )
        self._tried.add(shape)


def _mark(message: Message, position: int) -> Message:
    """Return a message with words that can be found again in what a template renders."""
    marked = dict(message)
    for key, value in message.items():
        if key != "role" and value and isinstance(value, str):
            marked[key] = f"{key}-{position}-"
    if "tool_calls" in message:
        call = {"name": f"call-{position}-", "arguments": {"key": f"argument-{position}-"}}
        marked["tool_calls"] = [{"type": "function", "function": call}] * len(message["tool_calls"])
    return marked
