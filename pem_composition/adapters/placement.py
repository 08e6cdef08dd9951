"""Changes of a live model's parameters, by name, in place and reversibly.

The original of each changed parameter is kept; every change of what is placed recomputes the
parameter from it, so swapping numbers a thousand times does not drift, and what comes off last,
in whatever order, gives the base back bit for bit.

A change belongs to a name: where one parameter stands under several (tied weights) and only some
change, these get a parameter of their own until nothing placed needs it; then they are tied again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pem_composition.adapters.locate import names_of, plain_modules, plain_tensors
from pem_composition.checkpoint.changes import Change
from pem_composition.checkpoint.tensors import widen
from pem_composition.errors import IncompatibleModules

Entry = dict[Tensor, Change]  # live parameter -> what a module makes of it


@dataclass
class Own:
    """A name that has a parameter of its own for the time being, and what was there before."""

    owner: nn.Module
    local: str
    before: nn.Parameter | nn.Module
    users: int = 0


@dataclass
class Placed:
    """What a model holds: originals of changed parameters, changes in order, untied names."""

    originals: dict[Tensor, Tensor] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    own: dict[str, Own] = field(default_factory=dict)

    def replace(self, old: Entry | None, new: Entry | None) -> None:
        """Put ``new`` where ``old`` was (None: nothing there) and recompute what changes."""
        for parameter in new or {}:
            self.originals.setdefault(parameter, parameter.detach().clone())
        position = next((i for i, e in enumerate(self.entries) if e is old), len(self.entries))
        self.entries[position : position + 1] = [] if new is None else [new]
        for parameter in {**(old or {}), **(new or {})}:
            self._recompute(parameter)

    @torch.no_grad()
    def _recompute(self, parameter: Tensor) -> None:
        changes = [e[parameter] for e in self.entries if parameter in e]
        if changes:
            parameter.copy_(changed(self.originals[parameter], *changes))
        else:
            parameter.copy_(self.originals.pop(parameter))

    def untie(self, model: nn.Module, groups: list[list[str]]) -> None:
        """Give each group of names a parameter of its own, or count one more user of it."""
        modules, live = plain_modules(model), plain_tensors(model)
        for group in groups:
            fresh = [n for n in group if n not in self.own]
            if fresh:
                tied = live[fresh[0]]
                assert isinstance(tied, nn.Parameter)
                own = nn.Parameter(tied.detach().clone(), requires_grad=tied.requires_grad)
                for name in fresh:
                    self.own[name] = _put(model, modules, name, tied, own, set(fresh))
            for name in group:
                self.own[name].users += 1

    def tie(self, names: list[str]) -> None:
        """Count one user less; a name that nobody uses is tied again."""
        for name in names:
            own = self.own[name]
            own.users -= 1
            if not own.users:
                setattr(own.owner, own.local, own.before)
                del self.own[name]


def _put(
    model: nn.Module,
    modules: dict[str, nn.Module],
    name: str,
    tied: nn.Parameter,
    parameter: nn.Parameter,
    together: set[str],
) -> Own:
    """Put a parameter at a name; returns what was there.

    A module that stands under other names, too, is first replaced by a copy at this one.
    """
    path, _, local = name.rpartition(".")
    module = modules[path]
    paths = [p for p, m in modules.items() if m is module]
    if all(f"{p}.{local}" in together for p in paths):
        setattr(module, local, parameter)
        return Own(module, local, tied)
    apart = copy.copy(module)
    apart._parameters = {**module._parameters, local: parameter}
    above, _, attribute = path.rpartition(".")
    setattr(modules[above] if above else model, attribute, apart)
    modules[path] = apart
    return Own(modules[above] if above else model, attribute, module)


def placed_on(model: nn.Module) -> Placed:
    """The model's record of what is placed on it."""
    held: Placed = model.__dict__.setdefault("_pem_placed", Placed())
    return held


def changed(original: Tensor, *changes: Change) -> Tensor:
    """The changed value in the original's dtype; computed in float32 (float64 stays float64)."""
    value = widen(original)
    for change in changes:
        value = change.of(value)
    return value.to(original.dtype)


class Placement:
    """Changes of parameters by name; ``replace`` exchanges them, ``remove`` takes them off."""

    def __init__(self, model: nn.Module, changes: Mapping[str, Change]) -> None:
        self.model, self._placed = model, placed_on(model)
        self._entry: Entry | None = None
        self._untied: list[str] = []
        self.names: tuple[str, ...] = ()
        self.replace(changes)

    def replace(self, changes: Mapping[str, Change]) -> None:
        """Put other changes in their place, recomputed from the base's own weights."""
        groups = apart(self.model, changes, self._placed.own)
        self._placed.untie(self.model, groups)
        live = plain_tensors(self.model)
        entry = {live[name]: change for name, change in changes.items()}
        self._placed.replace(self._entry, entry)
        self._placed.tie(self._untied)
        self._entry, self._untied = entry, [n for group in groups for n in group]
        self.names = tuple(changes)

    def remove(self) -> None:
        """The parameters as they are without these changes, tied as they were."""
        if self._entry is None:
            return
        self._placed.replace(self._entry, None)
        self._placed.tie(self._untied)
        self._entry, self._untied = None, []

    def parameters(self) -> dict[str, Tensor]:
        """Name -> live parameter."""
        live = plain_tensors(self.model)
        return {name: live[name] for name in self.names}


def apart(
    model: nn.Module, changes: Mapping[str, Change], own: Mapping[str, Own]
) -> list[list[str]]:
    """Names that need a parameter of their own, those that stay equal together.

    Raises:
        IncompatibleModules: names that something else holds together and that now differ.
    """
    groups: list[list[str]] = []
    for names in names_of(model).values():
        kinds: list[list[str]] = []
        for name in (n for n in names if n in changes):
            same = (k for k in kinds if changes[k[0]].same_as(changes[name]))
            kind = next(same, None)
            kinds.append([name]) if kind is None else kind.append(name)
        if kinds and names[0] in own:
            if kinds != [names]:
                raise IncompatibleModules.build(
                    f"parameter {names[0]}",
                    "what is on this model holds several names together that now differ",
                    found=" = ".join(names),
                    do="detach it, then attach the module",
                )
            groups += kinds
        elif kinds and kinds != [names]:
            groups += kinds
    return groups
