"""The run folder: what a run holds, how it is written and read back.

Safetensors, JSON and YAML only; nothing here is ever unpickled. The layout is
in docs/run-folder.md.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import transformers

import mskip
from mskip.compressor.errors import ArtifactError
from mskip.compressor.files import read_json, sha256, whole_file, write_json, write_text
from mskip.compressor.models import BaseModel
from mskip.compressor.recipe import Recipe, dump_recipe, load_recipe
from mskip.compressor.router import Routers
from mskip.compressor.sublayers import Sublayers

RUNS = Path("runs")
_LAST = ".last"


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def reports(self) -> Path:
        """Folder of the reports."""
        return self.path / "reports"

    @property
    def checkpoints(self) -> Path:
        """Folder of the tuner's checkpoints; gone once tuning has ended."""
        return self.path / "checkpoints"

    @property
    def onnx(self) -> Path:
        """Folder of the ONNX export."""
        return self.path / "onnx"

    def write_recipe(self, recipe: Recipe) -> None:
        """Save the resolved recipe."""
        write_text(self.path / "recipe.yaml", dump_recipe(recipe))

    def recipe(self) -> Recipe:
        """The resolved recipe.

        Raises:
            ArtifactError: the folder is no run.
            RecipeError: the recipe is damaged.
        """
        path = self.path / "recipe.yaml"
        if not path.is_file():
            raise ArtifactError(f"{self.path} is not a run: it has no recipe.yaml.", _TUNE_FIRST)
        return load_recipe(str(path))

    def write_report(self, name: str, value: Any) -> None:
        """Save ``reports/<name>.json``."""
        write_json(self.reports / f"{name}.json", value)

    def forget_reports(self, *names: str) -> None:
        """Remove reports that no longer describe the run."""
        for name in names:
            (self.reports / f"{name}.json").unlink(missing_ok=True)

    def report(self, name: str, remedy: str) -> Any:
        """Read ``reports/<name>.json``; ``remedy`` names the command that writes it."""
        return read_json(self.reports / f"{name}.json", f"{name} report", remedy)

    def write_calibration(self, value: dict[str, Any]) -> None:
        """Save ``calibration.json``."""
        write_json(self.path / "calibration.json", value)

    def calibration(self) -> dict[str, Any]:
        """Read ``calibration.json``.

        Raises:
            ArtifactError: missing or damaged.
        """
        path = self.path / "calibration.json"
        value = read_json(path, "calibration", "Make one with: mskip calibrate --capacity 0.5")
        if not isinstance(value, dict) or not isinstance(value.get("tau"), list):
            raise ArtifactError(f"{path} holds no list 'tau'.", "Run mskip calibrate again.")
        return value

    def write_manifest(self, **entries: Any) -> None:
        """Add entries to ``manifest.json``, with the versions that made them."""
        path = self.path / "manifest.json"
        manifest = read_json(path, "manifest") if path.exists() else {}
        manifest["versions"] = versions()
        manifest.update(entries)
        write_json(path, manifest)

    def remember(self) -> None:
        """Make this the run that commands without a run argument take."""
        write_text(RUNS / _LAST, f"{self.path.resolve()}\n")


_TUNE_FIRST = "Make a run with: mskip tune"


def open_run(path: Path | None) -> Run:
    """The run at ``path``; without one, the last run made from this folder.

    Raises:
        ArtifactError: there is no such run.
    """
    if path is None:
        pointer = RUNS / _LAST
        if not pointer.is_file():
            raise ArtifactError(f"there is no run in {RUNS}/ yet.", _TUNE_FIRST)
        path = Path(pointer.read_text(encoding="utf-8").strip())
    if not path.is_dir():
        raise ArtifactError(f"no run at {path}.", _TUNE_FIRST)
    run = Run(path)
    run.recipe()
    return run


def versions() -> dict[str, str]:
    """Versions that decide what a run computes."""
    return {
        "mskip": mskip.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }


def save_routers(run: Run, routers: Routers, base: BaseModel, recipe: Recipe) -> None:
    """Write ``router.safetensors`` and ``router_config.json``, which names the base model."""
    weights = run.path / "router.safetensors"
    with whole_file(weights) as temporary:
        safetensors.torch.save_file(
            {name: value.detach().contiguous() for name, value in routers.state_dict().items()},
            temporary,
        )
    write_json(
        run.path / "router_config.json",
        {
            "format": 1,
            "method": "routed",
            "granularity": routers.sublayers.granularity,
            "layers": routers.layers,
            "hidden_size": routers.hidden_size,
            "base_model": {
                "name": recipe.model.name,
                "revision": recipe.model.revision,
                "sha256": base.sha256,
            },
            "router_sha256": sha256(weights),
        },
    )


def load_routers(run: Run, base: BaseModel) -> Routers:
    """Read the routers and check that they belong to the base model.

    Raises:
        ArtifactError: missing, damaged, or tuned on another base model.
    """
    config_path = run.path / "router_config.json"
    weights = run.path / "router.safetensors"
    config = read_json(config_path, "router configuration", _TUNE_FIRST)
    try:
        layers, hidden = list(config["layers"]), int(config["hidden_size"])
        sublayers = Sublayers(layers, config["granularity"])
        expected = str(config["base_model"]["sha256"])
        name = str(config["base_model"]["name"])
        weights_hash = str(config["router_sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{config_path} lacks or mangles the entry {error}.", _TUNE_FIRST
        ) from error
    if expected != base.sha256:
        raise ArtifactError(
            f"the routers in {run.path} were tuned on {name} with hash {expected[:12]}; "
            f"{base.folder} has hash {base.sha256[:12]}.",
            "Give the model they were tuned on, or tune again on this one.",
        )
    routers = Routers(sublayers, hidden)
    try:
        state = safetensors.torch.load_file(weights)
        routers.load_state_dict(state)
    except FileNotFoundError:
        raise ArtifactError(f"no routers at {weights}.", _TUNE_FIRST) from None
    except (safetensors.SafetensorError, OSError, RuntimeError) as error:
        raise ArtifactError(f"{weights} is damaged: {error}", "Tune again.") from error
    if sha256(weights) != weights_hash:
        raise ArtifactError(
            f"{weights} is not the file that router_config.json describes.", "Tune again."
        )
    return routers.requires_grad_(False)
