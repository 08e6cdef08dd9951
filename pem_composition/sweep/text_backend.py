"""Who writes the texts of a grid's points in place of the model that is loaded here. No torch.

The loaded model still reads (perplexity), and says what the writer's weights must answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pem_composition.evaluation.decoding import BeamSearch, Prompts
    from pem_composition.evaluation.text_sampling import Write
    from pem_composition.module import PEM


class TextBackend(Protocol):
    """An engine that holds the base and applies the module of a point.

    Attributes:
        identity: what decides its texts besides weights and settings; part of a result's key.
    """

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def check(self, module: PEM) -> None:
        """Refuse a module that it cannot apply, before a model is loaded."""

    def prepare(self, model: Any, tokenizer: Any) -> None:
        """See the loaded model with the base's own weights."""

    def connect(self) -> None:
        """Refuse an engine that does not hold the base, before the first text is asked for."""

    def writing(
        self, module: PEM | None, name: str, model: Any, tokenizer: Any, asked: Prompts | BeamSearch
    ) -> AbstractContextManager[Write]:
        """Apply a point's module, and check it against the model, which holds it too.

        Args:
            module: None: the base alone.
            name: of the point, for messages.
        """
