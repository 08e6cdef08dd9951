"""Which penalties a last layer is fitted with, and on how many rows. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from pem_composition.errors import DataError

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
FOLDS = 5  # of the cross-validation that chooses among them
SCALING = "one scale"  # of all inputs; scores of a scale for each are others


def check_enough(
    counts: Sequence[int],
    *,
    classes: bool,
    folds: int = FOLDS,
    where: str = "--folds",
    do: str = "give more rows, or one --penalty and no folds",
) -> None:
    """Refuse rows of which a fold would lack a class.

    Args:
        counts: rows of each class; of numbers their count alone.

    Raises:
        DataError: naming the class with the fewest rows.
    """
    if (least := min(counts)) < folds:
        what = f"rows of class {counts.index(least)}" if classes else "rows"
        raise DataError.build(
            where, f"too few {what}", found=least, expected=f"at least {folds}", do=do
        )
