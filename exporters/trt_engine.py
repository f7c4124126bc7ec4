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
from mskip.compressor.files import sha256, whole_file, write_json
from mskip.compressor.progress import Progress, silent
from mskip.exporters.contract import Contract, read_contract
from mskip.exporters.onnx_export import CEILING, DENSE, MODEL, STATIC, peak_rss, reset_peak
from mskip.exporters.ort_runner import contract_path
from mskip.exporters.targets import Form
from mskip.exporters.trt_builders import Chosen
from mskip.exporters.trt_conditionals import Conditionals, look_at
from mskip.exporters.trt_profile import Profile

ENGINE = "model.engine"
BUILT = "engine.json"
"""What built the engines of a folder, and how; a runner reads it."""
PEERS = DENSE, STATIC, CEILING
"""Graphs that a routed engine is compared with."""
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
        peers: also build the dense and the static engines that `mskip bench --trt` compares with.
    """

    builder: Chosen
    profile: Profile
    capabilities: Sequence[str] = ()
    workspace: float | None = None
    timing_cache: Path | None = None
    verbose: bool = False
    mode: Mode = "if"
    peers: bool = False

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
    folder: Path,
    contract: Contract,
    build: Build,
    progress: Progress = silent,
    file: str = MODEL,
) -> tuple[Any, Conditionals, dict[str, Any]]:
    """Parse a graph and build its engine.

    Args:
        folder: of the export, in the build's form.
        contract: the graph's contract.
        build: how.
        progress: one unit a part.
        file: which graph.

    Returns:
        The engine's bytes, what its conditionals are, and what the builder logged.

    Raises:
        ModelError: the builder refuses the graph, or the parser took what is to be skipped out of
            its conditional.
    """
    trt = build.builder.module
    stage = engine_of(file)
    progress(stage, 0, 2, "parsing")
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
    if not parser.parse_from_file(str(folder / file)):
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
    progress(stage, 1, 2, "building")
    recorder.errors.clear()  # without a GPU, parsing asks for one in vain
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise _refused(build, "build", recorder.errors)
    if build.timing_cache is not None and (cache := config.get_timing_cache()) is not None:
        with whole_file(build.timing_cache) as temporary:
            temporary.write_bytes(bytes(cache.serialize()))
    progress(stage, 2, 2)
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
    if sum(found.layers[kind] for kind in kinds) < len(contract.cached_layers):
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


def built_form(run: Run) -> Form:
    """The form of the graph that a run's engine was built from last; conditionals if none was."""
    if not (run.reports / "tensorrt.json").is_file():
        return Form("trt")
    mode = run.report("tensorrt", "Build it with: mskip export --trt")["mode"]
    return Form("trt" if mode == "if" else "trt-plugin")


def engine_of(file: str) -> str:
    """Name of the engine that is built from a graph."""
    return file.replace(".onnx", ".engine")


def _write(path: Path, engine: Any) -> None:
    with whole_file(path) as temporary, temporary.open("wb") as file:
        file.write(engine)


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
    for name in (BUILT, *map(engine_of, (MODEL, *PEERS))):  # earlier ones have other settings
        (folder / name).unlink(missing_ok=True)
    started = time.monotonic()
    reset_peak()
    engine, conditionals, logged = build_engine(folder, contract, build, progress)
    _write(folder / ENGINE, engine)
    del engine
    conditions = {ENGINE: conditionals.conditions}
    for file in PEERS if build.peers else ():
        peer = read_contract(contract_path(folder, file))
        engine, found, _ = build_engine(folder, peer, build, progress, file)
        _write(folder / engine_of(file), engine)
        conditions[engine_of(file)] = found.conditions
    write_json(
        folder / BUILT,
        {
            "builder": build.builder.row.name,
            "version": build.builder.title,
            "mode": build.mode,
            "compute_capabilities": list(build.capabilities),
            "conditions": conditions,
        },
    )
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
        "peers": {name: (folder / name).stat().st_size for name in conditions if name != ENGINE},
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
