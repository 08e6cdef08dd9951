"""The language of expressions over modules: a tokenizer, a grammar, a tree (``trees``); no eval.

    sum      = product (("+" | "-") product)*
    product  = unary (("*" | "/") unary)*
    unary    = ("+" | "-") unary | atom
    atom     = number | name | "(" sum ")" | function "(" argument ("," argument)* ")"
    argument = sum | string | name "=" (["+" | "-"] number | name)

    negate(x, s)  mean(x, ...)  delta(x, rank=R)  parameter(x)  log(x)
    layers(x, "pattern", factor, ...)
    and every merging method, with its settings by name: ties(a, 0.5*b, density=0.2, rank=8)
    (R is a rank, or a share of the energy such as 0.95: ``ranks``)

Numbers and modules are told apart while parsing: a product needs a number on one side, a quotient
on the right, a sum two of the same. An error says its column.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, NoReturn

from pem_composition.arithmetic import ranks
from pem_composition.arithmetic.methods.registry import METHODS, SIMPLE, resolve
from pem_composition.arithmetic.patterns import compile_pattern
from pem_composition.arithmetic.ranks import Rank
from pem_composition.arithmetic.trees import ByLayer, Leaf, Merge, Negation, Node, Sum, Within
from pem_composition.errors import PEMError, UsageError, close_match

TOKEN = re.compile(
    r"(?P<number>(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)|(?P<name>[A-Za-z_][A-Za-z_0-9]*)"
    r'|(?P<string>"[^"\n]*")|(?P<sign>[-+*/(),=])',
    re.ASCII,
)
MAX_DEPTH = 50  # parentheses inside parentheses; far above any use, far below Python's stack
MAX_LENGTH = 20_000
MAX_TERMS = 1_000
RANK = "rank"
BUILT_IN = ("negate", "mean", "delta", "parameter", "log", "layers")
FUNCTIONS = (*BUILT_IN, *METHODS)

Argument = float | str | Sum


class Token(NamedTuple):
    """A piece of the text with its column, counted from 1."""

    kind: str  # number, name, string, sign or end
    text: str
    column: int


class Call(NamedTuple):
    """A function with its arguments, each with the token it begins with."""

    name: Token
    arguments: list[tuple[Argument, Token]]
    keywords: dict[str, tuple[str, Token]]


def parse(text: str) -> Sum:
    """The tree of an expression over modules.

    Raises:
        UsageError: with the column, what is there and what was expected.

    Examples:
        >>> print(parse("0.6*a + 0.4*(b - a)").terms[0])
        (0.6, Leaf(name='a'))
        >>> parse("a * b")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        pem_composition.errors.UsageError: expression, column 3: two modules cannot be ...
    """
    if len(text) > MAX_LENGTH:
        raise UsageError.build(
            "expression", "too long", found=f"{len(text)} characters", expected=f"<= {MAX_LENGTH}"
        )
    reader = _Parser(text)
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


def _tokens(text: str) -> Iterator[Token]:
    position = 0
    while True:
        while position < len(text) and text[position].isspace():
            position += 1
        if position == len(text):
            yield Token("end", "the end", position + 1)
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


def _place(at: Token) -> str:
    return f"expression, column {at.column}"


def _refuse(
    at: Token, what: str, *, found: object = None, expected: object = None, do: str = ""
) -> NoReturn:
    raise UsageError.build(_place(at), what, found=found, expected=expected, do=do)


class _Parser:
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
        _refuse(self.token, what, expected=expected)

    def expect(self, sign: str) -> None:
        if self.token.text != sign:
            self.fail(f"unexpected {self.token.text!r}", repr(sign))
        self.take()

    def sum(self) -> float | Sum:
        value = self.product()
        while self.token.text in ("+", "-"):
            operator = self.take()
            right = self.product()
            value = _add(value, right if operator.text == "+" else _times(right, -1.0), operator)
        return value

    def product(self) -> float | Sum:
        value = self.unary()
        while self.token.text in ("*", "/"):
            operator = self.take()
            value = _multiply(value, self.unary(), operator)
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
            return _finite(float(token.text), token)
        if token.kind == "name":
            self.take()
            return self.call(token) if self.token.text == "(" else _one(Leaf(token.text))
        if token.text == "(":
            with self.inside():
                value = self.sum()
            return value
        self.fail(f"unexpected {token.text!r}", "a number, a module or '('")

    @contextmanager
    def inside(self) -> Iterator[None]:
        """What stands between parentheses."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail("too many nested parentheses", f"at most {MAX_DEPTH}")
        self.expect("(")
        yield
        self.expect(")")
        self.depth -= 1

    def call(self, name: Token) -> Sum:
        if name.text not in FUNCTIONS:
            remedy = close_match(name.text, FUNCTIONS)
            known = None if remedy else ", ".join(FUNCTIONS)
            _refuse(name, f"no function {name.text!r}", expected=known, do=remedy)
        call = Call(name, [], {})
        with self.inside():
            self.argument(call)
            while self.token.text == ",":
                self.take()
                self.argument(call)
        return _BUILDERS.get(name.text, _method)(call)

    def argument(self, call: Call) -> None:
        start = self.token
        following = self.tokens[min(self.index + 1, len(self.tokens) - 1)]
        if start.kind == "name" and following.text == "=":
            self.keyword(call)
        elif call.keywords:
            _refuse(start, "an argument after a setting", do="give modules first")
        elif start.kind == "string":
            call.arguments.append((self.take().text[1:-1], start))
        else:
            call.arguments.append((self.sum(), start))

    def keyword(self, call: Call) -> None:
        name = self.take()
        self.take()
        sign = self.take().text if self.token.text in ("+", "-") else ""
        if self.token.kind != "number" and (sign or self.token.kind != "name"):
            self.fail(f"unexpected {self.token.text!r}", f"the value of {name.text}")
        if name.text in call.keywords:
            _refuse(name, f"{name.text} given twice")
        call.keywords[name.text] = (sign + self.take().text, name)


# --- functions ---


def _negate(call: Call) -> Sum:
    values = [value for value, _ in call.arguments]
    module, strength = (values[0] if values else None), (values[1] if len(values) > 1 else 1.0)
    fits = isinstance(module, Sum) and isinstance(strength, float) and len(values) <= 2
    if not fits or call.keywords:
        _refuse(
            call.name,
            "wrong arguments of negate",
            expected="negate(module) or negate(module, strength)",
        )
    assert isinstance(module, Sum) and isinstance(strength, float)
    return _one(Negation(module, strength))


def _mean(call: Call) -> Sum:
    parts = _modules(call)
    _no_settings(call)
    return _joined([part.scaled(1.0 / len(parts)) for part in parts], call.name)


def _delta(call: Call) -> Sum:
    (module,) = _modules(call, 1)
    rank = _own_rank(call)
    _no_settings(call)
    return _one(Within("delta", module, rank))


def _within(call: Call) -> Sum:
    """parameter(x), log(x)."""
    (module,) = _modules(call, 1)
    _no_settings(call)
    return _one(Within(call.name.text, module))


def _layers(call: Call) -> Sum:
    module, rest = (call.arguments[0][0] if call.arguments else None), call.arguments[1:]
    pairs = list(zip(rest[::2], rest[1::2], strict=False))
    well_typed = all(isinstance(p, str) and isinstance(f, float) for (p, _), (f, _) in pairs)
    if not isinstance(module, Sum) or call.keywords or not rest or len(rest) % 2 or not well_typed:
        _refuse(
            call.name,
            "wrong arguments of layers",
            expected='layers(module, "pattern", factor, ...)',
        )
    factors = []
    for (pattern, at), (factor, _) in pairs:
        assert isinstance(pattern, str) and isinstance(factor, float)
        with _as_usage():
            factors.append((compile_pattern(pattern, _place(at)).text, factor))
    return _one(ByLayer(module, tuple(factors)))


def _method(call: Call) -> Sum:
    modules = _modules(call)
    rank = _own_rank(call)
    name = call.name.text
    if name == SIMPLE:
        _no_settings(call)
        total = _joined(modules, call.name)
        return total if rank is None else _one(Within("delta", total, rank))
    settings = {key: value for key, (value, _) in call.keywords.items()}
    places = {key: f"{_place(at)}: {name}" for key, (_, at) in call.keywords.items()}
    with _as_usage():
        choice = resolve(name, settings, where=f"{_place(call.name)}: {name}", places=places)
    if rank is not None and choice.entry.space != "delta":
        _refuse(call.name, f"{choice.method} takes no rank")
    return _one(Merge(choice, tuple(modules), rank))


_BUILDERS: Mapping[str, Callable[[Call], Sum]] = {
    "negate": _negate,
    "mean": _mean,
    "delta": _delta,
    "parameter": _within,
    "log": _within,
    "layers": _layers,
}


def _modules(call: Call, count: int | None = None) -> list[Sum]:
    """The arguments, which must be modules."""
    for value, at in call.arguments:
        if not isinstance(value, Sum):
            kind = "text" if isinstance(value, str) else "numbers"
            _refuse(at, f"{call.name.text} takes modules, not {kind}")
    found = [value for value, _ in call.arguments if isinstance(value, Sum)]
    if not found or (count is not None and len(found) != count):
        expected = "at least one module" if count is None else f"{count} module"
        _refuse(call.name, f"wrong arguments of {call.name.text}", expected=expected)
    return found


def _own_rank(call: Call) -> Rank | None:
    """The rank among the settings, taken out."""
    if RANK not in call.keywords:
        return None
    value, at = call.keywords.pop(RANK)
    with _as_usage():
        return ranks.parse(value, _place(at))


def _no_settings(call: Call) -> None:
    for name, (_, at) in call.keywords.items():
        _refuse(at, f"{call.name.text} has no setting {name!r}")


@contextmanager
def _as_usage() -> Iterator[None]:
    """Errors from below are wrong usage here."""
    try:
        yield
    except PEMError as error:
        raise UsageError(str(error)) from None


# --- arithmetic of numbers and sums ---


def _one(node: Node) -> Sum:
    return Sum(((1.0, node),))


def _joined(parts: list[Sum], at: Token) -> Sum:
    terms = tuple(t for part in parts for t in part.terms)
    if len(terms) > MAX_TERMS:
        _refuse(at, "too many terms", found=len(terms), expected=f"at most {MAX_TERMS}")
    return Sum(terms)


def _times(value: float | Sum, factor: float) -> float | Sum:
    return value.scaled(factor) if isinstance(value, Sum) else value * factor


def _add(left: float | Sum, right: float | Sum, operator: Token) -> float | Sum:
    if isinstance(left, Sum) and isinstance(right, Sum):
        return _joined([left, right], operator)
    if isinstance(left, float) and isinstance(right, float):
        return _finite(left + right, operator)
    _refuse(
        operator, "a number and a module cannot be added", do="multiply the module by the number"
    )


def _multiply(left: float | Sum, right: float | Sum, operator: Token) -> float | Sum:
    if operator.text == "/":
        if isinstance(right, Sum):
            _refuse(operator, "division by a module", expected="a number after '/'")
        if right == 0:
            _refuse(operator, "division by zero")
        return _checked(
            _times(left, 1.0 / right) if isinstance(left, Sum) else left / right, operator
        )
    if isinstance(left, Sum) and isinstance(right, Sum):
        _refuse(
            operator, "two modules cannot be multiplied", expected="a number on one side of '*'"
        )
    module, factor = (left, right) if isinstance(left, Sum) else (right, left)
    assert isinstance(factor, float)
    return _checked(_times(module, factor), operator)


def _checked(value: float | Sum, at: Token) -> float | Sum:
    for number in [value] if isinstance(value, float) else [c for c, _ in value.terms]:
        _finite(number, at)
    return value


def _finite(value: float, at: Token) -> float:
    if not math.isfinite(value):
        _refuse(at, "a number too large for a double")
    return value
