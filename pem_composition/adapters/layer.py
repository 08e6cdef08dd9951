"""What LoRA and (IA)^3 layers share: one frozen linear layer and several named adapters on it.

Knows nothing about models or modules. ``Conv1D`` is transformers' linear layer with its weight
stored as (d_in, d_out); it is recognised by name, so that this file needs no transformers.
"""

from __future__ import annotations

from torch import Tensor, nn

from pem_composition.errors import PEMError

PREFIX = "adapter_"


def is_conv1d(layer: nn.Module) -> bool:
    """True for transformers' Conv1D (GPT-2): y = x W + b, W (d_in, d_out)."""
    return any(
        c.__name__ == "Conv1D" and c.__module__.startswith("transformers")
        for c in type(layer).__mro__
    )


def is_linear(layer: nn.Module) -> bool:
    """True for a layer that LoRA and (IA)^3 can adapt."""
    return isinstance(layer, nn.Linear) or is_conv1d(layer)


def features(layer: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of an nn.Linear (whose weight may be packed by a quantiser) or Conv1D, also
    behind adapters."""
    if isinstance(layer, nn.Linear | AdapterLayer):
        return layer.in_features, layer.out_features
    d_in, d_out = layer.weight.shape
    return d_in, d_out


class AdapterLayer(nn.Module):
    """A linear layer with named adapters; subclasses say what they do to the output.

    ``weight`` and ``bias`` are the base layer's: some models look at them beside calling the layer.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = features(base)
        self.train(base.training)

    @property
    def adapters(self) -> dict[str, nn.Module]:
        """Name -> adapter, in the order of adding."""
        # Prefixed attributes rather than a ModuleDict, which refuses names like 'half' or 'type'.
        held = self._modules.items()
        return {
            n.removeprefix(PREFIX): m for n, m in held if m is not None and n.startswith(PREFIX)
        }

    @property
    def weight(self) -> Tensor:
        """Weight of the base layer, without any adapter."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """Bias of the base layer, without any adapter."""
        return self.base.bias

    def add(self, name: str, adapter: nn.Module) -> None:
        """Hold one more adapter; it takes part in the forward pass at once."""
        if name in self.adapters:
            raise PEMError.build(name, "this layer already holds an adapter of that name")
        self.add_module(PREFIX + name, adapter.train(self.training))

    def remove(self, name: str) -> None:
        """Drop an adapter."""
        delattr(self, PREFIX + name)
