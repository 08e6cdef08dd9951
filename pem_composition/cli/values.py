"""From one word of a command line to a value, strictly; a refused word is named with the reason."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pem_composition.arithmetic import ranks
from pem_composition.errors import PEMError

TRUE_WORDS = frozenset({"true", "yes", "1"})
FALSE_WORDS = frozenset({"false", "no", "0"})
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
DIGITS = 18  # of a whole number that fits in 64 bits
# What argparse must take for a value although it starts with "-"; floats then refuse inf and nan.
NEGATIVE_NUMBER = re.compile(
    r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|^-(inf|infinity|nan)$", re.IGNORECASE | re.ASCII
)


def shield(token: str) -> str:
    """argparse takes a token for a value, whatever it starts with, if there is a space in it."""
    return " " + token


def unshield(text: str) -> str:
    return text[1:] if text.startswith(" -") else text


def finite_float(text: str) -> float:
    """A finite decimal number; ``nan``, ``inf``, words and overflow are refused with the reason."""
    text = unshield(text)
    if text.lower().lstrip("+-") in {"nan", "inf", "infinity"}:
        raise argparse.ArgumentTypeError(f"found '{text}', expected a finite number")
    if not NUMBER.fullmatch(text):
        raise argparse.ArgumentTypeError(f"found '{text}', expected a number such as 0.3 or -7e-1")
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"found '{text}', which is too large for a double")
    return value


def whole_number(text: str) -> int:
    """A decimal integer, without underscores, exponents or a fraction."""
    text = unshield(text)
    if not re.fullmatch(r"[-+]?[0-9]+", text):
        raise argparse.ArgumentTypeError(f"found '{text}', expected a whole number")
    digits = text.lstrip("+-0")
    if len(digits) > DIGITS:
        raise argparse.ArgumentTypeError(
            f"found '{text}', expected a whole number of at most {DIGITS} digits"
        )
    return int(digits or "0") * (-1 if text.startswith("-") else 1)


def truth(text: str) -> bool:
    """true or false (also yes, no, 1, 0), in any case."""
    word = text.lower()
    if word not in TRUE_WORDS | FALSE_WORDS:
        raise argparse.ArgumentTypeError(f"found '{text}', expected true or false")
    return word in TRUE_WORDS


def plain_text(text: str) -> str:
    """Any text but the empty one: an unset shell variable is the usual source of ''."""
    text = unshield(text)
    if not text:
        raise argparse.ArgumentTypeError("found '', expected a value (is a shell variable unset?)")
    return text


def path(text: str) -> Path:
    """A non-empty path."""
    return Path(plain_text(text))


class Share(float):
    """A part of a whole, shown as a percentage."""

    def __str__(self) -> str:
        return f"{100 * self:g}%"


def share(text: str) -> Share:
    """``3%`` or ``0.03``: no negative number, and none above 1 without a percent sign."""
    text = unshield(text)
    number, percent = text.removesuffix("%").strip(), text.endswith("%")
    value = float(number) if NUMBER.fullmatch(number) else -1.0
    if value < 0 or value > (1e6 if percent else 1.0):
        raise argparse.ArgumentTypeError(
            f"not a share; found '{text}', expected a percentage such as 3%, or a fraction from 0 "
            "to 1 such as 0.03"
        )
    return Share(value / 100 if percent else value)


def rank(text: str) -> ranks.Rank:
    """A rank or a share of the energy, see ``ranks``."""
    try:
        return ranks.parse(unshield(text), "")
    except PEMError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


CONVERTERS: dict[Any, Callable[[str], Any]] = {
    str: plain_text,
    int: whole_number,
    float: finite_float,
    bool: truth,
    Path: path,
    Share: share,
    ranks.Rank: rank,
}
