"""The forms in which a run's graphs are exported: where each is kept, and how it is called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mskip.compressor.artifact import Run
from mskip.compressor.errors import ArtifactError, MskipError
from mskip.exporters.contract import CONTRACT, Target, Weights

_FOLDERS: dict[Target, str] = {
    "portable": "onnx",
    "ort": "ort",
    "trt": "tensorrt",
    "trt-plugin": "tensorrt-plugin",
}


@dataclass(frozen=True)
class Form:
    """One form of a run's graphs.

    Attributes:
        target: which operators they use.
        weights: how the weights of products are stored.

    Raises:
        MskipError: rounded weights and another target than "ort".
    """

    target: Target = "portable"
    weights: Weights = "float"

    def __post_init__(self) -> None:
        if self.weights != "float" and self.target != "ort":
            raise MskipError(
                f"weights of {self.weights} need ONNX Runtime's own operators.",
                f"Use: --target ort --weights {self.weights}",
            )

    @property
    def name(self) -> str:
        """Of the folder and in reports, such as "onnx", "ort-int8", "tensorrt"."""
        folder = _FOLDERS[self.target]
        return folder if self.weights == "float" else f"{folder}-{self.weights}"

    @property
    def options(self) -> str:
        """What the command line is told."""
        target = "" if self.target == "portable" else f" --target {self.target}"
        return target if self.weights == "float" else f"{target} --weights {self.weights}"

    @property
    def export_command(self) -> str:
        """The command that makes the graphs."""
        return f"mskip export{self.options}"

    def folder(self, run: Run) -> Path:
        """Where a run keeps the graphs."""
        return run.path / self.name

    def exported(self, run: Run) -> Path:
        """The folder of the graphs, which are there.

        Raises:
            ArtifactError: the run was not exported in this form.
        """
        folder = self.folder(run)
        if not (folder / CONTRACT).is_file():
            raise ArtifactError(f"no export at {folder}.", f"Make it with: {self.export_command}")
        return folder

    def report(self, name: str) -> str:
        """Name of a report about the graphs; the default form's is ``name`` itself."""
        return name if self == PORTABLE else f"{name}-{self.name}"


PORTABLE = Form()
"""What is exported where nothing is said."""
