"""The run folder: what a run holds, how it is written and read back.

Safetensors, JSON and YAML only; nothing here is ever unpickled. The layout is
in docs/run-folder.md.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
import transformers
from pydantic import TypeAdapter
from torch import nn

import mskip
from mskip.compressor.compensation import Compensation
from mskip.compressor.errors import ArtifactError
from mskip.compressor.files import read_json, sha256, whole_file, write_json, write_text
from mskip.compressor.models import BaseModel
from mskip.compressor.recipe import Recipe, dump_recipe, load_recipe
from mskip.compressor.router import Routers
from mskip.compressor.sublayers import Granularity, Sublayers, Unit

Method = Literal["routed", "static"]
"""How routers were made: tuned, or set to constants that skip the same sublayers always."""

_METHOD: TypeAdapter[Method] = TypeAdapter(Method)
_GRANULARITY: TypeAdapter[Granularity] = TypeAdapter(Granularity)
_UNIT: TypeAdapter[Unit] = TypeAdapter(Unit)

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


def save_routers(
    run: Run, routers: Routers, base: BaseModel, recipe: Recipe, method: Method = "routed"
) -> None:
    """Write the routers, their compensation and ``router_config.json``, which names the base model.

    Args:
        run: its folder.
        routers: tuned; with them what they route.
        base: the model that they belong to.
        recipe: the run's recipe.
        method: how they were made.
    """
    files = {"router": _save(run.path / "router.safetensors", routers)}
    compensation = routers.sublayers.compensation
    other = run.path / "compensation.safetensors"
    if compensation is not None:
        files["compensation"] = _save(other, compensation)
    write_json(
        run.path / "router_config.json",
        {
            "format": 2,
            "method": method,
            "granularity": routers.sublayers.granularity,
            "unit": routers.sublayers.unit,
            "layers": routers.layers,
            "hidden_size": routers.hidden_size,
            "compensation_rank": routers.sublayers.compensation_rank,
            "base_model": {
                "name": recipe.model.name,
                "revision": recipe.model.revision,
                "sha256": base.sha256,
            },
            "sha256": files,
        },
    )
    if compensation is None:
        other.unlink(missing_ok=True)


def _save(path: Path, module: nn.Module) -> str:
    """Write a module's tensors and return the file's hash."""
    with whole_file(path) as temporary:
        safetensors.torch.save_file(
            {name: value.detach().contiguous() for name, value in module.state_dict().items()},
            temporary,
        )
    return sha256(path)


def _load(path: Path, module: nn.Module, expected: str) -> None:
    try:
        module.load_state_dict(safetensors.torch.load_file(path))
    except FileNotFoundError:
        raise ArtifactError(f"no weights at {path}.", _TUNE_FIRST) from None
    except (safetensors.SafetensorError, OSError, RuntimeError) as error:
        raise ArtifactError(f"{path} is damaged: {error}", "Tune again.") from error
    if sha256(path) != expected:
        raise ArtifactError(
            f"{path} is not the file that router_config.json describes.", "Tune again."
        )


def load_routers(run: Run, base: BaseModel) -> Routers:
    """Read the routers with their compensation, and check that they belong to the base model.

    Raises:
        ArtifactError: missing, damaged, or tuned on another base model.
    """
    config_path = run.path / "router_config.json"
    config = read_json(config_path, "router configuration", _TUNE_FIRST)
    try:
        if config["format"] != 2:
            raise ArtifactError(
                f"{config_path} has format {config['format']}; this mskip reads 2.", "Tune again."
            )
        layers, hidden = list(config["layers"]), int(config["hidden_size"])
        granularity = _GRANULARITY.validate_python(config["granularity"])
        unit = _unit(config)
        rank = int(config["compensation_rank"])
        expected = str(config["base_model"]["sha256"])
        name = str(config["base_model"]["name"])
        hashes = dict(config["sha256"])
        compensation = Compensation(len(layers), hidden, rank) if rank else None
        router_hash = str(hashes["router"])
        compensation_hash = str(hashes["compensation"]) if rank else ""
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
    routers = Routers(Sublayers(layers, granularity, compensation, unit), hidden)
    _load(run.path / "router.safetensors", routers, router_hash)
    if compensation is not None:
        _load(run.path / "compensation.safetensors", compensation, compensation_hash)
        compensation.requires_grad_(False)
    return routers.requires_grad_(False)


def routers_hash(run: Run) -> str:
    """One hash for the routers and their compensation: of the file that holds both hashes."""
    return sha256(run.path / "router_config.json")


def tuned_by(run: Run) -> Method:
    """How the run's routers were made.

    Raises:
        ArtifactError: the run is not tuned, or its configuration is damaged.
    """
    path = run.path / "router_config.json"
    try:
        return _METHOD.validate_python(
            read_json(path, "router configuration", _TUNE_FIRST)["method"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} lacks or mangles the entry {error}.", _TUNE_FIRST) from error


def routing_unit(run: Run) -> Unit:
    """What decides in this run; known without its base model.

    An untuned run is taken for one of sequences: what asks for its routers says what is missing.

    Raises:
        ArtifactError: the configuration is damaged.
    """
    path = run.path / "router_config.json"
    if not path.is_file():
        return "sequence"
    try:
        return _unit(read_json(path, "router configuration", _TUNE_FIRST))
    except (AttributeError, ValueError) as error:
        raise ArtifactError(f"{path} lacks or mangles the entry {error}.", _TUNE_FIRST) from error


def _unit(config: dict[str, Any]) -> Unit:
    """Configurations written before there were two have no entry."""
    return _UNIT.validate_python(config.get("unit", "sequence"))


def saved_orders(run: Run, layers: list[int]) -> dict[str, list[int]]:
    """Order of static removal by each rule that tuning measured.

    Args:
        run: a tuned run.
        layers: decoder layer index of each routed sublayer.

    Returns:
        Positions (0..routed-1) by rule, first removed first.

    Raises:
        ArtifactError: the run is not tuned, or its report is damaged.
    """
    saved = run.report("tune", _TUNE_FIRST)
    try:
        return {
            rule: [layers.index(layer) for layer in order]
            for rule, order in saved["removal_orders"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{run.reports / 'tune.json'} lacks the orders of removal.", "Tune again."
        ) from error
