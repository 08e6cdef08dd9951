"""What ``--rank`` takes: a rank for every layer, or a share of the update's energy. No torch.

An int r >= 1 is a rank. A float x with 0 < x < 1 is a share of the energy sum_i s_i^2, s the
singular values of a layer's update: each layer gets the smallest rank that keeps it
(``delta.kept_rank``). 1 is the rank one, 1.0 is refused.
"""

from __future__ import annotations

import re

from pem_composition.errors import PEMError

Rank = int | float
METAVAR = "R|SHARE"  # what stands for one in a help text
EXPECTED = "a whole number >= 1 (a rank), or a share of the energy between 0 and 1, such as 0.95"
NUMBER = r"\d{1,9}|\d?\.\d+(?:[eE]-?\d{1,3})?|\de-\d{1,3}"  # what ``str`` makes of one


def checked(value: object, where: str = "rank") -> Rank:
    """The value, if it is a rank or a share.

    Raises:
        PEMError: neither of them.

    Examples:
        >>> checked(8), checked(0.95)
        (8, 0.95)
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if isinstance(value, float) and 0.0 < value < 1.0:
        return value
    if isinstance(value, float) and value == 1.0:
        raise PEMError.build(
            where, "all of the energy needs no rank", found=value, expected=EXPECTED,
            do="leave the rank out, or write 1 for rank one",
        )  # fmt: skip
    raise PEMError.build(where, "not a rank", found=value, expected=EXPECTED)


def parse(text: str, where: str = "rank") -> Rank:
    """The rank or share that a word stands for.

    Raises:
        PEMError: neither of them.

    Examples:
        >>> parse("8"), parse("0.95"), parse(".5")
        (8, 0.95, 0.5)
    """
    if not re.fullmatch(NUMBER, text, re.ASCII):
        raise PEMError.build(where, "not a rank", found=text, expected=EXPECTED)
    return checked(int(text) if text.isdecimal() else float(text), where)


def is_share(rank: Rank) -> bool:
    """True for a share of the energy."""
    return isinstance(rank, float)
