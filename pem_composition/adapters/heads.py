"""Heads: the parameters a task adds to a base model, trained and stored beside the adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import Tensor, nn

from pem_composition.adapters.locate import plain_modules, plain_tensors
from pem_composition.errors import IncompatibleModules, listing
from pem_composition.module import HeadInfo


def head_parameter_names(
    model: nn.Module, loading_info: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    """Parameters that a task has to train whole, in model order.

    Those outside ``model.base_model`` (``classifier.*``, ``score.*``) except the output
    embeddings, which a pretrained language model brings along, tied or not; and whatever
    ``from_pretrained(..., output_loading_info=True)`` reports as newly initialised (a pooler, say).
    """
    new = set((loading_info or {}).get("missing_keys", ()))
    new |= {key[0] for key in (loading_info or {}).get("mismatched_keys", ())}
    outside = _outside_base(model)
    trainable = [n for n, t in plain_tensors(model).items() if isinstance(t, nn.Parameter)]
    return tuple(n for n in trainable if n in new or n in outside)


def _outside_base(model: nn.Module) -> set[str]:
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else None
    if not isinstance(base, nn.Module):
        return set()
    inside = {id(p) for p in base.parameters()}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inside |= {id(p) for p in output.parameters()} if isinstance(output, nn.Module) else set()
    return {n for n, t in plain_tensors(model).items() if id(t) not in inside}


def head_info(model: nn.Module, names: Iterable[str]) -> HeadInfo | None:
    """What the model's head predicts, read from its class and config; None without a head."""
    if not tuple(names):
        return None
    kind, config = type(model).__name__, getattr(model, "config", None)
    if "Classification" in kind:
        labels = getattr(config, "id2label", None) or {}
        if len(labels) == 1 or getattr(config, "problem_type", None) == "regression":
            return HeadInfo(problem="regression")
        return HeadInfo(labels=tuple(labels[i] for i in sorted(labels)), problem="classification")
    if "ConditionalGeneration" in kind:
        return HeadInfo(problem="seq2seq_lm")
    return HeadInfo(problem="causal_lm" if "CausalLM" in kind or "LMHead" in kind else None)


@contextmanager
def wearing(model: nn.Module, head: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with these head parameters in the place of its own, whatever their number of
    outputs: one encoder answers tasks of different classes.

    Parameters are exchanged, not written: afterwards the model has the ones it had before.

    Raises:
        IncompatibleModules: no such parameter, or one that takes inputs of another size.
    """
    owners = _owners(model, head)
    before = {name: getattr(owner, local) for name, (owner, local) in owners.items()}
    try:
        for name, (owner, local) in owners.items():
            own = head[name].to(before[name].device, before[name].dtype)
            setattr(owner, local, nn.Parameter(own, requires_grad=False))
        yield
    finally:
        for name, (owner, local) in owners.items():
            setattr(owner, local, before[name])


def _owners(model: nn.Module, head: Mapping[str, Tensor]) -> dict[str, tuple[nn.Module, str]]:
    """Parameter name -> the module that holds it and its name there."""
    modules = plain_modules(model)
    owners = {}
    for name, tensor in head.items():
        where, _, local = name.rpartition(".")
        owner = modules.get(where)
        known = owner._parameters.get(local) if owner is not None else None
        if owner is None or known is None:
            _raise_no_parameter(model, name, tensor)
        if known.shape[1:] != tensor.shape[1:]:
            _raise_other_shape(model, name, tensor, known)
        owners[name] = owner, local
    return owners


def check_head(model: nn.Module, head: Mapping[str, Tensor]) -> None:
    """Raise IncompatibleModules unless every head tensor has its parameter, shape for shape."""
    known = {n: t for n, t in plain_tensors(model).items() if isinstance(t, nn.Parameter)}
    for name, tensor in head.items():
        if name not in known:
            _raise_no_parameter(model, name, tensor)
        if known[name].shape != tensor.shape:
            _raise_other_shape(model, name, tensor, known[name])


def _raise_no_parameter(model: nn.Module, name: str, tensor: Tensor) -> NoReturn:
    known = plain_tensors(model)
    own = [f"{n} {tuple(known[n].shape)}" for n in head_parameter_names(model)]
    raise IncompatibleModules.build(
        f"head {name}",
        f"{type(model).__name__} has no such parameter",
        found=f"head parameters {listing(own)}",
        expected=f"shape {tuple(tensor.shape)}",
        do="load the model class the module was trained on, or pass head='ignore'",
    )


def _raise_other_shape(model: nn.Module, name: str, tensor: Tensor, known: Tensor) -> NoReturn:
    outside = name in head_parameter_names(model)
    raise IncompatibleModules.build(
        f"head {name}",
        "shapes differ",
        found=f"{tuple(tensor.shape)} in the module",
        expected=f"{tuple(known.shape)} in {type(model).__name__}",
        do="load the model with the module's number of labels, or pass head='ignore'"
        if outside
        else f"call model.resize_token_embeddings({len(tensor)}) if it is an embedding of words, "
        "or pass head='ignore'",
    )
