"""From a routed run the run that removes for good, with the same maps and without tuning.

Where deciding per prompt is not worth it, tuning has already measured what to remove
instead, on these very maps. What is left to do is to write it down.
"""

from __future__ import annotations

import shutil
import time
from typing import Any

import torch

from mskip.compressor.artifact import Run, load_routers, routing_unit, saved_orders
from mskip.compressor.baselines import constant_logits
from mskip.compressor.errors import ArtifactError
from mskip.compressor.models import BaseModel
from mskip.compressor.router import Routers
from mskip.compressor.sublayers import require_unit
from mskip.compressor.tune_step import write_tuned


def static_run(run: Run, base: BaseModel, output: Run) -> dict[str, Any]:
    """Write the static run that a routed run's comparison proposes.

    The sublayers that were removed in the comparison are removed first, the others follow in
    the order of the same rule, so that other capacities can be calibrated, too.

    Args:
        run: tuned with routers that decide once a sequence.
        base: its base model.
        output: folder of the new run; what it holds is replaced.

    Returns:
        The report, as saved in the new run's ``reports/tune.json``: the routed run's, with the
        order of removal, and the comparison that it comes from under ``compared``.

    Raises:
        ArtifactError: not tuned, static already, or never compared.
        ModelError: the routers decide once a token.
    """
    started = time.monotonic()
    require_unit(routing_unit(run), "sequence", "mskip static")
    recipe = run.recipe()
    tuned = run.report("tune", "Make it with: mskip tune")
    worth = tuned.get("worth") or {}
    if tuned.get("method") != "routed" or "removed" not in worth:
        reason = worth.get("skipped", "it is a static run already")
        raise ArtifactError(
            f"{run.path} has no comparison of routing and removal: {reason}.",
            "Name what to remove: mskip tune --method static --set static.removed=[...]",
        )
    routers = load_routers(run, base)
    gone = [routers.layers.index(layer) for layer in worth["removed"]]
    others = saved_orders(run, routers.layers)[worth["rule"]]
    order = gone + [index for index in others if index not in gone]
    fixed = Routers(routers.sublayers, routers.hidden_size)
    with torch.no_grad():
        fixed.bias.copy_(constant_logits(order))
    removed = [routers.layers[index] for index in gone]
    spec = recipe.model_copy(
        update={
            "method": "static",
            # A whole number of sublayers, which no tau could split.
            "routing": recipe.routing.model_copy(
                update={"layers": routers.layers, "capacity": worth["static_capacity"]}
            ),
            "static": recipe.static.model_copy(update={"removed": removed}),
        }
    )
    output.write_recipe(spec)
    kept = run.path / "samples.jsonl"
    if kept.is_file():  # made again where they are not
        shutil.copyfile(kept, output.path / kept.name)
    orders = {**tuned["removal_orders"], "given": [routers.layers[index] for index in order]}
    report = {
        **tuned,
        "method": "static",
        "rule": "given",
        "removal_orders": orders,
        "trace": [],
        "targets": [],
        "worth": None,
        "compared": worth,
        "seconds": round(time.monotonic() - started, 1),
    }
    write_tuned(output, fixed, base, spec, report)
    output.remember()
    return report
