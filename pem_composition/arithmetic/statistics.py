"""What a module's data says about it: a diagonal Fisher, or Gram matrices of layer inputs, whole
or in the span of the rows of several modules' A.

Merging methods that need data take them as tensors; ``merging`` computes them, ``checkpoint`` reads
and writes them. No torch at import.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pem_composition.errors import IncompatibleModules, wrong_type

if TYPE_CHECKING:
    from torch import Tensor

FISHER, GRAM, SUBSPACE = "fisher", "gram", "subspace"
COMMANDS = {FISHER: "pem fisher", GRAM: "pem gram", SUBSPACE: "pem gram --merge_with"}
BLOCKS = "blocks"  # fact of a subspace: the fingerprints of the modules whose A are stacked


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of one module on the rows of one task.

    Attributes:
        what: fisher (tensor name -> the same shape), gram (``<layer>.gram`` -> (d_in, d_in)) or
            subspace (``<layer>.subspace`` -> (sum r, sum r)).
        module: fingerprint of the module's tensors, see ``fingerprint``.
        n: rows.
        facts: task, digest of the rows, base, and how they were computed.
        name: what to call them in messages: the file.
    """

    what: str
    tensors: Mapping[str, Tensor]
    module: str
    n: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    name: str = "statistics"

    @property
    def sha256(self) -> str:
        """Digest of the values."""
        return _digest(self.tensors)


class Named(Protocol):
    """A module."""

    @property
    def name(self) -> str: ...
    def adapter_tensors(self) -> dict[str, Tensor]: ...


def fingerprint(module: Named) -> str:
    """sha256 over the module's adapter tensors in float32; format, dtype and head do not count."""
    return _digest(module.adapter_tensors())


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check(
    what: str, method: str, modules: Sequence[Named], statistics: Sequence[Statistics]
) -> None:
    """Refuse statistics of another kind or of other modules, and a wrong number of them.

    Args:
        what: the kind that the method needs; empty for a method that needs none.

    Raises:
        IncompatibleModules: naming file and module.
    """
    if not isinstance(statistics, Sequence) or isinstance(statistics, str):
        raise wrong_type("statistics", statistics, "a list of statistics")
    needed = len(modules) if what else 0
    if len(statistics) != needed:
        raise IncompatibleModules.build(
            method,
            f"needs the {what} file of every module" if what else "takes no statistics",
            found=f"{len(statistics)} files for {len(modules)} modules",
            expected="one per module, in the same order" if what else None,
            do=f"compute them with {COMMANDS[what]}" if what else "leave them out",
        )
    for module, own in zip(modules, statistics, strict=False):
        if not isinstance(own, Statistics):
            do = "read them by checkpoint.statistics_files.read(FILE, WHAT)"
            raise wrong_type("statistics", own, f"the {what} statistics of a module", do=do)
        if own.what != what:
            raise IncompatibleModules.build(
                own.name, "statistics of another kind", found=own.what, expected=what,
                do=f"compute them with {COMMANDS[what]}",
            )  # fmt: skip
        found = fingerprint(module)
        if own.module != found:
            raise IncompatibleModules.build(
                own.name,
                f"does not belong to {module.name}",
                found=f"the {what} of module {own.module[:12]}",
                expected=f"that of {found[:12]}",
                do=f"give the files in the order of the modules, or run {COMMANDS[what]} again",
            )
