"""Rows in padded batches, and what a model gives for them.

Rows are sorted by length, so short rows make short batches; outputs come back in the order of the
rows. Padding is on the right and masked, so it changes a row's logits by rounding only.
Shape suffixes: n rows, k outputs; b rows of a batch, t tokens of its longest row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pem_composition import progress
from pem_composition.errors import DataError
from pem_composition.evaluation.encoded import EncodedDataset
from pem_composition.evaluation.sharding import is_sharded

# Rows per forward pass where none is given: on a CPU a larger batch pads more and gains nothing.
BATCH_ROWS = {"cpu": 16, "cuda": 64}


class Batch(NamedTuple):
    """Row numbers of a batch (b,) and its padded inputs, each (b, t)."""

    rows: list[int]
    inputs: dict[str, Tensor]


def by_device(sizes: Mapping[str, int], device: torch.device | str) -> int:
    """The size for a kind of device; one that has none of its own takes a GPU's."""
    return sizes.get(torch.device(device).type, sizes["cuda"])


def batches(
    data: EncodedDataset,
    *,
    batch_size: int | None = None,
    token_budget: int | None = None,
    pad_to: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Batch, ...]:
    """Padded batches, longest rows first (so that a lack of memory shows at once).

    Args:
        batch_size: most rows of a batch; None: 16 on a CPU, 64 on a GPU.
        token_budget: most tokens of a batch, padding included; a longer row has a batch of its own.
        pad_to: pad every batch to this many tokens, as ``--pad_to_max_length`` does.

    Raises:
        DataError: a batch size or a budget that is not positive.
    """
    if batch_size is None:
        batch_size = by_device(BATCH_ROWS, device)
    if batch_size < 1 or (token_budget is not None and token_budget < 1):
        raise DataError.build(
            "--per_device_eval_batch_size", "not a batch size", expected="at least 1",
            found=batch_size if batch_size < 1 else token_budget,
        )  # fmt: skip
    groups = _groups(data.lengths, batch_size, token_budget)
    return tuple(Batch(rows, _pad(data, rows, pad_to, device)) for rows in groups)


def collect(
    model: nn.Module,
    data: Sequence[Batch],
    forward: Callable[[nn.Module, dict[str, Tensor]], Tensor],
) -> tuple[list[int], NDArray[np.float32]]:
    """Row numbers (n,) and ``forward``'s outputs (n, k) in the order of the batches.

    In evaluation mode, without gradients; the model's mode is as before afterwards.

    Raises:
        DataError: no batches.
    """
    with evaluating(model) as device:
        shown = progress.over(data, "reading rows", "batches")
        parts = [as_array(forward(model, on_device(batch, device))) for batch in shown]
    return joined(data, parts)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients, and the mode as before afterwards; gives the device."""
    was_training = model.training
    model.eval()
    try:
        # weights gathered in inference mode could not be used for training afterwards
        with torch.no_grad() if is_sharded(model) else torch.inference_mode():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)


def on_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The batch's inputs where the model is."""
    return {name: tensor.to(device) for name, tensor in batch.inputs.items()}


def as_array(outputs: Tensor) -> NDArray[np.float32]:
    """Outputs (b, k) as they are kept."""
    return outputs.float().cpu().numpy()


def joined(
    data: Sequence[Batch], parts: Sequence[NDArray[np.float32]]
) -> tuple[list[int], NDArray[np.float32]]:
    """Row numbers (n,) and outputs (n, k) of batches.

    Raises:
        DataError: no batches.
    """
    if not parts:
        raise DataError.build("predict", "no batches", expected="at least one row")
    return [row for batch in data for row in batch.rows], np.concatenate(parts)


def in_order(rows: Sequence[int], outputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Outputs (n, k) of the row numbers (n,), which are 0 ... n - 1 in any order, by row number."""
    out = np.empty_like(outputs)
    out[list(rows)] = outputs
    return out


def _groups(lengths: Sequence[int], batch_size: int, budget: int | None) -> Iterator[list[int]]:
    """Row numbers by falling length, cut where the batch is full."""
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[group[0]] if group else 0
        if group and (
            len(group) == batch_size or (budget is not None and longest * (len(group) + 1) > budget)
        ):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _pad(
    data: EncodedDataset, rows: Sequence[int], pad_to: int | None, device: torch.device | str
) -> dict[str, Tensor]:
    width = max(pad_to or 0, *(len(data.inputs["input_ids"][i]) for i in rows))
    out = {}
    for name, column in data.inputs.items():
        padded_bt = torch.full((len(rows), width), data.padding[name], dtype=torch.long)
        for place, row in enumerate(rows):
            padded_bt[place, : len(column[row])] = torch.tensor(column[row])
        out[name] = padded_bt.to(device)
    return out
