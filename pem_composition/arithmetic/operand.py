"""What arithmetic asks of a module: a value with names, tensors and a history. No torch.

``PEM`` is one; nothing here knows it, so that anything of this shape can be combined.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from pem_composition.config import AdapterConfig, BaseIdentity, Head, HeadInfo
from pem_composition.record import Recorded

if TYPE_CHECKING:
    from torch import Tensor


class Described(Protocol):
    """What a module or its header says about itself."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def config(self) -> AdapterConfig: ...
    @property
    def base(self) -> BaseIdentity: ...
    @property
    def layers(self) -> tuple[str, ...]: ...


class Operand(Described, Recorded, Protocol):
    """One module: tensors by canonical name, which ends in the role, and heads."""

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...
    @property
    def head(self) -> HeadInfo | None: ...
    @property
    def heads(self) -> Mapping[str, Head]: ...
    @property
    def adapter_names(self) -> tuple[str, ...]: ...
    def adapter_tensors(self) -> dict[str, Tensor]: ...
    def head_tensors(self) -> dict[str, Tensor]: ...
