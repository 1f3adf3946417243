"""`make build`, then `python -m tests.packaging.newcomer`: the first steps of a new user.

The wheel in `dist/` is installed into a new environment, in which nothing else is. Then the scripts
of `docs/examples/newcomer` run there, one process each: a model is adapted and trained, and the
adapter is saved; elsewhere it is loaded, exported as a LoRA and merged; experts are adapted.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "docs" / "examples" / "newcomer"
ADAPTER = "ring.safetensors"
OUTPUTS = """
import json
from my_model import labels, points
logits = model(points).detach()
loss = torch.nn.functional.cross_entropy(logits, labels).item()
print(json.dumps([loss, logits.flatten().tolist()]))
"""


def run(*command: str, cwd: Path | None = None) -> str:
    """Run a command as if there were no checkout, and return what it prints."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def install(wheel: Path, folder: Path) -> str:
    """Install a wheel into a new environment, and return its Python."""
    run(sys.executable, "-m", "venv", str(folder))
    python = str(folder / "bin" / "python")
    run(python, "-m", "pip", "install", "--disable-pip-version-check", "-q", str(wheel))
    run(python, "-m", "pip", "check")
    return python


def outputs_of(python: str, script: str, place: Path) -> tuple[float, list[float]]:
    """Run a script in a copy of the example, and return the loss and logits of its model."""
    code = (place / script).read_text(encoding="utf-8")
    loss, logits = json.loads(run(python, "-c", f"import torch\n{code}{OUTPUTS}", cwd=place))
    return loss, logits


def main() -> None:
    """Take the steps with the wheel in `dist/`."""
    (wheel,) = (ROOT / "dist").glob("*.whl")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        python = install(wheel, folder / "environment")
        for name in ("train", "serve"):
            shutil.copytree(EXAMPLE, folder / name)
        loss, logits = outputs_of(python, "train.py", folder / "train")
        assert loss < 0.3, loss  # from 1.1
        shutil.move(folder / "train" / ADAPTER, folder / "serve")
        _, served = outputs_of(python, "serve.py", folder / "serve")
        pairs = zip(logits, served, strict=True)
        assert all(abs(one - other) < 1e-4 for one, other in pairs)
        outputs_of(python, "experts.py", folder / "train")
        assert run(str(Path(python).with_name("disha")), "--version").startswith("disha ")
    print(f"trained to a loss of {loss:.3f}; loaded and merged elsewhere, it computes the same")


if __name__ == "__main__":
    main()
