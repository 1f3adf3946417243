"""The tokenizer of a base, with what an adapter notes: its template, its tokens, its last token."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from disha.errors import ArgumentError
from disha.finetune.notes import EOS_KEY, TEMPLATE_KEY, read_noted_tokens
from disha.finetune.source import explain_loading, source_of
from disha.text import brief


def load_tokenizer(name: str, notes: Mapping[str, str]) -> tuple[PreTrainedTokenizerBase, int]:
    """Return a base's tokenizer with what notes ask for, and how many new tokens it has."""
    source, options = source_of(name)
    tokenizer: Any
    with explain_loading(name):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if TEMPLATE_KEY in notes:
        tokenizer.chat_template = notes[TEMPLATE_KEY]
    elif tokenizer.chat_template:
        tokenizer.chat_template = tokenizer.get_chat_template()  # of several, the default
    if EOS_KEY in notes:
        tokenizer.eos_token = notes[EOS_KEY]
    known = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    size = len(tokenizer)  # what `add_tokens` returns counts words of the vocabulary too
    for token in read_noted_tokens(notes):
        if token not in known:
            tokenizer.add_tokens(token, special_tokens=token == notes.get(EOS_KEY))
    return tokenizer, len(tokenizer) - size


def template_at(name: str) -> str:
    """Return the chat template in a file, or that of a model."""
    path = Path(name)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    tokenizer, _ = load_tokenizer(name, {})
    return tokenizer.get_chat_template()


def fit_to_tokenizer(model: Any, tokenizer: Any, added: int) -> None:
    """Give a model rows for the tokens that were added last, at the mean of the others."""
    if not added:
        return
    known = len(tokenizer) - added
    if len(tokenizer) > len(model.get_input_embeddings().weight):  # some tables have spare rows
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None:
            rows = layer.weight.data
            rows[known : len(tokenizer)] = rows[:known].mean(0)


def end_answers(generation: Any, tokenizer: Any, notes: Mapping[str, str]) -> None:
    """Let answers end as the notes say, and as turns end in the chat template if there is one."""
    known = generation.eos_token_id
    ends = {known} if isinstance(known, int) else {*(known or ())}
    if EOS_KEY in notes:
        if tokenizer.eos_token_id in (None, tokenizer.unk_token_id):
            raise ArgumentError(
                f"answers are to end with {brief(notes[EOS_KEY])}, which is not a token of the "
                "base; choose another token, or name the base that the adapter was trained on"
            )
        ends.add(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        turns = [{"role": role, "content": role} for role in ("user", "assistant")]
        text = ""
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        except TemplateError as error:  # such as of one that wants a system message first
            warnings.warn(
                f"the chat template does not show how answers end: {brief(str(error))}; disha "
                "finetune takes their last token as --eos_token",
                stacklevel=2,
            )
        # The last "assistant" is what the answer says; the one before it is the role.
        rest = text.rpartition("assistant")[2]
        first = tokenizer.encode(rest, add_special_tokens=False)[:1]
        ends.update(token for token in first if token in tokenizer.added_tokens_decoder)
    generation.eos_token_id = sorted(ends) or None
