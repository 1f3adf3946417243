"""A chat template that comes with an adapter is tried before it acts."""

from pathlib import Path

import pytest

from disha.errors import AdapterFileError
from disha.finetune import templates

ENDLESS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "takes more than 1 s or 2 GiB",
)
HUGE = ("{% for m in messages %}{{ m.role * 99999 }}{% endfor %}", "makes 1,299,987 characters")
BROKEN = ("{% if", "TemplateSyntaxError")


@pytest.mark.parametrize(
    ("template", "reason"), [ENDLESS, HUGE, BROKEN], ids=["endless", "huge", "broken"]
)
def test_one_that_is_refused(monkeypatch, template, reason):
    if template == ENDLESS[0]:  # the others need their time on a loaded machine
        monkeypatch.setattr(templates, "SECONDS", 1)
    with pytest.raises(AdapterFileError, match=f"template of a.safetensors .*: .*{reason}"):
        templates.try_template(Path("a.safetensors"), {"chat_template": template})


@pytest.mark.parametrize("refused", ["m.role == 'system'", "messages[0].role != 'system'"])
def test_one_that_is_used_is_named(capsys, refused):
    """It may refuse a system message, or want one, and mark what is learned."""
    template = (
        f"{{% for m in messages %}}{{% if {refused} %}}{{{{ raise_exception('no') }}}}{{% endif %}}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    templates.try_template(Path("a.safetensors"), {"chat_template": template})
    assert capsys.readouterr().err == "a.safetensors brings its own chat template\n"
    templates.try_template(Path("a.safetensors"), {})
    assert not capsys.readouterr().err
