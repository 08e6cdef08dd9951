"""Random numbers by place: the same for every block size, order of layers, machine and release.

SplitMix64 (Steele, Lea and Flood 2014) as a function of a counter: number i of a stream is the
mixed value of key + (i + 1) * gamma. A stream's key is a hash of the seed and what it is for.

Shape suffix: N numbers.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


@dataclass(frozen=True)
class Draws:
    """The random numbers of one layer, in streams (one per module)."""

    seed: int
    layer: str

    def uniform(self, stream: int | str, start: int, count: int) -> Tensor:
        """Numbers start to start + count of a stream: float64 in [0, 1), multiples of 2^-53."""
        text = json.dumps([self.seed, self.layer, stream])
        key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        return _right(splitmix64(key, start, count), 11).double() * 2.0**-53


def splitmix64(key: int, start: int, count: int) -> Tensor:
    """Outputs start to start + count of the generator seeded with key, as int64 bit patterns."""
    place = torch.arange(start + 1, start + count + 1, dtype=torch.int64)
    z = place * _signed(GAMMA) + _signed(key)
    for shift, factor in MIX:
        z = (z ^ _right(z, shift)) * _signed(factor)
    return torch.bitwise_xor(z, _right(z, 31))


def _signed(value: int) -> int:
    """The 64-bit pattern as torch's int64, in which multiplication wraps."""
    return value - 2**64 if value >= 2**63 else value


def _right(z_N: Tensor, shift: int) -> Tensor:
    """Logical shift: int64's own copies the sign bit."""
    return torch.bitwise_and(z_N >> shift, 2 ** (64 - shift) - 1)
