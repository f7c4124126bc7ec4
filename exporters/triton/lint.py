"""A repository held against Triton's own configuration format, its contract and its graph."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from mskip.compressor.errors import ArtifactError, MissingExtraError
from mskip.compressor.files import read_json
from mskip.exporters.contract import CONTRACT, Contract, TensorSpec, read_contract
from mskip.exporters.onnx_export import MODEL
from mskip.exporters.triton.config import TYPES, dims_of
from mskip.exporters.triton.repository import MODELS, RECORD
from mskip.exporters.triton.versions import check_opset, release

ONNX_TYPES = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    onnx.TensorProto.INT64: "int64",
}


def lint(folder: Path) -> dict[str, Any]:
    """Look for what a server would stumble over.

    Args:
        folder: of the repository.

    Returns:
        ``faults``, a text each, empty where it is clean; ``models``; ``loaded``: how far this
        went for each model; ``needs``: versions.

    Raises:
        ArtifactError: there is no repository.
        MissingExtraError: tritonclient is not installed.
    """
    record = read_json(folder / RECORD, "Triton repository", "Make it with: mskip export --triton")
    names = sorted(path.name for path in (folder / MODELS).iterdir() if path.is_dir())
    faults: list[str] = []
    configs: dict[str, Any] = {}
    for name in names:
        for path in _configs(folder / MODELS / name):
            try:
                parsed = _parse(path)
            except ValueError as error:
                faults.append(f"{path.relative_to(folder)}: {error}")
                continue
            configs.setdefault(name, parsed)
            faults += _model_faults(folder, name, path, parsed)
    faults += _ensemble_faults(configs)
    contract = read_contract(folder / MODELS / "generate/1" / CONTRACT)
    faults += _graph_faults(folder, configs.get("lm"), contract, record)
    faults += _checksum_faults(folder)
    backend = record["backend"]
    words = {
        "python": "python backend: `mskip serve --check` loads it",
        "onnxruntime": "linted, not loaded: this machine's server has no onnxruntime backend",
        "tensorrt": "linted, not loaded: the plan is built where it is served",
    }
    return {
        "repository": str(folder),
        "models": names,
        "loaded": {name: words[backend if name == "lm" else "python"] for name in names},
        "needs": {
            "triton": record["target"],
            "opset": record["graph"]["opset"],
            "ir_version": record["graph"]["ir_version"],
            **_backend_needs(record),
            "python models": record["needs"],
        },
        "faults": faults,
    }


def _backend_needs(record: dict[str, Any]) -> dict[str, str]:
    target = release(record["target"])
    if record["backend"] == "tensorrt":
        return {"tensorrt": f"that of {target.tensorrt_image}"}
    carried = target.onnxruntime
    return {"onnxruntime": f"{carried} (carried)"} if record["backend"] == "onnxruntime" else {}


def _configs(model: Path) -> list[Path]:
    return [model / "config.pbtxt", *sorted((model / "configs").glob("*.pbtxt"))]


def _parse(path: Path) -> Any:
    """The configuration.

    Raises:
        ValueError: it is none.
    """
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except ImportError:
        raise MissingExtraError("tritonclient", "triton") from None
    try:
        text = path.read_text(encoding="utf-8")
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except text_format.ParseError as error:
        raise ValueError(f"no model configuration: {error}") from error


def _model_faults(folder: Path, name: str, path: Path, config: Any) -> Iterator[str]:
    where = path.relative_to(folder)
    if config.name != name:
        yield f"{where}: it is named '{config.name}', its folder '{name}'"
    versions = [each for each in path.parents[path.parent.name == "configs"].iterdir()
                if each.is_dir() and each.name.isdecimal()]  # fmt: skip
    if not versions:
        yield f"{where}: the model has no version folder"
    if config.backend == "python":
        for version in versions:
            if not (version / "model.py").is_file():
                yield f"{where}: no model.py in version {version.name}"
    for tensor in (*config.input, *config.output):
        if not tensor.dims:
            yield f"{where}: '{tensor.name}' has no dims"
        if config.max_batch_size and len(tensor.dims) > 1 and tensor.dims[0] == -1:
            yield (
                f"{where}: '{tensor.name}' names the batch in its dims, though max_batch_size "
                f"is {config.max_batch_size}"
            )


def _ensemble_faults(configs: dict[str, Any]) -> Iterator[str]:
    """Each value that a step takes has been made, with the type that is wanted."""
    for name, config in configs.items():
        known = {each.name: each.data_type for each in config.input}
        for step in config.ensemble_scheduling.step:
            model = configs.get(step.model_name)
            if model is None:
                yield f"{name}: step '{step.model_name}' is no model of the repository"
                continue
            takes = {each.name: each for each in model.input}
            gives = {each.name: each.data_type for each in model.output}
            for inner, outer in step.input_map.items():
                if inner not in takes:
                    yield f"{name}: '{step.model_name}' has no input '{inner}'"
                elif known.get(outer) != takes[inner].data_type:
                    yield f"{name}: '{outer}' is not made before it is '{inner}' of another type"
            yield from (
                f"{name}: '{step.model_name}' wants '{each.name}'"
                for each in takes.values()
                if not each.optional and each.name not in step.input_map
            )
            known |= {outer: gives.get(inner) for inner, outer in step.output_map.items()}
        if config.ensemble_scheduling.step:
            for each in config.output:
                if known.get(each.name) != each.data_type:
                    yield f"{name}: output '{each.name}' is not made, or of another type"


def _graph_faults(
    folder: Path, config: Any, contract: Contract, record: dict[str, Any]
) -> Iterator[str]:
    if config is None:
        yield "there is no model 'lm'"
        return
    version = folder / MODELS / "lm/1"
    places = {
        "python": version / MODEL,
        "onnxruntime": version / MODEL / MODEL,
        "tensorrt": folder / MODELS / "lm/source" / MODEL,
    }
    path = places[record["backend"]]
    if not path.is_file():
        yield f"no graph at {path.relative_to(folder)}"
        return
    head = onnx.load(path, load_external_data=False)
    for kind, specs, values, tensors in (
        ("input", contract.inputs(), head.graph.input, config.input),
        ("output", contract.outputs(), head.graph.output, config.output),
    ):
        yield from _tensor_faults(kind, specs, values, tensors)
    if config.max_batch_size:
        yield "lm: max_batch_size is not 0, but tau has no batch"
    data = {
        entry.value
        for tensor in head.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    yield from (f"lm: no weights at {each}" for each in data if not (path.parent / each).is_file())
    target = release(record["target"])
    opset = max(each.version for each in head.opset_import if not each.domain)
    if record["backend"] == "onnxruntime":
        fault = check_opset(opset, head.ir_version, target.onnxruntime, f"Triton {target.name}")
    elif record["backend"] == "python":
        needs = record["needs"]["onnxruntime"]
        fault = check_opset(opset, head.ir_version, needs, "requirements.txt")
    else:
        fault = None
    if fault is not None:
        yield f"lm: {fault}"


def _tensor_faults(kind: str, specs: list[TensorSpec], values: Any, tensors: Any) -> Iterator[str]:
    in_graph = {value.name: value.type.tensor_type for value in values}
    in_config = {tensor.name: tensor for tensor in tensors}
    for spec in specs:
        if spec.name not in in_graph:
            yield f"lm: the graph has no {kind} '{spec.name}' of the contract"
        else:
            found = in_graph[spec.name]
            if ONNX_TYPES.get(found.elem_type) != spec.dtype:
                yield f"lm: {kind} '{spec.name}' of the graph is not {spec.dtype}"
            if len(found.shape.dim) != len(spec.axes):
                yield f"lm: {kind} '{spec.name}' of the graph has {len(found.shape.dim)} axes"
        if spec.name not in in_config:
            yield f"lm: the configuration has no {kind} '{spec.name}' of the contract"
            continue
        tensor = in_config[spec.name]
        named = tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
        if named[tensor.data_type].name != TYPES[spec.dtype]:
            yield f"lm: {kind} '{spec.name}' is not {TYPES[spec.dtype]}"
        if list(tensor.dims) != dims_of(spec):
            yield f"lm: {kind} '{spec.name}' has dims {list(tensor.dims)}, not {dims_of(spec)}"
    known = {spec.name for spec in specs}
    for name in (*in_config, *in_graph):
        if name not in known:
            yield f"lm: {kind} '{name}' is not in the contract"


def _checksum_faults(folder: Path) -> Iterator[str]:
    path = folder / "checksums.sha256"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ArtifactError(
            f"cannot read {path}: {error.strerror}.", "Make it with: mskip export --triton"
        ) from error
    for line in lines:
        digest, _, name = line.partition("  ")
        file = folder / name
        if not file.is_file():
            yield f"{name} is gone"
            continue
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                yield f"{name} is not what its checksum says"
