"""A base model that stays loaded while modules are put into its weights and taken out again.

Weights that are quantised cannot be changed, and weights that are rounded should not be: an update
below half a step of bfloat16, 2^-9 of a weight, would be rounded away or up to a whole step. There
LoRA and (IA)^3 modules stand beside the weights; the difference of a whole model is always added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pem_composition.module import PEM

Loader = Callable[[], tuple[Any, Any]]


class LoadedModel:
    """Model and tokenizer, loaded when they are first needed; its weights are base + module.

    Args:
        load: gives both; a sweep of known points never calls it.
        prepare: called with both once, before anything is computed; what it refuses is refused
            before any result.
        beside: attach modules whatever the weights are kept in: the model computes in bfloat16, or
            its scores have to agree to the digit with those of PEFT.
    """

    def __init__(
        self, load: Loader, prepare: Callable[[Any, Any], None], *, beside: bool = False
    ) -> None:
        self._load, self._prepare, self._attach = load, prepare, beside
        self._loaded: tuple[Any, Any] | None = None
        self._put: Any = None  # what holds the module: folded weights, or layers beside them

    def open(self) -> tuple[Any, Any]:
        """Model and tokenizer."""
        if self._loaded is None:
            loaded = self._load()
            self._prepare(*loaded)
            self._loaded = loaded
        return self._loaded

    def put(self, module: PEM | None) -> None:
        """Make the weights base + module, or the base's own; numbers change in place."""
        from pem_composition.adapters import attach, fold

        model, _ = self.open()
        if module is None:
            self.close()
        elif self._put is None:
            # every module was compared with the model before the sweep began
            put = attach if self._beside(model) else fold
            self._put = put(model, module, allow_base_mismatch=True)
        else:
            self._put.swap(module)

    def close(self) -> None:
        """Give the base model its own weights back, bit for bit."""
        if self._put is not None:
            (self._put.detach if self._beside(self.open()[0]) else self._put.restore)()
            self._put = None

    def _beside(self, model: Any) -> bool:
        """True where modules stand beside the weights."""
        import torch

        exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
        return self._attach or not exact or bool(getattr(model, "is_quantized", False))
