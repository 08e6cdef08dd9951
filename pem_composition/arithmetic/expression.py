"""Expressions over named modules: ``0.6*a + 0.4*(b - c)``. A tokenizer, a grammar, a tree; no eval.

    sum     = product (("+" | "-") product)*
    product = unary (("*" | "/") unary)*
    unary   = ("+" | "-") unary | atom
    atom    = number | name | "(" sum ")" | call
    call    = "negate(" sum ["," number] ")" | "mean(" sum ("," sum)* ")"

Numbers and modules are told apart while parsing: a product needs a number on one side, a quotient
on the right, a sum two of the same. The tree is flattened into one n-ary combination, in which
``negate`` stays whole in parameter space, where it is no multiple of its module.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, NoReturn, TypeVar

from pem_composition.errors import UsageError

M = TypeVar("M")

TOKEN = re.compile(
    r"(?P<number>(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)|(?P<name>[A-Za-z_][A-Za-z_0-9]*)|(?P<sign>[-+*/(),])"
)
MAX_LENGTH = 10_000  # characters
MAX_DEPTH = 50  # parentheses inside parentheses; far above any use, far below Python's stack
FUNCTIONS = ("negate", "mean")


@dataclass(frozen=True)
class Leaf:
    """A module by name."""

    name: str


@dataclass(frozen=True)
class Negation:
    """negate(sum, strength)."""

    sum: Sum
    strength: float


@dataclass(frozen=True)
class Sum:
    """sum_i coefficient_i * node_i; what every expression over modules is."""

    terms: tuple[tuple[float, Leaf | Negation], ...]

    def scaled(self, factor: float) -> Sum:
        """factor * self."""
        return Sum(tuple((factor * c, node) for c, node in self.terms))


class Token(NamedTuple):
    """A piece of the text with its column, counted from 1."""

    kind: str  # number, name, sign or end
    text: str
    column: int


def parse(text: str) -> Sum:
    """The tree of an expression over modules.

    Raises:
        UsageError: with the column, what is there and what was expected.
    """
    if len(text) > MAX_LENGTH:
        raise UsageError.build(
            "expression", "too long", found=f"{len(text)} characters", expected=MAX_LENGTH
        )
    reader = _Reader(text)
    value = reader.sum()
    if reader.token.kind != "end":
        reader.fail("unexpected " + repr(reader.token.text), "an operator or the end")
    if isinstance(value, float):
        raise UsageError.build(
            "expression",
            "a number, not a module",
            found=text.strip(),
            expected="at least one module name",
        )
    return value


def names(tree: Sum) -> tuple[str, ...]:
    """Names of the modules, each once, in the order of first use."""
    return tuple(dict.fromkeys(_leaves(tree)))


def evaluate(
    tree: Sum,
    modules: Mapping[str, M],
    combine: Callable[[list[M], list[float]], M],
    negate: Callable[[M, float], M] | None,
) -> M:
    """One combination; ``negate=None`` where a negation is a multiple, as in delta space."""
    if negate is None:
        flat = list(_linear(tree, 1.0))
        return combine([modules[name] for _, name in flat], [c for c, _ in flat])
    operands = [_operand(node, modules, combine, negate) for _, node in tree.terms]
    coefficients = [c for c, _ in tree.terms]
    if coefficients == [1.0] and isinstance(tree.terms[0][1], Negation):
        return operands[0]
    return combine(operands, coefficients)


def _operand(
    node: Leaf | Negation,
    modules: Mapping[str, M],
    combine: Callable[[list[M], list[float]], M],
    negate: Callable[[M, float], M],
) -> M:
    if isinstance(node, Leaf):
        return modules[node.name]
    inner = node.sum.terms
    if len(inner) == 1 and inner[0][0] == 1.0:
        return negate(_operand(inner[0][1], modules, combine, negate), node.strength)
    return negate(evaluate(node.sum, modules, combine, negate), node.strength)


def _linear(tree: Sum, factor: float) -> Iterator[tuple[float, str]]:
    for c, node in tree.terms:
        if isinstance(node, Leaf):
            yield factor * c, node.name
        else:
            yield from _linear(node.sum, -factor * c * node.strength)


def _leaves(tree: Sum) -> Iterator[str]:
    for _, node in tree.terms:
        if isinstance(node, Leaf):
            yield node.name
        else:
            yield from _leaves(node.sum)


def _tokens(text: str) -> Iterator[Token]:
    position = 0
    while True:
        position += len(text[position:]) - len(text[position:].lstrip())
        if position >= len(text):
            yield Token("end", "the end", len(text) + 1)
            return
        match = TOKEN.match(text, position)
        if match is None:
            raise UsageError.build(
                f"expression, column {position + 1}",
                f"unexpected {text[position]!r}",
                expected="a number, a name or one of + - * / ( ) ,",
            )
        yield Token(str(match.lastgroup), match[0], position + 1)
        position = match.end()


class _Reader:
    """Recursive descent; every method reads one rule and returns a number or a Sum."""

    def __init__(self, text: str) -> None:
        self.tokens = list(_tokens(text))
        self.index = 0
        self.depth = 0

    @property
    def token(self) -> Token:
        return self.tokens[self.index]

    def take(self) -> Token:
        """The current token; step to the next."""
        self.index += 1
        return self.tokens[self.index - 1]

    def fail(self, what: str, expected: str) -> NoReturn:
        raise UsageError.build(f"expression, column {self.token.column}", what, expected=expected)

    def expect(self, sign: str) -> None:
        if self.token.text != sign:
            self.fail(f"unexpected {self.token.text!r}", repr(sign))
        self.take()

    def sum(self) -> float | Sum:
        value = self.product()
        while self.token.text in ("+", "-"):
            operator = self.take()
            right = self.product()
            value = self._add(
                value, right if operator.text == "+" else _times(right, -1.0), operator
            )
        return value

    def product(self) -> float | Sum:
        value = self.unary()
        while self.token.text in ("*", "/"):
            operator = self.take()
            value = self._multiply(value, self.unary(), operator)
        return value

    def unary(self) -> float | Sum:
        sign = 1.0
        while self.token.text in ("+", "-"):
            sign = -sign if self.take().text == "-" else sign
        return _times(self.atom(), sign)

    def atom(self) -> float | Sum:
        token = self.token
        if token.kind == "number":
            self.take()
            return self._finite(float(token.text), token)
        if token.kind == "name":
            self.take()
            return self._call(token) if self.token.text == "(" else Sum(((1.0, Leaf(token.text)),))
        if token.text == "(":
            return self._inside()[0]
        self.fail(f"unexpected {token.text!r}", "a number, a module or '('")

    def _inside(self) -> list[float | Sum]:
        """What stands between parentheses, split at commas."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail("too many nested parentheses", f"at most {MAX_DEPTH}")
        is_call = self.index > 0 and self.tokens[self.index - 1].kind == "name"
        self.expect("(")
        values = [self.sum()]
        while is_call and self.token.text == ",":
            self.take()
            values.append(self.sum())
        self.expect(")")
        self.depth -= 1
        return values

    def _call(self, name: Token) -> Sum:
        if name.text not in FUNCTIONS:
            raise UsageError.build(
                f"expression, column {name.column}",
                f"no function {name.text!r}",
                expected=" or ".join(FUNCTIONS),
            )
        arguments = self._inside()
        where = f"expression, column {name.column}"
        if name.text == "mean":
            parts = [a for a in arguments if isinstance(a, Sum)]
            if len(parts) != len(arguments):
                raise UsageError.build(where, "mean takes modules, not numbers")
            return Sum(tuple(t for part in parts for t in part.scaled(1.0 / len(parts)).terms))
        module, strength = arguments[0], arguments[1] if len(arguments) > 1 else 1.0
        if len(arguments) > 2 or not isinstance(module, Sum) or not isinstance(strength, float):
            raise UsageError.build(
                where,
                "wrong arguments of negate",
                expected="negate(module) or negate(module, strength)",
            )
        return Sum(((1.0, Negation(module, strength)),))

    def _add(self, left: float | Sum, right: float | Sum, operator: Token) -> float | Sum:
        if isinstance(left, Sum) and isinstance(right, Sum):
            return Sum(left.terms + right.terms)
        if isinstance(left, float) and isinstance(right, float):
            return self._finite(left + right, operator)
        where = f"expression, column {operator.column}"
        raise UsageError.build(
            where, "a number and a module cannot be added", do="multiply the module by the number"
        )

    def _multiply(self, left: float | Sum, right: float | Sum, operator: Token) -> float | Sum:
        where = f"expression, column {operator.column}"
        if operator.text == "/":
            if isinstance(right, Sum):
                raise UsageError.build(where, "division by a module", expected="a number after '/'")
            if right == 0:
                raise UsageError.build(where, "division by zero")
            return self._checked(
                _times(left, 1.0 / right) if isinstance(left, Sum) else left / right, operator
            )
        if isinstance(left, Sum) and isinstance(right, Sum):
            raise UsageError.build(
                where, "two modules cannot be multiplied", expected="a number on one side of '*'"
            )
        module, factor = (left, right) if isinstance(left, Sum) else (right, left)
        assert isinstance(factor, float)
        return self._checked(_times(module, factor), operator)

    def _checked(self, value: float | Sum, at: Token) -> float | Sum:
        for number in [value] if isinstance(value, float) else [c for c, _ in value.terms]:
            self._finite(number, at)
        return value

    def _finite(self, value: float, at: Token) -> float:
        if not math.isfinite(value):
            raise UsageError.build(
                f"expression, column {at.column}", "a number too large for a double"
            )
        return value


def _times(value: float | Sum, factor: float) -> float | Sum:
    return value.scaled(factor) if isinstance(value, Sum) else value * factor
