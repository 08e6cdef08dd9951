"""How a composed module is written down: expression, label inside another one, method, notes.

The text of an expression is what ``expression.parse`` reads, in the module's own space, wherever
the names of its modules are plain. No torch.
"""

from __future__ import annotations

from math import isinf
from typing import TYPE_CHECKING

from pem_composition.arithmetic.methods.registry import SIMPLE, SUM, Choice, RecordedMethod
from pem_composition.arithmetic.methods.settings import shown
from pem_composition.arithmetic.ranks import Rank

if TYPE_CHECKING:
    from pem_composition.arithmetic.operand import Operand
    from pem_composition.record import Provenance

ALONE = ("negation", "layers")  # methods of one module, whose label says what was done
PLAIN = (SUM, *ALONE)


def method_text(choice: Choice, rank: Rank | None) -> str:
    """What provenance records: ``sum``, ``sum, rank 8`` or ``ties(density=0.2, ...)``."""
    name = SUM if choice.method == SIMPLE else str(choice)
    return name if rank is None else f"{name}, rank {rank}"


def expression_of(p: Provenance) -> str:
    """The terms as a sum, or as the arguments of the method; empty for a module as it is."""
    if not p.terms or p.method is None or p.method.startswith(PLAIN):
        return " ".join(
            f"{'-' if t.coefficient < 0 else '+'}{shown(abs(t.coefficient))}*{t.label}"
            for t in p.terms
        )
    arguments = [
        t.label if t.coefficient == 1.0 else f"{shown(t.coefficient)}*{t.label}" for t in p.terms
    ]
    record = RecordedMethod.split(p.method)
    return f"{record.name}({', '.join([*arguments, *record.settings])})"


def label_of(module: Operand, space: str) -> str:
    """What stands for a module in an expression of a space."""
    p = module.provenance
    if p.space is None or not p.terms or p.method is None:
        return module.name
    rank = RecordedMethod.split(p.method).rank
    if not p.method.startswith(PLAIN):
        text = expression_of(p)
        return text if rank is None else f"{text[:-1]}, rank={rank})"
    lone = len(p.terms) == 1 and p.terms[0].coefficient == 1.0
    text = p.terms[0].label if lone else expression_of(p)
    if rank is not None:
        return f"delta({text}, rank={rank})"
    if p.space != space and not (lone and "(" not in text):  # 1 * name is the same in both
        return f"{p.space}({text})"
    return text if lone else f"({text})"


def kept_energy(p: Provenance) -> float | None:
    """The share of the update's energy that a module of a rank keeps; None for one of full rank."""
    if p.certificate is None or not p.terms or p.method is None or p.method.startswith(ALONE):
        return None
    ranked = RecordedMethod.split(p.method).rank is not None
    return p.certificate.kept_energy if ranked else None


def error_text(p: Provenance) -> str:
    """``0.21``, or of a rank ``0.21, which keeps 95.6 % of the energy``."""
    kept = kept_energy(p)
    shown = f"{100 * kept:.4g}" if kept is not None else ""
    return f"{p.certificate}" + (f", which keeps {shown} % of the energy" if shown else "")


def notes_of(module: Operand) -> tuple[str, ...]:
    """Its notes, and its own error where the certificate of a sum would hide it."""
    p = module.provenance
    error = p.certificate
    if error is None or error.total < 1e-6 or isinf(error.total):  # then a note says why
        return p.notes
    return (*p.notes, f"{module} is off {error.against} by {error}")
