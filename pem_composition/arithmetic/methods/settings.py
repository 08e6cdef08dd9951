"""A setting of a merging method: its type, range and default, and how a word becomes its value.

No torch: the command line, expressions and error messages read this.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from pem_composition.config import KINDS
from pem_composition.errors import PEMError

Value = float | int | str
WHOLE = re.compile(r"[-+]?\d+", re.ASCII)
DECIMAL = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class Setting:
    """One keyword of a method.

    Args:
        default: its type is the setting's type: float, int, or a word out of ``choices``.
        low, high: the range of a number; ``low_open`` leaves out the lower end itself.
        kinds: the kinds of module it applies to.
    """

    name: str
    default: Value
    meaning: str
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    choices: tuple[str, ...] = ()
    kinds: tuple[str, ...] = KINDS

    @property
    def range(self) -> str:
        """What it accepts, in words."""
        if self.choices:
            return ", ".join(self.choices[:-1]) + f" or {self.choices[-1]}"
        number = "a whole number" if isinstance(self.default, int) else "a number"
        if math.isinf(self.low) and math.isinf(self.high):
            return number
        if math.isinf(self.high):
            return f"{number} {'>' if self.low_open else '>='} {self.low:g}"
        return f"in {'(' if self.low_open else '['}{self.low:g}, {self.high:g}]"

    def read(self, value: object, where: str) -> Value:
        """The value as the setting's own type.

        Raises:
            PEMError: another type, not finite, or out of range.
        """
        found = self._converted(value)
        if found is None or not self._fits(found):
            shown = repr(value) if isinstance(value, str) else str(value)
            raise PEMError.build(where, f"{self.name} must be {self.range}", found=shown.strip("'"))
        return found

    def _converted(self, value: object) -> Value | None:
        if isinstance(value, bool):
            return None
        if self.choices:
            return value if isinstance(value, str) else None
        if isinstance(value, str):
            text = value.strip()
            if isinstance(self.default, int):
                return int(text) if WHOLE.fullmatch(text) and len(text) < 20 else None
            return float(text) if DECIMAL.fullmatch(text) else None
        if not isinstance(value, int | float):
            return None
        if isinstance(self.default, int):
            return int(value) if math.isfinite(value) and value == int(value) else None
        return float(value)

    def _fits(self, value: Value) -> bool:
        if isinstance(value, str):
            return value in self.choices
        above = value > self.low if self.low_open else value >= self.low
        return math.isfinite(value) and above and value <= self.high


def shown(value: Value) -> str:
    """The shortest text that reads back as the value: 0.2, 1, total."""
    if isinstance(value, str):
        return value
    text = repr(value)
    return text.removesuffix(".0")
