"""Where the routers begin, and what capacity should cost at first.

From all-zero routers a straight-through gate flips every layer at once. A
start from measured per-layer sensitivity puts the layers in an order and the
expected capacity at the target, so that tuning refines a sensible routing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mskip.compressor.recipe import RouterSpec
from mskip.compressor.router import Routers


def cost_logits(kl: list[float], target: float, scale: float) -> Tensor:
    """First logit of each routed sublayer: the log of its cost against the threshold's.

    Args:
        kl: what skipping that sublayer adds to the KL to the dense model, nats.
        target: wanted capacity; that share of the logits is positive.
        scale: standard deviation of the logits.

    Returns:
        [routed], float32.
    """
    logs = torch.tensor(kl).clamp(min=1e-8).log()
    deviation = logs.std(correction=0) if len(kl) > 1 else torch.tensor(0.0)
    if float(deviation) < 1e-6:
        return torch.zeros(len(kl))
    return (logs - math.log(threshold(kl, target))) / deviation * scale


def threshold(kl: list[float], target: float) -> float:
    """Sensitivity that separates the share ``target`` of the sublayers from the rest, nats."""
    ordered = sorted((max(value, 1e-8) for value in kl), reverse=True)
    kept = min(max(round(target * len(kl)), 0), len(kl))
    above = ordered[kept - 1] if kept else ordered[0] * math.e
    below = ordered[kept] if kept < len(kl) else ordered[-1] / math.e
    return math.sqrt(above * below)


def first_price(costs: list[float], target: float) -> float:
    """Price of capacity at which the threshold layer breaks even, nats per unit of capacity.

    Args:
        costs: KL that each sublayer's removal adds, in the company of the others removed.
        target: wanted capacity; one sublayer is 1/routed of it.
    """
    return len(costs) * threshold(costs, target) if 0 < target < 1 else 0.0


@torch.no_grad()
def initialise(
    routers: Routers, spec: RouterSpec, inputs: Tensor, costs: dict[str, list[float]], target: float
) -> None:
    """Set the routers to the recipe's start, in place.

    Args:
        routers: fresh routers.
        spec: the recipe's router section.
        inputs: the routers' inputs in the dense model, [samples or tokens, routed, hidden].
        costs: of every routed sublayer's removal, by the name of the start.
        target: wanted capacity.
    """
    if spec.normalize:
        routers.standardise(inputs)
        if not spec.bias:
            # A centred input has mean zero: without a bias it could not hold a constant.
            routers.center.zero_()
    if spec.init == "zeros":
        return
    logits = cost_logits(costs[spec.init], target, spec.init_scale)
    if spec.bias:
        routers.bias.copy_(logits)
        return
    mean = (inputs.mean(dim=0) - routers.center) * routers.scale
    routers.weight.copy_(logits[:, None] * mean / mean.square().sum(1, keepdim=True))
