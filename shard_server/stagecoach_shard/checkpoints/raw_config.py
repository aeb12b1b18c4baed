"""Typed access to a checkpoint's config.json. Whatever is not as expected is refused by name, never guessed at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NoReturn

from stagecoach.errors import CheckpointError

# The largest whole number that may mean something: counts of layers, positions, tokens and numbers in a vector.
MAX_INTEGER = 2**31 - 1


class RawConfig:
    """A JSON object, read field by field. A field that is `null` counts as absent, as it does for transformers."""

    def __init__(self, fields: Mapping[str, object], prefix: str = "") -> None:
        self._fields = fields
        self._prefix = prefix

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1, maximum: int = MAX_INTEGER) -> int:
        """A whole number in [minimum, maximum]; without a default it must be there."""
        value = self.get(name)
        if value is None:
            if default is None:
                self.refuse(name, "is missing")
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            self.refuse(name, f"must be a whole number of at least {minimum}", limit=minimum)
        if value > maximum:
            self.refuse(name, f"must be at most {maximum}", limit=maximum)
        return value

    def number(self, name: str, default: float | None = None, *, minimum: float = 0.0) -> float:
        """A finite number above zero, of at least `minimum`; without a default it must be there."""
        value = self.get(name)
        if value is None:
            if default is None:
                self.refuse(name, "is missing")
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not _is_finite(value):
            self.refuse(name, "must be a finite number")
        if value <= 0 or value < minimum:
            self.refuse(name, f"must be above 0 and at least {minimum:g}", limit=minimum)
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """True or false; `default` where it is absent."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(name, "must be true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string; without a default it must be there."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            self.refuse(name, "must be a string")
        return value

    def section(self, name: str) -> RawConfig | None:
        """The object under `name`; None where it is absent or empty."""
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            self.refuse(name, "must be an object")
        return RawConfig(value, f"{self._prefix}{name}.") if value else None

    def texts(self, name: str) -> list[str] | None:
        """The list of strings under `name`; None where it is absent."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.refuse(name, "must be a list of strings")
        return value

    def get(self, name: str) -> object:
        """The field's value, unchecked; None where it is absent."""
        return self._fields.get(name)

    def is_null(self, name: str) -> bool:
        """Whether the field is there and null, which for a few fields means something else than its absence."""
        return name in self._fields and self._fields[name] is None

    def names(self) -> list[str]:
        """The names of the fields that are there and not null."""
        return [name for name, value in self._fields.items() if value is not None]

    def refuse(self, name: str, why: str, *, limit: object = "") -> NoReturn:
        """Raises the CheckpointError that names this field, its value and what is wrong with it."""
        value = self.get(name)
        shown = "" if value is None else f"; it is {str(value)[:200]!r}"
        raise CheckpointError(
            f"config.json: {self._prefix}{name} {why}{shown}",
            field=f"{self._prefix}{name}",
            limit=limit,
            value="" if value is None else value,
        )


def _is_finite(value: float) -> bool:
    """Whether it is finite as a float, which some whole numbers of JSON are not."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
