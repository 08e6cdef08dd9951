"""A LoRA module in the form that vLLM serves: one rank, one scaling, adapter factors alone.

vLLM reads PEFT's layout, but takes one rank and one scaling from its config (``r``, ``lora_alpha``,
``use_rslora``) and knows no patterns of them. It refuses ``modules_to_save``. Source:
vllm/lora/peft_helper.py and vllm/config/lora.py of vLLM 0.26.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pem_composition.arithmetic.compatible import check_linear
from pem_composition.config import IN_BASE, LoraConfig, expert_of
from pem_composition.errors import UnsupportedModule

if TYPE_CHECKING:
    from torch import Tensor

    from pem_composition.module import PEM

VLLM = "vllm"  # the layout's name
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
# A model that is served writes text; of other tasks PEFT would expect the head that is not there.
TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def for_vllm(module: PEM, *, drop_saved: bool = False) -> PEM:
    """The module with dW = B A in every layer, up to the rounding of the new B.

    Factors of a smaller rank get zeros up to the largest one, and B is multiplied by the layer's
    scaling. A module with one rank and one scaling keeps its factors bit for bit.

    Args:
        drop_saved: leave out heads and parts that are saved whole, which vLLM does not load.

    Raises:
        UnsupportedModule: no LoRA module; one with such parts, unless they are to be dropped; a
            rank that vLLM does not take.
    """
    config = module.config
    if not isinstance(config, LoraConfig):
        raise UnsupportedModule.build(
            module.name, f"vLLM serves LoRA modules, not those of kind {module.kind}",
            do="fold it into its base (pem fold) and serve the whole model",
        )  # fmt: skip
    check_linear(module)
    if any(map(expert_of, module.layers)):
        raise UnsupportedModule.build(
            module.name, "holds updates of stacked experts, which vLLM stores in another way",
            do="fold it into its base (pem fold) and serve the whole model",
        )  # fmt: skip
    saved = sorted({n.removesuffix(".head") for n in module.tensors if n.endswith(".head")})
    saved += [f"heads/{name}" for name in module.heads]
    if saved and not drop_saved:
        raise UnsupportedModule.build(
            module.name, "holds parts that vLLM does not load", found=", ".join(saved),
            do="leave them out (pem convert IN OUT --format vllm --drop_saved), or fold the module "
            "into its base (pem fold)",
        )  # fmt: skip
    ranks = {layer: config.rank(layer) for layer in module.layers}
    rank = max(ranks.values())
    max_lora_rank(rank, module.name)
    extra = {k: v for k, v in config.extra.items() if k not in ("modules_to_save", IN_BASE)}
    if extra.get("task_type") not in TASKS:
        extra.pop("task_type", None)
    tensors = dict(module.adapter_tensors())
    alike = len({(r, config.scaling(layer)) for layer, r in ranks.items()}) == 1
    if alike:
        first = module.layers[0]
        config = replace(config, r=rank, alpha=config.alpha_of(first))
    else:
        for layer in module.layers:
            A, B = (tensors[f"{layer}.lora_{side}"] for side in "AB")
            missing = rank - ranks[layer]
            tensors[f"{layer}.lora_A"] = _padded(A, missing, 0)
            tensors[f"{layer}.lora_B"] = _padded(B * config.scaling(layer), missing, 1)
        config = replace(config, r=rank, alpha=float(rank), use_rslora=False)
    config = replace(config, rank_pattern={}, alpha_pattern={}, extra=extra)
    notes = module.provenance.notes
    if saved:
        notes = (*notes, f"left out for vLLM: {', '.join(saved)}")
    provenance = replace(module.provenance, notes=notes)
    return replace(
        module, tensors=tensors, config=config, head=None, heads={}, provenance=provenance,
        operands=(),
    )  # fmt: skip


def max_lora_rank(rank: int, name: str) -> int:
    """The smallest ``--max-lora-rank`` of vLLM that takes a module of this rank.

    Raises:
        UnsupportedModule: none does.

    Examples:
        >>> max_lora_rank(12, "m")
        16
    """
    for allowed in MAX_LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise UnsupportedModule.build(
        name, "of a rank that vLLM does not serve", found=f"rank {rank}",
        expected=f"at most {MAX_LORA_RANKS[-1]}",
        do="truncate it (merge.py --space delta --rank R)",
    )  # fmt: skip


def _padded(factor: Tensor, missing: int, axis: int) -> Tensor:
    """The factor with ``missing`` rows (axis 0) or columns (axis 1) of zeros after its own."""
    import torch

    shape = list(factor.shape)
    shape[axis] = missing
    return torch.cat([factor, factor.new_zeros(shape)], axis)
