"""Trees of expressions over modules, what they mean, and their text.

A tree is a sum of terms, coefficient * node. A node is

    Leaf       a module by name
    Negation   negate(x, s): the effect times -s
    Merge      a merging method on arguments, whose coefficients go to the method
    Within     delta(x), parameter(x) or log(x): a sum in this space, delta with a rank of its own
    ByLayer    a module whose coefficient differs by layer

``evaluate`` makes one n-ary combination of a sum and never splits what the algebra does not: in
delta space negations and nested delta sums dissolve into coefficients, and in log space, where the
effect of l is log l and its negation 1 / l; in parameter space a negation is no multiple and stays
whole; merges, other spaces and truncations stay whole in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, Protocol, TypeVar

from pem_composition.arithmetic.methods.registry import Choice
from pem_composition.arithmetic.methods.settings import shown
from pem_composition.arithmetic.patterns import compile_pattern
from pem_composition.arithmetic.ranks import Rank
from pem_composition.errors import PEMError

M = TypeVar("M")


@dataclass(frozen=True)
class Leaf:
    """A module by name."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Negation:
    """negate(sum, strength)."""

    sum: Sum
    strength: float = 1.0

    def __str__(self) -> str:
        strength = "" if self.strength == 1.0 else f", {shown(self.strength)}"
        return f"negate({self.sum}{strength})"


@dataclass(frozen=True)
class Merge:
    """method(argument, ..., setting=value, ..., rank=R)."""

    choice: Choice
    arguments: tuple[Sum, ...]
    rank: Rank | None = None

    def __str__(self) -> str:
        settings = [f"{name}={shown(value)}" for name, value in self.choice.settings]
        inside = [*map(str, self.arguments), *settings, *_rank(self.rank)]
        return f"{self.choice.method}({', '.join(inside)})"


@dataclass(frozen=True)
class Within:
    """delta(sum, rank=R), parameter(sum) or log(sum)."""

    space: str
    sum: Sum
    rank: Rank | None = None

    def __str__(self) -> str:
        return f"{self.space}({', '.join([str(self.sum), *_rank(self.rank)])})"


@dataclass(frozen=True)
class ByLayer:
    """layers(sum, "pattern", factor, ...): in a layer the factor of the first pattern that
    matches its name, 1 if none does."""

    sum: Sum
    factors: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        pairs = [f'"{pattern}", {shown(factor)}' for pattern, factor in self.factors]
        return f"layers({', '.join([str(self.sum), *pairs])})"


Node = Leaf | Negation | Merge | Within | ByLayer


@dataclass(frozen=True)
class Sum:
    """sum_i coefficient_i * node_i; what every expression over modules is."""

    terms: tuple[tuple[float, Node], ...]

    def scaled(self, factor: float) -> Sum:
        """factor * self."""
        return Sum(tuple((factor * c, node) for c, node in self.terms))

    @property
    def lone(self) -> Node | None:
        """The node of a sum that is one node with coefficient 1."""
        return self.terms[0][1] if len(self.terms) == 1 and self.terms[0][0] == 1.0 else None

    def __str__(self) -> str:
        """``0.6*a - 0.4*b``."""
        out = ""
        for c, node in self.terms:
            size = "" if abs(c) == 1.0 else f"{shown(abs(c))}*"
            sign = "-" if c < 0 else "+"
            out += f" {sign} {size}{node}" if out else f"{'-' if c < 0 else ''}{size}{node}"
        return out


def _rank(rank: Rank | None) -> list[str]:
    return [] if rank is None else [f"rank={rank}"]


class Operations(Protocol[M]):
    """What the nodes do to modules; ``final`` marks the operation whose result is the tree's."""

    def combine(
        self,
        modules: Sequence[M],
        coefficients: Sequence[float],
        space: str,
        rank: Rank | None,
        *,
        final: bool,
    ) -> M:
        """sum_i c_i m_i in a space."""
        ...

    def merge(
        self,
        modules: Sequence[M],
        coefficients: Sequence[float],
        choice: Choice,
        rank: Rank | None,
        *,
        final: bool,
    ) -> M:
        """A method on modules."""
        ...

    def negate(self, module: M, strength: float, *, final: bool) -> M:
        """The module with its effect times -strength."""
        ...

    def layers(
        self, module: M, factors: Sequence[tuple[str, float]], space: str, *, final: bool
    ) -> M:
        """The module with a factor per layer."""
        ...


def children(node: Node) -> tuple[Sum, ...]:
    """The sums below a node."""
    if isinstance(node, Leaf):
        return ()
    return node.arguments if isinstance(node, Merge) else (node.sum,)


def nodes(tree: Sum) -> Iterator[Node]:
    """Every node of a tree, in the order written."""
    for _, node in tree.terms:
        yield node
        for child in children(node):
            yield from nodes(child)


def names(tree: Sum) -> tuple[str, ...]:
    """Names of the modules, each once, in the order of first use."""
    return tuple(dict.fromkeys(n.name for n in nodes(tree) if isinstance(n, Leaf)))


def coefficients(tree: Sum, layer: str) -> dict[str, float]:
    """Coefficient of every module in one layer, where a sum is one of updates or of differences.

    Raises:
        PEMError: a merging method or a rank, which make it no sum.
    """
    found: dict[str, float] = {}
    for c, node in tree.terms:
        if isinstance(node, Leaf):
            found[node.name] = found.get(node.name, 0.0) + c
            continue
        if isinstance(node, Merge) or (isinstance(node, Within) and node.rank):
            raise PEMError.build(
                f"expression, {node}",
                "no sum of whole models",
                expected="a sum of them",
                do="merge them first (pem merge --full_merge -w METHOD) and fold the result",
            )
        factor = c * (-node.strength if isinstance(node, Negation) else 1.0)
        if isinstance(node, ByLayer):
            hits = (f for text, f in node.factors if _pattern(text).matches(layer))
            factor *= next(hits, 1.0)
        for name, weight in coefficients(node.sum, layer).items():
            found[name] = found.get(name, 0.0) + factor * weight
    return found


_pattern = lru_cache(maxsize=256)(compile_pattern)


def default_space(tree: Sum) -> str:
    """delta where a method that merges updates takes part, else parameter, the paper's."""
    spaces = [n.choice.entry.space for n in nodes(tree) if isinstance(n, Merge)]
    return "delta" if "delta" in spaces else "parameter"


def with_layers(tree: Sum, factors: Mapping[str, Sequence[tuple[str, float]]]) -> Sum:
    """The tree with every module named in ``factors`` replaced by its ``ByLayer``."""

    def replaced(node: Node) -> Node:
        if isinstance(node, Leaf):
            own = factors.get(node.name)
            return ByLayer(Sum(((1.0, node),)), tuple(own)) if own else node
        if isinstance(node, Merge):
            return Merge(node.choice, tuple(map(walk, node.arguments)), node.rank)
        if isinstance(node, Within):
            return Within(node.space, walk(node.sum), node.rank)
        if isinstance(node, ByLayer):
            return ByLayer(walk(node.sum), node.factors)
        return Negation(walk(node.sum), node.strength)

    def walk(part: Sum) -> Sum:
        return Sum(tuple((c, replaced(node)) for c, node in part.terms))

    return walk(tree)


def evaluate(
    tree: Sum,
    modules: Mapping[str, M],
    operations: Operations[M],
    space: str,
    rank: Rank | None = None,
    *,
    final: bool = True,
) -> M:
    """The module that a tree stands for, its sums taken in ``space``, truncated to ``rank``."""
    walk = _Walk(modules, operations)
    return walk.sum(tree, space, rank, final=final)


@dataclass(frozen=True)
class _Walk(Generic[M]):
    """One evaluation: nodes to modules, from the leaves up."""

    modules: Mapping[str, M]
    operations: Operations[M]

    def sum(self, tree: Sum, space: str, rank: Rank | None, *, final: bool) -> M:
        """One combination, or the node itself where a sum is nothing but that."""
        lone = tree.lone
        if isinstance(lone, Merge) and None in (rank, lone.rank):
            return self.merge(lone, rank or lone.rank, final=final)
        if isinstance(lone, Within) and rank is None:
            return self.sum(lone.sum, lone.space, lone.rank, final=final)
        whole = isinstance(lone, ByLayer) or (isinstance(lone, Negation) and space == "parameter")
        if lone is not None and whole and rank is None:
            return self.node(lone, space, final=final)
        flat = list(_flat(tree, 1.0, space))
        operands = [self.node(node, space) for _, node in flat]
        return self.operations.combine(operands, [c for c, _ in flat], space, rank, final=final)

    def node(self, node: Node, space: str, *, final: bool = False) -> M:
        if isinstance(node, Leaf):
            return self.modules[node.name]
        if isinstance(node, Merge):
            return self.merge(node, node.rank, final=final)
        if isinstance(node, Within):
            return self.sum(node.sum, node.space, node.rank, final=final)
        module = self.operand(node.sum, space)
        if isinstance(node, ByLayer):
            return self.operations.layers(module, node.factors, space, final=final)
        return self.operations.negate(module, node.strength, final=final)

    def operand(self, tree: Sum, space: str) -> M:
        """A sum as an operand: a lone node as it is, but in log space a negation is a power."""
        if tree.lone is not None and not (space == "log" and isinstance(tree.lone, Negation)):
            return self.node(tree.lone, space)
        return self.sum(tree, space, None, final=False)

    def merge(self, node: Merge, rank: Rank | None, *, final: bool) -> M:
        """The method on its arguments: a single term's factor is its coefficient."""
        space = node.choice.entry.space
        operands, coefficients = [], []
        for argument in node.arguments:
            single = len(argument.terms) == 1
            coefficient, inner = argument.terms[0] if single else (1.0, None)
            coefficients.append(coefficient)
            operands.append(
                self.node(inner, space) if inner is not None else self.operand(argument, space)
            )
        return self.operations.merge(operands, coefficients, node.choice, rank, final=final)


def _flat(tree: Sum, factor: float, space: str) -> Iterator[tuple[float, Node]]:
    """Terms of the one combination that a sum is in a space."""
    for c, node in tree.terms:
        if isinstance(node, Within) and node.space == space and node.rank is None:
            yield from _flat(node.sum, factor * c, space)
        elif isinstance(node, Negation) and space != "parameter":
            yield from _flat(node.sum, -factor * c * node.strength, space)
        else:
            yield factor * c, node
