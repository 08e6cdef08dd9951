"""What modules make of each tensor of a checkpoint: W + s B A, l * W and l * b, theta_0 + delta.

As ``adapters.folding`` does it in a model in memory, with names and shapes of files alone. Linear
layers store W (d_out, d_in); the Conv1D layers of GPT-2 and its kin store W^T.

Shape suffixes: R rank, I d_in, O d_out, D either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pem_composition.checkpoint.files import FLOAT_DTYPES
from pem_composition.checkpoint.full import Weights
from pem_composition.config import IA3Config, LoraConfig
from pem_composition.errors import IncompatibleModules

if TYPE_CHECKING:
    from torch import Tensor

    from pem_composition.module import PEM

CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
CONV1D_LAYERS = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
LISTED = 3  # names in an error


@dataclass(frozen=True)
class Product:
    """W + scaling B A, added to rows of a stored matrix."""

    A_RI: Tensor
    B_OR: Tensor
    scaling: float
    transposed: bool

    def rows(self, start: int, stop: int, dtype: Any) -> Tensor:
        """Rows of the stored change."""
        A, B = self.A_RI.to(dtype), self.B_OR.to(dtype)
        if self.transposed:
            return (self.scaling * (B @ A[:, start:stop])).T
        return self.scaling * (B[start:stop] @ A)


@dataclass(frozen=True)
class Scale:
    """l * W by rows or by columns, or l * b."""

    l_D: Tensor
    by_rows: bool

    def apply(self, rows: Tensor, start: int, stop: int) -> None:
        """Multiply rows of the stored tensor in place (a vector is one row)."""
        l_D = self.l_D.to(rows.dtype)
        rows.mul_(l_D[start:stop, None] if self.by_rows else l_D)


@dataclass(frozen=True)
class Change:
    """What the adapters make of one tensor: first its scale, then what is added."""

    scale: Scale | None = None
    product: Product | None = None


def is_conv1d(layer: str, model_type: str | None) -> bool:
    """True for layers that store W^T."""
    return model_type in CONV1D_TYPES and layer.rpartition(".")[2] in CONV1D_LAYERS


def spelled(layers: Iterable[str], base: Weights) -> tuple[dict[str, str], str]:
    """Layer of a module -> its name in the checkpoint, and the prefix that the module's names have
    before the checkpoint's (``roberta.`` over a bare RobertaModel).

    Raises:
        IncompatibleModules: a layer whose weight is there under no spelling.
    """
    layers = list(layers)
    prefixes = sorted({n.split(".")[0] + "." for n in layers})
    roots = sorted({n.split(".")[0] + "." for n in base.infos})
    options = [({n: n for n in layers}, "")]
    options += [({n: n.removeprefix(p) for n in layers}, p) for p in prefixes]
    options += [({n: r + n for n in layers}, "") for r in roots]
    missing = [[n for n in layers if f"{o[n]}.weight" not in base.infos] for o, _ in options]
    best = min(range(len(options)), key=lambda i: len(missing[i]))
    if missing[best]:
        more = f" and {len(missing[best]) - LISTED} more" if len(missing[best]) > LISTED else ""
        raise IncompatibleModules.build(
            base.folder,
            f"no weight of layer {', '.join(missing[best][:LISTED])}{more}",
            found=f"{len(base.infos)} tensors",
            expected=f"the module's {len(layers)} layers, each with a weight of its own (a tied "
            "one has none)",
            do="give the base model that the module was trained on",
        )
    return options[best]


def changes_of(module: PEM, base: Weights, model_type: str | None) -> dict[str, Change]:
    """Tensor of the checkpoint -> what a LoRA or (IA)^3 module makes of it.

    Raises:
        IncompatibleModules: a layer is missing, no floating matrix, or of another shape.
    """
    names, _ = spelled(module.layers, base)
    changes: dict[str, Change] = {}
    for layer, name in names.items():
        weight = f"{name}.weight"
        conv = is_conv1d(name, model_type)
        d_out, d_in = _sizes(base, weight, layer, conv)
        if isinstance(module.config, LoraConfig):
            A, B = module.tensors[f"{layer}.lora_A"], module.tensors[f"{layer}.lora_B"]
            _check(module, layer, (B.shape[0], A.shape[1]), (d_out, d_in))
            product = Product(A, B, module.config.scaling(layer), conv)
            changes[weight] = Change(product=product)
            continue
        assert isinstance(module.config, IA3Config)
        l_D, of_input = module.tensors[f"{layer}.ia3"], module.config.scales_input(layer)
        _check(module, layer, tuple(l_D.shape), (d_in if of_input else d_out,))
        changes[weight] = Change(scale=Scale(l_D, by_rows=of_input == conv))
        bias = f"{name}.bias"
        if not of_input and bias in base.infos:
            changes[bias] = Change(scale=Scale(l_D, by_rows=False))
    return changes


def joined(changes: Sequence[Mapping[str, Change]]) -> dict[str, Change]:
    """Changes of an (IA)^3 and a LoRA module together: l * W + s B A."""
    out: dict[str, Change] = {}
    for own in changes:
        for name, change in own.items():
            old = out.get(name, Change())
            out[name] = Change(change.scale or old.scale, change.product or old.product)
    return out


def _sizes(base: Weights, weight: str, layer: str, conv: bool) -> tuple[int, int]:
    """(d_out, d_in) of a stored matrix."""
    info = base.infos[weight]
    if len(info.shape) != 2 or info.dtype not in FLOAT_DTYPES:
        raise IncompatibleModules.build(
            base.folder,
            f"layer {layer} cannot be folded into",
            found=f"{info.dtype} {info.shape}",
            expected="a floating point matrix",
            do="attach the module instead",
        )
    return info.shape[::-1] if conv else info.shape


def _check(module: PEM, layer: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise IncompatibleModules.build(
            module.name,
            f"layer {layer} does not fit the base model",
            found=f"shape {found} in the module",
            expected=f"shape {expected}",
            do="give the base model that the module was trained on",
        )
