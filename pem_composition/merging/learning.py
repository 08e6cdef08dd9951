"""Coefficients learned by gradient descent, one per module or one per module and layer.

    AdaMerging   minimises the entropy of the predictions on unlabelled rows of every task
    CAT          minimises the cross entropy on a few labelled rows of every task
    NSC          minimises the share of the layers' inputs that the task's own module does not
                 look at (``null_space``), on unlabelled rows of every task

over c in dW = sum_i c_i dW_i; the modules stay as they are. Sources: Yang et al. 2024
(arXiv:2310.02575), whose c start at 0.3 and are clamped to [0, 1]; Prabhakar et al. 2024
(arXiv:2410.13025), with a softmax over the modules of a layer as in its code; arXiv:2603.26317,
whose c are free.

Shape suffixes: T modules, L layers (or 1), b rows, w answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pem_composition import launch
from pem_composition.adapters import wearing
from pem_composition.errors import DataError, RunFailed
from pem_composition.evaluation.language import LanguageEvaluator
from pem_composition.merging.blend import Blend
from pem_composition.merging.null_space import NullSpace

if TYPE_CHECKING:
    from pem_composition.evaluation.evaluator import Evaluator
    from pem_composition.evaluation.padded import Batch
    from pem_composition.module import PEM

ENTROPY, LABELS, NULL_SPACE = "entropy", "labels", "null_space"
LAYER, MODULE = "layer", "module"
CLAMP, SOFTMAX, FREE = "clamp", "softmax", "none"


@dataclass(frozen=True, eq=False)
class Lesson:
    """Prepared rows of one task, and the head that answers them (None: the model's own).

    Attributes:
        rows: of the A of the task's own module, see ``null_space.row_spaces``; batches then hold
            one row each, so that there is no padding.
    """

    name: str
    evaluator: Evaluator
    head: Mapping[str, Tensor] | None = None
    rows: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class LearningRule:
    """What is minimised, over which coefficients, and how.

    Attributes:
        loss: entropy or null_space (no labels are read), or labels (cross entropy, for a
            regression the squared error).
        scope: a coefficient per layer and module, or one per module.
        constraint: clamp to [0, 1], softmax over the modules, or none.
        init: where coefficients start (softmax: equal shares, whatever it is).
        steps: of Adam.
        batches: of every task in a step.
    """

    loss: str
    scope: str = LAYER
    constraint: str = FREE
    init: float = 0.3
    learning_rate: float = 1e-2
    steps: int = 100
    batches: int = 1
    seed: int = 42


@dataclass(frozen=True)
class Learned:
    """Coefficients (T, L) by the names of layers, or (T, 1), and how the loss went."""

    coefficients: tuple[tuple[float, ...], ...]
    layers: tuple[str, ...]
    before: float  # mean loss over all rows
    after: float
    history: tuple[float, ...]  # mean loss of the batches of each step

    def of(self, place: int) -> dict[str, float]:
        """Layer -> coefficient of one module."""
        row = self.coefficients[place]
        return dict(zip(self.layers, row * (len(self.layers) if len(row) == 1 else 1), strict=True))


def constrained(raw_TL: Tensor, constraint: str) -> Tensor:
    """Coefficients from the numbers that are learned."""
    if constraint == CLAMP:
        return raw_TL.clamp(0.0, 1.0)
    return raw_TL.softmax(0) if constraint == SOFTMAX else raw_TL


def loss_of(evaluator: Evaluator, outputs: Tensor, labels: Sequence[Any], loss: str) -> Tensor:
    """Mean loss of outputs (b, k); of a language model per token.

    Raises:
        DataError: the entropy of a regression, which has none.
    """
    if loss == LABELS and isinstance(evaluator, LanguageEvaluator):
        nll, tokens = outputs.sum(dim=0)
        return nll / tokens
    scores_bw = evaluator.class_scores(outputs)
    gold = torch.as_tensor(labels, device=scores_bw.device)
    if scores_bw.shape[1] == 1:
        if loss == ENTROPY:
            raise DataError.build(
                evaluator.task.name, "a regression's predictions have no entropy",
                do="leave the task out, or learn from labels",
            )  # fmt: skip
        return F.mse_loss(scores_bw[:, 0], gold.to(scores_bw))
    if loss == LABELS:
        return F.cross_entropy(scores_bw, gold)
    log_bw = scores_bw.log_softmax(1)
    return -(log_bw.exp() * log_bw).sum(1).mean()


def learn(
    model: nn.Module,
    modules: Sequence[PEM],
    lessons: Sequence[Lesson],
    rule: LearningRule,
    progress: Callable[[int, float], None] = lambda _step, _loss: None,
) -> Learned:
    """Learn the coefficients; the model is afterwards as it was.

    The processes of a launch that have joined share the batches of a step.

    Raises:
        DataError: a task whose answers the loss is not defined for.
        RunFailed: the loss is not finite.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(rule.seed)
    orders = [_batches(lesson.evaluator, generator) for lesson in lessons]
    history = []
    try:
        with Blend(model, modules) as blend:
            raw_TL = _start(blend, len(modules), rule)
            optimizer = torch.optim.Adam([raw_TL], lr=rule.learning_rate)
            before = _mean_loss(blend, raw_TL, lessons, rule)
            for step in range(rule.steps):
                optimizer.zero_grad()
                total = torch.zeros((), dtype=torch.float64)
                drawn = [
                    (lesson, batch)
                    for lesson, order in zip(lessons, orders, strict=True)
                    for batch in islice(order, rule.batches)
                ]
                own, add_up = launch.share(drawn)
                for lesson, batch in own:
                    blend.coefficients = constrained(raw_TL, rule.constraint)
                    loss = _loss(blend.model, lesson, batch, rule.loss) / len(drawn)
                    loss.backward()  # before the next task's head takes the place of this one
                    total += float(loss.detach())
                add_up(total)
                add_up(raw_TL.grad)
                _check_finite(float(total), step)
                optimizer.step()
                history.append(float(total))
                progress(step + 1, float(total))
            after = _mean_loss(blend, raw_TL, lessons, rule)
            found = constrained(raw_TL.detach(), rule.constraint).double().cpu().tolist()
            layers = blend.layers
    finally:
        model.train(was_training)
    return Learned(tuple(map(tuple, found)), layers, before, after, tuple(history))


def _start(blend: Blend, modules: int, rule: LearningRule) -> Tensor:
    columns = len(blend.layers) if rule.scope == LAYER else 1
    weight = next(blend.model.parameters())
    start = 0.0 if rule.constraint == SOFTMAX else rule.init
    return torch.full(
        (modules, columns), start, dtype=weight.dtype, device=weight.device, requires_grad=True
    )


def _batches(evaluator: Evaluator, generator: torch.Generator) -> Iterator[Batch]:
    """The batches without end, in a new random order each time through."""
    while True:
        for place in torch.randperm(len(evaluator.batches), generator=generator).tolist():
            yield evaluator.batches[place]


def _loss(model: nn.Module, lesson: Lesson, batch: Batch, loss: str) -> Tensor:
    if loss == NULL_SPACE:
        assert lesson.rows is not None, "a task's own module is looked at"
        with NullSpace(model, lesson.rows) as watched:
            lesson.evaluator.forward(model, batch.inputs)
            return watched.loss
    with nullcontext() if lesson.head is None else wearing(model, lesson.head):
        outputs = lesson.evaluator.forward(model, batch.inputs)
        return loss_of(lesson.evaluator, outputs, lesson.evaluator.labels[batch.rows], loss)


@torch.no_grad()
def _mean_loss(
    blend: Blend, raw_TL: Tensor, lessons: Sequence[Lesson], rule: LearningRule
) -> float:
    """Mean over the tasks of the mean loss over all their rows."""
    blend.coefficients = constrained(raw_TL, rule.constraint)
    means = []
    for lesson in lessons:
        own, add_up = launch.share(lesson.evaluator.batches)
        losses = (
            float(_loss(blend.model, lesson, batch, rule.loss)) * len(batch.rows) for batch in own
        )
        total = torch.tensor(sum(losses), dtype=torch.float64)
        add_up(total)
        means.append(float(total) / lesson.evaluator.size)
    return sum(means) / len(means)


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise RunFailed.build(
            f"step {step + 1}", "the loss is not finite", found=loss, do="lower --learning_rate"
        )
