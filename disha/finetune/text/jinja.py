"""Chat templates, which are Jinja programs from strangers, run inside bounds.

What a template can call and see is what transformers lets it, in Jinja's sandbox. On top of that
it is stopped after a number of steps of its loops, and when its text grows too long.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from disha.finetune.errors import DataError, MissingDependencyError, TokenizerError

if TYPE_CHECKING:
    from jinja2.sandbox import SandboxedEnvironment

__all__ = ["run_template"]

MOST_STEPS = 1_000_000
MOST_CHARACTERS = 10_000_000
MOST_EXPONENT = 1000


def run_template(template: str, variables: Mapping[str, Any]) -> str:
    """The text that a chat template makes.

    Args:
        template: the template.
        variables: what it sees, by name.

    Raises:
        TokenizerError: the template itself is damaged, or goes on for too long.
        DataError: the template refuses the messages, or fails on them.
        MissingDependencyError: jinja2 is not installed.
    """
    compiled, steps = _compiled(template)
    steps.start()
    pieces: list[str] = []
    length = 0
    try:
        for piece in compiled.generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > MOST_CHARACTERS:
                raise _TooLongError(f"makes more than {MOST_CHARACTERS} characters")
    except _TooLongError as error:
        raise TokenizerError(f"the model's chat template {error}; it is damaged") from error
    except Exception as error:  # a template's own code can raise anything
        raise DataError(f"the model's chat template can't take the messages: {error}") from error
    return "".join(pieces)


class _TooLongError(Exception):
    """A template goes on for too long."""


class _Steps:
    """Counts the steps of all loops of one run."""

    def __init__(self) -> None:
        self._left = 0

    def start(self) -> None:
        self._left = MOST_STEPS

    def counted(self, values: Iterable[Any]) -> Iterator[Any]:
        """`values`, each counted as a step."""
        for value in values:
            self._left -= 1
            if self._left < 0:
                raise _TooLongError(f"takes more than {MOST_STEPS} steps")
            yield value


@lru_cache(maxsize=8)
def _compiled(template: str) -> tuple[Any, _Steps]:
    try:
        from jinja2 import TemplateError
    except ImportError as error:
        raise MissingDependencyError(
            "chat templates need jinja2; run: pip install 'disha-torch[finetune]'"
        ) from error
    steps = _Steps()
    try:
        return _environment(steps).from_string(template), steps
    except (TemplateError, RecursionError) as error:
        raise TokenizerError(f"the model's chat template is damaged: {error}") from error


def _environment(steps: _Steps) -> SandboxedEnvironment:
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Takes what stands between ``generation`` and ``endgeneration`` as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(
                ("name:endgeneration",), drop_needle=True
            )
            return body

    class Bounded(ImmutableSandboxedEnvironment):
        """Counts the steps of every loop."""

        intercepted_binops = frozenset(["*", "**"])

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            tree = super()._parse(source, name, filename)
            for loop in tree.find_all(nodes.For):
                loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None)
            return tree

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if _size(operator, left, right) > MOST_CHARACTERS:
                raise _TooLongError(f"makes something too large with {operator}")
            return super().call_binop(context, operator, left, right)

    environment = Bounded(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["counted"] = steps.counted
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment


def _size(operator: str, left: Any, right: Any) -> float:
    """About how much memory a product or a power takes."""
    if operator == "**":
        return float(abs(right) * MOST_CHARACTERS / MOST_EXPONENT)
    for many, times in ((left, right), (right, left)):
        if isinstance(many, (str, list, tuple)) and isinstance(times, int):
            return len(many) * times
    return 0


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter writes it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
