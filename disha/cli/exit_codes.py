"""What the exit codes of `disha` mean, the same for every command.

| code | meaning |
|---|---|
| 0 | done; of `diff`: nothing differs, of `verify`: the file is sound |
| 1 | of `diff`: something differs, of `verify`: the file is not sound; of commands that write: the work failed on the way, such as with a full disk |
| 2 | wrong usage, or what was given can't be used; of commands that answer: also whatever else went wrong |
| 130 | interrupted |
"""  # noqa: E501

from __future__ import annotations

__all__ = ["DONE", "FAILED", "INTERRUPTED", "NO", "TROUBLE"]

DONE = 0
NO = FAILED = 1
TROUBLE = 2
INTERRUPTED = 130
