"""A run as a repository of Triton Inference Server: a folder that is copied anywhere and served."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, Literal, get_args

import onnx

import mskip
from mskip.compressor.artifact import Run
from mskip.compressor.dial import DIAL
from mskip.compressor.encoding import request_frame
from mskip.compressor.errors import ArtifactError, MskipError
from mskip.compressor.files import read_json, sha256, whole_folder, write_json
from mskip.compressor.progress import Progress, silent
from mskip.exporters.contract import CONTRACT, Contract, Weights, read_contract
from mskip.exporters.onnx_export import DATA, MODEL
from mskip.exporters.ort_runner import contract_path
from mskip.exporters.serving.batch import MOST_COMPANY
from mskip.exporters.targets import Form
from mskip.exporters.triton import config
from mskip.exporters.triton.versions import NEWEST, Release, release

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Backend = Literal["python", "onnxruntime", "tensorrt"]
FOLDER = "triton"
"""Of the repository in a run."""
MODELS = "models"
"""Folder in the repository that Triton is pointed at."""
RECORD = "repository.json"
"""What the repository was made from, and for what."""
SERVING = "mskip_serving"
"""Name of the package in the repository."""
REQUIREMENTS = {"onnxruntime": "1.27", "tokenizers": "0.22", "numpy": "1.26"}
"""What the python models import: least versions."""


@dataclass(frozen=True)
class Deployment:
    """How a repository is served.

    Attributes:
        backend: which holds the graph: "python" in the process that schedules requests,
            "onnxruntime" or "tensorrt" in a model of its own.
        target: release of Triton.
        sequences: most that decode together.
        positions: longest sequence, prompt and answer.
        instances: of "generate", each with its own sequences and weights.
        queue: requests of an instance that may wait.
        queue_delay_us: that "tokenizer" waits for more texts.
        kv_mib: keys and values that running sequences may come to hold; None is what all
            sequences of half the longest would hold, all executed, and no less than one longest.
        threads: of one call of the graph; 0 leaves them to the runtime.
        weights: how the weights of products are stored.

    Raises:
        MskipError: a value out of range.
    """

    backend: Backend = "python"
    target: str = NEWEST
    sequences: int = 16
    positions: int = 2048
    instances: int = 1
    queue: int = 128
    queue_delay_us: int = 0
    kv_mib: int | None = None
    threads: int = 0
    weights: Weights = "float"

    def __post_init__(self) -> None:
        if self.backend not in get_args(Backend):
            raise MskipError(
                f"no backend '{self.backend}'.", f"There are: {', '.join(get_args(Backend))}."
            )
        for name, least in (("sequences", 1), ("positions", 2), ("instances", 1), ("queue", 1)):
            if getattr(self, name) < least:
                raise MskipError(f"{name} is {getattr(self, name)}.", f"It is {least} or more.")
        release(self.target)
        if self.backend == "tensorrt" and self.weights != "float":
            raise MskipError("TensorRT's graph has no rounded weights.", "Leave out --weights.")

    @property
    def release(self) -> Release:
        """Of Triton."""
        return release(self.target)

    @property
    def form(self) -> Form:
        """Of the graph that is served."""
        if self.backend == "tensorrt":
            return Form("trt")
        return Form("ort", self.weights)


def write_repository(
    run: Run,
    tokenizer: PreTrainedTokenizerBase,
    dial: Mapping[str, Any],
    deployment: Deployment,
    progress: Progress = silent,
    *,
    graph: str = MODEL,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Write the repository of an exported run.

    Args:
        run: its folder, exported in the deployment's form.
        tokenizer: of its model.
        dial: see `find_dial`.
        deployment: how it is served.
        progress: one unit a part.
        graph: file of the export; another than the routed one for comparisons.
        folder: of the repository; None is the run's own.

    Returns:
        The record, as saved in ``repository.json``.

    Raises:
        ArtifactError: not exported in that form, or no ``tokenizer.json``.
        DataError: the chat template cannot be written out as text around a request.
    """
    exported = deployment.form.exported(run)
    if not (exported / "tokenizer.json").is_file():
        raise ArtifactError(
            f"{exported} has no tokenizer.json: the tokenizer is not a fast one.",
            "Use a tokenizer that the tokenizers library can save.",
        )
    told = contract_path(exported, graph)
    contract = read_contract(told)
    positions = contract.capacity or deployment.positions
    folder = folder or run.path / FOLDER
    progress("triton", 0, 3, "models")
    with whole_folder(folder) as made:
        models = _models(contract, deployment, positions)
        for model in models:
            _write_model(made / MODELS / model.name, model)
        frame = asdict(request_frame(tokenizer))
        generate = made / MODELS / "generate/1"
        for place in (generate, made / MODELS / "tokenizer/1"):
            shutil.copyfile(exported / "tokenizer.json", place / "tokenizer.json")
            write_json(place / "frame.json", frame)
            _copy_package("mskip.exporters.serving", place / SERVING)
        shutil.copyfile(told, generate / CONTRACT)
        write_json(generate / DIAL, dict(dial))
        progress("triton", 1, 3, "weights")
        _write_graph(made / MODELS / "lm", exported, graph, contract, deployment)
        record = _record(run, exported / graph, contract, deployment, positions, dial)
        write_json(made / RECORD, record)
        _write_papers(made, run, record, contract)
        progress("triton", 2, 3, "checksums")
        files = sorted(path for path in made.rglob("*") if path.is_file())
        sums = "".join(f"{sha256(path)}  {path.relative_to(made)}\n" for path in files)
        (made / "checksums.sha256").write_text(sums, encoding="utf-8")
    progress("triton", 3, 3)
    return record


def _models(contract: Contract, deployment: Deployment, positions: int) -> list[config.Model]:
    most = deployment.sequences
    budget = deployment.kv_mib
    if budget is None:
        each = 2 * contract.kv_heads * contract.head_dim * (4 if contract.dtype == "float32" else 2)
        longest = positions * each * len(contract.cached_layers)
        budget = -(-longest * max(most, 2) // 2 // (1 << 20))
    parameters = {
        "engine": "local" if deployment.backend == "python" else "lm",
        "sequences": str(most),
        "positions": str(positions),
        "queue": str(deployment.queue),
        "kv_bytes": str(budget << 20),
        "threads": str(deployment.threads),
    }
    return [
        config.tokenizer_model(deployment.queue_delay_us),
        config.generate_model(parameters, deployment.instances),
        config.ensemble_model(),
        config.lm_model(contract, deployment.backend, deployment.instances, most + MOST_COMPANY),
    ]


def _write_model(folder: Path, model: config.Model) -> None:
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(model.text(), encoding="utf-8")
    if not model.backend:
        # Triton wants a version of an ensemble too, and git keeps no empty folders.
        (folder / "1/.keep").write_text("", encoding="utf-8")
        return
    (folder / "configs").mkdir()
    graph = model.name == "lm" and model.backend != "python"
    for device in ("cpu", "gpu"):
        # What is python stays on the CPU.
        text = model.text(device if graph else "cpu")
        (folder / f"configs/{device}.pbtxt").write_text(text, encoding="utf-8")
    if model.backend == "python":
        source = resources.files("mskip.exporters.triton") / "models" / f"{model.name}.py"
        (folder / "1/model.py").write_text(source.read_text("utf-8"), encoding="utf-8")
    if model.backend == "tensorrt":
        (folder / "config.pbtxt").write_text(model.text("gpu"), encoding="utf-8")


def _copy_package(name: str, folder: Path) -> None:
    folder.mkdir()
    for source in resources.files(name).iterdir():
        if source.name.endswith(".py"):
            (folder / source.name).write_text(source.read_text("utf-8"), encoding="utf-8")


def _write_graph(
    folder: Path, exported: Path, graph: str, contract: Contract, deployment: Deployment
) -> None:
    """The graph with its weights, as the backend looks for them."""
    place = folder / "1"
    if deployment.backend == "onnxruntime":
        # A model with weights in a file of their own is a folder of the model's name.
        place = place / MODEL
        place.mkdir()
    if deployment.backend == "tensorrt":
        place = folder / "source"
        place.mkdir()
    shutil.copyfile(exported / graph, place / MODEL)
    if (exported / DATA).is_file():
        # A copy: ONNX Runtime refuses weights in a file that has several names.
        shutil.copyfile(exported / DATA, place / DATA)
    if deployment.backend != "python":
        (folder / "warmup").mkdir()
        for name, data in config.warm_up_files(
            contract, deployment.sequences + MOST_COMPANY
        ).items():
            (folder / "warmup" / name).write_bytes(data)


def _record(
    run: Run,
    graph: Path,
    contract: Contract,
    deployment: Deployment,
    positions: int,
    dial: Mapping[str, Any],
) -> dict[str, Any]:
    head = onnx.load(graph, load_external_data=False)
    calibration = run.calibration()
    router = read_json(run.path / "router_config.json", "router configuration")
    return {
        "mskip": mskip.__version__,
        "backend": deployment.backend,
        "target": deployment.target,
        "image": deployment.release.image,
        "sequences": deployment.sequences,
        "positions": positions,
        "instances": deployment.instances,
        "queue": deployment.queue,
        "graph": {
            "target": contract.target,
            "weights": contract.weights,
            "dtype": contract.dtype,
            "opset": max(each.version for each in head.opset_import if not each.domain),
            "ir_version": head.ir_version,
            "routed_layers": contract.routed_layers,
            "granularity": contract.granularity,
            "compensation_rank": contract.compensation_rank,
        },
        "needs": dict(REQUIREMENTS),
        "base_model": router.get("base_model", {}),
        "capacity": calibration["capacity"],
        "dial": dial["capacities"],
    }


def _write_papers(made: Path, run: Run, record: dict[str, Any], contract: Contract) -> None:
    """What people read, and what stands alone beside the models."""
    assets = resources.files("mskip.exporters.triton") / "assets"
    base = record["base_model"]
    values = {
        "name": run.path.name,
        "base": str(base.get("name", "a model of the user's")),
        "revision": str(base.get("revision") or "not named"),
        "hash": str(base.get("sha256") or base.get("hash") or "not recorded"),
        "image": record["image"],
        "target": record["target"],
        "backend": record["backend"],
        "opset": str(record["graph"]["opset"]),
        "ir": str(record["graph"]["ir_version"]),
        "onnxruntime": record["needs"]["onnxruntime"],
        "sequences": str(record["sequences"]),
        "positions": str(record["positions"]),
        "queue": str(record["queue"]),
        "routed": ", ".join(map(str, contract.routed_layers)) or "none",
        "granularity": contract.granularity,
        "rank": str(contract.compensation_rank),
        "capacity": f"{record['capacity']['held_out']:.3f}",
        "skip_rate": f"{1 - record['capacity']['held_out']:.3f}",
        "backend_text": _BACKENDS[record["backend"]],
        "plan": _PLAN_WORDS if contract.capacity else "",
        "mskip": record["mskip"],
    }
    for name in ("README.md", "MODEL_CARD.md"):
        text = Template((assets / name).read_text("utf-8")).substitute(values)
        (made / name).write_text(text, encoding="utf-8")
    for name in ("client.py", "grafana.json"):
        (made / name).write_text((assets / name).read_text("utf-8"), encoding="utf-8")
    licence = (resources.files("mskip") / "LICENSE").read_text("utf-8")
    (made / "LICENSE").write_text(licence, encoding="utf-8")
    if contract.capacity:
        script = made / "build_plan.sh"
        script.write_text(_plan_script(contract, record), encoding="utf-8")
        script.chmod(0o755)
    lines = [f"{name}>={least}" for name, least in record["needs"].items()]
    (made / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


_BACKENDS = {
    "python": "`generate` runs the graph itself, on ONNX Runtime's CPU provider, with keys and "
    "values in place. `lm` gives the same graph to those who want its logits; it opens it with "
    "the first request, and takes no memory before.",
    "onnxruntime": "`lm` is a model of the onnxruntime backend. `generate` calls it, so keys and "
    "values travel between the two with every step: on a CPU the python backend is faster.",
    "tensorrt": "`lm` is a model of the tensorrt backend. Its plan depends on the GPU and on "
    "TensorRT's version, so it is built where it is served, from `models/lm/source/model.onnx`, "
    "with `build_plan.sh`. `generate` calls it, so keys and values travel between the two with "
    "every step.",
}


_PLAN_WORDS = """
### Before it is served: build the plan, on the GPU that serves it

    ./build_plan.sh
"""


def _plan_script(contract: Contract, record: dict[str, Any]) -> str:
    """A script with trtexec's command; the largest sizes are those of a full batch."""
    most = record["sequences"] + MOST_COMPANY
    sizes = {"min": (1, 1), "opt": (most, 1), "max": (most, contract.capacity)}
    shapes = []
    for kind, (rows, new) in sizes.items():
        known = {"sequence": new, "kept": 1}
        each = []
        for spec in contract.inputs():
            if not all(isinstance(axis, int) for axis in spec.axes):
                dims = [
                    axis if isinstance(axis, int) else known.get(axis, rows) for axis in spec.axes
                ]
                each.append(f"{spec.name}:{'x'.join(map(str, dims))}")
        shapes.append(f"  --{kind}Shapes={','.join(each)}")
    image = release(record["target"]).tensorrt_image
    return (
        " \\\n".join(
            [
                '#!/bin/sh\nset -e\ncd "$(dirname "$0")"\n'
                f'exec docker run --rm --gpus=all -v "$PWD:/repository" -w /repository {image}',
                "  trtexec --onnx=models/lm/source/model.onnx --saveEngine=models/lm/1/model.plan",
                "  --stronglyTyped",
                *shapes,
            ]
        )
        + "\n"
    )
