"""TensorRT engines of a small random model, for `gpu_suite.py`: whether a builder knows this GPU,
and if so, built, held against PyTorch and timed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

SEED = 0


def builders() -> list[dict[str, str]]:
    """Whether TensorRT and TensorRT-RTX can build here."""
    from mskip.compressor.errors import MskipError
    from mskip.exporters.trt_builders import BUILDERS, choose

    rows = []
    for row in BUILDERS:
        try:
            rows.append({"builder": row.name, "answer": f"builds: {choose(row.name, []).title}"})
        except MskipError as error:
            rows.append({"builder": row.name, "answer": f"not run: {error.message}"})
    return rows


def engines(capabilities: tuple[str, ...] = (), rounds: int = 7) -> dict[str, Any]:
    """Engines of a random Llama of 1B widths: export, build, parity and time on this GPU.

    Args:
        capabilities: to build for; none for the GPU of this machine.
        rounds: of the timing.

    Returns:
        What was built, errors relative to the largest logit by forced decision, and the rows of
        `mskip bench --trt`; or why they were not run.
    """
    from mskip.compressor.errors import MskipError
    from mskip.exporters.trt_builders import choose

    try:
        builder = choose(None, list(capabilities))
        with tempfile.TemporaryDirectory() as scratch:
            return _engines(Path(scratch) / "run", builder, capabilities, rounds)
    except (MskipError, ImportError) as error:
        return {"not_run": first_line(error)}
    except Exception as error:  # what follows does not depend on it
        return {"not_run": f"{type(error).__name__}: {first_line(error)}"}


def _engines(
    folder: Path, builder: Any, capabilities: tuple[str, ...], rounds: int
) -> dict[str, Any]:
    import numpy as np
    import random_run

    from mskip.compressor.artifact import Run, load_routers
    from mskip.compressor.models import load_base
    from mskip.exporters.onnx_export import export_run
    from mskip.exporters.speed import bench_run
    from mskip.exporters.torch_runner import TorchRunner
    from mskip.exporters.trt_engine import Build, engine_run
    from mskip.exporters.trt_profile import parse_profile
    from mskip.exporters.trt_runner import open_engine

    folder.mkdir()
    random_run.write_model(folder / "model", 4, "float32")
    random_run.write_run(folder, 4)
    run = Run(folder)
    spec = run.recipe().model.model_copy(update={"dtype": "float16"})
    base, profile = load_base(spec), parse_profile("batch=1,1,8 seq=1,512,2048 context=2176")
    build = Build(builder, profile, capabilities, peers=True)
    export_run(run, base, form=build.form, context=profile.context)
    found: dict[str, Any] = {"engine": engine_run(run, build), "error": {}}
    routers = load_routers(run, base)
    runner = open_engine(build.form.folder(run))
    ids = np.random.default_rng(SEED).integers(3, 250, (4, 96))
    forced = {"execute": [1, 1], "skip": [0, 0], "mixed": None}
    with TorchRunner(base, routers, runner.contract) as reference:
        for name, row in forced.items():
            routing = np.array([[1, 0], [0, 1], [1, 1], [0, 0]] if row is None else [row] * 4)
            states = [each.prefill(ids, routing=routing) for each in (reference, runner)]
            errors = []
            for _ in range(3):
                expected, made = (state.logits[:, -1] for state in states)
                errors.append(float(np.abs(made - expected).max() / np.abs(expected).max()))
                token = expected.argmax(-1)[:, None]
                pairs = zip((reference, runner), states, strict=True)
                states = [each.extend(state, token) for each, state in pairs]
            found["error"][name] = max(errors)
    del runner
    found["bench"] = bench_run(
        run, batches=[1, 8], contexts=[512, 2048], repeats=rounds, form=build.form, built=True
    )
    return found


def first_line(error: Exception) -> str:
    """What an error says first."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
