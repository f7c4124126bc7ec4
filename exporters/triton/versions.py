"""Which runtime a release of Triton carries, and what a graph asks of it."""

from __future__ import annotations

from dataclasses import dataclass

from mskip.compressor.errors import MskipError

NEWEST = "26.07"


@dataclass(frozen=True)
class Release:
    """A release of Triton Inference Server.

    Attributes:
        name: year and month.
        onnxruntime: version that its onnxruntime backend was built with.
    """

    name: str
    onnxruntime: str

    @property
    def image(self) -> str:
        """The container, for docker."""
        return f"nvcr.io/nvidia/tritonserver:{self.name}-py3"

    @property
    def tensorrt_image(self) -> str:
        """The container whose TensorRT builds plans for this release's tensorrt backend."""
        return f"nvcr.io/nvidia/tensorrt:{self.name}-py3"


RELEASES = {
    name: Release(name, runtime)
    for name, runtime in {"26.07": "1.27.0", "26.06": "1.24.4", "26.01": "1.23.2"}.items()
}
"""Releases whose runtimes are known, from their release notes."""

_OPSETS = {
    "1.20": (21, 10),
    "1.22": (22, 10),
    "1.23": (23, 11),
    "1.24": (25, 13),
    "1.27": (26, 13),
}
"""ONNX Runtime: newest ai.onnx opset and IR version that it takes, from that version on; found by
loading a graph of each into 1.20.1, 1.22.1, 1.23.2, 1.24.4 and 1.27.0."""


def release(name: str) -> Release:
    """The release of a name.

    Raises:
        MskipError: its runtime is not known.
    """
    if name not in RELEASES:
        raise MskipError(
            f"no Triton release '{name}' is known.", f"There are: {', '.join(RELEASES)}."
        )
    return RELEASES[name]


def check_opset(opset: int, ir: int, onnxruntime: str, where: str) -> str | None:
    """Why a runtime would refuse a graph; None where it takes it.

    Args:
        opset: of the graph's ai.onnx operators.
        ir: IR version of the file.
        onnxruntime: version.
        where: who carries it.
    """
    wanted = _numbers(onnxruntime)
    known = [version for version in _OPSETS if _numbers(version) <= wanted]
    if not known:
        return f"ONNX Runtime {onnxruntime} of {where} is older than any that mskip knows."
    newest, newest_ir = _OPSETS[known[-1]]
    takers = [name for name, (most, most_ir) in _OPSETS.items() if most >= opset and most_ir >= ir]
    remedy = f"it needs ONNX Runtime {takers[0]} or newer" if takers else "no version takes it"
    if opset > newest:
        return (
            f"the graph has opset {opset}; ONNX Runtime {onnxruntime} of {where} goes up to "
            f"{newest}: {remedy}."
        )
    if ir > newest_ir:
        return (
            f"the graph has IR version {ir}; ONNX Runtime {onnxruntime} of {where} goes up to "
            f"{newest_ir}: {remedy}."
        )
    return None


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
