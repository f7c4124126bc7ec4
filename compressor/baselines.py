"""Static removal: which sublayers matter, measured two ways.

The honest yardstick of routing is removing as many sublayers for good. Two
rules choose them: the paper's (cosine similarity of the residual stream before
and after the sublayer; LLM-Drop, arXiv 2406.15786) and the KL to the dense
model when that one sublayer is skipped, which is dearer and better.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mskip.compressor.encoding import Batch
from mskip.compressor.evaluation import Reference
from mskip.compressor.progress import Progress, silent
from mskip.compressor.router import prompt_mean
from mskip.compressor.routing import Execute, ForcedPass


@dataclass(frozen=True)
class Sensitivity:
    """How much each routed sublayer matters.

    Attributes:
        layers: decoder layer index of each routed sublayer.
        kl: KL to the dense model with only that sublayer skipped, nats per token.
        cosine: mean cosine similarity of the residual stream before and after it.
    """

    layers: list[int]
    kl: list[float]
    cosine: list[float]

    def kept_by_kl(self, count: int) -> list[int]:
        """Positions (0..routed-1) of the ``count`` sublayers to keep: highest KL first."""
        return sorted(sorted(range(len(self.kl)), key=lambda j: -self.kl[j])[:count])

    def kept_by_cosine(self, count: int) -> list[int]:
        """Positions of the ``count`` sublayers to keep: lowest similarity first."""
        return sorted(sorted(range(len(self.cosine)), key=lambda j: self.cosine[j])[:count])


def static_gates(kept: list[int], routed: int) -> Tensor:
    """Gates that execute exactly ``kept`` for every sequence, [1, routed] bool."""
    gates = torch.zeros(1, routed, dtype=torch.bool)
    gates[0, kept] = True
    return gates


def kept_count(capacity: float, routed: int) -> int:
    """How many sublayers the static baseline of a capacity keeps: rounded up, in its favour."""
    return math.ceil(capacity * routed - 1e-9)


def forced_to(gates: Tensor) -> Callable[[Batch], ForcedPass]:
    """A pass maker for `Reference.quality`: the same gates for every batch."""
    return lambda _: ForcedPass(gates)


class _CosinePass:
    """Executes everything and compares the residual stream before and after."""

    def __init__(self, reference: Reference, layers: list[int], mask: Tensor) -> None:
        self.sums = torch.zeros(len(layers))
        self.mask = mask.bool()
        self._residual: dict[int, Tensor] = {}
        family, model = reference.split.family, reference.split.model
        blocks = family.decoder_layers(model)
        self._hooks = [
            blocks[layer].register_forward_pre_hook(self._catcher(index))
            for index, layer in enumerate(layers)
        ]

    def _catcher(self, index: int) -> _Catcher:
        return _Catcher(self._residual, index)

    def __call__(self, index: int, hidden: Tensor, execute: Execute) -> Tensor:
        output = execute(None)
        before = self._residual[index][self.mask].float()
        after = before + output[self.mask].float()
        self.sums[index] = torch.cosine_similarity(before, after, dim=-1).sum().cpu()
        return output

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


class _Catcher:
    def __init__(self, store: dict[int, Tensor], index: int) -> None:
        self.store, self.index = store, index

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.store[self.index] = args[0]


@torch.no_grad()
def measure_sensitivity(
    reference: Reference, layers: list[int], progress: Progress = silent
) -> Sensitivity:
    """Skip each routed sublayer alone, and compare its input and output.

    Args:
        reference: samples of a patched model.
        layers: decoder layer index of each routed sublayer.
        progress: one unit a sublayer.
    """
    routed = len(layers)
    cosine, positions = torch.zeros(routed), 0
    for batch, stem in reference.batches:
        watch = _CosinePass(reference, layers, batch["attention_mask"])
        try:
            reference.split.finish(stem, watch)
        finally:
            watch.close()
        cosine += watch.sums
        positions += int(batch["attention_mask"].sum())
    divergence = []
    for index in range(routed):
        others = static_gates([j for j in range(routed) if j != index], routed)
        gates = others.to(reference.split.model.device)
        divergence.append(reference.quality(forced_to(gates)).kl)
        progress("sensitivity", index + 1, routed)
    return Sensitivity(list(layers), divergence, (cosine / positions).tolist())


class _MeanPass:
    """Executes everything and records the routers' inputs."""

    def __init__(self, prompt_mask: Tensor) -> None:
        self.prompt_mask = prompt_mask
        self.means: list[Tensor] = []

    def __call__(self, index: int, hidden: Tensor, execute: Execute) -> Tensor:
        self.means.append(prompt_mean(hidden, self.prompt_mask))
        return execute(None)


@torch.no_grad()
def router_inputs(reference: Reference) -> Tensor:
    """Prompt means that the routers see in the dense model, [samples, routed, hidden] float32."""
    rows = []
    for batch, stem in reference.batches:
        watch = _MeanPass(batch["prompt_mask"])
        reference.split.finish(stem, watch)
        rows.append(torch.stack(watch.means, dim=1))
    return torch.cat(rows)
