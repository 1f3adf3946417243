"""The settings of the fine-tuning commands, which are also their flags.

Each group is a frozen dataclass with a `check` of its own, for whatever can be checked without
reading a model or data:

- `model`: the base model, and how it is kept
- `adapter`: what is put into it
- `data`: the rows to learn from, and those to measure on
- `training`: how they are learned
- `output`: what is written, and when
- `run`: all of them, the demo's defaults, and what contradicts what
- `generate`, `evaluate`: those of the commands that use what was trained
- `flags`: how a setting is spelled on a command line
"""

from disha.finetune.settings.adapter import AdapterSettings
from disha.finetune.settings.data import DataSettings
from disha.finetune.settings.evaluate import EvaluateSettings
from disha.finetune.settings.generate import GenerateSettings, SamplingSettings
from disha.finetune.settings.model import ModelSettings
from disha.finetune.settings.output import OutputSettings
from disha.finetune.settings.run import DEMO_SETTINGS, FinetuneSettings
from disha.finetune.settings.training import TrainingSettings

__all__ = [
    "DEMO_SETTINGS",
    "AdapterSettings",
    "DataSettings",
    "EvaluateSettings",
    "FinetuneSettings",
    "GenerateSettings",
    "ModelSettings",
    "OutputSettings",
    "SamplingSettings",
    "TrainingSettings",
]
