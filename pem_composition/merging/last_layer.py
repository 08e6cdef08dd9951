"""A new last layer for a module's head: the features of the rows once, then scikit-learn.

A merge keeps most of what its modules know in the backbone and spoils their heads, for a head was
fitted to the features of one module alone. With the model frozen, the last layer is a linear model
of its inputs x_i, fitted anew in seconds:

    min_{W, b}  1/n sum_i loss(W z_i + b, y_i) + penalty / 2 |W|^2,    z_i = x_i / s,

with the cross entropy of the softmax for classes and half the squared error for numbers. One scale
s, the root mean square of the inputs' standard deviations, lets a penalty mean the same in every
model; it is then folded into W. A scale for each input would blow up what hardly varies: behind a
tanh that is saturated, the rounding of a constant. The penalty is chosen by cross-validation on the
same rows.

Shape suffixes: n rows, d inputs of the last layer, c outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, mean_squared_error
from sklearn.model_selection import KFold, StratifiedKFold
from torch import Tensor, nn

from pem_composition import checkpoint
from pem_composition.adapters import attach, head_parameter_names
from pem_composition.adapters.locate import plain_tensors
from pem_composition.arithmetic.algebra import HEAD
from pem_composition.arithmetic.head_policies import own_head, saved_parts, select, tasks_of
from pem_composition.config import Head, HeadInfo
from pem_composition.errors import IncompatibleModules
from pem_composition.evaluation.attached import device_of
from pem_composition.evaluation.evaluator import Evaluator, check_finite
from pem_composition.evaluation.model_names import resolve
from pem_composition.evaluation.models import load_base
from pem_composition.evaluation.own_classes import (
    in_order_of,
    of_model,
    order_of,
)
from pem_composition.merging.penalties import FOLDS, PENALTIES, check_enough, counted
from pem_composition.module import PEM
from pem_composition.objectives.classification import Classification
from pem_composition.record import REFIT
from pem_composition.tasks.data import TaskData

STEPS = 2000  # of the solver; it stops when it has converged

Numbers = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Refit:
    """How heads are fitted anew.

    Attributes:
        penalties: to choose from; one is taken as it is.
        folds: of the cross-validation that chooses.
        max_seq_length: tokens per row.
        seed: of the folds, and of the inner layers of a head that nothing brings.
    """

    penalties: tuple[float, ...] = PENALTIES
    folds: int = FOLDS
    max_seq_length: int = 128
    seed: int = 42
    use_cpu: bool = False
    allow_base_mismatch: bool = False

    @property
    def objective(self) -> Classification:
        """How rows are read and encoded."""
        return Classification(max_seq_length=self.max_seq_length)


@dataclass(frozen=True)
class LastLayer:
    """A fitted last layer.

    Attributes:
        weight_cd, bias_c: for the inputs as the model gives them; None where the layer has no bias.
        penalty: the chosen one.
        losses: mean loss on the rows left out, by penalty.
    """

    weight_cd: Numbers
    bias_c: Numbers | None
    penalty: float
    losses: dict[float, float]

    def __call__(self, features_nd: Numbers) -> Numbers:
        """Outputs (n, c)."""
        outputs = features_nd @ self.weight_cd.T
        return outputs if self.bias_c is None else outputs + self.bias_c


def last_layer(model: nn.Module, head: Iterable[str], outputs: int) -> str:
    """Name of the one linear layer of the head that gives the model's outputs.

    Raises:
        IncompatibleModules: no such layer, or several.
    """
    owners = dict.fromkeys(name.rpartition(".")[0] for name in head)
    modules = dict(model.named_modules())
    found = [
        name
        for name in owners
        if isinstance(layer := modules.get(name), nn.Linear) and len(layer.weight) == outputs
    ]
    if len(found) != 1:
        raise IncompatibleModules.build(
            type(model).__name__, "its last layer cannot be told", found=found or list(owners),
            expected=f"one linear layer of the head with {outputs} outputs",
        )  # fmt: skip
    return found[0]


def features(model: nn.Module, layer: str, evaluator: Evaluator) -> Numbers:
    """Inputs (n, d) of the last layer, one per row.

    The model answers with them when the layer is taken out: pooling and the position that answers
    are then the model's own, whatever its architecture.
    """
    with _without(model, layer):
        found = evaluator.predict(model).astype(np.float64)
    check_finite(evaluator.task, found, "inputs of the last layer")
    return found


@contextmanager
def _without(model: nn.Module, layer: str) -> Iterator[None]:
    holder, _, local = layer.rpartition(".")
    parent = model.get_submodule(holder)
    kept = getattr(parent, local)
    setattr(parent, local, nn.Identity())
    try:
        yield
    finally:
        setattr(parent, local, kept)


def fit(
    features_nd: Numbers,
    labels_n: NDArray[np.generic],
    *,
    classes: int | None,
    bias: bool = True,
    penalties: Sequence[float] = PENALTIES,
    folds: int = FOLDS,
    seed: int = 42,
) -> LastLayer:
    """The linear layer of the module's docstring.

    Args:
        classes: how many there are, of labels 0 ... classes - 1; None: the labels are numbers.
        folds: of the cross-validation that chooses among several penalties.

    Raises:
        DataError: a class without enough rows, or fewer rows than folds.

    Examples:
        >>> x = np.array([[-2.0], [-1.0], [1.0], [2.0]])
        >>> layer = fit(x, np.array([0, 0, 1, 1]), classes=2, penalties=[0.1])
        >>> layer(x).argmax(axis=1).tolist()
        [0, 0, 1, 1]
    """
    scale = np.sqrt(features_nd.var(axis=0).mean()) or 1.0
    scaled = features_nd / scale
    losses = {}
    if len(penalties) > 1:
        parts = _parts(labels_n, classes, folds, seed)
        for penalty in penalties:
            lost = [
                _loss(
                    _solve(scaled[a], labels_n[a], classes, bias, penalty), scaled[b], labels_n[b]
                )
                for a, b in parts
            ]
            losses[penalty] = float(np.mean(lost))
    elif classes is not None:
        _parts(labels_n, classes, 1, seed)
    best = min(losses, key=losses.__getitem__) if losses else penalties[0]
    weight, shift = _solve(scaled, labels_n, classes, bias, best)
    return LastLayer(weight / scale, shift, best, losses)


def _parts(
    labels: NDArray[np.generic], classes: int | None, folds: int, seed: int
) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Row numbers to fit on and to score, by fold."""
    check_enough(counted(labels.tolist(), [*map(str, range(classes or 0))]), folds=folds)
    if folds < 2:
        return []
    kind = KFold if classes is None else StratifiedKFold
    return list(kind(folds, shuffle=True, random_state=seed).split(labels, labels))


def _solve(
    x: Numbers, y: NDArray[np.generic], classes: int | None, bias: bool, penalty: float
) -> tuple[Numbers, Numbers | None]:
    """W (c, d) and b (c,); scikit-learn sums losses, so that its penalty is n times as large."""
    if classes is None:
        ridge = Ridge(alpha=penalty * len(x), fit_intercept=bias).fit(x, y)
        return ridge.coef_[None, :], np.atleast_1d(ridge.intercept_) if bias else None
    # Of two classes scikit-learn solves for the difference w of W's rows: |W|^2 = |w|^2 / 2.
    strength = (2.0 if classes == 2 else 1.0) / (penalty * len(x))
    model = LogisticRegression(C=strength, fit_intercept=bias, max_iter=STEPS, tol=1e-6)
    # b has no penalty, so inputs around their mean give the same W, in far fewer steps.
    middle_d = x.mean(axis=0) if bias else np.zeros(x.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        model.fit(x - middle_d, y)
    weight, shift = model.coef_, model.intercept_ - model.coef_ @ middle_d
    if classes == 2:
        weight, shift = np.vstack([-weight, weight]) / 2, np.concatenate([-shift, shift]) / 2
    return weight, shift if bias else None


def _loss(layer: tuple[Numbers, Numbers | None], x: Numbers, y: NDArray[np.generic]) -> float:
    weight, shift = layer
    outputs = x @ weight.T + (0 if shift is None else shift)
    if len(weight) == 1:
        return float(mean_squared_error(y, outputs[:, 0]))
    likely = torch.softmax(torch.from_numpy(outputs), dim=1).numpy()
    return float(log_loss(y, likely, labels=range(len(weight))))


def run(
    adapter: str,
    model: str,
    tasks: Sequence[TaskData],
    split: str,
    how: Refit,
    output_dir: Path,
    *,
    command: str,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Fit a head per task on its rows and write the module with them.

    The head of one task becomes the module's own; heads of several tasks stand beside it under the
    names of the tasks, as ``merge.py --head per-task`` keeps them. Heads of other names stay beside
    it, too. Key and scores of its training are those of another head, and are not kept.

    Args:
        command: by which it can be done again, as text for the record.

    Raises:
        PEMError: a module, model or rows that cannot be used.
    """
    folds = how.folds if len(how.penalties) > 1 else 1
    for data in tasks:  # before the model is loaded
        labels = (example.label for example in data.require(split))
        check_enough(counted(labels, data.task.labels), folds=folds)
    module = checkpoint.load(adapter, base=resolve(model))
    kept = _kept_heads(module)
    fitted, notes = {}, []
    for data in tasks:
        fitted[data.task.name], note = _head(module, kept, model, data, split, how)
        notes.append(note)
        say(note)
    heads = {**kept, **fitted}
    origin = module.provenance
    training = {k: v for k, v in origin.training.items() if k not in ("key", "scores")}
    training[REFIT] = command
    record = replace(origin, notes=(*origin.notes, *notes), training=training)
    bare = _wearing(module, {})
    done = replace(bare, head=None, heads=heads, provenance=record)
    if len(heads) == 1:
        done = replace(done.with_head(tasks[0].task.name), provenance=record)
    done.save(output_dir, overwrite=overwrite)


def _kept_heads(module: PEM) -> dict[str, Head]:
    """The heads that a module has by name: those beside it, and the parts of a concatenated one."""
    names = (*tasks_of(module.head), *module.heads)
    return {name: select(module, name) for name in names}


def _wearing(module: PEM, head: Mapping[str, Tensor]) -> PEM:
    """The module with these head parameters alone; what it saves of the base whole stays."""
    whole = {**saved_parts(module), **head}
    return replace(
        module,
        tensors=module.adapter_tensors() | {f"{name}.{HEAD}": t for name, t in whole.items()},
    )


def _head(
    module: PEM, kept: Mapping[str, Head], base: str, data: TaskData, split: str, how: Refit
) -> tuple[Head, str]:
    """The head of one task, in the order of classes that module or base have, and what is said.

    Its inner layers are those of the module's head of that name, of its only head else.
    """
    rows = data.require(split)
    alone = {} if kept else own_head(module)
    own = kept.get(data.task.name) or Head(alone, module.head or HeadInfo())
    classes = own.info.labels if own.tensors else of_model(base)
    task = in_order_of(data.task, classes)
    transformers.set_seed(how.seed)
    model, tokenizer, info = load_base(base, task)
    device = device_of(how.use_cpu)
    evaluator = how.objective.evaluator(data.task, rows, tokenizer, model.config, device=device)
    names = head_parameter_names(model, info)
    name = last_layer(model, names, model.config.num_labels)
    known = plain_tensors(model)
    inner = {
        n: own.tensors[n]
        for n in names
        if n in own.tensors
        and n.rpartition(".")[0] != name
        and own.tensors[n].shape == known[n].shape
    }
    mismatch = how.allow_base_mismatch
    with attach(model.to(device), _wearing(module, inner), allow_base_mismatch=mismatch):
        before = {n: plain_tensors(model)[n].detach().cpu().clone() for n in names}
        head, layer = refitted(
            model, before, evaluator, order_of(data.task, classes),
            penalties=how.penalties, folds=how.folds, seed=how.seed,
        )  # fmt: skip
    problem = "regression" if task.regression else "classification"
    drawn = any(n not in inner and n.rpartition(".")[0] != name for n in info["missing_keys"])
    new = ", on inner layers that nothing brings and the seed draws" if drawn else ""
    lost = f", loss {layer.losses[layer.penalty]:.4f} on rows left out" if layer.losses else ""
    return Head(head, HeadInfo(task.labels, problem)), (
        f"{task.name}: last layer {name} fitted on {len(rows)} rows of {split}, "
        f"penalty {layer.penalty:g}{lost}{new}"
    )


def refitted(
    model: nn.Module,
    head: Mapping[str, Tensor],
    evaluator: Evaluator,
    order: Sequence[int] = (),
    **how: Any,
) -> tuple[dict[str, Tensor], LastLayer]:
    """The head that a model has, its last layer fitted anew, and how.

    Args:
        head: its parameters by name, as the model has them.
        evaluator: of the rows; its outputs are in the order of the head.
        order: number of the output for each class of the task; empty: they are in its order.
        how: as ``fit`` takes it.

    Raises:
        IncompatibleModules: a head whose last layer cannot be told.
        DataError: as ``fit``.
    """
    task = evaluator.task
    classes = None if task.regression else len(task.labels)
    name = last_layer(model, head, classes or 1)
    labels = np.array(order)[evaluator.labels] if order else evaluator.labels
    inputs = features(model, name, evaluator)
    layer = fit(inputs, labels, classes=classes, bias=f"{name}.bias" in head, **how)
    fitted = {f"{name}.weight": layer.weight_cd}
    if layer.bias_c is not None:
        fitted[f"{name}.bias"] = layer.bias_c
    new = {n: torch.from_numpy(values).to(head[n].dtype) for n, values in fitted.items()}
    return {**head, **new}, layer
