"""Log space: (IA)^3 vectors multiplied as they act, out = prod_i l_i^(c_i), entry by entry.

An (IA)^3 layer multiplies, so two of them one after the other are l_1 * l_2, and the inverse of l
is 1 / l. The logarithms are the vectors of this space: sum_i c_i log l_i. Defined for l > 0 only.

Computed as exp(sum_i c_i log l_i) in float64, so that in float32 1 * a is a and a - a is 1, bit for
bit; a lone term with coefficient 1 is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pem_composition.arithmetic.compatible import LOG_REMEDY, check_log_kind
from pem_composition.arithmetic.updates import check_shapes, union_config
from pem_composition.config import AdapterConfig
from pem_composition.errors import PEMError

if TYPE_CHECKING:
    from torch import Tensor

    from pem_composition.arithmetic.operand import Operand
    from pem_composition.arithmetic.terms import LayerError

Terms = Sequence[tuple[float, str, "Tensor"]]  # coefficient, name of the module, its vector


def log_sum(
    modules: Sequence[Operand], coefficients: Sequence[float]
) -> tuple[dict[str, Tensor], AdapterConfig]:
    """Vectors and config of prod_i l_i^(c_i); a layer that a module lacks counts as l = 1.

    Raises:
        IncompatibleModules: a module that is no (IA)^3.
        PEMError: an entry that is not positive, or a product outside the dtype's range, by name.
    """
    check_log_kind(modules)
    names = sorted({n for m in modules for n in m.adapter_names})
    tensors = {name: power_product(name, _terms(modules, coefficients, name)) for name in names}
    return tensors, union_config(modules)


def power_product(name: str, terms: Terms) -> Tensor:
    """prod_i l_i^(c_i) of one tensor, in the widest dtype of its terms."""
    check_shapes([l_D for _, _, l_D in terms])
    if len(terms) == 1 and terms[0][0] == 1.0:
        logarithms(name, terms)
        return terms[0][2]
    exact = logarithms(name, terms).exp()
    wide = (
        exact.dtype if any(l_D.dtype == exact.dtype for _, _, l_D in terms) else terms[0][2].dtype
    )
    out = exact.to(wide)
    bad = ~(out.isfinite() & (out > 0))
    if bool(bad.any()):
        raise PEMError.build(
            name,
            f"the product leaves the range of {str(wide).removeprefix('torch.')}",
            found=f"{float(exact[bad][0]):.4g}",
            expected="finite values > 0",
            do="use smaller coefficients",
        )
    return out


def logarithms(name: str, terms: Terms) -> Tensor:
    """sum_i c_i log l_i, float64.

    Raises:
        PEMError: an entry that has no logarithm; names module, tensor and value.
    """
    import torch

    total = torch.zeros_like(terms[0][2], dtype=torch.float64)
    for c, module, l_D in terms:
        if not bool((l_D > 0).all()):
            raise PEMError.build(
                module,
                f"{name!r} has an entry without a logarithm",
                found=f"{float(l_D.min()):.6g}",
                expected="entries > 0",
                do=LOG_REMEDY,
            )
        total = total + l_D.double().log() * c
    return total


def log_errors(
    result: Operand, modules: Sequence[Operand], coefficients: Sequence[float]
) -> dict[str, LayerError]:
    """Error of each layer's l - 1 against that of the product in float64, before rounding."""
    return {
        name.rpartition(".")[0]: log_error(name, written, _terms(modules, coefficients, name))
        for name, written in result.adapter_tensors().items()
    }


def log_error(name: str, written: Tensor, terms: Terms) -> LayerError:
    """Error of one layer's l - 1, as ``log_errors``."""
    from pem_composition.arithmetic.delta import tensor_error

    return tensor_error(written.double() - 1.0, [(1.0, logarithms(name, terms).expm1())])


def _terms(
    modules: Sequence[Operand], coefficients: Sequence[float], name: str
) -> list[tuple[float, str, Tensor]]:
    return [
        (c, m.name, m.tensors[name])
        for c, m in zip(coefficients, modules, strict=True)
        if name in m.tensors
    ]
