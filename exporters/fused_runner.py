"""ONNX Runtime on graphs whose keys and values lie in buffers, bound as past and present.

Memory that no position was written to is not resident.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mskip.exporters.buffered import BufferedRunner, Buffers, FixedBuffers, Outcome, past
from mskip.exporters.ort_runner import OrtRunner
from mskip.exporters.runner import Ints


@dataclass
class OrtBuffers(Buffers):
    """Keys and values as the runtime knows them.

    Attributes:
        values: the arrays' memory as the runtime's values.
        binding: the runtime's, with all values bound; None before that.
        made: keys and values that the runtime finds memory for, since their rows are not known yet.
        bound: names of the outputs in the binding's order.
    """

    values: dict[str, Any] = field(default_factory=dict)
    binding: Any = None
    made: list[str] = field(default_factory=list)
    bound: list[str] = field(default_factory=list)

    def make_room(self, capacity: int) -> None:
        """See `Buffers.make_room`."""
        super().make_room(capacity)
        self.binding = None


class FusedRunner(BufferedRunner, OrtRunner):
    """Runs a graph of target "ort"; see `OrtRunner` for the arguments."""

    def _run(
        self, buffers: OrtBuffers, feeds: dict[str, npt.NDArray[Any]], routing: Ints
    ) -> Outcome:
        ids, at = feeds["input_ids"], feeds["logits_at"]
        if buffers.binding is None:
            self._bind(buffers, len(ids))
        binding = buffers.binding
        # An OrtValue borrows the array's memory, which the caller holds until this returns.
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, self._value(array))
        # Of known sizes, hence in memory of ours: asking the runtime for outputs makes an object of
        # each, keys and values with them.
        logits = np.empty((*at.shape, self.contract.vocabulary), dtype=self.contract.dtype)
        results = {"logits": logits}
        if self.contract.routed_layers:
            results["routing_out"] = np.empty(routing.shape, dtype=np.int64)
            results["routing_scores"] = np.empty(routing.shape, dtype=np.float32)
        for name, array in results.items():
            binding.bind_ortvalue_output(name, self._value(array))
        for name in buffers.made:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        present = {}
        if buffers.made:
            values = dict(zip(buffers.bound, binding.get_outputs(), strict=True))
            present = {name: values[name].numpy() for name in buffers.made}
        return Outcome(
            logits.astype(np.float32, copy=False),
            results.get("routing_out", routing),
            results.get("routing_scores", np.zeros(routing.shape, dtype=np.float32)),
            present,
        )

    def _new_buffers(self, capacity: int, seen: Ints) -> OrtBuffers:
        return OrtBuffers(capacity, seen)

    def _bind(self, buffers: OrtBuffers, batch: int) -> None:
        """Bind keys and values; the rest changes with every call."""
        binding = self.session.io_binding()
        # Outputs come in the order in which they were bound first.
        buffers.bound, buffers.made = [], []
        for layer in self.contract.cached_layers:
            for part in ("key", "value"):
                name, output = past(layer, part), f"present.{layer}.{part}"
                given = buffers.values.get(name)
                if given is None:
                    given = self._nothing(batch)
                    buffers.made.append(output)
                else:
                    binding.bind_ortvalue_output(output, given)
                    buffers.bound.append(output)
                binding.bind_ortvalue_input(name, given)
        others = [name for name in self._outputs if not name.startswith("present.")]
        buffers.bound += [*others, *buffers.made]
        buffers.binding = binding

    def _nothing(self, rows: int) -> Any:
        return self._value(np.zeros(self._shape(rows, 0), dtype=self.contract.dtype))

    def _allocate(self, buffers: OrtBuffers, layer: int, rows: int) -> None:
        for part in ("key", "value"):
            array = untouched(self._shape(rows, buffers.capacity), np.dtype(self.contract.dtype))
            buffers.arrays[past(layer, part)] = array
            buffers.values[past(layer, part)] = self._value(array)
        buffers.binding = None

    def _grow(self, buffers: OrtBuffers, capacity: int, used: int) -> None:
        buffers.make_room(capacity)
        for name, old in list(buffers.arrays.items()):
            array = untouched(self._shape(len(old), capacity), old.dtype)
            array[:, :, :used] = old[:, :, :used]
            buffers.arrays[name], buffers.values[name] = array, self._value(array)


class BufferRunner(FixedBuffers, FusedRunner):
    """Runs a graph of target "trt" on ONNX Runtime; see `OrtRunner` for the arguments.

    It computes what TensorRT would, and stands for it where no GPU is at hand. Every call attends
    over the whole buffers, so it tells nothing about speed.
    """


def untouched(shape: Sequence[int], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Zeros that take no memory until they are written to, and give it back when they go.

    The heap keeps neither promise: it hands out used memory cleared, hence resident.
    """
    count = math.prod(shape)
    if not count:
        return np.zeros(shape, dtype)
    memory = mmap.mmap(-1, count * dtype.itemsize, access=mmap.ACCESS_COPY)
    return np.frombuffer(memory, dtype).reshape(shape)
