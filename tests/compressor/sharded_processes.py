"""One of the processes of the test of sharding: makes the runs that the folder describes.

Started by ``test_sharding.py`` with the environment that torchrun would set. The folder holds
``model/`` and ``jobs.json``: recipes by name. Of each, the process writes what it has seen of
its layers to ``<name>/rank-<rank>.json``; its run folder would be ``<name>/run-<rank>``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from mskip.compressor.artifact import Run
from mskip.compressor.errors import MskipError
from mskip.compressor.families import family_of
from mskip.compressor.models import BaseModel, load_base
from mskip.compressor.recipe import Recipe
from mskip.compressor.segments import SplitModel
from mskip.compressor.sharding import meet
from mskip.compressor.tune_step import tune_run

CUT = 2


def local_bytes(layers: list[nn.Module]) -> int:
    """Bytes of the layers' parameters that this process has."""
    parts = [parameter for layer in layers for parameter in layer.parameters()]
    return sum(
        (part.to_local() if isinstance(part, DTensor) else part).untyped_storage().nbytes()
        for part in parts
    )


def outputs(base: BaseModel) -> list[torch.Tensor]:
    """Logits of the model's own forward, of the split one, and greedy tokens."""
    ids = torch.arange(4, 40).reshape(3, 12)
    mask, positions = torch.ones_like(ids), torch.arange(12).expand(3, 12)
    split = SplitModel(base.model, CUT)
    with torch.no_grad():
        return [
            base.model(input_ids=ids, use_cache=False).logits,
            split.logits(split.finish(split.stem(ids, mask, positions))),
            base.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5),
        ]


def make(folder: Path, name: str, recipe: Recipe) -> dict[str, Any]:
    """Spread the layers, compare what the model says, and tune; interrupted where so named."""
    rank = int(os.environ["RANK"])
    base = load_base(recipe.model)
    layers = family_of(base.model).decoder_layers(base.model)
    before, whole = outputs(base), local_bytes(layers)
    meet(recipe.model, base)
    seen: dict[str, Any] = {
        "whole": whole,
        "local": local_bytes(layers),
        "same": all(map(torch.equal, before, outputs(base))),
    }
    run = Run(folder / name / f"run-{rank}")

    def press_once(stage: str, done: int, total: int, note: str = "") -> None:
        if name == "interrupted" and stage.startswith("tune") and done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    try:
        report = tune_run(run, recipe, base, progress=press_once)
    except MskipError as error:
        seen["error"] = error.message
        report = tune_run(run, recipe, base, resume=True) if name == "interrupted" else {}
    return {**seen, "report": report, "after": local_bytes(layers)}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    for name, recipe in json.loads((folder / "jobs.json").read_text()).items():
        seen = make(folder, name, Recipe.model_validate(recipe))
        (folder / name).mkdir(exist_ok=True)
        (folder / name / f"rank-{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()
    # The results are written; gloo's threads sometimes abort while the interpreter ends.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
