"""How far scores and their differences depend on which rows happened to be scored.

Draws of two modules are on the same resampled rows, so what both get wrong together cancels in
their difference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

SAMPLES = 400


def draws(metric: str, labels: NDArray[Any] | None, predictions: ArrayLike) -> NDArray[Any]:
    """The metric on SAMPLES bootstrap samples of the rows, the same for equal numbers of rows.

    Args:
        labels: None for the metric ``loss``.
        predictions: what the metric compares with the labels; for ``loss`` the loss of each row.
    """
    import numpy as np

    from pem_composition.evaluation.metrics import METRICS

    given = np.asarray(predictions)
    generator = np.random.default_rng(0)
    samples = (generator.integers(len(given), size=len(given)) for _ in range(SAMPLES))
    if labels is None:
        return np.array([given[rows].mean() for rows in samples])
    given = given.astype(labels.dtype)
    return np.array([METRICS[metric](labels[rows], given[rows]) for rows in samples])
