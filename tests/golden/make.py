"""Writes the files of cases that have none yet, and what their models return.

    python -m tests.golden.make

What is there stays: these files are kept so that every later version can be seen to load them.
"""

from __future__ import annotations

import json

import disha
from tests.golden.cases import CASES, OUTPUTS, file_of


def main() -> None:
    lacking = {name: case for name, case in CASES.items() if not file_of(name).exists()}
    if not lacking:
        return
    models = {name: case.trained() for name, case in lacking.items()}
    outputs = {name: model(lacking[name].inputs()).tolist() for name, model in models.items()}
    for name, model in models.items():
        disha.save_adapter(model, file_of(name), metadata=lacking[name].metadata)
        print(f"wrote {file_of(name)}")
    outputs = json.loads(OUTPUTS.read_text()) | outputs
    rows = (f"{json.dumps(name)}: {json.dumps(values)}" for name, values in outputs.items())
    OUTPUTS.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
