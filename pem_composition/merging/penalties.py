"""Which penalties a last layer is fitted with, and on how many rows. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from pem_composition.errors import DataError

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
FOLDS = 5  # of the cross-validation that chooses among them
SCALING = "one scale"  # of all inputs; scores of a scale for each are others


def counted(answers: Iterable[object], classes: Sequence[str]) -> dict[str, int]:
    """What there are of rows with these answers, numbers of classes: of each class, else of all.

    >>> counted([0, 0, 1], ("no", "yes", "maybe"))
    {"rows of class 'no'": 2, "rows of class 'yes'": 1, "rows of class 'maybe'": 0}
    """
    counts = Counter(answers)
    if not classes:
        return {"rows": counts.total()}
    return {f"rows of class {word!r}": counts[i] for i, word in enumerate(classes)}


def check_enough(
    counts: Mapping[str, int],
    *,
    folds: int = FOLDS,
    where: str = "--folds",
    do: str = "give more rows, or one --penalty and no folds",
) -> None:
    """Refuse rows of which a fold would lack a class.

    Args:
        counts: see ``counted``.

    Raises:
        DataError: naming what there are fewest of.
    """
    what = min(counts, key=counts.__getitem__)
    if (least := counts[what]) < folds:
        raise DataError.build(
            where, f"too few {what}", found=least, expected=f"at least {folds}",
            do=do if least else "give rows of every class",
        )  # fmt: skip
