"""Templates: the text around a query that makes it a prompt."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from disha.files import read_text
from disha.finetune.errors import SettingsError, TokenizerError, raised_as
from disha.finetune.text.chat import CHATML_TOKENS, render
from disha.finetune.text.tokenizer import Tokenizer, is_text

__all__ = ["CHATML", "PLAIN", "Template", "given_template", "template_from"]

QUERY = "{query}"
LARGEST_FILE = 1 << 20
"""Bytes of a file with a template."""

NAMES = ("auto", "chat")
"""The settings that are neither a text nor a file."""

STAND_IN = "stands-in-for-the-query"
ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


@dataclass(frozen=True)
class Template:
    """The text around a query: `before` + query + `after`. The response follows.

    Names of special tokens mean those tokens in `before` and `after`, but are text in a query.

    Args:
        before: the text before the query.
        after: the text between the query and the response.
        begins: whether the tokenizer's begin token comes first. False for a chat template, which
            writes its begin token itself.
        trims: whether white space around a query is removed.
    """

    before: str
    after: str
    begins: bool = True
    trims: bool = False

    @property
    def setting(self) -> str:
        r"""The setting that makes `template_from` return this template, with the same tokenizer."""
        if not self.begins:
            return "chat"
        before, after = (_escaped(text) for text in (self.before, self.after))
        return f"{before}{QUERY}{after}"

    def parts(self, query: str, tokenizer: Tokenizer) -> tuple[list[int], list[int], list[int]]:
        """Return the token ids of the text before a query, of the query, and of the text after it.

        The text before and the query are cut into tokens together, because the space between them
        belongs to the query's first word. The text after is cut into tokens alone, so that a long
        query can be shortened at its end.

        Args:
            query: any text.
            tokenizer: the model's tokenizer.
        """
        begin = tokenizer.begin if self.begins else ()
        before, asked = self._asked(query.strip() if self.trims else query, tokenizer)
        return [*begin, *before], asked, tokenizer.encode(self.after, continues=True)

    def _asked(self, query: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        ids, places = tokenizer.encode_with_places(self.before + query)
        first = sum(end <= len(self.before) for _, end in places)
        if tokenizer.special.isdisjoint(ids[first:]):
            return tokenizer.known(ids[:first]), tokenizer.known(ids[first:])
        # The query spells a special token, which must stay text.
        asked = tokenizer.encode(query, special=False, continues=bool(self.before))
        return tokenizer.encode(self.before), asked

    def prompt(self, query: str, tokenizer: Tokenizer) -> list[int]:
        """Return the token ids of the complete prompt: the query in the template."""
        before, asked, after = self.parts(query, tokenizer)
        return [*before, *asked, *after]


CHATML = Template("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
PLAIN = Template("### Instruction:\n", "\n\n### Response:\n")


def given_template(setting: str, tokenizer: Tokenizer) -> Template:
    """Return the template for the flag ``--template``, which may also name a file.

    Args:
        setting: as for `template_from`, or the name of a file with a text that has ``{query}`` in
            it once, without escapes. Only the user may name a file: never pass text from a file.
        tokenizer: the model's tokenizer.

    Raises:
        SettingsError: the setting or the file can't be used, or the tokenizer has no chat template.
        TokenizerError: the tokenizer's chat template can't be used.
    """
    if QUERY not in setting and setting not in NAMES and _is_file(setting):
        return _around_query(_content(Path(setting)), f"the file {setting}")
    return template_from(setting, tokenizer)


def template_from(setting: str, tokenizer: Tokenizer, source: str = "the given text") -> Template:
    r"""Return the template for a setting. It reads no file, whatever the setting is.

    Args:
        setting: one of these. ``auto``: ChatML if the tokenizer knows its tokens, else a plain
            template. ``chat``: the tokenizer's own chat template. A text with ``{query}`` in it
            once; ``\n``, ``\t`` and ``\\`` in it mean a line break, a tab and a backslash.
        tokenizer: the model's tokenizer.
        source: where the setting came from; for messages.

    Raises:
        SettingsError: the setting is none of these, or the tokenizer has no chat template.
        TokenizerError: the tokenizer's chat template can't be used.
    """
    if setting == "auto":
        return CHATML if tokenizer.knows(*CHATML_TOKENS) else PLAIN
    if setting == "chat":
        return _own(tokenizer)
    return _around_query(_unescaped(setting), source)


def _own(tokenizer: Tokenizer) -> Template:
    """Return the template for the text that the chat template writes around a query."""
    if tokenizer.chat_template is None:
        raise SettingsError(
            "--template chat needs a tokenizer with a chat template, and this model's has none; "
            "give auto, or a text with {query} in it"
        )
    content = f"\t{STAND_IN}\t"
    text = render([{"role": "user", "content": content}], tokenizer, prompts=True)
    if text.count(STAND_IN) != 1:
        raise TokenizerError(
            f"the model's chat template writes a user's message {text.count(STAND_IN)} times, not "
            "once; give --template auto, or a text with {query} in it"
        )
    trims = content not in text
    before, after = text.split(STAND_IN if trims else content)
    return Template(before, after, begins=False, trims=trims)


def _around_query(text: str, source: str) -> Template:
    if text.count(QUERY) != 1:
        raise SettingsError(
            f"--template must be auto, chat, a text with {QUERY} in it exactly once, or a file "
            f"that holds such a text; {source} has it {text.count(QUERY)} times"
        )
    if not is_text(text):
        raise SettingsError(f"--template must be UTF-8 text; {source} is {text!a}")
    before, after = text.split(QUERY)
    return Template(before, after)


def _is_file(setting: str) -> bool:
    try:
        return Path(setting).is_file()
    except (OSError, ValueError):  # no file can have such a name
        return False


def _content(file: Path) -> str:
    with raised_as(SettingsError, "--template: "):
        return read_text(file, LARGEST_FILE)


def _unescaped(text: str) -> str:
    return re.sub(r"\\[nt\\]", lambda found: ESCAPES[found.group()], text)


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace("\t", r"\t")
