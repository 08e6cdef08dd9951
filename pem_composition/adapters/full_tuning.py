"""Full fine-tuning as a module: train every parameter, keep the base to subtract it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from pem_composition.adapters.folding import live_changes
from pem_composition.adapters.locate import plain_tensors
from pem_composition.adapters.placement import apart, changed
from pem_composition.checkpoint.tensors import widen
from pem_composition.errors import IncompatibleModules
from pem_composition.module import PEM


class FullWeights:
    """All parameters of a model, trainable, with a copy of the base: delta = theta - theta_0.

    A tied parameter is held once, under its first name. The head is no part of it.
    """

    def __init__(self, model: nn.Module, pem: PEM, head: Collection[str]) -> None:
        self.model = model
        self.live: dict[str, nn.Parameter] = {}
        seen = {id(t) for n, t in plain_tensors(model).items() if n in head}
        for name, tensor in plain_tensors(model).items():
            if isinstance(tensor, nn.Parameter) and id(tensor) not in seen:
                seen.add(id(tensor))
                self.live[name] = tensor
        self.originals = {n: p.detach().clone() for n, p in self.live.items()}
        self.write(pem)

    @torch.no_grad()
    def write(self, pem: PEM) -> None:
        """theta = theta_0 + delta, in place."""
        changes = live_changes(self.model, pem)
        tied = apart(self.model, changes, {})
        if tied:
            raise IncompatibleModules.build(
                f"parameter {tied[0][0]}",
                "is tied, and the module changes its names differently",
                found=f"{len(tied)} deltas of their own",
                do="load the base model with untied weights to train it",
            )
        for name, parameter in self.live.items():
            original = self.originals[name]
            change = changes.get(name)
            parameter.copy_(original if change is None else changed(original, change))

    @torch.no_grad()
    def tensors(self) -> Mapping[str, Tensor]:
        """Canonical name -> theta - theta_0 in float32 (float64 stays float64)."""
        return {f"{n}.delta": widen(p) - widen(self.originals[n]) for n, p in self.live.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """The base's own weights, bit for bit."""
        for name, parameter in self.live.items():
            parameter.copy_(self.originals[name])
