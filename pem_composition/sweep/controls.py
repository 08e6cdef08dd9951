"""Control rows: what a merge is worth, told by what it has to beat. No torch until one is drawn.

For the merge sum_i c_i m_i that was selected, scored on the same rows and with the same heads:

    own modules    task i by module i as it is (where every task has its own module)
    rule           the same sum with the coefficients of a rule that needs no data
    base           the base model
    random         modules of the same shapes and, layer by layer, norms (``random_update``)
    shrunk         one module alone at its coefficient: c_i m_i
    left out       the merge without one module, the others at their coefficients
    rank           an exact sum of LoRA modules cut to the rank of one of them
    joint          a module that was trained on the rows of all tasks
    ensemble       the mean of the class probabilities (of a regression the predictions) that the
                   modules give, each with its own head, over those whose classes are the task's;
                   no row where a task has none
    prior matched  modules, and the merge, with answers weighted so that the probabilities of the
                   classes have a uniform mean over the rows: what is gained by placing thresholds;
                   no row where a task is a regression
    known shares   the same, with the mean that the classes have among the rows that select; no row
                   where that is uniform

Where every task has its own module, shrunk and left out are of that one, task by task. Base, shrunk
and left out are answered with the merge's head, so that they differ from it by modules alone.

For an analogy t m_0 + (1 - t) (m_1 - m_2), a classifier and two language models:

    base           the base model
    shrunk         the classifier alone at its coefficient: t m_0
    left out       the language models alone: (1 - t) (m_1 - m_2)
    exchanged      the language models exchanged: t m_0 + (1 - t) (m_2 - m_1)
    prior matched  the classifier and the analogy as above: no label, only where the threshold is

The first four are answered with the analogy's head, if it has one. The exchanged models take the
place of random ones: their difference is as large as that of the analogy in every layer, which
that of two random modules, of the language models' norms, is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pem_composition.arithmetic.algebra import HEAD, role_of
from pem_composition.arithmetic.compatible import check_coefficients_of
from pem_composition.arithmetic.head_policies import choose, own_head, select, tasks_of
from pem_composition.arithmetic.methods.coefficients import RULES
from pem_composition.arithmetic.methods.registry import SIMPLE, recorded
from pem_composition.config import LoraConfig
from pem_composition.errors import PEMError
from pem_composition.evaluation.keys import key_of
from pem_composition.evaluation.own_classes import answer, of_loaded
from pem_composition.record import Provenance
from pem_composition.report.records import CONTROL
from pem_composition.sweep.points import OUTPUTS, PER_TASK, Input, Point, Settings, alone
from pem_composition.sweep.runner import Target

if TYPE_CHECKING:
    from torch import Tensor

    from pem_composition.module import PEM

DRAWS = 3  # of random modules
SAME_SHARES = 0.02  # classes whose shares differ by less are taken for equally frequent
ALONE = "alone"  # the control that a table has anyway: each module as it is


@dataclass(frozen=True, eq=False)
class Line:
    """A row of a table before it is scored: what it is, its name and coefficients, its point or
    points, and what it is a control of."""

    id: str
    name: str
    coefficients: Sequence[float]
    target: Target
    control: str = ""


@dataclass(frozen=True, eq=False)
class Controls:
    """What control rows need to know beside the merge.

    Attributes:
        tasks: their names, in the order of the rows.
        own: module i is task i's own: scored with its head, or the module that was trained on it.
        labels: of each task the classes in the order of its head; none where no head answers.
        classes: every task is answered with one of a fixed set of classes.
        shares: of each task the shares of its classes among the rows that select; none where these
            are the rows of the table.
        joint: modules that were trained on the rows of all tasks.
        rules: of coefficients without data, beside the one whose equal weights the table has.
    """

    tasks: tuple[str, ...]
    own: bool = False
    labels: tuple[tuple[str, ...], ...] = ()
    classes: bool = False
    shares: tuple[tuple[float, ...], ...] = ()
    joint: tuple[Input, ...] = ()
    rules: tuple[str, ...] = ()

    def of(self, merge: Point, settings: Settings) -> Iterator[Line]:
        """The control rows of a merge, in the order of the table."""
        inputs, places = merge.inputs, range(len(merge.inputs))
        answered = self._answered(merge, settings)
        if self.own:
            yield _line("own modules", "own modules", [alone(i) for i in inputs])
            for rule in self.rules if merge.method == SIMPLE else ():
                c = RULES[rule].of(len(inputs))
                told = RULES[rule].told(len(inputs))
                yield _line(f"rule {rule}", told, replace(merge, coefficients=c), c)
        yield _line("base", "base, same heads", _base(answered))
        for draw in range(1, DRAWS + 1) if not recorded(merge.method)[0].entry.needs else ():
            drawn = replace(merge, inputs=tuple(random_input(i, draw) for i in inputs))
            yield _line(f"random {draw}", f"random modules of the same norms, draw {draw}", drawn)
        shrunk = [_only(answered, i) for i in places]
        without = [_without(answered, i) for i in places]
        if self.own:
            yield _line("shrunk", "own module alone at its coefficient", shrunk)
            if all(without):
                yield _line("left out", "own module left out", [p for p in without if p])
        else:
            for i in places:
                name = f"{inputs[i].name} alone at its coefficient"
                yield _line(f"shrunk {i}", name, shrunk[i])
            for i in places if len(places) > 2 else ():  # of two the other one at its coefficient
                if (point := without[i]) is not None:
                    yield _line(f"left out {i}", f"{inputs[i].name} left out", point)
        if (rank := _cut(merge)) is not None:
            yield _line("rank", f"cut to rank {rank}", replace(merge, rank=rank))
        for n, module in enumerate(self.joint):
            yield _line(f"joint {n}", f"{module.name} (joint)", self._joint(module))
        ensemble = self._ensemble(inputs)
        if ensemble and all(point.inputs for point in ensemble):
            yield _line("ensemble", "average of the outputs", ensemble)
        yield from self._prior_matched(inputs, merge, "merge")

    def _prior_matched(self, modules: Sequence[Input], merge: Point, what: str) -> Iterator[Line]:
        """The modules and what is made of them, with matched priors."""
        if not self.classes:
            return
        uniform = ((),) * len(self.tasks)
        yield from self._matched(modules, merge, what, "prior matched", uniform)
        if any(max(shares) - min(shares) > SAME_SHARES for shares in self.shares):
            yield from self._matched(modules, merge, what, "known shares", self.shares)

    def _matched(
        self, modules: Sequence[Input], merge: Point, what: str, kind: str,
        shares: Sequence[tuple[float, ...]],
    ) -> Iterator[Line]:  # fmt: skip
        def matched(point: Point) -> list[Point]:
            return [replace(point, prior_matched=True, shares=task) for task in shares]

        if self.own:
            each = [matched(alone(m))[n] for n, m in enumerate(modules)]
            yield _line(kind, f"own modules, {kind}", each)
        else:
            for n, module in enumerate(modules):
                yield _line(f"{kind} {n}", f"{module.name}, {kind}", matched(alone(module)))
        yield _line(f"{kind} {what}", f"{what}, {kind}", matched(merge))

    def _answered(self, merge: Point, settings: Settings) -> Point:
        """The merge with its head, which what is made of it keeps; as it is where there is none, or
        rows bring one per task."""
        if settings.head == PER_TASK or not self.labels:
            return merge
        modules = [i.pem for i in merge.inputs]
        chosen = choose(modules, merge.coefficients, settings.head).tensors
        head = {name: chosen[name] for name in chosen if name in _heads_of(modules)}
        return replace(merge, head=head or None)

    def _joint(self, module: Input) -> list[Point]:
        """A joint module on each task, with the head that it has for the task."""
        if not self.labels:
            return [alone(module)] * len(self.tasks)
        return [replace(alone(module), head=head_for(module.pem, task)) for task in self.tasks]

    def _ensemble(self, inputs: Sequence[Input]) -> list[Point]:
        """For each task the modules whose heads answer it, with equal weights."""
        points = []
        for place, labels in enumerate(self.labels):
            members = tuple(
                m
                for n, m in enumerate(inputs)
                if (self.own and n == place)
                or answer(of_loaded(m.pem), labels, unsaid=not self.own)
            )
            weights = tuple(1.0 / len(members) for _ in members)
            one = self.own and len(members) == 1
            points.append(alone(members[0]) if one else Point(members, weights, OUTPUTS))
        return points


class AnalogyControls(Controls):
    """What control rows need to know beside an analogy."""

    def of(self, merge: Point, settings: Settings) -> Iterator[Line]:
        """The control rows of an analogy, in the order of the table."""
        answered = self._answered(merge, settings)
        classifier, target, source = merge.inputs
        yield _line("base", "base", _base(answered))
        yield _line("shrunk", f"{classifier.name} alone at its coefficient", _only(answered, 0))
        if (language := _without(answered, 0)) is not None:
            yield _line("left out", "language models alone", language)
        exchanged = replace(answered, inputs=(classifier, source, target))
        yield _line("exchanged", "language models exchanged", exchanged)
        yield from self._prior_matched((classifier,), merge, "analogy")


def _line(
    control: str, name: str, target: Point | Sequence[Point], coefficients: Sequence[float] = ()
) -> Line:
    """A control row; its points say in their lines what they are controls of."""
    kind = control.rstrip(" 0123456789")
    marked: Target = (
        replace(target, control=kind)
        if isinstance(target, Point)
        else [replace(point, control=kind) for point in target]
    )
    return Line(f"{CONTROL}{control}", name, coefficients, marked, kind)


def random_input(module: Input, draw: int) -> Input:
    """A random module like another one, see ``random_update``; its head and the parts of the base
    that it saves whole are the other one's."""
    from pem_composition.arithmetic.random_update import random_update  # torch

    identity = {"random_update": 1, "like": module.sha256, "draw": draw}
    digest = key_of(identity)
    own = module.pem
    kept = {n: t for n, t in own.tensors.items() if role_of(n) == HEAD}
    tensors = kept | random_update(own, int(digest[:15], 16))
    name = f"random {draw} like {module.name}"
    drawn = replace(own, tensors=tensors, name=name, provenance=Provenance(), operands=())
    return Input(name, drawn, digest)


def _base(merge: Point) -> Point:
    return Point((), (), None, head=merge.head)


def _only(merge: Point, place: int) -> Point:
    """c_i m_i, exact; of a product of vectors its factor, l_i ** c_i."""
    own, c = (merge.inputs[place],), (merge.coefficients[place],)
    return Point(own, c, "log" if merge.space == "log" else "delta", head=merge.head)


def _without(merge: Point, place: int) -> Point | None:
    """The merge without a module; None where the method cannot do with fewer, or needs statistics,
    which may be of all modules together."""
    kept = [n for n in range(len(merge.inputs)) if n != place]
    inputs, c = ([values[n] for n in kept] for values in (merge.inputs, merge.coefficients))
    choice, _ = recorded(merge.method)
    if choice.entry.needs:
        return None
    try:
        check_coefficients_of(choice, c)
    except PEMError:
        return None
    return replace(merge, inputs=tuple(inputs), coefficients=tuple(c))


def _cut(merge: Point) -> int | None:
    """The rank of one module, where an exact sum has more."""
    ranks = [i.pem.config.r for i in merge.inputs if isinstance(i.pem.config, LoraConfig)]
    exact = merge.method == SIMPLE and merge.space == "delta" and len(ranks) > 1
    if not exact or (isinstance(merge.rank, int) and merge.rank <= max(ranks)):
        return None
    return max(ranks)


def head_for(module: PEM, task: str) -> Mapping[str, Tensor]:
    """The head that a module keeps under the name of a task, or its only one."""
    named = task in module.heads or task in tasks_of(module.head)
    return select(module, task).tensors if named else own_head(module)


def _heads_of(modules: Sequence[PEM]) -> set[str]:
    return {name for module in modules for name in own_head(module)}
