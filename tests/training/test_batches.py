"""The global batches depend on seed, epoch and size only."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples

from pem_composition.evaluation.encoded import EncodedDataset
from pem_composition.objectives.losses import cross_entropy, squared_error
from pem_composition.training.batches import IGNORED, EpochLoader, Examples, GlobalBatches, Padding


@examples(50)
@given(
    rows=st.integers(1, 60),
    size=st.integers(1, 17),
    world=st.integers(1, 4),
    epoch=st.integers(0, 3),
    grouped=st.booleans(),
)
def test_processes_share_out_the_batches_of_one_process(rows, size, world, epoch, grouped):
    lengths = [(7 * i) % 11 for i in range(rows)] if grouped else None

    def share(rank, processes):
        batches = GlobalBatches(rows, size, seed=5, rank=rank, world=processes, lengths=lengths)
        batches.set_epoch(epoch)
        return list(batches)

    whole, shares = share(0, 1), [share(rank, world) for rank in range(world)]
    assert sorted(i for batch in whole for i in batch) == list(range(rows))
    assert len(whole) == len(GlobalBatches(rows, size, seed=5)) == len(shares[0])
    for step, batch in enumerate(whole):
        parts = [s[step] for s in shares]
        assert len({len(part) for part in parts}) == 1
        assert sorted(i for part in parts for i in part if i >= 0) == sorted(batch)


def test_each_epoch_and_seed_has_its_own_order_and_no_global_random_number_is_drawn():
    before = torch.get_rng_state()
    batches = GlobalBatches(50, 50, seed=0)
    first = list(batches)
    batches.set_epoch(1)
    assert list(batches) != first != list(GlobalBatches(50, 50, seed=1))
    data = EncodedDataset(
        {"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1], [1]]},
        (0, 1),
        {"input_ids": 9, "attention_mask": 0},
    )
    loader = EpochLoader(Examples(data), GlobalBatches(2, 2, seed=0), Padding(data.padding), 0)
    (batch,) = list(loader)
    assert sorted(batch["input_ids"].tolist()) == [[1, 2], [3, 9]]
    assert torch.equal(torch.get_rng_state(), before)


def test_grouping_by_length_saves_padding():
    lengths = [i % 40 + 1 for i in range(400)]

    def padded(batches):
        return sum(len(b) * max(lengths[i] for i in b) for b in batches)

    assert padded(GlobalBatches(400, 16, seed=0, lengths=lengths)) < 0.6 * padded(
        GlobalBatches(400, 16, seed=0)
    )


def test_filler_rows_carry_no_loss_and_fixed_padding_is_fixed():
    data = EncodedDataset({"input_ids": [[1, 2], [3]]}, (1.5, 2.5), {"input_ids": 0})
    examples = Examples(data)
    assert examples[1]["labels"] == 2.5 and examples[-2]["labels"] == float(IGNORED)
    assert examples[-2]["input_ids"] == examples[1]["input_ids"]
    assert Padding(data.padding, 6)([examples[0], examples[-2]])["input_ids"].shape == (2, 6)


def test_losses_are_means_over_the_real_rows_of_the_global_batch():
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, 1, 1, 0, 2])
    torch.testing.assert_close(
        cross_entropy({"logits": logits}, labels),
        torch.nn.functional.cross_entropy(logits, labels),
    )
    parts = [cross_entropy({"logits": logits[s]}, labels[s], 6) for s in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(sum(parts), torch.nn.functional.cross_entropy(logits, labels))
    filled = torch.tensor([0, 2, 1, IGNORED, IGNORED, IGNORED])
    torch.testing.assert_close(
        cross_entropy({"logits": logits}, filled),
        torch.nn.functional.cross_entropy(logits[:3], labels[:3]),
    )
    scores = torch.tensor([0.5, 1.0, 2.0, -100.0, -100.0, -100.0])
    torch.testing.assert_close(
        squared_error({"logits": logits[:, :1]}, scores),
        torch.nn.functional.mse_loss(logits[:3, 0], scores[:3]),
    )
