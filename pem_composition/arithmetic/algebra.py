"""Parameter-space arithmetic: pure functions on named tensors.

Knows roles and formulas; knows nothing about models, files or tensor libraries (torch tensors and
NumPy arrays both work). The last component of a name is its role.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from pem_composition.errors import IncompatibleModules, PEMError, UnknownRole, wrong_type

Tensors = Mapping[str, Any]


class Rule(NamedTuple):
    """How one role takes part in a sum."""

    neutral: float  # the value at which the tensor leaves the base model unchanged
    signed: bool  # False: only |coefficient| applies; the sign lives in another factor


RULES: Mapping[str, Rule] = {
    "lora_A": Rule(0.0, signed=False),
    "lora_B": Rule(0.0, signed=True),
    "ia3": Rule(1.0, signed=True),
    "delta": Rule(0.0, signed=True),
    "lora_magnitude": Rule(0.0, signed=True),  # of DoRA, whose modules have no sum: check_linear
}
HEAD = "head"
HEAD_REMEDY = (
    "keep one head (--head first|last) or none (--head none); a module, unlike a checkpoint, can "
    "keep all (--head per-task)"
)
USE_DELTA = "combine in delta space (--space delta), which needs none of this to be equal"
ROLE_OF_KIND = {"ia3": "ia3", "full": "delta"}  # kinds whose update is one tensor for each layer


def neutral_of(kind: str) -> float:
    """The value at which the tensors of such a kind change nothing."""
    return RULES[ROLE_OF_KIND[kind]].neutral


def role_of(name: str) -> str:
    """Last component of a tensor name: lora_A, lora_B, lora_magnitude, ia3, delta or head.

    Raises:
        UnknownRole: the last component is none of these.

    Examples:
        >>> role_of("roberta.encoder.layer.0.attention.self.query.lora_A")
        'lora_A'
    """
    role = name.rpartition(".")[2]
    if role not in RULES and role != HEAD:
        raise UnknownRole.build(
            f"tensor {name!r}",
            "the last component of a tensor name is its role",
            found=repr(role),
            expected=", ".join([*RULES, HEAD]),
            do="rename the tensor",
        )
    return role


def layers_of(names: Iterable[str]) -> tuple[str, ...]:
    """Sorted names of the layers (of full modules: parameters) whose tensors take part in sums."""
    return tuple(sorted({n.rpartition(".")[0] for n in names if role_of(n) != HEAD}))


def linear_combination(modules: Sequence[Tensors], coefficients: Sequence[float]) -> dict[str, Any]:
    """Weighted sum around each role's neutral value: out = e + sum_i w_i (t_i - e).

    w_i = c_i for a signed role (lora_B, ia3, delta), |c_i| for lora_A. Coefficients are used as
    given, never normalised. Evaluated as sum_i w_i t_i + (1 - sum_i w_i) e, so that 1 * a is a
    bit for bit. Heads are left out; see ``average_heads``. Each tensor is asked for once.

    Raises:
        IncompatibleModules: names or shapes differ, or the number of coefficients.

    Examples:
        >>> import numpy as np
        >>> a = {"fc.lora_A": np.array([[1.0, 2.0]]), "fc.lora_B": np.array([[1.0]])}
        >>> b = {"fc.lora_A": np.array([[3.0, 4.0]]), "fc.lora_B": np.array([[5.0]])}
        >>> out = linear_combination([a, b], [1.0, -0.5])  # A: a + 0.5 b; B: a - 0.5 b
        >>> out["fc.lora_A"].tolist(), out["fc.lora_B"].tolist()
        ([[2.5, 4.0]], [[-1.5]])
    """
    names = [[n for n in m if role_of(n) != HEAD] for m in modules]
    check_same_names(names, coefficients)
    out = {}
    for name in names[0]:
        tensors = [m[name] for m in modules]
        check_same_shapes(name, tensors)
        rule = RULES[role_of(name)]
        weights = coefficients if rule.signed else [abs(c) for c in coefficients]
        out[name] = around(rule.neutral, tensors, weights)
    return out


def around(neutral: float, tensors: Sequence[Any], weights: Sequence[float]) -> Any:
    """e + sum_i w_i (t_i - e), evaluated as sum_i w_i t_i + (1 - sum_i w_i) e.

    Examples:
        >>> import numpy as np
        >>> around(1.0, [np.array([2.0]), np.array([4.0])], [0.5, 0.5]).tolist()
        [3.0]
        >>> around(1.0, [np.array([2.0])], [-1.0]).tolist()  # 1 - (2 - 1)
        [0.0]
    """
    total = weighted_sum(tensors, weights)
    # Exact cancellation (convex weights) must not add a rounding error of its own.
    rest = 1.0 - sum(weights)
    return total + rest * neutral if neutral and rest else total


def weighted_sum(tensors: Sequence[Any], weights: Sequence[float]) -> Any:
    """sum_i w_i t_i, one after the other; 1 * t is t bit for bit.

    Examples:
        >>> import numpy as np
        >>> weighted_sum([np.array([1.0, 2.0]), np.array([3.0, 4.0])], [1.0, -1.0]).tolist()
        [-2.0, -2.0]
    """
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        term = tensor * weight
        if term.dtype == total.dtype:
            total += term  # in place: a third tensor per name would leave holes between them
        else:
            total = total + term
    return total


def analogy_weights(coefficient: float) -> tuple[float, float, float]:
    """lam, 1 - lam and lam - 1: of lam * classifier + (1 - lam) * (target_lm - source_lm).

    The rest is that of the number as it is written.

    Examples:
        >>> analogy_weights(0.9)  # and not 0.09999999999999998
        (0.9, 0.1, -0.1)
    """
    rest = float(1 - Decimal(repr(coefficient)))
    return coefficient, rest, 0.0 - rest


def shares(weights: Sequence[float]) -> list[float]:
    """|w_i| / sum_j |w_j|; equal ones if all weights are zero.

    Examples:
        >>> shares([1.0, -3.0])
        [0.25, 0.75]
    """
    total = sum(abs(w) for w in weights)
    return [abs(w) / total if total else 1 / len(weights) for w in weights]


def negate(module: Tensors, strength: float = 1.0) -> dict[str, Any]:
    """Reverse a module's effect, linearly in the strength s.

    LoRA {A, -s B}, (IA)^3 1 - s (l - 1), full -s delta. Source: section 3.2 of
    arXiv:2306.14870 for s = 1; the strength scales the effect, not both factors.

    Examples:
        >>> import numpy as np
        >>> out = negate({"fc.lora_A": np.array([[1.0]]), "fc.lora_B": np.array([[2.0]])}, 0.5)
        >>> out["fc.lora_A"].tolist(), out["fc.lora_B"].tolist()
        ([[1.0]], [[-1.0]])
    """
    out = {}
    for name, tensor in module.items():
        rule = RULES[role_of(name)]
        out[name] = around(rule.neutral, [tensor], [-strength]) if rule.signed else tensor
    return out


def average_heads(heads: Sequence[Tensors], weights: Sequence[float]) -> dict[str, Any]:
    """Average of heads with weights |w_i| / sum_j |w_j| (equal weights if all are zero).

    Raises:
        IncompatibleModules: the heads have different tensors or shapes.

    Examples:
        >>> import numpy as np
        >>> heads = [{"classifier.bias": np.array([1.0])}, {"classifier.bias": np.array([3.0])}]
        >>> average_heads(heads, [1.0, -3.0])["classifier.bias"].tolist()
        [2.5]
    """
    check_same_tensors(heads, weights, what="heads", do=HEAD_REMEDY)
    own = shares(weights)
    return {name: weighted_sum([head[name] for head in heads], own) for name in heads[0]}


def check_same_tensors(
    modules: Sequence[Tensors],
    coefficients: Sequence[float],
    *,
    what: str = "modules",
    do: str = USE_DELTA,
) -> None:
    """Refuse a sum whose operands differ in names or shapes, naming the first difference."""
    check_same_names(modules, coefficients, what=what, do=do)
    for name in modules[0]:
        check_same_shapes(name, [m[name] for m in modules], what=what, do=do)


def check_request(
    modules: Sequence[object], coefficients: Sequence[float], *, what: str = "modules"
) -> None:
    """Refuse no modules, and a wrong number of coefficients."""
    if not modules:
        raise IncompatibleModules.build(
            what, "there is nothing to combine", found=f"no {what}", expected="at least one",
            do=f"give the {what} to combine",
        )  # fmt: skip
    if len(modules) != len(coefficients):
        raise IncompatibleModules.build(
            "coefficients",
            f"one coefficient per {what[:-1]} is needed",
            found=f"{len(coefficients)} coefficients for {len(modules)} {what}",
            do=f"give as many coefficients as {what}",
        )


def check_same_names(
    modules: Sequence[Collection[str]],
    coefficients: Sequence[float],
    *,
    what: str = "modules",
    do: str = USE_DELTA,
) -> None:
    """Refuse operands of different tensors, or another number of coefficients."""
    check_request(modules, coefficients, what=what)
    first = modules[0]
    for i, other in enumerate(modules[1:], start=1):
        only = sorted(set(first) ^ set(other))
        if only:
            holder = 0 if only[0] in first else i
            raise IncompatibleModules.build(
                f"{only[0]!r}",
                f"present in {what[:-1]} {holder} only",
                found=f"{len(first)} tensors in {what[:-1]} 0 and {len(other)} in {what[:-1]} {i}",
                expected="the same tensors in both",
                do=do,
            )


def check_same_shapes(
    name: str, tensors: Sequence[Any], *, what: str = "modules", do: str = USE_DELTA
) -> None:
    """Refuse operands' tensors of one name whose shapes differ."""
    first = tuple(tensors[0].shape)
    for i, tensor in enumerate(tensors[1:], start=1):
        if tuple(tensor.shape) != first:
            raise IncompatibleModules.build(
                f"{name!r}",
                "shapes differ",
                found=f"{first} in {what[:-1]} 0 and {tuple(tensor.shape)} in {what[:-1]} {i}",
                expected="equal shapes",
                do=do,
            )


def as_numbers(coefficients: Iterable[Any], where: str = "coefficients") -> list[float]:
    """The coefficients as finite floats.

    Raises:
        PEMError: a word, nan, an infinity, a whole number beyond any float, or no list.

    Examples:
        >>> as_numbers(["0.3", 1])
        [0.3, 1.0]
    """
    if isinstance(coefficients, str) or not isinstance(coefficients, Iterable):
        raise wrong_type(where, coefficients, "a list of numbers")
    numbers = []
    for c in coefficients:
        try:
            numbers.append(float(c))
        except (TypeError, ValueError, OverflowError):
            numbers.append(math.nan)
        if not math.isfinite(numbers[-1]):
            raise PEMError.build(where, "a coefficient must be a finite number", found=repr(c))
    return numbers


def has_no_effect(module: Tensors) -> bool:
    """True if every tensor that carries a sign has its neutral value: B = 0, l = 1, delta = 0.

    Examples:
        >>> import numpy as np
        >>> has_no_effect({"fc.lora_A": np.ones((1, 2)), "fc.lora_B": np.zeros((2, 1))})
        True
    """
    signed = [n for n in module if role_of(n) != HEAD and RULES[role_of(n)].signed]
    return all(is_neutral(name, module[name]) for name in signed)


def is_neutral(name: str, tensor: Any) -> bool:
    """True if every entry has the value that changes nothing."""
    return bool((tensor == RULES[role_of(name)].neutral).all())
