"""How a large decoder's weights are held: quantised by bitsandbytes, in half precision, spread out.

8 bits: LLM.int8() (arXiv:2208.07339). 4 bits: NF4, quantised twice, as in QLoRA (arXiv:2305.14314).
A module stays in float32 on any of them; it is attached, as quantised weights cannot be changed.
"""

from __future__ import annotations

from typing import NamedTuple


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


class Shards(NamedTuple):
    """A base of which every process of a launch holds a part; see ``evaluation/sharding.py``.

    Attributes:
        dtype: of the weights; None: float32.
    """

    processes: int
    dtype: str | None = None


AS_IT_IS = LoadOptions()
