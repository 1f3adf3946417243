"""Value: what never changes; a change is a copy with other values of some fields."""

from __future__ import annotations

from typing import Any, ClassVar, Self


class Value:
    """The base class of frozen dataclasses of which an injection makes thousands."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def but(self, **fields: Any) -> Self:
        """Return a copy with other values of some fields."""
        # `dataclasses.replace` would take ten times as long. Cached properties are left out.
        kept = self.__dataclass_fields__
        copied = object.__new__(type(self))
        vars(copied).update({name: value for name, value in vars(self).items() if name in kept})
        vars(copied).update(fields)
        return copied
