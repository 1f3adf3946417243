from __future__ import annotations

import subprocess
import sys

import pytest

import disha
from disha.cli import COMMANDS, main


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"disha {disha.__version__}\n"


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(name in told and command.summary in told for name, command in COMMANDS.items())


def test_help_of_finetune_names_its_flags(capsys):
    assert main(["finetune", "--help"]) == 0
    told = capsys.readouterr().out
    for flag in ("--base_model_name_or_path", "--bone_r", "--init_weights", "--demo", "--bits"):
        assert flag in told


@pytest.mark.parametrize("given", [[], ["finetun"], ["--nonsense"]])
def test_wrong_usage_is_exit_code_2(capsys, given):
    assert main(given) == 2
    assert "disha: error:" in capsys.readouterr().err


def test_without_the_extra_the_install_line_is_given():
    # None in sys.modules is how Python marks a module that must not be imported.
    done = python(
        "import sys\n"
        "for name in ('gguf', 'matplotlib', 'tokenizers', 'tqdm', 'tyro'):\n"
        "    sys.modules[name] = None\n"
        "from disha.cli import main\n"
        "sys.exit(main(['finetune', '--demo']))\n"
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert 'pip install "disha-torch[finetune]"' in done.stderr
    assert "gguf, matplotlib, tokenizers, tqdm, tyro" in done.stderr


def test_the_command_line_imports_nothing_heavy_until_a_command_runs():
    done = python(
        "import sys, disha\n"
        "before = set(sys.modules)\n"
        "import disha.cli\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names)))\n"
    )
    assert done.stdout == "['disha']\n", done.stderr


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "disha", "--version"], capture_output=True, text=True
    )
    assert done.stdout == f"disha {disha.__version__}\n"
