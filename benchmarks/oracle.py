"""How much can any choice that depends on the prompt gain over removing layers for good?

    python benchmarks/oracle.py --data alpaca.json --output results/oracle.json

Many decision masks are measured on every prompt. The best static mask of all of them is chosen
on tuning prompts. Two oracles pick a mask for each held-out prompt by the prompt's own KL:
one among masks of the same size, one under a budget for all prompts together (easy prompts skip
more, hard prompts less). So that an oracle is not rewarded for noise, it picks by every other
answer position and is judged on those between. A nearest-neighbour router, which sees the prompt's
features and the tuning prompts' KL of every mask, stands for the best that could be predicted.
"""

from __future__ import annotations

import argparse
import datetime
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mskip.compressor.artifact import versions
from mskip.compressor.baselines import greedy_removal, measure_sensitivity, router_inputs
from mskip.compressor.data import split_samples
from mskip.compressor.encoding import Batch
from mskip.compressor.evaluation import Reference
from mskip.compressor.files import write_json
from mskip.compressor.models import load_base
from mskip.compressor.patching import patched
from mskip.compressor.preparing import bare_sublayers
from mskip.compressor.recipe import load_recipe
from mskip.compressor.routing import ForcedPass
from mskip.compressor.samples import read_samples
from mskip.exporters.speed import machine


def masks_around(order: list[int], routed: int, count: int, seed: int) -> Tensor:
    """Decision masks: the greedy prefixes of every size, and random swaps around them.

    Args:
        order: of greedy removal.
        routed: number of routed sublayers.
        count: masks in all.
        seed: of the swaps.

    Returns:
        [count, routed] bool, true where executed.
    """
    rng = random.Random(seed)
    sizes = range(max(1, routed // 8), routed - routed // 8 + 1)
    found = {frozenset(order[:size]) for size in sizes}
    while len(found) < count:
        # Half of them of the middle size, where the comparison is.
        size = routed // 2 if rng.random() < 0.5 else rng.choice(list(sizes))
        gone, kept = set(order[:size]), set(order[size:])
        for _ in range(rng.choice((1, 1, 2, 3))):
            out, into = rng.choice(sorted(gone)), rng.choice(sorted(kept))
            gone, kept = gone - {out} | {into}, kept - {into} | {out}
        found.add(frozenset(gone))
    masks = torch.ones(len(found), routed, dtype=torch.bool)
    for row, gone in enumerate(sorted(found, key=sorted)):
        masks[row, sorted(gone)] = False
    return masks


class Halves:
    """KL of masks on samples, on even and on odd answer positions apart."""

    def __init__(self, base: Any, first: int, samples: list[Any]) -> None:
        self.reference = Reference(base, first, samples)

    def __call__(self, mask: Tensor) -> Tensor:
        """Mean KL of every sample, [2, samples]: even and odd positions."""

        def forced(_: Batch) -> ForcedPass:
            return ForcedPass(mask[None])

        kl, sample, _ = self.reference.per_token(forced)
        order = torch.arange(len(sample))
        starts = torch.searchsorted(sample, sample)
        odd = ((order - starts) % 2).bool()
        count = int(sample.max()) + 1
        rows = []
        for part in (~odd, odd):
            total = torch.zeros(count, dtype=torch.float64).index_add_(0, sample[part], kl[part])
            rows.append(total / torch.bincount(sample[part], minlength=count).clamp(min=1))
        return torch.stack(rows)


def budgeted(cost: Tensor, executed: Tensor, capacity: float) -> Tensor:
    """The mask of every prompt that makes the summed cost least at a mean capacity.

    Args:
        cost: [masks, prompts].
        executed: executed share of every mask, [masks].
        capacity: wanted mean.

    Returns:
        [prompts] int64.
    """
    low, high = 0.0, 100.0
    chosen = cost.argmin(0)
    for _ in range(60):
        price = (low + high) / 2
        chosen = (cost + price * executed[:, None]).argmin(0)
        low, high = (price, high) if float(executed[chosen].mean()) > capacity else (low, price)
    return (cost + high * executed[:, None]).argmin(0)


def neighbours(
    features: Tensor, known: Tensor, cost: Tensor, executed: Tensor, capacity: float, count: int
) -> Tensor:
    """Masks of prompts by the costs of the most similar tuning prompts.

    Args:
        features: of the prompts, [prompts, width].
        known: of the tuning prompts, [tuning, width].
        cost: of the tuning prompts, [masks, tuning].
        executed: see `budgeted`.
        capacity: see `budgeted`.
        count: neighbours.
    """
    near = torch.cdist(features, known).topk(count, largest=False).indices
    return budgeted(cost[:, near].mean(2), executed, capacity)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--recipe", default="smollm2-135m")
    parser.add_argument("--data", required=True, help="local file or data set")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=64, help="tuning, and as many held out")
    parser.add_argument("--masks", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    recipe = load_recipe(
        arguments.recipe,
        [f"data.source={arguments.data}", "tuning.max_length=192", *arguments.overrides],
    )
    base = load_base(recipe.model)
    samples = read_samples(recipe.data.source, recipe, base, 2 * arguments.prompts)
    tune, _, held = split_samples(samples, 0, arguments.prompts, arguments.seed)
    sublayers, _ = bare_sublayers(base, recipe, tune[:16], lambda *_: None)
    routed, capacity = len(sublayers), recipe.routing.capacity
    with patched(base.model, sublayers):
        some = Reference(base, sublayers.layers[0], tune[:16])
        sensitivity = measure_sensitivity(some, sublayers)
        greedy = greedy_removal(some, sensitivity, routed - round(capacity * routed))
        masks = masks_around(greedy.order, routed, arguments.masks, arguments.seed)
        measured = {}
        features = {}
        for name, part in (("tune", tune), ("held", held)):
            halves = Halves(base, sublayers.layers[0], part)
            features[name] = router_inputs(halves.reference)[:, 0]
            rows = []
            for number, mask in enumerate(masks):
                rows.append(halves(mask))
                print(f"{name}: mask {number + 1} of {len(masks)}", flush=True)
            measured[name] = torch.stack(rows)  # [masks, 2, prompts]
    report = {
        "results": results(measured, features, masks, capacity),
        "prompts": arguments.prompts,
        "masks": len(masks),
        "layers": sublayers.layers,
        "greedy": [sublayers.layers[index] for index in greedy.order],
        "seed": arguments.seed,
        "machine": machine("PyTorch", None),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }
    write_json(arguments.output, report)
    for name, row in report["results"].items():
        print(f"{name:34} KL {row['kl']:.4f}  {row['ratio']:.3f} of static  "
              f"capacity {row['capacity']:.3f}")  # fmt: skip


def results(
    measured: dict[str, Tensor], features: dict[str, Tensor], masks: Tensor, capacity: float
) -> dict[str, dict[str, float]]:
    """KL of every way to choose, each prompt weighing the same."""
    executed = masks.double().mean(1)
    tune, held = measured["tune"].mean(1), measured["held"]
    middle = (executed - capacity).abs() < 1e-9
    same = torch.where(middle)[0]
    best = same[tune[same].mean(1).argmin()]
    prompts = held.shape[2]
    everyone = torch.arange(prompts)

    def judged(choose: Any) -> tuple[float, float]:
        """Picked by one half of the positions, judged on the other, both ways."""
        picks = [choose(held[:, half]) for half in (0, 1)]
        kl = torch.stack([held[picks[half], 1 - half, everyone] for half in (0, 1)]).mean()
        return float(kl), float(torch.stack([executed[pick] for pick in picks]).mean())

    normal = [
        (features[name] - features["tune"].mean(0)) / features["tune"].std(0).clamp(min=1e-6)
        for name in ("held", "tune")
    ]
    found = {
        "best static mask of all": judged(lambda _: best.expand(prompts)),
        "oracle, same size": judged(lambda cost: same[cost[same].argmin(0)]),
        "oracle, one budget": judged(lambda cost: budgeted(cost, executed, capacity)),
        "oracle that sees what it is judged by": (
            float(held.mean(1)[budgeted(held.mean(1), executed, capacity), everyone].mean()),
            float(executed[budgeted(held.mean(1), executed, capacity)].mean()),
        ),
    }
    for count in (4, 16):
        pick = neighbours(normal[0], normal[1], tune, executed, capacity, count)
        found[f"{count} nearest tuning prompts"] = judged(lambda _, pick=pick: pick)
    static = found["best static mask of all"][0]
    return {
        name: {"kl": kl, "capacity": share, "ratio": kl / static}
        for name, (kl, share) in found.items()
    }


if __name__ == "__main__":
    main()
