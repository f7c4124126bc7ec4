"""Dense activations of the tuning samples, kept between epochs within a budget.

What lies below the first routed layer, and what the dense model makes of it,
never changes while routers are tuned. Keeping both for a sample saves more
than half of a step's work from the second epoch on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mskip.compressor.encoding import Batch, Sample
from mskip.compressor.segments import SplitModel, Stem


class StemStore:
    """Per-sample store of the stem and of the dense model's final hidden states.

    Args:
        split: the model, cut before the first routed layer.
        samples: the tuning samples.
        budget: bytes that may be held; samples beyond it are computed each time.
        kept_of_dense: what is kept of the dense model's final hidden states, [answers, hidden]
            to [answers, n]; None where they are not wanted, which saves the upper half of a
            forward pass.
    """

    def __init__(
        self,
        split: SplitModel,
        samples: list[Sample],
        budget: int,
        *,
        kept_of_dense: Callable[[Tensor], Tensor] | None = lambda hidden: hidden,
    ) -> None:
        self.split = split
        self.samples = samples
        self.budget = budget
        self.kept_of_dense = kept_of_dense
        self.used = 0
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def get(self, batch: Batch, index: Tensor) -> tuple[Stem, Tensor]:
        """Stem of a right-padded batch and what is kept of the dense model at its answers.

        Args:
            batch: with ``input_ids``, ``attention_mask``, ``position_ids``, ``answer_mask``.
            index: number of each sample, [batch] int64.

        Returns:
            The stem and [answer tokens, n], in the order ``answer_mask`` selects; n is 0 where
            the dense model is not wanted.
        """
        numbers = index.tolist()
        inputs = batch["input_ids"], batch["attention_mask"], batch["position_ids"]
        if not all(number in self._kept for number in numbers):
            stem = self.split.stem(*inputs)
            answers = batch["answer_mask"]
            dense = stem.hidden.new_empty(int(answers.sum()), 0)
            if self.kept_of_dense is not None:
                dense = self.kept_of_dense(self.split.finish(stem)[answers])
            self._keep(numbers, stem.hidden, dense, batch["answer_mask"])
            return stem, dense
        arguments = self.split.layer_arguments(*inputs)
        rows = [self._kept[number] for number in numbers]
        width = batch["input_ids"].shape[1]
        first = rows[0][0]
        hidden = first.new_zeros(len(rows), width, first.shape[1])
        for row, (kept, _) in enumerate(rows):
            hidden[row, : len(kept)] = kept
        return Stem(hidden, arguments), torch.cat([dense for _, dense in rows])

    def _keep(self, numbers: list[int], hidden: Tensor, dense: Tensor, answers: Tensor) -> None:
        parts = torch.split(dense, answers.sum(1).tolist())
        for row, number in enumerate(numbers):
            length = len(self.samples[number].input_ids)
            size = (length * hidden.shape[-1] + parts[row].numel()) * hidden.element_size()
            if number in self._kept or self.used + size > self.budget:
                continue
            self._kept[number] = hidden[row, :length].clone(), parts[row].clone()
            self.used += size
