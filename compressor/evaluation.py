"""Quality: how far a routed or pruned model is from the dense one, on answers.

Everything is measured from one `Reference`: the residual stream below the
first routed layer and the dense model's final hidden states, computed once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mskip.compressor.encoding import Batch, Sample
from mskip.compressor.models import BaseModel
from mskip.compressor.objective import kl_to_dense, next_token_loss
from mskip.compressor.progress import Progress, silent
from mskip.compressor.routing import Pass
from mskip.compressor.rowwise import over_rows
from mskip.compressor.samples import batches_of
from mskip.compressor.segments import SplitModel, Stem


@dataclass(frozen=True)
class Quality:
    """Measured on the answer tokens.

    Attributes:
        kl: mean KL(dense || model), nats per token.
        perplexity: exp of the mean cross entropy of the answers' own tokens.
        tokens: how many tokens were scored.
    """

    kl: float
    perplexity: float
    tokens: int


@dataclass(frozen=True)
class PerSample:
    """Sums over the answer tokens of every sample.

    Attributes:
        kl: KL(dense || model), nats, [samples] float64.
        loss: cross entropy of the answers' own tokens, nats, [samples] float64.
        tokens: how many tokens were scored, [samples] int64.
    """

    kl: Tensor
    loss: Tensor
    tokens: Tensor

    def quality(self) -> Quality:
        """Means over all tokens."""
        tokens = int(self.tokens.sum())
        return Quality(
            float(self.kl.sum()) / tokens, math.exp(float(self.loss.sum()) / tokens), tokens
        )


@dataclass(frozen=True)
class _Part:
    batch: Batch
    stem: Stem
    dense: Tensor  # final hidden states at the answer positions, [tokens, hidden]
    targets: Tensor  # [tokens]


def answer_targets(batch: Batch) -> Tensor:
    """The answer tokens, [tokens] int64, in the order in which ``answer_mask`` selects them."""
    following = batch["input_ids"].roll(-1, dims=1)
    return following[batch["answer_mask"]]


class Reference:
    """Samples with everything that does not depend on the routing.

    Args:
        base: the dense model; must be patched while a pass is measured.
        first_routed: the first routed decoder layer.
        samples: with answers.
        batch_size: samples per forward pass.
        progress: shows the dense forward passes.
    """

    def __init__(
        self,
        base: BaseModel,
        first_routed: int,
        samples: list[Sample],
        batch_size: int = 8,
        progress: Progress = silent,
    ) -> None:
        self.split = SplitModel(base.model, first_routed)
        self.samples = samples
        self._parts: list[_Part] = []
        batches = batches_of(samples, base, batch_size)
        with torch.no_grad():
            for done, batch in enumerate(batches, 1):
                stem = self.split.stem(
                    batch["input_ids"], batch["attention_mask"], batch["position_ids"]
                )
                dense = self.split.finish(stem)[batch["answer_mask"]]
                self._parts.append(_Part(batch, stem, dense, answer_targets(batch)))
                progress("dense reference", done, len(batches))

    @property
    def batches(self) -> list[tuple[Batch, Stem]]:
        """Batches with the residual stream at the first routed layer."""
        return [(part.batch, part.stem) for part in self._parts]

    @torch.no_grad()
    def beyond(self, layer: int, make_pass: Callable[[Batch], Pass]) -> Reference:
        """The same reference from decoder layer ``layer`` on, with what a pass does below it done.

        What is measured there costs only the layers from there on.
        """
        other = copy.copy(self)
        other.split = self.split.cut_at(layer)
        other._parts = [
            replace(part, stem=self.split.advance(part.stem, layer, make_pass(part.batch)))
            for part in self._parts
        ]
        return other

    def quality(self, make_pass: Callable[[Batch], Pass | None]) -> Quality:
        """Measure the model as routed by ``make_pass(batch)``; None is the dense model."""
        return self.per_sample(make_pass).quality()

    def per_sample(self, make_pass: Callable[[Batch], Pass | None]) -> PerSample:
        """The same sample by sample, in the order of this reference's batches."""
        kl, sample, loss = self.per_token(make_pass)
        count = sum(len(part.batch["answer_mask"]) for part in self._parts)
        sums = torch.zeros(2, count, dtype=torch.float64)
        sums.index_add_(1, sample, torch.stack([kl, loss]))
        return PerSample(sums[0], sums[1], torch.bincount(sample, minlength=count))

    @torch.no_grad()
    def per_token(self, make_pass: Callable[[Batch], Pass | None]) -> tuple[Tensor, Tensor, Tensor]:
        """The same token by token: KL, number of the sample, cross entropy, [tokens] each."""
        values, numbers, before = [], [], 0
        for part in self._parts:
            routing = make_pass(part.batch)
            hidden = part.dense
            mask = part.batch["answer_mask"]
            if routing is not None:
                hidden = self.split.finish(part.stem, routing)[mask]
            values.append(self._values(hidden, part).double().cpu())
            numbers.append(mask.nonzero()[:, 0].cpu() + before)
            before += len(mask)
        kl, loss = torch.cat(values).unbind(1)
        return kl, torch.cat(numbers), loss

    def _values(self, hidden: Tensor, part: _Part) -> Tensor:
        """KL and cross entropy of every answer token, [tokens, 2]; one head for both."""

        def both(logits: Tensor, rows: slice) -> Tensor:
            kl = kl_to_dense(logits, self.split.logits(part.dense[rows]))
            return torch.stack([kl, next_token_loss(logits, part.targets[rows])], dim=1)

        return over_rows(hidden, self.split.logits, both)
