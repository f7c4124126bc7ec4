"""A tiny run with a repository, and a server of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from served import Served

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mskip.compressor.artifact import Run
    from mskip.compressor.models import BaseModel
    from mskip.compressor.router import Routers


@dataclass(frozen=True)
class Calibrated:
    """A calibrated run, exported for ONNX Runtime and for TensorRT.

    Attributes:
        run: its folder.
        tokenizer: of its model.
        dial: capacities and thresholds.
    """

    run: Run
    tokenizer: PreTrainedTokenizerBase
    dial: dict[str, Any]


@pytest.fixture(scope="session")
def calibrated(
    tiny_folder: Path,
    tiny_routers: Callable[..., Routers],
    tmp_path_factory: pytest.TempPathFactory,
) -> Calibrated:
    """Four layers, the last three routed. Read only."""
    from tiny_runs import tiny_run

    from mskip.compressor.dial import find_dial
    from mskip.compressor.models import load_base
    from mskip.exporters.onnx_export import export_run
    from mskip.exporters.targets import Form

    run = tiny_run(tmp_path_factory.mktemp("triton"), tiny_folder, tiny_routers)
    base: BaseModel = load_base(run.recipe().model)
    for target in ("ort", "trt"):
        export_run(run, base, form=Form(target), context=128)
    return Calibrated(run, base.tokenizer, find_dial(run, base, steps=4))


@pytest.fixture
def make_repository(calibrated: Calibrated, tmp_path: Path) -> Callable[..., Path]:
    """Factory of repositories: ``make_repository(backend="python", positions=128)``."""
    from mskip.exporters.triton.repository import Deployment, write_repository

    def make(folder: str = "repository", **options: Any) -> Path:
        deployment = Deployment(**{"positions": 128, "sequences": 4, "threads": 1, **options})
        place = tmp_path / folder
        write_repository(
            calibrated.run, calibrated.tokenizer, calibrated.dial, deployment, folder=place
        )
        return place

    return make


@pytest.fixture(scope="module")
def served(calibrated: Calibrated, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A real server, which this installs on first use; one a file of tests."""
    from mskip.exporters.opening import open_runner
    from mskip.exporters.serving.texts import Texts
    from mskip.exporters.triton.repository import Deployment, write_repository
    from mskip.exporters.triton.server import free_ports, install_server, started

    place = tmp_path_factory.mktemp("served")
    deployment = Deployment(positions=256, sequences=6, threads=1, queue=40)
    write_repository(
        calibrated.run, calibrated.tokenizer, calibrated.dial, deployment, folder=place / "made"
    )
    folder = (place / "made").rename(place / "moved")  # it may lie anywhere
    runner = open_runner(calibrated.run.path / "ort", threads=1)
    ports = free_ports()
    with started(install_server(), folder / "models", place / "log.txt", ports) as server:
        yield Served(server, folder, runner, Texts(folder / "models/tokenizer/1"))
