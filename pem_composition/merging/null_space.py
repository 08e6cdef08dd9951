"""Null-space compression: how much of a layer's inputs a module does not look at.

    share(x) = sqrt(1 - norm(P x)^2 / norm(x)^2),   P projects on the rows of the module's A

The mean over the tokens of a task's rows, and then over the layers of the task's own module.
Training turns the rows of A towards the inputs of its task, so that the share falls. Of merged
modules it tells, without labels and without outputs, whether the inputs that reach each layer are
still those. It is defined for classification, regression and decoders alike.

Source: NSC merging (arXiv:2603.26317) and its code, github.com/wonyoung01/nsc_merging, where
y = A x and norm(P x)^2 = y^T (A A^T)^-1 y. Of a model of 32 blocks that code looks at the value
layers of the last eight; here all adapted layers are looked at. A layer whose A has the rank of its
inputs has no null space and is left out.

Shape suffixes: R rank, K numerical rank, I inputs, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pem_composition.adapters.plan import check_layers
from pem_composition.errors import PEMError
from pem_composition.evaluation.prompted_rows import REAL_TOKENS

if TYPE_CHECKING:
    from pem_composition.module import PEM

SMALLEST = 1e-6  # singular values of A below this share of the largest are no direction of it
FLOOR = 1e-12  # of the square under the root, whose gradient is infinite at 0


def row_spaces(model: nn.Module, module: PEM) -> dict[str, Tensor]:
    """Layer of the model -> orthonormal basis (K, I) of the rows of its A, where K < I.

    Raises:
        PEMError: a module without LoRA factors, or without any null space.
    """
    if module.kind != "lora":
        raise PEMError.build(
            module.name, "null-space compression is about the rows of LoRA's A",
            found=f"kind {module.kind}", do="use --method adamerging or cat",
        )  # fmt: skip
    found = {}
    for layer, live in check_layers(model, module).items():
        rows_KI = row_space(module.tensors[f"{layer}.lora_A"])
        if len(rows_KI) < rows_KI.shape[1]:
            found[live] = rows_KI.to(next(model.get_submodule(live).parameters()))
    if not found:
        raise PEMError.build(
            module.name, "no layer has a null space: each A has the rank of its inputs",
            do="use --method adamerging or cat",
        )  # fmt: skip
    return found


class NullSpace(AbstractContextManager["NullSpace"]):
    """Watches the inputs of layers; ``loss`` is of all passes since it began."""

    def __init__(self, model: nn.Module, rows: Mapping[str, Tensor]) -> None:
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._handles = [
            model.get_submodule(layer).register_forward_pre_hook(self._watch(layer, rows_KI))
            for layer, rows_KI in rows.items()
        ]

    def _watch(self, layer: str, rows_KI: Tensor) -> Callable[..., None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            x_NI = arguments[0].reshape(-1, rows_KI.shape[1]).to(rows_KI)
            real_bt = REAL_TOKENS.get()
            if real_bt is not None:
                x_NI = x_NI[real_bt.flatten()]
            self._sums[layer] = self._sums.get(layer, 0.0) + shares(x_NI, rows_KI).sum()
            self._tokens[layer] = self._tokens.get(layer, 0) + len(x_NI)

        return hook

    @property
    def loss(self) -> Tensor:
        """The mean over layers of the mean over tokens; differentiable."""
        return torch.stack([self._sums[n] / self._tokens[n] for n in self._sums]).mean()

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()


def row_space(A_RI: Tensor) -> Tensor:
    """An orthonormal basis of the rows of A, (K, I), in float64."""
    _, S, Vh = torch.linalg.svd(A_RI.double(), full_matrices=False)
    return Vh[: int(S.gt(SMALLEST * S[0]).sum())]


def shares(x_NI: Tensor, rows_KI: Tensor) -> Tensor:
    """Share of each input's norm that lies outside the rows, (N,)."""
    inside_N = (x_NI @ rows_KI.mT).square().sum(1)
    whole_N = x_NI.square().sum(1)
    outside_N = 1.0 - inside_N / whole_N.clamp(min=FLOOR)
    return outside_N.clamp(min=FLOOR).sqrt()
