"""Is deciding per prompt worth it? The routed model against removing as much for good.

The yardstick is the best static removal that is known at the same capacity:
by every rule, and the sublayers that these very routers skip most often. It is
chosen on tuning samples and compared on held-out ones, prompt by prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mskip.compressor.baselines import forced_to, kept_count, kept_of, static_gates
from mskip.compressor.calibration import UnreachableError, find_tau
from mskip.compressor.evaluation import PerSample, Reference
from mskip.compressor.models import BaseModel
from mskip.compressor.patching import patched
from mskip.compressor.progress import Progress, silent
from mskip.compressor.router import Routers
from mskip.compressor.samples import Samples
from mskip.compressor.units import prompt_paths, routed_passes, ties_of

_TRIALS = 40


def paired_interval(
    one: PerSample, other: PerSample, *, resamples: int = 4000, seed: int = 0
) -> list[float]:
    """95 % interval of the difference in mean KL, ``one - other``, by the bootstrap over prompts.

    Args:
        one: of the same samples as ``other``.
        other: what is subtracted.
        resamples: bootstrap draws.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(one.tokens), (resamples, len(one.tokens)), generator=generator)
    difference = (one.kl - other.kl)[draws].sum(1) / one.tokens[draws].sum(1)
    return [float(q) for q in torch.quantile(difference, torch.tensor([0.025, 0.975]).double())]


def learned_order(decisions: Tensor) -> list[int]:
    """Order of removal: what the routers skip most often goes first.

    Args:
        decisions: [prompts or their tokens, routed], bool.
    """
    executed = decisions.float().mean(dim=0)
    return [int(index) for index in executed.argsort(stable=True)]


@torch.no_grad()
def is_dynamic_worth_it(
    base: BaseModel,
    routers: Routers,
    samples: Samples,
    capacity: float,
    orders: dict[str, list[int]],
    reference: Reference,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Compare routing with the best static removal at equal capacity.

    Args:
        base: the base model, not patched.
        routers: tuned.
        samples: tau comes from the calibration samples, the comparison from the held-out ones.
        capacity: wanted.
        orders: orders of removal by rule, positions 0..routed-1; receives ``learned``.
        reference: tuning samples, on which the best order is chosen.
        progress: one unit a measurement.

    Returns:
        JSON values: the rule chosen, KL of both with their difference's interval, the capacity
        reached (of tokens, that of the answers too), and the verdict ``better``: the whole
        interval lies below 0.
    """
    routed = len(routers.layers)
    device = base.model.device
    with patched(base.model, routers.sublayers):
        paths = prompt_paths(base, routers, samples.calibration)
        try:
            tau = find_tau(paths, capacity, _TRIALS, ties=ties_of(routers, samples.calibration)).tau
        except UnreachableError as error:
            return {"skipped": str(error).partition("\n")[0]}
        decisions, _ = paths.at(tau)
        orders["learned"] = learned_order(decisions.reshape(-1, routed))
        kept = {rule: kept_of(o, kept_count(capacity, routed)) for rule, o in orders.items()}
        chosen = {}
        for done, (rule, positions) in enumerate(kept.items(), 1):
            gates = static_gates(positions, routed).to(device)
            chosen[rule] = reference.quality(forced_to(gates)).kl
            progress("static or routed", done, len(kept) + 2, rule)
        best = min(chosen, key=lambda rule: chosen[rule])
        held_out = Reference(base, routers.layers[0], samples.held_out)
        passes = routed_passes(routers, torch.full((routed,), tau))
        dynamic = held_out.per_sample(passes)
        progress("static or routed", len(kept) + 1, len(kept) + 2, "routed")
        static = held_out.per_sample(forced_to(static_gates(kept[best], routed).to(device)))
        progress("static or routed", len(kept) + 2, len(kept) + 2, best)
    interval = paired_interval(dynamic, static)
    answers = passes.answer_capacity
    return {
        "rule": best,
        "removed": [layer for index, layer in enumerate(routers.layers) if index not in kept[best]],
        "static_capacity": len(kept[best]) / routed,
        "routed_capacity": passes.capacity,
        **({} if answers is None else {"routed_answer_capacity": answers}),
        "static_kl": static.quality().kl,
        "routed_kl": dynamic.quality().kl,
        "ratio": dynamic.quality().kl / static.quality().kl if static.quality().kl else None,
        "difference_interval": interval,
        "prompts": len(static.tokens),
        "better": interval[1] < 0,
    }
