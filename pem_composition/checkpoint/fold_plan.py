"""Which tensors a folded checkpoint has, and which leaves each is made of (``blocks``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from pem_composition.arithmetic import trees
from pem_composition.checkpoint.blocks import (
    UNCHANGED,
    Blocks,
    Expression,
    Term,
    copied,
    info_as,
    largest_dtype,
    written_info,
)
from pem_composition.checkpoint.changes import (
    Change,
    ExpertStacks,
    Spelling,
    changes_of,
    check_fits,
    joined,
    spelling_of,
    stores_transposed,
    with_saved,
)
from pem_composition.checkpoint.files import FLOAT_DTYPES, TensorInfo
from pem_composition.checkpoint.full import PRETRAINING_COMPONENTS, Weights, by_base_name, is_head
from pem_composition.checkpoint.stored_names import (
    is_added,
    is_language_model,
    is_pretraining,
    is_vocabulary,
    stored_output,
    tied_names,
)
from pem_composition.checkpoint.stream import Output, whole
from pem_composition.checkpoint.tensors import cast, widen
from pem_composition.config import expert_of, weight_of
from pem_composition.errors import IncompatibleModules, listing
from pem_composition.module import PEM
from pem_composition.record import UPDATE, Certificate, Source

if TYPE_CHECKING:
    from torch import Tensor

    from pem_composition.config import HeadInfo

NOTHING = 1e-9  # a weight of the base that is rounding alone


@dataclass(frozen=True)
class Parts:
    """An expression by kinds: composed adapters, and whole models with their coefficients."""

    adapters: tuple[PEM, ...]
    full: trees.Sum | None
    models: Mapping[str, Weights]
    head: Mapping[str, Tensor]
    head_info: HeadInfo | None
    class_end: str | None  # of a model with the head: ForTokenClassification
    sources: tuple[Source, ...]
    space: str
    notes: tuple[str, ...]
    in_base: frozenset[str]  # parts that PEFT loads into the base's own parameter
    saved: Mapping[str, bool]  # parts saved whole -> is it what the expression says?

    def weights(self, parameter: str) -> dict[str, float]:
        """Coefficient of each whole model in one parameter."""
        return trees.coefficients(self.full, parameter) if self.full else {}


class FoldPlan:
    """The tensors of the folded checkpoint.

    Args:
        config: the base's config.json; its class says which tensors are tied.
    """

    def __init__(self, base: Weights, config: Mapping[str, Any], parts: Parts) -> None:
        self._base, self._parts, self._blocks = base, parts, Blocks()
        self._is_language_model = is_language_model(config)
        self._tied = {
            copy: source
            for copy, source in tied_names(config, base.infos).items()
            if copy not in base.infos or base.raw(copy).equal(base.raw(source))
        }
        self._infos = {n: base.infos[source] for n, source in self._tied.items()} | base.infos
        self._names = {  # model -> name in the base -> name in the model
            name: by_base_name(model, base) for name, model in parts.models.items()
        }
        self._spelling = self._spelled()
        self._prefix = self._spelling.less or _prefix(self._names) if parts.head else ""
        self._measured = {self._called(n): right for n, right in parts.saved.items()}
        self._saved = {self._name_in_base(n): t for n, t in parts.head.items()}
        self.vocabulary = self._new_vocabulary()
        self._changes = with_saved(
            joined([self._changes_of(m) for m in parts.adapters]),
            self._saved,
            {self._called(n) for n in parts.in_base},
            self._tied_to,
        )

    def _spelled(self) -> Spelling:
        """How the modules' names become the base's.

        Raises:
            IncompatibleModules: a layer whose weight is there under no spelling.
        """
        layers = [stored_output(n, self._infos) for m in self._parts.adapters for n in m.layers]
        roots = sorted({n.split(".")[0] + "." for n in (*layers, *self._base.infos)})
        weights = dict.fromkeys(map(weight_of, layers))
        spelling, missing = spelling_of(weights, self._infos, roots)
        if missing:
            named = [n.removesuffix(".weight") for n in missing]
            self._refuse_missing(f"weight of layer {listing(named, 3)}")
        return spelling

    def _called(self, name: str) -> str:
        """What the base calls a layer or a parameter of a module."""
        return self._spelling(stored_output(name, self._infos))

    def _refuse_missing(self, what: str) -> NoReturn:
        raise IncompatibleModules.build(
            self._base.folder,
            f"no {what}",
            found=f"{len(self._base.infos)} tensors of other names",
            expected="the names that the module has",
            do="give the base model that the module was trained on; if this is it, its class "
            "renames what the file holds: fold in memory (pem.fold), and save the model",
        )

    def _name_in_base(self, saved: str) -> str:
        """A saved part's name among the base's; what the base cannot have keeps its name.

        Raises:
            IncompatibleModules: a part of the base that is there under no spelling.
        """
        spelled = self._called(saved)
        if spelled in self._infos:
            return spelled
        roots = {self.written(n).split(".")[0] for n in self._base.infos}
        pretraining = not PRETRAINING_COMPONENTS.isdisjoint(saved.split("."))
        # A language model whose file ends before the output layer (a bare base) gets one.
        output = self._is_language_model and any(map(_is_output_part, self._base.infos))
        known = output if pretraining else saved.split(".")[0] in roots
        if known and not is_added(saved, self._parts.class_end or ""):
            self._refuse_missing(f"tensor {saved!r}, which the module saves whole")
        return saved

    def _new_vocabulary(self) -> tuple[int, int] | None:
        """Rows of the base's embeddings and of the module's, where these are others.

        Raises:
            IncompatibleModules: a saved part of another shape that is no such change.
        """
        sizes: dict[tuple[int, int], str] = {}
        for name, tensor in self._saved.items():
            old = self._infos[name].shape if name in self._infos else tensor.shape
            if tuple(old) == tuple(tensor.shape) or is_head(name):
                continue
            if tuple(old[1:]) != tuple(tensor.shape[1:]):
                self._refuse_shape(name, tuple(tensor.shape), tuple(old))
            sizes[old[0], tensor.shape[0]] = name
        if not sizes:
            return None
        (old_rows, rows), first = next(iter(sizes.items()))
        of_tokens = (n for n, i in self._infos.items() if i.shape[:1] == (old_rows,))
        for name in filter(is_vocabulary, of_tokens):
            found = self._saved.get(name)
            if found is None or len(found) != rows:
                self._refuse_shape(first, tuple(self._saved[first].shape), self._infos[name].shape)
        return old_rows, rows

    def _refuse_shape(
        self, name: str, found: tuple[int, ...], expected: tuple[int, ...]
    ) -> NoReturn:
        raise IncompatibleModules.build(
            self._base.folder,
            f"the module's {name!r} does not fit the base",
            found=f"{found} in the module",
            expected=f"{expected}, or a module that saves every tensor of the vocabulary",
            do="resize the base first: model.resize_token_embeddings(rows), save it, fold into it",
        )

    def _changes_of(self, module: PEM) -> dict[str, Change]:
        names = {n: self._called(n) for n in module.layers}
        infos = self._infos
        for layer, name in names.items():
            weight, dimensions = weight_of(name), 3 if expert_of(name) else 2
            saved = self._saved.get(weight)
            shape = infos[weight].shape if saved is None else tuple(saved.shape)
            if len(shape) != dimensions or infos[weight].dtype not in FLOAT_DTYPES:
                raise IncompatibleModules.build(
                    self._base.folder,
                    f"layer {layer} cannot be folded into",
                    found=f"{infos[weight].dtype} {shape}",
                    expected="a floating point matrix",
                    do="attach the module instead",
                )
            if expert_of(name):
                continue
            if stores_transposed(name, infos) and f"{layer}.lora_magnitude" in module.tensors:
                raise IncompatibleModules.build(
                    self._base.folder, f"DoRA on the Conv1D layer {layer}",
                    found="outputs in columns, whose norms no block of rows has",
                    expected="a linear layer", do="fold in memory (pem.fold)",
                )  # fmt: skip
            d_out, d_in = shape[::-1] if stores_transposed(name, infos) else shape
            check_fits(module, layer, name, (d_in, d_out), infos)
        stacks = ExpertStacks(module, names, {n: i.shape for n, i in infos.items()}, lambda n: None)

        def transposed(name: str) -> bool:
            return stacks.transposed(name) if expert_of(name) else stores_transposed(name, infos)

        return changes_of(module, names, transposed, infos)

    @property
    def stored(self) -> frozenset[str]:
        """Names of the base's parameters, as the folded checkpoint writes them."""
        return frozenset(self.written(n) for n in self._infos)

    @cached_property
    def unties(self) -> bool:
        """True where a name changes and another one of the same tensor does not."""
        new, none = self._changes, Change()
        return any(
            not new.get(copy, none).same_as(new.get(source, none))
            for copy, source in self._tied.items()
        )

    def _tied_to(self, name: str) -> list[str]:
        """The other names of one tensor of the base."""
        source = self._tied.get(name, name)
        group = [source, *(copy for copy, other in self._tied.items() if other == source)]
        return [n for n in group if n != name]

    def written(self, name: str) -> str:
        """What a tensor of the base is called in the folded checkpoint."""
        bare = PRETRAINING_COMPONENTS.isdisjoint(name.split(".")[:1]) or name.startswith("pooler")
        return self._prefix + name if bare and not is_head(name) else name

    def outputs(self, dtype: Any, *, heads: bool) -> dict[str, Output]:
        """Every tensor to write.

        Args:
            dtype: None: as the base stores it.
            heads: whether the base's heads stay where the module has none of that name.
        """
        out: dict[str, Output] = {}
        for name, info in (self._infos if self.unties else self._base.infos).items():
            if self._is_saved(name) or (is_head(name) and not heads):
                continue
            out[self.written(name)] = self._output(name, written_info(info, dtype))
        for name, change in self._changes.items():
            if change.saved is None:
                continue
            if not self.unties and name not in self._base.infos and name in self._tied:
                continue  # equal to the name that it is tied to
            own = self.written(name) if name in self._infos else name
            out[own] = self._held(name, change, largest_dtype(self._base, dtype))
        return out

    def _held(self, name: str, change: Change, dtype: Any) -> Output:
        """A part that a module saves whole, in the place of the base's: updates are added to it."""
        saved = change.saved
        assert saved is not None
        models = [] if is_head(name) or name not in self._infos else self._terms(name)
        if models and self._infos[name].shape != tuple(saved.shape):
            self._refuse_shape(name, tuple(saved.shape), self._infos[name].shape)

        def value() -> Tensor:
            total = change
            if models:
                zero = widen(self._base.value(self._stored(name)), dtype)
                delta = sum((c * (m.value(n) - zero) for c, m, n in models), zero.new_zeros(()))
                total = replace(change, delta=delta)
            exact = total.of(widen(saved, dtype))
            out = cast(exact, name, dtype, "sum" if models else "head")
            if name in self._measured:
                stored = self._stored(name)
                zero = (
                    self._base.value(stored) if stored in self._base.infos else exact.new_zeros(0)
                )
                self._blocks.count_whole(name, out, exact, zero)
            return out

        return whole(value, info_as(dtype, tuple(saved.shape)))

    def _stored(self, name: str) -> str:
        """The name under which the base holds a parameter that may be tied to another one."""
        return name if name in self._base.infos else self._tied.get(name, name)

    def _is_saved(self, name: str) -> bool:
        return name in self._changes and self._changes[name].saved is not None

    def certificate(self) -> Certificate:
        """The error of the changed tensors written so far, and of parts saved whole: what rounding
        costs where they are what the expression says, else unknown."""
        certificate = self._blocks.certificate(UPDATE)
        return certificate.covering(
            {
                n: right
                for n, right in self._measured.items()
                if not right or n not in certificate.layers
            }
        )

    def _output(self, name: str, info: TensorInfo) -> Output:
        change = self._changes.get(name)
        stored = self._stored(name)
        models = self._terms(name)
        if change is None and not models:
            return copied(self._base, stored, info)
        rest = (0.0 if change and change.scale else 1.0) - sum(c for c, _, _ in models)
        origin = (rest, self._base, stored)
        terms = [*models, origin] if abs(rest) > NOTHING else models
        pieces = [(math.prod(info.shape), terms)]
        return self._blocks.of(Expression(name, info, pieces, origin, change or UNCHANGED))

    def _terms(self, name: str) -> list[Term]:
        """Whole models' parts in a tensor of the base, as far as they have it.

        A tied copy that a model does not store is its source there, too.
        """
        names = [name, self._tied.get(name, name)]
        holders = {m: own[n] for m, own in self._names.items() for n in names[::-1] if n in own}
        if self._infos[name].dtype not in FLOAT_DTYPES or not holders:
            return []
        weights = self._parts.weights(next(iter(holders.values())))
        return [(c, self._parts.models[m], holders[m]) for m, c in weights.items() if m in holders]


def _is_output_part(name: str) -> bool:
    """True for what stands between a model's last layer and the vocabulary."""
    return is_pretraining(name) and "pooler" not in name.split(".")


def _prefix(names: Mapping[str, Mapping[str, str]]) -> str:
    """What whole models write before the base's names; empty if they have the same."""
    for own in names.values():
        for short, long in own.items():
            if long != short and long.endswith("." + short):
                return long.removesuffix(short)
    return ""
