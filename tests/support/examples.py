"""On how many examples a law is tried."""

from __future__ import annotations

from hypothesis import settings

FEW = 10  # where only the fast tests run: tests/conftest.py


def examples(count: int) -> settings:
    """So many, and FEW in the fast tests, which are for who has just changed a line."""
    return settings(max_examples=FEW if settings.default.max_examples == FEW else count)
