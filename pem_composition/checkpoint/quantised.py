"""Quantised models are refused by name: codes have no sum, and scales none without their codes.

FP8 with or without scales, GPTQ and AWQ, bitsandbytes, compressed-tensors, MXFP4, ModelOpt and MLX
are told by what config.json states and by the tensors themselves, since either can be missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pem_composition.checkpoint.content import MODEL_CONFIG
from pem_composition.checkpoint.files import FLOAT_DTYPES, TensorInfo
from pem_composition.errors import CheckpointError

STATED = ("quantization_config", "compression_config", "quantization")
# Codes, scales and offsets, by the last components of their names.
PARTS = re.compile(
    r"(^|\.)(qweight|qzeros|g_idx|SCB|weight_format|absmax|quant_map|nested_absmax|nested_quant_map"
    r"|quant_state\..+|weight_(packed|scale|scale_inv|scale_2|zero_point|g_idx|shape)"
    r"|(input|output|activation)_scale|(input|output)_zero_point|\w+_blocks|\w+_scale_inv)$"
)
BYTES = ("I8", "U8")
DO = "give the model as it was before, or written by transformers' model.dequantize()"


def refuse(folder: Path, config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> None:
    """Refuse a quantised model, naming what says so.

    Raises:
        CheckpointError: it is one.
    """
    for key, value in _stated(config):
        found = value.get("quant_method") if isinstance(value, Mapping) else value
        raise CheckpointError.build(
            folder / MODEL_CONFIG,
            f"a quantised model ({key})",
            found=found or "codes instead of numbers",
            expected="floating point weights",
            do=DO,
        )
    for name, info in infos.items():
        if is_code(name, info):
            raise CheckpointError.build(
                folder,
                f"tensor {name!r} is a part of a quantised weight",
                found=f"{info.dtype} {info.shape}",
                expected="floating point weights",
                do=DO,
            )


def is_code(name: str, info: TensorInfo) -> bool:
    """True for codes of weights, and what only has a meaning beside them."""
    if info.dtype.startswith("F8") or PARTS.search(name):
        return True
    matrix = len(info.shape) > 1
    packed = info.dtype not in FLOAT_DTYPES and name.rpartition(".")[2] == "weight"
    return matrix and (info.dtype in BYTES or packed)


def _stated(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Statements of a configuration and of those inside it (text_config, ...)."""
    for part in (config, *(v for v in config.values() if isinstance(v, Mapping))):
        yield from ((key, part[key]) for key in STATED if part.get(key))
