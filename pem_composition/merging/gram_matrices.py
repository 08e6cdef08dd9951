"""Gram matrices of the inputs of a module's layers: G = 1/n sum_rows X^T X over their tokens; or
what the rows of an A see of them, A G A^T.

X are the inputs as the layer sees them in the model with the module attached. Rows are taken one
at a time, so there is no padding but that of the shorter answers, which is left out. Text to text,
the decoder's inputs are those of scoring the answers.

Shape suffixes: N tokens, I inputs, K rows of A.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pem_composition import launch, progress
from pem_composition.adapters.layer import features
from pem_composition.arithmetic.statistics import GRAM, SUBSPACE
from pem_composition.evaluation.prompted_rows import REAL_TOKENS
from pem_composition.merging.fisher_information import _check_single_rows

if TYPE_CHECKING:
    from pem_composition.evaluation.evaluator import Evaluator


def gram(
    model: nn.Module,
    layers: Mapping[str, str],
    evaluator: Evaluator,
    *,
    rows: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """``<layer>.gram`` (I, I) of every layer, on the CPU in float32 (float64 models: float64).

    With ``rows``, A (K, I) of every layer, ``<layer>.subspace`` (K, K). The processes of a launch
    that have joined share the rows.

    Args:
        layers: module's layer name -> model's.
        evaluator: its batches hold one row each.
        rows: by the module's layer names.
    """
    _check_single_rows(evaluator)
    total: dict[str, Tensor] = {}
    dtype = next(model.parameters()).dtype

    def watch(layer: str) -> Callable[..., None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            x_NI = arguments[0].detach().reshape(-1, arguments[0].shape[-1])
            real_bt = REAL_TOKENS.get()
            if real_bt is not None:
                x_NI = x_NI[real_bt.flatten()]
            if rows is not None:
                x_NI = x_NI @ rows[layer].to(x_NI).mT
            product = (x_NI.mT @ x_NI).double()
            total[layer] = product if layer not in total else total[layer].add_(product)

        return hook

    handles = [
        model.get_submodule(live).register_forward_pre_hook(watch(layer))
        for layer, live in layers.items()
    ]
    own, add_up = launch.share(evaluator.batches)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in progress.over(own, "Gram matrices", "rows"):
                evaluator.forward(model, batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    if own is not evaluator.batches:  # a layer may have been called on the rows of some alone
        for layer, live in layers.items():
            size = features(model.get_submodule(live))[0] if rows is None else len(rows[layer])
            add_up(total.setdefault(layer, torch.zeros(size, size, dtype=torch.float64)))
    wide = dtype if dtype == torch.float64 else torch.float32
    n = len(evaluator.batches)
    name = GRAM if rows is None else SUBSPACE
    return {f"{layer}.{name}": (g / n).to("cpu", wide) for layer, g in total.items()}
