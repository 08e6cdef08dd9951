"""What the files of a module say before its values are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pem_composition.checkpoint.files import TensorInfo
from pem_composition.config import AdapterConfig, BaseIdentity

if TYPE_CHECKING:
    from pem_composition.module import HeadInfo
    from pem_composition.record import Provenance


@dataclass(frozen=True)
class ModuleHeader:
    """A module without its values: everything the torch-free checks need.

    Args:
        format: peft | adapter-transformers | full.
        infos: canonical tensor name -> stored dtype and canonical shape, heads included.
        sha256: recorded checksum of the weights file (not recomputed), None without a pem.json.
    """

    path: Path
    format: str
    name: str
    config: AdapterConfig
    base: BaseIdentity
    infos: Mapping[str, TensorInfo]
    head: HeadInfo | None
    provenance: Provenance
    weights: Path
    notes: tuple[str, ...] = ()
    sha256: str | None = None
    heads: Mapping[str, HeadInfo] = field(default_factory=dict)  # kept beside the module

    @property
    def kind(self) -> str:
        """lora, ia3 or full."""
        return self.config.kind

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the adapted layers (of the changed parameters for full), sorted."""
        return tuple(sorted({name.rpartition(".")[0] for name in self.shapes}))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the adapter tensors by canonical name."""
        return {n: i.shape for n, i in self.infos.items() if not n.endswith(".head")}

    @property
    def head_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the head parameters by their name in the model."""
        return {
            n.removesuffix(".head"): i.shape for n, i in self.infos.items() if n.endswith(".head")
        }
