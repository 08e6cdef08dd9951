"""What a sweep scores: combinations of modules, and what identifies them. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pem_composition.arithmetic.algebra import HEAD
from pem_composition.arithmetic.head_policies import NAME, own_head
from pem_composition.arithmetic.methods.registry import SIMPLE, recorded
from pem_composition.arithmetic.ranks import Rank
from pem_composition.arithmetic.updates import cast
from pem_composition.errors import PEMError
from pem_composition.evaluation.keys import module_digest
from pem_composition.module import combine, negate

if TYPE_CHECKING:
    from torch import Tensor

    from pem_composition.arithmetic.statistics import Statistics
    from pem_composition.module import PEM

PER_TASK = "per-task"
OUTPUTS = "outputs"  # the space of an ensemble: the sum is of class probabilities, not of modules


@dataclass(frozen=True, eq=False)
class Input:
    """A module, the digest of its content, and statistics of its data by kind (fisher, gram).

    ``path`` is where it was read from; empty for a module that was made in memory.
    """

    name: str
    pem: PEM
    sha256: str
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    path: str = ""


@dataclass(frozen=True)
class Settings:
    """What a point's score depends on besides modules, coefficients and rows; part of its key.

    ``head`` is a policy of ``combine``, or per-task: the rows bring the heads that they are
    scored with, and a point none.
    """

    base: str  # digest, or the name where no file can be read
    head: str = "average"
    rank: Rank | None = None
    bf16: bool = False  # matrix products of the forward pass in bfloat16
    method: str = SIMPLE  # with every setting, as pem.json records it: ties(density=0.2, ...)
    weights: str = ""  # how the base is held, if not in float32; quantised: modules are attached
    generation: str | None = None  # digest of how texts end by default, where texts are written
    device: str = ""  # if no CPU
    attached: bool = False  # modules stand beside the weights, not in them
    dtype: str | None = None  # of a module that is written; decides no score, see ``Point.check``


@dataclass(frozen=True, eq=False)
class Point:
    """One combination. ``space`` is None for one module, applied or negated, whatever the space.

    ``method`` and ``rank`` are those of the settings unless the point has its own.

    Attributes:
        head: what rows are answered with, instead of the head that they or the modules bring.
        prior_matched: its answers are weighted for a mean over the rows of ``shares``, none for a
            uniform one.
        control: what it is a control of, for its line; decides no number.
    """

    inputs: tuple[Input, ...]
    coefficients: tuple[float, ...]
    space: str | None
    method: str = SIMPLE
    rank: Rank | None = None
    head: Mapping[str, Tensor] | None = None
    prior_matched: bool = False
    shares: tuple[float, ...] = ()
    control: str = ""

    def module(self, settings: Settings, *, saved: bool = False) -> PEM | None:
        """The combination, in memory; None for no inputs, the base model.

        Args:
            saved: it will be written: in the dtype of the output, certified, and with the heads of
                every task beside it.
        """
        if not self.inputs:
            return None
        module = self._combined(settings, saved=saved)
        # Rows that bring the head need none of the module, whatever it answers.
        brought = self.head is not None or (self.space is None and settings.head == PER_TASK)
        return without_head(module) if brought else module

    def _combined(self, settings: Settings, *, saved: bool) -> PEM:
        if self.space is None:
            own, coefficient = self.inputs[0].pem, self.coefficients[0]
            return own if coefficient == 1.0 else negate(own, -coefficient)
        choice, _ = recorded(self.method)
        needed = choice.entry.needs
        return combine(
            [i.pem for i in self.inputs],
            self.coefficients,
            space=self.space,
            method=choice.method,
            settings=choice.as_dict(),
            statistics=[i.statistics[needed] for i in self.inputs] if needed else (),
            head=kept_head(self.inputs, settings.head),
            rank=self.rank,
            dtype=settings.dtype if saved else None,
            allow_base_mismatch=True,
            certify=saved,
        )

    def check(self, settings: Settings) -> None:
        """Refuse a combination that cannot be written in the dtype asked for.

        Raises:
            TooLarge: naming the combination.
        """
        if settings.dtype is not None and self.space is not None:
            terms = zip(self.coefficients, self.inputs, strict=True)
            told = " ".join(f"{c:+g}*{i.name}" for c, i in terms)
            check_fits([(f"{told} in {self.space} space", self.module(settings))], settings.dtype)

    def identity(self, settings: Settings, split: str, rows: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that decides the score; hashed into the key.

        Args:
            rows: what identifies the task's rows and how they are scored.
        """
        optional = ("bf16", "weights", "generation", "device", "attached")
        unset = [name for name in optional if not getattr(settings, name)]
        left_out = (*unset, "method", "dtype")
        shared = {k: v for k, v in asdict(settings).items() if k not in left_out}
        if self.method != SIMPLE:
            shared["method"] = self.method
        needed = recorded(self.method)[0].entry.needs
        if needed:
            shared["statistics"] = [i.statistics[needed].sha256 for i in self.inputs]
        return {
            **shared,
            **rows,
            "modules": [i.sha256 for i in self.inputs],
            "coefficients": list(self.coefficients),
            "space": self.space,
            "head": settings.head if self.space else None,
            "rank": self.rank,
            "split": split,
            **({"prior_matched": True} if self.prior_matched else {}),
            **({"shares": list(self.shares)} if self.shares else {}),
        }


class TooLarge(PEMError):
    """A combination with numbers that the dtype of the output does not hold."""


def check_fits(modules: Iterable[tuple[str, PEM | None]], dtype: str | None) -> None:
    """Refuse modules that cannot be written in a dtype, before the work that would choose one.

    Raises:
        TooLarge: naming the first.
    """
    for name, module in modules if dtype is not None else ():
        try:
            cast(module.tensors if module is not None else {}, dtype)
        except PEMError as error:
            raise TooLarge(f"{name}: {error}") from None


def point(
    inputs: Sequence[Input],
    coefficients: Sequence[float],
    space: str,
    settings: Settings,
    *,
    method: str | None = None,
    rank: Rank | None = None,
) -> Point:
    """A combination; a sum of one module with coefficient 1 and the rest 0 is that module, if no
    rank is asked for.

    Args:
        method, rank: default: those of the settings.
    """
    method = settings.method if method is None else method
    rank = (rank or settings.rank) if space == "delta" else None
    chosen = [i for i, c in zip(inputs, coefficients, strict=True) if c]
    own = {"first": [inputs[0]], "last": [inputs[-1]], "average": chosen, PER_TASK: chosen}
    single = len(chosen) == 1 and sum(coefficients) == 1.0 and own.get(settings.head) == chosen
    if single and method == SIMPLE and rank is None:
        return alone(chosen[0])
    return Point(tuple(inputs), tuple(coefficients), space, method, rank)


def alone(module: Input) -> Point:
    """One module as it is."""
    return Point((module,), (1.0,), None)


def kept_head(inputs: Sequence[Input], head: str) -> str:
    """The policy for a module that is written: heads of their own, where names can name files."""
    plain = all(NAME.fullmatch(i.name) for i in inputs)
    return head if head != PER_TASK or plain else "none"


def without_head(module: PEM) -> PEM:
    """The module with no head of a task."""
    head = {f"{n}.{HEAD}" for n in own_head(module)}
    tensors = {n: t for n, t in module.tensors.items() if n not in head}
    return replace(module, tensors=tensors, head=None, operands=())


def read_input(name: str, module: PEM, path: str) -> Input:
    """A module that was read from a path, with the digest of its content."""
    return Input(name, module, module_digest(path, module.head), path=path)
