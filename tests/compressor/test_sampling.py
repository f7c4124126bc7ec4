"""Order and noise: functions of seeds, whatever else draws random numbers."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mskip.compressor.sampling import GroupedByLength, gate_noise

_RNG = random.Random(0)
LENGTHS = [_RNG.randint(10, 200) for _ in range(67)]


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 5),
)
def test_every_sample_once_and_the_short_batch_last(
    lengths: list[int], batch_size: int, seed: int, epoch: int
) -> None:
    sampler = GroupedByLength(lengths, batch_size, seed)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert len(sampler) == len(lengths)
    assert sorted(order) == list(range(len(lengths)))
    again = GroupedByLength(lengths, batch_size, seed)
    again.set_epoch(epoch)
    random.seed(seed + 1)
    torch.manual_seed(seed + 1)
    assert list(again) == order
    whole = len(lengths) // batch_size * batch_size
    for first in range(0, whole, batch_size):  # neighbours up to the blur of a tenth
        chosen = [lengths[i] for i in order[first : first + batch_size]]
        between = [n for n in lengths if min(chosen) * 1.25 < n < max(chosen) / 1.25]
        assert len(between) <= batch_size


@pytest.mark.parametrize(("seed", "epoch"), [(0, 1), (1, 0)])
def test_order_and_batches_change_with_seed_and_epoch(seed: int, epoch: int) -> None:
    def batches(seed: int, epoch: int) -> list[frozenset[int]]:
        sampler = GroupedByLength(LENGTHS, 8, seed)
        sampler.set_epoch(epoch)
        order = list(sampler)
        return [frozenset(order[i : i + 8]) for i in range(0, len(order), 8)]

    first, other = batches(0, 0), batches(seed, epoch)
    assert first != other
    assert set(first) != set(other)  # not only another order of the same batches


def test_batches_are_of_like_length_and_in_random_order() -> None:
    order = list(GroupedByLength(LENGTHS, 8, 0))
    batches = [[LENGTHS[i] for i in order[k : k + 8]] for k in range(0, 64, 8)]
    assert sum(max(batch) - min(batch) for batch in batches) < 8 * (190 / 3)
    longest = [max(batch) for batch in batches]
    assert longest != sorted(longest)


def test_noise_belongs_to_the_sample() -> None:
    """Batch-mates and their order change nothing."""
    whole = gate_noise(7, torch.arange(12), 5)
    assert whole.shape == (12, 5)
    assert whole.dtype == torch.float32
    chosen = torch.tensor([9, 2, 4])
    torch.manual_seed(3)
    assert torch.equal(gate_noise(7, chosen, 5), whole[chosen])
    assert len(whole.unique()) == 60


def test_noise_changes_with_the_step() -> None:
    one, other = (gate_noise(seed, torch.arange(500), 4) for seed in (7, 8))
    correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
    assert correlation.abs() < 0.1
    assert one.mean().abs() < 0.15


def test_noise_takes_large_seeds() -> None:
    largest = (2**32 - 1) * 1_000_003 + 10**6
    assert gate_noise(largest, torch.tensor([0]), 3).isfinite().all()
