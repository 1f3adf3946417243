"""Runs chat templates, which are Jinja programs, in Jinja's sandbox.

Templates have the same functions and variables as in transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import disha
from disha.finetune.errors import DataError, TokenizerError

__all__ = ["run_template"]


def run_template(template: str, variables: Mapping[str, Any]) -> str:
    """Return the text that a chat template writes.

    Args:
        template: the template.
        variables: the template's variables, by name.

    Raises:
        TokenizerError: the template itself is damaged.
        DataError: the template refuses the messages, or fails on them.
        MissingPackageError: jinja2 is not installed.
    """
    compiled = _compiled(template)
    try:
        return compiled.render(**variables)  # type: ignore[no-any-return]
    except Exception as error:  # a template's own code can raise anything
        raise DataError(f"the model's chat template can't take the messages: {error}") from error


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise disha.MissingPackageError(
            "chat templates need jinja2; run: pip install 'disha-torch[finetune]'"
        ) from error

    class Generation(Extension):
        """Keeps the text between ``generation`` and ``endgeneration`` as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(
                ("name:endgeneration",), drop_needle=True
            )
            return body

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    try:
        return environment.from_string(template)
    except (TemplateError, RecursionError) as error:
        raise TokenizerError(f"the model's chat template is damaged: {error}") from error


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Return plain JSON. Jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)
