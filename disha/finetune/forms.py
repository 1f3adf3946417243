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
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from datasets import Dataset, Features, Json, Value
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl import is_conversational, maybe_convert_to_chatml
from trl.chat_template_utils import (
    get_training_chat_template,
    is_chat_template_stop_token_trained,
)

from disha.errors import ArgumentError
from disha.text import first_few

Row = Mapping[str, Any]
Message = dict[str, Any]

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


def form_rows(
    rows: Dataset,
    named: Sequence[str],
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
    fields = _choose_fields(columns, named)
    has_messages = _holds_messages(rows[0][fields[0]])
    if has_messages and not tokenizer.chat_template:
        raise ArgumentError(
            "the rows are conversations, and the model has no chat template; give one with "
            "--chat_template_path"
        )
    conversations = _Conversations(fields, has_messages, tokenizer, learn_all)
    is_literal = fields == SPLIT and not named
    form: Callable[[Row], Row] = conversations.form
    used = {*fields, *conversations.beside}
    if not has_messages and (is_literal or len(fields) == 1):
        form = partial(_form_texts, fields=fields)
        used = {*fields}

    def form_row(row: Row, index: int) -> Row:
        try:
            return form(row)
        except (LookupError, TypeError, ValueError, AttributeError, TemplateError) as error:
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
    remarks = conversations.remarks()
    unused = [column for column in columns if column not in used]
    if unused:
        remarks.insert(0, f"not used: the columns {first_few(unused, 5, ', ')}")
    for remark in remarks:
        warnings.warn(f"{name}: {remark}", stacklevel=2)
    return formed


def learns_marked_answers(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether `trl` should learn the marked answers of formed rows, and nothing else."""
    return is_conversational(rows[0]) and bool(_training_template(tokenizer))


def _training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the chat template in which `trl` marks answers, which may be a form of its own."""
    try:
        template = get_training_chat_template(tokenizer) or tokenizer.chat_template
    except ValueError:
        return None
    # In some templates, the mark ends before the token that ends the answer, so a model that
    # learns what is marked would not learn to stop.
    return template if is_chat_template_stop_token_trained(tokenizer, template) else None


# --- how a row is read ---------------------------------------------------------------------------


def _choose_fields(columns: Sequence[str], named: Sequence[str]) -> tuple[str, ...]:
    """Return the fields of a question and its answer, or the field of a text or of messages."""
    known = [fields for fields in KNOWN_FIELDS if set(fields) <= set(columns)]
    fields = tuple(named) if named or not known else known[0]
    if not set(fields) <= set(columns) or len(fields) not in (1, 2):
        raise ArgumentError(
            f"the rows have the fields {', '.join(columns)}; name the question and the answer, or "
            f"a text, with --dataset_field, as one or two of them, got {' '.join(fields) or 'none'}"
        )
    return fields


def _holds_messages(value: Any) -> bool:
    """Return whether a value is a list of messages, also as JSON."""
    with suppress(ValueError):
        value = _parse_json(value)
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and ("role" in first or "from" in first)


def _form_texts(row: Row, fields: Sequence[str]) -> Row:
    """Return texts as they are, by the names that `trl` has for one or for two."""
    names = SPLIT if len(fields) == 2 else ("text",)
    return {name: _text(row[field], field) for name, field in zip(names, fields, strict=True)}


def _text(value: Any, field: str) -> str:
    """Return the text in a field. Numbers become text, and parts of a text are joined."""
    if isinstance(value, list):
        if all(isinstance(part, Mapping) and "text" in part for part in value):
            return "".join(part["text"] for part in value)
        value = None
    if value is None or isinstance(value, Mapping):
        raise ValueError(f"there is no text as {field}, and only text can be learned")
    return str(value)


def _read_messages(given: Any) -> list[Message]:
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

    def __init__(
        self,
        fields: Sequence[str],
        has_messages: bool,
        tokenizer: PreTrainedTokenizerBase,
        learn_all: bool,
    ) -> None:
        *self._asked, self._answered = fields
        self._has_messages = has_messages
        self._tokenizer = tokenizer
        self._learn_all = learn_all
        self._stays_whole = learn_all and not self._asked
        self._training_template = None
        self.beside = ["system"]
        """The columns that are used beside the fields."""
        if self._asked == ["instruction"]:
            self.beside.append("input")
        if tokenizer.chat_template:
            self.beside += FOR_TEMPLATES
            self._training_template = _training_template(tokenizer)
        self._tried: set[str] = set()
        self._shown_keys: set[str] = set()
        self._hidden_keys: set[str] = set()
        self._leaves_answers = False

    def form(self, row: Row) -> Row:
        """Return a row as a conversation, with what the chat template needs beside it."""
        messages = self._read(row)
        weights = [message.pop("weight", 1) for message in messages]
        first, last = self._choose_completion(messages, weights)
        prompt = messages[:first]
        completion = messages[first : last + 1]
        if not self._tokenizer.chat_template:  # a question and its answer, each on a line
            question = "\n".join(message["content"] for message in prompt)
            return {"prompt": question, "completion": f"\n{completion[0]['content']}"}
        beside = {key: _parse_json(row[key]) for key in FOR_TEMPLATES if key in row}
        self._try_template(messages, **beside)
        if self._stays_whole:
            return {"messages": messages, **beside}
        return {"prompt": prompt, "completion": completion, **beside}

    def remarks(self) -> list[str]:
        """Return what the rows so far hold and `trl` will not learn."""
        remarks = []
        unread = sorted(self._hidden_keys - self._shown_keys)
        if unread:
            remarks.append(f"the chat template does not read this of messages: {', '.join(unread)}")
        if self._leaves_answers:
            remarks.append(
                "of a conversation, only the last answer is learned, because trl can't mark "
                "answers in this chat template"
            )
        return remarks

    def _read(self, row: Row) -> list[Message]:
        """Return the messages of a row. Those that only ask have the weight 0."""
        asking = [turn for field in self._asked for turn in self._turns(row, field, "user")]
        if "input" in self.beside and row.get("input"):
            asking[0]["content"] += f"\n\n{_text(row['input'], 'input')}"
        messages = [{**message, "weight": 0} for message in asking]
        messages += self._turns(row, self._answered, "assistant")
        if row.get("system"):
            messages.insert(0, {"role": "system", "content": _text(row["system"], "system")})
        return messages

    def _turns(self, row: Row, field: str, role: str) -> list[Message]:
        """Return the messages in a field, or its text as a message of a role."""
        if self._has_messages:
            return _read_messages(row[field])
        return [{"role": role, "content": _text(row[field], field)}]

    def _choose_completion(
        self, messages: Sequence[Message], weights: Sequence[Any]
    ) -> tuple[int, int]:
        """Return the positions of the first and the last message of what `trl` learns.

        Where it can mark answers, it learns all answers in the completion, and so it starts at the
        first answer to learn. Elsewhere, it learns the completion whole: the last answer alone.
        """
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        learned = [n for n in answers if weights[n]]
        if not learned:
            raise ValueError("there is no answer to learn in it")
        allowed = {1} if self._stays_whole else {0, 1}
        if not set(weights) <= allowed:
            raise ValueError("the weight of a message is 0 or 1, and only 1 where all is learned")
        first = learned[0]
        last = learned[-1]
        if self._training_template is None:
            self._leaves_answers |= first != last and not self._learn_all
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
        options = chat_template_kwargs or {}
        shown = self._tokenizer.apply_chat_template(
            marked,
            tools=tools,
            tokenize=False,
            chat_template=self._training_template or self._tokenizer.chat_template,
            **options,
        )
        for position, message in enumerate(messages):
            for key in message.keys() - {"role"}:
                if message[key] == "" or _mark_of(key, position) in shown:
                    self._shown_keys.add(key)
                elif key in ("content", "tool_calls"):
                    raise ValueError(
                        f"the chat template leaves out the {key} of the role {message['role']}; "
                        "give another with --chat_template_path"
                    )
                else:
                    self._hidden_keys.add(key)
        if any(tool.get("function", tool)["name"] not in shown for tool in tools or ()):
            raise ValueError(
                "the chat template leaves out the tools; give another with --chat_template_path"
            )
        self._tried.add(shape)


def _mark(message: Message, position: int) -> Message:
    """Return a message with words that can be found again in what a template renders."""
    marked = dict(message)
    for key, value in message.items():
        if key != "role" and value != "":
            marked[key] = _mark_of(key, position)
    if "tool_calls" in message:
        call = {"name": marked["tool_calls"], "arguments": {"key": marked["tool_calls"]}}
        marked["tool_calls"] = [{"type": "function", "function": call}] * len(message["tool_calls"])
    return marked


def _mark_of(key: str, position: int) -> str:
    return f"{key}-{position}-"
