"""Modules on disk: PEFT, adapter-transformers and Hugging Face folders, read strictly.

``inspect_header`` needs no torch; ``load`` checks every value; ``save`` writes a temporary sibling
and renames it.
"""

from __future__ import annotations

from pem_composition.checkpoint.extraction import extract_lora
from pem_composition.checkpoint.full_sum import combine_full
from pem_composition.checkpoint.header import ModuleHeader
from pem_composition.checkpoint.provenance import base_identity
from pem_composition.checkpoint.store import inspect_header, load, locate, open_module, save
from pem_composition.checkpoint.streamed_fold import fold_checkpoint

__all__ = [
    "ModuleHeader",
    "base_identity",
    "combine_full",
    "extract_lora",
    "fold_checkpoint",
    "inspect_header",
    "load",
    "locate",
    "open_module",
    "save",
]
