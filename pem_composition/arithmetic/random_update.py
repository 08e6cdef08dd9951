"""A random update with the shapes and norms of a module's: what a module is compared with.

    LoRA     A, B ~ N(0, 1), scaled so that |A|_F = |A'|_F and |s B A|_F = |s B' A'|_F
    (IA)^3   l = 1 + g,  g ~ N(0, 1) scaled so that |g| = |l' - 1|
    full     delta ~ N(0, 1), scaled so that |delta|_F = |delta'|_F

layer by layer, A', B', l' and delta' being the module's own. Norms are computed in float64. arXiv
2602.12323 reports that random LoRA modules merge as well as trained ones of other tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pem_composition.arithmetic import delta
from pem_composition.arithmetic.algebra import neutral_of
from pem_composition.arithmetic.operand import Operand
from pem_composition.arithmetic.updates import lora_factors


def random_update(module: Operand, seed: int) -> dict[str, Tensor]:
    """The tensors that take part in sums, drawn anew; equal seeds draw equal tensors.

    Examples:
        >>> import torch
        >>> from pem_composition.config import IA3Config
        >>> from pem_composition.module import PEM
        >>> m = PEM({"fc.ia3": torch.tensor([4.0, 5.0])}, IA3Config(("fc",)))  # |l - 1| = 5
        >>> drawn = random_update(m, seed=0)["fc.ia3"]
        >>> round(float((drawn - 1).norm()), 4)
        5.0
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    if module.kind != "lora":
        neutral = neutral_of(module.kind)
        return {
            name: (neutral + _scaled(noise(own), float((own.double() - neutral).norm()))).to(own)
            for name, own in sorted(module.adapter_tensors().items())
        }
    drawn: dict[str, Tensor] = {}
    for layer in module.layers:
        (own,) = lora_factors([module], [1.0], layer)
        A = _scaled(noise(own.A_RI), float(own.A_RI.double().norm()))
        term = own._replace(A_RI=A, B_OR=noise(own.B_OR))
        drawn_norm = delta.norm([term])  # 0 where A' is
        B = term.B_OR * (delta.norm([own]) / drawn_norm if drawn_norm else 0.0)
        drawn |= {f"{layer}.lora_A": A.to(own.A_RI), f"{layer}.lora_B": B.to(own.B_OR)}
    return drawn


def _scaled(noise: Tensor, norm: float) -> Tensor:
    return noise.mul_(norm / float(noise.norm()))
