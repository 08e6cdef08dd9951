"""What a module makes of each weight: one rule for a model in memory and for a checkpoint.

    W + scaling B A        LoRA; a Conv1D layer (GPT-2 and its kin) holds W^T
    m (W + scaling B A) / norm of its rows    DoRA
    l * W and l * b        (IA)^3 on the output; on the input W * l
    theta_0 + delta        whole models
    the part itself        in place of the base's, where a module saves a part whole

A change belongs to a name. Where one tensor stands under several names (tied weights), the named
one changes and the others stay, as in PEFT's live model: the weights are then no longer tied.

Shape suffixes: R rank, I d_in, O d_out, D either.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pem_composition.arithmetic.algebra import is_neutral
from pem_composition.checkpoint.files import TensorInfo
from pem_composition.checkpoint.stored_names import is_uncalled
from pem_composition.config import IA3Config, LoraConfig, expert_of, weight_of
from pem_composition.errors import IncompatibleModules

if TYPE_CHECKING:
    from torch import Tensor

    from pem_composition.module import PEM

# transformers' names of Conv1D layers; only such a layer can hold W^T.
CONV1D_LAYERS = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})


@dataclass(frozen=True)
class Product:
    """W + scaling B A."""

    A_RI: Tensor
    B_OR: Tensor
    scaling: float
    transposed: bool

    def rows(self, start: int, stop: int, like: Tensor) -> Tensor:
        """Rows of the change as the weight is stored."""
        A, B = self.A_RI.to(like), self.B_OR.to(like)
        if self.transposed:
            return (self.scaling * (B @ A[:, start:stop])).T
        return self.scaling * (B[start:stop] @ A)


@dataclass(frozen=True)
class Stack:
    """The products of all experts of a stack (E, H, .), each of H rows."""

    experts: Mapping[int, Product]
    height: int

    def rows(self, start: int, stop: int, like: Tensor) -> Tensor:
        """Rows of the change as the stack is stored, expert after expert."""
        out, height = like.new_zeros(stop - start, like.shape[1]), self.height
        for i in range(start // height, -(-stop // height)):
            low, high = max(start, i * height), min(stop, (i + 1) * height)
            part = out[low - start : high - start]
            part.copy_(self.experts[i].rows(low - i * height, high - i * height, part))
        return out


@dataclass(frozen=True)
class Scale:
    """l * W by rows or by columns of what is stored, or l * b."""

    l_D: Tensor
    by_rows: bool

    def apply(self, rows: Tensor, start: int, stop: int) -> None:
        """Multiply rows of the stored tensor in place (a vector is one row)."""
        l_D = self.l_D.to(rows)
        rows.mul_(l_D[start:stop, None] if self.by_rows else l_D)


@dataclass(frozen=True)
class Magnitude:
    """m W / norm(W) by outputs, of DoRA, W the changed weight; a row of W is an output.

    A Conv1D layer's outputs are columns, whose norms need all rows.
    """

    m_O: Tensor
    transposed: bool

    def apply(self, rows: Tensor, start: int, stop: int) -> None:
        """Scale rows of the changed weight in place."""
        m_O = self.m_O.to(rows)
        if self.transposed:
            rows.mul_(m_O / rows.norm(dim=0))
        else:
            rows.mul_((m_O[start:stop] / rows.norm(dim=1))[:, None])


@dataclass(frozen=True)
class Change:
    """What becomes of one parameter: replaced by ``saved``, scaled, added to, and of DoRA given its
    magnitudes.
    """

    saved: Tensor | None = None
    scale: Scale | None = None
    product: Product | Stack | None = None
    magnitude: Magnitude | None = None
    delta: Tensor | None = None

    def of(self, value: Tensor) -> Tensor:
        """The changed value, in the dtype of the one given."""
        value = value.clone() if self.saved is None else self.saved.to(value, copy=True)
        rows = value.view(-1, value.shape[-1]) if value.ndim else value
        if self.scale:
            self.scale.apply(rows, 0, len(rows))
        if self.product:
            rows.add_(self.product.rows(0, len(rows), rows))
        if self.magnitude:
            self.magnitude.apply(rows, 0, len(rows))
        return value if self.delta is None else value.add_(self.delta.to(value))

    def same_as(self, other: Change) -> bool:
        """True for the same numbers in the place of, or added to, a parameter."""
        pairs = [(self.saved, other.saved), (self.delta, other.delta)]
        return self is other or (
            not (self.scale or self.product or other.scale or other.product)
            and all(a is b or (a is not None and b is not None and a.equal(b)) for a, b in pairs)
        )


def changes_of(
    module: PEM,
    names: Mapping[str, str],
    transposed: Callable[[str], bool],
    known: Container[str],
) -> dict[str, Change]:
    """Parameter of the model -> what a LoRA or (IA)^3 module makes of it.

    Args:
        names: layer of the module -> the model's.
        transposed: whether a layer of the model, or an expert of a stack, holds W^T.
        known: the model's parameters.
    """
    changes: dict[str, Change] = {}
    stacks: dict[str, dict[int, Product]] = defaultdict(dict)
    for layer, name in names.items():
        conv = transposed(name)
        if isinstance(module.config, LoraConfig):
            A, B = module.tensors[f"{layer}.lora_A"], module.tensors[f"{layer}.lora_B"]
            product = Product(A, B, module.config.scaling(layer), conv)
            if expert := expert_of(name):
                stacks[expert[0]][expert[1]] = product
            else:
                m_O = module.tensors.get(f"{layer}.lora_magnitude")
                magnitude = None if m_O is None else Magnitude(m_O, conv)
                changes[weight_of(name)] = Change(product=product, magnitude=magnitude)
            continue
        assert isinstance(module.config, IA3Config)
        l_D, of_input = module.tensors[f"{layer}.ia3"], module.config.scales_input(layer)
        changes[f"{name}.weight"] = Change(scale=Scale(l_D, by_rows=of_input == conv))
        if not of_input and f"{name}.bias" in known:
            changes[f"{name}.bias"] = Change(scale=Scale(l_D, by_rows=False))
    for name, own in stacks.items():
        first = own[0]
        height = first.A_RI.shape[1] if first.transposed else len(first.B_OR)
        changes[name] = Change(product=Stack(own, height))
    return changes


def with_saved(
    changes: Mapping[str, Change],
    saved: Mapping[str, Tensor],
    in_base: Container[str],
    tied: Callable[[str], Iterable[str]],
) -> dict[str, Change]:
    """Changes of layers on top of the parts that a module saves whole.

    Args:
        saved: parameter of the model -> what the module saves.
        in_base: of these, what PEFT loads into the base's own parameter instead of a copy of it
            (embeddings stored beside an adapter); it counts under every name of that parameter.
        tied: other names of a parameter.
    """
    whole = dict(saved)
    for name in (n for n in saved if n in in_base):
        whole |= {other: saved[name] for other in tied(name) if other not in whole}
    out = dict(changes)
    for name, tensor in whole.items():
        out[name] = replace(out.get(name, Change()), saved=tensor)
    return out


def joined(changes: Sequence[Mapping[str, Change]]) -> dict[str, Change]:
    """Changes of an (IA)^3 and a LoRA module together: l * W + s B A."""
    out: dict[str, Change] = {}
    for own in changes:
        for name, change in own.items():
            old = out.get(name, Change())
            out[name] = Change(
                scale=change.scale or old.scale,
                product=change.product or old.product,
                magnitude=change.magnitude or old.magnitude,
            )
    return out


def check_called(layer: str, parameters: Container[str]) -> None:
    """Refuse a layer on which an adapter has no effect.

    Args:
        parameters: names of the model's parameters.

    Raises:
        IncompatibleModules: naming the layer.
    """
    if is_uncalled(layer, parameters):
        raise IncompatibleModules.build(
            f"layer {layer}",
            "an adapter on it has no effect in a live model",
            found="a class that reads the layer's weight and never calls the layer",
            expected="layers that the model calls",
            do="leave it out: in target_modules name the other layers, in full or by longer ends "
            "of their names",
        )


class ExpertStacks:
    """Stacks of experts (E, ., .) of a model, and which way each holds the experts' matrices.

    The factors tell where a matrix is not square, else another stack of the same module does, else
    the model's class: PEFT's rule is (E, d_out, d_in) unless it says ``is_transposed``.

    Args:
        shapes: parameter of the model -> shape.
        told: of the module that holds a parameter, whether its class says so; None: unknown.
    """

    def __init__(
        self,
        module: PEM,
        names: Mapping[str, str],
        shapes: Mapping[str, tuple[int, ...]],
        told: Callable[[str], bool | None],
    ) -> None:
        self._sides: dict[str, dict[str, bool]] = defaultdict(dict)  # holder -> stack -> transposed
        self._told = told
        places: dict[str, set[int]] = defaultdict(set)
        for layer, name in names.items():
            if not (expert := expert_of(name)):
                continue
            stack, i = expert
            places[stack].add(i)
            self._check(module, layer, name, shapes[stack])
            holder = stack.rpartition(".")[0]
            if shapes[stack][1] != shapes[stack][2]:
                d_in = module.tensors[f"{layer}.lora_A"].shape[1]
                self._sides[holder][stack] = d_in == shapes[stack][1]
        for stack, found in places.items():
            if found != set(range(shapes[stack][0])):
                raise IncompatibleModules.build(
                    f"parameter {stack}", f"module {module.name} does not fit the stack",
                    found=f"{len(found)} experts", expected=f"{shapes[stack][0]}",
                    do="give the base model that the module was trained on",
                )  # fmt: skip

    @staticmethod
    def _check(module: PEM, layer: str, name: str, shape: tuple[int, ...]) -> None:
        d_in = module.tensors[f"{layer}.lora_A"].shape[1]
        _, rows, width = shape
        check_fits(module, layer, name, (rows, width) if d_in == rows else (width, rows), ())

    def transposed(self, name: str) -> bool:
        """Whether an expert of the model holds W^T, (d_in, d_out).

        Raises:
            IncompatibleModules: nothing tells.
        """
        stack = name.rpartition("[")[0]
        holder = stack.rpartition(".")[0]
        own = self._sides[holder]
        answer = own[stack] if stack in own else next(iter(own.values()), self._told(holder))
        if answer is None:
            raise IncompatibleModules.build(
                f"parameter {stack}", "a file does not say which side of square experts is which",
                expected="a matrix that is not square", do="fold in memory (pem.fold)",
            )  # fmt: skip
        return answer


def check_fits(
    module: PEM, layer: str, name: str, sizes: tuple[int, int], parameters: Container[str]
) -> None:
    """Refuse tensors that do not fit a layer of the model, or change one that is never called.

    Args:
        sizes: d_in and d_out of the model's layer.
        parameters: names of the model's parameters.

    Raises:
        IncompatibleModules: naming layer and tensor.
    """
    d_in, d_out = sizes
    if isinstance(module.config, LoraConfig):
        r = module.config.rank(layer)
        expected: dict[str, tuple[int, ...]] = {"lora_A": (r, d_in), "lora_B": (d_out, r)}
    else:
        assert isinstance(module.config, IA3Config)
        expected = {"ia3": (d_in if module.config.scales_input(layer) else d_out,)}
    for role, shape in expected.items():
        tensor = module.tensors.get(f"{layer}.{role}")
        found = None if tensor is None else tuple(tensor.shape)
        if found != shape:
            raise IncompatibleModules.build(
                f"layer {name}, {role}",
                f"module {module.name} does not fit the layer",
                found="no such tensor" if found is None else f"{found} in the module",
                expected=f"{shape} for a layer {d_in} -> {d_out}",
                do="give the base model that the module was trained on",
            )
    own = (f"{layer}.{role}" for role in ("lora_B", "ia3"))
    if not all(is_neutral(n, module.tensors[n]) for n in own if n in module.tensors):
        check_called(name, parameters)


# --- names ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spelling:
    """How a module's names become the model's: one prefix less, or one more."""

    less: str = ""
    more: str = ""

    def __call__(self, name: str) -> str:
        return self.more + name.removeprefix(self.less)


def spelling_of(
    names: Iterable[str], known: Container[str], prefixes: Iterable[str], suffix: str = ""
) -> tuple[Spelling, list[str]]:
    """The spelling under which the model knows most of the names, and the names that it then lacks.

    A module trained on RobertaForSequenceClassification says ``roberta.encoder...``; in a
    RobertaModel the same layer is ``encoder...``. One spelling must fit all names.
    """
    names, best = list(names), (Spelling(), list(names))
    prefixes = list(prefixes)
    options = [Spelling(), *(Spelling(less=p) for p in prefixes)]
    for spelling in [*options, *(Spelling(more=p) for p in prefixes)]:
        missing = [n for n in names if spelling(n) + suffix not in known]
        if len(missing) < len(best[1]) or not missing:
            best = spelling, missing
        if not missing:
            break
    return best


# --- how files hold a layer -------------------------------------------------------------------


def stores_transposed(layer: str, infos: Mapping[str, TensorInfo]) -> bool:
    """True for a Conv1D layer of a checkpoint, which stores W^T (d_in, d_out).

    A Conv1D layer always has a bias, of d_out entries, so the shapes tell unless the matrix is
    square; then the nearest other layer of such a name tells.
    """
    if layer.rpartition(".")[2] not in CONV1D_LAYERS:
        return False
    own = _transposed_by_shape(layer, infos)
    if own is not None:
        return own
    near = sorted(_conv1d_named(infos), key=lambda n: -_common(n, layer))
    told = (_transposed_by_shape(n, infos) for n in near)
    return next((answer for answer in told if answer is not None), False)


def _conv1d_named(infos: Iterable[str]) -> list[str]:
    layers = (n.removesuffix(".weight") for n in infos if n.endswith(".weight"))
    return [n for n in layers if n.rpartition(".")[2] in CONV1D_LAYERS]


def _transposed_by_shape(layer: str, infos: Mapping[str, TensorInfo]) -> bool | None:
    weight, bias = infos[f"{layer}.weight"].shape, infos.get(f"{layer}.bias")
    if bias is None:
        return False
    if len(weight) != 2 or weight[0] == weight[1]:
        return None
    return bias.shape == weight[1:]


def _common(a: str, b: str) -> int:
    """Components that two names have in common, from the first."""
    pairs = zip(a.split("."), b.split("."), strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), 99)
