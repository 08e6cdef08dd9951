"""A base model that stays loaded while modules are put into its weights and taken out again.

Quantised weights cannot be changed: there a module stands beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pem_composition.module import PEM

Loader = Callable[[], tuple[Any, Any]]


class HeldModel:
    """Model and tokenizer, loaded when they are first needed; its weights are base + module.

    Args:
        load: gives both; a sweep of known points never calls it.
        prepare: called with both once, before anything is computed; what it refuses is refused
            before any result.
    """

    def __init__(self, load: Loader, prepare: Callable[[Any, Any], None]) -> None:
        self._load, self._prepare = load, prepare
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
            put = attach if _quantised(model) else fold
            self._put = put(model, module, allow_base_mismatch=True)
        else:
            self._put.swap(module)

    def close(self) -> None:
        """Give the base model its own weights back, bit for bit."""
        if self._put is not None:
            (self._put.detach if _quantised(self.open()[0]) else self._put.restore)()
            self._put = None


def _quantised(model: Any) -> bool:
    return bool(getattr(model, "is_quantized", False))
