"""What the files of a module say before its values are read: its header, and its pem.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.arithmetic.algebra import layers_of
from pem_composition.checkpoint.files import TensorInfo
from pem_composition.config import AdapterConfig, BaseIdentity, HeadInfo
from pem_composition.errors import CheckpointError
from pem_composition.record import Provenance

if TYPE_CHECKING:
    from pem_composition.checkpoint.tensors import StoredTensors


@dataclass(frozen=True)
class ModuleHeader:
    """A module without its values: everything the torch-free checks need.

    Args:
        format: its layout, see ``content.LAYOUTS``; full of a whole model.
        infos: canonical tensor name -> stored dtype and canonical shape, heads included.
        sha256: recorded checksum of the weights file (not recomputed), None without a pem.json.
        tensors: the values, read when they are asked for; None for a full model.
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
    record: Record | None = None
    digests: Mapping[str, str] = field(default_factory=dict)  # file name -> sha256 at hand
    tensors: StoredTensors | None = field(default=None, repr=False, compare=False)

    @property
    def kind(self) -> str:
        """lora, ia3 or full."""
        return self.config.kind

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the adapted layers (of the changed parameters for full), sorted."""
        return layers_of(self.infos)

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


@dataclass(frozen=True)
class Record:
    """The content of a pem.json."""

    kind: str | None = None
    expression: str | None = None
    provenance: Provenance = field(default_factory=Provenance)
    base: BaseIdentity = field(default_factory=BaseIdentity)
    head: HeadInfo | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    heads: Mapping[str, HeadInfo] = field(default_factory=dict)
    written: Mapping[str, str | None] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=dict)


def check_sha256(folder: Path, name: str, found: str, record: Record | None) -> None:
    """Compare a file's sha256 with the recorded one.

    Raises:
        CheckpointError: they differ: the file changed after it was written.
    """
    expected = record.files.get(name) if record else None
    if expected is not None and found != expected:
        raise CheckpointError.build(
            folder / name,
            "changed since it was written (sha256 differs from pem.json)",
            found=found[:16],
            expected=expected[:16],
            do="restore the file, or delete pem.json if the change is intended",
        )
