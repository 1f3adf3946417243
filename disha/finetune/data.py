"""The rows: read by `datasets`, and brought into a form that `trl` trains on.

| columns of a row | what is learned |
|---|---|
| `prompt` and `completion` | the completion |
| `messages`, or ShareGPT's `conversations` | the answers |
| `instruction`, `input` and `output`, as Alpaca has them | the output |
| `query` and `response`, or two fields by name | the second |
| `text`, or one field by name | all of it |
"""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from datasets import (
    Dataset,
    Features,
    Json,
    Value,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
)
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template

from disha.errors import ArgumentError
from disha.text import brief

BUILDERS = {
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".tsv": "csv",
    ".txt": "text",
}
FORMS = (
    ("instruction", "output"),
    ("query", "response"),
    ("messages",),
    ("conversations",),
    ("text",),
)
"""The fields by which a form is known, in the order in which they are looked for."""

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
"""The roles of ShareGPT -> those of chat templates."""

TEXT = Value("string")
AS_WRITTEN = {"csv": TEXT, "json": Json()}
"""A format whose values `datasets` may take for others -> the kind that keeps them."""

OF_TEMPLATES = ("tools", "chat_template_kwargs")
"""Columns that `trl` hands to the chat template."""


def load_rows(data: str, split: str = "train") -> Dataset:
    """Return the rows of a file, a glob, a folder or a data set; `split` is as in `datasets`."""
    suffix = Path(data.removesuffix(".gz")).suffix.lower()
    files = sorted(glob.glob(data))
    builder = data
    options = dict[str, Any]()
    if suffix in BUILDERS:
        builder = BUILDERS[suffix]
        options["data_files"] = files
        if not any(Path(file).stat().st_size for file in files):
            raise ArgumentError(f"there is no file {data}, or it is empty")
    elif files and not Path(data).is_dir():
        raise ArgumentError(f"{data} must end with one of {', '.join(BUILDERS)}")
    if suffix == ".tsv":
        options["delimiter"] = "\t"
    try:
        rows = load_dataset(builder, split=split, **options)
        # Read again, as it is written, what was taken for a number or a date, such as 007.
        read_by = rows.info.builder_name
        kinds = {
            name: AS_WRITTEN.get(read_by, kind)
            for name, kind in rows.features.items()
            if read_by == "csv" or "timestamp[" in str(kind)
        }
        if read_by == "csv":  # text such as NA is no missing value
            options |= {"keep_default_na": False, "na_values": [""]}
        if kinds:
            options["features"] = Features(rows.features | kinds)
            rows = load_dataset(builder, split=split, **options)
    except (DatasetGenerationError, OSError, ValueError) as error:
        if len(files) > 1:
            for file in files:  # the one that is wrong raises
                load_rows(glob.escape(file), split)
        found = builder in ("csv", "json", "text") and data[-3:] != ".gz" and _wrong_line(files[0])
        raise ArgumentError(f"can't read {data}: {found or error.__cause__ or error}") from error
    if builder == "text":
        rows = rows.filter(lambda row: row["text"].strip())
    if len(rows) == 0:
        raise ArgumentError(f"{data} has no rows")
    rows.info.description = data if split == "train" else f"{data}, {split}"
    return rows


def _wrong_line(path: str) -> str | None:
    """Return the first line that is not UTF-8, or no JSON where each line is."""
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        try:
            text = line.decode()
            if text.strip() and path.endswith((".jsonl", ".ndjson")):
                json.loads(text)
        except ValueError as error:
            return f"line {number}: {str(error).partition(': line 1')[0]}"
    return None


def mixed(sets: list[Dataset], weights: Sequence[float], seed: int) -> Dataset:
    """Return the rows of several sets: each row once, or drawn by weight until all were seen."""
    forms = {", ".join(sorted(rows.column_names)) for rows in sets}
    if len(forms) > 1:
        raise ArgumentError(f"the data sets must have one form, got {' and '.join(sorted(forms))}")
    if not weights:
        return concatenate_datasets(sets)
    if len(weights) != len(sets) or min(weights) <= 0:
        raise ArgumentError(f"{len(sets)} data sets need as many weights above 0, got {weights}")
    shares = [weight / sum(weights) for weight in weights]
    return interleave_datasets(
        sets, probabilities=shares, seed=seed, stopping_strategy="all_exhausted"
    )


def formed(rows: Dataset, fields: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return rows as `trl` trains them: as a conversation if there is a chat template."""
    columns = set(rows.column_names)
    fields = fields or _known_fields(columns)
    absent = [field for field in fields if field not in columns]
    if absent or len(fields) > 2:
        raise ArgumentError(
            f"the rows have the fields {', '.join(rows.column_names)}; name the question and the "
            "answer, or a text, with --dataset_field, as one or two of them, got "
            f"{' '.join(fields) or 'none'}"
        )
    if not fields:
        if "input_ids" in columns or isinstance(rows[0]["prompt"], list):
            return rows
        return _mapped(rows, _texts, TEXT, fields={"prompt": "prompt", "completion": "completion"})
    if len(fields) == 2:
        is_chat = bool(tokenizer.chat_template)
        return _mapped(rows, _pair, None if is_chat else TEXT, fields=fields, is_chat=is_chat)
    if not isinstance(rows[0][fields[0]], list):
        return _mapped(rows, _texts, TEXT, fields={"text": fields[0]})
    if not tokenizer.chat_template:
        raise ArgumentError(
            "the rows are conversations, and the model has no chat template; give one with "
            "--chat_template_path"
        )
    return _mapped(rows, _messages, field=fields[0], split=not masks_answers(tokenizer))


def masks_answers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether `trl` can tell the answers in a conversation from the rest."""
    try:
        get_training_chat_template(tokenizer)
    except ValueError:
        return False
    return True


def _known_fields(columns: set[str]) -> Sequence[str]:
    """Return the fields of a known form, or one without a name; () for a form of `trl`."""
    if {"prompt", "completion"} <= columns or "input_ids" in columns:
        return ()
    return next((fields for fields in FORMS if columns.issuperset(fields)), ("",))


def _mapped(rows: Dataset, form: Any, kind: Any = None, **options: Any) -> Dataset:
    """Return rows in another form; `kind` is that of a value in it, if all are of one kind."""
    name = rows.info.description or "the data"

    def formed_row(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        try:
            return form(row, **options)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ArgumentError(f"row {index + 1} of {name} can't be used: {error}") from error

    return rows.map(
        formed_row,
        with_indices=True,
        remove_columns=[name for name in rows.column_names if kind or name not in OF_TEMPLATES],
        features=kind and Features(dict.fromkeys(formed_row(rows[0], 0), kind)),
        desc="Forming the rows",
    )


def _pair(row: Mapping[str, Any], fields: Sequence[str], is_chat: bool) -> dict[str, Any]:
    query, response = (_filled(row, field) for field in fields)
    if fields[0] == "instruction" and row.get("input"):
        query += f"\n\n{row['input']}"
    if not is_chat:
        return {"prompt": query, "completion": f"\n{response}"}
    return {
        "prompt": [{"role": "user", "content": query}],
        "completion": [{"role": "assistant", "content": response}],
    }


def _texts(row: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, str]:
    return {name: _filled(row, field) for name, field in fields.items()}


def _filled(row: Mapping[str, Any], field: str) -> str:
    if isinstance(row.get(field), (NoneType, dict)):
        raise ArgumentError(f"there is no text as {field} in {brief(row)}")
    return str(row[field])


def _messages(row: Mapping[str, Any], field: str, split: bool) -> dict[str, Any]:
    """Return a conversation, split before its last answer if only this one can be learned."""
    messages = [_message(said) for said in row[field]]
    roles = [said["role"] for said in messages]
    after = len(roles) - roles[::-1].index("assistant")  # an error, if there is no answer
    if split:
        return {"prompt": messages[: after - 1], "completion": messages[after - 1 : after]}
    return {"messages": messages}


def _message(said: Mapping[str, Any]) -> dict[str, Any]:
    if "from" in said:
        said = {"role": ROLES.get(said["from"], said["from"]), "content": said["value"]}
    _filled(said, "role")
    if not said.get("tool_calls"):
        _filled(said, "content")
    return dict(said)
