"""Rows that a decoder reads: padded on the left, with cached keys and values.

Positions count a row's own tokens and the mask hides the padding, so a row's logits depend on
neither by more than rounding.

Shape suffixes: b rows, t tokens, v vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pem_composition.errors import UsageError


def padded_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and mask (b, t) of rows of different lengths.

    The filler is a row's own first token: a penalty for tokens that stand in a row meets no other.
    """
    width = max(map(len, rows))
    ids = [[row[0]] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class DecoderRows:
    """What a batch has read, and the logits (b, v) of what comes next.

    Raises:
        UsageError: a model whose cache is not of transformers.
    """

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> None:
        self.model = model
        self.cache: Any = None
        # Models of states alone (Mamba) call it otherwise, and mask only what they read first.
        self.states = "cache_params" in inspect.signature(model.forward).parameters
        self.name = "cache_params" if self.states else "past_key_values"
        ids_bt, self.mask_bt = padded_left(prompts, next(model.parameters()).device)
        positions_bt = (self.mask_bt.cumsum(dim=1) - 1).clamp(min=0)
        self.logits_bv = self._forward(ids_bt, positions_bt, last=1)[:, -1]

    def select(self, rows_n: Tensor) -> None:
        """Keep the rows of these numbers (n,); a number that occurs twice makes a copy."""
        self.cache.reorder_cache(rows_n)  # which layers with a state of their own know, too
        self.mask_bt = self.mask_bt[rows_n]

    def read(self, tokens_bt: Tensor) -> Tensor:
        """Append tokens (b, t) to every row; the logits (b, t, v) behind each of them."""
        t = tokens_bt.shape[1]
        if self.states and t > 1:  # which go from state to state by one token
            return torch.cat([self.read(tokens_bt[:, i : i + 1]) for i in range(t)], dim=1)
        new_bt = torch.ones_like(tokens_bt)
        positions_bt = self.mask_bt.sum(dim=1, keepdim=True) + new_bt.cumsum(dim=1) - 1
        self.mask_bt = torch.cat([self.mask_bt, new_bt], dim=1)
        logits_btv = self._forward(tokens_bt, positions_bt, last=t)
        self.logits_bv = logits_btv[:, -1]
        return logits_btv

    def _forward(self, ids_bt: Tensor, positions_bt: Tensor, *, last: int) -> Tensor:
        """Logits (b, last, v)."""
        out = self.model(
            input_ids=ids_bt,
            attention_mask=None if self.states and self.cache is not None else self.mask_bt,
            position_ids=positions_bt,
            use_cache=True,
            logits_to_keep=last,
            **{self.name: self.cache},
        )
        self.cache = getattr(out, self.name, None)
        if not hasattr(self.cache, "reorder_cache"):
            raise UsageError.build(
                type(self.model).__name__, "keeps what it has read in a form of its own",
                expected="a cache of transformers (past_key_values or cache_params)",
                do="write texts with another architecture",
            )  # fmt: skip
        logits: Tensor = out.logits[:, -last:]
        return logits
