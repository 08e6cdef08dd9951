"""Find a module's layers in a model, and say clearly when they are not there.

Names are those of the plain model, whether or not modules are attached to it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from functools import lru_cache

from torch import Tensor, nn

from pem_composition.adapters.layer import AdapterLayer, is_linear
from pem_composition.checkpoint.changes import spelling_of
from pem_composition.config import WRAPPERS, expert_layer, matches, plain_name
from pem_composition.errors import IncompatibleModules, listing, wrong_type


def check_model(model: object) -> None:
    """Refuse an argument that is no live model, such as the name of one.

    Raises:
        PEMError: naming its value and its type.
    """
    if not isinstance(model, nn.Module):
        raise wrong_type("model", model, "a torch.nn.Module")


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> submodule of the model as it was before anything was attached."""
    found: dict[str, nn.Module] = {}
    wrapped: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(tuple(wrapped)):
            continue
        if isinstance(module, AdapterLayer):
            wrapped.append(name + ".")
            module = module.base
            inside = module.named_modules(prefix=_plain(name), remove_duplicate=False)
            found |= {_plain(n): m for n, m in inside}
        found[_plain(name)] = module  # what a wrapper holds comes after it, and stays
    return found


@lru_cache(maxsize=1 << 14)
def _plain(name: str) -> str:
    """The name without wrappers (torch.compile, checkpointing, FSDP, DDP), also of one alone."""
    return plain_name(name + ".x").rpartition(".")[0]


def holder_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds the one of that name, and the attribute under which it does."""
    holder, local, module = model, "", model
    for part in path.split("."):
        while wrapper := _wrapper(module):
            module = module.get_submodule(wrapper)
        holder, local, module = module, part, module.get_submodule(part)
    while wrapper := _wrapper(module):
        holder, local, module = module, wrapper, module.get_submodule(wrapper)
    return holder, local


def _wrapper(module: nn.Module) -> str | None:
    """The attribute in which a wrapper holds what it wraps; None for any other module."""
    if type(module).__name__ == "DistributedDataParallel":
        return "module"
    return next((name for name in WRAPPERS if name in module._modules), None)


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter or buffer of the plain model; a tied parameter appears under each name."""
    return {
        f"{name}.{local}" if name else local: tensor
        for name, module in plain_modules(model).items()
        for store in (module._parameters, module._buffers)
        for local, tensor in store.items()
        if tensor is not None
    }


def names_of(model: nn.Module) -> dict[Tensor, list[str]]:
    """Parameter or buffer of the plain model -> all its names, more than one where it is tied."""
    names: dict[Tensor, list[str]] = {}
    for name, tensor in plain_tensors(model).items():
        names.setdefault(tensor, []).append(name)
    return names


def expert_layers(model: nn.Module) -> set[str]:
    """One name per matrix of every stack, a parameter (E, ., .) of the plain model."""
    return {
        expert_layer(name, i)
        for name, tensor in plain_tensors(model).items()
        if tensor.ndim == 3
        for i in range(len(tensor))
    }


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> every nn.Linear or Conv1D of the plain model, in model order."""
    return {n: m for n, m in plain_modules(model).items() if is_linear(m)}


def linear_suffixes(names: Iterable[str]) -> list[str]:
    """Last name component of each layer (with the one before it where that is a word), sorted."""
    return sorted({".".join(_words(name)[-2:]) for name in names})


def _words(name: str) -> list[str]:
    parts = name.split(".")
    cut = max((i + 1 for i, p in enumerate(parts) if p.isdigit() and i + 1 < len(parts)), default=0)
    return parts[cut:]


def renaming(
    model: nn.Module, names: Iterable[str], known: Container[str], what: str
) -> dict[str, str]:
    """Module's name -> model's name for every name, adding or stripping the base model's prefix.

    Raises:
        IncompatibleModules: some name is in the model under no spelling.
    """
    names, prefix = list(names), getattr(model, "base_model_prefix", "")
    spelling, missing = spelling_of(names, known, [prefix + "."] if prefix else [])
    if missing:
        _raise_missing(model, missing, len(names), what)
    return {n: spelling(n) for n in names}


def _raise_missing(model: nn.Module, missing: list[str], total: int, what: str) -> None:
    do = "load the base model that the module was trained on"
    if what == "parameter":  # of a whole model, by the names of its file
        do += "; if it is this one, its class renames what files hold: load what pem fold writes"
    raise IncompatibleModules.build(
        f"{what} {missing[0]}",
        f"not in {type(model).__name__} ({len(missing)} of the module's {total} are not)",
        found=f"linear layers named {listing(linear_suffixes(linear_layers(model)))}",
        expected=f"the module's names, e.g. {listing(missing[:3])}",
        do=do,
    )


def matching_layers(
    model: nn.Module, targets: Iterable[str], *, skip: Container[str] = ()
) -> dict[str, nn.Module]:
    """Linear layers named by the targets (whole names or suffixes), in model order.

    Raises:
        IncompatibleModules: a target names no linear layer; the message lists those there are.
    """
    linears = {n: m for n, m in linear_layers(model).items() if n not in skip}
    found: set[str] = set()
    for target in targets:
        hits = {n for n in linears if matches(n, target)}
        if not hits:
            _raise_unmatched(model, target, linears)
        found |= hits
    return {n: m for n, m in linears.items() if n in found}


def _raise_unmatched(model: nn.Module, target: str, linears: Iterable[str]) -> None:
    other = {type(m).__name__ for n, m in plain_modules(model).items() if matches(n, target)}
    raise IncompatibleModules.build(
        f"target module {target!r}",
        f"names a {', '.join(sorted(other))}, which is no nn.Linear or Conv1D"
        if other
        else f"did not match any linear layer of {type(model).__name__}",
        found=f"linear layers named {listing(linear_suffixes(linears))}",
        do="name some of these as target modules",
    )
