"""One of the processes of the distributed test: tunes what the folder describes.

Started by ``test_tuning.py`` with the environment that torchrun would set. The folder holds
``model/``, ``job.json`` and ``start.safetensors``; the result goes to ``rank-<rank>.json``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from mskip.compressor.encoding import Sample
from mskip.compressor.models import load_base
from mskip.compressor.recipe import ModelSpec, TuningSpec
from mskip.compressor.router import Routers
from mskip.compressor.tuning import tune


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    job = json.loads((folder / "job.json").read_text())
    base = load_base(ModelSpec(name=str(folder / "model")))
    routers = Routers(job["layers"], base.model.config.hidden_size)
    routers.load_state_dict(load_file(folder / "start.safetensors"))
    tuned = tune(
        base,
        routers,
        [Sample(*row) for row in job["samples"]],
        TuningSpec(**job["spec"]),
        job["target"],
        folder / "checkpoints",
        start_price=job["price"],
        resume=job["resume"],
    )
    result = {
        "processes": torch.distributed.get_world_size(),
        "weight": routers.weight.tolist(),
        "bias": routers.bias.tolist(),
        "trace": tuned.trace_json(),
    }
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
