"""What in the tuner helps: variants of a recipe, several seeds, one table.

    python benchmarks/ablation.py --data alpaca.json --output results/ablation.json

Every seed draws its own tuning, calibration and held-out prompts; all variants of a seed share
them, and what is measured on the dense model. KL is on held-out answers at the capacity that
calibration reached, next to the best static removal (chosen on tuning prompts) of as many
sublayers. Finished variants are kept in the output, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mskip.compressor import baselines, router
from mskip.compressor.artifact import versions
from mskip.compressor.baselines import forced_to, kept_count, kept_of, static_gates
from mskip.compressor.calibration import (
    Paths,
    PromptScorer,
    UnreachableError,
    find_tau,
    find_tau_per_layer,
)
from mskip.compressor.data import split_samples
from mskip.compressor.evaluation import Reference
from mskip.compressor.files import write_json
from mskip.compressor.models import load_base
from mskip.compressor.patching import patched
from mskip.compressor.preparing import (
    Measured,
    bare_sublayers,
    compensate,
    measure,
    routed_sublayers,
)
from mskip.compressor.recipe import Recipe, load_recipe
from mskip.compressor.router import Routers, prompt_mean
from mskip.compressor.samples import Samples, read_samples
from mskip.compressor.tune_step import Work, tune_routers
from mskip.compressor.units import routed_passes
from mskip.exporters.speed import machine

TARGETS = (0.25, 0.5, 0.75)
VARIANTS: dict[str, list[str]] = {
    "default": [],
    "start by single sensitivity": ["router.init=sensitivity"],
    "start from zeros": ["router.init=zeros"],
    "no gate noise": ["tuning.relaxation=straight_through"],
    "raw mean, not standardised": ["router.normalize=false"],
    "next-token loss": ["tuning.loss=lm"],
    "hinge of the paper": ["tuning.constraint=hinge", "tuning.hinge_weight=1.0"],
    "target falls from 1 in the first half": ["tuning.capacity_warmup=0.5"],
    # What the router sees: see `router_inputs_are`.
    "last prompt token": [],
    "last 8 prompt tokens": [],
    "rank 16": ["compensation.rank=16"],
    "rank 64": ["compensation.rank=64"],
    "rank full": ["compensation.rank=full"],
    "rank 64, refined": ["compensation.rank=64", "compensation.refine=true"],
}


SEEN = {"last prompt token": 1, "last 8 prompt tokens": 8}


def mean_of_last(count: int) -> Callable[[Tensor, Tensor], Tensor]:
    """`prompt_mean` over the last ``count`` prompt positions of each row."""

    def mean(hidden: Tensor, prompt_mask: Tensor) -> Tensor:
        mask = prompt_mask.to(torch.float32)
        after = mask.flip(1).cumsum(1).flip(1)  # of a prompt position: how many from it to the end
        return prompt_mean(hidden, (mask * (after <= count)).bool())

    return mean


@contextmanager
def router_inputs_are(variant: str) -> Iterator[None]:
    """For an experiment only: routers see other positions than all of the prompt's."""
    saved = router.prompt_mean, baselines.prompt_mean
    if variant in SEEN:
        router.prompt_mean = baselines.prompt_mean = mean_of_last(SEEN[variant])
    try:
        yield
    finally:
        router.prompt_mean, baselines.prompt_mean = saved


def one(
    recipe: Recipe,
    base: Any,
    layers: list[int],
    samples: Samples,
    dense: Measured,
    folder: Path,
    usual: bool,
) -> dict[str, Any]:
    """Tune one variant and compare it with static removal.

    Of the ``usual`` one other targets, and one tau a layer, are measured too.
    """
    started = time.monotonic()
    sublayers = routed_sublayers(recipe, base, layers)
    measured, orders = dense, dict(dense.orders)
    closed = None
    if sublayers.compensation is not None:
        measured = compensate(base, recipe, sublayers, samples.tune, dense, lambda *_: None)
        orders["compensated"] = measured.greedy.order
        with patched(base.model, sublayers):
            reference = Reference(base, sublayers.layers[0], samples.held_out)
            kept = kept_of(
                orders["compensated"], kept_count(recipe.routing.capacity, len(sublayers))
            )
            closed = reference.quality(forced_to(static_gates(kept, len(sublayers)))).kl
    work = Work(folder, recipe, base, sublayers, samples, measured, orders, False, lambda *_: None)
    routers, details = tune_routers(work)
    worth = details["worth"]
    return {
        "calibrated": calibrated(base, routers, samples) if usual else None,
        "reached_before_calibration": details["targets"][0]["capacity"],
        "closed_form_static_kl": closed,
        "layers": layers,
        "tau_per_layer": per_layer(base, routers, samples, recipe.routing.capacity)
        if usual
        else None,
        **{key: worth.get(key) for key in (
            "routed_kl", "routed_capacity", "static_kl", "rule", "difference_interval", "skipped",
        )},
        "seconds": time.monotonic() - started,
    }  # fmt: skip


def calibrated(base: Any, routers: Routers, samples: Samples) -> dict[str, float | None]:
    """Capacity on held-out prompts of a tau that calibration prompts gave, by target."""
    routed = len(routers.layers)
    found: dict[str, float | None] = {}
    with patched(base.model, routers.sublayers):
        scorer = PromptScorer(base, routers, samples.calibration)
        held_out = PromptScorer(base, routers, samples.held_out)
        paths = Paths(scorer, len(scorer), routed)
        for target in TARGETS:
            try:
                tau = find_tau(paths, target, 40).tau
            except UnreachableError:
                found[f"{target:g}"] = None
                continue
            decisions, _ = held_out(torch.full((routed,), tau), list(range(len(held_out))))
            found[f"{target:g}"] = float(decisions.float().mean())
    return found


def per_layer(base: Any, routers: Routers, samples: Samples, target: float) -> dict[str, float]:
    """Held-out KL and capacity with one tau a layer, which calibration prompts gave."""
    with patched(base.model, routers.sublayers):
        scorer = PromptScorer(base, routers, samples.calibration)
        tau = find_tau_per_layer(scorer, len(scorer), len(routers.layers), target)
        passes = routed_passes(routers, tau)
        kl = Reference(base, routers.layers[0], samples.held_out).quality(passes).kl
    return {"kl": kl, "capacity": passes.capacity}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--recipe", default="smollm2-135m")
    parser.add_argument("--data", required=True, help="local file or data set")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    held = arguments.held_out
    common = [
        f"data.source={arguments.data}", "tuning.max_length=224", "tuning.epochs=4",
        "tuning.check_targets=[]", "router.sensitivity_prompts=16",
        "compensation.rank=0", "compensation.refine=false",
        f"data.calibration={held}", f"data.held_out={held}", *arguments.overrides,
    ]  # fmt: skip
    first = load_recipe(arguments.recipe, common)
    base = load_base(first.model)
    saved: dict[str, Any] = {"results": {}}
    if arguments.output.exists():
        saved = json.loads(arguments.output.read_text())
    size = arguments.samples + 2 * held
    every = read_samples(first.data.source, first, base, size * (max(arguments.seeds) + 1))
    for seed in arguments.seeds:
        samples = Samples(*split_samples(every[seed * size : (seed + 1) * size], held, held, seed))
        dense: Measured | None = None
        for name in arguments.variants:
            key = f"{name}/{seed}"
            if key in saved["results"]:
                continue
            recipe = load_recipe(
                arguments.recipe, [*common, f"tuning.seed={seed}", *VARIANTS[name]]
            )
            if dense is None:
                bare, alone = bare_sublayers(base, first, samples.tune[:16], lambda *_: None)
                removed = len(bare) - kept_count(first.routing.capacity, len(bare))
                with patched(base.model, bare):
                    dense = measure(base, bare, samples.tune[:16], removed, lambda *_: None, alone)
                    reference = Reference(base, bare.layers[0], samples.held_out)
                    saved["results"][f"static/{seed}"] = {
                        rule: reference.quality(
                            forced_to(
                                static_gates(kept_of(order, len(order) - removed), len(order))
                            )
                        ).kl
                        for rule, order in dense.orders.items()
                    }
            folder = arguments.output.with_suffix(".checkpoints") / key.replace("/", "-")
            with router_inputs_are(name):
                own = dense
                if name in SEEN:
                    with patched(base.model, bare):
                        own = replace(dense, inputs=baselines.router_inputs(dense.reference))
                saved["results"][key] = one(
                    recipe,
                    base,
                    bare.layers,
                    samples,
                    own,
                    folder,
                    usual=name == "default",
                )
            saved.update(
                machine=machine("PyTorch", None), versions=versions(), settings=common,
                date=datetime.date.today().isoformat(),
            )  # fmt: skip
            write_json(arguments.output, saved)
            print(key, saved["results"][key], flush=True)
    show(saved["results"], arguments.variants, arguments.seeds)


def show(results: dict[str, Any], variants: list[str], seeds: list[int]) -> None:
    """The table, Markdown; "over default" is by seed, of the seeds that both have."""
    print("| variant | seeds | KL routed | over best static | over default | capacity |")
    print("|---|---|---|---|---|---|")
    for name in variants:
        found = {seed: results.get(f"{name}/{seed}", {}) for seed in seeds}
        if not any(found.values()):
            continue
        rows = {seed: row for seed, row in found.items() if row.get("routed_kl") is not None}
        if not rows:
            print(f"| {name} | 0 | no tau reaches the capacity | | | |")
            continue
        kl = {seed: row["routed_kl"] for seed, row in rows.items()}
        static = [kl[seed] / min(results[f"static/{seed}"].values()) for seed in rows]
        usual = {seed: results.get(f"default/{seed}", {}).get("routed_kl") for seed in rows}
        default = [kl[seed] / usual[seed] for seed in rows if usual[seed] is not None]
        capacity = [row["routed_capacity"] for row in rows.values()]
        cells = [_cell(values) for values in (list(kl.values()), static, default, capacity)]
        print(f"| {name} | {len(rows)} | {' | '.join(cells)} |")


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
