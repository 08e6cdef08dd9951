"""What makes two texts the same one."""

from __future__ import annotations


def letters(text: str) -> str:
    """Letters and digits without case: what two near-duplicates share."""
    return "".join(c for c in text.casefold() if c.isalnum())
