"""mlx-lm's layout of a LoRA adapter: adapter_config.json + adapters.safetensors.

    <layer>.lora_a (d_in, r), <layer>.lora_b (r, d_out):    y + scale (x lora_a) lora_b

so lora_a = A^T, lora_b = B^T and ``scale`` is alpha / r. One rank and one scale stand for all
layers; ``keys`` are the adapted layers' names inside a block, ``num_layers`` counts blocks from the
last one, -1 for all. A layer that these name and the file lacks changes nothing. With ``alpha`` in
the config, older releases of mlx-lm multiplied by scale alpha / rank; later ones ignore it.

Source: mlx-lm, ``tuner/lora.py`` (LoRALinear) and ``tuner/utils.py`` (load_adapters,
linear_to_lora_layers).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_composition.arithmetic.algebra import layers_of
from pem_composition.arithmetic.compatible import check_linear
from pem_composition.arithmetic.updates import save_dtype
from pem_composition.checkpoint.content import CONFIG, MLX
from pem_composition.checkpoint.content import MLX_WEIGHTS as WEIGHTS
from pem_composition.checkpoint.files import TensorInfo
from pem_composition.checkpoint.header import ModuleHeader, Record
from pem_composition.checkpoint.tensors import (
    StoredTensors,
    cast,
    check_float,
    open_tensors,
    write_tensors,
)
from pem_composition.config import BaseIdentity, LoraConfig, alpha_for
from pem_composition.errors import CheckpointError, PEMError, UnsupportedModule
from pem_composition.record import Provenance
from pem_composition.safe_files import is_file, listing, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from pem_composition.module import PEM

ROLES = {".lora_a": "lora_A", ".lora_b": "lora_B"}
BLOCK = re.compile(r"(?:.+\.)?layers\.\d+\.(.+)", re.ASCII)
# The blocks of mlx-lm's models, called as here; it skips a tensor of another name without a word.
WRITTEN = re.compile(r"(model|backbone|language_model\.model)\.layers\.\d+\..*[^\]]", re.ASCII)
OUTPUTS = ("lm_head",)  # the layers outside the blocks that mlx-lm's models call as here
EMBEDDINGS = ("embed_tokens", "wte", "embeddings")
ONE_OF_EACH = "write it with one rank, one scaling and no other parts first (pem convert IN OUT "
ONE_OF_EACH += "--format vllm --drop_saved)"


# --- reading ------------------------------------------------------------------------------------


def read(folder: Path, raw: Mapping[str, Any], name: str, record: Record | None) -> ModuleHeader:
    """The header of an mlx-lm adapter, whose weights stay open for its tensors.

    Raises:
        UnsupportedModule: no LoRA on linear layers.
        CheckpointError: a missing value, or tensors that do not fit the config.
    """
    path, where = folder / WEIGHTS, folder / CONFIG
    kind = raw.get("fine_tune_type", "lora")
    if kind != "lora":
        raise UnsupportedModule.build(
            where, "fine_tune_type cannot be represented", found=repr(kind), expected="'lora'",
            do="fuse it into its base with mlx_lm.fuse, and take its LoRA out (pem extract)",
        )  # fmt: skip
    if not is_file(path):
        raise CheckpointError.build(
            folder, "no weights", found=listing(folder), expected=WEIGHTS,
            do=f"copy {WEIGHTS} beside {CONFIG}",
        )  # fmt: skip
    r, scale, keys = _parameters(raw, where)
    file = open_tensors(path, folder)
    with ExitStack() as stack:
        stack.callback(file.close)
        check_float(file.infos, path)
        names = {_canonical(key, info, path): key for key, info in file.infos.items()}
        infos = {
            n: TensorInfo(file.infos[k].dtype, file.infos[k].shape[::-1]) for n, k in names.items()
        }
        layers = layers_of(names)
        _check(layers, infos, r, keys, path)
        stack.pop_all()  # the file stays open
    model = raw.get("model")
    base = BaseIdentity(name=model if isinstance(model, str) and model else None)
    config = _config(scale, r, layers)
    if config is None:
        raise UnsupportedModule.build(
            where, "scale cannot be represented", found=scale,
            expected="a quotient alpha / rank, or alpha / sqrt(rank)",
            do="train with another scale, or fuse it into its base with mlx_lm.fuse",
        )  # fmt: skip
    return ModuleHeader(
        path=folder, format=MLX.name, name=name,
        config=config,
        base=base, infos=infos, head=None,
        provenance=record.provenance if record else Provenance(), weights=path,
        tensors=StoredTensors({n: (file, k) for n, k in names.items()}, _transposed),
    )  # fmt: skip


def _config(scale: float, r: int, layers: tuple[str, ...]) -> LoraConfig | None:
    """The config of that scaling, bit for bit: alpha / r, or rsLoRA's alpha / sqrt(r)."""
    for rslora in (False, True):
        divisor = r**0.5 if rslora else r
        if (alpha := alpha_for(scale, divisor)) is not None:
            return LoraConfig(r=r, alpha=alpha, target_modules=layers, use_rslora=rslora)
    return None


def _transposed(name: str, tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous()


def _parameters(raw: Mapping[str, Any], where: Path) -> tuple[int, float, frozenset[str]]:
    """Rank, scale and keys (none: those of the model's kind)."""
    given = raw.get("lora_parameters")
    given = given if isinstance(given, Mapping) else {}
    r, keys = given.get("rank"), given.get("keys")
    scale: Any = given.get("scale")
    if type(r) is not int or r < 1:
        raise _wrong(where, "rank", r, "a whole number >= 1")
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not number or not 0 < scale < math.inf:
        raise _wrong(where, "scale", scale, "a number > 0")
    if not isinstance(keys, list | None) or not all(isinstance(k, str) for k in keys or ()):
        raise _wrong(where, "keys", keys, "a list of names")
    alpha = given.get("alpha")
    if alpha not in (None, r):
        raise UnsupportedModule.build(
            where, "lora_parameters: alpha has two meanings",
            found=f"alpha {alpha!r}, scale {scale}, rank {r}", expected="no alpha",
            do="remove alpha; if an older mlx-lm, which used it, trained the adapter, "
            "multiply scale by alpha / rank",
        )  # fmt: skip
    return r, float(scale), frozenset(keys or ())


def _wrong(where: Path, key: str, found: object, expected: str) -> PEMError:
    return CheckpointError.build(
        where, f"lora_parameters: {key}", found=repr(found), expected=expected,
        do="restore the config that mlx-lm wrote",
    )  # fmt: skip


def _canonical(key: str, info: TensorInfo, path: Path) -> str:
    layer, role = key[:-7], ROLES.get(key[-7:])
    if role is None or not layer:
        raise UnsupportedModule.build(
            path, f"tensor {key!r} cannot be represented", found="no factor of LoRA",
            expected=" and ".join(f"...{suffix}" for suffix in ROLES),
            do="fuse it into its base with mlx_lm.fuse, and take its LoRA out (pem extract)",
        )  # fmt: skip
    if len(info.shape) != 2 or layer.rpartition(".")[2] in EMBEDDINGS:
        what = "an embedding" if len(info.shape) == 2 else "stacked experts"
        raise UnsupportedModule.build(
            path, f"tensor {key!r}: mlx-lm's LoRA on {what} cannot be represented",
            found=f"shape {info.shape}", expected="linear layers", do="train on linear layers",
        )  # fmt: skip
    return f"{layer}.{role}"


def _check(
    layers: Iterable[str],
    infos: Mapping[str, TensorInfo],
    r: int,
    keys: frozenset[str],
    path: Path,
) -> None:
    """Both factors of every layer, of the rank that the config says, of a layer that it names."""
    for layer in layers:
        a, b = (infos.get(f"{layer}.lora_{side}") for side in "AB")
        if a is None or b is None or (a.shape[0], b.shape[1]) != (r, r):
            shapes = [i.shape[::-1] if i else "missing" for i in (a, b)]
            raise CheckpointError.build(
                path, f"factors of {layer!r}", found=f"lora_a {shapes[0]}, lora_b {shapes[1]}",
                expected=f"(d_in, {r}) and ({r}, d_out)", do="correct lora_parameters' rank",
            )  # fmt: skip
        if keys and not {layer, _key(layer)} & keys:
            raise CheckpointError.build(
                path, f"extra tensors for layer {layer!r}", found="a layer that keys do not name",
                expected=f"keys {sorted(keys)[:6]}", do="correct lora_parameters' keys",
            )  # fmt: skip


def _key(layer: str) -> str:
    """A layer's name inside its block; its own outside of them."""
    inside = BLOCK.fullmatch(layer)
    return inside[1] if inside else layer


# --- writing ------------------------------------------------------------------------------------


def write(pem: PEM, folder: Path, *, dtype: str | None) -> None:
    """Write the module's config and weights into an existing folder, as mlx-lm loads them.

    Raises:
        UnsupportedModule: another kind, heads or parts saved whole, several ranks or scalings,
            stacked experts, or layers that mlx-lm's models call otherwise; by name.
    """
    config = pem.config
    if not isinstance(config, LoraConfig):
        raise _refused(pem, f"a module of kind {pem.kind}", "kind lora", "fold it (pem fold)")
    check_linear(pem)
    saved = sorted({n.removesuffix(".head") for n in pem.tensors if n.endswith(".head")})
    saved += [f"heads/{name}" for name in pem.heads]
    if saved:
        raise _refused(pem, ", ".join(saved), "factors of linear layers alone", ONE_OF_EACH)
    ranks = sorted({config.rank(n) for n in pem.layers})
    scalings = sorted({config.scaling(n) for n in pem.layers})
    if len(ranks) > 1 or len(scalings) > 1:
        found = f"ranks {ranks}" if len(ranks) > 1 else f"scalings {scalings}"
        raise _refused(pem, found, "one rank and one scaling for all layers", ONE_OF_EACH)
    for layer in pem.layers:
        if not (WRITTEN.fullmatch(layer) or layer in OUTPUTS):
            bare = layer.startswith("layers.") and not layer.endswith("]")
            raise _refused(
                pem, f"layer {layer}", "linear layers of blocks named model.layers.N, or lm_head",
                "name them so first (pem convert IN OUT --prefix model)" if bare
                else "fold it into its base (pem fold) and convert the whole model",
            )  # fmt: skip
    target = save_dtype(dtype)
    tensors = {
        f"{layer}{suffix}": cast(pem.tensors[f"{layer}.{role}"].mT, layer, target, pem.name)
        for layer in pem.layers
        for suffix, role in ROLES.items()
    }
    parameters = {
        "rank": ranks[0], "scale": scalings[0], "dropout": 0.0,
        "keys": sorted(set(map(_key, pem.layers))),
    }  # fmt: skip
    said = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}
    write_json(folder / CONFIG, {"model": pem.base.name, **said} if pem.base.name else said)
    write_tensors(folder / WEIGHTS, tensors)


def _refused(pem: PEM, found: str, expected: str, do: str) -> UnsupportedModule:
    error = UnsupportedModule.build(
        pem.name, "mlx-lm's layout cannot represent this module", found=found, expected=expected,
        do=do,
    )  # fmt: skip
    assert isinstance(error, UnsupportedModule)
    return error
