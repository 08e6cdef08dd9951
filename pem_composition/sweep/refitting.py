"""New last layers for what a table shows: what a backbone holds, whatever its heads have lost.

For each row of the table and each task the last layer of the head that answers is fitted anew on
training rows, by ``merging.last_layer`` as ``pem refit`` does it, and scored on the table's rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pem_composition.evaluation.keys import rows_digest
from pem_composition.merging.penalties import FOLDS, PENALTIES, SCALING
from pem_composition.sweep.rows import Rows

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from pem_composition.evaluation.evaluator import Evaluator
    from pem_composition.tasks.data import Example

SEED = 42  # of the folds, as in pem refit


@dataclass(frozen=True, eq=False)
class Refitting:
    """Training rows of each task, how last layers are fitted to them, and whether points are chosen
    by the scores that they give."""

    rows: tuple[Sequence[Example], ...]
    chooses: bool = False
    _evaluators: dict[int, tuple[Evaluator, tuple[int, ...]]] = field(default_factory=dict)

    def identity(self, place: int) -> dict[str, Any]:
        """What a score with a new last layer of a task depends on besides."""
        digest = rows_digest(self.rows[place])
        fitted = {"penalties": PENALTIES, "folds": FOLDS, "seed": SEED, "scaling": SCALING}
        return {"refit": {"rows": digest, **fitted}}

    def head(
        self,
        place: int,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        scored: Rows,
        head: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """The head that the model wears, its last layer fitted anew on the task's rows.

        Args:
            scored: the rows that it is to answer.

        Raises:
            DataError: too few rows of a class.
        """
        from pem_composition.merging.last_layer import refitted

        if place not in self._evaluators:
            self._evaluators[place] = scored.for_head(self.rows[place], model, tokenizer)
        evaluator, order = self._evaluators[place]
        return refitted(model, head, evaluator, order, seed=SEED)[0]
