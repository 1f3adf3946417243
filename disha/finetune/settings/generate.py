"""The settings of ``disha generate``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from disha.finetune.errors import SettingsError
from disha.finetune.settings.checks import require, require_adapter, require_at_least
from disha.finetune.settings.flags import Switch
from disha.finetune.settings.model import ModelSettings

__all__ = ["GenerateSettings", "SamplingSettings"]


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen."""

    max_new_tokens: int = 256
    """Most tokens to generate."""

    temperature: float = 0.0
    """0: the most likely token each time; higher: more at random."""

    top_p: float = 1.0
    """Choose among the most likely tokens that together have this probability."""

    top_k: int | None = None
    """Choose among so many most likely tokens."""

    seed: int = 0
    """Decides what is chosen, with a temperature above 0."""

    def check(self) -> None:
        """Check every setting by itself.

        Raises:
            SettingsError: one is out of range.
        """
        require_at_least(1, self, ["max_new_tokens"])
        require_at_least(0, self, ["temperature"])
        require(0 < self.top_p <= 1, "top_p", self.top_p, "greater than 0 and at most 1")
        if self.top_k is not None:
            require_at_least(1, self, ["top_k"])
        require(0 <= self.seed < 2**62, "seed", self.seed, "from 0 to 2^62 - 1")
        if self.temperature == 0 and (self.top_p != 1 or self.top_k is not None):
            flag = "--top_k" if self.top_k is not None else "--top_p"
            raise SettingsError(
                f"{flag} says what to draw from, but with --temperature 0 nothing is drawn; give "
                "a temperature above 0, such as 0.7"
            )


@dataclass(frozen=True)
class GenerateSettings:
    """Every choice of a generation. Flags are spelled with underscores or dashes."""

    model: ModelSettings = field(default_factory=ModelSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)

    prompt: tuple[str, ...] = ()
    """The texts to answer, each in quotes."""

    prompt_file: Path | None = None
    """A file with one text to answer per line, in place of prompt."""

    adapter: Path | None = None
    """The adapter file, such as output/adapter.safetensors; the base model alone if not given."""

    template: str | None = None
    """What surrounds a prompt, as when fine-tuning: a text with {query} in it, chat, auto, or none
    for the prompt alone; as the adapter was trained, if not given."""

    compare: Switch = False
    """Show what the base model says beside what it says with the adapter."""

    merge: Switch = False
    """Merge the adapter into the weights first: the same texts, at the base model's speed."""

    json: Switch = False
    """Print one JSON object, for scripts."""

    debug: Switch = False
    """Show where an error came from."""

    def check(self) -> None:
        """Check everything that can be checked without reading the model.

        Raises:
            SettingsError: a setting is missing, out of range, or contradicts another.
        """
        self.model.check()
        self.sampling.check()
        if bool(self.prompt) == (self.prompt_file is not None):
            raise SettingsError(
                "what to answer is given either by --prompt 'a text' or by --prompt_file; "
                "give one of them"
            )
        require_adapter(self.adapter, compare=self.compare, merge=self.merge)
        if self.compare and self.merge:
            raise SettingsError(
                "--compare needs the base model, which --merge overwrites; leave one of them out"
            )
