from __future__ import annotations

import ast
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

import disha
from disha.finetune.errors import DataError, TokenizerError
from disha.finetune.text import jinja, rendering
from disha.finetune.text.jinja import run_template
from tests.finetune.text import chat_templates
from tests.finetune.text.hostile_templates import HOSTILE, MOST_BYTES, MOST_SECONDS
from tests.processes import ended, started

FOREVER = HOSTILE["nested loops that write nothing"]


SAID = [
    "finished",
    r"the chat template of stranger\.gguf (takes|needs|writes) more than [\d.,]+ (s|MiB|bytes) for "
    r"one text; use --template auto .*",
    r"the model's chat template (is damaged|can't take the messages): .+",
]
"""What may come of a hostile template. Each is one line."""


def run(template, **variables):
    return run_template(template, variables, "stranger.gguf").text


def process():
    """The process that renders for this one."""
    return jinja._renderers[os.getpid()]._process


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


def test_the_time_that_a_template_sees_can_be_given():
    for day in (1, 20, 3):
        now = datetime(2031, 5, day, 12).timestamp()
        rendered = run_template("{{ strftime_now('%d %b %Y') }}", {}, "here", now=now)
        assert rendered.text == f"{day:02} May 2031"


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


@pytest.fixture
def no_renderer(monkeypatch):
    monkeypatch.setattr(jinja, "_renderers", {})


def test_without_jinja2_the_remedy_is_said(monkeypatch, no_renderer):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(disha.MissingPackageError, match=r"pip install 'disha-torch\[finetune\]'"):
        run("any")


@pytest.mark.parametrize(("name", "value"), [("frozen", True), ("executable", "")])
def test_without_an_interpreter_the_remedy_is_said(monkeypatch, no_renderer, name, value):
    monkeypatch.setattr(sys, name, value, raising=False)
    monkeypatch.setattr(jinja, "get_executable", lambda: sys.executable)
    with pytest.raises(TokenizerError, match=r"no interpreter .* multiprocessing\.set_executable"):
        run("any")


def test_a_process_that_can_not_be_started_is_named(monkeypatch, no_renderer, tmp_path):
    monkeypatch.setattr(jinja, "get_executable", lambda: str(tmp_path / "python"))
    with pytest.raises(TokenizerError, match=r"can't be started: .*No such file .*python"):
        run("any")


CONVERSATION = [
    {"role": "user", "content": "a question é"},
    {"role": "assistant", "content": "<think>\nwell\n</think>\n\nan answer"},
    {"role": "user", "content": " thanks "},
    {"role": "assistant", "content": "bye"},
]
REAL = {name: text for name, text in vars(chat_templates).items() if name.isupper()}


@pytest.mark.parametrize("name", [*REAL, "of the demo's model"])
def test_templates_write_what_jinja_itself_writes(smollm_checkpoint, name):
    template = REAL.get(name) or smollm_checkpoint.fields["tokenizer.chat_template"]
    plain = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    ).from_string(template)

    def expected(count, asks):
        return plain.render(
            messages=CONVERSATION[:count], add_generation_prompt=asks, bos_token="<s>", eos_token=""
        )

    variables = {"messages": CONVERSATION, "add_generation_prompt": False}
    variables |= {"bos_token": "<s>", "eos_token": ""}
    forms = [(3, False), (4, False), (3, True), (1, True)]
    rendered = run_template(template, variables, "here", forms)
    assert rendered.text == expected(4, False)
    for form, (length, shared) in rendered.others.items():
        other = expected(*form)
        assert len(other) == length
        assert rendered.text.startswith(other[:shared])
        assert shared == length or not rendered.text.startswith(other[: shared + 1])


def test_no_template_takes_more_than_two_seconds_or_500_megabytes():
    """In a twentieth of the usual time. `python -m tests.fuzzing` gives them all of it."""
    done = ended(started(["-m", "tests.finetune.text.hostile_templates", "0.05"]), 600)
    outcomes = {one["name"]: one for one in map(json.loads, done.stdout.splitlines())}
    assert (set(outcomes), done.returncode) == (set(HOSTILE), 0), done.stderr
    for one in outcomes.values():
        assert one["seconds"] < MOST_SECONDS
        assert one["bytes"] < MOST_BYTES
        assert any(re.fullmatch(said, one["said"]) for said in SAID), one


def test_the_usual_limits_hold():
    with pytest.raises(TokenizerError, match=r"takes more than 1 s for one text"):
        run(FOREVER)
    with pytest.raises(TokenizerError, match=r"needs more than 256 MiB for one text"):
        run("{{ ('x' * 300000000) | length }}")
    with pytest.raises(TokenizerError, match=r"writes more than 262,\d{3} bytes for one text"):
        run("{{ 'x' * 300000 }}")
    assert run("{{ ('x' * 100000000) | length }}{{ 'x' * 200000 }}") == "100000000" + "x" * 200000


def test_longer_conversations_may_take_longer(monkeypatch):
    """Llama 3.2's template looks at each character."""
    template = "{% for m in messages %}{% for c in m.content %}{% if c.x == 1 %}{% endif %}"
    template += "{% endfor %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(jinja, "SECONDS", 0.1)
    content = "a long text " * 30_000
    assert run(template, messages=[{"content": content}]) == content


def test_after_a_template_was_stopped_others_work(monkeypatch):
    monkeypatch.setattr(jinja, "SECONDS", 0.1)
    for _ in range(2):
        with pytest.raises(TokenizerError, match=r"takes more than 0\.1 s"):
            run(FOREVER)
        assert run("{{ x }}", x=1) == "1"


def test_one_process_renders_all_and_starts_again_if_it_was_killed():
    run("any")
    first = process()
    assert run("{{ x }}", x=1) == "1"
    assert process() is first
    first.kill()
    first.wait()
    assert run("{{ x }}", x=2) == "2"
    assert process() is not first


def test_a_process_that_dies_while_it_renders_is_named(monkeypatch):
    monkeypatch.setattr(jinja, "SECONDS", 60)
    run("any")
    timer = threading.Timer(0.2, process().kill)
    timer.start()
    with pytest.raises(TokenizerError, match=r"makes the process that renders it end with code -9"):
        run(FOREVER, big="x" * 1_000_000)


def test_an_interrupted_answer_is_not_taken_for_the_next(monkeypatch):
    def interrupt(number, frame):
        raise KeyboardInterrupt

    monkeypatch.setattr(jinja, "SECONDS", 60)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for seconds in (0.0002, 0.001, 0.01, 0.1, 0.3):
            signal.setitimer(signal.ITIMER_REAL, seconds)
            with pytest.raises(KeyboardInterrupt):
                run(FOREVER)
            assert run("{{ x }}", x=seconds) == str(seconds)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_signal_that_is_ignored_and_blocked_stops_a_template(monkeypatch, no_renderer):
    monkeypatch.setattr(jinja, "SECONDS", 0.1)
    before = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})
    try:
        run("any")  # the renderer starts
        timer = threading.Timer(30, process().kill)
        timer.start()
        with pytest.raises(TokenizerError, match=r"takes more than 0\.1 s"):
            run(FOREVER)
        timer.cancel()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
        signal.signal(signal.SIGPROF, before)


def test_threads_get_their_own_texts():
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda x: run("{{ x }}", x=x), range(400))) == [
            str(x) for x in range(400)
        ]


def _run_many(first, queue):
    queue.put([run("{{ x }}", x=x) for x in range(first, first + 100)])


def test_forked_processes_get_their_own_texts():
    run("any")
    context = multiprocessing.get_context("fork")
    queues = [context.Queue() for _ in range(3)]
    forked = [
        context.Process(target=_run_many, args=(1000 * number, queue), daemon=True)
        for number, queue in enumerate(queues)
    ]
    for one in forked:
        one.start()
    assert [run("{{ x }}", x=x) for x in range(100)] == [str(x) for x in range(100)]
    for number, queue in enumerate(queues):
        assert queue.get(timeout=60) == [str(1000 * number + x) for x in range(100)]
    for one in forked:
        one.join()


SCRIPT = """
import os, signal, sys
from disha.finetune.text import jinja
jinja.run_template("any", {}, "here")
print(jinja._renderers[os.getpid()]._process.pid, flush=True)
if sys.argv[1:]:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("killed", [[], ["killed"]])
def test_the_process_ends_with_the_one_that_asks(killed):
    done = ended(started(["-X", "dev", "-W", "error", "-c", SCRIPT, *killed]), 120)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL if killed else 0, "")
    for _ in range(100):
        if not Path(f"/proc/{int(done.stdout)}").exists():
            return
        time.sleep(0.05)
    raise AssertionError("it still runs")


def test_messages_that_can_not_be_sent_are_named():
    with pytest.raises(DataError, match=r"can't take the messages: .*lock"):
        run("any", x=threading.Lock())


def test_half_a_character_is_no_text():
    with pytest.raises(DataError, match=r"can't take the messages: .* surrogates not allowed"):
        run("{{ '\\ud800' }}")


def test_the_process_starts_without_the_library():
    tree = ast.parse(Path(rendering.__file__).read_text())
    names = {
        name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [node.names[0].name])
    }
    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "jinja2"}
