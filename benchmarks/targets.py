"""How near does calibration come to a wanted capacity, on prompts that it has not seen?

    python benchmarks/targets.py --data alpaca.json --ablation results/ablation.json \
        --output results/targets.json

Takes the routers that `benchmarks/ablation.py` has left in its checkpoints, finds tau for each
target on one set of prompts and measures the executed share on another, for several sizes of
the sets. tau is exact on the calibration prompts, so what is seen is how far two samples of
prompts differ; the expected standard error is given beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from mskip.compressor.artifact import versions
from mskip.compressor.calibration import Paths, PromptScorer, UnreachableError, find_tau
from mskip.compressor.compensation import Compensation
from mskip.compressor.files import write_json
from mskip.compressor.models import load_base
from mskip.compressor.patching import patched
from mskip.compressor.recipe import load_recipe
from mskip.compressor.router import Routers
from mskip.compressor.samples import read_samples
from mskip.compressor.sublayers import Sublayers
from mskip.exporters.speed import machine

TARGETS = (0.25, 0.5, 0.75)


def newest(folder: Path) -> Path:
    """The last checkpoint of a variant."""
    found = sorted(folder.glob("*/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return found[-1] / "trained.safetensors"


def routers_of(file: Path, layers: list[int]) -> Routers:
    """Routers, and maps where they were trained too, from a checkpoint."""
    state = safetensors.torch.load_file(file)
    parts = {k.removeprefix("compensation."): v for k, v in state.items() if "compensation." in k}
    hidden = state["routers.weight"].shape[1]
    compensation = None
    if parts:
        compensation = Compensation(len(layers), hidden, parts["down"].shape[-1])
        compensation.load_state_dict(parts)
    routers = Routers(Sublayers(layers, "attention", compensation), hidden)
    routers.load_state_dict(
        {k.removeprefix("routers."): v for k, v in state.items() if k.startswith("routers.")}
    )
    return routers.eval().requires_grad_(False)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--recipe", default="smollm2-135m")
    parser.add_argument("--data", required=True, help="the same as the ablation's")
    parser.add_argument("--ablation", type=Path, required=True, help="its JSON; checkpoints beside")
    parser.add_argument("--variants", nargs="*", default=["default", "rank 64, refined"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--sizes", type=int, nargs="*", default=[64, 128, 512])
    parser.add_argument("--skip", type=int, default=576, help="prompts that the ablation took")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    recipe = load_recipe(
        arguments.recipe, [f"data.source={arguments.data}", "tuning.max_length=224"]
    )
    base = load_base(recipe.model)
    ablation = json.loads(arguments.ablation.read_text())["results"]
    most = max(arguments.sizes)
    unseen = read_samples(recipe.data.source, recipe, base, arguments.skip + 2 * most)
    unseen = unseen[arguments.skip :]
    rows: list[dict[str, Any]] = []
    for name in arguments.variants:
        for seed in arguments.seeds:
            folder = arguments.ablation.with_suffix(".checkpoints") / f"{name}-{seed}"
            if not folder.is_dir():
                continue
            routers = routers_of(newest(folder), ablation[f"{name}/{seed}"]["layers"])
            with patched(base.model, routers.sublayers):
                for size in arguments.sizes:
                    found = measured(base, routers, unseen[:size], unseen[most : most + size])
                    rows.append({"variant": name, "seed": seed, "prompts": size, **found})
                    print(rows[-1], flush=True)
            write_json(
                arguments.output,
                {
                    "rows": rows, "versions": versions(), "machine": machine("PyTorch", None),
                    "date": datetime.date.today().isoformat(),
                },
            )  # fmt: skip


def measured(base: Any, routers: Routers, calibration: Any, held_out: Any) -> dict[str, Any]:
    """Capacity on held-out prompts by target, and the standard error that is to be expected."""
    routed = len(routers.layers)
    scorer = PromptScorer(base, routers, calibration)
    other = PromptScorer(base, routers, held_out)
    paths = Paths(scorer, len(scorer), routed)
    capacities: dict[str, float | None] = {}
    errors: dict[str, float | None] = {}
    for target in TARGETS:
        try:
            tau = find_tau(paths, target, 40).tau
        except UnreachableError:
            capacities[f"{target:g}"] = errors[f"{target:g}"] = None
            continue
        decisions, _ = other(torch.full((routed,), tau), list(range(len(other))))
        each = decisions.float().mean(dim=1)
        capacities[f"{target:g}"] = round(float(each.mean()), 4)
        # Two samples: the one that tau was found on, and this one.
        errors[f"{target:g}"] = round(float(each.std() * (2 / len(each)) ** 0.5), 4)
    return {"capacity": capacities, "expected_error": errors}


if __name__ == "__main__":
    main()
