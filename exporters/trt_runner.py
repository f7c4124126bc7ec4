"""A TensorRT engine on the GPU of this machine, behind the runners' interface.

Keys and values are tensors on the device, each bound as the past and as the present: TensorRT
writes a cache where it was read (its KVCacheUpdate layer). Prompts go through the engine's first
profile, decoding steps through its second. Where plugins skip, no step waits for the host, and a
step is captured in a CUDA graph after two.

No machine with a GPU was at hand to run it: the tests let a stand-in execute the graph of the same
export on the very memory that is bound here.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mskip.compressor.errors import ArtifactError, MskipError
from mskip.compressor.files import read_json
from mskip.exporters.buffered import Buffers, FixedBuffers, Outcome, past
from mskip.exporters.contract import Contract, read_contract
from mskip.exporters.ort_runner import contract_path
from mskip.exporters.runner import Floats, Ints, State
from mskip.exporters.trt_builders import BUILDERS
from mskip.exporters.trt_engine import BUILT, ENGINE

_PROMPTS, _STEPS = 0, 1
"""The engine's profiles."""
_EAGER_STEPS = 2
"""Steps before one is captured: the first one after a change of shapes does more than the rest."""
_BUILD = "mskip export --trt"


@dataclass
class Call:
    """Memory of calls of one shape.

    Attributes:
        feeds: the graph's inputs but keys and values.
        results: its outputs but those.
        profile: of the engine.
        count: calls that were made.
        graph: the captured call.
    """

    feeds: dict[str, Tensor]
    results: dict[str, Tensor]
    profile: int
    count: int = 0
    graph: Any = None


@dataclass
class DeviceBuffers(Buffers):
    """Keys and values on the device, and what is called with them.

    Attributes:
        calls: by the shapes of what is fed.
    """

    calls: dict[tuple[tuple[int, ...], ...], Call] = field(default_factory=dict)


class TrtRunner(FixedBuffers):
    """Runs an engine; `open_engine` makes one from a file.

    Args:
        engine: TensorRT's `ICudaEngine`.
        contract: of the graph that it was built from.
        name: for reports.
        conditions: conditionals in it, each of which waits for the device once a call.
        captures: whether steps may be captured in a CUDA graph.
        device: where the engine runs.
    """

    def __init__(
        self,
        engine: Any,
        contract: Contract,
        *,
        name: str,
        conditions: int,
        captures: bool,
        device: str = "cuda",
    ) -> None:
        self.contract, self.name, self.conditions = contract, name, conditions
        self._engine, self._captures = engine, captures
        self._device = torch.device(device)
        self._dtype: torch.dtype = getattr(torch, contract.dtype)
        # TensorRT waits for the whole device on the default stream.
        self._stream = torch.cuda.Stream() if self._device.type == "cuda" else None
        self._contexts = []
        for profile in (_PROMPTS, _STEPS):
            context = engine.create_execution_context()
            if context is None or not context.set_optimization_profile_async(profile, self._handle):
                raise MskipError(
                    f"{name} gives no context for profile {profile}: it lacks memory, or the "
                    "engine is not mskip's.",
                    f"Free memory, or build again: {_BUILD}",
                )
            self._contexts.append(context)
        self._bound: dict[int, Call] = {}
        """What each context is bound to."""
        self._limits = [
            {
                spec.name: engine.get_tensor_profile_shape(spec.name, profile)
                for spec in contract.inputs()
                if any(isinstance(axis, str) for axis in spec.axes)
            }
            for profile in (_PROMPTS, _STEPS)
        ]
        self.largest_batch, self._kept = map(int, self._limits[_PROMPTS]["logits_at"][2])

    @property
    def waits(self) -> int:
        """How often a decoding step makes the host wait for the device, its result apart."""
        return self.conditions

    @property
    def _handle(self) -> int:
        return 0 if self._stream is None else int(self._stream.cuda_stream)

    def _on_stream(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def select(self, state: State, rows: Any) -> State:
        """See `Runner.select`."""
        with self._on_stream():
            return super().select(state, rows)

    # -- calls --

    def _run(
        self, buffers: DeviceBuffers, feeds: dict[str, npt.NDArray[Any]], routing: Ints
    ) -> Outcome:
        # PyTorch warns of memory that it may not write to, such as a view of one row for several.
        feeds = {name: np.require(array, requirements=("C", "W")) for name, array in feeds.items()}
        logits: list[Floats] = []
        columns = feeds["logits_at"]
        # All logits of a prompt are asked for in proofs alone, and the engine gives a few at a
        # time. Reading the prompt again writes the same keys and values.
        for start in range(0, columns.shape[1], self._kept):
            at = np.ascontiguousarray(columns[:, start : start + self._kept])
            call = self._called(buffers, {**feeds, "logits_at": at})
            logits.append(_read(call.results["logits"].float()))
        decided, scores = routing, np.zeros(routing.shape, dtype=np.float32)
        if self.contract.routed_layers:
            decided = _read(call.results["routing_out"])
            scores = _read(call.results["routing_scores"])
        return Outcome(np.concatenate(logits, axis=1), decided, scores, {})

    def _called(self, buffers: DeviceBuffers, feeds: dict[str, npt.NDArray[Any]]) -> Call:
        call = self._memory(buffers, feeds)
        with self._on_stream():
            for name, array in feeds.items():
                call.feeds[name].copy_(torch.from_numpy(array))
            if call.graph is not None:
                call.graph.replay()
            else:
                self._execute(call, buffers)
            call.count += 1
        if self._stream is not None:
            self._stream.synchronize()  # results are read on the caller's stream
        return call

    def _execute(self, call: Call, buffers: DeviceBuffers) -> None:
        context = self._contexts[call.profile]
        if self._bound.get(call.profile) is not call:
            self._bind(context, call, buffers)
            self._bound[call.profile] = call
        steady = call.profile == _STEPS and call.count >= _EAGER_STEPS
        if self._captures and steady and self._stream is not None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                self._enqueue(context)
            call.graph = graph
            graph.replay()
        else:
            self._enqueue(context)

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._handle):
            raise MskipError(
                f"{self.name} failed in a call.",
                "Its log is on the error stream; try it with a smaller batch or prompt.",
            )

    def _memory(self, buffers: DeviceBuffers, feeds: dict[str, npt.NDArray[Any]]) -> Call:
        """The call of these shapes; its memory is made the first time."""
        shapes = tuple(array.shape for array in feeds.values())
        if (call := buffers.calls.get(shapes)) is not None:
            return call
        profile = _STEPS if feeds["input_ids"].shape[1] == 1 else _PROMPTS
        for name, array in feeds.items():
            self._check_size(profile, name, array.shape)
        batch, kept = feeds["logits_at"].shape
        routed = len(self.contract.routed_layers)

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=self._device)

        with self._on_stream():
            given = {
                name: torch.empty(
                    array.shape, dtype=torch.from_numpy(array).dtype, device=self._device
                )
                for name, array in feeds.items()
            }
            results = {"logits": empty(batch, kept, self.contract.vocabulary, dtype=self._dtype)}
            if routed:
                results["routing_out"] = empty(batch, routed, dtype=torch.int64)
                results["routing_scores"] = empty(batch, routed, dtype=torch.float32)
        call = buffers.calls[shapes] = Call(given, results, profile)
        return call

    def _check_size(self, profile: int, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._limits[profile]:
            return
        least, _, most = self._limits[profile][name]
        if all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
            return
        raise ArtifactError(
            f"this engine was built for {name} of {_sizes(least)} to {_sizes(most)}, not of "
            f"{_sizes(shape)}.",
            f"Build it for more: {_BUILD} --profile 'batch=1,4,8 seq=1,512,2048'",
        )

    def _bind(self, context: Any, call: Call, buffers: DeviceBuffers) -> None:
        for name, tensor in call.feeds.items():
            self._take(context.set_input_shape(name, tuple(tensor.shape)), name)
            self._take(context.set_tensor_address(name, tensor.data_ptr()), name)
        for name, tensor in call.results.items():
            self._take(context.set_tensor_address(name, tensor.data_ptr()), name)
        for layer in self.contract.cached_layers:
            for part in ("key", "value"):
                name, memory = past(layer, part), buffers.arrays[past(layer, part)]
                self._take(context.set_input_shape(name, tuple(memory.shape)), name)
                self._take(context.set_tensor_address(name, memory.data_ptr()), name)
                output = f"present.{layer}.{part}"
                self._take(context.set_tensor_address(output, memory.data_ptr()), output)

    def _take(self, taken: bool, name: str) -> None:
        if not taken:
            raise MskipError(
                f"{self.name} does not take {name}.", f"Build the engine again: {_BUILD}"
            )

    # -- buffers --

    def _new_buffers(self, capacity: int, seen: Ints) -> DeviceBuffers:
        return DeviceBuffers(capacity, seen)

    def _allocate(self, buffers: DeviceBuffers, layer: int, rows: int) -> None:
        with self._on_stream():
            for part in ("key", "value"):
                # Cleared: a position that nobody attends to counts nothing, unless it holds NaN.
                buffers.arrays[past(layer, part)] = torch.zeros(
                    *self._shape(rows, buffers.capacity), dtype=self._dtype, device=self._device
                )


def _read(tensor: Tensor) -> npt.NDArray[Any]:
    """A copy on the host: the next call writes over the tensor."""
    found: npt.NDArray[Any] = tensor.to("cpu", copy=True).numpy()
    return found


def _sizes(shape: Any) -> str:
    return " x ".join(str(int(size)) for size in shape)


def no_device() -> MskipError | None:
    """Why no engine can be executed here; None where one can."""
    if torch.cuda.is_available():
        return None
    return MskipError(
        "TensorRT engine: not run: no CUDA device.",
        "Run it on the GPU that it is for. Its graph runs here: mskip validate --target trt",
    )


def open_engine(folder: Path, file: str = ENGINE) -> TrtRunner:
    """The runner of an engine that `mskip export --trt` built.

    Args:
        folder: of the export.
        file: which engine in it.

    Raises:
        ArtifactError: there is none, or TensorRT refuses it, as it does on another kind of GPU.
        MskipError: no CUDA device, or what built it is not installed.
    """
    if (missing := no_device()) is not None:
        raise missing
    if not (folder / file).is_file():
        option = "" if file == ENGINE else " --trt-peers"
        raise ArtifactError(f"no engine at {folder / file}.", f"Make it with: {_BUILD}{option}")
    built = read_json(folder / BUILT, "record of the engine", f"Build it again: {_BUILD}")
    row = next(row for row in BUILDERS if row.name == built["builder"])
    trt = row.module()
    if trt is None:
        raise MskipError(
            f"{folder / file} was built by {row.name}, which is not installed.",
            f"Install with: {row.install}",
        )
    contract = read_contract(contract_path(folder, file.replace(".engine", ".onnx")))
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(
        (folder / file).read_bytes()
    )
    title = f"{row.name} {trt.__version__}"
    if engine is None:
        made = ", ".join(built["compute_capabilities"]) or "the GPU of its machine"
        here = "{}.{}".format(*torch.cuda.get_device_capability())
        raise ArtifactError(
            f"{title} refuses {folder / file}: built by {built['version']} for {made}; this GPU "
            f"has {here}.",
            f"Build it here: {_BUILD}",
        )
    return TrtRunner(
        engine,
        contract,
        name=f"{title} {torch.cuda.get_device_name()}",
        conditions=built["conditions"].get(file, 0),
        captures=built["mode"] == "plugin",
    )
