"""From the exported graph to a TensorRT engine, with a report of what was built."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mskip.compressor.artifact import Run
from mskip.compressor.errors import ArtifactError, ModelError, MskipError
from mskip.compressor.files import sha256, whole_file
from mskip.compressor.progress import Progress, silent
from mskip.exporters.contract import Contract, read_contract
from mskip.exporters.onnx_export import MODEL, peak_rss, reset_peak
from mskip.exporters.ort_runner import contract_path
from mskip.exporters.targets import Form
from mskip.exporters.trt_builders import Chosen
from mskip.exporters.trt_conditionals import Conditionals, look_at
from mskip.exporters.trt_profile import Profile

ENGINE = "model.engine"
Mode = Literal["if", "plugin"]
_GIB = 1 << 30


@dataclass(frozen=True)
class Build:
    """How an engine is built.

    Attributes:
        builder: with what.
        profile: for which sizes.
        capabilities: compute capabilities, such as "8.9"; none for the GPU of this machine.
        workspace: largest scratch memory in GiB; None leaves it to the builder.
        timing_cache: file that measured kernels are kept in.
        verbose: print all that the builder says to the error stream.
        mode: whether conditionals skip, or plugins.
    """

    builder: Chosen
    profile: Profile
    capabilities: Sequence[str] = ()
    workspace: float | None = None
    timing_cache: Path | None = None
    verbose: bool = False
    mode: Mode = "if"

    @property
    def form(self) -> Form:
        """The form of the graph that it is built from."""
        return Form("trt" if self.mode == "if" else "trt-plugin")


def _recorder(trt: Any, verbose: bool) -> Any:
    """A logger of the builder's, which keeps errors and counts the rest."""

    class Recorder(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.counts: Counter[str] = Counter()

        def log(self, severity: Any, message: str) -> None:
            self.counts[severity.name.lower()] += 1
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
            if verbose:
                print(f"{severity.name.lower()}: {message}", file=sys.stderr)

    return Recorder()


def build_engine(
    folder: Path, contract: Contract, build: Build, progress: Progress = silent
) -> tuple[Any, Conditionals, dict[str, Any]]:
    """Parse a graph and build its engine.

    Args:
        folder: of the export, in the build's form.
        contract: its contract.
        build: how.
        progress: one unit a part.

    Returns:
        The engine's bytes, what its conditionals are, and what the builder logged.

    Raises:
        ModelError: the builder refuses the graph, or the parser took what is to be skipped out of
            its conditional.
    """
    trt = build.builder.module
    progress("engine", 0, 2, "parsing")
    recorder = _recorder(trt, build.verbose)
    builder = trt.Builder(recorder)
    # Types are the graph's own; TensorRT 11 knows no other networks.
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    if build.mode == "plugin":
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)
        _plugins(trt, build)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, recorder)
    if build.mode == "plugin":  # else the parser takes the functions in the file
        parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
    if not parser.parse_from_file(str(folder / MODEL)):
        said = [str(parser.get_error(number)) for number in range(parser.num_errors)]
        raise _refused(build, "parse", said or recorder.errors)
    conditionals = look_at(network, contract)
    if build.mode == "plugin":
        _check_plugins(conditionals, contract, build)
    elif conditionals.outside or not all(conditionals.behind.values()):
        raise ModelError(
            f"{build.builder.title} took {len(conditionals.outside)} products out of their "
            "conditionals: this engine would compute what it is to skip.",
            "Please report it with reports/tensorrt.json; nothing was written.",
        )
    config = _configured(builder, network, contract, build)
    progress("engine", 1, 2, "building")
    recorder.errors.clear()  # without a GPU, parsing asks for one in vain
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise _refused(build, "build", recorder.errors)
    if build.timing_cache is not None and (cache := config.get_timing_cache()) is not None:
        with whole_file(build.timing_cache) as temporary:
            temporary.write_bytes(bytes(cache.serialize()))
    progress("engine", 2, 2)
    return engine, conditionals, dict(recorder.counts)


def _plugins(trt: Any, build: Build) -> None:
    from mskip.exporters.trt_plugin import register

    capability = next(iter(build.capabilities), None)
    if capability is None:
        import torch

        capability = "{}.{}".format(*torch.cuda.get_device_capability())
    register(trt, capability)


def _check_plugins(found: Conditionals, contract: Contract, build: Build) -> None:
    """Each layer's attention is a plugin, so the parser did not take the functions instead."""
    kinds = [kind for kind in found.layers if kind.startswith("PLUGIN")]
    if sum(found.layers[kind] for kind in kinds) < contract.layers:
        raise ModelError(
            f"{build.builder.title} put standard layers in the places of the plugins: this engine "
            "would compute what it is to skip.",
            "Use --trt-mode if; nothing was written.",
        )


def _configured(builder: Any, network: Any, contract: Contract, build: Build) -> Any:
    trt = build.builder.module
    config = builder.create_builder_config()
    for shapes in build.profile.shapes(contract):
        profile = builder.create_optimization_profile()
        for name, (least, likeliest, largest) in shapes.items():
            profile.set_shape(name, least, likeliest, largest)
        config.add_optimization_profile(profile)
    if build.capabilities:
        config.num_compute_capabilities = len(build.capabilities)
        for number, each in enumerate(build.capabilities):
            config.set_compute_capability(build.builder.capability(each), number)
    if build.workspace is not None:
        limit = int(build.workspace * _GIB)
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, limit)
    if build.timing_cache is not None:
        known = build.timing_cache.read_bytes() if build.timing_cache.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    return config


def _refused(build: Build, what: str, said: Sequence[str]) -> MskipError:
    return ModelError(
        f"{build.builder.title} cannot {what} the graph: "
        + (said[0].strip().splitlines()[0] if said else "it does not say why")
        + ".",
        "Say --verbose for all that it logs.",
    )


def engine_run(run: Run, build: Build, progress: Progress = silent) -> dict[str, Any]:
    """Build the engine of a run that was exported in the build's form.

    Returns:
        The report, as saved in ``reports/tensorrt.json``.

    Raises:
        ArtifactError: the run was not so exported, or for another context.
        ModelError: see `build_engine`.
    """
    folder = build.form.exported(run)
    contract = read_contract(contract_path(folder, MODEL))
    if contract.capacity != build.profile.context:
        raise ArtifactError(
            f"{folder / MODEL} has caches of {contract.capacity} positions, not "
            f"{build.profile.context}.",
            "Export again.",
        )
    started = time.monotonic()
    reset_peak()
    engine, conditionals, logged = build_engine(folder, contract, build, progress)
    with whole_file(folder / ENGINE) as temporary, temporary.open("wb") as file:
        file.write(engine)
    report = {
        "builder": build.builder.title,
        "file": f"{folder.name}/{ENGINE}",
        "compute_capabilities": list(build.capabilities),
        "precision": contract.dtype,
        "mode": build.mode,
        "profiles": [
            {name: [list(shape) for shape in shapes] for name, shapes in each.items()}
            for each in build.profile.shapes(contract)
        ],
        "bytes": (folder / ENGINE).stat().st_size,
        "sha256": sha256(folder / ENGINE),
        "graph_sha256": sha256(folder / MODEL),
        "seconds": round(time.monotonic() - started, 1),
        "peak_rss_bytes": peak_rss(),
        "layers": sum(conditionals.layers.values()),
        "layers_by_kind": dict(conditionals.layers.most_common()),
        "conditions": conditionals.conditions,
        "behind_conditions": conditionals.behind,
        "outside": conditionals.outside,
        "logged": logged,
    }
    run.write_report("tensorrt", report)
    run.write_manifest(engine={"sha256": report["sha256"], "builder": report["builder"]})
    return report
