"""What other programs compute, for comparing with their numbers: sums of the modules' own tensors.

None of them is the sum of updates: a sum of factors has the cross terms of every pair, and each
tool weighs them its own way (docs/methods.md has the table). All write sum_i w_i t_i of the tensors
of one name, whatever the role: no neutral value, and a sign on A and on B is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pem_composition.errors import PEMError


def normalised(coefficients: Sequence[float], tool: str) -> list[float]:
    """c_i / sum_j c_j, as these tools do.

    Raises:
        PEMError: the sum is zero.
    """
    total = math.fsum(coefficients)
    if not total:
        raise PEMError.build(
            tool, "coefficients are divided by their sum, which is 0",
            found=", ".join(f"{c:g}" for c in coefficients),
            do="use --coefficients without --as, which are taken as given",
        )  # fmt: skip
    return [c / total for c in coefficients]


def reference(coefficients: Sequence[float]) -> list[float]:
    """The paper's own merge program: coefficients divided by their sum.

    Source: github.com/hkust-nlp/PEM_composition, merge.py with merge_way simple.
    """
    return normalised(coefficients, "reference")


def reference_detoxify(role: str, coefficients: Sequence[float]) -> list[float]:
    """Weights of the tensors in A = c_1 A_1 + c_2 A_2, B = c_1 B_1 - c_2 B_2.

    With c = (1 + s, -s) these are the factors a + s (a - toxic) with the sign on A,
    A = A_a + s (A_a - A_t), B = B_a + s (B_a + B_t).
    Source: peft_negation of github.com/hkust-nlp/PEM_composition, coefficients (1, s).
    """
    own, toxic = coefficients
    return [own, toxic if role == "lora_A" else -toxic]


def adapters_linear(coefficients: Sequence[float], *, normalize: str) -> list[float]:
    """adapters' average_adapter with combine_strategy linear: divided by their sum by default."""
    if normalize == "true":
        return normalised(coefficients, "adapters_linear")
    return list(coefficients)


def peft_linear(role: str, coefficient: float, scaling: float) -> float:
    """Weight of one module's tensor in PEFT's add_weighted_adapter with linear.

    A: sgn(c) sqrt(abs(c s)), B: sqrt(abs(c s)), and the merged adapter has scaling 1; (IA)^3: c.
    """
    if role == "ia3":
        return coefficient
    root = math.sqrt(abs(coefficient * scaling))
    return math.copysign(root, coefficient) if role == "lora_A" else root
