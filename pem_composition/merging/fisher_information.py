"""Diagonal Fisher information of a module on a task.

    F = 1/N sum_x E_{y ~ p(y|x)} (d log p(y|x) / d theta)^2        element by element

theta are the module's own tensors: LoRA's A and B, (IA)^3 vectors, a full module's weights, and
the head. The expectation is exact, a sum over the answers, or ("empirical") the row's own label
alone. A regression's p is a Gaussian around the prediction with variance one: F = mean (d f)^2.

Rows are taken one at a time, so there is no padding to leave out, and every gradient is that of
one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pem_composition import launch, progress
from pem_composition.adapters.attachment import Layers
from pem_composition.errors import PEMError, RunFailed

if TYPE_CHECKING:
    from pem_composition.adapters import Attachment
    from pem_composition.evaluation.evaluator import Evaluator

EXACT, EMPIRICAL = "exact", "empirical"


def parameters_of(attachment: Attachment) -> dict[str, nn.Parameter]:
    """What a trainable attachment trains, by the names of the module's tensors."""
    found = {f"{n}.head": p for n, p in attachment.head_tensors().items()}
    held = attachment._held
    if isinstance(held, Layers):
        for layer, adapter in held.adapters.items():
            found |= {f"{layer}.{role}": p for role, p in adapter.named_parameters()}
    else:
        found |= {f"{n}.delta": p for n, p in held.live.items()}  # type: ignore[union-attr]
    return found  # type: ignore[return-value]


def diagonal(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    evaluator: Evaluator,
    *,
    expectation: str = EXACT,
) -> dict[str, Tensor]:
    """F of every parameter, on the CPU in float32 (float64 parameters: float64).

    The processes of a launch that have joined share the rows.

    Args:
        evaluator: its batches hold one row each.

    Raises:
        PEMError: batches of several rows; DataError: rows without a fixed set of answers.
        RunFailed: a gradient that is not finite.
    """
    _check_single_rows(evaluator)
    names, tensors = list(parameters), list(parameters.values())
    total = [torch.zeros_like(t, dtype=torch.float64) for t in tensors]
    own, add_up = launch.share(evaluator.batches)
    was_training = model.training
    model.eval()
    try:
        for batch in progress.over(own, "Fisher", "rows"):
            scores = evaluator.class_scores(evaluator.forward(model, batch.inputs))[0]
            for weight, value in _terms(scores, evaluator.labels[batch.rows[0]], expectation):
                gradients = torch.autograd.grad(
                    value, tensors, retain_graph=True, allow_unused=True
                )
                for sum_, gradient in zip(total, gradients, strict=True):
                    if gradient is not None:
                        sum_.addcmul_(gradient.double(), gradient.double(), value=weight)
    finally:
        model.train(was_training)
    for sum_ in total:
        add_up(sum_)
    mean = {n: s / len(evaluator.batches) for n, s in zip(names, total, strict=True)}
    _check_finite(mean)
    return {n: f.to("cpu", parameters[n].dtype) for n, f in mean.items()}


def _terms(scores_W: Tensor, label: float, expectation: str) -> Iterator[tuple[float, Tensor]]:
    """(weight, log-probability) pairs whose squared gradients add up to the row's F."""
    if len(scores_W) == 1:  # regression
        error = float(scores_W[0].detach()) - float(label)
        yield 1.0 if expectation == EXACT else error**2, scores_W[0]
        return
    log_W = scores_W.log_softmax(0)
    if expectation == EMPIRICAL:
        yield 1.0, log_W[int(label)]
        return
    yield from zip(log_W.detach().exp().tolist(), log_W, strict=True)


def _check_single_rows(evaluator: Evaluator) -> None:
    largest = max(len(batch.rows) for batch in evaluator.batches)
    if largest > 1:
        raise PEMError.build("batches", "rows are taken one at a time", found=largest, expected=1)


def _check_finite(fisher: Mapping[str, Tensor]) -> None:
    for name, value in fisher.items():
        if not bool(value.isfinite().all()):
            raise RunFailed.build(
                f"Fisher of {name}", "not finite", do="the module or its training diverged"
            )
