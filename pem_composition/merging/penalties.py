"""Which penalties a last layer is fitted with, for ``last_layer`` and what calls it. No torch."""

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
FOLDS = 5  # of the cross-validation that chooses among them
