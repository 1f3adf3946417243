"""The model card beside an adapter, as the Hugging Face hub shows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

import disha
from disha.finetune.notes import is_gguf
from disha.finetune.report import Outcome, Proof, loss_before_and_after, save_text

CARD = "README.md"
MARK = "library_name: disha"
TEXT = """---
{{ card_data }}
---

# An adapter for {{ title }}

| | |
|---|---|
{%- for name, value in facts.items() %}
| {{ name }} | {{ value }} |
{%- endfor %}

`samples.md` shows answers with and without it, and `report.json` has all settings. The license is
yours to choose; those of the base and of the rows may bind you.

## Use

```sh
disha generate --adapter adapter.safetensors --prompt 'a question'
{%- if not is_gguf %}
disha merge {{ base }} adapter.safetensors merged
{%- endif %}
```
{%- if not is_gguf %}

```python
import disha
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{{ base }}")
disha.load_adapter(model, "adapter.safetensors")
```
{%- endif %}
"""


def write_card(folder: Path, settings: Mapping[str, Any], outcome: Outcome, proof: Proof) -> None:
    """Write the card, unless the folder has a `README.md` of its user."""
    path = folder / CARD
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return
    facts = outcome.facts
    base = settings["base"]
    method = f"tile, r_out = {settings['r_out']}" if settings["r_out"] else settings["method"]
    rows = f"{facts['rows']['training']:,} of {', '.join(settings['data'])}"
    lines = {
        "base": base,
        "held in memory as": settings["bits"],
        "method": f"{method}, r = {settings['r']}",
        "layers": ", ".join(settings["target"]),
        "trained parameters": f"{facts['parameters']['trainable']:,}",
        "rows": rows,
        "steps": f"{facts['steps']:,}",
        "learning rate": settings["learning_rate"],
        f"{facts['measured_on']} loss": loss_before_and_after(facts, proof),
        "made with": f"disha {disha.__version__}",
    }
    head = ModelCardData(library_name="disha", tags=["adapter", "disha", "miss"])
    if not Path(base).exists():  # a path on this machine is no name that the hub knows
        head.base_model = base
    title = Path(base).name
    values = {"facts": lines, "base": base, "is_gguf": is_gguf(base), "title": title}
    card = ModelCard.from_template(head, template_str=TEXT, **values)
    save_text(path, f"{card}\n")
