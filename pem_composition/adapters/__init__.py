"""Modules in a live model: attach, train, extract, detach, fold.

One file per thing: ``lora`` and ``ia3`` are the layers, ``targets`` says which layers of which
model, ``locate`` finds them, ``plan`` checks that a module fits, ``heads`` loads heads, ``folding``
changes base weights, ``full`` trains them, ``fresh`` makes initial modules, ``attachment`` is one
module on a model, ``inject`` holds the verbs.
"""

from __future__ import annotations

from pem_composition.adapters.attachment import Attachment
from pem_composition.adapters.folding import Folded, check_fold, fold
from pem_composition.adapters.fresh import fresh_module
from pem_composition.adapters.heads import head_parameter_names, wearing
from pem_composition.adapters.inject import (
    attach,
    attach_fresh,
    attached,
    detach,
    extract,
    set_active,
    set_multiplier,
)
from pem_composition.adapters.targets import TARGETS, Targets, resolve_targets

__all__ = [
    "TARGETS",
    "Attachment",
    "Folded",
    "Targets",
    "attach",
    "attach_fresh",
    "attached",
    "check_fold",
    "detach",
    "extract",
    "fold",
    "fresh_module",
    "head_parameter_names",
    "resolve_targets",
    "set_active",
    "set_multiplier",
    "wearing",
]
