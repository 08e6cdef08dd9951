"""What arithmetic asks of a module: a value with names, tensors and a history. No torch.

``PEM`` is one; nothing here knows it, so that anything of this shape can be combined.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

from pem_composition.config import AdapterConfig, BaseIdentity, Head, HeadInfo
from pem_composition.errors import wrong_type
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


@runtime_checkable
class Loaded(Protocol):
    """What tells a module from its header, its folder and a live model."""

    def adapter_tensors(self) -> dict[str, Tensor]: ...


class Operand(Described, Recorded, Loaded, Protocol):
    """One module: tensors by canonical name, which ends in the role, and heads."""

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...
    @property
    def head(self) -> HeadInfo | None: ...
    @property
    def heads(self) -> Mapping[str, Head]: ...
    @property
    def adapter_names(self) -> tuple[str, ...]: ...
    def head_tensors(self) -> dict[str, Tensor]: ...


Module = TypeVar("Module", bound=Operand)


def check_module(where: str, value: object) -> None:
    """Refuse an argument that is no module, such as the path of one.

    Raises:
        PEMError: naming the argument, its value and the type of that.
    """
    if not isinstance(value, Loaded):
        raise wrong_type(where, value, "a module", do="read it by pem.load(DIR)")


def listed(modules: Iterable[Module]) -> list[Module]:
    """The modules as a list; see ``check_module``."""
    if not isinstance(modules, Iterable):
        raise wrong_type("modules", modules, "a list of modules")
    found = list(modules)
    for module in found:
        check_module("modules", module)
    return found
