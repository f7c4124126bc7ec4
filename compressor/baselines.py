"""Static removal: which sublayers matter, measured three ways.

The honest yardstick of routing is removing as many sublayers for good. Three
rules choose them: the paper's (cosine similarity of the residual stream before
and after the sublayer; LLM-Drop, arXiv 2406.15786), the KL to the dense model
when that one sublayer is skipped, and greedy, which after each removal measures
again. Each is dearer than the one before, and as a rule better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mskip.compressor.encoding import Batch
from mskip.compressor.evaluation import Reference
from mskip.compressor.progress import Progress, silent
from mskip.compressor.router import prompt_mean
from mskip.compressor.routing import Call, ForcedPass
from mskip.compressor.sublayers import Sublayers, Unit, as_sublayers

TOKENS = 8
"""Tokens of a prompt from which the inputs of routers are known before tuning."""


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

    def order_by_kl(self) -> list[int]:
        """Positions (0..routed-1) in the order of removal: lowest KL first."""
        return sorted(range(len(self.kl)), key=lambda j: self.kl[j])

    def order_by_cosine(self) -> list[int]:
        """Positions in the order of removal: highest similarity first."""
        return sorted(range(len(self.cosine)), key=lambda j: -self.cosine[j])

    def least(self, count: int, always: Collection[int] = ()) -> Sensitivity:
        """``count`` sublayers in the order of their layers: ``always``, then those of lowest KL."""
        order = sorted(self.order_by_kl(), key=lambda j: self.layers[j] not in always)
        kept = sorted(order[: max(count, len(always))])
        return Sensitivity(
            [self.layers[j] for j in kept],
            [self.kl[j] for j in kept],
            [self.cosine[j] for j in kept],
        )


def kept_of(order: list[int], count: int) -> list[int]:
    """The ``count`` positions that an order of removal reaches last, ascending."""
    return sorted(order[len(order) - count :])


def static_gates(kept: list[int], routed: int) -> Tensor:
    """Gates that execute exactly ``kept`` for every sequence, [1, routed] bool."""
    gates = torch.zeros(1, routed, dtype=torch.bool)
    gates[0, kept] = True
    return gates


def kept_count(capacity: float, routed: int) -> int:
    """How many sublayers the static baseline of a capacity keeps: rounded up, in its favour.

    A millionth less is the same capacity: 0.724138, as tables print it, is 21 of 29.
    """
    return math.ceil((capacity - 1e-6) * routed)


def forced_to(gates: Tensor) -> Callable[[Batch], ForcedPass]:
    """A pass maker for `Reference.quality`: the same gates for every batch."""
    return lambda _: ForcedPass(gates)


class _CosinePass:
    """Executes everything and compares the residual stream before and after."""

    def __init__(self, reference: Reference, sublayers: Sublayers, mask: Tensor) -> None:
        self.sums = torch.zeros(len(sublayers))
        self.mask = mask.bool()
        self.adds = sublayers.granularity != "block"
        self._residual: dict[int, Tensor] = {}
        family, model = reference.split.family, reference.split.model
        self.factor = family.residual_factor_of(model)
        norms = [family.norm_of(model, layer, sublayers.granularity) for layer in sublayers.layers]
        self._hooks = [
            norm.register_forward_pre_hook(_Catcher(self._residual, index))
            for index, norm in enumerate(norms)
            if norm is not None
        ]

    def __call__(self, call: Call) -> Tensor:
        output = call.execute(None)
        # Where no norm stands before it, the sublayer is given the residual stream itself.
        before = self._residual.get(call.index, call.hidden)[self.mask].float()
        after = output[self.mask].float()
        if self.adds:
            after = before + self.factor * after
        self.sums[call.index] = torch.cosine_similarity(before, after, dim=-1).sum().cpu()
        return output

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


class _Catcher:
    """Keeps the input of a norm, which is the residual stream before its sublayer."""

    def __init__(self, store: dict[int, Tensor], index: int) -> None:
        self.store, self.index = store, index

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.store[self.index] = args[0]


@torch.no_grad()
def measure_sensitivity(
    reference: Reference, sublayers: Sublayers | list[int], progress: Progress = silent
) -> Sensitivity:
    """Skip each routed sublayer alone, and compare its input and output.

    Args:
        reference: samples of a patched model.
        sublayers: what is routed; a bare list of layers means their attention.
        progress: one unit a sublayer.
    """
    sublayers = as_sublayers(sublayers)
    routed = len(sublayers)
    cosine, positions = torch.zeros(routed), 0
    for batch, stem in reference.batches:
        watch = _CosinePass(reference, sublayers, batch["attention_mask"])
        try:
            reference.split.finish(stem, watch)
        finally:
            watch.close()
        cosine += watch.sums
        positions += int(batch["attention_mask"].sum())
    divergence, at = [], reference
    for index, layer in enumerate(sublayers.layers):
        # What lies below is the dense model for all that follow: it runs once.
        at = at.beyond(layer, forced_to(_without(set(), routed, reference)))
        divergence.append(at.quality(forced_to(_without({index}, routed, reference))).kl)
        progress("sensitivity", index + 1, routed)
    return Sensitivity(list(sublayers.layers), divergence, (cosine / positions).tolist())


def _without(gone: set[int], routed: int, reference: Reference) -> Tensor:
    gates = static_gates([j for j in range(routed) if j not in gone], routed)
    return gates.to(reference.split.model.device)


class _Removals:
    """What a further removal costs, given those made; layers below it do not run again.

    Holds the residual stream at every layer that was tried, as long as what lies below it
    stands.

    Args:
        reference: samples of a patched model.
        layers: decoder layer index of each routed sublayer, ascending.
    """

    def __init__(self, reference: Reference, layers: list[int]) -> None:
        self.layers = layers
        self.gone: set[int] = set()
        self._at = {
            0: reference.beyond(layers[0], forced_to(_without(set(), len(layers), reference)))
        }

    def _pass(self, gone: set[int]) -> Callable[[Batch], ForcedPass]:
        return forced_to(_without(gone, len(self.layers), self._at[0]))

    def kl_without(self, index: int) -> float:
        """KL to the dense model with position ``index`` gone too, nats a token."""
        below = max(each for each in self._at if each <= index)
        if below < index:
            here = self._at[below].beyond(self.layers[index], self._pass(self.gone))
            self._at[index] = here
        return self._at[index].quality(self._pass({*self.gone, index})).kl

    def remove(self, index: int) -> None:
        """Make a removal."""
        self.gone.add(index)
        self._at = {each: here for each, here in self._at.items() if each <= index}


@dataclass(frozen=True)
class Greedy:
    """Greedy removal.

    Attributes:
        order: positions (0..routed-1), all of them, first removed first.
        costs: what each position's removal added to the KL after those before it, nats per
            token; of positions that were not reached, a lower bound.
    """

    order: list[int]
    costs: list[float]


@torch.no_grad()
def greedy_removal(
    reference: Reference,
    sensitivity: Sensitivity,
    removed: int,
    progress: Progress = silent,
) -> Greedy:
    """Remove one after another, each time the one that raises the KL least.

    What a removal costs grows with what is gone already, so a cost measured earlier is a
    lower bound of today's: only sublayers whose bound is below the best cost found are
    measured again (Minoux's lazy greedy). Where the assumption fails, the order is still
    greedy over those that were measured.

    Args:
        reference: samples of a patched model.
        sensitivity: the costs of removing one sublayer alone.
        removed: how many to search for; the others follow by their bounds.
        progress: one unit a removal.
    """
    routed = len(sensitivity.kl)
    removals = _Removals(reference, sensitivity.layers)
    order: list[int] = []
    reached = 0.0
    costs = list(sensitivity.kl)
    open_ = set(range(routed))
    for step in range(removed):
        best: int | None = None
        for candidate in sorted(open_, key=lambda j: costs[j]):
            if best is not None and costs[candidate] >= costs[best]:
                break
            if step:
                costs[candidate] = removals.kl_without(candidate) - reached
            if best is None or costs[candidate] < costs[best]:
                best = candidate
        assert best is not None
        reached += costs[best]
        order.append(best)
        removals.remove(best)
        open_.remove(best)
        progress("greedy removal", step + 1, removed, f"KL {reached:.3f}")
    return Greedy(order + sorted(open_, key=lambda j: costs[j]), costs)


def constant_logits(order: list[int]) -> Tensor:
    """Logits that stand for an order of removal, [routed] float32: first removed, lowest.

    Evenly spread scores: one tau between two of them removes any wanted number.
    """
    routed = len(order)
    rank = torch.empty(routed)
    rank[order] = torch.arange(routed, dtype=torch.float32)
    return torch.logit((rank + 0.5) / routed)


class _InputPass:
    """Executes everything and records the routers' inputs, as ``take`` makes them."""

    def __init__(self, take: Callable[[Tensor], Tensor]) -> None:
        self.take = take
        self.inputs: list[Tensor] = []

    def __call__(self, call: Call) -> Tensor:
        self.inputs.append(self.take(call.hidden))
        return call.execute(None)


@torch.no_grad()
def router_inputs(reference: Reference, unit: Unit = "sequence") -> Tensor:
    """What the routers see in the dense model, float32.

    Args:
        reference: samples of a patched model.
        unit: what decides.

    Returns:
        Prompt means, [samples, routed, hidden]; of tokens, the hidden states of at most
        `TOKENS` random ones of every prompt, [tokens, routed, hidden].
    """
    generator = torch.Generator().manual_seed(0)
    rows = []
    for batch, stem in reference.batches:
        mask = batch["prompt_mask"]
        if unit == "token":
            mask = random_tokens(mask, TOKENS, generator)
        watch = _InputPass(partial(_TAKEN[unit], mask))
        reference.split.finish(stem, watch)
        rows.append(torch.stack(watch.inputs, dim=1))
    return torch.cat(rows)


_TAKEN: dict[Unit, Callable[[Tensor, Tensor], Tensor]] = {
    "sequence": lambda mask, hidden: prompt_mean(hidden, mask),
    "token": lambda mask, hidden: hidden[mask].float(),
}


def random_tokens(mask: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """At most ``most`` of the true places of every row of ``mask``, drawn at random."""
    order = torch.rand(mask.shape, generator=generator).to(mask.device).masked_fill(~mask, -1)
    last = order.topk(min(most, mask.shape[1])).values[:, -1:]
    return mask & (order >= last)
