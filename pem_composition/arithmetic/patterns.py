"""Patterns of layer names in expressions and files: ``*.layer.[0-5].*``. No regular expressions.

    *       any run of characters, none included
    ?       one character
    [0-5]   one of the characters listed, ranges included; [!...] one of the others

Matching takes at most len(name) * len(pattern) steps, whatever the pattern.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pem_composition.errors import PEMError, wrong_type

MAX_LENGTH = 500
ANY_RUN = "*"


@dataclass(frozen=True)
class _One:
    """One character: any, or one in (or not in) some inclusive ranges."""

    ranges: tuple[tuple[str, str], ...] | None = None
    negated: bool = False

    def __contains__(self, character: str) -> bool:
        if self.ranges is None:
            return True
        return any(low <= character <= high for low, high in self.ranges) != self.negated


@dataclass(frozen=True)
class Pattern:
    """A compiled pattern."""

    text: str
    parts: tuple[str | _One, ...]  # a star, or what one character must be

    def matches(self, name: str) -> bool:
        """True if the whole name matches: greedy, going back to the last star alone."""
        at = part = 0
        star, resume = -1, 0
        while at < len(name):
            if part < len(self.parts) and self.parts[part] == ANY_RUN:
                star, resume = part, at
                part += 1
            elif part < len(self.parts) and name[at] in self.parts[part]:
                at, part = at + 1, part + 1
            elif star >= 0:
                resume += 1
                at, part = resume, star + 1
            else:
                return False
        return all(p == ANY_RUN for p in self.parts[part:])


def compile_pattern(text: str, where: str = "pattern") -> Pattern:
    """A pattern from its text.

    Raises:
        PEMError: empty, too long, or a bracket that is not closed.
    """
    if not isinstance(text, str):
        raise wrong_type(where, text, "a pattern of layer names")
    if not 0 < len(text) <= MAX_LENGTH:
        raise PEMError.build(
            where, "not a pattern", found=f"{len(text)} characters", expected=f"1 to {MAX_LENGTH}"
        )
    return Pattern(text, tuple(_parts(text, where)))


def _parts(text: str, where: str) -> Iterator[str | _One]:
    at = 0
    while at < len(text):
        if text[at] == "[":
            # A bracket right after the opening one is a member.
            end = text.find("]", at + (3 if text[at + 1 : at + 2] == "!" else 2))
            if end < 0:
                raise PEMError.build(where, "a bracket is not closed", found=repr(text))
            yield _one_of(text[at + 1 : end])
            at = end + 1
            continue
        if text[at] == ANY_RUN:
            yield ANY_RUN
        else:
            yield _One() if text[at] == "?" else _One(((text[at], text[at]),))
        at += 1


def _one_of(inside: str) -> _One:
    negated = inside.startswith("!")
    members = inside.removeprefix("!")
    ranges, at = [], 0
    while at < len(members):
        if members[at + 1 : at + 2] == "-" and at + 2 < len(members):
            ranges.append((members[at], members[at + 2]))
            at += 3
        else:
            ranges.append((members[at], members[at]))
            at += 1
    return _One(tuple(ranges), negated)
