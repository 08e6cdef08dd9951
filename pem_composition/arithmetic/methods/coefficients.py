"""What the coefficients of a sum are where none are given: the rules, each with its name.

For modules of several tasks whose updates are nearly orthogonal, 1/T shrinks the norm of the exact
sum by sqrt(T) and 1/sqrt(T) keeps it; which one is better is a question of measurement.
"""

from __future__ import annotations

from typing import NamedTuple


class CoefficientRule(NamedTuple):
    """1 / T^power each, T being the number of modules, and what that is called."""

    name: str
    power: float

    def of(self, modules: int) -> tuple[float, ...]:
        """A coefficient for each module.

        Examples:
            >>> RULES["sqrt"].of(4)
            (0.5, 0.5, 0.5, 0.5)
        """
        return (1.0 / modules**self.power,) * modules

    def told(self, modules: int) -> str:
        """What a program prints.

        Examples:
            >>> RULES["sqrt"].told(5)
            'coefficients 1/sqrt(T) = 0.447 each'
        """
        return f"coefficients {self.name} = {self.of(modules)[0]:.3g} each"


RULES = {"mean": CoefficientRule("1/T", 1), "sqrt": CoefficientRule("1/sqrt(T)", 0.5)}
DEFAULT_RULE = "mean"
