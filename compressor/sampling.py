"""Order of the samples and noise of the gates, both functions of seeds alone.

Neither draws on a global random state, so a resumed run and a run over
several processes see exactly what a single uninterrupted process sees.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from mskip.compressor.objective import logistic_noise


class GroupedByLength(Sampler[int]):
    """Samples of like length in one batch, batches in random order.

    Padding costs as much as real tokens; on data with lengths from 40 to 250
    this halves a step. Which samples share a batch changes with the epoch.

    Args:
        lengths: tokens of each sample.
        batch_size: samples per batch.
        seed: with the epoch, decides the order.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of ``epoch``; the Trainer calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed}:{self.epoch}")
        # Lengths blurred by a tenth: neighbours change from epoch to epoch.
        blurred = [length * rng.uniform(0.9, 1.1) for length in self.lengths]
        order = sorted(range(len(blurred)), key=blurred.__getitem__)
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        # The short batch goes last: a shuffled one would break up every batch behind it.
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        rest = [batch for batch in batches if len(batch) < self.batch_size]
        rng.shuffle(whole)
        return iter([index for batch in whole + rest for index in batch])


def gate_noise(seed: int, samples: Tensor, routed: int) -> Tensor:
    """Logistic noise of each sample's gates, [batch, routed] float32.

    Args:
        seed: of the optimiser step.
        samples: number of each sample, [batch] int64.
        routed: number of routed sublayers.
    """
    rows = []
    for sample in samples.tolist():
        generator = torch.Generator().manual_seed((seed * 2_147_483_629 + sample) % 2**63)
        rows.append(logistic_noise(torch.empty(routed), generator))
    return torch.stack(rows)
