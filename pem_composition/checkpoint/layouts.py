"""Which files of a folder are a module's, in any of the layouts."""

from __future__ import annotations

from pem_composition.checkpoint import heads, provenance
from pem_composition.checkpoint.content import ADAPTER_FILES
from pem_composition.checkpoint.model_folder import is_model_file

MODULE_FILES = ADAPTER_FILES | {provenance.FILE, provenance.CARD, heads.FOLDER}


def is_foreign(entry: str) -> bool:
    """True for logs and results beside a module, which survive when it is overwritten.

    A module of another layout does not: two of them in one folder cannot be told apart.
    """
    return entry not in MODULE_FILES and not is_model_file(entry)
