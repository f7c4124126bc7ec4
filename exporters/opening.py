"""An exported graph and the runner that its contract asks for."""

from __future__ import annotations

from pathlib import Path

from mskip.exporters.contract import Target, read_contract
from mskip.exporters.fused_runner import BufferRunner, FusedRunner
from mskip.exporters.onnx_export import MODEL
from mskip.exporters.ort_runner import OrtRunner, contract_path, runtime

_RUNNERS: dict[Target, type[OrtRunner]] = {
    "portable": OrtRunner,
    "ort": FusedRunner,
    "trt": BufferRunner,
    "trt-plugin": BufferRunner,
}


def open_runner(
    folder: Path, file: str = MODEL, *, threads: int | None = None, profile: Path | None = None
) -> OrtRunner:
    """The runner of an exported graph, by the target that its contract names.

    Args:
        folder: see `OrtRunner`.
        file: see `OrtRunner`.
        threads: see `OrtRunner`.
        profile: see `OrtRunner`.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        ArtifactError: no such export, or one that the runtime refuses.
    """
    runtime()  # before a file is asked for that only it could use
    target = read_contract(contract_path(folder, file)).target
    return _RUNNERS[target](folder, file, threads=threads, profile=profile)
