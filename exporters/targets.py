"""Where a run keeps the graph of each target, and what is reported about it."""

from __future__ import annotations

from pathlib import Path

from mskip.compressor.artifact import Run
from mskip.exporters.contract import Target

_FOLDERS: dict[Target, str] = {"portable": "onnx", "ort": "ort"}


def graph_folder(run: Run, target: Target) -> Path:
    """Folder of a target's graphs in a run."""
    return run.path / _FOLDERS[target]


def report_name(name: str, target: Target) -> str:
    """Name of a report about a target's graphs; the portable one's is ``name`` itself."""
    return name if target == "portable" else f"{name}-{target}"


def export_command(target: Target) -> str:
    """The command that makes a target's graphs."""
    return "mskip export" if target == "portable" else f"mskip export --target {target}"
