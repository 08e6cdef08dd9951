"""The file of ``pem compose --config``: an expression with its modules and options, in YAML.

    expression: 0.5*ties(a, b, density=0.2) + c
    modules: {a: runs/a, b: runs/b, c: runs/c}
    space: delta
    rank: 8
    head: average
    dtype: float32
    layers:
      b: {"*.layer.[0-5].*": 0.3, "*": 1}

Paths are relative to the file's folder. ``layers`` gives a module another coefficient in the
layers that a pattern names; the first pattern that matches a layer counts. Only expression and
modules must be there. An error says the line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from pem_composition.arithmetic import ranks
from pem_composition.arithmetic.patterns import compile_pattern
from pem_composition.arithmetic.ranks import Rank
from pem_composition.checkpoint import hub_name
from pem_composition.cli.flags import HEADS, SPACES
from pem_composition.config import DTYPES
from pem_composition.errors import PEMError, UsageError, close_match

MAX_BYTES = 262_144
TAG = "tag:yaml.org,2002:"
PLAIN_TAGS = ("str", "int", "float", "bool", "null", "timestamp")
Layers = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class RecipeFile:
    """What a file says."""

    expression: str
    modules: Mapping[str, str]
    space: str | None = None
    rank: Rank | None = None
    head: str | None = None
    dtype: str | None = None
    layers: Layers = field(default_factory=dict)


def read(path: Path) -> RecipeFile:
    """The recipe in a file.

    Raises:
        UsageError: not readable, not YAML, an unknown, repeated or missing key, or a wrong value;
            with the line.
    """
    reader = _RecipeReader(path)
    found: dict[str, Any] = {}
    for key, node in reader.pairs(reader.root(), "the file"):
        name, line = key
        if name not in READERS:
            remedy = close_match(name, READERS)
            expected = None if remedy else ", ".join(READERS)
            reader.fail(line, f"unknown key {name!r}", expected=expected, do=remedy)
        found[name] = READERS[name](reader, node)
    for name in ("expression", "modules"):
        if name not in found:
            reader.fail(1, f"no {name}", expected="at least expression and modules")
    return RecipeFile(**found)


class _RecipeReader:
    """Nodes of a YAML document, so that every value keeps its line; nothing is constructed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def root(self) -> Any:
        try:
            if self.path.stat().st_size > MAX_BYTES:
                raise UsageError.build(self.path, "too large", expected=f"<= {MAX_BYTES} bytes")
            text = self.path.read_text(encoding="utf-8")
            return yaml.compose(text, Loader=yaml.SafeLoader)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError.build(self.path, f"cannot be read ({error})") from None
        except RecursionError:
            raise UsageError.build(self.path, "not a recipe: nested too deep") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            problem = getattr(error, "problem", None) or str(error)
            self.fail(mark.line + 1 if mark else 1, f"not YAML ({problem})")

    def fail(self, line: int, what: str, **parts: Any) -> NoReturn:
        raise UsageError.build(f"{self.path}, line {line}", what, **parts)

    def pairs(self, node: Any, what: str) -> Iterator[tuple[tuple[str, int], Any]]:
        """(key, line) and value node of a mapping; a key given twice is refused."""
        if not isinstance(node, yaml.MappingNode):
            line = node.start_mark.line + 1 if node is not None else 1
            self.fail(line, f"{what} must be a mapping", expected="key: value")
        seen: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            name = self.text(key, f"a key of {what}")
            if name in seen:
                self.fail(line, f"key {name!r} given twice")
            seen.add(name)
            yield (name, line), value

    def text(self, node: Any, what: str) -> str:
        """A string as it is written, whatever YAML takes it for: a module may be called 1 or no."""
        if not isinstance(node, yaml.ScalarNode) or not node.value.strip():
            self.fail(node.start_mark.line + 1, f"{what} must be text")
        if node.tag.removeprefix(TAG) not in PLAIN_TAGS:
            self.fail(node.start_mark.line + 1, f"{what} has a tag", found=node.tag)
        return str(node.value)

    def number(self, node: Any, what: str) -> float:
        text = self.text(node, what)
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            self.fail(node.start_mark.line + 1, f"{what} must be a finite number", found=text)
        return value

    def word(self, node: Any, what: str, allowed: tuple[str, ...]) -> str:
        text = self.text(node, what)
        if text not in allowed:
            self.fail(
                node.start_mark.line + 1, f"unknown {what}", found=text,
                expected=" or ".join(allowed), do=close_match(text, allowed),
            )  # fmt: skip
        return text


def _expression(reader: _RecipeReader, node: Any) -> str:
    return reader.text(node, "expression")


def _modules(reader: _RecipeReader, node: Any) -> dict[str, str]:
    folder = reader.path.parent
    return {
        name: _place(folder, reader.text(value, f"the path of {name}"))
        for (name, _), value in reader.pairs(node, "modules")
    }


def _place(folder: Path, text: str) -> str:
    """A path relative to the file's folder, or a hub name."""
    named = hub_name.reference(text, folder)
    return str(folder / Path(text).expanduser()) if named is None else str(named)


def _rank(reader: _RecipeReader, node: Any) -> Rank:
    where = f"{reader.path}, line {node.start_mark.line + 1}"
    try:
        return ranks.parse(reader.text(node, "rank"), where)
    except PEMError as error:
        raise UsageError(str(error)) from None


def _layers(reader: _RecipeReader, node: Any) -> dict[str, dict[str, float]]:
    out: dict[str, dict[str, float]] = {}
    for (name, _), patterns in reader.pairs(node, "layers"):
        out[name] = {}
        for (pattern, line), value in reader.pairs(patterns, f"layers of {name}"):
            compile_pattern(pattern, f"{reader.path}, line {line}")
            out[name][pattern] = reader.number(value, f"the factor of {pattern}")
    return out


def _one_of(what: str, allowed: tuple[str, ...]) -> Callable[[_RecipeReader, Any], str]:
    return lambda reader, node: reader.word(node, what, allowed)


READERS: Mapping[str, Callable[[_RecipeReader, Any], Any]] = {
    "expression": _expression,
    "modules": _modules,
    "space": _one_of("space", SPACES),
    "rank": _rank,
    "head": _one_of("head", HEADS),
    "dtype": _one_of("dtype", DTYPES),
    "layers": _layers,
}
