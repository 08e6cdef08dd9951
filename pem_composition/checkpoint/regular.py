"""Regular expressions of files, matched in a bounded number of steps. None is ever run.

Python's parser reads the text; the match follows the set of places in a name at which a part of
the expression can end, so that no place is tried again as a backtracking matcher does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from re import _parser  # type: ignore[attr-defined]  # the tree of an expression has no public name
from typing import Any

MAX_LENGTH = 500  # of an expression
MAX_STEPS = 100_000  # for one name
ANCHORS = ("AT_BEGINNING", "AT_BEGINNING_STRING", "AT_END", "AT_END_STRING")
CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_WORD": lambda c: c.isalnum() or c == "_",
    "CATEGORY_SPACE": str.isspace,
}


class RegularExpression:
    """A regular expression of characters, classes, groups, alternatives and repetitions.

    Raises:
        ValueError: no expression, or one with more than these (look-around, references, flags).
    """

    def __init__(self, text: str) -> None:
        if len(text) > MAX_LENGTH:
            raise ValueError(f"longer than {MAX_LENGTH} characters")
        try:
            self._tree = _parser.parse(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(str(error)) from None
        if self._tree.state.flags & ~re.UNICODE:
            raise ValueError("it has flags")
        _check(self._tree)

    def ends(self, name: str) -> bool:
        """True if a name, or what follows one of its dots, matches: PEFT's ``(.*\\.)?(...)$``.

        Raises:
            ValueError: too many steps.
        """
        starts = {0, *(i + 1 for i, c in enumerate(name) if c == ".")}
        return len(name) in _Places(name).ends(self._tree, starts)


def _check(tree: Iterable[Any]) -> None:
    """Refuse what ``_Places`` does not know.

    Raises:
        ValueError: naming it.
    """
    for op, value in tree:
        name = str(op)
        if name == "BRANCH":
            for branch in value[1]:
                _check(branch)
        elif name == "SUBPATTERN":
            if value[1] or value[2]:
                raise ValueError("it has flags")
            _check(value[3])
        elif name in ("MAX_REPEAT", "MIN_REPEAT"):
            _check(value[2])
        elif name == "AT" and str(value) in ANCHORS:
            continue
        elif name not in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            raise ValueError(f"{name.lower()} is not known here")


class _Places:
    """One name, and how many steps it has taken."""

    def __init__(self, name: str) -> None:
        self._name, self._steps = name, 0

    def ends(self, tree: Iterable[Any], places: set[int]) -> set[int]:
        """Where the parts of a tree, one after the other, can end."""
        for op, value in tree:
            self._steps += 1 + len(places)
            if self._steps > MAX_STEPS:
                raise ValueError(f"more than {MAX_STEPS} steps")
            places = self._part(str(op), value, places)
            if not places:
                break
        return places

    def _part(self, op: str, value: Any, places: set[int]) -> set[int]:
        if op == "AT":
            return places & {len(self._name) if "END" in str(value) else 0}
        if op == "SUBPATTERN":
            return self.ends(value[3], places)
        if op == "BRANCH":
            return set().union(*(self.ends(branch, places) for branch in value[1]))
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, part = value
            return self._repeated(low, high, part, places)
        return {p + 1 for p in places if p < len(self._name) and _takes(op, value, self._name[p])}

    def _repeated(self, low: int, high: int, tree: Any, places: set[int]) -> set[int]:
        # After one round per character a round more or less ends at the same places.
        most = len(self._name) + 2
        for _ in range(min(int(low), most)):
            places = self.ends(tree, places)
        found, rounds = set(places), int(high) - int(low)
        while places and rounds > 0:
            places = self.ends(tree, places) - found
            found |= places
            rounds -= 1
        return found


def _takes(op: str, value: Any, character: str) -> bool:
    if op == "ANY":
        return character != "\n"
    if op != "IN":
        return (chr(value) == character) == (op == "LITERAL")
    negated = str(value[0][0]) == "NEGATE"
    return any(_members(value[negated:], character)) != negated


def _members(items: Iterable[Any], character: str) -> Iterator[bool]:
    for op, value in items:
        kind, text = str(op), str(value)
        if kind == "RANGE":
            yield value[0] <= ord(character) <= value[1]
        elif kind == "CATEGORY":
            positive = CATEGORIES[text.replace("_NOT_", "_")]
            yield positive(character) != ("_NOT_" in text)
        else:
            yield chr(value) == character
