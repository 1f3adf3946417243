from __future__ import annotations

import sys
from datetime import datetime

import pytest

import disha
from disha.finetune.errors import DataError, TokenizerError
from disha.finetune.text.jinja import run_template


def run(template, **variables):
    return run_template(template, variables)


def test_blocks_leave_no_lines_behind():
    assert run("{% if true %}\n    {% if true %}\nyes\n    {% endif %}\n{% endif %}\nend") == (
        "yes\nend"
    )


def test_loops_can_be_left_and_gone_on_with():
    template = "{% for x in values %}{% if x == 2 %}{% continue %}{% endif %}"
    template += "{% if x == 4 %}{% break %}{% endif %}{{ x }}{% endfor %}"
    assert run(template, values=[1, 2, 3, 4, 5]) == "13"


def test_loops_know_where_they_are():
    template = "{% for x in values %}{{ loop.index0 }}{{ loop.length }}{{ loop.last }} {% endfor %}"
    assert run(template, values="ab") == "02False 12True "
    template = "{% for x in values if x > 1 %}{{ loop.previtem }}{{ x }}{% else %}none{% endfor %}"
    assert run(template, values=[1, 2, 3]) == "223"
    assert run(template, values=[1]) == "none"
    assert (
        run("{% for key, value in pairs.items() %}{{ key }}{{ value }}{% endfor %}", pairs={"a": 1})
        == "a1"
    )


def test_what_stands_in_a_generation_block_is_written():
    assert run("a{% generation %}{{ x }}{% endgeneration %}c", x="b") == "abc"


def test_json_is_not_written_for_html():
    assert run("{{ x | tojson }}", x={"a": "<é>"}) == '{"a": "<é>"}'
    assert run("{{ x | tojson(indent=2) }}", x=[1]) == "[\n  1\n]"


def test_today_can_be_asked_for():
    years = {str(datetime.now().year), str(datetime.now().year)}
    assert run("{{ strftime_now('%Y') }}") in years


def test_a_template_can_refuse():
    with pytest.raises(DataError, match=r"can't take the messages: roles must alternate"):
        run("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "template",
    [
        "{{ missing.attribute }}",
        "{{ 1 + 'a' }}",
        "{{ 1 / 0 }}",
        "{{ messages[0]['role'] }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% set _ = messages.append(1) %}",
        "{% include 'other' %}",
    ],
)
def test_a_template_that_fails_is_a_clear_error(template):
    with pytest.raises(DataError, match=r"the model's chat template can't take the messages: ."):
        run(template, messages=[])


@pytest.mark.parametrize("template", ["{% if %}", "{{ x", "{% for x in y %}", "{% nonsense %}"])
def test_a_damaged_template_is_named(template):
    with pytest.raises(TokenizerError, match=r"chat template is damaged: ."):
        run(template)


def test_without_jinja2_the_remedy_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(disha.MissingPackageError, match=r"pip install 'disha-torch\[finetune\]'"):
        run("a template that was not compiled before")
