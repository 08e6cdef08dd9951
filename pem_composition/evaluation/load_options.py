"""How a large decoder's weights are held: quantised by bitsandbytes, in half precision, spread out.

8 bits: LLM.int8() (arXiv:2208.07339). 4 bits: NF4, quantised twice, as in QLoRA (arXiv:2305.14314).
A module stays in float32 on any of them; it is attached, as quantised weights cannot be changed.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from pem_composition.errors import UsageError, install, installed

if TYPE_CHECKING:
    from torch import nn


class LoadOptions(NamedTuple):
    """What ``from_pretrained`` is told about the weights.

    Attributes:
        bits: 8 or 4; None as they are.
        dtype: of what is not quantised; None: float32.
        device_map: auto, or a device; None: on the CPU (quantised: where the quantiser says).
    """

    bits: int | None = None
    dtype: str | None = None
    device_map: str | None = None

    @property
    def placed(self) -> bool:
        """True where the model must not be moved after loading."""
        return self.bits is not None or self.device_map is not None

    def keywords(self) -> dict[str, Any]:
        """Keywords for ``from_pretrained``, the dtype aside.

        Raises:
            UsageError: quantisation without bitsandbytes.
        """
        options: dict[str, Any] = {"device_map": self.device_map} if self.device_map else {}
        if self.bits is None:
            return options
        options = options or self._own_device()
        if not installed("bitsandbytes"):
            raise UsageError.build(
                f"--load_in_{self.bits}bit", "the package bitsandbytes is not installed",
                do=install("bitsandbytes"),
            )  # fmt: skip
        from transformers import BitsAndBytesConfig

        if self.bits == 8:
            return {**options, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
        four = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self.dtype or "float32",
        )
        return {**options, "quantization_config": four}

    def _own_device(self) -> dict[str, Any]:
        """A quantised model cannot be moved: each process of a launch loads it onto its own GPU."""
        import torch

        if not torch.cuda.is_available():
            return {}
        return {"device_map": {"": int(os.environ.get("LOCAL_RANK") or 0)}}


AS_IT_IS = LoadOptions()
REPACKS = "support_avx512bf16_for_cpu"  # attribute of bitsandbytes' 4-bit layers


def keep_gradients(model: nn.Module) -> None:
    """Keep 4-bit layers on a CPU from repacking their weights at the first pass without gradients.

    With AVX512-BF16 bitsandbytes (0.50) does so for a kernel that has no gradient, and never turns
    back: training went on after an evaluation, and changed nothing.
    """
    for layer in model.modules():
        if hasattr(layer, REPACKS):
            setattr(layer, REPACKS, False)
