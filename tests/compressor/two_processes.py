"""One of the processes of the distributed test: tunes what the folder describes.

Started by ``test_tuning.py`` with the environment that torchrun would set. The folder holds
``model/``, ``job.json`` and ``start.safetensors``; the results go to ``rank-<rank>.json``: of
an uninterrupted run, and of one that is interrupted in one of the processes and resumed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mskip.compressor.encoding import Sample
from mskip.compressor.models import load_base
from mskip.compressor.recipe import ModelSpec, TuningSpec
from mskip.compressor.router import Routers
from mskip.compressor.tuning import Interrupted, tune


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    job = json.loads((folder / "job.json").read_text())
    base = load_base(ModelSpec(name=str(folder / "model")))
    rank = int(os.environ["RANK"])

    def run(name: str, **options: Any) -> dict[str, Any]:
        routers = Routers(job["layers"], base.model.config.hidden_size)
        routers.load_state_dict(load_file(folder / "start.safetensors"))
        samples = [Sample(*row) for row in job["samples"]]
        spec = TuningSpec(**job["spec"])
        tuned = tune(
            base, routers, samples, spec, job["target"], folder / name,
            start_price=job["price"], **options,
        )  # fmt: skip
        return {
            "processes": torch.distributed.get_world_size(),
            "weight": routers.weight.tolist(),
            "bias": routers.bias.tolist(),
            "trace": tuned.trace_json(),
        }

    def press_once(stage: str, done: int, total: int, note: str = "") -> None:
        if done == 5 and rank == 1:
            os.kill(os.getpid(), signal.SIGINT)

    results: dict[str, Any] = {"whole": run("whole")}
    try:
        run("cut", progress=press_once)
    except Interrupted as error:
        results["interrupted"] = error.message
    torch.distributed.barrier()
    results["resumed"] = run("cut", resume=True)
    (folder / f"rank-{rank}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # The results are written; gloo's threads sometimes abort while the interpreter ends.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
