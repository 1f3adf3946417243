"""A file that claims 40 GiB, and has next to nothing on the disk: no reader takes memory for it."""

import subprocess
import sys
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

import disha
from tests.test_format import sparse

SCRIPT = """
import contextlib, io, resource, sys, time
from torch import nn
import disha
from disha.cli.dispatcher import main
from tests.fuzzing.limits import Usage, limited

def command(words):
    out, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        code = main(words.split())
    assert code in (1, 2) and "Traceback" not in said.getvalue(), (words, code, said.getvalue())
    return said.getvalue().strip() or "no"

def refused(action):
    try:
        return action() or "loaded"
    except disha.DishaError as error:
        return str(error)

def load(model, **options):
    return refused(lambda: disha.load_adapter(model, "huge", **options))

small = nn.Sequential(nn.Linear(64, 32))
command("diff huge small")  # imports what commands need
adapted = disha.inject_adapters(nn.Sequential(nn.Linear(64, 32)), ".", 4)
resource.setrlimit(resource.RLIMIT_AS, (8 << 30,) * 2)  # less than the machine may have
for name, action in {
    "load": lambda: load(small),
    "replace": lambda: load(adapted, replace=True),
    **{words: lambda words=words: command(words) for words in sys.argv[1:]},
}.items():
    usage, start = Usage(), time.monotonic()
    with limited(0, usage):  # 48 MB
        said = action()
    assert usage.seconds < 2, (name, usage.seconds)
    print(name, "->", said.splitlines()[0])
assert disha.inspect_adapter("huge").parameters == 10 * 2**30
"""

COMMANDS = {
    "inspect huge --stats": "there is no memory for tensor '0.bone_block'",
    "diff huge huge": "there is no memory",
    "diff huge small": "no",
    "verify huge": "there is no memory",
    "verify huge --base huge": "there is no memory",
    "merge base huge merged": "does not fit",
    "merge huge small merged": "does not fit",
    "combine --adapter huge=1 both": "there is no memory",
    "convert huge peft --to peft": "there is no memory",
    "convert huge lora --to lora": "there is no memory",
    "convert huge a.gguf --to gguf --base base": "there is no memory",
}


def test_each_reader_refuses_it_at_once(tmp_path):
    sparse(tmp_path / "huge", [(2**15, 5 * 2**16)])
    assert (tmp_path / "huge").stat().st_size > 40 * 2**30
    model = nn.Sequential(nn.Linear(64, 32))
    save_file(model.state_dict(), tmp_path / "base")
    disha.save_adapter(disha.inject_adapters(model, ".", 4), tmp_path / "small")
    root = str(Path(__file__).parent.parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{SCRIPT}", *COMMANDS],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = dict(line.split(" -> ", 1) for line in done.stdout.splitlines())
    for words, expected in {**COMMANDS, "load": "not fit", "replace": "not fit"}.items():
        assert expected in said[words], (words, said[words])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "huge", "small"]
