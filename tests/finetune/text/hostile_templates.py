"""Chat templates that compute without end or fill memory, if nothing stops them.

`python -m tests.finetune.text.hostile_templates` runs each with `MESSAGES` as its conversation.
None may take more than 2 seconds or 500 MB. Most are refused, some finish.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Iterator
from typing import Any

from disha.finetune.errors import DataError, TokenizerError
from disha.finetune.text import jinja

MOST_SECONDS, MOST_BYTES = 2.0, 500_000_000

MESSAGES = [{"role": role, "content": "hello " * 20} for role in ("user", "assistant") * 4]

BIG = "{% set big = 'x' * 100000 %}"
HUGE = "{% set big = 'x' * 20000000 %}"
GROWN = "{% set n = namespace(x=%s) %}{% for i in range(60) %}{% set n.x = %s %}{% endfor %}"


def grown(start: str, step: str, end: str = "{{ n.x | length }}") -> str:
    """Return a template that repeats a step 60 times; twice as large each time is 2^60."""
    return GROWN.replace("%s", start, 1).replace("%s", step, 1) + end


def nested(depth: int, body: str, over: str = "range(1000)") -> str:
    """Return loops within loops."""
    heads = "".join(f"{{% for i{level} in {over} %}}" for level in range(depth))
    return heads + body + "{% endfor %}" * depth


def deep(opening: str, inner: str, closing: str, depth: int = 20_000) -> str:
    """Return an expression within itself."""
    return "{{ " + opening * depth + inner + closing * depth + " }}"


HOSTILE = {
    # texts that double
    "concatenation": grown("'x'", "n.x ~ n.x"),
    "addition": grown("'x'", "n.x + n.x"),
    "product with itself": grown("2", "n.x * n.x"),
    "replacing by itself": grown("'xx'", "n.x.replace('x', n.x)"),
    "the filter replace": grown("'xx'", "n.x | replace('x', n.x)"),
    "joining by itself": grown("'xx'", "n.x.join(n.x)"),
    "the filter join": grown("'xx'", "n.x | join(n.x)"),
    "format with itself": grown("'x'", "'%s%s' % (n.x, n.x)"),
    "the filter format": grown("'x'", "'%s%s' | format(n.x, n.x)"),
    "the method format": grown("'x'", "'{0}{0}'.format(n.x)"),
    "escaping itself": grown("'&&'", "(n.x | string | replace('&', '&&') | forceescape)"),
    "urlencode": grown("'%%'", "n.x | urlencode"),
    "tojson of itself": grown("'\\\\'", "n.x | tojson"),
    "lists that double": grown("[1]", "n.x + n.x"),
    "lists of themselves": grown("[1]", "[n.x, n.x]", "{{ n.x }}"),
    "lists of themselves as JSON": grown("[1]", "[n.x, n.x]", "{{ n.x | tojson }}"),
    "lists of themselves compared": (
        grown("[1]", "[n.x, n.x]", "")
        + GROWN.replace("n.x", "m.x").replace("n =", "m =").replace("%s", "[1]", 1)
        .replace("%s", "[m.x, m.x]", 1)
        + "{{ n.x == m.x }}"
    ),
    "tuples of themselves as a key": grown("(1,)", "(n.x, n.x)", "{{ {n.x: 1} | length }}"),
    "dicts of themselves": grown("{}", "{'a': n.x, 'b': n.x}", "{{ n.x | pprint }}"),
    "macros that double": "".join(
        f"{{% macro m{n + 1}() %}}{{{{ m{n}() }}}}{{{{ m{n}() }}}}{{% endmacro %}}"
        if n
        else "{% macro m1() %}xxxxxxxxxx{% endmacro %}"
        for n in range(50)
    ) + "{{ m50() }}",
    "blocks that double": "{% set x = 'x' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    # one operation
    "a product of a text": "{{ 'x' * 9999999999 }}",
    "a product of a list": "{{ ([0] * 9999999999) | length }}",
    "a product of a small list": "{{ ([0] * 30000000) | length }}",
    "center": "{{ 'x' | center(9999999999) }}",
    "the method center": "{{ 'x'.center(9999999999) }}",
    "ljust": "{{ 'x'.ljust(9999999999) }}",
    "zfill": "{{ 'x'.zfill(9999999999) }}",
    "expandtabs": "{{ '\\t'.expandtabs(999999999) }}",
    "a wide number": "{{ '%9999999999d' % 1 }}",
    "a wide number by filter": "{{ '%9999999999d' | format(1) }}",
    "a precise number": "{{ '%.999999999f' % 1.5 }}",
    "a wide field": "{{ '{:9999999999}'.format('x') }}",
    "indent": "{{ ('\\n' * 30000) | indent(100000) }}",
    "tojson with an indent": "{{ [[[[1]]]] | tojson(indent=999999999) }}",
    "tojson with separators": "{{ ([1] * 100000) | tojson(separators=('x' * 100000, ':')) }}",
    "a power": "{{ (9 ** 9 ** 9) % 10 }}",
    "a power of a power": "{{ 9 ** 9999999 ** 2 }}",
    "a power as text": "{{ 10 ** 4000 ~ (10 ** 10000000) % 7 }}",
    "batch": "{{ [1] | batch(999999999, 'x') | list | length }}",
    "slice": "{{ [1] | slice(999999999) | list | length }}",
    "round": "{{ 1.5 | round(99999999, 'ceil') }}",
    "lipsum": "{{ lipsum(n=99999999) }}",
    "long lipsum": "{{ lipsum(n=1, min=99999998, max=99999999) }}",
    "ranges": "{{ range(99999) | list | length }}" * 5000,
    "ranges in ranges": "{% for i in range(99999) %}{% set _ = range(99999) | list %}{% endfor %}",
    "truncate": HUGE + "{{ (big * 20) | truncate(999999999) }}",
    "splitting": HUGE + "{{ big.split('x') | length }}",
    "a list of characters": HUGE + "{{ big | list | length }}",
    "sorting": BIG + "{% for i in range(9999) %}{% set _ = big | sort %}{% endfor %}",
    "unique": BIG + "{% for i in range(9999) %}{% set _ = big | unique | list %}{% endfor %}",
    "grouping": BIG + "{% for i in range(9999) %}{% set _ = big | groupby(0) %}{% endfor %}",
    "translation": BIG + "{{ big.translate({120: big}) | length }}",
    "maketrans": "{{ ('a' * 50000).translate({97: 'b' * 50000}) }}",
    "xmlattr": "{{ {'a': 'x' * 90000000, 'b': 'y' * 90000000} | xmlattr }}",
    "wordwrap": "{{ ('x ' * 9000000) | wordwrap(1) }}",
    "wordwrap between long texts": BIG + "{{ ('x ' * 90000) | wordwrap(1, wrapstring=big) }}",
    "wordcount": "{{ ('x ' * 90000000) | wordcount }}",
    "striptags": "{{ ('<' * 3000000) | striptags }}",
    "urlize": "{{ ('www.' + 'a.' * 3000000) | urlize }}",
    "urlize of brackets": "{{ ('(' * 200000 + 'http://a.b' + ')' * 200000) | urlize }}",
    "many urls": "{{ ('http://a.b/(( ' * 300000) | urlize(trim_url_limit=99999) }}",
    "title": "{{ ('a-' * 30000000) | title }}",
    # loops
    "nested loops": nested(6, "{{ i0 }}"),
    "nested loops that write nothing": nested(6, "{% set x = 1 %}"),
    "loops over the messages": nested(12, "{{ i0.content }}", "messages"),
    "loops over a text": BIG + nested(3, "", "big"),
    "a product of lists": "{{ (messages * 99999) | map(attribute='content') | join }}",
    "a sum of lists": "{{ [messages * 9999] * 9999 | sum(start=[]) | length }}",
    "a loop that calls itself": (
        "{% for i in [1, 2] recursive %}{{ loop([1, 2]) }}{{ loop([1, 2]) }}{% endfor %}"
    ),
    "a macro that calls itself twice": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    ),
    "a macro without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a caller without end": (
        "{% macro m() %}{% call m() %}{{ caller() }}{% endcall %}{% endmacro %}{{ m() }}"
    ),
    "a growing list": "{% set n = namespace(x=[]) %}" + nested(3, "{% set n.x = n.x + [big] %}"),
    "maps of maps": (
        "{% set n = namespace(x=messages) %}{% for i in range(99999) %}"
        "{% set n.x = n.x | map('string') %}{% endfor %}{{ n.x | list }}"
    ),
    "slices": BIG + nested(2, "{% set x = big[1:] %}", "range(99999)"),
    "searches": BIG + nested(2, "{% set x = 'y' in big %}", "range(99999)"),
    "dates": "{{ strftime_now('%c' * 9999999) }}",
    "an endless cycler": "{% set c = cycler(1) %}" + nested(6, "{{ c.next() }}"),
    # long or deep sources
    "a long literal": "{{ '" + "x" * 30_000_000 + "' }}",
    "a long text": "x" * 30_000_000,
    "many expressions": "{{ 1 }}" * 200_000,
    "many variables": "".join(f"{{% set v{n} = 1 %}}" for n in range(50_000)),
    "many branches": "{% if a %}" * 5000 + "{% endif %}" * 5000,
    "parentheses": deep("(", "1", ")"),
    "a hundred parentheses": deep("(", "1", ")", 100),
    "lists in lists": deep("[", "1", "]"),
    "dicts in dicts": deep("{1: ", "1", "}"),
    "negations": deep("not ", "1", ""),
    "signs": deep("-", "1", ""),
    "attributes": deep("", "x", ".x"),
    "filters": deep("", "x", " | upper"),
    "a long sum": deep("1 + ", "1", ""),
    "nested loops in the source": nested(2000, "x", "[1]"),
    "an integer of many digits": "{{ " + "9" * 1_000_000 + " % 7 }}",
    "an error of many characters": "{{ raise_exception('x' * 99999999) }}",
}  # fmt: skip


def outcomes() -> Iterator[dict[str, Any]]:
    """Run each template, and yield what it took: processor time, and the most memory until then.

    A process's memory counts that of the process that started it, so call this in a small one.
    """
    own = _peak(resource.RUSAGE_SELF)
    for name, template in HOSTILE.items():
        start, said = _processor_time(), "finished"
        variables = {"messages": MESSAGES, "add_generation_prompt": True}
        try:
            jinja.run_template(template, variables, "stranger.gguf")
        except (DataError, TokenizerError) as error:
            said = str(error)
        jinja.end_renderer()
        memory = _peak(resource.RUSAGE_SELF) - own + _peak(resource.RUSAGE_CHILDREN)
        seconds = _processor_time() - start
        yield {"name": name, "seconds": seconds, "bytes": memory, "said": said}


def _peak(whose: int) -> int:
    return resource.getrusage(whose).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _processor_time() -> float:
    return sum(os.times()[:4])


def main(seconds: float | None = None) -> int:
    """Print what came of each template, and return how many took too much.

    Args:
        seconds: less than the usual time, to be done sooner.
    """
    jinja.SECONDS = seconds or jinja.SECONDS
    failures = 0
    for outcome in outcomes():
        failures += outcome["seconds"] > MOST_SECONDS or outcome["bytes"] > MOST_BYTES
        print(json.dumps(outcome), flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main(*map(float, sys.argv[1:])))
