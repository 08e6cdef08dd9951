"""Examples in memory, and the order in which training visits them.

The global batches depend on seed, epoch and global batch size only, not on the number of processes;
nothing here draws from the global random generators, so a resumed run sees the same dropout masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pem_composition.evaluation.encoded import IGNORED, EncodedDataset

DECODER = "decoder_input_ids"
DECODER_COLUMNS = (DECODER, "labels")  # as long as the targets, not as an encoder's inputs
MEGA_BATCH = (
    50  # batches sorted together by length: enough to group, few enough to keep the order random
)


class Examples(Dataset[dict[str, Any]]):
    """Tokenised rows with labels. Index -1 - i is row i as filler: its labels are IGNORED."""

    def __init__(self, data: EncodedDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= 0:
            return self.data[index]
        row = self.data[-1 - index]
        given = row["labels"]
        ignored = [IGNORED] * len(given) if isinstance(given, list) else type(given)(IGNORED)
        return {**row, "labels": ignored}


@dataclass(frozen=True)
class Padding:
    """Collates examples into tensors (batch, tokens), padded to the longest or a fixed length.

    Labels are one number per row, (batch,), or targets, (batch, tokens): of their own length for a
    decoder beside an encoder, else as long as the inputs.
    """

    values: Mapping[str, int]  # name of an input -> its filler
    length: int | None = None  # tokens of an input; None pads to the longest row of the batch

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        fillers = {n: f for n, f in self.values.items() if n in examples[0]}
        if isinstance(examples[0]["labels"], list):
            fillers["labels"] = IGNORED
        apart = DECODER_COLUMNS if DECODER in examples[0] else ()
        batch = {
            n: self._column([e[n] for e in examples], f, None if n in apart else self.length)
            for n, f in fillers.items()
        }
        if "labels" not in batch:
            batch["labels"] = torch.tensor([e["labels"] for e in examples])
        return batch

    def _column(self, rows: Sequence[list[int]], filler: int, fixed: int | None) -> Tensor:
        width = max(fixed or 0, *map(len, rows))
        return torch.tensor([row + [filler] * (width - len(row)) for row in rows])


class GlobalBatches:
    """Row numbers of this process's share of each global batch.

    An incomplete last batch is kept. Where it does not divide by the number of processes, the
    shares are filled up with ignored rows, so that the loss stays the mean over the real rows.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.rows = rows
        self.batch_size = batch_size  # over all processes
        self.seed = seed
        self.rank, self.world = rank, world
        self.lengths = lengths
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.rows // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._global():
            filler = [-1 - batch[0]] * (-len(batch) % self.world)
            yield (batch + filler)[self.rank :: self.world]

    def _global(self) -> list[list[int]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(self.rows, generator=generator).tolist()
        if self.lengths is None:
            return [order[i : i + self.batch_size] for i in range(0, self.rows, self.batch_size)]
        batches = self._grouped(order, self.lengths)
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def _grouped(self, order: list[int], lengths: Sequence[int]) -> list[list[int]]:
        mega = self.batch_size * MEGA_BATCH
        chunks = [
            sorted(order[i : i + mega], key=lengths.__getitem__) for i in range(0, self.rows, mega)
        ]
        return [
            c[i : i + self.batch_size] for c in chunks for i in range(0, len(c), self.batch_size)
        ]


class EpochLoader(DataLoader[dict[str, Any]]):
    """Passes the epoch on to its batches and leaves the global random state alone."""

    def __init__(
        self, examples: Examples, batches: GlobalBatches, collate: Padding, workers: int
    ) -> None:
        super().__init__(
            examples,
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=collate,
            num_workers=workers,
            generator=torch.Generator(),
            pin_memory=torch.cuda.is_available(),
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
