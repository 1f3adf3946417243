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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets, interleave_datasets, load_dataset
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
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
"""The roles of ShareGPT -> those of chat templates."""

FORMS = ({"prompt", "completion"}, {"input_ids"})  # columns that `trl` trains on as they are


def load_rows(data: str, split: str = "train") -> Dataset:
    """Return the rows of a file, a glob, a folder or a data set; `split` is as in `datasets`."""
    suffix = Path(data.removesuffix(".gz")).suffix.lower()
    files = sorted(glob.glob(data))
    if suffix not in BUILDERS:
        if files and not Path(data).is_dir():
            raise ArgumentError(f"{data} must end with one of {', '.join(BUILDERS)}")
        return load_dataset(data, split=split)
    if not any(Path(file).stat().st_size for file in files):
        raise ArgumentError(f"there is no file {data}, or it is empty")
    options = {"delimiter": "\t"} if suffix == ".tsv" else {}
    return load_dataset(BUILDERS[suffix], data_files=files, split=split, **options)


def mixed(sets: Sequence[Dataset], weights: Sequence[float], seed: int) -> Dataset:
    """Return the rows of several sets: each row once, or drawn by weight until all were seen."""
    forms = {", ".join(sorted(one.column_names)) for one in sets}
    if len(forms) > 1:
        raise ArgumentError(f"the data sets must have one form, got {' and '.join(sorted(forms))}")
    if not weights:
        return concatenate_datasets(list(sets))
    if len(weights) != len(sets):
        raise ArgumentError(f"{len(sets)} data sets need as many weights, got {len(weights)}")
    shares = [weight / sum(weights) for weight in weights]
    return interleave_datasets(
        list(sets), probabilities=shares, seed=seed, stopping_strategy="all_exhausted"
    )


def formed(rows: Dataset, fields: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return rows as `trl` trains them: as a conversation if there is a chat template."""
    columns = set(rows.column_names)
    fields = fields or _known_fields(columns)
    absent = [field for field in fields if field not in columns]
    if absent or len(fields) > 2:
        raise ArgumentError(
            f"the rows have the fields {', '.join(rows.column_names)}; --dataset_field must name "
            f"one or two of them, got {' '.join(fields)}"
        )
    if len(rows) == 0:
        raise ArgumentError("there are no rows")
    if not fields:
        return rows
    if len(fields) == 2:
        return _mapped(rows, _pair, fields=fields, chat=bool(tokenizer.chat_template))
    if not isinstance(rows[0][fields[0]], list):
        return _mapped(rows, _text, field=fields[0])
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
    """Return the fields of a known form; () for a form that `trl` takes as it is."""
    if any(form <= columns for form in FORMS):
        return ()
    if {"instruction", "output"} <= columns:
        return ("instruction", "output")
    if {"query", "response"} <= columns:
        return ("query", "response")
    for field in ("messages", "conversations", "text"):
        if field in columns:
            return (field,)
    raise ArgumentError(
        f"the rows have the fields {', '.join(sorted(columns))}; name the question and the answer "
        "with --dataset_field"
    )


def _mapped(rows: Dataset, form: Any, **options: Any) -> Dataset:
    return rows.map(
        form, fn_kwargs=options, remove_columns=rows.column_names, desc="Forming the rows"
    )


def _pair(row: Mapping[str, Any], fields: Sequence[str], chat: bool) -> dict[str, Any]:
    query, response = (_filled(row, field) for field in fields)
    if fields[0] == "instruction" and row.get("input"):
        query += f"\n\n{row['input']}"
    if not chat:
        return {"prompt": query, "completion": f"\n{response}"}
    return {
        "prompt": [{"role": "user", "content": query}],
        "completion": [{"role": "assistant", "content": response}],
    }


def _text(row: Mapping[str, Any], field: str) -> dict[str, str]:
    return {"text": _filled(row, field)}


def _filled(row: Mapping[str, Any], field: str) -> str:
    if row[field] is None:
        raise ArgumentError(f"a row has no {field}: {brief(row)}; fill it, or remove the row")
    return str(row[field])


def _messages(row: Mapping[str, Any], field: str, split: bool) -> dict[str, Any]:
    """Return a conversation, split before its last answer if only this one can be learned."""
    messages = [_message(one) for one in row[field]]
    return (
        {"prompt": messages[:-1], "completion": messages[-1:]} if split else {"messages": messages}
    )


def _message(said: Mapping[str, Any]) -> dict[str, Any]:
    if "from" in said:
        return {"role": ROLES.get(said["from"], said["from"]), "content": said["value"]}
    return dict(said)
