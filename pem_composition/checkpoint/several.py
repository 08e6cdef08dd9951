"""Several modules of one program: read at once, and told apart by short names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from pem_composition.arithmetic.algebra import has_no_effect
from pem_composition.checkpoint import hub_name, load

if TYPE_CHECKING:
    from pem_composition.checkpoint import ModuleHeader
    from pem_composition.module import PEM


def read_modules(
    modules: Sequence[str | ModuleHeader],
    names: Sequence[str],
    base: str | None = None,
    *,
    on_demand: bool = False,
    say: Callable[[str], None] = print,
) -> list[PEM]:
    """Read the modules' tensors; the same directory given twice is read once.

    Args:
        modules: their directories, or their headers, whose files are open.
        base: for whole models, the base whose difference is taken.
        on_demand: leave the tensors in their files, for one sum that reads them layer by layer.
    """
    paths = [str(m) if isinstance(m, str) else str(m.path) for m in modules]
    once = dict(zip(paths, modules, strict=True))
    with ThreadPoolExecutor(2) as pool:  # one takes a checksum while the other reads
        loaded = pool.map(lambda m: load(m, base=base, on_demand=on_demand), once.values())
        read = dict(zip(once, loaded, strict=True))
    for path, module in read.items():
        if has_no_effect(module.tensors):
            say(f"note: {path} changes nothing (untrained?)")
    return [replace(read[path], name=name) for path, name in zip(paths, names, strict=True)]


def short_paths(paths: Sequence[str]) -> list[str]:
    """The last part of each path, and as many before it as tell it from the others.

    Examples:
        >>> short_paths(["runs/cls", "runs/lm-a/checkpoint-9", "runs/lm-b/checkpoint-9"])
        ['cls', 'lm-a/checkpoint-9', 'lm-b/checkpoint-9']
    """
    parts = [hub_name.parts(p) for p in paths]

    def short(own: tuple[str, ...]) -> str:
        depth = 1
        while depth < 8 and any(own[-depth:] == p[-depth:] for p in parts if p != own):
            depth += 1
        return "/".join(own[-depth:]).lstrip("/")

    return [short(own) for own in parts]
