"""An exported graph as the batch calls it: its shape, and the two ways to run it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

UNDECIDED = -1


@dataclass(frozen=True)
class Shape:
    """What a batch has to know of a graph; entries of its ``contract.json``.

    Attributes:
        routed: decoder layer of each routed sublayer.
        cached: decoder layers that have keys and values.
        compact: those whose cache has rows for executing sequences only.
        kv_heads: key/value heads.
        head_dim: width of a head.
        vocabulary: width of the logits.
        dtype: of logits, keys and values.
        tau: calibrated threshold of each routed sublayer.
        ends: token ids that end a text.
        pad: token id that stands for none.
        capacity: positions of a buffer where the graph fixes them, else 0.
    """

    routed: list[int]
    cached: list[int]
    compact: frozenset[int]
    kv_heads: int
    head_dim: int
    vocabulary: int
    dtype: str
    tau: tuple[float, ...]
    ends: frozenset[int]
    pad: int
    capacity: int

    @property
    def position_bytes(self) -> int:
        """Bytes of keys and values of one position in one layer."""
        return 2 * self.kv_heads * self.head_dim * np.dtype(self.dtype).itemsize


def read_shape(path: Path) -> Shape:
    """The shape that a ``contract.json`` tells.

    Raises:
        ValueError: the graph does not keep its keys and values in buffers.
    """
    value = json.loads(path.read_text(encoding="utf-8"))
    if value["target"] == "portable":
        raise ValueError(f"{path} is of a portable graph; serving needs keys and values in place.")
    compact = value["granularity"] != "mlp" and value["target"] == "ort"
    gone = [] if value["granularity"] == "mlp" else value["removed_layers"]
    return Shape(
        routed=value["routed_layers"],
        cached=[layer for layer in range(value["layers"]) if layer not in gone],
        compact=frozenset(value["routed_layers"] if compact else ()),
        kv_heads=value["kv_heads"],
        head_dim=value["head_dim"],
        vocabulary=value["vocabulary"],
        dtype=value["dtype"],
        tau=tuple(value["tau"]),
        ends=frozenset(value["eos"]),
        pad=value["pad"],
        capacity=value["capacity"],
    )


class Graph(Protocol):
    """A graph that writes keys and values to the arrays that it is given."""

    shape: Shape

    def run(self, feeds: Arrays, caches: Mapping[str, Array], stamp: object) -> Arrays:
        """One call.

        Args:
            feeds: inputs but keys and values, by name; contiguous.
            caches: keys and values by input name, contiguous; the new positions are written there.
            stamp: equal to that of an earlier call only if ``caches`` are the same memory.

        Returns:
            ``logits`` [rows, 1, vocabulary], and of a routed graph ``routing_out`` and
            ``routing_scores``, [rows, routed].
        """
        ...


def results(shape: Shape, rows: int) -> Arrays:
    """Memory for what a call gives beside keys and values."""
    made: Arrays = {"logits": np.empty((rows, 1, shape.vocabulary), dtype=shape.dtype)}
    if shape.routed:
        made["routing_out"] = np.empty((rows, len(shape.routed)), dtype=np.int64)
        made["routing_scores"] = np.empty((rows, len(shape.routed)), dtype=np.float32)
    return made


class LocalGraph:
    """A graph in this process, on ONNX Runtime's CPU provider.

    Args:
        model: the ONNX file.
        shape: of it.
        threads: of one call; 0 leaves them to the runtime.
    """

    def __init__(self, model: Path, shape: Shape, threads: int = 0) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        # Threads spin between the products of a step, not between steps: these cores have tokens to
        # send.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.shape = shape
        self.session = onnxruntime.InferenceSession(
            str(model), options, providers=["CPUExecutionProvider"]
        )
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._bound: tuple[object, Any, Any] | None = None

    def run(self, feeds: Arrays, caches: Mapping[str, Array], stamp: object) -> Arrays:
        """See `Graph.run`; nothing is copied."""
        if self._bound is None or self._bound[0] != stamp:
            binding = self.session.io_binding()
            values = {name: self._value(array) for name, array in caches.items()}
            for name, value in values.items():
                binding.bind_ortvalue_input(name, value)
                binding.bind_ortvalue_output(_present(name), value)
            self._bound = stamp, binding, values
        binding = self._bound[1]
        made = results(self.shape, len(feeds["input_ids"]))
        # A bound value borrows its array's memory: both live until the call is over.
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, self._value(array))
        for name, array in made.items():
            binding.bind_ortvalue_output(name, self._value(array))
        self.session.run_with_iobinding(binding)
        return made


class RemoteGraph:
    """A graph that is another model of the same server.

    Keys and values travel both ways with every call, so this costs what they weigh: it is for
    backends that hold the graph themselves.

    Args:
        call: inputs by name to outputs by name.
        shape: of the graph.
    """

    def __init__(self, call: Any, shape: Shape) -> None:
        self.call = call
        self.shape = shape

    def run(self, feeds: Arrays, caches: Mapping[str, Array], stamp: object) -> Arrays:
        """See `Graph.run`."""
        seen = self.shape.capacity or feeds["attention_mask"].shape[1]
        given = {name: np.ascontiguousarray(cache[:, :, :seen]) for name, cache in caches.items()}
        made = self.call({**feeds, **given})
        for name, cache in caches.items():
            cache[:, :, :seen] = made[_present(name)]
        return {name: made[name] for name in results(self.shape, 0)}


def past(layer: int, part: str) -> str:
    """Input name of a layer's keys ("key") or values ("value")."""
    return f"past_key_values.{layer}.{part}"


def _present(name: str) -> str:
    return name.replace("past_key_values", "present")
