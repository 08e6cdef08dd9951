"""Train parameter-efficient modules, compose them by arithmetic in weight space, see what it does.

    import pem_composition as pem
    a, b = pem.load("runs/rte-0"), pem.load("runs/rte-1")
    m = 0.3 * a + 0.7 * b
    m.save("runs/merged")

Names are imported on first use: importing the package costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pem_composition._version import __version__ as __version__

_HOMES = {
    "PEM": "module",
    "combine": "module",
    "negate": "module",
    "analogy": "module",
    "compose": "composition",
    "detoxify": "module",
    "load": "checkpoint",
    "save": "checkpoint",
    "compare": "arithmetic.comparison",
    "convert": "checkpoint.conversion",
    "rebuild": "checkpoint.recomputation",
    "attach": "adapters",
    "detach": "adapters",
    "extract": "adapters",
    "fold": "adapters",
    "PEMError": "errors",
}
__all__ = [
    "PEM",
    "PEMError",
    "analogy",
    "attach",
    "combine",
    "compare",
    "compose",
    "convert",
    "detach",
    "detoxify",
    "extract",
    "fold",
    "load",
    "negate",
    "rebuild",
    "save",
]

if TYPE_CHECKING:
    from pem_composition.adapters import attach, detach, extract, fold
    from pem_composition.arithmetic.comparison import compare
    from pem_composition.checkpoint import load, save
    from pem_composition.checkpoint.conversion import convert
    from pem_composition.checkpoint.recomputation import rebuild
    from pem_composition.composition import compose
    from pem_composition.errors import PEMError
    from pem_composition.module import PEM, analogy, combine, detoxify, negate


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
